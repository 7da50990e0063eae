"""Attention rows: the softmax of a few positions, exactly, while the forward pass itself stays fused.

A pattern of [head, dest, src] per layer is what runs out of memory on long image prompts. Measures read rows: where the query's last token looks,
or A[t, t - 1] of every text token. So the rows asked for are computed beside the fused output, from the real mask (sliding windows, padding,
bidirectional image blocks) and with the family's score terms, a bounded number of them at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechicl.errors import OptionError, UnsupportedModelError
from mechicl.models.asked import select_logits
from mechicl.models.attention import AttentionCall, check_terms, fused, row_chunks, rows, softmax
from mechicl.models.hooked import RowReducer

if TYPE_CHECKING:
    from mechicl.models.vlm import HookedVLM


@torch.no_grad()
def collect_rows(
    model: HookedVLM,
    inputs: Mapping[str, Any],
    dest: Tensor | None,
    *,
    layers: Sequence[int] | None = None,
    reduce: RowReducer | None = None,
) -> list[Any]:
    """Attention rows of every layer.

    Args:
        model: The hooked model; its hooks fire as in any forward pass.
        inputs: The processor's mapping, on the model's device.
        dest: Positions that read, [n] or [batch, n]; None for all.
        layers: Which layers; default all that read the sequence itself (cross-attention to pictures only when asked for by number).
        reduce: Called as reduce(layer, positions, rows) with a chunk of rows [batch, head, n, src] in float32; what it returns is kept in
            their place, so that the rows themselves never add up.

    Returns:
        One entry per layer: rows [batch, head, n_dest, src] (or the list of what `reduce` returned), None for a layer that has no softmax
        attention or was not asked for.

    Raises:
        OptionError: a layer index outside the model.
        UnsupportedModelError: a layer was asked for by number that has no softmax attention.
    """
    parts = model.anatomy.layers
    wanted = [i for i, part in enumerate(parts) if not part.cross] if layers is None else [int(layer) for layer in layers]
    for layer in wanted:
        if not 0 <= layer < len(parts):
            raise OptionError(f"layers must be in 0..{len(parts) - 1}; got {layer}. Layers count from 0.")
        if layers is not None and parts[layer].attention is None:
            raise UnsupportedModelError(
                f"layer {layer} must have softmax attention; {parts[layer].reasons['attn.hook_pattern']}. Leave it out."
            )
    if dest is None:
        dest = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device)
    found: list[Any] = [None] * len(parts)
    handlers = {layer: _reader(layer, dest, found, reduce) for layer in wanted if parts[layer].attention is not None}
    last = torch.zeros(1, dtype=torch.long, device=dest.device)
    with select_logits(model.anatomy.unembed, last), model.wired(inputs, handlers):
        model.hf(**inputs, use_cache=False)
    return found


def _reader(layer: int, dest: Tensor, found: list[Any], reduce: RowReducer | None) -> Any:
    def handler(call: AttentionCall) -> Tensor:
        check_terms(call)
        kept = []
        for chunk in row_chunks(call, dest.to(call.query.device)):
            scores, allowed = rows(call, chunk)
            pattern = softmax(call, scores, allowed, chunk)
            kept.append(pattern if reduce is None else reduce(layer, chunk, pattern))
        found[layer] = torch.cat(kept, 2) if reduce is None else kept
        return fused(call)

    return handler
