"""Figures with a cell per head, as plain plotly dictionaries: score grids, attention by span, attention patterns.

The arrays in a figure are the arrays of the result, untouched; what a reader needs besides (interval, null, p, rank) rides along as `customdata`.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np

from mechicl.errors import HeadIndexError, OptionError
from mechicl.results import Head, HeadScores, RoleAttention, Score
from mechicl.views.theme import CHOSEN, DIVERGING, RANDOM, SEQUENTIAL
from mechicl.views.words import ALPHA, Spec, name, significant, words

_FLOOR = 0.1  # half-width below which the colours of a probability would make noise look like structure


def ranks(score: Score) -> np.ndarray:
    """[layer, head] rank by value, 1 = highest; 0 for a head without a pattern."""
    out = np.zeros(score.value.shape, dtype=int)
    for rank, head in enumerate(score.top(score.value.size), start=1):
        out[head] = rank
    return out


def colour_range(scores: Sequence[Score]) -> float:
    """Half-width of a zero-centred colour scale: the largest score or null, but not so small that noise fills the scale."""
    values = np.concatenate([np.abs(np.concatenate([s.value.ravel(), s.null_high.ravel()])) for s in scores])
    finite = values[np.isfinite(values)]
    top = float(finite.max()) if finite.size else 0.0
    floor = _FLOOR if all(s.unit.startswith("prob") for s in scores) else 0.0
    return max(top, floor) or 1.0


def _cells(score: Score, *, x: str = "x", y: str = "y", text: bool = True, size: int = 12) -> list[Spec]:
    """The heat map of one score and the dots on its significant heads."""
    extra = np.stack([score.low, score.high, score.null, score.null_high, score.p, score.p_corrected, ranks(score).astype(float)], axis=-1)
    count = int(np.isfinite(score.value).sum())
    hover = (
        "<b>head %{y}.%{x}</b>  rank %{customdata[6]:.0f} of " + str(count) + "<br>"
        f"{words(score.name)} %{{z:.3f}} {words(score.unit)}<br>95 % interval %{{customdata[0]:.3f}} to %{{customdata[1]:.3f}}<br>"
        "null %{customdata[2]:.3f}, its 97.5 % quantile %{customdata[3]:.3f}<br>p %{customdata[4]:.2g}, corrected %{customdata[5]:.2g}<extra></extra>"
    )
    grid: Spec = {
        "type": "heatmap", "z": score.value, "customdata": extra, "hovertemplate": hover, "hoverongaps": False, "coloraxis": "coloraxis", "xgap": 2, "ygap": 2,
        "xaxis": x, "yaxis": y, "name": words(score.name),
    }  # fmt: skip
    if text and max(score.value.shape) <= 16:
        grid |= {"texttemplate": "%{z:.2f}", "textfont": {"size": size}}
    marked = significant(score)
    dots: Spec = {
        "type": "scatter", "mode": "markers", "x": [h + 0.38 for _, h in marked], "y": [l - 0.34 for l, _ in marked], "hoverinfo": "skip", "showlegend": False,
        "marker": {"symbol": "circle", "size": 6, "color": "#111111", "line": {"color": "#ffffff", "width": 1.5}}, "cliponaxis": False, "xaxis": x, "yaxis": y,
        "name": "above its null",
    }  # fmt: skip
    return [grid, dots]


def _ticks(n: int) -> list[int]:
    """At most about a dozen ticks on an axis of n cells."""
    step = next(s for s in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 10_000) if n / s <= 16)
    return list(range(0, n, step))


def _head_axes(shape: tuple[int, ...], *, x_title: str = "head", y_title: str = "layer") -> tuple[Spec, Spec]:
    layers, heads = shape[0], shape[1]
    common = {"showgrid": False, "zeroline": False, "ticks": ""}
    x = common | {"title": {"text": x_title}, "tickvals": _ticks(heads), "range": [-0.5, heads - 0.5]}
    y = common | {"title": {"text": y_title}, "tickvals": _ticks(layers), "range": [layers - 0.5, -0.5]}
    return x, y


def _groups(
    shape: tuple[int, ...], n_key_value_heads: int | None, *, x: str = "x", y: str = "y", labels: bool = True, pixels: int = 200
) -> tuple[list[Spec], list[Spec]]:
    """Separators between heads that share keys and values, and a bracket over each group (`pixels`: the grid's height)."""
    heads = shape[1]
    if not n_key_value_heads or n_key_value_heads >= heads or heads % n_key_value_heads:
        return [], []
    each = heads // n_key_value_heads
    shapes: list[Spec] = [
        {
            "type": "line",
            "xref": x,
            "yref": f"{y} domain",
            "x0": k * each - 0.5,
            "x1": k * each - 0.5,
            "y0": 0,
            "y1": 1,
            "line": {"color": RANDOM, "width": 2},
        }
        for k in range(1, n_key_value_heads)
    ]
    if not labels or n_key_value_heads > 16:
        return shapes, []
    notes: list[Spec] = []
    for k in range(n_key_value_heads):
        left, right = k * each - 0.42, (k + 1) * each - 0.58
        shapes.append(
            {
                "type": "line",
                "xref": x,
                "yref": f"{y} domain",
                "x0": left,
                "x1": right,
                "y0": 1 + 6 / pixels,
                "y1": 1 + 6 / pixels,
                "line": {"color": RANDOM, "width": 2},
            }
        )
        text = f"KV {k}" if n_key_value_heads <= 8 else str(k)
        notes.append(
            {
                "xref": x,
                "yref": f"{y} domain",
                "x": (left + right) / 2,
                "y": 1 + 7 / pixels,
                "yanchor": "bottom",
                "text": text,
                "showarrow": False,
            }
        )
    return shapes, notes


def score_grid(score: Score, *, n_key_value_heads: int | None = None, top: int | None = None) -> Spec:
    """One score: every head as a cell on the left, the top heads with interval and null on the right.

    Args:
        score: The score; heads without a pattern (NaN) stay empty.
        n_key_value_heads: Groups of heads that share keys and values are bracketed when there are fewer of these than heads.
        top: How many heads to rank on the right; by default as many as fit.
    """
    n = int(score.per_episode.shape[0])
    marked, ranked = significant(score), score.top(top or max(12, min(30, score.value.shape[0])))
    half = colour_range([score])
    x, y = _head_axes(score.value.shape)
    height = max(300, 168 + min(40, 900 // score.value.shape[0]) * score.value.shape[0], 170 + 22 * len(ranked))
    shapes, notes = _groups(score.value.shape, n_key_value_heads, pixels=height - 184)
    values = np.array([score.value[h] for h in ranked])
    bars: Spec = {
        "type": "scatter", "mode": "markers", "x": values, "y": [name(h) for h in ranked], "xaxis": "x2", "yaxis": "y2", "name": "score, 95 % interval",
        "error_x": {"type": "data", "symmetric": False, "array": np.array([score.high[h] for h in ranked]) - values,
                    "arrayminus": values - np.array([score.low[h] for h in ranked]), "thickness": 1.6, "width": 4, "color": CHOSEN},
        "marker": {"color": [CHOSEN if h in marked else "rgba(0,0,0,0)" for h in ranked], "size": 9, "line": {"color": CHOSEN, "width": 2}},
        "hovertemplate": "<b>head %{y}</b><br>%{x:.3f}<extra></extra>",
    }  # fmt: skip
    null: Spec = {
        "type": "scatter", "mode": "markers", "x": np.array([score.null_high[h] for h in ranked]), "y": [name(h) for h in ranked], "xaxis": "x2", "yaxis": "y2",
        "name": f"97.5 % of the null ({words(score.null_name)})", "marker": {"symbol": "line-ns", "size": 13, "line": {"color": RANDOM, "width": 3}},
        "hovertemplate": "null of head %{y}<br>97.5 % quantile %{x:.3f}<extra></extra>",
    }  # fmt: skip
    return {
        "data": [*_cells(score), null, bars],
        "layout": {
            "title": {
                "text": f"<b>{words(score.name)}</b> of every head",
                "subtitle": {"text": f"{words(score.unit)}, mean of {n} episodes · dot: above its null, Holm p < {ALPHA} ({len(marked)} of {int(np.isfinite(score.value).sum())} heads)"},
            },
            "height": height,
            "margin": {"t": 100 if notes else 84, "b": 84},
            "xaxis": x | {"domain": [0, 0.56]},
            "yaxis": y,
            "xaxis2": {"domain": [0.72, 1], "title": {"text": f"{words(score.name)}, {words(score.unit)}"}, "zeroline": True, "anchor": "y2", "rangemode": "tozero", "nticks": 6},
            "yaxis2": {"anchor": "x2", "type": "category", "autorange": "reversed", "showgrid": False, "ticks": "", "ticklabelstandoff": 8, "title": {"text": "top heads"}},
            "coloraxis": {"colorscale": DIVERGING, "cmin": -half, "cmax": half, "cmid": 0, "colorbar": {"x": 0.575, "xanchor": "left", "len": 1, "lenmode": "fraction"}},
            "legend": {"x": 1, "xanchor": "right", "y": -0.02, "yref": "container", "yanchor": "bottom"},
            "shapes": shapes,
            "annotations": notes,
            "meta": {"scale": "diverging"},
        },
    }  # fmt: skip


def score_grids(result: HeadScores, *, columns: int = 3) -> Spec:
    """All scores side by side on one colour scale per unit (each unit its own scale is not needed: scores share a unit, or are told apart by name)."""
    names = list(result.scores)
    if not names:
        raise OptionError("scores must be non-empty; got none. Score the heads first.")
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    half = colour_range(list(result.scores.values()))
    layers, heads = result.scores[names[0]].value.shape
    data: list[Spec] = []
    layout: Spec = {}
    notes: list[Spec] = []
    shapes: list[Spec] = []
    wide, tall = 1 / columns, 1 / rows
    for k, key in enumerate(names):
        col, row = k % columns, k // columns
        sx, sy = ("x", "y") if k == 0 else (f"x{k + 1}", f"y{k + 1}")
        data += _cells(result.scores[key], x=sx, y=sy, size=10)
        x, y = _head_axes(
            (layers, heads), x_title="head" if row == rows - 1 or k + columns >= len(names) else "", y_title="layer" if col == 0 else ""
        )
        left, top = col * wide, 1 - row * tall
        layout["xaxis" + sx[1:]] = x | {"domain": [left + 0.02, left + wide - 0.025], "anchor": sy}
        layout["yaxis" + sy[1:]] = y | {"domain": [top - tall + 0.16 * tall, top - 0.12 * tall], "anchor": sx}
        n_sig = len(significant(result.scores[key]))
        notes.append({"xref": f"{sx} domain", "yref": f"{sy} domain", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom", "showarrow": False,
                      "text": f"<b>{words(key)}</b>  {n_sig}/{layers * heads}", "font": {"size": 13}})  # fmt: skip
        shapes += _groups((layers, heads), result.n_key_value_heads, x=sx, y=sy, labels=False)[0]
    layout |= {
        "title": {"text": "<b>Head scores</b>, every score on one scale",
                  "subtitle": {"text": f"mean of {result.n} episodes · dot, and the count: heads above their null, Holm p < {ALPHA} over the {layers * heads} heads of a score"}},
        "height": 110 + rows * max(170, min(30 * layers + 70, 480)),
        "coloraxis": {"colorscale": DIVERGING, "cmin": -half, "cmax": half, "cmid": 0, "colorbar": {"len": min(1.0, 0.5 + 0.5 / rows)}},
        "annotations": notes, "shapes": shapes, "showlegend": False, "meta": {"scale": "diverging"},
    }  # fmt: skip
    return {"data": data, "layout": layout}


def role_grid(result: RoleAttention, *, heads: Sequence[Head] | None = None, limit: int = 40) -> Spec:
    """Attention of the query's last token, a row per head and a column per kind of span.

    Args:
        result: The attention by span.
        heads: Rows, top to bottom; by default all heads, or the `limit` with most attention off the template's glue and the sink.
    """
    layers, n_heads, _ = result.value.shape
    everyone = [(l, h) for l in range(layers) for h in range(n_heads)]
    note = "all heads"
    if heads is None:
        heads = [h for h in everyone if np.isfinite(result.value[h]).all()]
        if len(heads) > limit:
            keep = [k for k, s in enumerate(result.spans) if s not in ("sink", "glue", "instruction", "other")]
            busiest = sorted(heads, key=lambda h: -float(result.value[h][keep].sum()))[:limit]
            heads, note = sorted(busiest), f"the {limit} of {len(heads)} heads with most attention on examples and query (all in the CSV)"
    else:
        unknown = [h for h in heads if h not in everyone]
        if unknown:
            raise HeadIndexError(f"heads must be (layer, head) of a {layers} x {n_heads} model; got {unknown[0]}. Count both from 0.")
        note = f"{len(heads)} chosen heads"
    at = tuple(np.array(list(heads), dtype=int).reshape(-1, 2).T)
    hover = "<b>head %{y}</b> onto %{x}<br>%{z:.3f} of its attention<br>95 % interval %{customdata[0]:.3f} to %{customdata[1]:.3f}<extra></extra>"
    grid: Spec = {
        "type": "heatmap", "z": result.value[at], "x": list(result.spans), "y": [name(h) for h in heads], "coloraxis": "coloraxis", "xgap": 2, "ygap": 2,
        "customdata": np.stack([result.low[at], result.high[at]], axis=-1), "hovertemplate": hover, "hoverongaps": False,
    }  # fmt: skip
    if len(heads) <= 40:
        grid |= {"texttemplate": "%{z:.2f}", "textfont": {"size": 11}}
    return {
        "data": [grid],
        "layout": {
            "title": {"text": "<b>Where the query's last token looks</b>", "subtitle": {"text": f"share of a head's attention on each kind of token, mean of {result.n} episodes · {note}"}},
            "height": 170 + max(22, min(30, 600 // max(1, len(heads)))) * len(heads),
            "xaxis": {"side": "top", "showgrid": False, "ticks": "", "tickangle": -30 if len(result.spans) > 7 else 0},
            "yaxis": {"autorange": "reversed", "type": "category", "showgrid": False, "ticks": "", "title": {"text": "layer.head"}},
            "margin": {"t": 128, "b": 20},
            "coloraxis": {"colorscale": SEQUENTIAL, "cmin": 0, "cmax": 1, "colorbar": {"title": {"text": "attention", "side": "right"}}},
            "meta": {"scale": "sequential"},
        },
    }  # fmt: skip


def pattern_grid(
    pattern: np.ndarray,
    tokens: Sequence[str],
    *,
    head: Head,
    positions: Sequence[int] | None = None,
    hover: Mapping[int, str] | None = None,
) -> Spec:
    """One head's attention pattern as a heat map: for prompts too long for the token view.

    Args:
        pattern: [dest, src], rows sum to one.
        tokens: [pos] as text.
        head: Its name on the figure.
        positions: Positions to draw, in order; all by default.
        hover: Extra words for a position, e.g. its role.
    """
    at = np.arange(len(tokens)) if positions is None else np.asarray(positions, dtype=int)
    part = np.asarray(pattern)[np.ix_(at, at)]
    z = np.where(at[None, :] > at[:, None], np.nan, part)
    labels = [html.escape(f"{p} {tokens[p]}" + (f" ({hover[p]})" if hover and p in hover else ""), quote=False) for p in at.tolist()]
    cut = "" if len(at) == len(tokens) else f" · {len(at)} of {len(tokens)} tokens drawn"
    return {
        "data": [{"type": "heatmap", "z": z.astype(np.float32), "coloraxis": "coloraxis", "hoverongaps": False, "x": list(range(len(at))),
                  "y": list(range(len(at))), "hovertemplate": "from %{y}<br>to %{x}<br>%{z:.3f}<extra></extra>"}],
        "layout": {
            "title": {"text": f"<b>Attention pattern of head {name(head)}</b>", "subtitle": {"text": f"row: token that reads, column: token that is read{cut}"}},
            "height": 620,
            "xaxis": {"showgrid": False, "zeroline": False, "tickvals": _ticks(len(at)), "ticktext": [labels[k] for k in _ticks(len(at))], "tickangle": -45},
            "yaxis": {"showgrid": False, "zeroline": False, "autorange": "reversed", "tickvals": _ticks(len(at)), "ticktext": [labels[k] for k in _ticks(len(at))]},
            "coloraxis": {"colorscale": SEQUENTIAL, "cmin": 0, "cmax": 1},
            "meta": {"scale": "sequential"},
        },
    }  # fmt: skip
