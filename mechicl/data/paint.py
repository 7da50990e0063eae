"""Pictures of classes, many at once: distance fields warped, filled, coloured."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from mechicl.data.looks import INKS, N_CLASSES, TEXTURES, Layer, Look, look
from mechicl.data.strokes import EXTENT, distance
from mechicl.errors import OptionError

CHUNK = 512
"""Pictures painted at a time."""
EVERYWHERE = -1.0


def draw_pictures(
    class_ids: Sequence[int] | Int[np.ndarray, " n"], size: int, generator: np.random.Generator | int
) -> UInt8[np.ndarray, "n size size 3"]:
    """One fresh picture of every class asked for; about 0.1 ms each at 28 pixels once a class has been met.

    Args:
        class_ids: Ids below `N_CLASSES`, repeated at will.
        size: Side of the pictures, pixels.
        generator: A generator, or a seed. The same state gives the same pictures.

    Raises:
        OptionError: an id out of range, or a picture of fewer than 8 pixels.
    """
    ids = np.asarray(class_ids, dtype=np.int64)
    if ids.size and not (ids.min() >= 0 and ids.max() < N_CLASSES):
        raise OptionError(
            f"class_ids must be in 0..{N_CLASSES - 1}; got {int(ids.min())}..{int(ids.max())}. Take them from class_ids(split)."
        )
    if size < 8:
        raise OptionError(f"size must be at least 8 pixels; got {size}. Draw larger pictures.")
    draw = np.random.default_rng(generator)
    pictures = np.empty((len(ids), size, size, 3), dtype=np.uint8)
    for start in range(0, len(ids), max(1, CHUNK * 28 * 28 // (size * size))):
        stop = start + max(1, CHUNK * 28 * 28 // (size * size))
        pictures[start:stop] = paint(ids[start:stop], size, draw)
    return pictures


@torch.no_grad()
def paint(ids: Int[np.ndarray, " n"], size: int, draw: np.random.Generator) -> UInt8[np.ndarray, "n size size 3"]:
    """A chunk of pictures: place, background, parts, noise."""
    looks = [look(int(i)) for i in ids]
    n = len(looks)
    where, zoom = places(looks, size, draw)
    canvas = tensor(tint(INKS[[one.paper for one in looks]], draw))[:, None, None, :].expand(n, size, size, 3).clone()
    for level in range(max(len(one.layers) for one in looks)):
        rows = np.array([k for k, one in enumerate(looks) if len(one.layers) > level])
        layers = [looks[k].layers[level] for k in rows]
        points = where[rows]
        cover = coverage(ids[rows], level, layers, points, zoom[rows], size, draw)
        ink = paints(layers, points, draw)
        canvas[rows] = torch.lerp(canvas[rows], ink, cover[..., None])
    noise = draw.standard_normal(canvas.shape, dtype=np.float32) * draw.uniform(0, 9, (n, 1, 1, 1)).astype(np.float32)
    return (canvas + tensor(noise)).round_().clamp_(0, 255).to(torch.uint8).numpy()


def places(looks: Sequence[Look], size: int, draw: np.random.Generator) -> tuple[Float[Tensor, "n size size 2"], Float[np.ndarray, " n"]]:
    """Where every pixel falls on the class's own drawing board, and how large the drawing is in the picture (1: it fills it)."""
    n = len(looks)
    turn = draw.uniform(-1, 1, n) * np.array([one.turn for one in looks])
    zoom = draw.uniform(0.66, 0.94, n)
    aspect = np.exp(draw.uniform(-0.14, 0.14, n))
    slant = draw.uniform(-0.22, 0.22, n)
    shift = draw.uniform(-1, 1, (n, 2)) * (1.02 - zoom)[:, None]
    c, s = np.cos(turn), np.sin(turn)
    rotate = np.stack([np.stack([c, s], 1), np.stack([-s, c], 1)], 1)
    shear = np.zeros((n, 2, 2))
    shear[:, 0, 0], shear[:, 0, 1], shear[:, 1, 1] = 1 / aspect, slant, aspect
    inverse = shear @ rotate / zoom[:, None, None]
    axis = (np.arange(size) + 0.5) * 2 / size - 1
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    flat = grid @ inverse.transpose(0, 2, 1) - (inverse @ shift[:, :, None]).transpose(0, 2, 1)
    where = tensor(flat.reshape(n, size, size, 2))
    bumps = draw.normal(0, 1, (n, 2, 4, 4)) * draw.uniform(0, 0.085, (n, 1, 1, 1))
    bent = functional.interpolate(tensor(bumps), (size, size), mode="bicubic", align_corners=True)
    return where + bent.permute(0, 2, 3, 1), zoom


