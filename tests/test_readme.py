"""The README is true: its Python runs, its commands exist, its pictures and links are there."""

import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_python_blocks_run_and_print_a_real_result() -> None:
    space: dict[str, object] = {}
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), space)
    printed = out.getvalue()
    proof = space["proof"]
    assert str(proof.verdict) in printed  # type: ignore[attr-defined]
    assert proof.intact.accuracy.value > 0.9 > proof.chosen.accuracy.value  # type: ignore[attr-defined]


def test_the_first_python_block_is_short() -> None:
    assert len([line for line in blocks("python")[0].splitlines() if line.strip()]) <= 12


def test_make_targets_named_in_the_readme_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = re.findall(r"^make ([a-z]+)|`make ([a-z]+)`", TEXT, flags=re.MULTILINE)
    assert {a or b for a, b in named} <= set(targets)
    assert {"demo", "test"} <= {a or b for a, b in named}


def test_files_that_the_readme_links_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target


def test_rooms_on_the_map_are_the_rooms_of_the_architecture_test() -> None:
    from test_architecture import FLOORS

    block = next(b for b in re.findall(r"```text\n(.*?)```", TEXT, flags=re.DOTALL) if "mechicl/" in b)
    for name in FLOORS:
        assert re.search(rf"\b{name}(\.py|/)", block), name


def test_the_python_of_the_toys_page_runs() -> None:
    text = (ROOT / "docs" / "toys.md").read_text()
    space: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            exec(compile(block, "toys.md", "exec"), space)
    assert "accuracy_ic" in out.getvalue()
