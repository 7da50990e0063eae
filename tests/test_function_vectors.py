"""Function vectors: a head that says the task's label is found and its vector works elsewhere; a network that has learnt nothing has neither."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import mechicl
from mechicl.analysis.agreement import head_overlap
from mechicl.analysis.heads.scoring import score_heads
from mechicl.analysis.readout.function_vector_effects import _bundle, add_function_vector
from mechicl.analysis.readout.function_vectors import function_vector, function_vector_scores, last_outputs, shuffle
from mechicl.data.concepts import draw
from mechicl.errors import EpisodeError, HeadIndexError, OptionError, UnsupportedModelError
from mechicl.models.planted import Planted, planted_induction, untrained
from mechicl.models.toys.prompts import toy_episodes
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.episode import Episode
from mechicl.training.organisms import build

QUIET: dict[str, Any] = {"progress": False}


def one_task(n: int, seed: int = 0, name: str = "") -> list[Episode]:
    """Episodes whose answer is always l0: what they share is the answer, and one vector can say it."""
    episodes = toy_episodes(n, classes=3, generator=torch.Generator().manual_seed(seed))
    found = []
    for episode in episodes:
        others = iter(("l1", "l2"))
        names = {episode.answer: "l0"}
        for shot in episode.shots:
            if shot.label not in names:
                names[shot.label] = next(others)
        shots = tuple(replace(shot, label=names[shot.label]) for shot in episode.shots)
        query = replace(episode.query, label="l0")
        found.append(replace(episode, shots=shots, query=query, candidates=("l0", "l1", "l2"), id=f"{name}{seed}-{episode.id}"))
    return found


@pytest.fixture(scope="module")
def planted() -> Planted:
    return planted_induction(n_heads=4, seed=1)


def test_the_head_that_says_the_label_is_found(planted: Planted) -> None:
    found = function_vector_scores(planted.model, one_task(24), **QUIET)
    (head,) = planted.matching
    assert found.top(1) == [head]
    assert found.value[head] > 0.4
    assert found.p_corrected[head] < 0.001
    assert found.low[head] > 0
    assert (found.p_corrected[[layer for layer, h in planted.idle], [h for _, h in planted.idle]] > 0.05).all()
    assert found.per_episode.shape == (24, 2, 4)


def test_a_network_that_has_learnt_nothing_has_none() -> None:
    found = function_vector_scores(untrained(seed=0), one_task(24), **QUIET)
    assert np.nanmin(found.p_corrected) > 0.05
    assert np.nanmax(np.abs(found.value)) < 0.05


def test_labels_drawn_anew_leave_nothing_to_say(planted: Planted) -> None:
    """The docstring's warning: the same head does all the work, but no mean over episodes of different labels can hold them."""
    found = function_vector_scores(planted.model, toy_episodes(24, classes=3), **QUIET)
    assert np.nanmax(found.value) < 0.05
    assert np.nanmin(found.p_corrected) > 0.05


def test_an_effect_is_the_run_with_the_mean_put_in_by_hand(planted: Planted) -> None:
    model, episodes = untrained(n_layers=2, n_heads=2, seed=3), one_task(6)
    found = function_vector_scores(model, episodes, seed=5, batch_size=4, **QUIET)
    outputs = last_outputs(model, episodes, 8)[1]
    batch = model.render(shuffle(episodes, 5))
    answers = torch.tensor([row[a][0] for row, a in zip(batch.candidate_ids, batch.answers, strict=True)])
    mean = (outputs.sum(0) - outputs) / 5

    def put(z: torch.Tensor, hook: Any) -> torch.Tensor:
        z = z.clone()
        z[:, -1, 1] = mean[:, 1]
        return z

    with torch.no_grad():
        before, after = (
            logits[:, 0].softmax(-1)[torch.arange(6), answers]
            for logits in (model(batch), model.run_with_hooks(batch, fwd_hooks=[("blocks.1.attn.hook_z", put)]))
        )
    assert np.allclose(found.per_episode[:, 1, 1], after - before, atol=1e-6)


def test_means_from_other_episodes(planted: Planted) -> None:
    found = function_vector_scores(planted.model, one_task(12), reference=one_task(12, seed=3), **QUIET)
    assert found.top(1) == list(planted.matching)


