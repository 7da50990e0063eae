"""From a way to choose examples to prompts, and from prompts to scores: what `compare_strategies` does for each of its ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mechicl.analysis.examples.retrieval import REFUSALS, Chosen
from mechicl.analysis.feed import progress_bar
from mechicl.analysis.labels import LabelScore, answer
from mechicl.data.anchored import HIDDEN, Plan, anchored
from mechicl.errors import EpisodeError
from mechicl.prompts.episode import Episode, Shot
from mechicl.prompts.form import Form

PROMPTED = ("zero-shot", "random", "retrieved", "least similar", "anchored")
"""Ways in which the model answers. "anchored" may name its plan: "anchored:both", "anchored:negative", ..."""
BASELINES = ("majority", "copy", "prior")
"""Ways without a model. majority: the label that most of the retrieved examples have (a vote of nearest neighbours). copy: the label of the single
nearest one. prior: the pool's more frequent label. Ties are decided by a seeded coin."""
Choose = Callable[[Shot, Sequence[Shot]], Sequence[Shot]]
"""A user's way: (query with its label hidden, the pool) -> the examples to show, in order."""


@dataclass(frozen=True, eq=False)
class Task:
    """Everything that decides the prompts."""

    queries: Sequence[Shot]
    pool: Sequence[Shot]
    labels: tuple[str, str]
    k: int
    negative: Any
    plan: Plan
    instruction: str
    question: str
    form: Form
    seed: int
    chosen: Mapping[str, Chosen]
    custom: Mapping[str, Choose]
    same: np.ndarray
    """[query, item] pairs that are one item: never an example of itself."""

    def episodes(self, way: str, i: int) -> list[Episode]:
        """The prompts of a query under one way; more than one are scored together."""
        query = self.queries[i]
        name = query.item or str(i)
        if way in self.custom:
            return [self._shown(i, self.custom[way](replace(query, label=HIDDEN), self.others(i)), name)]
        if way == "zero-shot":
            return [self._shown(i, (), name)]
        if way.startswith("anchored"):
            plan: Any = way.partition(":")[2] or self.plan
            positives = [self.pool[j] for j in self.chosen["positive"].rows[i]] if plan == "borrowed" else ()
            return anchored(
                query, self.labels, negative=self.negative, plan=plan, others=self.others(i), positives=positives,
                instruction=self.instruction, question=self.question, form=self.form, seed=_mixed(self.seed, i), id=name,
            )  # fmt: skip
        rows = self.chosen[way].rows[i][::-1]  # the best match last, next to the query
        return [self._shown(i, [self.pool[j] for j in rows], name)]

    def others(self, i: int) -> list[Shot]:
        """The pool without the query itself."""
        return [shot for shot, same in zip(self.pool, self.same[i], strict=True) if not same]

    def _shown(self, i: int, shots: Sequence[Shot], name: str) -> Episode:
        return Episode(tuple(shots), self.queries[i], self.labels, self.instruction, self.question, id=name, form=self.form)

    def votes(self, way: str) -> np.ndarray:
        """Score of a way without a model, [batch]."""
        positive = np.array([shot.label == self.labels[1] for shot in self.pool])
        if way == "prior":
            return np.full(len(self.queries), positive.mean())
        rows = self.chosen["retrieved"].rows
        return positive[rows].mean(1) if way == "majority" else np.where(positive[rows[:, 0]], 1.0, -1.0)


def _mixed(seed: int, i: int) -> int:
    """A seed of the query's own."""
    return int(np.random.SeedSequence([seed, i]).generate_state(1)[0])


def run_ways(
    model: Any, job: Task, ways: tuple[str, ...], score: LabelScore, batch_size: int, progress: bool, reasons: list[str]
) -> tuple[dict[str, np.ndarray], dict[str, float], list[str]]:
    """Scores of every way [batch], NaN where a query cannot be asked; examples shown on average; why each query is left out ("": it is not; `reasons` has those known already)."""
    n = len(job.queries)
    scores = {way: job.votes(way) if way in BASELINES else np.full(n, np.nan) for way in ways}
    shots = {way: float({"majority": job.k, "copy": 1, "prior": 0}.get(way, 0)) for way in ways}
    prompted = [way for way in ways if way not in BASELINES]
    bar = progress_bar(None, total=n * len(prompted), what="asking queries", show=progress)
    for way in prompted:
        seen: list[int] = []
        for start in range(0, n, batch_size):
            rows = [i for i in range(start, min(start + batch_size, n)) if not reasons[i]]
            made: dict[int, list[Episode]] = {}
            for i in rows:
                try:
                    made[i] = job.episodes(way, i)
                except EpisodeError as error:
                    reasons[i] = f"{way}: {error}"
            ask = partial(_ask, model, score=score, batch_size=batch_size)
            for i, value in _each(made, ask, way, reasons).items():
                scores[way][i] = value
                seen.append(len(made[i][0].shots))
            bar.update(min(start + batch_size, n) - start)
        shots[way] = float(np.mean(seen)) if seen else float("nan")
    bar.close()
    return scores, shots, reasons


def _each(
    made: Mapping[int, list[Episode]], ask: Callable[[list[Episode]], tuple[np.ndarray, list[str]]], way: str, reasons: list[str]
) -> dict[int, float]:
    """Score of every query: all in one go, and one by one where that is refused, so that one bad query costs itself only."""
    rows = list(made)
    if not rows:
        return {}
    try:
        flat, why = ask([episode for i in rows for episode in made[i]])
    except REFUSALS as error:
        if len(rows) == 1:
            reasons[rows[0]] = f"{way}: {error}"
            return {}
        found: dict[int, float] = {}
        for i in rows:
            found |= _each({i: made[i]}, ask, way, reasons)
        return found
    found, at = {}, 0
    for i in rows:
        part = slice(at, at := at + len(made[i]))
        bad = next((reason for reason in why[part] if reason), "")
        if bad:
            reasons[i] = f"{way}: {bad}"
        else:
            found[i] = float(flat[part].mean())
    return found


def _ask(model: Any, episodes: list[Episode], *, score: LabelScore, batch_size: int) -> tuple[np.ndarray, list[str]]:
    """Log-probability of the positive label minus the negative one's, nats, and why an episode cannot be scored."""
    found, _, reasons = answer(model, episodes, score=score, batch_size=batch_size, names=[episode.id for episode in episodes])
    values = found[0].deciding(score)
    return values[:, 1] - values[:, 0], reasons
