"""Families that show the whole picture once: stretched, padded or cropped onto one grid of tokens."""

from __future__ import annotations

import math
from typing import Any

from mechicl.prompts.geometry.picture import Boxes, Layout, Picture, cells, length, middle, padded_square, resized


def square(picture: Picture) -> Boxes:
    """The whole picture stretched onto a square of tokens; nothing where it is cropped, may be cut into tiles, or the tokens are no square."""
    side, images = math.isqrt(picture.n_tokens), picture.images
    tiled = getattr(images, "crop_to_patches", False) or getattr(images, "vision_input_type", "vanilla") != "vanilla"
    if side * side != picture.n_tokens or tiled or getattr(images, "do_center_crop", False):
        return []
    return cells(picture, picture.whole, side, side)


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


def nowhere(picture: Picture) -> Boxes:
    """Mllama: the picture is read by cross-attention; its one token stands for no place."""
    return [None] * picture.n_tokens


def class_tokens(processor: Any) -> Boxes:
    """Tokens before the patches (a class token that is kept): LLaVA counts additional ones and drops one under the strategy "default"."""
    extra = int(processor.num_additional_image_tokens or 0) - (processor.vision_feature_select_strategy == "default")
    return [None] * max(extra, 0)


GRIDS = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "cosmos3_edge", "cohere_compass", "lfm3_vl", "glm4v", "glm46v",
    "glm4v_moe", "exaone4_5", "hyperclovax_vision_v2", "ernie4_5_vl_moe", "paddleocr_vl", "video_llama_3", "minimax_m3_vl",
)  # fmt: skip
"""Families with `grid`'s geometry, each checked against its own processor."""

STRETCHED: dict[str, Layout] = {
    **dict.fromkeys(GRIDS, grid),
    **dict.fromkeys(("cohere2_vision", "ovis2", "perception_lm", "paligemma"), square),
    **dict.fromkeys(("minicpmv4_6", "minicpmv4_7", "minicpm_ocr", "lfm2_vl"), sized_grid),
    **dict.fromkeys(("llava", "vipllava"), llava),
    **dict.fromkeys(("mistral3", "mistral_large4", "lighton_ocr"), mistral),
    **dict.fromkeys(("deepseek_vl", "janus"), padded_whole),
    "hunyuan_vl": with_breaks,
    "mllama": nowhere,
}
