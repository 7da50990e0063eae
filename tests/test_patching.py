"""Activation patching: planted circuits, identities, and what others compute for the same cells."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from transformer_lens import patching as theirs

import mechicl
from mechicl.analysis.patching import job as patch_job
from mechicl.analysis.patching import run as patch_run
from mechicl.analysis.patching.cells import SITES
from mechicl.analysis.patching.patch import cost, patch, print_cost
from mechicl.data import concepts
from mechicl.errors import EpisodeError, OptionError, UnsupportedModelError
from mechicl.models.planted import planted_induction, untrained
from mechicl.models.toys.prompts import toy_episodes
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.corrupt import Pairs, minimal_pairs

Organism = Callable[..., tuple[Any, Any]]
QUIET: dict[str, Any] = {"progress": False, "n_permutations": 1000}
SAME = 1e-5
"""float32 sums in another order, on logits of order one."""


@contextmanager
def unchecked() -> Iterator[None]:
    """As a user runs it: annotations are not checked."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@cache
def planted(how: Any = "wrong_exemplar", n: int = 12) -> tuple[Any, Pairs]:
    found = planted_induction(n_heads=4, seed=3)
    return found, minimal_pairs(found.model.renderer, toy_episodes(n, classes=3), how)


@cache
def demo(how: Any = "swap_query", n: int = 8, **options: Any) -> tuple[Any, Pairs]:
    model = mechicl.load("demo")
    episodes = concepts.draw(n, classes=2, shots=1, size=28, seed=0, syllables=(2, 2))
    return model, minimal_pairs(model.renderer, episodes, how, **options)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_planted_heads_carry_the_whole_answer_and_idle_heads_nothing(direction: Any) -> None:
    found, pairs = planted()
    z = patch(found.model, pairs, sites="z", by="head", direction=direction, **QUIET)["z"]
    moved = z.value if direction == "denoise" else 1 - z.value
    for head in found.circuit:
        assert moved[head] == pytest.approx(1, abs=1e-3)
        assert z.p_corrected[head] < 0.05
        assert z.low[head] <= z.value[head] <= z.high[head]
    for head in found.idle:
        assert moved[head] == pytest.approx(0, abs=1e-3)
        assert z.p[head] == 1


def test_each_planted_head_acts_at_its_own_span() -> None:
    found, pairs = planted()
    effects = patch(found.model, pairs, sites=("z", "resid_pre"), by="span", **QUIET)
    z = effects["z"]
    assert z.axes == ("layer", "head", "span")
    expected = np.zeros_like(z.value)
    expected[z.index(layer=0, head=found.previous_token[0][1], span="right label")] = 1  # it stores the item where the label is
    expected[z.index(layer=1, head=found.matching[0][1], span="last token")] = 1  # it copies the label to where the answer is read
    np.testing.assert_allclose(z.value, expected, atol=1e-3)
    stream = effects["resid_pre"]
    assert stream.at(layer=0, span="right text") == pytest.approx(1, abs=1e-3)
    assert stream.at(layer=1, span="right label") == pytest.approx(1, abs=1e-3)
    assert stream.at(layer=1, span="right text") == pytest.approx(0, abs=1e-3)
    assert effects.top("z", 2) == [(0, found.previous_token[0][1], "right label"), (1, found.matching[0][1], "last token")]


def test_with_two_matching_heads_one_suffices_and_none_is_needed() -> None:
    found = planted_induction(n_heads=4, n_matching=2, seed=1)
    pairs = minimal_pairs(found.model.renderer, toy_episodes(8, classes=3), "wrong_exemplar")
    need = patch(found.model, pairs, sites="z", by="head", direction="noise", metric="prob", **QUIET)["z"].value
    suffices = patch(found.model, pairs, sites="z", by="head", direction="denoise", metric="prob", **QUIET)["z"].value
    for head in found.matching:
        assert need[head] > 0.99
        assert suffices[head] > 0.9


def test_an_untrained_network_has_no_head_that_carries_the_answer() -> None:
    model = untrained(n_layers=2, n_heads=4, norm="RMS", seed=2)
    pairs = minimal_pairs(model.renderer, toy_episodes(12, classes=3), "wrong_exemplar")
    try:
        z = patch(model, pairs, sites="z", by="head", **QUIET)["z"]
    except EpisodeError:  # no difference at all is as good a control
        return
    assert not ((z.p_corrected < 0.05) & (z.value > 0.9)).any()


