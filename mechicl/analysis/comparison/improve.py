"""`heads_improve`: "the heads of the larger model are better" as a claim that can fail.

A model with more heads has a better best head by chance alone, and the best of many heads on the episodes that ranked it is too good. So heads are ranked on one half of the
episodes and measured on the other; and the difference is given three times: as it is, with the larger model cut down at random to as many heads as the smaller one has, and
for the same share of the heads of each.

The cut needs no sampling. Among n heads in order, the one of rank r is among the k best of m drawn without replacement with probability
P = m/n * Hypergeometric(at most k - 1 of its r - 1 betters are drawn); the mean of the k best of m is the sum of P/k times the scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import floor
from typing import Any

import numpy as np

from mechicl.analysis.comparison.compare import compare
from mechicl.analysis.comparison.sides import Source
from mechicl.analysis.feed import Data
from mechicl.analysis.guarded import guarded
from mechicl.analysis.statistics import mean_estimate, paired_change, permutation_p, sign_flip_p
from mechicl.errors import OptionError
from mechicl.results import Estimate, Score
from mechicl.results.comparison import Comparison, HeadsImprove

N_DEALT = 2000


@guarded
def heads_improve(
    model_a: Source | Comparison,
    model_b: Source | None = None,
    episodes: Data | None = None,
    *,
    score: str = "induction",
    top: int = 5,
    seed: int = 0,
    **options: Any,
) -> HeadsImprove:
    """Are the best heads of `model_b` better than those of `model_a`, and by more than having more of them?

    Args:
        model_a: The smaller (or earlier) model, or a Comparison that has both already.
        model_b, episodes: As `compare` takes them; not with a Comparison.
        score: The head score that is said to improve.
        top: How many of the best heads.
        seed: Decides intervals and permutations.
        options: Of `compare`: names, batch_size, load_options, out, ...

    Returns:
        HeadsImprove. One model of each size is one draw of a training: what is said holds for these two.

    Raises:
        OptionError: `top` is out of range, the score unknown to one of the models, or fewer than four episodes.
    """
    if isinstance(model_a, Comparison):
        found = model_a
    elif model_b is None or episodes is None:
        raise OptionError(
            "heads_improve must be given a Comparison, or two models and episodes; something is missing. Call heads_improve(a, b, episodes)."
        )
    else:
        found = compare(
            model_a, model_b, episodes, scores=(score,), top=top, seed=seed, **{"accuracy": False, "align": "function", **options}
        )
    missing = [side.name for side in (found.first, found.second) if score not in side.scores.scores]
    if missing:
        raise OptionError(f"score must be one that both models have; {missing[0]} has no {score!r}. Choose from {', '.join(found.scores)}.")
    first, second = (side.scores[score] for side in (found.first, found.second))
    return improvement(
        first, second, (found.first.name, found.second.name), top=top, seed=seed, provenance=found.provenance, notes=_same_prompts(found)
    )  # fmt: skip


def _same_prompts(found: Comparison) -> tuple[str, ...]:
    shown = (found.first.prompts, found.second.prompts)
    return (
        ()
        if shown[0] == shown[1]
        else (f"The two saw different prompts ({shown[0]} and {shown[1]}): a difference need not be the models'.",)
    )


def improvement(
    first: Score, second: Score, names: tuple[str, str], *, top: int = 5, seed: int = 0, provenance: Any = None, notes: tuple[str, ...] = ()
) -> HeadsImprove:
    """`heads_improve` on scores that are there already, of the same episodes in the same order."""
    x, y = (_table(score) for score in (first, second))
    known = ~(np.isnan(x).any(1) | np.isnan(y).any(1)) if len(x) == len(y) else np.zeros(0, dtype=bool)
    x, y = (x[known], y[known]) if len(x) == len(y) else (x, y)
    if len(x) != len(y) or len(x) < 4:
        raise OptionError(
            f"scores must be of the same episodes, four at least; got {len(x)} and {len(y)}. Score both models on one list of episodes."
        )
    sizes = (x.shape[1], y.shape[1])
    if not 1 <= top <= min(sizes):
        raise OptionError(f"top must be in 1..{min(sizes)}, the heads of the smaller model; got {top}. Choose fewer.")
    least, share = min(sizes), top / min(sizes)
    a, b = (held_out(one, _plain_weights(one.shape[1], top)) for one in (x, y))
    even = [held_out(one, cut_weights(one.shape[1], least, top)) for one in (x, y)]
    # the smaller model decides the share, so its k is whole; the other's is rounded down, so that the rounding does not favour more heads
    same = [held_out(one, _plain_weights(one.shape[1], max(1, floor(share * one.shape[1] + 1e-9)))) for one in (x, y)]
    raw, equal, part = (paired_change(p, q, unit=first.unit, seed=seed) for p, q in ((a, b), tuple(even), tuple(same)))
    dealt = _dealt(np.concatenate([x, y], 1), sizes[0], top, seed)
    p_heads = float(permutation_p(raw.value, int((dealt >= raw.value - 1e-12).sum()), len(dealt)))
    p_episodes = float(sign_flip_p(even[1] - even[0], seed=seed, tie=1e-7))
    p_below = float(permutation_p(raw.value, int((dealt <= raw.value + 1e-12).sum()), len(dealt)))
    found = _finding(raw, equal, part, p_heads, p_below)
    numbers: dict[str, Any] = {"raw": raw, "equal_number": equal, "equal_share": part, "by_number": float(dealt.mean())}
    return HeadsImprove(
        score=first.name, unit=first.unit, names=names, k=top, share=share, n_heads=sizes, first=mean_estimate(a, unit=first.unit, seed=seed),
        second=mean_estimate(b, unit=first.unit, seed=seed), by_number_high=float(np.quantile(dealt, 0.975)), p_heads=p_heads, p_episodes=p_episodes, finding=found,
        verdict=_verdict(first.name, names, top, sizes, found, numbers, p_heads), n=len(x), provenance=provenance, notes=notes, **numbers,
    )  # fmt: skip


def _table(score: Score) -> np.ndarray:
    """[episode, head] of the heads that the score knows."""
    return score.per_episode[:, np.isfinite(score.value)]


def _plain_weights(n: int, k: int) -> np.ndarray:
    return (np.arange(n) < k) / k


def cut_weights(n: int, m: int, k: int) -> np.ndarray:
    """What each of n heads, best first, weighs in the mean of the k best of m heads drawn at random: the derivation stands at the top of the module."""
    from scipy import stats

    if n == m:
        return _plain_weights(n, k)
    betters = np.arange(n)
    return m / n * stats.hypergeom.cdf(k - 1, n - 1, betters, m - 1) / k


def held_out(table: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weighted mean over heads, [episode]: heads are ranked on the episodes of the other half (even and odd numbers)."""
    out = np.empty(len(table))
    half = np.arange(len(table)) % 2 == 0
    for measured in (half, ~half):
        order = np.argsort(-table[~measured].mean(0), kind="stable")
        out[measured] = table[measured][:, order] @ weights
    return out


