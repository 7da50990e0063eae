"""Is a table of your own pictures and labels whole? Every row and every picture is looked at before anything is computed with them."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mechicl.data.folders import within
from mechicl.data.memes_check import MAX_PIXELS, Problem, open_picture, problem_lines
from mechicl.errors import ImageError, OptionError

if TYPE_CHECKING:
    import pandas as pd

IMAGE_COLUMNS = ("image", "img", "picture", "file", "file_name", "filename", "image_name", "image_path", "path")
LABEL_COLUMNS = ("label", "class", "category", "name", "answer", "target")
"""Looked for, in this order and in any case, where a column is not named."""
ENDINGS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class TableReport:
    """What a table holds, before anything is computed with it.

    Attributes:
        columns: Of the pictures and of the labels.
        classes: For each label its usable pictures: files, or pictures in memory.
        problems: Rows that cannot be used. Kinds: "malformed", "escapes", "missing", "broken", "repeat" (the same picture again, with this or another label), "few".
    """

    source: str
    columns: tuple[str, str]
    classes: Mapping[str, tuple[Path | Image.Image, ...]]
    problems: tuple[Problem, ...]

    def __str__(self) -> str:
        counts = [len(images) for images in self.classes.values()]
        many = f"{min(counts, default=0)} to {max(counts, default=0)}"
        lines = [
            f"{self.source}: pictures in {self.columns[0]!r}, labels in {self.columns[1]!r}; {len(self.classes)} classes, {many} pictures each, "
            f"{len(self.problems)} problems."
        ]
        return "\n".join([*lines, *problem_lines(self.problems)])


def check_table(source: str | Path | pd.DataFrame, *, image: str | None = None, label: str | None = None, images: str | Path | None = None,
                names: Mapping[Any, str] | Sequence[str] | None = None, size: int | None = None, least: int = 2,
                max_pixels: int = MAX_PIXELS) -> TableReport:  # fmt: skip
    """Look at every row and unpack every picture once; files are not kept, pictures that the table itself holds are. See `load_table`."""
    if least < 1 or (size is not None and size < 8):
        raise OptionError(f"least must be at least 1 and size at least 8 pixels; got {least} and {size}. Correct them.")
    frame = read_table(source) if isinstance(source, str | Path) else source
    title = Path(source).name if isinstance(source, str | Path) else "table"
    beside = Path(source).expanduser().parent if isinstance(source, str | Path) else Path()
    home = beside if images is None else Path(images).expanduser()
    columns = (_column(frame, image, IMAGE_COLUMNS, "image"), _column(frame, label, LABEL_COLUMNS, "label"))
    classes: dict[str, list[Path | Image.Image]] = {}
    seen: dict[str, tuple[int, str]] = {}
    problems: list[Problem] = []
    for number, (cell, value) in enumerate(zip(frame[columns[0]], frame[columns[1]], strict=True), 1):
        try:
            name = _label(value, names)
            picture, digest = _picture(cell, home, size, max_pixels)
        except _Bad as bad:
            problems.append(Problem(bad.kind, f"{title} row {number}", str(bad)))
            continue
        if digest in seen:
            first, other = seen[digest]
            more = "" if other == name else f", there as {other!r} and here as {name!r}"
            problems.append(Problem("repeat", f"{title} row {number}", f"the picture of row {first}{more}"))
            continue
        seen[digest] = (number, name)
        classes.setdefault(name, []).append(picture)
    for name in [name for name, found in classes.items() if len(found) < least]:
        problems.append(Problem("few", name, f"{len(classes.pop(name))} usable pictures where at least {least} are needed"))
    return TableReport(title, columns, {name: tuple(found) for name, found in sorted(classes.items())}, tuple(problems))


def read_table(path: str | Path) -> pd.DataFrame:
    """A table's file; every value of CSV files stays text.

    Raises:
        OptionError: no such file, another ending, or it cannot be read.
    """
    import pandas as pd

    file = Path(path).expanduser()
    if file.suffix.lower() not in ENDINGS or not file.is_file():
        raise OptionError(
            f"a table must be a file that ends in {', '.join(ENDINGS)}; got {str(path)!r}. Check the path; a folder needs a folder for each class."
        )
    try:
        match file.suffix.lower():
            case ".csv" | ".tsv":
                return pd.read_csv(file, sep="\t" if file.suffix.lower() == ".tsv" else ",", dtype=str)
            case ".parquet":
                return pd.read_parquet(file)
            case ending:
                text = file.read_text(encoding="utf-8")
                rows = [json.loads(line) for line in text.splitlines() if line.strip()] if ending == ".jsonl" else json.loads(text)
                return pd.DataFrame(rows)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise OptionError(f"a table must be readable; {file.name} is not ({type(error).__name__}: {error}). Check the file.") from error


def _column(frame: pd.DataFrame, given: str | None, usual: Sequence[str], what: str) -> str:
    there = [str(name) for name in frame.columns]
    if given is not None:
        if given not in there:
            raise OptionError(f"{what} must be a column of the table; got {given!r}. It has {', '.join(there)}.")
        return given
    lower = {name.lower(): name for name in reversed(there)}
    found = next((lower[name] for name in usual if name in lower), None)
    if found is None:
        raise OptionError(
            f"{what} must name the column of the {what}s; none of {', '.join(there)} is called {', '.join(usual[:3])} or the like. Pass {what}=."
        )
    return found


class _Bad(Exception):
    """A row that cannot be used."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind


