"""One model along its checkpoints: found in every layout, measured on the same episodes, kept when killed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import unchecked
from typer.testing import CliRunner

import mechicl
from mechicl.analysis.comparison import in_words
from mechicl.analysis.comparison import places as places_module
from mechicl.analysis.comparison.checkpoints import series
from mechicl.analysis.comparison.compare import compare
from mechicl.analysis.comparison.places import checkpoints, step_of
from mechicl.analysis.trainings.growth import grow
from mechicl.cli import app
from mechicl.data import concepts
from mechicl.errors import CheckpointError, OptionError
from mechicl.models.planted import planted_induction, untrained
from mechicl.models.toys.prompts import toy_episodes
from mechicl.training.organisms import build, save
from mechicl.views.plots import plot

QUIET: dict[str, Any] = {"progress": False, "scores": ("induction", "previous_token")}


@pytest.fixture(scope="module")
def words() -> list[Any]:
    return in_words(concepts.draw(6, classes=2, shots=2, size=28, seed=1))


@pytest.fixture(scope="module")
def trainer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers' Trainer leaves it: the processor above, weights and configuration alone in the checkpoints."""
    folder = tmp_path_factory.mktemp("trainer")
    for step, seed in ((500, 0), (1000, 1), (1500, 2)):
        model, processor = build("llava", seed=seed)
        model.save_pretrained(folder / f"checkpoint-{step}")
        (folder / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"never read")
    processor.save_pretrained(folder)
    (folder / "runs").mkdir()  # logs
    return folder


def test_steps_are_read_from_names() -> None:
    for name, step in (("checkpoint-500", 500), ("step1000", 1000), ("stage1-step1000-tokens4B", 1000), ("10k", 10_000), ("step_2", 2), ("v1.5-iter-30", 30), ("main", None)):  # fmt: skip
        assert step_of(name) == step, name


