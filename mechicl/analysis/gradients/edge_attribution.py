"""`eap`: what every edge of a decoder carries, estimated by gradients in a few passes (edge attribution patching)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from mechicl.analysis.agreement import agree, choose
from mechicl.analysis.feed import progress_bar, provenance
from mechicl.analysis.gradients.differentiable import Part, Scored, gap, parts, score, share_interval
from mechicl.analysis.gradients.edge_exact import edges_exactly
from mechicl.analysis.gradients.edge_gradients import CHUNK_BYTES, START, Run, between_layers, gradients_at, received, sent, two_runs
from mechicl.analysis.gradients.through_softmax import Heads, Softmax, edges_through_softmax
from mechicl.analysis.guarded import guarded
from mechicl.analysis.patching.job import Given
from mechicl.analysis.patching.metrics import Metric
from mechicl.analysis.patching.patch import gap_between
from mechicl.analysis.patching.paths import graph_of
from mechicl.errors import OptionError
from mechicl.models.edge_graph import EdgeGraph
from mechicl.prompts.align import span_groups
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode
from mechicl.results import Agreement, Edge, EdgeScores, Receiver
from mechicl.results.patching import Direction

Method = Literal["EAP", "EAP-IG"]


@guarded
def eap(
    model: Any,
    clean: Given,
    corrupt: Batch | Sequence[Episode] | None = None,
    *,
    method: Method | str = "EAP",
    steps: int = 5,
    metric: Metric = "logit_diff",
    direction: Direction | str = "noise",
    mlps: bool = True,
    softmax: Softmax | str = "slope",
    by_span: bool = False,
    exact: int = 24,
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> EdgeScores:
    """What every edge carries, estimated by gradients: the sender's difference between the runs times the gradient at what the receiver reads.

    An edge is one summand of one receiver's input: what a head, an MLP or the embeddings add to the stream, as the queries of one head, the keys or values of
    one key/value head, an MLP or the unembedding read it, norm included. Path patching changes that summand and runs the rest of the model; here the rest is
    replaced by its slope at the start run. That costs two runs and a backward pass for all edges, and goes wrong where the model is curved on the scale of
    the change: a saturated softmax has no slope whatever is put in, so that edges into queries and keys are missed, and an edge that matters only together
    with another one has no slope either. "EAP-IG" averages slopes over runs between the two prompts, which mends saturation, not everything. So some edges
    are also run exactly: read `agreement` before the scores.

    Args:
        model: A toy or a hooked production model whose heads are summands of the stream, or have nothing but a norm before it (Gemma: a head's difference is then
            what the norm makes of its exchange alone, and heads' scores into one receiver do not add up).
        clean: Pairs, or clean prompts.
        corrupt: Corrupt prompts, row by row, every token in the same place.
        method: "EAP": slopes at the start run. "EAP-IG": mean slope over `steps` runs whose embeddings (the stream that enters layer 0: tokens with the pictures
            merged in, and a toy's code of places; and what DeepStack adds later) lie between start and other. Pictures that enter by cross-attention, and
            turned places (RoPE), are not interpolated.
        steps: Runs of EAP-IG.
        metric: See `mechicl.analysis.patching.metrics.Metric`.
        direction: "noise" starts from the clean run (what breaks when the edge carries the corrupt run: what circuits are made of), "denoise" from the corrupt one.
        mlps: Whether MLPs are nodes. Without, what they add is left to no edge.
        softmax: "slope": everything behind the receiver is replaced by its slope. "exact": edges into queries and keys go through norm and softmax as they are, and only
            what lies behind the head is a slope; a call of the layer's attention for each sender, so slower with many. Finds what a sure softmax hides.
        by_span: Also split every edge's score over the spans whose positions it runs at. Not with softmax="exact", which is not a sum over positions.
        exact: How many edges are also run exactly, for `agreement`: half of them the highest scores, half drawn at random. 0 for none.
        seed: Decides intervals and the edges that are drawn.
        batch_size: Prompts per pass.
        task: What the data are, for the record.
        progress: Show a bar.

    Returns:
        EdgeScores.

    Raises:
        UnsupportedModelError: heads that are no summands of the stream.
        OptionError: an option out of range, or clean and corrupt prompts that do not match.
        EpisodeError: the metric can score no pair.

    Source:
        Syed, Rager and Conmy 2023 (EAP); Hanna, Pezzelle and Belinkov 2024 (EAP-IG). Differs: middles of the steps instead of their ends, intervals over
        episodes, always beside exact runs.
    """
    way, start = _checked(method, direction, steps, exact, batch_size, softmax, by_span)
    whole = graph_of(model)
    graph = replace(whole, mlps=whole.mlps and mlps)
    pairs = score(model, clean, corrupt, metric)
    spans = list(span_groups(pairs.clean)) if by_span else []
    found = _sweep(model, pairs, graph, way, steps, start, spans, softmax == "exact", batch_size, progress)
    ends = (found.start, found.other) if start == "noise" else (found.other, found.start)
    possible = graph.possible.T
    raw = np.where(possible, found.raw, np.nan)
    notes = (*pairs.notes, *gap_between(*ends, pairs.contrast.unit, seed))
    value, low, high = share_interval(raw, ends[0] - ends[1], seed=seed)
    options = {
        "method": way,
        "steps": steps,
        "metric": pairs.contrast.name,
        "direction": start,
        "mlps": mlps,
        "softmax": softmax,
        "exact": exact,
        "batch_size": batch_size,
    }
    agreement = _agreement(model, pairs, graph, value, start, ends, exact, seed, batch_size, progress) if exact else None
    return EdgeScores(
        method=way, senders=graph.senders, receivers=graph.receivers, value=value, low=low, high=high, raw=raw, metric=pairs.contrast.name,
        unit=pairs.contrast.unit, direction=start, clean=ends[0], corrupt=ends[1], steps=steps if way == "EAP-IG" else 1, agreement=agreement,
        pairs=pairs.how, n=pairs.n, skipped=pairs.skipped, provenance=provenance(model, task=task, seed=seed, options=options),
        notes=notes, by_span=np.where(possible[..., None], found.split / pairs.n / gap(*ends), np.nan) if by_span else None, spans=tuple(spans),
    )  # fmt: skip


def _checked(method: str, direction: str, steps: int, exact: int, batch_size: int, softmax: str, by_span: bool) -> tuple[Method, Direction]:
    if method not in get_args(Method):
        raise OptionError(f"method must be one of {', '.join(get_args(Method))}; got {method!r}. EAP-IG is slower and closer.")
    if direction not in get_args(Direction):
        raise OptionError(f"direction must be one of {', '.join(get_args(Direction))}; got {direction!r}. noise asks what is needed.")
    if softmax not in get_args(Softmax):
        raise OptionError(f"softmax must be one of {', '.join(get_args(Softmax))}; got {softmax!r}. slope is the fast one.")
    if softmax == "exact" and by_span:
        raise OptionError("by_span must be False with softmax='exact'; got True. What a changed key is worth is no sum over positions.")
    if steps < 1 or exact < 0 or batch_size < 1:
        raise OptionError(
            f"steps and batch_size must be at least 1 and exact at least 0; got {steps}, {batch_size} and {exact}. Raise them."
        )
    return cast(Method, method), cast(Direction, direction)


class _Sums:
    """`raw` [batch, sender, receiver] and `split` [sender, receiver, span] (summed over episodes), signed towards clean; metrics [batch]."""

    def __init__(self, raw: list[np.ndarray], split: np.ndarray, start: list[np.ndarray], other: list[np.ndarray]) -> None:
        self.raw, self.split = np.concatenate(raw), split
        self.start, self.other = np.concatenate(start), np.concatenate(other)


def _sweep(
    model: Any, pairs: Scored, graph: EdgeGraph, method: Method, steps: int, direction: Direction, spans: list[str], softmax: bool, batch_size: int,
    progress: bool,
) -> _Sums:  # fmt: skip
    sign = 1.0 if direction == "denoise" else -1.0
    raw, split, starts, others = [], np.zeros(1), [], []
    bar = progress_bar(None, total=pairs.n, what=method, show=progress)
    for part in parts(model, pairs, direction, batch_size):
        run = two_runs(model, part, graph)
        groups = _one_hot(part, spans, run.metric_start.device) if spans else None
        found = sign * edge_products(model, part, run, graph, shares(method, steps), groups, softmax=softmax).double().cpu().numpy()
        raw.append(found.sum(-1))
        split = split + found.sum(0)
        starts.append(run.metric_start.double().cpu().numpy())
        others.append(run.metric_other.double().cpu().numpy())
        bar.update(part.n)
    bar.close()
    return _Sums(raw, split, starts, others)


def shares(method: Method, steps: int) -> list[float]:
    """How far from the start run's embeddings to the other's slopes are taken: 0 alone for EAP, the middles of `steps` equal parts for EAP-IG.

    Hanna et al. take the parts' ends; the middles converge faster (the midpoint rule's error falls with the square of `steps`).
    """
    return [0.0] if method == "EAP" else [(k + 0.5) / steps for k in range(steps)]


@torch.no_grad()
def edge_products(
    model: Any, part: Part, run: Run, graph: EdgeGraph, at: Sequence[float], groups: Tensor | None = None, *, softmax: bool = False
) -> Tensor:  # fmt: skip
    """Difference times slope of every edge, in the metric's unit: the change of the metric from start to other that the edge alone would make.

    Args:
        model: The model.
        part: Some pairs.
        run: Both runs of them.
        graph: The nodes.
        at: Shares of the way between the runs' embeddings to average slopes over.
        groups: One-hot [blocks * n, pos, span], to split the sum over positions; None for one sum.
        softmax: Take edges into queries and keys through the softmax.

    Returns:
        [n, sender, receiver, span] (one span without groups), float32; zero where there is no edge.
    """
    batch, n_pos, d_model = run.difference[START].shape
    n_send, heads = len(graph.senders), graph.n_heads
    total = torch.zeros(batch, n_send, len(graph.receivers), 1 if groups is None else groups.shape[-1], device=run.metric_start.device)
    extra, at_z = between_layers(model, run), dict[int, Tensor]()
    size = max(1, CHUNK_BYTES // (4 * batch * n_send * d_model))
    for share in at:
        slope = gradients_at(model, part, run, share, graph, outputs=softmax)
        for layer in range(graph.n_layers) if softmax else ():
            at_z[layer] = at_z.get(layer, 0) + slope.gradients[f"blocks.{layer}.attn.hook_z"].float() / len(at)
        final = slope.gradients[f"blocks.{graph.n_layers - 1}.hook_resid_post"].float()
        for first in range(0, n_pos, size):
            where = slice(first, min(first + size, n_pos))
            some = None if groups is None else groups[:, where]
            differences = sent(model, run, graph, where)
            for layer in range(graph.n_layers):
                if layer in extra:  # what DeepStack adds is the embeddings' too
                    differences[0] += extra[layer][:, where]
                column = layer * (heads + 2 * graph.n_key_value_heads + graph.mlps)
                for kind, gradient in received(model, slope, layer, where):
                    before = 1 + layer * (heads + graph.mlps) + (heads if kind == "mlp" else 0)
                    total[:, :before, column : column + len(gradient)] += _product(differences[:before], gradient, some)
                    column += len(gradient)
            total[:, :, -1:] += _product(differences, final[None, :, where], some)
    total /= len(at)
    if softmax:
        for kind, layer, worth in edges_through_softmax(
            run, Heads.of(model, part.start, at_z, positions=part.positions, streams_too=True), graph
        ):
            column = graph.receiver_index[Receiver(cast(Any, kind), layer, 0)]
            total[:, : worth.shape[1], column : column + worth.shape[2], 0] = worth
    return part.per_prompt(total)


def _product(differences: Tensor, gradients: Tensor, groups: Tensor | None) -> Tensor:
    """[sender, batch, n, d_model] times [receiver, batch, n, d_model], summed over d_model and positions: [batch, sender, receiver, span], in float32."""
    if groups is None:
        return torch.einsum("sbpd,rbpd->bsr", differences, gradients)[..., None]
    return torch.einsum("bpsr,bpg->bsrg", torch.einsum("sbpd,rbpd->bpsr", differences, gradients), groups)


def _one_hot(part: Part, spans: list[str], device: torch.device) -> Tensor:
    """[blocks * n, pos, span]: which span a position belongs to."""
    masks = span_groups(part.start)
    nothing = torch.zeros(part.start.n, part.start.n_pos, dtype=torch.bool)
    return torch.stack([masks.get(name, nothing) for name in spans], -1).float().to(device)


def _agreement(
    model: Any, pairs: Scored, graph: EdgeGraph, value: np.ndarray, direction: Direction, ends: tuple[np.ndarray, np.ndarray], exact: int, seed: int,
    batch_size: int, progress: bool,
) -> Agreement:  # fmt: skip
    """Some edges, run exactly."""
    cells, drawn = choose(value, exact - exact // 2, exact // 2, seed=seed)
    where = [np.unravel_index(i, value.shape) for i in cells]
    chosen = [Edge(graph.senders[i], graph.receivers[j]) for i, j in where]
    changed = edges_exactly(model, pairs, chosen, direction, batch_size=batch_size, progress=progress)
    sign = 1.0 if direction == "denoise" else -1.0
    return agree(
        [edge.name for edge in chosen], sign * changed.mean(0) / gap(*ends), [value[i, j] for i, j in where], drawn, n_possible=int((~np.isnan(value)).sum()),
        cells="edges",
    )  # fmt: skip
