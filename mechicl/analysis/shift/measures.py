"""How far two sets of keys (or values) are apart: token by token, and as geometries over episodes. Pure functions of tensors and arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

N_NULL = 20
"""Shuffles behind the null of CKA."""


def token_shift(
    with_: Float[Tensor, "*batch d_head"], without: Float[Tensor, "*batch d_head"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Relative L2 |with - without| / |without| and 1 - cosine of each vector.

    Two equal vectors have 0 and 0, also where both are zero; where only one is zero there is no ratio and no angle: NaN.

    Args:
        with_: Vectors of the prompt with examples.
        without: Of the control.
    """
    a, b = with_.double(), without.double()
    size_a, size_b = a.norm(dim=-1), b.norm(dim=-1)
    same = (a == b).all(-1)
    relative = (a - b).norm(dim=-1) / size_b
    # half the squared distance of the unit vectors: exact where vectors are nearly equal, unlike 1 - cos
    cosine = (a / size_a[..., None] - b / size_b[..., None]).square().sum(-1) / 2
    relative = torch.where(size_b > 0, relative, torch.nan)
    return torch.where(same, 0.0, relative), torch.where(same, 0.0, cosine)


def span_mean(values: Float[Tensor, "batch row ..."], inside: Bool[Tensor, "batch row"]) -> Float[Tensor, "batch ..."]:
    """Mean over the rows of a span; rows that are NaN do not count, and a prompt with none is NaN."""
    mask = inside.reshape(*inside.shape, *(1,) * (values.dim() - 2)) & ~values.isnan()
    return torch.where(mask, values, 0).sum(1) / mask.sum(1)


def linear_cka(x: Float[np.ndarray, "batch d"], y: Float[np.ndarray, "batch e"]) -> float:
    """Debiased linear CKA of two representations of the same episodes, see `cka_interval`."""
    return _ratio(_grams(x, y))


def cka_interval(x: Float[np.ndarray, "batch d"], y: Float[np.ndarray, "batch e"], *, seed: int = 0) -> tuple[float, float, float, float]:
    """Debiased linear CKA: do two representations place the same episodes alike? 1: up to a rotation and a scale; near 0: unrelated.

    The plain statistic is near 1 for any two representations with more coordinates than episodes; the debiased one is not, and may fall slightly below 0.
    Episodes drawn twice would look alike on both sides, so the interval is a jackknife, not a bootstrap.

    Args:
        x, y: One row per episode.
        seed: Of the shuffles.

    Returns:
        The value, both ends of its 95 % interval, and the mean over `N_NULL` shuffles of one side's rows. NaN with fewer than five episodes, or where one
        side is the same in all.

    Source:
        Kornblith et al. 2019 (linear CKA), with the unbiased HSIC of Song et al. 2012.
    """
    n = len(x)
    if n < 5:
        return np.nan, np.nan, np.nan, np.nan
    grams = _grams(x, y)
    value = _ratio(grams)
    if np.isnan(value):
        return np.nan, np.nan, np.nan, np.nan
    left_out = _ratio_without_each(grams)
    if np.isnan(left_out).any():
        return value, np.nan, np.nan, np.nan
    error = np.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())
    draw = np.random.default_rng([seed, 7])
    shuffled = []
    for _ in range(N_NULL):
        order = draw.permutation(n)
        shuffled.append(_ratio((grams[0], grams[1][np.ix_(order, order)])))
    return value, value - 1.96 * error, value + 1.96 * error, float(np.mean(shuffled))


ROUNDING = 1e-5
"""Spread over episodes, relative to the vectors' size, that is float32 rounding: the same token in every episode has no geometry."""

Grams = tuple[np.ndarray, np.ndarray]


def _grams(x: np.ndarray, y: np.ndarray) -> Grams:
    """Centred inner products with an empty diagonal."""
    found = []
    for rows in (x, y):
        centred = np.asarray(rows, dtype=np.float64) - np.mean(rows, 0)
        gram = centred @ centred.T
        if np.trace(gram) <= ROUNDING**2 * float(np.square(rows).sum()):
            gram = np.zeros_like(gram)
        np.fill_diagonal(gram, 0.0)
        found.append(gram)
    return found[0], found[1]


def _hsic(trace: Any, sums: Any, mixed: Any, n: int) -> Any:
    """Unbiased HSIC from tr(KL), 1'K1 1'L1 and 1'KL1, up to the factor 1 / (n (n - 3)), which cancels in CKA."""
    return trace + sums / ((n - 1) * (n - 2)) - 2 * mixed / (n - 2)


def _ratio(grams: Grams) -> float:
    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        return float(_hsic(np.sum(a * b), a.sum() * b.sum(), a.sum(0) @ b.sum(0), len(a)))

    k, l = grams
    below = hsic(k, k) * hsic(l, l)
    return hsic(k, l) / np.sqrt(below) if below > 0 else np.nan


def _ratio_without_each(grams: Grams) -> np.ndarray:
    """CKA with each episode left out in turn, from row sums: [batch]."""

    def hsic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        row_a, row_b = a.sum(1), b.sum(1)
        both = (a * b).sum(1)
        trace = both.sum() - 2 * both
        sums = (row_a.sum() - 2 * row_a) * (row_b.sum() - 2 * row_b)
        mixed = row_a @ row_b - row_a * row_b - a @ row_b - b @ row_a + both
        return _hsic(trace, sums, mixed, len(a) - 1)

    k, l = grams
    below = hsic(k, k) * hsic(l, l)
    return np.divide(hsic(k, l), np.sqrt(np.maximum(below, 0)), out=np.full(len(k), np.nan), where=below > 0)
