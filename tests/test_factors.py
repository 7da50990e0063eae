"""`factor_shares` on models: identities, planted and negative controls, families, refusals, an independent path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import mechicl
from mechicl.analysis.shift.factors import factor_shares
from mechicl.analysis.shift.shares import decompose
from mechicl.data import concepts
from mechicl.data.gaussian import UnimodalTask, draw
from mechicl.errors import EpisodeError, OptionError
from mechicl.models.planted import planted_induction, planted_vectors, untrained
from mechicl.models.toys.prompts import ToyRenderer, toy_episodes
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.conditions import cross, crossing
from mechicl.prompts.episode import Episode, Shot
from mechicl.prompts.reform import FORMS
from mechicl.prompts.vectors import episodes as vector_episodes

Organism = Callable[..., tuple[Any, Any]]
FAST: dict[str, Any] = {"progress": False, "n_permutations": 99}


def hooked(family: str, organism: Organism) -> HookedVLM:
    model, processor = organism(family)
    return HookedVLM(model, processor, check=False, name=family)


def sums(found: Any) -> np.ndarray:
    return np.sum([found.shares[name] for name in found.sources], 0)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma3", "mllama", "paligemma", "llava_onevision", "idefics3"])
def test_shares_of_every_kind_of_family_sum_to_one(kind: str, organism: Organism) -> None:
    model = hooked(kind, organism)
    episodes = concepts.draw(3, classes=2, shots=1, size=28, seed=3)
    found = factor_shares(model, episodes, format="label first", batch_size=5, **FAST)
    assert found.n == 3
    assert not found.skipped
    assert found.factors == ("semantics", "format")
    assert found.conditions == ("kept+kept", "kept+label first", "other class+kept", "other class+label first", "zero-shot")
    assert found.moved.shape == (2, len(found.layers), model.cfg.n_key_value_heads, len(found.spans))
    total = sums(found)
    alive = ~np.isnan(found.moved)
    np.testing.assert_allclose(total[alive], 1, atol=1e-10)
    assert np.isnan(total[~alive]).all()
    assert not alive[:, 0].any()  # what a token's key and value are in the first layer, no example changes
    assert alive[:, 1:].any()
    for name in found.sources:
        assert (found.low[name][alive] <= found.shares[name][alive] + 1e-12).all()
        assert (found.shares[name][alive] <= found.high[name][alive] + 1e-12).all()
    assert np.isnan(found.common).all() == (kind == "llava_onevision")
    assert set(found.pooled) == {"k", "v"}
    assert sum(e.value for e in found.pooled["k"].values()) == pytest.approx(1)
    frame = found.to_frame()
    assert len(frame) == found.moved.size * 4
    assert set(found.answers_frame()["condition"]) == set(found.conditions)
    assert found.provenance.options["replicates"] == 2


def test_against_plain_hugging_face_and_another_way_of_adding_up(organism: Organism) -> None:
    model = hooked("qwen2_5_vl", organism)
    episodes = concepts.draw(2, classes=2, shots=1, size=28, seed=3)
    factors = {"semantics": "other label", "format": "one turn"}
    found = factor_shares(model, episodes, factors=factors, spans=("last token",), seed=7, batch_size=3, **FAST)
    crossed = cross(episodes, crossing(factors), seed=7)
    layer = 1
    values = []
    for runs, zero in zip(crossed.runs, crossed.zero_shot, strict=True):
        rows = []
        for one in (zero, *runs):
            kept: list[torch.Tensor] = []
            attention = model.hf.model.get_decoder().layers[layer].self_attn
            handle = attention.v_proj.register_forward_hook(lambda m, i, o, kept=kept: kept.append(o))
            with torch.no_grad():
                model.hf(**model.render([one]).inputs)
            handle.remove()
            rows.append(kept[0][0, -1].reshape(model.cfg.n_key_value_heads, -1).double())
        shift = torch.stack(rows[1:]) - rows[0]
        values.append((shift / rows[0].norm(dim=-1, keepdim=True)).numpy())
    other = decompose(np.stack(values), crossed.design.numpy(), ("semantics", "format"), n_permutations=1)
    for name in found.sources:
        np.testing.assert_allclose(
            found.shares[name][1, layer, :, 0], other.shares[name], atol=1e-4
        )  # float32 differences of float32 numbers
        np.testing.assert_allclose(found.squares[name][:, 1, layer, :, 0], other.squares[name], rtol=1e-3, atol=1e-9)


def test_a_model_that_cannot_see_order_gives_form_no_share() -> None:
    blind = untrained(positions="none", norm="RMS", seed=1)
    seeing = untrained(positions="rope", norm="RMS", seed=1)
    episodes = toy_episodes(12, classes=3, shots=1)
    shares = {}
    for name, model in (("blind", blind), ("seeing", seeing)):
        shares[name] = factor_shares(model, episodes, semantics="other label", format="label first", **FAST)
    alive = ~np.isnan(shares["blind"].moved)
    assert alive[:, 1].all()
    assert not alive[:, 0].any()
    for source in ("format", "interaction"):
        assert np.nanmax(shares["blind"].shares[source]) < 1e-8  # a sum over the same tokens in another order
        assert shares["seeing"].pooled["k"][source].value > 0.001
    assert shares["blind"].pooled["k"]["residual"].value > 0.1


def test_answers_agree_with_icl_accuracy() -> None:
    model = mechicl.load("demo")
    episodes = concepts.draw(6, classes=3, shots=1, size=28, seed=8)
    found = factor_shares(model, episodes, replicates=1, layers=[1], spans=("last token",), **FAST)
    alone = mechicl.icl_accuracy(model, episodes, progress=False)
    np.testing.assert_array_equal(found.correct["kept+kept"], alone.correct)
    np.testing.assert_allclose(found.margins["kept+kept"], alone.margins, atol=1e-3)  # float32 in batches of another size
    assert alone.zero_shot is not None
    assert found.accuracy["zero-shot"].value == alone.zero_shot.value


def test_a_planted_model_answers_what_the_examples_say() -> None:
    planted = planted_induction(seed=0)
    found = factor_shares(planted.model, toy_episodes(8, classes=3), semantics="other label", format="label first", vary=("order",), **FAST)
    kept, broken = found.accuracy["kept+kept"], found.accuracy["other label+kept"]
    assert kept.value == 1
    assert broken.value == 0
    assert found.correct["kept+kept"].shape == (8,)
    assert found.chance == pytest.approx(1 / 3)


def test_shared_contents_are_no_effect_and_replicates_are_the_residual() -> None:
    model = untrained(positions="rope", seed=2)
    episodes = toy_episodes(10, classes=3)

    def sham(episode: Episode, *, seed: int = 0, donors: Any = ()) -> Episode:
        from mechicl.prompts.reform import reorder

        return reorder(episode, seed=seed + 17)

    found = factor_shares(model, episodes, factors={"sham": sham, "format": "label first"}, replicates=3, **FAST)
    assert np.nanmin(found.p_corrected["sham"]) > 0.05  # another order is what replicates differ in too
    assert found.pooled["v"]["sham"].value < 0.15
    assert found.pooled["v"]["residual"].value > 0.3
    assert found.replicates == 3


def test_one_replicate_has_no_residual_and_says_so() -> None:
    found = factor_shares(untrained(positions="rope"), toy_episodes(6, classes=3), replicates=1, **FAST)
    assert np.nanmax(found.shares["residual"]) < 1e-9
    assert any("no residual" in note for note in found.notes)


def test_three_factors_and_two_breaks() -> None:
    model = untrained(positions="rope")
    factors = {"label": "other label", "item": ["other class"], "format": "label first"}
    found = factor_shares(model, toy_episodes(5, classes=3), factors=factors, parts=("v",), layers=[1], **FAST)  # type: ignore[arg-type]
    assert found.factors == ("label", "item", "format")
    shared = factor_shares(model, toy_episodes(5, classes=3), factors=factors, parts=("v",), layers=[1], interactions="shared", **FAST)  # type: ignore[arg-type]
    assert np.nanmax(np.abs(shared.shares["interaction"])) < 1e-12
    assert np.nansum([shared.shares[f] - found.shares[f] for f in found.factors]) > 0
    assert len(found.conditions) == 9
    assert found.layers == (1,)
    assert found.parts == ("v",)
    np.testing.assert_allclose(sums(found), 1, atol=1e-10)


def test_sequences_of_vectors_are_run_too() -> None:
    drawn = draw(UnimodalTask(K=64, L=8, D=32, N=4, B=2, no_repeats=True), 6, torch.Generator().manual_seed(0), split="ic")
    found = factor_shares(
        planted_vectors(drawn.task).model, vector_episodes(drawn, candidates="context"), semantics="noise", format="label first", **FAST
    )
    assert found.accuracy["kept+kept"].value > 0.9
    assert found.accuracy["noise+kept"].value < found.accuracy["kept+kept"].low
    assert found.margin["kept+label first"].high < found.margin["kept+kept"].low  # it looks for a label behind the item
    assert found.spans == ("last token",)  # the query is one token


def test_layers_read_a_few_at_a_time_give_the_same_shares(monkeypatch: pytest.MonkeyPatch, organism: Organism) -> None:
    model = hooked("qwen2_5_vl", organism)
    episodes = concepts.draw(2, classes=2, shots=1, size=28, seed=3)
    whole = factor_shares(model, episodes, **FAST)
    monkeypatch.setattr("mechicl.analysis.shift.factor_runs.MOST_BYTES", 1)
    parts = factor_shares(model, episodes, **FAST)
    assert whole.layers == parts.layers == tuple(range(model.cfg.n_layers))
    for name in whole.sources:
        np.testing.assert_array_equal(whole.shares[name], parts.shares[name])


def test_same_seed_same_numbers_and_nothing_is_left_behind() -> None:
    model = untrained(positions="rope")
    episodes = toy_episodes(5, classes=3)
    a, b = (factor_shares(model, episodes, seed=3, **FAST) for _ in range(2))
    for name in a.sources:
        np.testing.assert_array_equal(a.shares[name], b.shares[name])
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    whole = factor_shares(model, episodes, seed=3, batch_size=1, **FAST)
    np.testing.assert_allclose(a.shares["semantics"], whole.shares["semantics"], atol=1e-3)  # float32 in batches of another size


def test_the_bundled_model_loses_its_answer_with_the_meaning_not_with_every_form() -> None:
    model = mechicl.load("demo")
    episodes = concepts.draw(12, classes=3, shots=1, size=28, seed=5)
    found = mechicl.factor_shares(model, episodes, semantics="other class", format="one turn", batch_size=32, **FAST)
    assert found.accuracy["kept+kept"].value > 0.9
    assert found.accuracy["other class+kept"].high < 0.8
    assert found.accuracy["kept+one turn"].value > 0.8
    assert found.pooled["v"]["semantics"].low > 0.02
    assert np.nanmin(found.p["semantics"]) == 0.01


@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_told_is_refused(organism: Organism) -> None:
    model = untrained()
    episodes = toy_episodes(3, classes=3)
    with pytest.raises(OptionError, match=r"Pass batch\.episodes"):
        factor_shares(model, model.render(episodes), **FAST)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="spans must be among"):
        factor_shares(model, episodes, spans=("query label",), **FAST)
    with pytest.raises(OptionError, match="n_permutations"):
        factor_shares(model, episodes, n_permutations=0, progress=False)
    with pytest.raises(OptionError, match="score"):
        factor_shares(model, episodes, score="best", **FAST)  # type: ignore[arg-type]
    with pytest.raises(EpisodeError, match="none of 3"):
        factor_shares(model, episodes, semantics="noise", **FAST)
    with pytest.raises(OptionError, match="writes it as before"):
        factor_shares(hooked("llava", organism), concepts.draw(1, classes=2, shots=1, size=28), format="swapped", **FAST)
    alone = [Episode((Shot(label="l0", text="i0"), Shot(label="l1", text="i1")), Shot(label="l0", text="i0"), ("l0", "l1"))]
    assert factor_shares(untrained(renderer=ToyRenderer()), alone, semantics="other class", **FAST).n == 1
    assert set(FORMS) >= {"label first", "one turn"}
