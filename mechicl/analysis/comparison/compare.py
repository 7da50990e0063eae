"""`compare`: two sizes, a language model and the vision-language model built on it, two checkpoints, or two modalities of one model, on the same episodes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from mechicl.analysis.comparison.agreement import agree_on, alignment, heads_named
from mechicl.analysis.comparison.profiles import profiles
from mechicl.analysis.comparison.sides import Asked, SideStore, Source, both_sides, known_by, named, unique_ids
from mechicl.analysis.comparison.trunk import BAR, trunk
from mechicl.analysis.comparison.words import prompts_of
from mechicl.analysis.feed import Data, check_data
from mechicl.analysis.guarded import guarded
from mechicl.analysis.heads.named import SCORES
from mechicl.analysis.statistics import mcnemar_p, paired_change, wilson
from mechicl.errors import OptionError
from mechicl.models.load import check_model
from mechicl.prompts.batch import Batch
from mechicl.results import ICLAccuracy
from mechicl.results.comparison import AccuracyPair, Align, Alignment, Comparison, ScoreAgreement, Side, Trunk

COMPARED = ("induction", "tla", "ila", "previous_token", "duplicate", "sink")
"""Scores that are compared unless others are asked for: of each kind of place that a head can read, so that heads can be told apart."""


@guarded
def compare(
    model_a: Source,
    model_b: Source,
    episodes: Data,
    *,
    episodes_b: Data | None = None,
    scores: Sequence[str] = COMPARED,
    top: int = 10,
    align: Literal["auto"] | Align = "auto",
    names: tuple[str, str] | None = None,
    accuracy: bool = True,
    n_null: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    out: str | os.PathLike[str] | None = None,
    load_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Comparison:
    """Two models side by side: which head stands for which, whether the same heads do the work, how far scores and answers differ.

    Args:
        model_a: A hooked model, or what `mechicl.load` takes: models that are named are loaded one after the other, so that two large ones need the memory of one.
        model_b: The other one; the same model for two modalities.
        episodes: What both are asked. A language model needs episodes of words (`in_words`).
        episodes_b: What the second is asked instead, episode by episode the same with other items or in another modality; their labels must be those of `episodes`.
        scores: Head scores to compare, of `mechicl.analysis.heads.named.SCORES`. Those of different kinds (labels, items, places, first token) serve to find pairs for each other.
        top: Heads compared at the top of both rankings; at most a quarter of the smaller model's heads.
        align: "index": same layer and number, for one trunk. "function": pairs with the most similar scores over all episodes. "depth": the same among heads of the same
            relative depth. "auto": "index" where shapes are the same and weights agree, else "function".
        names: What to call the two.
        accuracy: Ask both the questions too.
        n_null: Shuffles of the scores' nulls; see `score_heads`.
        seed: Decides nulls, intervals, permutations.
        batch_size: Prompts per forward pass.
        task: What the episodes are, for the record.
        out: A folder that keeps each side when it is measured; asked again, nothing finished is measured anew. It knows models by their names: other weights under one name need
            another folder.
        load_options: For models that are named: device, dtype, revision, ...
        progress: Show bars.

    Returns:
        Comparison.

    Raises:
        OptionError: options, or episodes that are not the same questions.
        EpisodeError: episodes that cannot be used.
        CheckpointError, UnsupportedModelError: a model that is named and cannot be loaded; both names are looked up before any work.
    """
    other = episodes if episodes_b is None else episodes_b
    _check(episodes, other, scores, top, align, batch_size)
    same = model_a is model_b or (isinstance(model_a, str) and model_a == model_b)
    options = {"progress": progress, **(load_options or {})}
    for source in (model_a, model_b):
        if isinstance(source, str | Path):
            check_model(source, **{key: options[key] for key in ("revision", "trust_remote_code") if key in options})
    called = names or _names((named(model_a), named(model_b)), (_shown(episodes), _shown(other)))
    asked = Asked(tuple(scores), accuracy, n_null, seed, batch_size, task, progress)
    store = None if out is None else SideStore(out, _plan((model_a, model_b), (episodes, other), asked))
    weigh = align in ("auto", "index") and not same
    sides, weights = both_sides((model_a, model_b), (episodes, other), called, asked, options, store, weigh=weigh)
    shared = (
        Trunk(True, 1.0, BAR, {}, "one model") if same else trunk(*weights) if weights else Trunk(False, float("nan"), BAR, {}, "not asked")
    )
    how, why = _choose(align, sides, shared)
    return compare_sides(sides, shared, how, why, top=top, seed=seed)


def compare_sides(sides: tuple[Side, Side], shared: Trunk, how: Align, why: str, *, top: int = 10, seed: int = 0) -> Comparison:
    """Two sides that are measured already, compared."""
    first, second = sides
    if (first.scores.n, [s.episode for s in first.scores.skipped]) != (second.scores.n, [s.episode for s in second.scores.skipped]):
        raise OptionError(
            f"both models must be scored on the same episodes; got {first.scores.n} and {second.scores.n} usable ones. Give episodes with the same labels."
        )
    names = [name for name in first.scores.scores if name in second.scores.scores]
    found = profiles(first, second, names)
    agreed, partials = {}, []
    for name in found.names:
        agreed[name], partial = agree_on(name, found, sides, how, top=top, seed=seed)
        partials.append(partial)
    same_shape = (first.n_layers, first.n_heads) == (second.n_layers, second.n_heads)
    aligned = alignment(found, how, partials, same_shape=same_shape, seed=seed)
    answers = paired_accuracy(first.accuracy, second.accuracy, seed) if first.accuracy is not None and second.accuracy is not None else None
    notes = [f"{side.name}: {note}" for side in sides for note in side.scores.notes]
    left = [name for name in names if name not in found.names]
    notes += [f"Not compared, because one model lacks them on some heads or prompts: {', '.join(left)}."] if left else []
    if how != "index":
        circular = [name for name, one in agreed.items() if not one.aligned_by]
        notes += [f"No test of {', '.join(circular)}: no score of another kind was there to find pairs with."] if circular else []
    return Comparison(
        first=first, second=second, trunk=shared, alignment=aligned, why=why, scores=agreed, accuracy=answers, verdict=_verdict(sides, aligned, agreed, answers),
        n=first.scores.n, skipped=first.scores.skipped, provenance=(first.scores.provenance, second.scores.provenance), notes=tuple(notes),
    )  # fmt: skip


def paired_accuracy(first: ICLAccuracy, second: ICLAccuracy, seed: int = 0) -> AccuracyPair | None:
    """Both models' answers to the episodes that both could be asked; None where there is none."""
    where = {name: i for i, name in enumerate(second.episode_ids)}
    rows = [(i, where[name]) for i, name in enumerate(first.episode_ids) if name in where]
    if not rows:
        return None
    a, b = (np.array(part) for part in zip(*rows, strict=True))
    right, also = first.correct[a], second.correct[b]
    said = [first.candidates[i][first.predicted[i]] == second.candidates[j][second.predicted[j]] for i, j in rows]
    p, q = float(right.mean()), float(also.mean())
    spread = float(np.mean([1 / max(len(first.candidates[i]) - 1, 1) for i in a]))
    return AccuracyPair(
        first=wilson(right), second=wilson(also), change=paired_change(right, also, unit="probability", seed=seed),
        margin_change=paired_change(first.margins[a], second.margins[b], unit="nats", seed=seed), mcnemar_p=mcnemar_p(right, also),
        agree=wilson(said, unit="share of episodes"), agree_chance=p * q + (1 - p) * (1 - q) * spread,
        chance=float(np.mean([1 / len(first.candidates[i]) for i in a])), n=len(rows),
    )  # fmt: skip


