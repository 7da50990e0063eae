"""Neutral fillers: prompts as long as those with examples, token for token, that show nothing. What is left of a shift against them is not length.

"turns" keeps the form (template, turns, instruction, question) and empties the examples: grey pictures of the same size, neutral words in place of every
token of their texts and labels. "words" has no examples at all: the zero-shot prompt whose instruction is as many neutral words longer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mechicl.errors import EpisodeError, OptionError
from mechicl.prompts.batch import Batch, Renders
from mechicl.prompts.episode import Episode, Shot

Filler = Literal["turns", "words"]

GREY = (128, 128, 128)
NEUTRAL = ("the", "a", "and", "of", "to", "in", "it", "is", "or", "that", "this", "for", "with", "as", "so", "at", "by", "on")
"""Function words, each one token in nearly every tokenizer; those that are not are left out."""
TRIES = 8
"""How often the number of words is corrected before an episode is given up."""


def filler(
    renderer: Renders, episodes: Sequence[Episode], like: Batch, how: Filler = "turns", *, seed: int = 0, numbers: Sequence[int] = ()
) -> tuple[Batch, tuple[str, ...]]:
    """Prompts of the same lengths as `like` that show no example.

    Args:
        renderer: What rendered `like`.
        episodes: The episodes of `like`.
        like: Their prompts with the examples.
        how: See `Filler`. Sequences of vectors get noise of each vector's own norm, toy words get words that their episode does not have.
        seed: Decides the words and the noise.
        numbers: The episodes' numbers in the whole data, so that what is drawn does not depend on batches; default 0, 1, ...

    Returns:
        The batch (of the same rows), and for each row why its lengths are not those of `like`; "" where they are.

    Raises:
        OptionError: `how` does not exist, or toys are asked for "words".
        EpisodeError: a tokenizer has no neutral word of one token.
    """
    if how not in get_args(Filler):
        raise OptionError(f"filler must be one of {', '.join(get_args(Filler))}; got {how!r}. Pick one of them.")
    draws = [np.random.default_rng([seed, 6, number]) for number in (numbers or range(len(episodes)))]
    if how == "turns":
        return _turns(renderer, episodes, like, draws)
    if _tokenizer(renderer) is None:
        raise OptionError('filler must be "turns" for toys, whose prompts have no instruction; got "words". Leave it at "turns".')
    return _words(renderer, episodes, like, draws)


def _turns(
    renderer: Renders, episodes: Sequence[Episode], like: Batch, draws: Sequence[np.random.Generator]
) -> tuple[Batch, tuple[str, ...]]:
    bare = [replace(episode, shots=tuple(_emptied(shot) for shot in episode.shots)) for episode in episodes]
    batch = renderer.render(bare).to(like.inputs["input_ids"].device)
    reasons = tuple(
        ""
        if [(s.role, s.start, s.stop) for s in ours] == [(s.role, s.start, s.stop) for s in theirs]
        else "grey pictures have other tokens"
        for ours, theirs in zip(batch.spans, like.spans, strict=True)
    )
    inputs = _noised(batch, draws) if "inputs_embeds" in batch.inputs else _worded(renderer, batch, draws)
    return replace(batch, inputs=inputs, episodes=(), renderer=None), reasons


def _emptied(shot: Shot) -> Shot:
    return replace(shot, images=tuple(Image.new("RGB", ImageOps.exif_transpose(image).size, GREY) for image in shot.images))


def _worded(renderer: Renders, batch: Batch, draws: Sequence[np.random.Generator]) -> Mapping[str, Any]:
    """Every token of the examples' texts and labels exchanged for a neutral one."""
    ids: Tensor = batch.inputs["input_ids"].clone()
    tokenizer = _tokenizer(renderer)
    free = None if tokenizer is None else [tokens[0] for _, tokens in neutral_words(tokenizer)]
    for i, (row, draw) in enumerate(zip(batch.spans, draws, strict=True)):
        used = {int(t) for t in batch.inputs["input_ids"][i]}
        for span in row:
            if span.shot >= 0 and span.role in ("text", "label"):
                chosen = draw.choice(_unused(renderer, span.role, used) if free is None else free, span.stop - span.start)
                ids[i, span.start : span.stop] = torch.from_numpy(chosen).to(ids)
    return {**batch.inputs, "input_ids": ids}


