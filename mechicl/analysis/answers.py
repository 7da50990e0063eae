"""What a model answers: log-probabilities of whole candidate labels, prepared once and scored as often as heads are switched off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mechicl.analysis.feed import Data, batches, ids_of, progress_bar, take
from mechicl.errors import ContextLengthError, EpisodeError, ImageError, NotFiniteError, RenderError
from mechicl.prompts.batch import Batch
from mechicl.results import Skipped

Score = Literal["label", "per_token", "first_token"]
"""How a candidate is scored: log-probability of the whole label, the same per token, or of its first token alone (one forward pass a prompt)."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """Rendered prompts, kept, so that many ablations share one rendering. `skipped`: episodes that could not be rendered, with the reason."""

    batches: tuple[Batch, ...]
    ids: tuple[str, ...]
    skipped: tuple[Skipped, ...]

    @property
    def n(self) -> int:
        """Number of prompts."""
        return len(self.ids)

    @property
    def answers(self) -> np.ndarray:
        """Index of the right candidate [batch]."""
        return np.array([a for batch in self.batches for a in batch.answers])

    @property
    def candidates(self) -> tuple[tuple[str, ...], ...]:
        """Candidate labels of every prompt."""
        return tuple(c for batch in self.batches for c in batch.candidates)


@dataclass(frozen=True, eq=False)
class Answers:
    """Scores of every candidate of every prompt, nats.

    `whole` [batch, candidate]: log-probability of the full label; `first`: of its first token; -inf where a prompt has fewer candidates. `tokens`: tokens
    of the label. `greedy` [batch]: the most likely token over the whole vocabulary. `first_ids` [batch, candidate]: first tokens, -1 where there is none.
    """

    whole: np.ndarray
    first: np.ndarray
    tokens: np.ndarray
    greedy: np.ndarray
    first_ids: np.ndarray

    def scores(self, score: Score) -> np.ndarray:
        """[batch, candidate] of the kind asked for."""
        if score == "first_token":
            return self.first
        return self.whole if score == "label" else self.whole / np.maximum(self.tokens, 1)


def prepare(model: Any, data: Data, *, batch_size: int = 8, progress: bool = False) -> Prepared:
    """Render everything before any long work.

    A prompt that cannot be rendered (beyond the context, an unreadable picture) is left out and named; when none is left, its error is raised.

    Raises:
        EpisodeError, RenderError, ContextLengthError, ImageError: no episode can be rendered; the first reason.
    """
    names, found, kept = ids_of(data), [], list(range(len(data)))
    skipped: list[Skipped] = []
    if not isinstance(data, Batch):
        try:
            parts = progress_bar(batches(model, data, batch_size), total=-(-len(data) // batch_size), what="rendering", show=progress)
            found = list(parts)
        except (EpisodeError, RenderError, ContextLengthError, ImageError):
            kept, skipped = _renderable(model, data, names)
            found = list(batches(model, take(data, kept), batch_size))
    else:
        found = list(batches(model, data, batch_size))
    return Prepared(tuple(found), tuple(names[i] for i in kept), tuple(skipped))


def _renderable(model: Any, data: Any, names: Sequence[str]) -> tuple[list[int], list[Skipped]]:
    kept, skipped, first = [], [], None
    for i, episode in enumerate(data):
        try:
            model.render([episode])
            kept.append(i)
        except (EpisodeError, RenderError, ContextLengthError, ImageError) as error:
            first = first or error
            skipped.append(Skipped(names[i], str(error)))
    if not kept and first is not None:
        raise first
    return kept, skipped


@torch.no_grad()
def score_answers(
    model: Any, prepared: Prepared, *, score: Score = "label", rows: int = 32, progress: bool = False, what: str = "answers"
) -> Answers:
    """Score every candidate of every prompt, with whatever hooks the model carries at the moment.

    Args:
        model: Anything with the surface of `HookedModel`.
        prepared: The prompts.
        score: "first_token" reads one forward pass a prompt and leaves `whole` equal to `first`.
        rows: Most prompts (times candidates) in one forward pass.
        progress: Show a bar named `what`.

    Raises:
        NotFiniteError: a logit is NaN, with the episode.
    """
    width = max(len(c) for c in prepared.candidates)
    shape = (prepared.n, width)
    whole, first = np.full(shape, -np.inf), np.full(shape, -np.inf)
    tokens, ids = np.zeros(shape, dtype=int), np.full(shape, -1)
    greedy, at = np.zeros(prepared.n, dtype=int), 0
    for batch in progress_bar(prepared.batches, total=len(prepared.batches), what=what, show=progress):
        here = slice(at, at + batch.n)
        log_p = model(batch)[:, 0].float().log_softmax(-1)
        _check_finite(log_p, prepared.ids[here])
        greedy[here] = log_p.argmax(-1).cpu().numpy()
        for i, continuations in enumerate(batch.candidate_ids):
            k = len(continuations)
            ids[at + i, :k] = [c[0] for c in continuations]
            tokens[at + i, :k] = [len(c) for c in continuations]
            first[at + i, :k] = log_p[i, torch.tensor([c[0] for c in continuations], device=log_p.device)].cpu().numpy()
        whole[here] = first[here]
        if score != "first_token" and tokens[here].max() > 1:
            whole[here] += _rest(model, batch, width, rows, prepared.ids[here])
        at += batch.n
    return Answers(whole, first, tokens, greedy, ids)


def _rest(model: Any, batch: Batch, width: int, rows: int, names: Sequence[str]) -> np.ndarray:
    """Log-probability of every candidate's tokens after the first [prompt, candidate]: prompts repeated, candidates appended."""
    total = np.zeros((batch.n, width))
    group = max(1, rows // batch.n)
    longest = max(len(c) for row in batch.candidate_ids for c in row)
    for start in range(0, width, group):
        chosen = range(start, min(start + group, width))
        asked = [batch.candidate_ids[i][j] if j < len(batch.candidate_ids[i]) else () for j in chosen for i in range(batch.n)]
        if max(len(a) for a in asked) < 2:
            continue
        # every continuation but its last token: that one is only predicted
        grown = batch.repeat(len(chosen)).append([a[:-1] for a in asked])
        steps = torch.arange(1, longest)
        positions = (batch.query_pos.repeat(len(chosen)).cpu()[:, None] + steps).clamp_max(grown.n_pos - 1)
        log_p = model(grown, positions=positions).float().log_softmax(-1)
        target = torch.zeros(len(asked), longest - 1, dtype=torch.long)
        real = torch.zeros(len(asked), longest - 1, dtype=torch.bool)
        for r, a in enumerate(asked):
            target[r, : max(len(a) - 1, 0)] = torch.tensor(a[1:], dtype=torch.long)
            real[r, : max(len(a) - 1, 0)] = True
        picked = log_p.gather(-1, target.to(log_p.device)[..., None])[..., 0].cpu()
        _check_finite(picked[real][None], names[:1])
        summed = picked.masked_fill(~real, 0.0).sum(-1).reshape(len(chosen), batch.n)
        total[:, list(chosen)] = summed.T.numpy()
    return total


def _check_finite(log_p: Tensor, names: Sequence[str]) -> None:
    bad = log_p.isnan().flatten(1).any(1)
    if bool(bad.any()):
        name = names[min(int(bad.nonzero()[0]), len(names) - 1)]
        raise NotFiniteError(
            f"logits must be finite; episode {name} gave NaN. Load the model in float32 or bfloat16, and run mechicl doctor on it."
        )
