"""From a model's run to how near each exemplar is to the query, head by head: distances of keys and values, matches q . k, attention. One pass, a layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechicl.analysis.feed import Data, progress_bar
from mechicl.analysis.guarded import each_batch
from mechicl.analysis.layout import closing_group, count_shots, layout
from mechicl.analysis.readout.head_reading import attention_scale
from mechicl.analysis.shift.read import Rows, gather, rows_of, why_not
from mechicl.errors import EmptySpanError, NotFiniteError, UnsupportedModelError
from mechicl.prompts.batch import Batch
from mechicl.prompts.spans import QUERY

Part = Literal["k", "v", "qk", "rot_qk"]
At = Literal["before", "item", "label"]
"""Which token stands for the query, and its like for an exemplar: the one before the label (the last prompt token, for the query), the item's last, or the label."""
Keys = Literal["label", "close", "before", "item"]
"""Which exemplar tokens the query's last token is matched with."""
Distance = Literal["cosine", "euclidean"]
READ = {"k": ("k",), "v": ("v",), "qk": ("q", "k"), "rot_qk": ("rot_q", "rot_k")}


@dataclass(frozen=True, eq=False)
class Places:
    """Where the query and its exemplars are read in a batch that may stand `blocks` times behind one another (once for each candidate put behind the query).

    `exemplar`, `match` [batch, shot, row], `query` [block, batch, row]: weights over the rows, each mean one (nought where there is no exemplar).
    `tokens` [batch, shot, pos]: the matched tokens; `last` [batch]: row of the query's last token; `known`, `right` [batch, shot].
    """

    wide: Batch
    rows: Rows
    exemplar: Float[Tensor, "batch shot row"]
    match: Float[Tensor, "batch shot row"]
    query: Float[Tensor, "block batch row"]
    tokens: Bool[Tensor, "batch shot pos"]
    last: Tensor
    known: Bool[Tensor, "batch shot"]
    right: Bool[Tensor, "batch shot"]

    @staticmethod
    def of(batch: Batch, n_shots: int, at: At, keys: Keys) -> Places:
        """Find them.

        Raises:
            EmptySpanError: exemplars or queries without such tokens.
            UnsupportedModelError: a label is to be put behind vectors.
        """
        where = layout(batch, n_shots)
        exemplar, tokens = exemplar_tokens(batch, n_shots, at), exemplar_tokens(batch, n_shots, keys)
        _check_there(exemplar, where.known, at)
        _check_there(tokens, where.known, keys)
        wide, query = _query_tokens(batch, at)
        width, blocks = wide.n_pos - batch.n_pos, wide.n // batch.n
        exemplar, tokens = (torch.nn.functional.pad(x, (0, width)) for x in (exemplar, tokens))
        last = torch.zeros(batch.n, wide.n_pos, dtype=torch.bool)
        last[torch.arange(batch.n), batch.query_pos.cpu()] = True
        union = (exemplar.any(1) | tokens.any(1) | last).repeat(blocks, 1) | query.flatten(0, 1)
        rows = rows_of(wide, union)
        own = Rows(rows.positions[: batch.n], {})
        return Places(
            wide, rows, _weights(exemplar, own), _weights(tokens, own), _weights(query.flatten(0, 1)[:, None], rows)[:, 0].unflatten(0, (blocks, -1)),
            tokens, _weights(last[:, None], own)[:, 0].argmax(-1), where.known, where.right,
        )  # fmt: skip

    def vectors(
        self, rows: Float[Tensor, "wide row kv_head d_head"]
    ) -> tuple[Float[Tensor, "batch kv_head d_head"], Float[Tensor, "batch kv_head shot d_head"]]:
        """The query's vector and each exemplar's, means over their tokens (over candidates too, where labels stand behind the query)."""
        n, blocks = self.known.shape[0], self.query.shape[0]
        rows = rows.nan_to_num()  # rows that a prompt does not have weigh nothing
        query = torch.einsum("cbr,cbrhd->cbhd", self.query.to(rows.device), rows.unflatten(0, (blocks, -1)))
        there = (self.query.sum(-1) > 0).to(rows.device)[:, :, None, None]  # a prompt with fewer candidates has fewer blocks
        query = (query * there).sum(0) / there.sum(0)
        return query, torch.einsum("bsr,brhd->bhsd", self.exemplar.to(rows.device), rows[:n])


def exemplar_tokens(batch: Batch, n_shots: int, which: Keys | At) -> Bool[Tensor, "batch shot pos"]:
    """The tokens that stand for each exemplar."""
    found = torch.zeros(batch.n, n_shots, batch.n_pos, dtype=torch.bool)
    for i, row in enumerate(batch.spans):
        seen: set[int] = set()
        for span in row:
            if span.role != "label" or span.shot < 0:
                continue
            if which == "label":
                found[i, span.shot, span.start : span.stop] = True
            elif which == "before" and span.shot not in seen:
                found[i, span.shot, max(span.start - 1, 0)] = True
            seen.add(span.shot)
    where = layout(batch, n_shots)
    if which == "item":
        for k in range(n_shots):
            there = where.item_last[:, k] >= 0
            found[there, k, where.item_last[there, k]] = True
    if which == "close":
        for k in range(n_shots):
            found[:, k] = where.group == closing_group(k, n_shots)
    return found


