"""Real processors of the families beyond the organisms, built without a network, and the tiny model that fits each.

What a family's processor asks for is data in `recipes`: special tokens, the image processor's sizes, further parts, what a chat template writes for a picture.
"""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from typing import Any

import torch

from mechicl.errors import OptionError
from mechicl.training.organisms import FAMILIES as ORGANISMS
from mechicl.training.organisms.every import configuration, enlivened
from mechicl.training.organisms.every.recipes import FAILED, RECIPES
from mechicl.training.organisms.parts import padded
from mechicl.training.organisms.templates import chatml
from mechicl.training.tokenizer import build_tokenizer, token_id


def why_no_processor(family: str) -> str:
    """Why the tests have no processor of this family; "" where they do."""
    if family in ORGANISMS or (family in RECIPES and family not in FAILED):
        return ""
    return FAILED.get(family) or (
        "not built: needs tokens and sizes of its own" if class_name("processing", family) else "transformers maps none"
    )


def class_name(part: str, family: str) -> str:
    """The class that transformers' auto module for `part` (processing, image_processing, video_processing) maps a family to; "" where it maps none."""
    module: Any = import_module(f"transformers.models.auto.{part}_auto")
    names = {
        "processing": "PROCESSOR_MAPPING_NAMES",
        "image_processing": "IMAGE_PROCESSOR_MAPPING_NAMES",
        "video_processing": "VIDEO_PROCESSOR_MAPPING_NAMES",
    }
    found = getattr(module, names[part]).get(family) or ""
    return found if isinstance(found, str) else found.get("torchvision") or next(iter(found.values()))


def build_processor(family: str) -> Any:
    """The family's processor with a tiny tokenizer.

    Raises:
        OptionError: there is no recipe.
    """
    import transformers

    if family not in RECIPES:
        raise OptionError(f"family must be one of {', '.join(RECIPES)}; got {family!r}. {why_no_processor(family)}.")
    recipe = RECIPES[family]
    kind = getattr(transformers, class_name("processing", family))
    words: dict[str, Any] = {"eos": "<|im_end|>", "pad": "<|endoftext|>", "extra": ("<|im_start|>", *recipe.extra), "named": recipe.named}
    tokenizer = build_tokenizer(**words | dict(recipe.words))
    pictures = class_name("image_processing", family) or class_name(
        "image_processing", "qwen2_vl" if "image_pad" in recipe.picture else "glm4v"
    )
    parts: dict[str, Any] = {"image_processor": getattr(transformers, pictures)(**recipe.images), "tokenizer": tokenizer}
    if recipe.parts is not None:
        parts |= recipe.parts(tokenizer)
    if "video_processor" not in parts and "video_processor" in signature(kind.__init__).parameters:
        videos = class_name("video_processing", family) or class_name(
            "video_processing", "qwen3_vl" if "Qwen3" in kind.__name__ else "glm4v"
        )
        parts["video_processor"] = getattr(transformers, videos)()
    if recipe.template != "":
        parts["chat_template"] = recipe.template or chatml(recipe.picture)
    processor = kind(**parts, **recipe.more)
    for name, value in recipe.after.items():
        setattr(processor, name, value)
    return processor


def build_whole(family: str, *, seed: int = 0) -> tuple[Any, Any]:
    """A tiny model of a family and the processor that fits it."""
    processor = build_processor(family)
    tokenizer, recipe = processor.tokenizer, RECIPES[family]
    config = configuration(
        family,
        vocabulary=padded(len(tokenizer)),
        ids={name: token_id(tokenizer, token) for name, token in recipe.ids.items()},
        more=recipe.config(tokenizer) if recipe.config else None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return enlivened(config, seed), processor
