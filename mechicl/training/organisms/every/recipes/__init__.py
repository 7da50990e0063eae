"""How each family's processor is built, as data: one module for each nature of the pictures."""

from __future__ import annotations

from collections.abc import Mapping

from mechicl.training.organisms.every.recipes import grids, own_parts, own_tokens, squares
from mechicl.training.organisms.every.recipes.recipe import Recipe

RECIPES: Mapping[str, Recipe] = {**grids.RECIPES, **squares.RECIPES, **own_parts.RECIPES, **own_tokens.RECIPES}
FAILED: Mapping[str, str] = {**squares.FAILED, **own_parts.FAILED, **own_tokens.FAILED}
"""Families whose processor serves no prompt with several pictures, with the reason from its source."""

__all__ = ["FAILED", "RECIPES", "Recipe"]
