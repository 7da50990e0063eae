"""Answers under every condition beside the shares, for tasks of several difficulties: does meaning count more where a task is hard, form where it is easy?

Miyanishi and Nguyen (arXiv 2408.12959) report that semantics dominate hard tasks and formatting established ones. Their measures could not be read; these are
ours. A task's difficulty is what examples leave to be gained, 1 - (accuracy - chance) / (1 - chance) with plain examples. The claim is then about a slope: does
the share of meaning less that of form grow with difficulty? And in the answers: does breaking the meaning, less changing the form, cost more of what the
examples gain?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mechicl.analysis.shift.factor_runs import ZERO_SHOT
from mechicl.analysis.shift.factors import factor_shares
from mechicl.analysis.statistics import LEVEL, N_BOOTSTRAP, mean_estimate
from mechicl.errors import EpisodeError, OptionError
from mechicl.prompts.episode import Episode
from mechicl.results import ConditionRow, ConditionTable, Estimate, FactorShares, Skipped, TaskEffects

LEAST_TASKS = 3
LEAST_SPREAD = 0.1
"""Tasks whose difficulties differ by less cannot show a trend."""


def condition_table(model: Any, tasks: Mapping[str, Sequence[Episode]], *, seed: int = 0, **options: Any) -> ConditionTable:
    """Run `factor_shares` on each task and lay the answers and shares side by side.

    Args:
        model: See `factor_shares`.
        tasks: Name -> episodes.
        seed: See `factor_shares`.
        options: Of `factor_shares`: semantics, format, replicates, batch_size, ...

    Raises:
        OptionError: no task; and what `factor_shares` raises.
    """
    if not tasks:
        raise OptionError("tasks must name at least one task; got none. Give name -> episodes, of several difficulties.")
    return tabulate({name: factor_shares(model, episodes, seed=seed, task=name, **options) for name, episodes in tasks.items()}, seed=seed)


def tabulate(found: Mapping[str, FactorShares], *, seed: int = 0) -> ConditionTable:
    """The table of tasks that were run already, with one model or several (e.g. toys).

    Args:
        found: Task -> its shares; all with the same factors, the first two of which are meaning and form.
        seed: Of the bootstrap.

    Raises:
        OptionError: no task, fewer than two factors, or tasks of different factors.
    """
    factors = {one.factors for one in found.values()}
    if len(factors) != 1 or len(next(iter(factors))) < 2:
        raise OptionError(
            f"tasks must share at least two factors, meaning and form; got {sorted(factors)}. Run them with the same factors."
        )
    names = next(iter(factors))
    tasks = {name: _effects(name, one, seed) for name, one in found.items()}
    order = sorted(tasks, key=lambda name: tasks[name].difficulty.value)
    rows = [ConditionRow(name, c, found[name].accuracy[c], found[name].margin[c]) for name in order for c in found[name].conditions]
    parts = [part for part in next(iter(found.values())).parts if all(part in one.parts for one in found.values())]
    measures = [*(f"share {part}" for part in parts), "accuracy"]
    counts = {name: _counts(found[name].n, seed + k) for k, name in enumerate(order)}
    trend, finding, notes = {}, {}, []
    for measure in measures:
        usable = [name for name in order if measure != "accuracy" or _gains(found[name])]
        left = [name for name in order if name not in usable]
        if left:
            notes.append(f"Left out of the trend of accuracy, because plain examples are not above chance there: {', '.join(left)}.")
        trend[measure], finding[measure] = _trend([(found[name], counts[name]) for name in usable], names, measure)
    notes.append(
        "Intervals of trends are over episodes within these tasks; they do not say what other tasks would show. In the answers, difficulty and cost are "
        "measured on the same episodes."
    )
    first = next(iter(found.values()))
    skipped = tuple(Skipped(f"{name}: {s.episode}", s.reason) for name in order for s in found[name].skipped)
    n = sum(one.n for one in found.values())
    verdict = _verdict(names, trend, finding)
    return ConditionTable(
        tuple(rows), tuple(tasks[name] for name in order), names, trend, finding, verdict, n, skipped, first.provenance, tuple(notes)
    )


def alone(found: FactorShares, factor: str) -> list[str]:
    """Conditions in which this factor alone is changed."""
    j = found.factors.index(factor)
    kept = [found.levels[name][0] for name in found.factors]
    return ["+".join([*kept[:j], level, *kept[j + 1 :]]) for level in found.levels[factor][1:]]


def costs(found: FactorShares, factor: str, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """What each episode loses when the factor alone is changed [batch]."""
    return values[found.conditions[0]] - np.mean([values[name] for name in alone(found, factor)], axis=0)


def _effects(name: str, found: FactorShares, seed: int) -> TaskEffects:
    plain = found.accuracy[found.conditions[0]]
    scale = 1 - found.chance
    difficulty = Estimate(
        1 - (plain.value - found.chance) / scale, 1 - (plain.high - found.chance) / scale, 1 - (plain.low - found.chance) / scale, plain.n,
        "share of what can be gained", plain.method,
    )  # fmt: skip
    return TaskEffects(
        name, difficulty, found.accuracy[ZERO_SHOT],
        {f: mean_estimate(costs(found, f, found.correct), unit="probability", seed=seed) for f in found.factors},
        {f: mean_estimate(costs(found, f, found.margins), unit="nats", seed=seed) for f in found.factors}, found.pooled, found.chance, found.n,
    )  # fmt: skip


def _gains(found: FactorShares) -> bool:
    """Whether plain examples lift accuracy above chance: else nothing can be lost."""
    return found.accuracy[found.conditions[0]].low > found.chance


def _trend(tasks: Sequence[tuple[FactorShares, np.ndarray]], names: Sequence[str], measure: str) -> tuple[Estimate, str]:
    """Slope of (meaning minus form) on difficulty over tasks, each with the counts of its resampled episodes."""
    blank = Estimate(float("nan"), float("nan"), float("nan"), len(tasks), "per unit of difficulty", "bootstrap 95 %")
    if len(tasks) < LEAST_TASKS:
        return blank, "not tested"
    x, y = (np.stack(columns) for columns in zip(*(_resampled(one, names, measure, counts) for one, counts in tasks), strict=True))
    if np.ptp(x[:, 0]) < LEAST_SPREAD:
        return blank, "not tested"
    centred = x - x.mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        slopes = (centred * (y - y.mean(0))).sum(0) / (centred**2).sum(0)
    draws = slopes[1:][np.isfinite(slopes[1:])]
    if not np.isfinite(slopes[0]) or len(draws) < N_BOOTSTRAP / 2:
        return blank, "not tested"
    low, high = np.quantile(draws, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    estimate = Estimate(float(slopes[0]), float(low), float(high), len(tasks), "per unit of difficulty", "bootstrap 95 %")
    return estimate, "supported" if low > 0 else "contradicted" if high < 0 else "undecided"


def _counts(n: int, seed: int) -> np.ndarray:
    """How often each episode counts [1 + draw, batch]: once in what was observed, then in every resample."""
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=N_BOOTSTRAP).astype(np.float64)
    return np.concatenate([np.ones((1, n)), drawn])


def _resampled(found: FactorShares, names: Sequence[str], measure: str, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Difficulty and (meaning minus form) of a task, observed first, then in every resample [1 + draw]."""
    n = found.n
    plain = counts @ found.correct[found.conditions[0]] / n
    difficulty = 1 - (plain - found.chance) / (1 - found.chance)
    if measure == "accuracy":
        difference = costs(found, names[0], found.correct) - costs(found, names[1], found.correct)
        with np.errstate(invalid="ignore", divide="ignore"):
            return difficulty, np.where(plain > found.chance, counts @ difference / n / (plain - found.chance), np.nan)
    a = found.parts.index(measure.removeprefix("share "))
    alive = ~np.isnan(found.moved[a])
    if not alive.any():
        raise EpisodeError(f"{measure}: a cell must be moved by the examples; none is. Read other layers.")
    sums = {name: found.squares[name][:, a][:, alive].sum(1) for name in (*names[:2], "total")}
    return difficulty, counts @ (sums[names[0]] - sums[names[1]]) / (counts @ sums["total"])


def _verdict(names: Sequence[str], trend: Mapping[str, Estimate], finding: Mapping[str, str]) -> str:
    words = {
        "supported": "grows with difficulty", "contradicted": "falls with difficulty", "undecided": "shows no clear trend",
        "not tested": "could not be tested (three tasks of different difficulty, above chance, are needed)",
    }  # fmt: skip
    said = []
    for measure, one in finding.items():
        number = "" if one == "not tested" else f" ({trend[measure].value:+.2f} [{trend[measure].low:+.2f}, {trend[measure].high:+.2f}])"
        what = "loss of accuracy" if measure == "accuracy" else f"share of {measure.removeprefix('share ')}"
        said.append(f"{what} to {names[0]} less that to {names[1]} {words[one]}{number}")
    every = set(finding.values())
    opening = {frozenset({"supported"}): "Supported", frozenset({"contradicted"}): "Contradicted", frozenset({"undecided"}): "Undecided"}
    return f"{opening.get(frozenset(every - {'not tested'}), 'Mixed' if every != {'not tested'} else 'Not tested')}: {'; '.join(said)}."
