"""Families whose pictures become squares of one size: the whole, tiles, or both."""

from __future__ import annotations

from collections.abc import Mapping

from mechicl.training.organisms.every.recipes.recipe import SQUARE, Recipe
from mechicl.training.organisms.every.shrink import PATCH, SIDE

_CROPPED = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, "image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]}  # fmt: skip

RECIPES: Mapping[str, Recipe] = {
    "vipllava": Recipe(
        "<image>", {"image_token": "<image>"}, images={"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}},
        more={"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}, ids={"image_token_index": "<image>"},
    ),
    "qianfan_ocr": Recipe(
        "<IMG_CONTEXT>", {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}, ("<image>",),
        {**SQUARE, "crop_to_patches": False}, {"image_seq_length": 4, "image_placeholder_token": "<IMG_CONTEXT>"}, {"image_token_id": "<IMG_CONTEXT>"},
    ),
    "deepseek_vl": Recipe("<image_placeholder>", {"image_token": "<image_placeholder>"}, images={**SQUARE, "min_size": 4}, more={"num_image_tokens": 16}, ids={"image_token_id": "<image_placeholder>"}),
    "janus": Recipe(
        "<image_placeholder>", {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}, images={**SQUARE, "min_size": 4},
        more={"num_image_tokens": 16}, ids={"image_token_id": "<image_placeholder>"},
    ),
    "cohere2_vision": Recipe(
        "<|IMG_PATCH|>", {"image_token": "<|IMG_PATCH|>", "boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>", "img_line_break_token": "<|IMG_LINE_BREAK|>"},
        images={**SQUARE, "crop_to_patches": False, "patch_size": 2}, ids={"image_token_id": "<|IMG_PATCH|>"},
    ),
    "ovis2": Recipe(
        "<image>", extra=("<image>", "<IMG_ATOM>", "<IMG_START>", "<IMG_END>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>"), images={**SQUARE, "crop_to_patches": False},
        more={"image_seq_length": 16}, ids={"image_token_id": "<IMG_ATOM>"},
    ),
    "llama4": Recipe(
        "<|image|>", extra=("<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>"), images={**SQUARE, "max_patches": 4},
        more={"patch_size": PATCH, "pixel_shuffle_ratio": 0.5}, ids={"image_token_id": "<|patch|>", "image_token_index": "<|patch|>"},
    ),
    "aya_vision": Recipe(
        "<image>", extra=("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE_GLOBAL", *(f"TILE_{k}" for k in range(1, 13))), images={**SQUARE, "crop_to_patches": True},
        more={"patch_size": PATCH, "img_size": SIDE, "downsample_factor": 2}, ids={"image_token_id": "<|IMG_PATCH|>", "image_token_index": "<|IMG_PATCH|>"},
    ),
    "deepseek_vl_hybrid": Recipe(
        "<image_placeholder>", {"image_token": "<image_placeholder>"}, images={**SQUARE, "min_size": 4, "high_res_size": SQUARE["size"]}, more={"num_image_tokens": 16},
        ids={"image_token_id": "<image_placeholder>"},
    ),
    "granite4_vision": Recipe(
        "<image>", {"image_token": "<image>"}, images=_CROPPED, more={"patch_size": PATCH, "vision_feature_select_strategy": "full", "downsample_rate": "1/2"},
        ids={"image_token_id": "<image>", "image_token_index": "<image>"},
    ),
    "llava_next_video": Recipe(
        "<image>", {"image_token": "<image>", "video_token": "<video>"}, images=_CROPPED,
        more={"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}, ids={"image_token_index": "<image>", "video_token_index": "<video>"},
    ),
    "perception_lm": Recipe(
        "<|image|>", {"image_token": "<|image|>", "video_token": "<|video|>"}, images={"tile_size": SIDE, "max_num_tiles": 1, "vision_input_type": "vanilla"},
        more={"patch_size": PATCH, "pooling_ratio": 1}, ids={"image_token_id": "<|image|>", "video_token_id": "<|video|>"},
    ),
}  # fmt: skip

FAILED: Mapping[str, str] = {
    "shieldgemma2": "not used: its processor writes a safety policy into every prompt, one picture each",
}
"""Families of this kind whose processor serves no prompt with several pictures, with the reason from its source."""
