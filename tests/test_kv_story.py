"""The story of keys and values on planted truth: the planted heads are the ones the margin names; what cannot be done is said; what it costs is counted."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

import mechicl
from mechicl.analysis import kv_story
from mechicl.analysis.kv_story import KVPlan, examples_story, kv_cost, mixed, pool_of
from mechicl.data import concepts
from mechicl.errors import EpisodeError
from mechicl.results import KVStory

QUIET: dict[str, Any] = {"progress": False, "batch_size": 8}


@cache
def demo() -> Any:
    return mechicl.load("demo")


@cache
def episodes(n: int = 12) -> tuple[Any, ...]:
    return tuple(concepts.draw(n, classes=2, shots=1, size=28, seed=0))


@cache
def story() -> KVStory:
    return examples_story(demo(), episodes(), KVPlan(most_shares=4), task="concepts", **QUIET)


def test_every_part_is_there_and_on_as_many_episodes_as_asked() -> None:
    found = story()
    assert found.shift is not None
    assert found.shares is not None
    assert found.margin is not None
    assert found.similarity is None
    assert (found.shift.n, found.shares.n, found.margin.n) == (12, 4, 12)
    assert found.notes == ()
    assert found.shift.provenance.task == "concepts"


def test_parts_that_are_not_asked_are_not_run() -> None:
    found = examples_story(
        demo(), episodes()[:6], KVPlan(control="zero-shot", spans=("last token",), shares=False, margin=False, similarity=True), **QUIET
    )
    assert found.shares is None
    assert found.margin is None
    assert found.shift is not None
    assert found.shift.control == "zero-shot"
    assert found.shift.spans == ("last token",)
    assert found.similarity is not None
    assert found.similarity.n == 6


def test_a_part_that_cannot_be_done_is_none_and_says_why() -> None:
    found = examples_story(demo(), [episode.without_shots() for episode in episodes()[:4]], **QUIET)
    assert (found.shift, found.shares, found.margin) == (None, None, None)
    assert len(found.notes) == 3
    assert found.notes[0].startswith("No key-value shift: ")
    with pytest.raises(EpisodeError, match="episodes must be at least one"):
        examples_story(demo(), [])


def test_pictures_are_noised_until_answers_are_mixed_and_the_story_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    many = concepts.draw(24, classes=2, shots=1, size=28, seed=0)
    monkeypatch.setattr(kv_story, "ENOUGH", 2)
    monkeypatch.setattr(kv_story, "STRENGTHS", (0.9,))
    found = examples_story(demo(), many, KVPlan(shares=False, most_shift=2), **QUIET)
    assert found.margin is not None
    if found.prompts:
        assert "90 %" in found.prompts
        assert mixed(found.margin.correct)
    monkeypatch.setattr(kv_story, "ENOUGH", 13)  # never
    plain = examples_story(demo(), many, KVPlan(shares=False, most_shift=2), **QUIET)
    assert plain.prompts == ""
    assert plain.margin is not None
    assert plain.margin.accuracy > 0.8


def test_answers_are_mixed_only_with_enough_of_both() -> None:
    assert mixed(np.repeat([True, False], [20, 10]))
    assert not mixed(np.repeat([True, False], [20, 9]))
    assert not mixed(np.ones(40, dtype=bool))


def test_the_cost_counts_prompts_and_grows_with_what_is_asked() -> None:
    lean = kv_cost(demo(), episodes(), KVPlan(control="filler", shares=False, margin=False))
    whole = kv_cost(demo(), episodes(), KVPlan(similarity=True))
    assert lean.passes == 2 * 12
    assert whole.passes == 12 * 3 + 12 * 4 + 12 * 9 * 2 + 12 * 4
    assert whole.seconds > 0
    assert "12 episodes, about 24 prompts" in str(lean)


def test_the_pool_holds_each_example_once() -> None:
    few = list(episodes()[:3])
    assert len(pool_of([*few, *few])) == sum(len(episode.shots) for episode in few)
