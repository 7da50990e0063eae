"""Sparse attention: which keys an indexer chose for each query, folded into the mask.

Families with an indexer write its choice into the mask only under transformers' own names ("eager", "sdpa"); under any other name they hand the choice over
as an argument and expect the function to apply it. A function that did not would attend everywhere, with rows that still sum to one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mechicl.errors import UnsupportedModelError

SELECTIONS = ("indices", "block_indices")
"""`indices` [batch, dest, k]: keys that each query may read. `block_indices` [batch, group, dest, k]: blocks of keys, a choice for every group of heads. Below 0: none."""


def selected(module: nn.Module, query: Tensor, key: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Keys that the indexer chose, [batch, 1 or head, dest, src], bool; None where there is no indexer.

    Raises:
        UnsupportedModelError: blocks of a size that the module does not tell.
    """
    n_src = key.shape[2]
    if (indices := kwargs.get("indices")) is not None:
        return _scatter(indices, n_src)[:, None]
    if (blocks := kwargs.get("block_indices")) is None:
        return None
    size = getattr(getattr(module, "indexer", None), "block_size", None)
    if not isinstance(size, int):
        raise UnsupportedModelError(
            f"{type(module).__name__} must have an indexer with a block_size; got {size!r}. Its patterns would be wrong: use model.trace (nnsight)."
        )
    chosen = _scatter(blocks, -(-n_src // size)).repeat_interleave(size, -1)[..., :n_src]
    return chosen.repeat_interleave(query.shape[1] // chosen.shape[1], 1)


def _scatter(indices: Tensor, n: int) -> Tensor:
    """[..., k] positions as [..., n] truth values; what is below 0 falls away."""
    slots = torch.where(indices < 0, n, indices).long()
    return torch.zeros(*indices.shape[:-1], n + 1, dtype=torch.bool, device=indices.device).scatter(-1, slots, True)[..., :n]


def with_selection(mask: Tensor | None, chosen: Tensor | None, causal: bool) -> Tensor | None:
    """The mask without the keys that were not chosen; a causal one where there was none and the module is causal."""
    if chosen is None:
        return mask
    if mask is None:
        if not causal:
            return chosen
        n_dest, n_src = chosen.shape[-2:]
        return chosen & torch.ones(n_dest, n_src, dtype=torch.bool, device=chosen.device).tril(n_src - n_dest)
    return mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)
