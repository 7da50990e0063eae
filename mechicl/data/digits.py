"""Real handwritten digits with made-up names: scikit-learn's 1,797 scans of 8 x 8 pixels, enlarged smoothly.

The real-picture test of a model that never met a digit. Nothing in mechicl trains on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from mechicl.data.compose import INSTRUCTION, QUESTION, compose
from mechicl.errors import OptionError
from mechicl.prompts.episode import Episode

Style = Literal["white_on_black", "black_on_white", "colour"]
MARGIN = 1
"""Empty cells put around the 8 x 8 scan, whose ink often touches the border."""


@lru_cache(maxsize=1)
def scans() -> tuple[UInt8[np.ndarray, "n 8 8"], Int[np.ndarray, " n"]]:
    """All scans (0 paper, 255 ink) and the digit each shows."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images: np.ndarray = np.asarray(bunch["images"])
    return np.round(images * (255 / 16)).astype(np.uint8), np.asarray(bunch["target"]).astype(np.int64)


def enlarge(scan: UInt8[np.ndarray, "8 8"], size: int) -> Float[np.ndarray, "size size"]:
    """A scan with a margin, bicubic, ink in [0, 1]."""
    framed = Image.fromarray(np.pad(scan, MARGIN))
    return np.asarray(framed.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255


def draw_pictures(
    digits: Sequence[int] | Int[np.ndarray, " n"], size: int, generator: np.random.Generator, *, style: Style = "white_on_black"
) -> UInt8[np.ndarray, "n size size 3"]:
    """A scan of every digit asked for; no scan twice in one call while there are others.

    Raises:
        OptionError: a digit, size or style that does not exist.
    """
    wanted = np.asarray(digits, dtype=np.int64)
    if wanted.size and not (wanted.min() >= 0 and wanted.max() <= 9):
        raise OptionError(f"digits must be in 0..9; got {wanted.tolist()}. Pick among the ten.")
    if size < 8:
        raise OptionError(f"size must be at least 8 pixels; got {size}. Draw larger pictures.")
    if style not in get_args(Style):
        raise OptionError(f"style must be one of {', '.join(get_args(Style))}; got {style!r}. Pick one of them.")
    images, shown = scans()
    decks = {int(d): generator.permutation(np.flatnonzero(shown == d)) for d in np.unique(wanted)}
    met = dict.fromkeys(decks, 0)
    pictures = np.empty((len(wanted), size, size, 3), dtype=np.uint8)
    for k, digit in enumerate(wanted.tolist()):
        ink = enlarge(images[decks[digit][met[digit] % len(decks[digit])]], size)[..., None]
        met[digit] += 1
        pictures[k] = np.round(colours(ink, style, generator)).astype(np.uint8)
    return pictures


def colours(ink: Float[np.ndarray, "size size 1"], style: Style, generator: np.random.Generator) -> Float[np.ndarray, "size size 3"]:
    """Ink on paper, 0 to 255. `colour`: a dark random ink on a light random paper."""
    if style == "white_on_black":
        return np.repeat(255 * ink, 3, 2)
    if style == "black_on_white":
        return np.repeat(255 * (1 - ink), 3, 2)
    pen, paper = generator.uniform(0, 130, 3).astype(np.float32), generator.uniform(190, 255, 3).astype(np.float32)
    return paper + (pen - paper) * ink


def draw(
    n: int,
    *,
    classes: int = 4,
    shots: int = 2,
    size: int = 56,
    seed: int = 0,
    style: Style = "white_on_black",
    digits: Sequence[int] = tuple(range(10)),
    labels: Sequence[str] | None = None,
    syllables: tuple[int, int] = (1, 4),
    instruction: str = INSTRUCTION,
    question: str = QUESTION,
) -> list[Episode]:
    """n episodes of `classes` digits, `shots` scans of each and a fresh scan to name. Names are made up anew in every episode.

    Args:
        size: Side of the pictures, pixels.
        style: Ink and paper; "white_on_black" is how the scans come.
        digits: The digits that may occur.
        labels, syllables, instruction, question: See `mechicl.data.compose.compose`.

    Raises:
        OptionError: fewer than two classes, no shots, more classes than digits.
    """
    pool = np.unique(np.asarray(digits, dtype=np.int64))
    if classes > len(pool):
        raise OptionError(f"classes must be at most {len(pool)}, the digits that may occur; got {classes}. Ask for fewer.")
    return compose(
        n,
        lambda many, generator: pool[generator.choice(len(pool), many, replace=False)],
        lambda ids, generator: draw_pictures(ids, size, generator, style=style),
        classes=classes,
        shots=shots,
        seed=seed,
        name="digits",
        labels=labels,
        syllables=syllables,
        instruction=instruction,
        question=question,
        item=lambda digit: f"digit-{digit}",
    )
