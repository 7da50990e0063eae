"""A published protocol run on a model: its rankings and knock-outs as published, ours beside them, and the published numbers themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from mechicl.results.answers import DoseCurve, ICLAccuracy
from mechicl.results.base import Estimate, Head, Provenance, Skipped
from mechicl.results.heads import HeadScores, RoleAttention
from mechicl.results.study import Series


@dataclass(frozen=True, eq=False)
class KnockOutRow:
    """One condition of a knock-out table, on the same episodes as the intact model.

    `rule`: what chose the heads ("" for conditions without). `open`: the greedy first token over the whole vocabulary begins the right label, the
    published accuracy; `whole`: the right label is the likeliest whole one of the candidates; `cla`: the greedy first token begins some label of the
    context. `open_change`, `whole_change`: minus the intact model's, paired bootstrap. `random_open`, `random_whole`: mean over `n_draws` draws of as
    many random heads of the same layers, interval over draws; `p_open`, `p_whole`: how many draws lose as much, +1 corrected. None or NaN where there
    are no heads or no draws.
    """

    name: str
    kind: Literal["intact", "control", "published", "ours"]
    rule: str
    heads: tuple[Head, ...]
    open: Estimate
    whole: Estimate
    cla: Estimate
    open_change: Estimate | None = None
    whole_change: Estimate | None = None
    mcnemar_p: float = float("nan")
    random_open: Estimate | None = None
    random_whole: Estimate | None = None
    p_open: float = float("nan")
    p_whole: float = float("nan")
    n_draws: int = 0
    note: str = ""


@dataclass(frozen=True, eq=False)
class KnockOuts:
    """Heads switched off by zeroing their slice of the output projection's input at all positions, beside controls. `intact` holds every episode."""

    rows: tuple[KnockOutRow, ...]
    intact: ICLAccuracy
    chance: float
    how: str
    n: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> KnockOutRow:
        return next(row for row in self.rows if row.name == name)

    def to_frame(self) -> pd.DataFrame:
        """One row per condition."""
        rows = []
        for r in self.rows:
            cells: dict[str, object] = {
                "condition": r.name,
                "kind": r.kind,
                "rule": r.rule,
                "heads": " ".join(f"{a}.{b}" for a, b in r.heads),
            }
            for key in ("open", "whole", "cla", "open_change", "whole_change", "random_open", "random_whole"):
                e: Estimate | None = getattr(r, key)
                cells |= {
                    key: np.nan if e is None else e.value,
                    f"{key}_low": np.nan if e is None else e.low,
                    f"{key}_high": np.nan if e is None else e.high,
                }
            rows.append(
                cells
                | {"p_open": r.p_open, "p_whole": r.p_whole, "mcnemar_p": r.mcnemar_p, "n_draws": r.n_draws, "n": self.n, "note": r.note}
            )
        return pd.DataFrame(rows)  # fmt: skip


@dataclass(frozen=True)
class Overlap:
    """How many of two rankings' top k heads are the same: `shared`, what unrelated rankings share on average, and the hypergeometric p of as many."""

    k: int
    shared: int
    expected: float
    p: float


