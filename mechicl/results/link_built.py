"""Fine-tuned models beside the base that they came from: which heads carry the link in either, weights exchanged between them, and the link against the prior."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd

from mechicl.errors import OptionError
from mechicl.results.base import Estimate, Head, Provenance, Skipped, columns, mean_or_nan
from mechicl.results.link import LinkPrior

Recipient = Literal["base", "adapted"]
"""Which model a graft was made in; the other one gave the weights."""
Was = Literal["had it", "in part", "new", "unknown"]
"""What a head of the adapted model's link circuit was in the base. had it: its score, with the whole interval, was above the threshold and 1.5 times its null,
and at least half of what it is now. in part: above both, with less than half. new: not above them. unknown: no score says what it does now."""


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
            out: dict[str, object] = {"model": row.name, "finding": row.finding, "verdict": row.verdict, **columns("accuracy", row.accuracy), **columns("change", row.change),
                   **columns("margin_change", row.margin_change), "mcnemar_p": row.mcnemar_p, "base_accuracy": self.base_accuracy.value,
                   "link_heads": " ".join(f"{a}.{b}" for a, b in (h.head for h in row.link)), "n": self.n_prove}  # fmt: skip
            for was in ("had it", "in part", "new"):
                out[was] = sum(h.was == was for h in row.link)
            if row.ablated is not None and row.ablated_change is not None:
                out |= {
                    "ablated": row.ablated.value,
                    **columns("ablated_change", row.ablated_change),
                    "ablated_random": mean_or_nan(row.ablated_random),
                }
            for one in row.overlap:
                out |= {f"{one.score}_shared": len(one.shared), f"{one.score}_expected": one.expected, f"{one.score}_p": one.p, f"{one.score}_spearman": one.spearman}  # fmt: skip
            for one in row.grafts:
                name = f"{one.what} {one.letters if one.letters != 'qkvo' else ''}".strip() + f" into {one.recipient}"
                out |= {name: one.accuracy.value, f"{name}, change": one.change.value, f"{name}, random": mean_or_nan(one.random)}
            rows.append(out)
        return pd.DataFrame(rows)

    def heads_frame(self) -> pd.DataFrame:
        """One row per link head of a model."""
        return pd.DataFrame(
            [{"model": row.name, "layer": h.head[0], "head": h.head[1], "role": h.role, "role_base": h.role_base, "was": h.was, **columns("base", h.base), **columns("adapted", h.adapted),
              **columns("change", h.change), "carried_base": h.carried_base, "carried_adapted": h.carried_adapted, "n": h.base.n}
             for row in self.rows for h in row.link]
        )  # fmt: skip

    def grafts_frame(self) -> pd.DataFrame:
        """One row per graft."""
        return pd.DataFrame(
            [{"model": row.name, "recipient": g.recipient, "what": g.what, "letters": g.letters, "heads": " ".join(f"{a}.{b}" for a, b in g.heads),
              **columns("accuracy", g.accuracy), **columns("change", g.change), **columns("margin_change", g.margin_change), "mcnemar_p": g.mcnemar_p,
              "random": mean_or_nan(g.random), "n_random": len(g.random), "p_random": g.p_random,
              "random_margin_change": mean_or_nan(g.random_margin_change), "p_margin": g.p_margin, "note": g.note, "n": g.accuracy.n}
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
            [{"model": r.model, "shots": r.shots, **columns("preference", r.preference), **columns("link", r.link), **columns("prior", r.prior),
              **columns("change", r.change or nothing), "p": r.p, "crossing": self.results[r.model].crossing, "known": self.results[r.model].known.value, "n": self.n}
             for r in self.rows]
        )  # fmt: skip
