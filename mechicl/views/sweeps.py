"""A figure of a sweep's table, as a plain plotly dictionary: a measure over one setting, with lines and panels for others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mechicl.errors import OptionError
from mechicl.views.theme import CHANCE, DASHES, LINES
from mechicl.views.trainings import PERCENT, band, called
from mechicl.views.words import Spec, words

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "triangle-down")


def sweep_lines(
    table: pd.DataFrame,
    x: str,
    measures: Sequence[str],
    color: str | None,
    facet: str | None,
    stat: Any,
    *,
    log_x: bool,
    percent: bool,
    title: str,
    levels: Mapping[str, float],
) -> Spec:
    """See `mechicl.views.plots.plot_sweep`. `stat`: values of the runs of one point -> an Estimate."""
    facets = _levels(table, facet) if facet else [None]
    lines = [(measure, level) for measure in measures for level in (_levels(table, color) if color else [None])]
    places = _levels(table, x)
    numeric = all(isinstance(v, int | float | np.integer | np.floating) and not isinstance(v, bool | np.bool_) for v in places)
    data: list[Spec] = []
    layout: Spec = {}
    notes: list[Spec] = []
    shapes: list[Spec] = []
    counts: list[int] = []
    for f, one in enumerate(facets):
        end = "" if f == 0 else str(f + 1)
        part: Any = table if facet is None else table[_is(table[facet], one)]
        for k, (measure, level) in enumerate(lines):
            rows: Any = part if color is None else part[_is(part[color], level)]
            look = _Look(_label(measure, level, color, len(measures)), k, len(lines), {"xaxis": "x" + end, "yaxis": "y" + end})
            traces, found = _one_line(rows, x, measure, places, numeric, stat, look)
            traces[-2]["showlegend"] = not _drawn(data, look.text)
            data += traces
            counts += found
        layout |= _facet_axes(f, len(facets), x, places, numeric, log_x and numeric, percent, measures)
        across, words_ = _marked_levels(levels, end, f == 0)
        shapes += across
        notes += words_
        if facet is not None:
            notes.append({"xref": f"x{end} domain", "yref": f"y{end} domain", "x": 0, "y": 1, "yshift": 4, "xanchor": "left", "yanchor": "bottom", "showarrow": False,
                          "text": f"<b>{words(facet)} {_words(one)}</b>"})  # fmt: skip
    if percent:
        layout |= _below_zero(data, layout)
    each = f"{min(counts)} to {max(counts)}" if counts and min(counts) != max(counts) else str(counts[0] if counts else 0)
    heading = title or f"{', '.join(called(m) for m in measures)} over {words(x)}"
    return {
        "data": data,
        "layout": layout | {
            "title": {"text": f"<b>{heading}</b>", "subtitle": {"text": f"mean over {each} runs (seeds) a point, 95 % intervals over runs (Student); dots: runs"}},
            "height": 460, "width": 420 + 330 * max(len(facets), 2) - (330 if len(facets) > 2 else 0) // 2, "annotations": notes, "shapes": shapes,
            "margin": {"t": 100}, "legend": {"orientation": "h", "y": -0.22},
        },
    }  # fmt: skip


@dataclass(frozen=True)
class _Look:
    """How the k-th of n lines is drawn."""

    text: str
    k: int
    n: int
    common: Mapping[str, str]

    @property
    def colour(self) -> str:
        return LINES[self.k % len(LINES)]

    @property
    def shift(self) -> float:
        """Among words along the axis lines stand side by side."""
        return (self.k - (self.n - 1) / 2) * min(0.12, 0.6 / self.n)


def _one_line(
    rows: Any, x: str, measure: str, places: Sequence[Any], numeric: bool, stat: Any, look: _Look
) -> tuple[list[Spec], list[int]]:
    """The traces of one line (its band, itself, its runs as dots), and how many runs each point has. Words along the axis are not joined by a line."""
    found = [(i, v, stat(rows.loc[_is(rows[x], v), measure].to_numpy(dtype=float))) for i, v in enumerate(places)]
    found = [(i + look.shift, v, e) for i, v, e in found if e.n]
    at = np.array([v for _, v, _ in found]) if numeric else np.array([i for i, _, _ in found])
    common: Spec = {**look.common, "legendgroup": look.text}
    value, low, high = (np.array([getattr(e, end) for _, _, e in found]) for end in ("value", "low", "high"))
    traces = band(at, low, high, look.colour, 0.16 if look.n < 4 else 0.08, **common) if numeric else []
    line: Spec = {
        "type": "scatter", "mode": "lines+markers" if numeric else "markers", "x": at, "y": value, "name": look.text,
        "line": {"color": look.colour, "width": 2.2, "dash": DASHES[look.k % len(DASHES)]},
        "marker": {"size": 9, "symbol": SYMBOLS[look.k % len(SYMBOLS)], "color": look.colour},
        "customdata": [[e.low, e.high, e.n, _words(v)] for _, v, e in found],
        "hovertemplate": look.text + ", %{customdata[3]}<br>%{y:.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f}), %{customdata[2]} runs<extra></extra>",
    }  # fmt: skip
    if not numeric:
        bars = {"array": np.nan_to_num(high - value), "arrayminus": np.nan_to_num(value - low)}
        line["error_y"] = {"type": "data", "symmetric": False, "color": look.colour, "thickness": 1.8, "width": 5, **bars}
    return [*traces, common | line, common | _runs_of(rows, x, measure, places, numeric, look)], [e.n for _, _, e in found]


def _marked_levels(levels: Mapping[str, float], end: str, named: bool) -> tuple[list[Spec], list[Spec]]:
    """Horizontal lines, with their words in the first panel."""
    shapes = [{"type": "line", "xref": f"x{end} domain", "yref": "y" + end, "x0": 0, "x1": 1, "y0": y, "y1": y, "line": {"color": CHANCE, "width": 1.5, "dash": "dot"}}
              for y in levels.values()]  # fmt: skip
    notes = [{"xref": f"x{end} domain", "yref": "y" + end, "x": 0, "y": y, "xanchor": "left", "yanchor": "bottom", "showarrow": False, "text": words(text),
              "font": {"color": CHANCE, "size": 12}} for text, y in levels.items()] if named else []  # fmt: skip
    return shapes, notes


def _runs_of(rows: Any, x: str, measure: str, places: Sequence[Any], numeric: bool, look: _Look) -> Spec:
    """Every run as a dot."""
    kept = rows[rows[measure].notna() & rows[x].notna()]
    at = kept[x].to_numpy() if numeric else np.array([list(places).index(v) + look.shift for v in kept[x]])
    return {"type": "scatter", "mode": "markers", "x": at, "y": kept[measure].to_numpy(dtype=float), "marker": {"size": 4.5, "color": look.colour, "opacity": 0.45},
            "showlegend": False, "hovertemplate": "one run: %{y:.3f}<extra></extra>"}  # fmt: skip


def _facet_axes(f: int, n: int, x: str, places: Sequence[Any], numeric: bool, log: bool, percent: bool, measures: Sequence[str]) -> Spec:
    end, gap = ("" if f == 0 else str(f + 1)), 0.04
    width = (1 - gap * (n - 1)) / n
    across: Spec = {
        "domain": [f * (width + gap), f * (width + gap) + width],
        "anchor": "y" + end,
        "title": {"text": words(x)},
        "zeroline": False,
    }
    if log:
        across |= {"type": "log"}
    across |= {"tickvals": list(places) if numeric else list(range(len(places))), "ticktext": [_words(v) for v in places]}
    if not numeric:
        across |= {"range": [-0.5, len(places) - 0.5]}
    up: Spec = {"anchor": "x" + end, "zeroline": False}
    if percent:
        up |= PERCENT
    if f == 0:
        up |= {"title": {"text": called(measures[0]) if len(measures) == 1 else "share of answers" if percent else "measure"}}
    else:
        up |= {"matches": "y", "showticklabels": False}
    return {f"xaxis{end}": across, f"yaxis{end}": up}


def _below_zero(data: Sequence[Spec], layout: Spec) -> Spec:
    """The vertical axes, longer where a share above a level (accuracy above copying) is negative: no mean or run is cut off."""
    lowest = min((float(np.nanmin(t["y"])) for t in data if "markers" in t.get("mode", "") and np.isfinite(t["y"]).any()), default=0.0)
    bottom, top = PERCENT["range"]
    return {key: axis | {"range": [min(bottom, lowest - 0.03), top]} for key, axis in layout.items() if key.startswith("yaxis")}


def _drawn(data: Sequence[Spec], text: str) -> bool:
    return any(trace.get("name") == text and len(trace["x"]) for trace in data)


def _levels(table: pd.DataFrame, name: str) -> list[Any]:
    """The values of a setting: numbers in order, words as they come."""
    found = list(dict.fromkeys(table[name].dropna()))
    return sorted(found) if all(isinstance(v, int | float | np.integer | np.floating) for v in found) else found


def _is(column: Any, value: Any) -> Any:
    return column == value


def _words(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:g}"
    return words(str(value))


def _label(measure: str, level: Any, color: str | None, n_measures: int) -> str:
    if color is None:
        return called(measure)
    own = _words(level) if isinstance(level, str) else f"{words(color)} {_words(level)}"
    return own if n_measures == 1 else f"{called(measure)}, {own}"


def check_columns(table: pd.DataFrame, names: Sequence[str | None]) -> None:
    """Raises OptionError for a column that the table does not have."""
    for name in names:
        if name is not None and name not in table.columns:
            raise OptionError(
                f"a column of the table must be one of {', '.join(map(str, table.columns[:30]))}; got {name!r}. Pick one of them."
            )
