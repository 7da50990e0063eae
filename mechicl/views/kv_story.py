"""What may be said about keys and values, in sentences made from the numbers, and the words around their figures. No HTML here. The definitions are ours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mechicl.results import ContrastMargin, Estimate, FactorShares, KVShift, KVStory, SimilarityTest
from mechicl.views.captions import Words
from mechicl.views.margins import BASELINE
from mechicl.views.panels import part_words, passes
from mechicl.views.story import sentence
from mechicl.views.words import ALPHA

OURS = "Our definition; the paper's could not be read."
DEFINITIONS: tuple[tuple[str, str], ...] = (
    ("key-value shift", "relative L2: the distance between a token's key (or value) with the examples and without, over its length without. Keys before RoPE, which turns every key of a "
     f"longer prompt. {OURS}"),
    ("filler", "as many neutral tokens in place of the examples (by default the same turns, emptied: grey pictures and function words), so that length is no difference."),
    ("meaning and form", "shares of the variation of keys and values when the examples' meaning is broken, their form changed, both, or neither; residual: other prompts of the same meaning and "
     f"form. They sum to one. {OURS}"),
    ("contrastive margin", f"distance from the query's key (or value) to examples of wrong labels minus to those of the right one; q \u00b7 k and attention: right minus wrong. {OURS}"),
    ("AUROC", "probability that a right answer has a higher margin than a wrong one: 0.5 is chance. Best heads are chosen on one half of the episodes and measured on the other."),
)  # fmt: skip


def span_words(span: str) -> str:
    """A span of the query as sentences call it."""
    return {"query open": "the template behind the query", "last token": "the last token", "query image": "the query's picture", "query question": "the question behind it"}.get(
        span, f"the {span}"
    )  # fmt: skip


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def number(e: Estimate, digits: int = 2) -> str:
    """ "0.17 (0.15 to 0.19)"."""
    return f"{e.value:.{digits}f} ({e.low:.{digits}f} to {e.high:.{digits}f})".replace("-", "\u2212")


def share(e: Estimate) -> str:
    """ "27 % (21 to 34)"."""
    return f"{100 * e.value:.0f}\u00a0% ({100 * e.low:.0f} to {100 * e.high:.0f})"


def shift_sentence(shift: KVShift) -> str:
    """How far keys and values move, where most, and whether neutral tokens move them as far."""
    what = {"filler": "as many neutral tokens", "zero-shot": "the zero-shot prompt"}.get(shift.control, "the control")
    best = [max((key for key in shift.pooled if key[0] == part and key[1] != "instruction"), key=lambda key: shift.pooled[key].value, default=None) for part in shift.parts]  # fmt: skip
    told = [f"{part_words(key[0])} most at {span_words(key[1])}: {number(shift.pooled[key])}" for key in best if key is not None]
    layers = [f"{part_words(part)} in layer {_top_layer(shift, p)}" for p, part in enumerate(shift.parts) if np.isfinite(shift.measures["relative_l2"][p]).any()]  # fmt: skip
    text = f"Against {what} the examples move the query's {'; '.join(told)} of their length, averaged over layers and heads; most {_listed(layers)}."
    if shift.test is None:
        return text
    words = {
        1: "further than the filler does",
        -1: "less far than the filler does",
        0: "as far as the filler does, as far as these episodes can tell",
    }
    found = {side: [where for p in shift.parts if (where := _places(shift, p, side))] for side in words}
    said = [f"{', and '.join(found[side])}{',' * (len(found[side]) > 1)} {words[side]}" for side in words if found[side]]
    return f"{text} From the zero-shot prompt the examples move {'; '.join(said)} (sign flips, Holm)."


def _places(shift: KVShift, part: str, side: int) -> str:
    """Where examples move a part further than the filler (1), less far (-1), or where the test cannot tell (0); "" where nowhere."""
    test = shift.test
    if test is None:
        return ""
    sign = {
        span: (int(np.sign(e.value)) if test.pooled_p[p, span] < ALPHA else 0)
        for (p, span), e in test.pooled.items()
        if p == part and span != "instruction"
    }
    spans = [span for span, found in sign.items() if found == side]
    if not spans:
        return ""
    if len(spans) == len(sign):
        return f"{part_words(part)} everywhere"
    return f"{part_words(part)} of {_listed([span_words(span) for span in spans])}"


def _top_layer(shift: KVShift, p: int) -> int:
    values = np.asarray(shift.measures["relative_l2"][p])
    spans = [s for s, name in enumerate(shift.spans) if name != "instruction"]
    means = [float(np.nanmean(layer)) if np.isfinite(layer).any() else -1.0 for layer in values[..., spans]]
    return shift.layers[int(np.argmax(means))]


def shares_sentence(shares: FactorShares) -> str:
    """How much goes with meaning, how much with form; and what each costs in answers."""
    told = []
    for part in shares.parts:
        found = [f"{source} {share(shares.pooled[part][source])}" for source in shares.sources if source in shares.pooled[part]]
        told.append(f"for {part_words(part)} {_listed(found)}")
    accuracy = [f"{name.replace('+', ' + ')} {100 * e.value:.0f}\u00a0%" for name, e in shares.accuracy.items()]
    return (
        f"When the examples' {' and '.join(shares.factors)} are changed, this is what moves the query's keys and values: {'; '.join(told)}. "
        f"Right answers: {', '.join(accuracy)}; chance {100 * shares.chance:.0f}\u00a0%."
    )


def margin_sentence(margin: ContrastMargin, prompts: str) -> str:
    """Whether the query is nearer to its own label's examples, and whether that tells right answers from wrong ones, beside attention."""
    above = [
        f"{int(passes(part.p_corrected).sum())} of {int(np.isfinite(part.value).sum())} heads by {part_words(name)}"
        for name, part in margin.parts.items()
        if name != BASELINE
    ]
    text = (
        f"The query is nearer to examples of its own label than labels shuffled over the examples would make it in {_listed(above)}."
        if above
        else ""
    )
    areas = [(name, part) for name, part in margin.parts.items() if part.held_out.value == part.held_out.value]
    if not areas:
        return f"{text} Whether that tells right answers from wrong ones cannot be said: {margin.auroc_reason or 'too few answers of one kind'}."
    found = _listed([f"{part_words(name)} {number(part.held_out)}" for name, part in areas])
    clear = [part_words(name) for name, part in areas if name != BASELINE and part.held_out.low > 0.5]
    better = [part_words(name) for name, part in areas if part.held_out_gain is not None and part.held_out_gain.low > 0]
    verdict = f"above chance: {_listed(clear)}" if clear else "none of the margins is clearly above chance"
    against = f"better than attention: {_listed(better)}" if better else "none is clearly better than attention"
    return f"{text} On {margin.n} prompts{f' {prompts}' if prompts else ''} ({100 * margin.accuracy:.0f}\u00a0% right) the best head's margin, chosen on other episodes, tells right answers from wrong ones with an AUROC of {found}; {verdict}; {against}."  # fmt: skip


