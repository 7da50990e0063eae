"""Sweeps on a Ray cluster of two local nodes: a killed driver, worker or node loses only the cells in flight."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_sweep import SPEC, begun, run, start, wait_for

from mechicl.errors import OptionError

slow = pytest.mark.slow
SLOWLY: dict[str, Any] = {"seeds": 4, "set": {"wait": 1.0}, "grid": {"K": [64, 128]}, "group": False}


def test_without_ray_the_option_is_refused_and_the_way_out_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OptionError, match=r"mechicl\[sweep\]"):
        run(SPEC, tmp_path, ray_address="local")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere:port"])
def test_an_address_without_a_cluster_is_refused_at_once(tmp_path: Path, address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(OptionError, match="running cluster"):
        run(SPEC, tmp_path, ray_address=address)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one core each."""
    pytest.importorskip("ray")
    import os

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made
    made.shutdown()


@pytest.fixture
def note(tmp_path: Path) -> Path:
    (tmp_path / "note").mkdir()
    return tmp_path / "note"


def cells_of(out: Path) -> list[str]:
    return sorted(p.stem for p in (out / "cells").glob("*.parquet"))


class TestOnACluster:
    pytestmark = slow

    def test_the_table_is_that_of_one_machine(self, cluster: Any, tmp_path: Path) -> None:
        here = run(SPEC, tmp_path / "here")
        there = run(SPEC, tmp_path / "there", ray_address=cluster.address)
        pd.testing.assert_frame_equal(here, there)

    def test_a_failed_cell_is_told(self, cluster: Any, tmp_path: Path) -> None:
        table = run({"set": {"mishap": "error"}, "grid": {"K": [64, 13]}}, tmp_path / "out", ray_address=cluster.address)
        assert list(table["K"].unique()) == [64]
        assert "thirteen" in next(iter(table.attrs["failed"].values()))

    def test_a_killed_worker_loses_nothing(self, cluster: Any, tmp_path: Path, note: Path) -> None:
        spec = {"set": {"at": str(note), "mishap": "kill once"}, "grid": {"K": [64, 13, 128]}, "group": False}
        table = run(spec, tmp_path / "out", ray_address=cluster.address)
        assert (note / "killed").exists()
        assert table.attrs["failed"] == {}
        assert sorted(table["K"].unique()) == [13, 64, 128]

    def test_a_killed_driver_loses_only_cells_in_flight(self, cluster: Any, tmp_path: Path, note: Path) -> None:
        spec = {**SLOWLY, "set": {"wait": 1.0, "at": str(note)}}
        driver = start(spec, tmp_path / "out", ray_address=cluster.address)
        wait_for(lambda: len(cells_of(tmp_path / "out")) >= 2)
        driver.kill()
        driver.wait()
        done = cells_of(tmp_path / "out")
        time.sleep(4.0)  # Ray ends the tasks of a driver that is gone
        first = begun(note)
        assert 2 <= len(done) < 8
        table = run(spec, tmp_path / "out", ray_address=cluster.address)
        assert len(begun(note)) - len(first) == 8 - len(done)  # just the missing ones
        assert table["cell"].nunique() == 8
        assert set(done) <= set(table["cell"])

    def test_a_killed_node_loses_nothing(self, cluster: Any, tmp_path: Path) -> None:
        node = cluster.add_node(num_cpus=1)

        def kill() -> None:
            wait_for(lambda: len(cells_of(tmp_path / "out")) >= 1)
            cluster.remove_node(node, allow_graceful=False)

        killer = threading.Thread(target=kill)
        killer.start()
        table = run(SLOWLY, tmp_path / "out", ray_address=cluster.address)
        killer.join()
        assert table.attrs["failed"] == {}
        assert table["cell"].nunique() == 8
