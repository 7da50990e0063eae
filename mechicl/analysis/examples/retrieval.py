"""Examples chosen by likeness: the most similar items of a pool, the least similar, or any at random."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from mechicl.analysis.feed import progress_bar
from mechicl.errors import ContextLengthError, EpisodeError, ImageError, OptionError, RenderError
from mechicl.models.embeddings import Embedder, Embeddings, OwnEmbedder
from mechicl.prompts.episode import Shot

By = Literal["most similar", "random", "least similar"]

REFUSALS = (RenderError, ContextLengthError, ImageError, EpisodeError)
"""What leaves a single item out, by name, instead of ending a run."""
CHUNK = 32
"""Items embedded between two steps of the progress bar."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """For each query the chosen items of the pool, the best match first, and how alike they are (cosine); both [query, k]."""

    rows: Int[np.ndarray, "query k"]
    similarity: Float[np.ndarray, "query k"]


def embed(source: Any, shots: Sequence[Shot], *, what: str = "embedding items", progress: bool = False) -> Embeddings:
    """Vectors of items.

    Args:
        source: A model (its own embeddings are used), an `Embedder` such as `mechicl.models.embeddings.load_clip(folder)`, or ready `Embeddings`,
            or an array [n, d] (then `shots` only says how many there must be).
        shots: The items; their labels are not read.
        what: Title of the progress bar.
        progress: Show one.

    Raises:
        EpisodeError: no items, or not as many rows as items.
    """
    found, reasons = embed_usable(source, shots, what=what, progress=progress)
    bad = next((k for k, reason in enumerate(reasons) if reason), None)
    if bad is not None:
        raise EpisodeError(f"every item must be embeddable; item {shots[bad].item or bad} is not ({reasons[bad]}). Leave it out.")
    return found


def embed_usable(
    source: Any, shots: Sequence[Shot], *, what: str = "embedding items", progress: bool = False
) -> tuple[Embeddings, list[str]]:
    """`embed` where an item that cannot be embedded (a control token in its text, a damaged picture) costs itself only.

    Returns:
        Vectors, zeros for such items; for each item why it has none ("": it has).

    Raises:
        EpisodeError: no items, not as many rows as items, or none that can be embedded.
    """
    if isinstance(source, np.ndarray):
        source = Embeddings(source.astype(np.float64), np.zeros((len(source), 0)), "given array")
    if isinstance(source, Embeddings):
        if len(source) != len(shots):
            raise EpisodeError(f"embeddings must be one row per item ({len(shots)}); got {len(source)}. Embed these very items.")
        return source, [""] * len(shots)
    if not shots:
        raise EpisodeError("shots must be a non-empty list; got none. Give the items to embed.")
    embedder: Embedder = source if not hasattr(source, "render") else OwnEmbedder(source)
    reasons, parts, bar = [""] * len(shots), [], progress_bar(None, total=len(shots), what=what, show=progress)
    for start in range(0, len(shots), CHUNK):
        chunk = shots[start : start + CHUNK]
        try:
            parts.append(embedder(chunk))
        except REFUSALS:
            parts += [_alone(embedder, shot, start + k, reasons) for k, shot in enumerate(chunk)]
        bar.update(len(chunk))
    bar.close()
    if all(reasons):
        raise EpisodeError(
            f"at least one item must be embeddable; none of {len(shots)} is ({reasons[0]}). Give items with pictures or texts."
        )
    return _join(parts), reasons


def _alone(embedder: Embedder, shot: Shot, k: int, reasons: list[str]) -> Embeddings:
    try:
        return embedder([shot])
    except REFUSALS as error:
        reasons[k] = str(error)
        return Embeddings(np.zeros((1, 0)), np.zeros((1, 0)))


def _join(parts: Sequence[Embeddings]) -> Embeddings:
    def column(name: str) -> np.ndarray:
        blocks = [getattr(part, name) for part in parts]
        width = max(block.shape[1] for block in blocks)  # 0 in a part where no item has a picture (or a text)
        return np.concatenate([block if block.shape[1] else np.zeros((len(block), width)) for block in blocks])

    return Embeddings(column("image"), column("text"), next((part.source for part in parts if part.source), ""))


def similarities(queries: Embeddings, pool: Embeddings, *, text: float = 0.5, centre: bool = True) -> Float[np.ndarray, "query item"]:
    """How alike queries and items are: cosine of the pictures and cosine of the texts, weighted; where a pair lacks one of the two, the other alone.

    With equal weights this is the cosine of [text; image], two unit vectors put end to end.

    Args:
        queries, pool: Of one source.
        text: Weight of the text, 0 to 1; the picture has the rest.
        centre: Take the pool's mean off first: what all items share says nothing about likeness, and can be most of a vector.

    Returns:
        In [-1, 1]; 0 where nothing can be compared.

    Raises:
        OptionError: a weight out of range, or embeddings of different widths.
    """
    if not 0 <= text <= 1:
        raise OptionError(f"text must be between 0 and 1; got {text}. It is the text's weight beside the picture's.")
    total = weight = np.zeros((len(queries), len(pool)))
    for name, share in (("image", 1 - text), ("text", text)):
        a, b = getattr(queries, name), getattr(pool, name)
        if not a.shape[1] or not b.shape[1]:
            continue
        if a.shape[1] != b.shape[1]:
            raise OptionError(
                f"queries and pool must be embedded alike; got {name} vectors of {a.shape[1]} and {b.shape[1]}. Use one source."
            )
        has_a, has_b = np.abs(a).sum(1) > 0, np.abs(b).sum(1) > 0
        mean = b[has_b].mean(0) if centre and has_b.sum() > 1 else 0.0
        both = np.outer(has_a, has_b)
        total = total + share * both * (_unit(a - mean) @ _unit(b - mean).T)
        weight = weight + share * both
    return np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)


def _unit(x: np.ndarray) -> np.ndarray:
    size = np.linalg.norm(x, axis=1, keepdims=True)
    return np.divide(x, size, out=np.zeros_like(x), where=size > 1e-12)


def choose(
    similarity: Float[np.ndarray, "query item"],
    k: int,
    by: By = "most similar",
    *,
    seed: int = 0,
    forbidden: Bool[np.ndarray, "query item"] | None = None,
) -> Chosen:
    """k items of the pool for every query, none twice.

    Args:
        similarity: From `similarities`.
        k: How many.
        by: "most similar", "least similar", or "random". Equal similarity is decided by a seeded coin.
        seed: Decides; what is drawn for a query depends on the seed and its row only.
        forbidden: Pairs that must not be (the query itself, see `same_items`).

    Raises:
        OptionError: `by` does not exist, or fewer than k items are allowed to a query.
    """
    if by not in get_args(By):
        raise OptionError(f"by must be one of {', '.join(get_args(By))}; got {by!r}. Pick one of them.")
    n, m = similarity.shape
    shut = np.zeros((n, m), dtype=bool) if forbidden is None else forbidden
    left = int((~shut).sum(1).min()) if n else m
    if not 1 <= k <= left:
        raise OptionError(f"k must be in 1..{left}, the items that every query may be shown; got {k}. Enlarge the pool, or show fewer.")
    rows = np.empty((n, k), dtype=np.int64)
    for i in range(n):
        coin = np.random.default_rng([seed, 5, i]).random(m)
        key = coin if by == "random" else similarity[i] if by == "least similar" else -similarity[i]
        rows[i] = np.lexsort((coin, np.where(shut[i], np.inf, key)))[:k]
    return Chosen(rows, np.take_along_axis(similarity, rows, 1))


def retrieve(
    model: Any,
    queries: Sequence[Shot],
    pool: Sequence[Shot],
    k: int = 4,
    by: By = "most similar",
    *,
    embeddings: Any = None,
    text: float = 0.5,
    seed: int = 0,
    progress: bool = True,
) -> Chosen:
    """k items of the pool for every query, which is never shown itself.

    Args:
        model: Whose own embeddings tell likeness, where `embeddings` does not.
        queries, pool: Items.
        k: How many.
        by: "most similar", "random" or "least similar".
        embeddings: An `Embedder`, or (queries, pool), two arrays or two `Embeddings`.
        text: Weight of the text beside the picture.
        seed: Decides ties and random items.
        progress: Show bars.

    Raises:
        EpisodeError: no items, or items with neither picture nor text.
        OptionError: an option out of range, or too few items.
    """
    given = embeddings if isinstance(embeddings, tuple) else (embeddings if embeddings is not None else model,) * 2
    one = embed(given[0], queries, what="embedding queries", progress=progress)
    two = embed(given[1], pool, what="embedding the pool", progress=progress)
    return choose(similarities(one, two, text=text), k, by, seed=seed, forbidden=same_items(queries, pool))


def same_items(queries: Sequence[Shot], pool: Sequence[Shot]) -> Bool[np.ndarray, "query item"]:
    """Pairs that are one and the same item: the same text with the same pixels."""
    one, two = ([_content(shot) for shot in shots] for shots in (queries, pool))
    numbers = {key: k for k, key in enumerate(dict.fromkeys([*one, *two]))}
    return np.array([numbers[key] for key in one])[:, None] == np.array([numbers[key] for key in two], dtype=int)[None, :]


def _content(shot: Shot) -> tuple[object, ...]:
    return shot.text, *((image.size, image.mode, hashlib.sha256(image.tobytes()).digest()) for image in shot.images)
