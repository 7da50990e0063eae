"""Figures of circuits, as plain plotly dictionaries: the graph with its slider and its evidence.

Every edge is a line of its own whose width is its score; what an edge is read as is told by dash, colour and the side on which it enters a head. The slider only shows
and hides lines, so a page needs nothing but plotly for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mechicl.results import Circuit, CircuitCurve, Edge, Estimate
from mechicl.views import graph
from mechicl.views.circuit_panels import curve_panel, interval, number, points
from mechicl.views.theme import CHANCE, CHOSEN, CONTROL, INTACT, RANDOM, SINGLE
from mechicl.views.words import Spec, metric_words, words

MAX_EDGES = 150
"""Most edges that are drawn; more cannot be told apart."""

MAX_STEPS = 24
"""Most stops of the slider."""

TARGET = 0.85
"""The slider starts at the first number of edges whose faithfulness is at least this, where the result names no circuit."""

KINDS: dict[str, tuple[str, str, str]] = {
    "q": (INTACT, "solid", "into queries"), "k": (CHOSEN, "7px,3px", "into keys"), "v": (CONTROL, "2px,3px", "into values"),
    "mlp": (RANDOM, "solid", "into an MLP"), "logits": (CHANCE, "solid", "into the logits"),
}  # fmt: skip
"""What an edge is read as -> colour, dash, words."""

_NODES: dict[str, tuple[str, str, int, str]] = {
    "head": ("circle", "#24527f", 30, "#ffffff"), "kv": ("diamond", "#a9b1bb", 15, "#56606d"), "mlp": ("square", "#6b7480", 26, "#ffffff"),
    "embed": ("hexagon2", "#0b6e62", 30, "#ffffff"), "logits": ("hexagon2", "#8f3763", 30, "#ffffff"),
}  # fmt: skip
_LEFT = 0.66  # right end of the graph, as a share of the figure
_DEAD = 0.15  # opacity of an edge that leads nowhere at this number of edges


@dataclass(frozen=True)
class Step:
    """A stop of the slider: so many edges, and what is said about them."""

    k: int
    live: frozenset[Edge]
    said: str


def arrow(edge: Edge) -> str:
    """An edge's name with a real arrow."""
    return edge.name.replace("->", "\u2192")


def circuit_slider(curve: CircuitCurve, *, max_edges: int = MAX_EDGES) -> Spec:
    """The graph with a slider over the number of edges, faithfulness and the band of random circuits beside it.

    Args:
        curve: Faithfulness as edges are added in the order of their score.
        max_edges: Most edges drawn; the curve goes on beyond them.
    """
    within = [i for i, k in enumerate(curve.ks) if 0 < k <= max_edges]
    if len(within) > MAX_STEPS:
        within = [within[i] for i in sorted({round(x) for x in np.linspace(0, len(within) - 1, MAX_STEPS)})]
    most = int(curve.ks[within[-1]]) if within else 0
    drawn = list(curve.edges_at(most))
    model = graph.model_of(curve.edges_in_order, curve.shape or (curve.circuit.shape if curve.circuit is not None else None))
    steps = []
    for i in within:
        k, e = int(curve.ks[i]), curve.faithfulness[i]
        band = (
            f"<br>random circuits {number(curve.random_mean[i])} ({number(curve.random_low[i])} to {number(curve.random_high[i])})"
            if curve.n_draws
            else ""
        )
        said = f"<b>{k} of {curve.n_edges_possible} edges</b>, {int(curve.n_live[i])} on a way through<br>faithfulness {interval(e)}{band}"
        steps.append(Step(k, frozenset(graph.live_edges(curve.edges_at(k), model)), said))
    places = dict(curve.places) or (dict(curve.circuit.places) if curve.circuit is not None else {})
    spec = _draw(drawn, curve.scores, places, model, steps, _losses(curve.circuit), start=_start(curve, steps))
    side, shapes = curve_panel(curve, steps[_start(curve, steps)].k if steps else 0)
    beyond = f" · drawn up to {most} of {len(curve.edges_in_order)} edges" if most < len(curve.edges_in_order) else ""
    spec["data"] += side
    layout = spec["layout"]
    layout["shapes"] = [*shapes, *layout["shapes"]]
    layout["xaxis2"] = {
        "domain": [_LEFT + 0.08, 1],
        "anchor": "y2",
        "title": {"text": "edges kept"},
        "rangemode": "tozero",
        "zeroline": False,
    }
    layout["yaxis2"] = {
        "domain": [0.0, 0.72],
        "anchor": "x2",
        "title": {"text": "faithfulness"},
        "zeroline": False,
    }
    columns = "the span a head acts at" if graph.by_place(drawn, model, places) else "heads"
    layout["title"] = {
        "text": f"<b>The circuit, edge by edge</b> (scored by {words(curve.scored_by)})",
        "subtitle": {"text": f"{metric_words(curve.metric)}, n = {curve.n} pairs, bootstrap 95 % · columns: {columns}; a line's width: its score{beyond}"},
    }  # fmt: skip
    return spec


