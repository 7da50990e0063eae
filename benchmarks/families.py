"""The causal story in every family: python -m benchmarks.families --out DIR

For each family: train an organism (`mechicl train vlm --preset quick`, resumed where a run was stopped), then find heads on one half of fresh held-out
episodes (4 classes x 2 shots, chance .25) and switch them off on the other half beside as many matched random heads. Every family gets a row, whatever
comes out; `--seeds` repeats the training. Each finished organism's row is kept in DIR, so that a stopped benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import mechicl
from benchmarks.measure import machine, table
from mechicl.analysis.study import find_and_prove
from mechicl.data import concepts
from mechicl.results import Ablation, Estimate
from mechicl.training.vlm import train

FAMILIES = ("qwen3_vl", "llava", "internvl", "gemma3", "smolvlm")


def measure(family: str, seed: int, folder: Path, n: int) -> dict[str, Any]:
    """Train and prove one organism; the numbers of its row."""
    resume = (folder / "config.json").exists()
    model = train(family, preset="quick", out=folder, seed=seed, threads=1, resume=resume, progress=False)
    study = find_and_prove(mechicl.load(model), concepts.draw(n, classes=4, shots=2, size=28, seed=77), progress=False)
    zero_shot = study.accuracy.zero_shot
    return {
        "family": family,
        "seed": seed,
        "n": study.n_prove,
        "accuracy": words(study.accuracy.accuracy),
        "zero_shot": words(zero_shot) if zero_shot is not None else "",
        "controls": {name: words(e) for name, e in study.controls.items()},
        "sets": [proof(one.kind, one.verdict, one.ablation) for one in study.sets],
    }


def proof(kind: str, verdict: str, ablation: Ablation | None) -> dict[str, Any]:
    """One set of heads switched off."""
    if ablation is None:
        return {"kind": kind, "verdict": verdict}
    return {
        "kind": kind,
        "verdict": verdict,
        "heads": [f"{layer}.{head}" for layer, head in ablation.chosen.heads],
        "off": words(ablation.chosen.accuracy),
        "random": words(ablation.random_mean),
        "p_random": ablation.p_random,
    }


def words(e: Estimate) -> str:
    """Value and 95 % interval."""
    return f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]"


def main() -> None:
    """Train, prove, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and their rows")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--n", type=int, default=128, help="episodes; half of them to find heads")
    options = parser.parse_args()
    found = []
    for seed in options.seeds:
        for family in options.families:
            kept = options.out / f"{family}_{seed}.json"
            if not kept.exists():
                row = measure(family, seed, options.out / f"{family}_{seed}", options.n)
                kept.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
            found.append(json.loads(kept.read_text(encoding="utf-8")))
            print(json.dumps(found[-1]), flush=True)
    print(machine())
    header = ["family", "accuracy (n)", "zero-shot", "heads off: accuracy", "as many random heads", "p"]
    print(table(header, [line(row, one) for row in found for one in row["sets"]]))


def line(row: dict[str, Any], one: dict[str, Any]) -> list[str]:
    """A row of the table."""
    start = [f"{row['family']} (seed {row['seed']})", f"{row['accuracy']} ({row['n']})", row["zero_shot"]]
    if "off" not in one:
        return [*start, f"{one['kind']}: {one['verdict']}", "", ""]
    return [*start, f"{one['kind']} {' '.join(one['heads'])}: {one['off']}", one["random"], f"{one['p_random']:.3f}"]


if __name__ == "__main__":
    main()
