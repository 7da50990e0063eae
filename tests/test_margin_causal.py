"""Moving a margin moves the answer where the margin was planted, and nowhere else; doses are in units of the margin; both engines give the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import unchecked
from readout_cases import episodes, hooked

from mechicl.analysis.margin.causal import move_margin
from mechicl.analysis.margin.contrast import contrast_margin
from mechicl.data.gaussian import UnimodalTask, draw
from mechicl.errors import EmptySpanError, EpisodeError, HeadIndexError, OptionError, UnsupportedModelError
from mechicl.models.planted import planted_induction, planted_vectors, untrained
from mechicl.models.toys.prompts import toy_batch
from mechicl.prompts.vectors import to_batch
from mechicl.training.organisms import FAMILIES

QUIET: dict[str, Any] = {"progress": False, "n_permutations": 500, "batch_size": 64}


def planted_case(n: int = 24) -> tuple[Any, Any]:
    """A circuit that is not too sure, so that a dose shows."""
    planted = planted_induction(n_heads=4, seed=3, sharpness=10.0)
    return planted, toy_batch(n, 3, 2, renderer=planted.model.renderer)


@pytest.mark.parametrize("part", ["k", "v", "q"])
def test_the_planted_head_carries_the_answer_with_its_margin(part: Any) -> None:
    planted, batch = planted_case()
    effect = move_margin(planted.model, batch, planted.matching, part=part, **QUIET)
    assert effect.doses.tolist() == [-2, -1, -0.5, 0, 0.5, 1, 2]
    assert (np.diff(effect.change) >= -1e-5).all()  # the further the better
    assert effect.change[0] < -5
    assert effect.accuracy[0] == 0  # turned round, another label is the answer
    assert effect.accuracy[3:].min() == 1
    assert effect.slope_difference.low > 0
    assert effect.p < 0.01
    assert np.abs(effect.control[1:-1]).max() < 0.1 * abs(effect.change[0])
    assert effect.difference_high[0] < 0
    assert effect.to_frame().shape == (7, 15)


@pytest.mark.parametrize("part", ["k", "v", "q"])
def test_idle_heads_carry_nothing(part: Any) -> None:
    planted, batch = planted_case()
    idle = [head for head in planted.idle if head[0] == 1]
    effect = move_margin(planted.model, batch, idle, part=part, **QUIET)
    assert np.abs(effect.change).max() < 1e-5
    assert effect.p == 1


def test_a_dose_is_what_it_says() -> None:
    """At the planted head q . d is linear in the dose: -1 makes right and wrong labels equal, so that all six exemplars share the attention evenly."""
    planted, batch = planted_case()
    effect = move_margin(planted.model, batch, planted.matching, doses=(-1.0, 0.0), **QUIET)
    attention = contrast_margin(planted.model, batch, n_null=5, progress=False)["attention"]
    assert attention.value[planted.matching[0]] > 0.45
    assert effect.before + effect.per_episode[0] == pytest.approx(
        0, abs=5e-3
    )  # three labels as probable as one another, but for what other tokens draw
    values = move_margin(planted.model, batch, planted.matching, part="v", doses=(-1.0, -0.5, 0.5, 1.0, 2.0), **QUIET)
    per_dose = values.per_episode / values.doses[:, None]
    assert per_dose == pytest.approx(np.broadcast_to(per_dose[:1], per_dose.shape), abs=1e-3)  # what is copied is linear in the values


def test_dose_nought_changes_nothing_at_all() -> None:
    planted, batch = planted_case(8)
    for engine in ("resume", "naive"):
        for part in ("k", "v", "q"):
            effect = move_margin(planted.model, batch, planted.matching, part=part, doses=(0.0, 1.0), engine=engine, n_controls=1, **QUIET)
            assert np.abs(effect.per_episode[0]).max() < 1e-5
            assert np.abs(effect.control_per_episode[0]).max() < 1e-5


def test_an_untrained_network_answers_its_margins_no_more_than_random_directions() -> None:
    model = untrained(n_heads=4)
    batch = toy_batch(48, 3, 2, torch.Generator().manual_seed(3), renderer=model.renderer)
    effect = move_margin(model, batch, [(1, h) for h in range(4)], **QUIET)
    assert effect.p > 0.01
    assert effect.slope_difference.low < 0 < effect.slope_difference.high


def test_vectors_are_moved_too_and_noised_ones_answer_better_with_a_larger_margin() -> None:
    task = UnimodalTask(K=64, L=8, N=8, D=32, B=2, eps=1.3, no_repeats=True)
    planted = planted_vectors(task, n_heads=3)
    batch = to_batch(draw(task, 80, torch.Generator().manual_seed(0)), candidates="context")
    effect = move_margin(planted.model, batch, planted.matching, doses=(-1.0, 0.0, 1.0), **QUIET)
    assert effect.accuracy[0] < effect.accuracy[1] < effect.accuracy[2]
    assert effect.slope_difference.low > 0


@torch.no_grad()
def by_hand(model: Any, batch: Any, head: tuple[int, int], part: str, dose: float) -> np.ndarray:
    """The answer's margin with the push written out, prompt by prompt, for labels of one token and plain hooks."""
    layer, own = head
    name = f"blocks.{layer}.attn.hook_{part}"
    _, cache = model.run_with_cache(batch, names_filter=[name])
    x = cache[name].clone()
    for i, row in enumerate(batch.spans):
        answer = batch.candidates[i][batch.answers[i]]
        spans = [s for s in row if s.role == "label" and s.shot >= 0]
        mean = {
            side: torch.stack([x[i, s.start : s.stop, own].mean(0) for s in spans if (s.label == answer) == side]).mean(0)
            for side in (True, False)
        }
        direction = mean[True] - mean[False]
        for s in spans:
            x[i, s.start : s.stop, own] += (1 if s.label == answer else -1) * dose / 2 * direction
    logits = model.run_with_hooks(batch, fwd_hooks=[(name, lambda _, hook: x)])[:, 0].float().log_softmax(-1)
    out = []
    for i, ids in enumerate(batch.candidate_ids):
        values = [float(logits[i, token[0]]) for token in ids]
        right = values.pop(batch.answers[i])
        out.append(right - max(values))
    return np.array(out)


