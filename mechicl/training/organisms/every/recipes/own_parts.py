"""Families whose processor has parts or tables of its own: feature extractors for sound, tables of sizes, codes in place of patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mechicl.training.organisms.every.recipes.recipe import GRID, SQUARE, Recipe
from mechicl.training.organisms.every.shrink import PATCH, SIDE
from mechicl.training.organisms.templates import chatml
from mechicl.training.tokenizer import token_id

Parts = Callable[[Any], Mapping[str, Any]]


def hearing(name: str) -> Parts:
    """The feature extractor of sound that a processor asks for, with its own sizes: no prompt of ours has any."""

    def parts(tokenizer: Any) -> Mapping[str, Any]:
        import transformers

        return {"feature_extractor": getattr(transformers, name)()}

    return parts


def codes(pattern: str, *others: str) -> Callable[[Any], Mapping[str, int]]:
    """Where the words of a quantiser's 16 codes stand in the vocabulary, with the picture's placeholder and `others`."""

    def vocabulary_map(tokenizer: Any) -> Mapping[str, int]:
        return {token: token_id(tokenizer, token) for token in ("<image>", *others, *written(pattern))}

    return vocabulary_map


def written(pattern: str) -> tuple[str, ...]:
    """The words of a quantiser's 16 codes."""
    letters = [chr(ord("A") + k // 10) + chr(ord("A") + k % 10) for k in range(16)]
    return tuple(pattern.format(number=k, letters=letters[k]) for k in range(16))


def soft_tokens(tokenizer: Any) -> Mapping[str, Mapping[str, Any]]:
    """Gemma 3n: the soft tokens of pictures and sound lie behind all words, each kind with a vocabulary of its own."""
    image, audio = token_id(tokenizer, "<image_soft_token>"), token_id(tokenizer, "<audio_soft_token>")
    return {
        "text_config": {"vocab_size_per_layer_input": image},
        "vision_config": {"vocab_offset": image, "vocab_size": audio - image},
        "audio_config": {"vocab_offset": audio, "vocab_size": 2},
    }


_GEMMA = {"boi_token": "<|image>", "eoi_token": "<image|>", "boa_token": "<|audio>", "eoa_token": "<audio|>", "image_token": "<|image|>", "audio_token": "<|audio|>"}  # fmt: skip
_GEMMA_IDS = {
    "boi_token_id": "<|image>", "eoi_token_id": "<image|>", "boa_token_id": "<|audio>", "image_token_id": "<|image|>", "audio_token_id": "<|audio|>", "video_token_id": "<|video|>",
}  # fmt: skip
_POOLED = {"patch_size": PATCH, "max_soft_tokens": 70, "pooling_kernel_size": 2}

_VISUAL = "<|visual token {number:06d}|>"
_IMGIMG = "IMGIMG{letters}Z"

RECIPES: Mapping[str, Recipe] = {
    "aria": Recipe(
        "<fim_prefix><|img|><fim_suffix>", {"image_token": "<|img|>"}, ("<fim_prefix>", "<fim_suffix>"), {},
        {"size_conversion": {490: 4}}, {"image_token_id": "<|img|>"}, after={"images_kwargs": {"max_image_size": 490, "split_image": False}},
        config=lambda tokenizer: {"vision_config": {"image_size": 490, "patch_size": 98}, "": {"projector_patch_to_query_dict": {25: 4}}},
    ),
    "deepseek_ocr2": Recipe(
        "<image>", {"image_token": "<image>"}, (), {"size": {"height": 192, "width": 192}, "tile_size": 192}, {"patch_size": PATCH, "downsample_ratio": 4},
        {"image_token_id": "<image>"}, config=lambda tokenizer: {"text_config": {"max_position_embeddings": 1024}},
    ),
    "got_ocr2": Recipe(
        "<img><imgpad></img>", {}, ("<img>", "<imgpad>", "</img>"), {"size": {"height": 64, "width": 64}}, ids={"image_token_index": "<imgpad>"},
        config=lambda tokenizer: {"vision_config": {"image_size": 64}}, after={"num_image_tokens": 16},
    ),
    "blip-2": Recipe(
        "", extra=("<image>",), images=SQUARE, ids={"image_token_index": "<image>"}, template="", after={"chat_template": chatml(4 * "<image>")},
    ),
    "chameleon": Recipe(
        "<image>", {"image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>"}, written(_IMGIMG),
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}, {"image_seq_length": 64}, {"image_token_id": "<image>"},
        config=lambda tokenizer: {"": {"vocabulary_map": codes(_IMGIMG)(tokenizer)}, "vq_config": {"resolution": 32}}, template="",
    ),
    "emu3": Recipe(
        "<image>",
        {"image_token": "<image>", "boi_token": "<|image start|>", "eoi_token": "<|image end|>", "image_wrapper_token": "<|image token|>", "eof_token": "<|extra_201|>"},
        ("<|extra_200|>", *written(_VISUAL)), {"min_pixels": 16 * 64, "max_pixels": 64 * 64}, ids={"image_token_id": "<image>"},
        config=lambda tokenizer: {"": {"vocabulary_map": codes(_VISUAL, "<|extra_200|>")(tokenizer)}, "vq_config": {"channel_multiplier": [1, 1, 1, 1]}},
    ),
    "inkling2": Recipe(
        "<|picture|>", {"image_token": "<|picture|>"}, images={"size": {"height": SIDE, "width": SIDE}}, ids={"image_token_id": "<|picture|>"},
        config=lambda tokenizer: {"vision_config": {"patch_size": SIDE // 2}},
    ),
    "dots3_note": Recipe(
        "<|img|><|imgpad|><|endofimg|>", extra=("<|img|>", "<|imgpad|>", "<|endofimg|>", "<|video_pad|>", "<|audio_comp_pad|>"), images={**GRID, "temporal_patch_size": 1},
        ids={"image_token_id": "<|imgpad|>", "video_token_id": "<|video_pad|>", "audio_token_id": "<|audio_comp_pad|>"}, parts=hearing("Dots3NoteFeatureExtractor"),
    ),
    "gemma3n": Recipe(
        "<image_soft_token>",
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>",
         "image_token": "<image_soft_token>", "audio_token": "<audio_soft_token>"},
        images={"size": {"height": 64, "width": 64}}, more={"image_seq_length": 4, "audio_seq_length": 4}, parts=hearing("Gemma3nAudioFeatureExtractor"), config=soft_tokens,
        ids={"image_token_id": "<image_soft_token>", "audio_token_id": "<audio_soft_token>", "boi_token_id": "<start_of_image>", "eoi_token_id": "<end_of_image>"},
    ),
    "gemma4": Recipe(
        "<|image|>", _GEMMA, ("<|video|>",), _POOLED, parts=hearing("Gemma4AudioFeatureExtractor"), ids=_GEMMA_IDS,
        config=lambda tokenizer: {"text_config": {"vocab_size_per_layer_input": 1024}, "vision_config": {"position_embedding_size": 64}},
    ),
    "gemma4_unified": Recipe(
        "<|image|>", _GEMMA, ("<|video|>",), _POOLED, parts=hearing("Gemma4UnifiedAudioFeatureExtractor"), ids=_GEMMA_IDS,
        config=lambda tokenizer: {"vision_config": {"pooling_kernel_size": 2, "mm_posemb_size": 64}},
    ),
    "granite_docling": Recipe(
        "<image>", {"image_token": "<image>"},
        ("<fake_token_around_image>", "<global-img>", *(f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5))),
        {**SQUARE, "max_patches": 4}, {"image_seq_len": 4}, ids={"image_token_id": "<image>"}, config=lambda tokenizer: {"vision_config": {"scale_factor": 2}},
    ),
}  # fmt: skip

FAILED: Mapping[str, str] = {
    "fuyu": "not used: its processor puts one picture before each prompt and a token that opens the answer behind it, and cuts off its own tokenizer's first token"
}
"""Families of this kind whose processor serves no prompt with several pictures, with the reason from its source."""
