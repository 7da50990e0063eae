"""The story of keys and values on planted truth: the planted heads are the ones the margin names; what cannot be done is said; what it costs is counted."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

import mechicl
from mechicl.analysis import study
from mechicl.analysis.shift import story as kv_story
from mechicl.analysis.shift.story import KVPlan, examples_story, kv_cost, mixed, pool_of
from mechicl.data import concepts
from mechicl.errors import EpisodeError
from mechicl.models.planted import planted_induction
from mechicl.models.toys.prompts import toy_episodes
from mechicl.models.vlm import HookedVLM
from mechicl.results import KVStory
from mechicl.views.kv_sections import kv_blocks
from mechicl.views.kv_story import kv_told

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
    many = concepts.draw(14, classes=2, shots=1, size=28, seed=0)
    monkeypatch.setattr(kv_story, "ENOUGH", 2)
    monkeypatch.setattr(kv_story, "STRENGTHS", (0.9,))
    found = examples_story(demo(), many, KVPlan(shares=False, most_shift=2), **QUIET)
    assert found.margin is not None
    if found.prompts:
        assert "90 %" in found.prompts
        assert mixed(found.margin.correct)
    monkeypatch.setattr(kv_story, "ENOUGH", 8)  # never
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


def test_the_planted_layer_moves_and_its_heads_hold_the_query_to_its_label() -> None:
    planted = planted_induction(n_heads=4, seed=3)
    found = examples_story(planted.model, toy_episodes(12, classes=3), KVPlan(most_shares=4), **QUIET)
    assert found.notes == ()
    assert found.margin is not None
    assert set(found.margin["qk"].top(1)) <= set(planted.matching)
    told = kv_told(found)
    assert "in layer 1" in told[0]
    assert "cannot be said: all 12 answers are right" in told[-1]
    assert {block.id for block in kv_blocks(found)} == {"kv-shift", "kv-plane", "kv-answers", "kv-margin"}


@pytest.mark.parametrize("name", ["gemma3", "mllama"])  # shared keys and values with a norm on keys; no image span
def test_other_families_have_a_story_and_figures(organism: Callable[..., Any], name: str) -> None:
    model = HookedVLM(*organism(name), check=False)
    found = examples_story(model, episodes()[:6], KVPlan(similarity=True, most_shares=3), **QUIET)
    assert found.notes == ()
    assert found.shift is not None
    assert found.shift.measures["relative_l2"].shape[2] == model.cfg.n_key_value_heads
    assert len(kv_blocks(found)) == 5


def test_a_study_keeps_the_story_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    planted, asked = planted_induction(n_heads=4, seed=3), []

    def told(model: Any, few: Any, **options: Any) -> KVStory:
        asked.append([episode.id for episode in few])
        return KVStory(None, None, None, None, "", ("nothing",))

    monkeypatch.setattr(study, "examples_story", told)
    few = toy_episodes(8, classes=2)
    found = study.find_and_prove(planted.model, few, n_random=19, kv=True, **QUIET)
    assert found.kv is not None
    assert found.kv.notes == ("nothing",)
    assert asked == [[episode.id for episode in [*few[1::2], *few[::2]]]]  # those that prove come first
