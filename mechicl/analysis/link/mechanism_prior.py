"""`link_priors`: the link against the prior in several models, on the same queries: before and after a fine-tuning, over shots, and which names still win."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mechicl.analysis.feed import progress_bar
from mechicl.analysis.guarded import guarded
from mechicl.analysis.link.mechanism_compare import check_given, load_given
from mechicl.analysis.link.rename import Names, link_or_prior
from mechicl.analysis.statistics import holm, mean_estimate, paired_change, wilson
from mechicl.errors import OptionError
from mechicl.prompts.episode import Episode
from mechicl.results import LinkPrior, LinkPriors, PriorShift
from mechicl.results.link import LinkPriorRow


@guarded
def link_priors(
    models: Mapping[str, Any],
    episodes: Sequence[Episode],
    *,
    how: Names = "swap",
    names: Sequence[str] = (),
    shots: Sequence[int] = (0, 1, 2, 4),
    generate: bool = False,
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> LinkPriors:
    """Known things under other names, asked of several models: how strong is the link against the prior, and what has a fine-tuning changed?

    Args:
        models: By name, the one to compare with first (the base): loaded, or whatever `mechicl.load` takes. Loaded one at a time.
        episodes: Their labels are names that the first model knows; see `link_or_prior`.
        how, names, shots, generate, seed, batch_size, task, progress: See `link_or_prior`.
        out: A folder with one folder of kept answers for each model.

    Returns:
        LinkPriors, on the queries that every model could be asked.

    Raises:
        OptionError: no models, or names that cannot be folders.
        CheckpointError, UnsupportedModelError: a model that is named and cannot be loaded; all are looked up before the first is asked.
        EpisodeError: see `link_or_prior`.
    """
    if not models or any(not name.strip() or Path(name).name != name for name in models):
        raise OptionError(f"models must be given by names without slashes; got {list(models)}. E.g. {{'base': ..., '2-way': ...}}.")
    for given in models.values():
        check_given(given)
    results: dict[str, LinkPrior] = {}
    for name, given in progress_bar(models.items(), total=len(models), what="models", show=progress):
        results[name] = link_or_prior(
            load_given(given, progress=progress), episodes, how=how, names=names, shots=shots, generate=generate, out=None if out is None else Path(out) / name, seed=seed,
            batch_size=batch_size, task=task, progress=False,
        )  # fmt: skip
    common = [one for one in next(iter(results.values())).episode_ids if all(one in r.episode_ids for r in results.values())]
    if not common:
        raise OptionError("models must share queries that all can be asked; none is left. Ask for models with the same tokens.")
    first = next(iter(results))
    rows: list[PriorShift] = []
    for name, result in results.items():
        rows += _rows(name, result, None if name == first else results[first], common, seed)
    notes = tuple(f"{name}: {note}" for name, result in results.items() for note in result.notes)
    return LinkPriors(
        rows=tuple(rows), results=results, n=len(common), stubborn={name: _stubborn(r, common) for name, r in results.items()}, notes=notes
    )


def _rows(name: str, result: LinkPrior, base: LinkPrior | None, common: Sequence[str], seed: int) -> list[PriorShift]:
    """One model's rows under new names."""
    mine = [result.episode_ids.index(one) for one in common]
    found, p = [], []
    for row in renamed(result):
        now, chosen = row.preferences[mine], [row.chosen[i] for i in mine]
        change = None
        if base is not None:
            theirs = [base.episode_ids.index(one) for one in common]
            before = next(one for one in renamed(base) if one.shots == row.shots).preferences[theirs]
            change = paired_change(before, now, unit="nats", seed=seed)
        found.append(
            (
                row.shots,
                mean_estimate(now, unit="nats", seed=seed),
                *(wilson([c == kind for c in chosen]) for kind in ("link", "prior")),
                change,
            )
        )
        p.append(row.p)
    return [PriorShift(name, *parts, p=float(q)) for parts, q in zip(found, holm(p), strict=True)]


def renamed(result: LinkPrior) -> list[LinkPriorRow]:
    """The rows under new names, by shots."""
    return [row for row in result.rows if row.names == "renamed"]


def _stubborn(result: LinkPrior, common: Sequence[str]) -> dict[str, float]:
    """Known names that win at the most shots, the most stubborn first: where the prior wins."""
    last = renamed(result)[-1]
    hits: dict[str, list[bool]] = {}
    for one in common:
        i = result.episode_ids.index(one)
        hits.setdefault(result.priors[i], []).append(last.chosen[i] == "prior")
    shares = {name: float(np.mean(some)) for name, some in hits.items()}
    return dict(sorted(((name, share) for name, share in shares.items() if share > 0), key=lambda pair: -pair[1]))
