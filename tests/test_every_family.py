"""Every decoder-only family that transformers maps from pictures and text to text, as a tiny random checkpoint with a picture in the prompt.

Each promise of a hooked model is held against another path: the plain model, its own eager attention, a plain torch hook.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mechicl.errors import HeadIndexError, MissingInputError, OptionError, UnsupportedModelError
from mechicl.models.attention import AttentionCall, AttentionSession, attention_session, fused
from mechicl.models.families import FAMILIES as FACTS
from mechicl.models.families import Family, family_of
from mechicl.models.hooked import ActivationCache, check_heads
from mechicl.models.vlm import HookedVLM
from mechicl.training.organisms.every import EVERY, OUT_OF_SCOPE, build_every

PIXELS = ("pixel_values", "flattened_patches", "high_res_pixel_values")
OWN_EAGER_HIDDEN = ("blip-2", "instructblip", "instructblipvideo")
"""Their outputs wrap those of the language model."""


@cache
def hooked(family: str) -> HookedVLM:
    hf, inputs = build_every(family)
    return HookedVLM(hf, None, name=family, probe=inputs)


def prompt(family: str) -> dict[str, Any]:
    return dict(hooked(family).probe or {})


def finite(logits: Tensor) -> Tensor:
    """Logits without the tokens that a family forbids by the smallest number."""
    return torch.where(logits > -1e30, logits, torch.zeros(()))


@cache
def plain(family: str) -> Tensor:
    with torch.no_grad():
        return hooked(family).hf(**prompt(family), use_cache=False).logits


@cache
def run(family: str) -> tuple[Tensor, Any]:
    with torch.no_grad():
        return hooked(family).run_with_cache(prompt(family), positions="all")


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return float((finite(a) - finite(b)).abs().max() / finite(b).abs().max().clamp_min(1e-6))


def torch_hooks(model: HookedVLM) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())


def soft(family: str) -> list[int]:
    """Layers with softmax attention."""
    return [i for i, part in enumerate(hooked(family).anatomy.layers) if part.attention is not None]


def eager(family: str) -> list[Tensor]:
    """The family's own eager attentions, one per layer with softmax attention."""
    configs = hooked(family).anatomy.configs
    before = [c._attn_implementation for c in configs]
    for config in configs:
        config._attn_implementation_internal = "eager"
    try:
        with torch.no_grad():
            out = hooked(family).hf(**prompt(family), use_cache=False, output_attentions=True)
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
    found = out.language_model_outputs.attentions if family in OWN_EAGER_HIDDEN else out.attentions
    return [attention for attention in found if attention is not None]


