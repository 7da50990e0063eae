"""Many variations of one recorded run, each resumed where it differs: what makes sweeps of patches, knock-outs and edges affordable.

`record` runs the prompts once and keeps the streams and every layer's keys and values. A `Cell` says where a variation enters (layer, before or after its
attention, first position that differs) and what is edited from there on. `run_cells` lays the cells that enter at the same place side by side in one pass,
which starts at that layer and runs only the positions from there on; earlier positions serve with their recorded keys and values. The last layer is
evaluated only where logits are asked for.

The numbers are those of full runs with hooks. A production model is taken only after a resumed run has reproduced its recorded logits; one that does not
runs in full for every batch of cells, and `Recorded.how` and `Recorded.notes` say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from mechicl.errors import HookNotFiredError, OptionError, UnsupportedModelError
from mechicl.models.resume_full import run_in_full
from mechicl.models.resume_memory import copies_at_once, out_of_memory
from mechicl.models.resume_run import BEFORE_Z, Edit, Entry, Pass, Runner, row_edit
from mechicl.models.resume_toy import record_toy
from mechicl.models.toy import ToyTransformer


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
        how: "resumed", or "full" where every cell is a full run.
        notes: What could not be done the fast way, and why.
    """

    model: Any
    batch: Any
    positions: Tensor
    logits: Tensor
    additions: Sequence[Tensor | None]
    how: Literal["resumed", "full"]
    notes: list[str]
    runner: Runner
    starts: Sequence[int]
    streams: Sequence[Tensor]
    middles: Sequence[Tensor | None]
    sites: Mapping[str, Tensor]

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


@torch.no_grad()
def record(model: Any, batch: Any, *, positions: Any = "last", sites: Sequence[str] = ()) -> Recorded:
    """One full run, kept for `run_cells`.

    Args:
        model: A toy or a hooked production model.
        batch: A Batch, its inputs, or tokens.
        positions: Where logits will be read: "last", or a LongTensor [k] or [n, k].
        sites: Hook names whose values are kept too.

    Raises:
        OptionError: positions outside the prompts.
        HookNameError: a site does not exist.
        HookNotFiredError: a site was never reached.
    """
    if isinstance(positions, str) and positions != "last":
        raise OptionError(f'positions must be "last" or a tensor of positions; got {positions!r}. Give the positions that are read.')
    kept: dict[str, Tensor] = {}
    hooks = [(name, _keep(kept, name)) for name in dict.fromkeys(sites)]
    if isinstance(model, ToyTransformer):
        where = _table(model._last(batch) if isinstance(positions, str) else model._checked(batch, positions), _n_prompts(model, batch))
        runner, streams, middles, logits = record_toy(model, batch, where, hooks)
        starts = list(range(streams[0].shape[1]))
        recorded = Recorded(model, batch, where, logits, runner.additions, "resumed", [], runner, starts, streams, middles, kept)
    else:
        from mechicl.models.resume_record import record_vlm

        inputs = model.inputs(batch)
        where = _table(model._positions(batch, inputs, positions), inputs["input_ids"].shape[0])
        found = record_vlm(model, inputs, where, hooks)
        recorded = Recorded(
            model, batch, where, found.logits, found.runner.additions, found.how, found.notes, found.runner, found.starts, found.streams,
            found.middles, kept,
        )  # fmt: skip
    if silent := [name for name in sites if name not in kept]:
        raise HookNotFiredError(f"hook {silent[0]!r} must be reached by the forward pass; it never was. Leave it out of sites.")
    return recorded


def run_cells(
    recorded: Recorded,
    cells: Sequence[Cell],
    reduce: Callable[[Tensor, int], Any] | None = None,
    *,
    copies: int | None = None,
    progress: Callable[[int], Any] | None = None,
) -> list[Any]:
    """Logits of every cell, or what `reduce` makes of them, in the order of the cells.

    Args:
        recorded: The run that the cells vary.
        cells: The variations.
        reduce: Called as reduce(logits [n, k, vocab], index of the cell) as soon as the cell's pass is done.
        copies: At most how many cells go through the model at once; None: what fits comfortably.
        progress: Called with how many cells each pass finished (a tqdm bar's `update`).

    Raises:
        OptionError: a cell outside the model or the prompts, or an edit before the cell's layer.
        HookNameError, HookNotFiredError: an edit of a hook point that does not exist, or is never reached.
    """
    results: list[Any] = [None] * len(cells)
    for done in passes(recorded, cells, copies=copies):
        for index, logits in done:
            results[index] = logits if reduce is None else reduce(logits, index)
        if progress is not None:
            progress(len(done))
    return results


