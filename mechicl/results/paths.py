"""What runs along single edges: path patching, and attention knocked out between two groups of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mechicl.errors import OptionError
from mechicl.results.answers import ICLAccuracy
from mechicl.results.base import Estimate, Head, Provenance, Skipped
from mechicl.results.nodes import Edge, Receiver, Sender, feeds


@dataclass(frozen=True, eq=False)
class PathEffects:
    """What each edge carries: one sender's output, exchanged for that of the other run, in what one receiver reads, and nowhere else.

    `value` [sender, receiver] is a share of the whole difference between the runs: 0 is the corrupt run, 1 the clean run, in both directions (ratio of the means
    over episodes), so that an edge that carries nothing is at 0 when denoising and at 1 when noising. `low`, `high`: bootstrap 95 % over episodes. `p`: sign-flip
    permutation test of the per-episode change against the run that was started from, two-sided; `p_corrected`: over all edges (`correction`). All are NaN where
    there is no edge, because the sender comes after the receiver.

    `raw` [batch, sender, receiver]: the metric of each patched run, in `unit`. `clean`, `corrupt` [batch]: the metric of the two runs. `direction`: "denoise" starts
    from the corrupt run and takes the sender's output from the clean one; "noise" the other way round. `freeze`: "all", every other node keeps its output of the
    start run until the receiver; "heads", MLPs between them are computed anew. `pairs`: how the pairs were made. `places`: the span at which the receivers' input
    was changed; "all positions" otherwise.
    """

    senders: tuple[Sender, ...]
    receivers: tuple[Receiver, ...]
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    p_corrected: np.ndarray
    raw: np.ndarray
    clean: np.ndarray
    corrupt: np.ndarray
    metric: str
    unit: str
    direction: str
    freeze: str
    pairs: str
    n: int
    provenance: Provenance
    places: str = "all positions"
    correction: str = "holm"
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def change(self) -> np.ndarray:
        """Share of the whole difference that an edge moves, [sender, receiver]: `value` when denoising, 1 - `value` when noising; 0 is an idle edge in both."""
        return self.value if self.direction == "denoise" else 1.0 - self.value

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge that can exist, receiver by receiver."""
        return tuple(Edge(s, r) for r in self.receivers for s in self.senders if feeds(s, r))

    def index(self, edge: Edge) -> tuple[int, int]:
        """Where an edge stands in the arrays.

        Raises:
            OptionError: it was not patched.
        """
        if edge.sender not in self.senders or edge.receiver not in self.receivers:
            raise OptionError(
                f"edge must be between the patched senders and receivers; got {edge.name}. Patch with its sender and receiver."
            )
        return self.senders.index(edge.sender), self.receivers.index(edge.receiver)

    def __getitem__(self, edge: Edge) -> Estimate:
        """The effect of one edge, with its interval."""
        at = self.index(edge)
        return Estimate(
            float(self.value[at]),
            float(self.low[at]),
            float(self.high[at]),
            self.n,
            "share of the clean-corrupt difference",
            "bootstrap 95 %",
        )

    def scores(self) -> Mapping[Edge, float]:
        """`change` of every edge."""
        change = self.change
        return {edge: float(change[self.index(edge)]) for edge in self.edges}

    def top(self, k: int) -> tuple[Edge, ...]:
        """The k edges with the largest change, by size."""
        scores = self.scores()
        return tuple(sorted(scores, key=lambda edge: -abs(scores[edge]) if np.isfinite(scores[edge]) else np.inf)[:k])

    def to_frame(self) -> pd.DataFrame:
        """One row per edge."""
        rows = []
        for edge in self.edges:
            at = self.index(edge)
            rows.append(
                {"sender": edge.sender.name, "receiver": edge.receiver.name, "value": self.value[at], "low": self.low[at], "high": self.high[at],
                 "change": self.change[at], f"raw_{self.unit.replace(' ', '_')}": float(self.raw[(slice(None), *at)].mean()),
                 "p": self.p[at], "p_corrected": self.p_corrected[at], "n": self.n}
            )  # fmt: skip
        return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class SpanKnockOut:
    """The model with one group of tokens kept from reading another.

    `layers`: where (all of them by default); `heads`: which, None for all. `accuracy`, `change` (paired, against the intact model), `margin_change` (nats), `mcnemar_p`: as in
    `AblationCell`. `n_cells`: destination-source pairs of tokens that were blocked, mean over episodes. `control_accuracy`, `control_change`, `control_margin_change`: the mean over
    the draws of the matched random control with its interval over draws, None without one; `p_random`: share of draws (with the +1 correction) whose margin falls at least as far, NaN without.
    `control`: what was drawn, in words.
    """

    name: str
    dest: str
    src: str
    layers: tuple[int, ...]
    heads: tuple[Head, ...] | None
    accuracy: Estimate
    change: Estimate
    margin_change: Estimate
    mcnemar_p: float
    n_cells: float
    correct: np.ndarray
    margins: np.ndarray
    control: str = ""
    control_accuracy: Estimate | None = None
    control_change: Estimate | None = None
    control_margin_change: Estimate | None = None
    p_random: float = float("nan")
    p_corrected: float = float("nan")
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class SpanKnockOuts:
    """Attention knocked out between groups of tokens, one row for each pair of groups and window of layers, beside the intact model.

    `p_corrected` of the rows is McNemar's p, Holm over all rows.
    """

    rows: tuple[SpanKnockOut, ...]
    intact: ICLAccuracy
    zero_shot: Estimate | None
    n_draws: int
    n: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> SpanKnockOut:
        """The first row of that name, "right label <- right image" for a pair.

        Raises:
            OptionError: there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise OptionError(f"name must be one of {', '.join(dict.fromkeys(row.name for row in self.rows))}; got {name!r}. Pick one of them.")

    def curve(self, name: str) -> tuple[SpanKnockOut, ...]:
        """All rows of one pair: one for each window of layers, in the order asked for.

        Raises:
            OptionError: there is none.
        """
        self[name]
        return tuple(row for row in self.rows if row.name == name)

    def to_frame(self) -> pd.DataFrame:
        """One row per knock-out."""
        columns = []
        for row in self.rows:
            nothing = Estimate(np.nan, np.nan, np.nan, 0)
            control, control_margin = row.control_accuracy or nothing, row.control_margin_change or nothing
            columns.append(
                {"name": row.name, "dest": row.dest, "src": row.src, "first_layer": min(row.layers), "last_layer": max(row.layers), "n_layers": len(row.layers),
                 "accuracy": row.accuracy.value, "low": row.accuracy.low, "high": row.accuracy.high,
                 "change": row.change.value, "change_low": row.change.low, "change_high": row.change.high,
                 "margin_change_nats": row.margin_change.value, "margin_low": row.margin_change.low, "margin_high": row.margin_change.high,
                 "mcnemar_p": row.mcnemar_p, "p_corrected": row.p_corrected, "n_cells": row.n_cells,
                 "control_accuracy": control.value, "control_margin_change_nats": control_margin.value, "p_random": row.p_random, "n": row.accuracy.n}
            )  # fmt: skip
        return pd.DataFrame(columns)
