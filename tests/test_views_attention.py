"""The token view of circuitsvis: checked, escaped, offline, small, the same bytes every time."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import views_samples as samples

from mechicl.errors import NotFiniteError, OptionError
from mechicl.views.attention import attention_view, choose_positions, library


def props(call: str) -> dict:
    return json.loads(call[call.index("{") : call.rindex("}") + 1])


def test_the_drawn_numbers_are_the_patterns_numbers() -> None:
    view = samples.prompt()
    drawn = props(attention_view(view, [(1, 0), (0, 1)]).call)
    np.testing.assert_allclose(drawn["attention"], [view.patterns[(1, 0)], view.patterns[(0, 1)]], atol=5e-5)  # four digits are kept
    assert drawn["attentionHeadNames"] == ["1.0", "0.1"]
    assert len(drawn["tokens"]) == len(view.tokens)


def test_a_wrong_number_of_tokens_is_refused() -> None:
    view = samples.prompt()
    with pytest.raises(OptionError, match=r"must be \[57, 57\]"):
        attention_view(replace(view, patterns={(1, 0): np.eye(4)}))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_pattern_that_is_not_finite_is_refused(bad: float) -> None:
    view = samples.prompt()
    pattern = view.patterns[(1, 0)].copy()
    pattern[4, 2] = bad
    with pytest.raises(NotFiniteError, match=r"at \(4, 2\)"):
        attention_view(replace(view, patterns={(1, 0): pattern}))


def test_a_head_without_a_pattern_is_refused() -> None:
    with pytest.raises(OptionError, match="must have a pattern"):
        attention_view(samples.prompt(), [(2, 3)])
    with pytest.raises(OptionError, match="must have a pattern"):
        attention_view(replace(samples.prompt(), patterns={}))


def test_tokens_cannot_end_the_script() -> None:
    drawn = attention_view(samples.hostile_prompt())
    assert "</script" not in drawn.call
    assert "<img" not in drawn.call
    assert any("</script>" in token for token in props(drawn.call)["tokens"])  # the word itself is still shown
    assert drawn.page().count("</script>") == 2


def test_nothing_is_loaded_and_the_bytes_are_the_same() -> None:
    first, second = attention_view(samples.prompt()).page(), attention_view(samples.prompt()).page()
    assert first == second
    assert not re.search(r"""(?:src|href)\s*=\s*["']https?:""", first)
    assert "import " not in attention_view(samples.prompt()).call
    assert "unpkg" not in first
    assert "sourceMappingURL" not in library()


def test_long_prompts_are_thinned_and_the_note_says_so() -> None:
    view = samples.prompt(per_image=100)
    drawn = attention_view(view, max_tokens=50, max_heads=2)
    assert len(drawn.positions) == 50
    assert f"50 of {len(view.tokens)} tokens" in drawn.note
    assert "2 of 6 heads" in drawn.note
    labels = [p for p, role in enumerate(view.roles) if role == "label"]
    assert {0, len(view.tokens) - 1, *labels} <= set(drawn.positions)
    kept = props(drawn.call)
    np.testing.assert_allclose(
        kept["attention"][0], view.patterns[(1, 0)][np.ix_(drawn.positions, drawn.positions)], atol=5e-5
    )  # four digits
    assert "tokens are drawn" not in attention_view(samples.prompt()).note


def test_positions_keep_their_order_and_their_number() -> None:
    view = samples.prompt(per_image=64)
    for limit in (2, 10, 63):
        where = choose_positions(view, limit)
        assert len(where) == limit
        assert list(where) == sorted(set(where))
    with pytest.raises(OptionError, match="at least 2"):
        choose_positions(view, 1)


def test_what_the_heads_read_is_never_thinned_out() -> None:
    view = samples.prompt(per_image=64)
    glue = view.roles.index("glue", 200)
    row = np.full(len(view.tokens), 1e-4)
    row[glue] = 0.9
    view = replace(view, rows={(1, 0): row})
    assert glue not in choose_positions(view, 20)
    assert glue in choose_positions(view, 20, [(1, 0)])


def test_attention_to_later_tokens_is_not_hidden() -> None:
    view = samples.prompt()
    pattern = view.patterns[(1, 0)].copy()
    assert props(attention_view(view).call)["maskUpperTri"] is True
    pattern[6, 7] = 0.5  # a picture read in both directions, as Gemma 3 does
    assert props(attention_view(replace(view, patterns={(1, 0): pattern})).call)["maskUpperTri"] is False
