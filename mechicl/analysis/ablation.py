"""`ablate` and `dose_curve`: are the heads needed, or does switching off any heads do as much harm?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
from torch import Tensor

from mechicl.analysis.answers import Prepared, Score, prepare, score_answers
from mechicl.analysis.feed import Data, check_data, progress_bar, provenance
from mechicl.analysis.icl import check_score, icl_accuracy, judge_answers
from mechicl.analysis.statistics import mcnemar_p, mean_estimate, paired_change, wilson
from mechicl.analysis.switches import How, matched_random, mean_outputs, switched_off, z_name
from mechicl.errors import HeadIndexError, OptionError
from mechicl.models.hooked import check_heads
from mechicl.results import Ablation, AblationCell, DoseCurve, Estimate, Head, HeadScores, ICLAccuracy

__all__ = ["ALPHA", "How", "ablate", "dose_curve", "judge", "needed"]

ALPHA = 0.05


def ablate(
    model: Any,
    data: Data,
    heads: Sequence[Head],
    how: How = "zero",
    *,
    singles: bool = True,
    n_random: int = 20,
    intact: ICLAccuracy | None = None,
    score: Score = "label",
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> Ablation:
    """Switch heads off together and one by one, beside matched random heads, on the same episodes.

    Args:
        model: A `HookedVLM`, or anything with the surface of `HookedModel`.
        data: A Batch or episodes; others than those the heads were found on.
        heads: (layer, head) pairs, both from 0.
        how: "zero", "mean" or "resample"; see `mechicl.analysis.switches.How`. At all positions.
        singles: Also each head alone.
        n_random: Draws of as many random heads; at least 19 for p_random to be able to reach 0.05.
        intact: The accuracy of the intact model on these episodes, if you have it.
        score: How answers are scored; see `icl_accuracy`.
        seed: Of random heads and intervals.
        batch_size: Prompts per forward pass.
        task: For the record.
        progress: Show a bar.

    Returns:
        Ablation, with a verdict that tells redundant heads from irrelevant ones.

    Raises:
        HeadIndexError: a head that the model does not have, or none given.
        OptionError: an unknown `how` or `score`, or `intact` of other episodes.
    """
    check_data(data, batch_size)
    check_score(score)
    wanted = _check(model, heads, how, n_random)
    prepared = prepare(model, data, batch_size=batch_size)
    if intact is None:
        intact = icl_accuracy(model, data, score=score, seed=seed, batch_size=batch_size, task=task, progress=progress)
    trial = Trial(model, prepared, intact, how, score, seed, 4 * batch_size)
    sets, note = matched_random(model.cfg.n_layers, model.cfg.n_heads, wanted, n_random, seed=seed, closed=trial.closed)
    alone = [(head,) for head in wanted] if singles and len(wanted) > 1 else []
    cells = [
        trial.cell(chosen)
        for chosen in progress_bar([tuple(wanted), *alone, *sets], total=1 + len(alone) + len(sets), what="ablation", show=progress)
    ]
    chosen, one_by_one, random = cells[0], tuple(cells[1 : 1 + len(alone)]), tuple(cells[1 + len(alone) :])
    p_random = _p_random(chosen, random)
    return Ablation(
        how=how, intact=intact, chosen=chosen, singles=one_by_one, random=random, random_mean=_random_mean(random, seed), p_random=p_random,
        zero_shot=intact.zero_shot, match_note=note, verdict=judge(chosen, one_by_one, p_random)[1], n=prepared.n,
        provenance=provenance(model, task=task, seed=seed, options={"how": how, "score": score, "n_random": len(random), "batch_size": batch_size}),
    )  # fmt: skip


def dose_curve(
    model: Any,
    data: Data,
    ranking: HeadScores | Sequence[Head],
    *,
    by: str = "induction",
    ks: Sequence[int] | None = None,
    how: How = "zero",
    n_draws: int = 10,
    intact: ICLAccuracy | None = None,
    score: Score = "label",
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> DoseCurve:
    """Accuracy with the best 0, 1, 2, ... heads off, with a band of matched random sets of each size.

    Args:
        model: A `HookedVLM`, or anything with the surface of `HookedModel`.
        data: Other episodes than those the ranking comes from.
        ranking: Heads, best first, or scores to rank by.
        by: Which score ranks, when scores are given.
        ks: How many heads off; default 0, 1, ... up to 8, a third of all heads at most.
        how: As in `ablate`.
        n_draws: Random sets of each size.
        intact, score, seed, batch_size, task, progress: As in `ablate`.

    Raises:
        HeadIndexError, OptionError: as in `ablate`, or a k beyond the ranking.
    """
    check_data(data, batch_size)
    check_score(score)
    n_all = model.cfg.n_layers * model.cfg.n_heads
    if isinstance(ranking, HeadScores):
        if by not in ranking.scores:
            raise OptionError(f"by must be one of the scores {', '.join(ranking.scores)}; got {by!r}. Score the heads by it first.")
        order = ranking.top(by, n_all)
    else:
        order, by = list(ranking), "the order given"
    ranked = _check(model, order, how, n_draws)
    steps = list(range(min(8, max(1, n_all // 3), len(ranked)) + 1)) if ks is None else [int(k) for k in ks]
    if not steps or min(steps) < 0 or max(steps) > len(ranked):
        raise OptionError(f"ks must be numbers of heads in 0..{len(ranked)}; got {list(ks or [])}. Rank more heads, or ask for fewer.")
    prepared = prepare(model, data, batch_size=batch_size)
    if intact is None:
        intact = icl_accuracy(model, data, zero_shot=False, score=score, seed=seed, batch_size=batch_size, task=task, progress=progress)
    trial = Trial(model, prepared, intact, how, score, seed, 4 * batch_size)
    accuracy: list[Estimate] = []
    margin: list[Estimate] = []
    band = np.full((3, len(steps)), np.nan)
    for i, k in enumerate(progress_bar(steps, total=len(steps), what="dose curve", show=progress)):
        cell = trial.cell(tuple(ranked[:k]))
        accuracy.append(cell.accuracy)
        margin.append(mean_estimate(cell.margins, unit="nats", seed=seed))
        sets, _ = matched_random(model.cfg.n_layers, model.cfg.n_heads, ranked[:k], n_draws, seed=seed + k, closed=trial.closed)
        drawn = [trial.cell(s).accuracy.value for s in sets] if k else [cell.accuracy.value]
        if drawn:
            band[:, i] = [np.mean(drawn), *np.quantile(drawn, [0.025, 0.975])]
    return DoseCurve(
        ranking=tuple(ranked[: max(steps)]), ranked_by=by, ks=np.array(steps), accuracy=tuple(accuracy), margin=tuple(margin),
        random_mean=band[0], random_low=band[1], random_high=band[2], n_draws=n_draws, chance=intact.chance, how=how, n=prepared.n,
        provenance=provenance(model, task=task, seed=seed, options={"how": how, "score": score, "n_draws": n_draws, "by": by}),
    )  # fmt: skip


def _check(model: Any, heads: Sequence[Head], how: str, n_random: int) -> list[Head]:
    if how not in get_args(How):
        raise OptionError(f'how must be "zero", "mean" or "resample"; got {how!r}. "mean" disturbs the rest of the model least.')
    if n_random < 0:
        raise OptionError(f"the number of random draws must not be negative; got {n_random}. 20 lets the control reach p = 0.05.")
    checked = list(dict.fromkeys(check_heads(model, heads)))
    if not checked:
        raise HeadIndexError("heads must be at least one (layer, head) pair; got none. Take some from scores.top('induction', 4).")
    return checked


@dataclass(eq=False)
class Trial:
    """One set of episodes on which heads are switched off again and again; the same set is never run twice."""

    model: Any
    prepared: Prepared
    intact: ICLAccuracy
    how: How
    score: Score
    seed: int
    rows: int
    known: dict[tuple[Head, ...], AblationCell] = field(default_factory=dict)
    means: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if tuple(self.intact.episode_ids) != tuple(self.prepared.ids):
            raise OptionError(
                "intact must be the accuracy on these very episodes; got that of others. Leave it out, or pass the same data."
            )

    @property
    def closed(self) -> list[int]:
        """Layers whose heads cannot be switched off."""
        return [layer for layer in range(self.model.cfg.n_layers) if z_name(layer) in getattr(self.model, "unavailable", {})]

    def cell(self, heads: tuple[Head, ...]) -> AblationCell:
        """These heads off."""
        key = tuple(sorted(heads))
        if key not in self.known:
            self.known[key] = self._run(heads)
        return self.known[key]

    def _run(self, heads: tuple[Head, ...]) -> AblationCell:
        layers = {layer for layer, _ in heads}
        if self.how == "mean" and (new := sorted(layers - set(self.means))):
            self.means |= mean_outputs(self.model, self.prepared, new)
        if heads:
            call = switched_off(self.model, heads, self.how, self.means)
            answers = score_answers(call, self.prepared, score=self.score, rows=self.rows)
            correct, margins, _ = judge_answers(answers, self.prepared.answers, self.score)
        else:
            correct, margins = self.intact.correct, self.intact.margins
        before, before_margins = self.intact.correct, self.intact.margins
        return AblationCell(
            heads=heads, accuracy=wilson(correct), change=paired_change(before, correct, unit="probability", seed=self.seed),
            margin_change=paired_change(before_margins, margins, unit="nats", seed=self.seed), mcnemar_p=mcnemar_p(before, correct),
            correct=correct, margins=margins, name=", ".join(f"{layer}.{head}" for layer, head in heads),
        )  # fmt: skip


def _p_random(chosen: AblationCell, random: Sequence[AblationCell]) -> float:
    """Share of random sets that cost at least as much, counting the chosen one (so never zero); NaN without draws."""
    if not random:
        return float("nan")
    worse = sum(cell.accuracy.value <= chosen.accuracy.value for cell in random)
    return (1 + worse) / (1 + len(random))


def _random_mean(random: Sequence[AblationCell], seed: int) -> Estimate:
    """Accuracy of the random sets, averaged over draws; interval over episodes."""
    if not random:
        return Estimate(np.nan, np.nan, np.nan, 0)
    return mean_estimate(np.mean([cell.correct for cell in random], 0), unit="probability", seed=seed)


def needed(change: Estimate, mcnemar: float) -> bool:
    """Accuracy falls, by the paired interval and by the exact test of the answers that changed."""
    return bool(change.high < 0 and mcnemar < ALPHA)


def judge(chosen: AblationCell, singles: Sequence[AblationCell], p_random: float) -> tuple[str, str]:
    """What may be claimed of a set of heads: the finding of `HeadSet`, and a sentence.

    Redundancy and irrelevance look the same one head at a time; the set tells them apart.
    """
    several = len(chosen.heads) > 1
    what = "the set" if several else "the head"
    if not needed(chosen.change, chosen.mcnemar_p):
        return "irrelevant", f"Accuracy does not fall without {what}: for this task it is not needed, whatever it looks at."
    if np.isnan(p_random):
        return "necessary", f"Accuracy falls without {what}, but there is no random control to compare it with."
    if p_random >= ALPHA:
        return (
            "irrelevant",
            f"Accuracy falls without {what}, but as many random heads can cost as much (p = {p_random:.2g}): not shown to be specific.",
        )
    alone = [c.heads[0] for c in singles if needed(c.change, c.mcnemar_p)]
    names = ", ".join(f"{layer}.{head}" for layer, head in alone)
    if not several:
        return "necessary", "The head is needed, and random heads are not."
    if not singles:
        return "necessary", "The set is needed, and random heads are not; its heads were not tried alone."
    if not alone:
        return "redundant", "The set is needed, and random heads are not; each of its heads alone can be spared: redundant, not irrelevant."
    return "necessary", f"The set is needed, and random heads are not; alone, {names} {'is' if len(alone) == 1 else 'are'} already needed."
