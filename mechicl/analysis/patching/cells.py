"""The cells of a patching sweep: which activation is exchanged, where it is hooked, and what takes its place."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mechicl.analysis.patching.edits import Edit
from mechicl.errors import OptionError, UnsupportedModelError
from mechicl.models.hooked import check_heads
from mechicl.prompts.align import Alignment
from mechicl.prompts.batch import Batch
from mechicl.results import Head

By = Literal["span", "shot", "pos", "head"]

STREAM = {name: f"blocks.{{layer}}.hook_{name}" for name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")}
HEADS = {name: f"blocks.{{layer}}.attn.hook_{name}" for name in ("z", "q", "k", "v", "pattern")}
INPUTS = {"embed": "hook_embed", "image_features": "hook_embed"}
VISION = "vision.blocks.{layer}.hook_resid_post"
SITES = (*STREAM, *HEADS, *INPUTS, "vision")
STATES = ("resid_pre", "resid_mid", "resid_post", "embed", "image_features")
"""Sites that hold all that a position knows: their patches take along what a picture adds to the stream in later layers (DeepStack)."""
ALIGNABLE = (*STREAM, *INPUTS)
EVERYTHING = "all images"
ALL_TOKENS = "all tokens"


@dataclass(frozen=True)
class Patch:
    """One cell. `place`: its index in the site's arrays. `group`: name of a span, a position, or None for every token; `head` None for all."""

    site: str
    place: tuple[int, ...]
    layer: int
    head: int | None = None
    group: str | int | None = None

    @property
    def hook(self) -> str:
        """The hook point it is put in at."""
        return hook_name(self.site, self.layer)


