"""Where Idefics 2's processor puts a picture's tokens, which it does not tell: between fences, neighbours sharing one, a space behind the last where a word follows.

The renderer holds the tokens that follow from this against the processor's own, one by one, so a rule that changed would be refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def fenced(processor: Any, texts: Sequence[str]) -> list[list[dict[str, Any]]]:
    """The places of each text's pictures, as other processors tell them; none for other processors."""
    if type(processor).__name__ != "Idefics2Processor":
        return [[] for _ in texts]
    return [_places(processor, text) for text in texts]


def _places(processor: Any, text: str) -> list[dict[str, Any]]:
    fence, mark = str(processor.fake_image_token), str(processor.image_token)
    crops = 5 if processor.image_processor.do_image_splitting else 1  # four quarters and the whole
    places: list[dict[str, Any]] = []
    gained = 0
    for found in re.finditer(re.escape(mark), text):
        start, stop = found.span()
        written = fence + (mark * int(processor.image_seq_len) + fence) * crops
        if text[:start].endswith(mark):
            written = written.removeprefix(fence)
        if re.match(r"[^\s<]", text[stop:]):
            written += " "
        places.append({"span": (start, stop), "new_span": (start + gained, start + gained + len(written)), "replacement": written})
        gained += len(written) - (stop - start)
    return places
