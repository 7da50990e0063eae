"""Some pairs at a time: both runs recorded, then the cells."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechicl.analysis.patching.cells import EVERYTHING, STATES, Chunk, Patch, hook_name
from mechicl.analysis.patching.edits import keep
from mechicl.analysis.patching.engine import Base, Engine, additions, make_base, stack_hooks
from mechicl.analysis.patching.metrics import Contrast
from mechicl.errors import EpisodeError, UnsupportedModelError
from mechicl.prompts.align import Align, By, align, span_groups
from mechicl.prompts.batch import Batch
from mechicl.results.patching import Direction


@dataclass(frozen=True, eq=False)
class Sweep:
    """What all chunks share."""

    model: Any
    direction: Direction
    by: str
    align: Align | None
    engine: Engine
    batch_size: int


@dataclass(eq=False)
class Recorded:
    """Both runs of some pairs. `values`: the metric of the clean and of the corrupt run, [batch]."""

    sweep: Sweep
    chunk: Chunk
    base: Base
    donor: Batch
    read: Callable[[Tensor], np.ndarray]
    clean: np.ndarray
    corrupt: np.ndarray

    def run(self, patches: Sequence[Patch]) -> np.ndarray:
        """The metric of some cells of one site and layer, [batch, cell]."""
        hook = patches[0].hook
        if hook not in self.chunk.donor:
            self.chunk.donor = {name: value for name, value in self.chunk.donor.items() if not name.endswith("pattern")}
            names = [hook]
            _, kept = keep(self.sweep.model, self.donor, names, self.donor_positions)
            self.chunk.donor |= kept
        found = self.base.run([self.chunk.edits(patch) for patch in patches], self.read)
        return np.stack(found, 1)

    @property
    def donor_positions(self) -> Tensor:
        """The donor's last position: its logits are not read again."""
        return self.donor.query_pos[:, None].cpu()

    @property
    def gigabytes(self) -> float:
        """Activations that are held."""
        return self.base.gigabytes + sum(value.numel() * value.element_size() for value in self.chunk.donor.values()) / 1e9


def record(sweep: Sweep, contrast: Contrast, clean: Batch, corrupt: Batch, patches: Sequence[Patch]) -> Recorded:
    """Run both sides of some pairs and keep what the cells need.

    Raises:
        EpisodeError: the prompts' tokens do not match (see `prompts.align.align`), or a site cannot be aligned.
    """
    model = sweep.model
    wide_clean, wide_corrupt = contrast.widen(clean), contrast.widen(corrupt)
    base, donor = (wide_corrupt, wide_clean) if sweep.direction == "denoise" else (wide_clean, wide_corrupt)
    names = ("corrupt", "clean") if sweep.direction == "denoise" else ("clean", "corrupt")
    matched = align(base, donor, sweep.align, names=names)
    groups: By = "shot" if sweep.by == "shot" else "span"
    masks = {name: mask.cpu() for name, mask in span_groups(wide_clean, groups).items()}
    if sweep.direction == "denoise" and not matched.same:
        masks = {name: matched.apply(mask[..., None].float())[..., 0] > 0.5 for name, mask in masks.items()}
    real = torch.stack(list(span_groups(base).values())).any(0).cpu()
    chunk = Chunk(base, masks, real, matched)
    donor_positions = contrast.positions(donor)
    hooks = list(dict.fromkeys(patch.hook for patch in patches if not patch.hook.endswith("pattern")))
    stacked = added_layers(model) if any(patch.site in STATES for patch in patches) else []
    prompts = make_base(model, base, contrast.positions(base), hooks, stacked, sweep.engine, sweep.batch_size)
    donor_logits, donor_kept = keep(model, donor, [*hooks, *stack_hooks(stacked)], donor_positions)
    own = additions(prompts.kept, stacked)
    chunk.additions = {layer: matched.apply(theirs) - own[layer] for layer, theirs in additions(donor_kept, stacked).items()}
    chunk.donor = {name: donor_kept[name] for name in hooks}
    towers = [hook for hook in hooks if hook.startswith("vision")]
    if towers:
        for hook in towers:
            _same_tower(prompts.kept[hook], chunk.donor[hook])
        chunk.tower = tower_masks(model, base, masks)
    base_logits = prompts.logits
    clean_logits = donor_logits if sweep.direction == "denoise" else base_logits
    read = contrast.reader(clean, lambda: clean_logits)
    values = {names[0]: read(base_logits), names[1]: read(donor_logits)}
    return Recorded(sweep, chunk, prompts, donor, read, values["clean"], values["corrupt"])


