"""Models in half precision, packed into integers or offloaded to the disk: the same numbers, or a refusal by name."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mechicl
from mechicl.data import concepts
from mechicl.errors import NotFiniteError, OptionError, UnsupportedModelError
from mechicl.models.check import EIGHT_BITS, check_inputs_for, check_parity, compare, limit_of, tolerance
from mechicl.models.doctor import diagnose
from mechicl.models.guards import PrecisionWarning, check_numbers, disagreement, watched
from mechicl.models.load import demo_folder, load
from mechicl.models.stored import dense, lead_device, packed, place
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.corrupt import minimal_pairs

QUIET: dict[str, Any] = {"progress": False, "seed": 0, "batch_size": 2}
HEADS = ((1, 0), (2, 1))
LAYERS = "model.language_model.layers"


def fresh(dtype: torch.dtype) -> tuple[Any, Any]:
    """The bundled checkpoint, its own copy."""
    folder = demo_folder()
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval(), AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def plain() -> Any:
    return load("demo")


@pytest.fixture(scope="module")
def episodes() -> list[Any]:
    return concepts.draw(4, classes=2, shots=1, size=28, seed=3, syllables=(2, 2))


class TestOverflow:
    def test_a_layer_that_overflows_in_float16_is_named_and_bfloat16_holds_it(self, episodes: list[Any]) -> None:
        hf, processor = fresh(torch.float16)
        with torch.no_grad():
            hf.get_decoder().layers[2].mlp.down_proj.weight.mul_(3e4)
        with pytest.raises(NotFiniteError, match=r"layer 2.*layers\.2\.mlp\.down_proj"):
            HookedVLM(hf, processor)
        model = HookedVLM(hf, processor, check=False)
        with pytest.raises(NotFiniteError, match="layer 2"):
            mechicl.icl_accuracy(model, episodes, **QUIET)
        with watched(HookedVLM(hf.to(torch.bfloat16), processor, check=False)) as watch:
            hf(**check_inputs_for(HookedVLM(hf, processor, check=False)), use_cache=False)
        watch.check()

    def test_values_near_the_largest_number_are_a_note_in_every_result(self, episodes: list[Any]) -> None:
        hf, processor = fresh(torch.float16)
        model = HookedVLM(hf, processor)
        assert not any("largest number" in note for note in mechicl.icl_accuracy(model, episodes, **QUIET).notes)  # the control
        handle = hf.get_decoder().layers[1].register_forward_hook(lambda _, __, out: near(out))
        try:
            result = mechicl.icl_accuracy(model, episodes, **QUIET)
            with pytest.warns(PrecisionWarning, match="layer 1"):
                check_numbers(model, check_inputs_for(model))
        finally:
            handle.remove()
        assert any("largest number of float16, first in the output of layer 1" in note for note in result.notes)

    def test_the_watch_leaves_no_hook_behind_and_changes_nothing(self, plain: Any, episodes: list[Any]) -> None:
        batch = plain.render(episodes[:1])
        before = plain(batch)
        with watched(plain) as watch:
            inside = plain(batch)
        assert torch.equal(before, inside)
        assert len(watch.values()) == plain.cfg.n_layers + 2
        assert all(not part.block._forward_hooks for part in plain.anatomy.layers)


def near(out: Any) -> Any:
    """One value of a layer's output becomes 40,000: float16 holds up to 65,504."""
    x = (out if isinstance(out, torch.Tensor) else out[0]).clone()
    x[:, 0, 0] = 4e4
    return x if isinstance(out, torch.Tensor) else (x, *out[1:])


