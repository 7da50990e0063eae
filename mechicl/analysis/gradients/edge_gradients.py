"""What EAP multiplies: every sender's difference between two runs, and the gradient of the metric with respect to what every receiver reads.

Both are positions of the residual stream [batch, pos, d_model], and reading is position by position, so that everything here runs over a few positions at
a time: at 36 layers of 16 heads the senders' differences at 1,500 tokens would take 7 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechicl.analysis.gradients.backward import Edit, Slopes, frozen, slopes, values
from mechicl.analysis.gradients.differentiable import Part
from mechicl.analysis.patching.path_runs import NORM_TOLERANCE, behind_norm
from mechicl.errors import UnsupportedModelError
from mechicl.models import streams
from mechicl.models.edge_graph import EdgeGraph

START = "blocks.0.hook_resid_pre"
"""What the sender "embed" writes: token embeddings, pictures, and in toys the code of places. Later additions of the picture (DeepStack) count as its too."""

CHUNK_BYTES = 1 << 29
"""Senders' differences in memory at a time."""


@dataclass(frozen=True, eq=False)
class Run:
    """Both runs of some pairs, seen from the one that is started from: `start`, `difference` (other - start, float32) by hook name, metrics [batch]."""

    start: Mapping[str, Tensor]
    difference: Mapping[str, Tensor]
    metric_start: Tensor
    metric_other: Tensor


def added(model: Any) -> list[int]:
    """Layers before which the model may add something to the stream that no layer wrote (DeepStack)."""
    return list(range(1, model.cfg.n_layers)) if getattr(getattr(model, "family", None), "deepstack", False) else []


def sender_names(model: Any, graph: EdgeGraph) -> list[str]:
    """Hook points that hold what senders write, and what is added between layers."""
    layers = range(graph.n_layers)
    names = [START, *(f"blocks.{layer}.attn.hook_z" for layer in layers)]
    names += [name for layer in layers if (name := f"blocks.{layer}.hook_mlp_out") in model.hook_dict]
    names += [f"blocks.{layer}.hook_attn_out" for layer in layers if behind_norm(model, layer)]
    for layer in added(model):
        names += [f"blocks.{layer - 1}.hook_resid_post", f"blocks.{layer}.hook_resid_pre"]
    return list(dict.fromkeys(names))


def two_runs(model: Any, part: Part, graph: EdgeGraph) -> Run:
    """Run both prompts of each pair and keep what the senders write."""
    names = sender_names(model, graph)
    at_start, metric_start = values(model, part.start, names, part.measure, positions=part.positions)
    at_other, metric_other = values(model, part.other, names, part.measure, positions=part.other_positions)
    difference = {name: part.alignment.apply(at_other[name]).float() - at_start[name].float() for name in names}
    return Run(at_start, difference, metric_start, metric_other)


def between_layers(model: Any, run: Run) -> dict[int, Tensor]:
    """Layer -> the difference of what the model adds to the stream just before it (other - start)."""
    found = {}
    for layer in added(model):
        now = run.difference[f"blocks.{layer}.hook_resid_pre"] - run.difference[f"blocks.{layer - 1}.hook_resid_post"]
        if bool(now.abs().max() > 1e-6 * run.difference[START].abs().max().clamp_min(1e-30)):
            found[layer] = now
    return found


def gradients_at(model: Any, part: Part, run: Run, share: float, graph: EdgeGraph, *, outputs: bool = False) -> Slopes:
    """Gradients at every head's q, k and v (`outputs`: and z), at the MLPs' outputs and at the final stream, in the run whose embeddings lie `share` of the way to the other's."""
    layers = range(graph.n_layers)
    names = [f"blocks.{layer}.attn.hook_{letter}" for layer in layers for letter in ("qkvz" if outputs else "qkv")]
    mlps = [layer for layer in layers if graph.mlps and f"blocks.{layer}.hook_mlp_out" in model.hook_dict]
    names += [*(f"blocks.{layer}.hook_mlp_out" for layer in mlps), f"blocks.{graph.n_layers - 1}.hook_resid_post"]
    also = [*(f"blocks.{layer}.hook_resid_pre" for layer in layers), *(f"blocks.{layer}.hook_resid_mid" for layer in mlps)]
    edits: dict[str, Edit] = {}
    if share:
        edits[START] = _moved(run.difference[START], share)
        for layer, extra in between_layers(model, run).items():
            edits[f"blocks.{layer}.hook_resid_pre"] = _moved(extra, share)
    return slopes(model, part.start, names, part.measure, positions=part.positions, edits=edits, also=also)


