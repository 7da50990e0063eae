"""A run's folder: what it was asked for, what it measured, and checkpoints it can be continued from to the same bits.

    config.json            what was asked for; a run with another configuration is refused
    metrics.jsonl          one line per measurement
    state.safetensors      the newest weights and optimizer moments, with the counters in the header
    steps/<step>.json      measures of earlier checkpoints
No pickle anywhere. Every file is written under a temporary name, flushed and renamed, so a run killed at any moment leaves a whole one behind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mechicl.data.folders import Hold, append_line, write_whole
from mechicl.errors import CheckpointError, OutputPathError

STATE = "state.safetensors"
CONFIG = "config.json"
METRICS = "metrics.jsonl"
AGAIN = "Delete the folder and start again."


def check_out(folder: Path, *, resume: bool) -> bool:
    """Whether the folder holds a run to continue; nothing is made, so that a command can ask before its work.

    Raises:
        OutputPathError: it holds a run and `resume` is not set, or other files.
    """
    if (folder / CONFIG).exists():
        if not resume:
            raise OutputPathError(
                f"out must be an empty folder; {folder} holds a run. Pass resume=True (--resume) to continue it, or choose another folder."
            )
        return True
    if folder.is_dir() and any(other.name != f"{CONFIG}.part" for other in folder.iterdir()):  # that one: killed at the very first write
        raise OutputPathError(f"out must be an empty folder or a run's folder; {folder} holds other files. Choose another folder.")
    return False


@dataclass(frozen=True)
class Run:
    """A run folder. `held`: while this object lives, no other process trains in it."""

    folder: Path
    held: Hold | None = field(default=None, repr=False, compare=False)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], config: Mapping[str, Any], *, resume: bool) -> Run:
        """Start a run in an empty or new folder, or find one to continue.

        Args:
            config: Everything that decides the run's numbers, JSON values.
            resume: Continue what is in the folder; a folder without a run is started.

        Raises:
            OutputPathError: the folder cannot be written, holds something and `resume` is not set, or another process trains in it.
            CheckpointError: the folder's run has another configuration, or its configuration cannot be read.
        """
        path = Path(folder)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputPathError(
                f"out must be a folder that can be written; got {path} ({error.strerror}). Choose another place."
            ) from error
        run = cls(path)
        wanted = json.loads(json.dumps(config))
        if check_out(path, resume=resume):
            compare(read_json(path / CONFIG), wanted, path)
        else:
            write_text(path / CONFIG, json.dumps(wanted, indent=1, sort_keys=True) + "\n")
        return replace(run, held=Hold(path / CONFIG, "training"))

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, counters: Mapping[str, Any]) -> None:
        """Replace the checkpoint."""
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        self.put(tensors, counters)

    def put(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Replace the checkpoint by tensors and counters of the caller's own naming.

        Raises:
            OutputPathError: it cannot be written; the checkpoint before it stays.
        """
        write_tensors(self.folder / STATE, tensors, {"counters": json.dumps(counters)})

    def take(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The checkpoint's tensors and counters; None where none was written yet.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self.folder / STATE
        if not path.exists():
            return None
        tensors, header = read_tensors(path)
        try:
            return tensors, json.loads(header["counters"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{STATE} must be a whole checkpoint of this run; {path} has no counters. {AGAIN}") from error

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Put the checkpoint back and return its counters; None where none was written yet.

        Raises:
            CheckpointError: the file is damaged or belongs to another model.
        """
        found = self.take()
        if found is None:
            return None
        tensors, counters = found
        try:
            model.load_state_dict({n.removeprefix("model."): v for n, v in tensors.items() if n.startswith("model.")})
        except RuntimeError as error:
            path = self.folder / STATE
            raise CheckpointError(
                f"{STATE} must be a whole checkpoint of this run; reading {path} failed: {str(error).splitlines()[0]}. {AGAIN}"
            ) from error
        for name, parameter in model.named_parameters():
            keys = {n.split(".")[1] for n in tensors if n.startswith("optimizer.") and n.split(".", 2)[2] == name}
            if keys:
                optimizer.state[parameter] = {key: tensors[f"optimizer.{key}.{name}"] for key in keys}
        self.trim(int(counters["step"]))
        return counters

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a measurement.

        Raises:
            OutputPathError: the disk is full or gone.
        """
        append_line(self.folder / METRICS, json.dumps(line))

    def lines(self) -> list[dict[str, Any]]:
        """All measurements so far; a line that a kill cut off is left out."""
        path = self.folder / METRICS
        if not path.exists():
            return []
        out = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                out.append(json.loads(line))
            except ValueError:
                break
        return out

    def trim(self, step: int) -> None:
        """Forget measurements made after a checkpoint: they are made again."""
        kept = [line for line in self.lines() if line["step"] <= step]
        write_text(self.folder / METRICS, "".join(json.dumps(line) + "\n" for line in kept))


def compare(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Refuse to continue a run under another configuration.

    Raises:
        CheckpointError: an entry differs.
    """
    one, other = flatten(found), flatten(wanted)
    different = [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]
    if different:
        key = different[0]
        raise CheckpointError(
            f"{key} must be what the run in {path} was started with, {short(one.get(key))}; got {short(other.get(key))}. "
            "Use the same options, or another folder."
        )


def flatten(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Entries under dotted names, such as "task.K"."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        out |= flatten(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return out


def short(value: Any) -> str:
    """A value for an error message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a run.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} must be readable JSON; {path} is not ({error}). {AGAIN}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Tensors as safetensors, under a temporary name first.

    Raises:
        OutputPathError: see `write_whole`.
    """
    from safetensors.torch import save

    write_whole(path, save({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, dict(header)))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file.

    Raises:
        CheckpointError: the file is damaged or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path.name} must be a whole checkpoint; reading {path} failed: {str(error).splitlines()[0]}. {AGAIN}"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, flush, rename. Errors: see `write_whole`."""
    write_whole(path, text.encode())
