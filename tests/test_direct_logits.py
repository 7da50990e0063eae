"""Direct logit attribution: parts add up, the planted head is the one that writes, TransformerLens counts the same, and what cannot be counted is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from readout_cases import ADDITIVE, NOT_ADDITIVE, episodes, hooked

from mechicl.analysis.readout.direct_logits import direct_logits
from mechicl.errors import EpisodeError, OptionError, UnsupportedModelError
from mechicl.models.planted import planted_induction, untrained
from mechicl.models.toys.model import ToyTransformer, toy_config
from mechicl.models.toys.prompts import ToyRenderer, toy_batch, toy_episodes
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.batch import Batch
from mechicl.training.organisms import build

QUIET: dict[str, Any] = {"progress": False}


def difference(model: Any, batch: Batch) -> np.ndarray:
    """Right minus best wrong first-token logit of every prompt, from the model's own logits."""
    logits = model(batch)[:, 0].detach()
    out = []
    for row, ids, answer in zip(logits, batch.candidate_ids, batch.answers, strict=True):
        first = row[[one[0] for one in ids]].double()
        out.append(float(first[answer] - torch.cat([first[:answer], first[answer + 1 :]]).max()))
    return np.array(out)


def test_the_planted_matching_head_writes_the_whole_answer_from_the_right_labels() -> None:
    planted = planted_induction(n_heads=3, seed=1)
    batch = toy_batch(12, 3, 2, renderer=planted.model.renderer)
    result = direct_logits(planted.model, batch, **QUIET)
    (head,) = planted.matching
    assert result.top(1) == [f"{head[0]}.{head[1]}"]
    assert result.value.max() == pytest.approx(40.0, abs=1e-3)  # the planted logit
    assert np.sort(np.abs(result.value))[-2] < 1e-4
    spans = direct_logits(planted.model, batch, by="span", **QUIET)
    at = spans.components.index(f"{head[0]}.{head[1]}"), spans.spans.index("right label")
    assert spans.value[at] == pytest.approx(40.0, abs=1e-3)
    assert np.abs(np.delete(spans.value.ravel(), np.ravel_multi_index(at, spans.value.shape))).max() < 1e-3


def test_the_control_takes_the_planted_share_away_and_an_untrained_network_has_none() -> None:
    planted = planted_induction(n_heads=3, seed=1)
    result = direct_logits(planted.model, toy_batch(12, 3, 2, renderer=planted.model.renderer), **QUIET)
    at = int(result.value.argmax())
    assert result.null_high[at] < result.low[at]
    model = untrained(renderer=ToyRenderer(), norm=True)
    nothing = direct_logits(model, toy_batch(64, 2, 2, renderer=model.renderer), against="mean wrong", **QUIET)
    assert nothing.total.low < 0 < nothing.total.high
    assert np.abs(nothing.value).max() < 1.0


