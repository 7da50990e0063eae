"""A model in which only some edges carry the clean run: many sets of edges at once, exact.

Every sender's output is a summand of the residual stream, so what a receiver reads is the corrupt run's stream plus, for every edge of the set, the change of
that sender's output between this run and the corrupt one. Norms are applied to that sum, anew. Attention is the model's own, called with the queries, keys
and values that the receivers made.

Sets that agree on all layers so far share one computation (a sweep over single edges repeats only what lies behind the edge), receivers with the same edges
are read once, and edges on no path from the embeddings to the logits are left out first: nothing changes along them. A set that keeps or drops whole nodes is
therefore as cheap as an ablation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mechicl.errors import OptionError
from mechicl.models import streams
from mechicl.models.edge_graph import EdgeGraph
from mechicl.models.subgraph_pairs import PairedRuns, check_alike, mean_runs, paired_runs
from mechicl.prompts.batch import Batch
from mechicl.results.circuits import Replacement
from mechicl.results.nodes import Edge, Receiver, Sender

Sets = Sequence[Collection[Edge]] | np.ndarray
"""Sets of edges, or masks [set, receiver, sender] in the order of `EdgeGraph.of(model)`."""

MEMORY = 512 * 2**20
"""Bytes that one block of sets may take, unless asked otherwise."""


def run_subgraph(
    model: Any,
    clean: Batch,
    corrupt: Batch,
    sets: Sets,
    *,
    replacement: Replacement | str = "resample",
    positions: Any = "last",
    reduce: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 8,
    memory: int = MEMORY,
) -> Tensor:
    """Logits of the model with only some edges carrying the clean run, for each set of edges.

    A receiver reads, for each sender, its output in this run if the edge is in the set, else its output in the corrupt run ("resample") or its mean over the
    corrupt runs ("mean"). The run starts from the clean embeddings. All edges: the clean run. No edges: the corrupt run (or the run of the means). A node that
    no path from the embeddings reaches is replaced whole, for everybody.

    In float32 these identities hold within 1e-5. Streams are summed in float32 whatever the model's type; a half-precision model rounds its own sums, so that all edges
    differ from its clean run by that rounding (0.05 in logits of tiny bfloat16 models): compare sets of edges with one another, as `CircuitRuns` does.

    Args:
        model: A `ToyTransformer`, or a `HookedVLM` whose heads are added to the stream as they are.
        clean: Prompts.
        corrupt: As many, token for token in the same places.
        sets: Sets of edges, or masks.
        replacement: What an edge outside the set carries.
        positions: "last" (k = 1), or a LongTensor [k] or [n, k].
        reduce: From logits [some sets, some prompts, k, vocab] to what is kept of them, [some sets, some prompts, ...]. Large vocabularies need it.
        batch_size: Prompts at once.
        memory: Bytes for one block of sets.

    Returns:
        [set, n, k, vocab], or [set, n, ...] with `reduce`; on the model's device.

    Raises:
        UnsupportedModelError: heads that are no summands of the stream, or attention that cannot be called by itself; says why.
        OptionError: an edge that the model does not have, or batches that do not match.
    """
    masks = sets if isinstance(sets, np.ndarray) else EdgeGraph.of(model).masks(sets)
    check_alike(clean, corrupt)
    check_replacement(replacement)
    if batch_size < 1:
        raise OptionError(f"batch_size must be at least 1; got {batch_size}. Choose how many pairs go through the model at once.")
    parts = [range(start, min(start + batch_size, clean.n)) for start in range(0, clean.n, batch_size)]
    mean = mean_runs(model, (_some(corrupt, rows) for rows in parts)) if replacement == "mean" else None
    found = []
    for rows in parts:
        one, other = _some(clean, rows), _some(corrupt, rows)
        runs = paired_runs(model, one, other, _positions(positions, clean, one, rows), mean=mean)
        found.append(run_sets(runs, masks, reduce=reduce, memory=memory))
    return torch.cat(found, 1)


def check_replacement(replacement: str) -> None:
    """Raises OptionError for a replacement that does not exist."""
    if replacement not in get_args(Replacement):
        raise OptionError(
            f"replacement must be one of {', '.join(get_args(Replacement))}; got {replacement!r}. resample keeps activations in distribution."
        )


def _some(batch: Batch, rows: range) -> Batch:
    return batch if len(rows) == batch.n else batch.select(rows)


def _positions(positions: Any, whole: Batch, batch: Batch, rows: range) -> Tensor:
    """Positions [n, k] of these prompts; given ones count in the whole batch, whose padding on the left may be wider."""
    if isinstance(positions, str):
        if positions != "last":
            raise OptionError(f'positions must be "last" or a tensor of positions; got {positions!r}. Ask for the ones you read.')
        return batch.query_pos[:, None]
    where = torch.as_tensor(positions)
    where = where[list(rows)] if where.dim() == 2 else where[None].expand(len(rows), -1)
    from_end = where % whole.n_pos - whole.n_pos
    if int(from_end.min()) < -batch.n_pos:
        raise OptionError(f"positions must not be padding; got {positions}. Count from the end with negative numbers.")
    return from_end + batch.n_pos


@torch.no_grad()
def run_sets(runs: PairedRuns, masks: np.ndarray, *, reduce: Callable[[Tensor], Tensor] | None = None, memory: int = MEMORY) -> Tensor:
    """`run_subgraph` on recorded runs, for masks [set, receiver, sender].

    Raises:
        OptionError: masks of another shape.
    """
    graph = runs.graph
    if masks.ndim != 3 or masks.shape[1:] != graph.possible.shape or not len(masks):
        raise OptionError(
            f"masks must be [set, receiver, sender] with {graph.possible.shape} receivers and senders and at least one set; got {masks.shape}."
        )
    live = graph.live(masks.astype(bool))
    # sorting by the first layers' edges puts sets side by side that share the most computation
    packed, inverse = np.unique(np.packbits(live.reshape(len(live), -1), axis=1), axis=0, return_inverse=True)
    first = np.zeros(len(packed), dtype=int)
    first[inverse.ravel()] = np.arange(len(live))
    live = live[first]
    size = max(1, int(memory // _bytes_per_set(runs, live)))
    found = [_Block(runs, live[start : start + size]).run(reduce) for start in range(0, len(live), size)]
    return torch.cat(found)[torch.as_tensor(inverse.ravel(), device=found[0].device)]


def _bytes_per_set(runs: PairedRuns, live: np.ndarray) -> float:
    """About what one more set costs: changes of its senders, its streams, its queries, keys and values, its attention."""
    n, n_pos, d_model = runs.entered[0].shape
    heads = runs.graph.n_heads + 2 * runs.graph.n_key_value_heads
    senders = int(live.any(1).sum(1).max())
    return (
        4.0
        * n
        * n_pos
        * (d_model * (senders + runs.graph.n_heads + 6) + 4 * heads * runs.held[0, "q"].shape[-1] + 3 * runs.graph.n_heads * n_pos)
    )


@dataclass(eq=False)
class _Block:
    """One block of sets on its way through the layers.

    `state[set]`: which computation so far a set shares; sets with the same edges up to here have the same. `changes[sender]`: (outputs minus replaced ones
    [c, n, pos, d_model], row of every set in them, -1 for no change).
    """

    runs: PairedRuns
    masks: np.ndarray
    state: np.ndarray = field(init=False)
    changes: dict[int, tuple[Tensor, np.ndarray]] = field(default_factory=dict)
    embed: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.state = np.zeros(len(self.masks), dtype=int)
        self.embed = torch.zeros_like(self.runs.entered[0])
        self.used = np.any(self.masks, (0, 1)).tolist()
        self.model, self.graph = self.runs.model, self.runs.graph
        self.dtype = self.model.cfg.dtype

    def run(self, reduce: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Logits [set, n, k, vocab], reduced."""
        for layer in range(self.graph.n_layers):
            self.embed = self.embed + (self.runs.entered[layer] - self.runs.replaced.entered[layer])
            self._heads(layer)
            if self.graph.mlps and streams.has_mlp(self.model, layer):
                self._mlp(layer)
        final = self._at(self.runs.replaced.pre[-1])
        rows, chosen = self._split([len(self.graph.receivers) - 1])
        stream = self._sum(final, self.masks[chosen, -1], chosen, asked=True)
        logits = streams.unembed(self.model, stream.flatten(0, 1).to(self.dtype)).unflatten(0, stream.shape[:2])
        kept = logits if reduce is None else reduce(logits)
        return kept[torch.as_tensor(rows, device=kept.device)]

    def _split(self, receivers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """New states by the edges into these receivers: the state of every set, and a set of every state."""
        key = np.packbits(self.masks[:, list(receivers)].reshape(len(self.masks), -1), axis=1)
        _, chosen, state = np.unique(np.column_stack([self.state[:, None], key]), axis=0, return_index=True, return_inverse=True)
        return state.ravel(), chosen

    def _heads(self, layer: int) -> None:
        rows = {kind: self._rows(kind, layer) for kind in ("q", "k", "v")}
        together = [row for some in rows.values() for row in some]
        if not self.masks[:, together].any():
            return
        self.state, chosen = self._split(together)
        active = self.masks[chosen][:, together].any((1, 2))
        chosen = chosen[active]
        q, k, v = (self._read(kind, layer, rows[kind], chosen) for kind in ("q", "k", "v"))
        z = self.runs.attention(layer, q, k, v)[:, :, self.runs.start :].float() - self.runs.replaced.z[layer]
        change = streams.head_outputs(self.model, layer, z.to(self.dtype)).float()
        row = np.where(active, np.cumsum(active) - 1, -1)[self.state]
        for head in range(self.graph.n_heads):
            column = self.graph.sender_index[Sender("head", layer, head)]
            if self.used[column]:
                self.changes[column] = (change[..., head, :], row)

    def _read(self, kind: Literal["q", "k", "v"], layer: int, rows: list[int], chosen: np.ndarray) -> Tensor:
        """What the receivers of one kind hold, [state, n, every pos, head, d_head]; those with the same edges are read once."""
        held = self.runs.held[layer, kind]
        out = held.expand(len(chosen), *held.shape).clone()
        masks = self.masks[chosen][:, rows]
        state, head = np.nonzero(masks.any(-1))
        if not len(state):
            return out.to(self.dtype)
        key = np.column_stack([state.astype(np.int64), np.packbits(masks[state, head], axis=1)])
        _, first, which = np.unique(key, axis=0, return_index=True, return_inverse=True)
        stream = self._sum(self.runs.replaced.pre[layer], masks[state[first], head[first]], chosen[state[first]])
        value = streams.read(self.model, layer, kind, stream.flatten(0, 1).to(self.dtype)).unflatten(0, stream.shape[:2]).float()
        to = [torch.as_tensor(x, device=out.device) for x in (state, head, which.ravel())]
        out[:, :, self.runs.start :][to[0], :, :, to[1]] = value[to[2], :, :, to[1]]
        return out.to(self.dtype)

    def _mlp(self, layer: int) -> None:
        row = self.graph.receiver_index[Receiver("mlp", layer)]
        column = self.graph.sender_index[Sender("mlp", layer)]
        if not self.masks[:, row].any():
            return
        self.state, chosen = self._split([row])
        active = self.masks[chosen, row].any(1)
        chosen = chosen[active]
        stream = self._sum(self.runs.replaced.mid[layer], self.masks[chosen, row], chosen)
        out = streams.mlp(self.model, layer, stream.flatten(0, 1).to(self.dtype)).unflatten(0, stream.shape[:2]).float()
        self.changes[column] = (out - self.runs.replaced.mlp[layer], np.where(active, np.cumsum(active) - 1, -1)[self.state])

    def _sum(self, base: Tensor, masks: np.ndarray, sets: np.ndarray, *, asked: bool = False) -> Tensor:
        """The stream [row, n, pos, d_model] that a receiver with the edges masks[row] reads in set sets[row]. `asked`: only where logits are read."""
        out = base.expand(len(masks), self.runs.n, *base.shape[1:]).clone()
        for column in np.nonzero(masks.any(0))[0]:
            rows = np.nonzero(masks[:, column])[0]
            if self.graph.senders[column].kind == "embed":
                out[torch.as_tensor(rows, device=out.device)] += self._at(self.embed) if asked else self.embed
                continue
            change, row = self.changes[int(column)]
            source = row[sets[rows]]
            rows, source = (torch.as_tensor(x[source >= 0], device=out.device) for x in (rows, source))
            out[rows] += (self._at(change) if asked else change)[source]
        return out

    def _at(self, x: Tensor) -> Tensor:
        """The asked positions of x [..., n or 1, pos, d_model]."""
        where = self.runs.where[..., None].expand(*x.shape[:-3], -1, -1, x.shape[-1])
        return x.expand(*x.shape[:-3], self.runs.n, *x.shape[-2:]).gather(-2, where)

    def _rows(self, kind: Literal["q", "k", "v"], layer: int) -> list[int]:
        heads = self.graph.n_heads if kind == "q" else self.graph.n_key_value_heads
        return [self.graph.receiver_index[Receiver(kind, layer, head)] for head in range(heads)]
