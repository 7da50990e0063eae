"""Pieces of decoders called by themselves: each against the hook points of a full run, in every family and on toys; gradients; refusals."""

from functools import cache
from typing import Any

import pytest
import torch
from conftest import example_batch

from mechicl.errors import OptionError, UnsupportedModelError
from mechicl.models import streams
from mechicl.models.planted import untrained
from mechicl.models.toys.model import ToyTransformer, toy_config
from mechicl.models.vlm import HookedVLM
from mechicl.training.organisms import FAMILIES, build

TOYS = {
    "rope, swiglu": {"positions": "rope", "norm": "RMS", "mlp": "swiglu", "n_layers": 2},
    "biases, layer norm, gelu": {"positions": "learned", "norm": "LN", "mlp": "gelu", "qkv_bias": True, "n_layers": 2},
    "alibi, no norm, silu": {"positions": "alibi", "mlp": "silu", "n_layers": 2},
    "product, no projection": {"mlp": "product", "norm": "RMS", "output_projection": False, "d_model": 32, "d_head": 16},
    "classifier": {"classifier": "mlp", "norm": "LN", "inputs": "vectors", "d_input": 16, "positions": "one_hot", "n_places": 20},
}


@cache
def hooked(family: str) -> HookedVLM:
    return HookedVLM(*build(family, preset="tiny"), name=family)


@cache
def toy(name: str) -> tuple[ToyTransformer, Any]:
    model = ToyTransformer(toy_config(**TOYS[name]), seed=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # biases and norm weights that matter
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    if model.cfg.inputs == "vectors":
        return model, torch.randn(3, 9, 16, generator=generator)
    return model, torch.randint(0, 60, (3, 9), generator=generator)


def spread(x: torch.Tensor) -> float:
    return float(x.std())


def everything(model: Any, batch: Any) -> tuple[torch.Tensor, Any]:
    with torch.no_grad():
        return model.run_with_cache(batch, positions="all")


def compare(model: Any, batch: Any) -> set[str]:
    """Every piece of every layer against the cache of a full run; what was compared."""
    logits, cache_ = everything(model, batch)
    compared = set()
    n = model.cfg.n_layers
    for layer in range(n):
        at = f"blocks.{layer}."
        pre = cache_[at + "hook_resid_pre"]
        for kind in ("q", "k", "v"):
            if streams.why_not(model, layer, kind):
                continue
            want = cache_[f"{at}attn.hook_{kind}"]
            assert torch.allclose(streams.read(model, layer, kind, pre), want, atol=1e-5 * spread(want) + 1e-6), (layer, kind)
            compared.add(kind)
        if not streams.why_not(model, layer, "heads"):
            z, out = cache_[at + "attn.hook_z"], cache_[at + "hook_attn_out"]
            bias = model.blocks[layer].attn.b_O if isinstance(model, HookedVLM) else 0.0
            parts = streams.head_outputs(model, layer, z)
            assert parts.shape == (*z.shape[:3], model.cfg.d_model)
            assert torch.allclose(parts.sum(2) + bias, out, atol=1e-4 * spread(out)), layer
            compared.add("heads")
        if streams.has_mlp(model, layer) and not streams.why_not(model, layer, "mlp"):
            want = cache_[at + "hook_mlp_out"]
            assert torch.allclose(streams.mlp(model, layer, cache_[at + "hook_resid_mid"]), want, atol=1e-4 * spread(want)), layer
            compared.add("mlp")
    again = streams.unembed(model, cache_[f"blocks.{n - 1}.hook_resid_post"])
    assert torch.allclose(again, logits, atol=1e-4 * spread(logits))
    return compared


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_pieces_give_what_hook_points_hold_in_every_family(name: str) -> None:
    model = hooked(name)
    compared = compare(model, example_batch(model.processor))
    assert {"q", "k", "v", "mlp"} <= compared
    assert ("heads" in compared) == (name not in ("gemma3", "paligemma2"))  # of mllama, the layers that do not read pictures


@torch.no_grad()
@pytest.mark.parametrize("name", TOYS)
def test_pieces_give_what_hook_points_hold_on_toys(name: str) -> None:
    model, batch = toy(name)
    assert {"q", "k", "v", "heads"} <= compare(model, batch)


def test_gradients_pass_through_every_piece() -> None:
    for model in (hooked("qwen3_vl"), toy("rope, swiglu")[0]):
        stream = torch.randn(2, 5, model.cfg.d_model, requires_grad=True)
        z = torch.randn(2, 5, model.cfg.n_heads, model.cfg.d_head, requires_grad=True)
        total = sum(streams.read(model, 1, kind, stream).pow(2).sum() for kind in ("q", "k", "v"))
        total = total + streams.mlp(model, 1, stream).sum() + streams.unembed(model, stream).sum() + streams.head_outputs(model, 0, z).sum()
        total.backward()
        assert stream.grad is not None
        assert z.grad is not None
        assert float(stream.grad.abs().min()) > 0
        assert float(z.grad.abs().sum()) > 0


def test_head_outputs_take_any_leading_axes() -> None:
    model = toy("rope, swiglu")[0]
    z = torch.randn(4, 2, 3, 5, model.cfg.n_heads, model.cfg.d_head)
    with torch.no_grad():
        assert torch.allclose(streams.head_outputs(model, 0, z)[1, 0, 2], streams.head_outputs(model, 0, z[1, 0, 2]), atol=1e-5)


def test_layers_without_an_mlp_add_nothing() -> None:
    model = untrained()
    x = torch.randn(1, 4, model.cfg.d_model)
    assert not streams.has_mlp(model, 0)
    assert float(streams.mlp(model, 0, x).abs().max()) == 0


def test_what_a_family_cannot_give_is_refused() -> None:
    z = torch.zeros(1, 3, hooked("gemma3").cfg.n_heads, hooked("gemma3").cfg.d_head)
    with pytest.raises(UnsupportedModelError, match="norm"):
        streams.head_outputs(hooked("gemma3"), 0, z)
    model = hooked("mllama")
    cross = next(layer for layer, part in enumerate(model.anatomy.layers) if part.cross)
    with pytest.raises(UnsupportedModelError, match="pictures"):
        streams.read(model, cross, "k", torch.zeros(1, 3, model.cfg.d_model))
    with pytest.raises(UnsupportedModelError, match="gates"):
        streams.mlp(model, cross, torch.zeros(1, 3, model.cfg.d_model))
    with pytest.raises(OptionError, match="kind"):
        streams.read(model, 0, "z", torch.zeros(1, 3, model.cfg.d_model))
    with pytest.raises(OptionError, match="layer"):
        streams.mlp(untrained(mlp="silu"), 2, torch.zeros(1, 3, 64))
