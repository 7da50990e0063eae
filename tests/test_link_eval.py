"""Link-context evaluation: planted answers, agreement with icl_accuracy, nested shots, protocols, paired tests, a run that is killed goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechicl.analysis.icl import icl_accuracy
from mechicl.analysis.link.evaluate import at_shots, compare_links, evaluate_link, link_cost, link_questions, link_tasks
from mechicl.data import concepts
from mechicl.data.link_context import SHORT, Pool, generated_pool
from mechicl.data.neighbours import Neighbours
from mechicl.errors import CheckpointError, EpisodeError, OptionError, OutputPathError
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.episode import Episode
from mechicl.results import LinkScores
from tests.conftest import unchecked
from tests.link_cases import RuleModel, always_first, follow


@pytest.fixture(scope="module")
def real(organism: Callable[..., tuple[Any, Any]]) -> HookedVLM:
    return HookedVLM(*organism("qwen2_5_vl"), check=False)


@pytest.fixture(scope="module")
def pool() -> Pool:
    return generated_pool(0, n_groups=4, per_class=6, size=28)


def evaluate(model: Any, data: Any, **options: Any) -> LinkScores:
    return evaluate_link(model, data, **{"n": 8, "shots": (0, 1, 2), "prompt": SHORT, "progress": False, "labels": "words", **options})


def test_a_model_that_follows_the_link_is_right_from_the_first_shot_and_at_chance_without(real: HookedVLM, pool: Pool) -> None:
    scores = evaluate(RuleModel(real, follow, 'there is "{}" in the image.'), pool, n=16)
    assert scores.n == 16
    none, one, two = scores.rows
    assert none.accuracy is not None
    assert none.accuracy.value == 0.0
    assert none.outcomes["neither"].value == 1.0
    assert 0 < none.likelihood.value < 1  # a coin
    for row in (one, two):
        assert row.accuracy is not None
        assert row.accuracy.value == row.likelihood.value == 1.0
        assert row.margin.value > 0
    assert one.shots == 2
    assert scores[2.0] is two
    assert scores["2 shots"] is two
    change = next(c for c in scores.changes if (c.measure, c.a, c.b) == ("written", "0 shots", "1 shot"))
    assert change.change.value == 1.0
    assert change.mcnemar_p == pytest.approx(2 / 2**16)
    assert change.holm_p >= change.mcnemar_p


def test_recalls_tell_a_model_that_always_says_one_name_from_one_that_knows(real: HookedVLM, pool: Pool) -> None:
    scores = evaluate(RuleModel(real, always_first), pool)
    for row in scores.rows:
        assert row.accuracy is not None
        assert row.positive_recall is not None
        assert row.negative_recall is not None
        assert (row.accuracy.value, row.positive_recall.value, row.negative_recall.value) == (0.5, 1.0, 0.0)
        assert (row.likelihood_positive_recall.value, row.likelihood_negative_recall.value) == (1.0, 0.0)
    assert any("one name is preferred" in note for note in evaluate(RuleModel(real, always_first), pool, n=16, shots=(1,)).notes)


def test_likelihood_is_that_of_icl_accuracy_on_the_same_episodes(real: HookedVLM) -> None:
    episodes = concepts.draw(12, classes=3, shots=2, size=28, seed=4)
    scores = evaluate(real, episodes, protocol="episodes", n=12, shots=(1, 2), labels="own", generate=False, batch_size=5, seed=7)
    for k, row in zip((1, 2), scores.rows, strict=True):
        same = icl_accuracy(real, [at_shots(e, k) for e in episodes], zero_shot=False, seed=7, progress=False)
        assert np.array_equal(row.likely, same.correct)
        assert np.array_equal(row.predicted, same.predicted)
        np.testing.assert_allclose(row.margins, same.margins, atol=1e-4)  # padding differs: rounding in float32
        assert row.likelihood.value == same.accuracy.value
        assert row.accuracy is None
    assert scores.chance == pytest.approx(1 / 3)
    assert not scores.rows[0].texts


def test_fewer_shots_are_among_the_more_and_the_queries_are_the_same(pool: Pool) -> None:
    more, fewer = (link_questions(pool, k, n=6, prompt=SHORT, size=28) for k in (4, 4))
    for a, b in zip(more, fewer, strict=True):
        one, four = at_shots(a, 1), at_shots(b, 4)
        assert [s.label for s in four.shots] == [s.label for s in a.shots]
        assert one.query is a.query
        assert set(map(id, one.shots)) <= set(map(id, a.shots))
        assert sorted(s.label for s in one.shots) == sorted(a.candidates)
        assert at_shots(a, 0).shots == ()
    with pytest.raises(OptionError, match=r"shots must be in 0\.\.4"):
        at_shots(more[0], 5)


def test_protocols_pair_the_classes_they_say(pool: Pool) -> None:
    kind = {one.key: one.kind for one in pool.classes}
    group = {one.key: one.group for one in pool.classes}
    ten = link_tasks(pool, 16, protocol="isekai-10", context=2)
    assert len(ten) == 16
    assert [t.asked for t in ten].count(0) == 8
    assert {(kind[t.keys[0]], kind[t.keys[1]]) for t in ten} == {("unreal", "real")}
    assert all(group[t.keys[0]] == group[t.keys[1]] for t in ten)
    pairs = link_tasks(pool, 24, protocol="isekai-pair", context=2)
    assert {(kind[a], kind[b]) for a, b in (t.keys for t in pairs)} == {("unreal", "unreal")}
    assert len({t.keys for t in pairs}) == 12
    folders = link_tasks(pool, 16, protocol="class-folders", context=3)
    assert {frozenset(t.keys) for t in folders} == {frozenset(pool.keys[i : i + 2]) for i in range(0, 8, 2)}
    by_class: dict[str, set[tuple[int, ...]]] = {}
    for t in folders:
        for key, images in zip(t.keys, t.examples, strict=True):
            by_class.setdefault(key, set()).add(tuple(map(id, images)))
            assert id(t.query) not in set(map(id, images))
    assert all(len(lists) == 1 for lists in by_class.values())  # fixed examples
    alike = np.full((8, 8), 0.1)
    alike[0, 5] = alike[5, 0] = 0.9
    near = link_tasks(pool, 16, protocol="class-folders", context=2, neighbours=Neighbours(pool.keys, alike))
    assert (pool.keys[0], pool.keys[5]) in {t.keys for t in near}


def test_labels_are_names_random_strings_or_words(pool: Pool) -> None:
    own, positive, words = (link_tasks(pool, 8, context=2, labels=kind) for kind in ("own", "positive", "words"))
    for a, b, c in zip(own, positive, words, strict=True):
        assert a.names == (pool[a.keys[0]].name, pool[a.keys[1]].name)
        assert b.names[1] == a.names[1]
        assert b.names[0].islower()
        assert set(c.names).isdisjoint(a.names)
    assert len({b.names[0] for b in positive}) > 1
    again = link_tasks(pool, 8, context=2, labels="positive")
    assert [t.names for t in again] == [t.names for t in positive]
    assert [t.names for t in link_tasks(pool, 8, context=2, labels="positive", seed=1)] != [t.names for t in positive]


def test_baselines_are_what_counting_and_looking_give(real: HookedVLM, pool: Pool) -> None:
    scores = evaluate(RuleModel(real, follow), pool)
    assert np.isnan(scores.baseline("majority").accuracy[0].value)
    assert scores.baseline("majority").accuracy[1].value == 0.5  # two labels, as often: a coin
    assert scores.baseline("copy any label").accuracy[2].value == 0.5
    assert set(np.unique(scores.baseline("copy last label").chances[1:])) <= {0.0, 1.0}

    def eyes(shots: Any) -> Any:
        from mechicl.models.embeddings import Embeddings

        keys = sorted({shot.item for shot in shots})
        return Embeddings(np.eye(len(pool))[[pool.keys.index(s.item) for s in shots]], np.zeros((len(shots), 0)), f"{len(keys)} classes")

    seen = evaluate(RuleModel(real, follow), pool, embeddings=eyes, shots=(1, 2))
    for name in ("nearest prototype", "nearest example"):
        assert [e.value for e in seen.baseline(name).accuracy] == [1.0, 1.0]
    change = next(c for c in seen.changes if (c.measure, c.a, c.b) == ("written", "nearest prototype", "2 shots"))
    assert change.change.value == 0.0
    assert change.mcnemar_p == 1.0
    with pytest.raises(OptionError, match="baseline must be one of"):
        seen.baseline("oracle")


def test_two_models_are_compared_on_the_same_questions_only(real: HookedVLM, pool: Pool) -> None:
    good, poor = evaluate(RuleModel(real, follow), pool), evaluate(RuleModel(real, always_first), pool)
    changes = compare_links(poor, good, names=("first name", "follows"))
    one = next(c for c in changes if c.measure == "written" and c.b == "follows, 1 shot")
    assert one.change.value == 0.5
    assert one.a == "first name, 1 shot"
    assert all(c.change.value == 0 and c.mcnemar_p == 1 for c in compare_links(good, good))
    with pytest.raises(OptionError, match="a and b must have answered the same questions"):
        compare_links(good, evaluate(RuleModel(real, follow), pool, seed=1))


def test_a_question_that_cannot_be_asked_is_left_out_of_all_shots_and_named(real: HookedVLM) -> None:
    episodes = concepts.draw(4, classes=2, shots=2, size=28, seed=0)
    episodes[1] = replace(episodes[1], instruction="<|im_end|>")
    scores = evaluate(RuleModel(real, follow), episodes, protocol="episodes", labels="own")
    assert scores.n == 3
    assert [s.episode for s in scores.skipped] == [episodes[1].id]
    assert episodes[1].id not in scores.episode_ids
    with pytest.raises(EpisodeError, match="an episode must be askable in every setting; none of 1 is"):
        evaluate(RuleModel(real, follow), episodes[1:2], protocol="episodes", labels="own")


def test_tables_have_every_number(real: HookedVLM, pool: Pool) -> None:
    scores = evaluate(RuleModel(real, follow), pool)
    table = scores.to_frame()
    assert set(table.way) == {
        "written",
        "likelihood",
        "majority",
        "copy any label",
        "copy last label",
        "nearest prototype",
        "nearest example",
    }
    assert len(table) == 3 * 7
    assert len(scores.answers_frame()) == 3 * 8
    assert len(scores.changes_frame()) == len(scores.changes)
    assert scores.provenance.options["shots" if "shots" in scores.provenance.options else "axis"] == "shots per class"


KILLED = """
import os, signal, sys
import torch; torch.set_num_threads(1)
from mechicl.analysis.link import settings as link_settings
from mechicl.analysis.link.evaluate import evaluate_link
from mechicl.data.link_context import SHORT, generated_pool
from mechicl.models.vlm import HookedVLM
from mechicl.training.organisms import build
ask, count = link_settings.ask_together, 0
def dying(*args):
    global count
    count += 1
    if count == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return ask(*args)
