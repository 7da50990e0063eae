"""The report's claims: sentences made from the numbers, as strong as these allow and no stronger. No HTML here."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mechicl.results import Ablation, Estimate, Head, HeadSet, ICLAccuracy, Study
from mechicl.views.curves import falls_as_far
from mechicl.views.words import name


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
