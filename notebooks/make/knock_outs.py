"""Run a sweep, switch heads and modalities off in each trained model, and keep the table as Parquet.

    python notebooks/make/knock_outs.py notebooks/sweeps/05_knock_outs.toml --out notebooks/results/05_knock_outs.parquet

One row per model and knock-out: the cell, its seed, how many modalities, what takes a head's place (`off`), and `KnockOutTable.to_frame`'s columns with the levels of chance. The sweep is kept in
--runs: a second call does not train its models again.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pandas as pd

from mechicl.analysis.ablation.knockouts import knock_out_table
from mechicl.analysis.ablation.switches import How
from mechicl.data.gaussian import MultimodalTask
from mechicl.training.sweeps import sweep
from mechicl.training.toys.train import load_toy
from mechicl.training.toys.folder import read_recipe


def rows(folder: Path, n: int, n_random: int, how: How) -> pd.DataFrame:
    """The knock-outs of the model in a run's folder, on novel classes; `how`: what takes the place of a head's output."""
    made = read_recipe(folder)
    table = knock_out_table(load_toy(folder), made.task, n=n, n_random=n_random, how=how, seed=1000 + made.seed)
    modalities = 2 if isinstance(made.task, MultimodalTask) else 1
    about = {
        "modalities": modalities,
        "preset": made.name,
        "seed": made.seed,
        "chance": table.chance,
        "copy": table.copy,
        "off": how,
        "how": table.how,
        "note": table.note,
    }
    return table.to_frame().assign(**about)


def main() -> None:
    """Train, knock out, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/05"))
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--random", type=int, default=20)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    done = sweep.run(options.spec, options.runs, keep_models=True, threads=options.threads, workers=options.workers)
    ways: tuple[How, ...] = ("zero", "mean")
    models = [options.runs / "models" / cell for cell in done["cell"].unique()]
    found = [rows(folder, options.n, options.random, how).assign(cell=folder.name) for how in ways for folder in models]
    table = pd.concat(found, ignore_index=True)
    table.attrs["sweep"] = json.dumps({"spec": Path(options.spec).read_text(encoding="utf-8")})
    part = options.out.with_suffix(".part")
    table.to_parquet(part, index=False)
    os.replace(part, options.out)
    print(table[["off", "modalities", "seed", "name", "accuracy", "low", "high", "change"]].round(3).to_string())


if __name__ == "__main__":
    main()
