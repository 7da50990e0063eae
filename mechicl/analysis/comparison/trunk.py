"""Do two models share their decoder? How closely the weights of the heads of one index agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechicl.results.comparison import Trunk

BAR = 0.5
"""Median cosine from which heads of one index count as the same head. Fine-tuning leaves it above 0.9; of unrelated models it is near 0."""
NAMES = ("W_Q", "W_K", "W_V", "W_O")


def head_weights(model: Any) -> dict[str, list[Tensor]] | str:
    """W_Q, W_K, W_V, W_O of every layer, each [head or kv_head, ...], copied to the CPU; or why they cannot be read (quantised, no such map)."""
    found: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    try:
        for block in model.blocks:
            for name in NAMES:
                weight: Tensor = getattr(block.attn, name).detach()
                if not weight.is_floating_point():
                    return f"{name} of {model.cfg.model_name} is quantised"
                found[name].append(weight.to("cpu", copy=True))
    except (AttributeError, ValueError, RuntimeError) as error:
        return f"the weights of {model.cfg.model_name} cannot be read head by head ({str(error).splitlines()[0]})"
    return found


def trunk(first: dict[str, list[Tensor]] | str, second: dict[str, list[Tensor]] | str, *, bar: float = BAR) -> Trunk:
    """Cosine between the weights of heads of the same index.

    The cosine is of one head's W_Q (K, V, O), all its numbers in a row. It is not blind to symmetries of a head (a rotation inside d_head leaves the head's function and
    changes its weights), so a low value does not show that two trunks are unrelated; a high one shows that they are the same.
    """
    for side in (first, second):
        if isinstance(side, str):
            return Trunk(False, float("nan"), bar, {}, side)
    assert not isinstance(first, str)
    assert not isinstance(second, str)
    shapes = [[tuple(w.shape) for w in side["W_Q"] + side["W_K"]] for side in (first, second)]
    if shapes[0] != shapes[1]:
        return Trunk(False, float("nan"), bar, {}, f"shapes differ: {_shape(first)} against {_shape(second)}")
    cosine = {name: np.stack([_cosine(a, b) for a, b in zip(first[name], second[name], strict=True)]) for name in NAMES}
    median = float(np.median(np.concatenate([value.ravel() for value in cosine.values()])))
    return Trunk(median >= bar, median, bar, cosine)


def _cosine(a: Tensor, b: Tensor) -> np.ndarray:
    return torch.nn.functional.cosine_similarity(a.double().flatten(1), b.double().flatten(1), dim=1).clamp(-1, 1).numpy()


def _shape(side: dict[str, list[Tensor]]) -> str:
    queries, keys = side["W_Q"], side["W_K"]
    return f"{len(queries)} layers x {queries[0].shape[0]} heads ({keys[0].shape[0]} key/value), d_model {queries[0].shape[1]}, d_head {queries[0].shape[2]}"
