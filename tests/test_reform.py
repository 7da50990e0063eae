"""Examples with broken meaning or changed form: the query's tokens stay, spans are exact, designs are crossed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechicl.data import concepts
from mechicl.data.gaussian import MultimodalTask, UnimodalTask, draw
from mechicl.errors import EpisodeError, OptionError, RenderError
from mechicl.models.toys.prompts import ToyRenderer, toy_episodes
from mechicl.prompts.conditions import cross, crossing, factor, query_spans, query_tokens, unchanged
from mechicl.prompts.episode import Episode, Shot
from mechicl.prompts.form import Form
from mechicl.prompts.reform import BREAKS, FORMS, reform, rename, reorder
from mechicl.prompts.render import Renderer
from mechicl.prompts.spans import QUERY
from mechicl.prompts.vectors import VectorRenderer, VectorShot
from mechicl.prompts.vectors import episodes as vector_episodes

Organism = Callable[..., tuple[Any, Any]]

UNCHANGING = {
    "llava": {"swapped"}, "llava_next": {"swapped"}, "llava_onevision": {"swapped"}, "paligemma": {"one turn"},
    "paligemma2": {"one turn"},
}  # fmt: skip
"""Templates that put a turn's pictures first, and prompts without turns."""


def episode(seed: int = 3) -> Episode:
    return concepts.draw(1, classes=2, shots=1, size=28, seed=seed)[0]


def test_every_form_in_every_family_keeps_the_querys_tokens_and_has_exact_spans(family: str, organism: Organism) -> None:
    model, processor = organism(family)
    renderer = Renderer(processor, model.config)
    given_ = episode()
    plain = renderer.render([given_])
    own = query_tokens(plain)[0]
    assert {"query image", "query question", "last token"} <= set(own)
    if family != "llava_onevision":  # one picture alone is tiled, several are not
        assert query_tokens(renderer.render([given_.without_shots()]))[0] == own
    for name in FORMS:
        batch = renderer.render([reform(name)(given_)])
        assert query_tokens(batch)[0] == own, name
        assert unchanged(plain, batch) == (name in UNCHANGING.get(family, ())), name
        ids = batch.inputs["input_ids"][0].tolist()
        for k, shot in enumerate(given_.shots):
            written = [ids[p] for s in batch.spans[0] if s.role == "label" and s.shot == k for p in range(s.start, s.stop)]
            assert processor.tokenizer.decode(written).strip() == shot.label, name
            pictures = [s for s in batch.spans[0] if s.role == "image" and s.shot == k]
            assert sum(s.stop - s.start for s in pictures) == sum(
                s.stop - s.start for s in plain.spans[0] if s.role == "image" and s.shot == k
            )
            assert all(ids[p] == renderer.image_token_id for s in pictures for p in range(s.start, s.stop))
        assert [s.stop for s in batch.spans[0]][:-1] == [s.start for s in batch.spans[0]][1:]  # every position once


def order(batch: Any) -> list[tuple[int, str]]:
    """Shots' pieces in prompt order, glue left out."""
    return [(s.shot, s.role) for s in batch.spans[0] if s.role in ("image", "label", "question")]


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "smolvlm", "gemma3"])
def test_forms_put_things_where_they_say(kind: str, organism: Organism) -> None:
    model, processor = organism(kind)
    renderer = Renderer(processor, model.config)
    given_ = episode()

    def laid(name: str) -> list[tuple[int, str]]:
        return list(dict.fromkeys(order(renderer.render([reform(name)(given_)]))))

    query = [(QUERY, "image"), (QUERY, "question")]
    assert laid("label first") == [(0, "label"), (0, "image"), (0, "question"), (1, "label"), (1, "image"), (1, "question"), *query]
    assert laid("swapped") == [(0, "question"), (0, "image"), (0, "label"), (1, "question"), (1, "image"), (1, "label"), *query]
    assert laid("pictures first") == [(0, "image"), (1, "image"), (0, "question"), (0, "label"), (1, "question"), (1, "label"), *query]
    assert laid("one turn") == [(k, role) for k in (0, 1) for role in ("image", "question", "label")] + query
    text = {
        name: processor.tokenizer.decode(renderer.render([reform(name)(given_)]).inputs["input_ids"][0])
        for name in ("template", "separators", "option markers", "one turn")
    }
    assert text["template"].count("Name the thing shown.") == text["template"].count("Answer: ") == 2
    assert text["separators"].count("###") == text["separators"].count("=> ") == 2
    for shot in given_.shots:
        assert f"({'AB'[given_.candidates.index(shot.label)]}) {shot.label}" in text["option markers"]
    assistant = {"qwen2_5_vl": "assistant", "smolvlm": "Assistant", "gemma3": "model\n"}[kind]
    assert text["one turn"].count(assistant) == 1
    assert text["template"].count(assistant) == 3


