"""Two models (sizes, checkpoints, modalities) side by side, and one model along its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd

from mechicl.results.answers import ICLAccuracy
from mechicl.results.base import Estimate, Head, Provenance, Skipped
from mechicl.results.heads import HeadScores
from mechicl.results.study import Series

Align = Literal["index", "depth", "function"]
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
"""Of a score over heads."""


@dataclass(frozen=True, eq=False)
class Side:
    """One of two models, measured: `scores` on `n` episodes, `accuracy` on those that it can be asked (None where it was not asked).

    `name`: what it is called in the comparison; `prompts`: what its episodes are ("pictures", "words", "pictures and words").
    """

    name: str
    scores: HeadScores
    accuracy: ICLAccuracy | None
    n_layers: int
    n_heads: int
    prompts: str
    model_type: str = ""


@dataclass(frozen=True, eq=False)
class Trunk:
    """Do two models share their decoder? Cosines of each head's weights with those of the head of the same index.

    `cosine["W_Q"]` [layer, head], `["W_K"]`, `["W_V"]` [layer, kv_head], `["W_O"]` [layer, head]; empty where shapes differ or weights cannot be read: `reason` says
    why. `median`: over all of them, 1 for the same weights, near 0 for unrelated ones. `shared`: the median is at least `bar`.
    """

    shared: bool
    median: float
    bar: float
    cosine: Mapping[str, np.ndarray] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Alignment:
    """Which head of the second model stands for which head of the first.

    `pairs`: (head of the first, head of the second), each head in one pair at most; the larger model has heads left over. `distance` [pair]: root mean square
    difference of the two heads' score profiles over scores and episodes, in standard deviations over all heads. `stable`: share of pairs that are the same when
    found on each half of the episodes alone (n pairs), NaN for an alignment by index. `same_index`: share of pairs at one index, NaN where shapes differ.
    `depth_gap`: mean distance of the pairs in relative depth (0 first layer, 1 last); `depth_gap_chance`: when the heads are dealt at random, and `depth_p`
    the one-sided p that it is as small. `agreement`: mean over scores of their partial rank correlations (see `ScoreAgreement`), `agreement_high` its 97.5 % quantile when
    pairs are dealt anew (permutation null), `p` one-sided.
    """

    how: Align
    pairs: tuple[tuple[Head, Head], ...]
    distance: np.ndarray
    stable: float
    same_index: float
    depth_gap: float
    depth_gap_chance: float
    depth_p: float
    agreement: float
    agreement_high: float
    p: float
    n_draws: int

    def counterpart(self, head: Head) -> Head | None:
        """The head of the second model that stands for `head` of the first; None where it has none."""
        return dict(self.pairs).get(head)


@dataclass(frozen=True, eq=False)
class ScoreAgreement:
    """One score in two models.

    `top_first`, `top_second`: the k heads with the highest score in each. `shared`: heads of the first whose counterpart is in the second's top. `expected`, `p`: what
    random pairs would share, and the probability of at least as many (hypergeometric over the larger model's heads). `expected_layer`, `p_layer`: the same where chance
    deals within layers only, for alignments by index; NaN otherwise. `ks`, `top_shared`, `top_chance`, `top_high` [k]: the same for other k.
    `spearman`: rank correlation over pairs, interval over episodes. `partial`: rank correlation of what depth (and, for alignments by function, the scores that made
    the pairs) leaves unexplained, over pairs; `partial_p`: one-sided, pairs dealt anew.
    `quantiles_first`, `quantiles_second` [quantile]: of the score over heads, at `QUANTILES`, with `_low` and `_high` over episodes.
    `found_first`, `found_second`: share of heads that pass their null (corrected p < 0.05), Wilson interval over heads. `aligned_by`: scores that made the pairs.
    """

    name: str
    unit: str
    k: int
    top_first: tuple[Head, ...]
    top_second: tuple[Head, ...]
    shared: tuple[Head, ...]
    expected: float
    p: float
    expected_layer: float
    p_layer: float
    ks: np.ndarray
    top_shared: np.ndarray
    top_chance: np.ndarray
    top_high: np.ndarray
    spearman: Estimate
    partial: float
    partial_p: float
    quantiles_first: np.ndarray
    quantiles_second: np.ndarray
    low_first: np.ndarray
    high_first: np.ndarray
    low_second: np.ndarray
    high_second: np.ndarray
    found_first: Estimate
    found_second: Estimate
    pairs: tuple[tuple[Head, Head], ...]
    aligned_by: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class AccuracyPair:
    """Both models asked the same `n` episodes. `change`: second minus first, paired; `mcnemar_p`: exact, two-sided.

    `agree`: share of episodes on which both give the same candidate; `agree_chance`: what two models of these accuracies would share were their mistakes unrelated
    (mistakes spread evenly over the wrong candidates).
    """

    first: Estimate
    second: Estimate
    change: Estimate
    margin_change: Estimate
    mcnemar_p: float
    agree: Estimate
    agree_chance: float
    chance: float
    n: int


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two models side by side, on the same episodes (or the same items shown otherwise).

    `why`: why the heads were aligned as they were. `scores[name]`: a `ScoreAgreement`. `verdict`: in words.
    """

    first: Side
    second: Side
    trunk: Trunk
    alignment: Alignment
    why: str
    scores: Mapping[str, ScoreAgreement]
    accuracy: AccuracyPair | None
    verdict: str
    n: int
    skipped: tuple[Skipped, ...]
    provenance: tuple[Provenance, Provenance]
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> ScoreAgreement:
        return self.scores[name]

    def to_frame(self) -> pd.DataFrame:
        """One row per score."""
        return pd.DataFrame(
            [{"score": s.name, "k": s.k, "shared": len(s.shared), "expected": s.expected, "p": s.p, "expected_layer": s.expected_layer, "p_layer": s.p_layer,
              "spearman": s.spearman.value, "spearman_low": s.spearman.low, "spearman_high": s.spearman.high, "partial": s.partial, "partial_p": s.partial_p,
              "best_first": s.quantiles_first[-1], "best_second": s.quantiles_second[-1], "found_first": s.found_first.value, "found_second": s.found_second.value,
              "pairs": len(s.pairs), "n": self.n} for s in self.scores.values()]
        )  # fmt: skip

    def pairs_frame(self) -> pd.DataFrame:
        """One row per pair of heads, with every score of both."""
        rows = []
        for (a, b), distance in zip(self.alignment.pairs, self.alignment.distance, strict=True):
            row = {"layer_first": a[0], "head_first": a[1], "layer_second": b[0], "head_second": b[1], "distance": distance}
            for name in self.scores:
                row |= {f"{name}_first": self.first.scores[name].value[a], f"{name}_second": self.second.scores[name].value[b]}
            rows.append(row)
        return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class HeadsImprove:
    """Are the best heads of the second model better than those of the first, and is it more than having more heads?

    Heads are ranked on one half of the episodes and measured on the other, both ways. `first`, `second`: mean score of the `k` best. `raw`: second minus first, paired over
    episodes. `equal_number`: the same when the larger model is cut down to as many heads as the smaller one has, at random, averaged over all such cuts (exact).
    `equal_share`: the best `share` of the heads of each. `by_number`: raw difference when all heads of both are dealt to the two models at random (mean), `by_number_high` its
    97.5 % quantile, `p_heads` one-sided: the units are heads. `p_episodes`: two-sided sign-flip test of `equal_number`: the units are episodes.
    Episodes say that these heads differ, heads that models do: `finding` is "better" where both intervals over episodes are above zero and `p_heads` is below 0.05, "worse" the other
    way round, else "higher, as more heads are", "higher, not beyond chance" or "no difference shown"; `verdict` says it in a sentence.
    """

    score: str
    unit: str
    names: tuple[str, str]
    k: int
    share: float
    n_heads: tuple[int, int]
    first: Estimate
    second: Estimate
    raw: Estimate
    equal_number: Estimate
    equal_share: Estimate
    by_number: float
    by_number_high: float
    p_heads: float
    p_episodes: float
    finding: str
    verdict: str
    n: int
    provenance: tuple[Provenance, Provenance]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.verdict

    def to_frame(self) -> pd.DataFrame:
        """One row per way of comparing."""
        ways = {
            "second minus first": self.raw,
            "as many heads of each": self.equal_number,
            "the same share of the heads of each": self.equal_share,
        }
        return pd.DataFrame(
            [{"score": self.score, "k": self.k, "comparison": way, "difference": e.value, "low": e.low, "high": e.high, "n": e.n} for way, e in ways.items()]
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class CheckpointSeries:
    """One model along its checkpoints, on the same probe episodes.

    `series`: accuracy, CLA and head scores [checkpoint] (see `mechicl.analysis.trainings.growth`), and, for each score, "<score>, final heads": mean of the heads that are the
    best k at the last checkpoint, and "<score>, top k shared with the last". `names` [checkpoint]: revision or folder. `heads[score]` [checkpoint, layer, head].
    `changes[measure]`: (step, level before, level after) of its one change; None where the curve shows none, absent where it is too short to say.
    `shared_chance`: heads that two random sets of k share, as a share of k.
    """

    series: Series
    names: tuple[str, ...]
    heads: Mapping[str, np.ndarray]
    changes: Mapping[str, tuple[float, float, float] | None]
    top: int
    shared_chance: float
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One row per (measure, checkpoint), with the checkpoint's name."""
        frame, names = self.series.to_frame(), dict(zip((int(s) for s in self.series.steps), self.names, strict=True))
        return frame.assign(checkpoint=[names[int(step)] for step in frame["step"]])
