"""The knock-outs of Huang et al. 2026, and what they lack: matched random heads, zero-shot, permuted labels, whole labels, dose curves, intervals.

Every set of heads answers the same episodes; so do the question without its examples, and with its labels permuted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mechicl.analysis.ablation.switches import Switches
from mechicl.analysis.feed import check_data, ids_of, provenance, rehearse
from mechicl.analysis.guarded import noted
from mechicl.analysis.heads.published import spellings
from mechicl.analysis.icl import mark, usable
from mechicl.analysis.labels import Key, answer
from mechicl.analysis.statistics import mcnemar_p, mean_estimate, paired_change, permutation_p
from mechicl.prompts.corrupt import permute_labels
from mechicl.prompts.episode import Episode
from mechicl.results import DoseCurve, Estimate, ICLAccuracy, KnockOutRow, KnockOuts
from mechicl.studies.huang2026_sets import Plan, Set, key

INTACT, ZERO_SHOT, PERMUTED = "intact", "zero-shot", "labels permuted"
TOLERANCE = 1e-9


def knock_out(
    model: Any,
    episodes: Sequence[Episode],
    plan: Plan,
    *,
    tokenizer: Any = None,
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> tuple[KnockOuts, dict[str, DoseCurve]]:
    """Switch off every set of the plan on the same episodes, by zeroing the head's slice of o_proj's input at all positions, and mark the answers.

    Args:
        model: Anything with the surface of `HookedModel`, or a crew (`mechicl.analysis.spread`), whose folder keeps finished shards.
        episodes: Episodes that did not serve to find the heads.
        plan: From `plan_sets`.
        tokenizer: The model's, where a crew stands in for it: CLA looks for labels behind a space, too.
        seed: Decides ties and resampling.
        batch_size: Prompts per forward pass.
        task: What the episodes are, for the record.
        progress: Show bars.

    Returns:
        The table, and a dose curve for each ranking and way of counting ("PH, first token", "PH, whole label").

    Raises:
        EpisodeError: no episodes, no shots, one class only.

    Source:
        Huang et al. 2026. Differs: whole labels beside first tokens, random heads, controls, intervals.
    """
    check_data(episodes, batch_size)
    rehearse(model, episodes)
    names, sets = ids_of(episodes), plan.sets
    common: dict[str, Any] = {"batch_size": batch_size, "names": names, "progress": progress}
    with noted(model) as notes:
        switches = Switches.build(model, episodes, sets, "zero", seed=seed, batch_size=batch_size)
        found, keys, reasons = answer(model, episodes, switches=switches, what=f"{len(sets)} sets of heads off", **common)
        bare, *_ = answer(model, [episode.without_shots() for episode in episodes], what="zero-shot control", **common)
        permuted = [permute_labels(episode, seed=seed + k) for k, episode in enumerate(episodes)]
        mixed, *_ = answer(model, permuted, what="labels permuted", **common)
    tokenizer = tokenizer or getattr(getattr(model, "renderer", None), "tokenizer", None)
    keys = replace(keys, context_tokens=_context(tokenizer, episodes, keys))
    kept, skipped = usable(names, reasons)
    made = provenance(model, task=task, seed=seed, options={"how": "zero"})
    marked = [
        mark(one, keys, names, kept, skipped, score="full", seed=seed, zero_shot=None, notes=[], made=made)
        for one in (*found, bare[0], mixed[0])
    ]
    table = _table(plan, marked, skipped, seed)
    return replace(table, notes=tuple(dict.fromkeys((*table.notes, *notes)))), _doses(plan, marked)


def _context(tokenizer: Any, episodes: Sequence[Episode], keys: Key) -> tuple[frozenset[int], ...]:
    """First tokens of the context's labels, behind a space too: CLA as the released script counts it."""
    if tokenizer is None:
        return keys.context_tokens
    more = [{tokens[0] for label in {s.label for s in episode.shots} for tokens in spellings(tokenizer, label)} for episode in episodes]
    return tuple(frozenset({*some, *others}) for some, others in zip(keys.context_tokens, more, strict=True))


