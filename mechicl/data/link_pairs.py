"""The released lists of link-context training on ImageNet, train900_pairs.jsonl and test100_pairs.jsonl: classes with their pictures and their listed neighbours.

A line is an object: class_id (a number as text), class_name, samples (files below the pictures' root, such as train/n02119789/n02119789_9474.JPEG) and neighbors, a list of
[class_id, class_name, file] from the most similar class to the least, one for each interval of the ranking. The released files have 36 of both. Pictures are ImageNet's own and not part of
mechicl.

Source:
    Format: docs/test100_pairs.jsonl of github.com/isekai-portal/Link-Context-Learning (read in its history).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from mechicl.data.folders import within
from mechicl.data.link_pool import LinkClass, Pool
from mechicl.data.memes_check import MAX_PIXELS, SHOWN, Problem, open_picture
from mechicl.data.neighbours import Neighbours
from mechicl.errors import ImageError, OptionError


@dataclass(frozen=True, eq=False)
class ListedNeighbours(Neighbours):
    """Neighbours as a list gives them: for each class the classes of its intervals, nothing else is known. `listed_rows[k]`: rows of class k's neighbours, most similar first."""

    listed_rows: tuple[tuple[int, ...], ...] = ()

    @property
    def n(self) -> int:
        """Intervals that every class has a neighbour for."""
        return min(map(len, self.listed_rows))

    def interval(self, row: int, j: int) -> Int[np.ndarray, " n"]:
        """The class of interval j (1: the most similar) of class `row`.

        Raises:
            OptionError: there is no such interval.
        """
        if not 1 <= j <= self.n:
            raise OptionError(f"j must be in 1..{self.n}; got {j}. 1 holds the most similar class.")
        return np.array([self.listed_rows[row][j - 1]])

    def drawn(self, row: int, seed: int) -> Int[np.ndarray, " interval"]:
        """The list itself: its authors have drawn already."""
        return np.array(self.listed_rows[row][: self.n])

    def take(self, keys: Iterable[str]) -> ListedNeighbours:
        """The lists of some classes, without the neighbours that are not among them.

        Raises:
            OptionError: a class that is not there, or one that is left without a neighbour.
        """
        wanted = tuple(keys)
        if wanted == self.keys:
            return self
        missing = [key for key in wanted if key not in self.keys]
        if missing:
            raise OptionError(f"keys must be classes of the list; {missing[0]!r} is not. Take the pool that was read with it.")
        return listed(wanted, {key: [self.keys[j] for j in self.listed_rows[self.keys.index(key)]] for key in wanted}, self.source)


@dataclass(frozen=True, eq=False)
class LinkPairs:
    """A list that was read: the classes, who is like whom, and what could not be used (kinds: "malformed", "escapes", "missing", "broken", "few", "stranger": a neighbour that has no line)."""

    pool: Pool
    neighbours: ListedNeighbours
    problems: tuple[Problem, ...]


def listed(keys: tuple[str, ...], lists: Mapping[str, Iterable[str]], source: str) -> ListedNeighbours:
    """Neighbours from lists of keys.

    Raises:
        OptionError: a class without a neighbour among the keys.
    """
    at = {key: row for row, key in enumerate(keys)}
    rows = tuple(tuple(at[other] for other in dict.fromkeys(lists[key]) if other in at and other != key) for key in keys)
    empty = [key for key, row in zip(keys, rows, strict=True) if not row]
    if empty:
        raise OptionError(
            f"every class must have a neighbour among the classes; {empty[0]!r} has none. Keep its neighbours' lines, or leave it out."
        )
    alike = np.zeros((len(keys), len(keys)))
    for row, others in enumerate(rows):
        alike[row, list(others)] = np.arange(len(others), 0, -1) / len(others)
    return ListedNeighbours(keys, (alike + alike.T) / 2, max(map(len, rows)), source, listed_rows=rows)


