"""What gradients say about nodes and edges, how well that agrees with running the cells exactly, and function vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from mechicl.results.base import Estimate, Head, Provenance, Skipped
from mechicl.results.nodes import Edge, Receiver, Sender, feeds
from mechicl.results.patching import Direction, SiteEffects


@dataclass(frozen=True, eq=False)
class Agreement:
    """An approximation beside exact runs, on the cells that were also run exactly.

    `names`, `exact`, `approximate` [cell]: both are the share of the gap between corrupt and clean that the cell moves. `random` [cell]: True where the cell
    was drawn at random, False where it was taken because the approximation ranks it high (cells chosen so are too good or too bad by selection, so
    read `pearson_random` where there are enough). `pearson` and `spearman` are over all cells run exactly. `overlap`: share of the `k` largest cells by exact
    magnitude that are also among the `k` largest by the approximation; `chance`: what two unrelated rankings of these cells would share on average; `p`:
    hypergeometric, one-sided. `slope`: least-squares, exact = slope * approximate (1: the sizes are right, not only the order). `cells`: what they are
    called, "cells" or "edges".
    """

    names: tuple[str, ...]
    exact: np.ndarray
    approximate: np.ndarray
    random: np.ndarray
    pearson: float
    pearson_random: float
    spearman: float
    slope: float
    k: int
    overlap: float
    chance: float
    p: float
    n_possible: int
    cells: str = "cells"

    @property
    def n_cells(self) -> int:
        """Number of cells run exactly."""
        return len(self.names)

    def to_frame(self) -> pd.DataFrame:
        """One row per cell run exactly."""
        return pd.DataFrame({"cell": self.names, "exact": self.exact, "approximate": self.approximate, "random": self.random})

    def __str__(self) -> str:
        return (
            f"{self.n_cells} of {self.n_possible} {self.cells} run exactly: Pearson {self.pearson:.2f}, Spearman {self.spearman:.2f}, "
            f"top {self.k} share {self.overlap:.2f} (chance {self.chance:.2f}, p = {self.p:.2g})"
        )


@dataclass(frozen=True, eq=False)
class Attribution:
    """Activation patching estimated by gradient, in the form of `PatchEffects`: `sites[name]` has the axes and the scale of exact patching.

    `method`: "AtP" (gradient at the start run) or "AtP-IG" (gradients averaged over `steps` runs between start and other; `path` says between what).
    `agreement`: always read it; None only when asked for none.
    """

    sites: Mapping[str, SiteEffects]
    method: str
    steps: int
    path: str
    direction: Direction
    metric: str
    unit: str
    clean: np.ndarray
    corrupt: np.ndarray
    correction: Literal["holm", "fdr_bh"]
    pairs: str
    agreement: Agreement | None
    n: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()

    def __getitem__(self, site: str) -> SiteEffects:
        return self.sites[site]

    @property
    def start(self) -> np.ndarray:
        """The metric of the run at which gradients were taken, [batch]."""
        return self.corrupt if self.direction == "denoise" else self.clean

    def change(self, site: str) -> np.ndarray:
        """Share of the gap that each cell moves, away from the start run: `value` when denoising, 1 - `value` when noising."""
        return self.sites[site].value if self.direction == "denoise" else 1 - self.sites[site].value

    def top(self, site: str, k: int = 5) -> list[tuple[Any, ...]]:
        """Labels of the k cells that move the run furthest towards the other run, first the furthest; NaN cells never appear."""
        found, moved = self.sites[site], self.change(site)
        order = [int(i) for i in np.argsort(-np.nan_to_num(moved.ravel(), nan=-np.inf), kind="stable") if not np.isnan(moved.ravel()[i])]
        cells = [tuple(int(j) for j in np.unravel_index(i, moved.shape)) for i in order[:k]]
        return [tuple(found.labels(cell).values()) for cell in cells]

    def to_frame(self) -> pd.DataFrame:
        """One row per (site, cell)."""
        rows = []
        for name, site in self.sites.items():
            for cell in np.ndindex(*site.value.shape):
                if np.isnan(site.value[cell]):
                    continue
                numbers = {key: getattr(site, key)[cell] for key in ("value", "low", "high", "p", "p_corrected")}
                rows.append({"site": name, **site.labels(cell), **numbers, "method": self.method, "direction": self.direction, "n": self.n})
        return pd.DataFrame(rows)


EdgeMethod = Literal["EAP", "EAP-IG", "path patching"]


@dataclass(frozen=True, eq=False)
class EdgeScores:
    """How much of the gap between corrupt and clean every edge carries.

    `value`, `low`, `high` [sender, receiver]: mean over episodes of the metric's change when the edge alone is switched from one run to the other, signed
    towards clean and divided by the mean gap (clean - corrupt): 1 = the edge alone carries everything, 0 = nothing, negative = it speaks against. NaN
    where no edge can exist. Bootstrap 95 % over episodes. `raw` [batch, sender, receiver]: the same per episode in the metric's unit, not divided.
    `by_span` [sender, receiver, span]: `value` split over the positions that the edge runs at (columns `spans`); None when not asked for.
    """

    method: EdgeMethod
    senders: tuple[Sender, ...]
    receivers: tuple[Receiver, ...]
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    raw: np.ndarray
    metric: str
    unit: str
    direction: Direction
    clean: np.ndarray
    corrupt: np.ndarray
    steps: int
    agreement: Agreement | None
    pairs: str
    n: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()
    by_span: np.ndarray | None = None
    spans: tuple[str, ...] = ()

    @property
    def change(self) -> np.ndarray:
        """`value`, under the name that it has in `PathEffects`: already a share of the gap, whatever the direction."""
        return self.value

    def __getitem__(self, edge: Edge) -> float:
        return float(self.value[self.senders.index(edge.sender), self.receivers.index(edge.receiver)])

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge that has a score, receiver by receiver."""
        pairs = ((j, i) for j in range(len(self.receivers)) for i in range(len(self.senders)) if not np.isnan(self.value[i, j]))
        return tuple(Edge(self.senders[i], self.receivers[j]) for j, i in pairs)

    def scores(self) -> dict[Edge, float]:
        """Edge -> value."""
        rows, columns = {s: i for i, s in enumerate(self.senders)}, {r: j for j, r in enumerate(self.receivers)}
        return {edge: float(self.value[rows[edge.sender], columns[edge.receiver]]) for edge in self.edges}

    def ranking(self, *, by: Literal["magnitude", "value"] = "magnitude") -> list[Edge]:
        """All edges, the strongest first: by magnitude (either sign), or by signed value."""
        found = self.scores()
        return sorted(found, key=lambda edge: -(abs(found[edge]) if by == "magnitude" else found[edge]))

    def top(self, k: int = 10, *, by: Literal["magnitude", "value"] = "magnitude") -> list[Edge]:
        """The k strongest edges, best first."""
        return self.ranking(by=by)[:k]

    def place(self, edge: Edge) -> str:
        """The span at which the edge carries most; "" where spans were not asked for."""
        if self.by_span is None:
            return ""
        split = self.by_span[self.senders.index(edge.sender), self.receivers.index(edge.receiver)]
        return "" if np.isnan(split).all() else self.spans[int(np.nanargmax(np.abs(split)))]

    def to_frame(self) -> pd.DataFrame:
        """One row per edge, the strongest first."""
        rows = {s: i for i, s in enumerate(self.senders)}
        columns = {r: j for j, r in enumerate(self.receivers)}
        cells = [(edge, (rows[edge.sender], columns[edge.receiver])) for edge in self.ranking()]
        return pd.DataFrame(
            [{"edge": edge.name, "sender": edge.sender.name, "receiver": edge.receiver.name, "value": self.value[c], "low": self.low[c],
              "high": self.high[c], "span": self.place(edge), "method": self.method, "n": self.n} for edge, c in cells]
        )  # fmt: skip

    def __post_init__(self) -> None:
        shape = (len(self.senders), len(self.receivers))
        assert self.value.shape == shape, (self.value.shape, shape)
        assert all(feeds(edge.sender, edge.receiver) for edge in self.edges)


