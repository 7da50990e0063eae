"""Random heads to hold the chosen ones against: as many, from the same layers where these have heads left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mechicl.analysis.ablation.verdict import LEAST_CENSUS
from mechicl.results import Head


@dataclass(frozen=True)
class Draws:
    """Random sets. `exhaustive`: these are all the matched sets that exist. `note`: what must be said about them, "" for nothing."""

    sets: tuple[tuple[Head, ...], ...]
    exhaustive: bool
    note: str


TRIES = 400
"""Draws per set wanted, before it is concluded that there are no more sets: of n equally likely ones each is then missed once in e^400."""

Pool = Mapping[int, Sequence[int]]
"""Layer -> heads that may be drawn."""


def one_draw(chosen: Sequence[Head], pool: Pool, generator: np.random.Generator, *, anywhere: bool = False) -> tuple[tuple[Head, ...], int]:
    """One random set: for each chosen head a head of its own layer, or of the nearest layers (on both sides) that have one left.

    With `anywhere` a head whose own layer has none left is replaced by one of any layer.

    Returns:
        The set, and how many of its heads come from another layer. Both are empty where too few heads are left altogether.
    """
    left = {layer: [int(h) for h in generator.permutation(list(heads))] for layer, heads in pool.items()}
    found: list[Head] = []
    moved = [home for home, _ in chosen if not _take(home, left, found)]
    for home in moved:
        distances = sorted({abs(layer - home) for layer, heads in left.items() if heads})
        if not distances:
            return (), 0
        near = [layer for layer, heads in left.items() for _ in heads if anywhere or abs(layer - home) == distances[0]]
        _take(near[int(generator.integers(len(near)))], left, found)
    return tuple(sorted(found)), len(moved)


def _take(layer: int, left: dict[int, list[int]], found: list[Head]) -> bool:
    """Move a head of the layer from `left` to `found`, if there is one."""
    if not left.get(layer):
        return False
    found.append((layer, left[layer].pop()))
    return True


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
    generator = np.random.default_rng(seed)
    found: dict[tuple[Head, ...], None] = {}
    moved = 0
    for _ in range(TRIES * n):
        one, moved = one_draw(chosen, pool, generator)
        if not one or len(found) == n:
            break
        found[one] = None
    if not found:
        remain = sum(len(some) for some in pool.values())
        return Draws((), False, f"no random control: {remain} heads are left beside the {len(taken)} chosen or spared ones")
    where = "the nearest other layers"
    if moved and len(found) < min(n, LEAST_CENSUS):  # the nearest layers hold too few for any control: look further before giving up
        where = "other layers, near or far,"
        for _ in range(TRIES * n):
            if len(found) == n:
                break
            found[one_draw(chosen, pool, generator, anywhere=True)[0]] = None
    notes = [f"{moved} of {len(chosen)} heads of each draw come from {where} because their own has no more heads"] if moved else []
    if len(found) < n:
        notes.append(f"only {len(found)} matched sets exist, {n} were asked for: all were tried")
    return Draws(tuple(found), len(found) < n, "; ".join(notes))
