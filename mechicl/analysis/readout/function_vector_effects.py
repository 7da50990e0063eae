"""`add_function_vector`: what saying the vector does where no examples say what the task is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mechicl.analysis.ablation.matched import matched_draws
from mechicl.analysis.feed import check_data, ids_of, progress_bar, provenance, rehearse
from mechicl.analysis.guarded import each_batch, guarded
from mechicl.analysis.labels import predict
from mechicl.analysis.readout.function_vectors import reader, shuffle
from mechicl.analysis.statistics import mean_estimate, paired_change, permutation_p, wilson
from mechicl.errors import OptionError
from mechicl.models.resuming.resume import Cell, record, run_cells
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode
from mechicl.results import FunctionVector, VectorEffect

Prompts = Literal["zero-shot", "labels shuffled"]


@guarded
def add_function_vector(
    model: Any,
    episodes: Sequence[Episode],
    vector: FunctionVector,
    *,
    layers: Sequence[int] | None = None,
    prompts: Sequence[Prompts] = ("zero-shot", "labels shuffled"),
    scale: float = 1.0,
    n_random: int = 10,
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> FunctionVector:
    """What the vector does where no examples say what the task is: it is added to the stream at the last token, before each layer in turn.

    Prompts are the episodes without their exemplars ("zero-shot"), and with their labels shuffled. Controls of the same length: random directions, and the
    means of as many other heads from the same layers. A vector that beats both carries something that direction and length alone do not; whether that is the
    task or merely "one of these labels" shows in the accuracy among the candidates, which only the right one of them raises.

    Args:
        model: The model that the vector was made from.
        episodes: Other episodes of the same task than those the vector was made from (a note says so where they are the same).
        vector: From `function_vector`.
        layers: Before which layers; default each.
        prompts: What to add it to.
        scale: Multiplies the vector (and the controls).
        n_random: Controls of each kind; 10 of both make p = 0.048 possible.
        seed: Of controls, shuffles, ties and intervals.
        batch_size: Prompts per forward pass.
        task: For the record.
        progress: Show a bar.

    Returns:
        The vector with `effects` and `baseline`.

    Raises:
        OptionError: an option out of range.
        EpisodeError: no data, or one class only.

    Source:
        Todd et al. 2024. Differs: controls at every layer; accuracy among the candidates beside probability.
    """
    check_data(episodes, batch_size)
    where = list(range(model.cfg.n_layers)) if layers is None else [int(layer) for layer in layers]
    if not where or not all(0 <= layer < model.cfg.n_layers for layer in where) or n_random < 0:
        raise OptionError(
            f"layers must be in 0..{model.cfg.n_layers - 1} and n_random at least 0; got {where} and {n_random}. Layers count from 0."
        )
    if unknown := [name for name in prompts if name not in get_args(Prompts)]:
        raise OptionError(f"prompts must be some of {', '.join(get_args(Prompts))}; got {unknown}. Pick some of them.")
    rehearse(model, episodes)
    bundle, notes = _bundle(vector, n_random, seed)
    if set(vector.episode_ids) & set(ids_of(episodes)):
        notes.append("Some of these episodes (by name) also made the vector: part of their own answers is in it. Use others.")
    made: dict[str, Callable[[], list[Episode]]] = {
        "zero-shot": lambda: [episode.without_shots() for episode in episodes],
        "labels shuffled": lambda: shuffle(episodes, seed),
    }
    effects: list[VectorEffect] = []
    baseline = {}
    bar = progress_bar(None, total=len(prompts) * len(episodes), what="adding the vector", show=progress)

    def add(batch: Batch, _: range) -> tuple[np.ndarray, np.ndarray]:
        return _added(model, batch, scale * bundle, where, seed, bar)

    for name in dict.fromkeys(prompts):
        found = list(each_batch(model, made[name](), batch_size, add))
        probability, correct = (np.concatenate([part[k] for part in found], -1) for k in (0, 1))
        baseline[name] = (mean_estimate(probability[0], unit="probability", seed=seed), wilson(correct[0]))
        for i, layer in enumerate(where):
            cells = slice(1 + i * len(bundle), 1 + (i + 1) * len(bundle))
            effects.append(_effect(layer, name, probability[0], probability[cells], correct[0], correct[cells], n_random, seed))
    bar.close()
    options = {**vector.provenance.options, "layers": where, "scale": scale, "n_random": n_random, "added to": list(prompts)}
    return replace(
        vector, effects=tuple(effects), baseline=baseline, notes=(*vector.notes, *notes),
        provenance=provenance(model, task=task or vector.provenance.task, seed=seed, options=options),
    )  # fmt: skip


def _bundle(vector: FunctionVector, n_random: int, seed: int) -> tuple[Tensor, list[str]]:
    """The vector, `n_random` random directions and as many sums of other heads' means (fewer where there are not so many), all of one length: [k, d_model]."""
    draw = np.random.default_rng(seed)
    rows = [vector.vector, *draw.standard_normal((n_random, len(vector.vector)))]
    n_heads = {layer: int((~np.isnan(some[:, 0])).sum()) for layer, some in enumerate(vector.head_means)}
    draws = matched_draws(vector.heads, {layer: n for layer, n in n_heads.items() if n}, n_random, seed=seed)
    sums = [np.sum([vector.head_means[head] for head in one], 0) for one in draws.sets if one]
    silent = sum(not np.linalg.norm(one) > 0 for one in sums)
    rows += [one for one in sums if np.linalg.norm(one) > 0]
    notes = [draws.note] if draws.note else []
    if silent:
        notes.append(f"{silent} random sets of heads write nothing on average and were left out.")
    length = vector.length
    return torch.tensor(np.stack([row * (length / (np.linalg.norm(row) or 1.0)) for row in rows])), notes


