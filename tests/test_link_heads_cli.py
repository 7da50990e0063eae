"""`mechicl eval link` and `mechicl eval lcl --renamed` from end to end, and that the figures are the numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import mechicl
from mechicl.analysis.link.mechanism_compare import build_or_sharpen
from mechicl.cli import app
from mechicl.cli.link import parse_models
from mechicl.errors import OptionError
from mechicl.models.load import demo_folder
from mechicl.models.planted import planted_induction
from mechicl.models.toys.prompts import toy_episodes
from mechicl.models.vlm import HookedVLM
from mechicl.views.link_circuit import build_rows
from mechicl.views.plots import figure_json, plot
from tests.link_cases import RuleModel, follow

runner = CliRunner()


@pytest.mark.slow  # python -m pytest -m slow tests/test_link_heads_cli.py
def test_eval_link_lists_the_heads_of_the_bundled_model_and_writes_a_page(tmp_path: Path) -> None:
    line = ["eval", "link", "-n", "24", "--shots", "1", "--metric", "logit_diff", "--quiet", "--out", str(tmp_path / "run")]
    done = runner.invoke(app, line)
    assert done.exit_code == 0, done.output
    heads = pd.read_csv(tmp_path / "run" / "heads.csv")
    joining = heads[heads["sets"].fillna("").str.contains("joining")]
    assert 3 in set(joining["layer"])  # the bundled model's induction heads sit in its last layer
    assert np.asarray(joining["carried_items"], dtype=float).min() > 0.1
    assert "joining: " in done.output
    page = (tmp_path / "run" / "link.html").read_text(encoding="utf-8")
    assert "Which heads carry the link?" in page
    assert set(pd.read_csv(tmp_path / "run" / "sets.csv")["set"]) == {"matching", "joining", "bringing items", "bringing labels"}


def test_a_model_beside_itself_has_learnt_no_link(tmp_path: Path) -> None:
    shutil.copytree(demo_folder(), tmp_path / "same")
    line = [
        "eval",
        "link",
        "-n",
        "8",
        "--shots",
        "1",
        "--metric",
        "logit_diff",
        "--quiet",
        "--out",
        str(tmp_path / "run"),
        "-a",
        f"copy={tmp_path / 'same'}",
    ]
    done = runner.invoke(app, line)
    assert done.exit_code == 0, done.output
    assert "No link was learnt that shows" in done.output
    assert pd.read_csv(tmp_path / "run" / "models.csv")["finding"].tolist() == ["no link"]
    assert len(pd.read_csv(tmp_path / "run" / "grafts.csv")) > 0


def test_eval_lcl_asks_about_renamed_things_too(
    monkeypatch: pytest.MonkeyPatch, organism: Callable[..., tuple[Any, Any]], tmp_path: Path
) -> None:
    model = RuleModel(HookedVLM(*organism("qwen2_5_vl"), check=False), follow)
    monkeypatch.setattr(mechicl, "load", lambda *args, **kwargs: model, raising=False)
    line = [
        "eval",
        "lcl",
        "-n",
        "4",
        "--shots",
        "0,2",
        "--size",
        "28",
        "--renamed",
        "swap",
        "--likelihood",
        "--quiet",
        "--out",
        str(tmp_path / "run"),
    ]
    done = runner.invoke(app, line)
    assert done.exit_code == 0, done.output
    assert "known things renamed (swap): n = 4 queries" in done.output
    table = pd.read_csv(tmp_path / "run" / "prior.csv")
    assert table[(table.names == "renamed") & (table.shots == 2)]["link"].item() == 1.0
    assert "Link or prior?" in (tmp_path / "run" / "link.html").read_text(encoding="utf-8")


def test_what_is_not_there_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr(mechicl, "load", never, raising=False)
    for options, said in [
        (["-a", str(tmp_path / "nowhere")], "there is no folder"),
        (["--prompt", "long"], "prompt must be one of"),
        (["--metric", "kl"], "metric must be one of"),
    ]:
        done = runner.invoke(app, ["eval", "link", *options])
        assert done.exit_code == 2
        assert said in done.output
    done = runner.invoke(app, ["eval", "lcl", "--renamed", "sideways"])
    assert done.exit_code == 2
    assert "renamed must be one of" in done.output
    with pytest.raises(OptionError, match="different names"):
        parse_models([f"a={tmp_path}", f"a={tmp_path}"])
    assert parse_models([f"a={tmp_path}", str(tmp_path)]) == {"a": tmp_path, tmp_path.name: tmp_path}


def test_the_figures_are_the_numbers() -> None:
    made = planted_induction(n_heads=6, seed=3)
    found = build_or_sharpen(
        made.model, {"a & <b>": made.model}, toy_episodes(16, classes=2, shots=1), parts=False, progress=False, batch_size=32
    )
    spec = build_rows(found)
    tuned = next(t for t in spec["data"] if t["name"] == "fine-tuned")
    assert np.allclose(tuned["x"], [found.rows[0].accuracy.value])
    assert "a & <b>" not in figure_json(plot(found))  # shown as text, not read as markup
