"""Real processors of the families, built without a network."""

from __future__ import annotations

from mechicl.training.organisms import FAMILIES as BUILT


def why_no_processor(family: str) -> str:
    """Why the tests have no processor of this family; "" where they do."""
    return "" if family in BUILT else "not built yet"
