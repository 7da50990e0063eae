"""Does a cheap number say what the exact one says? Correlation, shared top cells against chance, and the heads that two rankings share."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np
from numpy.typing import ArrayLike

from mechicl.errors import OptionError
from mechicl.results import Agreement, Head, HeadOverlap, Score

TOP = 10
"""Cells compared at the top of both rankings, where there are four times as many."""


def ranks(values: ArrayLike) -> np.ndarray:
    """Ranks from 1, equal values sharing their mean rank."""
    array = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse.reshape(array.shape)]


def correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Pearson's correlation; NaN with fewer than three cells, or where one side does not vary."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.size < 3:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 1e-300 else float("nan")


def chance_overlap(n: int, first: int, second: int, shared: int) -> tuple[float, float]:
    """Two unrelated sets of `first` and `second` among n things: how many they share on average, and the probability of at least `shared`.

    Returns:
        Expected number, and one-sided p (hypergeometric, exact).

    Raises:
        OptionError: a set larger than n, or fewer than no things shared.
    """
    if not (0 <= shared <= min(first, second) and max(first, second) <= n and n > 0):
        raise OptionError(f"sets must fit into n = {n} and share at most the smaller; got {first}, {second}, {shared}. Count them again.")
    ways = comb(n, second)
    tail = sum(comb(first, i) * comb(n - first, second - i) for i in range(shared, min(first, second) + 1))
    return first * second / n, tail / ways


def top(values: np.ndarray, k: int) -> set[int]:
    """Indices of the k largest magnitudes; ties go to the first."""
    return {int(i) for i in np.argsort(-np.abs(values), kind="stable")[:k]}


def agree(
    names: Sequence[str],
    exact: ArrayLike,
    approximate: ArrayLike,
    random: ArrayLike,
    *,
    n_possible: int,
    k: int | None = None,
    cells: str = "cells",
) -> Agreement:
    """An approximation beside the exact numbers.

    Args:
        names: What each cell is called.
        exact: Share of the gap that the cell moves when it is run exactly, [cell].
        approximate: The same by the approximation.
        random: True where the cell was drawn at random (not because the approximation ranks it high), [cell].
        n_possible: How many cells there are in all.
        k: Size of the tops compared; default 10, or a quarter of the cells where there are fewer than 40.
        cells: What they are called in words, e.g. "edges".

    Raises:
        OptionError: the arrays are not one number per cell, or k is out of range.
    """
    x, y, drawn = np.asarray(exact, float), np.asarray(approximate, float), np.asarray(random, bool)
    n = len(names)
    if not (x.shape == y.shape == drawn.shape == (n,)) or n == 0:
        raise OptionError(
            f"exact, approximate and random must be [{n}]; got {x.shape}, {y.shape}, {drawn.shape}. Give one number per cell."
        )
    k = max(1, min(TOP, n // 4)) if k is None else k
    if not 1 <= k <= n:
        raise OptionError(f"k must be in 1..{n}, the cells run exactly; got {k}. Run more cells exactly.")
    shared = len(top(x, k) & top(y, k))
    expected, p = chance_overlap(n, k, k, shared)
    norm = float(y @ y)
    return Agreement(
        names=tuple(names), exact=x, approximate=y, random=drawn, pearson=correlation(x, y), pearson_random=correlation(x[drawn], y[drawn]),
        spearman=correlation(ranks(x), ranks(y)), slope=float(x @ y) / norm if norm > 0 else float("nan"), k=k, overlap=shared / k,
        chance=expected / k, p=p, n_possible=n_possible, cells=cells,
    )  # fmt: skip


def choose(values: np.ndarray, n_top: int, n_random: int, *, seed: int) -> tuple[list[int], list[bool]]:
    """Cells to run exactly: the `n_top` largest magnitudes and `n_random` drawn from all cells without looking at them.

    Args:
        values: The approximation, any shape, NaN where there is no cell.
        n_top: How many from the top.
        n_random: How many at random; a cell that is drawn and also at the top counts as drawn and is run once.
        seed: Decides the draw.

    Returns:
        Flat indices, and for each whether it was drawn at random.
    """
    flat = values.ravel()
    known = np.flatnonzero(~np.isnan(flat))
    drawn = np.random.default_rng(seed).permutation(known)[:n_random].tolist()
    best = known[np.argsort(-np.abs(flat[known]), kind="stable")][:n_top].tolist()
    rest = [i for i in best if i not in set(drawn)]
    return [*drawn, *rest], [True] * len(drawn) + [False] * len(rest)


def head_overlap(first: Score, second: Score, *, k: int = 10) -> HeadOverlap:
    """Heads among the top k of both scores, against chance: are function-vector heads induction heads?

    Heads that only one of the two scores knows (NaN in the other) are left out of both rankings.

    Raises:
        OptionError: the scores are of different models, or k is out of range.
    """
    if first.value.shape != second.value.shape:
        raise OptionError(f"scores must be of one model; got {first.value.shape} and {second.value.shape}. Score the same model twice.")
    known = ~np.isnan(first.value) & ~np.isnan(second.value)
    n = int(known.sum())
    if not 1 <= k <= n:
        raise OptionError(f"k must be in 1..{n}, the heads that both scores know; got {k}. Choose a smaller top.")
    a, b = _best(first.value, known, k), _best(second.value, known, k)
    shared = tuple(head for head in a if head in b)
    expected, p = chance_overlap(n, k, k, len(shared))
    return HeadOverlap(
        first=first.name, second=second.name, k=k, heads_first=a, heads_second=b, shared=shared, share=len(shared) / k, expected=expected, p=p,
        n_heads=n, spearman=correlation(ranks(first.value[known]), ranks(second.value[known])),
    )  # fmt: skip


def _best(values: np.ndarray, known: np.ndarray, k: int) -> tuple[Head, ...]:
    order = np.argsort(-np.where(known, values, -np.inf).ravel(), kind="stable")[:k]
    return tuple((int(i) // values.shape[1], int(i) % values.shape[1]) for i in order)
