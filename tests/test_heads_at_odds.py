"""Induction heads against function-vector heads: a planted circuit takes its side, untrained networks take none, and a killed study goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import unchecked
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import mechicl
from mechicl.analysis.ablation.ablate import ablate
from mechicl.cli import app
from mechicl.errors import CheckpointError, OptionError
from mechicl.models.planted import Planted, planted_induction, untrained
from mechicl.models.toys.prompts import toy_episodes
from mechicl.prompts.episode import Episode
from mechicl.results import Estimate, HeadsAtOdds, OddsRow, Score
from mechicl.studies import heads_at_odds as study
from mechicl.studies.heads_at_odds_parts import combined_p, name_of, together
from mechicl.studies.heads_at_odds_sets import FUNCTION_VECTOR, INDUCTION, KINDS, check_doses, choose, different, heads_at, main_dose
from mechicl.studies.heads_at_odds_tasks import PAIRS, TASKS, Draw, OddsTask, pick
from mechicl.studies.heads_at_odds_verdict import SIDES, against, finding, side_of
from mechicl.views.plots import plot

HEADS = 6
"""Per layer of the planted models: enough for a census of random sets."""
QUICK: dict[str, Any] = {
    "n": 24,
    "functions": 2,
    "classes": 3,
    "n_random": 19,
    "n_band": 2,
    "hows": ("zero",),
    "doses": (17.0, 34.0),
    "progress": False,
}
SMALL: dict[str, Any] = QUICK | {"n": 8, "doses": (17.0,), "n_random": 3}


def binding(asked: Draw) -> list[Episode]:
    """New items and labels in every episode: there is something to copy and nothing to say."""
    seed = asked.seed + 1000 * asked.function + asked.shots
    return toy_episodes(asked.n, classes=asked.classes, generator=torch.Generator().manual_seed(seed))


def one_answer(asked: Draw) -> list[Episode]:
    """The answer is always l0: a mean over episodes can say it."""
    found = []
    for k, episode in enumerate(binding(asked)):
        others = iter(f"l{j}" for j in range(1, asked.classes))
        names = {episode.answer: "l0"}
        for shot in episode.shots:
            if shot.label not in names:
                names[shot.label] = next(others)
        shots = tuple(replace(shot, label=names[shot.label]) for shot in episode.shots)
        query = replace(episode.query, label="l0")
        found.append(
            replace(episode, shots=shots, query=query, candidates=tuple(f"l{j}" for j in range(asked.classes)), id=f"{asked.function}/{k}")
        )
    return found


COPY, SAY = OddsTask("copy", binding, True), OddsTask("say", one_answer, True)


@pytest.fixture(scope="module")
def planted() -> Planted:
    return planted_induction(n_heads=HEADS, n_matching=2, seed=0, sharpness=12.0)


@pytest.fixture(scope="module")
def found(planted: Planted) -> HeadsAtOdds:
    return study.run(planted.model, tasks=[COPY], shots=(1,), **QUICK)


def test_a_planted_induction_circuit_is_on_the_side_of_induction(found: HeadsAtOdds, planted: Planted) -> None:
    assert set(found.induction.top(2)) == set(planted.matching)
    assert set(found.passing[INDUCTION]) == set(planted.matching)
    assert not found.passing[FUNCTION_VECTOR]  # labels are drawn anew: no mean holds them
    row = found.row(INDUCTION, excluded=True, dose=found.main_dose)
    assert row.k == heads_at(found.main_dose, 2 * HEADS)
    assert row.finding == "necessary"
    assert row.change.high < -0.3
    assert row.random_change > -0.2
    assert found.side == "induction only"
    assert SIDES["induction only"] in found.verdict
    assert "planted" in found.verdict


def test_heads_that_say_the_answer_are_function_vector_heads_too(planted: Planted) -> None:
    """With one answer in all episodes the matching heads bring it by themselves: both rankings have the same top, and neither side can be taken."""
    both = study.run(planted.model, tasks=[SAY], shots=(1,), **QUICK)
    assert set(both.passing[FUNCTION_VECTOR]) >= set(planted.matching)
    overlap = both.overlaps[both.main_dose]
    assert set(overlap.shared) >= set(planted.matching)
    plain, excluded = both.row(INDUCTION), both.row(INDUCTION, excluded=True)
    assert plain.finding == "necessary"
    assert not set(excluded.heads) & set(planted.matching)
    assert excluded.finding == "irrelevant"
    assert both.side == "either"


def test_an_untrained_network_has_nothing_to_lose() -> None:
    nothing = study.run(untrained(n_layers=2, n_heads=4, seed=0), tasks=[COPY], shots=(1,), **QUICK)
    assert nothing.side == "nothing to lose"
    assert nothing.rows == ()
    assert not nothing.settings[0].learns
    assert "left out: copy" in nothing.notes[0]
    assert plot(nothing).data is not None


def test_where_no_answer_can_be_copied_no_head_has_an_induction_score(planted: Planted) -> None:
    said = study.run(planted.model, tasks=[replace(SAY, copied=False)], shots=(1,), **SMALL)
    assert np.isnan(said.induction.value).all()
    assert set(said.passing[FUNCTION_VECTOR]) == set(planted.matching)
    assert said.side == "no heads"
    assert "No setting has its answer in the prompt" in said.notes[0]
    assert plot(said).data is not None


def test_a_row_is_the_ablation_of_its_heads(found: HeadsAtOdds, planted: Planted) -> None:
    """Agreement with `analysis.ablation.ablate`, run apart."""
    row = found.row(INDUCTION)
    episodes = [e for k in (2, 3) for e in binding(Draw(k, 12, 3, 1, 28, 0))]
    alone = ablate(planted.model, episodes, row.heads, "zero", n_random=0, singles=False, progress=False)
    assert row.accuracy.value == pytest.approx(alone.chosen.accuracy.value)
    assert row.change.value == pytest.approx(alone.chosen.change.value)
    assert row.p == pytest.approx(alone.chosen.mcnemar_p)
    setting = found.settings[0]
    assert setting.accuracy is not None
    assert setting.accuracy.value == alone.intact.accuracy.value
    assert alone.zero_shot is not None
    assert setting.zero_shot is not None
    assert setting.zero_shot.value == alone.zero_shot.value


def test_tables_and_figure_hold_the_same_numbers(found: HeadsAtOdds) -> None:
    frame = found.to_frame()
    assert len(frame) == len(found.rows) == 2 * 2 * 2 * 2  # doses, kinds, exclusion; together and apart
    assert len(found.heads_frame()) == 2 * HEADS
    assert len(found.contrasts_frame()) == 2 * 2 * 2
    figure: Any = plot(found)
    curve = next(trace for trace in figure.data if trace.name == "induction heads off")
    assert list(curve.y) == [row.change.value for row in found.rows if row.task == "all" and row.kind == INDUCTION and not row.excluded]
    with pytest.raises(KeyError, match="no row of"):
        found.row(INDUCTION, task="other")


class Killed(Exception):
    """Stands for a kill."""


def test_a_killed_study_goes_on_where_it_was(planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(*args: Any, **kwargs: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(study, "knock_out", kill)
        with pytest.raises(Killed):
            study.run(planted.model, tasks=[COPY], shots=(1,), out=tmp_path, **SMALL)
    assert len((tmp_path / "odds.jsonl").read_text().splitlines()) == 1
    with monkeypatch.context() as patch:
        patch.setattr(study, "score_setting", kill)  # what is finished is not done again
        again = study.run(planted.model, tasks=[COPY], shots=(1,), out=tmp_path, **SMALL)
        patch.setattr(study, "knock_out", kill)
        third = study.run(planted.model, tasks=[COPY], shots=(1,), out=tmp_path, **SMALL)
    assert again.to_frame().equals(third.to_frame())
    whole = study.run(planted.model, tasks=[COPY], shots=(1,), **SMALL)
    assert again.verdict == whole.verdict  # kept or in memory, the same
    assert np.allclose(again.induction.value, whole.induction.value, atol=1e-6)
    assert {path.name for path in tmp_path.iterdir()} == {"odds.json", "odds.jsonl", "rows.csv", "heads.csv", "contrasts.csv"}
    with pytest.raises(CheckpointError, match="seed was 0, now 1"):
        study.run(planted.model, tasks=[COPY], shots=(1,), out=tmp_path, seed=1, **SMALL)


def test_memory_that_runs_out_in_any_part_is_a_note_of_the_study_also_when_it_goes_on(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"tasks": [COPY], "shots": (1,), "batch_size": 8, **SMALL}
    plenty = study.run(planted.model, **asked)
    model, run = planted.model, planted.model.run_blocks

    def look(batch: Any, *args: Any, **options: Any) -> Any:
        if len(set(batch.ids)) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(batch, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(model, "run_blocks", look)
        scarce = study.run(model, out=tmp_path, **asked)
    again = study.run(model, out=tmp_path, **asked)  # everything is finished
    said = [[note for note in found.notes if "Memory ran out" in note] for found in (plenty, scarce, again)]
    assert not said[0]
    assert said[1]
    assert said[2] == said[1]
    assert scarce.to_frame().equals(plenty.to_frame())  # nothing was left out: shares of the same answers


def test_knock_outs_of_other_heads_are_refused(planted: Planted, tmp_path: Path) -> None:
    study.run(planted.model, tasks=[COPY], shots=(1,), out=tmp_path, **SMALL)
    path = tmp_path / "odds.jsonl"
    path.write_text(
        path.read_text().replace('"sets": ["', '"sets": ["0.0 0.1", "', 1).replace('"correct": ["', '"correct": ["11111111", "', 1)
    )
    with pytest.raises(CheckpointError, match="of the heads that are ranked now"):
        study.run(planted.model, tasks=[COPY], shots=(1,), out=tmp_path, **SMALL)


# -- sets -----------------------------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.5, 50), min_size=1, max_size=6), st.integers(4, 600))
def test_doses_are_different_numbers_of_heads(doses: list[float], n: int) -> None:
    some = different(check_doses(doses), n)
    counts = [heads_at(dose, n) for dose in some]
    assert len(set(counts)) == len(counts)
    assert set(counts) == {heads_at(dose, n) for dose in doses}
    assert all(1 <= k <= max(1, round(n / 2)) for k in counts)
    assert main_dose(some, n, counts[0]) == some[0]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([None, 2.0, 25.0]))
def test_sets_keep_their_promises(seed: int, exclude: float | None) -> None:
    model = untrained(n_layers=4, n_heads=6, seed=0)
    draw = np.random.default_rng(seed)
    induction, vector = (_score(draw.normal(size=(4, 6))) for _ in range(2))
    tops = {INDUCTION: induction, FUNCTION_VECTOR: vector}
    for one in choose(model, induction, vector, (5.0, 25.0), 25.0, exclude=exclude, spare=[(0, 0)], n_random=6, n_band=2, seed=seed):
        k = heads_at(one.dose, 24)
        other = tops[KINDS[1 - KINDS.index(one.kind)]]
        assert len(one.heads) == k
        if one.excluded:
            assert not set(one.heads) & set(other.top(k if exclude is None else heads_at(exclude, 24)))
        else:
            assert set(one.heads) == set(tops[one.kind].top(k))
        for random in one.random:
            assert len(random) == k
            assert not set(random) & set(one.heads)


def _score(value: np.ndarray) -> Score:
    one = np.full(value.shape, 0.5)
    return Score("x", "", "probability", value, value, value, 0 * value, value, one, one, value[None])


# -- rules ----------------------------------------------------------------------------------------------------------------------------------------


def _row(
    kind: str,
    excluded: bool,
    change: tuple[float, float, float],
    *,
    p: float = 0.001,
    p_random: float = 0.048,
    n_random: int = 20,
    **more: Any,
) -> OddsRow:
    e = Estimate(*change, 100)
    row = OddsRow("all", 0, "mean", kind, excluded, 2.0, 4, ((0, 0),), e, e, p, p, -0.01, -0.02, 0.0, e, p_random, n_random, False, "")
    row = replace(row, **more)
    return replace(row, finding=row.finding or finding(row))


LOST, KEPT = (-0.5, -0.6, -0.4), (0.0, -0.05, 0.05)


@pytest.mark.parametrize(
    ("row", "word"),
    [
        (_row(INDUCTION, False, LOST), "necessary"),
        (_row(INDUCTION, False, LOST, p=0.2), "irrelevant"),
        (_row(INDUCTION, False, KEPT), "irrelevant"),
        (_row(INDUCTION, False, LOST, p_random=0.3), "unspecific"),
        (_row(INDUCTION, False, LOST, n_random=0, p_random=float("nan")), "no control"),
        (_row(INDUCTION, False, LOST, n_random=5, p_random=1 / 6), "no control"),
        (_row(INDUCTION, False, LOST, n_random=5, p_random=1 / 6, exhaustive=True), "necessary"),
    ],
)
def test_a_finding_follows_its_rule(row: OddsRow, word: str) -> None:
    assert row.finding == word


@pytest.mark.parametrize(
    ("plain", "excluded", "passing", "side"),
    [
        ((LOST, LOST), (LOST, KEPT), (4, 4), "induction"),
        ((LOST, LOST), (KEPT, LOST), (4, 4), "function vector"),
        ((LOST, LOST), (LOST, LOST), (4, 4), "both"),
        ((LOST, LOST), (KEPT, KEPT), (4, 4), "either"),
        ((KEPT, KEPT), (KEPT, KEPT), (4, 4), "neither"),
        ((LOST, LOST), (LOST, LOST), (4, 0), "induction only"),
        ((LOST, LOST), (LOST, LOST), (0, 4), "function vector only"),
        ((LOST, LOST), (LOST, LOST), (0, 0), "no heads"),
    ],
)
def test_a_side_follows_its_rule(plain: Any, excluded: Any, passing: tuple[int, int], side: str) -> None:
    rows = [
        {kind: _row(kind, out, change) for kind, change in zip(KINDS, some, strict=True)}
        for out, some in ((False, plain), (True, excluded))
    ]
    assert side_of(rows[0], rows[1], dict(zip(KINDS, passing, strict=True))) == side


def test_nothing_to_lose_goes_first() -> None:
    rows = {kind: _row(kind, False, LOST, finding="nothing to lose") for kind in KINDS}
    assert side_of(rows, rows, dict.fromkeys(KINDS, 1)) == "nothing to lose"


def test_combined_p_is_stouffers() -> None:
    from scipy.stats import combine_pvalues

    p = np.array([[0.01, 0.5, np.nan], [0.2, 0.5, 0.1], [0.03, 0.5, 0.1]])
    mine = combined_p(p)
    assert mine[0] == pytest.approx(combine_pvalues(p[:, 0], method="stouffer").pvalue)
    assert mine[1] == pytest.approx(0.5)
    assert np.isnan(mine[2])


def test_scores_together_lay_episodes_end_to_end() -> None:
    a, b = _score(np.zeros((2, 3))), _score(np.ones((2, 3)))
    both = together([a, b])
    assert np.allclose(both.value, 0.5)
    assert both.per_episode.shape == (2, 2, 3)


def test_the_interval_against_random_sets_widens_with_the_sets() -> None:
    draw = np.random.default_rng(0)
    off, alike = draw.random(200) < 0.3, np.repeat(draw.random((1, 200)) < 0.9, 10, 0).astype(float)
    apart = np.concatenate([np.ones((5, 200)), np.zeros((5, 200))])
    narrow, wide = against(off, alike, 0), against(off, apart, 0)
    assert narrow.high - narrow.low < wide.high - wide.low
    assert np.isnan(against(off, alike[:0], 0).value)


# -- tasks and refusals ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TASKS))
def test_functions_differ_and_episodes_repeat(name: str) -> None:
    task = TASKS[name]
    first, again, other = (list(task.draw(Draw(function, 3, 3, 2, 28, 5))) for function in (0, 0, 1))
    assert [e.query.label for e in first] == [e.query.label for e in again]
    assert len({e.id for e in first + other}) == 6
    for episode in first:
        assert len(episode.shots) == 6
        assert (episode.answer in {shot.label for shot in episode.shots}) == task.copied
        assert len({shot.label for shot in episode.shots}) > 1
        shown = {(shot.item, shot.label) for shot in episode.shots}
        assert len({item for item, _ in shown}) == len({item for item, _ in shown if item})
    if task.copied:
        names = [{(shot.item, shot.label) for e in some for shot in e.shots} for some in (first, other)]
        assert len(names[0]) == 3  # the same things under the same names in every episode of a function
        assert not names[0] & names[1]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 5), st.integers(2, 4), st.integers(1, 4))
def test_an_operators_examples_never_show_the_answer(seed: int, function: int, classes: int, shots: int) -> None:
    for episode in TASKS["operator"].draw(Draw(function, 2, classes, shots, 16, seed)):
        labels = [shot.label for shot in episode.shots]
        assert len(labels) == classes * shots
        assert episode.answer not in labels
        assert len(set(labels)) > 1
        a, b = (int(x) for x in episode.query.item.split(" ? "))
        assert int(episode.answer) == (a + b, abs(a - b), a * b)[function % 3]
        assert len({len(label) for label in episode.candidates}) == 1


def test_known_words_are_pairs_whose_labels_differ() -> None:
    for name, pairs in PAIRS.items():
        labels = [pair.split()[1] for pair in pairs]
        assert len(pairs) == 18, name
        assert all(len(pair.split()) == 2 for pair in pairs)
        assert len(set(labels)) == len(labels), name
    with pytest.raises(OptionError, match="classes x shots must be at most 17"):
        TASKS["known words"].draw(Draw(0, 1, 6, 3, 28, 0))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tasks": ["nothing"]}, "tasks must be among"),
        ({"tasks": []}, "tasks must be among"),
        ({"tasks": ["words", "words"]}, "tasks must differ"),
        ({"shots": (0,)}, "shots must be at least one number"),
        ({"n": 3, "functions": 2}, "n must be at least twice functions"),
        ({"classes": 1}, "classes must be at least 2"),
        ({"hows": ()}, "hows must be at least one"),
        ({"hows": ("gently",)}, "how must be one of"),
        ({"doses": (0.0,)}, "doses must be per cents"),
        ({"exclude": 80.0}, "doses must be per cents"),
    ],
)
def test_bad_options_are_refused_before_any_work(options: dict[str, Any], says: str) -> None:
    nothing: Any = None
    with unchecked(), pytest.raises(OptionError, match=says):
        study.run(nothing, **options)


def test_a_task_of_ones_own_and_its_name() -> None:
    assert [task.name for task in pick(["words", COPY])] == ["words", "copy"]
    assert name_of([(3, 0), (12, 10)]) == "3.0 12.10"


# -- the command ----------------------------------------------------------------------------------------------------------------------------------


def test_the_command_refuses_before_loading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr(mechicl, "load", load, raising=False)
    for arguments, says in (
        (["--tasks", "none"], "tasks must be among"),
        (["--shots", "a"], "shots must be numbers"),
        (["--how", "gently"], "how must be one of"),
    ):
        result = CliRunner().invoke(app, ["study", "heads-at-odds", "--out", str(tmp_path / "x"), *arguments])
        assert result.exit_code == 2
        assert says in result.output


def test_the_command_does_it_on_the_bundled_model_and_goes_on(tmp_path: Path) -> None:
    words: Sequence[str] = ["study", "heads-at-odds", "--tasks", "words", "--shots", "1", "--episodes", "6", "--functions", "1", "--classes", "2", "--doses", "25", "--how", "zero",
             "--random", "3", "--out", str(tmp_path / "odds"), "--quiet"]  # fmt: skip
    first = CliRunner().invoke(app, [*words, "--dry-run"])
    assert first.exit_code == 0, first.output
    assert "prompt passes" in first.output
    assert not (tmp_path / "odds").exists()
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "heads of each kind off" in done.output
    assert (tmp_path / "odds" / "odds.html").stat().st_size > 10_000
    again = CliRunner().invoke(app, words)
    assert again.stdout.splitlines()[:12] == done.stdout.splitlines()[:12]
