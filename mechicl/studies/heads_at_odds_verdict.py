"""What the knock-outs say: rows with paired intervals and corrected p, the two kinds against each other, and one sentence by rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from mechicl.analysis.ablation.verdict import ALPHA, LEAST_CENSUS
from mechicl.analysis.statistics import holm, mcnemar_p, paired_change, permutation_p, wilson
from mechicl.results import Estimate, Head, OddsContrast, OddsRow
from mechicl.studies.heads_at_odds_parts import KnockedSetting
from mechicl.studies.heads_at_odds_sets import FUNCTION_VECTOR, INDUCTION, KINDS, OddsSet

ALL = ("all", 0)
"""The name and shots of all settings together."""
N_BOOTSTRAP = 2000

SIDES: dict[str, str] = {
    "induction": "Huang et al.'s side: induction heads are needed, also when function-vector heads are left in; function-vector heads are not shown to be needed once induction heads are left in",
    "function vector": "Yin and Steinhardt's side: function-vector heads are needed, also when induction heads are left in; induction heads are not shown to be needed once function-vector heads are left in",
    "induction only": "induction heads are needed, also when the top of the function-vector ranking is left in; no head's function-vector score is above its null, so the top of that ranking are no function-vector heads, whatever they cost",
    "function vector only": "function-vector heads are needed, also when the top of the induction ranking is left in; no head's induction score is above its null, so the top of that ranking are no induction heads, whatever they cost",
    "no heads": "not decided: no head's score is above its null, by either score",
    "both": "both are needed, each also when the other kind is left in",
    "either": "not decided: heads that both rankings share carry it, and neither kind is shown to be needed when the other is left in",
    "neither": "neither kind is shown to be needed more than random heads",
    "no control": "not decided: too few random sets to tell either kind from random heads",
    "nothing to lose": "nothing can be shown: the model is not above chance in any setting",
}
"""What each side means."""


def rows_of(
    sets: Sequence[OddsSet], knocked: Sequence[KnockedSetting], hows: Sequence[str], *, n_heads: int, seed: int
) -> tuple[OddsRow, ...]:
    """A row for every set, way and setting, all settings together first. p is corrected within either family: the pooled rows, and the rows of single settings."""
    found: list[OddsRow] = []
    for how in hows:
        some = [one for one in knocked if one.how == how]
        groups = [(ALL, some), *(((one.task, one.shots), [one]) for one in some)]
        for name, group in groups:
            if group:
                found += [_row(name, one, group, how, seed) for one in sets]
    pooled = [row for row in found if (row.task, row.shots) == ALL]
    single = [row for row in found if (row.task, row.shots) != ALL]
    return (*_corrected(pooled), *_corrected(single))


def _row(name: tuple[str, int], one: OddsSet, group: Sequence[KnockedSetting], how: str, seed: int) -> OddsRow:
    intact = np.concatenate([part.intact for part in group])
    chance = float(np.mean(np.concatenate([np.full(len(part.intact), part.chance) for part in group])))
    off = _correct(group, one.heads)
    random = np.array([_correct(group, some) for some in one.random], dtype=float).reshape(len(one.random), len(intact))
    changes = random.mean(1) - intact.mean()
    worse = int((random.mean(1) <= off.mean() + 1e-9).sum())
    p_random = float(permutation_p(0.0, worse, len(random))) if len(random) else float("nan")
    low, mean, high = (np.quantile(changes, 0.025), changes.mean(), np.quantile(changes, 0.975)) if len(random) else (np.nan,) * 3
    change = paired_change(intact, off, unit="probability", seed=seed)
    p = mcnemar_p(intact, off)
    row = OddsRow(
        task=name[0], shots=name[1], how=how, kind=one.kind, excluded=one.excluded, dose=one.dose, k=len(one.heads), heads=one.heads, accuracy=wilson(off),
        change=change, p=p, p_corrected=p, random_change=float(mean), random_low=float(low), random_high=float(high),
        against_random=against(off, random, seed), p_random=p_random, n_random=len(random), exhaustive=one.exhaustive, finding="",
    )  # fmt: skip
    return replace(row, finding="nothing to lose" if wilson(intact).low <= chance else "")


def _correct(group: Iterable[KnockedSetting], heads: tuple[Head, ...]) -> np.ndarray:
    return np.concatenate([part.correct[heads] for part in group])


def against(off: np.ndarray, random: np.ndarray, seed: int) -> Estimate:
    """Accuracy with the set off minus the mean over random sets, on the same episodes; 95 % interval with episodes and random sets both resampled."""
    if not len(random):
        return Estimate(float("nan"), float("nan"), float("nan"), len(off), "probability", "no random sets")
    draw = np.random.default_rng(seed)
    n, m = len(off), len(random)
    episodes = draw.multinomial(n, np.full(n, 1 / n), size=N_BOOTSTRAP) / n
    which = draw.multinomial(m, np.full(m, 1 / m), size=N_BOOTSTRAP) / m
    drawn = episodes @ off.astype(float) - np.einsum("be,me,bm->b", episodes, random, which)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(
        float(off.mean() - random.mean()), float(low), float(high), n, "probability", "bootstrap over episodes and random sets, 95 %"
    )


def _corrected(rows: Sequence[OddsRow]) -> list[OddsRow]:
    """p corrected over distinct tests: the same heads in the same setting are one test, whatever rankings they top."""
    keys = [(row.task, row.shots, row.how, tuple(sorted(row.heads))) for row in rows]
    tests = {key: row.p for key, row in zip(keys, rows, strict=True)}
    corrected = dict(zip(tests, holm(list(tests.values())).tolist(), strict=True)) if tests else {}
    marked = [replace(row, p_corrected=float(corrected[key])) for key, row in zip(keys, rows, strict=True)]
    return [replace(row, finding=row.finding or finding(row)) for row in marked]


def finding(row: OddsRow) -> str:
    """A word of `mechicl.analysis.ablation.verdict.FINDINGS`, by its rule, with p corrected: necessary, unspecific, irrelevant, no control."""
    if not (row.change.high < 0 and row.p_corrected < ALPHA):
        return "irrelevant"
    if not row.n_random:
        return "no control"
    worst_of_all = row.p_random <= 1 / (1 + row.n_random) + 1e-9
    if worst_of_all and row.exhaustive and row.n_random >= LEAST_CENSUS:
        return "necessary"
    if worst_of_all and row.p_random > ALPHA:
        return "no control"
    return "necessary" if row.p_random <= ALPHA else "unspecific"


def contrasts_of(sets: Sequence[OddsSet], knocked: Sequence[KnockedSetting], hows: Sequence[str], *, seed: int) -> tuple[OddsContrast, ...]:
    """At each dose, with and without exclusion, which kind costs more; p (McNemar) corrected as in `rows_of`."""
    pooled, single = [], []
    for how in hows:
        some = [one for one in knocked if one.how == how]
        for name, group in [(ALL, some), *(((one.task, one.shots), [one]) for one in some)]:
            for dose in sorted({one.dose for one in sets}):
                for excluded in (False, True):
                    pair = {one.kind: one for one in sets if one.dose == dose and one.excluded == excluded}
                    if group and len(pair) == len(KINDS):
                        (pooled if name == ALL else single).append(_contrast(name, pair, group, how, seed))
    return (*_holm(pooled), *_holm(single))


def _contrast(name: tuple[str, int], pair: dict[str, OddsSet], group: Sequence[KnockedSetting], how: str, seed: int) -> OddsContrast:
    one = pair[INDUCTION]
    without_induction, without_vector = _correct(group, one.heads), _correct(group, pair[FUNCTION_VECTOR].heads)
    p = mcnemar_p(without_induction, without_vector)
    difference = paired_change(without_induction, without_vector, unit="probability", seed=seed)
    return OddsContrast(name[0], name[1], how, one.excluded, one.dose, len(one.heads), difference, p, p)


def _holm(found: Sequence[OddsContrast]) -> list[OddsContrast]:
    return [replace(one, p_corrected=float(p)) for one, p in zip(found, holm([one.p for one in found]), strict=True)]


# -- the sentence ---------------------------------------------------------------------------------------------------------------------------------


def side_of(plain: dict[str, OddsRow], excluded: dict[str, OddsRow], passing: Mapping[str, int]) -> str:
    """One of `SIDES`, from the four rows of the main dose, all settings together, and how many heads of each kind pass their null."""
    rows = [*plain.values(), *excluded.values()]
    if all(row.finding == "nothing to lose" for row in rows):
        return "nothing to lose"
    real = [kind for kind in KINDS if passing[kind]]
    if not real:
        return "no heads"
    alone = [kind for kind in real if excluded[kind].finding == "necessary"]
    if len(alone) == 2:
        return "both"
    if alone:
        return alone[0] if len(real) == 2 else f"{alone[0]} only"
    if any(excluded[kind].finding == "no control" for kind in real):
        return "no control"
    return "either" if any(plain[kind].finding == "necessary" for kind in real) else "neither"


def sentence(side: str, plain: dict[str, OddsRow], excluded: dict[str, OddsRow], contrast: OddsContrast | None, *, model: str) -> str:
    """The verdict."""
    if not plain and side != "nothing to lose":
        return f"{model}: not decided: no task defines both scores, so the two kinds cannot be held against each other."
    if side == "nothing to lose":
        return f"{model}: {SIDES[side]}."
    first = plain[INDUCTION]
    parts = [f"{_kind(excluded[kind])} {_change(excluded[kind])}" for kind in KINDS]
    beside = (
        ""
        if contrast is None
        else f"; as they are ranked, induction heads cost {contrast.difference.value:+.2f} [{contrast.difference.low:+.2f}, "
        f"{contrast.difference.high:+.2f}] more than function-vector heads (corrected p = {contrast.p_corrected:.2g})"
    )
    return (
        f"{model}, {first.k} heads of each kind off ({first.how} ablation, n = {first.change.n} episodes, all settings together): {SIDES[side]}: "
        f"{'; '.join(parts)}{beside}."
    )


def _kind(row: OddsRow) -> str:
    other = FUNCTION_VECTOR if row.kind == INDUCTION else INDUCTION
    return f"{row.kind} heads off with {other} heads left in"


def _change(row: OddsRow) -> str:
    beside = f"random {row.random_change:+.2f}, p = {row.p_random:.3f}" if row.n_random else "no random sets"
    return f"{row.change.value:+.2f} [{row.change.low:+.2f}, {row.change.high:+.2f}] (corrected p = {row.p_corrected:.2g}; {beside}: {row.finding})"
