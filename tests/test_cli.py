"""The command line: what it refuses before loading anything, in one line with exit code 2; and that it does its job on a small real model."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

import mechicl
from mechicl.cli import app, parse_heads
from mechicl.cli.patch import parse_layers
from mechicl.errors import OptionError, OutputPathError
from mechicl.models.vlm import HookedVLM

runner = CliRunner()


@pytest.fixture
def never_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr(mechicl, "load", load, raising=False)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, organism: Callable[..., tuple[Any, Any]]) -> HookedVLM:
    model = HookedVLM(*organism("qwen2_5_vl"), check=False)
    monkeypatch.setattr(mechicl, "load", lambda *args, **kwargs: model, raising=False)
    return model


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, runpy\nsys.argv = ['mechicl', '--help']\nfrom mechicl.cli import app\n"
        "try:\n    app()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print(sorted({'torch', 'numpy', 'pandas', 'transformers', 'plotly', 'transformer_lens'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip().endswith("[]")
    for command in ("report", "heads", "ablate", "patch", "circuit", "kv", "doctor", "train"):
        assert command in run.stdout


def test_the_version_is_the_packages() -> None:
    assert runner.invoke(app, ["--version"]).output.strip() == mechicl.__version__


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["report", "--out", "/nowhere/x.html"], "out must lie in an existing folder"),
        (["report", "--out", "x.html", "--episodes", "4"], "episodes must be at least 8"),
        (["report"], "--out"),
        (["report", "--out", "x.html", "--task", "cats"], "task must be one of concepts, digits, own"),
        (["compare", "demo", "demo", "--task", "clevr"], "data must be given with the tasks that read it"),
        (["report", "--out", "x.html", "--how", "gently"], "'gently' is not one of"),
        (["adapt", "demo", "--out", "x", "--strategy", "3-way"], "strategy must be one of 2-way"),
        (["heads", "--classes", "1"], "--classes"),
        (["heads", "--task", "digits", "--classes", "11"], "classes must be at most 10"),
        (["heads", "--out", "/nowhere/x.csv"], "out must lie in an existing folder"),
        (["ablate"], "heads must be given as --heads or as --top; got neither"),
        (["ablate", "--heads", "1.3", "--top", "2"], "got both"),
        (["ablate", "--heads", "1,3"], "heads must be layer.head pairs"),
        (["ablate", "--heads", "1.3,1.3"], "heads must differ"),
        (["ablate", "--top", "2", "--by", "beauty"], "by must be one of"),
        (["patch", "--pairs", "upside_down"], "pairs must be one of swap_labels"),
        (["patch", "--sites", "resid_pre,resid"], "sites must be one of resid_pre"),
        (["patch", "--sites", ","], "sites must be some of"),
        (["patch", "--by", "word"], "by must be one of span"),
        (["patch", "--direction", "up"], "direction must be one of"),
        (["patch", "--align", "left"], "align must be one of"),
        (["patch", "--layers", "3-1"], "layers must be numbers or ranges"),
        (["patch", "--metric", "beauty"], "metric must be one of"),
        (["patch", "--out", "/nowhere/x"], "out must lie in an existing folder"),
        (["patch", "--out", "/proc/version"], "out must be a folder"),
        (["circuit", "--target", "1.5"], "target must lie between 0 and 1"),
        (["circuit", "--method", "guess"], "method must be one of EAP-IG"),
        (["circuit", "--search", "long"], "search must be one of"),
        (["circuit", "--level", "head"], "level must be one of"),
        (["circuit", "-n", "4"], "episodes must be at least 8"),
        (["kv", "--control", "nothing"], "control must be one of filler, zero-shot, both"),
        (["kv", "--filler", "poem"], "filler must be one of turns, words"),
        (["kv", "--spans", "moon"], "spans must be some of query image"),
        (["kv", "--factors", "--semantics", "gone"], "semantics must be one of"),
        (["kv", "--format", "sonnet"], "format must be one of"),
        (["kv", "--out", "/nowhere/x"], "out must lie in an existing folder"),
        (["train", "vlm", "--out", "/tmp/x", "--family", "no_family"], "family must be one of"),
        (["train", "vlm"], "--out"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(never_loads: None, arguments: list[str], says: str) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output


def test_a_refusal_is_one_line_on_stderr(never_loads: None) -> None:
    result = runner.invoke(app, ["ablate", "--heads", "x"])
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("Error: heads must be layer.head pairs")


def test_debug_shows_the_error_itself(never_loads: None) -> None:
    result = runner.invoke(app, ["--debug", "report", "--out", "/nowhere/x.html"])
    assert isinstance(result.exception, OutputPathError)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["-m", "./no/such/folder"], "no folder"), (["--dtype", "int3"], "dtype must be one of"), (["--device", "quantum"], "device must")],
)
def test_models_that_cannot_be_loaded_are_refused(arguments: list[str], says: str) -> None:
    result = runner.invoke(app, ["heads", *arguments])
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("text", ["", ",", "1", "1.2.3", "a.b", "1.-2", "1.²", "1. 2x"])
def test_heads_that_are_not_pairs_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"layer\.head pairs"):
        parse_heads(text)


def test_heads_are_read_in_order() -> None:
    assert parse_heads("1.3, 0.12,2.0") == ((1, 3), (0, 12), (2, 0))


def test_heads_lists_every_score_and_writes_its_numbers(tiny: HookedVLM, tmp_path: Path) -> None:
    out = tmp_path / "scores.csv"
    result = runner.invoke(
        app, ["heads", "-n", "6", "--classes", "2", "--shots", "2", "--size", "28", "--top", "2", "--quiet", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    frame = pd.read_csv(out)
    assert len(frame) == frame["score"].nunique() * tiny.cfg.n_layers * tiny.cfg.n_heads
    best = frame[frame["score"] == "induction"].sort_values("value", ascending=False).iloc[0]
    line = next(line for line in result.stdout.splitlines() if line.startswith("induction "))
    assert line.split()[1] == f"{int(best['layer'])}.{int(best['head'])}"
    assert float(line.split()[2]) == pytest.approx(best["value"], abs=5e-4)  # three digits are printed
    assert list(tmp_path.iterdir()) == [out]


def test_layers_are_read_as_numbers_and_ranges() -> None:
    assert parse_layers("0-2, 7") == (0, 1, 2, 7)
    assert parse_layers("3") == (3,)
    assert parse_layers(None) is None
    for text in ("", "-1", "1-", "a", "2-1", "1--2"):
        with pytest.raises(OptionError, match="layers must be numbers"):
            parse_layers(text)


@pytest.fixture(scope="module")
def demo() -> HookedVLM:
    return mechicl.load("demo", check=False)


SMALL = ["-n", "16", "--classes", "2", "--shots", "1", "--size", "28", "--quiet"]


def test_patch_previews_lists_writes_and_goes_on_where_it_was(demo: HookedVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechicl, "load", lambda *args, **kwargs: demo, raising=False)
    out = tmp_path / "run"
    command = ["patch", *SMALL, "--sites", "resid_pre,z", "--layers", "0,3", "--top", "2", "--out", str(out)]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "resid_pre by span: " in result.stderr
    assert "cells x 16 episodes" in result.stderr
    assert "n = 16 pairs (swap_labels)" in result.stdout
    frame = pd.read_csv(out / "effects.csv")
    best = frame[frame["site"] == "z"].sort_values("value", ascending=False).iloc[0]
    lines = result.stdout.splitlines()
    line = lines[next(i for i, text in enumerate(lines) if text.startswith("z ")) + 1]
    assert line.split()[:4] == ["layer", str(int(best["layer"])), "head", str(int(best["head"]))]
    assert float(line.split()[4]) == pytest.approx(best["value"], abs=5e-4)  # three digits are printed
    page = (out / "effects.html").read_text(encoding="utf-8")
    assert "mechicl patch --model demo" in page
    assert 'data-for="patching-1"' in page
    cells = (out / "span" / "cells.jsonl").read_bytes()
    again = runner.invoke(app, command)
    assert again.exit_code == 0, again.output
    assert again.stdout == result.stdout
    assert (out / "span" / "cells.jsonl").read_bytes() == cells  # nothing was run twice
    other = runner.invoke(app, [*command, "--metric", "prob"])
    assert other.exit_code == 2
    assert "out must hold the same sweep" in other.stderr


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(demo: HookedVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechicl, "load", lambda *args, **kwargs: demo, raising=False)
    result = runner.invoke(app, ["patch", *SMALL, "--sites", "z", "--dry-run", "--out", str(tmp_path / "x")])
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "z by head: 16 cells x 16 episodes" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_circuit_finds_measures_and_writes(demo: HookedVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechicl, "load", lambda *args, **kwargs: demo, raising=False)
    result = runner.invoke(
        app, ["circuit", *SMALL, "--random", "4", "--exact", "2", "--method", "EAP", "--target", "0.7", "--out", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    assert "edges, 8 pairs to find and 8 to measure" in result.stderr
    assert "Only 8 pairs" in result.stderr
    found = pd.read_csv(tmp_path / "circuit.csv")
    assert f"{len(found)} of 479 edges carry" in result.stdout
    assert all(edge in result.stdout for edge in found["edge"])
    assert {path.name for path in tmp_path.iterdir()} == {"circuit.csv", "curve.csv", "edges.csv", "circuit.html"}
    page = (tmp_path / "circuit.html").read_text(encoding="utf-8")
    assert 'data-for="circuit-curve"' in page
    assert "http" not in page.split("<script>")[0].replace("http-equiv", "")


def test_kv_says_what_it_takes_lists_and_writes(demo: HookedVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechicl, "load", lambda *args, **kwargs: demo, raising=False)
    few = ["-n", "6", *SMALL[2:]]
    result = runner.invoke(app, ["kv", *few, "--factors", "--margin", "--spans", "query image,last token", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("keys and values: 6 episodes, about ")
    shift = pd.read_csv(tmp_path / "shift.csv")
    assert set(shift["span"]) == {"query image", "last token"}
    assert set(shift["control"]) == {"filler", "zero-shot"}
    mean = shift[
        (shift["control"] == "filler") & (shift["measure"] == "relative_l2") & (shift["part"] == "v") & (shift["span"] == "last token")
    ]["value"].mean()
    assert f"v      last token       {mean:.3f} (" in result.stdout
    assert "accuracy, kept + label first" in result.stdout
    assert "contrastive margin, n = 6 episodes" in result.stdout
    assert "Our definition" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"shift.csv", "shares.csv", "answers.csv", "margin.csv", "kv.html"}
    page = (tmp_path / "kv.html").read_text(encoding="utf-8")
    assert 'data-for="kv-plane"' in page
    assert "key-value shift" in page
    assert "http" not in page.split("<script>")[0].replace("http-equiv", "")


def test_kv_against_one_control_runs_nothing_else(demo: HookedVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechicl, "load", lambda *args, **kwargs: demo, raising=False)
    result = runner.invoke(app, ["kv", "-n", "4", *SMALL[2:], "--control", "zero-shot", "--task", "digits"])
    assert result.exit_code == 0, result.output
    assert "against zero-shot" in result.stdout
    assert "filler" not in result.stdout.replace("* differs from filler", "")
    assert "accuracy," not in result.stdout


def test_the_doctor_passes_a_healthy_model(tiny: HookedVLM) -> None:
    result = runner.invoke(app, ["doctor", "demo"])
    assert result.exit_code == 0, result.output
    assert "FAIL" not in result.stdout
    assert "logits equal the plain model's bit by bit" in result.stdout


def test_the_doctor_fails_a_sick_model(tiny: HookedVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from mechicl.models import doctor

    sick = doctor.Check("attention rows sum to one", False, 0.5, 1e-3, "probability", "Use float32.")
    monkeypatch.setattr(doctor, "diagnose", lambda model: [sick])
    result = runner.invoke(app, ["doctor", "demo"])
    assert result.exit_code == 1
    assert "FAIL" in result.stdout
    assert "Use float32." in result.stdout


def test_memory_that_runs_out_is_said_in_one_line(tiny: HookedVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from mechicl.analysis.heads import scoring as heads

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(heads, "score_heads", full)
    result = runner.invoke(app, ["heads", "-n", "2", "--classes", "2"])
    assert result.exit_code == 2
    assert "Use a smaller --batch-size" in result.stderr


def test_csv_text_reads_back_to_the_same_numbers() -> None:
    from mechicl.views.tables import csv_text

    frame = pd.DataFrame({"value": [0.1 + 0.2, 1 / 3, 1e-17]})
    assert pd.read_csv(io.StringIO(csv_text(frame)))["value"].tolist() == frame["value"].tolist()
