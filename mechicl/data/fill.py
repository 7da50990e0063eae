"""From classes to vectors: the continuous part of a draw. Rows of tables in their places, novel class means, noise, pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechicl.data.choose import Chosen
from mechicl.data.toy_tasks import Layout, MultimodalTask
from mechicl.data.worlds import Tables, world


@dataclass(frozen=True, eq=False)
class Novel:
    """What a draw knows of novel classes: for each task its label vectors, novel class means and a row of zeros; means of modality 2; held-out classes."""

    rows: Float[Tensor, "model row d"]
    rows2: Float[Tensor, "model row2 d2"] | None
    picked: tuple[Tensor | None, ...]


def novel_rows(found: Tables, novel: list[bool], generators: Sequence[torch.Generator]) -> Novel | None:
    """Novel class means, drawn from each generator whose task needs some."""
    if not any(novel):
        return None
    task, device = found.tasks[0], found.rows.device
    n_tasks, size = len(found.tasks), task.L + task.n_items + 1
    rows = torch.zeros(n_tasks, task.L + task.novel + 1, task.width, device=device)
    rows[:, : task.L] = found.rows.view(n_tasks, size, -1)[:, : task.L]
    rows2 = (
        torch.zeros(n_tasks, task.novel2, task.D2, device=device) if isinstance(task, MultimodalTask) and found.rows2 is not None else None
    )
    picked: list[Tensor | None] = [None] * n_tasks
    for k, generator in enumerate(generators):
        if not novel[k]:
            continue
        rows[k, task.L : -1] = torch.randn(task.novel, task.width, generator=generator, device=device) * (found.scale1[k] / task.width**0.5)
        if isinstance(task, MultimodalTask):
            if rows2 is not None:
                rows2[k] = torch.randn(task.novel2, task.D2, generator=generator, device=device) * (found.scale2[k] / task.D2**0.5)
            else:
                order = world(found.tasks[k]).order2
                assert order is not None
                held = order[task.K2 :].to(device)
                picked[k] = held[torch.randperm(len(held), generator=generator, device=device)[: task.novel2]]
    return Novel(rows, rows2, tuple(picked))


def read(rows: Tensor, ids: Int[Tensor, "model n ..."]) -> Tensor:
    """Rows `ids` [model, n, ...] of each task's own block of `rows` ([model * size, d], or [model, size, d])."""
    n_tasks, flat = len(ids), rows.flatten(0, -2)
    if n_tasks > 1:
        size = len(flat) // n_tasks
        ids = ids + (torch.arange(n_tasks, device=ids.device) * size).view(-1, *(1,) * (ids.dim() - 1))
    return flat.index_select(0, ids.flatten()).view(*ids.shape, flat.shape[-1])


def place(found: Tables, chosen: Chosen, news: Novel | None, every: bool, at: Layout) -> Float[Tensor, "model n pos d"]:
    """Label vectors and class means in their places, zeros where nothing stands; no noise yet."""
    task = found.tasks[0]
    items = torch.cat([chosen.item, chosen.query[..., None]], -1)
    blank = isinstance(task, MultimodalTask) and task.m1_query == "off"

    def ids(classes: Tensor, n_classes: int) -> Tensor:
        where = torch.empty(*items.shape[:2], at.n_pos, dtype=torch.long, device=items.device)
        zero = task.L + n_classes
        where[..., 0 :: at.step] = classes + task.L
        where[..., at.step - 1 :: at.step] = chosen.label
        if at.step == 3:
            where[..., 1::3] = zero
        if blank:
            where[..., at.query] = zero
        return where

    if news is None:
        return read(found.rows, ids(items, task.n_items))
    new = read(news.rows, ids((items - task.n_items).clamp_min(0), task.novel))
    assert chosen.novel is not None
    if every:
        return new
    old = read(found.rows, ids(items.clamp_max(task.n_items - 1), task.n_items))
    return torch.where(chosen.novel[..., None, None], new, old)


def add_noise(tokens: Tensor, found: Tables, at: Layout, generators: Sequence[torch.Generator]) -> None:
    """Noise on every item and on the query (drawn, but not added, where the query's token is empty)."""
    task = found.tasks[0]
    noise, step = noise_of((*tokens.shape[:2], task.N + 1, task.width), found.step1, generators, tokens.device)
    blank = isinstance(task, MultimodalTask) and task.m1_query == "off"
    last = at.query if blank else at.query + 1
    tokens[..., 0 : last : at.step, :].add_(noise[:, :, :-1] if blank else noise, alpha=step)


def noise_of(
    shape: tuple[int, ...], steps: Sequence[float], generators: Sequence[torch.Generator], device: torch.device
) -> tuple[Tensor, float]:
    """Normal noise, each task's from its own generator, and a factor that is left to be applied: then its standard deviation is `steps`."""
    noise = torch.empty(shape, device=device)
    for k, generator in enumerate(generators):
        noise[k].normal_(generator=generator)
    if len(set(steps)) == 1:
        return noise, steps[0]
    return noise.mul_(torch.tensor(steps, device=device).view(-1, *(1,) * (len(shape) - 1))), 1.0


def second_items(found: Tables, chosen: Chosen, news: Novel | None, every: bool, generators: Sequence[torch.Generator]) -> Tensor | None:
    """What the encoder reads, [model, n, N + 1, ...]."""
    task = found.tasks[0]
    if chosen.item2 is None or chosen.query2 is None or not isinstance(task, MultimodalTask):
        return None
    shown = torch.cat([chosen.item2, chosen.query2[..., None]], -1)
    if found.rows2 is None:
        return pictures(found, shown, news, generators)
    if news is None:
        values = read(found.rows2, shown)
    else:
        assert news.rows2 is not None
        assert chosen.novel is not None
        values = read(news.rows2, (shown - task.K2).clamp_min(0))
        if not every:
            values = torch.where(chosen.novel[..., None, None], values, read(found.rows2, shown.clamp_max(task.K2 - 1)))
    noise, step = noise_of(tuple(values.shape), found.step2, generators, values.device)
    return values.add_(noise, alpha=step)


def pictures(found: Tables, shown: Tensor, news: Novel | None, generators: Sequence[torch.Generator]) -> Tensor:
    """A picture of every class, each task's from its own bank."""
    values = []
    for k, (task, generator) in enumerate(zip(found.tasks, generators, strict=True)):
        assert isinstance(task, MultimodalTask)
        home = world(task)
        assert home.bank is not None
        assert home.order2 is not None
        classes = home.order2[: task.K2].to(shown.device)
        held = None if news is None else news.picked[k]
        if held is not None:
            classes = torch.cat([classes, held])
        values.append(home.bank.draw(classes[shown[k]], generator, noise=float(task.eps2)))
    return torch.stack(values) if len(values) > 1 else values[0][None]
