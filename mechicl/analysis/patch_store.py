"""A sweep's folder: finished cells are kept as they come, so that a run killed at any moment goes on where it was.

    patch.json      what was asked for: model, pairs, options
    cells.jsonl     one line for each finished batch of cells: site, flat cell numbers, rows of the pairs, the metric of each
    cells.parquet   every cell with its value and interval, once all are finished
A line is written whole and flushed to the disk; one that a crash cut off is not read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from mechicl.errors import CheckpointError, OutputPathError
from mechicl.prompts.batch import Batch

PLAN, CELLS, TABLE = "patch.json", "cells.jsonl", "cells.parquet"


def fingerprint(*batches: Batch) -> str:
    """A digest of prompts: inputs (pictures included), spans and candidates."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch.inputs):
            value = batch.inputs[name]
            digest.update(name.encode())
            digest.update(_bytes(value) if isinstance(value, Tensor) else repr(value).encode())
        digest.update(repr((batch.spans, batch.answers, batch.candidates, batch.candidate_ids)).encode())
    return digest.hexdigest()


def weights(model: Any, *, n: int = 256) -> str:
    """A digest of a model's weights: of each parameter its name, its shape and `n` values spread over it."""
    digest = hashlib.sha256()
    module = getattr(model, "hf", model)
    if isinstance(module, nn.Module):
        for name, value in sorted(module.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            flat = value.reshape(-1)
            where = torch.linspace(0, len(flat) - 1, min(n, len(flat)), device=flat.device).long()
            digest.update(_bytes(flat[where]))
    return digest.hexdigest()


def _bytes(value: Tensor) -> bytes:
    value = value.detach().cpu().contiguous()
    return value.view(torch.uint8).numpy().tobytes() if value.numel() and value.dim() else repr(value.tolist()).encode()


class Store:
    """The folder of one sweep.

    Args:
        out: The folder; made if it is not there.
        asked: What was asked for, as JSON values.

    Raises:
        CheckpointError: the folder holds another sweep (names what differs), or its plan cannot be read.
        OutputPathError: it cannot be written, or holds other files.
    """

    def __init__(self, out: str | os.PathLike[str], asked: Mapping[str, Any]) -> None:
        self.out = Path(out)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if (self.out / PLAN).exists():
                self._agree(asked)
            elif any(self.out.iterdir()):
                raise OutputPathError(
                    f"out must be a new or empty folder, or this sweep's; {self.out} holds other files. Choose another folder."
                )
            else:
                _replace(self.out / PLAN, (json.dumps(asked, indent=1) + "\n").encode())
        except OSError as error:
            raise _unwritable(self.out, error) from error

    def _agree(self, asked: Mapping[str, Any]) -> None:
        path = self.out / PLAN
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{PLAN} must be readable JSON; {path} is not ({error}). Use another folder.") from error
        now = json.loads(json.dumps(asked))
        changed = [name for name in sorted({*found, *now}) if found.get(name) != now.get(name)]
        if changed:
            before, after = json.dumps(found.get(changed[0])), json.dumps(now.get(changed[0]))
            others = f" (also changed: {', '.join(changed[1:])})" if len(changed) > 1 else ""
            raise CheckpointError(
                f"out must hold the same sweep; in {self.out} {changed[0]} was {before[:60]}, now {after[:60]}{others}. "
                "Ask for the same, or use another folder."
            )

    def load(self, raw: Mapping[str, np.ndarray]) -> int:
        """Fill arrays [batch, *axes] with the cells that are finished; returns how many numbers were read."""
        path, count = self.out / CELLS, 0
        if not path.exists():
            return 0
        text = path.read_bytes()
        end = text.rfind(b"\n") + 1  # what follows the last line end was cut off
        if end < len(text):
            _replace(path, text[:end])
        for number, line in enumerate(text[:end].splitlines()):
            try:
                found = json.loads(line)
                array = raw[found["site"]]
                flat = array.reshape(len(array), -1)
                values = np.array(found["values"], dtype=np.float64)
                flat[np.ix_(found["rows"], found["cells"])] = values
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise CheckpointError(
                    f"{CELLS} must hold finished cells; line {number + 1} of {path} does not ({error}). Delete the file."
                ) from error
            count += values.size
        return count

    def add(self, site: str, cells: Sequence[int], rows: Sequence[int], values: np.ndarray) -> None:
        """Keep finished cells: values [row, cell], flat cell numbers.

        Raises:
            OutputPathError: the disk is full or gone.
        """
        line = json.dumps({"site": site, "cells": list(cells), "rows": list(rows), "values": values.tolist()})
        try:
            with (self.out / CELLS).open("ab") as file:
                file.write(line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unwritable(self.out, error) from error

    def finish(self, table: pd.DataFrame) -> None:
        """Write the table of all cells."""
        path = self.out / TABLE
        try:
            temporary = path.with_name(TABLE + ".part")
            table.to_parquet(temporary, index=False)
            temporary.replace(path)
        except OSError as error:
            raise _unwritable(self.out, error) from error


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _unwritable(out: Path, error: OSError) -> OutputPathError:
    return OutputPathError(
        f"out must be a folder that can be written; got {out} ({error.strerror or error}). Make room or choose another place: finished cells are kept."
    )
