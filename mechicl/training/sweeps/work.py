"""What a sweep's worker does: train a group of cells, and say for each how it ended. Run as a module, it takes groups from its driver until there are no more.

    driver -> worker   one JSON line a group: {"cells": [id, ...], "recipes": [...]}
    worker -> driver   one JSON line a cell: an `Outcome`, its table as Parquet in base64
A worker whose driver is gone stops at once: it reads the end of its input.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import importlib.metadata
import io
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from mechicl.errors import MechiclError, NotFiniteError

TRAINER = "mechicl.training.sweeps.work"
"""The module whose `resolve`, `alike` and `train` a sweep uses; this one trains toys."""

META = b"mechicl"
"""Where a Parquet file of a sweep says what it was made from."""

Kind = Literal["done", "diverged", "error", "lost"]


@dataclass(frozen=True)
class How:
    """What every group of a sweep is trained with. `models`: a folder in which each cell keeps its run (checkpoints, to go on from and to look into); None keeps none.
    `progress`: a bar of the steps on stderr."""

    trainer: str = TRAINER
    device: str | None = None
    models: str | None = None
    progress: bool = False


@dataclass(frozen=True, eq=False)
class Outcome:
    """How one cell ended: "done" with its table as Parquet bytes; "diverged" (a loss that is not a number), "error", "lost" (its worker died) with the reason."""

    cell: str
    kind: Kind
    table: bytes | None = None
    reason: str = ""
    detail: str = ""
    seconds: float = 0.0

    def to_line(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self) | {"table": None if self.table is None else base64.b64encode(self.table).decode()})

    @staticmethod
    def from_line(line: str) -> Outcome:
        """The outcome that `to_line` wrote."""
        data = json.loads(line)
        return Outcome(**data | {"table": None if data["table"] is None else base64.b64decode(data["table"])})


def resolve(preset: str, changes: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The whole recipe of a cell as JSON values, every setting of the model written out: a preset that changes later makes another recipe.

    Raises:
        OptionError: no such preset or field, a value out of range, or a model that cannot be built.
    """
    from mechicl.training.toys.build import DECIDED, config
    from mechicl.training.toys.recipe import recipe, set_fields

    given = {name: tuple(x) if isinstance(x, list) else x for name, x in changes.items()}
    # the seed comes first, so that a spec may hold the world (task.seed) fixed while the runs differ
    made = set_fields(recipe(preset, seed=seed), given)
    settled = replace(made, model={k: v for k, v in config(made).settings().items() if k not in DECIDED})
    assert config(settled) == config(made), "written out, the model must stay the same"
    return settled.to_json()


def alike(recipe: Mapping[str, Any]) -> str:
    """Equal for recipes that can be trained in one batched step."""
    from mechicl.training.toys.recipe import ToyRecipe, together_key

    return together_key(ToyRecipe.from_json(recipe))


def train(
    recipes: Sequence[Mapping[str, Any]], *, device: str | None = None, out: Sequence[str] | None = None, progress: bool = False
) -> list[pd.DataFrame]:
    """Train the recipes in one batched step and return their measurements, one row per measured step. Runs that lie in `out` are continued."""
    from mechicl.training.toys.recipe import ToyRecipe
    from mechicl.training.toys.train import train_many

    made = [ToyRecipe.from_json(one) for one in recipes]
    return [run.table for run in train_many(made, progress=progress, device=device, out=out, resume=out is not None)]


def work(how: How, cells: Sequence[str], recipes: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    """Train a group. When the group fails as a whole, each cell is tried alone, so that one bad cell does not take the others with it."""
    module = importlib.import_module(how.trainer)
    out = None if how.models is None else [os.path.join(how.models, cell) for cell in cells]
    start = time.perf_counter()
    try:
        tables = module.train(recipes, device=how.device, out=out, progress=how.progress)
    except Exception as error:
        if len(cells) == 1:
            return [_failure(cells[0], error, time.perf_counter() - start)]
        return [one for cell, recipe in zip(cells, recipes, strict=True) for one in work(how, [cell], [recipe])]
    seconds = (time.perf_counter() - start) / len(cells)
    return [_ending(cell, table, seconds) for cell, table in zip(cells, tables, strict=True)]


def _ending(cell: str, table: pd.DataFrame, seconds: float) -> Outcome:
    if not len(table):
        return Outcome(cell, "error", reason="the training measured nothing")
    if "loss" in table:
        # before the first step there may be no loss yet
        steps = table["step"].to_numpy()
        bad = steps[~np.isfinite(table["loss"].to_numpy()) & (steps > 0)]
        if len(bad):
            return Outcome(cell, "diverged", reason=f"the loss was not finite at step {bad[0]}", seconds=seconds)
    return Outcome(cell, "done", parquet_bytes(table, {"seconds": round(seconds, 3), "versions": versions()}), seconds=seconds)


def _failure(cell: str, error: Exception, seconds: float) -> Outcome:
    kind: Kind = "diverged" if isinstance(error, NotFiniteError | FloatingPointError) else "error"
    name = "" if isinstance(error, MechiclError) else f"{type(error).__name__}: "
    return Outcome(cell, kind, reason=f"{name}{error}", detail="".join(traceback.format_exception(error)), seconds=seconds)


def versions() -> dict[str, str]:
    """The code that a cell's numbers are made with."""
    return {name: importlib.metadata.version(name) for name in ("mechicl", "torch")}


def parquet_bytes(table: pd.DataFrame, about: Mapping[str, Any]) -> bytes:
    """A table as a Parquet file in memory, one row group: `step` as integers, every measure as float64, `about` as JSON in the file's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {name: "int64" if name == "step" else "float64" for name in table.columns}
    out = io.BytesIO()
    made = pa.Table.from_pandas(table.astype(kinds), preserve_index=False).replace_schema_metadata({META: json.dumps(about).encode()})
    pq.write_table(made, out, row_group_size=max(len(table), 1), write_page_checksum=True)
    return out.getvalue()


def serve(how: How, source: Iterable[str], sink: Any) -> None:
    """Take groups, line by line, and answer with their outcomes."""
    for line in source:
        job = json.loads(line)
        for outcome in work(how, job["cells"], job["recipes"]):
            sink.write(outcome.to_line() + "\n")
        sink.flush()


def _lines_or_leave() -> Iterable[str]:
    """The driver's lines, read beside the training: at their end, however it comes, the worker leaves at once."""
    import queue

    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            waiting.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield waiting.get()


def main() -> None:
    """A worker process of `mechicl.training.sweeps.sweep`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("how", type=json.loads)
    how = How(**parser.parse_args().how)
    # what libraries write to stdout must not mix with the outcomes
    sink = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(how, _lines_or_leave(), sink)


if __name__ == "__main__":
    main()
