"""The decoders that a sweep's second stages start from: one run of stage 1 for every `start` in the spec, in the folder that the spec names.

    python notebooks/make/stage1.py notebooks/sweeps/04_modality_asymmetry.toml

A decoder is trained on the first modality of the cells that start from it: their K1, D1, L, N, their model and their world; the rest is the "cpu" preset.
Folders that are finished are left alone, others are continued.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from mechicl.errors import OptionError
from mechicl.training.cells import cells, read_spec
from mechicl.training.sweep_work import resolve
from mechicl.training.toy import train_many
from mechicl.training.toy_recipe import ToyRecipe, recipe, together_key


def first_stages(spec: str) -> dict[str, ToyRecipe]:
    """Folder -> the recipe of the first stage in it.

    Raises:
        OptionError: cells that start from one folder need different decoders.
    """
    found: dict[str, ToyRecipe] = {}
    for cell in cells(read_spec(spec), resolve):
        start, task = cell.recipe["start"], cell.recipe["task"]
        if start is None:
            continue
        made = recipe("cpu", seed=cell.seed, K=task["K1"], L=task["L"], N=task["N"], D=task["D1"], eps=task["eps1"], alpha=task["alpha1"])
        made = replace(made, model=dict(cell.recipe["model"]), task=replace(made.task, seed=task["seed"]))
        if found.setdefault(start, made) != made:
            raise OptionError(
                f"cells that start from {start} must need the same decoder; they do not. Name another folder for some of them."
            )
    return found


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    groups: dict[str, dict[str, ToyRecipe]] = {}
    for folder, made in first_stages(options.spec).items():
        groups.setdefault(together_key(made), {})[folder] = made
    for group in groups.values():
        for run in train_many(list(group.values()), out=list(group), resume=True, threads=options.threads):
            last = run.table.iloc[-1]
            print(run.folder, f"step {last['step']:.0f}: ICL {last['accuracy_ic']:.3f}, in weights {last['accuracy_iw']:.3f}")


if __name__ == "__main__":
    main()
