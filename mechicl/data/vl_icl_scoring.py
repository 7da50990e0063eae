"""When a written answer counts in VL-ICL Bench: the released rules, with their odd cases, and ours beside them."""

from __future__ import annotations

import re
import string
from typing import Literal, get_args

from mechicl.errors import OptionError

Rule = Literal["published", "ours"]
"""published: as the released code marks. ours: without its odd cases, see `right`."""
NUMBERS = ("operator_induction", "operator_induction_interleaved")
"""Tasks whose answer is taken to be the first number that was written (released code; not clevr, whose folder was once called clevr_simple there)."""


def right(text: str, answer: str, task: str, rule: Rule = "published") -> bool:
    """Whether a written answer is right.

    published: the text up to its first line break, or, without one, up to its first full stop. matching_mi: "Yes" is right where the text has "yes" in it,
    "No" where it has not (so silence is a right "No"). operator tasks: the first run of digits must be the answer (so a negative result can never be right).
    Others: the text is the answer, upper and lower case being one (so an answer with a full stop in it, as text in a photograph can have, is never right).

    ours: the first line, without quotation marks and punctuation around it. matching_mi: its first word is the answer. Numbers (clevr too): the first number with
    its sign. Others: as published.

    Args:
        text: What was written.
        answer: The right answer.
        task: Name of the task.
        rule: Which of the two.

    Raises:
        OptionError: another rule.

    Source:
        Zong et al. 2025 (VL-ICL Bench), evals/eval.py, exact_match and exact_yes_no.
    """
    if rule not in get_args(Rule):
        raise OptionError(f"rule must be one of {', '.join(get_args(Rule))}; got {rule!r}. published is the benchmark's.")
    return (_published if rule == "published" else _ours)(text, answer, task)


def _published(text: str, answer: str, task: str) -> bool:
    written = first_part(text)
    if task == "matching_mi":
        said = "yes" in written.lower()
        return {"yes": said, "no": not said}.get(answer.lower(), False)
    if task in NUMBERS:
        found = re.search(r"\d+", written)
        written = found.group() if found else ""
    return written.lower() == answer.lower()


def first_part(text: str) -> str:
    """Up to the first line break, or, without one, the first full stop; nothing is cut where either stands at the very start."""
    text = text.strip()
    end = text.find("\n")
    if end <= 0:
        end = text.find(".")
    return text[:end] if end > 0 else text


def _ours(text: str, answer: str, task: str) -> bool:
    lines = text.strip().splitlines()
    written = lines[0].strip().replace("\N{MINUS SIGN}", "-") if lines else ""
    if task in NUMBERS or task == "clevr":
        found = re.search(r"-?\s*\d+", written)
        return found is not None and re.sub(r"\s", "", found.group()) == answer
    trimmed = written.strip(string.punctuation + string.whitespace)
    if task == "matching_mi":
        words = re.findall(r"[^\W\d_]+", trimmed)
        return bool(words) and words[0].casefold() == answer.casefold()
    wanted = answer.strip().strip(string.punctuation)
    return written.casefold() == answer.casefold() or bool(wanted and trimmed.casefold() == wanted.casefold())
