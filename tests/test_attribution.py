"""`attribute` against exact patching, against plain autograd, and against what must hold by construction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture

import mechicl
from mechicl.analysis.gradients.attribution import attribute
from mechicl.analysis.gradients.attribution_runs import Products
from mechicl.analysis.patching.patch import patch
from mechicl.data.concepts import draw
from mechicl.errors import OptionError, UnsupportedModelError
from mechicl.models import programs
from mechicl.models.planted import untrained
from mechicl.models.toys.prompts import ToyRenderer, toy_episodes
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.corrupt import Pairs, minimal_pairs
from mechicl.prompts.episode import Episode, Shot
from mechicl.training.organisms import build

QUIET: dict[str, Any] = {"progress": False, "n_permutations": 100}
STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
HEADS = ("z", "q", "k", "v")


def toy_pairs(n: int = 6, seed: int = 0) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    return minimal_pairs(ToyRenderer(), toy_episodes(n, classes=3, generator=generator), "swap_labels")


@pytest.fixture(scope="module")
def toy() -> Any:
    return untrained(n_layers=2, n_heads=2, d_mlp=32, seed=1)


def vlm_pairs(model: HookedVLM, n: int = 2) -> Pairs:
    """Two classes of one picture each; the corrupt prompt exchanges their labels."""
    episodes = [
        Episode(
            shots=tuple(Shot(label, (picture(56, 56, seed=10 * k + j),), item=label) for j, label in enumerate(("zuda", "kimo"))),
            query=Shot("zuda", (picture(56, 56, seed=10 * k + 5),), item="zuda"), candidates=("zuda", "kimo"), question="This is a",
        )
        for k in range(n)
    ]  # fmt: skip
    return minimal_pairs(model, episodes, "swap_exemplars")


def test_a_cell_is_the_difference_times_the_gradient(toy: Any) -> None:
    """The whole of it again, by hand, for the stream before layer 1."""
    pairs = toy_pairs()
    found = attribute(toy, pairs, sites="resid_pre", exact=0, **QUIET)
    name, kept = "blocks.1.hook_resid_pre", {}

    for side, batch in (("clean", pairs.clean), ("corrupt", pairs.corrupt)):

        def store(x: torch.Tensor, hook: Any, side: str = side) -> torch.Tensor:
            kept[side] = x.detach().requires_grad_()
            return kept[side]

        logits = toy.run_with_hooks(batch, fwd_hooks=[(name, store)])[:, 0]
        rows = torch.arange(pairs.n)
        right, wrong = (torch.tensor([b.candidate_ids[i][b.answers[i]][0] for i in range(b.n)]) for b in (pairs.clean, pairs.corrupt))
        metric = logits[rows, right] - logits[rows, wrong]
    (gradient,) = torch.autograd.grad(metric.sum(), kept["corrupt"])
    by_pos = ((kept["clean"] - kept["corrupt"]) * gradient).sum(-1).detach()
    for span in found["resid_pre"].coords["span"]:
        from mechicl.prompts.align import span_groups

        expected = (by_pos * span_groups(pairs.clean)[span]).sum(1)
        where = found["resid_pre"].index(layer=1, span=span)
        assert np.allclose(found["resid_pre"].raw[(slice(None), *where)] - found.corrupt, expected, atol=1e-5)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_where_the_model_is_straight_the_estimate_is_exact(direction: Any) -> None:
    """Without final norm the logits are linear in the last layer's stream and in what its heads and MLP add."""
    model = untrained(n_layers=2, n_heads=2, d_mlp=32, seed=1, norm=None)
    sites = {"resid_post": 1, "z": 1, "attn_out": None, "mlp_out": 1}
    for site, layer in sites.items():
        if layer is None:
            continue
        arguments: dict[str, Any] = {"sites": site, "by": "head", "layers": [layer], "direction": direction, **QUIET}
        if site == "z":  # the MLP of the last layer still bends what heads do
            continue
        estimate, exact = attribute(model, toy_pairs(), exact=0, **arguments), patch(model, toy_pairs(), **arguments)
        assert np.allclose(estimate[site].raw, exact[site].raw, atol=1e-4)
        assert np.allclose(estimate[site].value, exact[site].value, atol=1e-4)
        assert np.allclose(estimate[site].p, exact[site].p)
    straight = untrained(n_layers=2, n_heads=2, seed=1, norm=None)
    arguments = {"sites": ("z", "v", "attn_out"), "by": "head", "layers": [1], "direction": direction, **QUIET}
    estimate, exact = attribute(straight, toy_pairs(), exact=0, **arguments), patch(straight, toy_pairs(), **arguments)
    for site in arguments["sites"]:
        assert np.allclose(estimate[site].raw, exact[site].raw, atol=1e-4)


