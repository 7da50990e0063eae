"""From a model's attention rows to the masses that every head score is made of, one batch at a time.

Of each layer only the rows that a score reads are asked for, and of these only sums over groups of tokens are kept: a pattern of [head, dest, src]
never exists for a whole prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechicl.analysis.feed import Data, Spreads, progress_bar
from mechicl.analysis.guarded import each_batch
from mechicl.analysis.heads.measures import back, elsewhere, group_mass, sink
from mechicl.analysis.layout import Layout, closing_group, count_shots, image_group, layout, text_group
from mechicl.errors import NotFiniteError, UnsupportedModelError
from mechicl.prompts.batch import Batch

MOST_OFFSETS = 32


@dataclass(frozen=True)
class Wanted:
    """What to read besides the query's row. `text`: rows of every text token; `everything`: of every token; `between`: of labels and items."""

    text: bool = True
    everything: bool = False
    between: bool = True
    k_back: int = 2


@dataclass(frozen=True, eq=False)
class Reading:
    """Attention of many episodes, summed over groups of tokens. Arrays are [batch, layer, head, ...], NaN where a layer has no pattern.

    query: [..., group], of the query's last token, by the groups of `Layout`. total, to_first: its row's sum and its first token's part.
    label_image, label_text: [..., shot], to each exemplar's own item's picture and text tokens: the most that any token of its label or closing gives.
    items: [..., dest_item, item], from each item's last token to each item. previous, k_back, everything: [..., 2], means over rows of the attention to
    the place in question (see `measures.back`) and, per token, to all others; sink: the same for the first token, over text rows.
    offsets: [..., n], rows that have n tokens before them, to the token 1, 2, ..., n back; starts: [..., n], the
    same rows to the first n tokens. label_density: [layer, head, shot, shot], mean over episodes of the same most attention from label k to item j, per token.
    """

    layout: Layout
    query: np.ndarray
    total: np.ndarray
    to_first: np.ndarray
    label_image: np.ndarray
    label_text: np.ndarray
    items: np.ndarray
    previous: np.ndarray
    k_back: np.ndarray
    everything: np.ndarray
    sink: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray
    label_density: np.ndarray


def read(model: Any, data: Data, wanted: Wanted, *, batch_size: int, progress: bool = False, names: Sequence[str] = ()) -> Reading:
    """Run the model over the data and keep the masses.

    Args:
        model: Anything with the surface of `HookedModel`.
        data: Prompts or episodes.
        wanted: Which rows to read.
        batch_size: Prompts per forward pass.
        progress: Show a bar.
        names: What to call the episodes in errors.

    Raises:
        NotFiniteError: attention is NaN; names the layer, the head and the episodes.
        UnsupportedModelError: no layer has a pattern.
    """
    n_shots = count_shots(data) if isinstance(data, Batch) else max(len(episode.shots) for episode in data)
    if isinstance(model, Spreads):
        parts = model.read(data, wanted, batch_size=batch_size, progress=progress, names=names)
    else:
        parts = read_parts(model, data, wanted, batch_size=batch_size, names=names, n_shots=n_shots, progress=progress)
    return _joined(parts)


def read_parts(
    model: Any,
    data: Data,
    wanted: Wanted,
    *,
    batch_size: int,
    names: Sequence[str],
    n_shots: int,
    n_offsets: int = 0,
    progress: bool = False,
) -> list[tuple[dict[str, np.ndarray], Layout]]:
    """`read`, batch by batch: masses, and what stands where. `n_offsets`: how many tokens back; 0: as the first batch has room for."""

    def work(batch: Batch, rows: range) -> tuple[dict[str, np.ndarray], Layout]:
        nonlocal n_offsets
        where = layout(batch, n_shots)
        n_offsets = n_offsets or _offsets(where, wanted)
        return _read_batch(model, batch, where, wanted, n_offsets, list(names[rows.start : rows.stop])), where

    bar = progress_bar(None, total=len(data), what="reading attention", show=progress)
    parts = list(each_batch(model, data, batch_size, work, done=bar.update))
    bar.close()
    return parts


def offsets_of(batch: Batch, wanted: Wanted, n_shots: int) -> int:
    """How many tokens back attention is read, where this is the first batch."""
    return _offsets(layout(batch, n_shots), wanted)


