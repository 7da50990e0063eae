"""Pictures for the small VL-ICL sets: words and digits painted with a font, scenes of things to count, words in a photograph with a red box."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": ("cube", "sphere", "cylinder"),
    "size": ("large", "small"),
    "material": ("rubber", "metal"),
    "color": ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow"),
}
"""Of things in a scene, and their values, as in CLEVR."""
INKS = {"gray": (120, 124, 130), "red": (215, 40, 40), "blue": (50, 90, 225), "green": (40, 150, 60), "brown": (130, 80, 40), "purple": (150, 60, 200), "cyan": (40, 190, 200), "yellow": (235, 215, 40)}  # fmt: skip
CELLS = 3
"""A scene is a grid of so many cells a side, each with a thing or none."""
RED = (230, 20, 20)


@lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font."""
    return ImageFont.load_default(size)


def words_picture(
    text: str, size: int, *, ink: tuple[int, int, int] = (0, 0, 0), paper: tuple[int, int, int] = (255, 255, 255)
) -> Image.Image:
    """A square picture with a text in the middle, as large as it fits."""
    picture = Image.new("RGB", (size, size), paper)
    pen, height = ImageDraw.Draw(picture), max(6, int(0.4 * size))
    while height > 6 and pen.textlength(text, font=font(height)) > 0.9 * size:
        height -= 1
    pen.text((size / 2, size / 2), text, fill=ink, font=font(height), anchor="mm")
    return picture


@dataclass(frozen=True)
class Thing:
    """One thing in a scene."""

    shape: str
    size: str
    material: str
    color: str

    def value(self, attribute: str) -> str:
        """Its value of an attribute."""
        return str(getattr(self, attribute))


def draw_things(n: int, draw: np.random.Generator) -> list[Thing]:
    """n things of random looks."""
    return [Thing(*(values[int(draw.integers(len(values)))] for values in ATTRIBUTES.values())) for _ in range(n)]


def scene_picture(things: list[Thing], size: int, draw: np.random.Generator) -> Image.Image:
    """Things in random cells of a grid. A metal thing shines; a cylinder is upright and round at its ends.

    At most `CELLS` squared things fit; more are a programming error.
    """
    picture = Image.new("RGB", (size, size), (205, 205, 200))
    pen, cell = ImageDraw.Draw(picture), size / CELLS
    for where, thing in zip(draw.permutation(CELLS * CELLS)[: len(things)].tolist(), things, strict=True):
        radius = cell * (0.44 if thing.size == "large" else 0.24)
        x, y = (where % CELLS + 0.5) * cell, (where // CELLS + 0.5) * cell
        _thing(pen, thing, x, y, radius)
    return picture


def _thing(pen: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, radius: float) -> None:
    ink, wide = INKS[thing.color], radius * (0.6 if thing.shape == "cylinder" else 0.85 if thing.shape == "cube" else 1)
    box = (x - wide, y - radius if thing.shape != "cube" else y - wide, x + wide, y + radius if thing.shape != "cube" else y + wide)
    if thing.shape == "sphere":
        pen.ellipse(box, fill=ink)
    elif thing.shape == "cube":
        pen.rectangle(box, fill=ink)
    else:
        pen.rounded_rectangle(box, radius=wide, fill=ink)
    if thing.material == "metal":
        shine, at = radius * 0.22, radius * 0.3
        pen.ellipse((x - at - shine, y - at - shine, x - at + shine, y - at + shine), fill=(255, 255, 255))


def sign_picture(
    word: str, others: list[str], background: Image.Image, draw: np.random.Generator
) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """A word, large, in a red box on a picture, and smaller words without one.

    Returns:
        The picture, and the box of the word: left, top, right, bottom, pixels.
    """
    picture = background.copy()
    size, pen = picture.width, ImageDraw.Draw(picture)
    height = max(8, int(0.24 * size))
    while height > 7 and pen.textlength(word, font=font(height)) > 0.8 * size:
        height -= 1
    top = float(draw.uniform(0.1, 0.45)) * size
    x = size / 2
    box = tuple(float(v) for v in pen.textbbox((x, top), word, font=font(height), anchor="mt"))
    left, up, right, down = box
    pad = max(2.0, 0.03 * size)
    pen.rectangle((left - pad, up - pad, right + pad, down + pad), fill=(250, 250, 245), outline=RED, width=max(1, size // 56))
    pen.text((x, top), word, fill=(15, 15, 15), font=font(height), anchor="mt")
    small = max(6, int(0.09 * size))
    for number, other in enumerate(others):
        place = (float(draw.uniform(0.05, 0.4)) * size, size * (0.72 + 0.14 * number))
        pen.rectangle(pen.textbbox(place, other, font=font(small)), fill=(250, 250, 245))
        pen.text(place, other, fill=(40, 40, 60), font=font(small))
    return picture, (left, up, right, down)