@pytest.mark.parametrize(("direction", "metric"), list(itertools.product(["denoise", "noise"], ["logit_diff", "label_logprob"])))
def test_everything_patched_is_the_other_run(direction: Any, metric: Any) -> None:
    model, pairs = demo("swap_labels")
    effects = patch(
        model, pairs, sites=("resid_pre", "resid_post", "embed"), by="head", direction=direction, metric=metric, layers=(0, 3), **QUIET
    )
    other = effects.clean if direction == "denoise" else effects.corrupt
    for site in ("resid_pre", "resid_post"):
        assert effects[site].axes == ("layer",)
        np.testing.assert_allclose(effects[site].raw, np.broadcast_to(other[:, None], effects[site].raw.shape), atol=1e-4)
    np.testing.assert_allclose(effects["embed"].raw[:, 0], other, atol=1e-4)
    last = patch(model, pairs, sites="resid_post", direction=direction, metric=metric, layers=[3], spans=["last token"], **QUIET)[
        "resid_post"
    ]
    np.testing.assert_allclose(last.raw[:, 0, 0], other, atol=1e-4)
    assert last.value[0, 0] == pytest.approx(1.0 if direction == "denoise" else 0.0, abs=1e-5)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_clean_into_clean_changes_exactly_nothing(direction: Any) -> None:
    model, pairs = demo("swap_labels")
    episodes, others = list(pairs.clean.episodes), list(pairs.corrupt.episodes)
    mixed = model.render([*episodes[:3], *others[3:]])  # three pairs have two equal sides
    effects = patch(
        model, pairs.clean, mixed, sites=[s for s in SITES if s != "vision"], by="head", direction=direction, engine="naive", **QUIET
    )
    assert (effects.clean[:3] == effects.corrupt[:3]).all()
    for site, found in effects.sites.items():
        same = found.raw[:3] - effects.start[:3].reshape(3, *(1,) * (found.raw.ndim - 1))
        assert np.abs(same[~np.isnan(same)]).max() <= SAME, site
    with pytest.raises(EpisodeError, match="must differ in the metric"):
        patch(model, pairs.clean, pairs.clean, metric="logprob", **QUIET)


def test_denoising_one_span_is_noising_all_others() -> None:
    model, pairs = demo("swap_labels")
    layer = 2
    one = patch(model, pairs, sites="resid_pre", layers=[layer], spans=["right label"], **QUIET)["resid_pre"].raw[:, 0, 0]
    rest = [
        name
        for name in patch(model, pairs, sites="resid_pre", layers=[layer], **QUIET)["resid_pre"].coords["span"]
        if name != "right label"
    ]
    # the same run by hand: the clean run with every other span taken from the corrupt one
    from mechicl.prompts.align import span_groups

    groups = span_groups(pairs.clean)
    mask = torch.stack([groups[name] for name in rest]).any(0)
    name = f"blocks.{layer}.hook_resid_pre"
    _, corrupt = model.run_with_cache(pairs.corrupt, names_filter=name)
    with torch.no_grad():
        logits = model.run_with_hooks(pairs.clean, fwd_hooks=[(name, lambda x, hook: torch.where(mask[..., None], corrupt[name], x))])[:, 0]
    np.testing.assert_allclose(one, difference(logits, pairs), atol=1e-4)


def difference(logits: torch.Tensor, pairs: Pairs) -> np.ndarray:
    right = [row[a][0] for row, a in zip(pairs.clean.candidate_ids, pairs.clean.answers, strict=True)]
    wrong = [row[a][0] for row, a in zip(pairs.corrupt.candidate_ids, pairs.corrupt.answers, strict=True)]
    rows = torch.arange(len(right))
    return (logits[rows, right] - logits[rows, wrong]).detach().double().numpy()


