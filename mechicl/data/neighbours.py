"""Which classes are hard to tell from a class: similarity of names and pictures, ranked and cut into intervals.

Vectors come from anybody: a CLIP-type model, a vision-language model's own tower (`mechicl.analysis.link.neighbours` reads both), or the user's arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from mechicl.errors import NotFiniteError, OptionError

WEIGHTS = (0.5, 0.8, 0.5)
"""Of text-text, of image-text plus text-image, and of image-image, as published."""
N_INTERVALS = 100
"""Of the paper. The authors' files have 36."""


@dataclass(frozen=True, eq=False)
class Neighbours:
    """How alike classes are, and for each class all others from the most similar to the least.

    Attributes:
        keys: Keys of the classes, in order.
        similarity: Symmetric; the diagonal is not read.
        n_intervals: Intervals that a ranking is cut into, as even as can be; never more than there are other classes.
        source: Who made the vectors.
    """

    keys: tuple[str, ...]
    similarity: Float[np.ndarray, "cls cls"]
    n_intervals: int = N_INTERVALS
    source: str = ""
    ranking: Int[np.ndarray, "cls rank"] = field(init=False)

    def __post_init__(self) -> None:
        n = len(self.keys)
        if n < 2 or len(set(self.keys)) != n or self.similarity.shape != (n, n):
            raise OptionError(
                f"keys must be different, two at least, one for each row of similarity; got {n} and {self.similarity.shape}. Match them."
            )
        if self.n_intervals < 1:
            raise OptionError(f"n_intervals must be at least 1; got {self.n_intervals}. The paper has 100.")
        if not np.isfinite(self.similarity).all():
            raise NotFiniteError("similarity must be finite; got NaN or infinity. Check the vectors.")
        masked = self.similarity.astype(np.float64)
        np.fill_diagonal(masked, -np.inf)
        order = np.argsort(-masked, axis=1, kind="stable")[:, : n - 1]
        object.__setattr__(self, "ranking", order)

    @property
    def n(self) -> int:
        """Intervals that there are: `n_intervals`, or the number of other classes where that is smaller."""
        return min(self.n_intervals, len(self.keys) - 1)

    def interval(self, row: int, j: int) -> Int[np.ndarray, " n"]:
        """Classes of interval j (1: the most similar ones) of class `row`.

        Raises:
            OptionError: there is no such interval.
        """
        if not 1 <= j <= self.n:
            raise OptionError(f"j must be in 1..{self.n}; got {j}. 1 holds the most similar classes.")
        return np.array_split(self.ranking[row], self.n)[j - 1]

    def drawn(self, row: int, seed: int) -> Int[np.ndarray, " interval"]:
        """One class from every interval of class `row`: the list of neighbours that its negatives are then drawn from."""
        draw = np.random.default_rng([seed, 29, row])
        return np.array([part[draw.integers(len(part))] for part in np.array_split(self.ranking[row], self.n)])

    def listed(self, seed: int) -> Int[np.ndarray, "cls interval"]:
        """`drawn` of every class."""
        return np.stack([self.drawn(row, seed) for row in range(len(self.keys))])

    def take(self, keys: Iterable[str]) -> Neighbours:
        """The same for some of the classes, ranked anew among themselves.

        Raises:
            OptionError: a class that is not there.
        """
        wanted = tuple(keys)
        if wanted == self.keys:
            return self
        at = {key: number for number, key in enumerate(self.keys)}
        missing = [key for key in wanted if key not in at]
        if missing:
            raise OptionError(f"keys must be classes that were compared; {missing[0]!r} was not. Compare the pool that you draw from.")
        rows = [at[key] for key in wanted]
        return Neighbours(wanted, self.similarity[np.ix_(rows, rows)], self.n_intervals, self.source)


def rank_chances(n: int) -> Float[np.ndarray, " interval"]:
    """p_j = (n + 1 - j) / sum of 1..n: the chance of the neighbour from interval j = 1..n. With n = 100: (101 - j) / 5050.

    Raises:
        OptionError: n below 1.
    """
    if n < 1:
        raise OptionError(f"n must be at least 1; got {n}. There must be another class.")
    falling = np.arange(n, 0, -1, dtype=np.float64)
    return falling / falling.sum()


def similarity(
    image: Float[np.ndarray, "cls d_image"],
    text: Float[np.ndarray, "cls d_text"],
    *,
    weights: tuple[float, float, float] = WEIGHTS,
    centre: bool = False,
) -> Float[np.ndarray, "cls cls"]:
    """S = w0 tt + w1 (it + ti) + w2 ii, each a cosine.

    Args:
        image: Mean vector of each class's pictures.
        text: Vector of each class's name.
        weights: Of names with names, of pictures with names (both ways), of pictures with pictures. A weight of 0 leaves its vectors unread.
        centre: Take the mean over classes off pictures and names first. Not published; of use where all vectors of a model share a large part.

    Raises:
        OptionError: not one row per class, vectors of zero length, or pictures and names in spaces of different width (then no picture can be
            compared with a name: set the middle weight to 0).
        NotFiniteError: NaN or infinity.

    Source:
        Tai et al. 2024, released code: weights .5, .8, .5 on normalised vectors of class means and names.
    """
    tt, cross, ii = weights
    if len(image) != len(text):
        raise OptionError(f"image and text must have a row for each class; got {len(image)} and {len(text)}. Match them.")
    if cross and image.shape[1] != text.shape[1]:
        raise OptionError(
            f"pictures and names must be vectors of one space to be compared; got widths {image.shape[1]} and {text.shape[1]}. "
            "Use a CLIP-type model, or weights=(0.5, 0, 0.5)."
        )
    total = np.zeros((len(image), len(image)))
    seen = _unit(image, "image", centre) if cross or ii else None
    said = _unit(text, "text", centre) if cross or tt else None
    if said is not None:
        total += tt * said @ said.T
    if seen is not None:
        total += ii * seen @ seen.T
    if seen is not None and said is not None and cross:
        it = seen @ said.T
        total += cross * (it + it.T)
    return total


def _unit(rows: np.ndarray, name: str, centre: bool) -> np.ndarray:
    rows = rows.astype(np.float64)
    if not np.isfinite(rows).all():
        raise NotFiniteError(f"{name} must be finite; got NaN or infinity. Check the model that made the vectors.")
    if centre:
        rows = rows - rows.mean(0)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    if (length == 0).any():
        raise OptionError(
            f"{name} must have no vector of length zero; row {int(np.argmin(length))} has. Leave that class out, or its weight."
        )
    return rows / length


def neighbours(
    keys: Sequence[str],
    image: Float[np.ndarray, "cls d_image"],
    text: Float[np.ndarray, "cls d_text"],
    *,
    weights: tuple[float, float, float] = WEIGHTS,
    centre: bool = False,
    n_intervals: int = N_INTERVALS,
    source: str = "given arrays",
) -> Neighbours:
    """Classes ranked by `similarity` of their vectors; see there for what is raised."""
    return Neighbours(tuple(keys), similarity(image, text, weights=weights, centre=centre), n_intervals, source)
