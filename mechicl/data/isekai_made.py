"""A made-up set of the kind of ISEKAI: unreal concepts, each with a real one that resembles it.

Real is what has an everyday name: a "dotted red star". Its unreal partner is a chimera: the same shape in the same colour, grown together with another shape,
under a name that means nothing. Both are concepts of `mechicl.data.concepts`, with its training and held-out classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from PIL import Image

from mechicl.data.link_pool import LinkClass, Pool
from mechicl.data.looks import FILLS, KINDS, Split, class_ids, signatures
from mechicl.data.memes_made import COLOURS, SHAPES
from mechicl.data.paint import draw_pictures
from mechicl.data.strokes import FORMS
from mechicl.data.words import pseudo_words
from mechicl.errors import OptionError

N_GROUPS = 20
PER_CLASS = 32
LOOKS: Mapping[str, str] = {
    "solid": "", "outline": "outlined ", "stripes": "striped ", "checks": "checked ", "dots": "dotted ", "rings": "ringed ",
}  # fmt: skip
"""`looks.FILLS` in words."""


@lru_cache(maxsize=3)
def partners(split: Split) -> tuple[tuple[str, int, tuple[int, ...]], ...]:
    """(name, class, chimeras) of every named shape of a split for which the split has chimeras: classes of pairs whose larger shape is it."""
    rows, forms, ids = signatures(), list(FORMS), class_ids(split)
    shapes = {tuple(int(v) for v in rows[i, 1:4]): int(i) for i in ids if rows[i, 0] == KINDS.index("shape")}
    pairs: dict[tuple[int, int], list[int]] = {}
    for i in ids[rows[ids, 0] == KINDS.index("pair")]:
        pairs.setdefault((int(rows[i, 1]), int(rows[i, 3])), []).append(int(i))
    found = []
    for fill, word in LOOKS.items():
        for form, noun in SHAPES.items():
            for hue, colour in enumerate(COLOURS):
                at, twins = (forms.index(form), FILLS.index(fill), hue), pairs.get((forms.index(form), hue), [])
                if at in shapes and twins:
                    found.append((f"{word}{colour} {noun}", shapes[at], tuple(twins)))
    return tuple(found)


def generated_pool(
    seed: int = 0, n_groups: int = N_GROUPS, per_class: int = PER_CLASS, size: int = 56, *, split: Split = "held_out"
) -> Pool:
    """`n_groups` unreal concepts with their real partners, in memory.

    Args:
        seed: Decides concepts, names and pictures.
        n_groups: Pairs; half as many as classes.
        per_class: Pictures of each class.
        size: Side of the pictures, pixels.
        split: "held_out" for concepts that the bundled models were not trained on, "train", or "all".

    Raises:
        OptionError: fewer than one group or picture, or more groups than the split has.
    """
    if n_groups < 1 or per_class < 1:
        raise OptionError(f"n_groups and per_class must be at least 1; got {n_groups} and {per_class}. The published set has 20 and 32.")
    draw = np.random.default_rng([seed, 31])
    chosen = _choose(n_groups, split, draw)
    if len(chosen) < n_groups:
        raise OptionError(f"n_groups must be at most {len(chosen)} with this split and seed; got {n_groups}. Ask for fewer.")
    names = pseudo_words(n_groups, draw, syllables=(2, 3), distinct_start=n_groups <= 70)
    classes = []
    for number, (name, (real, real_id, unreal_id)) in enumerate(zip(names, chosen, strict=True)):
        pictures = draw_pictures(np.repeat([unreal_id, real_id], per_class), size, draw)
        images = tuple(Image.fromarray(one) for one in pictures)
        group = f"group-{number:02d}"
        classes.append(LinkClass(name, images[:per_class], kind="unreal", group=group))
        classes.append(LinkClass(real, images[per_class:], kind="real", group=group))
    return Pool(tuple(classes), title=f"generated-{split}")


def _choose(n: int, split: Split, draw: np.random.Generator) -> list[tuple[str, int, int]]:
    """(real name, real class, unreal class), no class twice."""
    ways = partners(split)
    chosen: list[tuple[str, int, int]] = []
    taken: set[int] = set()
    for i in draw.permutation(len(ways)):
        name, real, twins = ways[int(i)]
        free = [twin for twin in twins if twin not in taken]
        if free and len(chosen) < n:
            twin = free[int(draw.integers(len(free)))]
            taken.add(twin)
            chosen.append((name, real, twin))
    return chosen
