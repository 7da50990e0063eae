"""Train toy transformers on sequences of vectors, and watch in-context learning grow in them.

`train_toy` trains one, `train_many` many of the same shapes in one batched step. A run with a folder can be killed at any moment and resumed to the same
bits (with one thread).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mechicl.errors import NotFiniteError, OptionError
from mechicl.models.toys.model import ToyTransformer
from mechicl.results import Provenance, Series
from mechicl.training.toys.batched import Alone, Batched, Trainees
from mechicl.training.toys.build import build, train_encoder
from mechicl.training.toys.feed import Feed
from mechicl.training.toys.folder import ToyFolder, fill, read_recipe, read_weights, versions
from mechicl.training.toys.measure import Probe, measure, probes
from mechicl.training.toys.recipe import ToyRecipe, measuring_steps, parse_stop, together_key

SAVE_SECONDS = 60.0
"""Longest time between two checkpoints, besides those at every measured step."""
COMPARE = {">=": float.__ge__, "<=": float.__le__, ">": float.__gt__, "<": float.__lt__}


@dataclass(frozen=True, eq=False)
class ToyRun:
    """A toy training that is over.

    `table`: one row per measured step, columns "step" and what `mechicl.training.toys.measure.measure` gives. `failed`: why the run ended early
    without its criterion, e.g. a loss that is no number; None where all went well.
    """

    model: ToyTransformer
    table: pd.DataFrame
    recipe: ToyRecipe
    folder: Path | None = None
    failed: str | None = None


@dataclass(eq=False)
class _Member:
    """A run in memory."""

    recipe: ToyRecipe
    model: ToyTransformer
    sets: dict[str, Probe]
    due: frozenset[int]
    folder: ToyFolder | None
    rows: list[dict[str, Any]] = field(default_factory=list)
    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    step: int = 0
    done: bool = False
    failed: str | None = None
    fresh: bool = True
    """No checkpoint yet."""

    def counters(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the tensors."""
        return {"step": self.step, "done": self.done, "failed": self.failed}

    def run(self) -> ToyRun:
        """The finished run."""
        return ToyRun(
            self.model.eval(), pd.DataFrame(self.rows), self.recipe, None if self.folder is None else self.folder.path, self.failed
        )


def train_toy(
    recipe: ToyRecipe,
    out: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
    threads: int | None = 1,
    device: str | torch.device | None = None,
    compile: bool = False,  # noqa: A002
) -> ToyRun:
    """Train a toy transformer.

    Args:
        recipe: What to train; `mechicl.training.toys.recipe.recipe` has named ones.
        out: The run's folder; None keeps everything in memory.
        resume: Continue the run in `out`, to the same bits as without the interruption (with one thread); a folder without a run is started.
        progress: Show a bar with live accuracies.
        threads: CPU threads while training; None leaves torch's setting. One is the default: it gives the same bits every time, and with matrices this
            small a second one gains little on an idle machine and costs several times as much on a busy one.
        device: Where to train; None is the CPU.
        compile: Through torch.compile: needs a C++ compiler on a CPU, takes half a minute or more to start, and changes the last bits of the numbers.

    Raises:
        OptionError: a recipe whose parts do not fit together.
        OutputPathError: `out` cannot be written, is not empty, or the disk is full.
        CheckpointError: the run in `out` had another recipe, or a checkpoint is damaged.
        DeviceError: this machine has no such device.
        NotFiniteError: the loss is no number any more.
    """
    (run,) = train_many(
        [recipe], out=None if out is None else [out], resume=resume, progress=progress, threads=threads, device=device, compile=compile
    )
    if run.failed is not None:
        raise NotFiniteError(run.failed)
    return run


def train_many(
    recipes: Sequence[ToyRecipe],
    *,
    out: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    resume: bool = False,
    progress: bool = True,
    threads: int | None = 1,
    device: str | torch.device | None = None,
    compile: bool = False,  # noqa: A002
) -> list[ToyRun]:
    """Train many toys of the same shapes in one batched step, each as if alone up to the order of floating-point sums.

    A run whose criterion is met, or whose loss is no number any more (`ToyRun.failed` says so), leaves the batch; the others go on.

    Args:
        recipes: Equal in `together_key`: seeds, lr, weight_decay, stop and the task's shapeless settings may differ.
        out: A folder, in which each run gets its own (0000, 0001, ...), or one folder per run; None keeps everything in memory.
        resume, progress, threads, device, compile: As in `train_toy`.

    Returns:
        The runs, in the order of the recipes.

    Raises:
        OptionError: recipes that cannot be trained together.
        OutputPathError, CheckpointError, DeviceError: as in `train_toy`.
    """
    if not recipes:
        return []
    if len({together_key(recipe) for recipe in recipes}) > 1:
        raise OptionError(
            "recipes must have the same shapes, optimizer and steps to be trained together; got several kinds. Group them by together_key."
        )
    if device is not None:
        from mechicl.models.load import check_device  # brings the vision-language models along

        device = check_device(str(device))
    folders = _folders(out, len(recipes))
    with _threads(threads):
        members = [_prepare(one, folder, resume, device) for one, folder in zip(recipes, folders, strict=True)]
        active = [member for member in members if not member.done]
        if active:
            _learn(active, progress, compile)
    return [member.run() for member in members]


def _folders(out: Any, n: int) -> list[Any]:
    if out is None:
        return [None] * n
    if isinstance(out, str | os.PathLike):
        return [Path(out) / f"{i:04d}" for i in range(n)]
    if len(out) != n:
        raise OptionError(f"out must be one folder, or one per recipe; got {len(out)} for {n} recipes. Give as many.")
    return list(out)


