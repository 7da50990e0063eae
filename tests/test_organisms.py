"""The organisms are transformers' own classes with their families' processors and traits, and nothing about them is degenerate."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LABELS, encode, example_batch, example_inputs, messages, picture, pictures, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config
from torch import Tensor

from mechicl.errors import OptionError, OutputPathError
from mechicl.training.organisms import FAMILIES, build, save
from mechicl.training.organisms.parts import SIZES
from mechicl.training.tokenizer import SYLLABLES, WORDS, build_tokenizer, grow_merges, token_id

MODEL_TYPE = {"paligemma2": "paligemma"}
TEMPLATED = tuple(family for family in FAMILIES if not family.startswith("paligemma"))
TIED = ("gemma3", "paligemma", "paligemma2")
STRANGE = "naïve 日本語 \u200b\u202e 🙂‍↔️ <|not_a_token|> \\n\n\t  two  spaces \x00 ÿ"


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def attentions(family: str, inputs: dict[str, Any], preset: str = "tiny") -> tuple[Tensor, ...]:
    """Every layer's pattern from transformers' own eager attention."""
    model, _ = build(family, preset=preset)  # pyright: ignore[reportArgumentType]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return tuple(model(**inputs, output_attentions=True).attentions)


def evenness(pattern: Tensor) -> Tensor:
    """How even each head's last row is: its entropy over that of a flat row."""
    rows = pattern[0, :, -1].double()
    return -(rows * rows.clamp_min(1e-30).log()).sum(-1) / (rows > 0).sum(-1).double().log()


def image_token(model: Any) -> int:
    return model.config.image_token_id


# ---- models


def test_the_families_are_the_thirteen_and_paligemma_2() -> None:
    assert len(FAMILIES) == 14
    qwens, llavas = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}, {"llava", "llava_next", "llava_onevision"}
    gemmas, others = {"gemma3", "paligemma", "paligemma2"}, {"internvl", "idefics3", "smolvlm", "mistral3", "mllama"}
    assert set(FAMILIES) == qwens | llavas | gemmas | others


def test_a_model_is_transformers_own_class_of_its_family(organism: Any, family: str) -> None:
    model, processor = organism(family)
    assert type(model).__module__.startswith("transformers.models.")
    assert model.config.model_type == MODEL_TYPE.get(family, family)
    assert type(processor).__module__.startswith("transformers.models.")
    assert type(processor.image_processor).__module__.startswith("transformers.models.")
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone(organism: Any, family: str) -> None:
    model, processor = organism(family)
    before = torch.get_rng_state()
    again, processor_again = build(family)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert processor.tokenizer.get_vocab() == processor_again.tokenizer.get_vocab()
    other: Any = build(family, seed=1)[0]
    assert not torch.equal(model.get_input_embeddings().weight, other.get_input_embeddings().weight)


def test_a_forward_pass_with_two_pictures_gives_finite_logits_of_unit_size(organism: Any, family: str) -> None:
    model, processor = organism(family)
    out = logits(model, example_inputs(processor))
    assert out.isfinite().all()
    assert 0.3 < out.std() < 3.0  # weights have variance 1 / fan in, so logits have a standard deviation near 1 (soft-capped: below)


def test_another_picture_changes_the_answer_and_each_picture_does(organism: Any, family: str) -> None:
    model, processor = organism(family)
    text, mine, others = prompt(processor, 2), pictures(2, seed=0), pictures(2, seed=1)
    base = logits(model, encode(processor, [text], [mine]))[0, -1]
    assert torch.equal(base, logits(model, encode(processor, [text], [pictures(2, seed=0)]))[0, -1])
    spread = base.std()
    for changed in ([others[0], mine[1]], [mine[0], others[1]]):
        moved = logits(model, encode(processor, [text], [changed]))[0, -1]
        assert (moved - base).std() > 0.02 * spread  # rounding would be 1e-6 of it


def test_every_parameter_of_a_tiny_organism_is_alive(organism: Any, family: str) -> None:
    model, _ = organism(family)
    for name, parameter in model.named_parameters():
        assert parameter.abs().max() > 1e-3, name
        assert parameter.numel() == 1 or parameter.std() > 1e-3, name


