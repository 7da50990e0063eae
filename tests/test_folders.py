"""Folders and files: whole or not at all, one process at a time, whatever the disk does."""

from __future__ import annotations

import errno
import gc
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mechicl.analysis.kept import KeptFolder
from mechicl.data.folders import Hold, append_line, fresh_folder, within, write_whole
from mechicl.errors import CheckpointError, OutputPathError
from mechicl.training.runs import METRICS, Run

OTHER = """
import sys, time
from pathlib import Path
from mechicl.data.folders import Hold
held = Hold(Path(sys.argv[1]), "training")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def held_elsewhere(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A folder that another process works in."""
    run = Run.open(tmp_path / "run", {"a": 1}, resume=False)
    assert run.held is not None
    run.held.close()
    plan = tmp_path / "run" / "config.json"
    process = subprocess.Popen([sys.executable, "-c", OTHER, str(plan)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield tmp_path / "run", process
    process.kill()
    process.wait()
    process.stdout.close()


def test_two_processes_cannot_work_in_one_folder_and_a_killed_one_lets_go(held_elsewhere: tuple[Path, subprocess.Popen[str]]) -> None:
    folder, process = held_elsewhere
    with pytest.raises(OutputPathError, match="another training is at work"):
        Run.open(folder, {"a": 1}, resume=True)
    process.kill()
    process.wait()
    assert Run.open(folder, {"a": 1}, resume=True).held is not None


def test_one_process_may_go_on_with_what_it_began(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text("{}")
    first, second = Hold(plan, "work"), Hold(plan, "work")
    assert [count for _, count in Hold._files.values()] == [2]
    first.close()
    first.close()  # once is enough
    del second
    gc.collect()
    assert not Hold._files
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json"]  # nothing is left behind
    with pytest.raises(OutputPathError, match="must be readable"):
        Hold(tmp_path / "none.json", "work")


class Full:
    """A disk that takes `room` more bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        real = os.fsync

        def fsync(fd: int) -> None:
            if os.fstat(fd).st_size > self.room:
                os.ftruncate(fd, self.room)  # what a full disk has kept
                raise OSError(errno.ENOSPC, "No space left on device")
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_loses_nothing_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    write_whole(path, b"whole")
    disk = Full(monkeypatch, 10)
    with pytest.raises(OutputPathError, match="No space left"):
        write_whole(path, b"much longer than that")
    assert path.read_bytes() == b"whole"
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    disk.room = 100
    write_whole(path, b"much longer than that")
    assert path.read_bytes() == b"much longer than that"


def test_a_line_that_did_not_fit_is_taken_back_and_the_next_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.open(tmp_path / "run", {}, resume=False)
    run.log({"step": 1})
    disk = Full(monkeypatch, 20)
    with pytest.raises(OutputPathError, match="make room and resume"):
        run.log({"step": 2, "long": "x" * 50})
    assert [line["step"] for line in run.lines()] == [1]
    disk.room = 1000
    run.log({"step": 3})
    assert [line["step"] for line in run.lines()] == [1, 3]
    assert (run.folder / METRICS).read_bytes().endswith(b"\n")


class Kept(KeptFolder):
    plan, lines, what, finished = "plan.json", "lines.jsonl", "work", "pieces"


@pytest.mark.parametrize("cut", [1, 5, 9])
def test_a_line_cut_off_by_a_crash_is_dropped_and_a_damaged_one_is_named(tmp_path: Path, cut: int) -> None:
    folder = Kept(tmp_path / "k", {"n": 1})
    folder.add_line({"k": 1})
    with (tmp_path / "k" / "lines.jsonl").open("ab") as file:
        file.write(b'{"k": 22}\n'[:cut])
    found: list[Any] = []
    folder.read_lines(lambda line: found.append(line["k"]))
    assert found == [1]
    folder.add_line({"k": 2})
    found.clear()
    folder.read_lines(lambda line: found.append(line["k"]))
    assert found == [1, 2]
    with (tmp_path / "k" / "lines.jsonl").open("ab") as file:
        file.write(b"{nonsense\n")
    with pytest.raises(CheckpointError, match="line 3"):
        folder.read_lines(lambda line: None)


def made(target: Path) -> None:
    with fresh_folder(target) as folder:
        (folder / "all").write_text("x")


WRITES: dict[str, Callable[[Path], Any]] = {
    "a result's folder": lambda home: Kept(home / "kept", {}),
    "a training's folder": lambda home: Run.open(home / "run", {}, resume=False),
    "a line": lambda home: append_line(home / "line", "x"),
    "a whole file": lambda home: write_whole(home / "whole", b"x"),
    "a fresh folder": lambda home: made(home / "fresh"),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_file_in_the_folders_place_is_refused_and_stays(write: str, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("kept")
    with pytest.raises(OutputPathError, match=r"Not a directory|File exists"):
        WRITES[write](tmp_path / "home")
    assert (tmp_path / "home").read_text() == "kept"
    (tmp_path / "home").unlink()
    (tmp_path / "home").mkdir()
    WRITES[write](tmp_path / "home")  # nothing else was wrong
    assert list((tmp_path / "home").iterdir())


@pytest.mark.parametrize("write", WRITES)
def test_a_read_only_disk_is_refused(write: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions do not stop root, so the system's calls refuse here as those of a read-only disk do."""

    def refused(path: Any) -> OSError:
        return OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def opened(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if set(mode) & set("wax+"):
            raise refused(path)
        return real(path, mode, *rest, **more)

    def mkdir(path: Any, *rest: Any, **more: Any) -> None:
        raise refused(path)

    real = io.open
    monkeypatch.setattr(io, "open", opened)
    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(OutputPathError, match="Read-only file system"):
        WRITES[write](tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_a_fresh_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "set"

    def stopped() -> None:
        with fresh_folder(target) as folder:
            (folder / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert list(tmp_path.iterdir()) == []
    with fresh_folder(target) as folder:
        (folder / "all").write_text("x")
        assert not target.exists()
    assert [p.name for p in target.iterdir()] == ["all"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\\x", "a\0b", "link/x"])
def test_a_name_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "link").symlink_to(tmp_path)
    assert within(home, name) is None
    assert within(home, "a/b.png") == (home / "a/b.png").resolve()
