"""The study as a whole: killed and resumed it says the same, its folder refuses another study, its page carries its numbers and no network."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import mechicl
from mechicl.data import concepts
from mechicl.errors import CheckpointError, EpisodeError, OptionError, OutputPathError, RenderError
from mechicl.models.adapters import trainable
from mechicl.prompts.episode import Episode
from mechicl.results import Estimate, ProtocolStudy
from mechicl.studies import huang2026
from mechicl.studies.crew import SHARDS
from mechicl.studies.huang2026 import Options, fitted, preview_study, run, study_episodes
from mechicl.studies.huang2026_tuning import TuningOptions
from mechicl.studies.keep import PARTS, Memory, StudyFolder, pack, unpack
from mechicl.training.adapting.parts import ATTENTION, choose, linear_names
from mechicl.views.protocol_page import render_protocol_page

SMALL: dict[str, Any] = {"rank": 4, "episodes": 12, "top": 1, "n_random": 2, "dose_draws": 1, "skip": ("lora", "dose", "ours")}
"""A study of seconds."""
SIZE = 2
"""Prompts of a pass and episodes of a shard, so that every part has several."""


@pytest.fixture(scope="module")
def model() -> Any:
    return mechicl.load("demo", device="cpu")


@pytest.fixture(scope="module")
def study(model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[ProtocolStudy, Path]:
    """A study that nothing interrupted, and its folder."""
    out = tmp_path_factory.mktemp("whole") / "study"
    return run(model, None, out, batch_size=SIZE, progress=False, **SMALL), out


def command(out: Path) -> list[str]:
    words = "study huang2026 --rank 4 --episodes 12 --top 1 --random 2 --dose-random 1 --skip lora --skip dose --skip ours --batch-size 2 --quiet"
    return [*words.split(), "--device", "cpu", "--out", str(out)]


def test_a_study_killed_within_a_part_goes_on_there_and_says_what_an_uninterrupted_one_says(
    study: tuple[ProtocolStudy, Path], model: Any, tmp_path: Path
) -> None:
    whole, folder = study
    out, lines = tmp_path / "killed", tmp_path / "killed" / SHARDS / "shards.jsonl"
    every = (folder / SHARDS / "shards.jsonl").read_bytes().count(b"\n")
    ranking = 3 * SMALL["rank"] // SIZE  # our scores, the published ones, attention by role
    killed_at(out, lines, 1)
    assert not (out / PARTS / "heads.json").exists()  # in the middle of the ranking
    kept = lines.read_bytes()
    killed_at(out, lines, ranking + 2)
    assert lines.read_bytes().startswith(kept)
    assert (out / PARTS / "roles.json").exists()
    assert not (out / PARTS / "knock_outs.json").exists()  # in the middle of the knock-outs
    kept = lines.read_bytes()
    assert kept.count(b"\n") < every
    lines.write_bytes(kept + b'{"job": "4", "shard":')  # and a line that the crash cut off
    again = run(model, None, out, batch_size=SIZE, progress=False, **SMALL)
    assert lines.read_bytes().startswith(kept)
    assert lines.read_bytes().count(b"\n") == every  # nothing was done twice
    assert (out / "study.csv").read_bytes() == (folder / "study.csv").read_bytes()
    assert again.knock_outs.to_frame().equals(whole.knock_outs.to_frame())
    for name, score in whole.heads.scores.items():
        np.testing.assert_array_equal(again.heads[name].per_episode, score.per_episode)
        np.testing.assert_array_equal(again.heads[name].p, score.p)


def killed_at(out: Path, lines: Path, n: int) -> None:
    """The study in a process of its own, killed once it has so many finished shards."""
    code = f"from mechicl.studies.huang2026 import run; run('demo', None, {str(out)!r}, device='cpu', batch_size={SIZE}, progress=False, **{SMALL!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (lines.exists() and lines.read_bytes().count(b"\n") >= n) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert lines.exists()


@pytest.mark.slow  # two or three minutes: pytest -m slow tests/test_studies.py
def test_workers_share_a_study_and_change_no_number(study: tuple[ProtocolStudy, Path], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    frames = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        found = run("demo", None, out, device="cpu", batch_size=SIZE, workers=workers, progress=False, **SMALL)
        frames.append((out / "study.csv").read_bytes())
        np.testing.assert_allclose(
            found.heads["ih_published"].per_episode, study[0].heads["ih_published"].per_episode, atol=1e-6
        )  # another process's threads
    assert frames[0] == frames[1]


def test_workers_need_a_name_to_load_the_model_by(model: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="every worker can load"):
        run(model, None, tmp_path / "x", workers=2, **SMALL)
    assert not (tmp_path / "x").exists()


def test_finished_parts_are_not_made_again(study: tuple[ProtocolStudy, Path], model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, folder = study

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("made again")

    for name in ("rank_heads", "attention_by_role", "knock_out"):
        monkeypatch.setattr(huang2026, name, never)
    again = run(model, None, folder, batch_size=SIZE, progress=False, **SMALL)
    assert again.to_frame().equals(whole.to_frame())
    assert again.seconds == whole.seconds


def test_a_folder_refuses_another_study_and_damaged_parts(study: tuple[ProtocolStudy, Path], model: Any, tmp_path: Path) -> None:
    import shutil

    out = tmp_path / "copy"
    shutil.copytree(study[1], out)
    with pytest.raises(CheckpointError, match="options was"):
        run(model, None, out, batch_size=SIZE, progress=False, **{**SMALL, "n_random": 3})
    (out / PARTS / "roles.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"roles.json must hold a finished part"):
        run(model, None, out, batch_size=SIZE, progress=False, **SMALL)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(OutputPathError, match="holds other files"):
        run(model, None, other, batch_size=SIZE, progress=False, **SMALL)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 3}, "rank must be at least 4"),
        ({"top": 0}, "top must be at least 1"),
        ({"skip": ("ranking",)}, "skip must be among lora, dose, ours"),
        ({"heads": 3}, "options must be among shots"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_options_out_of_range_are_refused_before_a_model_is_loaded(change: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        run("no/such-model", **change)


def test_too_few_episodes_or_steps_are_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    few = concepts.draw(3, classes=2, shots=2, size=28, seed=0)
    with pytest.raises(EpisodeError, match="data must hold 116 episodes"):  # 100 to learn from and 16 to measure on
        run("no/such-model", few, tmp_path / "x", rank=8, episodes=8)
    with pytest.raises(OptionError, match="steps of the fine-tuning"):
        TuningOptions(steps=0)


def test_without_a_folder_nothing_is_kept_and_lora_is_left_out(model: Any, study: tuple[ProtocolStudy, Path]) -> None:
    found = run(model, batch_size=SIZE, progress=False, **{**SMALL, "skip": ("dose", "ours")})
    assert "lora" in found.skipped_parts
    assert found.tuning is None
    assert found.knock_outs.to_frame().equals(study[0].knock_outs.to_frame())
    assert Memory().part("x", lambda: 3)[0] == 3


def test_the_study_says_what_is_known_of_the_bundled_model(study: tuple[ProtocolStudy, Path]) -> None:
    found, _ = study
    assert found.heads.top("induction", 1)[0][0] == 3  # its induction heads are in the last layer
    assert found.knock_outs["intact"].whole.value > 0.8
    assert found.knock_outs["zero-shot"].open.value < 0.3
    assert [m.comparable for m in found.rankings] == [False, False]
    assert not any(n.comparable for n in found.numbers)
    frame = found.to_frame()
    assert {"knock-outs", "published PH", "published numbers"} <= set(frame["part"])
    assert found.n == 12
    assert found.n_rank == 4


def test_the_page_opens_offline_carries_the_numbers_and_escapes_what_data_say(study: tuple[ProtocolStudy, Path]) -> None:
    found, folder = study
    assert (folder / "study.html").stat().st_size < 8_000_000
    page = render_protocol_page(found, command="mechicl study huang2026 --out <study>")
    assert "&lt;study&gt;" in page  # the command that made it
    assert 'src="http' not in page
    assert "@import" not in page
    assert f"{found.heads['ph_published'].value[found.heads.top('ph_published', 1)[0]]:.3f}" in page
    assert "published for Qwen/Qwen2.5-VL-3B-Instruct; this model is demo" in page
    named = replace(found, provenance=replace(found.provenance, task="<script>alert(1)</script>"), notes=("</script><b>",))
    assert "<script>alert(1)" not in render_protocol_page(named)
    assert "</script><b>" not in render_protocol_page(named)


def test_the_command_previews_and_runs(study: tuple[ProtocolStudy, Path], tmp_path: Path) -> None:
    from mechicl.cli import app

    told = CliRunner().invoke(app, [*command(tmp_path / "x"), "--preview"])
    assert told.exit_code == 0, told.output
    assert "knock-outs:" in told.output
    assert not (tmp_path / "x").exists()
    done = CliRunner().invoke(app, command(tmp_path / "x"))
    assert done.exit_code == 0, done.output
    assert "intact" in done.output
    assert (tmp_path / "x" / "study.csv").read_bytes() == (study[1] / "study.csv").read_bytes()
    refused = CliRunner().invoke(app, ["study", "huang2026", "--model", "demo"])
    assert refused.exit_code == 2
    missing = CliRunner().invoke(app, ["study", "huang2026", "--out", str(tmp_path / "y"), "--data", str(tmp_path / "none")])
    assert missing.exit_code == 2


def test_a_preview_counts_what_the_study_runs(model: Any) -> None:
    cost = preview_study(
        model, rank=8, episodes=10, top=1, n_random=2, dose_draws=1, skip=("dose", "ours"), lora=TuningOptions(steps=7, train=4, held_out=4)
    )
    rows = {name.split(":")[0].split(",")[0]: passes for name, passes, _ in cost.rows}
    assert rows["published head scores"] == 8
    assert rows["knock-outs"] == 10 * (1 + 3 + 6 + 2)  # intact, three sets, two draws beside each, two controls
    assert rows["fine-tuning"] == 7
    assert rows["heads along it"] == 2 * 4
    assert cost.seconds > 0
    assert cost.peak_gib > 0.1
    assert "together" in str(cost)
    assert len(cost.to_frame()) == 5


def test_benchmark_folders_are_drawn_shuffled_and_without_repeats(tmp_path: Path) -> None:
    from mechicl.data.vl_icl_made import write_vl_icl

    folder = write_vl_icl(tmp_path / "vl", "open_mi", n=12, size=28)
    options = Options(rank=4, episodes=8, skip=("lora",))
    found, task = study_episodes(folder, options)
    assert len({e.id for e in found}) == 12
    assert [e.id for e in found] != sorted(e.id for e in found)
    assert [e.id for e in found] == [e.id for e in study_episodes(folder, options)[0]]
    assert all(len(e.shots) == 4 and len(e.candidates) == 2 for e in found)
    assert found[0].instruction == "Answer the question with a single word or phase."
    assert task == "VL-ICL open_mi, 2 classes x 2"
    with pytest.raises(OptionError, match="usable queries"):
        study_episodes(folder, replace(options, episodes=50))


def test_a_question_that_a_template_cannot_write_is_changed_and_said(model: Any) -> None:
    class Stripping:
        """A model whose template takes spaces off the end of a turn."""

        def render(self, episodes: list[Episode]) -> None:
            if episodes[0].question.endswith(" "):
                raise RenderError("the chat template must write the question as it is")

    drawn, _ = study_episodes(None, Options(rank=4, episodes=4, skip=("lora",)))
    assert fitted(model, drawn) == (drawn, "")
    changed, note = fitted(Stripping(), drawn)
    assert {e.question for e in changed} == {"This is a"}
    assert "published 'This is a '" in note
    with pytest.raises(RenderError):
        fitted(type("Broken", (), {"render": lambda *_: (_ for _ in ()).throw(RenderError("no"))})(), changed)


def test_adapters_go_where_they_were_asked_to() -> None:
    from mechicl.training.organisms import build

    hf, _ = build("qwen2_5_vl", preset="tiny")
    assert {name.rsplit(".", 1)[-1] for name in linear_names(hf, ATTENTION)} == set(ATTENTION)
    with pytest.raises(OptionError, match="targets must be among"):
        linear_names(hf, ["qkv_proj"])
    moved = trainable(choose(hf, lora=True, projector=False, rank=2, alpha=4.0, dropout=0.0, base="", seed=0, targets=ATTENTION))
    assert moved
    assert all(any(f".{target}." in name for target in ATTENTION) for name in moved)
    assert not any("visual" in name for name in moved)


@pytest.mark.slow  # about a minute on a free core: pytest -m slow tests/test_studies.py
def test_fine_tuning_follows_the_heads_and_goes_on(model: Any, tmp_path: Path) -> None:
    lora = TuningOptions(steps=6, every=3, train=8, held_out=4)
    options = {**SMALL, "skip": ("dose", "ours"), "lora": lora}
    found = run(model, None, tmp_path / "s", batch_size=SIZE, progress=False, name="demo", **options)
    assert found.tuning is not None
    assert found.tuning.curves.steps.tolist() == [0, 3, 6]
    assert len(found.tuning.loss) == 6
    names = [c.name for c in found.tuning.changes]
    assert names[:2] == ["accuracy, first token (published)", "accuracy, whole label"]
    curve = next(v for k, v in found.tuning.curves.values.items() if k.startswith("IH as published"))
    change = next(c for c in found.tuning.changes if c.name.startswith("IH as published"))
    assert curve[0] == pytest.approx(change.before.value, abs=1e-5)  # kept to six digits, measured by the other path
    assert curve[-1] == pytest.approx(change.after.value, abs=1e-5)
    (tmp_path / "s" / PARTS / "tuning.json").unlink()
    again = run(model, None, tmp_path / "s", batch_size=SIZE, progress=False, name="demo", **options)
    assert again.tuning is not None
    np.testing.assert_array_equal(again.tuning.loss, found.tuning.loss)


# -- what is kept

Leaf = st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=4)
Tree = st.recursive(
    Leaf, lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(Tree)
def test_what_is_kept_comes_back(value: Any) -> None:
    assert unpack(pack(value, {}), {}) == value


def test_results_and_arrays_come_back_and_strangers_are_refused(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "s", {"a": 1})
    kept = (
        Estimate(0.5, 0.1, float("inf"), 3),
        {"x": np.arange(6.0).reshape(2, 3), "none": np.zeros((0, 2)), "flags": np.array([True, False])},
        np.float64(2.5),
        np.array(1.5),
    )
    folder.part("p", lambda: kept)
    found, _ = folder.part("p", lambda: None)
    assert found[0] == kept[0] or vars(found[0]) == vars(kept[0])
    np.testing.assert_array_equal(found[1]["x"], kept[1]["x"])
    assert found[1]["none"].shape == (0, 2)
    assert found[1]["flags"].dtype == bool
    assert found[2] == 2.5
    assert found[3].shape == ()
    with pytest.raises(TypeError, match="Path"):
        pack(tmp_path, {})
    with pytest.raises(TypeError, match="TuningOptions is no result"):
        pack(TuningOptions(), {})


def test_generated_episodes_have_the_published_words() -> None:
    drawn, task = study_episodes(None, Options(rank=4, episodes=4, skip=("lora",)))
    assert (drawn[0].instruction, drawn[0].question) == ("Answer the question with a single word or phase.", "This is a ")
    assert len(drawn) == 8
    assert "2 classes x 2" in task
    mine = concepts.draw(3, classes=2, shots=2, size=28, seed=0)
    with pytest.raises(EpisodeError, match="data must hold 8 episodes"):
        study_episodes(mine, Options(rank=4, episodes=4, skip=("lora",)))
