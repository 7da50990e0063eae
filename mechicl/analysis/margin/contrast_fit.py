"""The fit of a contrastive map: vectors pooled, a triplet loss with in-batch negatives, AdamW with early stopping. Seeded and on the CPU: same seed, same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechicl.analysis.margin.contrast_pairs import ContrastPairs

BEGINNINGS = 5
"""Of the attention map."""


@dataclass(frozen=True, eq=False)
class Pool:
    """Episodes of all sets, padded to one number of exemplars. See `ContrastPairs` for the fields; items of different groups have different numbers."""

    query: Float[Tensor, "batch head d"]
    exemplars: Float[Tensor, "batch shot head d"]
    known: Bool[Tensor, "batch shot"]
    right: Bool[Tensor, "batch shot"]
    items: Int[Tensor, "batch shot"]
    query_item: Int[Tensor, " batch"]
    group: Int[Tensor, " batch"]
    names: tuple[str, ...]
    correct: Bool[Tensor, " batch"] | None

    @staticmethod
    def of(sets: Sequence[ContrastPairs]) -> Pool:
        """Put them together; sets of one name are one group."""
        shots, names = max(one.known.shape[1] for one in sets), tuple(dict.fromkeys(one.name for one in sets))
        columns: dict[str, list[np.ndarray]] = {
            name: [] for name in ("query", "exemplars", "known", "right", "items", "query_item", "group")
        }
        for k, one in enumerate(sets):
            gap = shots - one.known.shape[1]
            for name in columns:
                if name == "group":
                    value = np.full(len(one), names.index(one.name))
                else:
                    value = getattr(one, name)
                    if name in ("exemplars", "known", "right", "items"):
                        value = np.pad(value, ((0, 0), (0, gap), *((0, 0),) * (value.ndim - 2)))
                    if name in ("items", "query_item"):
                        value = np.where(value >= 0, value + k * 10**9, -1)
                columns[name].append(value)
        joined = {name: torch.from_numpy(np.concatenate(some)) for name, some in columns.items()}
        correct = (
            None
            if any(one.correct is None for one in sets)
            else torch.from_numpy(np.concatenate([np.asarray(one.correct) for one in sets]))
        )
        joined["query"], joined["exemplars"] = joined["query"].float(), joined["exemplars"].float()
        return Pool(**joined, names=names, correct=correct)

    def shuffled(self, generator: torch.Generator) -> Pool:
        """The control: every query goes to another episode of its group, whose labels say nothing of it.

        Labels shuffled within an episode would not do: now and then they are the true ones, and negatives from other episodes then teach the truth.
        """
        source = torch.arange(len(self.group))
        for group in range(len(self.names)):
            rows = (self.group == group).nonzero()[:, 0]
            rows = rows[torch.randperm(len(rows), generator=generator)]
            source[rows] = rows.roll(1)
        return replace(self, query=self.query[source], query_item=self.query_item[source])


@dataclass(frozen=True, eq=False)
class Fitted:
    """A map: its weights, the validation loss of each epoch, and the epoch that was kept."""

    weights: Mapping[str, Tensor]
    curve: Sequence[float]
    best: int

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "n head d"], group: Int[Tensor, " n"]) -> Float[Tensor, "n d_out"]:
        """Mapped vectors."""
        return mapped(self.weights, x, group)

    def arrays(self) -> dict[str, np.ndarray]:
        """The weights as arrays, float64."""
        return {name: value.detach().double().numpy() for name, value in self.weights.items()}


def mapped(weights: Mapping[str, Tensor], x: Float[Tensor, "n head d"], group: Int[Tensor, " n"]) -> Float[Tensor, "n d_out"]:
    """f(x), see `contrast_maps`."""
    x = x - weights["centre"]
    parts = torch.einsum("nhd,hde->nhe", x, weights["map"])
    if "query" in weights:
        scores = torch.einsum("nhd,hd->nh", x, weights["query"]) / x.shape[-1] ** 0.5
        parts = parts * scores.softmax(-1)[..., None] * x.shape[1]
    out = parts.sum(1)
    return out * weights["embedding"][group] if "embedding" in weights else out


def triplet_loss(weights: Mapping[str, Tensor], pool: Pool, rows: Tensor, margin: float) -> Float[Tensor, ""]:
    """The loss of some episodes, each other's exemplars being negatives."""
    query, exemplars, group = pool.query[rows], pool.exemplars[rows], pool.group[rows]
    n, shots = exemplars.shape[:2]
    f = torch.nn.functional.normalize(mapped(weights, query, group), dim=-1)
    g = torch.nn.functional.normalize(mapped(weights, exemplars.flatten(0, 1), group.repeat_interleave(shots)), dim=-1).unflatten(
        0, (n, shots)
    )
    near = torch.einsum("ie,jse->ijs", f, g)
    known, right = pool.known[rows], pool.right[rows] & pool.known[rows]
    own = near.diagonal(dim1=0, dim2=1).T  # [batch, shot]
    positive = torch.where(right, own, 0.0)
    inside = (margin - positive[:, :, None] + own[:, None, :]).relu()  # [batch, right, wrong]
    loss = _mean(inside, right[:, :, None] & (known & ~right)[:, None, :])
    items, mine = pool.items[rows], pool.query_item[rows]
    same = (items[None] == mine[:, None, None]) & (mine >= 0)[:, None, None]
    for shot in range(shots):  # what its own right exemplars show is no negative either
        same |= (items[None] == items[:, shot, None, None]) & (right[:, shot] & (items[:, shot] >= 0))[:, None, None]
    others = known[None] & ~same & ~torch.eye(n, dtype=torch.bool)[:, :, None]
    across = (margin - positive[:, :, None] + near.flatten(1)[:, None, :]).relu()
    return 0.5 * loss + 0.5 * _mean(across, right[:, :, None] & others.flatten(1)[:, None, :])


