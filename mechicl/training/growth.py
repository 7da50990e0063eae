"""How in-context learning grows along training: accuracy and head scores on the same probe episodes, again and again."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from mechicl.errors import CheckpointError
from mechicl.results import Provenance, Series
from mechicl.training.assembly import image_token
from mechicl.training.stages import Probe
from mechicl.training.tasks import Bench, Work

GROWTH = "growth.json"
PROBE_SEED = 977
"""Probes do not depend on the run's seed: runs can be compared."""


def probe_work(bench: Bench, probe: Probe) -> Work:
    """The probe's episodes: held-out classes and words, the same ones every time."""
    rng = random.Random(f"probe {PROBE_SEED} {probe.name}")
    generator = Generator().manual_seed(rng.getrandbits(62))
    if probe.shape is None:
        return bench.repeats(rng, generator)
    return bench.episodes(probe.shape, probe.n, rng, generator, glyphs=probe.glyphs, split="held_out")


@torch.no_grad()
def right_answers(model: Any, work: Work) -> Tensor:
    """For each row the share of right tokens (repeats) or whether every token of the answer is the likeliest (episodes). Shape [batch]."""
    hits = token_hits(model, work)
    if work.rows is None:
        return hits.sum(1) / work.answer[:, 1:].sum(1)
    return (hits | ~work.answer[:, 1:]).all(1).float()


def token_hits(model: Any, work: Work) -> Tensor:
    """Where in the answer the likeliest next token is the right one. Shape [batch, pos - 1], aligned with tokens 1 to the last."""
    hidden = model.model(**work.inputs, use_cache=False).last_hidden_state
    where = work.answer[:, 1:]
    guess = model.get_output_embeddings()(hidden[:, :-1][where]).argmax(-1)
    hits = torch.zeros_like(where)
    hits[where] = guess == work.inputs["input_ids"][:, 1:][where]
    return hits


