"""Which tokens of two prompts belong together: groups of tokens that every episode has, and the way from one prompt's positions to another's.

A group ("right label", "query image", "instruction", "glue", ...) holds the tokens of all its exemplars, so that prompts with other orders and lengths have the same groups.
`attention_by_role` names them alike, but is coarser in two: its "question" is right question and wrong question, its "glue" right open, wrong open, query open, last token
and glue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.functional import interpolate

from mechicl.errors import EpisodeError, OptionError
from mechicl.prompts.batch import Batch
from mechicl.prompts.spans import QUERY, Role, Span

By = Literal["span", "shot"]
Align = Literal["mean", "resize"]

ORDER = (
    "instruction", "right image", "right text", "right question", "right open", "right label", "right close", "wrong image", "wrong text", "wrong question",
    "wrong open", "wrong label", "wrong close", "query image", "query text", "query question", "query open", "glue", "last token",
)  # fmt: skip
"""Names of `span_groups(by="span")`, in this order. open: the template's tokens from an exemplar's item to its label, or from the query's item to the last token:
the tokens before a label may be those that a previous-token head reads. close: those after a label, up to the next item. glue: the template's other tokens. last
token: the one that predicts the answer, with the answer's own tokens where a metric appends them."""


def span_groups(batch: Batch, by: By = "span") -> dict[str, Bool[Tensor, "batch pos"]]:
    """Groups of tokens, each with the positions that belong to it; every token but padding is in exactly one.

    Args:
        batch: Rendered prompts.
        by: "span": exemplars of the right and of wrong labels together, names in `ORDER`. "shot": each exemplar apart, "shot 0 image", ..., "query image".

    Returns:
        Name -> mask on the CPU; groups that no prompt has are left out.

    Raises:
        OptionError: `by` does not exist.
    """
    if by not in get_args(By):
        raise OptionError(f"by must be one of {', '.join(get_args(By))}; got {by!r}. Pick one of them.")
    found: dict[str, Tensor] = {}
    query, n_shots = batch.query_pos.tolist(), 0
    for i, row in enumerate(batch.spans):
        answer = batch.candidates[i][batch.answers[i]]
        for name, start, stop in _named(row, answer, query[i], by):
            mask = found.setdefault(name, torch.zeros(batch.n, batch.n_pos, dtype=torch.bool))
            mask[i, start:stop] = True
        n_shots = max(n_shots, *(span.shot + 1 for span in row))
    order = list(ORDER) if by == "span" else _shot_order(n_shots)
    return {name: found[name] for name in order if name in found}


def _shot_order(n_shots: int) -> list[str]:
    parts = ("image", "text", "question", "open", "label", "close")
    shots = [f"{who} {part}" for who in (*(f"shot {k}" for k in range(n_shots)), "query") for part in parts]
    return ["instruction", *shots, "glue", "last token"]


def _named(row: Sequence[Span], answer: str, last: int, by: By) -> list[tuple[str, int, int]]:
    """(group, start, stop) of a prompt's tokens, padding left out."""
    out: list[tuple[str, int, int]] = []
    between = "glue"  # what the template's next tokens are called
    for span in row:
        if span.role == "pad":
            continue
        who = f"shot {span.shot}" if by == "shot" else ("right" if span.label == answer else "wrong")
        who = "query" if span.shot == QUERY else who
        if span.role == "answer":
            name = "last token"
        elif span.role == "glue":
            name = between
        elif span.shot >= QUERY and span.role != "instruction":
            name = f"{who} {span.role}"
            between = f"{who} {'close' if span.role == 'label' else 'open'}"
        else:
            name, between = "instruction" if span.role == "instruction" else "glue", "glue"
        if span.start <= last < span.stop:
            out += [(name, span.start, last), ("last token", last, last + 1), (name, last + 1, span.stop)]
        else:
            out.append((name, span.start, span.stop))
    return [(name, start, stop) for name, start, stop in out if stop > start]


