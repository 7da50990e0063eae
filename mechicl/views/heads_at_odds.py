"""Figure of induction heads against function-vector heads, as plain plotly dictionaries: both scores, what is lost over doses, and every setting apart."""

from __future__ import annotations

import numpy as np

from mechicl.results import HeadsAtOdds, OddsRow
from mechicl.views.captions import Words
from mechicl.views.panels import Panel, estimates, interval, level_line, number, rows_panel, stack, titled
from mechicl.views.theme import CHANCE, CHOSEN, INTACT, RANDOM
from mechicl.views.words import ALPHA, Spec, words

COLOURS = {"induction": INTACT, "function vector": CHOSEN}
SYMBOLS = {"induction": "circle", "function vector": "diamond"}


def odds(result: HeadsAtOdds) -> Spec:
    """Above: the two scores of every head; accuracy lost over doses, all settings together. Below: each setting at the main dose, the other kind left in."""
    how = result.hows[0]
    panels = [[_scores(result), _doses(result, how)]]
    below = _settings(result, how)
    spec = stack([*panels, *([below] if below else [])], insets=[0.0, 0.2], header=96, footer=84, gap=[0.11, 0.04])
    title = "<b>Induction heads or function-vector heads?</b>"
    return titled(
        spec,
        title,
        f"{words(result.provenance.model)}, {words(how)} ablation, n = {result.n} episodes on functions that no head was chosen on, 95 % intervals. {words(_short(result))}",
    )


def _short(result: HeadsAtOdds) -> str:
    return f"Verdict at {result.main_dose:g} % of the heads: {result.side}." if result.rows else "Nothing was switched off."


def _scores(result: HeadsAtOdds) -> Panel:
    """A point per head, one trace for each kind it is among the top of."""
    x, y = result.induction.value, result.function_vector.value
    tops = {kind: set(result.row(kind).heads) for kind in COLOURS} if result.rows else {kind: set() for kind in COLOURS}
    groups = [
        ("top of both", lambda h: all(h in some for some in tops.values()), CHANCE, "star"),
        ("top by induction", lambda h: h in tops["induction"], INTACT, "circle"),
        ("top by function vector", lambda h: h in tops["function vector"], CHOSEN, "diamond"),
        ("other heads", lambda h: True, RANDOM, "circle-open"),
    ]
    left = {(int(a), int(b)) for a, b in np.ndindex(*x.shape) if x[a, b] == x[a, b] and y[a, b] == y[a, b]}
    traces: list[Spec] = []
    for name, has, colour, symbol in groups:
        some = sorted(head for head in left if has(head))
        left -= set(some)
        if some:
            traces.append(_points(result, some, name, colour, symbol))
    note = "none" if not result.passing.get("function vector") else str(len(result.passing["function vector"]))
    heading = f"<b>every head's two scores</b><br>above their null: {len(result.passing.get('induction', ()))} by induction, {note} by function vector"
    return Panel(traces, {"title": {"text": "induction score (attention)"}, "zeroline": True}, {"title": {"text": "function-vector score (probability)"}, "zeroline": True},
                 heading, 270, 44, 64, 10.0)  # fmt: skip


def _points(result: HeadsAtOdds, some: list[tuple[int, int]], name: str, colour: str, symbol: str) -> Spec:
    a, b = result.induction, result.function_vector
    return {
        "type": "scatter", "mode": "markers", "name": name, "x": [float(a.value[h]) for h in some], "y": [float(b.value[h]) for h in some],
        "marker": {"size": 9, "symbol": symbol, "color": colour, "line": {"width": 1.5, "color": colour}}, "showlegend": colour in (RANDOM, CHANCE),
        "error_y": {"type": "data", "symmetric": False, "array": [float(b.high[h] - b.value[h]) for h in some], "arrayminus": [float(b.value[h] - b.low[h]) for h in some],
                    "thickness": 1, "width": 2, "color": colour},
        "customdata": [[f"{h[0]}.{h[1]}", float(a.p_corrected[h]), float(b.p_corrected[h]), float(b.null[h])] for h in some],
        "hovertemplate": "<b>head %{customdata[0]}</b><br>induction %{x:.3f} (corrected p %{customdata[1]:.2g})<br>function vector %{y:.4f} "
                         "(null %{customdata[3]:.4f}, corrected p %{customdata[2]:.2g})<extra></extra>",
    }  # fmt: skip