@dataclass(frozen=True)
class SitePlan:
    """A site's axes, their labels, and its cells."""

    axes: tuple[str, ...]
    coords: Mapping[str, tuple[Any, ...]]
    patches: tuple[Patch, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the site's arrays."""
        return tuple(len(self.coords[axis]) for axis in self.axes)


def hook_name(site: str, layer: int) -> str:
    """Hook point of a site in a layer."""
    return (STREAM | HEADS | INPUTS | {"vision": VISION})[site].format(layer=layer)


@dataclass(frozen=True)
class Selection:
    """Which cells are wanted; None: all."""

    layers: Collection[int] | None = None
    heads: Collection[Head] | None = None
    spans: Sequence[str] | None = None


def plan(
    model: Any, sites: Sequence[str], by: By, groups: Sequence[str], n_pos: int, selection: Selection
) -> tuple[dict[str, SitePlan], list[str]]:
    """Every cell of a sweep.

    Args:
        model: The model.
        sites: Some of `SITES`.
        by: What a cell is (see `mechicl.patch`).
        groups: Names of the spans that the episodes have.
        n_pos: Positions of a prompt, for by="pos".
        selection: Which of them.

    Returns:
        Site -> its plan; notes on layers that cannot be patched.

    Raises:
        OptionError: a site, layer, span or way that does not exist, or no cell is left.
        UnsupportedModelError: the model has no such site in any layer; says why.
    """
    if by not in get_args(By):
        raise OptionError(f"by must be one of {', '.join(get_args(By))}; got {by!r}. span is the coarsest.")
    unknown = [site for site in sites if site not in SITES]
    if unknown or not sites:
        raise OptionError(f"sites must be some of {', '.join(SITES)}; got {unknown or 'none'}. Pick some of them.")
    wanted = [name for name in groups if selection.spans is None or name in selection.spans]
    if selection.spans is not None and (strange := [name for name in selection.spans if name not in groups]) and by in ("span", "shot"):
        raise OptionError(f"spans must be some of {', '.join(groups)}; got {', '.join(strange)}. These are the spans of the prompts.")
    heads = None if selection.heads is None else check_heads(model, list(selection.heads))
    plans, notes = {}, []
    for site in dict.fromkeys(sites):
        pictures = [name for name in wanted if name.endswith("image")]
        names = pictures if site in ("image_features", "vision") else wanted
        plans[site], reasons = _site(model, site, by, names, n_pos, selection.layers, heads)
        notes += reasons
    return plans, notes


def _site(
    model: Any, site: str, by: By, names: Sequence[str], n_pos: int, layers: Collection[int] | None, heads: Sequence[Head] | None
) -> tuple[SitePlan, list[str]]:
    axes: list[str] = []
    coords: dict[str, tuple[Any, ...]] = {}
    usable, notes = _layers(model, site, layers)
    if site in "kv" and (apart := [layer for layer in usable if cross(model, layer)]):
        usable = [layer for layer in usable if layer not in apart]
        notes.append(f"{site} of layers {apart} is left out: these layers read pictures, not the prompt's tokens (patch vision).")
    if site not in INPUTS:
        axes.append("layer")
        coords["layer"] = tuple(usable)
    if site in HEADS:
        axes.append("kv_head" if site in "kv" else "head")
        count = model.cfg.n_key_value_heads if site in "kv" else model.cfg.n_heads
        coords[axes[-1]] = tuple(range(count))
    cells: Sequence[str | int | None] = [None]
    if by in ("span", "shot") or site in ("image_features", "vision"):
        if by == "head" or (site == "vision" and not getattr(model.family, "image_tokens", True)):
            names = (EVERYTHING,) if names else ()
        if not names:
            raise OptionError(
                f"{site} must be patched in prompts with pictures; these have none (or spans leaves none). Choose another site."
            )
        axes.append("span")
        coords["span"], cells = tuple(names), names
    elif by == "pos":
        axes.append("pos")
        coords["pos"], cells = tuple(range(n_pos)), range(n_pos)
    elif not axes:  # the embeddings as one cell
        axes.append("span")
        coords["span"], cells = (ALL_TOKENS,), (ALL_TOKENS,)
    patches = []
    for layer in usable:
        for head in range(len(coords[axes[1]])) if site in HEADS else (None,):
            if head is not None and not _wanted(model, site, layer, head, heads):
                continue
            for k, group in enumerate(cells):
                place = [] if site in INPUTS else [usable.index(layer)]
                place += [] if head is None else [head]
                place += [] if group is None else [k]
                patches.append(Patch(site, tuple(place), layer, head, group))
    if not patches:
        raise OptionError(f"layers and heads must leave a cell of {site}; none is left. Choose others.")
    return SitePlan(tuple(axes), coords, tuple(patches)), notes


def cross(model: Any, layer: int) -> bool:
    """Whether a layer reads other tokens than the prompt's."""
    parts = getattr(getattr(model, "anatomy", None), "layers", None)
    return parts is not None and parts[layer].cross


def _wanted(model: Any, site: str, layer: int, head: int, heads: Sequence[Head] | None) -> bool:
    """Whether a head exists in this layer and is asked for; a key/value head is, when one of its query heads is."""
    parts = getattr(getattr(model, "anatomy", None), "layers", None)
    n_heads = model.cfg.n_heads if parts is None else parts[layer].n_heads
    n_kv = model.cfg.n_key_value_heads if parts is None else parts[layer].n_key_value_heads
    if site not in "kv":
        return head < n_heads and (heads is None or (layer, head) in heads)
    return head < n_kv and (heads is None or any((layer, head * (n_heads // n_kv) + j) in heads for j in range(n_heads // n_kv)))


def _layers(model: Any, site: str, layers: Collection[int] | None) -> tuple[list[int], list[str]]:
    """Layers of a site that can be hooked, and why others cannot."""
    if site in INPUTS:
        closed = getattr(model, "unavailable", {}).get("hook_image_features")
        if site == "image_features" and (closed or "hook_image_features" not in model.hook_dict):
            raise UnsupportedModelError(
                f"image_features must enter as tokens; {closed or 'this model reads no pictures'}. Patch other sites."
            )
        return [0], []
    n_layers = len(model.vision.blocks) if site == "vision" and hasattr(model, "vision") else 0 if site == "vision" else model.cfg.n_layers
    asked = range(n_layers) if layers is None else sorted({int(layer) for layer in layers})
    if wrong := [layer for layer in asked if not 0 <= layer < n_layers]:
        raise OptionError(f"layers must be in 0..{n_layers - 1} for {site}; got {wrong[0]}. Layers count from 0.")
    usable = [layer for layer in asked if hook_name(site, layer) in model.hook_dict]
    missing = [layer for layer in asked if layer not in usable]
    why = getattr(model, "unavailable", {}).get(hook_name(site, missing[0]), "the model has no such hook point") if missing else ""
    if not usable:
        raise UnsupportedModelError(f"{site} must be hooked in some layer; {why or 'the model has no such layers'}. Choose another site.")
    return usable, [f"{site} of layers {missing} is left out: {why}."] if missing else []


@dataclass(eq=False)
class Chunk:
    """Some pairs, recorded: what is patched into, and what is put there.

    Attributes:
        base: Prompts that are patched (widened by the metric).
        masks: Group name -> positions [batch, pos] of the base.
        real: Positions that are no padding.
        alignment: From donor to base positions.
        donor: Hook name -> the donor run's activation.
        additions: Layer -> donor's minus base's additions to the stream there (DeepStack), at base positions.
        tower: Group name -> for each tower layer the mask of its tokens.
    """

    base: Batch
    masks: Mapping[str, Tensor]
    real: Tensor
    alignment: Alignment
    donor: dict[str, Tensor] = field(default_factory=dict)
    additions: dict[int, Tensor] = field(default_factory=dict)
    tower: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    fitted: dict[str, Tensor] = field(default_factory=dict)

    def mask(self, group: str | int | None) -> Tensor:
        """Positions of a cell."""
        if group is None or group == ALL_TOKENS:
            return self.real
        if isinstance(group, int):
            return self.real & (torch.arange(self.real.shape[1]) == group)
        return self.pictures if group == EVERYTHING else self.masks.get(group, torch.zeros_like(self.real))

    def value(self, hook: str) -> Tensor:
        """The donor's activation at the base's positions."""
        if hook.startswith("vision") or hook.endswith("pattern") or self.alignment.same:
            return self.donor[hook]
        if hook not in self.fitted:
            self.fitted[hook] = self.alignment.apply(self.donor[hook])
        return self.fitted[hook]

    def edits(self, patch: Patch) -> list[Edit]:
        """What a cell does."""
        if patch.site == "vision":
            assert isinstance(patch.group, str)
            return [Edit(patch.hook, self.tower[patch.group][patch.layer], self.donor[patch.hook])]
        mask = self.mask(patch.group)
        if not self.alignment.same:
            mask = mask & self.alignment.known
        if patch.site == "image_features":
            mask = mask & self.pictures
        found = [Edit(patch.hook, mask, self.value(patch.hook), patch.head)]
        if patch.site in STATES:
            found += [
                Edit(hook_name("resid_pre", layer), mask, added, add=True) for layer, added in self.additions.items() if layer > patch.layer
            ]
        return found

    @property
    def pictures(self) -> Tensor:
        """Positions of picture tokens."""
        return self.base.mask("image").cpu()
