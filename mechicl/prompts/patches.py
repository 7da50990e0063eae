"""Image token -> patch -> pixel box in the original picture, with each family's resizing, tiling, padding and cropping undone.

A processor shows the vision tower one or more *views* of a picture (the whole of it, a tile, a crop). A view is an upright rectangle of the picture,
possibly larger than it where the processor pads, cut into rows x cols equal cells; the family's tokens go through the cells row by row. (The merging
of 2 x 2 patches and the window order inside Qwen's tower are undone by the tower itself before its tokens reach the decoder; the tests
check the whole chain, pixels to tokens, for every family.)

To add a family: write a function from `Picture` to one box, or None, per image token, and enter it in `GEOMETRY`.
"""

from __future__ import annotations

import math
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


def image_boxes(picture: Picture) -> Boxes:
    """The pixel box of every image token of a picture.

    Returns:
        (left, top, right, bottom) in the picture's pixels for each image token in prompt order, None for a token that stands for no place (row breaks,
        class tokens, padding). Empty where the family's geometry is not known or does not account for every token.
    """
    kind = getattr(picture.config, "model_type", "")
    boxes = GEOMETRY.get(kind, unknown)(picture)
    return boxes if len(boxes) == picture.n_tokens else []


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


def square(picture: Picture) -> Boxes:
    """The whole picture stretched onto a square of tokens; nothing where it is cropped, may be cut into tiles, or the tokens are no square."""
    side, images = math.isqrt(picture.n_tokens), picture.images
    tiled = getattr(images, "crop_to_patches", False) or getattr(images, "vision_input_type", "vanilla") != "vanilla"
    if side * side != picture.n_tokens or tiled or getattr(images, "do_center_crop", False):
        return []
    return cells(picture, picture.whole, side, side)


def unknown(picture: Picture) -> Boxes:
    """A family whose geometry nobody has written down: no boxes rather than wrong ones."""
    return []


def grid(picture: Picture) -> Boxes:
    """Qwen2-VL and the many like it: stretched to multiples of a merged patch; the grid is in image_grid_thw."""
    _, rows, cols = (int(v) for v in picture.inputs["image_grid_thw"][picture.index])
    merge = int(picture.images.merge_size)
    return cells(picture, picture.whole, rows // merge, cols // merge)


def mistral(picture: Picture) -> Boxes:
    """Mistral 3 (Pixtral): stretched to multiples of a merged patch; image_sizes holds the size it was stretched to. Row breaks are other tokens."""
    height, width = (int(v) for v in picture.inputs["image_sizes"][picture.index])
    side = int(picture.processor.patch_size) * int(picture.processor.spatial_merge_size)
    return cells(picture, picture.whole, height // side, width // side)


def llava(picture: Picture) -> Boxes:
    """LLaVA 1.5: shorter side scaled to a fixed length, then the middle cut out (or first padded to a square); a class token if it is kept."""
    processor, images = picture.processor, picture.images
    first = class_tokens(processor)
    view = picture.whole
    if getattr(images, "do_pad", False):
        view = padded_square(picture)
    width, height = view[2] - view[0], view[3] - view[1]
    shown_height, shown_width = resized(images, width, height)
    crop = images.crop_size if images.do_center_crop else None
    if crop:
        view = middle(view, (shown_width, shown_height), (length(crop, "width"), length(crop, "height")))
        shown_width, shown_height = length(crop, "width"), length(crop, "height")
    rows, cols = shown_height // int(processor.patch_size), shown_width // int(processor.patch_size)
    return first + cells(picture, view, rows, cols)


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


def with_breaks(picture: Picture) -> Boxes:
    """HunYuan-VL: as `grid`, a break after each row, a token before and one after the picture."""
    _, rows, cols = (int(v) for v in picture.inputs["image_grid_thw"][picture.index])
    merge = int(picture.images.merge_size)
    rows, cols = rows // merge, cols // merge
    flat = cells(picture, picture.whole, rows, cols)
    return [None, *(box for row in range(rows) for box in [*flat[row * cols : (row + 1) * cols], None]), None]


def sized_grid(picture: Picture) -> Boxes:
    """MiniCPM-V, LFM2-VL, stretched to a grid of patches that the processor names; a token merges a square of them. Nothing where pictures may be sliced."""
    if getattr(picture.images, "slice_mode", False) or getattr(picture.images, "do_image_splitting", False):
        return []
    sizes = picture.inputs["target_sizes" if "target_sizes" in picture.inputs else "spatial_shapes"]
    rows, cols = (int(v) for v in sizes[picture.index])
    merge = math.isqrt(rows * cols // max(picture.n_tokens, 1))
    return cells(picture, picture.whole, rows // merge, cols // merge) if merge else []


def padded_whole(picture: Picture) -> Boxes:
    """DeepSeek-VL, Janus: the longer side scaled to the tower's, the rest padded, a square of tokens."""
    side = math.isqrt(picture.n_tokens)
    return cells(picture, padded_square(picture), side, side) if side * side == picture.n_tokens else []


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


def nowhere(picture: Picture) -> Boxes:
    """Mllama: the picture is read by cross-attention; its one token stands for no place."""
    return [None] * picture.n_tokens


STRETCHED = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "cosmos3_edge", "cohere_compass", "lfm3_vl", "glm4v", "glm46v",
    "glm4v_moe", "exaone4_5", "hyperclovax_vision_v2", "ernie4_5_vl_moe", "paddleocr_vl", "video_llama_3", "minimax_m3_vl",
)  # fmt: skip
"""Families with `grid`'s geometry, each checked against its own processor."""

GEOMETRY: dict[str, Callable[[Picture], Boxes]] = {
    **dict.fromkeys(STRETCHED, grid),
    "hunyuan_vl": with_breaks,
    "cohere2_vision": square,
    "ovis2": square,
    "perception_lm": square,
    **dict.fromkeys(("minicpmv4_6", "minicpmv4_7", "minicpm_ocr", "lfm2_vl"), sized_grid),
    "llava_next_video": llava_next,
    "llava": llava,
    "vipllava": llava,
    "lighton_ocr": mistral,
    "mistral_large4": mistral,
    "qianfan_ocr": internvl,
    "deepseek_vl": padded_whole,
    "janus": padded_whole,
    "shieldgemma2": gemma,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "internvl": internvl,
    "gemma3": gemma,
    "paligemma": square,
    "idefics3": idefics,
    "smolvlm": idefics,
    "mistral3": mistral,
    "mllama": nowhere,
}
"""How each family lays its tokens over a picture, by the configuration's model_type. Others have no boxes."""


def length(size: Any, *names: str) -> int:
    """The first of the named lengths that a size holds."""
    for name in names:
        value = size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)
        if value is not None:
            return int(value)
    return 0


def class_tokens(processor: Any) -> Boxes:
    """Tokens before the patches (a class token that is kept): LLaVA counts additional ones and drops one under the strategy "default"."""
    extra = int(processor.num_additional_image_tokens or 0) - (processor.vision_feature_select_strategy == "default")
    return [None] * max(extra, 0)


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
