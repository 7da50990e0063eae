"""nnsight's one home: free exploration of the same Hugging Face model, and the independent path that mechicl's hooks are tested against."""

from __future__ import annotations

from typing import Any


def envoy(hf: Any) -> Any:
    """nnsight's wrapper of a Hugging Face model in memory. Reads must follow the order of execution."""
    from nnsight import NNsight

    return NNsight(hf)
