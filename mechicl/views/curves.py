"""Figures of accuracies, as plain plotly dictionaries: controls, ablation, dose curve, growth over training.

The arrays in a figure are the arrays of the result, untouched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mechicl.results import Ablation, AblationCell, DoseCurve, Estimate, ICLAccuracy, Series
from mechicl.views.theme import CHANCE, CHOSEN, CONTROL, DASHES, INTACT, LINES, RANDOM, SINGLE
from mechicl.views.words import Spec, name, words

_PERCENT = {"tickformat": ".0%", "range": [-0.03, 1.03]}


def _bars(estimates: Sequence[Estimate], axis: str, colour: str) -> Spec:
    """Error bars of estimates, asymmetric, for `error_x` / `error_y`."""
    value = np.array([e.value for e in estimates])
    return {
        f"error_{axis}": {
            "type": "data", "symmetric": False, "array": np.array([e.high for e in estimates]) - value, "arrayminus": value - np.array([e.low for e in estimates]),
            "color": colour, "thickness": 1.8, "width": 5,
        }
    }  # fmt: skip


def _row(
    label: str,
    estimates: Sequence[Estimate],
    labels: Sequence[str],
    colour: str,
    *,
    symbol: str = "circle",
    size: int = 11,
    hover: Sequence[str] = (),
) -> Spec:
    """Estimates as points with bars, a row of the figure each."""
    return {
        "type": "scatter", "mode": "markers", "name": label, "x": np.array([e.value for e in estimates]), "y": list(labels),
        **_bars(estimates, "x", colour), "marker": {"color": colour, "size": size, "symbol": symbol},
        "customdata": [[e.low, e.high, e.n, extra] for e, extra in zip(estimates, hover or [""] * len(estimates), strict=True)],
        "hovertemplate": "<b>%{y}</b><br>%{x:.1%}  (%{customdata[0]:.1%} to %{customdata[1]:.1%}), n = %{customdata[2]}%{customdata[3]}<extra></extra>",
    }  # fmt: skip


def points(change: Estimate) -> str:
    """A change of accuracy in percentage points, with its interval: "-95.3 points (-97.0 to -90.1)"."""
    return f"{100 * change.value:+.1f} points ({100 * change.low:+.1f} to {100 * change.high:+.1f})"


def falls_as_far(result: Ablation) -> str:
    """What the random control says: "none of 20 random draws falls as far (p = 0.048)"."""
    if not result.random:
        return "no random control"
    draws, worse = len(result.random), sum(c.accuracy.value <= result.chosen.accuracy.value for c in result.random)
    return f"{worse or 'none'} of {draws} random draws {'fall' if worse > 1 else 'falls'} as far (p = {result.p_random:.2g})"


def _chance(chance: float, axis: str) -> tuple[Spec, Spec]:
    """The line of guessing among the candidates, with its word."""
    line: Spec = {"type": "line", "line": {"color": CHANCE, "width": 1.6, "dash": "dot"}}
    note: Spec = {"text": f"chance {chance:.0%}", "showarrow": False, "font": {"color": CHANCE, "size": 12}}
    if axis == "x":
        line |= {"x0": chance, "x1": chance, "y0": 0, "y1": 1, "yref": "paper"}
        note |= {"x": chance, "y": 1, "yref": "paper", "xanchor": "left", "yanchor": "bottom"}
    else:
        line |= {"y0": chance, "y1": chance, "x0": 0, "x1": 1, "xref": "paper"}
        note |= {"x": 0, "y": chance, "xref": "paper", "xanchor": "left", "yanchor": "bottom"}
    return line, note


def accuracy_rows(result: ICLAccuracy, *, controls: Mapping[str, Estimate] | None = None) -> Spec:
    """Accuracy under each way of counting, with its controls, and the spread of the margin over episodes.

    Args:
        result: The accuracy.
        controls: Further accuracies to draw below, e.g. {"labels permuted": Estimate(...)}.
    """
    rows = [("right label among the candidates", result.accuracy), ("first token only", result.first_token_accuracy),
            ("open vocabulary, first token", result.open_accuracy), ("any label of the context (CLA)", result.cla)]  # fmt: skip
    data = [_row("with the examples", [e for _, e in rows], [w for w, _ in rows], INTACT)]
    below = [("zero-shot: no examples", result.zero_shot)] if result.zero_shot is not None else []
    below += [(words(key), e) for key, e in (controls or {}).items()]
    if below:
        data.append(_row("control", [e for _, e in below], [w for w, _ in below], CONTROL, symbol="diamond"))
    data.append(
        {"type": "histogram", "x": np.asarray(result.margins, dtype=float), "xaxis": "x2", "yaxis": "y2", "marker": {"color": INTACT, "line": {"color": "#ffffff", "width": 0.5}},
         "nbinsx": 24, "showlegend": False, "name": "margin", "hovertemplate": "margin %{x} nats<br>%{y} episodes<extra></extra>"}
    )  # fmt: skip
    line, note = _chance(result.chance, "x")
    line["yref"], line["xref"], note["yref"] = "y domain", "x", "y domain"
    zero = {
        "type": "line",
        "xref": "x2",
        "yref": "y2 domain",
        "x0": 0,
        "x1": 0,
        "y0": 0,
        "y1": 1,
        "line": {"color": CHANCE, "width": 1.6, "dash": "dot"},
    }
    m = result.margin
    skipped = f", {len(result.skipped)} skipped" if result.skipped else ""
    return {
        "data": data,
        "layout": {
            "title": {"text": "<b>Does the model learn from the examples?</b>", "subtitle": {"text": f"accuracy with 95 % intervals, n = {result.n} episodes{skipped}"}},
            "height": 190 + 38 * (len(rows) + len(below)),
            "xaxis": _PERCENT | {"domain": [0, 0.5], "anchor": "y", "title": {"text": "accuracy"}, "zeroline": False},
            "yaxis": {"autorange": "reversed", "type": "category", "anchor": "x", "showgrid": True, "ticks": ""},
            "xaxis2": {"domain": [0.64, 1], "anchor": "y2", "title": {"text": "margin: right label minus best wrong, nats"}, "zeroline": False},
            "yaxis2": {"anchor": "x2", "title": {"text": "episodes"}, "rangemode": "tozero"},
            "shapes": [line, zero],
            "annotations": [note, {"xref": "x2 domain", "yref": "y2 domain", "x": 1, "y": 1, "xanchor": "right", "yanchor": "bottom", "showarrow": False,
                                   "text": f"mean margin {m.value:.2f} nats ({m.low:.2f} to {m.high:.2f})"}],
            "legend": {"y": -0.02, "yref": "container", "yanchor": "bottom"},
            "margin": {"t": 92, "b": 88},
            "bargap": 0.03,
        },
    }  # fmt: skip


def _cells(cells: Sequence[AblationCell]) -> tuple[list[Estimate], list[str]]:
    hover = [
        f"<br>change {points(c.change)}, McNemar p {c.mcnemar_p:.2g}"
        f"<br>margin {c.margin_change.value:+.2f} nats<br>off: {' '.join(name(h) for h in c.heads[:12])}{' ...' if len(c.heads) > 12 else ''}"
        for c in cells
    ]  # fmt: skip
    return [c.accuracy for c in cells], hover


def ablation_rows(result: Ablation, *, singles: int = 12) -> Spec:
    """Accuracy with the set off, with each of its heads off alone, and with as many random heads off (each draw a dot).

    Args:
        result: The ablation.
        singles: At most so many single heads, in the result's order (all are in the CSV).
    """
    n_heads = len(result.chosen.heads)
    plural = "heads" if n_heads != 1 else "head"
    set_row, random_row = f"set off ({n_heads} {plural})", f"random {plural} off ({len(result.random)} draws)"
    est, hover = _cells([result.chosen])
    data = [
        _row("intact", [result.intact.accuracy], ["intact model"], INTACT),
        _row("chosen heads off together", est, [set_row], CHOSEN, symbol="square", size=12, hover=hover),
    ]
    if result.random:
        est, hover = _cells(result.random)
        values = np.array([e.value for e in est])
        data.append(
            {"type": "box", "orientation": "h", "x": values, "y": [random_row] * len(values), "boxpoints": "all", "jitter": 0.7, "pointpos": 0, "fillcolor": "rgba(125,135,147,0.12)",
             "line": {"color": RANDOM, "width": 1.2}, "marker": {"color": RANDOM, "size": 5, "opacity": 0.7}, "name": "matched random heads, one dot a draw", "width": 0.62,
             "customdata": [[h] for h in hover], "hovertemplate": "random draw<br>%{x:.1%}%{customdata[0]}<extra></extra>", "hoveron": "points"}
        )  # fmt: skip
        data.append(_row("random, mean", [result.random_mean], [random_row], "#3f4852", symbol="diamond", size=9))
    shown = result.singles[:singles] if n_heads > 1 else ()
    if shown:
        est, hover = _cells(shown)
        data.append(_row("one head off", est, [f"only {' '.join(name(h) for h in c.heads)} off" for c in shown], SINGLE, hover=hover))
    if result.zero_shot is not None:
        data.append(_row("zero-shot", [result.zero_shot], ["zero-shot: no examples"], CONTROL, symbol="diamond"))
    line, note = _chance(result.intact.chance, "x")
    order = [str(y) for y in dict.fromkeys(y for trace in data for y in trace["y"])]
    c = result.chosen.change
    listed = ", ".join(name(h) for h in result.chosen.heads[:8]) + (f" and {n_heads - 8} more" if n_heads > 8 else "")
    control = falls_as_far(result)
    return {
        "data": data,
        "layout": {
            "title": {"text": f"<b>Accuracy without {'heads' if n_heads > 1 else 'head'} {listed}</b> ({result.how} ablation)",
                      "subtitle": {"text": f"change {points(c)}; {control}; n = {result.n} episodes"}},
            "height": 160 + 34 * len(order),
            "xaxis": _PERCENT | {"title": {"text": "accuracy (right label among the candidates)"}, "zeroline": False},
            "yaxis": {"type": "category", "categoryorder": "array", "categoryarray": order[::-1], "ticks": ""},
            "shapes": [line],
            "annotations": [note],
            "showlegend": False,
            "margin": {"t": 96, "b": 60},
        },
    }  # fmt: skip


def dose_lines(result: DoseCurve) -> Spec:
    """Accuracy against the number of top heads switched off, with the band of matched random sets."""
    ks = np.asarray(result.ks)
    off = [" ".join(name(h) for h in result.ranking[: int(k)][-6:]) for k in ks]
    band: list[Spec] = [
        {"type": "scatter", "mode": "lines", "x": ks, "y": result.random_high, "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip", "name": "random high"},
        {"type": "scatter", "mode": "lines", "x": ks, "y": result.random_low, "line": {"width": 0}, "fill": "tonexty", "fillcolor": "rgba(125,135,147,0.25)",
         "name": f"95 % of up to {result.n_draws} random draws", "hoverinfo": "skip"},
        {"type": "scatter", "mode": "lines", "x": ks, "y": result.random_mean, "line": {"color": RANDOM, "width": 2, "dash": "dash"}, "name": "random heads, mean",
         "hovertemplate": "%{x} random heads off: %{y:.1%}<extra></extra>"},
    ]  # fmt: skip
    chosen: Spec = {
        "type": "scatter", "mode": "lines+markers", "x": ks, "y": np.array([a.value for a in result.accuracy]), "line": {"color": CHOSEN, "width": 2.5}, "marker": {"size": 9},
        **_bars(result.accuracy, "y", CHOSEN), "name": f"top heads by {words(result.ranked_by)}", "customdata": [[o] for o in off],
        "hovertemplate": "%{x} heads off: %{y:.1%}<br>last of them: %{customdata[0]}<extra></extra>",
    }  # fmt: skip
    line, note = _chance(result.chance, "y")
    return {
        "data": [*band, chosen],
        "layout": {
            "title": {"text": f"<b>Accuracy as the top heads by {words(result.ranked_by)} go off, one after another ({result.how})</b>",
                      "subtitle": {"text": f"95 % intervals over n = {result.n} episodes; band: as many matched random heads, {result.n_draws} draws"}},
            "height": 440,
            "xaxis": {"title": {"text": "heads off"}, "tickvals": ks if len(ks) <= 24 else None, "zeroline": False, "range": [float(ks.min()) - 0.4, float(ks.max()) + 0.4]},
            "yaxis": _PERCENT | {"title": {"text": "accuracy"}, "zeroline": False},
            "shapes": [line],
            "annotations": [note],
        },
    }  # fmt: skip


def growth_lines(result: Series) -> Spec:
    """Measures along training on the same probe episodes, with the stages as bands: answers above, attention below where there are both."""
    keys = list(result.values)
    answers = [k for k in keys if re.search(r"accura|cla\b", k, re.IGNORECASE)]
    panels = [part for part in (answers, [k for k in keys if k not in answers]) if part]
    titles = ["answers", "attention"] if len(panels) == 2 else [result.unit]
    data: list[Spec] = []
    layout: Spec = {}
    for row, part in enumerate(panels):
        suffix = "" if row == 0 else "2"
        for k, key in enumerate(part):
            data += _line(result, key, k, "y" + suffix, "legend" + suffix)
        top = 1.0 if row == 0 else 0.44
        bottom = 0.0 if len(panels) == 1 or row == 1 else 0.54
        layout[f"yaxis{suffix}"] = {
            "title": {"text": f"{titles[row]}, {result.unit}" if len(panels) == 2 else titles[row]},
            "domain": [bottom, top],
            "anchor": "x",
        }
        layout[f"legend{suffix}"] = {"orientation": "v", "x": 1.02, "xanchor": "left", "y": top, "yanchor": "top"}
    shapes, notes = _stages(result)
    return {
        "data": data,
        "layout": layout | {
            "title": {"text": "<b>How the circuit grew during training</b>", "subtitle": {"text": f"the same {result.n} probe episodes throughout, 95 % intervals; shading: training stages"}},
            "height": 440 if len(panels) == 1 else 620,
            "hovermode": "x",
            "xaxis": {"title": {"text": "training step"}, "zeroline": False, "anchor": "y" if len(panels) == 1 else "y2"},
            "shapes": shapes,
            "annotations": notes,
            "margin": {"t": 118},
        },
    }  # fmt: skip


def _line(result: Series, key: str, k: int, axis: str, legend: str) -> list[Spec]:
    """One measure with its band, in the k-th colour and dash."""
    steps, values = np.asarray(result.steps), np.asarray(result.values[key])
    colour, low, high = LINES[k % len(LINES)], result.low.get(key), result.high.get(key)
    common: Spec = {"type": "scatter", "x": steps, "yaxis": axis, "legend": legend, "legendgroup": key}
    out: list[Spec] = []
    if low is not None and high is not None and len(low) == len(steps):
        rgb = ",".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
        hidden: Spec = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        out = [
            common | hidden | {"y": np.asarray(high), "name": f"{words(key)} high"},
            common | hidden | {"y": np.asarray(low), "name": f"{words(key)} low", "fill": "tonexty", "fillcolor": f"rgba({rgb},0.12)"},
        ]  # fmt: skip
    line: Spec = {"y": values, "name": words(key), "mode": "lines+markers" if len(steps) < 60 else "lines", "hovertemplate": f"{words(key)} %{{y:.3f}}<extra></extra>",
                  "line": {"color": colour, "width": 2.2, "dash": DASHES[k % len(DASHES)]}, "marker": {"size": 5, "color": colour}}  # fmt: skip
    return [*out, common | line]


def _stages(result: Series) -> tuple[list[Spec], list[Spec]]:
    """Alternating bands for the stages of training, each with its name on top."""
    if not len(result.steps):
        return [], []
    last = int(max(result.steps))
    ends = [start for start, _ in result.stages[1:]] + [last]
    shapes: list[Spec] = []
    notes: list[Spec] = []
    level, before = 0, -float(last)
    for k, ((start, stage), end) in enumerate(zip(result.stages, ends, strict=False)):
        shapes.append({"type": "rect", "layer": "below", "xref": "x", "yref": "paper", "x0": start, "x1": end, "y0": 0, "y1": 1, "line": {"width": 0},
                       "fillcolor": "rgba(125,135,147,0.13)" if k % 2 == 0 else "rgba(125,135,147,0.03)"})  # fmt: skip
        level = (level + 1) % 3 if start - before < 0.22 * last else 0  # names that would meet go one line higher
        before = start
        notes.append({"xref": "x", "yref": "paper", "x": start, "y": 1.0, "yshift": 15 * level, "xanchor": "left", "yanchor": "bottom",
                      "text": f"{k + 1} {words(stage)}", "showarrow": False})  # fmt: skip
    return shapes, notes


def as_plain(value: Any) -> Any:
    """A specification with numpy arrays left as they are and None entries dropped (plotly refuses some of them)."""
    if isinstance(value, dict):
        return {k: as_plain(v) for k, v in value.items() if v is not None}
    return [as_plain(v) for v in value] if isinstance(value, list) else value
