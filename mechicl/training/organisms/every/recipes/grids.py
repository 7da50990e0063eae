"""Families whose pictures keep their shape: stretched to multiples of a (merged) patch, a token for each."""

from __future__ import annotations

from collections.abc import Mapping

from mechicl.training.organisms.every.recipes.recipe import GRID, Recipe
from mechicl.training.organisms.every.shrink import PATCH

QWEN = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
GLM = {"image_token": "<|image|>", "video_token": "<|video|>"}
_QWEN_IDS = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
}  # fmt: skip
_QWEN = Recipe("<|vision_start|><|image_pad|><|vision_end|>", QWEN, images=GRID, ids=_QWEN_IDS)
_GLM = Recipe(
    "<|begin_of_image|><|image|><|end_of_image|>", GLM, ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"), GRID,
    ids={"image_token_id": "<|image|>", "video_token_id": "<|video|>", "image_start_token_id": "<|begin_of_image|>", "image_end_token_id": "<|end_of_image|>"},
)  # fmt: skip
_PAD_ONLY = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
_PIXTRAL = Recipe(
    "[IMG]", {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
    images={"size": {"longest_edge": 32}, "patch_size": 2 * PATCH}, more={"patch_size": PATCH, "spatial_merge_size": 2},
    ids={"image_token_id": "[IMG]", "image_token_index": "[IMG]"},
)  # fmt: skip

_MINICPM = Recipe(
    "<image>",
    {"image_token": "<image>", "video_token": "<video>", "image_start_token": "<im_start>", "image_end_token": "<im_end>", "slice_start_token": "<slice>",
     "slice_end_token": "</slice>", "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>"},
    images={"slice_mode": False, "scale_resolution": 32, "patch_size": PATCH}, ids={"image_token_id": "<image>", "video_token_id": "<video>"},
)  # fmt: skip

RECIPES: Mapping[str, Recipe] = {
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "qwen4_exp": _QWEN,
    "cosmos3_edge": _QWEN,
    "lfm3_vl": _QWEN,
    "glm4v": _GLM,
    "glm46v": _GLM,
    "glm4v_moe": _GLM,
    "glm5_next": _GLM,
    "exaone4_5": Recipe("<|image_pad|>", _PAD_ONLY, images=GRID, ids={"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}),
    "hyperclovax_vision_v2": Recipe("<|image_pad|>", _PAD_ONLY, ("<|video_duration|>",), GRID, ids={"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}),
    "cohere_compass": Recipe(
        "<|VISION_START|><|IMAGE_PAD|><|VISION_END|>", extra=("<|IMAGE_PAD|>", "<|VIDEO_PAD|>", "<|VISION_START|>", "<|VISION_END|>"), images=GRID,
        ids={"image_token_id": "<|IMAGE_PAD|>", "video_token_id": "<|VIDEO_PAD|>", "vision_start_token_id": "<|VISION_START|>", "vision_end_token_id": "<|VISION_END|>"},
    ),
    "ernie4_5_vl_moe": Recipe(
        "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        {"image_token": "<|IMAGE_PLACEHOLDER|>", "image_start_token": "<|IMAGE_START|>", "image_end_token": "<|IMAGE_END|>",
         "video_token": "<|VIDEO_PLACEHOLDER|>", "video_start_token": "<|VIDEO_START|>", "video_end_token": "<|VIDEO_END|>"},
        images=GRID, ids={"image_token_id": "<|IMAGE_PLACEHOLDER|>", "video_token_id": "<|VIDEO_PLACEHOLDER|>", "image_start_token_id": "<|IMAGE_START|>",
                          "image_end_token_id": "<|IMAGE_END|>", "video_start_token_id": "<|VIDEO_START|>", "video_end_token_id": "<|VIDEO_END|>"},
    ),
    "hunyuan_vl": Recipe(
        "<|im_s|><|im_p|><|im_e|>", {"image_token": "<|im_p|>", "image_start_token": "<|im_s|>", "image_end_token": "<|im_e|>"}, images={**GRID, "temporal_patch_size": 1},
        ids={"image_token_id": "<|im_p|>", "im_start_id": "<|im_s|>", "im_end_id": "<|im_e|>"},
    ),
    "paddleocr_vl": Recipe("<|IMAGE_PLACEHOLDER|>", {"image_token": "<|IMAGE_PLACEHOLDER|>"}, images={**GRID, "temporal_patch_size": 1}, ids={"image_token_id": "<|IMAGE_PLACEHOLDER|>"}),
    "video_llama_3": Recipe("<|image_pad|>", _PAD_ONLY, images=GRID, ids={"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}),
    "minimax_m3_vl": Recipe(
        "]<]image[>[", extra=("]<]image[>[", "]<]video[>[", "]<]start of image[>[", "]<]end of image[>[", "]<]start of video[>[", "]<]end of video[>["), images=GRID,
        ids={"image_token_index": "]<]image[>[", "video_token_index": "]<]video[>["},
    ),
    "lighton_ocr": _PIXTRAL,
    "mistral_large4": _PIXTRAL,
    "minicpmv4_6": _MINICPM,
    "minicpmv4_7": _MINICPM,
    "minicpm_ocr": _MINICPM,
    "lfm2_vl": Recipe(
        "<image>", {"image_token": "<image>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>", "image_thumbnail_token": "<|img_thumbnail|>"},
        images={"encoder_patch_size": PATCH, "do_image_splitting": False, "min_image_tokens": 4, "max_image_tokens": 9, "max_num_patches": 64, "tile_size": 32},
        ids={"image_token_id": "<image>"},
    ),
}  # fmt: skip
