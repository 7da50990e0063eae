"""The heads that carry a link in one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mechicl.errors import OptionError
from mechicl.results.answers import ICLAccuracy
from mechicl.results.base import Estimate, Head, Provenance, Skipped, columns, mean_or_nan
from mechicl.results.heads import HeadScores, Score
from mechicl.results.patching import PatchEffects
from mechicl.results.study import HeadSet


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
                    row |= {**columns(name, moved.share), f"{name}_random": mean_or_nan(moved.random), f"{name}_p_random": moved.p_random}
            rows.append(row)
        return pd.DataFrame(rows)
