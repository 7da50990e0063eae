"""Figures of link-context evaluations, as plain plotly dictionaries: accuracy and recalls over settings, and the link against the prior over shots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mechicl.results import Estimate, LinkPrior, LinkScore, LinkScores
from mechicl.views.captions import Words
from mechicl.views.panels import Panel, level_line, stack, titled
from mechicl.views.theme import CHANCE, CHOSEN, CONTROL, INTACT, LINES, RANDOM
from mechicl.views.words import Spec, words

BESIDE = {"nearest prototype": CONTROL, "copy last label": RANDOM}
"""Baselines that are drawn; the others are in the table."""


def link_lines(result: LinkScores) -> Spec:
    """Left: right answers, written and by likelihood, with 95 % intervals, beside baselines and chance. Right: the same for queries of either class apart."""
    labels = [words(row.setting) for row in result.rows]
    written = all(row.accuracy is not None for row in result.rows)
    left = (
        []
        if not written
        else [_line("written, both-names rule", labels, [_known(row.accuracy) for row in result.rows], INTACT, "circle", "solid")]
    )
    left.append(_line("most probable candidate", labels, [row.likelihood for row in result.rows], CHOSEN, "diamond", "dash"))
    if any(row.follows is not None for row in result.rows):
        left.append(_line("follows the labels shown", labels, [_known(row.follows) for row in result.rows], LINES[3], "x", "dot"))
    left += [
        _line(one.name, labels, one.accuracy, BESIDE[one.name], "square", "dot", bars=False)
        for one in result.baselines
        if one.name in BESIDE and not all(e.value != e.value for e in one.accuracy)
    ]
    right = [
        _line(f"recall, {side} class", labels, [_recall(row, side, written) for row in result.rows], colour, symbol, dash, bars=True)
        for side, colour, symbol, dash in (("positive", LINES[6], "triangle-up", "solid"), ("negative", LINES[5], "triangle-down", "dash"))
    ]
    axis: Spec = {"title": {"text": words(result.axis)}, "type": "category", "categoryorder": "array", "categoryarray": labels, "tickangle": 0 if len("".join(labels)) < 50 else -35}  # fmt: skip
    share: Spec = {"tickformat": ".0%", "range": [-0.04, 1.04], "zeroline": False}
    below = 64 if axis["tickangle"] == 0 else 130
    how = "written" if written else "by likelihood"
    panels = [
        Panel(left, axis, {"title": {"text": "right answers"}} | share, f"<b>right answers</b>, dotted: chance of likelihood, {result.chance:.0%}", 300, 30, below, 11.0,
              shapes=[level_line(result.chance)]),
        Panel(right, axis, share, f"<b>by the query's class</b>, {how}", 300, 30, below, 9.0, shapes=[level_line(0.5, CHANCE)]),
    ]  # fmt: skip
    spec = stack([panels], header=84, footer=56, gap=0.09)
    subtitle = f"{words(result.provenance.model)}, {words(result.protocol)}, the same n = {result.n} queries in every setting, 95 % intervals (Wilson)"
    return titled(spec, f"<b>Does the model name by the link?</b> Over {words(result.axis)}", subtitle)


def prior_lines(result: LinkPrior) -> Spec:
    """Left: which name is given, over shots, under new names. Right: the preference of the link's name over the known one, under new and true names."""
    renamed, true = ([row for row in result.rows if row.names == kind] for kind in ("renamed", "true"))
    labels = [str(row.shots) for row in renamed]
    left = [
        _line("the link's name", labels, [row.link for row in renamed], INTACT, "circle", "solid"),
        _line("the name known before", labels, [row.prior for row in renamed], CHOSEN, "diamond", "dash"),
        _line("another name", labels, [row.other for row in renamed], RANDOM, "square", "dot"),
    ]
    right = [
        _line("renamed", labels, [row.preference for row in renamed], LINES[2], "circle", "solid", unit="nats"),
        _line(
            "true names", [str(row.shots) for row in true], [row.preference for row in true], LINES[5], "triangle-up", "dash", unit="nats"
        ),
    ]
    axis: Spec = {"title": {"text": "shots per class"}, "type": "category", "categoryorder": "array", "categoryarray": labels}
    panels = [
        Panel(left, axis, {"title": {"text": "most probable name"}, "tickformat": ".0%", "range": [-0.04, 1.04]}, "<b>known things under new names</b>", 300, 30, 64, 10.0),
        Panel(right, axis, {"title": {"text": "nats"}, "zeroline": False}, "<b>preference</b>: log p(link) \u2212 log p(prior)", 300, 30, 64, 10.0, shapes=[level_line(0.0)]),
    ]  # fmt: skip
    spec = stack([panels], header=84, footer=56, gap=0.1)
    subtitle = f"{words(result.provenance.model)}, new names: {words(result.how)}; {result.known.value:.0%} named rightly without examples, n = {result.n}, 95 % intervals"
    return titled(spec, "<b>Link or prior?</b>", subtitle)


def about_link(result: LinkScores) -> Words:
    """What stands around `link_lines`."""
    return Words(
        "How often the model calls the query by the right name, written greedily (right: the right name is in the answer and, that taken out, no other) and by which candidate is "
        "more probable, on the same queries in every setting. Right panel: queries of the class with the new name, and of the other.",
        "Always saying one name gives half of all answers right: one recall is then 1, the other 0. The nearest prototype sees what the model's eyes see; a decoder "
        "below it loses what it was given, one above it uses more than the mean. Intervals are over episodes, whose classes repeat.",
        f"n = {result.n} episodes, {len(result.skipped)} skipped; chance of likelihood {result.chance:.0%}; tests: McNemar, Holm.",
    )


def about_prior(result: LinkPrior) -> Words:
    """What stands around `prior_lines`."""
    return Words(
        "Things that the model knows get other names in the prompt. Does the answer follow the examples (the link) or what the model knew (the prior)?",
        "Without a prior there is nothing to win against: look at the share named rightly without examples first. Names differ in length and frequency, which "
        "moves the preference as a whole; the change from 0 shots does not have that.",
        f"n = {result.n} episodes; {result.known.value:.0%} named rightly without examples.",
    )


def _known(e: Estimate | None) -> Estimate:
    nan = float("nan")
    return e if e is not None else Estimate(nan, nan, nan, 0)


def _recall(row: LinkScore, side: str, written: bool) -> Estimate:
    return _known(getattr(row, f"{side}_recall" if written else f"likelihood_{side}_recall"))


def _line(
    name: str, labels: Sequence[str], found: Sequence[Estimate], colour: str, symbol: str, dash: str, *, bars: bool = True, unit: str = ""
) -> Spec:
    """A line with intervals over settings in words."""
    value, low, high = (np.array([getattr(e, end) for e in found], dtype=float) for end in ("value", "low", "high"))
    digits = ".3f" if unit else ".1%"
    line: Spec = {
        "type": "scatter", "mode": "lines+markers", "name": words(name), "x": list(labels), "y": value,
        "line": {"color": colour, "width": 2.4 if bars else 1.6, "dash": dash}, "marker": {"size": 9 if bars else 6, "symbol": symbol, "color": colour},
        "customdata": [[e.low, e.high, e.n] for e in found],
        "hovertemplate": f"<b>%{{x}}</b><br>{words(name)}<br>%{{y:{digits}}} (%{{customdata[0]:{digits}}} to %{{customdata[1]:{digits}}}) {unit}, n = %{{customdata[2]}}<extra></extra>",
    }  # fmt: skip
    if bars:
        line["error_y"] = {"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "color": colour, "thickness": 1.6, "width": 4}  # fmt: skip
    return line
