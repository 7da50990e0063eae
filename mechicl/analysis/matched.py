"""Random heads to hold the chosen ones against: as many, from the same layers where these have heads left."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mechicl.results import Head


@dataclass(frozen=True)
class Draws:
    """Random sets. `exhaustive`: these are all the matched sets that exist. `note`: what must be said about them, "" for nothing."""

    sets: tuple[tuple[Head, ...], ...]
    exhaustive: bool
    note: str


Pool = Mapping[int, Sequence[int]]
"""Layer -> heads that may be drawn."""


def quotas(chosen: Sequence[Head], pool: Pool) -> tuple[dict[int, int], int]:
    """How many heads to draw from each layer.

    A layer gives as many as were chosen in it, as far as it has heads left; what is missing comes from the nearest layers (the lower of two).

    Returns:
        Layer -> number, and how many heads come from another layer; an empty mapping where too few heads are left altogether.
    """
    left = {layer: len(heads) for layer, heads in pool.items()}
    taken: Counter[int] = Counter()
    moved = []
    for layer, n in sorted(Counter(layer for layer, _ in chosen).items()):
        own = min(n, left.get(layer, 0))
        taken[layer] += own
        left[layer] = left.get(layer, 0) - own
        moved += [layer] * (n - own)
    for home in moved:
        near = [layer for layer, n in left.items() if n > 0]
        if not near:
            return {}, len(moved)
        layer = min(near, key=lambda at: (abs(at - home), at))
        taken[layer] += 1
        left[layer] -= 1
    return {layer: n for layer, n in taken.items() if n}, len(moved)


def matched_draws(chosen: Sequence[Head], heads: Mapping[int, int], n: int, *, seed: int, spare: Sequence[Head] = ()) -> Draws:
    """Distinct random sets matched to the chosen heads, never with one of them.

    Args:
        chosen: The heads to be matched.
        heads: Layer -> number of heads, for the layers that can be switched.
        n: How many sets are wanted.
        seed: Decides them.
        spare: Heads that are never drawn either.

    Returns:
        At most n sets; all there are, where these are fewer.
    """
    if n == 0:
        return Draws((), False, "no random control was asked for")
    taken = {*chosen, *spare}
    pool = {layer: [h for h in range(size) if (layer, h) not in taken] for layer, size in heads.items()}
    from_layer, moved = quotas(chosen, pool)
    if not from_layer:
        remain = sum(len(some) for some in pool.values())
        return Draws((), False, f"no random control: {remain} heads are left beside the {len(taken)} chosen or spared ones")
    possible = math.prod(math.comb(len(pool[layer]), k) for layer, k in from_layer.items())
    generator = np.random.default_rng(seed)
    if possible <= 4 * n:
        every = list(_all(pool, from_layer))
        found = dict.fromkeys(every[i] for i in generator.permutation(len(every))[:n])
    else:
        found = {}
        while len(found) < n:
            one = ((layer, pool[layer][i]) for layer, k in from_layer.items() for i in generator.choice(len(pool[layer]), k, replace=False))
            found[tuple(sorted(one))] = None
    notes = (
        [f"{moved} of {len(chosen)} heads of each draw come from the nearest other layers, because their own has no more heads"]
        if moved
        else []
    )
    if len(found) < n:
        notes.append(f"only {len(found)} matched sets exist, {n} were asked for: all were tried")
    return Draws(tuple(found), len(found) < n, "; ".join(notes))


def _all(pool: Pool, from_layer: Mapping[int, int]) -> Iterator[tuple[Head, ...]]:
    """Every set there is."""
    layers = [[tuple((layer, h) for h in some) for some in itertools.combinations(pool[layer], k)] for layer, k in from_layer.items()]
    for parts in itertools.product(*layers):
        yield tuple(sorted(itertools.chain.from_iterable(parts)))
