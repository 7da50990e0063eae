"""Head analysis on families unlike the usual ones: layers without attention, several streams, sparse selection, pictures that enter later again.

Accuracy is held against the plain model, prompt by prompt and candidate by candidate; scores against the patterns; resumed patching against whole runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch

import mechicl
from mechicl.analysis.guarded import APART
from mechicl.data.concepts import draw
from mechicl.errors import HeadIndexError, PaddingError, UnsupportedModelError
from mechicl.models.families import FAMILIES, Family
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.batch import Batch
from mechicl.prompts.corrupt import minimal_pairs
from mechicl.training.organisms.every.processors import build_whole

UNLIKE = (
    "lfm3_vl", "qwen3_5", "qwen4_exp", "glm5_next", "minimax_m3_vl", "mistral_large4", "hunyuan_vl", "ernie4_5_vl_moe", "cohere_compass", "exaone4_5",
    "step3p7", "inkling2",
)  # fmt: skip
OWN_TOKENS = (
    "unlimited_ocr",
    "molmo2",
    "nemotron_h_omni",
    "kimi_k25",
    "video_llava",
    "idefics2",
    "pp_chart2table",
    "muse_spark",
    "inkling_mm_model",
)
"""Families whose processors write pictures' tokens in ways of their own: candidates and pairs must take their inputs along."""
QUIET: dict[str, Any] = {"progress": False}
families = pytest.mark.parametrize("family", UNLIKE)


@cache
def hooked(family: str) -> HookedVLM:
    model, processor = build_whole(family)
    return HookedVLM(model, processor, name=family, check=False)  # checked in test_every_family_processors


@cache
def episodes() -> list[Any]:
    return draw(2, classes=2, shots=1, size=28, seed=0, syllables=(2, 2))


def soft(family: str) -> list[int]:
    return [layer for layer, part in enumerate(hooked(family).anatomy.layers) if part.attention is not None]


def size(family: str) -> int:
    """Prompts per forward pass: one where the family's padding is refused."""
    return 1 if FAMILIES.get(family, Family()).padding else 8


@torch.no_grad()
def log_probability(family: str, batch: Batch, label: tuple[int, ...]) -> float:
    """Of one label behind one prompt, by the plain model: every input with a number per token grows by hand."""
    ids, extra = batch.inputs["input_ids"], torch.tensor([label])
    inputs = dict(batch.inputs)
    for name, value in batch.inputs.items():
        if isinstance(value, torch.Tensor) and value.shape == ids.shape:
            more = extra if name == "input_ids" else torch.full_like(extra, int(name == "attention_mask"))
            inputs[name] = torch.cat([value, more.to(value.dtype)], 1)
    logits = hooked(family).hf(**inputs, use_cache=False).logits[0, -len(label) - 1 : -1].log_softmax(-1)
    return float(logits.gather(1, extra.T).sum())


@pytest.mark.parametrize("family", [*UNLIKE, *OWN_TOKENS])
def test_accuracy_is_that_of_the_plain_model_prompt_by_prompt(family: str) -> None:
    found = mechicl.icl_accuracy(hooked(family), episodes(), batch_size=size(family), **QUIET)
    for episode, margin in zip(episodes(), found.margins, strict=True):
        batch = hooked(family).render([episode])
        scores = [log_probability(family, batch, label) for label in batch.candidate_ids[0]]
        right = scores.pop(batch.answers[0])
        assert margin == pytest.approx(right - max(scores), abs=2e-3)


@families
def test_every_head_that_exists_has_a_score_from_its_pattern_and_no_other(family: str) -> None:
    model = hooked(family)
    frame = mechicl.score_heads(model, episodes(), scores=("previous_token",), n_null=19, batch_size=size(family), **QUIET).to_frame()
    values = frame.pivot_table(index="layer", columns="head", values="value", dropna=False).to_numpy()
    there = np.array(
        [
            [layer in soft(family) and head < part.n_heads for head in range(model.cfg.n_heads)]
            for layer, part in enumerate(model.anatomy.layers)
        ]
    )
    assert np.array_equal(np.isfinite(values), there)


