"""`mechicl eval lcl` from end to end on a small model, what it refuses before loading anything, and that its figures are its numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

import mechicl
from mechicl.analysis.link.evaluate import evaluate_link
from mechicl.analysis.link.rename import link_or_prior
from mechicl.cli import app
from mechicl.cli.eval import parse_shots
from mechicl.data import concepts
from mechicl.data.isekai_made import write_isekai
from mechicl.data.link_context import SHORT, generated_pool
from mechicl.errors import OptionError
from mechicl.models.vlm import HookedVLM
from mechicl.views.plots import figure_json, plot
from tests.link_cases import RuleModel, follow

runner = CliRunner()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, organism: Callable[..., tuple[Any, Any]]) -> RuleModel:
    model = RuleModel(HookedVLM(*organism("qwen2_5_vl"), check=False), follow)
    monkeypatch.setattr(mechicl, "load", lambda *args, **kwargs: model, raising=False)
    return model


def test_lcl_writes_its_tables_and_page_and_goes_on_where_it_was(tiny: RuleModel, tmp_path: Path) -> None:
    line = [
        "eval",
        "lcl",
        "--questions",
        "8",
        "--shots",
        "0,2",
        "--size",
        "28",
        "--corruption",
        "--at",
        "3",
        "--quiet",
        "--out",
        str(tmp_path / "run"),
    ]
    done = runner.invoke(app, line)
    assert done.exit_code == 0, done.output
    assert "shots per class, isekai-10: n = 8 queries" in done.output
    assert "share of wrong labels" in done.output
    table = pd.read_csv(tmp_path / "run" / "link.csv")
    row = table[(table.setting == "2 shots") & (table.way == "written")].iloc[0]
    assert (row.accuracy, row.positive_recall, row.negative_recall) == (1.0, 1.0, 1.0)
    assert table[(table.setting == "100 % wrong") & (table.way == "likelihood")].follows.iloc[0] == 1.0
    page = (tmp_path / "run" / "link.html").read_text()
    assert "Does the model name by the link?" in page
    assert "http://" not in page.replace("http://www.w3.org", "").split("<body")[1][:2000]
    asked = tiny.asked
    again = runner.invoke(app, line)
    assert again.exit_code == 0
    assert tiny.asked == asked


def test_lcl_reads_published_lists_and_class_folders(tiny: RuleModel, tmp_path: Path) -> None:
    folder = write_isekai(tmp_path / "set", n_groups=2, per_class=5, size=28, pairs=2, context=2, queries=2)
    for protocol in ("isekai-10", "isekai-pair"):
        done = runner.invoke(
            app, ["eval", "lcl", "--data", str(folder), "--protocol", protocol, "--shots", "0,2", "--questions", "4", "--size", "28", "-q"]
        )
        assert done.exit_code == 0, done.output
        assert "n = 4 queries" in done.output
        assert "1.000" in done.output
    (folder / "dust.txt").write_text("x")
    for name in ("made.json", "ISEKAI-10.json", "ISEKAI-pair.json", "dust.txt"):
        (folder / name).unlink()
    for path in sorted(folder.iterdir())[:1]:
        (path / "broken.png").write_bytes(b"no picture")
    done = runner.invoke(app, ["eval", "lcl", "--data", str(folder), "--protocol", "class-folders", "--labels", "words", "--shots", "1", "--questions", "4", "--size", "28", "--likelihood"])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "broken.png" in done.output
    assert "prompts on 4 episodes" in done.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--protocol", "isekai"], "protocol must be one of isekai-10, isekai-pair, class-folders"),
        (["--labels", "mine"], "labels must be one of"),
        (["--prompt", "mine"], "prompt must be one of"),
        (["--rule", "mine"], "rule must be one of"),
        (["--shots", "two"], "shots must be numbers"),
        (["--shots", ","], "shots must be numbers"),
        (["--data", "/nowhere/x"], "data must be 'generated' or a folder"),
        (["--out", "/nowhere/x/y"], "out must lie in an existing folder"),
    ],
)
def test_mistakes_end_with_one_line_before_a_model_is_loaded(arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr(mechicl, "load", load, raising=False)
    done = runner.invoke(app, ["eval", "lcl", *arguments])
    assert done.exit_code == 2, done.output
    assert says in done.output
    assert "Traceback" not in done.output


def test_dry_run_says_the_cost_and_stops(tiny: RuleModel, tmp_path: Path) -> None:
    done = runner.invoke(
        app, ["eval", "lcl", "--questions", "4", "--shots", "1", "--size", "28", "--dry-run", "-q", "--out", str(tmp_path / "run")]
    )
    assert done.exit_code == 0
    assert "4 prompts on 4 episodes" in done.output
    assert not (tmp_path / "run").exists()


def test_shots_are_numbers() -> None:
    assert parse_shots("4, 0,2") == (0, 2, 4)
    with pytest.raises(OptionError, match="shots must differ"):
        parse_shots("4, 0,2,2")
    with pytest.raises(OptionError, match="shots must be numbers"):
        parse_shots("1,-2")


def trace(figure: Any, name: str) -> Any:
    return next(t for t in figure.data if t.name == name)


def test_the_figures_numbers_are_the_results(organism: Callable[..., tuple[Any, Any]]) -> None:
    model = RuleModel(HookedVLM(*organism("qwen2_5_vl"), check=False), follow)
    pool = generated_pool(0, n_groups=2, per_class=4, size=28)
    scores = evaluate_link(model, pool, n=4, shots=(0, 1), prompt=SHORT, labels="words", progress=False)
    figure = plot(scores)
    for name, found in (
        ("written, both-names rule", [row.accuracy for row in scores.rows]), ("most probable candidate", [row.likelihood for row in scores.rows]),
        ("recall, negative class", [row.negative_recall for row in scores.rows]), ("nearest prototype", scores.baseline("nearest prototype").accuracy),
    ):  # fmt: skip
        line = trace(figure, name)
        np.testing.assert_array_equal(line.y, [e.value for e in found])  # type: ignore[union-attr]
        np.testing.assert_array_equal(np.asarray(line.customdata, dtype=float)[:, :2], [[e.low, e.high] for e in found])  # type: ignore[union-attr]
        assert list(line.x) == ["0 shots", "1 shot"]
    assert figure_json(plot(scores, dark=True))
    episodes = concepts.draw(4, classes=2, shots=2, size=28, seed=0, labels=("bada", "kimo"))
    found = link_or_prior(model, episodes, shots=(1, 2), progress=False)
    figure = plot(found)
    np.testing.assert_array_equal(trace(figure, "the link's name").y, [row.link.value for row in found.rows if row.names == "renamed"])
    np.testing.assert_array_equal(trace(figure, "true names").y, [row.preference.value for row in found.rows if row.names == "true"])


def test_a_class_with_markup_in_its_name_is_shown_as_text(tiny: RuleModel, tmp_path: Path) -> None:
    for name in ("<b>one", "two"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(3):
            Image.new("RGB", (28, 28), (40 * k, 10, 200 if name == "two" else 0)).save(tmp_path / "set" / name / f"{k}.png")
    line = ["eval", "lcl", "--data", str(tmp_path / "set"), "--protocol", "class-folders", "--labels", "own", "--shots", "1", "--questions", "2", "--size", "28", "-q"]  # fmt: skip
    done = runner.invoke(app, [*line, "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert "<b>one" not in (tmp_path / "run" / "link.html").read_text()
