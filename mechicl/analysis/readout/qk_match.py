"""The QK circuit of a head on prompts: which parts of the query match which parts of the exemplars' keys.

A score is bilinear in the two streams once the norms' scales are held: q = sum of what each part of the last token's stream gives, k likewise at each exemplar, RoPE a linear
map at each position. So the score's difference between right and wrong exemplars is a table, query's part x key's part, that adds up to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechicl.analysis.feed import Data, progress_bar
from mechicl.analysis.guarded import each_batch
from mechicl.analysis.layout import closing_group, count_shots, image_group, label_group, layout, text_group
from mechicl.analysis.readout.head_reading import HeadReading, attention_scale
from mechicl.analysis.readout.sources import Reads
from mechicl.analysis.readout.written import Written, aligned, at, order
from mechicl.analysis.statistics import bootstrap_interval, mean_estimate
from mechicl.errors import EmptySpanError
from mechicl.prompts.batch import Batch
from mechicl.results import Head, QKMatch

Keys = Literal["label", "close", "image", "text"]
"""Where an exemplar's key is: its label, the template's tokens after it, its picture, its text."""

MOST = 30
"""Parts that keep a row or column of their own; the smallest are added up as "rest"."""

Z95 = 1.959964


@dataclass(frozen=True, eq=False)
class Keyed:
    """Where the exemplars' keys are: positions [batch, n] (the last token first, then keys, padded with the last token), `weight` [batch, shot, n]: each token's share of its
    exemplar's mean; `known`, `right` [batch, shot]."""

    positions: Tensor
    weight: Tensor
    known: Tensor
    right: Tensor

    @staticmethod
    def of(batch: Batch, n_shots: int, keys: str) -> Keyed:
        """Find them."""
        where = layout(batch, n_shots)
        group = {
            "label": label_group,
            "close": lambda k: closing_group(k, n_shots),
            "image": lambda k: image_group(k, n_shots),
            "text": lambda k: text_group(k, n_shots),
        }[keys]
        own = torch.stack([where.group == group(k) for k in range(n_shots)], 1)  # [batch, shot, pos]
        picked = [row.any(0).nonzero()[:, 0] for row in own]
        width = 1 + max(len(row) for row in picked)
        positions, weight = where.query[:, None].expand(-1, width).clone(), torch.zeros(batch.n, n_shots, width)
        for i, row in enumerate(picked):
            positions[i, 1 : 1 + len(row)] = row
            weight[i, :, 1 : 1 + len(row)] = own[i][:, row].float()
        counts = weight.sum(-1, keepdim=True)
        return Keyed(positions, weight / counts.clamp_min(1), counts[..., 0] > 0, where.right & (counts[..., 0] > 0))


@dataclass(frozen=True, eq=False)
class _Vectors:
    """One head over one batch, after RoPE, scaled: query's parts [batch, part, d_head], keys' parts [batch, shot, part, d_head], and the whole ones."""

    q_names: list[str]
    k_names: list[str]
    q: Tensor
    k: Tensor
    tokens: Tensor  # [batch, n]: the scores themselves, at every position
    shots: Tensor  # [batch, shot]: means over each exemplar's tokens

    def difference(self, share: Tensor) -> np.ndarray:
        """Right minus wrong."""
        return (self.shots.double() * share).sum(1).numpy()


@torch.no_grad()
def matches(
    model: Any,
    data: Data,
    heads: Sequence[Head],
    *,
    keys: str,
    by: str,
    sources: bool,
    batch_size: int,
    most: int,
    seed: int,
    progress: bool,
) -> tuple[dict[Head, QKMatch], float, list[Head]]:
    """The table of every head; the largest gap between its scores and those of the model's own attention; heads that may not read some of the keys."""
    layers = sorted({layer for layer, _ in heads})
    n_shots = count_shots(data) if isinstance(data, Batch) else max(len(episode.shots) for episode in data)

    def work(batch: Batch, _: range) -> tuple[Keyed, dict[Head, _Vectors], float, list[Head]]:
        keyed = Keyed.of(batch, n_shots, keys)
        if not bool(keyed.right.any(1).all()):
            raise EmptySpanError(
                f"exemplars must have {keys} tokens to be matched; some have none. Choose other keys: {', '.join(get_args(Keys))}."
            )
        written = Written(model, keyed.positions, by=by, layers=max(layers) + 1)
        points = [(name, written.keep) for layer in layers for name in HeadReading.points(model, layer)]
        reads = Reads(model, batch, keyed.positions, max(layers) + 1) if sources else None
        with model.hooks(fwd_hooks=[*written.hooks, *points, *(reads.hooks if reads is not None else ())]):
            if reads is None:
                found_rows = model.attention_rows(batch, layers=layers)
                rows = {layer: found_rows[layer][:, :, 0] for layer in layers}
            else:
                model.attention_rows(batch, keyed.positions, layers=reads.layers, reduce=reads.keep)
                reads.into(written)
                rows = reads.rows
        vectors = {head: _vectors(model, head, written, keyed) for head in heads}
        patterns = {head: at(rows[head[0]][:, head[1]], keyed.positions).cpu() for head in heads}
        gap = max(_against_pattern(patterns[head], vectors[head].tokens, keyed) for head in heads)
        return keyed, vectors, gap, [head for head in heads if _masked(patterns[head], vectors[head].tokens, keyed)]

    bar = progress_bar(None, total=len(data), what="taking scores apart", show=progress)
    found = list(each_batch(model, data, batch_size, work, done=bar.update))
    bar.close()
    right, known = torch.cat([one.right for one, *_ in found]), torch.cat([one.known for one, *_ in found])
    tables = {head: _table(head, keys, [vectors[head] for _, vectors, *_ in found], right, known, most, seed) for head in heads}
    unread = list(dict.fromkeys(head for *_, some in found for head in some))
    return tables, max(gap for *_, gap, _ in found), unread


