"""Figures of results over many trainings, as plain plotly dictionaries: curves with seed bands and change points, correlations, knock-outs.

The arrays in a figure are the arrays of the result, untouched.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from mechicl.results import Bands, Correlations, Emergence, Estimate, Forest, KnockOutTable
from mechicl.views.theme import CHANCE, CHOSEN, CONTROL, DASHES, INTACT, LINES, RANDOM, SINGLE
from mechicl.views.words import Spec, words

KIND_COLOURS = {"intact": INTACT, "heads": CHOSEN, "random heads": RANDOM, "modality": SINGLE, "random tokens": RANDOM}
PERCENT = {"tickformat": ".0%", "range": [-0.03, 1.03]}
NAMES = {
    "accuracy": "accuracy, training task", "accuracy_ic": "ICL: new classes", "accuracy_ic2": "ICL: labels shifted", "accuracy_iw": "in weights",
    "accuracy_above_copying": "ICL above copying", "accuracy_of_the_worse": "the worse of both", "cla": "CLA, training task", "cla_ic": "CLA: any context label",
}  # fmt: skip
MEASURES = {
    "ph1": "PH(1), previous token", "ph2": "PH(2), two before", "ila": "ILA, label to item", "ila2": "ILA, label to 2nd item", "ih": "IH, right minus wrong labels",
    "tila": "TILA, query to right labels", "tla": "TLA, query to labels", "tiia": "TIIA, query to right items", "tiia1": "TIIA, 1st modality",
    "tiia2": "TIIA, 2nd modality",
}  # fmt: skip


def called(measure: str) -> str:
    """A measure as figures name it: "IH, right minus wrong labels (head 1.0)"."""
    found = re.fullmatch(r"(\w+?)_(\d+\.\d+)", measure)
    if found and found[1] in MEASURES:
        return f"{MEASURES[found[1]]} (head {found[2]})"
    return NAMES.get(measure, words(measure))


def band(x: Any, low: Any, high: Any, colour: str, share: float = 0.16, **common: Any) -> list[Spec]:
    """The area between two curves, two traces; none where there is no interval at all."""
    if not np.isfinite(np.asarray(low, dtype=float)).any():
        return []
    rgb = ",".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
    hidden: Spec = {"type": "scatter", "mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip", "x": x, **common}
    return [hidden | {"y": high}, hidden | {"y": low, "fill": "tonexty", "fillcolor": f"rgba({rgb},{share})"}]


def growth_bands(result: Bands, *, changes: Emergence | None = None, log: bool = True) -> Spec:
    """Answers above, attention below, mean over runs with the band of its interval; change points as lines with the bar of their interval."""
    keys = list(result.values)
    answers = [k for k in keys if re.match(r"accuracy|cla", k)]
    panels = [part for part in (answers, [k for k in keys if k not in answers]) if part]
    data: list[Spec] = []
    layout: Spec = {}
    shapes: list[Spec] = []
    steps, shown = _shown(result.steps, log)
    for row, part in enumerate(panels):
        end = "" if row == 0 else "2"
        for k, key in enumerate(part):
            colour = LINES[k % len(LINES)]
            data += band(steps, result.low[key], result.high[key], colour, yaxis="y" + end, legendgroup=key + end)
            data.append({"type": "scatter", "mode": "lines", "x": steps, "y": result.values[key], "yaxis": "y" + end, "legend": "legend" + end, "legendgroup": key + end,
                         "name": called(key), "line": {"color": colour, "width": 2.3, "dash": DASHES[k % len(DASHES)]},
                         "hovertemplate": f"{called(key)} %{{y:.3f}} at %{{x}}<extra></extra>"})  # fmt: skip
            shapes += _change_marks(key, colour, changes, end)
        top, bottom = (1.0 if row == 0 else 0.46), (0.0 if len(panels) == 1 or row == 1 else 0.54)
        title = "share of answers" if part is answers else "attention"
        layout[f"yaxis{end}"] = {"title": {"text": title}, "domain": [bottom, top], "anchor": "x", "zeroline": False}
        if part is answers:
            layout[f"yaxis{end}"] |= PERCENT
        layout[f"legend{end}"] = {"orientation": "v", "x": 1.02, "xanchor": "left", "y": top, "yanchor": "top"}
    runs = int(result.n_runs.max(initial=0))
    what = f"mean of {runs} {'run' if runs == 1 else 'runs'}" + (f", band: {words(result.method)}" if runs > 1 else "")
    probe = f", n = {result.n} probe sequences each" if result.n else ""
    marks = "; dotted: change points, bars: their intervals" if changes is not None else ""
    title = "How in-context learning and its circuit grow" + (f": {words(result.setting)}" if result.setting else "")
    return {
        "data": data,
        "layout": layout | {
            "title": {"text": f"<b>{title}</b>", "subtitle": {"text": what + probe + marks}},
            "height": 400 if len(panels) == 1 else 620, "width": 1000,
            "xaxis": shown | {"title": {"text": "training step" + (" (logarithmic)" if log else "")}, "zeroline": False, "anchor": "y" if len(panels) == 1 else "y2"},
            "shapes": shapes, "margin": {"t": 84, "r": 270},
        },
    }  # fmt: skip


def _shown(steps: np.ndarray, log: bool) -> tuple[np.ndarray, Spec]:
    """Steps and axis; on a logarithmic axis step 0 stands one doubling before the first other step, and its tick says 0."""
    if not log:
        return steps, {}
    out = np.asarray(steps, dtype=float).copy()
    ticks, text = [], []
    if len(out) > 1 and out[0] == 0:
        out[0] = out[1] / 2
        ticks, text = [out[0]], ["0"]
    ends = [float(np.log10(out[0])), float(np.log10(out[-1])) + 0.02] if len(out) > 1 else None
    powers = [10.0**k for k in range(9) if out[0] < 10**k <= out[-1]] if len(out) else []
    return out, {"type": "log", "range": ends, "tickvals": ticks + powers, "ticktext": text + [f"{int(p):,}" for p in powers]}


def _change_marks(key: str, colour: str, changes: Emergence | None, end: str) -> list[Spec]:
    """A line at a change point and a bar over its interval, at the foot of the panel."""
    found = [p for p in changes.points if p.measure == key and np.isfinite(p.at.value)] if changes is not None else []
    out: list[Spec] = []
    for point in found:
        across: Spec = {"type": "line", "xref": "x", "yref": f"y{end} domain", "line": {"color": colour, "width": 1.4, "dash": "dot"}}
        out.append(across | {"x0": point.at.value, "x1": point.at.value, "y0": 0, "y1": 1})
        if np.isfinite(point.at.low):
            out.append({"type": "line", "xref": "x", "yref": f"y{end} domain", "x0": point.at.low, "x1": point.at.high, "y0": 0.012, "y1": 0.012, "line": {"color": colour, "width": 5}, "opacity": 0.55})  # fmt: skip
    return out


def emergence_rows(result: Emergence) -> Spec:
    """One row per measure, earliest on top: the step of its change with the interval over runs, and each run's own."""
    points = [p for p in result.points if np.isfinite(p.at.value)]
    labels = [called(p.measure) for p in points]
    dots: Spec = {"type": "scatter", "mode": "markers", "name": "one run", "x": np.concatenate([p.steps for p in points]) if points else np.array([]),
                  "y": [label for label, p in zip(labels, points, strict=True) for _ in p.steps], "marker": {"color": RANDOM, "size": 7, "symbol": "line-ns-open"},
                  "hovertemplate": "%{y}: step %{x:.0f} in one run<extra></extra>"}  # fmt: skip
    mean = _estimates("mean over runs", [p.at for p in points], labels, INTACT, "x", form=".0f")
    ticks = [a * 10**k for k in range(9) for a in (1, 2, 5)]
    flat = [called(p.measure) for p in result.points if not np.isfinite(p.at.value)]
    unchanged = f"; no change: {', '.join(flat)}" if flat else ""
    return {
        "data": [dots, mean],
        "layout": {
            "title": {"text": "<b>What changes when</b>", "subtitle": {"text": f"change point of each measure, {result.method}, n = {result.n_runs} runs; measured every {result.resolution:.2f} doublings{unchanged}"}},
            "height": 170 + 34 * len(points), "width": 1000, "showlegend": False,
            "xaxis": {"type": "log", "title": {"text": "training step (logarithmic)"}, "tickvals": ticks, "ticktext": [f"{k:,}" for k in ticks]}, "yaxis": {"autorange": "reversed", "type": "category", "ticks": ""},
            "margin": {"t": 84},
        },
    }  # fmt: skip


