"""Where checkpoints are: revisions of a hub model, a folder of `checkpoint-500`, `checkpoint-1000`, ..., mechicl's run folders, a model's folder in the hub's cache."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechicl.errors import CheckpointError, OptionError
from mechicl.models.adapters import is_adapter
from mechicl.models.load import check_folder, load

Revisions = Sequence[str | tuple[int, str]] | Mapping[str, int]
"""Branches, tags or commits: their names, where the step stands in the name, or (step, name), or {name: step}."""

TIMES = {"": 1, "k": 1000, "m": 1_000_000}
PROCESSOR = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint: training step, what it is called, the folder or hub id, and the hub's revision ("" for a folder)."""

    step: int
    name: str
    source: str
    revision: str = ""


def step_of(name: str) -> int | None:
    """The training step in a name: what follows "step", else the last number. "stage1-step1000-tokens4B" is 1000, "checkpoint-500" 500, "10k" 10,000."""
    found = re.search(r"step[-_ ]?(\d+)(k|m)?(?![a-z0-9])", name, re.IGNORECASE) or next(
        iter(reversed(list(re.finditer(r"(\d+)(k|m)?(?![a-z0-9])", name, re.IGNORECASE)))), None
    )
    return None if found is None else int(found[1]) * TIMES[(found[2] or "").lower()]


def checkpoints(source: str | os.PathLike[str] | Sequence[Any], revisions: Revisions | None = None) -> list[Checkpoint]:
    """Checkpoints in the order of their steps.

    Args:
        source: A hub id (with `revisions`); a folder of checkpoints, each a model's folder, an adapter's, or a mechicl run with `model` inside; a model's folder in the hub's cache
            (`models--owner--name`); or a list of folders, or of (step, folder).
        revisions: Of a hub model. The hub is not asked which there are.

    Raises:
        OptionError: fewer than two, two of one step, or a step that cannot be told.
        CheckpointError: a folder holds none, or one that cannot be loaded.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        if (path / "snapshots").is_dir():
            found = [Checkpoint(step, name, str(_snapshot(path, name))) for step, name in _stepped(revisions or _refs(path))]
        elif path.is_dir():
            if revisions is not None:
                raise OptionError(
                    f"revisions must be for a hub model; {path} is a folder. Leave them out: its checkpoints are found by their names."
                )
            found = _inside(path)
        elif revisions is None:
            raise OptionError(
                f"revisions must be given for a hub model; got none for {str(source)!r}. E.g. revisions=['step1000', 'step2000']."
            )
        else:
            found = [Checkpoint(step, name, str(source), name) for step, name in _stepped(revisions)]
    else:
        if revisions is not None:
            raise OptionError("revisions must be for a hub model; got a list of folders too. Leave one of them out.")
        found = [_listed(one) for one in source]
    for one in found:
        if not one.revision and not is_adapter(one.source):
            check_folder(Path(one.source))
    found.sort(key=lambda one: one.step)
    steps = [one.step for one in found]
    if len(found) < 2 or len(set(steps)) < len(steps):
        raise OptionError(
            f"checkpoints must be at least two, each of another step; got {[(c.step, c.name) for c in found]}. Give (step, name) for each."
        )
    return found


@contextmanager
def opened(one: Checkpoint, options: Mapping[str, Any]) -> Iterator[Any]:
    """The checkpoint's model. A folder without tokenizer or processor (as trainers leave them) takes those of the folder above it."""
    if one.revision:
        yield load(one.source, **{**options, "revision": one.revision})
        return
    folder = Path(one.source)
    above = next((p for p in (folder.parent, folder.parent.parent) if any((p / name).is_file() for name in PROCESSOR)), None)
    if is_adapter(folder) or above is None or any((folder / name).is_file() for name in PROCESSOR):
        yield load(folder, **options)
        return
    with tempfile.TemporaryDirectory(prefix="mechicl-") as temporary:
        whole = Path(temporary) / folder.name
        whole.mkdir()
        for path in (*above.iterdir(), *folder.iterdir()):  # the checkpoint's own files stand before those above it
            if path.is_file() and not (path.parent == above and (path.name.endswith(".safetensors") or path.name == "config.json")):
                (whole / path.name).unlink(missing_ok=True)
                (whole / path.name).symlink_to(path.resolve())
        yield load(whole, **options)


