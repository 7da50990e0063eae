"""Small multiples that several figures share, as plain plotly dictionaries: a heat map with labelled rows and columns, and estimates as rows with intervals.

A panel's traces carry no axes; `pack` and `stack` give each panel its own. The arrays in a panel are the arrays of the result.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mechicl.results import Estimate
from mechicl.views.theme import CHANCE, RANDOM
from mechicl.views.words import ALPHA, Spec, words

FITS = 40
"""Rows of a heat map that still carry their numbers and names."""

_ABOVE = 104  # pixels for slanted column names and a heading

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon", "hexagon", "triangle-down")
"""Markers that tell layers or groups apart beside their colour."""

NAMES = {
    "k": "keys",
    "v": "values",
    "q": "queries",
    "qk": "match q \u00b7 k",
    "rot_qk": "match q \u00b7 k after RoPE",
    "attention": "attention",
}
"""Parts of a head as figures call them."""


@dataclass
class Panel:
    """One of the small multiples: its traces (axes to be filled in), its two axes, its heading, pixels for the body and around it, and its share of a row's width."""

    traces: list[Spec]
    x: Spec
    y: Spec
    heading: str
    body: int
    above: int = 30
    below: int = 44
    wide: float = 1.0
    shapes: list[Spec] = field(default_factory=list)


def pack(panels: Sequence[Panel], columns: int, *, header: int = 92, footer: int = 10, gap: float = 0.06) -> Spec:
    """Panels in rows of `columns`, each with axes of its own; the figure's height follows from the pixels that panels ask for."""
    return stack([panels[k : k + columns] for k in range(0, len(panels), columns)], columns=columns, header=header, footer=footer, gap=gap)


def stack(
    rows: Sequence[Sequence[Panel]],
    *,
    columns: int | None = None,
    insets: Sequence[float] = (),
    header: int = 92,
    footer: int = 10,
    gap: float | Sequence[float] = 0.06,
) -> Spec:
    """Rows of panels, each with axes of its own.

    Args:
        rows: Top to bottom, each left to right.
        columns: How many panels a full row has: a shorter one leaves the rest empty. None: every row takes the whole width.
        insets: For each row the share of the width that is left free for the names of its rows.
        header: Pixels for the titles.
        footer: Pixels below, for a legend.
        gap: Between two panels, a share of the width; one number, or one for each row.
    """
    heights = [max(p.above for p in row) + max(p.body for p in row) + max(p.below for p in row) for row in rows]
    plot = float(sum(heights))
    data: list[Spec] = []
    layout: Spec = {
        "annotations": [],
        "shapes": [],
        "height": round(header + footer + plot),
        "margin": {"t": header, "b": footer, "l": 66, "r": 24},
    }
    top, number = plot, 0
    for k, (row, height) in enumerate(zip(rows, heights, strict=True)):
        above = max(p.above for p in row)
        left, full = insets[k] if k < len(insets) else 0.0, columns or len(row)
        between = gap if isinstance(gap, float | int) else gap[k]
        each = (1 - left - between * (full - 1)) / (sum(p.wide for p in row) * full / len(row))
        for panel in row:
            number += 1
            suffix = "" if number == 1 else str(number)
            upper = top - above
            end = min(1.0, left + panel.wide * each)
            layout["xaxis" + suffix] = panel.x | {"domain": [left, end], "anchor": "y" + suffix}
            layout["yaxis" + suffix] = panel.y | {"domain": [(upper - panel.body) / plot, upper / plot], "anchor": "x" + suffix}
            data += [trace | {"xaxis": "x" + suffix, "yaxis": "y" + suffix} for trace in panel.traces]
            layout["shapes"] += [shape | {f"{a}ref": a + suffix + shape.get(f"{a}ref", a)[1:] for a in "xy"} for shape in panel.shapes]
            layout["annotations"].append({"xref": f"x{suffix} domain", "yref": "paper", "x": 0, "y": (upper + panel.above - 24 if panel.above < 60 else upper + panel.above - 30) / plot,
                                          "xanchor": "left", "yanchor": "bottom" if panel.above < 60 else "middle", "align": "left", "showarrow": False, "text": panel.heading, "font": {"size": 13}})  # fmt: skip
            left = end + between
        top -= height
    return {"data": data, "layout": layout}


def part_words(part: str) -> str:
    """A part of a head as figures call it."""
    return NAMES.get(part, words(part))


def number(value: float, digits: int = 2) -> str:
    """A number with a true minus sign; "?" for NaN."""
    return "?" if value != value else f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "\u2212")


def interval(e: Estimate, digits: int = 2) -> str:
    """ "0.91 (0.85 to 0.97)"."""
    return f"{number(e.value, digits)} ({number(e.low, digits)} to {number(e.high, digits)})"


