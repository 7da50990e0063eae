"""What a sweep would do and about how long it takes, from a few real steps of one group of each shape."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mechicl.training.cells import Cell, axis_names, cells, groups, read_spec
from mechicl.training.sweep_store import finished
from mechicl.training.sweep_work import TRAINER

STEPS = (4, 24)
"""Steps of the two trials whose difference gives the cost of a step."""
SHAPES = 8
"""At most so many shapes are timed; the others are taken to cost their mean."""


def outlook(
    spec: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str] | None = None,
    *,
    together: int = 16,
    workers: int = 1,
    threads: int | None = None,
    trainer: str = TRAINER,
) -> list[str]:
    """Lines that say how many cells there are, which are missing, how they group, and the estimated time.

    Args:
        out: The sweep's folder, if it has one yet: finished cells are not counted.

    Raises:
        OptionError: a spec or an option that cannot be.
    """
    wanted = read_spec(spec)
    module = importlib.import_module(trainer)
    every = cells(wanted, module.resolve)
    done = set(finished(Path(out))) if out is not None else set()
    todo = [cell for cell in every if cell.id not in done]
    jobs = groups(todo, module.alike, together if wanted.group else 1, workers)
    lines = [
        f"{len(every)} cells, {len(every) - len(todo)} finished, {len(todo)} to train in {len(jobs)} groups of at most {max(map(len, jobs), default=0)}"
    ]
    lines += [f"  {name}: {', '.join(str(v) for v in dict.fromkeys(str(c.value(name)) for c in every))}" for name in axis_names(wanted)]
    lines.append(f"  seed: {', '.join(str(v) for v in sorted({c.seed for c in every}))}")
    if not jobs:
        return lines
    costs = _costs(jobs, module, threads)
    hours = sum(cost for _, cost in costs) / workers / 3600
    lines += [
        f"  {len(job):>3} x {int(job[0].recipe['steps'])} steps: about {_time(cost)} ({job[0].describe(axis_names(wanted))}, ...)"
        for job, cost in costs[:40]
    ]
    lines += [f"  and {len(costs) - 40} more groups"] if len(costs) > 40 else []
    lines.append(
        f"about {_time(hours * 3600)} with {workers} {'worker' if workers == 1 else 'workers'} as free as this process was now, without early stops"
    )
    return lines


def _costs(jobs: Sequence[tuple[Cell, ...]], module: Any, threads: int | None) -> list[tuple[tuple[Cell, ...], float]]:
    """Estimated seconds of every group."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    timed: dict[tuple[str, int], tuple[float, float]] = {}
    for job in jobs:
        shape = (module.alike(dict(job[0].recipe) | {"steps": 0}), len(job))
        if shape not in timed and len(timed) < SHAPES:
            timed[shape] = _trial(job, module)
    spare = tuple(sum(x) / len(timed) for x in zip(*timed.values(), strict=True))
    out = []
    for job in jobs:
        once, step = timed.get((module.alike(dict(job[0].recipe) | {"steps": 0}), len(job)), spare)
        out.append((job, once + step * int(job[0].recipe["steps"])))
    return out


def _trial(job: Sequence[Cell], module: Any) -> tuple[float, float]:
    """Seconds that a group takes before its first step and for each step."""
    took = []
    for steps in STEPS:
        start = time.perf_counter()
        module.train([dict(cell.recipe) | {"steps": steps} for cell in job])
        took.append(time.perf_counter() - start)
    step = max(0.0, took[1] - took[0]) / (STEPS[1] - STEPS[0])
    return max(0.0, took[0] - step * STEPS[0]), step


def _time(seconds: float) -> str:
    """ "45 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
