"""Heads switched off: exact against other ways to do the same, and verdicts that tell needed, redundant, irrelevant and unspecific heads apart."""

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mechicl.analysis.ablation.ablate import ablate, dose_curve
from mechicl.analysis.ablation.matched import matched_draws
from mechicl.analysis.ablation.switches import Switches, check_how, head_means
from mechicl.analysis.ablation.verdict import FINDINGS, judge
from mechicl.analysis.heads.scoring import score_heads
from mechicl.analysis.icl import icl_accuracy
from mechicl.errors import EpisodeError, HeadIndexError, OptionError
from mechicl.models.planted import Planted, planted_induction, untrained
from mechicl.models.toys.prompts import ToyRenderer, ToyVocabulary, toy_batch, toy_episodes
from mechicl.prompts.episode import Episode

RENDERER = ToyRenderer(ToyVocabulary(10, 20))
"""A small vocabulary makes a small planted network."""

QUIET: dict[str, Any] = {"batch_size": 128, "progress": False}


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    return toy_episodes(48, classes=4, label_words=2, vocabulary=RENDERER.vocabulary)


@pytest.fixture(scope="module")
def others() -> list[Episode]:
    return toy_episodes(48, classes=4, label_words=2, vocabulary=RENDERER.vocabulary, generator=torch.Generator().manual_seed(77))


@pytest.fixture(scope="module")
def planted() -> Planted:
    """One previous-token head and three matching heads of eight a layer: any one of the three suffices."""
    return planted_induction(n_heads=8, n_matching=3, renderer=RENDERER, n_ctx=32, seed=1)


@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
def test_redundant_heads_cost_nothing_one_by_one_and_everything_together(
    planted: Planted, episodes: list[Episode], others: list[Episode], how: Any
) -> None:
    found = ablate(planted.model, episodes, planted.matching, how, reference=others, **QUIET)
    assert found.intact.accuracy.value == 1.0
    assert (
        found.chosen.accuracy.low < 0.25 + 0.2 < found.intact.accuracy.low
    )  # chance, within what the means of other episodes can give away
    assert found.chosen.mcnemar_p < 1e-6
    assert [cell.change.value for cell in found.singles] == [0.0, 0.0, 0.0]
    assert all(cell.accuracy.value == 1.0 for cell in found.random)
    assert found.finding == "redundant"
    assert "each head alone can be spared" in found.verdict


def test_zeroing_the_whole_circuit_brings_exactly_chance(planted: Planted, episodes: list[Episode]) -> None:
    found = ablate(planted.model, episodes, planted.matching, n_random=0, seed=1, **QUIET)
    assert found.chosen.accuracy.low < 0.25 < found.chosen.accuracy.high
    assert found.chosen.margins == pytest.approx(np.zeros(48), abs=1e-4)  # float32: no label is preferred
    assert found.zero_shot is not None
    assert found.zero_shot.low < 0.25 < found.zero_shot.high


def test_a_single_needed_head_is_necessary_and_an_idle_one_irrelevant(planted: Planted, episodes: list[Episode]) -> None:
    needed = ablate(planted.model, episodes, planted.previous_token, **QUIET)
    assert needed.finding == "necessary"
    assert needed.singles[0].correct is needed.chosen.correct
    idle = ablate(planted.model, episodes, planted.idle[:3], **QUIET)
    assert idle.finding == "irrelevant"
    assert idle.chosen.change.value == 0.0
    assert idle.chosen.mcnemar_p == 1.0


def test_a_set_with_one_needed_head_names_it(planted: Planted, episodes: list[Episode]) -> None:
    head = planted.previous_token[0]
    found = ablate(planted.model, episodes, [planted.idle[0], head], **QUIET)
    assert found.finding == "necessary"
    assert f"{head[0]}.{head[1]} (-" in found.verdict
    assert "1 of 2" in found.verdict


