"""What an ablation allows to be said, in one sentence: needed, redundant, unspecific, irrelevant, or nothing."""

from __future__ import annotations

from collections.abc import Sequence

from mechicl.analysis.statistics import holm
from mechicl.results import AblationCell, Head, ICLAccuracy

FINDINGS = ("necessary", "redundant", "unspecific", "irrelevant", "no control", "nothing to lose")
"""necessary: the set costs accuracy, random heads do not, and a single head of it does too. redundant: the same, but every single head can be spared.
unspecific: the set costs accuracy, and as many random heads cost as much. irrelevant: the set costs nothing. no control: the set costs accuracy and
there were no random heads, or too few, to compare with. nothing to lose: the intact model is not above chance."""

ALPHA = 0.05

LEAST_CENSUS = 3
"""Fewest matched sets, all there are, that may stand for a random control: in a small model 19 do not exist."""


def costs(cell: AblationCell, p: float | None = None) -> bool:
    """Accuracy falls, by the paired interval and by the exact test of the answers that changed (`p`: that test's, corrected)."""
    return bool(cell.change.high < 0 and (cell.mcnemar_p if p is None else p) < ALPHA)


def judge(
    intact: ICLAccuracy,
    chosen: AblationCell,
    singles: Sequence[AblationCell],
    random: Sequence[AblationCell],
    p_random: float,
    *,
    exhaustive: bool = False,
) -> tuple[str, str]:
    """A word of `FINDINGS`, and the sentence.

    `exhaustive`: the random sets are all the matched ones that exist. A head that can be spared alone is either redundant (others do the same) or irrelevant (nobody needs it): only the set tells them apart.
    """
    several = len(chosen.heads) > 1
    what = f"the {len(chosen.heads)} heads together" if several else f"head {name(chosen.heads[0])}"
    fall = f"accuracy goes from {intact.accuracy.value:.2f} to {chosen.accuracy.value:.2f} (change {_signed(chosen)})"
    if intact.accuracy.low <= intact.chance:
        return "nothing to lose", (
            f"Nothing can be shown: the intact model is not above chance ({intact.accuracy}, chance {intact.chance:.2f})."
        )
    if not costs(chosen):
        return "irrelevant", f"Irrelevant here: without {what} {fall}; no evidence that the answers need {'them' if several else 'it'}."
    if not random:
        return "no control", f"Without {what} {fall}, but there are no random heads to compare with."
    mean = sum(cell.change.value for cell in random) / len(random)
    beside = f"as many random heads change it by {mean:+.2f} on average (p = {p_random:.3f}, {len(random)} draws)"
    unmatched = all(cell.accuracy.value > chosen.accuracy.value for cell in random)
    if unmatched and exhaustive and len(random) >= LEAST_CENSUS:
        beside = f"of all {len(random)} matched sets of other heads none costs as much (they change it by {mean:+.2f} on average)"
    elif unmatched and p_random > ALPHA:
        return "no control", f"Without {what} {fall}; {beside}: at least 19 draws are needed for p = 0.05."
    elif p_random > ALPHA:
        return "unspecific", f"Not specific: without {what} {fall}, but {beside}."
    if not several:
        return "necessary", f"Necessary: without {what} {fall}; {beside}."
    if not singles:
        return "necessary", f"Necessary as a set: without {what} {fall}; {beside}. Single heads were not tried."
    corrected = holm([cell.mcnemar_p for cell in singles])
    alone = [cell for cell, p in zip(singles, corrected, strict=True) if costs(cell, float(p))]
    if not alone:
        worst = min(singles, key=lambda cell: cell.change.value)
        return "redundant", (
            f"Redundant: without {what} {fall}; {beside}. Yet each head alone can be spared (at most {worst.change.value:+.2f}, head "
            f"{name(worst.heads[0])}): they stand in for one another."
        )
    names = ", ".join(f"{name(cell.heads[0])} ({cell.change.value:+.2f})" for cell in alone)
    return "necessary", f"Necessary: without {what} {fall}; {beside}. Alone, {len(alone)} of {len(singles)} already cost accuracy: {names}."


def name(head: Head) -> str:
    """layer.head"""
    return f"{head[0]}.{head[1]}"


def _signed(cell: AblationCell) -> str:
    return f"{cell.change.value:+.2f} [{cell.change.low:+.2f}, {cell.change.high:+.2f}]"
