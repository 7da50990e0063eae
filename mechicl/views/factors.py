"""Figures of meaning against form, as plain plotly dictionaries: the plane of shares per head, shares by span, conditions beside answers, tasks, mixed effects.

The arrays in a figure are the arrays of the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mechicl.errors import OptionError
from mechicl.results import ConditionTable, Estimate, FactorShares, MixedEffects, TaskEffects
from mechicl.views.panels import (
    SYMBOLS,
    Panel,
    cells_panel,
    estimates,
    head_rows,
    number,
    part_words,
    passes,
    rows_panel,
    scaled,
    stack,
    titled,
)
from mechicl.views.theme import CHANCE, CHOSEN, CONTROL, INTACT, LINES, RANDOM, SEQUENTIAL, SINGLE
from mechicl.views.words import ALPHA, Spec, words

FIRST = ("last token", "query image", "query open", "query question")
"""Spans that the plane draws, the first two of these that there are."""

NAMED = 10
"""Up to so many heads are named beside their markers; more would stand on one another."""

MOST_LAYERS = len(SYMBOLS)
"""Up to so many layers each has a marker of its own; beyond it colour counts them."""

DEPTH = [[0.0, "#b58900"], [0.5, "#0f8f7e"], [1.0, "#5b5ea6"]]
"""From the first layer to the last, to be seen on light and dark paper."""

TRENDS = {"share k": "share of keys", "share v": "share of values", "accuracy": "accuracy lost"}
PERCENT: Spec = {"tickformat": ".0%", "range": [-0.04, 1.04], "zeroline": True}


def _rule() -> Spec:
    """Where two shares make up the whole."""
    return {"type": "line", "xref": "x", "yref": "y", "x0": 0, "y0": 1, "x1": 1, "y1": 0, "line": {"color": CHANCE, "width": 1.5, "dash": "dot"}}  # fmt: skip


def plane(result: FactorShares, *, spans: Sequence[str] | None = None) -> Spec:
    """Share of meaning against share of form, a marker per head; keys and values side by side, a row per span.

    Args:
        result: Shares; its first two factors are the axes.
        spans: Which; by default the last token and one more.

    Raises:
        OptionError: a span that was not measured, or fewer than two factors.
    """
    if len(result.factors) < 2:
        raise OptionError(
            f'factors must be at least two for a plane; got {", ".join(result.factors) or "none"}. Draw them with show="shares".'
        )
    drawn = list(spans) if spans is not None else ([s for s in FIRST if s in result.spans] or list(result.spans))[:2]
    if not drawn or not set(drawn) <= set(result.spans):
        raise OptionError(
            f"spans must be some of {', '.join(result.spans)}; got {', '.join(drawn) or 'none'}. Pick those that were measured."
        )
    seen: set[str] = set()
    rows = [[_plane(result, p, result.spans.index(span), seen) for p in range(len(result.parts))] for span in drawn]
    many = len(result.layers) > MOST_LAYERS
    spec = stack(rows, header=84, footer=30, gap=0.09)
    x, y = result.factors[:2]
    subtitle = f"shares of the shift's variation over conditions, 95 % intervals, n = {result.n} episodes \u00b7 filled: either share above its null, corrected p < {ALPHA} (Holm)"
    titled(spec, f"<b>{words(x).capitalize()} or {words(y)}: what of the examples moves keys and values?</b>", subtitle)
    if many:
        spec["layout"] |= {
            "coloraxis": {
                "colorscale": DEPTH,
                "cmin": min(result.layers),
                "cmax": max(result.layers),
                "colorbar": {"title": {"text": "layer"}},
            }
        }
    return spec


def _plane(result: FactorShares, p: int, s: int, seen: set[str]) -> Panel:
    """One part at one span; `seen`: what already stands in the legend. Layers that nothing moves are left out."""
    x_name, y_name = result.factors[:2]
    traces: list[Spec] = []
    many, bars = len(result.layers) > MOST_LAYERS, result.moved[..., 0].size <= 80
    for k, layer in enumerate(result.layers):
        at = (p, k, slice(None), s)
        x, y = result.shares[x_name][at], result.shares[y_name][at]
        ends = [(table[name][at]) for name in (x_name, y_name) for table in (result.low, result.high)]
        solid = passes(result.p_corrected[x_name][at]) | passes(result.p_corrected[y_name][at])
        if not np.isfinite(x).any():
            continue
        colour = LINES[k % len(LINES)]
        heads = [f"{layer}.{head}" for head in result.heads]
        extra = np.stack([*ends, result.moved[at], result.common[at]], axis=-1)
        marker: Spec = {"size": 10, "symbol": SYMBOLS[k % len(SYMBOLS)], "color": [colour if f else "rgba(0,0,0,0)" for f in solid], "line": {"color": colour, "width": 2}}  # fmt: skip
        if many:
            marker = {"size": 9, "symbol": ["circle" if f else "circle-open" for f in solid], "color": [layer] * len(heads), "coloraxis": "coloraxis", "line": {"color": RANDOM, "width": 1}}  # fmt: skip
        trace: Spec = {
            "type": "scatter", "mode": "markers+text" if len(result.layers) * len(heads) <= NAMED else "markers", "x": x, "y": y, "text": heads, "textposition": "top right",
            "textfont": {"size": 10}, "name": f"layer {layer}", "legendgroup": f"layer {layer}", "showlegend": f"layer {layer}" not in seen and not many, "marker": marker, "customdata": extra,
            "hovertemplate": f"<b>{part_words(result.parts[p])} of head %{{text}}, {words(result.spans[s])}</b><br>{words(x_name)} %{{x:.1%}} (%{{customdata[0]:.1%}} to %{{customdata[1]:.1%}})<br>"
                             f"{words(y_name)} %{{y:.1%}} (%{{customdata[2]:.1%}} to %{{customdata[3]:.1%}})<br>moved by %{{customdata[4]:.3f}}, any example %{{customdata[5]:.3f}} of its length, n = {result.n}<extra></extra>",
        }  # fmt: skip
        seen.add(f"layer {layer}")
        if bars:
            for axis, value, (low, high) in (("x", x, ends[:2]), ("y", y, ends[2:])):
                trace[f"error_{axis}"] = {"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "color": colour, "thickness": 0.7, "width": 0}  # fmt: skip
        traces.append(trace)
    null = [
        float(np.nanmean(result.null[name][p, ..., s])) if np.isfinite(result.null[name][p, ..., s]).any() else np.nan
        for name in (x_name, y_name)
    ]
    traces.append({"type": "scatter", "mode": "markers", "x": [null[0]], "y": [null[1]], "name": "null: conditions exchanged, mean over heads", "legendgroup": "null", "showlegend": "null" not in seen,
                   "marker": {"symbol": "x-thin", "size": 13, "line": {"color": CHANCE, "width": 3}}, "hovertemplate": f"null<br>{words(x_name)} %{{x:.1%}}, {words(y_name)} %{{y:.1%}}<extra></extra>"})  # fmt: skip
    seen.add("null")
    x_axis = PERCENT | {"title": {"text": f"{words(x_name)}, share"}}
    y_axis = PERCENT | {"title": {"text": f"{words(y_name)}, share" if p == 0 else ""}}
    return Panel(traces, x_axis, y_axis, f"<b>{part_words(result.parts[p])}</b> \u00b7 {words(result.spans[s])}", 300, 34, 56, 10.0, shapes=[_rule()])  # fmt: skip


def share_maps(result: FactorShares) -> Spec:
    """Every source of variation by layer, head and span: keys above, values below."""
    rows = []
    for p, part in enumerate(result.parts):
        row = []
        for k, source in enumerate(result.sources):
            flat = [np.asarray(table[source][p], dtype=float).reshape(-1, len(result.spans)) if source in table else None
                    for table in (result.shares, result.low, result.high, result.null, result.p_corrected)]  # fmt: skip
            blank = np.full_like(flat[0], np.nan)  # type: ignore[arg-type]
            share, low, high, null, p_value = (blank if a is None else a for a in flat)
            hover = (
                f"<b>{words(source)}: {part_words(part)} of head %{{y}}, %{{x}}</b><br>%{{z:.1%}} (%{{customdata[0]:.1%}} to %{{customdata[1]:.1%}})<br>"
                f"null %{{customdata[2]:.1%}}, corrected p %{{customdata[3]:.2g}}, n = {result.n}<extra></extra>"
            )
            row.append(cells_panel(share, head_rows(result.layers, result.heads), result.spans, f"<b>{part_words(part)}</b> \u00b7 {words(source)}", hover=hover,
                                   extra=np.stack([low, high, null, p_value], axis=-1), marked=passes(p_value), what=f"{part} {source}", named=k == 0, down="layer.KV head"))  # fmt: skip
        rows.append(row)
    spec = stack(rows, header=84, gap=0.03)
    subtitle = f"of the variation over conditions, n = {result.n} episodes; the shares of a cell sum to one \u00b7 dot: above its null, corrected p < {ALPHA} (Holm)"
    titled(spec, "<b>Shares of meaning, form and what is left</b>", subtitle, legend=False)
    return scaled(spec, {"colorscale": SEQUENTIAL, "cmin": 0, "cmax": 1, "colorbar": {"tickformat": ".0%"}}, scale="sequential")


def condition_words(condition: str) -> str:
    """ "kept+broken" as a row's name."""
    return words(condition.replace("+", " + "))


