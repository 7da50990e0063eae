"""Families whose processor counts or writes a picture's tokens in a way of its own (their recipes: `own_tokens` beside the tiny checkpoints)."""

from __future__ import annotations

from mechicl.prompts.geometry.picture import Layout

OWN_TOKENS: dict[str, Layout] = {}
