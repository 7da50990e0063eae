"""Fixed questions for evaluation: two classes with lists of example pictures, a query, and who it is. From a pool here, from a published list in `isekai`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
from PIL import Image

from mechicl.data.link_context import PUBLISHED, Prompt
from mechicl.data.link_pool import Pool
from mechicl.data.memes_check import MAX_PIXELS, open_picture
from mechicl.errors import OptionError
from mechicl.prompts.episode import Episode, Shot

Picture = Path | Image.Image


@dataclass(frozen=True, eq=False)
class LinkTask:
    """One question.

    Attributes:
        id: Names it in reports.
        names: (positive, negative): what the two classes are called in the examples.
        examples: Pictures of the positive class, and of the negative one, in the order in which shots are taken.
        query: The picture to name.
        asked: 0 where the query is of the positive class, 1 where of the negative.
        keys: Keys of the two classes where they come from a pool; the names else.
    """

    id: str
    names: tuple[str, str]
    examples: tuple[tuple[Picture, ...], tuple[Picture, ...]]
    query: Picture
    asked: int = 0
    keys: tuple[str, str] = ("", "")

    @property
    def most(self) -> int:
        """Shots of a class that it has pictures for."""
        return min(map(len, self.examples))

    def episode(
        self, shots: int, *, prompt: Prompt = PUBLISHED, seed: int = 0, size: int | None = None, max_pixels: int = MAX_PIXELS
    ) -> Episode:
        """The question with `shots` examples of each class, the first ones of the lists, in random order; more shots keep the fewer ones.

        Raises:
            OptionError: fewer pictures than shots.
            ImageError: a file cannot be read.
        """
        if not 0 <= shots <= self.most:
            raise OptionError(f"shots must be in 0..{self.most} for task {self.id!r}; got {shots}. Its lists have no more pictures.")

        def shot(picture: Picture, side: int) -> Shot:
            image = picture if isinstance(picture, Image.Image) else open_picture(picture, max_pixels=max_pixels, size=size)
            return Shot(self.names[side], (image,), item=self.keys[side] or self.names[side])

        items = [shot(picture, side) for side in (0, 1) for picture in self.examples[side][:shots]]
        order = np.random.default_rng([seed, 43, *self.id.encode()]).permutation(len(items))
        query = shot(self.query, self.asked)
        return Episode(
            tuple(items[int(i)] for i in order), query, self.names, prompt.instruction, prompt.question, id=self.id, form=prompt.form
        )


def task_episodes(
    tasks: Sequence[LinkTask],
    shots: int,
    *,
    prompt: Prompt = PUBLISHED,
    seed: int = 0,
    size: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> list[Episode]:
    """`LinkTask.episode` of each; see there."""
    return [task.episode(shots, prompt=prompt, seed=seed, size=size, max_pixels=max_pixels) for task in tasks]


def consecutive(pool: Pool) -> list[tuple[str, str]]:
    """Pairs (0, 1), (1, 0), (2, 3), (3, 2), ... of a pool's classes: the protocol of ImageNet-100.

    Raises:
        OptionError: an odd number of classes.
    """
    if len(pool) % 2:
        raise OptionError(f"classes must be even in number to be paired; got {len(pool)}. Leave one out.")
    return [(pool.keys[i], pool.keys[i ^ 1]) for i in range(len(pool))]


def unreal_pairs(pool: Pool) -> list[tuple[str, str]]:
    """Every unreal class against every other one: the protocol of ISEKAI-pair.

    Raises:
        OptionError: fewer than two unreal classes.
    """
    keys = [one.key for one in pool.classes if one.kind == "unreal"]
    if len(keys) < 2:
        raise OptionError(f"the pool must have two unreal classes; it has {len(keys)}. Say kind='unreal' of them.")
    return list(permutations(keys, 2))


def paired_tasks(
    pool: Pool,
    pairs: Sequence[tuple[str, str]],
    *,
    context: int = 16,
    queries: int | None = None,
    both: bool = True,
    fixed: bool = False,
    seed: int = 0,
) -> list[LinkTask]:
    """Questions for pairs of classes of a pool; no query is among the examples.

    Args:
        pool: The classes.
        pairs: (positive, negative) keys: `pool.partners`, `unreal_pairs(pool)`, `consecutive(pool)`, or others.
        context: Pictures in the lists of examples.
        queries: Queries of a class; None: all pictures that are not among its examples (with `fixed`), or all.
        both: Ask for a picture of the negative class too, in turn; else of the positive class only.
        fixed: The examples of a class are the same in every question, as in the ImageNet-100 protocol (with context=32). Else drawn for each.
        seed: Decides everything.

    Raises:
        OptionError: no pairs, a class that is not there or is paired with one of its name, or too few pictures.
    """
    if not pairs or context < 1 or (queries is not None and queries < 1):
        raise OptionError(f"pairs, context and queries must be at least 1; got {len(pairs)}, {context}, {queries}. Ask for some.")
    order = {key: np.random.default_rng([seed, 47, *key.encode()]).permutation(len(pool[key].images)) for pair in pairs for key in pair}
    for key, rows in order.items():
        if len(rows) <= context:
            raise OptionError(f"class {key!r} must have more than {context} pictures; it has {len(rows)}. Take a smaller context.")
    tasks = []
    for positive, negative in pairs:
        if pool[positive].name == pool[negative].name:
            raise OptionError(f"two classes of a pair must have different names; {positive!r} and {negative!r} have not. Pair others.")
        keys, names = (positive, negative), (pool[positive].name, pool[negative].name)
        asked = [order[key][context:] if fixed else order[key] for key in keys]
        n = min(len(rows) for rows in asked[: 1 + both])
        for number in range(n if queries is None else min(queries, n)):
            for side in range(1 + both):
                row, name = int(asked[side][number]), f"{positive} | {negative} | {'positive' if side == 0 else 'negative'} {number}"
                draw = np.random.default_rng([seed, 53, *name.encode()])
                lists = [
                    order[key][:context] if fixed else _others(len(order[key]), row if s == side else -1, context, draw)
                    for s, key in enumerate(keys)
                ]
                examples = tuple(tuple(pool[key].images[int(i)] for i in rows) for key, rows in zip(keys, lists, strict=True))
                tasks.append(LinkTask(name, names, (examples[0], examples[1]), pool[keys[side]].images[row], side, keys))
    return tasks


def _others(n: int, not_this: int, many: int, draw: np.random.Generator) -> np.ndarray:
    rows = draw.permutation(n)
    return rows[rows != not_this][:many]