def _query_tokens(batch: Batch, at: At) -> tuple[Batch, Bool[Tensor, "block batch pos"]]:
    """The batch as it is run, and the tokens that stand for the query: with "label", every candidate is put behind the prompt in turn."""
    if at == "label":
        if "inputs_embeds" in batch.inputs:
            raise UnsupportedModelError(
                'at="label" must put a label behind the query, which prompts of vectors cannot take. Use at="before".'
            )
        blocks = max(len(row) for row in batch.candidate_ids)
        wide = batch.repeat(blocks).append([row[j] if j < len(row) else () for j in range(blocks) for row in batch.candidate_ids])
        return wide, wide.mask("answer").cpu().unflatten(0, (blocks, -1))
    found = torch.zeros(1, batch.n, batch.n_pos, dtype=torch.bool)
    rows = torch.arange(batch.n)
    if at == "before":
        found[0, rows, batch.query_pos.cpu()] = True
        return batch, found
    ends = [max((s.stop - 1 for s in row if s.shot == QUERY and s.role in ("image", "text")), default=-1) for row in batch.spans]
    if min(ends) < 0:
        raise EmptySpanError('at="item" must find the query\'s item among the tokens; some queries have none. Use at="before".')
    found[0, rows, torch.tensor(ends)] = True
    return batch, found


def _check_there(tokens: Tensor, known: Tensor, which: str) -> None:
    if bool((known & ~tokens.any(-1)).any()):
        raise EmptySpanError(f'exemplars must have {which} tokens to be compared with the query; some have none. Use "before" or "label".')


def _weights(tokens: Bool[Tensor, "batch some pos"], rows: Rows) -> Float[Tensor, "batch some row"]:
    """Each token's share of its group's mean, over the rows."""
    index = rows.positions.clamp_min(0)[:, None].expand(-1, tokens.shape[1], -1)
    own = tokens.gather(2, index).float() * rows.known[:, None]
    return own / own.sum(-1, keepdim=True).clamp_min(1)


@dataclass(frozen=True, eq=False)
class Nearness:
    """How near each exemplar is to the query, [batch, layer, head, shot], by part ("attention" among them); `known`, `right`, and `labels`, the number of
    each exemplar's label within its episode (-1: no exemplar), [batch, shot].

    Distances for "k" and "v" (small is near), matches for "qk" and "rot_qk" in units of attention scores, attention in probability, summed over the matched tokens.
    """

    parts: dict[str, np.ndarray]
    known: np.ndarray
    right: np.ndarray
    labels: np.ndarray
    reasons: dict[tuple[str, int], str]


