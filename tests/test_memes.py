"""Memes on disk and made up: nothing unusable gets through, and neither text nor picture alone tells a label."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture, unchecked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression

from mechicl.data.memes import Memes, check_memes, load_memes
from mechicl.data.memes_check import inside, open_picture
from mechicl.data.memes_made import COLOURS, SHAPES, MadeSet, draw_memes, shapes, write_memes
from mechicl.errors import ImageError, OptionError, OutputPathError

SIZES = {"train": 400, "dev": 200}


@pytest.fixture(scope="module")
def made() -> MadeSet:
    return draw_memes(SIZES, size=28, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_memes(tmp_path_factory.mktemp("made") / "memes", {"train": 16, "dev": 8, "test": 8}, size=32, seed=5, hide=("test",))


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return found.hexdigest()


# ---- the made-up set -------------------------------------------------------------------------------------------------------------------------------


def test_items_come_in_fours_of_two_texts_and_two_pictures_and_every_flip_is_there(made: MadeSet) -> None:
    assert len(made.items) == 600
    for four in range(150):
        rows = [(item, image) for item, image in zip(made.items, made.pictures, strict=True) if item.four == four]
        assert len(rows) == 4
        assert len({item.split for item, _ in rows}) == 1  # no four is torn between two lists
        cells = {(item.text, image.tobytes()): item.label for item, image in rows}
        texts, pictures = {text for text, _ in cells}, {pixels for _, pixels in cells}
        assert (len(cells), len(texts), len(pictures)) == (4, 2, 2)
        for (text, pixels), label in cells.items():
            (other_text,), (other_pixels,) = texts - {text}, pictures - {pixels}
            assert cells[other_text, pixels] == cells[text, other_pixels] == 1 - label
        assert all(item.label == (item.shows == item.names) and item.names in item.text for item, _ in rows)


def features(made: MadeSet, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is said (one column per word), what is seen (a small picture and its colours), and the labels."""
    rows = [(item, image) for item, image in zip(made.items, made.pictures, strict=True) if item.split == split]
    words = sorted({word for item in made.items for word in item.text.split()})
    said = np.array([[word in item.text.split() for word in words] for item, _ in rows], dtype=float)
    seen = np.stack([np.asarray(image.resize((7, 7)), dtype=float).reshape(-1) / 255 - 0.5 for _, image in rows])
    return said, seen, np.array([item.label for item, _ in rows])


def accuracy(made: MadeSet, build: Any, c: float = 1.0) -> tuple[float, float]:
    """Held-out accuracy of a classifier and the p of a binomial test against one half."""
    said, seen, labels = features(made, "train")
    fit = LogisticRegression(C=c, max_iter=2000).fit(build(said, seen), labels)
    said, seen, labels = features(made, "dev")
    right = fit.predict(build(said, seen)) == labels
    return float(right.mean()), float(binomtest(int(right.sum()), len(right), 0.5).pvalue)


def test_whoever_looks_at_one_of_the_two_only_is_at_chance_and_whoever_looks_at_both_is_not(made: MadeSet) -> None:
    text_only, p_text = accuracy(made, lambda said, seen: said)
    image_only, p_image = accuracy(made, lambda said, seen: seen)
    _, p_side = accuracy(made, lambda said, seen: np.hstack([said, seen]), c=0.01)
    jointly, p_joint = accuracy(made, lambda said, seen: (said[:, :, None] * seen[:, None, :]).reshape(len(said), -1))
    assert text_only == image_only == 0.5  # exactly: each text and each picture occurs once with either label
    assert min(p_text, p_image) > 0.05
    assert p_side > 0.01  # a sum of what is said and what is seen does not tell: the two must meet
    assert jointly > 0.7
    assert p_joint < 1e-6


@pytest.mark.parametrize("by", ["text", "picture"])
def test_any_function_of_text_or_of_picture_is_right_half_of_the_time(made: MadeSet, by: str) -> None:
    for salt in range(5):
        for split in SIZES:
            right = [
                (hashlib.sha256(bytes([salt]) + (item.text.encode() if by == "text" else image.tobytes())).digest()[0] & 1) == item.label
                for item, image in zip(made.items, made.pictures, strict=True)
                if item.split == split
            ]
            assert np.mean(right) == 0.5


