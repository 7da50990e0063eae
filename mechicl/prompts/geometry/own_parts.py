"""Families whose processor has parts or tables of its own (their recipes: `own_parts` beside the tiny checkpoints)."""

from __future__ import annotations

import math

from mechicl.prompts.geometry.own_tokens import lines
from mechicl.prompts.geometry.picture import Boxes, Layout, Picture, cells, length, middle, resized, tiles
from mechicl.prompts.geometry.stretched import grid, square


def uncut_squares(picture: Picture) -> Boxes:
    """Inkling 2: cut into squares from the top left, as it is; the last ones of rows and columns are padded."""
    _, rows, cols = (int(v) for v in picture.inputs["image_grid_thw"][picture.index])
    tall, wide = length(picture.images.size, "height"), length(picture.images.size, "width")
    return cells(picture, (0.0, 0.0, float(cols * wide), float(rows * tall)), rows, cols)


def placed(picture: Picture) -> Boxes:
    """Gemma 4: stretched to whole pooled cells; image_position_ids holds the column and row of each patch (of each cell in the unified one), -1 is padding."""
    cols, rows = (int(v) + 1 for v in picture.inputs["image_position_ids"][picture.index].amax(0))
    pool = math.isqrt(rows * cols // max(picture.n_tokens, 1))
    return cells(picture, picture.whole, rows // pool, cols // pool) if pool else []


def pages(picture: Picture) -> Boxes:
    """Granite-Docling: stretched to whole tiles, tile by tile, then, if there are several, the whole picture small."""
    rows, cols = (int(v) for v in picture.images.get_tile_grid(picture.height, picture.width))
    several = rows * cols > 1
    side = math.isqrt(picture.n_tokens // (rows * cols + several))
    return tiles(picture, rows, cols, side) + (cells(picture, picture.whole, side, side) if several else [])


def coded(picture: Picture) -> Boxes:
    """Emu3: stretched to whole codes; image_sizes holds the pixels it was stretched to; a break after each row."""
    height, width = (int(v) // int(picture.processor.downsample_ratio) for v in picture.inputs["image_sizes"][picture.index])
    return lines(picture, picture.whole, height, width)


def coded_middle(picture: Picture) -> Boxes:
    """Chameleon: shorter side scaled to a fixed length, then the middle cut out; a square of codes."""
    images, side = picture.images, math.isqrt(picture.n_tokens)
    height, width = resized(images, float(picture.width), float(picture.height))
    crop = (length(images.crop_size, "width"), length(images.crop_size, "height")) if images.do_center_crop else (width, height)
    return cells(picture, middle(picture.whole, (width, height), crop), side, side)


def page(picture: Picture) -> Boxes:
    """GOT-OCR 2: the whole picture stretched to a square; nothing where it is cut into patches too."""
    side = math.isqrt(int(picture.processor.num_image_tokens))
    return cells(picture, picture.whole, side, side)


OWN_PARTS: dict[str, Layout] = {
    "inkling2": uncut_squares,
    "dots3_note": grid,
    "gemma4": placed,
    "gemma4_unified": placed,
    "gemma3n": square,
    "granite_docling": pages,
    "got_ocr2": page,
    "emu3": coded,
    "chameleon": coded_middle,
}
