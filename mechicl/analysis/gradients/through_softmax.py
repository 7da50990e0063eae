"""Queries and keys taken through the softmax as it is, with the slope only behind the heads: where attention is sure of itself, slopes before it vanish.

A changed query or key gives changed attention and a changed head output z, computed exactly by the model's own attention; what that is worth is the change
of z times the slope of the metric at z (the correction that Kramár et al. 2024 call AtP*'s for queries and keys, here with values as they are).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mechicl.analysis.gradients.backward import values
from mechicl.analysis.gradients.edge_gradients import START, Run, between_layers, written
from mechicl.models import streams
from mechicl.models.attend import Attention
from mechicl.models.edge_graph import EdgeGraph

Softmax = Literal["slope", "exact"]
BYTES = 1 << 28
"""Queries, keys and head outputs of the changed copies of a layer, at a time."""


@dataclass(eq=False)
class Heads:
    """One run's queries, keys, values and streams, and its attention to be called again. `slopes`: layer -> gradient of the metric at z."""

    model: Any
    attention: Attention
    kept: Mapping[str, Tensor]
    slopes: Mapping[int, Tensor]
    plain: dict[int, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(model: Any, batch: Any, slopes: Mapping[int, Tensor], *, positions: Any, streams_too: bool = False) -> Heads:
        """Record the run that is started from."""
        names = [f"blocks.{layer}.attn.hook_{letter}" for layer in slopes for letter in "qkv"]
        names += [f"blocks.{layer}.hook_resid_pre" for layer in slopes] if streams_too else []
        attention = Attention(model, len(positions))
        with attention.listen():
            kept, _ = values(model, batch, names, lambda x: x, positions=positions)
        return Heads(model, attention, kept, slopes)

    def at(self, layer: int, letter: str) -> Tensor:
        """Queries, keys or values of the run [batch, pos, head, d_head]."""
        return self.kept[f"blocks.{layer}.attn.hook_{letter}"]

    @torch.no_grad()
    def worth(self, layer: int, letter: Literal["q", "k"] | str, changed: Tensor) -> Tensor:
        """What changed queries or keys of a layer [copy, batch, pos, head, d_head] are worth, [copy, batch, dest, query head], float32."""
        parts = {other: self.at(layer, other)[None] for other in "qkv"}
        if layer not in self.plain:
            self.plain[layer] = self.attention(layer, parts["q"], parts["k"], parts["v"])[0].float()
        parts = {other: given.expand(len(changed), *given.shape[1:]) for other, given in parts.items()} | {letter: changed}
        z = self.attention(layer, parts["q"], parts["k"], parts["v"]).float()
        return ((z - self.plain[layer]) * self.slopes[layer].float()).sum(-1)


def by_key_head(worth: Tensor, n_key_value_heads: int) -> Tensor:
    """[..., query head] summed over the query heads of each key/value head: a changed key is read by all of them."""
    return worth.unflatten(-1, (n_key_value_heads, -1)).sum(-1)


@torch.no_grad()
def edges_through_softmax(run: Run, heads: Heads, graph: EdgeGraph) -> Iterator[tuple[str, int, Tensor]]:
    """Every edge into the queries and keys of each layer: (kind, layer, worth [blocks * n, sender, head]).

    The sender's difference goes through the layer's norm as it is, too.
    """
    extra = between_layers(heads.model, run)
    for layer in range(graph.n_layers):
        stream = heads.kept[f"blocks.{layer}.hook_resid_pre"]
        found: dict[str, list[Tensor]] = {"q": [], "k": []}
        size = max(1, int(BYTES // (4 * stream.numel() * (1 + graph.n_heads // 8))))
        for some in _senders_before(heads.model, run, graph, layer, extra):
            for moved in (stream.float() + part for part in some.split(size)):
                flat = moved.flatten(0, 1).to(stream.dtype)
                for kind in "qk":
                    read = streams.read(heads.model, layer, kind, flat).unflatten(0, (len(moved), -1))
                    worth = heads.worth(layer, kind, read).sum(2)
                    found[kind].append(worth if kind == "q" else by_key_head(worth, graph.n_key_value_heads))
        for kind, pieces in found.items():
            yield kind, layer, torch.cat(pieces).movedim(0, 1)


def _senders_before(model: Any, run: Run, graph: EdgeGraph, layer: int, extra: Mapping[int, Tensor]) -> Iterator[Tensor]:
    """Differences of the senders that a layer reads, some at a time, in the order of the graph: [sender, batch, pos, d_model]."""
    embed = run.difference[START]
    yield (embed + sum(extra[k] for k in extra if k <= layer))[None]
    for earlier in range(layer):
        yield written(model, run, earlier)
        if graph.mlps:
            yield run.difference.get(f"blocks.{earlier}.hook_mlp_out", torch.zeros_like(embed))[None]
