"""Which measure goes with in-context learning over many trained models: correlations with intervals, and a small random forest with a control.

Models of one setting (different seeds) are not independent evidence for what happens between settings: they are resampled, dealt out and held out together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from mechicl.analysis.statistics import LEVEL, N_BOOTSTRAP, holm, permutation_p
from mechicl.analysis.trainings.bands import RUN, measures_of, settings_of
from mechicl.errors import OptionError
from mechicl.results import Correlations, Estimate, Forest, Skipped

Kind = Literal["spearman", "pearson"]
OUTCOME = "accuracy_ic"
N_PERMUTATIONS = 999
LEAST_SETTINGS = 5
"""Fewest settings that correlations over models may be taken over."""


def pooled(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Several sweeps as one table, settings before `step` and measures behind it; a setting that a sweep did not vary is missing there.

    A model that two sweeps share is taken from the first.

    Raises:
        OptionError: no table.
    """
    if not tables:
        raise OptionError("tables must be at least one; got none. Load them with mechicl.training.sweeps.sweep.load.")
    settings = dict.fromkeys(str(c) for t in tables for c in t.columns[: list(t.columns).index("step")])
    measures = dict.fromkeys(name for t in tables for name in measures_of(t))
    seen: set[str] = set()
    kept = []
    for one in tables:
        kept.append(one[~one[RUN].isin(list(seen))].dropna(axis=1, how="all"))
        seen |= set(one[RUN])
    return pd.concat(kept, ignore_index=True).reindex(columns=[*settings, "step", *measures])


def models(
    table: pd.DataFrame,
    outcome: str = OUTCOME,
    measures: Sequence[str] | None = None,
    *,
    settings: Sequence[str] | None = None,
    at: int | None = None,
) -> tuple[pd.DataFrame, pd.Series, np.ndarray]:
    """One row per trained model: its measures, its outcome at the end, and the number of its setting.

    Args:
        table: A sweep's table, or several below one another (a model that is in two of them counts once).
        outcome: What is to be explained, as it is at the last measured step.
        measures: Which; default every measure but accuracies, losses and the outcome.
        settings: Columns that make a setting; default those that vary.
        at: Take the measures at the last measured step up to this one; None: at the end. Then early measures are held against the late outcome.

    Raises:
        OptionError: a column that the table lacks, too few settings, or no step up to `at`.
    """
    names = (
        [n for n in measures_of(table) if not n.startswith(("accuracy", "loss")) and n != outcome] if measures is None else list(measures)
    )
    groups = settings_of(table) if settings is None else list(settings)
    lacking = [name for name in (outcome, *names, *groups) if name not in table.columns]
    if lacking:
        raise OptionError(
            f"the table must have the columns asked for; it lacks {lacking[0]!r}. It has {', '.join(map(str, table.columns[:30]))}."
        )
    rows: Any = table.drop_duplicates([RUN, "step"]).sort_values("step")
    last = rows.groupby(RUN, sort=True).tail(1).set_index(RUN).sort_index()
    early: Any = rows if at is None else rows[rows["step"] <= at]
    if early[RUN].nunique() < len(last):
        raise OptionError(
            f"at must be a step by which every model was measured; got {at}. The first measured step is {rows['step'].min()}."
        )
    found = early.groupby(RUN, sort=True).tail(1).set_index(RUN).sort_index()
    # a setting that a sweep did not vary is missing there, which is a value of its own
    keys = [last[name].astype(object).where(last[name].notna(), "none").astype(str) for name in groups]
    group = last.groupby(keys, sort=False).ngroup().to_numpy() if groups else np.zeros(len(last), dtype=int)
    known = np.isfinite(last[outcome].to_numpy(dtype=np.float64))
    group = np.unique(group[known], return_inverse=True)[1]
    n_settings = len(np.unique(group))
    if n_settings < LEAST_SETTINGS:
        raise OptionError(f"table must hold at least {LEAST_SETTINGS} settings; got {n_settings}. Train models in more settings.")
    return found.loc[known, names], last.loc[known, outcome], group


