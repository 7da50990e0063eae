"""`score_heads`: which heads do the in-context learning, with the evidence; `attention_by_role`: where the query looks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mechicl.analysis.feed import Data, check_data, comparable, ids_of, provenance, rehearse, take
from mechicl.analysis.guarded import guarded
from mechicl.analysis.heads.named import SCORES, Scorer
from mechicl.analysis.heads.own import ExemplarScore
from mechicl.analysis.heads.reading import Reading, Wanted, read
from mechicl.analysis.layout import PLACES, closing_group, image_group, place_group, text_group
from mechicl.analysis.statistics import benjamini_hochberg, bootstrap_interval, holm
from mechicl.errors import OptionError
from mechicl.results import HeadScores, RoleAttention, Score

DEFAULT_SCORES: tuple[str, ...] = tuple(name for name in SCORES if name != "previous_token_all")
"""All but the whole-prompt previous-token score, which reads every row of the prompt, picture tokens included."""


@guarded
def score_heads(
    model: Any,
    data: Data,
    *,
    scores: Sequence[str | ExemplarScore] = DEFAULT_SCORES,
    n_null: int | None = None,
    lift: float = 1.5,
    k_back: int = 2,
    correction: str = "holm",
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> HeadScores:
    """Every head's scores, each with its null, a 95 % interval over episodes and p-values corrected for the number of heads.

    Only attention rows that a score reads are computed (`model.attention_rows`). Where the data mix pictures and words, scores are given for the
    modalities apart too: "induction[image->text]" is for queries shown as pictures, over exemplars shown as words; "ila[image]" is from labels to pictures.

    Args:
        model: A `HookedVLM`, or anything with the surface of `HookedModel`.
        data: A Batch, or episodes, rendered a few at a time.
        scores: Which of `mechicl.analysis.heads.named.SCORES`; default all but "previous_token_all". An `ExemplarScore` is a score of your own.
        n_null: Shuffles of the null; default enough for Holm's correction over all heads to be able to reach 0.05 twice over.
        lift: What p is about: whether the head attends to the place in question (the right labels, the token before, ...) more than `lift` times as
            much as to the places it is compared with. 1 is the plain test, which finds trifles: a network with random weights already tells equal
            from unequal tokens by some per cent.
        k_back: The distance of the "k_back" score (2: the item of a label, where both are one token and another stands between).
        correction: Over heads, within one score: "holm" (family-wise) or "bh" (false discovery rate).
        seed: Decides shuffles and resampling.
        batch_size: Prompts per forward pass.
        task: What the data are, for the record.
        progress: Show a bar.

    Returns:
        HeadScores. Episodes without a right and a wrong exemplar are left out and named.

    Raises:
        EpisodeError: no data, no shots, one class only.
        OptionError: an unknown score or option.
        NotFiniteError: attention is NaN.

    Source:
        Huang et al. 2026 for the measures; nulls and intervals are ours. See `mechicl.analysis.heads.measures`.
    """
    check_data(data, batch_size)
    unknown = [name for name in scores if isinstance(name, str) and name not in SCORES]
    if unknown or not scores:
        raise OptionError(f"scores must be among {', '.join(SCORES)}; got {unknown or 'none'}. Leave it out for all.")
    named = [score if isinstance(score, str) else score.name for score in scores]
    taken = {name for name in named if named.count(name) > 1} | {s.name for s in scores if not isinstance(s, str) and s.name in SCORES}
    if taken:
        raise OptionError(f"scores must have names of their own; got {', '.join(sorted(taken))} twice. Call yours something else.")
    if correction not in ("holm", "bh"):
        raise OptionError(f'correction must be "holm" or "bh"; got {correction!r}. "holm" is the stricter.')
    if k_back < 2:
        raise OptionError(f"k_back must be at least 2; got {k_back}. 1 is the previous-token score.")
    if not lift >= 1:
        raise OptionError(f"lift must be at least 1; got {lift}. 1.5 is the default, 1 the plain test.")
    n_heads = model.cfg.n_layers * model.cfg.n_heads
    n_null = max(1999, 40 * n_heads) if n_null is None else n_null
    if n_null < 1:
        raise OptionError(f"n_null must be at least 1; got {n_null}. Leave it out for enough shuffles.")
    kept, skipped = comparable(data)
    data = take(data, kept)
    rehearse(model, data)
    wanted = Wanted(everything="previous_token_all" in scores, k_back=k_back)
    reading = read(model, data, wanted, batch_size=batch_size, progress=progress, names=ids_of(data))
    scorer = Scorer(reading, n_null=n_null, seed=seed, k_back=k_back, lift=lift)
    corrected = holm if correction == "holm" else benjamini_hochberg
    found: dict[str, Score] = {}
    for name in scores:
        for full, raw in scorer.score(name):
            low, high = bootstrap_interval(raw.per_episode, seed=seed)
            with np.errstate(invalid="ignore"):
                value = np.nansum(raw.per_episode, 0) / (~np.isnan(raw.per_episode)).sum(0)
            found[full] = Score(
                name=full, description=raw.description, unit="probability", value=value, low=low, high=high, null=raw.null.mean,
                null_high=raw.null.high, p=raw.null.p, p_corrected=corrected(raw.null.p), per_episode=raw.per_episode, source=raw.source,
                null_name=raw.null_name, lift=lift,
            )  # fmt: skip
    options = {"scores": named, "n_null": n_null, "lift": lift, "k_back": k_back, "correction": correction, "batch_size": batch_size}
    return HeadScores(
        scores=found, n=len(kept), n_key_value_heads=model.cfg.n_key_value_heads, skipped=skipped,
        provenance=provenance(model, task=task, seed=seed, options=options), notes=tuple(_notes(reading, found, n_null, n_heads)),
    )  # fmt: skip


def _notes(reading: Reading, found: dict[str, Score], n_null: int, n_heads: int) -> list[str]:
    notes = []
    right = reading.layout.right
    if len(right) > 1 and bool((right == right[0]).all()):
        notes.append(
            "The right exemplars stand at the same places in every episode, so a head that prefers these places scores too: shuffle the shots."
        )
    if (1 + n_null) < 20 * n_heads:
        notes.append(
            f"With {n_null} shuffles no shuffled score can reach a corrected p of 0.05 over {n_heads} heads: raise n_null to {40 * n_heads}."
        )
    blank = [name for name, score in found.items() if np.isnan(score.value).all()]
    if blank:
        notes.append(f"Not defined on these prompts: {', '.join(blank)}.")
    untested = [name for name, score in found.items() if np.isnan(score.p).all() and name not in (*blank, "previous_token_all")]
    if untested:
        notes.append(f"Prompts too short, or too few exemplars, for a null of {', '.join(untested)}.")
    layers = np.isnan(reading.total).all((0, 2))
    if layers.any():
        notes.append(f"Layers without softmax attention, whose heads are NaN: {', '.join(str(i) for i in np.nonzero(layers)[0])}.")
    return notes


@guarded
def attention_by_role(
    model: Any, data: Data, *, seed: int = 0, batch_size: int = 8, task: str = "", progress: bool = True
) -> RoleAttention:
    """Where each head looks from the query's last token: mean mass on each kind of span, with 95 % bootstrap intervals over episodes.

    Spans: right and wrong exemplars' labels, the tokens that close their turns, pictures and texts; the query's picture and text; questions, instruction, glue; and "sink", the first
    token, taken out of its own kind. Kinds that no prompt has are left out. Masses of one head sum to one (less what a sink without a token takes).

    Under the names of `prompts.align.span_groups`, "question" is right question and wrong question, and "glue" is right open, wrong open, query open, last token and glue; the
    other names are the same.

    Raises:
        EpisodeError: no data, no shots, one class only.
        NotFiniteError: attention is NaN.
    """
    check_data(data, batch_size)
    kept, _ = comparable(data)
    data = take(data, kept)
    reading = read(model, data, Wanted(text=False, between=False), batch_size=batch_size, progress=progress, names=ids_of(data))
    masses = _masses_by_role(reading)
    spans = tuple(masses)
    per_episode = np.stack([masses[name] for name in spans], -1)
    low, high = bootstrap_interval(per_episode, seed=seed)
    made = provenance(model, task=task, seed=seed, options={"batch_size": batch_size})
    return RoleAttention(spans=spans, value=per_episode.mean(0), low=low, high=high, n=len(kept), provenance=made)


def _masses_by_role(reading: Reading) -> dict[str, np.ndarray]:
    where, query = reading.layout, reading.query
    s = where.n_shots
    right = where.right.numpy()[:, None, None, :]
    parts = {
        "label": slice(0, s),
        "image": slice(image_group(0, s), image_group(0, s) + s),
        "text": slice(text_group(0, s), text_group(0, s) + s),
        "close": slice(closing_group(0, s), closing_group(0, s) + s),
    }
    masses: dict[str, np.ndarray] = {}
    for part, columns in parts.items():
        masses[f"right {part}"] = (query[..., columns] * right).sum(-1)
        masses[f"wrong {part}"] = (query[..., columns] * ~right).sum(-1)
    masses["query image"], masses["query text"] = query[..., image_group(-1, s)], query[..., text_group(-1, s)]
    for place in PLACES:
        masses[place] = query[..., place_group(place, s)]
    owner = {"label": where.label_tokens[:, :s], "image": where.image_tokens[:, :s], "text": where.text_tokens[:, :s]}
    present = {
        f"{side} {part}": bool((tokens * (where.right == (side == "right"))).any())
        for part, tokens in owner.items()
        for side in ("right", "wrong")
    }
    present |= {"query image": bool(where.image_tokens[:, s].any()), "query text": bool(where.text_tokens[:, s].any())}
    for i, group in enumerate(where.first_group.tolist()):
        masses[_role_of(group, where.right[i].tolist())][i] -= reading.to_first[i]
    masses["sink"] = reading.to_first
    return {name: np.maximum(value, 0.0) for name, value in masses.items() if present.get(name, bool((value > 0).any()))}


def _role_of(group: int, right: Sequence[bool]) -> str:
    """The kind of span that a prompt's first token belongs to; `right` tells the exemplars apart."""
    s = len(right)
    if group >= place_group(PLACES[0], s):
        return PLACES[group - place_group(PLACES[0], s)]
    starts = (("close", closing_group(0, s)), ("text", text_group(0, s)), ("image", image_group(0, s)), ("label", 0))
    part, start = next((p, g) for p, g in starts if group >= g)
    shot = group - start
    return f"query {part}" if shot == s else f"{'right' if right[shot] else 'wrong'} {part}"