def _moved(difference: Tensor, share: float) -> Edit:
    return lambda x: (x.float() + share * difference).to(x.dtype)


def sent(model: Any, run: Run, graph: EdgeGraph, where: slice) -> Float[Tensor, "sender batch n d_model"]:
    """Every sender's difference in the stream at the positions `where`, float32, in the order of `graph.senders`."""
    found = [run.difference[START][None, :, where]]
    for layer in range(graph.n_layers):
        found.append(written(model, run, layer, where))
        if graph.mlps:
            mlp = run.difference.get(f"blocks.{layer}.hook_mlp_out")
            found.append(torch.zeros_like(found[0]) if mlp is None else mlp[None, :, where])
    return torch.cat(found)


def written(model: Any, run: Run, layer: int, where: slice = slice(None)) -> Float[Tensor, "head batch n d_model"]:
    """What each head of a layer adds to the stream in the other run, less what it adds in the start run, at the positions `where`, float32.

    Where a norm stands between heads and stream, what it makes of all heads' sum with this one exchanged, less what it makes of the sum as it was.

    Raises:
        UnsupportedModelError: something other than a norm stands there.
    """
    name = f"blocks.{layer}.attn.hook_z"
    z, difference = run.start[name][:, where], run.difference[name][:, where]
    if not behind_norm(model, layer):
        return streams.head_outputs(model, layer, difference.to(z.dtype)).movedim(2, 0).float()
    part = model.anatomy.layers[layer]
    before = part.attn_out(part.o_proj(z.flatten(2))).float()
    recorded = run.start[f"blocks.{layer}.hook_attn_out"][:, where].float()
    if float((before - recorded).abs().max()) > NORM_TOLERANCE * float(recorded.abs().max()):
        raise UnsupportedModelError(
            f"layer {layer} of {model.cfg.model_type} must put nothing but a norm between its heads and the stream; it does. Use activation patching."
        )
    own = torch.eye(z.shape[2], device=z.device)[:, None, None, :, None]
    exchanged = (z.float() + own * difference).to(z.dtype)  # [head, batch, n, head, d_head]
    return torch.stack([part.attn_out(part.o_proj(one.flatten(2))).float() - before for one in exchanged])


def received(model: Any, at: Slopes, layer: int, where: slice) -> Iterator[tuple[str, Float[Tensor, "receiver batch n d_model"]]]:
    """For each kind of receiver of a layer the gradient of the metric with respect to what each receiver of that kind reads, float32."""
    stream = at.values[f"blocks.{layer}.hook_resid_pre"][:, where]
    for kind in "qkv":
        gradient = at.gradients[f"blocks.{layer}.attn.hook_{kind}"][:, where]
        yield kind, pulled_back(model, lambda x, kind=kind: streams.read(model, layer, kind, x), stream, gradient)
    name = f"blocks.{layer}.hook_mlp_out"
    if name in at.gradients:
        middle = at.values[f"blocks.{layer}.hook_resid_mid"][:, where]
        gradient = at.gradients[name][:, where][:, :, None]
        yield "mlp", pulled_back(model, lambda x: streams.mlp(model, layer, x)[:, :, None], middle, gradient)


def pulled_back(model: Any, read: Callable[[Tensor], Tensor], stream: Tensor, gradient: Tensor) -> Float[Tensor, "head batch n d_model"]:
    """The gradient at what each head reads from the stream, apart: through the layer's norm and everything else that `read` does.

    Args:
        model: Its weights are held fixed.
        read: The stream [batch, n, d_model] -> [batch, n, head, d_head].
        stream: Where to take the derivative.
        gradient: The gradient at what was read, [batch, n, head, d_head].
    """
    with frozen(model), torch.enable_grad():
        entered = stream.detach().requires_grad_(True)
        out = read(entered)
        n_heads = out.shape[2]
        # one row of cotangents for each head: its own gradient, and nothing for the others
        own = torch.eye(n_heads, dtype=out.dtype, device=out.device)[:, None, None, :, None]
        (found,) = torch.autograd.grad(out, entered, own * gradient.to(out.dtype), is_grads_batched=True)
    return found.float()
