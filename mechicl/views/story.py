"""The report's words: sentences made from the numbers, and for every figure what it shows and how it can mislead. No HTML here."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from mechicl.results import Ablation, DoseCurve, Estimate, Head, HeadSet, ICLAccuracy, RoleAttention, Score, Series, Study
from mechicl.views.curves import falls_as_far
from mechicl.views.grids import ALPHA, name, significant


@dataclass(frozen=True)
class Words:
    """What stands around a figure: `shows`, `misleads`, and the `claim` line with n, interval and control."""

    shows: str
    misleads: str
    claim: str


@dataclass(frozen=True)
class Table:
    """A table to read; `note` says when rows were left out (the CSV has them all)."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def csv_text(frame: pd.DataFrame) -> str:
    """The frame as CSV: every number in full (it reads back to the same float), one line per row."""
    return frame.to_csv(index=False, lineterminator="\n")


def csv_uri(frame: pd.DataFrame) -> str:
    """The frame as a data: address, so that it downloads without a network and without a script."""
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(csv_text(frame).encode()).decode()


def table(frame: pd.DataFrame, limit: int = 40) -> Table:
    """The first rows of a frame, numbers to four digits."""
    rows = tuple(tuple(_cell(v) for v in row) for row in frame.head(limit).itertuples(index=False, name=None))
    note = f"The first {limit} of {len(frame)} rows; the CSV has all." if len(frame) > limit else ""
    return Table(tuple(str(c) for c in frame.columns), rows, note)


def accuracy_frame(accuracy: ICLAccuracy, controls: Mapping[str, Estimate]) -> pd.DataFrame:
    """The numbers of the accuracy figure: one row per way of counting and per control."""
    rows = {"accuracy": accuracy.accuracy, "first_token_accuracy": accuracy.first_token_accuracy, "open_accuracy": accuracy.open_accuracy,
            "cla": accuracy.cla, "margin": accuracy.margin}  # fmt: skip
    rows |= {"zero_shot": accuracy.zero_shot} if accuracy.zero_shot is not None else {}
    return _estimates({**rows, **controls}).assign(chance=accuracy.chance)


def ablation_frame(ablation: Ablation) -> pd.DataFrame:
    """The numbers of the ablation figure: every set of heads, then intact, the random draws' mean and zero-shot."""
    others = {"intact": ablation.intact.accuracy, "random_mean": ablation.random_mean}
    others |= {"zero_shot": ablation.zero_shot} if ablation.zero_shot is not None else {}
    extra = _estimates(others).rename(columns={"measure": "kind", "value": "accuracy"}).drop(columns=["unit", "method"])
    return pd.concat([ablation.to_frame(), extra], ignore_index=True)


def _estimates(rows: Mapping[str, Estimate]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"measure": k, "value": e.value, "low": e.low, "high": e.high, "n": e.n, "unit": e.unit, "method": e.method}
            for k, e in rows.items()
        ]
    )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    return str(value)


def percent(estimate: Estimate) -> str:
    """A share with its interval: "97.7 % (93.3 to 99.2)"."""
    return f"{100 * estimate.value:.1f} % ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"


def points(estimate: Estimate) -> str:
    """A change in percentage points with its interval."""
    return f"{100 * estimate.value:+.1f} points ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})".replace("-", "\u2212")


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    text = text.strip()
    return text if not text else text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")


def heads_in_words(heads: Sequence[Head], limit: int = 12) -> str:
    """Heads as layer.head, comma separated; the rest counted."""
    listed = ", ".join(name(h) for h in heads[:limit])
    return listed if len(heads) <= limit else f"{listed} and {len(heads) - limit} more"


def learns(accuracy: ICLAccuracy) -> bool:
    """Accuracy is above chance, and above the zero-shot control: the 95 % interval of the difference of the two shares (Newcombe's, from their Wilson
    intervals, as if they were other prompts, which makes it wider) lies above zero."""
    a, zero = accuracy.accuracy, accuracy.zero_shot
    above = zero is None or a.value - zero.value > math.hypot(a.value - a.low, zero.high - zero.value)
    return bool(a.low > accuracy.chance and above)


def headline(study: Study) -> str:
    """The claim in one sentence, as strong as the numbers allow and no stronger."""
    model = study.provenance.model
    if not learns(study.accuracy):
        a = study.accuracy
        without = f" against {_whole(a.zero_shot)} without them" if a.zero_shot is not None else ""
        return (
            f"This run does not show that {model} answers from the examples: {_whole(a.accuracy)} of {a.n} prompts right{without}, chance {100 * a.chance:.0f}\u00a0%. "
            "There is no in-context learning to explain here."
        )
    good = [s for s in study.sets if proven(s)]
    if not good:
        found = [s for s in study.sets if s.heads]
        if not found:
            return f"{model} answers from the examples, but no head passes its null: this run does not say which heads do it."
        return f"{model} answers from the examples, and heads were found ({', '.join(s.kind for s in found)}), but none is proven: {_why_not(found)}."
    listed: list[HeadSet] = []
    by_attention = [s for s in good if s.score in study.scores.scores]
    for found in by_attention or good:  # a head that two rules find is named once
        if not set(found.heads) <= {h for s in listed for h in s.heads}:
            listed.append(found)
    names = [f"{len(s.heads)} {s.kind} {'head' if len(s.heads) == 1 else 'heads'}" for s in listed]
    kinds = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    several = len({h for s in listed for h in s.heads}) > 1
    first: Ablation = listed[0].ablation  # type: ignore[assignment]
    fall = f"without the {listed[0].kind} heads accuracy falls from {_whole(first.intact.accuracy)} to {_whole(first.chosen.accuracy)}"
    stays = f", without as many random heads it is {_whole(first.random_mean)}" if first.random else ""
    return f"{model} answers from the examples, and {kinds} {'are' if several else 'is'} needed for it: {fall}{stays}."


