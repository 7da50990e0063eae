"""A tiny random checkpoint of every decoder-only family that transformers maps from pictures and text to text, built from its configuration."""

from __future__ import annotations

from typing import Any

import torch

from mechicl.training.organisms.every.pictures import prompt
from mechicl.training.organisms.every.shrink import tiny
from mechicl.training.organisms.every.special import SPECIAL
from mechicl.training.organisms.parts import enliven


def configuration(family: str) -> Any:
    """The family's configuration, as small as it gets."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    kwargs = tiny(kind())
    for part, new in SPECIAL.get(family, {}).items():
        (kwargs.setdefault(part, {}) if part else kwargs).update(new)
    return kind(**kwargs)


def build_every(family: str, *, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """A tiny model of a family and one prompt with a picture for it."""
    from transformers import AutoModelForImageTextToText

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(configuration(family)).eval()
        enliven(model, torch.Generator().manual_seed(seed))
        _quieten(model)
    return model, prompt(model, seed=seed)


@torch.no_grad()
def _quieten(model: Any) -> None:
    """Where a family multiplies what it reads from the vocabulary, words would drown the picture: undo it in the weights."""
    text = model.config.get_text_config()
    factor = float(getattr(text, "embedding_multiplier", 1.0) or 1.0)
    if getattr(text, "scale_embedding", False):
        factor = model.get_output_embeddings().weight.shape[1] ** 0.5
    if factor != 1.0:
        model.get_input_embeddings().weight /= factor