def passes(recorded: Recorded, cells: Sequence[Cell], *, copies: int | None = None) -> Iterator[list[tuple[int, Tensor]]]:
    """The passes of `run_cells`, one at a time: (index of the cell, its logits [n, k, vocab]). Nothing is attached to the model between two of them."""
    plans = [_plan(recorded, index, cell) for index, cell in enumerate(cells)]
    groups: dict[tuple[Any, ...], list[_Plan]] = {}
    for plan in plans:
        groups.setdefault((plan.full, plan.layer, plan.at, plan.alone), []).append(plan)
    for key in sorted(groups, key=lambda k: (k[0], k[1], k[2], k[3])):
        queue = sorted(groups[key], key=lambda plan: plan.start)
        limit = copies
        while queue:
            size = _how_many(recorded, queue, limit)
            try:
                done = _run(recorded, queue[:size])
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not out_of_memory(error):
                    raise
                limit = max(1, size // 2)
                continue
            yield done
            queue = queue[size:]


@dataclass(frozen=True, eq=False)
class _Plan:
    """A cell as it will run: entry and start may have moved to where the model can take it."""

    index: int
    cell: Cell
    layer: int
    at: Entry
    start: int
    full: bool = False
    alone: bool = False


def _plan(recorded: Recorded, index: int, cell: Cell) -> _Plan:
    n_layers, n_pos = recorded.runner.n_layers, recorded.n_pos
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
    if recorded.how == "full" or outside:
        return _Plan(index, cell, 0, "pre", 0, full=True, alone=outside and any(name.startswith("vision") for name in cell.edits))
    if cell.at == "mid" and not recorded.runner.enters_inside(cell.layer):
        cell = _from_before(recorded, cell)
    at = cast(Entry, cell.at)
    if cell.at == "pre" and cell.stream is None and cell.edits and recorded.runner.enters_at_z(cell.layer):
        at = "pre" if any(f"blocks.{cell.layer}.{point}" in cell.edits for point in BEFORE_Z) else "z"
    return _Plan(index, cell, cell.layer, at, recorded.starts[cell.start])


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


def _how_many(recorded: Recorded, queue: Sequence[_Plan], limit: int | None) -> int:
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


PASS_COSTS = 64
"""What a pass costs beside its arithmetic, in tokens."""


@torch.no_grad()
def _run(recorded: Recorded, plans: Sequence[_Plan]) -> list[tuple[int, Tensor]]:
    first, copies = plans[0], len(plans)
    start, n = first.start, recorded.n
    edits: dict[str, list[tuple[int, int, Edit]]] = {}
    for copy, plan in enumerate(plans):
        for name, edit in plan.cell.edits.items():
            edits.setdefault(name, []).append((copy, plan.cell.start - start, edit))
    if first.full:
        logits = run_in_full(recorded, [plan.cell for plan in plans], edits)
        return [(plan.index, logits[copy]) for copy, plan in enumerate(plans)]
    hooks = {name: row_edit(recorded.model, name, some, n, copies) for name, some in edits.items()}
    stream = _entering(recorded, first, [plan.cell for plan in plans])
    logits = recorded.runner.run(Pass(first.layer, first.at, start, stream, copies, hooks)).unflatten(0, (n, copies))
    return [(plan.index, logits[:, copy]) for copy, plan in enumerate(plans)]


def _entering(recorded: Recorded, first: _Plan, cells: Sequence[Cell]) -> Tensor:
    """What a pass enters with, [prompt * copy, pos - start, ...]."""
    start = first.start
    if first.at == "z":
        z = recorded.runner.z(first.layer)[:, start:]
        return z.repeat_interleave(len(cells), 0)
    base = recorded.pre(first.layer) if first.at == "pre" else recorded.mid(first.layer)
    out = base[:, None, start:].repeat(1, len(cells), 1, 1)
    for copy, cell in enumerate(cells):
        if cell.stream is None:
            continue
        given = cell.stream() if callable(cell.stream) else cell.stream
        want = (recorded.n, recorded.n_pos - cell.start, base.shape[-1])
        if tuple(given.shape) != want:
            raise OptionError(f"stream of a cell must be {list(want)}, from its start on; got {list(given.shape)}. Cut it at the start.")
        out[:, copy, cell.start - start :] = given.to(out)
    return out.flatten(0, 1)


def _keep(kept: dict[str, Tensor], name: str) -> Callable[..., None]:
    def keep(x: Tensor, *, hook: Any) -> None:
        kept[name] = x.detach()

    return keep


def _table(where: Tensor | None, n: int) -> Tensor:
    """Positions as [n, k]."""
    assert where is not None
    return where if where.dim() == 2 else where[None].expand(n, -1).contiguous()


def _n_prompts(model: Any, batch: Any) -> int:
    from mechicl.models.toy import _inputs

    return model._mask(_inputs(batch)).shape[0]
