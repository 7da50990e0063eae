"""A sweep's folder: killed at any moment it goes on, and it never mixes two sweeps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechicl.analysis.patching import run as patch_run
from mechicl.analysis.patching.patch import patch
from mechicl.errors import CheckpointError, OutputPathError
from mechicl.models.planted import planted_induction
from mechicl.models.toys.prompts import toy_episodes
from mechicl.prompts.corrupt import Pairs, minimal_pairs

QUIET: dict[str, Any] = {"progress": False, "n_permutations": 100}

SCRIPT = """
import sys, time
from mechicl.analysis.patching import engine as patch_engine
from mechicl.analysis.patching.patch import patch
from mechicl.models.planted import planted_induction
from mechicl.models.toys.prompts import toy_episodes
from mechicl.prompts.corrupt import minimal_pairs
run = patch_engine.Base.run
def slowly(self, cells, read):
    time.sleep(0.2)
    return run(self, cells, read)
patch_engine.Base.run = slowly
model = planted_induction(n_heads=4, seed=3).model
pairs = minimal_pairs(model.renderer, toy_episodes(6, classes=3), "wrong_exemplar")
patch(model, pairs, sites=("z", "q", "k", "v", "resid_pre"), by="pos", batch_size=3, out=sys.argv[1], progress=False, n_permutations=100)
"""


def setting(seed: int = 3, n: int = 6) -> tuple[Any, Pairs]:
    model = planted_induction(n_heads=4, seed=seed).model
    return model, minimal_pairs(model.renderer, toy_episodes(n, classes=3), "wrong_exemplar")


def test_a_killed_sweep_goes_on_and_gives_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "sweep"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(out)])
    cells = out / "cells.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if cells.exists() and cells.read_bytes().count(b"\n") >= 5:
            break
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = cells.read_bytes().count(b"\n")
    assert kept >= 5
    with cells.open("ab") as file:  # what a crash in the middle of a line leaves
        file.write(b'{"site": "z", "cells": [0, 1')
    ran: list[int] = []
    run = patch_run.Recorded.run
    monkeypatch.setattr(patch_run.Recorded, "run", lambda self, patches: ran.append(len(patches)) or run(self, patches))
    model, pairs = setting()
    options: dict[str, Any] = {**QUIET, "sites": ("z", "q", "k", "v", "resid_pre"), "by": "pos", "batch_size": 3}
    again = patch(model, pairs, out=out, **options)
    whole = patch(model, pairs, **options)
    lines = [json.loads(line) for line in cells.read_text().splitlines()]
    done = sum(len(line["cells"]) for line in lines[:kept] if line["site"] not in ("clean", "corrupt"))
    total = 2 * sum(effects.value.size for effects in whole.sites.values())
    assert done > 0
    assert sum(ran) == total - done + total  # the rest of the first, all of the second
    for site in whole.sites:
        np.testing.assert_array_equal(again[site].raw, whole[site].raw)
    ran.clear()
    third = patch(model, pairs, out=out, **options)  # nothing is left to be run
    assert ran == []
    np.testing.assert_array_equal(third["z"].value, whole["z"].value)
    pd.testing.assert_frame_equal(pd.read_parquet(out / "cells.parquet"), whole.to_frame(), check_dtype=False)
    assert not list(out.rglob("*.p*kl"))


def test_a_changed_setting_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    model, pairs = setting()
    options: dict[str, Any] = {**QUIET, "sites": "z", "by": "head", "out": tmp_path / "sweep"}
    patch(model, pairs, **options)
    changes: list[tuple[str, dict[str, Any]]] = [
        ("direction", {"direction": "noise"}), ("metric", {"metric": "prob"}), ("by", {"by": "span"}), ("sites", {"layers": [0]}),
    ]  # fmt: skip
    for name, change in changes:
        with pytest.raises(CheckpointError, match=f"{name} was"):
            patch(model, pairs, **{**options, **change})
    other, _ = setting(seed=4)
    with pytest.raises(CheckpointError, match=r"(weights|model) was"):
        patch(other, pairs, **options)
    with pytest.raises(CheckpointError, match="n was 6, now 5"):
        patch(model, setting(n=5)[1], **options)
    # what does not change the numbers may change
    patch(model, pairs, **{**options, "correction": "fdr_bh", "seed": 5, "batch_size": 2})


def test_other_files_and_damage_are_refused(tmp_path: Path) -> None:
    model, pairs = setting()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    options: dict[str, Any] = {**QUIET, "sites": "z", "by": "head"}
    with pytest.raises(OutputPathError, match="holds other files"):
        patch(model, pairs, out=tmp_path / "mine", **options)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputPathError, match="folder that can be written"):
        patch(model, pairs, out=tmp_path / "file", **options)
    patch(model, pairs, out=tmp_path / "sweep", **options)
    with (tmp_path / "sweep" / "cells.jsonl").open("a") as file:
        file.write("nonsense\n")
    with pytest.raises(CheckpointError, match="must hold finished cells; line"):
        patch(model, pairs, out=tmp_path / "sweep", **options)
