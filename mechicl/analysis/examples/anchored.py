"""`compare_strategies`: does it help to show examples, and which? Zero-shot, random, retrieved and anchored examples on the same queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from mechicl.analysis.examples.binary import Marked, measure
from mechicl.analysis.examples.retrieval import By, Chosen, choose, embed_usable, same_items, similarities
from mechicl.analysis.examples.strategies import BASELINES, PROMPTED, Choose, Task, run_ways
from mechicl.analysis.feed import provenance
from mechicl.analysis.guarded import guarded
from mechicl.analysis.labels import LabelScore, check_score, predict
from mechicl.analysis.statistics import holm, mcnemar_p
from mechicl.data.anchored import Negative, Plan, makers_of
from mechicl.errors import EpisodeError, OptionError
from mechicl.prompts.episode import Shot
from mechicl.prompts.form import PLAIN, Form
from mechicl.results import Skipped, Strategies, StrategyScore

NEED_POOL = ("random", "retrieved", "least similar", *BASELINES)


@guarded
def compare_strategies(
    model: Any,
    queries: Sequence[Shot],
    pool: Sequence[Shot],
    strategies: Sequence[str] = ("zero-shot", "random", "retrieved", "anchored", "majority", "copy"),
    *,
    labels: tuple[str, str],
    k: int = 4,
    negative: str | Negative | Sequence[str | Negative] = "neutral",
    plan: Plan = "both",
    custom: Mapping[str, Choose] | None = None,
    embeddings: Any = None,
    text: float = 0.5,
    instruction: str = "",
    question: str = "",
    form: Form = PLAIN,
    score: LabelScore = "full",
    baseline: str = "zero-shot",
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> Strategies:
    """Accuracy, AUROC and F1 of several ways to choose the examples, each beside the baseline on the same queries.

    The score of a query is the log-probability of the positive label minus the negative one's, nats; above nought the positive label is chosen. A
    query is never its own example: pool items with its text and its pixels are not shown.

    Args:
        model: A `HookedVLM`, or anything with the surface of `HookedModel`; hooks that are active stay active.
        queries: Items whose label is to be told, e.g. `load_memes(folder).shots("dev")`.
        pool: Labelled items that examples may be taken from.
        strategies: Some of `PROMPTED`, `BASELINES` and the names in `custom`.
        labels: (negative, positive): the candidates.
        k: Examples in a prompt (random, retrieved, least similar), and votes of "majority".
        negative, plan: How anchored pairs are made; see `mechicl.data.anchored`. The prompt of the paper could not be read: this is our reading.
        custom: Ways of your own by name, see `Choose`. The query's label is hidden from them.
        embeddings: What tells likeness: None for the model's own, an `Embedder` such as `load_clip(folder)`, or (queries, pool), two arrays.
        text: Weight of the text beside the picture in likeness.
        instruction, question, form: As in an Episode; `Form(turns="one")` with k = 1 is the layout of the authors' nearby code.
        score: What decides between labels: "full", "mean_token", "first_token".
        baseline: What the others are compared to.
        seed: Decides random examples, anchored pairs, ties and resampling.
        batch_size: Prompts per forward pass.
        task: What the data are, for the record.
        progress: Show bars.

    Returns:
        Strategies. A query that any way cannot be asked (a prompt beyond the context, no text, ...) is left out of all and named.

    Raises:
        OptionError: an option that does not exist; a strategy that needs a pool without one; k beyond the pool.
        EpisodeError: no queries, a label that is not in `labels`, or no query can be asked by all ways.
        NotFiniteError: logits are NaN.
    """
    check_score(score)
    custom = custom or {}
    ways = _check(queries, pool, strategies, labels, custom, k, batch_size)
    pairs = len(makers_of(negative, labels, plan))
    same = same_items(queries, pool)
    chosen, notes, known = _choose(model, queries, pool, same, ways, labels, k, pairs, plan, embeddings, text, seed, progress)
    job = Task(queries, pool, labels, k, negative, plan, instruction, question, form, seed, chosen, custom, same)
    scores, shots, reasons = run_ways(model, job, ways, score, batch_size, progress, known)
    names = [query.item or str(i) for i, query in enumerate(queries)]
    kept = [i for i, reason in enumerate(reasons) if not reason]
    if not kept:
        raise EpisodeError(
            f"a query must be askable by every way; none of {len(queries)} is ({names[0]}: {reasons[0]}). Change the strategies."
        )
    options = {
        "strategies": list(ways), "k": k, "negative": str(negative) if isinstance(negative, str) else "custom", "plan": plan, "text": text,
        "score": score, "batch_size": batch_size, "instruction": instruction, "question": question, "form": str(form), "pool": len(pool),
    }  # fmt: skip
    return _mark(
        {way: values[kept] for way, values in scores.items()}, {way: shots[way] for way in ways},
        np.array([queries[i].label == labels[1] for i in kept]), tuple(names[i] for i in kept), labels, baseline, seed,
        tuple(Skipped(names[i], reason) for i, reason in enumerate(reasons) if reason), notes,
        provenance(model, task=task, seed=seed, options=options),
    )  # fmt: skip


def _check(
    queries: Sequence[Shot], pool: Sequence[Shot], strategies: Sequence[str], labels: tuple[str, str], custom: Mapping[str, Choose], k: int, batch_size: int
) -> tuple[str, ...]:  # fmt: skip
    """The ways, each once, after the refusals that need no model."""
    known = [*PROMPTED, *BASELINES, *custom, *(f"anchored:{plan}" for plan in get_args(Plan))]
    ways = tuple(dict.fromkeys(strategies))
    unknown = [way for way in ways if way not in known]
    if unknown or not ways or any(way in PROMPTED + BASELINES for way in custom):
        raise OptionError(f"strategies must be some of {', '.join(known)}; got {list(strategies)}. Own ways need names of their own.")
    if len(labels) != 2 or labels[0] == labels[1]:
        raise OptionError(f"labels must be (negative, positive), two different words; got {labels}. Give both.")
    if k < 1 or batch_size < 1:
        raise OptionError(f"k and batch_size must be at least 1; got {k} and {batch_size}. Use zero-shot to show no example.")
    if not queries:
        raise EpisodeError("queries must be a non-empty list; got none. Give items with labels.")
    for what, shots in (("query", queries), ("pool item", pool)):
        odd = next((j for j, shot in enumerate(shots) if shot.label not in labels), None)
        if odd is not None:
            raise EpisodeError(
                f"labels must be all there are; {what} {odd} has {shots[odd].label!r}, labels are {list(labels)}. Correct one of them."
            )
    need = [way for way in ways if way in NEED_POOL or way == "anchored:borrowed"]
    if need and not pool:
        raise OptionError(f"pool must hold labelled items for {', '.join(need)}; got none. Give some, or leave these strategies out.")
    return ways


def _choose(
    model: Any, queries: Sequence[Shot], pool: Sequence[Shot], same: np.ndarray, ways: tuple[str, ...], labels: tuple[str, str], k: int, pairs: int, plan: str,
    embeddings: Any, text: float, seed: int, progress: bool,
) -> tuple[dict[str, Chosen], list[str], list[str]]:  # fmt: skip
    """Which pool items each way shows to each query, what to say about it, and why queries have no vector ("": they do).

    Pool items without a vector are closed to all in `same`, in place.
    """
    kinds: dict[str, By] = {"random": "random", "retrieved": "most similar", "least similar": "least similar"}
    asked = [way for way in kinds if way in ways or (way == "retrieved" and {"majority", "copy"} & set(ways))]
    borrowed = "anchored:borrowed" in ways or ("anchored" in ways and plan == "borrowed")
    if not asked and not borrowed:
        return {}, [], [""] * len(queries)
    if borrowed and not pool:
        raise OptionError("pool must hold positive items for plan 'borrowed'; got none. Give some, or choose another plan.")
    alike = np.zeros((len(queries), len(pool)))
    notes, reasons = [], [""] * len(queries)
    if borrowed or set(asked) - {"random"}:
        given = embeddings if isinstance(embeddings, tuple) else (embeddings if embeddings is not None else model,) * 2
        one, reasons = embed_usable(given[0], queries, what="embedding queries", progress=progress)
        two, unusable = embed_usable(given[1], pool, what="embedding the pool", progress=progress)
        alike = similarities(one, two, text=text)
        if any(unusable):
            same[:, [bool(reason) for reason in unusable]] = True
            notes.append(f"{sum(map(bool, unusable))} of {len(pool)} pool items are never shown ({next(filter(None, unusable))}).")
        notes.append(f"Likeness by {two.source}, text weighted {text:g}.")
    found = {way: choose(alike, k, kinds[way], seed=seed, forbidden=same) for way in asked}
    if borrowed:
        negative = np.array([shot.label != labels[1] for shot in pool])
        found["positive"] = choose(alike, pairs, seed=seed, forbidden=same | negative)
    texts = [shot.text for shot in pool if shot.text]
    twins = sum(query.text in set(texts) for query in queries if query.text)
    if twins:
        notes.append(f"{twins} of {len(queries)} queries share their text with an item of the pool.")
    return found, notes, reasons


def _mark(
    scores: Mapping[str, np.ndarray], shots: Mapping[str, float], truth: np.ndarray, names: tuple[str, ...], labels: tuple[str, str],
    baseline: str, seed: int, skipped: tuple[Skipped, ...], notes: list[str], made: Any,
) -> Strategies:  # fmt: skip
    """Answers to numbers."""
    marked, ties = {}, {}
    for way, values in scores.items():
        middle = 0.5 if way in ("majority", "prior") else 0.0
        predicted, tied = predict(np.stack([np.zeros(len(values)), values - middle], 1), seed)
        marked[way], ties[way] = Marked(values, predicted == 1, truth), int(tied.sum())
    there = baseline if baseline in marked else None
    notes = list(notes)
    if there is None:
        notes.append(f"No differences: the baseline {baseline!r} was not run.")
    notes += [f"{way}: {count} of {len(truth)} queries tie; a coin decided." for way, count in ties.items() if count]
    if truth.all() or not truth.any():
        notes.append("All queries have one label: AUROC is not defined.")
    found = measure(marked, baseline=there, seed=seed)
    right = {way: one.predicted == truth for way, one in marked.items()}
    p = {way: mcnemar_p(right[there], right[way]) if there is not None and way != there else np.nan for way in marked}
    corrected = dict(zip(p, holm(list(p.values())), strict=True))
    rows = tuple(
        StrategyScore(
            strategy=way, kind="baseline" if way in BASELINES else "model", accuracy=found[way].values["accuracy"],
            auroc=found[way].values["auroc"], f1=found[way].values["f1"], accuracy_change=found[way].changes["accuracy"],
            auroc_change=found[way].changes["auroc"], f1_change=found[way].changes["f1"], mcnemar_p=float(p[way]),
            holm_p=float(corrected[way]), shots=shots[way], positive_share=float(one.predicted.mean()), scores=one.scores,
            predicted=one.predicted, correct=right[way],
        )
        for way, one in marked.items()
    )  # fmt: skip
    return Strategies(
        rows=rows, baseline=baseline, labels=labels, answers=truth, query_ids=names, chance=float(max(truth.mean(), 1 - truth.mean())),
        n=len(truth), skipped=skipped, provenance=made, notes=tuple(notes),
    )  # fmt: skip
