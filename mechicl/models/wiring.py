"""Torch hooks that feed a model's HookPoints for the length of one forward pass, and only where somebody listens.

A hook point that nobody listens to gets no torch hook at all, so it costs nothing and changes nothing. An edit made at a hook point goes back
into the forward pass: for the middle of the residual stream it is written back through the attention's output, because the model's own code has
already kept the sum's other half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mechicl.errors import UnsupportedModelError
from mechicl.models.anatomy import Anatomy, LayerAnatomy, Projection
from mechicl.models.attention import (
    AttentionCall,
    AttentionSession,
    Handler,
    attention_session,
    check_terms,
    combine,
    fused,
    rows,
    softmax,
)
from mechicl.models.hooked import HookPoint, active
from mechicl.models.norms import Norm
from mechicl.models.recording import first_tensor, stream_input, stream_name

ATTENTION_ONLY = ("rot_q", "rot_k", "attn_scores", "pattern")
"""Hook points that only the attention function can feed."""


class Wiring:
    """Feeds the hook points of one forward pass. `root` is the hooked model's tree, `parts` what `anatomy` found."""

    root: nn.Module
    parts: Anatomy
    image_mask: Callable[[], Tensor | None]

    def __init__(self, root: nn.Module, parts: Anatomy, image_mask: Callable[[], Tensor | None]) -> None:
        self.root, self.parts, self.image_mask = root, parts, image_mask
        self.stream: dict[int, Tensor] = {}
        self.shape = torch.Size()
        self.handles: list[Any] = []

    @contextmanager
    def connected(self, extra: Mapping[int, Handler] | None = None) -> Iterator[None]:
        """Torch hooks and attention handlers in place; gone afterwards, also when the forward raises.

        Args:
            extra: Attention handlers by layer, before those that hook points ask for.
        """
        handlers: dict[int, Handler] = {}
        try:
            for layer, part in enumerate(self.parts.layers):
                self._layer(layer, part)
                handler = self._attention(layer, part, (extra or {}).get(layer))
                if handler is not None:
                    handlers[id(part.attention)] = handler
            self._ends()
            if handlers:
                with attention_session(AttentionSession(handlers), list(self.parts.configs)):
                    yield
            else:
                yield
        finally:
            for handle in self.handles:
                handle.remove()
            self.handles.clear()
            self.stream.clear()

    def point(self, name: str) -> HookPoint | None:
        """The hook point `name` if somebody listens there."""
        found = self.root.hook_dict.get(name)  # type: ignore[union-attr]
        return found if found is not None and active(found) else None

    def _layer(self, layer: int, part: LayerAnatomy) -> None:
        at = f"blocks.{layer}."
        pre, mid, attn_out = self.point(at + "hook_resid_pre"), self.point(at + "hook_resid_mid"), self.point(at + "hook_attn_out")
        embed, features = (self.point("hook_embed"), self.point("hook_image_features")) if layer == 0 else (None, None)
        if pre or mid or embed or features:
            self._before(part.block, self._stream_in(layer, features, embed, pre))
        for name, norm in (("ln1", part.ln1), ("ln2", part.ln2)):
            if norm is not None:
                self._norm(at + name, norm)
        if (attn_out or mid) and part.attn_out is not None:
            self._after(part.attn_out, self._attention_out(layer, attn_out, mid))
        if (mlp_out := self.point(at + "hook_mlp_out")) and part.mlp_out is not None:
            self._after(part.mlp_out, self._by_position(mlp_out))
            self._before(part.block, self._remember)
        if post := self.point(at + "hook_resid_post"):
            self._after(part.block, self._side_by_side(post))
        for letter in "qkv":
            projection = getattr(part, letter)
            if projection is not None and (found := self.point(f"{at}attn.hook_{letter}")):
                self._after(projection.module, _through(projection, found))
        if part.o_proj is not None and (z := self.point(at + "attn.hook_z")):
            heads = Projection(part.o_proj, "flat", part.n_heads, part.d_value)
            self._before(part.o_proj, _through(heads, z))

    def _ends(self) -> None:
        if self.parts.final_norm is not None:
            self._norm("ln_final", self.parts.final_norm)
        for i, block in enumerate(self.parts.vision_layers):
            if point := self.point(f"vision.blocks.{i}.hook_resid_pre"):
                self._before(block, point)
            if point := self.point(f"vision.blocks.{i}.hook_resid_post"):
                self._after(block, point)

    def _before(self, module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            entered = stream_input(args, kwargs)
            if entered is None:
                return None
            left = fn(entered)
            if left is entered:
                return None
            name = stream_name(kwargs)
            return (args, {**kwargs, name: left}) if name else ((left, *args[1:]), kwargs)

        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _after(self, module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            entered = first_tensor(output)
            if entered is None:
                return None
            left = fn(entered)
            if left is entered:
                return None
            return left if isinstance(output, Tensor) else type(output)((left, *output[1:]))

        self.handles.append(module.register_forward_hook(hook))

    def _norm(self, name: str, norm: nn.Module) -> None:
        scale, normalized = self.point(f"{name}.hook_scale"), self.point(f"{name}.hook_normalized")
        if not (scale or normalized):
            return
        module = self.root.get_submodule(name)
        assert isinstance(module, Norm)

        def read(x: Tensor) -> Tensor:
            value = module.scale(x)
            for point, tensor in ((scale, value), (normalized, module.center(x) / value)):
                if point is not None and point(tensor) is not tensor:
                    raise UnsupportedModelError(
                        f"{point.name} must only be read; a hook returned a value. Edit the residual stream or the sublayer's output instead."
                    )
            return x

        self._before(norm, read)

    def _stream_in(
        self, layer: int, features: HookPoint | None, embed: HookPoint | None, pre: HookPoint | None
    ) -> Callable[[Tensor], Tensor]:
        def enter(given: Tensor) -> Tensor:
            x = self.parts.streams.split(given)
            seen = x
            if features is not None and (mask := self.image_mask()) is not None and mask.shape == x.shape[:2] and bool(mask.any()):
                shown = x[mask]
                edited = features(shown)
                if edited is not shown:
                    x = x.masked_scatter(mask[..., None].expand_as(x), edited.to(x.dtype))
            for point in (embed, pre):
                x = point(x) if point is not None else x
            self.stream[layer] = x
            return given if x is seen else self.parts.streams.join(x)

        return enter

    def _remember(self, x: Tensor) -> Tensor:
        self.shape = x.shape
        return x

    def _by_position(self, point: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """A hook point on what an MLP adds: some experts write [batch * pos, d_model]."""

        def pass_(given: Tensor) -> Tensor:
            # a run resumed half-way enters no layer, so that nothing was remembered; what it gives has its own positions
            shown = given.view(self.shape) if given.dim() == 2 and len(self.shape) == 3 else given
            edited = point(shown)
            return given if edited is shown else edited.reshape(given.shape)

        return pass_

    def _side_by_side(self, point: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """A hook point on the stream: several copies of it are shown side by side."""
        streams = self.parts.streams
        if streams.axis is None:
            return point

        def pass_(given: Tensor) -> Tensor:
            shown = streams.split(given)
            edited = point(shown)
            return given if edited is shown else streams.join(edited)

        return pass_

    def _attention_out(self, layer: int, attn_out: HookPoint | None, mid: HookPoint | None) -> Callable[[Tensor], Tensor]:
        def leave(out: Tensor) -> Tensor:
            out = attn_out(out) if attn_out is not None else out
            if mid is None:
                return out
            before = self.stream[layer]
            summed = before + out
            edited = mid(summed)
            return out if edited is summed else edited - before

        return leave

    def _attention(self, layer: int, part: LayerAnatomy, extra: Handler | None) -> Handler | None:
        points = {name: self.point(f"blocks.{layer}.attn.hook_{name}") for name in ATTENTION_ONLY}
        if part.attention is None or not (extra or any(points.values())):
            return None
        if not any(points.values()):
            return extra
        return lambda call: hooked_attention(call, points, extra)


def _through(projection: Projection, point: HookPoint) -> Callable[[Tensor], Tensor]:
    """A hook point [batch, pos, head, d_head] on a projection's output; untouched when nothing is edited."""

    def pass_(x: Tensor) -> Tensor:
        given = projection.split(x)
        edited = point(given)
        return x if edited is given and not point.bwd_hooks else projection.join(edited).to(x.dtype)

    return pass_


def hooked_attention(call: AttentionCall, points: Mapping[str, HookPoint | None], extra: Handler | None) -> Tensor:
    """The heads' output of one call with hook points fed; fused where neither scores nor pattern are asked for."""
    check_terms(call)
    query, key = call.query, call.key
    for name, given in (("rot_q", query), ("rot_k", key)):
        if (point := points[name]) is not None:
            edited = point(given.transpose(1, 2)).transpose(1, 2)
            query, key = (edited, key) if name == "rot_q" else (query, edited)
    call = replace(call, query=query, key=key)
    if extra is not None:
        extra(call)
    if points["attn_scores"] is None and points["pattern"] is None:
        return fused(call)
    dest = torch.arange(query.shape[2], device=query.device)
    scores, allowed = rows(call, dest)
    if (point := points["attn_scores"]) is not None:
        shown = scores.masked_fill(~allowed, -torch.inf)
        edited = point(shown)
        scores = scores if edited is shown else edited
    pattern = softmax(call, scores, allowed, dest).to(query.dtype)
    if (point := points["pattern"]) is not None:
        pattern = point(pattern)
    return combine(call, pattern)