def _estimates(
    label: str, estimates: Sequence[Estimate], names: Sequence[str], colour: Any, axis: str = "x", *, form: str = ".2f", **more: Any
) -> Spec:
    """Points with the bars of their intervals, one row each."""
    value = np.array([e.value for e in estimates])
    high, low = (np.nan_to_num(np.array([getattr(e, end) for e in estimates]) - value) for end in ("high", "low"))
    return {
        "type": "scatter", "mode": "markers", "name": label, "x": value, "y": list(names),
        f"error_{axis}": {"type": "data", "symmetric": False, "array": high, "arrayminus": -low, "thickness": 1.8, "width": 5, "color": colour if isinstance(colour, str) else RANDOM},
        "marker": {"color": colour, "size": 10}, "customdata": [[e.low, e.high, e.n] for e in estimates],
        "hovertemplate": f"<b>%{{y}}</b><br>%{{x:{form}}}  (%{{customdata[0]:{form}}} to %{{customdata[1]:{form}}}), n = %{{customdata[2]}}<extra></extra>", **more,
    }  # fmt: skip


def correlation_rows(result: Correlations, *, top: int = 20) -> Spec:
    """The strongest correlations with the outcome, with intervals; filled where the corrected p is below 0.05."""
    names = sorted(result.value, key=lambda n: -abs(result.value[n].value))[:top]
    colours = [INTACT if result.p_corrected[n] < 0.05 else "#c5cad0" for n in names]
    row = _estimates("correlation", [result.value[n] for n in names], [called(n) for n in names], colours)
    zero: Spec = {
        "type": "line",
        "x0": 0,
        "x1": 0,
        "y0": 0,
        "y1": 1,
        "yref": "y domain",
        "line": {"color": CHANCE, "width": 1.4, "dash": "dot"},
    }
    return {
        "data": [row],
        "layout": {
            "title": {"text": f"<b>Which measure goes with {called(result.outcome)}?</b>",
                      "subtitle": {"text": f"{result.method} over n = {result.n_runs} models of {result.n_settings} settings, measured {result.measured}; 95 % intervals over settings; blue: p < 0.05 (Holm)"}},
            "height": 170 + 26 * len(names), "width": 1000, "showlegend": False, "shapes": [zero],
            "xaxis": {"range": [-1.05, 1.05], "title": {"text": f"{result.method} correlation"}, "zeroline": False},
            "yaxis": {"autorange": "reversed", "type": "category", "ticks": ""}, "margin": {"t": 84},
        },
    }  # fmt: skip


