"""A batch: what goes into the model, whole, and what every token of it is for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechicl.errors import OptionError
from mechicl.prompts.spans import QUERY, ROLES, Role, Span, runs

if TYPE_CHECKING:
    from mechicl.prompts.episode import Episode

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels of a picture, right and bottom excluded."""

POSITIONAL: Mapping[str, int] = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0, "moe_mm_token_type_ids": 0}
"""Inputs with one number per token, and what a token of an appended answer gets. PaliGemma's renderer says otherwise (see `Renderer.continuation`)."""


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
        candidate_ids: For each prompt and candidate, the token ids that would follow the prompt (with the space that the template puts before an answer).
        patches: For each prompt and picture, token position -> (left, top, right, bottom) in that picture's pixels; empty where unknown.
        episodes: What was rendered; empty for hand-made batches.
        renderer: What rendered it, so that rows can be taken apart and put together again.
    """

    inputs: Mapping[str, Any]
    spans: tuple[tuple[Span, ...], ...]
    answers: tuple[int, ...]
    candidates: tuple[tuple[str, ...], ...]
    candidate_ids: tuple[tuple[tuple[int, ...], ...], ...]
    patches: tuple[tuple[Mapping[int, Box], ...], ...] = ()
    episodes: tuple[Episode, ...] = ()
    ids: tuple[str, ...] = field(default=())
    renderer: Renders | None = None

    @property
    def n(self) -> int:
        """Number of prompts."""
        return len(self.spans)

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def n_pos(self) -> int:
        """Length of the longest prompt, padding and appended answers included."""
        return int(self.inputs["input_ids"].shape[1])

    @property
    def query_pos(self) -> Int[Tensor, " batch"]:
        """The last prompt token of each row, the one that predicts the answer's first token."""
        last = [max(span.stop for span in row if span.role not in ("pad", "answer")) - 1 for row in self.spans]
        return torch.tensor(last, dtype=torch.long, device=self.inputs["input_ids"].device)

    def token_roles(self) -> list[list[Role]]:
        """The role of every token, [batch][pos]."""
        return [[span.role for span in row for _ in range(span.start, span.stop)] for row in self.spans]

    def mask(
        self, role: Role | None = None, *, shot: int | None = None, right: bool | None = None, image: int | None = None
    ) -> Bool[Tensor, "batch pos"]:
        """Tokens that meet every condition given.

        Args:
            role: Only tokens of this role.
            shot: Only tokens of this shot: 0, 1, ..., or `QUERY` (-1).
            right: True: only exemplars whose label is the answer; False: only exemplars with another label. Never the query.
            image: Only tokens of this picture, counted over the prompt.

        Raises:
            OptionError: the role does not exist.
        """
        if role is not None and role not in ROLES:
            raise OptionError(f"role must be one of {', '.join(ROLES)}; got {role!r}. Pick one of them.")
        chosen = torch.zeros(self.n, self.n_pos, dtype=torch.bool)
        for i, row in enumerate(self.spans):
            answer = self.candidates[i][self.answers[i]]
            for span in row:
                if role is not None and span.role != role:
                    continue
                if shot is not None and span.shot != shot:
                    continue
                if image is not None and span.image != image:
                    continue
                if right is not None and (span.shot < 0 or (span.label == answer) != right):
                    continue
                chosen[i, span.start : span.stop] = True
        return chosen.to(self.inputs["input_ids"].device)

    def rows(self) -> Iterator[Batch]:
        """Every prompt as a batch of one, unpadded where there is a renderer."""
        for i in range(self.n):
            yield self.select([i])

    def split(self, size: int) -> Iterator[Batch]:
        """Batches of at most `size` prompts, in order.

        Raises:
            OptionError: size is below one.
        """
        if size < 1:
            raise OptionError(f"size must be at least 1; got {size}. Choose how many prompts go through the model at once.")
        if size >= self.n:
            yield self
            return
        for start in range(0, self.n, size):
            yield self.select(range(start, min(start + size, self.n)))

    def select(self, rows: Sequence[int] | Tensor) -> Batch:
        """The prompts `rows`, in that order.

        With a renderer the episodes are rendered anew (padding may shrink; pictures stay exact in every family); without one, tensors
        are indexed by row, which is right for inputs with one row per prompt.

        Raises:
            OptionError: a row out of range, or an input whose first axis is not the prompts and no renderer to make it again.
        """
        chosen = [int(i) for i in rows]
        if not chosen or not all(0 <= i < self.n for i in chosen):
            raise OptionError(f"rows must be a non-empty list of row numbers below {self.n}; got {chosen}. Choose rows of this batch.")
        if self.renderer is not None and self.episodes:
            fresh = self.renderer.render([self.episodes[i] for i in chosen]).to(self.inputs["input_ids"].device, self._dtype)
            tokens = [self._answer_tokens(i) for i in chosen]
            return fresh.append(tokens) if any(tokens) else fresh
        for name, value in self.inputs.items():
            if isinstance(value, Tensor) and value.shape[:1] != (self.n,):
                raise OptionError(
                    f"inputs must have one row per prompt to be taken apart; got {name} of shape {tuple(value.shape)} for {self.n} prompts. "
                    "Render the episodes again."
                )
        index = torch.tensor(chosen)
        return Batch(
            inputs={k: v[index.to(v.device)] if isinstance(v, Tensor) else v for k, v in self.inputs.items()},
            spans=tuple(self.spans[i] for i in chosen),
            answers=tuple(self.answers[i] for i in chosen),
            candidates=tuple(self.candidates[i] for i in chosen),
            candidate_ids=tuple(self.candidate_ids[i] for i in chosen),
            patches=tuple(self.patches[i] for i in chosen) if self.patches else (),
            episodes=tuple(self.episodes[i] for i in chosen) if self.episodes else (),
            ids=tuple(self.ids[i] for i in chosen) if self.ids else (),
        )

    def append(self, tokens: Sequence[Sequence[int]]) -> Batch:
        """One continuation per prompt, on the right, padded on the right to equal length.

        Every input with a number per token grows with it; a cross-attention mask repeats its last row. The new tokens have the role
        "answer"; `query_pos` stays the last token of the prompt.

        Raises:
            OptionError: not exactly one continuation per prompt.
        """
        if len(tokens) != self.n:
            raise OptionError(
                f"tokens must be one continuation per prompt ({self.n}); got {len(tokens)}. Use repeat(k) for k continuations each."
            )
        width = max((len(row) for row in tokens), default=0)
        if width == 0:
            return self
        ids: Tensor = self.inputs["input_ids"]
        # a token that certainly exists and stands for no picture (PaliGemma's prompts begin with one); it is masked out by the attention mask
        plain = int(ids[0, int((~self.mask("image")[0]).nonzero()[-1])])
        block = torch.full((self.n, width), plain, dtype=ids.dtype, device=ids.device)
        real = torch.zeros(self.n, width, dtype=torch.bool, device=ids.device)
        for i, row in enumerate(tokens):
            block[i, : len(row)] = torch.tensor(list(row), dtype=ids.dtype, device=ids.device)
            real[i, : len(row)] = True
        inputs = dict(self.inputs)
        inputs["input_ids"] = torch.cat([ids, block], 1)
        inputs.setdefault("attention_mask", torch.ones_like(ids))
        for name, value in {**POSITIONAL, **getattr(self.renderer, "continuation", {})}.items():
            if name in inputs:
                old: Tensor = inputs[name]
                inputs[name] = torch.cat([old, (real * value).to(old.dtype)], 1)
        if "cross_attention_mask" in inputs:
            cross: Tensor = inputs["cross_attention_mask"]
            inputs["cross_attention_mask"] = torch.cat([cross, cross[:, -1:].expand(-1, width, *cross.shape[2:])], 1)
        return replace(self, inputs=inputs, spans=tuple(self._longer(i, len(row), width) for i, row in enumerate(tokens)))

    def repeat(self, k: int) -> Batch:
        """The whole block k times: prompts 0..n-1, then 0..n-1 again, ...

        `batch.repeat(c).append(continuations)` scores c candidates of every prompt in one forward; block j holds candidate j.

        Raises:
            OptionError: k is below one.
        """
        if k < 1:
            raise OptionError(f"k must be at least 1; got {k}. Choose how often the batch is repeated.")
        inputs = {
            name: torch.cat([value] * k) if isinstance(value, Tensor) else value * k if isinstance(value, list) else value
            for name, value in self.inputs.items()
        }
        many = {name: getattr(self, name) * k for name in ("spans", "answers", "candidates", "candidate_ids", "patches", "episodes", "ids")}
        return replace(self, inputs=inputs, **many)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Batch:
        """The same batch on another device; `dtype` is for floating-point inputs (pixels) only."""

        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device=device, dtype=dtype if dtype is not None and value.is_floating_point() else None)

        return replace(self, inputs={name: move(value) for name, value in self.inputs.items()})

    @property
    def _dtype(self) -> torch.dtype | None:
        return next((v.dtype for v in self.inputs.values() if isinstance(v, Tensor) and v.is_floating_point()), None)

    def _answer_tokens(self, row: int) -> list[int]:
        ids: Tensor = self.inputs["input_ids"][row]
        return [int(t) for span in self.spans[row] if span.role == "answer" for t in ids[span.start : span.stop]]

    def _longer(self, row: int, n_tokens: int, width: int) -> tuple[Span, ...]:
        answer = self.candidates[row][self.answers[row]]
        item = next((span.item for span in self.spans[row] if span.shot == QUERY and span.item), "")
        owners: list[Span | None] = [
            span for span in self.spans[row] for _ in range(span.start, span.stop)
        ]  # each keeps its own start: never merged anew
        owners += [Span("answer", 0, 0, QUERY, None, answer, item)] * n_tokens + [Span("pad", 0, 0)] * (width - n_tokens)
        return runs(owners)
