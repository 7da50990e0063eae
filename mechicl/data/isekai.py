"""ISEKAI folders as published: lists (ISEKAI-10.json, ISEKAI-pair.json) with one question a line, and pictures beside them.

A line is an object with image_name (the query's file), label_name (its right name), positive_list and negative_list (files of examples), positive_promt and
negative_promt [sic] (the names of the two classes). The set itself is not part of mechicl; `mechicl.data.isekai_made` writes one of its own in this format.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechicl.data.folders import within
from mechicl.data.link_context import PUBLISHED, Prompt
from mechicl.data.link_pool import LinkClass, Pool
from mechicl.data.link_tasks import LinkTask, task_episodes
from mechicl.data.memes_check import MAX_PIXELS, Problem, open_picture, problem_lines
from mechicl.errors import ImageError, OptionError
from mechicl.prompts.episode import Episode

FIELDS = ("image_name", "label_name", "positive_list", "negative_list", "positive_promt", "negative_promt")
"""Of a line. The spelling is the published one."""
SUFFIXES = (".json", ".jsonl")


@dataclass(frozen=True)
class IsekaiReport:
    """What a folder holds, before anything is computed with it.

    Attributes:
        lists: For each list (by its file's name without the ending) the questions that can be used, in order.
        problems: Lines that cannot. Kinds: "malformed", "escapes", "missing", "broken", "leak" (the query is among the examples), "folder".
        n_pictures: Different picture files that were looked at.
    """

    folder: str
    lists: dict[str, tuple[LinkTask, ...]]
    problems: tuple[Problem, ...]
    n_pictures: int = 0

    def __str__(self) -> str:
        usable = sum(map(len, self.lists.values()))
        lines = [
            f"{self.folder}: {len(self.lists)} lists, {usable} usable lines, {self.n_pictures} pictures, {len(self.problems)} problems."
        ]
        for name, tasks in self.lists.items():
            pairs, asked = {task.names for task in tasks}, Counter(task.asked for task in tasks)
            most = min((task.most for task in tasks), default=0)
            lines.append(
                f"- {name}: {len(tasks)} lines, {len(pairs)} pairs, {asked[0]} positive and {asked[1]} negative queries, up to {most} shots"
            )
        return "\n".join([*lines, *problem_lines(self.problems)])


@dataclass(frozen=True, eq=False)
class Isekai:
    """A checked folder; pictures are read when they are asked for."""

    report: IsekaiReport
    max_pixels: int = MAX_PIXELS

    def __getitem__(self, name: str) -> tuple[LinkTask, ...]:
        """The questions of a list.

        Raises:
            OptionError: there is no such list.
        """
        if name not in self.report.lists:
            raise OptionError(f"list must be one of {', '.join(self.report.lists)}; got {name!r}. Pick one that the folder has.")
        return self.report.lists[name]

    def episodes(self, name: str, shots: int, *, prompt: Prompt = PUBLISHED, seed: int = 0, size: int | None = None) -> list[Episode]:
        """The questions of a list with `shots` examples of each class; pictures are shrunk until no side is longer than `size`, pixels.

        Raises:
            OptionError: no such list, or more shots than its lines have examples.
            ImageError: a picture cannot be read any more.
        """
        return task_episodes(self[name], shots, prompt=prompt, seed=seed, size=size, max_pixels=self.max_pixels)

    def pool(self, size: int | None = None) -> Pool:
        """All classes that the lists name, each with all its pictures, for training episodes."""
        files: dict[str, dict[Path, None]] = {}
        for task in (task for tasks in self.report.lists.values() for task in tasks):
            for side, name in enumerate(task.names):
                shown = [*task.examples[side], *([task.query] if task.asked == side else [])]
                files.setdefault(name, {}).update(dict.fromkeys(path for path in shown if isinstance(path, Path)))
        classes = tuple(LinkClass(name, tuple(sorted(paths))) for name, paths in files.items())
        return Pool(classes, size, self.max_pixels, "isekai")


def load_isekai(folder: str | Path, *, lists: Sequence[str] | None = None, images: str | Path | None = None, strict: bool = True,
                max_pixels: int = MAX_PIXELS) -> Isekai:  # fmt: skip
    """A folder whose every line and picture has been looked at.

    Args:
        folder: Holds the lists.
        lists: Names of lists ("ISEKAI-10"); None for all there are.
        images: What the lists' file names start from; None: the folder itself.
        strict: Any problem is an error. Else what cannot be used is left out and stays in `report.problems`.
        max_pixels: Larger pictures are a problem.

    Raises:
        ImageError: with the whole report: no such folder or list, nothing usable, or, with `strict`, any problem.
    """
    report = check_isekai(folder, lists=lists, images=images, max_pixels=max_pixels)
    if not any(report.lists.values()) or (strict and report.problems):
        raise ImageError(
            f"folder must hold lists of {', '.join(FIELDS)} whose pictures can all be read; got\n{report}\n"
            "Repair it, or pass strict=False to leave out what is unusable."
        )
    return Isekai(report, max_pixels)


def check_isekai(folder: str | Path, *, lists: Sequence[str] | None = None, images: str | Path | None = None,
                 max_pixels: int = MAX_PIXELS) -> IsekaiReport:  # fmt: skip
    """Look at every line and unpack every picture once, without keeping any. A picture that lies outside `images` is refused and never opened."""
    root = Path(folder).expanduser()
    home = root if images is None else Path(images).expanduser()
    for place in (root, home):
        if not place.is_dir():
            return IsekaiReport(str(folder), {}, (Problem("folder", str(place), "there is no such folder"),))
    there = {path.stem: path for path in sorted(root.iterdir()) if path.suffix in SUFFIXES and path.is_file() and _is_list(path)}
    problems = [Problem("folder", name, "there is no such list") for name in lists or () if name not in there]
    if not there:
        problems.append(Problem("folder", str(folder), "no list such as ISEKAI-10.json"))
    seen: dict[str, Path | Problem] = {}
    found = {name: tuple(_tasks(path, home, seen, problems, max_pixels)) for name, path in there.items() if lists is None or name in lists}
    return IsekaiReport(str(folder), found, tuple(problems), len(seen))


def _is_list(path: Path) -> bool:
    """Whether a file is one of questions: by its name, or because it begins with their fields."""
    if path.stem.upper().startswith("ISEKAI"):
        return True
    with open(path, encoding="utf-8", errors="replace") as file:
        start = file.read(1 << 20)
    return any(f'"{name}"' in start for name in FIELDS)


def _tasks(path: Path, home: Path, seen: dict[str, Path | Problem], problems: list[Problem], max_pixels: int) -> Iterator[LinkTask]:
    for number, line in _lines(path):
        where = f"{path.name} line {number}"
        row = _row(line)
        if isinstance(row, str):
            problems.append(Problem("malformed", where, row))
            continue
        names = [row["image_name"], *row["positive_list"], *row["negative_list"]]
        files = [_look(home, name, seen, max_pixels) for name in names]
        wrong = [(name, file) for name, file in zip(names, files, strict=True) if isinstance(file, Problem)]
        good = [file for file in files if isinstance(file, Path)]
        if wrong:
            more = f", and {len(wrong) - 1} more of its pictures" if len(wrong) > 1 else ""
            problems.append(Problem(wrong[0][1].kind, where, wrong[0][1].what + more))
        elif good[0] in good[1:]:
            problems.append(Problem("leak", where, f"the query {names[0]} is among its own examples"))
        else:
            pair = (row["positive_promt"].strip(), row["negative_promt"].strip())
            asked = int(row["label_name"].strip().lower() != pair[0].lower())
            n = len(row["positive_list"])
            yield LinkTask(f"{path.stem}/{number}", pair, (tuple(good[1 : n + 1]), tuple(good[n + 1 :])), good[0], asked)


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, object or broken text) of every line; a file that is one array counts its entries."""
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    if text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), 1)
            return
        except (ValueError, RecursionError):
            pass
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def _row(row: Any) -> dict[str, Any] | str:
    """The line's fields, or what is wrong with it."""
    if row is None:
        return "not JSON"
    if not isinstance(row, dict):
        return f"not an object with {', '.join(FIELDS)}"
    for name in FIELDS:
        value = row.get(name)
        texts: Any = value if name.endswith("_list") else [value]
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            return f"{name} must be {'a list of file names' if name.endswith('_list') else 'a non-empty string'}"
        if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
            return f"{name} must be text; it holds half of a character"
    pair = [row["positive_promt"].strip().lower(), row["negative_promt"].strip().lower()]
    if pair[0] == pair[1]:
        return f"positive_promt and negative_promt must differ; both are {pair[0]!r}"
    if row["label_name"].strip().lower() not in pair:
        return f"label_name must be one of the two names; got {row['label_name']!r} with {row['positive_promt']!r} and {row['negative_promt']!r}"
    return row


def _look(home: Path, name: str, seen: dict[str, Path | Problem], max_pixels: int) -> Path | Problem:
    """A readable file of the folder, or what is wrong with it; each file is unpacked once."""
    if name not in seen:
        seen[name] = _looked(home, name, max_pixels)
    return seen[name]


def _looked(home: Path, name: str, max_pixels: int) -> Path | Problem:
    path = within(home, name)
    if path is None:
        return Problem("escapes", "", f"picture {name!r} leads out of the folder")
    try:
        if not path.is_file():
            return Problem("missing", "", f"picture {name} is not there")
        open_picture(path, max_pixels=max_pixels)
    except (ImageError, OSError) as error:
        return Problem("broken", "", f"picture {name} cannot be used ({error})")
    return path
