"""What a cell does at a hook point, and the plain way to run it: a full forward pass with hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mechicl.prompts.batch import Batch


@dataclass(frozen=True, eq=False)
class Edit:
    """What is done at a hook point: the positions (and head) in `mask` take `value`, or add it.

    `mask` [batch, pos]; [batch, dest] for patterns; [*tokens] for a vision tower's own layout.
    """

    hook: str
    mask: Tensor
    value: Tensor
    head: int | None = None
    add: bool = False

    def __call__(self, x: Tensor, start: int = 0) -> Tensor:
        """The edited activation; `start`: first position that x holds."""
        mask, value = self.mask.to(x.device), self.value.to(x.device, x.dtype)
        if self.hook.endswith("pattern"):
            mask, value = mask[:, None, start:, None], value[:, :, start:]
            picked = slice(None) if self.head is None else slice(self.head, self.head + 1)
            out = x.clone()
            out[:, picked] = torch.where(mask, value[:, picked], x[:, picked])
            return out
        mask, value = (mask[:, start:], value[:, start:]) if start else (mask, value)
        mask = mask.reshape(*mask.shape, *(1,) * (x.dim() - mask.dim()))
        if self.head is None:
            return torch.where(mask, x + value if self.add else value, x)
        out, one = x.clone(), slice(self.head, self.head + 1)
        out[:, :, one] = torch.where(mask, value[:, :, one], x[:, :, one])
        return out

    @property
    def start(self) -> int:
        """First position that it changes."""
        columns = self.mask.any(0).nonzero()
        return int(columns[0]) if len(columns) else self.mask.shape[1]


def run_naive(
    model: Any, base: Batch, cells: Sequence[Sequence[Edit]], positions: Tensor, read: Callable[[Tensor], Any], *, together: int = 1
) -> list[Any]:
    """Every cell as a full forward pass with hooks, `together` cells side by side along the batch: the plain way, which the fast one is held against.

    Args:
        model: The model.
        base: Prompts that are patched.
        cells: What each cell does.
        positions: Where logits are read, [batch, k].
        read: From logits [batch, k, vocab] to the metric.
        together: Cells of a forward pass. Cells of a vision tower run alone: its layout need not have the prompts first.

    Returns:
        What `read` gave, in the order of the cells.
    """
    found = []
    together = 1 if any(edit.hook.startswith("vision") for cell in cells for edit in cell) else together
    for start in range(0, len(cells), together):
        some = cells[start : start + together]
        hooks: dict[str, list[tuple[int, Edit]]] = {}
        for k, cell in enumerate(some):
            for edit in cell:
                hooks.setdefault(edit.hook, []).append((k, edit))
        batch = base if len(some) == 1 else base.repeat(len(some))
        fwd = [(name, _hook(edits, base.n, len(some))) for name, edits in hooks.items()]
        with torch.no_grad():
            logits = model.run_with_hooks(batch, positions=positions.repeat(len(some), 1), fwd_hooks=fwd)
        found += [read(part) for part in logits.split(base.n)]
    return found


def _hook(edits: Sequence[tuple[int, Edit]], n: int, copies: int) -> Callable[..., Tensor]:
    def edit(x: Tensor, *, hook: Any) -> Tensor:
        if copies == 1:
            for _, one in edits:
                x = one(x)
            return x
        out = x.clone()
        for k, one in edits:
            rows = slice(k * n, (k + 1) * n)
            out[rows] = one(out[rows])
        return out

    return edit


def keep(model: Any, batch: Batch, names: Sequence[str], positions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """One run: logits at `positions`, and what passed the hook points `names`."""
    kept: dict[str, Tensor] = {}

    def store(x: Tensor, *, hook: Any) -> None:
        kept[hook.name] = x.detach().clone()

    with torch.no_grad():
        logits = model.run_with_hooks(batch, positions=positions, fwd_hooks=[(name, store) for name in dict.fromkeys(names)])
    return logits, kept
