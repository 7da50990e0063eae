"""Attention of a resumed run: a few new positions of many copies of some prompts read keys that all copies share and keys of their own.

Rows of a resumed run are prompts times copies, copies innermost (row i * copies + j is copy j of prompt i), so that the copies of a prompt can be laid
beside each other along the head axis without moving memory: a mask [prompt, 1, dest, src] then serves every copy, and shared keys are multiplied once
for the queries of all copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

KeysValues = tuple[Tensor, Tensor]
"""Keys and values [prompt or row, kv_head, src, d_head]."""

FEW = 48
"""Up to how many new positions the softmax is written out over shared keys, instead of copying the shared keys for torch's fused kernel."""


BLOCK = 64
"""Rows that go through torch's fused kernel at once where each may read only what stands before it: keys behind a block are not even multiplied."""


@lru_cache(maxsize=64)
def below(n_dest: int, n_src: int, device: torch.device) -> Bool[Tensor, "one one dest src"]:
    """Causal mask whose last row reads everything. (torch's is_causal aligns the first rows, which is another mask where n_dest < n_src.)"""
    return torch.ones(n_dest, n_src, dtype=torch.bool, device=device).tril(n_src - n_dest)[None, None]


def attend(
    query: Float[Tensor, "row head dest d_head"],
    parts: Sequence[KeysValues],
    mask: Tensor | None,
    *,
    scale: float,
    copies: int,
    causal: bool,
) -> Float[Tensor, "row dest head d_value"]:
    """The heads' output.

    Args:
        query: Queries of the new positions, the last ones of the sequence.
        parts: Keys and values of the sequence, part by part; a part with one row per prompt is shared by the copies.
        mask: What may be read (bool) or is added (float), [1 or prompt or row, 1 or head, dest, src]; None: everything, or see `causal`.
        scale: What q . k is multiplied by.
        copies: Copies of every prompt.
        causal: No position reads what stands behind it (with a mask: the mask already says so).
    """
    n_dest, n_src = query.shape[2], sum(key.shape[2] for key, _ in parts)
    exact = query.dtype in (torch.float32, torch.float64)
    if len(parts) > 1 and exact and n_dest <= FEW:
        return _written_out(query, parts, mask, scale, copies, causal)
    if mask is None and causal and n_dest > 1 and (len(parts) > 1 or n_dest < n_src):
        mask = below(n_dest, n_src, query.device)
    n = query.shape[0] // copies
    key, value = (torch.cat([_rows(part[i], query.shape[0]) for part in parts], 2) if len(parts) > 1 else parts[0][i] for i in (0, 1))
    if mask is not None and mask.shape[0] not in (1, query.shape[0]):
        if mask.shape[1] == 1:
            query, key, value = (_fold(x, n) for x in (query, key, value))
        else:
            mask = _rows(mask, query.shape[0])
    whole = causal and n_dest == n_src and mask is None
    if whole or not causal or n_dest <= BLOCK:
        z = _fused(query, key, value, mask, scale, whole and n_dest > 1)
    else:
        z = query.new_empty(*query.shape[:3], value.shape[-1])
        for start in range(0, n_dest, BLOCK):
            stop, seen = min(start + BLOCK, n_dest), n_src - n_dest + min(start + BLOCK, n_dest)
            some = None if mask is None else mask[:, :, start:stop, :seen]
            z[:, :, start:stop] = _fused(query[:, :, start:stop], key[:, :, :seen], value[:, :, :seen], some, scale, False)
    return z.reshape(n * copies, -1, n_dest, z.shape[-1]).transpose(1, 2)


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    grouped = key.shape[1] != query.shape[1]
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, is_causal=causal, enable_gqa=grouped)


def per_row(x: Tensor, copies: int, axis: int = 0) -> Tensor:
    """One entry per prompt -> one per row (prompt times copy, copies innermost). A view where there is one prompt."""
    if copies == 1:
        return x
    if x.shape[axis] == 1:
        return x.expand(*x.shape[:axis], copies, *x.shape[axis + 1 :])
    return x.repeat_interleave(copies, axis)


def _rows(x: Tensor, n_rows: int) -> Tensor:
    return per_row(x, n_rows // x.shape[0])


def _fold(x: Tensor, n: int) -> Tensor:
    """[prompt * copy, head, ...] -> [prompt, copy * head, ...], a view."""
    return x.reshape(n, -1, *x.shape[2:])


def _written_out(query: Tensor, parts: Sequence[KeysValues], mask: Tensor | None, scale: float, copies: int, causal: bool) -> Tensor:
    """The softmax in full; keys that copies share are multiplied once for all of them."""
    rows, n_heads, n_dest, d_head = query.shape
    n, n_kv = rows // copies, parts[0][0].shape[1]
    group = n_heads // n_kv
    own = (query * scale).reshape(n, copies, n_kv, group * n_dest, d_head)
    shared = own.transpose(1, 2).reshape(n, n_kv, copies * group * n_dest, d_head)
    scores = []
    for key, _ in parts:
        if key.shape[0] == n and copies > 1:
            scores.append((shared @ key.transpose(2, 3)).unflatten(2, (copies, -1)))
        else:
            scores.append((own @ key.unflatten(0, (n, copies)).transpose(3, 4)).transpose(1, 2))
    table = torch.cat(scores, -1)  # [prompt, kv_head, copy, group * dest, src]
    if mask is not None:
        table = _masked(table.view(n, n_kv, copies, group, n_dest, -1), mask, n, copies).view(table.shape)
    elif causal and n_dest > 1:  # all that stands before the new positions may be read
        new = table[..., -n_dest:].unflatten(3, (group, n_dest))
        new.masked_fill_(~below(n_dest, n_dest, query.device)[0], -torch.inf)
    pattern = table.softmax(-1)
    z, at = query.new_zeros(()), 0
    for key, value in parts:
        some = pattern[..., at : at + key.shape[2]]
        at += key.shape[2]
        if key.shape[0] == n and copies > 1:
            read = (some.flatten(2, 3) @ value).unflatten(2, (copies, -1))
        else:
            read = (some.transpose(1, 2) @ value.unflatten(0, (n, copies))).transpose(1, 2)
        z = z + read
    z = z.reshape(n, n_kv, copies, group, n_dest, -1).permute(0, 2, 4, 1, 3, 5)  # [prompt, copy, dest, kv_head, group, d_value]
    return z.reshape(rows, n_dest, n_heads, -1)


def _masked(table: Tensor, mask: Tensor, n: int, copies: int) -> Tensor:
    """Scores [prompt, kv_head, copy, group, dest, src] under the mask; a row that may read nothing gets equal scores, not NaN."""
    shape = (mask.shape[0], 1, *mask.shape[1:]) if mask.shape[0] in (1, n) else (n, copies, *mask.shape[1:])
    full = mask.reshape(shape)  # [prompt, copy, head, dest, src]
    heads = full.shape[2]
    full = full.unflatten(2, (1, 1) if heads == 1 else (table.shape[1], table.shape[3])).transpose(1, 2)
    if mask.dtype != torch.bool:
        return table.add_(full)
    return table.masked_fill_(~full, -1e30 if table.dtype == torch.float32 else torch.finfo(table.dtype).min)
