"""Concepts, digits, words and the episodes made of them."""

from __future__ import annotations

import time

import numpy as np
import pytest
from conftest import unchecked
from PIL import Image

from mechicl.data import concepts, digits, looks
from mechicl.data.words import SYLLABLES, pseudo_words
from mechicl.errors import OptionError
from mechicl.prompts.episode import Episode, check_episodes


def pixels(episode: Episode) -> np.ndarray:
    return np.stack([np.asarray(image) for image in episode.images])


def nearest_is_right(draw: np.random.Generator, ids: np.ndarray, classes: int, size: int = 28, tries: int = 60) -> float:
    """How often the nearest of `classes` pictures (one each), blurred, is of the query's class: knows nothing of concepts."""
    right = 0
    for _ in range(tries):
        few = draw.choice(ids, classes, replace=False)
        shown = concepts.draw_pictures(np.append(few, few[0]), size, draw).astype(np.float32)
        small = shown.reshape(len(shown), 14, 2, 14, 2, 3).mean((2, 4)).reshape(len(shown), -1)
        right += int(np.argmin(((small[:-1] - small[-1]) ** 2).sum(1)) == 0)
    return right / tries


def test_training_and_held_out_share_no_signature() -> None:
    train, held = concepts.class_ids("train"), concepts.class_ids("held_out")
    rows = looks.signatures()
    assert len(train) > 10_000
    assert len(held) > 2_500
    assert len(train) + len(held) == len(concepts.class_ids("all")) == concepts.N_CLASSES
    assert not {tuple(r) for r in rows[train]} & {tuple(r) for r in rows[held]}
    assert len(np.unique(rows, axis=0)) == concepts.N_CLASSES  # so no two classes are the same concept
    for kind in concepts.KINDS:
        assert 0.1 < len(concepts.class_ids("held_out", kinds=[kind])) / concepts.COUNTS[kind] < 0.3


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    ids = concepts.class_ids("held_out")[:20]
    a, b, c = (concepts.draw_pictures(ids, 28, seed) for seed in (1, 1, 2))
    assert a.dtype == np.uint8
    assert a.shape == (20, 28, 28, 3)
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    few, many = concepts.draw(2, size=28, seed=4), concepts.draw(3, size=28, seed=4)
    assert all(np.array_equal(pixels(x), pixels(y)) for x, y in zip(few, many, strict=False))
    assert [e.candidates for e in few] == [e.candidates for e in many[:2]]


def test_pictures_of_a_class_vary_and_classes_differ() -> None:
    draw = np.random.default_rng(0)
    for kind in concepts.KINDS:
        ids = concepts.class_ids("train", kinds=[kind])
        one = concepts.draw_pictures(np.repeat(ids[:1], 8), 28, draw).astype(float)
        assert all(np.abs(one[0] - other).mean() > 3 for other in one[1:]), kind
        assert nearest_is_right(draw, ids, 2) > 0.65, kind  # chance 0.5; a pixel distance is a poor reader, concepts move and turn
    assert nearest_is_right(draw, concepts.class_ids("train"), 4) > 0.5  # chance 0.25
    same = np.repeat(concepts.class_ids("train")[:1], 4)
    assert nearest_is_right(draw, np.arange(4) * 0 + same, 4) < 0.5  # one class under four names cannot be told apart


