"""The graph of one model as arrays: which edges can exist, which of a set carry anything.

A set of edges is a mask [receiver, sender] of truth values, in the order of `mechicl.results.nodes`; many sets are [set, receiver, sender].
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool

from mechicl.errors import OptionError, UnsupportedModelError
from mechicl.results.nodes import Edge, Receiver, Sender, feeds, receivers, senders

NEEDED = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "hook_attn_out")
"""Hook points without which the heads of a layer are no nodes of the graph."""


@dataclass(frozen=True, eq=False)
class EdgeGraph:
    """Senders, receivers and possible edges of a decoder with n_layers layers. `mlps`: whether its layers have an MLP."""

    n_layers: int
    n_heads: int
    n_key_value_heads: int
    mlps: bool

    @staticmethod
    def of(model: Any) -> EdgeGraph:
        """The graph of a model.

        Raises:
            UnsupportedModelError: heads whose outputs are not summands of the stream, or layers without softmax attention; says why.
        """
        reason = getattr(model, "not_additive", "")
        if reason:
            raise UnsupportedModelError(
                f"model must add its heads' outputs to the stream as they are; {model.cfg.model_type} does not: {reason}. "
                "Use activation patching and ablation, which need no summands."
            )
        for layer in range(model.cfg.n_layers):
            for name in NEEDED:
                if (full := f"blocks.{layer}.{name}") not in model.hook_dict:
                    why = getattr(model, "unavailable", {}).get(full, "it does not have it")
                    raise UnsupportedModelError(
                        f"model must have {full} for its graph of edges; {why}. Use activation patching on the hook points it has."
                    )
        cfg = model.cfg
        for layer, part in enumerate(getattr(getattr(model, "anatomy", None), "layers", ())):
            if (part.n_heads, part.n_key_value_heads) != (cfg.n_heads, cfg.n_key_value_heads):
                raise UnsupportedModelError(
                    f"model must have as many heads in every layer for its graph of edges; layer {layer} has {part.n_heads} and {part.n_key_value_heads} "
                    f"key/value heads, others {cfg.n_heads} and {cfg.n_key_value_heads}. Use activation patching instead."
                )
        mlps = [f"blocks.{layer}.hook_mlp_out" in model.hook_dict for layer in range(cfg.n_layers)]
        return EdgeGraph(cfg.n_layers, cfg.n_heads, cfg.n_key_value_heads, any(mlps))

    @cached_property
    def senders(self) -> tuple[Sender, ...]:
        """In the order of execution."""
        return senders(self.n_layers, self.n_heads, mlps=self.mlps)

    @cached_property
    def receivers(self) -> tuple[Receiver, ...]:
        """In the order of execution; the logits last."""
        return receivers(self.n_layers, self.n_heads, self.n_key_value_heads, mlps=self.mlps)

    @cached_property
    def sender_index(self) -> dict[Sender, int]:
        """Column of a sender."""
        return {sender: i for i, sender in enumerate(self.senders)}

    @cached_property
    def receiver_index(self) -> dict[Receiver, int]:
        """Row of a receiver."""
        return {receiver: i for i, receiver in enumerate(self.receivers)}

    @cached_property
    def possible(self) -> Bool[np.ndarray, "receiver sender"]:
        """Edges that can exist."""
        return np.array([[feeds(s, r) for s in self.senders] for r in self.receivers])

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge that can exist, receiver by receiver."""
        return self.listed(self.possible)

    @cached_property
    def inputs(self) -> tuple[tuple[int, ...], ...]:
        """For every sender the rows of the receivers that make it: q, k and v of a head (its group's), the MLP's one; () for the embeddings."""
        group = self.n_heads // self.n_key_value_heads
        found: list[tuple[int, ...]] = []
        for sender in self.senders:
            if sender.kind == "embed":
                found.append(())
            elif sender.kind == "mlp":
                found.append((self.receiver_index[Receiver("mlp", sender.layer)],))
            else:
                reads = (
                    Receiver("q", sender.layer, sender.head),
                    *(Receiver(kind, sender.layer, sender.head // group) for kind in ("k", "v")),
                )
                found.append(tuple(self.receiver_index[r] for r in reads))
        return tuple(found)

    def mask(self, edges: Collection[Edge]) -> Bool[np.ndarray, "receiver sender"]:
        """A set of edges as a mask.

        Raises:
            OptionError: an edge that the model does not have.
        """
        out = np.zeros(self.possible.shape, dtype=bool)
        for edge in edges:
            row, column = self.receiver_index.get(edge.receiver), self.sender_index.get(edge.sender)
            if row is None or column is None or not self.possible[row, column]:
                raise OptionError(
                    f"edges must be among the model's {int(self.possible.sum())}; got {edge.name}. Senders run before receivers; k and v count "
                    f"key/value heads (0..{self.n_key_value_heads - 1}); layers 0..{self.n_layers - 1}."
                )
            out[row, column] = True
        return out

    def node_mask(self, nodes: Collection[Sender]) -> Bool[np.ndarray, "receiver sender"]:
        """The node circuit: every edge between kept nodes, the embeddings and the logits; all other senders are replaced for everybody.

        Raises:
            OptionError: a node that the model does not have.
        """
        for node in nodes:
            if node not in self.sender_index:
                raise OptionError(f"nodes must be senders of the model; got {node.name}. See EdgeGraph.of(model).senders.")
        kept = {*nodes, Sender("embed")}
        columns = np.array([sender in kept for sender in self.senders])
        rows = np.zeros(len(self.receivers), dtype=bool)
        rows[-1] = True
        for sender in kept:
            rows[list(self.inputs[self.sender_index[sender]])] = True
        return self.possible & columns & rows[:, None]

    def listed(self, mask: np.ndarray) -> tuple[Edge, ...]:
        """The edges of a mask [receiver, sender], receiver by receiver."""
        return tuple(Edge(self.senders[j], self.receivers[i]) for i, j in np.argwhere(mask))

    def live(self, masks: np.ndarray) -> np.ndarray:
        """The edges of masks [..., receiver, sender] that lie on a path from the embeddings to the logits; the others change nothing and are taken out.

        A head lies on a path through its q, its k or its v. One sweep forward (what the embeddings reach) and one back (what reaches the logits) are enough:
        the second takes nothing away from a node that it keeps.
        """
        out: Any = np.logical_and(masks, self.possible).reshape(-1, *self.possible.shape)
        for column, rows in enumerate(self.inputs):
            if rows:
                out[:, :, column] &= out[:, list(rows)].any((1, 2))[:, None]
        needed = np.zeros(out.shape[:2], dtype=bool)
        needed[:, -1] = True
        for column in reversed(range(len(self.senders))):
            used = (out[:, :, column] & needed).any(1)
            for row in self.inputs[column]:
                needed[:, row] |= used
        out &= needed[:, :, None]
        return out.reshape(np.shape(masks))

    def nodes(self, mask: np.ndarray) -> tuple[Sender, ...]:
        """Senders of a mask's edges, in the order of execution."""
        used = np.any(mask, 0).tolist()
        return tuple(sender for sender, there in zip(self.senders, used, strict=True) if there)

    def masks(self, sets: Sequence[Collection[Edge]]) -> Bool[np.ndarray, "set receiver sender"]:
        """Several sets of edges."""
        return np.stack([self.mask(one) for one in sets]) if len(sets) else np.zeros((0, *self.possible.shape), dtype=bool)