def run_ends(sweep: Sweep, contrast: Contrast, clean: Batch, corrupt: Batch) -> tuple[np.ndarray, np.ndarray]:
    """The metric of the clean and of the corrupt run alone.

    Raises:
        EpisodeError: the prompts' tokens do not match (see `prompts.align.align`).
    """
    align(clean, corrupt, sweep.align)
    logits = []
    for batch in (clean, corrupt):
        wide = contrast.widen(batch)
        logits.append(keep(sweep.model, wide, [], contrast.positions(wide))[0])
    read = contrast.reader(clean, lambda: logits[0])
    return read(logits[0]), read(logits[1])


def added_layers(model: Any) -> list[int]:
    """Layers before which the model adds what it saw to the stream (DeepStack): replacing embeddings alone leaves the picture visible."""
    family = getattr(model, "family", None)
    if family is None or not family.deepstack:
        return []
    vision = getattr(model.hf.config, "vision_config", None)
    taps = len(getattr(vision, "deepstack_visual_indexes", None) or range(model.cfg.n_layers))
    return list(range(1, min(taps, model.cfg.n_layers - 1) + 1))


def _same_tower(base: Tensor, donor: Tensor) -> None:
    if base.shape != donor.shape:
        raise EpisodeError(
            f"pictures must have one size on both sides to patch the vision tower; got {list(base.shape)} and {list(donor.shape)} tokens. "
            "Give pictures of one size, or patch image_features with align."
        )


class _Stop(Exception):
    """The rest of the forward pass is not needed."""


def tower_masks(model: Any, batch: Batch, groups: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Which tokens of every vision-tower layer belong to the pictures of each group, found from the model itself: those whose activation the pictures'
    features depend on (by their gradient). So window order, tiles and merging need not be known.

    Returns:
        Group name -> mask for each tower layer, in the tower's own layout without the last axis.
    """
    if not getattr(model.family, "image_tokens", True):
        hooks = [hook_name("vision", layer) for layer in range(len(model.vision.blocks))]
        _, kept = keep(model, batch, hooks, batch.query_pos[:, None].cpu())
        return {EVERYTHING: [torch.ones(kept[hook].shape[:-1], dtype=torch.bool) for hook in hooks]}
    states: list[Tensor] = []
    features: list[Tensor] = []

    def enter(x: Tensor, *, hook: Any) -> Tensor:
        return x if x.requires_grad else x.detach().requires_grad_()

    def store(x: Tensor, *, hook: Any) -> None:
        states.append(x)

    def stop(x: Tensor, *, hook: Any) -> None:
        features.append(x)
        raise _Stop

    n_layers = len(model.vision.blocks)
    hooks: list[Any] = [
        ("vision.blocks.0.hook_resid_pre", enter),
        *((hook_name("vision", layer), store) for layer in range(n_layers)),
        ("hook_embed", stop),
    ]
    with torch.enable_grad():
        with contextlib.suppress(_Stop):
            model.run_with_hooks(batch, fwd_hooks=hooks)
        if not features or not features[0].requires_grad:
            raise UnsupportedModelError(
                "vision must reach the decoder through its hooked layers; it does not. Patch image_features instead."
            )
        pictures = batch.mask("image").cpu()
        weight = torch.randn(features[0].shape[-1], generator=torch.Generator().manual_seed(0)).to(features[0])
        out: dict[str, list[Tensor]] = {}
        for name, mask in [*groups.items(), (EVERYTHING, pictures)]:
            if name != EVERYTHING and not name.endswith("image"):
                continue
            total = (features[0][(mask & pictures).to(features[0].device)] @ weight).sum()
            grads = torch.autograd.grad(total, states, retain_graph=True, allow_unused=True)
            out[name] = [
                torch.zeros(x.shape[:-1], dtype=torch.bool) if g is None else (g != 0).any(-1).cpu()
                for x, g in zip(states, grads, strict=True)
            ]
    return out
