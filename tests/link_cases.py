"""Stand-ins for link-context tests: a model that answers by a rule of its own, through a real renderer and real tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from mechicl.models.vlm import HookedVLM
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode

Rule = Callable[[Episode], str | None]


class RuleModel:
    """Says what a rule says about the episode; None: it has no opinion. Embeddings are the real model's. `wrap`: the sentence that a written answer stands in."""

    continue_prompts = None

    def __init__(self, real: HookedVLM, rule: Rule, wrap: str = "{}") -> None:
        self.real, self.rule, self.wrap = real, rule, wrap
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __call__(self, batch: Batch, *, positions: Any = None, **options: Any) -> torch.Tensor:
        if positions is None:
            return self.real(batch, **options)
        self.asked += batch.n
        logits = torch.zeros(batch.n, positions.shape[1], len(self.real.processor.tokenizer))
        for i, episode in enumerate(batch.episodes):
            label = self.rule(episode)
            for j, token in enumerate(batch.candidate_ids[i][episode.candidates.index(label)] if label else ()):
                if j < positions.shape[1]:
                    logits[i, j, token] = 12.0
        return logits

    def generate(self, batch: Batch, *, max_new_tokens: int) -> torch.Tensor:
        tokenizer = self.real.processor.tokenizer
        texts = [self.wrap.format(self.rule(episode) or "") for episode in batch.episodes]
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:max_new_tokens] for text in texts]
        width = max(1, *(len(row) for row in rows))
        return torch.tensor([row + [tokenizer.pad_token_id or 0] * (width - len(row)) for row in rows])


def follow(episode: Episode) -> str | None:
    """The label that most examples of the query's class carry."""
    counts = Counter(shot.label for shot in episode.shots if shot.item == episode.query.item).most_common(2)
    return counts[0][0] if counts and (len(counts) == 1 or counts[0][1] > counts[1][1]) else None


def always_first(episode: Episode) -> str:
    """The positive name, whatever is shown."""
    return episode.candidates[0]
