"""A module's functions with something else in their place for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced(changes: Iterable[tuple[nn.Module, str, Callable[..., Any]]]) -> Iterator[None]:
    """Inside the block, `module.name` is the given function; behind it (also when it raises) what it was, on the module itself or from its class."""
    before: list[tuple[nn.Module, str, Any]] = []
    try:
        for module, name, function in changes:
            before.append((module, name, vars(module).get(name)))
            setattr(module, name, function)
        yield
    finally:
        for module, name, old in reversed(before):
            delattr(module, name)
            if old is not None:
                setattr(module, name, old)
