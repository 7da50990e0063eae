"""Gradients at hook points against finite differences and plain autograd; agreement; and that nothing stays behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import example_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechicl.analysis.agreement import agree, chance_overlap, choose, correlation, head_overlap, ranks
from mechicl.analysis.gradients.backward import frozen, slopes, values
from mechicl.errors import HookNameError, NotFiniteError, OptionError
from mechicl.models.planted import untrained
from mechicl.models.toys.model import ToyTransformer, toy_config
from mechicl.models.vlm import HookedVLM
from mechicl.results import Score
from mechicl.training.organisms import build

STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
HEADS = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z")


def difference(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 0, 5] - logits[:, 0, 7]


def names_of(model: HookedVLM) -> list[str]:
    """Two layers' hook points and the model's inputs."""
    wanted = ["hook_embed", "hook_image_features", *(f"blocks.{layer}.{name}" for layer in (0, 1) for name in (*STREAM, *HEADS))]
    return [name for name in wanted if name in model.hook_dict]


def test_gradients_are_the_slope_of_the_metric_in_every_family(family: str) -> None:
    model = HookedVLM(*build(family, preset="tiny", seed=0))
    batch = example_batch(model.processor)
    names = names_of(model)
    found = slopes(model, batch, names, difference)
    generator = torch.Generator().manual_seed(0)
    for name in names[:: 3 if len(names) > 12 else 1]:
        way = torch.randn(found.values[name].shape, generator=generator)
        size = 2e-3 * float(found.values[name].norm() / way.norm())
        ends = []
        for by in (size * way, -size * way):
            with torch.no_grad():
                logits = model.run_with_hooks(batch, fwd_hooks=[(name, lambda x, hook, by=by: x + by)])
            ends.append(float(difference(logits).double().sum()))
        expected = float((found.gradients[name] * way).sum())
        # central differences of float32 logits: the error of the difference is about 1e-6 / size, that of the step its square
        assert (ends[0] - ends[1]) / (2 * size) == pytest.approx(expected, rel=0.02, abs=0.02)


def test_gradients_equal_plain_autograd_through_a_toy() -> None:
    model = untrained(n_layers=2, n_heads=2, d_mlp=16, seed=3)
    tokens = torch.arange(12).reshape(2, 6) + 2
    found = slopes(model, tokens, ["hook_embed", "blocks.0.hook_mlp_out"], difference)
    embed = model.W_E[tokens].detach().requires_grad_()
    stream = embed + model.W_pos[torch.arange(6)]
    at = model._setting(torch.arange(6)[None], torch.ones(6, 6, dtype=torch.bool).tril()[None, None])
    for block in model.blocks:
        stream, _ = block(stream, at)
    metric = difference(model.logits_of(stream[:, -1:]))
    (expected,) = torch.autograd.grad(metric.sum(), embed)
    assert torch.allclose(found.gradients["hook_embed"], expected, atol=1e-6)
    assert torch.allclose(found.metric, metric.detach(), atol=1e-6)


@pytest.mark.parametrize("asking", [True, False])
def test_weights_keep_their_flags_and_get_no_gradient(asking: bool) -> None:
    model = HookedVLM(*build("qwen2_5_vl", preset="tiny", seed=0))
    for k, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(asking and k % 2 == 0)
    flags = [p.requires_grad for p in model.parameters()]
    slopes(model, example_batch(model.processor), ["hook_embed", "blocks.1.attn.hook_z"], difference)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_nothing_stays_behind_when_the_metric_fails() -> None:
    model = untrained(seed=0)
    flags = [p.requires_grad for p in model.parameters()]
    tokens = torch.arange(12).reshape(2, 6) + 2
    plain = model(tokens)

    def fails(logits: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        slopes(model, tokens, ["hook_embed"], fails)
    with pytest.raises(NotFiniteError, match="finite"):
        slopes(model, tokens, ["hook_embed"], lambda logits: logits[:, 0, 0] * float("nan"))
    with pytest.raises(HookNameError):
        slopes(model, tokens, ["hook_embedd"], difference)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())
    assert torch.equal(model(tokens), plain)


def test_the_graph_begins_at_the_first_hook_point_asked_for() -> None:
    model = untrained(n_layers=3, seed=0)
    seen: list[bool] = []

    def look(x: torch.Tensor, *, hook: object) -> None:
        seen.append(x.requires_grad)

    with frozen(model), model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", look), ("blocks.2.hook_resid_post", look)]):
        slopes(model, torch.arange(6)[None] + 2, ["blocks.2.hook_resid_pre"], difference)
    assert seen == [False, True]


def test_edits_move_the_point_where_slopes_are_taken() -> None:
    model = untrained(seed=0)
    tokens = torch.arange(12).reshape(2, 6) + 2
    name = "blocks.1.hook_resid_pre"
    moved = slopes(model, tokens, [name], difference, edits={name: lambda x: x + 1}, also=["blocks.0.hook_resid_post"])
    assert torch.equal(moved.values[name], values(model, tokens, [name], difference)[0][name] + 1)
    assert torch.allclose(moved.metric, difference(model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x + 1)])))
    assert "blocks.0.hook_resid_post" in moved.values
    assert "blocks.0.hook_resid_post" not in moved.gradients


def test_half_precision_models_give_gradients_in_their_dtype() -> None:
    cfg = toy_config(n_layers=1, n_heads=2, d_model=16, d_head=8, d_vocab=12, n_ctx=8)
    model = ToyTransformer(cfg, seed=0).bfloat16()
    found = slopes(model, torch.arange(6)[None] + 2, ["hook_embed"], difference)
    assert found.gradients["hook_embed"].dtype == torch.bfloat16
    assert found.metric.dtype == torch.float32


@settings(deadline=None)
@given(st.integers(1, 40), st.data())
def test_chance_overlap_is_the_hypergeometric_tail(n: int, data: st.DataObject) -> None:
    from scipy.stats import hypergeom

    first, second = data.draw(st.integers(0, n)), data.draw(st.integers(0, n))
    shared = data.draw(st.integers(0, min(first, second)))
    expected, p = chance_overlap(n, first, second, shared)
    assert expected == pytest.approx(first * second / n)
    assert p == pytest.approx(hypergeom.sf(shared - 1, n, first, second), abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=3, max_size=20))
def test_ranks_and_correlation_are_scipys(numbers: list[int]) -> None:
    from scipy.stats import rankdata

    array = np.array(numbers, float)
    assert np.allclose(ranks(array), rankdata(array))
    other = np.arange(len(array)) ** 2
    expected = np.corrcoef(array, other)[0, 1] if array.std() > 0 else np.nan
    assert correlation(array, other) == pytest.approx(expected, nan_ok=True)


def test_agreement_of_equal_and_of_unrelated_numbers() -> None:
    draw = np.random.default_rng(0)
    exact = draw.standard_normal(60)
    same = agree([str(k) for k in range(60)], exact, 2 * exact, np.ones(60), n_possible=100)
    assert (same.pearson, same.spearman, same.overlap, same.slope) == pytest.approx((1, 1, 1, 0.5))
    assert same.p < 1e-8
    assert same.chance == pytest.approx(10 / 60)
    other = agree([str(k) for k in range(60)], exact, draw.standard_normal(60), np.ones(60), n_possible=100)
    assert abs(other.pearson) < 0.4
    assert other.p > 0.01
    assert "60 of 100 cells" in str(other)
    assert len(other.to_frame()) == 60


def test_agreement_refuses_what_does_not_fit() -> None:
    with pytest.raises(OptionError, match="one number per cell"):
        agree(["a"], [1.0, 2.0], [1.0], [True], n_possible=1)
    with pytest.raises(OptionError, match="k must be"):
        agree(["a", "b"], [1.0, 2.0], [1.0, 2.0], [True, True], n_possible=2, k=3)
    with pytest.raises(OptionError, match="sets must fit"):
        chance_overlap(3, 4, 1, 0)


def test_cells_to_run_exactly_are_the_highest_and_some_at_random() -> None:
    estimate = np.array([[0.1, -5.0, np.nan], [3.0, 0.0, 0.2]])
    cells, drawn = choose(estimate, 2, 2, seed=0)
    assert set(cells) >= {1, 3}
    assert 2 not in cells
    assert sum(drawn) == 2
    assert len(cells) == len(set(cells))


def score(values: np.ndarray, name: str) -> Score:
    return Score(name, "", "", *(values,) * 7, per_episode=values[None])


def test_heads_shared_by_two_scores_against_chance() -> None:
    first, second = np.arange(40.0).reshape(4, 10), np.arange(40.0).reshape(4, 10)
    second[3, 9] = np.nan
    found = head_overlap(score(first, "function_vector"), score(second, "induction"), k=5)
    assert found.share == 1.0
    assert found.n_heads == 39
    assert found.expected == pytest.approx(25 / 39)
    assert found.p == pytest.approx(chance_overlap(39, 5, 5, 5)[1])
    assert found.heads_first[0] == (3, 8)
    with pytest.raises(OptionError, match="one model"):
        head_overlap(score(first, "a"), score(second[:2], "b"))
    with pytest.raises(OptionError, match="k must be"):
        head_overlap(score(first, "a"), score(second, "b"), k=40)
