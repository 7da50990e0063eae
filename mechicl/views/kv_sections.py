"""The section on keys and values: figures with their words, and what is said where a part is missing."""

from __future__ import annotations

from typing import Any

from mechicl.results import KVStory
from mechicl.views import kv_story
from mechicl.views.page import Block, block
from mechicl.views.plots import plot


def kv_section(story: KVStory | None) -> dict[str, Any] | None:
    """What the report's section is filled with: sentences, figures, notes, definitions; None where nothing was asked."""
    if story is None:
        return None
    return {
        "told": kv_story.kv_told(story),
        "blocks": kv_blocks(story),
        "notes": kv_story.kv_notes(story),
        "definitions": kv_story.DEFINITIONS,
    }


def kv_blocks(story: KVStory) -> list[Block]:
    """Figures of the parts that there are."""
    out: list[Block] = []
    if (shift := story.shift) is not None:
        out.append(block("kv-shift", "", plot(shift), kv_story.about_shift(shift), shift.to_frame()))
    if (test := story.similarity) is not None:
        out.append(block("kv-similarity", "", plot(test), kv_story.about_similarity(test), test.to_frame()))
    if (shares := story.shares) is not None:
        out.append(block("kv-plane", "", plot(shares), kv_story.about_plane(shares), shares.to_frame()))
        out.append(block("kv-answers", "", plot(shares, show="answers"), kv_story.about_answers(shares), shares.answers_frame()))
    if (margin := story.margin) is not None:
        out.append(block("kv-margin", "", plot(margin), kv_story.about_margin(margin, story.prompts), margin.to_frame()))
    return out
