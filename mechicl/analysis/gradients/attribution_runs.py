"""The passes behind `attribute`: differences between two runs times slopes, on any hook points, along the way from one run to the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mechicl.analysis.gradients.backward import Edit, slopes, values
from mechicl.analysis.gradients.differentiable import Measure
from mechicl.analysis.gradients.through_softmax import Heads, by_key_head
from mechicl.analysis.patching.cells import STATES, Patch, hook_name
from mechicl.analysis.patching.run import Recorded, added_layers

Path = Literal["inputs", "site"]
START = "blocks.0.hook_resid_pre"


@dataclass(frozen=True)
class HookPoints:
    """Hook points of all cells.

    `together`: those whose slopes are taken in one pass. `states`: those that take later additions of the picture along. `outputs`: layers at whose heads'
    outputs the slope is kept, for queries and keys that go through the softmax.
    """

    together: tuple[tuple[str, ...], ...]
    states: frozenset[str]
    outputs: frozenset[int]

    @staticmethod
    def of(patches: Sequence[Patch], layers_at_once: int | None, softmax: bool) -> HookPoints:
        """Those that the cells need."""
        by_layer: dict[int, list[str]] = {}
        through = frozenset(patch.layer for patch in patches if softmax and patch.site in ("q", "k"))
        for patch in patches:
            hook = hook_name("z", patch.layer) if softmax and patch.site in ("q", "k") else patch.hook
            found = by_layer.setdefault(patch.layer, [])
            if hook not in found:
                found.append(hook)
        layers = sorted(by_layer)
        size = layers_at_once or len(layers)
        together = [tuple(hook for layer in layers[k : k + size] for hook in by_layer[layer]) for k in range(0, len(layers), size)]
        return HookPoints(tuple(together), frozenset(patch.hook for patch in patches if patch.site in STATES), through)


@dataclass(eq=False)
class Products:
    """Difference times slope of some pairs, summed over the last axis.

    `found`: hook name -> [blocks * n, pos], [blocks * n, pos, head] or (patterns) [blocks * n, head, dest]. `added`: (hook name, layer) -> the same for what
    DeepStack adds at that layer. `differences`: donor - base by hook name, where several passes need them. `at_z`: mean slope at a layer's heads' outputs.
    """

    model: Any
    recorded: Recorded
    positions: Tensor
    measure: Measure
    blocks: int
    found: dict[str, Tensor] = field(default_factory=dict)
    added: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    differences: dict[str, Tensor] = field(default_factory=dict)
    later: dict[int, Tensor] = field(default_factory=dict)
    at_z: dict[int, Tensor] = field(default_factory=dict)
    heads: Heads | None = None
    worths: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def run(self, hooks: HookPoints, steps: int, path: Path | str) -> Products:
        """All passes."""
        shares = [(k + 0.5) / steps for k in range(steps)] or [0.0]
        if steps:
            self._look([*(name for names in hooks.together for name in names), START])
        for names, moves in self._passes(hooks, steps, path):
            states = [name for name in names if name in hooks.states]
            added = [hook_name("resid_pre", layer) for layer in self.recorded.chunk.additions] if states else []
            asked = list(dict.fromkeys((*names, *added)))
            for share in shares:
                edits = moves(share) if share else {}
                slope = slopes(self.model, self.recorded.chunk.base, asked, self.measure, positions=self.positions, edits=edits)
                for name in names:
                    difference = self.differences[name] if steps else self._difference(name, slope.values[name])
                    gradient = slope.gradients[name].float() / len(shares)
                    self._add(self.found, name, difference * gradient)
                    if (layer := _layer(name)) in hooks.outputs and name == hook_name("z", layer):
                        self.at_z[layer] = self.at_z.get(layer, 0) + gradient
                for name, layer in ((name, layer) for name in states for layer in self.recorded.chunk.additions):
                    gradient = slope.gradients[hook_name("resid_pre", layer)].float()
                    self._add(self.added, (name, layer), self.recorded.chunk.additions[layer].float() * gradient / len(shares))
        if hooks.outputs:
            self.heads = Heads.of(self.model, self.recorded.chunk.base, self.at_z, positions=self.positions)
        return self

    def _passes(
        self, hooks: HookPoints, steps: int, path: Path | str
    ) -> Iterator[tuple[tuple[str, ...], Callable[[float], dict[str, Edit]]]]:
        """Hook points whose slopes are taken together, and what is moved on the way."""
        for names in hooks.together:
            if steps and path == "site":
                for name in names:
                    yield (name,), lambda share, name=name: self._moves(name, share, name in hooks.states)
            else:
                yield names, lambda share: self._moves(START, share, True)

    def _moves(self, name: str, share: float, state: bool) -> dict[str, Edit]:
        """`share` of the way to the donor's activation; a state takes DeepStack's later additions along."""
        moved = {name: _toward(self.differences[name], share)}
        layer = _layer(name)
        for k, difference in self._additions().items() if state else ():
            if k > layer:
                moved[hook_name("resid_pre", k)] = _toward(difference.float(), share)
        return moved

    def _additions(self) -> Mapping[int, Tensor]:
        """What DeepStack adds in the donor run minus in the base run, by layer, also where no cell asked for it."""
        chunk = self.recorded.chunk
        layers = added_layers(self.model)
        if layers and not chunk.additions and not self.later:
            names = [hook_name(site, layer - (site == "resid_post")) for layer in layers for site in ("resid_pre", "resid_post")]
            base, donor = self._both(names)
            for layer in layers:
                pre, post = hook_name("resid_pre", layer), hook_name("resid_post", layer - 1)
                self.later[layer] = chunk.alignment.apply(donor[pre] - donor[post]) - (base[pre] - base[post])
        return chunk.additions or self.later

    def _both(self, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What passes hook points in both runs."""
        part = self.recorded
        base, _ = values(self.model, part.chunk.base, names, lambda x: x, positions=self.positions)
        donor, _ = values(self.model, part.donor, names, lambda x: x, positions=part.donor_positions)
        return base, donor

    def _look(self, names: Sequence[str]) -> None:
        """Run both prompts for the differences at hook points."""
        base, donor = self._both(names)
        self.recorded.chunk.donor.update(donor)
        for name in names:
            self.differences[name] = self._difference(name, base[name])

    def _difference(self, name: str, base: Tensor) -> Tensor:
        """donor - base at a hook point, at the base's positions, float32; nought where a position has no counterpart."""
        chunk = self.recorded.chunk
        if name not in chunk.donor:
            kept, _ = values(self.model, self.recorded.donor, [name], lambda x: x, positions=self.recorded.donor_positions)
            chunk.donor[name] = kept[name]
        difference = chunk.value(name).float() - base.float()
        return difference if name.endswith("pattern") else self._known(difference)

    def _known(self, difference: Tensor) -> Tensor:
        alignment = self.recorded.chunk.alignment
        if alignment.same:
            return difference
        known = alignment.known.to(difference.device)
        return difference * known.reshape(*known.shape, *(1,) * (difference.dim() - 2))

    @staticmethod
    def _add(sums: dict[Any, Tensor], key: Any, products: Tensor) -> None:
        """Products in float32, whatever the model's dtype, summed over the last axis."""
        found = products.sum(-1)
        sums[key] = sums[key] + found if key in sums else found

    def change(self, patch: Patch) -> np.ndarray:
        """What a cell changes, in the metric's unit, [batch]."""
        chunk = self.recorded.chunk
        mask = chunk.mask(patch.group)
        if not chunk.alignment.same:
            mask = mask & chunk.alignment.known
        if patch.site == "image_features":
            mask = mask & chunk.pictures
        if self.heads is not None and patch.site in ("q", "k"):
            total = self._through(self.heads, mask, patch)
        else:
            total = self._masked(self.found[patch.hook], mask, patch)
        if patch.site in STATES:
            for layer in chunk.additions:
                if layer > patch.layer:
                    total = total + self._masked(self.added[patch.hook, layer], mask, patch)
        return total.reshape(self.blocks, -1).sum(0).double().cpu().numpy()

    def _through(self, heads: Heads, mask: Tensor, patch: Patch) -> Tensor:
        """A cell of queries or keys through the softmax as it is, [blocks * n]. Queries ask each for itself; keys compete, so each group of them is one call."""
        assert patch.head is not None
        key = (patch.layer, patch.site, None if patch.site == "q" else patch.group)
        if key not in self.worths:
            own = heads.at(patch.layer, patch.site)
            there = (self.recorded.chunk.real if patch.site == "q" else mask).to(own.device)[..., None, None]
            if not self.recorded.chunk.alignment.same:
                there = there & self.recorded.chunk.alignment.known.to(own.device)[..., None, None]
            self._difference(patch.hook, own)  # fetches the donor's
            changed = torch.where(there, self.recorded.chunk.value(patch.hook).to(own), own)
            worth = heads.worth(patch.layer, patch.site, changed[None])[0]
            self.worths[key] = worth if patch.site == "q" else by_key_head(worth.sum(1), own.shape[2])
        found = self.worths[key]
        return (found[:, :, patch.head] * mask.to(found.device)).sum(1) if patch.site == "q" else found[:, patch.head]

    @staticmethod
    def _masked(product: Tensor, mask: Tensor, patch: Patch) -> Tensor:
        if patch.head is not None:
            product = product[:, patch.head] if patch.site == "pattern" else product[:, :, patch.head]
        return (product * mask.to(product.device)).sum(1)


def _layer(name: str) -> int:
    """Of a hook point; 0 for the model's inputs."""
    return int(name.split(".")[1]) if name.startswith("blocks") else 0


def _toward(difference: Tensor, share: float) -> Edit:
    return lambda x: (x.float() + share * difference).to(x.dtype)