def _check(episodes: Data, other: Data, scores: Sequence[str], top: int, align: str, batch_size: int) -> None:
    for data in (episodes, other):
        check_data(data, batch_size)
        if not unique_ids(data):
            raise OptionError(
                "episodes must have ids of their own, so that answers can be paired; some share one. Set Episode.id, or leave all ids empty."
            )
    unknown = [name for name in scores if name not in SCORES]
    if unknown or not scores:
        raise OptionError(f"scores must be among {', '.join(SCORES)}; got {unknown or 'none'}. Leave it out for {', '.join(COMPARED)}.")
    if top < 1:
        raise OptionError(f"top must be at least 1; got {top}. Choose how many of the best heads to compare.")
    if align not in ("auto", *get_args(Align)):
        raise OptionError(f'align must be "auto", "index", "depth" or "function"; got {align!r}. "auto" looks at the weights.')
    if len(episodes) != len(other):
        raise OptionError(f"episodes_b must be episode by episode those of episodes; got {len(episodes)} and {len(other)}. Pair them.")
    if isinstance(episodes, Batch) or isinstance(other, Batch):
        return
    for k, (a, b) in enumerate(zip(episodes, other, strict=True)):
        if (a.candidates, a.answer, [s.label for s in a.shots]) != (b.candidates, b.answer, [s.label for s in b.shots]):
            raise OptionError(
                f"episodes_b must have the labels of episodes; episode {a.id or k} has others. Make it from episodes, e.g. with in_words."
            )


