"""Memes that the user has on disk, in the layout of the Hateful Memes set: FOLDER/img/*, FOLDER/train.jsonl, dev*.jsonl, test*.jsonl.

A line is {"id": ..., "img": "img/01235.png", "label": 0 or 1, "text": "..."}; the label may be missing (a test set whose answers are kept back). The
set itself is not part of mechicl; `mechicl.data.memes_made` writes a harmless one of the same layout and logic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mechicl.data.memes_check import MAX_PIXELS, Meme, MemesReport, Problem, check_memes, open_picture
from mechicl.errors import ImageError, OptionError
from mechicl.prompts.episode import Shot

__all__ = ["LABELS", "Meme", "Memes", "MemesReport", "Problem", "check_memes", "load_memes"]

LABELS = ("benign", "hateful")
"""Words for the labels 0 and 1."""


@dataclass(frozen=True, eq=False)
class Memes:
    """A checked folder; pictures are read when they are asked for."""

    report: MemesReport
    max_pixels: int = MAX_PIXELS

    def __getitem__(self, split: str) -> tuple[Meme, ...]:
        """The lines of a list.

        Raises:
            OptionError: there is no such list.
        """
        if split not in self.report.splits:
            raise OptionError(f"split must be one of {', '.join(self.report.splits)}; got {split!r}. Pick a list that the folder has.")
        return self.report.splits[split]

    def shots(
        self, split: str, n: int | None = None, *, labels: tuple[str, str] = LABELS, size: int | None = None, seed: int | None = None
    ) -> list[Shot]:
        """Items with picture, text and label word, ready for episodes.

        Args:
            split: Which list.
            n: At most so many; None for all.
            labels: Words for 0 and 1. Neutral ones ("no", "yes") keep what the model thinks of the words out of the answer.
            size: Pictures are shrunk until no side is longer, pixels; None leaves them as they are (all of them are kept in memory).
            seed: Draw the n lines at random; None takes the first.

        Raises:
            OptionError: no such list, n or size below 1, or labels that are not two different words.
            ImageError: a line has no label, or a picture cannot be read any more.
        """
        if (n is not None and n < 1) or (size is not None and size < 8) or len(set(labels)) != 2:
            raise OptionError(f"n must be at least 1, size at least 8, labels two different words; got {n}, {size}, {labels}. Change them.")
        memes = self[split]
        if seed is not None:
            memes = tuple(memes[i] for i in np.random.default_rng(seed).permutation(len(memes)))
        memes = memes[:n]
        bare = [meme.id for meme in memes if meme.label is None]
        if bare:
            raise ImageError(
                f"items of {split} must have labels to be marked; {len(bare)} have none, the first is {bare[0]}. Use a list with labels, such as dev."
            )
        return [
            Shot(labels[int(meme.label or 0)], (open_picture(meme.path, max_pixels=self.max_pixels, size=size),), meme.text, item=meme.id)
            for meme in memes
        ]


def load_memes(folder: str | Path, *, splits: Sequence[str] | None = None, strict: bool = True, max_pixels: int = MAX_PIXELS) -> Memes:
    """A folder whose every line and picture has been looked at.

    Args:
        folder: Holds img/ and the lists.
        splits: Names of lists ("train", "dev_seen", ...); None for all there are.
        strict: Any problem is an error. Else what cannot be used is left out and stays in `report.problems`.
        max_pixels: Larger pictures are a problem.

    Raises:
        ImageError: with the whole report: no such folder or list, nothing usable, or, with `strict`, any problem.
    """
    report = check_memes(folder, splits=splits, max_pixels=max_pixels)
    if not any(report.splits.values()) or (strict and report.problems):
        raise ImageError(
            f"folder must hold img/ and lists of id, img, label and text whose pictures can all be read; got\n{report}\n"
            "Repair it, or pass strict=False to leave out what is unusable."
        )
    return Memes(report, max_pixels)
