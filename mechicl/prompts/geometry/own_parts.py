"""Families whose processor has parts or tables of its own (their recipes: `own_parts` beside the tiny checkpoints)."""

from __future__ import annotations

import math

from mechicl.prompts.geometry.picture import Boxes, Layout, Picture, cells, length, tiles
from mechicl.prompts.geometry.stretched import grid


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


OWN_PARTS: dict[str, Layout] = {
    "inkling2": uncut_squares,
    "dots3_note": grid,
    "gemma4": placed,
    "gemma4_unified": placed,
    "granite_docling": pages,
}
