"""Which classes, in which slots: the discrete part of a draw, from uniform coins to slots, for several tasks at once.

Every sequence has its row of coins and uses the same number of them whatever it turns out to be, so that nothing depends on what else is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechicl.data.toy_tasks import MultimodalTask, Split, Task, UnimodalTask
from mechicl.data.worlds import Tables, parts


@dataclass(frozen=True, eq=False)
class Chosen:
    """Classes and labels of all slots. Novel classes count from K on; `novel` is None where no sequence can be novel."""

    item: Int[Tensor, "model n slot"]
    query: Int[Tensor, "model n"]
    label: Int[Tensor, "model n slot"]
    target: Int[Tensor, "model n"]
    item2: Int[Tensor, "model n slot"] | None = None
    query2: Int[Tensor, "model n"] | None = None
    novel: Bool[Tensor, "model n"] | None = None


def n_coins(task: Task) -> int:
    """Coins of a sequence: classes, order, the query's slot or class, bursty or not, novel or not, and keys that put labels in random order."""
    if isinstance(task, UnimodalTask):
        return 2 * task.N + 4 + (task.L if task.no_repeats else 0)
    keys = (task.G1 or 0) + (task.G2 or 0) if task.labels == "crossed" else task.n_labels if task.no_repeats else 0
    return 3 * task.N + 5 + keys + (task.N + 2 if task.m1_query == "mismatched" else 0)


class Coins:
    """A row of coins, handed out from the left."""

    coins: Tensor

    def __init__(self, coins: Tensor) -> None:
        self.coins, self.used = coins, 0

    def take(self, k: int) -> Tensor:
        """The next k coins of every sequence, [model, n, k]."""
        self.used += k
        return self.coins[..., self.used - k : self.used]


@dataclass(frozen=True, eq=False)
class Classes:
    """The classes of one modality: n of them, dealt to `parts` labels (or groups) in turn, `offset` added to their numbers."""

    n: int
    parts: int
    cdf: Tensor | None = None
    inside: Tensor | None = None
    offset: int = 0

    def pick(self, u: Float[Tensor, "model n k"]) -> Int[Tensor, "model n k"]:
        """A class for every coin, by frequency."""
        if self.cdf is None:
            return (u * self.n).long() + self.offset
        found = torch.searchsorted(self.cdf, u.flatten(1).contiguous(), right=True).clamp_max(self.n - 1)
        return found.view(u.shape) + self.offset

    def of(self, part: Int[Tensor, "model n k"], u: Float[Tensor, "model n k"]) -> Int[Tensor, "model n k"]:
        """A class of the given label (or group) for every coin, by frequency among these."""
        each = self.n // self.parts
        if self.inside is None:
            return part + self.parts * (u * each).long() + self.offset
        found = torch.searchsorted(self.inside, (part + u).flatten(1).contiguous(), right=True).view(u.shape)
        return part + self.parts * (found - part * each).clamp(0, each - 1) + self.offset


def known_classes(found: Tables, modality: int) -> Classes:
    """The task's own classes of a modality."""
    task = found.tasks[0]
    n = task.K2 if isinstance(task, MultimodalTask) and modality == 2 else task.n_items
    cdf, inside = (found.cdf1, found.within1) if modality == 1 else (found.cdf2, found.within2)
    return Classes(n, parts(task, modality), cdf, inside)


def novel_classes(task: Task, modality: int) -> Classes:
    """The novel classes of a draw, numbered after the task's own, all as frequent."""
    if isinstance(task, MultimodalTask) and modality == 2:
        return Classes(task.novel2, parts(task, 2), offset=task.K2)
    return Classes(task.novel, parts(task, 1), offset=task.n_items)


@dataclass(frozen=True, eq=False)
class _Kinds:
    """Which sequences are novel, and which are loose (items and query independent); None: no sequence, True: every one."""

    novel: Tensor | bool | None
    loose: Tensor | bool | None


