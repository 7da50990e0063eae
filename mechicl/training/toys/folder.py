"""A toy run's folder.

    config.json             the recipe; a run with another one is refused
    versions.json           the code it was started and continued with
    metrics.parquet         one row per measured step
    steps/<step>.safetensors  the weights at each measured step
    state.safetensors       the newest weights and optimizer memory, with the step in the header
The batch of a step depends on the recipe and the step alone, so the step is all there is to know of the random numbers.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from mechicl.data.folders import write_whole
from mechicl.errors import CheckpointError, OptionError
from mechicl.training.runs import AGAIN, CONFIG, STATE, Run, read_json, read_tensors, write_tensors, write_text
from mechicl.training.toys.recipe import ToyRecipe

METRICS = "metrics.parquet"
STEPS = "steps"
VERSIONS = "versions.json"
KIND = "toy training"


class ToyFolder:
    """The folder of one toy training."""

    path: Path

    def __init__(self, run: Run) -> None:
        self.run = run
        self.path = run.folder

    @classmethod
    def open(cls, folder: str | os.PathLike[str], recipe: ToyRecipe, *, resume: bool) -> ToyFolder:
        """Start a run, or find one to continue.

        Raises:
            OutputPathError: the folder cannot be written, or holds something and `resume` is not set.
            CheckpointError: the folder's run has another recipe.
        """
        made = cls(Run.open(folder, {"kind": KIND, "recipe": recipe.to_json()}, resume=resume))
        seen = read_json(made.path / VERSIONS)["versions"] if (made.path / VERSIONS).exists() else []
        now = versions()
        if not seen or seen[-1] != now:
            write_text(made.path / VERSIONS, json.dumps({"versions": [*seen, now]}, indent=1) + "\n")
        return made

    def save(self, model: Any, moments: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Replace the checkpoint that the run is continued from."""
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        tensors |= {f"optimizer.{name}": value for name, value in moments.items()}
        self.run.put(tensors, counters)

    def load(self, model: Any) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Put the newest weights into the model; return the optimizer's memory and the counters. None where there is no checkpoint yet.

        Raises:
            CheckpointError: the file is damaged.
        """
        found = self.run.take()
        if found is None:
            return None
        tensors, counters = found
        fill(model, tensors, self.path / STATE)
        return {n.removeprefix("optimizer."): v for n, v in tensors.items() if n.startswith("optimizer.")}, counters

    def keep(self, model: Any, step: int) -> None:
        """Keep the weights of a measured step."""
        (self.path / STEPS).mkdir(exist_ok=True)
        write_tensors(step_file(self.path, step), {f"model.{n}": v for n, v in model.state_dict().items()}, {"step": str(step)})

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace the table of measures."""
        data = io.BytesIO()
        pd.DataFrame(rows).to_parquet(data, index=False)
        write_whole(self.path / METRICS, data.getvalue())

    def rows(self, up_to: int) -> list[dict[str, Any]]:
        """The measures made up to a step; later ones are made again.

        Raises:
            CheckpointError: the table is damaged.
        """
        table = read_metrics(self.path)
        if table is None:
            return []
        kept = table[table["step"] <= up_to]
        columns = {str(name): kept[name].tolist() for name in kept.columns}
        return [{name: values[i] for name, values in columns.items()} for i in range(len(kept))]


def versions() -> dict[str, str]:
    """The code that numbers are made with."""
    return {name: importlib.metadata.version(name) for name in ("mechicl", "torch")}


def step_file(folder: Path, step: int) -> Path:
    """Where the weights of a step are kept."""
    return folder / STEPS / f"{step:06d}.safetensors"


def read_metrics(folder: Path) -> pd.DataFrame | None:
    """A run's table; None where nothing was measured yet.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / METRICS
    if not path.exists():
        return None
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{METRICS} must be a readable table; {path} is not ({str(error).splitlines()[0]}). {AGAIN}") from error


def read_recipe(folder: Path) -> ToyRecipe:
    """The recipe of a run's folder.

    Raises:
        CheckpointError: it is no folder of a toy training.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"folder must be a toy run's, with {CONFIG} in it; {folder} has none. Train one: mechicl train toy --out FOLDER."
        )
    config = read_json(folder / CONFIG)
    if config.get("kind") != KIND:
        raise CheckpointError(f"folder must be a toy run's; {folder} holds another kind of run. Pass the folder of a toy training.")
    try:
        return ToyRecipe.from_json(config["recipe"])
    except OptionError as error:
        raise CheckpointError(f"{CONFIG} must hold a recipe of this version of mechicl; {folder} does not: {error}") from error


def fill(model: Any, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Weights of a checkpoint into a model, every one of them.

    Raises:
        CheckpointError: they are another model's.
    """
    try:
        model.load_state_dict({n.removeprefix("model."): v for n, v in tensors.items() if n.startswith("model.")})
    except RuntimeError as error:
        raise CheckpointError(
            f"{path.name} must be a whole checkpoint of this run; reading {path} failed: {str(error).splitlines()[0]} {AGAIN}"
        ) from error


def read_weights(folder: Path, step: int | None) -> tuple[dict[str, Tensor], Path]:
    """A run's tensors: its newest, or those of a measured step.

    Raises:
        OptionError: that step was not kept.
        CheckpointError: the file is missing or damaged.
    """
    path = folder / STATE if step is None else step_file(folder, step)
    if not path.exists():
        kept = sorted(int(p.stem) for p in (folder / STEPS).glob("*.safetensors"))
        if step is not None and kept:
            raise OptionError(f"step must be one of {', '.join(map(str, kept))}; got {step}. Those are the steps that were measured.")
        raise CheckpointError(f"{path.name} must be in a run's folder; {folder} has none. Train or resume the run first.")
    return read_tensors(path)[0], path
