"""Ways to choose the examples of a two-label question, side by side on the same queries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from mechicl.errors import OptionError
from mechicl.results.base import Estimate, Provenance, Skipped, columns


@dataclass(frozen=True, eq=False)
class StrategyScore:
    """One way to answer, on every query that is compared.

    Per-query arrays are [batch]. `scores`: log-probability of the positive label minus the negative one, nats (model-free ways: the share of votes
    for the positive label, or 1 and -1, without a unit). `predicted`, `correct`: whether the positive label was chosen, and whether rightly.
    `accuracy`, `auroc` (of the scores; NaN where only one label occurs), `f1` (of the positive label; NaN where it neither occurs nor is chosen):
    bootstrap intervals over queries. `accuracy_change`, `auroc_change`, `f1_change`: this way minus `Strategies.baseline` on the same queries,
    paired bootstrap; None for the baseline itself, and where it was not run. `mcnemar_p`: exact test of the paired answers; `holm_p`: corrected for
    the number of ways compared. `shots`: examples in a prompt, on average. `positive_share`: how often the positive label was chosen.
    """

    strategy: str
    kind: str
    accuracy: Estimate
    auroc: Estimate
    f1: Estimate
    accuracy_change: Estimate | None
    auroc_change: Estimate | None
    f1_change: Estimate | None
    mcnemar_p: float
    holm_p: float
    shots: float
    positive_share: float
    scores: np.ndarray
    predicted: np.ndarray
    correct: np.ndarray


@dataclass(frozen=True, eq=False)
class Strategies:
    """Zero-shot, random, retrieved and anchored examples beside baselines that need no model, on the same queries.

    `rows`: one per way, in the order asked. `labels`: (negative, positive). `answers` [batch]: whether the right label is the positive one.
    `chance`: accuracy of always choosing the more frequent label. `skipped`: queries left out of every way, with the reason.
    """

    rows: tuple[StrategyScore, ...]
    baseline: str
    labels: tuple[str, str]
    answers: np.ndarray
    query_ids: tuple[str, ...]
    chance: float
    n: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()

    def __getitem__(self, strategy: str) -> StrategyScore:
        """The row of a strategy.

        Raises:
            OptionError: it was not run.
        """
        for row in self.rows:
            if row.strategy == strategy:
                return row
        raise OptionError(
            f"strategy must be one of {', '.join(row.strategy for row in self.rows)}; got {strategy!r}. Ask for one that was run."
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per strategy."""
        rows = []
        for row in self.rows:
            found: dict[str, object] = {"strategy": row.strategy, "kind": row.kind, "shots": row.shots}
            for name in ("accuracy", "auroc", "f1"):
                found |= columns(name, getattr(row, name))
            for name in ("accuracy_change", "auroc_change", "f1_change"):
                found |= columns(name, getattr(row, name))
            rows.append({**found, "mcnemar_p": row.mcnemar_p, "holm_p": row.holm_p, "positive_share": row.positive_share, "n": self.n})
        return pd.DataFrame(rows)

    def answers_frame(self) -> pd.DataFrame:
        """One row per query and strategy: what each way answered."""
        negative, positive = self.labels
        parts = [
            pd.DataFrame(
                {"query": self.query_ids, "strategy": row.strategy, "score": row.scores,
                 "predicted": np.where(row.predicted, positive, negative), "answer": np.where(self.answers, positive, negative),
                 "correct": row.correct}
            )
            for row in self.rows
        ]  # fmt: skip
        return pd.concat(parts, ignore_index=True)
