"""A clean and a corrupt run of some pairs, kept for `subgraph`: what entered the stream, what every node replaced says, how attention was called."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mechicl.errors import OptionError
from mechicl.models import streams
from mechicl.models.attend import Attention
from mechicl.models.edge_graph import EdgeGraph
from mechicl.prompts.batch import Batch


@dataclass(eq=False)
class Replaced:
    """What is read where a set has no edge: every layer's stream and every sender's output, [n or 1, pos, ...], float32.

    `pre[layer]` (one more than layers: the last is the final stream), `mid[layer]`, `z[layer]`, `mlp[layer]` (zeros without an MLP). `entered[layer]`: what the model adds
    before the layer: the embeddings at layer 0, DeepStack features later, zeros [1, 1, 1] for nothing.
    """

    pre: list[Tensor]
    mid: list[Tensor]
    z: list[Tensor]
    mlp: list[Tensor]
    entered: list[Tensor]

    def map(self, change: Callable[[Tensor], Tensor]) -> Replaced:
        """The same with `change` applied to every tensor."""
        pre, mid, z, mlp, entered = ([change(x) for x in some] for some in (self.pre, self.mid, self.z, self.mlp, self.entered))
        return Replaced(pre, mid, z, mlp, entered)


@dataclass(eq=False)
class PairedRuns:
    """Both runs of a few pairs, ready for any number of sets of edges.

    Positions before `start` are the same in both runs: everything but `held` begins there. `where`: positions of the logits [n, k], counted from there.
    """

    model: Any
    graph: EdgeGraph
    attention: Attention
    replaced: Replaced
    entered: list[Tensor]
    where: Tensor
    start: int
    held: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """(layer, "q" | "k" | "v") -> what receivers without any edge hold, [n, pos, heads of that kind, d_head], every position."""

    @property
    def n(self) -> int:
        """Pairs."""
        return int(self.where.shape[0])

    @property
    def bytes(self) -> int:
        """What is kept."""
        r = self.replaced
        kept = [*r.pre, *r.mid, *r.z, *r.mlp, *r.entered, *self.entered, *self.held.values()]
        return sum(x.untyped_storage().nbytes() for x in kept)


@torch.no_grad()
def paired_runs(model: Any, clean: Batch, corrupt: Batch, where: Tensor, *, mean: Replaced | None = None) -> PairedRuns:
    """Run some pairs both ways.

    Args:
        model: A toy or a hooked production model.
        clean: Prompts.
        corrupt: As many, laid out alike.
        where: Positions of the logits that will be asked for, [n, k].
        mean: From `mean_runs`, to replace with means instead of the corrupt run.

    Raises:
        UnsupportedModelError: heads that are no summands of the stream, or attention that cannot be called by itself.
        OptionError: the batches are not laid out alike.
    """
    graph = EdgeGraph.of(model)
    check_alike(clean, corrupt)
    ours, attention = Attention(model, clean.n), Attention(model, clean.n)
    with ours.listen():
        clean_cache = _cache(model, graph, clean, whole=False)
    with attention.listen():
        cache = _cache(model, graph, corrupt, whole=True)
    if ours.differs(attention):
        raise OptionError(
            "clean and corrupt must have the same masks and the same places in rotary or ALiBi positions; theirs differ, so no single run lies between "
            "them. Make pairs that keep the layout (and pictures of one size)."
        )
    replaced = _replaced(cache, graph) if mean is None else mean.map(lambda x: x[:, -corrupt.n_pos :])
    start, n_pos = (_first_difference(clean_cache, cache, graph) if mean is None else 0), clean.n_pos
    start = min(start, int(where.min()))  # what is asked for must be there

    def cut(x: Tensor) -> Tensor:
        return x[:, start:].clone() if start and x.shape[1] == n_pos else x

    own, replaced, entered = replaced, replaced.map(cut), [cut(x) for x in _entered(clean_cache, graph)]
    runs = PairedRuns(model, graph, attention, replaced, entered, where.to(entered[0].device) - start, start)
    for layer in range(graph.n_layers):
        q, k, v, z = (cache[f"blocks.{layer}.attn.hook_{kind}"] for kind in "qkvz")
        attention.check(layer, q, k, v, z)
        for kind, value in (("q", q), ("k", k), ("v", v)):
            if mean is not None:
                value = streams.read(model, layer, kind, own.pre[layer].to(value.dtype))
            runs.held[layer, kind] = value.float().expand(clean.n, *value.shape[1:])
    return runs


def _first_difference(clean: Any, corrupt: Any, graph: EdgeGraph) -> int:
    """First position where the stream of any layer differs between the runs.

    Before it nothing differs in any set of edges either: with causal attention because it looks back; where some tokens see later ones (pictures, whole
    prompts), these show the difference in the layers behind.
    """
    names = [f"blocks.{layer}.hook_resid_{end}" for layer in range(graph.n_layers) for end in ("pre", "post")]
    apart = torch.stack([(clean[name] != corrupt[name]).any(-1).any(0) for name in names]).any(0)
    return int(apart.float().argmax()) if bool(apart.any()) else len(apart) - 1


def check_alike(clean: Batch, corrupt: Batch) -> None:
    """Raises OptionError for batches whose prompts differ in number or length."""
    if clean.n != corrupt.n or clean.n_pos != corrupt.n_pos or not torch.equal(clean.query_pos, corrupt.query_pos):
        raise OptionError(
            f"clean and corrupt must be laid out alike; got {clean.n} and {corrupt.n} prompts of {clean.n_pos} and {corrupt.n_pos} tokens. "
            "Make them with prompts.corrupt.minimal_pairs."
        )


def _cache(model: Any, graph: EdgeGraph, batch: Batch, *, whole: bool) -> Any:
    layers = range(graph.n_layers)
    names = [f"blocks.{layer}.hook_resid_{end}" for layer in layers for end in ("pre", "post")]
    if whole:
        names += [f"blocks.{layer}.attn.hook_{kind}" for layer in layers for kind in "qkvz"]
        names += [f"blocks.{layer}.{at}" for layer in layers for at in ("hook_resid_mid", "hook_mlp_out") if streams.has_mlp(model, layer)]
    return model.run_with_cache(batch, names_filter=names)[1]


def _entered(cache: Any, graph: EdgeGraph) -> list[Tensor]:
    first = cache["blocks.0.hook_resid_pre"].float()
    found = [first]
    for layer in range(1, graph.n_layers):
        added = cache[f"blocks.{layer}.hook_resid_pre"].float() - cache[f"blocks.{layer - 1}.hook_resid_post"].float()
        found.append(added if bool(added.any()) else first.new_zeros(1, 1, 1))
    return found


def _replaced(cache: Any, graph: EdgeGraph) -> Replaced:
    layers = range(graph.n_layers)
    pre = [cache[f"blocks.{layer}.hook_resid_pre"].float() for layer in layers]
    post = [cache[f"blocks.{layer}.hook_resid_post"].float() for layer in layers]
    mid = [cache[name].float() if (name := f"blocks.{layer}.hook_resid_mid") in cache else post[layer] for layer in layers]
    mlp = [cache[name].float() if (name := f"blocks.{layer}.hook_mlp_out") in cache else pre[0].new_zeros(1, 1, 1) for layer in layers]
    z = [cache[f"blocks.{layer}.attn.hook_z"].float() for layer in layers]
    return Replaced([*pre, post[-1]], mid, z, mlp, _entered(cache, graph))


@torch.no_grad()
def mean_runs(model: Any, batches: Iterable[Batch]) -> Replaced:
    """Means of every node over prompts, position by position from the end, padding left out; zeros where every prompt is padding.

    Args:
        model: A toy or a hooked production model.
        batches: The prompts to average over; the widest need not come first.
    """
    graph = EdgeGraph.of(model)
    total: Replaced | None = None
    count = torch.zeros(0)
    for batch in batches:
        mask = batch.inputs.get("attention_mask")
        real = torch.ones(batch.n, batch.n_pos) if mask is None else mask.float().cpu()
        sums = _replaced(_cache(model, graph, batch, whole=True), graph).map(lambda x, real=real: _summed(x, real))
        total = sums if total is None else _added(total, sums)
        count = _add(count[None], real.sum(0)[None])[0]
    if total is None:
        raise OptionError("batches must hold at least one prompt; got none. Average over the corrupt prompts.")
    return total.map(lambda x: x / count.clamp_min(1).to(x.device).reshape(1, -1, *(1,) * (x.dim() - 2)))


def _summed(x: Tensor, real: Tensor) -> Tensor:
    """Sum over the real tokens of each position, [1, pos, ...]."""
    x = x.expand(*real.shape, *x.shape[2:])
    weight = real.to(x.device).reshape(*real.shape, *(1,) * (x.dim() - 2)) > 0
    return torch.where(weight, x, 0.0).sum(0, keepdim=True)


def _add(a: Tensor, b: Tensor) -> Tensor:
    """Sum of [1, pos, ...], aligned at the end."""
    if a.shape[1] < b.shape[1]:
        a, b = b, a
    out = a.clone()
    out[:, a.shape[1] - b.shape[1] :] += b
    return out


def _added(a: Replaced, b: Replaced) -> Replaced:
    others = iter([*b.pre, *b.mid, *b.z, *b.mlp, *b.entered])
    return a.map(lambda x: _add(x, next(others)))  # map goes through the lists in this order
