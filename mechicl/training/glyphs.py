"""Pen-stroke glyphs: endless made-up characters, as training pictures beside the concepts, so that real handwriting is less foreign.

A class is a smooth pen path through a few random points, sometimes with a second stroke or closed to a loop; an instance is that path jittered,
sheared, turned, thickened, blurred or reduced to 8 x 8 grey cells, and coloured. Nothing here has seen a real digit.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Generator, Tensor

HELD_OUT = 1 << 40
"""Class ids from here on are never drawn in training."""

POINTS = 6
"""Points that the main stroke passes through."""

SAMPLES = 7
"""Dots per stretch between two points."""

CELLS = 24
"""Side of the grid on which strokes are drawn, before it is scaled to the picture."""

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def hash_uniform(ids: Int[Tensor, " n"], k: int, *, salt: int = 0) -> Float[Tensor, "n k"]:
    """k numbers in [0, 1) for each id, always the same ones (splitmix64): a class needs no stored parameters.

    Source:
        Steele, Lea, Flood 2014 (the mixing function of SplitMix64).
    """

    def shift(z: Tensor, by: int) -> Tensor:  # logical, not arithmetic
        return (z >> by) & ((1 << (64 - by)) - 1)

    z = ids.long()[:, None] * 1_000_003 + torch.arange(k)[None] + salt * 7_919
    z = z * GOLDEN
    z = (z ^ shift(z, 30)) * MIX[0]
    z = (z ^ shift(z, 27)) * MIX[1]
    z = z ^ shift(z, 31)
    return shift(z, 40).float() / (1 << 24)


def pen_paths(ids: Int[Tensor, " n"], jitter: Float[Tensor, "n points xy"]) -> Float[Tensor, "n dots xy"]:
    """Dots along each class's strokes in [-1, 1]; `jitter` moves the points that the strokes pass through."""
    n = len(ids)
    kind = hash_uniform(ids, 4, salt=1)
    points = hash_uniform(ids, 2 * (POINTS + 3), salt=2).view(n, POINTS + 3, 2) * 2 - 1
    main, second = points[:, :POINTS].clone(), points[:, POINTS:].clone()
    last = (3 + (kind[:, 0] * (POINTS - 2)).long()).clamp(max=POINTS) - 1  # 3 to POINTS points
    steps = torch.arange(POINTS).expand(n, POINTS)
    main = main.gather(1, torch.minimum(steps, last[:, None])[..., None].expand(-1, -1, 2))
    closed = kind[:, 1] < 0.25
    main[closed, last[closed]] = main[closed, 0]
    main = torch.where((steps > last[:, None])[..., None], main.gather(1, last[:, None, None].expand(-1, POINTS, 2)), main)
    alone = kind[:, 2] < 0.55
    anchor = main[:, :1].expand(-1, 3, -1)
    second = torch.where(alone[:, None, None], anchor, second)
    strokes = torch.cat([main, second], 1) + jitter * (~alone | True)[:, None, None]
    strokes = torch.where((torch.arange(POINTS + 3)[None] >= POINTS)[..., None] & alone[:, None, None], strokes[:, :1], strokes)
    return torch.cat([smooth(strokes[:, :POINTS]), smooth(strokes[:, POINTS:])], 1)


def smooth(points: Float[Tensor, "n points xy"]) -> Float[Tensor, "n dots xy"]:
    """Catmull-Rom spline through the points, SAMPLES dots a stretch.

    Source:
        Catmull and Rom 1974.
    """
    padded = torch.cat([2 * points[:, :1] - points[:, 1:2], points, 2 * points[:, -1:] - points[:, -2:-1]], 1)
    a, b, c, d = (padded[:, i : padded.shape[1] - 3 + i, None] for i in range(4))
    t = (torch.arange(SAMPLES) / SAMPLES)[None, None, :, None]
    dots = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    return torch.cat([dots.flatten(1, 2), points[:, -1:]], 1)


