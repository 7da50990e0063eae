"""Head scores of Huang et al. 2026 as published (`mechicl.analysis.heads.published`), and ours beside them: ours take the labels' own spans, and contrast
right with wrong labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mechicl.analysis.feed import comparable
from mechicl.analysis.guarded import guarded
from mechicl.analysis.heads.published import published_scores
from mechicl.analysis.heads.scoring import score_heads
from mechicl.analysis.statistics import bootstrap_interval
from mechicl.prompts.episode import Episode
from mechicl.results import HeadScores, Score, Skipped

PH, IH = "ph_published", "ih_published"

OURS = ("previous_token", "induction", "induction_label", "induction_per_exemplar", "induction_paper", "ila", "tila", "tla")
"""Scores beside the published ones."""


@guarded
def rank_heads(
    model: Any,
    episodes: Sequence[Episode],
    *,
    n_null: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> HeadScores:
    """The published scores and ours in one result.

    Returns:
        HeadScores: "ph_published", "ih_published", "ph[picture rows]", ..., then `OURS`. The published IH has the null of "induction_paper" (labels
        shuffled), which is the same number wherever the answer stands in labels only; the published PH has no null: its text rows have ("previous_token").

    Raises:
        EpisodeError: as in `score_heads`.
    """
    kept, _ = comparable(episodes)
    ours = score_heads(model, episodes, scores=OURS, n_null=n_null, seed=seed, batch_size=batch_size, task=task, progress=progress)
    found = published_scores(model, [episodes[i] for i in kept], batch_size=batch_size, progress=progress)
    null = ours["induction_paper"]
    blank = np.full(null.value.shape, np.nan)
    scores: dict[str, Score] = {
        PH: _score("PH as published", "mean attention of each token to the one before it, the whole prompt, picture tokens included", found.ph, seed, (blank,) * 4, "none: see previous token"),
        IH: _score("IH as published", "the last token's mean attention to every token of the answer's occurrences, minus the mean to all other positions", found.ih, seed,
                   (null.null, null.null_high, null.p, null.p_corrected), null.null_name),
    }  # fmt: skip
    for reader, values in found.ph_by.items():
        name = f"ph[{reader}]"
        scores[name] = _score(name, f"mean attention of {reader.removesuffix(' rows')} tokens to the token before them", values, seed, (blank,) * 4, "none: see previous token")  # fmt: skip
    notes = list(ours.notes)
    if found.elsewhere:
        notes.append(
            f"In {found.elsewhere} of {len(kept)} prompts the search for the answer's tokens finds other places than its labels: the published IH counts these, ours does not."
        )
    skipped = [
        *ours.skipped,
        *(Skipped(name, "the answer's tokens are not in the prompt; the published IH leaves it out") for name in found.not_found),
    ]
    return replace(ours, scores=scores | dict(ours.scores), notes=tuple(notes), skipped=tuple(skipped))


def _score(name: str, what: str, per_episode: np.ndarray, seed: int, null: Sequence[np.ndarray], null_name: str) -> Score:
    low, high = bootstrap_interval(per_episode, seed=seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.nansum(per_episode, 0) / (~np.isnan(per_episode)).sum(0)
    mean, high_null, p, corrected = null
    return Score(
        name=name, description=what, unit="probability", value=value, low=low, high=high, null=mean, null_high=high_null, p=p, p_corrected=corrected,
        per_episode=per_episode, source="Huang et al. 2026, as released", null_name=null_name, lift=1.5,
    )  # fmt: skip
