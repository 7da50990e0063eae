"""What a score would be if the labels meant nothing: nulls by shuffling, for scores that are linear in masses, and by comparison with like places.

A score of content (does the head tell right labels from wrong ones?) is tested by giving the exemplars each other's labels, episode by episode: attention
stays as it is, only which exemplars count as right is drawn anew. A score of place (does the head read the token before?) would pass such a test
for nothing, because a preference for a place is the same in every episode: it is compared with the other places that the same tokens could have read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechicl.analysis.statistics import outlier_p, permutation_p

FLOOR = 0.05
"""Attention below this share of the uniform counts as this much when logs are taken: between nothing and next to nothing there is no difference
that matters, but in logs it would be a large one, and a head that reads one place only would be lost in it."""

TOLERANCE = 1e-6
"""Two scores closer than this are one: sums of float32 attention differ by as much from the order of addition."""


@dataclass(frozen=True, eq=False)
class Null:
    """Per head [layer, head]: the null's mean, its 97.5 % quantile, and the one-sided p of the score."""

    mean: np.ndarray
    high: np.ndarray
    p: np.ndarray


def shuffles(
    values: Int[Tensor, "batch cell"], eligible: Bool[Tensor, "batch cell"], n: int, generator: torch.Generator
) -> Int[Tensor, "draw batch cell"]:
    """`values` with the eligible ones shuffled within each row, n times; the others stay."""
    keys = torch.rand(n, *values.shape, generator=generator).masked_fill(~eligible, 2.0)
    source = keys.argsort(-1)  # eligible cells in random order, then the rest
    target = torch.sort((~eligible).long(), dim=-1, stable=True).indices.expand(n, -1, -1)  # eligible cells in their own order
    drawn = values.expand(n, -1, -1).clone()
    moved = values.expand(n, -1, -1).gather(-1, source)
    kept = torch.arange(values.shape[1]).expand_as(drawn) < eligible.sum(-1)[None, :, None]
    return drawn.scatter(-1, target, torch.where(kept, moved, drawn.gather(-1, target)))


def shuffled_null(
    mass: Float[Tensor, "batch head cell"],
    right: Bool[Tensor, "batch cell"],
    weights: Float[Tensor, "batch cell"],
    draw: Callable[[int, torch.Generator], Float[Tensor, "draw batch cell"]],
    *,
    n_draws: int,
    seed: int,
    lift: float = 1.0,
    chunk: int = 512,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean score when the labels are shuffled, and whether the right cells get more than `lift` times what the others do.

    A network with random weights already tells labels apart by a few per cent (a random matrix is not quite blind to x meeting x again), and with enough
    episodes any such trifle is significant. So the hypothesis to be refuted is that right cells get at most `lift` times as much: their masses are
    divided by `lift`, after which they are exchangeable with the others on its boundary, and a permutation test is exact.

    Args:
        mass: What the weights multiply; one shuffle serves all heads, so their scores stay comparable.
        right: Cells that the score counts as hits.
        weights: The score's true weights.
        draw: draw(n, generator) gives n sets of weights of shuffled labels.
        n_draws: How many shuffles.
        seed: Decides them.
        lift: 1 is the plain test.
        chunk: Shuffles at a time.

    Returns:
        For each head: the null's mean and 97.5 % quantile, over the first draws (2,048 at most), of the score as it is; the one-sided p.
    """
    n, heads, cells = mass.shape
    known = ~mass.isnan().any(-1).any(0)
    plain = _flat(mass)
    deflated = _flat(torch.where(right[:, None], mass / lift, mass))
    observed = weights.reshape(1, n * cells) @ deflated / n
    generator = torch.Generator().manual_seed(seed)
    exceeded, kept = torch.zeros(heads), []
    for start in range(0, n_draws, chunk):
        drawn = draw(min(chunk, n_draws - start), generator).reshape(-1, n * cells)
        exceeded += (drawn @ deflated / n >= observed - TOLERANCE).sum(0)
        if start < 2048:
            kept.append(drawn @ plain / n)
    scores = torch.cat(kept)
    nothing = torch.full((heads,), torch.nan)
    mean, high = torch.where(known, scores.mean(0), nothing), torch.where(known, scores.quantile(0.975, dim=0), nothing)
    p = permutation_p(torch.where(known, observed[0], nothing).numpy(), exceeded.numpy(), n_draws)
    return mean.numpy().astype(np.float64), high.numpy().astype(np.float64), p


def _flat(mass: Tensor) -> Tensor:
    """[batch, head, cell] -> [batch * cell, head], for one matrix product with all shuffles."""
    return mass.nan_to_num().permute(0, 2, 1).reshape(-1, mass.shape[1])


def logs(attention: np.ndarray, uniform: float) -> np.ndarray:
    """Log attention per token, floored."""
    return np.log(np.maximum(attention, FLOOR * uniform))


def place_null(own: np.ndarray, others: np.ndarray, mean: np.ndarray, *, uniform: float, lift: float = 1.0) -> Null:
    """Is `own` more than `lift` times what the like places give? See `statistics.outlier_p`.

    Args:
        own: Attention per token [reader, layer, head], averaged over episodes.
        others: The same for the other places, [reader, place, layer, head], NaN where there is none.
        mean: What the score would be if the tokens read any other place instead, [layer, head].
        uniform: Attention per token of a head that looks everywhere alike.
        lift: 1 is the plain test.
    """
    p, ratio = outlier_p(logs(own, uniform) - np.log(lift), logs(others, uniform))
    blank = np.where(np.isnan(own).all(0), np.nan, 1.0)
    return Null(mean * blank, np.minimum(mean * ratio, 1.0) * blank, p * blank)
