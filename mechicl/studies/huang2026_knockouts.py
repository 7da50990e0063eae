"""The knock-outs of Huang et al. 2026, and what they lack: matched random heads, zero-shot, permuted labels, whole labels, dose curves, intervals.

Every set of heads answers the same episodes. A batch of episodes is one line of the study's folder: all sets, the question without its examples, and
with its labels permuted; a study that is killed goes on with the next batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mechicl.analysis.ablation.switches import Switches
from mechicl.analysis.feed import check_data, ids_of, progress_bar, provenance, rehearse
from mechicl.analysis.icl import mark, usable
from mechicl.analysis.labels import Answers, Key, answer
from mechicl.analysis.statistics import mcnemar_p, mean_estimate, paired_change, permutation_p
from mechicl.prompts.corrupt import permute_labels
from mechicl.prompts.episode import Episode
from mechicl.results import DoseCurve, Estimate, ICLAccuracy, KnockOutRow, KnockOuts
from mechicl.studies.huang2026_heads import spellings
from mechicl.studies.huang2026_sets import Plan, Set, key
from mechicl.studies.keep import Memory, StudyFolder

INTACT, ZERO_SHOT, PERMUTED = "intact", "zero-shot", "labels permuted"
TOLERANCE = 1e-9


def knock_out(
    model: Any,
    episodes: Sequence[Episode],
    plan: Plan,
    *,
    folder: StudyFolder | Memory,
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> tuple[KnockOuts, dict[str, DoseCurve]]:
    """Switch off every set of the plan on the same episodes, by zeroing the head's slice of o_proj's input at all positions, and mark the answers.

    Args:
        model: Anything with the surface of `HookedModel`.
        episodes: Episodes that did not serve to find the heads.
        plan: From `plan_sets`.
        folder: Keeps finished batches.
        seed: Decides ties and resampling.
        batch_size: Prompts per forward pass.
        task: What the episodes are, for the record.
        progress: Show a bar.

    Returns:
        The table, and a dose curve for each ranking and way of counting ("PH, first token", "PH, whole label").

    Raises:
        EpisodeError: no episodes, no shots, one class only.
        CheckpointError: the folder's batches are of other sets.

    Source:
        Huang et al. 2026. Differs: whole labels beside first tokens, random heads, controls, intervals.
    """
    check_data(episodes, batch_size)
    rehearse(model, episodes)
    names, sets = ids_of(episodes), plan.sets
    kept: dict[int, Mapping[str, Any]] = {}

    def take(line: dict[str, Any]) -> None:
        if line["sets"] != digest(sets):
            raise ValueError("it is of other sets of heads")
        kept[int(line["at"])] = line

    folder.read_lines(take)
    starts = range(0, len(episodes), batch_size)
    bar = progress_bar(None, total=len(starts), what=f"{len(sets)} sets of heads off", show=progress)
    bar.update(len(kept))
    for at in starts:
        if at not in kept:
            line = _batch(model, list(episodes[at : at + batch_size]), sets, at, seed, batch_size)
            folder.add_line(line)
            kept[at] = line
            bar.update(1)
    bar.close()
    marked, skipped = _mark(
        [kept[at] for at in starts], names, len(sets), seed, provenance(model, task=task, seed=seed, options={"how": "zero"})
    )
    return _table(plan, marked, skipped, seed), _doses(plan, marked)


def digest(sets: Sequence[Set]) -> str:
    """A short name of the sets that ran."""
    import hashlib

    return hashlib.sha256(repr(tuple(sets)).encode()).hexdigest()[:16]


def _batch(model: Any, episodes: list[Episode], sets: Sequence[Set], at: int, seed: int, batch_size: int) -> dict[str, Any]:
    """All answers on a batch of episodes, as a line."""
    names = [episode.id or str(at + k) for k, episode in enumerate(episodes)]
    switches = Switches.build(model, episodes, sets, "zero", seed=seed, batch_size=batch_size)
    found, keys, reasons = answer(model, episodes, switches=switches, batch_size=batch_size, names=names)
    bare, *_ = answer(model, [episode.without_shots() for episode in episodes], batch_size=batch_size, names=names)
    permuted = [permute_labels(episode, seed=seed + at + k) for k, episode in enumerate(episodes)]
    mixed, *_ = answer(model, permuted, batch_size=batch_size, names=names)
    return {
        "at": at, "sets": digest(sets), "answers": [_listed(one) for one in (*found, bare[0], mixed[0])], "reasons": reasons,
        "key": {"answers": keys.answers.tolist(), "candidates": keys.candidates, "first_tokens": keys.first_tokens,
                "context_tokens": [sorted(some) for some in _context(model, episodes, keys)]},
    }  # fmt: skip


def _context(model: Any, episodes: Sequence[Episode], keys: Key) -> list[set[int]]:
    """First tokens of the context's labels, behind a space too: CLA as the released script counts it."""
    tokenizer = getattr(getattr(model, "renderer", None), "tokenizer", None)
    found = [set(some) for some in keys.context_tokens]
    if tokenizer is not None:
        for some, episode in zip(found, episodes, strict=True):
            some |= {tokens[0] for label in {s.label for s in episode.shots} for tokens in spellings(tokenizer, label)}
    return found


def _listed(one: Answers) -> dict[str, Any]:
    return {"total": one.total.tolist(), "first": one.first.tolist(), "greedy": one.greedy.tolist()}


def _read(one: Mapping[str, Any]) -> Answers:
    total = np.array(one["total"], dtype=np.float64)
    return Answers(total, total, np.array(one["first"], dtype=np.float64), np.array(one["greedy"], dtype=np.int64))


def _mark(
    lines: Sequence[Mapping[str, Any]], names: list[str], n_sets: int, seed: int, made: Any
) -> tuple[list[ICLAccuracy], tuple[Any, ...]]:
    """Every set's answers marked, then zero-shot and permuted labels; and what could not be scored."""
    keys = Key.join(
        [
            Key(
                np.array(line["key"]["answers"]), tuple(map(tuple, line["key"]["candidates"])), tuple(map(tuple, line["key"]["first_tokens"])),
                tuple(frozenset(some) for some in line["key"]["context_tokens"]),
            )
            for line in lines
        ]
    )  # fmt: skip
    kept, skipped = usable(names, [reason for line in lines for reason in line["reasons"]])
    every = [Answers.join([_read(line["answers"][k]) for line in lines]) for k in range(n_sets + 2)]
    return [mark(one, keys, names, kept, skipped, score="full", seed=seed, zero_shot=None, notes=[], made=made) for one in every], skipped


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
