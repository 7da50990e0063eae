"""The whole story, on planted truth: the circuit is found on one half, proven on the other, and nothing is claimed where nothing is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mechicl.analysis.ablation.effects import head_effects
from mechicl.analysis.prompts import prompt_view
from mechicl.analysis.study import discover, doses, find_and_prove
from mechicl.data import concepts
from mechicl.errors import EpisodeError, OptionError
from mechicl.models.planted import Planted, planted_induction, untrained
from mechicl.models.toys.prompts import ToyRenderer, ToyVocabulary, toy_episodes
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.episode import Episode
from mechicl.results import Score, Study
from mechicl.views import story
from mechicl.views.report import ReportContent, write_report

RENDERER = ToyRenderer(ToyVocabulary(10, 20))
QUIET: dict[str, Any] = {"batch_size": 128, "progress": False}


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    return toy_episodes(64, classes=4, label_words=2, vocabulary=RENDERER.vocabulary, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def planted() -> Planted:
    """One previous-token head and three matching heads of eight a layer: any one of the three suffices."""
    return planted_induction(n_heads=8, n_matching=3, renderer=RENDERER, n_ctx=32, seed=1)


@pytest.fixture(scope="module")
def study(planted: Planted, episodes: list[Episode]) -> Study:
    return find_and_prove(planted.model, episodes, task="planted", **QUIET)


def of(study: Study, score: str) -> Any:
    return next(s for s in study.sets if s.score == score)


def test_the_planted_heads_are_found_whole_and_nothing_else_is(study: Study, planted: Planted) -> None:
    assert set(of(study, "induction").heads) == set(planted.matching)
    assert set(of(study, "ila").heads) == set(planted.previous_token)  # a label's own item is the token before it


def test_redundant_heads_are_told_from_irrelevant_ones(study: Study) -> None:
    matching = of(study, "induction")
    assert matching.finding == "redundant"
    assert [c.change.value for c in matching.ablation.singles] == [0.0, 0.0, 0.0]
    assert matching.ablation.chosen.accuracy.value < 0.5
    assert of(study, "ila").finding == "necessary"
    assert story.proven(matching)


def test_the_dose_curve_stays_flat_until_the_last_redundant_head_goes(study: Study) -> None:
    curve = of(study, "induction").dose
    values = {int(k): a.value for k, a in zip(curve.ks, curve.accuracy, strict=True)}
    assert values[0] == values[1] == values[2] == 1.0
    assert values[3] < 0.5


def test_heads_are_found_and_proven_on_different_episodes(study: Study, episodes: list[Episode]) -> None:
    assert study.n_find == study.n_prove == 32
    assert len(set(study.accuracy.episode_ids)) == 32
    assert set(study.accuracy.episode_ids) <= {e.id for e in episodes[1::2]} or not any(e.id for e in episodes)
    matching = of(study, "induction").heads[0]
    assert study.replication["induction"].value[matching] == pytest.approx(
        study.scores["induction"].value[matching], abs=0.05
    )  # 32 episodes each


def test_a_set_that_two_rules_find_is_run_once(study: Study) -> None:
    assert of(study, "previous_token").ablation is of(study, "ila").ablation
    assert of(study, "previous_token").kind == "previous-token"


def test_controls_take_the_information_away(study: Study) -> None:
    assert study.accuracy.accuracy.value == 1.0
    assert study.controls["labels permuted"].high < 0.9
    assert study.accuracy.zero_shot is not None
    assert study.accuracy.zero_shot.high < 0.6


def test_what_a_head_is_worth_alone_is_seen_without_looking_at_attention(planted: Planted, episodes: list[Episode]) -> None:
    worth = head_effects(planted.model, episodes[:32], **QUIET)
    idle = np.array([worth.value[h] for h in planted.idle])
    np.testing.assert_allclose(idle, 0.0, atol=1e-3)  # they write where nobody reads; float32 sums differ
    assert set(discover(worth, "margin_lost", threshold=0.1)[0]) == set(planted.circuit)  # redundant heads still lose some margin


def test_the_story_makes_a_page(study: Study, tmp_path: Path) -> None:
    text = write_report(tmp_path / "planted.html", ReportContent(study)).read_text(encoding="utf-8")
    assert "3 induction heads and 1 label-to-item head are needed for it" in text
    assert "Attention on the pictures" not in text


def test_a_network_that_learnt_nothing_gets_no_claim(episodes: list[Episode]) -> None:
    study = find_and_prove(untrained(n_layers=2, n_heads=4, renderer=RENDERER), episodes, **QUIET)
    assert not story.learns(study.accuracy)
    assert not any(story.proven(s) for s in study.sets)
    assert "does not show that" in story.headline(study)


def test_a_vision_language_model_goes_the_same_way(organism: Any) -> None:
    model = HookedVLM(*organism("qwen2_5_vl"), check=False)
    study = find_and_prove(model, concepts.draw(8, classes=2, shots=2, size=28), effects=False, n_prompts=1, batch_size=32, progress=False)
    view = study.prompts[0]
    assert len(view.images) == 5
    assert len(view.tokens) == len(view.roles) == len(view.shots) == len(view.labels)
    assert study.effects is None
    assert "does not show that" in story.headline(study)
    assert {s.kind for s in study.sets} == {"induction", "label-to-image", "previous-token"}


def test_a_prompt_is_kept_as_the_model_saw_it(organism: Any) -> None:
    model = HookedVLM(*organism("qwen2_5_vl"), check=False)
    episode = concepts.draw(1, classes=2, shots=1, size=56)[0]
    view = prompt_view(model, episode, [(0, 1), (2, 0)], predicted="x")
    batch = model.render([episode])
    assert "".join(view.tokens) == model.processor.tokenizer.decode(batch.inputs["input_ids"][0])
    assert [p for p, role in enumerate(view.roles) if role == "image"] == sorted(p for box in view.image_boxes for p in box)
    _, cache = model.run_with_cache(batch, names_filter=["blocks.2.attn.hook_pattern"])
    want = cache["blocks.2.attn.hook_pattern"][0, 0].double().numpy()
    np.testing.assert_allclose(view.patterns[(2, 0)], want, atol=1e-5)  # rows beside fused attention against the whole pattern, float32
    np.testing.assert_array_equal(view.rows[(2, 0)], view.patterns[(2, 0)][-1])
    short = prompt_view(model, episode, [(2, 0)], pattern_limit=10)
    assert short.patterns == {}
    np.testing.assert_allclose(short.rows[(2, 0)], want[-1], atol=1e-5)  # as above


def test_the_rule_takes_every_head_that_passes_but_leaves_some_to_compare_with() -> None:
    value = np.array([[0.5, 0.05, 0.4], [0.3, 0.2, 0.6]])
    p = np.array([[0.01, 0.01, 0.2], [0.01, 0.01, 0.01]])
    found = Score("induction", "", "probability", value, value, value, value * 0, value * 0, p, p, value[None])
    assert discover(found, "induction", limit=6)[0] == ((1, 2), (0, 0), (1, 0), (1, 1))  # 0.1 is too weak, 0.2 not above its null
    heads, rule = discover(found, "induction")
    assert heads == ((1, 2), (0, 0))
    assert "the best 2 of 4 that pass" in rule
    assert discover(replace(found, value=value * np.nan), "induction")[0] == ()
    assert discover(None, "ila") == ((), "ila score, which these prompts do not define")


@pytest.mark.parametrize(("n_set", "n_most"), [(1, 8), (4, 6), (20, 200), (3, 3)])
def test_doses_include_none_the_set_and_a_little_beyond(n_set: int, n_most: int) -> None:
    ks = doses(n_set, n_most)
    assert ks == sorted(set(ks))
    assert ks[0] == 0
    assert n_set in ks
    assert ks[-1] == min(n_set + 2, n_most)
    assert len(ks) <= 9
    assert ks[: min(len(ks), 3)] == [0, 1, 2] or n_most > 6


def test_mistakes_are_refused_before_the_model_runs(episodes: list[Episode]) -> None:
    nothing: Any = None
    with pytest.raises(EpisodeError, match="at least 8"):
        find_and_prove(nothing, episodes[:7])
    with pytest.raises(OptionError, match="at least 19"):
        find_and_prove(nothing, episodes, n_random=10)
    with pytest.raises(OptionError, match="threshold must be"):
        find_and_prove(nothing, episodes, threshold=1.5)