def test_heads_that_cost_no_more_than_random_ones_are_not_called_needed(episodes: list[Episode]) -> None:
    """The idle heads of layer 1 write constants that cancel: whichever goes, the rest drowns the answer."""
    planted = planted_induction(n_heads=8, renderer=RENDERER, n_ctx=32, seed=1)
    size = RENDERER.vocabulary.size
    block: Any = planted.model.blocks[1]
    attn = block.attn
    noise = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 2
    idle = [head for layer, head in planted.idle if layer == 1]
    for head in idle:
        attn.W_V.data[head], attn.W_O.data[head] = 0.0, 0.0
        attn.W_V.data[head, :size, 0] = 1.0
        attn.W_O.data[head, 0, size + 32 + size : 2 * size + 32 + size] = noise * (len(idle) - 1 if head == idle[0] else -1)
    found = ablate(planted.model, episodes, [(1, idle[1])], spare=planted.matching, **QUIET)
    assert found.intact.accuracy.value == 1.0
    assert found.chosen.change.high < 0
    assert found.finding == "unspecific"


def test_a_model_at_chance_has_nothing_to_lose(episodes: list[Episode]) -> None:
    found = ablate(untrained(renderer=RENDERER), episodes, [(0, 0), (1, 1)], **QUIET)
    assert found.finding == "nothing to lose"
    assert found.finding in FINDINGS


def test_without_random_draws_there_is_no_control(planted: Planted, episodes: list[Episode]) -> None:
    found = ablate(planted.model, episodes, planted.matching, n_random=0, singles=False, **QUIET)
    assert found.finding == "no control"
    assert math.isnan(found.p_random)
    assert found.random == found.singles == ()
    assert math.isnan(found.random_mean.value)


# -- exactness


def test_zeroing_a_head_is_zeroing_its_output_weights(episodes: list[Episode]) -> None:
    model = untrained(renderer=RENDERER, seed=5, n_heads=4)
    found = ablate(model, episodes, [(0, 1), (1, 2)], n_random=0, **QUIET)
    cut = untrained(renderer=RENDERER, seed=5, n_heads=4)
    cut.blocks[0].attn.W_O.data[1] = 0  # type: ignore[union-attr]
    cut.blocks[1].attn.W_O.data[2] = 0  # type: ignore[union-attr]
    expected = icl_accuracy(cut, episodes, zero_shot=False, **QUIET)
    assert found.chosen.margins == pytest.approx(expected.margins, abs=1e-4)  # float32
    assert not np.allclose(found.chosen.margins, found.intact.margins, atol=1e-2)  # and it does something


def test_means_leave_padding_out(episodes: list[Episode]) -> None:
    model = untrained(renderer=RENDERER, seed=5)
    uneven = [
        toy_episodes(1, classes=2, vocabulary=RENDERER.vocabulary)[0],
        toy_episodes(1, classes=4, shots=2, vocabulary=RENDERER.vocabulary)[0],
    ]
    means = head_means(model, uneven, [1])
    parts = []
    for episode in uneven:
        _, cache = model.run_with_cache(model.render([episode]))
        parts.append(cache["blocks.1.attn.hook_z"][0])
    assert torch.allclose(means[1], torch.cat(parts).mean(0), atol=1e-5)


