"""Small vision-language models of transformers' own classes, built from nothing: fixtures and organisms to train.

`build("qwen2_5_vl")` gives a model and its family's real processor without a network: the architectural traits that matter to a hook
(grouped heads, sliding windows, soft-capping, window attention in the vision tower, DeepStack, cross-attention) at a size that builds in
a moment.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from mechicl.errors import OptionError, OutputPathError
from mechicl.training.organisms.gemma import gemma3, paligemma
from mechicl.training.organisms.llava import internvl, llava, llava_next, llava_onevision
from mechicl.training.organisms.others import idefics3, mistral3, mllama
from mechicl.training.organisms.parts import Parts, Preset, enliven, open_gates
from mechicl.training.organisms.qwen import qwen

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

RECIPES: dict[str, Callable[[str, Preset, Mapping[str, Any]], Parts]] = {
    "qwen2_vl": qwen,
    "qwen2_5_vl": qwen,
    "qwen3_vl": qwen,
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "internvl": internvl,
    "gemma3": gemma3,
    "paligemma": paligemma,
    "paligemma2": paligemma,
    "idefics3": idefics3,
    "smolvlm": idefics3,
    "mistral3": mistral3,
    "mllama": mllama,
}

FAMILIES: tuple[str, ...] = tuple(RECIPES)
"""Names that `build` knows: transformers' model types, and `paligemma2` for PaliGemma with Gemma 2 as its decoder."""


def build(
    family: str, *, preset: Preset = "tiny", seed: int = 0, text: Mapping[str, Any] | None = None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A small model of a family with its processor, on the CPU in float32, in evaluation mode.

    Args:
        family: One of `FAMILIES`.
        preset: "tiny" is a fixture whose random weights make every part matter: attention is far from flat and another picture gives
            other logits. "demo" is initialised as transformers does (gates and projections that start at zero are filled) and meant to
            be trained: about a million parameters, untied embeddings, 1 to 16 tokens a picture.
        seed: Seed of the weights; the global random state is left as it was.
        text: Entries of the text configuration to override, e.g. {"num_hidden_layers": 4}.

    Raises:
        OptionError: the family or the preset is not known.
    """
    if family not in RECIPES:
        raise OptionError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}. Pick one of them.")
    if preset not in get_args(Preset):
        raise OptionError(f"preset must be 'tiny' or 'demo'; got {preset!r}. Use 'tiny' for fixtures and 'demo' for training.")
    from transformers import AutoModelForImageTextToText

    parts = RECIPES[family](family, preset, text or {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(parts.config)
        wake = enliven if preset == "tiny" else open_gates
        wake(model, torch.Generator().manual_seed(seed))
    return model.eval(), parts.processor


def save(model: PreTrainedModel, processor: ProcessorMixin, folder: str | os.PathLike[str]) -> Path:
    """Write an ordinary Hugging Face folder (safetensors, configuration, tokenizer, processor) that the Auto classes load.

    Raises:
        OutputPathError: the folder cannot be made.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputPathError(
            f"folder must be a folder that can be written; got {path} ({error.strerror}). Choose another place."
        ) from error
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path