def test_attention_is_far_from_flat_in_every_layer(organism: Any, family: str) -> None:
    _, processor = organism(family)
    inputs = example_inputs(processor, images=3)
    for layer, pattern in enumerate(attentions(family, inputs)):
        assert evenness(pattern).mean() < 0.9, layer  # a flat row has 1; scores with a standard deviation of 2 give about 0.6
        assert evenness(pattern).std() > 0.005, layer  # and heads differ


def test_the_attention_of_transformers_own_initialisation_is_flat(organism: Any) -> None:
    _, processor = organism("llava", "demo")
    for pattern in attentions("llava", example_inputs(processor, images=3), "demo"):
        assert evenness(pattern).mean() > 0.99  # the control: what the fixture's weights are scaled up against


def assert_rows_stand_alone(model: Any, processor: Any, texts: list[str], images: list[list[Any]]) -> None:
    """The last logits of each padded row equal those of the prompt by itself."""
    batch = encode(processor, texts, images)
    assert not batch["attention_mask"][1, 0]
    together = logits(model, batch)[:, -1]
    for row, (text, some) in enumerate(zip(texts, images, strict=True)):
        alone = logits(model, encode(processor, [text], [some]))[0, -1]
        assert torch.allclose(together[row], alone, atol=5e-5)  # float32 rounding of another summation order, logits near 1


def test_left_padding_does_not_change_the_last_logits(organism: Any, family: str) -> None:
    model, processor = organism(family)
    text = prompt(processor, 2)
    assert_rows_stand_alone(model, processor, [text, text.replace("This is a", "This", 1)], [pictures(2, seed=0), pictures(2, seed=1)])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mllama"])
def test_prompts_with_other_numbers_of_pictures_share_a_batch(organism: Any, family: str) -> None:
    # Mllama's text before its first picture attends evenly to all pictures of its row, and the empty ones that pad it are counted too
    model, processor = organism(family)
    assert_rows_stand_alone(model, processor, [prompt(processor, 3), prompt(processor, 2)], [pictures(3, seed=0), pictures(2, seed=1)])


def test_greedy_generation_runs_with_pictures_on_a_padded_batch(organism: Any, family: str) -> None:
    model, processor = organism(family)
    batch = example_batch(processor)
    out = model.generate(**{k: v for k, v in batch.items() if k != "labels"}, max_new_tokens=3, do_sample=False)
    n_pos = batch["input_ids"].shape[1]
    assert out.shape[0] == 2
    assert n_pos < out.shape[1] <= n_pos + 3
    assert torch.equal(out[:, n_pos], logits(model, batch)[:, -1].argmax(-1))