@torch.no_grad()
def read_nearness(
    model: Any, data: Data, *, parts: Sequence[Part], at: At, keys: Keys, distance: Distance, batch_size: int, progress: bool = False,
    names: Sequence[str] = (),
) -> Nearness:  # fmt: skip
    """Run the model over the data and keep, of every layer, only the numbers.

    Raises:
        EmptySpanError, UnsupportedModelError: see `Places.of`; no layer has what is asked for.
        NotFiniteError: NaN or infinity; names the layer.
    """
    n_shots = count_shots(data) if isinstance(data, Batch) else max(len(episode.shots) for episode in data)
    widest = max(len(row) for row in data.candidates) if isinstance(data, Batch) else max(len(episode.candidates) for episode in data)
    size = max(1, batch_size // widest) if at == "label" else batch_size

    def work(batch: Batch, _: range) -> Nearness:
        places = Places.of(batch, n_shots, at, keys)
        reader = _Reader(model, places, parts, distance)
        with model.hooks(fwd_hooks=reader.hooks):
            model.attention_rows(places.wide, reduce=reader.attention)
        values = {part: reader.stacked(part) for part in (*parts, "attention")}
        return Nearness(values, places.known.numpy(), places.right.numpy(), _label_numbers(batch, n_shots), reader.reasons)

    bar = progress_bar(None, total=len(data), what="reading keys and values", show=progress)
    found = list(each_batch(model, data, size, work, done=bar.update))
    bar.close()
    reasons = {key: why for one in found for key, why in one.reasons.items()}
    joined = {part: np.concatenate([one.parts[part] for one in found]) for part in (*parts, "attention")}
    known, right, labels = (np.concatenate([getattr(one, name) for one in found]) for name in ("known", "right", "labels"))
    if empty := [part for part in parts if np.isnan(joined[part]).all()]:
        why = next((why for (part, _), why in reasons.items() if part == empty[0]), "no layer gives it")
        raise UnsupportedModelError(f"part {empty[0]!r} must be readable in some layer; {why}. Leave it out of parts.")
    return Nearness(joined, known, right, labels, reasons)


def _label_numbers(batch: Batch, n_shots: int) -> np.ndarray:
    """[batch, shot]: exemplars of one label have one number, 0, 1, ... within their episode."""
    found = np.full((batch.n, n_shots), -1)
    for i, row in enumerate(batch.spans):
        names: dict[str, int] = {}
        for span in row:
            if span.role == "label" and span.shot >= 0:
                found[i, span.shot] = names.setdefault(span.label, len(names))
    return found


class _Reader:
    """Hooks of one batch."""

    def __init__(self, model: Any, places: Places, parts: Sequence[Part], distance: Distance) -> None:
        self.model, self.places, self.parts, self.distance = model, places, parts, distance
        self.kept: dict[tuple[str, int], Tensor] = {}
        self.values: dict[tuple[str, int], np.ndarray] = {}
        self.reasons: dict[tuple[str, int], str] = {}
        self.n = places.known.shape[0]
        self.scales: dict[int, float] = {}

    @property
    def hooks(self) -> list[tuple[str, Callable[..., None]]]:
        """(hook name, function) for every layer that has what is asked for."""
        found = []
        for layer in range(self.model.cfg.n_layers):
            wanted: dict[str, None] = {}
            for part in self.parts:
                why = next((why for name in READ[part] if (why := why_not(self.model, layer, name))), "")
                if why:
                    self.reasons[part, layer] = why
                else:
                    wanted |= dict.fromkeys(READ[part])
            found += [(f"blocks.{layer}.attn.hook_{name}", self._listen(name, layer)) for name in wanted]
        return found

    def _listen(self, name: str, layer: int) -> Callable[..., None]:
        pairs = [part for part in self.parts if len(READ[part]) == 2 and name in READ[part] and (part, layer) not in self.reasons]

        def hook(x: Tensor, hook: Any) -> None:
            rows = gather(x, self.places.rows).float()
            known = self.places.rows.known.to(rows.device)
            if not bool((rows.isfinite().flatten(2).all(2) | ~known).all()):
                raise NotFiniteError(
                    f"{name} of layer {layer} must be finite; got NaN or infinity. Use float32 or bfloat16, and check the weights."
                )
            rows = rows.nan_to_num()  # rows that a prompt does not have weigh nothing
            if name in self.parts:
                self.values[name, layer] = self._distances(rows)
            for part in pairs:  # the second of the two to come finds the first
                other = READ[part][1 - READ[part].index(name)]
                if (other, layer) in self.kept:
                    both = {name: rows[: self.n], other: self.kept.pop((other, layer))}
                    q, k = READ[part]
                    self.values[part, layer] = self._matches(both[q], both[k], layer)
                else:
                    self.kept[name, layer] = rows[: self.n]

        return hook

    def _distances(self, rows: Float[Tensor, "wide row kv_head d_head"]) -> np.ndarray:
        """[batch, kv_head, shot]."""
        query, exemplar = self.places.vectors(rows)
        return distances(query[:, :, None], exemplar, self.distance).double().cpu().numpy()

    def _matches(self, q: Tensor, k: Tensor, layer: int) -> np.ndarray:
        """[batch, head, shot]."""
        at = self.places
        last = q[torch.arange(self.n, device=q.device), at.last.to(q.device)]
        keys = torch.einsum("bsr,brhd->bhsd", at.match.to(k.device), k).repeat_interleave(q.shape[2] // k.shape[2], 1)
        scale = self.scales.setdefault(layer, attention_scale(self.model, layer))
        return (torch.einsum("bhd,bhsd->bhs", last, keys) * scale).double().cpu().numpy()

    def attention(self, layer: int, _: Any, rows: Float[Tensor, "wide head n src"]) -> None:
        """Reducer of `attention_rows`."""
        own = rows[: self.n, :, 0].float()
        if own.shape[-1] == self.places.tokens.shape[-1]:
            value = torch.einsum("bsp,bhp->bhs", self.places.tokens.to(own.device).float(), own)
            self.values["attention", layer] = value.double().cpu().numpy()

    def stacked(self, part: str) -> np.ndarray:
        """[batch, layer, head, shot], NaN where there is nothing."""
        n_layers, n_shots = self.model.cfg.n_layers, self.places.known.shape[1]
        there = {layer: value for (name, layer), value in self.values.items() if name == part}
        heads = max((value.shape[1] for value in there.values()), default=self.model.cfg.n_heads)
        out = np.full((self.n, n_layers, heads, n_shots), np.nan)
        for layer, value in there.items():
            out[:, layer, : value.shape[1]] = value
        return out


def distances(query: Float[Tensor, "*#some d"], exemplar: Float[Tensor, "*#some d"], how: str) -> Float[Tensor, ...]:
    """1 - cosine, or the Euclidean distance. A vector of length nought has cosine nought with any other."""
    if how == "euclidean":
        return (query - exemplar).norm(dim=-1)
    size = (query.norm(dim=-1) * exemplar.norm(dim=-1)).clamp_min(1e-12)
    return 1 - (query * exemplar).sum(-1) / size
