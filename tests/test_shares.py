"""Shares of variation: planted parts come back, sums are exact, other ways of computing them agree."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechicl.analysis.shift.shares import arrangements, decompose, gram, ratio_of_sums, shapley_values, source_matrices
from mechicl.errors import EpisodeError, OptionError

NAMES = ("semantics", "format")


def crossed(levels: tuple[int, ...], replicates: int) -> tuple[np.ndarray, np.ndarray]:
    """Design [run, factor] and replicate [run]."""
    combos = list(product(*(range(k) for k in levels)))
    return np.array(combos * replicates), np.repeat(np.arange(replicates), len(combos))


def planted(
    draw: np.random.Generator, design: np.ndarray, sizes: dict[str, float], *, n: int, d: int, base: float = 3.0
) -> tuple[np.ndarray, dict[str, float]]:
    """Shifts [batch, run, d] of a 2 x 2 design from known parts (random directions in every episode), and the parts' exact shares."""
    signs = 1.0 - 2.0 * design
    columns = {"semantics": signs[:, 0], "format": signs[:, 1], "interaction": signs[:, 0] * signs[:, 1]}
    total = base * draw.standard_normal((n, 1, d)).repeat(len(design), 1)
    squares = {}
    for name, column in columns.items():
        direction = draw.standard_normal((n, d))
        direction *= sizes[name] / np.linalg.norm(direction, axis=1, keepdims=True)
        total = total + column[None, :, None] * direction[:, None]
        squares[name] = n * len(design) * sizes[name] ** 2
    noise = draw.standard_normal((n, len(design), d))
    cells = design[:, 0] * 2 + design[:, 1]
    for c in np.unique(cells):  # noise that moves no mean: the parts are exact
        noise[:, cells == c] -= noise[:, cells == c].mean(1, keepdims=True)
    length = np.sqrt((noise**2).sum((1, 2), keepdims=True))
    noise *= np.where(length > 1e-9, sizes["residual"] / np.maximum(length, 1e-9), 0.0) * np.sqrt(len(design))
    squares["residual"] = float((noise**2).sum())
    whole = sum(squares.values())
    return total + noise, {name: value / whole for name, value in squares.items()}


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5), st.integers(3, 40), st.integers(2, 4), st.integers(0, 10_000),
    st.tuples(*(st.floats(0.1, 3) for _ in range(4))),
)  # fmt: skip
def test_planted_parts_come_back(n: int, d: int, replicates: int, seed: int, sizes: tuple[float, ...]) -> None:
    design, blocks = crossed((2, 2), replicates)
    values, truth = planted(
        np.random.default_rng(seed), design, dict(zip((*NAMES, "interaction", "residual"), sizes, strict=True)), n=n, d=d
    )
    found = decompose(values, design, NAMES, blocks=blocks, n_permutations=9)
    assert found.sources == (*NAMES, "interaction", "residual")
    for name, share in truth.items():
        assert found.shares[name] == pytest.approx(share, abs=1e-10)  # double precision
        assert found.low[name] - 1e-12 <= found.shares[name] <= found.high[name] + 1e-12


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(2, 3), min_size=1, max_size=3), st.integers(1, 3), st.integers(0, 1000), st.sampled_from(["apart", "shared"]))
def test_shares_sum_to_one_whatever_the_vectors(levels: list[int], replicates: int, seed: int, how: str) -> None:
    design, blocks = crossed(tuple(levels), replicates)
    values = np.random.default_rng(seed).standard_normal((3, len(design), 2, 5))
    names = [f"f{k}" for k in range(len(levels))]
    found = decompose(values, design, names, blocks=blocks, interactions=how, n_permutations=9)  # type: ignore[arg-type]
    total = np.sum([found.shares[name] for name in found.sources], 0)
    np.testing.assert_allclose(total, 1, atol=1e-12)
    assert all((share >= 0).all() for share in found.shares.values())
    if replicates == 1:
        np.testing.assert_allclose(found.shares["residual"], 0, atol=1e-12)
    if how == "shared" or len(levels) == 1:
        np.testing.assert_allclose(found.shares["interaction"], 0, atol=1e-12)


