"""Intervals, paired tests and corrections: the one place where mechicl meets scipy and statsmodels.

Arrays are numpy. The first axis of `values` is the independent unit (the episode); every further axis (layer, head) is treated on its own. A NaN is a
unit that does not count for that cell; a cell with no unit left is NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mechicl.errors import OptionError
from mechicl.results import Estimate

LEVEL = 0.95
N_BOOTSTRAP = 2000


def wilson(correct: ArrayLike, *, unit: str = "probability") -> Estimate:
    """A proportion with its Wilson 95 % interval.

    Args:
        correct: One truth value per episode.
        unit: What the number is.

    Returns:
        NaN with n = 0 when there is no episode.
    """
    from statsmodels.stats.proportion import proportion_confint

    array = np.asarray(correct, dtype=np.float64)
    if array.size == 0:
        return Estimate(np.nan, np.nan, np.nan, 0, unit)
    interval: Any = proportion_confint(array.sum(), array.size, alpha=1 - LEVEL, method="wilson")
    low, high = max(0.0, float(interval[0])), min(1.0, float(interval[1]))
    return Estimate(float(array.mean()), low, high, int(array.size), unit)


def bootstrap_interval(
    values: ArrayLike, *, seed: int = 0, n_draws: int = N_BOOTSTRAP, level: float = LEVEL
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of the mean over the first axis, for every cell at once.

    The same resampled episodes serve all cells, so that heads can be compared.

    Args:
        values: [batch, ...], NaN where an episode does not count.
        seed: Decides the resampling.
        n_draws: Resamples.
        level: Share of the resampled means inside the interval.

    Returns:
        low and high, [...]; NaN where no episode counts. With one episode both equal its value: one unit says nothing about spread.
    """
    array = np.asarray(values, dtype=np.float64)
    n = array.shape[0]
    if n == 0:
        empty = np.full(array.shape[1:], np.nan)
        return empty, empty.copy()
    flat = array.reshape(n, -1)
    known = ~np.isnan(flat)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_draws).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (counts @ np.where(known, flat, 0.0)) / (counts @ known)
    low, high = _quantiles(means, ((1 - level) / 2, (1 + level) / 2))
    return low.reshape(array.shape[1:]), high.reshape(array.shape[1:])


def _quantiles(draws: np.ndarray, q: tuple[float, float]) -> np.ndarray:
    """Quantiles over the first axis; columns without a number are NaN, without a warning."""
    out = np.full((2, draws.shape[1]), np.nan)
    alive = ~np.isnan(draws).all(0)
    if alive.any():
        out[:, alive] = np.nanquantile(draws[:, alive], q, axis=0)
    return out


def mean_estimate(values: ArrayLike, *, unit: str, seed: int = 0, n_draws: int = N_BOOTSTRAP) -> Estimate:
    """The mean over episodes with its bootstrap 95 % interval."""
    array = np.asarray(values, dtype=np.float64)
    array = array[~np.isnan(array)]
    if array.size == 0:
        return Estimate(np.nan, np.nan, np.nan, 0, unit, "bootstrap 95 %")
    low, high = bootstrap_interval(array, seed=seed, n_draws=n_draws)
    return Estimate(float(array.mean()), float(low), float(high), int(array.size), unit, "bootstrap 95 %")


def paired_change(before: ArrayLike, after: ArrayLike, *, unit: str, seed: int = 0, n_draws: int = N_BOOTSTRAP) -> Estimate:
    """after - before on the same episodes, with a paired bootstrap interval: episodes are resampled with both of their values.

    Raises:
        OptionError: the two do not have the same episodes.
    """
    a, b = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if a.shape != b.shape:
        raise OptionError(f"before and after must be the same episodes; got shapes {a.shape} and {b.shape}. Score both on one batch.")
    change = mean_estimate(b - a, unit=unit, seed=seed, n_draws=n_draws)
    return Estimate(change.value, change.low, change.high, change.n, unit, "paired bootstrap 95 %")


