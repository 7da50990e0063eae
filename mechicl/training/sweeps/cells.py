"""What a sweep is asked for, and the cells that follow from it: one cell is one recipe, named by a hash of everything that decides its numbers.

    preset = "cpu"               # the recipe that every cell starts from
    seeds = 5                    # 0 to 4, or a list

    [set]                        # the same in every cell
    steps = 4000

    [grid]                       # every combination
    K = [64, 256, 1024]
    code = [{ name = "rope", positions = "rope" }, { name = "wide", positions = "none", n_places = 65 }]    # fields that change together

    [[also]]                     # another grid on the same [set]; as many as wanted
    alpha = [0.5, 1.0]

A spec is plain TOML; docs/sweeps.md has the whole format.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mechicl.errors import OptionError

KEYS = ("preset", "seeds", "set", "grid", "also", "before", "group", "about")
RESERVED = ("cell", "seed", "step", "loss", "accuracy", "cla")
"""Columns of a results table that no setting may be called."""

START = "cell:"
"""A `start` that is another cell of the sweep, by its id, in place of a path."""

Resolve = Callable[[str, Mapping[str, Any], int], dict[str, Any]]
"""(preset, fields, seed) -> the whole recipe as JSON values."""


@dataclass(frozen=True)
class Grid:
    """Every combination of `axes`; `fixed` fields, preset and seeds are the same (or the same range) in each.

    `before`: fields of a training that each cell starts from; "$K1" stands for the cell's own K1.
    """

    axes: Mapping[str, tuple[Any, ...]]
    fixed: Mapping[str, Any]
    seeds: tuple[int, ...]
    before: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Spec:
    """A sweep, as its file says it. `group`: cells that share shapes may be trained in one batched step. `about`: a line for the reader."""

    grids: tuple[Grid, ...]
    group: bool = True
    about: str = ""


@dataclass(frozen=True, eq=False)
class Cell:
    """One training of a sweep.

    `fields`: what the spec sets in it, by name. `labels`: the value of every column that the spec's grids name, where the recipe does not have it.
    `recipe`: the whole recipe as JSON values; `id` is a hash of it. `before`: the training whose model it starts from; the recipe's `start` names it.
    """

    id: str
    preset: str
    seed: int
    fields: Mapping[str, Any]
    recipe: Mapping[str, Any]
    labels: Mapping[str, Any] = field(default_factory=dict)
    before: Cell | None = None

    def value(self, name: str) -> Any:
        """A setting by the name that the spec uses, from the recipe where the spec leaves it alone; None where this cell has none."""
        for place in (self.labels, self.fields):
            if name in place:
                return place[name]
        owner, _, short = name.rpartition(".")
        if owner:
            inner = self.recipe.get(owner)
            return inner.get(short) if isinstance(inner, Mapping) else None
        for place in (self.recipe, *(self.recipe.get(part) or {} for part in ("task", "model", "encoder"))):
            if name in place:
                return place[name]
        return None

    def describe(self, names: Sequence[str]) -> str:
        """ "K=64, positions=rope, seed=0"."""
        return ", ".join(f"{name}={self.value(name)}" for name in names) + (", " if names else "") + f"seed={self.seed}"


def read_spec(source: str | os.PathLike[str] | Mapping[str, Any]) -> Spec:
    """A sweep's spec from a TOML file or a mapping of the same form.

    Raises:
        OptionError: the file cannot be read, is not TOML, or says something that no sweep has.
    """
    if isinstance(source, Mapping):
        return _spec(source)
    path = Path(source)
    try:
        return _spec(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"spec must be a TOML file that can be read; got {path} ({error}). Give the path of one.") from error
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"spec must be TOML; {path} is not: {error}. Correct that line.") from error


def _spec(given: Mapping[str, Any]) -> Spec:
    unknown = sorted(set(given) - set(KEYS))
    if unknown:
        near = difflib.get_close_matches(unknown[0], KEYS, n=1)
        hint = f"Did you mean {near[0]}?" if near else "Fields of the recipe go under [set] or [grid]."
        raise OptionError(f"spec must have keys from {', '.join(KEYS)}; got {unknown[0]!r}. {hint}")
    for name, kind, rule in (("set", Mapping, "a table"), ("grid", Mapping, "a table"), ("also", list, "[[also]] tables"), ("group", bool, "true or false"),
                             ("about", str, "text"), ("preset", str, "a recipe's name")):  # fmt: skip
        if name in given and not isinstance(given[name], kind):
            raise OptionError(f"{name} must be {rule}; got {given[name]!r}. Write it as docs/sweeps.md shows.")
    common = dict(given.get("set", {})) | ({"preset": given["preset"]} if "preset" in given else {})
    seeds = _seeds(given.get("seeds", 1))
    tables = [*([given["grid"]] if "grid" in given else []), *given.get("also", [])]
    grids = tuple(_grid(table, common, seeds, given.get("before")) for table in tables or [{}])
    return Spec(grids, given.get("group", True), given.get("about", ""))


def _grid(table: Mapping[str, Any], common: Mapping[str, Any], seeds: tuple[int, ...], before: Any) -> Grid:
    axes: dict[str, tuple[Any, ...]] = {}
    fixed = dict(common)
    for name, value in table.items():
        if name == "seeds":
            seeds = _seeds(value)
        elif name == "before":
            before = value
        elif name in RESERVED:
            raise OptionError(
                f"a grid's field must not be called {name!r}. " + ("Use seeds = [...]." if name == "seed" else "Pick another name.")
            )
        elif isinstance(value, list):
            if not value:
                raise OptionError(f"{name} must have at least one value; got none. Give some, or leave it out.")
            if any(value.index(x) < k for k, x in enumerate(value)):
                raise OptionError(f"{name} must have different values; got {value}. Name each once.")
            axes[name] = tuple(value)
        else:
            fixed[name] = value
    if not (isinstance(before, Mapping) or before is None or before is False):
        raise OptionError(f"before must be a table of fields, or false; got {before!r}. Write it as docs/sweeps.md shows.")
    return Grid(axes, {k: v for k, v in fixed.items() if k not in axes}, seeds, before or None)


def _seeds(value: Any) -> tuple[int, ...]:
    def whole(x: Any) -> bool:
        return isinstance(x, int) and not isinstance(x, bool)

    if whole(value) and value >= 1:
        return tuple(range(value))
    if isinstance(value, list | tuple) and value and all(whole(x) and x >= 0 for x in value) and len(set(value)) == len(value):
        return tuple(value)
    raise OptionError(f"seeds must be how many (at least 1) or a list of different seeds; got {value!r}. E.g. seeds = 5.")


def axis_names(spec: Spec) -> list[str]:
    """The settings that become columns: every field of a grid, in the spec's order; for fields that change together, their name and then each of them."""
    names: dict[str, None] = {}
    for grid in spec.grids:
        for name, values in grid.axes.items():
            names[name] = None
            names |= dict.fromkeys(key for value in values if isinstance(value, Mapping) for key in value if key != "name")
    # a field that one [[also]] holds fixed and another grid does not is a difference between cells too
    fixed = [grid.fixed for grid in spec.grids]
    for name in dict.fromkeys(key for one in fixed for key in one):
        if any(one.get(name) != fixed[0].get(name) for one in fixed):
            names[name] = None
    if len({grid.before is None for grid in spec.grids}) > 1:
        names["before"] = None
    return [name for name in names if name != "preset"]


