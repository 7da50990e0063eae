"""Roles and spans: what every token of a prompt is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

Role = Literal["instruction", "image", "text", "question", "label", "glue", "pad", "answer"]
"""`text` is an item shown as words instead of a picture; `question` is what is asked about an item; `label` is an exemplar's label
(the query has none: its label is the answer, which is not in the prompt); `glue` is everything the chat template adds; `answer` is a
continuation put behind the prompt by `Batch.append`, and in no rendered prompt."""

ROLES: tuple[str, ...] = get_args(Role)

QUERY = -1
"""`Span.shot` of the query."""

NO_SHOT = -2
"""`Span.shot` of the instruction, the glue and the padding."""


@dataclass(frozen=True)
class Span:
    """A stretch of tokens [start, stop) of one prompt, padding counted, with one role.

    `shot`: 0, 1, ... for exemplars, `QUERY`, or `NO_SHOT`. `image`: index of the picture in the prompt (images only). `label`: the label of the
    shot the span belongs to (the answer for the query), "" where there is none. `item`: the identity of what the shot shows.
    A picture whose tokens are interrupted (tiles, row breaks) has several spans with the same `image`.
    """

    role: Role
    start: int
    stop: int
    shot: int = NO_SHOT
    image: int | None = None
    label: str = ""
    item: str = ""

    def shift(self, by: int) -> Span:
        """The same span, `by` tokens further right."""
        return replace(self, start=self.start + by, stop=self.stop + by)


def runs(owners: Sequence[Span | None]) -> tuple[Span, ...]:
    """Spans that cover every position once, from the owner of each position.

    Args:
        owners: For each position a span whose role, shot, image, label and item say what the token is for (its start and stop are not
            read, but must be equal too); None for glue. Neighbours that say the same become one span.
    """
    spans: list[Span] = []
    start = 0
    for pos in range(1, len(owners) + 1):
        if pos < len(owners) and (owners[pos] is owners[start] or owners[pos] == owners[start]):
            continue
        spans.append(replace(owners[start] or Span("glue", 0, 0), start=start, stop=pos))
        start = pos
    return tuple(spans)
