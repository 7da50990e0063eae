"""The folder of an evaluation: finished batches are kept as they come, so that a run killed at any moment loses only the batch in flight.

    link.json        what was asked for: model, episodes, options
    answers.jsonl    one line for each finished batch: setting, rows, log-probabilities of the candidates, texts, reasons
    scores.csv, changes.csv, answers.parquet     the tables, once all is finished
A line is written whole and flushed to the disk; one that a crash cut off is not read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mechicl.analysis.link_answers import Asked
from mechicl.errors import CheckpointError, OutputPathError
from mechicl.prompts.episode import Episode
from mechicl.results import LinkScores

PLAN, ANSWERS = "link.json", "answers.jsonl"
TABLES = ("scores.csv", "changes.csv", "answers.parquet")


def digest(episodes: Sequence[Episode]) -> str:
    """A digest of episodes: every picture's pixels, every text and label, in order."""
    seen: dict[int, bytes] = {}
    whole = hashlib.sha256()
    for episode in episodes:
        form = repr(episode.form)
        whole.update(repr((episode.id, episode.candidates, episode.instruction, episode.question, form)).encode())
        for shot in (*episode.shots, episode.query):
            whole.update(repr((shot.label, shot.text, shot.item, len(shot.images))).encode())
            for image in shot.images:
                if id(image) not in seen:
                    seen[id(image)] = hashlib.sha256(repr((image.size, image.mode)).encode() + image.tobytes()).digest()
                whole.update(seen[id(image)])
    return whole.hexdigest()


class AnswerStore:
    """The folder of one evaluation.

    Args:
        out: The folder; made if it is not there.
        asked: What was asked for, as JSON values.

    Raises:
        CheckpointError: the folder holds another evaluation (names what differs), or its plan cannot be read.
        OutputPathError: it cannot be written, or holds other files.
    """

    def __init__(self, out: str | os.PathLike[str], asked: Mapping[str, Any]) -> None:
        self.out = Path(out)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if (self.out / PLAN).exists():
                self._agree(asked)
            elif any(not path.name.endswith(".part") for path in self.out.iterdir()):
                raise OutputPathError(
                    f"out must be a new or empty folder, or this evaluation's; {self.out} holds other files. Choose another folder."
                )
            else:
                _replace(self.out / PLAN, (json.dumps(asked, indent=1) + "\n").encode())
        except OSError as error:
            raise _unwritable(self.out, error) from error

    def _agree(self, asked: Mapping[str, Any]) -> None:
        path = self.out / PLAN
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{PLAN} must be readable JSON; {path} is not ({error}). Use another folder.") from error
        now = json.loads(json.dumps(asked))
        changed = [name for name in sorted({*found, *now}) if found.get(name) != now.get(name)]
        if changed:
            before, after = json.dumps(found.get(changed[0])), json.dumps(now.get(changed[0]))
            others = f" (also changed: {', '.join(changed[1:])})" if len(changed) > 1 else ""
            raise CheckpointError(
                f"out must hold the same evaluation; in {self.out} {changed[0]} was {before[:60]}, now {after[:60]}{others}. "
                "Ask for the same, or use another folder."
            )

    def load(self) -> dict[tuple[str, int], Asked]:
        """Finished answers by (setting, row)."""
        path = self.out / ANSWERS
        if not path.exists():
            return {}
        text = path.read_bytes()
        end = text.rfind(b"\n") + 1  # what follows the last line end was cut off
        if end < len(text):
            _replace(path, text[:end])
        found: dict[tuple[str, int], Asked] = {}
        for number, line in enumerate(text[:end].splitlines()):
            try:
                read = json.loads(line)
                for row, values, written, reason in zip(read["rows"], read["values"], read["texts"], read["reasons"], strict=True):
                    found[str(read["setting"]), int(row)] = Asked(tuple(float(v) for v in values), str(written), str(reason))
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{ANSWERS} must hold finished batches; line {number + 1} of {path} does not ({error}). Delete the file."
                ) from error
        return found

    def add(self, setting: str, rows: Sequence[int], answers: Sequence[Asked]) -> None:
        """Keep a finished batch.

        Raises:
            OutputPathError: the disk is full or gone.
        """
        line = json.dumps(
            {"setting": setting, "rows": list(rows), "values": [one.values for one in answers], "texts": [one.text for one in answers],
             "reasons": [one.reason for one in answers]}
        )  # fmt: skip
        try:
            with (self.out / ANSWERS).open("ab") as file:
                file.write(line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unwritable(self.out, error) from error

    def finish(self, scores: LinkScores) -> None:
        """Write the tables."""
        try:
            for name, table in zip(TABLES, (scores.to_frame(), scores.changes_frame(), scores.answers_frame()), strict=True):
                temporary = self.out / (name + ".part")
                if name.endswith(".csv"):
                    table.to_csv(temporary, index=False, lineterminator="\n")
                else:
                    table.to_parquet(temporary, index=False)
                temporary.replace(self.out / name)
        except OSError as error:
            raise _unwritable(self.out, error) from error


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _unwritable(out: Path, error: OSError) -> OutputPathError:
    return OutputPathError(
        f"out must be a folder that can be written; got {out} ({error.strerror or error}). Make room or choose another place: finished batches are kept."
    )
