"""Circuits: a small set of edges that does what the whole model does, the curve that led to it, and how two of them overlap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from mechicl.results.base import Estimate, Provenance, Skipped
from mechicl.results.nodes import Edge

NodeKind = Literal["embed", "head", "mlp", "logits"]
Level = Literal["edge", "node"]
Replacement = Literal["resample", "mean"]
"""What a receiver reads of a sender whose edge is not in the circuit. resample: its output in the corrupt run. mean: its mean over the corrupt runs, position
by position counted from the end of the prompt."""


@dataclass(frozen=True, eq=False)
class CircuitNode:
    """One node of a circuit, as a graph draws it.

    `name`: as `Sender.name` ("embed", "1.3", "mlp 1"), or "logits". `layer`: -1 for the embeddings, n_layers for the logits. `head`: -1 where there is none.
    `place`: the span where it acts most, "" where nobody measured it. `loss`: faithfulness lost when all its edges are dropped; None for embed and logits.
    """

    name: str
    kind: NodeKind
    layer: int
    head: int = -1
    place: str = ""
    loss: Estimate | None = None


@dataclass(frozen=True, eq=False)
class EdgeLoss:
    """Minimality of one edge: the faithfulness that is lost when this edge alone is dropped from the circuit (paired bootstrap over episodes)."""

    edge: Edge
    loss: Estimate


@dataclass(frozen=True, eq=False)
class NodeGap:
    """Completeness in the form of Wang et al. 2022: one node knocked out of the circuit and of the whole model.

    A complete circuit falls as far as the model does. `circuit`, `model`: faithfulness without the node. `gap`: circuit minus model; below zero where the model has
    something beside the circuit that takes over for the node (a backup).
    """

    node: str
    circuit: Estimate
    model: Estimate
    gap: Estimate


@dataclass(frozen=True, eq=False)
class Circuit:
    """Edges that carry the behaviour, with the evidence, measured on pairs that did not choose them where `held_out`.

    In the circuit's run every receiver reads the present output of a sender whose edge is in `edges`, and its replacement (`replacement`) otherwise.
    A number may mislead: faithfulness can exceed 1 (what opposed the answer was left out), and a circuit can be faithful without being complete.

    Attributes:
        edges: The circuit, best score first; every edge lies on a path from the embeddings to the logits.
        nodes: Its nodes in the order of execution, embed first, logits last.
        level: "node": chosen node by node, and `edges` are all edges between the nodes.
        scores: What each edge was chosen by; NaN where nothing scored it.
        faithfulness: (circuit - corrupt) / (clean - corrupt), ratio of means over episodes, bootstrap interval. 1: as the whole model; 0: as the corrupt run.
        completeness: The same of the complement, the whole model without the circuit's edges: near 0 where nothing else does the work.
        minimality: The loss of every edge, in the order of `edges`; empty for level "node", where `nodes` hold theirs.
        gaps: Completeness node by node, in the form of Wang et al. 2022.
        random_low, random_mean, random_high: Faithfulness of random circuits of as many edges, matched by sender kind and layer; NaN without draws.
        p_random: Share of these (with the +1 correction) at least as faithful; NaN without draws.
        n_edges_possible: Edges of the whole graph.
        places: Node name -> span name where it acts most.
        target: The faithfulness that the search had to reach, on its own pairs.
        found: Faithfulness on the pairs it was found on (optimistic); None where nothing was searched.
        clean, corrupt, kept, complement: The metric in `unit` of every episode: [batch].
        n: Episodes measured. n_found: episodes searched.
    """

    edges: tuple[Edge, ...]
    nodes: tuple[CircuitNode, ...]
    level: Level
    method: str
    scored_by: str
    scores: Mapping[Edge, float]
    faithfulness: Estimate
    completeness: Estimate
    minimality: tuple[EdgeLoss, ...]
    random_low: float
    random_mean: float
    random_high: float
    n_draws: int
    p_random: float
    n_edges_possible: int
    places: Mapping[str, str]
    replacement: Replacement | str
    metric: str
    unit: str
    target: float
    found: Estimate | None
    clean: np.ndarray
    corrupt: np.ndarray
    kept: np.ndarray
    complement: np.ndarray
    n: int
    n_found: int
    held_out: bool
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    name: str = ""
    notes: tuple[str, ...] = ()
    gaps: tuple[NodeGap, ...] = ()
    shape: Mapping[str, Any] = field(default_factory=dict)
    """n_layers, n_heads, n_key_value_heads, mlps (whether layers have one)."""

    @property
    def n_edges(self) -> int:
        """Edges of the circuit."""
        return len(self.edges)

    def to_frame(self) -> pd.DataFrame:
        """One row per edge."""
        losses = {one.edge: one.loss for one in self.minimality}
        nan = Estimate(np.nan, np.nan, np.nan, 0, "faithfulness")
        rows = []
        for edge in self.edges:
            loss = losses.get(edge, nan)
            rows.append(
                {"edge": edge.name, "sender": edge.sender.name, "receiver": edge.receiver.name, "receiver_kind": edge.receiver.kind,
                 "score": self.scores.get(edge, np.nan), "loss": loss.value, "loss_low": loss.low, "loss_high": loss.high,
                 "place": self.places.get(edge.sender.name, ""), "n": self.n}
            )  # fmt: skip
        return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class CircuitCurve:
    """Faithfulness as edges are added in the order of their score: what the slider of the graph moves along.

    Attributes:
        ks: Edges kept, ascending [k].
        edges_in_order: All ranked edges; the circuit at k is the first k of them (`edges_at`).
        scores: What they were ranked by.
        n_live: Of the k edges, those on a path from the embeddings to the logits; the others carry nothing [k].
        faithfulness: [k].
        random_low, random_mean, random_high: 2.5 %, mean, 97.5 % of random circuits of as many edges (connected, matched by sender kind and layer) [k].
        raw: The metric in `unit` [batch, k]; clean, corrupt [batch].
    """

    ks: np.ndarray
    edges_in_order: tuple[Edge, ...]
    scores: Mapping[Edge, float]
    n_live: np.ndarray
    faithfulness: tuple[Estimate, ...]
    random_low: np.ndarray
    random_mean: np.ndarray
    random_high: np.ndarray
    n_draws: int
    raw: np.ndarray
    clean: np.ndarray
    corrupt: np.ndarray
    replacement: Replacement | str
    metric: str
    unit: str
    scored_by: str
    n_edges_possible: int
    n: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    circuit: Circuit | None = None
    level: Level = "edge"
    places: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    shape: Mapping[str, Any] = field(default_factory=dict)
    """As in `Circuit`."""

    def edges_at(self, k: int | np.integer) -> tuple[Edge, ...]:
        """The first k edges, dead ends included."""
        return self.edges_in_order[:k]

    def to_frame(self) -> pd.DataFrame:
        """One row per number of edges."""
        return pd.DataFrame(
            {"k": self.ks, "live": self.n_live, "faithfulness": [f.value for f in self.faithfulness], "low": [f.low for f in self.faithfulness],
             "high": [f.high for f in self.faithfulness], "random_mean": self.random_mean, "random_low": self.random_low,
             "random_high": self.random_high, "n": self.n}
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class KindOverlap:
    """Overlap within one stratum, e.g. edges into keys: possible, in the first, in the second, shared, and shared by chance."""

    kind: str
    n_possible: int
    n_first: int
    n_second: int
    n_shared: int
    expected: float


@dataclass(frozen=True, eq=False)
class CircuitOverlap:
    """Two circuits of models of one shape, compared with chance.

    Attributes:
        names: What the two are.
        level: Edges or nodes compared.
        shared, only_first, only_second: Their names.
        jaccard: Shared over union; Wilson interval over the union's members (not over episodes: find circuits on other episodes for that).
        chance: Jaccard expected of random sets of the same sizes in every stratum; `chance_high`: its 97.5 % quantile.
        expected: Shared members expected by chance.
        p: One-sided, that random sets share at least as many: hypergeometric in every stratum, convolved.
        ks, top_shared, top_chance, top_high: For rankings: members shared by the two top k, expected, and the 97.5 % quantile by chance [k]; empty without.
        rank_correlation: Spearman over all members that both rankings score; NaN without rankings.
    """

    names: tuple[str, str]
    level: Level
    shared: tuple[str, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    n_possible: int
    jaccard: Estimate
    chance: float
    chance_high: float
    expected: float
    p: float
    by_kind: tuple[KindOverlap, ...]
    ks: np.ndarray
    top_shared: np.ndarray
    top_chance: np.ndarray
    top_high: np.ndarray
    rank_correlation: float = float("nan")
    notes: tuple[str, ...] = ()

    @property
    def n_shared(self) -> int:
        """Members of both."""
        return len(self.shared)

    def to_frame(self) -> pd.DataFrame:
        """One row per stratum."""
        return pd.DataFrame(
            [{"kind": s.kind, "possible": s.n_possible, "first": s.n_first, "second": s.n_second, "shared": s.n_shared, "expected": s.expected} for s in self.by_kind]
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class MethodRecovery:
    """One way of finding a circuit on one program whose circuit is known: how much of it was found, over seeds.

    `precision`, `recall`: of the found edges, over seeds (bootstrap). `faithfulness`: of the found circuit on held-out pairs. `exact`: share of seeds with the
    planted edges and no other. `seconds`: mean time.
    """

    method: str
    program: str
    precision: Estimate
    recall: Estimate
    faithfulness: Estimate
    exact: float
    n_edges: float
    n_true: float
    seconds: float
    n: int


@dataclass(frozen=True, eq=False)
class CircuitBenchmark:
    """Ways of finding circuits against planted ones; one row per way and program."""

    rows: tuple[MethodRecovery, ...]
    n_seeds: int
    provenance: Provenance
    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One row per way and program."""
        columns = ("precision", "recall", "faithfulness")
        return pd.DataFrame(
            [{"method": r.method, "program": r.program} | {c: getattr(r, c).value for c in columns}
             | {f"{c}_low": getattr(r, c).low for c in columns} | {f"{c}_high": getattr(r, c).high for c in columns}
             | {"exact": r.exact, "n_edges": r.n_edges, "n_true": r.n_true, "seconds": r.seconds, "n": r.n} for r in self.rows]
        )  # fmt: skip
