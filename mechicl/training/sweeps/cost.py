"""What a sweep would do and about how long it takes, from a few real steps of one group of each kind."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechicl.training.sweeps.cells import Cell, axis_names, cells, group_size, groups, read_spec
from mechicl.training.sweeps.store import finished
from mechicl.training.sweeps.work import TRAINER

Job = Sequence[Cell]

FEW, MORE = 4, 24
"""Steps of two trials, whose difference is the cost of the steps between them."""
KINDS = 8
"""At most so many kinds of group are tried; the others are taken to cost the mean of those."""
LINES = 40
"""At most so many groups are listed."""


@dataclass(frozen=True)
class Cost:
    """Seconds that a group takes once, for a step, and for one look at its measures."""

    once: float
    step: float
    look: float

    def total(self, recipe: Mapping[str, Any]) -> float:
        """Seconds of a group with this recipe's steps and points."""
        return self.once + self.step * int(recipe["steps"]) + self.look * int(recipe.get("points", 0))


def outlook(
    spec: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str] | None = None,
    *,
    together: int | None = None,
    workers: int = 1,
    threads: int | None = None,
    device: str | None = None,
    trainer: str = TRAINER,
) -> list[str]:
    """Lines that say how many cells there are, which are missing, how they group, and the estimated time.

    Args:
        out: The sweep's folder, if it has one yet: finished cells are not counted.
        together, workers, threads, device: As in `sweep.run`.

    Raises:
        OptionError: a spec or an option that cannot be.
    """
    wanted = read_spec(spec)
    module = importlib.import_module(trainer)
    every = cells(wanted, module.resolve)
    done = set(finished(Path(out))) if out is not None else set()
    todo = [cell for cell in every if cell.id not in done]
    first = [cell for cell in {c.before.id: c.before for c in todo if c.before is not None}.values() if cell.id not in done]
    earlier = groups(first, module.alike, group_size(wanted, together, device), workers)
    jobs = earlier + groups(todo, module.alike, group_size(wanted, together, device), workers)
    names = axis_names(wanted)
    lines = [f"{len(every)} cells, {len(every) - len(todo)} finished, {len(todo)} to train in {len(jobs) - len(earlier)} groups"]
    if first:
        lines.append(f"  before them: {len(first)} trainings that they start from, in {len(earlier)} groups")
    lines += [f"  {name}: {', '.join(dict.fromkeys(str(cell.value(name)) for cell in every))}" for name in [*names, "seed"]]
    if not jobs:
        return lines
    seconds = _seconds(jobs, module, threads, device)
    for job, cost in list(zip(jobs, seconds, strict=True))[:LINES]:
        first, *others = job
        lines.append(f"  {len(job):>3} x {first.recipe['steps']} steps, {_time(cost)}: {first.describe(names)}{', ...' if others else ''}")
    if len(jobs) > LINES:
        lines.append(f"  and {len(jobs) - LINES} more groups")
    # the longest group is a floor: it cannot be shared
    whole = max(sum(seconds) / workers, max(seconds))
    lines.append(
        f"about {_time(whole)} with {workers} {'worker' if workers == 1 else 'workers'}, on a machine as busy as now, without early stops"
    )
    return lines


def _seconds(jobs: Sequence[Job], module: Any, threads: int | None, device: str | None) -> list[float]:
    """Estimated seconds of every group."""
    import torch

    kinds = [(module.alike(dict(job[0].recipe) | {"steps": 0}), len(job)) for job in jobs]
    tried: dict[tuple[str, int], Cost] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        _timed(jobs[0], module, device, steps=1)  # imports and first calls are not a cost of the sweep
        for kind, job in zip(kinds, jobs, strict=True):
            if kind not in tried and len(tried) < KINDS:
                tried[kind] = _trial(job, module, device)
    finally:
        torch.set_num_threads(before)
    parts = [(cost.once, cost.step, cost.look) for cost in tried.values()]
    mean = Cost(*(sum(part) / len(parts) for part in zip(*parts, strict=True)))
    return [tried.get(kind, mean).total(job[0].recipe) for kind, job in zip(kinds, jobs, strict=True)]


def _trial(job: Job, module: Any, device: str | None) -> Cost:
    """The cost of a group, from three short trainings of it."""
    few, more, looks = (
        _timed(job, module, device, steps=FEW),
        _timed(job, module, device, steps=MORE),
        _timed(job, module, device, steps=FEW, points=FEW + 1),
    )
    step = max(0.0, more - few) / (MORE - FEW)
    # two points are looks at the start, at step 1 and at the end; as many points as steps are a look at every step
    look = max(0.0, looks - few) / (FEW + 1 - 3)
    return Cost(max(0.0, few - FEW * step - 3 * look), step, look)


def _timed(job: Job, module: Any, device: str | None, *, steps: int, points: int = 2) -> float:
    short = {"steps": steps, "stop": None, "start": None} | ({"points": points} if "points" in job[0].recipe else {})
    start = time.perf_counter()
    module.train([{**cell.recipe, **{name: value for name, value in short.items() if name in cell.recipe}} for cell in job], device=device)
    return time.perf_counter() - start


def _time(seconds: float) -> str:
    """ "45 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
