"""A hook of MkDocs: reference pages from the docstrings, one a room, and the figures that pages show.

Public is what has no underscore: first the names of `import mechicl`, then every module's own, room by room from the top floor down.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PACKAGE, DOCS = ROOT / "mechicl", ROOT / "docs"
FLOORS = ("studies", "views", "analysis", "training", "models", "prompts", "data", "results", "cli")
"""Rooms in the order of the reference; single modules (errors, axes) come last."""


def public_modules(room: Path) -> list[str]:
    """Dotted names of a room's modules that define something public, in alphabetical order. Rooms inside it are not looked into."""
    return [
        name(path) for path in sorted(room.glob("*.py")) if path.stem != "__init__" and not path.stem.startswith("_") and _defines(path)
    ]


def rooms() -> Iterator[Path]:
    """Every folder of modules, floor by floor, each before the rooms inside it."""
    for floor in FLOORS:
        top = PACKAGE / floor
        if not top.is_dir():
            continue
        yield from (folder for folder in (top, *sorted(p for p in top.rglob("*") if p.is_dir())) if (folder / "__init__.py").exists())


def pages() -> dict[str, str]:
    """Every page of the reference: address -> Markdown."""
    found = {"reference/index.md": _names()}
    for room in rooms():
        modules = public_modules(room)
        if modules:
            about = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))) or ""
            body = "\n\n".join(
                f"## {module.removeprefix('mechicl.')}\n\n::: {module}\n    options:\n      show_root_heading: false" for module in modules
            )
            found[f"reference/{name(room).removeprefix('mechicl.').replace('.', '/')}.md"] = f"# {name(room)}\n\n{_text(about)}\n\n{body}\n"
    single = "\n\n".join(
        f"## {path.stem}\n\n::: {name(path)}\n    options:\n      show_root_heading: false" for path in sorted(PACKAGE.glob("[a-z]*.py"))
    )
    found["reference/single.md"] = f"# mechicl.errors, mechicl.axes\n\n{single}\n"
    return found


def name(path: Path) -> str:
    """The dotted name of a module or a room."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def addresses(nav: Any) -> Iterator[str]:
    """Every page that a navigation names."""
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from addresses(part)


def _names() -> str:
    """The names of `import mechicl` with what each is for, by the room that they come from."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    homes = next(
        ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES"
    )
    text = "# import mechicl\n\nThe names that `import mechicl` gives; each loads what it needs when it is first used.\n"
    for room in sorted({home.rpartition(".")[0] for home in homes.values()}):
        lines = [
            f"| [`{title}`][{home}.{title}] | {summary(home, title)} |"
            for title, home in sorted(homes.items())
            if home.rpartition(".")[0] == room
        ]
        text += f"\n## {room}\n\n| name | |\n| --- | --- |\n" + "\n".join(lines) + "\n"
    return text


def summary(module: str, title: str) -> str:
    """The first line of a name's docstring."""
    body = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")).body
    node = next(node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == title)
    return (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def _defines(path: Path) -> bool:
    kinds = (ast.FunctionDef, ast.ClassDef)
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(isinstance(node, kinds) and not node.name.startswith("_") and ast.get_docstring(node) for node in body)


def _text(docstring: str) -> str:
    """A docstring as Markdown: indented lines are code there anyway."""
    return docstring.replace("<", "&lt;")


# -- what MkDocs calls


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Pages that the navigation does not name, and the reference at its end."""
    assert config.nav is not None
    left = sorted({page.name for page in DOCS.glob("*.md")} - set(addresses(config.nav)))
    config.nav = [*config.nav, *([{"More": left}] if left else []), {"Reference": [*pages()]}]
    config.watch.append(str(PACKAGE))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the reference, and the figures that pages link outside docs/."""
    for address, text in pages().items():
        files.append(File.generated(config, address, content=text))
    shown = {figure for file in files.documentation_pages() if file.abs_src_path for figure in _figures(Path(file.abs_src_path))}
    for figure in sorted(shown):
        files.append(File.generated(config, f"figures/{figure}", abs_src_path=str(ROOT / "figures" / figure)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Figures are copied into the site; other links out of docs/ lead to files of the repository, which the site does not have."""
    markdown = re.sub(r"\]\(\.\./figures/", "](figures/", markdown)
    return re.sub(r"\[(`[^`\]]+`|[^\]]+)\]\(\.\./[^)]+\)", r"\1", markdown)


def _figures(page: Path) -> list[str]:
    return re.findall(r"\]\(\.\./figures/([^)]+)\)", page.read_text(encoding="utf-8"))