@dataclass(frozen=True, eq=False)
class VectorEffect:
    """A vector added to the stream at the last token, where a layer begins.

    `prompts`: what it was added to ("zero-shot" or "labels shuffled"). `probability`: of the right label's first token; `accuracy`: share of episodes whose
    right label is the likeliest candidate. `change_*`: against the same prompts without it, paired. `random_vectors`, `random_heads` [draw]: the same change in probability for
    random directions and for sums of as many random heads' means, all of the vector's length; `p_random`: share of all these draws (with the +1 correction) that change
    the probability at least as much.
    """

    layer: int
    prompts: str
    probability: Estimate
    accuracy: Estimate
    change_probability: Estimate
    change_accuracy: Estimate
    random_vectors: np.ndarray
    random_heads: np.ndarray
    p_random: float


@dataclass(frozen=True, eq=False)
class FunctionVector:
    """The sum of some heads' mean outputs at the last token of clean prompts, as a vector of the residual stream.

    `heads` (layer, head); `vector` [d_model]; `head_means` [layer, head, d_model]: every head's mean, chosen or not (NaN where a layer has none);
    `episode_ids`: the prompts that the means were taken over. `effects`: what adding it does, one entry for each (prompts, layer), empty until
    `add_function_vector`; `baseline`: (probability, accuracy) without it, by prompts.
    """

    heads: tuple[Head, ...]
    vector: np.ndarray
    head_means: np.ndarray
    n: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    effects: tuple[VectorEffect, ...] = ()
    baseline: Mapping[str, tuple[Estimate, Estimate]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    episode_ids: tuple[str, ...] = ()

    @property
    def length(self) -> float:
        """Euclidean norm of the vector."""
        return float(np.linalg.norm(self.vector))

    def to_frame(self) -> pd.DataFrame:
        """One row per (prompts, layer)."""
        return pd.DataFrame(
            [{"prompts": e.prompts, "layer": e.layer, "probability": e.probability.value, "accuracy": e.accuracy.value,
              "change": e.change_probability.value, "low": e.change_probability.low, "high": e.change_probability.high,
              "change_accuracy": e.change_accuracy.value,
              "random_vector": float(np.mean(e.random_vectors)) if e.random_vectors.size else np.nan,
              "random_heads": float(np.mean(e.random_heads)) if e.random_heads.size else np.nan, "p_random": e.p_random,
              "n": e.probability.n} for e in self.effects]
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class HeadOverlap:
    """Heads that two rankings share, against chance: `shared` of the top `k` of each; `expected` by chance and `p` are hypergeometric, one-sided."""

    first: str
    second: str
    k: int
    heads_first: tuple[Head, ...]
    heads_second: tuple[Head, ...]
    shared: tuple[Head, ...]
    share: float
    expected: float
    p: float
    n_heads: int
    spearman: float
