"""The parts of the study, each kept as soon as it is finished: one setting's head scores, and one setting's knock-outs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from mechicl.analysis.ablation.switches import How, Switches
from mechicl.analysis.feed import ids_of
from mechicl.analysis.heads.scoring import score_heads
from mechicl.analysis.icl import icl_accuracy, mark, usable
from mechicl.analysis.kept import KeptFolder
from mechicl.analysis.labels import LabelScore, answer
from mechicl.analysis.readout.function_vectors import function_vector_scores
from mechicl.analysis.statistics import bootstrap_interval, holm, wilson
from mechicl.errors import CheckpointError
from mechicl.prompts.episode import Episode
from mechicl.results import Head, Provenance, Score

ARRAYS = ("value", "null", "null_high", "p")
"""What is kept of a score beside its episodes."""
BESIDE = ("previous_token", "ila")
"""Scores of the circuit's other parts, whose heads are no fair control."""


@dataclass(frozen=True, eq=False)
class ScoredSetting:
    """One setting on the half where heads are chosen. `scores`: "induction" (where the answer can be copied), "function_vector", and those of `BESIDE`; empty where
    the model is not above chance."""

    task: str
    shots: int
    correct: np.ndarray
    chance: float
    scores: dict[str, Score]
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class KnockedSetting:
    """One setting on the other half, with every set of heads off. `correct`: set -> [batch] of right answers; `zero_shot`: right answers without examples."""

    task: str
    shots: int
    how: str
    intact: np.ndarray
    zero_shot: np.ndarray
    chance: float
    correct: dict[tuple[Head, ...], np.ndarray]
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()


class OddsFolder(KeptFolder):
    """The folder of one study: odds.json (what was asked), odds.jsonl (a line for each finished part), tables at the end."""

    plan: str = "odds.json"
    lines: str = "odds.jsonl"
    what: str = "study"
    finished: str = "parts"

    def load(self) -> tuple[dict[tuple[str, int], ScoredSetting], dict[tuple[str, int, str], KnockedSetting], list[list[str]]]:
        """Finished parts, and for which sets the knock-outs were made."""
        scored: dict[tuple[str, int], ScoredSetting] = {}
        knocked: dict[tuple[str, int, str], KnockedSetting] = {}
        sets: list[list[str]] = []

        def take(line: dict[str, Any]) -> None:
            if line["part"] == "scores":
                one = _scored_of(line)
                scored[one.task, one.shots] = one
            elif line["part"] == "knock-outs":
                off = _knocked_of(line)
                knocked[off.task, off.shots, off.how] = off
                sets.append(list(line["sets"]))
            else:
                raise ValueError(f"no part is called {line['part']!r}")

        self.read_lines(take)
        return scored, knocked, sets

    def check_sets(self, kept: Sequence[Sequence[str]], now: Sequence[tuple[Head, ...]]) -> None:
        """Raises CheckpointError where kept knock-outs are of other heads: the machine or the software scored them otherwise."""
        wanted = [name_of(one) for one in now]
        if any(list(one) != wanted for one in kept):
            raise CheckpointError(
                f"{self.lines} must hold knock-outs of the heads that are ranked now; {self.out} holds others. Delete the file, or use another folder."
            )

    def add(self, part: ScoredSetting | KnockedSetting) -> None:
        """Keep a finished part."""
        self.add_line(_scored_line(part) if isinstance(part, ScoredSetting) else _knocked_line(part))


def score_setting(
    model: Any, functions: Sequence[Sequence[Episode]], *, task: str, shots: int, copied: bool, seed: int, batch_size: int, progress: bool
) -> ScoredSetting:
    """Accuracy, and both scores of every head, on some functions of a task."""
    common: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "task": task, "progress": progress}
    every = [episode for some in functions for episode in some]
    accuracy = icl_accuracy(model, every, zero_shot=False, **common)
    scores: dict[str, Score] = {}
    if wilson(accuracy.correct).low > accuracy.chance:
        if copied:
            scores |= dict(score_heads(model, every, scores=("induction", *BESIDE), **common).scores)
        scores["function_vector"] = together([function_vector_scores(model, list(some), **common) for some in functions])
    return ScoredSetting(task, shots, accuracy.correct, accuracy.chance, scores, tuple((s.episode, s.reason) for s in accuracy.skipped))


def together(scores: Sequence[Score]) -> Score:
    """One score over independent sets of episodes: values are means over sets, episodes are laid end to end, p-values combined (Stouffer) and then corrected.

    `null_high` is the mean of the sets' own, which is wider than that of the pooled null: read `p` instead.
    """
    first = scores[0]
    per_episode = np.concatenate([one.per_episode for one in scores])
    low, high = bootstrap_interval(per_episode)
    means = {name: np.mean([getattr(one, name) for one in scores], 0) for name in ("value", "null", "null_high")}
    p = combined_p(np.stack([one.p for one in scores]))
    return Score(
        name=first.name, description=first.description, unit=first.unit, **means, low=low, high=high, p=p, p_corrected=holm(p), per_episode=per_episode,
        source=first.source, null_name=first.null_name, lift=first.lift,
    )  # fmt: skip


