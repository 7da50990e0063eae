"""Figures of activation patching, exact and by gradient, as plain plotly dictionaries: a cell for each activation that was exchanged alone.

The arrays in a figure are the arrays of the result. Colours are centred on the run that was patched into, so that a cell without effect has the colour of paper in both
directions; 0 is always the corrupt run and 1 the clean one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mechicl.errors import OptionError
from mechicl.results import Agreement, Attribution, PatchEffects, SiteEffects
from mechicl.views.panels import Panel, pack
from mechicl.views.theme import CHANCE, CHOSEN, DIVERGING, INTACT, RANDOM
from mechicl.views.words import ALPHA, Spec, metric_words, words

MOST = 1.25
"""The colours end this far from the run that was patched into; a cell beyond it has the last colour and its own number."""

LEAST = 0.25
"""They reach at least this far, so that noise stays pale."""

_ROTATED = 84  # pixels for slanted column names


def start_of(direction: str) -> float:
    """Value of the run that was patched into."""
    return 0.0 if direction == "denoise" else 1.0


def _labels(site: SiteEffects) -> tuple[list[Any], list[str], str, str]:
    """Column labels, row labels, and the axes' names: the last axis runs to the right, the others are rows ("2.1" for layer and head)."""
    *rows, last = site.axes or ("",)
    columns = list(site.coords[last]) if site.axes else [site.site]
    names = [""]
    for axis in rows:
        names = [f"{name}.{label}" if name else str(label) for name in names for label in site.coords[axis]]
    return columns, names, last, ".".join(rows)


def _ticks(labels: Sequence[Any], most: int) -> Spec:
    """Ticks at 0, 1, 2, ... with the labels' words; numbers are thinned to `most`, words never."""
    every = (
        1
        if any(isinstance(label, str) for label in labels)
        else next(s for s in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 100, 200, 10_000) if len(labels) / s <= most)
    )
    at = list(range(0, len(labels), every))
    return {"tickvals": at, "ticktext": [words(str(labels[i])) for i in at]}


def significant(site: SiteEffects) -> np.ndarray:
    """Cells whose corrected p is below `ALPHA`, as the two-dimensional grid of the figure."""
    return np.nan_to_num(_grid(site, site.p_corrected), nan=1.0) < ALPHA


def _grid(site: SiteEffects, array: np.ndarray) -> np.ndarray:
    """An array of the site as rows and columns."""
    return array.reshape(-1, array.shape[-1]) if site.axes else array.reshape(1, 1)


