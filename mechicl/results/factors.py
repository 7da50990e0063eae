"""What of an example changes the query's keys and values: its meaning, its form, or both together; and what that does to the answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mechicl.results.base import Estimate, Provenance, Skipped


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Variation of vectors over the runs of an experiment, split over its factors; see `mechicl.analysis.shift.shares.decompose`.

    Attributes:
        sources: The factors, "interaction", "residual".
        squares: Sums of squares [batch, ...] of every source and "total".
        shares: source -> share [...]; over the sources they sum to one; NaN where nothing varies.
        low, high: 95 % bootstrap intervals over episodes.
        null: factor -> mean share with its levels exchanged.
        p: factor -> one-sided permutation p [...].
        n: Episodes.
    """

    sources: tuple[str, ...]
    squares: Mapping[str, np.ndarray]
    shares: Mapping[str, np.ndarray]
    low: Mapping[str, np.ndarray]
    high: Mapping[str, np.ndarray]
    null: Mapping[str, np.ndarray]
    p: Mapping[str, np.ndarray]
    n: int

    def to_frame(self) -> pd.DataFrame:
        """One row per cell and source."""
        rows = []
        for source in self.sources:
            for cell in np.ndindex(*self.shares[source].shape):
                tests = {"null": self.null[source][cell], "p": self.p[source][cell]} if source in self.p else {}
                rows.append({"cell": cell, "source": source, "share": self.shares[source][cell], "low": self.low[source][cell],
                             "high": self.high[source][cell], **tests, "n": self.n})  # fmt: skip
        return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class FactorShares:
    """Which factor of the examples moves the query's keys and values, as shares of the variation over conditions. Our own definition (see `docs/factors.md`).

    Arrays are [part, layer, head, span]; a cell that no condition moves is NaN.

    Attributes:
        parts: "k" (keys before RoPE, after any norm of keys) and "v".
        layers: Numbers of the layers.
        heads: Numbers of the key-value heads.
        spans: Groups of the query's own tokens ("query image", "last token", ...).
        factors: Names, in the order of the design: ("semantics", "format").
        levels: For each factor its levels, the first one "kept".
        sources: Keys of `shares`: the factors, "interaction", "residual".
        shares: Share of the variation over conditions within episodes, summed over episodes; over the sources they sum to one.
        low, high: 95 % bootstrap intervals over episodes.
        null: factor -> mean share with its levels exchanged within episodes: a share is above nought by itself. The interaction and the residual have none.
        p, p_corrected: One-sided permutation p of a factor's share, and corrected over all cells (Holm).
        moved: Size of the variation over conditions against the query's own key or value without examples, a ratio of lengths.
        common: Size of the shift that all conditions share (what any example does, whatever it says), the same unit.
        squares: Sums of squares [batch, part, layer, head, span] for every source and "total", over the squared length of the zero-shot key or value.
        pooled: part -> source -> share over all cells, with its interval over episodes.
        conditions: Names of the conditions, "kept+kept" first; then "zero-shot".
        accuracy: condition -> accuracy among the candidates, replicates averaged within episodes; Wilson 95 % as if an episode were one answer, which is wide.
        margin: condition -> log-probability of the right label minus the best wrong one, nats.
        correct, margins: condition -> the same for every episode [batch].
        chance: Accuracy of guessing.
        replicates: Draws of every condition per episode; with one there is no residual.
        n: Episodes.
    """

    parts: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    spans: tuple[str, ...]
    factors: tuple[str, ...]
    levels: Mapping[str, tuple[str, ...]]
    sources: tuple[str, ...]
    shares: Mapping[str, np.ndarray]
    low: Mapping[str, np.ndarray]
    high: Mapping[str, np.ndarray]
    null: Mapping[str, np.ndarray]
    p: Mapping[str, np.ndarray]
    p_corrected: Mapping[str, np.ndarray]
    moved: np.ndarray
    common: np.ndarray
    squares: Mapping[str, np.ndarray]
    pooled: Mapping[str, Mapping[str, Estimate]]
    conditions: tuple[str, ...]
    accuracy: Mapping[str, Estimate]
    margin: Mapping[str, Estimate]
    correct: Mapping[str, np.ndarray]
    margins: Mapping[str, np.ndarray]
    chance: float
    replicates: int
    episode_ids: tuple[str, ...]
    n: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()

    def __getitem__(self, source: str) -> np.ndarray:
        return self.shares[source]

    def to_frame(self) -> pd.DataFrame:
        """One row per (part, layer, head, span, source)."""
        rows = []
        for source in self.sources:
            blank = np.full(self.moved.shape, np.nan)
            null, p, corrected = (table.get(source, blank) for table in (self.null, self.p, self.p_corrected))
            for cell in np.ndindex(*self.moved.shape):
                a, b, c, d = cell
                rows.append(
                    {"part": self.parts[a], "layer": self.layers[b], "head": self.heads[c], "span": self.spans[d], "source": source,
                     "share": self.shares[source][cell], "low": self.low[source][cell], "high": self.high[source][cell], "null": null[cell],
                     "p": p[cell], "p_corrected": corrected[cell], "moved": self.moved[cell], "common": self.common[cell], "n": self.n}
                )  # fmt: skip
        return pd.DataFrame(rows)

    def answers_frame(self) -> pd.DataFrame:
        """One row per condition."""
        return pd.DataFrame([
            {"condition": name, "accuracy": self.accuracy[name].value, "low": self.accuracy[name].low, "high": self.accuracy[name].high,
             "margin_nats": self.margin[name].value, "margin_low": self.margin[name].low, "margin_high": self.margin[name].high,
             "chance": self.chance, "n": self.n}
            for name in self.conditions
        ])  # fmt: skip