def test_it_agrees_with_transformer_lens_own_patching() -> None:
    model = untrained(n_layers=2, n_heads=4, norm="RMS", mlp="gelu", seed=1)
    pairs = minimal_pairs(model.renderer, toy_episodes(4, classes=2), "swap_query")
    _, cache = model.run_with_cache(pairs.clean.inputs["input_ids"])

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return torch.tensor(difference(logits[:, -1], pairs).mean())

    ours = patch(model, pairs, sites=("z", "q", "k", "v"), by="head", **QUIET)
    tokens = pairs.corrupt.inputs["input_ids"]
    runs: dict[str, Any] = {"z": theirs.get_act_patch_attn_head_out_all_pos, "q": theirs.get_act_patch_attn_head_q_all_pos,
                            "k": theirs.get_act_patch_attn_head_k_all_pos, "v": theirs.get_act_patch_attn_head_v_all_pos}  # fmt: skip
    with torch.no_grad():
        for site, run in runs.items():
            np.testing.assert_allclose(ours[site].raw.mean(0), run(model, tokens, cache, metric).numpy(), atol=SAME)
        single = patch(model, pairs, sites=("resid_pre", "attn_out", "mlp_out"), by="pos", **QUIET)
        places: dict[str, Any] = {
            "resid_pre": theirs.get_act_patch_resid_pre,
            "attn_out": theirs.get_act_patch_attn_out,
            "mlp_out": theirs.get_act_patch_mlp_out,
        }
        for site, run in places.items():
            np.testing.assert_allclose(single[site].raw.mean(0), run(model, tokens, cache, metric).numpy(), atol=SAME)


def test_it_agrees_with_an_nnsight_loop_on_a_model_with_pictures(organism: Organism) -> None:
    from mechicl.models.recording import decoder_layers

    model = HookedVLM(*organism("llava"))
    pairs = minimal_pairs(model.renderer, concepts.draw(2, classes=2, shots=1, size=28, seed=3, syllables=(2, 2)), "swap_query")
    ours = patch(model, pairs, sites="resid_post", spans=["query image", "last token"], **QUIET)["resid_post"]
    groups = mechicl.prompts.align.span_groups(pairs.clean)
    paths = {module: name for name, module in model.hf.named_modules()}
    head = paths[model.anatomy.unembed]
    for layer, block in enumerate(decoder_layers(model.hf)):
        path = paths[block]
        with torch.no_grad(), model.trace(pairs.clean):
            saved = model.nnsight.get(path).output.save()
        for k, name in enumerate(ours.coords["span"]):
            mask = groups[name][..., None]
            donor = saved if isinstance(saved, torch.Tensor) else saved[0]
            with torch.no_grad(), model.trace(pairs.corrupt):
                envoy = model.nnsight.get(path)
                envoy.output = torch.where(mask, donor, envoy.output)
                logits = model.nnsight.get(head).output.save()
            np.testing.assert_allclose(ours.raw[:, layer, k], difference(logits[:, -1], pairs), atol=SAME)


def test_grouped_query_attention_has_one_key_and_value_per_group(organism: Organism) -> None:
    model = HookedVLM(*organism("qwen2_5_vl"))
    groups = model.cfg.n_heads // model.cfg.n_key_value_heads
    assert groups > 1
    pairs = minimal_pairs(model.renderer, concepts.draw(2, classes=2, shots=1, size=28, seed=3, syllables=(2, 2)), "swap_query", seed=1)
    ours = patch(model, pairs, sites="v", by="head", layers=[1], **QUIET)["v"]
    assert ours.axes == ("layer", "kv_head")
    assert ours.value.shape == (1, model.cfg.n_key_value_heads)
    names = ["blocks.1.attn.hook_v", "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_z"]
    _, clean = model.run_with_cache(pairs.clean, names_filter=names)
    _, corrupt = model.run_with_cache(pairs.corrupt, names_filter=names)
    for g in range(model.cfg.n_key_value_heads):
        own = slice(g * groups, (g + 1) * groups)
        z = corrupt[names[2]].clone()  # the group's heads read the clean values with their corrupt patterns
        z[:, :, own] = torch.einsum("bhqk,bkd->bqhd", corrupt[names[1]][:, own], clean[names[0]][:, :, g])
        with torch.no_grad():
            logits = model.run_with_hooks(pairs.corrupt, fwd_hooks=[(names[2], lambda x, hook, z=z: z)])
        np.testing.assert_allclose(ours.raw[:, 0, g], difference(logits[:, 0], pairs), atol=SAME)
    some = patch(model, pairs, sites="k", by="head", heads=[(1, groups)], **QUIET)["k"]
    assert np.argwhere(~np.isnan(some.value)).tolist() == [[1, 1]]


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2_5_vl", "idefics3"])
def test_all_pictures_patched_is_the_run_with_those_pictures(kind: str, organism: Organism, monkeypatch: pytest.MonkeyPatch) -> None:
    model = HookedVLM(*organism(kind))
    pairs = minimal_pairs(model.renderer, concepts.draw(2, classes=2, shots=1, size=28, seed=3, syllables=(2, 2)), "swap_exemplars", seed=1)
    whole = patch(model, pairs, sites=("image_features", "vision"), by="head", **QUIET)
    np.testing.assert_allclose(whole["image_features"].raw[:, 0], whole.clean, atol=SAME)
    np.testing.assert_allclose(whole["vision"].raw[:, 0, 0], whole.clean, atol=SAME)  # from the tower's first layer on
    apart = patch(model, pairs, sites=("image_features", "vision"), by="shot", **QUIET)
    np.testing.assert_allclose(apart["image_features"].raw, apart["vision"].raw[:, 0], atol=SAME)  # picture by picture
    if model.family.deepstack:
        monkeypatch.setattr(patch_run, "added_layers", lambda model: [])
        bare = patch(model, pairs, sites="image_features", by="head", **QUIET)
        assert (
            np.abs(bare["image_features"].raw[:, 0] - whole.clean).max() > 100 * SAME
        )  # the picture is still visible through its later entries
    else:
        assert patch_run.added_layers(model) == []


