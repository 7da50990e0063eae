"""A sweep's folder: finished cells are kept as they come, so that a run killed at any moment goes on where it was.

    patch.json      what was asked for: model, pairs, options
    cells.jsonl     one line for each finished batch of cells: site, flat cell numbers, rows of the pairs, the metric of each
    cells.parquet   every cell with its value and interval, once all are finished
A line is written whole and flushed to the disk; one that a crash cut off is not read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from mechicl.analysis.kept import KeptFolder
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


class Store(KeptFolder):
    """The folder of one sweep."""

    plan: str = PLAN
    lines: str = CELLS
    what: str = "sweep"
    finished: str = "cells"

    def load(self, raw: Mapping[str, np.ndarray]) -> int:
        """Fill arrays [batch, *axes] with the cells that are finished; returns how many numbers were read."""
        counts: list[int] = []

        def take(found: dict[str, Any]) -> None:
            array = raw[found["site"]]
            values = np.array(found["values"], dtype=np.float64)
            array.reshape(len(array), -1)[np.ix_(found["rows"], found["cells"])] = values
            counts.append(values.size)

        self.read_lines(take)
        return sum(counts)

    def add(self, site: str, cells: Sequence[int], rows: Sequence[int], values: np.ndarray) -> None:
        """Keep finished cells: values [row, cell], flat cell numbers."""
        self.add_line({"site": site, "cells": list(cells), "rows": list(rows), "values": values.tolist()})

    def finish(self, table: pd.DataFrame) -> None:
        """Write the table of all cells."""
        self.write_table(TABLE, table)
