"""Scoring several continuations of one prompt: the prompt runs once, its keys and values serve every continuation.

Whether a family can be continued this way is not assumed: the first batch is scored both ways, and a model whose answers differ, or that cannot
take up its own cache, is scored the long way from then on (every prompt run again with every continuation).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechicl.models.asked import asked_positions, mask_of, select_logits
from mechicl.models.places import from_mask
from mechicl.prompts.batch import Batch

if TYPE_CHECKING:
    from mechicl.models.vlm import HookedVLM

AGREE = 1e-3
"""Largest difference of logits between the two ways, as a share of their spread (float32)."""


@torch.no_grad()
def continue_prompts(model: HookedVLM, batch: Batch, tokens: Sequence[Sequence[Sequence[int]]], copies: int = 1) -> Tensor:
    """Logits along several continuations of every prompt.

    Args:
        model: The hooked model; its hooks see the prompts first ([copies * prompt, pos, ...]) and then the continuations, [copies * prompt * continuation,
            token, ...], copies outermost both times.
        batch: The prompts.
        tokens: For each prompt, equally many continuations, each at least one token; the last token of each is only predicted.
        copies: How many times the prompts are run, one after the other along the batch.

    Returns:
        Logits [copies, continuation, prompt, token, vocab]: at `token` 0 those after the prompt, then those after each token but the last.
        Beyond a continuation's end they mean nothing.
    """
    n, blocks = batch.n, len(tokens[0])
    inputs = model.inputs(batch if copies == 1 else batch.repeat(copies))
    last = asked_positions(batch if copies == 1 else batch.repeat(copies), mask_of(inputs), "last")
    _forget_places(model.hf)
    with select_logits(model.anatomy.unembed, last), model.wired(inputs):
        out = model.hf(**inputs, use_cache=True)
    first = out.logits.reshape(copies, n, 1, 1, -1).expand(-1, -1, blocks, -1, -1)
    ids, real = _block(tokens, inputs["input_ids"].device)
    if ids.shape[1]:
        cache = out.past_key_values
        cache.batch_repeat_interleave(blocks)
        ids, real = ids.repeat(copies, 1), real.repeat(copies, 1)
        mask = torch.cat([inputs["attention_mask"].repeat_interleave(blocks, 0), real.to(inputs["attention_mask"].dtype)], 1)
        grown = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, **_places(model, mask, ids.shape[1])}
        with model.wired({"input_ids": ids}):
            rest = model.hf(**grown, use_cache=True).logits
        first = torch.cat([first, rest.reshape(copies, n, blocks, ids.shape[1], -1)], 3)
    return first.transpose(1, 2)


def _block(tokens: Sequence[Sequence[Sequence[int]]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Continuations without their last token, prompt by prompt, padded on the right: ids and which are real, [prompt * continuation, token]."""
    rows = [list(one[:-1]) for prompt in tokens for one in prompt]
    width = max(len(row) for row in rows)
    filler = next((row[0] for row in rows if row), 0)
    ids = torch.tensor([row + [filler] * (width - len(row)) for row in rows], dtype=torch.long, device=device).reshape(len(rows), width)
    real = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows], device=device).reshape(len(rows), width)
    return ids, real


def _forget_places(hf: Any) -> None:
    """Prompts of words alone leave the differences that the last prompts with pictures had: they belong to other prompts."""
    inner = getattr(hf, "model", None)
    if getattr(inner, "rope_deltas", None) is not None:
        inner.rope_deltas = None  # pyright: ignore[reportOptionalMemberAccess]


def _places(model: HookedVLM, mask: Tensor, width: int) -> dict[str, Tensor]:
    """Positions of the new tokens where a family counts pictures' tokens otherwise (multimodal RoPE keeps the difference of each prompt)."""
    places = from_mask(mask)[:, -width:]
    if model.family.positions:
        return {"position_ids": places}
    deltas = getattr(getattr(model.hf, "model", None), "rope_deltas", None)
    if deltas is None:
        return {}
    return {"position_ids": (places + deltas.repeat_interleave(len(mask) // len(deltas), 0).to(mask.device))[None].expand(3, -1, -1)}


def can_continue(model: HookedVLM, batch: Batch, tokens: Sequence[Sequence[Sequence[int]]]) -> bool:
    """Score a batch both ways, with whatever hooks are in force; whether they agree."""
    n, blocks = batch.n, len(tokens[0])
    width = max(len(one) for prompt in tokens for one in prompt)
    try:
        short = continue_prompts(model, batch, tokens)[0]
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError):  # a cache of another kind
        return False
    wide = batch.repeat(blocks).append([tokens[i][j][:-1] for j in range(blocks) for i in range(n)])
    positions = (wide.query_pos[:, None] + torch.arange(width)).clamp_max(wide.n_pos - 1)
    with torch.no_grad():
        long = model(wide, positions=positions).reshape(blocks, n, width, -1)
    real = torch.tensor([[[k < len(tokens[i][j]) for k in range(width)] for i in range(n)] for j in range(blocks)])
    difference = (short - long).abs().amax(-1).cpu()[real].max()
    share = float(difference) / (float(long.float().std()) or 1.0)
    return share <= (AGREE if model.hf.dtype == torch.float32 else 0.3)
