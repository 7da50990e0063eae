"""Figures of moves and cuts, as plain plotly dictionaries: transplants, function vectors, attention knocked out between spans."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mechicl.results import Estimate, FunctionVector, SpanKnockOut, SpanKnockOuts, Transplant
from mechicl.views.theme import CHANCE, CHOSEN, CONTROL, DASHES, INTACT, LINES, RANDOM
from mechicl.views.words import ALPHA, Spec, metric_words, words


def _forest(
    labels: Sequence[str],
    estimates: Sequence[Estimate],
    name: str,
    colour: str,
    symbol: str,
    *,
    filled: Sequence[bool] | None = None,
    hover: Sequence[str] = (),
) -> Spec:
    """Estimates as points with intervals, a row each; hollow where `filled` is False."""
    value = np.array([e.value for e in estimates])
    return {
        "type": "scatter", "mode": "markers", "name": name, "x": value, "y": list(labels),
        "marker": {"size": 10, "symbol": symbol, "color": [colour if f else "rgba(0,0,0,0)" for f in filled or [True] * len(value)], "line": {"color": colour, "width": 2}},
        "error_x": {"type": "data", "symmetric": False, "array": np.array([e.high for e in estimates]) - value, "arrayminus": value - np.array([e.low for e in estimates]),
                    "color": colour, "thickness": 1.6, "width": 4},
        "customdata": [[e.low, e.high, e.n, text] for e, text in zip(estimates, hover or [""] * len(value), strict=True)],
        "hovertemplate": "<b>%{y}</b><br>%{x:.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f}), n = %{customdata[2]}%{customdata[3]}<extra></extra>",
    }  # fmt: skip


def transplant_rows(result: Transplant) -> Spec:
    """What each move does beside the same move from other episodes; filled where the difference passes the corrected test."""
    labels = [
        f"{words(r.site)}{f', layer {r.layer}' if r.layer >= 0 else ''}: {words(r.source)} \u2192 {words(r.target)}" for r in result.rows
    ]
    passed = [bool(r.p_corrected < ALPHA) for r in result.rows]
    hover = [f"<br>minus control {r.difference.value:.3f} ({r.difference.low:.3f} to {r.difference.high:.3f}), corrected p {r.p_corrected:.2g}"
             + (f"<br>{r.normalised.value:.2f} of the way from target to source" if r.normalised is not None else "") for r in result.rows]  # fmt: skip
    return {
        "data": [_forest(labels, [r.effect for r in result.rows], "this episode's activation", CHOSEN, "circle", filled=passed, hover=hover),
                 _forest(labels, [r.control for r in result.rows], f"control: from {result.n_controls} other episodes", RANDOM, "diamond")],
        "layout": {
            "title": {"text": "<b>An activation moved elsewhere</b>",
                      "subtitle": {"text": f"change of {metric_words(result.metric)}, {words(result.unit)}, n = {result.n}, 95 % intervals · filled: differs from its control, corrected p < {ALPHA}"}},
            "height": 190 + 30 * len(labels), "xaxis": {"title": {"text": f"change, {words(result.unit)}"}, "zeroline": True},
            "yaxis": {"type": "category", "autorange": "reversed", "ticks": ""}, "margin": {"t": 88, "b": 92}, "legend": {"y": 0, "yref": "container", "yanchor": "bottom"},
        },
    }  # fmt: skip


def function_vector_lines(result: FunctionVector) -> Spec:
    """What adding the vector does, layer by layer, over the band of random vectors and of vectors made of random heads."""
    data: list[Spec] = []
    heads = ", ".join(f"{a}.{b}" for a, b in result.heads[:10]) + (f" and {len(result.heads) - 10} more" if len(result.heads) > 10 else "")
    for k, prompts in enumerate(dict.fromkeys(e.prompts for e in result.effects)):
        part = sorted((e for e in result.effects if e.prompts == prompts), key=lambda e: e.layer)
        layers, colour = np.array([e.layer for e in part]), LINES[k % len(LINES)]
        rgb = ",".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
        draws = [np.concatenate([np.ravel(e.random_vectors), np.ravel(e.random_heads)]) for e in part]
        if all(d.size for d in draws):
            low, high = (np.array([np.quantile(d, q) for d in draws]) for q in (0.025, 0.975))
            hidden: Spec = {
                "type": "scatter",
                "mode": "lines",
                "x": layers,
                "line": {"width": 0},
                "hoverinfo": "skip",
                "legendgroup": prompts,
            }
            data += [hidden | {"y": high, "showlegend": False, "name": f"random high, {words(prompts)}"},
                     hidden | {"y": low, "fill": "tonexty", "fillcolor": f"rgba({rgb},0.16)", "name": f"95 % of random vectors, {words(prompts)}"}]  # fmt: skip
        change = [e.change_probability for e in part]
        value, under, over = (np.array([getattr(e, end) for e in change]) for end in ("value", "low", "high"))
        data.append({
            "type": "scatter", "mode": "lines+markers", "x": layers, "y": value, "name": words(prompts), "legendgroup": prompts, "marker": {"size": 8},
            "line": {"color": colour, "width": 2.4, "dash": DASHES[k % len(DASHES)]},
            "error_y": {"type": "data", "symmetric": False, "array": over - value, "arrayminus": value - under, "color": colour, "thickness": 1.6, "width": 4},
            "customdata": [[e.probability.value, e.accuracy.value, e.p_random] for e in part],
            "hovertemplate": "layer %{x}: %{y:+.3f}<br>probability %{customdata[0]:.3f}, accuracy %{customdata[1]:.1%}, p against random %{customdata[2]:.2g}<extra></extra>",
        })  # fmt: skip
    return {
        "data": data,
        "layout": {
            "title": {"text": f"<b>A function vector from {len(result.heads)} heads</b> ({heads})",
                      "subtitle": {"text": f"added to the last token where a layer begins: change in the right label's probability, n = {result.n}, 95 % intervals; band: random vectors and heads"}},
            "height": 440, "xaxis": {"title": {"text": "layer"}, "dtick": 1 if len({e.layer for e in result.effects}) <= 24 else None, "zeroline": False},
            "yaxis": {"title": {"text": "change in probability"}, "zeroline": True}, "margin": {"t": 88, "b": 92}, "legend": {"y": 0, "yref": "container", "yanchor": "bottom"},
        },
    }  # fmt: skip


def knock_out_pairs(result: SpanKnockOuts) -> Spec:
    """Accuracy and margin with one group of tokens kept from reading another, a row each, beside the intact model and each row's matched control."""
    labels = _row_names(result.rows)
    passed = [bool(r.p_corrected < ALPHA) for r in result.rows]
    hover = [f"<br>change {100 * r.change.value:+.1f} points, McNemar p {r.mcnemar_p:.2g}, corrected {r.p_corrected:.2g}<br>{r.n_cells:.0f} pairs of tokens cut; control: {words(r.control) or 'none'}"
             for r in result.rows]  # fmt: skip
    data = [
        _forest(["intact model"], [result.intact.accuracy], "intact", INTACT, "square"),
        _forest(labels, [r.accuracy for r in result.rows], "cut", CHOSEN, "circle", filled=passed, hover=hover),
    ]
    control = [(label, r) for label, r in zip(labels, result.rows, strict=True) if r.control_accuracy is not None]
    if control:
        data.append(
            _forest(
                [label for label, _ in control],
                [r.control_accuracy for _, r in control if r.control_accuracy],
                f"matched control, {result.n_draws} draws",
                RANDOM,
                "diamond",
            )
        )
    if result.zero_shot is not None:
        data.append(_forest(["zero-shot: no examples"], [result.zero_shot], "zero-shot", CONTROL, "diamond"))
    right = {"xaxis": "x2", "yaxis": "y2", "showlegend": False}
    far = [f"<br>share of control draws that fall as far: p = {r.p_random:.2g}" if r.p_random == r.p_random else "" for r in result.rows]
    data.append(_forest(labels, [r.margin_change for r in result.rows], "margin", CHOSEN, "circle", filled=passed, hover=far) | right)
    margins = [(label, r.control_margin_change) for label, r in control if r.control_margin_change is not None]
    if margins:
        data.append(_forest([label for label, _ in margins], [e for _, e in margins], "margin, control", RANDOM, "diamond") | right)
    order = list(dict.fromkeys(str(y) for trace in data for y in trace["y"]))
    line: Spec = {
        "type": "line",
        "xref": "x",
        "yref": "y domain",
        "x0": result.intact.chance,
        "x1": result.intact.chance,
        "y0": 0,
        "y1": 1,
        "line": {"color": CHANCE, "width": 1.6, "dash": "dot"},
    }
    note: Spec = {"x": result.intact.chance, "y": 1, "xref": "x", "yref": "y domain", "xanchor": "left", "yanchor": "bottom", "text": f"chance {result.intact.chance:.0%}",
                  "showarrow": False, "font": {"color": CHANCE, "size": 12}}  # fmt: skip
    rows = {"type": "category", "categoryorder": "array", "categoryarray": order[::-1], "range": [-0.6, len(order) - 0.4], "ticks": ""}
    return {
        "data": data,
        "layout": {
            "title": {"text": "<b>What must be read from where?</b>",
                      "subtitle": {"text": f"attention cut between two groups of tokens, n = {result.n} prompts, 95 % intervals · filled: accuracy falls, McNemar p < {ALPHA} (Holm)"}},
            "height": 200 + 32 * len(order),
            "xaxis": {"tickformat": ".0%", "range": [-0.03, 1.03], "domain": [0, 0.56], "anchor": "y", "title": {"text": "accuracy"}, "zeroline": False}, "yaxis": rows | {"anchor": "x"},
            "xaxis2": {"domain": [0.62, 1], "anchor": "y2", "title": {"text": "change of the margin, nats"}, "zeroline": True},
            "yaxis2": rows | {"anchor": "x2", "showticklabels": False},
            "shapes": [line], "annotations": [note], "margin": {"t": 100, "b": 92}, "legend": {"y": 0, "yref": "container", "yanchor": "bottom"},
        },
    }  # fmt: skip


def _row_names(rows: Sequence[SpanKnockOut]) -> list[str]:
    """A name for each row: the pair, with its layers where a pair has several windows."""
    several = {r.name for r in rows if r.layers and sum(o.name == r.name for o in rows) > 1}
    out = []
    for r in rows:
        window = f"layer {min(r.layers)}" if len(r.layers) == 1 else f"layers {min(r.layers)} to {max(r.layers)}"
        out.append(words(r.name.replace("<-", "\u2190")) + (f", {window}" if r.name in several else ""))
    return out
