"""A folder that keeps what is finished as it comes, so that work killed at any moment goes on where it was.

a plan (JSON)            what was asked for; a folder that was asked something else is refused
lines (JSON Lines)       one for each finished batch, written whole and flushed to the disk; one that a crash cut off is not read
tables                   written under a temporary name and renamed, once all is finished
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from mechicl.data.folders import Hold, append_line, whole_file, write_whole
from mechicl.errors import CheckpointError, OutputPathError


class KeptFolder:
    """The folder of one piece of work. Subclasses name its files and say what a line is.

    Args:
        out: The folder; made if it is not there.
        asked: What was asked for, as JSON values.

    Raises:
        CheckpointError: the folder holds other work (names what differs), or its plan cannot be read.
        OutputPathError: it cannot be written, holds other files, or another process is at work in it.
    """

    out: Path
    held: Hold

    plan: str
    lines: str
    what: str
    """What the work is called in messages: "sweep"."""
    finished: str
    """What a line holds: "cells"."""

    def __init__(self, out: str | os.PathLike[str], asked: Mapping[str, Any]) -> None:
        self.out = Path(out)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if (self.out / self.plan).exists():
                self._agree(asked)
            elif any(not path.name.endswith(".part") for path in self.out.iterdir()):
                raise OutputPathError(
                    f"out must be a new or empty folder, or this {self.what}'s; {self.out} holds other files. Choose another folder."
                )
            else:
                write_whole(self.out / self.plan, (json.dumps(asked, indent=1) + "\n").encode())
        except OSError as error:
            raise self._unwritable(error) from error
        self.held = Hold(self.out / self.plan, self.what)

    def _agree(self, asked: Mapping[str, Any]) -> None:
        path = self.out / self.plan
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{self.plan} must be readable JSON; {path} is not ({error}). Use another folder.") from error
        now = json.loads(json.dumps(asked))
        changed = [name for name in sorted({*found, *now}) if found.get(name) != now.get(name)]
        if changed:
            before, after = json.dumps(found.get(changed[0])), json.dumps(now.get(changed[0]))
            others = f" (also changed: {', '.join(changed[1:])})" if len(changed) > 1 else ""
            raise CheckpointError(
                f"out must hold the same {self.what}; in {self.out} {changed[0]} was {before[:60]}, now {after[:60]}{others}. "
                "Ask for the same, or use another folder."
            )

    def read_lines(self, take: Callable[[dict[str, Any]], None]) -> None:
        """Hand every finished line to `take`; what follows the last line end was cut off by a crash and is dropped.

        Raises:
            CheckpointError: a line is damaged, or `take` cannot use it.
        """
        path = self.out / self.lines
        if not path.exists():
            return
        text = path.read_bytes()
        end = text.rfind(b"\n") + 1
        if end < len(text):
            write_whole(path, text[:end])
        for number, line in enumerate(text[:end].splitlines()):
            try:
                take(json.loads(line))
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise CheckpointError(
                    f"{self.lines} must hold finished {self.finished}; line {number + 1} of {path} does not ({error}). Delete the file."
                ) from error

    def add_line(self, line: Mapping[str, Any]) -> None:
        """Keep a finished batch.

        Raises:
            OutputPathError: the disk is full or gone.
        """
        append_line(self.out / self.lines, json.dumps(line))

    def write_table(self, name: str, table: pd.DataFrame) -> None:
        """Write a table, Parquet or (named so) CSV.

        Raises:
            OutputPathError: the disk is full or gone.
        """
        with whole_file(self.out / name) as path:
            if name.endswith(".csv"):
                table.to_csv(path, index=False, lineterminator="\n")
            else:
                table.to_parquet(path, index=False)

    def _unwritable(self, error: OSError) -> OutputPathError:
        return OutputPathError(
            f"out must be a folder that can be written; got {self.out} ({error.strerror or error}). Make room or choose another place: "
            f"finished {self.finished} are kept."
        )
