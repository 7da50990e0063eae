"""How well a number tells right answers from wrong ones: areas under the ROC curve of many heads at once, with DeLong's intervals, and rank correlations.

Arrays are numpy; the first axis is the episode, further axes are cells (layer, head), each on its own; a NaN cell stays NaN. DeLong's variance serves here
because it is exact algebra on ranks: a bootstrap over episodes of a thousand heads' areas says the same (test) and takes minutes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mechicl.errors import OptionError
from mechicl.results import Estimate

Z = 1.959963984540054
TIE = 1e-6
"""Scores closer than this share of their largest size are tied: rounding must not rank episodes."""

METHOD = "DeLong 95 %"


@dataclass(frozen=True, eq=False)
class Areas:
    """AUROC of every cell [...] with its 95 % interval and two-sided p that it is 0.5."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray


def why_no_auroc(truth: ArrayLike) -> str:
    """Why right and wrong answers cannot be told apart here; "" where they can."""
    right = np.asarray(truth, dtype=bool)
    if not right.size:
        return "there is no episode"
    if right.all() or not right.any():
        side = "right" if right.all() else "wrong"
        return f"all {right.size} answers are {side}: draw harder (or easier) episodes, with more classes, fewer shots or noised pictures"
    return ""


def areas(scores: ArrayLike, truth: ArrayLike) -> Areas:
    """AUROC of each cell's scores for the truth: how often a right answer's score is above a wrong one's, ties counting half.

    The interval is DeLong's on the logit scale. Where no wrong answer outscores a right one the variance is nought although the sample is finite: then the
    other end is that of a proportion with no failure among as many trials as the rarer kind of answer has episodes.

    Args:
        scores: [batch, ...].
        truth: Right answers, [batch].

    Returns:
        NaN everywhere when all answers are right or all wrong.

    Raises:
        OptionError: not one truth value per episode.

    Source:
        DeLong, DeLong and Clarke-Pearson 1988 (variance); p: Mann and Whitney, exact for few episodes without ties.
    """
    x, right = _checked(scores, truth)
    shape = x.shape[1:]
    blank = np.full(shape, np.nan)
    if why_no_auroc(right):
        return Areas(blank, blank.copy(), blank.copy(), blank.copy())
    flat = _tied(x.reshape(len(x), -1))
    value, above, below = _placements(flat, right)
    variance = above.var(0, ddof=1) / right.sum() if right.sum() > 1 else np.zeros(len(value))
    variance = variance + (below.var(0, ddof=1) / (~right).sum() if (~right).sum() > 1 else 0.0)
    low, high = _logit_interval(value, variance, min(int(right.sum()), int((~right).sum())))
    p = _mann_whitney(flat, right)
    found = [np.where(np.isnan(flat).any(0), np.nan, y).reshape(shape) for y in (value, low, high, p)]
    return Areas(*found)


def area_change(first: ArrayLike, second: ArrayLike, truth: ArrayLike) -> Estimate:
    """AUROC of `second` minus AUROC of `first` on the same episodes [batch], with DeLong's paired interval (their covariance counts)."""
    a, right = _checked(first, truth)
    b, _ = _checked(second, truth)
    if why_no_auroc(right):
        return Estimate(np.nan, np.nan, np.nan, len(right), "area", f"paired {METHOD}")
    value, above, below = _placements(_tied(np.stack([a, b], 1)), right)
    spread = sum(float(np.var(z[:, 1] - z[:, 0], ddof=1)) / len(z) if len(z) > 1 else 0.0 for z in (above, below)) ** 0.5
    change = float(value[1] - value[0])
    return Estimate(change, max(-1.0, change - Z * spread), min(1.0, change + Z * spread), len(right), "area", f"paired {METHOD}")


def best_held_out(scores: np.ndarray, truth: ArrayLike) -> tuple[Estimate, tuple[tuple[int, ...], ...], np.ndarray]:
    """AUROC of the best cell, chosen on one half of the episodes and measured on the other, both ways, averaged.

    The best of many heads on the episodes that chose it is too good; this is not. Right and wrong answers are dealt to the halves in turn.

    Args:
        scores: [batch, ...].
        truth: Right answers, [batch].

    Returns:
        The estimate; the cell chosen for each half; the chosen cell's score of every episode, [batch], standardised within its half. NaN with fewer than
        two right or two wrong answers.
    """
    x, right = _checked(scores, truth)
    nothing = Estimate(np.nan, np.nan, np.nan, len(right), "area", f"{METHOD}, chosen on the other half"), (), np.full(len(right), np.nan)
    if min(right.sum(), (~right).sum()) < 2 or np.isnan(x).any(0).all():
        return nothing
    half = np.zeros(len(right), dtype=bool)
    for kind in (right, ~right):
        half[np.flatnonzero(kind)[1::2]] = True
    cells, parts, out = [], [], np.full(len(right), np.nan)
    for measured in (half, ~half):
        ranked = areas(x[~measured], right[~measured]).value
        cell = tuple(int(i) for i in np.unravel_index(int(np.nanargmax(ranked)), ranked.shape))
        own = x[(measured, *cell)]
        value, above, below = _placements(_tied(own[:, None]), right[measured])
        variance = sum(float(z.var(ddof=1)) / len(z) if len(z) > 1 else 0.0 for z in (above, below))
        parts.append((float(value[0]), variance))
        cells.append(cell)
        out[measured] = (own - own.mean()) / (own.std() or 1.0)
    value, variance = np.array([np.mean([v for v, _ in parts])]), np.array([sum(v for _, v in parts) / 4])
    low, high = _logit_interval(value, variance, min(int(right.sum()), int((~right).sum())))
    return Estimate(float(value[0]), float(low[0]), float(high[0]), len(right), nothing[0].unit, nothing[0].method), tuple(cells), out