@families
def test_knocking_out_every_head_of_the_last_layer_is_zeroing_its_output_projections_input(family: str) -> None:
    model, layer = hooked(family), soft(family)[-1]
    o_proj = hooked(family).anatomy.layers[layer].o_proj
    assert o_proj is not None
    heads = [(layer, head) for head in range(model.anatomy.layers[layer].n_heads)]
    options: dict[str, Any] = {"batch_size": size(family), "zero_shot": False, **QUIET}
    found = mechicl.ablate(model, episodes(), heads, singles=False, n_random=1, **options)
    handle = o_proj.register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0]), *args[1:]))
    try:
        plain = mechicl.icl_accuracy(model, episodes(), **options)
    finally:
        handle.remove()
    assert np.allclose(found.chosen.margins, plain.margins, atol=2e-3)
    assert not np.allclose(found.intact.margins, plain.margins, atol=5e-3)  # more than twice the tolerance above


@pytest.mark.parametrize("family", [*UNLIKE, *(pytest.param(family, marks=pytest.mark.slow) for family in OWN_TOKENS)])
def test_patching_resumed_equals_whole_runs_or_the_site_is_refused_by_name(family: str) -> None:
    model = hooked(family)
    pairs = minimal_pairs(model.renderer, episodes(), "swap_labels")
    options: dict[str, Any] = {"n_permutations": 19, "batch_size": size(family), "layers": [0, soft(family)[-1]], **QUIET}
    fast, whole = (mechicl.patch(model, pairs, engine=engine, **options).to_frame() for engine in ("resume", "naive"))
    assert np.allclose(fast["raw_mean"], whole["raw_mean"], atol=2e-3, equal_nan=True)
    for site in ("resid_mid", "attn_out", "k", "image_features"):
        gone = [name for name in model.unavailable if name.endswith(f"hook_{site}")]
        if len(gone) == (1 if site == "image_features" else model.cfg.n_layers):
            with pytest.raises(UnsupportedModelError, match=site):
                mechicl.patch(model, pairs, sites=[site], **options)


