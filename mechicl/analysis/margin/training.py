"""Contrastive margins through training: the same heads on the same episodes at every checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from mechicl.analysis.feed import Data
from mechicl.analysis.margin.contrast import BASELINE, contrast_margin
from mechicl.analysis.margin.read import READ, Part
from mechicl.analysis.statistics import wilson
from mechicl.errors import HeadIndexError, OptionError
from mechicl.results import ContrastMargin, Head, Series


@dataclass(frozen=True)
class _Measure:
    """One line of a series."""

    name: str
    value: float
    low: float
    high: float


def margin_series(
    models: Iterable[tuple[int, Any]], data: Data, heads: Mapping[Part | str, Sequence[Head]], *, task: str = "", **options: Any
) -> tuple[Series, Series]:
    """Margins through training: the same heads on the same episodes, at every checkpoint.

    Args:
        models: (step, model), e.g. `((step, load_toy(folder, step)) for step in steps)`; one model is held at a time.
        data: The episodes, the same at every step. A Batch must fit all models.
        heads: For each part the heads to follow (key/value heads for "k" and "v"; "attention" is allowed).
        task: For the record.
        options: Of `contrast_margin`.

    Returns:
        Margins (in each part's own unit), and AUROCs with the accuracy ("accuracy", of each step). Names are "k 1.0": part, layer, head.

    Raises:
        OptionError: no model, no head, or a part that does not exist.
        HeadIndexError: a head that the model does not have.
    """
    wanted = cast(list[Part], [part for part in heads if part != BASELINE])
    if not any(len(chosen) for chosen in heads.values()) or any(part not in READ for part in wanted):
        raise OptionError(
            f"heads must name heads of parts among {', '.join((*READ, BASELINE))}; got {dict(heads)}. E.g. {{'qk': [(1, 0)]}}."
        )
    steps: list[int] = []
    rows: list[tuple[list[_Measure], list[_Measure]]] = []
    last: ContrastMargin | None = None
    for step, model in models:
        options = {"progress": False, **options}
        last = contrast_margin(model, data, parts=wanted or ("qk",), task=task, **options)
        steps.append(int(step))
        rows.append(_step(last, heads))
    if last is None:
        raise OptionError("models must give at least one (step, model); got none. Name the steps of a run.")
    order = np.argsort(steps, kind="stable")
    found = []
    for which, unit in ((0, "each part's own"), (1, "area")):
        names = [one.name for one in rows[0][which]]
        table = {
            f: {name: np.array([getattr(rows[i][which][j], f) for i in order]) for j, name in enumerate(names)}
            for f in ("value", "low", "high")
        }
        found.append(Series(np.array(steps)[order], table["value"], table["low"], table["high"], unit, last.n, last.provenance))
    return found[0], found[1]


def _step(margin: ContrastMargin, heads: Mapping[Any, Sequence[Head]]) -> tuple[list[_Measure], list[_Measure]]:
    """Margins and AUROCs of one checkpoint."""
    values, tells = [], []
    for part, chosen in heads.items():
        one = margin[part]
        for layer, head in chosen:
            if not (0 <= layer < one.value.shape[0] and 0 <= head < one.value.shape[1]):
                raise HeadIndexError(
                    f"head of part {part!r} must be inside {one.value.shape[0]} layers of {one.value.shape[1]}; got ({layer}, {head}). Both count from 0."
                )
            name, cell = f"{part} {layer}.{head}", (layer, head)
            values.append(_Measure(name, one.value[cell], one.low[cell], one.high[cell]))
            tells.append(_Measure(name, one.auroc[cell], one.auroc_low[cell], one.auroc_high[cell]))
    right = wilson(margin.correct)
    return values, [*tells, _Measure("accuracy", right.value, right.low, right.high)]