def _stepped(revisions: Revisions) -> list[tuple[int, str]]:
    if isinstance(revisions, Mapping):
        return [(int(step), str(name)) for name, step in revisions.items()]
    if isinstance(revisions, str):
        raise OptionError(f"revisions must be a list of names; got the text {revisions!r}. Put it in a list.")
    return [(int(one[0]), str(one[1])) if isinstance(one, tuple) else (_told(one), str(one)) for one in revisions]


def _told(name: str) -> int:
    step = step_of(name)
    if step is None:
        raise OptionError(f"a revision's name must tell its step, e.g. step1000; got {name!r}. Give (step, name).")
    return step


def _refs(path: Path) -> list[str | tuple[int, str]]:
    refs = path / "refs"
    return (
        [str(p.relative_to(refs)) for p in sorted(refs.rglob("*")) if p.is_file() and step_of(p.name) is not None] if refs.is_dir() else []
    )


def _snapshot(path: Path, revision: str) -> Path:
    """The folder of a revision in the hub's cache: what refs/<revision> names, or the commit itself.

    Raises:
        CheckpointError: it was not downloaded.
    """
    ref = path / "refs" / revision
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    folder = path / "snapshots" / commit
    if not folder.is_dir():
        raise CheckpointError(f"revision must be in the cache; {path.name} has no {revision!r}. Download it first.")
    return folder


def _inside(path: Path) -> list[Checkpoint]:
    found = [one for child in sorted(path.iterdir()) if child.is_dir() and (one := _as_checkpoint(child)) is not None]
    if not found:
        more = " Its own growth is in growth.json: mechicl.training.growth.read_growth." if (path / "growth.json").is_file() else ""
        raise CheckpointError(f"folder must hold checkpoints (checkpoint-500, ..., or runs with a model); {path} holds none.{more}")
    return found


def _as_checkpoint(folder: Path) -> Checkpoint | None:
    """A folder as a checkpoint; None where it is none, or its step cannot be told."""
    inner = folder / "model"
    whole = next(
        (p for p in (folder, inner) if is_adapter(p) or ((p / "config.json").is_file() and any(p.glob("*.safetensors")) and not _run(p))),
        None,
    )
    if whole is None:
        return None
    step = _logged(folder) if whole == inner else step_of(folder.name)
    return None if step is None else Checkpoint(step, folder.name, str(whole))


def _run(folder: Path) -> bool:
    """Whether a folder is a training's own: its config.json says how it was trained, not what the model is."""
    try:
        return "model_type" not in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True


def _logged(folder: Path) -> int | None:
    """The last step that a mechicl run logged; without a log, the number in its name."""
    log = folder / "metrics.jsonl"
    if not log.is_file():
        return step_of(folder.name)
    steps = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            steps.append(int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):  # a line that a kill cut off
            continue
    return max(steps, default=None)


def _listed(one: Any) -> Checkpoint:
    step, place = one if isinstance(one, tuple) else (None, one)
    folder = Path(place).expanduser()
    found = _as_checkpoint(folder) if folder.is_dir() else None
    whole = found.source if found is not None else str(folder / "model" if (folder / "model" / "config.json").is_file() else folder)
    step = step if step is not None else (found.step if found is not None else step_of(folder.name))
    if step is None:
        raise OptionError(f"a checkpoint's folder must tell its step; got {str(folder)!r}. Give (step, folder).")
    return Checkpoint(int(step), folder.parent.name if folder.name == "model" else folder.name, whole)