@pytest.mark.parametrize("family", ["lfm3_vl", "qwen4_exp", "glm5_next"])
def test_heads_of_layers_without_attention_are_refused_before_any_work(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hooked(family)
    without = next(layer for layer in range(model.cfg.n_layers) if layer not in soft(family))
    monkeypatch.setattr(model.hf, "forward", None)  # a forward pass would fail
    with pytest.raises(HeadIndexError, match="no softmax attention"):
        mechicl.ablate(model, episodes(), [(without, 0)], **QUIET)


def test_a_head_beyond_another_layers_last_is_knocked_out_as_zeroing_its_share_of_the_output_projections_input() -> None:
    model, (layer, head) = hooked("step3p7"), (1, 7)
    counts = {layer: part.n_heads for layer, part in enumerate(model.anatomy.layers)}
    assert counts == {0: 4, 1: 8, 2: 4, 3: 8}
    part = model.anatomy.layers[layer]
    found = mechicl.ablate(model, episodes(), [(layer, head)], singles=False, n_random=20, zero_shot=False, **QUIET)
    share = slice(head * part.d_value, (head + 1) * part.d_value)

    def without(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        left = args[0].clone()
        left[..., share] = 0
        return (left, *args[1:])

    assert part.o_proj is not None
    handle = part.o_proj.register_forward_pre_hook(without)
    try:
        plain = mechicl.icl_accuracy(model, episodes(), zero_shot=False, **QUIET)
    finally:
        handle.remove()
    assert np.allclose(found.chosen.margins, plain.margins, atol=2e-3)
    assert not np.allclose(found.intact.margins, plain.margins, atol=1e-4)
    drawn = {one for cell in found.random for one in cell.heads}
    assert drawn == {(1, h) for h in range(7)}  # the layer's own other heads, all of them


def test_cells_and_refusals_follow_each_layers_own_number_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hooked("step3p7")
    pairs = minimal_pairs(model.renderer, episodes(), "swap_labels")
    options: dict[str, Any] = {"sites": ["z"], "by": "head", "n_permutations": 19, "layers": [0, 1], **QUIET}
    fast, whole = (mechicl.patch(model, pairs, engine=engine, **options).to_frame() for engine in ("resume", "naive"))
    assert np.allclose(fast["raw_mean"], whole["raw_mean"], atol=2e-3, equal_nan=True)
    there = {(int(layer), int(head)) for layer, head in fast.loc[np.isfinite(fast["raw_mean"]), ["layer", "head"]].to_numpy()}
    assert there == {(0, h) for h in range(4)} | {(1, h) for h in range(8)}
    monkeypatch.setattr(model.hf, "forward", None)  # a forward pass would fail
    with pytest.raises(HeadIndexError, match="layer 0 has 4 heads"):
        mechicl.ablate(model, episodes(), [(0, 4)], **QUIET)
    with pytest.raises(HeadIndexError, match="layer 0 has 4 heads"):
        mechicl.patch(model, pairs, sites=["z"], by="head", heads=[(0, 4)], **QUIET)


def mixed() -> list[Any]:
    """Prompts of two lengths: short, short, long."""
    return [*episodes(), *draw(1, classes=2, shots=2, size=28, seed=0, syllables=(2, 2))]


def test_a_batch_whose_padding_would_move_the_logits_is_refused_by_the_model() -> None:
    model = hooked("minimax_m3_vl")
    with pytest.raises(PaddingError, match="batch_size=1"):
        model(model.render(mixed()))


ANALYSES: dict[str, Callable[..., Any]] = {
    "accuracy": mechicl.icl_accuracy,
    "scores": partial(mechicl.score_heads, scores=("previous_token", "induction_label"), n_null=19),
    "knockouts": partial(mechicl.ablate, heads=[(1, 0), (3, 1)], how="mean", n_random=2, zero_shot=False),
    "lens": mechicl.logit_lens,
    "patches": lambda model, episodes, **options: mechicl.patch(
        model, minimal_pairs(model.renderer, episodes, "swap_labels"), n_permutations=19, layers=[1], **options
    ),
}


@pytest.mark.parametrize("name", ANALYSES)
def test_where_padding_would_move_the_logits_an_analysis_goes_on_with_prompts_of_one_length_and_says_so(name: str) -> None:
    model, run = hooked("minimax_m3_vl"), ANALYSES[name]
    together, alone, alike = (run(model, data, batch_size=n, **QUIET) for data, n in ((mixed(), 3), (mixed(), 1), (episodes(), 2)))
    frames = [found.to_frame().select_dtypes("number").to_numpy(dtype=float) for found in (together, alone)]
    assert np.allclose(*frames, atol=1e-5, equal_nan=True)
    said = [APART in [*getattr(found, "notes", ()), *found.provenance.options.get("remarks", ())] for found in (together, alone, alike)]
    assert said == [True, False, False]


def test_prompts_of_one_length_still_go_through_together() -> None:
    model, sizes = hooked("minimax_m3_vl"), []
    handle = model.hf.register_forward_pre_hook(lambda _, args, given: sizes.append(len(given["input_ids"])), with_kwargs=True)
    try:
        mechicl.score_heads(model, mixed(), scores=("previous_token",), n_null=19, batch_size=8, **QUIET)
    finally:
        handle.remove()
    assert sizes == [2, 1]


@pytest.mark.parametrize("family", ["hunyuan_vl", "mistral_large4"])
def test_the_rest_of_a_batch_moves_nothing_though_the_familys_own_positions_depend_on_it(family: str) -> None:
    model, longer = hooked(family), draw(1, classes=2, shots=2, size=28, seed=0, syllables=(2, 2))
    both, alone = model.render([*longer, *episodes()[1:]]), model.render(episodes()[1:])
    with torch.no_grad():
        together, single = model(both)[1], model(alone)[0]
        own = model.hf(**both.inputs, use_cache=False).logits[1, -1:]
    assert torch.allclose(together, single, atol=1e-3)
    assert not torch.allclose(own, single, atol=1e-2)
    assert torch.equal(model.generate(both, max_new_tokens=3)[1], model.generate(alone, max_new_tokens=3)[0])
