"""Finding the parts of a model: it is run once on a few tokens, and tensors are compared, not names.

For every decoder layer: which module's output is added to the residual stream after attention and after the MLP, which norm reads the stream
between them, which projection made the values, which one takes the heads back. What a layer does not have, or does in a way that a hook could
not honour (a gate or a scale between sublayer and stream), is listed with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mechicl.errors import UnsupportedModelError
from mechicl.models.anatomy import Anatomy, LayerAnatomy, Layout, Projection, Streams
from mechicl.models.attention import AttentionCall
from mechicl.models.recording import (
    Recording,
    decoder_layers,
    record_pass,
    same,
    vision_layers,
)
from mechicl.models.unembedding import head_of, inspect_unembedding


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
        if given.numel() == value.numel() and same(given.reshape(value.transpose(1, 2).shape), value.transpose(1, 2)):
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
    o_proj = next((m for m in reversed(linears) if same(recording.outputs[id(m)], out)), None)
    entered = recording.inputs.get(id(o_proj)) if o_proj is not None else None
    if entered is None or entered.shape[-1] != n_heads * d_value:
        o_proj = None
    heads = recording.attention_outputs[id(attention)]
    reasons = {}
    parts: dict[str, Any] = {
        "gated": o_proj is not None and not same(heads.reshape(*heads.shape[:2], -1), entered),
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
        if same(recording.outputs.get(id(child)), recording.inputs.get(id(children[start]))):
            found["ln1"] = child
    for i in range(start, len(children)):
        if entered is None or (out := recording.outputs.get(id(children[i]))) is None or out.shape != entered.shape:
            continue
        mid = entered + out
        ln2 = next((m for m in children[i + 1 :] if same(recording.inputs.get(id(m)), mid)), None)
        if ln2 is not None:
            found |= {"attn_out": children[i], "ln2": ln2, "additive": children[i] is (children[start] if attention is not None else None)}
            rest = children[children.index(ln2) + 1 :]
            found["mlp"] = next((m for m in rest if same(recording.inputs.get(id(m)), recording.outputs.get(id(ln2)))), None)
            for child in rest:
                added = recording.outputs.get(id(child))
                if left is not None and added is not None and added.numel() == mid.numel() and same(mid + added.view_as(mid), left):
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
        if same(entered + outs[id(attention)].view_as(entered) + outs[id(mlp)].view_as(entered), left):
            missing = {"hook_resid_mid": "attention and MLP read the same stream: there is no middle"}
            return {"attn_out": attention, "mlp": mlp, "mlp_out": mlp, "additive": True, "missing": missing}
    return {}


def _only_sublayer(
    recording: Recording, children: list[nn.Module], attention: nn.Module | None, entered: Tensor, left: Tensor
) -> dict[str, Any]:
    """A layer that adds one thing to the stream: attention, a state space or an MLP, each in a layer of its own."""
    for child in children:
        out = recording.outputs.get(id(child))
        if out is None or out.numel() != entered.numel() or not same(entered + out.view_as(entered), left):
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