link_settings.ask_together = dying
model = HookedVLM(*build("qwen2_5_vl", preset="tiny", seed=0), check=False)
evaluate_link(model, generated_pool(0, n_groups=4, per_class=6, size=28), n=8, shots=(0, 1, 2), prompt=SHORT, labels="words", batch_size=3, out=sys.argv[1], progress=False, max_new_tokens=3)
"""  # fmt: skip


def test_a_run_killed_outright_loses_the_batch_in_flight_only(
    real: HookedVLM, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    died = subprocess.run([sys.executable, "-c", KILLED, str(folder)], capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    lines = (folder / "answers.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["rows"]) for line in lines] == [3, 3, 2]  # three batches; the fourth was in flight
    with (folder / "answers.jsonl").open("a") as file:
        file.write('{"setting": "1 shot", "rows": [0, 1')  # a line that the crash cut off
    from mechicl.analysis.link import settings as link_settings

    seen: list[int] = []
    inner = link_settings.ask_together
    monkeypatch.setattr(
        link_settings, "ask_together", lambda model, episodes, how: (seen.append(len(episodes)), inner(model, episodes, how))[1]
    )
    options: dict[str, Any] = {"batch_size": 3, "max_new_tokens": 3}
    again = evaluate(real, pool, out=folder, **options)
    assert sum(seen) == 16
    whole = evaluate(real, pool, **options)
    for a, b in zip(again.rows, whole.rows, strict=True):
        assert a.texts == b.texts
        np.testing.assert_allclose(a.margins, b.margins, atol=1e-5)
    pd.testing.assert_frame_equal(pd.read_csv(folder / "scores.csv"), again.to_frame(), check_dtype=False)
    seen.clear()
    evaluate(real, pool, out=folder, **options)
    assert not seen
    with pytest.raises(CheckpointError, match="out must hold the same evaluation"):
        evaluate(real, pool, out=folder, batch_size=3, max_new_tokens=4)
    with pytest.raises(CheckpointError, match="episodes was"):
        evaluate(real, pool, out=folder, seed=1, **options)
    (folder / "answers.jsonl").write_text("no\n")
    with pytest.raises(CheckpointError, match=r"answers\.jsonl must hold finished batches"):
        evaluate(real, pool, out=folder, **options)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_text("")
    with pytest.raises(OutputPathError, match="out must be a new or empty folder"):
        evaluate(real, pool, out=tmp_path / "other", **options)


def test_the_cost_counts_prompts_and_tokens(real: HookedVLM, pool: Pool) -> None:
    found = link_cost(RuleModel(real, follow), pool, n=8, shots=(0, 2), prompt=SHORT, labels="words")
    assert (found.prompts, found.n) == (16, 8)
    assert found.seconds > 0
    assert found.longest * 16 >= found.tokens > 0
    assert "16 prompts on 8 episodes" in str(found)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"shots": ()}, "shots must be numbers"),
        ({"shots": (-1, 2)}, "shots must be numbers"),
        ({"shots": (6,)}, "must have more than 6 pictures"),
        ({"n": 0}, "n must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"verify": -1}, "verify at least 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"protocol": "isekai"}, "protocol must be one of"),
        ({"protocol": "episodes"}, "protocol must be one of"),
        ({"labels": "any"}, "labels must be one of"),
        ({"rule": "any"}, "rule must be one of"),
        ({"score": "any"}, "score must be one of"),
    ],
)
def test_what_cannot_be_is_refused(real: HookedVLM, pool: Pool, options: dict[str, Any], says: str) -> None:
    with unchecked(), pytest.raises(OptionError, match=says):
        evaluate(RuleModel(real, follow), pool, **options)


def test_data_that_do_not_fit_the_protocol_are_refused(real: HookedVLM, pool: Pool) -> None:
    model = RuleModel(real, follow)
    with pytest.raises(OptionError, match="protocol must be 'episodes' for given questions"):
        evaluate(model, concepts.draw(2, classes=2, shots=2, size=28, seed=0), labels="own")
    with pytest.raises(EpisodeError, match="data must hold at least one question"):
        evaluate(model, [], protocol="episodes", labels="own")
    with pytest.raises(OptionError, match="neighbours must be given with protocol 'class-folders' only"):
        evaluate(model, pool, neighbours=Neighbours(pool.keys, np.eye(8)))
    real_only = Pool(tuple(one for one in pool.classes if one.kind == "real"))
    with pytest.raises(OptionError, match="the pool must have unreal classes with real partners"):
        evaluate(model, real_only)
    with unchecked(), pytest.raises(OptionError, match="data must be a pool, questions or episodes"):
        evaluate(model, ["a"], protocol="episodes", labels="own")  # type: ignore[list-item]

    class Mute:
        def __getattr__(self, name: str) -> Any:
            if name in ("generate", "processor"):
                raise AttributeError(name)
            return getattr(real, name)

    with pytest.raises(OptionError, match="model must be able to generate"):
        evaluate(Mute(), pool)


def test_a_name_in_a_longer_one_is_noted(real: HookedVLM) -> None:
    episodes: list[Episode] = []
    for e in concepts.draw(2, classes=2, shots=1, size=28, seed=0, labels=("ba", "zuba")):
        episodes.append(e)
    scores = evaluate(RuleModel(real, follow), episodes, protocol="episodes", labels="own", shots=(1,))
    assert any("one name contains the other" in note for note in scores.notes)
