"""VL-ICL Bench: what is written in its layout is read back as published, examples are drawn as published, and nothing unusable gets through unnamed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture, unchecked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mechicl.data.vl_icl import INSTRUCTIONS, NAMES, VLICLTask, instruction, load_vl_icl
from mechicl.data.vl_icl_check import OPERATORS, check_vl_icl
from mechicl.data.vl_icl_made import MAKERS, QUESTIONS, write_vl_icl
from mechicl.data.vl_icl_scenes import Thing, draw_things, scene_picture, words_picture
from mechicl.errors import ImageError, OptionError, OutputPathError
from mechicl.prompts.render import Renderer

TASKS = tuple(MAKERS)
SMALL: dict[str, dict[str, int]] = {
    "open_mi": {"n": 4},
    "matching_mi": {"n": 6, "n_support": 6},
    "clevr": {"n": 6, "n_support": 12},
    "operator_induction": {"n": 12},
    "operator_induction_interleaved": {"n": 12},
    "textocr": {"n": 4, "n_support": 12},
}


def write(folder: Path, task: str, **options: Any) -> Path:
    return write_vl_icl(folder, task, **({"size": 32} | SMALL[task] | options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vl_icl") / "VL-ICL"
    for task in TASKS:
        write(folder, task)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "VL-ICL"))


def rows(folder: Path, task: str, split: str = "query") -> list[dict[str, Any]]:
    return json.loads((folder / task / f"{split}.json").read_text())


def rewrite(folder: Path, task: str, content: Any, split: str = "query") -> None:
    (folder / task / f"{split}.json").write_text(content if isinstance(content, str) else json.dumps(content))


def load(folder: Path, task: str, **options: Any) -> VLICLTask:
    return load_vl_icl(folder, task, **options)  # type: ignore[arg-type]


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return found.hexdigest()


# ---- the layout


def test_the_written_sets_have_the_published_fields(made: Path) -> None:
    for task in TASKS:
        for row in rows(made, task):
            assert all(name.startswith(f"{task}/") and (made / name).is_file() for name in row["image"])
            assert row["question"] == QUESTIONS.get(task, row["question"])
            assert len(row["image"]) == (2 if task in ("matching_mi", "operator_induction_interleaved") else 1)
    query = rows(made, "open_mi")[0]
    assert len(query["classes"]) == 5
    assert query["answer"] in query["classes"]
    assert all(len(query["support"][name]["images"]) == 5 and query["support"][name]["caption"] for name in query["classes"])
    assert {row["answer"] for row in rows(made, "matching_mi")} == {"Yes", "No"}
    assert {*rows(made, "matching_mi", "support")[0]} >= {"same", "diff"}
    assert all(isinstance(row["answer"], int) for row in rows(made, "clevr"))


@pytest.mark.parametrize("task", ["operator_induction", "operator_induction_interleaved"])
def test_operators_have_80_couples_in_support_and_the_other_20_as_queries(made: Path, task: str) -> None:
    support, queries = rows(made, task, "support"), rows(made, task)
    assert len(support) == 80
    couples = [divmod_of(row["answer"]) for row in support]
    assert len(set(couples)) == 80
    for row in queries:
        assert row["operator"] in OPERATORS
    if task == "operator_induction":  # the couple stands in the file's name
        shown = {tuple(map(int, Path(row["image"][0]).stem.split("_"))) for row in queries}
        assert not shown & set(couples)
        for row in queries:
            a, b = map(int, Path(row["image"][0]).stem.split("_"))
            assert row["answer"] == {"+": a + b, "-": a - b, "x": a * b}[row["operator"]]


def divmod_of(results: list[int]) -> tuple[int, int]:
    """(A, B) of [A+B, A-B, AxB]."""
    a = (results[0] + results[1]) // 2
    b = results[0] - a
    assert a * b == results[2]
    assert 0 <= min(a, b) <= max(a, b) <= 9
    return a, b


@pytest.mark.parametrize("task", ["open_mi", "textocr"])
def test_the_same_seed_gives_the_same_bytes_and_another_other_ones(task: str, tmp_path: Path) -> None:
    first, again, other = (write(tmp_path / name, task, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert digest(first) == digest(again) != digest(other)


def test_clevr_counts_what_is_in_the_scene(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[list[Thing]] = []

    def note(things: list[Thing], size: int, draw: np.random.Generator) -> Image.Image:
        drawn.append(things)
        return scene_picture(things, size, draw)

    monkeypatch.setattr("mechicl.data.vl_icl_made.scene_picture", note)
    out = write(tmp_path, "clevr", n=8, n_support=8)
    for things, row in zip(drawn, rows(out, "clevr") + rows(out, "clevr", "support"), strict=True):
        attribute, value = row["question"].split(": ")
        assert row["answer"] == sum(getattr(thing, attribute) == value for thing in things) >= 1


def test_things_of_different_looks_are_different_pictures() -> None:
    draw = np.random.default_rng(0)
    assert len({thing.shape for thing in draw_things(40, draw)}) == 3
    seen = {scene_picture([Thing(*look)], 48, np.random.default_rng(1)).tobytes() for look in (("cube", "large", "metal", "red"), ("cube", "large", "rubber", "red"), ("sphere", "large", "metal", "red"), ("cube", "small", "metal", "red"), ("cube", "large", "metal", "blue"))}  # fmt: skip
    assert len(seen) == 5
    assert words_picture("3 ? 4", 32).tobytes() != words_picture("3 ? 5", 32).tobytes()


# ---- episodes


@pytest.mark.parametrize("task", TASKS)
def test_fewer_shots_are_among_the_more_and_the_same_queries_are_asked(made: Path, task: str) -> None:
    found = load(made, task)
    few, more = found.episodes(3, shots=1, seed=5), found.episodes(3, shots=4, seed=5)
    for a, b in zip(few, more, strict=True):
        assert a.id == b.id
        assert a.query.images[0].tobytes() == b.query.images[0].tobytes()
        assert [s.images[0].tobytes() for s in a.shots] == [s.images[0].tobytes() for s in b.shots[: len(a.shots)]]
        assert len(b.shots) == (8 if task in ("open_mi", "matching_mi") else 4)
        assert a.without_shots().candidates == a.candidates
    assert [e.id for e in found.episodes(3, shots=0, seed=5)] == [e.id for e in few]
    assert len(found.episodes(shots=0)) == len(found.queries)


def test_open_mi_binds_two_classes_in_turn_with_the_files_pictures_in_order(made: Path) -> None:
    entries = {str(row["id"]): row for row in rows(made, "open_mi")}
    for episode in load(made, "open_mi").episodes(shots=3):
        entry = entries[episode.id.split("/")[1]]
        names = [shot.label for shot in episode.shots]
        assert names == names[:2] * 3
        assert set(names) == set(episode.candidates)
        assert episode.answer == entry["answer"]
        for k, shot in enumerate(episode.shots):
            with Image.open(made / entry["support"][shot.label]["images"][k // 2]) as image:
                assert shot.images[0].tobytes() == image.convert("RGB").tobytes()
    assert {len(e.candidates) for e in load(made, "open_mi").episodes(shots=1, classes=5)} == {5}


def test_matching_shows_a_same_and_a_different_couple_in_turn(made: Path) -> None:
    for episode in load(made, "matching_mi").episodes(shots=2):
        assert [shot.label for shot in episode.shots] == ["Yes", "No"] * 2
        assert all(len(shot.images) == 2 for shot in (*episode.shots, episode.query))
        assert sorted(episode.candidates) == ["No", "Yes"]


@pytest.mark.parametrize("task", ["operator_induction", "operator_induction_interleaved"])
def test_operator_examples_are_answered_under_the_querys_operator(made: Path, task: str) -> None:
    entries = {str(row["id"]): row for row in rows(made, task)}
    answers = {tuple(row["image"]): row["answer"] for row in rows(made, task, "support")}
    by_bytes = {tuple(Image.open(made / name).convert("RGB").tobytes() for name in key): value for key, value in answers.items()}
    for episode in load(made, task).episodes(shots=4):
        operator = entries[episode.id.split("/")[1]]["operator"]
        for shot in episode.shots:
            key = tuple(image.tobytes() for image in shot.images)
            assert int(shot.label) == by_bytes[key][OPERATORS.index(operator)]


@pytest.mark.parametrize("task", ["clevr", "operator_induction", "textocr"])
def test_no_candidate_begins_another_unless_examples_need_both(made: Path, task: str) -> None:
    found = load(made, task)
    for episode in found.episodes(6 if task == "operator_induction" else None, shots=2):
        needed = {episode.answer, *(shot.label for shot in episode.shots)}
        assert needed <= set(episode.candidates)
        clash = [(a, b) for a in episode.candidates for b in episode.candidates if a != b and b.startswith(a)]
        assert all({a, b} <= needed for a, b in clash)
        assert set(episode.candidates) <= set(found.answers)


@pytest.mark.parametrize("task", ["clevr", "operator_induction"])
def test_shown_gives_an_example_with_the_answer_and_one_with_another(made: Path, task: str) -> None:
    found = load(made, task)
    usable = [row.answer for row in found.support] + [a for row in found.support for a in row.answers]
    places = set()
    for seed in range(4):
        for episode in found.episodes(shots=2, shown=True, seed=seed) if all(q.answer in usable for q in found.queries) else []:
            labels = [shot.label for shot in episode.shots]
            assert episode.answer in labels
            assert len(set(labels)) == 2
            assert not any(a != b and b.startswith(a) for a in episode.candidates for b in episode.candidates)
            places.add(labels.index(episode.answer))
    assert places in (set(), {0, 1})


def test_clevr_asks_a_question_of_its_own_about_every_picture(made: Path) -> None:
    for episode in load(made, "clevr").episodes(shots=2):
        assert episode.question == ""
        assert all(": " in shot.text for shot in (*episode.shots, episode.query))


def test_instructions_have_three_levels(made: Path) -> None:
    for task in NAMES:
        assert instruction(task, "nothing") == ""
        assert len(instruction(task, "concise")) < len(instruction(task, "detailed"))
    assert load(made, "open_mi").episodes(1, shots=1)[0].instruction == INSTRUCTIONS["open_mi"][0]


def test_fast_open_mi_is_open_mi_under_either_name(folder: Path) -> None:
    assert load(folder, "fast_open_mi").name == "open_mi"
    (folder / "open_mi").rename(folder / "fast_open_mi")
    with pytest.raises(ImageError, match=r"picture open_mi/query/0.png is not there"):
        load(folder, "fast_open_mi", strict=False)
    for row in (entries := rows(folder, "fast_open_mi")):
        row["image"] = [name.removeprefix("open_mi/") for name in row["image"]]  # names that start from the task's own folder are found too
        for name in row["classes"]:
            row["support"][name]["images"] = [path.removeprefix("open_mi/") for path in row["support"][name]["images"]]
    rewrite(folder, "fast_open_mi", entries)
    assert len(load(folder, "open_mi").queries) == len(entries)


def test_the_tasks_own_folder_will_do(made: Path) -> None:
    assert len(load(made / "clevr", "clevr").queries) == len(load(made, "clevr").queries)


@pytest.mark.parametrize("task", TASKS)
def test_every_family_renders_every_task_with_exact_spans(
    made: Path, family: str, organism: Callable[..., tuple[Any, Any]], task: str
) -> None:
    model, processor = organism(family)
    episodes = load(made, task).episodes(2, shots=1, description="nothing")
    batch = Renderer(processor, model.config).render(episodes)
    ids = batch.inputs["input_ids"]
    for row, (episode, spans) in enumerate(zip(episodes, batch.spans, strict=True)):
        for k, shot in enumerate(episode.shots):
            tokens = [
                int(ids[row, pos]) for span in spans if span.role == "label" and span.shot == k for pos in range(span.start, span.stop)
            ]
            assert processor.tokenizer.decode(tokens).strip() == shot.label
            assert len({span.image for span in spans if span.role == "image" and span.shot == k}) == len(shot.images)


# ---- refusals


def problems(folder: Path, task: str, **options: Any) -> list[tuple[str, str]]:
    return [(problem.kind, str(problem)) for problem in check_vl_icl(folder, task, **options).problems]


def test_a_picture_outside_of_the_folder_is_refused_and_never_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = folder.parent / "secret.png"
    picture().save(secret)
    (folder / "clevr" / "link.png").symlink_to(secret)
    entries = rows(folder, "clevr")
    for row, name in zip(entries, ("../secret.png", str(secret), "clevr/link.png", "clevr/../../secret.png", "clevr\\x.png"), strict=False):
        row["image"] = [name]
    rewrite(folder, "clevr", entries)
    opened: list[Path] = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path, *a, **k: (opened.append(Path(path).resolve()), real(path, *a, **k))[1])
    assert [kind for kind, _ in problems(folder, "clevr")] == ["escapes"] * 5
    assert secret not in opened


def test_from_the_tasks_own_folder_nothing_beside_it_is_read(folder: Path) -> None:
    entries = rows(folder, "clevr")
    entries[0]["image"] = ["textocr/query/0.png"]
    rewrite(folder, "clevr", entries)
    assert problems(folder, "clevr") == []  # within the benchmark's folder
    assert [kind for kind, _ in problems(folder / "clevr", "clevr")] == ["missing"]


def test_missing_broken_and_huge_pictures_are_named(folder: Path) -> None:
    (folder / "clevr" / "query" / "0.png").unlink()
    (folder / "clevr" / "query" / "1.png").write_bytes((folder / "clevr" / "query" / "1.png").read_bytes()[:60])
    picture(90, 60).save(folder / "clevr" / "query" / "2.png")
    found = problems(folder, "clevr", max_pixels=32 * 32)
    assert [kind for kind, _ in found] == ["missing", "broken", "broken"]
    assert "at most 1024 pixels; 2.png has 90 x 60" in found[2][1]
    with pytest.raises(ImageError, match=r"1 problems|3 problems") as refused:
        load(folder, "clevr", max_pixels=32 * 32)
    assert "query.json row 0: picture clevr/query/0.png is not there" in str(refused.value)
    assert len(load(folder, "clevr", max_pixels=32 * 32, strict=False).queries) == SMALL["clevr"]["n"] - 3


def test_archives_that_are_still_packed_are_pointed_at(folder: Path) -> None:
    shutil.rmtree(folder / "textocr" / "query")
    (folder / "textocr" / "query.zip").write_bytes(b"")
    assert problems(folder, "textocr")[0][1] == "textocr: pictures are missing and query.zip lies there: unpack it in VL-ICL/ first"


@pytest.mark.parametrize(
    ("task", "change", "says"),
    [
        ("clevr", {"answer": None}, "answer must be text or a whole number"),
        ("clevr", {"answer": True}, "answer must be text or a whole number"),
        ("clevr", {"question": 3}, "question must be text"),
        ("clevr", {"image": []}, "image must be a list of 1 file name; got"),
        ("matching_mi", {"image": ["matching_mi/query/0_0.png"]}, "image must be a list of 2 file names"),
        ("operator_induction", {"operator": "*"}, "operator must be one of + - x"),
        ("open_mi", {"classes": ["a", "a"]}, "classes must be a list of different names"),
        ("open_mi", {"answer": "nobody"}, "classes must be the answer and others"),
        ("open_mi", {"support": {}}, "support must hold"),
        ("textocr", {"answer": "\ud800"}, "answer must be text"),
    ],
)
def test_a_malformed_row_is_named(folder: Path, task: str, change: dict[str, Any], says: str) -> None:
    entries = rows(folder, task)
    entries[1] |= change
    rewrite(folder, task, entries)
    [(kind, text)] = problems(folder, task)
    assert kind == "malformed"
    assert text.startswith("query.json row 1: ")
    assert says in text


def test_support_rows_and_whole_files_are_looked_at_too(folder: Path) -> None:
    support = rows(folder, "operator_induction", "support")
    support[3]["answer"] = [1, 2]
    rewrite(folder, "operator_induction", support, "support")
    assert "support.json row 3: answer must be a list of 3 results" in problems(folder, "operator_induction")[0][1]
    pairs = rows(folder, "matching_mi", "support")
    del pairs[0]["diff"]
    rewrite(folder, "matching_mi", [*pairs, 7], "support")
    assert len(problems(folder, "matching_mi")) == 2
    for content, says in (("{", "not readable JSON"), ("{}", "must be an array"), ("[" * 100_000, "not readable JSON")):
        rewrite(folder, "clevr", content)
        assert says in problems(folder, "clevr")[0][1]
    (folder / "textocr" / "support.json").unlink()
    assert problems(folder, "textocr") == [("folder", "support.json: there is no such file")]
    with pytest.raises(ImageError, match="there is no such file"):
        load(folder, "textocr", strict=False)


FIELDS = (
    "image",
    "question",
    "answer",
    "operator",
    "classes",
    "support",
    "same",
    "diff",
    "images",
    "id",
    "dax",
    "clevr/query/0.png",
    "open_mi/query/0.png",
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.floats() | st.sampled_from(FIELDS) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=6),
    max_leaves=12,
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(TASKS), st.lists(anything, min_size=1, max_size=3))
def test_whatever_a_file_holds_is_a_usable_row_or_a_problem(folder: Path, task: str, content: list[Any]) -> None:
    with unchecked():
        for split in ("query", "support"):
            rewrite(folder, task, content, split)
        report = check_vl_icl(folder, task)
    files = 1 if task == "open_mi" else 2
    assert len(report.queries) + len(report.support) + len([p for p in report.problems if p.kind != "packed"]) == files * len(content)
    assert str(report)


def test_a_query_among_its_own_examples_is_a_leak(folder: Path) -> None:
    entries = rows(folder, "open_mi")
    entries[0]["support"][entries[0]["answer"]]["images"][2] = entries[0]["image"][0]
    rewrite(folder, "open_mi", entries)
    assert [kind for kind, _ in problems(folder, "open_mi")] == ["leak"]


@pytest.mark.usefixtures("untyped")
def test_numbers_out_of_range_are_refused(made: Path, tmp_path: Path) -> None:
    found = load(made, "open_mi")
    for options, says in (({"n": 5}, r"n must be in 1..4"), ({"shots": 6}, r"shots must be in 0..5"), ({"classes": 6}, r"classes must be in 2..5"), ({"description": "long"}, "description must be one of")):  # fmt: skip
        with pytest.raises(OptionError, match=says):
            found.episodes(**options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="shown must be False for textocr"):
        load(made, "textocr").episodes(shown=True)
    with pytest.raises(OptionError, match="task must be one of"):
        load(made, "cobsat")
    with pytest.raises(OptionError, match="size must be at least 8"):
        load(made, "clevr", size=4)
    with pytest.raises(ImageError, match=r"no query.json"):
        load(tmp_path, "clevr")
    with pytest.raises(OptionError, match=r"n must be in 1..60"):
        write(tmp_path, "operator_induction", n=61)
    with pytest.raises(OutputPathError, match="new or empty"):
        write(made, "clevr")


def test_pictures_are_shrunk_when_asked(made: Path) -> None:
    assert load(made, "clevr", size=16).episodes(1, shots=1)[0].query.images[0].size == (16, 16)


def test_the_report_says_what_is_there(made: Path) -> None:
    told = str(load(made, "matching_mi").report)
    assert "matching_mi, 6 usable queries, 6 usable support rows, 36 pictures, 0 problems" in told
    assert "2 different answers; the commonest is" in told
    assert "each with its own examples" in str(load(made, "open_mi").report)