def circuit_graph(circuit: Circuit) -> Spec:
    """The circuit's own edges, with its faithfulness, what is left without it, random circuits, and the loss of each edge alone."""
    model = graph.model_of(circuit.edges, circuit.shape)
    drawn = list(circuit.edges)[:MAX_EDGES]
    steps = [Step(len(drawn), frozenset(drawn), "")]
    spec = _draw(drawn, circuit.scores, circuit.places, model, steps, _losses(circuit), start=0)
    rows = [("faithfulness", circuit.faithfulness, INTACT, "square"), ("the rest alone", circuit.completeness, CHOSEN, "diamond")]
    if circuit.n_draws:
        band = Estimate(circuit.random_mean, circuit.random_low, circuit.random_high, circuit.n_draws)
        rows.append((f"random ({circuit.n_draws} draws)", band, RANDOM, "circle"))
    side = [points([name], [e], colour, symbol, name) for name, e, colour, symbol in rows]
    losses = sorted(circuit.minimality, key=lambda one: -np.nan_to_num(one.loss.value, nan=-9.0))[:14]
    if losses:
        labels = [f"loss: {arrow(one.edge)}" for one in losses]
        side.append(points(labels, [one.loss for one in losses], SINGLE, "circle", "lost without the edge"))
    more = len(circuit.minimality) - len(losses)
    p = "" if circuit.p_random != circuit.p_random else f", p = {circuit.p_random:.2g} against random circuits"
    others = "other pairs than those it was found on" if circuit.held_out else "the pairs it was found on: optimistic"
    spec["data"] += side
    spec["layout"] |= {
        "xaxis2": {"domain": [_LEFT + 0.16, 1], "anchor": "y2", "title": {"text": "share of the model's effect"}, "zeroline": True},
        "yaxis2": {"domain": [0, 1], "anchor": "x2", "autorange": "reversed", "type": "category", "ticks": "", "showgrid": True},
        "title": {
            "text": f"<b>The circuit: {circuit.n_edges} of {circuit.n_edges_possible} edges</b> ({words(circuit.method)}, scored by {words(circuit.scored_by)})",
            "subtitle": {"text": f"faithfulness {interval(circuit.faithfulness)}{p} · n = {circuit.n}, {others}" + (f" · {more} more edges in the CSV" if more > 0 else "")},
        },
    }  # fmt: skip
    spec["layout"]["height"] = max(spec["layout"]["height"], 200 + 24 * (len(rows) + len(losses)))
    return spec


def _losses(circuit: Circuit | None) -> Mapping[Edge | str, Estimate]:
    """What the circuit loses without one edge, and (by name) without one node."""
    if circuit is None:
        return {}
    return {one.edge: one.loss for one in circuit.minimality} | {node.name: node.loss for node in circuit.nodes if node.loss is not None}


def _start(curve: CircuitCurve, steps: Sequence[Step]) -> int:
    """The stop at which the slider stands first: the circuit's own size, else the first that is faithful enough, else the last."""
    if not steps:
        return 0
    wanted = curve.circuit.n_edges if curve.circuit is not None else 0
    if not wanted:
        enough = [int(k) for k, e in zip(curve.ks, curve.faithfulness, strict=True) if e.value >= TARGET]
        wanted = enough[0] if enough else steps[-1].k
    return next((i for i, step in enumerate(steps) if step.k >= wanted), len(steps) - 1)


