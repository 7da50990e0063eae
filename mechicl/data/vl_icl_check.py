"""Is a VL-ICL Bench folder whole? Every row of query.json and support.json and every picture is looked at before anything is computed with them.

Seen in the released code (github.com/ys-zong/VL-ICL) and its data card: FOLDER/TASK/query.json and support.json are arrays of objects; `image` is a list of
file names (or one name) that start from FOLDER, so they begin with the task's name; `question` and `answer` are the prompt's words. Beyond that

    open_mi               a query has `classes` and `support`: {class: {"images": [...], "caption": ...}}; support.json is not needed
    matching_mi           a support row has `same` and `diff`, each with image (two files), question, answer
    operator_induction*   a query has `operator`, "+", "-" or "x"; a support row's `answer` is [A+B, A-B, AxB]
    clevr, textocr        nothing more

The published pictures come in archives that must be unpacked first (query.zip, support.zip). No set is part of mechicl: `mechicl.data.vl_icl_made` writes small
ones in this layout.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mechicl.data.folders import within
from mechicl.data.memes_check import MAX_PIXELS, Problem, open_picture, problem_lines
from mechicl.errors import ImageError

OPERATORS = ("+", "-", "x")
"""Of the operator tasks, in the order in which support rows list their answers."""
N_IMAGES: Mapping[str, int] = {"matching_mi": 2, "operator_induction_interleaved": 2}
"""Pictures of an item, where it is not one."""


@dataclass(frozen=True, eq=False)
class VLICLRow:
    """A usable query or example.

    Attributes:
        id: Of the row, or its number in the file.
        images: Its picture files.
        question: Asked about them.
        answer: As text; "" for a support row of an operator task, which has one for each operator.
        operator: Of an operator query.
        answers: By operator, for a support row of an operator task.
        support: The query's own examples by class, in the file's order (open_mi).
        twins: The same and the different pair of a support row (matching_mi).
    """

    id: str
    images: tuple[Path, ...]
    question: str
    answer: str
    operator: str = ""
    answers: tuple[str, ...] = ()
    support: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    twins: tuple[VLICLRow, ...] = ()


@dataclass(frozen=True)
class VLICLReport:
    """What a task's folder holds, before anything is computed with it.

    Attributes:
        queries, support: Rows that can be used, in order.
        problems: Rows that cannot. Kinds: "malformed", "escapes", "missing", "broken", "leak" (the query's picture is among its own examples),
            "packed" (pictures are missing, and their archive is there), "folder".
        n_pictures: Different picture files that were looked at.
    """

    folder: str
    task: str
    queries: tuple[VLICLRow, ...]
    support: tuple[VLICLRow, ...]
    problems: tuple[Problem, ...]
    n_pictures: int = 0

    def __str__(self) -> str:
        examples = f"{len(self.support)} usable support rows" if self.task != "open_mi" else "each with its own examples"
        lines = [
            f"{self.folder}: {self.task}, {len(self.queries)} usable queries, {examples}, "
            f"{self.n_pictures} pictures, {len(self.problems)} problems."
        ]
        answers = Counter(row.answer for row in self.queries).most_common(1)
        if answers:
            lines.append(
                f"- {len({row.answer for row in self.queries})} different answers; the commonest is {answers[0][0]!r} ({answers[0][1]} queries)"
            )
        return "\n".join([*lines, *problem_lines(self.problems)])


class Bad(Exception):
    """A row that cannot be used; becomes a `Problem`."""

    kind: str
    what: str

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind, self.what = kind, what


def check_vl_icl(folder: str | Path, task: str, *, names: Sequence[str] = (), max_pixels: int = MAX_PIXELS) -> VLICLReport:
    """Look at every row and unpack every picture once, without keeping any.

    Args:
        folder: Holds the task's folder, or is it. A picture outside of it is refused and never opened.
        task: Name of the task.
        names: Names that its folder can have; the task's own by default.
        max_pixels: Larger pictures are a problem.
    """
    root = Path(folder).expanduser()
    place = next((p for p in (*(root / name for name in names or (task,)), root) if (p / "query.json").is_file()), None)
    if place is None:
        what = "there is no such folder" if not root.is_dir() else f"no query.json, neither in it nor in {' or '.join(names or (task,))}/"
        return VLICLReport(str(folder), task, (), (), (Problem("folder", str(folder), what),))
    look = Looker(place, root, max_pixels)
    problems: list[Problem] = []
    queries = _rows(place / "query.json", task, look, problems, query=True)
    needless = task == "open_mi"  # its examples stand in the queries
    support = [] if needless else _rows(place / "support.json", task, look, problems, query=False)
    if any(problem.kind == "missing" for problem in problems) and any(place.glob("*.zip")):
        packed = ", ".join(sorted(path.name for path in place.glob("*.zip")))
        problems.insert(
            0, Problem("packed", place.name, f"pictures are missing and {packed} lies there: unpack it in {place.parent.name}/ first")
        )
    return VLICLReport(str(folder), task, tuple(queries), tuple(support), tuple(problems), len(look.seen))


@dataclass
class Looker:
    """Finds pictures by the names in the files, and unpacks each once. Names start from the folder above the task's (published), or from the task's own."""

    place: Path
    limit: Path
    max_pixels: int
    seen: dict[str, Path | Bad] = field(default_factory=dict)

    def __call__(self, name: Any) -> Path:
        """The readable file of a name.

        Raises:
            Bad: it leads out of the folder, is not there, or cannot be read.
        """
        if not isinstance(name, str) or not name.strip() or any("\ud800" <= letter <= "\udfff" for letter in name):
            raise Bad("malformed", f"image must be file names; got {name!r}")
        if name not in self.seen:
            try:
                self.seen[name] = self._look(name)
            except Bad as bad:
                self.seen[name] = bad
        found = self.seen[name]
        if isinstance(found, Bad):
            raise found
        return found

    def _look(self, name: str) -> Path:
        named = Path(name).parts[:1] == (self.place.name,)  # as published
        homes = [self.place.parent] if named else [self.place] if self.limit == self.place else [self.place.parent, self.place]
        inside = [path for home in homes if (path := self._within(home, name)) is not None]
        if not inside:
            raise Bad("escapes", f"picture {name!r} leads out of the folder")
        path = next((path for path in inside if path.is_file()), None)
        if path is None:
            raise Bad("missing", f"picture {name} is not there")
        try:
            open_picture(path, max_pixels=self.max_pixels)
        except (ImageError, OSError) as error:
            raise Bad("broken", f"picture {name} cannot be used ({error})") from error
        return path

    def _within(self, home: Path, name: str) -> Path | None:
        path = within(home, name)
        return path if path is not None and path.is_relative_to(self.limit.resolve()) else None


def _rows(path: Path, task: str, look: Looker, problems: list[Problem], *, query: bool) -> list[VLICLRow]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(Problem("folder", path.name, "there is no such file"))
        return []
    except (OSError, ValueError, RecursionError) as error:
        problems.append(Problem("malformed", path.name, f"not readable JSON ({type(error).__name__})"))
        return []
    if not isinstance(entries, list):
        problems.append(Problem("malformed", path.name, f"must be an array of objects; got {type(entries).__name__}"))
        return []
    found = []
    for number, entry in enumerate(entries):
        try:
            found.append(_row(entry, str(number), task, look, query=query))
        except Bad as bad:
            problems.append(Problem(bad.kind, f"{path.name} row {number}", bad.what))
    return found


def _row(entry: Any, name: str, task: str, look: Looker, *, query: bool) -> VLICLRow:
    if not isinstance(entry, dict):
        raise Bad("malformed", f"must be an object; got {type(entry).__name__}")
    given = entry.get("id")
    name = str(given) if isinstance(given, int | str) and not isinstance(given, bool) and str(given).strip() else name
    if task == "matching_mi" and not query:
        twins = tuple(_plain(entry.get(side), f"{name}/{side}", task, look) for side in ("same", "diff"))
        return VLICLRow(name, (), "", "", twins=twins)
    if not task.startswith("operator_induction"):
        row = _plain(entry, name, task, look)
        return row if task != "open_mi" else _with_support(entry, row, look)
    if query:
        if entry.get("operator") not in OPERATORS:
            raise Bad("malformed", f"operator must be one of {' '.join(OPERATORS)}; got {entry.get('operator')!r}")
        row = _plain(entry, name, task, look)
        return VLICLRow(row.id, row.images, row.question, row.answer, operator=entry["operator"])
    answers = entry.get("answer")
    if not isinstance(answers, list) or len(answers) != len(OPERATORS):
        raise Bad("malformed", f"answer must be a list of {len(OPERATORS)} results, for {' '.join(OPERATORS)}; got {answers!r}")
    images, question = _images(entry, task, look), _text(entry, "question")
    return VLICLRow(name, images, question, "", answers=tuple(_answer(one) for one in answers))


def _plain(entry: Any, name: str, task: str, look: Looker) -> VLICLRow:
    """What every row has."""
    if not isinstance(entry, dict):
        raise Bad("malformed", f"must be an object with image, question and answer; got {type(entry).__name__}")
    return VLICLRow(name, _images(entry, task, look), _text(entry, "question"), _answer(entry.get("answer")))


def _images(entry: Mapping[str, Any], task: str, look: Looker) -> tuple[Path, ...]:
    names = entry.get("image")
    names = [names] if isinstance(names, str) else names
    n = N_IMAGES.get(task, 1)
    if not isinstance(names, list) or len(names) != n:
        raise Bad("malformed", f"image must be a list of {n} file name{'s' * (n > 1)}; got {names!r}")
    return tuple(look(one) for one in names)


def _text(entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise Bad("malformed", f"{key} must be text; got {value!r}")
    return value


def _answer(value: Any) -> str:
    """A string or a whole number, as text."""
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise Bad("malformed", f"answer must be text or a whole number; got {value!r}")
    return _text({"answer": str(value)}, "answer").strip()


def _with_support(entry: Mapping[str, Any], row: VLICLRow, look: Looker) -> VLICLRow:
    classes, own = entry.get("classes"), entry.get("support")
    if (
        not isinstance(classes, list)
        or not all(isinstance(one, str) and one.strip() for one in classes)
        or len(set(classes)) != len(classes)
    ):
        raise Bad("malformed", f"classes must be a list of different names; got {classes!r}")
    if row.answer not in classes or len(classes) < 2:
        raise Bad("malformed", f"classes must be the answer and others; got {row.answer!r} with {classes}")
    if not isinstance(own, dict) or not all(
        isinstance(own.get(name), dict) and isinstance(own[name].get("images"), list) for name in classes
    ):
        raise Bad("malformed", 'support must hold {class: {"images": [...]}} for every class')
    support = {name: tuple(look(one) for one in own[name]["images"]) for name in classes}
    if any(row.images[0] in files for files in support.values()):
        raise Bad("leak", f"the query {row.images[0].name} is among its own examples")
    return VLICLRow(row.id, row.images, row.question, row.answer, support=support)