def _label(value: Any, names: Mapping[Any, str] | Sequence[str] | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise _Bad("malformed", "it has no label")
    if isinstance(value, float | np.floating) and float(value).is_integer():  # whole numbers of a column with gaps
        value = int(value)
    if names is not None:
        key = value.item() if isinstance(value, np.generic) else value
        table = names if isinstance(names, Mapping) else {**dict(enumerate(names)), **{str(k): name for k, name in enumerate(names)}}
        if key not in table and str(key) not in table:
            raise _Bad("malformed", f"names has nothing for label {value!r}")
        value = table.get(key, table.get(str(key)))
    text = str(value).strip()
    if not text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _Bad("malformed", f"a label must be words; got {value!r}")
    return text


def _picture(cell: Any, home: Path, size: int | None, max_pixels: int) -> tuple[Path | Image.Image, str]:
    """A readable file, or a picture in memory; and what tells it from others."""
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") or cell.get("path")
    try:
        if isinstance(cell, Image.Image):
            shown = cell.convert("RGB")
            return _shrunk(shown, size), hashlib.sha256(repr(shown.size).encode() + shown.tobytes()).hexdigest()
        if isinstance(cell, bytes | bytearray):
            return open_picture(io.BytesIO(cell), max_pixels=max_pixels, size=size), hashlib.sha256(cell).hexdigest()
        if not isinstance(cell, str) or not cell.strip():
            raise _Bad("malformed", f"a picture must be a file name, a PIL picture or bytes; got {type(cell).__name__}")
        path = _inside(home, cell)
        open_picture(path, max_pixels=max_pixels)
        with open(path, "rb") as file:
            return path, hashlib.file_digest(file, "sha256").hexdigest()
    except (ImageError, OSError) as error:
        raise _Bad("broken", f"the picture cannot be used ({error})") from error


def _inside(home: Path, name: str) -> Path:
    """The file of a name; a whole path counts where it lies in the folder."""
    root = home.resolve()
    given = Path(name)
    relative = str(given.relative_to(root)) if given.is_absolute() and given.is_relative_to(root) else name
    path = within(root, relative)
    if path is None:
        raise _Bad("escapes", f"picture {name!r} leads out of {home}; say where pictures lie with images=")
    if not path.is_file():
        raise _Bad("missing", f"picture {name} is not there" + (" (nothing is fetched from addresses)" if "://" in name else ""))
    return path


def _shrunk(picture: Image.Image, size: int | None) -> Image.Image:
    if size is not None:
        picture = picture.copy()
        picture.thumbnail((size, size))
    return picture
