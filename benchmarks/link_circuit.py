"""Did link-context fine-tuning build the link, or sharpen one that was there? python -m benchmarks.link_circuit --runs DIR --out DIR [--tables DIR]

DIR of --runs is what `python -m benchmarks.link` wrote: a base that never met a new name in a prompt with pictures, and fine-tunings "<strategy> <negatives> <seed>". Every finished one
is put beside the base (`mechicl.build_or_sharpen`), and asked about known things under other names (`mechicl.link_priors`). Resumable: fine-tunings that finish later are added by
the same command. --tables writes the tables that notebook 11 reads.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.measure import machine
from mechicl.analysis.link.mechanism_compare import build_or_sharpen
from mechicl.analysis.link.mechanism_prior import link_priors
from mechicl.data.link_context import SHORT, generated_pool, link_episodes

SHOTS = (0, 1, 2, 4)


def finished(runs: Path) -> dict[str, Path]:
    """Fine-tunings that have ended, by name, a seed of every one before the next seed."""
    found = [folder for folder in runs.iterdir() if (folder / "model" / "model.safetensors").is_file() and len(folder.name.split()) == 3]
    return {folder.name: folder / "model" for folder in sorted(found, key=lambda f: (f.name.split()[2], f.name))}


def main() -> None:
    """Compare what is there, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tables", type=Path)
    parser.add_argument("--n", type=int, default=96, help="episodes, half to find heads and half to prove them")
    parser.add_argument("--shots", type=int, default=2, help="examples of each class")
    parser.add_argument("--n-random", type=int, default=19)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    scale = json.loads((given.runs / "scale.json").read_text())
    models = finished(given.runs)
    base = Path(scale["base"]) if Path(scale["base"]).is_dir() else given.runs / "base"
    fresh = generated_pool(1, 10, max(scale["per_class"], 8), scale["size"], split="held_out", names="made-up")
    known = generated_pool(0, scale["groups"], scale["per_class"], scale["size"], split="train", names="made-up")
    episodes = link_episodes(fresh, given.n, shots=given.shots, prompt=SHORT, seed=131)
    named = link_episodes(known, given.n // 2, shots=max(SHOTS), pseudo_labels=False, prompt=SHORT, seed=137)
    result = build_or_sharpen(
        base,
        models,
        episodes,
        metric="logit_diff",
        n_random=given.n_random,
        batch_size=48,
        out=given.out / "circuit",
        task="held-out concepts",
    )
    priors = link_priors(
        {"base": base, **models},
        named,
        shots=SHOTS,
        generate=False,
        batch_size=16,
        out=given.out / "prior",
        task="known concepts, names exchanged",
    )
    tables = {"models": result.to_frame(), "heads": result.heads_frame(), "grafts": result.grafts_frame(), "prior": priors.to_frame()}
    for name, table in tables.items():
        if given.tables is not None:
            table.to_parquet(given.tables / f"11_link_{name}.parquet", index=False)
        table.to_csv(given.out / f"{name}.csv", index=False)
    print(machine(), f"base {result.base_accuracy}, chance {result.chance}", sep="\n")
    for row in result.rows:
        print(f"{row.name}: {row.verdict}")


if __name__ == "__main__":
    main()
