"""Episodes with pictures for tiny checkpoints of every family, and hooked models of them, for the tests of reading out."""

from __future__ import annotations

from functools import cache

from conftest import LABELS, picture

from mechicl.models.vlm import HookedVLM
from mechicl.prompts.episode import Episode, Shot
from mechicl.training.organisms import FAMILIES, build

NOT_ADDITIVE = ("gemma3", "paligemma2", "mllama")
ADDITIVE = [family for family in FAMILIES if family not in NOT_ADDITIVE]


@cache
def hooked(family: str) -> HookedVLM:
    """Not to be changed."""
    return HookedVLM(*build(family, preset="tiny", seed=2), name=family)  # pyright: ignore[reportArgumentType]


def episodes(n: int = 4) -> list[Episode]:
    """Two classes of pictures; the order and the answer vary, and one prompt is shorter, so that a batch is padded."""
    found = []
    for k in range(n):
        order = [(0, 1, 0, 1), (1, 0), (0, 0, 1, 1)][k % 3]
        shots = tuple(
            Shot(LABELS[x], images=(picture(56, 56, seed=1000 * x + 10 * k + j),), item=f"class {x}") for j, x in enumerate(order)
        )
        query = Shot(LABELS[k % 2], images=(picture(56, 56, seed=1000 * (k % 2) + 10 * k + 9),), item=f"class {k % 2}")
        found.append(Episode(shots, query, LABELS[:2], question="This is a", id=f"pictures {k}"))
    return found
