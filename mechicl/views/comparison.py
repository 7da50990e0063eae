"""Figures of two models side by side, and of one along its checkpoints, as plain plotly dictionaries.

The arrays in a figure are the arrays of the result, untouched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mechicl.errors import OptionError
from mechicl.results import Estimate
from mechicl.results.comparison import QUANTILES, CheckpointSeries, Comparison, HeadsImprove, ScoreAgreement
from mechicl.views.theme import CHOSEN, DASHES, INTACT, LINES, RANDOM, SEQUENTIAL
from mechicl.views.trainings import band
from mechicl.views.words import Spec, name, words

COLUMNS = ((0.0, 0.27), (0.37, 0.63), (0.73, 1.0))
"""Where the panels of a row stand: pairs, distributions, tops."""


def comparison_panels(result: Comparison, *, scores: Sequence[str] | None = None) -> Spec:
    """A row for each score: the pairs' scores in both models; the scores' quantiles over heads; heads shared by the two top k, beside chance.

    Raises:
        OptionError: a score that was not compared.
    """
    chosen = list(result.scores) if scores is None else list(scores)
    missing = [one for one in chosen if one not in result.scores]
    if missing or not chosen:
        raise OptionError(f"scores must be among {', '.join(result.scores)}; got {missing or 'none'}. Leave it out for all.")
    data: list[Spec] = []
    layout: Spec = {}
    notes: list[Spec] = []
    n = len(chosen)
    for row, key in enumerate(chosen):
        top, bottom = 1 - row / n, 1 - (row + 1) / n + 0.34 / n
        ends = [str(3 * row + k + 1) if row or k else "" for k in range(3)]
        one = result.scores[key]
        data += [*_pairs(result, one, ends[0]), *_distribution(result, one, ends[1], row == 0), *_tops(one, ends[2], row == 0)]
        titles = [
            (result.first.name, f"<b>{words(key)}</b><br>{result.second.name}"),
            ("share of heads below", ""),
            ("heads at the top, k", "shared"),
        ]
        for k, ((left, right), (below, beside)) in enumerate(zip(COLUMNS, titles, strict=True)):
            layout[f"xaxis{ends[k]}"] = {
                "domain": [left, right],
                "anchor": f"y{ends[k]}",
                "title": {"text": words(below) if k == 0 else below},
                "zeroline": False,
            }
            layout[f"yaxis{ends[k]}"] = {"domain": [bottom, top], "anchor": f"x{ends[k]}", "title": {"text": beside}, "zeroline": False}
        layout[f"xaxis{ends[1]}"] |= {"tickformat": ".0%"}
        notes.append(_caption(one, top, row))
    return {
        "data": data,
        "layout": layout | {
            "title": {"text": f"<b>{words(result.first.name)} against {words(result.second.name)}</b>", "subtitle": {"text": _under(result)}},
            "height": 150 + 250 * n, "width": 1080, "annotations": notes, "showlegend": True, "margin": {"t": 100, "l": 90},
            "legend": {"orientation": "h", "x": 0, "y": -0.16 / n, "yanchor": "top"},
        },
    }  # fmt: skip


def _under(result: Comparison) -> str:
    aligned = result.alignment
    said = f"heads aligned by {aligned.how}; n = {result.n} episodes, {len(aligned.pairs)} pairs of heads; orange: both in the top of their model"
    if np.isfinite(aligned.agreement):
        said += f"<br>partial rank correlation over all scores {aligned.agreement:.2f} (dealt at random: below {aligned.agreement_high:.2f} in 97.5 %; p = {aligned.p:.2g})"
    if result.accuracy is not None:
        a = result.accuracy
        said += f"; accuracy {a.first.value:.2f} against {a.second.value:.2f}, McNemar p = {a.mcnemar_p:.2g}"
    return said


def _caption(one: ScoreAgreement, top: float, row: int) -> Spec:
    text = f"rank correlation {one.spearman.value:.2f} ({one.spearman.low:.2f} to {one.spearman.high:.2f})"
    return {
        "x": COLUMNS[0][0],
        "y": top,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "left",
        "yanchor": "bottom",
        "text": text,
        "showarrow": False,
    }


def _pairs(result: Comparison, one: ScoreAgreement, end: str) -> list[Spec]:
    first, second = result.first.scores[one.name], result.second.scores[one.name]
    x, y = (np.array([score.value[pair[k]] for pair in one.pairs]) for k, score in enumerate((first, second)))
    ends = [float(min(x.min(), y.min())), float(max(x.max(), y.max()))] if len(x) else [0.0, 1.0]
    shared = [pair[0] in one.shared for pair in one.pairs]
    axes = {"xaxis": f"x{end}", "yaxis": f"y{end}", "showlegend": False}
    line: Spec = {
        "type": "scatter",
        "mode": "lines",
        "x": ends,
        "y": ends,
        "line": {"color": RANDOM, "width": 1.2, "dash": "dot"},
        "hoverinfo": "skip",
        **axes,
    }
    dots: Spec = {
        "type": "scatter", "mode": "markers", "x": x, "y": y, "marker": {"size": 8, "opacity": 0.8, "color": [CHOSEN if s else INTACT for s in shared]},
        "customdata": [[name(a), name(b)] for a, b in one.pairs],
        "hovertemplate": "head %{customdata[0]} and head %{customdata[1]}<br>%{x:.3f} and %{y:.3f}<extra></extra>", **axes,
    }  # fmt: skip
    return [line, dots]


def _distribution(result: Comparison, one: ScoreAgreement, end: str, first: bool) -> list[Spec]:
    out: list[Spec] = []
    sides = (
        (result.first.name, one.quantiles_first, one.low_first, one.high_first, INTACT, "solid"),
        (result.second.name, one.quantiles_second, one.low_second, one.high_second, CHOSEN, "dash"),
    )
    for called, values, low, high, colour, dash in sides:
        axes: dict[str, Any] = {"xaxis": f"x{end}", "yaxis": f"y{end}", "legendgroup": called}
        out += band(np.array(QUANTILES), low, high, colour, **axes)
        out.append(
            {"type": "scatter", "mode": "lines+markers", "x": np.array(QUANTILES), "y": values, "name": words(called), "showlegend": first,
             "line": {"color": colour, "width": 2.2, "dash": dash}, "marker": {"size": 5}, "hovertemplate": "%{x:.0%} of heads below %{y:.3f}<extra></extra>", **axes}
        )  # fmt: skip
    return out


def _tops(one: ScoreAgreement, end: str, first: bool) -> list[Spec]:
    axes: dict[str, Any] = {"xaxis": f"x{end}", "yaxis": f"y{end}"}
    chance = [*band(one.ks, one.top_chance, one.top_high, RANDOM, **axes, legendgroup="chance")]
    chance.append(
        {"type": "scatter", "mode": "lines", "x": one.ks, "y": one.top_chance, "name": "by chance, to 97.5 %", "showlegend": first, "legendgroup": "chance",
         "line": {"color": RANDOM, "width": 1.6, "dash": "dot"}, "hovertemplate": "%{y:.2f} expected<extra></extra>", **axes}
    )  # fmt: skip
    found: Spec = {
        "type": "scatter", "mode": "lines+markers", "x": one.ks, "y": one.top_shared, "name": "shared by both tops", "showlegend": first,
        "line": {"color": LINES[2], "width": 2.2}, "hovertemplate": "%{y} of the top %{x} shared<extra></extra>", **axes,
    }  # fmt: skip
    return [*chance, found]


def improvement_rows(result: HeadsImprove) -> Spec:
    """The difference as it is, with as many heads of each, and for the same share of heads; shaded: what heads dealt at random do."""
    rows = {"second minus first": result.raw, "as many heads of each": result.equal_number, "the same share of heads": result.equal_share}
    estimates: list[Estimate] = list(rows.values())
    value = np.array([e.value for e in estimates])
    dots: Spec = {
        "type": "scatter", "mode": "markers", "x": value, "y": list(rows), "marker": {"size": 11, "color": INTACT}, "showlegend": False,
        "error_x": {"type": "data", "symmetric": False, "array": np.array([e.high for e in estimates]) - value, "arrayminus": value - np.array([e.low for e in estimates]),
                    "thickness": 1.8, "width": 5, "color": INTACT},
        "customdata": [[e.low, e.high, e.n] for e in estimates],
        "hovertemplate": "<b>%{y}</b><br>%{x:+.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f}), n = %{customdata[2]}<extra></extra>",
    }  # fmt: skip
    low, high = sorted((2 * result.by_number - result.by_number_high, result.by_number_high))
    shade: Spec = {
        "type": "rect",
        "x0": low,
        "x1": high,
        "y0": 0,
        "y1": 1,
        "yref": "paper",
        "fillcolor": RANDOM,
        "opacity": 0.18,
        "line": {"width": 0},
        "layer": "below",
    }
    note: Spec = {"x": result.by_number, "y": 1, "yref": "paper", "yanchor": "bottom", "text": "heads dealt at random", "showarrow": False}
    what = f"the {result.k} best {words(result.score)} heads" if result.k > 1 else f"the best {words(result.score)} head"
    return {
        "data": [dots],
        "layout": {
            "title": {"text": f"<b>Are {what} of {words(result.names[1])} better than those of {words(result.names[0])}?</b>",
                      "subtitle": {"text": f"{words(result.finding)}; {result.n_heads[0]} and {result.n_heads[1]} heads; 95 % intervals over n = {result.n} episodes; p over heads {result.p_heads:.2g}"}},
            "height": 320, "width": 1000, "shapes": [shade], "annotations": [note], "margin": {"t": 100},
            "xaxis": {"title": {"text": f"difference of mean scores, {words(result.unit)}"}, "zeroline": True},
            "yaxis": {"autorange": "reversed", "type": "category", "ticks": ""},
        },
    }  # fmt: skip


def checkpoint_panels(result: CheckpointSeries, *, heads: int = 12) -> Spec:
    """Measures along the checkpoints (dotted: change points) above; each score's heads below, the best of the last checkpoint on top."""
    series = result.series
    x = [f"{step:,}" for step in series.steps]
    keys = [key for key in series.values if " shared with " not in key]
    data: list[Spec] = []
    for k, key in enumerate(keys):
        colour = LINES[k % len(LINES)]
        if key in series.low:
            data += band(x, series.low[key], series.high[key], colour, legendgroup=key)
        data.append(
            {"type": "scatter", "mode": "lines+markers", "x": x, "y": series.values[key], "name": words(key), "legendgroup": key,
             "line": {"color": colour, "width": 2.2, "dash": DASHES[k % len(DASHES)]}, "customdata": list(result.names),
             "hovertemplate": f"{words(key)} %{{y:.3f}}<br>%{{customdata}}<extra></extra>"}
        )  # fmt: skip
    n = max(len(result.heads), 1)
    layout: Spec = {
        "xaxis": {"type": "category", "anchor": "y", "title": {"text": "training step"}},
        "yaxis": {"domain": [0.56, 1.0], "title": {"text": "share"}, "zeroline": False, "range": [-0.05, 1.05]},
    }
    for k, (key, values) in enumerate(result.heads.items()):
        left, right = k / n + (0.05 if k else 0.0), (k + 1) / n - 0.04
        data.append(_heat(key, values, x, str(k + 2), heads, result.names))
        layout[f"xaxis{k + 2}"] = {
            "type": "category",
            "domain": [left, right],
            "anchor": f"y{k + 2}",
            "title": {"text": f"<b>{words(key)}</b>, step"},
        }
        layout[f"yaxis{k + 2}"] = {
            "domain": [0.0, 0.4],
            "anchor": f"x{k + 2}",
            "autorange": "reversed",
            "type": "category",
            "title": {"text": "head" if k == 0 else ""},
        }
    changed = [f"{words(key)} at {change[0]:.0f}" for key, change in result.changes.items() if change is not None and key in keys]
    said = f"n = {series.n} episodes, bands: 95 %" + (f"; change points: {', '.join(changed)}" if changed else "")
    return {
        "data": data,
        "layout": layout | {
            "title": {"text": f"<b>{len(x)} checkpoints, the same episodes</b>", "subtitle": {"text": said}}, "height": 760, "width": 1080, "margin": {"t": 90, "r": 250},
            "legend": {"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"},
            "coloraxis": {"colorscale": SEQUENTIAL, "cmin": 0, "cmax": 1, "colorbar": {"len": 0.4, "y": 0.0, "yanchor": "bottom", "x": 1.02, "title": {"text": "score"}}},
            "meta": {"scale": "sequential"},
        },
    }  # fmt: skip


def _heat(key: str, values: np.ndarray, x: Sequence[str], end: str, heads: int, names: Sequence[Any]) -> Spec:
    """The heads that are best at the last checkpoint, at every checkpoint."""
    last = np.nan_to_num(values[-1].ravel(), nan=-np.inf)
    order = [int(i) for i in np.argsort(-last, kind="stable")[:heads] if np.isfinite(last[i])]
    named = [name((i // values.shape[2], i % values.shape[2])) for i in order]
    return {
        "type": "heatmap", "x": list(x), "y": named, "z": values.reshape(len(values), -1)[:, order].T, "xaxis": f"x{end}", "yaxis": f"y{end}", "coloraxis": "coloraxis",
        "hovertemplate": f"head %{{y}}, step %{{x}}<br>{words(key)} %{{z:.3f}}<extra></extra>",
    }  # fmt: skip
