"""Small sets in the layout of VL-ICL Bench, made of mechicl's own pictures, so that what reads the real ones runs anywhere.

Mini-ImageNet's part is taken by `mechicl.data.concepts` (classes that the bundled models were not trained on), the other pictures by `vl_icl_scenes`. The same
fields, splits and relations between them; smaller numbers; names are pseudo-words of two syllables, new for each query, where the release has five fixed ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mechicl.data.folders import fresh_folder
from mechicl.data.looks import Split, class_ids
from mechicl.data.paint import draw_pictures
from mechicl.data.vl_icl import Name, task_of
from mechicl.data.vl_icl_check import OPERATORS
from mechicl.data.vl_icl_scenes import ATTRIBUTES, CELLS, draw_things, scene_picture, sign_picture, words_picture
from mechicl.data.words import pseudo_words
from mechicl.errors import OptionError

WAYS, EXAMPLES = 5, 5
"""open_mi: classes of a query and pictures of each, as published."""
N_SUPPORT: Mapping[str, int] = {
    "matching_mi": 32,
    "clevr": 48,
    "operator_induction": 80,
    "operator_induction_interleaved": 80,
    "textocr": 32,
}
"""Support rows; published 1600 (as 800 rows of two couples), 800, 80, 80, 800."""
QUESTIONS: Mapping[str, str] = {
    "open_mi": "This is a",
    "matching_mi": "Do the two images satisfy the induced relationship?",
    "operator_induction": "What is the result of the following mathematical expression?",
    "operator_induction_interleaved": "What is the result of the following mathematical expression?",
    "textocr": "What text is shown in the red box?",
}
"""As published; clevr's say what is counted ("size: large")."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Maker:
    """Rows of one task, and the pictures they name."""

    task: str
    n: int
    n_support: int
    size: int
    split: Split
    seed: int
    pictures: dict[str, Image.Image] = field(default_factory=dict)

    def draw(self, *numbers: int) -> np.random.Generator:
        """Randomness of one row: the same rows whatever else is made."""
        return np.random.default_rng([self.seed, 83, *numbers])

    def keep(self, split: str, name: str, picture: Image.Image) -> str:
        """The published spelling of a picture's place, starting from the benchmark's folder."""
        path = f"{self.task}/{split}/{name}.png"
        self.pictures[path] = picture
        return path


