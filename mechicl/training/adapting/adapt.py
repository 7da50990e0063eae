"""`adapt`: fine-tune the decoder of a vision-language model on episodes, its loss on the answer alone. The run's folder: see `folder`."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from mechicl.errors import OptionError
from mechicl.models.adapters import merged_copy
from mechicl.models.vlm import HookedVLM
from mechicl.training.adapting import measure as adapt_measure
from mechicl.training.adapting.data import Feed, Source, about, sources
from mechicl.training.adapting.folder import KIND, AdaptRun, begin, finish
from mechicl.training.adapting.loop import Course, Loop, start
from mechicl.training.adapting.measure import Probe
from mechicl.training.adapting.parts import choose, fingerprint, linear_names

__all__ = ["AdaptRun", "adapt", "check"]


def adapt(
    model: str | Path | HookedVLM,
    out: str | os.PathLike[str],
    *,
    strategy: str = "2-way",
    pool: Any = None,
    data: Source | None = None,
    shots: int = 16,
    neighbours: Any = None,
    prompt: Any = None,
    general: Source | None = None,
    mix: float | None = None,
    steps: int = 1000,
    lr: float | None = None,
    batch: int = 4,
    accumulation: int = 1,
    lora: bool = True,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    projector: bool = False,
    bf16: bool = False,
    warmup: float = 0.03,
    schedule: Literal["cosine", "constant"] = "cosine",
    weight_decay: float = 0.0,
    clip: float = 1.0,
    close: bool = True,
    save_memory: bool = False,
    probe: Probe | Sequence[Any] | None = None,
    measure_at: int | Sequence[int] = 8,
    checkpoint_every: int = 100,
    merged: bool | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    resume: bool = False,
    progress: bool = True,
) -> AdaptRun:
    """Fine-tune the decoder of a vision-language model. The vision tower stays as it is; so does the model that is passed.

    Args:
        model: "demo", a Hugging Face folder, a hub id, a folder of adapters, or a HookedVLM (of which a copy is trained).
        out: The run's folder.
        strategy: Of link-context episodes, one of `mechicl.data.link_context.STRATEGIES`; "mix" is 2-way episodes evenly mixed with `general`.
        pool: Classes for link-context episodes; or
        data: episodes of your own, a list or a function (n, seed) -> episodes, in place of strategy, pool, shots, neighbours and prompt.
        shots: Pictures of each class, or the most of them, as the strategy says.
        neighbours: Hard negatives (`mechicl.data.neighbours`); None: negatives from all classes evenly, the control.
        prompt: Words of the episodes; None: the published ones.
        general: Episodes of another task, the model's own, for part of the training.
        mix: Share of `general`; default one half with "mix", else none.
        steps: Updates.
        lr: Highest learning rate; default 1e-4 with LoRA, 1e-5 without.
        batch, accumulation: Episodes that go through the model at once, and how often before an update.
        lora: Low-rank adapters on every linear layer of the decoder's layers; False: all weights of the decoder, its embeddings and output layer.
        rank, alpha, dropout: Of the adapters; alpha defaults to twice the rank.
        targets: Which linear layers get adapters, by the last part of their names, e.g. `adapting.parts.ATTENTION`; None: all of them.
        projector: The module between vision tower and decoder is trained too, whole.
        bf16: Arithmetic in bfloat16; the weights that move stay as they are.
        warmup, schedule, weight_decay, clip: See `adapt_loop.Course`.
        close: The token that ends an answer is learnt as part of it.
        save_memory: Activations are computed again in the backward pass.
        probe: What is measured along the way (episodes alone: the defaults of `adapt_measure.Probe`).
        measure_at: Steps, or how many (spread on a logarithm); start and end always.
        checkpoint_every: Steps between checkpoints.
        merged: With LoRA, also write the whole model; default only where the base has no name that an adapter folder could give.
        seed: Of adapters, episodes and dropout.
        device: "cpu", "cuda", "mps"; default the best there is. For several GPUs: `accelerate launch $(which mechicl) adapt ...`.
        dtype: The base model's; default as saved with LoRA, float32 without.
        threads: CPU threads while training.
        resume: Continue the run in `out`. On one CPU thread the result is the same to the bit as without the interruption; elsewhere the same episodes,
            rates and dropout are used, and numbers differ by the order of sums.
        progress: Show a bar.

    Returns:
        AdaptRun.

    Raises:
        OptionError, EpisodeError, DeviceError: an option out of range, before the model is loaded where that can be known.
        OutputPathError: `out` cannot be written or is not empty.
        CheckpointError: the run in `out` had other options or another base model, or its checkpoint is damaged.
        NotFiniteError: the loss is not a number; the last checkpoint stays.

    Source:
        Tai et al. 2023 (arXiv 2308.07891): loss on the final answer, strategies. Differs: LoRA, and the mean is over answer tokens of a whole step.
    """
    course = Course(
        steps, lr if lr is not None else (1e-4 if lora else 1e-5), batch, accumulation, warmup=warmup, weight_decay=weight_decay, clip=clip, bf16=bf16,
        save_memory=save_memory, close=close, seed=seed, schedule=schedule,
    )  # fmt: skip
    check(lora, rank, alpha, dropout, checkpoint_every, targets)
    main, other, share = sources(strategy, pool, data, general, mix, shots=shots, neighbours=neighbours, prompt=prompt)
    watched = probe if isinstance(probe, Probe) or probe is None else Probe(list(probe))
    points = adapt_measure.when(measure_at, steps) if watched is not None else ()
    accelerator = start(device, projector=projector)
    feed = Feed(main, batch * accumulation * accelerator.num_processes, seed, other, share)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        loaded, base = take(model, dtype or ("auto" if lora else "float32"))
        parts: dict[str, Any] = {"lora": lora, "rank": rank, "alpha": alpha or 2.0 * rank, "dropout": dropout, "projector": projector}
        if targets is not None:
            linear_names(loaded.hf, targets)
            parts["targets"] = list(targets)
        config = {
            "kind": KIND, "model": loaded.cfg.model_name, "weights": fingerprint(loaded.hf), "dtype": str(loaded.hf.dtype), "parts": parts,
            "course": course.to_json(), "processes": accelerator.num_processes, "data": about(main), "general": about(other), "mix": share,
            "probe": watched and {**watched.to_json(), "at": list(points)},
        }  # fmt: skip
        run = begin(out, config, accelerator, resume=resume)
        parts |= {"base": base or "", "seed": seed}
        adapted = choose(loaded.hf, **parts)
        loop = Loop(loaded.hf, loaded.renderer, feed, course, run, accelerator)

        def now() -> HookedVLM:
            """The model as it stands. Adapters are added into the weights of a copy: a hook beside them would miss their branch."""
            if not lora:
                return loaded
            loop.optimizer.zero_grad(set_to_none=True)
            return HookedVLM(merged_copy(adapted), loaded.processor, check=False, name=loaded.cfg.model_name, revision=loaded.revision)

        learn(loop, now, watched, points, checkpoint_every, progress)
        if accelerator.is_main_process:
            finish(loop, adapted, loaded, watched, whole=not lora or (base is None if merged is None else merged), lora=lora)
        accelerator.wait_for_everyone()
        return AdaptRun.open(run.folder)
    finally:
        torch.set_num_threads(before)


def check(lora: bool, rank: int, alpha: float | None, dropout: float, checkpoint_every: int, targets: Sequence[str] | None = None) -> None:
    """Refuse what is out of range.

    Raises:
        OptionError: which.
    """
    if rank < 1:
        raise OptionError(f"rank must be at least 1; got {rank}. 16 is usual.")
    if alpha is not None and not alpha > 0:
        raise OptionError(f"alpha must be above 0; got {alpha}. Twice the rank is usual.")
    if not 0 <= dropout < 1:
        raise OptionError(f"dropout must be in 0..1, 1 excluded; got {dropout}. 0.05 is usual.")
    if checkpoint_every < 1:
        raise OptionError(f"checkpoint_every must be at least 1; got {checkpoint_every}. Choose how many steps a kill may cost.")
    if not lora and targets is not None:
        raise OptionError(f"targets must be left out without LoRA; got {list(targets)}. They are the layers that get adapters.")
    if not lora and dropout:
        raise OptionError(f"dropout must be 0 without LoRA; got {dropout}. It is the adapters' dropout.")


def take(model: str | Path | HookedVLM, dtype: str) -> tuple[HookedVLM, str | None]:
    """The model to be trained, on the CPU, and the name by which an adapter can call it; None where it has none."""
    from mechicl.models.load import load

    if not isinstance(model, HookedVLM):
        base = str(Path(model).resolve()) if Path(model).is_dir() else str(model)
        return load(model, dtype=dtype), base
    name = model.cfg.model_name
    known = name == "demo" or Path(name).is_dir()
    own = HookedVLM(copy.deepcopy(model.hf), model.processor, check=False, name=name, revision=model.revision)
    return own, (name if name == "demo" else str(Path(name).resolve())) if known else None


def learn(loop: Loop, now: Callable[[], HookedVLM], probe: Probe | None, points: Sequence[int], every: int, progress: bool) -> None:
    """Take the steps that are left; measure and checkpoint on the way."""
    from tqdm import tqdm

    first = loop.accelerator.is_main_process
    live = math.nan
    with tqdm(total=loop.course.steps, initial=loop.step, disable=not (progress and first), unit="step", dynamic_ncols=True) as bar:
        if loop.step == 0:
            look(loop, now, probe, points)
        while loop.step < loop.course.steps:
            row = loop.take_step()
            live = row["loss"] if math.isnan(live) else live + 0.1 * (row["loss"] - live)
            if first:
                loop.run.log({"step": loop.step, **row})
            bar.update()
            bar.set_postfix_str(f"loss {live:.3f}", refresh=False)
            look(loop, now, probe, points)
            if loop.step % every == 0 or loop.step == loop.course.steps:
                loop.save()


def look(loop: Loop, now: Callable[[], HookedVLM], probe: Probe | None, points: Sequence[int]) -> None:
    """Measure the model where it stands, if this is a step at which it is to be measured."""
    if probe is None or loop.step not in points:
        return
    if loop.accelerator.is_main_process:
        loop.hf.eval()
        with torch.no_grad():
            loop.run.log(adapt_measure.write_down(adapt_measure.measure(now(), probe), loop.step))
    loop.accelerator.wait_for_everyone()