def mcnemar_p(before: ArrayLike, after: ArrayLike) -> float:
    """Exact two-sided McNemar test of paired right/wrong answers; 1 when no answer changed.

    Raises:
        OptionError: the two do not have the same episodes.
    """
    from statsmodels.stats.contingency_tables import mcnemar

    a, b = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    if a.shape != b.shape:
        raise OptionError(f"before and after must be the same episodes; got shapes {a.shape} and {b.shape}. Score both on one batch.")
    lost, won = int((a & ~b).sum()), int((~a & b).sum())
    if lost + won == 0:
        return 1.0
    result: Any = mcnemar(np.array([[int((a & b).sum()), lost], [won, int((~a & ~b).sum())]]), exact=True)
    return float(min(1.0, result.pvalue))


def permutation_p(observed: ArrayLike | float, exceeded: ArrayLike | int, n_draws: int) -> np.ndarray:
    """One-sided p of a permutation test with the +1 correction, which counts the observed order as one of the draws (so p is never 0).

    Args:
        observed: The scores; only their NaNs are used.
        exceeded: How many draws were at least as high.
        n_draws: How many draws there were.

    Returns:
        (1 + exceeded) / (1 + n_draws), NaN where `observed` is.
    """
    p = (1.0 + np.asarray(exceeded, dtype=np.float64)) / (1.0 + n_draws)
    return np.where(np.isnan(np.asarray(observed, dtype=np.float64)), np.nan, p)


def holm(p: ArrayLike) -> np.ndarray:
    """p-values corrected for their number, family-wise (Holm), in the shape they came; NaN entries stay out and stay NaN."""
    # three lines, because statsmodels' Holm runs the garbage collector at every call: half a second with transformers in memory
    array = np.asarray(p, dtype=np.float64)
    out, known = np.full(array.shape, np.nan), ~np.isnan(array)
    values = array[known]
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    ranked = np.empty_like(values)
    ranked[order] = np.minimum(stepped, 1.0)
    out[known] = ranked
    return out


def benjamini_hochberg(p: ArrayLike) -> np.ndarray:
    """p-values corrected for their number, false discovery rate (Benjamini and Hochberg), in the shape they came; NaN stays NaN."""
    from statsmodels.stats.multitest import multipletests

    array = np.asarray(p, dtype=np.float64)
    out, known = np.full(array.shape, np.nan), ~np.isnan(array)
    if known.any():
        out[known] = multipletests(array[known], method="fdr_bh")[1]
    return out