@pytest.mark.parametrize("by", ["span", "shot", "pos", "head"])
def test_axes_and_scale_are_those_of_patching(toy: Any, by: Any) -> None:
    pairs = toy_pairs()
    sites = (*STREAM, *HEADS, "pattern", "embed")
    estimate, exact = attribute(toy, pairs, sites=sites, by=by, exact=0, **QUIET), patch(toy, pairs, sites=sites, by=by, **QUIET)
    assert np.allclose(estimate.clean, exact.clean, atol=1e-5)
    assert np.allclose(estimate.corrupt, exact.corrupt, atol=1e-5)
    for site in sites:
        assert estimate[site].axes == exact[site].axes
        assert estimate[site].coords == exact[site].coords
        assert np.array_equal(np.isnan(estimate[site].value), np.isnan(exact[site].value))
    assert set(estimate.to_frame().columns) >= {"site", "layer", "value", "low", "high", "p"}


def test_small_differences_are_estimated_exactly(toy: Any) -> None:
    """Pictures that differ by little: the second order vanishes. Here the clean prompt is moved a hundredth of the way to the corrupt one, in the embeddings."""
    pairs = toy_pairs(4)
    name = "hook_embed"
    with torch.no_grad():
        _, clean = toy.run_with_cache(pairs.clean, names_filter=name)
        _, corrupt = toy.run_with_cache(pairs.corrupt, names_filter=name)
    near = corrupt[name] + 0.01 * (clean[name] - corrupt[name])
    from mechicl.analysis.gradients.backward import slopes
    from mechicl.analysis.gradients.differentiable import measure
    from mechicl.analysis.patching.metrics import contrast

    read = measure(contrast("logit_diff", pairs.clean, pairs.corrupt)[0], pairs.clean)
    slope = slopes(toy, pairs.corrupt, [name], read)
    estimate = ((near - corrupt[name]) * slope.gradients[name]).sum((1, 2))
    with torch.no_grad():
        exact = read(toy.run_with_hooks(pairs.corrupt, fwd_hooks=[(name, lambda x, hook: near)])) - slope.metric
    assert torch.allclose(estimate, exact, atol=0.05 * float(exact.abs().max()))


def test_clean_into_clean_is_nothing(toy: Any) -> None:
    pairs = toy_pairs()
    same = replace(pairs, corrupt=replace(pairs.clean, answers=pairs.corrupt.answers))
    from mechicl.errors import EpisodeError

    with pytest.raises(EpisodeError, match="must differ"):  # there is no gap to take a share of, as in patch
        attribute(toy, same, exact=0, **QUIET)
    half = Pairs(pairs.clean, pairs.corrupt, "half", ())
    rows = [0, 1, 2]
    mixed = _joined(half, rows)
    found = attribute(toy, mixed, sites=(*STREAM, *HEADS), by="head", exact=0, **QUIET)
    for site in (*STREAM, *HEADS):  # the episodes whose two prompts are one and the same do not move
        change = found[site].raw - found.corrupt[(slice(None), *(None,) * found[site].value.ndim)]
        assert np.abs(change[3:]).max() == 0.0
        assert np.abs(change[:3]).max() > 0.0


def _joined(pairs: Pairs, rows: list[int]) -> Pairs:
    """Pairs `rows`, then the same with the clean prompts on both sides."""
    renderer = pairs.clean.renderer
    assert renderer is not None
    clean = [pairs.clean.episodes[i] for i in rows]
    corrupt = [pairs.corrupt.episodes[i] for i in rows]
    return Pairs(renderer.render([*clean, *clean]), renderer.render([*corrupt, *clean]), "mixed", ())


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_integrated_gradients_add_up(toy: Any, direction: Any) -> None:
    """Along the straight way between the inputs, the stream that enters layer 0 accounts for the whole difference; more steps come closer."""
    errors = []
    for steps in (2, 8, 64):
        found = attribute(toy, toy_pairs(), sites="resid_pre", by="head", steps=steps, direction=direction, layers=[0], exact=0, **QUIET)
        other = found.clean if direction == "denoise" else found.corrupt
        errors.append(float(np.abs(found["resid_pre"].raw[:, 0] - other).max()))
    gap = float(np.abs(found.clean - found.corrupt).max())
    assert errors[2] < 1e-3 * gap < errors[0]
    assert errors[2] <= errors[1] + 1e-6
    # over spans too, and by the path of the site itself
    by_span = attribute(toy, toy_pairs(), sites="resid_pre", by="span", steps=64, direction=direction, layers=[0], exact=0, **QUIET)
    change = (by_span["resid_pre"].raw - by_span.start[:, None, None]).sum((1, 2))
    assert np.allclose(change, found["resid_pre"].raw[:, 0] - found.start, atol=1e-4)
    own = attribute(toy, toy_pairs(), sites="resid_pre", by="head", steps=64, path="site", direction=direction, exact=0, **QUIET)
    other = own.clean if direction == "denoise" else own.corrupt
    assert np.allclose(own["resid_pre"].raw, other[:, None], atol=2e-3 * gap)


