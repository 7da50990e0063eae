"""A faster vision attention for training the Qwen-VL families: all pictures (or windows) of a batch in one call instead of one call each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NAME = "mechicl_blocks_flash"
"""transformers hands over the boundaries of the pictures only to functions whose name contains "flash"."""

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def block_attention(
    module: Any,
    query: Float[Tensor, "one head patch d_head"],
    key: Float[Tensor, "one head patch d_head"],
    value: Float[Tensor, "one head patch d_head"],
    attention_mask: Tensor | None = None,
    *,
    scaling: float,
    cu_seq_lens_q: Int[Tensor, " ends"],
    **_: Any,
) -> tuple[Float[Tensor, "one patch head d_head"], None]:
    """Attention within blocks of patches, each block for itself; equal blocks go together. The same numbers as block by block, to rounding."""
    lengths = cu_seq_lens_q.diff().tolist()
    if len(set(lengths)) == 1:
        n_heads, d_head = query.shape[1], query.shape[3]
        q, k, v = (x[0].view(n_heads, len(lengths), lengths[0], d_head).transpose(0, 1) for x in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, scale=scaling)  # [block, head, patch, d_head]
        return out.transpose(1, 2).reshape(1, -1, n_heads, d_head), None
    parts = (x.split(lengths, 2) for x in (query, key, value))
    out = torch.cat([scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in zip(*parts, strict=True)], 2)
    return out.transpose(1, 2), None


@contextmanager
def together(model: Any) -> Iterator[None]:
    """Within the block, the model's vision tower uses `block_attention`, where its family can."""
    if model.config.model_type not in FAMILIES:
        yield
        return
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, block_attention)
    config = model.config.vision_config
    before = config._attn_implementation
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before
