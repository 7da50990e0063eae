"""The same episodes with words in place of pictures: the other modality of one model, and what a language model can be asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from mechicl.data.words import pseudo_words
from mechicl.errors import EpisodeError
from mechicl.prompts.episode import Episode, Shot


def in_words(episodes: Sequence[Episode], *, words: Mapping[str, str] | None = None, seed: int = 0) -> list[Episode]:
    """Every picture replaced by a word for what it shows; labels, order, instruction and question stay.

    Args:
        episodes: With pictures; each shot's `item` says what it shows.
        words: What items are called. None: a new made-up word of two syllables for each item of an episode, none of them a label: then the task is the same
            (which label goes with the thing that is asked for?), and no knowledge of the words can help.
        seed: Decides made-up words.

    Raises:
        EpisodeError: a shot names no item, has no word, or its word is a label of its episode.
    """
    made = []
    for k, episode in enumerate(episodes):
        shots = (*episode.shots, episode.query)
        if not all(shot.item for shot in shots):
            raise EpisodeError(
                f"episode {episode.id or k}: every shot must name its item, so that it can have a word; one does not. Set Shot.item."
            )
        items = list(dict.fromkeys(shot.item for shot in shots))
        if words is None:
            drawn = pseudo_words(len(items), np.random.default_rng([seed, k]), syllables=(2, 2), avoid=episode.candidates)
            named = dict(zip(items, drawn, strict=True))
        else:
            named = {item: words.get(item, "") for item in items}
        for item, word in named.items():
            if not word or word in episode.candidates:
                raise EpisodeError(
                    f"episode {episode.id or k}: every item must have a word that is no label; got {word!r} for {item!r}. Name it in words, or leave words out."
                )
        told = tuple(_told(shot, named[shot.item]) for shot in shots)
        made.append(replace(episode, shots=told[:-1], query=told[-1]))
    return made


def _told(shot: Shot, word: str) -> Shot:
    return replace(shot, images=(), text=f"{word} {shot.text}".strip())


def prompts_of(episodes: Sequence[Episode]) -> str:
    """What episodes show: "pictures", "words", "pictures and words" (of one shot or of several)."""
    shots = [shot for episode in episodes for shot in (*episode.shots, episode.query)]
    pictures, texts = any(shot.images for shot in shots), any(not shot.images for shot in shots)
    return "pictures and words" if pictures and texts else "pictures" if pictures else "words"
