"""Figures of single edges, as plain plotly dictionaries: what every sender brings to every receiver, by path patching or by gradient."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mechicl.results import EdgeScores, PathEffects, Receiver, Sender
from mechicl.views.panels import Panel, pack
from mechicl.views.patching import agreement_panel, colours, start_of
from mechicl.views.theme import RANDOM
from mechicl.views.words import ALPHA, Spec, metric_words, words

MOST_ROWS, MOST_COLUMNS = 48, 72
"""Beyond these, only the senders and receivers of the strongest edges are drawn."""


def edge_grid(result: PathEffects | EdgeScores) -> Spec:
    """Senders as rows, receivers as columns, in the order of execution; empty where no edge can exist. With its agreement with exact runs where there is one."""
    start = start_of(result.direction) if isinstance(result, PathEffects) else 0.0
    rows, columns = _strongest(np.abs(np.asarray(result.value) - start))
    senders, receivers = [result.senders[i] for i in rows], [result.receivers[j] for j in columns]
    panel = _matrix(result, np.ix_(rows, columns), senders, receivers)
    agreement = result.agreement if isinstance(result, EdgeScores) else None
    spec = pack([panel, *([agreement_panel(agreement, "gradient")] if agreement is not None else [])], 1)
    drawn = "" if len(rows) == len(result.senders) and len(columns) == len(result.receivers) else f" · {len(rows)} of {len(result.senders)} senders and {len(columns)} of {len(result.receivers)} receivers, those of the strongest edges (all in the CSV)"  # fmt: skip
    way = {"denoise": "clean outputs put into the corrupt run", "noise": "corrupt outputs put into the clean run"}[result.direction]
    if isinstance(result, PathEffects):
        title = "<b>What each edge carries</b> (path patching)"
        detail = f"{way}, one edge at a time; at {words(result.places)}; n = {result.n} pairs ({words(result.pairs)}) · dot: corrected p < {ALPHA}"
    else:
        title = f"<b>What each edge carries</b> ({result.method})"
        detail = f"share of the clean-corrupt difference, {metric_words(result.metric)}, n = {result.n} pairs ({words(result.pairs)})"
    scale = colours([np.asarray(result.value)], start)
    if isinstance(result, EdgeScores):
        scale["colorbar"] |= {"tickvals": None, "ticktext": None}
    spec["layout"] |= {"title": {"text": title, "subtitle": {"text": detail + drawn}}, "coloraxis": scale, "meta": {"scale": "diverging"}}
    spec["layout"]["margin"] |= {"r": 96, "l": 76}
    if agreement is not None:  # the scatter is square enough without the width of the matrix
        spec["layout"]["xaxis2"]["domain"] = [0, 0.5]
    return spec


def _strongest(size: np.ndarray) -> tuple[list[int], list[int]]:
    """Rows and columns to draw, in order: all where they fit, else those of the strongest edges until one of the two is full."""
    rows, columns = size.shape
    if rows <= MOST_ROWS and columns <= MOST_COLUMNS:
        return list(range(rows)), list(range(columns))
    kept_rows: set[int] = set()
    kept_columns: set[int] = set()
    for flat in np.argsort(-np.nan_to_num(size, nan=-1.0).ravel(), kind="stable"):
        i, j = divmod(int(flat), columns)
        if len(kept_rows | {i}) > MOST_ROWS or len(kept_columns | {j}) > MOST_COLUMNS or np.isnan(size[i, j]):
            break
        kept_rows.add(i)
        kept_columns.add(j)
    return sorted(kept_rows), sorted(kept_columns)


def _matrix(
    result: PathEffects | EdgeScores, at: tuple[np.ndarray, ...], senders: Sequence[Sender], receivers: Sequence[Receiver]
) -> Panel:
    """The heat map with its dots, and lines between layers."""
    parts = [np.asarray(result.low)[at], np.asarray(result.high)[at]]
    hover = "<b>%{y} \u2192 %{x}</b><br>%{z:.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f})"
    marks: Spec | None = None
    if isinstance(result, PathEffects):
        parts += [np.asarray(result.p)[at], np.asarray(result.p_corrected)[at], np.asarray(result.raw).mean(0)[at]]
        hover += f"<br>p %{{customdata[2]:.2g}}, corrected %{{customdata[3]:.2g}}<br>raw mean %{{customdata[4]:.3f}} {words(result.unit)}"
        found = np.argwhere(np.nan_to_num(parts[3], nan=1.0) < ALPHA)
        marks = {"type": "scatter", "mode": "markers", "x": [int(c) for _, c in found], "y": [int(r) - 0.3 for r, _ in found], "hoverinfo": "skip", "showlegend": False,
                 "marker": {"symbol": "circle", "size": 5, "color": "#111111", "line": {"color": "#ffffff", "width": 1.2}}, "name": "corrected p < 0.05"}  # fmt: skip
    cells: Spec = {"type": "heatmap", "z": np.asarray(result.value)[at], "customdata": np.stack(parts, axis=-1), "hovertemplate": hover + f", n = {result.n}<extra></extra>", "hoverongaps": False,
                   "coloraxis": "coloraxis", "xgap": 1, "ygap": 1, "name": "edges"}  # fmt: skip
    lines = [_rule("y", i) for i in _breaks([s.layer for s in senders])] + [_rule("x", j) for j in _breaks([r.layer for r in receivers])]
    common = {"showgrid": False, "zeroline": False, "ticks": ""}
    x = common | {"tickvals": list(range(len(receivers))), "ticktext": [r.name for r in receivers], "range": [-0.5, len(receivers) - 0.5], "side": "top", "tickangle": -90,
                  "tickfont": {"size": 11 if len(receivers) <= 48 else 9}}  # fmt: skip
    y = common | {"tickvals": list(range(len(senders))), "ticktext": [s.name for s in senders], "range": [len(senders) - 0.5, -0.5], "title": {"text": "sender"},
                  "tickfont": {"size": 11}}  # fmt: skip
    return Panel([cells, *([marks] if marks else [])], x, y, "receiver", max(120, 17 * len(senders)), 84, 16, shapes=lines)


def _breaks(layers: Sequence[int]) -> list[float]:
    """Where the layer changes, between two cells."""
    return [k + 0.5 for k in range(len(layers) - 1) if layers[k] != layers[k + 1]]


def _rule(axis: str, at: float) -> Spec:
    """A thin line between two layers, across the matrix."""
    line: Spec = {"type": "line", "line": {"color": RANDOM, "width": 1}, "layer": "above"}
    across = (
        {"x0": 0, "x1": 1, "y0": at, "y1": at, "xref": "x domain"}
        if axis == "y"
        else {"x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "y domain"}
    )
    return line | across
