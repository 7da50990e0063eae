"""Many toys in one step: each gives the numbers that it gives alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from mechicl.errors import OptionError
from mechicl.training.toys.batched import Alone, Batched, learnable
from mechicl.training.toys.build import build
from mechicl.training.toys.feed import Feed
from mechicl.training.toys.recipe import ToyRecipe, recipe, set_fields
from mechicl.training.toys.train import load_toy, train_many, train_toy

TINY: dict[str, Any] = {"K": 32, "L": 4, "D": 8, "N": 4, "B": 2, "batch": 8, "steps": 30, "points": 4, "probe_n": 16, "n_novel": 16}
TWO: dict[str, Any] = {
    "K1": 32,
    "K2": 8,
    "L": 4,
    "D1": 8,
    "D2": 6,
    "N": 4,
    "B": 2,
    "n_novel": 16,
    "batch": 8,
    "steps": 20,
    "points": 3,
    "probe_n": 16,
}
ROUNDING = 2e-5
"""Thirty updates of float32 weights whose sums are taken in another order; Adam's first steps magnify the last bits of gradients near zero."""


def tiny(preset: str = "cpu", **changes: Any) -> ToyRecipe:
    return recipe(preset, **{**TINY, **changes})


def agree(alone: Any, together: Any, tolerance: float = ROUNDING) -> None:
    for (name, one), other in zip(alone.model.state_dict().items(), together.model.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
    assert alone.table["step"].tolist() == together.table["step"].tolist()
    torch.testing.assert_close(torch.tensor(alone.table["loss"]), torch.tensor(together.table["loss"]), rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer": "sgd", "lr": 0.1}, {"optimizer": "adamw", "weight_decay": 0.1}, {"positions": "one_hot", "n_places": 16}, {"positions": "alibi", "n_heads": 2}],
    ids=str,
)  # fmt: skip
def test_a_member_is_the_same_as_alone(changes: dict[str, Any]) -> None:
    base = tiny(**changes)
    different = [
        base, set_fields(base, {"seed": 1}), set_fields(base, {"lr": base.lr / 2}), set_fields(base, {"weight_decay": 0.3}),
        set_fields(base, {"B": 1, "K": 64}), set_fields(base, {"eps": 0.5, "alpha": 1.0}),
    ]  # fmt: skip
    runs = train_many(different, progress=False)
    for one, run in zip(different, runs, strict=True):
        agree(train_toy(one, progress=False), run)
    finals = [run.model.state_dict()["blocks.0.attn.W_V"] for run in runs]
    for i, one in enumerate(finals):  # the control: neighbours differ by far more than the tolerance
        assert all(float((one - other).abs().max()) > 10 * ROUNDING for other in finals[:i])


@pytest.mark.parametrize("changes", [{}, {"positions": "one_hot", "n_places": 9}, {"positions": "none", "n_heads": 2}], ids=str)
def test_one_step_is_torchs_own(changes: dict[str, Any]) -> None:
    """Against backward() and an unfused optimizer: gradients come with strides that a fused optimizer must not trip over."""
    made = tiny(optimizer="sgd", lr=0.5, **changes)
    plain, model = build(made), build(made)
    work = Feed([made], model.cfg)([0])
    Alone(model, made).step(work)
    one = work.each(lambda x: x[0])
    learner = torch.optim.SGD(plain.parameters(), lr=0.5, weight_decay=made.weight_decay, foreach=False)
    torch.nn.functional.cross_entropy(plain.classify(one.tokens, None, one.position_ids), one.target).backward()
    learner.step()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("preset", ["reddy2024", "modern"])
def test_other_architectures_too(preset: str) -> None:
    many = [tiny(preset, seed=s) for s in range(2)]
    for one, run in zip(many, train_many(many, progress=False), strict=True):
        agree(train_toy(one, progress=False), run)


def test_stages_with_frozen_parts_and_an_encoder_too(tmp_path: Path) -> None:
    train_toy(recipe("cpu", **{**TINY, "steps": 5}), tmp_path / "one", progress=False)
    base = recipe("cpu_multimodal", **TWO, start=str(tmp_path / "one"), freeze="decoder")
    three = replace(base, stage=3, encoder={"kind": "mlp"}, encoder_steps=5)
    for made in (base, three):
        many = [made, set_fields(made, {"seed": 1})]
        for one, run in zip(many, train_many(many, progress=False), strict=True):
            agree(train_toy(one, progress=False), run)


def test_a_member_whose_criterion_is_met_leaves_and_the_others_go_on() -> None:
    base = tiny()
    runs = train_many(
        [set_fields(base, {"stop": "loss<100"}), set_fields(base, {"seed": 1}), set_fields(base, {"stop": "loss<0.1"})], progress=False
    )
    assert runs[0].table["step"].tolist() == [0]
    assert torch.equal(runs[0].model.W_U, build(base).W_U)  # it was left alone
    agree(train_toy(set_fields(base, {"seed": 1}), progress=False), runs[1])
    assert runs[2].table["step"].iloc[-1] == base.steps


def test_a_diverging_member_does_not_take_the_others_with_it() -> None:
    base = tiny(optimizer="sgd", lr=0.1)
    runs = train_many([base, set_fields(base, {"lr": 1e30}), set_fields(base, {"seed": 1})], progress=False)
    assert runs[1].failed is not None
    assert "smaller lr" in runs[1].failed
    assert [run.failed for run in runs[::2]] == [None, None]
    agree(train_toy(base, progress=False), runs[0])


def test_what_cannot_be_trained_together_is_refused() -> None:
    with pytest.raises(OptionError, match="trained together"):
        train_many([tiny(), tiny(D=16)], progress=False)
    with pytest.raises(OptionError, match="one per recipe"):
        train_many([tiny(), tiny(seed=1)], out=["only"], progress=False)
    assert train_many([], progress=False) == []


def test_members_resume_each_from_where_it_stands(tmp_path: Path) -> None:
    many = [tiny(seed=s) for s in range(3)]
    whole = train_many(many, out=tmp_path / "whole", progress=False, threads=1)
    out = tmp_path / "parts"
    # one finished alone, one of which nothing is there yet, one that stands elsewhere: its checkpoint at step 9 of 30
    train_toy(many[0], out / "0000", progress=False, threads=1)
    stood = stand_at(many[1], out / "0001", 9)
    assert stood == 9
    runs = train_many(many, out=out, resume=True, progress=False, threads=1)
    for one, run in zip(whole, runs, strict=True):
        agree(one, run)
        assert run.folder is not None
        assert torch.equal(load_toy(run.folder).W_U, run.model.W_U)
        written = pd.read_parquet(run.folder / "metrics.parquet")
        pd.testing.assert_frame_equal(written, run.table, check_exact=True)


def stand_at(made: ToyRecipe, out: Path, step: int) -> int:
    """A run's folder as a kill leaves it, with a checkpoint at a step that is not measured."""
    from mechicl.training.toys import train as toy
    from mechicl.training.toys.folder import ToyFolder

    folder = ToyFolder.open(out, made, resume=False)
    model = build(made)
    member = toy._Member(made, model, toy.probes(made, model.cfg), frozenset(), folder)
    team = Alone(model, made)
    feed = Feed([made], model.cfg)
    toy._record(member, team, 0)
    while member.step < step:
        team.step(feed([member.step]))
        member.step += 1
        if member.step in toy.measuring_steps(made):
            toy._record(member, team, 0)
    toy._save(member, team, 0)
    return member.step


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_optimizer_memory_moves_between_the_two_ways_of_training(optimizer: str) -> None:
    made = tiny(optimizer=optimizer)
    feed = Feed([made, made], build(made).cfg)
    alone, team = Alone(build(made), made), Batched([build(made), build(made)], [made, made])
    for step in range(3):
        work = feed([step, step])
        alone.step(work.each(lambda x: x[:1]))
        team.step(work)
    ours, theirs = alone.moments(0), team.moments(1)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=ROUNDING)
    fresh = Alone(build(made), made)
    fresh.restore(0, theirs)
    for p, trained in zip(learnable(fresh.models[0]).values(), learnable(alone.models[0]).values(), strict=True):
        p.data.copy_(trained.detach())
    fresh.step(feed([3, 3]).each(lambda x: x[:1]))
    alone.step(feed([3, 3]).each(lambda x: x[:1]))
    torch.testing.assert_close(fresh.models[0].W_U, alone.models[0].W_U, rtol=0, atol=ROUNDING)


