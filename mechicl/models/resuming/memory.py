"""How many variations go through a model at once, and what it looks like when that was too many."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mechicl.models.resuming.cells import Recorded

CPU_TOKENS = 2048
"""Tokens of a pass on a CPU: enough to keep its matrix multiplications busy; more would only push the activations out of the caches."""
CPU_BYTES = 1 << 30
"""Memory of a pass's activations on a CPU."""
SHARE = 0.4
"""Share of an accelerator's free memory that a pass may use."""


def bytes_per_copy(recorded: Recorded, start: int, full: bool = False) -> int:
    """Estimate of the memory that one copy of the prompts needs while a layer runs."""
    cfg = recorded.model.cfg
    tokens = recorded.n * (recorded.n_pos - start)
    width = 8 * cfg.d_model + 3 * (cfg.d_mlp or 0) + 4 * cfg.n_heads * cfg.d_head
    patterns = 2 * cfg.n_heads * recorded.n_pos if full else 0
    keys = 2 * cfg.n_key_value_heads * cfg.d_head * recorded.n * recorded.n_pos
    return (tokens * (width + patterns) + keys) * recorded.streams[0].element_size()


def copies_at_once(recorded: Recorded, layer: int, start: int, full: bool = False) -> int:
    """Copies of the prompts in one pass."""
    device = recorded.streams[0].device
    each = max(1, bytes_per_copy(recorded, start, full))
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(1, int(free * SHARE) // each)
    by_tokens = CPU_TOKENS // max(1, recorded.n * (recorded.n_pos - start))
    return max(1, min(CPU_BYTES // each, by_tokens))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on an accelerator or (torch has no class for it there) on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("not enough memory" in text or "can't allocate memory" in text or "out of memory" in text)
