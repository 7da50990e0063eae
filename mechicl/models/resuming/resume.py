"""Many variations of one recorded run, each resumed where it differs: what makes sweeps of patches, knock-outs and edges affordable.

`record` runs the prompts once and keeps the streams and every layer's keys and values. A `Cell` says where a variation enters (layer, before or after its
attention, first position that differs) and what is edited from there on. `run_cells` lays the cells that enter at the same place side by side in one pass,
which starts at that layer and runs only the positions from there on; earlier positions serve with their recorded keys and values. The last layer is
evaluated only where logits are asked for.

The numbers are those of full runs with hooks. A production model is taken only after a resumed run has reproduced its recorded logits; one that does not
runs in full for every batch of cells, and `Recorded.how` and `Recorded.notes` say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mechicl.errors import HookNotFiredError, OptionError
from mechicl.models.asked import asked_positions, mask_of
from mechicl.models.resuming.cells import Cell, Plan, Recorded, how_many, planned
from mechicl.models.resuming.full import run_in_full
from mechicl.models.resuming.memory import out_of_memory
from mechicl.models.resuming.run import Edit, Pass, Runner, row_edit
from mechicl.models.resuming.toy import record_toy
from mechicl.models.toys.model import ToyTransformer

__all__ = ["Cell", "Recorded", "passes", "record", "run_cells"]


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
        where = _table(asked_positions(batch, model.mask(batch), positions), _n_prompts(model, batch))
        runner, streams, middles, logits = record_toy(model, batch, where, hooks)
        starts = list(range(streams[0].shape[1]))
        recorded = Recorded(model, batch, where, logits, runner.additions, [], runner, starts, streams, middles, kept)
    else:
        from mechicl.models.resuming.record import record_vlm

        inputs = model.inputs(batch)
        where = _table(asked_positions(batch, mask_of(inputs), positions), inputs["input_ids"].shape[0])
        found = record_vlm(model, inputs, where, hooks)
        recorded = Recorded(
            model, batch, where, found.logits, found.additions, found.notes, found.runner, found.starts, found.streams, found.middles, kept
        )
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
    plans = [planned(recorded, index, cell) for index, cell in enumerate(cells)]
    groups: dict[tuple[Any, ...], list[Plan]] = {}
    for plan in plans:
        groups.setdefault((plan.full, plan.layer, plan.at, plan.alone), []).append(plan)
    for key in sorted(groups, key=lambda k: (k[0], k[1], k[2], k[3])):
        queue = sorted(groups[key], key=lambda plan: plan.start)
        limit = copies
        while queue:
            size = how_many(recorded, queue, limit)
            try:
                done = _run(recorded, queue[:size])
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not out_of_memory(error):
                    raise
                limit = max(1, size // 2)
                continue
            yield done
            queue = queue[size:]


@torch.no_grad()
def _run(recorded: Recorded, plans: Sequence[Plan]) -> list[tuple[int, Tensor]]:
    first, copies, runner = plans[0], len(plans), recorded.runner
    start, n = first.start, recorded.n
    edits: dict[str, list[tuple[int, int, Edit]]] = {}
    for copy, plan in enumerate(plans):
        for name, edit in plan.cell.edits.items():
            edits.setdefault(name, []).append((copy, plan.cell.start - start, edit))
    if first.full or runner is None:
        logits = run_in_full(recorded, [plan.cell for plan in plans], edits)
        return [(plan.index, logits[copy]) for copy, plan in enumerate(plans)]
    hooks = {name: row_edit(recorded.model, name, some, n, copies) for name, some in edits.items()}
    stream = _entering(recorded, runner, first, [plan.cell for plan in plans])
    logits = runner.run(Pass(first.layer, first.at, start, stream, copies, hooks)).unflatten(0, (n, copies))
    return [(plan.index, logits[:, copy]) for copy, plan in enumerate(plans)]


def _entering(recorded: Recorded, runner: Runner, first: Plan, cells: Sequence[Cell]) -> Tensor:
    """What a pass enters with, [prompt * copy, pos - start, ...]."""
    start = first.start
    if first.at == "z":
        z = runner.z(first.layer)[:, start:]
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
    return model.mask(batch).shape[0]
