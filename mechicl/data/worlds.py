"""The fixed part of a task: class means and label vectors, decided by its seed alone, and the tables that sequences are read from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechicl.data.banks import Bank, bank_for
from mechicl.data.chances import frequencies
from mechicl.data.toy_tasks import MultimodalTask, Task, UnimodalTask
from mechicl.errors import OptionError


def table_seed(seed: int, table: int) -> int:
    """A seed of its own for every table, far from the small numbers that callers seed their generators with (the same seed would give the same
    random numbers, and noise that repeats the label vectors)."""
    return int(np.random.SeedSequence([0x6D656368, seed, table]).generate_state(1, np.uint64)[0] >> 1)


def _normal(rows: int, width: int, seed: int, table: int) -> Float[Tensor, "rows width"]:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(table_seed(seed, table))) / width**0.5


@dataclass(frozen=True, eq=False)
class World:
    """What is the same in every sequence of a run. Vectors are N(0, I / D).

    Attributes:
        labels: Label vectors.
        means: Class means of the items that are tokens.
        means2: Class means of the second modality; None without one, and for pictures.
        bank: The pictures of the second modality; None without.
        order2: Which class of the bank is class 0, 1, ... of modality 2; those from K2 on are held out.
    """

    labels: Float[Tensor, "label d"]
    means: Float[Tensor, "cls d"]
    means2: Float[Tensor, "cls2 d2"] | None = None
    bank: Bank | None = None
    order2: Int[Tensor, " banked"] | None = None


@lru_cache(maxsize=64)
def world(task: Task) -> World:
    """The world of a task.

    A unimodal and a multimodal task of the same seed, L, K and D share labels and class means, so that a decoder trained on the one knows the other.

    Raises:
        OptionError: a bank of pictures with too few classes.
    """
    items = task.n_items
    labels, means = _normal(task.L, task.width, task.seed, 0), _normal(items, task.width, task.seed, 1)
    if isinstance(task, UnimodalTask):
        return World(labels, means)
    if task.second == "gaussian":
        return World(labels, means, _normal(task.K2, task.D2, task.seed, 2))
    need = task.K2 + task.novel2
    bank = bank_for(task.second, need, task.seed)
    if bank.n_classes < need:
        raise OptionError(
            f"K2 plus the novel classes must be at most the {bank.n_classes} classes of the bank {task.second!r}; got {task.K2} + {task.novel2}. "
            "Lower K2, L2 or n_novel, or use a larger bank."
        )
    order = torch.randperm(bank.n_classes, generator=torch.Generator().manual_seed(table_seed(task.seed, 3)))
    return World(labels, means, None, bank, order)


@dataclass(frozen=True, eq=False)
class Tables:
    """Worlds of one or several tasks, ready to be read by row. M is the number of tasks.

    Attributes:
        rows: For each task its label vectors, its class means (divided by the length of a noisy item) and a row of zeros, one task after the other.
        rows2: Class means of modality 2 likewise, without labels and zeros.
        cdf1, cdf2: Cumulative class frequencies, float64; None where every class is as frequent.
        within1, within2: The same within each label (or group): y plus the cumulative frequencies of its classes, label after label.
        step1, step2: Factor of standard normal noise on items.
        scale1, scale2: Factor of novel class means.
    """

    tasks: tuple[Task, ...]
    rows: Float[Tensor, "all_rows d"]
    rows2: Float[Tensor, "all_rows2 d2"] | None
    cdf1: Tensor | None
    cdf2: Tensor | None
    within1: Tensor | None
    within2: Tensor | None
    step1: tuple[float, ...]
    step2: tuple[float, ...]
    scale1: tuple[float, ...]
    scale2: tuple[float, ...]

    @property
    def n_bytes(self) -> int:
        """Memory that they take."""
        every = (self.rows, self.rows2, self.cdf1, self.cdf2, self.within1, self.within2)
        return sum(x.numel() * x.element_size() for x in every if x is not None)


def factors(eps: float, width: int) -> tuple[float, float]:
    """Of an item (mean + eps * noise / sqrt(D)) / sqrt(1 + eps^2): the factors of the mean and of standard normal noise."""
    length = (1 + eps**2) ** 0.5
    return 1 / length, eps / length / width**0.5


def parts(task: Task, modality: int) -> int:
    """Labels, or groups, that the classes of a modality are dealt to in turn."""
    if isinstance(task, UnimodalTask):
        return task.L
    if task.labels == "pair":
        return task.L if modality == 1 else task.n_labels
    return (task.G1 if modality == 1 else task.G2) or 1


KEEP = 512 * 2**20
"""Bytes of tables that are kept for the next draw; 64 tasks of 8,192 classes take 135 MB."""
_kept: dict[tuple[tuple[Task, ...], torch.device], Tables] = {}


def tables(tasks: tuple[Task, ...], device: torch.device) -> Tables:
    """Tables of tasks of one shape, side by side. They are kept, the latest used longest, up to `KEEP` bytes."""
    key = tasks, device
    found = _kept.pop(key, None) or _tables(tasks, device)
    _kept[key] = found
    room = KEEP - found.n_bytes
    for other in list(_kept)[-2::-1]:  # from the latest used to the oldest
        room -= _kept[other].n_bytes
        if room < 0:
            del _kept[other]
    return found


def _tables(tasks: tuple[Task, ...], device: torch.device) -> Tables:
    worlds = [world(task) for task in tasks]
    first = tasks[0]
    one = [factors(_eps(task, 1), task.width) for task in tasks]
    blocks = []
    for found, (scale, _) in zip(worlds, one, strict=True):
        blocks += [found.labels, found.means * scale, torch.zeros(1, first.width)]
    rows2, two = None, [(1.0, 0.0)] * len(tasks)
    if isinstance(first, MultimodalTask):
        two = [factors(_eps(task, 2), first.D2) for task in tasks]
        if first.second == "gaussian":
            rows2 = torch.cat([_means2(found) * scale for found, (scale, _) in zip(worlds, two, strict=True)]).to(device)
    exact = torch.float32 if device.type == "mps" else torch.float64

    def both(modality: int) -> tuple[Tensor | None, Tensor | None]:
        alphas = [_alpha(task, modality) for task in tasks]
        if not any(alphas):
            return None, None
        cdfs, withins = zip(
            *(_cumulative(_n_classes(task, modality), a, parts(task, modality)) for task, a in zip(tasks, alphas, strict=True)), strict=True
        )
        return torch.stack(cdfs).to(device, exact), torch.stack(withins).to(device, exact)

    cdf1, within1 = both(1)
    cdf2, within2 = both(2) if isinstance(first, MultimodalTask) else (None, None)
    return Tables(
        tasks, torch.cat(blocks).to(device), rows2, cdf1, cdf2, within1, within2, tuple(step for _, step in one), tuple(step for _, step in two),
        tuple(scale for scale, _ in one), tuple(scale for scale, _ in two),
    )  # fmt: skip


def _cumulative(n: int, alpha: float, n_parts: int) -> tuple[Tensor, Tensor]:
    p = frequencies(n, alpha)
    cdf = np.cumsum(p)
    cdf[-1] = 1.0
    grouped = p.reshape(-1, n_parts).T  # [part, class of the part]
    inside = np.cumsum(grouped / grouped.sum(1, keepdims=True), 1)
    inside[:, -1] = 1.0
    return torch.from_numpy(cdf), torch.from_numpy((inside + np.arange(n_parts)[:, None]).ravel())


def _means2(found: World) -> Tensor:
    assert found.means2 is not None
    return found.means2


def _eps(task: Task, modality: int) -> float:
    return float(task.eps if isinstance(task, UnimodalTask) else task.eps1 if modality == 1 else task.eps2)


def _alpha(task: Task, modality: int) -> float:
    return float(task.alpha if isinstance(task, UnimodalTask) else task.alpha1 if modality == 1 else task.alpha2)


def _n_classes(task: Task, modality: int) -> int:
    return task.K2 if isinstance(task, MultimodalTask) and modality == 2 else task.n_items


VARIES = ("seed", "eps", "eps1", "eps2", "alpha", "alpha1", "alpha2", "p_B", "p_C", "swap")
"""Fields in which tasks drawn together may differ."""


def check_alike(tasks: Sequence[Task]) -> None:
    """Refuse tasks that cannot be drawn together.

    Raises:
        OptionError: no tasks, or two that differ in more than `VARIES`.
    """
    if not tasks:
        raise OptionError("tasks must be at least one; got none. Give a task for each model.")
    for task in tasks[1:]:
        if type(task) is not type(tasks[0]):
            raise OptionError(f"tasks must be of one kind; got {type(tasks[0]).__name__} and {type(task).__name__}. Draw them apart.")
        for name in type(task).__dataclass_fields__:
            if name not in VARIES and getattr(task, name) != getattr(tasks[0], name):
                raise OptionError(
                    f"tasks drawn together must have the same {name}; got {getattr(tasks[0], name)!r} and {getattr(task, name)!r}. "
                    f"They may differ in {', '.join(VARIES)}; draw the others apart."
                )
