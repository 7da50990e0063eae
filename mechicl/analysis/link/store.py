"""The folder of an evaluation: finished batches are kept as they come, so that a run killed at any moment loses only the batch in flight.

    link.json        what was asked for: model, episodes, options
    answers.jsonl    one line for each finished batch: setting, rows, log-probabilities of the candidates, texts, reasons
    scores.csv, changes.csv, answers.parquet     the tables, once all is finished
A line is written whole and flushed to the disk; one that a crash cut off is not read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from mechicl.analysis.kept import KeptFolder
from mechicl.analysis.link.answers import Asked
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


class AnswerStore(KeptFolder):
    """The folder of one evaluation."""

    plan: str = PLAN
    lines: str = ANSWERS
    what: str = "evaluation"
    finished: str = "batches"

    def load(self) -> dict[tuple[str, int], Asked]:
        """Finished answers by (setting, row)."""
        found: dict[tuple[str, int], Asked] = {}

        def take(read: dict[str, Any]) -> None:
            for row, values, written, reason in zip(read["rows"], read["values"], read["texts"], read["reasons"], strict=True):
                found[str(read["setting"]), int(row)] = Asked(tuple(float(v) for v in values), str(written), str(reason))

        self.read_lines(take)
        return found

    def add(self, setting: str, rows: Sequence[int], answers: Sequence[Asked]) -> None:
        """Keep a finished batch."""
        self.add_line(
            {"setting": setting, "rows": list(rows), "values": [one.values for one in answers], "texts": [one.text for one in answers],
             "reasons": [one.reason for one in answers]}
        )  # fmt: skip

    def finish(self, scores: LinkScores) -> None:
        """Write the tables."""
        for name, table in zip(TABLES, (scores.to_frame(), scores.changes_frame(), scores.answers_frame()), strict=True):
            self.write_table(name, table)