def test_adding_the_vector_gives_the_answer_without_examples(planted: Planted) -> None:
    vector = function_vector(planted.model, one_task(16), planted.matching)
    assert vector.vector.shape == (planted.model.cfg.d_model,)
    assert np.allclose(vector.vector, vector.head_means[planted.matching[0]])
    found = add_function_vector(planted.model, one_task(16, seed=9), vector, n_random=30, **QUIET)
    assert [(e.prompts, e.layer) for e in found.effects] == [(p, layer) for p in ("zero-shot", "labels shuffled") for layer in (0, 1)]
    for effect in found.effects:
        assert effect.change_probability.low > 0.1
        assert effect.p_random < 0.05
        assert effect.accuracy.value > found.baseline[effect.prompts][1].value
        assert np.abs(effect.random_vectors).max() < 0.2
    assert not any("made the vector" in note for note in found.notes)
    assert len(found.to_frame()) == 4
    assert not vector.effects


def test_an_idle_head_s_vector_does_nothing(planted: Planted) -> None:
    vector = function_vector(planted.model, one_task(16), planted.idle[-1:])
    found = add_function_vector(planted.model, one_task(16), vector, n_random=5, prompts=["zero-shot"], layers=[1], **QUIET)
    (effect,) = found.effects
    assert abs(effect.change_probability.value) < 0.01
    assert effect.p_random > 0.05
    assert any("made the vector" in note for note in found.notes)


def test_controls_are_as_long_as_the_vector(planted: Planted) -> None:
    vector = function_vector(planted.model, one_task(8), planted.matching)
    bundle, _ = _bundle(vector, 6, seed=0)
    assert torch.allclose(bundle.norm(dim=1), torch.full((len(bundle),), vector.length, dtype=torch.float64))
    assert len(bundle) == 1 + 6 + 3  # three other heads in the layer


def test_function_vector_heads_beside_induction_heads(planted: Planted) -> None:
    episodes = one_task(16)
    induction = score_heads(planted.model, episodes, scores=["induction"], n_null=199, progress=False)["induction"]
    found = head_overlap(function_vector_scores(planted.model, episodes, **QUIET), induction, k=1)
    assert found.shared == planted.matching
    assert found.expected == pytest.approx(1 / 8)
    assert found.p == pytest.approx(1 / 8)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_families_with_pictures_also_those_with_norms_behind_the_heads(family: str) -> None:
    from conftest import picture

    from mechicl.prompts.episode import Shot

    model = HookedVLM(*build(family, preset="tiny", seed=0))
    episodes = [
        Episode(
            shots=tuple(Shot(label, (picture(56, 56, seed=10 * k + j),), item=label) for j, label in enumerate(("zuda", "kimo"))),
            query=Shot("zuda", (picture(56, 56, seed=10 * k + 5),), item="zuda"), candidates=("zuda", "kimo"), question="This is a", id=str(k),
        )
        for k in range(3)
    ]  # fmt: skip
    found = function_vector_scores(model, episodes, **QUIET)
    assert np.isfinite(found.value).all()
    if family == "gemma3":
        with pytest.raises(UnsupportedModelError, match="heads"):
            function_vector(model, episodes, found.top(1))
    else:
        vector = function_vector(model, episodes, found.top(2))
        assert len(add_function_vector(model, episodes, vector, n_random=1, **QUIET).effects) == 2 * model.cfg.n_layers


def test_the_bundled_model_has_no_task_to_say() -> None:
    """Its labels are drawn anew in every episode, so its working circuit shows no function vector."""
    model = mechicl.load("demo")
    found = function_vector_scores(model, draw(8, classes=2, shots=1, size=28, seed=1), **QUIET)
    assert np.nanmin(found.p_corrected) > 0.05


def test_refusals(planted: Planted) -> None:
    episodes = one_task(4)
    with pytest.raises(EpisodeError, match="at least two"):
        function_vector_scores(planted.model, episodes[:1], **QUIET)
    with pytest.raises(OptionError, match="heads must be"):
        function_vector(planted.model, episodes, [])
    with pytest.raises(HeadIndexError):
        function_vector(planted.model, episodes, [(7, 0)])
    vector = function_vector(planted.model, episodes, planted.matching)
    with pytest.raises(OptionError, match="layers must be"):
        add_function_vector(planted.model, episodes, vector, layers=[2], **QUIET)
    with pytest.raises(OptionError, match="n_random"):
        add_function_vector(planted.model, episodes, vector, n_random=-1, **QUIET)


def test_nothing_stays_behind(planted: Planted) -> None:
    batch = planted.model.render(one_task(3))
    before = planted.model(batch)
    function_vector_scores(planted.model, one_task(3), **QUIET)
    assert torch.equal(planted.model(batch), before)
    assert not any(point.fwd_hooks for point in planted.model.hook_dict.values())