def _mean(x: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, x, 0.0).sum() / where.sum().clamp_min(1)


def fit(
    pool: Pool, train: Tensor, stop: Tensor, *, kind: str, d_out: int, margin: float, lr: float, weight_decay: float, epochs: int, patience: int, batch_size: int,
    seed: int,
) -> Fitted:  # fmt: skip
    """Fit on `train`, stop on `stop`; see `contrast_map`. The curve's first number is the loss before any step.

    Which head is to speak is a choice with many bad beginnings: the attention map is fitted from several, and the best on `stop` is kept.
    """

    def one(beginning: int) -> Fitted:
        return _fit(pool, train, stop, kind=kind, d_out=d_out, margin=margin, lr=lr, weight_decay=weight_decay, epochs=epochs, patience=patience,
                    batch_size=batch_size, seed=seed, beginning=beginning)  # fmt: skip

    found = [one(beginning) for beginning in range(BEGINNINGS if kind == "attention" else 1)]
    return min(found, key=lambda fitted: fitted.curve[fitted.best])


def _fit(
    pool: Pool, train: Tensor, stop: Tensor, *, kind: str, d_out: int, margin: float, lr: float, weight_decay: float, epochs: int, patience: int, batch_size: int,
    seed: int, beginning: int,
) -> Fitted:  # fmt: skip
    draw = torch.Generator().manual_seed(seed + 1_000_003 * beginning)
    seen = torch.cat([pool.query[train], pool.exemplars[train][pool.known[train]]])
    centre, n_heads = seen.mean(0), seen.shape[1]
    start, spread, size = _start(seen - centre, d_out)
    learned = {"steps": torch.linalg.solve(spread, start)}
    if kind == "attention":
        learned["query"] = torch.randn(centre.shape, generator=draw) * beginning  # the first begins with heads alike: the linear map
    if kind == "mixed":
        learned["embedding"] = torch.ones(len(pool.names), start.shape[1])
    optimiser = torch.optim.AdamW([value.requires_grad_() for value in learned.values()], lr=lr, weight_decay=weight_decay)

    def weights() -> dict[str, Tensor]:
        whole = (spread @ learned["steps"]).unflatten(0, (n_heads, -1))
        more = {"query": learned["query"] / size} if "query" in learned else {}
        return {"centre": centre, "map": whole, **more} | {name: learned[name] for name in learned if name == "embedding"}

    best, curve = ({}, float("inf"), 0), list[float]()
    for epoch in range(epochs + 1):
        with torch.no_grad():
            now = weights()
            curve.append(float(triplet_loss(now, pool, stop, margin)))
        if curve[-1] < best[1]:
            best = {name: value.detach().clone() for name, value in now.items()}, curve[-1], epoch
        elif epoch - best[2] >= patience:
            break
        for rows in train[torch.randperm(len(train), generator=draw)].split(batch_size):
            loss = triplet_loss(weights(), pool, rows, margin)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return Fitted(best[0], curve, best[2])


def _start(x: Float[Tensor, "n head d"], d_out: int) -> tuple[Float[Tensor, "all d_out"], Float[Tensor, "all all"], float]:
    """The map to begin with, the directions in which steps are taken, and the vectors' size (root mean square of a coordinate).

    The fit begins at plain cosine of the centred vectors (their first principal directions, where d_out is smaller), so that it can only be left for something
    better on the validation episodes. Steps are taken in whitened directions (the covariance's inverse root, shrunk by a tenth): a direction that varies little
    must be as easy to find as one that varies much.

    Args:
        x: Centred vectors.
        d_out: Width of the mapped vectors.
    """
    flat = x.flatten(1).double()
    size = max(float(flat.pow(2).mean().sqrt()), 1e-12)
    covariance = (flat / size).T @ (flat / size) / len(flat)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors / (0.9 * values + 0.1 * values.mean()).clamp_min(1e-12).sqrt() @ vectors.T
    keep = vectors.flip(1)[:, :d_out] if d_out < len(values) else torch.eye(len(values), dtype=torch.float64)
    return (keep / size).float(), (root / size).float(), size
