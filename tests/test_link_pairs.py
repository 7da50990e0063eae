"""The released lists of classes, pictures and neighbours: read as they are, used for hard negatives, and refused where they are damaged."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st

from mechicl.data.link_context import link_episodes
from mechicl.data.link_pairs import _line, listed, load_link_pairs
from mechicl.data.neighbours import rank_chances
from mechicl.errors import ImageError, OptionError

NAMES = ("kit fox", "English setter", "crane", "crane", "red fox")


def write(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """Five classes of four pictures in the released format; class k's neighbours are k + 1, k + 2, ..."""
    root = folder / "CLS-LOC"
    lines = []
    for k, name in enumerate(NAMES):
        files = [f"train/n{k:08d}/n{k:08d}_{i}.png" for i in range(3)] + [f"val/ILSVRC2012_val_{k:08d}.png"]
        for i, file in enumerate(files):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            picture(32, 24, seed=10 * k + i).save(root / file)
        near = [[str(1 + (k + j) % 5), NAMES[(k + j) % 5], f"train/n{(k + j) % 5:08d}/n{(k + j) % 5:08d}_0.png"] for j in range(1, 5)]
        lines.append({"class_id": str(k + 1), "class_name": name, "samples": files, "neighbors": near})
    lines[1] |= changes
    path = folder / "test100_pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path, root


def test_a_list_is_read_with_its_pictures_and_its_order_of_neighbours(tmp_path: Path) -> None:
    found = load_link_pairs(*write(tmp_path), size=28)
    assert [one.name for one in found.pool.classes] == list(NAMES)
    assert found.pool.keys == ("1", "2", "3", "4", "5")
    assert found.problems == ()
    assert found.neighbours.n == 4
    assert found.neighbours.drawn(0, 7).tolist() == [1, 2, 3, 4]
    assert found.neighbours.interval(4, 1).tolist() == [0]
    few = found.neighbours.take(("1", "3", "5"))
    assert few.drawn(0, 0).tolist() == [1, 2]
    assert few.take(("1", "3", "5")) is few
    episode = link_episodes(found.pool, 1, shots=2, neighbours=found.neighbours)[0]
    assert len(episode.shots) == 4


def test_negatives_come_by_the_published_chances_and_never_with_the_same_name(tmp_path: Path) -> None:
    found = load_link_pairs(*write(tmp_path))
    episodes = link_episodes(found.pool, 1500, shots=1, neighbours=found.neighbours, seed=3)
    sides = [tuple(shot.item for shot in sorted(e.shots, key=lambda s: s.label != e.candidates[0])) for e in episodes]
    assert not {("3", "4"), ("4", "3")} & set(sides)  # both are called crane
    steps = Counter((int(b) - int(a)) % 5 for a, b in sides if a in "12" and b not in "34")
    share = steps[1] / max(1, steps[4])
    chances = rank_chances(4)
    assert chances[0] / chances[3] == 4
    assert share > 1.5  # class 1's first neighbour against class 2's last and the like: far from even


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"samples": ["../../secret.png"] * 2}, "escapes"),
        ({"samples": ["train/nowhere.png", "train/n00000001/n00000001_0.png", "train/n00000001/n00000001_1.png"]}, "missing"),
        ({"neighbors": [["77", "nobody", "train/x.png"]]}, "stranger"),
        ({"samples": ["train/n00000001/n00000001_0.png"]}, "few"),
        ({"class_id": 2}, "malformed"),
        ({"class_id": "1"}, "malformed"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, changes: dict[str, Any], kind: str) -> None:
    path, root = write(tmp_path, **changes)
    with pytest.raises(ImageError, match="strict=False"):
        load_link_pairs(path, root)
    if kind == "stranger":
        with pytest.raises(OptionError, match="must have a neighbour"):
            load_link_pairs(path, root, strict=False)
        return
    found = load_link_pairs(path, root, strict=False)
    assert kind in {problem.kind for problem in found.problems}
    assert len(found.pool) >= 4


def test_a_broken_picture_is_found_only_where_pictures_are_looked_at(tmp_path: Path) -> None:
    path, root = write(tmp_path)
    (root / "train/n00000000/n00000000_0.png").write_bytes(b"no picture")
    assert [p.kind for p in load_link_pairs(path, root, strict=False).problems] == ["broken"]
    assert load_link_pairs(path, root, check=False).problems == ()


@pytest.mark.usefixtures("untyped")
def test_lists_and_roots_that_are_not_there_are_refused(tmp_path: Path) -> None:
    path, root = write(tmp_path)
    with pytest.raises(OptionError, match="root must be"):
        load_link_pairs(path, tmp_path / "nowhere")
    with pytest.raises(OptionError, match="path must be"):
        load_link_pairs(tmp_path / "nothing.jsonl", root)
    made = listed(("a", "b"), {"a": ["b"], "b": ["a", "b"]}, "here")
    with pytest.raises(OptionError, match="classes of the list"):
        made.take(["a", "c"])
    with pytest.raises(OptionError, match=r"1\.\.1"):
        made.interval(0, 2)


@given(
    st.recursive(
        st.none() | st.text(max_size=3) | st.integers(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["class_id", "class_name", "samples", "neighbors"]), inner, max_size=4)
        ),
    )
)
@settings(max_examples=60)
def test_any_line_is_read_or_named(value: Any) -> None:
    assert isinstance(_line(json.dumps(value)), str | dict)
