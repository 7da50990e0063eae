"""Many trainings over a grid of settings, on this machine or on a Ray cluster, that can be killed at any moment and run again.

    from mechicl.training.sweeps import sweep
    table = sweep.run("spec.toml", "runs/k_by_code", workers=2)      # one tidy table; a second call does only what is missing
    table = sweep.load("runs/k_by_code")

A cell is one training; `mechicl.training.sweeps.cells` says how a spec becomes cells, `sweep_store` what lies in the folder, `sweep_work` what a worker does.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechicl.errors import CheckpointError, OptionError
from mechicl.training.sweeps.cells import Cell, cells, group_size, groups, read_spec, starting
from mechicl.training.sweeps.store import PLAN, RESULTS, Store
from mechicl.training.sweeps.table import read_results
from mechicl.training.sweeps.work import TRAINER, How, Outcome, parquet_bytes, work

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TRAINER", "Outcome", "failures", "load", "parquet_bytes", "run"]

SAVE_EVERY = 30.0
"""Least seconds between two writings of the results table while cells come in."""


def run(
    spec: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    workers: int = 1,
    together: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    keep_models: bool = False,
    ray_address: str | None = None,
    progress: bool = True,
    trainer: str = TRAINER,
) -> pd.DataFrame:
    """Train every cell that the folder does not have yet and return all of them as one table.

    Args:
        spec: A TOML file, or a mapping of the same form.
        out: The sweep's folder. One that holds the same sweep, or part of it, is continued.
        workers: Processes on this machine; 1 trains in this process.
        together: At most so many cells with the same shapes are trained in one batched step; by default 4 on a CPU and 64 on a GPU.
        threads: Threads of each worker; by default the machine's cores are shared out.
        device: Where to train ("cuda", "mps", ...); by default the CPU.
        keep_models: Keep each cell's run in models/<cell>: `load_toy` opens it, and a cell that was in flight goes on from its last checkpoint.
        ray_address: A Ray cluster's address ("auto", "host:port", "local" to start one here); `workers` then only decides how finely groups are cut.
        trainer: The module that trains (see `mechicl.training.sweeps.work`).

    Returns:
        A row per cell and measured step: cell, preset, seed, the settings that the spec's grids name, step, measures.
        `attrs["failed"]` maps each cell without a table to its reason, `attrs["sweep"]` holds the spec.

    Raises:
        OptionError: a spec or an option that cannot be.
        DeviceError: this machine has no such device.
        CheckpointError: the folder holds finished cells of another sweep.
        OutputPathError: the folder cannot be written, or another driver is at work in it.
    """
    import importlib

    import pandas as pd

    if workers < 1:
        raise OptionError(f"workers must be at least 1; got {workers}. Use 1 to train in this process.")
    if device is not None and ray_address is None:
        from mechicl.models.load import check_device

        check_device(device)
    wanted = read_spec(spec)
    module = importlib.import_module(trainer)
    size = group_size(wanted, together, device)
    store = Store(out, wanted, cells(wanted, module.resolve))
    how = How(trainer, device, str(store.models) if keep_models else None)

    def outcomes(todo: Sequence[Cell], how: How) -> Generator[Outcome]:
        jobs = groups([starting(cell, str(store.models)) for cell in todo], module.alike, size, workers)
        if ray_address is not None:
            from mechicl.training.sweeps.ray_cluster import crew

            return crew(jobs, address=ray_address, threads=threads or 1, how=how)
        if workers > 1:
            from mechicl.training.sweeps.local import crew

            return crew(jobs, workers=workers, threads=threads or max(1, cores() // workers), how=how, logs=store.out / "logs")
        return alone(jobs, threads, how)

    with store.alone():
        store.begin()
        first = store.missing(store.before)
        if first:  # what later cells start from is always kept
            collect(store, outcomes(first, replace(how, models=str(store.models))), len(first), "before", progress)
        todo = startable(store, store.missing(store.cells))
        collect(store, outcomes(todo, how), len(todo), "sweep", progress)
    frame = read_results(store.out / RESULTS) if (store.out / RESULTS).exists() else pd.DataFrame()
    frame.attrs["failed"] = store.failures()
    return frame


def startable(store: Store, todo: Sequence[Cell]) -> list[Cell]:
    """The cells that have what they start from; the others have failed with it."""
    ready = []
    for cell in todo:
        if cell.before is None or (store.out / "cells" / f"{cell.before.id}.parquet").exists():
            ready.append(cell)
        else:
            store.write(Outcome(cell.id, "error", reason=f"the training before it has no result ({cell.before.id})"))
    return ready


def collect(store: Store, outcomes: Generator[Outcome], n: int, name: str, progress: bool) -> None:
    """Keep n outcomes as they come, and the results table now and then and at the end, also when the sweep is interrupted."""
    import time

    from tqdm import tqdm

    due = time.monotonic() + SAVE_EVERY
    failed = 0
    try:
        with (
            contextlib.closing(outcomes),
            tqdm(total=n, unit="cell", desc=name, disable=not progress) as bar,
        ):
            for outcome in outcomes:
                store.write(outcome)
                bar.update()
                if outcome.kind != "done":
                    failed += 1
                    if progress:
                        bar.write(f"{outcome.kind}: {store.describe(outcome.cell)}: {outcome.reason}", file=sys.stderr)
                    bar.set_postfix(failed=failed)
                now = time.monotonic()
                if now > due:
                    store.assemble()
                    # of a large sweep too this takes a small share of the time
                    due = time.monotonic() + max(SAVE_EVERY, 20 * (time.monotonic() - now))
    finally:
        store.assemble()


def alone(jobs: Sequence[Sequence[Cell]], threads: int | None, how: How) -> Generator[Outcome]:
    """The groups one after another in this process."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        for job in jobs:
            yield from work(how, [cell.id for cell in job], [cell.recipe for cell in job])
    finally:
        torch.set_num_threads(before)


def load(out: str | os.PathLike[str]) -> pd.DataFrame:
    """The results of a sweep, finished or not: a row per finished cell and measured step.

    Args:
        out: The sweep's folder, or a results table on its own.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = Path(out)
    if path.is_dir():
        path = path / RESULTS
    if not path.is_file():
        raise CheckpointError(
            f"out must be a sweep's folder or its {RESULTS}; {path} does not exist. Run `mechicl sweep SPEC.toml --out {out}` first."
        )
    return read_results(path)


def failures(out: str | os.PathLike[str]) -> dict[str, str]:
    """Cell -> settings and reason, for each cell of a sweep that ended without a table.

    Raises:
        CheckpointError: no sweep's folder.
    """
    from mechicl.training.runs import read_json

    found = {path.stem: read_json(path) for path in sorted((Path(out) / "failed").glob("*.json"))}
    asked = read_json(Path(out) / PLAN)
    known = asked.get("before", {}) | asked["cells"]
    return {cell: f"{data['cell']}: {data['reason']}" for cell, data in found.items() if cell in known}


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
