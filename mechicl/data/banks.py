"""Banks of pictures, many of each class, that serve as the second modality of toy sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechicl.errors import ImageError, OptionError


@dataclass(frozen=True, eq=False)
class ImageBank:
    """Pictures of classes.

    Attributes:
        images: M pictures of each of K classes; uint8 (0..255) or float (0..1).
        names: A name for each class.
        shift: A drawn picture is moved by up to this many pixels each way, its border repeated.

    Raises:
        ImageError: not [K, M, C, H, W], not finite, out of range, or not one name for each class.
    """

    images: Tensor
    names: tuple[str, ...] = ()
    shift: int = 2
    _kept: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        images = self.images
        if images.dim() != 5 or 0 in images.shape:
            raise ImageError(f"images must be [class, picture, channel, height, width]; got shape {tuple(images.shape)}. Stack them.")
        if images.dtype != torch.uint8 and not (images.is_floating_point() and bool(((images >= 0) & (images <= 1)).all())):
            raise ImageError(f"images must be uint8, or floats in 0..1; got {images.dtype} outside them. Divide by 255.")
        if self.names and len(self.names) != len(images):
            raise ImageError(f"names must be one for each of {len(images)} classes; got {len(self.names)}. Leave them out, or name each.")
        if not 0 <= self.shift < min(images.shape[-2:]):
            raise OptionError(f"shift must be 0 or more and less than the pictures' side; got {self.shift}. 2 is much for 28 pixels.")

    @property
    def n_classes(self) -> int:
        """K, classes."""
        return self.images.shape[0]

    @property
    def n_each(self) -> int:
        """M, pictures of each class."""
        return self.images.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width)."""
        return tuple(self.images.shape[2:])

    @cached_property
    def _framed(self) -> Tensor:
        """[class * picture, channel, down, right, height, width]: every picture moved every way, as a view of pictures with a border."""
        *_, height, width = self.images.shape
        s = self.shift
        rows, columns = (torch.arange(-s, side + s).clamp(0, side - 1) for side in (height, width))
        framed = self.images.flatten(0, 1)[:, :, rows][:, :, :, columns]
        return framed.unfold(2, height, 1).unfold(3, width, 1)

    def _on(self, device: torch.device) -> Tensor:
        name = str(device)
        if name not in self._kept:
            self._kept[name] = self._framed.to(device) if device.type == "cpu" else self._moved(device)
        return self._kept[name]

    def _moved(self, device: torch.device) -> Tensor:
        """The view again on another device (moving a view would write out every shift)."""
        return ImageBank(self.images.to(device), self.names, self.shift)._framed

    def draw(self, classes: Int[Tensor, "*many"], generator: torch.Generator, *, noise: float = 0.0) -> Float[Tensor, "*many c h w"]:
        """A random picture of every class asked for, moved a little, with normal noise on every pixel.

        Args:
            classes: Numbers of classes.
            generator: Decides pictures, moves and noise; lives where `classes` do.
            noise: Standard deviation, as a share of the full range.

        Returns:
            Pictures in [0, 1] before the noise.
        """
        device, flat = classes.device, classes.flatten()
        coins = torch.rand(3, len(flat), generator=generator, device=device)
        ways = 2 * self.shift + 1
        which = flat * self.n_each + (coins[0] * self.n_each).long()
        down, right = (coins[1] * ways).long(), (coins[2] * ways).long()
        pictures = self._on(device)[which, :, down, right]
        values = pictures.float().div_(255) if pictures.dtype == torch.uint8 else pictures.float()
        if noise > 0:
            values.add_(torch.randn(values.shape, generator=generator, device=device), alpha=noise)
        return values.view(*classes.shape, *self.shape)


Bank = ImageBank


def concept_bank(K: int, M: int = 16, size: int = 28, seed: int = 0) -> ImageBank:
    """M pictures of each of K procedural concepts (see `mechicl.data.concepts`), in colour, about 0.1 ms a picture.

    Args:
        K: Classes; the seed decides which of those for training.
        M: Pictures of each.
        size: Side, pixels.
        seed: Decides classes and pictures.

    Raises:
        OptionError: more classes than there are, or a picture of fewer than 8 pixels.
    """
    from mechicl.data import concepts

    pool = concepts.class_ids("train")
    if not 1 <= K <= len(pool) or M < 1:
        raise OptionError(f"K must be 1..{len(pool)} and M at least 1; got {K} and {M}. Ask for fewer classes.")
    order = np.random.default_rng([11, seed])
    ids = order.choice(pool, K, replace=False)
    pictures = concepts.draw_pictures(np.repeat(ids, M), size, order)
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).reshape(K, M, 3, size, size).contiguous()
    return ImageBank(images, tuple(f"{concepts.kind_of(int(i))}-{int(i)}" for i in ids))


@lru_cache(maxsize=2)
def digit_bank(size: int = 16) -> ImageBank:
    """The ten handwritten digits of scikit-learn, 174 scans of each (the first ones; the least frequent digit has no more), white on black, one channel.

    Args:
        size: Side, pixels.
    """
    from mechicl.data import digits

    scans, shown = digits.scans()
    least = int(np.bincount(shown).min())
    rows = [[digits.enlarge(scan, size) for scan in scans[shown == digit][:least]] for digit in range(10)]
    images = torch.from_numpy(np.round(255 * np.clip(np.array(rows), 0, 1)).astype(np.uint8))[:, :, None]
    return ImageBank(images, tuple(f"digit-{k}" for k in range(10)), shift=1)


_REGISTERED: dict[str, ImageBank] = {}


def register(name: str, bank: ImageBank) -> None:
    """Make a bank known to tasks of this process under `second=name`; a process of its own (a worker) must register it again.

    Raises:
        OptionError: a name that mechicl gives itself, or another bank already under it.
    """
    if name.split(":")[0] in ("gaussian", *_BUILT_IN):
        raise OptionError(f"name must not be gaussian, {', '.join(_BUILT_IN)}; got {name!r}. Choose another.")
    if _REGISTERED.get(name, bank) is not bank:  # a task's world is remembered: its name must not change its meaning
        raise OptionError(f"name must be new; got {name!r}, which is another bank. Choose another.")
    _REGISTERED[name] = bank


def bank_for(name: str, need: int, seed: int) -> ImageBank:
    """The bank that a task names.

    Args:
        name: "concepts", "digits", "omniglot:FOLDER" or a registered name.
        need: Classes that the task needs; concepts are painted on demand.
        seed: The task's; decides the concepts.

    Raises:
        OptionError: there is no such bank.
        ImageError: a folder that is not a usable bank.
    """
    kind, _, rest = name.partition(":")
    if name in _REGISTERED:
        return _REGISTERED[name]
    if kind in _BUILT_IN:
        return _BUILT_IN[kind](rest, need, seed)
    known = ", ".join(["gaussian", "concepts", "digits", "omniglot:FOLDER", *_REGISTERED])
    raise OptionError(f"second must be one of {known}; got {name!r}. Register your own bank with mechicl.data.banks.register.")


def _omniglot(folder: str) -> ImageBank:
    from mechicl.data.omniglot import omniglot_bank

    if not folder:
        raise OptionError("second must name a folder after omniglot:; got none. Write omniglot:FOLDER.")
    return omniglot_bank(folder)


_BUILT_IN: dict[str, Callable[[str, int, int], ImageBank]] = {
    "concepts": lambda rest, need, seed: concept_bank(need, seed=seed),
    "digits": lambda rest, need, seed: digit_bank(),
    "omniglot": lambda rest, need, seed: _omniglot(rest),
}
