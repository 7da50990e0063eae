"""`ablate` and `dose_curve`: heads switched off, beside the intact model, each head alone, and matched random heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mechicl.analysis.ablation.matched import matched_draws
from mechicl.analysis.ablation.switches import How, Switches, switchable
from mechicl.analysis.ablation.verdict import judge
from mechicl.analysis.ablation.verdict import name as head_name
from mechicl.analysis.feed import Data, check_data, ids_of, provenance, rehearse
from mechicl.analysis.guarded import guarded
from mechicl.analysis.icl import mark, usable, zero_shot_control
from mechicl.analysis.labels import LabelScore, answer, check_score
from mechicl.analysis.statistics import mcnemar_p, mean_estimate, paired_change, permutation_p
from mechicl.errors import HeadIndexError, OptionError
from mechicl.models.hooked import check_heads
from mechicl.results import Ablation, AblationCell, DoseCurve, Head, HeadScores, ICLAccuracy

TOLERANCE = 1e-9
"""Accuracies closer than this are equal."""


@guarded
def ablate(
    model: Any,
    data: Data,
    heads: Sequence[Head],
    how: How = "zero",
    *,
    singles: bool = True,
    n_random: int = 20,
    spare: Sequence[Head] = (),
    intact: ICLAccuracy | None = None,
    zero_shot: bool = True,
    reference: Data | None = None,
    score: LabelScore = "full",
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> Ablation:
    """Switch heads off, all together and one by one, and see what is lost; then the same with random heads.

    All runs answer the same episodes, so changes are paired. A random draw has as many heads, none of them chosen, from the same layers where these
    have heads left, else from the nearest (`match_note` says so).

    Args:
        model: A `HookedVLM`, or anything with the surface of `HookedModel`.
        data: A Batch, or episodes.
        heads: (layer, head) pairs, counted from 0.
        how: "zero", "mean" or "resample"; see `mechicl.analysis.ablation.switches.How`. Zero is the paper's; it takes away more than the head's message,
            because later layers never saw a zero, so compare with "mean" (the default of the command line and of `find_and_prove`).
        singles: Also each head alone: what tells redundancy from irrelevance.
        n_random: Draws of random heads; 19 or more for p = 0.05 (where so many exist).
        spare: Heads that random draws leave out too: other parts of the circuit, already known to matter.
        intact: The intact model's result on the same data, to save its run.
        reference: Where "mean" takes its means from; default the data themselves. Then each episode's own answer is a small part of the mean that takes
            the head's place: give other episodes where a trace of it could decide (a model whose logits would tie exactly).
        zero_shot: Run the zero-shot control, unless `intact` has it.
        score: What decides between candidates; see `icl_accuracy`.
        seed: Decides draws, ties, partners and resampling.
        batch_size: Prompts per forward pass; several sets of heads share one where they fit.
        task: What the data are, for the record.
        progress: Show a bar.

    Returns:
        Ablation, with a verdict in words.

    Raises:
        HeadIndexError: no heads, one twice, or one that the model does not have.
        OptionError: an option out of its range, or an `intact` of other episodes.
        EpisodeError: no data, no shots, one class only.

    Source:
        Huang et al. 2026 (knock-out by zeroing the head's slice of o_proj's input). Differs: full labels, random heads, singles, intervals.
    """
    chosen = _checked(model, data, heads, how, score, n_random, batch_size)
    drawn = matched_draws(chosen, _sizes(model), n_random, seed=seed, spare=check_heads(model, spare))
    alone = [(head,) for head in chosen] if singles and len(chosen) > 1 else []
    sets = [tuple(chosen), *alone, *drawn.sets]
    options = {
        "heads": [list(h) for h in chosen],
        "how": how,
        "singles": singles,
        "n_random": n_random,
        "score": score,
        "batch_size": batch_size,
    }
    runs = _Runs(
        model, data, how, score=score, seed=seed, batch_size=batch_size, progress=progress, task=task, options=options, reference=reference
    )
    intact, cells = runs.run(sets, intact, zero_shot)
    first, rest = cells[0], cells[1:]
    if singles and len(chosen) == 1:
        alone, rest = [tuple(chosen)], [first, *rest]
    single_cells, random = tuple(rest[: len(alone)]), tuple(rest[len(alone) :])
    p_random = _p_random(first, random)
    found = single_cells if len(chosen) > 1 else ()
    finding, verdict = judge(intact, first, found, random, p_random, exhaustive=drawn.exhaustive)
    return Ablation(
        how=how, intact=intact, chosen=first, singles=single_cells, random=random,
        random_mean=mean_estimate([cell.accuracy.value for cell in random], unit="probability", seed=seed), p_random=p_random,
        zero_shot=intact.zero_shot, match_note=drawn.note, verdict=verdict, n=intact.n, provenance=runs.made, finding=finding,
    )  # fmt: skip


@guarded
def dose_curve(
    model: Any,
    data: Data,
    ranking: Sequence[Head] | HeadScores,
    name: str | None = None,
    *,
    ks: Sequence[int] | None = None,
    how: How = "zero",
    n_random: int = 20,
    spare: Sequence[Head] = (),
    intact: ICLAccuracy | None = None,
    reference: Data | None = None,
    score: LabelScore = "full",
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> DoseCurve:
    """Accuracy as the top 1, 2, ... k heads of a ranking go off, with a band of as many random heads.

    Args:
        model: As in `ablate`.
        data: As in `ablate`.
        ranking: Heads, best first, or HeadScores with the `name` of a score.
        name: Which score ranks, for HeadScores; what to call the ranking, for a list.
        ks: How many heads to switch off; default 0, 1, 2, 3, 4, 6, 8, 12, ... up to half of all heads (and no more than the ranking has).
        how: As in `ablate`.
        n_random: Random sets per k; at each k they leave out the top k, not the heads that come later.
        spare: As in `ablate`.
        intact: As in `ablate`.
        reference: As in `ablate`.
        score: As in `ablate`.
        seed: As in `ablate`.
        batch_size: As in `ablate`.
        task: As in `ablate`.
        progress: Show a bar.

    Returns:
        DoseCurve; the band is NaN at k = 0 and where too few heads are left.

    Raises:
        OptionError: an unknown score, or a k outside the ranking.
        HeadIndexError: as in `ablate`.
    """
    heads, ranked_by = _ranking(model, ranking, name)
    chosen = _checked(model, data, heads, how, score, n_random, batch_size)
    counts = _default_ks(len(chosen), model) if ks is None else sorted({int(k) for k in ks})
    if not counts or counts[0] < 0 or counts[-1] > len(chosen):
        raise OptionError(f"ks must be in 0..{len(chosen)}, the ranking's length; got {list(counts)}. Rank more heads, or ask for fewer.")
    draws = {
        k: matched_draws(chosen[:k], _sizes(model), n_random, seed=seed + k, spare=check_heads(model, spare)).sets if k else ()
        for k in counts
    }
    sets = [*(tuple(chosen[:k]) for k in counts if k), *(one for k in counts for one in draws[k])]
    options = {"ks": list(counts), "how": how, "n_random": n_random, "score": score, "batch_size": batch_size}
    runs = _Runs(
        model, data, how, score=score, seed=seed, batch_size=batch_size, progress=progress, task=task, options=options, reference=reference
    )
    intact, cells = runs.run(sets, intact, False)
    n_top = sum(k > 0 for k in counts)
    top, random = iter(cells[:n_top]), iter(cells[n_top:])
    points = [(intact.accuracy, intact.margin) if not k else _point(next(top), seed) for k in counts]
    band = np.full((3, len(counts)), np.nan)
    for i, k in enumerate(counts):
        values = [next(random).accuracy.value for _ in draws[k]]
        if values:
            band[:, i] = np.quantile(values, 0.025), np.mean(values), np.quantile(values, 0.975)
    return DoseCurve(
        ranking=tuple(chosen), ranked_by=ranked_by, ks=np.array(counts), accuracy=tuple(a for a, _ in points), margin=tuple(m for _, m in points),
        random_low=band[0], random_mean=band[1], random_high=band[2], n_draws=n_random, chance=intact.chance, how=how, n=intact.n,
        provenance=runs.made,
    )  # fmt: skip


class _Runs:
    """Many sets of heads on one set of episodes."""

    def __init__(
        self,
        model: Any,
        data: Data,
        how: How,
        *,
        score: LabelScore,
        seed: int,
        batch_size: int,
        progress: bool,
        task: str,
        options: dict[str, Any],
        reference: Data | None,
    ) -> None:
        self.model, self.data, self.reference = model, data, data if reference is None else reference
        self.how: How = how
        self.score: LabelScore = score
        self.seed, self.batch_size, self.progress = seed, batch_size, progress
        self.names = ids_of(data)
        self.made = provenance(model, task=task, seed=seed, options=options)

    def run(self, sets: Sequence[tuple[Head, ...]], intact: ICLAccuracy | None, zero_shot: bool) -> tuple[ICLAccuracy, list[AblationCell]]:
        """The intact model's result and one cell per set."""
        every = [*([()] if intact is None else []), *sets]
        source = self.reference if self.how == "mean" else self.data
        switches = Switches.build(self.model, source, every, self.how, seed=self.seed, batch_size=self.batch_size)
        answers, key, reasons = answer(
            self.model, self.data, score=self.score, switches=switches, batch_size=self.batch_size, names=self.names,
            what=f"{len(sets)} sets of heads off", progress=self.progress,
        )  # fmt: skip
        kept, skipped = usable(self.names, reasons)
        marked = [
            mark(one, key, self.names, kept, skipped, score=self.score, seed=self.seed, zero_shot=None, notes=[], made=self.made)
            for one in answers
        ]
        if intact is None:
            control = (
                zero_shot_control(self.model, self.data, self.score, self.seed, self.batch_size, self.progress, kept) if zero_shot else None
            )
            intact, marked = (
                mark(
                    answers[0],
                    key,
                    self.names,
                    kept,
                    skipped,
                    score=self.score,
                    seed=self.seed,
                    zero_shot=control,
                    notes=[],
                    made=self.made,
                ),
                marked[1:],
            )
        elif intact.episode_ids != tuple(self.names[i] for i in kept) or intact.score != self.score:
            raise OptionError(
                f"intact must be the same episodes, scored the same way; got {intact.n} episodes scored by {intact.score!r} for {len(kept)} scored by "
                f"{self.score!r}. Leave it out."
            )
        return intact, [self._cell(one, intact, result) for one, result in zip(sets, marked, strict=True)]

    def _cell(self, heads: tuple[Head, ...], intact: ICLAccuracy, off: ICLAccuracy) -> AblationCell:
        return AblationCell(
            heads=heads, accuracy=off.accuracy, change=paired_change(intact.correct, off.correct, unit="probability", seed=self.seed),
            margin_change=paired_change(intact.margins, off.margins, unit="nats", seed=self.seed),
            mcnemar_p=mcnemar_p(intact.correct, off.correct), correct=off.correct, margins=off.margins,
            name=" ".join(head_name(head) for head in heads),
        )  # fmt: skip


