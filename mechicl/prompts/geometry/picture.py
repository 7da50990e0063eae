"""A picture and its views: cells, tiles, and what resizing, padding and cropping make of its edges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mechicl.prompts.batch import Box

Boxes = list[Box | None]


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture of one prompt, and what the processor made of it.

    `width`, `height`: pixels. `n_tokens`: image tokens. `n_in_prompt`: pictures of the same prompt. `index`: its number over the batch. `inputs`: the
    processor's output.
    """

    width: int
    height: int
    n_tokens: int
    n_in_prompt: int
    index: int
    inputs: Mapping[str, Any]
    processor: Any
    config: Any

    @property
    def whole(self) -> Box:
        """The view that shows all of the picture and nothing else."""
        return (0.0, 0.0, float(self.width), float(self.height))

    @property
    def images(self) -> Any:
        """The image processor."""
        return self.processor.image_processor


def cells(picture: Picture, view: Box, rows: int, cols: int) -> Boxes:
    """The cells of a view, row by row, clipped to the picture; None for cells that show only padding."""
    left, top, right, bottom = view
    dx, dy = (right - left) / cols, (bottom - top) / rows
    boxes: Boxes = []
    for row in range(rows):
        for col in range(cols):
            x0, x1 = max(left + col * dx, 0.0), min(left + (col + 1) * dx, float(picture.width))
            y0, y1 = max(top + row * dy, 0.0), min(top + (row + 1) * dy, float(picture.height))
            boxes.append((x0, y0, x1, y1) if x1 - x0 > 1e-6 and y1 - y0 > 1e-6 else None)
    return boxes


def tiles(picture: Picture, rows: int, cols: int, side: int) -> Boxes:
    """Cells of rows x cols tiles that share the picture out between them, tile by tile, each side x side."""
    boxes: Boxes = []
    w, h = picture.width / cols, picture.height / rows
    for row in range(rows):
        for col in range(cols):
            boxes += cells(picture, (col * w, row * h, (col + 1) * w, (row + 1) * h), side, side)
    return boxes


def length(size: Any, *names: str) -> int:
    """The first of the named lengths that a size holds."""
    for name in names:
        value = size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)
        if value is not None:
            return int(value)
    return 0


def padded_square(picture: Picture) -> Box:
    """The view of a picture in the middle of a square as large as its longer side."""
    side = max(picture.width, picture.height)
    left, top = (side - picture.width) // 2, (side - picture.height) // 2
    return (float(-left), float(-top), float(side - left), float(side - top))


def resized(images: Any, width: float, height: float) -> tuple[int, int]:
    """(height, width) after a resize that keeps proportions by the shorter side, or to a fixed size."""
    if not images.do_resize:
        return int(height), int(width)
    short = length(images.size, "shortest_edge")
    if not short:
        return length(images.size, "height"), length(images.size, "width")
    if width <= height:
        return int(short * height / width), short
    return short, int(short * width / height)


def middle(view: Box, shown: tuple[int, int], crop: tuple[int, int]) -> Box:
    """The part of a view that is left when `crop` pixels are cut out of the middle of the `shown` ones (both width, height)."""
    edges = []
    for axis in (0, 1):
        scale = (view[axis + 2] - view[axis]) / shown[axis]
        lack = crop[axis] - shown[axis]
        start = -(lack // 2) if lack > 0 else int(-lack / 2.0)
        edges.append((view[axis] + start * scale, view[axis] + (start + crop[axis]) * scale))
    return (edges[0][0], edges[1][0], edges[0][1], edges[1][1])


Layout = Callable[[Picture], Boxes]
"""One box, or None, for each image token of a picture; empty where the family's geometry does not account for it."""