def test_a_saved_folder_loads_with_the_auto_classes_to_the_same_bits(organism: Any, family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = organism(family)
    folder = save(model, processor, tmp_path / "organism")
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json"} <= names
    assert not any(path.suffix in (".bin", ".pt", ".pkl") for path in folder.iterdir())
    again, processor_again = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert type(again) is type(model)
    assert type(processor_again) is type(processor)
    assert processor_again.chat_template == processor.chat_template
    assert processor_again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    mine, theirs = example_batch(processor), example_batch(processor_again)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert torch.equal(logits(model, mine), logits(again.eval(), theirs))


def test_a_folder_that_cannot_be_made_is_refused(organism: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model, processor = organism("qwen2_vl")
    with pytest.raises(OutputPathError, match="folder must be"):
        save(model, processor, tmp_path / "file" / "below")


def test_unknown_families_and_presets_are_refused_by_name() -> None:
    with pytest.raises(OptionError, match=r"family must be one of qwen2_vl.*got 'git'"):
        build("git")
    config.update("jaxtyping_disable", True)  # the annotation says so too, but only tests check annotations
    try:
        with pytest.raises(OptionError, match="preset must be"):
            build("llava", preset="huge")  # pyright: ignore[reportArgumentType]
    finally:
        config.update("jaxtyping_disable", False)


def test_the_text_configuration_can_be_overridden() -> None:
    model: Any
    model, _ = build("qwen2_5_vl", preset="demo", text={"num_hidden_layers": 2, "num_key_value_heads": 2})
    assert len(model.get_decoder().layers) == 2
    assert model.config.text_config.num_key_value_heads == 2


# ---- traits


def test_queries_share_keys_where_the_family_allows(organism: Any, family: str) -> None:
    text = organism(family)[0].config.get_text_config()
    assert text.num_attention_heads >= 4
    assert text.num_key_value_heads == (1 if family == "paligemma" else 2)


def test_embeddings_are_tied_as_in_the_family_and_never_in_an_organism_to_train(organism: Any, family: str) -> None:
    for preset in SIZES:
        model, _ = organism(family, preset)
        shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert shared == (preset == "tiny" and family in TIED)


def test_the_vocabulary_holds_every_token_of_the_tokenizer(organism: Any, family: str) -> None:
    model, processor = organism(family)
    rows = model.get_input_embeddings().weight.shape[0]
    assert max(processor.tokenizer.get_vocab().values()) < rows
    outputs = model.get_output_embeddings().weight.shape[0]
    if family == "mllama":  # its picture marker has an embedding and no logit
        assert outputs == image_token(model) < rows
    else:
        assert outputs == rows


def test_gemma_3_has_windows_that_hide_the_far_past_and_bidirectional_pictures(organism: Any) -> None:
    model, processor = organism("gemma3")
    assert model.config.text_config.layer_types == ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    inputs = example_inputs(processor, images=3)
    patterns = attentions("gemma3", inputs)
    n_pos = inputs["input_ids"].shape[1]
    window = model.config.text_config.sliding_window
    assert n_pos > 2 * window
    assert patterns[0][0, :, -1, : n_pos - window].abs().max() == 0
    assert patterns[2][0, :, -1, : n_pos - window].max() > 0
    first = (inputs["input_ids"][0] == image_token(model)).nonzero()[0].item()
    assert patterns[0][0, :, first, first + 1].min() > 0  # a picture's first token sees its second


@pytest.mark.parametrize("family", ["paligemma", "paligemma2"])
def test_paligemma_sees_its_whole_prompt_both_ways(organism: Any, family: str) -> None:
    _, processor = organism(family)
    inputs = example_inputs(processor, images=1)
    assert attentions(family, inputs)[1][0, :, 0, 1:].min() > 0


def test_paligemma_2_has_soft_caps_that_bend_and_alternating_windows(organism: Any) -> None:
    model, processor = organism("paligemma2")
    text = model.config.text_config
    assert text.model_type == "gemma2"
    assert text.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    inputs = example_inputs(processor)
    assert logits(model, inputs).abs().max() < text.final_logit_softcapping
    loose, _ = build("paligemma2", text={"attn_logit_softcapping": None})
    loose.load_state_dict(model.state_dict())
    assert (logits(loose, inputs) - logits(model, inputs)).abs().max() > 1e-2


def test_qwen_2_5_has_windows_in_its_vision_tower(organism: Any) -> None:
    vision = organism("qwen2_5_vl")[0].config.vision_config
    assert vision.window_size < 4 * vision.patch_size * vision.spatial_merge_size  # smaller than the largest picture
    assert 0 < len(vision.fullatt_block_indexes) < vision.depth


def test_qwen_3_adds_picture_features_after_layers_0_to_2_and_not_after_3(organism: Any) -> None:
    model, processor = organism("qwen3_vl")
    assert len(model.config.vision_config.deepstack_visual_indexes) == 3
    assert len(model.get_decoder().layers) == 4
    seen: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda _m, _i, out: seen.append(out)) for layer in model.get_decoder().layers]
    entered: list[Tensor] = []
    handles += [
        layer.register_forward_pre_hook(lambda _m, args, kw: entered.append(args[0] if args else kw["hidden_states"]), with_kwargs=True)
        for layer in model.get_decoder().layers
    ]
    try:
        inputs = example_inputs(processor)
        logits(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    left = [out[0] if isinstance(out, tuple) else out for out in seen]
    added = [(after - before).abs().amax(-1)[0] for before, after in zip(left[:3], entered[1:], strict=True)]
    pictured = inputs["input_ids"][0] == image_token(model)
    for change in added:
        assert change[pictured].min() > 1e-3
        assert change[~pictured].max() == 0


def test_mllama_looks_at_pictures_through_open_cross_attention_gates(organism: Any) -> None:
    model, processor = organism("mllama")
    assert model.config.text_config.cross_attention_layers == [1, 3]
    inputs = example_inputs(processor)
    assert "cross_attention_mask" in inputs
    patterns = attentions("mllama", inputs)
    assert patterns[0].shape[-1] == inputs["input_ids"].shape[1] != patterns[1].shape[-1]


@pytest.mark.parametrize("family", ["gemma3", "paligemma2", "mistral3"])
def test_heads_times_their_width_differ_from_the_residual_stream(organism: Any, family: str) -> None:
    text = organism(family)[0].config.text_config
    assert text.num_attention_heads * text.head_dim != text.hidden_size


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_next", "internvl", "idefics3", "smolvlm", "mistral3"])
def test_pictures_of_other_sizes_have_other_numbers_of_tokens(organism: Any, family: str) -> None:
    model, processor = organism(family)
    counts = set()
    for size in ((56, 56), (112, 56), (112, 112)):
        inputs = encode(processor, [prompt(processor, 1)], [[picture(*size)]])
        counts.add(int((inputs["input_ids"] == image_token(model)).sum()))
    assert len(counts) >= 2


# ---- organisms to train


def test_an_organism_to_train_is_about_a_million_parameters_with_few_tokens_a_picture(organism: Any, family: str) -> None:
    model, processor = organism(family, "demo")
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 1.5e6
    for size in ((28, 28), (56, 56), (112, 112)):
        inputs = encode(processor, [prompt(processor, 1)], [[picture(*size)]])
        assert 1 <= int((inputs["input_ids"] == image_token(model)).sum()) <= 16
    base, other = (logits(model, encode(processor, [prompt(processor, 1)], [pictures(1, seed=s)]))[0, -1] for s in (0, 1))
    assert (base - other).std() > 1e-3 * base.std()  # no gate at zero hides the picture, and learning can start


def test_qwen_turns_small_pictures_into_1_4_and_16_tokens(organism: Any) -> None:
    for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        model, processor = organism(family, "demo")
        for side, expected in ((28, 1), (56, 4), (112, 16)):
            inputs = encode(processor, [prompt(processor, 1)], [[picture(side, side)]])
            assert int((inputs["input_ids"] == image_token(model)).sum()) == expected


# ---- processors and templates


def test_the_image_token_of_the_configuration_marks_the_pictures(organism: Any, family: str) -> None:
    model, processor = organism(family)
    inputs = example_inputs(processor)
    assert (inputs["input_ids"] == image_token(model)).any()
    assert "attention_mask" in inputs
    bos = processor.tokenizer.bos_token_id
    if bos is not None:
        assert int((inputs["input_ids"] == bos).sum()) == 1


@pytest.mark.parametrize("family", TEMPLATED)
def test_the_chat_template_renders_every_turn_in_order_and_opens_the_answer(organism: Any, family: str) -> None:
    _, processor = organism(family)
    closed = processor.apply_chat_template(messages(3))
    opened = processor.apply_chat_template(messages(3), add_generation_prompt=True)
    assert opened.startswith(closed)
    assert closed.count("This is a") == 3
    assert closed.count(processor.image_token) == 3
    assert closed.index(LABELS[0]) < closed.index(LABELS[1])
    longer = processor.apply_chat_template([*messages(3), {"role": "assistant", "content": [{"type": "text", "text": "tepa"}]}])
    assert longer.startswith(opened.rstrip())  # what opens an answer is what stands before one
    spoken = [{**turn, "content": "hello"} for turn in messages(2)]
    assert processor.apply_chat_template(spoken).count("hello") == 3


@pytest.mark.parametrize("family", [family for family in TEMPLATED if family != "mllama"])
def test_a_system_text_stands_before_the_first_question(organism: Any, family: str) -> None:
    _, processor = organism(family)
    rule = {"role": "system", "content": [{"type": "text", "text": "One word only."}]}
    text = processor.apply_chat_template([rule, *messages(1)], add_generation_prompt=True)
    assert text.count("One word only.") == 1
    assert text.index("One word only.") < text.index("This is a")
    if family == "gemma3":
        assert "system" not in text


def test_families_refuse_what_their_templates_refuse(organism: Any) -> None:
    from jinja2.exceptions import TemplateError

    rule = {"role": "system", "content": [{"type": "text", "text": "One word only."}]}
    with pytest.raises(TemplateError, match="incompatible with system"):
        organism("mllama")[1].apply_chat_template([rule, *messages(1)])
    with pytest.raises(TemplateError, match="alternate"):
        organism("gemma3")[1].apply_chat_template([*messages(1), *messages(1)])
    assert organism("paligemma")[1].chat_template is None
    with pytest.raises(ValueError, match="chat template"):
        organism("paligemma")[1].apply_chat_template(messages(1))


# ---- the tokenizer


def test_any_text_survives_the_tokenizer_of_every_family(organism: Any, family: str) -> None:
    tokenizer = organism(family)[1].tokenizer
    marked = f"{tokenizer.eos_token}{STRANGE}{tokenizer.pad_token}"
    for text in (STRANGE, marked, "", " "):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


TOKENIZER = build_tokenizer(eos="</s>", pad="<pad>", bos="<s>", add_bos=True, extra=("[INST]",), named={"image_token": "<image>"})


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text())
def test_any_text_survives_with_offsets_that_cover_it(text: str) -> None:
    encoded = TOKENIZER(text, add_special_tokens=False, return_offsets_mapping=True)
    assert TOKENIZER.decode(encoded["input_ids"]) == text
    spans = encoded["offset_mapping"]
    assert {i for start, stop in spans for i in range(start, stop)} == set(range(len(text)))
    assert all(a <= b for (a, _), (b, _) in pairwise(spans))


