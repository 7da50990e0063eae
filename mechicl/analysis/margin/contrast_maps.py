"""Learned contrastive maps: a small map under which a query is nearer to exemplars of its own label, fitted on some episodes and judged on others.

Maps of the kind that Miyanishi and Nguyen (2024) report (linear, attention, mixed; in-batch negatives; triplet margin on cosines); the paper's formulas could not be read,
so these are our own definitions.

x is a vector in parts, [head, d], less the mean of the fitted episodes' vectors, and W [head, d, d_out]:
  linear      f(x) = sum_h x_h W_h
  attention   f(x) = sum_h a_h x_h W_h, a = heads * softmax_h(x_h . u_h / sqrt(d)): which heads speak depends on what they hold
              (a choice with many bad beginnings: fitted from several, the best on validation is kept)
  mixed       f(x) = (sum_h x_h W_h) * e_g, e_g [d_out] for each task x model g (the fixed effect), W shared (the random effect)
  loss        max(0, margin - cos(f(query), f(right)) + cos(f(query), f(wrong))), half of it over the episode's own wrong exemplars, half over other episodes'
              exemplars in the batch that show something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechicl.analysis.margin.contrast_fit import Fitted, Pool, fit
from mechicl.analysis.margin.contrast_pairs import ContrastPairs
from mechicl.analysis.predictive import areas
from mechicl.analysis.statistics import mean_estimate, paired_change
from mechicl.errors import EpisodeError, OptionError
from mechicl.results import ContrastMap, Estimate, Provenance

Kind = Literal["linear", "attention", "mixed"]
UNIT = "share of pairs in the right order"
LEAST = 10
"""Episodes below which nothing is fitted."""


def contrast_map(
    pairs: ContrastPairs | Sequence[ContrastPairs],
    *,
    kind: Kind = "linear",
    d_out: int = 64,
    margin: float = 0.2,
    shares: tuple[float, float, float] = (0.6, 0.2, 0.2),
    lr: float = 1e-2,
    weight_decay: float = 1e-2,
    epochs: int = 300,
    patience: int = 30,
    batch_size: int = 64,
    seed: int = 0,
) -> ContrastMap:
    """Fit a contrastive map, stop it on validation episodes, judge it on held-out ones beside plain cosine and beside the same fit on shuffled episodes (every query
    with the exemplars and labels of another episode).

    Args:
        pairs: From `contrast_pairs`, one or several (tasks x models, all of one shape [head, d]).
        kind: See the module. "attention" needs two heads or more, "mixed" two sets of pairs or more.
        d_out: Width of the mapped vectors, at most; no more than head * d.
        margin: Of the triplet loss, in cosine.
        shares: Of each set's episodes that fit, stop and judge.
        lr: Step size (AdamW).
        weight_decay: AdamW's.
        epochs: At most.
        patience: Epochs without a better validation loss before it stops; the best epoch is kept.
        batch_size: Episodes of a step, whose exemplars are each other's negatives.
        seed: Of the split, the order and the shuffled episodes. Same seed, same map.

    Returns:
        ContrastMap. `above_shuffled` is what the labels taught; a `gain` that the shuffled map has too comes from centring or from fewer dimensions.

    Raises:
        OptionError: an option out of range, or pairs of different shapes.
        EpisodeError: too few episodes.

    Source:
        Our definitions, see the module. Triplet margin with in-batch negatives: Miyanishi and Nguyen 2024 (as reported).
    """
    sets = (pairs,) if isinstance(pairs, ContrastPairs) else tuple(pairs)
    _check(sets, kind, d_out, margin, shares, lr, weight_decay, epochs, patience, batch_size)
    pool = Pool.of(sets)
    train, stop, judge = _split(pool, shares, seed)
    shuffled = pool.shuffled(torch.Generator().manual_seed(seed + 1))
    options: dict[str, Any] = {"kind": kind, "d_out": d_out, "margin": margin, "lr": lr, "weight_decay": weight_decay, "epochs": epochs, "patience": patience,
                               "batch_size": batch_size, "seed": seed}  # fmt: skip
    true, other = (fit(one, train, stop, **options) for one in (pool, shuffled))
    near = {"map": _nearness(pool, judge, true), "plain": _nearness(pool, judge, None), "shuffled": _nearness(pool, judge, other)}
    right, known = pool.right[judge].numpy(), pool.known[judge].numpy()
    order = {name: _ordered(x, right, known) for name, x in near.items()}
    correct = None if pool.correct is None else pool.correct[judge].numpy()
    one = {name: mean_estimate(x, unit=UNIT, seed=seed) for name, x in order.items()}
    return ContrastMap(
        kind=kind, weights=true.arrays(), score=one["map"], plain=one["plain"], gain=paired_change(order["plain"], order["map"], unit=UNIT, seed=seed),
        shuffled=one["shuffled"], shuffled_gain=paired_change(order["plain"], order["shuffled"], unit=UNIT, seed=seed),
        above_shuffled=paired_change(order["shuffled"], order["map"], unit=UNIT, seed=seed), auroc=_tells(near["map"], right, known, correct),
        plain_auroc=_tells(near["plain"], right, known, correct), curve=np.array(true.curve), epochs=true.best, groups=pool.names,
        held_out=tuple(int(i) for i in judge), n_train=len(train), n_validation=len(stop), n=len(judge),
        skipped=sum((one.skipped for one in sets), ()), provenance=_provenance(sets, seed, {**options, "shares": list(shares)}), notes=_notes(sets, true, epochs),
    )  # fmt: skip


def apply_map(found: ContrastMap, vectors: Float[np.ndarray, "*some head d"], group: str = "") -> Float[np.ndarray, "*some d_out"]:
    """Vectors under a fitted map: what cosines are to be taken of.

    Args:
        found: The map.
        vectors: Keys or values of the map's heads.
        group: Name of the task and model ("mixed" only).

    Raises:
        OptionError: vectors of another shape, or an unknown group.
    """
    weights = {name: torch.from_numpy(x).float() for name, x in found.weights.items()}
    if vectors.shape[-2:] != weights["map"].shape[:2]:
        raise OptionError(
            f"vectors must end in {tuple(weights['map'].shape[:2])} (head, d); got {vectors.shape}. Read them as the map's were."
        )
    if found.kind == "mixed" and group not in found.groups:
        raise OptionError(f"group must be one of {', '.join(found.groups)}; got {group!r}. The map has an embedding for each.")
    flat = (
        torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32)).flatten(0, -3)
        if vectors.ndim > 2
        else torch.from_numpy(vectors).float()[None]
    )
    groups = torch.full((len(flat),), found.groups.index(group) if found.kind == "mixed" else 0)
    out = Fitted(weights, [], 0)(flat, groups)
    return out.unflatten(0, vectors.shape[:-2]).numpy() if vectors.ndim > 2 else out[0].numpy()


def _check(
    sets: Sequence[ContrastPairs], kind: str, d_out: int, margin: float, shares: Sequence[float], lr: float, weight_decay: float, epochs: int, patience: int,
    batch_size: int,
) -> None:  # fmt: skip
    if not sets or not all(isinstance(one, ContrastPairs) for one in sets):
        raise OptionError("pairs must be ContrastPairs, one or several; got none. Make them with contrast_pairs.")
    if kind not in get_args(Kind):
        raise OptionError(f"kind must be one of {', '.join(get_args(Kind))}; got {kind!r}. Pick one of them.")
    shapes = {one.query.shape[1:] for one in sets}
    if len(shapes) > 1:
        raise OptionError(
            f"pairs must all be of one shape (head, d) to share a map; got {sorted(shapes)}. Choose as many heads of one width."
        )
    if kind == "attention" and next(iter(shapes))[0] < 2:
        raise OptionError("kind='attention' must choose between heads; got one. Give contrast_pairs more heads, or use linear.")
    if kind == "mixed" and len({one.name for one in sets}) < 2:
        raise OptionError("kind='mixed' must have pairs of at least two names (task x model); got one. Name the sets, or use linear.")
    whole = {"d_out": d_out, "epochs": epochs, "patience": patience, "batch_size": batch_size}
    if bad := [name for name, value in whole.items() if value < 1]:
        raise OptionError(f"{bad[0]} must be at least 1; got {whole[bad[0]]}. See contrast_map.")
    if not (0 < margin <= 2 and lr > 0 and weight_decay >= 0):
        raise OptionError(
            f"margin must be in (0, 2], lr above 0 and weight_decay not below 0; got {margin}, {lr}, {weight_decay}. Cosines differ by at most 2."
        )
    if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise OptionError(f"shares must be three positive numbers that sum to 1; got {shares}. They fit, stop and judge.")
    if (n := min(len(one) for one in sets)) < LEAST:
        raise EpisodeError(f"pairs must hold at least {LEAST} episodes each; got {n}. Draw more.")


def _split(pool: Pool, shares: Sequence[float], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Episodes that fit, stop and judge, dealt within each group, at least two of a group each."""
    draw, parts = torch.Generator().manual_seed(seed), ([], [], [])
    for group in range(len(pool.names)):
        rows = (pool.group == group).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=draw)]
        stop, judge = (max(2, round(share * len(rows))) for share in shares[1:])
        for part, some in zip(parts, (rows[stop + judge :], rows[:stop], rows[stop : stop + judge]), strict=True):
            part.append(some)
    return tuple(torch.cat(part).sort().values for part in parts)  # type: ignore[return-value]


