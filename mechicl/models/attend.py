"""A layer's attention called by itself: the model's own code with queries, keys and values given, everything else as in one recorded run.

Positions, masks, windows, sinks, soft-capping and the repetition of grouped keys are whatever the model does; only its three projections are overruled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechicl.errors import UnsupportedModelError
from mechicl.models.anatomy import LayerAnatomy
from mechicl.models.toys.model import ToyTransformer

TOLERANCE = 1e-3
"""Largest difference between a called and a recorded head output, relative to the largest output (half precision: ten times this)."""


class Attention:
    """The attention modules of a run of `batch`, to be called with other queries, keys and values.

    Call `listen` around the run; then `attention(layer, q, k, v)`.
    """

    model: Any
    n: int

    def __init__(self, model: Any, n: int) -> None:
        self.model, self.n = model, n
        self.given: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._alone: set[int] = set()
        self._toy = isinstance(model, ToyTransformer)

    @contextmanager
    def listen(self):
        """Keep what each layer's attention is called with."""
        handles = [
            module.register_forward_pre_hook(self._keep(layer), with_kwargs=True)
            for layer, module in enumerate(self._modules())
            if module is not None
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _modules(self) -> Sequence[nn.Module | None]:
        if self._toy:
            return [block.attn for block in self.model.blocks]
        return [part.attention for part in self.model.anatomy.layers]

    def _keep(self, layer: int) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.given[layer] = (args, dict(kwargs))

        return keep

    def differs(self, other: Attention) -> bool:
        """Whether the runs called attention with anything else that differs: masks, rotations, biases. The stream itself may."""
        seen: set[tuple[int, int]] = set()  # layers share these tensors
        for layer, (args, kwargs) in self.given.items():
            mine = _tensors((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))
            theirs = _tensors((other.given[layer][0][1:], {k: v for k, v in other.given[layer][1].items() if k != "hidden_states"}))
            for a, b in zip(mine, theirs, strict=True):
                if (id(a), id(b)) not in seen and not torch.equal(a, b):
                    return True
                seen.add((id(a), id(b)))
        return False

    @torch.no_grad()
    def check(self, layer: int, q: Tensor, k: Tensor, v: Tensor, z: Tensor) -> None:
        """See that the recorded q, k, v [batch, pos, head, d] give the recorded z, several copies at once where that works.

        Raises:
            UnsupportedModelError: they do not: the layer does something that a call by itself does not.
        """
        limit = TOLERANCE * float(z.abs().max().clamp_min(1e-6)) * (1 if z.dtype in (torch.float32, torch.float64) else 10)

        def off(copies: int) -> float:
            parts = [x.expand(copies, *x.shape) for x in (q, k, v)]
            return float((self(layer, *parts).float() - z.float()).abs().max())

        try:
            together = off(2)
        except RuntimeError:  # shapes that cannot be widened
            together = float("inf")
        if together > limit:
            self._alone.add(layer)
            if not (apart := off(1)) <= limit:
                raise UnsupportedModelError(
                    f"attention of layer {layer} must give its recorded output when called by itself; it is off by {apart:.2g}. "
                    "Use node ablation or activation patching on this family."
                )

    @torch.no_grad()
    def __call__(
        self,
        layer: int,
        q: Float[Tensor, "copy batch pos head d_head"],
        k: Float[Tensor, "copy batch pos kv_head d_head"],
        v: Float[Tensor, "copy batch pos kv_head d_value"],
    ) -> Float[Tensor, "copy batch pos head d_value"]:
        """Head outputs for several copies of the recorded prompts, each with its own q and k (before RoPE) and v."""
        copies = q.shape[0]
        if layer in self._alone and copies > 1:
            return torch.cat([self(layer, q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(copies)])
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        args, kwargs = self.given[layer]
        if self._toy:
            z = self.model.blocks[layer].attn.attend(q, k, v, _widened(args[1], self.n, copies))[0]
        else:
            z = _call(self.model.anatomy.layers[layer], args, kwargs, (q, k, v), self.n, copies)
        return z.unflatten(0, (copies, -1))


def _call(
    part: LayerAnatomy, args: tuple[Any, ...], kwargs: dict[str, Any], parts: tuple[Tensor, Tensor, Tensor], n: int, copies: int
) -> Tensor:
    """One Hugging Face attention module with its projections overruled; what its output projection reads, as heads."""
    assert part.attention is not None
    assert part.o_proj is not None
    seen: list[Tensor] = []

    def overrule(projection: Any, value: Tensor) -> Callable[..., Tensor]:
        return lambda _, __, output: projection.join(value).to(output.dtype)

    def catch(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen.append(given[0])

    handles = [
        projection.module.register_forward_hook(overrule(projection, value))
        for projection, value in zip((part.q, part.k, part.v), parts, strict=True)
        if projection is not None
    ]
    handles.append(part.o_proj.register_forward_pre_hook(catch))
    try:
        part.attention(*_widened(args, n, copies), **_widened(kwargs, n, copies))
    finally:
        for handle in handles:
            handle.remove()
    return seen[0].unflatten(-1, (part.n_heads, part.d_value))


def _tensors(given: Any) -> list[Tensor]:
    """Every tensor in nested arguments, in order."""
    if isinstance(given, Tensor):
        return [given]
    if is_dataclass(given) and not isinstance(given, type):
        return _tensors([getattr(given, f.name) for f in fields(given)])
    if isinstance(given, dict):
        return _tensors(list(given.values()))
    return [x for one in given for x in _tensors(one)] if isinstance(given, tuple | list) else []


def _widened(given: Any, n: int, copies: int) -> Any:
    """Every tensor with a row per prompt, repeated `copies` times; a cosine or sine of several axes (mrope) has its prompts one axis later."""
    if copies == 1:
        return given
    if isinstance(given, Tensor):
        axis = 1 if given.dim() == 4 and given.shape[0] == 3 and given.shape[1] == n and n != 3 else 0
        if given.dim() == 0 or given.shape[axis] != n:
            return given
        return given.repeat(*(copies if i == axis else 1 for i in range(given.dim())))
    if is_dataclass(given) and not isinstance(given, type):
        return replace(given, **{f.name: _widened(getattr(given, f.name), n, copies) for f in fields(given)})
    if isinstance(given, dict):
        return {key: _widened(value, n, copies) for key, value in given.items()}
    if isinstance(given, tuple | list):
        return type(given)(_widened(value, n, copies) for value in given)
    return given
