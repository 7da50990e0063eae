"""What examples do to the keys and values of the query's own tokens (our definitions; the paper's could not be read)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from mechicl.results.base import Estimate, Provenance, Skipped

MEASURES = ("relative_l2", "cosine_distance", "cka")
"""Names of `KVShift.measures`."""


@dataclass(frozen=True, eq=False)
class FillerTest:
    """Do the examples move keys and values more than as many neutral tokens do? Both shifts are relative L2 from the zero-shot prompt.

    Arrays are [part, layer, kv_head, span].

    Attributes:
        example: Mean shift of the prompt with the examples from the zero-shot prompt.
        filler: Mean shift of the prompt with the filler from the zero-shot prompt.
        difference: Mean of example minus filler, episode by episode.
        low, high: 95 % bootstrap interval of `difference` over episodes.
        p: Two-sided sign-flip p of the paired differences.
        p_corrected: Holm over all cells.
        pooled: (part, span) -> the difference, averaged over layers and heads of an episode first.
        pooled_p: Its sign-flip p, Holm over parts and spans.
    """

    example: np.ndarray
    filler: np.ndarray
    difference: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    p_corrected: np.ndarray
    pooled: Mapping[tuple[str, str], Estimate]
    pooled_p: Mapping[tuple[str, str], float]


@dataclass(frozen=True, eq=False)
class KVShift:
    """Keys (before RoPE, after any norm of the keys) and values of the query's tokens: with the examples against a control without them.

    Arrays are [part, layer, kv_head, span], NaN where a layer or a span has no such number; grouped-query models have one row per KV head.

    Attributes:
        control: "zero-shot" (the question alone) or "filler" (as many neutral tokens in place of the examples).
        filler: How the filler was made, "turns" or "words"; "" where none was.
        parts: "k" and "v".
        layers, heads, spans: Labels of the other axes; heads are KV heads.
        measures: "relative_l2": |with - without| / |without| of each token, averaged over the span and over episodes. "cosine_distance": 1 - cosine,
            averaged likewise. "cka": linear CKA (debiased) over episodes of the spans' mean vectors with and without; 1 when episodes keep their mutual
            places up to a rotation and a scale.
        low, high: 95 % intervals over episodes of each measure: bootstrap; for "cka" jackknife.
        per_episode: Relative L2 [batch, part, layer, kv_head, span].
        cosine_per_episode: The same of 1 - cosine.
        cka_null: Mean CKA when the episodes of one side are shuffled: what unrelated representations would give (near 0).
        pooled: (part, span) -> relative L2, averaged over layers and heads of an episode first.
        tokens: Query tokens compared, [batch, span].
        lengths: Tokens of the prompt with examples and of the control, [batch, 2].
        test: Against the filler's own shift, where both controls ran.
        others: The same result against the other controls that ran, by name.
        reasons: Why a (part, layer) has no numbers.
    """

    control: str
    filler: str
    parts: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    spans: tuple[str, ...]
    measures: Mapping[str, np.ndarray]
    low: Mapping[str, np.ndarray]
    high: Mapping[str, np.ndarray]
    per_episode: np.ndarray
    cosine_per_episode: np.ndarray
    cka_null: np.ndarray
    pooled: Mapping[tuple[str, str], Estimate]
    tokens: np.ndarray
    lengths: np.ndarray
    episode_ids: tuple[str, ...]
    n: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()
    test: FillerTest | None = None
    others: Mapping[str, KVShift] = field(default_factory=dict)
    reasons: Mapping[tuple[str, int], str] = field(default_factory=dict)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the arrays' axes."""
        return ("part", "layer", "kv_head", "span")

    def at(self, part: str, layer: int, head: int, span: str, measure: str = "relative_l2") -> float:
        """One number. Raises KeyError or ValueError for a label that is not there."""
        where = (self.parts.index(part), self.layers.index(layer), self.heads.index(head), self.spans.index(span))
        return float(self.measures[measure][where])

    def to_frame(self) -> pd.DataFrame:
        """One row per (control, measure, part, layer, kv_head, span) that has a number."""
        frames = [_frame(self)] + [_frame(other) for other in self.others.values()]
        return pd.concat(frames, ignore_index=True)


