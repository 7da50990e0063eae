"""What activation patching found: how much of the clean run comes back (or is lost) when one activation is exchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from mechicl.errors import OptionError
from mechicl.results.base import Estimate, Provenance, Skipped

Direction = Literal["denoise", "noise"]
"""denoise: the corrupt run with clean activations put in, which asks what suffices. noise: the clean run with corrupt ones, which asks what is needed."""


@dataclass(frozen=True, eq=False)
class SiteEffects:
    """The cells of one site: one number for each activation that was exchanged alone.

    Attributes:
        site: "resid_pre", "z", "image_features", ...
        axes: Names of the arrays' axes, ("layer", "span"), ("layer", "head"), ("layer", "head", "span"), ...
        coords: For each axis its labels.
        value: Where the patched run stands between the corrupt run (0) and the clean one (1), ratio of means over episodes. Not bounded: a cell may
            overshoot. NaN where no cell exists (a span that no episode has, a layer that cannot be hooked).
        low: Lower end of the 95 % bootstrap interval over episodes of `value`.
        high: Its upper end.
        p: Two-sided sign-flip p of the per-episode change against the run that was patched into (corrupt for denoise, clean for noise).
        p_corrected: Over all cells of all sites of the call.
        raw: The metric of each patched run in its unit, [batch, *axes].
    """

    site: str
    axes: tuple[str, ...]
    coords: Mapping[str, tuple[Any, ...]]
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    p_corrected: np.ndarray
    raw: np.ndarray

    def labels(self, index: tuple[int, ...]) -> dict[str, Any]:
        """Names of a cell: axis -> label."""
        return {axis: self.coords[axis][i] for axis, i in zip(self.axes, index, strict=True)}

    def at(self, **labels: Any) -> float:
        """The value of the cell with these labels, e.g. effects["z"].at(layer=0, head=2).

        Raises:
            OptionError: an axis or a label that is not there.
        """
        return float(self.value[self.index(**labels)])

    def index(self, **labels: Any) -> tuple[int, ...]:
        """Place of a cell in the arrays; errors as in `at`."""
        if set(labels) != set(self.axes):
            raise OptionError(f"labels must name the axes {self.axes}; got {tuple(labels)}. Give one label for each.")
        for axis, label in labels.items():
            if label not in self.coords[axis]:
                raise OptionError(f"{axis} must be one of {self.coords[axis]}; got {label!r}. Pick one of them.")
        return tuple(self.coords[axis].index(labels[axis]) for axis in self.axes)


@dataclass(frozen=True, eq=False)
class PatchEffects:
    """Activation patching over any number of sites. `effects["z"]` is that site's `SiteEffects`.

    Attributes:
        sites: By name.
        direction: What was put into what.
        metric: Name of the metric.
        unit: Of `clean`, `corrupt` and the cells' `raw`.
        clean: The metric of each clean run, [batch].
        corrupt: The metric of each corrupt run, [batch].
        correction: How p was corrected over cells.
        pairs: How the corrupt prompts were made.
        n: Episodes.
        skipped: Episodes left out, and why.
        provenance: How the numbers were made.
        notes: What to know when reading them.
    """

    sites: Mapping[str, SiteEffects]
    direction: Direction
    metric: str
    unit: str
    clean: np.ndarray
    corrupt: np.ndarray
    correction: Literal["holm", "fdr_bh"]
    pairs: str
    n: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()

    def __getitem__(self, site: str) -> SiteEffects:
        return self.sites[site]

    @property
    def start(self) -> np.ndarray:
        """The metric of the run that was patched into, [batch]."""
        return self.corrupt if self.direction == "denoise" else self.clean

    def top(self, site: str, k: int = 5) -> list[tuple[Any, ...]]:
        """Labels of the k cells that move the run furthest from where it started towards the other run, first the furthest; NaN cells never appear."""
        effects = self.sites[site]
        moved = (effects.value if self.direction == "denoise" else 1 - effects.value).ravel()
        order = [int(i) for i in np.argsort(-np.nan_to_num(moved, nan=-np.inf), kind="stable") if not np.isnan(moved[i])]
        cells = [tuple(int(j) for j in np.unravel_index(i, effects.value.shape)) for i in order[:k]]
        return [tuple(effects.labels(cell).values()) for cell in cells]

    def to_frame(self) -> pd.DataFrame:
        """One row per (site, cell); the columns of axes that a site lacks are empty."""
        rows = []
        for site, effects in self.sites.items():
            for cell in np.ndindex(*effects.value.shape):
                if np.isnan(effects.value[cell]):
                    continue
                rows.append(
                    {"site": site, **effects.labels(cell), "value": effects.value[cell], "low": effects.low[cell], "high": effects.high[cell],
                     "p": effects.p[cell], "p_corrected": effects.p_corrected[cell], "raw_mean": float(np.mean(effects.raw[(slice(None), *cell)])),
                     "unit": self.unit, "metric": self.metric, "direction": self.direction, "n": self.n}
                )  # fmt: skip
        return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class PatchCost:
    """What a sweep will take, from a few cells that were run and timed.

    Attributes:
        cells: Activations to exchange, over all sites, for each episode.
        forwards: Forward passes worth of cells (cells times batches of episodes), and the runs to record.
        seconds: Estimate of the whole sweep.
        gigabytes: Activations held in memory at once, at most.
        cell_seconds: Seconds for one cell of one batch of episodes, by site, mean over the timed ones.
        n: Episodes.
    """

    cells: int
    forwards: int
    seconds: float
    gigabytes: float
    cell_seconds: Mapping[str, float]
    n: int

    def __str__(self) -> str:
        time = f"{self.seconds:.0f} s" if self.seconds < 120 else f"{self.seconds / 60:.0f} min"
        return f"{self.cells} cells x {self.n} episodes, {self.forwards} forwards, about {time}, {self.gigabytes:.2g} GB of activations"


@dataclass(frozen=True, eq=False)
class TransplantRow:
    """One move: an activation of the source prompt's span, put into the target prompt's span.

    Attributes:
        site: What was moved.
        layer: Where; -1 for sites without layers.
        source: Span that gave it.
        target: Span that received it.
        effect: Change of the metric in its unit, patched minus untouched target.
        control: The same move from other episodes' prompts: what damage or any content of that kind does.
        difference: effect - control, paired: what this episode's content does.
        normalised: effect as a share of the distance from the target's run (0) to the source's (1); None where the two runs do not differ.
        p: Two-sided sign-flip p of `difference`.
        p_corrected: Over all rows.
        per_episode: effect, [batch].
        control_per_episode: control, mean over draws, [batch].
    """

    site: str
    layer: int
    source: str
    target: str
    effect: Estimate
    control: Estimate
    difference: Estimate
    normalised: Estimate | None
    p: float
    p_corrected: float
    per_episode: np.ndarray
    control_per_episode: np.ndarray


@dataclass(frozen=True, eq=False)
class Transplant:
    """Activations moved between prompts, or between places of one prompt.

    Attributes:
        rows: One for each (site, layer, move).
        metric: What was measured, towards what.
        unit: Of the effects.
        target: The metric of the untouched target runs, [batch].
        source: The same metric (the same two answers) of the source runs, [batch].
        correction: How p was corrected over rows.
        n: Episodes.
        n_controls: Other episodes that each episode's control is the mean of.
        skipped: Episodes left out, and why.
        provenance: How the numbers were made.
        notes: What to know when reading them.
    """

    rows: tuple[TransplantRow, ...]
    metric: str
    unit: str
    target: np.ndarray
    source: np.ndarray
    correction: Literal["holm", "fdr_bh"]
    n: int
    n_controls: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One row per (site, layer, move)."""
        return pd.DataFrame(
            {"site": r.site, "layer": r.layer, "source": r.source, "target": r.target, "effect": r.effect.value, "low": r.effect.low, "high": r.effect.high,
             "control": r.control.value, "control_low": r.control.low, "control_high": r.control.high,
             "difference": r.difference.value, "difference_low": r.difference.low, "difference_high": r.difference.high,
             "normalised": None if r.normalised is None else r.normalised.value, "p": r.p, "p_corrected": r.p_corrected, "unit": self.unit, "n": self.n}
            for r in self.rows
        )  # fmt: skip
