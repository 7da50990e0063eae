"""A made-up set of the kind of ISEKAI: unreal concepts, each with a real one that resembles it.

Real is what has an everyday name: a "dotted red star". Its unreal partner is a chimera: the same shape in the same colour, grown together with another shape,
under a name that means nothing. Both are concepts of `mechicl.data.concepts`, with its training and held-out classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image

from mechicl.data.folders import fresh_folder
from mechicl.data.link_pool import LinkClass, Pool
from mechicl.data.looks import FILLS, KINDS, Split, class_ids, look, signatures
from mechicl.data.memes_made import COLOURS, SHAPES, Words
from mechicl.data.paint import draw_pictures
from mechicl.data.strokes import FORMS
from mechicl.data.words import pseudo_words
from mechicl.errors import OptionError

N_GROUPS = 20
PER_CLASS = 32
LOOKS: Mapping[str, str] = {
    "solid": "", "outline": "outlined ", "stripes": "striped ", "checks": "checked ", "dots": "dotted ", "rings": "ringed ",
}  # fmt: skip
"""`looks.FILLS` in words."""


@lru_cache(maxsize=3)
def partners(split: Split) -> tuple[tuple[str, int, tuple[int, ...]], ...]:
    """(name, class, chimeras) of every named shape of a split for which the split has chimeras: classes of pairs whose larger shape is it."""
    rows, forms, ids = signatures(), list(FORMS), class_ids(split)
    shapes = {tuple(int(v) for v in rows[i, 1:4]): int(i) for i in ids if rows[i, 0] == KINDS.index("shape")}
    pairs: dict[tuple[int, int], list[int]] = {}
    for i in ids[rows[ids, 0] == KINDS.index("pair")]:
        pairs.setdefault((int(rows[i, 1]), int(rows[i, 3])), []).append(int(i))
    found = []
    for fill, word in LOOKS.items():
        for form, noun in SHAPES.items():
            for hue, colour in enumerate(COLOURS):
                at, twins = (forms.index(form), FILLS.index(fill), hue), pairs.get((forms.index(form), hue), [])
                if at in shapes and twins:
                    alike = [
                        twin for twin in twins if look(twin).paper == look(shapes[at]).paper
                    ]  # on the same ground, where there are any
                    found.append((f"{word}{colour} {noun}", shapes[at], tuple(alike or twins)))
    return tuple(found)


def generated_pool(
    seed: int = 0,
    n_groups: int = N_GROUPS,
    per_class: int = PER_CLASS,
    size: int = 56,
    *,
    split: Split = "held_out",
    names: Words = "plain",
) -> Pool:
    """`n_groups` unreal concepts with their real partners, in memory.

    Args:
        seed: Decides concepts, names and pictures.
        n_groups: Pairs; half as many as classes.
        per_class: Pictures of each class.
        size: Side of the pictures, pixels.
        split: "held_out" for concepts that the bundled models were not trained on, "train", or "all".
        names: What real concepts are called. "plain": everyday words ("dotted red star"). "made-up": a word without meaning, as unreal ones are, all of two
            syllables, and episodes rename to such words too. The bundled models know no words, and of labels of different lengths they say the shorter one.

    Raises:
        OptionError: fewer than one group or picture, or more groups than the split has.
    """
    if n_groups < 1 or per_class < 1:
        raise OptionError(f"n_groups and per_class must be at least 1; got {n_groups} and {per_class}. The published set has 20 and 32.")
    draw = np.random.default_rng([seed, 31])
    chosen = _choose(n_groups, split, draw)
    if len(chosen) < n_groups:
        raise OptionError(f"n_groups must be at most {len(chosen)} with this split and seed; got {n_groups}. Ask for fewer.")
    if names not in get_args(Words):
        raise OptionError(f"names must be one of {', '.join(get_args(Words))}; got {names!r}. Pick one of them.")
    lengths, many = ((2, 3), n_groups) if names == "plain" else ((2, 2), 2 * n_groups)
    words = pseudo_words(many, draw, syllables=lengths, distinct_start=many <= 70)
    classes = []
    for number, (name, (real, real_id, unreal_id)) in enumerate(zip(words, chosen, strict=False)):
        real = real if names == "plain" else words[n_groups + number]
        pictures = draw_pictures(np.repeat([unreal_id, real_id], per_class), size, draw)
        images = tuple(Image.fromarray(one) for one in pictures)
        group = f"group-{number:02d}"
        classes.append(LinkClass(name, images[:per_class], kind="unreal", group=group))
        classes.append(LinkClass(real, images[per_class:], kind="real", group=group))
    return Pool(tuple(classes), title=f"generated-{split}", labels="letters" if names == "plain" else "syllables")


def _choose(n: int, split: Split, draw: np.random.Generator) -> list[tuple[str, int, int]]:
    """(real name, real class, unreal class), no class twice."""
    ways = partners(split)
    chosen: list[tuple[str, int, int]] = []
    taken: set[int] = set()
    for i in draw.permutation(len(ways)):
        name, real, twins = ways[int(i)]
        free = [twin for twin in twins if twin not in taken]
        if free and len(chosen) < n:
            twin = free[int(draw.integers(len(free)))]
            taken.add(twin)
            chosen.append((name, real, twin))
    return chosen


def write_isekai(
    folder: str | Path,
    *,
    seed: int = 0,
    n_groups: int = N_GROUPS,
    per_class: int = PER_CLASS,
    size: int = 112,
    pairs: int = 10,
    context: int = 16,
    queries: int = 4,
    split: Split = "held_out",
) -> Path:
    """Write a made-up set in the published format.

    ISEKAI-10.json, ISEKAI-pair.json, a folder of pictures for each category, and made.json, which says what is what.

    ISEKAI-10 asks every one of the first `pairs` unreal concepts against its real partner, ISEKAI-pair against every other of them. Queries of either side come
    in turn. The folders of pictures can also be read by `mechicl.data.class_folders`.

    Args:
        folder: Must not exist yet, or be empty. Written beside it first, then renamed: no half of it is ever seen.
        seed, n_groups, per_class, size, split: See `generated_pool`. The same arguments give the same bytes.
        pairs: Unreal concepts in the lists; at least two.
        context: Pictures in positive_list and negative_list.
        queries: Queries of either side of a pair.

    Returns:
        The folder.

    Raises:
        OptionError: see `generated_pool`; too few groups for `pairs`, or too few pictures for `context` and a query.
        OutputPathError: the folder holds something, or cannot be written.
    """
    from mechicl.data.link_tasks import paired_tasks, unreal_pairs  # they are built on pools, as this is

    if not 2 <= pairs <= n_groups:
        raise OptionError(f"pairs must be in 2..{n_groups}, the number of groups; got {pairs}. The published lists have 10.")
    pool = generated_pool(seed, n_groups, per_class, size, split=split)
    files = {
        id(picture): f"{one.name.replace(' ', '_')}/{number:02d}.png" for one in pool.classes for number, picture in enumerate(one.images)
    }
    first = pool.take(key for pair in pool.partners[:pairs] for key in pair)
    asked = {"ISEKAI-10": first.partners, "ISEKAI-pair": unreal_pairs(first)}
    lists = {name: paired_tasks(first, of, context=context, queries=queries, seed=seed) for name, of in asked.items()}
    with fresh_folder(folder) as temporary:
        for one in pool.classes:
            (temporary / one.name.replace(" ", "_")).mkdir()
            for picture in one.images:
                assert isinstance(picture, Image.Image)
                picture.save(temporary / files[id(picture)])
        for name, tasks in lists.items():
            rows = [
                {
                    "image_name": files[id(task.query)],
                    "label_name": task.names[task.asked],
                    "positive_list": [files[id(picture)] for picture in task.examples[0]],
                    "negative_list": [files[id(picture)] for picture in task.examples[1]],
                    "positive_promt": task.names[0],
                    "negative_promt": task.names[1],
                }
                for task in tasks
            ]
            (temporary / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        options = {
            "seed": seed,
            "n_groups": n_groups,
            "per_class": per_class,
            "size": size,
            "pairs": pairs,
            "context": context,
            "queries": queries,
            "split": split,
        }
        about = {"options": options, "classes": [{"name": one.name, "kind": one.kind, "group": one.group} for one in pool.classes]}
        (temporary / "made.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return Path(folder).expanduser()


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m mechicl.data.isekai_made OUT`: write a set, read it back, say what it holds."""
    import argparse
    import sys

    from mechicl.data.isekai import load_isekai
    from mechicl.errors import MechiclError

    parser = argparse.ArgumentParser(description="Write a made-up set in the format of ISEKAI.")
    parser.add_argument("out", help="folder; new or empty")
    for name, value in (
        ("seed", 0),
        ("groups", N_GROUPS),
        ("per-class", PER_CLASS),
        ("size", 112),
        ("pairs", 10),
        ("context", 16),
        ("queries", 4),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--split", default="held_out", choices=("train", "held_out", "all"))
    given = parser.parse_args(arguments)
    try:
        out = write_isekai(
            given.out, seed=given.seed, n_groups=given.groups, per_class=given.per_class, size=given.size, pairs=given.pairs, context=given.context,
            queries=given.queries, split=given.split,
        )  # fmt: skip
        sys.stdout.write(f"{load_isekai(out).report}\n")
    except MechiclError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
