"""The positions that a forward is asked about: found in a prompt, and alone shown to the unembedding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mechicl.errors import OptionError
from mechicl.prompts.batch import Batch


def mask_of(inputs: Mapping[str, Any]) -> Tensor:
    """The attention mask [batch, pos] of a processor's mapping; ones where it has none."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]) if mask is None else mask


def asked_positions(batch: Any, mask: Tensor, positions: Any) -> Tensor | None:
    """Positions as numbers, [n] or [batch, n] on the mask's device; None for all.

    Args:
        batch: What was passed to the model; a Batch knows where its queries end.
        mask: Its attention mask [batch, pos]; tells where prompts end that are no Batch.
        positions: "last", "all" or a LongTensor [n] or [batch, n]; negative ones count from the end.

    Raises:
        OptionError: another word, no position, or one outside the prompt.
    """
    n_pos = mask.shape[1]
    if isinstance(positions, str):
        if positions == "all":
            return None
        if positions != "last":
            raise OptionError(f'positions must be "last", "all" or a tensor of positions; got {positions!r}. Ask for the ones you read.')
        if isinstance(batch, Batch):
            return batch.query_pos.to(mask.device)[:, None]
        return (n_pos - 1 - mask.flip(1).argmax(1))[:, None]
    found = torch.as_tensor(positions, device=mask.device)
    if found.numel() == 0 or int(found.max()) >= n_pos or int(found.min()) < -n_pos:
        raise OptionError(f"positions must be in 0..{n_pos - 1} (or negative, from the end); got {positions}. Count padding too.")
    return found % n_pos


@contextmanager
def select_logits(unembed: nn.Module, positions: Tensor | None) -> Iterator[None]:
    """The unembedding sees these positions only, so that [every position x vocabulary] never exists; None: all of them."""
    if positions is None:
        yield
        return

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        if positions.dim() == 1:
            return (hidden.index_select(1, positions.to(hidden.device)), *args[1:])
        return (hidden.gather(1, positions.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])), *args[1:])

    handle = unembed.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
