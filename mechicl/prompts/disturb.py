"""More ways to make minimal pairs: an exemplar of the wrong class, another form with the same content, blurred or noised pictures.

Pure functions from episode to episode, as in `corrupt`; `minimal_pairs(how=...)` renders both sides and keeps the pairs whose tokens stand in the same
places. None of them changes the answer: the corrupt prompt merely no longer shows it (or shows it otherwise).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from mechicl.data.gaussian import Draw
from mechicl.errors import EpisodeError, OptionError
from mechicl.prompts.corrupt import How, Lengths, Pairs, minimal_pairs, title
from mechicl.prompts.episode import Episode, Shot
from mechicl.prompts.vectors import Candidates, VectorRenderer, VectorShot, episodes

Which = Literal["query", "right", "all"]
"""Whose pictures: the query's; those of the exemplars with the answer's label; every one."""

MARKS = {"?": ":", ":": ".", ".": "!", "!": "."}
"""Closing marks that take each other's place."""


def wrong_exemplar(
    episode: Episode, *, seed: int = 0, lengths: Lengths | None = None, donors: Sequence[Episode] = (), which: Literal["all", "one"] = "all"
) -> Episode:
    """Exemplars of the query's class show another class under the same label, so that no exemplar tells the query's name. Labels, query and answer stay.

    Args:
        seed: Which other class, and with "one" which exemplar.
        lengths: Not used; labels stay.
        donors: Where items of classes come from that this episode does not show; without any such, another class of the episode itself is shown.
        which: "all" exemplars with the answer's label, or "one" of them.

    Raises:
        EpisodeError: no exemplar has the answer's label, or there is no item of another class.
    """
    if which not in ("all", "one"):
        raise OptionError(f"which must be 'all' or 'one'; got {which!r}. all leaves no right exemplar.")
    draw = np.random.default_rng([seed, 3])
    right = [k for k, shot in enumerate(episode.shots) if shot.label == episode.answer]
    if not right:
        raise EpisodeError(
            f"{title(episode)}: an exemplar must have the answer's label {episode.answer!r}; none has. Draw the query's class among the exemplars."
        )
    shown = {_item(shot) for shot in (*episode.shots, episode.query)}
    foreign = [shot for other in donors for shot in (*other.shots, other.query) if _item(shot) not in shown]
    items: dict[str, list[Shot]] = {}
    for shot in foreign or [shot for shot in episode.shots if shot.label != episode.answer]:
        items.setdefault(_item(shot), []).append(shot)
    if not items:
        raise EpisodeError(f"{title(episode)}: an item of another class must exist; there is none. Draw more classes.")
    name = list(items)[int(draw.integers(len(items)))]
    shots = list(episode.shots)
    chosen = right if which == "all" else [right[int(draw.integers(len(right)))]]
    pool = [items[name][int(j)] for j in draw.permutation(len(items[name]))]
    for n, k in enumerate(chosen):
        shots[k] = replace(pool[n % len(pool)], label=shots[k].label)
    return replace(episode, shots=tuple(shots))


def reformats(episode: Episode) -> list[Episode]:
    """The episode in other forms, its content kept: other closing marks and other case of instruction and question. Which of them has as many tokens, the
    tokenizer decides.

    Raises:
        EpisodeError: there is no instruction and no question whose form could change.
    """
    if not episode.instruction and not episode.question:
        raise EpisodeError(
            f"{title(episode)}: an instruction or a question must be there to change its form; there is none. Corrupt labels or items instead."
        )
    forms: list[Callable[[str], str]] = [_marks, str.lower, str.title, str.upper, str.swapcase]
    found = []
    for form in forms:
        changed, asked = form(episode.instruction), form(episode.question)
        found += [
            replace(episode, instruction=a, question=b)
            for a, b in ((changed, asked), (episode.instruction, asked), (changed, episode.question))
        ]
    texts = {(episode.instruction, episode.question)}
    return [e for e in found if (key := (e.instruction, e.question)) not in texts and not texts.add(key)]