def similarity_sentence(test: SimilarityTest) -> str:
    """The claim "similar examples shift more", with its effect sizes from each control."""
    both = [test, *test.others.values()]
    sides = {int(np.sign(one.comparisons[0].effect.value)) if one.comparisons[0].p_corrected < ALPHA else 0 for one in both}
    verdict = {frozenset({1}): "shift more", frozenset({-1}): "shift less"}.get(frozenset(sides), "do not clearly shift more")
    verdict = "shift more from one control and less from the other" if {1, -1} <= sides else verdict
    told = []
    for one in both:
        first = one.comparisons[0]
        ends = [c for c in one.comparisons if (c.first, c.second) == (first.first, first.second)]
        found = [f"{part_words(c.part)} g = {number(c.effect)}, p = {c.p_corrected:.2g}" for c in ends]
        told.append(
            f"from {'the filler' if one.control == 'filler' else 'the zero-shot prompt'}, {first.first} minus {first.second}: {'; '.join(found)}"
        )
    return f"Examples more like the query {verdict} ({part_words(test.comparisons[0].part)}; same label, same length; n = {test.n}): {'. '.join(t[0].upper() + t[1:] for t in told)}."


def kv_told(story: KVStory) -> list[str]:
    """Everything that may be said, in order."""
    out = [shift_sentence(story.shift)] if story.shift is not None else []
    out += [similarity_sentence(story.similarity)] if story.similarity is not None else []
    out += [shares_sentence(story.shares)] if story.shares is not None else []
    return out + ([margin_sentence(story.margin, story.prompts)] if story.margin is not None else [])


