"""Pairs made ready to be run with any number of sets of edges, and the metric of every run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechicl.analysis.feed import progress_bar
from mechicl.analysis.patching.metrics import Contrast, Metric, contrast
from mechicl.analysis.statistics import ratio_interval
from mechicl.errors import OptionError
from mechicl.models.edge_graph import EdgeGraph
from mechicl.models.subgraph import MEMORY, check_replacement, run_sets
from mechicl.models.subgraph_pairs import PairedRuns, Replaced, mean_runs, paired_runs
from mechicl.prompts.batch import Batch
from mechicl.prompts.corrupt import Pairs
from mechicl.results import Estimate, Skipped
from mechicl.results.circuits import Replacement

KEEP = 2 * 2**30
"""Bytes of recorded runs that are kept between calls; beyond that they are made again."""

UNIT = "share of the clean-corrupt difference"


@dataclass(eq=False)
class CircuitRuns:
    """Some pairs, run with sets of edges as often as needed.

    Attributes:
        clean, corrupt: The metric of every pair with all edges and with none, [batch].
        n_runs: Sets that were run so far.
    """

    model: Any
    pairs: Pairs
    reads: Contrast
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    replacement: Replacement | str
    batch_size: int
    memory: int
    graph: EdgeGraph
    clean: np.ndarray = field(init=False)
    corrupt: np.ndarray = field(init=False)
    n_runs: int = 0
    bar: Any = None
    _kept: list[tuple[PairedRuns, Callable[[Tensor], Tensor]]] | None = None
    _mean: Replaced | None = None

    @staticmethod
    def of(
        model: Any, pairs: Pairs, *, metric: Metric = "logit_diff", replacement: Replacement | str = "resample", batch_size: int = 8, memory: int = MEMORY,
        progress: bool = False,
    ) -> CircuitRuns:  # fmt: skip
        """The pairs that the metric can score.

        Raises:
            OptionError: an unknown metric or replacement.
            EpisodeError: no pair can be scored.
            UnsupportedModelError: the model has no graph of edges.
        """
        check_replacement(replacement)
        if batch_size < 1 or memory < 1:
            raise OptionError(f"batch_size and memory must be at least 1; got {batch_size} and {memory}. Choose pairs at once, and bytes.")
        graph = EdgeGraph.of(model)
        reads, rows, skipped, notes = contrast(metric, pairs.clean, pairs.corrupt)
        if len(rows) < pairs.n:
            pairs = Pairs(pairs.clean.select(rows), pairs.corrupt.select(rows), pairs.how, pairs.skipped)
        runs = CircuitRuns(model, pairs, reads, (*pairs.skipped, *skipped), tuple(notes), replacement, batch_size, memory, graph)
        runs.bar = progress_bar(None, total=0, what="sets of edges", show=progress)
        return runs._ends()

    def take(self, rows: Sequence[int]) -> CircuitRuns:
        """Some of the pairs."""
        pairs = Pairs(self.pairs.clean.select(rows), self.pairs.corrupt.select(rows), self.pairs.how, ())
        reads = self.reads.take(rows)
        runs = CircuitRuns(
            self.model, pairs, reads, self.skipped, self.notes, self.replacement, self.batch_size, self.memory, self.graph, bar=self.bar
        )
        return runs._ends()

    @property
    def n(self) -> int:
        """Pairs."""
        return self.pairs.n

    @property
    def gap(self) -> np.ndarray:
        """Clean minus corrupt, [batch]."""
        return self.clean - self.corrupt

    def values(self, masks: np.ndarray) -> np.ndarray:
        """The metric of every set and pair, [set, batch].

        Args:
            masks: Sets of edges [set, receiver, sender].
        """
        found = [run_sets(part, masks, reduce=reduce, memory=self.memory) for part, reduce in self._parts()]
        self.n_runs += len(masks)
        self.bar.update(len(masks))
        return torch.cat(found, 1).double().cpu().numpy()

    def faithfulness(self, masks: np.ndarray) -> np.ndarray:
        """Of every set, [set]: ratio of means over pairs."""
        return (self.values(masks) - self.corrupt).mean(1) / self.gap.mean()

    def estimate(self, values: np.ndarray, start: np.ndarray | None = None, *, seed: int = 0) -> Estimate:
        """`values` [batch] minus `start` (the corrupt run unless given) as a share of the gap, with its interval over pairs."""
        above = values - (self.corrupt if start is None else start)
        low, high = ratio_interval(above, self.gap, seed=seed)
        value = above.mean() / self.gap.mean() if self.gap.mean() else np.nan
        return Estimate(float(value), float(low), float(high), self.n, UNIT, "bootstrap 95 %")

    def _ends(self) -> CircuitRuns:
        masks = np.stack([self.graph.possible, np.zeros_like(self.graph.possible)])
        self.clean, self.corrupt = self.values(masks)
        if not np.abs(self.gap).max() > 0:
            raise OptionError(
                "clean and corrupt runs must differ in the metric; they are equal in every pair, so there is nothing to explain. Corrupt more, or choose another metric."
            )
        return self

    def _parts(self) -> Iterator[tuple[PairedRuns, Callable[[Tensor], Tensor]]]:
        if self._kept is not None:
            yield from self._kept
            return
        kept, size = [], 0
        for rows in self._rows():
            part = self._part(rows)
            yield part
            size += part[0].bytes
            if size <= KEEP:
                kept.append(part)
        if size <= KEEP:
            self._kept = kept

    def _rows(self) -> list[range]:
        step = max(1, self.batch_size // self.reads.blocks)
        return [range(start, min(start + step, self.n)) for start in range(0, self.n, step)]

    def _batches(self, rows: range) -> tuple[Batch, Batch, Batch, Contrast]:
        """Clean prompts, both sides widened by the labels that are scored, and what is read."""
        clean, corrupt = (batch if len(rows) == self.n else batch.select(rows) for batch in (self.pairs.clean, self.pairs.corrupt))
        reads = self.reads.take(rows)
        return clean, reads.widen(clean), reads.widen(corrupt), reads

    def _part(self, rows: range) -> tuple[PairedRuns, Callable[[Tensor], Tensor]]:
        clean, one, other, reads = self._batches(rows)
        if self.replacement == "mean" and self._mean is None:
            self._mean = mean_runs(self.model, (self._batches(some)[2] for some in self._rows()))
        runs = paired_runs(self.model, one, other, reads.positions(one), mean=self._mean)
        return runs, reducer(reads, self.model, clean)


def reducer(reads: Contrast, model: Any, clean: Batch) -> Callable[[Tensor], Tensor]:
    """From logits [set, batch of the widened prompts, k, vocab] to the metric [set, batch]."""
    if reads.metric == "logit_diff":
        width = 1 + max(len(foils) for foils in reads.foils)
        tokens, weights = torch.zeros(clean.n, width, dtype=torch.long), torch.zeros(clean.n, width)
        for i, (answer, foils) in enumerate(zip(reads.answers, reads.foils, strict=True)):
            tokens[i, : 1 + len(foils)] = torch.tensor([answer[0], *(ids[0] for ids in foils)])
            weights[i, 0], weights[i, 1 : 1 + len(foils)] = 1.0, -1.0 / len(foils)

        def difference(logits: Tensor) -> Tensor:
            last = logits[:, :, 0].float()
            index = tokens.to(last.device).expand(len(last), -1, -1)
            return (last.gather(-1, index) * weights.to(last.device)).sum(-1)

        return difference

    def again() -> Tensor:
        with torch.no_grad():
            return model(clean)

    read = reads.reader(clean, again)
    return lambda logits: torch.stack([torch.as_tensor(read(one)) for one in logits])
