"""Where a model's layers are, and one run of it with everything kept that went into and came out of their modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mechicl.errors import UnsupportedModelError
from mechicl.models.attention import AttentionCall, AttentionSession, attention_session, fused
from mechicl.models.unembedding import head_of

LAYER_LISTS = ("layers", "layer", "h", "blocks", "resblocks")
NOT_DECODER = ("vision", "visual", "image", "audio", "vq", "qformer")
NOT_VISION = ("audio", "qformer", "text", "language_model", "video_tower")
STREAM_NAMES = ("hidden_states", "hidden_state", "hidden_state_in", "inputs_embeds", "x")
"""What layers call the residual stream among their keyword arguments."""


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


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors hold the same numbers, up to rounding and to the way batch and positions are laid out."""
    if a is None or b is None or a.numel() != b.numel() or a.shape[-1] != b.shape[-1]:
        return False
    a, b = a.float().reshape(b.shape), b.float()  # some layers flatten batch and positions on the way
    tolerance = 1e-5 * float(b.abs().max().clamp_min(1e-6))
    return bool((a - b).abs().max() <= tolerance)