def _doses(result: HeadsAtOdds, how: str) -> Panel:
    """Change of accuracy over the number of heads off; dashed: the other kind's top heads left in."""
    traces: list[Spec] = []
    for kind, colour in COLOURS.items():
        for excluded in (False, True):
            some = [row for row in result.rows if (row.task, row.how, row.kind, row.excluded) == ("all", how, kind, excluded)]
            if some:
                traces.append(_curve(some, colour, SYMBOLS[kind], excluded))
    for kind, colour in COLOURS.items():
        some = [row for row in result.rows if (row.task, row.how, row.kind, row.excluded) == ("all", how, kind, False) and row.n_random]
        if some:
            traces.append(_random(some, colour))
    ks = sorted({(row.k, row.dose) for row in result.rows})
    x: Spec = {
        "title": {"text": "heads off"},
        "tickvals": list(range(len(ks))),
        "ticktext": [f"{k} ({dose:g} %)" for k, dose in ks],
        "zeroline": False,
    }
    return Panel(traces, x, {"title": {"text": "change of accuracy"}, "zeroline": False}, "<b>all settings together</b><br>over doses", 270, 44, 64, 10.0,
                 shapes=[level_line(0.0, RANDOM)])  # fmt: skip


def _curve(some: list[OddsRow], colour: str, symbol: str, excluded: bool) -> Spec:
    changes = [row.change for row in some]
    other = "function vector" if some[0].kind == "induction" else "induction"
    name = f"{some[0].kind} heads off" + (f", {other} left in" if excluded else "")
    shift = (0.03 if excluded else 0.0) * (1 if some[0].kind == "induction" else -1)
    return {
        "type": "scatter", "mode": "lines+markers", "name": name, "x": [i + shift for i in range(len(some))], "y": [e.value for e in changes],
        "line": {"color": colour, "width": 2.2, "dash": "dash" if excluded else "solid"},
        "marker": {"size": 9, "symbol": symbol + ("-open" if excluded else ""), "color": colour},
        "error_y": {"type": "data", "symmetric": False, "array": [e.high - e.value for e in changes], "arrayminus": [e.value - e.low for e in changes], "thickness": 1.4, "width": 4, "color": colour},
        "customdata": [[row.k, row.p_corrected, row.finding, " ".join(f"{a}.{b}" for a, b in row.heads[:8])] for row in some],
        "hovertemplate": f"<b>{name}</b><br>%{{customdata[0]}} heads: %{{y:.3f}}, corrected p %{{customdata[1]:.2g}}<br>%{{customdata[2]}}<br>%{{customdata[3]}}<extra></extra>",
    }  # fmt: skip


def _random(some: list[OddsRow], colour: str) -> Spec:
    """The mean over matched random sets with their central 95 %."""
    low, mean, high = (np.array([getattr(row, f"random_{end}") for row in some]) for end in ("low", "change", "high"))
    shift = 0.07 if some[0].kind == "induction" else -0.07
    return {
        "type": "scatter", "mode": "markers+lines", "name": "as many random heads", "showlegend": some[0].kind == "induction", "x": [i + shift for i in range(len(some))], "y": mean,
        "line": {"color": RANDOM, "width": 1.4, "dash": "dot"}, "marker": {"size": 7, "symbol": "x-thin-open", "color": colour, "line": {"width": 1.6, "color": colour}},
        "error_y": {"type": "data", "symmetric": False, "array": high - mean, "arrayminus": mean - low, "thickness": 1, "width": 3, "color": RANDOM},
        "customdata": [[row.k, row.n_random, row.p_random] for row in some],
        "hovertemplate": "<b>%{customdata[1]} random sets of %{customdata[0]}</b><br>%{y:.3f}, p of the chosen set %{customdata[2]:.3f}<extra></extra>",
    }  # fmt: skip


