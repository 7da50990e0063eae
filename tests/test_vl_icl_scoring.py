"""When a written answer counts: the released rules with their odd cases, against an independent reading of them, and ours beside them."""

from __future__ import annotations

import re

import pytest
from conftest import unchecked
from hypothesis import given, settings
from hypothesis import strategies as st

from mechicl.data.vl_icl_scoring import first_part, right
from mechicl.errors import OptionError

TASKS = ("open_mi", "matching_mi", "clevr", "operator_induction", "operator_induction_interleaved", "textocr")


@pytest.mark.parametrize(
    ("text", "answer", "task", "published", "ours"),
    [
        ("dax", "dax", "open_mi", True, True),
        (" Dax.\nThis is", "dax", "open_mi", False, True),  # cut at the line break first, so the full stop stays
        ("Dax. It is", "dax", "open_mi", True, False),  # the whole first line counts for ours
        ("a dax", "dax", "open_mi", False, False),
        ('"dax"', "dax", "open_mi", False, True),
        ("Yes", "Yes", "matching_mi", True, True),
        ("I would say yes, they do", "Yes", "matching_mi", True, False),
        ("no", "No", "matching_mi", True, True),
        ("", "No", "matching_mi", True, False),  # silence is a right No
        ("anything", "No", "matching_mi", True, False),
        ("yesterday", "Yes", "matching_mi", True, False),
        ("not sure", "No", "matching_mi", True, False),
        ("The answer is 12", "12", "operator_induction", True, True),
        ("-3", "-3", "operator_induction", False, True),  # no sign is read
        ("-3", "3", "operator_induction", True, False),
        ("\N{MINUS SIGN}3", "-3", "operator_induction_interleaved", False, True),
        ("There are 4", "4", "clevr", False, True),  # the released number rule is not for clevr
        ("4", "4", "clevr", True, True),
        ("No. 5", "No. 5", "textocr", False, True),  # a full stop in the answer can never be right
        ("EXIT", "exit", "textocr", True, True),
        ("...", "...", "textocr", True, True),
    ],
)
def test_rules_and_their_odd_cases(text: str, answer: str, task: str, published: bool, ours: bool) -> None:
    assert right(text, answer, task) is published
    assert right(text, answer, task, "ours") is ours


def reference(text: str, answer: str, task: str) -> bool:
    """The released rule in other words: with regular expressions, and a cut written as a partition."""
    text = re.sub(r"^\s+|\s+$", "", text)
    cut = re.match(r"([^\n]+)\n", text) or re.match(r"([^.]+)\.", text, flags=re.DOTALL)
    kept = text if cut is None else cut[1]
    if task == "matching_mi":
        return (re.search("yes", kept.lower()) is not None) == (answer.lower() == "yes")
    if task.startswith("operator"):
        numbers = re.findall(r"\d+", kept)
        kept = numbers[0] if numbers else ""
    return kept.lower() == answer.lower()


words = st.text(alphabet="aYes No.\n-123x", max_size=14)


@settings(max_examples=300, deadline=None)
@given(words, st.sampled_from(("Yes", "No")), st.sampled_from(TASKS), words)
def test_the_published_rule_is_the_reference(text: str, yes_or_no: str, task: str, other: str) -> None:
    with unchecked():
        answer = yes_or_no if task == "matching_mi" else other
        assert right(text, answer, task) == reference(text, answer, task)


@given(st.integers(-81, 81), st.sampled_from(("operator_induction", "clevr")))
def test_our_rule_takes_every_number_as_it_is_written(number: int, task: str) -> None:
    assert right(f"It is {number}.", str(number), task, "ours")
    assert not right(f"It is {number}.", str(number + 1), task, "ours")


def test_nothing_is_cut_at_the_very_start() -> None:
    assert first_part("  .5") == ".5"
    assert first_part("a.b\nc.d") == "a.b"


def test_another_rule_is_refused() -> None:
    with unchecked(), pytest.raises(OptionError, match="rule must be one of published, ours"):
        right("a", "a", "open_mi", "lenient")  # type: ignore[arg-type]
