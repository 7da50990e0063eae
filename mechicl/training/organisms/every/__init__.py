"""A tiny random checkpoint of every decoder-only family that transformers maps from pictures and text to text, built from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mechicl.errors import OptionError
from mechicl.models.families import FAMILIES, TESTED
from mechicl.training.organisms.every.pictures import prompt
from mechicl.training.organisms.every.shrink import tiny
from mechicl.training.organisms.every.special import SPECIAL
from mechicl.training.organisms.parts import enliven

EVERY = TESTED
"""The 84 decoder-only families of transformers' mapping from pictures and text to text, and Mllama."""
OUT_OF_SCOPE = tuple(name for name, family in FAMILIES.items() if family.refused)
"""The rest of the mapping: refused by name."""


def configuration(
    family: str, *, vocabulary: int | None = None, ids: Mapping[str, int] | None = None, more: Mapping[str, Mapping[str, Any]] | None = None
) -> Any:
    """The family's configuration, as small as it gets; with the vocabulary, the special tokens and the sizes of a processor where they are given."""
    from transformers import CONFIG_MAPPING

    kind: Any = CONFIG_MAPPING[family]
    kwargs = tiny(kind())
    for part, new in (*SPECIAL.get(family, {}).items(), *(more or {}).items()):
        (kwargs.setdefault(part, {}) if part else kwargs).update(new)
    if vocabulary is not None:
        owner = kwargs.get("text_config", kwargs)
        owner |= {"vocab_size": vocabulary}
    return kind(**kwargs | dict(ids or {}))


def enlivened(config: Any, seed: int) -> Any:
    """A model with weights that hide nothing, in evaluation mode."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_config(config).eval()
    enliven(model, torch.Generator().manual_seed(seed))
    _quieten(model)
    return model


def build_every(family: str, *, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """A tiny model of a family and one prompt with a picture for it.

    Args:
        family: One of `EVERY`.
        seed: Of weights and prompt; the global random state is left as it was.

    Returns:
        The model, in evaluation mode; what its forward takes, whole: input_ids [1, pos] of 14 words with a picture in them, pixels and what goes with them.

    Raises:
        OptionError: not a family of `EVERY`.
    """
    if family not in EVERY:
        raise OptionError(f"family must be one of the {len(EVERY)} in mechicl.models.families.TESTED; got {family!r}. Others are refused.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = enlivened(configuration(family), seed)
    return model, prompt(model, seed=seed)


@torch.no_grad()
def _quieten(model: Any) -> None:
    """What random weights would drown or flatten.

    Words, where a family multiplies what it reads from the vocabulary; every code but one, where a quantiser's codes lie far outside what it reads.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and "quantize" in name:
            module.weight *= 0.1
    text = model.config.get_text_config()
    factor = float(getattr(text, "embedding_multiplier", 1.0) or 1.0)
    if getattr(text, "scale_embedding", False):
        factor = model.get_output_embeddings().weight.shape[1] ** 0.5
    if factor != 1.0:
        model.get_input_embeddings().weight /= factor
