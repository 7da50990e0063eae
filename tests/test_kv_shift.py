"""Key-value shift on circuits whose shift is known, its controls, and the same in every family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from conftest import gen, picture, unchecked
from hypothesis import given, settings
from hypothesis import strategies as st

import mechicl
from mechicl.analysis.shift.kv_shift import kv_shift
from mechicl.analysis.shift.measures import cka_interval, linear_cka, token_shift
from mechicl.analysis.shift.read import read_kv
from mechicl.data import concepts
from mechicl.data.gaussian import MultimodalTask, Task, UnimodalTask, draw
from mechicl.errors import ContextLengthError, EmptySpanError, EpisodeError, OptionError, UnsupportedModelError
from mechicl.models.planted import planted_induction, planted_vectors, untrained
from mechicl.models.toys.prompts import ToyRenderer, ToyVocabulary, toy_episodes
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.align import span_groups
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode, Shot
from mechicl.prompts.filler import filler, n_tokens
from mechicl.prompts.vectors import to_batch
from mechicl.training.organisms import FAMILIES

Organism = Callable[..., tuple[Any, Any]]
QUIET: dict[str, Any] = {"progress": False, "cka": False}


@cache
def pictures(n: int = 6) -> tuple[Episode, ...]:
    return tuple(concepts.draw(n, classes=2, shots=1, size=28, seed=4))


def test_the_shift_stands_exactly_where_the_previous_token_head_writes() -> None:
    planted = planted_induction(n_heads=4, seed=1)
    model, (match,), episodes = planted.model, [head for _, head in planted.matching], toy_episodes(8, classes=2)
    found = kv_shift(model, episodes, control="filler", **QUIET)
    assert found.spans == ("last token",)  # the query of a toy is one token
    assert found.low["relative_l2"].shape == found.high["relative_l2"].shape == (2, 2, 4, 1)
    assert np.abs(found.per_episode[:, :, 0]).max() == 0  # nothing was read yet, and the query stands in the same place
    assert np.abs(found.per_episode[:, 1, 1, match]).max() == 0  # its value is the query's own content
    # its key says which label stood before the query: another one in the filler, orthogonal and as long
    np.testing.assert_allclose(found.per_episode[:, 0, 1, match, 0], np.sqrt(2), atol=1e-5)
    np.testing.assert_allclose(found.cosine_per_episode[:, 0, 1, match, 0], 1, atol=1e-5)
    before = model.render(episodes)
    key = read_kv(model, before, before.query_pos[:, None], ("k",), [1])["k"][:, 0, match, 0]
    labels = before.inputs["input_ids"][torch.arange(8), before.query_pos - 1]
    assert torch.equal(key[:, : planted.model.cfg.d_vocab].argmax(-1), labels)


def test_without_the_head_that_reads_the_examples_nothing_shifts() -> None:
    planted = planted_induction(n_heads=4, seed=1)
    episodes = toy_episodes(8, classes=2)

    def silence(z: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.zeros_like(z)

    with planted.model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", silence)]):
        off = kv_shift(planted.model, episodes, control="filler", **QUIET)
    assert np.nanmax(off.per_episode) == 0
    assert not np.isnan(off.measures["relative_l2"][1]).any()


def test_places_in_the_stream_move_layer_nought_of_a_shorter_prompt_and_a_note_says_so() -> None:
    found = kv_shift(untrained(), toy_episodes(6, classes=2), **QUIET)
    assert found.control == "filler"
    assert np.abs(found.per_episode[:, :, 0]).max() == 0
    zero = found.others["zero-shot"]
    assert zero.measures["relative_l2"][:, 0].min() > 0.1
    assert "Layer 0 shifts" in " ".join(zero.notes)
    assert "Layer 0 shifts" not in " ".join(found.notes)
    rotary = kv_shift(untrained(positions="rope"), toy_episodes(6, classes=2), **QUIET)
    assert np.abs(rotary.others["zero-shot"].per_episode[:, :, 0]).max() == 0  # keys are read before they are turned
    assert rotary.others["zero-shot"].per_episode[:, :, 1].min() > 0.01


@pytest.mark.parametrize("kind", FAMILIES)
def test_nothing_shifts_before_the_first_attention_and_something_after_it_in_every_family(kind: str, organism: Organism) -> None:
    model = HookedVLM(*organism(kind), check=False)
    episodes = concepts.draw(3, classes=2, shots=1, size=56, seed=4)
    spans = ("query image", "query question", "last token", "instruction")
    alone = kind == "llava_onevision"  # it cuts a single picture into tiles, so that the query of a zero-shot prompt has other tokens
    if alone:
        with pytest.raises(EpisodeError, match=r"query image has 5 tokens with examples and \d+ without"):
            kv_shift(model, episodes, filler="words", spans=spans, **QUIET)
    for how in ("turns",) if alone else ("turns", "words"):
        found = kv_shift(
            model, episodes, filler=how, batch_size=2, spans=("query image", "query question", "last token", "instruction"), **QUIET
        )
        results = [found, *found.others.values()]
        assert [one.control for one in results] == (["filler"] if alone else ["filler", "zero-shot"])
        assert ("No result against zero-shot" in " ".join(found.notes)) == alone
        assert (found.lengths[:, 0] == found.lengths[:, 1]).all()  # token for token
        for one in results:
            assert one.n == 3
            assert one.axes == ("part", "layer", "kv_head", "span")
            assert "last token" in one.spans
            # rows of a batch of another width may be summed in another order
            assert np.nanmax(one.per_episode[:, :, 0]) < 1e-6
            readable = [layer for layer in one.layers if not model.anatomy.layers[layer].cross]
            assert (one.measures["relative_l2"][:, readable[-1], :, one.spans.index("last token")] > 1e-4).all()
            if kind not in ("paligemma", "paligemma2", "mllama") and "instruction" in one.spans:
                # what stands before the examples cannot know of them; PaliGemma reads both ways, Mllama's pictures are seen by all
                assert np.nanmax(one.per_episode[..., one.spans.index("instruction")]) < 1e-5
        assert any("cross-attention" in why for why in found.reasons.values()) == (kind == "mllama")


def test_the_same_prompt_twice_shifts_nothing_and_has_the_same_geometry() -> None:
    model = mechicl.load("demo")
    same = kv_shift(model, pictures(), control=list(pictures()), progress=False)
    assert same.control == "given"
    assert np.nanmax(same.per_episode) == 0
    known = ~np.isnan(same.measures["cka"])
    assert known.any()
    np.testing.assert_allclose(same.measures["cka"][known], 1, atol=1e-9)
    assert np.abs(same.cka_null[known]).mean() < 0.3  # shuffled episodes have little in common, with six of them


def test_the_shift_equals_what_the_whole_caches_say() -> None:
    model = mechicl.load("demo")
    episodes = list(pictures())
    found = kv_shift(model, episodes, control="zero-shot", spans=("query question", "last token"), batch_size=4, **QUIET)
    for i, episode in enumerate(episodes):  # one by one, without padding
        one, two = model.render([episode]), model.render([episode.without_shots()])
        caches = [model.run_with_cache(batch, names_filter=lambda name: name.endswith(("hook_k", "hook_v")))[1] for batch in (one, two)]
        groups = [span_groups(batch) for batch in (one, two)]
        for s, span in enumerate(found.spans):
            for p, part in enumerate("kv"):
                for layer in range(model.cfg.n_layers):
                    a, b = (c[f"blocks.{layer}.attn.hook_{part}"][0, g[span][0]] for c, g in zip(caches, groups, strict=True))
                    slow = ((a - b).norm(dim=-1) / b.norm(dim=-1)).mean(0)
                    np.testing.assert_allclose(found.per_episode[i, p, layer, :, s], slow, atol=1e-5)
                    cosine = (1 - torch.cosine_similarity(a, b, dim=-1)).mean(0)
                    np.testing.assert_allclose(found.cosine_per_episode[i, p, layer, :, s], cosine, atol=1e-5)
    assert found.at("v", 2, 1, "last token") == pytest.approx(found.per_episode[:, 1, 2, 1, 1].mean())
    assert found.pooled["k", "last token"].value == pytest.approx(found.per_episode[:, 0, ..., 1].mean())
    assert found.pooled["k", "last token"].low < found.pooled["k", "last token"].value < found.pooled["k", "last token"].high


def test_examples_shift_more_than_a_filler_only_where_they_are_read() -> None:
    model = mechicl.load("demo")
    found = kv_shift(model, concepts.draw(24, classes=2, shots=1, size=28, seed=0), filler="words", **QUIET)
    assert found.test is not None
    assert found.test.pooled["k", "query image"].low > 0  # the pictures of the examples reach the query's picture, words do not
    assert found.test.pooled_p["k", "query image"] < 0.01
    assert (found.test.p[:, 0] == 1).all()  # layer 0: nothing moves either way
    np.testing.assert_allclose(found.test.example - found.test.filler, found.test.difference, atol=1e-12)
    frame = found.to_frame()
    assert set(frame.control) == {"filler", "zero-shot"}
    assert len(frame) == 2 * 3 * found.measures["cka"].size
    assert frame[(frame.control == "filler") & (frame.measure == "relative_l2")].p.notna().all()
    blind = untrained(positions="rope")
    for block in blind.blocks:
        block.attn.W_V.data.zero_()
    idle = kv_shift(blind, toy_episodes(8, classes=2), **QUIET)
    assert idle.test is not None
    assert (idle.test.p == 1).all()
    assert (idle.test.p_corrected == 1).all()


@pytest.mark.parametrize(
    "task", [UnimodalTask(K=64, L=16, N=4, D=16, B=2), MultimodalTask(K1=64, K2=16, L=16, N=4, D1=64, D2=64, B=2, n_novel=16)]
)
def test_vectors_get_noise_of_their_own_norm(task: Task) -> None:
    model = planted_vectors(task).model
    batch = to_batch(draw(task, 6, gen()))
    bare, reasons = filler(model.renderer, batch.episodes, batch, numbers=range(6))
    assert set(reasons) == {""}
    mine, theirs = batch.inputs["inputs_embeds"], bare.inputs["inputs_embeds"]
    torch.testing.assert_close(mine.norm(dim=-1), theirs.norm(dim=-1))
    query = batch.mask(shot=-1)
    assert torch.equal(mine[query], theirs[query])
    changed = (mine != theirs).any(-1)
    assert torch.equal(changed, ~query & (mine.norm(dim=-1) > 0))
    if isinstance(task, MultimodalTask):
        one, two = batch.inputs["second_values"], bare.inputs["second_values"]
        assert torch.equal(one[:, -1], two[:, -1])
        assert (one[:, :-1] != two[:, :-1]).any()
    found = kv_shift(model, batch, control="filler", **QUIET)
    assert np.nanmax(found.per_episode[:, :, 0]) == 0
    assert np.nanmax(found.per_episode[:, :, 1]) > 0.1


def test_a_filler_shows_nothing_of_the_examples_and_does_not_depend_on_batches() -> None:
    model = mechicl.load("demo")
    episodes = list(pictures())
    batch = model.render(episodes)
    bare, _ = filler(model.renderer, episodes, batch)
    assert n_tokens(bare) == n_tokens(batch)
    shown = batch.mask("label") & ~batch.mask(shot=-1)
    assert not (bare.inputs["input_ids"] == batch.inputs["input_ids"])[shown].any()
    kept = ~shown
    assert torch.equal(bare.inputs["input_ids"][kept], batch.inputs["input_ids"][kept])
    again, _ = filler(model.renderer, episodes[3:4], model.render(episodes[3:4]), numbers=[3])
    width = again.n_pos
    assert torch.equal(again.inputs["input_ids"][0], bare.inputs["input_ids"][3, -width:])
    other, _ = filler(model.renderer, episodes, batch, seed=1)
    assert not torch.equal(other.inputs["input_ids"], bare.inputs["input_ids"])
    words, reasons = filler(model.renderer, episodes, batch, "words")
    assert n_tokens(words) == n_tokens(batch)
    assert set(reasons) == {""}
    assert not words.mask("label").any()
    results = [kv_shift(model, episodes, batch_size=size, filler="words", **QUIET) for size in (1, 6)]
    np.testing.assert_allclose(results[0].per_episode, results[1].per_episode, atol=1e-5)  # padding changes rounding only


def test_an_episode_that_cannot_be_compared_is_left_out_with_the_reason() -> None:
    model = mechicl.load("demo")
    episodes = list(pictures())
    strangers = [*episodes[:5], pictures(7)[6]]
    larger = Shot(episodes[0].query.label, (picture(56, 56),))
    strangers[1] = Episode(
        episodes[1].shots, larger, (larger.label, *episodes[1].candidates), episodes[1].instruction, episodes[1].question
    )
    found = kv_shift(model, episodes, control=strangers, **QUIET)
    assert found.n == 5
    assert found.skipped[0].episode == episodes[1].id or found.skipped[0].episode == "1"
    assert "query image has" in found.skipped[0].reason
    used_up = ToyRenderer(ToyVocabulary(2, 2))
    with pytest.raises(EpisodeError, match="larger vocabulary"):
        kv_shift(untrained(renderer=used_up), toy_episodes(4, classes=2, vocabulary=used_up.vocabulary), control="filler", **QUIET)


def test_one_example_is_enough() -> None:
    one = [replace(episode, shots=episode.shots[:1]) for episode in pictures()]
    assert kv_shift(mechicl.load("demo"), one, **QUIET).n == 6
    with pytest.raises(EpisodeError, match="shots must not be empty"):
        kv_shift(mechicl.load("demo"), [episode.without_shots() for episode in one], **QUIET)


def test_options_that_do_not_exist_are_refused() -> None:
    model, episodes = untrained(), toy_episodes(4, classes=2)
    batch = model.render(episodes)
    naked = Batch(batch.inputs, batch.spans, batch.answers, batch.candidates, batch.candidate_ids)
    wrong: list[dict[str, Any]] = [
        {"control": "none"}, {"filler": "dots"}, {"filler": "words"}, {"spans": ()}, {"spans": ("right label",)}, {"parts": ("q",)}, {"layers": [9]},
        {"control": episodes[:2]}, {"batch_size": 0},
    ]  # fmt: skip
    with unchecked():
        for options in wrong:
            with pytest.raises(OptionError):
                kv_shift(model, episodes, **{**QUIET, **options})
        with pytest.raises(EpisodeError, match="knows them"):
            kv_shift(model, naked, **QUIET)
        with pytest.raises(EpisodeError):
            kv_shift(model, [], **QUIET)
        with pytest.raises(EmptySpanError, match="query image"):
            kv_shift(model, episodes, spans=("query image",), **QUIET)
    with pytest.raises((ContextLengthError, OptionError)):
        kv_shift(untrained(n_ctx=4), episodes, **QUIET)


def test_a_layer_of_pictures_only_is_refused_when_asked_for(organism: Organism) -> None:
    model = HookedVLM(*organism("mllama"), check=False)
    cross = next(layer for layer, part in enumerate(model.anatomy.layers) if part.cross)
    with pytest.raises(UnsupportedModelError, match="cross-attention"):
        kv_shift(model, pictures(3), layers=[cross], **QUIET)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 10), st.integers(1, 6))
def test_shift_is_unmoved_by_turns_and_scales(seed: int, scale: float, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(5, width, generator=generator, dtype=torch.float64) for _ in range(2))
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    for one, two in zip(token_shift(a, b), token_shift(scale * a @ turn, scale * b @ turn), strict=True):
        torch.testing.assert_close(one, two, atol=1e-9, rtol=1e-9)
    relative, cosine = token_shift((1 + scale) * b, b)
    torch.testing.assert_close(relative, torch.full_like(relative, scale))
    assert cosine.abs().max() < 1e-12  # longer, not turned
    zero = torch.zeros(5, width)
    assert all(one.abs().max() == 0 for one in token_shift(zero, zero))
    assert all(one.isnan().all() for one in token_shift(b, zero))


def test_cka_knows_turned_geometries_from_unrelated_ones() -> None:
    draw_ = np.random.default_rng(0)
    x, other = draw_.normal(size=(20, 64)), draw_.normal(size=(20, 64))
    turn = np.linalg.qr(draw_.normal(size=(64, 64)))[0]
    assert linear_cka(x, 3 * x @ turn + 5) == pytest.approx(1)
    value, low, high, null = cka_interval(x, other)
    assert low < 0 < high  # more coordinates than episodes: the biased CKA would say about 0.8
    centred = [y - y.mean(0) for y in (x, other)]
    biased = np.linalg.norm(centred[0].T @ centred[1]) ** 2 / np.prod([np.linalg.norm(y.T @ y) for y in centred])
    assert biased > 0.6
    assert abs(null) < 0.1
    noisy, low, high, _ = cka_interval(x, x + draw_.normal(size=(20, 64)))
    assert low < noisy < high
    assert low > 0.2
    left_out = [linear_cka(np.delete(x, i, 0), np.delete(other, i, 0)) for i in range(20)]
    error = np.sqrt(19 * np.var(left_out))
    assert high > low
    assert cka_interval(x, other)[2] - value == pytest.approx(1.96 * error)  # the jackknife, one by one
    assert np.isnan(cka_interval(x[:4], other[:4])).all()
    assert np.isnan(cka_interval(np.ones((20, 3)), other)).all()
