"""Shapes as lists of points, and how far every pixel is from them.

Everything is drawn in the square [-1, 1] x [-1, 1], x to the right, y downwards.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

Stroke = Float[np.ndarray, "_ 2"]

EXTENT = 1.5
"""Distance fields cover [-EXTENT, EXTENT] in x and y."""


def polygon(n: int, *, turn: float = 0.0, inner: float | None = None) -> Stroke:
    """A regular polygon of radius 0.9, or with `inner` a star whose n dents have that share of the radius. Closed."""
    corners = n if inner is None else 2 * n
    angle = np.linspace(0, 2 * np.pi, corners + 1) - np.pi / 2 + turn
    radius = np.full(corners + 1, 0.9)
    if inner is not None:
        radius[1::2] *= inner
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def heart() -> Stroke:
    """A heart."""
    t = np.linspace(0, 2 * np.pi, 25)
    x = 0.9 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 17
    return np.stack([x, y], 1)


def crescent() -> Stroke:
    """A moon."""
    t = np.linspace(0.25 * np.pi, 1.75 * np.pi, 14)
    outer = 0.9 * np.stack([np.cos(t), np.sin(t)], 1)
    s = np.linspace(1.62 * np.pi, 0.38 * np.pi, 10)
    inside = np.stack([0.25 + 0.68 * np.cos(s), 0.68 * np.sin(s)], 1)
    return np.concatenate([outer, inside, outer[:1]])


def corners(*points: tuple[float | int, float | int]) -> Stroke:
    """A closed polygon through the points."""
    return np.array([*points, points[0]], dtype=np.float64)


def drop() -> Stroke:
    """A drop of water."""
    t = np.linspace(-0.15 * np.pi, 1.15 * np.pi, 16)
    disc = np.stack([0.6 * np.cos(t), 0.28 + 0.6 * np.sin(t)], 1)
    return np.concatenate([disc, [[0.0, -0.95]], disc[:1]])


FORMS: dict[str, Stroke] = {
    "disc": polygon(24),
    "square": polygon(4, turn=np.pi / 4),
    "triangle": polygon(3),
    "pentagon": polygon(5),
    "hexagon": polygon(6, turn=np.pi / 6),
    "diamond": corners((0, -0.95), (0.55, 0), (0, 0.95), (-0.55, 0)),
    "star4": polygon(4, inner=0.38),
    "star5": polygon(5, inner=0.42),
    "star8": polygon(8, inner=0.6),
    "heart": heart(),
    "crescent": crescent(),
    "drop": drop(),
    "half": np.concatenate([0.9 * np.stack([np.cos(t := np.linspace(0, np.pi, 14)), np.sin(t) - 0.4], 1), [[0.9, -0.36]]]),
    "plus": corners(*[(a * 0.9, b * 0.9) for a, b in ((-.33, -1), (.33, -1), (.33, -.33), (1, -.33), (1, .33), (.33, .33), (.33, 1), (-.33, 1), (-.33, .33), (-1, .33), (-1, -.33), (-.33, -.33))]),
    "arrow": corners((0, -0.95), (0.8, 0.0), (0.3, 0.0), (0.3, 0.9), (-0.3, 0.9), (-0.3, 0.0), (-0.8, 0.0)),
    "ell": corners((-0.7, -0.9), (-0.1, -0.9), (-0.1, 0.3), (0.8, 0.3), (0.8, 0.9), (-0.7, 0.9)),
    "tee": corners((-0.85, -0.85), (0.85, -0.85), (0.85, -0.3), (0.28, -0.3), (0.28, 0.9), (-0.28, 0.9), (-0.28, -0.3), (-0.85, -0.3)),
    "bolt": corners((0.2, -0.95), (-0.6, 0.15), (-0.05, 0.15), (-0.25, 0.95), (0.6, -0.2), (0.05, -0.2)),
    "bar": corners((-0.95, -0.3), (0.95, -0.3), (0.95, 0.3), (-0.95, 0.3)),
    "wedge": corners((-0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
}  # fmt: skip
"""Closed forms with a name."""


def blob(draw: np.random.Generator) -> Stroke:
    """A smooth closed form of its own: a circle with a few waves in its radius."""
    angle = np.linspace(0, 2 * np.pi, 37)
    waves = np.arange(2, 6)
    size = draw.uniform(0.1, 0.34, 4) / np.sqrt(waves - 1)
    phase = draw.uniform(0, 2 * np.pi, 4)
    radius = 1 + (size[:, None] * np.cos(waves[:, None] * angle + phase[:, None])).sum(0)
    return fit(np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1), 0.95)


def glyph(draw: np.random.Generator) -> list[Stroke]:
    """A sign made of one to three pen strokes, like a letter of an alphabet nobody has."""
    lone = draw.random() < 0.15  # one stroke only, then an involved one: a lone circle or bow would look like many others
    strokes = [pen(draw, draw.uniform(-0.6, 0.6, 2), kinds=(4,) if lone else (0, 1, 2, 3, 4))]
    for _ in range(0 if lone else int(draw.choice([1, 2], p=[0.6, 0.4]))):
        anchor = strokes[int(draw.integers(len(strokes)))]
        start = anchor[int(draw.integers(len(anchor)))] if draw.random() < 0.75 else draw.uniform(-0.8, 0.8, 2)
        strokes.append(pen(draw, start))
    return fit_all(strokes, draw)


def pen(draw: np.random.Generator, start: Float[np.ndarray, " xy"], *, kinds: tuple[int, ...] = (0, 1, 2, 3, 4)) -> Stroke:
    """One stroke of the pen: a straight line (0), an arc (1), a loop (2), a hook (3) or a wandering curve (4)."""
    weights = np.array([0.2, 0.25, 0.15, 0.15, 0.25])[list(kinds)]
    kind = draw.choice(kinds, p=weights / weights.sum())
    n = 16 if kind else 2
    heading = draw.uniform(0, 2 * np.pi)
    length = draw.uniform(0.9, 1.8)
    if kind == 0:
        bend = np.zeros(n)
    elif kind == 1:
        bend = np.full(n, draw.choice([-1, 1]) * draw.uniform(0.7, 1.5) * np.pi)
    elif kind == 2:
        bend, length = np.full(n, draw.choice([-1, 1]) * draw.uniform(1.8, 2.1) * np.pi), draw.uniform(1.8, 3.0)
    elif kind == 3:
        bend = np.where(np.arange(n) < n * draw.uniform(0.4, 0.7), 0.0, draw.choice([-1, 1]) * draw.uniform(1.5, 3.0) * np.pi)
    else:
        bend, length = np.interp(np.linspace(0, 1, n), [0, 0.33, 0.67, 1], draw.normal(0, 2 * np.pi, 4)), draw.uniform(1.5, 2.8)
    angle = heading + np.cumsum(bend) / n
    steps = length / n * np.stack([np.cos(angle), np.sin(angle)], 1)
    return np.concatenate([start[None], start + np.cumsum(steps, 0)])


def symmetric(draw: np.random.Generator, folds: int) -> list[Stroke]:
    """A sign that is its own mirror image (folds = 1) or turns into itself after a `folds`-th of a circle."""
    part = pen(draw, draw.uniform(-0.2, 0.5, 2) if folds == 1 else draw.uniform(0.1, 0.35, 2))
    parts = [part, pen(draw, part[int(draw.integers(len(part)))])]
    if folds == 1:
        every = [*parts, *[p * [-1, 1] for p in parts]]
    else:
        every = [p @ turned(2 * np.pi * k / folds) for k in range(folds) for p in parts[: 2 if folds < 5 else 1]]
    return fit_all(every, draw, square=True)


def turned(angle: float) -> Float[np.ndarray, "2 2"]:
    """The matrix that turns row vectors by an angle, radians."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, s], [-s, c]])


