"""A sweep of patches, checked and ready to run: its pairs, its cells, its parts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch

from mechicl.analysis.patching.cells import ALIGNABLE, STATES, By, Patch, Selection, SitePlan, plan
from mechicl.analysis.patching.engine import Engine
from mechicl.analysis.patching.metrics import Contrast, Metric, contrast
from mechicl.analysis.patching.run import Recorded, Sweep, added_layers, record, run_ends
from mechicl.analysis.patching.store import fingerprint, weights
from mechicl.errors import EpisodeError, OptionError
from mechicl.prompts.align import Align, span_groups
from mechicl.prompts.batch import Batch
from mechicl.prompts.corrupt import Pairs
from mechicl.prompts.episode import Episode
from mechicl.results import Skipped
from mechicl.results.patching import Direction, PatchCost

Given = Pairs | Batch | Sequence[Episode]
CELLS_AT_ONCE = 32
"""Cells between two writes to disk, at most."""
CPU_BYTES = 1 << 32
"""Memory of recorded activations on a CPU."""
SHARE = 0.3
"""Share of an accelerator's free memory that they may take."""


@dataclass(eq=False)
class Job:
    """A sweep, ready to run."""

    sweep: Sweep
    contrast: Contrast
    clean: Batch
    corrupt: Batch
    plans: Mapping[str, SitePlan]
    how: str
    skipped: tuple[Skipped, ...]
    notes: list[str]

    @property
    def n(self) -> int:
        """Pairs."""
        return self.clean.n

    @property
    def patches(self) -> list[Patch]:
        """Every cell."""
        return [patch for site in self.plans.values() for patch in site.patches]

    def parts(self) -> list[list[int]]:
        """Rows of the pairs that are recorded together: as many as were asked for, fewer where their activations would not fit."""
        size = max(1, self.sweep.batch_size // self.contrast.blocks)
        size = max(1, min(size, memory(self.sweep.model) // self.bytes_per_pair()))
        count = max(1, -(-self.n // size))
        return [list(range(k * self.n // count, (k + 1) * self.n // count)) for k in range(count)]

    def bytes_per_pair(self) -> int:
        """What is kept of one pair while its cells run: both runs' activations at the patched sites, and the streams."""
        cfg = self.sweep.model.cfg
        widths = {
            "q": cfg.n_heads * cfg.d_head,
            "z": cfg.n_heads * cfg.d_head,
            "k": cfg.n_key_value_heads * cfg.d_head,
            "v": cfg.n_key_value_heads * cfg.d_head,
        }
        kept = sum(
            2 * widths.get(name, cfg.d_model) * len(p.coords.get("layer", (0,))) for name, p in self.plans.items() if name != "pattern"
        )
        patterns = 2 * cfg.n_heads * self.clean.n_pos if "pattern" in self.plans else 0
        item = torch.finfo(getattr(cfg, "dtype", torch.float32)).bits // 8
        return self.contrast.blocks * self.clean.n_pos * (kept + patterns + 2 * cfg.n_layers * cfg.d_model) * item

    def some(self, rows: Sequence[int]) -> tuple[Contrast, Batch, Batch]:
        """Some of the pairs."""
        if len(rows) == self.n:
            return self.contrast, self.clean, self.corrupt
        return self.contrast.take(rows), self.clean.select(rows), self.corrupt.select(rows)

    def record(self, rows: Sequence[int]) -> Recorded:
        """Both runs of some pairs."""
        return record(self.sweep, *self.some(rows), self.patches)

    def ends(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The metric of the clean and of the corrupt run of some pairs."""
        return run_ends(self.sweep, *self.some(rows))

    def groups(self) -> Iterator[tuple[str, list[Patch]]]:
        """Cells that are run together: one site, one layer."""
        for name, site in self.plans.items():
            layers = dict.fromkeys(patch.layer for patch in site.patches)
            for layer in layers:
                some = [patch for patch in site.patches if patch.layer == layer]
                for start in range(0, len(some), CELLS_AT_ONCE):
                    yield name, some[start : start + CELLS_AT_ONCE]

    def asked(self) -> dict[str, Any]:
        """What decides the numbers, for the folder."""
        s = self.sweep
        return {
            "model": {k: str(v) for k, v in s.model.describe().items() if k in ("model", "revision", "dtype")}, "weights": weights(s.model),
            "pairs": fingerprint(self.clean, self.corrupt), "n": self.n, "metric": self.contrast.name, "direction": s.direction, "by": s.by, "align": s.align,
            "sites": {name: {"axes": list(p.axes), "coords": {k: list(v) for k, v in p.coords.items()}, "cells": len(p.patches)} for name, p in self.plans.items()},
        }  # fmt: skip

    def cost(self) -> tuple[PatchCost, float]:
        """The preview, and the seconds that it took itself."""
        begun = time.perf_counter()
        parts = self.parts()
        recorded = self.record(parts[0])
        recording = time.perf_counter() - begun
        seconds: dict[str, float] = {}
        total = recording * len(parts)
        forwards = 2 * len(parts)
        for name, site in self.plans.items():
            some = [group for other, group in self.groups() if other == name]
            middle = some[len(some) // 2][: 4 if self.sweep.engine == "naive" else CELLS_AT_ONCE]
            start = time.perf_counter()
            recorded.run(middle)
            seconds[name] = (time.perf_counter() - start) / len(middle)
            total += seconds[name] * len(site.patches) * len(parts)
            forwards += len(site.patches) * len(parts)
        return PatchCost(len(self.patches), forwards, total, recorded.gigabytes, seconds, self.n), time.perf_counter() - begun


def memory(model: Any) -> int:
    """Bytes that recorded activations may take."""
    device = torch.device(model.cfg.device)
    if device.type == "cuda":
        return int(SHARE * torch.cuda.mem_get_info(device)[0])
    return CPU_BYTES


def prepare(
    model: Any, clean: Given, corrupt: Any, sites: Sequence[str] | str, by: By, metric: Metric, direction: Direction, selection: Selection, align: Align | None,
    engine: Engine, batch_size: int,
) -> Job:  # fmt: skip
    """Check everything that can be checked before a run. Arguments, errors: as in `patch`."""
    if direction not in get_args(Direction):
        raise OptionError(f"direction must be one of {', '.join(get_args(Direction))}; got {direction!r}. denoise asks what suffices.")
    if engine not in get_args(Engine):
        raise OptionError(f"engine must be one of {', '.join(get_args(Engine))}; got {engine!r}. resume is the fast one.")
    if batch_size < 1:
        raise OptionError(f"batch_size must be at least 1; got {batch_size}. Choose how many prompts go through the model at once.")
    sites = (sites,) if isinstance(sites, str) else tuple(sites)
    first, second, how, skipped = sides_of(model, clean, corrupt)
    measured, rows, unscored, notes = contrast(metric, first, second)
    if len(rows) < first.n:
        first, second = first.select(rows), second.select(rows)
    if align is not None and (fixed := [site for site in sites if site not in ALIGNABLE]):
        raise OptionError(
            f"align must be None for {', '.join(fixed)}; got {align!r}. Only {', '.join(ALIGNABLE)} can be fitted to another length."
        )
    if by == "pos":
        _one_layout(first)
    names = list(span_groups(first, "shot" if by == "shot" else "span"))
    plans, reasons = plan(model, sites, by, names, first.n_pos, selection)
    if added_layers(model) and any(site in plans for site in STATES):
        reasons.append(
            "The picture is added to the stream in several layers (DeepStack): patches of the stream take its later additions along."
        )
    return Job(
        Sweep(model, direction, by, align, engine, batch_size),
        measured,
        first,
        second,
        plans,
        how,
        (*skipped, *unscored),
        [*notes, *reasons],
    )


def sides_of(model: Any, clean: Given, corrupt: Any) -> tuple[Batch, Batch, str, tuple[Skipped, ...]]:
    """Clean and corrupt prompts, how they were made, and what was left out."""
    if isinstance(clean, Pairs):
        if corrupt is not None:
            raise OptionError("corrupt must not be given beside Pairs; got both. Pairs hold both sides.")
        return clean.clean, clean.corrupt, clean.how, clean.skipped
    if corrupt is None:
        raise OptionError("corrupt must be given; got None. Make pairs with prompts.corrupt.minimal_pairs, or pass both batches.")
    sides = [side if isinstance(side, Batch) else model.render(side) for side in (clean, corrupt)]
    if sides[0].n != sides[1].n:
        raise EpisodeError(
            f"clean and corrupt must be paired, prompt by prompt; got {sides[0].n} and {sides[1].n} prompts. Make pairs with minimal_pairs."
        )
    return sides[0], sides[1], "given", ()


def _one_layout(batch: Batch) -> None:
    first = [(s.role, s.start, s.stop, s.shot) for s in batch.spans[0]]
    for i, row in enumerate(batch.spans):
        if [(s.role, s.start, s.stop, s.shot) for s in row] != first:
            raise EpisodeError(
                f"prompts must all be laid out alike for by='pos'; episode {batch.ids[i] if batch.ids else i} is not like the first. Use by='span', or draw labels "
                "and pictures of one size."
            )
