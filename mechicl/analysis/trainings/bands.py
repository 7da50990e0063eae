"""Over runs: curves of several trainings with a band, and the interval of a mean over few seeds.

Here the independent unit is the trained model. With the three to five seeds of a sweep a bootstrap interval is too narrow by far (of three values it never
leaves their range, and covers the truth about two times in three), so Student's interval is the default; the bootstrap is there for many runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float

from mechicl.analysis.statistics import LEVEL, bootstrap_interval
from mechicl.errors import OptionError
from mechicl.results import Bands, Estimate, Series

Interval = Literal["student", "bootstrap"]
"""How the interval of a mean over runs is made."""

WORDS = {"student": "Student 95 % over runs", "bootstrap": "bootstrap 95 % over runs"}
RUN = "cell"
"""Column of a sweep's table that tells runs apart."""
NOT_SETTINGS = ("cell", "seed")


def over_runs(
    values: Float[np.ndarray, " run *rest"], method: Interval = "student", *, seed: int = 0
) -> tuple[Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"]]:
    """Mean over runs with its 95 % interval.

    Args:
        values: One row per run; NaN where a run has none.
        method: "student", or "bootstrap" (percentile, runs resampled).
        seed: Of the bootstrap.

    Returns:
        mean, low, high. NaN without a run; low and high are NaN with a single one, which says nothing about spread.

    Raises:
        OptionError: an unknown method.
    """
    if method not in WORDS:
        raise OptionError(f"method must be one of {', '.join(get_args(Interval))}; got {method!r}. student is right for few runs.")
    array = np.asarray(values, dtype=np.float64)
    known = np.isfinite(array)
    n = known.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, array, 0.0).sum(0) / n
        spread = np.sqrt((np.where(known, array - mean, 0.0) ** 2).sum(0) / (n - 1) / n)
    if method == "bootstrap":
        low, high = bootstrap_interval(np.where(known, array, np.nan), seed=seed)
    else:
        from scipy import stats

        half = stats.t.ppf((1 + LEVEL) / 2, np.maximum(n - 1, 1)) * spread
        low, high = mean - half, mean + half
    few = n < 2
    return np.asarray(mean), np.where(few, np.nan, low), np.where(few, np.nan, high)


def runs_estimate(values: Sequence[float] | np.ndarray, *, unit: str, method: Interval = "student", seed: int = 0) -> Estimate:
    """The mean over runs with its 95 % interval; n counts runs. A probability's interval is cut at 0 and 1, unless runs lie outside (accuracy above copying may)."""
    array = np.asarray(values, dtype=np.float64)
    array = array[np.isfinite(array)]
    mean, low, high = (float(x) for x in over_runs(array, method, seed=seed))
    if unit == "probability" and not ((array < 0) | (array > 1)).any():
        low, high = max(low, 0.0) if low == low else low, min(high, 1.0) if high == high else high
    return Estimate(mean, low, high, len(array), unit, WORDS[method])


def measures_of(table: pd.DataFrame) -> list[str]:
    """The measures of a table of runs: the columns of numbers behind `step`."""
    columns = [str(name) for name in table.columns]
    return [name for name in columns[_step(columns) + 1 :] if pd.api.types.is_numeric_dtype(table[name])]


def settings_of(table: Any) -> list[str]:
    """The settings that vary in a table of runs: the columns before `step`, without those that name a run."""
    columns = [str(name) for name in table.columns]
    return [name for name in columns[: _step(columns)] if name not in NOT_SETTINGS and table[name].nunique(dropna=False) > 1]


def _step(columns: list[str]) -> int:
    if "step" not in columns:
        raise OptionError(f"table must have a column step; it has {', '.join(columns[:8])}. Pass a sweep's table, or a run's.")
    return columns.index("step")


