"""Workers on a Ray cluster, each with a model of its own. The only module of the analyses that knows Ray (`pip install 'mechicl[sweep]'`).

Parts come back through Ray and the driver alone writes them: the nodes need mechicl installed and the model's files, but no folder in common.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mechicl.analysis.spread.crew import Call, Hands
from mechicl.analysis.spread.work import WORK, Part, about
from mechicl.errors import OptionError

RETRIES = 2
"""How often Ray starts a worker again that died, and a shard with it."""
PATIENCE = 10.0
"""Seconds for a cluster to answer the door."""


class RayHands(Hands):
    """A pool of Ray actors.

    Args:
        source: Arguments of `mechicl.load`: "name", "device", "dtype", ... A device "cuda" asks Ray for one GPU a worker.
        workers: How many.
        address: None or "local" starts Ray here; "auto", host:port or "ray://host:port" joins a cluster.
        threads: Cores and threads of each worker.

    Raises:
        OptionError: Ray is not installed, there is no cluster at the address, or it has too little room for one worker.
    """

    ours: bool

    def __init__(self, source: Mapping[str, Any], *, workers: int, address: str | None = None, threads: int = 1) -> None:
        if workers < 1 or threads < 1:
            raise OptionError(f"workers and threads must be at least 1; got {workers} and {threads}. 0 workers work without Ray.")
        try:
            import ray  # pyright: ignore[reportMissingImports]  (an extra)
        except ImportError as error:
            raise OptionError(
                "workers must be 0 where Ray is not installed. Run pip install 'mechicl[sweep]', or use one process."
            ) from error
        self.ray: Any = ray
        self.ours = not ray.is_initialized()
        if self.ours:
            _join(ray, address, workers * threads)
        gpus = 1 if str(source.get("device") or "").startswith("cuda") or source.get("device_map") else 0
        paths = os.pathsep.join(dict.fromkeys(path or os.getcwd() for path in sys.path))
        environment = {"env_vars": {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"}}
        room = ray.cluster_resources()
        if room.get("CPU", 0) < threads or room.get("GPU", 0) < gpus:
            self.close()
            raise OptionError(
                f"the cluster must have {threads} cores and {gpus} GPUs for a worker; got {room.get('CPU', 0):.0f} and {room.get('GPU', 0):.0f}. "
                "Ask for fewer threads, or device='cpu'."
            )
        made = ray.remote(num_cpus=threads, num_gpus=gpus, max_restarts=RETRIES, max_task_retries=RETRIES, runtime_env=environment)(Worker)
        self.workers: list[Any] = [made.remote(dict(source), threads) for _ in range(workers)]

    def about(self) -> dict[str, Any]:
        """Of the first worker."""
        return self._get(self.workers[0].about.remote())

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Part]]:
        """Every worker has a shard; who finishes takes the next one. A worker that dies for good leaves its shard to the others."""
        waiting, idle, flying = list(range(len(calls)))[::-1], list(self.workers), {}
        try:
            while waiting or flying:
                while waiting and idle:
                    index, worker = waiting.pop(), idle.pop(0)
                    call = calls[index]
                    flying[worker.do.remote(call.what, list(call.episodes), dict(call.options))] = (index, worker)
                for reference in self.ray.wait(list(flying))[0]:
                    index, worker = flying.pop(reference)
                    try:
                        part = self._get(reference)
                    except self.ray.exceptions.RayActorError:
                        self.workers.remove(worker)
                        waiting.append(index)
                        if not self.workers:
                            raise
                        continue
                    idle.append(worker)
                    yield index, part
        finally:
            for reference in flying:
                self.ray.cancel(reference, force=False)

    def _get(self, reference: Any) -> Any:
        """A worker's answer; its refusals as if they had been raised here."""
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            raise (cause if isinstance(cause, Exception) else error) from None

    def close(self) -> None:
        """End the workers, and Ray where it was started here."""
        for worker in getattr(self, "workers", []):
            self.ray.kill(worker)
        self.workers = []
        if self.ours:
            self.ray.shutdown()


class Worker:
    """On a node: a model, and what is done with it. It is loaded at the first call, so that a refusal comes back as what it is."""

    source: Mapping[str, Any]
    threads: int

    def __init__(self, source: Mapping[str, Any], threads: int) -> None:
        self.source, self.threads, self._model = source, threads, None

    def model(self) -> Any:
        if self._model is None:
            import torch

            from mechicl.models.load import load

            torch.set_num_threads(self.threads)
            self._model = load(**self.source)
        return self._model

    def about(self) -> dict[str, Any]:
        return about(self.model())

    def do(self, what: str, episodes: Sequence[Any], options: Mapping[str, Any]) -> Part:
        return WORK[what](self.model(), episodes, **options)


def _join(ray: Any, address: str | None, cores: int) -> None:
    """Start Ray here, or join a cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address in (None, "local"):
        ray.init(num_cpus=max(cores, os.cpu_count() or 1), log_to_driver=False, include_dashboard=False)
        return
    host, found, port = address.removeprefix("ray://").rpartition(":")
    try:
        if found:  # Ray itself would wait for minutes where nothing listens
            socket.create_connection((host, int(port)), timeout=PATIENCE).close()
        ray.init(address=address, log_to_driver=False)
    except (OSError, ValueError, OverflowError, RuntimeError) as error:
        raise OptionError(f"address must be that of a running cluster; got {address!r} ({error}). Start one, or leave it out.") from error
