"""What somebody stumbles over in the first hour: what loads quietly, where the model is named, what is refused before work, what a mistake says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_comparison_text import tokenizer
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.utils import logging
from typer.testing import CliRunner
from views_samples import prompt

import mechicl
from mechicl.cli import app
from mechicl.cli.options import check_folder
from mechicl.data import concepts
from mechicl.errors import CheckpointError, DeviceError, MechiclError, OptionError, OutputPathError
from mechicl.models.doctor import diagnose
from mechicl.models.load import check_device, check_model
from mechicl.models.text import HookedLM
from mechicl.models.vlm import HookedVLM
from mechicl.views.plots import plot, plot_pattern

runner = CliRunner()
MODELS = (["heads"], ["ablate", "--top", "2"], ["patch"], ["circuit"], ["kv"], ["doctor"], ["report", "--out", "x.html"], ["adapt", "--out", "x"],
          ["eval", "lcl"], ["eval", "link"], ["eval", "tasks", "--data", "."], ["study", "huang2026", "--out", "x"], ["study", "heads-at-odds", "--out", "x"])  # fmt: skip


class Asked(Exception):
    """Stands for a model that would be loaded now."""


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that were asked for; none is loaded."""
    found: list[str] = []

    def load(name: Any, **kwargs: Any) -> None:
        found.append(str(name))
        raise Asked

    monkeypatch.setattr(mechicl, "load", load, raising=False)
    monkeypatch.setattr("mechicl.models.load.load", load)
    return found


def said(result: Any) -> str:
    return " ".join(result.output.replace("│", " ").split())


def test_loading_shows_no_bar_of_transformers_and_leaves_its_switch_alone() -> None:
    for progress in ("True", "False"):  # stderr is a pipe here: no terminal
        code = f"import mechicl; mechicl.load('demo', progress={progress})"
        assert "Loading weights" not in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    before = logging.is_progress_bar_enabled()
    try:
        for switch in (logging.enable_progress_bar, logging.disable_progress_bar):
            switch()
            wanted = logging.is_progress_bar_enabled()
            mechicl.load("demo", check=False, progress=False)
            with pytest.raises(CheckpointError):
                mechicl.load("./nosuch", progress=False)
            assert logging.is_progress_bar_enabled() is wanted
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


@pytest.mark.parametrize("arguments", MODELS, ids=lambda a: " ".join(a[:2]))
@pytest.mark.parametrize("way", [["--model", "./nosuch"], ["-m", "./nosuch"], ["./nosuch"]])
def test_every_command_takes_its_model_both_ways(arguments: list[str], way: list[str]) -> None:
    refused = ["--seed", "-1"] if arguments != ["doctor"] else ["--nosuch"]  # the model is taken; what comes after it is not
    told = said(runner.invoke(app, [*arguments, *way, *refused]))
    assert ("should be greater than or equal to 0" if arguments != ["doctor"] else "No such option") in told


def test_the_model_named_as_an_argument_is_the_one_that_is_loaded(named: list[str]) -> None:
    for arguments in (["doctor", "a/b"], ["doctor", "-m", "a/b"], ["heads", "a/b", "-n", "1", "--size", "28"]):
        assert isinstance(runner.invoke(app, arguments).exception, Asked)
    assert named == ["a/b"] * 3
    assert isinstance(runner.invoke(app, ["doctor"]).exception, Asked)
    assert named[-1] == "demo"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["report", "out.html"], "got 'out.html'. To write a file or folder of that name: --out out.html"),
        (["heads", "demo", "scores"], "got 'scores' beside 'demo'"),
        (["heads", "demo", "--model", "other"], "model must be given once; got 'demo' and --model other"),
        (["sweep", "nosuch.toml"], "there is no file nosuch.toml"),
        (["eval", "lcl", "--shots", "1,1"], "shots must differ; got '1,1'"),
        (["compare", "demo"], "models must be two; got 'demo'"),
        (["compare", "demo", "demo", "demo"], "models must be two"),
        (["series"], "model must be given; got none"),
    ],
)
def test_mistakes_name_what_is_wrong(named: list[str], arguments: list[str], says: str) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert says in said(result)
    assert not named


def test_a_new_folder_in_a_new_folder_is_made_where_one_stands_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_folder(Path("runs/first/one")) == Path("runs/first/one")
    assert (tmp_path / "runs" / "first").is_dir()
    assert not (tmp_path / "runs" / "first" / "one").exists()
    (tmp_path / "file").touch()
    with pytest.raises(OutputPathError, match="file cannot"):
        check_folder(Path("file/one"))
    with pytest.raises(OutputPathError, match="existing folder"):
        check_folder(tmp_path / "drive" / "one")