@torch.no_grad()
def head_scores(model: Any, work: Work) -> dict[str, Tensor]:
    """Attention of every head on the probe: previous token, label to its own item, query to right minus wrong labels; and CLA.

    Returns:
        "previous token", "label to its item", "induction": [batch, layer, head] mass in probability; "cla": [batch], whether the likeliest first
        token opens a label of the prompt. Induction is the mass on right labels and the tokens that close their turns (up to the next picture), minus that on
        wrong ones: 1 for a head that looks only at right ones. Label to its item: the most that a token of the label or its close gives to the item.

    Source:
        Huang et al. 2026 (PH, ILA, IHStrength, CLA). Differs: masses per span; previous token on text rows only.
    """
    assert work.rows is not None
    assert work.order is not None
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        out = model.model(**work.inputs, use_cache=False, output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    rows, order = work.rows, work.order
    ids = rows.input_ids
    batch, n_pos = ids.shape
    at = torch.arange(n_pos)[None, None]
    inside = (at >= rows.starts[..., None]) & (at < rows.stops[..., None])  # [batch, item, pos]
    begins = torch.cat([torch.zeros(batch, 1, dtype=torch.long), rows.stops[:, :-1]], 1)
    picture = ids == image_token(model.config)
    content = picture if picture.any() else rows.attention_mask.bool()
    own = (at >= begins[..., None]) & (at < rows.starts[..., None]) & content[:, None]
    turn = inside | closing(rows.stops, picture if picture.any() else torch.zeros_like(picture))
    right = (turn[:, :-1] & (order[:, :-1] == order[:, -1:])[..., None]).any(1).float()
    wrong = (turn[:, :-1] & (order[:, :-1] != order[:, -1:])[..., None]).any(1).float()
    query = rows.starts[:, -1] - 1
    each = torch.arange(batch)
    text = (rows.attention_mask.bool() & ~picture)[:, 1:] & rows.attention_mask.bool()[:, :-1]
    scores: dict[str, list[Tensor]] = {"previous token": [], "label to its item": [], "induction": []}
    for pattern in out.attentions:  # [batch, head, dest, src]
        row = pattern[each, :, query]
        scores["induction"].append((row * (right - wrong)[:, None]).sum(-1))
        back = pattern.diagonal(-1, 2, 3)
        scores["previous token"].append((back * text[:, None]).sum(-1) / text.sum(-1)[:, None])
        mass = torch.einsum("bhds,bis->bhid", pattern, own[:, :-1].float())
        scores["label to its item"].append(mass.masked_fill(~turn[:, None, :-1], 0.0).amax(-1).mean(-1))
    first = model.get_output_embeddings()(out.last_hidden_state[each, query]).argmax(-1)
    openings = ids.gather(1, rows.starts[:, :-1])
    return {name: torch.stack(few, 1) for name, few in scores.items()} | {"cla": (openings == first[:, None]).any(1).float()}


def closing(stops: Tensor, picture: Tensor) -> Tensor:
    """Tokens after each label, up to the next picture: where a chat template closes the turn. [batch, item, pos]; none where there is no picture."""
    at = torch.arange(picture.shape[1])
    after = at >= stops[..., None]
    met = (picture[:, None] & after).cumsum(-1) > 0
    return after & ~met & picture.any(-1)[:, None, None]


def measure(model: Any, works: Mapping[str, Work], heads: Work) -> dict[str, list[float]]:
    """One point of the growth curve: for every measure [value, low, high].

    Args:
        works: Probe name -> episodes, measured for accuracy.
        heads: The episodes on which head scores are measured; the best head and the sum over the best four are reported.
    """
    model.eval()
    point = {f"accuracy, {name}": proportion(right_answers(model, work)) for name, work in works.items()}
    scores = head_scores(model, heads)
    point["CLA"] = proportion(scores.pop("cla"))
    for name, values in scores.items():
        flat = values.flatten(1)
        best = int(flat.mean(0).argmax())
        point[f"{name}, best head"] = mean_interval(flat[:, best])
        point[f"{name} head"] = [float(best // values.shape[2]), float(best % values.shape[2]), float("nan")][:2]
    return point


def proportion(right: Tensor) -> list[float]:
    """Share with its 95 % interval (Wilson 1927)."""
    n, share, z = len(right), float(right.mean()), 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return [share, max(0.0, centre - half), min(1.0, centre + half)]


def mean_interval(values: Tensor) -> list[float]:
    """Mean with its 95 % normal interval over episodes."""
    mean, half = float(values.mean()), 1.959964 * float(values.std(correction=1)) / math.sqrt(len(values))
    return [mean, mean - half, mean + half]


def growth_steps(last: int, points: int) -> set[int]:
    """About `points` steps from 0 to `last`, evenly spaced on a logarithmic scale."""
    return {0, *(round(x) for x in np.geomspace(20, max(last, 21), max(points, 2)))}


def to_series(points: Sequence[Mapping[str, Any]], stages: Sequence[tuple[int, str]], n: int, provenance: Provenance) -> Series:
    """Growth points, each {"step": ..., measure: [value, low, high]}, as a Series."""
    names = [name for name, value in points[0]["measures"].items() if len(value) == 3]
    column = {name: np.array([point["measures"][name] for point in points], dtype=float) for name in names}
    return Series(
        steps=np.array([point["step"] for point in points]),
        values={name: x[:, 0] for name, x in column.items()},
        low={name: x[:, 1] for name, x in column.items()},
        high={name: x[:, 2] for name, x in column.items()},
        unit="probability",
        n=n,
        provenance=provenance,
        stages=tuple(stages),
    )


def write_growth(series: Series) -> str:
    """A Series as JSON text."""
    lists = {part: {k: [round(float(x), 5) for x in v] for k, v in getattr(series, part).items()} for part in ("values", "low", "high")}
    head = {"steps": [int(x) for x in series.steps], "unit": series.unit, "n": series.n, "stages": list(map(list, series.stages))}
    return json.dumps(head | lists | {"provenance": asdict(series.provenance)}, indent=1) + "\n"


def read_growth(folder: str | os.PathLike[str]) -> Series:
    """The growth curve of a trained organism's folder.

    Raises:
        CheckpointError: the folder has none, or it cannot be read.
    """
    path = Path(folder) / GROWTH
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        parts = {part: {k: np.array(v, dtype=float) for k, v in data[part].items()} for part in ("values", "low", "high")}
        return Series(
            steps=np.array(data["steps"]),
            **parts,
            unit=data["unit"],
            n=data["n"],
            provenance=Provenance(**data["provenance"]),
            stages=tuple((int(step), str(name)) for step, name in data["stages"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"folder must hold a readable {GROWTH}; {path} is not ({error}). Train a model with `mechicl train vlm`."
        ) from error
