"""An extension of griffe: our docstrings describe parameters that belong together in one line, `rank, alpha: LoRA's ...`."""

from __future__ import annotations

import re
from typing import Any

import griffe

TOGETHER = re.compile(r"^(?P<indent> +)(?P<first>\w+)(?P<rest>(?:, \*{0,2}\w+)+): ", flags=re.MULTILINE)


class Together(griffe.Extension):
    """Gives every parameter its own line, so that each has its type and default, and a name that does not exist is still a warning."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """`[batch][pos]` is a shape, not a link."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"\]\[(?=[a-z])", r"]\\[", obj.docstring.value)

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        if func.docstring is not None:
            func.docstring.value = apart(func.docstring.value)


def apart(docstring: str) -> str:
    """The docstring with one parameter a line: the others of a line refer to its first."""
    head, args, tail = docstring.partition("\nArgs:\n")
    body, blank, after = tail.partition("\n\n")

    def split(found: re.Match[str]) -> str:
        others = re.findall(r"\w+", found["rest"])
        return "".join(f"{found['indent']}{other}: see `{found['first']}`.\n" for other in others) + f"{found['indent']}{found['first']}: "

    return head + args + TOGETHER.sub(split, body) + blank + after
