"""The LLaVA line: a plain vision transformer, a two-layer projector, a language model that is one of the common ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mechicl.training.organisms.parts import SIZES, Parts, Preset, Size
from mechicl.training.organisms.templates import chatml, instruct, onevision, vicuna
from mechicl.training.tokenizer import build_tokenizer, token_id

SIDE = 28
"""A LLaVA picture (or tile) in pixels: 2 x 2 patches."""


def tower(size: Size, model_type: str, **more: Any) -> dict[str, Any]:
    """Configuration of a vision transformer with square pictures."""
    return {
        "model_type": model_type,
        "hidden_size": size.vision_width,
        "intermediate_size": size.vision_mlp,
        "num_hidden_layers": size.vision_layers,
        "num_attention_heads": size.vision_heads,
        "patch_size": size.patch,
        **more,
    }


def llava(family: str, preset: Preset, text: Mapping[str, Any]) -> Parts:
    """LLaVA 1.5: CLIP's last layer but one without its class token, Llama. Every picture is cut to a square of 28 pixels, 4 tokens."""
    import transformers as hf

    size = SIZES[preset]
    tokenizer = build_tokenizer(
        bos="<s>", eos="</s>", unk="<unk>", pad="<pad>", add_bos=True, named={"image_token": "<image>"}, max_length=size.context
    )
    config = hf.LlavaConfig(
        vision_config=tower(size, "clip_vision_model", image_size=SIDE, projection_dim=16, num_hidden_layers=size.vision_layers + 1),
        text_config={"model_type": "llama", "rope_parameters": size.rope} | size.text(tokenizer) | dict(text),
        image_token_index=token_id(tokenizer, "<image>"),
        image_seq_length=4,
    )
    pictures = hf.LlavaImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = hf.LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=size.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=vicuna(),
    )
    return Parts(config, processor)


def llava_next(family: str, preset: Preset, text: Mapping[str, Any]) -> Parts:
    """LLaVA-NeXT: an overview of each picture and its tiles, a new-line token after every row of patches; Mistral.

    The tiny one cuts a picture into up to 2 x 2 tiles of 28 pixels; the demo one into a single tile (10 tokens a picture).
    """
    import transformers as hf

    size = SIZES[preset]
    tokenizer = build_tokenizer(
        bos="<s>", eos="</s>", unk="<unk>", pad="<pad>", add_bos=True, named={"image_token": "<image>"}, max_length=size.context
    )
    grids = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]] if preset == "tiny" else [[SIDE, SIDE]]
    mistral = {"model_type": "mistral", "sliding_window": None, "rope_parameters": size.rope}
    config = hf.LlavaNextConfig(
        vision_config=tower(size, "clip_vision_model", image_size=SIDE, projection_dim=16, num_hidden_layers=size.vision_layers + 1),
        text_config=mistral | size.text(tokenizer) | dict(text),
        image_token_index=token_id(tokenizer, "<image>"),
        image_grid_pinpoints=grids,
        image_seq_length=4,
    )
    pictures = hf.LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=grids
    )
    processor = hf.LlavaNextProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=size.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=instruct("<image>\n", system=("<<SYS>>\n", "\n<</SYS>>\n\n"), bos=False, images_first=True, gap=" "),
    )
    return Parts(config, processor)


def llava_onevision(family: str, preset: Preset, text: Mapping[str, Any]) -> Parts:
    """LLaVA-OneVision: SigLIP, Qwen2. One picture in a prompt is tiled; each of several is seen once (4 tokens and a new-line token)."""
    import transformers as hf

    size = SIZES[preset]
    tokenizer = build_tokenizer(
        eos="<|im_end|>",
        pad="<|endoftext|>",
        extra=("<|im_start|>",),
        named={"image_token": "<image>", "video_token": "<video>"},
        max_length=size.context,
    )
    grids = [[SIDE * rows, SIDE * columns] for rows in (1, 2) for columns in (1, 2)] if preset == "tiny" else [[SIDE, SIDE]]
    config = hf.LlavaOnevisionConfig(
        vision_config=tower(size, "siglip_vision_model", image_size=SIDE, vision_use_head=False),
        text_config={"model_type": "qwen2", "rope_parameters": size.rope} | size.text(tokenizer) | dict(text),
        image_token_index=token_id(tokenizer, "<image>"),
        video_token_index=token_id(tokenizer, "<video>"),
        image_grid_pinpoints=grids,
    )
    square = {"height": SIDE, "width": SIDE}
    processor = hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=grids),
        video_processor=hf.LlavaOnevisionVideoProcessor(size=square),
        tokenizer=tokenizer,
        num_image_tokens=(SIDE // size.patch) ** 2,
        vision_feature_select_strategy="full",
        chat_template=onevision(),
    )
    return Parts(config, processor)


def internvl(family: str, preset: Preset, text: Mapping[str, Any]) -> Parts:
    """InternVL: 2 x 2 patches shuffled into a token, Qwen2. A tile of 56 pixels is 4 tokens; the tiny one cuts two at most."""
    import transformers as hf

    size = SIZES[preset]
    tokenizer = build_tokenizer(
        eos="<|im_end|>",
        pad="<|endoftext|>",
        extra=("<|im_start|>",),
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        max_length=size.context,
    )
    n_tokens = (size.image // size.patch) ** 2 // 4
    vision = tower(size, "internvl_vision", image_size=[size.image] * 2, attention_bias=True) | {"patch_size": [size.patch] * 2}
    config = hf.InternVLConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", "rope_parameters": size.rope} | size.text(tokenizer) | dict(text),
        image_token_id=token_id(tokenizer, "<IMG_CONTEXT>"),
        image_seq_length=n_tokens,
        tie_word_embeddings=False,
    )
    square = {"height": size.image, "width": size.image}
    processor = hf.InternVLProcessor(
        image_processor=hf.GotOcr2ImageProcessor(size=square, crop_to_patches=True, max_patches=2 if preset == "tiny" else 1),
        video_processor=hf.InternVLVideoProcessor(size=square),
        tokenizer=tokenizer,
        image_seq_length=n_tokens,
        chat_template=chatml("<IMG_CONTEXT>\n"),
    )
    return Parts(config, processor)
