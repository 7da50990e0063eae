"""Weights as numbers, wherever and however a checkpoint keeps them: on a device, offloaded to memory or disk, or packed into 8 or 4 bits.

A big model's layer may hold a placeholder without data (accelerate reads the weights in when the layer runs and drops them afterwards), or integers that
mean nothing without their scales (bitsandbytes). What reads a weight directly must not take either for numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mechicl.errors import UnsupportedModelError

META = torch.device("meta")


def offloaded(module: nn.Module) -> bool:
    """Whether a parameter of the module itself is a placeholder without data."""
    return any(p.device == META for p in module.parameters(recurse=False))


def packed(linear: nn.Module) -> bool:
    """Whether a linear map's weight is kept as something else than floating-point numbers [out, in]."""
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor):
        return True
    shape = (getattr(linear, "out_features", weight.shape[0]), getattr(linear, "in_features", weight.shape[-1]))
    return not weight.is_floating_point() or tuple(weight.shape) != shape


def place(module: nn.Module) -> torch.device:
    """The device on which a module computes: where its first parameter is, or where accelerate will put it."""
    hook: Any = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is None:  # several hooks in a row
        device = next((found for one in getattr(hook, "hooks", ()) if (found := getattr(one, "execution_device", None)) is not None), None)
    if device is not None:
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    for parameter in module.parameters():
        if parameter.device != META:
            return parameter.device
    inner = [place(child) for child in module.children()]
    return next((found for found in inner if found != META), torch.device("cpu"))


@contextmanager
def at_hand(module: nn.Module) -> Iterator[nn.Module]:
    """The module with its own parameters read in; placeholders again afterwards.

    Raises:
        UnsupportedModelError: they are placeholders and nothing says where the data are.
    """
    if not offloaded(module):
        yield module
        return
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is None:
        raise UnsupportedModelError(
            f"weights must be readable; {type(module).__name__} holds placeholders (meta) and no hook of accelerate says where its data are. "
            "Load with device_map and offload_folder, or with more memory."
        )
    hook.pre_forward(module)
    try:
        yield module
    finally:
        hook.post_forward(module, torch.empty(0))


@torch.no_grad()
def dense(linear: nn.Linear) -> Tensor:
    """The weight of a linear map as floating-point numbers [out, in]: the parameter itself where it is that; a copy of what is offloaded; for a packed
    one, what the layer makes of the unit vectors, which are exact in every packing.

    Raises:
        UnsupportedModelError: see `at_hand`.
    """
    if not packed(linear) and not offloaded(linear):
        return linear.weight
    with at_hand(linear):
        if not packed(linear):
            return linear.weight.detach().clone()
        unit = torch.eye(linear.in_features, device=place(linear))
        out = _apply(linear, unit).float()
        if linear.bias is not None:
            out = out - linear.bias.float()
        return out.T.contiguous()


def _apply(linear: nn.Module, x: Tensor) -> Tensor:
    """The layer's own arithmetic, without the hooks around it."""
    return linear.forward(x) if not hasattr(linear, "_old_forward") else linear._old_forward(x)  # type: ignore[operator]


@torch.no_grad()
def vector(module: nn.Module, name: str = "bias") -> Tensor | None:
    """A parameter of a module, a bias or a norm's weight; None where it has none, a copy where it is offloaded.

    Raises:
        UnsupportedModelError: see `at_hand`.
    """
    found = getattr(module, name, None)
    if found is None or not offloaded(module):
        return found
    with at_hand(module):
        return getattr(module, name).detach().clone()


def lead_device(hf: Any) -> torch.device:
    """The device that takes a model's inputs: that of its first module, also where its parameters are placeholders."""
    embed = hf.get_input_embeddings()
    return place(embed) if isinstance(embed, nn.Module) else torch.device(hf.device)
