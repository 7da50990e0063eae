"""Sweeps over real toys: the numbers are those of the trainings themselves, and the command line says how it went."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from mechicl.cli import app
from mechicl.errors import OptionError
from mechicl.training.sweeps import sweep
from mechicl.training.sweeps.cells import cells, read_spec
from mechicl.training.sweeps.cost import outlook
from mechicl.training.sweeps.work import alike, resolve
from mechicl.training.toys.recipe import ToyRecipe, recipe
from mechicl.training.toys.train import load_toy, train_toy

TINY: dict[str, Any] = {"steps": 4, "points": 3, "probe_n": 16, "batch": 8, "D": 16, "L": 8}
SPEC: dict[str, Any] = {"preset": "cpu", "seeds": 2, "set": TINY, "grid": {"K": [16, 32]}}
TOML = """
preset = "cpu"
seeds = 2
[set]
steps = 4
points = 3
probe_n = 16
batch = 8
D = 16
L = 8
[grid]
K = [16, 32]
"""


def same_tensors(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two sets of tensors are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def toys(spec: dict[str, Any]) -> list[Any]:
    return cells(read_spec(spec), resolve)


def test_a_cell_is_the_training_of_its_recipe(tmp_path: Path) -> None:
    table = sweep.run(SPEC, tmp_path / "out", together=1, progress=False)
    assert list(table.columns[:5]) == ["cell", "preset", "seed", "K", "step"]
    mine = table[(table["K"] == 32) & (table["seed"] == 1)].reset_index(drop=True)
    alone = train_toy(recipe("cpu", seed=1, K=32, **TINY), progress=False).table
    pd.testing.assert_frame_equal(mine[list(alone.columns)], alone.astype({c: float for c in alone.columns if c != "step"}))


def test_a_group_gives_the_numbers_of_its_cells_alone(tmp_path: Path) -> None:
    one = sweep.run(SPEC, tmp_path / "one", together=1, progress=False)
    four = sweep.run(SPEC, tmp_path / "four", together=4, progress=False)
    numbers = [c for c in one.columns if one[c].dtype.kind == "f"]
    # float32 sums in another order; an accuracy over 16 sequences may tip by one
    np.testing.assert_allclose(four[numbers], one[numbers], atol=1 / 16 + 1e-4)
    np.testing.assert_allclose(four["loss"], one["loss"], rtol=1e-4)
    assert (one["cell"] == four["cell"]).all()


def test_seeds_change_run_and_world_and_a_spec_can_hold_the_world() -> None:
    assert [(c.recipe["seed"], c.recipe["task"]["seed"]) for c in toys({**SPEC, "grid": {}})] == [(0, 0), (1, 1)]
    held = toys({**SPEC, "set": {**TINY, "task.seed": 7}, "grid": {}})
    assert [(c.recipe["seed"], c.recipe["task"]["seed"]) for c in held] == [(0, 7), (1, 7)]


def test_a_setting_is_a_column_value_where_the_spec_leaves_it_to_the_preset() -> None:
    found = toys({**SPEC, "seeds": 1, "also": [{"positions": ["none"]}]})
    assert [(c.value("K"), c.value("positions"), c.value("task.K")) for c in found] == [
        (16, "rope", 16), (32, "rope", 32), (recipe("cpu").task.K, "none", recipe("cpu").task.K),
    ]  # fmt: skip


def test_saying_what_a_preset_says_is_the_same_cell() -> None:
    plain, said = toys({"set": TINY}), toys({"set": {**TINY, "positions": "rope", "n_layers": 2}})
    assert [c.id for c in plain] == [c.id for c in said]
    assert [c.id for c in plain] != [c.id for c in toys({"set": {**TINY, "positions": "alibi"}})]


def test_the_written_out_recipe_is_a_recipe_and_groups_by_its_shapes() -> None:
    found = toys(
        {**SPEC, "also": [{"lr": [0.1]}, {"n_layers": [1]}, {"preset": "cpu_multimodal", "D": 16, "D1": 16, "D2": 16, "L": 8}][:2]}
    )
    assert all(ToyRecipe.from_json(c.recipe).to_json() == c.recipe for c in found)
    kinds = [alike(c.recipe) for c in found]
    assert len(set(kinds)) == 2
    assert len(set(kinds[:-2])) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"grid": {"KK": [1]}}, "Did you mean"),
        ({"grid": {"B": [3]}}, "B must"),
        ({"grid": {"positions": ["rpoe"]}}, "positions must"),
        ({"preset": "gpu"}, "preset must be one of"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        sweep.run({**SPEC, **change}, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_is_a_failed_cell(tmp_path: Path) -> None:
    spec = {**SPEC, "seeds": 1, "set": {**TINY, "optimizer": "sgd"}, "grid": {"lr": [0.001, 1e38]}}
    table = sweep.run(spec, tmp_path / "out", progress=False)
    assert table["lr"].unique().tolist() == [0.001]
    (reason,) = table.attrs["failed"].values()
    assert "lr=1e+38" in reason
    assert "not finite" in reason


def test_kept_models_are_the_trained_ones_and_a_cell_in_flight_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {**SPEC, "seeds": 1}
    table = sweep.run(spec, tmp_path / "out", keep_models=True, progress=False)
    whole = [(load_toy(tmp_path / "out" / "models" / cell), cell) for cell in table["cell"].unique()]
    # as after a kill: the runs have checkpoints, the cells no table
    for path in (tmp_path / "out" / "cells").iterdir():
        path.unlink()
    monkeypatch.setattr("mechicl.training.toys.train._learn", lambda *_: pytest.fail("what is in the checkpoint is not trained again"))
    again = sweep.run(spec, tmp_path / "out", keep_models=True, progress=False)
    pd.testing.assert_frame_equal(again, table)
    for model, cell in whole:
        assert same_tensors(model.state_dict(), load_toy(tmp_path / "out" / "models" / cell).state_dict())


def test_a_second_stage_starts_from_the_first_ones_weights_in_its_world(tmp_path: Path) -> None:
    both = {"steps": 4, "points": 3, "probe_n": 16, "batch": 8, "L": 8}
    spec = {"preset": "cpu_multimodal", "seeds": 2, "set": {**both, "D1": 16, "D2": 8, "K1": 16, "B": 4}, "grid": {"K2": [8, 16]},
            "before": {"preset": "cpu", **both, "D": 16, "K": "$K1"}}  # fmt: skip
    table = sweep.run(spec, tmp_path / "out", keep_models=True, progress=False)
    assert table.attrs["failed"] == {}
    assert table["cell"].nunique() == 4
    for cell in toys(spec):
        assert cell.before is not None
        first = load_toy(tmp_path / "out" / "models" / cell.before.id).state_dict()
        second = load_toy(tmp_path / "out" / "models" / cell.id, step=0).state_dict()
        assert same_tensors(first, {name: second[name] for name in first})
        assert cell.before.recipe["task"]["seed"] == cell.recipe["task"]["seed"]
    assert "  before them: 2 trainings that they start from, in 1 groups" in outlook(spec)


def test_the_format_in_the_docs_is_a_sweep() -> None:
    text = (Path(__file__).parent.parent / "docs" / "sweeps.md").read_text()
    first, second = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert len(toys(tomllib.loads(first))) == 6 * 5 + 2 * 2 + 2 * 5
    assert len(toys(tomllib.loads(second))) == 4 * 3 + 2 * 3


def test_the_outlook_names_cells_groups_and_a_time(tmp_path: Path) -> None:
    lines = outlook(SPEC, tmp_path / "out", workers=2)
    assert lines[0] == "4 cells, 0 finished, 4 to train in 2 groups"
    assert "  K: 16, 32" in lines
    assert lines[-1].startswith("about ")
    sweep.run({**SPEC, "seeds": 1}, tmp_path / "out", progress=False)
    assert outlook(SPEC, tmp_path / "out")[0] == "4 cells, 2 finished, 2 to train in 1 groups"
    sweep.run(SPEC, tmp_path / "out", progress=False)
    assert outlook(SPEC, tmp_path / "out")[0] == "4 cells, 4 finished, 0 to train in 0 groups"
    assert sweep.load(tmp_path / "out")["cell"].nunique() == 4


class TestCommand:
    def test_trains_and_says_where_the_table_is(self, tmp_path: Path) -> None:
        (tmp_path / "spec.toml").write_text(TOML)
        done = CliRunner().invoke(app, ["sweep", str(tmp_path / "spec.toml"), "--out", str(tmp_path / "out"), "--workers", "1", "--quiet"])
        assert done.exit_code == 0, done.output
        assert done.stdout.strip() == str(tmp_path / "out" / "results.parquet")
        assert sweep.load(tmp_path / "out")["K"].unique().tolist() == [16, 32]

    def test_a_failed_cell_is_exit_code_1_with_its_reason(self, tmp_path: Path) -> None:
        (tmp_path / "spec.toml").write_text(TOML.replace("K = [16, 32]", 'lr = [0.001, 1e38]\noptimizer = ["sgd"]'))
        done = CliRunner().invoke(app, ["sweep", str(tmp_path / "spec.toml"), "--out", str(tmp_path / "out"), "-w", "1", "-q"])
        assert done.exit_code == 1
        assert "No result: lr=1e+38, optimizer=sgd, seed=0: the loss was not finite" in done.stderr

    def test_a_refusal_is_one_line_and_exit_code_2(self, tmp_path: Path) -> None:
        (tmp_path / "spec.toml").write_text(TOML.replace("K =", "KK ="))
        for arguments in (["--out", str(tmp_path / "out")], []):
            done = CliRunner().invoke(app, ["sweep", str(tmp_path / "spec.toml"), *arguments])
            assert done.exit_code == 2
            assert done.stderr.startswith("Error: ")
            assert len(done.stderr.strip().splitlines()) == 1

    def test_its_help_loads_nothing_heavy(self) -> None:
        code = (
            "import sys; from typer.testing import CliRunner; from mechicl.cli import app; r = CliRunner().invoke(app, ['sweep', '--help']);"
            "assert '--ray-address' in r.output; print(sorted({'torch', 'pandas', 'pyarrow', 'ray', 'numpy'} & set(sys.modules)))"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