def test_saturation_is_mended_by_steps_and_shown_by_the_agreement() -> None:
    program = programs.induction(sharpness=10.0)
    pairs = program.pairs(8, 0)
    common: dict[str, Any] = {"sites": ("resid_pre", "z", "q", "k", "v"), "by": "head", "exact": 30, **QUIET}
    plain, own = attribute(program.model, pairs, **common), attribute(program.model, pairs, steps=12, path="site", **common)
    assert plain.agreement is not None
    assert own.agreement is not None
    assert own.agreement.pearson > 0.98 > plain.agreement.pearson
    assert own.agreement.slope == pytest.approx(1.0, abs=0.05)
    (matching,) = (sender for sender in program.nodes if sender.kind == "head" and sender.layer == 1)
    assert own.top("z", 1) == [(1, matching.head)]


def test_agreement_is_with_exact_patching(toy: Any) -> None:
    pairs = toy_pairs()
    found = attribute(toy, pairs, sites=("z", "mlp_out"), exact=14, seed=3, **QUIET)
    exact = patch(toy, pairs, sites=("z", "mlp_out"), **QUIET)
    assert found.agreement is not None
    assert 7 <= found.agreement.n_cells <= 14
    assert found.agreement.random.sum() == 7
    for name, value in zip(found.agreement.names, found.agreement.exact, strict=True):
        site, place, span = name.split(" ", 2)
        layer, _, head = place.partition(".")
        labels = {"layer": int(layer), "span": span} | ({"head": int(head)} if head else {})
        assert value == pytest.approx(exact[site].at(**labels), abs=1e-5)
    assert attribute(toy, pairs, sites="z", exact=0, **QUIET).agreement is None


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3", "internvl"])
def test_production_models_with_pictures(family: str) -> None:
    """Families with grouped queries, RMSNorm, DeepStack and norms behind the heads: every site, and the agreement with exact runs."""
    model = HookedVLM(*build(family, preset="tiny", seed=0))
    pairs = vlm_pairs(model)
    sites = [
        s
        for s in (*STREAM, *HEADS, "embed", "image_features")
        if s not in ("resid_mid", "attn_out") or "blocks.0.hook_attn_out" in model.hook_dict
    ]
    found = attribute(model, pairs, sites=sites, exact=30, **QUIET)
    assert found["k"].axes == ("layer", "kv_head", "span")
    assert found["k"].value.shape[1] == model.cfg.n_key_value_heads
    assert found.agreement is not None
    assert found.agreement.pearson > 0.3  # random weights: far from straight, far from chance
    final = attribute(model, pairs, sites="resid_pre", by="head", steps=24, exact=0, layers=[0], **QUIET)
    # the whole input accounts for the whole difference, DeepStack's later additions included
    assert np.allclose(final["resid_pre"].value, 1.0, atol=0.03)


def test_whole_labels_and_other_metrics() -> None:
    model = mechicl.load("demo")
    pairs = minimal_pairs(model, draw(4, classes=2, shots=1, size=28, seed=1), "swap_labels")
    for metric in ("label_logprob", "logprob", "prob", "kl", lambda logits: logits[:, 3] - logits[:, 4]):
        found = attribute(model, pairs, sites="resid_pre", by="head", metric=metric, steps=16, layers=[0], exact=0, **QUIET)
        exact = patch(model, pairs, sites="resid_pre", by="head", metric=metric, layers=[0], **QUIET)
        assert np.allclose(found.clean, exact.clean, atol=1e-3)
        assert np.allclose(found.corrupt, exact.corrupt, atol=1e-3)
        # integrated gradients of the whole input: the whole difference, up to the steps' error
        assert np.allclose(found["resid_pre"].value, exact["resid_pre"].value, atol=0.2)