def _settings(result: HeadsAtOdds, how: str) -> list[Panel]:
    """Every setting at the main dose, a panel for each kind."""
    rows = [row for row in result.rows if row.how == how and row.dose == result.main_dose and row.excluded and row.task != "all"]
    beside = {(s.task, s.shots): s for s in result.settings}
    panels = []
    for kind, colour in COLOURS.items():
        some = [row for row in rows if row.kind == kind]
        if not some:
            return []
        labels = []
        for row in some:
            accuracy = beside[row.task, row.shots].accuracy
            intact = "" if accuracy is None else f" (intact {number(accuracy.value)})"
            labels.append(words(f"{row.task}, {row.shots} {'shot' if row.shots == 1 else 'shots'}{intact}"))
        hover = [f"<br>{row.finding}, corrected p {row.p_corrected:.2g}" for row in some]
        points = estimates(labels, [row.change for row in some], f"{kind} heads off", colour, SYMBOLS[kind], filled=[row.p_corrected < ALPHA for row in some], hover=hover, legend=False)  # fmt: skip
        random: Spec = {
            "type": "scatter", "mode": "markers", "name": "random", "showlegend": False, "x": [row.random_change for row in some], "y": labels,
            "marker": {"size": 8, "symbol": "x-thin-open", "color": RANDOM, "line": {"width": 1.8, "color": RANDOM}},
            "hovertemplate": "<b>%{y}</b><br>mean of as many random heads %{x:.3f}<extra></extra>",
        }  # fmt: skip
        points.pop("legendgroup")  # a group would turn the legend upright
        other = next(one for one in COLOURS if one != kind)
        heading = f"<b>{some[0].k} {kind} heads off</b><br>{other} heads left in"
        panels.append(
            rows_panel(
                [random, points],
                labels,
                heading,
                title="change of accuracy",
                tall=26,
                level=0.0,
                above=66,
                named=not panels,
                x={"range": _range(rows)},
            )
        )
    return panels


def _range(rows: list[OddsRow]) -> list[float]:
    """One axis for both panels."""
    low, high = min(row.change.low for row in rows), max(row.change.high for row in rows)
    return [min(low, 0.0) - 0.05, max(high, 0.0) + 0.05]


def about_odds(result: HeadsAtOdds) -> Words:
    """What stands around `odds`."""
    overlap = result.overlaps.get(result.main_dose)
    shared = "" if overlap is None else (
        f"Both rankings share {len(overlap.shared)} of {overlap.k} heads ({overlap.expected:.1f} by chance, p = {overlap.p:.2g}); rank correlation of the scores {overlap.spearman:.2f}. "
    )  # fmt: skip
    contrast = next(
        (c for c in result.contrasts if c.task == "all" and c.how == result.hows[0] and c.dose == result.main_dose and c.excluded), None
    )
    beside = (
        ""
        if contrast is None
        else f"Induction against function-vector heads, the other kind left in: {interval(contrast.difference)} more lost, corrected p = {contrast.p_corrected:.2g}."
    )
    return Words(
        "Heads are ranked by how much more they attend to right than to wrong labels (induction) and by how much of the answer their mean output brings to a prompt whose labels are shuffled "
        "(function vector), then switched off on other functions of the tasks. Dashed: the top heads of the other ranking are left in.",
        "A head at the top of the function-vector ranking is no function-vector head unless its score is above its null; a set may cost accuracy because it feeds the other kind. "
        "Switching off a large share of a small model's heads leaves few to compare with: look at the random sets.",
        f"{shared}{beside} n = {result.n} episodes; p: McNemar, Holm; random sets matched by layer.",
    )
