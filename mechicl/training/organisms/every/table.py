"""docs/families.md's table, written from the tiny models themselves: what is hooked in every family, what is not, and why."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from mechicl.errors import OptionError
from mechicl.models.families import FAMILIES, Family
from mechicl.training.organisms.every import EVERY, OUT_OF_SCOPE, build_every
from mechicl.training.organisms.every.processors import why_no_processor

BEGIN, END = "<!-- families: written by `python -m mechicl.training.organisms.every docs/families.md` -->", "<!-- families end -->"
HEADER = "| family | patterns | not given, and why | per-head attribution | of note | inputs that must be there | processor in tests |\n|---|---|---|---|---|---|---|"


def table() -> str:
    """Every family's line, and the refused ones."""
    refused = [f"| {name} | | refused: {FAMILIES[name].refused} | | | | |" for name in sorted(OUT_OF_SCOPE)]
    return "\n".join([HEADER, *(line(family, hooked(family)) for family in EVERY), *refused])


def hooked(family: str) -> Any:
    """The family's tiny model, hooked."""
    from mechicl.models.vlm import HookedVLM

    model, inputs = build_every(family)
    return HookedVLM(model, None, name=family, probe=inputs)


def line(family: str, model: Any) -> str:
    """One family's line."""
    facts = FAMILIES.get(family, Family())
    no_lens = not (model.anatomy.unembedding.norm is not None and model.anatomy.unembedding.known)
    attribution = f"refused: {_plain(model.not_additive)}" if model.not_additive else "yes"
    cells = [
        family, patterns(model), missing(model), attribution + ("; logit lens refused" if no_lens else ""), "; ".join(notes(model)),
        ", ".join(f"`{name}`" for name in facts.required), why_no_processor(family) or "yes",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def patterns(model: Any) -> str:
    """Which layers have a pattern."""
    parts = model.anatomy.layers
    if all(part.attention is not None for part in parts):
        return "all layers, some to pictures (cross-attention)" if any(part.cross for part in parts) else "all layers"
    return "softmax layers only; the others are convolutions, linear attention, state spaces or MLPs"


def missing(model: Any) -> str:
    """What has no hook point, grouped by reason, layers without softmax attention left out (they are in the column before)."""
    groups: dict[str, dict[str, None]] = defaultdict(dict)
    for name, reason in model.unavailable.items():
        if "calls no softmax attention" not in reason:
            groups[_plain(reason)][name.split(".")[-1].removeprefix("hook_")] = None
    by_names: dict[str, str] = {}
    for reason, names in groups.items():
        by_names.setdefault(reason.replace(" q ", " "), ", ".join(f"`{n}`" for n in names))
    merged: dict[str, str] = {}
    for reason, names in by_names.items():
        general = re.sub(r"has no module whose output is the [qkv] of", "no module gives them for", reason)
        merged[general] = f"{merged[general]}, {names}" if general in merged else names
    return "; ".join(f"{names}: {reason}" for reason, names in merged.items())


def notes(model: Any) -> list[str]:
    """What a reader of the numbers should know."""
    from mechicl.models.attention import AttentionSession, attention_session, fused

    anatomy, found, seen = model.anatomy, [], set()

    def listen(call: Any) -> Any:
        seen.update(name for name in (*call.terms, "indices", "block_indices") if call.kwargs.get(name) is not None)
        return fused(call)

    with attention_session(AttentionSession({}, default=listen), list(anatomy.configs)):
        model(model.probe)
    words = {
        "sinks": "attention sinks: rows sum to less than one", "s_aux": "attention sinks: rows sum to less than one", "softcap": "scores soft-capped",
        "position_bias": "scores with a learned bias of positions", "indices": "sparse: an indexer chooses the keys", "block_indices": "sparse: an indexer chooses blocks of keys",
    }  # fmt: skip
    found += [text for name, text in words.items() if name in seen]
    soft = [part for part in anatomy.layers if part.attention is not None]
    tests = {
        f"{anatomy.streams.n} residual streams side by side": anatomy.streams.n > 1,
        "gate or norm between heads and output projection (`z` is behind it)": any(part.gated for part in soft),
        "heads differ by layer": len({part.n_heads for part in soft}) > 1,
        "widths of heads differ by layer": len({part.d_head for part in soft}) > 1,
        "values narrower than queries": any(part.d_value < part.d_head for part in soft),
        "logits scaled": abs(anatomy.unembedding.scale - 1) > 1e-6,
        "logits soft-capped": anatomy.unembedding.cap is not None,
        "final LayerNorm": getattr(getattr(model, "ln_final", None), "centered", False),
        "pictures also reach later layers past `hook_image_features`": model.family.deepstack,
        "its own positions depend on the rest of a batch: mechicl gives others": bool(model.family.positions),
        "its forward needs a picture": model.family.needs_picture,
        f"no padding: prompts of one length to a batch ({model.family.padding})": bool(model.family.padding),
    }
    return found + [text for text, holds in tests.items() if holds]


def _plain(reason: str) -> str:
    """A reason without the class of the tiny model and its layers' numbers."""
    reason = re.sub(r"^[A-Z]\w+ ", "", reason)
    return re.sub(r"^layers \[[\d, ]+\] ", "some layers ", reason)


def write(path: str | os.PathLike[str]) -> None:
    """Put the table between the marks in a page.

    Raises:
        OptionError: the page has no marks.
    """
    page = Path(path)
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise OptionError(f"path must be a page with {BEGIN!r} and {END!r}; got {page}. Add the marks.")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")
