"""A sweep's workers on this machine: one process each, talked to in lines of JSON.

Plain subprocesses in place of multiprocessing: the driver may be a notebook or a script without a `__main__` guard, and a worker that dies (killed, out of memory)
takes only its own group with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO

from mechicl.training.sweeps.cells import Cell
from mechicl.training.sweeps.work import How, Outcome

TRIES = 2
"""A group whose worker dies is given to a fresh worker once, in two halves: a kill from outside is not the group's fault, and half needs less memory."""

LOOK = "10"
"""Seconds between two lines of a worker's log on where its group is."""

Job = tuple[Cell, ...]


class Worker:
    """One worker process, its group in flight, and a thread that puts what it says into the common queue."""

    name: str
    log: Path
    process: subprocess.Popen
    tries: int

    def __init__(
        self, name: str, command: Sequence[str], environment: dict[str, str], log: Path, said: queue.Queue[tuple[Worker, str | None]]
    ) -> None:
        self.name, self.log = name, log
        self.job: Job = ()
        self.tries = 0
        self.open: dict[str, Cell] = {}
        self._errors: IO[bytes] = log.open("ab")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=environment)
        self._ear = threading.Thread(target=self._listen, args=(said,), daemon=True)
        self._ear.start()

    def _listen(self, said: queue.Queue[tuple[Worker, str | None]]) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                if line.endswith(b"\n"):  # a kill may cut the last one
                    said.put((self, line.decode()))
        said.put((self, None))

    def give(self, job: Job, tries: int) -> None:
        """Start on a group."""
        assert self.process.stdin is not None
        self.job, self.tries, self.open = job, tries, {cell.id: cell for cell in job}
        line = json.dumps({"cells": list(self.open), "recipes": [cell.recipe for cell in job]}) + "\n"
        try:
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()
        except OSError:
            pass  # it died while idle: the end of its output is already in the queue, and the group is given out again there

    def stop(self) -> None:
        """End the process, whatever it is at."""
        self.process.kill()
        self.process.wait()
        self._ear.join()
        for stream in (self.process.stdin, self._errors):
            if stream is not None:
                with contextlib.suppress(OSError):  # what was not read any more
                    stream.close()

    def ending(self) -> str:
        """How the process ended, in words."""
        code = self.process.wait()
        if code < 0:
            return f"its worker was killed by {signal.Signals(-code).name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")
        return f"its worker ended with exit code {code}; see {self.log}"


def crew(jobs: Sequence[Job], *, workers: int, threads: int, how: How, logs: Path) -> Generator[Outcome]:
    """Train the groups in `workers` processes and yield how each cell ended, as it ends.

    Args:
        threads: Threads of each worker.
        logs: Folder for what the workers write to stderr.
    """
    command = [sys.executable, "-m", "mechicl.training.sweeps.work", json.dumps(asdict(replace(how, progress=True)))]
    # a worker sees the modules that its driver sees, also those of a notebook's or a test's folder
    paths = os.pathsep.join(dict.fromkeys(path or os.getcwd() for path in sys.path))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths, "TQDM_MININTERVAL": LOOK}
    said: queue.Queue[tuple[Worker, str | None]] = queue.Queue()
    waiting = deque((job, 1) for job in jobs)
    busy: set[Worker] = set()

    def hire(name: str) -> None:
        if waiting:
            worker = Worker(name, command, environment, logs / f"{name}.log", said)
            busy.add(worker)
            worker.give(*waiting.popleft())

    try:
        for k in range(min(workers, len(jobs))):
            hire(str(k))
        while busy:
            worker, line = said.get()
            if line is not None:
                outcome = Outcome.from_line(line)
                worker.open.pop(outcome.cell, None)
                yield outcome
                if not worker.open and waiting:
                    worker.give(*waiting.popleft())
                elif not worker.open:
                    busy.discard(worker)
                    worker.stop()
            elif worker in busy:
                busy.discard(worker)
                lost = tuple(worker.open.values())
                reason = worker.ending()
                worker.stop()
                if lost and worker.tries < TRIES:
                    half = -(-len(lost) // 2)
                    waiting.extendleft((part, worker.tries + 1) for part in (lost[half:], lost[:half]) if part)
                elif lost:
                    yield from (Outcome(cell.id, "lost", reason=reason) for cell in lost)
                hire(worker.name)
    finally:
        for worker in busy:
            worker.stop()
