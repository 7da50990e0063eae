"""Where everything is in a batch, as tensors: which token belongs to which exemplar's label, which to which item, which rows are text.

An exemplar's *closing* tokens are the template's tokens after its label, up to the next exemplar (end of turn, line break, the next turn's head). They can know of this
exemplar and those before it, and of nothing later; chat models gather a label and its item there, so that is often where an in-context learner looks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechicl.prompts.batch import Batch
from mechicl.prompts.spans import QUERY, Span

PLACES = ("question", "query question", "instruction", "glue")
"""Groups that belong to no label and no item, in the order of their numbers."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Positions of one batch, sorted into groups. S is the number of exemplars, the same for all batches of a run.

    Groups, by number: 0..S-1 the exemplars' labels; then S+1 of picture tokens and S+1 of text-item tokens (the last is the query's); then S of
    the exemplars' closing tokens; then `PLACES`.
    `group` is -1 for padding and answers. Rows without an exemplar k have `known` False there.
    """

    group: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    text: Bool[Tensor, "batch pos"]
    place: Int[Tensor, "batch pos"]
    n_real: Int[Tensor, " batch"]
    first: Int[Tensor, " batch"]
    first_group: Int[Tensor, " batch"]
    query: Int[Tensor, " batch"]
    item_last: Int[Tensor, "batch item"]
    known: Bool[Tensor, "batch shot"]
    right: Bool[Tensor, "batch shot"]
    identity: Int[Tensor, "batch item"]
    label_tokens: Int[Tensor, "batch shot"]
    image_tokens: Int[Tensor, "batch item"]
    text_tokens: Int[Tensor, "batch item"]

    @property
    def n_shots(self) -> int:
        """S, the most exemplars of any prompt of the run."""
        return self.known.shape[1]

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return 4 * self.n_shots + 2 + len(PLACES)

    def to(self, device: torch.device) -> Layout:
        """The same on another device."""
        return Layout(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def label_group(shot: int) -> int:
    """Group of exemplar `shot`'s label."""
    return shot


def image_group(shot: int, n_shots: int) -> int:
    """Group of a shot's picture tokens (QUERY for the query's)."""
    return n_shots + (n_shots if shot == QUERY else shot)


def text_group(shot: int, n_shots: int) -> int:
    """Group of a shot's text-item tokens (QUERY for the query's)."""
    return 2 * n_shots + 1 + (n_shots if shot == QUERY else shot)


def closing_group(shot: int, n_shots: int) -> int:
    """Group of exemplar `shot`'s closing tokens."""
    return 3 * n_shots + 2 + shot


def place_group(name: str, n_shots: int) -> int:
    """Group of one of `PLACES`."""
    return 4 * n_shots + 2 + PLACES.index(name)


def count_shots(batch: Batch) -> int:
    """The most exemplars of any prompt."""
    return max((span.shot + 1 for row in batch.spans for span in row), default=0)


def layout(batch: Batch, n_shots: int) -> Layout:
    """Sort a batch's positions into groups.

    Args:
        batch: Rendered prompts.
        n_shots: S, at least the batch's own most.
    """
    n, n_pos = batch.n, batch.n_pos
    group = torch.full((n, n_pos), -1)
    text = torch.zeros(n, n_pos, dtype=torch.bool)
    known, right = torch.zeros(n, n_shots, dtype=torch.bool), torch.zeros(n, n_shots, dtype=torch.bool)
    identity, last = torch.full((n, n_shots + 1), -1), torch.full((n, n_shots + 1), -1)
    for i, row in enumerate(batch.spans):
        answer, names = batch.candidates[i][batch.answers[i]], {}
        open_shot: int | None = None
        for span in row:
            if span.role == "label" and span.shot >= 0:
                open_shot = span.shot
            elif span.role != "glue":
                open_shot = None
            closing = span.role == "glue" and open_shot is not None
            group[i, span.start : span.stop] = closing_group(open_shot or 0, n_shots) if closing else _group(span, n_shots)
            text[i, span.start : span.stop] = span.role not in ("pad", "answer", "image")
            if span.role == "label" and span.shot >= 0:
                known[i, span.shot], right[i, span.shot] = True, span.label == answer
            if span.role in ("image", "text") and span.shot >= QUERY:
                k = n_shots if span.shot == QUERY else span.shot
                identity[i, k] = names.setdefault(span.item or f"label {span.label}", len(names))
                last[i, k] = max(int(last[i, k]), span.stop - 1)
    real = group >= 0
    first = real.long().argmax(1)
    tokens = torch.stack([(group == g).sum(1) for g in range(3 * n_shots + 2)], 1)
    return Layout(
        group=group, real=real, text=text, n_real=real.sum(1), place=(real.long().cumsum(1) - 1).clamp_min(0), first=first,
        first_group=group[torch.arange(n), first], query=batch.query_pos.cpu(), item_last=last, known=known, right=right, identity=identity, label_tokens=tokens[:, :n_shots],
        image_tokens=tokens[:, n_shots : 2 * n_shots + 1], text_tokens=tokens[:, 2 * n_shots + 1 :],
    )  # fmt: skip


def _group(span: Span, n_shots: int) -> int:
    if span.role in ("pad", "answer"):
        return -1
    if span.role == "label" and span.shot >= 0:
        return label_group(span.shot)
    if span.role == "image" and span.shot >= QUERY:
        return image_group(span.shot, n_shots)
    if span.role == "text" and span.shot >= QUERY:
        return text_group(span.shot, n_shots)
    if span.role == "question":
        return place_group("query question" if span.shot == QUERY else "question", n_shots)
    return place_group("instruction" if span.role == "instruction" else "glue", n_shots)
