"""Image token -> patch -> pixel box."""

from __future__ import annotations

from typing import Any

Box = tuple[float, float, float, float]


def image_boxes(processor: Any, config: Any, size: tuple[int, int], n_tokens: int, *, n_images: int = 1) -> list[Box | None]:
    """The pixel box of every image token of one picture, None for tokens without a place, [] where the family's geometry is unknown."""
    return []
