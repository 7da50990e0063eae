"""What the link is worth: with wrong labels among the examples, by where the informative ones stand, and against a name that the model knows already."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from mechicl.analysis.guarded import guarded
from mechicl.analysis.link.answers import How
from mechicl.analysis.link.settings import Job, Setting, run_settings
from mechicl.errors import EpisodeError, OptionError
from mechicl.prompts.episode import Episode, Shot, check_episodes
from mechicl.results import LinkScores

Wrong = Literal["swap", "random"]
"""What a wrong label is. swap: the next candidate's, so that all labels wrong are a consistent link to the wrong name. random: any candidate's, the right one
included, so that all of them say nothing."""
Empty = Literal["blank", "labels"]
"""How examples are made to say nothing. blank: a grey picture of the same size takes the picture's place; tokens and labels stay. labels: every other example of
a class gets another class's label; pictures stay."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
THIRDS = ("first", "middle", "last")
GREY = (127, 127, 127)


@guarded
def label_corruption(
    model: Any,
    episodes: Sequence[Episode],
    shares: Sequence[float] = SHARES,
    *,
    how: Wrong = "swap",
    generate: bool = True,
    max_new_tokens: int | None = None,
    baselines: bool = True,
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> LinkScores:
    """Accuracy as more and more of the examples' labels are wrong, the same episodes and the same order of examples throughout.

    A model that learns the link from its examples falls below chance when most labels are swapped, because it follows them: `LinkScore.follows` says how
    often the answer is the label that most examples of the query's class carry. A model that answers from what it knew before does not move.

    Args:
        model: See `evaluate_link`.
        episodes: With examples, e.g. `link_questions(pool, 8)`.
        shares: Of each class's examples, 0 to 1, rounded to whole examples; those wrong at a share are wrong at every higher one.
        how: See `Wrong`.
        generate, max_new_tokens, baselines, out, seed, batch_size, task, progress: See `evaluate_link`.

    Returns:
        LinkScores; `row.x` is the share as asked.

    Raises:
        OptionError: shares out of range, or `how` does not exist.
        EpisodeError: episodes without examples of two classes.

    Source:
        Tai et al. 2024: .78 with all labels right, .00 with none. Differs: both kinds of wrong labels, and `follows`.
    """
    if how not in get_args(Wrong):
        raise OptionError(f"how must be one of {', '.join(get_args(Wrong))}; got {how!r}. swap makes a consistent wrong link.")
    wanted = sorted(set(shares))
    if not wanted or wanted[0] < 0 or wanted[-1] > 1:
        raise OptionError(f"shares must be between 0 and 1; got {list(shares)}. 0.25 is every fourth label.")
    check_episodes(episodes, images=False)
    settings = [Setting(f"{100 * s:g} % wrong", s, [corrupt_labels(e, s, how, seed, k) for k, e in enumerate(episodes)]) for s in wanted]
    job = _job("share of wrong labels", f"labels wrong: {how}", generate, max_new_tokens, baselines, seed, batch_size, task, progress)
    return run_settings(model, settings, job, out=out)


def corrupt_labels(episode: Episode, share: float, how: Wrong = "swap", seed: int = 0, number: int = 0) -> Episode:
    """The episode with a share of each class's labels wrong; the query's answer stays. `number` tells episodes without an id apart."""
    draw = np.random.default_rng([seed, 67, number, *episode.id.encode()])
    names, shots = list(episode.candidates), list(episode.shots)
    for label in dict.fromkeys(shot.label for shot in episode.shots):
        places = [k for k, shot in enumerate(episode.shots) if shot.label == label]
        order, drawn = draw.permutation(len(places)), draw.integers(len(names), size=len(places))
        for j in order[: int(share * len(places) + 0.5)].tolist():
            wrong = names[(names.index(label) + 1) % len(names)] if how == "swap" else names[int(drawn[j])]
            shots[places[j]] = replace(shots[places[j]], label=wrong)
    return replace(episode, shots=tuple(shots))


@guarded
def informative_position(
    model: Any,
    episodes: Sequence[Episode],
    *,
    how: Empty = "blank",
    generate: bool = True,
    max_new_tokens: int | None = None,
    baselines: bool = True,
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> LinkScores:
    """Accuracy when only the first, middle or last third of the examples says anything, or all but that third; beside all of them and none.

    Examples are put in order anew, so that every third has each class's share of them: else a third could lack the query's class.

    Args:
        model: See `evaluate_link`.
        episodes: With three examples of each class at least.
        how: See `Empty`.
        generate, max_new_tokens, baselines, out, seed, batch_size, task, progress: See `evaluate_link`.

    Raises:
        OptionError: `how` does not exist.
        EpisodeError: too few examples, or nothing to blank.
    """
    if how not in get_args(Empty):
        raise OptionError(f"how must be one of {', '.join(get_args(Empty))}; got {how!r}. blank leaves every label where it is.")
    check_episodes(episodes, images=False)
    thirds = [_thirds(episode, seed, k) for k, episode in enumerate(episodes)]
    if how == "blank" and not all(shot.images for episode in episodes for shot in episode.shots):
        raise EpisodeError("every example must have a picture to be blanked; one has none. Use how='labels'.")
    single, double = [(k,) for k in range(3)], [(0, 1), (0, 2), (1, 2)]
    settings = []
    for kept in [(), *single, *double, (0, 1, 2)]:
        name = {0: "none", 1: "{} third only", 2: "all but the {} third", 3: "all"}[len(kept)]
        which = kept if len(kept) == 1 else [k for k in range(3) if k not in kept]
        made = [_only(e, parts, kept, how, seed, k) for k, (e, parts) in enumerate(zip(episodes, thirds, strict=True))]
        settings.append(Setting(name.format(THIRDS[which[0]] if which else ""), float("nan"), made))
    job = _job("informative examples", f"others {how}", generate, max_new_tokens, baselines, seed, batch_size, task, progress)
    return run_settings(model, settings, job, out=out)


def _thirds(episode: Episode, seed: int, number: int) -> list[list[Shot]]:
    """First, middle and last third, each with its share of every class, in random order."""
    draw = np.random.default_rng([seed, 71, number, *episode.id.encode()])
    parts: list[list[Shot]] = [[], [], []]
    for label in dict.fromkeys(shot.label for shot in episode.shots):
        some = [shot for shot in episode.shots if shot.label == label]
        if len(some) < 3:
            raise EpisodeError(
                f"episode {episode.id or number}: every class must have 3 examples, one for each third; {label!r} has {len(some)}. Draw more shots."
            )
        for part, rows in zip(parts, np.array_split(np.arange(len(some)), 3), strict=True):
            part += [some[int(i)] for i in rows]
    return [[part[int(i)] for i in draw.permutation(len(part))] for part in parts]


def _only(episode: Episode, parts: Sequence[Sequence[Shot]], kept: Sequence[int], how: Empty, seed: int, number: int) -> Episode:
    shots: list[Shot] = []
    for k, part in enumerate(parts):
        draw = np.random.default_rng([seed, 73, number, k, *episode.id.encode()])
        shots += part if k in kept else [_blank(shot) for shot in part] if how == "blank" else _unlinked(part, episode.candidates, draw)
    return replace(episode, shots=tuple(shots))


def _blank(shot: Shot) -> Shot:
    return replace(shot, images=tuple(Image.new("RGB", image.size, GREY) for image in shot.images), item="")


def _unlinked(part: Sequence[Shot], names: Sequence[str], draw: np.random.Generator) -> list[Shot]:
    """Half of each class's examples under the next label; where they are odd in number, one coin for all classes says whether the larger half."""
    shots, coin = list(part), int(draw.integers(2))
    for label in dict.fromkeys(shot.label for shot in part):
        places = [k for k, shot in enumerate(part) if shot.label == label]
        many = (len(places) + coin * (len(places) % 2)) // 2
        for k in draw.permutation(places)[:many].tolist():
            shots[k] = replace(shots[k], label=names[(list(names).index(label) + 1) % len(names)])
    return shots


def _job(
    axis: str, protocol: str, generate: bool, limit: int | None, baselines: bool, seed: int, batch_size: int, task: str, progress: bool
) -> Job:
    return Job(
        axis=axis, protocol=protocol, how=How("full", generate, limit), batch_size=batch_size, seed=seed, follows=True, baselines=baselines, task=task, progress=progress
    )  # fmt: skip
