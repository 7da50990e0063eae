"""Figures of head circuits, as plain plotly dictionaries: copying scores beside random matrices, and which parts of query and key match.

The arrays in a figure are the arrays of the result, untouched; interval and null ride along as `customdata`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mechicl.errors import HeadIndexError, OptionError
from mechicl.results import Copying, Head, HeadCircuits, QKMatch
from mechicl.views.marks import INTERVAL, axis_of, corners, extra, symmetric, written
from mechicl.views.theme import CHANCE, CHOSEN, DIVERGING, INTACT, RANDOM
from mechicl.views.words import Spec, name, words


def copying_figure(result: HeadCircuits) -> Spec:
    """Copying scores: each head, random matrices of its shape, and other heads of the model."""
    if result.copying is None:
        raise OptionError(
            "result must have copying scores to draw; got none (the model has no token embedding). Draw result.matches[head]."
        )
    rows = [name(head) for head in result.heads]
    data = _copying_rows(result.copying, rows, f"over {result.copying.tokens:,} tokens", INTACT, "circle")
    if result.label_copying is not None:
        label = result.label_copying
        data.append({
            "type": "scatter", "mode": "markers", "x": label.value, "y": rows, "name": f"over the {label.tokens} label tokens",
            "marker": {"color": CHOSEN, "symbol": "diamond-open", "size": 11, "line": {"width": 2}}, "customdata": extra(label.null_low, label.null_high, label.p_corrected),
            "hovertemplate": "<b>head %{y}</b>, labels only<br>%{x:.2f} of the eigenvalues' mass is positive<br>random: %{customdata[0]:.2f} to %{customdata[1]:.2f}, corrected p %{customdata[2]:.2g}<extra></extra>",
        })  # fmt: skip
    others = result.copying.others
    if len(others):
        data.append({
            "type": "scatter", "mode": "markers", "x": others, "y": ["other heads"] * len(others), "name": f"{len(others)} other heads", "hovertemplate": "%{x:.2f}<extra></extra>",
            "marker": {"color": RANDOM, "symbol": "line-ns", "size": 13, "line": {"color": RANDOM, "width": 1.6}},
        })  # fmt: skip
    order = [*rows, *(["other heads"] if len(others) else [])]
    folded = "norm weights folded in" if result.folded else "norm weights left out"
    return {
        "data": data,
        "layout": {
            "title": {"text": "<b>Do these heads copy?</b> The OV circuit's eigenvalues", "subtitle": {"text": f"share of their mass that is positive; grey bar: central 95 % of random matrices of the head's shape · {folded}"}},
            "height": max(300, 190 + 30 * len(order)),
            "xaxis": {"range": [-0.03, 1.03], "title": {"text": "positive share (1: raises what it reads, 0: lowers it)"}},
            "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False, "ticks": "", "categoryarray": order, "categoryorder": "array", "title": {"text": "head"}},
            "shapes": [{"type": "line", "x0": 0.5, "x1": 0.5, "y0": 0, "y1": 1, "yref": "paper", "line": {"color": CHANCE, "width": 1.4, "dash": "dot"}}],
            "legend": {"y": -0.02, "yref": "container", "yanchor": "bottom"},
            "margin": {"b": 104},
        },
    }  # fmt: skip


def _copying_rows(copying: Copying, rows: Sequence[str], label: str, colour: str, symbol: str) -> list[Spec]:
    bars: Spec = {
        "type": "bar", "orientation": "h", "x": copying.null_high - copying.null_low, "base": copying.null_low, "y": list(rows), "width": 0.34, "name": "random matrices, 95 %",
        "marker": {"color": "rgba(125,135,147,0.35)"}, "hoverinfo": "skip",
    }  # fmt: skip
    points: Spec = {
        "type": "scatter", "mode": "markers", "x": copying.value, "y": list(rows), "name": label, "marker": {"color": colour, "symbol": symbol, "size": 11},
        "customdata": extra(copying.null_low, copying.null_high, copying.p_corrected, copying.ratio),
        "hovertemplate": "<b>head %{y}</b><br>%{x:.2f} of the eigenvalues' mass is positive<br>sum over sum of sizes %{customdata[3]:.2f}<br>random: %{customdata[0]:.2f} to %{customdata[1]:.2f}, corrected p %{customdata[2]:.2g}<extra></extra>",
    }  # fmt: skip
    return [bars, points]


def match_figure(match: QKMatch, *, n: int | None = None) -> Spec:
    """Why one head's score is higher on right exemplars: the query's part down, the key's part across; dots where outside its null."""
    half = symmetric(match.value, 0.05)
    n = len(match.per_episode) if n is None else n
    hover = (
        f"<b>query from %{{y}}, key from %{{x}}</b><br>%{{z:.2f}} of the score difference<br>{INTERVAL}<br>right and wrong dealt anew: "
        f"%{{customdata[2]:.2f}} to %{{customdata[3]:.2f}}<br>n = {n}<extra></extra>"
    )
    grid: Spec = {
        "type": "heatmap", "z": match.value, "coloraxis": "coloraxis", "xgap": 1.5, "ygap": 1.5, "name": "match",
        "customdata": extra(match.low, match.high, match.null_low, match.null_high), "hovertemplate": hover,
    }  # fmt: skip
    if max(match.value.shape) <= 18:
        grid |= {"text": written(match.value, half), "texttemplate": "%{text}", "textfont": {"size": 10}}
    outside = ((match.value > match.null_high) & (match.low > 0)) | ((match.value < match.null_low) & (match.high < 0))
    dots = corners(np.argwhere(outside & (np.abs(match.value) > 0.05 * half)), "outside its null")
    total = match.total
    return {
        "data": [grid, dots],
        "layout": {
            "title": {
                "text": f"<b>What head {name(match.head)} matches</b>: its score on right minus wrong exemplars",
                "subtitle": {"text": f"keys at the exemplars' {words(match.keys)}; {total.value:.2f} ({total.low:.2f} to {total.high:.2f}) in all, mean of {n} episodes · dot: outside its null, interval off zero (not shown below 5 % of the largest)"},
            },
            "height": 220 + max(20, min(28, 640 // len(match.queries))) * len(match.queries),
            "xaxis": axis_of(match.senders, tickangle=-45 if len(match.senders) > 12 else 0, title={"text": "what wrote into the key's stream"}),
            "yaxis": axis_of(match.queries, down=True, title={"text": "what wrote into the query's stream"}),
            "coloraxis": {"colorscale": DIVERGING, "cmin": -half, "cmax": half, "cmid": 0, "colorbar": {"title": {"text": "score", "side": "right"}}},
            "margin": {"b": 84},
            "meta": {"scale": "diverging"},
        },
    }  # fmt: skip


def circuits_figure(result: HeadCircuits, *, head: Head | None = None) -> Spec:
    """Copying scores of all heads, or one head's QK table.

    Raises:
        HeadIndexError: no table was made for that head.
    """
    if head is None:
        return copying_figure(result) if result.copying is not None else match_figure(next(iter(result.matches.values())))
    if head not in result.matches:
        raise HeadIndexError(
            f"head must be one whose scores were taken apart; got {head}, there are {sorted(result.matches)}. Ask for it with data."
        )
    return match_figure(result.matches[head])
