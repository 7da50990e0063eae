"""Families whose processor counts or writes a picture's tokens in a way of its own: query transformers, crops that overlap, films."""

from __future__ import annotations

from collections.abc import Mapping

from mechicl.training.organisms.every.recipes.own_parts import hearing
from mechicl.training.organisms.every.recipes.recipe import Recipe
from mechicl.training.organisms.every.shrink import PATCH, SIDE

NEAR = 2
"""Bilinear resampling in place of Lanczos', whose pixels spread over so much of a tiny picture that no box could be told from its neighbour's."""
FINE = 12
"""Side of a patch in pixels where pictures are shrunk without smoothing: with a smaller one, most pixels would never be read."""
_MUSE_WORDS = ("<|patch|>", "<|image_start|>", "<|image_end|>", "<|video|>", "<|vid_frame_separator|>", "<|vid_start|>", "<|vid_end|>")
_MUSE_PIXELS = {"patch_size": PATCH, "merge_size": 2, "max_image_tokens": 16, "resample": NEAR}
_MUSE_IDS = {"image_token_id": "<|patch|>", "video_token_id": "<|video|>"}

RECIPES: Mapping[str, Recipe] = {
    "kimi_k25": Recipe(
        "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>", extra=("<|media_begin|>", "<|media_content|>", "<|media_pad|>", "<|media_end|>", "<|kimi_k25_video_placeholder|>"),
        images={"patch_size": PATCH, "merge_size": 2, "max_patches": 64}, ids={"image_token_id": "<|media_pad|>", "video_token_id": "<|kimi_k25_video_placeholder|>"},
    ),
    "muse_glimmer": Recipe("<|patch|>", extra=_MUSE_WORDS, images=_MUSE_PIXELS, ids=_MUSE_IDS),
    "muse_spark": Recipe(
        "<|patch|>", extra=(*_MUSE_WORDS, "<|audio|>", "<|soft_audio_start|>", "<|soft_audio_end|>"), images=_MUSE_PIXELS, ids={**_MUSE_IDS, "audio_token_id": "<|audio|>"},
        parts=hearing("MuseSparkFeatureExtractor"),
    ),
    "inkling_mm_model": Recipe(
        "<|content_image|><|unused_200054|>", extra=("<|unused_200054|>", "<|unused_200053|>", "<|content_image|>", "<|content_audio_input|>"),
        images={"size": {"height": PATCH, "width": PATCH}, "rescale_image_frac": 0.25, "resample": NEAR}, parts=hearing("InklingFeatureExtractor"),
        ids={"image_token_id": "<|unused_200054|>", "audio_token_id": "<|unused_200053|>", "image_bos_token_id": "<|content_image|>", "audio_bos_token_id": "<|content_audio_input|>"},
    ),
    "step3p7": Recipe(
        "<im_patch>", extra=("<im_patch>", "<patch_start>", "<patch_end>", "<patch_newline>", "<im_start>", "<im_end>"),
        images={"size": {"height": 32, "width": 32}, "patch_size": 32, "max_image_size": 48, "vision_patch_size": PATCH}, ids={"image_token_id": "<im_patch>"},
    ),
    "unlimited_ocr": Recipe(
        "<image>", {"image_token": "<image>"}, images={"size": {"height": 32, "width": 32}, "tile_size": 32, "max_patches": 4}, more={"patch_size": PATCH, "downsample_ratio": 4},
        ids={"image_token_id": "<image>"},
    ),
    "video_llava": Recipe(
        "<image>", {"image_token": "<image>", "video_token": "<video>"}, images={"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}},
        more={"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        ids={"image_token_index": "<image>", "video_token_index": "<video>"},
    ),
    "nemotron_h_omni": Recipe(
        "<image>", {"image_token": "<image>", "video_token": "<video>", "image_start_token": "<img>", "image_end_token": "</img>"}, ("<so_embedding>", "<so_start>", "<so_end>"),
        images={"patch_size": PATCH, "min_num_patches": 16, "max_num_patches": 64}, parts=hearing("ParakeetFeatureExtractor"),
        ids={"image_token_id": "<image>", "video_token_id": "<video>", "audio_token_id": "<so_embedding>"},
    ),
    "molmo2": Recipe(
        "<|image|>", extra=("<|image|>", "<|video|>", "<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>", "<im_end>", "<frame_end>", "<im_low>"),
        images={"size": {"height": 4 * FINE, "width": 4 * FINE}, "overlap_margins": [1, 0], "max_crops": 4, "patch_size": FINE},
        ids={"image_patch_id": "<im_patch>", "image_start_token_id": "<im_start>", "low_res_image_start_token_id": "<low_res_im_start>", "image_end_token_id": "<im_end>",
             "frame_start_token_id": "<frame_start>", "frame_end_token_id": "<frame_end>"},
        config=lambda tokenizer: {"vision_config": {"patch_size": FINE}},
    ),
    "idefics2": Recipe(
        "<image>", {"image_token": "<image>", "image_boundary_token": "<fake_token_around_image>"}, images={"size": {"shortest_edge": SIDE // 2, "longest_edge": SIDE}},
        more={"image_seq_len": 4}, ids={"image_token_id": "<image>"},
    ),
    "pp_chart2table": Recipe(
        "<img>" + 4 * "<imgpad>" + "</img>", extra=("<img>", "<imgpad>", "</img>"), images={"size": {"height": 2 * SIDE, "width": 2 * SIDE}}, ids={"image_token_index": "<imgpad>"},
        config=lambda tokenizer: {"vision_config": {"image_size": 2 * SIDE}},
    ),
}  # fmt: skip

_FIRST = "not used: its processor writes the tokens of one picture before the whole prompt, wherever the text has it"
FAILED: Mapping[str, str] = {"instructblip": _FIRST, "instructblipvideo": f"{_FIRST}, and takes four frames for it"}
"""Families of this kind whose processor serves no prompt with several pictures, with the reason from its source."""