def _added(model: Any, batch: Batch, bundle: Tensor, layers: Sequence[int], seed: int, bar: Any) -> tuple[np.ndarray, np.ndarray]:
    """Probability of the right label, and whether it is the likeliest candidate, [cell, batch]: first without a vector, then layer by layer with each."""
    recorded = record(model, batch)
    read, start = reader(batch), int(batch.query_pos.min())
    at = batch.query_pos - start
    cells = [Cell(layer, start=start, stream=_with(recorded.pre(layer)[:, start:], one, at)) for layer in layers for one in bundle]
    found = [read(recorded.logits), *run_cells(recorded, cells, lambda logits, _: read(logits))]
    answers = np.array(batch.answers)
    bar.update(batch.n)
    return np.stack([p for p, _ in found]), np.stack([predict(logs, seed)[0] == answers for _, logs in found])


def _with(stream: Tensor, vector: Tensor, at: Tensor) -> Callable[[], Tensor]:
    """The stream with the vector added at one position of each prompt."""

    def make() -> Tensor:
        out = stream.clone()
        rows = torch.arange(len(out))
        out[rows, at.to(out.device)] = (out[rows, at.to(out.device)].double() + vector.to(out.device)).to(out.dtype)
        return out

    return make


def _effect(
    layer: int,
    prompts: str,
    before: np.ndarray,
    after: np.ndarray,
    correct_before: np.ndarray,
    correct: np.ndarray,
    n_random: int,
    seed: int,
) -> VectorEffect:
    """`after`, `correct` [vector, batch]: the function vector, the random directions, the random heads."""
    changes = (after - before).mean(1)
    random = changes[1:]
    return VectorEffect(
        layer=layer, prompts=prompts, probability=mean_estimate(after[0], unit="probability", seed=seed), accuracy=wilson(correct[0]),
        change_probability=paired_change(before, after[0], unit="probability", seed=seed),
        change_accuracy=paired_change(correct_before, correct[0], unit="probability", seed=seed), random_vectors=random[:n_random],
        random_heads=random[n_random:],
        p_random=float(permutation_p(0.0, int((random >= changes[0]).sum()), len(random))) if len(random) else float("nan"),
    )  # fmt: skip
