"""`factor_shares`: does an example move the query's keys and values by what it means, by how it is written, or by both together?

Our definition (the paper's could not be read). Every episode is run under the product of the factors' levels, in several replicates. The query's own tokens
are the same in all runs; their keys before RoPE and values, less those of the zero-shot prompt, are the shift. Within an episode the shift varies over runs:
the shares say what goes with each factor, with their interaction, and with nothing (replicates of one condition: `mechicl.prompts.conditions`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mechicl.analysis.feed import check_data, ids_of, progress_bar, provenance, rehearse
from mechicl.analysis.guarded import guarded
from mechicl.analysis.labels import LabelScore, check_score
from mechicl.analysis.shift.factor_runs import ZERO_SHOT, Answered, Read, check_changes
from mechicl.analysis.shift.read import Part
from mechicl.analysis.shift.shares import Interactions, decompose_gram, ratio_of_sums
from mechicl.analysis.statistics import holm, mean_estimate, wilson
from mechicl.errors import EpisodeError, OptionError
from mechicl.prompts.batch import Batch
from mechicl.prompts.conditions import SPANS, Change, Crossed, cross, crossing
from mechicl.prompts.episode import Episode
from mechicl.results import Decomposition, Estimate, FactorShares, Skipped


@guarded
def factor_shares(
    model: Any,
    episodes: Sequence[Episode],
    *,
    semantics: Change | list[Change] = "other class",
    format: Change | list[Change] = "label first",  # noqa: A002
    factors: Mapping[str, Change | list[Change]] | None = None,
    parts: Sequence[Part] = ("k", "v"),
    layers: Sequence[int] | None = None,
    spans: Sequence[str] | None = None,
    replicates: int = 2,
    vary: Sequence[str] = ("order", "names"),
    interactions: Interactions = "apart",
    score: LabelScore = "full",
    n_permutations: int = 1999,
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> FactorShares:
    """Shares of meaning, form, their interaction and the rest in how examples move the query's keys and values; and the answers under each condition.

    Args:
        model: A `HookedVLM`, a toy, or anything with the surface of `HookedModel` and hook_k, hook_v.
        episodes: With examples; they are each other's donors of items of other classes.
        semantics: What breaks the examples' meaning: a name in `reform.BREAKS`, a function, or a list (a level each).
        format: What changes their form: a name in `reform.FORMS`, a `Form`, a tuple of names (one drawn in each replicate), or a list (a level each).
        factors: Other factors in place of these two, name -> changes; more than two are allowed.
        parts, layers: What is read; None: all layers.
        spans: Some of `conditions.SPANS`; None: all that the prompts have.
        replicates: Draws of every condition; with one there is no residual, and p compares a factor with the interaction.
        vary: What differs between replicates, see `conditions.cross`.
        interactions: "apart": a source of its own. "shared": divided among the factors (Shapley values), which is easier to read with more than two.
        score: What decides between candidates.
        n_permutations: Draws of the null.
        seed: Decides all draws.
        batch_size: Prompts per forward pass.
        task: What the episodes are, for the record.
        progress: Show a bar.

    Returns:
        FactorShares. Episodes that do not allow a condition, or whose query's tokens would change, are left out and named.

    Raises:
        OptionError: an option out of range; a change that changes nothing on this model.
        EpisodeError: no usable episode.
    """
    if isinstance(episodes, Batch):
        raise OptionError("episodes must be a list of episodes, because their examples are rewritten; got a Batch. Pass batch.episodes.")
    check_data(episodes, batch_size)
    check_score(score)
    if spans is not None and not set(spans) <= set(SPANS):
        raise OptionError(f"spans must be among {', '.join(SPANS)}; got {list(spans)}. These are the query's own tokens.")
    if n_permutations < 1:
        raise OptionError(f"n_permutations must be at least 1; got {n_permutations}. 1999 make p down to 0.0005.")
    chosen = crossing({"semantics": semantics, "format": format} if factors is None else factors)
    rehearse(model, episodes)
    crossed = cross(episodes, chosen, replicates=replicates, vary=vary, seed=seed)
    check_changes(model, crossed)
    names = ids_of(episodes)
    found = Answered.of(model, crossed, score, seed, batch_size, progress)
    read = Read()
    for e in progress_bar(range(crossed.n), total=crossed.n, what="keys and values", show=progress):
        reason = found.reasons[e] or read.add(model, crossed, e, parts, layers, spans, batch_size)
        if reason:
            read.skipped.append(Skipped(names[crossed.rows[e]], reason))
        else:
            read.kept.append(e)
    if not read.kept:
        raise EpisodeError(
            f"episodes must allow every condition; none of {len(episodes)} does (first: {read.skipped[0].reason}). Choose other changes."
        )
    split = decompose_gram(
        read.stacked(), crossed.design.numpy(), [one.name for one in chosen], blocks=crossed.replicate.numpy(), interactions=interactions, n_permutations=n_permutations, seed=seed,
        floor=read.floor(model) ** 2 * len(crossed.design),
    )  # fmt: skip
    options = {
        "factors": {one.name: one.levels for one in chosen},
        "replicates": replicates,
        "vary": tuple(vary),
        "score": score,
        "batch_size": batch_size,
    }
    made = provenance(model, task=task, seed=seed, options=options)
    return _result(crossed, read, split, found, [names[crossed.rows[e]] for e in read.kept], seed, made)


def _result(crossed: Crossed, read: Read, split: Decomposition, found: Answered, ids: Sequence[str], seed: int, made: Any) -> FactorShares:
    kept = np.array(read.kept)
    correct = {name: values[kept] for name, values in found.correct.items()}
    nats = {name: values[kept] for name, values in found.margins.items()}
    replicates = int(crossed.replicate.max()) + 1
    notes = list(read.notes)
    if replicates == 1:
        notes.append("One replicate: there is no residual, and p compares a factor with the interaction. Ask for replicates=2 or more.")
    still = np.isnan(split.shares["residual"])
    if still.any():
        notes.append(
            f"{int(still.sum())} of {still.size} cells are moved by no condition (the first layer's keys and values never are) and have no shares."
        )
    moved = np.sqrt(np.where(still, np.nan, split.squares["total"].mean(0)) / len(crossed.design))
    return FactorShares(
        parts=read.parts, layers=read.layers, heads=tuple(range(read.heads)), spans=read.spans, factors=tuple(one.name for one in crossed.factors),
        levels={one.name: one.levels for one in crossed.factors}, sources=split.sources, shares=split.shares, low=split.low, high=split.high,
        null=split.null, p=split.p, p_corrected={name: holm(p) for name, p in split.p.items()}, moved=moved,
        common=np.sqrt(np.stack(read.common).mean(0)), squares=split.squares, pooled=pooled(read.parts, split.squares, still, seed),
        conditions=(*crossed.conditions, ZERO_SHOT),
        accuracy={name: wilson(x) for name, x in correct.items()},
        margin={name: mean_estimate(x, unit="nats", seed=seed) for name, x in nats.items()}, correct=correct, margins=nats,
        chance=float(found.chance[kept].mean()), replicates=replicates, episode_ids=tuple(ids), n=len(kept),
        skipped=(*crossed.skipped, *read.skipped), provenance=made, notes=tuple(notes),
    )  # fmt: skip


def pooled(parts: Sequence[str], squares: Mapping[str, np.ndarray], still: np.ndarray, seed: int) -> dict[str, dict[str, Estimate]]:
    """Shares over all layers, heads and spans of a part: of the sum of the cells' variation, each relative to its own length."""
    out: dict[str, dict[str, Estimate]] = {}
    for a, part in enumerate(parts):
        alive = ~still[a]
        sums = {name: values[:, a][:, alive].sum(1) for name, values in squares.items()}
        total = sums.pop("total")
        out[part] = {}
        for name, values in sums.items():
            share = float(values.sum() / total.sum()) if alive.any() else float("nan")
            low, high = ratio_of_sums(values[:, None], np.where(alive.any(), total, np.nan)[:, None], seed=seed)
            out[part][name] = Estimate(share, float(low[0]), float(high[0]), len(total), "share", "bootstrap 95 %")
    return out