def test_a_balanced_design_gives_the_classical_analysis_of_variance() -> None:
    import statsmodels.formula.api as smf
    from statsmodels.stats.anova import anova_lm

    draw = np.random.default_rng(3)
    design, _ = crossed((2, 3), 3)
    y = draw.standard_normal(len(design)) + design[:, 0]
    found = decompose(y[None, :, None], design, ("a", "b"), n_permutations=9)
    table = anova_lm(smf.ols("y ~ C(a) * C(b)", pd.DataFrame({"y": y, "a": design[:, 0], "b": design[:, 1]})).fit())
    for name, row in {"a": "C(a)", "b": "C(b)", "interaction": "C(a):C(b)", "residual": "Residual"}.items():
        assert found.squares[name][0] == pytest.approx(table.loc[row, "sum_sq"], abs=1e-10)


def test_an_unbalanced_design_gives_shapley_values_of_r2() -> None:
    draw = np.random.default_rng(4)
    design = np.array([[0, 0, 0], [1, 0, 1], [1, 1, 0], [0, 1, 1], [1, 1, 1], [1, 0, 0], [0, 0, 1]])
    y = draw.standard_normal((1, len(design), 4))

    def r2(some: tuple[int, ...]) -> float:
        x = np.column_stack([np.ones(len(design)), *(design[:, k] for k in some)])
        fitted = x @ np.linalg.lstsq(x, y[0], rcond=None)[0]
        return float(((fitted - y[0].mean(0)) ** 2).sum() / ((y[0] - y[0].mean(0)) ** 2).sum())

    found = decompose(y, design, ("a", "b", "c"), n_permutations=9)
    np.testing.assert_allclose([found.shares[name] for name in "abc"], shapley_values(r2, 3), atol=1e-12)
    assert sum(found.shares[name] for name in "abc") == pytest.approx(r2((0, 1, 2)))


def test_a_format_only_change_has_no_semantic_share_against_its_null() -> None:
    draw = np.random.default_rng(5)
    design, blocks = crossed((2, 2), 2)
    ps = []
    for _ in range(60):
        form = draw.standard_normal((12, 1, 8))
        values = (1 - 2 * design[None, :, 1, None]) * form + 0.5 * draw.standard_normal((12, len(design), 8))
        found = decompose(values, design, NAMES, blocks=blocks, n_permutations=199)
        assert found.p["format"] == 1 / 200
        assert found.shares["semantics"] < 0.1
        assert found.shares["semantics"] == pytest.approx(found.null["semantics"], rel=0.6)
        ps.append(float(found.p["semantics"]))
    assert 0.35 < np.mean(ps) < 0.65  # uniform under the null: the mean of 60 is 0.5 +- 0.037
    assert np.mean(np.array(ps) < 0.05) < 0.15


def test_a_weak_semantic_part_is_found() -> None:
    draw = np.random.default_rng(6)
    design, blocks = crossed((2, 2), 2)
    values = 0.5 * (1 - 2 * design[None, :, 0, None]) * draw.standard_normal((12, 1, 8)) + draw.standard_normal((12, len(design), 8))
    found = decompose(values, design, NAMES, blocks=blocks, n_permutations=999)
    assert found.p["semantics"] < 0.01 < found.p["format"]


def test_what_all_runs_share_plays_no_part() -> None:
    draw = np.random.default_rng(7)
    design, _ = crossed((2, 2), 2)
    values = draw.standard_normal((4, len(design), 3, 6))
    shifted = values + 100 * draw.standard_normal((4, 1, 3, 6))
    a, b = (decompose(x, design, NAMES, n_permutations=9) for x in (values, shifted))
    for name in a.sources:
        np.testing.assert_allclose(a.shares[name], b.shares[name], atol=1e-8)  # 100 times larger Gram matrices


