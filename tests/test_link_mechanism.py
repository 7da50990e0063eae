"""A link circuit that was planted is found and proved, none is found where there is none; weights taken from another model are back afterwards; what a fine-tuning built is told from
what it found there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechicl.analysis.link.head_weights import PARTS, check_pair, grafted, shared_heads
from mechicl.analysis.link.mechanism import ENOUGH, halves, link_circuit
from mechicl.analysis.link.mechanism_carry import draws_beside
from mechicl.analysis.link.mechanism_compare import build_or_sharpen, judge
from mechicl.analysis.link.mechanism_prior import link_priors, renamed
from mechicl.data.link_context import SHORT, generated_pool, link_episodes
from mechicl.errors import CheckpointError, EpisodeError, HeadIndexError, OptionError
from mechicl.models.planted import Planted, planted_induction, untrained
from mechicl.models.toys.prompts import toy_episodes
from mechicl.models.vlm import HookedVLM
from mechicl.training.organisms import build
from tests.link_cases import RuleModel, follow

QUIET: dict[str, Any] = {"progress": False, "batch_size": 32}


def planted() -> Planted:
    return planted_induction(n_heads=6, seed=3)


def blind(made: Planted, kind: str) -> Any:
    """The planted model with heads of one kind that no longer look anywhere in particular."""
    model = copy.deepcopy(made.model)
    with torch.no_grad():
        for layer, head in getattr(made, kind):
            model.blocks[layer].attn.W_Q[head] = 0.0  # type: ignore[union-attr, operator]
    return model


def logits_of(model: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(batch)


# ---- one model -------------------------------------------------------------------------------------------------------------------------------------


def test_the_planted_link_is_found_by_what_each_head_brings_and_proved_on_the_other_half() -> None:
    made = planted()
    found = link_circuit(made.model, toy_episodes(48, classes=2, shots=2), **QUIET)
    assert found["joining"].heads == found["matching"].heads == made.matching
    assert found["bringing items"].heads == made.previous_token  # it tells each label which item stood before it, whatever the label is
    assert found["bringing labels"].heads == ()
    assert found.carried["items"].value[made.matching[0]] == pytest.approx(1, abs=1e-3)
    assert found.carried["labels"].value[made.previous_token[0]] == pytest.approx(0, abs=1e-3)
    assert found["joining"].finding == "necessary"
    assert found["joining"].ablation is not None
    assert found["joining"].ablation.chosen.accuracy.value < 0.8 < found.accuracy.accuracy.value
    moved = found.moved["joining", "items"]
    assert moved.share.value == pytest.approx(1, abs=1e-3)
    assert moved.random.max() < 0.01
    assert moved.p_random == pytest.approx(1 / (1 + len(moved.random)))
    frame, sets = found.to_frame(), found.sets_frame()
    assert len(frame) == 12
    assert set(sets["set"]) == {"matching", "joining", "bringing items", "bringing labels"}
    assert (found.n_find, found.n_prove) == (24, 24)


def test_a_network_that_learnt_nothing_has_no_link_to_carry() -> None:
    found = link_circuit(untrained(n_heads=6), toy_episodes(32, classes=2, shots=2), **QUIET)
    assert [one.heads for one in found.sets if one.kind != "matching"] == [(), (), ()]
    assert found.moved == {}
    if np.isnan(found.carried["items"].value).all():
        assert any("no link to be carried" in note for note in found.notes)


def test_a_patched_set_of_one_head_is_that_heads_patch_and_the_spans_are_traced() -> None:
    made = planted()
    found = link_circuit(made.model, toy_episodes(16, classes=2, shots=1), spans=True, **QUIET)
    (head,) = made.matching
    own = found.carried["items"].per_episode[(slice(None), *head)].mean()
    assert own == pytest.approx(found.carried["items"].value[head])
    assert found.spans is not None
    assert "resid_pre" in found.spans.sites


def test_random_sets_never_hold_a_chosen_head_and_go_elsewhere_where_a_layer_is_used_up() -> None:
    model = untrained(n_layers=4, n_heads=4)
    heads = [(3, h) for h in range(4)] + [(1, 0), (1, 1), (2, 3)]
    found = draws_beside(model, heads, ENOUGH, 0)
    assert len(found.sets) == ENOUGH
    assert all(len(set(one)) == len(heads) and not set(one) & set(heads) for one in found.sets)
    assert "any layer" in found.note


# ---- weights ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "llava", "idefics3", "toy"])
def test_all_parts_of_a_model_make_the_donor_and_everything_is_back_afterwards(name: str) -> None:
    """The identity of the transplant; some of these families share keys and values, norm them, or tie their embeddings."""
    if name == "toy":
        first, second = (untrained(n_heads=4, norm=True, d_mlp=16, seed=seed) for seed in (0, 1))
        batch = first.render(toy_episodes(4))
    else:
        first = HookedVLM(*build(name), check=False)
        second = copy.deepcopy(first)
        with torch.no_grad():
            for k, parameter in enumerate(second.hf.parameters()):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k)))
        pool = generated_pool(0, 3, 3, 28, split="train", names="made-up")
        batch = first.render(link_episodes(pool, 2, shots=1, prompt=SHORT))
    before, other = logits_of(first, batch), logits_of(second, batch)
    assert not torch.allclose(before, other)
    with grafted(first, second, parts=PARTS):
        assert torch.equal(logits_of(first, batch), other)
    assert torch.equal(logits_of(first, batch), before)
    every = [(layer, head) for layer in range(first.cfg.n_layers) for head in range(first.cfg.n_heads)]
    with grafted(first, second, every, parts=[part for part in PARTS if part != "attention"]):
        mixed = logits_of(first, batch)
    shared = name in ("gemma3", "qwen2_5_vl") and "hf" in vars(type(first)) | vars(first)  # norms of q and k are nobody's own
    assert shared_heads(first, every) == ()
    if name in ("toy", "llava", "idefics3") or (name == "qwen2_5_vl" and not shared):
        assert torch.equal(mixed, other)
    assert torch.equal(logits_of(first, batch), before)


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_a_graft_of_heads_changes_those_rows_and_columns_and_no_other(data: Any) -> None:
    first, second = (untrained(n_heads=4, seed=seed) for seed in (0, 1))
    heads = data.draw(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3)), unique=True, min_size=1))
    letters = data.draw(st.sampled_from(["qkvo", "qk", "vo", "q"]))
    before = {name: p.clone() for name, p in first.named_parameters()}
    with grafted(first, second, heads, letters=letters):
        for name, now in first.named_parameters():
            layer, last = name.split(".")[1] if ".attn." in name else "-1", name.split(".")[-1]
            mine = torch.zeros(len(now), dtype=torch.bool)
            for at, head in heads:
                if ".attn." in name and int(layer) == at and last[-1].lower() in letters:
                    mine[head] = True
            source = dict(second.named_parameters())[name]
            assert torch.equal(now[mine], source[mine]), name
            assert torch.equal(now[~mine], before[name][~mine]), name
    assert all(torch.equal(p, before[name]) for name, p in first.named_parameters())


def test_a_graft_is_undone_when_something_raises_and_shared_keys_stay() -> None:
    first, second = (HookedVLM(*build("qwen2_5_vl"), check=False) for _ in range(2))
    with torch.no_grad():
        for parameter in second.hf.parameters():
            parameter.add_(1.0)
    before = {name: p.clone() for name, p in first.hf.named_parameters()}

    def stop() -> None:
        with grafted(first, second, [(0, 0)]):
            moved = {name for name, p in first.hf.named_parameters() if not torch.equal(p, before[name])}
            assert any("q_proj" in name for name in moved)
            assert any("k_proj" in name for name in moved) == (group == 1)
            raise RuntimeError("stop")

    group = first.cfg.n_heads // first.cfg.n_key_value_heads
    with pytest.raises(RuntimeError, match="stop"):
        stop()
    assert shared_heads(first, [(0, 0)]) == (() if group == 1 else ((0, 0),))
    assert all(torch.equal(p, before[name]) for name, p in first.hf.named_parameters())


def test_the_head_that_is_grafted_is_the_head_that_is_hooked() -> None:
    """An independent path: the output of a grafted head is the donor's head run on the same stream, the other heads' are untouched."""
    first, second = HookedVLM(*build("llava"), check=False), HookedVLM(*build("llava"), check=False)
    with torch.no_grad():
        for k, parameter in enumerate(second.hf.get_decoder().layers[0].self_attn.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k)))
    pool = generated_pool(0, 3, 3, 28, split="train", names="made-up")
    batch = first.render(link_episodes(pool, 2, shots=1, prompt=SHORT))
    name, group = "blocks.0.attn.hook_z", first.cfg.n_heads // first.cfg.n_key_value_heads
    own, donor = (model.run_with_cache(batch, names_filter=[name])[1][name] for model in (first, second))
    with grafted(first, second, [(0, head) for head in range(group)]):
        mixed = first.run_with_cache(batch, names_filter=[name])[1][name]
    assert torch.allclose(mixed[:, :, :group], donor[:, :, :group], atol=1e-5)  # float32, the same sums
    assert torch.allclose(mixed[:, :, group:], own[:, :, group:], atol=1e-5)
    assert not torch.allclose(own[:, :, :group], donor[:, :, :group], atol=1e-3)


def test_models_of_another_shape_and_wrong_names_are_refused() -> None:
    small, large = untrained(n_heads=2), untrained(n_heads=4)
    with pytest.raises(OptionError, match="of one shape"):
        check_pair(small, large)
    with pytest.raises(OptionError, match="letters"), grafted(small, small, [(0, 0)], letters="qx"):
        pass
    with pytest.raises(OptionError, match="parts"), grafted(small, small, parts=["eyes"]):
        pass
    with pytest.raises(HeadIndexError), grafted(small, small, [(7, 0)]):
        pass


# ---- before and after ------------------------------------------------------------------------------------------------------------------------------


def test_a_head_that_was_made_is_told_from_one_that_was_there(tmp_path: Path) -> None:
    made = planted()
    base = blind(made, "matching")
    episodes = toy_episodes(32, classes=2, shots=2)
    found = build_or_sharpen(base, {"tuned": made.model, "idle": copy.deepcopy(base)}, episodes, out=tmp_path / "kept", **QUIET)
    row = found["tuned"]
    assert {one.head for one in row.link} == set(made.circuit)
    assert {one.head: one.was for one in row.link} == dict.fromkeys(made.previous_token, "had it") | dict.fromkeys(made.matching, "new")
    assert row.finding == "both"
    assert row.graft("base", "link heads").accuracy.value == 1.0  # the missing piece suffices
    assert row.graft("base", "link heads").p_random <= 0.05
    assert row.graft("adapted", "link heads").accuracy.value < 0.8
    assert row.graft("adapted", "all other heads").change.value == 0
    assert row.graft("adapted", "gathering heads").change.value == 0  # it was there
    assert row.graft("adapted", "mlps").change.value == 0
    assert found["idle"].finding == "no link"
    with pytest.raises(OptionError, match="graft must be"):
        row.graft("base", "nonsense")
    with pytest.raises(OptionError, match="name must be"):
        found["nobody"]

    lines = (tmp_path / "kept" / "evidence.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "kept" / "evidence.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:20])  # killed while it wrote
    again = build_or_sharpen(base, {"tuned": made.model, "idle": copy.deepcopy(base)}, episodes, out=tmp_path / "kept", **QUIET)
    assert again.to_frame().equals(found.to_frame())
    assert again.grafts_frame().equals(found.grafts_frame())
    assert again.heads_frame().equals(found.heads_frame())
    with pytest.raises(CheckpointError, match="'tuned' in this folder had other weights"):
        build_or_sharpen(base, {"tuned": base}, episodes, out=tmp_path / "kept", **QUIET)
    with pytest.raises(CheckpointError, match="threshold was"):
        build_or_sharpen(base, {"tuned": made.model}, episodes, threshold=0.3, out=tmp_path / "kept", **QUIET)


def test_what_was_all_there_is_called_sharpened_and_what_was_all_made_built() -> None:
    made = planted()
    episodes = toy_episodes(32, classes=2, shots=2)
    cold = copy.deepcopy(made.model)
    with torch.no_grad():
        cold.W_U.mul_(-1.0)  # every head looks where it should, and the answer is turned round: nothing in the heads is missing
    found = build_or_sharpen(cold, {"tuned": made.model}, episodes, parts=False, **QUIET)["tuned"]
    assert (found.finding, {one.was for one in found.link}) == ("sharpened", {"had it"})
    assert found.graft("adapted", "link heads").change.value == 0
    assert "not shown to be needed" in found.verdict
    both = copy.deepcopy(made.model)
    with torch.no_grad():
        for layer, head in made.circuit:
            both.blocks[layer].attn.W_Q[head] = 0.0  # type: ignore[union-attr, operator]
    found = build_or_sharpen(both, {"tuned": made.model}, episodes, parts=False, **QUIET)["tuned"]
    assert (found.finding, {one.was for one in found.link}) == ("built", {"new"})
    assert judge(found, 0.5)[0] == "built"


@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_compared_is_refused_before_anything_runs(tmp_path: Path) -> None:
    model, episodes = untrained(), toy_episodes(32, classes=2, shots=2)
    with pytest.raises(EpisodeError, match="at least 8"):
        link_circuit(model, episodes[:4])
    with pytest.raises(OptionError, match="n_random must be at least 19"):
        link_circuit(model, episodes, n_random=3)
    with pytest.raises(OptionError, match="threshold"):
        link_circuit(model, episodes, threshold=0.0)
    with pytest.raises(OptionError, match="adapted must be models by name"):
        build_or_sharpen(model, {}, episodes)
    with pytest.raises(OptionError, match="no folder"):
        build_or_sharpen(model, {"a": tmp_path / "nowhere"}, episodes)
    with pytest.raises(OptionError, match="names without slashes"):
        link_priors({"a/b": model}, episodes)
    assert [len(half) for half in halves(episodes)] == [16, 16]


# ---- the prior -------------------------------------------------------------------------------------------------------------------------------------


def test_link_against_prior_is_paired_over_models(organism: Callable[..., tuple[Any, Any]], tmp_path: Path) -> None:
    real = HookedVLM(*organism("qwen2_5_vl"), check=False)
    pool = generated_pool(0, 3, 6, 28, split="train", names="made-up")
    names = {one.key: one.name for one in pool.classes}
    episodes = link_episodes(pool, 16, shots=2, pseudo_labels=False, prompt=SHORT)
    knows = RuleModel(real, lambda episode: names[episode.query.item])
    learns = RuleModel(real, lambda episode: follow(episode) or names[episode.query.item])
    found = link_priors({"knows": knows, "learns": learns}, episodes, shots=(0, 2), out=tmp_path / "prior", progress=False)
    rows = {(row.model, row.shots): row for row in found.rows}
    assert rows["knows", 2].prior.value == rows["learns", 0].prior.value == 1
    assert rows["learns", 2].link.value == 1
    assert rows["knows", 2].change is None
    change = rows["learns", 2].change
    assert change is not None
    assert change.low > 0
    gap = renamed(found.results["learns"])[-1].preferences - renamed(found.results["knows"])[-1].preferences
    assert change.value == pytest.approx(gap.mean())
    assert set(found.stubborn["knows"].values()) == {1.0}
    assert found.stubborn["learns"] == {}
    assert set(found.to_frame()["model"]) == set(found.models)