def answer_rows(result: FactorShares) -> Spec:
    """Accuracy and margin under every condition, beside the pooled shares of keys and values."""
    labels = [condition_words(c) for c in result.conditions]
    accuracy = rows_panel([estimates(labels, [result.accuracy[c] for c in result.conditions], "accuracy", INTACT, legend=False)], labels, "<b>accuracy</b>",
                          title=f"right label among the candidates (dotted: chance {result.chance:.0%})", x=PERCENT | {"zeroline": False}, level=result.chance)  # fmt: skip
    margin = rows_panel([estimates(labels, [result.margin[c] for c in result.conditions], "margin", INTACT, legend=False)], labels, "<b>margin</b>", title="right label minus best wrong, nats",
                        level=0.0, named=False)  # fmt: skip
    sources = [words(s) for s in result.sources]
    shares = [estimates(sources, [result.pooled[part][s] for s in result.sources], part_words(part), colour, symbol)
              for part, colour, symbol in zip(result.parts, (INTACT, CHOSEN), ("circle", "diamond"), strict=False)]  # fmt: skip
    pooled = rows_panel(
        shares, sources, "<b>shares over all heads, layers and spans</b>", title="share of the shift's variation over conditions", x=PERCENT
    )
    spec = stack([[accuracy, margin], [pooled]], insets=[0.2, 0.2], header=84, footer=30, gap=0.06)
    order = " + ".join(words(f) for f in result.factors)
    titled(spec, "<b>What each condition does to the answer</b>", f"conditions are {order}; 95 % intervals, n = {result.n} episodes")
    spec["layout"]["margin"] |= {"l": 30}
    return spec


