"""What hand-made programs are built of: slots of the stream, heads that fetch by place, heads that only look the part, and prompts in pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from mechicl.models.toys.model import ToyBlock, ToyTransformer, toy_config
from mechicl.models.toys.prompts import ToyRenderer, ToyVocabulary

ROOM = 8
"""Coordinates where idle parts write and nobody in the circuit reads."""

WORDS = ToyVocabulary(n_items=4, n_labels=32)
"""Words of the copying programs: i0, i1 are flags, i2 a mark that means nothing, l0 ... what is copied."""


@dataclass(frozen=True)
class Slots:
    """Coordinates of the stream by name: content (one-hot token), place (one-hot position), the program's own, and room."""

    size: int
    n_ctx: int
    own: tuple[str, ...]

    @property
    def d_model(self) -> int:
        """Width of the stream."""
        return self.size * (1 + len(self.own)) + self.n_ctx + ROOM

    def __getitem__(self, name: str) -> slice:
        if name == "content":
            return slice(0, self.size)
        if name == "place":
            return slice(self.size, self.size + self.n_ctx)
        start = self.size + self.n_ctx + self.size * self.own.index(name)
        return slice(start, start + self.size)


class Builder:
    """A toy transformer being wired by hand: token i is one-hot in `content`, place t in `place`, and the logits read `out` times `sharpness`."""

    slots: Slots
    sharpness: float
    n_heads: int
    width: int
    model: ToyTransformer
    generator: torch.Generator
    score: float
    eye: Tensor

    def __init__(
        self,
        name: str,
        own: Sequence[str],
        *,
        n_layers: int,
        n_heads: int,
        n_ctx: int,
        sharpness: float,
        seed: int,
        d_mlp: int | None = None,
    ) -> None:
        size = WORDS.size
        self.slots, self.sharpness, self.n_heads = Slots(size, n_ctx, tuple(own)), sharpness, n_heads
        self.width = max(size, n_ctx) + 1
        cfg = toy_config(
            n_layers=n_layers, n_heads=n_heads, d_model=self.slots.d_model, d_head=self.width, d_vocab=size, n_ctx=n_ctx, name=name,
            mlp=None if d_mlp is None else "gelu", d_mlp=d_mlp,
        )  # fmt: skip
        self.model = ToyTransformer(cfg, ToyRenderer(WORDS), seed=seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.score = math.sqrt(sharpness * math.sqrt(self.width))
        self.eye = torch.eye(size)
        with torch.no_grad():
            self.model.W_E.zero_()[:, self.slots["content"]] = self.eye
            self.model.W_pos.zero_()[:, self.slots["place"]] = torch.eye(n_ctx)
            self.model.W_U.zero_()[self.slots["out"]] = self.eye * sharpness
            for layer in range(n_layers):
                idle_attention(self.model, layer, self.generator)
                if d_mlp is not None:
                    self._idle_mlp(layer)

    def draw_heads(self, n: int) -> list[int]:
        """n different heads of a layer."""
        return torch.randperm(self.n_heads, generator=self.generator)[:n].tolist()

    @torch.no_grad()
    def fetch(self, layer: int, head: int, offset: int, source: str, target: str) -> None:
        """From place t the head reads place t - offset, and copies its slot `source` into `target`."""
        w_q, w_k, w_v, w_o = blank(self.model, layer, head)
        place, n_ctx = self.slots["place"], self.slots.n_ctx
        w_q[place, :n_ctx] = torch.eye(n_ctx).roll(-offset, 1) * self.score
        w_q[place.start : place.start + offset] = 0.0  # the first tokens have nothing there
        w_k[place, :n_ctx] = torch.eye(n_ctx) * self.score
        w_v[self.slots[source], : self.slots.size] = self.eye
        w_o[: self.slots.size, self.slots[target]] = self.eye

    @torch.no_grad()
    def fetch_if(self, layer: int, head: int, offset: int, flag: int, mode: str, target: str) -> None:
        """From place t the head reads content at t - offset into `target`, if the reader's slot `mode` holds the flag; else it reads the first place, whose
        content goes into `room`. It asks by two coordinates: the place, and minus the first place's lead unless the flag is there."""
        w_q, w_k, w_v, w_o = blank(self.model, layer, head)
        place, n_ctx, size = self.slots["place"], self.slots.n_ctx, self.slots.size
        w_q[place, :n_ctx] = torch.eye(n_ctx).roll(-offset, 1) * self.score
        w_q[place.start : place.start + offset] = 0.0
        w_k[place, :n_ctx] = torch.eye(n_ctx) * self.score
        # the last coordinate: every place asks for the first one with twice the strength of the fetch, and the flag takes that away again
        w_q[place, -1] = 2 * self.score
        w_q[self.slots[mode].start + flag, -1] = -2 * self.score
        w_k[place.start, -1] = self.score
        w_v[self.slots["content"], :size] = self.eye
        w_v[self.slots["content"].start : self.slots["content"].start + FIRST_LABEL] = 0.0  # what stands first is a flag, and is not copied
        w_o[:size, self.slots[target]] = self.eye

    @torch.no_grad()
    def imitate(self, layer: int, heads: Sequence[int]) -> None:
        """Every other idle head of the layer looks and reads like one of `heads`; only where it writes gives it away."""
        attn = cast(ToyBlock, self.model.blocks[layer]).attn
        idle = [head for head in range(self.n_heads) if head not in heads]
        for k, head in enumerate(idle[::2]):
            for weight in (attn.W_Q, attn.W_K, attn.W_V):
                weight[head] = weight[heads[k % len(heads)]]

    def _idle_mlp(self, layer: int) -> None:
        """An MLP that reads everything and writes into room."""
        mlp = cast(ToyBlock, self.model.blocks[layer]).mlp
        assert mlp is not None
        mlp.b_out.zero_()
        mlp.W_out[:, :-ROOM] = 0.0
        mlp.W_out[:, -ROOM:] = torch.randn(mlp.W_out.shape[0], ROOM, generator=self.generator) / math.sqrt(mlp.W_out.shape[0])


FIRST_LABEL = 2 + WORDS.n_items
"""Token id of l0."""


@torch.no_grad()
def idle_attention(model: ToyTransformer, layer: int, generator: torch.Generator) -> None:
    """All heads of a layer keep their random queries, keys and values and write into room."""
    w_o = cast(ToyBlock, model.blocks[layer]).attn.W_O.data
    w_o.zero_()[:, :, -ROOM:] = torch.randn(w_o.shape[0], w_o.shape[1], ROOM, generator=generator) / math.sqrt(w_o.shape[1])


@torch.no_grad()
def blank(model: ToyTransformer, layer: int, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The head's W_Q, W_K, W_V [d_model, d_head] and W_O [d_head, d_model], set to zero, to be written."""
    attn = cast(ToyBlock, model.blocks[layer]).attn
    found = tuple(weight.data[head] for weight in (attn.W_Q, attn.W_K, attn.W_V, attn.W_O))
    for weight in found:
        weight.zero_()
    return cast(tuple[Tensor, Tensor, Tensor, Tensor], found)