def fit(points: Stroke, radius: float) -> Stroke:
    """Centred and scaled so that the larger side is 2 * radius."""
    low, high = points.min(0), points.max(0)
    return (points - (low + high) / 2) * (2 * radius / max(float((high - low).max()), 1e-6))


def fit_all(strokes: list[Stroke], draw: np.random.Generator, *, square: bool = False) -> list[Stroke]:
    """Strokes centred and scaled together into the square; sides are stretched apart by at most 1.6, so that thin signs stay thin."""
    every = np.concatenate(strokes)
    low, high = every.min(0), every.max(0)
    side = np.maximum(high - low, 1e-6)
    longest = side.max()
    goal = np.full(2, longest) if square else np.minimum(longest, side * 1.6)
    scale = 1.8 / longest * (np.ones(2) if square else goal / side)
    return [(s - (low + high) / 2) * scale for s in strokes]


def distance(strokes: list[Stroke], resolution: int, *, filled: bool = False) -> Float[np.ndarray, "y x"]:
    """Distance of every grid point to the nearest stroke; with `filled`, negative inside the closed strokes (even-odd rule).

    Args:
        strokes: Points in [-1, 1].
        resolution: Grid points per side; they cover [-EXTENT, EXTENT].
        filled: Whether the strokes enclose something.
    """
    axis = np.linspace(-EXTENT, EXTENT, resolution, dtype=np.float32)
    a = np.concatenate([s[:-1] for s in strokes]).astype(np.float32)
    b = np.concatenate([s[1:] for s in strokes]).astype(np.float32)
    along = b - a
    square = np.maximum((along**2).sum(1), 1e-9)
    x, y = axis[None, None, :], axis[None, :, None]
    px, py = x - a[:, 0, None, None], y - a[:, 1, None, None]  # [segment, 1, x], [segment, y, 1]
    dx, dy = along[:, 0, None, None], along[:, 1, None, None]
    t = np.clip((px * dx + py * dy) / square[:, None, None], 0, 1)
    nearest = np.sqrt(((px - t * dx) ** 2 + (py - t * dy) ** 2).min(0))
    if not filled:
        return nearest
    crosses = (a[:, 1, None, None] > y) != (b[:, 1, None, None] > y)
    with np.errstate(divide="ignore", invalid="ignore"):
        where = a[:, 0, None, None] + (y - a[:, 1, None, None]) * dx / dy
    inside = (crosses & (x < where)).sum(0) % 2 == 1
    return np.where(inside, -nearest, nearest)
