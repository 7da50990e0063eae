"""A sweep's folder: which cells were asked for, which are finished, which failed and why.

    sweep.json               the spec and every cell with its whole recipe
    cells/<cell>.parquet     one finished cell, one row group
    failed/<cell>.json       why a cell has no table
    results.parquet          every finished cell as one tidy table, one row group a cell
    models/<cell>/           the cell's run with its checkpoints, where they are kept
    logs/<worker>.log        what the workers said
Every file is written under a temporary name, flushed and renamed: a sweep killed at any moment leaves whole files only.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mechicl.data.folders import Hold, write_whole
from mechicl.errors import CheckpointError, OutputPathError
from mechicl.training.runs import read_json, short, write_text
from mechicl.training.sweeps.cells import Cell, Spec, axis_names
from mechicl.training.sweeps.table import open_table, write_results
from mechicl.training.sweeps.work import Outcome, versions

PLAN = "sweep.json"
RESULTS = "results.parquet"
OWN = (".lock", "cells", "failed", "logs", "models")
"""What a driver may leave that was killed before it wrote the plan."""


class Store:
    """The folder of one sweep, open for its only driver."""

    out: Path
    models: Path

    def __init__(self, out: str | os.PathLike[str], spec: Spec, cells: Sequence[Cell]) -> None:
        """Make the folder, or open a sweep's.

        Raises:
            OutputPathError: it cannot be written, or holds other files.
        """
        self.out = Path(out)
        self.spec = spec
        self.cells: dict[str, Cell] = {cell.id: cell for cell in cells}
        self.before = {cell.before.id: cell.before for cell in cells if cell.before is not None}
        self.models = self.out.absolute() / "models"
        self.names = axis_names(spec)
        try:
            if self.out.exists() and not (self.out / PLAN).exists() and any(path.name not in OWN for path in self.out.iterdir()):
                raise OutputPathError(
                    f"out must be a new or empty folder, or a sweep's; {self.out} holds other files. Choose another folder."
                )
            for part in ("cells", "failed", "logs"):
                (self.out / part).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputPathError(
                f"out must be a folder that can be written; got {self.out} ({error.strerror}). Choose another place."
            ) from error

    def begin(self) -> None:
        """Write down what is asked for. The folder may hold the same sweep or a smaller one.

        Raises:
            CheckpointError: it holds finished cells that are not asked for, or a damaged file.
        """
        if (self.out / PLAN).exists():
            self._agree(read_json(self.out / PLAN))
        for cell in finished(self.out):
            open_table(self.out / "cells" / f"{cell}.parquet").close()
        plan = {
            "spec": asdict(self.spec),
            "columns": self.names,
            "versions": versions(),
            "before": {name: _written(cell) for name, cell in self.before.items()},
            "cells": {name: _written(cell) for name, cell in self.cells.items()},
        }
        write_text(self.out / PLAN, json.dumps(plan, indent=1) + "\n")

    def _agree(self, found: Mapping[str, Any]) -> None:
        """What is finished must be asked for again; more may be asked for."""
        gone = [cell for cell in finished(self.out) if cell not in self.cells and cell not in self.before]
        if not gone:
            return
        old = {cell: as_cell(cell, data) for cell, data in (found.get("before", {}) | found["cells"]).items()}
        example = old[gone[0]].describe(found["columns"]) if gone[0] in old else gone[0]
        why = _difference(old[gone[0]], self.cells.values()) if gone[0] in old else ""
        raise CheckpointError(
            f"spec must still ask for the cells that are finished in {self.out}; {len(gone)} of them it does not, e.g. {example}{why}. "
            "Cells may be added; for another sweep use another folder."
        )

    def missing(self, asked: Mapping[str, Cell]) -> list[Cell]:
        """Those of `cells` or `before` without a result, in the spec's order. A training that diverged is a result; one that failed otherwise is tried again."""
        done = set(finished(self.out))
        done |= {path.stem for path in (self.out / "failed").glob("*.json") if read_json(path)["kind"] == "diverged"}
        return [cell for cell in asked.values() if cell.id not in done]

    def describe(self, cell: str) -> str:
        """A cell's settings in words."""
        if cell in self.cells:
            return self.cells[cell].describe(self.names)
        return "before: " + self.before[cell].describe(list(self.before[cell].fields))

    def write(self, outcome: Outcome) -> None:
        """Keep how a cell ended.

        Raises:
            OutputPathError: the disk is full or gone.
        """
        failed = self.out / "failed" / f"{outcome.cell}.json"
        try:
            if outcome.table is not None:
                write_whole(self.out / "cells" / f"{outcome.cell}.parquet", outcome.table)
                failed.unlink(missing_ok=True)
            else:
                about = {"kind": outcome.kind, "reason": outcome.reason, "cell": self.describe(outcome.cell), "detail": outcome.detail}
                write_text(failed, json.dumps(about, indent=1) + "\n")
        except OSError as error:
            raise OutputPathError(
                f"out must have room for the results; writing in {self.out} failed ({error.strerror}). Make room and run the same command again: finished cells are kept."
            ) from error

    def failures(self) -> dict[str, str]:
        """Cell -> why it has no table."""
        found = {path.stem: read_json(path) for path in sorted((self.out / "failed").glob("*.json"))}
        return {cell: f"{data['cell']}: {data['reason']}" for cell, data in found.items() if cell in self.cells or cell in self.before}

    def assemble(self) -> None:
        """Write the results table from the finished cells, if there are any."""
        done = set(finished(self.out))
        order = [cell for cell in self.cells.values() if cell.id in done]
        if order:
            about = asdict(self.spec) | {"cells": len(self.cells)}
            write_results(self.out / RESULTS, order, self.names, self.out / "cells", about)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder for this driver; a lock ends with its process, however that ends.

        Raises:
            OutputPathError: another driver is at work in it.
        """
        lock = self.out / ".lock"  # the plan is written later, and again when the sweep grows
        lock.touch()
        with Hold(lock, "sweep"):
            yield


def _written(cell: Cell) -> dict[str, Any]:
    """A cell for sweep.json."""
    return {"preset": cell.preset, "seed": cell.seed, "fields": cell.fields, "labels": cell.labels, "recipe": cell.recipe}


def finished(out: Path) -> list[str]:
    """Cells with a whole table in the folder."""
    return sorted(path.stem for path in (out / "cells").glob("*.parquet"))


def as_cell(name: str, data: Mapping[str, Any]) -> Cell:
    """A cell of sweep.json."""
    return Cell(name, data["preset"], data["seed"], data["fields"], data["recipe"], data["labels"])


def _difference(old: Cell, cells: Any) -> str:
    """Where the same fields now give another recipe: which setting changed, e.g. a preset's."""
    for cell in cells:
        if (cell.preset, cell.seed, dict(cell.fields)) == (old.preset, old.seed, dict(old.fields)):
            before, now = _flat(old.recipe), _flat(cell.recipe)
            name = next(key for key in sorted({*before, *now}) if before.get(key) != now.get(key))
            return f" (its {name} was {short(before.get(name))}, now {short(now.get(name))})"
    return ""


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in recipe.items():
        out |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return out
