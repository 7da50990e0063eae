"""Single edges, run exactly: what the estimates of `eap` are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechicl.analysis.feed import progress_bar
from mechicl.analysis.gradients.differentiable import Part, Scored, parts
from mechicl.analysis.gradients.edge_gradients import START, Run, between_layers, two_runs, written
from mechicl.analysis.guarded import guarded
from mechicl.analysis.patching.paths import graph_of
from mechicl.errors import OptionError
from mechicl.models import streams
from mechicl.models.resuming.resume import Cell, Recorded, record, run_cells
from mechicl.results import Edge, Receiver
from mechicl.results.nodes import feeds
from mechicl.results.patching import Direction


@torch.no_grad()
@guarded
def edges_exactly(
    model: Any, pairs: Scored, edges: Sequence[Edge], direction: Direction, *, batch_size: int = 8, progress: bool = False
) -> np.ndarray:
    """Each edge alone taken from the other run; everything behind its receiver is computed anew.

    Args:
        model: A model whose heads are summands of the stream.
        pairs: Scored pairs.
        edges: Any edges of the model.
        direction: Which run is started from.
        batch_size: Prompts at a time.
        progress: Show a bar.

    Returns:
        The metric minus that of the start run, [batch, edge].

    Raises:
        OptionError: an edge that cannot exist.
    """
    if bad := [edge for edge in edges if not feeds(edge.sender, edge.receiver)]:
        raise OptionError(f"edges must run from a sender to a later receiver; got {bad[0].name}. See mechicl.results.nodes.edges.")
    graph, found = graph_of(model), []
    bar = progress_bar(None, total=pairs.n, what="edges run exactly", show=progress)
    for part in parts(model, pairs, direction, batch_size):
        run = two_runs(model, part, graph)
        recorded = record(model, part.start, positions=part.positions)
        found.append(_some(model, part, run, recorded, edges).double().cpu().numpy())
        bar.update(part.n)
    bar.close()
    return np.concatenate(found)


def _some(model: Any, part: Part, run: Run, recorded: Recorded, edges: Sequence[Edge]) -> Tensor:
    """[n, edge]."""
    cells, where = [], []
    out = torch.zeros(part.n, len(edges), device=run.metric_start.device)
    start = part.measure(recorded.logits)
    for k, edge in enumerate(edges):
        if edge.receiver.kind == "logits":
            out[:, k] = part.measure(_logits(model, run, recorded, edge)) - start
        else:
            cells.append(_cell(model, run, recorded, edge))
            where.append(k)
    for k, value in zip(where, run_cells(recorded, cells, lambda logits, _: part.measure(logits)), strict=True):
        out[:, k] = value - start
    return out


def difference(model: Any, run: Run, edge: Edge) -> Tensor:
    """What the edge changes in what its receiver reads, [blocks * n, pos, d_model], float32."""
    sender = edge.sender
    if sender.kind == "embed":
        found = run.difference[START]
        return found + sum(extra for layer, extra in between_layers(model, run).items() if layer <= edge.receiver.layer)
    if sender.kind == "mlp":
        return run.difference.get(f"blocks.{sender.layer}.hook_mlp_out", torch.zeros_like(run.difference[START]))
    return written(model, run, sender.layer)[sender.head]


def _moved(stream: Tensor, by: Tensor) -> Tensor:
    return (stream.float() + by).to(stream.dtype)


def _logits(model: Any, run: Run, recorded: Recorded, edge: Edge) -> Tensor:
    final = recorded.pre(model.cfg.n_layers)
    index = recorded.positions.to(final.device)[..., None].expand(-1, -1, final.shape[-1])
    return streams.unembed(model, _moved(final, difference(model, run, edge)).gather(1, index))


def _cell(model: Any, run: Run, recorded: Recorded, edge: Edge) -> Cell:
    """The run in which one receiver reads something else."""
    receiver = edge.receiver
    if receiver.kind == "mlp":
        written = streams.mlp(model, receiver.layer, _moved(recorded.mid(receiver.layer), difference(model, run, edge)))
        return Cell(receiver.layer, "mid", edits={f"blocks.{receiver.layer}.hook_mlp_out": lambda x: written.to(x.dtype)})
    entered = _moved(recorded.pre(receiver.layer), difference(model, run, edge))
    read = streams.read(model, receiver.layer, receiver.kind, entered)[:, :, receiver.head]
    return Cell(receiver.layer, edits={f"blocks.{receiver.layer}.attn.hook_{receiver.kind}": _one_head(receiver, read)})


def _one_head(receiver: Receiver, read: Tensor) -> Callable[[Tensor], Tensor]:
    def edit(x: Tensor) -> Tensor:
        out = x.clone()
        out[:, :, receiver.head] = read.to(x.dtype)
        return out

    return edit
