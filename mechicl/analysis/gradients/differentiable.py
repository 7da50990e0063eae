"""Pairs of prompts, a few at a time, with the metrics of patching as functions that gradients can pass: the numbers of `Contrast.reader`, kept as tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechicl.analysis.patching.job import Given, sides_of
from mechicl.analysis.patching.metrics import Contrast, Metric, contrast
from mechicl.analysis.statistics import ratio_interval
from mechicl.errors import OptionError
from mechicl.prompts.align import Alignment, align
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode
from mechicl.results import Skipped
from mechicl.results.patching import Direction

Measure = Callable[[Tensor], Tensor]
"""Logits [blocks * batch, length, vocab] of widened prompts -> [batch], float32."""


def measure(contrast: Contrast, clean: Batch, clean_logits: Tensor | None = None) -> Measure:
    """The metric of some pairs as a function of logits, differentiable.

    Args:
        contrast: What is read of these pairs.
        clean: Their clean prompts, not widened.
        clean_logits: Of the clean run, [batch, 1, vocab]; for "kl" only.

    Raises:
        OptionError: "kl" without `clean_logits`; (when called) a function that does not return one number per prompt.
    """
    if contrast.whole:
        return lambda logits: _labels(contrast, logits)
    if contrast.metric == "kl":
        if clean_logits is None:
            raise OptionError("clean_logits must be given for metric='kl'; got None. It compares with the clean run's distribution.")
        reference = clean_logits[:, 0].detach().float().log_softmax(-1)
        return lambda logits: (reference.exp() * (reference - logits[:, 0].float().log_softmax(-1))).sum(-1)
    if contrast.metric == "logit_diff":
        return lambda logits: _difference(contrast, logits[:, 0].float())
    function: Any = contrast.metric
    reader = contrast.reader(clean)  # refuses what is not one finite number per prompt
    both = len([p for p in inspect.signature(function).parameters.values() if p.default is p.empty]) > 1

    def own(logits: Tensor) -> Tensor:
        reader(logits.detach())
        return function(logits[:, 0], clean) if both else function(logits[:, 0])

    return own


def _difference(contrast: Contrast, last: Tensor) -> Tensor:
    """The answer's first-token logit minus the mean of its foils', from the last token's logits [batch, vocab]."""
    weights = torch.zeros_like(last)
    for i, (answer, foils) in enumerate(zip(contrast.answers, contrast.foils, strict=True)):
        weights[i, answer[0]] = 1.0
        for ids in foils:
            weights[i, ids[0]] -= 1 / len(foils)
    picked = torch.where(weights != 0, last, 0.0)  # logits of -inf that nobody asks for must not become NaN
    return (picked * weights).sum(-1)


def _labels(contrast: Contrast, logits: Tensor) -> Tensor:
    """Whole labels' log-probabilities, the answer's alone or less the mean of the foils'."""
    labels, length = contrast.labels, contrast.length
    blocks, n = contrast.blocks, len(contrast.labels)
    values = logits.float().log_softmax(-1).reshape(blocks, n, length, -1)
    totals: list[Tensor] = []
    for i, row in enumerate(labels):
        block = [values[j if blocks > 1 else 0, i] for j in range(len(row))]
        one = [some[range(len(ids)), list(ids)].sum() for some, ids in zip(block, row, strict=True)]
        totals.append(one[0] - torch.stack(one[1:]).mean() if contrast.metric == "label_logprob" else one[0])
    found = torch.stack(totals)
    return found.exp() if contrast.metric == "prob" else found


@dataclass(frozen=True, eq=False)
class Scored:
    """Pairs that a metric can score: what is read of them, and what must be said. `clean` and `corrupt` hold all pairs, `rows` those that count."""

    clean: Batch
    corrupt: Batch
    contrast: Contrast
    rows: tuple[int, ...]
    how: str
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]

    @property
    def n(self) -> int:
        """Pairs that count."""
        return len(self.rows)


