"""Words behind a label: they stand in its turn, belong to nobody's label, and change no digest of prompts without them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st

from mechicl.analysis.link.store import digest
from mechicl.errors import RenderError
from mechicl.prompts.episode import Episode, Shot
from mechicl.prompts.form import PLAIN, Form
from mechicl.prompts.render import Renderer
from mechicl.prompts.vectors import check_form


def episode(form: Form = PLAIN) -> Episode:
    shots = [Shot(label, (picture(56, 56, seed=k),)) for k, label in enumerate(("kimo", "tepa", "kimo"))]
    return Episode(tuple(shots[:2]), shots[2], ("kimo", "tepa"), "Say it.", "What is this?", form=form)


@pytest.mark.parametrize("turns", ["alternating", "one"])
def test_words_behind_a_label_follow_it_and_are_not_of_its_span(family: str, turns: Any, organism: Callable[..., tuple[Any, Any]]) -> None:
    model, processor = organism(family)
    renderer = Renderer(processor, model.config)
    batch = renderer.render([episode(Form(turns=turns, before_label="it is ", after_label=" you see"))])
    tokens = batch.inputs["input_ids"][0]
    labels = [span for span in batch.spans[0] if span.role == "label"]
    assert [processor.tokenizer.decode(tokens[s.start : s.stop]).strip() for s in labels] == ["kimo", "tepa"]
    text = processor.tokenizer.decode(tokens)
    assert [text.count(f"it is {label} you see") for label in ("kimo", "tepa")] == [1, 1]
    plain = renderer.render([episode(Form(turns=turns, before_label="it is "))])
    assert batch.candidate_ids == plain.candidate_ids  # the query's own turn does not change


@given(words=st.text("abc .", min_size=1, max_size=6))
@settings(max_examples=20)
def test_every_form_has_a_digest_of_its_own_and_old_ones_keep_theirs(words: str) -> None:
    assert repr(PLAIN) == (
        "Form(turns='alternating', label_first=False, swapped=False, pictures_first=False, question=None, before_item='', before_label='', markers=(), "
        "separator='\\n', between='\\n')"
    )
    assert len({digest([episode(form)]) for form in (PLAIN, Form(after_label=words), Form(before_label=words))}) == 3


def test_control_tokens_behind_a_label_and_words_in_toy_sequences_are_refused(organism: Callable[..., tuple[Any, Any]]) -> None:
    model, processor = organism("qwen2_5_vl")
    with pytest.raises(RenderError, match="words behind a label of the form"):
        Renderer(processor, model.config).render([episode(Form(after_label="<|im_end|>"))])
    with pytest.raises(RenderError, match="only change orders"):
        check_form(replace(episode(), form=Form(after_label=".")))
