"""Where the parts of a model are, found by running it once on a few tokens and comparing tensors, not by names.

For every decoder layer: which module's output is added to the residual stream after attention and after the MLP, which norm reads the stream
between them, which projection made the values, which one takes the heads back. What a layer does not have, or does in a way that a hook could
not honour (a gate or a scale between sublayer and stream), is listed with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mechicl.errors import UnsupportedModelError
from mechicl.models.attention import AttentionCall, AttentionSession, attention_session, fused
from mechicl.models.unembedding import Unembedding, head_of, inspect_unembedding

Layout = Literal["flat", "bshd", "bhsd"]
"""How a projection's output carries the heads: [batch, pos, head * d_head], [batch, pos, head, d_head] or [batch, head, pos, d_head]."""

LAYER_LISTS = ("layers", "layer", "h", "blocks", "resblocks")
NOT_DECODER = ("vision", "visual", "image", "audio", "vq", "qformer")
NOT_VISION = ("audio", "qformer", "text", "language_model", "video_tower")
STREAM_NAMES = ("hidden_states", "hidden_state", "hidden_state_in", "inputs_embeds", "x")
"""What layers call the residual stream among their keyword arguments."""


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


def first_tensor(x: Any) -> Tensor | None:
    """The tensor in a module's output: itself, or the first element of a tuple."""
    if isinstance(x, Tensor):
        return x
    return x[0] if isinstance(x, tuple | list) and x and isinstance(x[0], Tensor) else None


def stream_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The residual stream among a layer's arguments."""
    name = stream_name(kwargs)
    return kwargs[name] if name else (args[0] if args and isinstance(args[0], Tensor) else None)


def stream_name(kwargs: Mapping[str, Any]) -> str:
    """The keyword that holds the residual stream; "" where it comes by position."""
    return next((name for name in STREAM_NAMES if isinstance(kwargs.get(name), Tensor)), "")


def decoder_layers(hf: nn.Module) -> nn.ModuleList:
    """The decoder's list of layers.

    Raises:
        UnsupportedModelError: none found.
    """
    decoder = hf.get_decoder() if hasattr(hf, "get_decoder") else None  # type: ignore[operator]
    for name, module in decoder.named_modules() if isinstance(decoder, nn.Module) else ():
        parts = name.lower().split(".")
        if (
            isinstance(module, nn.ModuleList)
            and parts[-1] in LAYER_LISTS
            and not any(word in part for part in parts for word in NOT_DECODER)
        ):
            return module
    raise UnsupportedModelError(
        f"model must have a decoder with a list of layers; {type(hf).__name__} shows none. Pass a Hugging Face image-text-to-text model."
    )


def vision_layers(hf: nn.Module, decoder: nn.ModuleList) -> tuple[nn.Module, ...]:
    """The vision tower's layers, every tower stage in order; () where there is none."""
    inside = {id(m) for m in decoder.modules()}
    found: list[nn.Module] = []
    for name, module in hf.named_modules():
        parts = name.lower().split(".")
        known = {id(x) for layer in found for x in layer.modules()} | inside
        if not isinstance(module, nn.ModuleList) or parts[-1] not in LAYER_LISTS or id(module) in known or len(module) == 0:
            continue
        if id(module[0]) not in known and not any(word in part for part in parts for word in NOT_VISION):
            found.extend(module)
    return tuple(found)


@dataclass
class Recording:
    """What went in and out of the recorded modules, in order of the calls."""

    inputs: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    order: list[nn.Module] = field(default_factory=list)
    calls: dict[int, AttentionCall] = field(default_factory=dict)
    attention_outputs: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if id(module) not in self.outputs:
            self.order.append(module)
        entered, left = stream_input(args, kwargs), first_tensor(output)
        if entered is not None:
            self.inputs[id(module)] = entered.detach().clone()
        if left is not None:
            self.outputs[id(module)] = left.detach().clone()


def record_pass(hf: nn.Module, layers: nn.ModuleList, run: Callable[[], Any], configs: list[Any]) -> Recording:
    """Run the model once and keep what went into and came out of every module of the decoder's layers."""
    recording = Recording()
    inside = {id(m) for m in layers.modules()}

    def handler(call: AttentionCall) -> Tensor:
        out = fused(call)
        if id(call.module) in inside:
            recording.calls[id(call.module)] = call
            recording.attention_outputs[id(call.module)] = out.detach()
        return out

    handles = [m.register_forward_hook(recording.hook, with_kwargs=True) for m in layers.modules()]
    handles.append(head_of(hf).register_forward_hook(recording.hook, with_kwargs=True))
    norms = [m for m in hf.get_decoder().modules() if "norm" in type(m).__name__.lower() and id(m) not in inside]  # type: ignore[operator]
    handles += [m.register_forward_hook(recording.hook, with_kwargs=True) for m in norms]
    try:
        with attention_session(AttentionSession({}, default=handler), configs), torch.no_grad():
            recording.logits = getattr(run(), "logits", None)
    finally:
        for handle in handles:
            handle.remove()
    return recording


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.numel() != b.numel() or a.shape[-1] != b.shape[-1]:
        return False
    a, b = a.float().reshape(b.shape), b.float()  # some layers flatten batch and positions on the way
    tolerance = 1e-5 * float(b.abs().max().clamp_min(1e-6))
    return bool((a - b).abs().max() <= tolerance)


