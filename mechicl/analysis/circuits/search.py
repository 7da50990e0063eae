"""Small sets that are faithful: prefixes of a ranking, growth from the logits, pruning by exact effects. No model here, only a function that scores sets.

A set is a row of truth values over items (edges or nodes); `value` takes [set, item] and returns how close each set is to the whole model, 1 = there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mechicl.models.edge_graph import EdgeGraph
from mechicl.results.nodes import Sender

Value = Callable[[np.ndarray], np.ndarray]
AT_ONCE = 64
"""Prefixes that are tried in one round."""


def prefixes(order: Sequence[int], sizes: Sequence[int] | np.ndarray, n_items: int) -> np.ndarray:
    """The first `size` items of the order, for each size, [size, item]."""
    rank = np.full(n_items, n_items)
    rank[list(order)] = np.arange(len(order))
    return rank[None, :] < np.asarray(sizes)[:, None]


def smallest_prefix(order: Sequence[int], n_items: int, value: Value, target: float) -> int:
    """The shortest prefix that reaches the target, of those tried: all where there are at most 64, else a geometric grid that is refined where it is crossed.

    Values need not grow with the length. The prefix found reaches the target, the one before it does not (or is empty). All items where none does.
    """
    low, high = 0, len(order)  # the target is not reached at low (as far as is known), and is taken to be at high
    while high - low > 1:
        inner = np.arange(low + 1, high) if high - low <= AT_ONCE else _spread(low, high)
        reached = np.flatnonzero(value(prefixes(order, inner, n_items)) >= target)
        if not len(reached):
            low = int(inner[-1])
            continue
        first = int(reached[0])
        high = int(inner[first])
        low = int(inner[first - 1]) if first else low
    return high


def _spread(low: int, high: int) -> np.ndarray:
    """About 24 sizes between, denser at the small end: circuits are small."""
    sizes = low + np.geomspace(1, high - low, 26)
    return np.unique(np.clip(np.round(sizes).astype(int), low + 1, high - 1))


def prune(start: np.ndarray, value: Value, target: float, trim: Callable[[np.ndarray], np.ndarray], weight: np.ndarray) -> np.ndarray:
    """Drop items as long as the target is kept, until no single one can be dropped (1-minimal).

    In each round every item is dropped alone, exactly; of those that can be spared, as many as the target allows go together, the least harmful first. Close to ACDC
    (Conmy et al. 2023), which goes through the receivers one by one with a threshold for each edge instead of a target for the whole.

    Args:
        start: The set to begin with [item].
        value: Closeness of sets.
        target: What has to be kept.
        trim: Takes out dead ends.
        weight: Of two equally harmless items the lighter one goes first [item].
    """
    current = trim(start)
    while current.any():
        members = np.flatnonzero(current)
        dropped = np.repeat(current[None], len(members), 0)
        dropped[np.arange(len(members)), members] = False
        found = value(dropped)
        spare = members[found >= target]
        if not len(spare):
            break
        # rounding must not decide between items that change nothing: these go by weight
        order = spare[np.lexsort((weight[spare], -np.round(found[found >= target], 6)))]
        current = trim(_without(current, order[: _most(current, order, value, target)]))
    return current


def _without(current: np.ndarray, gone: np.ndarray) -> np.ndarray:
    out = current.copy()
    out[gone] = False
    return out


def _most(current: np.ndarray, order: np.ndarray, value: Value, target: float) -> int:
    """How many of the first items can go together; one can."""
    low, high = 1, len(order) + 1
    while high - low > 1:
        inner = np.unique(np.round(np.geomspace(low, high, 10)).astype(int))
        inner = inner[(inner > low) & (inner < high)]
        inner = inner if len(inner) else np.array([low + 1])
        kept = value(np.stack([_without(current, order[:m]) for m in inner])) >= target
        good = np.flatnonzero(kept)
        best = int(good[-1]) if len(good) else -1
        low, high = (int(inner[best]) if best >= 0 else low), (int(inner[best + 1]) if best + 1 < len(inner) else high)
    return low


def grown(graph: EdgeGraph, scores: np.ndarray) -> list[tuple[int, int]]:
    """Edges in the order of a search from the logits: always the strongest edge into a node that is already in (Hanna et al. 2024).

    Args:
        graph: The model's graph.
        scores: Strengths [receiver, sender]; NaN counts as weakest.

    Returns:
        (receiver, sender) of every possible edge that the search gets to, strongest first within what is open.
    """
    strength = np.where(graph.possible, np.nan_to_num(scores, nan=-1.0), -np.inf)
    open_rows = np.zeros(len(graph.receivers), dtype=bool)
    open_rows[-1] = True
    free = graph.possible.copy()
    found: list[tuple[int, int]] = []
    while (free & open_rows[:, None]).any():
        best = int(np.where(free & open_rows[:, None], strength, -np.inf).argmax())
        row, column = divmod(best, len(graph.senders))
        free[row, column] = False
        open_rows[list(graph.inputs[column])] = True
        found.append((row, column))
    return found


def forward(n_items: int, value: Value, target: float, most: int) -> list[int]:
    """Items one by one, each time the one that brings the set closest, until the target is reached (or `most` items are in)."""
    chosen: list[int] = []
    current = np.zeros(n_items, dtype=bool)
    while len(chosen) < min(most, n_items):
        rest = np.flatnonzero(~current)
        tried = np.repeat(current[None], len(rest), 0)
        tried[np.arange(len(rest)), rest] = True
        found = value(tried)
        best = int(found.argmax())
        chosen.append(int(rest[best]))
        current[rest[best]] = True
        if found[best] >= target:
            break
    return chosen


def random_edges(graph: EdgeGraph, mask: np.ndarray, n_draws: int, rng: np.random.Generator, *, tries: int = 8) -> tuple[np.ndarray, float]:
    """Random circuits of as many edges: every edge on a path from the embeddings to the logits, matched by the senders' kind and layer.

    Each grows by paths that end in what is already there (the logits at first) and begin at the embeddings or at a node that is there, so nothing in it is dead.
    Edges are drawn from the kinds and layers of senders that the circuit has and the draw still lacks, where these allow it; of a few tries the best match is kept.

    Args:
        graph: The model's graph.
        mask: The circuit, without dead ends [receiver, sender].
        n_draws: How many.
        rng: Draws them.
        tries: Attempts for each draw.

    Returns:
        [draw, receiver, sender], and the share of edges that match the circuit's kinds and layers.
    """
    strata = _strata(graph)
    goal = np.bincount(strata[np.nonzero(mask)[1]], minlength=strata.max() + 1)
    total, draws, matched = int(mask.sum()), [], []
    for _ in range(n_draws):
        best, most = mask, -1
        for _ in range(tries):
            one = _random_circuit(graph, strata, goal, total, rng)
            got = int(np.minimum(np.bincount(strata[np.nonzero(one)[1]], minlength=len(goal)), goal).sum())
            if got > most:
                best, most = one, got
            if got == total:
                break
        draws.append(best)
        matched.append(most / max(total, 1))
    return np.stack(draws) if draws else np.zeros((0, *mask.shape), dtype=bool), float(np.mean(matched)) if matched else float("nan")


def _strata(graph: EdgeGraph) -> np.ndarray:
    """Number of each sender's kind and layer, [sender]."""
    kinds = {key: i for i, key in enumerate(dict.fromkeys((s.kind, s.layer) for s in graph.senders))}
    return np.array([kinds[s.kind, s.layer] for s in graph.senders])


