"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: pictures of any size, 2 x 2 patches merged into a token, three-axis rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mechicl.training.organisms.parts import SIZES, Parts, Preset, Size
from mechicl.training.organisms.templates import chatml
from mechicl.training.tokenizer import build_tokenizer, token_id

MARKERS = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
MERGE = 2


def sections(size: Size, *, interleaved: bool) -> dict[str, Any]:
    """Rotary frequencies shared among time, height and width, in about the real proportions (16:24:24; Qwen3-VL 24:20:20)."""
    half = size.d_head // 2
    side = half * (20 if interleaved else 24) // 64
    shares = {"rope_type": "default", "rope_theta": size.rope_theta, "mrope_section": [half - 2 * side, side, side]}
    return {**shares, "mrope_interleaved": True} if interleaved else shares


def qwen(family: str, preset: Preset, text: Mapping[str, Any]) -> Parts:
    """Configuration and processor of `qwen2_vl`, `qwen2_5_vl` or `qwen3_vl`.

    A 28 x 28 picture is one token (32 x 32 on Qwen3-VL), 56 x 56 four, 112 x 112 sixteen; that is also the most.
    """
    import transformers as hf

    size = SIZES[preset]
    tokenizer = build_tokenizer(eos="<|im_end|>", pad="<|endoftext|>", extra=(*MARKERS, "<|image_pad|>"), max_length=size.context)
    third = family == "qwen3_vl"
    patch = 16 if third else size.patch
    vision: dict[str, Any] = {"depth": size.vision_layers, "num_heads": size.vision_heads, "patch_size": patch, "spatial_merge_size": MERGE}
    if family == "qwen2_vl":
        vision |= {"embed_dim": size.vision_width, "hidden_size": size.d_model, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": size.vision_width, "intermediate_size": size.vision_mlp, "out_hidden_size": size.d_model}
    n_layers = size.n_layers
    if family == "qwen2_5_vl":
        vision |= {"window_size": 2 * MERGE * patch, "fullatt_block_indexes": [size.vision_layers - 1]}
        # the bundled model: a layer more than the circuit needs, so that random heads can serve as its control
        n_layers += preset == "demo"
    if third:
        vision |= {"depth": 3, "deepstack_visual_indexes": [0, 1, 2], "num_position_embeddings": 64}
        n_layers = 4 if preset == "tiny" else 3  # the tiny one keeps a layer that DeepStack does not reach
    language = size.text(tokenizer, num_hidden_layers=n_layers, rope_parameters=sections(size, interleaved=third))
    if third:
        language["head_dim"] = size.d_head
    ids = {
        name: token_id(tokenizer, token)
        for name, token in (
            ("image_token_id", "<|image_pad|>"),
            ("video_token_id", "<|video_pad|>"),
            ("vision_start_token_id", "<|vision_start|>"),
            ("vision_end_token_id", "<|vision_end|>"),
        )
    }
    names = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
    config = getattr(hf, names[family] + "Config")(
        text_config=language | dict(text), vision_config=vision, tie_word_embeddings=False, **ids
    )
    cell = (MERGE * patch) ** 2
    pictures = hf.Qwen2VLImageProcessor(patch_size=patch, merge_size=MERGE, size={"shortest_edge": cell, "longest_edge": 16 * cell})
    video_class = hf.Qwen3VLVideoProcessor if third else hf.Qwen2VLVideoProcessor
    videos = video_class(patch_size=patch, merge_size=MERGE, size={"shortest_edge": cell, "longest_edge": 16 * cell})
    template = chatml(PICTURE, default_system="" if third else "You are a helpful assistant.")
    processor = getattr(hf, names[family] + "Processor")(
        image_processor=pictures, tokenizer=tokenizer, video_processor=videos, chat_template=template
    )
    return Parts(config, processor)
