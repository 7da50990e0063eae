"""The condition table's verdict against planted trends, and mixed-effects fits against planted effects and closed forms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechicl.analysis.shift.condition_table import alone, condition_table, costs, tabulate
from mechicl.analysis.shift.factors import factor_shares, pooled
from mechicl.analysis.shift.mixed_effects import fit, long_table, mixed_effects
from mechicl.analysis.statistics import mean_estimate, wilson
from mechicl.errors import OptionError
from mechicl.models.planted import planted_induction, untrained
from mechicl.models.toys.prompts import toy_episodes
from mechicl.results import FactorShares, Provenance

CONDITIONS = ("kept+kept", "kept+label first", "other class+kept", "other class+label first")


def planted(
    task: str,
    *,
    plain: float,
    cost: tuple[float, float],
    share: tuple[float, float],
    n: int = 60,
    seed: int = 0,
    model: str = "m",
    form: str = "label first",
    margins: dict[str, np.ndarray] | None = None,
) -> FactorShares:
    """A result with known accuracy, costs and shares (semantics, format) in two moved cells."""
    draw = np.random.default_rng(seed)
    names = [name.replace("label first", form) for name in CONDITIONS]
    rates = dict(zip(names, (plain, plain - cost[1], plain - cost[0], 0.25), strict=True))
    luck = draw.random(n)  # an episode that is right although its examples are broken is right with whole ones
    correct = {name: (luck < rate).astype(float) for name, rate in rates.items()} | {"zero-shot": (draw.random(n) < 0.25).astype(float)}
    size = draw.gamma(4, 0.25, (n, 2, 1, 1, 2))
    parts = {"semantics": share[0], "format": share[1], "interaction": 0.05, "residual": 0.95 - sum(share)}
    squares = {name: size * value for name, value in parts.items()} | {"total": size}
    margins = margins or {name: 4 * x - 2 for name, x in correct.items()}
    shares = {name: np.full((2, 1, 1, 2), value) for name, value in parts.items()}
    return FactorShares(
        parts=("k", "v"), layers=(1,), heads=(0,), spans=("query text", "last token"), factors=("semantics", "format"),
        levels={"semantics": ("kept", "other class"), "format": ("kept", form)}, sources=tuple(parts), shares=shares, low=shares, high=shares, null={}, p={},
        p_corrected={}, moved=np.ones((2, 1, 1, 2)), common=np.ones((2, 1, 1, 2)), squares=squares,
        pooled=pooled(("k", "v"), squares, np.zeros((2, 1, 1, 2), bool), 0), conditions=tuple(correct),
        accuracy={name: wilson(x) for name, x in correct.items()},
        margin={name: mean_estimate(x, unit="nats") for name, x in margins.items()}, correct=correct, margins=margins, chance=0.25, replicates=2,
        episode_ids=tuple(str(k) for k in range(n)), n=n, skipped=(), provenance=Provenance(model, task=task),
    )  # fmt: skip


def tasks(slope: float, **options: float) -> dict[str, FactorShares]:
    """Four tasks, the share of meaning growing with difficulty by `slope`, and the cost likewise."""
    found = {}
    for k, plain in enumerate((0.97, 0.85, 0.7, 0.55)):
        difficulty = 1 - (plain - 0.25) / 0.75
        gain = plain - 0.25
        found[f"t{k}"] = planted(
            f"t{k}", plain=plain, cost=(gain * (0.5 + 1.5 * slope * difficulty), gain * 0.5), share=(0.3 + slope * difficulty / 2, 0.3 - slope * difficulty / 2),
            seed=k, n=400,
        )  # fmt: skip
    return found


@pytest.mark.parametrize(("slope", "word", "opening"), [(0.5, "supported", "Supported"), (-0.5, "contradicted", "Contradicted")])
def test_a_planted_trend_is_found_with_its_sign(slope: float, word: str, opening: str) -> None:
    table = tabulate(tasks(slope))
    assert set(table.finding.values()) == {word}
    assert table.verdict.startswith(opening)
    assert table.trend["share k"].value == pytest.approx(slope, abs=0.1)
    assert table.trend["share k"].low <= slope <= table.trend["share k"].high
    assert [t.task for t in table.tasks] == ["t0", "t1", "t2", "t3"]
    assert [t.difficulty.value for t in table.tasks] == sorted(t.difficulty.value for t in table.tasks)
    assert len(table.to_frame()) == 4 * 5
    assert len(table.tasks_frame()) == 8
    for task in table.tasks:
        assert task.cost["semantics"].low <= task.cost["semantics"].value <= task.cost["semantics"].high
        assert task.difficulty.low <= task.difficulty.value <= task.difficulty.high


def test_no_trend_is_undecided_and_too_few_tasks_are_not_tested() -> None:
    flat = {
        name: planted(name, plain=p, cost=(0.2, 0.2), share=(0.3, 0.3), seed=k)
        for k, (name, p) in enumerate({"a": 0.95, "b": 0.8, "c": 0.6}.items())
    }
    assert tabulate(flat).finding["accuracy"] == "undecided"
    few = dict(list(flat.items())[:2])
    table = tabulate(few)
    assert set(table.finding.values()) == {"not tested"}
    assert table.verdict.startswith("Not tested")
    alike = {name: planted(name, plain=0.9, cost=(0.2, 0.2), share=(0.3, 0.3), seed=1) for name in "abcd"}
    assert set(tabulate(alike).finding.values()) == {"not tested"}


def test_tasks_at_chance_have_nothing_to_lose() -> None:
    found = tasks(0.5) | {"guessed": planted("guessed", plain=0.25, cost=(0, 0), share=(0.4, 0.2), seed=9)}
    table = tabulate(found)
    assert any("guessed" in note for note in table.notes)
    assert table.trend["accuracy"].n == 4
    assert table.trend["share k"].n == 5


def test_costs_are_of_one_factor_alone() -> None:
    found = planted("t", plain=0.9, cost=(0.4, 0.1), share=(0.3, 0.3), n=2000)
    assert alone(found, "semantics") == ["other class+kept"]
    assert alone(found, "format") == ["kept+label first"]
    assert costs(found, "semantics", found.correct).mean() == pytest.approx(0.4, abs=0.05)
    assert costs(found, "format", found.correct).mean() == pytest.approx(0.1, abs=0.05)


def test_the_table_runs_on_toys() -> None:
    sets = {f"{c} classes": toy_episodes(6, classes=c) for c in (2, 3, 5)}
    table = condition_table(
        planted_induction(seed=0).model, sets, semantics="other label", format="label first", progress=False, n_permutations=9
    )
    assert {row.condition for row in table.rows} == {
        "kept+kept",
        "kept+label first",
        "other label+kept",
        "other label+label first",
        "zero-shot",
    }
    assert all(t.difficulty.value == 0 for t in table.tasks)
    assert set(table.finding.values()) == {"not tested"}  # all are solved
    assert all(t.cost["semantics"].value == 1 for t in table.tasks)
    assert table.n == 18


@pytest.mark.usefixtures("untyped")
def test_tables_of_nothing_or_of_other_factors_are_refused() -> None:
    with pytest.raises(OptionError, match="at least one task"):
        condition_table(None, {})
    one = planted("t", plain=0.9, cost=(0.4, 0.1), share=(0.3, 0.3))
    with pytest.raises(OptionError, match="at least two factors"):
        tabulate({"a": one, "b": replace(one, factors=("x", "format"))})
    with pytest.raises(OptionError, match="share their factors"):
        mixed_effects([])
    with pytest.raises(OptionError, match="response"):
        mixed_effects([one], response="speed")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="hold k"):
        mixed_effects([replace(one, parts=("v", "w"))], response="share k")
    frame: Any = long_table([one])
    with pytest.raises(OptionError, match="columns"):
        fit(frame, "value ~ semantics", groups="nobody")
    with pytest.raises(OptionError, match="at least two"):
        fit(frame[frame["query"] == frame["query"].iloc[0]], "value ~ semantics", groups="query")
    with pytest.raises(OptionError, match="finite"):
        fit(frame.assign(value=np.nan), "value ~ semantics", groups="query")


def crossed_margins(
    n: int, effects: tuple[float, float, float], between: float, within: float, seed: int, shift: float = 0.0
) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    query = draw.standard_normal(n) * between
    out = {}
    for k, name in enumerate(CONDITIONS):
        s, f = k // 2, k % 2
        out[name] = shift + query + effects[0] * s + effects[1] * f + effects[2] * s * f + within * draw.standard_normal(n)
    return out | {"zero-shot": draw.standard_normal(n)}


def test_planted_fixed_and_random_effects_come_back() -> None:
    found = []
    for k, (task, model, shift) in enumerate((("a", "m1", 0.0), ("b", "m1", 2.0), ("a", "m2", -1.0), ("b", "m2", 1.0))):
        margins = crossed_margins(80, (-3.0, -1.0, 0.5), 1.0, 0.5, seed=k % 2, shift=shift)  # the same queries in both models
        found.append(planted(task, plain=0.9, cost=(0, 0), share=(0.2, 0.2), n=80, model=model, margins=margins))
    result = mixed_effects(found)
    assert result.converged
    assert not result.boundary
    assert result.n == 4 * 4 * 80
    assert result.n_groups == 160
    truth = {"semantics": -3, "format": -1, "semantics:format": 0.5, "C(task)[T.b]": 2, "C(model)[T.m2]": -1}
    for name, value in truth.items():
        one = result.fixed[name]
        assert one.low - 0.1 < value < one.high + 0.1, name  # four intervals of 95 % at once: a little room
    assert result.p["semantics"] < 1e-6
    (variance,) = result.random.values()
    assert variance == pytest.approx(1.0, rel=0.3)
    assert set(result.to_frame()["term"]) == set(result.fixed)


def test_a_balanced_fit_agrees_with_closed_forms() -> None:
    n = 50
    one = planted("a", plain=0.9, cost=(0, 0), share=(0.2, 0.2), n=n, margins=crossed_margins(n, (-2.0, 1.0, 0.0), 1.5, 1.0, seed=5))
    result = mixed_effects([one])
    y = np.stack([one.margins[name] for name in CONDITIONS], 1)
    assert result.fixed["semantics"].value == pytest.approx((y[:, 2] - y[:, 0]).mean(), abs=1e-4)
    assert result.fixed["format"].value == pytest.approx((y[:, 1] - y[:, 0]).mean(), abs=1e-4)
    residual = y - y.mean(1, keepdims=True) - y.mean(0) + y.mean()
    within = (residual**2).sum() / ((n - 1) * 3)
    between = (4 * ((y.mean(1) - y.mean()) ** 2).sum() / (n - 1) - within) / 4
    assert result.residual == pytest.approx(within, rel=1e-3)
    assert next(iter(result.random.values())) == pytest.approx(between, rel=1e-3)


def test_no_differences_between_queries_are_said_and_a_fit_that_fails_is_not_hidden() -> None:
    draw = np.random.default_rng(0)
    still = {name: draw.standard_normal(40) for name in (*CONDITIONS, "zero-shot")}
    y = np.stack([still[name] for name in CONDITIONS], 1)
    y -= y.mean(1, keepdims=True)  # less alike within a query than chance would make them
    result = mixed_effects(
        [
            planted(
                "a",
                plain=0.9,
                cost=(0, 0),
                share=(0.2, 0.2),
                n=40,
                margins=dict(zip(CONDITIONS, y.T, strict=True)) | {"zero-shot": y[:, 0]},
            )
        ]
    )
    assert result.boundary
    assert any("at nought" in note for note in result.notes)
    constant = pd.DataFrame({"value": np.ones(12), "x": [0.0, 1.0] * 6, "query": list("aabbccddeeff")})
    failed = fit(constant, "value ~ x", groups="query")
    assert not failed.converged
    assert failed.messages
    assert any("did not converge" in note for note in failed.notes)


def test_shares_and_accuracy_have_fits_too() -> None:
    models = [
        factor_shares(
            untrained(positions="rope", seed=s),
            toy_episodes(6, classes=3),
            format="label first",
            task="t",
            progress=False,
            n_permutations=9,
        )
        for s in (0, 1)
    ]
    for response in ("share k", "share v"):
        result = mixed_effects(models, response=response)  # type: ignore[arg-type]
        assert result.n == 2 * 2 * 6
        assert any("factor" in name for name in result.fixed)
    frame = long_table(models, "accuracy")
    assert len(frame) == 2 * 4 * 6
    assert set(frame["semantics"]) == {0.0, 1.0}