def test_mean_ablation_writes_the_mean_at_every_position_of_these_heads_only(episodes: list[Episode]) -> None:
    model = untrained(renderer=RENDERER, seed=5)
    switches = Switches.build(model, episodes, [((0, 1),), ((1, 0), (1, 3))], "mean", seed=0, batch_size=16)
    batch = model.render(episodes[:3])
    seen: dict[str, Tensor] = {}

    def look(z: Tensor, *, hook: Any) -> None:
        seen[hook.name] = z

    hooks = [*switches.hooks(range(2)), ("blocks.0.attn.hook_z", look), ("blocks.1.attn.hook_z", look)]
    model.run_with_hooks(batch.repeat(2), fwd_hooks=hooks)
    z0, z1 = seen["blocks.0.attn.hook_z"], seen["blocks.1.attn.hook_z"]
    assert torch.equal(z0[:3, :, 1], switches.means[0][1].expand(3, batch.n_pos, -1))
    assert torch.equal(z1[3:, :, 3], switches.means[1][3].expand(3, batch.n_pos, -1))
    _, plain = model.run_with_cache(batch)
    assert torch.allclose(z0[3:], plain["blocks.0.attn.hook_z"], atol=1e-6)  # the other copy is untouched in layer 0
    assert torch.allclose(z0[:3, :, 0], plain["blocks.0.attn.hook_z"][:, :, 0], atol=1e-6)


def test_resampling_from_equal_episodes_changes_nothing(planted: Planted) -> None:
    same = [toy_episodes(1, classes=4, vocabulary=RENDERER.vocabulary)[0]] * 4
    found = ablate(planted.model, same, planted.circuit, "resample", n_random=0, singles=False, **QUIET)
    assert found.chosen.margins == pytest.approx(found.intact.margins, abs=1e-4)  # float32


def test_resampling_reads_the_intact_model_at_the_same_distance_from_the_end() -> None:
    """Prompts of two lengths: where the partner has no token, the head says its mean."""
    model = untrained(renderer=RENDERER, seed=5)
    pair = [toy_episodes(1, classes=2, vocabulary=RENDERER.vocabulary)[0], toy_episodes(1, classes=4, vocabulary=RENDERER.vocabulary)[0]]
    switches = Switches.build(model, pair, [((0, 2),)], "resample", seed=0, batch_size=16)
    batch = model.render(pair)
    switches.see(model, batch, 1)
    _, plain = model.run_with_cache(batch)
    z, real = plain["blocks.0.attn.hook_z"], batch.inputs["attention_mask"].bool()
    assert torch.allclose(switches.seen[0][0], z[1], atol=1e-6)  # the long one is real everywhere
    assert torch.allclose(switches.seen[0][1][real[0]], z[0][real[0]], atol=1e-6)
    assert torch.allclose(switches.seen[0][1][~real[0]], switches.means[0].expand(int((~real[0]).sum()), -1, -1), atol=1e-6)


@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
def test_many_sets_in_one_pass_are_the_same_as_one_by_one(how: Any, episodes: list[Episode]) -> None:
    model, heads = untrained(renderer=RENDERER, seed=6), [(0, 0), (1, 1), (1, 3)]
    data = episodes[:6]
    together = ablate(model, data, heads, how, n_random=3, batch_size=512, progress=False)
    apart = ablate(model, data, heads, how, n_random=3, batch_size=24 if how == "resample" else 4, progress=False)
    assert [cell.heads for cell in together.random] == [cell.heads for cell in apart.random]
    for one, two in zip((together.chosen, *together.singles, *together.random), (apart.chosen, *apart.singles, *apart.random), strict=True):
        assert one.margins == pytest.approx(two.margins, abs=1e-4)  # float32, other matrix shapes


def test_an_ablation_leaves_no_trace_also_when_it_fails(planted: Planted, episodes: list[Episode]) -> None:
    before = planted.model(toy_batch(2, 2, renderer=RENDERER))
    ablate(planted.model, episodes[:4], planted.matching, n_random=2, **QUIET)
    planted.model.W_U.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="logits must be finite"):
        ablate(planted.model, episodes[:4], planted.matching, n_random=2, **QUIET)
    planted.model.W_U.data[0, 0] = 0.0
    assert torch.equal(planted.model(toy_batch(2, 2, renderer=RENDERER)), before)
    assert all(not point.fwd_hooks for point in planted.model.hook_points())


# -- dose curve


