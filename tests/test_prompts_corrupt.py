"""Minimal pairs: what changes, what stays, and that every token stays in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import unchecked
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mechicl.data import concepts
from mechicl.errors import EpisodeError, OptionError
from mechicl.prompts.corrupt import label_lengths, minimal_pairs, permute_labels, swap_images, swap_labels
from mechicl.prompts.episode import Episode, Shot
from mechicl.prompts.render import Renderer

Organism = Callable[..., tuple[Any, Any]]


def words(labels: str, answer: str) -> Episode:
    shots = tuple(Shot(label, text=f"item {label}", item=f"item {label}") for label in labels)
    return Episode(shots, Shot(answer, text=f"item {answer}", item=f"item {answer}"), tuple(dict.fromkeys(labels)))


CASES = st.tuples(st.permutations("aabbcc"), st.sampled_from("abc"), st.integers(0, 99))
"""Order of the exemplars' labels, answer, seed."""
Case = tuple[list[str], str, int]


@given(CASES)
def test_swapped_labels_exchange_two_classes_and_the_answer(case: Case) -> None:
    clean, seed = words("".join(case[0]), case[1]), case[2]
    corrupt = swap_labels(clean, seed=seed)
    other = corrupt.answer
    exchange = {clean.answer: other, other: clean.answer}
    assert other != clean.answer
    assert [s.label for s in corrupt.shots] == [exchange.get(s.label, s.label) for s in clean.shots]
    assert [s.item for s in corrupt.shots] == [s.item for s in clean.shots]
    assert corrupt.query.item == clean.query.item
    shown = {s.item: s.label for s in corrupt.shots}
    assert shown[corrupt.query.item] == corrupt.answer  # the prompt still teaches its answer
    assert swap_labels(clean, seed=seed).answer == other


@given(CASES)
def test_permuted_labels_are_the_same_labels_in_another_order(case: Case) -> None:
    clean, seed = words("".join(case[0]), case[1]), case[2]
    corrupt = permute_labels(clean, seed=seed)
    before, after = [s.label for s in clean.shots], [s.label for s in corrupt.shots]
    assert sorted(before) == sorted(after)
    assert before != after
    assert [s.item for s in corrupt.shots] == [s.item for s in clean.shots]
    assert corrupt.answer == clean.answer


@given(CASES)
def test_swapped_exemplar_items_keep_every_label_in_its_place(case: Case) -> None:
    clean, seed = words("".join(case[0]), case[1]), case[2]
    corrupt = swap_images(clean, which="exemplars", seed=seed)
    assert [s.label for s in corrupt.shots] == [s.label for s in clean.shots]
    assert sorted(s.item for s in corrupt.shots) == sorted(s.item for s in clean.shots)
    shown = {s.item: s.label for s in corrupt.shots}
    assert shown[corrupt.query.item] == corrupt.answer != clean.answer


@given(CASES)
def test_a_swapped_query_shows_another_class_and_asks_for_it(case: Case) -> None:
    clean, seed = words("".join(case[0]), case[1]), case[2]
    corrupt = swap_images(clean, seed=seed)
    assert corrupt.shots == clean.shots
    assert corrupt.query.item == f"item {corrupt.answer}" != clean.query.item


@pytest.mark.parametrize("how", ["swap_labels", "permute_labels", "swap_query", "swap_exemplars"])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava_next", "smolvlm"])
def test_rendered_pairs_have_every_token_in_its_place(kind: str, how: Any, organism: Organism) -> None:
    model, processor = organism(kind)
    episodes = concepts.draw(6, size=28, seed=3)  # labels of one to four tokens
    pairs = minimal_pairs(Renderer(processor, model.config), episodes, how, seed=1)
    assert pairs.n + len(pairs.skipped) == 6
    assert pairs.n == pairs.corrupt.n > 0
    assert all("as many tokens" in s.reason for s in pairs.skipped)
    assert pairs.clean.n_pos == pairs.corrupt.n_pos
    for a, b in zip(pairs.clean.spans, pairs.corrupt.spans, strict=True):
        assert [(s.role, s.start, s.stop) for s in a] == [(s.role, s.start, s.stop) for s in b]
    ids, others = pairs.clean.inputs["input_ids"], pairs.corrupt.inputs["input_ids"]
    differ = ids != others
    assert not (differ & ~pairs.clean.mask("label")).any()  # text differs in labels only
    same_pixels = torch.equal(pairs.clean.inputs["pixel_values"], pairs.corrupt.inputs["pixel_values"])
    assert same_pixels == ("labels" in how)
    assert bool(differ.any()) == ("labels" in how)


def test_labels_change_places_only_with_labels_as_long() -> None:
    clean = words("aabbcc", "a")
    assert {swap_labels(clean, seed=k, lengths={"a": 2, "b": 1, "c": 2}).answer for k in range(9)} == {"c"}
    after = [s.label for s in permute_labels(clean, seed=0, lengths={"a": 2, "b": 1, "c": 2}).shots]
    assert after[2:4] == ["b", "b"]
    with pytest.raises(EpisodeError, match=r"as many tokens; got 'a' 3, 'b' 1, 'c' 2"):
        swap_labels(clean, lengths={"a": 3, "b": 1, "c": 2})
    with pytest.raises(EpisodeError, match="as many tokens"):
        permute_labels(clean, lengths={"a": 3, "b": 1, "c": 2})
    with pytest.raises(OptionError, match="'c' is missing"):
        permute_labels(clean, lengths={"a": 3, "b": 1})


def test_what_has_no_pair_is_refused_or_named(organism: Organism) -> None:
    one = Episode((Shot("a", text="x"),), Shot("a", text="y"), ("a", "b"))
    for function in (swap_labels, permute_labels, swap_images):
        with pytest.raises(EpisodeError, match="must show two labels"):
            function(one)
    with pytest.raises(EpisodeError, match="as many exemplars"):
        swap_images(words("aab", "a"), which="exemplars")
    with pytest.raises(OptionError, match="which must be"), unchecked():
        swap_images(words("ab", "a"), which="all")  # pyright: ignore[reportArgumentType]
    model, processor = organism("qwen2_5_vl")
    renderer = Renderer(processor, model.config)
    with pytest.raises(OptionError, match="how must be one of"), unchecked():
        minimal_pairs(renderer, [words("ab", "a")], "smear")  # pyright: ignore[reportArgumentType]
    with pytest.raises(EpisodeError, match="none of 1 does"):
        minimal_pairs(renderer, [one], "swap_labels")
    small, large = Image.new("RGB", (28, 28)), Image.new("RGB", (112, 56))
    uneven = Episode((Shot("ba", (small,)), Shot("zu", (large,))), Shot("ba", (small,)), ("ba", "zu"), id="uneven")
    even = Episode((Shot("ba", (small,)), Shot("zu", (small,))), Shot("ba", (small,)), ("ba", "zu"), id="even")
    pairs = minimal_pairs(renderer, [uneven, even], "swap_query")
    assert [(s.episode, "pictures of one size" in s.reason) for s in pairs.skipped] == [("uneven", True)]
    assert pairs.clean.ids == ("even",)
    assert label_lengths(pairs.clean, 0) == {"ba": 1, "zu": 1}
