"""Minimal pairs: the same prompt with its labels or pictures exchanged (or disturbed: `mechicl.prompts.disturb`), token for token as long.

`swap_labels`, `permute_labels` and `swap_images` are pure functions from episode to episode. `minimal_pairs` renders both sides and keeps only the
pairs whose tokens stand in the same places, so that an activation of one run can be put into the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np

from mechicl.errors import EpisodeError, OptionError
from mechicl.prompts.batch import Batch, Renders
from mechicl.prompts.episode import Episode
from mechicl.results import Skipped

How = Literal["swap_labels", "permute_labels", "swap_query", "swap_exemplars", "wrong_exemplar", "reformat", "blur", "noise"]
Lengths = Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Row i of `clean` and row i of `corrupt` differ in content only: same length, same spans. `skipped`: episodes left out, and why."""

    clean: Batch
    corrupt: Batch
    how: str
    skipped: tuple[Skipped, ...]

    @property
    def n(self) -> int:
        """Number of pairs."""
        return self.clean.n


def swap_labels(episode: Episode, *, seed: int = 0, lengths: Lengths | None = None) -> Episode:
    """The answer's label and another one change places in every exemplar; that other label becomes the answer.

    Args:
        seed: Which other label, where there are several.
        lengths: Tokens of each label (see `label_lengths`); only a label as long as the answer is taken.

    Raises:
        EpisodeError: no exemplar has another label (of equal length).
    """
    other = partner(episode, seed, lengths)
    exchange = {episode.answer: other, other: episode.answer}
    shots = tuple(replace(shot, label=exchange.get(shot.label, shot.label)) for shot in episode.shots)
    return replace(episode, shots=shots, query=replace(episode.query, label=other))


def permute_labels(episode: Episode, *, seed: int = 0, lengths: Lengths | None = None) -> Episode:
    """The exemplars' labels are dealt out anew over the exemplars, so that they no longer follow what is shown. The answer stays.

    Of the ways to deal them, one is drawn that changes something. Labels change places only with labels of equal length where `lengths` is given.

    Raises:
        EpisodeError: no two exemplars have different labels (of equal length).
    """
    draw = np.random.default_rng([seed, 1])
    groups: dict[int, list[int]] = {}
    for k, shot in enumerate(episode.shots):
        groups.setdefault(token_length(shot.label, lengths), []).append(k)
    old = [shot.label for shot in episode.shots]
    if all(len({old[k] for k in group}) < 2 for group in groups.values()):
        raise EpisodeError(no_partner(episode, lengths))
    while True:
        new = list(old)
        for group in groups.values():
            for k, source in zip(group, draw.permutation(group), strict=True):
                new[k] = old[int(source)]
        if new != old:
            break
    return replace(episode, shots=tuple(replace(shot, label=label) for shot, label in zip(episode.shots, new, strict=True)))


def swap_images(
    episode: Episode, *, which: Literal["query", "exemplars"] = "query", seed: int = 0, lengths: Lengths | None = None
) -> Episode:
    """Pictures (and item texts) change, labels stay where they are; the answer follows.

    query: the query shows what an exemplar of another label shows, and that label becomes the answer.
    exemplars: exemplars of the answer's label and of another one show each other's items, in order, so that the query's item now goes with that
    other label, which becomes the answer.

    Raises:
        EpisodeError: no exemplar has another label (of equal length), or the two labels have different numbers of exemplars.
    """
    if which not in ("query", "exemplars"):
        raise OptionError(f"which must be 'query' or 'exemplars'; got {which!r}. Pick one of them.")
    other = partner(episode, seed, lengths)
    draw = np.random.default_rng([seed, 2])
    theirs = [k for k, shot in enumerate(episode.shots) if shot.label == other]
    if which == "query":
        donor = episode.shots[theirs[int(draw.integers(len(theirs)))]]
        return replace(episode, query=replace(donor, label=other))
    mine = [k for k, shot in enumerate(episode.shots) if shot.label == episode.answer]
    if len(mine) != len(theirs):
        raise EpisodeError(
            f"{title(episode)}: both labels must have as many exemplars; {episode.answer!r} has {len(mine)} and {other!r} has {len(theirs)}. "
            "Draw balanced episodes."
        )
    shots = list(episode.shots)
    for a, b in zip(mine, theirs, strict=True):
        shots[a] = replace(episode.shots[b], label=episode.shots[a].label)
        shots[b] = replace(episode.shots[a], label=episode.shots[b].label)
    return replace(episode, shots=tuple(shots), query=replace(episode.query, label=other))


def label_lengths(batch: Batch, row: int) -> dict[str, int]:
    """Tokens of every candidate label behind the prompt of a row."""
    return {label: len(ids) for label, ids in zip(batch.candidates[row], batch.candidate_ids[row], strict=True)}


