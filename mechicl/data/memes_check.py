"""Is a folder of memes whole? Every line and every picture is looked at before anything is computed with them."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from mechicl.errors import ImageError

SPLITS = ("train", "dev", "test")
"""How the names of the lists begin."""
MAX_PIXELS = 40_000_000
"""Larger pictures are refused before they are unpacked."""
SHOWN = 8
"""Problems named in an error."""


@dataclass(frozen=True)
class Meme:
    """One line of a list. `label`: 1 for the positive class, 0, or None where it is kept back. `digest`: of the picture file's bytes."""

    id: str
    path: Path
    text: str
    label: int | None
    split: str
    digest: str


@dataclass(frozen=True)
class Problem:
    """A line that cannot be used. `kind`: "malformed", "escapes", "missing", "broken", "duplicate" or "folder"."""

    kind: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def problem_lines(problems: Sequence[Problem]) -> list[str]:
    """How many of each kind, then the first `SHOWN` of them: the end of a folder's report."""
    kinds = [f"- {kind}: {n}" for kind, n in sorted(Counter(problem.kind for problem in problems).items())]
    more = [f"- and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return [*kinds, *(f"- {problem}" for problem in problems[:SHOWN]), *more]


@dataclass(frozen=True)
class MemesReport:
    """What a folder holds, before anything is computed with it.

    Attributes:
        splits: For each list (by the file's name, without .jsonl) the lines that can be used, in order.
        problems: Lines that cannot.
        overlaps: Items (same id, or same text and picture) that two lists share: "a and b" -> how many. Not a problem by itself (the published
            lists overlap), but such items must not be examples for each other.
        confounders: Pairs of lines of one list with the same text and another label, and with the same picture and another label.
    """

    folder: str
    splits: dict[str, tuple[Meme, ...]]
    problems: tuple[Problem, ...]
    overlaps: dict[str, int]
    confounders: tuple[int, int]

    def __str__(self) -> str:
        lines = [
            f"{self.folder}: {len(self.splits)} lists, {sum(map(len, self.splits.values()))} usable lines, {len(self.problems)} problems."
        ]
        for name, memes in self.splits.items():
            counts = Counter(meme.label for meme in memes)
            hidden = f", {counts[None]} without a label" if counts[None] else ""
            lines.append(f"- {name}: {len(memes)} lines, {counts[1]} positive, {counts[0]} negative{hidden}")
        text, picture = self.confounders
        lines.append(f"- pairs that differ in the label alone by picture (same text): {text}; alone by text (same picture): {picture}")
        lines += [f"- {names} share {n} items" for names, n in self.overlaps.items()]
        for kind, n in sorted(Counter(problem.kind for problem in self.problems).items()):
            lines.append(f"- {kind}: {n}")
        lines += [f"- {problem}" for problem in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"- and {len(self.problems) - SHOWN} more")
        return "\n".join(lines)


def check_memes(folder: str | Path, *, splits: Sequence[str] | None = None, max_pixels: int = MAX_PIXELS) -> MemesReport:
    """Look at every line and unpack every picture, one at a time, without keeping any.

    A picture must lie in the folder: a path that leads out of it (absolute, with "..", or by a link inside img/) is refused and never opened.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        return MemesReport(str(folder), {}, (Problem("folder", str(folder), "there is no such folder"),), {}, (0, 0))
    there = sorted(path.stem for path in root.glob("*.jsonl") if path.stem.startswith(SPLITS) and path.is_file())
    problems = [Problem("folder", f"{name}.jsonl", "there is no such list") for name in splits or () if name not in there]
    if not there:
        problems.append(Problem("folder", str(folder), "no train.jsonl, dev.jsonl or test.jsonl"))
    found: dict[str, tuple[Meme, ...]] = {}
    seen: dict[Path, str | Problem] = {}
    for name in there:
        if splits is None or name in splits:
            found[name] = tuple(_unique(_lines(root, name, seen, problems, max_pixels), name, problems))
    return MemesReport(str(folder), found, tuple(problems), _overlaps(found), _confounders(found))


def _lines(root: Path, name: str, seen: dict[Path, str | Problem], problems: list[Problem], max_pixels: int) -> Iterator[tuple[str, Meme]]:
    """(place, meme) of every line that can be used by itself."""
    with open(root / f"{name}.jsonl", encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{name}.jsonl line {number}"
            row = _row(line)
            if isinstance(row, str):
                problems.append(Problem("malformed", where, row))
                continue
            path = inside(root, row["img"])
            if path is None:
                problems.append(Problem("escapes", where, f"img {row['img']!r} leads out of the folder"))
                continue
            if path not in seen:
                seen[path] = _look(path, row["img"], max_pixels)
            digest = seen[path]
            if isinstance(digest, Problem):
                problems.append(Problem(digest.kind, where, digest.what))
            else:
                yield where, Meme(str(row["id"]), path, row["text"], row.get("label"), name, digest)


def _row(line: str) -> dict[str, Any] | str:
    """The line's fields, or what is wrong with it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return "not JSON"
    if not isinstance(row, dict):
        return "not an object with id, img, label and text"
    if not isinstance(row.get("id"), int | str) or isinstance(row["id"], bool) or str(row["id"]) == "":
        return "id must be a number or a string"
    for field in ("img", "text"):
        if not isinstance(row.get(field), str) or not row[field].strip():
            return f"{field} must be a non-empty string"
        if any("\ud800" <= letter <= "\udfff" for letter in row[field]):
            return f"{field} must be text; it holds half of a character"
    label = row.get("label")
    if label is not None and (isinstance(label, bool) or label not in (0, 1)):
        return f"label must be 0 or 1, or left out; got {label!r}"
    return row


def inside(root: Path, name: str) -> Path | None:
    """The file `name` of the folder; None where the name leads out of it, by itself or by a link. The folder's img/ may itself be a link."""
    given = Path(name)
    if "\0" in name or "\\" in name or given.is_absolute() or ".." in given.parts:
        return None
    try:
        path = (root / given).resolve()
        homes = [root.resolve(), (root / "img").resolve()]
    except (OSError, RuntimeError):  # a ring of links
        return None
    return path if any(path.is_relative_to(home) for home in homes) else None


def _look(path: Path, name: str, max_pixels: int) -> str | Problem:
    """The digest of a readable picture, or what is wrong with it."""
    if not path.is_file():
        return Problem("missing", "", f"picture {name} is not there")
    try:
        open_picture(path, max_pixels=max_pixels)
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (ImageError, OSError) as error:
        return Problem("broken", "", f"picture {name} cannot be used ({error})")


def open_picture(path: Path | BytesIO, *, max_pixels: int = MAX_PIXELS, size: int | None = None) -> Image.Image:
    """A picture of a file, or of its bytes, as RGB, its pixels in memory and its file closed; `size`: shrunk until no side is longer.

    Raises:
        ImageError: it cannot be read to its end, or has more than `max_pixels` (known from its header, before it is unpacked).
    """
    name = path.name if isinstance(path, Path) else "one in memory"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height > max_pixels:
                    raise ImageError(
                        f"a picture must have at most {max_pixels} pixels; {name} has {image.width} x {image.height}. Shrink it, or raise max_pixels."
                    )
                turned = ImageOps.exif_transpose(image).convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"a picture must have at most {max_pixels} pixels; {name} has far more. Shrink it.") from error
    except (OSError, SyntaxError, ValueError, MemoryError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"a picture must be readable; {name} is not ({type(error).__name__}). Replace the file.") from error
    if size is not None:
        turned.thumbnail((size, size))
    return turned


