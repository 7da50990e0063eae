"""Link-context learning: episodes in which a picture class gets a new name, beside another class that is hard to tell from it.

An episode shows `shots` pictures of a positive class and as many of one negative class, shuffled; the positive one is called by a random string, the
negative one by its own name; the query is of either class by the toss of a coin. `candidates` are always (positive label, negative label).

Source:
    Tai et al. 2024 (arXiv 2308.07891), and its released code for what the paper does not say.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
from jaxtyping import Float, Int

from mechicl.data.compose import INSTRUCTION, QUESTION
from mechicl.data.isekai_made import generated_pool
from mechicl.data.link_pool import Labels, LinkClass, Pool
from mechicl.data.neighbours import Neighbours, rank_chances
from mechicl.data.words import SYLLABLES, pseudo_words
from mechicl.errors import OptionError
from mechicl.prompts.episode import Episode, Shot
from mechicl.prompts.form import PLAIN, Form

__all__ = [
    "PUBLISHED", "SENTENCES", "SHORT", "STRATEGIES", "LinkClass", "Pool", "Prompt", "Strategy", "generated_pool", "link_episodes",
    "link_prompt", "pseudo_label", "syllable_label",
]  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """Words of an episode. `form` may give the examples another question than the query's."""

    instruction: str
    question: str
    form: Form = PLAIN


PUBLISHED = Prompt(
    "Find the causal relation between the examples and use it to answer the last question.",
    "Based on the previous examples, what is in the image?",
    Form(question="What is in the image?"),
)
"""The published questions; a label is the whole answer."""
SENTENCES = Prompt(
    PUBLISHED.instruction,
    PUBLISHED.question,
    Form(question="What is in the image?", before_label='there is "', after_label='" in the image.'),
)
"""The published questions and answers: each label stands in its sentence, in its own turn. The query's answer is scored as the bare label: nothing of the
sentence is put into the model's mouth."""
SHORT = Prompt(INSTRUCTION, QUESTION)
"""What the bundled model was trained on."""


@dataclass(frozen=True)
class Strategy:
    """How a training episode is drawn.

    Attributes:
        least: Fewest shots of a class where their number is drawn; None: always the most.
        power: The number of shots s is drawn by exp(power * s); 0: evenly.
        again: Pictures are drawn with replacement, so that one may come twice, and the query's may be among the examples.
        general: Every other episode is one of another task.
        about: In a sentence.
    """

    least: int | None = None
    power: float = 0.0
    again: bool = False
    general: bool = False
    about: str = ""

    def chances(self, most: int) -> tuple[Int[np.ndarray, " shots"], Float[np.ndarray, " shots"]]:
        """Numbers of shots per class and their probabilities.

        Raises:
            OptionError: `most` below the fewest.
        """
        least = most if self.least is None else self.least
        if most < max(least, 1):
            raise OptionError(f"shots must be at least {max(least, 1)} with this strategy; got {most}. The published one is 16.")
        values = np.arange(least, most + 1)
        weight = np.exp(self.power * (values - most))
        return values, weight / weight.sum()


STRATEGIES: Mapping[str, Strategy] = {
    "2-way": Strategy(about="paper: always `shots` of a class"),
    "2-way-random": Strategy(least=2, about="paper: shots drawn evenly from 2 to `shots`"),
    "2-way-weight": Strategy(least=2, power=1.0, about="paper: shots s from 2 to `shots` by e^s"),
    "mix": Strategy(general=True, about="paper: one half 2-way, one half the model's general task"),
    "policy_2way_weight": Strategy(again=True, about="released code: in spite of its name always `shots` of a class"),
    "policy_2way_random_shot": Strategy(
        least=1, power=0.5, again=True, about="released code: in spite of its name not even; s from 1 by e^(s/2)"
    ),
}
"""The paper's strategies, and under their own names the released code's, which are not what their names say."""


def pseudo_label(draw: np.random.Generator, *, avoid: str = "", lengths: tuple[int, int] = (1, 10)) -> str:
    """A random lower-case string; its length is drawn evenly.

    Args:
        draw: The only randomness.
        avoid: A name that the label must neither contain nor be a part of: with "a" against "banana" the rule of the two names counts every "banana" as "a".
            Letters are drawn again, the length stays. "" allows all.
        lengths: Fewest and most letters.
    """
    n = int(draw.integers(lengths[0], lengths[1] + 1))
    while True:
        label = "".join(string.ascii_lowercase[i] for i in draw.integers(26, size=n))
        if not avoid or (label not in avoid.lower() and avoid.lower() not in label):
            return label


def syllable_label(draw: np.random.Generator, *, beside: str = "") -> str:
    """A pronounceable label for models that know syllables only (`mechicl.data.words`), with as many syllables as `beside` and another first one.

    A name that is not made of such syllables counts as two. With labels of one length neither is likelier for being shorter.
    """
    pairs = [beside[i : i + 2] for i in range(0, len(beside), 2)]
    n = len(pairs) if pairs and all(pair in SYLLABLES for pair in pairs) else 2
    while True:
        label = pseudo_words(1, draw, syllables=(n, n), avoid={beside})[0]
        if label[:2] != beside[:2].lower():
            return label


def link_prompt(episode: Episode, prompt: Prompt) -> Episode:
    """The same episode in other words."""
    return replace(episode, instruction=prompt.instruction, question=prompt.question, form=prompt.form)