def combined_p(p: np.ndarray) -> np.ndarray:
    """Stouffer's combination of one-sided p-values of independent tests over the first axis; NaN where one is."""
    normal = NormalDist()
    z = np.array([np.nan if x != x else normal.inv_cdf(1 - min(max(x, 1e-12), 1 - 1e-12)) for x in p.ravel().tolist()]).reshape(p.shape)
    total = z.sum(0) / np.sqrt(len(p))
    return np.array([np.nan if x != x else 1 - normal.cdf(x) for x in total.ravel().tolist()]).reshape(p.shape[1:])


def knock_out(
    model: Any,
    prove: Sequence[Episode],
    reference: Sequence[Episode],
    sets: Sequence[tuple[Head, ...]],
    how: How,
    *,
    task: str,
    shots: int,
    seed: int,
    batch_size: int,
    progress: bool,
    score: LabelScore = "full",
) -> KnockedSetting:
    """The same episodes with every set of heads off; "mean" takes its means from the other half."""
    every = [(), *sets]
    switches = Switches.build(model, reference if how == "mean" else prove, every, how, seed=seed, batch_size=batch_size)
    names = ids_of(prove)
    found, key, reasons = answer(
        model, prove, score=score, switches=switches, batch_size=batch_size, names=names, what=f"{task}, {shots} shots, {how}: {len(sets)} sets of heads off", progress=progress
    )  # fmt: skip
    kept, skipped = usable(names, reasons)
    common: dict[str, Any] = {"score": score, "seed": seed, "zero_shot": None, "notes": [], "made": Provenance("")}
    marked = [mark(one, key, names, kept, skipped, **common) for one in found]
    bare = [prove[i].without_shots() for i in kept]
    alone, bare_key, _ = answer(model, bare, score=score, batch_size=batch_size, what="zero-shot control", progress=progress)
    zero = mark(alone[0], bare_key, [names[i] for i in kept], np.arange(len(kept)), (), **common)
    correct = {one: result.correct for one, result in zip(sets, marked[1:], strict=True)}
    return KnockedSetting(
        task, shots, how, marked[0].correct, zero.correct, marked[0].chance, correct, tuple((s.episode, s.reason) for s in skipped)
    )


# -- lines ----------------------------------------------------------------------------------------------------------------------------------------


def name_of(heads: Sequence[Head]) -> str:
    """ "3.0 3.1"."""
    return " ".join(f"{layer}.{head}" for layer, head in heads)


def _heads_of(name: str) -> tuple[Head, ...]:
    pairs = [part.split(".") for part in name.split()]
    return tuple((int(layer), int(head)) for layer, head in pairs)


def _bits(correct: np.ndarray) -> str:
    return "".join("1" if x else "0" for x in correct)


def _of_bits(bits: str) -> np.ndarray:
    return np.array([{"1": True, "0": False}[x] for x in bits], dtype=bool)


def _rounded(array: np.ndarray) -> Any:
    """A list with NaN as None, seven figures: a float32 has no more."""
    flat = [None if x != x else float(f"{x:.7g}") for x in np.asarray(array, dtype=float).ravel().tolist()]
    return {"shape": list(array.shape), "values": flat}


def _array(kept: dict[str, Any]) -> np.ndarray:
    return np.array([np.nan if x is None else x for x in kept["values"]], dtype=float).reshape(kept["shape"])


def _scored_line(one: ScoredSetting) -> dict[str, Any]:
    words = ("name", "description", "unit", "source", "null_name", "lift")
    scores = {
        name: {word: getattr(s, word) for word in words}
        | {array: _rounded(getattr(s, array)) for array in (*ARRAYS, "low", "high", "p_corrected", "per_episode")}
        for name, s in one.scores.items()
    }
    return {
        "part": "scores", "task": one.task, "shots": one.shots, "correct": _bits(one.correct), "chance": one.chance, "scores": scores, "skipped": one.skipped, "notes": one.notes
    }  # fmt: skip


def _scored_of(line: dict[str, Any]) -> ScoredSetting:
    scores = {}
    for name, kept in line["scores"].items():
        fields: dict[str, Any] = {key: _array(value) if isinstance(value, dict) else value for key, value in kept.items()}
        scores[name] = Score(**fields)
    skipped = tuple((str(a), str(b)) for a, b in line["skipped"])
    return ScoredSetting(
        str(line["task"]),
        int(line["shots"]),
        _of_bits(line["correct"]),
        float(line["chance"]),
        scores,
        skipped,
        tuple(line.get("notes", ())),
    )


def _knocked_line(one: KnockedSetting) -> dict[str, Any]:
    return {
        "part": "knock-outs", "task": one.task, "shots": one.shots, "how": one.how, "intact": _bits(one.intact), "zero_shot": _bits(one.zero_shot),
        "chance": one.chance, "sets": [name_of(heads) for heads in one.correct], "correct": [_bits(x) for x in one.correct.values()], "skipped": one.skipped, "notes": one.notes,
    }  # fmt: skip


def _knocked_of(line: dict[str, Any]) -> KnockedSetting:
    correct = {_heads_of(name): _of_bits(bits) for name, bits in zip(line["sets"], line["correct"], strict=True)}
    skipped = tuple((str(a), str(b)) for a, b in line["skipped"])
    return KnockedSetting(
        str(line["task"]), int(line["shots"]), str(line["how"]), _of_bits(line["intact"]), _of_bits(line["zero_shot"]), float(line["chance"]), correct, skipped, tuple(line.get("notes", ()))
    )  # fmt: skip
