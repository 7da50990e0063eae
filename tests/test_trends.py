"""Correlations and the forest over models: planted links are found, unlinked ones are not, seeds of one setting are not evidence between settings."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mechicl.analysis.trainings.bands import over_runs
from mechicl.analysis.trainings.trends import correlations, forest, models
from mechicl.errors import OptionError


def table(n_settings: int = 24, n_seeds: int = 3, seed: int = 0, link: float = 1.0) -> pd.DataFrame:
    """A sweep's table in which `ih_1.0` goes with the outcome (`link` of it), `ph1_0.0` is noise and `tla_1.0` has the setting's level but not the outcome's."""
    rng = np.random.default_rng(seed)
    rows = []
    for setting in range(n_settings):
        strength, level = rng.random(), rng.random()
        for s in range(n_seeds):
            ih = float(np.clip(strength + rng.normal(0, 0.05), 0, 1))
            end = {"accuracy_ic": link * ih + (1 - link) * rng.random() + rng.normal(0, 0.03), "accuracy_iw": rng.random(), "cla_ic": ih**2,
                   "ih_1.0": ih, "ph1_0.0": rng.random(), "tla_1.0": level + rng.normal(0, 0.02)}  # fmt: skip
            common = {
                "cell": f"c{setting}-{s}",
                "preset": "cpu",
                "seed": s,
                "K": 2**setting,
                "positions": "rope" if setting % 2 else "alibi",
            }
            rows.append(common | {"step": 0, "loss": 3.4} | dict.fromkeys(end, 0.03) | {"ih_1.0": rng.random() / 100})
            rows.append(common | {"step": 100, "loss": 0.4} | end)
    return pd.DataFrame(rows)


def test_models_are_the_last_step_of_each_run_grouped_by_setting() -> None:
    frame, target, group = models(table(6, 3))
    assert list(frame.columns) == ["cla_ic", "ih_1.0", "ph1_0.0", "tla_1.0"]
    assert (len(frame), len(target), len(np.unique(group))) == (18, 18, 6)
    assert target.min() > -0.2
    assert np.bincount(group).tolist() == [3] * 6


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
def test_a_planted_link_is_found_and_noise_is_not(kind: str) -> None:
    found = correlations(table(), kind=kind, n_draws=500)  # type: ignore[arg-type]
    frame, target, _ = models(table())
    function = stats.spearmanr if kind == "spearman" else stats.pearsonr
    for name, estimate in found.value.items():
        assert estimate.value == pytest.approx(float(function(frame[name], target)[0]), abs=1e-12)
        assert estimate.low <= estimate.value <= estimate.high
    assert found.value["ih_1.0"].low > 0.8
    assert found.p_corrected["ih_1.0"] < 0.01
    assert found.p_corrected["ph1_0.0"] > 0.05
    assert found.p_corrected["tla_1.0"] > 0.05
    assert (found.n_runs, found.n_settings) == (72, 24)
    assert found.to_frame()["measure"][0] in ("ih_1.0", "cla_ic")


def test_seeds_of_few_settings_are_not_evidence_between_settings() -> None:
    """A measure and an outcome that both only know the setting: with 6 settings of 20 seeds the naive test is fooled, ours is right 95 times in 100."""
    naive, ours, covers = [], [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        levels = rng.normal(size=(6, 2))
        group = np.repeat(np.arange(6), 20)
        noise = rng.normal(0, 0.1, (120, 2))
        rows = pd.DataFrame({"cell": [f"c{i}" for i in range(120)], "seed": np.tile(np.arange(20), 6), "K": group, "step": 1,
                             "accuracy_ic": levels[group, 0] + noise[:, 0], "m": levels[group, 1] + noise[:, 1]})  # fmt: skip
        naive.append(stats.pearsonr(rows["accuracy_ic"], rows["m"])[1] < 0.05)
        found = correlations(rows, kind="pearson", n_draws=200)
        ours.append(found.p["m"] < 0.05)
        covers.append(found.value["m"].low < 0 < found.value["m"].high)
    assert np.mean(naive) > 0.5
    assert np.mean(ours) <= 0.17  # 0.05 plus three standard errors over 30 tables
    assert np.mean(covers) > 0.65  # a bootstrap over 6 settings is narrow, the permutation test is what decides


def test_early_measures_against_the_late_outcome() -> None:
    early = correlations(table(), at=50, n_draws=200)
    assert early.p_corrected["ih_1.0"] > 0.05
    assert early.measured.startswith("at step 50")
    assert {skipped.episode for skipped in early.skipped} == {"cla_ic", "ph1_0.0", "tla_1.0"}  # constant at step 0
    with pytest.raises(OptionError, match="at must be a step"):
        correlations(table(), at=-1)


def test_missing_measures_are_left_out_model_by_model() -> None:
    rows = table(10, 2)
    rows["ila_0.0"] = rows["ih_1.0"].where(rows["K"] > 2)
    rows["rare"] = rows["ih_1.0"].where(rows["K"] > 2**8)
    found = correlations(rows, n_draws=100)
    assert found.value["ila_0.0"].n == 16
    assert [s.episode for s in found.skipped] == ["rare"]


def test_settings_that_a_sweep_did_not_vary_are_a_setting_of_their_own() -> None:
    rows = table(10, 2)
    rows["eps"] = rows["K"].where(rows["K"] > 2**4).astype(float)
    rows["positions"] = rows["positions"].where(rows["K"] > 2**4)
    assert len(np.unique(models(rows)[2])) == 10


def test_a_model_in_two_sweeps_counts_once() -> None:
    rows = table(8, 2)
    assert len(models(pd.concat([rows, rows]))[0]) == 16


def test_the_forest_predicts_unseen_settings_and_its_control_does_not() -> None:
    found = forest(table(), n_trees=15, n_repeats=1, n_shuffled=19)
    assert found.r2.low > 0.6
    assert found.p == pytest.approx(0.05)
    assert found.shuffled.max() < 0.3
    best = found.to_frame()["measure"][0]
    assert best in ("ih_1.0", "cla_ic")
    assert found.importance["ph1_0.0"].value < 0.02
    again = forest(table(), n_trees=15, n_repeats=1, n_shuffled=19)
    assert again.r2.value == found.r2.value


def test_the_forest_finds_nothing_where_nothing_is() -> None:
    found = forest(table(link=0.0), n_trees=15, n_repeats=1, n_shuffled=19)
    assert found.r2.value < 0.2
    assert found.p > 0.05


@pytest.mark.usefixtures("untyped")
def test_refusals() -> None:
    rows = table(6, 2)
    with pytest.raises(OptionError, match="it lacks 'accuracy'"):
        correlations(rows, "accuracy")
    with pytest.raises(OptionError, match="at least 5 settings"):
        correlations(table(3, 5))
    with pytest.raises(OptionError, match="n_folds must be"):
        forest(rows, n_folds=9)
    with pytest.raises(OptionError, match="kind must be one of"):
        correlations(rows, kind="kendall")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="method must be one of"):
        over_runs(np.zeros((3, 2)), "jackknife")  # type: ignore[arg-type]
