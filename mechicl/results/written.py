"""Written answers to a benchmark's questions over shots, marked as published and otherwise, beside what needs no model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from mechicl.errors import OptionError
from mechicl.results.base import Estimate, Provenance, Skipped, columns


@dataclass(frozen=True, eq=False)
class WrittenRow:
    """All queries at one number of shots. Per-episode arrays are [batch].

    Attributes:
        shots: As the benchmark counts them.
        examples: In a prompt.
        written: What was written is right by the published rule. `ours`: by our rule.
        likelihood: The right candidate is the most probable one; its n is smaller where candidates of some prompts cannot be compared.
        chance: Of likelihood: one over the number of candidates, mean over the prompts that count there.
        copied: Probability that the label of an example drawn at random is the answer; 0 without examples.
        right, ours_right: Whether each was right.
        likely: 1 or 0; NaN where candidates cannot be compared.
        texts: What was written.
    """

    shots: int
    examples: float
    written: Estimate
    ours: Estimate
    likelihood: Estimate
    chance: float
    copied: Estimate
    right: np.ndarray
    ours_right: np.ndarray
    likely: np.ndarray
    texts: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class WrittenChange:
    """One number of shots against none, the same queries in both: the change of a share, and McNemar's exact p with Holm's correction over the rows."""

    measure: str
    shots: int
    change: Estimate
    mcnemar_p: float
    holm_p: float


@dataclass(frozen=True, eq=False)
class WrittenAnswers:
    """A model on a benchmark's task, the same queries at every number of shots, none (the zero-shot control) included.

    Attributes:
        task: Its name.
        rows: By number of shots.
        always: Who always says `commonest`, the answer that most of these queries have, is right so often, by the published rule.
        changes: Paired tests against zero shots.
        answers: Right ones, [batch]. `episode_ids`: [batch].
        n: Queries in every row.
        skipped: Queries that could not be asked at some number of shots, left out of all.
    """

    task: str
    rows: tuple[WrittenRow, ...]
    always: Estimate
    commonest: str
    changes: tuple[WrittenChange, ...]
    answers: tuple[str, ...]
    episode_ids: tuple[str, ...]
    n: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()

    def __getitem__(self, shots: int) -> WrittenRow:
        """The row of a number of shots.

        Raises:
            OptionError: it was not run.
        """
        for row in self.rows:
            if row.shots == shots:
                return row
        raise OptionError(f"shots must be one of {', '.join(str(row.shots) for row in self.rows)}; got {shots}. Ask for one that was run.")

    def to_frame(self) -> pd.DataFrame:
        """One row per number of shots and measure ("written", "ours", "likelihood", "copied", "always")."""
        found = []
        for row in self.rows:
            for name, e in (
                ("written", row.written),
                ("ours", row.ours),
                ("likelihood", row.likelihood),
                ("copied", row.copied),
                ("always", self.always),
            ):
                test = next((c for c in self.changes if c.shots == row.shots and c.measure == name), None)
                paired = columns("change", test.change) | {"holm_p": test.holm_p} if test else {}
                found.append(
                    {"task": self.task, "shots": row.shots, "examples": row.examples, "measure": name, "value": e.value, "low": e.low, "high": e.high, "n": e.n,
                     "chance": row.chance if name == "likelihood" else np.nan, **paired}
                )  # fmt: skip
        return pd.DataFrame(found)

    def answers_frame(self) -> pd.DataFrame:
        """One row per number of shots and query."""
        return pd.DataFrame(
            {
                "shots": row.shots,
                "episode": name,
                "answer": answer,
                "text": text,
                "right": bool(right),
                "ours": bool(ours),
                "likelihood": likely,
            }
            for row in self.rows
            for name, answer, text, right, ours, likely in zip(
                self.episode_ids, self.answers, row.texts, row.right, row.ours_right, row.likely, strict=True
            )
        )
