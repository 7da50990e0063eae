"""Tasks on which induction heads and function-vector heads are held against each other: every task has many functions, each fixed over its episodes.

A function vector is what a head says about a task apart from any one prompt, so it can only be found where all episodes of a function share what is to be
done. Two sorts of tasks, because the two papers speak of different ones:

copied      the right label stands among the examples (Huang et al. 2026: which made-up name belongs to the picture); an induction head can copy it
not copied  the examples only show what is to be done (Yin and Steinhardt 2025: the opposite of a word); the answer is no label of the prompt
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mechicl.data import digits
from mechicl.data.compose import INSTRUCTION, QUESTION, compose
from mechicl.data.looks import class_ids
from mechicl.data.paint import draw_pictures
from mechicl.data.words import pseudo_words
from mechicl.errors import OptionError
from mechicl.prompts.episode import Episode, Shot

SIZE = 28
"""Side of the pictures, pixels, where none is asked for."""


@dataclass(frozen=True)
class Draw:
    """What is asked of a task: `n` episodes of function number `function`, each of `classes` classes and `shots` examples a class."""

    function: int
    n: int
    classes: int
    shots: int
    size: int
    seed: int


@dataclass(frozen=True)
class OddsTask:
    """A task with as many functions as are asked for.

    Attributes:
        name: What to call it.
        draw: Episodes of one function; the same `Draw` gives the same episodes, and no two functions share classes and names.
        copied: Whether the right label stands among the examples of every episode.
    """

    name: str
    draw: Callable[[Draw], Sequence[Episode]]
    copied: bool


def concepts(asked: Draw) -> list[Episode]:
    """Held-out concepts: a function is a few of them with their made-up names."""
    rng = np.random.default_rng([asked.seed, asked.function, 1])
    chosen = rng.choice(class_ids("held_out"), asked.classes, replace=False)
    return _named(asked, "concepts", chosen, lambda ids, draw: draw_pictures(ids, asked.size, draw), rng)


def real_digits(asked: Draw) -> list[Episode]:
    """Real handwritten digits: a function is a few of the ten with their made-up names."""
    rng = np.random.default_rng([asked.seed, asked.function, 2])
    chosen = rng.choice(10, asked.classes, replace=False)
    return _named(asked, "digits", chosen, lambda ids, draw: digits.draw_pictures(ids, asked.size, draw), rng)


def words(asked: Draw) -> list[Episode]:
    """No pictures: a function is a few made-up words with their made-up names."""
    rng = np.random.default_rng([asked.seed, asked.function, 3])
    items = pseudo_words(asked.classes, rng, syllables=(2, 2))
    names = pseudo_words(asked.classes, rng, syllables=(2, 2), avoid=items)
    found = []
    for k in range(asked.n):
        draw = np.random.default_rng([asked.seed, asked.function, k])
        order = [*draw.permutation(np.repeat(np.arange(asked.classes), asked.shots)).tolist(), int(draw.integers(asked.classes))]
        every = tuple(Shot(label=names[c], text=items[c], item=items[c]) for c in order)
        found.append(Episode(every[:-1], every[-1], tuple(names), INSTRUCTION, QUESTION, id=f"words/{asked.seed}/{asked.function}/{k}"))
    return found


PAIRS: Mapping[str, tuple[str, ...]] = {
    "opposite": ("hot cold", "big small", "up down", "fast slow", "old new", "good bad", "day night", "wet dry", "rich poor", "left right", "open closed", "true false", "early late",
                 "hard soft", "high low", "long short", "full empty", "light dark"),
    "plural": ("cat cats", "dog dogs", "box boxes", "child children", "man men", "tree trees", "foot feet", "city cities", "book books", "mouse mice", "leaf leaves", "car cars",
               "house houses", "tooth teeth", "baby babies", "bus buses", "knife knives", "goose geese"),
    "past": ("go went", "see saw", "eat ate", "run ran", "take took", "sing sang", "walk walked", "write wrote", "buy bought", "give gave", "make made", "find found", "come came",
             "drink drank", "fly flew", "know knew", "speak spoke", "play played"),
    "capital": ("France Paris", "Italy Rome", "Japan Tokyo", "Spain Madrid", "Egypt Cairo", "Russia Moscow", "Germany Berlin", "Greece Athens", "Peru Lima", "Cuba Havana",
                "Norway Oslo", "Kenya Nairobi", "Austria Vienna", "China Beijing", "Portugal Lisbon", "Ireland Dublin", "Poland Warsaw", "Sweden Stockholm"),
    "French": ("dog chien", "cat chat", "house maison", "water eau", "book livre", "red rouge", "milk lait", "bread pain", "tree arbre", "day jour", "night nuit", "sun soleil",
               "hand main", "king roi", "green vert", "fish poisson", "black noir", "friend ami"),
    "ordinal": ("one first", "two second", "three third", "four fourth", "five fifth", "six sixth", "seven seventh", "eight eighth", "nine ninth", "ten tenth",
                "eleven eleventh", "twelve twelfth", "thirteen thirteenth", "fourteen fourteenth", "fifteen fifteenth", "sixteen sixteenth", "twenty twentieth", "thirty thirtieth"),
    "animal young": ("dog puppy", "cat kitten", "cow calf", "sheep lamb", "horse foal", "lion cub", "goat kid", "pig piglet", "duck duckling", "deer fawn", "goose gosling",
                     "frog tadpole", "hen chick", "kangaroo joey", "eagle eaglet", "owl owlet", "swan cygnet", "butterfly caterpillar"),
    "person": ("teach teacher", "sing singer", "write writer", "bake baker", "drive driver", "dance dancer", "paint painter", "farm farmer", "build builder", "run runner", "play player",
               "swim swimmer", "lead leader", "own owner", "act actor", "visit visitor", "invent inventor", "sail sailor"),
}  # fmt: skip
"""Functions that a language model knows, as Todd et al. (2024) use them; a few common pairs of each, ours."""


def known_words(asked: Draw) -> list[Episode]:
    """Words with a function that language models know (opposite, plural, capital, ...); the answer is not in the prompt."""
    names = sorted(PAIRS)
    name = names[asked.function % len(names)]
    pairs = [tuple(pair.split()) for pair in PAIRS[name]]
    n_shots = asked.classes * asked.shots
    if n_shots + 1 > len(pairs):
        raise OptionError(
            f"classes x shots must be at most {len(pairs) - 1} for known words; got {asked.classes} x {asked.shots}. Ask for fewer, or leave the task out."
        )
    found = []
    for k in range(asked.n):
        draw = np.random.default_rng([asked.seed, asked.function, k])
        some = [pairs[i] for i in draw.permutation(len(pairs))]
        every = tuple(Shot(label=b, text=a, item=a) for a, b in some[: n_shots + 1])
        candidates = tuple(dict.fromkeys((every[-1].label, *(shot.label for shot in every[:-1]))))
        found.append(
            Episode(every[:-1], every[-1], candidates, INSTRUCTION, "", id=f"known words/{name}/{asked.seed}/{asked.function}/{k}")
        )
    return found


def operator(asked: Draw) -> list[Episode]:
    """A picture of two digits and a number under it: plus, minus (the larger less the smaller) or times, which the examples must tell. In the manner of VL-ICL's operator induction.

    Numbers have two figures ("08"), so that none is the beginning of another.
    """
    rules: tuple[Callable[[int, int], int], ...] = (lambda a, b: a + b, lambda a, b: abs(a - b), lambda a, b: a * b)
    rule = asked.function % len(rules)
    found = []
    for k in range(asked.n):
        draw = np.random.default_rng([asked.seed, asked.function, k])
        drawn: list[tuple[int, int, list[int]]] = []  # the query first: no example may show its answer
        while len(drawn) < asked.classes * asked.shots + 1:
            a, b = (int(x) for x in draw.integers(0, 10, 2))
            answers = [of(a, b) for of in rules]
            shown = {one[2][rule] for one in drawn[1:]}
            one_label = len(drawn) == asked.classes * asked.shots and len(shown | {answers[rule]}) < 2
            copied = bool(drawn) and answers[rule] == drawn[0][2][rule]
            if len(set(answers)) == len(rules) and not copied and not one_label:  # else the picture does not tell which was meant
                drawn.append((a, b, answers))
        every = [
            Shot(label=f"{answers[rule]:02d}", images=(_two_digits(a, b, asked.size, draw),), item=f"{a} ? {b}") for a, b, answers in drawn
        ]
        candidates = tuple(dict.fromkeys([*(f"{x:02d}" for x in drawn[0][2]), *(shot.label for shot in every)]))
        found.append(Episode(tuple(every[1:]), every[0], candidates, INSTRUCTION, "", id=f"operator/{'+-*'[rule]}/{asked.seed}/{asked.function}/{k}"))  # fmt: skip
    return found


TASKS: dict[str, OddsTask] = {
    "concepts": OddsTask("concepts", concepts, True),
    "digits": OddsTask("digits", real_digits, True),
    "words": OddsTask("words", words, True),
    "known words": OddsTask("known words", known_words, False),
    "operator": OddsTask("operator", operator, False),
}
"""By name."""


def pick(tasks: Sequence[str | OddsTask]) -> list[OddsTask]:
    """The tasks asked for, by name or as they are.

    Raises:
        OptionError: an unknown name, one twice, or none.
    """
    unknown = [task for task in tasks if isinstance(task, str) and task not in TASKS]
    if unknown or not tasks:
        raise OptionError(f"tasks must be among {', '.join(TASKS)}, or OddsTask; got {unknown or 'none'}. Name at least one.")
    found = [TASKS[task] if isinstance(task, str) else task for task in tasks]
    names = [task.name for task in found]
    if len(set(names)) < len(names):
        raise OptionError(f"tasks must differ in their names; got {names}. Name each once.")
    return found


def _named(
    asked: Draw, name: str, ids: np.ndarray, paint: Callable[[Any, np.random.Generator], np.ndarray], rng: np.random.Generator
) -> list[Episode]:
    """Episodes of always the same classes under always the same names."""
    names = pseudo_words(asked.classes, rng, syllables=(2, 2))
    drawn = compose(
        asked.n, lambda many, draw: ids, paint, classes=asked.classes, shots=asked.shots, seed=int(rng.integers(1 << 30)), name=f"{name}/{asked.function}", labels=names,
        item=str,
    )  # fmt: skip
    fixed = dict(zip((str(int(i)) for i in ids), names, strict=True))
    return [_renamed(episode, fixed) for episode in drawn]


def _renamed(episode: Episode, fixed: Mapping[str, str]) -> Episode:
    """Every item under its own name: `compose` deals the names anew in each episode."""
    every = [Shot(label=fixed[s.item], images=s.images, text=s.text, item=s.item) for s in (*episode.shots, episode.query)]
    return Episode(tuple(every[:-1]), every[-1], tuple(fixed.values()), episode.instruction, episode.question, id=episode.id)


def _two_digits(a: int, b: int, size: int, draw: np.random.Generator) -> Image.Image:
    """Two scans side by side, in a square."""
    half = max(8, size // 2)
    both = np.concatenate(list(digits.draw_pictures([a, b], half, draw)), 1)
    paper = np.zeros((2 * half, 2 * half, 3), np.uint8)
    paper[half // 2 : half // 2 + half] = both
    return Image.fromarray(paper).resize((size, size), Image.Resampling.BICUBIC)
