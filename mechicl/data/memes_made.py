"""A made-up set in the layout and the logic of the Hateful Memes set, without anything hateful: coloured shapes and plain sentences.

The label is 1 where the text names what the picture shows. Items come in fours: two texts and two pictures, each text with each picture, so that
every text and every picture occurs once with either label: whoever looks at one of the two only is right exactly half of the time. Every positive
item has its benign confounders, as in the published set: the same text with another picture, the same picture with another text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from mechicl.data.folders import fresh_folder
from mechicl.data.looks import FILLS, KINDS, class_ids, signatures
from mechicl.data.memes import LABELS
from mechicl.data.paint import draw_pictures
from mechicl.data.strokes import FORMS
from mechicl.data.words import pseudo_words
from mechicl.errors import OptionError
from mechicl.prompts.episode import Shot

Words = Literal["plain", "made-up"]

COLOURS = ("red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink")
"""Names of the eight hues of `looks.INKS`, in order."""
SHAPES: Mapping[str, str] = {
    "disc": "circle", "square": "square", "triangle": "triangle", "hexagon": "hexagon", "diamond": "diamond", "star5": "star",
    "heart": "heart", "crescent": "moon", "drop": "drop", "plus": "plus", "arrow": "arrow", "bolt": "bolt",
}  # fmt: skip
"""Forms of `strokes.FORMS` that have an everyday name."""
SENTENCES = (
    "look what i found: {}", "nothing beats {} on a monday", "me, waiting for {}", "when somebody asks for {}", "this is {}",
    "they said it would be {}", "i wanted {} and here it is", "nobody is as happy as {}", "my whole day in one picture: {}",
    "good morning from {}", "keep calm and draw {}", "what a day to be {}",
)  # fmt: skip
QUESTION = "Does the text name what the picture shows?"
SIZES: Mapping[str, int] = {"train": 240, "dev": 80, "test": 80}


@dataclass(frozen=True)
class MadeItem:
    """What is shown and what is said. `shows`, `names`: the things (label 1 where they are one); `four`: which four it belongs to."""

    id: str
    split: str
    text: str
    label: int
    shows: str
    names: str
    four: int


@dataclass(frozen=True, eq=False)
class MadeSet:
    """Items with their pictures, `pictures[i]` of `items[i]`."""

    items: tuple[MadeItem, ...]
    pictures: tuple[Image.Image, ...]

    def shots(self, split: str, labels: tuple[str, str] = LABELS) -> list[Shot]:
        """Items of a list, as `Memes.shots` gives them."""
        return [
            Shot(labels[item.label], (picture,), item.text, item=item.id)
            for item, picture in zip(self.items, self.pictures, strict=True)
            if item.split == split
        ]


def draw_memes(sizes: Mapping[str, int] = SIZES, *, size: int = 112, seed: int = 0, words: Words = "plain", n_things: int = 24) -> MadeSet:
    """A made-up set in memory.

    Args:
        sizes: Items of each list; multiples of four.
        size: Side of the pictures, pixels.
        seed: Decides everything.
        words: "plain": things are coloured shapes with their everyday names, which a model that knows English can tell. "made-up": things are
            concepts of any kind with meaningless names, the same throughout the set, which can be learned from examples only.
        n_things: How many different things there are.

    Raises:
        OptionError: sizes that are no multiples of four, pictures below 8 pixels, fewer than two things or more than there are.
    """
    if not sizes or any(n < 4 or n % 4 for n in sizes.values()) or size < 8:
        raise OptionError(
            f"sizes must be multiples of 4, from 4, and size at least 8 pixels; got {dict(sizes)} and {size}. Items come in fours."
        )
    if words not in get_args(Words):
        raise OptionError(f"words must be one of {', '.join(get_args(Words))}; got {words!r}. Pick one of them.")
    draw = np.random.default_rng([seed, 17])
    things = _things(words, n_things, draw)
    names, items, pictures = list(things), [], []
    for split, n in sizes.items():
        for _ in range(n // 4):
            four = len(items) // 4
            two = [names[int(i)] for i in draw.choice(len(names), 2, replace=False)]
            sentence = SENTENCES[int(draw.integers(len(SENTENCES)))]
            shown = [Image.fromarray(one) for one in draw_pictures([things[name] for name in two], size, draw)]
            for j in draw.permutation(4):
                said, seen = two[j // 2], two[j % 2]
                number = f"{len(items):05d}"
                items.append(MadeItem(number, split, sentence.format(_article(said, words)), int(said == seen), seen, said, four))
                pictures.append(shown[j % 2])
    return MadeSet(tuple(items), tuple(pictures))


def write_memes(
    folder: str | Path,
    sizes: Mapping[str, int] = SIZES,
    *,
    size: int = 112,
    seed: int = 0,
    words: Words = "plain",
    n_things: int = 24,
    hide: Sequence[str] = (),
) -> Path:
    """Write a made-up set in the published layout: img/*.png, a list per split, and made.json, which says what each item shows and names.

    Args:
        folder: Must not exist yet, or be empty. Written beside it first, then renamed: no half of it is ever seen.
        sizes, size, seed, words, n_things: See `draw_memes`. The same arguments give the same bytes.
        hide: Lists whose labels are left out, as in a test set whose answers are kept back.

    Returns:
        The folder.

    Raises:
        OptionError: see `draw_memes`, a name of a list that does not begin with train, dev or test, or one to hide that there is not.
        OutputPathError: the folder holds something, or cannot be written.
    """
    if not all(name.startswith(("train", "dev", "test")) and name.replace("_", "").isalnum() for name in sizes) or not set(hide) <= set(
        sizes
    ):
        raise OptionError(
            f"sizes must name lists train*, dev* or test*, and hide some of them; got {list(sizes)} and {list(hide)}. Rename them."
        )
    with fresh_folder(folder) as temporary:
        made = draw_memes(sizes, size=size, seed=seed, words=words, n_things=n_things)
        _write(temporary, made, sizes, set(hide), {"seed": seed, "size": size, "words": words, "n_things": n_things})
    return Path(folder).expanduser()


def _write(folder: Path, made: MadeSet, sizes: Mapping[str, int], hide: set[str], options: Mapping[str, object]) -> None:
    (folder / "img").mkdir()
    lists: dict[str, list[str]] = {split: [] for split in sizes}
    for item, picture in zip(made.items, made.pictures, strict=True):
        picture.save(folder / "img" / f"{item.id}.png")
        row = {"id": item.id, "img": f"img/{item.id}.png", "label": item.label, "text": item.text}
        if item.split in hide:
            del row["label"]
        lists[item.split].append(json.dumps(row))
    for split, lines in lists.items():
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    about = {"options": {**options, "sizes": dict(sizes)}, "items": [asdict(item) for item in made.items]}
    (folder / "made.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _things(words: Words, n: int, draw: np.random.Generator) -> dict[str, int]:
    """Name -> class of picture."""
    every = shapes() if words == "plain" else None
    most = len(every) if every else 70
    if not 2 <= n <= most:
        raise OptionError(f"n_things must be in 2..{most}; got {n}. A four needs two different things.")
    if every is not None:
        names = list(every)
        return {names[int(i)]: every[names[int(i)]] for i in draw.permutation(len(names))[:n]}
    ids = draw.choice(class_ids("held_out"), n, replace=False)
    return {name: int(i) for name, i in zip(pseudo_words(n, draw, syllables=(2, 3)), ids, strict=True)}


@lru_cache(maxsize=1)
def shapes() -> dict[str, int]:
    """ "red star" -> the class of pictures that show one, for every colour and shape that has a name."""
    rows, forms = signatures(), list(FORMS)
    kind, solid = KINDS.index("shape"), FILLS.index("solid")
    found = {}
    for form, word in SHAPES.items():
        for hue, colour in enumerate(COLOURS):
            hit = np.flatnonzero((rows[:, :4] == [kind, forms.index(form), solid, hue]).all(1))
            found[f"{colour} {word}"] = int(hit[0])
    return found


def _article(name: str, words: Words) -> str:
    return name if words == "made-up" else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
