"""`head_effects`: what every head is worth by itself, whatever it looks at."""

from __future__ import annotations

from typing import Any

import numpy as np

from mechicl.analysis.ablation.ablate import How, ablate
from mechicl.analysis.feed import Data
from mechicl.analysis.guarded import guarded
from mechicl.analysis.icl import icl_accuracy
from mechicl.analysis.statistics import bootstrap_interval, gain_p, holm
from mechicl.results import Score

NAME = "margin_lost"


@guarded
def head_effects(
    model: Any,
    data: Data,
    *,
    how: How = "mean",
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> Score:
    """The margin that is lost when a head is switched off alone, for every head: attention-free evidence of who matters.

    A head with a redundant twin loses little here: read it beside the ablation of sets.

    Args:
        model: A `HookedVLM`, or anything with the surface of `HookedModel`.
        data: A Batch or episodes.
        how: As in `ablate`.
        seed: Of the intervals.
        batch_size: Prompts per forward pass.
        task: For the record.
        progress: Show a bar.

    Returns:
        A Score in nats: margin intact minus margin with the head off, mean over prompts. Null: no loss; p one-sided, Student's paired test, Holm-corrected.
    """
    common: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "task": task, "progress": progress}
    intact = icl_accuracy(model, data, zero_shot=False, **common)
    closed = getattr(model, "unavailable", {})
    shape = (model.cfg.n_layers, model.cfg.n_heads)
    heads = [(layer, head) for layer, head in np.ndindex(*shape) if f"blocks.{layer}.attn.hook_z" not in closed]
    result = ablate(model, data, heads, how, n_random=0, intact=intact, **common)
    lost = np.full((intact.n, *shape), np.nan)
    for cell in result.singles:
        lost[:, cell.heads[0][0], cell.heads[0][1]] = intact.margins - cell.margins
    low, high = bootstrap_interval(lost, seed=seed)
    p, bound = gain_p(lost)
    return Score(
        name=NAME, description="margin of the right label that is lost when the head is switched off alone", unit="nats", value=lost.mean(0), low=low, high=high,
        null=np.where(np.isnan(p), np.nan, 0.0), null_high=bound, p=p, p_corrected=holm(p), per_episode=lost, source="ours", null_name="no loss, paired over prompts",
    )  # fmt: skip