def test_gradients_agree_with_finite_differences_of_the_summed_loss() -> None:
    """The independent path: the loss of each model, from its own forward pass in float64, not from the batched step."""
    made = tiny(optimizer="sgd", lr=1.0, weight_decay=0.0)
    models = [build(set_fields(made, {"seed": s})).double() for s in range(2)]
    before = [model.W_U.detach().clone() for model in models]
    feed = Feed([made, made], models[0].cfg)
    work = feed([0, 1]).each(lambda x: x.double() if x.is_floating_point() else x)

    def loss(i: int) -> float:
        with torch.no_grad():
            logits = models[i]({"inputs_embeds": work.tokens[i]})[:, 0]
        return float(torch.nn.functional.cross_entropy(logits, work.target[i]))

    slopes = []
    for i, model in enumerate(models):
        with torch.no_grad():
            model.W_U[3, 1] += 1e-5
            up = loss(i)
            model.W_U[3, 1] -= 2e-5
            slopes.append((up - loss(i)) / 2e-5)
            model.W_U[3, 1] += 1e-5
    Batched(models, [made, made]).step(work)
    for model, was, slope in zip(models, before, slopes, strict=True):
        assert float(was[3, 1] - model.W_U.detach()[3, 1]) == pytest.approx(slope, abs=1e-7)  # lr 1: the update is the gradient
