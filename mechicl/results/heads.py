"""What single heads are like: scores over all heads, attention by role, one prompt drawn whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mechicl.results.base import Head, Provenance, Skipped


@dataclass(frozen=True, eq=False)
class Score:
    """One head score over the whole model.

    Arrays are [layer, head]; `per_episode` is [batch, layer, head]. A head that the model cannot give a pattern for is NaN.
    `low`, `high`: 95 % bootstrap interval of `value` over episodes. `null`: mean score with labels (or spans) shuffled over the
    exemplars; `null_high`: the null's 97.5 % quantile. `p`: one-sided, that the head attends there more than `lift` times what its null does (trifles are
    significant with enough episodes, in networks with random weights too); `p_corrected`: over all heads, Holm unless said otherwise.
    """

    name: str
    description: str
    unit: str
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    null: np.ndarray
    null_high: np.ndarray
    p: np.ndarray
    p_corrected: np.ndarray
    per_episode: np.ndarray
    source: str = ""
    null_name: str = "labels shuffled over the exemplars"
    lift: float = 1.0

    def top(self, k: int = 5) -> list[Head]:
        """The k highest heads, best first; heads without a pattern (NaN) never appear."""
        flat = self.value.ravel()
        order = [int(i) for i in np.argsort(-np.nan_to_num(flat, nan=-np.inf), kind="stable") if not np.isnan(flat[i])]
        return [(i // self.value.shape[1], i % self.value.shape[1]) for i in order[:k]]


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Every score of every head. `scores[name]` is a `Score`."""

    scores: Mapping[str, Score]
    n: int
    n_key_value_heads: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Score:
        return self.scores[name]

    def top(self, name: str, k: int = 5) -> list[Head]:
        """The k heads with the highest score `name`, best first."""
        return self.scores[name].top(k)

    def to_frame(self) -> pd.DataFrame:
        """One row per (score, layer, head)."""
        rows = []
        for name, s in self.scores.items():
            for layer, head in np.ndindex(*s.value.shape):
                cell = (layer, head)
                rows.append(
                    {"score": name, "layer": layer, "head": head, "value": s.value[cell], "low": s.low[cell], "high": s.high[cell],
                     "null": s.null[cell], "p": s.p[cell], "p_corrected": s.p_corrected[cell], "unit": s.unit, "n": self.n}
                )  # fmt: skip
        return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class RoleAttention:
    """Where the query's last token looks: mean attention mass per head onto each kind of span.

    `value` [layer, head, span]; `spans`: names such as "right label", "wrong label", "right image", "query image", "instruction", "sink".
    Mass is summed over a span's tokens; the columns of one head sum to one up to rounding (plus what an attention sink without a token takes).
    """

    spans: tuple[str, ...]
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: int
    provenance: Provenance

    def to_frame(self) -> pd.DataFrame:
        """One row per (layer, head, span)."""
        rows = [
            {"layer": i, "head": j, "span": self.spans[k], "value": self.value[i, j, k], "low": self.low[i, j, k], "high": self.high[i, j, k], "n": self.n}
            for i, j, k in np.ndindex(*self.value.shape)
        ]  # fmt: skip
        return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class PromptView:
    """One rendered prompt, ready to be drawn: tokens with roles, pictures, and attention onto them.

    `tokens`, `roles`, `shots` [pos] (shot -1 is the query, -2 nothing); `images`: PNG bytes in order; `image_boxes`: for every image, a mapping
    from token position to (left, top, right, bottom) in the picture's pixels; `rows`: attention of the last token, {head: [pos]}.
    `patterns`: {head: [dest, src]} for the chosen heads.
    """

    tokens: tuple[str, ...]
    roles: tuple[str, ...]
    shots: tuple[int, ...]
    labels: tuple[str, ...]
    images: tuple[bytes, ...]
    image_boxes: tuple[Mapping[int, tuple[float, float, float, float]], ...]
    rows: Mapping[Head, np.ndarray]
    patterns: Mapping[Head, np.ndarray]
    answer: str
    predicted: str
    episode: str
    provenance: Provenance