def cells(spec: Spec, resolve: Resolve) -> list[Cell]:
    """Every cell, in the spec's order, seeds innermost; a recipe that two grids share is there once.

    Args:
        resolve: The whole recipe of a preset, fields and a seed, as JSON values.

    Raises:
        OptionError: a field or a value that the recipe refuses, or one field set twice in a cell.
    """
    bundles = {name for grid in spec.grids for name, values in grid.axes.items() if any(isinstance(v, Mapping) for v in values)}
    found: dict[str, Cell] = {}
    for grid in spec.grids:
        for point in _points(grid):
            fields, labels = _flatten(point, grid.fixed, bundles)
            preset = str(fields.pop("preset", "cpu"))
            for seed in grid.seeds:
                try:
                    cell = _cell(preset, seed, fields, labels, grid.before, resolve)
                except ValueError as error:
                    where = ", ".join(f"{k}={v}" for k, v in point.items()) or "every cell"
                    raise OptionError(f"{error} (in the cell with {where})") from error
                found.setdefault(cell.id, cell)
    return list(found.values())


def _cell(
    preset: str, seed: int, fields: Mapping[str, Any], labels: Mapping[str, Any], before: Mapping[str, Any] | None, resolve: Resolve
) -> Cell:
    recipe = resolve(preset, fields, seed)
    cell = Cell(digest(recipe), preset, seed, fields, recipe, {**labels, "before": False})
    if before is None or recipe.get("early_fusion"):  # which skips the earlier stage
        return cell
    if recipe.get("start") is not None:
        raise OptionError(f"start must be left out with before, which sets it; got {recipe['start']!r}. Drop one of them.")
    given = {name: cell.value(x[1:]) if isinstance(x, str) and x.startswith("$") else x for name, x in before.items()}
    unknown = [name for name, x in given.items() if x is None]
    if unknown:
        raise OptionError(f"{unknown[0]} of before must be a field of the cell; got {before[unknown[0]]!r}. Correct the name after the $.")
    first = _cell(str(given.pop("preset", "cpu")), seed, given, {}, None, resolve)
    recipe = {**recipe, "start": START + first.id}
    return Cell(digest(recipe), preset, seed, fields, recipe, {**labels, "before": True}, first)


