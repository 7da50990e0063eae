"""ISEKAI lists and class folders: what is written is read back, and nothing unusable gets through unnamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture, unchecked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mechicl.data.class_folders import check_class_folders, load_class_folders
from mechicl.data.folders import fresh_folder, within
from mechicl.data.isekai import FIELDS, check_isekai, load_isekai
from mechicl.data.isekai_made import generated_pool, main, write_isekai
from mechicl.data.link_context import link_episodes
from mechicl.data.link_tasks import LinkTask, consecutive, paired_tasks, task_episodes, unreal_pairs
from mechicl.errors import ImageError, OptionError, OutputPathError

SMALL: dict[str, Any] = {"n_groups": 3, "per_class": 6, "size": 16, "pairs": 3, "context": 4, "queries": 2}


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_isekai(tmp_path_factory.mktemp("made") / "set", seed=5, **SMALL)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "set"))


def rows(folder: Path, name: str = "ISEKAI-10.json") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def rewrite(folder: Path, given: list[Any], name: str = "ISEKAI-10.json") -> None:
    (folder / name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in given))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header says how large it is."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


# ---- the made-up set -------------------------------------------------------------------------------------------------------------------------------


def test_the_set_has_the_published_fields_and_sizes(tmp_path: Path) -> None:
    whole = write_isekai(tmp_path / "whole", size=8)
    kinds = [one["kind"] for one in json.loads((whole / "made.json").read_text())["classes"]]
    assert (len(kinds), kinds.count("unreal"), kinds.count("real")) == (40, 20, 20)  # 20 groups, 40 categories
    assert {len(list(place.iterdir())) for place in whole.iterdir() if place.is_dir()} == {32}
    ten, pair = rows(whole), rows(whole, "ISEKAI-pair.json")
    assert all(set(row) == set(FIELDS) for row in (*ten, *pair))
    assert len({(row["positive_promt"], row["negative_promt"]) for row in ten}) == 10
    names = {row["positive_promt"] for row in pair}
    assert {(row["positive_promt"], row["negative_promt"]) for row in pair} == {(a, b) for a in names for b in names if a != b}
    assert all(len(row["positive_list"]) == len(row["negative_list"]) == 16 for row in (*ten, *pair))
    assert all(row["image_name"] not in [*row["positive_list"], *row["negative_list"]] for row in (*ten, *pair))
    asked = [row["label_name"] == row["positive_promt"] for row in ten]
    assert asked == [True, False] * (len(ten) // 2)


def test_the_loader_reads_back_what_was_written(made: Path) -> None:
    found = load_isekai(made)
    assert (set(found.report.lists), found.report.problems) == ({"ISEKAI-10", "ISEKAI-pair"}, ())
    for name in found.report.lists:
        written = rows(made, f"{name}.json")
        assert len(written) == len(found[name])
        for row, task in zip(written, found[name], strict=True):
            assert task.names == (row["positive_promt"], row["negative_promt"])
            assert task.names[task.asked] == row["label_name"]
            assert [str(path.relative_to(made.resolve())) for path in task.examples[0]] == row["positive_list"]  # type: ignore[union-attr]
            assert [str(path.relative_to(made.resolve())) for path in task.examples[1]] == row["negative_list"]  # type: ignore[union-attr]
    assert "12 lines, 3 pairs, 6 positive and 6 negative queries, up to 4 shots" in str(found.report)


def test_pictures_on_disk_are_those_of_the_pool_in_memory(made: Path) -> None:
    pool = generated_pool(5, 3, 6, 16)
    disk = load_class_folders(made, names={key.replace(" ", "_"): key for key in pool.keys}).train
    for one in pool.classes:
        key = one.key.replace(" ", "_")
        assert all(disk.picture(key, k).tobytes() == image.tobytes() for k, image in enumerate(one.images))  # type: ignore[union-attr]
    in_memory = paired_tasks(pool, pool.partners, context=4, queries=2, seed=5)
    on_disk = load_isekai(made)["ISEKAI-10"]
    for a, b in zip(task_episodes(in_memory, 3), task_episodes(on_disk, 3), strict=True):
        assert (a.candidates, a.answer) == (b.candidates, b.answer)
        assert sorted(shot.images[0].tobytes() for shot in a.shots) == sorted(shot.images[0].tobytes() for shot in b.shots)


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path: Path, made: Path) -> None:
    again, other = (write_isekai(tmp_path / str(seed), seed=seed, **SMALL) for seed in (5, 6))
    assert digest(again) == digest(made) != digest(other)


def test_the_command_writes_a_set_and_says_what_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--groups", "2", "--per-class", "4", "--size", "16", "--pairs", "2", "--context", "2", "--queries", "1"]
    assert main([str(tmp_path / "out"), *given]) == 0
    assert "2 lists, 8 usable lines" in capsys.readouterr().out
    assert main([str(tmp_path / "out"), *given]) == 2
    assert "folder must be new or empty" in capsys.readouterr().err


def test_a_set_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def stop_in_the_middle() -> None:
        with fresh_folder(tmp_path / "out") as place:
            (place / "half").write_text("")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        stop_in_the_middle()
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputPathError, match="folder must be"):
            write_isekai(target, **SMALL)
    for change, match in (({"pairs": 9}, "pairs must be"), ({"context": 6}, "more than 6 pictures"), ({"queries": 0}, "queries must be")):
        with pytest.raises(OptionError, match=match):
            write_isekai(tmp_path / "new", **{**SMALL, **change})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ---- lists from elsewhere --------------------------------------------------------------------------------------------------------------------------


def test_names_are_compared_without_case_and_a_list_may_be_one_array(folder: Path) -> None:
    given = rows(folder)
    for row in given:
        row["label_name"] = row["label_name"].upper()
    (folder / "ISEKAI-10.json").write_text(json.dumps(given, indent=1))
    again = load_isekai(folder)["ISEKAI-10"]
    assert [task.asked for task in again] == [k % 2 for k in range(len(given))]


def test_pictures_may_lie_in_another_folder(folder: Path, tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    for file in folder.glob("*.json"):
        file.rename(lists / file.name)
    assert load_isekai(lists, images=folder).report.problems == ()
    assert check_isekai(lists).problems[0].kind == "missing"


def edit(field: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda row: {**row, field: value}


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda row: "{not json", "malformed", "not JSON"),
        (lambda row: "[1, 2]", "malformed", "not an object"),
        (lambda row: {k: v for k, v in row.items() if k != "negative_promt"}, "malformed", "negative_promt must be"),
        (edit("positive_list", []), "malformed", "positive_list must be a list"),
        (edit("positive_list", "a.png"), "malformed", "positive_list must be a list"),
        (edit("negative_list", ["a.png", 3]), "malformed", "negative_list must be a list"),
        (edit("image_name", 7), "malformed", "image_name must be"),
        (edit("positive_promt", "\ud800"), "malformed", "half of a character"),
        (edit("label_name", "somebody"), "malformed", "one of the two names"),
        (lambda row: {**row, "negative_promt": row["positive_promt"].upper()}, "malformed", "must differ"),
        (edit("image_name", "../secret.png"), "escapes", "leads out"),
        (edit("image_name", "/etc/hostname"), "escapes", "leads out"),
        (edit("image_name", "link.png"), "escapes", "leads out"),
        (edit("image_name", "a\0b.png"), "escapes", "leads out"),
        (edit("image_name", "nobody/00.png"), "missing", "is not there"),
        (edit("image_name", "broken.png"), "broken", "cannot be used"),
        (edit("image_name", "bomb.png"), "broken", "at most 40000000 pixels"),
        (edit("image_name", "text.png"), "broken", "cannot be used"),
        (lambda row: {**row, "image_name": row["negative_list"][1]}, "leak", "among its own examples"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_and_can_be_left_out(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], kind: str, words: str
) -> None:
    picture().save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "bomb.png").write_bytes(bomb(100_000, 100_000))
    (folder / "text.png").write_text("no picture")
    whole = next(folder.glob("*/00.png")).read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    given = rows(folder)
    rewrite(folder, [*given[:3], change(given[3]), *given[4:]])
    report = check_isekai(folder)
    assert [problem.kind for problem in report.problems] == [kind]
    assert report.problems[0].where == "ISEKAI-10.json line 4"
    assert words in report.problems[0].what
    with pytest.raises(ImageError, match="line 4"):
        load_isekai(folder)
    kept = load_isekai(folder, strict=False)
    assert [task.id for task in kept["ISEKAI-10"]] == [f"ISEKAI-10/{k}" for k in (1, 2, 3, *range(5, len(given) + 1))]


def test_folders_without_lists_are_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place, match in ((tmp_path / "nobody", "no such folder"), (tmp_path / "empty", "no list such as"), (tmp_path, "no list such as")):
        with pytest.raises(ImageError, match=match):
            load_isekai(place)
    with pytest.raises(ImageError, match="there is no such list"):
        load_isekai(folder, lists=["ISEKAI-20"])
    with pytest.raises(OptionError, match="list must be one of"):
        load_isekai(folder)["ISEKAI-20"]
    assert load_isekai(folder, lists=["ISEKAI-10"]).report.lists.keys() == {"ISEKAI-10"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet='{}[]":,ab/.\\\n \ud7ff', max_size=60))
def test_no_text_at_all_makes_the_check_fail(folder: Path, text: str) -> None:
    (folder / "ISEKAI-10.json").write_text(text, encoding="utf-8")
    report = check_isekai(folder, lists=["ISEKAI-10"])
    assert report.lists["ISEKAI-10"] == ()
    assert str(report)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.sampled_from(["..", ".", "a", "", "/", "~", "b.png", "\\", "\0"]), max_size=5))
def test_no_name_leads_out_of_its_folder(tmp_path: Path, parts: list[str]) -> None:
    found = within(tmp_path, "/".join(parts))
    assert found is None or found.is_relative_to(tmp_path.resolve())


# ---- questions ---------------------------------------------------------------------------------------------------------------------------------------


def test_more_shots_keep_the_fewer_ones_and_none_is_zero_shot(made: Path) -> None:
    task = load_isekai(made)["ISEKAI-10"][0]
    shown = [{shot.images[0].tobytes() for shot in task.episode(shots).shots} for shots in range(5)]
    assert [len(some) for some in shown] == [0, 2, 4, 6, 8]
    assert all(few < more for few, more in pairwise(shown))
    assert all(shot.images[0].tobytes() not in shown[4] for shot in [task.episode(4).query])
    assert [shot.label for shot in task.episode(4, seed=1).shots] == [shot.label for shot in task.episode(4, seed=1).shots]
    assert len({tuple(shot.label for shot in task.episode(4, seed=seed).shots) for seed in range(8)}) > 1
    with pytest.raises(OptionError, match=r"shots must be in 0\.\.4"):
        task.episode(5)
    assert task.episode(1, size=8).query.images[0].size == (8, 8)


def test_class_folders_are_asked_as_the_published_protocol_says() -> None:
    pool = generated_pool(1, 2, 9, 16)
    assert consecutive(pool) == [(pool.keys[a], pool.keys[b]) for a, b in ((0, 1), (1, 0), (2, 3), (3, 2))]
    tasks = paired_tasks(pool, consecutive(pool), context=6, both=False, fixed=True, seed=2)
    assert len(tasks) == 4 * 3  # every picture that is not an example is asked once
    assert {task.asked for task in tasks} == {0}
    lists: dict[str, set[tuple[int, ...]]] = {}
    for task in tasks:
        assert id(task.query) not in {id(one) for side in task.examples for one in side}
        for key, side in zip(task.keys, task.examples, strict=True):
            lists.setdefault(key, set()).add(tuple(map(id, side)))
    assert all(len(some) == 1 for some in lists.values())  # the same examples throughout
    drawn = paired_tasks(pool, consecutive(pool), context=6, queries=2, seed=2)
    assert [task.asked for task in drawn] == [0, 1] * 8
    assert all(id(task.query) not in {id(one) for side in task.examples for one in side} for task in drawn)
    assert len({tuple(map(id, task.examples[0])) for task in drawn if task.keys[0] == pool.keys[0]}) > 1
    assert unreal_pairs(pool) == [(pool.keys[0], pool.keys[2]), (pool.keys[2], pool.keys[0])]


def test_questions_that_cannot_be_asked_are_refused() -> None:
    pool = generated_pool(1, 2, 4, 16)
    odd = pool.take(pool.keys[:3])
    for make, match in (
        (lambda: consecutive(odd), "even in number"),
        (lambda: unreal_pairs(pool.take(pool.keys[:2])), "two unreal classes"),
        (lambda: paired_tasks(pool, []), "pairs, context and queries"),
        (lambda: paired_tasks(pool, [pool.keys[:2]], context=4), "more than 4 pictures"),
        (lambda: paired_tasks(pool, [(pool.keys[0], "nobody")], context=2), "key must be of a class"),
        (lambda: paired_tasks(pool, [(pool.keys[0], pool.keys[0])], context=2), "different names"),
    ):
        with unchecked(), pytest.raises(OptionError, match=match):
            make()
    assert isinstance(paired_tasks(pool, [(pool.keys[0], pool.keys[3])], context=2)[0], LinkTask)


# ---- class folders -----------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for c in range(6):
        (root / f"n{c:04d}").mkdir(parents=True)
        for k in range(4):
            picture(12, 10, seed=10 * c + k).save(root / f"n{c:04d}" / f"{k}.{'JPEG' if k % 2 else 'png'}")
    return root


def test_classes_are_split_by_a_list_and_named_by_a_file(classes: Path, tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("n0004\n\nn0001 whatever\n")
    (tmp_path / "names.txt").write_text("n0000 tench\nn0001 2 kit_fox\nn0002\tgreat white shark\nn0003 3\n")
    found = load_class_folders(classes, held_out=tmp_path / "test.txt", names=tmp_path / "names.txt", size=6)
    assert found.held_out is not None
    assert found.train.keys == ("n0000", "n0002", "n0003", "n0005")
    assert found.held_out.keys == ("n0004", "n0001")  # in the list's order
    assert [one.name for one in found.train.classes] == ["tench", "great white shark", "3", "n0005"]
    assert found.held_out["n0001"].name == "kit fox"
    assert found.train.picture("n0000", 1).size == (6, 5)
    assert "6 classes (4 for training, 2 held out), 4 to 4 pictures each, 0 problems." in str(found.report)
    assert len(link_episodes(found.train, 2, shots=3)) == 2
    assert load_class_folders(classes).held_out is None
    assert len(load_class_folders(classes, most=3).train.classes[0].images) == 3
    assert load_class_folders(classes, held_out=["n0002", "n0003"], names={"n0000": "same", "n0001": "same"}).report.held_out == (
        "n0002",
        "n0003",
    )
    assert "names of more than one class: same" in str(check_class_folders(classes, names={"n0000": "same", "n0001": "same"}))


def test_broken_class_folders_are_reported_and_can_be_left_out(classes: Path, tmp_path: Path) -> None:
    (classes / "n0000" / "0.png").write_bytes(b"no picture")
    (classes / "n0001" / "notes.txt").write_text("")
    (classes / "n0002" / "5.png").symlink_to(tmp_path / "elsewhere.png")
    picture().save(tmp_path / "elsewhere.png")
    (classes / "n0003" / "6.png").write_bytes(bomb(50_000, 50_000))
    os.mkfifo(classes / "n0004" / "7.png")  # opening it would wait for ever
    (classes / "n0004" / "8.png").symlink_to("nothing.png")
    for file in list((classes / "n0005").iterdir())[1:]:
        file.unlink()
    report = check_class_folders(classes, held_out=["n0001", "n0005", "n0009"])
    assert {(problem.where, problem.kind) for problem in report.problems} == {
        ("n0000/0.png", "broken"), ("n0001/notes.txt", "stranger"), ("n0002/5.png", "escapes"), ("n0003/6.png", "broken"), ("n0004/7.png", "broken"),
        ("n0004/8.png", "broken"), ("n0005", "few"), ("n0005", "missing"), ("n0009", "missing"),
    }  # fmt: skip
    with pytest.raises(ImageError, match="broken: 4"):
        load_class_folders(classes)
    kept = load_class_folders(classes, strict=False)
    assert kept.train.keys == tuple(f"n{c:04d}" for c in range(5))
    assert [len(one.images) for one in kept.train.classes] == [3, 4, 4, 4, 4]
    with pytest.raises(ImageError, match="each side of the split"):
        load_class_folders(classes, held_out=["n0001", "n0009"], strict=False)


def test_class_folders_that_make_no_sense_are_refused(classes: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such folder"):
        load_class_folders(tmp_path / "nobody")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.txt").write_text("n0000\n")
    (tmp_path / "latin.txt").write_bytes(b"n0000 caf\xe9\n")
    for options, match in (
        ({"held_out": tmp_path / "nobody.txt"}, "held_out must be a readable text file"),
        ({"held_out": tmp_path / "empty.txt"}, "held_out must name classes"),
        ({"names": tmp_path / "bad.txt"}, "names must have lines"),
        ({"names": tmp_path / "latin.txt"}, "names must be a readable text file"),
        ({"least": 0}, "least must be"),
        ({"least": 3, "most": 2}, "least must be"),
    ):
        with pytest.raises(OptionError, match=match):
            load_class_folders(classes, **options)


def test_pictures_of_a_class_folder_are_what_the_files_hold(classes: Path) -> None:
    pool = load_class_folders(classes).train
    assert np.array_equal(np.asarray(pool.picture("n0003", 2)), np.asarray(picture(12, 10, seed=32)))
