"""What contrastive margins found: how much nearer the query's keys and values are to right exemplars' than to wrong ones', and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mechicl.errors import OptionError
from mechicl.results.base import Estimate, Head, Provenance, Skipped


@dataclass(frozen=True, eq=False)
class MarginPart:
    """One margin over the whole model: positive where the query is nearer to exemplars of the right label than to the others.

    Arrays are [layer, head] (key/value heads for "k" and "v", query heads for the others), NaN where a layer has no such tensor.

    Attributes:
        part: "k", "v" (distances), "qk", "rot_qk" (the match q . k before and after RoPE) or "attention" (probability; the baseline).
        description: What is compared with what, in words.
        unit: Of `value`.
        value: Mean over episodes, wrong-label exemplars minus right-label ones for distances, right minus wrong for matches.
        low, high: Its 95 % bootstrap interval over episodes.
        null, null_high: Mean and 97.5 % quantile of the same with each episode's answer drawn anew among the labels of its context.
        p: One-sided, that the margin is above its null; `p_corrected` over the heads of this part (Holm).
        auroc: How well the margin tells, episode by episode, right answers from wrong ones; 0.5 is chance. NaN where it cannot be said.
        auroc_low, auroc_high: Its 95 % interval over episodes.
        auroc_p: Two-sided (Mann-Whitney) that it is 0.5; `auroc_p_corrected` over heads (Holm).
        rho: Spearman correlation with the answer's output margin over episodes, `rho_low` and `rho_high` its 95 % interval. It is known where all answers
            are right, too.
        per_episode: [batch, layer, head].
        held_out: AUROC of the best head, chosen on one half of the episodes and measured on the other, both ways; an honest single number.
        held_out_heads: The head chosen on each half.
        held_out_gain: held_out minus the same of attention, paired on the same episodes; None where it cannot be said, and for attention itself.
    """

    part: str
    description: str
    unit: str
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    null: np.ndarray
    null_high: np.ndarray
    p: np.ndarray
    p_corrected: np.ndarray
    auroc: np.ndarray
    auroc_low: np.ndarray
    auroc_high: np.ndarray
    auroc_p: np.ndarray
    auroc_p_corrected: np.ndarray
    rho: np.ndarray
    rho_low: np.ndarray
    rho_high: np.ndarray
    per_episode: np.ndarray
    held_out: Estimate
    held_out_heads: tuple[Head, ...] = ()
    held_out_gain: Estimate | None = None

    def top(self, k: int = 5, by: str = "value") -> list[Head]:
        """The k heads highest in `by` ("value", "auroc" or "rho"), best first; heads without a number never appear.

        Raises:
            OptionError: `by` does not exist.
        """
        if by not in ("value", "auroc", "rho"):
            raise OptionError(f"by must be one of value, auroc, rho; got {by!r}. Pick what heads are ranked by.")
        flat = getattr(self, by).ravel()
        order = [int(i) for i in np.argsort(-np.nan_to_num(flat, nan=-np.inf), kind="stable") if not np.isnan(flat[i])]
        return [(i // self.value.shape[1], i % self.value.shape[1]) for i in order[:k]]


@dataclass(frozen=True, eq=False)
class ContrastMargin:
    """Contrastive margins of every head. `margin["k"]` is that part's `MarginPart`. Our definition; the paper's could not be read.

    Attributes:
        parts: By name; "attention" (right minus wrong labels) is always among them where the model has attention patterns.
        at: Which tokens stand for exemplars and query ("before", "item", "label", ...), see `mechicl.analysis.margin.contrast.contrast_margin`.
        keys: Which exemplar tokens the match and the attention read.
        distance: "cosine" or "euclidean".
        correct: Whether each answer was right, [batch].
        output: The answer's margin, right label minus best wrong one, nats, [batch].
        output_auroc: AUROC of `output` itself: 1 whenever it can be said, because a right answer is a positive margin. The ceiling.
        confidence_auroc: AUROC of the best label minus the second best, which needs no key: how well the model's own certainty tells.
        auroc_reason: Why AUROCs are NaN; "" where they are not.
        n: Episodes.
        skipped: Episodes left out, and why.
        provenance: How the numbers were made.
        notes: What to know when reading them.
    """

    parts: Mapping[str, MarginPart]
    at: str
    keys: str
    distance: str
    correct: np.ndarray
    output: np.ndarray
    output_auroc: Estimate
    confidence_auroc: Estimate
    auroc_reason: str
    n: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()

    def __getitem__(self, part: str) -> MarginPart:
        if part not in self.parts:
            raise OptionError(f"part must be one of {', '.join(self.parts)}; got {part!r}. Ask contrast_margin for it.")
        return self.parts[part]

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.correct.mean())

    def to_frame(self) -> pd.DataFrame:
        """One row per (part, layer, head)."""
        columns = ("value", "low", "high", "null", "p", "p_corrected", "auroc", "auroc_low", "auroc_high", "auroc_p_corrected", "rho", "rho_low", "rho_high")  # fmt: skip
        rows = []
        for name, part in self.parts.items():
            for layer, head in np.ndindex(*part.value.shape):
                numbers = {column: getattr(part, column)[layer, head] for column in columns}
                rows.append({"part": name, "layer": layer, "head": head, **numbers, "unit": part.unit, "n": self.n})
        return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class MarginEffect:
    """What becomes of the answer when the margin is moved: keys, values or the query pushed along the direction from wrong to right exemplars.

    Arrays over doses are [dose]. Dose 0 changes nothing, -1 takes the margin away (right and wrong exemplars' mean keys fall together), -2 reverses it, +1
    doubles it.

    Attributes:
        part: "k", "v" or "q".
        heads: Moved together; key/value heads for "k" and "v".
        doses: In units of the margin.
        change: Change of the answer's margin in `unit`, mean over episodes, with its 95 % bootstrap interval `low`, `high`.
        control, control_low, control_high: The same along random directions of equal norm, mean over draws.
        difference: change minus control, paired, with `difference_low`, `difference_high`.
        accuracy: Share of episodes whose answer's margin is positive, by dose; `control_accuracy` likewise, mean over draws.
        slope: Change of the answer's margin per dose, least squares through nought over the doses, mean over episodes; `control_slope` likewise.
        slope_difference: slope minus control_slope, paired.
        p: Two-sided sign-flip p of `slope_difference` over episodes.
        per_episode, control_per_episode: Changes [dose, batch].
        before: The answer's margin of the untouched runs, [batch].
        metric, unit: What was watched.
        n_controls: Random directions for each episode.
    """

    part: str
    heads: tuple[Head, ...]
    doses: np.ndarray
    change: np.ndarray
    low: np.ndarray
    high: np.ndarray
    control: np.ndarray
    control_low: np.ndarray
    control_high: np.ndarray
    difference: np.ndarray
    difference_low: np.ndarray
    difference_high: np.ndarray
    accuracy: np.ndarray
    control_accuracy: np.ndarray
    slope: Estimate
    control_slope: Estimate
    slope_difference: Estimate
    p: float
    per_episode: np.ndarray
    control_per_episode: np.ndarray
    before: np.ndarray
    metric: str
    unit: str
    n: int
    n_controls: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One row per dose."""
        columns = ("change", "low", "high", "control", "control_low", "control_high", "difference", "difference_low", "difference_high", "accuracy", "control_accuracy")  # fmt: skip
        frame = pd.DataFrame({"dose": self.doses, **{name: getattr(self, name) for name in columns}})
        return frame.assign(part=self.part, unit=self.unit, n=self.n)


@dataclass(frozen=True, eq=False)
class ContrastMap:
    """A learned map under which the query's vector is nearer to right exemplars' than to wrong ones', judged on episodes it was not fitted on.

    Scores are shares of (right, wrong) pairs of exemplars of one episode that stand in the right order by cosine, mean over held-out episodes; 0.5 is
    chance. Our definition; the paper's could not be read.

    Attributes:
        kind: "linear", "attention" or "mixed".
        weights: Arrays by name: "centre" [head, d], taken away first; "map" [head, d, d_out]; "query" [head, d] (attention); "embedding" [group, d_out]
            (mixed). See `mechicl.analysis.margin.contrast_maps`; `apply_map` applies them.
        score: With the map, on held-out episodes.
        plain: Plain cosine, same episodes.
        gain: score - plain, paired.
        shuffled: The map fitted on shuffled episodes (every query with the exemplars and labels of another), judged on the same true ones;
            `shuffled_gain` is its gain over plain cosine.
        above_shuffled: score - shuffled, paired: what the labels taught, beyond what fitting any map does.
        auroc: How well the mapped margin tells right answers from wrong ones on held-out episodes; None where answers were not given.
        plain_auroc: The same of plain cosine.
        curve: Validation loss after each epoch, [1 + epoch], the first before any step (plain cosine of centred vectors); `epochs`: the one that was kept.
        groups: Names of task x model groups ("mixed").
        held_out: Numbers of the episodes that judged.
        n_train, n_validation, n: Episodes that fitted, that stopped the fit, and that judged.
    """

    kind: str
    weights: Mapping[str, np.ndarray]
    score: Estimate
    plain: Estimate
    gain: Estimate
    shuffled: Estimate
    shuffled_gain: Estimate
    above_shuffled: Estimate
    auroc: Estimate | None
    plain_auroc: Estimate | None
    curve: np.ndarray
    epochs: int
    groups: tuple[str, ...]
    held_out: tuple[int, ...]
    n_train: int
    n_validation: int
    n: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One row per score."""
        scores = {"score": self.score, "plain": self.plain, "gain": self.gain, "shuffled": self.shuffled,
                  "shuffled_gain": self.shuffled_gain, "above_shuffled": self.above_shuffled, "auroc": self.auroc, "plain_auroc": self.plain_auroc}  # fmt: skip
        return pd.DataFrame(
            {"kind": self.kind, "measure": name, "value": e.value, "low": e.low, "high": e.high, "unit": e.unit, "n": e.n}
            for name, e in scores.items()
            if e is not None
        )