def test_a_trainers_folder_is_followed_and_goes_on_after_a_kill(
    trainer_folder: Path, words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "kept"
    real, opened = places_module.load, []

    def load(source: Any, **options: Any) -> Any:
        opened.append(Path(source).name)
        if len(opened) == 2:
            raise KeyboardInterrupt
        return real(source, **options)

    monkeypatch.setattr(places_module, "load", load)
    with pytest.raises(KeyboardInterrupt):
        series(trainer_folder, words, out=out, **QUIET)
    found = series(trainer_folder, words, out=out, **QUIET)
    assert opened == ["checkpoint-500", "checkpoint-1000", "checkpoint-1000", "checkpoint-1500"]
    assert found.names == ("checkpoint-500", "checkpoint-1000", "checkpoint-1500")
    assert found.series.steps.tolist() == [500, 1000, 1500]
    plain = series(trainer_folder, words, **QUIET)
    for name, values in plain.series.values.items():
        np.testing.assert_array_equal(found.series.values[name], values, err_msg=name)
    assert (out / "series.parquet").is_file()
    shared = found.series.values["induction, top 3 shared with the last"]
    assert shared[-1] == 1
    assert found.heads["induction"].shape == (3, 3, 4)
    assert found.notes == ("Fewer than four checkpoints: no change points.",)
    with pytest.raises(CheckpointError, match="same series"):
        series(trainer_folder, words[:4], out=out, **QUIET)
    frame = found.to_frame()
    assert set(frame["checkpoint"]) == set(found.names)
    figure: Any = plot(found)
    assert len(figure.data) > 4


def test_the_measures_are_those_of_grow(trainer_folder: Path, words: list[Any]) -> None:
    found = series(trainer_folder, words, **QUIET)
    models = []
    for one in checkpoints(trainer_folder):
        with places_module.opened(one, {}) as model:
            models.append((one.step, model))
    grown = grow(models, words, **QUIET)
    for name, values in grown.values.items():
        np.testing.assert_allclose(found.series.values[name], values, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(found.series.low[name], grown.low[name], atol=1e-6)


def test_revisions_in_the_hubs_cache_are_followed(trainer_folder: Path, words: list[Any], tmp_path: Path) -> None:
    cache = tmp_path / "models--someone--something"
    (cache / "refs").mkdir(parents=True)
    for commit, step in (("a" * 40, 500), ("b" * 40, 1000)):
        whole = cache / "snapshots" / commit
        shutil.copytree(trainer_folder / f"checkpoint-{step}", whole)
        for file in trainer_folder.glob("*.json*"):
            shutil.copy(file, whole)
        (cache / "refs" / f"step{step}").write_text(commit)
    every = series(cache, words, **QUIET)
    assert every.names == ("step500", "step1000")
    named = checkpoints(cache, {"b" * 40: 7, "step500": 3})
    assert [(one.step, Path(one.source).name) for one in named] == [(3, "a" * 40), (7, "b" * 40)]
    with pytest.raises(CheckpointError, match="no 'step9'"):
        checkpoints(cache, ["step500", "step9"])


def test_revisions_of_a_hub_model_are_loaded_by_name(words: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    toys = {"step0": untrained(n_heads=4, seed=0), "step100": planted_induction(n_heads=4).model, "step200": planted_induction(n_heads=4).model, "main": planted_induction(n_heads=4).model}  # fmt: skip
    asked = []

    def load(source: Any, *, revision: str, **options: Any) -> Any:
        asked.append((source, revision, options))
        return toys[revision]

    monkeypatch.setattr(places_module, "load", load)
    looked_up = []
    monkeypatch.setattr(
        "mechicl.analysis.comparison.checkpoints.check_model",
        lambda source, *, revision, **more: looked_up.append((source, revision, len(asked))),
    )
    episodes = toy_episodes(16, classes=3, shots=2)
    found = series(
        "someone/something",
        episodes,
        revisions=["step100", "step0", "step200", (400, "main")],
        load_options={"dtype": "float32"},
        top=1,
        **QUIET,
    )
    assert asked[0] == ("someone/something", "step0", {"dtype": "float32", "progress": False})
    assert looked_up == [
        ("someone/something", name, 0) for name in ("step0", "step100", "step200", "main")
    ]  # all before the first is loaded
    assert found.names == ("step0", "step100", "step200", "main")
    assert found.series.steps.tolist() == [0, 100, 200, 400]
    assert found.series.values["induction, final heads"][0] < 0.3 < 0.9 < found.series.values["induction, final heads"][1]
    assert found.series.values["accuracy"][-1] == 1
    change = found.changes["induction, final heads"]
    assert change is None or change[0] <= 100  # two levels of one and three steps: the shortest level has two


def test_runs_of_ours_and_lists_are_checkpoints_too(trainer_folder: Path, tmp_path: Path) -> None:
    for name, step in (("short", 20), ("long", 60)):
        save(*build("llava"), tmp_path / "runs" / name / "model")
        (tmp_path / "runs" / name / "config.json").write_text(json.dumps({"family": "llava"}))
        (tmp_path / "runs" / name / "metrics.jsonl").write_text(f'{{"step": 1}}\n{{"step": {step}}}\n{{"ste')
    assert [(one.step, one.name) for one in checkpoints(tmp_path / "runs")] == [(20, "short"), (60, "long")]
    listed = checkpoints([(2, tmp_path / "runs" / "long"), (1, tmp_path / "runs" / "short" / "model")])
    assert [(one.step, one.name) for one in listed] == [(1, "short"), (2, "long")]
    assert [one.step for one in checkpoints([trainer_folder / "checkpoint-1000", trainer_folder / "checkpoint-500"])] == [500, 1000]


def test_what_cannot_be_followed_is_refused_before_any_model(
    trainer_folder: Path, words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places_module, "load", None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "growth.json").write_text("{}")
    broken = tmp_path / "broken" / "checkpoint-1"
    shutil.copytree(trainer_folder / "checkpoint-500", broken)
    (broken / "config.json").write_text('{"model_type": 3')
    with unchecked():
        for source, options, error, word in (
            ("someone/something", {}, OptionError, "revisions must be given"), ("someone/something", {"revisions": ["main", "step1"]}, OptionError, "tell its step"),
            ("someone/something", {"revisions": ["step1"]}, OptionError, "at least two"), ("someone/something", {"revisions": "step1"}, OptionError, "list"),
            (trainer_folder, {"revisions": ["step1"]}, OptionError, "is a folder"), (tmp_path / "empty", {}, CheckpointError, r"growth\.json"),
            (trainer_folder, {"top": 0}, OptionError, "top"), (trainer_folder, {"scores": ("nothing",)}, OptionError, "scores"),
            ([broken, trainer_folder / "checkpoint-500"], {}, (CheckpointError, OptionError), "must"), ([tmp_path / "nowhere-1", tmp_path / "nowhere-2"], {}, CheckpointError, "config"),
        ):  # fmt: skip
            with pytest.raises(error, match=word):
                series(source, words, progress=False, **options)  # pyright: ignore[reportArgumentType]


def test_the_commands_compare_and_follow(trainer_folder: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    common = ["-n", "4", "--classes", "2", "--shots", "1", "--size", "28", "--scores", "induction,previous_token", "-q"]
    out = tmp_path / "compared"
    told = runner.invoke(app, ["compare", "demo", "demo", *common, "--modality", "both", "--improve", "induction", "--out", str(out)])
    assert told.exit_code == 0, told.output
    assert "heads aligned by index" in told.output
    assert {path.name for path in out.iterdir()} >= {"scores.csv", "pairs.csv", "compare.html", "improve.html", "sides.jsonl"}
    told = runner.invoke(app, ["series", str(trainer_folder), *common, "--modality", "words", "--out", str(tmp_path / "followed")])
    assert told.exit_code == 0, told.output
    assert "induction, final heads" in told.output
    assert (tmp_path / "followed" / "series.html").is_file()
    for wrong, word in ((["compare", "demo", "demo", "--scores", "none"], "scores"), (["series", "a/b", "--revisions", "main=x,step1"], "revisions"), (["compare", "demo", "demo", "--improve", "all"], "improve")):  # fmt: skip
        told = runner.invoke(app, wrong)
        assert told.exit_code == 2
        assert word in told.output


def test_figures_hold_the_results_arrays() -> None:
    found = compare(
        untrained(seed=0),
        untrained(seed=1),
        toy_episodes(8, classes=3),
        scores=("induction", "sink"),
        progress=False,
        n_null=10,
        names=("a<b", "c"),
    )
    figure: Any = plot(found)
    dots = [trace for trace in figure.data if trace.mode == "markers"]
    one = found["induction"]
    np.testing.assert_array_equal(dots[0].x, [found.first.scores["induction"].value[a] for a, _ in one.pairs])
    np.testing.assert_array_equal(dots[0].y, [found.second.scores["induction"].value[b] for _, b in one.pairs])
    assert "a&lt;b" in figure.layout.title.text
    one_row: Any = plot(found, scores=["sink"])
    assert len([trace for trace in one_row.data if trace.mode == "markers"]) == 1
    with pytest.raises(OptionError, match="scores"):
        plot(found, scores=["ila"])
    assert mechicl.compare is compare
    assert mechicl.series is series
