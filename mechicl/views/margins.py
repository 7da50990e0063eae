"""Figures of contrastive margins, as plain plotly dictionaries: by head, against the answers, pushed along their direction, and under a learned map.

The arrays in a figure are the arrays of the result.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mechicl.results import ContrastMap, ContrastMargin, Estimate, Head, MarginEffect, MarginPart
from mechicl.views.panels import Panel, cells_panel, estimates, interval, level_line, number, part_words, passes, rows_panel, stack, titled
from mechicl.views.theme import CHANCE, CHOSEN, CONTROL, DIVERGING, INTACT, RANDOM
from mechicl.views.words import ALPHA, Spec, name, words

BASELINE = "attention"


def margin_maps(result: ContrastMargin) -> Spec:
    """Margins of every head, how well each tells right answers from wrong ones (or how it follows the answer's margin), and the best heads against baselines."""
    parts = list(result.parts.values())
    known = any(np.isfinite(part.auroc).any() for part in parts)
    follow = "auroc" if known else "rho"
    top = [_map(part, "value", k, first=k == 0, n=result.n) for k, part in enumerate(parts)]
    below = [_map(part, follow, len(parts) + k, first=k == 0, n=result.n) for k, part in enumerate(parts)]
    last = [_areas(result), _scatter(result)] if known else [_scatter(result)]
    spec = stack([top, below, last], insets=[0.0, 0.0, 0.17 if known else 0.0], header=84, footer=30, gap=[0.05, 0.05, 0.14])
    for k, part in enumerate([*parts, *parts]):
        spec["layout"]["coloraxis" + ("" if k == 0 else str(k + 1))] = _colours(part, "value" if k < len(parts) else follow)
    note = "" if known else f"; no AUROC: {words(result.auroc_reason)}"
    spec["layout"]["meta"] = {"scale": "diverging"}
    subtitle = f"by {words(result.distance)} distance, n = {result.n} episodes, {result.accuracy:.0%} right{note} \u00b7 dot: corrected p < {ALPHA} (Holm); each map has its own scale"
    return titled(spec, "<b>Contrastive margin: is the query nearer to examples of its own label?</b>", subtitle)


def _map(part: MarginPart, key: str, k: int, *, first: bool, n: int) -> Panel:
    """Layer by head, coloured around no effect."""
    array = np.asarray(getattr(part, key), dtype=float)
    low, high = (part.low, part.high) if key == "value" else (getattr(part, f"{key}_low"), getattr(part, f"{key}_high"))
    p = {"value": part.p_corrected, "auroc": part.auroc_p_corrected}.get(key)
    shown = {"value": words(part.unit), "auroc": "AUROC", "rho": "Spearman with the answer's margin"}[key]
    heading = {
        "value": f"<b>{part_words(part.part)}</b>",
        "auroc": "tells right from wrong (AUROC)",
        "rho": "follows the answer (rho)",
    }[key]
    extra = np.stack([low, high, part.null, np.full_like(array, np.nan) if p is None else p], axis=-1)
    hover = (
        f"<b>{part_words(part.part)}, head %{{y}}.%{{x}}</b><br>{shown} %{{z:.3f}} (%{{customdata[0]:.3f}} to %{{customdata[1]:.3f}})"
        + ("<br>null %{customdata[2]:.3f}" if key == "value" else "") + ("" if p is None else "<br>corrected p %{customdata[3]:.2g}") + f"<br>n = {n}<extra></extra>"
    )  # fmt: skip
    layers, heads = array.shape
    return cells_panel(array, [str(i) for i in range(layers)], [str(i) for i in range(heads)], heading, hover=hover, extra=extra, marked=None if p is None else passes(p),
                       what=f"{part.part} {key}", axis="coloraxis" + ("" if k == 0 else str(k + 1)), named=True, slanted=False, wide=10.0,
                       down="layer" if first else "", across="KV head" if part.part in ("k", "v") else "head", digits=_digits(array))  # fmt: skip


def _digits(array: np.ndarray) -> int:
    top = np.nanmax(np.abs(array)) if np.isfinite(array).any() else 1.0
    return 3 if top < 0.1 else 2 if top < 30 else 0


def _colours(part: MarginPart, key: str) -> Spec:
    """Centred on no effect: nought, 0.5 for an area."""
    array, middle = np.asarray(getattr(part, key), dtype=float), 0.5 if key == "auroc" else 0.0
    far = np.abs(array[np.isfinite(array)] - middle)
    least = {"auroc": 0.2, "rho": 0.4}.get(key, 1e-9)
    half = max(least, float(far.max()) if far.size else least)
    return {"colorscale": DIVERGING, "cmin": middle - half, "cmax": middle + half, "cmid": middle, "showscale": False}


def _areas(result: ContrastMargin) -> Panel:
    """Best heads, chosen on the other half of the episodes, beside what needs no key."""
    own = [(part_words(key), part) for key, part in result.parts.items()]
    labels = [f"{label}, best head" for label, _ in own]
    hover = [_gain(part) for _, part in own]
    colours = [CONTROL if key == BASELINE else INTACT for key in result.parts]
    traces = [estimates([label], [part.held_out], label, colour, "diamond" if colour == CONTROL else "circle", hover=[text], legend=False)
              for label, (_, part), colour, text in zip(labels, own, colours, hover, strict=True)]  # fmt: skip
    baselines = [("the model's confidence", result.confidence_auroc), ("answer's margin (ceiling)", result.output_auroc)]
    traces.append(estimates([k for k, _ in baselines], [e for _, e in baselines], "baseline", CONTROL, "diamond", legend=False))
    rows = [*labels, *(k for k, _ in baselines)]
    return rows_panel(traces, rows, "<b>Which margin tells right from wrong?</b>", title="AUROC; the head chosen on other episodes", level=0.5, x={"range": [0.0, 1.04]}, tall=34)  # fmt: skip


def _gain(part: MarginPart) -> str:
    heads = ", ".join(name(h) for h in part.held_out_heads)
    gain = "" if part.held_out_gain is None else f"<br>minus attention {interval(part.held_out_gain)}"
    return f"<br>heads {heads or '?'}{gain}"


def chosen_head(result: ContrastMargin) -> tuple[MarginPart, Head] | None:
    """The head whose margin follows the answer best: by AUROC where it is known, else by Spearman's rho; attention and empty parts left out."""
    found = [(part, head) for key, part in result.parts.items() if key != BASELINE for head in (part.top(1, "auroc") or part.top(1, "rho"))]
    key = "auroc" if any(np.isfinite(part.auroc).any() for part, _ in found) else "rho"
    return max(found, key=lambda item: np.nan_to_num(getattr(item[0], key)[item[1]], nan=-9.0), default=None)


def _scatter(result: ContrastMargin) -> Panel:
    """The best head's margin against the answer's, an episode each: right answers filled circles, wrong ones crosses."""
    best = chosen_head(result)
    traces: list[Spec] = []
    title, heading = "margin of the head", "<b>margin against the answer</b>"
    if best is not None:
        part, head = best
        x = np.asarray(part.per_episode)[:, head[0], head[1]]
        for right, label, symbol, colour in ((True, "right answers", "circle", INTACT), (False, "wrong answers", "x", CHOSEN)):
            at = np.flatnonzero(np.asarray(result.correct, dtype=bool) == right)
            traces.append({"type": "scatter", "mode": "markers", "name": label, "legendgroup": label, "x": x[at], "y": np.asarray(result.output)[at], "marker": {"symbol": symbol, "size": 8, "color": colour, "opacity": 0.75},
                           "hovertemplate": f"{label[:-1]}<br>margin %{{x:.3f}} {words(part.unit)}<br>answer %{{y:.2f}} nats<extra></extra>"})  # fmt: skip
        title = f"margin, {words(part.unit)}"
        heading = f"<b>{part_words(part.part)}, head {name(head)}</b>: rho {number(part.rho[head])} ({number(part.rho_low[head])} to {number(part.rho_high[head])})"
    y: Spec = {"title": {"text": "answer's margin, nats"}, "zeroline": False}
    return Panel(traces, {"title": {"text": title}, "zeroline": False}, y, heading, 240, 34, 54, 10.0, shapes=[level_line(0.0)])  # fmt: skip


def dose_curve(effect: MarginEffect) -> Spec:
    """Change of the answer along the margin's direction with its interval, over the band of random directions of equal norm; accuracy beside it."""
    heads = ", ".join(name(h) for h in effect.heads[:6]) + (f" and {len(effect.heads) - 6} more" if len(effect.heads) > 6 else "")
    x = effect.doses
    hidden: Spec = {"type": "scatter", "mode": "lines", "x": x, "line": {"width": 0}, "hoverinfo": "skip"}
    change: list[Spec] = [
        hidden | {"y": effect.control_high, "showlegend": False, "name": "random high"},
        hidden | {"y": effect.control_low, "fill": "tonexty", "fillcolor": "rgba(125,135,147,0.25)", "name": f"random directions, 95 % ({effect.n_controls} each)"},
        {"type": "scatter", "mode": "lines", "x": x, "y": effect.control, "line": {"color": RANDOM, "width": 2, "dash": "dash"}, "name": "random directions, mean", "legendgroup": "random",
         "hovertemplate": "random, dose %{x}: %{y:+.3f}<extra></extra>"},
        {"type": "scatter", "mode": "lines+markers", "x": x, "y": effect.change, "name": "along the margin", "legendgroup": "margin", "line": {"color": CHOSEN, "width": 2.4}, "marker": {"size": 8},
         "error_y": _bars(effect.change, effect.low, effect.high), "customdata": np.stack([effect.low, effect.high, effect.difference, effect.difference_low, effect.difference_high], axis=-1),
         "hovertemplate": "dose %{x}: %{y:+.3f} (%{customdata[0]:+.3f} to %{customdata[1]:+.3f})<br>minus random %{customdata[2]:+.3f} (%{customdata[3]:+.3f} to %{customdata[4]:+.3f})<br>"
                          f"n = {effect.n}<extra></extra>"},
    ]  # fmt: skip
    right: list[Spec] = [
        {"type": "scatter", "mode": "lines", "x": x, "y": effect.control_accuracy, "line": {"color": RANDOM, "width": 2, "dash": "dash"}, "showlegend": False, "name": "accuracy, random",
         "hovertemplate": "random, dose %{x}: %{y:.1%}<extra></extra>"},
        {"type": "scatter", "mode": "lines+markers", "x": x, "y": effect.accuracy, "line": {"color": CHOSEN, "width": 2.4}, "marker": {"size": 8}, "showlegend": False, "name": "accuracy",
         "hovertemplate": "dose %{x}: %{y:.1%}<extra></extra>"},
    ]  # fmt: skip
    dose: Spec = {"title": {"text": "dose, in margins (\u22121 takes it away, \u22122 reverses it)"}, "zeroline": False}
    panels = [
        Panel(change, dose, {"title": {"text": f"change, {words(effect.unit)}"}, "zeroline": False}, f"<b>change of {words(effect.metric)}</b>", 270, 30, 54, 11.0, shapes=[level_line(0.0), _still()]),
        Panel(right, dose, {"title": {"text": "accuracy"}, "tickformat": ".0%", "range": [-0.03, 1.03]}, "<b>answers with a positive margin</b>", 270, 30, 54, 9.0, shapes=[_still()]),
    ]  # fmt: skip
    spec = stack([panels], header=84, footer=30, gap=0.1)
    subtitle = f"slope {interval(effect.slope)}, random {interval(effect.control_slope)} {words(effect.unit)} per dose; p = {effect.p:.2g} (paired), n = {effect.n} episodes"
    return titled(spec, f"<b>The answer when the margin is moved</b>: {part_words(effect.part)} of {heads}", subtitle)


def _bars(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> Spec:
    return {
        "type": "data",
        "symmetric": False,
        "array": high - value,
        "arrayminus": value - low,
        "color": CHOSEN,
        "thickness": 1.6,
        "width": 4,
    }


def _still() -> Spec:
    """Dose nought: nothing was moved."""
    return {
        "type": "line",
        "xref": "x",
        "yref": "y domain",
        "x0": 0,
        "x1": 0,
        "y0": 0,
        "y1": 1,
        "line": {"color": CHANCE, "width": 1.2, "dash": "dot"},
    }


def map_rows(result: ContrastMap) -> Spec:
    """Scores on episodes that the map was not fitted on, beside plain cosine and a map fitted on shuffled labels; and how it was fitted."""
    rows: list[tuple[str, Estimate | None, str, str]] = [
        ("with the map", result.score, CHOSEN, "circle"), ("plain cosine", result.plain, CONTROL, "diamond"), ("map of shuffled labels", result.shuffled, RANDOM, "square"),
        ("right or wrong, with the map (AUROC)", result.auroc, CHOSEN, "circle"), ("right or wrong, plain cosine (AUROC)", result.plain_auroc, CONTROL, "diamond"),
    ]  # fmt: skip
    there = [(label, e, colour, symbol) for label, e, colour, symbol in rows if e is not None]
    traces = [estimates([label], [e], label, colour, symbol, legend=False) for label, e, colour, symbol in there]
    scores = rows_panel(traces, [label for label, *_ in there], f"<b>{result.n} held-out episodes</b>", title="share of pairs in the right order, or AUROC (dotted: chance)", level=0.5, x={"range": [0, 1.04]}, tall=36)  # fmt: skip
    epochs = np.arange(len(result.curve))
    lines: list[Spec] = [{"type": "scatter", "mode": "lines", "x": epochs, "y": result.curve, "line": {"color": INTACT, "width": 2}, "name": "validation loss",
                          "hovertemplate": "epoch %{x}: %{y:.4f}<extra></extra>", "showlegend": False}]  # fmt: skip
    kept: dict[str, Any] = {"type": "line", "xref": "x", "yref": "y domain", "x0": result.epochs, "x1": result.epochs, "y0": 0, "y1": 1, "line": {"color": CHANCE, "width": 1.4, "dash": "dot"}}  # fmt: skip
    fit = Panel(
        lines,
        {"title": {"text": "epoch (dotted: kept)"}},
        {"title": {"text": "validation loss"}},
        "<b>fit</b>",
        180,
        30,
        54,
        5.0,
        shapes=[kept],
    )
    spec = stack([[scores, fit]], insets=[0.3], header=84, footer=10, gap=0.1)
    subtitle = f"gain over plain cosine {interval(result.gain)}, over a map of shuffled labels {interval(result.above_shuffled)}; fitted on {result.n_train}, stopped on {result.n_validation}, judged on {result.n} episodes"
    titled(spec, f"<b>A learned contrastive map</b> ({words(result.kind)})", subtitle, legend=False)
    spec["layout"]["margin"] |= {"l": 30}
    return spec
