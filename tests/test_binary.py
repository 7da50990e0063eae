"""Two-label measures: against scikit-learn, and their intervals against a bootstrap by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, roc_auc_score

from mechicl.analysis.examples.binary import Marked, auroc, f1, measure
from mechicl.errors import OptionError


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30).filter(lambda rows: len({y for _, y in rows}) == 2))
def test_measures_are_scikit_learns(rows: list[tuple[int, bool]]) -> None:
    scores, truth = np.array([float(x) for x, _ in rows]), np.array([y for _, y in rows])
    assert auroc(scores, truth) == pytest.approx(roc_auc_score(truth, scores))
    if (scores > 0).any():
        assert f1(scores > 0, truth) == pytest.approx(f1_score(truth, scores > 0))


def test_intervals_are_those_of_a_bootstrap_by_hand_and_differences_are_paired() -> None:
    draw = np.random.default_rng(0)
    truth = draw.random(60) < 0.5
    scores = truth + draw.standard_normal(60)
    ways = {
        "a": Marked(scores, scores > 0.5, truth),
        "b": Marked(scores + 0.01, scores > 0.5, truth),
        "c": Marked(-scores, scores < 0.5, truth),
    }
    found = measure(ways, baseline="a", seed=1)
    by_hand = []
    for _ in range(600):
        pick = draw.integers(0, 60, 60)
        by_hand.append(roc_auc_score(truth[pick], scores[pick]))
    own = found["a"].values["auroc"]
    assert (own.low, own.high) == pytest.approx(
        tuple(np.quantile(by_hand, [0.025, 0.975])), abs=0.03
    )  # two bootstraps, 600 and 2,000 draws
    assert own.n == 60
    same = found["b"].changes["auroc"]
    assert same is not None
    assert (same.value, same.low, same.high) == (0, 0, 0)  # what does not change the order changes no resample
    other = found["c"].changes["auroc"]
    assert other is not None
    assert other.value == pytest.approx(1 - 2 * own.value)
    assert found["a"].changes["auroc"] is None
    assert np.isnan(auroc([1.0, 2.0], [True, True]))
    assert np.isnan(f1([False], [False]))
    with pytest.raises(OptionError):
        measure({"a": ways["a"], "b": Marked(scores[:5], scores[:5] > 0, truth[:5])})
    with pytest.raises(OptionError):
        measure({"a": ways["a"], "b": Marked(scores, scores > 0, ~truth)})
