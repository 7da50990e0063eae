"""Resumed runs of Hugging Face models: their own decoder layers, called with the arguments of the recorded run.

Nothing here knows a family. The arguments with which the model called its layers are recorded and, for a pass, cut to its positions and laid out for its
copies; which axes are prompts and positions is found by running the prompts once more, twice over and a few tokens longer. What the model adds to the
stream between two layers (DeepStack) is recorded as the difference. Attention goes through mechicl's registered function, which puts the recorded keys
and values of earlier positions before the new ones. `resume_check` holds all of this against the recorded run before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mechicl.models import streams
from mechicl.models.anatomy import LayerAnatomy
from mechicl.models.attention import AttentionCall, fused
from mechicl.models.hooked import HookPoint, active
from mechicl.models.resuming.attention import KeysValues, attend, below, per_row
from mechicl.models.resuming.run import Pass, Runner
from mechicl.models.wiring import ATTENTION_ONLY, Wiring, hooked_attention

Roles = Mapping[str, tuple[str, ...]]
"""Path of an argument -> what each of its axes is: "batch", "pos" or "other"."""
Called = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Arguments of a layer beside the stream, by place and by name."""


class _Held(Exception):
    pass


class _Resumed(Wiring):
    """The model's wiring, with attention of every layer handled by the runner."""

    def __init__(self, runner: VLMRunner) -> None:
        super().__init__(runner.model, runner.model.anatomy, lambda: None)
        self.runner = runner

    def _attention(self, layer: int, part: LayerAnatomy, extra: Any) -> Callable[[AttentionCall], Tensor] | None:
        if part.attention is None or not self.runner.reaches(layer):
            return None
        points = {name: self.point(f"blocks.{layer}.attn.hook_{name}") for name in ATTENTION_ONLY}
        return lambda call: self.runner.attention(layer, part, points, call)


