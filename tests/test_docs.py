"""Every page of the documentation is true: its Python runs, and what it links is there."""

import ast
import contextlib
import importlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
ELSEWHERE = ("anchored", "attribution", "recipes", "sweeps", "toys")
"""Pages whose Python other tests run, with assertions of their own."""
LONG = ("adapt", "link_mechanism")
"""Pages whose Python trains for many minutes: no name in it may be unknown, to the page or to mechicl; tests/test_adapt_runs.py makes the same calls at a small scale."""


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p) and p.stem not in (*ELSEWHERE, *LONG)], ids=lambda p: p.stem)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / f"{page.stem}.py"  # nnsight reads the body of its `with` from a file
    source.write_text("\n".join(blocks(page)), encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(source.read_text(encoding="utf-8"), str(source), "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("name", LONG)
def test_long_python_uses_what_is_there(name: str, tmp_path: Path) -> None:
    page = blocks(ROOT / "docs" / f"{name}.md")
    assert page
    source = tmp_path / f"{name}.py"
    source.write_text("\n".join(page), encoding="utf-8")
    linted = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", str(source)], capture_output=True, text=True
    )
    assert linted.returncode == 0, linted.stdout
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mechicl"):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_what_a_page_links_is_there(page: Path) -> None:
    for target in re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
    for module in re.findall(r"(benchmarks\.\w+)", page.read_text(encoding="utf-8")):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