def _unique(lines: Iterator[tuple[str, Meme]], name: str, problems: list[Problem]) -> Iterator[Meme]:
    """Lines whose id is new in the list, and whose text and picture together are."""
    ids: dict[str, str] = {}
    items: dict[tuple[str, str], Meme] = {}
    for where, meme in lines:
        key = (meme.text, meme.digest)
        if meme.id in ids:
            problems.append(Problem("duplicate", where, f"id {meme.id} was met in {ids[meme.id]}"))
        elif key in items:
            other = items[key]
            more = "" if other.label == meme.label else ", with another label"
            problems.append(Problem("duplicate", where, f"item {meme.id} has the text and picture of {other.id}{more}"))
        else:
            ids[meme.id], items[key] = where, meme
            yield meme


def _overlaps(splits: dict[str, tuple[Meme, ...]]) -> dict[str, int]:
    names, found = list(splits), {}
    for i, a in enumerate(names):
        ids, items = {meme.id for meme in splits[a]}, {(meme.text, meme.digest) for meme in splits[a]}
        for b in names[i + 1 :]:
            shared = sum(meme.id in ids or (meme.text, meme.digest) in items for meme in splits[b])
            if shared:
                found[f"{a} and {b}"] = shared
    return found


def _confounders(splits: dict[str, tuple[Meme, ...]]) -> tuple[int, int]:
    """Pairs of a positive and a negative line with one text; with one picture."""
    by_text: dict[tuple[str, str], Counter[int | None]] = {}
    by_picture: dict[tuple[str, str], Counter[int | None]] = {}
    for name, memes in splits.items():
        for meme in memes:
            by_text.setdefault((name, meme.text), Counter())[meme.label] += 1
            by_picture.setdefault((name, meme.digest), Counter())[meme.label] += 1
    texts, pictures = (sum(c[0] * c[1] for c in groups.values()) for groups in (by_text, by_picture))
    return texts, pictures
