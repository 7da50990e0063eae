"""Claims held against a sweep: differences and trends paired by seed, and a finding that the numbers alone decide.

A sweep has a few seeds in each of many settings. Here every effect is made within a seed (seeds share nothing, settings of one seed share their world where they can),
and the interval is over seeds: Student's, because seeds are few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mechicl.analysis.trainings.bands import RUN, at_step, runs_estimate, settings_of
from mechicl.errors import OptionError
from mechicl.results import Claim, Estimate

Where = Mapping[str, Any]
"""Settings and their values; None stands for a setting that a run does not have, a tuple for any of several values."""


def base_of(table: pd.DataFrame) -> dict[str, Any]:
    """The setting that most runs of a one-at-a-time design share: the most frequent value of every column that varies."""
    runs = at_step(table)
    return {name: _plain(runs[name].mode(dropna=False).iloc[0]) for name in settings_of(table)}


def rows(table: pd.DataFrame, where: Where) -> pd.DataFrame:
    """The runs of the settings asked for.

    Raises:
        OptionError: a column that the table does not have, or no such run.
    """
    kept = np.ones(len(table), dtype=bool)
    for name, value in where.items():
        if name not in table.columns:
            raise OptionError(
                f"a setting must be a column of the table, {', '.join(map(str, table.columns[:20]))}; got {name!r}. Pick one."
            )
        column = table[name]
        one = [_same(column, v) for v in (value if isinstance(value, tuple) else (value,))]
        kept &= np.any(one, axis=0)
    if not kept.any():
        raise OptionError(f"where must name settings that were trained; no run has {dict(where)}. Look at table[[...]].drop_duplicates().")
    found: Any = table[kept]
    return found


def around(table: pd.DataFrame, x: str, base: Where | None = None) -> pd.DataFrame:
    """The runs of a one-at-a-time design along x: all other settings as in `base` (default `base_of`)."""
    fixed = dict(base_of(table) if base is None else base)
    fixed.pop(x, None)
    return rows(table, fixed)


def by_seed(table: pd.DataFrame, outcome: str, where: Where | None = None) -> pd.Series:
    """The outcome at the end of training, mean over the runs of each seed."""
    _check(table, outcome)
    found: Any = at_step(table if where is None else rows(table, where)).groupby("seed")[outcome].mean()
    return found


def difference(table: pd.DataFrame, outcome: str, first: Where, second: Where) -> Estimate:
    """Outcome of the second settings minus the first's, paired by seed, mean over seeds.

    Where a side names several runs of a seed (a grid over K, say), their mean counts; give both sides the same grid.

    Raises:
        OptionError: no seed has both.
    """
    change = (by_seed(table, outcome, second) - by_seed(table, outcome, first)).dropna()
    if not len(change):
        raise OptionError("first and second must share seeds; they share none. Train both with the same seeds.")
    return runs_estimate(change.to_numpy(), unit="change")


def paired(table: pd.DataFrame, outcome: str, factor: str, low: Any, high: Any) -> Estimate:
    """Main effect of one factor of a factorial design: the outcome at `high` minus at `low`, in runs that are alike in everything else, seed included.

    Returns:
        Mean over pairs with Student's interval over pairs, which stand for the settings; the effect may well differ between them.

    Raises:
        OptionError: no two runs differ in the factor alone.
    """
    _check(table, outcome)
    runs: Any = at_step(table)
    alike = ["seed", *(name for name in settings_of(table) if name != factor)]
    wide = rows(runs, {factor: (low, high)}).pivot_table(index=alike, columns=factor, values=outcome, dropna=True)
    if low not in wide.columns or high not in wide.columns or not len(wide[[low, high]].dropna()):
        raise OptionError(f"table must have runs that differ in {factor} alone, {low} and {high}; it has none. Pass a factorial design.")
    return runs_estimate((wide[high] - wide[low]).dropna().to_numpy(), unit="change over settings")


def slope(table: pd.DataFrame, x: str, outcome: str, *, log: bool = True) -> Estimate:
    """Change of the outcome per doubling of x (per unit without `log`), least squares within each seed, mean over seeds.

    Raises:
        OptionError: fewer than two values of x, or values that have no logarithm.
    """
    _check(table, outcome)
    runs: Any = at_step(table)
    values = runs[x].to_numpy(dtype=np.float64)
    if log and (values <= 0).any():
        raise OptionError(f"{x} must be above 0 for a slope per doubling; it is not. Leave those runs out, or pass log=False.")
    if len(np.unique(values)) < 2:
        raise OptionError(f"{x} must have at least two values; got {np.unique(values).tolist()}. Pass the runs along x.")
    runs = runs.assign(_x=np.log2(values) if log else values)
    found = [np.polyfit(g["_x"], g[outcome], 1)[0] for _, g in runs.groupby("seed") if g["_x"].nunique() > 1]
    return runs_estimate(np.array(found), unit="change per doubling" if log else "change per unit")


def threshold(table: pd.DataFrame, x: str, outcome: str, level: float) -> pd.Series:
    """For each seed the x at which the outcome first rises above the level, interpolated between neighbours in log2 x.

    Returns:
        x by seed; 0 where the lowest x is above the level already, infinity where none is.
    """
    _check(table, outcome)
    out: dict[Any, float] = {}
    runs: Any = at_step(table)
    for seed, group in runs.groupby("seed"):
        curve = group.groupby(x)[outcome].mean()
        at, y = np.log2(curve.index.to_numpy(dtype=np.float64)), curve.to_numpy()
        above = np.flatnonzero(y >= level)
        if not len(above):
            out[seed] = float("inf")
        elif above[0] == 0:
            out[seed] = 0.0
        else:
            i = int(above[0])
            share = (level - y[i - 1]) / (y[i] - y[i - 1])
            out[seed] = float(2 ** (at[i - 1] + share * (at[i] - at[i - 1])))
    return pd.Series(out, name=x)


def claim(text: str, evidence: Estimate, *, bar: float = 0.0) -> Claim:
    """A finding from an effect and its interval: nothing is decided by hand.

    Args:
        text: The claim.
        evidence: Its effect, positive where the claim holds.
        bar: What the effect must pass.
    """
    if np.isfinite(evidence.low) and evidence.low > bar:
        finding = "holds"
    elif np.isfinite(evidence.high) and evidence.high < bar:
        finding = "does not hold"
    else:
        finding = "not shown"
    counted = {"change": "seeds", "change per doubling": "seeds", "change per unit": "seeds", "change over settings": "pairs"}.get(
        evidence.unit, ""
    )
    spread = f"[{evidence.low:+.3f}, {evidence.high:+.3f}]" if np.isfinite(evidence.low) else "(no interval)"
    number = f"{evidence.value:+.3f} {spread} {evidence.unit}, n = {evidence.n}{' ' + counted if counted else ''}"
    against = f", against {bar:g}" if bar else ""
    return Claim(text, finding, evidence, bar, f"{finding.upper():<13} {text}: {number}{against}")


def verdict_table(claims: Sequence[Claim]) -> pd.DataFrame:
    """One row per claim."""
    return pd.DataFrame(
        [{"claim": c.text, "finding": c.finding, "effect": c.evidence.value, "low": c.evidence.low, "high": c.evidence.high, "unit": c.evidence.unit,
          "n": c.evidence.n, "bar": c.bar} for c in claims]
    )  # fmt: skip


def _check(table: pd.DataFrame, outcome: str) -> None:
    for name in (RUN, "seed", outcome):
        if name not in table.columns:
            raise OptionError(
                f"the table must have a column {name!r}; it has {', '.join(map(str, table.columns[:20]))}. Pass a sweep's table."
            )


def _same(column: Any, value: Any) -> np.ndarray:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return column.isna().to_numpy()
    if isinstance(value, float):
        return np.isclose(column.astype(float).to_numpy(), value)
    return (column == value).fillna(False).to_numpy(dtype=bool)


def _plain(value: Any) -> Any:
    """A value of a table's column as Python has it; None where it is missing."""
    if value is None or (isinstance(value, float | np.floating) and np.isnan(value)):
        return None
    return value.item() if isinstance(value, np.generic) else value
