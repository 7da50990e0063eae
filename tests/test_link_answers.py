"""The both-names rule in many cases; writing in batches is writing alone, family by family."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechicl.analysis.link.answers import How, ask, both_names, can_write, outcome, overlapping, write, written_alone
from mechicl.data import concepts
from mechicl.errors import NotFiniteError, OptionError
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.episode import Episode, Shot
from mechicl.training.organisms import FAMILIES
from tests.conftest import picture, unchecked
from tests.link_cases import RuleModel, follow

words = st.text("abA B.", min_size=1, max_size=4).filter(lambda w: w.strip() != "")


@pytest.mark.parametrize(
    ("answer", "right", "other", "kind"),
    [
        ("zuda", "zuda", "apple", "right"),
        ('There is "Zuda" in the image.', "zuda", "apple", "right"),
        ("ZUDA", "zuda", "apple", "right"),
        ("zuda", "ZUDA", "apple", "right"),
        ("an Apple", "zuda", "apple", "other"),
        ("zuda, not apple", "zuda", "apple", "both"),
        ("a pear", "zuda", "apple", "neither"),
        ("", "zuda", "apple", "neither"),
        ("pineapple", "pineapple", "apple", "right"),  # the right name taken out, nothing of the other is left
        ("pineapple and apple", "pineapple", "apple", "both"),
        ("appineapplele", "pineapple", "apple", "right"),  # what is left does not grow together
        ("STRASSE", "straße", "weg", "right"),
        ("cafe\u0301", "caf\u00e9", "tea", "right"),
    ],
)
def test_an_answer_is_right_where_it_names_the_right_class_and_then_no_other(answer: str, right: str, other: str, kind: str) -> None:
    assert outcome(answer, right, other) == kind
    assert both_names(answer, right, [other]) == (kind == "right")


def test_the_published_rule_takes_a_longer_name_for_the_shorter_and_the_longest_rule_does_not() -> None:
    assert outcome("cactus boxer", "cactus", "cactus boxer") == "right"
    assert outcome("cactus boxer", "cactus", "cactus boxer", "longest") == "other"
    assert outcome("cactus boxer", "cactus boxer", "cactus", "longest") == "right"
    shot = Shot("cactus", (picture(),))
    assert overlapping(Episode((), shot, ("cactus", "Cactus boxer")))
    assert not overlapping(Episode((), shot, ("cactus", "tree")))


@given(st.text("abAB .", max_size=12), words, words)
def test_the_rule_is_that_of_an_independent_reading(answer: str, right: str, other: str) -> None:
    pieces = re.split(re.escape(right.lower()), answer.lower())
    expected = len(pieces) > 1 and (other.lower() == right.lower() or not any(other.lower() in piece for piece in pieces))
    assert both_names(answer, right, other) == expected


@given(st.text(max_size=12), words, words, st.sampled_from(["published", "longest"]))
def test_case_does_not_matter_and_every_answer_has_one_outcome(answer: str, right: str, other: str, rule: Any) -> None:
    found = outcome(answer, right, other, rule)
    assert found in ("right", "other", "both", "neither")
    assert outcome(answer.casefold(), right.upper(), other.lower(), rule) == found


@given(st.text("abc ", max_size=10), words, words)
def test_both_rules_agree_where_no_name_holds_the_other(answer: str, right: str, other: str) -> None:
    a, b = right.lower(), other.lower()
    if a not in b and b not in a:
        both = {outcome(answer, right, other, "published"), outcome(answer, right, other, "longest")}
        grown = any((x != y and a[-k:] == b[:k]) or b[-k:] == a[:k] for x, y in [(a, b)] for k in range(1, min(len(a), len(b))))
        assert len(both) == 1 or grown  # names that share an end can lie across each other in the answer


def test_several_other_names_and_refusals() -> None:
    assert outcome("a dog", "cat", ["dog", "horse"]) == "other"
    assert not both_names("cat dog", "cat", ["horse", "dog"])
    with pytest.raises(OptionError, match="names must not be empty"):
        both_names("x", " ", "y")
    with unchecked(), pytest.raises(OptionError, match="rule must be one of"):
        outcome("x", "x", "y", "kind")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_prompts_written_in_a_batch_are_written_so_alone(family: str, organism: Callable[..., tuple[Any, Any]]) -> None:
    model = HookedVLM(*organism(family), check=False)
    episodes = [*concepts.draw(2, classes=2, shots=1, size=56, seed=3, syllables=(1, 1)), *concepts.draw(1, classes=2, shots=1, size=56, seed=9, syllables=(4, 4))]  # fmt: skip
    found = ask(model, episodes, How(limit=5))
    assert written_alone(model, episodes, [one.text for one in found], How(limit=5)) == (3, 3)
    batch = model.render(episodes[:1])
    plain = model.hf.generate(**dict(batch.inputs), max_new_tokens=5, do_sample=False)
    new = plain[0, batch.n_pos :]
    assert model.processor.tokenizer.decode(new, skip_special_tokens=True).strip() == found[0].text


def test_one_bad_prompt_costs_itself_only(organism: Callable[..., tuple[Any, Any]]) -> None:
    model = RuleModel(HookedVLM(*organism("qwen2_5_vl"), check=False), follow)
    good, bad = concepts.draw(2, classes=2, shots=1, size=28, seed=0)
    bad = Episode(bad.shots, bad.query, bad.candidates, "<|im_end|>", bad.question, id="bad")
    found = ask(model, [good, bad], How())
    assert found[0].text == good.answer
    assert not found[0].reason
    assert "instruction" in found[1].reason or "control" in found[1].reason


def test_a_batch_that_does_not_fit_into_memory_is_asked_in_halves(organism: Callable[..., tuple[Any, Any]]) -> None:
    class Small(RuleModel):
        def __call__(self, batch: Any, **options: Any) -> Any:
            if len(set(batch.ids)) > 2:
                raise torch.OutOfMemoryError("out of memory")
            return super().__call__(batch, **options)

    episodes = concepts.draw(5, classes=2, shots=1, size=28, seed=0)
    found = ask(Small(HookedVLM(*organism("qwen2_5_vl"), check=False), follow), episodes, How())
    assert [one.text for one in found] == [e.answer for e in episodes]


def test_a_model_that_cannot_write_is_refused_and_nan_is_named(organism: Callable[..., tuple[Any, Any]]) -> None:
    model = HookedVLM(*organism("qwen2_5_vl"), check=False)
    batch = model.render(concepts.draw(1, classes=2, shots=1, size=28, seed=0))
    assert can_write(model)
    assert not can_write(object())
    with pytest.raises(OptionError, match="model must be able to generate"):
        write(object(), batch)
    with pytest.raises(OptionError, match="max_new_tokens must be at least 1"):
        write(model, batch, 0)

    class Broken(RuleModel):
        def __call__(self, batch: Any, **options: Any) -> Any:
            return super().__call__(batch, **options) * float("nan")

    with pytest.raises(NotFiniteError, match="logits must be finite"):
        ask(Broken(model, follow), batch.episodes, How())
