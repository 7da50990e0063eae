"""What many trained models say together: bands, change points, correlations, knock-outs, claims."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from mechicl.results.base import Estimate, Head, Provenance, Skipped


@dataclass(frozen=True, eq=False)
class Bands:
    """Measures along training over several runs of one setting: `values[name]` [step] is the mean over runs, `low` and `high` its 95 % interval.

    `runs[name]` [run, step], NaN where a run was not measured at that step; `n_runs` [step] counts the runs behind each mean. `n`: probe
    sequences of each run, 0 where it is not known. `setting`: what the runs share, in words. `method`: how the interval was made.
    """

    steps: np.ndarray
    values: Mapping[str, np.ndarray]
    low: Mapping[str, np.ndarray]
    high: Mapping[str, np.ndarray]
    runs: Mapping[str, np.ndarray]
    n_runs: np.ndarray
    unit: str
    method: str
    setting: str = ""
    n: int = 0
    provenance: Provenance | None = None

    def to_frame(self) -> pd.DataFrame:
        """One row per (measure, step)."""
        return pd.concat(
            [pd.DataFrame({"measure": name, "step": self.steps, "value": value, "low": self.low[name], "high": self.high[name], "runs": self.n_runs})
             for name, value in self.values.items()],
            ignore_index=True,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class ChangePoint:
    """When one measure changes most, over runs.

    `at`: the step (geometric mean over the runs that change, n of them). `before`, `after`: mean levels on both sides. `steps` [run]: each run's
    own, NaN where the run's curve shows no change.
    """

    measure: str
    at: Estimate
    before: float
    after: float
    steps: np.ndarray

    @property
    def n_changed(self) -> int:
        """Runs whose curve changes."""
        return int(np.isfinite(self.steps).sum())


@dataclass(frozen=True, eq=False)
class Emergence:
    """Which measure changes when: change points of several measures in the same runs, earliest first.

    `lead` [measure, measure]: doublings of the step from the row's change to the column's, mean over runs in which both change, with `lead_low` and
    `lead_high`, the 95 % interval of these paired differences, and `lead_n`; NaN without two such runs. `resolution`: doublings between
    neighbouring measured steps where the changes are; a lead below it says nothing. `verdict`: the order as far as it is resolved.
    """

    points: tuple[ChangePoint, ...]
    lead: np.ndarray
    lead_low: np.ndarray
    lead_high: np.ndarray
    lead_n: np.ndarray
    resolution: float
    n_runs: int
    method: str
    verdict: str

    def to_frame(self) -> pd.DataFrame:
        """One row per measure, earliest first."""
        return pd.DataFrame(
            [{"measure": p.measure, "step": p.at.value, "low": p.at.low, "high": p.at.high, "before": p.before, "after": p.after,
              "runs_changed": p.n_changed, "runs": self.n_runs} for p in self.points]
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Correlations:
    """How measures go with an outcome over trained models.

    `value[name]`: the correlation with its interval, n models; models of one setting are resampled together (`n_settings`). `p`: permutation test over
    settings, `p_corrected` over all measures (Holm). `skipped`: measures left out, and why.
    """

    outcome: str
    method: str
    value: Mapping[str, Estimate]
    p: Mapping[str, float]
    p_corrected: Mapping[str, float]
    n_runs: int
    n_settings: int
    skipped: tuple[Skipped, ...] = ()
    measured: str = "at the end of training"

    def to_frame(self) -> pd.DataFrame:
        """One row per measure, strongest first."""
        rows = [
            {"measure": name, "correlation": e.value, "low": e.low, "high": e.high, "n": e.n, "p": self.p[name], "p_corrected": self.p_corrected[name]}
            for name, e in self.value.items()
        ]  # fmt: skip
        return pd.DataFrame(rows).sort_values("correlation", key=np.abs, ascending=False, ignore_index=True)


@dataclass(frozen=True, eq=False)
class Forest:
    """A small random forest that predicts an outcome from measures, judged on settings that it did not see.

    `r2`: share of the outcome's variance it explains there; `shuffled` [draw]: the same for outcomes dealt out to other settings, and `p` the share
    of these that do as well. `importance[name]`: fall of r2 when that measure alone is permuted among the unseen models.
    """

    outcome: str
    r2: Estimate
    shuffled: np.ndarray
    p: float
    importance: Mapping[str, Estimate]
    n_runs: int
    n_settings: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """One row per measure, most important first."""
        rows = [{"measure": name, "importance": e.value, "low": e.low, "high": e.high} for name, e in self.importance.items()]
        return pd.DataFrame(rows).sort_values("importance", ascending=False, ignore_index=True)


@dataclass(frozen=True, eq=False)
class KnockOut:
    """One thing taken away from a model, on the same sequences as the intact one.

    `kind`: "intact", "heads", "random heads", "modality", "random tokens". `cla`: share of answers that are some label of the context. `change`: accuracy minus
    the intact one's, paired.
    """

    name: str
    kind: str
    accuracy: Estimate
    cla: Estimate
    change: Estimate
    heads: tuple[Head, ...] = ()


@dataclass(frozen=True, eq=False)
class KnockOutTable:
    """What a model loses without some of its heads, or without a modality, beside matched random controls.

    `chance`: naming any label; `copy`: copying any label of the context. `note`: what must be said about the controls.
    """

    rows: tuple[KnockOut, ...]
    chance: float
    copy: float
    n: int
    n_models: int
    how: str
    note: str
    provenance: Provenance | None = None

    def __getitem__(self, name: str) -> KnockOut:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"name must be one of {', '.join(row.name for row in self.rows)}; got {name!r}.")

    def to_frame(self) -> pd.DataFrame:
        """One row per knock-out."""
        return pd.DataFrame(
            [{"name": r.name, "kind": r.kind, "heads": " ".join(f"{a}.{b}" for a, b in r.heads), "accuracy": r.accuracy.value, "low": r.accuracy.low,
              "high": r.accuracy.high, "change": r.change.value, "change_low": r.change.low, "change_high": r.change.high, "cla": r.cla.value,
              "n": self.n, "models": r.accuracy.n if self.n_models > 1 else 1} for r in self.rows]
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Claim:
    """A published claim held against numbers: `evidence` is its effect, positive where the claim holds.

    `finding`: "holds" (the whole interval is above the bar), "does not hold" (the whole interval is below it), "not shown" (neither).
    """

    text: str
    finding: str
    evidence: Estimate
    bar: float
    said: str

    def __str__(self) -> str:
        return self.said
