"""What a recipe says, and the sizes that many share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mechicl.training.organisms.every.shrink import PATCH, SIDE

CELL = (2 * PATCH) ** 2
"""Pixels of a merged token of a family with a grid of patches."""
GRID = {"patch_size": PATCH, "merge_size": 2, "size": {"shortest_edge": 4 * CELL, "longest_edge": 16 * CELL}}
SQUARE = {"size": {"height": SIDE, "width": SIDE}}


@dataclass(frozen=True)
class Recipe:
    """How a family's processor is built.

    Attributes:
        picture: What the chat template writes for a picture.
        named: Special tokens that the tokenizer has as attributes.
        extra: Further special tokens.
        images: Arguments of the image processor.
        more: Arguments of the processor.
        ids: Entries of the configuration that are a token's id.
        config: Further entries of the configuration, by sub-configuration ("" is the whole), from the tokenizer: what its tokens or the processor's sizes decide.
        words: Arguments of the tokenizer, e.g. its first token.
        parts: Makes what else the processor is made of from its tokenizer: a feature extractor, a second tokenizer, a video processor.
        after: What is set on the processor when it is built.
        template: The chat template; None is ChatML, "" is none, where the processor takes none.
    """

    picture: str
    named: Mapping[str, str] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    images: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    ids: Mapping[str, str] = field(default_factory=dict)
    config: Callable[[Any], Mapping[str, Mapping[str, Any]]] | None = None
    words: Mapping[str, Any] = field(default_factory=dict)
    parts: Callable[[Any], Mapping[str, Any]] | None = None
    after: Mapping[str, Any] = field(default_factory=dict)
    template: str | None = None
