"""Change points: planted jumps are found where they are, flat and noisy curves have none, orders hold only where runs agree."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechicl.analysis.trainings.bands import as_table, at_step, over_runs, runs_estimate, seed_bands
from mechicl.analysis.trainings.change_points import emergence, levels, log_steps, main_change
from mechicl.errors import OptionError
from mechicl.results import Provenance, Series

STEPS = np.array([0, *np.unique(np.geomspace(8, 8000, 39).round())])


def rise(at: float, low: float = 0.1, high: float = 0.9, width: float = 0.15) -> np.ndarray:
    """A sigmoid in log2 of the step, `width` doublings wide."""
    return low + (high - low) / (1 + np.exp(-(log_steps(STEPS) - np.log2(at)) / width))


def runs(n: int, seed: int = 0, sd: float = 0.01, **at: float) -> pd.DataFrame:
    """n runs whose measures jump at the steps `at`, each run's clock being off by up to a third of a doubling."""
    rng = np.random.default_rng(seed)
    frames = []
    for run in range(n):
        late = 2 ** rng.uniform(-0.33, 0.33)
        curves = {name: rise(when * late) + rng.normal(0, sd, len(STEPS)) for name, when in at.items()}
        frames.append(pd.DataFrame({"cell": f"r{run}", "seed": run, "step": STEPS.astype(int), **curves}))
    return pd.concat(frames, ignore_index=True)


@pytest.mark.parametrize("at", [60.0, 500.0, 3000.0])
def test_a_planted_jump_is_found_at_its_step(at: float) -> None:
    noisy = rise(at) + np.random.default_rng(1).normal(0, 0.01, len(STEPS))
    found = main_change(STEPS, noisy)
    assert found is not None
    step, before, after = found
    assert abs(np.log2(step / at)) < 0.15  # half the distance of two measured steps
    assert (before, after) == pytest.approx((0.1, 0.9), abs=0.06)  # the slope's own points pull the levels together


def test_the_big_jump_is_found_behind_a_plateau() -> None:
    """The plateau at the copy-any-label level, then the circuit."""
    curve = rise(40, 0.03, 0.25) + rise(900, 0.0, 0.7)
    found = main_change(STEPS, curve)
    assert found is not None
    assert abs(np.log2(found[0] / 900)) < 0.3
    means = [level.mean for level in levels(curve)]
    assert means == sorted(means)
    assert len(means) >= 3


@pytest.mark.parametrize("seed", range(20))
def test_noise_without_a_jump_has_no_change(seed: int) -> None:
    noise = 0.5 + np.random.default_rng(seed).normal(0, 0.02, len(STEPS))
    assert main_change(STEPS, noise, least=0.0) is None or main_change(STEPS, noise) is None
    assert main_change(STEPS, noise) is None


def test_a_measure_that_falls_first_has_its_rise() -> None:
    """As the attention of labels to their items does: down on the plateau, up when the circuit forms."""
    curve = rise(60, 0.0, -0.06) + rise(1500, 0.12, 0.2)
    found = main_change(STEPS, curve, least=0.02, direction="up")
    assert found is not None
    assert abs(np.log2(found[0] / 1500)) < 0.3
    assert found[2] > found[1]
    assert main_change(STEPS, rise(300, 0.9, 0.1), direction="up") is None
    assert main_change(STEPS, rise(300), direction="up") == main_change(STEPS, rise(300))


def test_a_jump_smaller_than_the_least_does_not_count() -> None:
    assert main_change(STEPS, rise(300, 0.1, 0.15), least=0.1) is None
    assert main_change(STEPS, rise(300, 0.1, 0.15), least=0.02) is not None


@settings(deadline=None, max_examples=25)
@given(at=st.floats(40, 4000), scale=st.floats(0.3, 1.0), start=st.floats(0, 0.5))
def test_a_change_does_not_depend_on_the_units_or_the_direction(at: float, scale: float, start: float) -> None:
    up, down = start + scale * rise(at), start + 1 - scale * rise(at)
    found, mirrored = main_change(STEPS, up), main_change(STEPS, down)
    assert found is not None
    assert mirrored is not None
    assert found[0] == pytest.approx(mirrored[0], rel=1e-6)
    assert abs(np.log2(found[0] / at)) < 0.2


def test_levels_agree_with_exhaustive_search() -> None:
    """PELT against every possible cut, for one change."""
    rng = np.random.default_rng(3)
    values = np.concatenate([rng.normal(0.2, 0.03, 13), rng.normal(0.6, 0.03, 17)])
    cost = [((values[:k] - values[:k].mean()) ** 2).sum() + ((values[k:] - values[k:].mean()) ** 2).sum() for k in range(2, 29)]
    assert [level.stop for level in levels(values, penalty=0.1)] == [int(np.argmin(cost)) + 2, 30]