def test_every_colour_and_shape_with_a_name_has_its_class() -> None:
    assert len(shapes()) == len(COLOURS) * len(SHAPES) == len(set(shapes().values()))


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    a, b, c = (write_memes(tmp_path / name, {"train": 8}, size=16, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert digest(a) == digest(b) != digest(c)
    words = write_memes(tmp_path / "d", {"train": 8}, size=16, words="made-up", n_things=5)
    about = json.loads((words / "made.json").read_text())
    assert about["options"]["words"] == "made-up"
    assert all(item["names"] in item["text"] for item in about["items"])


@pytest.mark.parametrize(
    "change",
    [{"sizes": {"train": 6}}, {"sizes": {}}, {"sizes": {"nonsense": 4}}, {"sizes": {"train/../x": 4}}, {"size": 4}, {"words": "rude"},
     {"n_things": 1}, {"n_things": 10_000}, {"hide": ("dev",)}],
)  # fmt: skip
def test_writing_refuses_what_it_cannot_do(tmp_path: Path, change: dict[str, Any]) -> None:
    with unchecked(), pytest.raises(OptionError):
        write_memes(tmp_path / "x", **{"sizes": {"train": 4}, "size": 16, **change})
    assert list(tmp_path.iterdir()) == []


def test_writing_never_touches_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(OutputPathError, match="new or empty"):
        write_memes(tmp_path, {"train": 4}, size=16)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputPathError):
        write_memes(tmp_path / "file" / "deeper", {"train": 4}, size=16)


# ---- the loader --------------------------------------------------------------------------------------------------------------------------------------


def test_what_was_written_is_what_is_read(folder: Path) -> None:
    memes = load_memes(folder)
    drawn = draw_memes({"train": 16, "dev": 8, "test": 8}, size=32, seed=5)
    assert list(memes.report.splits) == ["dev", "test", "train"]
    for split in ("train", "dev"):
        for read, written in zip(memes.shots(split), drawn.shots(split), strict=True):
            assert (read.text, read.label, read.item) == (written.text, written.label, written.item)
            assert read.images[0].tobytes() == written.images[0].tobytes()
    assert memes.report.problems == ()
    assert memes.report.overlaps == {}
    assert memes.report.confounders[0] >= 12  # two a four, and fours that happen to say the same
    assert memes.report.confounders[1] == 12
    assert "train: 16 lines, 8 positive, 8 negative" in str(memes.report)
    assert "8 without a label" in str(memes.report)


def test_options_of_the_items(folder: Path) -> None:
    memes = load_memes(folder, splits=["train"])
    few = memes.shots("train", 5, labels=("no", "yes"), size=16, seed=1)
    assert {shot.label for shot in few} <= {"no", "yes"}
    assert max(few[0].images[0].size) == 16
    assert [s.item for s in few] == [s.item for s in memes.shots("train", 5, seed=1)] != [s.item for s in memes.shots("train", 5)]
    with pytest.raises(OptionError, match="train"):
        memes["dev"]
    for bad in ({"n": 0}, {"size": 2}, {"labels": ("a", "a")}):
        with pytest.raises(OptionError):
            memes.shots("train", **bad)
    with pytest.raises(ImageError, match="labels to be marked"):
        load_memes(folder).shots("test")


def bomb() -> bytes:
    """A PNG of some dozens of bytes that says it has 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder with one of everything that can be wrong."""
    root = tmp_path / "memes"
    (root / "img").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"outside")
    picture(seed=1).save(root / "img" / "good.png")
    picture(seed=2).save(root / "img" / "other.png")
    (root / "img" / "cut.png").write_bytes((root / "img" / "good.png").read_bytes()[:200])
    (root / "img" / "text.png").write_text("not a picture")
    (root / "img" / "bomb.png").write_bytes(bomb())
    (root / "img" / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "img" / "ring.png").symlink_to(root / "img" / "ring.png")

    def row(number: Any, img: Any, label: Any = 0, text: Any = "words") -> str:
        return json.dumps({"id": number, "img": img, "label": label, "text": text})

    lines = [
        row(1, "img/good.png"), row(1, "img/other.png"), row(2, "img/good.png", 1), row(3, "img/other.png", 1),
        row(4, "img/nowhere.png"), row(5, "img/cut.png"), row(6, "img/text.png"), row(7, "img/bomb.png"),
        row(8, "../secret.png"), row(9, str(tmp_path / "secret.png")), row(10, "img/link.png"), row(11, "img/../../secret.png"),
        row(12, "img\\good.png"), row(13, "img/ring.png"), "{", "[]", row(True, "img/good.png"), row(14, ""), row(15, "img/good.png", 2),
        row(16, "img/good.png", 0, " "), row(19, "img/\ud800.png"), row(17, "img"), "", row("00018", "img/other.png", None, "no label"),
    ]  # fmt: skip
    (root / "train.jsonl").write_text("\n".join(lines) + "\n")
    (root / "dev.jsonl").write_text(row(3, "img/other.png", 1) + "\n")
    return root


