"""What a search chooses from: the edges of a model, or its nodes. Sets of items become sets of edges."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mechicl.analysis.circuits.scores import edge_scores, node_scores
from mechicl.models.edge_graph import EdgeGraph
from mechicl.results import Edge, Sender
from mechicl.results.circuits import Level

MASK_BYTES = 2**28
"""Bytes of masks that exist at once."""


@dataclass(eq=False)
class Items:
    """Edges, or heads and MLPs (the embeddings are always in). `at` [item, 2]: (receiver, sender) of an edge, (-1, sender) of a node."""

    graph: EdgeGraph
    level: Level
    at: np.ndarray
    index: dict[tuple[int, int], int] = field(init=False)

    def __post_init__(self) -> None:
        self.index = {(int(row), int(column)): i for i, (row, column) in enumerate(self.at)}

    @staticmethod
    def of(graph: EdgeGraph, level: Level) -> Items:
        """Everything that can be chosen."""
        if level == "edge":
            return Items(graph, level, np.argwhere(graph.possible))
        return Items(graph, level, np.array([(-1, i) for i, sender in enumerate(graph.senders) if sender.kind != "embed"]))

    def __len__(self) -> int:
        return len(self.at)

    def masks(self, sets: np.ndarray) -> np.ndarray:
        """Sets of items [set, item] as sets of edges [set, receiver, sender]."""
        out = np.zeros((len(sets), *self.graph.possible.shape), dtype=bool)
        if self.level == "edge":
            out[:, self.at[:, 0], self.at[:, 1]] = sets
            return out
        columns = np.zeros((len(sets), len(self.graph.senders)), dtype=bool)
        columns[:, self.at[:, 1]] = sets
        rows = np.zeros((len(sets), len(self.graph.receivers)), dtype=bool)
        rows[:, -1] = True
        for column, reads in enumerate(self.graph.inputs):
            for row in reads:
                rows[:, row] |= columns[:, column]
        columns[:, self.graph.sender_index[Sender("embed")]] = True
        return columns[:, None, :] & rows[:, :, None] & self.graph.possible

    def blocks(self, sets: np.ndarray) -> Iterator[np.ndarray]:
        """Masks of the sets, a bounded number at a time."""
        size = max(1, MASK_BYTES // self.graph.possible.size)
        for start in range(0, len(sets), size):
            yield self.masks(sets[start : start + size])

    def trim(self, chosen: np.ndarray) -> np.ndarray:
        """Without dead ends; nodes have none."""
        return chosen if self.level == "node" else self.graph.live(self.masks(chosen[None]))[0][self.at[:, 0], self.at[:, 1]]

    def chosen_at(self, some: Sequence[int]) -> np.ndarray:
        """Truth values of item numbers."""
        out = np.zeros(len(self), dtype=bool)
        out[list(some)] = True
        return out

    def chosen(self, members: Collection[Any]) -> np.ndarray:
        """Truth values of edges or nodes.

        Raises:
            OptionError: one that the model does not have.
        """
        if self.level == "edge":
            mask = self.graph.mask(members)
            return mask[self.at[:, 0], self.at[:, 1]]
        self.graph.node_mask(members)  # refuses nodes that do not exist
        return self.chosen_at([self.index[-1, self.graph.sender_index[node]] for node in members if node.kind != "embed"])

    def grid(self, value: np.ndarray) -> np.ndarray:
        """Values of edges as [receiver, sender], NaN elsewhere."""
        out = np.full(self.graph.possible.shape, np.nan)
        out[self.at[:, 0], self.at[:, 1]] = value
        return out

    def scored(self, scores: Any) -> tuple[np.ndarray, str]:
        """Given scores, [item], and their name."""
        if self.level == "edge":
            found, name = edge_scores(self.graph, scores)
            return found[self.at[:, 0], self.at[:, 1]], name
        found, name = node_scores(self.graph, scores)
        return found[self.at[:, 1]], name

    def values_of(self, scores: Mapping[Edge, float]) -> np.ndarray:
        """A circuit's own scores, [item]; NaN where it has none (node circuits)."""
        known = {edge: value for edge, value in scores.items() if not np.isnan(value)}
        return self.scored(known)[0] if known and self.level == "edge" else np.full(len(self), np.nan)

    def edge_scores(self, mask: np.ndarray, value: np.ndarray) -> dict[Edge, float]:
        """Scores of a mask's edges; in a node circuit an edge has its sender's."""
        found = {}
        for row, column in np.argwhere(mask).tolist():
            item = self.index.get((row, column) if self.level == "edge" else (-1, column))
            found[self.edge(row, column)] = float("nan") if item is None else float(value[item])
        return found

    def edge(self, row: int, column: int) -> Edge:
        """The edge at a place of the masks."""
        return Edge(self.graph.senders[column], self.graph.receivers[row])

    def ordered_edges(self, order: Sequence[int], value: np.ndarray) -> tuple[tuple[Edge, ...], dict[Edge, float]]:
        """Edges as the items come in: of a node, those that it closes to what is there."""
        if self.level == "edge":
            found = {self.edge(*self.at[i].tolist()): float(value[i]) for i in order}
            return tuple(found), found
        chosen, found = np.zeros(len(self), dtype=bool), {}
        for i in (-1, *order):  # first what the embeddings give the logits
            if i >= 0:
                chosen[i] = True
            for edge in self.graph.listed(self.masks(chosen[None])[0]):
                found.setdefault(edge, float(value[i]) if i >= 0 else float("nan"))
        return tuple(found), found

    def edges_kept(self, sets: np.ndarray) -> np.ndarray:
        """Edges of each set, dead ends included."""
        return self.masks(sets).sum((1, 2))