def load_link_pairs(
    path: str | Path,
    root: str | Path,
    *,
    least: int = 2,
    size: int | None = None,
    strict: bool = True,
    check: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> LinkPairs:
    """Read a list of classes, pictures and neighbours.

    Args:
        path: The list, one object a line.
        root: The folder that its files are in: ImageNet's CLS-LOC, with train/ and val/.
        least: Fewest usable pictures of a class.
        size: Pictures are shrunk until no side is longer, pixels, when they are read.
        strict: Any problem is an error. Else what cannot be used is left out, and stays in `problems`.
        check: Unpack every picture first (32,400 files for the released list of 900 classes); else only see that the file is there.
        max_pixels: Larger pictures are a problem.

    Returns:
        LinkPairs. Keys are class ids; two classes may share a name, and then never meet in one episode.

    Raises:
        OptionError: the list or the root cannot be read, or a class is left without a neighbour.
        ImageError: fewer than two usable classes, or, with `strict`, any problem.
    """
    home, problems = Path(root).expanduser(), list[Problem]()
    if not home.is_dir():
        raise OptionError(f"root must be the folder of the pictures; there is no {home}. Give ImageNet's CLS-LOC.")
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise OptionError(f"path must be a readable list; {path} is not ({type(error).__name__}). Check the path.") from error
    classes: dict[str, LinkClass] = {}
    lists: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        read = _line(line)
        where = f"line {number}"
        if isinstance(read, str) or read["class_id"] in classes:
            problems.append(Problem("malformed", where, read if isinstance(read, str) else f"class {read['class_id']} is there twice"))
            continue
        files = [
            file for name in read["samples"] if (file := _file(home, name, f"{where}, {name}", check, max_pixels, problems)) is not None
        ]
        if len(files) < least:
            problems.append(Problem("few", where, f"{len(files)} usable pictures where at least {least} are needed"))
            continue
        classes[read["class_id"]] = LinkClass(read["class_name"], tuple(files), key=read["class_id"])
        lists[read["class_id"]] = [other[0] for other in read["neighbors"]]
    strangers = sorted({other for row in lists.values() for other in row} - classes.keys())
    problems += [Problem("stranger", other, "a neighbour that has no usable line") for other in strangers]
    if len(classes) < 2 or (strict and problems):
        told = "\n".join(f"- {problem}" for problem in problems[:SHOWN])
        raise ImageError(
            f"list must have two classes of {least} readable pictures at least; {path} has {len(classes)}, and {len(problems)} problems:\n{told}\n"
            "Repair it, or pass strict=False to leave out what is unusable."
        )
    return LinkPairs(
        Pool(tuple(classes.values()), size, max_pixels, Path(path).stem), listed(tuple(classes), lists, Path(path).name), tuple(problems)
    )


def _line(line: str) -> dict[str, Any] | str:
    """The object of a line, or what is wrong with it."""
    try:
        read = json.loads(line)
    except ValueError as error:
        return f"no JSON ({error})"
    if not isinstance(read, dict):
        return "no object"
    strings = [read.get("class_id"), read.get("class_name")]
    samples, near = read.get("samples"), read.get("neighbors")
    if not all(isinstance(one, str) and one.strip() for one in strings) or not isinstance(samples, list) or not isinstance(near, list):
        return "class_id and class_name must be text, samples and neighbors lists"
    if not all(isinstance(one, str) for one in samples) or not all(
        isinstance(one, list) and len(one) == 3 and all(isinstance(x, str) for x in one) for one in near
    ):
        return "samples must be files, neighbors [class_id, class_name, file]"
    return {**read, "class_name": read["class_name"].strip()}


def _file(home: Path, name: str, where: str, check: bool, max_pixels: int, problems: list[Problem]) -> Path | None:
    path = within(home, name)
    if path is None or not path.is_file():
        problems.append(
            Problem("escapes" if path is None else "missing", where, "leads out of the root" if path is None else "there is no such file")
        )
        return None
    if check:
        try:
            open_picture(path, max_pixels=max_pixels)
        except (ImageError, OSError) as error:
            problems.append(Problem("broken", where, f"cannot be used ({error})"))
            return None
    return path