@dataclass(frozen=True, eq=False)
class ConditionRow:
    """A task under a condition: how often and how surely it is answered."""

    task: str
    condition: str
    accuracy: Estimate
    margin: Estimate


@dataclass(frozen=True, eq=False)
class TaskEffects:
    """What a task loses with each factor broken, beside the factors' shares of the keys' and values' variation.

    Attributes:
        task: Its name.
        difficulty: 1 - (accuracy with plain examples - chance) / (1 - chance): 0 where examples suffice, 1 at chance. Our own.
        zero_shot: Accuracy without examples.
        cost: factor -> accuracy lost when it alone is changed (averaged over its changes), the other factors kept; paired interval.
        margin_cost: The same in nats.
        shares: part -> source -> share, see `FactorShares.pooled`.
        chance: Accuracy of guessing.
        n: Episodes.
    """

    task: str
    difficulty: Estimate
    zero_shot: Estimate
    cost: Mapping[str, Estimate]
    margin_cost: Mapping[str, Estimate]
    shares: Mapping[str, Mapping[str, Estimate]]
    chance: float
    n: int


@dataclass(frozen=True, eq=False)
class ConditionTable:
    """Tasks of several difficulties under every condition, and whether meaning counts more where a task is hard. Ours throughout.

    Attributes:
        rows: One per (task, condition), zero-shot among them.
        tasks: One per task, easiest first.
        factors: Names of the factors; the claim is about the first two (meaning, form).
        trend: measure -> how much (meaning minus form) grows from difficulty 0 to 1, over tasks, bootstrapped over episodes within tasks: "share k",
            "share v" (difference of shares), "accuracy" (difference of costs, each over what examples gain above chance).
        finding: measure -> "supported", "contradicted", "undecided" or "not tested".
        verdict: The same as a sentence.
    """

    rows: tuple[ConditionRow, ...]
    tasks: tuple[TaskEffects, ...]
    factors: tuple[str, ...]
    trend: Mapping[str, Estimate]
    finding: Mapping[str, str]
    verdict: str
    n: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One row per (task, condition)."""
        about = {task.task: task for task in self.tasks}
        return pd.DataFrame([
            {"task": row.task, "difficulty": about[row.task].difficulty.value, "condition": row.condition, "accuracy": row.accuracy.value,
             "low": row.accuracy.low, "high": row.accuracy.high, "margin_nats": row.margin.value, "margin_low": row.margin.low,
             "margin_high": row.margin.high, "chance": about[row.task].chance, "n": about[row.task].n}
            for row in self.rows
        ])  # fmt: skip

    def tasks_frame(self) -> pd.DataFrame:
        """One row per (task, factor): the cost of changing it, and its share of each part."""
        return pd.DataFrame([
            {"task": task.task, "difficulty": task.difficulty.value, "factor": factor, "cost": task.cost[factor].value, "low": task.cost[factor].low,
             "high": task.cost[factor].high, "margin_cost_nats": task.margin_cost[factor].value,
             **{f"share_{part}": shares[factor].value for part, shares in task.shares.items()}, "n": task.n}
            for task in self.tasks for factor in self.factors
        ])  # fmt: skip


@dataclass(frozen=True, eq=False)
class MixedEffects:
    """A mixed-effects fit: fixed effects across tasks, formats and models, random ones by query.

    Attributes:
        formula: Of the fixed effects.
        response: What is explained, and its unit.
        groups: Whose intercepts (and slopes) are random.
        fixed: Name of the coefficient -> estimate with its Wald 95 % interval.
        p: Two-sided Wald p of each coefficient.
        random: Name -> variance between groups.
        residual: Variance within groups.
        converged: Whether the fit ended; where not, the numbers must not be read.
        boundary: A random variance is at nought, so the groups do not differ beyond the residual (or there are too few).
        messages: Everything the fit complained about, in its own words.
        n: Observations.
        n_groups: Groups.
    """

    formula: str
    response: str
    groups: str
    fixed: Mapping[str, Estimate]
    p: Mapping[str, float]
    random: Mapping[str, float]
    residual: float
    converged: bool
    boundary: bool
    messages: tuple[str, ...]
    n: int
    n_groups: int
    skipped: tuple[Skipped, ...] = ()
    provenance: Provenance | None = None
    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One row per fixed coefficient."""
        return pd.DataFrame([
            {"term": name, "value": one.value, "low": one.low, "high": one.high, "p": self.p[name], "converged": self.converged, "n": self.n}
            for name, one in self.fixed.items()
        ])  # fmt: skip
