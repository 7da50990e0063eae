"""What differs between families, as data: the only table of names in mechicl.

Everything structural (where the decoder, its layers, its attention, its norms are) is discovered from the model itself in `anatomy`. A family
needs an entry here only when one of these facts is not the default. To add one: append a `Family`, build a tiny checkpoint of it in
`mechicl.training.organisms`, and the family tests run on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mechicl.errors import MissingInputError, UnsupportedModelError

PIXEL_KEYS = ("pixel_values", "pixel_values_videos", "flattened_patches", "image_patches")


@dataclass(frozen=True)
class Family:
    """Facts about one `config.model_type`.

    Attributes:
        required: Inputs that must accompany pictures: without them the model runs and is silently wrong, or fails deep inside.
        image_tokens: Whether pictures become tokens of the sequence (False: cross-attention).
        needs_picture: Its forward cannot run on words alone.
        deepstack: Image features are added again after the first decoder layers, so that replacing the image embeddings alone leaves
            the picture visible.
        refused: Why the family is refused; empty when it is served.
    """

    required: tuple[str, ...] = ()
    image_tokens: bool = True
    needs_picture: bool = False
    deepstack: bool = False
    refused: str = ""

    @property
    def no_features(self) -> str:
        """Why there is no `hook_image_features`; "" where there is."""
        return "" if self.image_tokens else "its pictures are not tokens of the sequence"


_OUT_OF_SCOPE = "it is an encoder-decoder; mechicl serves decoder-only models with the images in the prompt"
_CROSS_ONLY = "its images enter only by cross-attention; mechicl serves decoder-only models with the images in the prompt"

_GRID = ("image_grid_thw", "mm_token_type_ids")

FAMILIES: Mapping[str, Family] = {
    **{
        name: Family(required=_GRID)
        for name in (
            "qwen2_vl",
            "qwen2_5_vl",
            "qwen3_5",
            "qwen3_5_moe",
            "qwen4_exp",
            "cosmos3_edge",
            "glm4v",
            "glm4v_moe",
            "glm46v",
            "glmga",
            "glm_ocr",
            "glm5_next",
            "hunyuan_vl",
            "paddleocr_vl",
        )
    },
    **{name: Family(required=_GRID, deepstack=True) for name in ("qwen3_vl", "qwen3_vl_moe", "cosmos3_omni", "cohere_compass")},
    **{
        name: Family(required=("image_grid_thw",))
        for name in (
            "exaone4_5",
            "hyperclovax_vision_v2",
            "inkling2",
            "kimi_k25",
            "lfm3_vl",
            "minimax_m3_vl",
            "muse_glimmer",
            "muse_spark",
            "dots3_note",
        )
    },
    "qwen2_5_omni_thinker": Family(required=("image_grid_thw", "attention_mask")),
    "qwen3_omni_moe_thinker": Family(required=("image_grid_thw", "attention_mask"), deepstack=True),
    "ernie4_5_vl_moe": Family(required=(*_GRID, "moe_mm_token_type_ids")),
    "llava": Family(),
    **{
        name: Family(required=("image_sizes",))
        for name in (
            "llava_next",
            "llava_next_video",
            "llava_onevision",
            "mistral3",
            "mistral_large4",
            "lighton_ocr",
            "emu3",
        )
    },
    "granite4_vision": Family(required=("image_sizes",), deepstack=True),
    "internvl": Family(),
    "gemma3": Family(required=("token_type_ids",)),
    "shieldgemma2": Family(required=("token_type_ids",)),
    "paligemma": Family(required=("token_type_ids",)),
    "gemma4": Family(required=("image_position_ids", "mm_token_type_ids")),
    "gemma4_unified": Family(required=("image_position_ids", "mm_token_type_ids")),
    "molmo2": Family(required=("image_token_pooling", "image_grids", "mm_token_type_ids")),
    **{name: Family(required=("pixel_attention_mask",)) for name in ("idefics2", "idefics3", "smolvlm", "lfm2_vl")},
    "granite_docling": Family(required=("pixel_attention_mask",), deepstack=True),
    **{name: Family(required=("target_sizes",)) for name in ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")},
    "deepseek_vl_hybrid": Family(required=("high_res_pixel_values",)),
    "video_llama_3": Family(required=("image_grid_thw", "image_merge_sizes")),
    "nemotron_h_omni": Family(required=("image_grid_hw",)),
    "blip-2": Family(needs_picture=True),
    "instructblip": Family(required=("qformer_input_ids",), needs_picture=True),
    "instructblipvideo": Family(required=("qformer_input_ids",), needs_picture=True),
    "kosmos-2": Family(required=("image_embeds_position_mask",), needs_picture=True),
    "kosmos-2.5": Family(required=("image_embeds_position_mask",)),
    "mllama": Family(required=("cross_attention_mask", "aspect_ratio_ids", "aspect_ratio_mask"), image_tokens=False, needs_picture=True),
    "mistral4": Family(image_tokens=False),
    "git": Family(refused="its attention is written inline, so that no function can be registered for it"),
    **{
        name: Family(refused=_OUT_OF_SCOPE)
        for name in ("florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop", "vision-encoder-decoder")
    },
    **{name: Family(refused=_CROSS_ONLY) for name in ("blip", "idefics", "evolla")},
    "diffusion_gemma": Family(refused="it is a diffusion model, not an autoregressive decoder"),
    "pi0": Family(refused="it is a robot policy, not a language model"),
}

TESTED = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "llava_next", "llava_onevision", "internvl", "gemma3", "paligemma", "idefics3", "smolvlm",
    "mistral3", "mllama",
)  # fmt: skip
"""Families with a tiny checkpoint in the tests. Others are tried, with the load-time check as their judge."""


def family_of(config: Any) -> Family:
    """The entry of a model's configuration; the default for a family without one.

    Raises:
        UnsupportedModelError: the family is refused, with the reason.
    """
    model_type = getattr(config, "model_type", "")
    family = FAMILIES.get(model_type, Family())
    if family.refused:
        raise UnsupportedModelError(
            f"model must be a decoder-only vision-language model; got {model_type!r}: {family.refused}. Choose one of {', '.join(TESTED)}."
        )
    return family


def image_token_id(config: Any) -> int | None:
    """The placeholder of image features in input_ids, from the configuration (not the processor, whose idea can differ)."""
    for name in ("image_token_id", "image_token_index", "image_patch_id", "video_token_index"):
        if (value := getattr(config, name, None)) is not None:
            return int(value)
    return None


def image_positions(config: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """Where pictures stand in the sequence [batch, pos], bool; None where they are no tokens of it. Kosmos says so by an input, the others by a token."""
    if isinstance(given := inputs.get("image_embeds_position_mask"), Tensor):
        return given.bool()
    token = image_token_id(config)
    return None if token is None else inputs["input_ids"] == token


def check_inputs(config: Any, inputs: Mapping[str, Any]) -> None:
    """Refuse a processor mapping that lacks an input the model would silently do without.

    Raises:
        MissingInputError: naming what is missing and how to get it.
    """
    family = FAMILIES.get(config.model_type, Family())
    if "input_ids" not in inputs:
        raise MissingInputError(f"inputs must contain input_ids; got {sorted(inputs)}. Pass the processor's output whole.")
    pictures = any(isinstance(inputs.get(key), Tensor) for key in PIXEL_KEYS)
    token = image_token_id(config)
    if not pictures and family.image_tokens and token is not None and bool((inputs["input_ids"] == token).any()):
        raise MissingInputError(
            f"inputs must contain the pictures that input_ids has {config.model_type} image tokens for; got {sorted(inputs)}. "
            "Pass the processor's output whole, pixel_values included."
        )
    if not pictures:
        return
    missing = [key for key in family.required if inputs.get(key) is None]
    if missing:
        raise MissingInputError(
            f"inputs must contain {', '.join(family.required)} for {config.model_type}; got {sorted(inputs)} without {', '.join(missing)}. "
            "Pass the processor's output whole (return_mm_token_type_ids=True where the processor asks for it): without these the model runs and is wrong."
        )
