"""How each family lays its tokens over a picture: one function a layout, one module a nature of pictures, one table of families.

To add a family: write a function from `Picture` to one box, or None, per image token, and enter it in the table of its module.
"""

from __future__ import annotations

from mechicl.prompts.geometry.own_parts import OWN_PARTS
from mechicl.prompts.geometry.own_tokens import OWN_TOKENS
from mechicl.prompts.geometry.picture import Boxes, Layout, Picture
from mechicl.prompts.geometry.stretched import STRETCHED
from mechicl.prompts.geometry.tiled import TILED

GEOMETRY: dict[str, Layout] = {**STRETCHED, **TILED, **OWN_PARTS, **OWN_TOKENS}
"""How each family lays its tokens over a picture, by the configuration's model_type. Others have no boxes."""

__all__ = ["GEOMETRY", "Boxes", "Layout", "Picture"]
