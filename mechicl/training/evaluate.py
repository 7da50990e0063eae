"""How well an organism learns from examples, through plain transformers: no hooks, nothing of the training's fast path.

The controls are those that a claim of in-context learning needs: the same questions without examples, and with the examples' labels dealt out
at random, so that they still show which names there are but no longer which picture has which.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechicl.prompts.episode import Episode
from mechicl.results import Estimate
from mechicl.training.growth import proportion

if TYPE_CHECKING:
    from mechicl.prompts.batch import Batch
    from mechicl.prompts.render import Renderer


@dataclass(frozen=True)
class Outcome:
    """Answers to a set of episodes.

    `accuracy`: the right label has the highest full-label log-probability among the candidates. `greedy`: every token of the right label is the
    likeliest of the whole vocabulary, the label's end included. `cla`: the likeliest first token opens a label of the prompt.
    """

    accuracy: Estimate
    greedy: Estimate
    cla: Estimate


@torch.no_grad()
def label_scores(
    model: Any, batch: Batch
) -> tuple[Float[Tensor, "batch label"], Float[Tensor, "batch label"], Float[Tensor, "batch vocab"]]:
    """Full-label log-probabilities in nats of every candidate (each prompt must have equally many), whether greedy decoding
    would write the label, and the logits of the answer's first token."""
    n_labels = len(batch.candidate_ids[0])
    long = batch.repeat(n_labels).append([row[j] for j in range(n_labels) for row in batch.candidate_ids])
    ids: Tensor = long.inputs["input_ids"]
    start = int(batch.n_pos)
    hidden = model.model(**long.inputs, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden[:, start - 1 : -1]).float()
    wanted, real = ids[:, start:], long.inputs["attention_mask"][:, start:].bool()
    each = logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0].masked_fill(~real, 0.0)
    greedy = ((logits.argmax(-1) == wanted) | ~real).all(1).float()
    shape = (n_labels, batch.n)
    return each.sum(1).view(shape).T, greedy.view(shape).T, logits[: batch.n, 0]


def answer(model: Any, renderer: Renderer, episodes: Sequence[Episode], *, size: int = 16) -> Outcome:
    """Put episodes to a plain transformers model, `size` at a time."""
    right, greedy, copied = [], [], []
    for start in range(0, len(episodes), size):
        batch = renderer.render(episodes[start : start + size])
        scores, written, first = label_scores(model, batch)
        answers = torch.tensor(batch.answers)
        right.append((scores.argmax(1) == answers).float())
        greedy.append(written.gather(1, answers[:, None])[:, 0])
        guess = first.argmax(-1).tolist()
        copied.append(torch.tensor([float(g in {ids[0] for ids in row}) for g, row in zip(guess, batch.candidate_ids, strict=True)]))
    return Outcome(*(estimate(torch.cat(parts)) for parts in (right, greedy, copied)))


def estimate(values: Tensor) -> Estimate:
    """A share with its Wilson interval."""
    value, low, high = proportion(values)
    return Estimate(value, low, high, len(values))


def deal_labels(episodes: Sequence[Episode], seed: int = 0) -> list[Episode]:
    """The label-permuted control: every episode's exemplar labels shuffled over its exemplars. The answer stays what it was."""
    dealt = []
    for k, episode in enumerate(episodes):
        labels = [shot.label for shot in episode.shots]
        random.Random(f"{seed} {k}").shuffle(labels)
        dealt.append(replace(episode, shots=tuple(replace(shot, label=label) for shot, label in zip(episode.shots, labels, strict=True))))
    return dealt


def without_shots(episodes: Sequence[Episode]) -> list[Episode]:
    """The zero-shot control."""
    return [episode.without_shots() for episode in episodes]
