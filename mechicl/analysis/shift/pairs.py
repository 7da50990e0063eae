"""Prompts with examples and their controls, read side by side: which tokens of two prompts are the same ones, and how far apart their keys and values are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechicl.analysis.shift.measures import span_mean, token_shift
from mechicl.analysis.shift.read import Part, Rows, rows_of, stream_kv
from mechicl.errors import EmptySpanError
from mechicl.prompts.align import span_groups
from mechicl.prompts.batch import Batch
from mechicl.prompts.filler import n_tokens
from mechicl.results import Skipped

OUTSIDE = ("instruction",)
"""Spans that are not the query's: where they have other tokens in the control only they are left out, not the episode."""
SPANS = ("query image", "query text", "query question", "query open", "last token")
"""The query's own tokens."""


@dataclass(frozen=True, eq=False)
class Wanted:
    """What is read. `cells`: (part, layer) of those layers that have such keys or values; the others stay NaN. `means`: keep the spans' mean vectors."""

    spans: tuple[str, ...]
    parts: tuple[Part, ...]
    layers: tuple[int, ...]
    cells: tuple[tuple[str, int], ...]
    means: bool


@dataclass(frozen=True, eq=False)
class Prompts:
    """A few prompts of one kind, and for each why it cannot be used ("" where it can)."""

    batch: Batch
    reasons: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Read:
    """Keys and values of the asked spans: `values[part][layer]` is [batch, row, kv_head, d_head], on the CPU in the model's dtype."""

    prompts: Prompts
    rows: Rows
    values: Mapping[str, Mapping[int, Tensor]]


def read_prompts(model: Any, prompts: Prompts, wanted: Wanted) -> Read:
    """One forward pass; only the rows of the asked spans are kept, in the model's own dtype.

    Raises:
        EmptySpanError: no prompt has any of the spans.
    """
    groups = span_groups(prompts.batch)
    masks = {name: groups[name] for name in wanted.spans if name in groups}
    if not masks:
        raise EmptySpanError(
            f"spans must be in the prompts; got {', '.join(wanted.spans)}, and they have {', '.join(groups)}. Ask for some of these."
        )
    rows, found = rows_of(prompts.batch, masks), {part: {} for part in wanted.parts}

    def keep(part: str, layer: int, values: Tensor) -> None:
        found[part][layer] = values.cpu()

    stream_kv(model, prompts.batch, rows, wanted.cells, keep)
    return Read(prompts, rows, found)