def estimates(
    labels: Sequence[str],
    found: Sequence[Estimate],
    name: str,
    colour: str,
    symbol: str = "circle",
    *,
    filled: Sequence[bool] | None = None,
    hover: Sequence[str] = (),
    legend: bool = True,
    size: int = 10,
) -> Spec:
    """Estimates as points with intervals, a row each; hollow where `filled` is False. Estimates that are NaN stay rows without a point."""
    value = np.array([e.value for e in found], dtype=float)
    low, high = (np.array([getattr(e, end) for e in found], dtype=float) for end in ("low", "high"))
    solid = list(filled) if filled is not None else [True] * len(value)
    return {
        "type": "scatter", "mode": "markers", "name": name, "legendgroup": name, "showlegend": legend, "x": value, "y": list(labels),
        "marker": {"size": size, "symbol": symbol, "color": [colour if f else "rgba(0,0,0,0)" for f in solid], "line": {"color": colour, "width": 2}},
        "error_x": {"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "color": colour, "thickness": 1.6, "width": 4},
        "customdata": [[e.low, e.high, e.n, text] for e, text in zip(found, hover or [""] * len(value), strict=True)],
        "hovertemplate": f"<b>%{{y}}</b><br>{name}<br>%{{x:.3f}} (%{{customdata[0]:.3f}} to %{{customdata[1]:.3f}}), n = %{{customdata[2]}}%{{customdata[3]}}<extra></extra>",
    }  # fmt: skip


def rows_panel(traces: Sequence[Spec], labels: Sequence[str], heading: str, *, title: str, tall: int = 27, x: Spec | None = None, level: float | None = None,
               wide: float = 10.0, named: bool = True, above: int = 30, below: int = 50) -> Panel:  # fmt: skip
    """A panel of rows, the first label on top; `level`: a dotted line, such as chance; `named`: write the labels."""
    shapes = [] if level is None else [upright(level)]
    axis: Spec = {"title": {"text": title}, "zeroline": level != 0, "nticks": 7} | (x or {})
    rows: Spec = {"type": "category", "categoryorder": "array", "categoryarray": list(labels)[::-1], "range": [-0.6, len(labels) - 0.4], "ticks": "",
                  "showticklabels": named}  # fmt: skip
    return Panel(list(traces), axis, rows, heading, max(54, tall * len(labels)), above, below, wide, shapes=shapes)


def upright(at: float, colour: str = CHANCE) -> Spec:
    """A dotted line up a panel."""
    return {"type": "line", "xref": "x", "yref": "y domain", "x0": at, "x1": at, "y0": 0, "y1": 1, "line": {"color": colour, "width": 1.5, "dash": "dot"}}  # fmt: skip


def level_line(at: float, colour: str = CHANCE) -> Spec:
    """A dotted line across a panel."""
    return {"type": "line", "xref": "x domain", "yref": "y", "x0": 0, "x1": 1, "y0": at, "y1": at, "line": {"color": colour, "width": 1.5, "dash": "dot"}}  # fmt: skip


def cells_panel(
    z: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    heading: str,
    *,
    hover: str,
    extra: np.ndarray,
    marked: np.ndarray | None = None,
    below: np.ndarray | None = None,
    what: str,
    down: str = "layer.head",
    across: str = "",
    digits: int = 2,
    axis: str = "coloraxis",
    named: bool = True,
    slanted: bool = True,
    wide: float | None = None,
) -> Panel:
    """A heat map: number in the cell where there is room, dot where `marked`.

    Args:
        z: [row, column], the result's numbers.
        rows: Names, top to bottom.
        columns: Names, left to right.
        heading: Above it.
        hover: plotly's template; `extra` is its customdata.
        extra: [row, column, number].
        marked: Cells that get a dot; None: no dots at all.
        below: Cells that get a hollow triangle that points down: less, not more.
        what: The trace's name.
        down, across: Names of the axes.
        digits: Of the numbers in the cells.
        axis: Colour axis.
        named: Write the rows' names.
        slanted: Columns are words, written above the map at an angle.
        wide: Share of the width; by default by the number of columns.
    """
    large = len(rows) > FITS
    cells: Spec = {"type": "heatmap", "z": z, "customdata": extra, "hovertemplate": hover, "hoverongaps": False, "coloraxis": axis, "name": words(what),
                   "xgap": 2 if len(columns) <= 40 else 0, "ygap": 0 if large else 2}  # fmt: skip
    if len(columns) <= 16 and not large:
        cells |= {"texttemplate": f"%{{z:.{digits}f}}", "textfont": {"size": 10}}
    traces = [cells]
    traces += [_marks(where, k, large) for k, where in enumerate((marked, below)) if where is not None]
    common: Spec = {"showgrid": False, "zeroline": False, "ticks": ""}
    x = common | _named(columns, 16 if not slanted else 60) | {"range": [-0.5, len(columns) - 0.5], "title": {"text": across}}
    x |= {"side": "top", "tickangle": -35} if slanted else {}
    y = common | _named(rows, FITS) | {"range": [len(rows) - 0.5, -0.5], "title": {"text": down if named else ""}, "showticklabels": named}
    tall = float(np.clip(640 / max(1, len(rows)), 3 if large else 18, 28))
    body = max(60, round(tall * len(rows)))
    share = wide or float(np.clip(len(columns), 5, 16))
    return Panel(traces, x, y, heading, body, _ABOVE if slanted else 30, 16 if slanted else 48, share, shapes=_between_layers(rows))


def _marks(where: np.ndarray, less: int, small: bool) -> Spec:
    """Dots on cells, or hollow triangles that point down."""
    at = np.argwhere(where)
    marker: Spec = {"symbol": "circle", "size": 3.5 if small else 5.5, "color": "#111111", "line": {"color": "#ffffff", "width": 1.2}}
    if less:
        marker |= {"symbol": "triangle-down", "size": 4 if small else 7, "color": "#ffffff", "line": {"color": "#111111", "width": 1.2}}
    name = f"{'less, ' if less else ''}corrected p < {ALPHA}"
    return {"type": "scatter", "mode": "markers", "x": [float(c) + 0.38 for _, c in at], "y": [float(r) - 0.3 for r, _ in at], "hoverinfo": "skip", "showlegend": False, "marker": marker,
            "cliponaxis": False, "name": name}  # fmt: skip


def _named(labels: Sequence[str], most: int) -> Spec:
    """Ticks at 0, 1, 2, ... with the labels, thinned to `most`."""
    every = next(s for s in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 100, 200, 10_000) if len(labels) / s <= most)
    at = list(range(0, len(labels), every))
    return {"tickvals": at, "ticktext": [words(str(labels[i])) for i in at]}


