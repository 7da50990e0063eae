"""Answers to link-context questions: the both-names rule, greedy writing in batches, and one batch asked in both ways."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mechicl.analysis.examples.retrieval import REFUSALS
from mechicl.analysis.guarded import each_part
from mechicl.analysis.labels import LabelScore, indistinct, label_logprobs
from mechicl.errors import NotFiniteError, OptionError
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode

Rule = Literal["published", "longest"]
"""How names are found in a written answer. published: the right name first, then the others in what is left. longest: the longest name first, so that
"cactus boxer" is never taken for "cactus"; the same wherever no name contains another."""

GAP = "\0"
"""Stands where a name was taken out, so that what stood around it does not grow together into another name."""
ROOM = 16
"""Tokens that an answer may be longer than the longest candidate, where no limit is given."""


def both_names(answer: str, right: str, others: Sequence[str] | str) -> bool:
    """Whether an answer is right: it has the right name, and, that taken out, none of the other names. Upper and lower case are one.

    Args:
        answer: What was written.
        right: The name that must be there.
        others: The name or names that must not.

    Source:
        Tai et al. 2024, released code. Differs: a name that is taken out leaves a gap (theirs lets the text around it grow together), and what
        surrounds the name ("there is", quotes) is not taken off first, because it cannot matter.
    """
    return outcome(answer, right, others) == "right"


def outcome(answer: str, right: str, others: Sequence[str] | str, rule: Rule = "published") -> str:
    """What an answer names: "right" (the right name alone), "other", "both" or "neither".

    Raises:
        OptionError: the rule does not exist, or a name is empty.
    """
    if rule not in get_args(Rule):
        raise OptionError(f"rule must be one of {', '.join(get_args(Rule))}; got {rule!r}. published is the paper's.")
    wrong = [plain(name) for name in ([others] if isinstance(others, str) else others)]
    wanted, text = plain(right), plain(answer)
    if not wanted.strip() or not all(name.strip() for name in wrong):
        raise OptionError(f"names must not be empty; got {right!r} against {others!r}. Every answer holds the empty name.")
    order = [wanted, *wrong] if rule == "published" else sorted([wanted, *wrong], key=len, reverse=True)
    found = set()
    for name in order:
        if name in text:
            found.add(name)
            if rule == "longest" or name == wanted:
                text = text.replace(name, GAP)
    has_other = any(name in found for name in wrong if name != wanted)
    return {(True, False): "right", (False, True): "other", (True, True): "both", (False, False): "neither"}[wanted in found, has_other]


def plain(text: str) -> str:
    """Without case; letters with accents in one spelling."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def overlapping(episode: Episode) -> bool:
    """Whether one candidate's name contains another's, so that the published rule favours the shorter one."""
    names = [plain(name) for name in episode.candidates]
    return any(a != b and a in b for a in names for b in names)


def can_write(model: Any) -> bool:
    """Whether the model generates text: it has `generate` and a tokenizer."""
    return hasattr(model, "generate") and getattr(getattr(model, "processor", None), "tokenizer", None) is not None


def write(model: Any, batch: Batch, limit: int | None = None) -> list[str]:
    """What the model writes behind every prompt, greedily, control tokens left out.

    Args:
        model: A `HookedVLM`.
        batch: Left-padded prompts.
        limit: Most new tokens; None: the longest candidate and `ROOM` more.

    Raises:
        OptionError: the model cannot write, or the limit is below one.
    """
    if not can_write(model):
        raise OptionError(
            f"model must be able to generate; {type(model).__name__} is not. Use generate=False: likelihood needs no writing."
        )
    if limit is not None and limit < 1:
        raise OptionError(f"max_new_tokens must be at least 1; got {limit}. None leaves room for the longest label.")
    most = limit if limit is not None else ROOM + max(len(ids) for row in batch.candidate_ids for ids in row)
    tokens = model.generate(batch, max_new_tokens=most)
    return [text.strip() for text in model.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


@dataclass(frozen=True, eq=False)
class Asked:
    """One prompt's answers: what decides between its candidates, nats; what was written ("" where nothing was asked to be); why it has none."""

    values: tuple[float, ...] = ()
    text: str = ""
    reason: str = ""


@dataclass(frozen=True)
class How:
    """How prompts are asked."""

    score: LabelScore = "full"
    generate: bool = True
    limit: int | None = None


def ask(model: Any, episodes: Sequence[Episode], how: How) -> list[Asked]:
    """Both answers to all prompts in one go; where memory is too small for that, in halves; where it is refused, one by one, so that a bad prompt costs
    itself only.

    Raises:
        NotFiniteError: logits are NaN.
    """
    return [one for some in each_part([episodes], lambda few: ask_together(model, few, how)) for one in some]


def ask_together(model: Any, episodes: Sequence[Episode], how: How) -> list[Asked]:
    """As `ask`; memory that runs out is the caller's to see to."""
    try:
        return _ask(model, episodes, how)
    except REFUSALS as error:
        if len(episodes) == 1:
            return [Asked(reason=str(error))]
    return [one for episode in episodes for one in ask_together(model, [episode], how)]


def _ask(model: Any, episodes: Sequence[Episode], how: How) -> list[Asked]:
    batch: Batch = model.render(list(episodes))
    names = [episode.id for episode in episodes]
    reasons = indistinct(batch) if how.score != "first_token" else [""] * batch.n
    found = label_logprobs(model, batch, score=how.score, names=names, share=how.score != "first_token")[0]
    values = found.deciding(how.score)
    texts = write(model, batch, how.limit) if how.generate else [""] * batch.n
    counts = [len(row) for row in batch.candidates]
    if not all(v == v for row, k in zip(values, counts, strict=True) for v in row[:k]):
        raise NotFiniteError("log-probabilities must be numbers; got NaN. Use float32 or bfloat16, and check the weights.")
    return [
        Asked(tuple(float(v) for v in row[:k]), text, reason) for row, k, text, reason in zip(values, counts, texts, reasons, strict=True)
    ]


def written_alone(model: Any, episodes: Sequence[Episode], texts: Sequence[str], how: How) -> tuple[int, int]:
    """(prompts written again without neighbours or padding, how many of them came out as they did in their batch)."""
    same = 0
    for episode, text in zip(episodes, texts, strict=True):
        same += write(model, model.render([episode]), how.limit)[0] == text
    return len(episodes), same
