"""Figures of reading out, as plain plotly dictionaries: who writes the answer, what the stream says after each layer, what heads copy and match.

The arrays in a figure are the arrays of the result, untouched; interval, null and n ride along as `customdata`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mechicl.errors import HeadIndexError, OptionError
from mechicl.results import Copying, Head, HeadCircuits, LogitAttribution, LogitLens, PromptLens, QKMatch
from mechicl.views.grids import ALPHA, Spec, name, words
from mechicl.views.theme import CHANCE, CHOSEN, DIVERGING, INTACT, RANDOM, SEQUENTIAL

_INTERVAL = "95 % interval %{customdata[0]:.2f} to %{customdata[1]:.2f}"


def _symmetric(values: np.ndarray, least: float = 0.0) -> float:
    """Half-width of a colour scale centred on zero."""
    finite = np.abs(values[np.isfinite(values)])
    return max(float(finite.max(initial=0.0)), least) or 1.0


def _extra(*arrays: np.ndarray) -> np.ndarray:
    return np.stack(arrays, -1)


def _points(label: str, x: np.ndarray, low: np.ndarray, high: np.ndarray, y: Sequence[Any], colour: str, hover: str, **more: Any) -> Spec:
    """Points with intervals along x."""
    return {
        "type": "scatter", "mode": "markers", "name": label, "x": x, "y": list(y), "customdata": _extra(low, high),
        "error_x": {"type": "data", "symmetric": False, "array": high - x, "arrayminus": x - low, "color": colour, "thickness": 1.6, "width": 4},
        "marker": {"color": colour, "size": 9, "symbol": more.pop("symbol", "circle"), "line": {"color": colour, "width": 1.5}}, "hovertemplate": hover, **more,
    }  # fmt: skip


def _axis(labels: Sequence[str], **more: Any) -> Spec:
    """An axis of words at 0, 1, 2, ..., so that marks can stand in the corners of cells."""
    edge = [-0.5, len(labels) - 0.5]
    return {
        "tickvals": list(range(len(labels))), "ticktext": list(labels), "range": edge[::-1] if more.pop("down", False) else edge, "showgrid": False, "zeroline": False, "ticks": "", **more,
    }  # fmt: skip


def _corners(cells: np.ndarray, label: str) -> Spec:
    """Dots in the corners of the cells [n, (row, column)]."""
    return {
        "type": "scatter", "mode": "markers", "x": [j + 0.38 for _, j in cells], "y": [i - 0.32 for i, _ in cells], "hoverinfo": "skip", "showlegend": False, "name": label,
        "marker": {"symbol": "circle", "size": 6, "color": "#111111", "line": {"color": "#ffffff", "width": 1.2}},
    }  # fmt: skip


def _written(z: np.ndarray, half: float) -> list[list[str]]:
    """Numbers to be written into cells; those that would read as nothing are left out (they stay on hover)."""
    return [[f"{v:.2f}" if np.isfinite(v) and abs(v) > 0.01 * half else "" for v in row] for row in z]


def _zero(axis: str = "x") -> Spec:
    return {"type": "line", "xref": axis, "yref": "paper", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "line": {"color": RANDOM, "width": 1}}


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
    hover = "<b>%{y}</b> %{x:.2f} logits<br>" + _INTERVAL + f"<br>n = {result.n}<extra></extra>"
    own = _points("its part, 95 % interval", result.value[at], result.low[at], result.high[at], rows, CHOSEN, hover, **axes)
    if np.isnan(result.null[at]).all():
        return [own]
    null = _points(
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
            "shapes": [_zero()],
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
    half = _symmetric(table, 0.1)
    pick = lambda x: np.where(index >= 0, x[index], np.nan)  # noqa: E731
    grid: Spec = {
        "type": "heatmap", "z": table, "x": columns, "y": rows, "coloraxis": "coloraxis", "xgap": 2, "ygap": 2, "hoverongaps": False, "name": "parts",
        "customdata": _extra(pick(result.low), pick(result.high), pick(result.null)),
        "hovertemplate": f"<b>layer %{{y}}, %{{x}}</b> %{{z:.2f}} logits<br>{_INTERVAL}<br>{words(result.control)}: %{{customdata[2]:.2f}}<br>n = {result.n}<extra></extra>",
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
            "shapes": [_zero("x2")],
            "meta": {"scale": "diverging"},
        },
    }  # fmt: skip


def _attribution_spans(result: LogitAttribution, top: int) -> Spec:
    rows = sorted(result.top(top), key=result.components.index)
    at = [result.components.index(row) for row in rows]
    half = _symmetric(result.value[at], 0.1)
    grid: Spec = {
        "type": "heatmap", "z": result.value[at], "x": list(result.spans), "y": rows, "coloraxis": "coloraxis", "xgap": 2, "ygap": 2, "name": "parts",
        "customdata": _extra(result.low[at], result.high[at], result.null[at]), "text": _written(result.value[at], half), "texttemplate": "%{text}", "textfont": {"size": 11},
        "hovertemplate": f"<b>%{{y}} reading %{{x}}</b> %{{z:.2f}} logits<br>{_INTERVAL}<br>{words(result.control)}: %{{customdata[2]:.2f}}<br>n = {result.n}<extra></extra>",
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


_LENS = {
    "margin": "right label minus best wrong one, logits",
    "logprob": "log-probability of the right label, nats (paper: the null's mean)",
    "rank": "rank of the right label in the vocabulary (1 = first)",
}


def _after(layer: int) -> str:
    """A layer as it is named on an axis."""
    return "embed" if layer < 0 else str(layer)


def lens_figure(result: LogitLens) -> Spec:
    """What the stream says after each layer: a table over kinds of tokens, and the last token with its null."""
    rows = [_after(layer) for layer in result.layers]
    margin, rank = result.of == "margin", result.of == "rank"
    shift = 0.0 if margin else float(np.nanmean(result.null))
    half = _symmetric(result.value - shift, 0.1)
    hover = (
        f"<b>after layer %{{y}}, %{{x}}</b><br>%{{z:.2f}} {result.unit}<br>{_INTERVAL}<br>any candidate as right: %{{customdata[2]:.2f}} "
        f"(%{{customdata[3]:.2f}} to %{{customdata[4]:.2f}})<br>corrected p %{{customdata[5]:.2g}}, n = {result.n}<extra></extra>"
    )
    grid: Spec = {
        "type": "heatmap", "z": result.value, "coloraxis": "coloraxis", "xgap": 2, "ygap": 2, "hoverongaps": False,
        "customdata": _extra(result.low, result.high, result.null, result.null_low, result.null_high, result.p_corrected), "hovertemplate": hover, "name": "lens",
    }  # fmt: skip
    if len(rows) <= 40 and len(result.spans) <= 16:
        grid |= {"texttemplate": "%{z:.0f}" if rank else "%{z:.1f}", "textfont": {"size": 10.5}}
    marked = np.argwhere(np.nan_to_num(result.p_corrected, nan=1.0) < ALPHA)
    dots = _corners(marked, "better than any candidate")
    side = "last token" if "last token" in result.spans else list(result.spans)[-1]
    j = result.spans.index(side)
    line = _points(
        f"{side}, 95 % interval", result.value[:, j], result.low[:, j], result.high[:, j], rows, CHOSEN,
        f"after layer %{{y}}: %{{x:.2f}}<br>{_INTERVAL}<extra></extra>", xaxis="x2", yaxis="y2",
    )  # fmt: skip
    line |= {"mode": "lines+markers", "line": {"color": CHOSEN, "width": 1.6}}
    band: Spec = {
        "type": "scatter", "mode": "lines", "x": np.concatenate([result.null_low[:, j], result.null_high[::-1, j]]), "y": [*rows, *rows[::-1]], "fill": "toself",
        "fillcolor": "rgba(184,74,128,0.18)", "line": {"color": CHANCE, "width": 1, "dash": "dot"}, "hoverinfo": "skip", "name": "any candidate as right, 95 %", "xaxis": "x2", "yaxis": "y2",
    }  # fmt: skip
    height = max(360, 230 + max(22, min(34, 800 // len(rows))) * len(rows))
    scale: Spec = {"colorscale": DIVERGING, "cmin": shift - half, "cmax": shift + half, "cmid": shift}
    if rank:
        scale = {
            "colorscale": [[1 - at, colour] for at, colour in reversed(SEQUENTIAL)],
            "cmin": 1,
            "cmax": float(np.nanmax(result.value)),
        }  # less is better
    return {
        "data": [grid, dots, band, line],
        "layout": {
            "title": {
                "text": "<b>Logit lens</b>, the stream after each layer",
                "subtitle": {"text": f"{_LENS[result.of]}, mean of {result.n} episodes · dot: better than with any candidate as right, Holm p < {ALPHA} ({len(marked)} of {result.value.size})"},
            },
            "height": height,
            "xaxis": _axis(result.spans, domain=[0, 0.66], side="top", tickangle=-35),
            "yaxis": _axis(rows, down=True, title={"text": "after layer"}),
            "xaxis2": {"domain": [0.78, 1], "anchor": "y2", "title": {"text": f"{side}, {result.unit}"}, "nticks": 5, "zeroline": margin, "type": "log" if rank else "linear"},
            "yaxis2": {"anchor": "x2", "type": "category", "autorange": "reversed", "ticks": "", "categoryarray": rows, "categoryorder": "array"},
            "coloraxis": scale | {"colorbar": {"x": 0.67, "xanchor": "left"}},
            "legend": {"x": 1, "xanchor": "right", "y": -0.02, "yref": "container", "yanchor": "bottom"},
            "margin": {"t": 172, "b": 96},
            "meta": {} if rank else {"scale": "diverging"},
        },
    }  # fmt: skip


def lens_tokens(result: LogitLens, *, positions: Sequence[int] | None = None) -> Spec:
    """One prompt: the margin read at every token after every layer, with the most probable tokens on hover (the first written, where it fits).

    Args:
        result: A lens with its `prompt`.
        positions: Which tokens; None: the last 40 that are no picture's.

    Raises:
        OptionError: no prompt was kept, or it has no such token.
    """
    shown = prompt_of(result)
    view = shown.view
    text = [p for p, role in enumerate(view.roles) if role not in ("image", "pad")][-40:]
    chosen = text if positions is None else list(positions)
    if not chosen or not all(0 <= p < len(view.tokens) for p in chosen):
        raise OptionError(f"positions must be tokens of the prompt, 0..{len(view.tokens) - 1}; got {chosen}. Choose some.")
    z = shown.margin[:, chosen]
    half = _symmetric(z, 0.1)
    best = [[shown.tokens[k][p] for p in chosen] for k in range(len(result.layers))]
    listed = [
        ["<br>".join(f"{words(token)!s} {prob:.2f}" for token, prob in zip(tokens, shown.probability[k, p], strict=True)) for p, tokens in zip(chosen, best[k], strict=True)]
        for k in range(len(result.layers))
    ]  # fmt: skip
    ticks = [words(_short(view.tokens[p])) for p in chosen]
    grid: Spec = {
        "type": "heatmap", "z": z, "x": list(range(len(chosen))), "y": [_after(layer) for layer in result.layers], "coloraxis": "coloraxis", "xgap": 1, "ygap": 1,
        "text": [[words(_short(tokens[0])[:4]) for tokens in row] for row in best], "customdata": listed, "name": "tokens",
        "hovertemplate": "<b>after layer %{y}</b>, token %{x}<br>right label's margin %{z:.2f} logits<br>most probable:<br>%{customdata}<extra></extra>",
    }  # fmt: skip
    if len(chosen) <= 42:
        grid |= {"texttemplate": "%{text}", "textfont": {"size": 9.5}}
    return {
        "data": [grid],
        "layout": {
            "title": {
                "text": "<b>Logit lens</b> on one prompt",
                "subtitle": {"text": f"written: the most probable token there; colour: margin of the right label {words(view.answer)!r}, logits · {words(view.episode)}"},
            },
            "height": 220 + 28 * len(result.layers),
            "xaxis": {"tickvals": list(range(len(chosen))), "ticktext": ticks, "tickangle": -60, "showgrid": False, "ticks": "", "title": {"text": "token (the prompt, pictures left out)" if positions is None else "token"}},
            "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False, "ticks": "", "title": {"text": "after layer"}},
            "coloraxis": {"colorscale": DIVERGING, "cmin": -half, "cmax": half, "cmid": 0, "colorbar": {"title": {"text": "logits", "side": "right"}}},
            "margin": {"b": 110},
            "meta": {"scale": "diverging"},
        },
    }  # fmt: skip


def _short(token: str) -> str:
    """A token as people read it: blanks and line breaks visible, a control token without its brackets."""
    text = token.replace("\n", "↵").strip(" ")
    return text.removeprefix("<|").removesuffix("|>") or "␣"


def prompt_of(result: LogitLens) -> PromptLens:
    """The prompt kept with a lens.

    Raises:
        OptionError: none was.
    """
    if result.prompt is None:
        raise OptionError("result must have been made with a prompt to show; got none. Ask for it: logit_lens(..., prompt=0).")
    return result.prompt


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
            "marker": {"color": CHOSEN, "symbol": "diamond-open", "size": 11, "line": {"width": 2}}, "customdata": _extra(label.null_low, label.null_high, label.p_corrected),
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
        "customdata": _extra(copying.null_low, copying.null_high, copying.p_corrected, copying.ratio),
        "hovertemplate": "<b>head %{y}</b><br>%{x:.2f} of the eigenvalues' mass is positive<br>sum over sum of sizes %{customdata[3]:.2f}<br>random: %{customdata[0]:.2f} to %{customdata[1]:.2f}, corrected p %{customdata[2]:.2g}<extra></extra>",
    }  # fmt: skip
    return [bars, points]


def match_figure(match: QKMatch, *, n: int | None = None) -> Spec:
    """Why one head's score is higher on right exemplars: the query's part down, the key's part across; dots where outside its null."""
    half = _symmetric(match.value, 0.05)
    n = len(match.per_episode) if n is None else n
    hover = (
        f"<b>query from %{{y}}, key from %{{x}}</b><br>%{{z:.2f}} of the score difference<br>{_INTERVAL}<br>right and wrong dealt anew: "
        f"%{{customdata[2]:.2f}} to %{{customdata[3]:.2f}}<br>n = {n}<extra></extra>"
    )
    grid: Spec = {
        "type": "heatmap", "z": match.value, "coloraxis": "coloraxis", "xgap": 1.5, "ygap": 1.5, "name": "match",
        "customdata": _extra(match.low, match.high, match.null_low, match.null_high), "hovertemplate": hover,
    }  # fmt: skip
    if max(match.value.shape) <= 18:
        grid |= {"text": _written(match.value, half), "texttemplate": "%{text}", "textfont": {"size": 10}}
    outside = ((match.value > match.null_high) & (match.low > 0)) | ((match.value < match.null_low) & (match.high < 0))
    dots = _corners(np.argwhere(outside & (np.abs(match.value) > 0.05 * half)), "outside its null")
    total = match.total
    return {
        "data": [grid, dots],
        "layout": {
            "title": {
                "text": f"<b>What head {name(match.head)} matches</b>: its score on right minus wrong exemplars",
                "subtitle": {"text": f"keys at the exemplars' {words(match.keys)}; {total.value:.2f} ({total.low:.2f} to {total.high:.2f}) in all, mean of {n} episodes · dot: outside its null, interval off zero (not shown below 5 % of the largest)"},
            },
            "height": 220 + max(20, min(28, 640 // len(match.queries))) * len(match.queries),
            "xaxis": _axis(match.senders, tickangle=-45 if len(match.senders) > 12 else 0, title={"text": "what wrote into the key's stream"}),
            "yaxis": _axis(match.queries, down=True, title={"text": "what wrote into the query's stream"}),
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
