"""Groups of tokens by name as closed cells, and random cells to hold them against."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from mechicl.errors import OptionError
from mechicl.models.blocked import Block
from mechicl.prompts.align import span_groups
from mechicl.prompts.batch import Batch
from mechicl.results import Head

PARTS = ("image", "text", "question", "open", "label", "close")
WHOLE = ("instruction", "glue", "last token", "exemplars", "query", "everything")
NAME = re.compile(rf"(?:(?:right|wrong|query|shot \d+|own) )?(?:{'|'.join((*PARTS, 'item'))})|shot \d+|own shot|{'|'.join(WHOLE)}")


def check_name(name: str, *, src: bool) -> None:
    """Refuse a name that is no group.

    Raises:
        OptionError: it is none, or readers are called "own".
    """
    if NAME.fullmatch(name) is None or (not src and name.startswith("own")):
        raise OptionError(
            f"{'source' if src else 'reader'} must be a part ({', '.join((*PARTS, 'item'))}), of the exemplars or with right, wrong, query, 'shot 0' ... "
            f"{'or own ' if src else ''}before it, 'shot 0' ..., or one of {', '.join(WHOLE)}; got {name!r}. For example ('label', 'own image'), ('last token', 'shot 1')."
        )


@dataclass(frozen=True, eq=False)
class Cells:
    """Who may not read what: `dest`, `src` [batch, pos] as in `Block`; `follow`: the group that an appended answer belongs to, -1 for none."""

    dest: Tensor
    src: Tensor
    follow: int

    def block(self, layers: tuple[int, ...], heads: tuple[Head, ...] | None) -> Block:
        """Closed in these layers and heads."""
        return Block(self.dest, self.src, layers, heads, self.follow)

    @property
    def n(self) -> Tensor:
        """Cells of each prompt [batch]: a token and one before it (or itself) that it may not read."""
        causal = torch.ones(self.dest.shape[1], self.dest.shape[1], dtype=torch.bool).tril()
        return torch.stack([((d[:, None] == s[None]) & (d >= 0)[:, None] & causal).sum() for d, s in zip(self.dest, self.src, strict=True)])


def cells(batch: Batch, dest: str, src: str) -> Cells:
    """The cells between two groups of a batch. With an "own" source every exemplar (and the query) is a group of readers of its own."""
    shots = span_groups(batch, "shot")
    named = {**shots, **span_groups(batch, "span")}
    readers = _tokens(named, dest, batch)
    if src.startswith("own "):
        number = _shot_numbers(shots, batch)
        part = src.removeprefix("own ")
        sources = torch.ones_like(readers) if part == "shot" else _tokens(named, part, batch) | _tokens(named, f"query {part}", batch)
        given = Cells(torch.where(readers, number, -1), torch.where(sources, number, -1), -1)
    else:
        sources = _tokens(named, src, batch)
        given = Cells(torch.where(readers, 0, -1), torch.where(sources, 0, -1), -1)
    last = given.dest[torch.arange(batch.n), batch.query_pos.cpu()]
    # an answer's tokens go on where the last token stands: they read what it may read
    return Cells(given.dest, given.src, int(last.max()) if bool((last == last.max()).all()) else -1)


def random_cells(batch: Batch, given: Cells, *, seed: int, draw: int, first: int) -> list[Cells]:
    """The same readers kept from as many other tokens: for every group of readers a run of neighbouring tokens before its last reader, none of them a source or a
    reader of the group, nor the prompt's first token (on which many heads rest). Where fewer are left, all of them.

    Args:
        batch: The prompts.
        given: What is to be matched.
        seed: Decides the run.
        draw: Number of the draw.
        first: Number of the first prompt among all, so that a draw does not depend on how prompts are batched.
    """
    real = torch.stack(list(span_groups(batch, "span").values())).any(0)
    groups = [int(g) for g in given.dest.unique() if g >= 0]
    found = []
    for g in groups:
        src = torch.full_like(given.src, -1)
        for i in range(batch.n):
            readers = (given.dest[i] == g).nonzero()[:, 0]
            if not len(readers):
                continue
            before = torch.arange(batch.n_pos) < int(readers.max())
            count = int(((given.src[i] == g) & before).sum())
            start = int(real[i].long().argmax())
            free = (before & real[i] & (given.src[i] != g) & (given.dest[i] != g) & (torch.arange(batch.n_pos) != start)).nonzero()[:, 0]
            if count and len(free):
                turn = int(np.random.default_rng([seed, draw, first + i, g]).integers(len(free)))
                src[i, free.roll(-turn)[:count]] = g
        found.append(Cells(torch.where(given.dest == g, g, -1), src, given.follow if given.follow == g else -1))
    return found


def _tokens(named: Mapping[str, Tensor], name: str, batch: Batch) -> Bool[Tensor, "batch pos"]:
    """Tokens of a group; none where no prompt has it."""
    found = torch.zeros(batch.n, batch.n_pos, dtype=torch.bool)
    for other, mask in named.items():
        if _belongs(other, name):
            found |= mask
    return found


def _belongs(group: str, name: str) -> bool:
    """Whether a group of `span_groups` is (part of) what `name` says."""
    if group == name or name == "everything":
        return True
    who, _, part = name.rpartition(" ")
    if name == "query":
        return group.startswith("query ") or group == "last token"
    if name == "exemplars":
        return group.startswith("shot ")
    if re.fullmatch(r"shot \d+", name):
        return group.startswith(f"{name} ")
    owner, _, kind = group.rpartition(" ")
    if part == "item":
        return kind in ("image", "text") and (owner == who if who else owner.startswith("shot "))
    return not who and kind == part and owner.startswith("shot ")


def _shot_numbers(shots: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """For every token the number of its exemplar, the query's behind them, -1 for none."""
    number = torch.full((batch.n, batch.n_pos), -1)
    n_shots = max((int(name.split()[1]) + 1 for name in shots if name.startswith("shot ")), default=0)
    for name, mask in shots.items():
        if name.startswith("shot "):
            number[mask] = int(name.split()[1])
        elif name.startswith("query ") or name == "last token":
            number[mask] = n_shots
    return number