def _random_circuit(graph: EdgeGraph, strata: np.ndarray, goal: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """One draw: edge by edge backwards from the logits, each into a node that is there, or into the node that was just added."""
    mask = np.zeros_like(graph.possible)
    there, rows = np.zeros(len(graph.senders), dtype=bool), np.zeros(len(graph.receivers), dtype=bool)
    rows[-1] = there[graph.sender_index[Sender("embed")]] = True
    lacking, added = goal.copy(), None  # `added`: rows of a node that still has no edge into it
    for left in range(total, 0, -1):
        into = rows if added is None else added
        # the last edge must begin at something that is there
        edge = _draw_edge(graph, mask, into, there if left == 1 else np.ones_like(there), strata, lacking, rng)
        if edge is None:  # every edge into what is there is taken
            break
        row, column = edge
        mask[row, column] = True
        lacking[strata[column]] -= 1
        mine = np.zeros_like(rows)
        mine[list(graph.inputs[column])] = True
        added = None if there[column] else mine
        there[column] = True
        rows |= mine
    return graph.live(mask)


def _draw_edge(
    graph: EdgeGraph,
    mask: np.ndarray,
    into: np.ndarray,
    senders: np.ndarray,
    strata: np.ndarray,
    lacking: np.ndarray,
    rng: np.random.Generator,
) -> tuple[int, int] | None:
    """An unused edge into one of these rows, from kinds and layers in the measure that they are lacking; from any other where these have none."""
    keys = np.where(lacking > 0, rng.exponential(size=len(lacking)) / np.maximum(lacking, 1), 1e9 + rng.random(len(lacking)))
    for stratum in np.argsort(keys):  # weighted order without replacement
        for column in rng.permutation(np.flatnonzero((strata == stratum) & senders)):
            rows = np.flatnonzero(graph.possible[:, column] & ~mask[:, column] & into)
            if len(rows):
                return int(rng.choice(rows)), int(column)
    return None


def random_nodes(graph: EdgeGraph, columns: np.ndarray, n_draws: int, rng: np.random.Generator) -> np.ndarray:
    """Random sets of as many nodes: heads from the same layers, MLPs from any; [draw, sender]."""
    draws = np.zeros((n_draws, len(graph.senders)), dtype=bool)
    groups: dict[object, list[int]] = {}
    for column, sender in enumerate(graph.senders):
        groups.setdefault(sender.layer if sender.kind == "head" else sender.kind, []).append(column)
    for members in groups.values():
        k = int(columns[members].sum())
        for draw in draws:
            draw[rng.choice(members, k, replace=False)] = True
    return draws
