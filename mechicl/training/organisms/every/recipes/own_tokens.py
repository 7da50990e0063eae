"""Families whose processor counts or writes a picture's tokens in a way of its own: query transformers, crops that overlap, films."""

from __future__ import annotations

from collections.abc import Mapping

from mechicl.training.organisms.every.recipes.recipe import Recipe

RECIPES: Mapping[str, Recipe] = {}

FAILED: Mapping[str, str] = {}
"""Families of this kind whose processor serves no prompt with several pictures, with the reason from its source."""
