"""Two-label answers: accuracy, area under the ROC curve and F1, with bootstrap intervals over queries, all ways resampled together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike

from mechicl.analysis.statistics import LEVEL, N_BOOTSTRAP
from mechicl.errors import OptionError
from mechicl.results import Estimate

METHOD = "bootstrap 95 %"
UNITS = {"accuracy": "probability", "auroc": "area", "f1": "F1"}
BLOCK = 1 << 22
"""Numbers held at a time while resampling."""


@dataclass(frozen=True, eq=False)
class Marked:
    """One way's answers. `scores`: higher means more positive; `predicted`: the positive label was chosen; `truth`: it is right; all [batch]."""

    scores: Float[np.ndarray, " batch"]
    predicted: Bool[np.ndarray, " batch"]
    truth: Bool[np.ndarray, " batch"]

    def __post_init__(self) -> None:
        shapes = {np.shape(self.scores), np.shape(self.predicted), np.shape(self.truth)}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise OptionError(f"scores, predicted and truth must be one number per query; got shapes {shapes}. Mark the same queries.")


def auroc(scores: ArrayLike, truth: ArrayLike) -> float:
    """Probability that a positive query scores higher than a negative one, ties counting half; NaN where one of the two is missing.

    Args:
        scores: [batch].
        truth: Positive queries, [batch].
    """
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(truth, dtype=bool)
    marked = Marked(x, y, y)
    return float(_areas(marked, np.ones((1, len(y))))[0])


def f1(predicted: ArrayLike, truth: ArrayLike) -> float:
    """2 TP / (2 TP + FP + FN) of the positive label; NaN where it neither occurs nor is chosen."""
    x, y = np.asarray(predicted, dtype=bool), np.asarray(truth, dtype=bool)
    return float(_f1s(Marked(x.astype(np.float64), x, y), np.ones((1, len(y))))[0])


def _areas(marked: Marked, weights: Float[np.ndarray, "draw batch"]) -> Float[np.ndarray, " draw"]:
    """AUROC under each row of weights: positives above negatives, by sorting once."""
    order = np.argsort(marked.scores, kind="stable")
    truth, w = marked.truth[order], weights[:, order]
    starts = np.flatnonzero(np.r_[True, np.diff(marked.scores[order]) > 0]) if len(order) else np.array([], dtype=int)
    if not len(starts):
        return np.full(len(weights), np.nan)
    positive, negative = np.add.reduceat(w * truth, starts, 1), np.add.reduceat(w * ~truth, starts, 1)
    below = np.cumsum(negative, 1) - negative / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))


def _f1s(marked: Marked, weights: Float[np.ndarray, "draw batch"]) -> Float[np.ndarray, " draw"]:
    hits = weights @ (marked.predicted & marked.truth).astype(float)
    named = weights @ marked.predicted.astype(float) + weights @ marked.truth.astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        return 2 * hits / named


def _accuracies(marked: Marked, weights: Float[np.ndarray, "draw batch"]) -> Float[np.ndarray, " draw"]:
    with np.errstate(invalid="ignore", divide="ignore"):
        return weights @ (marked.predicted == marked.truth).astype(float) / weights.sum(1)


MEASURES = {"accuracy": _accuracies, "auroc": _areas, "f1": _f1s}


@dataclass(frozen=True, eq=False)
class Measured:
    """Each measure's estimate, and its difference to a baseline where there is one (None: the baseline itself, or none)."""

    values: Mapping[str, Estimate]
    changes: Mapping[str, Estimate | None]


def measure(
    ways: Mapping[str, Marked], *, baseline: str | None = None, seed: int = 0, n_draws: int = N_BOOTSTRAP, level: float = LEVEL
) -> dict[str, Measured]:
    """Accuracy, AUROC and F1 of several ways on the same queries, each with its interval and its paired difference to the baseline.

    Queries are resampled with the answers of all ways. Resamples in which a measure is not defined (one label only) are left out of its interval.

    Args:
        ways: Name -> answers, all of the same queries.
        baseline: Which way the others are compared to; None for none.
        seed: Decides the resampling.
        n_draws: Resamples.
        level: Of the intervals.

    Raises:
        OptionError: no queries, or ways that were not marked on the same ones.
    """
    names = list(ways)
    if not names or len({len(ways[name].truth) for name in names}) > 1 or not len(ways[names[0]].truth):
        raise OptionError(
            f"ways must be answers to the same queries, at least one; got {[len(way.truth) for way in ways.values()]}. Mark them again."
        )
    if any((ways[name].truth != ways[names[0]].truth).any() for name in names):
        raise OptionError("ways must have the same right answers; they differ. Mark the same queries in the same order.")
    n = len(ways[names[0]].truth)
    draw, ones = np.random.default_rng(seed), np.ones((1, n))
    drawn: dict[tuple[str, str], list[np.ndarray]] = {(name, one): [] for name in names for one in MEASURES}
    left, size = n_draws, max(1, BLOCK // n)
    while left > 0:
        counts = draw.multinomial(n, np.full(n, 1 / n), size=min(size, left)).astype(np.float64)
        for name, one in drawn:
            drawn[name, one].append(MEASURES[one](ways[name], counts))
        left -= size
    values = {(name, one): float(MEASURES[one](ways[name], ones)[0]) for name, one in drawn}
    joined = {key: np.concatenate(parts) for key, parts in drawn.items()}
    found = {}
    for name in names:
        own = {one: _estimate(values[name, one], joined[name, one], n, UNITS[one], METHOD, level) for one in MEASURES}
        changes: dict[str, Estimate | None] = dict.fromkeys(MEASURES)
        if baseline is not None and name != baseline:
            changes = {
                one: _estimate(
                    values[name, one] - values[baseline, one], joined[name, one] - joined[baseline, one], n, UNITS[one], f"paired {METHOD}", level
                )
                for one in MEASURES
            }  # fmt: skip
        found[name] = Measured(own, changes)
    return found


def _estimate(value: float, draws: np.ndarray, n: int, unit: str, method: str, level: float) -> Estimate:
    known = draws[~np.isnan(draws)]
    if np.isnan(value) or not known.size:
        return Estimate(np.nan, np.nan, np.nan, n, unit, method)
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high), n, unit, method)
