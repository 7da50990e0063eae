"""What a head does, as numbers: its scores on every episode. Pairs of heads whose numbers are alike, one to one.

A head's profile is [score, episode]. Two heads are as far apart as the root mean square of the differences of their profiles, each score in units of its standard
deviation over all heads of both models. Pairs minimise the sum of squared distances (the assignment problem), so every head has one counterpart at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mechicl.errors import OptionError
from mechicl.results import Head
from mechicl.results.comparison import Align, Side

READS = {
    "previous_token": "place", "k_back": "place", "previous_token_all": "place", "sink": "first token", "ila": "item", "tiia": "item", "duplicate": "item",
}  # fmt: skip
"""What a score's attention goes to; labels for all others. Scores of one kind share ingredients: none of them may serve to find pairs for another of its kind."""

FAR = 1e6


def kind_of(score: str) -> str:
    """What a score's attention goes to: "label", "item", "place", "first token"."""
    return READS.get(score.split("[")[0], "label")


@dataclass(frozen=True, eq=False)
class Profiles:
    """Heads of two models over the same episodes.

    `first[score]`, `second[score]`: [episode, head] of the heads named in `heads`, every number known; episodes on which some head has no score are left out of that score.
    `depth`: relative depth of each head, 0 (first layer) to 1.
    """

    first: Mapping[str, np.ndarray]
    second: Mapping[str, np.ndarray]
    heads: tuple[tuple[Head, ...], tuple[Head, ...]]
    depth: tuple[np.ndarray, np.ndarray]
    layers: tuple[int, int]

    @property
    def names(self) -> list[str]:
        """Scores that both know."""
        return list(self.first)


def profiles(first: Side, second: Side, scores: Sequence[str]) -> Profiles:
    """Profiles of the heads that have every score.

    Raises:
        OptionError: no score is known of both models, or a model has no such head.
    """
    known = [
        name
        for name in scores
        if all(name in side.scores.scores and np.isfinite(side.scores[name].value).any() for side in (first, second))
    ]
    if not known:
        raise OptionError(
            f"scores must include one that both models have on these prompts; got {', '.join(scores)}. Ask for induction or previous_token."
        )
    heads, flat = [], []
    for side in (first, second):
        alive = np.all([np.isfinite(side.scores[name].value) for name in known], axis=0)
        heads.append(tuple((int(layer), int(head)) for layer, head in np.argwhere(alive)))
        flat.append({name: side.scores[name].per_episode[:, alive] for name in known})
    if not all(heads):
        raise OptionError("models must have heads with every score asked for; one has none. Ask for fewer scores.")
    rows = {name: ~(np.isnan(flat[0][name]).any(1) | np.isnan(flat[1][name]).any(1)) for name in known}
    kept = [name for name in known if rows[name].sum() >= 2]
    if not kept:
        raise OptionError("scores must be known for every head on two episodes at least; none is. Draw longer prompts, or more of them.")
    depth = tuple(
        np.array([layer for layer, _ in few]) / max(side.n_layers - 1, 1) for few, side in zip(heads, (first, second), strict=True)
    )
    one, other = ({name: side[name][rows[name]] for name in kept} for side in flat)
    return Profiles(one, other, (heads[0], heads[1]), (depth[0], depth[1]), (first.n_layers, second.n_layers))


def distances(found: Profiles, names: Sequence[str], part: int | None = None) -> np.ndarray:
    """Mean squared differences of profiles [head of the first, head of the second], in variances over all heads.

    Args:
        found: The profiles.
        names: Scores that count, each the same.
        part: 0 or 1: episodes of even or odd number only; None: all.
    """
    total = np.zeros((len(found.heads[0]), len(found.heads[1])))
    for name in names:
        x, y = (side[name] if part is None else side[name][part::2] for side in (found.first, found.second))
        if not len(x):
            continue
        spread = np.concatenate([x.mean(0), y.mean(0)]).var() or 1.0
        squares = (x**2).mean(0)[:, None] + (y**2).mean(0)[None] - 2 * x.T @ y / len(x)
        total += np.maximum(squares, 0.0) / spread
    return total / max(len(names), 1)


def pair(found: Profiles, how: Align, names: Sequence[str], part: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of heads, as indices into both lists, in the order of the first.

    Args:
        found: The profiles.
        how: "index": same layer and number. "function": the assignment with the smallest distances. "depth": the same among heads whose relative depths are less than half a
            layer (of the model with fewer) apart.
        names: Scores that make the distances.
        part: See `distances`.
    """
    if how == "index":
        where = {head: j for j, head in enumerate(found.heads[1])}
        both = [(i, where[head]) for i, head in enumerate(found.heads[0]) if head in where]
        return np.array([i for i, _ in both], dtype=int), np.array([j for _, j in both], dtype=int)
    from scipy.optimize import linear_sum_assignment

    cost = distances(found, names, part)
    if how == "depth":
        apart = np.abs(found.depth[0][:, None] - found.depth[1][None])
        cost = cost + FAR * (apart > 0.5 / max(min(found.layers) - 1, 1) + 1e-9)
    rows, columns = linear_sum_assignment(cost)
    near = cost[rows, columns] < FAR
    return rows[near], columns[near]


def pairing_scores(found: Profiles, score: str) -> list[str]:
    """Scores that may find the pairs on which `score` is tested: those of another kind."""
    return [name for name in found.names if kind_of(name) != kind_of(score)]
