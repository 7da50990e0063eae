"""The heads that carry a link in one model, the same before and after a fine-tuning, and the link against the prior over several models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd

from mechicl.errors import OptionError
from mechicl.results.answers import ICLAccuracy
from mechicl.results.base import Estimate, Head, Provenance, Skipped
from mechicl.results.heads import HeadScores, Score
from mechicl.results.link import LinkPrior
from mechicl.results.patching import PatchEffects
from mechicl.results.study import HeadSet

Recipient = Literal["base", "adapted"]
"""Which model a graft was made in; the other one gave the weights."""
Was = Literal["had it", "in part", "new", "unknown"]
"""What a head of the adapted model's link circuit was in the base. had it: its score, with the whole interval, was above the threshold and 1.5 times its null,
and at least half of what it is now. in part: above both, with less than half. new: not above them. unknown: no score says what it does now."""


@dataclass(frozen=True, eq=False)
class Carried:
    """Heads whose outputs come from the twin in which the two labels are exchanged, on held-out pairs.

    Attributes:
        heads: The set.
        share: How far the answer goes over to the twin's: 0 stays, 1 is the twin's own, ratio of means over pairs.
        random: The same for each random set of as many heads.
        p_random: One-sided, that a random set carries as much, with the +1 correction; NaN without a random set.
        gap: What the share is of: nats between the two runs, mean over pairs.
    """

    heads: tuple[Head, ...]
    share: Estimate
    random: np.ndarray
    p_random: float
    gap: Estimate


@dataclass(frozen=True, eq=False)
class LinkCircuit:
    """Which heads carry the link in one model. Heads are found on one half of the episodes; `held_out`, `accuracy`, the sets' ablations and `moved` are of the other half.

    Attributes:
        scores: Attention scores on the finding half: "induction", "ila", "previous_token".
        held_out: The same on the other half.
        carried: Each head's share of the way to a twin prompt when its output alone is the twin's (finding half), by what the twin exchanges over the examples: "labels", "items".
        worth: Margin lost when the head alone is switched off (finding half), nats.
        sets: Sets by rule, each switched off on the other half beside matched random heads; empty where no head passes.
        moved: For each set that is not empty, by (kind, twin): all its heads' outputs taken from the twin at once, on the other half.
        spans: Where the link is, layer by span (the stream taken from the twin with exchanged items); None where it was not asked for.
        accuracy: Of the intact model on the other half, with the zero-shot control.
        n_find, n_prove: Episodes of either half.
        skipped: Episodes without a twin.
    """

    scores: HeadScores
    held_out: HeadScores
    carried: Mapping[str, Score]
    worth: Score
    sets: tuple[HeadSet, ...]
    moved: Mapping[tuple[str, str], Carried]
    spans: PatchEffects | None
    accuracy: ICLAccuracy
    n_find: int
    n_prove: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()

    def __getitem__(self, kind: str) -> HeadSet:
        """The set of a kind.

        Raises:
            OptionError: there is no such kind.
        """
        for one in self.sets:
            if one.kind == kind:
                return one
        raise OptionError(f"kind must be one of {', '.join(s.kind for s in self.sets)}; got {kind!r}. Name one of the sets.")

    def to_frame(self) -> pd.DataFrame:
        """One row per head: every number that there is of it, and the sets it is in."""
        columns: dict[str, Score] = {
            **self.scores.scores,
            **{f"carried_{twin}": one for twin, one in self.carried.items()},
            "worth": self.worth,
        }
        rows = []
        for cell in np.ndindex(*self.worth.value.shape):
            row: dict[str, object] = {"layer": cell[0], "head": cell[1]}
            for name, one in columns.items():
                row |= {
                    name: one.value[cell],
                    f"{name}_low": one.low[cell],
                    f"{name}_high": one.high[cell],
                    f"{name}_p": one.p_corrected[cell],
                }
            for name, one in self.held_out.scores.items():
                row[f"{name}_held_out"] = one.value[cell]
            rows.append(row | {"sets": "; ".join(s.kind for s in self.sets if cell in s.heads), "n": self.n_find})
        return pd.DataFrame(rows)

    def sets_frame(self) -> pd.DataFrame:
        """One row per set: what it costs to switch it off and what it carries, beside random heads."""
        rows = []
        for one in self.sets:
            row: dict[str, object] = {
                "set": one.kind,
                "heads": " ".join(f"{a}.{b}" for a, b in one.heads),
                "finding": one.finding,
                "n": self.n_prove,
            }
            if one.ablation is not None:
                off = one.ablation.chosen
                row |= {"intact": one.ablation.intact.accuracy.value, "off": off.accuracy.value, "change": off.change.value, "change_low": off.change.low,
                        "change_high": off.change.high, "random_off": one.ablation.random_mean.value, "p_random": one.ablation.p_random}  # fmt: skip
            for twin in self.carried:
                if (moved := self.moved.get((one.kind, twin))) is not None:
                    name = f"carried_{twin}"
                    row |= {**_columns(name, moved.share), f"{name}_random": _mean(moved.random), f"{name}_p_random": moved.p_random}
            rows.append(row)
        return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class LinkHead:
    """A head of the adapted model's link circuit, and what it was in the base: the same head, the same episodes.

    Attributes:
        role: The score that is highest in the adapted model; "none" where none is above the threshold. `role_base`: the same in the base.
        base, adapted: That score in either model on the held-out half (the heads were found on the other), probability.
        change: adapted - base, paired over episodes.
        carried_base, carried_adapted: Share of the way to the twin with exchanged items through this head alone; NaN in a base that does not tell the twins apart.
        was: See `Was`.
    """

    head: Head
    role: str
    role_base: str
    base: Estimate
    adapted: Estimate
    change: Estimate
    carried_base: float
    carried_adapted: float
    was: Was


@dataclass(frozen=True, eq=False)
class Graft:
    """One model with weights of the other at some heads, or in a whole part of it, on the held-out half.

    Attributes:
        recipient: The model that was changed; the other one gave.
        what: "link heads", a role ("matching heads"), "all other heads", "heads of layer 0", or a part: "attention", "mlps", "embeddings", "vision".
        heads: Whose weights were exchanged; empty for parts.
        letters: Which of their maps: "qkvo", or "qk" (where to look), "vo" (what to hand on).
        accuracy: Of the graft.
        change: graft - recipient, paired over episodes, probability; `margin_change` likewise, nats.
        mcnemar_p: Exact test of the answers that changed.
        random: Accuracy of each graft of as many random heads; `random_margin_change`: their mean change of the margin, nats.
        p_random: One-sided, that random heads do as much: lose as much in the adapted model, gain as much in the base. NaN without them. `p_margin`: the same by the margin,
            which tells where accuracy is full.
        note: What must be said, e.g. that key/value heads are shared.
    """

    recipient: Recipient
    what: str
    heads: tuple[Head, ...]
    letters: str
    accuracy: Estimate
    change: Estimate
    margin_change: Estimate
    mcnemar_p: float
    random: np.ndarray
    p_random: float
    random_margin_change: np.ndarray
    p_margin: float
    note: str = ""


@dataclass(frozen=True, eq=False)
class LinkOverlap:
    """Heads among the top k of one score in both models, against chance (hypergeometric, one-sided) and as a rank correlation over all heads."""

    score: str
    k: int
    shared: tuple[Head, ...]
    expected: float
    p: float
    spearman: float


@dataclass(frozen=True, eq=False)
class Adapted:
    """One fine-tuned model beside its base.

    Attributes:
        name: As given.
        accuracy: On the held-out half; `change` from the base, paired; `margin_change` in nats.
        link: The heads that carry its link, best first.
        rule: How they were chosen.
        ablated: Accuracy without them (mean ablation), and `ablated_random` [draw] without as many random heads; None without link heads.
        overlap: By score.
        grafts: Weights exchanged with the base.
        verdict: In words. `finding`: "built", "sharpened", "both" or "no link".
    """

    name: str
    accuracy: Estimate
    change: Estimate
    margin_change: Estimate
    mcnemar_p: float
    link: tuple[LinkHead, ...]
    rule: str
    ablated: Estimate | None
    ablated_change: Estimate | None
    ablated_random: np.ndarray
    overlap: tuple[LinkOverlap, ...]
    grafts: tuple[Graft, ...]
    finding: str
    verdict: str

    def graft(self, recipient: Recipient, what: str, letters: str = "qkvo") -> Graft:
        """One graft.

        Raises:
            OptionError: it was not made.
        """
        for one in self.grafts:
            if (one.recipient, one.what, one.letters) == (recipient, what, letters):
                return one
        raise OptionError(
            f"graft must be one that was made; got {what!r} ({letters}) in the {recipient} model of {self.name!r}. See `grafts`."
        )


@dataclass(frozen=True, eq=False)
class BuildOrSharpen:
    """Fine-tuned models beside the base that they came from: was the link built, or sharpened?

    Attributes:
        rows: One per fine-tuned model, in the order given.
        base_accuracy: Of the base on the held-out half; `zero_shot` the same without examples.
        chance: One over the candidates.
        base_name: What the base is called.
    """

    rows: tuple[Adapted, ...]
    base_name: str
    base_accuracy: Estimate
    zero_shot: Estimate | None
    chance: float
    n_find: int
    n_prove: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Adapted:
        """A model's row.

        Raises:
            OptionError: there is none of that name.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise OptionError(f"name must be one of {', '.join(r.name for r in self.rows)}; got {name!r}. Name a model that was given.")

    def to_frame(self) -> pd.DataFrame:
        """One row per fine-tuned model."""
        rows = []
        for row in self.rows:
            out: dict[str, object] = {"model": row.name, "finding": row.finding, "verdict": row.verdict, **_columns("accuracy", row.accuracy), **_columns("change", row.change),
                   **_columns("margin_change", row.margin_change), "mcnemar_p": row.mcnemar_p, "base_accuracy": self.base_accuracy.value,
                   "link_heads": " ".join(f"{a}.{b}" for a, b in (h.head for h in row.link)), "n": self.n_prove}  # fmt: skip
            for was in ("had it", "in part", "new"):
                out[was] = sum(h.was == was for h in row.link)
            if row.ablated is not None and row.ablated_change is not None:
                out |= {
                    "ablated": row.ablated.value,
                    **_columns("ablated_change", row.ablated_change),
                    "ablated_random": _mean(row.ablated_random),
                }
            for one in row.overlap:
                out |= {f"{one.score}_shared": len(one.shared), f"{one.score}_expected": one.expected, f"{one.score}_p": one.p, f"{one.score}_spearman": one.spearman}  # fmt: skip
            for one in row.grafts:
                name = f"{one.what} {one.letters if one.letters != 'qkvo' else ''}".strip() + f" into {one.recipient}"
                out |= {name: one.accuracy.value, f"{name}, change": one.change.value, f"{name}, random": _mean(one.random)}
            rows.append(out)
        return pd.DataFrame(rows)

    def heads_frame(self) -> pd.DataFrame:
        """One row per link head of a model."""
        return pd.DataFrame(
            [{"model": row.name, "layer": h.head[0], "head": h.head[1], "role": h.role, "role_base": h.role_base, "was": h.was, **_columns("base", h.base), **_columns("adapted", h.adapted),
              **_columns("change", h.change), "carried_base": h.carried_base, "carried_adapted": h.carried_adapted, "n": h.base.n}
             for row in self.rows for h in row.link]
        )  # fmt: skip

    def grafts_frame(self) -> pd.DataFrame:
        """One row per graft."""
        return pd.DataFrame(
            [{"model": row.name, "recipient": g.recipient, "what": g.what, "letters": g.letters, "heads": " ".join(f"{a}.{b}" for a, b in g.heads),
              **_columns("accuracy", g.accuracy), **_columns("change", g.change), **_columns("margin_change", g.margin_change), "mcnemar_p": g.mcnemar_p,
              "random": _mean(g.random), "n_random": len(g.random), "p_random": g.p_random,
              "random_margin_change": _mean(g.random_margin_change), "p_margin": g.p_margin, "note": g.note, "n": g.accuracy.n}
             for row in self.rows for g in row.grafts]
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class PriorShift:
    """One model's preference at one number of shots, and how it differs from the first model's on the same queries.

    `preference`: log p(link's name) - log p(known name), nats. `change`: against the first model, paired, nats; None for the first model itself.
    `link`, `prior`: share of queries called by either name. `p`: sign flips, corrected over the rows of one model.
    """

    model: str
    shots: int
    preference: Estimate
    link: Estimate
    prior: Estimate
    change: Estimate | None
    p: float


@dataclass(frozen=True, eq=False)
class LinkPriors:
    """The link against the prior in several models, the same renamed queries in all.

    Attributes:
        rows: By model and shots.
        results: Each model's own `LinkPrior`.
        n: Queries that every model could be asked.
        stubborn: For each model the known names that still win at the most shots: name -> share of its queries that are called so.
    """

    rows: tuple[PriorShift, ...]
    results: Mapping[str, LinkPrior]
    n: int
    stubborn: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def provenance(self) -> Provenance:
        """Of the first model's run."""
        return next(iter(self.results.values())).provenance

    @property
    def models(self) -> tuple[str, ...]:
        """In order."""
        return tuple(self.results)

    def to_frame(self) -> pd.DataFrame:
        """One row per model and number of shots."""
        nothing = Estimate(np.nan, np.nan, np.nan, 0, "nats")
        return pd.DataFrame(
            [{"model": r.model, "shots": r.shots, **_columns("preference", r.preference), **_columns("link", r.link), **_columns("prior", r.prior),
              **_columns("change", r.change or nothing), "p": r.p, "crossing": self.results[r.model].crossing, "known": self.results[r.model].known.value, "n": self.n}
             for r in self.rows]
        )  # fmt: skip


def _columns(name: str, e: Estimate) -> dict[str, float]:
    return {name: e.value, f"{name}_low": e.low, f"{name}_high": e.high}


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