def _frame(shift: KVShift) -> pd.DataFrame:
    labels = (shift.parts, shift.layers, shift.heads, shift.spans)
    index = [cell for cell in np.ndindex(*(len(x) for x in labels)) if not np.isnan(shift.measures["relative_l2"][cell])]
    rows = []
    for cell in index:
        names = dict(zip(("part", "layer", "kv_head", "span"), (x[i] for x, i in zip(labels, cell, strict=True)), strict=True))
        for measure in MEASURES:
            value, low, high = (table[measure][cell] for table in (shift.measures, shift.low, shift.high))
            row = {
                "control": shift.control,
                "measure": measure,
                **names,
                "value": value,
                "low": low,
                "high": high,
                "unit": "ratio",
                "n": shift.n,
            }
            if measure == "relative_l2" and shift.test is not None:
                row |= {
                    "more_than_filler": shift.test.difference[cell],
                    "p": shift.test.p[cell],
                    "p_corrected": shift.test.p_corrected[cell],
                }
            rows.append(row)
    return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class SimilarityEffect:
    """One comparison of two ways to choose the example, on the same queries, pooled over layers, KV heads and spans.

    Attributes:
        first, second: Ways; positive effects mean that `first` shifts more.
        part: "k" or "v".
        difference: Mean paired difference of the relative L2, bootstrap interval.
        effect: Hedges' g of the paired differences (their mean over their standard deviation, corrected for small n), bootstrap interval.
        p: Two-sided sign-flip p.
        p_corrected: Holm over the comparisons of the result.
        share: Share of queries for which `first` shifts more.
    """

    first: str
    second: str
    part: str
    difference: Estimate
    effect: Estimate
    p: float
    p_corrected: float
    share: float


@dataclass(frozen=True, eq=False)
class SimilarityTest:
    """Does an example that is like the query shift its keys and values more? Same query, same label, same number of tokens, other example.

    Attributes:
        by: How the example was chosen: "most similar", "random", "least similar".
        parts, layers, heads, spans: Labels of the other axes; heads are KV heads.
        shift: Mean relative L2 from the control, [by, part, layer, kv_head, span], with `low` and `high`, 95 % bootstrap over queries.
        per_episode: The same per query, [batch, by, part, layer, kv_head, span].
        similarity: Of the example to the query (cosine of their embeddings), [batch, by].
        chosen: Which item of the pool, [batch, by].
        comparisons: Pooled tests; the first is the claim (most against least similar, keys).
        effect: Hedges' g of most minus least similar in every cell [part, layer, kv_head, span], with `effect_low`, `effect_high` (bootstrap), `p`
            (sign-flip) and `p_corrected` (Holm over cells).
        tokens: Tokens of the prompts with one example, [batch].
        embeddings: Who told likeness.
        control: What the shift is from: "filler" or "zero-shot".
        others: The same result from the other control. **Look at both**: an example like the query may shift it more than a dissimilar one from a filler, and
            less from the zero-shot prompt, where it mostly says again what the query says.
    """

    by: tuple[str, ...]
    parts: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    spans: tuple[str, ...]
    shift: np.ndarray
    low: np.ndarray
    high: np.ndarray
    per_episode: np.ndarray
    similarity: np.ndarray
    chosen: np.ndarray
    comparisons: tuple[SimilarityEffect, ...]
    effect: np.ndarray
    effect_low: np.ndarray
    effect_high: np.ndarray
    p: np.ndarray
    p_corrected: np.ndarray
    tokens: np.ndarray
    embeddings: str
    episode_ids: tuple[str, ...]
    n: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()
    control: str = "filler"
    others: Mapping[str, SimilarityTest] = field(default_factory=dict)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of `effect`."""
        return ("part", "layer", "kv_head", "span")

    def to_frame(self) -> pd.DataFrame:
        """One row per (part, layer, kv_head, span): mean shift by each way, and the effect."""
        labels = (self.parts, self.layers, self.heads, self.spans)
        rows = []
        for cell in np.ndindex(*self.effect.shape):
            if np.isnan(self.shift[(0, *cell)]):
                continue
            row: dict[str, object] = dict(zip(self.axes, (x[i] for x, i in zip(labels, cell, strict=True)), strict=True))
            row |= {way: self.shift[(k, *cell)] for k, way in enumerate(self.by)}
            row |= {"effect": self.effect[cell], "low": self.effect_low[cell], "high": self.effect_high[cell], "p": self.p[cell]}
            rows.append({**row, "p_corrected": self.p_corrected[cell], "n": self.n})
        return pd.DataFrame(rows)

    def comparisons_frame(self) -> pd.DataFrame:
        """One row per control and pooled comparison."""
        return pd.DataFrame(
            [
                {"control": one.control, "first": c.first, "second": c.second, "part": c.part, "difference": c.difference.value,
                 "effect": c.effect.value, "low": c.effect.low, "high": c.effect.high, "p": c.p, "p_corrected": c.p_corrected, "share": c.share,
                 "n": c.effect.n}
                for one in (self, *self.others.values()) for c in one.comparisons
            ]
        )  # fmt: skip
