"""Shares of variation: how much of what vectors do over the runs of an experiment goes with each factor. Pure numpy, for anybody's tensors.

Derivation. An episode's runs give vectors x_1 .. x_c. Whatever is linear in the vectors and explained by factors is a projection P of the c runs, and the
sum of squares it explains is tr(P G), where G[i, j] = x_i . x_j. So the c x c Gram matrix of each episode (and layer, head, span) is all that is needed:
adding what heads or tokens give adds Gram matrices, and exchanging labels permutes the rows and columns of P.

With R2(S) = tr(P_S G) / tr(P_all G), P_S the additive model of the factors S less the mean, the share of a factor is its Shapley value: its mean gain in R2
over all orders in which factors can enter. In a balanced design the factors are orthogonal, every order gives the same, and the shares are those of the
classical analysis of variance. "interaction" is what the model with a mean for each combination of levels explains beyond the additive one, "residual" is the
rest: the variation between replicates of the same combination. The four sum to one exactly, because their matrices sum to the identity less the mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, permutations, product
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from mechicl.analysis.statistics import LEVEL, N_BOOTSTRAP
from mechicl.errors import EpisodeError, OptionError
from mechicl.results.factors import Decomposition

Interactions = Literal["apart", "shared"]
"""apart: a source of its own. shared: divided among the factors that take part (Shapley values of the models with a mean for each combination)."""

MAX_ARRANGEMENTS = 64
"""Exchanges of levels kept for an episode; where there are more, as many are drawn."""


def gram(values: Float[np.ndarray, "batch run *cell d"]) -> Float[np.ndarray, "batch *cell run run"]:
    """Inner products of the runs' vectors, for each episode and cell."""
    x = np.moveaxis(np.asarray(values, dtype=np.float64), 1, -2)
    return x @ np.swapaxes(x, -1, -2)


def source_matrices(
    design: Int[np.ndarray, "run factor"], names: Sequence[str], *, interactions: Interactions = "apart"
) -> dict[str, Float[np.ndarray, "run run"]]:
    """For each source the matrix M with sum of squares tr(M G); together they are the identity less the mean.

    Args:
        design: Level of every factor in every run; unbalanced ones too.
        names: Of the factors.
        interactions: See `Interactions`.

    Raises:
        OptionError: a design that cannot tell the factors apart, or names that do not fit.
    """
    design = np.asarray(design)
    if design.ndim != 2 or design.shape[1] != len(names) or len(set(names)) < len(names):
        raise OptionError(
            f"design must be [run, factor] with a name for each factor; got {design.shape} and {list(names)}. Name every column."
        )
    constant = [name for name, column in zip(names, design.T, strict=True) if len(np.unique(column)) < 2]
    if constant:
        raise OptionError(f"every factor must have two levels in the design; {constant} has one. Leave it out.")
    if np.linalg.matrix_rank(_dummies(design)) < 1 + sum(len(np.unique(column)) - 1 for column in design.T):
        raise OptionError("factors must be told apart by the design; two of them change together. Cross their levels.")
    c, k = design.shape
    mean = np.full((c, c), 1 / c)
    whole = _projection(_cells(design)) - mean

    def explained(some: Sequence[int]) -> np.ndarray:
        if not some:
            return np.zeros((c, c))
        chosen = design[:, list(some)]
        return _projection(_cells(chosen) if interactions == "shared" else _dummies(chosen)) - mean

    table = {some: explained(some) for size in range(k + 1) for some in combinations(range(k), size)}
    out = {names[i]: _shapley(i, k, table) for i in range(k)}
    out["interaction"] = whole - table[tuple(range(k))]
    out["residual"] = np.eye(c) - mean - whole
    return out