def test_meaning_breaks_and_form_stays() -> None:
    several = concepts.draw(6, classes=3, shots=2, size=28, seed=0)
    for k, clean in enumerate(several):
        for name in ("noise", "other class", "other label", "labels dealt anew"):
            broken = BREAKS[name](clean, seed=k, donors=several)
            assert broken.query is clean.query
            assert broken.form == clean.form
            assert [[i.size for i in s.images] for s in broken.shots] == [[i.size for i in s.images] for s in clean.shots]
            labels = [s.label for s in broken.shots]
            if name == "labels dealt anew":
                assert sorted(labels) == sorted(s.label for s in clean.shots)
                assert labels != [s.label for s in clean.shots]
            elif name == "other label":
                assert all(a != s.label for a, s in zip(labels, clean.shots, strict=True))
                assert len(set(labels)) > 1
            if "label" in name:
                assert [s.images for s in broken.shots] == [s.images for s in clean.shots]
            else:
                assert labels == [s.label for s in clean.shots]
                same = [
                    np.array_equal(np.asarray(a.images[0]), np.asarray(b.images[0])) for a, b in zip(broken.shots, clean.shots, strict=True)
                ]
                assert not any(same)
            if name == "other class":
                shown = {s.item for s in (*clean.shots, clean.query)}
                assert not {s.item for s in broken.shots} & shown
    alone = BREAKS["other class"](several[0], seed=0)
    assert all(a.item != b.item for a, b in zip(alone.shots, several[0].shots, strict=True))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text("abcd ", min_size=1, max_size=20).filter(str.strip), min_size=2, max_size=4), st.integers(0, 99))
def test_words_are_shuffled_inside_their_slots(texts: list[str], seed: int) -> None:
    shots = tuple(Shot(label="xy"[k % 2], text=text) for k, text in enumerate(texts))
    clean = Episode(shots, Shot(label="x", text="a b"), ("x", "y"))
    if all(len(set(text.split(" "))) < 2 for text in texts):
        with pytest.raises(EpisodeError, match="two different words"):
            BREAKS["shuffled words"](clean, seed=seed)
        return
    broken = BREAKS["shuffled words"](clean, seed=seed)
    for a, b in zip(broken.shots, clean.shots, strict=True):
        assert sorted(a.text.split(" ")) == sorted(b.text.split(" "))
        assert (a.text != b.text) == (len(set(b.text.split(" "))) > 1)
        assert a.label == b.label
    assert broken.query is clean.query


def test_other_prompts_with_the_same_meaning() -> None:
    clean = concepts.draw(1, classes=4, shots=2, size=28, seed=2)[0]
    names = rename(clean, seed=5)
    table = {a.label: b.label for a, b in zip(clean.shots, names.shots, strict=True)}
    assert len(set(table.values())) == 4
    assert table != {k: k for k in table}
    assert all(table[a.label] == b.label for a, b in zip(clean.shots, names.shots, strict=True))
    assert names.answer == table[clean.answer]
    assert names.query.images == clean.query.images
    other = reorder(clean, seed=1)
    assert {id(s) for s in other.shots} == {id(s) for s in clean.shots}
    assert other.shots != clean.shots
    assert other.query is clean.query


def test_vectors_and_toy_words_have_forms_too() -> None:
    drawn = draw(UnimodalTask(K=8, L=4, D=16, N=4, B=2), 3, generator=torch.Generator().manual_seed(0))
    some = vector_episodes(drawn)
    renderer = VectorRenderer(drawn.task)
    plain, first = renderer.render(some), renderer.render([reform("label first")(e) for e in some])
    assert query_tokens(plain) == query_tokens(first)
    pairs = plain.inputs["inputs_embeds"][:, :-1].unflatten(1, (4, 2))
    torch.testing.assert_close(first.inputs["inputs_embeds"][:, :-1].unflatten(1, (4, 2)), pairs.flip(2), rtol=0, atol=0)
    assert [s.role for s in first.spans[0]] == ["label", "text"] * 4 + ["text"]
    noise = BREAKS["noise"](some[0], seed=1)
    lengths = [float(s.vector.norm()) for s in noise.shots if isinstance(s, VectorShot)]
    assert 0.3 < min(lengths) <= max(lengths) < 3
    two = draw(MultimodalTask(K1=8, K2=4, L=4, L2=4, D1=16, D2=16, N=4, B=2), 2, generator=torch.Generator().manual_seed(0))
    mixed = VectorRenderer(two.task).render([reform("swapped")(e) for e in vector_episodes(two)])
    assert [s.role for s in mixed.spans[0]] == ["image", "text", "label"] * 4 + ["text", "image"]
    at = [s.start for s in mixed.spans[0] if s.role == "image"]
    assert mixed.inputs["second_pos"][0].tolist() == at
    words = ToyRenderer().render([reform("label first")(e) for e in toy_episodes(2)])
    assert [s.role for s in words.spans[0]] == ["label", "text"] * 4 + ["text"]
    for refused in (ToyRenderer(), renderer):
        with pytest.raises(RenderError, match="only change orders"):
            refused.render([reform("separators")((toy_episodes(1) if refused is not renderer else some)[0])])


