"""A study's folder: parts are kept when they are finished, so that a study killed at any moment goes on where it was.

study.json               what was asked for; another study in the same folder is refused
parts/<name>.json        a finished part, a result of `mechicl.results`, its arrays beside it in parts/<name>.safetensors
shards/                  finished shards of the parts that read attention and switch heads off (`mechicl.analysis.spread.folder`)
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

import mechicl.results
from mechicl.analysis.kept import KeptFolder
from mechicl.data.folders import write_whole
from mechicl.errors import CheckpointError

PARTS = "parts"


class StudyFolder(KeptFolder):
    """The folder of one study."""

    plan = "study.json"
    lines = ""
    what = "study"
    finished = "parts"

    def part(self, name: str, make: Callable[[], Any]) -> tuple[Any, float]:
        """A part of the study: read where it is finished, made and kept where it is not.

        Args:
            name: Of the part.
            make: Makes it: a result of `mechicl.results`, or tuples, mappings and arrays of such.

        Returns:
            The part, and the seconds that making it took (when it was made).

        Raises:
            CheckpointError: what was kept is damaged.
            OutputPathError: it cannot be written.
        """
        path = self.out / PARTS / f"{name}.json"
        if path.exists():
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
                return unpack(kept["value"], load(path.with_suffix(".safetensors").read_bytes())), float(kept["seconds"])
            except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{path} must hold a finished part; it does not ({error}). Delete it, and the part is made again."
                ) from error
        start = time.perf_counter()
        value = make()
        seconds = time.perf_counter() - start
        arrays: dict[str, np.ndarray] = {}
        text = json.dumps({"seconds": seconds, "value": pack(value, arrays)}) + "\n"
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        write_whole(path.with_suffix(".safetensors"), save(arrays))
        write_whole(path, text.encode())  # the part counts once its JSON is there
        return value, seconds


class Memory:
    """A study without a folder: nothing is kept, nothing is found."""

    out = None

    def part(self, name: str, make: Callable[[], Any]) -> tuple[Any, float]:
        """The part, made."""
        start = time.perf_counter()
        return make(), time.perf_counter() - start


def pack(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """A result as JSON values; its arrays go into `arrays`.

    Raises:
        TypeError: something that is no result, number, text, array or collection of these.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        key = str(len(arrays))
        arrays[key] = np.ascontiguousarray(value)
        return {"array": key, "shape": list(value.shape)}
    if is_dataclass(value) and not isinstance(value, type):
        if getattr(mechicl.results, type(value).__name__, None) is not type(value):
            raise TypeError(f"{type(value).__name__} is no result of mechicl.results")
        return {"result": type(value).__name__, "fields": {f.name: pack(getattr(value, f.name), arrays) for f in fields(value)}}
    if isinstance(value, Mapping):
        return {"mapping": [[pack(k, arrays), pack(v, arrays)] for k, v in value.items()]}
    if isinstance(value, tuple | list):
        return {"tuple" if isinstance(value, tuple) else "list": [pack(v, arrays) for v in value]}
    raise TypeError(f"{type(value).__name__} cannot be kept")


def unpack(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """What `pack` packed."""
    if not isinstance(value, dict):
        return value
    (kind, inside), *_ = value.items()
    if kind == "array":
        return np.array(arrays[inside]).reshape(value["shape"])
    if kind == "result":
        return getattr(mechicl.results, inside)(**{name: unpack(v, arrays) for name, v in value["fields"].items()})
    if kind == "mapping":
        return {unpack(k, arrays): unpack(v, arrays) for k, v in inside}
    if kind in ("tuple", "list"):
        found = [unpack(v, arrays) for v in inside]
        return tuple(found) if kind == "tuple" else found
    raise KeyError(kind)
