"""From head scores to what goes off: scores over all settings, the episodes of either half, the doses and the main one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mechicl.analysis.ablation.verdict import ALPHA
from mechicl.analysis.study import THRESHOLD, discover
from mechicl.prompts.episode import Episode
from mechicl.results import Head, Score
from mechicl.studies.heads_at_odds_parts import BESIDE, ScoredSetting, together
from mechicl.studies.heads_at_odds_sets import FUNCTION_VECTOR, INDUCTION, OddsSet, choose, different, main_dose
from mechicl.studies.heads_at_odds_tasks import Draw, OddsTask

Setting = tuple[OddsTask, int]
"""A task and how many examples of each class."""


def pool(parts: Sequence[ScoredSetting], shape: tuple[int, int]) -> tuple[dict[str, Score], list[str]]:
    """Each score over all settings that have it; a score that none has is NaN everywhere, with a note."""
    names = ("induction", "function_vector", *BESIDE)
    pooled, notes = {}, []
    for name in names:
        some = [part.scores[name] for part in parts if name in part.scores]
        pooled[name] = together(some) if some else _blank(name, shape)
    unlearnt = [f"{part.task} ({part.shots} shots)" for part in parts if not part.scores]
    if unlearnt:
        notes.append(f"Not above chance where heads are chosen, so left out: {', '.join(unlearnt)}.")
    if len(unlearnt) < len(parts) and np.isnan(pooled["induction"].value).all():
        notes.append("No setting has its answer in the prompt, so no head has an induction score: add a task such as concepts.")
    return pooled, notes


class Halves:
    """Episodes of a setting: `functions` functions for finding heads, as many others for switching them off."""

    n: int
    functions: int
    classes: int
    size: int
    seed: int

    def __init__(self, n: int, functions: int, classes: int, size: int, seed: int) -> None:
        self.n, self.functions, self.classes, self.size, self.seed = n, functions, classes, size, seed

    def find(self, setting: Setting) -> list[list[Episode]]:
        """Episodes of the first functions, function by function."""
        return self._draw(setting, 0)

    def prove(self, setting: Setting) -> list[Episode]:
        """Episodes of the other functions."""
        return [episode for some in self._draw(setting, self.functions) for episode in some]

    def _draw(self, setting: Setting, first: int) -> list[list[Episode]]:
        task, shots = setting
        share = [self.n // self.functions + (k < self.n % self.functions) for k in range(self.functions)]
        return [list(task.draw(Draw(first + k, share[k], self.classes, shots, self.size, self.seed))) for k in range(self.functions)]


@dataclass(frozen=True)
class Plan:
    """The sets of heads, what is known of the circuit, and the main dose."""

    sets: list[OddsSet]
    doses: tuple[float, ...]
    main: float
    passing: dict[str, tuple[Head, ...]]
    spare: tuple[Head, ...]


def plan_of(
    model: Any, pooled: dict[str, Score], percents: Sequence[float], exclude: float | None, n_random: int, n_band: int, seed: int
) -> Plan:
    """Which heads go off. The main dose is the number of heads nearest to that of the induction heads that pass their null."""
    induction, vector = pooled["induction"], pooled["function_vector"]
    n_heads = int((~np.isnan(induction.value) & ~np.isnan(vector.value)).sum())
    with np.errstate(invalid="ignore"):
        above = (vector.p_corrected < ALPHA) & (vector.value > 0)
    passing = {
        INDUCTION: discover(induction, "induction", threshold=THRESHOLD)[0],
        FUNCTION_VECTOR: tuple(head for head in vector.top(vector.value.size) if above[head]),
    }
    if not n_heads:
        return Plan([], (), float("nan"), passing, ())
    doses = different(percents, n_heads)
    main = main_dose(doses, n_heads, max(1, len(passing[INDUCTION])))
    spare = tuple(dict.fromkeys(head for name in BESIDE for head in discover(pooled[name], name, threshold=THRESHOLD)[0]))
    sets = choose(model, induction, vector, doses, main, exclude=exclude, spare=spare, n_random=n_random, n_band=n_band, seed=seed)
    return Plan(sets, doses, main, passing, spare)


def _blank(name: str, shape: tuple[int, int]) -> Score:
    nothing = np.full(shape, np.nan)
    return Score(
        name=name, description="no setting defines it", unit="probability", value=nothing, low=nothing, high=nothing, null=nothing, null_high=nothing, p=nothing,
        p_corrected=nothing, per_episode=np.full((0, *shape), np.nan),
    )  # fmt: skip
