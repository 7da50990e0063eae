"""The classes of `concepts`: their discrete parameters, their split, and what each looks like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int

from mechicl.data.strokes import FORMS, blob, glyph, symmetric
from mechicl.errors import OptionError

Kind = Literal["pen", "symmetric", "shape", "pair", "texture"]
Split = Literal["train", "held_out", "all"]

KINDS: tuple[str, ...] = get_args(Kind)
COUNTS: dict[str, int] = {"pen": 8192, "symmetric": 2048, "shape": 3072, "pair": 2560, "texture": 768}
N_CLASSES = sum(COUNTS.values())
HELD_OUT_SHARE = 5
"""One class in five is held out."""

INKS = np.array(
    [[225, 40, 40], [240, 140, 20], [235, 215, 40], [50, 170, 60], [40, 190, 200], [50, 90, 225], [150, 60, 200], [240, 120, 180],
     [10, 10, 12], [245, 245, 242], [120, 124, 130], [25, 35, 70]], dtype=np.float32,
)  # fmt: skip
"""Eight colours that stay apart under jitter, then black, white, grey and night blue."""
N_HUES, BLACK, WHITE, GREY, NIGHT = 8, 8, 9, 10, 11
FILLS = ("solid", "outline", "stripes", "checks", "dots", "rings")
LAYOUTS = ("inside", "side", "above", "corner")
WAVES: tuple[tuple[str, int], ...] = (
    *[("stripes", k) for k in range(4)],
    *[("waves", k) for k in range(4)],
    ("checks", 0),
    ("checks", 1),
    ("dots", 0),
    ("rings", 0),
)
"""Textures with their direction, in eighths of a turn."""
TEXTURES = ("solid", "stripes", "waves", "checks", "dots", "rings")
N_FORMS = 64
"""The named forms, then blobs."""
N_LAYERS = 2


@dataclass(frozen=True)
class Layer:
    """One part of a class. `width` is the half width of the pen; None: the strokes enclose a filled area; no strokes: the whole picture."""

    strokes: tuple[np.ndarray, ...]
    width: float | None
    ink: int
    second: int = BLACK
    texture: int = 0
    direction: float = 0.0
    pitch: float = 7.0


@dataclass(frozen=True)
class Look:
    """A class, ready to be painted: background, parts from back to front, and the largest random turn in radians."""

    paper: int
    layers: tuple[Layer, ...]
    turn: float


def mix(*numbers: int | np.ndarray) -> np.ndarray:
    """A 64-bit hash of integers, element by element (splitmix64)."""
    state = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for number in numbers:
            state = state + np.asarray(number).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def combinations(kind: str) -> Int[np.ndarray, "row parameter"]:
    """Every combination of a kind's discrete parameters, before `COUNTS` of them are taken."""
    if kind == "pen" or kind == "symmetric":  # one skeleton is one class, whatever its ink
        return np.arange(COUNTS[kind])[:, None]
    sides = {
        "shape": (N_FORMS, len(FILLS), N_HUES),
        "pair": (len(FORMS), len(FORMS), N_HUES, N_HUES, len(LAYOUTS)),
        "texture": (len(WAVES), WHITE + 1, WHITE + 1, 2),
    }[kind]
    rows = np.stack(np.unravel_index(np.arange(int(np.prod(sides))), sides), 1)
    if kind == "pair":
        rows = rows[rows[:, 2] != rows[:, 3]]
    if kind == "texture":  # two colours in either order are one texture
        rows = rows[rows[:, 1] < rows[:, 2]]
    return rows


@lru_cache(maxsize=1)
def signatures() -> Int[np.ndarray, "cls parameter"]:
    """The signature of every class: its kind's number, then up to five discrete parameters, -1 where a kind has fewer. No two are alike.

    pen, symmetric: skeleton. shape: form, fill, colour. pair: two forms, their colours, layout. texture: wave, two colours, fineness.
    """
    blocks = []
    for number, kind in enumerate(KINDS):
        rows = combinations(kind)
        rows = rows[np.argsort(mix(number, np.arange(len(rows))), kind="stable")][: COUNTS[kind]]
        block = np.full((len(rows), 6), -1, dtype=np.int64)
        block[:, 0], block[:, 1 : 1 + rows.shape[1]] = number, rows
        blocks.append(block)
    return np.concatenate(blocks)


@lru_cache(maxsize=1)
def held_out() -> np.ndarray:
    """For every class whether it is held out: a hash of its signature, and of nothing else."""
    rows = signatures()
    return mix(*[rows[:, k] for k in range(rows.shape[1])]) % np.uint64(HELD_OUT_SHARE) == 0


