"""`evaluate_link`: does a model name a picture by the link that its examples make? Over shots, beside baselines, on the same queries."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from mechicl.analysis.guarded import guarded
from mechicl.analysis.labels import LabelScore
from mechicl.analysis.link.answers import How, Rule
from mechicl.analysis.link.settings import Job, Setting, check_settings, cost, run_settings
from mechicl.analysis.statistics import holm, mcnemar_p, paired_change
from mechicl.data.link_context import PUBLISHED, Neighbours, Pool, Prompt, pseudo_label
from mechicl.data.link_tasks import LinkTask, Picture, consecutive, paired_tasks, unreal_pairs
from mechicl.data.memes_check import open_picture
from mechicl.data.words import pseudo_words
from mechicl.errors import EpisodeError, OptionError
from mechicl.prompts.episode import Episode
from mechicl.results import LinkChange, LinkCost, LinkScores

Protocol = Literal["isekai-10", "isekai-pair", "class-folders", "episodes"]
"""isekai-10: every unreal class against its real partner. isekai-pair: every unreal class against every other one. class-folders: classes 0 and 1, 2 and 3, ...
against each other with fixed examples (the ImageNet-100 protocol), or, with `neighbours`, each class against its most similar one. episodes: as given."""
Labels = Literal["own", "positive", "words"]
"""own: classes are called by their names. positive: the positive class by a random string, as in training. words: both by made-up words of two
syllables, all that the bundled model can say. Made-up names are new in every question."""
SHOTS = (0, 1, 2, 4, 8, 16)
"""Of each class."""


def link_tasks(
    pool: Pool,
    n: int,
    *,
    protocol: Protocol = "isekai-10",
    context: int = 16,
    neighbours: Neighbours | None = None,
    labels: Labels = "own",
    seed: int = 0,
) -> list[LinkTask]:
    """n questions of a protocol, half with a query of the positive class and half of the negative one, evenly over the pairs of classes.

    Args:
        pool: The classes.
        n: How many questions; rounded up to an even number, and fewer where the pool has not as many pictures.
        protocol: How classes are paired.
        context: Pictures of each class that a question can show.
        neighbours: For "class-folders": each class against its most similar one.
        labels: What the classes are called, see `Labels`.
        seed: Decides everything.

    Raises:
        OptionError: a protocol that the pool cannot give, or too few pictures.
    """
    pairs, fixed = _pairs(pool, protocol, neighbours), protocol == "class-folders"
    if n < 1:
        raise OptionError(f"n must be at least 1; got {n}. Ask for more questions.")
    if labels not in get_args(Labels):
        raise OptionError(f"labels must be one of {', '.join(get_args(Labels))}; got {labels!r}. own keeps the classes' names.")
    every = paired_tasks(pool, pairs, context=context, queries=math.ceil(n / (2 * len(pairs))), fixed=fixed, seed=seed)
    couples = [every[i : i + 2] for i in range(0, len(every), 2)]  # a positive query and a negative one
    chosen = np.random.default_rng([seed, 59]).permutation(len(couples))[: math.ceil(n / 2)]
    tasks = [task for i in sorted(chosen.tolist()) for task in couples[i]]
    return [replace(task, names=_names(task, labels, np.random.default_rng([seed, 61, k]))) for k, task in enumerate(tasks)]


def _names(task: LinkTask, labels: Labels, draw: np.random.Generator) -> tuple[str, str]:
    if labels == "words":
        first, second = pseudo_words(2, draw, syllables=(2, 2))  # of one length: else the shorter one is the likelier
        return first, second
    return (pseudo_label(draw, avoid=task.names[1]), task.names[1]) if labels == "positive" else task.names


def _pairs(pool: Pool, protocol: str, neighbours: Neighbours | None) -> list[tuple[str, str]]:
    if protocol not in ("isekai-10", "isekai-pair", "class-folders"):
        raise OptionError(f"protocol must be one of {', '.join(get_args(Protocol)[:3])} for a pool; got {protocol!r}. Pick one of them.")
    if neighbours is not None and protocol != "class-folders":
        raise OptionError(f"neighbours must be given with protocol 'class-folders' only; got {protocol!r}. Its pairs are fixed.")
    if protocol == "isekai-pair":
        return unreal_pairs(pool)
    if protocol == "isekai-10":
        if not pool.partners:
            raise OptionError("the pool must have unreal classes with real partners; it has none. Say kind= and group= of its classes.")
        return list(pool.partners)
    if neighbours is None:
        return consecutive(pool)
    table = neighbours.take(pool.keys)
    others = ((key, [pool.keys[int(j)] for j in row]) for key, row in zip(table.keys, table.ranking, strict=True))
    return [(key, next(one for one in row if pool[one].name != pool[key].name)) for key, row in others]


def at_shots(episode: Episode, shots: int) -> Episode:
    """The same question with the first `shots` examples of each label, in their order; fewer shots are among the more.

    Raises:
        OptionError: a label has fewer examples.
    """
    kept, seen = [], dict.fromkeys(episode.candidates, 0)
    for shot in episode.shots:
        if seen[shot.label] < shots:
            kept.append(shot)
        seen[shot.label] += 1
    shown = {label: k for label, k in seen.items() if k}
    if shots < 0 or min(shown.values(), default=0) < shots:
        raise OptionError(
            f"shots must be in 0..{min(shown.values(), default=0)} for episode {episode.id or 'without a name'!r}; got {shots}. Draw it with more."
        )
    return replace(episode, shots=tuple(kept))


@guarded
def evaluate_link(
    model: Any,
    data: Pool | Sequence[LinkTask] | Sequence[Episode],
    *,
    protocol: Protocol = "isekai-10",
    shots: Sequence[int] = SHOTS,
    n: int = 100,
    neighbours: Neighbours | None = None,
    labels: Labels = "own",
    prompt: Prompt = PUBLISHED,
    size: int | None = None,
    generate: bool = True,
    max_new_tokens: int | None = None,
    rule: Rule = "published",
    score: LabelScore = "full",
    baselines: bool = True,
    embeddings: Any = None,
    verify: int = 4,
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> LinkScores:
    """Accuracy over shots: written answers by the both-names rule, and by the likelihood of the candidates; recalls, baselines, paired tests.

    Every number of shots asks the same queries, and fewer examples are among the more, so that differences are paired. Two things keep apart that one
    accuracy would mix: a model that always says the same name has a recall of 1 on one class and 0 on the other; one that copies any name has .5 on both.

    Args:
        model: A `HookedVLM`, or with generate=False anything with the surface of `HookedModel`; hooks that are active stay active.
        data: A pool of classes, questions (`link_tasks`, or of a published list: `load_isekai(folder)["ISEKAI-10"]`), or episodes (their first candidate is the
            positive class).
        protocol: How a pool's classes are paired; "episodes" for questions or episodes.
        shots: Examples of each class, several numbers.
        n: Questions from a pool; of more given questions or episodes so many, drawn at random.
        neighbours, labels: See `link_tasks`; not for given questions.
        prompt: The words; not for episodes. For the bundled model: `mechicl.data.link_context.SHORT`.
        size: Pictures of files are shrunk until no side is longer, pixels.
        generate: Let the model write; else likelihood only.
        max_new_tokens: None: the longest candidate and 16 more.
        rule: See `mechicl.analysis.link.answers.Rule`.
        score: What decides between candidates: "full", "mean_token", "first_token".
        baselines: Also majority, copying any or the last label, and the nearest prototype and example in the vision tower's space.
        embeddings: An `Embedder` for the latter two in place of the model's tower.
        verify: So many prompts of the most shots are written again alone, to see that batching changes nothing.
        out: A folder for answers and tables; the same call goes on where it was killed.
        seed: Decides questions, ties and resampling.
        batch_size: Prompts per forward pass.
        task: What the data are, for the record.
        progress: Say the cost of a long run, and show bars.

    Returns:
        LinkScores. A question that cannot be asked with any number of shots is left out of all and named.

    Raises:
        OptionError: an option out of range, data that do not fit the protocol, or a model that cannot write.
        EpisodeError: no episodes, or none can be asked.
        ImageError: a picture cannot be read.
        CheckpointError, OutputPathError: `out` holds another evaluation, or cannot be written.

    Source:
        Tai et al. 2024 (arXiv 2308.07891). Differs: recalls, likelihood, baselines, paired questions and intervals are ours.
    """
    settings = shot_settings(data, shots, protocol=protocol, n=n, neighbours=neighbours, labels=labels, prompt=prompt, size=size, seed=seed)
    job = Job(
        axis="shots per class", protocol=protocol, how=How(score, generate, max_new_tokens), rule=rule, batch_size=batch_size, seed=seed, verify=verify,
        baselines=baselines, task=task, progress=progress,
    )  # fmt: skip
    return run_settings(model, settings, job, out=out, embeddings=embeddings)


@guarded
def link_cost(
    model: Any, data: Pool | Sequence[LinkTask] | Sequence[Episode], *, generate: bool = True, max_new_tokens: int | None = None, score: LabelScore = "full",
    batch_size: int = 8, **options: Any,
) -> LinkCost:  # fmt: skip
    """What `evaluate_link` with these arguments will take: a batch of each number of shots is asked and timed. Arguments and errors as there."""
    settings = shot_settings(data, options.pop("shots", SHOTS), **options)
    job = Job(axis="shots per class", protocol="", how=How(score, generate, max_new_tokens), batch_size=batch_size)
    check_settings(model, settings, job)
    return cost(model, settings, job)


def shot_settings(
    data: Pool | Sequence[LinkTask] | Sequence[Episode], shots: Sequence[int], *, protocol: Protocol = "isekai-10", n: int = 100,
    neighbours: Neighbours | None = None, labels: Labels = "own", prompt: Prompt = PUBLISHED, size: int | None = None, seed: int = 0,
) -> list[Setting]:  # fmt: skip
    """The questions at every number of shots; see `evaluate_link`."""
    counts = sorted(set(shots))
    if not counts or counts[0] < 0:
        raise OptionError(f"shots must be numbers of examples of each class, 0 or more; got {list(shots)}. E.g. (0, 1, 2, 4, 8, 16).")
    if isinstance(data, Pool):
        data = link_tasks(data, n, protocol=protocol, context=max(counts[-1], 1), neighbours=neighbours, labels=labels, seed=seed)
    elif protocol != "episodes" or neighbours is not None or labels != "own":
        raise OptionError(
            f"protocol must be 'episodes' for given questions, without neighbours or labels; got {protocol!r}. Or give a pool."
        )
    if n < 1:
        raise OptionError(f"n must be at least 1; got {n}. Ask for more questions.")
    if n < len(data):
        data = [data[i] for i in sorted(np.random.default_rng([seed, 83]).permutation(len(data))[:n].tolist())]  # type: ignore[assignment]
    episodes = _episodes(data, counts[-1], prompt, size, seed)
    return [Setting(f"{k} shot{'s' if k != 1 else ''}", float(k), [at_shots(episode, k) for episode in episodes]) for k in counts]


def link_questions(data: Pool | Sequence[LinkTask] | Sequence[Episode], shots: int, **options: Any) -> list[Episode]:
    """The questions of `evaluate_link` at one number of shots, for `mechicl.analysis.link.prior`. Options (protocol, n, labels, prompt, size, seed) as there."""
    return list(shot_settings(data, (shots,), **options)[0].episodes)


def _episodes(given: Sequence[LinkTask] | Sequence[Episode], shots: int, prompt: Prompt, size: int | None, seed: int) -> list[Episode]:
    """Questions as episodes; each file is read once."""
    if not given:
        raise EpisodeError("data must hold at least one question; got none. Give a pool, questions or episodes.")
    read: dict[Path, Image.Image] = {}

    def picture(one: Picture) -> Picture:
        if isinstance(one, Image.Image):
            return one
        if one not in read:
            read[one] = open_picture(one, size=size)
        return read[one]

    episodes = []
    for one in given:
        if isinstance(one, LinkTask):
            first, second = (tuple(picture(image) for image in images[:shots]) for images in one.examples)
            short = replace(one, examples=(first, second), query=picture(one.query))
            one = short.episode(shots, prompt=prompt, seed=seed)
        if not isinstance(one, Episode):
            raise OptionError(f"data must be a pool, questions or episodes; got a {type(one).__name__}. See mechicl.data.link_context.")
        episodes.append(one)
    return episodes


def compare_links(a: LinkScores, b: LinkScores, *, names: tuple[str, str] = ("a", "b"), seed: int = 0) -> tuple[LinkChange, ...]:
    """Model (or training strategy) b minus a in every setting that both have, on the same questions; p corrected over the settings of a measure.

    Raises:
        OptionError: not the same questions, or no setting in common.
    """
    if a.episode_ids != b.episode_ids or a.candidates != b.candidates or a.answers != b.answers:
        raise OptionError(
            f"a and b must have answered the same questions; {a.n} and {b.n} episodes differ. Use one seed, and score what both can be asked."
        )
    there: Mapping[str, Any] = {row.setting: row for row in a.rows}
    both = [(there[row.setting], row) for row in b.rows if row.setting in there]
    if not both:
        raise OptionError("a and b must have a setting in common; they have none. Evaluate both at the same shots.")
    found: list[LinkChange] = []
    for measure, field in (("written", "right"), ("likelihood", "likely")):
        some = [(x.setting, getattr(x, field), getattr(y, field)) for x, y in both]
        some = [(setting, x, y) for setting, x, y in some if x is not None and y is not None]
        p = [mcnemar_p(x, y) for _, x, y in some]
        found += [
            LinkChange(
                measure,
                f"{names[0]}, {setting}",
                f"{names[1]}, {setting}",
                paired_change(x, y, unit="probability", seed=seed),
                one,
                float(h),
            )
            for (setting, x, y), one, h in zip(some, p, holm(p), strict=True)
        ]
    return tuple(found)