def decompose(
    values: Float[np.ndarray, "batch run *cell d"],
    design: Int[np.ndarray, "run factor"],
    names: Sequence[str],
    *,
    blocks: Int[np.ndarray, " run"] | None = None,
    interactions: Interactions = "apart",
    n_permutations: int = 1999,
    seed: int = 0,
) -> Decomposition:
    """Shares of each factor, of their interaction and of the residual, with bootstrap intervals and a permutation null.

    Shares are ratios of sums over episodes, so that an episode counts by how much it varies.

    Args:
        values: Vectors, for each episode, run and cell (layer, head, ...). What is constant over an episode's runs (a zero-shot baseline) plays no part.
        design: Level of every factor in every run.
        names: Of the factors.
        blocks: Runs that belong together (a replicate): levels are exchanged within them only.
        interactions: See `Interactions`.
        n_permutations: Draws of the null.
        seed: Of resampling and exchanges.

    Raises:
        OptionError: shapes that do not fit; see `source_matrices`.
        EpisodeError: no episode.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim < 3 or array.shape[1] != len(design):
        raise OptionError(
            f"values must be [batch, run, ..., d] with {len(design)} runs; got {list(array.shape)}. Move the axis of runs to 1."
        )
    return decompose_gram(gram(array), design, names, blocks=blocks, interactions=interactions, n_permutations=n_permutations, seed=seed)


def decompose_gram(
    grams: Float[np.ndarray, "batch *cell run run"],
    design: Int[np.ndarray, "run factor"],
    names: Sequence[str],
    *,
    blocks: Int[np.ndarray, " run"] | None = None,
    interactions: Interactions = "apart",
    n_permutations: int = 1999,
    seed: int = 0,
    floor: float = 0.0,
) -> Decomposition:
    """`decompose` from Gram matrices. Cells whose mean total is at most `floor` are NaN."""
    design = np.asarray(design)
    n = len(grams)
    if not n:
        raise EpisodeError("there must be an episode to decompose; got none. Give some.")
    if n_permutations < 1:
        raise OptionError(f"n_permutations must be at least 1; got {n_permutations}. 1999 make p down to 0.0005.")
    matrices = source_matrices(design, names, interactions=interactions)
    squares = {name: trace(matrix, grams) for name, matrix in matrices.items()}
    squares["total"] = np.sum([squares[name] for name in matrices], axis=0)
    alive = squares["total"].mean(0) > floor
    total = np.where(alive, squares["total"].sum(0), np.nan)
    shares, low, high = {}, {}, {}
    for name in matrices:
        shares[name] = np.asarray(squares[name].sum(0) / total)
        low[name], high[name] = ratio_of_sums(squares[name], np.where(alive, squares["total"], np.nan), seed=seed)
    null, p = {}, {}
    for i, name in enumerate(names):
        null[name], p[name] = _null(matrices[name], grams, total, arrangements(design, i, blocks, seed=seed), n_permutations, seed)
    return Decomposition(tuple(matrices), squares, shares, low, high, null, p, n)


def trace(matrix: Float[np.ndarray, "run run"], grams: Float[np.ndarray, "*lead run run"]) -> Float[np.ndarray, "*lead"]:
    """tr(M G), never below nought by rounding."""
    c = len(matrix)
    return np.maximum(grams.reshape(*grams.shape[:-2], c * c) @ matrix.T.reshape(c * c), 0.0)


def ratio_of_sums(
    above: np.ndarray, below: np.ndarray, *, seed: int = 0, n_draws: int = N_BOOTSTRAP, level: float = LEVEL
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of sum(above) / sum(below) over the first axis, for every cell; the same episodes are drawn for all cells."""
    n, shape = len(above), above.shape[1:]
    a, b = above.reshape(n, -1), below.reshape(n, -1)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_draws).astype(np.float64)
    out = np.full((2, a.shape[1]), np.nan)
    for start in range(0, a.shape[1], 1024):  # draws x cells at a time
        part = slice(start, start + 1024)
        with np.errstate(invalid="ignore", divide="ignore"):
            draws = (counts @ a[:, part]) / (counts @ b[:, part])
        known = ~np.isnan(draws).all(0)
        found = np.full((2, draws.shape[1]), np.nan)
        if known.any():
            found[:, known] = np.nanquantile(draws[:, known], ((1 - level) / 2, (1 + level) / 2), axis=0)
        out[:, part] = found
    return out[0].reshape(shape), out[1].reshape(shape)


