"""Figures of a published protocol, as plain plotly dictionaries: knock-outs beside their controls, a ranking against another, what fine-tuning changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mechicl.results import Estimate, KnockOutRow, KnockOuts, RankingMatch, Tuning, TuningChange
from mechicl.views.captions import Words
from mechicl.views.panels import Panel, estimates, number, rows_panel, stack, titled
from mechicl.views.theme import CHOSEN, CONTROL, INTACT, LINES, RANDOM
from mechicl.views.words import Spec, name, words

KINDS = {"intact": ("intact model", INTACT, "circle"), "control": ("control", CONTROL, "diamond"), "published": ("heads by the published scores", CHOSEN, "square"),
         "ours": ("heads by our scores", LINES[5], "triangle-up")}  # fmt: skip
NAMED = 8
"""Heads of a ranking whose names are written beside their dots; the others say theirs when pointed at."""
PERCENT: Spec = {"tickformat": ".0%", "range": [-0.04, 1.04], "nticks": 6}


def knock_out_panels(result: KnockOuts) -> Spec:
    """Every condition as a row: first token as published, whole label, any label of the context; grey: as many random heads, mean over draws."""
    labels = [label_of(row) for row in result.rows]
    chosen = (
        ("open", "First token, whole vocabulary", None, "as published"),
        ("whole", "Whole label, candidates", result.chance, f"dotted: chance, {result.chance:.0%}"),
        ("cla", "Any label of the context (CLA)", None, "copying, right or wrong"),
    )
    panels = [
        _panel(result.rows, labels, key, heading, level, title, first=k == 0) for k, (key, heading, level, title) in enumerate(chosen)
    ]
    spec = stack([panels], insets=[0.25], header=84, footer=34, gap=0.03)
    skipped = f", {len(result.skipped)} skipped" if result.skipped else ""
    subtitle = f"n = {result.n} prompts that did not rank the heads{skipped}, 95 % intervals; heads zeroed at the output projection's input, all positions"
    titled(spec, "<b>What is lost without the top heads?</b>", subtitle)
    spec["layout"]["margin"] |= {"l": 20}
    return spec


def label_of(row: KnockOutRow) -> str:
    """A condition as figures call it."""
    return f"{words(row.name)} off" if row.heads else words(row.name)


def _panel(
    rows: Sequence[KnockOutRow], labels: list[str], key: str, heading: str, level: float | None, title: str, *, first: bool
) -> Panel:  # fmt: skip
    traces: list[Spec] = []
    beside = [(label, getattr(row, f"random_{key}", None)) for label, row in zip(labels, rows, strict=True)]
    found = [(label, e) for label, e in beside if e is not None]
    if found:
        grey = estimates(
            [label for label, _ in found],
            [e for _, e in found],
            "as many random heads, mean of the draws",
            RANDOM,
            "line-ns",
            legend=first,
            size=13,
        )
        grey["marker"]["line"] = {"color": RANDOM, "width": 3}
        traces.append(grey)  # fmt: skip
    for kind, (called, colour, symbol) in KINDS.items():
        mine = [(label, row) for label, row in zip(labels, rows, strict=True) if row.kind == kind]
        if mine:
            hover = [_hover(row, key) for _, row in mine]
            values = [getattr(row, key) for _, row in mine]
            traces.append(estimates([label for label, _ in mine], values, called, colour, symbol, hover=hover, legend=first))
    return rows_panel(traces, labels, f"<b>{heading}</b>", title=title, level=level, x=PERCENT, named=first)


def _hover(row: KnockOutRow, key: str) -> str:
    change: Estimate | None = getattr(row, f"{key}_change", None)
    lines = [] if not row.heads else ["heads " + " ".join(name(h) for h in row.heads[:12])]
    if change is not None:
        lines.append(f"change {change.value:+.1%} ({change.low:+.1%} to {change.high:+.1%})")
    if row.n_draws and key in ("open", "whole"):
        lines.append(f"p against {row.n_draws} random draws {getattr(row, f'p_{key}'):.2g}")
    return "".join(f"<br>{line}" for line in lines)


def ranking_points(result: RankingMatch) -> Spec:
    """Scores of the same heads in two rankings; a head on the dotted line has the same score in both."""
    labels = [name(h) if k < NAMED else "" for k, h in enumerate(result.heads)]
    here = np.asarray(result.here, dtype=float)
    top = max(float(np.nanmax(result.published, initial=0.0)), float(np.nanmax(here, initial=0.0)), 1e-6) * 1.08
    low = min(0.0, float(np.nanmin(result.published, initial=0.0)), float(np.nanmin(here, initial=0.0)))
    other = f"published, {result.model}" if result.model else words(result.kind.split(" against ")[0])
    trace: Spec = {
        "type": "scatter", "mode": "markers+text", "x": result.published, "y": here, "text": labels, "textposition": "top center", "textfont": {"size": 11},
        "marker": {"size": 9, "color": CHOSEN}, "cliponaxis": False, "name": "heads", "customdata": [[name(h), float(r)] for h, r in zip(result.heads, result.rank, strict=True)],
        "hovertemplate": "<b>head %{customdata[0]}</b><br>" + other + " %{x:.3f}<br>here %{y:.3f}, place %{customdata[1]}<extra></extra>",
    }  # fmt: skip
    line = {
        "type": "line",
        "x0": max(low, 0.0),
        "y0": max(low, 0.0),
        "x1": top,
        "y1": top,
        "line": {"color": RANDOM, "width": 1.5, "dash": "dot"},
    }
    shared = "; ".join(f"top {o.k}: {o.shared} shared, {o.expected:.1f} by chance, p = {o.p:.2g}" for o in result.overlaps)
    spec: Spec = {
        "data": [trace],
        "layout": {
            "height": 460, "margin": {"t": 92, "b": 70}, "showlegend": False, "shapes": [line],
            "xaxis": {"title": {"text": other}, "range": [low - 0.02 * top, top]}, "yaxis": {"title": {"text": f"{words(result.score)}, here"}},
        },
    }  # fmt: skip
    title = f"<b>{words(result.kind)}</b>: the same heads?"
    subtitle = f"rank correlation {number(result.correlation)} over {len(result.heads)} heads (p = {result.correlation_p:.2g}); {shared}"
    return titled(spec, title, subtitle, legend=False)


def tuning_rows(result: Tuning) -> Spec:
    """What each measure was before the fine-tuning and is after it, and the paired change."""
    rows = list(result.changes)
    labels = [words(c.name) for c in rows]
    ends = [
        estimates(labels, [c.before for c in rows], "before", INTACT, "circle"),
        estimates(labels, [c.after for c in rows], "after", CHOSEN, "square"),
    ]
    change = [
        estimates(labels, [c.change for c in rows], "after minus before, paired", LINES[5], "diamond", filled=[certain(c) for c in rows])
    ]
    left = rows_panel(ends, labels, "<b>before and after</b>", title="share of prompts, or attention", x={"rangemode": "tozero"})
    right = rows_panel(change, labels, "<b>change</b>", title="filled: the interval leaves zero out", level=0.0, named=False)
    spec = stack([[left, right]], insets=[0.3], header=84, footer=34, gap=0.05)
    return titled(
        spec,
        "<b>What did the fine-tuning change?</b>",
        f"n = {result.n} held-out prompts, 95 % intervals, heads ranked before it; one training, one seed",
    )


def certain(change: TuningChange) -> bool:
    """Whether the change's interval leaves zero out."""
    return change.change.low > 0 or change.change.high < 0


