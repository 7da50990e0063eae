"""Real processors of the families beyond the organisms, built without a network, and the tiny model that fits each.

A recipe is data: the special tokens that the family's processor asks its tokenizer for, the image processor's sizes, and what a chat template writes for a picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from inspect import signature
from typing import Any

import torch

from mechicl.errors import OptionError
from mechicl.training.organisms import FAMILIES as ORGANISMS
from mechicl.training.organisms.every import configuration, enlivened
from mechicl.training.organisms.every.shrink import PATCH, SIDE
from mechicl.training.organisms.parts import padded
from mechicl.training.organisms.templates import chatml
from mechicl.training.tokenizer import build_tokenizer, token_id

CELL = (2 * PATCH) ** 2
"""Pixels of a merged token of a family with a grid of patches."""
GRID = {"patch_size": PATCH, "merge_size": 2, "size": {"shortest_edge": 4 * CELL, "longest_edge": 16 * CELL}}
SQUARE = {"size": {"height": SIDE, "width": SIDE}}
QWEN = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
GLM = {"image_token": "<|image|>", "video_token": "<|video|>"}


@dataclass(frozen=True)
class Recipe:
    """How a family's processor is built.

    Attributes:
        picture: What the chat template writes for a picture.
        named: Special tokens that the tokenizer has as attributes.
        extra: Further special tokens.
        images: Arguments of the image processor.
        more: Arguments of the processor.
        ids: Entries of the configuration that are a token's id.
        placeholder: The image token, where `named` has none.
    """

    picture: str
    named: Mapping[str, str] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    images: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    ids: Mapping[str, str] = field(default_factory=dict)
    placeholder: str = ""


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
_CROPPED = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, "image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]}  # fmt: skip

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
        ids={"image_token_index": "]<]image[>[", "video_token_index": "]<]video[>["}, placeholder="]<]image[>[",
    ),
    "lighton_ocr": _PIXTRAL,
    "mistral_large4": _PIXTRAL,
    "vipllava": Recipe(
        "<image>", {"image_token": "<image>"}, images={"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}},
        more={"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}, ids={"image_token_index": "<image>"},
    ),
    "qianfan_ocr": Recipe(
        "<IMG_CONTEXT>", {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}, ("<image>",),
        {**SQUARE, "crop_to_patches": False}, {"image_seq_length": 4, "image_placeholder_token": "<IMG_CONTEXT>"}, {"image_token_id": "<IMG_CONTEXT>"}, "<IMG_CONTEXT>",
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
    "lfm2_vl": Recipe(
        "<image>", {"image_token": "<image>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>", "image_thumbnail_token": "<|img_thumbnail|>"},
        images={"encoder_patch_size": PATCH, "do_image_splitting": False, "min_image_tokens": 4, "max_image_tokens": 9, "max_num_patches": 64, "tile_size": 32},
        ids={"image_token_id": "<image>"},
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
    "minicpmv4_6": _MINICPM,
    "minicpmv4_7": _MINICPM,
    "minicpm_ocr": _MINICPM,
}  # fmt: skip

FAILED: Mapping[str, str] = {
    "idefics2": "not used: its processor does not tell where it wrote a picture's tokens",
    "shieldgemma2": "not used: its processor writes a safety policy into every prompt, one picture each",
}
"""Families whose processor could not be built, with the reason."""


def why_no_processor(family: str) -> str:
    """Why the tests have no processor of this family; "" where they do."""
    if family in ORGANISMS or (family in RECIPES and family not in FAILED):
        return ""
    return FAILED.get(family) or (
        "not built: needs tokens and sizes of its own" if class_name("processing", family) else "transformers maps none"
    )


def class_name(part: str, family: str) -> str:
    """The class that transformers' auto module for `part` (processing, image_processing, video_processing) maps a family to; "" where it maps none."""
    module: Any = import_module(f"transformers.models.auto.{part}_auto")
    names = {
        "processing": "PROCESSOR_MAPPING_NAMES",
        "image_processing": "IMAGE_PROCESSOR_MAPPING_NAMES",
        "video_processing": "VIDEO_PROCESSOR_MAPPING_NAMES",
    }
    found = getattr(module, names[part]).get(family) or ""
    return found if isinstance(found, str) else found["torchvision"]


def build_processor(family: str) -> Any:
    """The family's processor with a tiny tokenizer.

    Raises:
        OptionError: there is no recipe.
    """
    import transformers

    if family not in RECIPES:
        raise OptionError(f"family must be one of {', '.join(RECIPES)}; got {family!r}. {why_no_processor(family)}.")
    recipe = RECIPES[family]
    kind = getattr(transformers, class_name("processing", family))
    tokenizer = build_tokenizer(eos="<|im_end|>", pad="<|endoftext|>", extra=("<|im_start|>", *recipe.extra), named=recipe.named)
    pictures = class_name("image_processing", family) or class_name(
        "image_processing", "qwen2_vl" if "image_pad" in recipe.picture else "glm4v"
    )
    parts: dict[str, Any] = {"image_processor": getattr(transformers, pictures)(**recipe.images), "tokenizer": tokenizer}
    if "video_processor" in signature(kind.__init__).parameters:
        videos = class_name("video_processing", family) or class_name(
            "video_processing", "qwen3_vl" if "Qwen3" in kind.__name__ else "glm4v"
        )
        parts["video_processor"] = getattr(transformers, videos)()
    return kind(**parts, chat_template=chatml(recipe.picture), **recipe.more)


def build_whole(family: str, *, seed: int = 0) -> tuple[Any, Any]:
    """A tiny model of a family and the processor that fits it."""
    processor = build_processor(family)
    tokenizer, recipe = processor.tokenizer, RECIPES[family]
    config = configuration(
        family, vocabulary=padded(len(tokenizer)), ids={name: token_id(tokenizer, token) for name, token in recipe.ids.items()}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return enlivened(config, seed), processor
