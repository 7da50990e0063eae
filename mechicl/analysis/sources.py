"""Heads' outputs at chosen tokens, split by the kind of token that was read: pattern times values, summed over a kind's tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechicl.analysis.kinds import KINDS, kind_masks
from mechicl.prompts.batch import Batch


class Sources:
    """Keeps z of the last token, split over `KINDS`, during one `attention_rows` run: give `hooks` to the model, `keep` as its reducer.

    Args:
        model: A hooked model.
        batch: The prompts that will run.
    """

    def __init__(self, model: Any, batch: Batch) -> None:
        self.model, self.masks = model, kind_masks(batch)
        self.values: dict[int, Tensor] = {}
        self.z: dict[int, Float[Tensor, "batch head span d_head"]] = {}

    @property
    def hooks(self) -> list[tuple[str, Callable[..., None]]]:
        """(hook name, function) for the forward pass: the values, until their layer's attention has been read."""
        names = [f"blocks.{layer}.attn.hook_v" for layer in range(self.model.cfg.n_layers)]
        return [(name, self._value) for name in names if name in self.model.hook_dict]

    def _value(self, v: Tensor, hook: Any) -> None:
        self.values[int(hook.name.split(".")[1])] = v.detach()

    def keep(self, layer: int, _: Tensor, rows: Float[Tensor, "batch head one src"]) -> None:
        """Sum one layer's rows over kinds. Query heads share values in groups."""
        values = self.values.pop(layer).float()
        kinds = torch.stack([self.masks[kind] for kind in KINDS], 1).to(rows.device)  # [batch, span, src]
        n_kv = values.shape[2]
        split = rows[:, :, 0, None].float() * kinds[:, None]  # [batch, head, span, src]
        grouped = split.unflatten(1, (n_kv, -1))
        self.z[layer] = torch.einsum("bgesk,bkgd->bgesd", grouped, values).flatten(1, 2)

    def toward(self, direction: Float[Tensor, "batch d_model"]) -> dict[str, Float[Tensor, "batch span"]]:
        """Each head's part along a direction of the stream, by kind: {"layer.head": [batch, span]}."""
        found = {}
        for layer, z in self.z.items():
            into = torch.einsum("hdm,bm->bhd", self.model.blocks[layer].attn.W_O.float(), direction)
            value = torch.einsum("bhsd,bhd->bhs", z, into).cpu()
            found |= {f"{layer}.{head}": value[:, head] for head in range(value.shape[1])}
        return found