def link_episodes(
    pool: Pool,
    n: int,
    *,
    strategy: str = "2-way",
    shots: int = 16,
    neighbours: Neighbours | None = None,
    pseudo_labels: bool | Labels = True,
    general: Sequence[Episode] = (),
    prompt: Prompt = PUBLISHED,
    seed: int = 0,
) -> list[Episode]:
    """n episodes of a strategy; episode k depends on the seed and k only.

    Args:
        pool: Classes; the positive one is drawn evenly.
        n: How many.
        strategy: One of `STRATEGIES`.
        shots: Pictures of either class, or the most of them where the strategy draws their number.
        neighbours: Negatives are drawn from its list, the one of interval j by `rank_chances`. None: from all classes evenly, the control.
        pseudo_labels: True: the positive class is renamed as `pool.labels` says. "letters", "syllables": in this way. False: it keeps its own name.
        general: Episodes of another task, for "mix": taken in random order, all before any comes again.
        prompt: The words.
        seed: Decides everything.

    Returns:
        Episodes with candidates (positive label, negative label); `Shot.item` is the class's key; the id reads
        "strategy/seed/k: positive key called label, not negative key".

    Raises:
        OptionError: an option out of range, too few pictures in a class, classes that were not compared, or "mix" without a general task.
    """
    rename = pool.labels if pseudo_labels is True else pseudo_labels or ""
    if rename not in ("", *get_args(Labels)):
        raise OptionError(
            f"pseudo_labels must be True, False, {' or '.join(get_args(Labels))}; got {pseudo_labels!r}. True is as the pool says."
        )
    way = _checked(pool, n, strategy, shots, general)
    near = None if neighbours is None else neighbours.take(pool.keys)
    found = []
    for k in range(n):
        draw = np.random.default_rng([seed, k])
        if way.general and _coin(seed, k // 2) != k % 2:
            found.append(_general(general, k // 2, seed))
        else:
            found.append(_episode(pool, way, shots, near, seed, rename, prompt, f"{strategy}/{seed}/{k}", draw))
    return found


def check_pool(pool: Pool, strategy: str, shots: int) -> Strategy:
    """The strategy, if the pool has the pictures for it.

    Raises:
        OptionError: no such strategy, too few pictures of a class, or all classes are called the same.
    """
    if strategy not in STRATEGIES:
        raise OptionError(f"strategy must be one of {', '.join(STRATEGIES)}; got {strategy!r}. Pick one of them.")
    way = STRATEGIES[strategy]
    way.chances(shots)
    need = 1 if way.again else shots + 1
    poor = [one for one in pool.classes if len(one.images) < need]
    if poor:
        raise OptionError(
            f"every class must have {need} pictures for {shots} shots and a query; {poor[0].key!r} has {len(poor[0].images)}. Ask for fewer shots."
        )
    if len({one.name for one in pool.classes}) < 2:
        raise OptionError(f"classes must have two different names at least; all are {pool.classes[0].name!r}. Name them.")
    return way


def _checked(pool: Pool, n: int, strategy: str, shots: int, general: Sequence[Episode]) -> Strategy:
    if n < 1:
        raise OptionError(f"n must be at least 1; got {n}. Ask for more episodes.")
    way = check_pool(pool, strategy, shots)
    if way.general != bool(general):
        raise OptionError(
            f"general must be episodes of another task with strategy 'mix', and with no other; got {len(general)} with {strategy!r}. "
            "For the bundled model: mechicl.data.concepts.draw(...)."
        )
    return way


def _coin(seed: int, pair: int) -> int:
    """Which of two episodes is of the link task: one of each in every two, so that the mix is even."""
    return int(np.random.default_rng([seed, pair, 37]).integers(2))


def _general(general: Sequence[Episode], number: int, seed: int) -> Episode:
    turn, place = divmod(number, len(general))
    return general[int(np.random.default_rng([seed, turn, 41]).permutation(len(general))[place])]


def _episode(
    pool: Pool,
    way: Strategy,
    shots: int,
    near: Neighbours | None,
    seed: int,
    rename: str,
    prompt: Prompt,
    name: str,
    draw: np.random.Generator,
) -> Episode:
    positive, negative = _classes(pool, near, seed, draw)
    values, chances = way.chances(shots)
    many = int(draw.choice(values, p=chances))
    label = positive.name
    if rename == "syllables":
        label = syllable_label(draw, beside=negative.name)
    elif rename:
        label = pseudo_label(draw, avoid="" if way.again else negative.name)
        while label == negative.name:  # only the released code's rule can meet it
            label = pseudo_label(draw)
    labels = (label, negative.name)
    asked = int(draw.integers(2))
    items: list[Shot] = []
    query: Shot | None = None
    for side, one in enumerate((positive, negative)):
        extra = side == asked
        rows = draw.choice(len(one.images), many + extra, replace=way.again)
        made = [Shot(labels[side], (pool.picture(one.key, int(row)),), item=one.key) for row in rows]
        if extra:
            query = made.pop()
        items += made
    assert query is not None
    order = draw.permutation(len(items))
    title = f"{name}: {positive.key} called {label}, not {negative.key}"
    return Episode(tuple(items[int(i)] for i in order), query, labels, prompt.instruction, prompt.question, id=title, form=prompt.form)


def _classes(pool: Pool, near: Neighbours | None, seed: int, draw: np.random.Generator) -> tuple[LinkClass, LinkClass]:
    """A positive and a negative class of different names."""
    while True:
        row = int(draw.integers(len(pool)))
        if near is None:
            other = (row + 1 + int(draw.integers(len(pool) - 1))) % len(pool)
        else:
            other = int(near.drawn(row, seed)[draw.choice(near.n, p=rank_chances(near.n))])
        if pool.classes[row].name != pool.classes[other].name:
            return pool.classes[row], pool.classes[other]