def class_ids(split: Split = "held_out", *, kinds: Sequence[str] | None = None) -> Int[np.ndarray, " n"]:
    """Ids of all classes of a split, optionally of some kinds only.

    Raises:
        OptionError: the split or a kind does not exist.
    """
    if split not in get_args(Split):
        raise OptionError(f"split must be 'train', 'held_out' or 'all'; got {split!r}. Pick one of them.")
    unknown = [kind for kind in kinds or () if kind not in KINDS]
    if unknown or (kinds is not None and not kinds):
        raise OptionError(f"kinds must be some of {', '.join(KINDS)}; got {list(kinds or ())}. Pick among them, or None for all.")
    wanted = np.ones(N_CLASSES, dtype=bool) if split == "all" else held_out() == (split == "held_out")
    if kinds is not None:
        wanted = wanted & np.isin(signatures()[:, 0], [KINDS.index(kind) for kind in kinds])
    return np.flatnonzero(wanted)


def kind_of(class_id: int) -> str:
    """The kind of a class: "pen", "symmetric", "shape", "pair" or "texture"."""
    return KINDS[int(signatures()[class_id, 0])]


@lru_cache(maxsize=4096)
def look(class_id: int) -> Look:
    """What a class looks like; follows from its signature alone."""
    kind, *parameters = (int(v) for v in signatures()[class_id])
    draw = np.random.default_rng([7, kind, *(p + 1 for p in parameters)])
    paint = {"pen": pen_look, "symmetric": symmetric_look, "shape": shape_look, "pair": pair_look, "texture": texture_look}[KINDS[kind]]
    return paint(draw, *parameters)


def pen_look(draw: np.random.Generator, *_: int) -> Look:
    """A sign: white on black (half of them), black on white, or colour on a background."""
    style = draw.random()
    if style < 0.5:
        ink, paper = WHITE, BLACK
    elif style < 0.75:
        ink, paper = BLACK, WHITE
    else:
        ink, paper = int(draw.integers(N_HUES)), int(draw.choice([BLACK, WHITE, NIGHT]))
    return Look(paper, (Layer(tuple(glyph(draw)), float(draw.uniform(0.1, 0.19)), ink),), turn=0.22)


def symmetric_look(draw: np.random.Generator, *_: int) -> Look:
    """A coloured sign with a mirror line or a turn that leaves it as it is."""
    folds = int(draw.choice([1, 2, 3, 5, 6], p=[0.5, 0.15, 0.15, 0.1, 0.1]))  # four hooked arms could look like a swastika
    ink = int(draw.integers(N_HUES + 2))
    paper = int(draw.choice({BLACK: [WHITE, GREY], WHITE: [BLACK, NIGHT]}.get(ink, [BLACK, WHITE, GREY, NIGHT])))
    return Look(paper, (Layer(tuple(symmetric(draw, folds)), float(draw.uniform(0.09, 0.15)), ink),), turn=0.2)


def shape_look(draw: np.random.Generator, number: int, fill: int, ink: int, *_: int) -> Look:
    """One coloured form, solid, outlined or with a texture in a second colour."""
    second = int(draw.choice([(ink + 4) % N_HUES, (ink + 2) % N_HUES, WHITE, BLACK]))
    paper = int(draw.choice({BLACK: [WHITE, GREY], WHITE: [BLACK, NIGHT]}.get(second, [BLACK, WHITE, GREY, NIGHT])))
    texture = TEXTURES.index(FILLS[fill]) if FILLS[fill] in TEXTURES else 0
    width = 0.16 if FILLS[fill] == "outline" else None
    layer = Layer((form(number),), width, ink, second, texture, float(draw.integers(4)) * np.pi / 4, float(draw.uniform(7.0, 8.5)))
    return Look(paper, (layer,), turn=0.3)


def pair_look(draw: np.random.Generator, first: int, other: int, ink: int, second: int, layout: int) -> Look:
    """Two forms of two colours in a fixed arrangement."""
    (x, y, size), (u, v, small) = {
        "inside": ((0.0, 0.0, 1.05), (0.0, 0.0, 0.5)),
        "side": ((-0.52, 0.0, 0.55), (0.52, 0.0, 0.55)),
        "above": ((0.0, -0.52, 0.55), (0.0, 0.52, 0.55)),
        "corner": ((-0.22, -0.22, 0.78), (0.6, 0.6, 0.42)),
    }[LAYOUTS[layout]]
    paper = int(draw.choice([BLACK, WHITE, GREY, NIGHT]))
    layers = (Layer((form(first) * size + [x, y],), None, ink), Layer((form(other) * small + [u, v],), None, second))
    return Look(paper, layers, turn=0.15)


def texture_look(draw: np.random.Generator, wave: int, ink: int, second: int, fineness: int, *_: int) -> Look:
    """A picture that is texture all over."""
    name, direction = WAVES[wave]
    layer = Layer((), None, ink, second, TEXTURES.index(name), direction * np.pi / 4, (4.5, 8.0)[fineness])
    return Look(ink, (layer,), turn=0.15)


@lru_cache(maxsize=N_FORMS)
def form(number: int) -> np.ndarray:
    """A closed form: the named ones first, then blobs."""
    return list(FORMS.values())[number] if number < len(FORMS) else blob(np.random.default_rng([11, number]))