def coverage(
    ids: Int[np.ndarray, " n"],
    level: int,
    layers: Sequence[Layer],
    where: Float[Tensor, "n size size 2"],
    zoom: Float[np.ndarray, " n"],
    size: int,
    draw: np.random.Generator,
) -> Float[Tensor, "n size size"]:
    """How much of every pixel a part covers, 0 to 1: pens of varying width and softness."""
    fields = field_fine if size > 128 else field_middle if size > 64 else field_small
    boards = torch.from_numpy(np.stack([fields(int(i), level) for i in ids])).float()[:, None]
    far = functional.grid_sample(boards, where / EXTENT, mode="bilinear", padding_mode="border", align_corners=True)[:, 0]
    n = len(layers)
    pen = np.array([layer.width is not None for layer in layers])
    width = np.array([layer.width or 0.0 for layer in layers]) * np.exp(draw.uniform(-0.3, 0.4, n))
    pixel = 2 / size / zoom
    blurred = draw.random(n) < np.where(pen, 0.4, 0.1)
    soft = 0.6 * pixel + blurred * draw.uniform(0, 1, n) * np.where(pen, 0.22, 0.07)
    return ((tensor(width)[:, None, None] - far) / (2 * tensor(soft)[:, None, None]) + 0.5).clamp_(0, 1)


def paints(layers: Sequence[Layer], where: Float[Tensor, "n size size 2"], draw: np.random.Generator) -> Float[Tensor, "n _ _ 3"]:
    """The colour of a part at every pixel; one number where it is plain."""
    first = tensor(tint(INKS[[layer.ink for layer in layers]], draw))[:, None, None, :]
    second = tensor(tint(INKS[[layer.second for layer in layers]], draw))[:, None, None, :]
    phase = draw.uniform(0, 2 * np.pi, (len(layers), 2))
    rows = np.array([k for k, layer in enumerate(layers) if layer.texture])
    if not len(rows):
        return first
    blend = torch.zeros(where.shape[:3])
    blend[rows] = waves([layers[k] for k in rows], where[rows], phase[rows])
    return torch.lerp(first, second, blend[..., None])


def waves(layers: Sequence[Layer], where: Float[Tensor, "n size size 2"], phase: Float[np.ndarray, "n 2"]) -> Float[Tensor, "n size size"]:
    """Share of the second colour: stripes, waves, checks, dots, rings on the drawing board."""
    angle = np.array([layer.direction for layer in layers])
    pitch = tensor(np.array([layer.pitch for layer in layers]))[:, None, None]
    c, s = tensor(np.cos(angle))[:, None, None], tensor(np.sin(angle))[:, None, None]
    a, b = tensor(phase[:, 0])[:, None, None], tensor(phase[:, 1])[:, None, None]
    x, y = where[..., 0], where[..., 1]
    u, v = pitch * (c * x + s * y) + a, pitch * (c * y - s * x) + b
    kind = torch.tensor([layer.texture for layer in layers])
    value = torch.sin(u)
    for name, one in (
        ("waves", torch.sin(u + 1.3 * torch.sin(0.8 * v))),
        ("checks", 1.6 * torch.sin(u * 0.8) * torch.sin(v * 0.8)),
        ("dots", torch.cos(u) + torch.cos(v) - 0.6),
        ("rings", torch.sin(pitch * torch.sqrt(x * x + y * y + 1e-6) * 1.15 + a)),
    ):
        value = torch.where((kind == TEXTURES.index(name))[:, None, None], one, value)
    return (0.5 + 2.0 * value).clamp_(0, 1)


def tint(colours: Float[np.ndarray, "n 3"], draw: np.random.Generator) -> Float[np.ndarray, "n 3"]:
    """Colours as a camera sees them: brightness and balance vary."""
    n = len(colours)
    gain = draw.uniform(0.78, 1.04, (n, 1)) * draw.uniform(0.94, 1.06, (n, 3))
    return np.clip(colours * gain + draw.uniform(0, 22, (n, 1)), 0, 255)


def field(class_id: int, level: int, resolution: int) -> Float[np.ndarray, "y x"]:
    """The distance field of one part of a class."""
    layer = look(class_id).layers[level]
    if not layer.strokes:
        return np.full((2, 2), EVERYWHERE, dtype=np.float16).repeat(resolution // 2, 0).repeat(resolution // 2, 1)
    return distance(list(layer.strokes), resolution, filled=layer.width is None).astype(np.float16)


@lru_cache(maxsize=2 * N_CLASSES)
def field_small(class_id: int, level: int) -> np.ndarray:
    """For pictures up to 64 pixels."""
    return field(class_id, level, 48)


@lru_cache(maxsize=1024)
def field_middle(class_id: int, level: int) -> np.ndarray:
    """For pictures up to 128 pixels."""
    return field(class_id, level, 96)


@lru_cache(maxsize=128)
def field_fine(class_id: int, level: int) -> np.ndarray:
    """For larger pictures."""
    return field(class_id, level, 192)


def tensor(values: np.ndarray) -> Tensor:
    """As a float32 tensor."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