@pytest.mark.parametrize("part", ["k", "v"])
def test_pushes_are_those_written_out_by_hand(part: Any) -> None:
    planted, batch = planted_case(6)
    for head in (planted.matching[0], planted.previous_token[0]):
        effect = move_margin(planted.model, batch, [head], part=part, doses=(-1.5,), n_controls=1, **QUIET)
        assert effect.before + effect.per_episode[0] == pytest.approx(by_hand(planted.model, batch, head, part, -1.5), abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_moved_alike_by_both_engines(family: str) -> None:
    model = hooked(family)
    data = [episodes(3)[k] for k in ((0, 2) if family == "mllama" else (0, 1, 2))]
    layer = next(k for k, part in enumerate(model.anatomy.layers) if not part.cross)
    for part in ("k", "v", "q"):
        heads = [(layer, 0), (layer, (model.cfg.n_heads if part == "q" else model.cfg.n_key_value_heads) - 1)]
        one, other = (
            move_margin(model, data, heads, part=part, doses=(-1.5,), n_controls=1, engine=engine, **QUIET)
            for engine in ("resume", "naive")
        )
        assert one.per_episode == pytest.approx(other.per_episode, abs=2e-5)  # sums in another order
        assert one.control_per_episode == pytest.approx(other.control_per_episode, abs=2e-5)
        assert np.abs(one.per_episode).max() > 1e-6
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_batch_size_does_not_change_the_random_directions() -> None:
    planted, batch = planted_case(8)
    one, other = (move_margin(planted.model, batch, planted.matching, doses=(2.0,), **{**QUIET, "batch_size": size}) for size in (6, 64))
    assert one.control_per_episode == pytest.approx(other.control_per_episode, abs=1e-4)
    again = move_margin(planted.model, batch, planted.matching, doses=(2.0,), seed=1, **QUIET)
    assert np.abs(again.control_per_episode - other.control_per_episode).max() > 1e-6


def test_labels_of_several_tokens_and_other_keys() -> None:
    planted = planted_induction(n_heads=2, sharpness=10.0)
    batch = toy_batch(8, 2, 1, label_words=2, renderer=planted.model.renderer)
    for keys in ("label", "before", "item"):
        one, other = (
            move_margin(planted.model, batch, planted.matching, keys=keys, doses=(-2.0,), n_controls=1, engine=engine, **QUIET)
            for engine in ("resume", "naive")
        )
        assert one.per_episode == pytest.approx(other.per_episode, abs=2e-5)


def test_an_exception_leaves_no_trace() -> None:
    planted, batch = planted_case(4)
    clean = planted.model(batch)

    def fail(x: Any, *, hook: Any) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), planted.model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", fail)]):
        move_margin(planted.model, batch, planted.matching, engine="naive", **QUIET)
    assert not any(point.fwd_hooks for point in planted.model.hook_dict.values())
    assert torch.equal(planted.model(batch), clean)


def test_refusals(untyped: None) -> None:
    planted, batch = planted_case(4)
    model: Any = planted.model
    wrong: list[dict[str, Any]] = [
        {"part": "z"},
        {"keys": "x"},
        {"engine": "x"},
        {"doses": ()},
        {"doses": (0.0,)},
        {"doses": (np.inf,)},
        {"n_controls": 0},
    ]
    for options in wrong:
        with pytest.raises(OptionError):
            move_margin(model, batch, planted.matching, **QUIET, **options)
    with pytest.raises(OptionError, match="heads"):
        move_margin(model, batch, [], **QUIET)
    for head in ((2, 0), (0, 4), (-1, 0)):
        with pytest.raises(HeadIndexError):
            move_margin(model, batch, [head], **QUIET)
    with pytest.raises(EmptySpanError):
        move_margin(model, batch, planted.matching, keys="close", **QUIET)
    with pytest.raises(EpisodeError):
        move_margin(model, [], planted.matching, **QUIET)
    mllama = hooked("mllama")
    cross = next(k for k, part in enumerate(mllama.anatomy.layers) if part.cross)
    with pytest.raises(UnsupportedModelError, match="cross-attention"):
        move_margin(mllama, [episodes(3)[0]], [(cross, 0)], **QUIET)


def test_episodes_that_cannot_be_compared_are_named() -> None:
    planted, batch = planted_case(4)
    one = batch.episodes[0]
    lonely = replace(one, shots=tuple(replace(s, label=one.answer) for s in one.shots), id="lonely")
    with unchecked():
        data = planted.model.render([lonely, *batch.episodes[1:]])
    effect = move_margin(planted.model, data, planted.matching, doses=(1.0,), n_controls=1, **QUIET)
    assert (effect.n, [s.episode for s in effect.skipped]) == (3, ["lonely"])
