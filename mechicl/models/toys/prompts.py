"""Toy prompts: episodes of words, rendered to bare token sequences with the same roles and spans as a real model's prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mechicl.errors import EpisodeError, OptionError, RenderError
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode, Shot
from mechicl.prompts.spans import NO_SHOT, QUERY, Span
from mechicl.prompts.vectors import check_form


@dataclass(frozen=True)
class ToyVocabulary:
    """Words of toy prompts: <pad>, <bos>, items i0 i1 ..., labels l0 l1 ..., in this order of token ids."""

    n_items: int = 32
    n_labels: int = 32

    @property
    def size(self) -> int:
        """Number of tokens."""
        return 2 + self.n_items + self.n_labels

    def encode(self, text: str) -> list[int]:
        """Token ids of words separated by spaces.

        Raises:
            RenderError: a word that the vocabulary does not have.
        """
        ids = []
        for word in text.split():
            kind, number = word[:1], word[1:]
            limit = {"i": self.n_items, "l": self.n_labels}.get(kind, 0)
            if not number.isdecimal() or int(number) >= limit:
                raise RenderError(
                    f"a toy word must be i0..i{self.n_items - 1} or l0..l{self.n_labels - 1}; got {word!r}. Use toy_episodes to draw some."
                )
            ids.append(2 + int(number) + (self.n_items if kind == "l" else 0))
        return ids


@dataclass(frozen=True)
class ToyRenderer:
    """Episodes of words into the bare sequence [item, label, item, label, ..., query item], optionally after <bos>. Items and labels may be several words."""

    vocabulary: ToyVocabulary = ToyVocabulary()
    bos: bool = False

    def render(self, episodes: Sequence[Episode]) -> Batch:
        """A left-padded batch; roles are `text` for items and `label` for the exemplars' labels.

        Raises:
            EpisodeError: there is nothing to render.
            RenderError: a picture, or a word outside the vocabulary.
        """
        if not episodes:
            raise EpisodeError("episodes must be a non-empty list; got none. Draw some with toy_episodes(16).")
        rows = [self._row(episode) for episode in episodes]
        n_pos = max(len(ids) for ids, _ in rows)
        ids, mask, spans = torch.zeros(len(rows), n_pos, dtype=torch.long), torch.zeros(len(rows), n_pos, dtype=torch.long), []
        for i, (row, found) in enumerate(rows):
            gap = n_pos - len(row)
            ids[i, gap:], mask[i, gap:] = torch.tensor(row), 1
            spans.append(((Span("pad", 0, gap),) if gap else ()) + tuple(span.shift(gap) for span in found))
        return Batch(
            inputs={"input_ids": ids, "attention_mask": mask}, spans=tuple(spans), answers=tuple(e.candidates.index(e.answer) for e in episodes),
            candidates=tuple(e.candidates for e in episodes), candidate_ids=tuple(tuple(tuple(self.vocabulary.encode(c)) for c in e.candidates) for e in episodes),
            patches=tuple(() for _ in episodes), episodes=tuple(episodes), ids=tuple(e.id or str(i) for i, e in enumerate(episodes)), renderer=self,
        )  # fmt: skip

    def _row(self, episode: Episode) -> tuple[list[int], list[Span]]:
        check_form(episode)
        ids: list[int] = [1] if self.bos else []
        spans = [Span("glue", 0, 1, NO_SHOT)] if self.bos else []
        for k, shot in [*enumerate(episode.shots), (QUERY, episode.query)]:
            if shot.images:
                raise RenderError(f"episode {episode.id!r}: a toy prompt must be words only; got a picture. Use a vision-language model.")
            parts: list[tuple[Any, str]] = [("text", shot.text)] if k == QUERY else [("text", shot.text), ("label", shot.label)]
            parts = parts[::-1] if episode.form.label_first else parts
            for role, words in parts:
                new = self.vocabulary.encode(words)
                spans.append(Span(role, len(ids), len(ids) + len(new), k, None, shot.label, shot.item or shot.text))
                ids += new
        return ids, spans


def toy_episodes(
    n: int,
    *,
    classes: int = 4,
    shots: int = 1,
    label_words: int = 1,
    vocabulary: ToyVocabulary | None = None,
    generator: torch.Generator | None = None,
) -> list[Episode]:
    """Few-shot episodes of words: `classes` items, each shown `shots` times in shuffled order with a label drawn anew in every episode.

    Args:
        n: Number of episodes.
        classes: Distinct items, and labels, of an episode.
        shots: How often each item is shown.
        label_words: Tokens of a label; the labels of an episode share none.
        vocabulary: Items and labels to draw from.
        generator: Decides everything; default seed 0.

    Raises:
        OptionError: more classes than the vocabulary holds.
    """
    vocabulary, generator = vocabulary or ToyVocabulary(), generator or torch.Generator().manual_seed(0)
    if not 2 <= classes <= min(vocabulary.n_items, vocabulary.n_labels // label_words):
        raise OptionError(
            f"classes must be 2..{min(vocabulary.n_items, vocabulary.n_labels // label_words)}; got {classes}. Use a larger vocabulary."
        )
    episodes = []
    for i in range(n):
        items = [f"i{int(k)}" for k in torch.randperm(vocabulary.n_items, generator=generator)[:classes]]
        words = [f"l{int(k)}" for k in torch.randperm(vocabulary.n_labels, generator=generator)[: classes * label_words]]
        labels = [" ".join(words[k * label_words : (k + 1) * label_words]) for k in range(classes)]
        order = torch.arange(classes).repeat(shots)[torch.randperm(classes * shots, generator=generator)].tolist()
        right = int(torch.randint(classes, (), generator=generator))
        shown = tuple(Shot(label=labels[k], text=items[k], item=items[k]) for k in order)
        query = Shot(label=labels[right], text=items[right], item=items[right])
        candidates = tuple(labels[int(k)] for k in torch.randperm(classes, generator=generator))
        episodes.append(Episode(shots=shown, query=query, candidates=candidates, id=f"toy-{i}"))
    return episodes


def toy_batch(
    n: int,
    classes: int = 4,
    shots: int = 1,
    generator: torch.Generator | None = None,
    *,
    label_words: int = 1,
    renderer: ToyRenderer | None = None,
) -> Batch:
    """`toy_episodes`, rendered: prompts [item, label, ..., query item] with spans, answers and candidates."""
    renderer = renderer or ToyRenderer()
    return renderer.render(
        toy_episodes(n, classes=classes, shots=shots, label_words=label_words, vocabulary=renderer.vocabulary, generator=generator)
    )
