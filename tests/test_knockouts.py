"""Knock-outs on planted circuits: what the circuit needs costs everything, what it does not use costs nothing, and random controls stay high."""

import numpy as np
import pytest
import torch

from mechicl.analysis.ablation.ablate import ablate
from mechicl.analysis.ablation.knockouts import FIRST, INDUCTION, PREVIOUS, SECOND, find, knock_out_table, over_models, sequences
from mechicl.data.gaussian import MultimodalTask, UnimodalTask, chance
from mechicl.errors import OptionError
from mechicl.models.planted import Planted, planted_vectors
from mechicl.models.toys.model import ToyTransformer
from mechicl.models.toys.presets import preset
from mechicl.results import KnockOutTable

ONE = UnimodalTask(K=64, L=16, N=4, D=64, B=2, n_novel=16)
TWO = MultimodalTask(K1=64, K2=16, L=16, N=4, D1=64, D2=64, B=2, n_novel=16)


@pytest.fixture(scope="module")
def one() -> tuple[Planted, KnockOutTable]:
    planted = planted_vectors(ONE, n_heads=4)
    return planted, knock_out_table(planted.model, ONE, n=96, n_random=3)


@pytest.fixture(scope="module")
def two() -> tuple[Planted, KnockOutTable]:
    planted = planted_vectors(TWO, n_heads=4)
    heads = {PREVIOUS: list(planted.previous_token), INDUCTION: list(planted.matching)}
    return planted, knock_out_table(planted.model, TWO, heads=heads, n=96, n_random=4)


def test_the_circuit_is_found_and_needed(one: tuple[Planted, KnockOutTable]) -> None:
    planted, table = one
    assert tuple(table[PREVIOUS].heads) == tuple(planted.previous_token)
    assert tuple(table[INDUCTION].heads) == tuple(planted.matching)
    assert table["intact"].accuracy.value > 0.95
    assert table["intact"].change.value == 0
    for name in (PREVIOUS, INDUCTION):
        assert table[name].accuracy.high < 0.75  # copying at random is right in about half
        assert table[name].change.high < -0.2


def test_random_heads_cost_nothing(one: tuple[Planted, KnockOutTable]) -> None:
    _, table = one
    controls = [row for row in table.rows if row.kind == "random heads"]
    assert len(controls) == 2
    assert all(row.accuracy.value > 0.95 for row in controls)


def test_without_induction_no_label_of_the_context_is_named_more_than_by_chance(one: tuple[Planted, KnockOutTable]) -> None:
    _, table = one
    assert table["intact"].cla.value > 0.95
    assert table[INDUCTION].cla.value < 0.5  # nothing is copied: logits are all zero, the coin decides
    assert table.chance == 1 / 16
    assert table.copy == pytest.approx(chance(ONE, "ic")["context"])


def test_the_modality_that_the_circuit_reads_is_needed_and_the_other_is_not(two: tuple[Planted, KnockOutTable]) -> None:
    _, table = two
    assert table["intact"].accuracy.value > 0.95
    assert table[SECOND].accuracy.value == table["intact"].accuracy.value
    assert table[FIRST].accuracy.high < 0.75
    (control,) = [row for row in table.rows if row.kind == "random tokens"]
    assert table[FIRST].accuracy.value < control.accuracy.value < table[SECOND].accuracy.value


def test_an_emptied_modality_equals_sequences_made_without_it(two: tuple[Planted, KnockOutTable]) -> None:
    """The independent path: other vectors into the path of training."""
    planted, table = two
    batch = sequences(planted.model, TWO, 96, "ic", 0)
    inputs = {**batch.inputs, "inputs_embeds": batch.inputs["inputs_embeds"].clone()}
    at = torch.tensor([[s.start for s in row if s.role == "text"] for row in batch.spans])
    inputs["inputs_embeds"].scatter_(1, at[..., None].expand(-1, -1, TWO.D1), 0.0)
    logits = planted.model.classify(inputs["inputs_embeds"], inputs["second_values"])
    right = logits.argmax(-1) == torch.tensor(batch.answers)
    assert table[FIRST].accuracy.value == pytest.approx(
        float(right.float().mean()), abs=0.05
    )  # ties fall to a coin there, to the first label here


@pytest.mark.parametrize("how", ["zero", "mean"])
def test_heads_off_agree_with_ablate(how: str) -> None:
    planted = planted_vectors(ONE, n_heads=2)
    heads = list(planted.previous_token)
    batch = sequences(planted.model, ONE, 48, "ic", 0)
    table = knock_out_table(planted.model, ONE, heads={"off": heads}, n=48, how=how, n_random=1)  # type: ignore[arg-type]
    other = ablate(planted.model, batch, heads, how, n_random=0, singles=False, batch_size=512, progress=False)  # type: ignore[arg-type]
    assert table["intact"].accuracy.value == other.intact.accuracy.value
    assert table["off"].accuracy.value == pytest.approx(other.chosen.accuracy.value, abs=0.05)  # a coin decides ties, another one here
    assert table["off"].change.n == other.chosen.change.n


def test_an_untrained_model_has_nothing_to_lose() -> None:
    cfg = preset("huang2026", n_heads=4, d_vocab=16, d_input=64)
    table = knock_out_table(ToyTransformer(cfg), ONE, n=64, n_random=2)
    assert table["intact"].accuracy.low < 0.3
    assert all(row.change.low <= 0 <= row.change.high or abs(row.change.value) < 0.15 for row in table.rows)


def test_a_model_of_one_head_a_layer_says_that_it_has_no_control() -> None:
    planted = planted_vectors(ONE, n_heads=1)
    table = knock_out_table(planted.model, ONE, n=32, n_random=2)
    assert not [row for row in table.rows if row.kind == "random heads"]
    assert "no random control" in table.note


def test_heads_are_found_on_other_sequences_than_those_tested() -> None:
    planted = planted_vectors(ONE, n_heads=2)
    assert find(planted.model, ONE, n=48)[INDUCTION] == list(planted.matching)
    seen, tested = (sequences(planted.model, ONE, 8, "ic", seed).inputs["inputs_embeds"] for seed in (1, 0))
    assert not torch.equal(seen, tested)


def test_over_models_is_the_mean_with_an_interval_over_models(one: tuple[Planted, KnockOutTable]) -> None:
    _, first = one
    other = knock_out_table(planted_vectors(ONE, n_heads=4, seed=1).model, ONE, n=96, n_random=3, seed=5)
    both = over_models([first, other])
    assert both.n_models == 2
    assert both[INDUCTION].accuracy.value == pytest.approx(np.mean([first[INDUCTION].accuracy.value, other[INDUCTION].accuracy.value]))
    assert both[INDUCTION].accuracy.n == 2
    assert list(both.to_frame()["name"]) == [row.name for row in first.rows]


def test_refusals(one: tuple[Planted, KnockOutTable], two: tuple[Planted, KnockOutTable]) -> None:
    with pytest.raises(OptionError, match="n must be at least 4"):
        knock_out_table(one[0].model, ONE, n=2)
    with pytest.raises(OptionError, match="at least one"):
        over_models([])
    with pytest.raises(OptionError, match="same knock-outs"):
        over_models([one[1], two[1]])
    with pytest.raises(KeyError, match="name must be one of"):
        one[1]["M3 emptied"]
