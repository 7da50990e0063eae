"""The whole story of one model, and its measures along training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mechicl.results.answers import Ablation, DoseCurve, ICLAccuracy
from mechicl.results.attribution import EdgeScores
from mechicl.results.base import Estimate, Head, Provenance
from mechicl.results.circuits import Circuit, CircuitCurve
from mechicl.results.factors import FactorShares
from mechicl.results.heads import HeadScores, PromptView, RoleAttention, Score
from mechicl.results.margin import ContrastMargin
from mechicl.results.patching import PatchEffects
from mechicl.results.shift import KVShift, SimilarityTest


@dataclass(frozen=True, eq=False)
class Series:
    """Measures along training: `values[name]` [step], on the steps `steps`, same probe episodes throughout.

    `low`, `high`: 95 % interval over episodes where known, else empty.
    """

    steps: np.ndarray
    values: Mapping[str, np.ndarray]
    low: Mapping[str, np.ndarray]
    high: Mapping[str, np.ndarray]
    unit: str
    n: int
    provenance: Provenance
    stages: tuple[tuple[int, str], ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One row per (measure, step)."""
        rows = []
        for name, values in self.values.items():
            low, high = self.low.get(name), self.high.get(name)
            for i, step in enumerate(self.steps):
                rows.append(
                    {"measure": name, "step": int(step), "value": values[i], "low": None if low is None else low[i],
                     "high": None if high is None else high[i]}
                )  # fmt: skip
        return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class HeadSet:
    """Heads found by one rule on one half of the episodes, and what switching them off does on the other half.

    `found`: their scores passed the rule. `ablation` is None when no head did; `verdict` says in words what may be claimed.
    `finding`: a word of `mechicl.analysis.ablation.verdict.FINDINGS`, or "none" where no head passed.
    """

    kind: str
    score: str
    rule: str
    heads: tuple[Head, ...]
    finding: str
    verdict: str
    ablation: Ablation | None = None
    dose: DoseCurve | None = None


@dataclass(frozen=True, eq=False)
class Trace:
    """How the answer gets to the last token, and the edges that take it there.

    `patching`: the residual stream by span and the heads' outputs, on `n_prove` pairs of the episodes that prove. `edge_scores`: every edge, scored on `n_find`
    pairs of the episodes that find; the `circuit` was chosen there too, and measured on the pairs that prove, as was the `curve`. `pairs`: how the corrupt prompts
    were made. What could not be done is None; `notes` say why.
    """

    patching: PatchEffects | None
    edge_scores: EdgeScores | None
    circuit: Circuit | None
    curve: CircuitCurve | None
    pairs: str
    n_find: int
    n_prove: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class KVStory:
    """What the examples change in the query's keys and values. The definitions are mechicl's own; the paper's could not be read.

    `shift`: against filler and zero-shot prompt. `shares`: meaning against form. `margin`: nearer to right exemplars than to wrong ones, and whether that tells right
    answers from wrong; `prompts` says on which prompts. `similarity`: whether examples like the query shift more. What could not be done, or was not asked, is None;
    `notes` say why.
    """

    shift: KVShift | None
    shares: FactorShares | None
    margin: ContrastMargin | None
    similarity: SimilarityTest | None
    prompts: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Study:
    """The whole story of one model on one task: does it learn from the examples, which heads do it, and what happens without them.

    Heads are ranked on `n_find` episodes (`scores`) and everything else is measured on `n_prove` other episodes, `replication` being the same scores
    there. `controls`: accuracies of the intact model under a control, by name. `growth`: the same heads along training, where it was logged. `effects`: what each head is
    worth when it is switched off alone, in nats of margin, on the episodes that serve to find heads. `trace`: patching and circuit, `kv`: keys and values,
    where they were asked for.
    """

    scores: HeadScores
    replication: HeadScores
    accuracy: ICLAccuracy
    controls: Mapping[str, Estimate]
    sets: tuple[HeadSet, ...]
    roles: RoleAttention
    prompts: tuple[PromptView, ...]
    growth: Series | None
    n_find: int
    n_prove: int
    provenance: Provenance
    notes: tuple[str, ...] = ()
    effects: Score | None = None
    trace: Trace | None = None
    kv: KVStory | None = None
