"""Families whose processor has parts or tables of its own (their recipes: `own_parts` beside the tiny checkpoints)."""

from __future__ import annotations

from mechicl.prompts.geometry.picture import Layout

OWN_PARTS: dict[str, Layout] = {}