def outlier_p(own: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Is one place read more than the places like it? One-sided p that `own` comes from the distribution of `others`, in logs.

    A positional preference is the same in every episode, so episodes are not independent evidence for it: the units are the other places (offsets,
    spans) that the same tokens could have read. Logs of attention are near normal in a network that has learnt nothing, which gives Student's
    prediction interval: t = (own - mean(others)) / (s sqrt(1 + 1/m)).

    Several readers are compared each with its own others: the differences are averaged, the spread pooled within readers, and the mean is taken to
    spread as much as a single difference, because all readers may share one preference (for the nearest place, say).

    Args:
        own: Log attention [reader, ...].
        others: Log attention [reader, place, ...], NaN where a reader has no such place.

    Returns:
        p [...], and the 97.5 % prediction bound of own's excess over the mean of others, as a ratio of attentions [...]. NaN where fewer than two
        places can be compared.
    """
    from scipy import stats

    known = ~np.isnan(others)
    m = known.sum(1)
    mean = np.where(known, others, 0.0).sum(1) / np.maximum(m, 1)
    squares = (np.where(known, others - mean[:, None], 0.0) ** 2).sum((0, 1))
    has = (m > 0) & ~np.isnan(own)
    readers, dof = has.sum(0), np.maximum(m - 1, 0).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = np.where(has, own - mean, 0.0).sum(0) / readers
        factor = np.where(has, 1 + 1 / np.maximum(m, 1), 0.0).sum(0) / readers
        spread = np.sqrt(squares / dof * factor)
    return _student(difference, spread, dof, (dof >= 1) & (readers >= 1), stats)


def difference_p(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Are places of one kind read more than those of another? Student's two-sample test in logs, one-sided, the places as units.

    Args:
        first: Log attention [place, ...], NaN where there is none.
        second: The same for the other kind.

    Returns:
        As `outlier_p`: p, and the 97.5 % bound of the ratio of attentions.
    """
    from scipy import stats

    n, means, squares = [], [], 0.0
    for values in (first, second):
        known = ~np.isnan(values)
        n.append(known.sum(0))
        means.append(np.where(known, values, 0.0).sum(0) / np.maximum(n[-1], 1))
        squares = squares + (np.where(known, values - means[-1], 0.0) ** 2).sum(0)
    dof = n[0] + n[1] - 2
    good = (dof >= 1) & (n[0] >= 1) & (n[1] >= 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt(squares / dof * (1 / n[0] + 1 / n[1]))
    return _student(means[0] - means[1], spread, dof, good, stats)


def gain_p(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Is the mean over episodes above zero? Student's one-sample test of paired differences, one-sided, the episodes as units.

    Args:
        values: Differences [batch, ...], NaN where an episode does not count.

    Returns:
        p [...] and the mean that 97.5 % of samples without a gain would stay below [...]; NaN with fewer than two episodes.
    """
    from scipy import stats

    n = (~np.isnan(values)).sum(0)
    good = n >= 2
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.nansum(values, 0) / n
        error = np.sqrt(np.nansum((values - mean) ** 2, 0) / (n - 1) / n)
        p = stats.t.sf(mean / np.maximum(error, 1e-12), np.maximum(n - 1, 1))
        bound = stats.t.ppf(0.975, np.maximum(n - 1, 1)) * error
    return np.where(good, p, np.nan), np.where(good, bound, np.nan)


def _student(difference: np.ndarray, spread: np.ndarray, dof: np.ndarray, good: np.ndarray, stats: Any) -> tuple[np.ndarray, np.ndarray]:
    freedom = np.maximum(dof, 1)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        p = stats.t.sf(difference / np.maximum(spread, 1e-12), freedom)
        bound = np.exp(stats.t.ppf(0.975, freedom) * spread)
    return np.where(good, p, np.nan), np.where(good, bound, np.nan)


def sign_flip_p(values: np.ndarray, *, n_draws: int = 10_000, seed: int = 0, tie: float = 0.0) -> np.ndarray:
    """Two-sided permutation test of paired changes: each episode's change could as well have had the other sign. Exact where 2**n is at most `n_draws`.

    The same signs serve all cells, so that cells can be compared. The observed signs count as one of the draws, so p is never 0; its least value is
    1 / (n_draws + 1), or 2 / 2**n where that is larger.

    Args:
        values: Changes [batch, ...], NaN where an episode does not count.
        n_draws: How many signs are drawn.
        seed: Decides them.
        tie: Changes no larger than this count as none (rounding in a network is the same in every episode, and would be significant).

    Returns:
        p [...]; 1 where nothing changed, NaN where no episode counts.
    """
    array = np.asarray(values, dtype=np.float64)
    n, shape = array.shape[0], array.shape[1:]
    flat = array.reshape(n, -1)
    known = ~np.isnan(flat)
    moved = np.where(known & (np.abs(flat) > tie), np.nan_to_num(flat), 0.0)
    observed = np.abs(moved.sum(0))
    bar = observed * (1 - 1e-9)  # sums in another order are equal up to rounding
    exact = n < 30 and 2**n <= n_draws
    draw = np.random.default_rng(seed)
    total, exceeded = (2**n if exact else n_draws), np.zeros(flat.shape[1])
    for start in range(0, total, 1024):
        stop = min(start + 1024, total)
        bits = np.arange(start, stop)[:, None] >> np.arange(n) & 1 if exact else draw.integers(0, 2, (stop - start, n))
        exceeded += (np.abs((2.0 * bits - 1.0) @ moved) >= bar).sum(0)
    p = exceeded / total if exact else (1 + exceeded) / (1 + total)
    return np.where(known.any(0), p, np.nan).reshape(shape)


def ratio_interval(
    above: np.ndarray, below: np.ndarray, *, seed: int = 0, n_draws: int = N_BOOTSTRAP, level: float = LEVEL
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of mean(above) / mean(below), both resampled with their episodes.

    Args:
        above: [batch, ...], NaN columns where there is no cell.
        below: [batch]. Resamples in which its mean is nought or has the other sign give ratios far off: look at its own interval first.

    Returns:
        low and high, [...].
    """
    n = len(below)
    flat = above.reshape(n, -1)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_draws).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = (counts @ flat) / (counts @ below)[:, None]
    ratios[~np.isfinite(ratios)] = np.nan
    low, high = _quantiles(ratios, ((1 - level) / 2, (1 + level) / 2))
    return low.reshape(above.shape[1:]), high.reshape(above.shape[1:])
