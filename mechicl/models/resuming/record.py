"""The recorded run of a Hugging Face model: streams, keys and values, arguments of the layers, and whether all that suffices to resume it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mechicl.models import streams
from mechicl.models.asked import select_logits
from mechicl.models.attention import AttentionCall, fused
from mechicl.models.recording import first_tensor, stream_input
from mechicl.models.resuming.attention import KeysValues
from mechicl.models.resuming.check import ERRORS, full_note, judge
from mechicl.models.resuming.hf import Called, VLMRunner, arguments
from mechicl.models.resuming.run import Runner


@dataclass(eq=False)
class Found:
    """What `record_vlm` gives to `resume.record`; `runner`: None where nothing can resume the run."""

    logits: Tensor
    runner: Runner | None
    streams: list[Tensor]
    middles: list[Tensor | None]
    additions: list[Tensor | None]
    starts: list[int]
    notes: list[str] = field(default_factory=list)


@dataclass(eq=False)
class _Run:
    """What one forward pass of the layers left behind."""

    pre: dict[int, Tensor] = field(default_factory=dict)
    out: dict[int, Tensor] = field(default_factory=dict)
    calls: dict[int, Called] = field(default_factory=dict)
    attention: dict[int, AttentionCall] = field(default_factory=dict)
    again: bool = False


_ROLES: WeakKeyDictionary[nn.Module, dict[str, tuple[str, ...]]] = WeakKeyDictionary()


def record_vlm(model: Any, inputs: Mapping[str, Any], positions: Tensor, hooks: Sequence[Any]) -> Found:
    """One full run.

    Args:
        model: The hooked model.
        inputs: The processor's mapping, on the model's device.
        positions: Where logits are asked for, [n, k].
        hooks: Hooks of the caller, as `hooks` takes them.
    """
    n, n_pos = inputs["input_ids"].shape[:2]
    layers = model.anatomy.layers
    middles: dict[int, Tensor] = {}
    for layer in range(len(layers)):
        if (name := f"blocks.{layer}.hook_resid_mid") in model.hook_dict:
            hooks = [*hooks, (name, lambda x, *, hook, layer=layer: middles.update({layer: x}))]
    run = _Run()
    handlers = {layer: _holding(run, layer) for layer, part in enumerate(layers) if part.attention is not None}
    with model.hooks(fwd_hooks=hooks), model.wired(inputs, handlers), _watched(model, run), select_logits(model.anatomy.unembed, positions):
        logits = model.hf(**inputs, use_cache=False).logits
    pre, additions = _streams(run, len(layers))
    mids = [middles.get(layer) for layer in range(len(layers))]
    shape = (n, n_pos, model.cfg.d_model)
    why = ""
    if run.again:
        why = "a layer is called more than once in a forward pass"
    elif any(x.shape != shape for x in pre):
        why = "its layers do not carry one vector per position"
    elif reason := streams.why_not(model, len(layers), "unembed"):
        why = reason
    if why:
        pre = [model.anatomy.streams.split(x) for x in pre]  # as hooks see it: runs of the whole model enter through them
        return Found(logits, None, pre, mids, additions, [0] * n_pos, [full_note(model, why)])
    return _judged(model, inputs, run, pre, mids, additions, positions, logits)


def _judged(
    model: Any, inputs: Mapping[str, Any], run: _Run, pre: list[Tensor], mids: list[Tensor | None], additions: list[Tensor | None],
    positions: Tensor, logits: Tensor,
) -> Found:  # fmt: skip
    """The recorded run as something to resume, as far as the model has shown that it can be."""
    n_layers, (n, n_pos) = len(model.anatomy.layers), pre[0].shape[:2]
    calls = [run.calls.get(layer) for layer in range(n_layers)]
    past: list[KeysValues | None] = [None] * n_layers
    for layer, call in run.attention.items():
        if not model.anatomy.layers[layer].cross:
            past[layer] = (call.key, call.value)
    roles = _roles(model, inputs, calls, n, n_pos)
    runner = VLMRunner(model, calls, roles, past, pre, positions, additions, logits)
    starts = _starts(model, inputs, run, calls)
    runner.triangular = starts == list(range(n_pos))
    verdict = judge(model, runner, starts)
    if not verdict.resumes:
        return Found(logits, None, pre, mids, additions, [0] * n_pos, list(verdict.notes))
    runner.trim, runner.not_inside = verdict.trim, set(verdict.not_inside)
    return Found(logits, runner, pre, mids, additions, starts if verdict.prefix else [0] * n_pos, list(verdict.notes))


class _watched:
    """Torch hooks on the decoder's layers for one forward pass."""

    def __init__(self, model: Any, run: _Run) -> None:
        self.model, self.run, self.handles = model, run, []

    def __enter__(self) -> None:
        for layer, part in enumerate(self.model.anatomy.layers):
            self.handles.append(part.block.register_forward_pre_hook(self._before(layer), with_kwargs=True))
            self.handles.append(part.block.register_forward_hook(self._after(layer)))

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream = stream_input(args, kwargs)
            assert stream is not None
            self.run.again |= layer in self.run.pre or any(later >= layer for later in self.run.pre)
            named = isinstance(kwargs.get("hidden_states"), Tensor)
            self.run.pre[layer] = stream.detach()
            self.run.calls[layer] = (args if named else args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})

        return hook

    def _after(self, layer: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            left = first_tensor(output)
            assert left is not None
            self.run.out[layer] = left.detach()

        return hook


def _holding(run: _Run, layer: int) -> Any:
    def handler(call: AttentionCall) -> Tensor:
        run.attention[layer] = call
        return fused(call)

    return handler


def _streams(run: _Run, n_layers: int) -> tuple[list[Tensor], list[Tensor | None]]:
    """The stream before every layer and after the last, and what the model added between layers."""
    pre: list[Tensor] = []
    additions: list[Tensor | None] = [None] * (n_layers + 1)
    out: Tensor | None = None
    following = next(iter(run.pre.values()))
    for layer in range(n_layers):
        if layer not in run.pre:  # skipped: the stream passes
            pre.append(out if out is not None else following)
            continue
        entered = run.pre[layer]
        if out is not None and entered is not out and entered.shape == out.shape and not torch.equal(entered, out):
            additions[layer] = entered - out
        pre.append(entered)
        out = run.out[layer]
    assert out is not None
    return [*pre, out], additions


def _roles(model: Any, inputs: Mapping[str, Any], calls: Sequence[Called | None], n: int, n_pos: int) -> dict[str, tuple[str, ...]]:
    """What the axes of the layers' arguments are, from a second run with the prompts twice over and some tokens longer."""
    known = _ROLES.setdefault(model, {})
    mine = {path: x for called in calls if called is not None for path, x in arguments(called)}
    if all(path in known and _fits(known[path], x, n, n_pos) for path, x in mine.items()):
        return known
    more = next(m for m in (3, 5, 7) if m not in (n, n_pos))
    other: dict[str, Tensor] = {}
    try:
        run = _Run()
        with _watched(model, run), select_logits(model.anatomy.unembed, torch.zeros(1, dtype=torch.long)):
            model.hf(**_grown(inputs, n, n_pos, more), use_cache=False)
        other = {path: x for called in run.calls.values() for path, x in arguments(called)}
    except ERRORS:  # a prompt that cannot be made longer: sizes have to do
        pass
    for path, x in mine.items():
        if path in other and other[path].dim() == x.dim():
            known[path] = tuple(_role(a, b, n, more) for a, b in zip(x.shape, other[path].shape, strict=True))
        else:
            known[path] = tuple("pos" if a == n_pos else "batch" if a == n and i == 0 else "other" for i, a in enumerate(x.shape))
    return known


def _fits(roles: tuple[str, ...], x: Tensor, n: int, n_pos: int) -> bool:
    """Whether known roles can be those of this tensor: an axis that was of size one may have become prompts or positions."""
    if len(roles) != x.dim():
        return False
    return all(
        size == 1 if role == "one" else size in (1, n_pos) if role == "pos" else size % n == 0 or size == 1 if role == "batch" else True
        for role, size in zip(roles, x.shape, strict=True)
    )


def _role(size: int, other: int, n: int, more: int) -> str:
    if size == other:
        return "one" if size == 1 else "other"
    if other == size + more:
        return "pos"
    return "batch" if other == 2 * size and size % n == 0 else "other"


def _grown(inputs: Mapping[str, Any], n: int, n_pos: int, more: int) -> dict[str, Any]:
    """The prompts twice, each with its last token repeated some times."""
    out = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            if value.dim() > 1 and tuple(value.shape[:2]) == (n, n_pos):
                value = torch.cat([value, *[value[:, -1:]] * more], 1)
            value = torch.cat([value, value])
        elif isinstance(value, list):
            value = value * 2
        out[name] = value
    return out


def _starts(model: Any, inputs: Mapping[str, Any], run: _Run, calls: Sequence[Called | None]) -> list[int]:
    """For every position the nearest one at or before it from which a run may start: no earlier real position reads anything from there on."""
    n_pos = inputs["input_ids"].shape[1]
    if any(called is not None and layer not in run.attention for layer, called in enumerate(calls)):
        return [0] * n_pos  # a layer without softmax attention carries its state along the sequence
    real = inputs.get("attention_mask")
    safe = torch.ones(n_pos, dtype=torch.bool)
    seen: set[int] = set()
    for layer, call in run.attention.items():
        if model.anatomy.layers[layer].cross:
            continue
        if call.mask is None:
            if not call.causal and n_pos > 1:
                return [0] * n_pos
            continue
        if id(call.mask) in seen:
            continue
        seen.add(id(call.mask))
        mask = call.mask if call.mask.dtype == torch.bool else call.mask > torch.finfo(call.mask.dtype).min / 2
        read = mask.any(1)  # [prompt or 1, dest, src]
        if real is not None and real.shape == (inputs["input_ids"].shape[0], n_pos):
            read = read & real.bool().to(read.device)[:, :, None]
        furthest = torch.where(read.any(0), torch.arange(n_pos, device=read.device), -1).amax(1).cummax(0).values.cpu()
        safe[1:] &= furthest[:-1] < torch.arange(1, n_pos)
    starts, at = [], 0
    for position in range(n_pos):
        at = position if position and bool(safe[position]) else at
        starts.append(at)
    return starts
