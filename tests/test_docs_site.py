"""The documentation's site: every page is in it once, the reference has every public name, and nothing is fetched from elsewhere.

The whole site, every warning an error: `python -m pytest -m slow tests/test_docs_site.py`, a minute.
"""

from __future__ import annotations

import ast
import html
import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import yaml
from mkdocs.config.defaults import MkDocsConfig

import mechicl

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SITE = DOCS / "site"
CONFIG = yaml.safe_load((SITE / "mkdocs.yml").read_text(encoding="utf-8"))


def load(name: str) -> Any:
    spec = spec_from_file_location(name, SITE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference() -> dict[str, str]:
    return load("reference").pages()


def test_every_page_is_in_the_navigation_once() -> None:
    config = MkDocsConfig()
    hook = load("reference")
    config.nav, config.watch = CONFIG["nav"][:-1], []  # a page that nobody has entered yet
    listed = [page for page in hook.addresses(hook.on_config(config).nav) if not page.startswith("reference/")]
    assert len(listed) == len(set(listed))
    assert set(listed) == {page.name for page in DOCS.glob("*.md")}
    assert "changelog.md" in listed


def test_the_site_asks_nobody_for_anything() -> None:
    assert CONFIG["theme"]["font"] is False
    assert CONFIG["strict"] is True
    assert "offline" in CONFIG["plugins"]
    text = "".join(path.read_text(encoding="utf-8") for path in SITE.rglob("*.*") if path.suffix in (".yml", ".js", ".css", ".py"))
    assert not re.search(r"https?://", text)


def test_the_reference_has_every_name_of_import_mechicl(reference: dict[str, str]) -> None:
    for name in mechicl.__all__:
        assert f"[`{name}`]" in reference["reference/index.md"], name


def test_the_reference_has_every_module_that_defines_something_public(reference: dict[str, str]) -> None:
    whole = "\n".join(reference.values())
    for path in (ROOT / "mechicl").rglob("*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        public = [n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_") and ast.get_docstring(n)]
        if public and not path.stem.startswith("_") and path.stem != "__init__":
            assert f"::: {'.'.join(path.relative_to(ROOT).with_suffix('').parts)}\n" in whole, path


def test_parameters_that_are_described_together_are_taken_apart() -> None:
    apart = load("docstrings").apart
    text = "Do it.\n\nArgs:\n    a, b: Two\n        lines.\n    c: One.\n\nReturns:\n    d, e: no parameters."
    assert apart(text) == "Do it.\n\nArgs:\n    b: see `a`.\n    a: Two\n        lines.\n    c: One.\n\nReturns:\n    d, e: no parameters."
    assert apart("No parameters.") == "No parameters."


@pytest.mark.slow
def test_the_whole_site_builds_without_a_warning_and_opens_from_disk(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "-f", str(SITE / "mkdocs.yml"), "-d", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(
            r"<(?:script|img|iframe)[^>]*\ssrc=\"?([^\s\">]+)|<link[^>]*\srel=\"?(?:stylesheet|preconnect|icon)\"?[^>]*\shref=\"?([^\s\">]+)",
            text,
        )
        for target in {one or other for one, other in fetched}:
            assert not target.startswith(("http", "//")), f"{page.name}: {target}"
            if page.name == "404.html":  # a server shows it at any depth, so its links begin at the root
                target = str(tmp_path) + target
            assert (page.parent / html.unescape(target)).exists(), f"{page.name}: {target}"
    assert (tmp_path / "search" / "search_index.js").is_file()
