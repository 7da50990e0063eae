"""Families whose processor has parts or tables of its own: feature extractors for sound, tables of sizes, codes in place of patches."""

from __future__ import annotations

from collections.abc import Mapping

from mechicl.training.organisms.every.recipes.recipe import Recipe

RECIPES: Mapping[str, Recipe] = {}

FAILED: Mapping[str, str] = {}
"""Families of this kind whose processor serves no prompt with several pictures, with the reason from its source."""