class VLMRunner(Runner):
    """Runs passes of a Hugging Face model.

    Args:
        model: The hooked model.
        calls: Arguments of every layer in the recorded run; None for a layer that was skipped.
        roles: What the axes of the arguments are.
        past: Keys after RoPE and values of every layer, [prompt, kv_head, pos, d_head]; None where it does not read the sequence.
        pre: The recorded stream before every layer.
    """

    calls: Sequence[Called | None]
    roles: Roles
    past: Sequence[KeysValues | None]

    def __init__(
        self, model: Any, calls: Sequence[Called | None], roles: Roles, past: Sequence[KeysValues | None], pre: Sequence[Tensor],
        positions: Tensor, additions: Sequence[Tensor | None], logits: Tensor,
    ) -> None:  # fmt: skip
        super().__init__(model, pre, positions, additions, logits)
        self.calls, self.roles, self.past = calls, roles, past
        self.not_inside: set[int] = set()
        """Layers that cannot be entered at "z" or "mid"."""
        self.triangular = False
        """Whether every mask lets positions read only themselves and what stands before them."""
        self._wiring: _Resumed | None = None
        self._job: Pass | None = None
        self._at = 0  # first position of the running layer: the pass's start, or later in a trimmed last layer
        self._keys_only = False
        self._held: KeysValues | None = None
        self._cut: dict[tuple[int, int, bool], tuple[Any, Any]] = {}

    def reaches(self, layer: int) -> bool:
        """Whether the running pass gets to the layer."""
        return self._job is not None and layer >= self._job.layer

    @contextmanager
    def connected(self, job: Pass) -> Iterator[None]:
        before = (self._wiring, self._job, self._at)
        self._job, self._at, self._wiring = job, job.start, None
        wiring = _Resumed(self)
        self._wiring = wiring
        try:
            with wiring.connected():
                yield
        finally:
            self._wiring, self._job, self._at = before
            self._cut.clear()
            self._held, self._keys_only = None, False

    def block(self, layer: int, x: Tensor, job: Pass) -> Tensor:
        called = self.calls[layer]
        if called is None:  # skipped in the recorded run too
            return x
        args = tuple(self._arranged(str(i), value) for i, value in enumerate(called[0]))
        kwargs = {name: self._arranged(name, value) for name, value in called[1].items()}
        out = self.model.anatomy.layers[layer].block(x, *args, **kwargs)
        return out if isinstance(out, Tensor) else out[0]

    def last_block(self, x: Tensor, job: Pass) -> Tensor:
        last = self.n_layers - 1
        part = self.model.anatomy.layers[last]
        if self.calls[last] is not None and self.past[last] is not None:
            self._keys_only = True
            try:
                self.block(last, x[:, : self.first - job.start], job)
            except _Held:
                pass
            finally:
                self._keys_only = False
        x = x[:, self.first - job.start :]
        self._at = self.first
        assert part is not None
        return self.block(last, x, job)

    def rest(self, layer: int, x: Tensor, job: Pass) -> Tensor:
        part, at = self.model.anatomy.layers[layer], f"blocks.{layer}."
        assert self._wiring is not None
        if job.at == "z":
            pre = per_row(self.pre[layer][:, -x.shape[1] :], job.copies)
            self._wiring.stream[layer] = pre
            out = part.o_proj(x.flatten(2))
            x = pre + (self._point(at + "hook_attn_out", out) if part.attn_out is part.attention else part.attn_out(out))
            if part.attn_out is part.attention:  # else the hook on that module has already shown the sum
                x = self._point(at + "hook_resid_mid", x)
        else:
            x = self._point(at + "hook_resid_mid", x)
        return self._point(at + "hook_resid_post", x + streams.run_mlp(part, x))

    def unembed(self, x: Tensor) -> Tensor:
        return streams.finish(self.model, streams.run_head(self.model, x))

    def enters_inside(self, layer: int) -> bool:
        part = self.model.anatomy.layers[layer]
        return self.calls[layer] is not None and layer not in self.not_inside and None not in (part.attn_out, part.mlp_out, part.ln2)

    def enters_at_z(self, layer: int) -> bool:
        part = self.model.anatomy.layers[layer]
        return self.enters_inside(layer) and part.o_proj is not None and super().enters_at_z(layer)

    def _point(self, name: str, x: Tensor) -> Tensor:
        point = self.model.hook_dict.get(name)
        return point(x) if point is not None and active(point) else x

    def attention(self, layer: int, part: LayerAnatomy, points: Mapping[str, HookPoint | None], call: AttentionCall) -> Tensor:
        """The registered attention function while a pass runs."""
        assert self._job is not None
        if part.cross:
            return hooked_attention(call, points, None) if any(points.values()) else fused(call)
        query, key = call.query, call.key
        if (point := points["rot_q"]) is not None:
            query = point(query.transpose(1, 2)).transpose(1, 2)
        if (point := points["rot_k"]) is not None:
            key = point(key.transpose(1, 2)).transpose(1, 2)
        if self._keys_only:
            self._held = (key, call.value)
            raise _Held
        parts: list[KeysValues] = [(key, call.value)]
        if self._held is not None and self._at > self._job.start:
            parts.insert(0, self._held)
        if self._job.start:
            recorded = self.past[layer]
            assert recorded is not None
            parts.insert(0, (recorded[0][:, :, : self._job.start], recorded[1][:, :, : self._job.start]))
        causal = bool(call.kwargs.get("is_causal")) if call.kwargs.get("is_causal") is not None else getattr(call.module, "is_causal", True)
        listens = points["attn_scores"] is not None or points["pattern"] is not None
        if not listens and not call.terms:
            causal = causal if call.mask is None else self.triangular
            return attend(query, parts, call.mask, scale=call.scaling, copies=self._job.copies, causal=causal)
        keys, values = (torch.cat([per_row(x, len(query) // len(x)) for x in some], 2) for some in zip(*parts, strict=True))
        mask = call.mask
        if mask is None and causal and query.shape[2] > 1:
            mask = below(query.shape[2], keys.shape[2], query.device)
        elif mask is not None and mask.shape[0] not in (1, len(query)):
            mask = per_row(mask, len(query) // len(mask))
        whole = AttentionCall(call.module, query, keys, values, mask, call.scaling, False, call.terms, {**call.kwargs, "is_causal": False})
        return hooked_attention(whole, {**points, "rot_q": None, "rot_k": None}, None) if listens else fused(whole)

    def _arranged(self, path: str, value: Any) -> Any:
        """An argument for the running pass: its positions, its copies. The same tensor is arranged once for all layers."""
        if isinstance(value, Tensor):
            key = (id(value), self._at, self._keys_only)
            if key not in self._cut:
                self._cut[key] = (value, self._arrange(self.roles[path], value))
            return self._cut[key][1]
        if isinstance(value, tuple | list):
            return type(value)(self._arranged(f"{path}.{i}", x) for i, x in enumerate(value))
        if isinstance(value, dict):
            return {name: self._arranged(f"{path}.{name}", x) for name, x in value.items()}
        return value

    def _arrange(self, roles: tuple[str, ...], x: Tensor) -> Tensor:
        assert self._job is not None
        places = [axis for axis, role in enumerate(roles) if role == "pos" and x.shape[axis] > 1]
        if places and (self._at or self._keys_only):
            stop = self.first if self._keys_only else x.shape[places[0]]
            x = x.narrow(places[0], self._at, stop - self._at)
        if len(places) > 1:  # a mask: attention lays the copies beside each other and needs it once
            return x
        for axis, role in enumerate(roles):
            if x.shape[axis] == 1 < len(self.positions):  # shared by the prompts
                continue
            if role == "batch" and x.shape[axis] == len(self.positions):
                x = per_row(x, self._job.copies, axis)
            elif role == "batch":  # several entries per prompt, as of pictures
                x = per_row(x.unflatten(axis, (len(self.positions), -1)), self._job.copies, axis).flatten(axis, axis + 1)
        return x


def flatten(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested arguments with its path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, tuple | list):
        for i, x in enumerate(value):
            yield from flatten(x, f"{path}.{i}")
    elif isinstance(value, dict):
        for name, x in value.items():
            yield from flatten(x, f"{path}.{name}")


def arguments(called: Called) -> Iterator[tuple[str, Tensor]]:
    """Every tensor among a layer's arguments, with its path."""
    for i, value in enumerate(called[0]):
        yield from flatten(value, str(i))
    for name, value in called[1].items():
        yield from flatten(value, name)
