"""Attention patterns of chosen heads, token by token, drawn by circuitsvis. The one home of circuitsvis.

circuitsvis draws what it is given: a wrong number of tokens or a NaN in silence, and `</script>` in a token ends its script. Here both are checked
first, the data is escaped, the element gets a fixed id, and nothing is ever loaded from a network: only the script installed with the package is used.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mechicl.errors import NotFiniteError, OptionError
from mechicl.results import Head, PromptView
from mechicl.views.words import name

MAX_TOKENS = 96
"""Tokens drawn by default; a pattern has their square in cells, and a browser slows down beyond about 100."""

LONGEST = 512
"""Prompts beyond it have too many tokens to be thinned to `MAX_TOKENS` with sense: `plots.plot_pattern` draws these."""

MAX_HEADS = 8
"""Heads drawn by default."""

_PRIORITY: Mapping[str, int] = {"label": 0, "text": 1, "image": 2, "question": 3, "instruction": 4, "glue": 5, "pad": 6}


@dataclass(frozen=True)
class AttentionView:
    """A ready view: `element` (an empty div) and `call` (the script that fills it once the library is on the page).

    `note` says in words what was left out; `positions` are the drawn token positions.
    """

    element: str
    call: str
    note: str
    positions: tuple[int, ...]
    heads: tuple[Head, ...]

    def page(self) -> str:
        """A page of its own that opens from disk with no network."""
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Attention patterns</title></head><body>'
            f"{self.element}<script>{library()}</script><script>{self.call}</script></body></html>"
        )


def choose_positions(view: PromptView, limit: int = MAX_TOKENS, heads: Sequence[Head] = ()) -> tuple[int, ...]:
    """The token positions to draw when not all fit: first and last token, what the last token of any of `heads` reads (a twentieth of its attention or
    more), labels, then images (thinned evenly), questions, instruction, template.

    Returns:
        At most `limit` positions in prompt order.

    Raises:
        OptionError: `limit` is below 2.
    """
    if limit < 2:
        raise OptionError(f"limit must be at least 2; got {limit}. Draw at least the first and the last token.")
    n = len(view.tokens)
    if n <= limit:
        return tuple(range(n))
    chosen = {0, n - 1}
    rows = [np.asarray(view.rows[h] if h in view.rows else view.patterns[h][-1]) for h in heads if h in view.rows or h in view.patterns]
    read = np.max(rows, axis=0) if rows else np.zeros(n)
    chosen |= set(np.argsort(-read, kind="stable")[: min(limit // 2, int((read >= 0.05).sum()))].tolist())
    chosen = set(sorted(chosen, key=lambda p: (p not in (0, n - 1), -read[p]))[:limit])
    for rank in sorted(set(_PRIORITY.values())):
        group = [p for p in range(n) if p not in chosen and _PRIORITY.get(view.roles[p], 5) == rank]
        room = limit - len(chosen)
        if len(group) > room:
            picked = np.linspace(0, len(group) - 1, num=room).round().astype(int) if room else np.array([], dtype=int)
            chosen |= {group[k] for k in picked.tolist()}
            break
        chosen |= set(group)
    return tuple(sorted(chosen))


def check_pattern(pattern: np.ndarray, n: int, head: Head) -> None:
    """Refuse what would be drawn wrongly in silence.

    Raises:
        OptionError: the pattern is not [n, n].
        NotFiniteError: it holds a NaN or an infinity.
    """
    if pattern.shape != (n, n):
        raise OptionError(
            f"the pattern of head {name(head)} must be [{n}, {n}] like the tokens; got {list(pattern.shape)}. Pass the pattern of this very prompt."
        )
    if not np.isfinite(pattern).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(pattern))[0])
        raise NotFiniteError(
            f"the pattern of head {name(head)} must be finite; got {pattern[where]} at {where}. Look for an overflow with `mechicl doctor`."
        )


def attention_view(
    view: PromptView,
    heads: Sequence[Head] | None = None,
    *,
    max_tokens: int = MAX_TOKENS,
    max_heads: int = MAX_HEADS,
    element_id: str = "attention",
) -> AttentionView:
    """Patterns of a few heads on one prompt, to be hovered over.

    Args:
        view: The prompt; it holds the patterns.
        heads: Which heads, in order; by default all that the prompt view holds.
        max_tokens: Longer prompts are thinned by `choose_positions`, and the note says so.
        max_heads: Further heads are left out, and the note says so.
        element_id: Id of the element, unique on the page.

    Raises:
        OptionError: a head without a pattern, a pattern of another size, no head at all.
        NotFiniteError: a pattern holds a NaN or an infinity.
    """
    heads = tuple(view.patterns) if heads is None else tuple(heads)
    missing = [h for h in heads if h not in view.patterns]
    if missing or not heads:
        raise OptionError(
            f"heads must have a pattern in the prompt view; got {missing or 'none'}, kept {sorted(view.patterns)}. Ask for them when it is made."
        )
    drawn = heads[:max_heads]
    positions = choose_positions(view, max_tokens, drawn)
    at = np.asarray(positions)
    stack = []
    for head in drawn:
        pattern = np.asarray(view.patterns[head], dtype=float)
        check_pattern(pattern, len(view.tokens), head)
        stack.append(np.round(pattern[np.ix_(at, at)], 4).tolist())
    props = {
        "attention": stack, "attentionHeadNames": [name(h) for h in drawn], "tokens": _words(view, positions),
        "maxValue": 1.0, "minValue": -1.0, "positiveColor": "#2f78bd", "negativeColor": "#cf5a14",
        "maskUpperTri": not any(np.triu(np.asarray(grid), 1).any() for grid in stack),
    }  # fmt: skip
    identifier = json.dumps(element_id).replace("<", "\\u003c")
    call = f"CircuitsVis.render({identifier}, CircuitsVis.AttentionHeads, {_script_safe(props)});"
    return AttentionView(
        f'<div id="{html.escape(element_id)}" class="circuitsvis"></div>', call, _note(view, positions, heads, drawn), positions, drawn
    )


def _words(view: PromptView, positions: Sequence[int]) -> list[str]:
    """What stands at the axes: the token, a picture's tokens as "picture 2, token 1", long tokens cut; blanks made visible."""
    where = {p: f"picture {k + 1}, token {i + 1}" for k, box in enumerate(view.image_boxes) for i, p in enumerate(sorted(box))}
    return [where.get(p) or (view.tokens[p].replace("\n", "\u21b5").strip(" ") or "\u2423")[:24] for p in positions]


