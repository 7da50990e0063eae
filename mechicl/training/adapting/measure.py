"""What a fine-tuning does to a model, measured at chosen steps on fixed probe episodes: answers, heads, and what the answers need."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mechicl.analysis.ablation.ablate import ablate
from mechicl.analysis.feed import check_data, provenance
from mechicl.analysis.heads.named import SCORES
from mechicl.analysis.heads.scoring import score_heads
from mechicl.analysis.icl import icl_accuracy
from mechicl.analysis.trainings.growth import series
from mechicl.errors import OptionError
from mechicl.prompts.episode import Episode
from mechicl.results import Estimate, Head, Series
from mechicl.training.adapting.data import about
from mechicl.training.runs import Run

FOLLOWED = ("induction", "previous_token", "ila")
"""Head scores along a fine-tuning: the query to right minus wrong labels, every token to the one before it, labels to their items."""


@dataclass(frozen=True, eq=False)
class Probe:
    """What is measured, and on which episodes.

    Attributes:
        episodes: Fixed, best of classes that the fine-tuning does not see.
        scores: Head scores to follow; the best head of each step is reported, and every head's value is kept.
        knocked: How many of the best induction heads are switched off for the circuit measure, ranked on the episodes with even numbers and switched
            off on the others; 0: leave it out.
        circuit: Sets of heads by name, switched off at every step: the same heads all along.
        n_random: Random sets of as many heads, the control.
        seed, batch_size: As in `score_heads`.
    """

    episodes: Sequence[Episode]
    scores: tuple[str, ...] = FOLLOWED
    knocked: int = 2
    circuit: Mapping[str, Sequence[Head]] | None = None
    n_random: int = 4
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_data(self.episodes, self.batch_size)
        unknown = [name for name in self.scores if name not in SCORES]
        if unknown:
            raise OptionError(f"scores must be among {', '.join(SCORES)}; got {unknown}. Pick some of them.")
        if self.knocked < 0 or self.n_random < 1:
            raise OptionError(
                f"knocked must be at least 0 and n_random at least 1; got {self.knocked} and {self.n_random}. 2 and 4 are usual."
            )
        if (self.knocked or self.circuit) and len(self.episodes) < 4:
            raise OptionError(f"episodes must be at least 4 to switch heads off; got {len(self.episodes)}. Give more, or knocked=0.")

    def to_json(self) -> dict[str, Any]:
        """For a run's configuration."""
        circuit = {name: [list(head) for head in heads] for name, heads in (self.circuit or {}).items()}
        return {
            "episodes": about(list(self.episodes)), "scores": list(self.scores), "knocked": self.knocked, "circuit": circuit,
            "n_random": self.n_random, "seed": self.seed,
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Point:
    """A model at one step: measures with their intervals, and `heads[score]` [layer, head]."""

    measures: Mapping[str, Estimate]
    heads: Mapping[str, np.ndarray]


def measure(model: Any, probe: Probe) -> Point:
    """Measure a hooked model.

    Returns:
        "accuracy" among the candidates, "CLA", "<score>, best head" for every score; with `knocked`, on the episodes with odd numbers: "accuracy, odd
        episodes", "accuracy without the best induction heads", "accuracy without random heads"; for every named set "accuracy without <name>". All are
        probabilities.
    """
    common: dict[str, Any] = {"seed": probe.seed, "batch_size": probe.batch_size, "progress": False}
    answers = icl_accuracy(model, probe.episodes, zero_shot=False, **common)
    out = {"accuracy": answers.accuracy, "CLA": answers.cla}
    heads: dict[str, np.ndarray] = {}
    if probe.scores:
        found = score_heads(model, probe.episodes, scores=probe.scores, n_null=1, **common)
        for name, score in found.scores.items():
            heads[name] = np.asarray(score.value)
            if np.isfinite(score.value).any():
                cell = score.top(1)[0]
                value, low, high = (float(array[cell]) for array in (score.value, score.low, score.high))
                out[f"{name.replace('_', ' ')}, best head"] = Estimate(value, low, high, found.n, score.unit, "bootstrap 95 %")
    return Point(out | _circuit(model, probe, common), heads)


def _circuit(model: Any, probe: Probe, common: Mapping[str, Any]) -> dict[str, Estimate]:
    """What the answers lose without the best induction heads, without random ones, without named ones."""
    if not probe.knocked and not probe.circuit:
        return {}
    even, odd = list(probe.episodes[::2]), list(probe.episodes[1::2])
    options: dict[str, Any] = {"how": "mean", "singles": False, "zero_shot": False, "reference": even, **common}
    out: dict[str, Estimate] = {}
    intact = None
    if probe.knocked:
        ranked = score_heads(model, even, scores=("induction",), n_null=1, **common).scores["induction"].top(probe.knocked)
        found = ablate(model, odd, ranked, n_random=probe.n_random, **options)
        intact = found.intact
        out = {
            "accuracy, odd episodes": found.intact.accuracy,
            "accuracy without the best induction heads": found.chosen.accuracy,
            "accuracy without random heads": found.random_mean,
        }
    for name, heads in (probe.circuit or {}).items():
        found = ablate(model, odd, list(heads), n_random=1, intact=intact, **options)
        out |= {"accuracy, odd episodes": found.intact.accuracy, f"accuracy without {name}": found.chosen.accuracy}
    return out


def write_down(point: Point, step: int) -> dict[str, Any]:
    """A line for a run's metrics."""
    measures = {name: [_short(x) for x in (e.value, e.low, e.high)] + [e.n] for name, e in point.measures.items()}
    heads = {name: [[_short(x) for x in row] for row in value] for name, value in point.heads.items()}
    return {"step": step, "measures": measures, "heads": heads}


def _short(x: float) -> float | None:
    return round(float(x), 6) if np.isfinite(x) else None


def growth(lines: Sequence[Mapping[str, Any]], made: Any, n: int) -> Series | None:
    """The growth curve in a run's metrics; None where nothing was measured."""
    points = []
    for line in sorted((line for line in lines if "measures" in line), key=lambda line: line["step"]):
        found = {}
        for name, (value, low, high, count) in line["measures"].items():
            value, low, high = (float("nan") if x is None else x for x in (value, low, high))
            found[name] = Estimate(value, low, high, count)
        points.append((int(line["step"]), found))
    return series(points, n=n, made=made) if points else None


def head_curve(folder: str | os.PathLike[str], score: str, head: Head) -> tuple[np.ndarray, np.ndarray]:
    """One head's score along a fine-tuning: (steps, values), whichever head was best.

    Raises:
        OptionError: the run did not follow this score, or has no such head.
    """
    lines = sorted((line for line in Run(Path(folder)).lines() if "heads" in line), key=lambda line: line["step"])
    known = sorted({name for line in lines for name in line["heads"]})
    if score not in known:
        raise OptionError(f"score must be one that the run followed ({', '.join(known) or 'none'}); got {score!r}. Pick one of them.")
    layer, index = head
    grid = lines[0]["heads"][score]
    if not (0 <= layer < len(grid) and 0 <= index < len(grid[0])):
        raise OptionError(f"head must be below ({len(grid)}, {len(grid[0])}); got {head}. Both count from 0.")
    values = [line["heads"][score][layer][index] for line in lines]
    return np.array([line["step"] for line in lines]), np.array([np.nan if v is None else v for v in values], dtype=np.float64)


def when(at: int | Sequence[int], steps: int) -> tuple[int, ...]:
    """Steps at which a fine-tuning is measured, the start and the end among them.

    Args:
        at: The steps, or how many, evenly spaced on a logarithm.

    Raises:
        OptionError: a step beyond the last.
    """
    if isinstance(at, int):
        if at < 2:
            raise OptionError(f"measure_at must be at least 2 points, start and end; got {at}. Give more, or a list of steps.")
        inner = np.geomspace(1, steps, at - 1).round().astype(int).tolist()
        return tuple(sorted({0, *inner, steps}))
    wrong = [step for step in at if not 0 <= step <= steps]
    if wrong:
        raise OptionError(f"measure_at must be steps in 0..{steps}; got {wrong[0]}. Leave it out.")
    return tuple(sorted({0, *at, steps}))


def made_by(model: Any, probe: Probe, task: str) -> Any:
    """How the curve was made."""
    options = {"scores": list(probe.scores), "knocked": probe.knocked, "batch_size": probe.batch_size}
    return provenance(model, task=task, seed=probe.seed, options=options)
