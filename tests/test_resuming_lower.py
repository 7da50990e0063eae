"""Layers below the first change, run once: the same bits on every family, and whole runs wherever that could not be."""

from typing import Any

import numpy as np
import pytest
import torch

import mechicl
from mechicl.analysis import labels
from mechicl.analysis.ablation.switches import Switches, switchable
from mechicl.analysis.labels import Answers, answer
from mechicl.data import concepts
from mechicl.models.check import check_inputs_for, tolerance
from mechicl.models.planted import untrained
from mechicl.models.resuming import lower
from mechicl.models.resuming.lower import lower_layers_once
from mechicl.models.vlm import HookedVLM
from mechicl.training.organisms import build
from mechicl.training.organisms.every import EVERY, build_every
from tests.conftest import example_batch, worded_episodes

LEFT_ALONE = {
    "gemma3n", "gemma4", "glm5_next", "lfm2_vl", "lfm3_vl", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "nemotron_h_omni", "qwen3_5", "qwen3_5_moe", "qwen4_exp",
}  # fmt: skip
"""Keys shared by several layers (Gemma 3n and 4), or layers without softmax attention, which carry a state."""
EPISODES = worded_episodes()
UNLIKE = ("llava", "qwen2_vl", "qwen3_vl", "gemma3", "paligemma2", "idefics3", "mllama")
"""Plain, multimodal RoPE, DeepStack, sliding windows and pictures read both ways, soft-capped scores, grouped heads, layers of cross-attention."""


def off(layer: int) -> list[tuple[str, Any]]:
    """A head of the layer switched off."""

    def cut(z: torch.Tensor, *, hook: Any) -> torch.Tensor:
        z = z.clone()
        z[:, :, 0] = 0.0
        return z

    return [(f"blocks.{layer}.attn.hook_z", cut)]


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_every_family_gives_the_same_bits_or_is_left_alone(name: str) -> None:
    hf, inputs = build_every(name)
    model = HookedVLM(hf, check=False, probe=inputs)
    layer = switchable(model)[-1]
    want = model.run_with_hooks(inputs, positions="all", fwd_hooks=off(layer))
    with lower_layers_once(model) as below:
        for _ in range(2):
            below.same_below(layer)
            assert torch.equal(model.run_with_hooks(inputs, positions="all", fwd_hooks=off(layer)), want)
    assert (below.left_out == 0) == (name in LEFT_ALONE)


def both_ways(monkeypatch: pytest.MonkeyPatch, model: Any, data: Any, **options: Any) -> tuple[list[Answers], list[Answers], int]:
    """Whole runs; runs without the lower layers; how many calls of layers these spared."""
    made: list[Any] = []

    class Counted(lower.Below):
        def same_below(self, layer: int) -> None:
            super().same_below(layer)
            made.append(self)

    monkeypatch.setattr(lower, "Below", Counted)
    monkeypatch.setattr(labels, "SPARED", float("inf"))
    whole = answer(model, data, **options)[0]
    assert not any(one.left_out for one in made)
    made.clear()
    monkeypatch.setattr(labels, "SPARED", 0.0)
    short = answer(model, data, **options)[0]
    return whole, short, sum(one.left_out for one in {id(one): one for one in made}.values())


def assert_equal(whole: list[Answers], short: list[Answers]) -> None:
    assert max(np.abs(one.total - whole[0].total).max() for one in whole) > 0.01, "the heads do something"
    for a, b in zip(whole, short, strict=True):
        assert np.array_equal(a.total, b.total)
        assert np.array_equal(a.greedy, b.greedy)


def sets_of(model: Any) -> tuple[tuple[tuple[int, int], ...], ...]:
    """No head; single ones, the last layers' first; two of unlike layers."""
    layers = switchable(model)
    alone = [((layer, head),) for layer in reversed(layers) for head in (0, 1)]
    return ((), *alone, (alone[-1][0], alone[0][0]), (alone[0][0], alone[2][0]))


