"""Toy sequences of vectors as prompts: the same batches, roles and spans as everywhere, so that every analysis runs on them.

A drawn sequence becomes an episode whose shots carry their vectors; `VectorRenderer` puts shots together to a batch again. So exemplars can be left
out (the zero-shot control is the query's tokens alone), swapped or given another label (`mechicl.prompts.corrupt`), and the vectors follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechicl.data.gaussian import Draw, MultimodalTask, Task, world
from mechicl.errors import EpisodeError, OptionError, RenderError
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode, Shot
from mechicl.prompts.spans import QUERY, Role, Span

Candidates = Literal["all", "context"]


@dataclass(frozen=True, eq=False)
class VectorShot(Shot):
    """An exemplar, or the query, with its vectors.

    Attributes:
        vector: The item's token.
        token: Its name, see `VectorRenderer`.
        second: What an encoder reads of the second modality; None in unimodal sequences.
        second_token: The name of its slot.
        blank: The item's token is empty (a query with m1_query="off").
    """

    vector: Float[Tensor, " d"] = field(default_factory=lambda: torch.zeros(0))
    token: int = -1
    second: Tensor | None = None
    second_token: int = -1
    blank: bool = False


@dataclass(frozen=True, eq=False)
class VectorEpisode(Episode):
    """A sequence of vectors as an episode. `places` are the numbers of its positions, where these do not count from 0."""

    places: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class VectorRenderer:
    """Episodes of vectors into batches.

    Inputs: `inputs_embeds` [batch, pos, d], zeros in the second modality's slots; `second_values` [batch, shown, ...] and their positions `second_pos`
    [batch, shown]; `position_ids` where the episodes have places; `attention_mask`; and `input_ids`, which only name the tokens: labels are
    0..L-1, items L + class, then the second modality's, and the last is the empty token.

    Attributes:
        task: The task of the episodes; its world has the label vectors.
    """

    task: Task
    labels: Float[Tensor, "label d"] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", world(self.task).labels)

    @property
    def n_tokens(self) -> int:
        """Names of tokens."""
        return _blank(self.task) + 1

    def render(self, episodes: Sequence[Episode]) -> Batch:
        """A left-padded batch; roles are `text` for items, `image` for items of the second modality, `label` for exemplars' labels.

        Raises:
            EpisodeError: there is nothing to render.
            RenderError: episodes without vectors, of different numbers of second-modality items, or a label that the task does not have.
        """
        if not episodes:
            raise EpisodeError("episodes must be a non-empty list; got none. Draw some with mechicl.data.gaussian.draw.")
        rows = [self._row(episode) for episode in episodes]
        shown = {len(row.second) for row in rows}
        if len(shown) > 1:
            raise RenderError(
                f"episodes must show as many items of the second modality to go into one batch; got {sorted(shown)}. Render them apart."
            )
        n_pos = max(len(row.vectors) for row in rows)
        gaps = [n_pos - len(row.vectors) for row in rows]
        device = rows[0].vectors[-1].device
        inputs = self._inputs(rows, gaps, n_pos)
        places = [tuple(getattr(episode, "places", ())) for episode in episodes]
        if any(places):
            inputs["position_ids"] = torch.tensor(
                [[0] * gap + _own(place, len(row.vectors)) for place, row, gap in zip(places, rows, gaps, strict=True)]
            )
        spans = [
            (Span("pad", 0, gap), *(span.shift(gap) for span in row.spans)) if gap else tuple(row.spans)
            for row, gap in zip(rows, gaps, strict=True)
        ]
        ids = {names: tuple((self._label(name),) for name in names) for names in {episode.candidates for episode in episodes}}
        return Batch(
            inputs={name: value.to(device) for name, value in inputs.items()}, spans=tuple(spans),
            answers=tuple(e.candidates.index(e.answer) for e in episodes), candidates=tuple(e.candidates for e in episodes),
            candidate_ids=tuple(ids[e.candidates] for e in episodes), patches=tuple(tuple({} for _ in row.second) for row in rows),
            episodes=tuple(episodes), ids=tuple(e.id or str(i) for i, e in enumerate(episodes)), renderer=self,
        )  # fmt: skip

    def _inputs(self, rows: Sequence[_Row], gaps: Sequence[int], n_pos: int) -> dict[str, Tensor]:
        width = self.task.width
        content = torch.zeros(len(rows), n_pos, width, device=rows[0].vectors[-1].device)
        ids, mask = torch.zeros(len(rows), n_pos, dtype=torch.long), torch.zeros(len(rows), n_pos, dtype=torch.long)
        for i, (row, gap) in enumerate(zip(rows, gaps, strict=True)):
            content[i, gap:] = torch.stack(row.vectors)
            ids[i, gap:], mask[i, gap:] = torch.tensor(row.tokens), 1
        inputs = {"input_ids": ids, "attention_mask": mask, "inputs_embeds": content}
        if rows[0].second:
            inputs["second_values"] = torch.stack([torch.stack(row.second) for row in rows])
            inputs["second_pos"] = torch.tensor([[gap + at for at in row.second_at] for row, gap in zip(rows, gaps, strict=True)])
        return inputs

    def _label(self, name: str) -> int:
        number = int(name[1:]) if name[:1] == "l" and name[1:].isdecimal() else -1
        if not 0 <= number < self.task.L:
            raise RenderError(f"a label must be l0..l{self.task.L - 1}; got {name!r}. Use the task's labels.")
        return number

    def _row(self, episode: Episode) -> _Row:
        check_form(episode)
        row = _Row([], [], [], [], [])
        empty = self.labels.new_zeros(self.task.width)
        for k, shot in [*enumerate(episode.shots), (QUERY, episode.query)]:
            if not isinstance(shot, VectorShot) or shot.vector.shape != (self.task.width,):
                raise RenderError(
                    f"episode {episode.id!r}: shots must carry vectors of width {self.task.width}; got a {type(shot).__name__} that does not. "
                    "Make the batch with to_batch(draw(...))."
                )
            number = self._label(shot.label)
            example = k != QUERY
            if example and episode.form.label_first:
                row.add("label", k, shot, self.labels[number].to(shot.vector.device), number)
            slots = ("first", "second") if shot.second is not None else ("first",)
            for slot in slots[::-1] if example and episode.form.swapped else slots:
                if slot == "first":
                    # an empty token shows nothing: it only says that a query comes
                    row.add("question" if shot.blank else "text", k, shot, shot.vector, shot.token)
                    continue
                assert shot.second is not None
                row.second_at.append(len(row.vectors))
                row.second.append(shot.second)
                row.add("image", k, shot, empty.to(shot.vector.device), shot.second_token)
            if example and not episode.form.label_first:
                row.add("label", k, shot, self.labels[number].to(shot.vector.device), number)
        return row


@dataclass(frozen=True, eq=False)
class _Row:
    """One prompt, token by token."""

    vectors: list[Tensor]
    tokens: list[int]
    spans: list[Span]
    second: list[Tensor]
    second_at: list[int]

    def add(self, role: Role, number: int, shot: Shot, vector: Tensor, token: int) -> None:
        """One token more, of a shot."""
        at = len(self.vectors)
        self.spans.append(Span(role, at, at + 1, number, len(self.second) - 1 if role == "image" else None, shot.label, shot.item))
        self.vectors.append(vector)
        self.tokens.append(token)


def to_batch(
    drawn: Draw, *, candidates: Candidates = "all", position_ids: Int[Tensor, "n pos"] | None = None, rows: Sequence[int] | None = None
) -> Batch:
    """Drawn sequences as a batch: what `score_heads`, `icl_accuracy` and `ablate` take.

    Args:
        drawn: From `mechicl.data.gaussian.draw` (of `draw_many`, take one `member`).
        candidates: Which labels compete: "all" L of them, or those of the sequence's own context.
        position_ids: Places of the tokens, for models trained with a random start; None: they count from 0.
        rows: Only these sequences.

    Returns:
        Batch. An item is named by its class, "i17"; in multimodal sequences by the pair, "i17+j3", or by the second class alone where the query's first
        item is another pair's (m1_query="mismatched").

    Raises:
        OptionError: a draw of several tasks, unknown `candidates`, places of another shape.
        EpisodeError: `candidates="context"`, and a context has one label only.
    """
    if drawn.tasks:
        raise OptionError(f"drawn must be of one task; got {len(drawn.tasks)}. Take drawn.member(k).")
    if candidates not in ("all", "context"):
        raise OptionError(f'candidates must be "all" or "context"; got {candidates!r}. "all" is every label of the task.')
    if position_ids is not None and position_ids.shape != drawn.tokens.shape[:2]:
        raise OptionError(
            f"position_ids must be one for each token, {tuple(drawn.tokens.shape[:2])}; got {tuple(position_ids.shape)}. Draw them anew."
        )
    return VectorRenderer(drawn.task).render(episodes(drawn, candidates=candidates, position_ids=position_ids, rows=rows))


def episodes(
    drawn: Draw, *, candidates: Candidates = "all", position_ids: Tensor | None = None, rows: Sequence[int] | None = None
) -> list[VectorEpisode]:
    """Drawn sequences as episodes; see `to_batch`."""
    task, at = drawn.task, drawn.layout
    every = tuple(f"l{k}" for k in range(task.L))
    by_second = isinstance(task, MultimodalTask) and task.m1_query == "mismatched"
    blank = isinstance(task, MultimodalTask) and task.m1_query == "off"
    item, label = torch.cat([drawn.item, drawn.query[:, None]], 1).tolist(), torch.cat([drawn.label, drawn.target[:, None]], 1).tolist()
    item2 = None if drawn.item2 is None or drawn.query2 is None else torch.cat([drawn.item2, drawn.query2[:, None]], 1).tolist()
    found = []
    for i in range(drawn.n) if rows is None else rows:
        vectors, shots = drawn.tokens[i].unbind(0), []
        second = None if drawn.second is None else drawn.second[i].unbind(0)
        for k, where in enumerate((*at.item, at.query)):
            empty = blank and k == task.N
            name = f"i{item[i][k]}" if item2 is None else f"j{item2[i][k]}" if by_second else f"i{item[i][k]}+j{item2[i][k]}"
            shots.append(VectorShot(
                label=f"l{label[i][k]}", text="nothing" if empty else f"i{item[i][k]}", item=name, vector=vectors[where],
                token=_blank(task) if empty else task.L + item[i][k], second=None if second is None else second[k],
                second_token=-1 if item2 is None else _first_second(task) + item2[i][k], blank=empty,
            ))  # fmt: skip
        shown = {shot.label for shot in shots}
        compete = every if candidates == "all" else tuple(name for name in every if name in shown)
        places = () if position_ids is None else tuple(position_ids[i].tolist())
        found.append(VectorEpisode(tuple(shots[:-1]), shots[-1], compete, id=f"{drawn.split}-{i}", places=places))
    return found


def check_form(episode: Episode) -> None:
    """Refuse forms that need words, which a toy sequence does not have.

    Raises:
        RenderError: the form asks for more than another order.
    """
    if episode.form.worded:
        raise RenderError(
            f"episode {episode.id!r}: the form of a toy sequence must only change orders (label_first, swapped); got {episode.form}. "
            "Use a vision-language model for forms with words."
        )


def _first_second(task: Task) -> int:
    """Name of the first token of the second modality."""
    return task.L + task.n_items + task.novel


def _blank(task: Task) -> int:
    """Name of the empty token, the last."""
    return _first_second(task) + (task.K2 + task.novel2 if isinstance(task, MultimodalTask) else 0)


def _own(places: tuple[int, ...], n: int) -> list[int]:
    """Places of a prompt's n tokens: its last ones, where exemplars were left out."""
    return list(places[-n:]) if places else list(range(n))
