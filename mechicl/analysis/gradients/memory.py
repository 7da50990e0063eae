"""Gradients that remember less: MLPs are run again on the way back instead of keeping what is inside them.

Of what a decoder layer keeps for its backward pass, the inside of its MLP is the most (several times `d_mlp` numbers a token, where the attention keeps a few
times `d_model`), and no hook point lies in there, so nothing that an analysis reads is run twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


@contextmanager
def checkpointed(model: Any) -> Iterator[list[str]]:
    """`attribute`, `eap` and every other backward pass inside the block keep less and compute the MLPs twice: the same numbers, about a third more time.

        with checkpointed(model):
            scores = mechicl.eap(model, pairs)

    Args:
        model: A HookedVLM. Other models, and layers without an MLP of their own, are left as they are.

    Yields:
        Which layers' MLPs are run again, by name.
    """
    anatomy = getattr(model, "anatomy", None)
    changed: list[tuple[nn.Module, Any]] = []
    names: list[str] = []
    try:
        for layer, part in enumerate(getattr(anatomy, "layers", ())):
            module = part.mlp if getattr(part, "mlp", None) is not None else part.mlp_out
            if isinstance(module, nn.Module) and next(module.children(), None) is not None:
                changed.append((module, module.__dict__.get("forward")))
                module.forward = _again(module.forward)  # type: ignore[method-assign]
                names.append(f"layer {layer}")
        yield names
    finally:
        for module, before in changed:
            if before is None:
                del module.__dict__["forward"]
            else:  # accelerate's, which reads offloaded weights
                module.forward = before  # type: ignore[method-assign]


def _again(forward: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts what backward passes keep inside the block: {"bytes": of distinct tensors, weights included}."""
    found, seen = {"bytes": 0}, set[int]()

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            found["bytes"] += storage.nbytes()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        yield found
