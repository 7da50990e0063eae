"""What a worker does with a shard of the episodes, and how shards are put together again: attention read, labels scored, heads' outputs summed.

A shard's answer is a `Part`: arrays, and what JSON can say. The statistics (intervals, nulls, corrections) are not made here: they are made once, by the
analysis that asked, from all parts in the order of the episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mechicl.analysis.ablation.switches import Switches, head_sums
from mechicl.analysis.guarded import guarded
from mechicl.analysis.heads.published import READERS, Published, published_scores
from mechicl.analysis.heads.reading import Wanted, offsets_of, read_parts
from mechicl.analysis.labels import Answers, Key, answer
from mechicl.analysis.layout import Layout
from mechicl.prompts.episode import Episode

COLUMNS = ("total", "per_token", "first", "greedy")


@dataclass(frozen=True, eq=False)
class Part:
    """What came of a shard: arrays by name, what JSON can say, and notes (memory that ran out, values near the dtype's largest)."""

    arrays: Mapping[str, np.ndarray]
    said: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@guarded
def read_shard(
    model: Any, data: Sequence[Episode], *, batch_size: int, wanted: Wanted, n_shots: int, n_offsets: int, names: Sequence[str]
) -> Part:
    """Attention of a shard, summed over groups of tokens."""
    parts = read_parts(model, data, wanted, batch_size=batch_size, names=names, n_shots=n_shots, n_offsets=n_offsets)
    arrays = {f"{i} {name}": value for i, (found, _) in enumerate(parts) for name, value in found.items()}
    arrays |= {
        f"{i} layout {name}": getattr(where, name).numpy() for i, (_, where) in enumerate(parts) for name in Layout.__dataclass_fields__
    }
    return Part(arrays, {"n": len(parts)})


def readings(parts: Sequence[Part]) -> list[tuple[dict[str, np.ndarray], Layout]]:
    """Parts -> what `read_parts` gave on the workers."""
    found = []
    for part in parts:
        for i in range(part.said["n"]):
            mine = {name.partition(" ")[2]: value for name, value in part.arrays.items() if name.partition(" ")[0] == str(i)}
            where = Layout(**{name: torch.from_numpy(mine.pop(f"layout {name}").copy()) for name in Layout.__dataclass_fields__})
            found.append((mine, where))
    return found


@guarded
def published_shard(model: Any, data: Sequence[Episode], *, batch_size: int, names: Sequence[str]) -> Part:
    """The published head scores of a shard."""
    found = published_scores(model, data, batch_size=batch_size)
    lost = [name for name, values in zip(names, found.ih, strict=True) if np.isnan(values).all()]
    return Part(
        {"ph": found.ph, "ih": found.ih, **{f"by {name}": values for name, values in found.ph_by.items()}},
        {"elsewhere": found.elsewhere, "lost": lost},
    )


def published_of(parts: Sequence[Part]) -> Published:
    """Parts -> what `published_scores` would have given; a reader that a shard lacks is NaN there."""
    ph, ih = (np.concatenate([part.arrays[name] for part in parts]) for name in ("ph", "ih"))
    names = dict.fromkeys(name.removeprefix("by ") for part in parts for name in part.arrays if name.startswith("by "))
    by = {
        name: np.concatenate([part.arrays.get(f"by {name}", np.full_like(part.arrays["ph"], np.nan)) for part in parts])
        for name in READERS.values()
        if name in names
    }
    return Published(ph, by, ih, sum(part.said["elsewhere"] for part in parts), tuple(name for part in parts for name in part.said["lost"]))


@guarded
def answer_shard(model: Any, data: Sequence[Episode], *, batch_size: int, score: Any, switches: Switches, names: Sequence[str]) -> Part:
    """Labels of a shard scored, once for each set of heads."""
    found, key, reasons = answer(model, data, score=score, switches=switches, batch_size=batch_size, names=names)
    arrays = {f"{k} {name}": getattr(one, name) for k, one in enumerate(found) for name in COLUMNS}
    said = {
        "sets": len(found), "answers": key.answers.tolist(), "candidates": [list(row) for row in key.candidates], "reasons": list(reasons),
        "first_tokens": [list(row) for row in key.first_tokens], "context_tokens": [sorted(row) for row in key.context_tokens],
    }  # fmt: skip
    return Part(arrays, said)


def answers(parts: Sequence[Part]) -> tuple[list[Answers], Key, list[str]]:
    """Parts -> what `answer` would have given."""
    found = [
        Answers.join([Answers(**{name: part.arrays[f"{k} {name}"] for name in COLUMNS}) for part in parts])
        for k in range(parts[0].said["sets"])
    ]
    keys = [
        Key(
            np.array(part.said["answers"]), tuple(tuple(row) for row in part.said["candidates"]),
            tuple(tuple(row) for row in part.said["first_tokens"]), tuple(frozenset(row) for row in part.said["context_tokens"]),
        )
        for part in parts
    ]  # fmt: skip
    return found, Key.join(keys), [reason for part in parts for reason in part.said["reasons"]]


@guarded
def sum_shard(model: Any, data: Sequence[Episode], *, batch_size: int, layers: Sequence[int]) -> Part:
    """Heads' outputs of a shard, summed over its real positions."""
    sums, count = head_sums(model, data, layers, batch_size=batch_size)
    return Part({str(layer): value.cpu().numpy() for layer, value in sums.items()}, {"count": count})


def means(parts: Sequence[Part]) -> dict[int, torch.Tensor]:
    """Parts -> layer -> mean output [head, d_head], summed in the order of the episodes."""
    count = sum(part.said["count"] for part in parts)
    names = list(parts[0].arrays)
    return {int(name): sum((torch.from_numpy(part.arrays[name].copy()) for part in parts), torch.zeros(())) / count for name in names}


def render_shard(model: Any, data: Sequence[Episode], *, wanted: Wanted | None = None, n_shots: int = 0) -> Part:
    """Render episodes for the refusals that rendering raises; with `wanted`, how many offsets their attention is read at."""
    batch = model.render(list(data))
    return Part({}, {"n_offsets": offsets_of(batch, wanted, n_shots) if wanted is not None else 0})


WORK: Mapping[str, Callable[..., Part]] = {
    "read": read_shard,
    "published": published_shard,
    "answer": answer_shard,
    "sum": sum_shard,
    "render": render_shard,
}


def about(model: Any) -> dict[str, Any]:
    """What a driver must know of the model that its workers hold."""
    anatomy = getattr(model, "anatomy", None)
    layers = range(model.cfg.n_layers)
    return {
        "cfg": model.cfg, "describe": dict(model.describe()), "hooks": list(model.hook_dict),
        "unavailable": dict(getattr(model, "unavailable", {})),
        "n_heads": [int(anatomy.layers[k].n_heads) if anatomy is not None else int(model.cfg.n_heads) for k in layers],
    }  # fmt: skip