@dataclass(frozen=True, eq=False)
class Alignment:
    """Where each position of the base prompts finds its counterpart in the donor prompts.

    Attributes:
        same: Every token stands in the same place: donor tensors are taken as they are.
        index: Donor position of each base position [batch, pos], -1 where it has none.
        uneven: Stretches of unequal length: (row, base positions, donor positions, base grid, donor grid); a grid is (rows, columns) of a picture whose
            tokens fill it, or None.
        how: What is done with uneven stretches.
    """

    same: bool
    index: Tensor
    uneven: tuple[tuple[int, Tensor, Tensor, tuple[int, int] | None, tuple[int, int] | None], ...] = ()
    how: Align | None = None

    @property
    def known(self) -> Bool[Tensor, "batch pos"]:
        """Base positions that have a counterpart."""
        known = self.index >= 0
        for row, positions, _, _, _ in self.uneven:
            known[row, positions] = True
        return known

    def apply(self, donor: Tensor) -> Tensor:
        """Donor activations [batch, donor pos, ...] at the base's positions [batch, pos, ...]; zeros where there is no counterpart."""
        if self.same:
            return donor
        rows = torch.arange(len(self.index), device=donor.device)[:, None]
        index = self.index.to(donor.device)
        shape = (*index.shape, *(1,) * (donor.dim() - 2))
        out = torch.where((index >= 0).reshape(shape), donor[rows, index.clamp_min(0)], 0)
        for row, positions, theirs, grid, other in self.uneven:
            given = donor[row, theirs.to(donor.device)]
            out[row, positions.to(donor.device)] = fit(given, len(positions), self.how or "mean", grid, other)
        return out


def align(base: Batch, donor: Batch, how: Align | None = None, *, names: tuple[str, str] = ("clean", "corrupt")) -> Alignment:
    """Match the tokens of two batches, episode by episode and span by span.

    Args:
        base: The prompts that are patched.
        donor: The prompts whose activations are taken; row i belongs to row i.
        how: What to do where a span has another number of tokens: None refuses; "mean" gives every base token the mean of the donor's span; "resize"
            interpolates along the span, over the grid of patches where both pictures fill one.
        names: What to call the two in messages.

    Raises:
        EpisodeError: other numbers of episodes, other sequences of spans, or (without `how`) spans of unequal length; names the first episode, the span and
            the numbers of tokens.
        OptionError: `how` does not exist.
    """
    if how is not None and how not in get_args(Align):
        raise OptionError(f"align must be None, {' or '.join(get_args(Align))}; got {how!r}. None refuses prompts of unequal lengths.")
    if base.n != donor.n:
        raise EpisodeError(
            f"{names[0]} and {names[1]} must be paired, prompt by prompt; got {base.n} and {donor.n} prompts. Make pairs with minimal_pairs."
        )
    if base.n_pos == donor.n_pos and all(_places(a) == _places(b) for a, b in zip(base.spans, donor.spans, strict=True)):
        return Alignment(True, torch.arange(base.n_pos).expand(base.n, -1))
    index = torch.full((base.n, base.n_pos), -1)
    uneven = []
    for i in range(base.n):
        mine, theirs = _stretches(base.spans[i]), _stretches(donor.spans[i])
        title = f"episode {base.ids[i]}" if base.ids and base.ids[i] else f"episode {i}"
        if [key for key, _ in mine] != [key for key, _ in theirs]:
            raise EpisodeError(
                f"{title}: both prompts must have the same sequence of spans; {_first_difference(mine, theirs, names)}. Make pairs with minimal_pairs."
            )
        for (key, a), (_, b) in zip(mine, theirs, strict=True):
            if len(a) == len(b):
                index[i, a] = b
            elif how is None:
                raise EpisodeError(
                    f"{title}: span {_title(key)!r} must have as many tokens in both prompts; got {len(a)} ({names[0]}) and {len(b)} ({names[1]}). "
                    "Give pictures of one size and labels of one length, or pass align='mean' or align='resize'."
                )
            else:
                uneven.append((i, a, b, _grid(base, i, key[2], a), _grid(donor, i, key[2], b)))
    return Alignment(False, index, tuple(uneven), how)


