"""What every figure, table and caption calls things: heads, text from data, metrics; and which heads are marked."""

from __future__ import annotations

import html
from typing import Any

import numpy as np

from mechicl.results import Head, Score

Spec = dict[str, Any]
"""A plotly figure as a dictionary: {"data": [...], "layout": {...}}."""


ALPHA = 0.05
"""Heads are marked where their corrected p is below this."""


def name(head: Head) -> str:
    """A head's name on every figure and table: layer.head, as in the command line's --heads."""
    return f"{head[0]}.{head[1]}"


def words(text: str) -> str:
    """Text from data as plotly shows it: markup escaped, underscores as blanks."""
    return html.escape(text.replace("_", " "), quote=False)


METRICS = {
    "logit_diff": "logit difference",
    "label_logprob": "difference of the labels' log-probabilities",
    "logprob": "log-probability",
    "prob": "probability",
    "kl": "KL divergence",
}


def metric_words(name: str) -> str:
    """A metric as figures call it."""
    return METRICS.get(name, words(name))


def significant(score: Score) -> list[Head]:
    """Heads whose corrected p is below `ALPHA`, best score first."""
    passed = np.nan_to_num(score.p_corrected, nan=1.0) < ALPHA
    return [head for head in score.top(score.value.size) if passed[head]]
