"""Metrics of a patched run, on its logits: how far the answer of the clean prompt is ahead of the corrupt prompt's.

A metric names the tokens to be read for each episode and appends labels where whole labels are scored, so that every cell of a sweep costs one run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mechicl.errors import EpisodeError, NotFiniteError, OptionError
from mechicl.prompts.batch import Batch
from mechicl.results import Skipped

MetricName = Literal["logit_diff", "label_logprob", "logprob", "prob", "kl"]
Metric = MetricName | Callable[..., Tensor]
"""logit_diff: first-token logit of the clean run's answer minus the corrupt run's answer's. label_logprob: the same difference of whole labels'
log-probabilities. logprob, prob: of the clean run's whole answer. kl: Kullback-Leibler divergence of the next token's distribution from the clean run's.
Where both runs have the same answer (permuted labels, blurred pictures), the other side of a difference is the mean over the other candidates.
A function takes the last token's logits [batch, vocab] (and, if it has a second parameter, the clean prompts as a Batch) and returns [batch]."""

UNITS = {"logit_diff": "logits", "label_logprob": "nats", "logprob": "nats", "prob": "probability", "kl": "nats"}
Ids = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Contrast:
    """What is read of every pair, in the order of the pairs.

    `answers`: tokens of the label that counts for; `foils`: tokens of those that count against, their mean.
    """

    metric: Metric
    answers: tuple[Ids, ...]
    foils: tuple[tuple[Ids, ...], ...]

    @property
    def name(self) -> str:
        """What the metric is called."""
        return self.metric if isinstance(self.metric, str) else getattr(self.metric, "__name__", type(self.metric).__name__)

    @property
    def unit(self) -> str:
        """Of the values."""
        return UNITS.get(self.metric, "metric") if isinstance(self.metric, str) else "metric"

    def take(self, rows: Sequence[int]) -> Contrast:
        """The contrast of some pairs."""
        return Contrast(self.metric, tuple(self.answers[i] for i in rows), tuple(self.foils[i] for i in rows))

    @property
    def labels(self) -> list[tuple[Ids, ...]]:
        """For each pair, the labels that are scored."""
        return [(a, *f) if self.metric == "label_logprob" else (a,) for a, f in zip(self.answers, self.foils, strict=True)]

    @property
    def whole(self) -> bool:
        """Whether whole labels are scored."""
        return self.metric in ("label_logprob", "logprob", "prob")

    @property
    def blocks(self) -> int:
        """How many copies of each prompt one run needs."""
        if not self.whole or all(len(ids) == 1 for row in self.labels for ids in row):
            return 1
        return max(len(row) for row in self.labels)

    @property
    def length(self) -> int:
        """Tokens of the longest label that is scored."""
        return max(len(ids) for row in self.labels for ids in row) if self.whole else 1

    def widen(self, batch: Batch) -> Batch:
        """Block j: every prompt followed by its j-th label, less that label's last token, which predicts nothing that is asked."""
        if not self.whole or self.length == 1:
            return batch
        labels = self.labels
        tokens = [(labels[i][j] if j < len(labels[i]) else labels[i][0])[:-1] for j in range(self.blocks) for i in range(batch.n)]
        return batch.repeat(self.blocks).append(tokens)

    def positions(self, wide: Batch) -> Tensor:
        """Positions to be read of a widened batch, [blocks * batch, length]."""
        return (wide.query_pos[:, None].cpu() + torch.arange(self.length)).clamp_max(wide.n_pos - 1)

    def reader(self, clean: Batch, clean_logits: Callable[[], Tensor] | None = None) -> Callable[[Tensor], np.ndarray]:
        """From logits [blocks * batch, length, vocab] of a widened batch to the metric [batch].

        Args:
            clean: The clean prompts of these pairs, not widened.
            clean_logits: Gives the clean run's logits; called for "kl" only.

        Raises:
            NotFiniteError: (when called) logits are NaN or infinite.
        """
        if self.whole:
            return _Labels(self).read
        if self.metric == "kl":
            if clean_logits is None:
                raise OptionError("clean_logits must be given for metric='kl'; got None. It compares with the clean run's distribution.")
            reference = clean_logits()[:, 0].float().log_softmax(-1)
            return lambda logits: _checked((reference.exp() * (reference - logits[:, 0].float().log_softmax(-1))).sum(-1))
        if self.metric == "logit_diff":
            return self._difference()
        function: Any = self.metric
        both = _takes_batch(function)
        return lambda logits: _own(function(logits[:, 0], clean) if both else function(logits[:, 0]), clean.n)

    def _difference(self) -> Callable[[Tensor], np.ndarray]:
        first = torch.tensor([ids[0] for ids in self.answers])[:, None]
        width = max(len(foils) for foils in self.foils)
        against = torch.tensor([[foils[k % len(foils)][0] for k in range(width)] for foils in self.foils])
        weight = torch.tensor([[(k < len(foils)) / len(foils) for k in range(width)] for foils in self.foils])

        def read(logits: Tensor) -> np.ndarray:
            last = logits[:, 0].float()
            wrong = (last.gather(1, against.to(last.device)) * weight.to(last.device)).sum(1)
            return _checked(last.gather(1, first.to(last.device))[:, 0] - wrong)

        return read


