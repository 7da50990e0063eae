"""The tree of hook points of a Hugging Face model: what its anatomy says, under TransformerLens' names. Nothing here listens (`wiring` does)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mechicl.models.anatomy import Anatomy, LayerAnatomy
from mechicl.models.guards import dtype_of
from mechicl.models.hooked import HookedConfig, HookPoint
from mechicl.models.norms import Norm, eps_of
from mechicl.models.weights import AttentionWeights
from mechicl.models.wiring import ATTENTION_ONLY


class Block(nn.Module):
    """Hook points of one layer; `attn` holds those of its heads."""


def hooked_config(hf: Any, anatomy: Anatomy, name: str | None, device: torch.device) -> HookedConfig:
    """Sizes of the decoder; of the widest layer where layers differ in heads."""
    layers = anatomy.layers
    first = next(part for part in layers if part.attention is not None)
    text = hf.config.get_text_config()
    mlp = getattr(text, "intermediate_size", None)
    return HookedConfig(
        model_name=name or getattr(hf, "name_or_path", "") or type(hf).__name__, model_type=hf.config.model_type, n_layers=len(layers),
        n_heads=max(part.n_heads for part in layers), n_key_value_heads=max(part.n_key_value_heads for part in layers),
        d_model=anatomy.d_model, d_head=first.d_head, d_vocab=anatomy.unembed.weight.shape[0],  # type: ignore[union-attr]
        n_ctx=int(getattr(text, "max_position_embeddings", 0) or 1 << 20), d_mlp=mlp if isinstance(mlp, int) else None,
        normalization_type="RMS", device=str(device), dtype=dtype_of(hf),
    )  # fmt: skip


def grow_block(layer: int, part: LayerAnatomy, unavailable: dict[str, str]) -> Block:
    """A decoder layer's hook points. Those it cannot feed are left out; `unavailable` is told why."""
    block, attn = Block(), AttentionWeights()
    attn.__dict__["part"] = part
    for name in ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"):
        _add(block, name, part.reasons, f"blocks.{layer}.{name}", unavailable)
    inside = {k.removeprefix("attn."): v for k, v in part.reasons.items()}
    for name in ("q", "k", "v", "z", *ATTENTION_ONLY):
        _add(attn, f"hook_{name}", inside, f"blocks.{layer}.attn.hook_{name}", unavailable)
    block.attn = attn
    for name, norm in (("ln1", part.ln1), ("ln2", part.ln2)):
        if norm is not None:
            setattr(block, name, Norm(norm, eps_of(norm)))
    return block


def grow_vision(n_layers: int) -> nn.Module:
    """The vision tower's hook points: `blocks.i.hook_resid_pre` and `hook_resid_post`."""
    vision = nn.Module()
    vision.blocks = nn.ModuleList()
    for _ in range(n_layers):
        block = Block()
        block.hook_resid_pre, block.hook_resid_post = HookPoint(), HookPoint()
        vision.blocks.append(block)
    return vision


def _add(owner: nn.Module, name: str, reasons: Mapping[str, str], full: str, unavailable: dict[str, str]) -> None:
    if name in reasons:
        unavailable[full] = reasons[name]
    else:
        setattr(owner, name, HookPoint())
