"""Every family, on a tiny random checkpoint with two pictures in the prompt: the promises of a hooked model, each held against another path."""

from functools import cache
from typing import Any

import pytest
import torch

from mechicl.errors import MissingInputError, UnsupportedModelError
from mechicl.models.families import FAMILIES as FACTS
from mechicl.models.probe import picture
from mechicl.models.vlm import HookedVLM
from mechicl.training.organisms import FAMILIES, build

ADDITIVE = [f for f in FAMILIES if f not in ("gemma3", "paligemma2", "mllama")]


@cache
def hooked(family: str) -> HookedVLM:
    return HookedVLM(*build(family, preset="tiny"), name=family)


@cache
def prompt(family: str, rows: int = 1, side: str = "left") -> dict[str, Any]:
    """Two pictures of different size per row, and texts of different length, so that a batch is padded."""
    processor = hooked(family).processor
    texts = ["what is this", "what is this, and which of the two is the larger one?"][:rows]
    pictures = [[picture((64, 48), 2 * k), picture((56, 90), 2 * k + 1)] for k in range(rows)]
    if processor.chat_template:
        chats = [
            [{"role": "user", "content": [*({"type": "image"} for _ in p), {"type": "text", "text": t}]}]
            for p, t in zip(pictures, texts, strict=True)
        ]
        texts = [processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
        extra = {"add_special_tokens": False}
    else:
        texts, extra = [processor.image_token * 2 + t for t in texts], {}
    out = processor(
        text=texts, images=pictures, return_tensors="pt", padding=True, padding_side=side, return_mm_token_type_ids=True, **extra
    )
    return {k: v for k, v in out.items() if k != "labels"}


def plain(family: str, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return hooked(family).hf(**inputs, use_cache=False).logits


def torch_hooks(model: HookedVLM) -> int:
    """How many torch hooks sit on the Hugging Face model (transformers and nnsight may leave some of their own)."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.hf.modules())


def eager_patterns(family: str, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """The independent path: transformers' own eager attention, asked for its attentions."""
    hf = hooked(family).hf
    configs = hooked(family).anatomy.configs
    before = [c._attn_implementation for c in configs]
    for config in configs:
        config._attn_implementation_internal = "eager"
    try:
        with torch.no_grad():
            return list(hf(**inputs, use_cache=False, output_attentions=True).attentions)
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_hook_the_logits_are_bit_equal(family: str) -> None:
    inputs = prompt(family, 2)
    with torch.no_grad():
        assert torch.equal(hooked(family)(inputs, positions="all"), plain(family, inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_with_every_hook_read_the_logits_agree_and_nothing_is_left_behind(family: str) -> None:
    model, inputs = hooked(family), prompt(family, 2)
    before = torch_hooks(model)
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs, positions="all")
    real = inputs["attention_mask"].bool()
    # 1e-5 of the largest logit: one extra rounding per layer in float32
    assert (logits - plain(family, inputs))[real].abs().max() <= 1e-5 * plain(family, inputs).abs().max()
    assert set(cache.keys()) == set(model.hook_dict)
    assert torch_hooks(model) == before
    assert not any(c._attn_implementation == "mechicl" for c in model.anatomy.configs)


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_equal_eager_attention_and_never_touch_masked_positions(family: str) -> None:
    model, inputs = hooked(family), prompt(family, 2)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=lambda n: n.endswith(("hook_pattern", "hook_attn_scores")))
    real = inputs["attention_mask"].bool()
    for layer, eager in enumerate(eager_patterns(family, inputs)):
        pattern = cache["pattern", layer]
        assert torch.allclose(pattern.sum(-1)[real[:, None].expand(pattern.shape[:3])], torch.ones(()), atol=1e-5)
        if not model.anatomy.layers[layer].cross:
            assert pattern.masked_select(~real[:, None, None, :].expand(pattern.shape)).abs().max() == 0
        assert pattern[cache["attn_scores", layer] == -torch.inf].abs().sum() == 0
        rows = real[:, None, :, None].expand(pattern.shape)
        assert (pattern - eager).abs()[rows].max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_attention_rows_equal_eager_rows_and_leave_the_output_fused(family: str, side: str) -> None:
    model, inputs = hooked(family), prompt(family, 2, side)
    n = inputs["input_ids"].shape[1]
    own = inputs["attention_mask"].flip(1).argmax(1)
    dest = torch.stack([n - 1 - own, n - 3 - own], 1)
    rows = model.attention_rows(inputs, dest)
    reduced = model.attention_rows(inputs, dest, reduce=lambda layer, positions, chunk: chunk.sum(-1))
    for layer, eager in enumerate(eager_patterns(family, inputs)):
        if rows[layer] is None:
            assert model.anatomy.layers[layer].cross
            continue
        assert (rows[layer] - eager.gather(2, dest[:, None, :, None].expand(-1, eager.shape[1], -1, n))).abs().max() <= 1e-5
        assert torch.allclose(torch.cat(reduced[layer], 2), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_zeroing_a_head_equals_zeroing_its_slice_of_the_output_projection(family: str) -> None:
    model, inputs = hooked(family), prompt(family)
    layer, head = model.cfg.n_layers - 1, 1
    part = model.anatomy.layers[layer]

    def zero(z: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.cat([z[:, :, :head], torch.zeros_like(z[:, :, :1]), z[:, :, head + 1 :]], 2)

    def slice_off(_: Any, args: Any) -> Any:
        x = args[0].clone()
        x[..., head * part.d_value : (head + 1) * part.d_value] = 0
        return (x, *args[1:])

    with torch.no_grad():
        ours = model.run_with_hooks(inputs, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", zero)], positions="all")
    handle = part.o_proj.register_forward_pre_hook(slice_off)
    theirs = plain(family, inputs)
    handle.remove()
    assert torch.equal(ours, theirs)
    assert (ours - plain(family, inputs)).abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "point",
    ["attn.hook_pattern", "attn.hook_attn_scores", "attn.hook_q", "attn.hook_rot_k", "attn.hook_v", "hook_resid_mid", "hook_attn_out"],
)
def test_an_edit_moves_the_logits_and_is_gone_afterwards(family: str, point: str) -> None:
    model, inputs = hooked(family), prompt(family)
    name = f"blocks.0.{point}"

    def edit(x: torch.Tensor, hook: Any) -> torch.Tensor:
        if point == "attn.hook_pattern":
            return x.flip(1)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        return torch.where(x == -torch.inf, x, x + 3 * noise)

    with torch.no_grad():
        moved = model.run_with_hooks(inputs, fwd_hooks=[(name, edit)])
        assert (moved - plain(family, inputs)[:, -1:]).abs().max() > 1e-4
        assert torch.equal(model(inputs, positions="all"), plain(family, inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_editing_the_middle_of_the_stream_to_another_runs_value_gives_that_runs_output(family: str) -> None:
    model, inputs = hooked(family), prompt(family)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0) * 0.5}
    name = f"blocks.{model.cfg.n_layers - 1 if family != 'mllama' else 0}.hook_resid_mid"
    if family == "mllama":
        name = "blocks.2.hook_resid_mid"
    with torch.no_grad():
        want, cache = model.run_with_cache(other, names_filter=[name], positions="all")
        got = model.run_with_hooks(inputs, fwd_hooks=[(name, lambda x, hook: cache[name])], positions="all")
        base = model(inputs, positions="all")
    if family == "mllama":  # layer 3 reads the picture again by cross-attention, so only the change is checked
        assert (got - base).abs().max() > 1e-5
    else:
        assert (got - want).abs().max() <= 2e-5 * want.abs().max()  # (a + b) - a + a: two roundings
        assert (base - want).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_values_agree_with_nnsight(family: str) -> None:
    model, inputs = hooked(family), prompt(family)
    last = model.cfg.n_layers - 1
    names = [f"blocks.{last}.hook_resid_post", f"blocks.{last}.attn.hook_z"]
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=names)
    from mechicl.models.recording import decoder_layers

    path = next(n for n, m in model.hf.named_modules() if m is decoder_layers(model.hf)[last])
    attention = next(n for n, m in model.hf.named_modules() if m is model.anatomy.layers[last].o_proj)
    with torch.no_grad(), model.trace(inputs):
        z = model.nnsight.get(attention).input.save()
        out = model.nnsight.get(path).output.save()
    post = out if isinstance(out, torch.Tensor) else out[0]
    assert torch.equal(cache[names[1]].flatten(2), z)
    assert torch.equal(cache[names[0]], post)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_equals_the_plain_models_with_left_padding(family: str) -> None:
    model, inputs = hooked(family), prompt(family, 2)
    with torch.no_grad():
        if family not in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
            inputs = {k: v for k, v in inputs.items() if k != "mm_token_type_ids"}
        theirs = model.hf.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(model.generate(inputs, max_new_tokens=4), theirs)
    read = []
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", lambda x, hook: read.append(x.shape))]):
        assert torch.equal(model.generate(inputs, max_new_tokens=4), theirs)
    assert len(read) == theirs.shape[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_changes_nothing(family: str) -> None:
    model = hooked(family)
    with torch.no_grad():
        alone, padded = model(prompt(family, 1)), model(prompt(family, 2))
    if family in (
        "llava_next",
        "mllama",
        "idefics3",
        "smolvlm",
        "llava_onevision",
        "mistral3",
    ):  # other rows' pictures are padded to this one's
        assert (alone[0] - padded[0]).abs().max() <= 1e-4 * alone.abs().max()
    else:
        assert (alone[0] - padded[0]).abs().max() <= 1e-5 * alone.abs().max()


@pytest.mark.parametrize("family", [f for f in FAMILIES if FACTS.get(f) and FACTS[f].required])
def test_a_missing_positional_input_is_an_error(family: str) -> None:
    for key in FACTS[family].required:
        with pytest.raises(MissingInputError, match=key):
            hooked(family)({k: v for k, v in prompt(family).items() if k != key})


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mllama"])
def test_image_features_are_the_embeddings_at_the_image_tokens_and_can_be_replaced(family: str) -> None:
    model, inputs = hooked(family), prompt(family)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=["hook_image_features", "hook_embed"])
        zeroed = model.run_with_hooks(inputs, fwd_hooks=[("hook_image_features", lambda x, hook: torch.zeros_like(x))])
        _, after = model.run_with_cache(inputs, names_filter="hook_embed")
    from mechicl.models.families import image_token_id

    mask = inputs["input_ids"] == image_token_id(model.hf.config)
    assert torch.equal(cache["hook_image_features"], cache["hook_embed"][mask])
    assert (zeroed - plain(family, inputs)[:, -1:]).abs().max() > 1e-4
    assert torch.equal(after["hook_embed"], cache["hook_embed"])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_hook_remains_after_an_exception(family: str) -> None:
    model, inputs = hooked(family), prompt(family)

    before = torch_hooks(model)

    def fail(x: torch.Tensor, hook: Any) -> None:
        raise ZeroDivisionError

    for name in ("blocks.1.attn.hook_pattern", "hook_embed", "blocks.0.attn.hook_z"):
        with pytest.raises(ZeroDivisionError):
            model.run_with_hooks(inputs, fwd_hooks=[(name, fail)])
    with torch.no_grad():
        assert torch.equal(model(inputs, positions="all"), plain(family, inputs))
    assert torch_hooks(model) == before


@pytest.mark.parametrize("family", ADDITIVE)
def test_head_results_and_logit_attributions_add_up(family: str) -> None:
    model, inputs = hooked(family), prompt(family)
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs)
        heads = cache.stack_head_results(layer=-1)
        added = sum(cache["attn_out", layer] - model.blocks[layer].attn.b_O for layer in range(model.cfg.n_layers))
        token = int(logits[0, -1].argmax())
        shares = cache.logit_attrs(cache.accumulated_resid(layer=-1)[-1:], token)
    assert (heads.sum(0) - added).abs().max() <= 1e-4
    assert abs(float(shares[0, 0, -1]) - float(logits[0, -1, token])) <= 1e-4 * float(logits.abs().max())


@pytest.mark.parametrize("family", ["gemma3", "paligemma2", "mllama"])
def test_attribution_is_refused_by_name_where_heads_are_not_what_is_added(family: str) -> None:
    model = hooked(family)
    with torch.no_grad():
        _, cache = model.run_with_cache(prompt(family))
    with pytest.raises(UnsupportedModelError, match=r"layers \["):
        cache.stack_head_results(layer=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_under_transformerlens_names_are_views_that_reproduce_the_projections(family: str) -> None:
    model, inputs = hooked(family), prompt(family)
    attn = model.blocks[0].attn
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=["blocks.0.attn.hook_v", "blocks.0.ln1.hook_normalized"])
        x = cache["blocks.0.ln1.hook_normalized"] * model.blocks[0].ln1.w
        v = torch.einsum("bpm,hmd->bphd", x, attn.W_V) + attn.b_V
    assert (v - cache["blocks.0.attn.hook_v"]).abs().max() <= 1e-4 * v.abs().max()
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        weight = getattr(attn, name)
        assert weight.untyped_storage().data_ptr() in {p.untyped_storage().data_ptr() for p in model.hf.parameters()}
    assert model.W_U.shape == (model.cfg.d_model, model.cfg.d_vocab)
    assert model.W_O.shape == (model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_head, model.cfg.d_model)


def test_a_refused_family_is_refused_by_name_with_the_reason() -> None:
    from transformers import GitConfig

    from mechicl.models.families import family_of

    with pytest.raises(UnsupportedModelError, match="written inline"):
        family_of(GitConfig())


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_long_prompt_with_many_pictures_equal_eager_rows(family: str) -> None:
    model = hooked(family)
    pictures = [picture((64 + 8 * k, 48 + 4 * k), k) for k in range(6)]
    text = "and another one, which is not the last of them all, but one of many " * 3
    if model.processor.chat_template:
        chat = [{"role": "user", "content": [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]}]
        text, extra = model.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False), {"add_special_tokens": False}
    else:
        text, extra = model.processor.image_token * 6 + text, {}
    out = model.processor(text=[text], images=[pictures], return_tensors="pt", return_mm_token_type_ids=True, **extra)
    inputs = {k: v for k, v in out.items() if k != "labels"}
    rows = model.attention_rows(inputs)
    for layer, eager in enumerate(eager_patterns(family, inputs)):
        if rows[layer] is not None:
            assert (rows[layer][:, :, 0] - eager[:, :, -1]).abs().max() <= 1e-5


def test_sliding_windows_and_bidirectional_picture_blocks_are_in_the_rows() -> None:
    model, inputs = hooked("gemma3"), prompt("gemma3")
    n = inputs["input_ids"].shape[1]
    rows = model.attention_rows(inputs, "all")
    window = model.hf.config.text_config.sliding_window
    sliding = [i for i, kind in enumerate(model.hf.config.text_config.layer_types) if kind == "sliding_attention"]
    full = [i for i in range(model.cfg.n_layers) if i not in sliding]
    assert window < n
    assert rows[sliding[0]][0, :, -1, : n - window].abs().max() == 0
    assert rows[full[0]][0, :, -1, : n - window].max() > 0
    block = (inputs["token_type_ids"][0] == 1).nonzero().flatten()
    assert rows[full[0]][0, :, block[0], block[1]].min() > 0  # a picture token reads a later one of its picture
    text = (inputs["token_type_ids"][0] == 0).nonzero().flatten()
    assert rows[full[0]][0, :, text[-3], text[-2] :].abs().max() == 0  # a text token does not