@pytest.mark.parametrize("norm", [None, "RMS", "LN"])
@pytest.mark.parametrize("mlp", [None, "gelu", "product"])
@pytest.mark.parametrize("by", ["component", "layer", "span"])
def test_parts_add_up_to_the_models_own_difference_on_toys(norm: Any, mlp: Any, by: Any) -> None:
    model = untrained(renderer=ToyRenderer(), positions="rope", norm=norm, mlp=mlp, qkv_bias=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms that do something
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    batch = toy_batch(6, 3, 1, renderer=model.renderer)
    result = direct_logits(model, batch, by=by, control=False, **QUIET)
    size = np.abs(result.per_episode.reshape(6, -1)).sum(1).max()  # without a norm the parts grow large
    np.testing.assert_allclose(result.per_episode.reshape(6, -1).sum(1), difference(model, batch), atol=1e-5 * size)  # float32 sums
    assert result.residue < 1e-5 * size
    assert ("biases" in result.components) == (norm == "LN")


@pytest.mark.parametrize("family", ADDITIVE)
def test_parts_add_up_with_pictures_and_grouped_heads_in_every_additive_family(family: str) -> None:
    model, data = hooked(family), episodes(3)
    heads = direct_logits(model, data, batch_size=2, control=False, **QUIET)
    spans = direct_logits(model, data, by="span", batch_size=3, control=False, **QUIET)
    batch = model.render(data)
    true = difference(model, batch)
    scale = np.abs(heads.per_episode).sum(1).max()
    np.testing.assert_allclose(heads.per_episode.sum(1), true, atol=1e-4 * scale)
    np.testing.assert_allclose(spans.per_episode.sum((1, 2)), true, atol=1e-4 * scale)
    assert heads.components == spans.components
    np.testing.assert_allclose(spans.per_episode.sum(2), heads.per_episode, atol=1e-4 * scale)  # a head's spans are the head


@pytest.mark.parametrize("family", NOT_ADDITIVE)
def test_families_that_do_not_add_their_heads_are_refused_by_head_and_served_by_layer(family: str) -> None:
    model, data = hooked(family), episodes(2)[:1]  # mllama wants as many pictures in every prompt of a batch
    for by in ("component", "span"):
        with pytest.raises(UnsupportedModelError, match="between the heads and the residual stream"):
            direct_logits(model, data, by=by, **QUIET)  # pyright: ignore[reportArgumentType]
    result = direct_logits(model, data, by="layer", control=False, **QUIET)
    assert result.residue < 1e-3 * np.abs(result.per_episode).sum()
    if family == "paligemma2":  # soft-capped logits: parts are counted before the cap
        assert "soft-capping" in result.notes[0]
    else:
        np.testing.assert_allclose(result.per_episode.sum(1), difference(model, model.render(data)), atol=1e-3)


@pytest.mark.parametrize("which", ["toy", "qwen2_5_vl", "llava"])
def test_transformerlens_counts_the_same(which: str) -> None:
    """Its cache's stack of head results times its own scaling, with pictures in the prompt."""
    if which == "toy":
        model: Any = untrained(renderer=ToyRenderer(), norm=True, d_mlp=32)
        batch = toy_batch(4, 3, 1, renderer=model.renderer)
    else:
        model = hooked(which)
        batch = model.render(episodes(3))
    result = direct_logits(
        model, batch, against=batch.candidates[0][1 - batch.answers[0]] if which != "toy" else "mean wrong", control=False, **QUIET
    )
    kept = [
        i
        for i in range(batch.n)
        if str(i) not in {s.episode for s in result.skipped} and batch.ids[i] not in {s.episode for s in result.skipped}
    ]
    _, cache = model.run_with_cache(batch)
    stack, labels = cache.stack_head_results(layer=-1, return_labels=True)  # [component, batch, pos, d_model]
    last = batch.query_pos
    scale = cache["ln_final.hook_scale"].detach().float()
    scale = scale[:, 0] if which == "toy" else scale[torch.arange(batch.n), last]  # a toy norms only what it reads
    for k, label in enumerate(labels):
        ours = result.per_episode[:, result.components.index(label.replace("L", "").replace("H", "."))]
        for i, episode in enumerate(kept):
            first = torch.tensor([one[0] for one in batch.candidate_ids[episode]])
            directions = model.tokens_to_residual_directions(first)
            wrong = torch.cat([directions[: batch.answers[episode]], directions[batch.answers[episode] + 1 :]]).mean(0)
            toward = directions[batch.answers[episode]] - wrong
            theirs = stack[k, episode, last[episode]].detach().float() @ toward.detach() / scale[episode]
            assert ours[i] == pytest.approx(float(theirs), abs=1e-4)


def test_what_is_compared_with_is_a_choice() -> None:
    model = untrained(renderer=ToyRenderer(), norm=True)
    batch = toy_batch(5, 3, 1, renderer=model.renderer)
    logits = model(batch)[:, 0]
    mean = direct_logits(model, batch, against="mean wrong", control=False, **QUIET)
    for i in range(5):
        first = logits[i, [ids[0] for ids in batch.candidate_ids[i]]].detach().double()
        wrong = [k for k in range(3) if k != batch.answers[i]]
        assert mean.per_episode[i].sum() == pytest.approx(float(first[batch.answers[i]] - first[wrong].mean()), abs=1e-4)
    label = batch.candidates[0][(batch.answers[0] + 1) % 3]
    one = direct_logits(model, batch, against=label, control=False, **QUIET)
    assert one.n + len(one.skipped) == 5
    assert all("is no candidate" in s.reason or "is the answer" in s.reason for s in one.skipped)


def test_labels_that_begin_alike_are_left_out_with_the_reason() -> None:
    renderer = ToyRenderer()
    model = untrained(renderer=renderer)
    fine, alike = toy_episodes(2, classes=2)
    answer, other = alike.answer, next(c for c in alike.candidates if c != alike.answer)
    twin = f"{answer} {other}"
    swap = {other: twin}
    alike = replace(alike, shots=tuple(replace(s, label=swap.get(s.label, s.label)) for s in alike.shots), candidates=(answer, twin))
    result = direct_logits(model, [fine, alike], **QUIET)
    assert result.n == 1
    assert "begins with the same token" in result.skipped[0].reason
    with pytest.raises(EpisodeError, match="must differ in their first token"):
        direct_logits(model, [alike], **QUIET)


def test_options_that_do_not_exist_and_logits_that_are_not_linear_are_refused() -> None:
    model = untrained(renderer=ToyRenderer())
    batch = toy_batch(2, 2, renderer=model.renderer)
    with pytest.raises(OptionError, match="by must be"):
        direct_logits(model, batch, by="neuron", **QUIET)  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match="against must be"):
        direct_logits(model, batch, against="nobody", **QUIET)
    nonlinear = ToyTransformer(toy_config(classifier="mlp"), ToyRenderer())
    with pytest.raises(UnsupportedModelError, match="linear function"):
        direct_logits(nonlinear, batch, **QUIET)


