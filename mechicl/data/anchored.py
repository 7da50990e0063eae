"""Anchored-by-Text: examples made from the query itself, on the fly, with nothing but the query at hand.

The prompt of the paper (Miyanishi and Nguyen, arXiv 2408.12959) could not be read: what follows is mechicl's own reading of its description, and every
choice in it can be replaced. The query's text is the anchor. A *negative* is made that shares it: the same text beside a picture that gives it no
second meaning (plain grey, another item's, noise), or the same picture beside a text known to be benign. Query and negative are the anchored pair.

What may be told about a pair without knowing the query's answer? That the negative is negative: for a label that text and picture decide together,
taking one of them away takes the positive label away. (By construction for a grey picture; as a rule, not always, for another item's: say so where it
matters.) The query's own side has no label that may be told. A `Plan` is an answer to that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np
from PIL import Image

from mechicl.errors import EpisodeError, OptionError
from mechicl.prompts.disturb import disturb_images
from mechicl.prompts.episode import Episode, Shot
from mechicl.prompts.form import PLAIN, Form

Plan = Literal["both", "asserted", "negative", "borrowed"]
"""both: the pair [query: positive, negative: negative] in one prompt, and with its two labels exchanged in a second one; the mean of the two
log-probability differences is the score, so that copying a label from the query's own twin cancels and no answer is put in.
asserted: the first of these two prompts only. Every query is told to be positive: of use for ranking queries (AUROC), not for deciding.
negative: the negative alone, whose label is known. One label is shown, which pulls all answers to it.
borrowed: the negative of the query, and as positive side a positive item of the labelled pool. Needs a pool; both labels are known."""

HIDDEN = "?"
"""The label that makers of negatives see in place of the query's."""
GREY = (128, 128, 128)


@runtime_checkable
class Negative(Protocol):
    """Makes the negative of a query: an item that shares its text or its picture and should not have the positive label.

    `query` has the label `HIDDEN`; `others` are labelled items it may take from; `draw` is its only randomness. The label of what it returns is not
    read. None: there is none for this query.
    """

    def __call__(self, query: Shot, others: Sequence[Shot], draw: np.random.Generator, /) -> Shot | None: ...


def neutral_image(query: Shot, others: Sequence[Shot], draw: np.random.Generator, /) -> Shot | None:
    """The same text beside a plain grey picture of the same size."""
    if not query.images:
        return None
    return replace(query, images=tuple(Image.new("RGB", image.size, GREY) for image in query.images))


def noised_image(query: Shot, others: Sequence[Shot], draw: np.random.Generator, /) -> Shot | None:
    """The same text beside noise of the same size: no pixel of the picture is left."""
    if not query.images:
        return None
    bare = Episode((), query, (query.label, query.label + "'"))
    return disturb_images(bare, kind="noise", which="query", strength=1.0, seed=int(draw.integers(1 << 31))).query


def swapped_image(query: Shot, others: Sequence[Shot], draw: np.random.Generator, /) -> Shot | None:
    """The same text beside another item's picture, drawn at random. That the two do not happen to make a positive item is likely, not certain."""
    if not query.images:
        return None
    for j in draw.permutation(len(others)):
        other = others[int(j)]
        if other.images and not same_pictures(other, query):
            return replace(query, images=other.images)
    return None


def counterpart_text(benign: str) -> Negative:
    """The same picture beside the text of another item whose label is `benign`: the pair is then anchored by the picture."""

    def make(query: Shot, others: Sequence[Shot], draw: np.random.Generator, /) -> Shot | None:
        texts = [other.text for other in others if other.label == benign and other.text and other.text != query.text]
        return replace(query, text=texts[int(draw.integers(len(texts)))]) if texts and query.images else None

    return make


NEGATIVES: Mapping[str, Negative] = {"neutral": neutral_image, "noised": noised_image, "swapped": swapped_image}
"""By name; "counterpart" is `counterpart_text` of the negative label."""