@dataclass(frozen=True, eq=False)
class Part:
    """A few pairs, widened by the metric, seen from the run that is started from.

    `alignment`: from the other's positions to the start's. `positions`, `other_positions`: where logits are read. `blocks`: copies of each prompt.
    """

    start: Batch
    other: Batch
    alignment: Alignment
    measure: Measure
    positions: Tensor
    other_positions: Tensor
    n: int
    blocks: int

    def per_prompt(self, values: Tensor) -> Tensor:
        """Numbers of widened prompts [blocks * n, ...], summed over the copies of each prompt: [n, ...]."""
        return values.reshape(self.blocks, self.n, *values.shape[1:]).sum(0)


def score(model: Any, clean: Given, corrupt: Batch | Sequence[Episode] | None, metric: Metric) -> Scored:
    """Pairs, and what a metric reads of them.

    Args:
        model: Renders episodes.
        clean: Pairs, or the clean prompts.
        corrupt: The corrupt prompts, row by row; None with `Pairs`.
        metric: See `mechicl.analysis.patching.metrics.Metric`.

    Raises:
        OptionError: no corrupt prompts.
        EpisodeError: the two sides are not as many prompts, or the metric can score no pair.
    """
    clean, corrupt, how, skipped = sides_of(model, clean, corrupt)
    found, rows, unscored, notes = contrast(metric, clean, corrupt)
    return Scored(clean, corrupt, found, tuple(rows), how, (*skipped, *unscored), tuple(notes))


def parts(model: Any, pairs: Scored, direction: Direction, batch_size: int) -> Iterator[Part]:
    """The pairs that count, at most `batch_size` widened prompts at a time (but at least one pair)."""
    size = max(1, batch_size // pairs.contrast.blocks)
    for first in range(0, pairs.n, size):
        some = list(range(first, min(first + size, pairs.n)))
        rows = [pairs.rows[i] for i in some]
        whole = rows == list(range(pairs.clean.n))
        clean, corrupt = (batch if whole else batch.select(rows) for batch in (pairs.clean, pairs.corrupt))
        one = pairs.contrast.take(some)
        logits = None
        if one.metric == "kl":
            with torch.no_grad():
                logits = model(clean, positions="last")
        start, other = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
        wide, wide_other = one.widen(start), one.widen(other)
        names = ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")
        yield Part(
            wide, wide_other, align(wide, wide_other, names=names), measure(one, clean, logits), one.positions(wide), one.positions(wide_other),
            len(rows), one.blocks,
        )  # fmt: skip


def gap(clean: np.ndarray, corrupt: np.ndarray) -> float:
    """The mean distance between the runs, which every share is a share of.

    Raises:
        OptionError: there is none.
    """
    found = float((clean - corrupt).mean())
    if not abs(found) > 1e-9:
        raise OptionError(
            f"clean and corrupt must differ in the metric on average; got a mean difference of {found:.2g}. Choose another corruption or metric."
        )
    return found


def share_interval(
    change: np.ndarray, distance: np.ndarray, *, seed: int = 0, cells: int = 1 << 12
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean change over mean distance, with its 95 % bootstrap interval (see `statistics.ratio_interval`), some cells at a time.

    Args:
        change: [batch, ...], NaN where there is no cell.
        distance: clean - corrupt, [batch].
        seed: Decides the draws.
        cells: Cells at a time: edges are many.

    Returns:
        value, low, high, [...].
    """
    flat, shape = change.reshape(len(distance), -1), change.shape[1:]
    value = flat.mean(0) / gap(distance, np.zeros(1))
    pieces = [ratio_interval(flat[:, k : k + cells], distance, seed=seed) for k in range(0, flat.shape[1], cells)]
    low, high = (np.concatenate([piece[side] for piece in pieces]) for side in (0, 1))
    return value.reshape(shape), low.reshape(shape), high.reshape(shape)