def test_shots_and_selected_heads_are_cells_of_their_own() -> None:
    found, pairs = planted()
    by_shot = patch(found.model, pairs, sites="resid_pre", by="shot", **QUIET)["resid_pre"]
    assert by_shot.coords["span"][:4] == ("shot 0 text", "shot 0 label", "shot 1 text", "shot 1 label")
    assert "last token" in by_shot.coords["span"]
    some = patch(found.model, pairs, sites="z", by="head", heads=found.matching, **QUIET)["z"]
    assert np.isnan(some.value).sum() == some.value.size - 1
    frame = patch(found.model, pairs, sites=("z", "resid_pre"), by="span", **QUIET).to_frame()
    assert len(frame) == 2 * 4 * 5 + 2 * 5
    assert frame.n.eq(12).all()


def test_small_batches_give_the_same_numbers() -> None:
    model, pairs = demo("swap_labels", 6)
    one = patch(model, pairs, sites=("resid_pre", "k"), layers=[1], metric="label_logprob", batch_size=100, **QUIET)
    two = patch(model, pairs, sites=("resid_pre", "k"), layers=[1], metric="label_logprob", batch_size=5, **QUIET)
    for site in one.sites:
        np.testing.assert_allclose(one[site].raw, two[site].raw, atol=1e-4)


def test_what_does_not_fit_into_memory_is_recorded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    found, pairs = planted()
    one = patch(found.model, pairs, sites=("z", "pattern"), by="head", **QUIET)
    sizes: list[int] = []
    monkeypatch.setattr(patch_job, "memory", lambda model: 300_000)
    inner = patch_job.record
    monkeypatch.setattr(
        patch_job, "record", lambda sweep, contrast, clean, *more: sizes.append(clean.n) or inner(sweep, contrast, clean, *more)
    )
    two = patch(found.model, pairs, sites=("z", "pattern"), by="head", **QUIET)
    assert len(sizes) > 1
    assert sum(sizes) == pairs.n
    for site in one.sites:
        np.testing.assert_allclose(one[site].raw, two[site].raw, atol=1e-4)


def test_the_preview_counts_what_will_run() -> None:
    found, pairs = planted()
    preview = cost(found.model, pairs, sites=("z", "resid_pre"), by="span", batch_size=6)
    assert preview.cells == 2 * 4 * 5 + 2 * 5
    assert preview.forwards == 2 * (preview.cells + 2)
    assert preview.seconds > 0
    assert preview.gigabytes > 0
    assert "50 cells x 12 episodes" in str(preview)


def test_the_cost_is_said_on_stderr_because_it_is_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    found, pairs = planted()
    print_cost(cost(found.model, pairs, sites="z", by="head"))
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("patching: ")


