"""Written answers over shots: what a model that knows the answers gets, what one that knows nothing gets, resuming, and the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import mechicl
from mechicl.analysis import written_answers as module
from mechicl.analysis.link.answers import Asked
from mechicl.analysis.written_answers import written_answers
from mechicl.cli import app
from mechicl.data.vl_icl import VLICLTask, load_vl_icl
from mechicl.data.vl_icl_made import write_vl_icl
from mechicl.errors import EpisodeError, OptionError
from mechicl.models.vlm import HookedVLM
from mechicl.views.plots import plot

runner = CliRunner()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "VL-ICL"
    for task, options in (("open_mi", {"n": 16}), ("matching_mi", {"n": 8, "n_support": 6}), ("operator_induction", {"n": 12})):
        write_vl_icl(folder, task, size=56, **options)  # type: ignore[arg-type]
    return folder


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, organism: Callable[..., tuple[Any, Any]]) -> HookedVLM:
    model = HookedVLM(*organism("qwen2_5_vl"), check=False)
    monkeypatch.setattr(mechicl, "load", lambda *args, **kwargs: model, raising=False)
    return model


def answering(monkeypatch: pytest.MonkeyPatch, reply: Callable[[Any, int], Asked]) -> None:
    """A model is not run: every episode at every number of shots gets `reply(episode, shots)`."""

    def collect(model: Any, settings: Any, job: Any, out: Any) -> tuple[dict[tuple[str, int], Asked], None]:
        return {(s.name, i): reply(e, int(s.x)) for s in settings for i, e in enumerate(s.episodes)}, None

    monkeypatch.setattr(module, "collect", collect)


def knows(episode: Any, text: str) -> Asked:
    return Asked(tuple(0.0 if name == text else -9.0 for name in episode.candidates), text)


def task_of(made: Path, name: str, **options: Any) -> VLICLTask:
    return load_vl_icl(made, name, **options)  # type: ignore[arg-type]


def test_who_learns_from_the_examples_is_found_and_who_says_one_thing_is_not(
    made: Path, tiny: HookedVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(made, "open_mi")
    answering(monkeypatch, lambda e, shots: knows(e, e.answer if shots else "?"))
    learner = written_answers(tiny, task, shots=(1, 2))
    assert [row.written.value for row in learner.rows] == [0.0, 1.0, 1.0]
    assert [row.likelihood.value for row in learner.rows][1:] == [1.0, 1.0]
    assert learner[0].shots == 0  # the control is always run
    assert all(change.holm_p < 0.01 and change.change.value == 1.0 for change in learner.changes if change.measure == "written")
    answering(monkeypatch, lambda e, shots: knows(e, e.candidates[0]))
    copier = written_answers(tiny, task, shots=(2,))
    assert copier[2].written.value == pytest.approx(np.mean([e.answer == e.candidates[0] for e in task.episodes(shots=2)]))
    assert copier[2].copied.value == pytest.approx(0.5)  # two classes, the same number of each


def test_silence_is_a_right_no_by_the_published_rule_and_is_noted(made: Path, tiny: HookedVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, lambda e, shots: knows(e, ""))
    result = written_answers(tiny, task_of(made, "matching_mi"), shots=(1,))
    assert result[1].written.value == 0.5
    assert result[1].ours.value == 0.0
    assert "hardly any answer has a yes in it" in result.notes[0]


def test_negative_results_are_counted_by_our_rule_only(made: Path, tiny: HookedVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, lambda e, shots: knows(e, e.answer))
    result = written_answers(tiny, task_of(made, "operator_induction"), shots=(1,))
    negative = np.array([answer.startswith("-") for answer in result.answers])
    assert negative.any()
    np.testing.assert_array_equal(result[1].right, ~negative)
    assert result[1].ours.value == 1.0
    assert f"{negative.sum()} of 12 answers are negative" in result.notes[0]


def test_refused_prompts_are_left_out_of_every_row_and_incomparable_ones_of_likelihood_only(made: Path, tiny: HookedVLM, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    task = task_of(made, "open_mi")
    names = [e.id for e in task.episodes(shots=0)]

    def reply(episode: Any, shots: int) -> Asked:
        if shots == 2 and episode.id == names[0]:
            return Asked(reason="too long")
        answer = knows(episode, episode.answer)
        return Asked(answer.values, answer.text, "candidate a begins b") if episode.id == names[1] else answer

    answering(monkeypatch, reply)
    result = written_answers(tiny, task, shots=(2,))
    assert result.n == len(names) - 1
    assert [(s.episode, s.reason) for s in result.skipped] == [(names[0], "2 shots: too long")]
    assert result[2].written.n == len(names) - 1
    assert result[2].likelihood.n == len(names) - 2
    assert np.isnan(result[2].likely[0])
    answering(monkeypatch, lambda e, shots: Asked(reason="no"))
    with pytest.raises(EpisodeError, match="none of 16 is"):
        written_answers(tiny, task, shots=(1,))


def test_a_killed_run_goes_on_to_the_same_answers(made: Path, tiny: HookedVLM, tmp_path: Path) -> None:
    task = task_of(made, "open_mi", size=28)
    options: dict[str, Any] = {"shots": (1,), "n": 5, "batch_size": 2, "max_new_tokens": 3, "progress": False}
    whole = written_answers(tiny, task, out=tmp_path / "whole", **options)
    lines = (tmp_path / "whole" / "answers.jsonl").read_text().splitlines()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "link.json").write_bytes((tmp_path / "whole" / "link.json").read_bytes())
    (tmp_path / "cut" / "answers.jsonl").write_text("\n".join([*lines[:2], lines[2][:20]]))
    again = written_answers(tiny, task, out=tmp_path / "cut", **options)
    pd.testing.assert_frame_equal(whole.answers_frame(), again.answers_frame())
    assert len(json.loads(lines[0])["rows"]) == 2
    assert (tmp_path / "cut" / "scores.csv").read_bytes() == (tmp_path / "whole" / "scores.csv").read_bytes()
    assert len(whole.to_frame()) == 2 * 5


def test_the_bundled_model_binds_new_names_and_cannot_without_examples(made: Path) -> None:
    result = written_answers(mechicl.load("demo"), task_of(made, "open_mi"), shots=(2,), progress=False)
    assert result[0].written.value == 0.0
    assert result[2].written.low > 0.6  # .967 of 120 (docs/tasks.md); 16 here
    assert result[0].likelihood.low < 0.5 < result[0].likelihood.high


def test_the_figure_has_the_numbers(made: Path, tiny: HookedVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, lambda e, shots: knows(e, e.answer if shots else "<b>?</b>"))
    result = written_answers(tiny, task_of(made, "open_mi"), shots=(1,))
    figure = plot(result)
    np.testing.assert_allclose(figure.to_dict()["data"][0]["y"], [0.0, 1.0])
    assert "n = 16" in figure.to_dict()["layout"]["title"]["subtitle"]["text"]


def test_shots_that_cannot_be_drawn_are_refused(made: Path, tiny: HookedVLM) -> None:
    with pytest.raises(OptionError, match=r"shots must be in 0..5"):
        written_answers(tiny, task_of(made, "open_mi"), shots=(6,))
    with pytest.raises(OptionError, match="shots must not be negative"):
        written_answers(tiny, task_of(made, "open_mi"), shots=(-1,))


# ---- commands


def test_sets_are_written_and_checked_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "VL-ICL"
    done = runner.invoke(app, ["data", "vl-icl", str(out), "--task", "clevr", "-n", "4", "--support", "4", "--size", "24"])
    assert done.exit_code == 0
    assert "clevr, 4 usable queries, 4 usable support rows, 8 pictures, 0 problems" in done.stdout
    assert runner.invoke(app, ["data", "check", str(out)]).exit_code == 0
    (out / "clevr" / "query" / "1.png").unlink()
    found = runner.invoke(app, ["data", "check", str(out / "clevr")])
    assert found.exit_code == 1
    assert "query.json row 1: picture clevr/query/1.png is not there" in found.stdout
    assert runner.invoke(app, ["data", "vl-icl", str(out), "--task", "clevr"]).exit_code == 2
    isekai = [
        "data",
        "isekai",
        str(tmp_path / "i"),
        "--groups",
        "2",
        "--pairs",
        "2",
        "--per-class",
        "4",
        "--context",
        "2",
        "--queries",
        "1",
        "--size",
        "16",
    ]
    assert runner.invoke(app, isekai).exit_code == 0
    assert runner.invoke(app, ["data", "memes", str(tmp_path / "m"), "--train", "4", "--dev", "4", "--size", "16"]).exit_code == 0
    for name in ("i", "m"):
        assert runner.invoke(app, ["data", "check", str(tmp_path / name)]).exit_code == 0
    assert runner.invoke(app, ["data", "check", str(tmp_path / "nowhere")]).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["heads", "--task", "open_mi"], "data must be given with the tasks that read it"),
        (["heads", "--data", "."], "data must be given with the tasks that read it"),
        (["heads", "--task", "open_mi", "--data", "/nowhere"], "there is no '/nowhere'"),
        (["heads", "--task", "textocr", "--data", "."], "got textocr"),
        (["kv", "--task", "clevr", "--data", ".", "--classes", "3"], "classes must be left out for clevr"),
        (["eval", "tasks", "--task", "open"], "task must be one of"),
        (["eval", "tasks", "--data", "/nowhere"], "data must be a folder or 'generated'"),
        (["eval", "tasks", "--description", "long"], "description must be one of"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_a_model_is_loaded(arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr(mechicl, "load", load, raising=False)
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert says in result.output


def test_heads_are_scored_on_a_benchmarks_folder_and_on_own_pictures(made: Path, tiny: HookedVLM, tmp_path: Path) -> None:
    for arguments in (["--task", "open_mi", "--data", str(made)], ["--task", "operator_induction", "--data", str(made)], ["--task", "own", "--data", str(own(tmp_path))]):  # fmt: skip
        out = tmp_path / f"{arguments[1]}.csv"
        done = runner.invoke(app, ["heads", *arguments, "-n", "4", "--size", "28", "--out", str(out), "-q"])
        assert done.exit_code == 0, done.output
        assert "induction" in done.stdout
        assert out.is_file()


def test_kv_prints_a_command_that_can_be_run_again(made: Path, tiny: HookedVLM, tmp_path: Path) -> None:
    done = runner.invoke(app, ["kv", "--task", "matching_mi", "--data", str(made), "-n", "3", "--shots", "1", "--size", "28", "--control", "zero-shot", "-q", "--out", str(tmp_path / "kv")])  # fmt: skip
    assert done.exit_code == 0, done.output
    page = (tmp_path / "kv" / "kv.html").read_text()
    assert f"--task matching_mi --data {made} --episodes 3 --shots 1 --size 28 --seed 0" in page


def test_eval_tasks_writes_tables_and_a_page(tiny: HookedVLM, tmp_path: Path) -> None:
    command = [
        "eval",
        "tasks",
        "--task",
        "open_mi,matching_mi",
        "--shots",
        "1",
        "-n",
        "2",
        "--size",
        "28",
        "--max-new-tokens",
        "2",
        "-q",
        "--out",
        str(tmp_path / "run"),
    ]
    done = runner.invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "open_mi: n = 2 queries" in done.stdout
    assert set(pd.read_csv(tmp_path / "run" / "tasks.csv")["task"]) == {"open_mi", "matching_mi"}
    assert "VL-ICL Bench" in (tmp_path / "run" / "tasks.html").read_text()
    assert runner.invoke(app, command).exit_code == 0  # goes on where it was: nothing left to ask


def own(folder: Path) -> Path:
    """Two folders of pictures."""
    from conftest import pictures

    for c in range(2):
        (folder / "photos" / f"class{c}").mkdir(parents=True)
        for k, image in enumerate(pictures(3, seed=c)):
            image.save(folder / "photos" / f"class{c}" / f"{k}.png")
    return folder / "photos"