@dataclass(frozen=True, eq=False)
class RankingMatch:
    """A published ranking beside this model's.

    `comparable`: whether this model is the published one; `reason`: why not. `published`, `here` [head]: scores of the published heads, there and
    here (NaN where not comparable); `rank`: their places in this model's ranking, from 1. `correlation`: Spearman's over the published heads only (a
    published list holds no others), with a permutation p.
    """

    kind: str
    score: str
    model: str
    source: str
    comparable: bool
    reason: str
    heads: tuple[Head, ...]
    published: np.ndarray
    here: np.ndarray
    rank: np.ndarray
    n_heads: int
    correlation: float
    correlation_p: float
    overlaps: tuple[Overlap, ...]
    n: int

    def to_frame(self) -> pd.DataFrame:
        """One row per published head."""
        return pd.DataFrame(
            {"ranking": self.kind, "model": self.model, "place": np.arange(1, len(self.heads) + 1), "head": [f"{a}.{b}" for a, b in self.heads],
             "published": self.published, "here": self.here, "place_here": self.rank, "comparable": self.comparable}
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class PublishedNumber:
    """A published number beside this run's. `mark`: how well its source is known; `here`: None where this run has none to compare."""

    name: str
    measure: str
    model: str
    value: float
    n: int | None
    mark: str
    source: str
    here: Estimate | None
    comparable: bool


@dataclass(frozen=True, eq=False)
class TuningChange:
    """What fine-tuning changed on held-out episodes: the same heads and prompts before and after, paired bootstrap over episodes."""

    name: str
    before: Estimate
    after: Estimate
    change: Estimate


@dataclass(frozen=True, eq=False)
class Tuning:
    """A fine-tuning with the heads followed: `growth` along the steps, `curves` [step] of the mean score of the heads that were ranked before it."""

    growth: Series
    curves: Series
    loss: np.ndarray
    changes: tuple[TuningChange, ...]
    n_train: int
    n: int
    folder: str

    def to_frame(self) -> pd.DataFrame:
        """One row per measure: before, after, change."""
        return pd.DataFrame(
            [
                {"measure": c.name, "before": c.before.value, "after": c.after.value, "change": c.change.value, "low": c.change.low,
                 "high": c.change.high, "n": c.change.n}
                for c in self.changes
            ]
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class ProtocolStudy:
    """A published protocol on one model.

    `heads`: every score of every head, on the ranking episodes: "ph_published", "ih_published", "ph[... rows]" by what reads, and ours. `doses`: accuracy
    as the top heads of a ranking go off one after another. `tuning`: None where it was left out. `skipped_parts`: what was not asked for.
    """

    study: str
    heads: HeadScores
    roles: RoleAttention
    knock_outs: KnockOuts
    doses: Mapping[str, DoseCurve]
    rankings: tuple[RankingMatch, ...]
    numbers: tuple[PublishedNumber, ...]
    agreement: tuple[RankingMatch, ...]
    tuning: Tuning | None
    seconds: Mapping[str, float]
    n_rank: int
    n: int
    skipped: tuple[Skipped, ...]
    skipped_parts: tuple[str, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One row per number, of every part: part, name, value, low, high, n."""
        rows: list[dict[str, object]] = []

        def add(part: str, name: str, e: Estimate | None) -> None:
            if e is not None:
                rows.append({"part": part, "name": name, "value": e.value, "low": e.low, "high": e.high, "n": e.n, "unit": e.unit})

        for row in self.knock_outs.rows:
            for key in ("open", "whole", "cla", "open_change", "whole_change", "random_open", "random_whole"):
                add("knock-outs", f"{row.name}: {key.replace('_', ' ')}", getattr(row, key))
        for match in self.rankings:
            for k, head in enumerate(match.heads):
                value = float(match.here[k])
                rows.append(
                    {
                        "part": f"published {match.kind}",
                        "name": f"{head[0]}.{head[1]}",
                        "value": value,
                        "low": np.nan,
                        "high": np.nan,
                        "n": match.n,
                        "unit": "probability",
                    }
                )
        for number in self.numbers:
            add("published numbers", number.name, number.here)
        for change in self.tuning.changes if self.tuning is not None else ():
            add("fine-tuning", change.name, change.change)
        heads = self.heads.to_frame()
        heads = heads.assign(part="head scores", name=heads["score"] + " " + heads["layer"].astype(str) + "." + heads["head"].astype(str))
        return pd.concat([pd.DataFrame(rows), pd.DataFrame(heads[["part", "name", "value", "low", "high", "n", "unit"]])], ignore_index=True)  # fmt: skip


@dataclass(frozen=True, eq=False)
class StudyCost:
    """What a study would take, from a few episodes that were timed. `rows`: (part, how many passes of one episode, seconds); `peak_gib`: memory."""

    rows: tuple[tuple[str, int, float], ...]
    peak_gib: float
    device: str
    measured_on: int
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """All parts together."""
        return float(sum(row[2] for row in self.rows))

    def to_frame(self) -> pd.DataFrame:
        """One row per part."""
        return pd.DataFrame(list(self.rows), columns=["part", "passes", "seconds"])

    def __str__(self) -> str:
        lines = [f"{'part':<44}{'passes':>10}{'time':>10}"]
        lines += [f"{part:<44}{passes:>10,}{spoken(seconds):>10}" for part, passes, seconds in self.rows]
        lines.append(f"{'together':<44}{sum(row[1] for row in self.rows):>10,}{spoken(self.seconds):>10}")
        lines.append(f"peak memory {self.peak_gib:.1f} GiB on {self.device}; estimated from {self.measured_on} timed episodes")
        return "\n".join([*lines, *self.notes])


def spoken(seconds: float) -> str:
    """ "45 s", "12 min", "3.4 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