def test_numbers_that_cannot_be_trusted_say_so() -> None:
    found, pairs = planted(n=4)
    assert "none of 8 cells can be significant" in patch(found.model, pairs, sites="z", by="head", **QUIET).notes[-1]
    model, pairs = demo("reformat", 4)
    notes = patch(model, pairs, sites="resid_pre", layers=[0], **QUIET).notes
    assert any("same answer on both sides" in note for note in notes)
    assert any("hardly differ" in note for note in notes)


def test_what_does_not_fit_is_refused_with_the_reason(organism: Organism) -> None:
    found, pairs = planted()
    model = found.model

    def refused(error: type[Exception], text: str, *args: Any, **options: Any) -> None:
        with unchecked(), pytest.raises(error, match=text):
            patch(*(args or (model, pairs)), **{**QUIET, **options})

    refused(OptionError, "sites must be some of", sites="resid")
    refused(OptionError, "by must be one of", by="token")
    refused(OptionError, "spans must be some of", spans=["query image"])
    refused(OptionError, "layers must be in 0..1", layers=[2])
    refused(OptionError, "corrupt must be given", model, pairs.clean)
    refused(OptionError, "corrupt must not be given", model, pairs, pairs.corrupt)
    refused(OptionError, "direction must be", direction="both")
    refused(OptionError, "engine must be", engine="fast")
    refused(OptionError, "correction must be", correction="none")
    refused(OptionError, "metric must be one of", metric="accuracy")
    refused(OptionError, "align must be None for z", sites="z", align="mean")
    refused(UnsupportedModelError, "image_features must enter as tokens", sites="image_features")
    refused(UnsupportedModelError, "mlp_out must be hooked", sites="mlp_out")
    refused(EpisodeError, "must be paired", model, pairs.clean, pairs.corrupt.select([0, 1]))
    uneven = model.render([*toy_episodes(1, classes=2), *toy_episodes(1, classes=3)])
    refused(EpisodeError, "laid out alike", model, uneven, uneven, by="pos")
    apart = model.render(toy_episodes(2, classes=2))
    refused(EpisodeError, "both prompts must have the same sequence of spans; span 4 is", model, uneven, apart)
    vlm = HookedVLM(*organism("mllama"))
    pictures = minimal_pairs(vlm.renderer, concepts.draw(2, classes=2, shots=1, size=28, seed=3, syllables=(2, 2)), "swap_query", seed=1)
    refused(UnsupportedModelError, "not tokens of the sequence", vlm, pictures, sites="image_features")
    notes = patch(vlm, pictures, sites="k", by="head", **QUIET).notes
    assert any("read pictures" in note for note in notes)


def test_pictures_of_other_sizes_are_refused_or_fitted() -> None:
    model = mechicl.load("demo")
    clean, corrupt = (model.render(concepts.draw(3, classes=2, shots=1, size=size, seed=0, syllables=(2, 2))) for size in (28, 84))
    # the same episodes in another size, and another answer asked for: labels are exchanged as in swap_labels
    other = minimal_pairs(model.renderer, corrupt.episodes, "swap_query").corrupt
    with pytest.raises(
        EpisodeError, match=r"span 'shot 0 image 0' must have as many tokens in both prompts; got 9 \(corrupt\) and 1 \(clean\)"
    ):
        patch(model, clean, other, **QUIET)
    for how in ("mean", "resize"):
        effects = patch(model, clean, other, sites=("resid_pre", "image_features"), align=how, **QUIET)
        # the query's picture, fitted, still says what it shows
        assert effects["image_features"].at(span="query image") > 0.5
        assert abs(effects["image_features"].at(span="right image")) < 0.5
    with pytest.raises(OptionError, match="align must be None for vision"):
        patch(model, clean, other, sites="vision", align="mean", **QUIET)


def test_nothing_is_left_behind_after_an_exception() -> None:
    model, pairs = demo("swap_labels", 4)
    before = model(pairs.clean)

    def broken(logits: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("stop")
        return logits[:, 0] * float(len(calls))

    calls: list[int] = []
    for site in ("z", "vision"):
        calls.clear()
        with pytest.raises(RuntimeError, match="stop"):
            patch(model, pairs, sites=site, by="head", metric=broken, **QUIET)
    assert torch.equal(model(pairs.clean), before)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
