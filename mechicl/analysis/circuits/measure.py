"""Faithfulness, completeness and minimality of one circuit, with random circuits of equal size beside it: all from one block of runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mechicl.analysis.circuits.items import Items
from mechicl.analysis.circuits.runs import CircuitRuns
from mechicl.analysis.circuits.search import random_edges, random_nodes
from mechicl.models.edge_graph import EdgeGraph
from mechicl.results import CircuitNode, Edge, EdgeLoss, Estimate
from mechicl.results.circuits import NodeGap


@dataclass(frozen=True, eq=False)
class Measured:
    """What `measure` found. `mask`: the circuit without dead ends; `random`: low, mean, high."""

    mask: np.ndarray
    faithfulness: Estimate
    completeness: Estimate
    kept: np.ndarray
    complement: np.ndarray
    edge_losses: dict[tuple[int, int], Estimate]
    node_losses: dict[int, Estimate]
    gaps: tuple[NodeGap, ...]
    random: tuple[float, float, float]
    n_draws: int
    p_random: float
    notes: tuple[str, ...]

    def edges(self, items: Items, value: np.ndarray) -> tuple[Edge, ...]:
        """The circuit's edges, the strongest first; unscored ones by what dropping them costs."""
        scores = items.edge_scores(self.mask, value)
        places = {items.edge(row, column): (row, column) for row, column in np.argwhere(self.mask).tolist()}

        def rank(edge: Edge) -> tuple[float, float]:
            loss = self.edge_losses.get(places[edge])
            score = abs(scores[edge])
            return (np.inf if np.isnan(score) else -score, -loss.value if loss else 0.0)

        return tuple(sorted(places, key=rank))

    def minimality(self, items: Items, value: np.ndarray) -> tuple[EdgeLoss, ...]:
        """Losses in the order of `edges`."""
        graph = items.graph
        at = {edge: (graph.receiver_index[edge.receiver], graph.sender_index[edge.sender]) for edge in self.edges(items, value)}
        return tuple(EdgeLoss(edge, self.edge_losses[key]) for edge, key in at.items() if key in self.edge_losses)

    def nodes(self, graph: EdgeGraph, places: dict[str, str]) -> tuple[CircuitNode, ...]:
        """Senders of the circuit and the logits."""
        found = [
            CircuitNode(s.name, s.kind, s.layer, s.head, places.get(s.name, ""), self.node_losses.get(graph.sender_index[s]))
            for s in graph.nodes(self.mask)
        ]
        return (*found, CircuitNode("logits", "logits", graph.n_layers)) if self.mask.any() else ()


def measure(runs: CircuitRuns, items: Items, chosen: np.ndarray, *, n_random: int, seed: int) -> Measured:
    """Run the circuit, its complement, the circuit without each edge and each node, the model without each node, and random circuits.

    Args:
        runs: The pairs.
        items: What was chosen from.
        chosen: The circuit [item].
        n_random: Random circuits.
        seed: Draws them and the intervals.
    """
    graph = items.graph
    mask = graph.live(items.masks(chosen[None]))[0]
    members: list[tuple[int, int]] = [(row, column) for row, column in np.argwhere(mask).tolist()] if items.level == "edge" else []
    nodes = [graph.sender_index[s] for s in graph.nodes(mask) if s.kind != "embed"]
    without_edge = np.repeat(mask[None], len(members), 0)
    for k, (row, column) in enumerate(members):
        without_edge[k, row, column] = False
    off = [(items.at[:, 1] != column) for column in nodes]
    without_node = [items.masks((chosen & rest)[None])[0] for rest in off]
    model_without = [items.masks(rest[None])[0] for rest in off]
    sets = np.stack([mask, items.masks(~chosen[None])[0], *without_edge, *without_node, *model_without])
    values = runs.values(sets)
    kept, complement, rest = values[0], values[1], values[2:]
    edge_values, node_values, model_values = np.split(rest, [len(members), len(members) + len(nodes)])
    gaps = tuple(
        NodeGap(
            graph.senders[column].name,
            runs.estimate(ours, seed=seed),
            runs.estimate(theirs, seed=seed),
            runs.estimate(ours, theirs, seed=seed),
        )
        for column, ours, theirs in zip(nodes, node_values, model_values, strict=True)
    )
    band, note = random_faithfulness(runs, items, chosen, mask, n_random, np.random.default_rng([seed, 2]))
    faithfulness = runs.estimate(kept, seed=seed)
    closer = int((np.abs(1 - band) <= abs(1 - faithfulness.value)).sum())
    low, mean, high = (float(np.quantile(band, 0.025)), float(band.mean()), float(np.quantile(band, 0.975))) if len(band) else (np.nan,) * 3
    return Measured(
        mask=mask, faithfulness=faithfulness, completeness=runs.estimate(complement, seed=seed), kept=kept, complement=complement,
        edge_losses={at: runs.estimate(kept, value, seed=seed) for at, value in zip(members, edge_values, strict=True)},
        node_losses={column: runs.estimate(kept, value, seed=seed) for column, value in zip(nodes, node_values, strict=True)},
        gaps=gaps, random=(low, mean, high), n_draws=len(band), p_random=(1 + closer) / (1 + len(band)) if len(band) else float("nan"),
        notes=(*_warnings(runs, mask, seed), *note),
    )  # fmt: skip


def random_faithfulness(
    runs: CircuitRuns, items: Items, chosen: np.ndarray, live: np.ndarray, n_random: int, rng: np.random.Generator
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Faithfulness of random circuits of equal size [draw], and a note where they could not be matched in full."""
    graph = items.graph
    if not n_random or not live.any():
        return np.zeros(0) if not n_random else np.zeros(n_random), ()
    if items.level == "node":
        columns = np.zeros(len(graph.senders), dtype=bool)
        columns[items.at[chosen, 1]] = True
        draws = random_nodes(graph, columns, n_random, rng)
        return runs.faithfulness(items.masks(draws[:, items.at[:, 1]])), ()
    draws, matched = random_edges(graph, live, n_random, rng)
    note = f"random circuits match the senders' kinds and layers in {matched:.0%} of edges." if matched < 0.995 else ""
    return runs.faithfulness(draws), (note,) if note else ()


def _warnings(runs: CircuitRuns, mask: np.ndarray, seed: int) -> list[str]:
    found = []
    if not mask.any():
        found.append("the circuit is empty: no edge of it lies on a path from the embeddings to the logits.")
    draws = np.random.default_rng(seed).choice(runs.gap, (500, runs.n)).mean(1)
    if np.quantile(draws, 0.025) <= 0 <= np.quantile(draws, 0.975):
        found.append("the clean-corrupt difference is not clearly apart from zero: every share of it, faithfulness first, is uncertain.")
    return found