def test_the_order_of_emergence_is_found_with_intervals() -> None:
    result = emergence(runs(5, ph1_00=200.0, ih_10=800.0, accuracy_ic=850.0))
    assert [p.measure for p in result.points] == ["ph1_00", "ih_10", "accuracy_ic"]
    first = result.points[0]
    assert first.at.low < 200 < first.at.high
    assert first.n_changed == 5
    # the clocks of a run are off together: the paired lead of two doublings is sharp where the steps themselves are not
    assert result.lead[0, 1] == pytest.approx(2.0, abs=0.1)
    assert result.lead_high[0, 1] - result.lead_low[0, 1] < np.log2(first.at.high / first.at.low)
    assert result.lead[1, 0] == pytest.approx(-result.lead[0, 1])
    # 800 against 850 is 0.09 doublings, below the 0.26 between measured steps
    assert result.verdict == "ph1_00 before ih_10; ih_10 no earlier than can be told from accuracy_ic."
    assert 0.2 < result.resolution < 0.35
    assert len(result.to_frame()) == 3


def test_measures_without_a_change_come_last_and_are_named() -> None:
    table = runs(3, ih_10=800.0)
    table["ph1_00"] = 0.06
    result = emergence(table)
    assert np.isnan(result.points[-1].at.value)
    assert result.verdict == "only ih_10 changes. No change in ph1_00."
    assert emergence(table, ["ph1_00"]).verdict == "nothing changes."


def test_opposite_orders_in_different_runs_are_no_order() -> None:
    table = pd.concat([runs(2, 0, a=200.0, b=800.0), runs(2, 1, a=800.0, b=200.0).assign(cell=lambda t: "s" + t["cell"])])
    result = emergence(table)
    assert "no earlier than can be told" in result.verdict
    assert result.lead_low[0, 1] < 0 < result.lead_high[0, 1]


def test_students_interval_covers_with_three_runs_and_the_bootstrap_does_not() -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(0.5, 0.1, (3, 1000))
    shares = {}
    for method in ("student", "bootstrap"):
        _, low, high = over_runs(draws, method, seed=1)  # type: ignore[arg-type]
        shares[method] = ((low <= 0.5) & (high >= 0.5)).mean()
    assert shares["student"] > 0.93  # 0.95 less three standard errors over 1,000 repetitions
    assert shares["bootstrap"] < 0.85


def test_one_run_has_a_mean_and_no_interval() -> None:
    alone = runs_estimate([0.7], unit="probability")
    assert (alone.value, alone.n) == (0.7, 1)
    assert np.isnan(alone.low)
    assert np.isnan(alone.high)
    band = seed_bands(runs(1, a=300.0))
    assert np.isnan(band.low["a"]).all()
    assert np.isnan(emergence(runs(1, a=300.0)).points[0].at.low)


def test_bands_are_the_runs_means_and_count_them() -> None:
    table = runs(4, a=300.0)
    table = table[~((table["cell"] == "r3") & (table["step"] > 1000))]  # stopped early
    band = seed_bands(table, setting="K = 64", n=512)
    assert band.runs["a"].shape == (4, len(STEPS))
    np.testing.assert_allclose(band.values["a"], np.nanmean(band.runs["a"], 0))
    assert (band.n_runs[0], band.n_runs[-1]) == (4, 3)
    assert (band.low["a"] <= band.values["a"]).all()
    assert len(band.to_frame()) == len(STEPS)


def test_a_band_of_shares_stays_within_them() -> None:
    band = seed_bands(runs(3, sd=0.05, accuracy_ic=300.0, ih=300.0).assign(accuracy_ic=lambda t: t["accuracy_ic"].clip(0, 1)))
    assert (band.low["accuracy_ic"] >= 0).all()
    assert (band.high["accuracy_ic"] <= 1).all()


def test_a_series_is_a_run() -> None:
    one = Series(STEPS, {"a": rise(200)}, {}, {}, "probability", 64, Provenance("toy"))
    assert as_table([one, one])["cell"].nunique() == 2
    band = seed_bands([one, one])
    assert (band.n, int(band.n_runs[0])) == (64, 2)


def test_a_run_at_a_step_is_its_last_measurement_by_then() -> None:
    table = runs(2, a=300.0)
    assert at_step(table)["step"].tolist() == [8000, 8000]
    assert (at_step(table, 1000)["step"] <= 1000).all()
    with pytest.raises(OptionError, match="a run was measured"):
        at_step(table, -1)


def test_refusals() -> None:
    with pytest.raises(OptionError, match="at least 4 finite"):
        main_change([0, 1, 2], [0.0, 1.0, 1.0])
    with pytest.raises(OptionError, match="steps must rise"):
        log_steps([3, 2])
    with pytest.raises(OptionError, match="penalty"):
        levels(rise(100), penalty=0.0)
    with pytest.raises(OptionError, match="as many as values"):
        main_change(STEPS[1:], rise(100))
    with pytest.raises(OptionError, match="measure must be one of"):
        emergence(runs(2, a=100.0), ["b"])
    with pytest.raises(OptionError, match="column step"):
        as_table(pd.DataFrame({"a": [1.0]}))
    with pytest.raises(OptionError, match="each step once"):
        as_table(pd.concat([runs(1, a=100.0)] * 2))
    with pytest.raises(OptionError, match="runs must be"):
        as_table("a path")