def test_the_dose_curve_holds_until_the_last_redundant_head_goes(planted: Planted, episodes: list[Episode]) -> None:
    scores = score_heads(planted.model, episodes, scores=("induction",), n_null=99, **QUIET)
    curve = dose_curve(planted.model, episodes, scores, "induction", ks=[0, 1, 2, 3, 4], n_random=6, spare=planted.circuit, seed=1, **QUIET)
    assert set(curve.ranking[:3]) == set(planted.matching)
    assert [a.value for a in curve.accuracy[:3]] == [1.0, 1.0, 1.0]
    assert curve.accuracy[3].low < 0.25 < curve.accuracy[3].high
    assert curve.random_mean[1:].tolist() == [1.0] * 4
    assert np.isnan(curve.random_mean[0])
    assert curve.margin[1].value < curve.margin[0].value  # the margin shows what the accuracy cannot
    assert (curve.ranked_by, curve.how, curve.chance) == ("induction", "zero", 0.25)
    assert list(curve.to_frame()["k"]) == [0, 1, 2, 3, 4]


def test_a_dose_curve_at_k_is_the_ablation_of_the_top_k(planted: Planted, episodes: list[Episode]) -> None:
    ranking = [planted.previous_token[0], *planted.matching]
    data = episodes[:12]
    curve = dose_curve(planted.model, data, ranking, ks=[0, 2], n_random=0, **QUIET)
    pair = ablate(planted.model, data, ranking[:2], n_random=0, singles=False, **QUIET)
    assert curve.accuracy[1].value == pair.chosen.accuracy.value
    assert curve.ranked_by == "given"
    assert dose_curve(planted.model, data, ranking, n_random=0, **QUIET).ks.tolist() == [0, 1, 2, 3, 4]


# -- matched random heads

HEADS = st.sets(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=12)


