"""Link against prior: known things that the prompt calls by another name. Does the answer follow the examples, or what the model knew?

The question needs a model that has a prior: one that names the pictures without any example. The bundled model knows no name of anything, so for it
`LinkPrior.known` is at chance and the result says so; use a production model, or one that was fine-tuned to name some concepts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np

from mechicl.analysis.feed import provenance
from mechicl.analysis.guarded import guarded
from mechicl.analysis.labels import predict
from mechicl.analysis.link.answers import Asked, How, outcome
from mechicl.analysis.link.evaluate import at_shots
from mechicl.analysis.link.settings import Job, Setting, check_settings, collect
from mechicl.analysis.statistics import N_BOOTSTRAP, holm, mean_estimate, paired_change, sign_flip_p, wilson
from mechicl.data.words import pseudo_words
from mechicl.errors import EpisodeError, OptionError
from mechicl.prompts.episode import Episode
from mechicl.results import Estimate, LinkPrior, LinkPriorRow, Skipped

Names = Literal["swap", "outside", "novel"]
"""Where new names come from. swap: the things of an episode exchange names ("apple" is called "orange", and the other way round). outside: known names of things that
are not shown. novel: words that mean nothing."""
WRITTEN: Mapping[str, str] = {"right": "link", "other": "prior", "both": "both", "neither": "neither"}


@dataclass(frozen=True, eq=False)
class Renamed:
    """An episode under true names, and the new name of each: `new[true]`. Both prompts have the same candidates."""

    true: Episode
    new: Mapping[str, str]

    @property
    def link(self) -> str:
        """What the examples call the query."""
        return self.new[self.true.answer]

    @property
    def prior(self) -> str:
        """What the model knows it as."""
        return self.true.answer

    def episode(self, names: str, shots: int) -> Episode:
        """The prompt under "true" or "renamed" names."""
        short = at_shots(self.true, shots)
        every = tuple(dict.fromkeys([*self.new.values(), *self.true.candidates]))
        if names == "true":
            return replace(short, candidates=every)
        moved = tuple(replace(shot, label=self.new[shot.label]) for shot in short.shots)
        return replace(short, shots=moved, query=replace(short.query, label=self.link), candidates=every)


def rename(episodes: Sequence[Episode], how: Names = "swap", *, names: Sequence[str] = (), seed: int = 0) -> list[Renamed]:
    """New names for the things of each episode.

    Args:
        episodes: Their labels are the names that the model knows.
        how: See `Names`.
        names: For "outside": known names; those of the other episodes where none are given.
        seed: Decides names.

    Raises:
        OptionError: `how` does not exist, or too few names.
        EpisodeError: no episodes.
    """
    if how not in get_args(Names):
        raise OptionError(f"how must be one of {', '.join(get_args(Names))}; got {how!r}. swap exchanges the names of an episode.")
    if not episodes:
        raise EpisodeError("episodes must be a non-empty list; got none. Draw some whose labels the model knows.")
    pool = list(dict.fromkeys(names or [label for episode in episodes for label in episode.candidates]))
    found = []
    for k, episode in enumerate(episodes):
        draw, old = np.random.default_rng([seed, 79, k]), list(episode.candidates)
        if how == "swap":
            new = [*old[1:], old[0]]
        elif how == "novel":
            new = pseudo_words(len(old), draw, avoid=pool)
        else:
            others = [name for name in pool if name not in old]
            if len(others) < len(old):
                raise OptionError(f"names must hold {len(old)} that episode {episode.id or k} does not show; got {len(others)}. Give more.")
            new = [others[int(i)] for i in draw.permutation(len(others))[: len(old)]]
        found.append(Renamed(episode, dict(zip(old, new, strict=True))))
    return found


@guarded
def link_or_prior(
    model: Any,
    episodes: Sequence[Episode],
    *,
    how: Names = "swap",
    names: Sequence[str] = (),
    shots: Sequence[int] = (0, 1, 2, 4),
    generate: bool = True,
    max_new_tokens: int | None = None,
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> LinkPrior:
    """Whether known things that get another name in the prompt are called by it, over shots; the same prompts under true names beside.

    The preference is the log-probability of the link's name minus the prior's. Names differ in length and frequency, which no example
    changes: read `gain`, the preference minus that of the same query without examples.

    Args:
        model: See `evaluate_link`; it must know the names, see `LinkPrior.known`.
        episodes: Their labels are the names that the model knows; with as many examples of each class as the most shots.
        how, names: See `rename`.
        shots: Of each class; 0 is always run.
        generate, max_new_tokens, out, seed, batch_size, task, progress: See `evaluate_link`; `out` keeps the answers.

    Returns:
        LinkPrior. Episodes that some setting cannot ask are left out of all and named.

    Raises:
        OptionError: an option out of range, or too few names.
        EpisodeError: no episodes, or none can be asked.

    Source:
        The renaming is Tai et al. 2024's ("apple" called "orange"); the measures are ours.
    """
    counts = sorted({0, *shots})
    if counts[0] < 0:
        raise OptionError(f"shots must be 0 or more; got {list(shots)}. E.g. (0, 1, 2, 4).")
    renamed = rename(episodes, how, names=names, seed=seed)
    asked = [(kind, k) for kind in ("renamed", "true") for k in counts if k or kind == "renamed"]
    settings = [Setting(f"{kind} {k}", float(k), [one.episode(kind, k) for one in renamed]) for kind, k in asked]
    job = Job(axis="shots per class", protocol=f"renamed: {how}", how=How("full", generate, max_new_tokens), batch_size=batch_size, seed=seed,
              task=task, progress=progress)  # fmt: skip
    check_settings(model, settings, job)
    answers, _ = collect(model, settings, job, out)
    reasons = [next((a.reason for s in settings if (a := answers[s.name, i]).reason), "") for i in range(len(renamed))]
    kept = [i for i, reason in enumerate(reasons) if not reason]
    ids = [episode.id or str(i) for i, episode in enumerate(episodes)]
    if not kept:
        raise EpisodeError(f"an episode must be askable with all numbers of shots; none of {len(ids)} is ({reasons[0]}). Change them.")
    rows = _rows(asked, [[answers[s.name, i] for i in kept] for s in settings], [renamed[i] for i in kept], generate, seed)
    right = np.array([_chosen(answers["renamed 0", i], renamed[i], seed) == "prior" for i in kept])
    known = _over_names(right, [renamed[i].prior for i in kept], seed)
    return LinkPrior(
        rows=rows, how=how, known=known, crossing=_crossing([row for row in rows if row.names == "renamed"]), episode_ids=tuple(ids[i] for i in kept),
        links=tuple(renamed[i].link for i in kept), priors=tuple(renamed[i].prior for i in kept), n=len(kept),
        skipped=tuple(Skipped(ids[i], reason) for i, reason in enumerate(reasons) if reason),
        provenance=provenance(model, task=task, seed=seed, options={"how": how, "shots": counts, "generate": generate, "batch_size": batch_size}),
        notes=_notes(known, [renamed[i] for i in kept]),
    )  # fmt: skip


def _rows(
    asked: Sequence[tuple[str, int]], answers: Sequence[Sequence[Asked]], renamed: Sequence[Renamed], generate: bool, seed: int
) -> tuple[LinkPriorRow, ...]:
    preferences = [np.array([_preference(a, one) for a, one in zip(some, renamed, strict=True)]) for some in answers]
    p = [float(sign_flip_p(x, seed=seed)) for x in preferences]
    rows = []
    for (kind, k), some, x, one_p, corrected in zip(asked, answers, preferences, p, holm(p), strict=True):
        chosen = tuple(_chosen(a, one, seed) for a, one in zip(some, renamed, strict=True))
        texts = tuple(a.text for a in some)
        kinds = [WRITTEN[outcome(t, one.link, one.prior)] for t, one in zip(texts, renamed, strict=True)] if generate else []
        share: dict[str, Estimate] = {name: wilson([c == name for c in chosen]) for name in ("link", "prior", "other")}
        rows.append(
            LinkPriorRow(
                names=kind, shots=k, **share, preference=mean_estimate(x, unit="nats", seed=seed),
                gain=paired_change(preferences[0], x, unit="nats", seed=seed) if k else None, p=one_p, holm_p=float(corrected),
                gain_p=float(sign_flip_p(x - preferences[0], seed=seed)) if k else float("nan"), preferences=x, chosen=chosen,
                written={name: wilson([c == name for c in kinds]) for name in WRITTEN.values()} if generate else {}, texts=texts if generate else (),
            )
        )  # fmt: skip
    return tuple(rows)


def _values(answer: Asked, one: Renamed) -> dict[str, float]:
    return dict(zip(one.episode("true", 0).candidates, answer.values, strict=True))


def _preference(answer: Asked, one: Renamed) -> float:
    values = _values(answer, one)
    return values[one.link] - values[one.prior]


def _chosen(answer: Asked, one: Renamed, seed: int) -> str:
    values = _values(answer, one)
    best = list(values)[int(predict(np.array([list(values.values())]), seed)[0][0])]
    return "link" if best == one.link else "prior" if best == one.prior else "other"


def _over_names(right: np.ndarray, names: Sequence[str], seed: int) -> Estimate:
    """A share with a bootstrap interval over names: episodes of one thing are no independent evidence that the model knows its name."""
    different = list(dict.fromkeys(names))
    rows = np.array([different.index(name) for name in names])
    hits, many = np.bincount(rows, right.astype(float)), np.bincount(rows).astype(float)
    k = len(different)
    counts = np.random.default_rng(seed).multinomial(k, np.full(k, 1 / k), size=N_BOOTSTRAP)
    low, high = np.quantile(counts @ hits / (counts @ many), (0.025, 0.975))
    return Estimate(float(right.mean()), float(low), float(high), len(right), "probability", f"bootstrap over {k} names 95 %")


def _crossing(rows: Sequence[LinkPriorRow]) -> float:
    """Shots at which the mean preference comes up to nought."""
    for before, after in pairwise(rows):
        a, b = before.preference.value, after.preference.value
        if a < 0 <= b:
            return before.shots + (after.shots - before.shots) * -a / (b - a)
    return float("nan")


def _notes(known: Estimate, renamed: Sequence[Renamed]) -> tuple[str, ...]:
    chance = float(np.mean([1 / len(one.episode("true", 0).candidates) for one in renamed]))
    if known.low > chance:
        return ()
    return (
        f"Without examples the model names {100 * known.value:.0f} % of the queries rightly, chance {100 * chance:.0f} %: it has no prior that shows, so following "
        "the link here is no victory over one.",
    )