def _draw(
    drawn: Sequence[Edge], scores: Mapping[Edge, float], places: Mapping[str, str], model: graph.Model, steps: Sequence[Step], losses: Mapping[Edge | str, Estimate], *, start: int
) -> Spec:  # fmt: skip
    """The graph: edges below nodes, with the slider where there is more than one stop."""
    drawing = graph.arrange(drawn, model, places)
    nodes = graph.nodes_of(drawn, model)
    first = {edge: next((i for i, s in enumerate(steps) if rank < s.k), len(steps)) for rank, edge in enumerate(drawn)}
    born = {name: min(i for edge, i in first.items() if name in (edge.sender.name, model.target(edge.receiver))) for name in nodes}
    top = max((abs(v) for v in (scores.get(e, np.nan) for e in drawn) if v == v), default=0.0) or 1.0
    data = [_edge(edge, scores.get(edge, float("nan")), top, drawing, model, losses.get(edge), places) for edge in drawn]
    appear = [first[edge] for edge in drawn]
    for a, b in graph.shares(nodes, model):
        data.append({"type": "scatter", "mode": "lines", "x": [drawing.at[a][0], drawing.at[b][0]], "y": [drawing.at[a][1], drawing.at[b][1]], "hoverinfo": "skip",
                     "line": {"color": RANDOM, "width": 1.2}, "showlegend": False, "name": f"{a} shared"})  # fmt: skip
        appear.append(max(born[a], born[b]))
    for name, (kind, _, _) in nodes.items():
        data.append(_node(name, kind, drawing.at[name], places, model, losses.get(name)))
        appear.append(born[name])
    opacity = [
        [_DEAD if k < len(drawn) and drawn[k] not in step.live else 0.85 if k < len(drawn) else 1.0 for k in range(len(data))]
        for step in steps
    ]
    shown = [[a <= i for a in appear] for i in range(len(steps))]
    if steps:
        for trace, visible, opaque in zip(data, shown[start], opacity[start], strict=True):
            trace |= {"visible": visible, "opacity": opaque}
    layout = _frame(drawing, steps, shown, opacity, start)
    return {"data": data + _legend(drawn), "layout": layout}


