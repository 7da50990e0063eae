"""Figure of ways to choose the examples, as a plain plotly dictionary: accuracy, AUROC and F1, and the paired differences from a baseline."""

from __future__ import annotations

import numpy as np

from mechicl.results import Estimate, Strategies
from mechicl.results.anchored import StrategyScore
from mechicl.views.panels import Panel, estimates, rows_panel, stack, titled
from mechicl.views.theme import CHOSEN, CONTROL, INTACT, LINES
from mechicl.views.words import ALPHA, Spec, words

MEASURES = (("accuracy", "accuracy"), ("auroc", "AUROC"), ("f1", "F1"))
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star")


def strategy_rows(result: Strategies) -> Spec:
    """Above: every way with its intervals; below: the same minus the baseline on the same queries. Filled: its answers differ from the baseline's (McNemar, Holm)."""
    kinds = list(dict.fromkeys(row.kind for row in result.rows))
    labels = [words(row.strategy) for row in result.rows]
    top = [_panel(result, result.rows, kinds, key, called, labels, change=False, named=k == 0) for k, (key, called) in enumerate(MEASURES)]
    others = [row for row in result.rows if row.accuracy_change is not None]
    bottom = [
        _panel(result, others, kinds, f"{key}_change", called, [words(row.strategy) for row in others], change=True, named=k == 0)
        for k, (key, called) in enumerate(MEASURES)
    ]
    spec = stack([top, *([bottom] if others else [])], insets=[0.19, 0.19], header=84, footer=30, gap=0.04)
    negative, positive = result.labels
    subtitle = f"{words(positive)} or {words(negative)}, n = {result.n} queries, 95 % intervals \u00b7 filled: other answers than {words(result.baseline)}, McNemar p < {ALPHA} (Holm)"
    titled(spec, "<b>Which examples help?</b>", subtitle)
    spec["layout"]["margin"] |= {"l": 30}
    return spec


def _panel(
    result: Strategies, rows: tuple[StrategyScore, ...] | list[StrategyScore], kinds: list[str], key: str, called: str, labels: list[str], *, change: bool, named: bool
) -> Panel:  # fmt: skip
    """One measure, a colour and a marker per kind of way."""
    colours = (INTACT, CHOSEN, CONTROL, *LINES)
    nan = float("nan")
    traces = []
    for k, kind in enumerate(kinds):
        mine = [(label, row) for label, row in zip(labels, rows, strict=True) if row.kind == kind]
        found = [getattr(row, key) or Estimate(nan, nan, nan, result.n) for _, row in mine]
        filled = [bool(np.nan_to_num(row.holm_p, nan=1.0) < ALPHA) for _, row in mine]
        hover = [
            f"<br>McNemar p {row.mcnemar_p:.2g}, corrected {row.holm_p:.2g}<br>{row.shots:.1f} examples; says {words(result.labels[1])} in {row.positive_share:.0%}"
            for _, row in mine
        ]
        if mine:
            traces.append(estimates([label for label, _ in mine], found, words(kind), colours[k % len(colours)], SYMBOLS[k % len(SYMBOLS)], filled=filled, hover=hover,
                                    legend=named and not change))  # fmt: skip
    level = 0.0 if change else {"accuracy": result.chance, "auroc": 0.5}.get(key)
    title = {"accuracy": f"dotted: the more frequent label, {result.chance:.0%}", "auroc": "dotted: chance"}.get(
        key, "of the positive label" if not change else "difference"
    )
    x: Spec = {"tickformat": ".0%" if "accuracy" in key else ".2f", "nticks": 5} | ({} if change else {"range": [-0.04, 1.04]})
    heading = f"<b>{called}</b>" + (f" minus {words(result.baseline)}" if change else "")
    return rows_panel(traces, labels, heading, title=title, level=level, x=x, named=named)
