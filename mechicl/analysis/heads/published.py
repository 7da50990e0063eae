"""Head scores of Huang et al. 2026 exactly as published.

PH: mean over all positions t >= 1 of the whole prompt, picture tokens included, of A[t, t - 1]; here also apart by what reads (pictures, labels, text,
template), which shows how much of it is pictures. IH: the last token's mean attention to every token of the answer's occurrences minus the mean to all
other positions; occurrences are searched for in the prompt's tokens, bare and behind a space, as the released script does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechicl.analysis.feed import Data, Spreads, ids_of, progress_bar
from mechicl.analysis.guarded import each_batch, guarded
from mechicl.errors import NotFiniteError, UnsupportedModelError
from mechicl.prompts.batch import Batch

READERS = {"image": "picture rows", "label": "label rows", "text": "text rows", "question": "question rows", "instruction": "instruction rows", "glue": "template rows"}  # fmt: skip
"""A span's role -> what its rows are called in "ph[...]"."""


@dataclass(frozen=True, eq=False)
class Published:
    """The published scores, per episode.

    `ph` [episode, layer, head]; `ph_by` {reader: [episode, layer, head]}, NaN where a prompt has no such row; `ih` [episode, layer, head], NaN where the
    answer's tokens are not found (the script leaves these prompts out). `elsewhere`: episodes whose answer is also found outside the labels.
    """

    ph: np.ndarray
    ph_by: dict[str, np.ndarray]
    ih: np.ndarray
    elsewhere: int
    not_found: tuple[str, ...]


@guarded
def published_scores(model: Any, episodes: Data, *, batch_size: int = 8, progress: bool = False) -> Published:
    """PH and IH as published, one pass over the prompts, whole patterns never kept.

    Args:
        model: Anything with the surface of `HookedModel`.
        episodes: Episodes, or rendered prompts.
        batch_size: Prompts per forward pass.
        progress: Show a bar.

    Raises:
        UnsupportedModelError: no layer has softmax attention.
        NotFiniteError: attention is NaN.

    Source:
        Huang et al. 2026, released scripts. Differs: padding never counts, so prompts may share a pass.
    """
    if isinstance(model, Spreads):
        return model.published(episodes, batch_size=batch_size, progress=progress)
    names = ids_of(episodes)

    def work(batch: Batch, rows: range) -> tuple[np.ndarray, list[str], int]:
        reader = _Reader(batch)
        found = model.attention_rows(batch, torch.arange(batch.n_pos), reduce=reader)
        if all(entry is None for entry in found):
            raise UnsupportedModelError(f"a layer of {model.cfg.model_type} must have softmax attention; none has. Head scores need it.")
        values = np.stack([_layer(layer, entry, reader, batch.n, model.cfg.n_heads) for layer, entry in enumerate(found)], 1)
        lost = [names[row] for i, row in enumerate(rows) if not reader.answer[i].any()]
        return values, lost, int((reader.answer != reader.labels).any(1).sum())

    bar = progress_bar(None, total=len(episodes), what="published head scores", show=progress)
    parts = list(each_batch(model, episodes, batch_size, work, done=bar.update))
    bar.close()
    whole = np.concatenate([values for values, *_ in parts])
    by = {reader: whole[..., 2 + k] for k, reader in enumerate(READERS.values())}
    lost = tuple(name for _, some, _ in parts for name in some)
    return Published(whole[..., 0], {k: v for k, v in by.items() if np.isfinite(v).any()}, whole[..., 1], sum(n for *_, n in parts), lost)


class _Reader:
    """Called with chunks of rows; keeps the -1 diagonal summed by what reads, and the last token's masses."""

    def __init__(self, batch: Batch) -> None:
        n, n_pos = batch.n, batch.n_pos
        owner = torch.full((n, n_pos), -1)
        for i, row in enumerate(batch.spans):
            for span in row:
                if span.role in READERS:
                    owner[i, span.start : span.stop] = list(READERS).index(span.role)
        real = owner >= 0
        place = real.long().cumsum(1) - 1
        self.weights = torch.nn.functional.one_hot(owner.clamp_min(0), len(READERS)).double() * (real & (place >= 1))[..., None]
        self.real, self.query = real, batch.query_pos.cpu()
        self.labels = batch.mask("label", right=True).cpu().bool()
        self.answer = _occurrences(batch, real)

    def __call__(self, layer: int, dest: Tensor, rows: Tensor) -> dict[str, Tensor]:
        at = dest.cpu()
        before = (dest.to(rows.device) - 1).clamp_min(0)
        diagonal = rows.gather(3, before[None, None, :, None].expand(*rows.shape[:3], 1))[..., 0]
        sums = torch.einsum("bhn,bns->bhs", diagonal.double(), self.weights[:, at].to(rows.device))
        last = (self.query[:, None] == at).to(rows.device, rows.dtype)
        row = torch.einsum("bhns,bn->bhs", rows, last).double()
        right = torch.einsum("bhs,bs->bh", row, self.answer.to(rows.device).double())
        return {"sums": sums.cpu(), "right": right.cpu(), "total": row.sum(-1).cpu()}


def _layer(layer: int, entry: Sequence[dict[str, Tensor]] | None, reader: _Reader, n: int, heads: int) -> np.ndarray:
    """Chunks of one layer -> [episode, head, (ph, ih, ph by reader ...)]; NaN for a layer without attention and for heads that it lacks."""
    out = np.full((n, heads, 2 + len(READERS)), np.nan)
    if entry is None:
        return out
    sums, right, total = (torch.stack([chunk[name] for chunk in entry]).sum(0).numpy() for name in ("sums", "right", "total"))
    if not (np.isfinite(sums).all() and np.isfinite(total).all()):
        raise NotFiniteError(
            f"attention must be finite; got NaN in layer {layer}. Use float32 or bfloat16 (float16 overflows in some families)."
        )
    counts = reader.weights.sum(1).numpy()
    inside = reader.answer.sum(1).numpy()[:, None].astype(float)
    outside = reader.real.sum(1).numpy()[:, None] - inside
    own = sums.shape[1]
    with np.errstate(invalid="ignore", divide="ignore"):
        out[:, :own, 0] = sums.sum(-1) / counts.sum(-1)[:, None]
        out[:, :own, 1] = np.where(inside > 0, right / inside - (total - right) / outside, np.nan)
        out[:, :own, 2:] = np.where(counts[:, None] > 0, sums / counts[:, None], np.nan)
    return out


def _occurrences(batch: Batch, real: Tensor) -> Tensor:
    """Positions of every token of the answer's occurrences, [batch, pos]: searched for among the prompt's tokens; for prompts of vectors, the labels'."""
    tokenizer = getattr(batch.renderer, "tokenizer", None)
    if tokenizer is None or "input_ids" not in batch.inputs:
        return batch.mask("label", right=True).cpu().bool() & real
    ids, found = batch.inputs["input_ids"].cpu().tolist(), torch.zeros_like(real)
    for i, row in enumerate(ids):
        answer = batch.candidates[i][batch.answers[i]]
        for tokens in spellings(tokenizer, answer):
            for at in range(len(row) - len(tokens) + 1):
                if row[at : at + len(tokens)] == tokens:
                    found[i, at : at + len(tokens)] = True
    return found & real


def spellings(tokenizer: Any, word: str) -> list[list[int]]:
    """A word's tokens, bare and behind a space, as the released script looks for it."""
    both = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (word, f" {word}")]
    return [tokens for k, tokens in enumerate(both) if tokens and tokens not in both[:k]]