@contextmanager
def _threads(n: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if n is not None:
        torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _prepare(recipe: ToyRecipe, out: Any, resume: bool, device: Any) -> _Member:
    """Build everything a run needs and put its checkpoint back if there is one."""
    resumed = resume and out is not None and (Path(out) / "state.safetensors").exists()
    model = build(recipe, start=not resumed)  # what can be refused is refused before a folder is made
    folder = None if out is None else ToyFolder.open(out, recipe, resume=resume)
    model.to(device or "cpu")
    member = _Member(recipe, model, probes(recipe, model.cfg, device), frozenset(measuring_steps(recipe)), folder)
    found = None if folder is None else folder.load(model)
    if found is None or folder is None:
        train_encoder(model, recipe)
        return member
    member.moments, counters = found
    member.step, member.done, member.failed, member.fresh = counters["step"], counters["done"], counters["failed"], False
    member.rows = folder.rows(member.step)
    return member


def _learn(members: list[_Member], progress: bool, compile: bool) -> None:  # noqa: A002
    """Train members until each is done."""
    from tqdm import tqdm

    team: Trainees = (
        Alone(members[0].model, members[0].recipe, compile=compile)
        if len(members) == 1
        else Batched([m.model for m in members], [m.recipe for m in members], compile=compile)
    )
    for i, member in enumerate(members):
        team.restore(i, member.moments)
        if member.fresh:
            _record(member, team, i)
    feed = Feed([m.recipe for m in members], members[0].model.cfg, members[0].model.device)
    active = _still(members, team, feed)
    saved = time.monotonic()
    total, start = members[0].recipe.steps, min(m.step for m in members)
    with tqdm(total=total, initial=start, disable=not progress, unit="step", dynamic_ncols=True) as bar:
        while active:
            team.step(feed([m.step for m in active]))
            looked = False
            for i, member in enumerate(active):
                member.step += 1
                if member.step in member.due:
                    _record(member, team, i)
                    looked = True
            bar.update()
            if looked:
                saved = time.monotonic()
                bar.set_postfix_str(_live(members), refresh=False)
                active = _still(active, team, feed)
            elif time.monotonic() - saved > SAVE_SECONDS:
                saved = time.monotonic()
                for i, member in enumerate(active):
                    _save(member, team, i)


def _still(members: list[_Member], team: Trainees, feed: Feed) -> list[_Member]:
    """The members that go on; the others leave the batch."""
    on = [i for i, m in enumerate(members) if not m.done]
    if len(on) < len(members):
        team.keep(on)
        feed.keep(on)
    return [members[i] for i in on]


def _record(member: _Member, team: Trainees, i: int) -> None:
    """Measure a member, write it down, and say whether it is done."""
    row = {"step": member.step, **measure(member.model, member.sets)}
    member.rows.append(row)
    if not math.isfinite(row["loss"]):
        member.failed = f"loss must be a number; it was {row['loss']} at step {member.step}. Use a smaller lr."
    member.done = member.failed is not None or member.step >= member.recipe.steps or met(member.recipe.stop, row)
    if member.folder is not None:
        member.folder.write(member.rows)
        member.folder.keep(member.model, member.step)
        _save(member, team, i)


def _save(member: _Member, team: Trainees, i: int) -> None:
    if member.folder is not None:
        member.folder.save(member.model, team.moments(i), member.counters())


def met(stop: str | None, row: dict[str, Any]) -> bool:
    """Whether a stopping criterion holds for a row of measures.

    Raises:
        OptionError: the criterion names a measure that the run does not have.
    """
    if stop is None:
        return False
    name, sign, bound = parse_stop(stop)
    if name not in row:
        raise OptionError(f"stop must name a measure of the run; got {name!r}. There are {', '.join(k for k in row if k != 'step')}.")
    return bool(COMPARE[sign](float(row[name]), bound))


def _live(members: Sequence[_Member]) -> str:
    last = [m.rows[-1] for m in members if m.rows]

    def mean(name: str) -> float:
        return sum(row[name] for row in last) / len(last)

    text = f"loss {mean('loss'):.2f}, right: ic {mean('accuracy_ic'):.2f}, iw {mean('accuracy_iw'):.2f}, any label {mean('cla_ic'):.2f}"
    return text if len(members) == 1 else f"{text}, {sum(m.done for m in members)}/{len(members)} done"


def load_toy(folder: str | os.PathLike[str], step: int | None = None) -> ToyTransformer:
    """The model of a run's folder, as it is now or as it was at a measured step. `model.renderer.task` is the task it was trained on.

    Raises:
        CheckpointError: no toy run's folder, or a damaged checkpoint.
        OptionError: a step that was not kept.
    """
    place = Path(folder).expanduser()
    model = build(read_recipe(place), start=False)
    tensors, path = read_weights(place, step)
    fill(model, tensors, path)
    return model.eval()


def series(run: ToyRun) -> Series:
    """A run's measures along training, without "loss" (which is no probability)."""
    names = [str(name) for name in run.table.columns if name not in ("step", "loss")]
    recipe = run.recipe
    provenance = Provenance(
        model=f"toy ({recipe.name})", dtype="float32", attention="toy", device=str(next(run.model.parameters()).device),
        task=f"{'multimodal' if recipe.multimodal else 'unimodal'}, fixed probe sequences", seed=recipe.seed, versions=versions(),
        options=recipe.to_json(),
    )  # fmt: skip
    return Series(
        steps=run.table["step"].to_numpy(),
        values={name: run.table[name].to_numpy(dtype=float) for name in names},
        low={},
        high={},
        unit="probability",
        n=recipe.probe_n,
        provenance=provenance,
    )