def condition_rows(table: ConditionTable) -> Spec:
    """Tasks under every condition, what each factor costs beside its shares, and whether meaning counts more where a task is hard."""
    tasks = {task.task: task for task in table.tasks}
    ordered = [row for name in tasks for row in table.rows if row.task == name]
    labels = [f"{words(row.task)} \u00b7 {condition_words(row.condition)}" for row in ordered]
    right, sure = ([getattr(row, key) for row in ordered] for key in ("accuracy", "margin"))
    hover = [f"<br>chance {tasks[row.task].chance:.0%}, difficulty {number(tasks[row.task].difficulty.value)}" for row in ordered]
    chance = {task.chance for task in table.tasks}
    top = [rows_panel([estimates(labels, right, "accuracy", INTACT, hover=hover, legend=False)], labels, "<b>accuracy</b>", title="right label among the candidates",
                      x=PERCENT | {"zeroline": False}, level=next(iter(chance)) if len(chance) == 1 else None, tall=22),
           rows_panel([estimates(labels, sure, "margin", INTACT, legend=False)], labels, "<b>margin</b>", title="right label minus best wrong, nats", level=0.0, tall=22, named=False)]  # fmt: skip
    names = [f"{words(task.task)} (difficulty {number(task.difficulty.value)})" for task in table.tasks]
    colours, symbols = (INTACT, CHOSEN, CONTROL, *LINES), ("circle", "diamond", "square", "triangle-up")
    cost = [
        estimates(names, [task.cost[f] for task in table.tasks], words(f), colours[k % 8], symbols[k % 4])
        for k, f in enumerate(table.factors)
    ]
    middle = [rows_panel(cost, names, "<b>what changing it costs</b>", title="accuracy lost", level=0.0, x={"tickformat": ".0%"}, tall=34)]
    parts = list(table.tasks[0].shares) if table.tasks else []
    for part in parts:
        traces = [
            estimates(names, [_share(task, part, f) for task in table.tasks], words(f), colours[k % 8], symbols[k % 4], legend=False)
            for k, f in enumerate(table.factors)
        ]
        middle.append(
            rows_panel(traces, names, f"<b>shares: {part_words(part)}</b>", title="share of the variation", x=PERCENT, tall=34, named=False)
        )
    trends = [f"{TRENDS.get(name, words(name))}: {words(table.finding.get(name, ''))}" for name in table.trend]
    bottom = rows_panel([estimates(trends, list(table.trend.values()), "trend", SINGLE, legend=False)], trends, "<b>does meaning minus form grow with difficulty?</b>",
                        title="growth from difficulty 0 to 1", level=0.0) if trends else None  # fmt: skip
    spec = stack([top, middle, *([[bottom]] if bottom else [])], insets=[0.24, 0.24, 0.24], header=84, footer=30, gap=0.04)
    titled(
        spec, "<b>Meaning on hard tasks, form on easy ones?</b>", f"{words(table.verdict)} n = {table.n}, 95 % intervals; ours throughout"
    )
    spec["layout"]["margin"] |= {"l": 30}
    return spec


