"""`icl_accuracy`: how well a model answers from the examples, with what it would get without them."""

from __future__ import annotations

from typing import Any

import numpy as np

from mechicl.analysis.feed import Data, check_data, ids_of, provenance, rehearse
from mechicl.analysis.guarded import guarded
from mechicl.analysis.labels import Answers, Key, LabelScore, answer, check_score, margins, predict
from mechicl.analysis.statistics import mean_estimate, wilson
from mechicl.errors import EpisodeError
from mechicl.prompts.batch import Batch
from mechicl.results import Estimate, ICLAccuracy, Skipped


@guarded
def icl_accuracy(
    model: Any,
    data: Data,
    *,
    zero_shot: bool = True,
    score: LabelScore = "full",
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> ICLAccuracy:
    """Accuracy among the candidates, with first-token, open and context-label accuracy, margin, chance and the zero-shot control.

    An episode is right when the right label has the highest log-probability of all its candidates. Ties (within 1e-5 nats) are broken by a seeded coin,
    and counted in the notes: a model that cannot tell labels apart is at chance, not at zero. Candidates that begin alike tie on their first token.
    `cla` (context-label accuracy) is the share of episodes whose greedy first token over the whole vocabulary begins a label of the context: it tells
    a model that copies any label from one that has not understood the task; among the candidates it would be 1 by construction.

    Args:
        model: A `HookedVLM`, or anything with the surface of `HookedModel`; hooks that are active stay active.
        data: A Batch, or episodes, rendered a few at a time.
        zero_shot: Run the same questions without examples. Needs episodes: a hand-made Batch has none, then the control is None and a note says so.
        score: What decides between candidates: "full" (the whole label's log-probability, the primary), "mean_token", "first_token".
        seed: Decides ties and resampling.
        batch_size: Prompts per forward pass; a prompt counts once per candidate.
        task: What the data are, for the record.
        progress: Show a bar.

    Returns:
        ICLAccuracy. Episodes with a candidate that begins another one cannot be scored by whole labels: they are left out and named.

    Raises:
        EpisodeError: no data, no shots, one class only, or no episode can be scored.
        NotFiniteError: logits are NaN.
    """
    check_data(data, batch_size)
    check_score(score)
    rehearse(model, data)
    names = ids_of(data)
    found, key, reasons = answer(model, data, score=score, batch_size=batch_size, names=names, progress=progress)
    kept, skipped = usable(names, reasons)
    control, notes = None, []
    if zero_shot:
        control = zero_shot_control(model, data, score, seed, batch_size, progress, kept)
        if control is None:
            notes.append("No zero-shot control: a Batch without episodes cannot be rendered without its examples.")
    made = provenance(model, task=task, seed=seed, options={"score": score, "batch_size": batch_size, "zero_shot": zero_shot})
    return mark(found[0], key, names, kept, skipped, score=score, seed=seed, zero_shot=control, notes=notes, made=made)


def usable(names: list[str], reasons: list[str]) -> tuple[np.ndarray, tuple[Skipped, ...]]:
    """Rows that can be scored, and the others by name.

    Raises:
        EpisodeError: none can.
    """
    kept = np.array([i for i, reason in enumerate(reasons) if not reason], dtype=int)
    if not len(kept):
        raise EpisodeError(
            f"candidates must be told apart by their tokens; in none of {len(reasons)} episodes they are ({reasons[0]}). Choose other labels, or score='first_token'."
        )
    return kept, tuple(Skipped(name, reason) for name, reason in zip(names, reasons, strict=True) if reason)


def mark(
    answers: Answers,
    key: Key,
    names: list[str],
    kept: np.ndarray,
    skipped: tuple[Skipped, ...],
    *,
    score: LabelScore,
    seed: int,
    zero_shot: Estimate | None,
    notes: list[str],
    made: Any,
) -> ICLAccuracy:
    """Mark the answers of the rows `kept`."""
    right = key.answers[kept]
    deciding = answers.deciding(score)[kept]
    predicted, tied = predict(deciding, seed)
    by_first = predict(answers.first[kept], seed)[0]
    open_correct = np.array([int(answers.greedy[i]) == key.first_tokens[i][key.answers[i]] for i in kept])
    in_context = np.array([int(answers.greedy[i]) in key.context_tokens[i] for i in kept])
    alike = sum(len(set(key.first_tokens[i])) < len(key.first_tokens[i]) for i in kept)
    notes = list(notes)
    if tied.any():
        notes.append(f"{int(tied.sum())} of {len(kept)} episodes tie between their best candidates; a coin decided.")
    if alike:
        notes.append(
            f"In {alike} of {len(kept)} episodes candidates begin with the same token: their first-token accuracy is decided by a coin."
        )
    gaps = margins(deciding, right)
    return ICLAccuracy(
        accuracy=wilson(predicted == right), first_token_accuracy=wilson(by_first == right), open_accuracy=wilson(open_correct),
        cla=wilson(in_context), margin=mean_estimate(gaps, unit="nats", seed=seed),
        chance=float(np.mean([1 / len(key.candidates[i]) for i in kept])), zero_shot=zero_shot, correct=predicted == right,
        first_token_correct=by_first == right, open_correct=open_correct, margins=gaps, predicted=predicted, answers=right,
        candidates=tuple(key.candidates[i] for i in kept), episode_ids=tuple(names[i] for i in kept), n=len(kept), skipped=skipped,
        provenance=made, notes=tuple(notes), score=score,
    )  # fmt: skip


def zero_shot_control(
    model: Any, data: Data, score: LabelScore, seed: int, batch_size: int, progress: bool, kept: np.ndarray
) -> Estimate | None:
    """Accuracy on the rows `kept` without their examples; None for a Batch without episodes."""
    episodes = data.episodes if isinstance(data, Batch) else data
    if not episodes:
        return None
    bare: Data = [episodes[i].without_shots() for i in kept]
    if isinstance(data, Batch) and data.renderer is not None:  # who rendered the prompts knows how, also where the model does not
        bare = data.renderer.render(bare).to(data.inputs["input_ids"].device)
    found, key, _ = answer(model, bare, score=score, batch_size=batch_size, what="zero-shot control", progress=progress)
    predicted, _ = predict(found[0].deciding(score), seed)
    return wilson(predicted == key.answers)
