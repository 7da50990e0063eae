"""Train a small vision-language model of transformers' own class to learn from the examples in its prompt."""

from __future__ import annotations

import importlib.metadata
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mechicl.errors import OptionError
from mechicl.prompts.render import Renderer
from mechicl.results import Provenance, Series
from mechicl.training.growth import GROWTH, growth_steps, measure, probe_work, right_answers, to_series, write_growth
from mechicl.training.organisms import FAMILIES, build, save
from mechicl.training.runs import Run, write_text
from mechicl.training.stages import Plan, Probe, Stage, plan
from mechicl.training.tasks import Bench, Work
from mechicl.training.vision import together

MODEL = "model"
"""The Hugging Face folder within a run's folder."""

UNTRAINABLE = ("paligemma", "paligemma2", "mllama")
"""Families whose prompts this training does not fit, with the reason in `check_family`."""


@dataclass(eq=False)
class Trainer:
    """A run in memory: model, optimizer, workbench and where it stands."""

    plan: Plan
    run: Run
    model: Any
    processor: Any
    bench: Bench
    optimizer: torch.optim.AdamW
    step: int = 0
    stage: int = 0
    stage_start: int = 0
    live: float = 0.0
    """Running share of target tokens predicted right, for the progress bar."""
    score: float = math.nan
    """What the stage's probe last said."""
    seconds: float = 0.0
    boundaries: list[tuple[int, str]] = field(default_factory=list)
    probes: dict[str, Work] = field(default_factory=dict)

    def counters(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the tensors."""
        return {
            "step": self.step, "stage": self.stage, "stage_start": self.stage_start, "live": self.live,
            "seconds": round(self.seconds, 1), "boundaries": self.boundaries,
        }  # fmt: skip

    def restore(self, counters: Mapping[str, Any]) -> None:
        """The inverse of `counters`."""
        for name in ("step", "stage", "stage_start", "live", "seconds"):
            setattr(self, name, counters[name])
        self.boundaries = [(int(step), str(name)) for step, name in counters["boundaries"]]


def train(
    family: str = "qwen2_5_vl",
    *,
    preset: str = "demo",
    out: str | os.PathLike[str],
    seed: int = 0,
    resume: bool = False,
    threads: int | None = None,
    progress: bool = True,
    recipe: Plan | None = None,
) -> Path:
    """Train an organism and write it as an ordinary Hugging Face folder.

    Args:
        family: transformers' model type, one of `mechicl.training.organisms.FAMILIES` (but PaliGemma and Mllama).
        preset: "demo", the bundled model's recipe, tens of minutes on two CPU cores; "quick", minutes, a learner of one picture size;
            "micro", seconds, for tests: it learns nothing.
        out: The run's folder: configuration, metrics, the checkpoint to continue from, and `model/`, the Hugging Face folder.
        seed: Seed of the weights and of every batch.
        resume: Continue the run in `out`; the result is the same to the bit as without the interruption (with one thread).
        threads: CPU threads while training; None leaves torch's setting.
        progress: Show a bar with live accuracies.
        recipe: A plan in place of the preset's.

    Returns:
        The Hugging Face folder.

    Raises:
        OptionError: an unknown family or preset, or a family that this training does not fit.
        OutputPathError: `out` cannot be written or is not empty.
        CheckpointError: the run in `out` had other options, or its checkpoint is damaged.
    """
    check_family(family)
    chosen = recipe or plan(preset)
    run = Run.open(out, {"family": family, "preset": preset, "seed": seed, "plan": chosen.to_json()}, resume=resume)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        trainer = prepare(family, chosen, run, seed)
        learn(trainer, progress)
    finally:
        torch.set_num_threads(before)
    return finish(trainer, family, preset, seed)


def check_family(family: str) -> None:
    """Refuse a family before any work.

    Raises:
        OptionError: it is unknown, or its prompts do not fit this training.
    """
    if family not in FAMILIES:
        raise OptionError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}. Pick one of them.")
    if family in UNTRAINABLE:
        why = (
            "its pictures are not tokens of the prompt and words alone cannot be mixed in"
            if family == "mllama"
            else "its prompt is read in both directions, so labels within it cannot be learned from"
        )
        raise OptionError(f"family must have a causal prompt with picture tokens; got {family!r}: {why}. Try qwen2_5_vl, llava or gemma3.")


def prepare(family: str, chosen: Plan, run: Run, seed: int) -> Trainer:
    """Build everything a run needs and put its checkpoint back if there is one."""
    model, processor = make(family, seed, chosen.vision)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=chosen.learning_rate, betas=chosen.betas, weight_decay=chosen.weight_decay, foreach=True
    )
    bench = Bench(model, processor, Renderer(processor, model.config), seed=seed, tokens=chosen.tokens)
    trainer = Trainer(chosen, run, model, processor, bench, optimizer)
    counters = run.load(model, optimizer)
    if counters is not None:
        trainer.restore(counters)
    return trainer


def make(family: str, seed: int, vision: Mapping[str, int]) -> tuple[Any, Any]:
    """A fresh organism; `vision` overrides entries of a Qwen2.5-VL vision tower (the other families keep their own)."""
    model, processor = build(family, preset="demo", seed=seed)
    if vision and family == "qwen2_5_vl":
        from transformers import AutoModelForImageTextToText

        for name, value in vision.items():
            setattr(model.config.vision_config, name, value)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForImageTextToText.from_config(model.config)
    return model, processor


def learn(trainer: Trainer, progress: bool) -> None:
    """Go through the stages from where the trainer stands."""
    from tqdm import tqdm

    stages = trainer.plan.stages
    total = sum(stage.cap for stage in stages)
    growth = growth_steps(total, trainer.plan.growth_points)
    with tqdm(total=total, initial=trainer.step, disable=not progress, unit="step", dynamic_ncols=True) as bar:
        while trainer.stage < len(stages):
            stage = stages[trainer.stage]
            if trainer.step == trainer.stage_start and (trainer.step, stage.name) not in trainer.boundaries:
                trainer.boundaries.append((trainer.step, stage.name))
            if trainer.step in growth and trainer.step == 0:
                record_growth(trainer)
            started = time.monotonic()
            with together(trainer.model):
                loss = take_step(trainer, stage)
            trainer.seconds += time.monotonic() - started
            bar.update()
            done = judge(trainer, stage, loss)
            bar.set_postfix_str(f"{stage.name}: tokens {trainer.live:.2f}, {stage.probe.name} {trainer.score:.2f}", refresh=False)
            if trainer.step in growth or done:
                record_growth(trainer)
            if done:
                trainer.stage, trainer.stage_start = trainer.stage + 1, trainer.step
            if done or trainer.step % trainer.plan.checkpoint_every == 0:
                trainer.run.save(trainer.model, trainer.optimizer, trainer.counters())


def take_step(trainer: Trainer, stage: Stage) -> float:
    """One batch, one update. Returns the loss in nats per target token."""
    model, optimizer = trainer.model, trainer.optimizer
    model.train()
    work = trainer.bench.work(stage.choices, trainer.step)
    for group in optimizer.param_groups:
        group["lr"] = trainer.plan.learning_rate * pace(trainer.step - trainer.stage_start, stage, trainer.plan.warmup)
    optimizer.zero_grad(set_to_none=True)
    loss, hits = loss_of(model, work)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.plan.clip)
    optimizer.step()
    trainer.step += 1
    trainer.live += 0.03 * (hits - trainer.live)
    return float(loss.detach())


def loss_of(model: Any, work: Work) -> tuple[Tensor, float]:
    """Cross-entropy of the wanted tokens, and the share of them that were likeliest. Logits are made for these tokens only."""
    hidden = model.model(**work.inputs, use_cache=False).last_hidden_state
    where = work.wanted[:, 1:]
    logits = model.get_output_embeddings()(hidden[:, :-1][where]).float()
    wanted = work.inputs["input_ids"][:, 1:][where]
    return functional.cross_entropy(logits, wanted), float((logits.detach().argmax(-1) == wanted).float().mean())


def pace(step: int, stage: Stage, warmup: int) -> float:
    """Step size as a share of the plan's: a short rise, then flat, or falling along a cosine to 2 % where the stage decays."""
    rise = min(1.0, (step + 1) / warmup)
    return rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / stage.cap)) if stage.decay else 1.0)


