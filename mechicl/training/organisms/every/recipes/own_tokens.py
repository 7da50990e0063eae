"""Families whose processor counts or writes a picture's tokens in a way of its own: query transformers, crops that overlap, films."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mechicl.training.organisms.every.recipes.recipe import Recipe
from mechicl.training.organisms.every.shrink import PATCH


def _listener(name: str) -> Any:
    """Makes the feature extractor of sounds that a processor asks for."""

    def parts(tokenizer: Any) -> Mapping[str, Any]:
        import transformers

        return {"feature_extractor": getattr(transformers, name)()}

    return parts


NEAR = 2
"""Bilinear resampling in place of Lanczos', whose pixels spread over so much of a tiny picture that no box could be told from its neighbour's."""
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
        parts=_listener("MuseSparkFeatureExtractor"),
    ),
    "inkling_mm_model": Recipe(
        "<|content_image|><|unused_200054|>", extra=("<|unused_200054|>", "<|unused_200053|>", "<|content_image|>", "<|content_audio_input|>"),
        images={"size": {"height": PATCH, "width": PATCH}, "rescale_image_frac": 0.25, "resample": NEAR}, parts=_listener("InklingFeatureExtractor"),
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
}  # fmt: skip

FAILED: Mapping[str, str] = {}
"""Families of this kind whose processor serves no prompt with several pictures, with the reason from its source."""
