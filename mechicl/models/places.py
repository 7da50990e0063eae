"""Positions of tokens, where a family's own would depend on the other prompts of a batch.

A prompt's logits must not depend on what stands beside it. Most families see to that. Two do not and are given positions from outside, an input that
their forward takes; one cannot be helped, and padding is refused; analyses then go on with fewer prompts at a time (`mechicl.analysis.guarded`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mechicl.errors import PaddingError
from mechicl.models.families import Family


def placed(hf: Any, family: Family, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inputs with `position_ids` where the family's own would depend on the batch; as they are for the others.

    Raises:
        PaddingError: prompts of several lengths, in a family whose logits left padding moves.
    """
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or "position_ids" in inputs:
        return inputs
    if family.padding and left_padded(mask):
        raise PaddingError(
            f"batch must hold prompts of one length for {hf.config.model_type}; got lengths {mask.sum(-1).tolist()}: {family.padding}, so padding moves the logits. "
            "Pass batch_size=1, or render episodes one by one."
        )
    if family.positions == "mask":
        return {**inputs, "position_ids": from_mask(mask)}
    if family.positions == "prompt" and isinstance(inputs.get("image_grid_thw"), Tensor):
        return {**inputs, "position_ids": prompt_by_prompt(hf, inputs, mask)}
    return inputs


def left_padded(mask: Tensor) -> bool:
    """Whether a row of an attention mask [batch, pos] begins with padding."""
    return bool((mask[:, 0] == 0).any())


def from_mask(mask: Tensor) -> Tensor:
    """Places [batch, pos] counted from each prompt's first token, as transformers' `generate` counts them."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def prompt_by_prompt(hf: Any, inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
    """The family's own multimodal positions [axes, batch, pos], asked for prompt by prompt: HunYuan-VL numbers the pictures through the whole batch."""
    types: Tensor = inputs["mm_token_type_ids"] * mask
    before = torch.nn.functional.pad(types, (1, 0))[:, :-1]
    n_pictures = ((types == 1) & (before != 1)).sum(-1).tolist()  # runs of image tokens, which is how the family counts them
    grids = inputs["image_grid_thw"].split(n_pictures)
    rows = [
        hf.model.get_rope_index(
            inputs["input_ids"][i : i + 1],
            mm_token_type_ids=types[i : i + 1],
            image_grid_thw=grid if len(grid) else None,
            attention_mask=mask[i : i + 1],
        )[0]
        for i, grid in enumerate(grids)
    ]
    return torch.cat(rows, 1)
