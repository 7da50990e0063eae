"""Function vectors: what a head says about the task, apart from any one prompt, and what saying it does elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechicl.analysis.ablation.switches import switchable, z_name
from mechicl.analysis.feed import check_data, ids_of, progress_bar, provenance, rehearse
from mechicl.analysis.gradients.backward import values
from mechicl.analysis.guarded import each_batch, guarded
from mechicl.analysis.statistics import bootstrap_interval, gain_p, holm
from mechicl.errors import EpisodeError, OptionError
from mechicl.models import streams
from mechicl.models.hooked import check_heads
from mechicl.models.resuming.resume import Cell, record, run_cells
from mechicl.prompts.batch import Batch
from mechicl.prompts.corrupt import permute_labels
from mechicl.prompts.episode import Episode
from mechicl.results import FunctionVector, Head, Score

NAME = "function_vector"
Means = Mapping[int, Tensor]
"""Layer -> heads' outputs at the last token, [n, head, d_head], float32."""


@guarded
def function_vector_scores(
    model: Any,
    episodes: Sequence[Episode],
    *,
    reference: Sequence[Episode] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> Score:
    """How much of the answer a head's mean output brings back when the prompt says nothing: the causal indirect effect of every head.

    The labels of a prompt are shuffled over its exemplars; then one head's output at the last token is replaced by its mean over *other* episodes' clean
    prompts, and the probability of the right label's first token is compared with that of the shuffled prompt. The control is matched in content: the same
    head, with its mean over the other episodes' *shuffled* prompts, which are of the same words, labels and length and lack only the task. p is for the clean
    mean doing more than that.

    What it can carry here: a mean over episodes keeps what these episodes share. With one task (the same classes and labels in every episode) that includes
    which label goes with what, as far as one vector can say it. Where labels are drawn anew in every episode, as in most data of mechicl, no mean can hold
    the episode's pairs: what is left is the form of the answer ("now comes a label") and the labels' common part, and a low score is what a working
    induction circuit gives. So draw the episodes of one task before concluding that a model has no such heads.

    Args:
        model: A `HookedVLM`, or a toy. Families that normalise or gate the heads' outputs are served too.
        episodes: Of one task.
        reference: Other episodes to take the means from; default the same ones, each episode left out of its own mean.
        seed: Of the shuffles and intervals.
        batch_size: Prompts per forward pass.
        task: What the data are, for the record.
        progress: Show a bar.

    Returns:
        Score "function_vector", in probability; heads of layers without an output hook are NaN.

    Raises:
        EpisodeError: no data, one class only, or fewer than two episodes to take means from.

    Source:
        Todd et al. 2024. Differs: each episode is left out of its own mean; null from shuffled prompts, interval over episodes; Holm over heads.
    """
    check_data(episodes, batch_size)
    rehearse(model, episodes)
    shuffled = shuffle(episodes, seed)
    others = episodes if reference is None else reference
    _enough(others, reference is not None)
    clean = last_outputs(model, others, batch_size)
    broken = last_outputs(model, shuffled if reference is None else shuffle(others, seed), batch_size)
    means = [_left_out(found, len(episodes), own=reference is None) for found in (clean, broken)]
    shape = (model.cfg.n_layers, model.cfg.n_heads)
    gains = np.full((2, len(episodes), *shape), np.nan)
    bar = progress_bar(None, total=len(episodes), what="function-vector scores", show=progress)

    def work(batch: Batch, rows: range) -> tuple[range, np.ndarray]:
        own = [{layer: m[rows.start : rows.stop] for layer, m in one.items()} for one in means]
        return rows, _gains(model, batch, own, shape)

    for rows, found in each_batch(model, shuffled, batch_size, work, done=bar.update):
        gains[:, rows.start : rows.stop] = found
    bar.close()
    effect, null = gains
    p, bound = gain_p(effect - null)
    low, high = bootstrap_interval(effect, seed=seed)
    return Score(
        name=NAME, description="probability of the right label that the head's mean output over clean prompts brings to a prompt whose labels are shuffled",
        unit="probability", value=effect.mean(0), low=low, high=high, null=null.mean(0), null_high=null.mean(0) + bound, p=p, p_corrected=holm(p),
        per_episode=effect, source="Todd et al. 2024", null_name="the head's mean over other prompts with shuffled labels",
    )  # fmt: skip


def shuffle(episodes: Sequence[Episode], seed: int) -> list[Episode]:
    """Every episode with its labels dealt out anew over its exemplars."""
    return [permute_labels(episode, seed=seed + k) for k, episode in enumerate(episodes)]


def _enough(others: Sequence[Episode], given: bool) -> None:
    if len(others) < 2 - given:
        raise EpisodeError(f"episodes must be at least two, so that each has others to take a mean from; got {len(others)}. Draw more.")


@torch.no_grad()
def last_outputs(model: Any, data: Sequence[Episode] | Batch, batch_size: int) -> dict[int, Tensor]:
    """Every head's output at the last prompt token, layer -> [n, head, d_head], float32 on the CPU."""
    layers = switchable(model)

    def work(batch: Batch, _: range) -> dict[int, Tensor]:
        kept = values(model, batch, [z_name(layer) for layer in layers], lambda x: x)[0]
        return {layer: (z := kept[z_name(layer)])[torch.arange(batch.n), batch.query_pos.to(z.device)].float().cpu() for layer in layers}

    found = list(each_batch(model, data, batch_size, work))
    return {layer: torch.cat([one[layer] for one in found]) for layer in layers}


def _left_out(outputs: Means, n: int, *, own: bool) -> dict[int, Tensor]:
    """For each of n episodes the mean over the others (`own`: the outputs are the episodes' own), layer -> [n, head, d_head]."""
    if not own:
        return {layer: z.mean(0).expand(n, -1, -1) for layer, z in outputs.items()}
    return {layer: (z.sum(0) - z) / (n - 1) for layer, z in outputs.items()}


def _gains(model: Any, batch: Batch, means: Sequence[Means], shape: tuple[int, int]) -> np.ndarray:
    """What every head's replacement adds to the probability of the right label, [kind of mean, batch, layer, head]."""
    recorded = record(model, batch)
    read = reader(batch)
    before = read(recorded.logits)[0]
    cells, where = [], []
    start = int(batch.query_pos.min())
    for kind, one in enumerate(means):
        for layer, mean in one.items():
            for head in range(mean.shape[1]):
                cells.append(Cell(layer, start=start, edits={z_name(layer): _say(mean[:, head], head, batch.query_pos - start)}))
                where.append((kind, layer, head))
    out = np.full((len(means), batch.n, *shape), np.nan)
    for (kind, layer, head), after in zip(where, run_cells(recorded, cells, lambda logits, _: read(logits)[0]), strict=True):
        out[kind, :, layer, head] = after - before
    return out


def _say(mean: Tensor, head: int, where: Tensor) -> Callable[[Tensor], Tensor]:
    """The head's output at one position of each prompt becomes `mean` [n, d_head]."""

    def edit(z: Tensor) -> Tensor:
        out = z.clone()
        out[torch.arange(len(mean)), where.to(z.device), head] = mean.to(z.device, z.dtype)
        return out

    return edit


def reader(batch: Batch) -> Callable[[Tensor], tuple[np.ndarray, np.ndarray]]:
    """From logits [batch, 1, vocab] to the probability of the right label's first token [batch], and each candidate's log-probability [batch, label]."""
    width = max(len(row) for row in batch.candidate_ids)
    ids = torch.tensor([[(row[j] if j < len(row) else row[0])[0] for j in range(width)] for row in batch.candidate_ids])
    known = torch.tensor([[j < len(row) for j in range(width)] for row in batch.candidate_ids])
    right = torch.tensor(batch.answers)

    def read(logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
        logs = logits[:, 0].float().log_softmax(-1).cpu().gather(1, ids)
        values = logs.masked_fill(~known, -torch.inf).double().numpy()
        return np.exp(values[np.arange(batch.n), right.numpy()]), values

    return read


@guarded
def function_vector(
    model: Any, episodes: Sequence[Episode], heads: Sequence[Head], *, batch_size: int = 8, task: str = ""
) -> FunctionVector:
    """The sum of the heads' mean outputs at the last token of clean prompts, in the residual stream.

    Args:
        model: A model whose heads are summands of the stream.
        episodes: Clean prompts of one task (see `function_vector_scores` for what a mean can hold).
        heads: (layer, head), e.g. `function_vector_scores(...).top(5)`. Choose them on other episodes than those that you evaluate on.
        batch_size: Prompts per forward pass.
        task: For the record.

    Raises:
        UnsupportedModelError: the family normalises or gates the heads' outputs.
        HeadIndexError: a head that the model does not have.
        OptionError: no heads.

    Source:
        Todd et al. 2024.
    """
    check_data(episodes, batch_size)
    chosen = tuple(dict.fromkeys(check_heads(model, heads)))
    if not chosen:
        raise OptionError("heads must be at least one (layer, head); got none. Take function_vector_scores(...).top(5).")
    rehearse(model, episodes)
    means = np.full((model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_model), np.nan)
    for layer, z in last_outputs(model, episodes, batch_size).items():
        with torch.no_grad():
            weight = next(p for p in model.parameters() if p.is_floating_point())
            written = streams.head_outputs(model, layer, z.mean(0)[None].to(weight.device, weight.dtype))[0]
        means[layer, : written.shape[0]] = written.double().cpu().numpy()
    vector = np.sum([means[head] for head in chosen], 0)
    if np.isnan(vector).any():
        raise OptionError("heads must be in layers with softmax attention; got one without an output. Choose others.")
    return FunctionVector(
        heads=chosen, vector=vector, head_means=means, episode_ids=tuple(ids_of(episodes)), n=len(episodes), skipped=(),
        provenance=provenance(model, task=task, seed=None, options={"heads": [list(head) for head in chosen], "batch_size": batch_size}),
    )  # fmt: skip
