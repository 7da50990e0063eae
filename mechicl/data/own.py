"""Your own pictures with labels, from a folder or a table, as episodes.

    pool = load_own("photos")                      # photos/cat/1.jpg ..., or "table.csv", .tsv, .jsonl, .json, .parquet, or a DataFrame
    episodes = draw(pool, 32, classes=2, shots=2, seed=0)
    scores = mechicl.score_heads(mechicl.load("demo"), episodes)

Everything is looked at before anything is computed. A picture that lies outside of the table's folder (or of `images`) is refused and never opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from mechicl.data.class_folders import FoldersReport, check_class_folders
from mechicl.data.compose import INSTRUCTION, QUESTION
from mechicl.data.link_pool import LinkClass, Pool
from mechicl.data.memes_check import MAX_PIXELS
from mechicl.data.own_table import TableReport, check_table
from mechicl.data.words import pseudo_words
from mechicl.errors import ImageError, OptionError
from mechicl.prompts.episode import Episode, Shot

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Names", "TableReport", "check_own", "check_table", "draw", "load_own", "load_table", "pool_of"]

Names = Literal["own", "words"]
"""own: classes are called by their labels. words: by made-up words of two syllables, new in every episode, so that nothing the model knows of the names helps."""


def load_own(source: str | Path | pd.DataFrame, *, size: int | None = None, least: int = 2, strict: bool = True, max_pixels: int = MAX_PIXELS,
             **table: Any) -> Pool:  # fmt: skip
    """Classes of your own pictures.

    Args:
        source: A folder with a folder for each class, a table's file (.csv, .tsv, .jsonl, .json, .parquet), or a DataFrame.
        size: Pictures are shrunk until no side is longer, pixels; None leaves them as they are.
        least: Fewest usable pictures of a class; an episode of two shots needs three.
        strict: Any problem is an error. Else what cannot be used is left out.
        max_pixels: Larger pictures are a problem.
        **table: For tables: image, label, images, names; see `load_table`.

    Raises:
        ImageError: with the whole report: fewer than two usable classes, or, with `strict`, any problem.
        OptionError: no such file or folder, or options that do not belong to it.
    """
    report = check_own(source, size=size, least=least, max_pixels=max_pixels, **table)
    if len(report.classes) < 2 or (strict and report.problems):
        raise ImageError(
            f"the data must have two classes of {least} readable pictures at least; got\n{report}\n"
            "Repair it, or pass strict=False to leave out what is unusable."
        )
    return pool_of(report, size=size, max_pixels=max_pixels)


def load_table(source: str | Path | pd.DataFrame, *, image: str | None = None, label: str | None = None, images: str | Path | None = None,
               names: Mapping[Any, str] | Sequence[str] | None = None, **options: Any) -> Pool:  # fmt: skip
    """Classes from a table with a picture and a label a row.

    Args:
        source: A file, or a DataFrame.
        image: Column of the pictures: file names, PIL pictures, or bytes as in Parquet files of data sets ({"bytes": ..., "path": ...}). None: the first that is
            called one of `mechicl.data.own_table.IMAGE_COLUMNS`.
        label: Column of the labels. None: likewise, of `LABEL_COLUMNS`.
        images: Folder that file names start from; None: the table's own (for a DataFrame: the working folder).
        names: What labels are called in prompts, e.g. ("cat", "dog") for 0 and 1.
        **options: size, least, strict, max_pixels; see `load_own`.

    Raises:
        ImageError: with the whole report: fewer than two usable classes, or, with `strict`, any problem.
        OptionError: the file cannot be read, or has no such column.
    """
    if isinstance(source, str | Path) and Path(source).expanduser().is_dir():
        raise OptionError(f"a table must be a file or a DataFrame; got the folder {source}. Use load_own for a folder of classes.")
    return load_own(source, image=image, label=label, images=images, names=names, **options)


def check_own(source: str | Path | pd.DataFrame, *, size: int | None = None, least: int = 2, max_pixels: int = MAX_PIXELS,
              **table: Any) -> FoldersReport | TableReport:  # fmt: skip
    """Look at every row and picture once; see `load_own`."""
    if isinstance(source, str | Path) and Path(source).expanduser().is_dir():
        given = [name for name, value in table.items() if value is not None]
        if given:
            raise OptionError(
                f"{', '.join(given)} must be left out for a folder of classes; they are for tables. The folders' names are the labels."
            )
        return check_class_folders(source, least=least, max_pixels=max_pixels)
    return check_table(source, size=size, least=least, max_pixels=max_pixels, **table)


def pool_of(report: FoldersReport | TableReport, *, size: int | None = None, max_pixels: int = MAX_PIXELS) -> Pool:
    """The usable classes of a report.

    Raises:
        ImageError: fewer than two.
    """
    if len(report.classes) < 2:
        raise ImageError(
            f"data must hold pictures of two classes at least; got {len(report.classes)} usable. "
            "Give each class a folder (photos/cat/1.jpg, photos/dog/2.jpg), or a table with a picture and a label a row; mechicl data check says what is wrong."
        )
    if isinstance(report, TableReport):
        return Pool(tuple(LinkClass(name, files) for name, files in report.classes.items()), size, max_pixels, report.source)
    classes = tuple(LinkClass(name, files, key=key) for key, (name, files) in report.classes.items())
    return Pool(classes, size, max_pixels, Path(report.folder).name)


def draw(
    pool: Pool,
    n: int,
    *,
    classes: int = 2,
    shots: int = 2,
    names: Names = "own",
    instruction: str = INSTRUCTION,
    question: str = QUESTION,
    seed: int = 0,
) -> list[Episode]:
    """n episodes: pictures of `classes` classes in random order, then another picture of one of them; no picture twice in an episode.

    Args:
        pool: The classes.
        n: How many episodes; episode k depends on seed and k only.
        classes: In an episode; two of one name never meet.
        shots: Pictures of each.
        names: What classes are called, see `Names`.
        instruction, question: Texts of the prompt; "" for none.
        seed: Decides everything.

    Raises:
        OptionError: numbers out of range, or too few classes with shots + 1 pictures.
        ImageError: a file cannot be read any more.
    """
    if n < 1 or classes < 2 or shots < 0 or names not in get_args(Names):
        raise OptionError(
            f"n must be at least 1, classes 2, shots 0, names one of {', '.join(get_args(Names))}; got {n}, {classes}, {shots}, {names!r}. Correct them."
        )
    rich: dict[str, list[LinkClass]] = {}
    for one in pool.classes:
        if len(one.images) > shots:
            rich.setdefault(one.name, []).append(one)
    if len(rich) < classes:
        raise OptionError(
            f"classes must be at most {len(rich)}, those that have {shots + 1} pictures; got {classes}. Ask for fewer shots or classes."
        )
    return [_episode(pool, list(rich.values()), k, classes, shots, names, instruction, question, seed) for k in range(n)]


def _episode(pool: Pool, rich: Sequence[Sequence[LinkClass]], k: int, classes: int, shots: int, names: Names, instruction: str, question: str,
             seed: int) -> Episode:  # fmt: skip
    draw = np.random.default_rng([seed, 89, k])
    same_name = [rich[int(i)] for i in draw.permutation(len(rich))[:classes]]
    chosen = [few[int(draw.integers(len(few)))] for few in same_name]
    called = [one.name for one in chosen] if names == "own" else pseudo_words(classes, draw, syllables=(2, 2))
    asked = int(draw.integers(classes))
    numbers = [draw.permutation(len(one.images))[: shots + (c == asked)].tolist() for c, one in enumerate(chosen)]
    items = [(c, number) for c in range(classes) for number in numbers[c][:shots]]
    items = [items[int(i)] for i in draw.permutation(len(items))] + [(asked, numbers[asked][-1])]
    every = [Shot(called[c], (pool.picture(chosen[c].key, number),), item=chosen[c].key) for c, number in items]
    return Episode(tuple(every[:-1]), every[-1], tuple(called), instruction, question, id=f"own-{pool.title}/{seed}/{k}")