@dataclass(eq=False)
class Table:
    """What two kinds of prompts differ by, collected a few episodes at a time.

    Arrays of an episode are [part, layer, kv_head, span]; `means[part, layer]` has the spans' mean vectors with and without, [batch, kv_head, span, d_head].
    """

    wanted: Wanted
    n_heads: int
    rows: list[int] = field(default_factory=list)
    relative: list[np.ndarray] = field(default_factory=list)
    cosine: list[np.ndarray] = field(default_factory=list)
    means: dict[tuple[str, int], list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)
    tokens: list[np.ndarray] = field(default_factory=list)
    lengths: list[tuple[int, int]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    undefined: int = 0
    """Vectors whose control is zero while they are not: no ratio."""

    def add(self, numbers: Sequence[int], names: Sequence[str], a: Read, b: Read) -> None:
        """Compare a few episodes: `a` with examples, `b` without; `numbers` are their places in the data."""
        match = match_rows(a, b, self.wanted.spans)
        for i, reason in enumerate(match.reasons):
            if reason:
                self.skipped.append(Skipped(names[numbers[i]], reason))
        kept = [i for i, reason in enumerate(match.reasons) if not reason]
        if not kept:
            return
        size = (len(kept), len(self.wanted.parts), len(self.wanted.layers), self.n_heads, len(self.wanted.spans))
        relative, cosine = np.full(size, np.nan), np.full(size, np.nan)
        for p, part in enumerate(self.wanted.parts):
            for j, layer in enumerate(self.wanted.layers):
                if layer not in a.values[part]:
                    continue
                first, second = (_take(x.values[part][layer], index)[kept] for x, index in ((a, match.first), (b, match.second)))
                for table, found in zip((relative, cosine), token_shift(first, second), strict=True):
                    for s, name in enumerate(self.wanted.spans):
                        table[:, p, j, : found.shape[2], s] = span_mean(found, match.spans[name][kept]).numpy()
                    if table is relative:
                        self.undefined += int((found.isnan() & (match.first[kept] >= 0)[..., None]).sum())
                if self.wanted.means:
                    self._keep_means(part, layer, first, second, {name: mask[kept] for name, mask in match.spans.items()})
        self.relative.append(relative)
        self.cosine.append(cosine)
        self.rows += [numbers[i] for i in kept]
        self.tokens.append(np.stack([match.spans[name][kept].sum(1).numpy() for name in self.wanted.spans], 1))
        lengths = list(zip(n_tokens(a.prompts.batch), n_tokens(b.prompts.batch), strict=True))
        self.lengths += [lengths[i] for i in kept]

    def _keep_means(self, part: str, layer: int, first: Tensor, second: Tensor, spans: Mapping[str, Tensor]) -> None:
        """[batch, kv_head, span, d_head] of both, float32."""
        both = tuple(torch.stack([span_mean(x.float(), spans[name]) for name in self.wanted.spans], 2).numpy() for x in (first, second))
        self.means.setdefault((part, layer), []).append((both[0], both[1]))


@dataclass(frozen=True, eq=False)
class Match:
    """Rows of two reads that are the same tokens: `first` and `second` [batch, row] (-1: none), which belong to which span, and why an episode has none."""

    first: Tensor
    second: Tensor
    spans: Mapping[str, Tensor]
    reasons: tuple[str, ...]


def match_rows(a: Read, b: Read, spans: Sequence[str]) -> Match:
    """Pair the tokens of two kinds of prompts, span by span: as many of them, and the same ones."""
    n = len(a.prompts.reasons)
    reasons = [one or two for one, two in zip(a.prompts.reasons, b.prompts.reasons, strict=True)]
    ids = [read.prompts.batch.inputs["input_ids"].cpu() for read in (a, b)]
    pairs: list[list[tuple[str, Tensor, Tensor]]] = [[] for _ in range(n)]
    for i in range(n):
        for name in spans:
            here, there = (_rows_in(read.rows, name, i) for read in (a, b))
            words = [x[i][read.rows.positions[i][at]].tolist() for x, read, at in ((ids[0], a, here), (ids[1], b, there))]
            if words[0] == words[1]:
                pairs[i].append((name, here, there))
            elif name not in OUTSIDE and not reasons[i]:
                counts = (
                    f"{len(here)} tokens with examples and {len(there)} without"
                    if len(here) != len(there)
                    else "other tokens without examples"
                )
                reasons[i] = f"its {name} has {counts}"
        if not any(len(here) for _, here, _ in pairs[i]) and not reasons[i]:
            reasons[i] = "it has none of the spans"
    width = max(1, *(sum(len(here) for _, here, _ in row) for row in pairs))
    first, second = torch.full((n, width), -1), torch.full((n, width), -1)
    masks = {name: torch.zeros(n, width, dtype=torch.bool) for name in spans}
    for i, row in enumerate(pairs):
        j = 0
        for name, here, there in row:
            block = slice(j, j + len(here))
            first[i, block], second[i, block], masks[name][i, block] = here, there, True
            j += len(here)
    return Match(first, second, masks, tuple(reasons))


def _rows_in(rows: Rows, span: str, episode: int) -> Tensor:
    return rows.spans[span][episode].nonzero()[:, 0] if span in rows.spans else torch.empty(0, dtype=torch.long)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """[batch, row, kv_head, d_head] at the rows; NaN where there is none."""
    at = index.clamp_min(0)[..., None, None].expand(-1, -1, *values.shape[2:])
    return values.gather(1, at).masked_fill((index < 0)[..., None, None], torch.nan)
