"""A stand-in for training: the same three functions as mechicl.training.sweeps.work, quick, with mishaps that a test asks for by field."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mechicl.errors import OptionError

FIELDS: dict[str, Any] = {"lr": 0.1, "steps": 3, "wait": 0.0, "mishap": "", "at": "", "start": None, "early_fusion": False}
TASK: dict[str, Any] = {"K": 64, "alpha": 0.0}


def resolve(preset: str, changes: Mapping[str, Any], seed: int) -> dict[str, Any]:
    if preset not in ("cpu", "modern"):
        raise OptionError(f"preset must be cpu or modern; got {preset!r}.")
    unknown = [name for name in changes if name not in FIELDS and name not in TASK]
    if unknown:
        raise OptionError(f"a field must be known; got {unknown[0]!r}.")
    task = {name: changes.get(name, value) for name, value in TASK.items()}
    lr = 0.2 if preset == "modern" else FIELDS["lr"]
    return {name: changes.get(name, lr if name == "lr" else value) for name, value in FIELDS.items()} | {"task": task, "seed": seed}


def alike(recipe: Mapping[str, Any]) -> str:
    return f"{recipe['steps']} {recipe['mishap']}"


def train(
    recipes: Sequence[Mapping[str, Any]], *, device: str | None = None, out: Sequence[str] | None = None, progress: bool = False
) -> list[pd.DataFrame]:
    tables = []
    for recipe in recipes:
        print("a line that a library writes to stdout")  # noqa: T201
        time.sleep(recipe["wait"])
        note(recipe)
        if out is not None:
            Path(out[len(tables)]).mkdir(parents=True, exist_ok=True)
        bad = recipe["task"]["K"] == 13
        if bad and recipe["mishap"] == "error":
            raise RuntimeError("thirteen")
        if recipe["mishap"] == "kill" and bad:
            os.kill(os.getpid(), signal.SIGKILL)
        if recipe["mishap"] == "kill once" and bad and not (Path(recipe["at"]) / "killed").exists():
            (Path(recipe["at"]) / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        steps = list(range(recipe["steps"]))
        value = [recipe["task"]["K"] * recipe["lr"] + recipe["seed"] + step for step in steps]
        loss = [float("nan") if bad and recipe["mishap"] == "nan" and step else 1.0 / (1 + step) for step in steps]
        measured = {"step": steps, "loss": loss, "accuracy_ic": value}
        if recipe["task"]["K"] > 100:
            measured["ih_1.0"] = value
        tables.append(pd.DataFrame(measured))
    return tables


def note(recipe: Mapping[str, Any]) -> None:
    """A line for every cell begun, where the test asked for it."""
    if recipe["at"]:
        with (Path(recipe["at"]) / "begun.txt").open("a") as file:
            file.write(f"{recipe['task']['K']} {recipe['seed']}" + (f" from {recipe['start']}\n" if recipe["start"] else "\n"))
