"""What is installed: everything a user needs without the repository, nothing else, typed, and nothing that a newer Python took away."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import mechicl

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mechicl"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = (
    "mechicl/py.typed",
    "mechicl/assets/demo_vlm/config.json",
    "mechicl/assets/demo_vlm/model.safetensors",
    "mechicl/assets/demo_vlm/tokenizer.json",
    "mechicl/assets/demo_vlm/chat_template.jinja",
    "mechicl/views/templates/report.html.j2",
    "mechicl/views/templates/style.css",
    "mechicl/views/templates/script.js",
)
HEAVY = {
    "torch",
    "numpy",
    "pandas",
    "scipy",
    "PIL",
    "transformers",
    "plotly",
    "transformer_lens",
    "nnsight",
    "ray",
    "peft",
    "jinja2",
    "jaxtyping",
}
"""What `mechicl --help` has no time for."""
REMOVED = {
    "aifc", "asynchat", "asyncore", "audioop", "cgi", "cgitb", "chunk", "crypt", "distutils", "imghdr", "imp", "lib2to3", "mailcap", "msilib", "nis",
    "nntplib", "ossaudiodev", "pipes", "smtpd", "sndhdr", "spwd", "sunau", "telnetlib", "uu", "xdrlib",
}  # fmt: skip
"""Modules of the standard library that Python 3.12 and 3.13 took away."""
GONE = {
    "datetime": ("utcnow", "utcfromtimestamp"), "locale": ("resetlocale",), "unittest": ("makeSuite", "findTestCases"), "typing": ("io", "re", "ByteString"),
    "pathlib": ("link_to",), "ast": ("Num", "Str", "Bytes", "NameConstant", "Ellipsis"), "pkgutil": ("find_loader", "get_loader", "ImpImporter"),
}  # fmt: skip
"""Attributes that went with them, or that warn."""


def built(kind: str) -> set[str]:
    """Names that hatchling would put into the wheel or the sdist, without writing one."""
    builders = importlib.import_module("hatchling.builders." + kind)
    builder = {"wheel": "WheelBuilder", "sdist": "SdistBuilder"}[kind]
    return {file.distribution_path for file in getattr(builders, builder)(str(ROOT)).recurse_included_files()}


def test_the_wheel_has_every_module_and_asset_and_nothing_of_the_repository() -> None:
    names = built("wheel")
    assert set(NEEDED) <= names
    assert {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")} <= names
    assert {name.split("/")[0] for name in names} == {"mechicl"}
    assert not [name for name in names if name.endswith((".pyc", ".parquet", ".ipynb", ".pt", ".bin", ".pkl"))]


def test_the_sdist_has_what_the_wheel_is_made_of_and_no_runs() -> None:
    names = built("sdist")
    assert set(NEEDED) <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt"} <= names
    assert not [name for name in names if name.startswith(("runs/", "build/", "dist/", ".venv/"))]


def test_versions_agree_and_the_changelog_has_this_one() -> None:
    assert mechicl.__version__ == PROJECT["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", mechicl.__version__)
    assert f"\n## {mechicl.__version__}\n" in (ROOT / "docs" / "changelog.md").read_text(encoding="utf-8")
    assert PROJECT["requires-python"] == ">=3.11"


def test_nothing_is_used_that_a_newer_python_took_away() -> None:
    for path in (*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not {name.split(".")[0] for name in names} & REMOVED, path
                if isinstance(node, ast.ImportFrom) and node.module in GONE:
                    assert not {alias.name for alias in node.names} & set(GONE[node.module]), path
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.attr not in GONE.get(node.value.id, ()), f"{path}: {node.value.id}.{node.attr}"


def test_every_public_name_of_the_package_has_annotations() -> None:
    bare = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if node.returns is None or any(a.annotation is None for a in given):
                    bare.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert bare == []


def test_every_extra_installs_pinned_packages() -> None:
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()}
    wanted = [*PROJECT["dependencies"], *(name for extra in PROJECT["optional-dependencies"].values() for name in extra)]
    names = {re.split(r"[\[<>=,; ]", one)[0].lower() for one in wanted} - {"mechicl"}
    assert names <= pinned


def test_the_help_of_every_command_loads_nothing_heavy_and_explains_every_option() -> None:
    code = (
        "import sys, typer\nfrom typer.testing import CliRunner\nfrom mechicl.cli import app\n"
        "def walk(command, path):\n"
        "    result = CliRunner().invoke(app, [*path, '--help'])\n"
        "    assert result.exit_code == 0, (path, result.output)\n"
        "    assert (command.help or '').strip(), path\n"
        "    for one in command.params:\n"
        "        assert (getattr(one, 'help', '') or '').strip(), (path, one.name)\n"
        "    for name, inner in getattr(command, 'commands', {}).items():\n"
        "        walk(inner, [*path, name])\n"
        "walk(typer.main.get_command(app), [])\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_built_wheel_runs_without_the_repository(tmp_path: Path) -> None:
    """`python -m pytest -m slow tests/test_package.py`: a few minutes. A fresh environment that sees this one's packages, but not the repository."""
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "-o", str(tmp_path / "dist"), str(ROOT)], check=True, capture_output=True
    )
    wheel, sdist = next((tmp_path / "dist").glob("*.whl")), next((tmp_path / "dist").glob("*.tar.gz"))
    assert set(NEEDED) <= set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        assert set(NEEDED) <= {name.partition("/")[2] for name in archive.getnames()}
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "clean")], check=True)
    python = tmp_path / "clean" / "bin" / "python"
    packages = next((tmp_path / "clean" / "lib").glob("python3*/site-packages"))
    theirs = next(place for place in map(Path, sys.path) if (place / "torch").is_dir())
    (packages / "others.pth").write_text(f"{theirs}\n")  # a .pth inside that folder is not read, so an editable mechicl stays out
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    where = subprocess.run(
        [python, "-c", "import mechicl; print(mechicl.__file__)"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert Path(where.stdout.strip()).is_relative_to(tmp_path)
    command = [
        python.parent / "mechicl",
        "report",
        "-q",
        "--episodes",
        "16",
        "--size",
        "28",
        "--no-kv",
        "--no-trace",
        "--out",
        "report.html",
    ]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert "The in-context-learning circuit of demo" in (tmp_path / "report.html").read_text(encoding="utf-8")