def forest_rows(result: Forest, *, top: int = 15) -> Spec:
    """What the forest needs: the importance of the measures on settings it did not see."""
    names = sorted(result.importance, key=lambda n: -result.importance[n].value)[:top]
    row = _estimates("importance", [result.importance[n] for n in names], [called(n) for n in names], INTACT)
    null = f"shuffled control at most {result.shuffled.max():.2f} (p = {result.p:.2g})" if len(result.shuffled) else "no shuffled control"
    return {
        "data": [row],
        "layout": {
            "title": {"text": f"<b>What a random forest needs to predict {called(result.outcome)}</b>",
                      "subtitle": {"text": f"on settings it did not see: r² {result.r2.value:.2f} ({result.r2.low:.2f} to {result.r2.high:.2f}), {null}; n = {result.n_runs} models of {result.n_settings} settings"}},
            "height": 170 + 26 * len(names), "width": 1000, "showlegend": False,
            "xaxis": {"title": {"text": "fall of r² when the measure is permuted"}, "zeroline": True},
            "yaxis": {"autorange": "reversed", "type": "category", "ticks": ""}, "margin": {"t": 84},
        },
    }  # fmt: skip


def knock_out_rows(result: KnockOutTable) -> Spec:
    """Accuracy with each thing taken away, the intact model on top, with chance and the level of copying any label."""
    names = [words(r.name) for r in result.rows]
    colours = [KIND_COLOURS.get(r.kind, CONTROL) for r in result.rows]
    row = _estimates("accuracy", [r.accuracy for r in result.rows], names, colours, form=".1%")
    lines: list[Spec] = []
    notes: list[Spec] = []
    for at, text, level in (
        (result.chance, f"any label {result.chance:.0%}", 0),
        (result.copy, f"copying a context label {result.copy:.0%}", 15),
    ):
        lines.append(
            {
                "type": "line",
                "x0": at,
                "x1": at,
                "y0": 0,
                "y1": 1,
                "yref": "y domain",
                "line": {"color": CHANCE, "width": 1.5, "dash": "dot"},
            }
        )
        notes.append({"x": at, "y": 1, "yref": "y domain", "yshift": level, "xanchor": "left", "yanchor": "bottom", "text": text, "showarrow": False, "font": {"color": CHANCE, "size": 12}})  # fmt: skip
    over = (
        f"mean of {result.n_models} models, Student 95 %; n = {result.n} sequences each"
        if result.n_models > 1
        else f"n = {result.n} sequences, Wilson 95 %"
    )
    return {
        "data": [row],
        "layout": {
            "title": {"text": f"<b>What the model cannot do without</b> ({words(result.how)})", "subtitle": {"text": over}},
            "height": 180 + 34 * len(names), "width": 1000, "showlegend": False, "shapes": lines, "annotations": notes,
            "xaxis": PERCENT | {"title": {"text": "accuracy on new classes (among all labels)"}, "zeroline": False},
            "yaxis": {"autorange": "reversed", "type": "category", "ticks": ""}, "margin": {"t": 108},
        },
    }  # fmt: skip
