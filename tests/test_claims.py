"""Claims held against a sweep: planted effects hold, their opposites do not, and what the seeds do not agree on is not shown."""

import numpy as np
import pandas as pd
import pytest

from mechicl.analysis.ablation.knockouts import table_of
from mechicl.analysis.trainings.claims import around, base_of, by_seed, claim, difference, paired, rows, slope, threshold, verdict_table
from mechicl.analysis.trainings.trends import pooled
from mechicl.errors import OptionError
from mechicl.results import Estimate, KnockOut, KnockOutTable


def table(n_seeds: int = 4, effect: float = 0.3, sd: float = 0.02) -> pd.DataFrame:
    """ICL rises by 0.1 per doubling of K from 256, alibi is `effect` above rope; a second design varies B at K = 1024. Seeds shift everything."""
    rng = np.random.default_rng(0)
    made = []
    for seed in range(n_seeds):
        shift = rng.normal(0, 0.2)
        points = [(k, code, 4) for k in (256, 512, 1024, 2048) for code in ("rope", "alibi")] + [(1024, "rope", b) for b in (1, 2)]
        for k, code, b in points:
            icl = 0.1 * np.log2(k / 256) + effect * (code == "alibi") + 0.05 * b + shift + rng.normal(0, sd)
            common = {
                "cell": f"{k}{code}{b}{seed}",
                "preset": "cpu",
                "seed": seed,
                "K": k,
                "positions": code,
                "B": b,
                "start": None if b == 4 else "runs/a",
            }
            made += [common | {"step": 0, "accuracy_ic": 9.0}, common | {"step": 50, "accuracy_ic": icl}]
    return pd.DataFrame(made)


def test_a_difference_is_paired_by_seed() -> None:
    """Seeds differ by 0.2 and more, the effect within a seed is sharp all the same."""
    found = difference(table(), "accuracy_ic", {"positions": "rope", "B": 4}, {"positions": "alibi"})
    assert found.value == pytest.approx(0.3, abs=0.03)
    assert found.high - found.low < 0.1
    assert found.n == 4
    assert by_seed(table(), "accuracy_ic", {"positions": "rope"}).std() > 0.05


def test_findings_follow_from_the_numbers_alone() -> None:
    codes = ({"positions": "rope", "B": 4}, {"positions": "alibi"})
    up = claim("alibi is above rope", difference(table(), "accuracy_ic", *codes))
    down = claim("rope is above alibi", difference(table(), "accuracy_ic", *codes[::-1]))
    none = claim("alibi is above rope", difference(table(effect=0.0), "accuracy_ic", *codes))
    assert [c.finding for c in (up, down, none)] == ["holds", "does not hold", "not shown"]
    assert str(up).startswith("HOLDS")
    assert "n = 4 seeds" in str(up)
    assert claim("by far", up.evidence, bar=0.9).finding == "does not hold"
    assert claim("one seed", difference(table(1), "accuracy_ic", *codes)).finding == "not shown"
    assert verdict_table([up, none])["finding"].tolist() == ["holds", "not shown"]


def test_a_main_effect_pairs_runs_that_are_alike_in_everything_else() -> None:
    grid = rows(table(2), {"B": 4}).drop(columns=["B", "start"])
    found = paired(grid, "accuracy_ic", "positions", "rope", "alibi")
    assert found.value == pytest.approx(0.3, abs=0.03)
    assert found.n == 8  # four K, two seeds
    assert "n = 8 pairs" in str(claim("alibi", found))
    with pytest.raises(OptionError, match="differ in B alone"):
        paired(grid.assign(B=grid["K"]), "accuracy_ic", "B", 256, 512)


def test_a_slope_is_per_doubling_within_seeds() -> None:
    found = slope(rows(table(), {"positions": "rope", "B": 4}), "K", "accuracy_ic")
    assert found.value == pytest.approx(0.1, abs=0.015)
    assert found.low < 0.1 < found.high
    assert slope(around(table(), "B", {"K": 1024, "positions": "rope"}), "B", "accuracy_ic", log=False).value == pytest.approx(
        0.05, abs=0.02
    )


def test_the_base_of_a_one_at_a_time_design_is_found() -> None:
    base = base_of(table())
    assert (base["positions"], base["B"], base["start"]) == ("rope", 4, None)
    along = around(table(), "B", {"K": 1024, "positions": "rope"})
    assert sorted(along["B"].unique()) == [1, 2, 4]


def test_a_threshold_is_interpolated_and_knows_its_ends() -> None:
    steady = table(3, sd=0.0)
    each = by_seed(steady, "accuracy_ic", {"positions": "rope", "K": 256, "B": 4})
    own = rows(steady, {"positions": "rope", "B": 4})
    shifted = own.assign(accuracy_ic=own["accuracy_ic"] - own["seed"].map(each))
    assert threshold(shifted, "K", "accuracy_ic", 0.15).to_list() == pytest.approx([2**9.5] * 3)
    assert threshold(shifted, "K", "accuracy_ic", -1.0).to_list() == [0.0] * 3
    assert np.isinf(threshold(shifted, "K", "accuracy_ic", 2.0)).all()


def test_rows_find_missing_settings_and_several_values() -> None:
    found = rows(table(), {"start": None, "K": (256, 512)})
    assert set(found["B"]) == {4}
    assert set(found["K"]) == {256, 512}


def test_pooled_sweeps_keep_settings_before_measures_and_count_shared_models_once() -> None:
    one = table(2)
    other = one.drop(columns="positions").assign(eps=0.5, ila=0.1)
    other.loc[other["K"] > 256, "cell"] += "x"
    both = pooled([one, other[["cell", "preset", "seed", "K", "B", "eps", "step", "accuracy_ic", "ila"]]])
    columns = list(both.columns)
    assert columns.index("eps") < columns.index("step") < columns.index("ila")
    assert both["cell"].nunique() == one["cell"].nunique() + (other["K"] > 256).sum() // 2


def test_a_saved_knock_out_table_comes_back_as_the_mean_over_models() -> None:
    frames = []
    for value in (0.9, 0.7):
        e = Estimate(value, value - 0.1, value + 0.1, 64)
        one = KnockOutTable((KnockOut("intact", "intact", e, e, e),), 0.03, 0.5, 64, 1, "zero", "")
        frames.append(one.to_frame().assign(chance=0.03, copy=0.5, how="zero", note=""))
    back = table_of(pd.concat(frames))
    assert back["intact"].accuracy.value == pytest.approx(0.8)
    assert (back.n_models, back.n) == (2, 64)
    with pytest.raises(OptionError, match="it lacks 'chance'"):
        table_of(one.to_frame())


def test_refusals() -> None:
    with pytest.raises(OptionError, match="a setting must be a column"):
        rows(table(), {"L": 32})
    with pytest.raises(OptionError, match="no run has"):
        rows(table(), {"K": 3})
    with pytest.raises(OptionError, match="at least two values"):
        slope(rows(table(), {"K": 256}), "K", "accuracy_ic")
    with pytest.raises(OptionError, match="above 0"):
        slope(table().assign(K=0), "K", "accuracy_ic")
    with pytest.raises(OptionError, match="must have a column 'cla'"):
        by_seed(table(), "cla")
    shared = table(2)
    shared.loc[shared["positions"] == "alibi", "seed"] += 10
    with pytest.raises(OptionError, match="share seeds"):
        difference(shared, "accuracy_ic", {"positions": "rope"}, {"positions": "alibi"})
    with pytest.raises(OptionError, match="at least one"):
        pooled([])
