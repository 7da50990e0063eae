"""What `build_or_sharpen` needs to know of each model, as JSON values, so that a folder can keep it: a run killed at any moment goes on where it was.

    build_or_sharpen.json    the base, the episodes and the options
    evidence.jsonl           a line for each model, and one for each graft: answers per episode, scores per episode
Models may be added to a folder later: the lines of the others are kept.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mechicl.analysis.ablation.switches import Switches
from mechicl.analysis.feed import Data
from mechicl.analysis.heads.scoring import score_heads
from mechicl.analysis.icl import icl_accuracy, usable
from mechicl.analysis.kept import KeptFolder
from mechicl.analysis.labels import answer, predict
from mechicl.analysis.link.head_weights import grafted
from mechicl.analysis.link.mechanism import SCORES, search
from mechicl.analysis.link.mechanism_carry import draws_beside
from mechicl.analysis.patching.metrics import Metric
from mechicl.analysis.patching.store import weights
from mechicl.analysis.statistics import bootstrap_interval
from mechicl.errors import CheckpointError
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode
from mechicl.results import Estimate, Head

PLAN, LINES = "build_or_sharpen.json", "evidence.jsonl"
PIXELS = 64_000_000
"""Pictures of all episodes together up to which prompts are rendered once; above it a few at a time, anew for each graft."""


class EvidenceFolder(KeptFolder):
    """The folder of one comparison."""

    plan: str = PLAN
    lines: str = LINES
    what: str = "comparison"
    finished: str = "models and grafts"

    def load(self) -> dict[tuple[str, ...], dict[str, Any]]:
        """Finished lines by their keys."""
        found: dict[tuple[str, ...], dict[str, Any]] = {}

        def take(line: dict[str, Any]) -> None:
            found[tuple(line["key"])] = line

        self.read_lines(take)
        return found


@dataclass(eq=False)
class Work:
    """A comparison at work: what is kept already, and what everything is measured with."""

    find: list[Episode]
    prove: list[Episode]
    threshold: float
    n_random: int
    metric: Metric
    seed: int
    batch_size: int
    progress: bool
    known: dict[tuple[str, ...], dict[str, Any]]
    store: EvidenceFolder | None = None
    rendered: Batch | None = None

    @classmethod
    def begin(
        cls, find: list[Episode], prove: list[Episode], out: str | os.PathLike[str] | None, asked: Mapping[str, Any], **options: Any
    ) -> Work:
        """Open the folder, if there is one."""
        store = None if out is None else EvidenceFolder(out, asked)
        return cls(find, prove, known={} if store is None else store.load(), store=store, **options)

    @property
    def common(self) -> dict[str, Any]:
        return {"seed": self.seed, "batch_size": self.batch_size, "progress": self.progress}

    def data(self, model: Any) -> Data:
        """The proving half, rendered once where the pictures are small."""
        if sum(image.width * image.height for episode in self.prove for image in episode.images) > PIXELS:
            return self.prove
        batch = self.rendered if self.rendered is not None else model.render(self.prove)
        self.rendered = batch
        return batch

    def keep(self, key: tuple[str, ...], line: Mapping[str, Any]) -> dict[str, Any]:
        """A finished line, written down."""
        whole = {"key": list(key), **line}
        if self.store is not None:
            self.store.add_line(whole)
        self.known[key] = whole
        return whole

    def known_as(self, name: str, model: Any) -> str:
        """The digest of a model's weights.

        Raises:
            CheckpointError: the folder holds another model of that name.
        """
        now = weights(model)
        kept = self.known.get(("model", name), {}).get("weights", now)
        if kept != now:
            raise CheckpointError(
                f"models must keep their names; {name!r} in this folder had other weights. Call it otherwise, or use another folder."
            )
        return now

    def evidence(self, name: str, model: Any) -> dict[str, Any]:
        """Answers, scores and carried shares of one model, and its answers without its link heads."""
        key = ("model", name)
        digest = self.known_as(name, model)
        if key in self.known:
            return self.known[key]
        answers = icl_accuracy(model, self.prove, **self.common)
        scores = score_heads(model, self.prove, scores=SCORES, **self.common)
        found = search(model, self.find, metric=self.metric, **self.common)
        heads, rule = found.sets(self.threshold)["link"]
        line: dict[str, Any] = {
            "weights": digest, "ids": list(answers.episode_ids), "correct": answers.correct.tolist(), "margins": _list(answers.margins),
            "zero_shot": None if answers.zero_shot is None else [answers.zero_shot.value, answers.zero_shot.low, answers.zero_shot.high, answers.zero_shot.n],
            "chance": answers.chance, "scores": {n: _list(s.per_episode) for n, s in scores.scores.items()}, "null": {n: _list(s.null) for n, s in scores.scores.items()},
            "carried": {twin: {"value": _list(s.value), "p": _list(s.p_corrected)} for twin, s in found.carried.items()},
            "link": [list(h) for h in heads], "rule": rule, "notes": list(found.notes), "skipped": [[s.episode, s.reason] for s in (*found.skipped, *answers.skipped)],
        }  # fmt: skip
        if heads:
            off = self._without(model, [heads, *draws_beside(model, heads, self.n_random, self.seed).sets])
            line["ablated"] = {"correct": off[0].tolist(), "random": [float(one.mean()) for one in off[1:]]}
        return self.keep(key, line)

    def _without(self, model: Any, sets: Sequence[tuple[Head, ...]]) -> list[np.ndarray]:
        """Which answers are right without each set; the means that take the heads' place are the finding half's."""
        data, names = self.data(model), [episode.id or str(k) for k, episode in enumerate(self.prove)]
        off = Switches.build(model, self.find, sets, "mean", seed=self.seed, batch_size=self.batch_size)
        found, key, reasons = answer(
            model, data, switches=off, batch_size=self.batch_size, names=names, what="heads off", progress=self.progress
        )
        kept, _ = usable(names, reasons)
        return [predict(one.total[kept], self.seed)[0] == key.answers[kept] for one in found]

    def graft(
        self, name: str, recipient: Any, donor: Any, side: str, what: str, *, heads: Sequence[Head] = (), letters: str = "qkvo", parts: Sequence[str] = (),
        random: Sequence[tuple[Head, ...]] = (), note: str = "",
    ) -> dict[str, Any]:  # fmt: skip
        """Answers of one graft, and the accuracy and mean margin of each random one."""
        key = ("graft", name, side, what, letters)
        if key in self.known:
            return self.known[key]
        right, margins = self._answers(recipient, donor, heads=heads, letters=letters, parts=parts)
        beside = [self._answers(recipient, donor, heads=one, letters=letters) for one in random]
        chance = {"random": [float(one.mean()) for one, _ in beside], "random_margins": [float(one.mean()) for _, one in beside]}
        return self.keep(
            key, {"correct": right.tolist(), "margins": _list(margins), "heads": [list(h) for h in heads], **chance, "note": note}
        )

    def _answers(self, recipient: Any, donor: Any, **what: Any) -> tuple[np.ndarray, np.ndarray]:
        with grafted(recipient, donor, **what) as model:
            found = icl_accuracy(model, self.data(model), zero_shot=False, seed=self.seed, batch_size=self.batch_size, progress=False)
        return found.correct, found.margins


def estimate(values: np.ndarray, seed: int, unit: str = "probability") -> Estimate:
    """Mean over episodes with its bootstrap interval, NaN left out."""
    known = values[~np.isnan(values)]
    if not len(known):
        return Estimate(np.nan, np.nan, np.nan, 0, unit, "bootstrap 95 %")
    low, high = bootstrap_interval(known, seed=seed)
    return Estimate(float(known.mean()), float(low), float(high), len(known), unit, "bootstrap 95 %")


def array(value: Any) -> np.ndarray:
    """Numbers that were kept; what was NaN is NaN again."""
    return np.array(value, dtype=np.float64)


def _list(values: np.ndarray) -> Any:
    """As JSON values; NaN as None, which JSON knows."""
    rounded = np.round(values.astype(np.float64), 6).astype(object)
    rounded[np.isnan(values)] = None
    return rounded.tolist()
