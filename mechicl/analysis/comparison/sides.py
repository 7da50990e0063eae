"""One side of a comparison: a model (or the name of one) scored and asked on the episodes, and kept in a folder so that the other side's failure loses nothing."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mechicl.analysis.comparison.trunk import head_weights
from mechicl.analysis.comparison.words import prompts_of
from mechicl.analysis.feed import Data, ids_of
from mechicl.analysis.heads.scoring import score_heads
from mechicl.analysis.icl import icl_accuracy
from mechicl.analysis.kept import KeptFolder
from mechicl.analysis.link.store import digest
from mechicl.errors import OptionError
from mechicl.models.load import load
from mechicl.prompts.batch import Batch
from mechicl.results import Estimate, HeadScores, ICLAccuracy, Provenance, Score, Skipped
from mechicl.results.comparison import Side

Weights = dict[str, list[Tensor]] | str
Source = Any
"""A hooked model, or what `mechicl.load` takes: then it is loaded when its turn comes and let go afterwards."""


@dataclass(frozen=True)
class Asked:
    """What both sides are asked."""

    scores: tuple[str, ...]
    accuracy: bool
    n_null: int | None
    seed: int
    batch_size: int
    task: str
    progress: bool


class SideStore(KeptFolder):
    """The folder of a comparison: what was asked, and one line for each side that is measured."""

    plan: str = "compare.json"
    lines: str = "sides.jsonl"
    what: str = "comparison"
    finished: str = "sides"

    def load(self) -> dict[int, Side]:
        """Finished sides by number."""
        found: dict[int, Side] = {}

        def take(line: dict[str, Any]) -> None:
            found[int(line["side"])] = read_side(line)

        self.read_lines(take)
        return found

    def add(self, number: int, side: Side) -> None:
        """Keep a finished side."""
        self.add_line({"side": number, **write_side(side)})


def named(source: Source) -> str:
    """What a model or its name is called."""
    return str(source) if isinstance(source, str | Path) else str(getattr(getattr(source, "cfg", None), "model_name", "model"))


def opened(source: Source, options: Mapping[str, Any]) -> Any:
    """The model itself."""
    return load(source, **options) if isinstance(source, str | Path) else source


def measure(model: Any, data: Data, name: str, asked: Asked) -> Side:
    """Scores and answers of one model."""
    common: dict[str, Any] = {"seed": asked.seed, "batch_size": asked.batch_size, "task": asked.task, "progress": asked.progress}
    scores = score_heads(model, data, scores=asked.scores, n_null=asked.n_null, **common)
    answers = icl_accuracy(model, data, zero_shot=False, **common) if asked.accuracy else None
    episodes = data.episodes if isinstance(data, Batch) else data
    return Side(
        name, scores, answers, int(model.cfg.n_layers), int(model.cfg.n_heads), prompts_of(episodes) if episodes else "vectors", str(model.cfg.model_type)
    )  # fmt: skip


def both_sides(
    sources: tuple[Source, Source], data: tuple[Data, Data], names: tuple[str, str], asked: Asked, options: Mapping[str, Any], store: SideStore | None, *, weigh: bool
) -> tuple[tuple[Side, Side], tuple[Weights, Weights] | None]:  # fmt: skip
    """Measure both, one after the other; a model that was named is in memory only in its turn.

    Returns:
        The sides, and their attention weights on the CPU if `weigh` (None where not).
    """
    done = store.load() if store is not None else {}
    sides: list[Side] = []
    weights: list[Weights] = []
    for number in (0, 1):
        model = None
        if number not in done or weigh:
            model = opened(sources[number], options)
        side = done.get(number)
        if side is None:
            side = measure(model, data[number], names[number], asked)
            if store is not None:
                store.add(number, side)
        sides.append(side)
        if weigh:
            weights.append(head_weights(model))
        if isinstance(sources[number], str | Path):
            del model
            gc.collect()
    return (sides[0], sides[1]), (weights[0], weights[1]) if weigh else None


def unique_ids(data: Data) -> bool:
    """Whether every episode has a name of its own."""
    names: Sequence[str] = ids_of(data)
    return len(set(names)) == len(names)


def known_by(data: Data) -> str:
    """A digest of episodes, by which a folder knows them again.

    Raises:
        OptionError: a Batch without episodes.
    """
    episodes = data.episodes if isinstance(data, Batch) else data
    if not episodes:
        raise OptionError("out must be for episodes, by which its folder is known again; got a Batch without any. Leave out away.")
    return digest(episodes)


def write_side(side: Side) -> dict[str, Any]:
    """A side as JSON values."""
    return {
        "name": side.name, "n_layers": side.n_layers, "n_heads": side.n_heads, "prompts": side.prompts, "model_type": side.model_type,
        "scores": {name: _plain(score) for name, score in side.scores.scores.items()},
        "head_scores": {"n": side.scores.n, "n_key_value_heads": side.scores.n_key_value_heads, "skipped": [asdict(s) for s in side.scores.skipped],
                        "provenance": asdict(side.scores.provenance), "notes": list(side.scores.notes)},
        "accuracy": None if side.accuracy is None else _plain(side.accuracy),
    }  # fmt: skip


def read_side(line: Mapping[str, Any]) -> Side:
    """What `write_side` wrote."""
    head = line["head_scores"]
    scores = HeadScores(
        scores={name: Score(**_arrays(one)) for name, one in line["scores"].items()}, n=head["n"], n_key_value_heads=head["n_key_value_heads"],
        skipped=tuple(Skipped(**one) for one in head["skipped"]), provenance=Provenance(**head["provenance"]), notes=tuple(head["notes"]),
    )  # fmt: skip
    accuracy = None
    if line["accuracy"] is not None:
        found = _arrays(line["accuracy"])
        for name in ("accuracy", "first_token_accuracy", "open_accuracy", "cla", "margin", "zero_shot"):
            found[name] = None if found[name] is None else Estimate(**found[name])
        found |= {
            "candidates": tuple(tuple(row) for row in found["candidates"]),
            "episode_ids": tuple(found["episode_ids"]),
            "notes": tuple(found["notes"]),
        }
        found |= {"skipped": tuple(Skipped(**one) for one in found["skipped"]), "provenance": Provenance(**found["provenance"])}
        accuracy = ICLAccuracy(**found)
    return Side(line["name"], scores, accuracy, line["n_layers"], line["n_heads"], line["prompts"], line["model_type"])


def _plain(result: Any) -> dict[str, Any]:
    """A result's fields as JSON values; arrays keep their type."""
    out: dict[str, Any] = {}
    for one in fields(result):
        value = getattr(result, one.name)
        if isinstance(value, np.ndarray):
            out[one.name] = {"array": value.tolist(), "dtype": str(value.dtype)}
        elif isinstance(value, Estimate | Provenance):
            out[one.name] = asdict(value)
        elif one.name == "skipped":
            out[one.name] = [asdict(skipped) for skipped in value]
        else:
            out[one.name] = value
    return out


def _arrays(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: np.array(value["array"], dtype=value["dtype"]) if isinstance(value, dict) and "array" in value else value
        for name, value in found.items()
    }
