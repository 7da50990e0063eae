"""What comes of holding induction heads against function-vector heads: both scores, their overlap, and what the model loses without either."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from mechicl.results.attribution import HeadOverlap
from mechicl.results.base import Estimate, Head, Provenance, Skipped
from mechicl.results.heads import Score


@dataclass(frozen=True, eq=False)
class OddsSetting:
    """One task at one number of shots, the model intact, on the episodes that heads are switched off on.

    Attributes:
        task, shots: Which episodes; shots are of each class.
        found: Accuracy on the other half, where heads were chosen.
        accuracy: Accuracy here, beside `zero_shot`. None where `learns` is not set: then nothing was switched off.
        chance: Of the candidates.
        copied: Whether the right label stands among the examples, so that an induction head could copy it.
        learns: Whether accuracy is above chance on the half where heads were chosen (Wilson's interval).
    """

    task: str
    shots: int
    found: Estimate
    accuracy: Estimate | None
    zero_shot: Estimate | None
    chance: float
    copied: bool
    learns: bool


@dataclass(frozen=True, eq=False)
class OddsRow:
    """One set of heads switched off in one setting, or in all settings together (`task` "all", `shots` 0).

    Attributes:
        how: "zero" or "mean"; see `mechicl.analysis.ablation.switches.How`.
        kind: "induction" or "function vector": which ranking the heads come from.
        excluded: Whether the top heads of the other ranking were taken out of this one before its top k were taken.
        dose: The per cent of all heads asked for; k: how many heads that is.
        heads: The heads that are off.
        accuracy: Without them.
        change: Paired change of accuracy against the intact model.
        p: Exact McNemar test of the answers that changed; `p_corrected` over all rows of its family (settings apart, or all together), Holm.
        random_change: Mean change over matched random sets; `random_low`, `random_high` central 95 % of the sets; NaN without any.
        against_random: Paired change against the mean of the random sets, episodes and sets resampled together.
        p_random: Share of random sets (+1 correction) that cost as much; its least value is 1 / (n_random + 1).
        n_random: How many random sets.
        finding: One of `mechicl.analysis.ablation.verdict.FINDINGS`.
    """

    task: str
    shots: int
    how: str
    kind: str
    excluded: bool
    dose: float
    k: int
    heads: tuple[Head, ...]
    accuracy: Estimate
    change: Estimate
    p: float
    p_corrected: float
    random_change: float
    random_low: float
    random_high: float
    against_random: Estimate
    p_random: float
    n_random: int
    exhaustive: bool
    finding: str

    @property
    def name(self) -> str:
        """The set in words."""
        other = "function vector" if self.kind == "induction" else "induction"
        return f"{self.kind} heads" + (f", {other} heads left in" if self.excluded else "")


@dataclass(frozen=True, eq=False)
class OddsContrast:
    """Which kind costs more at equal size: accuracy without the function-vector heads minus accuracy without the induction heads, paired.

    Above zero: the model needs the induction heads more. `task` "all" and `shots` 0 are all settings together.
    """

    task: str
    shots: int
    how: str
    excluded: bool
    dose: float
    k: int
    difference: Estimate
    p: float
    p_corrected: float


@dataclass(frozen=True, eq=False)
class HeadsAtOdds:
    """Induction heads against function-vector heads in one model.

    Attributes:
        induction, function_vector: Both scores of every head, [layer, head], on the half of the episodes where heads are chosen.
        overlaps: The heads that both rankings share at each dose, against chance, with the rank correlation of the scores.
        settings: Tasks and shots.
        rows, contrasts: What is lost without each set.
        main_dose: The dose that the verdict is about (see `rule`).
        side: One of `mechicl.studies.heads_at_odds_verdict.SIDES`: "induction", "function vector", "both", "induction only", "neither", ...
        verdict: One sentence, by rule.
        rule: How heads were chosen and what the verdict rests on, in words.
    """

    induction: Score
    function_vector: Score
    overlaps: Mapping[float, HeadOverlap]
    settings: tuple[OddsSetting, ...]
    rows: tuple[OddsRow, ...]
    contrasts: tuple[OddsContrast, ...]
    doses: tuple[float, ...]
    main_dose: float
    hows: tuple[str, ...]
    side: str
    verdict: str
    rule: str
    n: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()
    passing: Mapping[str, tuple[Head, ...]] = field(default_factory=dict)

    def row(
        self, kind: str, *, excluded: bool = False, how: str | None = None, dose: float | None = None, task: str = "all", shots: int = 0
    ) -> OddsRow:
        """The row of one set; default all settings together, the first way of switching off and the main dose.

        Raises:
            KeyError: there is no such row.
        """
        wanted = (kind, excluded, how or self.hows[0], self.main_dose if dose is None else dose, task, shots)
        for row in self.rows:
            if (row.kind, row.excluded, row.how, row.dose, row.task, row.shots) == wanted:
                return row
        raise KeyError(f"no row of {wanted}: tasks are {sorted({r.task for r in self.rows})}, doses {list(self.doses)}.")

    def to_frame(self) -> pd.DataFrame:
        """One row per set of heads, way of switching off and setting."""
        rows = [
            {"task": r.task, "shots": r.shots, "how": r.how, "kind": r.kind, "excluded": r.excluded, "dose": r.dose, "k": r.k,
             "heads": " ".join(f"{a}.{b}" for a, b in r.heads), "accuracy": r.accuracy.value, "low": r.accuracy.low, "high": r.accuracy.high,
             "change": r.change.value, "change_low": r.change.low, "change_high": r.change.high, "p": r.p, "p_corrected": r.p_corrected,
             "random_change": r.random_change, "random_low": r.random_low, "random_high": r.random_high,
             "against_random": r.against_random.value, "against_random_low": r.against_random.low, "against_random_high": r.against_random.high,
             "p_random": r.p_random, "n_random": r.n_random, "finding": r.finding, "n": r.change.n}
            for r in self.rows
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def heads_frame(self) -> pd.DataFrame:
        """One row per head: both scores with their intervals and corrected p."""
        rows = []
        for layer, head in np.ndindex(*self.induction.value.shape):
            row: dict[str, object] = {"layer": layer, "head": head}
            for name, score in (("induction", self.induction), ("function_vector", self.function_vector)):
                cell = (layer, head)
                row |= {name: score.value[cell], f"{name}_low": score.low[cell], f"{name}_high": score.high[cell], f"{name}_null": score.null[cell],
                        f"{name}_p": score.p_corrected[cell]}  # fmt: skip
            rows.append(row)
        return pd.DataFrame(rows)

    def contrasts_frame(self) -> pd.DataFrame:
        """One row per paired comparison of the two kinds."""
        rows = [
            {"task": c.task, "shots": c.shots, "how": c.how, "excluded": c.excluded, "dose": c.dose, "k": c.k, "difference": c.difference.value,
             "low": c.difference.low, "high": c.difference.high, "p": c.p, "p_corrected": c.p_corrected, "n": c.difference.n}
            for c in self.contrasts
        ]  # fmt: skip
        return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class OddsCost:
    """What a study takes: settings, prompts through the model in each part, seconds from one timed batch (NaN where not timed)."""

    settings: int
    episodes: int
    score_passes: int
    knock_out_passes: int
    seconds: float

    def __str__(self) -> str:
        time = "" if self.seconds != self.seconds else f", about {self.seconds / 60:.0f} minutes here at most"
        return (
            f"{self.settings} settings, {self.episodes} episodes in each half: about {self.score_passes:,} prompt passes to score heads, "
            f"at most {self.knock_out_passes:,} to switch them off{time}"
        )
