"""What stands around a figure: what it shows, how it can mislead, and the line with n, interval and control. And the words defined."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mechicl.results import (
    Ablation,
    Circuit,
    CircuitCurve,
    DoseCurve,
    EdgeScores,
    HeadSet,
    ICLAccuracy,
    PatchEffects,
    RoleAttention,
    Score,
    Series,
    SiteEffects,
    Study,
)
from mechicl.views.story import against_random, heads_in_words, points, sentence
from mechicl.views.trace_story import PAIRS, circuit_sentence
from mechicl.views.words import ALPHA, metric_words, name, significant


@dataclass(frozen=True)
class Words:
    """What stands around a figure: `shows`, `misleads`, and the `claim` line with n, interval and control."""

    shows: str
    misleads: str
    claim: str


def about_accuracy(a: ICLAccuracy, controls: Iterable[str] = ()) -> Words:
    names = [*(["zero-shot"] if a.zero_shot is not None else []), *controls]
    return Words(
        "How often the model gives the right label, counted four ways, beside controls that take the information out of the examples. Right: how clearly the right label wins in each prompt.",
        "Copying any label of the context already beats the whole vocabulary, so compare with chance and not with zero; choosing among the candidates forgives "
        "a model that would have said something else (open vocabulary does not). CLA is not skill: it counts every label of the context as right.",
        f"n = {a.n} prompts, Wilson 95 % intervals; controls: {', '.join(names) or 'none'}; {len(a.skipped)} skipped.",
    )


def about_scores(study: Study) -> Words:
    count = study.scores.scores[next(iter(study.scores.scores))].value.size
    return Words(
        "Every score of every head at a glance, one colour scale for all. Orange: more than zero, blue: less. A dot marks a head above its own null.",
        "A score says where a head looks, not what it writes nor whether that matters: see the ablation. Heads that share keys and values are not independent.",
        f"n = {study.n_find} prompts; null per head and score, Holm-corrected over {count} heads.",
    )


def about_score(score: Score) -> Words:
    passed = significant(score)
    best = score.top(1)
    lead = (
        f" Best: head {name(best[0])} with {score.value[best[0]]:.3f} ({score.low[best[0]]:.3f} to {score.high[best[0]]:.3f})."
        if best
        else ""
    )
    found = f"{len(passed)} of {score.value.size} heads pass ({heads_in_words(passed)})." if passed else "No head passes its null."
    source = f" Source: {sentence(score.source)}" if score.source else ""
    return Words(
        f"{sentence(score.description)}{source}",
        "The range of the colours follows the largest score, so pale cells are small, not zero. Attention to the right place is correlation; only switching the head off tests it.",
        f"{found}{lead} n = {score.per_episode.shape[0]} prompts; null: {score.null_name}; p corrected (Holm), limit {ALPHA}.",
    )


def about_roles(roles: RoleAttention) -> Words:
    return Words(
        "From the token that predicts the answer: what share of each head's attention goes to which part of the prompt.",
        "Shares are summed over a span's tokens, so long spans (pictures) collect more by their length alone. Much attention on the first token or the template is usually a head at rest.",
        f"n = {roles.n} prompts; 95 % intervals on hover and in the CSV.",
    )


def about_overlay() -> Words:
    return Words(
        "What each head reads off the pictures, patch by patch, in the pictures' own pixels: from the token that predicts the answer, or, for label-to-image heads, from each example's label.",
        "Each row of pictures has its own scale: the brightest patch may hold very little of the head's attention (the number says how much). What stands at a patch "
        "after some layers need no longer be that patch's content.",
        "One prompt, no interval: an illustration, not evidence.",
    )


def about_patterns(note: str) -> Words:
    return Words(
        "The attention patterns of the chosen heads on one prompt: row = token that reads, column = token that is read. Hover over a small pattern to see it large.",
        "One prompt is an anecdote; the scores above average over prompts. Colours end at 1.",
        note,
    )


def about_ablation(found: HeadSet) -> Words:
    ab: Ablation = found.ablation  # type: ignore[assignment]
    return Words(
        f"Accuracy with the {found.kind} heads switched off, beside as many random heads (each dot a draw), each of the heads alone, and the controls.",
        "Switching off takes the model off its usual path: other heads can take over (the damage looks too small) or break (too large); compare zero, mean and "
        f"resample. An accuracy below chance means that wrong labels win, not that nothing is known. {sentence(ab.match_note)}",
        f"n = {ab.n} prompts not used to choose the heads; change {points(ab.chosen.change)}, paired bootstrap; McNemar p = {ab.chosen.mcnemar_p:.2g}; "
        f"{against_random(ab)}.",
    )


def about_effects(score: Score, n_find: int) -> Words:
    passed = significant(score)
    return Words(
        f"What each head is worth by itself: the {score.description}. It asks nothing about attention, so it also finds heads that no score was made for.",
        "A head with a redundant twin loses nothing here, and a head that everything runs through loses much without doing the learning: hence the sets below, and the random heads.",
        f"{len(passed)} of {score.value.size} heads lose margin ({heads_in_words(passed) or 'none'}); n = {n_find} prompts, those that serve to find heads; "
        f"null: {score.null_name}; p corrected (Holm), limit {ALPHA}.",
    )


def about_dose(curve: DoseCurve) -> Words:
    return Words(
        f"Accuracy as heads go off one after another in the order of their {curve.ranked_by.replace('_', ' ')} score, beside growing sets of matched random heads.",
        "With redundant heads the curve stays flat until the last of them goes: flat does not mean useless. The order comes from a score, so a needed head with a low score comes late.",
        f"n = {curve.n} prompts; 95 % intervals; band from {curve.n_draws} random draws; order fixed on other prompts.",
    )


def about_patching(effects: PatchEffects) -> Words:
    cells = sum(int((site.p_corrected < ALPHA).sum()) for site in effects.sites.values())
    way = (
        "one activation of the clean run is put into the corrupt run"
        if effects.direction == "denoise"
        else "one activation of the corrupt run is put into the clean run"
    )
    asks = "whether it suffices" if effects.direction == "denoise" else "whether it is needed"
    return Words(
        f"Two prompts that differ in one thing: {PAIRS.get(effects.pairs, effects.pairs.replace('_', ' '))}. In each cell {way}, which asks {asks}. 0: the run stays as it was corrupt, "
        f"1: it answers as in the clean run. Shown: {'; '.join(_site_words(name, site) for name, site in effects.sites.items())}.",
        "Cells overlap and do not add up to one. A head with a redundant twin moves little. Spans of the same prompt can hold the same thing twice: what suffices need not be "
        "the only copy. Only what differs between the two prompts can be seen.",
        f"n = {effects.n} pairs, {metric_words(effects.metric)}, 95 % intervals over pairs (on hover, in the CSV); {cells} cells pass (sign flips, "
        f"{'Holm' if effects.correction == 'holm' else 'FDR'}, limit {ALPHA}); {len(effects.skipped)} prompts without a partner.{_idle(effects)}",
    )


SITES = {
    "resid_pre": "the residual stream where a layer begins", "resid_mid": "the residual stream after attention", "resid_post": "the residual stream where a layer ends",
    "attn_out": "what attention adds", "mlp_out": "what an MLP adds", "z": "a head's output", "q": "a head's queries", "k": "the keys of a key/value head",
    "v": "the values of a key/value head", "pattern": "a head's attention", "embed": "the embeddings", "image_features": "the pictures as they enter the sequence",
    "vision": "a layer of the vision tower",
}  # fmt: skip
"""Site -> what is exchanged there."""


def _site_words(name: str, site: SiteEffects) -> str:
    last = site.axes[-1] if site.axes else ""
    where = {"span": "span by span", "pos": "position by position", "head": "at all tokens", "shot": "example by example"}.get(
        last, "at all tokens"
    )
    return f"{name.replace('_', ' ')}, {SITES.get(name, 'an activation')}, {where}"


def _idle(effects: PatchEffects) -> str:
    """The control within the figure: a span that is the same in both prompts and comes before what differs."""
    site = effects.sites.get("resid_pre")
    if site is None or "instruction" not in site.coords.get("span", ()):
        return ""
    start = 0.0 if effects.direction == "denoise" else 1.0
    moved = np.abs(np.asarray(site.value)[..., site.coords["span"].index("instruction")] - start)
    return (
        f" Control: the instruction, the same in both prompts, moves it by at most {np.nanmax(moved):.2f}."
        if np.isfinite(moved).any()
        else ""
    )


def about_curve(curve: CircuitCurve) -> Words:
    return Words(
        f"The edges in the order of their score ({curve.scored_by}); the slider adds them one after another. Heads stand in the column of the span they act at (of their own number where that is not known), layers go upwards; the wider a line, the "
        "higher its score; a minus marks an edge that speaks against the answer; pale edges lead nowhere yet. Right: how much of the model's answer these edges alone bring back, everything else running on the corrupt prompt.",
        "The order comes from gradients, so an early edge can be useless and a late one needed. Faithfulness can pass 1 when what opposes the answer is left out. The graph of a model with "
        "redundant heads shows all of them.",
        f"n = {curve.n} pairs that did not score the edges; bootstrap 95 %; band: {curve.n_draws} random circuits of as many edges on paths from the embeddings to the logits; {curve.replacement} replacement.",
    )


def about_circuit(circuit: Circuit) -> Words:
    return Words(
        f"A set that reaches a faithfulness of {circuit.target:.2g} on the pairs that chose it, with what it does on other pairs, what the rest of the model does without it, random "
        "circuits, and what each edge alone is worth.",
        "Another set of edges may do as well: the search finds one. It holds for these pairs: an edge that both prompts use alike is not in it.",
        circuit_sentence(circuit),
    )


def about_edge_scores(scores: EdgeScores) -> Words:
    agree = f"{scores.agreement}." if scores.agreement is not None else "Not compared with exact runs."
    return Words(
        f"What every sender (row) brings to every receiver (column), estimated by {scores.method}: the difference between the two runs times the slope of the metric. Below: the same edges run exactly.",
        "An estimate by slopes misses edges into saturated attention, and edges that matter only together. Read the comparison with exact runs first: dots on the dotted line are right.",
        f"n = {scores.n} pairs, those that choose the circuit; {agree}",
    )


def about_growth(series: Series) -> Words:
    return Words(
        "Accuracy and head scores of the same prompts at checkpoints along training: what appears together, and what comes first.",
        "One training run: times differ between seeds. Growing together is no proof of cause. A score that takes the largest of several heads may change its head on the way.",
        f"{len(series.steps)} checkpoints, {series.n} probe prompts throughout.",
    )


DEFINITIONS: tuple[tuple[str, str], ...] = (
    ("head 1.3", "layer 1, attention head 3, both counted from 0."),
    ("accuracy", "share of prompts where the right label has the highest full-label log-probability among the candidates. First token: the same from the label's first token only. "
     "Open vocabulary: the model's single most likely next token is the right label's first token."),
    ("CLA", "context-label accuracy: the prediction is any label that occurs in the context."),
    ("margin", "log-probability of the right label minus that of the best wrong candidate, in nats."),
    ("zero-shot", "the same question without the examples."),
    ("null", "the same score after shuffling labels or spans, named with each score: what the score would be if the head did not tell them apart."),
    ("corrected p", "one-sided p of the score against its null, corrected for the number of heads by Holm's method."),
    ("switching off", "zero: the head's output is set to 0. mean: to its mean over prompts. resample: to its output on another prompt."),
    ("matched random heads", "as many other heads, from the same layers where these have heads left, else from the nearest."),
    ("redundant", "the set is needed, but every head of it alone can be spared. Single ablations would have missed it."),
    ("not needed here", "switching the set off does not lower the accuracy by the paired interval and the exact test. With a large drop that they cannot tell from nothing: too few prompts to say."),
    ("unspecific", "accuracy falls without the set, but as many random heads can cost as much."),
    ("close", "the template's tokens that end a label's turn; chat models gather a label and its picture there."),
    ("Wilson, paired bootstrap, McNemar", "95 % interval of a share; 95 % interval of a change on the same prompts, by resampling prompts; exact test of the answers that changed."),
    ("patching", "a run of the model in which one activation is taken from the other prompt of the pair. The share it moves: 0 is the corrupt run, 1 the clean run."),
    ("glue", "tokens of the chat template, and whatever else has no role of its own."),
    ("edge", "what one part of the model (embeddings, a head, an MLP) writes and another reads: q, k, v are a head's queries, keys and values."),
    ("faithfulness", "what a circuit's edges bring back of the difference between the clean and the corrupt run, when everything else runs on the corrupt prompt. 1: all of it."),
    ("completeness", "the same for the model without the circuit's edges: near 0 where nothing else does the work."),
    ("KV group", "heads that share keys and values (grouped-query attention)."),
)  # fmt: skip
