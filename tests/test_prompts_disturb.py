"""Minimal pairs by wrong-class exemplars, other forms, blur and noise; groups of tokens and their alignment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechicl.analysis.patching.patch import patch
from mechicl.data import concepts
from mechicl.data.gaussian import MultimodalTask, UnimodalTask, draw
from mechicl.errors import EpisodeError, OptionError
from mechicl.models.planted import planted_vectors
from mechicl.models.toys.prompts import ToyRenderer, toy_batch, toy_episodes
from mechicl.prompts.align import align, fit, span_groups
from mechicl.prompts.corrupt import minimal_pairs
from mechicl.prompts.disturb import disturb_images, reformats, vector_pairs, wrong_exemplar
from mechicl.prompts.render import Renderer

Organism = Callable[..., tuple[Any, Any]]


def test_a_wrong_exemplar_keeps_labels_query_and_answer() -> None:
    episodes = toy_episodes(6, classes=3, shots=2)
    for k, clean in enumerate(episodes):
        corrupt = wrong_exemplar(clean, seed=k, donors=episodes)
        assert [s.label for s in corrupt.shots] == [s.label for s in clean.shots]
        assert corrupt.query is clean.query
        for before, after in zip(clean.shots, corrupt.shots, strict=True):
            if before.label == clean.answer:
                assert after.item not in {s.item for s in clean.shots}  # a class that the prompt does not show
            else:
                assert after is before
        one = wrong_exemplar(clean, seed=k, which="one")
        changed = [i for i, (a, b) in enumerate(zip(clean.shots, one.shots, strict=True)) if a.item != b.item]
        assert len(changed) == 1
        assert one.shots[changed[0]].item in {s.item for s in clean.shots}  # no donors: another class of the episode


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "smolvlm"])
def test_rendered_pairs_have_every_token_in_its_place(kind: str, organism: Organism) -> None:
    model, processor = organism(kind)
    renderer = Renderer(processor, model.config)
    episodes = concepts.draw(3, classes=2, shots=1, size=28, seed=3)
    for how in ("wrong_exemplar", "reformat", "blur", "noise"):
        pairs = minimal_pairs(renderer, episodes, how)
        assert pairs.n == 3
        assert pairs.how == how
        assert [[(s.role, s.start, s.stop) for s in row] for row in pairs.clean.spans] == [
            [(s.role, s.start, s.stop) for s in row] for row in pairs.corrupt.spans
        ]
        differ = pairs.clean.inputs["input_ids"] != pairs.corrupt.inputs["input_ids"]
        pixels = torch.equal(pairs.clean.inputs["pixel_values"], pairs.corrupt.inputs["pixel_values"])
        assert pixels == (how == "reformat")
        assert bool(differ.any()) == (how == "reformat")
        if how == "reformat":
            text = pairs.clean.mask("instruction") | pairs.clean.mask("question")
            assert not (differ & ~text).any()
            assert differ.any(1).all()
        assert [c[a] for c, a in zip(pairs.corrupt.candidates, pairs.corrupt.answers, strict=True)] == [e.answer for e in episodes]


def test_only_the_chosen_pictures_are_disturbed() -> None:
    episode = concepts.draw(1, classes=2, shots=2, size=28, seed=0)[0]
    for kind in ("blur", "noise"):
        for which, chosen in (
            ("query", {4}),
            ("right", {k for k, s in enumerate(episode.shots) if s.label == episode.answer}),
            ("all", set(range(5))),
        ):
            corrupt = disturb_images(episode, kind=kind, which=which, strength=0.5)  # type: ignore[arg-type]
            changed = {
                k
                for k, (a, b) in enumerate(zip(episode.images, corrupt.images, strict=True))
                if not np.array_equal(np.asarray(a), np.asarray(b))
            }
            assert changed == chosen
            assert all(a.size == b.size for a, b in zip(episode.images, corrupt.images, strict=True))
    strong, weak = (np.asarray(disturb_images(episode, kind="blur", strength=s).images[-1], dtype=float).std() for s in (1.0, 0.1))
    assert strong < weak


def test_what_cannot_be_disturbed_is_refused_or_named() -> None:
    words = toy_episodes(2, classes=2)
    with pytest.raises(EpisodeError, match="an instruction or a question must be there"):
        reformats(words[0])
    with pytest.raises(EpisodeError, match="a picture must be there to blur"):
        minimal_pairs(ToyRenderer(), words, "blur")
    with pytest.raises(OptionError, match="options of swap_labels must be among none; got strength"):
        minimal_pairs(ToyRenderer(), words, "swap_labels", strength=1)
    picture = concepts.draw(1, classes=2, shots=1, size=28, seed=0)[0]
    with pytest.raises(OptionError, match="strength must be above 0 and at most 1"):
        disturb_images(picture, kind="noise", strength=2.0)


def test_vector_sequences_make_pairs_too() -> None:
    task = UnimodalTask()
    found = planted_vectors(task)
    drawn = draw(task, 8, torch.Generator().manual_seed(0), split="ic")
    for how in ("swap_labels", "swap_query", "wrong_exemplar"):
        pairs = vector_pairs(drawn, how)
        z = patch(found.model, pairs, sites="z", by="head", progress=False, n_permutations=100)["z"]
        assert z.value[found.matching[0]] == pytest.approx(1, abs=1e-2)
        assert z.value[found.previous_token[0]] == pytest.approx(1.0 if how == "wrong_exemplar" else 0.0, abs=1e-2)
        for head in found.idle:
            assert z.value[head] == pytest.approx(0, abs=1e-2)
    noised = vector_pairs(drawn, "noise", which="all", strength=0.5)
    assert not torch.equal(noised.clean.inputs["inputs_embeds"], noised.corrupt.inputs["inputs_embeds"])


def test_one_modality_can_be_exchanged_alone() -> None:
    task = MultimodalTask()
    found = planted_vectors(task)
    drawn = draw(task, 8, torch.Generator().manual_seed(0), split="ic")
    first = vector_pairs(drawn, "swap_query", modality="first")
    last = first.clean.query_pos
    rows = torch.arange(first.n)
    assert not torch.equal(first.clean.inputs["inputs_embeds"][rows, last - 1], first.corrupt.inputs["inputs_embeds"][rows, last - 1])
    assert torch.equal(first.clean.inputs["second_values"], first.corrupt.inputs["second_values"])
    z = patch(found.model, first, sites="z", by="head", progress=False, n_permutations=100)["z"]
    assert z.value[found.matching[0]] == pytest.approx(1, abs=1e-2)
    second = vector_pairs(drawn, "swap_query", modality="second")
    assert torch.equal(second.clean.inputs["inputs_embeds"], second.corrupt.inputs["inputs_embeds"])
    with pytest.raises(EpisodeError, match="must differ in the metric"):  # the planted circuit never looks at the second modality
        patch(found.model, second, sites="z", by="head", progress=False)
    with pytest.raises(OptionError, match="modality must be"):
        vector_pairs(drawn, "swap_labels", modality="first")


@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 2), st.booleans())
def test_groups_hold_every_token_once(classes: int, shots: int, words: int, bos: bool) -> None:
    batch = toy_batch(3, classes, shots, label_words=words, renderer=ToyRenderer(bos=bos))
    for by in ("span", "shot"):
        groups = span_groups(batch, by)
        count = torch.stack(list(groups.values())).sum(0)
        assert torch.equal(count, batch.inputs["attention_mask"])
        assert groups["last token"].sum(1).tolist() == [1, 1, 1]
    right = span_groups(batch)["right label"]
    assert torch.equal(right, batch.mask("label", right=True))


def test_groups_of_a_chat_prompt_have_the_names_of_attention_by_role(organism: Organism) -> None:
    model, processor = organism("qwen2_5_vl")
    batch = Renderer(processor, model.config).render(concepts.draw(3, classes=2, shots=2, size=56, seed=3))
    groups = span_groups(batch)
    assert torch.equal(groups["wrong image"], batch.mask("image", right=False))
    assert torch.equal(groups["query image"], batch.mask("image", shot=-1))
    assert torch.equal(torch.stack(list(groups.values())).sum(0), batch.inputs["attention_mask"])
    assert list(groups) == [
        "instruction", "right image", "right question", "right open", "right label", "right close", "wrong image", "wrong question", "wrong open", "wrong label",
        "wrong close", "query image", "query question", "query open", "glue", "last token",
    ]  # fmt: skip


def test_longer_prompts_are_matched_by_span() -> None:
    short, long = toy_batch(2, 2, 1), toy_batch(2, 2, 1, label_words=2)
    with pytest.raises(
        EpisodeError, match=r"span 'shot 0 label' must have as many tokens in both prompts; got 1 \(clean\) and 2 \(corrupt\)"
    ):
        align(short, long)
    found = align(short, long, "mean")
    assert found.known.all()
    x = torch.arange(2 * long.n_pos, dtype=torch.float32).reshape(2, -1, 1)
    assert found.apply(x)[0, :, 0].tolist() == [0, 1.5, 3, 4.5, 6]
    back = align(long, short, "resize")
    assert back.apply(torch.arange(10.0).reshape(2, 5, 1))[0, :, 0].tolist() == [0, 1, 1, 2, 3, 3, 4]
    assert align(short, short).same
    with pytest.raises(EpisodeError, match="same sequence of spans"):
        align(short, toy_batch(2, 3, 1))
    with pytest.raises(EpisodeError, match="must be paired"):
        align(short, toy_batch(3, 2, 1))


def test_spans_are_fitted_over_the_grid_where_there_is_one() -> None:
    ramp = torch.arange(4.0).repeat(4)[:, None]  # 4 x 4, brighter to the right
    assert fit(ramp, 4, "resize", (2, 2), (4, 4))[:, 0].tolist() == [0.5, 2.5, 0.5, 2.5]
    assert fit(ramp, 3, "mean")[:, 0].tolist() == [1.5, 1.5, 1.5]
