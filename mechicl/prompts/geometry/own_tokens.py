"""Families whose processor counts or writes a picture's tokens in a way of its own (their recipes: `own_tokens` beside the tiny checkpoints)."""

from __future__ import annotations

import math

from mechicl.prompts.batch import Box
from mechicl.prompts.geometry.picture import Boxes, Layout, Picture, cells, length
from mechicl.prompts.geometry.stretched import grid, llava, square


def rows_of_patches(picture: Picture) -> Boxes:
    """Nemotron-H Omni: stretched to a grid of patches; a token merges a square of them."""
    rows, cols = (int(v) for v in picture.inputs["image_grid_hw"][picture.index])
    merge = round(1 / float(picture.images.downsample_ratio))
    return cells(picture, picture.whole, rows // merge, cols // merge)


def shrunk_and_padded(picture: Picture) -> Boxes:
    """Kimi K2.5: shrunk, never enlarged, until it has few enough patches; then padded on the right and below to whole merged patches."""
    images, patch = picture.images, int(picture.images.patch_size)
    _, rows, cols = (int(v) for v in picture.inputs["image_grid_thw"][picture.index])
    most = length(images.size, "max_height") * patch
    area = max(1.0, picture.height // patch) * max(1.0, picture.width // patch)
    scale = min(1.0, math.sqrt(int(images.max_patches) / area), most / picture.height, most / picture.width) if images.do_resize else 1.0
    shown = [min(max(1, int(side * scale)), most) for side in (picture.width, picture.height)]
    view = (0.0, 0.0, cols * patch * picture.width / shown[0], rows * patch * picture.height / shown[1])
    merge = int(images.merge_size)
    return cells(picture, view, rows // merge, cols // merge)


def uncut(picture: Picture) -> Boxes:
    """Inkling: scaled by a factor where it has one, cut into squares from the top left; the last ones of rows and columns are padded (a column may be all padding)."""
    images, side = picture.images, length(picture.images.size, "height")
    long = max(picture.width, picture.height)
    target = long if images.rescale_image_frac is None else long * images.rescale_image_frac
    if images.rescale_image_max_upscaled_long_edge is not None:
        target = min(target, max(images.rescale_image_max_upscaled_long_edge, long))
    width, height = (math.floor(v * target / long + 0.5) for v in (picture.width, picture.height))
    rows, cols = -(-height // side), width // side + 1
    return cells(picture, (0.0, 0.0, cols * side * picture.width / width, rows * side * picture.height / height), rows, cols)


def windows(picture: Picture) -> Boxes:
    """Step 3.7: tiles of a stretched picture, if it is large or long, then the whole stretched to a square."""
    images = picture.images
    base, tile = length(images.size, "height"), int(images.patch_size)
    stride = int(images.vision_patch_size) * int(images.downsampler_stride)
    width, height = picture.width, picture.height
    if min(width, height) < 32 and max(width, height) > 4 * min(
        width, height
    ):  # a strip is padded to a square, itself in its top left corner
        width = height = max(width, height)
    rows, cols = window_grid(width, height, base, tile, int(images.max_image_size))
    boxes: Boxes = []
    for row in range(rows):
        for col in range(cols):
            part = (col * width / cols, row * height / rows, (col + 1) * width / cols, (row + 1) * height / rows)
            boxes += cells(picture, part, tile // stride, tile // stride)
    return boxes + cells(picture, (0.0, 0.0, float(width), float(height)), base // stride, base // stride)


def window_grid(width: int, height: int, base: int, tile: int, most: int) -> tuple[int, int]:
    """(rows, cols) of Step 3.7's tiles: windows of the short side in small long pictures, else of a tile, the last one taken up where a fifth of it is left."""
    if max(width, height) > most:
        width, height = (int(side * (most / max(width, height))) for side in (width, height))
    short, long = min(width, height), max(width, height)
    if long <= base and long / short <= 1.5:
        return 0, 0
    window = short if long <= base else min(short, tile) if long / short > 4 else tile
    cols, rows = (max(1, side // window + (side >= window and side % window > 0.2 * window)) for side in (width, height))
    return rows, cols


def pages(picture: Picture) -> Boxes:
    """Unlimited-OCR: the picture stretched over tiles, if it is large, read line by line; then the whole padded to a square; a break after each line, one at the end."""
    images, processor = picture.images, picture.processor
    cell = int(processor.patch_size) * int(processor.downsample_ratio)
    base = max(length(images.size, "height"), length(images.size, "width"))
    side, tile = math.ceil(base // int(processor.patch_size) / int(processor.downsample_ratio)), math.ceil(int(images.tile_size) / cell)
    boxes: Boxes = []
    if picture.inputs["num_local_patches"][picture.index]:
        cols, rows = picture.inputs["patches_grid"][picture.index]
        boxes += lines(picture, picture.whole, rows * tile, cols * tile)
    stretched = not images.crop_to_patches and base <= int(images.maximum_pad_value)
    return [*boxes, *lines(picture, picture.whole if stretched else centred(picture, base), side, side), None]


def lines(picture: Picture, view: Box, rows: int, cols: int) -> Boxes:
    """The cells of a view with a break after each row."""
    flat = cells(picture, view, rows, cols)
    return [box for row in range(rows) for box in [*flat[row * cols : (row + 1) * cols], None]]


def centred(picture: Picture, side: int) -> Box:
    """The view of a picture scaled so that its longer side is `side` pixels, then padded to a square on both sides."""
    scale = side / max(picture.width, picture.height)
    edges = []
    for side_in_pixels in (picture.width, picture.height):
        shown = round(side_in_pixels * scale)
        start = (side - shown) // 2
        edges.append((-start * side_in_pixels / shown, (side - start) * side_in_pixels / shown))
    return (edges[0][0], edges[1][0], edges[0][1], edges[1][1])


def pooled_crops(picture: Picture) -> Boxes:
    """Molmo 2: the whole stretched to a square, then stretched to a canvas of overlapping crops, whose overlaps are read once; both pooled, the last rows and
    columns padded."""
    images, patch = picture.images, int(picture.images.patch_size)
    pool_rows, pool_cols = (int(v) for v in images.pooling_size)
    few_rows, few_cols, rows, cols = (int(v) for v in picture.inputs["image_grids"][picture.index])
    side = length(images.size, "height") // patch
    margin = sum(int(v) for v in images.overlap_margins)
    high, wide = (canvas(picture, n, side - margin, margin, pool) for n, pool in ((rows, pool_rows), (cols, pool_cols)))
    if not high or not wide:
        return []
    boxes: Boxes = []
    for n_rows, n_cols, tall, broad in ((few_rows, few_cols, side, side), (rows, cols, high, wide)):
        left, right = pooled(picture.width, broad, n_cols * pool_cols)
        top, bottom = pooled(picture.height, tall, n_rows * pool_rows)
        boxes += cells(picture, (left, top, right, bottom), n_rows, n_cols)
    return boxes


def canvas(picture: Picture, n: int, window: int, margin: int, pool: int) -> int:
    """Patches along an axis of the canvas whose pooled cells are n; 0 where no single number of crops makes them."""
    fits = [t * window + margin for t in range(1, int(picture.images.max_crops) + 1) if -(-(t * window + margin) // pool) == n]
    return fits[0] if len(fits) == 1 else 0


def pooled(side_in_pixels: int, n: int, padded: int) -> tuple[float, float]:
    """Start and stop in pixels of n patches over `side_in_pixels` pixels, padded to `padded` patches, the odd one behind."""
    before = (padded - n) // 2
    return -before * side_in_pixels / n, (padded - before) * side_in_pixels / n


OWN_TOKENS: dict[str, Layout] = {
    "kimi_k25": shrunk_and_padded,
    "muse_glimmer": grid,
    "muse_spark": grid,
    "inkling_mm_model": uncut,
    "step3p7": windows,
    "unlimited_ocr": pages,
    "video_llava": llava,
    "nemotron_h_omni": rows_of_patches,
    "molmo2": pooled_crops,
    "pp_chart2table": square,
}
