"""When a measure changes, and in what order measures change: the joint jumps of a circuit that forms. The one home of ruptures.

A curve is a sequence of levels with noise on them, on the steps as they were measured (evenly on a logarithmic scale, in a toy training). ruptures finds
the levels; the step of a change is where the curve crosses the middle of the two levels, interpolated on the logarithmic scale. Intervals are over runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from mechicl.analysis.trainings.bands import WORDS, Interval, as_table, curves, measures_of, over_runs
from mechicl.errors import OptionError
from mechicl.results import ChangePoint, Emergence, Estimate

Direction = Literal["any", "up"]
"""any: a rise or a fall. up: the rise from a curve's lowest level on, for measures that fall first."""

LEAST = 0.1
"""Smallest difference of levels that counts as a change."""
SHORTEST = 2
"""Measured steps of the shortest level."""


@dataclass(frozen=True)
class Level:
    """A stretch of a curve, measured steps `start` to `stop` - 1, and its mean."""

    start: int
    stop: int
    mean: float


def levels(values: Sequence[float] | Float[np.ndarray, " step"], *, penalty: float | None = None) -> tuple[Level, ...]:
    """A curve as a sequence of levels.

    Args:
        values: The curve; at least four numbers.
        penalty: Cost of one more level, in squared units of the curve; default 3 log(n) times the variance of the noise (its standard deviation from
            the differences of neighbours, and at least 0.005, the noise of a probability over 10,000 sequences).

    Returns:
        Levels in order; a single one where nothing changes.

    Raises:
        OptionError: fewer than four numbers, one that is not finite, or a penalty that is not above zero.

    Source:
        Killick, Fearnhead and Eckley 2012 (PELT), as ruptures has it.
    """
    import ruptures

    array = _curve(values)
    cost = 3 * math.log(len(array)) * noise(array) ** 2 if penalty is None else penalty
    if not cost > 0:
        raise OptionError(f"penalty must be above 0; got {penalty}. Leave it out for a penalty that suits the noise.")
    ends = ruptures.Pelt(model="l2", min_size=SHORTEST, jump=1).fit(array[:, None]).predict(pen=cost)
    starts = [0, *ends[:-1]]
    return tuple(Level(a, b, float(array[a:b].mean())) for a, b in zip(starts, ends, strict=True))


def noise(values: Float[np.ndarray, " step"]) -> float:
    """Standard deviation of the noise on a curve: from second differences, in which levels and slopes cancel, by their median."""
    second = np.diff(np.asarray(values, dtype=np.float64), 2)
    return max(float(np.median(np.abs(second))) / (0.6745 * np.sqrt(6)), 0.005) if len(second) else 0.005


def main_change(
    steps: Sequence[int] | np.ndarray,
    values: Sequence[float] | Float[np.ndarray, " step"],
    *,
    least: float = LEAST,
    direction: Direction = "any",
) -> tuple[float, float, float] | None:
    """The one change that explains a curve best.

    Args:
        steps: When the curve was measured, rising, from 0 on.
        values: The curve.
        least: Smallest difference of levels that counts.
        direction: Which changes count; see `Direction`.

    Returns:
        The step, and the levels before and after it; None where no change is worth its penalty (see `levels`) or it is below `least`.

    Raises:
        OptionError: as `levels`, and steps that do not rise.
    """
    import ruptures

    array, clock = _curve(values), log_steps(steps)
    if len(clock) != len(array):
        raise OptionError(f"steps must be as many as values; got {len(clock)} and {len(array)}. Pass a whole curve.")
    found = levels(array)
    if len(found) == 1:
        return None
    if direction == "up":
        lowest = min(found, key=lambda level: level.mean).start
        array, clock = array[lowest:], clock[lowest:]
        if len(array) < 2 * SHORTEST:
            return None
    (cut, _) = ruptures.Dynp(model="l2", min_size=SHORTEST, jump=1).fit(array[:, None]).predict(n_bkps=1)
    before, after = float(array[:cut].mean()), float(array[cut:].mean())
    if abs(after - before) < least or (direction == "up" and after < before):
        return None
    return float(2 ** _crossing(clock, array, cut, (before + after) / 2)), before, after


def _crossing(clock: np.ndarray, values: np.ndarray, cut: int, middle: float) -> float:
    """Where the curve crosses `middle` nearest to the break between cut - 1 and cut; halfway between these where it does not."""
    above = values > middle
    where = np.flatnonzero(above[1:] != above[:-1])
    if not len(where):
        return float(clock[cut - 1] + clock[cut]) / 2
    i = int(where[np.argmin(np.abs(where - (cut - 1)))])
    share = (middle - values[i]) / (values[i + 1] - values[i])
    return float(clock[i] + share * (clock[i + 1] - clock[i]))


