"""A batch: what goes into the model, whole, and what every token of it is for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechicl.errors import EmptySpanError
from mechicl.prompts.spans import Role, Span

if TYPE_CHECKING:
    from mechicl.prompts.episode import Episode


@runtime_checkable
class Renders(Protocol):
    """Anything that turns episodes into a batch."""

    def render(self, episodes: Sequence[Episode]) -> Batch: ...


@dataclass(frozen=True, eq=False)
class Batch:
    """Rendered prompts, ready for a model. Prompts end where the answer begins.

    Attributes:
        inputs: The processor's output, whole: input_ids [batch, pos], attention_mask [batch, pos], pixel values, ...
        spans: For each prompt its spans, in order, covering every position once (padding included).
        answers: Index of the right label among the prompt's candidates.
        candidates: For each prompt its candidate labels.
        candidate_ids: For each prompt and candidate, the token ids that would follow the prompt.
        patches: For each prompt and picture, token position -> (left, top, right, bottom) in that picture's pixels; empty where unknown.
        episodes: What was rendered; empty for hand-made batches.
        renderer: What rendered it, so that rows can be taken apart and put together again.
    """

    inputs: Mapping[str, Any]
    spans: tuple[tuple[Span, ...], ...]
    answers: tuple[int, ...]
    candidates: tuple[tuple[str, ...], ...]
    candidate_ids: tuple[tuple[tuple[int, ...], ...], ...]
    patches: tuple[tuple[Mapping[int, tuple[float, float, float, float]], ...], ...] = ()
    episodes: tuple[Episode, ...] = ()
    ids: tuple[str, ...] = field(default=())
    renderer: Renders | None = None
