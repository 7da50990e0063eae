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
        deepstack: Image features are added again after the first decoder layers, so that replacing the image embeddings alone leaves
            the picture visible.
        refused: Why the family is refused; empty when it is served.
    """

    required: tuple[str, ...] = ()
    image_tokens: bool = True
    deepstack: bool = False
    refused: str = ""


_OUT_OF_SCOPE = "it is an encoder-decoder; mechicl serves decoder-only models with the images in the prompt"
_CROSS_ONLY = "its images enter only by cross-attention; mechicl serves decoder-only models with the images in the prompt"

FAMILIES: Mapping[str, Family] = {
    "qwen2_vl": Family(required=("image_grid_thw", "mm_token_type_ids")),
    "qwen2_5_vl": Family(required=("image_grid_thw", "mm_token_type_ids")),
    "qwen3_vl": Family(required=("image_grid_thw", "mm_token_type_ids"), deepstack=True),
    "qwen3_vl_moe": Family(required=("image_grid_thw", "mm_token_type_ids"), deepstack=True),
    "llava": Family(),
    "llava_next": Family(required=("image_sizes",)),
    "llava_onevision": Family(required=("image_sizes",)),
    "internvl": Family(),
    "gemma3": Family(required=("token_type_ids",)),
    "paligemma": Family(required=("token_type_ids",)),
    "idefics3": Family(required=("pixel_attention_mask",)),
    "smolvlm": Family(required=("pixel_attention_mask",)),
    "mistral3": Family(required=("image_sizes",)),
    "mllama": Family(required=("cross_attention_mask", "aspect_ratio_ids", "aspect_ratio_mask"), image_tokens=False),
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
    for name in ("image_token_id", "image_token_index"):
        if (value := getattr(config, name, None)) is not None:
            return int(value)
    return None


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
