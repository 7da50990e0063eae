"""A transplant at work: what the source prompts' spans hold, and the target prompts run with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechicl.analysis.feed import progress_bar
from mechicl.analysis.patching.cells import INPUTS, STATES, STREAM, hook_name
from mechicl.analysis.patching.edits import Edit, keep
from mechicl.analysis.patching.engine import Engine, additions, make_base, stack_hooks
from mechicl.analysis.patching.metrics import Contrast
from mechicl.analysis.patching.run import added_layers
from mechicl.errors import EmptySpanError, EpisodeError, OptionError
from mechicl.prompts.align import Align, fit, span_groups
from mechicl.prompts.batch import Batch
from mechicl.results import Head

Place = str | Callable[[Batch], Tensor]
"""A span's name (as `span_groups` gives them by "span" or by "shot"), or a function from a batch to a mask [batch, pos]."""
ROTATED = {name: f"blocks.{{layer}}.attn.hook_{name}" for name in ("rot_q", "rot_k")}


@dataclass(eq=False)
class Work:
    """A transplant in progress. `given`: (hook, move) -> for each row the source span's activations [token, ...]."""

    model: Any
    target: Batch
    source: Batch
    moves: list[tuple[Place, Place]]
    contrast: Contrast
    away: bool
    align: Align | None
    n_controls: int
    seed: int
    batch_size: int
    engine: Engine
    given: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    before: np.ndarray = field(default_factory=lambda: np.zeros(0))
    there: np.ndarray = field(default_factory=lambda: np.zeros(0))
    notes: list[str] = field(default_factory=list)

    @property
    def n(self) -> int:
        return self.target.n

    def parts(self) -> list[list[int]]:
        size = max(1, self.batch_size // self.contrast.blocks)
        count = -(-self.n // size)
        return [list(range(k * self.n // count, (k + 1) * self.n // count)) for k in range(count)]

    def some(self, batch: Batch, rows: Sequence[int]) -> tuple[Contrast, Batch, Batch, Callable[[Tensor], np.ndarray]]:
        """For some rows: contrast, prompts, prompts as they are run, reader."""
        measured = self.contrast.take(rows)
        part = batch if len(rows) == batch.n else batch.select(rows)
        read = measured.reader(part)
        return measured, part, measured.widen(part), (lambda logits: -read(logits)) if self.away else read

    def read_source(self, cells: Sequence[tuple[str, int]]) -> None:
        """Run the source prompts; keep the spans' activations and the metric."""
        there = []
        hooks = [hook_of(site, layer) for site, layer in cells]
        stacked = added_layers(self.model) if any(site in STATES for site, _ in cells) else []
        for rows in self.parts():
            measured, part, wide, read = self.some(self.source, rows)
            logits, kept = keep(self.model, wide, [*hooks, *stack_hooks(stacked)], measured.positions(wide))
            there.append(read(logits))
            kept |= {f"+{layer}": added for layer, added in additions(kept, stacked).items()}
            for j, (name, _) in enumerate(self.moves):
                mask = span_mask(part, name, "source")
                for hook in (*dict.fromkeys(hooks), *(f"+{layer}" for layer in stacked)):
                    self.given.setdefault((hook, j), []).extend(
                        kept[hook][i, : part.n_pos][mask[i].to(kept[hook].device)] for i in range(part.n)
                    )
        self.there = np.concatenate(there)

    def run(self, cells: Sequence[tuple[str, int]], heads: Collection[Head] | None, progress: bool) -> tuple[np.ndarray, np.ndarray]:
        """The metric after each cell's moves, [cell, move, batch], and after the controls' (their mean)."""
        shape = (len(cells), len(self.moves), self.n)
        after, control, before = np.full(shape, np.nan), np.full(shape, np.nan), np.full(self.n, np.nan)
        donors = self._donors()
        bar = progress_bar(None, total=len(cells) * len(self.moves) * len(self.parts()), what="transplanting", show=progress)
        stacked = added_layers(self.model) if any(site in STATES for site, _ in cells) else []
        hooks = [hook_of(site, layer) for site, layer in cells]
        for rows in self.parts():
            measured, part, wide, read = self.some(self.target, rows)
            base = make_base(self.model, wide, measured.positions(wide), hooks, stacked, self.engine, self.batch_size)
            before[rows], own = read(base.logits), additions(base.kept, stacked)
            for k, (site, layer) in enumerate(cells):
                for j in range(len(self.moves)):
                    batches = [self._edits(site, layer, j, rows, part, wide, [donor[j][i] for i in rows], own, heads) for donor in donors]
                    values = np.stack(base.run(batches, read))
                    after[k, j, rows] = values[0]
                    control[k, j, rows] = values[1:].mean(0)
                    bar.update(1)
        bar.close()
        self.before = before
        return after, control

    def _donors(self) -> list[list[list[int]]]:
        """[draw][move][row] -> the row that gives; draw 0 is the row itself, the others are controls.

        Without `align` only rows whose span is as long can give.
        """
        draw = np.random.default_rng(self.seed)
        first = next(iter({hook for hook, _ in self.given}))
        draws: list[list[list[int]]] = [[list(range(self.n)) for _ in self.moves]] + [
            [[] for _ in self.moves] for _ in range(self.n_controls)
        ]
        for j in range(len(self.moves)):
            lengths = np.array([len(x) for x in self.given[first, j]])
            for i in range(self.n):
                others = [r for r in range(self.n) if r != i and (self.align is not None or lengths[r] == lengths[i])]
                if not others:
                    raise EpisodeError(
                        f"episode {i}: another episode's span {title(self.moves[j][0])!r} must be as long, for the control; none has {lengths[i]} tokens. "
                        "Pass align='mean' or align='resize', or draw labels of one length."
                    )
                picked = draw.permutation(others)
                for c in range(self.n_controls):
                    draws[1 + c][j].append(int(picked[c % len(picked)]))
                if len(others) < self.n_controls:
                    self.notes.append(f"Some controls repeat: only {len(others)} other episodes can give {title(self.moves[j][0])!r}.")
        return draws

    def _edits(
        self, site: str, layer: int, j: int, rows: Sequence[int], part: Batch, wide: Batch, donors: Sequence[int], own: dict[int, Tensor],
        heads: Collection[Head] | None,
    ) -> list[Edit]:  # fmt: skip
        mask = span_mask(part, self.moves[j][1], "target")
        blocks = wide.n // part.n
        full = torch.zeros(wide.n, wide.n_pos, dtype=torch.bool)
        full[:, : part.n_pos] = mask.repeat(blocks, 1)

        def dense(hook: str) -> Tensor:
            example = self.given[hook, j][donors[0]]
            value = torch.zeros(part.n, wide.n_pos, *example.shape[1:], dtype=example.dtype, device=example.device)
            for i, donor in enumerate(donors):
                given, where = self.given[hook, j][donor], mask[i].nonzero()[:, 0]
                if len(given) != len(where) and self.align is None:
                    name = part.ids[i] if part.ids else rows[i]
                    raise EpisodeError(
                        f"episode {name}: spans {title(self.moves[j][0])!r} (source) and {title(self.moves[j][1])!r} (target) must have as many tokens; "
                        f"got {len(given)} and {len(where)}. Pass align='mean' or align='resize'."
                    )
                value[i, where.to(value.device)] = given if len(given) == len(where) else fit(given, len(where), self.align or "mean")
            return value.repeat(blocks, *(1,) * (value.dim() - 1))

        hook = hook_of(site, layer)
        value = dense(hook)
        which = [None] if heads is None or site in STREAM or site in INPUTS else [head for at, head in heads if at == layer]
        found = [Edit(hook, full, value, head) for head in which]
        if site in STATES:
            found += [Edit(hook_name("resid_pre", at), full, dense(f"+{at}") - added, add=True) for at, added in own.items() if at > layer]
        return found


def span_mask(batch: Batch, place: Place, side: str) -> Tensor:
    """Positions of a span, each episode at least one.

    Raises:
        EmptySpanError: an episode has no such span.
        OptionError: no prompt has it.
    """
    if callable(place):
        mask = place(batch).cpu().bool()
    else:
        groups = span_groups(batch, "span") | span_groups(batch, "shot")
        if place not in groups:
            raise OptionError(f"{side} span must be one of {', '.join(groups)}; got {place!r}. These are the spans of the prompts.")
        mask = groups[place].cpu()
    empty = (~mask.any(1)).nonzero()[:, 0].tolist()
    if empty:
        raise EmptySpanError(
            f"every {side} prompt must have the span {title(place)!r}; episode {batch.ids[empty[0]] if batch.ids else empty[0]} has none. Leave it out."
        )
    return mask


def title(place: Place) -> str:
    return place if isinstance(place, str) else getattr(place, "__name__", "a span")


def hook_of(site: str, layer: int) -> str:
    return ROTATED[site].format(layer=layer) if site in ROTATED else hook_name(site, layer)