def _checked(model: Any, data: Data, heads: Sequence[Head], how: str, score: str, n_random: int, batch_size: int) -> list[Head]:
    """Every refusal that needs no forward pass; the heads, checked."""
    check_data(data, batch_size)
    check_score(score)
    if n_random < 0:
        raise OptionError(f"n_random must be at least 0; got {n_random}. 19 or more make p = 0.05 possible.")
    if not len(heads):
        raise HeadIndexError("heads must be at least one (layer, head); got none. Rank them with score_heads(...).top(name, k).")
    checked = check_heads(model, heads)
    twice = [head for head in checked if checked.count(head) > 1]
    if twice:
        raise HeadIndexError(f"heads must be different; got {head_name(twice[0])} twice. Name each head once.")
    rehearse(model, data)
    return checked


def _sizes(model: Any) -> dict[int, int]:
    """Layer -> number of heads, of the layers that can be switched."""
    anatomy = getattr(model, "anatomy", None)  # layers of a few families differ in their number of heads
    return {layer: int(anatomy.layers[layer].n_heads if anatomy is not None else model.cfg.n_heads) for layer in switchable(model)}


def _p_random(chosen: AblationCell, random: Sequence[AblationCell]) -> float:
    if not random:
        return float("nan")
    worse = sum(cell.accuracy.value <= chosen.accuracy.value + TOLERANCE for cell in random)
    return float(permutation_p(0.0, worse, len(random)))


def _point(cell: AblationCell, seed: int) -> tuple[Any, Any]:
    return cell.accuracy, mean_estimate(cell.margins, unit="nats", seed=seed)


def _ranking(model: Any, ranking: Sequence[Head] | HeadScores, name: str | None) -> tuple[list[Head], str]:
    if not isinstance(ranking, HeadScores):
        return list(ranking), name or "given"
    if name is None or name not in ranking.scores:
        raise OptionError(f"name must be one of the scores, {', '.join(ranking.scores)}; got {name!r}. Say which score ranks the heads.")
    return ranking.top(name, model.cfg.n_layers * model.cfg.n_heads), name


def _default_ks(n: int, model: Any) -> list[int]:
    most = min(n, max(1, model.cfg.n_layers * model.cfg.n_heads // 2))
    steps = [k for k in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if k < most]
    return [*steps, most]
