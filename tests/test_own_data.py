"""Your own pictures with labels: every kind of table and a folder give the same episodes, and nothing unusable gets through unnamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import picture, pictures
from PIL import Image

import mechicl
from mechicl.data.own import check_own, check_table, draw, load_own, load_table
from mechicl.data.own_table import read_table
from mechicl.errors import ImageError, OptionError
from mechicl.models.vlm import HookedVLM

LABELS = ("cat", "dog", "cow")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/cat/0.png ..., four pictures of different sizes in each of three classes, and tables of them beside it."""
    root = tmp_path_factory.mktemp("own")
    rows = []
    for c, label in enumerate(LABELS):
        (root / "photos" / label).mkdir(parents=True)
        for k, image in enumerate(pictures(4, seed=c)):
            image.save(root / "photos" / label / f"{k}.png")
            rows.append((f"photos/{label}/{k}.png", label))
    table = pd.DataFrame(rows, columns=["file_name", "label"])
    table.to_csv(root / "t.csv", index=False)
    table.to_csv(root / "t.tsv", index=False, sep="\t")
    table.to_parquet(root / "t.parquet")
    table.to_json(root / "t.jsonl", orient="records", lines=True)
    table.to_json(root / "t.json", orient="records")
    packed = pd.DataFrame(
        {"image": [{"bytes": (root / f).read_bytes(), "path": f} for f, _ in rows], "label": [LABELS.index(name) for _, name in rows]}
    )
    packed.to_parquet(root / "packed.parquet")
    return root


def seen(pool: Any) -> list[tuple[list[str], str, list[bytes]]]:
    return [
        ([shot.label for shot in e.shots], e.answer, [shot.images[0].tobytes() for shot in (*e.shots, e.query)])
        for e in draw(pool, 3, classes=3, shots=2, seed=1)
    ]


def test_every_kind_of_table_and_the_folder_give_the_same_episodes(photos: Path) -> None:
    first = seen(load_own(photos / "t.csv"))
    for name in ("t.tsv", "t.parquet", "t.jsonl", "t.json"):
        assert seen(load_own(photos / name)) == first
    assert seen(load_own(photos / "packed.parquet", names=LABELS)) == first
    assert seen(load_own(photos / "photos")) == first
    frame = read_table(photos / "t.csv")
    assert seen(load_own(frame, images=photos)) == first
    frame["picture"] = [Image.open(photos / name) for name in frame.pop("file_name")]
    assert seen(load_table(frame)) == first


def test_five_lines_are_enough(photos: Path, organism: Callable[..., tuple[Any, Any]]) -> None:
    pool = load_own(photos / "photos", size=28)
    episodes = draw(pool, 4, classes=2, shots=2, seed=0)
    scores = mechicl.score_heads(HookedVLM(*organism("qwen2_5_vl"), check=False), episodes, scores=("induction",), progress=False)
    assert scores.n == 4


def test_no_picture_is_twice_in_an_episode_and_more_episodes_keep_the_first(photos: Path) -> None:
    pool = load_own(photos / "photos")
    many = draw(pool, 20, classes=2, shots=3, seed=4)
    for episode in many:
        shown = [shot.images[0].tobytes() for shot in (*episode.shots, episode.query)]
        assert len(set(shown)) == len(shown) == 7
        assert sorted(shot.label for shot in episode.shots) == sorted(3 * list(episode.candidates))
        assert all(shot.item == shot.label for shot in (*episode.shots, episode.query))
    assert [e.answer for e in draw(pool, 5, classes=2, shots=3, seed=4)] == [e.answer for e in many[:5]]
    assert {e.answer for e in many} == set(LABELS)


def test_made_up_names_are_new_in_every_episode_and_keep_the_class_as_item(photos: Path) -> None:
    episodes = draw(load_own(photos / "photos"), 8, classes=3, shots=1, names="words")
    assert all(not set(e.candidates) & set(LABELS) for e in episodes)
    assert len({e.candidates for e in episodes}) == 8
    for e in episodes:
        assert {shot.item for shot in e.shots} == set(LABELS)
        assert len({(shot.item, shot.label) for shot in (*e.shots, e.query)}) == 3


def test_a_class_with_too_few_pictures_is_not_drawn(photos: Path) -> None:
    table = read_table(photos / "t.csv").drop(index=[0, 1])
    pool = load_own(table, images=photos)
    assert all("cat" not in e.candidates for e in draw(pool, 10, classes=2, shots=2))
    with pytest.raises(OptionError, match=r"classes must be at most 2, those that have 3 pictures; got 3"):
        draw(pool, 1, classes=3, shots=2)


def kinds(table: Any, **options: Any) -> list[str]:
    return [problem.kind for problem in check_table(table, **options).problems]


