"""`icl_accuracy`: how well the model answers from its examples, beside the control without examples."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np

from mechicl.analysis.answers import Answers, Prepared, Score, prepare, score_answers
from mechicl.analysis.feed import Data, check_data, labels_of, provenance
from mechicl.analysis.statistics import mean_estimate, wilson
from mechicl.errors import OptionError
from mechicl.prompts.batch import Batch
from mechicl.results import Estimate, ICLAccuracy


def icl_accuracy(
    model: Any,
    data: Data,
    *,
    zero_shot: bool = True,
    score: Score = "label",
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> ICLAccuracy:
    """Accuracy over the candidate labels, whole and by first token, greedy accuracy over the vocabulary, CLA and margin, with intervals.

    An answer is right when the right label scores strictly higher than every other candidate: a tie is wrong. By the first token alone, two candidates
    that begin alike cannot be told apart and count as a tie; `provenance.options["shared_first_tokens"]` counts such prompts.

    Args:
        model: A `HookedVLM`, or anything with the surface of `HookedModel`; hooks it carries stay in force.
        data: A Batch or episodes.
        zero_shot: Also answer the same questions without examples (where the data are episodes or know theirs).
        score: What `accuracy` and `margin` are measured by: "label" (log-probability of the whole label), "per_token" (divided by its length), or
            "first_token" (one forward pass a prompt).
        seed: Of the bootstrap of the margin.
        batch_size: Prompts per forward pass.
        task: For the record.
        progress: Show bars.

    Returns:
        ICLAccuracy; episodes that could not be rendered are in `skipped`, by name and reason.

    Raises:
        EpisodeError, ContextLengthError, RenderError, ImageError: nothing can be scored.
        OptionError: an unknown score.
        NotFiniteError: NaN logits.

    Source:
        Huang et al. 2026 for CLA (the greedy answer begins like a label of the context). Differs: whole labels, zero-shot control, intervals.
    """
    check_data(data, batch_size)
    check_score(score)
    prepared = prepare(model, data, batch_size=batch_size)
    context = [set(labels) for labels, _ in _contexts(data, prepared)]
    answers = score_answers(model, prepared, score=score, rows=4 * batch_size, progress=progress)
    control = None
    if zero_shot and (bare := without_shots(data)) is not None:
        bare_prepared = prepare(model, bare, batch_size=batch_size)
        without = score_answers(model, bare_prepared, score=score, rows=4 * batch_size, progress=progress, what="zero-shot")
        control = wilson(judge_answers(without, bare_prepared.answers, score)[0])
    options = {"score": score, "batch_size": batch_size, "shared_first_tokens": int(shared_first_tokens(answers).sum())}
    return summarise(answers, prepared, context, score, control, seed, provenance(model, task=task, seed=seed, options=options))


def check_score(score: str) -> None:
    """Raises OptionError for an unknown way of scoring."""
    if score not in get_args(Score):
        raise OptionError(f'score must be "label", "per_token" or "first_token"; got {score!r}. "label" scores the whole label.')


def without_shots(data: Data) -> list[Any] | None:
    """The zero-shot control of the data; None for prompts that do not know their episodes."""
    episodes = list(data.episodes) if isinstance(data, Batch) else list(data)
    return [episode.without_shots() for episode in episodes] or None


def _contexts(data: Data, prepared: Prepared) -> list[tuple[tuple[str, ...], str]]:
    return [pair for batch in prepared.batches for pair in labels_of(batch)]


def shared_first_tokens(answers: Answers) -> np.ndarray:
    """Prompts [batch] in which two candidates begin with the same token."""
    return np.array([len(set(row[row >= 0])) < (row >= 0).sum() for row in answers.first_ids])


def judge_answers(answers: Answers, right: np.ndarray, score: Score) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right or wrong [batch], margin of the right label over the best other one [batch] in nats, and the chosen candidate [batch]."""
    values = answers.scores(score)
    rows = np.arange(len(right))
    others = values.copy()
    others[rows, right] = -np.inf
    margins = values[rows, right] - others.max(1)
    return margins > 0, margins, values.argmax(1)


def summarise(
    answers: Answers, prepared: Prepared, context: list[set[str]], score: Score, control: Estimate | None, seed: int, made: Any
) -> ICLAccuracy:
    """Scores as an ICLAccuracy."""
    right, candidates = prepared.answers, prepared.candidates
    rows = np.arange(prepared.n)
    correct, margins, predicted = judge_answers(answers, right, score)
    first_correct, _, _ = judge_answers(answers, right, "first_token")
    open_correct = answers.greedy == answers.first_ids[rows, right]
    shown = np.array(
        [
            [c in labels for c in row] + [False] * (answers.first_ids.shape[1] - len(row))
            for row, labels in zip(candidates, context, strict=True)
        ]
    )
    copies = ((answers.first_ids == answers.greedy[:, None]) & shown).any(1)
    return ICLAccuracy(
        accuracy=wilson(correct), first_token_accuracy=wilson(first_correct), open_accuracy=wilson(open_correct), cla=wilson(copies),
        margin=mean_estimate(margins, unit="nats", seed=seed), chance=float(np.mean([1 / len(c) for c in candidates])), zero_shot=control,
        correct=correct, first_token_correct=first_correct, open_correct=open_correct, margins=margins, predicted=predicted, answers=right,
        candidates=candidates, episode_ids=prepared.ids, n=prepared.n, skipped=prepared.skipped, provenance=made,
    )  # fmt: skip
