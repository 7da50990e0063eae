"""Every token of a prompt by its kind, under the names of `span_groups`, as masks: what readings are averaged over and attributions summed over."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from mechicl.errors import EmptySpanError, OptionError
from mechicl.prompts.align import ORDER, span_groups
from mechicl.prompts.batch import Batch

KINDS: tuple[str, ...] = (*ORDER[:-1], "sink", ORDER[-1])
"""Kinds of tokens, in the order of tables: `prompts.align.ORDER`, and "sink", the prompt's first token, taken out of the kind it would belong to."""


def kind_masks(batch: Batch, *, sink: bool = True) -> dict[str, Bool[Tensor, "batch pos"]]:
    """Which tokens are of which kind; every token but padding and answers has exactly one. All of `KINDS` are there, empty ones too.

    Args:
        batch: The prompts.
        sink: Keep the first token apart; otherwise it stays in its own kind.
    """
    groups = span_groups(batch)
    nowhere = torch.zeros(batch.n, batch.n_pos, dtype=torch.bool)
    masks = {kind: groups[kind].clone() if kind in groups else nowhere.clone() for kind in KINDS}
    rows = torch.arange(batch.n)
    masks["last token"] = nowhere.clone()
    masks["last token"][rows, batch.query_pos.cpu()] = True
    if sink:
        first = torch.stack(list(masks.values())).any(0).long().argmax(1)
        for mask in masks.values():
            mask[rows, first] = False
        masks["sink"][rows, first] = True
    return masks


def present(masks: Sequence[dict[str, Tensor]]) -> list[str]:
    """Kinds that some prompt has, in the order of `KINDS`."""
    return [kind for kind in KINDS if any(bool(one[kind].any()) for one in masks)]


def chosen_kinds(spans: Sequence[str] | None, there: Sequence[str]) -> list[str]:
    """The kinds asked for, checked; all that are there where none are named.

    Raises:
        OptionError: a kind that does not exist, or none.
        EmptySpanError: no prompt has it.
    """
    if spans is None:
        return list(there)
    if not spans or isinstance(spans, str):
        raise OptionError(f"spans must be a list of kinds of tokens; got {spans!r}. Choose from: {', '.join(KINDS)}.")
    for kind in spans:
        if kind not in KINDS:
            raise OptionError(f"spans must be kinds of tokens; got {kind!r}. Choose from: {', '.join(KINDS)}.")
        if kind not in there:
            raise EmptySpanError(f"spans must be in some prompt; no prompt has {kind!r}. These are there: {', '.join(there)}.")
    return list(spans)
