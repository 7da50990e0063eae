"""Every notebook runs from top to bottom, keeps to the house rules, and says what its title asks."""

import importlib
import os
import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient

from mechicl.training.sweeps.cells import axis_names, cells, read_spec
from mechicl.training.sweeps.work import resolve

ROOT = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(ROOT.glob("*.ipynb"))


def test_there_is_a_notebook() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    code = "".join(cell.source for cell in book.cells)
    missing = [name for name in re.findall(r"0\d_\w+(?=\.parquet)", code) if not (ROOT / "results" / f"{name}.parquet").exists()]
    assert not missing, f"run its sweep first: notebooks/sweeps/{missing[0]}.toml"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MECHICL_FIGURES": str(tmp_path)}
    client = NotebookClient(book, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    client.execute(env=environment)
    assert list(tmp_path.iterdir()), "a notebook writes its figures where MECHICL_FIGURES says"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_short_and_plain(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    assert len(book.cells) <= 25
    for cell in book.cells:
        if cell.cell_type == "code":
            assert cell.source.count("\n") < 12
            assert "def " not in cell.source
            assert not any(line.startswith(("!", "%pip")) for line in cell.source.splitlines())
    assert any("assert" in cell.source for cell in book.cells if cell.cell_type == "code")


def test_notebooks_are_what_their_program_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "make"))
    books = importlib.import_module("notebooks").books()
    assert set(books) == {path.stem for path in NOTEBOOKS} - {"01_find_the_induction_heads_of_a_vlm"}
    for name, book in books.items():
        assert nbformat.writes(book) == nbformat.writes(nbformat.read(ROOT / f"{name}.ipynb", as_version=4))


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if (ROOT / "results" / f"{p.stem}.parquet").exists()], ids=lambda p: p.stem)
def test_a_claim_has_a_sweep_and_a_verdict_that_is_computed(path: Path) -> None:
    code = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    assert "claims.claim(" in code
    assert "claims.verdict_table(found)" in code
    for word in ("holds", "does not hold", "not shown"):
        assert f'"{word}"' not in code
    spec = read_spec(ROOT / "sweeps" / f"{path.stem}.toml")
    cells_of = cells(spec, resolve)
    assert cells_of
    assert "cpu preset" in spec.about


CONTROLS = {
    "08": ("random_high", "control_accuracy", ".agreement", "completeness", "overlap.chance"),
    "09": ("random_high", "control_accuracy", ".agreement", "completeness", "overlap.chance"),
    "11": ("random_margin_change", "p_margin", "ablated_random", "as many random heads"),
    "12": ("random_change", "excluded", "result.passing", "overlap.expected", "row.random_low"),
    "13": ("n_random=20", "random_mean"),
    "10": ("examples minus filler", "least similar", "held_out_gain", '"control_low"', "table.verdict"),
}


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem[:2] in CONTROLS], ids=lambda p: p.stem)
def test_a_cause_is_shown_with_its_controls(path: Path) -> None:
    code = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    for control in CONTROLS[path.stem[:2]]:
        assert control in code


TABLES = sorted((ROOT / "results").glob("*.parquet"))
SWEPT = [path for path in TABLES if (ROOT / "sweeps" / f"{path.stem}.toml").exists()]


def test_every_table_has_its_spec_or_its_script() -> None:
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT.parent / "benchmarks").glob("*.py"))
    assert [path.stem for path in TABLES if path not in SWEPT and path.stem.split("_")[0] + "_" not in scripts] == []


@pytest.mark.parametrize("path", SWEPT, ids=lambda p: p.stem)
def test_results_are_those_of_the_spec(path: Path) -> None:
    """Every setting and seed that the spec asks for. (Not compared by the cells' names, which are new ones whenever a recipe gets another field.)"""
    spec = read_spec(ROOT / "sweeps" / f"{path.stem}.toml")
    asked, table = cells(spec, resolve), pd.read_parquet(path)
    names = [name for name in axis_names(spec) if name in table.columns]
    runs = table.drop_duplicates("cell")
    found = [[plain(x) for x in row] for row in runs[["seed", *names]].itertuples(index=False)]
    assert sorted(found) == sorted([plain(x) for x in (cell.seed, *(cell.value(name) for name in names))] for cell in asked)


def plain(value: object) -> str:
    """A setting as text, whatever type the table's column has (whole numbers with gaps come back as floats)."""
    if isinstance(value, bool | np.bool_) or value is None or isinstance(value, str):
        return str(value)
    number = float(value)  # type: ignore[arg-type]
    return str(None) if np.isnan(number) else f"{number:g}"
