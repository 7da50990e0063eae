"""What a fine-tuning reads: the episodes of every step, and the loss on their answers alone.

Every episode of a run has a number; its seed follows from the run's seed and that number. So the episodes of a step do not depend on how the step is cut
into batches or shared out over processes, and a run can be continued anywhere without a saved random state.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from mechicl.errors import EpisodeError, OptionError
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode, check_pictures
from mechicl.prompts.form import PLAIN

Source = Sequence[Episode] | Callable[[int, int], Sequence[Episode]]
"""Episodes: a list, gone through in a shuffled order, again and again; or a function (n, seed) -> n episodes."""

IGNORED = -100
"""Label of tokens that do not count in the loss, as transformers has it."""


@dataclass(frozen=True, eq=False)
class Feed:
    """The episodes of a fine-tuning.

    `main`: the task; `general`: episodes of another one, which take the place of a main one with probability `share`; `per_step`: episodes of a step.
    """

    main: Source
    per_step: int
    seed: int = 0
    general: Source | None = None
    share: float = 0.0

    def __post_init__(self) -> None:
        if self.per_step < 1:
            raise OptionError(f"episodes of a step must be at least 1; got {self.per_step}. Raise batch or accumulation.")
        if not 0 <= self.share <= 1:
            raise OptionError(f"mix must be a share in 0..1; got {self.share}. 0.5 is half of the episodes.")
        if self.share and self.general is None:
            raise OptionError(f"general must be given where mix is above 0; got mix={self.share} and no episodes. Pass general=.")
        for name, source in (("data", self.main), ("general", self.general)):
            if isinstance(source, Sequence):
                if not source or not all(isinstance(episode, Episode) for episode in source):
                    raise EpisodeError(
                        f"{name} must be a non-empty list of episodes or a function (n, seed) -> episodes; got another list."
                    )
                check_pictures(source)

    def episode(self, number: int) -> Episode:
        """The run's episode `number`, counted from 0."""
        general = self.share and random.Random(f"{self.seed} which {number}").random() < self.share
        source = self.general if general else self.main
        assert source is not None
        if isinstance(source, Sequence):
            turn, at = divmod(number, len(source))
            return source[shuffled(len(source), f"{self.seed} {turn}")[at]]
        drawn = list(source(1, seed_of(self.seed, number)))
        if len(drawn) != 1 or not isinstance(drawn[0], Episode):
            raise EpisodeError(f"a function of episodes must return as many as it is asked for; asked for 1, got {len(drawn)}. Check it.")
        return drawn[0]

    def step(self, step: int, part: slice = slice(None)) -> list[Episode]:
        """The episodes of a training step, counted from 0, or some of them."""
        numbers = range(step * self.per_step, (step + 1) * self.per_step)
        return [self.episode(number) for number in numbers[part]]


def seed_of(*names: object) -> int:
    """A seed that the names decide, below 2**31."""
    return int.from_bytes(hashlib.sha256("\x1f".join(str(name) for name in names).encode()).digest()[:4], "big") >> 1


@lru_cache(maxsize=4)
def shuffled(n: int, seed: str) -> tuple[int, ...]:
    """0..n-1 in an order that the seed decides."""
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return tuple(order)


def about(source: Source | None) -> Any:
    """What a run's configuration says of a source: enough to notice another one."""
    if source is None:
        return None
    if not isinstance(source, Sequence):
        told = getattr(source, "about", None)
        name = getattr(source, "__qualname__", type(source).__name__)
        return dict(told) if isinstance(told, Mapping) else f"{getattr(source, '__module__', '')}.{name}"
    text = hashlib.sha256()
    for episode in source:
        for shot in (*episode.shots, episode.query):
            text.update(repr((shot.label, shot.text, [image.size for image in shot.images])).encode())
            for image in shot.images:
                text.update(image.convert("RGB").resize((8, 8)).tobytes())
    return {"episodes": len(source), "digest": text.hexdigest()[:16]}


@dataclass(frozen=True, eq=False)
class Lesson:
    """A batch to learn from: what the model takes, and labels [batch, pos], -100 everywhere but on the answer."""

    inputs: Mapping[str, Any]
    labels: Int[Tensor, "batch pos"]

    @property
    def n_tokens(self) -> int:
        """Tokens that count in the loss."""
        return int((self.labels != IGNORED).sum())


def lesson(batch: Batch, *, close: Sequence[int] = ()) -> Lesson:
    """A rendered batch with its answers behind the prompts.

    Args:
        batch: Prompts that end where the answer begins.
        close: Tokens that end an answer (see `closing`), learnt as part of it.
    """
    answers = [[*batch.candidate_ids[i][batch.answers[i]], *close] for i in range(batch.n)]
    long = batch.append(answers)
    ids: Tensor = long.inputs["input_ids"]
    labels = torch.where(long.mask("answer"), ids, torch.full_like(ids, IGNORED))
    return Lesson(long.inputs, labels)


