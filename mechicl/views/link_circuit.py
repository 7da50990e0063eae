"""Figures of the link's heads as plain plotly dictionaries: one model's circuit, fine-tuned models beside their base, the link against the prior over models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mechicl.results import BuildOrSharpen, Estimate, Graft, LinkCircuit, LinkPriors, Score
from mechicl.views.captions import Words
from mechicl.views.panels import SYMBOLS, Panel, estimates, rows_panel, stack, titled
from mechicl.views.theme import CHOSEN, CONTROL, DASHES, INTACT, LINES, RANDOM
from mechicl.views.words import Spec, words

NAN = float("nan")
EMPTY = Estimate(NAN, NAN, NAN, 0)
ROLES = {"matching": CHOSEN, "gathering": CONTROL, "previous-token": INTACT, "none": RANDOM}
MOST = 16
"""Heads that a figure of one model shows."""


def circuit_rows(result: LinkCircuit) -> Spec:
    """Left: where the best heads look. Middle: how far the answer goes to either twin through each alone. Right: accuracy with each set off, beside random heads."""
    heads = _heads(result)
    names = [f"{layer}.{head}" for layer, head in heads]
    scores = [(words(name), result.held_out[name], colour) for name, colour in zip(result.held_out.scores, LINES, strict=False)]
    left = [estimates(names, [_cell(one, h) for h in heads], name, colour, SYMBOLS[k]) for k, (name, one, colour) in enumerate(scores)]
    middle = [
        estimates(
            names,
            [_cell(one, h) for h in heads],
            f"{words(twin)} exchanged",
            colour,
            symbol,
            filled=[bool(one.p_corrected[h] < 0.05) for h in heads],
        )
        for (twin, one), colour, symbol in zip(result.carried.items(), (LINES[4], LINES[5]), SYMBOLS[3:5], strict=True)
    ]
    sets = [one for one in result.sets if one.ablation is not None]
    rows = [f"{one.kind} ({len(one.heads)})" for one in sets]
    off = [one.ablation.chosen.accuracy for one in sets if one.ablation is not None]
    beside = [one.ablation.random_mean for one in sets if one.ablation is not None]
    right = [estimates(["intact", *rows], [result.accuracy.accuracy, *off], "accuracy", INTACT, "circle"),
             estimates(["intact", *rows], [EMPTY, *beside], "as many random heads off", RANDOM, "square")]  # fmt: skip
    panels = [
        rows_panel(left, names, "<b>where the head looks</b>", title="share of attention", named=True),
        rows_panel(middle, names, "<b>what goes through it alone</b>", title="share of the way to the twin", named=False, level=0.0),
        rows_panel(
            right,
            ["intact", *rows],
            "<b>sets off</b>, held out",
            title="accuracy",
            level=result.accuracy.chance,
            x={"range": [-0.04, 1.04]},
        ),
    ]
    spec = stack([panels[:2], panels[2:]], insets=[0.06, 0.2], header=84, footer=60, gap=0.05)
    subtitle = f"{words(result.provenance.model)}; heads found on n = {result.n_find} episodes, looks and sets on {result.n_prove} others; 95 % intervals; filled: corrected p < 0.05"
    return titled(spec, "<b>Which heads carry the link?</b>", subtitle)


def build_rows(result: BuildOrSharpen) -> Spec:
    """A row for each fine-tuned model: accuracy, its link heads' scores in the base and now, what is lost with the base's weights put back, what is gained in the base."""
    names = [row.name for row in result.rows]
    accuracy = [
        estimates(names, [result.base_accuracy] * len(names), "base", RANDOM, "square"),
        estimates(names, [row.accuracy for row in result.rows], "fine-tuned", INTACT),
    ]
    panels = [
        rows_panel(
            accuracy,
            names,
            "<b>accuracy</b><br>dotted: chance",
            title="held out",
            level=result.chance,
            x={"range": [-0.04, 1.04]},
            above=TWO_LINES,
        )
    ]
    traces = []
    for role in dict.fromkeys(h.role for row in result.rows for h in row.link):
        for side, filled in (("base", False), ("adapted", True)):
            found = [_mean([getattr(h, side) for h in row.link if h.role == role]) for row in result.rows]
            name = f"{'no known role' if role == 'none' else role}, {'in the base' if side == 'base' else 'now'}"
            traces.append(estimates(names, found, name, ROLES[role], SYMBOLS[list(ROLES).index(role)], filled=[filled] * len(names)))
    panels.append(
        rows_panel(
            traces,
            names,
            "<b>its link heads</b><br>mean score",
            title="share of attention",
            x={"range": [-0.06, 1.06]},
            named=False,
            above=TWO_LINES,
        )
    )
    panels += [
        _grafts(result, "adapted", "<b>weights</b><br>the base's, put back", names),
        _grafts(result, "base", "<b>weights</b><br>put into the base", names),
    ]
    for panel in panels[1:]:
        panel.y["showticklabels"] = False
    spec = stack([panels], insets=[0.15], header=84, footer=96, gap=0.035)
    subtitle = f"base {words(result.base_name)}; link heads found on n = {result.n_find} episodes, everything shown on {result.n_prove} others; 95 % intervals over episodes"
    titled(spec, "<b>Was the link built, or sharpened?</b>", subtitle)
    spec["layout"]["margin"] |= {"l": 30}
    return spec


TWO_LINES = 66
"""Pixels above a panel whose heading has two lines."""
WEIGHTS = (
    ("link heads", CHOSEN, "circle"),
    ("all other heads", LINES[4], "diamond"),
    ("attention", INTACT, "square"),
    ("mlps", CONTROL, "triangle-up"),
)


def _grafts(result: BuildOrSharpen, side: str, heading: str, names: Sequence[str]) -> Panel:
    """Change of the margin by grafts, and by those of random heads."""
    traces = []
    for what, colour, symbol in WEIGHTS:
        found = [_graft(row.grafts, side, what) for row in result.rows]
        traces.append(
            estimates(
                names, [g.margin_change if g else EMPTY for g in found], f"weights of {what}", colour, symbol, legend=side == "adapted"
            )
        )
    random = [g.random_margin_change if (g := _graft(row.grafts, side, "link heads")) else np.zeros(0) for row in result.rows]
    spread = [Estimate(float(r.mean()), float(r.min()), float(r.max()), len(r), "nats") if len(r) else EMPTY for r in random]
    traces.append(estimates(names, spread, "weights of random heads, whole range", RANDOM, "x", legend=side == "adapted"))
    return rows_panel(traces, names, heading, title="margin change, nats", level=0.0, named=False, above=TWO_LINES)


def _graft(grafts: Sequence[Graft], side: str, what: str) -> Graft | None:
    return next((g for g in grafts if (g.recipient, g.what, g.letters) == (side, what, "qkvo")), None)


def priors_lines(result: LinkPriors) -> Spec:
    """Left: preference of the link's name over the known one, by shots, a line for each model. Right: the change from the first model."""
    models, shots = result.models, [str(s) for s in dict.fromkeys(row.shots for row in result.rows)]
    left, right = [], []
    for k, model in enumerate(models):
        rows = [row for row in result.rows if row.model == model]
        colour, dash = LINES[k % len(LINES)], DASHES[k // len(LINES) % len(DASHES)]
        left.append(_line(model, shots, [row.preference for row in rows], colour, dash))
        if k:
            right.append(_line(model, shots, [row.change or EMPTY for row in rows], colour, dash) | {"showlegend": False})
    axis: Spec = {"title": {"text": "shots per class"}, "type": "category", "categoryorder": "array", "categoryarray": shots}
    zero: Spec = {
        "type": "line",
        "xref": "x domain",
        "yref": "y",
        "x0": 0,
        "x1": 1,
        "y0": 0,
        "y1": 0,
        "line": {"color": RANDOM, "width": 1.2, "dash": "dot"},
    }
    panels = [
        Panel(
            left,
            axis,
            {"title": {"text": "nats"}, "zeroline": False},
            "<b>log p(link) \u2212 log p(prior)</b>",
            300,
            30,
            64,
            10.0,
            shapes=[zero],
        )
    ]
    if right:
        panels.append(
            Panel(
                right,
                axis,
                {"title": {"text": "nats"}, "zeroline": False},
                f"<b>minus {words(models[0])}</b>, paired",
                300,
                30,
                64,
                10.0,
                shapes=[zero],
            )
        )
    spec = stack([panels], header=84, footer=40 + 20 * -(-len(models) // 5), gap=0.1)
    how = next(iter(result.results.values())).how
    return titled(
        spec,
        "<b>The link against the prior</b>",
        f"known things under other names ({words(how)}), the same n = {result.n} queries in all models; 95 % intervals",
    )


def about_circuit(result: LinkCircuit) -> Words:
    """What stands around `circuit_rows`."""
    return Words(
        "Where each head looks, how far the answer goes over to a twin prompt when this head's output alone is the twin's, and accuracy with sets of heads off. In one twin the labels are "
        "exchanged over the examples, in the other the items are: heads that bring items to labels pass in the second only, heads that join the two in both.",
        "Shares through single heads overlap and do not add up to one. A set that carries the answer need not be needed: others may stand in for it, which is what switching it off tells.",
        f"n = {result.n_find} episodes to find heads, {result.n_prove} to measure; {len(result.skipped)} skipped.",
    )


def about_build(result: BuildOrSharpen) -> Words:
    """What stands around `build_rows`."""
    return Words(
        "Fine-tuned models beside their base. The heads that carry a model's link are found on one half of the episodes; on the other half, where they look in the base and now, and "
        "what becomes of the answers when their weights are exchanged between the two.",
        "A graft that fails does not say that the function was absent: the rest of the model was trained beside other heads. One that works says that it was present. Intervals are "
        "over episodes; several trainings are needed for anything about a strategy.",
        f"n = {result.n_find} episodes to find heads, {result.n_prove} to measure; base {result.base_accuracy.value:.0%}.",
    )


def _line(name: str, x: Sequence[str], found: Sequence[Estimate], colour: str, dash: str) -> Spec:
    value, low, high = (np.array([getattr(e, end) for e in found], dtype=float) for end in ("value", "low", "high"))
    return {
        "type": "scatter", "mode": "lines+markers", "name": words(name), "legendgroup": name, "x": list(x), "y": value, "line": {"color": colour, "width": 2, "dash": dash},
        "marker": {"size": 7, "color": colour}, "customdata": [[e.low, e.high, e.n] for e in found],
        "error_y": {"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "color": colour, "thickness": 1.2, "width": 3},
        "hovertemplate": f"<b>%{{x}}</b><br>{words(name)}<br>%{{y:.2f}} (%{{customdata[0]:.2f}} to %{{customdata[1]:.2f}}) nats, n = %{{customdata[2]}}<extra></extra>",
    }  # fmt: skip


def _heads(result: LinkCircuit) -> list[tuple[int, int]]:
    """Heads of any set, then those that carry most or look most, up to `MOST`."""
    found = list(dict.fromkeys(h for one in result.sets for h in one.heads))
    for one in (*result.carried.values(), *result.held_out.scores.values()):
        found += [h for h in one.top(4) if h not in found]
    return sorted(found[:MOST])


def _cell(one: Score, head: tuple[int, int]) -> Estimate:
    return Estimate(float(one.value[head]), float(one.low[head]), float(one.high[head]), len(one.per_episode), one.unit)


def _mean(found: Sequence[Estimate]) -> Estimate:
    """Mean over heads; the whiskers are from the lowest head's interval to the highest one's."""
    if not found:
        return EMPTY
    return Estimate(float(np.mean([e.value for e in found])), min(e.low for e in found), max(e.high for e in found), found[0].n)
