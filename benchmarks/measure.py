"""Shared by the benchmarks: interleaved rounds, medians, ratios to the first entry, peak memory of this process."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch


def peak_memory(run: Callable[[], object]) -> float:
    """Largest resident memory during `run` above what was resident before, MB (Linux)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier runs freed goes back first, else it would be used again uncounted
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the high-water mark
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key + ":"))


def rounds(
    entries: dict[str, Callable[[], object]], n: int, *, clock: Callable[[], float] = time.perf_counter, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of every entry in each of n rounds, one after the other, so that drift of the machine hits all alike.

    `clock`: `time.process_time` counts what the process itself computed, on a machine that others use too (all entries on one thread).
    """
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    for k in range(n + warm_up):
        for name, run in entries.items():
            start = clock()
            run()
            if k >= warm_up:
                seconds[name].append(clock() - start)
    return seconds


def ratio(of: list[float], to: list[float]) -> float:
    """Median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def machine() -> str:
    """One line about where this ran."""
    return f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(["| " + " | ".join(r) + " |" for r in [header, ["---"] * len(header), *rows]])
