"""What pages are made of: a figure with its words and its data, one HTML file that opens from disk with no network and escapes every word from data.

check_writable(path)                       # before any long work
write_page(path, PageContent(...))         # a few figures
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from mechicl.errors import OutputPathError
from mechicl.results import Provenance
from mechicl.views import captions, plots, story, tables, theme

LIMIT_BYTES = 12_000_000
"""A report is refused beyond this size; it never comes near with the limits of `attention` and `overlay`."""


@dataclass(frozen=True)
class Block:
    """A figure with its words and its data. `figure` is plotly's JSON, safe inside a script element; `csvs`: (link text, file name, data: address)."""

    id: str
    heading: str
    figure: Markup
    height: int
    words: captions.Words
    csvs: tuple[tuple[str, str, str], ...]
    table: tables.Table | None = None


def check_writable(path: str | Path) -> Path:
    """The path, if a file can be written there; nothing is left behind.

    Raises:
        OutputPathError: the folder is missing or read-only, the path is a folder, or an existing file may not be replaced.
    """
    target = Path(path).expanduser()
    if target.is_dir():
        raise OutputPathError(f"out must be a file; got the folder {target}. Add a file name, e.g. {target / 'report.html'}.")
    if not target.parent.is_dir():
        raise OutputPathError(f"out must lie in an existing folder; there is no folder {target.parent}. Create it, or write elsewhere.")
    if target.exists() and not os.access(target, os.W_OK):
        raise OutputPathError(
            f"out must be a file that may be replaced; {target} is read-only. Change its permissions, or write elsewhere."
        )
    try:
        handle, probe = tempfile.mkstemp(prefix=".mechicl-", dir=target.parent)
        os.close(handle)
        os.unlink(probe)
    except OSError as error:
        raise OutputPathError(
            f"out must be writable; a file cannot be created in {target.parent} ({error.strerror}). Change its permissions, or write elsewhere."
        ) from error
    return target


def write_html(path: str | Path, page: str) -> Path:
    """Write a page, first under a temporary name in the same folder, then renamed: a reader never sees half of it.

    Returns:
        Where it was written.

    Raises:
        OutputPathError: it cannot be written there, or it would be larger than `LIMIT_BYTES`.
    """
    target, whole = check_writable(path), page.encode("utf-8")
    if len(whole) > LIMIT_BYTES:
        raise OutputPathError(
            f"the page must be under {LIMIT_BYTES} bytes; got {len(whole)}. Draw fewer prompts (max_prompts), sites or positions, or smaller pictures."
        )
    try:
        handle, temporary = tempfile.mkstemp(prefix=".mechicl-", suffix=".html", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(whole)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        raise OutputPathError(
            f"out must be writable; writing {target} raised {error.strerror}. Free some space, or write elsewhere."
        ) from error
    return target


@dataclass(frozen=True, eq=False)
class PageContent:
    """A page of a few figures: what is said above them, the figures, how they were made, the line that makes them again, and words defined beside
    the common ones."""

    title: str
    told: tuple[str, ...]
    blocks: tuple[Block, ...]
    provenance: Provenance
    command: str = ""
    notes: tuple[str, ...] = ()
    definitions: tuple[tuple[str, str], ...] = ()


def write_page(path: str | Path, content: PageContent) -> Path:
    """Write the figures as one file that opens with no network. Errors: as `write_html`."""
    text = (
        environment()
        .get_template("page.html.j2")
        .render(
            title=content.title, told=content.told, blocks=content.blocks, provenance=provenance_rows(content.provenance), command=content.command, notes=content.notes,
            definitions=(*captions.DEFINITIONS, *content.definitions), style=Markup(static("style.css")), script=Markup(static("script.js")), plotly=Markup(plots.javascript()), themes=themes(),
        )
    )  # fmt: skip
    return write_html(path, text)


def provenance_rows(p: Provenance, *more: tuple[str, str]) -> list[tuple[str, str]]:
    """How the numbers were made, as rows of a table."""
    rows = [("model", p.model), ("revision", p.revision), ("dtype", p.dtype), ("attention", p.attention), ("device", p.device), ("task", p.task),
            ("seed", "" if p.seed is None else str(p.seed)), *more]  # fmt: skip
    rows += [(f"option {key}", str(value)) for key, value in sorted(p.options.items())]
    rows += [(f"version of {key}", str(value)) for key, value in sorted(p.versions.items())]
    return [(key, value) for key, value in rows if value]


def themes() -> Markup:
    """Both looks, for the page's script."""
    return json_script({"light": theme.template(), "dark": theme.template(dark=True), "scales": {
        "diverging": [theme.DIVERGING, theme.DIVERGING_DARK], "sequential": [theme.SEQUENTIAL, theme.SEQUENTIAL_DARK]}})  # fmt: skip


def csv_link(identifier: str, frame: pd.DataFrame, words: str = "Data as CSV") -> tuple[str, str, str]:
    """(link text, file name, data: address) of a table."""
    file = f"mechicl_{identifier}".replace("-", "_") + ("" if words == "Data as CSV" else "_" + words.replace(" ", "_"))
    return words, f"{file}.csv", tables.csv_uri(frame)


def block(
    identifier: str,
    heading: str,
    figure: Any,
    words: captions.Words,
    frame: pd.DataFrame,
    *,
    raw: pd.DataFrame | None = None,
    with_table: bool = True,
) -> Block:
    plain = plots.figure_json(figure)
    csvs = [csv_link(identifier, frame), *([csv_link(identifier, raw, "per prompt")] if raw is not None else [])]
    return Block(
        identifier, heading, json_script(plain), int(plain["layout"].get("height", 400)), words, tuple(csvs),
        tables.table(frame) if with_table else None,
    )  # fmt: skip


def json_script(value: Any) -> Markup:
    """JSON for a script element: nothing in it can end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return Markup(
        text.replace("&", "\\u0026")
        .replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )


def static(file: str) -> str:
    return (Path(__file__).parent / "templates" / file).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    found = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.filters["json_script"] = json_script
    found.filters["sentence"] = story.sentence
    found.filters["round"] = lambda x, digits=2: f"{x:.{digits}f}"
    return found