def site_panel(site: SiteEffects, *, unit: str) -> Panel:
    """The heat map of one site: number in the cell where there is room, dot where corrected p < 0.05, interval, p and raw mean on hover."""
    columns, rows, across, down = _labels(site)
    raw = np.asarray(site.raw)
    mean = raw.mean(0) if raw.shape[0] else np.full(site.value.shape, np.nan)
    extra = np.stack([_grid(site, np.asarray(a, dtype=float)) for a in (site.low, site.high, site.p, site.p_corrected, mean)], axis=-1)
    named = [f"{axis} %{{{key}}}" for axis, key in ((down, "y"), (across, "x")) if axis and (key == "x" or len(rows) > 1)]
    hover = (
        f"<b>{words(site.site)}, {', '.join(named)}</b><br>%{{z:.3f}} (%{{customdata[0]:.3f}} to %{{customdata[1]:.3f}})<br>"
        f"p %{{customdata[2]:.2g}}, corrected %{{customdata[3]:.2g}}<br>raw mean %{{customdata[4]:.3f}} {words(unit)}, n = {raw.shape[0]}<extra></extra>"
    )
    z = _grid(site, site.value)
    cells: Spec = {"type": "heatmap", "z": z, "customdata": extra, "hovertemplate": hover, "hoverongaps": False, "coloraxis": "coloraxis", "name": words(site.site),
                   "xgap": 2 if len(columns) <= 40 else 0, "ygap": 2 if len(rows) <= 60 else 0}  # fmt: skip
    if len(columns) <= 14 and len(rows) <= 40:
        cells |= {"texttemplate": "%{z:.2f}", "textfont": {"size": 10}}
    where = np.argwhere(significant(site))
    dots: Spec = {
        "type": "scatter", "mode": "markers", "x": [float(c) + 0.36 for _, c in where], "y": [float(r) - 0.32 for r, _ in where], "hoverinfo": "skip", "showlegend": False,
        "marker": {"symbol": "circle", "size": 5.5 if len(columns) <= 40 else 3.5, "color": "#111111", "line": {"color": "#ffffff", "width": 1.3}}, "cliponaxis": False,
        "name": "corrected p < 0.05",
    }  # fmt: skip
    wordy = any(isinstance(c, str) for c in columns)
    common = {"showgrid": False, "zeroline": False, "ticks": ""}
    x = common | _ticks(columns, 16) | {"range": [-0.5, len(columns) - 0.5], "title": {"text": "" if wordy else across}}
    y = (
        common
        | _ticks(rows if down.count(".") or not down else [int(r) if r.lstrip("-").isdigit() else r for r in rows], 40)
        | {"range": [len(rows) - 0.5, -0.5], "title": {"text": down}}
    )
    if wordy:
        x |= {"side": "top", "tickangle": -35}
    count = f"  {int(significant(site).sum())}/{int(np.isfinite(z).sum())}"
    tall = max(18, min(32, 640 // max(1, len(rows))))
    return Panel(
        [cells, dots],
        x,
        y,
        f"<b>{words(site.site)}</b>{count}",
        max(60, tall * len(rows)),
        _ROTATED + 24 if wordy else 30,
        16 if wordy else 46,
        float(np.clip(len(columns), 6, 16)),
    )


def agreement_panel(agreement: Agreement, name: str) -> Panel:
    """Approximate against exact, a dot a cell; filled where the approximation chose the cell, hollow where chance did."""
    a, e = np.asarray(agreement.approximate, dtype=float), np.asarray(agreement.exact, dtype=float)
    ends = np.concatenate([a, e, [0.0]])
    ends = ends[np.isfinite(ends)]
    low, high = float(ends.min()), float(ends.max())
    pad = 0.06 * max(high - low, 1e-9)
    limits = [low - pad, high + pad]
    traces: list[Spec] = [
        {"type": "scatter", "mode": "lines", "x": limits, "y": limits, "hoverinfo": "skip", "line": {"color": RANDOM, "width": 1.4, "dash": "dot"}, "name": "equal", "showlegend": False}
    ]  # fmt: skip
    for chosen, label, symbol in ((False, "ranked high", "circle"), (True, "drawn at random", "circle-open")):
        at = np.flatnonzero(np.asarray(agreement.random, dtype=bool) == chosen)
        if at.size:
            traces.append({"type": "scatter", "mode": "markers", "x": a[at], "y": e[at], "name": label, "text": [words(agreement.names[int(i)]) for i in at],
                           "marker": {"symbol": symbol, "size": 9, "color": INTACT, "line": {"width": 2, "color": INTACT}}, "showlegend": False,
                           "hovertemplate": f"<b>%{{text}}</b> ({label})<br>{words(name)} %{{x:.3f}}, exact %{{y:.3f}}<extra></extra>"})  # fmt: skip
    said = f"Pearson {agreement.pearson:.2f} · Spearman {agreement.spearman:.2f}<br>top {agreement.k}: {agreement.overlap:.0%} shared, {agreement.chance:.0%} by chance (p = {agreement.p:.2g})"
    x = {"title": {"text": f"{words(name)} (filled: ranked high; open: random)"}, "range": limits, "zeroline": True}
    return Panel(
        traces,
        x,
        {"title": {"text": "exact"}, "range": limits, "zeroline": True},
        f"<b>{agreement.n_cells} of {agreement.n_possible} {words(agreement.cells)} run exactly</b><br>{said}",
        280,
        70,
        56,
        8.0,
    )


def colours(values: Sequence[np.ndarray], start: float, *, x: float = 1.02) -> Spec:
    """The colour axis around the run that was patched into, the two runs named on its bar."""
    finite = np.concatenate([np.asarray(v, dtype=float).ravel() for v in values] or [np.zeros(1)])
    finite = finite[np.isfinite(finite)]
    half = min(MOST, max(LEAST, float(np.abs(finite - start).max()) if finite.size else LEAST))
    step = 0.5 if half > 0.9 else 0.25 if half > 0.45 else 0.1
    at = [round(start + step * k, 3) for k in range(-12, 13) if abs(step * k) <= half + 1e-9]
    called = {0.0: "0 corrupt", 1.0: "<b>1 clean</b>"}
    return {"colorscale": DIVERGING, "cmin": start - half, "cmax": start + half, "cmid": start,
            "colorbar": {"tickvals": at, "ticktext": [called.get(v, f"{v:g}".replace("-", "\u2212")) for v in at], "x": x, "xanchor": "left", "lenmode": "pixels", "len": 210, "y": 1, "yanchor": "top", "thickness": 12}}  # fmt: skip


def patch_grids(result: PatchEffects | Attribution, *, sites: Sequence[str] | None = None, columns: int | None = None) -> Spec:
    """Every site as a heat map, all on one scale; an attribution also with its agreement with exact patching.

    Args:
        result: The effects.
        sites: Which sites, in order; all by default.
        columns: Panels side by side; by default two, one where there are many columns.

    Raises:
        OptionError: a site that was not patched.
    """
    names = list(result.sites) if sites is None else list(sites)
    unknown = [name for name in names if name not in result.sites]
    if unknown or not names:
        raise OptionError(
            f"sites must be among those that were patched, {', '.join(result.sites)}; got {unknown or 'none'}. Pick one of them."
        )
    found = [result.sites[name] for name in names]
    panels = [site_panel(site, unit=result.unit) for site in found]
    gradient = isinstance(result, Attribution)
    if gradient and result.agreement is not None:
        panels.append(agreement_panel(result.agreement, result.method))
    widest = max(len(_labels(site)[0]) for site in found)
    columns = columns or (1 if len(panels) == 1 or widest > 20 else 2)
    spec = pack(panels, columns)
    way = {"denoise": "clean activations put into the corrupt run", "noise": "corrupt activations put into the clean run"}[result.direction]
    title = f"<b>{result.method}: patching estimated by gradient</b>" if gradient else "<b>Which activations carry the answer?</b>"
    tests = sum(int(np.isfinite(site.p_corrected).sum()) for site in found)
    correction = {"holm": "Holm", "fdr_bh": "FDR"}.get(result.correction, words(result.correction))
    marks = f" · dot, and the count: corrected p < {ALPHA} ({correction})" if tests else ""
    spec["layout"] |= {
        "title": {"text": title, "subtitle": {"text": f"{way} · {metric_words(result.metric)}, n = {result.n} pairs ({words(result.pairs)}){marks}"}},
        "coloraxis": colours([site.value for site in found], start_of(result.direction)),
        "meta": {"scale": "diverging"},
    }  # fmt: skip
    spec["layout"]["margin"]["r"] = 96
    return spec


def patch_site(result: PatchEffects | Attribution, site: str, *, top: int = 14) -> Spec:
    """One site with its strongest cells and their intervals beside it.

    Raises:
        OptionError: the site was not patched.
    """
    spec = patch_grids(result, sites=[site], columns=1)
    found, start = result.sites[site], start_of(result.direction)
    cells = [found.index(**dict(zip(found.axes, labels, strict=True))) for labels in result.top(site, top)]
    names = [" · ".join(words(str(v)) for v in found.labels(cell).values()) for cell in cells]
    value, low, high, p = (np.array([getattr(found, key)[cell] for cell in cells]) for key in ("value", "low", "high", "p_corrected"))
    spec["data"].append({
        "type": "scatter", "mode": "markers", "x": value, "y": names, "xaxis": "x9", "yaxis": "y9", "name": "strongest cells, 95 % interval", "showlegend": False,
        "error_x": {"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "color": CHOSEN, "thickness": 1.6, "width": 4},
        "marker": {"size": 9, "color": [CHOSEN if v < ALPHA else "rgba(0,0,0,0)" for v in np.nan_to_num(p, nan=1.0)], "line": {"color": CHOSEN, "width": 2}},
        "customdata": np.stack([low, high, p], axis=-1) if cells else [],
        "hovertemplate": "<b>%{y}</b><br>%{x:.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f}), corrected p %{customdata[2]:.2g}<extra></extra>",
    })  # fmt: skip
    layout = spec["layout"]
    layout["xaxis"]["domain"] = [0, 0.52]
    layout["coloraxis"]["colorbar"] |= {"x": 0.53}
    layout["margin"]["r"] = 24
    layout["height"] = max(layout["height"], 190 + 22 * len(cells))
    lines = [
        {
            "type": "line",
            "xref": "x9",
            "yref": "y9 domain",
            "x0": v,
            "x1": v,
            "y0": 0,
            "y1": 1,
            "line": {"color": CHANCE, "width": 1.4, "dash": "dot"},
        }
        for v in (0.0, 1.0)
    ]
    layout["shapes"] = [*layout["shapes"], *lines]
    layout["xaxis9"] = {
        "domain": [0.76, 1],
        "anchor": "y9",
        "title": {"text": "0 corrupt run, 1 clean run"},
        "zeroline": False,
        "nticks": 6,
    }
    layout["yaxis9"] = {
        "anchor": "x9",
        "type": "category",
        "autorange": "reversed",
        "showgrid": False,
        "ticks": "",
        "title": {"text": "strongest cells"},
    }
    if start:
        layout["yaxis9"]["title"]["text"] = "cells that cost most"
    return spec
