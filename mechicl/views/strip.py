"""The prompt laid out as cards of tokens with roles, with the attention that a page's script shows on it.

Nothing here writes HTML: `strip` lays out plain data, the templates draw it (and escape it).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mechicl.results import Head, PromptView
from mechicl.views.overlay import Picture, attention_row, pictures
from mechicl.views.words import name

PATTERN_BYTES = 1_500_000
"""What the whole patterns of one prompt may weigh in a page: with them any token can be asked where it reads from. Heads beyond it carry the last row."""


@dataclass(frozen=True)
class Token:
    """A token as it is shown. `kind` is its role, with labels split into "right label" and "wrong label"."""

    position: int
    text: str
    kind: str


@dataclass(frozen=True)
class Card:
    """A stretch of the prompt: the instruction, an exemplar or the query. `pieces` are tokens and pictures in prompt order."""

    title: str
    kind: str
    label: str
    pieces: tuple[Token | Picture, ...]


@dataclass(frozen=True)
class Strip:
    """A prompt ready to be drawn, with the attention that can be shown on it.

    `heads` are groups: (what they are called, their names). `data` is what the page's script reads: the heads' names and, base64 of little-endian uint16 in units of 1/65535, their patterns' rows.
    """

    episode: str
    answer: str
    predicted: str
    n_tokens: int
    cards: tuple[Card, ...]
    heads: tuple[tuple[str, tuple[str, ...]], ...]
    kinds: tuple[str, ...]
    data: dict[str, object]

    @property
    def correct(self) -> bool:
        """The model's choice is the answer."""
        return self.answer == self.predicted


def _shown(text: str) -> str:
    """A token as people read it: line breaks and blanks visible, a control token without its brackets."""
    control = re.fullmatch(r"<\|?([\w/ ]+?)\|?>", text)
    return control[1] if control else text.replace("\n", "↵").strip(" ") or "␣"


def token_kind(view: PromptView, position: int) -> str:
    """A token's role, with labels split by whether they are the answer's."""
    role = view.roles[position]
    if role == "label":
        return "right label" if view.labels[position] == view.answer else "wrong label"
    return role


def _cards(view: PromptView) -> list[tuple[int, list[int]]]:
    """Positions grouped by shot; glue goes with what follows it, at the end with what came before."""
    groups: list[tuple[int, list[int]]] = []
    waiting: list[int] = []
    for p, (shot, role) in enumerate(zip(view.shots, view.roles, strict=True)):
        if shot == -2 and role != "instruction":
            waiting.append(p)
        elif groups and groups[-1][0] == shot:
            groups[-1][1].extend([*waiting, p])
            waiting = []
        else:
            groups.append((shot, [*waiting, p]))
            waiting = []
    if waiting and groups:
        groups[-1][1].extend(waiting)
    elif waiting:
        groups.append((-2, waiting))
    return groups


def strip(view: PromptView, heads: Sequence[Head] | Mapping[str, Sequence[Head]] = ()) -> Strip:
    """The whole prompt as cards, with the attention of `heads` (in groups with a name, if they have one) for the page's script.

    Raises:
        HeadIndexError: nothing was kept for a head.
        ImageError: a picture does not open.
    """
    groups = heads if isinstance(heads, Mapping) else {"": heads}
    drawn = pictures(view)
    home = {patch.position: picture for picture in drawn for patch in picture.patches}
    cards: list[Card] = []
    placed: set[int] = set()
    for shot, positions in _cards(view):
        pieces: list[Token | Picture] = []
        for p in positions:
            if p not in home:
                text = view.tokens[p]
                pieces.append(Token(p, _shown(text), token_kind(view, p)))
            elif home[p].index not in placed:
                placed.add(home[p].index)
                pieces.append(home[p])
        own = [view.labels[p] for p in positions if view.shots[p] == shot and view.labels[p]]
        label = own[0] if own else ""
        title = "query" if shot == -1 else f"example {shot + 1}" if shot >= 0 else "instruction"
        kind = "query" if shot == -1 else "other" if shot < 0 else "right" if label == view.answer else "wrong"
        cards.append(Card(title, kind, label, tuple(pieces)))
    kinds = tuple(token_kind(view, p) for p in range(len(view.tokens)))
    return Strip(
        view.episode, view.answer, view.predicted, len(view.tokens), tuple(cards), tuple((group, tuple(name(h) for h in some)) for group, some in groups.items() if some),
        tuple(dict.fromkeys(kinds)), _payload(view, list(dict.fromkeys(h for some in groups.values() for h in some)), kinds),
    )  # fmt: skip


def _payload(view: PromptView, heads: Sequence[Head], kinds: Sequence[str]) -> dict[str, object]:
    n = len(view.tokens)
    rows: dict[str, dict[str, object]] = {}
    room = PATTERN_BYTES // max(1, 8 * n * n // 3)  # two bytes a number, four thirds of that in base64
    for k, head in enumerate(heads):
        last = attention_row(view, head)
        whole = np.asarray(view.patterns[head], dtype=float) if head in view.patterns and k < room else last[None]
        packed = np.rint(np.clip(np.nan_to_num(whole), 0, 1) * 65535).astype("<u2")
        rows[name(head)] = {"n": int(packed.shape[0]), "rows": base64.b64encode(packed.tobytes()).decode()}
    return {"n": n, "kinds": list(kinds), "tokens": list(view.tokens), "heads": rows}