def test_everything_that_is_wrong_is_named_before_any_work_and_left_out_on_demand(broken: Path) -> None:
    report = check_memes(broken)
    kinds = {kind: sum(p.kind == kind for p in report.problems) for kind in ("malformed", "escapes", "missing", "broken", "duplicate")}
    ring = kinds["escapes"] - 5  # a ring of links leads nowhere or out, as Python's version sees it
    assert kinds == {"malformed": 7, "escapes": 5 + ring, "missing": 3 - ring, "broken": 3, "duplicate": 2}
    assert [meme.id for meme in report.splits["train"]] == ["1", "3", "00018"]
    assert report.overlaps == {"dev and train": 1}
    said = [str(problem) for problem in report.problems]
    assert "train.jsonl line 2: id 1 was met in train.jsonl line 1" in said
    assert "train.jsonl line 3: item 2 has the text and picture of 1, with another label" in said
    assert any("at most 40000000 pixels" in one for one in said)
    with pytest.raises(ImageError, match=r"line 2(.|\n)*strict=False"):
        load_memes(broken)
    memes = load_memes(broken, strict=False)
    assert isinstance(memes, Memes)
    assert len(memes.report.problems) == 20
    assert "and 12 more" in str(memes.report)


def test_a_folder_without_anything_is_refused(tmp_path: Path, broken: Path) -> None:
    for folder, splits in ((tmp_path / "nowhere", None), (tmp_path, None), (broken, ["test"])):
        with pytest.raises(ImageError, match=r"there is no such|no train\.jsonl"):
            load_memes(folder, splits=splits, strict=False)


def test_a_path_stays_in_the_folder_but_the_folder_of_pictures_may_be_a_link(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "train.jsonl").write_text((folder / "train.jsonl").read_text())
    (tmp_path / "img").symlink_to(folder / "img")
    assert len(load_memes(tmp_path)["train"]) == 16
    assert inside(tmp_path, "img/../../x.png") is None
    assert inside(tmp_path, "a\0b") is None


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb())
    with pytest.raises(ImageError, match="at most"):
        open_picture(path)
    picture(64, 64).save(tmp_path / "small.png")
    with pytest.raises(ImageError, match="64 x 64"):
        open_picture(tmp_path / "small.png", max_pixels=1000)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
ROWS = st.fixed_dictionaries({}, optional=dict.fromkeys(("id", "img", "label", "text"), JSON))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(JSON | ROWS, max_size=5), st.binary(max_size=40))
def test_whatever_a_list_holds_the_report_says_it_and_nothing_is_raised(tmp_path: Path, rows: list[Any], rubbish: bytes) -> None:
    text = "\n".join(json.dumps(row) for row in rows).encode()
    (tmp_path / "train.jsonl").write_bytes(text + b"\n" + rubbish)
    report = check_memes(tmp_path)
    assert report.splits["train"] == ()  # there is no img/ at all
    assert str(report)