def draw_strokes(
    ids: Int[Tensor, " n"], generator: Generator, *, spread: Float[Tensor, " n"], width: Float[Tensor, " n"]
) -> Float[Tensor, "n 1 cells cells"]:
    """Ink in [0, 1] of one fresh instance per id.

    Args:
        ids: Class ids.
        generator: Source of the variation between instances.
        spread: How much an instance differs from its class, 1 for a careless hand.
        width: Half the width of the pen, in half pictures; instances vary by a fifth around it.
    """
    n = len(ids)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    dots = pen_paths(ids, 0.09 * spread[:, None, None] * normal(n, POINTS + 3, 2))
    low, high = dots.amin(1, keepdim=True), dots.amax(1, keepdim=True)
    dots = dots - (low + high) / 2
    extent = (high - low).amax(-1, keepdim=True).clamp(min=0.5)
    dots = dots * (1.5 / extent)
    turn, shear = 0.15 * spread * normal(n), 0.25 * spread * normal(n)
    scale = 1 + 0.12 * spread[:, None] * normal(n, 2).clamp(-2, 2)
    cos, sin = turn.cos(), turn.sin()
    matrix = torch.stack([torch.stack([cos, sin + shear], -1), torch.stack([-sin, cos], -1)], -2) * scale[:, None]
    dots = dots @ matrix + 0.08 * spread[:, None, None] * normal(n, 1, 2)
    axis = (torch.arange(CELLS) + 0.5) / CELLS * 2 - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).flip(-1).reshape(1, -1, 2).expand(n, -1, -1)
    distance = torch.cdist(grid, dots).amin(-1)
    thick = (width * (1 + 0.2 * normal(n).clamp(-2, 2)))[:, None]
    edge = (0.03 + 0.05 * torch.rand(n, generator=generator))[:, None]
    return ((thick - distance) / edge + 0.5).clamp(0, 1).view(n, 1, CELLS, CELLS)


def draw_glyphs(
    ids: Int[Tensor, " n"], size: int, generator: Generator, *, group: int = 1, spread: tuple[float, float] = (0.3, 1.1)
) -> UInt8[Tensor, "n 3 size size"]:
    """Pictures of glyphs, one fresh instance per id.

    Args:
        ids: Class ids, below HELD_OUT for training.
        size: Side of the pictures, pixels.
        generator: Source of the variation between instances.
        group: Consecutive pictures (an episode) that share colours, pen, care, sharpness and polarity, as one source of pictures would.
        spread: Least and most that instances of a group differ.

    Returns:
        RGB, 0 to 255.
    """
    n = len(ids)
    groups = math.ceil(n / group)
    shared = torch.arange(n) // group

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    care = spread[0] + (spread[1] - spread[0]) * uniform(groups)
    ink = draw_strokes(ids, generator, spread=care[shared], width=(0.08 + 0.12 * uniform(groups))[shared])
    reduced = F.avg_pool2d(ink, 3)
    mode = ("bilinear", "bicubic", "nearest")[int(3 * uniform(1).item())]
    coarse = F.interpolate(reduced, size=(size, size), mode=mode)
    fine = F.interpolate(ink, size=(size, size), mode="bilinear", antialias=size < CELLS)
    ink = torch.where((uniform(groups) < 0.5)[shared, None, None, None], coarse, fine).clamp(0, 1)
    paper = uniform(groups, 3)
    paper = torch.where(uniform(groups, 1) < 0.7, (uniform(groups, 1) < 0.5).float().expand(-1, 3), paper)
    contrast = (0.4 + 1.2 * uniform(groups, 1)).clamp(max=1)
    target = torch.where(paper.mean(-1, keepdim=True) < 0.5, 1.0, 0.0)
    pen = paper + (target - paper) * contrast + 0.15 * (uniform(groups, 3) - 0.5) * (uniform(groups, 1) < 0.4)
    paper, pen = paper[shared, :, None, None], pen[shared, :, None, None]
    colour = paper + (pen - paper) * ink
    noise = (0.08 * uniform(groups) - 0.03).clamp(min=0)[shared, None, None, None]
    return ((colour + noise * torch.randn(n, 3, size, size, generator=generator)).clamp(0, 1) * 255).round().to(torch.uint8)