def closing(renderer: Any, episode: Episode) -> tuple[int, ...]:
    """The token that ends an answer in this model's prompts: the control token behind an exemplar's label, else the tokenizer's end of text.

    Args:
        renderer: The model's `Renderer`.
        episode: Any episode: its query is rendered as an exemplar of itself, in turns.
    """
    batch = renderer.render([replace(episode, shots=(episode.query,), form=PLAIN)])
    special, ids = set(renderer.tokenizer.all_special_ids), batch.inputs["input_ids"][0].tolist()
    for span in batch.spans[0]:
        if span.role == "label" and span.stop < len(ids) and ids[span.stop] in special:
            return (ids[span.stop],)
    end = renderer.tokenizer.eos_token_id
    return () if end is None else (int(end),)


def answer_loss(logits: Float[Tensor, "batch kept vocab"], labels: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Sum over the answers' tokens of -log p(token | what stands before it), nats.

    Args:
        logits: Of the last `kept` positions, at least one more than the longest answer.
        labels: See `Lesson`.
    """
    kept = logits.shape[1]
    wanted = labels[:, -kept:][:, 1:]
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum")


def kept_positions(labels: Int[Tensor, "batch pos"]) -> int:
    """How many positions at the end need logits: from the token before the first that counts."""
    first = int((labels != IGNORED).any(0).to(torch.int).argmax())
    return labels.shape[1] - first + 1


def renderable(episodes: Sequence[Episode], family: str, *, alone: bool = False) -> list[list[Episode]]:
    """The episodes as groups that can be one batch: Mllama's prompts of a batch must have as many pictures each; `alone`: the family's padding moves its
    logits, so that each prompt is learnt by itself.
    """
    if alone:
        return [[episode] for episode in episodes]
    if family != "mllama":
        return [list(episodes)]
    groups: dict[int, list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(len(episode.images), []).append(episode)
    return list(groups.values())


@dataclass(frozen=True, eq=False)
class LinkSource:
    """Link-context episodes of a pool of classes, as a source.

    `strategy`: one of `mechicl.data.link_context.STRATEGIES` but "mix", which is `Feed.share`. `neighbours` None: negatives from all classes evenly.
    """

    pool: Any
    strategy: str = "2-way"
    shots: int = 16
    neighbours: Any = None
    prompt: Any = None

    def __call__(self, n: int, seed: int) -> list[Episode]:
        """n episodes."""
        from mechicl.data.link_context import PUBLISHED, link_episodes

        return link_episodes(
            self.pool, n, strategy=self.strategy, shots=self.shots, neighbours=self.neighbours, prompt=self.prompt or PUBLISHED, seed=seed
        )

    @property
    def about(self) -> dict[str, Any]:
        """For a run's configuration."""
        from mechicl.data.link_context import PUBLISHED

        prompt = self.prompt or PUBLISHED
        text = hashlib.sha256()
        for one in self.pool.classes:
            text.update(f"{one.key}\x1f{one.name}\x1f{len(one.images)}\x1e".encode())
        if self.neighbours is not None:
            text.update(repr(self.neighbours.listed(0).tolist()).encode())
        return {
            "strategy": self.strategy, "shots": self.shots, "pool": self.pool.title, "classes": len(self.pool), "digest": text.hexdigest()[:16],
            "negatives": "random" if self.neighbours is None else "neighbours", "prompt": [prompt.instruction, prompt.question],
        }  # fmt: skip


def sources(
    strategy: str,
    pool: Any,
    data: Source | None,
    general: Source | None,
    mix: float | None,
    *,
    shots: int,
    neighbours: Any,
    prompt: Any,
) -> tuple[Source, Source | None, float]:
    """What `adapt` was asked for, as the main source, the general one and its share.

    Raises:
        OptionError: neither or both of pool and data, an unknown strategy, or "mix" without a general task.
    """
    from mechicl.data.link_context import STRATEGIES

    if (pool is None) == (data is None):
        raise OptionError(
            f"either pool or data must be given; got {'neither' if pool is None else 'both'}. A pool for link-context episodes, or data of your own."
        )
    if mix is None:
        mix = 0.5 if strategy == "mix" else 0.0
    if strategy == "mix" and general is None:
        raise OptionError(
            "general must be episodes of the model's own task with strategy 'mix'; got none. Pass general=, e.g. a list of episodes."
        )
    if general is not None and not mix:
        raise OptionError(f"mix must be above 0 where general is given; got {mix}. Say how large its share is, e.g. mix=0.5.")
    if data is not None:
        return data, general, mix
    if strategy not in STRATEGIES:
        raise OptionError(f"strategy must be one of {', '.join(STRATEGIES)}; got {strategy!r}. Pick one of them.")
    main = LinkSource(pool, "2-way" if strategy == "mix" else strategy, shots, neighbours, prompt)
    main(1, 0)  # refuses now what it would refuse later
    return main, general, mix