def test_each_unusable_row_is_named(photos: Path, tmp_path: Path) -> None:
    picture(90, 60).save(tmp_path / "huge.png")
    picture(20, 20, seed=3).save(tmp_path / "a.png")
    picture(20, 20, seed=4).save(tmp_path / "b.png")
    picture(20, 20, seed=3).save(tmp_path / "copy.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "link.png").symlink_to(photos / "photos" / "cat" / "0.png")
    rows = [
        ("a.png", "x"), ("copy.png", "y"), ("b.png", None), ("../x.png", "x"), ("link.png", "x"), (str(photos / "photos/cat/0.png"), "x"),
        ("none.png", "x"), ("https://example.org/a.png", "x"), ("text.png", "x"), ("huge.png", "x"), (7, "x"), ("b.png", "  "),
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["image", "label"])
    report = check_table(frame, images=tmp_path, least=1, max_pixels=2000)
    assert [p.kind for p in report.problems] == ["repeat", "malformed", "escapes", "escapes", "escapes", "missing", "missing", "broken", "broken", "malformed", "malformed"]  # fmt: skip
    told = str(report)
    assert "table row 2: the picture of row 1, there as 'x' and here as 'y'" in told
    assert "nothing is fetched from addresses" in told
    assert list(report.classes) == ["x"]
    with pytest.raises(ImageError, match="two classes of 1 readable pictures at least"):
        load_own(frame, images=tmp_path, least=1, strict=False)


def test_strict_refuses_what_would_be_left_out(photos: Path) -> None:
    frame = read_table(photos / "t.csv")
    frame.loc[0, "file_name"] = "gone.png"
    with pytest.raises(ImageError, match=r"table row 1: picture gone.png is not there"):
        load_own(frame, images=photos)
    assert len(load_own(frame, images=photos, strict=False)) == 3
    assert kinds(frame.iloc[:6], images=photos, least=3) == ["missing", "few"]  # three cats are left, two dogs


def test_a_whole_path_counts_where_it_lies_in_the_folder(photos: Path) -> None:
    frame = read_table(photos / "t.csv")
    frame["file_name"] = [str((photos / name).resolve()) for name in frame["file_name"]]
    assert kinds(frame, images=photos) == []


def test_columns_are_found_or_asked_for(photos: Path) -> None:
    frame = read_table(photos / "t.csv").rename(columns={"file_name": "Image", "label": "kind"})
    with pytest.raises(OptionError, match=r"label must name the column of the labels; none of Image, kind"):
        check_table(frame, images=photos)
    assert check_table(frame, label="kind", images=photos).columns == ("Image", "kind")
    with pytest.raises(OptionError, match=r"image must be a column of the table; got 'x'. It has Image, kind"):
        check_table(frame, image="x", label="kind")


def test_labels_can_be_numbers_of_a_column_with_gaps_and_get_names(photos: Path) -> None:
    frame = read_table(photos / "t.csv")
    frame["label"] = np.array([0.0] * 4 + [1.0] * 4 + [np.nan] * 4)
    report = check_table(frame, images=photos)
    assert list(report.classes) == ["0", "1"]
    assert len(report.problems) == 4
    assert list(check_table(frame, images=photos, names={0: "cat", 1: "dog"}).classes) == ["cat", "dog"]
    assert kinds(frame[:8], images=photos, names=("cat",)) == ["malformed"] * 4


@pytest.mark.usefixtures("untyped")
def test_what_is_no_data_is_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"image": \n')
    (tmp_path / "t.xlsx").write_bytes(b"")
    for source, says in (("t.jsonl", "a table must be readable"), ("t.xlsx", "must be a file that ends in"), ("none.csv", "must be a file that ends in")):  # fmt: skip
        with pytest.raises(OptionError, match=says):
            load_own(tmp_path / source)
    with pytest.raises(OptionError, match="label must be left out for a folder"):
        check_own(photos / "photos", label="x")
    with pytest.raises(OptionError, match="must be a file or a DataFrame"):
        load_table(photos / "photos")
    with pytest.raises(OptionError, match="least must be at least 1"):
        load_own(photos / "t.csv", least=0)
    with pytest.raises(OptionError, match="names one of own, words"):
        draw(load_own(photos / "photos"), 1, names="theirs")  # type: ignore[arg-type]


def test_two_classes_of_one_name_never_meet() -> None:
    from mechicl.data.link_pool import LinkClass, Pool

    pool = Pool(tuple(LinkClass(name, tuple(pictures(3, seed=k)), key=f"{name}-{k}") for k, name in enumerate(("crane", "crane", "dog"))))
    episodes = draw(pool, 12, classes=2, shots=1)
    assert all(set(e.candidates) == {"crane", "dog"} for e in episodes)
    assert {shot.item for e in episodes for shot in e.shots} == {"crane-0", "crane-1", "dog-2"}
