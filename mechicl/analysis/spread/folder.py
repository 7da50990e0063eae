"""The folder of a crew: finished shards are kept as they come, so that a driver killed at any moment goes on where it was.

    spread.json           the model and the size of a shard
    shards.jsonl          one line for each finished shard: which job (a digest of episodes and options), which shard, what it said, its file
    <job>-<shard>.safetensors     its arrays
A shard's file is whole before its line is written; a file without a line is written again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from mechicl.analysis.kept import KeptFolder
from mechicl.analysis.spread.work import Part
from mechicl.data.folders import write_whole
from mechicl.errors import CheckpointError


class ShardFolder(KeptFolder):
    """Where a crew keeps its parts."""

    plan: str = "spread.json"
    lines: str = "shards.jsonl"
    what: str = "crew"
    finished: str = "shards"

    def load(self, key: str) -> Mapping[int, Part]:
        """The finished shards of a job.

        Raises:
            CheckpointError: a line or a file is damaged.
        """
        found: dict[int, Part] = {}

        def take(line: dict[str, Any]) -> None:
            if line["job"] != key:
                return
            path = self.out / line["file"]
            try:
                arrays = load_file(path)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{path} must hold a finished shard; it does not ({error}). Delete its line, or the folder."
                ) from error
            found[line["shard"]] = Part({name: arrays[name] for name in line["arrays"]}, line["said"], tuple(line["notes"]))

        self.read_lines(take)
        return found

    def add(self, key: str, shard: int, part: Part) -> None:
        """Keep a finished shard.

        Raises:
            OutputPathError: the disk is full or gone.
        """
        name = f"{key[:16]}-{shard:05d}.safetensors"
        write_whole(self.out / name, save({k: np.ascontiguousarray(v) for k, v in part.arrays.items()}))
        self.add_line(
            {"job": key, "shard": shard, "file": name, "arrays": list(part.arrays), "said": dict(part.said), "notes": list(part.notes)}
        )
