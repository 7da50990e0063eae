"""Episodes shared by workers: the same numbers for any number of them; what is finished is kept; what dies is done again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mechicl
from mechicl.analysis.spread.crew import Call, Crew, Hands, digest
from mechicl.analysis.spread.job import Here, hire, spread
from mechicl.analysis.spread.work import WORK, Part
from mechicl.data import concepts
from mechicl.errors import CheckpointError, EpisodeError, OptionError

QUIET: dict[str, Any] = {"progress": False, "seed": 0}
HEADS = ((1, 0), (2, 1))
JOBS: dict[str, dict[str, Any]] = {
    "score_heads": {"scores": ("induction", "previous_token")},
    "icl_accuracy": {},
    "ablate": {"heads": HEADS, "how": "mean", "n_random": 2},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return mechicl.load("demo", check=False)


@pytest.fixture(scope="module")
def episodes() -> list[Any]:
    return concepts.draw(9, classes=2, shots=1, size=28, seed=3)


def numbers(result: Any) -> np.ndarray:
    return result.to_frame().select_dtypes("number").to_numpy(dtype=float)


class Backwards(Hands):
    """Finishes the last shard first, and counts."""

    def __init__(self, model: Any) -> None:
        self.model, self.done = model, 0

    def about(self) -> dict[str, Any]:
        return Here(self.model).about()

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Part]]:
        for index in reversed(range(len(calls))):
            self.done += calls[index].what != "render"
            yield index, WORK[calls[index].what](self.model, calls[index].episodes, **calls[index].options)


@pytest.mark.parametrize("job", JOBS)
def test_the_result_is_that_of_one_model_and_of_any_order_of_finish(job: str, model: Any, episodes: list[Any]) -> None:
    whole = getattr(mechicl, job)(model, episodes, batch_size=4, **JOBS[job], **QUIET)
    shared = spread(job, episodes, model=model, workers=0, shard=4, batch_size=4, **JOBS[job], **QUIET)
    turned = getattr(mechicl, job)(Crew(Backwards(model), shard=4), episodes, batch_size=4, **JOBS[job], **QUIET)
    assert np.array_equal(numbers(shared), numbers(turned), equal_nan=True)  # bit for bit: the order of finish does not count
    np.testing.assert_allclose(numbers(shared), numbers(whole), atol=1e-5, rtol=1e-4)  # other batches, other padding: float32 rounding
    assert shared.n == whole.n
    assert shared.provenance.model == whole.provenance.model


def test_finished_shards_are_kept_and_only_the_others_are_done(model: Any, episodes: list[Any], tmp_path: Path) -> None:
    run = JOBS["icl_accuracy"]
    first = Backwards(model)
    result = mechicl.icl_accuracy(Crew(first, shard=3, out=tmp_path / "kept"), episodes, **run, **QUIET)
    assert first.done == 6  # with examples and without
    lines = (tmp_path / "kept" / "shards.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "kept" / "shards.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:20])  # a driver killed while it wrote
    again = Backwards(model)
    same = mechicl.icl_accuracy(Crew(again, shard=3, out=tmp_path / "kept"), episodes, **run, **QUIET)
    assert again.done == 2
    assert np.array_equal(same.margins, result.margins)


def test_a_folder_of_other_shards_is_refused_and_other_episodes_are_other_work(model: Any, episodes: list[Any], tmp_path: Path) -> None:
    mechicl.icl_accuracy(Crew(Here(model), shard=3, out=tmp_path / "kept"), episodes[:3], zero_shot=False, **QUIET)
    with pytest.raises(CheckpointError, match="shard was 3, now 4"):
        Crew(Here(model), shard=4, out=tmp_path / "kept")
    more = Backwards(model)
    mechicl.icl_accuracy(Crew(more, shard=3, out=tmp_path / "kept"), episodes[3:6], zero_shot=False, **QUIET)
    assert more.done == 1
    assert digest("read", episodes[:2], {}) != digest("read", episodes[1:3], {})
    assert digest("read", episodes[:2], {"a": 1}) != digest("read", episodes[:2], {"a": 2})


def test_refusals(model: Any, episodes: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="job must be one of"):
        spread("patch", episodes, model=model, workers=0)
    with pytest.raises(OptionError, match="every worker can load"):
        hire(model, workers=2)
    with pytest.raises(OptionError, match="shard must be at least 2"):
        hire(model, workers=0, shard=1)
    with pytest.raises(EpisodeError, match="must be episodes"):
        mechicl.icl_accuracy(hire(model, workers=0), model.render(episodes[:2]), **QUIET)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OptionError, match=r"mechicl\[sweep\]"):
        hire("demo", workers=1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes; cores here are slots, not processors."""
    pytest.importorskip("ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    made.add_node(num_cpus=2)
    yield made
    made.shutdown()


@pytest.mark.slow
class TestOnRay:
    """python -m pytest tests/test_spread.py -m slow"""

    def test_one_two_and_three_workers_agree_bit_for_bit(self, cluster: Any, episodes: list[Any]) -> None:
        found = [
            numbers(spread("ablate", episodes, workers=k, address=cluster.address, shard=2, **JOBS["ablate"], **QUIET)) for k in (1, 2, 3)
        ]
        assert np.array_equal(found[0], found[1], equal_nan=True)
        assert np.array_equal(found[0], found[2], equal_nan=True)

    def test_a_killed_worker_loses_nothing(self, cluster: Any, episodes: list[Any], tmp_path: Path) -> None:
        expected = spread("icl_accuracy", episodes, workers=0, shard=2, **QUIET)
        killed: list[int] = []

        def kill() -> None:
            import psutil

            wait_for(lambda: shards(tmp_path / "out") >= 1)
            ours = psutil.Process().children(recursive=True)  # the cluster's; another's on this machine are left alone
            workers = [p for p in ours if (p.cmdline() or [""])[0].startswith("ray::Worker")]
            os.kill(workers[0].pid, signal.SIGKILL)
            killed.append(workers[0].pid)

        killer = threading.Thread(target=kill)
        killer.start()
        found = spread("icl_accuracy", episodes, workers=2, address=cluster.address, shard=2, out=tmp_path / "out", **QUIET)
        killer.join()
        assert killed
        np.testing.assert_allclose(found.margins, expected.margins, atol=1e-5)
        assert shards(tmp_path / "out") == 10

    def test_a_killed_driver_goes_on_with_what_is_missing(self, cluster: Any, episodes: list[Any], tmp_path: Path) -> None:
        code = (
            "from mechicl.analysis.spread.job import spread; from mechicl.data import concepts; "
            "spread('icl_accuracy', concepts.draw(9, classes=2, shots=1, size=28, seed=3), workers=1, shard=2, "
            f"address={cluster.address!r}, out={str(tmp_path / 'out')!r}, progress=False, seed=0)"
        )
        driver = subprocess.Popen([sys.executable, "-c", code])
        wait_for(lambda: shards(tmp_path / "out") >= 1)
        driver.kill()
        driver.wait()
        before = (tmp_path / "out" / "shards.jsonl").read_bytes().rpartition(b"\n")[0]
        spread("icl_accuracy", episodes, workers=2, address=cluster.address, shard=2, out=tmp_path / "out", **QUIET)
        assert (tmp_path / "out" / "shards.jsonl").read_bytes().startswith(before)
        assert shards(tmp_path / "out") == 10

    def test_a_workers_refusal_is_raised_here_as_what_it_is(self, cluster: Any, episodes: list[Any]) -> None:
        with pytest.raises(CheckpointError, match="there is no folder"):
            spread("icl_accuracy", episodes, model="/nowhere/at/all", workers=1, address=cluster.address, **QUIET)


def shards(out: Path) -> int:
    """Lines that are whole."""
    path = out / "shards.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(true: Any, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
