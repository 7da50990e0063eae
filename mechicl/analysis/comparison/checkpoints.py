"""`series`: accuracy and heads of one model along its checkpoints, on the same probe episodes; resumable."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mechicl.analysis.comparison.improve import held_out_by
from mechicl.analysis.comparison.places import Checkpoint, Revisions, checkpoints, opened
from mechicl.analysis.comparison.sides import known_by, unique_ids
from mechicl.analysis.feed import Data, check_data, comparable, provenance
from mechicl.analysis.guarded import guarded
from mechicl.analysis.heads.named import SCORES
from mechicl.analysis.kept import KeptFolder
from mechicl.analysis.statistics import mean_estimate
from mechicl.analysis.trainings.change_points import main_change
from mechicl.analysis.trainings.growth import GROWN, measure_point
from mechicl.analysis.trainings.growth import series as as_series
from mechicl.errors import OptionError
from mechicl.models.load import check_model
from mechicl.results import Estimate, Provenance
from mechicl.results.comparison import CheckpointSeries

DIGITS = 6
"""Of kept scores."""


class PointStore(KeptFolder):
    """The folder of a series: one line for each finished checkpoint."""

    plan: str = "series.json"
    lines: str = "checkpoints.jsonl"
    what: str = "series"
    finished: str = "checkpoints"

    def load(self) -> dict[int, dict[str, Any]]:
        """Finished checkpoints by step."""
        found: dict[int, dict[str, Any]] = {}

        def take(line: dict[str, Any]) -> None:
            found[int(line["step"])] = line

        self.read_lines(take)
        return found


@guarded
def series(
    source: str | os.PathLike[str] | Sequence[Any],
    episodes: Data,
    *,
    revisions: Revisions | None = None,
    scores: Sequence[str] = GROWN,
    top: int = 4,
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    out: str | os.PathLike[str] | None = None,
    load_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> CheckpointSeries:
    """Follow a model over revisions of the hub or a folder of checkpoints, one loaded at a time.

    To the measures of `mechicl.analysis.trainings.growth.grow` (accuracy, CLA, each score's best head of the step) it adds what becomes of fixed heads: those that are best at the
    last checkpoint. They are chosen on one half of the episodes and measured on the other at every checkpoint, so that the last is not favoured.

    Args:
        source: See `mechicl.analysis.comparison.places.checkpoints`.
        episodes: Probes, the same for all checkpoints.
        revisions: Of a hub model: names that tell the step ("step1000"), (step, name), or {name: step}.
        scores: Head scores to follow.
        top: How many final heads.
        seed: Decides ties and intervals.
        batch_size: Prompts per forward pass.
        task: What the episodes are, for the record.
        out: A folder that keeps each finished checkpoint (`checkpoints.jsonl`) and at the end `series.parquet`; asked again, it goes on where it was.
        load_options: Of `mechicl.load`: device, dtype, ...
        progress: Show bars.

    Returns:
        CheckpointSeries. `changes` is the one change of each curve, of one run: for intervals run several trainings and use `emergence`.

    Raises:
        OptionError, CheckpointError: what cannot be followed, before the first model is loaded where that can be known.
    """
    check_data(episodes, batch_size)
    unknown = [name for name in scores if name not in SCORES]
    if unknown or not scores:
        raise OptionError(f"scores must be among {', '.join(SCORES)}; got {unknown or 'none'}. Leave it out for {', '.join(GROWN)}.")
    if top < 1 or not unique_ids(episodes):
        raise OptionError(
            f"top must be at least 1 and episodes must have ids of their own; got top={top}. Change it, or leave all ids empty."
        )
    comparable(episodes)
    found = checkpoints(source, revisions)
    store = None
    if out is not None:
        named = [[one.step, one.name, one.source if one.revision else Path(one.source).name] for one in found]
        store = PointStore(out, {"checkpoints": named, "episodes": known_by(episodes), "scores": list(scores), "seed": seed, "task": task})
    done = {} if store is None else store.load()
    options = {"progress": progress, **(load_options or {})}
    for one in found:  # all of them before the first is measured
        if one.step not in done:
            check_model(one.source, revision=one.revision or None, trust_remote_code=bool(options.get("trust_remote_code")))
    for one in found:
        if one.step not in done:
            line = _measure(one, episodes, scores, seed, batch_size, task, progress, options)
            done[one.step] = line
            if store is not None:
                store.add_line(line)
    result = _assemble(found, done, scores, top, seed)
    if store is not None:
        store.write_table("series.parquet", result.to_frame().astype({"low": "float64", "high": "float64"}))
    return result


def _measure(
    one: Checkpoint,
    episodes: Data,
    scores: Sequence[str],
    seed: int,
    batch_size: int,
    task: str,
    progress: bool,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    with opened(one, options) as model:
        common: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "task": task, "progress": progress}
        point, heads = measure_point(model, episodes, scores=scores, **common)
        made = provenance(model, task=task, seed=seed, options={"scores": list(scores), "batch_size": batch_size})
    del model
    gc.collect()
    return {
        "step": one.step, "name": one.name, "measures": {name: asdict(value) for name, value in point.items()}, "n": heads.n, "provenance": asdict(made),
        "heads": {name: np.round(score.per_episode, DIGITS).tolist() for name, score in heads.scores.items()},
    }  # fmt: skip


def _assemble(
    found: Sequence[Checkpoint], done: Mapping[int, dict[str, Any]], scores: Sequence[str], top: int, seed: int
) -> CheckpointSeries:
    lines = [done[one.step] for one in found]
    made = Provenance(**lines[-1]["provenance"])
    points: list[dict[str, Estimate | float]] = [{name: Estimate(**value) for name, value in line["measures"].items()} for line in lines]
    heads: dict[str, np.ndarray] = {}
    notes, chance = [], float("nan")
    for name in [name for name in lines[-1]["heads"] if all(name in line["heads"] for line in lines)]:
        tables = [np.array(line["heads"][name], dtype=np.float64) for line in lines]
        if len({table.shape for table in tables}) > 1:
            notes.append(f"Heads of {name} are not followed: the checkpoints' shapes differ.")
            continue
        with np.errstate(invalid="ignore"):
            means = np.stack([np.nansum(table, 0) / (~np.isnan(table)).sum(0) for table in tables])
        heads[name] = means
        k = min(top, max(1, int(np.isfinite(means[-1]).sum()) // 4))
        chance = k / int(np.isfinite(means[-1]).sum())
        for point, values in zip(points, _followed(tables, k, seed), strict=True):
            point[f"{name.replace('_', ' ')}, final heads"] = values
        last = _top(means[-1], k)
        for point, mean in zip(points, means, strict=True):
            point[f"{name.replace('_', ' ')}, top {k} shared with the last"] = len(_top(mean, k) & last) / k
    steps = [one.step for one in found]
    result = as_series(list(zip(steps, points, strict=True)), n=int(lines[-1]["n"]), made=made)
    if len(steps) < 4:
        notes.append("Fewer than four checkpoints: no change points.")
    changes = {
        name: main_change(steps, values) for name, values in result.values.items() if len(values) >= 4 and np.isfinite(values).all() and steps[0] >= 0
    }  # fmt: skip
    return CheckpointSeries(
        series=result, names=tuple(one.name for one in found), heads=heads, changes=changes, top=top, shared_chance=chance, notes=tuple(notes)
    )  # fmt: skip


def _followed(tables: Sequence[np.ndarray], k: int, seed: int) -> list[Estimate]:
    """At each checkpoint the mean of the k heads that are best at the last one, chosen on the other half of the episodes."""
    alive = ~np.isnan(tables[-1]).all(0)
    last = tables[-1][:, alive]
    return [mean_estimate(held_out_by(last, table[:, alive], k), unit="probability", seed=seed) for table in tables]


def _top(mean: np.ndarray, k: int) -> set[int]:
    flat = np.nan_to_num(mean.ravel(), nan=-np.inf)
    return {int(i) for i in np.argsort(-flat, kind="stable")[:k]}
