"""Train the cells of a spec, switch heads and modalities off in each trained model, and keep the table as Parquet.

    python notebooks/make/knock_outs.py notebooks/sweeps/05_knock_outs.toml --out notebooks/results/05_knock_outs.parquet

One row per model and knock-out: the cell, its seed, how many modalities, and `KnockOutTable.to_frame`'s columns with the levels of chance. Runs are kept in --runs
(a second call does not train them again).
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pandas as pd

from mechicl.analysis.knockouts import knock_out_table
from mechicl.data.gaussian import MultimodalTask
from mechicl.training.cells import cells, read_spec
from mechicl.training.sweep_work import resolve
from mechicl.training.toy import ToyRun, train_many
from mechicl.training.toy_recipe import ToyRecipe, together_key


def trained(spec: str, runs: Path | None, threads: int | None = None, *, progress: bool = True) -> list[ToyRun]:
    """The models of every cell, in order."""
    every = [(cell.id, ToyRecipe.from_json(cell.recipe)) for cell in cells(read_spec(spec), resolve)]
    found: dict[str, ToyRun] = {}
    for key in dict.fromkeys(together_key(made) for _, made in every):
        group = [(name, made) for name, made in every if together_key(made) == key]
        out = None if runs is None else [runs / name for name, _ in group]
        done = train_many([made for _, made in group], out=out, resume=runs is not None, threads=threads, progress=progress)
        found |= {name: run for (name, _), run in zip(group, done, strict=True)}
    return [found[name] for name, _ in every]


def rows(run: ToyRun, n: int, n_random: int) -> pd.DataFrame:
    """The knock-outs of one model, on novel classes."""
    made = run.recipe
    table = knock_out_table(run.model, made.task, n=n, n_random=n_random, seed=1000 + made.seed)
    modalities = 2 if isinstance(made.task, MultimodalTask) else 1
    about = {
        "modalities": modalities,
        "preset": made.name,
        "seed": made.seed,
        "chance": table.chance,
        "copy": table.copy,
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
    options = parser.parse_args()
    table = pd.concat(
        [rows(run, options.n, options.random) for run in trained(options.spec, options.runs, options.threads)], ignore_index=True
    )
    table.attrs["sweep"] = json.dumps({"spec": Path(options.spec).read_text(encoding="utf-8")})
    part = options.out.with_suffix(".part")
    table.to_parquet(part, index=False)
    os.replace(part, options.out)
    print(table[["modalities", "seed", "name", "accuracy", "low", "high", "change"]].round(3).to_string())


if __name__ == "__main__":
    main()