def _share(task: TaskEffects, part: str, factor: str) -> Estimate:
    nan = float("nan")
    return task.shares.get(part, {}).get(factor, Estimate(nan, nan, nan, task.n))


def mixed_rows(fit: MixedEffects) -> Spec:
    """Fixed effects with their intervals, and how much of the rest is between groups."""
    labels = [words(name) for name in fit.fixed]
    filled = [bool(fit.p.get(name, 1.0) < ALPHA) for name in fit.fixed]
    hover = [f"<br>p {fit.p.get(name, float('nan')):.2g}" for name in fit.fixed]
    panel = rows_panel([estimates(labels, list(fit.fixed.values()), "fixed effect", INTACT, filled=filled, hover=hover, legend=False)], labels, "<b>fixed effects</b>", title=words(fit.response),
                       level=0.0)  # fmt: skip
    random = "; ".join(f"variance of {words(name)} {number(v, 4)}" for name, v in fit.random.items())
    bad = "" if fit.converged else "<b>did not converge: not to be read</b> \u00b7 "
    edge = " (at nought)" if fit.boundary else ""
    spec = stack([[panel]], insets=[0.26], header=84, footer=14)
    subtitle = f"{bad}{random}{edge}, residual {number(fit.residual, 4)}; n = {fit.n} in {fit.n_groups} groups ({words(fit.groups)}); Wald 95 % \u00b7 filled: p < {ALPHA}"
    titled(spec, f"<b>Mixed effects</b>: {words(fit.formula)}", subtitle, legend=False)
    spec["layout"]["height"] = max(260, spec["layout"]["height"])
    spec["layout"]["margin"] |= {"l": 30}
    return spec
