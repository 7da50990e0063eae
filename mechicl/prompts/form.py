"""How the examples of an episode are written down. The query's own turn is always written the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

from mechicl.errors import OptionError

Turns = Literal["alternating", "one"]
"""alternating: an example is a user's turn and the assistant's answer. one: all examples stand in the query's own user turn, before it."""


@dataclass(frozen=True)
class Form:
    """Another way to write the same examples. The default is how episodes are written without one.

    Attributes:
        turns: See `Turns`. A prompt without a chat template has no turns.
        label_first: The label stands before its item. With a chat template all examples are then in one turn, because the assistant's turn cannot come first.
        swapped: Picture and text of an example change places (by default the picture comes first); so do the two items of a multimodal toy sequence.
        pictures_first: All examples' pictures first, then all their texts and labels, in one turn.
        question: The examples' question in place of the episode's; "" for none.
        before_item: Words before an example.
        before_label: Words before a label.
        after_label: Words behind a label, in the same turn. They are the template's as far as roles go: the label's span ends before them.
        markers: Put before labels, one for each candidate, e.g. ("(A) ", "(B) ").
        separator: Between item and label where both are in one turn, or there are no turns.
        between: Between examples, likewise.
    """

    turns: Turns = "alternating"
    label_first: bool = False
    swapped: bool = False
    pictures_first: bool = False
    question: str | None = None
    before_item: str = ""
    before_label: str = ""
    markers: tuple[str, ...] = ()
    separator: str = "\n"
    between: str = "\n"
    after_label: str = ""

    def __post_init__(self) -> None:
        if self.turns not in get_args(Turns):
            raise OptionError(f"turns must be one of {', '.join(get_args(Turns))}; got {self.turns!r}. Pick one of them.")
        if not self.separator or not self.between:
            raise OptionError(
                f"separator and between must not be empty; got {self.separator!r} and {self.between!r}. Use a space at least."
            )

    def __repr__(self) -> str:
        """As a dataclass's, without `after_label` where there is none: kept runs know their episodes by a digest that this is part of, and are older than that field."""
        shown = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name != "after_label" or self.after_label]
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def one_turn(self) -> bool:
        """Whether a chat template is given one user's turn for all."""
        return self.turns == "one" or self.label_first or self.pictures_first

    @property
    def worded(self) -> bool:
        """Whether it needs words of its own, which toy sequences do not have."""
        plain = Form(turns=self.turns, label_first=self.label_first, swapped=self.swapped)
        return self != plain

    def lead(self, label: str, candidates: Sequence[str]) -> str:
        """What stands before a label.

        Raises:
            OptionError: there are markers, but fewer than candidates.
        """
        if not self.markers:
            return self.before_label
        if len(self.markers) < len(candidates):
            raise OptionError(f"markers must be one for each of {len(candidates)} candidates; got {list(self.markers)}. Give more.")
        return self.before_label + self.markers[list(candidates).index(label)]


PLAIN = Form()