def _note(view: PromptView, positions: Sequence[int], heads: Sequence[Head], drawn: Sequence[Head]) -> str:
    parts = ["Values are rounded to four digits."]
    if len(positions) < len(view.tokens):
        parts.append(
            f"{len(positions)} of {len(view.tokens)} tokens are drawn (what the heads read from the last token, labels, pictures and questions first; the template's own left out), so the rows shown need not sum to one."
        )
    if len(drawn) < len(heads):
        parts.append(f"{len(drawn)} of {len(heads)} heads are drawn.")
    return " ".join(parts)


def _script_safe(value: object) -> str:
    """JSON that cannot end its script or open a comment in it: every <, > and & written as an escape."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@lru_cache(maxsize=1)
def library() -> str:
    """circuitsvis' own browser script, as installed, to be inlined once per page. It defines the global `CircuitsVis`."""
    from circuitsvis.attention import attention_heads

    source = attention_heads(attention=[[[1.0]]], tokens=["a"]).local_src
    start, stop = source.index('module">') + len('module">'), source.rindex("CircuitsVis.render(")
    script = source[start:stop].strip()
    lines = [line for line in script.splitlines() if not line.startswith("//# sourceMappingURL")]
    return "\n".join(lines).replace("</script", "<\\/script").replace("<!--", "<\\!--")
