"""Image token -> patch -> pixel box in the original picture, with each family's resizing, tiling, padding and cropping undone.

A processor shows the vision tower one or more *views* of a picture (the whole of it, a tile, a crop). A view is an upright rectangle of the picture,
possibly larger than it where the processor pads, cut into rows x cols equal cells; the family's tokens go through the cells row by row. (The merging
of 2 x 2 patches and the window order inside Qwen's tower are undone by the tower itself before its tokens reach the decoder; the tests
check the whole chain, pixels to tokens, for every family.) The families' layouts are in `mechicl.prompts.geometry`.
"""

from __future__ import annotations

from mechicl.prompts.geometry import GEOMETRY, Boxes, Picture


def image_boxes(picture: Picture) -> Boxes:
    """The pixel box of every image token of a picture.

    Returns:
        (left, top, right, bottom) in the picture's pixels for each image token in prompt order, None for a token that stands for no place (row breaks,
        class tokens, padding). Empty where the family's geometry is not known or does not account for every token.
    """
    layout = GEOMETRY.get(getattr(picture.config, "model_type", ""))
    boxes = layout(picture) if layout is not None else []  # no boxes rather than wrong ones
    return boxes if len(boxes) == picture.n_tokens else []


__all__ = ["GEOMETRY", "Boxes", "Picture", "image_boxes"]