def choose(found: Tables, coins: Float[Tensor, "model n coin"], split: Split) -> Chosen:
    """From coins to classes, labels and target."""
    task, row = found.tasks[0], Coins(coins)
    kinds = _kinds(found.tasks, row, split)
    chosen = _unimodal(found, row, kinds) if isinstance(task, UnimodalTask) else _multimodal(found, task, row, kinds)
    assert row.used == coins.shape[-1]
    item, query, item2, query2, label, target = chosen
    shift = [{"ic": 0, "ic2": 1 + one.swap}.get(split, int(one.swap)) for one in found.tasks]
    if any(shift):
        by = torch.tensor(shift, device=coins.device)
        label, target = (label + by[:, None, None]) % task.n_labels, (target + by[:, None]) % task.n_labels
    every = torch.ones(coins.shape[:2], dtype=torch.bool, device=coins.device) if kinds.novel is True else kinds.novel
    return Chosen(item, query, label, target, item2, query2, every if isinstance(every, Tensor) else None)


def _kinds(tasks: tuple[Task, ...], row: Coins, split: Split) -> _Kinds:
    for_novel, for_loose = row.take(1)[..., 0], row.take(1)[..., 0]
    if split == "ic":
        return _Kinds(True, None)
    if split != "train":
        return _Kinds(None, True if split == "iw" else None)

    def below(coin: Tensor, shares: list[float]) -> Tensor:
        return coin < torch.tensor(shares, dtype=coin.dtype, device=coin.device)[:, None]

    novel = below(for_novel, [float(task.p_C) for task in tasks]) if any(task.p_C > 0 for task in tasks) else None
    loose = ~below(for_loose, [float(task.p_B) for task in tasks]) if any(task.p_B < 1 for task in tasks) else None
    return _Kinds(novel, loose if loose is None or novel is None else loose & ~novel)


def _mix(mask: Tensor | bool | None, yes: Tensor, no: Tensor) -> Tensor:
    """`yes` where the mask says so. Masks are [model, n]."""
    if mask is None or mask is False:
        return no
    if mask is True:
        return yes
    return torch.where(mask if yes.dim() == 2 else mask[..., None], yes, no)


