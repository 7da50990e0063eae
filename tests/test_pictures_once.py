"""Pictures seen once: bit-equal logits on every family, the tower run once, and never an old picture's features for a new one."""

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

import mechicl
from mechicl.analysis import labels
from mechicl.analysis.ablation.ablate import ablate
from mechicl.analysis.ablation.switches import Switches
from mechicl.analysis.labels import answer
from mechicl.data import concepts
from mechicl.models.pictures import pictures_once
from mechicl.models.probe import text_probe
from mechicl.models.vlm import HookedVLM
from mechicl.training.organisms import FAMILIES, build
from mechicl.training.organisms.every import EVERY, build_every
from tests.conftest import cached, example_batch

NO_LAYERS = {"chameleon", "emu3", "fast_vlm", "fuyu", "gemma3n", "gemma4_unified", "inkling_mm_model"}
"""Families whose tower has no list of layers to count: their features are counted instead."""
NO_PICTURES = {"mistral4"}


def counting(model: Any) -> dict[str, int]:
    """How often the tower's first layer has run (where it has none: how often features were made)."""
    seen = {"runs": 0}

    def count(*_: Any) -> None:
        seen["runs"] += 1

    if model.anatomy.vision_layers:
        model.anatomy.vision_layers[0].register_forward_hook(count)
    elif hasattr(model.hf.model, "get_image_features"):
        real = model.hf.model.get_image_features
        model.hf.model.get_image_features = lambda *args, **kwargs: (count(), real(*args, **kwargs))[1]
    return seen


def cloned(inputs: Any) -> dict[str, Any]:
    return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


def assert_seen_once(model: Any, inputs: Any) -> None:
    seen = counting(model)
    with torch.no_grad():
        plain = model(inputs, positions="all")
        each = seen["runs"]
        with pictures_once(model):
            found = [model(given, positions="all") for given in (inputs, cloned(inputs), inputs)]
        assert all(torch.equal(x, plain) for x in found)
        assert seen["runs"] == 2 * each
        assert torch.equal(model(inputs, positions="all"), plain)
        assert seen["runs"] == 3 * each, "nothing is kept behind the block"


