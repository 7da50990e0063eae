"""The long way: cells as full runs with hooks, for models that cannot be resumed and for edits before the first layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechicl.models.resuming.run import Edit, row_edit
from mechicl.prompts.batch import Batch

if TYPE_CHECKING:
    from mechicl.models.resuming.cells import Cell, Recorded


def run_in_full(recorded: Recorded, cells: Sequence[Cell], edits: Mapping[str, list[tuple[int, int, Edit]]]) -> Tensor:
    """Logits [copy, n, k, vocab] of full runs, the cells side by side.

    Args:
        recorded: The recorded run.
        cells: One per copy.
        edits: Hook name -> (copy, first position, edit).
    """
    copies, n = len(cells), recorded.n
    every: dict[str, list[tuple[int, int, Edit]]] = {}
    for copy, cell in enumerate(cells):
        if cell.stream is not None:
            every.setdefault(f"blocks.{cell.layer}.hook_resid_{cell.at}", []).append((copy, cell.start, _replacing(cell)))
    for name, some in edits.items():
        every.setdefault(name, []).extend(some)
    hooks = []
    for name, some in every.items():
        edit = row_edit(recorded.model, name, some, n, copies, inner=False)
        hooks.append((name, lambda x, *, hook, edit=edit: edit(x)))
    with torch.no_grad():
        out = recorded.model.run_with_hooks(
            repeated(recorded.batch, copies), positions=recorded.positions.repeat(copies, 1), fwd_hooks=hooks
        )
    return out.unflatten(0, (copies, n))


def _replacing(cell: Cell) -> Edit:
    def replace(x: Tensor) -> Tensor:
        assert cell.stream is not None
        return (cell.stream() if callable(cell.stream) else cell.stream).to(x)

    return replace


def repeated(batch: Any, copies: int) -> Any:
    """The whole batch several times over, copies outermost."""
    if copies == 1:
        return batch
    if isinstance(batch, Batch):
        return batch.repeat(copies)
    if isinstance(batch, Tensor):
        return torch.cat([batch] * copies)
    return {
        name: torch.cat([value] * copies) if isinstance(value, Tensor) else value * copies if isinstance(value, list) else value
        for name, value in batch.items()
    }