def spearman(scores: ArrayLike, against: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rank correlation of each cell [batch, ...] with `against` [batch], and its 95 % interval (Fisher's z, variance (1 + rho^2 / 2) / (n - 3)).

    Source:
        Bonett and Wright 2000 (variance). NaN where one of the two is constant, or with fewer than four episodes.
    """
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(against, dtype=np.float64)
    n, shape = len(x), x.shape[1:]
    flat = _tied(x.reshape(n, -1))
    ranks, other = _ranks(flat), _ranks(_tied(y[:, None]))
    ranks, other = ranks - ranks.mean(0), other - other.mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        rho = (ranks * other).sum(0) / np.sqrt((ranks**2).sum(0) * (other**2).sum(0))
    rho[np.isnan(flat).any(0)] = np.nan
    if n < 4:
        rho = np.full_like(rho, np.nan)
    rho = np.clip(rho, -1.0, 1.0)
    z, half = np.arctanh(np.clip(rho, -1 + 1e-12, 1 - 1e-12)), Z * np.sqrt((1 + rho**2 / 2) / max(n - 3, 1))
    low, high = np.where(rho < 1, np.minimum(np.tanh(z - half), rho), 1.0), np.where(rho > -1, np.maximum(np.tanh(z + half), rho), -1.0)
    blank = np.where(np.isnan(rho), np.nan, 1.0)
    return rho.reshape(shape), (low * blank).reshape(shape), (high * blank).reshape(shape)


def _checked(scores: ArrayLike, truth: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, right = np.asarray(scores, dtype=np.float64), np.asarray(truth, dtype=bool)
    if right.ndim != 1 or x.shape[:1] != right.shape:
        raise OptionError(f"truth must be one value per episode; got shapes {x.shape} and {right.shape}. Mark the same episodes.")
    return x, right


def _tied(x: np.ndarray) -> np.ndarray:
    """Scores rounded so that rounding in the network ranks nothing: [batch, cell], each cell by its own size."""
    size = np.maximum(np.nan_to_num(np.abs(x)).max(0, initial=0.0), 1e-30) * TIE
    return np.rint(x / size) * size


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1 down the first axis, ties sharing their mean."""
    from scipy import stats

    return stats.rankdata(x, axis=0) if x.size else x


def _placements(x: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """AUROC [cell]; for each right answer the share of wrong ones below it [right, cell]; for each wrong one the share of right ones above it [wrong, cell]."""
    n_right, n_wrong = int(right.sum()), int((~right).sum())
    ranks = _ranks(x)
    above = (ranks[right] - _ranks(x[right])) / n_wrong
    below = 1 - (ranks[~right] - _ranks(x[~right])) / n_right
    return above.mean(0), above, below


def _logit_interval(value: np.ndarray, variance: np.ndarray, rarer: int) -> tuple[np.ndarray, np.ndarray]:
    inside = np.clip(value, 1e-9, 1 - 1e-9)
    centre, spread = np.log(inside / (1 - inside)), Z * np.sqrt(variance) / (inside * (1 - inside))
    low, high = 1 / (1 + np.exp(np.clip(spread - centre, -700, 700))), 1 / (1 + np.exp(np.clip(-spread - centre, -700, 700)))
    bound = 0.025 ** (1 / max(rarer, 1))
    low, high = np.where(value >= 1, bound, low), np.where(value >= 1, 1.0, high)
    return np.where(value <= 0, 0.0, low), np.where(value <= 0, 1 - bound, high)


def _mann_whitney(x: np.ndarray, right: np.ndarray) -> np.ndarray:
    from scipy import stats

    known = ~np.isnan(x).any(0)
    p = np.full(x.shape[1], np.nan)
    varies = known & (np.nanmax(np.where(np.isnan(x), -np.inf, x), 0) > np.nanmin(np.where(np.isnan(x), np.inf, x), 0))
    p[known] = 1.0
    if varies.any():
        p[varies] = np.minimum(stats.mannwhitneyu(x[right][:, varies], x[~right][:, varies], axis=0).pvalue, 1.0)
    return p
