"""`patch`: put one run's activations into another, cell by cell, and see how much of the answer goes with them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from mechicl.analysis.feed import progress_bar, provenance
from mechicl.analysis.guarded import guarded
from mechicl.analysis.patching.cells import By, Selection, SitePlan
from mechicl.analysis.patching.engine import Engine
from mechicl.analysis.patching.job import CELLS_AT_ONCE, Given, Job, prepare
from mechicl.analysis.patching.metrics import Metric
from mechicl.analysis.patching.run import Recorded
from mechicl.analysis.patching.store import Store
from mechicl.analysis.statistics import benjamini_hochberg, bootstrap_interval, holm, ratio_interval, sign_flip_p
from mechicl.errors import EpisodeError, OptionError
from mechicl.prompts.align import Align
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode
from mechicl.results import Head
from mechicl.results.patching import Direction, PatchCost, PatchEffects, SiteEffects

Correction = Literal["holm", "fdr_bh"]


@guarded
def patch(
    model: Any,
    clean: Given,
    corrupt: Batch | Sequence[Episode] | None = None,
    sites: Sequence[str] | str = ("resid_pre",),
    by: By = "span",
    *,
    metric: Metric = "logit_diff",
    direction: Direction = "denoise",
    layers: Collection[int] | None = None,
    heads: Collection[Head] | None = None,
    spans: Sequence[str] | None = None,
    align: Align | None = None,
    correction: Correction = "holm",
    n_permutations: int = 10_000,
    seed: int = 0,
    batch_size: int = 16,
    out: str | os.PathLike[str] | None = None,
    engine: Engine = "resume",
    task: str = "",
    progress: bool = True,
) -> PatchEffects:
    """Activation patching (causal tracing): each cell is one run in which one activation is taken from the other run of its pair.

    Sites: resid_pre, resid_mid, resid_post, attn_out, mlp_out (the stream and what is added to it); z (heads' outputs), q (queries), k, v (keys and values, one
    for each key/value head), pattern (the attention itself; a span is the tokens that read); embed, image_features (what the projector put into the sequence),
    vision (layers of the tower, whole pictures). In families that add the picture to the stream again between layers (DeepStack), patches of resid_*,
    embed and image_features take these additions along at the patched positions; attn_out, mlp_out and heads do not.

    A cell's number is a share of the distance between the two runs, not a share of the answer: cells overlap, so they do not add up to one. A denoising effect
    says that the activation suffices in the corrupt context, a noising effect that it is needed in the clean one; backup heads make the second small.

    Args:
        model: A `HookedVLM` or a toy.
        clean: Pairs from `prompts.corrupt.minimal_pairs`; or the clean prompts.
        corrupt: The corrupt prompts, row by row, where `clean` is not Pairs.
        sites: Names from above.
        by: "span": groups of tokens that every episode has, e.g. "right label" (see `prompts.align.span_groups`), for each layer (and head). "shot": the same
            with every exemplar apart. "pos": single positions, where all prompts are laid out alike. "head": all tokens together, for each (layer, head), or
            for each layer where the site has no heads.
        metric: See `analysis.metrics.Metric`.
        direction: "denoise": clean activations into the corrupt run. "noise": corrupt ones into the clean run.
        layers: Only these layers.
        heads: Only these (layer, head), query heads; for k and v the key/value heads that serve them.
        spans: Only these spans.
        align: What to do where two spans differ in length: None refuses, "mean" or "resize" fits the donor's to it (stream sites, embed and image_features only).
        correction: Of p over all cells of all sites: "holm" (family-wise) or "fdr_bh" (false discovery rate).
        n_permutations: Sign flips drawn for p.
        seed: Of intervals and permutations.
        batch_size: Prompts that are run at once.
        out: A folder that keeps finished cells; the same call with the same folder goes on where it was.
        engine: "resume" runs cells together, from the layer they change on; "naive" runs each in full (the same numbers, to check with).
        task: For the record.
        progress: Show the cost, then a bar.

    Returns:
        PatchEffects; `effects["z"].value[layer, head]` is 0 where the run stays as it was corrupt, 1 where it is as clean.

    Raises:
        OptionError: an option that does not exist, or does not fit the site.
        EpisodeError: pairs that do not match (says which episode and span), or whose runs do not differ in the metric.
        UnsupportedModelError: the family has no such site; says why.
        CheckpointError, OutputPathError: `out` holds another sweep, or cannot be written.
    """
    job = prepare(model, clean, corrupt, sites, by, metric, direction, Selection(layers, heads, spans), align, engine, batch_size)
    check_statistics(correction, n_permutations)
    store = None if out is None else Store(out, job.asked())
    raw = _run(job, store, progress)
    ends, unit = {name: raw[name][:, 0] for name in ("clean", "corrupt")}, job.contrast.unit
    notes = [*job.notes, *gap_between(ends["clean"], ends["corrupt"], unit, seed)]
    start = ends["corrupt" if direction == "denoise" else "clean"]
    found = {site: effects_of(site, job.plans[site], raw[site], ends, start, n_permutations, seed) for site in job.plans}
    found, more = correct_cells(found, correction, job.n, n_permutations)
    options = {"sites": list(job.plans), "by": by, "direction": direction, "metric": job.contrast.name, "align": align, "correction": correction,
               "n_permutations": n_permutations, "engine": engine, "batch_size": batch_size, "pairs": job.how}  # fmt: skip
    result = PatchEffects(
        sites=found, direction=direction, metric=job.contrast.name, unit=unit, clean=ends["clean"], corrupt=ends["corrupt"], correction=correction, pairs=job.how,
        n=job.n, skipped=job.skipped, provenance=provenance(model, task=task, seed=seed, options=options), notes=(*notes, *more),
    )  # fmt: skip
    if store is not None:
        store.finish(result.to_frame())
    return result


@guarded
def cost(
    model: Any,
    clean: Given,
    corrupt: Batch | Sequence[Episode] | None = None,
    sites: Sequence[str] | str = ("resid_pre",),
    by: By = "span",
    *,
    metric: Metric = "logit_diff",
    direction: Direction = "denoise",
    layers: Collection[int] | None = None,
    heads: Collection[Head] | None = None,
    spans: Sequence[str] | None = None,
    align: Align | None = None,
    engine: Engine = "resume",
    batch_size: int = 16,
) -> PatchCost:
    """What `patch` with these arguments will take: cells are counted, and one batch of each site, from its middle layer, is run and timed.

    Arguments, errors: as in `patch`.
    """
    job = prepare(model, clean, corrupt, sites, by, metric, direction, Selection(layers, heads, spans), align, engine, batch_size)
    return job.cost()[0]


def check_statistics(correction: str, n_permutations: int) -> None:
    """Raises OptionError for a correction that does not exist, or no permutation."""
    if correction not in get_args(Correction):
        raise OptionError(f"correction must be one of {', '.join(get_args(Correction))}; got {correction!r}. holm is the stricter.")
    if n_permutations < 1:
        raise OptionError(f"n_permutations must be at least 1; got {n_permutations}. 10000 resolves p to 0.0001.")


def _run(job: Job, store: Store | None, progress: bool) -> dict[str, np.ndarray]:
    """The metric of every cell, site -> [batch, *axes], and of both runs under "clean" and "corrupt", [batch, 1]."""
    raw = {name: np.full((job.n, *site.shape), np.nan) for name, site in job.plans.items()} | {
        e: np.full((job.n, 1), np.nan) for e in ("clean", "corrupt")
    }
    if store is not None:
        store.load(raw)
    groups, parts = list(job.groups()), job.parts()
    total = len(job.patches) * len(parts)
    if progress and total > 20 * CELLS_AT_ONCE:
        estimate, _ = job.cost()
        print_cost(estimate)
    if len(parts) > 1:  # before hours of cells: that there is something to be explained
        for rows in parts:
            if np.isnan(raw["clean"][rows]).any():
                _keep_ends(job.ends(rows), rows, raw, store)
        gap_between(raw["clean"][:, 0], raw["corrupt"][:, 0], job.contrast.unit, 0)
    bar = progress_bar(None, total=total, what="patching", show=progress)
    for rows in parts:
        recorded: Recorded | None = None
        for name, patches in groups:
            flat = [int(np.ravel_multi_index(patch.place, job.plans[name].shape)) for patch in patches]
            array = raw[name].reshape(job.n, -1)
            missing = [k for k, cell in enumerate(flat) if np.isnan(array[rows, cell]).any()]
            if missing:
                recorded = recorded or _begin(job, rows, raw, store)
                values = recorded.run([patches[k] for k in missing])
                cells = [flat[k] for k in missing]
                array[np.ix_(rows, cells)] = values
                if store is not None:
                    store.add(name, cells, rows, values)
            bar.update(len(patches))
    bar.close()
    return raw


def _begin(job: Job, rows: Sequence[int], raw: Mapping[str, np.ndarray], store: Store | None) -> Recorded:
    recorded = job.record(rows)
    if np.isnan(raw["clean"][rows]).any():
        _keep_ends((recorded.clean, recorded.corrupt), rows, raw, store)
        if len(rows) == job.n:
            gap_between(recorded.clean, recorded.corrupt, job.contrast.unit, 0)
    return recorded


def _keep_ends(ends: tuple[np.ndarray, np.ndarray], rows: Sequence[int], raw: Mapping[str, np.ndarray], store: Store | None) -> None:
    for name, values in zip(("clean", "corrupt"), ends, strict=True):
        raw[name][rows, 0] = values
        if store is not None:
            store.add(name, [0], rows, values[:, None])


def print_cost(estimate: PatchCost, write: Callable[[str], None] | None = None) -> None:
    """Say what a sweep will take, above the bar, on stderr."""
    from tqdm.auto import tqdm

    if write is not None:
        write(f"patching: {estimate}")
    else:
        tqdm.write(f"patching: {estimate}", file=sys.stderr)  # it is no result


def gap_between(clean: np.ndarray, corrupt: np.ndarray, unit: str, seed: int) -> list[str]:
    """Notes on the distance between the runs.

    Raises:
        EpisodeError: there is none.
    """
    gap = clean - corrupt
    size = max(float(np.abs(clean).mean()), float(np.abs(corrupt).mean()), 1e-12)
    if abs(gap.mean()) <= 1e-5 * size:
        raise EpisodeError(
            f"clean and corrupt runs must differ in the metric; their mean difference is {gap.mean():.3g} {unit} over {len(gap)} pairs. "
            "Corrupt something that the answer depends on, or choose another metric."
        )
    low, high = bootstrap_interval(gap, seed=seed)
    if len(gap) > 1 and low <= 0 <= high:
        return [
            f"The runs hardly differ: clean minus corrupt is {gap.mean():.3g} [{float(low):.3g}, {float(high):.3g}] {unit}. Shares of such a distance are not "
            "to be trusted; read `raw`."
        ]
    return []


def effects_of(
    site: str, made: SitePlan, raw: np.ndarray, ends: Mapping[str, np.ndarray], start: np.ndarray, n_permutations: int, seed: int
) -> SiteEffects:
    """One site's table from the raw metric of its cells [batch, *axes] and of the two runs."""
    clean, corrupt = ends["clean"], ends["corrupt"]
    column = (slice(None), *(None,) * (raw.ndim - 1))
    gap = clean - corrupt
    above = raw - corrupt[column]
    low, high = ratio_interval(above, gap, seed=seed)
    rounding = max(1e-5 * float(np.abs(gap).mean()), 2e-6 * float(np.abs(start).max()))
    p = sign_flip_p(raw - start[column], n_draws=n_permutations, seed=seed, tie=rounding)
    return SiteEffects(site, made.axes, made.coords, above.mean(0) / gap.mean(), low, high, p, np.full_like(p, np.nan), raw)


def correct_cells(
    found: dict[str, SiteEffects], correction: Correction, n: int, n_permutations: int
) -> tuple[dict[str, SiteEffects], list[str]]:
    """p corrected over all cells of all sites."""
    flat = np.concatenate([effects.p.ravel() for effects in found.values()])
    corrected = holm(flat) if correction == "holm" else benjamini_hochberg(flat)
    out, seen = {}, 0
    for site, e in found.items():
        some = corrected[seen : seen + e.p.size].reshape(e.p.shape)
        out[site] = SiteEffects(e.site, e.axes, e.coords, e.value, e.low, e.high, e.p, some, e.raw)
        seen += e.p.size
    count = int((~np.isnan(flat)).sum())
    least = max(1 / (n_permutations + 1), 2.0 ** (1 - n))
    if correction == "holm" and least * count > 0.05:
        return out, [
            f"With {n} pairs and {n_permutations} permutations no p is below {least:.2g}, so none of {count} cells can be significant after Holm."
        ]
    return out, []
