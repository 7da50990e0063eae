"""What a contrastive map is fitted on: the query's and the exemplars' keys or values of chosen heads, and who belongs to whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechicl.analysis.feed import Data, check_data, comparable, ids_of, progress_bar, provenance, rehearse, take
from mechicl.analysis.guarded import each_batch, guarded
from mechicl.analysis.icl import usable
from mechicl.analysis.labels import answer, predict
from mechicl.analysis.layout import count_shots
from mechicl.analysis.margin.read import At, Places
from mechicl.analysis.shift.read import read_kv, why_not
from mechicl.errors import HeadIndexError, NotFiniteError, OptionError, UnsupportedModelError
from mechicl.prompts.batch import Batch
from mechicl.prompts.spans import QUERY
from mechicl.results import Head, Provenance, Skipped


@dataclass(frozen=True, eq=False)
class ContrastPairs:
    """Queries and their exemplars as vectors. A vector has one part for each head, [head, d].

    Attributes:
        query: [batch, head, d].
        exemplars: [batch, shot, head, d]; rows of exemplars that a prompt does not have are nought.
        known, right: [batch, shot].
        items: Number of what each exemplar shows, [batch, shot], -1 where there is none; `query_item` [batch]. Equal numbers show the same, within one set of pairs.
        correct: Whether the model answered right, [batch]; None where that was not asked for.
        name: The task and model they are from (a group of the "mixed" map).
        heads: (layer, key/value head) of the parts.
        provenance, skipped: How they were made, and what was left out.
    """

    query: Float[np.ndarray, "batch head d"]
    exemplars: Float[np.ndarray, "batch shot head d"]
    known: Bool[np.ndarray, "batch shot"]
    right: Bool[np.ndarray, "batch shot"]
    items: Int[np.ndarray, "batch shot"]
    query_item: Int[np.ndarray, " batch"]
    correct: Bool[np.ndarray, " batch"] | None = None
    name: str = ""
    heads: tuple[Head, ...] = ()
    provenance: Provenance | None = None
    skipped: tuple[Skipped, ...] = ()

    def __post_init__(self) -> None:
        n, shots = self.known.shape
        want = {
            "query": (n, *self.query.shape[1:]),
            "exemplars": (n, shots, *self.query.shape[1:]),
            "right": (n, shots),
            "items": (n, shots),
            "query_item": (n,),
        }
        for field_, shape in want.items():
            if getattr(self, field_).shape != shape:
                raise OptionError(
                    f"{field_} must have shape {shape}; got {getattr(self, field_).shape}. Give one vector per query and exemplar."
                )
        if not (np.isfinite(self.query).all() and np.isfinite(self.exemplars).all()):
            raise NotFiniteError("query and exemplars must be finite; got NaN or infinity. Put noughts where a prompt has no exemplar.")
        both = (self.right & self.known).any(1) & (self.known & ~self.right).any(1)
        if not both.all():
            raise OptionError(
                f"every query must have a right and a wrong exemplar; got none in row {int(np.flatnonzero(~both)[0])}. Leave it out."
            )

    def __len__(self) -> int:
        return len(self.known)


@guarded
def contrast_pairs(
    model: Any,
    data: Data,
    *,
    part: Literal["k", "v"] = "k",
    at: At = "before",
    heads: Sequence[Head] | None = None,
    answers: bool = True,
    name: str = "",
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> ContrastPairs:
    """Keys or values of the query and its exemplars at chosen heads, for `contrast_map`.

    Args:
        model: A toy or a production model.
        data: A Batch, or episodes; those without a right or a wrong exemplar are left out and named.
        part: "k" (before RoPE) or "v".
        at: Which tokens, see `contrast_margin`.
        heads: (layer, key/value head); None: all of the last layer that has keys.
        answers: Score the answers too, so that the map's margin can be held against them.
        name: Of this task and model.
        seed: Decides ties between candidates.
        batch_size: Prompts per forward pass.
        progress: Show a bar.

    Raises:
        EpisodeError: no data, or none with a right and a wrong exemplar.
        OptionError: an option that does not exist.
        HeadIndexError: a head that the model does not have.
        UnsupportedModelError: a layer without keys; heads of different widths.
    """
    check_data(data, batch_size)
    if part not in ("k", "v") or at not in get_args(At):
        raise OptionError(f'part must be "k" or "v" and at one of {", ".join(get_args(At))}; got {part!r} and {at!r}. Pick among them.')
    kept, skipped = comparable(data)
    data = take(data, kept)
    rehearse(model, data)
    correct = None
    if answers:
        found, key, reasons = answer(model, data, batch_size=batch_size, names=ids_of(data), progress=progress)
        rows, unscored = usable(ids_of(data), reasons)
        correct, skipped = predict(found[0].total[rows], seed)[0] == key.answers[rows], (*skipped, *unscored)
        data = take(data, [int(i) for i in rows])
    chosen = _chosen(model, heads, part)
    n_shots = count_shots(data) if isinstance(data, Batch) else max(len(episode.shots) for episode in data)
    widest = max(len(row) for row in data.candidates) if isinstance(data, Batch) else max(len(episode.candidates) for episode in data)
    size, names = (max(1, batch_size // widest) if at == "label" else batch_size), dict[str, int]()

    def work(batch: Batch, _: range) -> tuple[Any, ...]:
        places = Places.of(batch, n_shots, at, "before")
        read = _read(model, places, chosen, part)
        return (
            *read,
            places.known.numpy(),
            places.right.numpy(),
            *_items(batch, n_shots, names),
        )  # names are given out last, once the reading stands

    bar = progress_bar(None, total=len(data), what="reading keys and values", show=progress)
    parts = list(each_batch(model, data, size, work, done=bar.update))
    bar.close()
    joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
    options = {"part": part, "at": at, "heads": chosen, "batch_size": batch_size}
    return ContrastPairs(
        *joined, correct=correct, name=name, heads=chosen, provenance=provenance(model, task=name, seed=seed, options=options), skipped=tuple(skipped)
    )  # fmt: skip


def _chosen(model: Any, heads: Sequence[Head] | None, part: str) -> tuple[Head, ...]:
    if heads is None:
        layer = max((layer for layer in range(model.cfg.n_layers) if not why_not(model, layer, part)), default=-1)
        if layer < 0:
            raise UnsupportedModelError(f"a layer must have {part} of the prompt's tokens; none has. Use another model.")
        return tuple((layer, head) for head in range(model.cfg.n_key_value_heads))
    for layer, head in heads:
        if not (0 <= layer < model.cfg.n_layers and 0 <= head < model.cfg.n_key_value_heads):
            raise HeadIndexError(
                f"head must be (layer, key/value head) in 0..{model.cfg.n_layers - 1}, 0..{model.cfg.n_key_value_heads - 1}; got ({layer}, {head}). Both count from 0."
            )
    if not heads:
        raise OptionError("heads must name at least one (layer, head); got none. None takes the last layer's.")
    return tuple(dict.fromkeys((int(layer), int(head)) for layer, head in heads))


def _read(model: Any, places: Places, heads: Sequence[Head], part: Literal["k", "v"]) -> tuple[np.ndarray, np.ndarray]:
    layers = sorted({layer for layer, _ in heads})

    def keep(_: str, __: int, values: Tensor, ___: Any) -> tuple[Tensor, Tensor]:
        query, exemplars = places.vectors(values.float())
        return query.cpu(), exemplars.cpu()

    found = dict(zip(layers, read_kv(model, places.wide, places.rows.positions, (part,), layers, keep)[part], strict=True))
    if len({found[layer][0].shape[-1] for layer in layers}) > 1:
        raise UnsupportedModelError("heads must be equally wide to be parts of one vector; these are not. Choose heads of one layer.")
    query = torch.stack([found[layer][0][:, head] for layer, head in heads], 1)
    exemplars = torch.stack([found[layer][1][:, head] for layer, head in heads], 2)
    return query.double().numpy(), exemplars.double().numpy()


def _items(batch: Batch, n_shots: int, names: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """What exemplars and query show, as numbers; an item without a name is known by its label."""
    items, query = np.full((batch.n, n_shots), -1), np.full(batch.n, -1)
    for i, row in enumerate(batch.spans):
        for span in row:
            if span.shot < QUERY or not (span.item or span.label):
                continue
            number = names.setdefault(span.item or f"label {span.label}", len(names))
            if span.shot == QUERY:
                query[i] = number
            else:
                items[i, span.shot] = number
    return items, query