def another_picture(family: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    return {k: v + torch.randn(v.shape, generator=generator) if k in PIXELS else v for k, v in prompt(family).items()}


families = pytest.mark.parametrize("family", EVERY)


def test_the_list_is_transformers_own_mapping() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    assert set(EVERY) | set(OUT_OF_SCOPE) == set(NAMES)
    assert len(EVERY) == 85  # 84 decoder-only families, and Mllama
    assert not set(EVERY) & set(OUT_OF_SCOPE)


@pytest.mark.parametrize("family", [f for f in EVERY if f != "mistral4"])  # transformers maps its text model
def test_the_fixture_sees_another_picture_gives_other_logits(family: str) -> None:
    with torch.no_grad():
        other = hooked(family).hf(**another_picture(family), use_cache=False).logits
    assert apart(other, plain(family)) > 1e-3


@families
def test_the_fixture_looks_somewhere_attention_is_not_flat(family: str) -> None:
    for layer in soft(family):
        pattern = run(family)[1]["pattern", layer]
        readable = (run(family)[1]["attn_scores", layer] > -torch.inf).sum(-1).expand(pattern.shape[:3])
        assert float((pattern.max(-1).values * readable)[readable > 1].mean()) > 1.3  # 1: the same everywhere


@families
def test_without_a_hook_the_logits_are_bit_equal(family: str) -> None:
    with torch.no_grad():
        assert torch.equal(hooked(family)(prompt(family), positions="all"), plain(family))


@families
def test_with_every_hook_read_the_logits_agree_every_hook_fires_and_nothing_is_left_behind(family: str) -> None:
    model = hooked(family)
    before = torch_hooks(model)
    with torch.no_grad():
        logits, cache = model.run_with_cache(prompt(family), positions="all")
    assert apart(logits, plain(family)) <= 1e-5  # one extra rounding per layer in float32
    assert set(cache.keys()) == set(model.hook_dict)
    assert torch_hooks(model) == before
    assert not any(c._attn_implementation == "mechicl" for c in model.anatomy.configs)


@families
def test_patterns_are_the_familys_own_eager_attention(family: str) -> None:
    found = eager(family)
    assert len(found) == len(soft(family))
    for layer, attention in zip(soft(family), found, strict=True):
        assert torch.allclose(run(family)[1]["pattern", layer], attention, atol=1e-5, rtol=0)


@families
def test_rows_sum_to_one_with_the_sink_where_there_is_one_and_masked_positions_get_nothing(family: str) -> None:
    model, calls = hooked(family), {}

    def keep(call: AttentionCall) -> Tensor:
        calls[id(call.module)] = call
        return fused(call)

    with attention_session(AttentionSession({}, default=keep), list(model.anatomy.configs)), torch.no_grad():
        model.hf(**prompt(family), use_cache=False)
    for layer in soft(family):
        pattern, scores = run(family)[1]["pattern", layer], run(family)[1]["attn_scores", layer]
        terms = calls[id(model.anatomy.layers[layer].attention)].terms
        sink = terms.get("sinks", terms.get("s_aux"))
        rest = torch.zeros(())
        if sink is not None:
            column = (sink.reshape(1, -1, 1, 1) if sink.dim() == 1 else sink).expand(*scores.shape[:3], 1)
            rest = (column - torch.cat([scores, column], -1).logsumexp(-1, keepdim=True)).exp()[..., 0]
            assert float(pattern.sum(-1).max()) < 1
        assert torch.allclose(pattern.sum(-1) + rest, torch.ones(()), atol=1e-5)
        assert float(pattern[scores == -torch.inf].abs().sum()) == 0


@families
def test_attention_rows_equal_the_patterns_rows(family: str) -> None:
    rows = hooked(family).attention_rows(prompt(family), "all", layers=soft(family))
    for layer in soft(family):
        # the rows' own forward is fused below them: another rounding per layer
        assert torch.allclose(rows[layer], run(family)[1]["pattern", layer], atol=2e-5, rtol=0)


@families
def test_zeroing_a_heads_z_equals_zeroing_its_slice_of_the_output_projections_input(family: str) -> None:
    model = hooked(family)
    for layer in (soft(family)[0], soft(family)[-1]):
        part = model.anatomy.layers[layer]

        def zero(z: Tensor, hook: Any) -> Tensor:
            z = z.clone()
            z[:, :, 1] = 0
            return z

        def slice_off(_: Any, args: Any, width: int = part.d_value) -> Any:
            x = args[0].clone()
            x[..., width : 2 * width] = 0
            return (x, *args[1:])

        with torch.no_grad():
            ours = model.run_with_hooks(prompt(family), fwd_hooks=[(f"blocks.{layer}.attn.hook_z", zero)], positions="all")
            handle = part.o_proj.register_forward_pre_hook(slice_off)
            theirs = model.hf(**prompt(family), use_cache=False).logits
            handle.remove()
        assert torch.equal(ours, theirs)
        assert apart(ours, plain(family)) > 1e-4


@families
@pytest.mark.parametrize("point", ["attn.hook_pattern", "attn.hook_attn_scores", "attn.hook_rot_k", "hook_resid_post"])
def test_an_edit_moves_the_logits_and_is_gone_afterwards(family: str, point: str) -> None:
    model, layer = hooked(family), soft(family)[0]

    def edit(x: Tensor, hook: Any) -> Tensor:
        if point == "attn.hook_pattern":
            return x.flip(1)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        return torch.where(x == -torch.inf, x, x + 3 * noise)

    with torch.no_grad():
        moved = model.run_with_hooks(prompt(family), fwd_hooks=[(f"blocks.{layer}.{point}", edit)], positions="all")
        assert apart(moved, plain(family)) > 1e-4
        assert torch.equal(model(prompt(family), positions="all"), plain(family))


@families
def test_no_hook_remains_after_an_exception(family: str) -> None:
    model = hooked(family)
    before = torch_hooks(model)

    def fail(x: Tensor, hook: Any) -> None:
        raise ZeroDivisionError

    for name in (f"blocks.{soft(family)[-1]}.attn.hook_pattern", "hook_embed", f"blocks.{soft(family)[0]}.attn.hook_z"):
        with pytest.raises(ZeroDivisionError):
            model.run_with_hooks(prompt(family), fwd_hooks=[(name, fail)])
    with torch.no_grad():
        assert torch.equal(model(prompt(family), positions="all"), plain(family))
    assert torch_hooks(model) == before


@families
def test_each_layer_adds_what_its_hooks_say_or_says_why_not(family: str) -> None:
    model, cache = hooked(family), run(family)[1]
    for layer in range(model.cfg.n_layers):
        names = [f"blocks.{layer}.hook_{name}" for name in ("attn_out", "mlp_out")]
        there = [name for name in names if name in model.hook_dict]
        gone = [model.unavailable[name] for name in names if name not in model.hook_dict]
        if all(reason.startswith("the layer has no") for reason in gone):
            added = sum(cache[name] for name in there)
            before, after = cache["resid_pre", layer], cache["resid_post", layer]
            assert float((before + added - after).abs().max()) <= 1e-5 * float(after.abs().max())
        else:
            with pytest.raises(UnsupportedModelError, match="sum of sublayers"):
                cache.decompose_resid()


@families
def test_heads_add_up_to_what_attention_adds_or_attribution_is_refused_by_name(family: str) -> None:
    model, cache = hooked(family), dict(run(family)[1].items())
    fresh = ActivationCache(cache, model)
    if model.not_additive:
        with pytest.raises(UnsupportedModelError, match="per-head attribution"):
            fresh.stack_head_results(layer=-1)
        return
    with torch.no_grad():
        fresh.compute_head_results()
        total = sum(fresh["result", layer].sum(2) for layer in range(model.cfg.n_layers))
        added = sum(fresh["attn_out", layer] - model.blocks[layer].attn.b_O for layer in range(model.cfg.n_layers))
    assert float((total - added).abs().max()) <= 1e-4 * float(added.abs().max())


@families
def test_the_final_norm_and_the_unembedding_give_the_logits_or_the_logit_lens_is_refused(family: str) -> None:
    model, (logits, cache) = hooked(family), run(family)
    found = model.anatomy.unembedding
    if found.norm is None or not found.known:
        with pytest.raises(UnsupportedModelError, match="logit lens"):
            model.tokens_to_residual_directions(7)
        return
    tokens = torch.arange(5, 95)
    with torch.no_grad():
        lens = cache["ln_final.hook_normalized"].float() @ model.tokens_to_residual_directions(tokens).T + model.logit_bias[tokens]
    lens = lens if found.cap is None else found.cap * torch.tanh(lens / found.cap)
    assert float((lens - logits[..., tokens]).abs().max()) <= 1e-4 * float(logits[..., tokens].abs().max())


@families
def test_replacing_the_image_features_hides_the_picture_except_where_it_has_another_way_in(family: str) -> None:
    model, facts = hooked(family), FACTS.get(family, Family())
    if "hook_image_features" not in model.hook_dict:
        with pytest.raises(KeyError, match=r"cop|not tokens"):
            model.run_with_hooks(prompt(family), fwd_hooks=[("hook_image_features", lambda x, hook: x)])
        return
    hide = [("hook_image_features", lambda x, hook: torch.zeros_like(x))]
    with torch.no_grad():
        one = model.run_with_hooks(prompt(family), fwd_hooks=hide, positions="all")
        two = model.run_with_hooks(another_picture(family), fwd_hooks=hide, positions="all")
    assert apart(one, plain(family)) > 1e-4
    assert (apart(one, two) > 1e-6) == facts.deepstack


@families
def test_a_missing_input_is_an_error_never_a_silent_fallback(family: str) -> None:
    for key in FACTS.get(family, Family()).required:
        with pytest.raises(MissingInputError, match=key):
            hooked(family)({k: v for k, v in prompt(family).items() if k != key})


@families
def test_no_other_input_can_be_lost_in_silence(family: str) -> None:
    for key in set(prompt(family)) - {"input_ids", "attention_mask", *PIXELS, *FACTS.get(family, Family()).required}:
        try:
            with torch.no_grad():
                without = hooked(family).hf(**{k: v for k, v in prompt(family).items() if k != key}, use_cache=False).logits
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
            continue  # transformers says so itself
        assert apart(without, plain(family)) <= 1e-5, key


def test_with_short_queries_the_last_layers_hooks_hold_the_last_token_only() -> None:
    model, layer = (
        hooked("gemma4"),
        hooked("gemma4").cfg.n_layers - 1,
    )  # shares the keys of an earlier layer, so it runs on what is asked for
    seen = {}
    names = [f"blocks.{layer}.attn.hook_pattern", f"blocks.{layer}.attn.hook_z", "blocks.0.attn.hook_pattern"]
    with model.hooks(fwd_hooks=[(name, lambda x, hook, name=name: seen.__setitem__(name, x)) for name in names]):
        first = model.generate(prompt("gemma4"), max_new_tokens=1)
    assert int(first) == int(plain("gemma4")[0, -1].argmax())
    assert seen[names[0]].shape[2] == 1
    assert torch.allclose(seen[names[0]][:, :, 0], run("gemma4")[1]["pattern", layer][:, :, -1], atol=1e-5)
    assert torch.allclose(seen[names[1]][:, 0], run("gemma4")[1]["z", layer][:, -1], atol=1e-4)
    assert seen[names[2]].shape == run("gemma4")[1]["pattern", 0].shape


@pytest.mark.parametrize("family", ["dots3_note", "mistral_large4", "minimax_m3_vl", "qwen4_exp", "glm5_next"])
def test_sparse_selection_leaves_keys_out_that_causality_allows(family: str) -> None:
    rows = [(run(family)[1]["attn_scores", layer] > -torch.inf).sum(-1)[0] for layer in soft(family)]
    causal = torch.arange(rows[0].shape[-1]) + 1
    assert any(bool((row < causal).any()) for row in rows)
    assert all(bool((row <= causal).all()) for row in rows)


def test_an_indexer_that_does_not_tell_its_blocks_is_refused() -> None:
    from mechicl.models.selection import selected

    x = torch.zeros(1, 2, 8, 4)
    with pytest.raises(UnsupportedModelError, match="block_size"):
        selected(torch.nn.Identity(), x, x, {"block_indices": torch.zeros(1, 1, 8, 2, dtype=torch.long)})


def test_weights_of_layers_unlike_each_other_are_not_stacked() -> None:
    with pytest.raises(UnsupportedModelError, match="layer by layer"):
        hooked("step3p7").W_Q
    with pytest.raises(UnsupportedModelError, match="no softmax attention"):
        hooked("lfm2_vl").W_O


@families
def test_the_docs_line_is_current(family: str) -> None:
    from mechicl.training.organisms.every.table import line

    page = (Path(__file__).parents[1] / "docs" / "families.md").read_text()
    assert line(family, hooked(family)) in page, "run: python -m mechicl.training.organisms.every docs/families.md"


@families
def test_heads_outside_their_layer_are_refused(family: str) -> None:
    model = hooked(family)
    for layer, part in enumerate(model.anatomy.layers):
        if part.attention is None:
            with pytest.raises(HeadIndexError, match="no softmax attention"):
                check_heads(model, [(layer, 0)])
        else:
            assert check_heads(model, [(layer, part.n_heads - 1)]) == [(layer, part.n_heads - 1)]
            with pytest.raises(HeadIndexError):
                check_heads(model, [(layer, part.n_heads)])


@pytest.mark.parametrize("family", OUT_OF_SCOPE)
def test_what_is_out_of_scope_is_refused_by_name_with_what_to_do(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"'{family}'.*nnsight"):
        family_of(SimpleNamespace(model_type=family))
    with pytest.raises(OptionError, match=family):
        build_every(family)