def _table(plan: Plan, marked: Sequence[ICLAccuracy], skipped: tuple[Any, ...], seed: int) -> KnockOuts:
    where = {some: k for k, some in enumerate(plan.sets)}
    intact, zero, permuted = marked[0], marked[-2], marked[-1]
    rows = [_row(INTACT, "intact", "", (), intact, None, seed)]
    rows += [_row(name, "control", "", (), one, intact, seed) for name, one in ((ZERO_SHOT, zero), (PERMUTED, permuted))]
    for one in plan.chosen:
        off = marked[where[key(one.heads)]]
        row = _row(one.name, one.kind, one.rule, one.heads, off, intact, seed)
        rows.append(_beside(row, off, [marked[where[key(some)]] for some in one.draws], one.note, seed))
    notes = tuple(dict.fromkeys(intact.notes))
    whole = replace(intact, zero_shot=zero.accuracy)
    return KnockOuts(tuple(rows), whole, intact.chance, "zero", intact.n, skipped, intact.provenance, notes)


def _row(name: str, kind: Any, rule: str, heads: Set, one: ICLAccuracy, intact: ICLAccuracy | None, seed: int) -> KnockOutRow:
    if intact is None:
        return KnockOutRow(name, kind, rule, heads, one.open_accuracy, one.accuracy, one.cla)
    change, whole = (
        paired_change(before, after, unit="probability", seed=seed)
        for before, after in ((intact.open_correct, one.open_correct), (intact.correct, one.correct))
    )
    p = mcnemar_p(intact.open_correct, one.open_correct)
    return KnockOutRow(name, kind, rule, heads, one.open_accuracy, one.accuracy, one.cla, change, whole, p)


def _beside(row: KnockOutRow, off: ICLAccuracy, draws: Sequence[ICLAccuracy], note: str, seed: int) -> KnockOutRow:
    """The row with its random heads."""
    if not draws:
        return replace(row, note=note)
    found: dict[str, Any] = {}
    for short, full in (("open", "open_accuracy"), ("whole", "accuracy")):
        values = [getattr(draw, full).value for draw in draws]
        found[f"random_{short}"] = _over_draws(values, seed)
        worse = sum(value <= getattr(off, full).value + TOLERANCE for value in values)
        found[f"p_{short}"] = float(permutation_p(0.0, worse, len(values)))
    return replace(row, n_draws=len(draws), note=note, **found)


def _over_draws(values: Sequence[float], seed: int) -> Estimate:
    return mean_estimate(np.array(values), unit="probability", seed=seed)


def _doses(plan: Plan, marked: Sequence[ICLAccuracy]) -> dict[str, DoseCurve]:
    where = {some: k for k, some in enumerate(plan.sets)}
    intact = marked[0]
    found = {}
    for dose in plan.doses:
        for words, full in (("first token", "open_accuracy"), ("whole label", "accuracy")):
            points = [intact, *(marked[where[key(dose.ranking[:k])]] for k in dose.ks)]
            band = np.full((3, len(points)), math.nan)
            for i, k in enumerate(dose.ks):
                values = [getattr(marked[where[key(some)]], full).value for some in dose.draws[k]]
                if values:
                    band[:, i + 1] = np.quantile(values, 0.025), np.mean(values), np.quantile(values, 0.975)
            found[f"{dose.name}, {words}"] = DoseCurve(
                ranking=dose.ranking, ranked_by=f"{dose.name}, {words}", ks=np.array([0, *dose.ks]), accuracy=tuple(getattr(p, full) for p in points),
                margin=tuple(p.margin for p in points), random_low=band[0], random_mean=band[1], random_high=band[2], n_draws=dose.n_draws,
                chance=intact.chance, how="zero", n=intact.n, provenance=intact.provenance,
            )  # fmt: skip
    return found
