"""`grow`: accuracy and head scores of one model after another on the same probe episodes, and the curve as a file."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mechicl.analysis.feed import Data, check_data, provenance
from mechicl.analysis.heads.scoring import score_heads
from mechicl.analysis.icl import icl_accuracy
from mechicl.data.folders import whole_file
from mechicl.errors import CheckpointError, OptionError
from mechicl.results import Estimate, HeadScores, Provenance, Series

GROWN = ("induction", "ila", "previous_token")
"""Head scores that are followed unless others are asked for."""


def grow(
    models: Iterable[tuple[int, Any]],
    data: Data,
    *,
    scores: Sequence[str] = GROWN,
    stages: Sequence[tuple[int, str]] = (),
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> Series:
    """Follow a model along training: at every step the same episodes, the same seed.

    Args:
        models: (step, model) in order; a generator may load one checkpoint at a time.
        data: Probe episodes.
        scores: Head scores to follow. Of each the best head of the step is kept (which head that is may change from step to step) with its interval;
            with many heads the best of a network without training is above zero.
        stages: (step, name) where the training changed.
        seed: Decides nulls and intervals.
        batch_size: Prompts per forward pass.
        task: What the data are, for the record.
        progress: Show bars.

    Returns:
        Series of "accuracy", "CLA" and "<score>, best head".

    Raises:
        OptionError: no model, or steps out of order.
        EpisodeError: the data cannot be used.
    """
    check_data(data, batch_size)
    common: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "task": task, "progress": progress}
    points: list[tuple[int, Mapping[str, Estimate]]] = []
    made: Provenance | None = None
    for step, model in models:
        point, _ = measure_point(model, data, scores=scores, **common)
        points.append((int(step), point))
        made = provenance(model, task=task, seed=seed, options={"scores": list(scores), "batch_size": batch_size})
    if made is None:
        raise OptionError("models must be at least one (step, model); got none. Give the checkpoints in order.")
    return series(points, stages=stages, n=len(data), made=made)


def measure_point(
    model: Any, data: Data, *, scores: Sequence[str] = GROWN, seed: int = 0, batch_size: int = 8, task: str = "", progress: bool = True
) -> tuple[dict[str, Estimate], HeadScores]:
    """One point of a curve: "accuracy", "CLA" and "<score>, best head", and the scores of every head behind it."""
    common: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "task": task, "progress": progress}
    answers = icl_accuracy(model, data, zero_shot=False, **common)
    point = {"accuracy": answers.accuracy, "CLA": answers.cla}
    found = score_heads(model, data, scores=scores, n_null=1, **common)
    for name, score in found.scores.items():
        best = score.top(1)
        if best:
            cell = best[0]
            value, low, high = (float(array[cell]) for array in (score.value, score.low, score.high))
            point[f"{name.replace('_', ' ')}, best head"] = Estimate(value, low, high, found.n, score.unit, "bootstrap 95 %")
    return point, found


def series(
    points: Sequence[tuple[int, Mapping[str, Estimate | float]]],
    *,
    n: int,
    made: Provenance,
    stages: Sequence[tuple[int, str]] = (),
    unit: str = "probability",
) -> Series:
    """Saved scores as a Series.

    Args:
        points: (step, {measure: number or estimate}), steps rising. A measure that a step lacks is NaN there.
        n: Episodes.
        made: How the numbers were made.
        stages: (step, name) where the training changed.
        unit: Of all measures.

    Raises:
        OptionError: no point, or steps that do not rise.
    """
    steps = [step for step, _ in points]
    if not steps or any(b <= a for a, b in itertools.pairwise(steps)):
        raise OptionError(f"steps must rise; got {steps}. Give each checkpoint once, in order.")
    names = list(dict.fromkeys(name for _, point in points for name in point))
    columns: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for _, point in points:
        for name in names:
            at = point.get(name, float("nan"))
            columns[name].append((at.value, at.low, at.high) if isinstance(at, Estimate) else (float(at), float("nan"), float("nan")))
    table = {name: np.array(rows, dtype=np.float64) for name, rows in columns.items()}
    known = {name: rows for name, rows in table.items() if not np.isnan(rows[:, 1:]).all()}
    return Series(
        steps=np.array(steps), values={name: rows[:, 0] for name, rows in table.items()}, low={name: rows[:, 1] for name, rows in known.items()},
        high={name: rows[:, 2] for name, rows in known.items()}, unit=unit, n=n, provenance=made, stages=tuple(stages),
    )  # fmt: skip


def save_series(result: Series, path: str | os.PathLike[str]) -> Path:
    """Write a Series as .json (whole) or .parquet (one row per measure and step, the rest in the file's own metadata).

    Raises:
        OptionError: another suffix.
        OutputPathError: the file cannot be written.
    """
    target = Path(path)
    if target.suffix not in (".json", ".parquet"):
        raise OptionError(f"path must end in .json or .parquet; got {target.name}. Choose one.")
    head = {
        "steps": [int(step) for step in result.steps], "unit": result.unit, "n": result.n, "stages": [list(stage) for stage in result.stages],
        "provenance": asdict(result.provenance),
    }  # fmt: skip
    with whole_file(target) as temporary:
        if target.suffix == ".json":
            parts = {
                part: {name: [float(x) for x in column] for name, column in getattr(result, part).items()}
                for part in ("values", "low", "high")
            }
            temporary.write_text(json.dumps(head | parts, indent=1) + "\n", encoding="utf-8")
        else:
            frame = result.to_frame().astype({"low": "float64", "high": "float64"})
            frame.attrs["mechicl"] = json.dumps(head)
            frame.to_parquet(temporary, index=False)
    return target


def load_series(path: str | os.PathLike[str]) -> Series:
    """Read what `save_series` wrote.

    Raises:
        CheckpointError: the file is missing or not a Series.
    """
    source = Path(path)
    try:
        if source.suffix == ".parquet":
            head, parts = _from_parquet(source)
        else:
            head = json.loads(source.read_text(encoding="utf-8"))
            parts = {
                part: {name: np.array(column, dtype=np.float64) for name, column in head[part].items()}
                for part in ("values", "low", "high")
            }
        return Series(
            steps=np.array(head["steps"]), **parts, unit=head["unit"], n=head["n"], provenance=Provenance(**head["provenance"]),
            stages=tuple((int(step), str(name)) for step, name in head["stages"]),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"path must be a saved Series; {source} is not ({error}). Write it with save_series.") from error


def _from_parquet(source: Path) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    frame = pd.read_parquet(source)
    head = json.loads(frame.attrs["mechicl"])
    parts: dict[str, dict[str, np.ndarray]] = {"values": {}, "low": {}, "high": {}}
    for name, rows in frame.groupby("measure", sort=False):
        for part, column in (("values", "value"), ("low", "low"), ("high", "high")):
            values = rows[column].to_numpy(dtype=np.float64)
            if part == "values" or not np.isnan(values).all():
                parts[part][str(name)] = values
    return head, parts