@given(HEADS, st.integers(1, 12), st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_random_sets_match_the_layers_and_never_hold_a_chosen_head(chosen: set[tuple[int, int]], n: int, seed: int) -> None:
    draws = matched_draws(sorted(chosen), dict.fromkeys(range(4), 5), n, seed=seed)
    assert len(set(draws.sets)) == len(draws.sets) <= n
    full = {layer for layer in range(4) if 2 * sum(at == layer for at, _ in chosen) > 5}
    for drawn in draws.sets:
        assert len(drawn) == len(set(drawn)) == len(chosen)
        assert not set(drawn) & chosen
        for layer in set(range(4)) - full:
            wanted = sum(at == layer for at, _ in chosen)
            assert sum(at == layer for at, _ in drawn) >= wanted
            if not full:
                assert sum(at == layer for at, _ in drawn) == wanted
    assert draws.exhaustive == (0 < len(draws.sets) < n)
    if full and draws.sets:
        assert "nearest other layers" in draws.note or "other layers, near or far" in draws.note
    if not draws.sets:
        assert "no random control" in draws.note


def test_all_matched_sets_are_tried_where_there_are_few() -> None:
    draws = matched_draws([(1, 0), (1, 1)], {0: 4, 1: 5}, 20, seed=0)
    assert set(draws.sets) == {tuple((1, h) for h in some) for some in combinations((2, 3, 4), 2)}
    assert draws.exhaustive
    assert "only 3 matched sets exist, 20 were asked for" in draws.note
    assert matched_draws([(0, 0)], {0: 30}, 20, seed=0) == matched_draws([(0, 0)], {0: 30}, 20, seed=0)
    assert not matched_draws([(0, 0)], {0: 30}, 20, seed=0).note


def test_a_full_layer_is_matched_by_the_nearest_one_and_spared_heads_stay_out() -> None:
    draws = matched_draws([(1, 0), (1, 1)], {0: 2, 1: 2, 2: 2, 3: 3}, 20, seed=0, spare=[(0, 1)])
    near = [(0, 0), (2, 0), (2, 1)]  # both sides alike; layer 3 is farther
    assert set(draws.sets) == set(combinations(near, 2))
    assert draws.exhaustive
    few = matched_draws(
        [(1, 0), (1, 1)], {0: 1, 1: 2, 2: 1, 3: 2}, 20, seed=0
    )  # one set in the nearest layers is no control: farther ones follow
    assert few.sets[0] == ((0, 0), (2, 0))
    assert set(few.sets) == set(combinations([(0, 0), (2, 0), (3, 0), (3, 1)], 2))
    assert "near or far" in few.note
    far = matched_draws([(1, 0)], {0: 1, 1: 1, 2: 0, 3: 3}, 20, seed=0, spare=[(0, 0)])
    assert set(far.sets) == {((3, 0),), ((3, 1),), ((3, 2),)}
    nothing = matched_draws([(0, 0), (0, 1)], {0: 3}, 5, seed=0)
    assert nothing.sets == ()
    assert "1 heads are left" in nothing.note


# -- refusals


def test_bad_heads_are_refused_with_the_range(planted: Planted, episodes: list[Episode]) -> None:
    for heads, message in (
        ([(2, 0)], "layer in 0..1 and head in 0..7"),
        ([(0, 8)], "got \\(0, 8\\)"),
        ([], "at least one"),
        ([(0, 1), (0, 1)], "0.1 twice"),
    ):
        with pytest.raises(HeadIndexError, match=message):
            ablate(planted.model, episodes, heads, **QUIET)
    with pytest.raises(HeadIndexError, match="got \\(5, 0\\)"):
        ablate(planted.model, episodes, [(0, 0)], spare=[(5, 0)], **QUIET)


def test_bad_options_are_refused(planted: Planted, episodes: list[Episode]) -> None:
    model, heads = planted.model, planted.matching
    with pytest.raises(OptionError, match="how must be one of"):
        check_how("remove", 4)
    with pytest.raises(OptionError, match="two episodes to resample"):
        ablate(model, episodes[:1], heads, "resample", **QUIET)
    with pytest.raises(OptionError, match="n_random must be"):
        ablate(model, episodes, heads, n_random=-1, **QUIET)
    with pytest.raises(OptionError, match=r"ks must be in 0\.\.3"):
        dose_curve(model, episodes, heads, ks=[4], **QUIET)
    with pytest.raises(EpisodeError, match="non-empty"):
        ablate(model, [], heads, **QUIET)
    scores = score_heads(model, episodes[:4], scores=("tla",), n_null=9, **QUIET)
    with pytest.raises(OptionError, match="name must be one of the scores, tla; got None"):
        dose_curve(model, episodes, scores, **QUIET)


def test_the_intact_result_can_be_reused_and_must_be_of_these_episodes(planted: Planted, episodes: list[Episode]) -> None:
    intact = icl_accuracy(planted.model, episodes[:8], **QUIET)
    again = ablate(planted.model, episodes[:8], planted.matching[:1], n_random=2, intact=intact, **QUIET)
    fresh = ablate(planted.model, episodes[:8], planted.matching[:1], n_random=2, **QUIET)
    assert again.intact is intact
    assert again.to_frame().equals(fresh.to_frame())
    with pytest.raises(OptionError, match="intact must be the same episodes"):
        ablate(planted.model, episodes[8:16], planted.matching[:1], n_random=2, intact=intact, **QUIET)


def test_the_record_says_what_was_done(planted: Planted, episodes: list[Episode]) -> None:
    found = ablate(planted.model, episodes[:8], planted.matching, "mean", n_random=3, seed=4, task="toy", **QUIET)
    assert found.provenance.options["how"] == "mean"
    assert found.provenance.options["heads"] == [list(head) for head in planted.matching]
    assert (found.provenance.task, found.provenance.seed, found.n) == ("toy", 4, 8)
    assert len(found.to_frame()) == 1 + 3 + 3
    word, sentence = judge(found.intact, found.chosen, found.singles, found.random, found.p_random)
    assert word in FINDINGS
    assert sentence.endswith(".")
