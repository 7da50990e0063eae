"""`attribute`: activation patching estimated by gradients, all cells for the price of a few passes, beside some cells run exactly."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch

from mechicl.analysis.agreement import agree, choose
from mechicl.analysis.feed import progress_bar, provenance
from mechicl.analysis.gradients.attribution_runs import HookPoints, Path, Products
from mechicl.analysis.gradients.differentiable import Measure, measure
from mechicl.analysis.gradients.through_softmax import Softmax
from mechicl.analysis.guarded import guarded
from mechicl.analysis.patching import patch as patching
from mechicl.analysis.patching.cells import By, Patch, Selection
from mechicl.analysis.patching.job import Given, Job, prepare
from mechicl.analysis.patching.metrics import Metric
from mechicl.analysis.patching.patch import Correction
from mechicl.errors import OptionError
from mechicl.prompts.align import Align
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode
from mechicl.results import Agreement, Attribution, Head
from mechicl.results.patching import Direction


@guarded
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
    path: Path | str = "inputs",
    softmax: Softmax | str = "slope",
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
        softmax: How cells of q and k are estimated. "slope": like the others. "exact": through the softmax as it is (the layer's attention is called again with the
            changed queries, or keys of each span), and only what lies behind the heads is a slope; finds what a sure softmax hides.
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
        Nanda 2023 (attribution patching); Kramár et al. 2024 (AtP*: queries and keys through the softmax); Sundararajan, Taly and Yan 2017 (integrated gradients); Hanna et al. 2024 (the way from input to input).
    """
    _check(steps, path, softmax, exact, layers_at_once, sites)
    job = prepare(model, clean, corrupt, sites, by, metric, direction, Selection(layers, heads, spans), align, "resume", batch_size)
    patching.check_statistics(correction, n_permutations)
    raw = {site: np.full((job.n, *plan.shape), np.nan) for site, plan in job.plans.items()}
    ends = {name: np.full(job.n, np.nan) for name in ("clean", "corrupt")}
    hooks = HookPoints.of(job.patches, layers_at_once, softmax == "exact")
    bar = progress_bar(None, total=job.n, what="attribution", show=progress)
    for rows in job.parts():
        recorded = job.record(rows)
        ends["clean"][rows], ends["corrupt"][rows] = recorded.clean, recorded.corrupt
        start = recorded.corrupt if direction == "denoise" else recorded.clean
        places = job.contrast.take(rows).positions(recorded.chunk.base)
        products = Products(model, recorded, places, _measure(model, job, rows), job.contrast.blocks).run(hooks, steps, path)
        for site, plan in job.plans.items():
            for patch in plan.patches:
                raw[site][(rows, *patch.place)] = start + products.change(patch)
        bar.update(len(rows))
    bar.close()
    notes = [*job.notes, *patching.gap_between(ends["clean"], ends["corrupt"], job.contrast.unit, seed)]
    start = ends["corrupt" if direction == "denoise" else "clean"]
    found = {site: patching.effects_of(site, plan, raw[site], ends, start, n_permutations, seed) for site, plan in job.plans.items()}
    found, more = patching.correct_cells(found, correction, job.n, n_permutations)
    options = {"sites": list(job.plans), "by": by, "direction": direction, "metric": job.contrast.name, "steps": steps, "path": path, "softmax": softmax, "align": align,
               "correction": correction, "n_permutations": n_permutations, "batch_size": batch_size, "exact": exact, "pairs": job.how}  # fmt: skip
    shares = {site: e.value if direction == "denoise" else 1 - e.value for site, e in found.items()}
    return Attribution(
        sites=found, method="AtP-IG" if steps else "AtP", steps=steps, path=path if steps else "", direction=direction, metric=job.contrast.name,
        unit=job.contrast.unit, clean=ends["clean"], corrupt=ends["corrupt"], correction=correction, pairs=job.how,
        agreement=_agreement(job, shares, ends, exact, seed, progress) if exact else None, n=job.n, skipped=job.skipped,
        provenance=provenance(model, task=task, seed=seed, options=options), notes=(*notes, *more),
    )  # fmt: skip


def _check(steps: int, path: str, softmax: str, exact: int, layers_at_once: int | None, sites: Sequence[str] | str) -> None:
    if steps < 0 or exact < 0 or (layers_at_once is not None and layers_at_once < 1):
        raise OptionError(
            f"steps and exact must be at least 0, layers_at_once at least 1; got {steps}, {exact}, {layers_at_once}. Raise them."
        )
    if path not in get_args(Path):
        raise OptionError(f"path must be one of {', '.join(get_args(Path))}; got {path!r}. inputs is the cheap one.")
    if softmax not in get_args(Softmax):
        raise OptionError(f"softmax must be one of {', '.join(get_args(Softmax))}; got {softmax!r}. slope is the fast one.")
    if "vision" in ((sites,) if isinstance(sites, str) else sites):
        raise OptionError(
            "sites must not hold vision for attribution: a tower's layout has no episodes to split a gradient by. Use image_features, or patch vision exactly."
        )


def _measure(model: Any, job: Job, rows: Sequence[int]) -> Measure:
    """The metric of some pairs as a function of logits."""
    contrast, clean, _ = job.some(rows)
    logits = None
    if contrast.metric == "kl":
        with torch.no_grad():
            logits = model(clean, positions="last")
    return measure(contrast, clean, logits)


def _agreement(
    job: Job, shares: Mapping[str, np.ndarray], ends: Mapping[str, np.ndarray], exact: int, seed: int, progress: bool
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


def _name(job: Job, patch: Patch) -> str:
    """ "z 1.3 right label"."""
    where = f" {patch.layer}" if "layer" in job.plans[patch.site].axes else ""
    head = "" if patch.head is None else f".{patch.head}"
    return f"{patch.site}{where}{head}" + ("" if patch.group is None else f" {patch.group}")
