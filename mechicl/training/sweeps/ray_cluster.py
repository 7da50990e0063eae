"""A sweep's groups as tasks of a Ray cluster. The only module that knows Ray (`pip install 'mechicl[sweep]'`).

Results come back through Ray and the driver alone writes them: the nodes need mechicl installed, but no folder in common.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from mechicl.errors import OptionError
from mechicl.training.sweeps.cells import Cell
from mechicl.training.sweeps.work import How, Outcome, work

RETRIES = 2
"""How often Ray starts a group again whose worker or node died."""
PATIENCE = 10.0
"""Seconds for a cluster to answer the door."""


def crew(jobs: Sequence[tuple[Cell, ...]], *, address: str, threads: int, how: How) -> Generator[Outcome]:
    """Train the groups on a Ray cluster and yield how each cell ended, as it ends.

    Args:
        address: "auto" for the cluster that this machine belongs to, host:port, "ray://host:port", or "local" to start Ray here.
        threads: Cores and threads of each group.
        how: A device "cuda" asks Ray for one GPU a group; a folder for models must be one that every node has.

    Raises:
        OptionError: Ray is not installed, or there is no cluster at the address.
    """
    if not jobs:
        return
    try:
        import ray  # pyright: ignore[reportMissingImports]  (an extra)
    except ImportError as error:
        raise OptionError(
            "ray_address must be left out where Ray is not installed. Run pip install 'mechicl[sweep]', or use workers."
        ) from error
    ours = not ray.is_initialized()
    if ours:
        _knock(address)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(
                address=None if address == "local" else address,
                log_to_driver=False,
                include_dashboard=False if address == "local" else None,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise OptionError(
                f"ray_address must be that of a running cluster; got {address!r} ({error}). Start one, or use local."
            ) from error
    try:
        yield from _outcomes(ray, jobs, threads, how)
    finally:
        if ours:
            ray.shutdown()


def _knock(address: str) -> None:
    """Refuse an address at which nothing listens: Ray itself would wait there for minutes."""
    host, found, port = address.removeprefix("ray://").rpartition(":")
    if not found:
        return
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
    except (OSError, ValueError, OverflowError) as error:
        raise OptionError(f"ray_address must be that of a running cluster; got {address!r} ({error}). Start one, or use local.") from error


def _outcomes(ray: Any, jobs: Sequence[tuple[Cell, ...]], threads: int, how: How) -> Generator[Outcome]:
    paths = os.pathsep.join(dict.fromkeys(path or os.getcwd() for path in sys.path))
    environment = {"env_vars": {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths}}
    task = ray.remote(
        num_cpus=threads, num_gpus=1 if (how.device or "").startswith("cuda") else 0, max_retries=RETRIES, runtime_env=environment
    )(_train)
    flying = {task.remote(how, [cell.id for cell in job], [cell.recipe for cell in job]): job for job in jobs}
    while flying:
        for reference in ray.wait(list(flying))[0]:
            job = flying.pop(reference)
            try:
                found = [Outcome.from_line(line) for line in ray.get(reference)]
            except ray.exceptions.RayError as error:
                found = [
                    Outcome(cell.id, "lost", reason=f"{type(error).__name__}: {str(error).splitlines()[0]}", detail=str(error))
                    for cell in job
                ]
            yield from found


def _train(how: How, cells: Sequence[str], recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """On a node: outcomes of a group, as lines."""
    return [outcome.to_line() for outcome in work(how, cells, recipes)]