def log_steps(steps: Sequence[int] | np.ndarray) -> Float[np.ndarray, " step"]:
    """Steps in doublings, log2; step 0 lies one doubling before the first other one.

    Raises:
        OptionError: steps that do not rise from 0 or more.
    """
    array = np.asarray(steps, dtype=np.float64)
    if array.ndim != 1 or (len(array) and array[0] < 0) or (np.diff(array) <= 0).any():
        raise OptionError(f"steps must rise, from 0 or more; got {array.tolist()[:6]}. Pass a curve in order.")
    if len(array) and array[0] == 0:
        array = array.copy()
        array[0] = array[1] / 2 if len(array) > 1 else 1
    return np.log2(array)


def _curve(values: Any) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2 * SHORTEST or not np.isfinite(array).all():
        raise OptionError(f"values must be a curve of at least {2 * SHORTEST} finite numbers; got shape {array.shape}. Measure more often.")
    return array


def emergence(
    data: Any,
    measures: Sequence[str] | None = None,
    *,
    least: float = LEAST,
    direction: Direction = "any",
    method: Interval = "student",
    seed: int = 0,
) -> Emergence:
    """When measures change, and in what order, over runs of one setting.

    Args:
        data: Runs; see `mechicl.analysis.trainings.bands.as_table`.
        measures: Which; default all but "loss".
        least: Smallest difference of levels that counts as a change.
        direction: Which changes count; see `Direction`.
        method: How intervals over runs are made, on the logarithmic scale.
        seed: Of the bootstrap.

    Returns:
        Emergence, earliest first; measures that change in no run come last. One measure comes "before" another only where the interval of the paired lead is above
        zero and its mean above the resolution of the measured steps.

    Raises:
        OptionError: no runs, no such measure, or curves too short.
    """
    table = as_table(data)
    names = [name for name in measures_of(table) if name != "loss"] if measures is None else list(measures)
    found = {name: _each_run(*curves(table, name), least, direction) for name in names}
    points = sorted((_over(name, rows, method, seed) for name, rows in found.items()), key=lambda p: (np.isnan(p.at.value), p.at.value))
    clocks = np.log2(np.array([p.steps for p in points]).reshape(len(points), -1))
    between = clocks[None] - clocks[:, None]  # [row, column, run]
    lead, low, high = over_runs(np.moveaxis(between, -1, 0), method, seed=seed)
    resolution = _resolution(log_steps(np.unique(table["step"].to_numpy())), clocks)
    return Emergence(
        points=tuple(points), lead=lead, lead_low=low, lead_high=high, lead_n=np.isfinite(between).sum(-1), resolution=resolution,
        n_runs=len(set(table["cell"])), method=WORDS[method], verdict=_order(points, lead, low, resolution),
    )  # fmt: skip


def _each_run(steps: np.ndarray, rows: Float[np.ndarray, "run step"], least: float, direction: Direction) -> Float[np.ndarray, "run 3"]:
    """Step, level before and after of every run, NaN without a change."""
    out = np.full((len(rows), 3), np.nan)
    for i, row in enumerate(rows):
        known = np.isfinite(row)
        change = main_change(steps[known], row[known], least=least, direction=direction) if known.any() else None
        if change is not None:
            out[i] = change
    return out


def _over(name: str, rows: np.ndarray, method: Interval, seed: int) -> ChangePoint:
    changed = np.isfinite(rows[:, 0])
    clock = np.log2(rows[changed, 0])
    mean, low, high = (float(x) for x in over_runs(clock, method, seed=seed)) if changed.any() else (np.nan, np.nan, np.nan)
    at = Estimate(2**mean, 2**low, 2**high, int(changed.sum()), "step", WORDS[method])
    before, after = (float(rows[changed, k].mean()) if changed.any() else float("nan") for k in (1, 2))
    return ChangePoint(name, at, before, after, rows[:, 0])


def _resolution(clock: np.ndarray, changes: np.ndarray) -> float:
    """The widest gap, in doublings, between neighbouring measured steps around the changes."""
    gaps = np.diff(clock)
    seen = changes[np.isfinite(changes)]
    if not len(seen) or not len(gaps):
        return float("nan")
    return float(gaps[np.clip(np.searchsorted(clock, seen) - 1, 0, len(gaps) - 1)].max())


def _order(points: Sequence[ChangePoint], lead: np.ndarray, low: np.ndarray, resolution: float) -> str:
    """Neighbours in time, and whether the runs agree on their order."""
    alive = [i for i, p in enumerate(points) if np.isfinite(p.at.value)]
    flat = [p.measure for p in points if not np.isfinite(p.at.value)]
    parts = []
    for a, b in itertools.pairwise(alive):
        sure = np.isfinite(low[a, b]) and low[a, b] > 0 and lead[a, b] > resolution
        parts.append(f"{points[a].measure} {'before' if sure else 'no earlier than can be told from'} {points[b].measure}")
    said = "; ".join(parts) if parts else (f"only {points[alive[0]].measure} changes" if alive else "nothing changes")
    return said + (f". No change in {', '.join(flat)}." if flat and alive else ".")