def about_knock_outs(result: KnockOuts) -> Words:
    rows = [row for row in result.rows if row.heads]
    few = [row for row in rows if row.n_draws < 19]
    notes = _notes(rows)
    told = "; ".join(
        f"{row.name}: {row.open.value:.2f}, random heads {number(_value(row.random_open))}, p = {row.p_open:.2g}"
        for row in rows
        if row.n_draws
    )
    return Words(
        "Accuracy with sets of heads switched off, counted as published (the likeliest next token begins the right label) and by whole labels, beside as many random "
        "heads of the same layers, the question without examples, and examples with their labels permuted.",
        "Zeroing takes a model off its usual path and costs something for any heads: read every set against its random draws. First tokens alone cannot tell labels "
        f"apart that begin alike, and count a right name in other words as wrong. {'Fewer than 19 draws cannot reach p = 0.05: ' + ', '.join(r.name for r in few) + '. ' if few else ''}{notes}",
        f"n = {result.n} prompts not used to rank; intact {result.rows[0].open}; {told or 'no random draws'}.",
    )  # fmt: skip


def _notes(rows: Sequence[KnockOutRow]) -> str:
    """What must be said about the random heads, once for all sets that it is true of."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            found.setdefault(row.note, []).append(row.name)
    return " ".join(f"{', '.join(some)}: {note}." for note, some in found.items())


def _value(e: Estimate | None) -> float:
    return float("nan") if e is None else e.value


def about_ranking(result: RankingMatch) -> Words:
    overlaps = "; ".join(
        f"of the top {o.k}, {o.shared} are shared ({o.expected:.2f} by chance, hypergeometric p = {o.p:.2g})" for o in result.overlaps
    )
    return Words(
        f"Each dot is a head of one ranking's top {len(result.heads)}, with its score in both.",
        "The correlation is over these heads only, chosen by one side: it is lower than over all heads. Scores on other prompts, sizes of pictures or dtypes move; places move less.",
        f"n = {result.n} prompts, {result.n_heads} heads; Spearman {number(result.correlation)}, permutation p = {result.correlation_p:.2g}; {overlaps or 'too few heads for an overlap'}.",
    )


def about_tuning(result: Tuning) -> Words:
    told = "; ".join(f"{c.name} {c.change.value:+.3f} [{c.change.low:+.3f}, {c.change.high:+.3f}]" for c in result.changes)
    return Words(
        f"Answers and head scores on the same held-out prompts before and after {len(result.loss)} steps of LoRA on {result.n_train} prompts.",
        "One training with one seed. A score can rise because the answer got surer while the head does the same: switch it off to know. Heads were ranked before, so regression to the mean works against them.",
        f"n = {result.n}; {told}.",
    )