def _nearness(pool: Pool, rows: Tensor, fitted: Fitted | None) -> np.ndarray:
    """Cosine of each query with its exemplars, [batch, shot]; plain without a map."""
    query, exemplars, group = pool.query[rows], pool.exemplars[rows], pool.group[rows]
    if fitted is None:
        mapped, others = query.flatten(1), exemplars.flatten(2)
    else:
        mapped = fitted(query, group)
        others = fitted(exemplars.flatten(0, 1), group.repeat_interleave(exemplars.shape[1])).unflatten(0, exemplars.shape[:2])
    size = (mapped.norm(dim=-1)[:, None] * others.norm(dim=-1)).clamp_min(1e-12)
    return ((mapped[:, None] * others).sum(-1) / size).double().numpy()


def _ordered(near: np.ndarray, right: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Share of (right, wrong) pairs of exemplars in the right order, ties half, [batch]."""
    pairs = (right & known)[:, :, None] & (known & ~right)[:, None, :]
    gap = near[:, :, None] - near[:, None, :]
    wins = (gap > 1e-7) + 0.5 * (np.abs(gap) <= 1e-7)
    return (wins * pairs).sum((1, 2)) / pairs.sum((1, 2))


def _tells(near: np.ndarray, right: np.ndarray, known: np.ndarray, correct: np.ndarray | None) -> Estimate | None:
    """AUROC of the margin for right answers."""
    if correct is None:
        return None
    hit, miss = right & known, known & ~right
    margins = (near * hit).sum(1) / hit.sum(1) - (near * miss).sum(1) / miss.sum(1)
    found = areas(margins[:, None], correct)
    return Estimate(float(found.value[0]), float(found.low[0]), float(found.high[0]), len(correct), "area", "DeLong 95 %")


def _provenance(sets: Sequence[ContrastPairs], seed: int, options: dict[str, Any]) -> Provenance:
    first = next((one.provenance for one in sets if one.provenance is not None), None)
    sources = [{"name": one.name, "n": len(one), "model": one.provenance.model if one.provenance else "given arrays"} for one in sets]
    if first is None:
        return Provenance(model="given arrays", task=", ".join(one.name for one in sets), seed=seed, options={**options, "pairs": sources})
    models = dict.fromkeys(one.provenance.model for one in sets if one.provenance)
    return Provenance(
        model=", ".join(models), revision=first.revision, dtype=first.dtype, attention=first.attention, device=first.device, task=", ".join(one.name for one in sets),
        seed=seed, versions=first.versions, options={**first.options, **options, "pairs": sources},
    )  # fmt: skip


def _notes(sets: Sequence[ContrastPairs], fitted: Fitted, epochs: int) -> tuple[str, ...]:
    notes = ["Our definition of a contrastive map; the paper's could not be read."]
    if fitted.best == len(fitted.curve) - 1 and len(fitted.curve) == epochs + 1:
        notes.append(f"The validation loss was still falling after {epochs} epochs: raise epochs.")
    if (n := sum(len(one) for one in sets)) < 50:
        notes.append(f"Fitted on few episodes ({n} in all): expect little from a map.")
    return tuple(notes)