def disturb_images(
    episode: Episode,
    *,
    kind: Literal["blur", "noise"],
    which: Which = "query",
    strength: float = 1.0,
    seed: int = 0,
    lengths: Lengths | None = None,
) -> Episode:
    """Pictures lose what they show and keep their size. Items that are vectors are noised likewise: (x + strength * noise) / sqrt(1 + strength^2).

    Args:
        kind: "blur": Gaussian, radius `strength` times a quarter of the shorter side. "noise": the mean of the picture and uniform noise, weighted
            1 - strength and strength.
        which: See `Which`.
        strength: Above 0; at most 1 for pictures.
        seed: Of the noise.
        lengths: Not used; labels stay.

    Raises:
        OptionError: an option outside its range.
        EpisodeError: nothing chosen can be disturbed.
    """
    if which not in get_args(Which):
        raise OptionError(f"which must be one of {', '.join(get_args(Which))}; got {which!r}. Pick one of them.")
    vectors = any(isinstance(shot, VectorShot) for shot in (*episode.shots, episode.query))
    if not 0 < strength <= (math.inf if vectors else 1):
        raise OptionError(
            f"strength must be above 0{'' if vectors else ' and at most 1'}; got {strength}. 1 leaves next to nothing of a picture."
        )
    draw = np.random.default_rng([seed, 4])
    changed = 0

    def turn(shot: Shot, chosen: bool) -> Shot:
        nonlocal changed
        if not chosen:
            return shot
        if isinstance(shot, VectorShot) and kind == "noise" and not shot.blank:
            changed += 1
            second = None if shot.second is None else _noised(shot.second, strength, draw)
            return replace(shot, vector=_noised(shot.vector, strength, draw), second=second)
        changed += len(shot.images)
        return replace(shot, images=tuple(_picture(image, kind, strength, draw) for image in shot.images))

    shots = tuple(turn(shot, which == "all" or (which == "right" and shot.label == episode.answer)) for shot in episode.shots)
    query = turn(episode.query, which in ("query", "all"))
    if not changed:
        raise EpisodeError(
            f"{title(episode)}: a picture must be there to {kind} (which={which!r}); there is none. Choose another way to corrupt."
        )
    return replace(episode, shots=shots, query=query)


def vector_pairs(
    drawn: Draw,
    how: How = "swap_labels",
    *,
    modality: Literal["first", "second"] | None = None,
    candidates: Candidates = "all",
    position_ids: Tensor | None = None,
    rows: Sequence[int] | None = None,
    seed: int = 0,
    **options: Any,
) -> Pairs:
    """Minimal pairs of toy sequences of vectors.

    Args:
        drawn: From `mechicl.data.gaussian.draw`.
        how: As in `minimal_pairs`.
        modality: With "swap_query" in a multimodal task: exchange only the first or only the second item of the query; the other stays, so that the two contradict
            each other, and the answer of the corrupt side is what the exchanged one says.
        candidates: As in `to_batch`.
        position_ids: As in `to_batch`.
        rows: Only these sequences.
        seed: Of the choice of labels and items.
        options: As in `minimal_pairs`.

    Raises:
        OptionError: `modality` with another way to corrupt, or in a task of one modality.
        EpisodeError: no sequence allows it.
    """
    given = episodes(drawn, candidates=candidates, position_ids=position_ids, rows=rows)
    if modality is None:
        return minimal_pairs(VectorRenderer(drawn.task), given, how, seed=seed, **options)
    if how != "swap_query" or drawn.second is None or modality not in ("first", "second"):
        raise OptionError(
            f"modality must be 'first' or 'second' with how='swap_query' in a multimodal task; got {modality!r} with {how!r}. Leave it out."
        )
    pairs = minimal_pairs(VectorRenderer(drawn.task), given, how, seed=seed)
    mixed = []
    for before, after in zip(pairs.clean.episodes, pairs.corrupt.episodes, strict=True):
        old, new = before.query, after.query
        assert isinstance(old, VectorShot)
        assert isinstance(new, VectorShot)
        if modality == "first":
            query = replace(new, second=old.second, second_token=old.second_token)
        else:
            query = replace(new, vector=old.vector, token=old.token, blank=old.blank, text=old.text)
        mixed.append(replace(after, query=query))
    return Pairs(pairs.clean, VectorRenderer(drawn.task).render(mixed), f"{how}, {modality} modality", pairs.skipped)


WAYS: Mapping[str, Callable[..., Episode]] = {
    "wrong_exemplar": wrong_exemplar,
    "blur": partial(disturb_images, kind="blur"),
    "noise": partial(disturb_images, kind="noise"),
}
"""Ways with one corrupt episode each, for `minimal_pairs`."""


def _item(shot: Shot) -> str:
    return shot.item or shot.text or shot.label


def _marks(text: str) -> str:
    return text[:-1] + MARKS[text[-1]] if text and text[-1] in MARKS else text


def _noised(x: Tensor, strength: float, draw: np.random.Generator) -> Tensor:
    noise = torch.from_numpy(draw.standard_normal(tuple(x.shape))).to(x) / math.sqrt(x.shape[-1])
    return (x + strength * noise) / math.sqrt(1 + strength**2)


def _picture(image: Image.Image, kind: str, strength: float, draw: np.random.Generator) -> Image.Image:
    plain = image.convert("RGB")
    if kind == "blur":
        return plain.filter(ImageFilter.GaussianBlur(strength * min(plain.size) / 4))
    pixels = np.asarray(plain, dtype=np.float64)
    mixed = (1 - strength) * pixels + strength * draw.uniform(0, 255, pixels.shape)
    return Image.fromarray(np.clip(mixed.round(), 0, 255).astype(np.uint8))
