"""Few-shot episodes from pictures of classes, whatever the classes are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from mechicl.data.words import pseudo_words
from mechicl.errors import OptionError
from mechicl.prompts.episode import Episode, Shot

INSTRUCTION = "Answer with a single word."
QUESTION = "What is this?"

Choose = Callable[[int, np.random.Generator], Int[np.ndarray, " n"]]
"""(how many, generator) -> different class ids of one episode."""
Paint = Callable[[Int[np.ndarray, " n"], np.random.Generator], UInt8[np.ndarray, "n height width 3"]]
"""(class ids, generator) -> one fresh picture each."""


def compose(
    n: int,
    choose: Choose,
    paint: Paint,
    *,
    classes: int,
    shots: int,
    seed: int,
    name: str,
    labels: Sequence[str] | None = None,
    syllables: tuple[int, int] = (1, 4),
    instruction: str = INSTRUCTION,
    question: str = QUESTION,
    item: Callable[[int], str] = str,
) -> list[Episode]:
    """n episodes: every class `shots` times in random order, then a fresh picture of one of them.

    Args:
        n: Number of episodes.
        choose, paint: Where classes and pictures come from.
        classes, shots: Classes in an episode, and pictures of each.
        seed: Episode k depends on seed and k only, so the first of many is the first of few.
        name: Opens the episodes' ids.
        labels: Names to use in place of new pseudo-words; as many as there are classes, dealt out anew in every episode.
        syllables: Shortest and longest pseudo-word.
        instruction, question: Texts of the prompt; "" for none.
        item: The name of a class, for `Shot.item`.

    Raises:
        OptionError: fewer than two classes, no shots, or labels that do not fit.
    """
    if n < 1 or classes < 2 or shots < 1:
        raise OptionError(
            f"n and shots must be at least 1 and classes at least 2; got n={n}, classes={classes}, shots={shots}. Ask for more."
        )
    if labels is not None and len(set(labels)) != classes:
        raise OptionError(
            f"labels must be {classes} different words, one per class; got {list(labels)}. Give that many, or none for new pseudo-words."
        )
    episodes = []
    for k in range(n):
        draw = np.random.default_rng([seed, k])
        ids = choose(classes, draw)
        names = list(labels) if labels is not None else pseudo_words(classes, draw, syllables=syllables)
        names = [names[i] for i in draw.permutation(classes)]
        order = draw.permutation(np.repeat(np.arange(classes), shots))
        which = np.concatenate([order, draw.integers(classes, size=1)])
        pictures = paint(ids[which], draw)
        every = tuple(
            Shot(label=names[c], images=(Image.fromarray(picture),), item=item(int(ids[c])))
            for c, picture in zip(which, pictures, strict=True)
        )
        episodes.append(Episode(every[:-1], every[-1], tuple(names), instruction, question, id=f"{name}/{seed}/{k}"))
    return episodes
