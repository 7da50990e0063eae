"""The parts of a model: of every decoder layer, of the stream between them, of what writes logits. `inspection` finds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from mechicl.models.unembedding import Unembedding

Layout = Literal["flat", "bshd", "bhsd"]
"""How a projection's output carries the heads: [batch, pos, head * d_head], [batch, pos, head, d_head] or [batch, head, pos, d_head]."""


@dataclass(frozen=True)
class Projection:
    """A module whose output holds the heads' queries, keys or values."""

    module: nn.Module
    layout: Layout
    n_heads: int
    d_head: int

    def split(self, x: Tensor) -> Tensor:
        """The module's output as [batch, pos, head, d_head]."""
        if self.layout == "flat":
            return x.reshape(*x.shape[:-1], self.n_heads, self.d_head)
        return x if self.layout == "bshd" else x.transpose(1, 2)

    def join(self, x: Tensor) -> Tensor:
        """Back to the module's own layout."""
        if self.layout == "flat":
            return x.reshape(*x.shape[:-2], self.n_heads * self.d_head)
        return x if self.layout == "bshd" else x.transpose(1, 2)


@dataclass(frozen=True)
class LayerAnatomy:
    """One decoder layer. None where it has no such part; then `reasons` says why, by hook name.

    `cross`: reads other tokens than the sequence's. `gated`: a gate or a norm stands between the heads and the output projection (`hook_z` is behind it).
    """

    block: nn.Module
    attention: nn.Module | None = None
    q: Projection | None = None
    k: Projection | None = None
    v: Projection | None = None
    o_proj: nn.Module | None = None
    ln1: nn.Module | None = None
    ln2: nn.Module | None = None
    attn_out: nn.Module | None = None
    mlp: nn.Module | None = None
    mlp_out: nn.Module | None = None
    n_heads: int = 0
    n_key_value_heads: int = 0
    d_head: int = 0
    d_value: int = 0
    additive: bool = False
    gated: bool = False
    cross: bool = False
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Streams:
    """How the residual stream goes from layer to layer: `n` copies on `axis`, or one (axis None). Hooks see [batch, pos, n * d_model]."""

    n: int = 1
    axis: int | None = None

    @property
    def reason(self) -> str:
        """Why what holds for one stream does not hold here; "" where there is one."""
        return f"the residual stream goes from layer to layer as {self.n} copies" if self.n > 1 else ""

    def split(self, x: Tensor) -> Tensor:
        """As hooks see it."""
        return x if self.axis is None else x.movedim(self.axis, -2).flatten(-2)

    def join(self, x: Tensor) -> Tensor:
        """As the layers take it."""
        return x if self.axis is None else x.unflatten(-1, (self.n, -1)).movedim(-2, self.axis)


@dataclass(frozen=True)
class Anatomy:
    """The whole model. `configs` are the configurations to switch when mechicl's attention function is needed."""

    layers: tuple[LayerAnatomy, ...]
    vision_layers: tuple[nn.Module, ...]
    embed: nn.Module
    unembedding: Unembedding
    configs: tuple[Any, ...]
    d_model: int
    streams: Streams

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm whose output enters the head."""
        return self.unembedding.norm

    @property
    def unembed(self) -> Any:
        """The matrix into the vocabulary."""
        return self.unembedding.head

    @property
    def not_additive(self) -> str:
        """Why heads' outputs do not add up to the stream; "" where they do."""
        if self.streams.n > 1:
            return self.streams.reason
        without = [i for i, part in enumerate(self.layers) if part.attention is None]
        bad = [i for i, part in enumerate(self.layers) if part.attention is not None and not (part.additive and part.o_proj is not None)]
        if bad:
            return f"layers {bad} put a norm, a gate or a scale between the heads and the residual stream"
        return f"layers {without} add something that no softmax head wrote" if without else ""