def test_no_picture_is_empty_at_any_size() -> None:
    ids = np.random.default_rng(1).choice(concepts.class_ids("all"), 300, replace=False)
    for size, few in ((28, 300), (100, 40), (224, 12)):
        shown = concepts.draw_pictures(ids[:few], size, 0).astype(float)
        assert shown.shape == (few, size, size, 3)
        small = shown[:, : size // 14 * 14, : size // 14 * 14].reshape(few, 14, size // 14, 14, size // 14, 3).mean((2, 4))
        assert small.std((1, 2)).max(1).min() > 5


def test_pictures_are_drawn_fast_enough_for_training() -> None:
    ids = np.random.default_rng(0).choice(concepts.class_ids("train"), 300)
    concepts.draw_pictures(ids, 28, 0)
    start = time.perf_counter()
    concepts.draw_pictures(np.tile(ids, 3), 28, 1)
    assert 900 / (time.perf_counter() - start) > 1000  # 8,000 on an idle core; the bound leaves room for a busy machine


def test_an_episode_shows_every_class_as_often_and_asks_for_one_of_them() -> None:
    for e in [*concepts.draw(8, classes=3, shots=2, size=28, seed=1), *digits.draw(8, classes=3, shots=2, size=28, seed=1)]:
        items = {s.label: s.item for s in e.shots}
        assert sorted(s.label for s in e.shots) == sorted(e.candidates * 2)
        assert len(set(items.values())) == 3
        assert all(items[s.label] == s.item for s in e.shots)
        assert items[e.answer] == e.query.item
        assert not any(np.array_equal(x, pixels(e)[-1]) for x in pixels(e)[:-1])  # the query is a fresh picture
        check_episodes([e])
    answers = [e.candidates.index(e.answer) for e in concepts.draw(60, size=8, seed=2)]
    assert len(set(answers)) == 4  # no place among the candidates gives the answer away
    assert len({tuple(e.candidates) for e in concepts.draw(20, size=8, seed=2)}) == 20  # names are new in every episode


def test_options_of_draw_are_heard() -> None:
    held = set(concepts.class_ids("held_out").tolist())
    for e in concepts.draw(6, size=8, seed=0, kinds=["pair", "texture"], alike=True, instruction="Say it.", question=""):
        kinds = {s.item.split("-")[0] for s in e.shots}
        assert len(kinds) == 1
        assert kinds <= {"pair", "texture"}
        assert {int(s.item.split("-")[1]) for s in e.shots} <= held
        assert (e.instruction, e.question) == ("Say it.", "")
    e = concepts.draw(1, classes=2, size=8, labels=["cat", "dog"])[0]
    assert set(e.candidates) == {"cat", "dog"}
    assert all(len(x) == 4 for x in concepts.draw(1, size=8, syllables=(2, 2))[0].candidates)


def test_a_picture_for_people_is_the_same_concept() -> None:
    image = concepts.picture(17, 224, seed=3)
    assert isinstance(image, Image.Image)
    assert image.size == (224, 224)
    assert np.array_equal(np.asarray(image), concepts.draw_pictures([17], 224, 3)[0])


def test_digits_are_the_scans_themselves_enlarged() -> None:
    images, shown = digits.scans()
    assert images.shape == (1797, 8, 8)
    assert sorted(np.unique(shown)) == list(range(10))
    one = digits.draw_pictures([3, 3, 7], 80, np.random.default_rng(0))
    inner = one[:, 8:72, 8:72, 0].reshape(3, 8, 8, 8, 8).mean((2, 4))
    for picture, digit in zip(inner, (3, 3, 7), strict=True):
        found = int(np.argmin(np.abs(images.astype(float) - picture).mean((1, 2))))
        assert shown[found] == digit
        assert np.abs(images[found] - picture).mean() < 20  # of 255 levels: enlarging smoothly costs about 14
    assert not np.array_equal(one[0], one[1])
    dark, light = (digits.draw_pictures([1], 32, np.random.default_rng(0), style=s) for s in ("white_on_black", "black_on_white"))
    assert np.abs(dark.astype(int) + light - 255).max() <= 1
    assert digits.draw_pictures([1], 32, np.random.default_rng(0), style="colour").std((0, 1, 2)).min() > 0


def test_words_are_new_pronounceable_and_tell_themselves_apart_at_the_start() -> None:
    words = pseudo_words(60, 0)
    assert len(set(words)) == 60
    assert len({w[:2] for w in words}) == 60
    assert all(len(w) % 2 == 0 and w[k : k + 2] in SYLLABLES for w in words for k in range(0, len(w), 2))
    assert {len(w) // 2 for w in words} == {1, 2, 3, 4}
    assert words == pseudo_words(60, 0) != pseudo_words(60, 1)
    assert set(pseudo_words(50, 0, avoid=words)).isdisjoint(words)
    assert len(set(pseudo_words(500, 0, distinct_start=False))) == 500


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: concepts.draw(1, classes=1), "classes at least 2"),
        (lambda: concepts.draw(1, shots=0), "shots must be at least 1"),
        (lambda: concepts.draw(1, classes=3, labels=["a", "b"]), "labels must be 3 different words"),
        (lambda: concepts.draw(1, classes=999, kinds=["texture"]), "classes must be at most"),
        (lambda: concepts.class_ids("test"), "split must be"),  # pyright: ignore[reportArgumentType]
        (lambda: concepts.class_ids(kinds=["pens"]), "kinds must be some of"),
        (lambda: concepts.draw_pictures([concepts.N_CLASSES], 28, 0), "class_ids must be in"),
        (lambda: concepts.draw_pictures([0], 4, 0), "size must be at least 8"),
        (lambda: digits.draw(1, classes=11), "classes must be at most 10"),
        (lambda: digits.draw_pictures([10], 28, np.random.default_rng(0)), "digits must be in 0..9"),
        (lambda: digits.draw_pictures([1], 28, np.random.default_rng(0), style="red"), "style must be one of"),  # pyright: ignore[reportArgumentType]
        (lambda: pseudo_words(71, 0), "n must be between 0 and 70"),
        (lambda: pseudo_words(5, 0, syllables=(2, 1)), "fewest <= most"),
        (lambda: pseudo_words(70, 0, syllables=(1, 1)), "must leave words"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call: object, match: str) -> None:
    assert callable(call)
    with pytest.raises(OptionError, match=match), unchecked():
        call()
