"""Every notebook runs from top to bottom, keeps to the house rules, and says what its title asks."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_is_a_notebook() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MECHICL_FIGURES": str(tmp_path)}
    client = NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
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