@dataclass(eq=False)
class _Labels:
    """Log-probabilities of whole labels."""

    contrast: Contrast
    tokens: Tensor = field(init=False)
    known: Tensor = field(init=False)

    def __post_init__(self) -> None:
        labels = self.contrast.labels
        width, length = max(len(row) for row in labels), self.contrast.length
        self.tokens, self.known = (
            torch.zeros(width, len(labels), length, dtype=torch.long),
            torch.zeros(width, len(labels), length, dtype=torch.bool),
        )
        for i, row in enumerate(labels):
            for j, ids in enumerate(row):
                self.tokens[j, i, : len(ids)], self.known[j, i, : len(ids)] = torch.tensor(ids), True

    def read(self, logits: Tensor) -> np.ndarray:
        width, n, length = self.tokens.shape
        values = logits.float().log_softmax(-1).reshape(self.contrast.blocks, n, length, -1).expand(width, -1, -1, -1)
        steps = values.gather(-1, self.tokens.to(values.device)[..., None])[..., 0]
        known = self.known.to(values.device)
        total = torch.where(known, steps, 0.0).double().sum(-1)  # [label, batch]
        answer = total[0]
        if self.contrast.metric == "prob":
            return _checked(answer.exp())
        if self.contrast.metric == "logprob":
            return _checked(answer)
        count = known.any(-1)[1:].sum(0)
        return _checked(answer - torch.where(known.any(-1)[1:], total[1:], 0.0).sum(0) / count)


def contrast(metric: Metric, clean: Batch, corrupt: Batch) -> tuple[Contrast, list[int], tuple[Skipped, ...], list[str]]:
    """What a metric reads of pairs.

    Args:
        metric: A name, or a function (see `Metric`).
        clean: The clean prompts.
        corrupt: The corrupt ones, row by row.

    Returns:
        The contrast of the pairs that it can score; their rows; the others with reasons; notes.

    Raises:
        OptionError: an unknown metric.
        EpisodeError: it can score none.
    """
    if not callable(metric) and metric not in get_args(MetricName):
        raise OptionError(
            f"metric must be one of {', '.join(get_args(MetricName))} or a function of logits; got {metric!r}. Pick one of them."
        )
    answers: list[Ids] = []
    foils: list[tuple[Ids, ...]] = []
    rows, skipped, alike = [], [], 0
    for i in range(clean.n):
        label, other = clean.candidates[i][clean.answers[i]], corrupt.candidates[i][corrupt.answers[i]]
        answer = tuple(clean.candidate_ids[i][clean.answers[i]])
        theirs = [tuple(corrupt.candidate_ids[i][corrupt.answers[i]])]
        if label == other:
            alike += 1
            theirs = [tuple(ids) for name, ids in zip(clean.candidates[i], clean.candidate_ids[i], strict=True) if name != label]
        kept, reason = _usable(metric, answer, theirs, label, other)
        if reason:
            skipped.append(Skipped(clean.ids[i] if clean.ids else str(i), reason))
        else:
            rows.append(i)
            answers.append(answer)
            foils.append(tuple(kept))
    if not rows:
        raise EpisodeError(f"pairs must be scorable by {metric!r}; none of {clean.n} is (first: {skipped[0].reason}).")
    notes = []
    if alike and metric in ("logit_diff", "label_logprob"):
        notes.append(
            f"{alike} of {clean.n} pairs have the same answer on both sides: it is compared with the mean of the other candidates."
        )
    return Contrast(metric, tuple(answers), tuple(foils)), rows, tuple(skipped), notes


def _usable(metric: Metric, answer: Ids, theirs: list[Ids], label: str, other: str) -> tuple[list[Ids], str]:
    """The foils that can be told from the answer, or why there are none."""
    if metric == "logit_diff":
        kept = [ids for ids in theirs if ids[0] != answer[0]]
        against = f"{other!r}" if label != other else "every other candidate"
        return kept, "" if kept else f"answer {label!r} and {against} begin with the same token; use metric='label_logprob'"
    if metric == "label_logprob":
        kept = [ids for ids in theirs if ids[: len(answer)] != answer and answer[: len(ids)] != ids]
        return (
            kept,
            "" if kept else f"answer {label!r} and {other!r} are the beginning of one another, so their probabilities include each other",
        )
    return theirs, ""


def _takes_batch(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin
        return False
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) > 1


def _own(values: Any, n: int) -> np.ndarray:
    found = torch.as_tensor(values)
    if found.shape != (n,):
        raise OptionError(
            f"metric must return one number per prompt, [{n}]; got shape {list(found.shape)}. Reduce over the vocabulary only."
        )
    return _checked(found)


def _checked(values: Tensor) -> np.ndarray:
    if not bool(torch.isfinite(values).all()):
        rows = (~torch.isfinite(values)).nonzero()[:5, 0].tolist()
        raise NotFiniteError(
            f"the metric must be finite; got NaN or infinity in rows {rows}. Use float32 or bfloat16, and check the weights."
        )
    return values.detach().double().cpu().numpy()
