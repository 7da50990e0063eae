"""Families that show a picture several times: the whole of it small, and tiles or crops of it."""

from __future__ import annotations

import math
from typing import Any

from mechicl.prompts.geometry.picture import Boxes, Layout, Picture, cells, length, padded_square, tiles
from mechicl.prompts.geometry.stretched import class_tokens


def llava_next(picture: Picture) -> Boxes:
    """LLaVA-NeXT: the whole picture small, then the picture in tiles with its padding cut off again and a break after each row."""
    base = length(picture.images.size, "shortest_edge", "height")
    side = base // int(picture.processor.patch_size)
    return class_tokens(picture.processor) + cells(picture, picture.whole, side, side) + anyres(picture, base, side, None)


def llava_onevision(picture: Picture) -> Boxes:
    """LLaVA-OneVision: as LLaVA-NeXT, with large grids shrunk; among several pictures only a small one, padded to a square, and a break."""
    base = length(picture.images.size, "height", "shortest_edge")
    side = math.isqrt(int(picture.processor.num_image_tokens))
    if picture.n_in_prompt > 1:
        return [*cells(picture, padded_square(picture), side, side), None]
    most = str(picture.processor.vision_aspect_ratio).removeprefix("anyres_max_")
    return cells(picture, picture.whole, side, side) + anyres(picture, base, side, int(most) if most.isdigit() else None)


def anyres(picture: Picture, base: int, side: int, most: int | None) -> Boxes:
    """Tiles of `base` pixels and side x side tokens on the best canvas; rows end in a break. Beyond 1.1 * sqrt(most) tiles the grid is shrunk."""
    height, width = best_canvas(picture, picture.images.image_grid_pinpoints)
    shown_width, shown_height = canvas_share(picture, width, height)
    left, top = (width - shown_width) // 2, (height - shown_height) // 2
    rows, cols = side * (height // base), side * (width // base)
    dx, dy = 0, 0
    if picture.width / picture.height > cols / rows:
        dy = (rows - int(round(picture.height * (cols / picture.width), 7))) // 2
    else:
        dx = (cols - int(round(picture.width * (rows / picture.height), 7))) // 2
    cell = base / side
    x_scale, y_scale = shown_width / picture.width, shown_height / picture.height
    view = (
        (dx * cell - left) / x_scale,
        (dy * cell - top) / y_scale,
        ((cols - dx) * cell - left) / x_scale,
        ((rows - dy) * cell - top) / y_scale,
    )
    rows, cols = rows - 2 * dy, cols - 2 * dx
    if most is not None:
        ratio = math.sqrt(rows * cols / (most * side**2))
        if ratio > 1.1:
            rows, cols = int(rows // ratio), int(cols // ratio)
    flat = cells(picture, view, rows, cols)
    return [box for row in range(rows) for box in [*flat[row * cols : (row + 1) * cols], None]]


def internvl(picture: Picture) -> Boxes:
    """InternVL: stretched onto the grid of tiles closest in shape, tile by tile, then the whole picture small."""
    side = math.isqrt(int(picture.processor.image_seq_length))
    if picture.n_tokens == side * side:
        return cells(picture, picture.whole, side, side)
    rows, cols = tile_grid(picture)
    return tiles(picture, rows, cols, side) + cells(picture, picture.whole, side, side)


def idefics(picture: Picture) -> Boxes:
    """Idefics3, SmolVLM: stretched to whole tiles, tile by tile, then the whole picture small."""
    side = math.isqrt(int(picture.processor.image_seq_len))
    if picture.n_tokens == side * side:
        return cells(picture, picture.whole, side, side)
    _, rows, cols = picture.images.get_number_of_image_patches(picture.height, picture.width, {})
    return tiles(picture, int(rows), int(cols), side) + cells(picture, picture.whole, side, side)


def gemma(picture: Picture) -> Boxes:
    """Gemma 3: the whole picture stretched to a square, then pan-and-scan crops along the longer side where these are on."""
    side = math.isqrt(int(picture.processor.image_seq_length))
    boxes = cells(picture, picture.whole, side, side)
    crops = picture.n_tokens // (side * side) - 1
    wide = picture.width >= picture.height
    long = math.ceil((picture.width if wide else picture.height) / max(crops, 1))
    for k in range(crops):
        start, stop = k * long, min((k + 1) * long, picture.width if wide else picture.height)
        view = (start, 0, stop, picture.height) if wide else (0, start, picture.width, stop)
        boxes += cells(picture, (float(view[0]), float(view[1]), float(view[2]), float(view[3])), side, side)
    return boxes


def best_canvas(picture: Picture, options: Any) -> tuple[int, int]:
    """(height, width) of the canvas on which the picture keeps most of its pixels and wastes least."""

    def worth(option: Any) -> tuple[int, int]:
        height, width = option
        scale = min(width / picture.width, height / picture.height)
        kept = min(int(picture.width * scale) * int(picture.height * scale), picture.width * picture.height)
        return kept, kept - int(width) * int(height)

    height, width = max(options, key=worth)
    return int(height), int(width)


def canvas_share(picture: Picture, width: int, height: int) -> tuple[int, int]:
    """(width, height) that the picture takes up on a canvas."""
    if width / picture.width < height / picture.height:
        return width, min(math.ceil(picture.height * (width / picture.width)), height)
    return min(math.ceil(picture.width * (height / picture.height)), width), height


def tile_grid(picture: Picture) -> tuple[int, int]:
    """(rows, cols) of InternVL's tiles: the closest shape; of equals the larger as long as it is not above twice the picture's area."""
    low, high = int(picture.images.min_patches), int(picture.images.max_patches)
    area = length(picture.images.size, "height") * length(picture.images.size, "width")
    shapes = [(c, r) for c in range(1, high + 1) for r in range(1, high + 1) if low <= c * r <= high]
    best, closest = (1, 1), math.inf
    for cols, rows in sorted(shapes, key=lambda s: s[0] * s[1]):
        off = abs(picture.width / picture.height - cols / rows)
        if off < closest or (off == closest and picture.width * picture.height > 0.5 * area * cols * rows):
            best, closest = (cols, rows), off
    return best[1], best[0]


TILED: dict[str, Layout] = {
    **dict.fromkeys(("llava_next", "llava_next_video"), llava_next),
    "llava_onevision": llava_onevision,
    **dict.fromkeys(("internvl", "qianfan_ocr"), internvl),
    **dict.fromkeys(("idefics3", "smolvlm"), idefics),
    **dict.fromkeys(("gemma3", "shieldgemma2"), gemma),
}
