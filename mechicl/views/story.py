"""The report's claims: sentences made from the numbers, as strong as these allow and no stronger. No HTML here."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mechicl.results import Ablation, Circuit, Estimate, Head, HeadSet, ICLAccuracy, PatchEffects, Study, Trace
from mechicl.views.curves import falls_as_far
from mechicl.views.grids import name


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


STRONG = 0.2
"""A cell is part of the way if it alone brings back (or costs) at least this share of the difference, and passes its corrected test."""

PAIRS = {
    "swap_exemplars": "two labels' pictures change places",
    "swap_labels": "two labels change places in the examples",
    "swap_query": "the query shows another label's picture",
    "permute_labels": "the labels are dealt out anew",
    "wrong_exemplar": "the exemplars of the answer show things of another class",
    "reformat": "the same content in another form",
    "blur": "the pictures are blurred in one of them",
    "noise": "the pictures are noise in one of them",
}
"""How pairs are made -> what differs between the two prompts of a pair."""


def route(effects: PatchEffects, site: str = "resid_pre") -> list[tuple[str, tuple[tuple[str, float], ...]]]:
    """Where the answer is, layer by layer: (layers in words, ((span, share), ...)), layers with the same spans together.

    A span counts where its cell passes its corrected test and moves the run by at least `STRONG` of the difference.
    """
    found = effects.sites[site]
    moved = np.asarray(found.value) if effects.direction == "denoise" else 1.0 - np.asarray(found.value)
    out: list[tuple[list[int], tuple[tuple[str, float], ...]]] = []
    for row, layer in enumerate(found.coords["layer"]):
        passed = [j for j in range(moved.shape[1]) if moved[row, j] >= STRONG and found.p_corrected[row, j] < 0.05]
        spans = tuple((str(found.coords["span"][j]), float(moved[row, j])) for j in sorted(passed, key=lambda j: -moved[row, j]))
        if out and {s for s, _ in out[-1][1]} == {s for s, _ in spans}:
            out[-1][0].append(int(layer))
        else:
            out.append(([int(layer)], spans))
    return [(f"layer {ls[0]}" if len(ls) == 1 else f"layers {ls[0]} to {ls[-1]}", spans) for ls, spans in out]


def span_words(span: str) -> str:
    """A span as the report calls it."""
    return "the template's tokens (glue)" if span == "glue" else f"the {span}" if not span.startswith("the ") else span


def route_sentence(effects: PatchEffects) -> str:
    """The way of the answer in one or two sentences, from the cells that pass."""
    if "resid_pre" not in effects.sites:
        return ""
    legs = [(layers, spans) for layers, spans in route(effects) if spans]
    if not legs:
        return f"No single part of the prompt carries {100 * STRONG:.0f}\u00a0% of the answer at any layer: it is spread over several, or these pairs are too few to see it."
    told = [f"at the start of {layers}, in {_listed([f'{span_words(s)} ({v:.2f})' for s, v in spans])}" for layers, spans in legs]
    each = (
        "brings back when it is put into the corrupt run"
        if effects.direction == "denoise"
        else "costs when it is taken from the corrupt run"
    )
    text = f"What tells the two answers apart stands {'; '.join(told)} (share of the answer that each of them alone {each})."
    ends = [span for span, _ in legs[-1][1]]
    if "last token" not in ends:
        text += " The last token does not hold it before the last layer that was patched: that layer fetches it."
    return text


def heads_sentence(effects: PatchEffects, limit: int = 8) -> str:
    """Heads whose output, exchanged at all tokens, moves the answer; best first."""
    site = effects.sites.get("z")
    if site is None or tuple(site.axes) != ("layer", "head"):
        return ""
    moved = np.asarray(site.value) if effects.direction == "denoise" else 1.0 - np.asarray(site.value)
    passed = [cell for cell in np.ndindex(*moved.shape) if site.p_corrected[cell] < 0.05 and abs(moved[cell]) >= 0.05]
    if not passed:
        return "No head's output alone moves the answer by a twentieth."
    passed.sort(key=lambda cell: -abs(moved[cell]))
    named = [f"{site.coords['layer'][a]}.{site.coords['head'][b]} ({moved[a, b]:.2f})" for a, b in passed[:limit]]
    more = f" and {len(passed) - limit} more" if len(passed) > limit else ""
    return f"Of the heads' outputs, exchanged one at a time, {len(passed)} of {moved.size} move it by a twentieth or more: {', '.join(named)}{more}."


def carries(circuit: Circuit) -> bool:
    """The circuit does most of the work: faithfulness above one half with its whole interval, and above the random circuits'."""
    above = circuit.n_draws == 0 or circuit.faithfulness.low > circuit.random_high
    return bool(circuit.faithfulness.low > 0.5 and above)


def circuit_sentence(circuit: Circuit) -> str:
    """What may be said of the circuit: how much it does on pairs that did not choose it, beside random circuits and the rest of the model."""
    f, rest = circuit.faithfulness, circuit.completeness
    start = f"{circuit.n_edges} of {circuit.n_edges_possible} edges carry {_share(f)} of the difference between clean and corrupt runs"
    where = (
        f"on {circuit.n} pairs that did not choose them"
        if circuit.held_out
        else f"on the {circuit.n} pairs that also chose them, which flatters them"
    )
    random = (
        f"; {circuit.n_draws} random circuits of as many edges carry {round(100 * circuit.random_mean)}\u00a0% on average (p = {circuit.p_random:.2g})"
        if circuit.n_draws
        else ""
    )
    left = f" Without these edges the model carries {_share(rest)}: " + (
        "nothing else does the work."
        if rest.high < 0.2
        else "part of the work is done elsewhere too."
        if rest.low > 0.05
        else "little else does the work."
    )
    verdict = "" if carries(circuit) else " This is not enough to call them the circuit."
    return f"{start} {where}{random}.{left}{verdict}".replace(" -", " \u2212").replace("(-", "(\u2212")


def trace_notes(trace: Trace) -> list[str]:
    """What the page says where a part is missing, and what readers of the parts must know."""
    out = list(trace.notes)
    for part in (trace.patching, trace.edge_scores, trace.circuit):
        out += list(part.notes if part is not None else ())
    return [sentence(n) for n in dict.fromkeys(out)]


def _share(e: Estimate) -> str:
    value, low, high = (f"{round(100 * v) + 0:d}" for v in (e.value, e.low, e.high))
    return f"{value}\u00a0% ({low} to {high})"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