def minimal_pairs(renderer: Renders, episodes: Sequence[Episode], how: How, *, seed: int = 0, **options: Any) -> Pairs:
    """Clean and corrupt batches with every token in the same place.

    Labels are exchanged only with labels of as many tokens. An episode that allows none, or whose corrupt prompt is laid out differently (pictures of
    another size, a form with other tokens), is left out and named.

    Args:
        renderer: The model's renderer (`model.renderer`).
        episodes: The clean side.
        how: "swap_labels", "permute_labels", "swap_query", "swap_exemplars": see the functions here. "wrong_exemplar", "reformat" (content kept, form changed),
            "blur", "noise": see `mechicl.prompts.disturb`; these leave the answer as it is.
        seed: Episode k is corrupted with seed + k.
        options: For the way: `which` and `strength` of "blur" and "noise"; `which` and `donors` of "wrong_exemplar" (by default items of the other episodes).

    Raises:
        OptionError: `how` or an option does not exist.
        EpisodeError: no episode is left.
    """
    if how not in get_args(How):
        raise OptionError(f"how must be one of {', '.join(get_args(How))}; got {how!r}. Pick one of them.")
    clean = renderer.render(episodes)
    make = _way(how, episodes, options)
    forms: dict[int, list[Episode]] = {}
    reasons: dict[int, str] = {}
    for k, episode in enumerate(episodes):
        try:
            forms[k] = make(episode, seed=seed + k, lengths=label_lengths(clean, k))
        except EpisodeError as error:
            reasons[k] = str(error)
    found: dict[int, Episode] = {}
    for turn in range(max((len(some) for some in forms.values()), default=0)):
        pending = [k for k, some in forms.items() if k not in found and turn < len(some)]
        if not pending:
            break
        corrupt = renderer.render([forms[k][turn] for k in pending])
        found |= {k: forms[k][turn] for i, k in enumerate(pending) if layout(clean, k) == layout(corrupt, i)}
    for k in forms.keys() - found.keys():
        reasons[k] = "the corrupt prompt's tokens stand elsewhere; give pictures of one size"
        if how == "reformat":
            reasons[k] = f"none of {len(forms[k])} other forms of its instruction and question has as many tokens; write them otherwise"
    skipped = tuple(Skipped(episodes[k].id or str(k), reasons[k]) for k in sorted(reasons))
    rows = sorted(found)
    if not rows:
        raise EpisodeError(
            f"episodes must allow {how} with every token in place; none of {len(episodes)} does (first: {skipped[0].reason}). "
            "Draw labels of one length, e.g. syllables=(2, 2), and pictures of one size."
        )
    return Pairs(clean if len(rows) == clean.n else clean.select(rows), renderer.render([found[k] for k in rows]), how, skipped)


def _way(how: str, episodes: Sequence[Episode], options: dict[str, Any]) -> Callable[..., list[Episode]]:
    """A function from an episode to its corrupt forms, the first that fits to be taken."""
    from mechicl.prompts import disturb

    allowed = {"blur": {"which", "strength"}, "noise": {"which", "strength"}, "wrong_exemplar": {"which", "donors"}}.get(how, set())
    if strange := sorted(options.keys() - allowed):
        raise OptionError(f"options of {how} must be among {sorted(allowed) or 'none'}; got {', '.join(strange)}. Leave it out.")
    if how == "reformat":
        return lambda episode, **_: disturb.reformats(episode)
    ways: dict[str, Callable[..., Episode]] = {
        "swap_labels": swap_labels,
        "permute_labels": permute_labels,
        "swap_query": partial(swap_images, which="query"),
        "swap_exemplars": partial(swap_images, which="exemplars"),
        **disturb.WAYS,
    }
    more = ({"donors": episodes} | options) if how == "wrong_exemplar" else options
    return lambda episode, **kwargs: [ways[how](episode, **kwargs, **more)]


def layout(batch: Batch, row: int) -> list[tuple[str, int, int, int | None]]:
    """Role, length, shot and picture of every span of a row, padding left out."""
    return [(s.role, s.stop - s.start, s.shot, s.image) for s in batch.spans[row] if s.role != "pad"]


def partner(episode: Episode, seed: int, lengths: Lengths | None) -> str:
    """A label that some exemplar has, other than the answer and (where lengths are known) as long."""
    shown = {shot.label for shot in episode.shots}
    goal = token_length(episode.answer, lengths)
    others = [label for label in episode.candidates if label in shown and label != episode.answer and token_length(label, lengths) == goal]
    if not others:
        raise EpisodeError(no_partner(episode, lengths))
    return others[int(np.random.default_rng([seed, 0]).integers(len(others)))]


def token_length(label: str, lengths: Lengths | None) -> int:
    """Tokens of a label; 0 for all where lengths are not asked for."""
    if lengths is None:
        return 0
    if label not in lengths:
        raise OptionError(f"lengths must name every label; {label!r} is missing. Take them from label_lengths(batch, row).")
    return lengths[label]


def no_partner(episode: Episode, lengths: Lengths | None) -> str:
    """Why no label can take the place of another."""
    shown = sorted({shot.label for shot in episode.shots})
    if lengths is None:
        return f"{title(episode)}: exemplars must show two labels; got {shown}. Add exemplars of another class."
    counts = ", ".join(f"{label!r} {token_length(label, lengths)}" for label in dict.fromkeys([episode.answer, *shown]))
    return f"{title(episode)}: another label must have as many tokens; got {counts}. Draw labels of one length, e.g. syllables=(2, 2)."


def title(episode: Episode) -> str:
    """How an episode is called in a message."""
    return f"episode {episode.id}" if episode.id else "the episode"
