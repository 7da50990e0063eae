"""Figures of direct logit attribution, as plain plotly dictionaries: heads and MLPs, sublayers, heads split by what they read.

The arrays in a figure are the arrays of the result, untouched; interval and control ride along as `customdata`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mechicl.results import LogitAttribution
from mechicl.views.marks import INTERVAL, extra, points, symmetric, written, zero_line
from mechicl.views.theme import CHOSEN, DIVERGING, RANDOM
from mechicl.views.words import Spec, words


def attribution_figure(result: LogitAttribution, *, top: int = 20) -> Spec:
    """Parts of the logit difference. Split by source span: a table. Else the largest parts with their control; by component also a cell for each head."""
    if result.spans:
        return _attribution_spans(result, top)
    if result.by == "component":
        return _attribution_heads(result, top)
    return _attribution_rows(result, result.components)


def _headline(result: LogitAttribution) -> Spec:
    total = result.total
    return {
        "text": "<b>Who writes the answer, directly</b>",
        "subtitle": {"text": f"right label minus {words(result.against)}, in logits; {total.value:.2f} ({total.low:.2f} to {total.high:.2f}) in all, mean of {result.n} episodes"},
    }  # fmt: skip


def _ranked(result: LogitAttribution, rows: Sequence[str], **axes: Any) -> list[Spec]:
    """Parts with their intervals, and the same under the control."""
    at = [result.components.index(row) for row in rows]
    hover = "<b>%{y}</b> %{x:.2f} logits<br>" + INTERVAL + f"<br>n = {result.n}<extra></extra>"
    own = points("its part, 95 % interval", result.value[at], result.low[at], result.high[at], rows, CHOSEN, hover, **axes)
    if np.isnan(result.null[at]).all():
        return [own]
    null = points(
        words(result.control),
        result.null[at],
        result.null_low[at],
        result.null_high[at],
        rows,
        RANDOM,
        "control, " + hover,
        symbol="line-ns",
        **axes,
    )
    null["marker"] |= {"size": 12, "line": {"color": RANDOM, "width": 3}}
    return [null, own]


def _attribution_rows(result: LogitAttribution, rows: Sequence[str]) -> Spec:
    return {
        "data": _ranked(result, rows),
        "layout": {
            "title": _headline(result),
            "height": max(280, 150 + 20 * len(rows)),
            "xaxis": {"title": {"text": "part of the logit difference"}},
            "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False, "ticks": "", "categoryarray": list(rows), "categoryorder": "array"},
            "shapes": [zero_line()],
            "legend": {"y": -0.02, "yref": "container", "yanchor": "bottom"},
            "margin": {"b": 96},
        },
    }  # fmt: skip


def head_table(result: LogitAttribution) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """Parts as a table: index of the component in each cell [layer, head or MLP] (-1: none), their values (NaN), row names and column names."""
    heads = [tuple(int(k) for k in one.split(".")) for one in result.components if "." in one]
    mlps = [int(one[4:]) for one in result.components if one.startswith("mlp ")]
    n_layers, n_heads = max(layer for layer, _ in heads) + 1, max(head for _, head in heads) + 1
    columns = [*(str(h) for h in range(n_heads)), *(["MLP"] if mlps else [])]
    index = np.full((n_layers, len(columns)), -1)
    for layer, head in heads:
        index[layer, head] = result.components.index(f"{layer}.{head}")
    for layer in mlps:
        index[layer, -1] = result.components.index(f"mlp {layer}")
    return index, np.where(index >= 0, result.value[index], np.nan), [str(layer) for layer in range(n_layers)], columns


def _attribution_heads(result: LogitAttribution, top: int) -> Spec:
    index, table, rows, columns = head_table(result)
    half = symmetric(table, 0.1)
    pick = lambda x: np.where(index >= 0, x[index], np.nan)  # noqa: E731
    grid: Spec = {
        "type": "heatmap", "z": table, "x": columns, "y": rows, "coloraxis": "coloraxis", "xgap": 2, "ygap": 2, "hoverongaps": False, "name": "parts",
        "customdata": extra(pick(result.low), pick(result.high), pick(result.null)),
        "hovertemplate": f"<b>layer %{{y}}, %{{x}}</b> %{{z:.2f}} logits<br>{INTERVAL}<br>{words(result.control)}: %{{customdata[2]:.2f}}<br>n = {result.n}<extra></extra>",
    }  # fmt: skip
    if len(columns) <= 14 and len(rows) <= 24:
        grid |= {"texttemplate": "%{z:.2f}", "textfont": {"size": 11}}
    best = result.top(top)
    height = max(340, 190 + 22 * len(best), 190 + min(34, 900 // len(rows)) * len(rows))
    ranked = _ranked(result, best, xaxis="x2", yaxis="y2")
    return {
        "data": [grid, *ranked],
        "layout": {
            "title": _headline(result),
            "height": height,
            "xaxis": {"domain": [0, 0.53], "title": {"text": "head"}, "type": "category", "showgrid": False, "ticks": ""},
            "yaxis": {"title": {"text": "layer"}, "type": "category", "autorange": "reversed", "showgrid": False, "ticks": ""},
            "xaxis2": {"domain": [0.72, 1], "anchor": "y2", "title": {"text": "largest parts, logits"}, "nticks": 6, "zeroline": True},
            "yaxis2": {"anchor": "x2", "type": "category", "autorange": "reversed", "showgrid": False, "ticks": "", "categoryarray": best, "categoryorder": "array"},
            "coloraxis": {"colorscale": DIVERGING, "cmin": -half, "cmax": half, "cmid": 0, "colorbar": {"x": 0.545, "xanchor": "left"}},
            "legend": {"x": 1, "xanchor": "right", "y": -0.02, "yref": "container", "yanchor": "bottom"},
            "margin": {"b": 96},
            "shapes": [zero_line("x2")],
            "meta": {"scale": "diverging"},
        },
    }  # fmt: skip


def _attribution_spans(result: LogitAttribution, top: int) -> Spec:
    rows = sorted(result.top(top), key=result.components.index)
    at = [result.components.index(row) for row in rows]
    half = symmetric(result.value[at], 0.1)
    grid: Spec = {
        "type": "heatmap", "z": result.value[at], "x": list(result.spans), "y": rows, "coloraxis": "coloraxis", "xgap": 2, "ygap": 2, "name": "parts",
        "customdata": extra(result.low[at], result.high[at], result.null[at]), "text": written(result.value[at], half), "texttemplate": "%{text}", "textfont": {"size": 11},
        "hovertemplate": f"<b>%{{y}} reading %{{x}}</b> %{{z:.2f}} logits<br>{INTERVAL}<br>{words(result.control)}: %{{customdata[2]:.2f}}<br>n = {result.n}<extra></extra>",
    }  # fmt: skip
    title = _headline(result)
    title["text"] = "<b>Who writes the answer, and from which tokens</b>"
    return {
        "data": [grid],
        "layout": {
            "title": title,
            "height": 220 + 26 * len(rows),
            "xaxis": {"side": "top", "showgrid": False, "ticks": "", "tickangle": -30},
            "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False, "ticks": "", "title": {"text": "part"}},
            "margin": {"t": 164, "b": 20},
            "coloraxis": {"colorscale": DIVERGING, "cmin": -half, "cmax": half, "cmid": 0, "colorbar": {"title": {"text": "logits", "side": "right"}}},
            "meta": {"scale": "diverging"},
        },
    }  # fmt: skip