def kv_notes(story: KVStory) -> list[str]:
    """What readers must know, and why a part is missing."""
    out = list(story.notes)
    for part in (story.shift, story.similarity, story.shares, story.margin):
        out += list(part.notes if part is not None else ())
    return [sentence(n) for n in dict.fromkeys(out)]


def _skipped(n: int) -> str:
    return f"{n} left out." if n else "none left out."


def about_shift(shift: KVShift) -> Words:
    return Words(
        "How far the examples move the keys and values of the query's own tokens: against as many neutral tokens, against the zero-shot prompt, and what the neutral tokens do alone. A dot: further than "
        "they do; a triangle: less far. Below: averages over layers and heads.",
        "A large shift is no proof of use: any longer prompt moves keys and values, which is why the filler stands beside it. The first layer cannot move; relative numbers are large where the "
        f"vector without examples is short. {OURS}",
        f"n = {shift.n} episodes, bootstrap 95 %; controls: {', '.join([shift.control, *shift.others])}; {_skipped(len(shift.skipped))}",
    )  # fmt: skip


def about_similarity(test: SimilarityTest) -> Words:
    return Words(
        f"Each query with one example, chosen three ways by likeness ({test.embeddings}): does the more similar one shift keys and values more? Above: pooled effect sizes; below: cell by cell.",
        "Read both controls: an example like the query can move it further than a dissimilar one from a filler and less far from the zero-shot prompt, where it mostly repeats the query. "
        f"Likeness is the embeddings' own; another encoder may order examples otherwise. Cells share queries and are not independent. {OURS}",
        f"n = {test.n} queries, paired; Hedges' g with bootstrap 95 %; sign flips, Holm; {_skipped(len(test.skipped))}",
    )


def about_plane(shares: FactorShares) -> Words:
    levels = "; ".join(f"{name}: {', '.join(shares.levels[name])}" for name in shares.factors)
    return Words(
        f"Each marker a KV head: across, the share of {shares.factors[0]}; up, the share of {shares.factors[1]} in how its keys or values move over conditions ({levels}). On the dotted line "
        "these two are everything. The cross is where a head stands that tells nothing apart.",
        "A share says nothing about size: a head that hardly moves can have a large share of little (hover: how far). It holds for these changes of meaning and form; another change of form may move "
        f"more or less. {OURS}",
        f"n = {shares.n} episodes, {shares.replicates} draws of each condition; bootstrap 95 %, permutation null, Holm; {_skipped(len(shares.skipped))}",
    )  # fmt: skip


def about_answers(shares: FactorShares) -> Words:
    return Words(
        "Accuracy and margin under every condition, beside the shares over all heads: what moves keys and values, and what it does to the answers.",
        "A condition that costs answers need not act through these keys and values. A form that the model was never trained on can break it altogether.",
        f"n = {shares.n} episodes; Wilson and bootstrap 95 %; control: zero-shot, chance {100 * shares.chance:.0f}\u00a0%.",
    )


def about_margin(margin: ContrastMargin, prompts: str) -> Words:
    return Words(
        "Above: how much nearer each head holds the query to examples of its own label than to the others. Middle: how well that tells right answers from wrong, episode by episode. Below: the best heads "
        "beside attention and the model's own confidence, and one head's margin against the answer's.",
        "Where things of a class look alike, keys of an untrained network are alike too: a margin by itself proves no learning. The scatter's head was chosen on these episodes; the AUROCs beside it were "
        f"not. {OURS}",
        f"n = {margin.n} episodes {prompts or 'as they are'}, {100 * margin.accuracy:.0f}\u00a0% right; bootstrap and DeLong 95 %; null: labels shuffled over the examples, Holm; {_skipped(len(margin.skipped))}",
    )  # fmt: skip
