"""The fine-tuning of Huang et al. 2026: LoRA on the attention's four linear layers, the heads that were ranked before it followed along the way.

Differs: examples in shuffled rounds instead of draws with replacement; held-out episodes; the change from first to last step is tested on them, paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mechicl.analysis.feed import provenance
from mechicl.analysis.heads.published import published_scores
from mechicl.analysis.heads.scoring import score_heads
from mechicl.analysis.icl import icl_accuracy
from mechicl.analysis.statistics import mean_estimate, paired_change
from mechicl.errors import OptionError
from mechicl.prompts.episode import Episode
from mechicl.results import Estimate, Head, Series, Tuning, TuningChange
from mechicl.studies.huang2026_heads import IH, PH

FOLLOWED = {PH: "previous_token_all", IH: "induction_paper", "previous_token": "previous_token", "induction": "induction"}
"""Score of the study -> score followed along the fine-tuning; the published two are the same numbers where answers stand in labels only."""


@dataclass(frozen=True)
class TuningOptions:
    """How the fine-tuning goes; the defaults are the published ones.

    `train`, `held_out`: episodes; `every`: steps between measures; `lr` stays constant, without warm-up or clipping, as published.
    """

    steps: int = 500
    lr: float = 2e-5
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    weight_decay: float = 0.01
    batch: int = 1
    train: int = 100
    held_out: int = 16
    every: int = 25
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    bf16: bool = False
    save_memory: bool = False

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("train", 1), ("held_out", 4), ("every", 1), ("rank", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise OptionError(f"{name} of the fine-tuning must be at least {least}; got {getattr(self, name)}. Raise it, or skip lora.")

    @property
    def points(self) -> tuple[int, ...]:
        """Steps at which heads are measured."""
        return tuple(sorted({0, *range(self.every, self.steps + 1, self.every), self.steps}))


def tune(
    model: Any,
    name: Any,
    train: Sequence[Episode],
    held_out: Sequence[Episode],
    tops: Mapping[str, Sequence[Head]],
    options: TuningOptions,
    out: Path,
    *,
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> Tuning:
    """Fine-tune and follow the heads. The run lies in `out` and goes on where it was killed.

    Args:
        model: The loaded model, before.
        name: What `adapt` trains a copy of: the name it was loaded by, or the model itself.
        train: Episodes to learn from.
        held_out: Other episodes, on which everything is measured.
        tops: Score of the study -> its top heads before the fine-tuning.
        options: How it goes.
        out: The run's folder.
        seed: Decides adapters, order and resampling.
        batch_size: Prompts per forward pass when measuring.
        task: What the episodes are, for the record.
        progress: Show bars.
    """
    from mechicl.models.load import load
    from mechicl.training.adapting.adapt import adapt
    from mechicl.training.adapting.measure import Probe, head_curve

    probe = Probe(list(held_out), scores=tuple(FOLLOWED.values()), knocked=0, seed=seed, batch_size=batch_size)
    device, dtype = str(model.hf.device).split(":")[0], str(model.hf.dtype).removeprefix("torch.")
    run = adapt(
        name, out, data=list(train), steps=options.steps, lr=options.lr, rank=options.rank, alpha=options.alpha, dropout=options.dropout,
        targets=options.targets, warmup=0.0, schedule="constant", weight_decay=options.weight_decay, clip=1e9, batch=options.batch, bf16=options.bf16,
        save_memory=options.save_memory, probe=probe, measure_at=list(options.points), checkpoint_every=options.every, seed=seed,
        device=device, dtype=dtype, resume=True, progress=progress,
    )  # fmt: skip
    assert run.growth is not None
    curves = {}
    steps = np.array(options.points)
    for score, heads in tops.items():
        found = [head_curve(run.folder, FOLLOWED[score], head) for head in heads]
        steps, curves[score] = found[0][0], np.mean([values for _, values in found], axis=0)
    after = load(str(run.result), device=device, dtype=dtype)
    changes = compare_models(model, after, held_out, tops, seed=seed, batch_size=batch_size)
    made = provenance(model, task=task, seed=seed, options={"steps": options.steps, "rank": options.rank, "lr": options.lr})
    followed = Series(
        steps, {f"{_words(k)}, mean of its top {len(tops[k])}": v for k, v in curves.items()}, {}, {}, "probability", len(held_out), made
    )
    loss = run.table["loss"].to_numpy(dtype=float)
    return Tuning(run.growth, followed, loss, changes, len(train), len(held_out), run.folder.name)  # fmt: skip


def compare_models(
    before: Any, after: Any, episodes: Sequence[Episode], tops: Mapping[str, Sequence[Head]], *, seed: int = 0, batch_size: int = 8
) -> tuple[TuningChange, ...]:
    """The same heads and answers of two models on the same episodes, paired."""
    found: list[TuningChange] = []
    values = [_per_episode(model, episodes, tops, seed, batch_size) for model in (before, after)]
    for name in values[0]:
        first, second = (one[name] for one in values)
        known = np.isfinite(first) & np.isfinite(second)
        ends: list[Estimate] = [mean_estimate(x[known], unit="probability", seed=seed) for x in (first, second)]
        found.append(TuningChange(name, ends[0], ends[1], paired_change(first[known], second[known], unit="probability", seed=seed)))
    return tuple(found)


def _per_episode(
    model: Any, episodes: Sequence[Episode], tops: Mapping[str, Sequence[Head]], seed: int, batch_size: int
) -> dict[str, np.ndarray]:
    common: dict[str, Any] = {"batch_size": batch_size, "progress": False}
    answers = icl_accuracy(model, episodes, zero_shot=False, seed=seed, **common)
    found = {
        "accuracy, first token (published)": answers.open_correct.astype(float),
        "accuracy, whole label": answers.correct.astype(float),
    }
    published = published_scores(model, episodes, batch_size=batch_size)
    scores = score_heads(model, episodes, scores=("previous_token", "induction"), n_null=1, seed=seed, **common)
    arrays = {
        PH: published.ph,
        IH: published.ih,
        "previous_token": scores["previous_token"].per_episode,
        "induction": scores["induction"].per_episode,
    }
    for score, heads in tops.items():
        found[f"{_words(score)}, mean of its top {len(heads)}"] = np.mean([arrays[score][:, layer, head] for layer, head in heads], axis=0)
    return found


def _words(score: str) -> str:
    return {PH: "PH as published", IH: "IH as published"}.get(score, f"{score.replace('_', ' ')} (ours)")
