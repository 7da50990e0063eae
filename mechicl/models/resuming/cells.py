"""What can be varied in a recorded run, the run itself, and how cells are laid together into passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch import Tensor

from mechicl.errors import OptionError, UnsupportedModelError
from mechicl.models.resuming.memory import copies_at_once
from mechicl.models.resuming.run import BEFORE_Z, Edit, Entry, Runner

PASS_COSTS = 64
"""What a pass costs beside its arithmetic, in tokens."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One variation of a recorded run.

    Attributes:
        layer: Where it enters: the first layer that differs.
        at: "pre": before the layer; "mid": after its attention was added to the stream (the layer's attention is not run again).
        start: First position that differs, padding counted; earlier ones are taken from the recorded run.
        stream: What it enters with, [n, pos - start, d_model], or a function that makes it when it is needed; None: the recorded stream.
        edits: Hook name (of this layer or a later one) -> edit of this cell's rows, [n, pos - start, ...] ("attn_scores" and "pattern": [n, head,
            pos - start, pos]). The edit returns the new rows, or changes them in place. Hook points before the first layer (vision tower, projector,
            embeddings) are allowed at layer 0: such a cell runs in full.
    """

    layer: int
    at: Literal["pre", "mid"] | str = "pre"
    start: int = 0
    stream: Tensor | Callable[[], Tensor] | None = None
    edits: Mapping[str, Edit] = field(default_factory=dict)


@dataclass(eq=False)
class Recorded:
    """One full run of some prompts, to vary.

    Attributes:
        model: The model.
        batch: The prompts as given.
        positions: Where logits are read, [n, k].
        logits: [n, k, vocab].
        additions: By layer, what the model adds to the stream before it that no layer wrote (DeepStack), [n, pos, d_model]; None where nothing.
            One entry more than there are layers.
        notes: What could not be done the fast way, and why.
        runner: Resumes the run; None where every cell is a full run.
    """

    model: Any
    batch: Any
    positions: Tensor
    logits: Tensor
    additions: Sequence[Tensor | None]
    notes: list[str]
    runner: Runner | None
    starts: Sequence[int]
    streams: Sequence[Tensor]
    middles: Sequence[Tensor | None]
    sites: Mapping[str, Tensor]

    @property
    def how(self) -> Literal["resumed", "full"]:
        """What becomes of cells: "full" where every one is a full run."""
        return "full" if self.runner is None else "resumed"

    @property
    def n(self) -> int:
        """Prompts."""
        return int(self.positions.shape[0])

    @property
    def n_pos(self) -> int:
        """Positions, padding included."""
        return int(self.streams[0].shape[1])

    def pre(self, layer: int) -> Tensor:
        """The stream before a layer [n, pos, d_model]; `layer` = n_layers: the final one."""
        return self.streams[layer]

    def mid(self, layer: int) -> Tensor:
        """The stream after a layer's attention [n, pos, d_model].

        Raises:
            UnsupportedModelError: the family does not form it.
        """
        found = self.middles[layer]
        if found is None:
            reason = getattr(self.model, "unavailable", {}).get(f"blocks.{layer}.hook_resid_mid", "the layer was not reached")
            raise UnsupportedModelError(f"layer {layer} must have a stream after attention; {reason}. Enter before the layer.")
        return found

    def __getitem__(self, name: str) -> Tensor:
        """What passed a hook point that `record` was asked to keep.

        Raises:
            OptionError: it was not.
        """
        if name not in self.sites:
            raise OptionError(f"site must be one that record(..., sites=...) kept; got {name!r}. Kept: {', '.join(self.sites) or 'none'}.")
        return self.sites[name]


@dataclass(frozen=True, eq=False)
class Plan:
    """A cell as it will run: entry and start may have moved to where the model can take it."""

    index: int
    cell: Cell
    layer: int
    at: Entry
    start: int
    full: bool = False
    alone: bool = False


def planned(recorded: Recorded, index: int, cell: Cell) -> Plan:
    n_layers, n_pos, runner = recorded.model.cfg.n_layers, recorded.n_pos, recorded.runner
    if not 0 <= cell.layer < n_layers:
        raise OptionError(f"layer of a cell must be in 0..{n_layers - 1}; got {cell.layer}. Layers count from 0.")
    if not 0 <= cell.start < n_pos:
        raise OptionError(f"start of a cell must be in 0..{n_pos - 1}; got {cell.start}. Count padding too.")
    if cell.at not in ("pre", "mid"):
        raise OptionError(f'at must be "pre" or "mid"; got {cell.at!r}. Choose where the cell enters its layer.')
    outside = False
    for name in cell.edits:
        recorded.model.check_hook_name(name)
        words = name.split(".")
        if words[0] != "blocks":
            outside = True
            continue
        layer, point = int(words[1]), ".".join(words[2:])
        if layer < cell.layer or (layer == cell.layer and cell.at == "mid" and point in (*BEFORE_Z, "attn.hook_z", "hook_attn_out")):
            raise OptionError(
                f"edits of a cell must be at or after layer {cell.layer} ({cell.at}); got {name!r}. Let the cell enter earlier."
            )
    if outside and (cell.layer or cell.at != "pre"):
        raise OptionError(f'edits outside the layers must enter at layer 0, "pre"; got layer {cell.layer}, {cell.at!r}. Change the cell.')
    if runner is None or outside:
        return Plan(index, cell, 0, "pre", 0, full=True, alone=outside and any(name.startswith("vision") for name in cell.edits))
    if cell.at == "mid" and not runner.enters_inside(cell.layer):
        cell = _from_before(recorded, cell)
    layer, at = cell.layer, cast(Entry, cell.at)
    if cell.stream is None and cell.edits:  # nothing differs before the first edit
        first = min(int(name.split(".")[1]) for name in cell.edits)
        layer, at = (first, "pre") if first > layer else (layer, at)
        own = [f"blocks.{layer}.{point}" for point in BEFORE_Z]
        if at == "pre" and runner.enters_at_z(layer) and not any(name in cell.edits for name in own):
            at = "z"
    return Plan(index, cell, layer, at, recorded.starts[cell.start])


def _from_before(recorded: Recorded, cell: Cell) -> Cell:
    """The same cell entered before its layer, for a layer that cannot be entered inside; its stream replaces what the layer's attention leaves."""
    name, stream = f"blocks.{cell.layer}.hook_resid_mid", cell.stream
    if stream is None:
        stream = recorded.mid(cell.layer)[:, cell.start :]
    recorded.model.check_hook_name(name)
    later = cell.edits.get(name)

    def replace(x: Tensor) -> Tensor:
        new = (stream() if callable(stream) else stream).to(x)
        return new if later is None else later(new.clone())

    return Cell(cell.layer, "pre", cell.start, None, {**cell.edits, name: replace})


def how_many(recorded: Recorded, queue: Sequence[Plan], limit: int | None) -> int:
    """How many of the queued cells run together: those that fit, and whose starts lie near enough not to waste more than passes cost."""
    first = queue[0]
    if first.alone:
        return 1
    most = limit if limit is not None else copies_at_once(recorded, first.layer, first.start, first.full)
    size, wasted, useful = 0, 0, 0
    for plan in queue[:most]:
        wasted += (plan.start - first.start) * recorded.n
        useful += (recorded.n_pos - plan.start) * recorded.n
        if wasted > max(PASS_COSTS, useful // 8):
            break
        size += 1
    return size
