"""Ways of finding circuits on programs whose circuit is known edge by edge: python -m benchmarks.circuits

Precision and recall of the edges found, and faithfulness on pairs that did not choose them, with 95 % bootstrap intervals over seeds. Exact programs, where idle
parts carry nothing at all, and the same with noise on every weight, where every part carries a little. About a minute for three seeds.
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.measure import machine
from mechicl.analysis.circuits.benchmark import benchmark_methods
from mechicl.results import CircuitBenchmark, Estimate


def interval(x: Estimate) -> str:
    """A value, and its interval where it has a width."""
    return f"{x.value:.2f}" if x.high - x.low < 0.005 else f"{x.value:.2f} [{x.low:.2f}, {x.high:.2f}]"


def markdown(result: CircuitBenchmark) -> str:
    """One line per way, programs side by side: precision / recall."""
    names = list(dict.fromkeys(row.program for row in result.rows))
    lines = [
        "| way | " + " | ".join(f"{name}: precision / recall (edges)" for name in names) + " | faithfulness, held out | exact | s |",
        "|---|" + "---|" * (len(names) + 3),
    ]
    for way in dict.fromkeys(row.method for row in result.rows):
        rows = [next(row for row in result.rows if row.method == way and row.program == name) for name in names]
        cells = [f"{interval(row.precision)} / {interval(row.recall)} ({row.n_edges:.0f})" for row in rows]
        faithful = [row.faithfulness.value for row in rows]
        lines.append(
            f"| {way} | " + " | ".join(cells) + f" | {min(faithful):.2f} to {max(faithful):.2f} | {sum(row.exact for row in rows) / len(rows):.0%} "
            f"| {sum(row.seconds for row in rows) / len(rows):.1f} |"
        )  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Print one table for each level of noise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--noise", type=float, nargs="*", default=[0.0, 0.1])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{machine()}\n")
    for noise in arguments.noise:
        begin = time.perf_counter()
        result = benchmark_methods(noise=noise, n_seeds=arguments.seeds, progress=False)
        options = result.provenance.options
        sizes = ", ".join(f"{row.program} {row.n_true:.0f}" for row in result.rows if row.method == result.rows[0].method)
        print(
            f"Noise {noise:g}, {result.n_seeds} seeds, {options['n_pairs']} pairs, target {options['target']:g}; planted edges: {sizes}.\n"
        )
        print(f"{markdown(result)}\n\n{time.perf_counter() - begin:.0f} s\n")


if __name__ == "__main__":
    main()