def _points(grid: Grid) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*grid.axes.values()):
        yield dict(zip(grid.axes, values, strict=True))


def _flatten(point: Mapping[str, Any], fixed: Mapping[str, Any], bundles: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe's fields of one point, and the columns that are only names."""
    fields: dict[str, Any] = dict(fixed)
    labels: dict[str, Any] = {}
    own: set[str] = set()
    for name, value in point.items():
        inner = {name: value}
        if name in bundles:
            if not isinstance(value, Mapping):
                raise OptionError(f"{name} must have tables only, or none; got {value!r} among them. Write {{ field = value, ... }}.")
            inner = {key: x for key, x in value.items() if key != "name"}
            labels[name] = value.get("name", ", ".join(f"{key}={x}" for key, x in inner.items()))
        twice = sorted(own & set(inner))
        if twice:
            raise OptionError(
                f"{twice[0]} must be set once in a cell; got it in {name} and in another field of the grid. Drop one of them."
            )
        own |= set(inner)
        fields |= inner
    return fields, labels


def starting(cell: Cell, models: str) -> Cell:
    """The cell with the folder of the model it starts from in its recipe.

    Args:
        models: The folder of the sweep's kept models.
    """
    if cell.before is None:
        return cell
    return replace(cell, recipe={**cell.recipe, "start": os.path.join(models, cell.before.id)})


def digest(recipe: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that the recipe decides."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def group_size(spec: Spec, together: int | None, device: str | None) -> int:
    """At most so many cells a group: what the user says, or 4 on a CPU, where one model's step already fills a core and a small group loses less to a kill,
    and 64 on a GPU.

    Raises:
        OptionError: `together` below 1.
    """
    if together is not None and together < 1:
        raise OptionError(f"together must be at least 1; got {together}. Use 1 for one at a time.")
    if not spec.group:
        return 1
    return together if together is not None else 4 if (device or "cpu").startswith("cpu") else 64


def groups(todo: Sequence[Cell], key: Callable[[Mapping[str, Any]], str], together: int, workers: int) -> list[tuple[Cell, ...]]:
    """Cells to train in one batched step: equal `key`, at most `together`, in order, and no fewer groups than there are workers to keep busy."""
    same: dict[str, list[Cell]] = {}
    for cell in todo:
        same.setdefault(key(cell.recipe), []).append(cell)
    out = []
    for members in same.values():
        n = len(members)
        parts = max(-(-n // together), min(n, -(-n * workers // len(todo))))
        # parts of nearly equal length: one short straggler would idle the batched step
        cuts = [k * n // parts for k in range(parts + 1)]
        out += [tuple(members[a:b]) for a, b in itertools.pairwise(cuts)]
    return out