Key = tuple[Role, int, int | None]


def _places(row: Sequence[Span]) -> list[tuple[Role, int, int, int, int | None]]:
    return [(s.role, s.start, s.stop, s.shot, s.image) for s in row]


def _stretches(row: Sequence[Span]) -> list[tuple[Key, Tensor]]:
    """(role, shot, picture) and positions of every span; a picture's spans are one stretch, and what interrupts them (row breaks) belongs to none."""
    out: list[tuple[Key, list[int]]] = []
    picture: list[int] | None = None
    after: list[tuple[Key, list[int]]] = []
    current: int | None = None
    for span in row:
        positions = list(range(span.start, span.stop))
        if span.role == "pad":
            continue
        if span.role == "image" and picture is not None and span.image == current:
            picture += positions
            after = []
            continue
        if picture is not None and span.role == "glue":
            after.append(((span.role, span.shot, span.image), positions))
            continue
        out += after
        after, picture, current = [], None, None
        out.append(((span.role, span.shot, span.image), positions))
        if span.role == "image":
            picture, current = positions, span.image
            out[-1] = (out[-1][0], picture)
    return [(key, torch.tensor(positions)) for key, positions in (*out, *after)]


def _title(key: Key) -> str:
    role, shot, picture = key
    who = "query " if shot == QUERY else f"shot {shot} " if shot >= 0 else ""
    return f"{who}{role}" + (f" {picture}" if role == "image" else "")


def _first_difference(mine: Sequence[tuple[Key, Tensor]], theirs: Sequence[tuple[Key, Tensor]], names: tuple[str, str]) -> str:
    for k, (a, b) in enumerate(zip(mine, theirs, strict=False)):
        if a[0] != b[0]:
            return f"span {k} is {_title(a[0])!r} ({names[0]}) and {_title(b[0])!r} ({names[1]})"
    return f"got {len(mine)} ({names[0]}) and {len(theirs)} ({names[1]}) spans"


def _grid(batch: Batch, row: int, picture: int | None, positions: Tensor) -> tuple[int, int] | None:
    """(rows, columns) of a picture's tokens, where they fill a grid in reading order."""
    if picture is None or not batch.patches or picture >= len(batch.patches[row]):
        return None
    boxes: Mapping[int, tuple[float, float, float, float]] = batch.patches[row][picture]
    places = [boxes[int(p)][1::-1] for p in positions if int(p) in boxes]
    tops, lefts = sorted({top for top, _ in places}), sorted({left for _, left in places})
    filled = len(places) == len(positions) and places == [(top, left) for top in tops for left in lefts]
    return (len(tops), len(lefts)) if filled else None


def fit(given: Tensor, n: int, how: Align, grid: tuple[int, int] | None = None, other: tuple[int, int] | None = None) -> Tensor:
    """A span's activations at another number of tokens.

    Args:
        given: [token, ...].
        n: Tokens wanted.
        how: "mean": each is their mean; "resize": linear along the tokens, bilinear where both fill a grid.
        grid: (rows, columns) that the n tokens fill.
        other: (rows, columns) that the given ones fill.

    Returns:
        [n, ...].
    """
    if how == "mean":
        return given.mean(0, keepdim=True).expand(n, *given.shape[1:])
    flat = given.reshape(len(given), -1).float().T[None]
    if grid is not None and other is not None:
        wide = interpolate(flat.unflatten(2, other), size=grid, mode="bilinear", align_corners=False).flatten(2)
    else:
        wide = interpolate(flat, size=n, mode="linear", align_corners=False)
    return wide[0].T.reshape(n, *given.shape[1:]).to(given.dtype)
