"""Idefics3 and SmolVLM, Mistral 3, Llama 3.2 Vision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mechicl.training.organisms.llava import tower
from mechicl.training.organisms.parts import SIZES, Parts, Preset
from mechicl.training.organisms.templates import idefics, instruct, llama
from mechicl.training.tokenizer import build_tokenizer, token_id

CELLS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
"""Tokens that name a tile of a split picture."""


def idefics3(family: str, preset: Preset, text: Mapping[str, Any]) -> Parts:
    """`idefics3` and `smolvlm`: pictures split into tiles of 56 pixels with an overview, 2 x 2 patches shuffled into a token, Llama.

    A tile is 4 tokens between markers. The tiny ones split a picture into up to 2 x 2 tiles; the demo ones do not split.
    """
    import transformers as hf

    size = SIZES[preset]
    smol, tiny = family == "smolvlm", preset == "tiny"
    markers = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    names = ("fake_image_token", "image_token", "end_of_utterance_token", "global_image_token")
    control = (
        {"bos": "<|im_start|>", "eos": "<end_of_utterance>", "pad": "<|im_end|>", "unk": "<|endoftext|>"}
        if smol
        else {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "pad": "<|finetune_right_pad_id|>"}
    )
    tokenizer = build_tokenizer(
        **control,
        add_bos=not smol,
        extra=(*CELLS, *(() if smol else markers)),
        named=dict(zip(names, markers, strict=True)) if smol else None,
        max_length=size.context,
    )
    n_tokens = (size.image // size.patch) ** 2 // 4
    vision = tower(size, "smolvlm_vision" if smol else "idefics3_vision", image_size=size.image)
    end = token_id(tokenizer, "<end_of_utterance>")
    language = {"model_type": "llama", "rope_parameters": size.rope} | size.text(tokenizer, eos_token_id=end) | dict(text)
    common: dict[str, Any] = {
        "vision_config": vision,
        "text_config": language,
        "image_token_id": token_id(tokenizer, "<image>"),
        "scale_factor": 2,
        "tie_word_embeddings": False,
    }
    sides: dict[str, Any] = {
        "size": {"longest_edge": 2 * size.image if tiny else size.image},
        "max_image_size": {"longest_edge": size.image},
        "do_image_splitting": tiny,
    }
    if smol:
        processor = hf.SmolVLMProcessor(
            image_processor=hf.SmolVLMImageProcessor(**sides),
            video_processor=hf.SmolVLMVideoProcessor(size={"longest_edge": size.image}, max_image_size={"longest_edge": size.image}),
            tokenizer=tokenizer,
            image_seq_len=n_tokens,
            chat_template=idefics("<|im_start|>"),
        )
        return Parts(hf.SmolVLMConfig(**common), processor)
    processor = hf.Idefics3Processor(
        image_processor=hf.Idefics3ImageProcessor(**sides),
        tokenizer=tokenizer,
        image_seq_len=n_tokens,
        chat_template=idefics("<|begin_of_text|>"),
    )
    return Parts(hf.Idefics3Config(**common), processor)


def mistral3(family: str, preset: Preset, text: Mapping[str, Any]) -> Parts:
    """Mistral Small 3.1: Pixtral's tower with pictures of any size up to 112 pixels, 2 x 2 patches merged, a break token after every row.

    28 x 28 pixels are one token and its end marker. Heads are narrower than d_model / n_heads, as in the family.
    """
    import transformers as hf

    size = SIZES[preset]
    tokenizer = build_tokenizer(
        bos="<s>",
        eos="</s>",
        pad="<pad>",
        unk="<unk>",
        add_bos=True,
        extra=("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        max_length=size.context,
    )
    longest = 112
    mistral = {"model_type": "mistral", "sliding_window": None, "rope_parameters": size.rope}
    mistral["head_dim"] = 12 if preset == "tiny" else size.d_head
    config = hf.Mistral3Config(
        vision_config=tower(size, "pixtral", image_size=longest),
        text_config=mistral | size.text(tokenizer) | dict(text),
        image_token_index=token_id(tokenizer, "[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    processor = hf.PixtralProcessor(
        image_processor=hf.PixtralImageProcessor(size={"longest_edge": longest}, patch_size={"height": size.patch, "width": size.patch}),
        tokenizer=tokenizer,
        patch_size=size.patch,
        spatial_merge_size=2,
        chat_template=instruct("[IMG]", system=("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), bos=True, images_first=False, gap=""),
    )
    return Parts(config, processor)


def mllama(family: str, preset: Preset, text: Mapping[str, Any]) -> Parts:
    """Llama 3.2 Vision: pictures enter through gated cross-attention layers only; a picture is one marker token in the prompt.

    The marker's id lies just above the vocabulary of the unembedding, as in the family. Pictures are cut into up to 4 tiles of 28 pixels.
    """
    import transformers as hf

    size = SIZES[preset]
    turns = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>")
    tokenizer = build_tokenizer(
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        pad="<|finetune_right_pad_id|>",
        add_bos=True,
        extra=(*turns, "<|image|>"),
        max_length=size.context,
    )
    marker = token_id(tokenizer, "<|image|>")
    language = size.text(tokenizer, num_hidden_layers=4, cross_attention_layers=[1, 3], rope_parameters=size.rope, vocab_size=marker)
    language["eos_token_id"] = [tokenizer.eos_token_id, token_id(tokenizer, "<|eot_id|>")]
    vision = {
        "hidden_size": size.vision_width,
        "intermediate_size": size.vision_mlp,
        "num_hidden_layers": size.vision_layers,
        "num_global_layers": 1,
        "attention_heads": size.vision_heads,
        "vision_output_dim": 2 * size.vision_width,
        "intermediate_layers_indices": [0],
        "image_size": 28,
        "patch_size": size.patch,
        "max_num_tiles": 4,
    }
    config = hf.MllamaConfig(text_config=language | dict(text), vision_config=vision, image_token_index=marker)
    pictures = hf.MllamaImageProcessor(size={"height": 28, "width": 28}, max_image_tiles=4)
    return Parts(config, hf.MllamaProcessor(image_processor=pictures, tokenizer=tokenizer, chat_template=llama()))