def _edge(
    edge: Edge, score: float, top: float, drawing: graph.Drawing, model: graph.Model, loss: Estimate | None, places: Mapping[str, str]
) -> Spec:
    """One edge as a line; a minus sign in its middle where its score is below zero."""
    x, y = graph.path(edge, drawing, model)
    colour, dash, means = KINDS[edge.receiver.kind]
    shared = f" (shared by {model.n_heads // model.n_key_value_heads} heads)" if edge.receiver.kind in ("k", "v") and model.grouped else ""
    place = f"<br>{edge.sender.name} acts at: {words(places[edge.sender.name])}" if places.get(edge.sender.name) else ""
    lost = f"<br>lost when it alone is dropped: {interval(loss)}" if loss is not None else ""
    trace: Spec = {
        "type": "scatter", "mode": "lines", "x": x, "y": y, "name": edge.name, "showlegend": False, "cliponaxis": False,
        "line": {"color": colour, "dash": dash, "width": round(1.2 + 5.8 * (abs(score) / top if score == score else 0.0), 2)},
        "hovertemplate": f"<b>{arrow(edge)}</b>{shared}<br>{means}; score {number(score, 3)}{place}{lost}<extra></extra>",
    }  # fmt: skip
    if score < 0:
        trace |= {
            "mode": "lines+text",
            "text": [""] * (len(x) // 2) + ["<b>\u2212</b>"] + [""] * (len(x) - len(x) // 2 - 1),
            "textfont": {"size": 15},
        }
    return trace


def _node(name: str, kind: str, at: tuple[float, float], places: Mapping[str, str], model: graph.Model, loss: Estimate | None) -> Spec:
    symbol, colour, size, ink = _NODES[kind]
    what = {"embed": "the embeddings, pictures included", "logits": "the logits at the last token", "mlp": f"the MLP of layer {name.split()[-1]}",
            "kv": f"keys and values {name[3:]}, shared by {model.n_heads // model.n_key_value_heads} query heads", "head": f"head {name}"}[kind]  # fmt: skip
    place = f"<br>acts at: {words(places[name])}" if places.get(name) else ""
    lost = f"<br>lost without it: {interval(loss)}" if loss is not None else ""
    outside = kind in ("embed", "logits")
    return {
        "type": "scatter", "mode": "markers+text", "x": [at[0]], "y": [at[1]], "text": ["" if kind == "kv" else name.split()[-1]], "name": name, "showlegend": False,
        "textposition": "middle right" if outside else "middle center", "textfont": {"size": 11} | ({} if outside else {"color": ink}),
        "marker": {"symbol": symbol, "size": size, "color": colour, "line": {"color": "#ffffff", "width": 1}}, "cliponaxis": False,
        "hovertemplate": f"<b>{what}</b>{place}{lost}<extra></extra>",
    }  # fmt: skip


def _legend(drawn: Sequence[Edge]) -> list[Spec]:
    """What the lines mean: one entry for each kind that is drawn."""
    kinds = [kind for kind in KINDS if any(e.receiver.kind == kind for e in drawn)]
    return [{"type": "scatter", "mode": "lines", "x": [None], "y": [None], "name": KINDS[kind][2], "hoverinfo": "skip", "line": {"color": KINDS[kind][0], "dash": KINDS[kind][1], "width": 3}}
            for kind in kinds]  # fmt: skip


def _frame(drawing: graph.Drawing, steps: Sequence[Step], shown: list[list[bool]], opacity: list[list[float]], start: int) -> Spec:
    """Axes, bands behind the columns, the sentence over the curve, and the slider."""
    wide = max(drawing.width, 1.0)
    bands: list[Spec] = [
        {"type": "rect", "layer": "below", "xref": "x", "yref": "y domain", "x0": left, "x1": right, "y0": 0, "y1": 1, "line": {"width": 0},
         "fillcolor": "rgba(125,135,147,0.09)" if k % 2 == 0 else "rgba(125,135,147,0.02)"}
        for k, (_, _, left, right) in enumerate(drawing.columns)
    ]  # fmt: skip
    title = "" if drawing.by_place else "head"
    top = max(y for _, y in drawing.at.values()) if drawing.at else 1.0
    height = int(min(1100, max(540, 200 + (125 if top < 6 else 90) * (top + 1.6))))
    layout: Spec = {
        "height": height, "hovermode": "closest", "showlegend": True, "shapes": bands, "annotations": [],
        "legend": {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
        "margin": {"t": 120 if drawing.by_place else 100, "b": 150 if len(steps) > 1 else 76, "l": 60},
        "xaxis": {"domain": [0, _LEFT], "range": [-0.3, wide + 0.3], "side": "top", "showgrid": False, "zeroline": False, "ticks": "", "title": {"text": title},
                  "tickvals": [x for x, _, _, _ in drawing.columns], "ticktext": [words(name) for _, name, _, _ in drawing.columns],
                  "tickangle": -30 if drawing.by_place and len(drawing.columns) > 4 else 0},
        "yaxis": {"range": [-1.4, top + 0.4], "showgrid": False, "zeroline": False, "ticks": "", "title": {"text": "layer (information runs upwards)"},
                  "tickvals": [y for y, name in drawing.rows if name], "ticktext": [name for _, name in drawing.rows if name]},
    }  # fmt: skip
    if len(steps) > 1:
        layout["annotations"] = [{"xref": "paper", "yref": "paper", "x": _LEFT + 0.05, "y": 1, "xanchor": "left", "yanchor": "top", "align": "left", "showarrow": False,
                                  "text": steps[start].said, "font": {"size": 13}}]  # fmt: skip
        layout["sliders"] = [{
            "active": start, "x": 0, "len": _LEFT, "xanchor": "left", "y": 0, "yanchor": "top", "pad": {"t": 26, "b": 6}, "ticklen": 4, "minorticklen": 3,
            "currentvalue": {"prefix": "edges: ", "xanchor": "left", "font": {"size": 14}}, "transition": {"duration": 0},
            "steps": [{"label": str(step.k), "method": "update", "value": str(step.k), "args": [
                {"visible": shown[i], "opacity": opacity[i]},
                {"annotations[0].text": step.said, "shapes[0].x0": step.k, "shapes[0].x1": step.k}, list(range(len(shown[i])))]} for i, step in enumerate(steps)],
        }]  # fmt: skip
    return layout