def held_out_by(ranking: np.ndarray, table: np.ndarray, k: int) -> np.ndarray:
    """The mean of the k heads that are best in `ranking` [episode, head] on the other half of the episodes, measured in `table`, [episode]."""
    out = np.full(len(table), np.nan)
    half = np.arange(len(table)) % 2 == 0
    for measured in (half, ~half):
        if measured.any() and (~measured).any():
            with np.errstate(invalid="ignore"):
                mean = np.nansum(ranking[~measured], 0) / (~np.isnan(ranking[~measured])).sum(0)
            order = np.argsort(-np.nan_to_num(mean, nan=-np.inf), kind="stable")
            out[measured] = table[measured][:, order[:k]].mean(1)
    return out


def _dealt(pool: np.ndarray, n_first: int, k: int, seed: int) -> np.ndarray:
    """Raw differences when the heads of both models are dealt to them at random [draw]: heads are the units, and the one with more heads still has more."""
    draw = np.random.default_rng(seed)
    half = np.arange(len(pool)) % 2 == 0
    means = np.stack([pool[half].mean(0), pool[~half].mean(0)])
    out = np.empty(N_DEALT)
    for i in range(N_DEALT):
        order = draw.permutation(pool.shape[1])
        out[i] = np.mean([_top_mean(means, order[n_first:], k, way) - _top_mean(means, order[:n_first], k, way) for way in (0, 1)])
    return out


def _top_mean(means: np.ndarray, heads: np.ndarray, k: int, way: int) -> float:
    """Mean on one half of the k heads that are best on the other."""
    chosen = heads[np.argpartition(-means[1 - way, heads], k - 1)[:k]]
    return float(means[way, chosen].mean())


def _finding(raw: Estimate, equal: Estimate, part: Estimate, p_above: float, p_below: float) -> str:
    """Both ways of taking the number of heads out must show a difference over episodes, and heads dealt at random must hardly ever do as much."""
    if equal.low > 0 and part.low > 0 and p_above < 0.05:
        return "better"
    if equal.high < 0 and part.high < 0 and p_below < 0.05:
        return "worse"
    if raw.low > 0:
        return "higher, as more heads are" if equal.value < raw.value else "higher, not beyond chance"
    return "no difference shown"


def _verdict(score: str, names: tuple[str, str], k: int, sizes: tuple[int, int], found: str, numbers: Mapping[str, Any], p: float) -> str:
    a, b = names
    what = f"the {k} best {score.replace('_', ' ')} heads" if k > 1 else f"the best {score.replace('_', ' ')} head"
    raw, equal = numbers["raw"], numbers["equal_number"]
    same = f"{equal} with as many heads of each ({sizes[0]} and {sizes[1]}), " if sizes[0] != sizes[1] else ""
    told = f"difference {raw}, {same}{numbers['by_number']:+.3f} when the heads of both are dealt to them at random (p = {p:.2g} for as large a one)"
    said = {
        "better": f"Better: {what} of {b} have higher scores than those of {a}, and by more than {'the number of heads explains' if same else 'heads dealt at random differ'}",
        "worse": f"Worse: {what} of {b} have lower scores than those of {a}",
        "higher, as more heads are": f"Not shown to be better: {what} of {b} have higher scores than those of {a}, as the best of more heads would",
        "higher, not beyond chance": f"Not shown to be better: {what} of {b} have higher scores than those of {a}, but heads dealt at random do so too often",
        "no difference shown": f"No difference shown between {what} of {b} and of {a}",
    }[found]
    return f"{said}: {told}. Two models, one training each."
