"""How well two models' heads agree, pair by pair: tops against the hypergeometric chance, rank correlations, what is left when depth is accounted for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mechicl.analysis.agreement import chance_overlap, correlation, ranks
from mechicl.analysis.circuits.overlap import pmf_quantile, shared_pmf
from mechicl.analysis.comparison.profiles import Profiles, distances, pair, pairing_scores
from mechicl.analysis.statistics import permutation_p, wilson
from mechicl.results import Estimate, Head, Score
from mechicl.results.comparison import QUANTILES, Align, Alignment, ScoreAgreement, Side

N_DRAWS = 2000
N_RANKS = 500
"""Resamples of a rank correlation."""


@dataclass(frozen=True, eq=False)
class Partial:
    """A partial rank correlation and the same with pairs dealt anew [draw]."""

    value: float
    null: np.ndarray


def agree_on(
    name: str, found: Profiles, sides: tuple[Side, Side], how: Align, *, top: int, seed: int, n_draws: int = N_DRAWS
) -> tuple[ScoreAgreement, Partial]:
    """One score in two models.

    For pairs by function or depth, scores that read the same kind of token as `name` have no part in finding the pairs on which it is tested: otherwise pairs would agree
    because they were chosen to.
    """
    scores = [side.scores[name] for side in sides]
    by = pairing_scores(found, name) if how != "index" else []
    rows, columns = pair(found, how, by or found.names)
    x, y = found.first[name], found.second[name]
    least, most = sorted((x.shape[1], y.shape[1]))
    k = max(1, min(top, least // 4))
    tops = (_best(x.mean(0), k), _best(y.mean(0), k))
    shared = [int(i) for i, j in zip(rows, columns, strict=True) if i in tops[0] and j in tops[1]]
    expected, p = chance_overlap(most, k, k, len(shared))
    by_layer = _within_layers(found, rows, columns, x, y, k) if how == "index" else (np.nan, np.nan)
    ks, curve = _curve(x, y, rows, columns, most, least)
    circular = how != "index" and not by
    partial = Partial(np.nan, np.full(n_draws, np.nan)) if circular else _partial(found, name, rows, columns, how, by, seed, n_draws)
    bands = [_quantiles(values, seed) for values in (x, y)]
    heads = found.heads
    return ScoreAgreement(
        name=name, unit=scores[0].unit, k=k, top_first=tuple(heads[0][i] for i in tops[0]), top_second=tuple(heads[1][j] for j in tops[1]),
        shared=tuple(heads[0][i] for i in shared), expected=expected, p=p if not circular else np.nan, expected_layer=by_layer[0], p_layer=by_layer[1], ks=ks,
        top_shared=curve[0], top_chance=curve[1], top_high=curve[2], spearman=_spearman(x[:, rows], y[:, columns], seed), partial=partial.value,
        partial_p=float(_share(partial)), quantiles_first=bands[0][0], low_first=bands[0][1], high_first=bands[0][2], quantiles_second=bands[1][0],
        low_second=bands[1][1], high_second=bands[1][2], found_first=_found(scores[0]), found_second=_found(scores[1]),
        pairs=tuple((heads[0][i], heads[1][j]) for i, j in zip(rows, columns, strict=True)), aligned_by=tuple(by),
    ), partial  # fmt: skip


def alignment(
    found: Profiles, how: Align, partials: Sequence[Partial], *, same_shape: bool, seed: int, n_draws: int = N_DRAWS
) -> Alignment:
    """The pairs by all scores together, how stable they are, whether depth is kept, and the permutation test over all scores."""
    rows, columns = pair(found, how, found.names)
    halves = [set(zip(*(part.tolist() for part in pair(found, how, found.names, half)), strict=True)) for half in (0, 1)]
    stable = float("nan") if how == "index" else len(halves[0] & halves[1]) / max(len(rows), 1)
    a, b = found.depth[0][rows], found.depth[1][columns]
    gaps = np.abs(a[:, None] - b[None])
    draw = np.random.default_rng(seed)
    dealt = np.array([gaps[np.arange(len(a)), draw.permutation(len(b))].mean() for _ in range(n_draws)]) if len(a) else np.zeros(n_draws)
    gap = float(np.abs(a - b).mean()) if len(a) else float("nan")
    known = [one for one in partials if np.isfinite(one.value)]
    mean = Partial(float(np.mean([one.value for one in known])), np.mean([one.null for one in known], axis=0)) if known else None
    heads = found.heads
    pairs = tuple((heads[0][i], heads[1][j]) for i, j in zip(rows, columns, strict=True))
    return Alignment(
        how=how, pairs=pairs, distance=np.sqrt(distances(found, found.names)[rows, columns]), stable=stable,
        same_index=float(np.mean([x == y for x, y in pairs])) if same_shape and pairs else float("nan"), depth_gap=gap, depth_gap_chance=float(dealt.mean()),
        depth_p=float("nan") if how == "depth" else float(permutation_p(gap, int((dealt <= gap + 1e-12).sum()), n_draws)),
        agreement=mean.value if mean else np.nan, agreement_high=float(np.quantile(mean.null, 0.975)) if mean else np.nan,
        p=float(_share(mean)) if mean else np.nan, n_draws=n_draws,
    )  # fmt: skip


def _share(one: Partial) -> np.ndarray:
    return permutation_p(one.value, int((one.null >= one.value - 1e-12).sum()), len(one.null))


def _best(values: np.ndarray, k: int) -> list[int]:
    return [int(i) for i in np.argsort(-values, kind="stable")[:k]]


def _within_layers(found: Profiles, rows: np.ndarray, columns: np.ndarray, x: np.ndarray, y: np.ndarray, k: int) -> tuple[float, float]:
    """Shared heads expected, and p, when chance deals within layers only: two models whose best heads merely sit in one layer share no head more than that."""
    layers = np.array([found.heads[0][i][0] for i in rows])
    first = np.isin(rows, _best(x.mean(0), k))
    second = np.isin(columns, _best(y.mean(0), k))
    pmf = shared_pmf(
        [(int((layers == one).sum()), int(first[layers == one].sum()), int(second[layers == one].sum())) for one in np.unique(layers)]
    )
    return float(pmf @ np.arange(len(pmf))), float(pmf[int((first & second).sum()) :].sum())


def _curve(x: np.ndarray, y: np.ndarray, rows: np.ndarray, columns: np.ndarray, most: int, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Shared heads of the top k, their expectation and their 97.5 % quantile by chance, for k up to half of the heads."""
    ks = np.unique(np.round(np.geomspace(1, max(1, least // 2), 12)).astype(int))
    place = [np.argsort(np.argsort(-values.mean(0), kind="stable"), kind="stable") for values in (x, y)]
    worse = np.maximum(place[0][rows], place[1][columns])
    out = [[float((worse < k).sum()), k * k / most, float(pmf_quantile(shared_pmf([(most, int(k), int(k))]), 0.975))] for k in ks]
    return ks, np.array(out).T


def _partial(
    found: Profiles, name: str, rows: np.ndarray, columns: np.ndarray, how: Align, by: Sequence[str], seed: int, n_draws: int
) -> Partial:
    """Rank correlation over pairs of what other things leave unexplained in each model, and its permutation null.

    By index: ranks minus their mean in the pair's layer, dealt within layers. By function: ranks minus their linear prediction from depth, its square and the ranks of the scores
    that found the pairs, because within any model scores depend on each other (a head's attention sums to one), and pairs alike in some are alike in the rest. By depth: both.
    """
    if len(rows) < 4:
        return Partial(np.nan, np.full(n_draws, np.nan))
    layers = np.array([found.heads[0][i][0] for i in rows])
    left = []
    for side, chosen, depth in ((found.first, rows, found.depth[0]), (found.second, columns, found.depth[1])):
        target = ranks(side[name].mean(0)[chosen])
        where = (
            [np.ones(len(chosen)), depth[chosen], depth[chosen] ** 2]
            if how == "function"
            else list((layers[:, None] == np.unique(layers)[None]).T.astype(float))
        )
        design = np.stack([*where, *(ranks(side[other].mean(0)[chosen]) for other in by)], 1)
        left.append(target - design @ np.linalg.lstsq(design, target, rcond=None)[0])
    a, b = left
    if np.abs(a).max() < 1e-9 or np.abs(b).max() < 1e-9:
        return Partial(np.nan, np.full(n_draws, np.nan))
    strata = layers if how != "function" else np.zeros(len(rows))
    draw = np.random.default_rng(seed)
    order = np.lexsort((draw.random((n_draws, len(rows))), np.broadcast_to(strata, (n_draws, len(rows)))))
    home = np.argsort(strata, kind="stable")
    dealt = np.empty((n_draws, len(rows)))
    dealt[:, home] = b[order]
    size = float(np.sqrt((a @ a) * (b @ b)))
    return Partial(float(a @ b) / size, dealt @ a / size)


def _spearman(x: np.ndarray, y: np.ndarray, seed: int) -> Estimate:
    """Rank correlation over pairs, [episode, pair] each; interval from resampling episodes, both models' the same."""
    from scipy import stats

    n = len(x)
    value = correlation(ranks(x.mean(0)), ranks(y.mean(0)))
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=N_RANKS) / n
    a, b = (stats.rankdata(counts @ one, axis=1) for one in (x, y))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))
    low, high = np.nanquantile(drawn, (0.025, 0.975)) if np.isfinite(drawn).any() else (np.nan, np.nan)
    return Estimate(value, float(low), float(high), n, "rank correlation", "bootstrap 95 % over episodes")


def _quantiles(values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantiles over heads of the mean score, with their 95 % interval over episodes."""
    n = len(values)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=N_RANKS) / n
    drawn = np.quantile(counts @ values, QUANTILES, axis=1)
    return np.quantile(values.mean(0), QUANTILES), np.quantile(drawn, 0.025, axis=1), np.quantile(drawn, 0.975, axis=1)


def _found(score: Score) -> Estimate:
    p = score.p_corrected[np.isfinite(score.p_corrected)]
    return wilson(p < 0.05, unit="share of heads")


def heads_named(heads: Sequence[Head]) -> str:
    """Heads as text: "3.1, 3.2"."""
    return ", ".join(f"{layer}.{head}" for layer, head in heads) or "none"