def as_table(data: Any) -> pd.DataFrame:
    """Runs as one table with the columns cell, step and measures.

    Args:
        data: A sweep's table, a run's table (one run), a Series or several, or anything with a `table` (or several, such as `train_many` gives).

    Raises:
        OptionError: something else, or nothing.
    """
    many = list(data) if isinstance(data, list | tuple) else [data]
    frames = []
    for i, one in enumerate(many):
        if isinstance(one, Series):
            frame = pd.DataFrame({"step": one.steps, **one.values})
        elif isinstance(one, pd.DataFrame):
            frame = one
        elif isinstance(getattr(one, "table", None), pd.DataFrame):
            frame = one.table
        else:
            raise OptionError(
                f"runs must be a sweep's table, Series, or finished runs; got {type(one).__name__}. Pass what a training gave."
            )
        _step([str(name) for name in frame.columns])
        frames.append(frame if RUN in frame.columns else frame.assign(**{RUN: f"run {i}"}))
    if not frames or not sum(map(len, frames)):
        raise OptionError("runs must be at least one measured run; got none. Pass what a training gave.")
    table: Any = pd.concat(frames, ignore_index=True)
    if table.duplicated([RUN, "step"]).any():
        raise OptionError("runs must have each step once; a run has one twice. Give every run a cell of its own.")
    return table[[RUN, *(name for name in table.columns if name != RUN)]]


def at_step(table: pd.DataFrame, step: int | None = None) -> pd.DataFrame:
    """One row per run: as it was at its last measured step up to `step`; None: at its end.

    Raises:
        OptionError: no run was measured by then.
    """
    _step([str(name) for name in table.columns])
    rows: Any = table if RUN in table.columns else table.assign(**{RUN: "run"})
    rows = rows if step is None else rows[rows["step"] <= step]
    if not len(rows):
        raise OptionError(f"step must be one by which a run was measured; got {step}. Choose a later one, or pass a table with rows.")
    return rows.sort_values("step", kind="stable").groupby(RUN, sort=False).tail(1)


def curves(table: pd.DataFrame, measure: str) -> tuple[np.ndarray, Float[np.ndarray, "run step"]]:
    """The steps of all runs and one measure of each run there, NaN where it was not measured.

    Raises:
        OptionError: the table has no such measure.
    """
    if measure not in table.columns:
        raise OptionError(f"measure must be one of {', '.join(measures_of(table)[:30])}; got {measure!r}. Pick one of them.")
    wide = table.pivot(index=RUN, columns="step", values=measure)
    return wide.columns.to_numpy(), wide.to_numpy(dtype=np.float64)


def seed_bands(
    data: Any, measures: Sequence[str] | None = None, *, method: Interval = "student", setting: str = "", n: int = 0, seed: int = 0
) -> Bands:
    """Mean curves over the runs of one setting, with their 95 % intervals.

    Args:
        data: Runs; see `as_table`. All of them are taken: choose one setting's rows before.
        measures: Which; default all but "loss", which is no probability.
        method: How intervals are made.
        setting: What the runs share, for the title.
        n: Probe sequences of each run.
        seed: Of the bootstrap.

    Raises:
        OptionError: no runs, or no such measure.
    """
    table = as_table(data)
    names = [name for name in measures_of(table) if name != "loss"] if measures is None else list(measures)
    steps, found = np.unique(table["step"].to_numpy()), {}
    for name in names:
        found[name] = curves(table, name)[1]
    every = {name: over_runs(values, method, seed=seed) for name, values in found.items()}
    shares = [
        name for name in names if name.startswith(("accuracy", "cla"))
    ]  # an interval does not leave 0..1; other measures may be negative
    every |= {name: (mean, np.clip(low, 0, 1), np.clip(high, 0, 1)) for name, (mean, low, high) in every.items() if name in shares}
    series = [one for one in (data if isinstance(data, list | tuple) else [data]) if isinstance(one, Series)]
    return Bands(
        steps=steps, values={k: v[0] for k, v in every.items()}, low={k: v[1] for k, v in every.items()}, high={k: v[2] for k, v in every.items()},
        runs=found, n_runs=table.groupby("step")[RUN].nunique().reindex(steps).to_numpy(), unit="probability", method=WORDS[method], setting=setting,
        n=n or (series[0].n if series else 0), provenance=series[0].provenance if series else None,
    )  # fmt: skip