def test_conditions_are_crossed_and_differ_in_the_factors_alone() -> None:
    several = concepts.draw(5, classes=3, shots=1, size=28, seed=1)
    factors = crossing({"semantics": ["other class", "noise"], "format": ("one turn", "separators")})
    crossed = cross(several, factors, replicates=2, seed=4)
    assert crossed.conditions[0] == "kept+kept"
    assert len(crossed.conditions) == 6
    assert crossed.design.shape == (12, 2)
    assert crossed.condition.tolist() == [*range(6)] * 2
    assert crossed.replicate.tolist() == [0] * 6 + [1] * 6
    for given_, runs in zip(several, crossed.runs, strict=True):
        assert runs[0] is given_
        for r in range(2):
            mine = runs[6 * r : 6 * r + 6]
            kept, formed, classes, both = mine[0], mine[1], mine[2], mine[3]
            assert [(s.images, s.label) for s in formed.shots] == [(s.images, s.label) for s in kept.shots]
            assert formed.form == FORMS[("one turn", "separators")[(4 + several.index(given_)) * 2 % 2 + r]]
            assert both.form == formed.form
            assert [s.images for s in both.shots] == [s.images for s in classes.shots]  # one draw serves both forms
            assert [s.label for s in classes.shots] == [s.label for s in kept.shots]
        assert all(run.query.images == given_.query.images for run in runs)
        assert [s.images for s in runs[2].shots] != [s.images for s in runs[8].shots]  # another draw in the other replicate
    again = cross(several, factors, replicates=2, seed=4)
    assert [[s.label for s in run.shots] for few in crossed.runs for run in few] == [
        [s.label for s in run.shots] for few in again.runs for run in few
    ]


def test_episodes_that_do_not_allow_a_condition_are_named() -> None:
    several = concepts.draw(2, classes=2, shots=1, size=28, seed=1)
    words = Episode((Shot(label="x", text="a"), Shot(label="y", text="b c")), Shot(label="x", text="d"), ("x", "y"), id="words")
    crossed = cross([*several, words], crossing({"semantics": "noise"}))
    assert [s.episode for s in crossed.skipped] == ["words"]
    assert crossed.rows == (0, 1)
    with pytest.raises(EpisodeError, match="none of 1"):
        cross([words], crossing({"semantics": "noise"}))


@pytest.mark.usefixtures("untyped")
def test_what_does_not_exist_is_refused() -> None:
    several = [episode()]
    good = crossing({"semantics": "noise"})
    with pytest.raises(OptionError, match="must be one of"):
        reform("nonsense")
    with pytest.raises(OptionError, match="must be one of"):
        reform(("one turn", "nonsense"))
    with pytest.raises(OptionError, match="turns"):
        Form(turns="three")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="must not be empty"):
        Form(separator="")
    with pytest.raises(OptionError, match="replicates"):
        cross(several, good, replicates=0)
    with pytest.raises(OptionError, match="vary"):
        cross(several, good, vary=("everything",))
    with pytest.raises(OptionError, match="own name"):
        cross(several, [*good, *good])
    with pytest.raises(OptionError, match="a change"):
        factor("semantics")
    with pytest.raises(OptionError, match="must differ"):
        factor("semantics", "noise", "noise")
    same = replace(several[0], shots=several[0].shots[:1])
    with pytest.raises(EpisodeError, match="two other labels"):
        BREAKS["other label"](same)


def test_control_tokens_and_too_few_markers_are_refused(organism: Organism) -> None:
    model, processor = organism("qwen2_5_vl")
    renderer = Renderer(processor, model.config)
    with pytest.raises(RenderError, match="words before a label of the form"):
        renderer.render([replace(episode(), form=Form(before_label="<|im_end|>"))])
    with pytest.raises((OptionError, RenderError), match="markers must be one for each"):
        renderer.render([replace(episode(), form=Form(markers=("(A) ",)))])


def test_query_spans_cover_what_the_query_owns(organism: Organism) -> None:
    model, processor = organism("idefics3")
    batch = Renderer(processor, model.config).render([episode(), episode(4).without_shots()])
    spans = query_spans(batch)
    for i, row in enumerate(batch.spans):
        owned = {p for s in row if s.shot == QUERY for p in range(s.start, s.stop)}
        covered = {int(p) for mask in spans.values() for p in mask[i].nonzero()}
        assert owned <= covered
        assert int(batch.query_pos[i]) in covered
        assert sum(int(mask[i].sum()) for mask in spans.values()) == len(covered)  # no token twice
