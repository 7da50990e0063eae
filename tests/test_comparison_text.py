"""A language model loads like the vision-language model built on it: same hooks, same numbers on prompts of words, pictures refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LABELS, unchecked
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, Qwen2Config

import mechicl
from mechicl.errors import HookNameError, ImageError, OptionError, UnsupportedModelError
from mechicl.models.text import HookedLM
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.episode import Episode, Shot
from mechicl.training.organisms import build
from mechicl.training.organisms.parts import enliven
from mechicl.training.tokenizer import build_tokenizer

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def tokenizer() -> Any:
    return build_tokenizer(eos="<end>", pad="<pad>")


def words(n: int = 4) -> list[Episode]:
    """Episodes of words, of different lengths."""
    made = []
    for k in range(n):
        first, second = LABELS[k % 2], LABELS[2 + k % 2]
        shots = (Shot(first, text="ba di" * (1 + k)), Shot(second, text="gu"), Shot(first, text="ba di"))
        made.append(Episode(shots, Shot(second, text="gu"), (first, second), "Answer with a single word.", "What is this?", id=str(k)))
    return made


def decoder_alone(vlm: Any) -> Any:
    """The language model inside a LLaVA model, as a causal language model of its own."""
    alone = AutoModelForCausalLM.from_config(vlm.config.text_config)
    alone.model.load_state_dict(vlm.model.language_model.state_dict())
    alone.lm_head.load_state_dict(vlm.lm_head.state_dict())
    return alone


def causal(config: Any, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    enliven(model, torch.Generator().manual_seed(seed))
    return model.eval()


def test_the_language_model_in_a_folder_equals_the_decoder_of_its_vision_language_model(tmp_path: Path) -> None:
    vlm, processor = build("llava")
    decoder_alone(vlm).save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)  # pyright: ignore[reportAttributeAccessIssue]
    model, whole = mechicl.load(tmp_path), HookedVLM(vlm, processor)
    assert isinstance(model, HookedLM)
    batch = whole.render(words())
    torch.testing.assert_close(model(batch), whole(batch), rtol=0, atol=0)
    ours, theirs = (
        mechicl.score_heads(one, batch, scores=("induction", "previous_token"), n_null=1, progress=False) for one in (model, whole)
    )
    for name in ours.scores:
        torch.testing.assert_close(torch.tensor(ours[name].per_episode), torch.tensor(theirs[name].per_episode), rtol=0, atol=1e-6)
    assert "hook_image_features" not in model.hook_dict
    with pytest.raises(HookNameError, match="shows it pictures"):
        model.check_hook_name("hook_image_features")


def test_chat_templates_that_want_one_string_get_one() -> None:
    chat = build_tokenizer(eos="<end>", pad="<pad>", extra=("<turn>",))
    chat.chat_template = "{% for m in messages %}<turn>{{ m['role'] }}:{{ m['content'] | trim }}\n{% endfor %}{% if add_generation_prompt %}<turn>assistant:{% endif %}"
    model = HookedLM(causal(Qwen2Config(**SIZES, num_key_value_heads=2, vocab_size=len(chat))), chat)
    batch = model.render(words())
    labels = batch.mask("label")
    for row, ids, episode in zip(labels, batch.inputs["input_ids"], batch.episodes, strict=True):
        assert str(chat.decode(ids[row])).replace(" ", "") == "".join(shot.label for shot in episode.shots)
    assert mechicl.icl_accuracy(model, words(), progress=False).n == 4


def test_patterns_equal_those_of_eager_attention() -> None:
    config = GPTNeoXConfig(**SIZES, vocab_size=len(tokenizer()))
    config._attn_implementation = "eager"
    hf = causal(config)
    model = HookedLM(hf, tokenizer())
    batch = model.render(words())
    _, cache = model.run_with_cache(batch)
    with torch.no_grad():
        eager = hf(**batch.inputs, output_attentions=True, use_cache=False).attentions
    real = batch.inputs["attention_mask"].bool()
    for layer, pattern in enumerate(eager):
        mine = cache[f"blocks.{layer}.attn.hook_pattern"]
        torch.testing.assert_close(mine.transpose(1, 2)[real], pattern.transpose(1, 2)[real], rtol=0, atol=1e-6)


def test_what_a_language_model_cannot_do_is_refused() -> None:
    model = HookedLM(causal(Qwen2Config(**SIZES, num_key_value_heads=2, vocab_size=len(tokenizer()))), tokenizer())
    from mechicl.data import concepts

    with pytest.raises(ImageError, match="words only"):
        model.render(concepts.draw(1, classes=2, shots=1, size=28))
    assert model.processor is not None
    with pytest.raises(ImageError, match="words only"):
        model.processor(text=["a"], images=["picture"])
    with pytest.raises(OptionError, match="tokenizer"), unchecked():
        HookedLM(model.hf, None, check=False).render(words())


def test_places_that_count_padding_are_refused() -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=len(tokenizer()), n_positions=64)
    with pytest.raises(UnsupportedModelError, match="left padding"):
        HookedLM(causal(config), tokenizer())
    assert HookedLM(causal(config), tokenizer(), check=False).cfg.n_layers == 1
