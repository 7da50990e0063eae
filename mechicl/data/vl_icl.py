"""VL-ICL Bench: its folders as published, as episodes.

Seen in the released code and data card: which examples go with a query, in which order, the instructions at three levels of detail, the questions, the rules of
marking (`mechicl.data.vl_icl_scoring`). Ours: every example is a turn of the model's own chat template (released: one text with a layout for each model, and for
some models "You are a helpful assistant." before the instruction; `mechicl.prompts.reform` writes all examples in one turn); examples are drawn for each query from
the seed and the query alone, so that fewer shots are among the more and the same queries are asked at every number of shots (released: one random state for all);
candidates, so that likelihoods can be compared; and `shown`.

open_mi is what the paper calls Fast Open-Ended MiniImageNet: the release has no other mini-ImageNet task with open answers. fast_open_mi is therefore the same
loader, for folders of either name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from mechicl.data.memes_check import MAX_PIXELS, open_picture
from mechicl.data.vl_icl_check import OPERATORS, VLICLReport, VLICLRow, check_vl_icl
from mechicl.data.vl_icl_scoring import Rule, right
from mechicl.errors import ImageError, OptionError
from mechicl.prompts.episode import Episode, Shot

Name = Literal["open_mi", "fast_open_mi", "matching_mi", "clevr", "operator_induction", "operator_induction_interleaved", "textocr"]
NAMES: tuple[str, ...] = get_args(Name)
Description = Literal["nothing", "concise", "detailed"]
"""How much the instruction says."""
PER_CLASS = ("open_mi", "matching_mi")
"""Tasks whose shots are counted for each label, as released: n shots are 2 n examples. In the others n shots are n examples."""
FOLDERS: Mapping[str, tuple[str, ...]] = {"open_mi": ("open_mi", "fast_open_mi")}

INSTRUCTIONS: Mapping[str, tuple[str, str]] = {
    "open_mi": (
        "Answer the question with a single word or phase.",
        "Induce the concept from the in-context examples. Answer the question with a single word or phase.",
    ),
    "matching_mi": (
        "Determine the output for the new pair of images.",
        'According to the few-shot examples, induce what operation to do and determine the output for the two new images. Answer with "yes" or "no".',
    ),
    "clevr": (
        "Find objects of the given type, induce what operation to use and calculate the result.",
        "The image contains objects of different shapes, colors, sizes and materials. The question describes the attribute and its value. You need to find all "
        "objects within the image that satisfy the condition. You should induce what operation to use according to the results of the in-context examples and "
        "then calculate the result.",
    ),
    "operator_induction": (
        "Induce the mathematical operator and calculate the result.",
        "The image contains two digit numbers and a ? representing the mathematical operator. Induce the mathematical operator (addition, multiplication, minus) "
        "according to the results of the in-context examples and calculate the result.",
    ),
    "operator_induction_interleaved": (
        "Induce the mathematical operator between the two images and calculate the result.",
        "There are two input images, each representing a single digit number. Induce the mathematical operator (addition, multiplication, minus) that is applied "
        "between the two images according to the results of the in-context examples. Calculate the result for the new query images.",
    ),
    "textocr": (
        "Answer with the text inside the red box.",
        "An image will be provided where a red box is drawn around the text of interest. Answer with the text inside the red box. Ensure that the transcription is "
        "precise, reflecting the exact characters, including letters, numbers, symbols.",
    ),
}
"""Concise and detailed, [sic]: prompts are part of a protocol, so they stand here as published."""
OTHERS = 8
"""textocr: at most so many answers of other rows among the candidates of a query, beside those of its examples."""


def task_of(name: str) -> str:
    """The loader's name of a task.

    Raises:
        OptionError: there is no such task.
    """
    if name not in NAMES:
        raise OptionError(
            f"task must be one of {', '.join(NAMES)}; got {name!r}. The text-to-image tasks of the benchmark are not for these models."
        )
    return "open_mi" if name == "fast_open_mi" else name


def instruction(task: str, description: Description) -> str:
    """The published instruction of a task.

    Raises:
        OptionError: no such task or level.
    """
    if description not in get_args(Description):
        raise OptionError(
            f"description must be one of {', '.join(get_args(Description))}; got {description!r}. concise is the shorter instruction."
        )
    return "" if description == "nothing" else INSTRUCTIONS[task_of(task)][description == "detailed"]


@dataclass(frozen=True, eq=False)
class VLICLTask:
    """A checked task; pictures are read when they are asked for.

    Attributes:
        name: Of the task.
        report: Its queries and support rows, and what could not be used.
        size: Pictures are shrunk until no side is longer, pixels; None leaves them as they are.
        max_pixels: Larger files are refused before they are unpacked.
    """

    name: str
    report: VLICLReport
    size: int | None = None
    max_pixels: int = MAX_PIXELS

    @property
    def queries(self) -> tuple[VLICLRow, ...]:
        """Usable rows of query.json."""
        return self.report.queries

    @property
    def support(self) -> tuple[VLICLRow, ...]:
        """Usable rows of support.json; open_mi has its examples in the queries."""
        return self.report.support

    @property
    def most(self) -> int:
        """Shots that every query can be given."""
        if self.name == "open_mi":
            return min(len(files) for row in self.queries for files in row.support.values())
        return len(self.support)

    @cached_property
    def answers(self) -> tuple[str, ...]:
        """Answers that occur, of all queries and support rows (operator tasks: of every operator, so that they do not say which it is); numbers in order."""
        rows = [*self.queries, *(twin for row in self.support for twin in row.twins), *self.support]
        found = dict.fromkeys(text for row in rows for text in (*row.answers, row.answer) if text)
        if all(text.lstrip("-").isdecimal() for text in found):
            return tuple(sorted(found, key=int))
        return tuple(found)

    def episodes(self, n: int | None = None, *, shots: int = 2, classes: int = 2, description: Description = "concise", shown: bool = False,
                 seed: int = 0) -> list[Episode]:  # fmt: skip
        """Queries with examples, in the file's order.

        Candidates are the episode's classes (open_mi), Yes and No (matching_mi), or the right answer, the labels of the examples and other answers that occur in
        the task, less those of which one would begin another (12 and 1: whole labels could not be compared); of textocr, whose answers are open, only a few.

        Args:
            n: How many queries, drawn at random; None for all.
            shots: Examples: of each class (open_mi), pairs of a same and a different couple (matching_mi), else in all. Fewer shots are among the more (but for `shown`).
            classes: open_mi: the query's class and how many others; published 2.
            description: How much the instruction says.
            shown: Ours, for clevr and the operator tasks, whose examples have the query's label by luck only: one has it, one (from two shots on) has another, and
                none has one that begins another. Head scores that ask for attention to the right label need it. textocr cannot do this.
            seed: Decides which queries and which examples.

        Raises:
            OptionError: more queries, shots or classes than there are, or `shown` where no support row has the answer.
            ImageError: a picture cannot be read any more.
        """
        words = instruction(self.name, description)
        if n is not None and not 1 <= n <= len(self.queries):
            raise OptionError(f"n must be in 1..{len(self.queries)}, the usable queries; got {n}. Ask for fewer, or None for all.")
        if not 0 <= shots <= self.most:
            raise OptionError(
                f"shots must be in 0..{self.most} for {self.name} in {self.report.folder}; got {shots}. It has no more examples."
            )
        if shown and self.name == "textocr":
            raise OptionError("shown must be False for textocr; got True. Its answers do not repeat, so no example has the query's.")
        chosen = np.random.default_rng([seed, 67]).permutation(len(self.queries))[:n]
        return [self._episode(int(i), shots, classes, words, shown, seed) for i in sorted(chosen.tolist())]

    def right(self, text: str, episode: Episode, rule: Rule = "published") -> bool:
        """Whether a written answer is right, by the published rule or ours; see `mechicl.data.vl_icl_scoring.right`."""
        return right(text, episode.answer, self.name, rule)

    def _episode(self, number: int, shots: int, classes: int, words: str, shown: bool, seed: int) -> Episode:
        query, draw = self.queries[number], np.random.default_rng([seed, 71, number])
        if self.name == "open_mi":
            rows, candidates = _bound(query, shots, classes, draw)
        else:
            order = [self.support[int(i)] for i in draw.permutation(len(self.support))]
            rows, candidates = self._drawn(query, order, shots, draw if shown else None)
        return self._write(query, rows, candidates, words)

    def _drawn(
        self, query: VLICLRow, order: Sequence[VLICLRow], shots: int, shown: np.random.Generator | None
    ) -> tuple[list[VLICLRow], tuple[str, ...]]:
        """Examples from support.json, and candidates."""
        if self.name == "matching_mi":
            return [twin for row in order[:shots] for twin in row.twins], self.answers
        known = [_solved(row, query.operator) for row in order]
        rows = _showing(known, shots, query, shown) if shown is not None and shots else known[:shots]
        needed = {query.answer, *(row.answer for row in rows)}
        mixed = np.random.default_rng([73, len(self.answers), *query.id.encode()]).permutation(len(self.answers))
        others = [self.answers[int(i)] for i in mixed]
        return rows, _apart(needed, others, OTHERS if self.name == "textocr" else len(others))

    def _write(self, query: VLICLRow, rows: Sequence[VLICLRow], candidates: tuple[str, ...], words: str) -> Episode:
        every = [*rows, query]
        common = len({row.question.strip() for row in every}) == 1 and self.name != "clevr"
        shots = [
            Shot(row.answer, tuple(self._picture(path) for path in row.images), "" if common else row.question, item=row.answer)
            for row in every
        ]
        asked = query.question if common else ""
        return Episode(tuple(shots[:-1]), shots[-1], candidates, words, asked, id=f"{self.name}/{query.id}")

    def _picture(self, path: Path) -> Image.Image:
        return open_picture(path, max_pixels=self.max_pixels, size=self.size)


def _bound(query: VLICLRow, shots: int, classes: int, draw: np.random.Generator) -> tuple[list[VLICLRow], tuple[str, ...]]:
    """open_mi: the query's class and others in a random order that repeats, each time with the next picture of each."""
    others = [name for name in query.support if name != query.answer]
    if not 2 <= classes <= len(others) + 1:
        raise OptionError(
            f"classes must be in 2..{len(others) + 1} for query {query.id}; got {classes}. The release draws one other class."
        )
    names = [query.answer, *(others[int(i)] for i in draw.permutation(len(others))[: classes - 1])]
    names = [names[int(i)] for i in draw.permutation(classes)]
    rows = [VLICLRow(f"{query.id}/{name}/{k}", (query.support[name][k],), query.question, name) for k in range(shots) for name in names]
    return rows, tuple(names)