def _projection(
    recording: Recording, modules: list[nn.Module], n_heads: int, d_head: int, value: Tensor | None = None
) -> Projection | None:
    """The last of `modules` whose output carries [batch, pos, head, d_head]; it must equal `value` [batch, head, pos, d_head] if given."""
    for module in reversed(modules):
        out = recording.outputs.get(id(module))
        if out is None or out.shape[-1] not in (d_head, n_heads * d_head):
            continue
        layout: Layout | None = None
        if out.dim() == 3 and out.shape[-1] == n_heads * d_head:
            layout = "flat"
        elif out.dim() == 4 and out.shape[1] == n_heads:
            layout = "bhsd"
        elif out.dim() == 4 and out.shape[2] == n_heads:
            layout = "bshd"
        if layout is None:
            continue
        projection = Projection(module, layout, n_heads, d_head)
        if value is None:
            return projection
        given = projection.split(out)
        if given.numel() == value.numel() and _same(given.reshape(value.transpose(1, 2).shape), value.transpose(1, 2)):
            return projection
    return None


def _inspect_attention(recording: Recording, attention: nn.Module, call: AttentionCall) -> dict[str, Any]:
    """The projections of one attention module."""
    names = {id(m): name for name, m in attention.named_modules()}
    called = [m for m in recording.order if id(m) in names and m is not attention]
    n_heads, n_kv, d_head, d_value = call.query.shape[1], call.key.shape[1], call.query.shape[-1], call.value.shape[-1]

    def named(letter: str) -> list[nn.Module]:
        return [m for m in called if names[id(m)].split(".")[-1].lower().startswith((f"{letter}_", f"{letter}norm", f"w{letter}"))]

    out = recording.outputs.get(id(attention))
    linears = [m for m in called if isinstance(m, nn.Linear)]
    o_proj = next((m for m in reversed(linears) if _same(recording.outputs[id(m)], out)), None)
    entered = recording.inputs.get(id(o_proj)) if o_proj is not None else None
    if entered is None or entered.shape[-1] != n_heads * d_value:
        o_proj = None
    heads = recording.attention_outputs[id(attention)]
    reasons = {}
    parts: dict[str, Any] = {
        "gated": o_proj is not None and not _same(heads.reshape(*heads.shape[:2], -1), entered),
        "q": _projection(recording, named("q"), n_heads, d_head),
        "k": _projection(recording, named("k"), n_kv, d_head),
        "v": _projection(recording, called, n_kv, d_value, call.value),
        "o_proj": o_proj,
    }
    for letter in "qkv":
        if parts[letter] is None:
            reasons[f"attn.hook_{letter}"] = (
                f"{type(attention).__name__} has no module whose output is the {letter} of every head before RoPE"
            )
    if o_proj is None:
        reasons["attn.hook_z"] = f"{type(attention).__name__} has no output projection that reads [batch, pos, head * d_head]"
    return {
        **parts, "attention": attention, "cross": call.key.shape[2] != call.query.shape[2], "n_heads": n_heads, "n_key_value_heads": n_kv, "d_head": d_head, "d_value": d_value, "reasons": reasons,
    }  # fmt: skip


def _inspect_layer(recording: Recording, block: nn.Module) -> LayerAnatomy:
    """One layer: sublayers found by which sums hold."""
    attention = next((m for m in block.modules() if id(m) in recording.calls), None)
    found: dict[str, Any] = {"reasons": {}}
    kind = type(block).__name__
    if attention is not None:
        found = _inspect_attention(recording, attention, recording.calls[id(attention)])
    else:
        reason = f"{kind} calls no softmax attention (convolution, linear attention or state space)"
        found["reasons"] = {f"attn.hook_{name}": reason for name in ("q", "k", "v", "z", "rot_q", "rot_k", "attn_scores", "pattern")}
    reasons: dict[str, str] = dict(found.pop("reasons"))
    entered, left = recording.inputs.get(id(block)), recording.outputs.get(id(block))
    children = [m for m in recording.order if any(m is child for child in block.children())]
    start = next((i for i, m in enumerate(children) if attention is not None and any(x is attention for x in m.modules())), 0)
    for child in children[:start]:
        if _same(recording.outputs.get(id(child)), recording.inputs.get(id(children[start]))):
            found["ln1"] = child
    for i in range(start, len(children)):
        if entered is None or (out := recording.outputs.get(id(children[i]))) is None or out.shape != entered.shape:
            continue
        mid = entered + out
        ln2 = next((m for m in children[i + 1 :] if _same(recording.inputs.get(id(m)), mid)), None)
        if ln2 is not None:
            found |= {"attn_out": children[i], "ln2": ln2, "additive": children[i] is (children[start] if attention is not None else None)}
            rest = children[children.index(ln2) + 1 :]
            found["mlp"] = next((m for m in rest if _same(recording.inputs.get(id(m)), recording.outputs.get(id(ln2)))), None)
            for child in rest:
                added = recording.outputs.get(id(child))
                if left is not None and added is not None and added.numel() == mid.numel() and _same(mid + added.view_as(mid), left):
                    found["mlp_out"] = child
            break
    if found.get("attn_out") is None and found.get("mlp_out") is None and entered is not None and left is not None:
        found |= _side_by_side(recording, children, attention, entered, left)
        reasons |= found.pop("missing", {})
    if found.get("attn_out") is None and found.get("mlp_out") is None and entered is not None and left is not None:
        found |= _only_sublayer(recording, children, attention, entered, left)
        reasons |= found.pop("missing", {})
    if found.get("attn_out") is None and "hook_attn_out" not in reasons:
        reason = f"{kind} gates, scales or convolves between attention and the residual stream"
        reasons |= {"hook_attn_out": reason, "hook_resid_mid": reason}
    if found.get("mlp_out") is None and "hook_mlp_out" not in reasons:
        reasons["hook_mlp_out"] = f"{kind} gates, scales or convolves between the MLP and the residual stream"
    return LayerAnatomy(block=block, reasons=reasons, **found)


