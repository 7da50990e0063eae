"""The figure of a benchmark's written answers over shots, as a plain plotly dictionary."""

from __future__ import annotations

from collections.abc import Sequence

from mechicl.results import Estimate
from mechicl.results.written import WrittenAnswers
from mechicl.views.captions import Words
from mechicl.views.panels import Panel, level_line, stack, titled
from mechicl.views.theme import CHOSEN, CONTROL, INTACT, LINES, RANDOM
from mechicl.views.words import Spec, words


def written_lines(result: WrittenAnswers) -> Spec:
    """Left: written answers by the published rule and by ours, beside always saying one answer. Right: the most probable candidate, beside copying an example's label."""
    labels = [str(row.shots) for row in result.rows]
    left = [
        _line("published rule", labels, [row.written for row in result.rows], INTACT, "circle", "solid"),
        _line("our rule", labels, [row.ours for row in result.rows], LINES[3], "x", "dot"),
    ]
    right = [
        _line("most probable candidate", labels, [row.likelihood for row in result.rows], CHOSEN, "diamond", "dash"),
        _line("copy an example's label", labels, [row.copied for row in result.rows], RANDOM, "square", "dot"),
    ]
    chance = [Estimate(row.chance, row.chance, row.chance, row.likelihood.n) for row in result.rows]
    right.append(_line("chance", labels, chance, CONTROL, "line-ew", "dot"))
    axis: Spec = {"title": {"text": "shots"}, "type": "category", "categoryorder": "array", "categoryarray": labels}
    share: Spec = {"tickformat": ".0%", "range": [-0.04, 1.04], "zeroline": False}
    panels = [
        Panel(left, axis, {"title": {"text": "right answers"}} | share, f"<b>written</b>; dotted: always {words(repr(result.commonest))}", 300, 30, 64, 11.0,
              shapes=[level_line(result.always.value)]),
        Panel(right, axis, share, "<b>by likelihood</b>", 300, 30, 64, 11.0),
    ]  # fmt: skip
    subtitle = (
        f"{words(result.provenance.model)}, the same n = {result.n} queries at every number of shots, 0 is the control, 95 % intervals"
    )
    return titled(stack([panels], header=84, footer=56, gap=0.1), f"<b>{words(result.task)}</b>: right answers over shots", subtitle)


def about_written(result: WrittenAnswers) -> Words:
    """What stands around `written_lines`."""
    return Words(
        "How often the model's written answer is right by the benchmark's rule and by ours, and how often the right candidate is the most probable one, on the same "
        "queries at every number of shots.",
        f"Read it against the answer that is always the same ({result.commonest!r}, right {100 * result.always.value:.0f} % of the time), against copying the label of any "
        "example, and against no examples. In matching_mi the published rule counts silence as No.",
        f"n = {result.n} queries, {len(result.skipped)} skipped; tests against zero shots: McNemar, Holm.",
    )


def _line(name: str, labels: Sequence[str], found: Sequence[Estimate], colour: str, symbol: str, dash: str) -> Spec:
    """A line with intervals over shots; shots where nothing is known are left open."""
    return {
        "type": "scatter", "mode": "lines+markers", "name": name, "x": list(labels), "y": [e.value for e in found],
        "error_y": {"type": "data", "symmetric": False, "array": [e.high - e.value for e in found], "arrayminus": [e.value - e.low for e in found], "color": colour, "thickness": 1.2, "width": 4},
        "line": {"color": colour, "width": 2.2, "dash": dash}, "marker": {"size": 8, "symbol": symbol, "color": colour},
        "customdata": [[e.low, e.high, e.n] for e in found],
        "hovertemplate": f"<b>%{{x}} shots</b><br>{name}<br>%{{y:.1%}} (%{{customdata[0]:.1%}} to %{{customdata[1]:.1%}}), n = %{{customdata[2]}}<extra></extra>",
    }  # fmt: skip
