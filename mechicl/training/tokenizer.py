"""A small byte-level tokenizer for model organisms, built from nothing, offline, the same bytes every time.

Its alphabet is the 256 bytes, so any text tokenises and decodes to itself. Above the bytes stand the open syllables of pseudo-words
("ba", "zu", with and without a leading space) and, one token each, the words of the prompts that organisms read. A pseudo-word of n
syllables is therefore n tokens (unless it happens to start like a word), which is what labels that are new in every episode need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from mechicl.data.words import SYLLABLES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXT = """
the a an is in it this that what which of to and or not no yes you are we can as at on by for from with was be
image images picture photo object thing shape item example examples answer question word name label class kind
called same new one two three four red green blue yellow white black large small left right here there shows
Answer Based Image Label Name Picture Question This What You assistant helpful model previous single system user
ASSISTANT USER
"""
WORDS: tuple[str, ...] = tuple(dict.fromkeys(TEXT.split()))
"""Words of the prompts; each is one token with a leading space, and those that can open a turn also without."""

OPENING = """
Answer Based Image Label Name Picture Question This What You
system user assistant model System User Assistant USER INST SYS
"""
OPENERS: tuple[str, ...] = tuple(OPENING.split())
"""Words that are also one token without a leading space."""

SPACE = "Ġ"
"""How the byte-level alphabet writes a space."""


def build_tokenizer(
    *,
    eos: str,
    pad: str,
    bos: str | None = None,
    unk: str | None = None,
    add_bos: bool = False,
    extra: Sequence[str] = (),
    named: Mapping[str, str] | None = None,
    max_length: int = 4096,
) -> PreTrainedTokenizerFast:
    """A tokenizer with a family's own special tokens.

    Args:
        eos, pad, bos, unk: The family's control tokens. Ids follow the order pad, bos, eos, unk, `extra`, `named`, after the vocabulary.
        add_bos: Put `bos` in front of every text, as the Llama and Gemma tokenizers do.
        extra: Further special tokens (turn markers, vision markers, ...).
        named: Special tokens that the processor reads as attributes, e.g. {"image_token": "<image>"} gives `tokenizer.image_token`.
        max_length: The context that the tokenizer announces, tokens.

    Returns:
        A left-padding `PreTrainedTokenizerFast` with offsets. Padding, truncation and special tokens work as in any other.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary, merges = grow_merges()
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    control = {"pad_token": pad, "bos_token": bos, "eos_token": eos, "unk_token": unk}
    control = {role: token for role, token in control.items() if token is not None}
    ordered = dict.fromkeys([*control.values(), *extra, *(named or {}).values()])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ordered])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **control,
        extra_special_tokens=[token for token in ordered if token not in control.values() and token not in (named or {}).values()],
        model_specific_special_tokens=dict(named or {}),
        add_bos_token=add_bos,
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of one token of the vocabulary.

    Raises:
        KeyError: there is no such token (`convert_tokens_to_ids` would answer with the unknown token's id).
    """
    return tokenizer.get_vocab()[token]


def grow_merges(words: Sequence[str] = WORDS, syllables: Sequence[str] = SYLLABLES) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The byte-pair vocabulary and merges, grown rather than counted.

    First every syllable, alone and after a space; then, word by word, the first two pieces are merged until the word is one token. Earlier
    merges come first when text is tokenised, so pseudo-words fall apart into syllables and no sampling decides what a token is.

    Returns:
        Token -> id, the bytes first, and the merges in order of priority.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = {char: index for index, char in enumerate(sorted(ByteLevel.alphabet()))}
    ranks: dict[tuple[str, str], int] = {}

    def merge(left: str, right: str) -> None:
        ranks.setdefault((left, right), len(ranks))
        vocabulary.setdefault(left + right, len(vocabulary))

    for syllable in syllables:
        merge(*syllable)
    for syllable in syllables:
        merge(SPACE, syllable)
    spaced = [SPACE + word for word in dict.fromkeys(words)]
    for word in (*spaced, *OPENERS):
        while len(pieces := split_pieces(word, ranks)) > 1:
            merge(pieces[0], pieces[1])
    return vocabulary, list(ranks)


def split_pieces(word: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """The byte-pair pieces of one word: the earliest merge that applies, again and again."""
    pieces = list(word)
    while True:
        known = [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]
        if not known:
            return pieces
        _, i = min(known)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
