"""A picture as each family's forward pass takes it: random pixels in the right shape, without a processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from mechicl.training.organisms.every.shrink import PATCH, SIDE

Pixels = dict[str, Any]
Layout = Callable[[Any, torch.Generator], Pixels]


def vision_of(config: Any) -> Any:
    """The vision tower's configuration."""
    return getattr(config, "vision_config", None) or config


def patch_of(config: Any) -> int:
    """Side of a patch in pixels."""
    size = getattr(vision_of(config), "patch_size", None) or getattr(config, "patch_size", PATCH)
    return int(size[0] if isinstance(size, list | tuple) else size)


def side_of(config: Any) -> int:
    """Side of a picture in pixels."""
    size = getattr(vision_of(config), "image_size", None) or getattr(config, "image_size", None) or SIDE
    return int(size[0] if isinstance(size, list | tuple) else size)


def square(config: Any, generator: torch.Generator) -> Pixels:
    """One picture [1, 3, side, side]."""
    side = side_of(config)
    return {"pixel_values": torch.randn(1, 3, side, side, generator=generator)}


def patches(config: Any, generator: torch.Generator) -> Pixels:
    """4 x 4 flat patches [16, channels x time x patch x patch] and their grid [1, 3]: time, rows, columns."""
    vision = vision_of(config)
    time = int(getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", None) or 1)
    n = 3 * time * patch_of(config) ** 2
    return {"pixel_values": torch.randn(16, n, generator=generator), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def tiled(config: Any, generator: torch.Generator) -> Pixels:
    """A picture and its two tiles [1, 3, 3, side, side]."""
    side = side_of(config)
    return {"pixel_values": torch.randn(1, 3, 3, side, side, generator=generator), "image_sizes": torch.tensor([[side, 2 * side]])}


def tile(config: Any, generator: torch.Generator) -> Pixels:
    """A single tile with a mask of its pixels [1, 1, 3, side, side]."""
    side = side_of(config)
    return {
        "pixel_values": torch.randn(1, 1, 3, side, side, generator=generator),
        "pixel_attention_mask": torch.ones(1, 1, side, side, dtype=torch.bool),
    }


def sized(config: Any, generator: torch.Generator) -> Pixels:
    """One picture [1, 3, side, side] and its size in pixels [1, 2]."""
    side = side_of(config)
    return {**square(config, generator), "image_sizes": torch.tensor([[side, side]])}


def flat(config: Any, generator: torch.Generator) -> Pixels:
    """16 flat patches of one picture [1, 16, 3 x patch x patch]."""
    return {"pixel_values": torch.randn(1, 16, 3 * patch_of(config) ** 2, generator=generator)}


def naflex(config: Any, generator: torch.Generator) -> Pixels:
    """Flat patches, their grid and which of them are real."""
    return {
        **flat(config, generator),
        "spatial_shapes": torch.tensor([[4, 4]]),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
    }


def strip(config: Any, generator: torch.Generator) -> Pixels:
    """8 x 4 patches side by side [1, 3, patch, 32 x patch] and their grid."""
    patch = patch_of(config)
    return {"pixel_values": torch.randn(1, 3, patch, 32 * patch, generator=generator), "target_sizes": torch.tensor([[8, 4]])}


def docling(config: Any, generator: torch.Generator) -> Pixels:
    """Two tiles [1, 2, 3, side, side], both real."""
    side = side_of(config)
    return {
        "pixel_values": torch.randn(1, 2, 3, side, side, generator=generator),
        "pixel_attention_mask": torch.ones(1, 2, dtype=torch.bool),
    }


def placed(config: Any, generator: torch.Generator) -> Pixels:
    """Gemma 4: flat patches and the column and row of each [1, 16, 2]; the unified one's are already merged."""
    side = getattr(vision_of(config), "model_patch_size", patch_of(config)) if "unified" in config.model_type else patch_of(config)
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).reshape(1, 16, 2)
    return {"pixel_values": torch.rand(1, 16, 3 * side**2, generator=generator), "image_position_ids": places}


def high(config: Any, generator: torch.Generator) -> Pixels:
    """The picture at two resolutions."""
    side = int(config.high_res_vision_config.image_size)
    return {**square(config, generator), "high_res_pixel_values": torch.randn(1, 3, side, side, generator=generator)}


def asked(config: Any, generator: torch.Generator) -> Pixels:
    """A picture and the question that the query transformer reads beside it."""
    return {
        **square(config, generator),
        "qformer_input_ids": torch.tensor([[5, 6, 7]]),
        "qformer_attention_mask": torch.ones(1, 3, dtype=torch.long),
    }


def film(config: Any, generator: torch.Generator) -> Pixels:
    """Two frames [1, 2, 3, side, side] and a question."""
    side = side_of(config)
    return {**asked(config, generator), "pixel_values": torch.randn(1, 2, 3, side, side, generator=generator)}


def shaped(*shape: int, side: int = 4) -> Layout:
    """Pixels of one shape; a grid of side x side patches beside them."""

    def layout(config: Any, generator: torch.Generator) -> Pixels:
        return {"pixel_values": torch.randn(*shape, generator=generator), "image_grid_thw": torch.tensor([[1, side, side]])}

    return layout


def plain(*shape: int) -> Layout:
    """Pixels of one shape."""
    return lambda config, generator: {"pixel_values": torch.randn(*shape, generator=generator)}


def radio(config: Any, generator: torch.Generator) -> Pixels:
    """16 flat patches [16, 3 x patch x patch] and the picture's rows and columns."""
    return {"pixel_values": torch.randn(16, 3 * patch_of(config) ** 2, generator=generator), "image_grid_hw": torch.tensor([[4, 4]])}


def pooled(config: Any, generator: torch.Generator) -> Pixels:
    """Molmo 2: one crop of patches, and which four of them each token pools."""
    index = torch.arange(16).reshape(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    return {
        "pixel_values": torch.randn(1, 16, 3 * patch_of(config) ** 2, generator=generator),
        "image_token_pooling": index,
        "image_grids": torch.tensor([[2, 2, 0, 0]]),
        "image_num_crops": torch.tensor([1]),
    }


def located(config: Any, generator: torch.Generator) -> Pixels:
    """Kosmos 2.5: flat patches behind their row and column [1, 16, 2 + 3 x patch x patch]."""
    places = torch.stack(torch.meshgrid(torch.arange(1, 5), torch.arange(1, 5), indexing="ij"), -1).reshape(1, 16, 2)
    return {"flattened_patches": torch.cat([places, torch.randn(1, 16, 3 * PATCH**2, generator=generator)], -1)}


def crossed(config: Any, generator: torch.Generator) -> Pixels:
    """Mllama: one tile of two [1, 1, 2, 3, side, side]."""
    side = side_of(config)
    return {
        "pixel_values": torch.randn(1, 1, 2, 3, side, side, generator=generator),
        "aspect_ratio_ids": torch.tensor([[2]]),
        "aspect_ratio_mask": torch.ones(1, 1, 2, dtype=torch.long),
    }


def merged(config: Any, generator: torch.Generator) -> Pixels:
    """VideoLLaMA 3: a grid of patches and the side of a merged block."""
    return {**patches(config, generator), "image_merge_sizes": torch.tensor([2])}


LAYOUT: Mapping[str, Layout] = {
    "llava_next": tiled, "llava_next_video": tiled, "llava_onevision": tiled, "granite4_vision": tiled,
    "idefics2": tile, "idefics3": tile, "smolvlm": tile, "granite_docling": docling,
    "mistral3": sized, "mistral_large4": sized, "lighton_ocr": sized, "emu3": sized,
    "fuyu": flat, "lfm2_vl": naflex, "minicpm_ocr": strip, "minicpmv4_6": strip, "minicpmv4_7": strip, "gemma4": placed, "gemma4_unified": placed,
    "deepseek_vl_hybrid": high, "instructblip": asked, "instructblipvideo": film, "nemotron_h_omni": radio, "molmo2": pooled, "kosmos-2.5": located,
    "mllama": crossed, "video_llama_3": merged, "kimi_k25": shaped(16, 3, PATCH, PATCH), "paddleocr_vl": shaped(16, 3, PATCH, PATCH),
    "inkling2": shaped(4, 2 * PATCH, 2 * PATCH, 3, side=2), "inkling_mm_model": plain(4, 2, PATCH, PATCH, 3), "perception_lm": plain(1, 1, 3, SIDE, SIDE),
    "fast_vlm": plain(1, 3, 64, 64), "gemma3n": plain(1, 3, 64, 64),
}  # fmt: skip


def pixels(model: Any, generator: torch.Generator) -> Pixels:
    """A picture for `model`, by its family's layout; a grid of patches where its forward takes image_grid_thw, else a square."""
    takes = signature(model.forward).parameters
    layout = LAYOUT.get(model.config.model_type, patches if "image_grid_thw" in takes else square)
    return layout(model.config, generator)


TEXT_ONLY = ("mistral4",)
"""In transformers' mapping, but without a picture's way in."""
N_TOKENS: Mapping[str, int] = {
    "instructblip": 4,
    "instructblipvideo": 8,
    "kosmos-2": 4,
    "kosmos-2.5": 4,
    "mllama": 1,
    "fuyu": 16,
    "granite4_vision": 14,
}
"""Tokens of the picture where the model has no method that says so."""


@torch.no_grad()
def count(model: Any, given: Pixels) -> int:
    """How many tokens the picture becomes, by the model's own get_image_features."""
    if (known := N_TOKENS.get(model.config.model_type)) is not None:
        return known
    owner = next(m for m in (getattr(model, "model", model), model) if hasattr(m, "get_image_features"))
    takes = signature(owner.get_image_features).parameters
    if "args" not in takes:
        given = {name: value for name, value in given.items() if name in takes or "kwargs" not in takes}
    found = owner.get_image_features(**{k: v for k, v in given.items() if k != "image_num_crops"})
    rows = getattr(found, "pooler_output", None)
    rows = found.last_hidden_state if rows is None else rows
    rows = [rows] if isinstance(rows, Tensor) else list(rows)
    return sum(x.reshape(-1, x.shape[-1]).shape[0] for x in rows)


def token_of(config: Any) -> int:
    """The picture's placeholder in input_ids."""
    for name in ("image_token_id", "image_token_index", "image_patch_id", "video_token_index"):
        if (value := getattr(config, name, None)) is not None:
            return int(value)
    return 99  # Kosmos marks pictures by a mask, not by a token


def prompt(model: Any, *, seed: int = 0) -> dict[str, Any]:
    """Six words, a picture, eight words: what the model's forward takes, whole."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    words = torch.randint(5, 90, (14,), generator=generator).tolist()
    if config.model_type in TEXT_ONLY:
        ids = torch.tensor([words])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given = pixels(model, generator)
    n = count(model, given)
    ids = torch.tensor([[*words[:6], *[token_of(config)] * n, *words[6:]]])
    takes = signature(model.forward).parameters
    shown = (ids == token_of(config)).long()
    if config.model_type.startswith("kosmos"):
        given["image_embeds_position_mask"] = shown
    if config.model_type == "mllama":
        given["cross_attention_mask"] = torch.ones(1, ids.shape[1], 1, 2, dtype=torch.long)
    types = {name: shown for name in ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids") if name in takes}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types, **given}
