"""Similar examples shift more: found where it was planted, not found where likeness is a lie, and fair between the ways."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import gen, unchecked
from scipy import stats

import mechicl
from mechicl.analysis.effect_sizes import paired_effect
from mechicl.analysis.shift.similarity import _both, similarity_test
from mechicl.data import concepts
from mechicl.data.gaussian import UnimodalTask, draw, world
from mechicl.errors import EpisodeError, OptionError
from mechicl.models.planted import untrained
from mechicl.models.toys.model import ToyTransformer, toy_config
from mechicl.models.toys.prompts import toy_episodes
from mechicl.prompts.episode import Episode, Shot
from mechicl.prompts.vectors import VectorRenderer, to_batch
from mechicl.results import SimilarityEffect

QUIET: dict[str, Any] = {"progress": False}
TASK = UnimodalTask(K=64, L=16, N=4, D=16, B=2, eps=0.5)
PLACES = 3


def reads_what_is_like_itself(sharpness: float = 4.0) -> ToyTransformer:
    """Layer 0 attends by likeness of content and writes how much it read from the first place; keys and values of layer 1 read that, and the content."""
    width = 16
    cfg = toy_config(
        n_layers=2, n_heads=1, d_model=PLACES + 2 * width, d_head=width, d_vocab=TASK.L, inputs="vectors", d_input=width, positions="one_hot",
        n_places=PLACES, random_start=False, score_scale=1.0,
    )  # fmt: skip
    model = ToyTransformer(cfg, VectorRenderer(TASK))
    content, out = slice(PLACES, PLACES + width), slice(PLACES + width, PLACES + 2 * width)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        first, second = (block.attn for block in model.blocks)
        first.W_Q[0, content] = torch.eye(width) * sharpness
        first.W_K[0, content] = torch.eye(width)
        first.W_V[0, 0, 0] = 1.0  # how much of the first place was read
        first.W_O[0, 0, out.start] = 1.0
        for weight in (second.W_K, second.W_V):
            weight[0, content] = torch.eye(width)
            weight[0, out.start, 0] = 5.0
    assert world(TASK).labels.shape[1] == width
    return model


def vectors(n: int = 30) -> tuple[list[Episode], list[Shot]]:
    episodes = list(to_batch(draw(TASK, n, gen(1))).episodes)
    return episodes, [shot for episode in episodes for shot in episode.shots]  # among them items of every query's class


def test_likeness_is_found_where_the_shift_was_made_to_follow_it() -> None:
    episodes, pool = vectors()
    found = similarity_test(reads_what_is_like_itself(), episodes, pool, **QUIET)
    claim = found.comparisons[0]
    assert (claim.first, claim.second, claim.part) == ("most similar", "least similar", "k")
    assert claim.effect.low > 0.8
    assert claim.p_corrected < 0.01
    assert claim.share > 0.9
    assert found.embeddings == "the items' own vectors"
    assert (np.diff(found.similarity.mean(0)) < -0.2).all()
    assert (np.diff(found.shift[:, 0, 1, 0, 0]) < 0).all()  # in order of likeness
    assert (found.effect[:, 0] == 0).all()  # layer 0 has read nothing
    assert (found.p[:, 0] == 1).all()
    assert (found.p_corrected[:, 1] < 0.01).all()
    assert len(found.comparisons_frame()) == 12  # against both controls
    frame = found.to_frame()
    assert frame["most similar"].to_numpy() == pytest.approx(found.shift[0].ravel())


def test_likeness_that_is_a_lie_has_no_effect() -> None:
    episodes, pool = vectors()
    claims = []
    for seed in range(8):
        lies = np.random.default_rng(seed)
        embeddings = (lies.normal(size=(len(episodes), 8)), lies.normal(size=(len(pool), 8)))
        claims.append(
            similarity_test(reads_what_is_like_itself(), episodes, pool, embeddings=embeddings, control="filler", **QUIET).comparisons[0]
        )
    assert sum(claim.p < 0.05 for claim in claims) <= 2  # of eight, one in twenty is to be expected
    assert abs(np.mean([claim.effect.value for claim in claims])) < 0.2
    assert max(claim.p for claim in claims) > 0.5
    blind = similarity_test(reads_what_is_like_itself(0.0), episodes, pool, **QUIET)  # reads every token alike
    assert all(one.effect.value == 0 for one in blind.comparisons)
    assert all(one.p == 1 for one in blind.comparisons)
    assert (blind.p == 1).all()


def test_the_three_prompts_differ_in_the_example_only() -> None:
    model = mechicl.load("demo")
    episodes = concepts.draw(8, classes=2, shots=1, size=28, seed=0)
    pool = [shot for episode in concepts.draw(5, classes=2, shots=1, size=28, seed=9) for shot in episode.shots]
    pool += [Shot("far", (concepts.draw(1, size=84)[0].shots[0].images[0],)), *(episode.query for episode in episodes)]
    found = similarity_test(model, episodes, pool, **QUIET)
    assert found.n == 8
    assert len(set(found.tokens)) == 1
    own = np.arange(len(pool) - len(episodes), len(pool))
    assert not (found.chosen == own[:, None]).any()  # no query is its own example
    assert not (found.chosen == len(pool) - len(episodes) - 1).any()  # the larger picture has more tokens
    assert "1 of 19 items are never shown" in " ".join(found.notes)
    assert found.axes == ("part", "layer", "kv_head", "span")
    assert (found.similarity[:, 0] >= found.similarity[:, 1]).all()
    assert (found.similarity[:, 1] >= found.similarity[:, 2]).all()
    assert np.abs(found.effect[:, 0]).max() == 0
    assert found.control == "filler"
    zero = similarity_test(model, episodes, pool, control="zero-shot", **QUIET)
    np.testing.assert_array_equal(zero.per_episode, found.others["zero-shot"].per_episode)
    np.testing.assert_array_equal(zero.chosen, found.chosen)
    own = similarity_test(model, episodes, pool, control="filler", labels="own", **QUIET)
    assert "own labels" in " ".join(own.notes)
    again = similarity_test(model, episodes, pool, batch_size=5, **QUIET)
    np.testing.assert_allclose(again.per_episode, found.per_episode, atol=1e-4)


def test_a_claim_that_turns_round_with_the_control_says_so() -> None:
    episodes, pool = vectors(12)
    found = similarity_test(reads_what_is_like_itself(), episodes, pool, control="filler", **QUIET)
    assert found.comparisons[0].effect.low > 0

    def turned(effect: SimilarityEffect) -> SimilarityEffect:
        e = effect.effect
        return replace(effect, effect=replace(e, value=-e.value, low=-e.high, high=-e.low))

    other = replace(found, control="zero-shot", comparisons=tuple(turned(one) for one in found.comparisons))
    assert "depends on the control" in " ".join(_both([found, other]).notes)
    assert "depends on the control" not in " ".join(_both([found, replace(found, control="zero-shot")]).notes)


def test_toys_of_words_use_their_own_embeddings() -> None:
    episodes = toy_episodes(8, classes=2)
    pool = [shot for episode in toy_episodes(8, classes=4, generator=gen(3)) for shot in episode.shots]
    found = similarity_test(untrained(positions="rope"), episodes, pool, **QUIET)
    assert found.n == 8
    assert "own features" in found.embeddings
    assert np.nanmax(found.shift[:, :, 0]) == 0


def test_effects_are_hedges_g_and_their_interval_covers() -> None:
    draw_ = np.random.default_rng(1)
    change = draw_.normal(0.5, 1, size=(12, 3))
    effect = paired_effect(change)
    t, _ = stats.ttest_1samp(change, 0)
    np.testing.assert_allclose(effect.value, np.asarray(t) / np.sqrt(12) * (1 - 3 / (4 * 11 - 1)))
    assert (effect.low < effect.value).all()
    assert (effect.value < effect.high).all()
    many = draw_.normal(0.5, 1, size=(40, 200))
    inside = paired_effect(many, n_draws=500)
    covered = np.mean((inside.low < 0.5) & (inside.high > 0.5))
    assert 0.88 < covered < 0.99  # of 200 intervals at 95 %
    holes = change.copy()
    holes[3, 0] = np.nan
    assert paired_effect(holes).value[0] == pytest.approx(float(paired_effect(np.delete(change, 3, 0)).value[0]))
    assert paired_effect(np.zeros(6)).value == 0
    assert np.isnan(paired_effect(np.ones(6)).value)
    assert paired_effect(np.full(6, 1e-9), tie=1e-6).value == 0
    assert np.isnan(paired_effect(np.full(6, np.nan)).low)


def test_questions_that_cannot_be_asked_are_refused() -> None:
    episodes, pool = vectors(6)
    model = reads_what_is_like_itself()
    with unchecked():
        for options in ({"labels": "none"}, {"control": "none"}, {"text": 2.0}, {"spans": ("wrong label",)}, {"parts": ("z",)}):
            with pytest.raises(OptionError):
                similarity_test(model, episodes, pool, **{**QUIET, **options})
        with pytest.raises(EpisodeError, match="at least 5"):
            similarity_test(model, episodes[:4], pool, **QUIET)
        with pytest.raises(EpisodeError, match="three items"):
            similarity_test(model, episodes, pool[:2], **QUIET)


def test_the_python_of_the_page_runs() -> None:
    text = (Path(__file__).parent.parent / "docs" / "kv_shift.md").read_text()
    space: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            exec(compile(block, "kv_shift.md", "exec"), space)
    assert "most similar" in out.getvalue()
    assert space["claim"].comparisons[0].effect.value > 0  # on the bundled model, like examples shift keys more
