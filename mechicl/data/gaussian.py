"""Sequences of Gaussian mixtures, one and two modalities: drawn all at once, with the truth about every slot.

The paper's unimodal and multimodal data (Huang et al. 2026, after Reddy 2024). A draw first tosses its coins in a fixed order (a few numbers for each
sequence, the novel class means where needed, then the noise), so a generator's state decides everything but the world; then it reads tokens from a
table of label vectors and class means by row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechicl.data.chances import chance
from mechicl.data.choose import Chosen, choose, known_classes, n_coins
from mechicl.data.fill import add_noise, noise_of, novel_rows, pictures, place, read, second_items
from mechicl.data.toy_tasks import Layout, MultimodalTask, Split, Task, UnimodalTask, check_split, layout
from mechicl.data.worlds import World, check_alike, tables, world
from mechicl.errors import OptionError

__all__ = [
    "Draw", "Layout", "MultimodalTask", "Split", "Task", "UnimodalTask", "World", "chance", "draw", "draw_many", "draw_second", "layout",
    "second_shape", "world",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Draw:
    """Sequences and the truth about them. From `draw_many` every tensor has a leading axis for the tasks.

    Attributes:
        tokens: Vectors of the sequence; the second modality's slots are zero.
        target: The right label of the query.
        item: Class of every exemplar's item; novel classes count from K (K1) on.
        label: Label of every exemplar, as shown.
        query: Class of the query's item: what its token shows, or with m1_query "off" would show.
        right: Exemplars whose label is the target.
        same: Exemplars of the query's class; in multimodal sequences of its pair of classes (of its second class where m1_query is "mismatched").
        second: What the encoder reads, the N exemplars' and then the query's; None in unimodal sequences. Vectors, or pictures in [0, 1] plus noise.
        item2, query2: Classes of the second modality, novel ones from K2 on; None in unimodal sequences.
        layout: Where everything stands.
        task: The task (of `draw_many`: the first).
        split: Which split.
        tasks: All tasks of `draw_many`; else empty.
    """

    tokens: Float[Tensor, "*model n pos d"]
    target: Int[Tensor, "*model n"]
    item: Int[Tensor, "*model n slot"]
    label: Int[Tensor, "*model n slot"]
    query: Int[Tensor, "*model n"]
    right: Bool[Tensor, "*model n slot"]
    same: Bool[Tensor, "*model n slot"]
    layout: Layout
    task: Task
    second: Float[Tensor, "*model n shown ..."] | None = None
    item2: Int[Tensor, "*model n slot"] | None = None
    query2: Int[Tensor, "*model n"] | None = None
    split: Split = "train"
    tasks: tuple[Task, ...] = ()

    @property
    def n(self) -> int:
        """Sequences (of each task)."""
        return self.target.shape[-1]

    def __len__(self) -> int:
        return self.n

    def map(self, function: Callable[[Tensor], Tensor]) -> Draw:
        """The same with `function` applied to every tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if isinstance(value, Tensor)})

    def to(self, device: torch.device | str) -> Draw:
        """The same on another device."""
        return self.map(lambda x: x.to(device))

    def rows(self, which: slice | Tensor) -> Draw:
        """Some of the sequences of one task."""
        return self.map(lambda x: x[which])

    def member(self, k: int) -> Draw:
        """What `draw` would have given for task k of `draw_many`."""
        if not self.tasks:
            raise OptionError("member must be asked of a draw of several tasks; got one of one task. Use draw_many.")
        return replace(self.map(lambda x: x[k]), task=self.tasks[k], tasks=())


def draw(task: Task, n: int, generator: torch.Generator, *, split: Split = "train", device: torch.device | str | None = None) -> Draw:
    """n sequences of a task.

    Args:
        task: The settings; its seed decides the world.
        n: How many.
        generator: Decides everything else. It must live on the device of the draw.
        split: What is drawn; see `Split`.
        device: Only checked, against the generator's.

    Raises:
        OptionError: n below one, an unknown split, another device than the generator's.

    Source:
        Huang et al. 2026 and its released code. Differs: the class frequencies also hold where labels must not repeat; see `MultimodalTask.iid_pairs`
        for sequences that are not bursty.
    """
    together = draw_many((task,), n, (generator,), split=split, device=device)
    return replace(together.map(lambda x: x[0]), tasks=())