def judge(trainer: Trainer, stage: Stage, loss: float) -> bool:
    """Probe now and then; say whether the stage is over."""
    taken = trainer.step - trainer.stage_start
    done = taken >= stage.cap
    if taken % stage.every == 0 or done:
        trainer.model.eval()
        trainer.score = float(right_answers(trainer.model, work_for(trainer, stage.probe)).mean())
        trainer.run.log(
            {"step": trainer.step, "stage": stage.name, "loss": round(loss, 5), "live": round(trainer.live, 5), "probe": stage.probe.name,
             "accuracy": trainer.score, "seconds": round(trainer.seconds, 1)}
        )  # fmt: skip
        done = done or (trainer.score >= stage.criterion and not stage.decay)
    return done


def work_for(trainer: Trainer, probe: Probe) -> Work:
    """A probe's episodes, drawn once."""
    key = f"{probe.name} {probe.n} {probe.glyphs}"
    if key not in trainer.probes:
        trainer.probes[key] = probe_work(trainer.bench, probe)
    return trainer.probes[key]


def record_growth(trainer: Trainer) -> None:
    """Measure a point of the growth curve and write it down."""
    works = {probe.name: work_for(trainer, probe) for probe in trainer.plan.growth}
    measures = measure(trainer.model, works, work_for(trainer, trainer.plan.heads))
    trainer.run.log({"step": trainer.step, "measures": measures})


def growth_of(run: Run, boundaries: list[tuple[int, str]], n: int, provenance: Provenance) -> Series:
    """The run's growth curve."""
    points = {line["step"]: line for line in run.lines() if "measures" in line}
    return to_series([points[step] for step in sorted(points)], boundaries, n, provenance)


def finish(trainer: Trainer, family: str, preset: str, seed: int) -> Path:
    """Write the Hugging Face folder with its growth curve and training log."""
    folder = trainer.run.folder / MODEL
    save(trainer.model.eval(), trainer.processor, folder)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    provenance = Provenance(
        model=f"{family} ({preset})",
        dtype="float32",
        attention="eager",
        device="cpu",
        task="held-out probe episodes",
        seed=seed,
        versions=versions,
    )
    write_text(folder / GROWTH, write_growth(growth_of(trainer.run, trainer.boundaries, trainer.plan.heads.n, provenance)))
    log = (trainer.run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    write_text(folder / "training_log.jsonl", "\n".join(line for line in log if '"measures"' not in line) + "\n")
    return folder