def _unused(renderer: Renders, role: str, used: set[int]) -> list[int]:
    """Words of a toy's vocabulary that the episode does not have."""
    vocabulary = getattr(renderer, "vocabulary", None)
    if vocabulary is None:
        raise OptionError(
            f"renderer must have a tokenizer or a toy vocabulary; {type(renderer).__name__} has neither. Render with the model."
        )
    first = 2 if role == "text" else 2 + vocabulary.n_items
    free = [t for t in range(first, first + (vocabulary.n_items if role == "text" else vocabulary.n_labels)) if t not in used]
    if not free:
        raise EpisodeError(
            f"the vocabulary must have a word that the episode does not use for its {role}s; all are used. Use a larger vocabulary."
        )
    return free


def neutral_words(tokenizer: Any) -> list[tuple[str, list[int]]]:
    """Function words that are one token behind a space, with that token.

    Raises:
        EpisodeError: the tokenizer has none.
    """
    found = tokenizer([f" {word}" for word in NEUTRAL], add_special_tokens=False)["input_ids"]
    single = [(word, ids) for word, ids in zip(NEUTRAL, found, strict=True) if len(ids) == 1]
    if not single:
        raise EpisodeError('tokenizer must have a function word of one token, such as " the"; it has none. Use control="zero-shot".')
    return single


def _noised(batch: Batch, draws: Sequence[np.random.Generator]) -> Mapping[str, Any]:
    """The examples' vectors exchanged for noise of the same norm."""
    inputs = {name: value.clone() for name, value in batch.inputs.items()}
    content: Tensor = inputs["inputs_embeds"]
    for i, (row, draw) in enumerate(zip(batch.spans, draws, strict=True)):
        for span in row:
            if span.shot < 0:
                continue
            if span.role == "image" and span.image is not None and "second_values" in inputs:
                inputs["second_values"][i, span.image] = _noise_like(inputs["second_values"][i, span.image], draw)
            else:
                for at in range(span.start, span.stop):
                    content[i, at] = _noise_like(content[i, at], draw)
    return inputs


def _noise_like(x: Tensor, draw: np.random.Generator) -> Tensor:
    noise = torch.from_numpy(draw.standard_normal(tuple(x.shape))).to(x)
    return noise * (x.norm() / noise.norm())


def _words(
    renderer: Renders, episodes: Sequence[Episode], like: Batch, draws: Sequence[np.random.Generator]
) -> tuple[Batch, tuple[str, ...]]:
    words = [word for word, _ in neutral_words(_tokenizer(renderer))]
    bare = [episode.without_shots() for episode in episodes]
    wanted = n_tokens(like)
    texts = [[words[int(k)] for k in draw.integers(0, len(words), n)] for n, draw in zip(wanted, draws, strict=True)]
    counts = [max(1, n - m) for n, m in zip(wanted, n_tokens(renderer.render(bare)), strict=True)]
    batch, gaps = like, [1]
    for _ in range(TRIES):
        batch = renderer.render([_longer(episode, text[:n]) for episode, text, n in zip(bare, texts, counts, strict=True)])
        gaps = [n - m for n, m in zip(wanted, n_tokens(batch), strict=True)]
        if not any(gaps):
            break
        counts = [max(1, n + gap) for n, gap in zip(counts, gaps, strict=True)]
    reasons = tuple(f"no number of words makes the filler as long as the prompt (off by {gap})" if gap else "" for gap in gaps)
    return replace(batch.to(like.inputs["input_ids"].device), episodes=(), renderer=None), reasons


def _longer(episode: Episode, words: Sequence[str]) -> Episode:
    return replace(episode, instruction=" ".join([*([episode.instruction] if episode.instruction else []), *words]))


def n_tokens(batch: Batch) -> list[int]:
    """Tokens of every prompt, padding left out."""
    return [sum(span.stop - span.start for span in row if span.role != "pad") for row in batch.spans]


def _tokenizer(renderer: Renders) -> Any:
    return getattr(renderer, "tokenizer", None)
