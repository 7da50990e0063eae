"""The batches of toy trainings. The batch of a step is decided by the recipe and the step alone: a run that goes on after a kill draws the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from mechicl.data.gaussian import Task, draw_many
from mechicl.data.worlds import VARIES
from mechicl.models.toys.positions import draw_places
from mechicl.training.toys.recipe import ToyRecipe

BLOCK = 8
"""Batches drawn at once, where one draw of eight costs less than eight draws."""


@dataclass(frozen=True, eq=False)
class Work:
    """What one training step reads, of one model or (with a leading axis) many. `position_ids` where the model's places have a random start."""

    tokens: Float[Tensor, "*model batch pos d_input"]
    target: Int[Tensor, "*model batch"]
    second: Tensor | None = None
    position_ids: Int[Tensor, "*model batch pos"] | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Work:
        """Every tensor changed alike."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(value) for name, value in given.items() if value is not None})


def generator(device: torch.device | str | None, *names: object) -> Generator:
    """A generator that the names decide."""
    digest = hashlib.sha256("\x1f".join(str(name) for name in names).encode()).digest()
    return Generator(device=device or "cpu").manual_seed(int.from_bytes(digest[:7], "big"))


class Feed:
    """The training batches of several recipes of the same shapes, one model each."""

    cfg: Any
    device: torch.device | str | None

    def __init__(self, recipes: Sequence[ToyRecipe], cfg: Any, device: torch.device | str | None = None) -> None:
        self.recipes, self.cfg, self.device = list(recipes), cfg, device
        # novel classes are redrawn with every draw, and pictures are large: then a block is one batch
        plain = all(r.task.p_C == 0 and getattr(r.task, "second", "gaussian") == "gaussian" for r in recipes)
        self.block = BLOCK if plain else 1
        self._held: Work | None = None
        self._at: list[int] = []

    def keep(self, which: Sequence[int]) -> None:
        """Draw for these recipes only from now on."""
        self.recipes = [self.recipes[i] for i in which]
        self._at = [self._at[i] for i in which] if self._at else []
        index = torch.tensor(list(which), dtype=torch.long, device=self.device)
        self._held = None if self._held is None else self._held.each(lambda x: x.index_select(0, index))

    def __call__(self, steps: Sequence[int]) -> Work:
        """The batches of one step per recipe, in order."""
        places = [divmod(step, self.block) for step in steps]
        blocks = [at for at, _ in places]
        if self._held is None or blocks != self._at:
            self._held, self._at = self._draw(blocks), blocks
        n = self.recipes[0].batch
        slots = [k for _, k in places]
        if len(set(slots)) == 1:
            first = slots[0] * n
            return self._held.each(lambda x: x[:, first : first + n])
        return self._held.each(lambda x: torch.stack([x[i, k * n : (k + 1) * n] for i, k in enumerate(slots)]))

    def _draw(self, blocks: Sequence[int]) -> Work:
        """One block of batches per recipe; recipes whose tasks are alike are drawn together."""
        alike: dict[Any, list[int]] = {}
        for i, recipe in enumerate(self.recipes):
            alike.setdefault(kind(recipe.task), []).append(i)
        parts = {tuple(few): self._draw_alike(few, [blocks[i] for i in few]) for few in alike.values()}
        if len(parts) == 1:
            return next(iter(parts.values()))
        order = torch.tensor([i for few in parts for i in few]).argsort().to(self.device or "cpu")
        works = list(parts.values())
        names = [f.name for f in fields(Work) if getattr(works[0], f.name) is not None]
        return Work(**{name: torch.cat([getattr(w, name) for w in works]).index_select(0, order) for name in names})

    def _draw_alike(self, few: Sequence[int], blocks: Sequence[int]) -> Work:
        recipes = [self.recipes[i] for i in few]
        sources = [generator(self.device, "train", at, r.seed) for r, at in zip(recipes, blocks, strict=True)]
        n = recipes[0].batch * self.block
        drawn = draw_many([r.task for r in recipes], n, sources, split="train", device=self.device)
        places = [draw_places(self.cfg, n, drawn.layout.n_pos, source) for source in sources]
        return Work(
            drawn.tokens, drawn.target, drawn.second, None if places[0] is None else torch.stack([p for p in places if p is not None])
        )


def kind(task: Task) -> Any:
    """Equal for tasks that can be drawn together."""
    return type(task), tuple((f.name, getattr(task, f.name)) for f in fields(task) if f.name not in VARIES)