@pytest.mark.parametrize("name", UNLIKE)
def test_sets_of_heads_in_any_order_on_padded_prompts_with_labels_of_several_tokens(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = HookedVLM(*build(name, preset="tiny"), check=False)
    switches = Switches(sets_of(model), "zero")
    whole, short, spared = both_ways(monkeypatch, model, EPISODES, switches=switches, batch_size=2)
    assert_equal(whole, short)
    assert spared


@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
@pytest.mark.parametrize("score", ["full", "first_token"])
def test_every_way_of_switching_off_and_several_sets_a_pass(monkeypatch: pytest.MonkeyPatch, how: Any, score: Any) -> None:
    model = HookedVLM(*build("qwen2_5_vl", preset="tiny"), check=False)
    switches = Switches.build(model, EPISODES, sets_of(model), how, seed=0, batch_size=8)
    whole, short, spared = both_ways(monkeypatch, model, EPISODES, switches=switches, score=score, batch_size=4)
    assert_equal(whole, short)
    assert spared


def test_how_much_is_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mechicl.load("demo")
    data = concepts.draw(2, classes=2, shots=2, size=28, seed=0)
    sets = (((3, 0),), ((1, 0), (3, 1)), ((3, 2),), ((1, 1),))
    whole, short, spared = both_ways(monkeypatch, model, data, switches=Switches(sets, "zero"), batch_size=2)
    assert spared == 0 + 1 + 1 + 3  # layers before the sets of 1, 1, 3 and 3: each pass begins where the one before it differed
    assert_equal(whole, short)


@torch.no_grad()
def test_other_prompts_hooks_below_gradients_and_training_run_every_layer() -> None:
    model = HookedVLM(*build("qwen3_vl", preset="tiny"), check=False)  # features enter later layers too
    a, b = example_batch(model.processor, seed=0), example_batch(model.processor, seed=7)
    heard: list[Any] = []
    edit = [("blocks.0.attn.hook_z", lambda z, *, hook: z * 0.5)]
    want = {"a": model(a), "b": model(b), "edited": model.run_with_hooks(a, fwd_hooks=edit)}
    assert not torch.equal(want["a"], want["edited"])
    with lower_layers_once(model) as below:

        def run(given: Any, same: int = 2, hooks: Any = ()) -> torch.Tensor:
            below.same_below(same)
            return model.run_with_hooks(given, fwd_hooks=hooks)

        assert torch.equal(run(a), want["a"])
        assert torch.equal(run(a), want["a"])
        spared = below.left_out
        assert spared == 2
        assert torch.equal(run(b), want["b"])
        assert torch.equal(run(a), want["a"])
        assert torch.equal(run(a, hooks=edit), want["edited"])
        run(a, hooks=[("blocks.1.hook_resid_post", lambda x, *, hook: heard.append(x.shape))])
        with torch.enable_grad():
            run(a)
        model.hf.train()
        run(a)
        model.hf.eval()
        assert below.left_out == spared
        assert len(heard) == 1
        assert torch.equal(run(a, same=1), want["a"])  # less is unchanged than what is kept
        assert below.left_out == spared
        assert torch.equal(run(a), want["a"])
        assert below.left_out == spared + 1


def test_the_first_pass_is_of_the_prompts_and_not_the_one_that_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HookedVLM(*build("llava", preset="tiny"), check=False)
    seen: list[int] = []
    model.anatomy.layers[-1].block.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    switches = Switches((((1, 0),), ((2, 0),)), "zero")
    _, _, spared = both_ways(monkeypatch, model, EPISODES, switches=switches, score="first_token", batch_size=2)
    assert spared == 1
    assert seen[0] == seen[1] == seen[2] == seen[-1] > max(seen[3:-1])  # two whole passes; the first of the others; the tries; the second


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_model_whose_layers_talk_past_the_stream_runs_whole(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """What the first layer says to the last moves the logits by less than bfloat16 is allowed elsewhere; rounding must not hide that it is lost."""
    hf, processor = build("llava", preset="tiny")
    model = HookedVLM(hf.to(dtype), processor, check=False)
    options: Any = {"switches": Switches(sets_of(model), "zero"), "batch_size": 2}
    assert both_ways(monkeypatch, model, EPISODES, **options)[2], "the control: without the whisper layers are left out"
    lower._TRIED.clear()
    inputs = check_inputs_for(model)
    plain, said = model(inputs).float(), []
    model.anatomy.layers[0].block.mlp.register_forward_hook(lambda m, args, out: said.append(True))
    model.anatomy.layers[2].block.mlp.register_forward_hook(lambda m, args, out: out + 0.05 if said and said.pop() else out)
    moved = float((model(inputs).float() - plain).abs().max() / plain.std())
    assert 0.01 < moved < tolerance(torch.bfloat16)
    whole, short, spared = both_ways(monkeypatch, model, EPISODES, **options)
    assert not spared
    assert_equal(whole, short)


@torch.no_grad()
def test_nothing_is_left_on_the_model_behind_an_error() -> None:
    model = HookedVLM(*build("llava", preset="tiny"), check=False)
    model(example_batch(model.processor))  # transformers leaves marks of its own in the first pass
    before = {path: set(vars(module)) for path, module in model.hf.named_modules()}

    def fail() -> None:
        with lower_layers_once(model) as below:
            below.same_below(2)
            model(example_batch(model.processor))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert {path: set(vars(module)) for path, module in model.hf.named_modules()} == before


def test_a_toy_runs_whole() -> None:
    model = untrained(n_heads=2)
    with lower_layers_once(model) as below:
        below.same_below(1)
    assert not below.blocks
