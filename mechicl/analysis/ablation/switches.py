"""Sets of heads, switched off: the hooks that replace what a head hands to the output projection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mechicl.analysis.feed import Data, Spreads
from mechicl.analysis.guarded import each_batch
from mechicl.errors import OptionError, UnsupportedModelError
from mechicl.prompts.batch import Batch
from mechicl.results import Head

How = Literal["zero", "mean", "resample"]
"""What a head's output becomes, at all positions, appended answers included. zero: nothing. mean: its mean over all real positions and episodes of the
data. resample: its output in another episode at the same distance from the end of the prompt (the mean where that episode has no token there)."""


def z_name(layer: int) -> str:
    """Hook name of what the heads of a layer hand to the output projection, [batch, pos, head, d_head]."""
    return f"blocks.{layer}.attn.hook_z"


def switchable(model: Any) -> list[int]:
    """Layers whose heads can be switched off."""
    return [layer for layer in range(model.cfg.n_layers) if z_name(layer) in model.hook_dict]


@dataclass(eq=False)
class Switches:
    """Sets of heads to be switched off, and what takes the place of their output.

    `sets`: the sets; an empty one leaves the model as it is. `means`: layer -> [head, d_head]. `seen`: layer -> outputs of the present prompts.
    """

    sets: tuple[tuple[Head, ...], ...]
    how: How
    seed: int = 0
    means: dict[int, Tensor] = field(default_factory=dict)
    seen: dict[int, Tensor] = field(default_factory=dict)

    @staticmethod
    def none() -> Switches:
        """The model as it is."""
        return Switches(((),), "zero")

    @staticmethod
    def build(model: Any, data: Data, sets: Sequence[tuple[Head, ...]], how: How, *, seed: int, batch_size: int) -> Switches:
        """Switches, with the means of the data where they are needed.

        Raises:
            OptionError: an unknown way, or resampling with one episode.
            UnsupportedModelError: a layer has no heads to switch.
        """
        check_how(how, len(data))
        layers = sorted({layer for one in sets for layer, _ in one})
        missing = [layer for layer in layers if layer not in switchable(model)]
        if missing:
            reason = getattr(model, "unavailable", {}).get(z_name(missing[0]), "it has no softmax attention")
            raise UnsupportedModelError(f"heads of layer {missing[0]} must have an output to switch off; {reason}. Choose another layer.")
        means = head_means(model, data, layers, batch_size=batch_size) if how != "zero" and layers else {}
        return Switches(tuple(sets), how, seed, means)

    @property
    def least(self) -> int:
        """Fewest prompts of a batch."""
        return 2 if self.how == "resample" else 1

    @property
    def shareable(self) -> bool:
        """Whether prompts may run apart from their candidates: not when other prompts' outputs were read with candidates behind them."""
        return self.how != "resample"

    def first(self, k: int, n_layers: int) -> int:
        """The lowest layer that set k touches; `n_layers` for a set that leaves the model as it is."""
        return min((layer for layer, _ in self.sets[k]), default=n_layers)

    def _layers(self) -> list[int]:
        return sorted({layer for one in self.sets for layer, _ in one})

    @torch.no_grad()
    def see(self, model: Any, wide: Batch, blocks: int) -> None:
        """Get ready for prompts: read what other episodes' heads say, when that is what takes their place."""
        if self.how != "resample" or not self._layers():
            return
        self.seen, n = {}, wide.n // blocks
        generator = torch.Generator().manual_seed(self.seed)
        shift = int(torch.randint(1, n, (), generator=generator))
        other = torch.cat([block * n + (torch.arange(n) + shift) % n for block in range(blocks)])
        real = _real(wide)[other]
        with model.hooks(fwd_hooks=[(z_name(layer), self._keep(layer, other, real)) for layer in self._layers()]):
            model(wide)

    def _keep(self, layer: int, other: Tensor, real: Tensor) -> Callable[..., None]:
        def keep(z: Tensor, *, hook: Any) -> None:
            there = real.to(z.device)[:, :, None, None]
            self.seen[layer] = torch.where(there, z[other.to(z.device)], self.means[layer].to(z.device, z.dtype))

        return keep

    def hooks(self, group: Sequence[int]) -> list[tuple[str, Callable[..., Tensor]]]:
        """Hooks for a pass in which copy k of the prompts has set group[k] switched off."""
        found = []
        for layer in self._layers():
            heads = [[head for at, head in self.sets[k] if at == layer] for k in group]
            if any(heads):
                found.append((z_name(layer), self._switch(layer, heads)))
        return found

    def _switch(self, layer: int, heads: list[list[int]]) -> Callable[..., Tensor]:
        def switch(z: Tensor, *, hook: Any) -> Tensor:
            off = torch.zeros(len(heads), z.shape[2], dtype=torch.bool, device=z.device)
            for copy, some in enumerate(heads):
                off[copy, some] = True
            off = off.repeat_interleave(len(z) // len(heads), 0)[:, None, :, None]  # prompts, or prompts times candidates
            if self.how == "zero":
                return z.masked_fill(off, 0.0)
            if self.how == "mean":
                return torch.where(off, self.means[layer].to(z.device, z.dtype), z)
            return torch.where(off, self.seen[layer].to(z.device).repeat(len(heads), 1, 1, 1), z)

        return switch


def _real(batch: Batch) -> Tensor:
    mask = batch.inputs.get("attention_mask")
    return torch.ones_like(batch.inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def check_how(how: str, n: int) -> None:
    """Raises OptionError for a way that does not exist, or that needs more episodes."""
    if how not in get_args(How):
        raise OptionError(f"how must be one of {', '.join(get_args(How))}; got {how!r}. mean is the gentlest, zero the paper's.")
    if how == "resample" and n < 2:
        raise OptionError(f"data must hold at least two episodes to resample from one another; got {n}. Draw more, or use mean.")


def head_means(model: Any, data: Data, layers: Sequence[int], *, batch_size: int = 8) -> dict[int, Tensor]:
    """Each head's mean output over all real positions and episodes, layer -> [head, d_head], float32."""
    if isinstance(model, Spreads):
        return model.head_means(data, layers, batch_size=batch_size)
    sums, count = head_sums(model, data, layers, batch_size=batch_size)
    return {layer: total / count for layer, total in sums.items()}


@torch.no_grad()
def head_sums(model: Any, data: Data, layers: Sequence[int], *, batch_size: int = 8) -> tuple[dict[int, Tensor], int]:
    """Each head's output summed over all real positions and episodes, layer -> [head, d_head], float32, and how many positions that were."""
    sums: dict[int, Tensor] = {}

    def work(batch: Batch, rows: range) -> tuple[dict[int, Tensor], int]:
        real, some = _real(batch), dict[int, Tensor]()

        def add(z: Tensor, *, hook: Any) -> None:
            layer = int(hook.name.split(".")[1])
            some[layer] = torch.where(real.to(z.device)[:, :, None, None], z.float(), 0.0).sum((0, 1))

        with model.hooks(fwd_hooks=[(z_name(layer), add) for layer in layers]):
            model(batch)
        return some, int(real.sum())

    count = 0
    for some, n in each_batch(model, data, batch_size, work):
        count += n
        for layer, total in some.items():
            sums[layer] = sums[layer] + total if layer in sums else total
    return sums, count
