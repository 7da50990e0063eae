"""What an analysis returns: frozen numbers with axes, units, intervals, controls and provenance.

Nothing here computes; nothing here holds a model, a figure or a file handle. Arrays are numpy, on the CPU, float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

Head = tuple[int, int]
"""(layer, head), both counted from 0."""


@dataclass(frozen=True, eq=False)
class Provenance:
    """How a number was made: enough to make it again."""

    model: str
    revision: str = ""
    dtype: str = ""
    attention: str = ""
    device: str = ""
    task: str = ""
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Skipped:
    """An episode left out, and why."""

    episode: str
    reason: str


@dataclass(frozen=True, eq=False)
class Estimate:
    """One number with its interval."""

    value: float
    low: float
    high: float
    n: int
    unit: str = "probability"
    method: str = "Wilson 95 %"

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.n})"


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
class ICLAccuracy:
    """How well the model answers from the examples.

    Per-episode arrays are [batch]. `correct`: the right label has the highest full-label log-probability among the candidates;
    `first_token_correct`: the same with the first token only; `open_correct`: the greedy first token over the whole vocabulary is the right label's first token.
    `margin`: log-probability of the right label minus the best wrong one, nats. `predicted`: index of the chosen candidate.
    `score`: what decided between candidates (see `mechicl.analysis.labels.LabelScore`).
    """

    accuracy: Estimate
    first_token_accuracy: Estimate
    open_accuracy: Estimate
    cla: Estimate
    margin: Estimate
    chance: float
    zero_shot: Estimate | None
    correct: np.ndarray
    first_token_correct: np.ndarray
    open_correct: np.ndarray
    margins: np.ndarray
    predicted: np.ndarray
    answers: np.ndarray
    candidates: tuple[tuple[str, ...], ...]
    episode_ids: tuple[str, ...]
    n: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()
    score: str = "full"

    def to_frame(self) -> pd.DataFrame:
        """One row per episode."""
        return pd.DataFrame(
            {"episode": self.episode_ids, "correct": self.correct, "first_token_correct": self.first_token_correct,
             "open_correct": self.open_correct, "margin_nats": self.margins,
             "predicted": [c[i] for c, i in zip(self.candidates, self.predicted, strict=True)],
             "answer": [c[i] for c, i in zip(self.candidates, self.answers, strict=True)]}
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class AblationCell:
    """One set of heads switched off, on the same episodes as the intact model.

    `change`: accuracy with the heads off minus intact, paired bootstrap interval. `margin_change`: the same in nats.
    `mcnemar_p`: exact McNemar test of the paired answers.
    """

    heads: tuple[Head, ...]
    accuracy: Estimate
    change: Estimate
    margin_change: Estimate
    mcnemar_p: float
    correct: np.ndarray
    margins: np.ndarray
    name: str = ""


@dataclass(frozen=True, eq=False)
class Ablation:
    """Heads switched off, beside the intact model and matched random heads.

    `random`: one cell per draw of random heads (as many heads; same layers where these have heads left, else the nearest layers: then `match_note`
    says so; fewer draws than asked where there are no more, none where no heads are left). `p_random`: share of draws (with the +1 correction) whose accuracy falls at least as far as that of the chosen heads; NaN without draws.
    `verdict`: a sentence; `finding`: the same in a word, one of `mechicl.analysis.verdict.FINDINGS`.
    """

    how: str
    intact: ICLAccuracy
    chosen: AblationCell
    singles: tuple[AblationCell, ...]
    random: tuple[AblationCell, ...]
    random_mean: Estimate
    p_random: float
    zero_shot: Estimate | None
    match_note: str
    verdict: str
    n: int
    provenance: Provenance
    finding: str = ""

    def to_frame(self) -> pd.DataFrame:
        """One row per set of heads."""
        rows = []
        for kind, cells in (("chosen", (self.chosen,)), ("single", self.singles), ("random", self.random)):
            for cell in cells:
                rows.append(
                    {"kind": kind, "heads": " ".join(f"{a}.{b}" for a, b in cell.heads), "n_heads": len(cell.heads),
                     "accuracy": cell.accuracy.value, "low": cell.accuracy.low, "high": cell.accuracy.high,
                     "change": cell.change.value, "change_low": cell.change.low, "change_high": cell.change.high,
                     "margin_change_nats": cell.margin_change.value, "mcnemar_p": cell.mcnemar_p, "n": cell.accuracy.n}
                )  # fmt: skip
        return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class DoseCurve:
    """Accuracy as the top 1, 2, ... k heads are switched off, with a band of matched random sets.

    `ks` [k]; `accuracy[k]`; `random_low/mean/high` [k]: 2.5 %, mean, 97.5 % over random draws.
    """

    ranking: tuple[Head, ...]
    ranked_by: str
    ks: np.ndarray
    accuracy: tuple[Estimate, ...]
    margin: tuple[Estimate, ...]
    random_mean: np.ndarray
    random_low: np.ndarray
    random_high: np.ndarray
    n_draws: int
    chance: float
    how: str
    n: int
    provenance: Provenance

    def to_frame(self) -> pd.DataFrame:
        """One row per number of heads off."""
        return pd.DataFrame(
            {"k": self.ks, "accuracy": [a.value for a in self.accuracy], "low": [a.low for a in self.accuracy],
             "high": [a.high for a in self.accuracy], "margin_nats": [m.value for m in self.margin],
             "random_mean": self.random_mean, "random_low": self.random_low, "random_high": self.random_high, "n": self.n}
        )  # fmt: skip


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
    `finding`: a word of `mechicl.analysis.verdict.FINDINGS`, or "none" where no head passed.
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
class Study:
    """The whole story of one model on one task: does it learn from the examples, which heads do it, and what happens without them.

    Heads are ranked on `n_find` episodes (`scores`) and everything else is measured on `n_prove` other episodes, `replication` being the same scores
    there. `controls`: accuracies of the intact model under a control, by name. `growth`: the same heads along training, where it was logged. `effects`: what each head is
    worth when it is switched off alone, in nats of margin, on the episodes that serve to find heads.
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


