"""How well a model answers, intact and with heads switched off."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from mechicl.results.base import Estimate, Head, Provenance, Skipped


@dataclass(frozen=True, eq=False)
class ICLAccuracy:
    """How well the model answers from the examples.

    Per-episode arrays are [batch]. `correct`: the right label has the highest full-label log-probability among the candidates;
    `first_token_correct`: the same with the first token only; `open_correct`: the greedy first token over the whole vocabulary is the right label's first token.
    `margin`: log-probability of the right label minus the best wrong one, nats. `predicted`: index of the chosen candidate.
    `score`: what decided between candidates (see `mechicl.analysis.labels.LabelScore`).
    """

    accuracy: Estimate
    first_token_accuracy: Estimate
    open_accuracy: Estimate
    cla: Estimate
    margin: Estimate
    chance: float
    zero_shot: Estimate | None
    correct: np.ndarray
    first_token_correct: np.ndarray
    open_correct: np.ndarray
    margins: np.ndarray
    predicted: np.ndarray
    answers: np.ndarray
    candidates: tuple[tuple[str, ...], ...]
    episode_ids: tuple[str, ...]
    n: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()
    score: str = "full"

    def to_frame(self) -> pd.DataFrame:
        """One row per episode."""
        return pd.DataFrame(
            {"episode": self.episode_ids, "correct": self.correct, "first_token_correct": self.first_token_correct,
             "open_correct": self.open_correct, "margin_nats": self.margins,
             "predicted": [c[i] for c, i in zip(self.candidates, self.predicted, strict=True)],
             "answer": [c[i] for c, i in zip(self.candidates, self.answers, strict=True)]}
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class AblationCell:
    """One set of heads switched off, on the same episodes as the intact model.

    `change`: accuracy with the heads off minus intact, paired bootstrap interval. `margin_change`: the same in nats.
    `mcnemar_p`: exact McNemar test of the paired answers.
    """

    heads: tuple[Head, ...]
    accuracy: Estimate
    change: Estimate
    margin_change: Estimate
    mcnemar_p: float
    correct: np.ndarray
    margins: np.ndarray
    name: str = ""


@dataclass(frozen=True, eq=False)
class Ablation:
    """Heads switched off, beside the intact model and matched random heads.

    `random`: one cell per draw of random heads (as many heads; same layers where these have heads left, else the nearest layers: then `match_note`
    says so; fewer draws than asked where there are no more, none where no heads are left). `p_random`: share of draws (with the +1 correction) whose accuracy falls at least as far as that of the chosen heads; NaN without draws.
    `verdict`: a sentence; `finding`: the same in a word, one of `mechicl.analysis.ablation.verdict.FINDINGS`.
    """

    how: str
    intact: ICLAccuracy
    chosen: AblationCell
    singles: tuple[AblationCell, ...]
    random: tuple[AblationCell, ...]
    random_mean: Estimate
    p_random: float
    zero_shot: Estimate | None
    match_note: str
    verdict: str
    n: int
    provenance: Provenance
    finding: str = ""
    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One row per set of heads."""
        rows = []
        for kind, cells in (("chosen", (self.chosen,)), ("single", self.singles), ("random", self.random)):
            for cell in cells:
                rows.append(
                    {"kind": kind, "heads": " ".join(f"{a}.{b}" for a, b in cell.heads), "n_heads": len(cell.heads),
                     "accuracy": cell.accuracy.value, "low": cell.accuracy.low, "high": cell.accuracy.high,
                     "change": cell.change.value, "change_low": cell.change.low, "change_high": cell.change.high,
                     "margin_change_nats": cell.margin_change.value, "mcnemar_p": cell.mcnemar_p, "n": cell.accuracy.n}
                )  # fmt: skip
        return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class DoseCurve:
    """Accuracy as the top 1, 2, ... k heads are switched off, with a band of matched random sets.

    `ks` [k]; `accuracy[k]`; `random_low/mean/high` [k]: 2.5 %, mean, 97.5 % over random draws.
    """

    ranking: tuple[Head, ...]
    ranked_by: str
    ks: np.ndarray
    accuracy: tuple[Estimate, ...]
    margin: tuple[Estimate, ...]
    random_mean: np.ndarray
    random_low: np.ndarray
    random_high: np.ndarray
    n_draws: int
    chance: float
    how: str
    n: int
    provenance: Provenance
    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One row per number of heads off."""
        return pd.DataFrame(
            {"k": self.ks, "accuracy": [a.value for a in self.accuracy], "low": [a.low for a in self.accuracy],
             "high": [a.high for a in self.accuracy], "margin_nats": [m.value for m in self.margin],
             "random_mean": self.random_mean, "random_low": self.random_low, "random_high": self.random_high, "n": self.n}
        )  # fmt: skip