def write_vl_icl(folder: str | Path, task: Name, *, n: int = 24, n_support: int | None = None, size: int = 64, split: Split = "held_out",
                 seed: int = 0) -> Path:  # fmt: skip
    """Write a small set of a task: FOLDER/TASK/query.json, support.json, query/*.png, support/*.png, and made.json, which says how.

    Args:
        folder: The benchmark's folder; other tasks may be in it already. FOLDER/TASK must not exist yet, or be empty.
        task: Which.
        n: Queries. Operator tasks: 1 to 60, and 80 of the 100 couples of digits are support rows, as published.
        n_support: Rows of support.json; None for `N_SUPPORT`. open_mi: fixed by n, five pictures of five classes for each query.
        size: Side of the pictures, pixels.
        split: Concepts: "held_out" for those that the bundled models were not trained on, "train", or "all".
        seed: Decides everything: the same arguments give the same bytes.

    Returns:
        The benchmark's folder.

    Raises:
        OptionError: no such task, or numbers out of range.
        OutputPathError: FOLDER/TASK holds something, or cannot be written.
    """
    name = task_of(task)
    rows = N_SUPPORT.get(name, 0) if n_support is None else n_support
    most = 20 * len(OPERATORS) if name.startswith("operator") else 10_000
    if not 1 <= n <= most or size < 16 or (name != "open_mi" and not 1 <= rows <= (80 if name.startswith("operator") else 10_000)):
        raise OptionError(
            f"n must be in 1..{most}, n_support at least 1 (at most 80 for operators) and size at least 16 for {name}; got {n}, {rows} and {size}. Change them."
        )
    made = Maker(name, n, rows, size, split, seed)
    queries, support = MAKERS[name](made)
    target = Path(folder).expanduser()
    with fresh_folder(target / name) as temporary:
        for path, picture in made.pictures.items():
            file = temporary / Path(path).relative_to(name)
            file.parent.mkdir(exist_ok=True)
            picture.save(file)
        for file, content in (("query.json", queries), ("support.json", support)):
            (temporary / file).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        about = {"task": name, "n": n, "n_support": rows, "size": size, "split": split, "seed": seed}
        (temporary / "made.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return target


def _open_mi(made: Maker) -> tuple[Rows, Rows]:
    pool, queries, support = class_ids(made.split), Rows(), Rows()
    for k in range(made.n):
        draw = made.draw(1, k)
        ids = pool[draw.choice(len(pool), WAYS, replace=False)]
        names = pseudo_words(WAYS, draw, syllables=(2, 2), distinct_start=True)
        pictures = draw_pictures(np.concatenate([np.repeat(ids, EXAMPLES), ids[:1]]), made.size, draw)
        own: dict[str, Any] = {}
        order = draw.permutation(WAYS)
        for c in order.tolist():
            files = [
                made.keep("support", f"{k}_{c}_{i}", Image.fromarray(picture))
                for i, picture in enumerate(pictures[c * EXAMPLES : (c + 1) * EXAMPLES])
            ]
            own[names[c]] = {"images": files, "caption": f"This is a {names[c]}."}
            support += [
                {"id": f"{k}_{c}_{i}", "image": [file], "question": QUESTIONS["open_mi"], "answer": names[c]}
                for i, file in enumerate(files)
            ]
        image = made.keep("query", str(k), Image.fromarray(pictures[-1]))
        queries.append(
            {"id": k, "image": [image], "question": QUESTIONS["open_mi"], "answer": names[0], "classes": list(own), "support": own}
        )
    return queries, support


def _matching(made: Maker) -> tuple[Rows, Rows]:
    pool, names = class_ids(made.split), {True: "Yes", False: "No"}

    def couple(split: str, name: str, same: bool, draw: np.random.Generator) -> dict[str, Any]:
        first, second = pool[draw.choice(len(pool), 2, replace=False)].tolist()
        pictures = draw_pictures([first, first if same else second], made.size, draw)
        files = [made.keep(split, f"{name}_{i}", Image.fromarray(picture)) for i, picture in enumerate(pictures)]
        return {"id": name, "image": files, "question": QUESTIONS["matching_mi"], "answer": names[same]}

    same = made.draw(2).permutation([k % 2 == 0 for k in range(made.n)])
    queries = [couple("query", str(k), bool(same[k]), made.draw(2, 0, k)) for k in range(made.n)]
    support = [
        {
            "id": k,
            **{
                side: couple("support", f"{k}_{side}", side == "same", made.draw(2, 1, k, number))
                for number, side in enumerate(("same", "diff"))
            },
        }
        for k in range(made.n_support)
    ]
    return queries, support


def _clevr(made: Maker) -> tuple[Rows, Rows]:
    def row(split: str, k: int, draw: np.random.Generator) -> dict[str, Any]:
        things = draw_things(int(draw.integers(3, CELLS * CELLS + 1)), draw)
        attribute = list(ATTRIBUTES)[int(draw.integers(len(ATTRIBUTES)))]
        value = things[0].value(attribute)  # something to count
        count = sum(thing.value(attribute) == value for thing in things)
        image = made.keep(split, str(k), scene_picture(things, made.size, draw))
        return {"id": k, "image": [image], "question": f"{attribute}: {value}", "answer": count}

    return [row("query", k, made.draw(3, 0, k)) for k in range(made.n)], [
        row("support", k, made.draw(3, 1, k)) for k in range(made.n_support)
    ]


def _operators(made: Maker) -> tuple[Rows, Rows]:
    """80 of the 100 couples of digits are support rows with three answers, the other 20 are queries under each operator."""
    order = [(int(i) // 10, int(i) % 10) for i in made.draw(4).permutation(100)]
    asked = [(couple, operator) for couple in order[80:] for operator in OPERATORS]
    asked = [asked[int(i)] for i in made.draw(4, 1).permutation(len(asked))[: made.n]]
    apart = made.task.endswith("interleaved")
    digits = [made.keep("support", str(d), words_picture(str(d), made.size)) for d in range(10)] if apart else []

    def images(split: str, a: int, b: int) -> list[str]:
        return [digits[a], digits[b]] if apart else [made.keep(split, f"{a}_{b}", words_picture(f"{a} ? {b}", made.size))]

    def results(a: int, b: int) -> list[int]:
        return [a + b, a - b, a * b]

    question = QUESTIONS[made.task]
    queries = [
        {
            "id": k,
            "image": images("query", a, b),
            "question": question,
            "operator": operator,
            "answer": results(a, b)[OPERATORS.index(operator)],
        }
        for k, ((a, b), operator) in enumerate(asked)
    ]
    support = [
        {"id": k, "image": images("support", a, b), "question": question, "answer": results(a, b)}
        for k, (a, b) in enumerate(order[: made.n_support])
    ]
    return queries, support


def _textocr(made: Maker) -> tuple[Rows, Rows]:
    pool = class_ids(made.split, kinds=["texture"])
    words = pseudo_words(made.n + made.n_support, made.draw(5), syllables=(2, 3), distinct_start=False)

    def row(split: str, k: int, word: str, draw: np.random.Generator) -> dict[str, Any]:
        background = Image.fromarray(draw_pictures(pool[draw.integers(len(pool), size=1)], made.size, draw)[0])
        picture, (left, top, right, bottom) = sign_picture(word, pseudo_words(2, draw, syllables=(1, 2)), background, draw)
        box = {"bbox": [left, top, right - left, bottom - top], "points": [left, top, right, top, right, bottom, left, bottom], "area": (right - left) * (bottom - top)}  # fmt: skip
        return {"id": k, "image": [made.keep(split, str(k), picture)], "question": QUESTIONS["textocr"], "answer": word, "width": made.size, "height": made.size, **box}  # fmt: skip

    queries = [row("query", k, words[k], made.draw(5, 0, k)) for k in range(made.n)]
    return queries, [row("support", k, words[made.n + k], made.draw(5, 1, k)) for k in range(made.n_support)]


MAKERS: Mapping[str, Callable[[Maker], tuple[Rows, Rows]]] = {
    "open_mi": _open_mi,
    "matching_mi": _matching,
    "clevr": _clevr,
    "operator_induction": _operators,
    "operator_induction_interleaved": _operators,
    "textocr": _textocr,
}