@dataclass(frozen=True, eq=False)
class Bands:
    """Measures along training over several runs of one setting: `values[name]` [step] is the mean over runs, `low` and `high` its 95 % interval.

    `runs[name]` [run, step], NaN where a run was not measured at that step; `n_runs` [step] counts the runs behind each mean. `n`: probe
    sequences of each run, 0 where it is not known. `setting`: what the runs share, in words. `method`: how the interval was made.
    """

    steps: np.ndarray
    values: Mapping[str, np.ndarray]
    low: Mapping[str, np.ndarray]
    high: Mapping[str, np.ndarray]
    runs: Mapping[str, np.ndarray]
    n_runs: np.ndarray
    unit: str
    method: str
    setting: str = ""
    n: int = 0
    provenance: Provenance | None = None

    def to_frame(self) -> pd.DataFrame:
        """One row per (measure, step)."""
        return pd.concat(
            [pd.DataFrame({"measure": name, "step": self.steps, "value": value, "low": self.low[name], "high": self.high[name], "runs": self.n_runs})
             for name, value in self.values.items()],
            ignore_index=True,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class ChangePoint:
    """When one measure changes most, over runs.

    `at`: the step (geometric mean over the runs that change, n of them). `before`, `after`: mean levels on both sides. `steps` [run]: each run's
    own, NaN where the run's curve shows no change.
    """

    measure: str
    at: Estimate
    before: float
    after: float
    steps: np.ndarray

    @property
    def n_changed(self) -> int:
        """Runs whose curve changes."""
        return int(np.isfinite(self.steps).sum())


@dataclass(frozen=True, eq=False)
class Emergence:
    """Which measure changes when: change points of several measures in the same runs, earliest first.

    `lead` [measure, measure]: doublings of the step from the row's change to the column's, mean over runs in which both change, with `lead_low` and
    `lead_high`, the 95 % interval of these paired differences, and `lead_n`; NaN without two such runs. `resolution`: doublings between
    neighbouring measured steps where the changes are; a lead below it says nothing. `verdict`: the order as far as it is resolved.
    """

    points: tuple[ChangePoint, ...]
    lead: np.ndarray
    lead_low: np.ndarray
    lead_high: np.ndarray
    lead_n: np.ndarray
    resolution: float
    n_runs: int
    method: str
    verdict: str

    def to_frame(self) -> pd.DataFrame:
        """One row per measure, earliest first."""
        return pd.DataFrame(
            [{"measure": p.measure, "step": p.at.value, "low": p.at.low, "high": p.at.high, "before": p.before, "after": p.after,
              "runs_changed": p.n_changed, "runs": self.n_runs} for p in self.points]
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Correlations:
    """How measures go with an outcome over trained models.

    `value[name]`: the correlation with its interval, n models; models of one setting are resampled together (`n_settings`). `p`: permutation test over
    settings, `p_corrected` over all measures (Holm). `skipped`: measures left out, and why.
    """

    outcome: str
    method: str
    value: Mapping[str, Estimate]
    p: Mapping[str, float]
    p_corrected: Mapping[str, float]
    n_runs: int
    n_settings: int
    skipped: tuple[Skipped, ...] = ()
    measured: str = "at the end of training"

    def to_frame(self) -> pd.DataFrame:
        """One row per measure, strongest first."""
        rows = [
            {"measure": name, "correlation": e.value, "low": e.low, "high": e.high, "n": e.n, "p": self.p[name], "p_corrected": self.p_corrected[name]}
            for name, e in self.value.items()
        ]  # fmt: skip
        return pd.DataFrame(rows).sort_values("correlation", key=np.abs, ascending=False, ignore_index=True)


@dataclass(frozen=True, eq=False)
class Forest:
    """A small random forest that predicts an outcome from measures, judged on settings that it did not see.

    `r2`: share of the outcome's variance it explains there; `shuffled` [draw]: the same for outcomes dealt out to other settings, and `p` the share
    of these that do as well. `importance[name]`: fall of r2 when that measure alone is permuted among the unseen models.
    """

    outcome: str
    r2: Estimate
    shuffled: np.ndarray
    p: float
    importance: Mapping[str, Estimate]
    n_runs: int
    n_settings: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """One row per measure, most important first."""
        rows = [{"measure": name, "importance": e.value, "low": e.low, "high": e.high} for name, e in self.importance.items()]
        return pd.DataFrame(rows).sort_values("importance", ascending=False, ignore_index=True)


@dataclass(frozen=True, eq=False)
class KnockOut:
    """One thing taken away from a model, on the same sequences as the intact one.

    `kind`: "intact", "heads", "random heads", "modality", "random tokens". `cla`: share of answers that are some label of the context. `change`: accuracy minus
    the intact one's, paired.
    """

    name: str
    kind: str
    accuracy: Estimate
    cla: Estimate
    change: Estimate
    heads: tuple[Head, ...] = ()


@dataclass(frozen=True, eq=False)
class KnockOutTable:
    """What a model loses without some of its heads, or without a modality, beside matched random controls.

    `chance`: naming any label; `copy`: copying any label of the context. `note`: what must be said about the controls.
    """

    rows: tuple[KnockOut, ...]
    chance: float
    copy: float
    n: int
    n_models: int
    how: str
    note: str
    provenance: Provenance | None = None

    def __getitem__(self, name: str) -> KnockOut:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"name must be one of {', '.join(row.name for row in self.rows)}; got {name!r}.")

    def to_frame(self) -> pd.DataFrame:
        """One row per knock-out."""
        return pd.DataFrame(
            [{"name": r.name, "kind": r.kind, "heads": " ".join(f"{a}.{b}" for a, b in r.heads), "accuracy": r.accuracy.value, "low": r.accuracy.low,
              "high": r.accuracy.high, "change": r.change.value, "change_low": r.change.low, "change_high": r.change.high, "cla": r.cla.value,
              "n": self.n, "models": r.accuracy.n if self.n_models > 1 else 1} for r in self.rows]
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Claim:
    """A published claim held against numbers: `evidence` is its effect, positive where the claim holds.

    `finding`: "holds" (the whole interval is above the bar), "does not hold" (the whole interval is below it), "not shown" (neither).
    """

    text: str
    finding: str
    evidence: Estimate
    bar: float
    said: str

    def __str__(self) -> str:
        return self.said
