"""The graph of a decoder: what writes into the residual stream, what reads from it, and the edges between them.

Every edge runs through the stream: a sender's output is one summand of what a receiver reads. Grouped-query attention has one receiver `k` and one `v` for
each key/value head, shared by its query heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

SenderKind = Literal["embed", "head", "mlp"]
ReceiverKind = Literal["q", "k", "v", "mlp", "logits"]


@dataclass(frozen=True, order=True)
class Sender:
    """What writes: the embeddings (pictures included), an attention head, or an MLP. `layer` is -1 for the embeddings, `head` -1 where there is none."""

    kind: SenderKind
    layer: int = -1
    head: int = -1

    @property
    def name(self) -> str:
        """ "embed", "1.3" (layer.head) or "mlp 1"."""
        return {"embed": "embed", "head": f"{self.layer}.{self.head}", "mlp": f"mlp {self.layer}"}[self.kind]


@dataclass(frozen=True, order=True)
class Receiver:
    """What reads: the queries of a head, the keys or values of a key/value head, an MLP, or the logits (`layer` = n_layers). `head` counts key/value
    heads for "k" and "v"."""

    kind: ReceiverKind
    layer: int
    head: int = -1

    @property
    def name(self) -> str:
        """ "q 1.3", "k 1.0", "v 1.0", "mlp 1" or "logits"."""
        return {"mlp": f"mlp {self.layer}", "logits": "logits"}.get(self.kind, f"{self.kind} {self.layer}.{self.head}")


@dataclass(frozen=True, order=True)
class Edge:
    """One sender's part of what one receiver reads."""

    sender: Sender
    receiver: Receiver

    @property
    def name(self) -> str:
        """ "0.1 -> k 1.3"."""
        return f"{self.sender.name} -> {self.receiver.name}"


def senders(n_layers: int, n_heads: int, *, mlps: bool = True) -> tuple[Sender, ...]:
    """All senders, in the order of execution."""
    found = [Sender("embed")]
    for layer in range(n_layers):
        found += [Sender("head", layer, head) for head in range(n_heads)]
        found += [Sender("mlp", layer)] if mlps else []
    return tuple(found)


def receivers(n_layers: int, n_heads: int, n_key_value_heads: int, *, mlps: bool = True) -> tuple[Receiver, ...]:
    """All receivers, in the order of execution; the logits last."""
    found: list[Receiver] = []
    for layer in range(n_layers):
        found += [Receiver("q", layer, head) for head in range(n_heads)]
        found += [Receiver(kind, layer, head) for kind in ("k", "v") for head in range(n_key_value_heads)]
        found += [Receiver("mlp", layer)] if mlps else []
    return (*found, Receiver("logits", n_layers))


def feeds(sender: Sender, receiver: Receiver) -> bool:
    """Whether the sender runs before the receiver reads: an MLP reads its own layer's heads, heads do not."""
    return sender.layer < receiver.layer or (sender.layer == receiver.layer and sender.kind == "head" and receiver.kind == "mlp")


def edges(some_senders: tuple[Sender, ...], some_receivers: tuple[Receiver, ...]) -> Iterator[Edge]:
    """Every edge that can exist between them, receiver by receiver."""
    return (Edge(sender, receiver) for receiver in some_receivers for sender in some_senders if feeds(sender, receiver))