def test_a_pseudo_word_is_as_many_tokens_as_syllables() -> None:
    for word in ("zuda", "kimo", "voruli", "gabapo"):
        assert TOKENIZER.tokenize(word) == [word[i : i + 2] for i in range(0, len(word), 2)]
        assert len(TOKENIZER.tokenize(" " + word)) == len(word) // 2
    assert all(len(TOKENIZER.tokenize(space + syllable)) == 1 for syllable in SYLLABLES for space in ("", " "))


def test_every_word_of_the_prompts_is_one_token() -> None:
    assert all(len(TOKENIZER.tokenize(" " + word)) == 1 for word in WORDS)
    assert len(TOKENIZER.tokenize("What")) == 1


def test_special_tokens_are_one_token_each_and_named_ones_are_attributes() -> None:
    ids = TOKENIZER("a[INST]<image>b</s>")["input_ids"]
    assert ids[0] == TOKENIZER.bos_token_id
    assert ids[2:4] == [token_id(TOKENIZER, "[INST]"), token_id(TOKENIZER, "<image>")]
    assert ids[-1] == TOKENIZER.eos_token_id
    assert TOKENIZER.image_token == "<image>"
    with pytest.raises(KeyError):
        token_id(TOKENIZER, "<missing>")


def test_the_vocabulary_is_small_and_grows_the_same_way_every_time() -> None:
    vocabulary, merges = grow_merges()
    assert (vocabulary, merges) == grow_merges()
    assert 300 < len(vocabulary) < 800
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert len(set(merges)) == len(merges)


def test_padding_goes_to_the_left() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = TOKENIZER(["the image", "the image is a new word"], padding=True)
    assert batch["input_ids"][0][0] == TOKENIZER.pad_token_id
    assert batch["attention_mask"][0][0] == 0
    assert batch["attention_mask"][0][-1] == 1
