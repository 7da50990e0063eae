"""The results of a sweep as one tidy table: a row per cell and measured step, a row group per cell, Parquet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mechicl.data.folders import whole_file
from mechicl.errors import CheckpointError
from mechicl.training.sweeps.cells import Cell
from mechicl.training.sweeps.work import META

if TYPE_CHECKING:
    import pyarrow as pa


def write_results(target: Path, cells: Sequence[Cell], names: Sequence[str], folder: Path, spec: Mapping[str, Any]) -> None:
    """Put finished cells together. Written under a temporary name, then renamed.

    Args:
        cells: In the order of the table.
        names: The settings that become columns.
        folder: Where the cells' own tables lie, <id>.parquet.
        spec: What the sweep was asked for; goes into the table's metadata with versions and the seconds that the cells took.

    Raises:
        CheckpointError: a cell's table is damaged, or a setting is called as a measure is.
        OutputPathError: see `whole_file`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = {cell.id: read_table(folder / f"{cell.id}.parquet") for cell in cells}
    measures = dict.fromkeys(name for table in tables.values() for name in table.column_names if name != "step")
    kinds: dict[str, Any] = {"cell": pa.string(), "preset": pa.string(), "seed": pa.int64()}
    kinds |= {name: _kind([cell.value(name) for cell in cells]) for name in names} | {"step": pa.int64()}
    clash = sorted(set(kinds) & set(measures))
    if clash:
        raise CheckpointError(
            f"a setting must not be called as a measure is; got {clash[0]!r}. Give the fields that change together another name."
        )
    about = [_about(table) for table in tables.values()]
    made = {"spec": spec, "finished": len(cells), "seconds": round(sum(one.get("seconds", 0.0) for one in about), 1)}
    made["versions"] = sorted({f"{name} {version}" for one in about for name, version in one.get("versions", {}).items()})
    schema = pa.schema([*kinds.items(), *((name, pa.float64()) for name in measures)], metadata={META: json.dumps(made).encode()})
    with whole_file(target) as path, pq.ParquetWriter(path, schema) as writer:
        for cell in cells:
            table = _with_settings(cell, names, tables[cell.id], schema)
            writer.write_table(table, row_group_size=max(table.num_rows, 1))


def _with_settings(cell: Cell, names: Sequence[str], table: pa.Table, schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    n = table.num_rows
    fixed = {"cell": cell.id, "preset": cell.preset, "seed": cell.seed} | {name: cell.value(name) for name in names}
    columns = []
    for column in schema:
        if column.name in fixed:
            columns.append(pa.array([_plain(fixed[column.name], column.type)] * n, column.type))
        else:
            columns.append(table[column.name] if column.name in table.column_names else pa.nulls(n, column.type))
    return pa.table(columns, schema=schema)


def read_results(path: Path) -> pd.DataFrame:
    """A results table; what it was made from is in `attrs["sweep"]`.

    Raises:
        CheckpointError: it is not there or cannot be read.
    """
    table = read_table(path)
    frame = table.to_pandas()
    frame.attrs["sweep"] = _about(table)
    return frame


def read_table(path: Path) -> pa.Table:
    """A Parquet file, whole.

    Raises:
        CheckpointError: it is not there or damaged.
    """
    import pyarrow as pa

    try:
        with open_table(path) as file:
            return file.read()
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error


def open_table(path: Path) -> Any:
    """A Parquet file of which only the end is read, where its contents are listed: that of a cut-off file is missing.

    Raises:
        CheckpointError: it is not there or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path.name} must be a whole Parquet file; {path} is not ({str(error).splitlines()[0]}). Delete it and run the sweep again."
    )


def _about(table: pa.Table) -> dict[str, Any]:
    return json.loads((table.schema.metadata or {}).get(META, b"{}"))


def _kind(values: Sequence[Any]) -> Any:
    """The Parquet type that holds every value of a setting."""
    import pyarrow as pa

    types = {type(value) for value in values if value is not None}
    for held, kind in (({bool}, pa.bool_()), ({int}, pa.int64()), ({int, float}, pa.float64())):
        if types and types <= held:
            return kind
    return pa.string()


def _plain(value: Any, kind: Any) -> Any:
    if value is None or str(kind) != "string":
        return float(value) if value is not None and str(kind) == "double" else value
    return value if isinstance(value, str) else json.dumps(value)
