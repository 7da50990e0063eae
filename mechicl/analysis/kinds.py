"""Every token of a prompt by its kind, under the names of `attention_by_role`, as masks: what readings are averaged over and attributions summed over."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from mechicl.errors import EmptySpanError, OptionError
from mechicl.prompts.batch import Batch
from mechicl.prompts.spans import QUERY

KINDS: tuple[str, ...] = (
    "right label", "wrong label", "right close", "wrong close", "right image", "wrong image", "right text", "wrong text", "question", "query image",
    "query text", "query question", "instruction", "glue", "sink", "last token",
)  # fmt: skip
"""Kinds of tokens, in the order of tables. "close": the template's tokens after an exemplar's label; "sink": the prompt's first token; "last token": the one that
predicts the answer. The last two are taken out of the kinds they would belong to."""


def kind_masks(batch: Batch, *, sink: bool = True) -> dict[str, Bool[Tensor, "batch pos"]]:
    """Which tokens are of which kind; every token but padding and answers has exactly one. All of `KINDS` are there, empty ones too.

    Args:
        batch: The prompts.
        sink: Keep the first token apart; otherwise it stays in its own kind.
    """
    masks = {kind: torch.zeros(batch.n, batch.n_pos, dtype=torch.bool) for kind in KINDS}
    for i, row in enumerate(batch.spans):
        answer = batch.candidates[i][batch.answers[i]]
        after = ""
        for span in row:
            if span.role in ("pad", "answer"):
                continue
            side = "query" if span.shot == QUERY else "right" if span.label == answer else "wrong"
            if span.role in ("image", "text", "label") and span.shot >= QUERY:
                kind = f"{side} {span.role}"
            elif span.role == "question":
                kind = "query question" if span.shot == QUERY else "question"
            elif span.role == "glue" and after:
                kind = after
            else:
                kind = "instruction" if span.role == "instruction" else "glue"
            after = f"{side} close" if span.role == "label" and span.shot >= 0 else after if span.role == "glue" else ""
            masks[kind][i, span.start : span.stop] = True
    rows = torch.arange(batch.n)
    last = batch.query_pos.cpu()
    first = torch.stack(list(masks.values())).any(0).long().argmax(1)
    for kind, where in (("sink", first), ("last token", last)):
        if kind == "sink" and not sink:
            continue
        for mask in masks.values():
            mask[rows, where] = False
        masks[kind][rows, where] = True
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