def _solved(row: VLICLRow, operator: str) -> VLICLRow:
    """A support row with its answer under the query's operator."""
    return row if not row.answers else VLICLRow(row.id, row.images, row.question, row.answers[OPERATORS.index(operator)])


def _apart(needed: Collection[str], others: Sequence[str], most: int) -> tuple[str, ...]:
    """The needed answers and up to `most` others, none of which begins another or is begun by one."""
    found = sorted(needed)
    for text in others:
        if len(found) < len(needed) + most and not any(_alike(text, other) for other in found):
            found.append(text)
    return tuple(sorted(found, key=lambda text: (0, int(text), "") if text.lstrip("-").isdecimal() else (1, 0, text)))


def _alike(a: str, b: str) -> bool:
    return a.startswith(b) or b.startswith(a)


def _showing(known: Sequence[VLICLRow], shots: int, query: VLICLRow, draw: np.random.Generator) -> list[VLICLRow]:
    """Rows whose labels can be compared, one exchanged at a random place so that one has the query's answer and, from two shots on, one has another.

    Raises:
        OptionError: support.json has none with the answer, or too few.
    """
    have, rows = [row for row in known if row.answer == query.answer], list[VLICLRow]()
    for row in known:
        if len(rows) < shots and all(row.answer == one or not _alike(row.answer, one) for one in (query.answer, *(r.answer for r in rows))):
            rows.append(row)
    if not have or len(rows) < shots:
        raise OptionError(
            f"shown needs {shots} examples, one with the answer of query {query.id}, {query.answer!r}; support.json has no such. Ask without shown."
        )
    place = int(draw.integers(shots))
    if not any(row.answer == query.answer for row in rows):
        rows[place] = have[0]
    other = next((row for row in known if not _alike(row.answer, query.answer)), None)
    if shots > 1 and other is not None and all(row.answer == query.answer for row in rows):
        rows[place] = other
    return rows