def _side_by_side(
    recording: Recording, children: list[nn.Module], attention: nn.Module | None, entered: Tensor, left: Tensor
) -> dict[str, Any]:
    """A layer whose attention and MLP read the same stream and are added together."""
    outs = {id(c): out for c in children if (out := recording.outputs.get(id(c))) is not None and out.numel() == entered.numel()}
    for mlp in children:
        if attention is None or mlp is attention or id(mlp) not in outs or id(attention) not in outs:
            continue
        if _same(entered + outs[id(attention)].view_as(entered) + outs[id(mlp)].view_as(entered), left):
            missing = {"hook_resid_mid": "attention and MLP read the same stream: there is no middle"}
            return {"attn_out": attention, "mlp": mlp, "mlp_out": mlp, "additive": True, "missing": missing}
    return {}


def _only_sublayer(
    recording: Recording, children: list[nn.Module], attention: nn.Module | None, entered: Tensor, left: Tensor
) -> dict[str, Any]:
    """A layer that adds one thing to the stream: attention, a state space or an MLP, each in a layer of its own."""
    for child in children:
        out = recording.outputs.get(id(child))
        if out is None or out.numel() != entered.numel() or not _same(entered + out.view_as(entered), left):
            continue
        mixes = attention is not None or any(isinstance(m, nn.Conv1d) for m in child.modules())
        missing = {"hook_resid_mid": "the layer has one sublayer only: the stream's middle is its end"}
        missing["hook_mlp_out" if mixes else "hook_attn_out"] = f"the layer has no {'MLP' if mixes else 'attention'}"
        return {"attn_out" if mixes else "mlp_out": child, "additive": child is attention, "missing": missing}
    return {}


def inspect(hf: Any, run: Callable[[], Any]) -> tuple[Anatomy, Recording]:
    """Find every part.

    Args:
        hf: A Hugging Face model.
        run: Runs its forward pass once on a short prompt.

    Raises:
        UnsupportedModelError: no decoder layers, or no layer calls the registered attention function.
    """
    layers = decoder_layers(hf)
    configs = list(
        {
            id(c): c for c in (hf.config, hf.get_decoder().config, *(getattr(m, "config", None) for m in layers.modules())) if c is not None
        }.values()
    )
    configs = [c for c in configs if hasattr(c, "_attn_implementation")]
    recording = record_pass(hf, layers, run, configs)
    if not recording.calls:
        raise UnsupportedModelError(
            f"model must call transformers' attention interface; {type(hf).__name__} never did. Its attention is written inline: use nnsight instead."
        )
    inspected = tuple(_inspect_layer(recording, block) for block in layers)
    text = hf.config.get_text_config()
    unembedding = inspect_unembedding(
        head_of(hf), recording.order, recording.inputs, recording.outputs, recording.logits, getattr(text, "final_logit_softcapping", None)
    )
    d_model = int(unembedding.head.weight.shape[1])  # type: ignore[arg-type, union-attr]
    anatomy = Anatomy(
        layers=inspected, vision_layers=vision_layers(hf, layers), embed=hf.get_input_embeddings(), unembedding=unembedding, configs=tuple(configs),
        d_model=d_model, streams=_streams(recording.inputs.get(id(layers[0])), recording, d_model),
    )  # fmt: skip
    return anatomy, recording


def _streams(entered: Tensor | None, recording: Recording, d_model: int) -> Streams:
    """How many copies of the residual stream go from layer to layer, and on which axis: the one that is neither batch, positions nor width."""
    if entered is None:
        return Streams()
    if entered.dim() == 3:  # side by side already, or one
        return Streams(n=max(entered.shape[-1] // d_model, 1))
    query = next(iter(recording.calls.values())).query
    there = (query.shape[0], query.shape[2])
    for axis in (0, 2):
        if tuple(size for i, size in enumerate(entered.shape[:3]) if i != axis) == there:
            return Streams(entered.shape[axis], axis)
    return Streams()
