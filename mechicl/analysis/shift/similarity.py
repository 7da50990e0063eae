"""`similarity_test`: does an example that is like the query shift its keys and values more?

The claim of Miyanishi and Nguyen (arXiv 2408.12959) as a paired test. Our definition; the paper's could not be read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch

from mechicl.analysis.effect_sizes import paired_effect
from mechicl.analysis.examples.retrieval import By, Chosen, choose, embed, same_items, similarities
from mechicl.analysis.feed import progress_bar, provenance
from mechicl.analysis.guarded import guarded
from mechicl.analysis.shift.kv_shift import TIE, check_spans, mean_of
from mechicl.analysis.shift.pairs import Prompts, Table, Wanted, read_prompts
from mechicl.analysis.shift.read import Part, check_parts, readable_layers
from mechicl.analysis.statistics import bootstrap_interval, holm, mean_estimate, sign_flip_p
from mechicl.errors import EpisodeError, OptionError
from mechicl.models.embeddings import Embeddings, OwnEmbedder
from mechicl.prompts.batch import Batch, Renders
from mechicl.prompts.episode import Episode, Shot, check_pictures
from mechicl.prompts.filler import filler, n_tokens, neutral_words
from mechicl.prompts.vectors import VectorShot
from mechicl.results import Estimate, SimilarityEffect, SimilarityTest, Skipped

Labels = Literal["neutral", "own"]
Control = Literal["filler", "zero-shot", "both"]

WAYS: tuple[By, ...] = ("most similar", "random", "least similar")
CONTRASTS = (("most similar", "least similar"), ("most similar", "random"), ("random", "least similar"))
FEW = 5
"""Queries below which a paired effect has no interval worth the name."""


@guarded
def similarity_test(
    model: Any,
    queries: Sequence[Episode],
    pool: Sequence[Shot],
    *,
    labels: Labels = "neutral",
    control: Control = "both",
    embeddings: Any = None,
    text: float = 0.5,
    spans: Sequence[str] | None = None,
    parts: Sequence[Part] = ("k", "v"),
    layers: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> SimilarityTest:
    """Each query with one example, three times: the item of the pool most like it, any, and the least like it; how far do keys and values shift?

    The three prompts differ in the example's content only: the same form, the same label, as many tokens, and the same control for all three. An item is never its
    own example.

    Args:
        model: A `HookedVLM`, or a toy.
        queries: Their examples are not used.
        pool: Items to take examples from; the labels of the pool are used with labels="own" only.
        labels: "neutral": every example gets one and the same word as its label (for toys: a label that is not the answer), so that no label tells like
            from unlike. "own": its own; then an example like the query mostly has the query's label too, and what is found may be the label's doing.
        control: "filler": as many neutral tokens in place of the example; "zero-shot": the question alone; "both": the first, with the second in `others`. The
            answer can turn round between the two; then a note says so.
        embeddings: Who tells likeness: None for the model's own embeddings (sequences of vectors: the vectors), an `Embedder`, or a pair (queries, pool) of
            arrays or `Embeddings`.
        text: Weight of the text beside the picture, 0 to 1.
        spans, parts, layers, batch_size, task, progress: As in `kv_shift`.
        seed: Decides random examples, filler, resampling and permutations.

    Returns:
        SimilarityTest. Items of another length than most of the pool are never shown (a note says how many).

    Raises:
        EpisodeError: fewer than five queries, an empty pool, or none that can be compared.
        OptionError: an option that does not exist, or too small a pool.
        UnsupportedModelError, NotFiniteError: see `read_kv`.
    """
    _check(queries, pool, labels, control)
    renderer: Renders = getattr(model, "renderer", model)
    chosen_layers, why = readable_layers(model, check_parts(parts), layers)
    cells = tuple((part, layer) for layer in chosen_layers for part in parts if (part, layer) not in why)
    wanted = Wanted(check_spans(spans), tuple(parts), tuple(chosen_layers), cells, means=False)
    asked = [episode.query for episode in queries]
    shown = [_prompt(renderer, queries[0], shot, labels) for shot in pool]
    lengths = _lengths(renderer, shown, batch_size)
    usual = Counter(lengths).most_common(1)[0][0]
    other = np.array([n != usual for n in lengths])
    one, two = _embedded(model, renderer, asked, pool, embeddings, progress)
    alike = similarities(one, two, text=text)
    forbidden = _same(asked, pool) | other[None]
    picks = {way: choose(alike, 1, way, seed=seed, forbidden=forbidden) for way in WAYS}
    against = ("filler", "zero-shot") if control == "both" else (control,)
    tables = {name: {way: Table(wanted, model.cfg.n_key_value_heads) for way in WAYS} for name in against}
    names = [episode.id or str(i) for i, episode in enumerate(queries)]
    bar = progress_bar(None, total=len(queries), what="similarity and shift", show=progress)
    for start in range(0, len(queries), batch_size):
        rows = range(start, min(start + batch_size, len(queries)))
        few = {way: [_prompt(renderer, queries[i], pool[int(picks[way].rows[i, 0])], labels) for i in rows] for way in WAYS}
        batches = {way: renderer.render(episodes) for way, episodes in few.items()}
        same = _even(batches)
        found = {way: read_prompts(model, Prompts(batch, same), wanted) for way, batch in batches.items()}
        for name in against:
            reference = read_prompts(model, _control(renderer, few["random"], batches["random"], name, seed, rows), wanted)
            for way in WAYS:
                tables[name][way].add(rows, names, found[way], reference)
        bar.update(len(rows))
    bar.close()
    notes = ["Our definition; the paper's could not be read."]
    if other.any():
        notes.append(
            f"{int(other.sum())} of {len(pool)} items are never shown: their prompts have another length than most ({usual} tokens)."
        )
    if labels == "own":
        notes.append("Examples carry their own labels: like examples mostly have the query's label, which may be what shifts.")
    made = provenance(model, task=task, seed=seed, options={"labels": labels, "control": control, "text": text, "batch_size": batch_size})
    done = [name for name in against if len(_kept(tables[name])) >= FEW] or [against[0]]  # where none has enough, the first says why
    notes += [f"No result against {name}: {tables[name]['random'].skipped[0].reason}." for name in against if name not in done]
    return _both([_result(name, tables[name], picks, one.source, names, notes, made, seed) for name in done])


def _both(results: Sequence[SimilarityTest]) -> SimilarityTest:
    """The first result with the others; a note where they say the opposite."""
    first, *others = results
    notes = list(first.notes)
    for other in others:
        for a, b in zip(first.comparisons, other.comparisons, strict=True):
            if (a.first, a.second) == CONTRASTS[0] and _sign(a) * _sign(b) < 0:
                notes.append(
                    f"Which example shifts {a.part} more depends on the control: most minus least similar is {a.effect.value:.2f} standard deviations "
                    f"from the {first.control} and {b.effect.value:.2f} from the {other.control} prompt."
                )
    return replace(first, others={other.control: other for other in others}, notes=tuple(notes))


def _sign(one: SimilarityEffect) -> int:
    """Of the effect; 0 where its interval holds zero."""
    return 1 if one.effect.low > 0 else -1 if one.effect.high < 0 else 0


def _kept(tables: Mapping[str, Table]) -> list[int]:
    """Queries that were compared in every way."""
    return sorted(set.intersection(*({*table.rows} for table in tables.values())))


def _check(queries: Sequence[Episode], pool: Sequence[Shot], labels: str, control: str) -> None:
    if labels not in get_args(Labels):
        raise OptionError(f"labels must be one of {', '.join(get_args(Labels))}; got {labels!r}. Neutral labels tell nothing.")
    if control not in get_args(Control):
        raise OptionError(f"control must be one of {', '.join(get_args(Control))}; got {control!r}. Pick one of them.")
    if len(queries) < FEW:
        raise EpisodeError(f"queries must be at least {FEW} episodes; got {len(queries)}. A paired effect needs a spread over queries.")
    if len(pool) < 3:
        raise EpisodeError(f"pool must have at least three items; got {len(pool)}. Give more to choose from.")
    check_pictures([episode.without_shots() for episode in queries])


def _prompt(renderer: Renders, query: Episode, item: Shot, labels: Labels) -> Episode:
    """The query behind one example."""
    label = item.label if labels == "own" else _neutral_label(renderer, query)
    shot = replace(item, label=label)
    return replace(query, shots=(shot,), candidates=tuple(dict.fromkeys((*query.candidates, label))))


def _neutral_label(renderer: Renders, query: Episode) -> str:
    tokenizer = getattr(renderer, "tokenizer", None)
    if tokenizer is None:  # a toy says nothing but labels
        return next(label for label in query.candidates if label != query.answer)
    return next(word for word, _ in neutral_words(tokenizer) if word not in query.candidates)


def _lengths(renderer: Renders, prompts: Sequence[Episode], size: int) -> list[int]:
    """Tokens of each prompt."""
    return [n for start in range(0, len(prompts), size) for n in n_tokens(renderer.render(prompts[start : start + size]))]


def _embedded(
    model: Any, renderer: Renders, queries: Sequence[Shot], pool: Sequence[Shot], source: Any, progress: bool
) -> tuple[Embeddings, Embeddings]:
    """Vectors of queries and items, of one source."""
    if isinstance(source, tuple):
        return embed(source[0], queries), embed(source[1], pool)
    if source is None and all(isinstance(shot, VectorShot) for shot in (*queries, *pool)):
        rows = [np.stack([_vector(shot) for shot in shots]) for shots in (queries, pool)]
        first, second = (Embeddings(x, np.zeros((len(x), 0)), "the items' own vectors") for x in rows)
        return first, second
    if source is None and getattr(renderer, "vocabulary", None) is not None:
        source = OwnEmbedder(model, candidates=("l0", "l1"))
    source = model if source is None else source
    one = embed(source, queries, what="embedding queries", progress=progress)
    return one, embed(source, pool, what="embedding the pool", progress=progress)


def _vector(shot: Shot) -> np.ndarray:
    assert isinstance(shot, VectorShot)
    parts = [shot.vector] if shot.second is None else [shot.vector, shot.second]
    return torch.cat([part.flatten() for part in parts]).double().cpu().numpy()


def _same(queries: Sequence[Shot], pool: Sequence[Shot]) -> np.ndarray:
    """Pairs that are one and the same item."""
    if all(isinstance(shot, VectorShot) for shot in (*queries, *pool)):
        return np.array([[bool(np.array_equal(_vector(a), _vector(b))) for b in pool] for a in queries])
    return same_items(queries, pool)


def _control(renderer: Renders, few: Sequence[Episode], batch: Batch, control: str, seed: int, rows: range) -> Prompts:
    if control == "filler":
        return Prompts(*filler(renderer, few, batch, "turns", seed=seed, numbers=rows))
    return Prompts(renderer.render([episode.without_shots() for episode in few]), ("",) * len(few))


def _even(batches: Mapping[str, Batch]) -> tuple[str, ...]:
    """Why the prompts of a query cannot be compared: they have other lengths."""
    counts = zip(*(n_tokens(batch) for batch in batches.values()), strict=True)
    return tuple("" if len(set(row)) == 1 else f"its prompts have {', '.join(map(str, row))} tokens" for row in counts)


def _result(
    control: str,
    tables: Mapping[str, Table],
    picks: Mapping[str, Chosen],
    source: str,
    names: Sequence[str],
    notes: list[str],
    made: Any,
    seed: int,
) -> SimilarityTest:
    wanted = tables["random"].wanted
    kept = _kept(tables)
    skipped = tuple({s.episode: Skipped(s.episode, s.reason) for table in tables.values() for s in table.skipped}.values())
    if len(kept) < FEW:
        reason = skipped[0].reason if skipped else "none was read"
        raise EpisodeError(
            f"at least {FEW} queries must be comparable with the control ({control}); {len(kept)} are ({reason}). Give more, or other spans."
        )
    stacked = [np.concatenate(tables[way].relative)[[tables[way].rows.index(i) for i in kept]] for way in WAYS]
    shift = np.stack(stacked, 1)  # [batch, by, part, layer, kv_head, span]
    there = [s for s in range(shift.shape[-1]) if not np.isnan(shift[..., s]).all()]
    shift = shift[..., there]
    change = shift[:, 0] - shift[:, 2]
    effect, p = paired_effect(change, seed=seed, tie=TIE), sign_flip_p(change, seed=seed, tie=TIE)
    low, high = bootstrap_interval(shift, seed=seed)
    lengths = {i: n[0] for i, n in zip(tables["random"].rows, tables["random"].lengths, strict=True)}
    return SimilarityTest(
        by=WAYS, parts=wanted.parts, layers=wanted.layers, heads=tuple(range(shift.shape[4])), spans=tuple(wanted.spans[s] for s in there),
        shift=mean_of(shift), low=low, high=high, per_episode=shift,
        similarity=np.stack([picks[way].similarity[kept, 0] for way in WAYS], 1), chosen=np.stack([picks[way].rows[kept, 0] for way in WAYS], 1),
        comparisons=_comparisons(shift, wanted.parts, seed), effect=effect.value, effect_low=effect.low, effect_high=effect.high, p=p,
        p_corrected=holm(p), tokens=np.array([lengths[i] for i in kept]), embeddings=source, episode_ids=tuple(names[i] for i in kept),
        n=len(kept), skipped=skipped, provenance=made, notes=tuple(notes), control=control,
    )  # fmt: skip


def _comparisons(shift: np.ndarray, parts: Sequence[str], seed: int) -> tuple[SimilarityEffect, ...]:
    """Pooled over layers, heads and spans: each way against each other."""
    found = []
    for p, part in enumerate(parts):
        pooled = mean_of(shift[:, :, p].reshape(*shift.shape[:2], -1), 2)
        for first, second in CONTRASTS:
            change = pooled[:, WAYS.index(first)] - pooled[:, WAYS.index(second)]
            effect = paired_effect(change, seed=seed, tie=TIE)
            share = float(np.mean(change > TIE)) + float(np.mean(np.abs(change) <= TIE)) / 2
            found.append(
                SimilarityEffect(
                    first, second, part, mean_estimate(change, unit="ratio", seed=seed),
                    Estimate(float(effect.value), float(effect.low), float(effect.high), len(change), "standard deviations", "bootstrap 95 %"),
                    float(sign_flip_p(change, seed=seed, tie=TIE)), np.nan, share,
                )
            )  # fmt: skip
    corrected = holm([one.p for one in found])
    return tuple(replace(one, p_corrected=float(p)) for one, p in zip(found, corrected, strict=True))
