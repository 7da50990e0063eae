"""How much of the way to a twin prompt heads carry together, beside random sets of as many heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mechicl.analysis.ablation.matched import TRIES, Draws, matched_draws, one_draw
from mechicl.analysis.ablation.switches import switchable
from mechicl.analysis.guarded import guarded
from mechicl.analysis.patching.cells import Patch, Selection
from mechicl.analysis.patching.edits import run_naive
from mechicl.analysis.patching.job import Job, prepare
from mechicl.analysis.patching.metrics import Metric
from mechicl.analysis.statistics import mean_estimate, permutation_p, ratio_interval
from mechicl.analysis.study import ENOUGH
from mechicl.prompts.corrupt import Pairs
from mechicl.results import Carried, Estimate, Head


@guarded
def twin_gap(model: Any, pairs: Pairs, metric: Metric = "label_logprob", batch_size: int = 8, seed: int = 0) -> Estimate:
    """How far the answers of the two prompts of a pair are apart: what can be carried."""
    job = _job(model, pairs, [(switchable(model)[0], 0)], metric, batch_size)
    ends = [job.ends(rows) for rows in job.parts()]
    return mean_estimate(np.concatenate([a - b for a, b in ends]), unit=job.contrast.unit, seed=seed)


@guarded
def carry(
    model: Any, pairs: Pairs, sets: Mapping[str, tuple[Head, ...]], *, n_random: int = 20, metric: Metric = "label_logprob", seed: int = 0, batch_size: int = 8,
    spare: Sequence[Head] = (),
) -> tuple[dict[str, Carried], list[str]]:  # fmt: skip
    """All heads of a set take their outputs from the twin at once; the same for random sets of as many heads.

    Args:
        model, n_random, metric, seed, batch_size: See `link_circuit`.
        pairs: Prompts and their twins.
        sets: Heads by name.
        spare: Heads that random sets leave out, where enough others are left.

    Returns:
        By name; and notes on the random sets.
    """
    draws, notes = {}, []
    for name, heads in sets.items():
        drawn = draws_beside(model, heads, n_random, seed, spare)
        draws[name] = drawn.sets
        notes += [f"Random heads beside the {name} ones: {drawn.note}."] if drawn.note else []
    every = list(dict.fromkeys([*sets.values(), *(one for some in draws.values() for one in some)]))
    values, clean, corrupt, unit = _exchange(model, pairs, every, metric, batch_size)
    gap = clean - corrupt
    found = {}
    for name, heads in sets.items():
        share = (values[:, every.index(heads)] - corrupt) / gap.mean()
        low, high = ratio_interval(values[:, every.index(heads)] - corrupt, gap, seed=seed)
        random = np.array([float((values[:, every.index(one)] - corrupt).mean() / gap.mean()) for one in draws[name]])
        p = float(permutation_p(0.0, int((random >= share.mean() - 1e-9).sum()), len(random))) if len(random) else float("nan")
        estimate = Estimate(float(share.mean()), float(low), float(high), len(share), "share of the gap", "bootstrap 95 %")
        found[name] = Carried(heads, estimate, random, p, mean_estimate(gap, unit=unit, seed=seed))
    return found, notes


def _exchange(
    model: Any, pairs: Pairs, sets: Sequence[tuple[Head, ...]], metric: Metric, batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """The metric with each set's outputs taken from the twin [pair, set], and of both runs [pair]."""
    job = _job(model, pairs, list({head for one in sets for head in one}), metric, batch_size)
    values, ends = [], []
    for rows in job.parts():
        recorded = job.record(rows)
        cells = [[edit for layer, head in one for edit in recorded.chunk.edits(Patch("z", (layer, head), layer, head))] for one in sets]
        where = job.some(rows)[0].positions(recorded.chunk.base)
        values.append(
            np.stack(run_naive(model, recorded.chunk.base, cells, where, recorded.read, together=max(1, 64 // recorded.chunk.base.n)), 1)
        )
        ends.append((recorded.clean, recorded.corrupt))
    clean, corrupt = (np.concatenate([pair[k] for pair in ends]) for k in range(2))
    return np.concatenate(values), clean, corrupt, job.contrast.unit


def _job(model: Any, pairs: Pairs, heads: Sequence[Head], metric: Metric, batch_size: int) -> Job:
    return prepare(model, pairs, None, "z", "head", metric, "denoise", Selection(heads=heads), None, "resume", batch_size)


def draws_beside(model: Any, heads: Sequence[Head], n: int, seed: int, spare: Sequence[Head] = ()) -> Draws:
    """Random sets of as many heads, none of them chosen: of the same layers where these have heads left, else of the nearest, and, where such sets are too few for a
    control, of any layer.

    Returns:
        At most n sets; `note` says what they lack.
    """
    spare = controls_spare(model, heads, spare)
    found = matched_draws(heads, sizes(model), n, seed=seed, spare=spare)
    if n == 0 or len(found.sets) >= min(n, ENOUGH):
        return found
    taken = {*heads, *spare}
    pool = {layer: [h for h in range(size) if (layer, h) not in taken] for layer, size in sizes(model).items()}
    generator, more = np.random.default_rng([seed, 83]), dict.fromkeys(found.sets)
    for _ in range(TRIES * n):
        one, _ = one_draw(heads, pool, generator, anywhere=True)
        if not one or len(more) == n:
            break
        more[one] = None
    note = f"{len(more)} random sets, of any layer where the heads' own have none left"
    return Draws(tuple(more), len(more) < n, note if more else found.note)


def sizes(model: Any) -> dict[int, int]:
    """Layer -> number of heads, of the layers that can be switched."""
    anatomy = getattr(model, "anatomy", None)  # layers of a few families differ in their number of heads
    return {layer: int(anatomy.layers[layer].n_heads if anatomy is not None else model.cfg.n_heads) for layer in switchable(model)}


def controls_spare(model: Any, heads: Sequence[Head], others: Sequence[Head]) -> list[Head]:
    """Heads of another known use, to be left out of random sets where as many as `ENOUGH` different sets remain without them."""
    known = sorted(set(others) - set(heads))
    return known if len(matched_draws(heads, sizes(model), ENOUGH, seed=0, spare=known).sets) >= ENOUGH else []