def draw_many(
    tasks: Sequence[Task],
    n: int,
    generators: Sequence[torch.Generator],
    split: Split = "train",
    *,
    device: torch.device | str | None = None,
) -> Draw:
    """n sequences of each of several tasks, with a leading axis for the tasks: the same numbers as `draw` gives one by one.

    Args:
        tasks: Tasks that share their shape; see `mechicl.data.worlds.VARIES` for what may differ.
        n: How many of each.
        generators: One for each task, all on one device.
        split: What is drawn.
        device: Only checked, against the generators'.

    Raises:
        OptionError: as `draw`; tasks of different shapes; not one generator for each.
    """
    tasks = tuple(tasks)
    _check(tasks, n, generators, split, device)
    where = generators[0].device
    found = tables(tasks, where)
    novel = [split == "ic" or (split == "train" and task.p_C > 0) for task in tasks]
    exact = torch.float32 if where.type == "mps" else torch.float64
    coins = torch.empty(len(tasks), n, n_coins(tasks[0]), dtype=exact, device=where)
    for k, generator in enumerate(generators):
        coins[k].uniform_(generator=generator)
    chosen = choose(found, coins, split)
    news = novel_rows(found, novel, generators)
    at = layout(tasks[0])
    tokens = place(found, chosen, news, split == "ic", at)
    add_noise(tokens, found, at, generators)
    second = second_items(found, chosen, news, split == "ic", generators)
    return Draw(
        tokens=tokens, target=chosen.target, item=chosen.item, label=chosen.label, query=chosen.query,
        right=chosen.label == chosen.target[..., None], same=_same(chosen, tasks[0]), layout=at, task=tasks[0], second=second, item2=chosen.item2,
        query2=chosen.query2, split=split, tasks=tasks,
    )  # fmt: skip


def _check(tasks: tuple[Task, ...], n: int, generators: Sequence[torch.Generator], split: Split, device: torch.device | str | None) -> None:
    check_split(split)
    check_alike(tasks)
    if n < 1:
        raise OptionError(f"n must be at least 1; got {n}. Draw at least one sequence.")
    if len(generators) != len(tasks):
        raise OptionError(f"generators must be one for each of {len(tasks)} tasks; got {len(generators)}. Seed one for each.")
    places = {generator.device for generator in generators} | ({torch.device(device)} if device is not None else set())
    if len({(place.type, place.index or 0) for place in places}) > 1:
        raise OptionError(
            f"device must be the generator's own; got {', '.join(sorted(map(str, places)))}. Make it with torch.Generator(device=...)."
        )


def _same(chosen: Chosen, task: Task) -> Bool[Tensor, "model n slot"]:
    if chosen.item2 is None or chosen.query2 is None:
        return chosen.item == chosen.query[..., None]
    same = chosen.item2 == chosen.query2[..., None]
    return same & (chosen.item == chosen.query[..., None]) if isinstance(task, MultimodalTask) and task.m1_query != "mismatched" else same


def second_shape(task: MultimodalTask) -> tuple[int, ...]:
    """Shape of one item of the second modality: (D2,), or (channels, height, width)."""
    bank = world(task).bank
    return (task.D2,) if bank is None else bank.shape


def draw_second(task: MultimodalTask, n: int, generator: torch.Generator) -> tuple[Float[Tensor, "n ..."], Int[Tensor, " n"]]:
    """Items of the second modality alone, with their classes: what an encoder is pretrained on as a K2-way classifier.

    Returns:
        Items as in `Draw.second`; their classes, 0..K2-1, drawn by frequency.

    Raises:
        OptionError: n below one, or a task of one modality.

    Source:
        Huang et al. 2026, stage 3. Differs: classes by the task's frequencies (there: all alike for vectors).
    """
    if not isinstance(task, MultimodalTask) or n < 1:
        raise OptionError(f"n must be at least 1 and the task multimodal; got {n} and {type(task).__name__}. Use a MultimodalTask.")
    where = generator.device
    found = tables((task,), where)
    coins = torch.rand(1, n, 1, generator=generator, dtype=torch.float32 if where.type == "mps" else torch.float64, device=where)
    classes = known_classes(found, 2).pick(coins)
    if found.rows2 is None:
        return pictures(found, classes, None, (generator,))[0, :, 0], classes[0, :, 0]
    values = read(found.rows2, classes)
    noise, step = noise_of(tuple(values.shape), found.step2, (generator,), where)
    values.add_(noise, alpha=step)
    return values[0, :, 0], classes[0, :, 0]