def test_a_batch_that_does_not_know_its_episodes_has_no_control_and_says_so() -> None:
    model = untrained(renderer=ToyRenderer())
    batch = replace(toy_batch(3, 2, renderer=model.renderer), episodes=(), renderer=None)
    result = direct_logits(model, batch, **QUIET)
    assert np.isnan(result.null).all()
    assert "does not know its episodes" in result.notes[0]


def test_a_batch_brings_its_own_renderer_for_the_control() -> None:
    planted = planted_induction(n_heads=2, seed=1)
    batch = toy_batch(6, 3, 1, renderer=planted.model.renderer)
    bare = ToyTransformer(planted.model.cfg)  # cannot render by itself
    bare.load_state_dict(planted.model.state_dict())
    assert direct_logits(bare, batch, **QUIET).null_total.value == direct_logits(planted.model, batch, **QUIET).null_total.value


def test_nothing_is_left_on_the_model_and_the_table_has_every_number() -> None:
    model = hooked("qwen2_5_vl")
    batch = model.render(episodes(2))
    before = model(batch)
    result = direct_logits(model, episodes(2), by="span", **QUIET)
    assert torch.equal(before, model(batch))
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    frame = result.to_frame()
    assert len(frame) == result.value.size
    assert set(frame["n"]) == {2}


def test_in_half_precision_the_residue_is_the_models_own_rounding() -> None:
    hf, processor = build("qwen2_5_vl", preset="tiny", seed=2)
    model = HookedVLM(hf.to(torch.bfloat16), processor)
    half, full = (direct_logits(one, episodes(3), control=False, **QUIET) for one in (model, hooked("qwen2_5_vl")))
    size = np.abs(full.per_episode).sum(1).max()
    assert 0 < half.residue < 0.02 * size
    np.testing.assert_allclose(half.value, full.value, atol=0.05 * size)  # bfloat16 keeps eight bits