def _between_layers(rows: Sequence[str]) -> list[Spec]:
    """A thin line where the layer of "layer.head" changes."""
    layers = [row.partition(".")[0] for row in rows]
    if not all("." in row for row in rows) or len(rows) > FITS:
        return []
    return [
        {"type": "line", "xref": "x domain", "yref": "y", "x0": 0, "x1": 1, "y0": k + 0.5, "y1": k + 0.5, "line": {"color": RANDOM, "width": 1}}
        for k in range(len(rows) - 1) if layers[k] != layers[k + 1]
    ]  # fmt: skip


LINE = 134
"""Characters of a subtitle that fit into a laptop's width."""


def titled(spec: Spec, title: str, subtitle: str, *, legend: bool = True) -> Spec:
    """The figure with its title and a subtitle of as many lines as it needs, the legend (if any) at the bottom."""
    lines = textwrap.wrap(subtitle, LINE, break_long_words=False, break_on_hyphens=False) or [""]
    layout = spec["layout"]
    layout["title"] = {"text": title, "subtitle": {"text": "<br>".join(lines)}}
    layout["height"] += 17 * (len(lines) - 1)
    layout["margin"]["t"] += 17 * (len(lines) - 1)
    layout |= {"legend": {"y": 0, "yref": "container", "yanchor": "bottom"}} if legend else {"showlegend": False}
    return spec


def scaled(spec: Spec, colours: Spec, *, scale: str, low: bool = False) -> Spec:
    """The figure with a colour bar to the right of its maps: beside the first row, or the last one (`low`)."""
    layout = spec["layout"]
    plot = layout["height"] - layout["margin"]["t"] - layout["margin"]["b"]
    place = {"y": 0, "yanchor": "bottom"} if low else {"y": 1 - _ABOVE / plot, "yanchor": "top"}
    bar = {"lenmode": "pixels", "len": 180, "x": 1.01, "xanchor": "left", **place}
    layout |= {"coloraxis": colours | {"colorbar": bar | colours.get("colorbar", {})}, "meta": {"scale": scale}}
    layout["margin"] |= {"r": 84, "l": 74}
    return spec


def head_rows(layers: Sequence[int], heads: Sequence[int]) -> list[str]:
    """ "layer.head" of every head, top to bottom."""
    return [f"{layer}.{head}" for layer in layers for head in heads]


def passes(p: Any) -> np.ndarray:
    """Where a corrected p is below `ALPHA`; NaN never passes."""
    return np.nan_to_num(np.asarray(p, dtype=float), nan=1.0) < ALPHA
