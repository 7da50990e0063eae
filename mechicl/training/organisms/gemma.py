"""Google's families: SigLIP and a Gemma. Bidirectional attention inside pictures (Gemma 3) or over the whole prompt (PaliGemma)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mechicl.training.organisms.llava import SIDE, tower
from mechicl.training.organisms.parts import SIZES, Parts, Preset, padded
from mechicl.training.organisms.templates import gemma
from mechicl.training.tokenizer import build_tokenizer, token_id

WINDOW = 16
"""Sliding window of the tiny organisms, tokens: shorter than their prompts, so that it matters."""


def gemma3(family: str, preset: Preset, text: Mapping[str, Any]) -> Parts:
    """Gemma 3: pictures pooled to 4 tokens, sliding-window layers among full ones, query and key norms, heads wider than d_model / n_heads.

    Embeddings are tied in the tiny one, as in the family, and not in the demo one, which would not learn.
    """
    import transformers as hf

    size = SIZES[preset]
    tokenizer = build_tokenizer(
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        unk="<unk>",
        add_bos=True,
        extra=("<start_of_turn>", "<end_of_turn>"),
        named={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        max_length=size.context,
    )
    tiny = preset == "tiny"
    kinds = {"s": "sliding_attention", "f": "full_attention"}
    layers = [kinds[kind] for kind in ("ssfs" if tiny else "ssf")]
    d_head = 24 if tiny else size.d_head
    language = size.text(
        tokenizer,
        num_hidden_layers=len(layers),
        layer_types=layers,
        sliding_window=WINDOW if tiny else 64,
        head_dim=d_head,
        query_pre_attn_scalar=d_head,
        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e5}, "sliding_attention": dict(size.rope)},
        tie_word_embeddings=tiny,
        eos_token_id=[tokenizer.eos_token_id, token_id(tokenizer, "<end_of_turn>")],
    )
    n_tokens = 4
    config = hf.Gemma3Config(
        text_config=language | dict(text),
        vision_config=tower(size, "siglip_vision_model", image_size=size.image, vision_use_head=False),
        mm_tokens_per_image=n_tokens,
        boi_token_index=token_id(tokenizer, "<start_of_image>"),
        eoi_token_index=token_id(tokenizer, "<end_of_image>"),
        image_token_index=token_id(tokenizer, "<image_soft_token>"),
        tie_word_embeddings=tiny,
    )
    pictures = hf.Gemma3ImageProcessor(size={"height": size.image, "width": size.image})
    processor = hf.Gemma3Processor(image_processor=pictures, tokenizer=tokenizer, image_seq_length=n_tokens, chat_template=gemma())
    return Parts(config, processor)


def paligemma(family: str, preset: Preset, text: Mapping[str, Any]) -> Parts:
    """PaliGemma (Gemma: one key-value head) and PaliGemma 2 (Gemma 2: sliding windows, soft-capped scores and logits). No chat template.

    A picture of 28 pixels is 4 tokens. The processor adds the family's 1,152 location and segmentation tokens to the tokenizer. The tiny
    one's soft caps are lower than the family's 50 and 30, so that they bend scores of its size.
    """
    import transformers as hf

    size = SIZES[preset]
    tokenizer = build_tokenizer(
        bos="<bos>", eos="<eos>", pad="<pad>", unk="<unk>", named={"image_token": "<image>"}, max_length=size.context
    )
    settings: dict[str, Any] = {"size": {"height": SIDE, "width": SIDE}, "image_seq_length": (SIDE // size.patch) ** 2}
    processor = hf.PaliGemmaProcessor(image_processor=hf.SiglipImageProcessor(**settings), tokenizer=tokenizer)
    tiny, second = preset == "tiny", family == "paligemma2"
    d_head = 24 if tiny else size.d_head
    language = size.text(tokenizer, head_dim=d_head, rope_parameters=size.rope, tie_word_embeddings=tiny)
    if second:
        caps = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0} if tiny else {}
        language |= {"model_type": "gemma2", "sliding_window": WINDOW if tiny else 64, "query_pre_attn_scalar": d_head} | caps
    else:
        language |= {"model_type": "gemma", "num_key_value_heads": 1}
    config = hf.PaliGemmaConfig(
        text_config=language | dict(text),
        vision_config=tower(size, "siglip_vision_model", image_size=SIDE, vision_use_head=False),
        image_token_index=token_id(tokenizer, "<image>"),
        vocab_size=padded(len(tokenizer)),
        projection_dim=size.d_model,
        hidden_size=size.d_model,
        tie_word_embeddings=tiny,
    )
    return Parts(config, processor)