def anchored(
    query: Shot,
    labels: tuple[str, str],
    *,
    negative: str | Negative | Sequence[str | Negative] = "neutral",
    plan: Plan = "both",
    others: Sequence[Shot] = (),
    positives: Sequence[Shot] = (),
    instruction: str = "",
    question: str = "",
    form: Form = PLAIN,
    seed: int = 0,
    id: str = "",  # noqa: A002  the name that Episode has
) -> list[Episode]:
    """The anchored prompt or prompts of a query, ready for any model's renderer. The query's label decides nothing but what is marked right.

    Args:
        query: Item with a text and a picture.
        labels: (negative, positive).
        negative: How the negative is made: "neutral", "noised", "swapped", "counterpart", or a function (see `Negative`). Several make several pairs.
        plan: See `Plan`.
        others: Items that "swapped", "counterpart" or a function may take from.
        positives: With plan "borrowed": positive items, the one to be shown last in front; as many as there are pairs are taken.
        instruction, question, form: As in an Episode.
        seed: Decides the order within pairs, and what makers of negatives draw.
        id: Name of the episodes.

    Returns:
        One episode, or two with plan "both", the second with its exemplars' labels exchanged.

    Raises:
        OptionError: an option that does not exist, or "borrowed" without enough positive items.
        EpisodeError: the query lacks text or picture, or a negative cannot be made, or is the query itself, or shares nothing with it.
    """
    makers = makers_of(negative, labels, plan)
    low, high = labels
    if not query.text or not query.images:
        raise EpisodeError(
            f"query {id or query.item!r} must have a text, which is the anchor, and a picture; it lacks {'a picture' if query.text else 'a text'}. "
            "Use another strategy for it."
        )
    draw = np.random.default_rng([seed, 6])
    blind = replace(query, label=HIDDEN)
    negatives = [_make(maker, blind, others, draw, id) for maker in makers]
    if plan == "borrowed" and len(positives) < len(negatives):
        raise OptionError(
            f"positives must be an item for each of {len(negatives)} pairs with plan 'borrowed'; got {len(positives)}. Give labelled positive items."
        )
    shots: list[Shot] = []
    for k, twin in enumerate(negatives):
        ours = replace(twin, label=low)
        theirs = replace(positives[len(negatives) - 1 - k] if plan == "borrowed" else blind, label=high)
        pair = [ours] if plan == "negative" else [theirs, ours]
        shots += pair if draw.random() < 0.5 else pair[::-1]
    first = Episode(tuple(shots), query, (low, high), instruction, question, id=id, form=form)
    return [first, exchanged(first)] if plan == "both" else [first]


def exchanged(episode: Episode) -> Episode:
    """The exemplars' two labels exchanged; query and answer stay."""
    low, high = episode.candidates
    shots = tuple(replace(shot, label=low if shot.label == high else high) for shot in episode.shots)
    return replace(episode, shots=shots, id=f"{episode.id} (labels exchanged)" if episode.id else "")


def same_pictures(a: Shot, b: Shot) -> bool:
    """Whether two items show the same pixels."""
    if len(a.images) != len(b.images):
        return False
    pairs = zip(a.images, b.images, strict=True)
    return all(x is y or (x.size == y.size and x.mode == y.mode and x.tobytes() == y.tobytes()) for x, y in pairs)


def makers_of(negative: str | Negative | Sequence[str | Negative], labels: tuple[str, str], plan: str) -> list[Negative]:
    """The makers of negatives, one per pair, after all that can be refused without a query.

    Raises:
        OptionError: a plan or a maker that does not exist, no maker, or labels that are not two.
    """
    if plan not in get_args(Plan):
        raise OptionError(f"plan must be one of {', '.join(get_args(Plan))}; got {plan!r}. both is the default.")
    if len(labels) != 2 or labels[0] == labels[1]:
        raise OptionError(f"labels must be (negative, positive), two different words; got {labels}. Give both.")
    makers = [negative] if isinstance(negative, str) or callable(negative) else list(negative)
    if not makers:
        raise OptionError("negative must be at least one maker of negatives; got none. neutral needs nothing.")
    return [_named(maker, labels[0]) for maker in makers]


def _named(maker: str | Negative, low: str) -> Negative:
    if not isinstance(maker, str):
        return maker
    if maker == "counterpart":
        return counterpart_text(low)
    if maker not in NEGATIVES:
        raise OptionError(
            f"negative must be one of {', '.join([*NEGATIVES, 'counterpart'])}, or a function; got {maker!r}. neutral needs nothing."
        )
    return NEGATIVES[maker]


def _make(maker: Negative, blind: Shot, others: Sequence[Shot], draw: np.random.Generator, name: str) -> Shot:
    made = maker(blind, others, draw)
    title = name or blind.item
    if made is None:
        raise EpisodeError(f"query {title!r} must have a negative; none could be made. Give other items to take from, or another maker.")
    if not isinstance(made, Shot):
        raise EpisodeError(f"a maker of negatives must return a Shot or None; got {type(made).__name__}. Return an item.")
    text, pictures = made.text == blind.text, same_pictures(made, blind)
    if text == pictures:
        what = "is the query itself" if text else "shares neither text nor picture with it"
        raise EpisodeError(f"the negative of query {title!r} must share its text or its picture, not both; it {what}. Check the maker.")
    return replace(made, item=f"{blind.item} (negative)") if made.item == blind.item and made.item else made
