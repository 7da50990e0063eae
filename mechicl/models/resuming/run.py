"""One resumed pass: the decoder from some layer on, for many copies of the recorded prompts. What toys and production models share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mechicl.errors import HookNotFiredError
from mechicl.models.hooked import active

Entry = Literal["pre", "z", "mid"]
"""Where a pass enters its first layer: before it, at the heads' outputs, or after attention was added."""

BEFORE_Z = (
    "hook_resid_pre",
    "ln1.hook_scale",
    "ln1.hook_normalized",
    *(f"attn.hook_{name}" for name in ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern")),
)
"""Hook points of a layer up to its heads' outputs."""

Edit = Callable[[Tensor], Tensor]
HEADS_FIRST = ("hook_attn_scores", "hook_pattern")
"""Hook points whose positions are their third axis."""


@dataclass(frozen=True, eq=False)
class Pass:
    """What one pass does.

    Attributes:
        layer: First layer that runs (or whose MLP runs).
        at: Where the pass enters it.
        start: First position that runs; earlier ones are as recorded.
        stream: What enters, [prompt * copy, pos - start, d_model] (at "z": [..., head, d_head]); copies innermost.
        copies: Copies of every prompt.
        hooks: Hook name -> function of the tensor there.
    """

    layer: int
    at: Entry
    start: int
    stream: Tensor
    copies: int
    hooks: Mapping[str, Edit] = field(default_factory=dict)


class Runner(ABC):
    """Runs passes over one recorded run. `trim`: the last layer is evaluated only where logits are asked for (if nothing listens there)."""

    model: Any
    pre: Sequence[Tensor]
    positions: Tensor
    additions: Sequence[Tensor | None]
    first: int

    trim = True

    def __init__(
        self, model: Any, pre: Sequence[Tensor], positions: Tensor, additions: Sequence[Tensor | None], recorded_logits: Tensor
    ) -> None:
        self.model, self.pre, self.positions, self.additions = model, pre, positions, additions
        self.n_layers: int = model.cfg.n_layers
        self.recorded_logits = recorded_logits
        self._z: dict[int, Tensor] = {}
        self.first = int(positions.min())

    @abstractmethod
    def block(self, layer: int, x: Tensor, job: Pass) -> Tensor:
        """The stream after a layer."""

    @abstractmethod
    def last_block(self, x: Tensor, job: Pass) -> Tensor:
        """The stream after the last layer at positions `first`, ..."""

    @abstractmethod
    def rest(self, layer: int, x: Tensor, job: Pass) -> Tensor:
        """The stream after a layer that was entered at "z" or "mid"; x [row, position, ...], the last positions."""

    @abstractmethod
    def unembed(self, x: Tensor) -> Tensor:
        """Logits of the final stream [row, n, d_model]."""

    @contextmanager
    def connected(self, job: Pass) -> Iterator[None]:
        """Whatever the model needs to be in place while its layers are called."""
        yield

    def run(self, job: Pass) -> Tensor:
        """Logits [prompt * copy, asked position, vocab].

        Raises:
            HookNotFiredError: an edit's hook point was never reached.
        """
        fired: set[str] = set()
        hooks = [(name, _noting(name, edit, fired)) for name, edit in job.hooks.items()]
        with attached(self.model, hooks), self.connected(job):
            x, start = self._stream(job)
        if silent := [name for name in job.hooks if name not in fired]:
            raise HookNotFiredError(
                f"hook {silent[0]!r} must be reached by the forward pass; it never was. The prompt may have no pictures, or the layer was skipped."
            )
        return self._logits(x, start, job)

    def _stream(self, job: Pass) -> tuple[Tensor, int]:
        """The final stream, and the position at which it starts."""
        x, layer, last = job.stream, job.layer, self.n_layers - 1
        trim = self.trim and self.first > job.start and not self.listening(last)
        if job.at != "pre":
            if layer == last and trim:
                return self.rest(layer, x[:, self.first - job.start :], job), self.first
            x = self._added(layer + 1, self.rest(layer, x, job), job)
            layer += 1
        for at in range(layer, self.n_layers):
            if at == last and trim:
                return self.last_block(x, job), self.first
            x = self._added(at + 1, self.block(at, x, job), job)
        return x, job.start

    def _added(self, layer: int, x: Tensor, job: Pass) -> Tensor:
        extra = self.additions[layer]
        if extra is None:
            return x
        return (x.unflatten(0, (-1, job.copies)) + extra[:, None, job.start :]).flatten(0, 1)

    def _logits(self, x: Tensor, start: int, job: Pass) -> Tensor:
        where = self.positions.repeat_interleave(job.copies, 0) - start
        known = where < 0  # before the first position that differs: nothing has changed there
        index = where.clamp_min(0)[..., None].expand(-1, -1, x.shape[-1])
        logits = self.unembed(x.gather(1, index))
        if bool(known.any()):
            logits = torch.where(known[..., None], self.recorded_logits.repeat_interleave(job.copies, 0), logits)
        return logits

    def enters_inside(self, layer: int) -> bool:
        """Whether a pass may enter the layer after its attention."""
        return True

    def enters_at_z(self, layer: int) -> bool:
        """Whether a pass may enter the layer at its heads' outputs."""
        return not any(
            active(self.model.hook_dict[f"blocks.{layer}.{name}"]) for name in BEFORE_Z if f"blocks.{layer}.{name}" in self.model.hook_dict
        )

    def z(self, layer: int) -> Tensor:
        """The recorded outputs of a layer's heads [prompt, pos, head, d_head], computed anew from the stream (those of one layer are kept)."""
        if layer not in self._z:
            kept: list[Tensor] = []
            job = Pass(layer, "pre", 0, self.pre[layer], 1)
            hooks = [(f"blocks.{layer}.attn.hook_z", lambda x, *, hook: kept.append(x))]
            with attached(self.model, hooks), self.connected(job):
                self.block(layer, job.stream, job)
            self._z = {layer: kept[0]}
        return self._z[layer]

    def listening(self, layer: int) -> bool:
        """Whether anything listens at a hook point of the layer."""
        return any(active(point) for name, point in self.model.hook_dict.items() if name.startswith(f"blocks.{layer}."))


@contextmanager
def attached(model: Any, hooks: Sequence[tuple[str, Callable[..., Any]]]) -> Iterator[None]:
    """Hooks on some hook points and nothing else touched: `model.hooks` walks over every hook point, which a short pass would notice."""
    handles = []
    try:
        for name, hook in hooks:
            point = model.hook_dict[name]
            handles.append((point, point.add_hook(hook)))
        yield
    finally:
        for point, handle in handles:
            handle.hook.remove()
            point.fwd_hooks = [one for one in point.fwd_hooks if one is not handle]


def _noting(name: str, edit: Edit, fired: set[str]) -> Callable[..., Tensor]:
    def hook(x: Tensor, *, hook: Any) -> Tensor:
        fired.add(name)
        return edit(x)

    return hook


def has_positions(model: Any, name: str) -> bool:
    """Whether a hook point has the sequence's positions: keys and values of cross-attention, features and the vision tower have not."""
    words = name.split(".")
    if words[0] != "blocks":
        return name in ("hook_embed", "hook_pos_embed")
    anatomy = getattr(model, "anatomy", None)
    return anatomy is None or not (anatomy.layers[int(words[1])].cross and words[-1] in ("hook_k", "hook_v", "hook_rot_k"))


def row_edit(model: Any, name: str, edits: Sequence[tuple[int, int, Edit]], n: int, copies: int, *, inner: bool = True) -> Edit:
    """One function for a pass out of its copies' own edits.

    Args:
        model: The model.
        name: The hook point.
        edits: For each edited copy: its number, how many of the pass's positions lie before the cell's start, and its edit.
        n: Prompts.
        copies: Copies of every prompt.
        inner: Copies are the inner part of the first axis; False: the outer one.
    """
    axis = 2 if name.endswith(HEADS_FIRST) else 1
    per_position = has_positions(model, name)

    def edit(x: Tensor) -> Tensor:
        out = x.clone()
        for copy, offset, one in edits:
            rows = out.unflatten(0, (n, copies, -1))[:, copy] if inner else out.unflatten(0, (copies, -1))[copy]
            mine = rows.flatten(0, 1) if inner else rows  # with several entries per prompt (tiles of pictures) a copy, else a view
            given = mine.narrow(axis, offset, x.shape[axis] - offset) if offset and per_position else mine
            edited = one(given)
            if edited is not None and edited is not given:
                given.copy_(edited)
            if inner and rows.shape[1] > 1:
                rows.copy_(mine.unflatten(0, (n, -1)))
        return out

    return edit
