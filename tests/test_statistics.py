"""Intervals and tests against scipy, statsmodels and hand computation."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mechicl.analysis.statistics import (
    benjamini_hochberg,
    bootstrap_interval,
    difference_p,
    holm,
    mcnemar_p,
    mean_estimate,
    outlier_p,
    paired_change,
    permutation_p,
    wilson,
)
from mechicl.errors import OptionError


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (7, 10), (95, 100)])
def test_wilson_is_scipys_wilson(right: int, n: int) -> None:
    found = wilson([True] * right + [False] * (n - right))
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert (found.value, found.n) == (right / n, n)
    assert found.low == pytest.approx(expected.low, abs=1e-12)
    assert found.high == pytest.approx(expected.high, abs=1e-12)


def test_no_episode_gives_nan_and_not_an_error() -> None:
    assert np.isnan(wilson([]).value)
    assert np.isnan(mean_estimate([], unit="nats").value)
    low, high = bootstrap_interval(np.zeros((0, 3)))
    assert np.isnan(low).all()
    assert low.shape == high.shape == (3,)


def test_the_bootstrap_agrees_with_scipys() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=40)
    low, high = bootstrap_interval(values, n_draws=20_000)
    expected = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    # Monte Carlo error of a quantile with 20,000 draws of a mean with standard error 0.2
    assert low == pytest.approx(expected.low, abs=0.02)
    assert high == pytest.approx(expected.high, abs=0.02)


def test_the_bootstrap_covers_the_true_mean_about_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(size=(50, 400))  # 400 experiments of 50 episodes, done at once
    low, high = bootstrap_interval(draws, n_draws=1000)
    covered = ((low <= 0) & (high >= 0)).mean()
    assert 0.90 <= covered <= 0.98  # percentile intervals are a little short at n = 50


def test_episodes_that_do_not_count_change_nothing() -> None:
    values = np.random.default_rng(0).normal(size=(30, 2))
    padded = np.concatenate([values, np.full((10, 2), np.nan)])
    assert mean_estimate(padded[:, 0], unit="").value == pytest.approx(values[:, 0].mean())
    low, high = bootstrap_interval(padded, n_draws=4000)
    plain = bootstrap_interval(values, n_draws=4000)
    assert low == pytest.approx(plain[0], abs=0.05)  # the same distribution, drawn differently
    assert high == pytest.approx(plain[1], abs=0.05)
    assert np.isnan(bootstrap_interval(np.full((3, 1), np.nan))[0]).all()


def test_a_paired_change_is_certain_where_unpaired_intervals_overlap() -> None:
    before = np.random.default_rng(0).normal(size=60) * 10
    change = paired_change(before, before - 0.1, unit="nats")
    assert change.value == pytest.approx(-0.1)
    assert change.high == pytest.approx(-0.1, abs=1e-9)
    with pytest.raises(OptionError, match="same episodes"):
        paired_change(before, before[:-1], unit="nats")


def test_mcnemar_is_the_exact_binomial_test_of_the_changed_answers() -> None:
    before = [True] * 12 + [False] * 3 + [True] * 20
    after = [False] * 12 + [True] * 3 + [True] * 20
    assert mcnemar_p(before, after) == pytest.approx(stats.binomtest(12, 15).pvalue)
    assert mcnemar_p(before, before) == 1.0
    with pytest.raises(OptionError, match="same episodes"):
        mcnemar_p(before, after[:-1])


def test_corrections_leave_nan_out_and_match_the_hand_computation() -> None:
    p = np.array([[0.01, np.nan], [0.04, 0.03]])
    assert holm(p) == pytest.approx(np.array([[0.03, np.nan], [0.06, 0.06]]), nan_ok=True)
    assert benjamini_hochberg(p) == pytest.approx(np.array([[0.03, np.nan], [0.04, 0.04]]), nan_ok=True)
    assert np.isnan(holm(np.full(3, np.nan))).all()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
@settings(deadline=None)
def test_holm_never_lowers_a_p_value_and_keeps_their_order(p: list[float]) -> None:
    corrected = holm(p)
    assert (corrected >= np.array(p) - 1e-12).all()
    assert (corrected <= 1).all()
    assert (np.diff(corrected[np.argsort(p, kind="stable")]) >= -1e-12).all()


def test_a_permutation_p_is_never_zero() -> None:
    assert permutation_p([1.0, np.nan], [0, 0], 99) == pytest.approx([0.01, np.nan], nan_ok=True)
    assert permutation_p(1.0, 99, 99) == 1.0


def test_one_place_among_like_places_is_called_an_outlier_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(size=(1, 9, 4000))
    p, bound = outlier_p(draws[:, 0], draws[:, 1:])
    assert (p < 0.05).mean() == pytest.approx(0.05, abs=0.012)  # four standard errors of 4,000 tests
    above = np.exp(draws[0, 0] - draws[0, 1:].mean(0)) > bound
    assert above.mean() == pytest.approx(0.025, abs=0.01)


def test_readers_that_share_a_preference_do_not_add_evidence() -> None:
    """Every reader prefers the same place by accident: with readers taken as independent this would be significant far too often."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(1, 9, 2000)).repeat(6, 0) + 0.01 * rng.normal(size=(6, 9, 2000))
    p, _ = outlier_p(shared[:, 0], shared[:, 1:])
    assert (p < 0.05).mean() <= 0.08  # a little over 5 %: sharing also overstates the degrees of freedom
    independent = outlier_p(rng.normal(size=(6, 2000)), rng.normal(size=(6, 8, 2000)))[0]
    assert (independent < 0.05).mean() < 0.01  # and far below it where readers do not share


def test_an_outlier_needs_two_places_to_compare() -> None:
    p, bound = outlier_p(np.zeros((1, 1)), np.zeros((1, 1, 1)))
    assert np.isnan(p).all()
    assert np.isnan(bound).all()


def test_the_difference_of_two_kinds_of_places_is_students_test() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, 1, size=(8, 5)), rng.normal(size=(7, 5))
    p, _ = difference_p(a, b)
    expected: Any = stats.ttest_ind(a, b, alternative="greater")
    assert p == pytest.approx(expected.pvalue)