def _shown(data: Data) -> str:
    if isinstance(data, Batch):
        return prompts_of(data.episodes) if data.episodes else "vectors"
    return prompts_of(data)


def _names(called: tuple[str, str], shown: tuple[str, str]) -> tuple[str, str]:
    if called[0] != called[1]:
        return called
    if shown[0] != shown[1]:
        return f"{called[0]}, {shown[0]}", f"{called[1]}, {shown[1]}"
    return f"{called[0]} (first)", f"{called[1]} (second)"


def _plan(sources: tuple[Source, Source], data: tuple[Data, Data], asked: Asked) -> dict[str, Any]:
    episodes = [known_by(one) for one in data]
    plan = {"models": [named(source) for source in sources], "episodes": episodes, "scores": list(asked.scores), "accuracy": asked.accuracy}
    return plan | {"n_null": asked.n_null, "seed": asked.seed, "task": asked.task}


def _choose(align: str, sides: tuple[Side, Side], shared: Trunk) -> tuple[Align, str]:
    """How heads are aligned, and why.

    Raises:
        OptionError: "index" was asked for models of different shapes.
    """
    shapes = [(side.n_layers, side.n_heads) for side in sides]
    if align == "index" and shapes[0] != shapes[1]:
        raise OptionError(
            f'align="index" must be for models with as many layers and heads; got {shapes[0]} and {shapes[1]}. Use "function".'
        )
    if align == "auto":
        if shared.shared and shapes[0] == shapes[1]:
            said = shared.reason or f"shapes are the same and the heads' weights agree (median cosine {shared.median:.3f})"
            return "index", f"by index: {said}"
        reason = shared.reason or f"the heads' weights do not agree (median cosine {shared.median:.3f}, bar {shared.bar})"
        return "function", f"by function: {reason}"
    asked: dict[str, Align] = {"index": "index", "depth": "depth", "function": "function"}
    said = "as asked" if np.isnan(shared.median) else f"as asked; the heads' weights agree with a median cosine of {shared.median:.3f}"
    return asked[align], f"by {align}: {said}"


def _verdict(sides: tuple[Side, Side], aligned: Alignment, agreed: Mapping[str, ScoreAgreement], answers: AccuracyPair | None) -> str:
    first, second = (side.name for side in sides)
    said = []
    for one in list(agreed.values())[:1]:
        of = f"{len(one.shared)} of the {one.k} heads with the highest {one.name.replace('_', ' ')} stand for one another"
        p = one.p_layer if np.isfinite(one.p_layer) else one.p
        chance = one.expected_layer if np.isfinite(one.expected_layer) else one.expected
        within = " dealing within layers" if np.isfinite(one.p_layer) else ""
        said.append(f"{of} ({heads_named(one.shared)}; {chance:.1f} by chance{within}, p = {p:.2g}; rank correlation {one.spearman})")
    if np.isfinite(aligned.agreement):
        word = "agree" if aligned.p < 0.05 else "do not agree more than pairs dealt at random"
        said.append(f"over all scores paired heads {word} (partial rank correlation {aligned.agreement:.2f}, p = {aligned.p:.2g})")
    if answers is not None:
        said.append(
            f"accuracy {answers.first.value:.2f} against {answers.second.value:.2f}, change {answers.change}, McNemar p = {answers.mcnemar_p:.2g}"
        )
    return f"{first} against {second}, heads aligned by {aligned.how}: " + "; ".join(said) + "."