def _vectors(model: Any, head: Head, written: Written, keyed: Keyed) -> _Vectors:
    reading, scale = HeadReading(model, head, written), attention_scale(model, head[0])
    weight = keyed.weight.to(written.stream(head[0]).device)
    q_names, q = reading.parts("q")
    k_names, k = reading.parts("k")
    tokens = torch.einsum("bd,bnd->bn", reading.whole("q")[:, 0] * scale, reading.whole("k"))
    return _Vectors(
        q_names,
        k_names,
        q[:, 0].cpu() * scale,
        torch.einsum("bsn,bnpd->bspd", weight, k).cpu(),
        tokens.cpu(),
        (weight * tokens[:, None]).sum(-1).cpu(),
    )


def _against_pattern(pattern: Float[Tensor, "batch n"], scores: Float[Tensor, "batch n"], keyed: Keyed) -> float:
    """How far the scores are from the model's own: log attention minus score is the same for all keys of a row. As a share of the largest score."""
    there = (keyed.weight > 0).any(1) & (pattern > 1e-30)
    rest = torch.where(there, pattern.clamp_min(1e-38).log() - scores, torch.nan)
    spread = rest.nan_to_num(-torch.inf).amax(1) - rest.nan_to_num(torch.inf).amin(1)
    return float(spread[there.any(1)].max() / (1 + scores.abs().max())) if bool(there.any()) else 0.0


def _masked(pattern: Float[Tensor, "batch n"], scores: Float[Tensor, "batch n"], keyed: Keyed) -> bool:
    """Whether some key gets no attention at all although its score is not far below another's: the mask hides it (a sliding window)."""
    keys = (keyed.weight > 0).any(1)
    best = scores.masked_fill(~(keys & (pattern > 0)), -torch.inf).amax(1, keepdim=True)
    return bool((keys & (pattern == 0) & (scores > best - 50)).any())


def _merged(vectors: Tensor, names: Sequence[str], size: np.ndarray, most: int, dim: int) -> tuple[Tensor, list[str]]:
    """The largest parts, in the order of execution, and the sum of the rest."""
    if len(names) <= most:
        return vectors, list(names)
    keep = np.sort(np.argsort(-size, kind="stable")[: most - 1])
    rest = np.setdiff1d(np.arange(len(names)), keep)
    left = vectors.index_select(dim, torch.from_numpy(rest)).sum(dim, keepdim=True)
    return torch.cat([vectors.index_select(dim, torch.from_numpy(keep)), left], dim), [*(names[int(i)] for i in keep), "rest"]


def _table(head: Head, keys: str, found: Sequence[_Vectors], right: Tensor, known: Tensor, most: int, seed: int) -> QKMatch:
    """Parts x parts of one head, from all batches."""
    q_names, k_names = order([n for one in found for n in one.q_names]), order([n for one in found for n in one.k_names])
    q = torch.cat([aligned(one.q_names, q_names, one.q, 1) for one in found]).double()
    k = torch.cat([aligned(one.k_names, k_names, one.k, 2) for one in found]).double()
    wrong = known & ~right
    share = right / right.sum(1, keepdim=True) - wrong / wrong.sum(1, keepdim=True).clamp_min(1)  # [batch, shot]
    towards = torch.einsum("bs,bspd->bpd", share.double(), k)
    rows = torch.einsum("bpd,bd->bp", q, towards.sum(1)).pow(2).mean(0).numpy()
    columns = torch.einsum("bd,bpd->bp", q.sum(1), towards).pow(2).mean(0).numpy()
    q, q_names = _merged(q, q_names, rows, most, 1)
    k, k_names = _merged(k, k_names, columns, most, 2)
    shots = torch.einsum("bqd,bskd->bsqk", q, k)  # every exemplar's score by parts
    cells = torch.einsum("bs,bsqk->bqk", share.double(), shots).numpy()
    spread = _deal_spread(shots, known, right)
    low, high = bootstrap_interval(cells, seed=seed)
    total = np.concatenate([one.difference(share[i : i + len(one.q)]) for one, i in _starts(found)])
    zero = np.zeros(cells.shape[1:])
    return QKMatch(
        head=head, keys=keys, queries=tuple(q_names), senders=tuple(k_names), value=cells.mean(0), low=low, high=high, null=zero, null_low=-Z95 * spread,
        null_high=Z95 * spread, per_episode=cells, total=mean_estimate(total, unit="attention score", seed=seed),
        residue=float(np.abs(cells.sum((1, 2)) - total).max()),
    )  # fmt: skip


def _deal_spread(shots: Tensor, known: Tensor, right: Tensor) -> np.ndarray:
    """Standard deviation of the mean over episodes when right and wrong are dealt out anew over each episode's exemplars.

    Exact: with r right ones of n, mean over right minus mean over wrong has variance n s^2 / (r (n - r)), s^2 the exemplars' variance (n - 1 below).
    """
    mask = known[:, :, None, None]
    n, r = known.sum(1).double(), right.sum(1).double()
    mean = torch.where(mask, shots, 0.0).sum(1) / n[:, None, None]
    squares = torch.where(mask, (shots - mean[:, None]).pow(2), 0.0).sum(1) / (n - 1)[:, None, None]
    variance = squares * (n / (r * (n - r)))[:, None, None]
    return (variance.sum(0).sqrt() / len(shots)).numpy()


def _starts(found: Sequence[_Vectors]) -> list[tuple[_Vectors, int]]:
    """Each batch with the number of its first episode."""
    starts = np.cumsum([0, *(len(one.q) for one in found)])
    return [(one, int(i)) for one, i in zip(found, starts[:-1], strict=True)]
