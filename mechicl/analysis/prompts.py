"""One prompt kept whole, to be drawn: its tokens with roles, its pictures with patches, and where chosen heads look."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mechicl.analysis.feed import provenance
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode
from mechicl.results import Head, PromptView

PATTERN_LIMIT = 1024
"""Whole patterns are kept for prompts up to this many tokens; of longer ones the last token's row."""


@torch.no_grad()
def prompt_view(
    model: Any, episode: Episode, heads: Sequence[Head], *, predicted: str = "", task: str = "", pattern_limit: int = PATTERN_LIMIT
) -> PromptView:
    """The prompt of an episode with the attention of `heads`: the last token's rows, and whole patterns where the prompt is short enough.

    Args:
        model: A `HookedVLM`, or anything with the surface of `HookedModel`.
        episode: What to render, alone, so that there is no padding.
        heads: Whose attention is kept; heads that do not read the sequence itself are left out.
        predicted: What the model answered; "" where it was not asked.
        task: For the record.
        pattern_limit: Longest prompt, in tokens, whose whole patterns are kept.

    Raises:
        HeadIndexError: a head that the model does not have.
        RenderError, ContextLengthError: the episode cannot be rendered.
    """
    batch: Batch = model.render([episode])
    n = batch.n_pos
    layers = sorted({layer for layer, _ in heads})
    dest: Any = torch.arange(n) if n <= pattern_limit else "last"
    found: list[Any] = model.attention_rows(batch, dest, layers=layers) if heads else []
    patterns: dict[Head, np.ndarray] = {}
    rows: dict[Head, np.ndarray] = {}
    for layer, head in heads:
        kept: Tensor | None = found[layer]
        if kept is None or kept.shape[-1] != n:  # no softmax attention, or attention to pictures that are not in the sequence
            continue
        pattern = kept[0, head].double().cpu().numpy()
        rows[layer, head] = pattern[-1]
        if n <= pattern_limit:
            patterns[layer, head] = pattern
    roles, shots, labels = _per_token(batch)
    return PromptView(
        tokens=_words(model, batch), roles=roles, shots=shots, labels=labels, images=tuple(_png(image) for image in episode.images),
        image_boxes=tuple(dict(one) for one in batch.patches[0]) if batch.patches else tuple({} for _ in episode.images),
        rows=rows, patterns=patterns, answer=episode.answer, predicted=predicted, episode=episode.id or "one prompt",
        provenance=provenance(model, task=task, seed=None, options={}),
    )  # fmt: skip


def _per_token(batch: Batch) -> tuple[tuple[str, ...], tuple[int, ...], tuple[str, ...]]:
    """Role, shot and label of every token of the only prompt."""
    spans = [span for span in batch.spans[0] for _ in range(span.start, span.stop)]
    return tuple(s.role for s in spans), tuple(s.shot for s in spans), tuple(s.label for s in spans)


def _words(model: Any, batch: Batch) -> tuple[str, ...]:
    """Every token as text; token ids as they are where the model has no tokenizer."""
    ids = [int(t) for t in batch.inputs["input_ids"][0]]
    tokenizer = getattr(getattr(model, "processor", None), "tokenizer", None)
    return tuple(str(t) if tokenizer is None else str(tokenizer.decode([t])) for t in ids)


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.convert("RGB").save(out, "PNG")
    return out.getvalue()
