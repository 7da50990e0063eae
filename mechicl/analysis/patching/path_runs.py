"""Both runs of some pairs, and what every single edge carries from one into the other: the passes behind path patching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechicl.analysis.ablation.switches import z_name
from mechicl.analysis.patching.metrics import Contrast
from mechicl.errors import UnsupportedModelError
from mechicl.models.resuming.resume import Cell, Recorded, record, run_cells
from mechicl.models.streams import has_mlp, head_outputs, mlp, read, unembed
from mechicl.prompts.batch import Batch
from mechicl.results.nodes import Receiver, Sender, feeds

Freeze = Literal["all", "heads"]
"""What keeps its output of the start run between sender and receiver. all: everything, so that only the edge itself is exchanged. heads: attention only; MLPs
on the way are computed anew and carry on what they make of the change (Wang et al. 2023)."""

NORM_TOLERANCE = 0.02
"""Largest difference between a layer's attention called through its norm and as recorded, as a share of its largest value (half precision rounds sums of the stream)."""

CHUNK_BYTES = 1 << 28
"""Memory for the changes that are held at once."""


@dataclass(eq=False)
class Runs:
    """Two runs of the same places: `start`, which is varied, and `other`, from which the senders' outputs are taken.

    `mask` [batch, pos]: where receivers see the change; None everywhere. `measure`: from logits [batch, n, vocab] to the metric.
    """

    model: Any
    start: Recorded
    other: Recorded
    mask: Bool[Tensor, "batch pos"] | None
    measure: Callable[[Tensor], np.ndarray]

    @staticmethod
    @torch.no_grad()
    def of(
        model: Any, contrast: Contrast, clean: Batch, corrupt: Batch, direction: str, where: Callable[[Batch], Tensor] | None
    ) -> tuple[Runs, np.ndarray, np.ndarray]:
        """Both runs recorded, and the metric of the clean and of the corrupt one [pair]. `where` gives the mask of the prompts with the scored
        labels behind them."""
        wide = {"clean": contrast.widen(clean), "corrupt": contrast.widen(corrupt)}
        sites = [z_name(layer) for layer in range(model.cfg.n_layers)]
        sites += [f"blocks.{layer}.hook_mlp_out" for layer in range(model.cfg.n_layers) if has_mlp(model, layer)]
        runs = {side: record(model, batch, positions=contrast.positions(batch), sites=sites) for side, batch in wide.items()}
        measure = contrast.reader(clean, lambda: runs["clean"].logits)
        first, second = ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")
        mask = None if where is None else where(wide[first]).to(runs[first].logits.device)
        return Runs(model, runs[first], runs[second], mask, measure), measure(runs["clean"].logits), measure(runs["corrupt"].logits)

    @torch.no_grad()
    def effects(
        self, senders: Sequence[Sender], receivers: Sequence[Receiver], freeze: Freeze, progress: Callable[[int], Any] | None = None
    ) -> Float[np.ndarray, "batch sender receiver"]:
        """The metric of every edge's run; NaN where there is no edge. Senders are taken a few at a time, so that their changes fit in memory."""
        base = self.measure(self.start.logits)
        raw = np.full((len(base), len(senders), len(receivers)), np.nan)
        size = self.start.pre(0).numel() * 4
        if all(receiver.kind == "logits" for receiver in receivers):
            size = size * self.start.positions.shape[1] // self.start.n_pos
        together = max(1, CHUNK_BYTES // (4 * max(size, 1)))
        for begin in range(0, len(senders), together):
            some = senders[begin : begin + together]
            part = _Sweep(self, some, receivers, freeze, base, raw[:, begin : begin + len(some)], progress or (lambda _: None))
            part.run()
        return raw


def behind_norm(model: Any, layer: int) -> bool:
    """Whether a norm of its own stands between the layer's output projection and the stream, so that its heads' parts do not add up."""
    part = model.anatomy.layers[layer] if hasattr(model, "anatomy") else None
    return part is not None and not part.additive and part.attn_out is not None and part.o_proj is not None


class _Sweep:
    """Some senders' changes, carried up through the layers: at every layer the receivers there read them.

    `change` [sender, prompt, pos, d_model]: what is added to the start run's stream at the present depth, zero while the sender has not run. For the logits alone
    only the positions that are read are followed.
    """

    def __init__(
        self, runs: Runs, senders: Sequence[Sender], receivers: Sequence[Receiver], freeze: Freeze, base: np.ndarray, raw: np.ndarray,
        progress: Callable[[int], Any],
    ) -> None:  # fmt: skip
        self.runs, self.model, self.senders, self.freeze, self.base, self.raw, self.progress = (
            runs,
            runs.model,
            senders,
            freeze,
            base,
            raw,
            progress,
        )
        self.columns: dict[tuple[str, int], list[tuple[int, Receiver]]] = {}
        for column, receiver in enumerate(receivers):
            self.columns.setdefault((receiver.kind, receiver.layer), []).append((column, receiver))
        self.last = max(receiver.layer for receiver in receivers)
        self.cut = set(self.columns) == {("logits", self.model.cfg.n_layers)}
        pre = self._at(runs.start.pre(0))
        self.change = pre.new_zeros(len(senders), *pre.shape)

    def _at(self, x: Tensor) -> Tensor:
        """x [prompt, pos, ...] at the positions that are followed."""
        if not self.cut:
            return x
        where = self.runs.start.positions.to(x.device)
        return x.gather(1, where.reshape(*where.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))

    def run(self) -> None:
        """Up through the layers."""
        model = self.model
        for layer in range(self.last + 1):
            self._embed(layer)
            if layer == model.cfg.n_layers:
                self._logits()
                return
            for kind in ("q", "k", "v"):
                if (kind, layer) in self.columns:
                    self._heads(kind, layer)
            self._own_heads(layer)
            if has_mlp(model, layer):
                self._mlp(layer)

    def _own_heads(self, layer: int) -> None:
        """The layer's heads among the senders."""
        found = [(k, sender.head) for k, sender in enumerate(self.senders) if sender.kind == "head" and sender.layer == layer]
        if not found:
            return
        here, there = (self._at(run[z_name(layer)]) for run in (self.runs.start, self.runs.other))
        if behind_norm(self.model, layer):
            self._normed_heads(layer, found, here, there)
            return
        z = there - here
        head_outputs(self.model, layer, z[:1, :1])  # refuses a family whose heads are not summands
        weight = self.model.blocks[layer].attn.W_O
        for k, head in found:
            self.change[k] = z[:, :, head] @ weight[head].to(z.dtype)

    def _normed_heads(self, layer: int, found: list[tuple[int, int]], here: Tensor, there: Tensor) -> None:
        """Heads behind a norm: what the norm makes of all heads' sum with one of them exchanged, less what it makes of the sum as it was."""
        part, start = self.model.anatomy.layers[layer], self.runs.start
        before = part.attn_out(part.o_proj(here.flatten(2)))
        given = self._at(start.mid(layer)) - self._at(start.pre(layer))
        if float((before - given).abs().max()) > NORM_TOLERANCE * float(given.abs().max()):
            raise UnsupportedModelError(
                f"layer {layer} of {self.model.cfg.model_type} must put nothing but a norm between its heads and the stream; it does. Use activation patching."
            )
        for k, head in found:
            z = here.clone()
            z[:, :, head] = there[:, :, head]
            self.change[k] = part.attn_out(part.o_proj(z.flatten(2))) - before

    def _embed(self, layer: int) -> None:
        """The embeddings' change; what a family adds of the picture between layers (DeepStack) belongs to it from there on."""
        if Sender("embed") not in self.senders:
            return
        k = self.senders.index(Sender("embed"))
        start, other = self.runs.start, self.runs.other
        if layer == 0:
            self.change[k] = self._at(other.pre(0) - start.pre(0))
        elif (theirs := other.additions[layer]) is not None and (own := start.additions[layer]) is not None:
            self.change[k] += self._at(theirs - own)

    def _seen(self, receiver: Receiver) -> tuple[list[int], Tensor]:
        """Senders that the receiver has behind it, and their changes where it sees them [sender, prompt, pos, d_model]."""
        which = [k for k, sender in enumerate(self.senders) if feeds(sender, receiver)]
        change = self.change[which]
        mask = self.runs.mask
        return which, change if mask is None else change * self._at(mask)[:, :, None]

    def _heads(self, kind: str, layer: int) -> None:
        wanted = self.columns[kind, layer]
        which, change = self._seen(wanted[0][1])
        if not which:
            return
        stream = self.runs.start.pre(layer)
        before = read(self.model, layer, kind, stream)
        values = read(self.model, layer, kind, (stream + change).flatten(0, 1)).unflatten(0, (len(which), -1))
        cells, places = [], []
        for k, value in zip(which, values, strict=True):
            for column, receiver in wanted:
                differs = (value[:, :, receiver.head] != before[:, :, receiver.head]).any(-1).any(0)
                if self._unmoved(k, column, differs):
                    continue
                first = int(differs.long().argmax())
                edit = _replace(value[:, first:, receiver.head], receiver.head)
                cells.append(Cell(layer, start=first, edits={f"blocks.{layer}.attn.hook_{kind}": edit}))
                places.append((k, column))
        self._run(cells, places)

    def _mlp(self, layer: int) -> None:
        """Receivers at the layer's MLP; then the MLP's own part in the changes."""
        start, other = self.runs.start, self.runs.other
        carry = self.freeze == "heads"
        middle = self._at(start.mid(layer)) if carry or ("mlp", layer) in self.columns else None
        before = None if middle is None else mlp(self.model, layer, middle)
        if middle is not None and before is not None and ("mlp", layer) in self.columns:
            which, change = self._seen(Receiver("mlp", layer))
            moved = self._through(layer, middle, before, change)
            ((column, _),) = self.columns["mlp", layer]
            self._after_mlp(layer, which, column, moved)
        if middle is not None and before is not None and carry:
            which = [k for k, sender in enumerate(self.senders) if feeds(sender, Receiver("mlp", layer))]
            if which:
                self.change[which] += self._through(layer, middle, before, self.change[which])
        if Sender("mlp", layer) in self.senders:
            name = f"blocks.{layer}.hook_mlp_out"
            self.change[self.senders.index(Sender("mlp", layer))] = self._at(other[name] - start[name])

    def _through(self, layer: int, middle: Tensor, before: Tensor, change: Tensor) -> Tensor:
        """What the MLP makes of changes [sender, prompt, pos, d_model] of its input."""
        if not len(change):
            return change
        return mlp(self.model, layer, (middle + change).flatten(0, 1)).unflatten(0, (len(change), -1)) - before

    def _after_mlp(self, layer: int, which: list[int], column: int, moved: Tensor) -> None:
        stream, cells, places = self.runs.start.pre(layer + 1), [], []
        for k, one in zip(which, moved, strict=True):
            differs = (one != 0).any(-1).any(0)
            if self._unmoved(k, column, differs):
                continue
            if layer + 1 == self.model.cfg.n_layers:
                self._read_out(k, column, one)
                continue
            first = int(differs.long().argmax())
            cells.append(Cell(layer + 1, start=first, stream=(stream + one)[:, first:]))
            places.append((k, column))
        self._run(cells, places)

    def _logits(self) -> None:
        ((column, receiver),) = self.columns["logits", self.model.cfg.n_layers]
        which, change = self._seen(receiver)
        for k, one in zip(which, change, strict=True):
            self._read_out(k, column, one)

    def _read_out(self, k: int, column: int, change: Tensor) -> None:
        """The metric of the final stream with a change [prompt, pos, d_model]."""
        start = self.runs.start
        index = start.positions.to(change.device)[..., None].expand(-1, -1, change.shape[-1])
        moved = change if self.cut else change.gather(1, index)
        if bool((moved != 0).any()):
            self.raw[:, k, column] = self.runs.measure(unembed(self.model, start.pre(self.model.cfg.n_layers).gather(1, index) + moved))
        else:
            self.raw[:, k, column] = self.base
        self.progress(1)

    def _unmoved(self, k: int, column: int, differs: Tensor) -> bool:
        """An edge that changes nothing in what its receiver computes needs no run."""
        if bool(differs.any()):
            return False
        self.raw[:, k, column] = self.base
        self.progress(1)
        return True

    def _run(self, cells: list[Cell], places: list[tuple[int, int]]) -> None:
        for (k, column), values in zip(
            places, run_cells(self.runs.start, cells, lambda logits, _: self.runs.measure(logits), progress=self.progress), strict=True
        ):
            self.raw[:, k, column] = values


def _replace(value: Tensor, head: int) -> Callable[[Tensor], Tensor]:
    """A head's queries, keys or values [prompt, pos, d_head] put in place."""

    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, :, head] = value.to(x.dtype)
        return x

    return edit
