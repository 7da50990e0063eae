"""`attribute`: activation patching estimated by gradients, all cells for the price of a few passes, beside some cells run exactly."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mechicl.analysis import patching
from mechicl.analysis.agreement import agree, choose
from mechicl.analysis.differentiable import Measure, measure
from mechicl.analysis.feed import progress_bar, provenance
from mechicl.analysis.gradients import Edit, Slopes, slopes, values
from mechicl.analysis.metrics import Metric
from mechicl.analysis.patch_cells import HEADS, STATES, By, Patch, Selection, hook_name
from mechicl.analysis.patch_run import Recorded
from mechicl.analysis.patching import Correction, Given
from mechicl.errors import OptionError
from mechicl.prompts.align import Align
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode
from mechicl.results import Agreement, Attribution, Head
from mechicl.results.patching import Direction

Path = Literal["inputs", "site"]
START = "blocks.0.hook_resid_pre"


def attribute(
    model: Any,
    clean: Given,
    corrupt: Batch | Sequence[Episode] | None = None,
    sites: Sequence[str] | str = ("resid_pre",),
    by: By = "span",
    *,
    metric: Metric = "logit_diff",
    direction: Direction = "denoise",
    steps: int = 0,
    path: Path = "inputs",
    layers: Collection[int] | None = None,
    heads: Collection[Head] | None = None,
    spans: Sequence[str] | None = None,
    align: Align | None = None,
    layers_at_once: int | None = None,
    exact: int = 24,
    correction: Correction = "holm",
    n_permutations: int = 10_000,
    seed: int = 0,
    batch_size: int = 16,
    task: str = "",
    progress: bool = True,
) -> Attribution:
    """Attribution patching: what every cell of `patch` would do, to first order.

    A cell's estimate is the difference of the activation between the two runs times the gradient of the metric there, at the run that is started from: the
    change of the metric if the model were a straight line. Two runs and one backward pass give all cells of all sites. It misleads where the model bends on
    the scale of the change: a softmax that is sure (attention, or a probability as the metric) has no slope and hides what matters; a norm makes large
    changes worth less than their slope says; early layers bend most. So some cells are always run exactly as well: read `agreement` first, and use exact
    patching for cells that you want to claim.

    Args:
        model: A `HookedVLM` or a toy. Weights stay as they are, frozen or not, and get no gradient.
        clean: Pairs from `prompts.corrupt.minimal_pairs`; or the clean prompts.
        corrupt: The corrupt prompts, row by row, where `clean` is not Pairs.
        sites: As in `patch`, without "vision".
        by: As in `patch`.
        metric: As in `patch`.
        direction: As in `patch`; it decides where the slope is taken.
        steps: 0: the slope at the start run. n: the mean slope over n runs on the way to the other run (integrated gradients), at the middles of n equal parts.
        path: The way: "inputs", the stream that enters layer 0 (tokens with pictures merged in and a toy's code of places; what DeepStack adds later too)
            goes in a straight line from one run to the other, and one backward pass serves all cells. "site": each site of each layer goes in a straight line by
            itself, as in exact patching of the whole layer, at `steps` passes for each.
        layers: Only these layers.
        heads: Only these (layer, head).
        spans: Only these spans.
        align: As in `patch`.
        layers_at_once: Layers whose gradients are held in memory together; fewer need as many more passes. None: all.
        exact: How many cells are also run exactly, for `agreement`: half of them the largest estimates, half drawn at random. 0 for none.
        correction: As in `patch`.
        n_permutations: As in `patch`.
        seed: Of intervals, permutations and the cells that are drawn.
        batch_size: Prompts that are run at once.
        task: For the record.
        progress: Show a bar.

    Returns:
        Attribution, with the axes and the scale of `patch`.

    Raises:
        OptionError: an option that does not exist, or does not fit the site.
        EpisodeError, UnsupportedModelError: as in `patch`.
        NotFiniteError: the metric or a gradient is NaN.

    Source:
        Nanda 2023 (attribution patching); Sundararajan, Taly and Yan 2017 (integrated gradients); Hanna et al. 2024 (the way from input to input).
    """
    _check(steps, path, exact, layers_at_once, sites)
    job = patching._prepare(
        model, clean, corrupt, sites, by, metric, direction, Selection(layers, heads, spans), align, "resume", batch_size
    )
    patching._check_statistics(correction, n_permutations)
    raw = {site: np.full((job.n, *plan.shape), np.nan) for site, plan in job.plans.items()}
    ends = {name: np.full(job.n, np.nan) for name in ("clean", "corrupt")}
    hooks = _Hooks.of(job.patches, layers_at_once)
    bar = progress_bar(None, total=job.n, what="attribution", show=progress)
    for rows in job.parts():
        recorded = job.record(rows)
        ends["clean"][rows], ends["corrupt"][rows] = recorded.clean, recorded.corrupt
        start = recorded.corrupt if direction == "denoise" else recorded.clean
        products = _Products(model, recorded, _measure(model, job, rows), job.contrast.blocks).run(hooks, steps, path)
        for site, plan in job.plans.items():
            for patch in plan.patches:
                raw[site][(rows, *patch.place)] = start + products.change(patch)
        bar.update(len(rows))
    bar.close()
    notes = [*job.notes, *patching._gap(ends["clean"], ends["corrupt"], job.contrast.unit, seed)]
    start = ends["corrupt" if direction == "denoise" else "clean"]
    found = {site: patching._effects(site, plan, raw[site], ends, start, n_permutations, seed) for site, plan in job.plans.items()}
    found, more = patching._correct(found, correction, job.n, n_permutations)
    options = {"sites": list(job.plans), "by": by, "direction": direction, "metric": job.contrast.name, "steps": steps, "path": path, "align": align,
               "correction": correction, "n_permutations": n_permutations, "batch_size": batch_size, "exact": exact, "pairs": job.how}  # fmt: skip
    shares = {site: e.value if direction == "denoise" else 1 - e.value for site, e in found.items()}
    return Attribution(
        sites=found, method="AtP-IG" if steps else "AtP", steps=steps, path=path if steps else "", direction=direction, metric=job.contrast.name,
        unit=job.contrast.unit, clean=ends["clean"], corrupt=ends["corrupt"], correction=correction, pairs=job.how,
        agreement=_agreement(job, shares, ends, exact, seed, progress) if exact else None, n=job.n, skipped=job.skipped,
        provenance=provenance(model, task=task, seed=seed, options=options), notes=(*notes, *more),
    )  # fmt: skip


def _check(steps: int, path: str, exact: int, layers_at_once: int | None, sites: Sequence[str] | str) -> None:
    if steps < 0 or exact < 0 or (layers_at_once is not None and layers_at_once < 1):
        raise OptionError(
            f"steps and exact must be at least 0, layers_at_once at least 1; got {steps}, {exact}, {layers_at_once}. Raise them."
        )
    if path not in get_args(Path):
        raise OptionError(f"path must be one of {', '.join(get_args(Path))}; got {path!r}. inputs is the cheap one.")
    if "vision" in ((sites,) if isinstance(sites, str) else sites):
        raise OptionError(
            "sites must not hold vision for attribution: a tower's layout has no episodes to split a gradient by. Use image_features, or patch vision exactly."
        )


def _measure(model: Any, job: Any, rows: Sequence[int]) -> Measure:
    """The metric of some pairs as a function of logits."""
    contrast = job.contrast.take(rows)
    clean = job.clean if len(rows) == job.n else job.clean.select(rows)
    logits = None
    if contrast.metric == "kl":
        with torch.no_grad():
            logits = model(clean, positions="last")
    return measure(contrast, clean, logits)


@dataclass(frozen=True)
class _Hooks:
    """Hook points of all cells: `own` by layer, a few layers at a time; `patches` of each hook, to know what moves with it."""

    together: tuple[tuple[str, ...], ...]
    states: frozenset[str]

    @staticmethod
    def of(patches: Sequence[Patch], layers_at_once: int | None) -> _Hooks:
        """Those that the cells need."""
        by_layer: dict[int, list[str]] = {}
        for patch in patches:
            found = by_layer.setdefault(patch.layer, [])
            if patch.hook not in found:
                found.append(patch.hook)
        layers = sorted(by_layer)
        size = layers_at_once or len(layers)
        together = [tuple(hook for layer in layers[k : k + size] for hook in by_layer[layer]) for k in range(0, len(layers), size)]
        return _Hooks(tuple(together), frozenset(patch.hook for patch in patches if patch.site in STATES))


@dataclass(eq=False)
class _Products:
    """Difference times slope of some pairs, summed over the last axis.

    `found`: hook name -> [blocks * n, pos] or [blocks * n, pos, head]. `added`: (hook name, layer) -> the same for what DeepStack adds at that layer.
    """

    model: Any
    recorded: Recorded
    measure: Measure
    blocks: int
    found: dict[str, Tensor] = field(default_factory=dict)
    added: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    differences: dict[str, Tensor] = field(default_factory=dict)

    def run(self, hooks: _Hooks, steps: int, path: Path) -> _Products:
        """All passes."""
        shares = [(k + 0.5) / steps for k in range(steps)] or [0.0]
        extra = self.recorded.chunk.additions
        for names, edits_of in self._passes(hooks, steps, path):
            moving = [hook_name("resid_pre", layer) for layer in extra] if any(name in hooks.states for name in names) else []
            for share in shares:
                slope = slopes(
                    self.model, self.recorded.chunk.base, list(dict.fromkeys((*names, *moving))), self.measure, positions=self.recorded.positions,
                    edits=edits_of(share) if share else {},
                )  # fmt: skip
                for name in names:
                    self._add(
                        self.found,
                        name,
                        self._product(self._difference(name, slope, share, path, steps), slope.gradients[name]),
                        len(shares),
                    )
                    if name in hooks.states:
                        for layer, difference in extra.items():
                            g = slope.gradients[hook_name("resid_pre", layer)]
                            self._add(self.added, (name, layer), self._product(difference.float(), g), len(shares))
        return self

    def _passes(self, hooks: _Hooks, steps: int, path: Path) -> Iterator[tuple[tuple[str, ...], Any]]:
        """Hook points whose slopes are taken together, and what is moved on the way."""
        if steps and path == "site":
            for names in hooks.together:
                for name in names:
                    yield (name,), lambda share, name=name: self._moves(name, share, name in hooks.states)
        else:
            for names in hooks.together:
                yield names, lambda share: self._moves(START, share, True)

    def _moves(self, name: str, share: float, state: bool) -> dict[str, Edit]:
        """`share` of the way to the donor's activation; a state takes DeepStack's later additions along."""
        moved = {name: _toward(self._base_difference(name), share)}
        layer = int(name.split(".")[1]) if name.startswith("blocks") else 0
        later = name.endswith("resid_post")
        for k, difference in self.recorded.chunk.additions.items() if state else ():
            if k > layer or (k == layer and later):
                moved[hook_name("resid_pre", k)] = _toward(difference.float(), share)
        return moved

    def _base_difference(self, name: str) -> Tensor:
        """donor - base at a hook point, at the base's positions, float32; nought where a position has no counterpart."""
        if name not in self.differences:
            part = self.recorded
            kept, _ = values(self.model, part.chunk.base, [name], lambda x: x, positions=part.positions)
            self._fetch(name)
            difference = part.chunk.value(name).float() - kept[name].float()
            self.differences[name] = difference if name.endswith("pattern") else self._known(difference)
        return self.differences[name]

    def _difference(self, name: str, slope: Slopes, share: float, path: Path, steps: int) -> Tensor:
        if steps:
            return self._base_difference(name)
        self._fetch(name)  # without steps the slopes' run is the base's own: no other run is needed
        difference = self.recorded.chunk.value(name).float() - slope.values[name].float()
        return difference if name.endswith("pattern") else self._known(difference)

    def _fetch(self, name: str) -> None:
        """The donor's activation, where it was not recorded with the others."""
        part = self.recorded
        if name not in part.chunk.donor:
            kept, _ = values(self.model, part.donor, [name], lambda x: x, positions=part.donor_positions)
            part.chunk.donor[name] = kept[name]

    def _known(self, difference: Tensor) -> Tensor:
        alignment = self.recorded.chunk.alignment
        if alignment.same:
            return difference
        known = alignment.known.to(difference.device)
        return difference * known.reshape(*known.shape, *(1,) * (difference.dim() - 2))

    @staticmethod
    def _product(difference: Tensor, gradient: Tensor) -> Tensor:
        """Summed over the last axis, in float32 whatever the model's dtype; patterns [batch, head, dest, src] become [batch, dest, head]."""
        found = (difference * gradient.float()).sum(-1)
        return found

    @staticmethod
    def _add(sums: dict[Any, Tensor], key: Any, value: Tensor, n: int) -> None:
        sums[key] = sums[key] + value / n if key in sums else value / n

    def change(self, patch: Patch) -> np.ndarray:
        """What a cell changes, in the metric's unit, [batch]."""
        chunk = self.recorded.chunk
        mask = chunk.mask(patch.group)
        if not chunk.alignment.same:
            mask = mask & chunk.alignment.known
        if patch.site == "image_features":
            mask = mask & chunk.pictures
        total = self._masked(self.found[patch.hook], mask, patch)
        if patch.site in STATES:
            for layer in chunk.additions:
                if layer > patch.layer:
                    total = total + self._masked(self.added[patch.hook, layer], mask, patch)
        return total.reshape(self.blocks, -1).sum(0).double().cpu().numpy()

    @staticmethod
    def _masked(product: Tensor, mask: Tensor, patch: Patch) -> Tensor:
        if patch.head is not None:
            product = product[:, patch.head] if patch.site == "pattern" else product[:, :, patch.head]
        return (product * mask.to(product.device)).sum(1)


def _toward(difference: Tensor, share: float) -> Edit:
    return lambda x: (x.float() + share * difference).to(x.dtype)


def _agreement(
    job: Any, shares: Mapping[str, np.ndarray], ends: Mapping[str, np.ndarray], exact: int, seed: int, progress: bool
) -> Agreement:
    """Some cells, run exactly."""
    patches: list[Patch] = job.patches
    estimate = np.array([shares[patch.site][patch.place] for patch in patches])
    cells, drawn = choose(estimate, exact - exact // 2, exact // 2, seed=seed)
    order = sorted(range(len(cells)), key=lambda k: (patches[cells[k]].site, patches[cells[k]].layer))
    chosen = [patches[cells[k]] for k in order]
    raw = np.full((job.n, len(chosen)), np.nan)
    bar = progress_bar(None, total=job.n, what="cells run exactly", show=progress)
    for rows in job.parts():
        recorded = job.record(rows)
        for hook in dict.fromkeys((patch.site, patch.layer) for patch in chosen):
            some = [k for k, patch in enumerate(chosen) if (patch.site, patch.layer) == hook]
            raw[np.ix_(rows, some)] = recorded.run([chosen[k] for k in some])
        bar.update(len(rows))
    bar.close()
    gap = float((ends["clean"] - ends["corrupt"]).mean())
    exactly = (raw.mean(0) - ends["corrupt"].mean()) / gap
    names = [_name(job, patch) for patch in chosen]
    return agree(
        names, exactly if job.sweep.direction == "denoise" else 1 - exactly, [estimate[cells[k]] for k in order], [drawn[k] for k in order],
        n_possible=int((~np.isnan(estimate)).sum()),
    )  # fmt: skip


def _name(job: Any, patch: Patch) -> str:
    """ "z 1.3 right label"."""
    where = "" if patch.site not in HEADS and "layer" not in job.plans[patch.site].axes else f" {patch.layer}"
    head = "" if patch.head is None else f".{patch.head}"
    return f"{patch.site}{where}{head}" + ("" if patch.group is None else f" {patch.group}")
