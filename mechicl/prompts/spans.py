"""Roles and spans: what every token of a prompt is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal["instruction", "image", "text", "question", "label", "glue", "pad"]
"""`text` is an item shown as words instead of a picture; `question` is what is asked about an item; `label` is an exemplar's label
(the query has none: its label is the answer, which is not in the prompt); `glue` is everything the chat template adds."""

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
        return Span(self.role, self.start + by, self.stop + by, self.shot, self.image, self.label, self.item)