def arrangements(
    design: Int[np.ndarray, "run factor"], which: int, blocks: Int[np.ndarray, " run"] | None = None, *, seed: int = 0
) -> Int[np.ndarray, "arrangement run"]:
    """Ways to exchange the levels of one factor among runs that agree in all the others (and in the block): under no effect of it they are alike.

    Returns:
        Orders of the runs, the given one first; all of them, or `MAX_ARRANGEMENTS` drawn ones where there are more. One row if nothing can be exchanged.
    """
    design = np.asarray(design)
    others = np.delete(design, which, 1)
    keys = others if blocks is None else np.column_stack([others, blocks])
    strata = [np.flatnonzero((keys == key).all(1)) for key in np.unique(keys, axis=0)]
    count = math.prod(math.factorial(len(stratum)) for stratum in strata)
    same = np.arange(len(design))

    def put(orders: Sequence[Sequence[int]]) -> np.ndarray:
        out = same.copy()
        for stratum, order in zip(strata, orders, strict=True):
            out[stratum] = stratum[list(order)]
        return out

    if count <= MAX_ARRANGEMENTS:
        return np.array([put(orders) for orders in product(*(permutations(range(len(stratum))) for stratum in strata))])
    draw = np.random.default_rng(seed)
    drawn = [put([draw.permutation(len(stratum)).tolist() for stratum in strata]) for _ in range(MAX_ARRANGEMENTS - 1)]
    return np.array([same, *drawn])


def _null(
    matrix: np.ndarray, grams: np.ndarray, total: np.ndarray, ways: np.ndarray, n_draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean share and one-sided p with each episode's levels exchanged at random."""
    n, shape = len(grams), total.shape
    if len(ways) < 2:
        blank = np.full(shape, np.nan)
        return blank, blank.copy()
    flat = grams.reshape(n, -1, *grams.shape[-2:])
    turned = np.stack([trace(matrix[np.ix_(way, way)], flat) for way in ways])  # [arrangement, batch, cell]
    observed = turned[0].sum(0)
    draw = np.random.default_rng([seed, 5])
    exceeded = np.zeros(observed.shape)
    for start in range(0, n_draws, 256):
        size = min(256, n_draws - start)
        picks = draw.integers(0, len(ways), (size, n))
        sums = np.zeros((size, observed.size))
        for e in range(n):
            sums += turned[picks[:, e], e]
        exceeded += (sums >= observed * (1 - 1e-9)).sum(0)
    p = np.where(np.isnan(total.ravel()), np.nan, (1 + exceeded) / (1 + n_draws))
    return np.asarray(turned.mean(0).sum(0).reshape(shape) / total), p.reshape(shape)


def _shapley(i: int, k: int, table: Mapping[tuple[int, ...], np.ndarray]) -> np.ndarray:
    """Mean gain of factor i over all orders in which the k factors can enter."""
    others = [j for j in range(k) if j != i]
    parts = []
    for size in range(k):
        weight = math.factorial(size) * math.factorial(k - size - 1) / math.factorial(k)
        parts += [weight * (table[tuple(sorted((*some, i)))] - table[some]) for some in combinations(others, size)]
    return np.asarray(np.sum(parts, axis=0))


def shapley_values(value: Callable[[tuple[int, ...]], float], k: int) -> np.ndarray:
    """Shapley values of a game of k players: `value` of a sorted tuple of players. They sum to value(all) - value(none)."""
    table = {some: np.asarray(value(some)) for size in range(k + 1) for some in combinations(range(k), size)}
    return np.array([_shapley(i, k, table) for i in range(k)])


def _dummies(design: np.ndarray) -> np.ndarray:
    """Intercept and indicators of all levels but the first, factor by factor."""
    columns = [np.ones(len(design))]
    for column in design.T:
        columns += [(column == level).astype(np.float64) for level in np.unique(column)[1:]]
    return np.stack(columns, 1)


def _cells(design: np.ndarray) -> np.ndarray:
    """Indicators of the combinations of levels."""
    _, index = np.unique(design, axis=0, return_inverse=True)
    return np.eye(int(index.max()) + 1)[index.ravel()]


def _projection(x: np.ndarray) -> np.ndarray:
    return x @ np.linalg.pinv(x)