def _why_not(found: Sequence[HeadSet]) -> str:
    """What stands in the way of the set that costs most."""
    tried = [s for s in found if s.ablation is not None]
    if not tried:
        return "no set was switched off"
    worst = min(tried, key=lambda s: s.ablation.chosen.change.value if s.ablation is not None else 0.0)
    fall: Ablation = worst.ablation  # type: ignore[assignment]
    numbers = f"without the {worst.kind} heads accuracy goes from {_whole(fall.intact.accuracy)} to {_whole(fall.chosen.accuracy)}"
    reasons = {
        "unspecific": "but as many random heads can cost as much", "redundant": "but as many random heads cost nearly as much",
        "necessary": "but as many random heads cost nearly as much", "no control": "but there are too few other heads to compare with",
        "nothing to lose": "but the intact model is not above chance",
    }  # fmt: skip
    return f"{numbers}, {reasons.get(worst.finding, 'which so few prompts cannot tell from nothing' if badge(worst).startswith('too few') else 'which is no loss')}"


def _whole(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.0f}\u00a0%"


def summary(study: Study) -> str:
    """The claim in one paragraph: what the model can do, beside what it can do without the information; which episodes served for what."""
    a = study.accuracy
    controls = [f"chance is {100 * a.chance:.0f} %"]
    if a.zero_shot is not None:
        controls.append(f"without the examples it is {percent(a.zero_shot)}")
    controls += [f"with {key} {percent(e)}" for key, e in study.controls.items()]
    text = f"The right label wins among the candidates in {percent(a.accuracy)} of {a.n} prompts; {'; '.join(controls)}. "
    text += f"Heads were chosen on {study.n_find} prompts, and everything else was measured on {study.n_prove} others, so that no head is proven on what chose it. Intervals are 95 %."
    if a.skipped:
        text += f" {len(a.skipped)} prompts were skipped: {'; '.join(sorted({s.reason for s in a.skipped})[:3])}."
    return text


def set_sentence(found: HeadSet) -> str:
    """One set of heads: which they are, and what may be said of them."""
    if not found.heads:
        return f"{found.kind.capitalize()}: {found.verdict}"
    start = f"{found.kind.capitalize()}: {len(found.heads)} {'head passes' if len(found.heads) == 1 else 'heads pass'} ({heads_in_words(found.heads)})."
    return f"{start} {sentence(found.verdict)}"


def against_random(ablation: Ablation) -> str:
    """What the random control says: "random heads: 92.2 % on average; none of 20 random draws falls as far (p = 0.048)"."""
    if not ablation.random:
        return "no random control"
    return f"random heads: {100 * ablation.random_mean.value:.1f}\u00a0% on average; {falls_as_far(ablation)}"


def proven(found: HeadSet) -> bool:
    """The set is needed, and most of what it costs is its own: as many random heads cost less than half of that on average."""
    ab = found.ablation
    if ab is None or found.finding not in ("redundant", "necessary") or not ab.random:
        return False
    return bool(ab.random_mean.value - ab.chosen.accuracy.value > (ab.intact.accuracy.value - ab.chosen.accuracy.value) / 2)


def badge(found: HeadSet) -> str:
    """The finding in a word or two. A large drop that the test cannot tell from nothing is too little data, not irrelevance."""
    if found.finding == "irrelevant" and found.ablation is not None and found.ablation.chosen.change.value < -0.1:
        return "too few prompts to say"
    if found.finding in ("redundant", "necessary") and not proven(found):
        return (
            f"{found.finding}, but random heads cost nearly as much"
            if found.ablation is not None and found.ablation.random
            else f"{found.finding}, no control"
        )
    return {"none": "none found", "irrelevant": "not needed here"}.get(found.finding, found.finding)


def top_line(study: Study) -> list[tuple[str, str, str]]:
    """The numbers on top of the page: (value, what it is, interval)."""
    a = study.accuracy
    out: list[tuple[str, Estimate]] = [("intact", a.accuracy)]
    spread: dict[str, str] = {}
    for s in study.sets if learns(a) else ():
        if s.ablation is not None and proven(s):
            out.append((f"{s.kind} heads off", s.ablation.chosen.accuracy))
            if s.ablation.random:
                drawn = [100 * c.accuracy.value for c in s.ablation.random]
                words = f"{len(s.heads)} random {'head' if len(s.heads) == 1 else 'heads'} off"
                out.append((words, s.ablation.random_mean))
                spread[words] = f"{min(drawn):.1f} to {max(drawn):.1f} in {len(drawn)} draws"
            break
    if a.zero_shot is not None:
        out.append(("no examples", a.zero_shot))
    out += [(key, e) for key, e in study.controls.items()]
    tiles = [
        (f"{100 * e.value:.1f}\u00a0%", words, spread.get(words) or f"{100 * e.low:.1f} to {100 * e.high:.1f}, n = {e.n}")
        for words, e in out
    ]
    return [*tiles, (f"{100 * a.chance:.0f} %", "chance", "one of the candidates")]


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
    ("KV group", "heads that share keys and values (grouped-query attention)."),
)  # fmt: skip
