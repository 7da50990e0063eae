"""Classes of pictures for link-context learning: names with their pictures, in memory or on disk."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from PIL import Image

from mechicl.data.memes_check import MAX_PIXELS, open_picture
from mechicl.errors import OptionError

Kind = Literal["", "real", "unreal"]
Labels = Literal["letters", "syllables"]
"""letters: random strings, as published. syllables: pronounceable ones as long as the other class's name, for models that know syllables only."""


@dataclass(frozen=True, eq=False)
class LinkClass:
    """A class and its pictures.

    Attributes:
        name: What it is called. Two classes may share a name (two cranes): they never meet in one episode.
        images: Pictures in memory, or files that are read when they are needed.
        key: Tells classes apart, e.g. a folder's name; the name by default.
        kind: "unreal" for a concept that nobody has met, "real" for the known one it resembles, "" where that is not said.
        group: What partners have in common; "" without.
    """

    name: str
    images: tuple[Path | Image.Image, ...]
    key: str = ""
    kind: Kind = ""
    group: str = ""

    def __post_init__(self) -> None:
        if not self.name.strip() or self.name != self.name.strip():
            raise OptionError(f"name must be a word or words without spaces around; got {self.name!r}. Give each class its name.")
        if not self.images:
            raise OptionError(f"images must be at least one picture; class {self.name!r} has none. Leave it out.")
        if not self.key:
            object.__setattr__(self, "key", self.name)


@dataclass(frozen=True, eq=False)
class Pool:
    """Classes that episodes are drawn from.

    Attributes:
        classes: In order; keys differ.
        size: Pictures read from files are shrunk until no side is longer, pixels; None leaves them as they are.
        max_pixels: Larger files are refused before they are unpacked.
        title: Where the classes come from.
        labels: What a class is renamed to in an episode; see `Labels`.
    """

    classes: tuple[LinkClass, ...]
    size: int | None = None
    max_pixels: int = MAX_PIXELS
    title: str = "pool"
    labels: Labels = "letters"
    _at: dict[str, int] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise OptionError(f"classes must be at least two; got {len(self.classes)}. A link is learned against another class.")
        for number, one in enumerate(self.classes):
            if one.key in self._at:
                raise OptionError(f"keys of classes must differ; {one.key!r} is there twice. Give key= to classes of one name.")
            self._at[one.key] = number

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, key: str) -> LinkClass:
        """The class of a key.

        Raises:
            OptionError: there is none.
        """
        if key not in self._at:
            raise OptionError(f"key must be of a class of the pool; got {key!r}. It holds {_some(self.keys)}.")
        return self.classes[self._at[key]]

    @property
    def keys(self) -> tuple[str, ...]:
        """The classes' keys, in order."""
        return tuple(self._at)

    @property
    def partners(self) -> tuple[tuple[str, str], ...]:
        """(unreal key, real key) of every group that has both."""
        real: dict[str, str] = {}
        for one in self.classes:
            if one.kind == "real":
                real.setdefault(one.group, one.key)
        return tuple((one.key, real[one.group]) for one in self.classes if one.kind == "unreal" and one.group in real)

    def picture(self, key: str, number: int) -> Image.Image:
        """A picture of a class, its pixels in memory.

        Raises:
            ImageError: the file cannot be read, or is too large.
        """
        found = self[key].images[number]
        return found if isinstance(found, Image.Image) else open_picture(found, max_pixels=self.max_pixels, size=self.size)

    def take(self, keys: Iterable[str]) -> Pool:
        """Some classes, in the order of `keys`.

        Raises:
            OptionError: a class that is not there, or fewer than two.
        """
        return replace(self, classes=tuple(self[key] for key in keys))

    def split(self, keys: Collection[str]) -> tuple[Pool, Pool]:
        """Two pools: the classes `keys`, and all others.

        Raises:
            OptionError: a class that is not there, or fewer than two on either side.
        """
        for key in keys:
            self[key]
        return self.take(key for key in self.keys if key in keys), self.take(key for key in self.keys if key not in keys)

    def split_groups(self, share: float = 0.5, *, seed: int = 0) -> tuple[Pool, Pool]:
        """Two pools with no group, and so no pair of partners, on both sides: about `share` of the groups, and the others.

        Raises:
            OptionError: fewer than two groups, or a share that leaves a side empty.
        """
        import numpy as np

        groups = list(dict.fromkeys(one.group or one.key for one in self.classes))
        n = round(share * len(groups))
        if not 0 < n < len(groups):
            raise OptionError(f"share must leave groups on both sides; got {share} of {len(groups)} groups. Take another share.")
        first = {groups[int(i)] for i in np.random.default_rng([seed, 23]).permutation(len(groups))[:n]}
        return self.split({one.key for one in self.classes if (one.group or one.key) in first})


def _some(keys: tuple[str, ...], n: int = 8) -> str:
    return ", ".join(keys[:n]) + (f" and {len(keys) - n} more" if len(keys) > n else "")