def test_fine_tuning_looks_at_its_folder_and_its_pictures_before_it_loads_a_model(tmp_path: Path, named: list[str]) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    for arguments, says in (
        (["--out", str(tmp_path / "notes")], "holds other files"),
        (["--out", str(tmp_path / "run")], "holds a run"),
        (["--out", str(tmp_path / "new"), "--shots", "500", "--size", "28"], "must have 501 pictures"),
    ):
        result = runner.invoke(app, ["adapt", *arguments, "-q"])
        assert result.exit_code == 2
        assert says in said(result)
    assert not named
    assert not (tmp_path / "new").exists()


def test_data_without_pictures_files_for_models_and_devices_that_are_none_say_what_to_give(tmp_path: Path, named: list[str]) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
    result = runner.invoke(app, ["heads", "--task", "own", "--data", str(tmp_path / "photos")])
    assert result.exit_code == 2
    assert "Give each class a folder (photos/cat/1.jpg" in said(result)
    assert not named
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"is a file\. Name the folder"):
        check_model(tmp_path / "weights.safetensors")
    with pytest.raises(DeviceError, match=r"got .gpu.\. Use"):
        check_device("gpu")


@pytest.mark.parametrize("given", [["demo", "./nosuch"], ["demo", "nosuch"], ["--model", "demo", "-m", "./nosuch"]])
def test_compare_looks_up_both_names_before_any_work(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the first model was measured before the second was looked up")

    monkeypatch.setattr("mechicl.analysis.comparison.compare.both_sides", measure)
    result = runner.invoke(app, ["compare", *given, "-n", "4", "--size", "28", "-q"])
    assert result.exit_code == 2
    assert "nosuch" in result.stderr


def test_every_checkpoint_and_every_adapted_model_is_looked_up_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: list[str]
) -> None:
    from mechicl.analysis.link.mechanism_prior import link_priors

    with pytest.raises(MechiclError, match="nosuch"):
        link_priors({"base": "demo", "tuned": str(tmp_path / "nosuch")}, concepts.draw(2, size=28, seed=0))
    (tmp_path / "empty").mkdir()
    result = runner.invoke(app, ["eval", "link", "--adapted", str(tmp_path / "empty"), "-n", "8"])
    assert result.exit_code == 2
    assert "config.json" in result.stderr
    for step in (1, 2):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors").touch()
    (tmp_path / "run" / "checkpoint-1" / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "run" / "checkpoint-2" / "config.json").write_text('{"model_type": "nosuch"}')
    result = runner.invoke(app, ["series", "--model", str(tmp_path / "run"), "-n", "2", "--size", "28", "--modality", "words"])
    assert result.exit_code == 2
    assert "checkpoint-2" in result.stderr
    assert not named


def test_who_stops_a_command_is_told_how_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mechicl, "load", stopped, raising=False)
    result = runner.invoke(app, ["heads", "-n", "2", "--size", "28", "-q"])
    assert result.exit_code == 130
    assert "the same command goes on from there" in said(result)


def test_check_model_agrees_with_load() -> None:
    check_model("demo")
    with pytest.raises(CheckpointError, match="there is no folder"):
        check_model("./nosuch")


def test_debug_counts_behind_the_command_too() -> None:
    assert isinstance(runner.invoke(app, ["ablate", "--heads", "x", "--debug"]).exception, OptionError)
    assert isinstance(runner.invoke(app, ["ablate", "--heads", "x"]).exception, SystemExit)


def test_help_says_where_command_line_and_python_differ() -> None:
    told = said(runner.invoke(app, ["ablate", "--help"]))
    assert "zero (the paper's, and the default in Python)" in told
    assert "28" in told


def test_the_doctor_sees_a_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    words = tokenizer()
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = HookedLM(AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=len(words), num_key_value_heads=2, **sizes)), words)
    checks = diagnose(model)
    assert all(check.ok for check in checks)
    assert any("padding" in check.name for check in checks)
    assert not any("picture" in check.name for check in checks)
    monkeypatch.setattr(mechicl, "load", lambda *args, **kwargs: model, raising=False)
    assert runner.invoke(app, ["doctor", "some/model"]).exit_code == 0


def test_a_prompt_view_can_be_plotted() -> None:
    view = prompt()
    first = next(iter(view.patterns))
    assert plot(view).to_json() == plot_pattern(view, first).to_json()
    with pytest.raises(OptionError, match="pattern_limit"):
        plot(type(view)(**{**vars(view), "patterns": {}}))


def test_the_organism_still_answers_to_the_doctor(organism: Callable[..., tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    model = HookedVLM(*organism("qwen2_5_vl"), check=False)
    monkeypatch.setattr(mechicl, "load", lambda *args, **kwargs: model, raising=False)
    assert "another picture" in runner.invoke(app, ["doctor", "--model", "demo"]).output
