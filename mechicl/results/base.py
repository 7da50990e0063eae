"""What every result carries: the number with its interval, how it was made, what was left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Head = tuple[int, int]
"""(layer, head), both counted from 0."""


@dataclass(frozen=True, eq=False)
class Provenance:
    """How a number was made: enough to make it again."""

    model: str
    revision: str = ""
    dtype: str = ""
    attention: str = ""
    device: str = ""
    task: str = ""
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Skipped:
    """An episode left out, and why."""

    episode: str
    reason: str


@dataclass(frozen=True, eq=False)
class Estimate:
    """One number with its interval."""

    value: float
    low: float
    high: float
    n: int
    unit: str = "probability"
    method: str = "Wilson 95 %"

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.n})"


def columns(name: str, e: Estimate | None) -> dict[str, float]:
    """A number and its interval as columns of a table; NaN where there is none."""
    if e is None:
        e = Estimate(math.nan, math.nan, math.nan, 0)
    return {name: e.value, f"{name}_low": e.low, f"{name}_high": e.high}


def mean_or_nan(values: np.ndarray) -> float:
    """The mean; NaN of nothing."""
    return float(np.mean(values)) if len(values) else math.nan