def correlations(
    table: pd.DataFrame,
    outcome: str = OUTCOME,
    measures: Sequence[str] | None = None,
    *,
    kind: Kind = "spearman",
    settings: Sequence[str] | None = None,
    at: int | None = None,
    n_draws: int = N_BOOTSTRAP,
    seed: int = 0,
) -> Correlations:
    """How each measure goes with the outcome over models.

    Intervals resample settings with all their models. The p-value deals the settings' outcomes out to other settings, block by block: under that null
    models of one setting still resemble each other, so many seeds of few settings do not pass for much evidence.

    Args:
        table, outcome, measures, settings, at: See `models`.
        kind: Spearman's rank correlation, or Pearson's.
        n_draws: Bootstrap draws.
        seed: Decides all draws.

    Raises:
        OptionError: see `models`; an unknown kind.
    """
    if kind not in get_args(Kind):
        raise OptionError(f"kind must be one of {', '.join(get_args(Kind))}; got {kind!r}. spearman asks for order only.")
    frame, target, group = models(table, outcome, measures, settings=settings, at=at)
    draws = _resampled(group, n_draws, seed)
    dealt = _dealt(group, N_PERMUTATIONS, seed + 1)
    y = target.to_numpy(dtype=np.float64)
    value, p, skipped = {}, {}, []
    for name in frame.columns:
        x = frame[name].to_numpy(dtype=np.float64)
        known = np.isfinite(x)
        reason = (
            "it is constant"
            if np.ptp(x[known]) == 0
            else "the outcome is constant"
            if np.ptp(y[known]) == 0
            else ""
            if known.any()
            else "no model has it"
        )
        few = len(np.unique(group[known]))
        if reason or few < LEAST_SETTINGS:
            skipped.append(Skipped(str(name), reason or f"only {few} settings have it"))
            continue
        observed = float(_correlation(x[None], y[None], kind)[0])
        boot = _correlation(x[draws], y[draws], kind)
        low, high = (float(b) for b in np.nanquantile(boot, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
        value[name] = Estimate(observed, low, high, int(known.sum()), "correlation", "bootstrap 95 % over settings")
        null = _correlation(np.broadcast_to(x, dealt.shape), y[dealt], kind)
        p[name] = float(permutation_p(observed, int((np.abs(null) >= abs(observed) - 1e-12).sum()), len(dealt)))
    corrected = dict(zip(p, holm(list(p.values())).tolist(), strict=True)) if p else {}
    when = "at the end of training" if at is None else f"at step {at}, the outcome at the end"
    return Correlations(outcome, kind, value, p, corrected, len(y), int(group.max()) + 1, tuple(skipped), when)


def _correlation(x: Float[np.ndarray, "draw model"], y: Float[np.ndarray, "draw model"], kind: str) -> Float[np.ndarray, " draw"]:
    """Correlation of every row, over the models that have both; NaN where one side is constant."""
    from scipy import stats

    known = np.isfinite(x) & np.isfinite(y)
    a, b = np.where(known, x, np.nan), np.where(known, y, np.nan)
    if kind == "spearman":
        a, b = (stats.rankdata(v, axis=1, nan_policy="omit") for v in (a, b))
    with np.errstate(invalid="ignore", divide="ignore"):
        n = known.sum(1, keepdims=True)
        a, b = (np.where(known, v - np.where(known, v, 0).sum(1, keepdims=True) / n, 0.0) for v in (a, b))
        scale = np.sqrt((a**2).sum(1) * (b**2).sum(1))
        return np.where(scale > 1e-12, (a * b).sum(1) / scale, np.nan)


def _resampled(group: Int[np.ndarray, " model"], n_draws: int, seed: int) -> Int[np.ndarray, "draw model"]:
    """Models of settings drawn with replacement, cut or filled up to the number of models, so that draws stack."""
    generator = np.random.default_rng(seed)
    members = [np.flatnonzero(group == g) for g in range(int(group.max()) + 1)]
    out = np.empty((n_draws, len(group)), dtype=int)
    for row in out:
        picked = np.concatenate([members[g] for g in generator.integers(len(members), size=2 * len(members))])
        # settings have about as many models each: the first len(group) models of the drawn settings are a cluster bootstrap up to the last setting
        while len(picked) < len(group):
            picked = np.concatenate([picked, members[generator.integers(len(members))]])
        row[:] = picked[: len(group)]
    return out


def _dealt(group: Int[np.ndarray, " model"], n_draws: int, seed: int) -> Int[np.ndarray, "draw model"]:
    """For each model another model whose outcome it gets: settings change places as blocks; within a block models keep an order that is drawn."""
    generator = np.random.default_rng(seed)
    members = [np.flatnonzero(group == g) for g in range(int(group.max()) + 1)]
    out = np.empty((n_draws, len(group)), dtype=int)
    for row in out:
        for home, away in zip(members, generator.permutation(len(members)), strict=True):
            other = generator.permutation(members[away])
            row[home] = other[np.arange(len(home)) % len(other)]
    return out


def forest(
    table: pd.DataFrame,
    outcome: str = OUTCOME,
    measures: Sequence[str] | None = None,
    *,
    settings: Sequence[str] | None = None,
    at: int | None = None,
    n_trees: int = 100,
    max_depth: int = 5,
    n_folds: int = 5,
    n_repeats: int = 5,
    n_shuffled: int = 19,
    seed: int = 0,
) -> Forest:
    """A random forest from all measures to the outcome, on settings it did not see, with a shuffled control.

    Args:
        table, outcome, measures, settings, at: See `models`. A measure that a model lacks counts as the median over models.
        n_trees, max_depth: Size of the forest.
        n_folds: Parts that settings are cut into, each predicted from the others.
        n_repeats: Different cuts; the interval of r2 and importances is over cuts and resampled settings.
        n_shuffled: Controls in which settings' outcomes are dealt out to other settings.
        seed: Decides everything.

    Raises:
        OptionError: see `models`; fewer settings than folds, or fewer than 2 folds.

    Source:
        Huang et al. 2026 (a random forest over measures). Differs: held-out settings, permutation importance there, a shuffled control.
    """
    frame, target, group = models(table, outcome, measures, settings=settings, at=at)
    n_settings = int(group.max()) + 1
    if not 2 <= n_folds <= n_settings:
        raise OptionError(f"n_folds must be 2..{n_settings}, the settings; got {n_folds}. Choose fewer folds or train more settings.")
    frame = frame.loc[:, frame.notna().any()]
    x = frame.fillna(frame.median()).to_numpy(dtype=np.float64)
    y = target.to_numpy(dtype=np.float64)
    size: dict[str, Any] = {"n_estimators": n_trees, "max_depth": max_depth}
    losses, gains = [], []
    for repeat in range(n_repeats):
        loss, gain = _held_out(x, y, _folds(group, n_folds, seed + repeat), size, seed + repeat)
        losses.append(loss)
        gains.append(gain)
    null = [
        _r2(_held_out(x, y[row], _folds(group, n_folds, seed + k), size, seed + k, importance=False)[0], y[row])
        for k, row in enumerate(_dealt(group, n_shuffled, seed))
    ]
    scores = np.array([_r2(loss, y) for loss in losses])
    draws = _resampled(group, 500, seed)
    r2 = _forest_estimate(np.mean(losses, 0), y, draws, float(scores.mean()), n_settings)
    spread = float(y.var())
    importance = {str(name): _mean_estimate(np.mean(gains, 0)[:, k] / spread, draws, n_settings) for k, name in enumerate(frame.columns)}
    p = float(permutation_p(0.0, int((np.array(null) >= r2.value).sum()), n_shuffled)) if n_shuffled else float("nan")
    options = {"n_trees": n_trees, "max_depth": max_depth, "n_folds": n_folds, "n_repeats": n_repeats, "seed": seed, "at": at}
    return Forest(outcome, r2, np.array(null), p, importance, len(y), n_settings, options)


def _folds(group: Int[np.ndarray, " model"], n_folds: int, seed: int) -> Int[np.ndarray, " model"]:
    """A fold for every model, whole settings together, folds of nearly equal numbers of settings."""
    order = np.random.default_rng(seed).permutation(int(group.max()) + 1)
    return (np.argsort(order) % n_folds)[group]


def _held_out(
    x: Float[np.ndarray, "model measure"],
    y: Float[np.ndarray, " model"],
    fold: Int[np.ndarray, " model"],
    size: dict[str, Any],
    seed: int,
    *,
    importance: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Squared error of every model when it is held out, [model], and how much it grows when one measure is permuted among the held-out, [model, measure]."""
    from sklearn.ensemble import RandomForestRegressor

    generator = np.random.default_rng(seed)
    loss, gain = np.zeros(len(y)), np.zeros(x.shape)
    for k in range(int(fold.max()) + 1):
        out = fold == k
        learner = RandomForestRegressor(**size, random_state=seed, n_jobs=1).fit(x[~out], y[~out])
        loss[out] = (learner.predict(x[out]) - y[out]) ** 2
        for j in range(x.shape[1] if importance else 0):
            mixed = np.repeat(x[out][None], 5, 0)
            for one in mixed:
                one[:, j] = generator.permutation(one[:, j])
            guess = learner.predict(mixed.reshape(-1, x.shape[1])).reshape(5, -1)
            gain[out, j] = ((guess - y[out]) ** 2).mean(0) - loss[out]
    return loss, gain


def _r2(loss: np.ndarray, y: np.ndarray) -> float:
    return float(1 - loss.mean() / y.var())


def _forest_estimate(loss: np.ndarray, y: np.ndarray, draws: np.ndarray, value: float, n: int) -> Estimate:
    with np.errstate(invalid="ignore", divide="ignore"):
        boot = 1 - loss[draws].mean(1) / y[draws].var(1)
    low, high = np.nanquantile(boot[np.isfinite(boot)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), n, "share of variance", "bootstrap 95 % over settings")


def _mean_estimate(values: np.ndarray, draws: np.ndarray, n: int) -> Estimate:
    low, high = np.quantile(values[draws].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(values.mean()), float(low), float(high), n, "share of variance", "bootstrap 95 % over settings")
