"""Pronounceable words that mean nothing: labels no model has met."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from mechicl.errors import OptionError

CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"
SYLLABLES: tuple[str, ...] = tuple(c + v for c in CONSONANTS for v in VOWELS)
"""70 open syllables. The organisms' tokenizer has one token for each, alone and after a space."""

SPELT = """
a be bi bo do fa fe go la ma me mi my no pa pi re so to tu up we baba bobo bono data demo dodo ego euro fata gala gigi kilo lava
lego lima logo mama mega menu mimi mono moto nana nato nova papa pili polo puma rama rosa saga sago sari sofa solo soma taro tofu
toga tutu vato veto vino visa zero zulu banana batata camera dilemma domino kimono lasagna libido mikado panama papaya pagoda
potato salami samosa sonata tomato tuba tuna patina retina marina regatta regina
"""
REAL_WORDS = frozenset(SPELT.split())
"""Words of English (and names) that the syllables can spell; never given out."""


def pseudo_words(
    n: int,
    seed: int | np.random.Generator,
    *,
    syllables: tuple[int, int] = (1, 4),
    avoid: Collection[str] = (),
    distinct_start: bool = True,
) -> list[str]:
    """n different words such as "zuda" or "mi", made of open syllables.

    Args:
        n: How many.
        seed: Seed or generator; the same seed gives the same words.
        syllables: Fewest and most syllables of a word; lengths are drawn evenly.
        avoid: Words that must not be given.
        distinct_start: No two words begin with the same syllable, so that the first token of a label tells it apart (at most 70 words).

    Raises:
        OptionError: no such lengths, or more words than there are.
    """
    low, high = syllables
    if not 1 <= low <= high:
        raise OptionError(f"syllables must be (fewest, most) with 1 <= fewest <= most; got {syllables}. Use (1, 4).")
    most = len(SYLLABLES) if distinct_start else sum(len(SYLLABLES) ** k for k in range(low, high + 1)) // 2
    if not 0 <= n <= most:
        raise OptionError(f"n must be between 0 and {most}; got {n}. Ask for fewer words, allow longer ones, or set distinct_start=False.")
    draw = np.random.default_rng(seed)
    taken: set[str] = set(avoid) | REAL_WORDS
    words: list[str] = []
    starts = iter(draw.permutation(len(SYLLABLES))) if distinct_start else None
    tries = 0
    while len(words) < n:
        start = next(starts, None) if starts is not None else int(draw.integers(len(SYLLABLES)))
        if start is None:
            raise OptionError(
                f"n must leave words to give with {low} to {high} syllables; got {n}. Allow longer words, or set distinct_start=False."
            )
        for _ in range(20):  # the same first syllable with other endings
            parts = [int(start), *draw.integers(len(SYLLABLES), size=int(draw.integers(low, high + 1)) - 1)]
            word = "".join(SYLLABLES[k] for k in parts)
            if word not in taken:
                taken.add(word)
                words.append(word)
                break
        tries += 1
        if tries > 1000 + 100 * n:
            raise OptionError(f"n must leave words to give with {low} to {high} syllables; got {n}. Allow longer words.")
    return words
