"""Concepts nobody has met: thousands of procedural classes of pictures, drawn fast.

Half of the classes are signs written with a pen (white on black, black on white or coloured), the rest coloured shapes, symmetric signs, pairs of
shapes and textures. A class is a row of discrete parameters, its *signature*; everything about it follows from the signature, and a hash
of the signature alone decides whether the class is for training or held out, so no concept can be on both sides. Pictures of a class differ
in place, size, turn, slant, stroke width, softness, a smooth deformation, colour and noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from PIL import Image

from mechicl.data.compose import INSTRUCTION, QUESTION, compose
from mechicl.data.looks import COUNTS, KINDS, N_CLASSES, Split, class_ids, kind_of, signatures
from mechicl.data.paint import draw_pictures
from mechicl.data.words import pseudo_words
from mechicl.errors import OptionError
from mechicl.prompts.episode import Episode


def pick(n: int, draw: np.random.Generator, pool: Int[np.ndarray, " all"], *, alike: bool) -> Int[np.ndarray, " n"]:
    """n different classes of a pool; with `alike` all of one kind, in proportion to the kinds' numbers."""
    if alike:
        kinds = signatures()[pool, 0]
        one = kinds[int(draw.integers(len(pool)))]
        pool = pool[kinds == one]
    if n > len(pool):
        raise OptionError(f"classes must be at most {len(pool)}, what the split has; got {n}. Ask for fewer, or more kinds.")
    return pool[draw.choice(len(pool), n, replace=False)]


def draw(
    n: int,
    *,
    classes: int = 4,
    shots: int = 2,
    size: int = 56,
    split: Split = "held_out",
    seed: int = 0,
    kinds: Sequence[str] | None = None,
    alike: bool = False,
    labels: Sequence[str] | None = None,
    syllables: tuple[int, int] = (1, 4),
    instruction: str = INSTRUCTION,
    question: str = QUESTION,
) -> list[Episode]:
    """n episodes of `classes` concepts, `shots` pictures of each and a fresh picture to name. Names are new in every episode.

    Args:
        size: Side of the pictures, pixels.
        split: "held_out" for concepts that the bundled models were not trained on, "train", or "all".
        kinds: Some of `KINDS`; None for all.
        alike: All concepts of an episode are of one kind, which is harder.
        labels, syllables, instruction, question: See `mechicl.data.compose.compose`.

    Raises:
        OptionError: fewer than two classes, no shots, a split or kind that does not exist, more classes than there are.
    """
    pool = class_ids(split, kinds=kinds)
    return compose(
        n,
        lambda many, generator: pick(many, generator, pool, alike=alike),
        lambda ids, generator: draw_pictures(ids, size, generator),
        classes=classes,
        shots=shots,
        seed=seed,
        name=f"concepts-{split}",
        labels=labels,
        syllables=syllables,
        instruction=instruction,
        question=question,
        item=lambda class_id: f"{kind_of(class_id)}-{class_id}",
    )


def picture(class_id: int, size: int = 224, *, seed: int = 0) -> Image.Image:
    """One picture of a class, for people."""
    return Image.fromarray(draw_pictures([class_id], size, np.random.default_rng(seed))[0])


__all__ = ["COUNTS", "KINDS", "N_CLASSES", "class_ids", "draw", "draw_pictures", "kind_of", "picture", "pseudo_words"]