def _slots(task: Task, row: Coins) -> tuple[Tensor, Tensor]:
    """For every slot the block (0 .. N / B - 1) whose class it shows, each block B times in random order; and the slot that the query repeats."""
    order = row.take(task.N).argsort(-1) % (task.N // task.B)
    return order, (row.take(1) * task.N).long()


def _unimodal(found: Tables, row: Coins, kinds: _Kinds) -> tuple[Tensor, Tensor, None, None, Tensor, Tensor]:
    task = found.tasks[0]
    assert isinstance(task, UnimodalTask)
    known, novel, u, blocks = known_classes(found, 1), novel_classes(task, 1), row.take(task.N), task.N // task.B
    if task.no_repeats:
        labels = row.take(task.L).argsort(-1)[..., :blocks]
        shown, new = known.of(labels, u[..., :blocks]), novel.of(labels, u[..., :blocks])
    else:
        shown, new = known.pick(u[..., :blocks]), novel.pick(u[..., :blocks])
    order, slot = _slots(task, row)
    item = _mix(kinds.novel, new, shown).gather(-1, order)
    query = item.gather(-1, slot)[..., 0]
    alone = row.take(1)
    if kinds.loose is not None:
        item, query = _mix(kinds.loose, known.pick(u), item), _mix(kinds.loose, known.pick(alone)[..., 0], query)
    return item, query, None, None, item % task.L, query % task.L


def _multimodal(found: Tables, task: MultimodalTask, row: Coins, kinds: _Kinds) -> tuple[Tensor, ...]:
    known, novel = (known_classes(found, 1), known_classes(found, 2)), (novel_classes(task, 1), novel_classes(task, 2))
    u1, u2 = row.take(task.N), row.take(task.N)
    keys = _label_order(task, row)
    first, second = _blocks(task, known, u1, u2, keys)
    if kinds.novel is not None:
        new1, new2 = _blocks(task, novel, u1, u2, keys)
        first, second = _mix(kinds.novel, new1, first), _mix(kinds.novel, new2, second)
    order, slot = _slots(task, row)
    item, item2 = first.gather(-1, order), second.gather(-1, order)
    query, query2 = item.gather(-1, slot)[..., 0], item2.gather(-1, slot)[..., 0]
    alone1, alone2 = row.take(1), row.take(1)
    if kinds.loose is not None:
        (one, two), (one_q, two_q) = _loose(task, known, u1, u2), _loose(task, known, alone1, alone2)
        item, item2 = _mix(kinds.loose, one, item), _mix(kinds.loose, two, item2)
        query, query2 = _mix(kinds.loose, one_q[..., 0], query), _mix(kinds.loose, two_q[..., 0], query2)
    label, target = _label(task, item, item2), _label(task, query, query2)
    if task.m1_query == "mismatched":
        query = _mismatched(task, row, kinds, known[0], novel[0], item, label, target)
    return item, query, item2, query2, label, target


def _label_order(task: MultimodalTask, row: Coins) -> tuple[Tensor, ...]:
    """Labels (or groups of either modality) in random order, where a context must not repeat them."""
    if task.labels == "crossed":
        return row.take(task.G1 or 0).argsort(-1), row.take(task.G2 or 0).argsort(-1)
    return (row.take(task.n_labels).argsort(-1),) if task.no_repeats else ()


def _blocks(
    task: MultimodalTask, classes: tuple[Classes, Classes], u1: Tensor, u2: Tensor, keys: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """The N / B pairs of classes of a bursty sequence."""
    one, two = classes
    blocks = task.N // task.B
    if task.labels == "crossed":
        rows, columns = task.grid
        first, second = one.of(keys[0][..., :rows], u1[..., :rows]), two.of(keys[1][..., :columns], u2[..., :columns])
        return first.repeat_interleave(columns, -1), second.repeat(1, 1, rows)
    u1, u2 = u1[..., :blocks], u2[..., :blocks]
    if task.labels == "joint":
        if not keys:
            return one.pick(u1), two.pick(u2)
        labels = keys[0][..., :blocks]
        return one.of(labels // (task.G2 or 1), u1), two.of(labels % (task.G2 or 1), u2)
    second = two.of(keys[0][..., :blocks], u2) if keys else two.pick(u2)
    return one.of((second - two.offset) % task.n_labels, u1), second


def _loose(task: MultimodalTask, classes: tuple[Classes, Classes], u1: Tensor, u2: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs drawn independently of all others."""
    second = classes[1].pick(u2)
    together = task.labels == "pair" and task.iid_pairs == "label"
    return (classes[0].of(second % task.n_labels, u1) if together else classes[0].pick(u1)), second


def _label(task: MultimodalTask, first: Tensor, second: Tensor) -> Tensor:
    """Label of a pair of classes, novel or not (what is counted on from is a multiple of the labels)."""
    if task.labels == "pair":
        return second % task.n_labels
    assert task.G1 is not None
    assert task.G2 is not None
    return first % task.G1 * task.G2 + second % task.G2


def _mismatched(
    task: MultimodalTask, row: Coins, kinds: _Kinds, known: Classes, novel: Classes, item: Tensor, label: Tensor, target: Tensor
) -> Tensor:
    """Modality 1's class of an exemplar with another label than the target; where there is none, any class of another label."""
    other = label != target[..., None]
    slot = torch.where(other, row.take(task.N), -1.0).argmax(-1, keepdim=True)
    from_context = item.gather(-1, slot)[..., 0]
    coin = row.take(1)
    wrong = (target[..., None] + 1 + (coin * (task.L - 1)).long()) % task.L
    u = row.take(1)
    elsewhere = _mix(kinds.novel, novel.of(wrong, u), known.of(wrong, u))[..., 0]
    return torch.where(other.any(-1), from_context, elsewhere)
