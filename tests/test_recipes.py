"""The recipes are true and short: each runs, stays within forty lines, and finds what it should find and nothing where there is nothing."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import unchecked

import mechicl
from mechicl.analysis.heads.own import ExemplarScore
from mechicl.errors import OptionError
from mechicl.models.planted import planted_induction, untrained
from mechicl.models.toys.prompts import toy_episodes

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
RECIPES = dict(re.findall(r"^## ([^\n]+)\n.*?```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE))


def run(title: str) -> dict[str, Any]:
    space: dict[str, Any] = {"__name__": "recipe"}
    with contextlib.redirect_stdout(io.StringIO()), unchecked():
        exec(compile(RECIPES[title], title, "exec", dont_inherit=True), space)
    return space


def test_there_is_a_recipe_for_each_thing_that_people_add() -> None:
    assert set(RECIPES) == {"A new head score", "A new task", "A new figure", "A new model family"}


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_has_at_most_forty_lines(title: str) -> None:
    assert len(RECIPES[title].strip().splitlines()) <= 40


def test_the_new_score_finds_the_planted_head_and_nothing_in_an_untrained_network() -> None:
    space = run("A new head score")
    found, nothing = space["found"]["induction_latest"], space["nothing"]["induction_latest"]
    assert found.top(1)[0] in space["planted"].matching
    assert found.p_corrected[found.top(1)[0]] < 0.05 < nothing.p_corrected.min()
    assert found.value[found.top(1)[0]] == pytest.approx(0.5, abs=0.01)  # two right labels, looked at equally: the latest has half


def test_the_new_task_is_learnt_from_its_examples_and_not_without() -> None:
    space = run("A new task")
    assert space["accuracy"].accuracy.low > 0.8
    assert space["accuracy"].zero_shot.low < 0.25 < space["accuracy"].zero_shot.high
    assert space["permuted"].accuracy.high < 0.6
    assert [e.answer for e in space["patterns"](4)] == [e.answer for e in space["patterns"](8)[:4]]


def test_the_new_task_is_on_the_command_line() -> None:
    from typer.testing import CliRunner

    from mechicl.cli import app
    from mechicl.data import tasks

    run("A new task")
    wanted = ["heads", "--task", "patterns", "-n", "4", "--shots", "1", "--top", "1", "-q"]
    shown = CliRunner().invoke(app, wanted)
    assert shown.exit_code == 0, shown.output
    assert "induction" in shown.output
    refused = CliRunner().invoke(app, [*wanted, "--size", "40"])
    assert refused.exit_code == 2
    assert "size must be left out for patterns" in refused.output
    missing = CliRunner().invoke(app, ["heads", "--task", "cats"])
    assert "task must be one of concepts, digits, own" in missing.output
    assert "patterns" in missing.output
    assert "patterns: nine squares, black or white" in tasks.described()
    with pytest.raises(OptionError, match="name must be new; mechicl brings a task 'concepts' along"):
        tasks.register("concepts", run("A new task")["patterns"])


def test_an_installed_package_brings_its_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mechicl.data import tasks

    info = tmp_path / "theirs-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[mechicl.tasks]\nstripes = their_tasks:stripes\n")
    (tmp_path / "their_tasks.py").write_text('def stripes(n, *, shots):\n    """Stripes, thin or thick."""\n    return [shots] * n\n')
    assert "stripes" not in tasks.names()
    monkeypatch.setattr(tasks, "_KNOWN", dict(tasks._KNOWN))
    monkeypatch.syspath_prepend(tmp_path)
    assert "stripes" in tasks.names()
    assert "stripes" in tasks.described()
    task = tasks.named("stripes")
    assert task.about == "Stripes, thin or thick"
    assert task.episodes(2, classes=4, shots=3, seed=0) == [3, 3]


def test_the_new_figure_shows_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space = run("A new figure")
    figure = mechicl.plot(space["result"], dark=True)
    assert list(figure.data[0].x) == list(space["result"].look)
    assert list(figure.data[0].y) == list(space["result"].cost)
    assert (tmp_path / "look_and_cost.html").stat().st_size > 1e6


def test_the_new_family_agrees_with_eager_attention_and_sees_its_pictures() -> None:
    space = run("A new model family")
    model, batch = space["model"], space["batch"]
    assert batch.mask("image").sum(1).tolist() == [12, 12]  # three pictures of 2 x 2 tokens
    other = model.render([mechicl.Episode(e.shots, e.shots[0], e.candidates, e.instruction, e.question) for e in space["episodes"]])
    with torch.no_grad():
        assert float((model(other) - model(batch)).abs().max()) > 1e-2
    assert all("hook_resid_mid" in name for name in model.unavailable)  # attention and MLP of Cohere read the same stream


# -- scores of one's own, beyond the recipe


def matched(right: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
    return right.float() - wrong.float() * right.sum(-1, keepdim=True) / wrong.sum(-1, keepdim=True)


@pytest.mark.parametrize(("of", "name"), [("label", "induction_label"), ("turn", "induction")])
def test_a_score_of_ones_own_equals_the_named_one_with_the_same_weights(of: Any, name: str) -> None:
    model, episodes = planted_induction(n_heads=3, seed=1).model, toy_episodes(8, classes=3, shots=2)
    own = ExemplarScore("mine", "the same", matched, of=of)
    found = mechicl.score_heads(model, episodes, scores=(name, own), n_null=99, progress=False)
    for field in ("value", "low", "high", "null", "p", "p_corrected", "per_episode"):
        np.testing.assert_array_equal(getattr(found["mine"], field), getattr(found[name], field))
    assert found["mine"].source == "own definition"
    assert found.provenance.options["scores"] == [name, "mine"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ExemplarScore("x", "", matched, of="row"), "of must be label, turn or item"),  # type: ignore[arg-type]
        (lambda: ExemplarScore("x[y]", "", matched), "name must be a word without"),
        (lambda: ExemplarScore("induction", "", matched), "induction twice"),
        (lambda: ExemplarScore("x", "", lambda right, wrong: right.float().sum(-1)), "must give a finite weight for each exemplar"),
        (lambda: ExemplarScore("x", "", lambda right, wrong: right / 0.0), "with NaN or infinities"),
    ],
)
def test_a_score_that_cannot_be_is_refused(make: Callable[[], ExemplarScore], says: str) -> None:
    with unchecked(), pytest.raises(OptionError, match=says):
        mechicl.score_heads(untrained(), toy_episodes(2), scores=(make(),), n_null=19, progress=False)
