"""Mixed-effects fits across tasks, forms and models: fixed effects of what was done to the examples, random ones of the query. Owner of statsmodels' MixedLM."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mechicl.errors import OptionError
from mechicl.results import Estimate, FactorShares, MixedEffects

if TYPE_CHECKING:
    import pandas as pd

Response = Literal["margin", "accuracy", "share k", "share v"]
"""margin: nats, one row per (query, condition). accuracy: share of right answers, likewise (a linear model of probabilities). share k, share v: a factor's share of
the variation of keys or values in one query, one row per (query, factor)."""

WITHIN = ("task", "form", "model")
METHODS = ("bfgs", "powell", "nm")
"""Optimisers, tried in this order until one converges. (L-BFGS ends at a singular covariance where the others find the maximum.)"""

NOUGHT = 1e-4
"""A variance between groups below this share of the one within counts as none."""

_Table = tuple[dict[str, Estimate], dict[str, float], dict[str, float], float]
"""Fixed effects, their p, variances between groups, variance within."""


def mixed_effects(found: Iterable[FactorShares], *, response: Response = "margin", reml: bool = True) -> MixedEffects:
    """How answers (or shares) depend on meaning, form, task and model, over all results at once; queries have random intercepts.

    Of margins and accuracy: response ~ semantics * format + task + form + model, where semantics and format are 1 where it is changed. Of shares: response ~ factor +
    task + form + model. Columns with one value only are left out. The same query under several forms or models is one group.

    Args:
        found: Results of `factor_shares` with the same factors, e.g. one per task and form and model. Their `task` and model come from the provenance.
        response: See `Response`.
        reml: Restricted maximum likelihood; off to compare fits of different fixed effects.

    Raises:
        OptionError: nothing given, other factors, or a response that does not exist.
    """
    frame = long_table(found, response)
    many = [name for name in WITHIN if len(set(frame[name])) > 1]
    first = "C(factor, Sum)" if response.startswith("share") else " * ".join(frame.attrs["factors"])
    formula = "value ~ " + " + ".join([first, *(f"C({name})" for name in many)])
    unit = {"margin": "nats", "accuracy": "probability"}.get(response, "share")
    return fit(frame, formula, groups="query", unit=unit, response=response, reml=reml)


def long_table(found: Iterable[FactorShares], response: Response = "margin") -> pd.DataFrame:
    """One row per observation: value, query, task, form, model, and the factors (0 kept, 1 changed) or the factor.

    Raises:
        OptionError: see `mixed_effects`.
    """
    import pandas as pd

    results = list(found)
    factors = {one.factors for one in results}
    if len(factors) != 1:
        raise OptionError(
            f"results must share their factors, and be at least one; got {sorted(factors)}. Run factor_shares with the same factors."
        )
    if response not in ("margin", "accuracy", "share k", "share v"):
        raise OptionError(f"response must be margin, accuracy, share k or share v; got {response!r}. margin says most.")
    names = next(iter(factors))
    if strange := [name for name in names if not name.isidentifier() or name in ("value", "query", "factor", *WITHIN)]:
        raise OptionError(f"factors must have names that a formula takes; got {strange}. Name them like semantics, format.")
    rows: list[dict[str, Any]] = []
    for one in results:
        about = {"task": one.provenance.task, "model": one.provenance.model, "form": " or ".join(one.levels[names[-1]][1:])}
        if response.startswith("share"):
            rows += _shares(one, response, about)
            continue
        values = one.margins if response == "margin" else one.correct
        for condition in one.conditions[:-1]:  # not zero-shot
            levels = condition.split("+")
            coded = {name: float(level != one.levels[name][0]) for name, level in zip(names, levels, strict=True)}
            rows += [
                {"value": float(x), "query": f"{one.provenance.task}/{e}", **about, **coded}
                for e, x in zip(one.episode_ids, values[condition], strict=True)
            ]
    frame = pd.DataFrame(rows)
    frame.attrs["factors"] = names
    return frame


def _shares(one: FactorShares, response: str, about: dict[str, str]) -> list[dict[str, Any]]:
    a = one.parts.index(response.removeprefix("share ")) if response.removeprefix("share ") in one.parts else -1
    if a < 0:
        raise OptionError(
            f"results must hold {response.removeprefix('share ')}; got parts {list(one.parts)}. Run factor_shares with both parts."
        )
    alive = ~np.isnan(one.moved[a])
    total = one.squares["total"][:, a][:, alive].sum(1)
    return [
        {"value": float(s / t), "query": f"{about['task']}/{e}", "factor": name, **about}
        for name in one.factors
        for e, s, t in zip(one.episode_ids, one.squares[name][:, a][:, alive].sum(1), total, strict=True)
        if t > 0
    ]


def fit(
    frame: pd.DataFrame,
    formula: str,
    *,
    groups: str,
    slopes: Sequence[str] = (),
    unit: str = "",
    response: str = "",
    reml: bool = True,
) -> MixedEffects:
    """A linear mixed model with random intercepts (and slopes) by group; a fit that fails is a result that says so.

    Args:
        frame: One row per observation.
        formula: Of the response and the fixed effects.
        groups: Column of the groups.
        slopes: Columns whose effect differs between groups too.
        unit, response: Of what is explained, for the record.
        reml: Restricted maximum likelihood.

    Returns:
        MixedEffects; coefficients NaN where nothing could be fitted.

    Raises:
        OptionError: a column that the table does not have, fewer than two groups, or a value that is not finite.
    """
    import statsmodels.formula.api as smf

    if missing := [name for name in (groups, *slopes) if name not in frame.columns]:
        raise OptionError(f"columns must be in the table; {missing} are not among {list(frame.columns)}. Name others.")
    n_groups = len(set(frame[groups]))
    if n_groups < 2:
        raise OptionError(f"groups must be at least two; got {n_groups} in column {groups!r}. Give more queries.")
    if not np.isfinite(frame.select_dtypes("number").to_numpy()).all():
        raise OptionError("values must be finite; got NaN or infinity. Leave those rows out.")
    messages: list[str] = []
    re_formula = "~" + " + ".join(slopes) if slopes else None
    table: _Table = ({}, {}, {}, float("nan"))
    converged = False
    for method in METHODS:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                fitted: Any = smf.mixedlm(formula, frame, groups=frame[groups], re_formula=re_formula).fit(reml=reml, method=[method])
                table = _read(fitted, unit, len(frame))
                converged = bool(fitted.converged) and _finite(table)
            except (np.linalg.LinAlgError, ValueError) as error:
                messages.append(f"{method}: {type(error).__name__}: {error}")
        messages += [f"{method}: {one.message}" for one in caught]
        if converged:
            break
    fixed, p, random, residual = table
    boundary = bool(random) and min(random.values()) < NOUGHT * residual
    notes = [] if converged else ["The fit did not converge: do not read its numbers."]
    if boundary:
        notes.append(f"A variance between {groups} is at nought: the groups differ no more than the residual makes them.")
    return MixedEffects(
        formula=formula, response=f"{response}, {unit}" if unit else response, groups=groups, fixed=fixed, p=p, random=random, residual=residual,
        converged=converged, boundary=boundary, messages=tuple(dict.fromkeys(messages)), n=len(frame), n_groups=n_groups, notes=tuple(notes),
    )  # fmt: skip


def _finite(table: _Table) -> bool:
    """Whether every number was found, intervals too."""
    fixed, _, _, residual = table
    return bool(fixed) and bool(np.isfinite([residual, *(x for one in fixed.values() for x in (one.value, one.low, one.high))]).all())


def _read(fitted: Any, unit: str, n: int) -> _Table:
    """Fixed effects with Wald intervals, their p, variances between groups and within."""
    interval = fitted.conf_int()
    fixed = {
        str(name): Estimate(float(value), float(interval.loc[name, 0]), float(interval.loc[name, 1]), n, unit, "Wald 95 %")
        for name, value in fitted.fe_params.items()
    }
    p = {name: float(fitted.pvalues[name]) for name in fixed}
    random = {str(name): float(fitted.cov_re.iloc[k, k]) for k, name in enumerate(fitted.cov_re.columns)}
    return fixed, p, random, float(fitted.scale)