def test_layers_a_few_at_a_time_are_the_same(toy: Any) -> None:
    one = attribute(toy, toy_pairs(), sites=(*STREAM, *HEADS), layers_at_once=1, exact=0, **QUIET)
    every = attribute(toy, toy_pairs(), sites=(*STREAM, *HEADS), exact=0, **QUIET)
    for site in every.sites:
        assert np.allclose(one[site].raw, every[site].raw, atol=1e-6)


def test_half_precision_products_are_summed_in_single() -> None:
    model = HookedVLM(*build("qwen2_5_vl", preset="tiny", seed=0))
    pairs = vlm_pairs(model)
    full = attribute(model, pairs, sites=("resid_pre", "z"), by="head", exact=0, **QUIET)
    half = HookedVLM(build("qwen2_5_vl", preset="tiny", seed=0)[0].bfloat16(), model.processor)
    rough = attribute(half, pairs, sites=("resid_pre", "z"), by="head", exact=0, **QUIET)
    for site in ("resid_pre", "z"):
        change = [(e[site].raw - e.corrupt.reshape(-1, *(1,) * e[site].value.ndim)).ravel() for e in (full, rough)]
        assert np.corrcoef(*change)[0, 1] > 0.9  # eight bits of mantissa all the way through
    # 4,096 products of 1 and 2^-9: sums in bfloat16 would stop growing at 2
    sums: dict[Any, torch.Tensor] = {}
    Products._add(sums, "x", torch.ones(1, 4096) * torch.full((1, 4096), 2.0**-9, dtype=torch.bfloat16).float())
    assert float(sums["x"]) == 8.0


def test_weights_and_hooks_are_left_alone(toy: Any) -> None:
    flags = [p.requires_grad for p in toy.parameters()]
    attribute(toy, toy_pairs(2), exact=2, **QUIET)
    with pytest.raises(RuntimeError, match="on purpose"):
        attribute(toy, toy_pairs(2), metric=_fails, exact=0, **QUIET)
    assert [p.requires_grad for p in toy.parameters()] == flags
    assert all(p.grad is None for p in toy.parameters())
    assert not any(point.fwd_hooks or point.bwd_hooks for point in toy.hook_dict.values())


def _fails(logits: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("on purpose")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": -1}, "steps and exact"),
        ({"layers_at_once": 0}, "layers_at_once"),
        ({"path": "curved"}, "path must be"),
        ({"softmax": "hard"}, "softmax must be"),
        ({"sites": "vision"}, "vision"),
        ({"sites": "nothing"}, "sites must be"),
    ],
)
def test_refusals(toy: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        attribute(toy, toy_pairs(2), **(QUIET | wrong))


def test_a_model_without_pictures_has_no_image_features(toy: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="image_features"):
        attribute(toy, toy_pairs(2), sites="image_features", **QUIET)


@pytest.mark.parametrize("by", ["span", "pos", "head"])
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_queries_and_keys_through_the_softmax_are_exact_where_the_rest_is_straight(by: Any, direction: Any) -> None:
    """Last layer of an attention-only model without norms: behind the heads all is linear. With slopes the same cells are nothing at all."""
    program = programs.two_back()
    common: dict[str, Any] = {"sites": ("q", "k"), "by": by, "layers": [1], "direction": direction, **QUIET}
    pairs = program.pairs(6, 0)
    exact, through = patch(program.model, pairs, **common), attribute(program.model, pairs, softmax="exact", exact=0, **common)
    slope = attribute(program.model, pairs, exact=0, **common)
    for site in ("q", "k"):
        assert np.allclose(through[site].raw, exact[site].raw, atol=1e-3)
        start = slope.start.reshape(-1, *(1,) * exact[site].value.ndim)
        assert np.abs(slope[site].raw - start).max() < 1e-3
        if direction == "noise":
            assert np.abs(exact[site].raw - start).max() > 1


def test_through_the_softmax_with_grouped_queries_pictures_and_steps() -> None:
    model = HookedVLM(*build("qwen2_5_vl", preset="tiny", seed=0))
    pairs = vlm_pairs(model)
    common: dict[str, Any] = {"sites": ("q", "k", "v"), "by": "span", **QUIET}
    exact = patch(model, pairs, **common)
    found = {how: attribute(model, pairs, softmax=how, exact=0, **common) for how in ("slope", "exact")}
    assert np.allclose(found["slope"]["v"].raw, found["exact"]["v"].raw, atol=1e-5)
    errors = {how: sum(np.abs(one[site].raw - exact[site].raw).mean() for site in "qk") for how, one in found.items()}
    assert errors["exact"] < errors["slope"]
    attribute(model, pairs, softmax="exact", steps=2, layers_at_once=1, exact=0, **common)