class TestImplementations:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_sound_ones_differ_as_rounding_explains_and_a_wrong_one_does_not(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = HookedVLM(*fresh(dtype), check=False)
        inputs = check_inputs_for(model)
        sound = disagreement(model, inputs)
        assert sound.ok
        right = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def wrong(module: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
            return right(module, 0.2 * query, *args, **kwargs)

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", wrong)
        found = disagreement(model, inputs)
        assert not found.ok
        assert found.value > 2 * found.limit
        if dtype != torch.float32:
            with pytest.warns(PrecisionWarning, match="rounding explains"):
                check_numbers(model, inputs)
        assert [c.ok for c in diagnose(model) if "agree as rounding" in c.name] == [False]


def offloaded(tmp_path: Path, where: str) -> Any:
    """The bundled model with some or all of it on the disk."""
    some: dict[str, Any] = {
        "model.visual": "cpu", "model.language_model.embed_tokens": "cpu", "model.language_model.norm": "cpu", "lm_head": "cpu",
        "model.language_model.rotary_emb": "cpu", f"{LAYERS}.0": "cpu", f"{LAYERS}.1": "disk", f"{LAYERS}.2": "disk", f"{LAYERS}.3": "cpu",
    }  # fmt: skip
    return load("demo", device_map=some if where == "some" else {"": "disk"}, offload_folder=tmp_path)


ANALYSES: dict[str, Any] = {
    "score_heads": lambda m, e: mechicl.score_heads(m, e, scores=("induction",), n_null=39, **QUIET),
    "ablate": lambda m, e: mechicl.ablate(m, e, HEADS, "zero", n_random=1, **QUIET),
    "direct_logits": lambda m, e: mechicl.direct_logits(m, e, **QUIET),
    "patch": lambda m, e: mechicl.patch(m, minimal_pairs(m.renderer, e, "swap_labels"), sites=["z"], layers=[2], **QUIET),
    "attribute": lambda m, e: mechicl.attribute(m, minimal_pairs(m.renderer, e, "swap_labels"), sites=["z"], layers=[2], **QUIET),
    "eap": lambda m, e: mechicl.eap(m, minimal_pairs(m.renderer, e, "swap_labels"), **QUIET),
}


def numbers(result: Any) -> np.ndarray:
    return result.to_frame().select_dtypes("number").to_numpy(dtype=float)


@pytest.mark.parametrize("where", ["some", "all"])
def test_an_offloaded_model_reads_its_weights_and_answers_bit_for_bit(where: str, tmp_path: Path, plain: Any, episodes: list[Any]) -> None:
    model = offloaded(tmp_path, where)
    assert any(p.device.type == "meta" for p in model.hf.parameters())
    assert model.device == torch.device("cpu")
    batch = plain.render(episodes[:2])
    assert torch.equal(model(batch), plain(batch))
    for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_O", "W_E", "W_U", "b_U"):
        assert torch.equal(getattr(model, name), getattr(plain, name)), name
    for mine, theirs in zip(model.blocks, plain.blocks, strict=True):
        assert torch.equal(mine.ln1.w, theirs.ln1.w)
    assert any(p.device.type == "meta" for p in model.hf.parameters())  # read, and dropped again
    for name in ("score_heads", "ablate"):
        assert np.array_equal(numbers(ANALYSES[name](model, episodes)), numbers(ANALYSES[name](plain, episodes)), equal_nan=True), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ANALYSES)
def test_analyses_of_an_offloaded_model_are_those_of_the_model(name: str, tmp_path: Path, plain: Any, episodes: list[Any]) -> None:
    found, expected = (numbers(ANALYSES[name](m, episodes)) for m in (offloaded(tmp_path, "all"), plain))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_placeholders_without_a_home_are_refused() -> None:
    with torch.device("meta"):
        linear = nn.Linear(4, 4)
    with pytest.raises(UnsupportedModelError, match="placeholders"):
        dense(linear)


class Packed(nn.Linear):
    """A stand-in for a linear map kept in 8 bits: rows of integers with a scale each."""

    def __init__(self, given: nn.Linear) -> None:
        super().__init__(given.in_features, given.out_features, bias=given.bias is not None)
        scale = given.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((given.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        if given.bias is not None:
            self.bias = nn.Parameter(given.bias.detach(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def test_packed_weights_are_read_as_the_layer_applies_them(episodes: list[Any]) -> None:
    hf, processor = fresh(torch.float32)
    for layer in hf.get_decoder().layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Packed(getattr(layer.self_attn, name)))
    model = HookedVLM(hf, processor)
    part = model.anatomy.layers[1].o_proj
    assert isinstance(part, Packed)
    assert packed(part)
    expected = (part.weight.float() * part.scale).T.unflatten(0, (model.cfg.n_heads, -1))
    torch.testing.assert_close(model.blocks[1].attn.W_O, expected, atol=1e-6, rtol=1e-5)
    _, cache = model.run_with_cache(model.render(episodes[:1]))
    z, out = cache["blocks.1.attn.hook_z"], cache["blocks.1.hook_attn_out"]
    again = torch.einsum("bphd,hdm->bpm", z, model.blocks[1].attn.W_O) + model.blocks[1].attn.b_O
    torch.testing.assert_close(again, out, atol=1e-5, rtol=1e-4)
    assert mechicl.score_heads(model, episodes, scores=("induction",), n_null=39, **QUIET).n == 4


def test_bitsandbytes_in_8_bits_on_this_machine(plain: Any, episodes: list[Any]) -> None:
    pytest.importorskip("bitsandbytes")
    model = load("demo", quantize="8bit", check=False)
    linear = model.anatomy.layers[1].o_proj
    assert linear.weight.dtype == torch.int8
    off = (model.blocks[1].attn.W_O - plain.blocks[1].attn.W_O).abs().max() / plain.blocks[1].attn.W_O.abs().max()
    assert float(off.detach()) < 0.02  # one step of 127, and half precision
    found, expected = (mechicl.icl_accuracy(m, episodes, zero_shot=False, **QUIET).margins for m in (model, plain))
    assert np.abs(found - expected).max() < 0.5 * np.abs(expected).max()


def test_rounding_in_8_bits_is_not_held_against_a_model_and_a_wrong_mask_is(plain: Any) -> None:
    """Where a step of an input turns, two sound runs of the same integers differ by more than float32 explains: what the load-time check must let pass."""
    pytest.importorskip("bitsandbytes")
    model = load("demo", quantize="8bit", dtype="float32", check=False)
    assert (limit_of(model.hf), limit_of(plain.hf)) == (EIGHT_BITS, tolerance(torch.float32))
    found = []
    for seed in (100, 101, 102):
        batch = model.render(concepts.draw(4, classes=4, shots=3, size=28, seed=seed))
        found.append(compare(model, dict(batch.inputs))["difference"])
    assert max(found) <= 0.1 * EIGHT_BITS  # measured: 4e-7 for most prompts, 2.5e-3 where one turned
    check_parity(model)
    with ExitStack() as stack, torch.no_grad():
        for part in model.anatomy.layers:  # each token reads one place further back: the sort of error the check is for
            assert part.attention is not None
            stack.callback(part.attention.register_forward_pre_hook(_shifted, with_kwargs=True).remove)
        wrong = model.hf(**check_inputs_for(model), use_cache=False).logits[:, -1].float()
        stack.close()
        right = model.hf(**check_inputs_for(model), use_cache=False).logits[:, -1].float()
    assert float((wrong - right).abs().max() / right.std()) > 5 * EIGHT_BITS


def _shifted(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].roll(1, 1)}


def test_options_that_need_another_are_refused(untyped: None) -> None:
    with pytest.raises(OptionError, match="device_map"):
        load("demo", max_memory={"cpu": "1GiB"})
    with pytest.raises(OptionError, match="quantize must be one of 8bit, 4bit"):
        load("demo", quantize="2bit")  # pyright: ignore[reportArgumentType]


def test_where_a_module_computes() -> None:
    assert place(nn.Linear(2, 2)) == torch.device("cpu")
    assert lead_device(fresh(torch.float32)[0]) == torch.device("cpu")
