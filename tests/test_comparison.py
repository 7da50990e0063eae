"""Two models side by side: the same model shares everything, permuted heads are found by what they do, unrelated models share what chance gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import unchecked

import mechicl
from mechicl.analysis.comparison import in_words
from mechicl.analysis.comparison.compare import COMPARED, compare, compare_sides
from mechicl.analysis.comparison.sides import Asked, measure, read_side, write_side
from mechicl.analysis.comparison.trunk import head_weights, trunk
from mechicl.data import concepts
from mechicl.errors import CheckpointError, EpisodeError, OptionError
from mechicl.models.planted import planted_induction, untrained
from mechicl.models.toys.prompts import toy_episodes
from mechicl.models.vlm import HookedVLM
from mechicl.results.comparison import Comparison, Side, Trunk
from mechicl.training.organisms import build

EPISODES = toy_episodes(24, classes=4, shots=2)
TEXT = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 3, "head_dim": 8}
QUIET: Any = {"progress": False, "n_null": 20, "accuracy": False}


def permute_heads(hf: Any, seed: int) -> list[list[int]]:
    """Deal the heads of every layer to other places, in place: groups that share keys and values stay together, so the model computes what it did.

    Returns:
        For each layer, where its new head came from.
    """
    draw = np.random.default_rng(seed)
    config = hf.get_decoder().config
    n, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    moved = []
    for layer in hf.get_decoder().layers:
        kv = draw.permutation(groups)
        heads = np.concatenate([g * (n // groups) + draw.permutation(n // groups) for g in kv])
        attention = layer.self_attn
        with torch.no_grad():
            for linear, order in ((attention.q_proj, heads), (attention.k_proj, kv), (attention.v_proj, kv)):
                linear.weight.copy_(linear.weight.unflatten(0, (len(order), width))[order].flatten(0, 1))
                if linear.bias is not None:
                    linear.bias.copy_(linear.bias.unflatten(0, (len(order), width))[order].flatten())
            out = attention.o_proj.weight
            out.copy_(out.unflatten(1, (n, width))[:, heads].flatten(1))
        moved.append([int(h) for h in heads])
    return moved


@pytest.fixture(scope="module")
def words() -> list[Any]:
    return in_words(concepts.draw(16, classes=3, shots=2, size=28, seed=1))


@pytest.fixture(scope="module")
def plain() -> HookedVLM:
    return HookedVLM(*build("llava", text=TEXT))


@pytest.fixture(scope="module")
def shuffled() -> tuple[HookedVLM, list[list[int]]]:
    hf, processor = build("llava", text=TEXT)
    moved = permute_heads(hf, 5)
    return HookedVLM(hf, processor), moved


def test_a_model_against_itself_shares_every_head(plain: HookedVLM, words: list[Any]) -> None:
    for align in ("auto", "index", "depth", "function"):
        found = compare(plain, plain, words, align=align, top=6, **QUIET)
        assert found.alignment.how == ("index" if align == "auto" else align)
        assert all(a == b for a, b in found.alignment.pairs)
        assert len(found.alignment.pairs) == 24
        for one in found.scores.values():
            assert set(one.shared) == set(one.top_first) == set(one.top_second)
            assert (one.top_shared == one.ks).all()
            assert one.spearman.value == pytest.approx(1) == pytest.approx(one.spearman.low)
            np.testing.assert_array_equal(one.quantiles_first, one.quantiles_second)
        assert found.alignment.p < 0.01
    assert found.alignment.stable == 1
    assert found.trunk.shared


def test_permuted_heads_compute_the_same_and_are_found_by_function_not_by_index(
    plain: HookedVLM, shuffled: tuple[HookedVLM, list[list[int]]], words: list[Any]
) -> None:
    other, moved = shuffled
    batch = plain.render(words[:4])
    torch.testing.assert_close(other(batch), plain(batch), rtol=0, atol=1e-5)  # the helper permutes consistently, groups and all
    assert sum(h == i for row in moved for i, h in enumerate(row)) <= 6  # or nothing could be missed
    found = compare(plain, other, words, top=6, **QUIET)
    assert found.alignment.how == "function"  # "auto" looked at the weights
    assert not found.trunk.shared
    truth = {((layer, old), (layer, new)) for layer, row in enumerate(moved) for new, old in enumerate(row)}
    assert set(found.alignment.pairs) == truth
    assert found.alignment.counterpart((1, moved[1][0])) == (1, 0)
    assert found.alignment.distance.max() < 1e-3
    assert found.alignment.stable == 1
    assert all(len(one.shared) == one.k for one in found.scores.values())
    missed = compare(plain, other, words, top=6, align="index", **QUIET)
    assert missed.alignment.p > 0.05
    assert np.mean([len(one.shared) / one.k for one in missed.scores.values()]) < 0.6
    assert np.median([one.partial for one in missed.scores.values()]) < 0.5


def test_the_trunk_is_judged_by_the_weights(plain: HookedVLM, shuffled: tuple[HookedVLM, list[list[int]]]) -> None:
    mine = head_weights(plain)
    same = trunk(mine, mine)
    assert same.shared
    assert same.median == pytest.approx(1)
    assert same.cosine["W_Q"].shape == (3, 8)
    assert same.cosine["W_K"].shape == (3, 4)
    moved = trunk(mine, head_weights(shuffled[0]))
    stayed = [(layer, i) for layer, row in enumerate(shuffled[1]) for i, h in enumerate(row) if h == i]
    for cell in np.ndindex(3, 8):
        assert (moved.cosine["W_Q"][cell] > 0.99) == (cell in stayed)
    assert "shapes differ" in trunk(mine, head_weights(HookedVLM(*build("llava"), check=False))).reason
    assert trunk("quantised", mine).reason == "quantised"


def toy_side(seed: int, **options: Any) -> Side:
    asked = Asked(COMPARED, False, 20, 0, 24, "", False)
    return measure(untrained(seed=seed, **options), EPISODES, f"random {seed}", asked)


@pytest.fixture(scope="module")
def strangers() -> list[Side]:
    return [toy_side(seed, n_layers=3, n_heads=8) for seed in range(7)]


@pytest.mark.parametrize("how", ["index", "depth", "function"])
def test_unrelated_models_share_what_chance_gives(strangers: list[Side], how: Any) -> None:
    """21 pairs of seven random networks: p is no smaller than it should be."""
    p, p_one, shared, expected = [], [], [], []
    for i, first in enumerate(strangers):
        for second in strangers[i + 1 :]:
            found = compare_sides((first, second), Trunk(False, np.nan, 0.5), how, "", top=6)
            p.append(found.alignment.p)
            p_one += [one.partial_p for one in found.scores.values()]
            shared.append(len(found["induction"].shared))
            expected.append(found["induction"].expected_layer if how == "index" else found["induction"].expected)
    assert np.mean(np.array(p) < 0.05) <= 0.2  # binomial(21, .05) exceeds 4 in 3 of 1,000 draws
    assert 0.25 < np.mean(p) < 0.75
    assert np.nanmean(np.array(p_one) < 0.05) <= 0.12
    assert abs(np.mean(shared) - np.mean(expected)) < 0.6


def test_planted_circuits_are_found_by_function_wherever_they_sit() -> None:
    first, second = (planted_induction(n_heads=6, n_previous=1, n_matching=2, seed=seed) for seed in (0, 3))
    assert first.circuit != second.circuit
    found = compare(first.model, second.model, EPISODES, top=2, **QUIET | {"accuracy": True})
    assert found.alignment.counterpart(first.previous_token[0]) == second.previous_token[0]
    assert {found.alignment.counterpart(head) for head in first.matching} == set(second.matching)
    assert set(found["induction"].top_first) == set(first.matching)
    assert len(found["induction"].shared) == 2
    assert found["induction"].p < 0.05
    assert found.accuracy is not None
    assert found.accuracy.agree.value == 1 == found.accuracy.first.value


def test_models_of_other_sizes_are_aligned_by_function_and_depth(strangers: list[Side]) -> None:
    small = toy_side(99, n_layers=2, n_heads=4)
    for how in ("function", "depth"):
        found = compare_sides((small, strangers[0]), Trunk(False, np.nan, 0.5), how, "", top=6)
        assert len({a for a, _ in found.alignment.pairs}) == len({b for _, b in found.alignment.pairs}) == len(found.alignment.pairs)
        assert found["induction"].k == 2  # a quarter of the smaller model's eight heads
        assert np.isnan(found.alignment.same_index)
        if how == "depth":
            assert all((a[0] == 0) == (b[0] == 0) for a, b in found.alignment.pairs)
            assert found.alignment.depth_gap <= 0.5  # half a layer of the model with two
    with pytest.raises(OptionError, match="as many layers"):
        compare(untrained(n_layers=2), untrained(n_layers=3), EPISODES, align="index", **QUIET)


def test_pictures_against_words_of_one_model(words: list[Any]) -> None:
    model = mechicl.load("demo")
    episodes = concepts.draw(16, classes=3, shots=2, size=28, seed=1)
    found = compare(model, model, episodes, episodes_b=words, scores=("induction", "previous_token", "ila"), progress=False, n_null=50)
    assert (found.first.prompts, found.second.prompts) == ("pictures", "words")
    assert found.first.name != found.second.name
    assert set(found["induction"].shared) == {(3, h) for h in range(4)}
    assert found["induction"].p_layer == pytest.approx(1)  # all four heads of that layer: dealing within layers, nothing can be learnt
    assert found.accuracy is not None
    assert found.accuracy.n == 16
    apart = mechicl.icl_accuracy(mechicl.load("demo"), words, progress=False)  # a model that never saw a picture
    assert found.second.accuracy is not None
    np.testing.assert_allclose(found.second.accuracy.margins, apart.margins, atol=1e-4)


def test_words_stand_for_items_and_are_no_labels() -> None:
    episodes = concepts.draw(6, classes=3, shots=2, size=28, seed=4)
    for before, after in zip(episodes, in_words(episodes, seed=2), strict=True):
        assert not after.images
        assert [s.label for s in before.shots] == [s.label for s in after.shots]
        told = {(a.item, b.text) for a, b in zip((*before.shots, before.query), (*after.shots, after.query), strict=True)}
        assert len(told) == 3 == len({text for _, text in told})
        assert not {text for _, text in told} & set(before.candidates)
    named = in_words(episodes[:1], words={s.item: f"thing {k}" for k, s in enumerate(episodes[0].shots)})
    assert named[0].query.text.startswith("thing")
    with pytest.raises(EpisodeError, match="no label"):
        in_words(episodes[:1], words={})
    with pytest.raises(EpisodeError, match="name its item"):
        in_words(
            EPISODES[:1]
            and [mechicl.Episode((mechicl.Shot("a", text="x"), mechicl.Shot("b", text="y")), mechicl.Shot("a", text="x"), ("a", "b"))]
        )


def test_what_is_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = untrained(seed=0), untrained(seed=1)
    options: dict[str, Any] = {
        "scores": ("induction", "previous_token"),
        "n_null": 20,
        "progress": False,
        "names": ("a", "b"),
        "out": tmp_path / "kept",
    }
    import mechicl.analysis.comparison.sides as sides

    unkept: dict[str, Any] = {**options, "out": None}
    whole = compare(first, second, EPISODES, **unkept)
    real, seen = sides.measure, []

    def once(model: Any, *rest: Any) -> Any:
        seen.append(model)
        if len(seen) == 2:
            raise RuntimeError("killed")
        return real(model, *rest)

    monkeypatch.setattr(sides, "measure", once)
    with pytest.raises(RuntimeError, match="killed"):
        compare(first, second, EPISODES, **options)
    again = compare(first, second, EPISODES, **options)
    assert [m is second for m in seen] == [False, True, True]  # the first was not measured twice
    pd_a, pd_b = whole.to_frame(), again.to_frame()
    assert pd_a.equals(pd_b)
    assert whole.verdict == again.verdict
    with pytest.raises(CheckpointError, match="same comparison"):
        compare(first, second, EPISODES[:10], **options)


def test_a_kept_side_is_the_side(strangers: list[Side]) -> None:
    import json

    side = measure(planted_induction().model, EPISODES, "planted", Asked(("induction", "sink"), True, 20, 0, 8, "toy", False))
    back = read_side(json.loads(json.dumps(write_side(side))))
    for name, score in side.scores.scores.items():
        np.testing.assert_array_equal(back.scores[name].per_episode, score.per_episode)
        np.testing.assert_array_equal(back.scores[name].p_corrected, score.p_corrected)
    assert side.accuracy is not None
    assert back.accuracy is not None
    assert str(back.accuracy.accuracy) == str(side.accuracy.accuracy)
    np.testing.assert_array_equal(back.accuracy.correct, side.accuracy.correct)
    assert back.accuracy.candidates == side.accuracy.candidates
    assert back.scores.provenance.model == side.scores.provenance.model


def test_tables_have_a_row_for_each_score_and_pair(strangers: list[Side]) -> None:
    found: Comparison = compare_sides((strangers[0], strangers[1]), Trunk(False, np.nan, 0.5), "function", "")
    assert list(found.to_frame()["score"]) == list(found.scores)
    assert len(found.pairs_frame()) == 24
    assert "random 0 against random 1" in found.verdict


def test_what_cannot_be_compared_is_refused() -> None:
    model = untrained()
    with unchecked():
        for options, word in (
            ({"scores": ("nothing",)}, "scores"), ({"top": 0}, "top"), ({"align": "name"}, "align"), ({"episodes_b": EPISODES[:3]}, "episode by episode"),
            ({"episodes_b": EPISODES[::-1]}, "labels"),
        ):  # fmt: skip
            with pytest.raises(OptionError, match=word):
                compare(model, model, EPISODES, **options)  # pyright: ignore[reportArgumentType]
        with pytest.raises(OptionError, match="ids of their own"):
            compare(model, model, [*EPISODES, EPISODES[0]])
