"""Prompts that are recorded once and then run with edits, many cells at a time: resumed where they change, or (to check with) in full."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from mechicl.analysis.patching.cells import hook_name
from mechicl.analysis.patching.edits import Edit, keep, run_naive
from mechicl.models.resuming.resume import Cell, Recorded, record, run_cells
from mechicl.prompts.batch import Batch

Engine = Literal["resume", "naive"]
OUTPUTS = ("hook_resid_post", "hook_mlp_out")
"""Hook points behind which a cell can enter the next layer."""


class Base:
    """Prompts that are patched.

    Args:
        model: The model.
        batch: The prompts, widened by the metric.
        positions: Where logits are read, [batch, k].
        hooks: Hook points whose values are needed, and those that will be edited.
        engine: "resume" or "naive".
        batch_size: Prompts that a full run takes at once.
    """

    model: Any
    batch: Batch
    positions: Tensor
    together: int
    logits: Tensor
    kept: dict[str, Tensor]

    def __init__(self, model: Any, batch: Batch, positions: Tensor, hooks: Sequence[str], engine: Engine, batch_size: int) -> None:
        self.model, self.batch, self.positions, self.together = model, batch, positions, max(1, batch_size // batch.n)
        self.recorded: Recorded | None = None
        names = list(dict.fromkeys(hooks))
        if engine == "naive":
            self.logits, self.kept = keep(model, batch, names, positions)
        else:
            self.recorded = record(model, batch, positions=positions, sites=names)
            self.logits, self.kept = self.recorded.logits, dict(self.recorded.sites)

    @property
    def notes(self) -> list[str]:
        """What could not be done the fast way."""
        return [] if self.recorded is None else list(self.recorded.notes)

    @property
    def gigabytes(self) -> float:
        """Activations that are held."""
        streams = [] if self.recorded is None else [*self.recorded.streams, *(x for x in self.recorded.middles if x is not None)]
        return sum(x.numel() * x.element_size() for x in (*self.kept.values(), *streams)) / 1e9

    def run(self, cells: Sequence[Sequence[Edit]], read: Callable[[Tensor], Any]) -> list[Any]:
        """What `read` makes of the logits [batch, k, vocab] of every cell, in their order."""
        towers = any(edit.hook.startswith("vision") for cell in cells for edit in cell)
        if self.recorded is None or towers:
            return run_naive(self.model, self.batch, cells, self.positions, read, together=self.together)
        results: list[Any] = [None] * len(cells)
        cells = [[self._needed(edit) for edit in cell] for cell in cells]
        unchanged = [k for k, cell in enumerate(cells) if all(edit.start >= self.recorded.n_pos for edit in cell)]
        changed = [k for k in range(len(cells)) if k not in set(unchanged)]
        for k in unchanged:
            results[k] = read(self.logits)
        made = [self._cell(cells[k]) for k in changed]
        for k, value in zip(changed, run_cells(self.recorded, made, lambda logits, _: read(logits)), strict=True):
            results[k] = value
        return results

    def _needed(self, edit: Edit) -> Edit:
        """An edit of the positions that it changes: pairs have most of their activations in common, and what is equal need not be run."""
        if edit.add:
            own = torch.zeros((), device=edit.value.device, dtype=edit.value.dtype)
        else:
            own = self._own(edit.hook)
            if own is None:
                return edit
        one = slice(None) if edit.head is None else slice(edit.head, edit.head + 1)
        value = edit.value.to(own) if edit.head is None else edit.value[:, :, one].to(own)
        differs = (value != (own if edit.head is None else own[:, :, one])).flatten(2).any(-1).cpu()
        return replace(edit, mask=edit.mask & differs)

    def _own(self, hook: str) -> Tensor | None:
        """The base's own activation, where it is at hand."""
        assert self.recorded is not None
        layer, point = _place(hook)
        if point == "hook_resid_pre":
            return self.recorded.pre(layer)
        return self.recorded.middles[layer] if point == "hook_resid_mid" else self.kept.get(hook)

    def _cell(self, edits: Sequence[Edit]) -> Cell:
        """Edits as a resumed cell: a stream to enter with where that is all that changes at first, and edits of hook points from there on."""
        recorded = self.recorded
        assert recorded is not None
        first, *more = edits
        start = min(edit.start for edit in edits)
        layer, point = _place(first.hook)
        middle = recorded.middles[layer] is not None
        if first.hook == "hook_embed":
            return Cell(0, "pre", start, lambda: self._moved(first, recorded.pre(0), start), _functions(more, start))
        if point == "hook_resid_pre":
            return Cell(layer, "pre", start, lambda: first(recorded.pre(layer)[:, start:], start), _functions(more, start))
        if point == "hook_resid_mid" and middle:
            return Cell(layer, "mid", start, lambda: first(recorded.mid(layer)[:, start:], start), _functions(more, start))
        if point in OUTPUTS and layer + 1 < recorded.model.cfg.n_layers:
            return Cell(layer + 1, "pre", start, lambda: self._moved(first, recorded.pre(layer + 1), start), _functions(more, start))
        return Cell(layer, "pre", start, None, _functions(edits, start))

    def _moved(self, edit: Edit, stream: Tensor, start: int) -> Tensor:
        """A later stream, moved by what an edit changes of one of its summands."""
        own = self.kept[edit.hook][:, start:]
        return stream[:, start:] + (edit(own, start) - own)


def _functions(edits: Sequence[Edit], start: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """By hook point; several edits of one point follow each other."""
    found: dict[str, list[Edit]] = {}
    for edit in edits:
        found.setdefault(edit.hook, []).append(edit)

    def both(some: list[Edit]) -> Callable[[Tensor], Tensor]:
        def function(x: Tensor) -> Tensor:
            for edit in some:
                x = edit(x, start)
            return x

        return function

    return {name: both(some) for name, some in found.items()}


def _place(hook: str) -> tuple[int, str]:
    """Layer and hook point of a name; layer 0 for what comes before the layers."""
    words = hook.split(".")
    return (int(words[1]), ".".join(words[2:])) if words[0] == "blocks" else (0, hook)


def base_hooks(edited: Sequence[str], stacked: Sequence[int]) -> list[str]:
    """Hook points of the base run that must be kept for these to be edited."""
    streams = ("hook_resid_pre", "hook_resid_mid")
    own = [hook for hook in edited if not hook.startswith("vision") and not hook.endswith("pattern") and _place(hook)[1] not in streams]
    return [*dict.fromkeys([*own, *stack_hooks(stacked)])]


def stack_hooks(stacked: Sequence[int]) -> list[str]:
    """Hook points from which the additions before these layers are read."""
    return [hook_name(site, layer - (site == "resid_post")) for layer in stacked for site in ("resid_pre", "resid_post")]


def additions(kept: dict[str, Tensor], stacked: Sequence[int]) -> dict[int, Tensor]:
    """What was added to the stream before these layers that no layer wrote, [batch, pos, d_model]."""
    return {layer: kept[hook_name("resid_pre", layer)] - kept[hook_name("resid_post", layer - 1)] for layer in stacked}


def make_base(
    model: Any, batch: Batch, positions: Tensor, edited: Sequence[str], stacked: Sequence[int], engine: Engine, batch_size: int
) -> Base:
    """A base whose prompts can be edited at these hook points (vision towers: their values are kept)."""
    towers = [hook for hook in edited if hook.startswith("vision")]
    with torch.no_grad():
        return Base(model, batch, positions, [*base_hooks(edited, stacked), *towers], engine, batch_size)