def _offsets(where: Layout, wanted: Wanted) -> int:
    return max(wanted.k_back + 2, min(MOST_OFFSETS, int(where.real.sum(1).min()) // 2))


def _joined(found: Sequence[tuple[dict[str, np.ndarray], Layout]]) -> Reading:
    """Batches one after the other."""
    parts, layouts = [part for part, _ in found], [where for _, where in found]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != "label_density"}
    pairs = np.stack([part["label_density"] for part in parts])
    with np.errstate(invalid="ignore"):
        density = pairs[:, 0].sum(0) / pairs[:, 1].sum(0)
    names_ = [f for f in Layout.__dataclass_fields__ if f not in ("group", "real", "text", "place")]
    joined = {f: torch.cat([getattr(one, f) for one in layouts]) for f in names_}
    empty = torch.zeros(len(joined["first"]), 0, dtype=torch.bool)
    shape = Layout(group=empty.long(), real=empty, text=empty, place=empty.long(), **{f: joined[f] for f in names_})
    return Reading(layout=shape, label_density=density, **arrays)


def _dest_weights(where: Layout, wanted: Wanted) -> Tensor:
    """[batch, pos, S + 2]: how much each row counts for the query, and for each item (its last token)."""
    n, n_pos, s = *where.group.shape, where.n_shots
    weights = torch.zeros(n, n_pos, s + 2)
    rows = torch.arange(n)
    weights[rows, where.query, 0] = 1.0
    if wanted.between:
        for k in range(s + 1):
            has = where.item_last[:, k] >= 0
            weights[rows[has], where.item_last[has, k], 1 + k] = 1.0
    return weights


def _turns(where: Layout, wanted: Wanted) -> Tensor:
    """[batch, pos, S]: which rows are an exemplar's label or closing."""
    s = where.n_shots
    found = [(where.group == k) | (where.group == closing_group(k, s)) for k in range(s)]
    turns = torch.stack(found, -1) if found else torch.zeros(*where.group.shape, 0, dtype=torch.bool)
    return turns & wanted.between


def _read_batch(model: Any, batch: Batch, where: Layout, wanted: Wanted, n_offsets: int, names: list[str]) -> dict[str, np.ndarray]:
    weights, turns = _dest_weights(where, wanted), _turns(where, wanted)
    rows_wanted = weights.any(-1) | turns.any(-1) | (where.text & wanted.text) | (where.real & wanted.everything)
    dest = rows_wanted.any(0).nonzero()[:, 0]
    reducer = _Reducer(where, weights, turns, wanted, n_offsets)
    found = model.attention_rows(batch, dest, reduce=reducer)
    if all(entry is None for entry in found):
        raise UnsupportedModelError(
            f"a layer of {model.cfg.model_type} must have softmax attention; none has. Head scores need attention patterns."
        )
    layers = [None if entry is None else reducer.join(entry) for entry in found]
    _check_finite(layers, names)
    heads = model.cfg.n_heads
    out: dict[str, np.ndarray] = {}
    example = next(layer for layer in layers if layer is not None)
    for name, value in example.items():
        whole = np.full((value.shape[0], len(layers), heads, *value.shape[2:]), np.nan, dtype=np.float64)
        for i, layer in enumerate(layers):
            if layer is not None:
                whole[:, i, : layer[name].shape[1]] = layer[name].cpu().numpy()
        out[name] = whole
    return _split(out, where)


def _split(out: dict[str, np.ndarray], where: Layout) -> dict[str, np.ndarray]:
    """Masses by destination and group -> the arrays of `Reading`."""
    s, mass, peak = where.n_shots, out.pop("mass"), out.pop("peak")
    image = slice(image_group(0, s), image_group(0, s) + s + 1)
    text = slice(text_group(0, s), text_group(0, s) + s + 1)
    items = mass[..., image] + mass[..., text]
    out["query"] = mass[..., 0, :]
    labels_image, labels_text = peak[..., image], peak[..., text]
    diagonal = np.arange(s)
    out["label_image"], out["label_text"] = labels_image[..., diagonal, diagonal], labels_text[..., diagonal, diagonal]
    out["items"] = items[..., 1:, :]
    tokens = (where.image_tokens + where.text_tokens)[:, :s].numpy()
    visible = where.known.numpy()[:, :, None] & (tokens > 0)[:, None, :] & np.tril(np.ones((s, s), dtype=bool))
    turns = (labels_image + labels_text)[..., :s]
    density = np.where(visible[:, None, None], turns / np.maximum(tokens, 1)[:, None, None, None, :], 0.0)
    out["label_density"] = np.stack([density.sum(0), np.broadcast_to(visible.sum(0), density.shape[1:])])
    return out


def _check_finite(layers: Sequence[dict[str, Tensor] | None], names: Sequence[str]) -> None:
    for number, layer in enumerate(layers):
        if layer is None:
            continue
        bad = ~torch.isfinite(layer["check"])
        if bool(bad.any()):
            row, head = (int(i) for i in bad.nonzero()[0])
            who = names[row] if row < len(names) else str(row)
            raise NotFiniteError(
                f"attention must be finite; got NaN in layer {number}, head {head}, first in episode {who}. "
                "Use float32 or bfloat16 (float16 overflows in some families), and check the weights."
            )
        del layer["check"]


class _Reducer:
    """Called with chunks of rows; keeps weighted sums of them."""

    def __init__(self, where: Layout, weights: Tensor, turns: Tensor, wanted: Wanted, n_offsets: int) -> None:
        self.where, self.weights, self.turns, self.wanted, self.n = where, weights, turns, wanted, n_offsets
        place, text = where.place, where.text & where.real
        self.reads = {"previous": text & (place >= 1), "k_back": text & (place >= wanted.k_back), "deep": text & (place >= n_offsets)}
        self.reads["everything"] = where.real & (place >= 1)

    def _move(self, device: torch.device) -> None:
        """To where the rows are: the model's device, or that of the layer."""
        if self.weights.device != device:
            self.where, self.weights, self.turns = self.where.to(device), self.weights.to(device), self.turns.to(device)
            self.reads = {name: mask.to(device) for name, mask in self.reads.items()}

    def __call__(self, layer: int, dest: Tensor, rows: Tensor) -> dict[str, Tensor]:
        self._move(rows.device)
        dest = dest.to(rows.device)
        weights = self.weights[:, dest]
        turns = self.turns[:, dest]
        some = (weights.any(-1) | turns.any(-1)).any(0).nonzero()[:, 0]
        mass = group_mass(rows[:, :, some], self.where.group, self.where.n_groups)
        out = {"mass": torch.einsum("bhng,bnd->bhdg", mass, weights[:, some].to(rows.dtype))}
        out["peak"] = _peaks(mass, turns[:, some])
        query = weights[:, some, 0].to(rows.dtype)
        out["total"] = torch.einsum("bhns,bn->bh", rows[:, :, some], query)
        first = self.where.first[:, None, None, None].expand(*rows[:, :, some].shape[:3], 1)
        out["to_first"] = torch.einsum("bhn,bn->bh", rows[:, :, some].gather(3, first)[..., 0], query)
        out["check"] = rows.sum((-1, -2))
        if self.wanted.text:
            out |= self._text(dest, rows)
        if self.wanted.everything:
            out["everything"] = self._pair("everything", dest, rows, 1)
        return out

    def _text(self, dest: Tensor, rows: Tensor) -> dict[str, Tensor]:
        out = {"previous": self._pair("previous", dest, rows, 1), "k_back": self._pair("k_back", dest, rows, self.wanted.k_back)}
        out["sink"] = self._pair("previous", dest, rows, None)
        deep = self.reads["deep"][:, dest].any(0).nonzero()[:, 0]
        dest, rows = dest[deep], rows[:, :, deep]
        counted = self.reads["deep"][:, dest]
        last = rows.shape[3] - 1
        out["offsets"] = torch.stack([_sum(back(rows, dest, counted, k), counted) for k in range(1, self.n + 1)], -1)
        firsts = [(self.where.first + k).clamp_max(last) for k in range(self.n)]
        out["starts"] = torch.stack([_sum(sink(rows, first, counted), counted) for first in firsts], -1)
        return out

    def _pair(self, reads: str, dest: Tensor, rows: Tensor, k: int | None) -> Tensor:
        """[batch, head, 2]: attention to the token k back (the first token for None), and per token to all others, summed over the rows that count."""
        src = (dest - k).clamp_min(0).expand(rows.shape[0], -1) if k is not None else self.where.first[:, None].expand(-1, len(dest))
        taken = rows.gather(3, src[:, None, :, None].expand(*rows.shape[:3], 1))[..., 0]
        others = elsewhere(rows, taken, self.where.place[:, dest])
        counted = self.reads[reads][:, dest][:, None]
        return torch.stack([torch.where(counted, x, 0.0).sum(-1) for x in (taken, others)], -1)

    def join(self, chunks: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Sums over chunks -> masses and means."""
        stacked = {name: torch.stack([chunk[name] for chunk in chunks]) for name in chunks[0]}
        out = {name: values.amax(0) if name == "peak" else values.sum(0) for name, values in stacked.items()}
        self._move(out["total"].device)
        for name, reads in (("previous", "previous"), ("k_back", "k_back"), ("sink", "previous"), ("everything", "everything")):
            if name in out:
                out[name] = out[name] / self.reads[reads].sum(1)[:, None, None]
        for name in ("offsets", "starts"):
            if name in out:
                out[name] = out[name] / self.reads["deep"].sum(1)[:, None, None]
        shape = out["total"].shape
        sizes = {"previous": 2, "k_back": 2, "sink": 2, "everything": 2, "offsets": self.n, "starts": self.n}
        for name, size in sizes.items():
            out.setdefault(name, torch.full((*shape, size), torch.nan))
        return out


def _peaks(mass: Tensor, turns: Tensor) -> Tensor:
    """[batch, head, row, group] and [batch, row, shot] -> [batch, head, shot, group]: the most that a row of the shot's turn gives each group."""
    if not mass.shape[2] or not turns.shape[2]:  # a chunk without such rows
        return mass.new_zeros(*mass.shape[:2], turns.shape[2], mass.shape[3])
    return torch.stack([mass.masked_fill(~turns[:, None, :, k, None], 0.0).amax(2) for k in range(turns.shape[2])], 2)


def _sum(mean: Tensor, counted: Tensor) -> Tensor:
    """A mean over the rows of a chunk that count -> their sum, 0 where none does; a NaN in the attention stays."""
    n = counted.sum(-1)[:, None]
    return torch.where(n > 0, mean * n, 0.0)
