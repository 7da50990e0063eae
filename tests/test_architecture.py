"""The floors of the house: imports go down only, heavy packages have one owner, and importing mechicl is cheap."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "mechicl"

FLOORS = {
    "errors": 0, "axes": 0, "results": 0,
    "data": 1, "prompts": 1,
    "models": 2,
    "analysis": 3, "training": 3,
    "views": 4,
    "studies": 5,
    "cli": 6,
}  # fmt: skip

OWNERS = {
    "transformer_lens": {"models/hooked.py"},
    "nnsight": {"models/trace.py"},
    "plotly": {"views/plots.py"},
    "circuitsvis": {"views/attention.py"},
    "jinja2": {"views/page.py"},
    "sklearn": {"data/digits.py", "analysis/trainings/trends.py"},
    "ruptures": {"analysis/trainings/change_points.py"},
    "statsmodels": {"analysis/shift/mixed_effects.py", "analysis/statistics.py"},
    "typer": {str(p.relative_to(ROOT)) for p in ROOT.glob("cli/*.py")},
    "ray": {"analysis/spread/ray_hands.py", "training/sweeps/ray_cluster.py"},
    "peft": {"models/adapters.py"},
    "accelerate": {"training/adapting/loop.py"},
}
TRANSFORMERS = ("models/", "prompts/render.py", "prompts/patches.py", "training/")


def modules() -> list[Path]:
    return sorted(p for p in ROOT.rglob("*.py"))


def imports(path: Path) -> list[str]:
    """Every module that a file imports at run time, inside functions too (TYPE_CHECKING blocks left out)."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(x) for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) for x in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found += [node.module] if node.module != "mechicl" else [f"mechicl.{alias.name}" for alias in node.names]
    return found


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for name in imports(path):
        if name.startswith("mechicl.") and room(name) in FLOORS:  # not `from mechicl import __version__`
            assert FLOORS[room(name)] <= FLOORS[own], f"{own} (floor {FLOORS[own]}) imports {name} (floor {FLOORS[room(name)]})"


@pytest.mark.parametrize("package", sorted(OWNERS))
def test_a_heavy_package_has_one_owner(package: str) -> None:
    users = {str(p.relative_to(ROOT)) for p in modules() if any(i.split(".")[0] == package for i in imports(p))}
    assert users <= OWNERS[package]


def test_transformers_stays_on_its_floors() -> None:
    users = [str(p.relative_to(ROOT)) for p in modules() if any(i.split(".")[0] == "transformers" for i in imports(p))]
    assert [u for u in users if not u.startswith(TRANSFORMERS)] == []


def test_every_room_is_on_a_floor() -> None:
    rooms = {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in modules()} - {"__init__"}
    assert rooms <= set(FLOORS)


def test_importing_mechicl_loads_nothing_heavy() -> None:
    code = "import sys, mechicl; heavy = {'torch', 'transformers', 'transformer_lens', 'nnsight', 'plotly', 'circuitsvis', 'pandas'} & set(sys.modules); print(sorted(heavy))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_no_module_pickles_prints_or_calls_home() -> None:
    for path in modules():
        text = path.read_text()
        assert "torch.load(" not in text, path
        assert "import pickle" not in text, path
        assert "pickle=True" not in text, path
        assert "requests.get" not in text, path


def test_every_module_says_what_lives_there() -> None:
    silent = [str(p.relative_to(ROOT)) for p in modules() if p.stat().st_size and ast.get_docstring(ast.parse(p.read_text())) is None]
    assert silent == []


def test_the_readmes_map_shows_these_rooms_on_these_floors() -> None:
    """And every room of the analysis floor."""
    text = (ROOT.parent / "README.md").read_text(encoding="utf-8").split("## Map of the code")[1].split("```")[1]
    shown = dict(re.findall(r"^  (\w+)/ +(\d)  ", text, re.MULTILINE))
    shown |= dict.fromkeys(re.findall(r"(\w+)\.py", text), "0")
    assert {name: int(floor) for name, floor in shown.items()} == FLOORS
    (rooms,) = re.findall(r"analysis/ +3  rooms: (.*)", text)
    assert set(rooms.split(", ")) == {p.parent.name for p in ROOT.glob("analysis/*/__init__.py")}


def test_the_readmes_map_names_every_command() -> None:
    from typer.main import get_command

    from mechicl.cli import app

    text = (ROOT.parent / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"cli/ +6  mechicl (.*)", text)
    assert set(line.split(" | ")) == set(get_command(app).commands)  # type: ignore[attr-defined]
