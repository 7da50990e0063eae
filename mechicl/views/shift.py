"""Figures of key-value shift, as plain plotly dictionaries: by layer, head and span beside its controls, and by the likeness of the example.

The arrays in a figure are the arrays of the result.
"""

from __future__ import annotations

import numpy as np

from mechicl.errors import OptionError
from mechicl.results import KVShift, SimilarityTest
from mechicl.results.shift import MEASURES, FillerTest
from mechicl.views.panels import Panel, cells_panel, estimates, head_rows, part_words, passes, rows_panel, scaled, stack, titled
from mechicl.views.theme import CHOSEN, CONTROL, DIVERGING, RANDOM, SEQUENTIAL
from mechicl.views.words import ALPHA, Spec, words

CALLED = {"relative_l2": "relative L2 shift", "cosine_distance": "1 \u2212 cosine", "cka": "linear CKA"}
"""Measures as figures call them."""

AGAINST = {"filler": "examples against filler", "zero-shot": "examples against zero-shot", "given": "examples against the control"}
"""Controls as headings."""


def _flat(array: np.ndarray) -> np.ndarray:
    """[layer, head, span] as rows "layer.head" and columns."""
    return np.asarray(array, dtype=float).reshape(-1, array.shape[-1])


def _sides(change: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cells that pass, upwards and downwards, as rows and columns."""
    passed, up = _flat(passes(p)) > 0, _flat(change) > 0
    return passed & up, passed & ~up


def _map(shift: KVShift, p: int, measure: str, *, heading: str, named: bool, test: FillerTest | None) -> Panel:
    """One part against one control; `test`: mark where examples do more, and where less, than the filler."""
    part = shift.parts[p]
    extra = np.stack([_flat(shift.low[measure][p]), _flat(shift.high[measure][p]), _flat(shift.measures["cosine_distance"][p]), _flat(shift.measures["cka"][p])], axis=-1)  # fmt: skip
    hover = (
        f"<b>{part_words(part)} of head %{{y}}, %{{x}}</b><br>{CALLED[measure]} %{{z:.3f}} (%{{customdata[0]:.3f}} to %{{customdata[1]:.3f}})<br>"
        f"1 \u2212 cosine %{{customdata[2]:.3f}}, CKA %{{customdata[3]:.3f}}<br>against {words(shift.control)}, n = {shift.n}<extra></extra>"
    )
    more, less = (None, None) if test is None else _sides(test.difference[p], test.p_corrected[p])
    return cells_panel(_flat(shift.measures[measure][p]), head_rows(shift.layers, shift.heads), shift.spans, heading, hover=hover, extra=extra,
                       marked=more, below=less,                       what=f"{part} {shift.control}", named=named, down="layer.KV head")  # fmt: skip


def _filler_map(shift: KVShift, p: int, heading: str) -> Panel:
    """What as many neutral tokens do by themselves."""
    test = shift.test
    assert test is not None
    extra = np.stack([_flat(test.example[p]), _flat(test.difference[p]), _flat(test.low[p]), _flat(test.high[p]), _flat(test.p_corrected[p])], axis=-1)  # fmt: skip
    hover = (
        f"<b>{part_words(shift.parts[p])} of head %{{y}}, %{{x}}</b><br>filler %{{z:.3f}}, examples %{{customdata[0]:.3f}}<br>examples minus filler "
        f"%{{customdata[1]:.3f}} (%{{customdata[2]:.3f}} to %{{customdata[3]:.3f}}), corrected p %{{customdata[4]:.2g}}, n = {shift.n}<extra></extra>"
    )
    return cells_panel(_flat(test.filler[p]), head_rows(shift.layers, shift.heads), shift.spans, heading, hover=hover, extra=extra, what=f"{shift.parts[p]} filler alone", named=False)  # fmt: skip


def shift_maps(shift: KVShift, *, measure: str = "relative_l2") -> Spec:
    """Keys above, values below: against each control beside one another, then what the filler does alone; last, everything averaged over heads.

    Args:
        shift: The result.
        measure: "relative_l2", "cosine_distance" or "cka".

    Raises:
        OptionError: no such measure.
    """
    if measure not in MEASURES:
        raise OptionError(f"measure must be one of {', '.join(MEASURES)}; got {measure!r}. Pick one of them.")
    both = [shift, *(shift.others[name] for name in shift.others if shift.others[name].spans == shift.spans)]
    with_filler = shift.test is not None and measure == "relative_l2"
    panels: list[Panel] = []
    for p, part in enumerate(shift.parts):
        for k, one in enumerate(both):
            test = shift.test if with_filler and one.control == "zero-shot" else None
            heading = f"<b>{part_words(part)}</b> \u00b7 {AGAINST.get(one.control, words(one.control))}"
            panels.append(_map(one, p, measure, heading=heading, named=k == 0, test=test))
        if with_filler:
            panels.append(_filler_map(shift, p, "filler against zero-shot"))
    each = len(panels) // len(shift.parts)
    rows = [panels[k : k + each] for k in range(0, len(panels), each)]
    last = [[_pooled(shift, both)]] if measure == "relative_l2" else []
    spec = stack([*rows, *last], insets=[0.0] * len(rows) + [0.16], header=84, footer=30 if last else 10, gap=0.03)
    values = [np.asarray(one.measures[measure]) for one in both] + (
        [np.asarray(shift.test.filler)] if shift.test is not None and with_filler else []
    )
    finite = np.concatenate([v[np.isfinite(v)].ravel() for v in values])
    top = float(finite.max()) if finite.size else 1.0
    dots = f" \u00b7 dot: more than filler does, triangle: less, corrected p < {ALPHA} (Holm)" if with_filler else ""
    subtitle = f"{CALLED[measure]} by layer, KV head and span, n = {shift.n} episodes; keys before RoPE{dots}"
    titled(spec, "<b>What the examples change in the query's own keys and values</b>", subtitle)
    return scaled(spec, {"colorscale": SEQUENTIAL, "cmin": 0, "cmax": max(top, 1e-9)}, scale="sequential")


def _pooled(shift: KVShift, both: list[KVShift]) -> Panel:
    """Averages over layers and heads, a row for each part and span."""
    keys = list(shift.pooled)
    labels = {key: f"{part_words(key[0])}, {words(key[1])}" for key in keys}
    styles = {"filler": (CONTROL, "diamond"), "zero-shot": (CHOSEN, "circle")}
    traces: list[Spec] = []
    for one in both:
        shared = [key for key in keys if key in one.pooled]
        colour, symbol = styles.get(one.control, (RANDOM, "square"))
        traces.append(estimates([labels[k] for k in shared], [one.pooled[k] for k in shared], AGAINST.get(one.control, words(one.control)), colour, symbol))  # fmt: skip
    if shift.test is not None:
        test = shift.test
        traces.append(estimates([labels[k] for k in test.pooled if k in labels], [test.pooled[k] for k in test.pooled if k in labels], "examples minus filler, both from zero-shot",
                                RANDOM, "square", filled=[bool(test.pooled_p[k] < ALPHA) for k in test.pooled if k in labels],
                                hover=[f"<br>corrected p {test.pooled_p[k]:.2g}" for k in test.pooled if k in labels]))  # fmt: skip
    title = "relative L2, 95 % intervals"
    return rows_panel(traces, [labels[k] for k in keys], "<b>averaged over layers and heads</b>", title=title, level=0.0, tall=24)


def similarity_rows(test: SimilarityTest) -> Spec:
    """Effect sizes of choosing a more similar example, from each control: pooled on top and cell by cell below.

    Filled, and a dot: corrected p < 0.05; a triangle: less.
    """
    both = [test, *test.others.values()]
    labels = [f"{words(c.first)} minus {words(c.second)}, {part_words(c.part)}" for c in test.comparisons]
    styles = {"filler": (CONTROL, "diamond"), "zero-shot": (CHOSEN, "circle")}
    traces = []
    for one in both:
        hover = [f"<br>shift differs by {c.difference.value:.4f} ({c.difference.low:.4f} to {c.difference.high:.4f}), more in {c.share:.0%} of queries<br>p {c.p:.2g}, corrected {c.p_corrected:.2g}"
                 for c in one.comparisons]  # fmt: skip
        filled = [bool(c.p_corrected < ALPHA) for c in one.comparisons]
        colour, symbol = styles.get(one.control, (RANDOM, "square"))
        own = [f"{words(c.first)} minus {words(c.second)}, {part_words(c.part)}" for c in one.comparisons]
        traces.append(
            estimates(
                own, [c.effect for c in one.comparisons], f"shift from {words(one.control)}", colour, symbol, filled=filled, hover=hover
            )
        )
    pooled = rows_panel(
        traces, labels, "<b>averaged over layers, heads and spans</b>", title="effect size (Hedges' g, paired), 95 % intervals", level=0.0
    )
    maps = [[_effect_map(one, p) for p in range(len(one.parts))] for one in both]
    spec = stack([[pooled], *maps], insets=[0.24], header=84, footer=30)
    size = np.concatenate([np.abs(one.effect[np.isfinite(one.effect)]) for one in both])
    half = max(0.2, float(size.max()) if size.size else 0.2)
    subtitle = f"same query, label and number of tokens, other example; likeness by {words(test.embeddings)}; n = {test.n} queries \u00b7 filled, dot (triangle: less): corrected p < {ALPHA} (Holm)"
    titled(spec, "<b>Does a more similar example shift more?</b>", subtitle)
    return scaled(spec, {"colorscale": DIVERGING, "cmin": -half, "cmax": half, "cmid": 0}, scale="diverging", low=True)


def _effect_map(test: SimilarityTest, p: int) -> Panel:
    """One part: effect of the most similar example against the least similar, cell by cell."""
    part, first, last = test.parts[p], _flat(test.shift[0, p]), _flat(test.shift[-1, p])
    more, less = _sides(test.effect[p], test.p_corrected[p])
    extra = np.stack([_flat(test.effect_low[p]), _flat(test.effect_high[p]), _flat(test.p_corrected[p]), first, last], axis=-1)
    hover = (
        f"<b>{part_words(part)} of head %{{y}}, %{{x}}</b><br>effect %{{z:.2f}} (%{{customdata[0]:.2f}} to %{{customdata[1]:.2f}}), corrected p %{{customdata[2]:.2g}}<br>"
        f"shift {words(test.by[0])} %{{customdata[3]:.3f}}, {words(test.by[-1])} %{{customdata[4]:.3f}}, from {words(test.control)}, n = {test.n}<extra></extra>"
    )
    heading = f"<b>{part_words(part)}</b> \u00b7 {words(test.by[0])} minus {words(test.by[-1])}, from {words(test.control)}"
    return cells_panel(_flat(test.effect[p]), head_rows(test.layers, test.heads), test.spans, heading, hover=hover, extra=extra, marked=more, below=less,
                       what=f"{part} effect {test.control}", named=p == 0, down="layer.KV head")  # fmt: skip