@pytest.mark.parametrize("name", EVERY)
def test_every_family_gives_the_same_bits_and_runs_its_tower_once(name: str) -> None:
    hf, inputs = build_every(name)
    model = HookedVLM(hf, check=False, probe=inputs)
    assert bool(model.anatomy.vision_layers) == (name not in NO_LAYERS | NO_PICTURES)
    assert_seen_once(model, inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_batches_of_several_pictures_of_unlike_sizes(name: str) -> None:
    hf, processor = build(name)
    assert_seen_once(HookedVLM(hf, processor, check=False), example_batch(processor))


@pytest.fixture
def model() -> HookedVLM:
    hf, processor = build("qwen3_vl")  # features enter later layers too
    return HookedVLM(hf, processor, check=False)


@torch.no_grad()
def test_another_picture_is_seen_and_so_is_one_changed_in_place(model: HookedVLM) -> None:
    a, b = example_batch(model.processor, seed=0), example_batch(model.processor, seed=7)
    want_a, want_b = model(a), model(b)
    assert not torch.equal(want_a, want_b)
    words = text_probe(model.hf)
    want_words = model(words)
    with pictures_once(model):
        assert torch.equal(model(a), want_a)
        assert torch.equal(model(b), want_b)
        assert torch.equal(model(words), want_words)
        assert torch.equal(model(a), want_a)
        a["pixel_values"][0, 0] += 1.0
        changed = model(a)
    assert not torch.equal(changed, want_a)
    assert torch.equal(model(a), changed)


@torch.no_grad()
def test_features_that_somebody_wrote_into_are_not_given_again(model: HookedVLM) -> None:
    inputs = example_batch(model.processor)
    want = model(inputs)
    with pictures_once(model):
        model(inputs)
        features = model.hf.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
        assert torch.equal(model(inputs), want)
        features.pooler_output[0].mul_(2.0)
        assert torch.equal(model(inputs), want)


@torch.no_grad()
def test_the_tower_runs_wherever_somebody_listens_or_edits(model: HookedVLM) -> None:
    inputs = example_batch(model.processor)
    want, heard = model(inputs), []
    edit = [("vision.blocks.0.hook_resid_post", lambda x, *, hook: x * 0.5)]
    listen = [("vision.blocks.1.hook_resid_pre", lambda x, *, hook: heard.append(x.shape))]
    edited = model.run_with_hooks(inputs, fwd_hooks=edit)
    assert not torch.equal(edited, want)
    with pictures_once(model):
        assert torch.equal(model(inputs), want)
        assert torch.equal(model.run_with_hooks(inputs, fwd_hooks=edit), edited)
        assert torch.equal(model.run_with_hooks(inputs, fwd_hooks=listen), want)
        assert torch.equal(model(inputs), want)
        assert len(heard) == 1
        moved = model.run_with_hooks(inputs, fwd_hooks=[("hook_image_features", lambda x, *, hook: x * 0.5)])  # behind the tower
    assert not torch.equal(moved, want)


def test_gradients_and_training_run_the_tower(model: HookedVLM) -> None:
    inputs, seen = example_batch(model.processor), counting(model)
    with pictures_once(model):
        with torch.no_grad():
            model(inputs)
        model(inputs).sum().backward()
        first = next(p for name, p in model.hf.named_parameters() if "visual" in name)
        assert first.grad is not None
        assert first.grad.abs().sum() > 0
        model.hf.train()
        with torch.no_grad():
            model(inputs)
            model(inputs)
    assert seen["runs"] == 4


@torch.no_grad()
@pytest.mark.parametrize(("name", "part"), [("qwen3_vl", "model.visual"), ("mllama", "model.vision_model")])
def test_nothing_is_kept_or_left_on_the_model_behind_the_block_or_an_error(name: str, part: str) -> None:
    model = HookedVLM(*cached(name, "tiny", 0), check=False)
    inputs = example_batch(model.processor)
    before = {path: set(vars(module)) for path, module in model.hf.named_modules()}
    kept: list[weakref.ref[torch.Tensor]] = []

    def fail() -> None:
        with pictures_once(model), pictures_once(model):
            tower = model.hf.get_submodule(part)
            handle = tower.register_forward_hook(lambda _, args, out: kept.append(weakref.ref(out.last_hidden_state)))
            model(inputs)
            handle.remove()
            gc.collect()
            assert any(ref() is not None for ref in kept)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    gc.collect()
    assert kept
    assert all(ref() is None for ref in kept)
    assert {path: set(vars(module)) for path, module in model.hf.named_modules()} == before


@pytest.mark.parametrize("score", ["full", "first_token"])
def test_many_sets_of_heads_see_a_batch_of_pictures_once(monkeypatch: pytest.MonkeyPatch, score: Any) -> None:
    model = mechicl.load("demo")
    data, seen = concepts.draw(6, classes=2, shots=2, size=28, seed=0), counting(model)
    switches = Switches(tuple(((layer, head),) for layer in (0, 2, 3) for head in (0, 1)), "zero")
    answer(model, data[:1], score=score)  # whether prompts can be run apart from their candidates has been tried

    def run(size: int) -> tuple[list[Any], int]:
        before = seen["runs"]
        return answer(model, data, score=score, switches=switches, batch_size=size)[0], seen["runs"] - before

    for size, batches, passes in ((3, 2, 12), (12, 1, 3)):  # two batches, a pass for each set; one batch, two sets in a pass
        found, runs = run(size)
        with monkeypatch.context() as patch:
            patch.setattr(labels, "pictures_once", nullcontext)
            want, every = run(size)
        tried = score == "full"  # `can_share` runs the first prompt
        assert (runs, every) == (batches + tried, passes + tried)
        assert all(np.array_equal(a.total, b.total) and np.array_equal(a.first, b.first) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
def test_an_ablation_is_the_same_to_the_last_bit(monkeypatch: pytest.MonkeyPatch, how: Any) -> None:
    model, data = mechicl.load("demo"), concepts.draw(4, classes=2, shots=2, size=28, seed=1)

    def run() -> Any:
        return ablate(model, data, [(1, 0), (2, 1)], how, n_random=3, batch_size=2, progress=False)

    found = run()
    monkeypatch.setattr(labels, "pictures_once", nullcontext)
    want = run()
    for a, b in zip((found.chosen, *found.singles, *found.random), (want.chosen, *want.singles, *want.random), strict=True):
        assert np.array_equal(a.margins, b.margins)


def test_a_toy_and_a_model_of_words_are_left_as_they_are(organism: Callable[..., Any]) -> None:
    from mechicl.models.planted import untrained

    for model in (untrained(n_heads=2), HookedVLM(build_every("mistral4")[0], check=False)):
        before = {name: set(vars(module)) for name, module in model.named_modules()}
        with pictures_once(model):
            assert {name: set(vars(module)) for name, module in model.named_modules()} == before
