"""Growth curves: planted heads appear when they are switched on, and a curve survives its file."""

from pathlib import Path

import numpy as np
import pytest

from mechicl.analysis.trainings.growth import grow, load_series, save_series, series
from mechicl.errors import CheckpointError, OptionError, OutputPathError
from mechicl.models.planted import planted_induction
from mechicl.models.toys.prompts import toy_episodes
from mechicl.results import Estimate, Provenance, Series


@pytest.fixture(scope="module")
def curve() -> Series:
    """A "training" that turns the planted circuit's weights up from nothing."""
    checkpoints = []
    for step, share in ((0, 0.0), (10, 0.05), (100, 1.0)):
        model = planted_induction(seed=1).model
        for block in model.blocks:
            block.attn.W_Q.data *= share  # type: ignore[union-attr]
        checkpoints.append((step, model))
    return grow(
        iter(checkpoints),
        toy_episodes(24, classes=4, shots=2),
        stages=[(0, "nothing"), (100, "all")],
        batch_size=32,
        task="toy",
        progress=False,
    )


def test_accuracy_and_heads_grow_together(curve: Series) -> None:
    assert curve.steps.tolist() == [0, 10, 100]
    assert curve.values["accuracy"][2] == 1.0
    assert curve.values["accuracy"][0] < 0.6
    for name in ("induction, best head", "ila, best head", "previous token, best head"):
        assert curve.values[name][2] > 0.99
        assert curve.values[name][0] < 0.3
        assert (curve.low[name] <= curve.values[name] + 1e-9).all()
    assert (curve.n, curve.unit, curve.stages) == (24, "probability", ((0, "nothing"), (100, "all")))


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_a_curve_comes_back_from_its_file(curve: Series, tmp_path: Path, suffix: str) -> None:
    again = load_series(save_series(curve, tmp_path / f"growth.{suffix}"))
    assert again.steps.tolist() == curve.steps.tolist()
    for part in ("values", "low", "high"):
        assert set(getattr(again, part)) == set(getattr(curve, part))
        for name, column in getattr(curve, part).items():
            assert np.array_equal(getattr(again, part)[name], column)
    assert again.stages == curve.stages
    assert again.provenance.task == "toy"
    assert again.provenance.versions == curve.provenance.versions
    assert [p.name for p in tmp_path.iterdir()] == [f"growth.{suffix}"]  # nothing temporary stays


def test_a_measure_that_a_step_lacks_is_nan_and_one_without_intervals_has_none() -> None:
    made = Provenance(model="m")
    found = series([(1, {"a": 0.5}), (3, {"a": 0.6, "b": Estimate(0.1, 0.0, 0.2, 5)})], n=5, made=made)
    assert np.isnan(found.values["b"][0])
    assert found.values["a"].tolist() == [0.5, 0.6]
    assert set(found.low) == {"b"}
    assert len(found.to_frame()) == 4


def test_bad_curves_and_files_are_refused(curve: Series, tmp_path: Path) -> None:
    made = Provenance(model="m")
    with pytest.raises(OptionError, match="steps must rise"):
        series([(3, {"a": 1.0}), (3, {"a": 1.0})], n=1, made=made)
    with pytest.raises(OptionError, match="at least one"):
        grow([], toy_episodes(2))
    with pytest.raises(OptionError, match=r"\.json or \.parquet"):
        save_series(curve, tmp_path / "growth.csv")
    with pytest.raises(OutputPathError, match="must be written"):
        save_series(curve, tmp_path / "missing" / "growth.json")
    (tmp_path / "broken.json").write_text("{}")
    for name in ("broken.json", "absent.json", "absent.parquet"):
        with pytest.raises(CheckpointError, match="saved Series"):
            load_series(tmp_path / name)
