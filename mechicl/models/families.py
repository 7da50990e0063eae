"""What differs between families, as data: the only table of names in mechicl.

Everything structural (where the decoder, its layers, its attention, its norms are) is discovered from the model itself in `anatomy`. A family
needs an entry here only when one of these facts is not the default. To add one: append a `Family`, build a tiny checkpoint of it in
`mechicl.training.organisms`, and the family tests run on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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
        deepstack: Image features reach later layers by another way too (added after the first layers, read again by every layer), so that
            replacing the image embeddings alone leaves the picture visible.
        padding: Why left padding moves this family's own logits and nothing can be done: padded batches are refused, and analyses run prompts of one length
            together. Empty where it does not.
        positions: Where its own positions depend on the rest of a batch, what is given instead: "mask" counts from each prompt's first token (its own
            count the padding, and are read as numbers, not only as distances); "prompt" asks the family prompt by prompt (its own number the pictures of
            the whole batch). See `mechicl.models.places`.
        refused: Why the family is refused; empty when it is served.
    """

    required: tuple[str, ...] = ()
    image_tokens: bool = True
    needs_picture: bool = False
    deepstack: bool = False
    padding: str = ""
    positions: Literal["", "mask", "prompt"] = ""
    refused: str = ""

    @property
    def no_features(self) -> str:
        """Why there is no `hook_image_features`; "" where there is."""
        return "" if self.image_tokens else "its pictures are not tokens of the sequence"


_OUT_OF_SCOPE = "it is an encoder-decoder; mechicl serves decoder-only models with the images in the prompt"
_CROSS_ONLY = "its images enter only by cross-attention; mechicl serves decoder-only models with the images in the prompt"

_GRID = ("image_grid_thw", "mm_token_type_ids")
_WITH_GRID = (
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
    "paddleocr_vl",
)
_WITH_GRID_ONLY = (
    "exaone4_5",
    "hyperclovax_vision_v2",
    "kimi_k25",
    "lfm3_vl",
    "muse_glimmer",
    "muse_spark",
    "dots3_note",
    "glm5_next",
)
_WITH_SIZES = ("llava_next", "llava_next_video", "llava_onevision", "mistral3", "lighton_ocr", "emu3")
_ENCODER_DECODERS = ("florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop", "vision-encoder-decoder")

FAMILIES: Mapping[str, Family] = {
    **{name: Family(required=_GRID) for name in _WITH_GRID},
    **{name: Family(required=_GRID, deepstack=True) for name in ("qwen3_vl", "qwen3_vl_moe", "cosmos3_omni", "cohere_compass")},
    **{name: Family(required=("image_grid_thw",)) for name in _WITH_GRID_ONLY},
    **{name: Family(required=("image_sizes",)) for name in _WITH_SIZES},
    **{name: Family(required=("token_type_ids",)) for name in ("gemma3", "shieldgemma2", "paligemma")},
    **{name: Family(required=("pixel_attention_mask",)) for name in ("idefics2", "idefics3", "smolvlm")},
    **{name: Family(required=("target_sizes",)) for name in ("minicpm_ocr", "minicpmv4_6")},
    "minicpmv4_7": Family(required=("target_sizes", "mm_token_type_ids")),
    "lfm2_vl": Family(required=("pixel_attention_mask", "spatial_shapes")),
    "hunyuan_vl": Family(required=_GRID, positions="prompt"),
    "minimax_m3_vl": Family(required=("image_grid_thw",), padding="blocks of keys start at the first padding"),
    "mistral_large4": Family(required=("image_sizes",), positions="mask"),
    "inkling2": Family(required=("image_grid_thw",), deepstack=True),
    "qwen2_5_omni_thinker": Family(required=("image_grid_thw", "attention_mask")),
    "qwen3_omni_moe_thinker": Family(required=("image_grid_thw", "attention_mask"), deepstack=True),
    "ernie4_5_vl_moe": Family(required=(*_GRID, "moe_mm_token_type_ids")),
    "granite4_vision": Family(required=("image_sizes",), deepstack=True),
    "granite_docling": Family(required=("pixel_attention_mask",), deepstack=True),
    "gemma4": Family(required=("image_position_ids", "mm_token_type_ids"), deepstack=True),
    "gemma4_unified": Family(required=("image_position_ids", "mm_token_type_ids")),
    "molmo2": Family(required=("image_token_pooling", "image_grids", "mm_token_type_ids")),
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
    **{name: Family(refused=_OUT_OF_SCOPE) for name in _ENCODER_DECODERS},
    **{name: Family(refused=_CROSS_ONLY) for name in ("blip", "idefics", "evolla")},
    "diffusion_gemma": Family(refused="it is a diffusion model, not an autoregressive decoder"),
    "pi0": Family(refused="it is a robot policy, not a language model"),
}  # fmt: skip

TESTED = (
    "aria", "aya_vision", "blip-2", "chameleon", "cohere2_vision", "cohere_compass", "cosmos3_edge", "cosmos3_omni", "deepseek_ocr2", "deepseek_vl",
    "deepseek_vl_hybrid", "dots3_note", "emu3", "ernie4_5_vl_moe", "exaone4_5", "fast_vlm", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified",
    "glm46v", "glm4v", "glm4v_moe", "glm5_next", "glm_ocr", "glmga", "got_ocr2", "granite4_vision", "granite_docling", "hunyuan_vl",
    "hyperclovax_vision_v2", "idefics2", "idefics3", "inkling2", "inkling_mm_model", "instructblip", "instructblipvideo", "internvl", "janus", "kimi_k25",
    "kosmos-2", "kosmos-2.5", "lfm2_vl", "lfm3_vl", "lighton_ocr", "llama4", "llava", "llava_next", "llava_next_video", "llava_onevision", "minicpm_ocr",
    "minicpmv4_6", "minicpmv4_7", "minimax_m3_vl", "mistral3", "mistral4", "mistral_large4", "mllama", "molmo2", "muse_glimmer", "muse_spark",
    "nemotron_h_omni", "ovis2", "paddleocr_vl", "paligemma", "perception_lm", "pp_chart2table", "qianfan_ocr", "qwen2_5_omni_thinker", "qwen2_5_vl",
    "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe", "qwen4_exp", "shieldgemma2", "smolvlm", "step3p7",
    "unlimited_ocr", "video_llama_3", "video_llava", "vipllava",
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
            f"model must be a decoder-only vision-language model; got {model_type!r}: {family.refused}. "
            "Look into it with nnsight on the Hugging Face model, or choose one of the families in docs/families.md."
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