def test_exchanges_stay_inside_their_strata() -> None:
    design, blocks = crossed((2, 2), 2)
    ways = arrangements(design, 0, blocks)
    assert len(ways) == 16  # two replicates x two forms, each kept or exchanged
    assert (ways[0] == np.arange(8)).all()
    assert (design[ways][..., 1] == design[None, :, 1]).all()
    assert (blocks[ways] == blocks).all()
    assert len(np.unique(ways, axis=0)) == 16
    many = arrangements(np.repeat(np.arange(2), 8)[:, None], 0)
    assert len(many) == 64
    unreplicated = np.array([[0, 0], [1, 1], [0, 2]])
    assert len(arrangements(unreplicated, 0)) == 1


def test_intervals_cover_the_share() -> None:
    draw = np.random.default_rng(8)
    design, _ = crossed((2, 2), 2)
    covered = 0
    for seed in range(60):
        # semantic effects of random sizes with mean square 1 per direction, noise 1: the share of a large sample is the truth
        size = draw.gamma(4, 0.25, (30, 1, 1))
        values = (1 - 2 * design[None, :, 0, None]) * size * draw.standard_normal((30, 1, 10)) + draw.standard_normal((30, len(design), 10))
        found = decompose(values, design, NAMES, n_permutations=1, seed=seed)
        expected = (8 * 1.25 + 1) / (8 * 1.25 + 7)  # E size^2 = 1.25; every degree of freedom of the noise adds 1
        covered += bool(found.low["semantics"] <= expected <= found.high["semantics"])
    assert covered >= 50  # 95 % of 60 is 57; the percentile bootstrap is a little narrow


def test_still_cells_have_no_shares() -> None:
    design, _ = crossed((2, 2), 1)
    values = np.zeros((3, 4, 2, 5))
    values[:, :, 1] = np.random.default_rng(0).standard_normal((3, 4, 5))
    found = decompose(values, design, NAMES, n_permutations=9)
    assert all(np.isnan(found.shares[name][0]) and not np.isnan(found.shares[name][1]) for name in found.sources)
    assert np.isnan(found.p["format"][0])
    assert np.isnan(found.low["format"][0])
    assert len(found.to_frame()) == 8


@pytest.mark.usefixtures("untyped")
def test_designs_that_cannot_be_split_are_refused() -> None:
    values = np.zeros((2, 4, 3))
    good, _ = crossed((2, 2), 1)
    with pytest.raises(OptionError, match="two levels"):
        decompose(values, np.array([[0, 0], [0, 1], [0, 0], [0, 1]]), NAMES)
    with pytest.raises(OptionError, match="told apart"):
        decompose(values, np.array([[0, 0], [1, 1], [0, 0], [1, 1]]), NAMES)
    with pytest.raises(OptionError, match="a name for each factor"):
        source_matrices(good, ("one",))
    with pytest.raises(OptionError, match="axis of runs"):
        decompose(values[:, :3], good, NAMES)
    with pytest.raises(OptionError, match="n_permutations"):
        decompose(values, good, NAMES, n_permutations=0)
    with pytest.raises(EpisodeError, match="an episode"):
        decompose(values[:0], good, NAMES)


def test_gram_and_ratio_agree_with_the_long_way() -> None:
    draw = np.random.default_rng(9)
    x = draw.standard_normal((3, 4, 2, 5))
    np.testing.assert_allclose(gram(x), np.einsum("erhd,eshd->ehrs", x, x))
    above, below = draw.random((5, 1500)), draw.random((5, 1500)) + 1
    low, high = ratio_of_sums(above, below, n_draws=200, seed=1)
    counts = np.random.default_rng(1).multinomial(5, np.full(5, 0.2), size=200)
    np.testing.assert_allclose(low, np.quantile((counts @ above) / (counts @ below), 0.025, axis=0))
    assert (low <= high).all()
