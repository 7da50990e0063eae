"""`run`: do induction heads or function-vector heads carry in-context learning in this model?

Huang et al. (2026) find that induction heads drive multimodal in-context learning; Yin and Steinhardt (2025) that in larger language models function-vector
heads do, and that induction heads matter little once the heads that are both are left in. Both answers come from knock-outs. Here both kinds are scored on some
functions of each task and switched off on others, at equal sizes, each also with the other's top heads left in, beside matched random heads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np

from mechicl.analysis.ablation.switches import How, check_how
from mechicl.analysis.ablation.verdict import ALPHA
from mechicl.analysis.agreement import head_overlap
from mechicl.analysis.feed import provenance, rehearse
from mechicl.analysis.guarded import noted
from mechicl.analysis.statistics import wilson
from mechicl.errors import OptionError
from mechicl.results import HeadsAtOdds, OddsCost, OddsSetting, Score, Skipped
from mechicl.studies.heads_at_odds_parts import KnockedSetting, OddsFolder, ScoredSetting, knock_out, score_setting
from mechicl.studies.heads_at_odds_plan import Halves, Plan, Setting, plan_of, pool
from mechicl.studies.heads_at_odds_sets import (
    INDUCTION,
    KINDS,
    check_doses,
    different,
    every_set,
    heads_at,
)
from mechicl.studies.heads_at_odds_tasks import SIZE, OddsTask, pick
from mechicl.studies.heads_at_odds_verdict import ALL, contrasts_of, rows_of, sentence, side_of

COPIED = ("concepts", "digits", "words")
DOSES = (1.0, 2.0, 4.0, 8.0, 16.0, 25.0)


def run(
    model: Any,
    *,
    tasks: Sequence[str | OddsTask] = COPIED,
    shots: Sequence[int] = (1, 2, 4),
    n: int = 24,
    functions: int = 4,
    classes: int = 4,
    size: int = SIZE,
    doses: Sequence[float] = DOSES,
    exclude: float | None = None,
    hows: Sequence[How] = ("mean", "zero"),
    n_random: int = 20,
    n_band: int = 5,
    seed: int = 0,
    batch_size: int = 16,
    out: str | PathLike[str] | None = None,
    progress: bool = True,
) -> HeadsAtOdds:
    """Score both kinds of heads on one half of the functions, switch them off on the other.

    Args:
        model: A `HookedVLM`, or anything with the surface of `HookedModel` that renders episodes.
        tasks: Names in `mechicl.studies.heads_at_odds_tasks.TASKS` or tasks of your own. Add "known words" and "operator" for models that know words and numbers: there the answer
            is not in the prompt, as in Yin and Steinhardt's tasks. Settings in which the model is not above chance on the finding half are named and left out.
        shots: Examples of each class, several numbers.
        n: Episodes of each half in each setting.
        functions: Among how many functions of the task these are shared, in each half; the halves have none in common.
        classes: Classes of each episode.
        size: Side of the pictures, pixels.
        doses: Per cents of all heads that go off. Doses that come to the same number of heads are one.
        exclude: How many per cent of the other ranking's top are left in for the exclusion control; None: as many as go off, the strictest. 2 is Yin and Steinhardt's.
        hows: Ways of switching off; the verdict is about the first. Mean ablation is Yin and Steinhardt's (means over the finding half), zero is Huang et al.'s.
        n_random: Matched random sets of each set at the main dose, 19 or more for p = 0.05 where so many exist.
        n_band: The same at the other doses.
        seed: Decides functions, episodes, random sets, intervals.
        batch_size: Prompts per forward pass.
        out: A folder that keeps every finished part, so that a killed study goes on where it was; and the tables.
        progress: Show bars.

    Returns:
        HeadsAtOdds.

    Raises:
        OptionError: an option out of its range.
        EpisodeError, RenderError, ...: a task that this model cannot be asked; before any work.
        CheckpointError: the folder holds another study.

    Source:
        Huang et al. 2026; Yin and Steinhardt 2025 (exclusion, mean ablation). Differs: chosen and measured on different functions, matched random heads,
        paired intervals, correction, tasks with pictures.
    """
    chosen, ways, percents = check(tasks, shots, n, functions, classes, doses, exclude, hows, n_random, n_band)
    settings: list[Setting] = [(task, k) for task in chosen for k in sorted(set(shots))]
    asked = {
        "model": dict(model.describe()), "tasks": [task.name for task in chosen], "shots": sorted(set(shots)), "n": n, "functions": functions, "classes": classes,
        "size": size, "doses": list(percents), "exclude": exclude, "hows": list(ways), "n_random": n_random, "n_band": n_band, "seed": seed, "batch_size": batch_size,
    }  # fmt: skip
    draw = Halves(n, functions, classes, size, seed)
    for setting in settings:
        rehearse(model, [episode for some in draw.find(setting) for episode in some])
    folder = None if out is None else OddsFolder(out, _plain(asked))
    scored, knocked, kept_sets = folder.load() if folder is not None else ({}, {}, [])
    common: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "progress": progress}
    for task, k in settings:
        if (task.name, k) not in scored:
            with noted(model) as said:
                one = score_setting(model, draw.find((task, k)), task=task.name, shots=k, copied=task.copied, **common)
            scored[task.name, k] = one = replace(one, notes=tuple(said))
            if folder is not None:
                folder.add(one)
    parts = [scored[task.name, k] for task, k in settings]
    pooled, notes = pool(parts, (model.cfg.n_layers, model.cfg.n_heads))
    plan = plan_of(model, pooled, percents, exclude, n_random, n_band, seed)
    sets = every_set(plan.sets)
    if folder is not None:
        folder.check_sets(kept_sets, sets)
    for (task, k), part in zip(settings, parts, strict=True):
        for how in ways if part.scores else ():
            if (task.name, k, how) not in knocked:
                reference = [episode for some in draw.find((task, k)) for episode in some]
                with noted(model) as said:
                    off = knock_out(model, draw.prove((task, k)), reference, sets, how, task=task.name, shots=k, **common)
                knocked[task.name, k, how] = off = replace(off, notes=tuple(said))
                if folder is not None:
                    folder.add(off)
    made = provenance(
        model, task=", ".join(task.name for task in chosen), seed=seed, options={key: asked[key] for key in asked if key != "model"}
    )
    result = _result(settings, parts, pooled, plan, knocked, ways, percents, made, notes)
    if folder is not None:
        folder.write_table("rows.csv", result.to_frame())
        folder.write_table("heads.csv", result.heads_frame())
        folder.write_table("contrasts.csv", result.contrasts_frame())
    return result


def cost(
    model: Any,
    *,
    tasks: Sequence[str | OddsTask] = COPIED,
    shots: Sequence[int] = (1, 2, 4),
    n: int = 24,
    functions: int = 4,
    classes: int = 4,
    size: int = SIZE,
    doses: Sequence[float] = DOSES,
    hows: Sequence[How] = ("mean", "zero"),
    n_random: int = 20,
    n_band: int = 5,
    seed: int = 0,
    batch_size: int = 16,
    timed: bool = True,
) -> OddsCost:
    """What `run` would take, most of it a time measured on one batch of the longest prompts.

    Prompts that are asked about several labels count once. An upper bound: sets that coincide, and settings without learning, are not run.
    """
    chosen, ways, percents = check(tasks, shots, n, functions, classes, doses, None, hows, n_random, n_band)
    heads = model.cfg.n_layers * model.cfg.n_heads
    settings = [(task, k) for task in chosen for k in sorted(set(shots))]
    n_sets = 4 * ((1 + n_random) + (len(different(percents, heads)) - 1) * (1 + n_band))
    score = len(settings) * n * (3 + heads)  # a head's two replacements run on average half of the model each
    off = len(settings) * n * len(ways) * (n_sets + 1)
    seconds = float("nan")
    if timed:
        draw = Halves(n, functions, classes, size, seed)
        longest = max(settings, key=lambda s: s[1])
        few = [episode for some in draw.find(longest) for episode in some][:batch_size]
        model(model.render(few[:1]))  # the first pass pays for everything's beginning
        batch, start = model.render(few), time.perf_counter()
        model(batch)
        seconds = (time.perf_counter() - start) / len(few) * (score + off)
    return OddsCost(len(settings), n, score, off, seconds)


def _result(
    settings: Sequence[Setting], parts: Sequence[ScoredSetting], pooled: dict[str, Score], plan: Plan, knocked: dict[tuple[str, int, str], KnockedSetting],
    ways: Sequence[How], percents: Sequence[float], made: Any, notes: list[str],
) -> HeadsAtOdds:  # fmt: skip
    """The result, from the parts."""
    seed = int(made.seed or 0)
    induction, vector = pooled["induction"], pooled["function_vector"]
    both = int((~np.isnan(induction.value) & ~np.isnan(vector.value)).sum())
    offs = [knocked[key] for key in knocked if any((task.name, k) == key[:2] for task, k in settings)]
    rows = rows_of(plan.sets, offs, ways, n_heads=both, seed=seed)
    contrasts = contrasts_of(plan.sets, offs, ways, seed=seed)
    main = [row for row in rows if (row.task, row.shots) == ALL and row.how == ways[0] and row.dose == plan.main]
    plain, excluded = ({row.kind: row for row in main if row.excluded == x} for x in (False, True))
    head_to_head = next(
        (c for c in contrasts if (c.task, c.shots) == ALL and c.how == ways[0] and c.dose == plan.main and not c.excluded), None
    )
    passing = {kind: plan.passing.get(kind, ()) for kind in KINDS}
    side = (
        side_of(plain, excluded, {kind: len(some) for kind, some in passing.items()})
        if main
        else "no heads"
        if any(part.scores for part in parts)
        else "nothing to lose"
    )
    told = [
        f"{one.kind}, {one.dose:g} %{' excluded' if one.excluded else ''}: {one.note}."
        for one in plan.sets
        if one.note and one.dose == plan.main
    ]
    skipped = [Skipped(a, b) for part in (*parts, *offs) for a, b in part.skipped]
    told += dict.fromkeys(note for part in (*parts, *offs) for note in part.notes)
    marks = [_setting(setting, part, knocked, ways) for setting, part in zip(settings, parts, strict=True)]
    return HeadsAtOdds(
        induction=induction, function_vector=vector, overlaps={dose: head_overlap(induction, vector, k=heads_at(dose, both)) for dose in plan.doses},
        settings=tuple(marks), rows=rows, contrasts=contrasts, doses=tuple(plan.doses), main_dose=plan.main, hows=tuple(ways), side=side,
        verdict=sentence(side, plain, excluded, head_to_head, model=made.model), rule=_rule(plan, ways), n=sum(len(p.intact) for p in offs if p.how == ways[0]),
        skipped=tuple({(s.episode, s.reason): s for s in skipped}.values()), provenance=made, notes=(*notes, *told), passing=passing,
    )  # fmt: skip


def _setting(
    setting: Setting, part: ScoredSetting, knocked: dict[tuple[str, int, str], KnockedSetting], ways: Sequence[How]
) -> OddsSetting:
    task, shots = setting
    off = knocked.get((task.name, shots, ways[0]))
    return OddsSetting(
        task=task.name, shots=shots, found=wilson(part.correct), accuracy=None if off is None else wilson(off.intact),
        zero_shot=None if off is None else wilson(off.zero_shot), chance=part.chance, copied=task.copied, learns=bool(part.scores),
    )  # fmt: skip


def _rule(plan: Plan, ways: Sequence[How]) -> str:
    return (
        f"Heads are ranked by their mean score over all settings above chance, on functions that they are not switched off on. Verdict: all settings together, {ways[0]} ablation, the dose "
        f"nearest to the number of induction heads that pass their null ({len(plan.passing.get(INDUCTION, ()))}). A kind is needed when accuracy falls (paired interval below zero, McNemar p below {ALPHA} "
        f"after Holm over all pooled rows) and further than with matched random heads (rank p up to {ALPHA}, or all matched sets that exist), with the other kind's top heads left in."
    )


def check(
    tasks: Sequence[str | OddsTask], shots: Sequence[int], n: int, functions: int, classes: int, doses: Sequence[float], exclude: float | None,
    hows: Sequence[How], n_random: int, n_band: int,
) -> tuple[list[OddsTask], tuple[How, ...], tuple[float, ...]]:  # fmt: skip
    """Every refusal that needs no model; tasks, ways and doses in order.

    Raises:
        OptionError: one of them is out of its range.
    """
    chosen, ways = pick(tasks), tuple(dict.fromkeys(hows))
    if not shots or min(shots) < 1:
        raise OptionError(f"shots must be at least one number of examples of each class, 1 or more; got {list(shots)}. (1, 2, 4) is usual.")
    if functions < 1 or n < 2 * functions:
        raise OptionError(
            f"n must be at least twice functions = {functions}, so that each has others to take a mean from; got {n}. Ask for more episodes."
        )
    if classes < 2 or n_random < 0 or n_band < 0:
        raise OptionError(
            f"classes must be at least 2, n_random and n_band at least 0; got {classes}, {n_random}, {n_band}. 4, 20 and 5 are the default."
        )
    if not ways:
        raise OptionError("hows must be at least one way of switching off; got none. ('mean', 'zero') is the default.")
    for how in ways:
        check_how(how, n)
    if exclude is not None:
        check_doses([exclude])
    return chosen, ways, check_doses(doses)


def _plain(asked: dict[str, Any]) -> dict[str, Any]:
    """Without what changes from machine to machine and not from study to study."""
    about = {key: value for key, value in asked["model"].items() if key in ("model", "revision", "dtype")}
    return {**asked, "model": about}
