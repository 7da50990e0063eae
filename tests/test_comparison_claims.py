"""'The larger model's heads are better' can fail: more heads of the same kind are not better ones, and planted better heads are found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import unchecked
from hypothesis import given, settings
from hypothesis import strategies as st

from mechicl.analysis.comparison.compare import compare
from mechicl.analysis.comparison.improve import cut_weights, heads_improve, held_out, held_out_by, improvement
from mechicl.errors import OptionError
from mechicl.models.planted import planted_induction, untrained
from mechicl.models.toys.prompts import toy_episodes
from mechicl.results import Provenance, Score
from mechicl.views.plots import plot

MADE = (Provenance("A"), Provenance("B"))


def score(draw: np.random.Generator, shape: tuple[int, int], *, shift: float = 0.0, n: int = 24) -> Score:
    """Heads of one long-tailed kind, plus `shift`, measured with noise on n episodes."""
    heads = draw.gamma(1.0, 0.1, shape) + shift
    table = heads + draw.normal(0, 0.05, (n, *shape))
    blank = np.full(shape, np.nan)
    return Score("induction", "", "probability", table.mean(0), blank, blank, blank, blank, blank, blank, table)


def test_more_heads_of_the_same_kind_are_not_called_better() -> None:
    found = []
    for seed in range(20):
        draw = np.random.default_rng(seed)
        found.append(improvement(score(draw, (4, 8)), score(draw, (8, 16)), ("A", "B"), provenance=MADE))
    assert np.mean([one.raw.low > 0 for one in found]) > 0.8  # the naive claim would nearly always be made
    assert sum(one.finding == "better" for one in found) <= 3  # binomial(20, .05) exceeds 3 in 2 of 100 draws
    assert 0.25 < np.mean([one.p_heads for one in found]) < 0.75
    assert abs(np.mean([one.equal_number.value for one in found])) < 0.04
    assert np.mean([one.by_number for one in found]) == pytest.approx(np.mean([one.raw.value for one in found]), abs=0.03)
    assert any("as the best of more heads would" in one.verdict for one in found)


def test_better_heads_are_found_both_ways_round() -> None:
    draw = np.random.default_rng(0)
    plain, good = score(draw, (4, 8)), score(draw, (8, 16), shift=0.3)
    up, down = improvement(plain, good, ("A", "B"), provenance=MADE), improvement(good, plain, ("B", "A"), provenance=MADE)
    assert up.finding == "better"
    assert up.equal_number.low > 0.15
    assert up.p_heads < 0.01
    assert down.finding == "worse"
    assert down.raw.value == pytest.approx(-up.raw.value)
    assert down.equal_number.value == pytest.approx(-up.equal_number.value)
    same = improvement(plain, plain, ("A", "A again"), provenance=MADE)
    assert same.raw.value == same.raw.low == same.raw.high == same.equal_number.value == 0
    assert same.finding == "no difference shown"
    assert len(up.to_frame()) == 3
    shown: Any = plot(up)
    np.testing.assert_array_equal(shown.data[0].x, [up.raw.value, up.equal_number.value, up.equal_share.value])


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.data())
def test_the_cut_to_fewer_heads_is_the_average_over_all_cuts(n: int, data: Any) -> None:
    m = data.draw(st.integers(1, n))
    k = data.draw(st.integers(1, m))
    weights = cut_weights(n, m, k)
    assert weights.sum() == pytest.approx(1)
    assert (np.diff(weights) <= 1e-12).all()
    if m == n:
        np.testing.assert_allclose(weights, (np.arange(n) < k) / k)
    draw = np.random.default_rng(n * m + k)
    values = np.sort(draw.normal(size=n))[::-1]
    cuts = [np.sort(draw.choice(values, m, replace=False))[::-1][:k].mean() for _ in range(400)]
    assert weights @ values == pytest.approx(np.mean(cuts), abs=float(5 * np.std(cuts) / 20 + 1e-9))


def test_heads_are_measured_on_episodes_that_did_not_choose_them() -> None:
    draw = np.random.default_rng(2)
    noise = draw.normal(size=(40, 200))
    weights = (np.arange(200) < 3) / 3
    assert np.sort(noise.mean(0))[-3:].mean() > 0.3  # the best of 200 heads of nothing, on their own episodes
    assert abs(held_out(noise, weights).mean()) < 0.2
    np.testing.assert_allclose(held_out(noise, weights), held_out_by(noise, noise, 3), atol=1e-12)


def test_two_models_or_their_comparison_say_the_same() -> None:
    episodes = toy_episodes(12, classes=3, shots=2)
    small, large = untrained(n_layers=2, n_heads=3), planted_induction(n_heads=4, n_matching=2).model
    options: dict[str, Any] = {"progress": False, "n_null": 10}
    direct = heads_improve(small, large, episodes, top=2, **options)
    kept = compare(small, large, episodes, scores=("induction", "sink"), accuracy=False, **options)
    again = heads_improve(kept, top=2)
    assert direct.finding == again.finding == "better"
    assert direct.raw.value == again.raw.value > 0.5
    assert direct.n_heads == (6, 8)
    assert "Two models, one training each" in str(direct)
    with unchecked():
        with pytest.raises(OptionError, match="something is missing"):
            heads_improve(small)
        with pytest.raises(OptionError, match="no 'ila'"):
            heads_improve(kept, score="ila")
        with pytest.raises(OptionError, match=r"top must be in 1\.\.6"):
            heads_improve(kept, top=7)
