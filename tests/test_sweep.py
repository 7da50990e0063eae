"""Sweeps: what a spec means, that nothing finished is lost to a kill, that a rerun does just the missing cells, and that failures are told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import sweep_stand_in as stand_in
from hypothesis import given
from hypothesis import strategies as st

from mechicl.data.folders import write_whole
from mechicl.errors import CheckpointError, DeviceError, OptionError, OutputPathError
from mechicl.training.sweeps import sweep
from mechicl.training.sweeps.cells import axis_names, cells, digest, groups, read_spec
from mechicl.training.sweeps.store import Store

HERE = Path(__file__).parent
SPEC: dict[str, Any] = {"preset": "cpu", "seeds": 2, "set": {"steps": 3}, "grid": {"K": [64, 128], "alpha": [0.0, 1.0]}}


def run(spec: Any, out: Path, **options: Any) -> pd.DataFrame:
    return sweep.run(spec, out, trainer="sweep_stand_in", progress=False, **options)


def expand(spec: dict[str, Any]) -> list[Any]:
    return cells(read_spec(spec), stand_in.resolve)


def begun(folder: Path) -> list[str]:
    return (folder / "begun.txt").read_text().splitlines()


# what a spec means


def test_a_grid_is_every_combination_with_seeds_innermost() -> None:
    found = [(c.value("K"), c.value("alpha"), c.seed) for c in expand(SPEC)]
    assert found == [(k, a, s) for k in (64, 128) for a in (0.0, 1.0) for s in (0, 1)]
    assert all(c.recipe["steps"] == 3 and c.recipe["seed"] == c.seed for c in expand(SPEC))


def test_also_adds_grids_on_the_same_base_and_a_shared_cell_is_there_once() -> None:
    spec = {"set": {"steps": 4}, "grid": {"K": [64, 128]}, "also": [{"alpha": [0.0, 1.0]}, {"K": 128, "alpha": [1.0], "seeds": [5]}]}
    found = [(c.value("K"), c.value("alpha"), c.seed) for c in expand(spec)]
    assert found == [(64, 0.0, 0), (128, 0.0, 0), (64, 1.0, 0), (128, 1.0, 5)]  # K 64, alpha 0 is in both grids
    assert axis_names(read_spec(spec)) == ["K", "alpha"]


def test_fields_that_change_together_are_one_axis_with_a_name() -> None:
    code = [{"name": "slow", "lr": 0.01, "steps": 9}, {"lr": 0.5, "steps": 2}]
    found = expand({"grid": {"code": code, "K": [64, 128]}})
    assert [(c.value("code"), c.value("lr"), c.value("steps"), c.value("K")) for c in found] == [
        ("slow", 0.01, 9, 64), ("slow", 0.01, 9, 128), ("lr=0.5, steps=2", 0.5, 2, 64), ("lr=0.5, steps=2", 0.5, 2, 128),
    ]  # fmt: skip


def test_presets_can_be_an_axis() -> None:
    assert [(c.preset, c.value("lr")) for c in expand({"grid": {"preset": ["cpu", "modern"]}})] == [("cpu", 0.1), ("modern", 0.2)]


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=4, unique=True),
    st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=3, unique=True),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_cells_are_distinct_and_groups_hold_each_once(ks: list[int], alphas: list[float], seeds: int, together: int, workers: int) -> None:
    found = expand({"seeds": seeds, "grid": {"K": ks, "alpha": alphas}})
    assert len({c.id for c in found}) == len(found) == len(ks) * len(alphas) * seeds
    jobs = groups(found, stand_in.alike, together, workers)
    assert sorted(c.id for job in jobs for c in job) == sorted(c.id for c in found)
    assert max(map(len, jobs)) <= together
    assert len(jobs) >= min(workers, len(found))  # no worker is left idle


def test_only_cells_that_are_alike_are_grouped() -> None:
    jobs = groups(expand({"seeds": 3, "grid": {"steps": [2, 3]}}), stand_in.alike, 16, 1)
    assert [[c.value("steps") for c in job] for job in jobs] == [[2, 2, 2], [3, 3, 3]]


def test_the_order_of_a_recipe_does_not_change_its_name() -> None:
    assert digest({"a": 1, "b": 2.5}) == digest({"b": 2.5, "a": 1}) != digest({"a": 1, "b": 2.25})


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"grids": {"K": [1]}}, "Did you mean grid"),
        ({"K": [1]}, "under \\[set\\] or \\[grid\\]"),
        ({"grid": [1]}, "grid must be a table"),
        ({"grid": {"K": []}}, "at least one value"),
        ({"grid": {"K": [1, 1]}}, "different values"),
        ({"grid": {"seed": [1]}}, "Use seeds"),
        ({"seeds": 0}, "seeds must be how many"),
        ({"seeds": [1, 1]}, "different seeds"),
        ({"seeds": True}, "seeds must be how many"),
        ({"grid": {"KK": [1]}}, "'KK'.*in the cell with KK=1"),
        ({"preset": "none"}, "preset must be cpu or modern"),
        ({"grid": {"code": [{"K": 3}, 4]}}, "tables only"),
        ({"grid": {"code": [{"K": 3}], "K": [4]}}, "set once"),
    ],
)
def test_a_spec_that_cannot_be_is_refused_with_the_rule(spec: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        expand(spec)


def test_a_file_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text("K = [1\n")
    with pytest.raises(OptionError, match="must be TOML"):
        read_spec(tmp_path / "spec.toml")
    with pytest.raises(OptionError, match="can be read"):
        read_spec(tmp_path / "other.toml")


def test_options_that_cannot_be_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for options, error, says in (
        ({"workers": 0}, OptionError, "workers must be at least 1"),
        ({"together": 0}, OptionError, "together must be at least 1"),
        ({"device": "abacus"}, DeviceError, "device must"),
        ({"device": "cuda:99"}, DeviceError, "device must"),
    ):
        with pytest.raises(error, match=says):
            run(SPEC, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()


# one tidy table


def test_the_table_has_settings_that_vary_then_step_and_measures_one_row_group_a_cell(tmp_path: Path) -> None:
    table = run(SPEC, tmp_path / "out")
    assert list(table.columns) == ["cell", "preset", "seed", "K", "alpha", "step", "loss", "accuracy_ic", "ih_1.0"]
    assert len(table) == 8 * 3
    assert (table["accuracy_ic"] == table["K"] * 0.1 + table["seed"] + table["step"]).all()
    assert table["ih_1.0"].isna().equals(table["K"] == 64)  # a measure that only some cells have
    file = pq.ParquetFile(tmp_path / "out" / "results.parquet")
    assert file.num_row_groups == 8
    assert {file.read_row_group(k)["cell"].unique().to_pylist()[0] for k in range(8)} == set(table["cell"])
    assert sorted(p.stem for p in (tmp_path / "out" / "cells").iterdir()) == sorted(set(table["cell"]))


def test_load_gives_the_same_table_from_folder_and_file(tmp_path: Path) -> None:
    table = run(SPEC, tmp_path / "out")
    for place in (tmp_path / "out", tmp_path / "out" / "results.parquet"):
        loaded = sweep.load(place)
        pd.testing.assert_frame_equal(loaded, table)
        assert loaded.attrs["sweep"]["finished"] == loaded.attrs["sweep"]["spec"]["cells"] == 8
        assert loaded.attrs["sweep"]["spec"]["grids"][0]["axes"]["K"] == [64, 128]
        assert loaded.attrs["sweep"]["seconds"] >= 0
        assert any(version.startswith("mechicl ") for version in loaded.attrs["sweep"]["versions"])
    with pytest.raises(CheckpointError, match="does not exist"):
        sweep.load(tmp_path / "nothing")


def test_workers_and_groups_change_no_number(tmp_path: Path) -> None:
    one = run(SPEC, tmp_path / "one", together=1)
    many = run(SPEC, tmp_path / "many", workers=2, together=3)
    pd.testing.assert_frame_equal(one, many)


# nothing finished is lost


def test_a_second_run_trains_nothing_and_one_with_more_cells_only_those(tmp_path: Path) -> None:
    note = tmp_path / "note"
    note.mkdir()
    spec = {"set": {"at": str(note)}, "grid": {"K": [64, 128]}}
    first = run(spec, tmp_path / "out")
    pd.testing.assert_frame_equal(run(spec, tmp_path / "out"), first)
    assert begun(note) == ["64 0", "128 0"]
    more = run({"seeds": 2, "set": {"at": str(note)}, "grid": {"K": [128, 32]}, "also": [{"K": [64]}]}, tmp_path / "out")
    assert begun(note)[2:] == ["128 1", "32 0", "32 1", "64 1"]
    assert set(first["cell"]) < set(more["cell"])


def test_another_sweep_in_the_folder_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    run(SPEC, tmp_path / "out")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=r"4 of them it does not, e\.g\. K=\d+.*another folder"):
        run({**SPEC, "seeds": 1}, tmp_path / "out")
    with pytest.raises(CheckpointError, match="8 of them"):
        run({**SPEC, "set": {"steps": 4}}, tmp_path / "out")
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


def test_a_changed_preset_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(SPEC, tmp_path / "out")
    monkeypatch.setitem(stand_in.FIELDS, "lr", 0.3)
    with pytest.raises(CheckpointError, match=r"its lr was 0\.1, now 0\.3"):
        run(SPEC, tmp_path / "out")


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(OutputPathError, match="holds other files"):
        run(SPEC, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(OutputPathError, match="can be written"):
        run(SPEC, tmp_path / "thesis.tex" / "out")


def test_two_drivers_in_one_folder_are_refused(tmp_path: Path) -> None:
    driver = start({"set": {"wait": 60.0}}, tmp_path / "out", workers=1)
    try:
        wait_for(lambda: (tmp_path / "out" / ".lock").exists())
        time.sleep(0.3)
        with pytest.raises(OutputPathError, match="another sweep is at work"):
            run({"set": {"wait": 60.0}}, tmp_path / "out")
    finally:
        driver.kill()
        driver.wait()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_driver_loses_only_cells_in_flight(tmp_path: Path, workers: int) -> None:
    note = tmp_path / "note"
    note.mkdir()
    spec = {"seeds": 4, "set": {"at": str(note), "wait": 0.25}, "grid": {"K": [64, 128]}, "group": False}
    driver = start(spec, tmp_path / "out", workers=workers)
    wait_for(lambda: len(list((tmp_path / "out" / "cells").glob("*.parquet"))) >= 2)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    time.sleep(0.6)  # its workers notice, and no cell comes after
    done = sorted(p.stem for p in (tmp_path / "out" / "cells").glob("*.parquet"))
    first = begun(note)
    time.sleep(0.6)
    assert sorted(p.stem for p in (tmp_path / "out" / "cells").glob("*.parquet")) == done
    assert begun(note) == first
    assert 2 <= len(done) < 8
    table = run(spec, tmp_path / "out", workers=workers)
    assert len(begun(note)) - len(first) == 8 - len(done)  # just the missing ones
    pd.testing.assert_frame_equal(table, run(spec, tmp_path / "whole"))


def test_a_killed_worker_loses_nothing(tmp_path: Path) -> None:
    note = tmp_path / "note"
    note.mkdir()
    spec = {"set": {"at": str(note), "mishap": "kill once"}, "grid": {"K": [64, 13, 128, 32]}}
    table = run(spec, tmp_path / "out", workers=2, together=2)
    assert table.attrs["failed"] == {}
    assert sorted(set(table["K"])) == [13, 32, 64, 128]
    assert (note / "killed").exists()


def test_a_cell_that_kills_every_worker_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    table = run({"set": {"mishap": "kill"}, "grid": {"K": [64, 13, 128]}}, tmp_path / "out", workers=2)
    assert sorted(set(table["K"])) == [64, 128]
    (reason,) = table.attrs["failed"].values()
    assert "K=13, seed=0" in reason
    assert "SIGKILL" in reason


def test_files_that_a_kill_left_half_written_do_no_harm(tmp_path: Path) -> None:
    table = run(SPEC, tmp_path / "out")
    (tmp_path / "out" / "cells" / "0123456789abcdef.parquet.part").write_bytes(b"PAR1")
    (tmp_path / "out" / "results.parquet.part").write_bytes(b"PAR1")
    pd.testing.assert_frame_equal(run(SPEC, tmp_path / "out"), table)


def test_a_full_disk_is_told_and_what_was_finished_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mechicl.training.sweeps import store as sweep_store

    kept: list[Path] = []

    def write(path: Path, data: bytes) -> None:
        if len(kept) == 3:
            raise OSError(28, "No space left on device")
        kept.append(path)
        write_whole(path, data)

    monkeypatch.setattr(sweep_store, "write_whole", write)
    with pytest.raises(OutputPathError, match=r"No space left.*run the same command again"):
        run(SPEC, tmp_path / "out")
    assert sweep.load(tmp_path / "out")["cell"].nunique() == 3
    monkeypatch.undo()
    assert run(SPEC, tmp_path / "out")["cell"].nunique() == 8


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_sweep_leaves_its_table_and_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    written: list[Any] = []
    processes: list[subprocess.Popen[bytes]] = []

    def write(self: Store, outcome: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(outcome)
        keep(self, outcome)

    keep, popen = Store.write, subprocess.Popen
    monkeypatch.setattr(Store, "write", write)
    monkeypatch.setattr("mechicl.training.sweeps.local.subprocess.Popen", lambda *a, **k: processes.append(popen(*a, **k)) or processes[-1])
    with pytest.raises(KeyboardInterrupt):
        run({**SPEC, "group": False}, tmp_path / "out", workers=workers)
    assert sweep.load(tmp_path / "out")["cell"].nunique() == 2
    assert len(processes) == (2 if workers == 2 else 0)
    assert all(process.poll() is not None for process in processes)


def test_a_damaged_cell_is_named(tmp_path: Path) -> None:
    run(SPEC, tmp_path / "out")
    path = next((tmp_path / "out" / "cells").iterdir())
    whole = path.read_bytes()
    bit = len(whole) // 4
    for damaged in (b"", whole[:100], whole[:bit] + bytes([whole[bit] ^ 1]) + whole[bit + 1 :]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"{path.name}.*Delete it"):
            run(SPEC, tmp_path / "out")


# a failure is a result


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("mishap", "says"), [("error", "RuntimeError: thirteen"), ("nan", "not finite at step 1")])
def test_a_failed_cell_is_recorded_with_its_reason_and_the_others_go_on(tmp_path: Path, workers: int, mishap: str, says: str) -> None:
    spec = {"set": {"mishap": mishap}, "grid": {"K": [64, 13, 128]}}
    table = run(spec, tmp_path / "out", workers=workers)
    assert sorted(set(table["K"])) == [64, 128]  # also when the three were one group
    (reason,) = table.attrs["failed"].values()
    assert "K=13, seed=0" in reason
    assert says in reason
    assert sweep.failures(tmp_path / "out") == table.attrs["failed"]


def test_an_error_is_tried_again_and_a_divergence_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for mishap in ("error", "nan"):
        spec = {"set": {"mishap": mishap}, "grid": {"K": [64, 13]}}
        run(spec, tmp_path / mishap)
    calls: list[int] = []
    monkeypatch.setattr(
        stand_in, "train", lambda recipes, **_: calls.extend(r["task"]["K"] for r in recipes) or [pd.DataFrame({"step": [0]})]
    )
    again = run({"set": {"mishap": "error"}, "grid": {"K": [64, 13]}}, tmp_path / "error")
    assert calls == [13]
    assert again.attrs["failed"] == {}  # the reason of the first try is gone
    assert len(run({"set": {"mishap": "nan"}, "grid": {"K": [64, 13]}}, tmp_path / "nan").attrs["failed"]) == 1
    assert calls == [13]


def test_a_sweep_of_failures_gives_an_empty_table(tmp_path: Path) -> None:
    table = run({"set": {"mishap": "error"}, "grid": {"K": [13]}}, tmp_path / "out")
    assert len(table) == 0
    assert len(table.attrs["failed"]) == 1


# stages


STAGED: dict[str, Any] = {
    "before": {"K": "$K", "steps": 2},
    "seeds": 2,
    "grid": {"K": [64, 128], "lr": [0.1, 0.2]},
    "also": [{"early_fusion": True, "K": [64]}, {"before": False, "K": [32]}],
}


def test_what_cells_start_from_is_trained_once_for_all_of_them(tmp_path: Path) -> None:
    note = tmp_path / "note"
    note.mkdir()
    spec = {**STAGED, "set": {"at": str(note)}, "before": {**STAGED["before"], "at": str(note)}}
    table = run(spec, tmp_path / "out")
    first = {c.before.id: c.before for c in expand(spec) if c.before is not None}
    assert sorted((c.value("K"), c.seed, c.value("steps")) for c in first.values()) == [(64, 0, 2), (64, 1, 2), (128, 0, 2), (128, 1, 2)]
    lines = begun(note)
    assert sorted(lines[:4]) == ["128 0", "128 1", "64 0", "64 1"]
    started = {line.split(" from ")[0]: Path(line.split(" from ")[1]) for line in lines[4:] if "from" in line}
    assert {seed_and_k: path.name for seed_and_k, path in started.items()} == {f"{c.value('K')} {c.seed}": i for i, c in first.items()}
    assert all(path.is_dir() and path.parent == tmp_path / "out" / "models" for path in started.values())
    assert lines.count("64 0") == 2  # before, and the early fusion that starts from nothing
    assert {(k, b) for k, b in zip(table["K"], table["before"], strict=True)} == {(64, True), (128, True), (64, False), (32, False)}
    assert table["cell"].nunique() == 8 + 2 + 2
    pd.testing.assert_frame_equal(run(spec, tmp_path / "out"), table)
    assert begun(note) == lines


def test_another_earlier_training_makes_other_cells() -> None:
    ids = [{c.id for c in expand({**STAGED, "before": before, "also": []})} for before in ({"K": "$K"}, {"K": "$K", "steps": 2}, {"K": 64})]
    assert not ids[0] & ids[1]
    assert len(ids[0] & ids[2]) == 4  # where K is 64 anyway


def test_a_failed_earlier_training_takes_along_what_starts_from_it(tmp_path: Path) -> None:
    spec = {"before": {"K": "$K", "mishap": "error"}, "grid": {"K": [13, 64], "lr": [0.1, 0.2]}}
    table = run(spec, tmp_path / "out")
    assert table["K"].unique().tolist() == [64]
    reasons = sorted(table.attrs["failed"].values())
    assert [reason.split(":")[0] for reason in reasons] == ["K=13, lr=0.1, seed=0", "K=13, lr=0.2, seed=0", "before"]
    assert "the training before it has no result" in reasons[0]
    assert sweep.failures(tmp_path / "out") == table.attrs["failed"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"before": {"K": "$L"}}, "before must be a field of the cell"),
        ({"before": {"K": 64}, "set": {"start": "runs/one"}}, "start must be left out"),
        ({"before": True}, "table of fields, or false"),
        ({"before": {"KK": 64}}, "'KK'"),
    ],
)
def test_an_earlier_training_that_cannot_be_is_refused(spec: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        expand(spec)


def start(spec: dict[str, Any], out: Path, **options: Any) -> subprocess.Popen[bytes]:
    """A driver in a process of its own."""
    given = {"spec": spec, "out": str(out), "trainer": "sweep_stand_in", "progress": False, **options}
    code = f"from mechicl.training.sweeps import sweep; import json; sweep.run(**json.loads({json.dumps(given)!r}))"
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})


def wait_for(ready: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.02)
