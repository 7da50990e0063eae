"""What stands beside a circuit's graph, as plain plotly dictionaries: faithfulness over the band of random circuits, rows of estimates; and the overlap of two circuits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mechicl.results import CircuitCurve, CircuitOverlap, Estimate
from mechicl.views.theme import CHANCE, CHOSEN, INTACT, LINES, RANDOM
from mechicl.views.words import Spec, words


def number(value: float, digits: int = 2) -> str:
    """A number as text with a true minus sign; "?" for NaN."""
    return "?" if value != value else f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "\u2212")  # + 0.0: no minus zero


def interval(e: Estimate, digits: int = 2) -> str:
    """ "0.91 (0.85 to 0.97)"."""
    return f"{number(e.value, digits)} ({number(e.low, digits)} to {number(e.high, digits)})"


def curve_panel(curve: CircuitCurve, at: int) -> tuple[list[Spec], list[Spec]]:
    """Faithfulness with intervals over the band of random circuits; the first shape is the line that moves with the slider, at `at` edges now."""
    ks, common = np.asarray(curve.ks), {"type": "scatter", "xaxis": "x2", "yaxis": "y2"}
    data: list[Spec] = []
    if curve.n_draws:
        hidden = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        data += [
            common | hidden | {"x": ks, "y": curve.random_high, "showlegend": False, "name": "random high"},
            common | hidden | {"x": ks, "y": curve.random_low, "fill": "tonexty", "fillcolor": "rgba(125,135,147,0.25)", "name": "95 % of random circuits"},
            common | {"x": ks, "y": curve.random_mean, "mode": "lines", "line": {"color": RANDOM, "width": 2, "dash": "dash"}, "name": "random circuits, mean", "showlegend": False,
                      "hovertemplate": "%{x} random edges: %{y:.2f}<extra></extra>"},
        ]  # fmt: skip
    value, low, high = (np.array([getattr(e, end) for e in curve.faithfulness]) for end in ("value", "low", "high"))
    data.append(common | {
        "x": ks, "y": value, "mode": "lines+markers", "name": "faithfulness, 95 % interval", "line": {"color": INTACT, "width": 2.2}, "marker": {"size": 7},
        "error_y": {"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "color": INTACT, "thickness": 1.4, "width": 3},
        "customdata": np.stack([low, high, np.asarray(curve.n_live, dtype=float)], axis=-1),
        "hovertemplate": "%{x} edges, %{customdata[2]:.0f} on a way through<br>faithfulness %{y:.2f} (%{customdata[0]:.2f} to %{customdata[1]:.2f})<extra></extra>",
    })  # fmt: skip
    moving: Spec = {
        "type": "line",
        "xref": "x2",
        "yref": "y2 domain",
        "x0": at,
        "x1": at,
        "y0": 0,
        "y1": 1,
        "line": {"color": CHOSEN, "width": 2},
    }
    levels: list[Spec] = [{"type": "line", "xref": "x2 domain", "yref": "y2", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": {"color": CHANCE, "width": 1.4, "dash": "dot"}} for y in (0.0, 1.0)]  # fmt: skip
    return data, [moving, *levels]


def points(labels: Sequence[str], estimates: Sequence[Estimate], colour: str, symbol: str, name: str) -> Spec:
    """Estimates in the right panel, a row each."""
    value = np.array([e.value for e in estimates])
    return {
        "type": "scatter", "mode": "markers", "x": value, "y": list(labels), "xaxis": "x2", "yaxis": "y2", "name": name, "showlegend": False,
        "marker": {"color": colour, "symbol": symbol, "size": 10},
        "error_x": {"type": "data", "symmetric": False, "array": np.array([e.high for e in estimates]) - value, "arrayminus": value - np.array([e.low for e in estimates]),
                    "color": colour, "thickness": 1.6, "width": 4},
        "customdata": [[e.low, e.high, e.n] for e in estimates],
        "hovertemplate": "<b>%{y}</b><br>%{x:.2f} (%{customdata[0]:.2f} to %{customdata[1]:.2f}), n = %{customdata[2]}<extra></extra>",
    }  # fmt: skip


def overlap_rows(result: CircuitOverlap) -> Spec:
    """Shared members against chance, kind by kind; where there are rankings, also the members that the two top k share."""
    kinds = [words(k.kind) for k in result.by_kind]
    both, alone = "shared", "expected by chance"
    data: list[Spec] = [
        {"type": "bar", "orientation": "h", "y": kinds, "x": np.array([k.n_shared for k in result.by_kind]), "name": both, "marker": {"color": INTACT},
         "customdata": [[k.n_first, k.n_second, k.n_possible] for k in result.by_kind],
         "hovertemplate": "<b>%{y}</b><br>%{x} shared of %{customdata[0]} and %{customdata[1]}, %{customdata[2]} possible<extra></extra>"},
        {"type": "bar", "orientation": "h", "y": kinds, "x": np.array([k.expected for k in result.by_kind]), "name": alone,
         "marker": {"color": "rgba(125,135,147,0.35)", "line": {"color": RANDOM, "width": 1.5}, "pattern": {"shape": "/"}}, "hovertemplate": "<b>%{y}</b><br>%{x:.2f} by chance<extra></extra>"},
    ]  # fmt: skip
    layout: Spec = {
        "title": {"text": f"<b>What {words(result.names[0])} and {words(result.names[1])} share</b> ({result.level}s)",
                  "subtitle": {"text": f"Jaccard {interval(result.jaccard)}, {number(result.chance)} by chance (97.5 %: {number(result.chance_high)}); "
                                       f"{result.n_shared} shared, {number(result.expected, 1)} expected, p = {result.p:.2g}"}},
        "height": max(320, 180 + 44 * len(kinds)), "barmode": "group", "margin": {"t": 92, "b": 92}, "legend": {"y": 0, "yref": "container", "yanchor": "bottom"},
        "xaxis": {"title": {"text": f"{result.level}s"}, "rangemode": "tozero"}, "yaxis": {"type": "category", "autorange": "reversed", "ticks": ""},
    }  # fmt: skip
    if len(result.ks):
        common: Spec = {"type": "scatter", "xaxis": "x2", "yaxis": "y2", "x": result.ks}
        data += [
            common | {"y": result.top_high, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False, "name": "97.5 % by chance"},
            common | {"y": result.top_chance, "mode": "lines", "fill": "tonexty", "fillcolor": "rgba(125,135,147,0.25)", "line": {"color": RANDOM, "dash": "dash", "width": 2},
                      "name": "by chance, up to 97.5 %", "hovertemplate": "%{y:.1f} by chance<extra></extra>"},
            common | {"y": result.top_shared, "mode": "lines+markers", "line": {"color": LINES[0], "width": 2.2}, "name": "shared by the two top k", "hovertemplate": "top %{x}: %{y} shared<extra></extra>"},
        ]  # fmt: skip
        layout["xaxis"] |= {"domain": [0, 0.46]}
        layout["xaxis2"] = {
            "domain": [0.6, 1],
            "anchor": "y2",
            "title": {"text": f"k best {result.level}s of each; Spearman of all {number(result.rank_correlation)}"},
        }
        layout["yaxis2"] = {
            "anchor": "x2",
            "title": {"text": "shared"},
            "rangemode": "tozero",
        }
    return {"data": data, "layout": layout}
