"""The crew of a study: this process or several workers, with finished shards in the study's folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mechicl.analysis.spread.crew import Crew
from mechicl.analysis.spread.job import hire
from mechicl.studies.keep import Memory, StudyFolder

SHARDS = "shards"
"""Folder of finished shards, in the study's."""


class StudyCrew:
    """Who ranks and knocks out: hired when the first part needs it, let go before the fine-tuning wants the room."""

    def __init__(self, model: Any, source: str, folder: StudyFolder | Memory, shard: int, asked: Mapping[str, Any]) -> None:
        self.model, self.source, self.folder, self.shard, self.asked = model, source, folder, shard, asked
        self._crew: Crew | None = None

    def __enter__(self) -> StudyCrew:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def at_work(self) -> Crew:
        """The crew. Shards are of `shard` episodes, two at least, however many workers there are."""
        if self._crew is None:
            asked = dict(self.asked)
            out = None if self.folder.out is None else self.folder.out / SHARDS
            common: dict[str, Any] = {"shard": max(2, self.shard), "out": out}
            self._crew = hire(self.source, **common, **asked) if asked["workers"] else hire(self.model, workers=0, **common)
        return self._crew

    def close(self) -> None:
        """Let the workers go."""
        if self._crew is not None:
            self._crew.hands.close()
        self._crew = None