def load_vl_icl(folder: str | Path, task: Name, *, size: int | None = None, strict: bool = True, max_pixels: int = MAX_PIXELS) -> VLICLTask:
    """A task whose every row and picture has been looked at.

    Args:
        folder: The benchmark's folder, which holds one for each task, or the task's own.
        task: Which task.
        size: Pictures are shrunk until no side is longer, pixels; None leaves them as they are.
        strict: Any problem is an error. Else what cannot be used is left out and stays in `report.problems`.
        max_pixels: Larger pictures are a problem.

    Raises:
        OptionError: there is no such task, or size is below 8.
        ImageError: with the whole report: no such folder, nothing usable, or, with `strict`, any problem.
    """
    name = task_of(task)
    if size is not None and size < 8:
        raise OptionError(f"size must be at least 8 pixels; got {size}. Leave it out to keep the pictures as they are.")
    report = check_vl_icl(folder, name, names=FOLDERS.get(name, (name,)), max_pixels=max_pixels)
    empty = not report.queries or (name != "open_mi" and not report.support)
    if empty or (strict and report.problems):
        raise ImageError(
            f"folder must hold {name}/query.json and {name}/support.json as published, whose pictures can all be read; got\n{report}\n"
            "Repair it, or pass strict=False to leave out what is unusable."
        )
    return VLICLTask(name, report, size, max_pixels)
