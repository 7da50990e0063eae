"""The loop of a fine-tuning, on accelerate (its one home in mechicl): devices, several processes, gradient accumulation, checkpoints without pickle.

The gradient of a step is that of the mean loss per answer token over all episodes of the step, however these are cut into batches or shared out over
processes. Learning rate, episodes and dropout of a step depend on the seed and the step's number alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mechicl.errors import CheckpointError, DeviceError, NotFiniteError, OptionError
from mechicl.models.adapters import trainable
from mechicl.models.families import Family, family_of
from mechicl.models.places import placed
from mechicl.training.adapting.data import Feed, Lesson, answer_loss, closing, kept_positions, lesson, renderable, seed_of
from mechicl.training.runs import AGAIN, STATE, Run

if TYPE_CHECKING:
    from mechicl.prompts.render import Renderer


@dataclass(frozen=True)
class Course:
    """How a fine-tuning goes.

    `steps`: updates; `lr`: the highest learning rate, after `warmup` (a share of the steps), from where it falls to zero along a cosine, or stays
    (`schedule`); `batch`:
    episodes that go through the model at once, on each device; `accumulation`: batches of an update; `clip`: largest norm of the gradient;
    `bf16`: arithmetic in bfloat16 where torch's autocast finds it safe, weights as they are; `save_memory`: activations are computed again in the
    backward pass; `close`: the token that ends an answer is learnt with it.
    """

    steps: int
    lr: float
    batch: int = 4
    accumulation: int = 1
    warmup: float = 0.03
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    bf16: bool = False
    save_memory: bool = False
    close: bool = True
    seed: int = 0
    schedule: Literal["cosine", "constant"] = "cosine"

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulation"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1; got {getattr(self, name)}. Choose a positive number.")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise OptionError(f"lr must be above 0; got {self.lr}. 1e-4 is usual for LoRA, 1e-5 for whole models.")
        if not 0 <= self.warmup < 1:
            raise OptionError(f"warmup must be a share of the steps in 0..1; got {self.warmup}. 0.03 is usual.")
        if self.schedule not in ("cosine", "constant"):
            raise OptionError(f'schedule must be "cosine" or "constant"; got {self.schedule!r}. cosine is usual.')
        if not self.clip > 0:
            raise OptionError(f"clip must be above 0; got {self.clip}. 1.0 is usual.")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return self.lr * (step + 1) / rise
        if self.schedule == "constant":
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self.steps - rise)))

    def to_json(self) -> dict[str, Any]:
        """For a run's configuration; what is usual is left out where runs begun before the choice existed have none, so that these go on."""
        found = asdict(self)
        if self.schedule == "cosine":
            del found["schedule"]
        return found


def start(device: str | None, *, projector: bool) -> Any:
    """The accelerator: which device, which of several processes.

    Raises:
        DeviceError: not the CPU nor the first device of a kind; several devices are for `accelerate launch`.
        OptionError: the launcher wants sharded weights.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState, GradientState

    if device not in (None, "cpu", "cuda", "mps"):
        raise DeviceError(
            f'device must be "cpu", "cuda" or "mps"; got {device!r}. For several GPUs start mechicl through `accelerate launch`.'
        )
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # accelerate keeps one state per process: another device would be refused
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    # words alone leave a projector without a gradient
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)] if projector else []
    made = Accelerator(cpu=device == "cpu", mixed_precision="no", kwargs_handlers=handlers)  # type: ignore[arg-type]
    if made.distributed_type.value not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise OptionError(
            f"processes must hold the whole model each; the launcher asks for {made.distributed_type.value}. Configure accelerate for plain multi-GPU."
        )
    if device is not None and made.device.type != device:
        raise DeviceError(
            f'device must exist on this machine; got {device!r}, and accelerate found {made.device.type!r}. Use device="cpu".'
        )
    return made


class Loop:
    """A fine-tuning in memory: model, optimizer, and where it stands.

    Args:
        hf: The Hugging Face model, its weights to be trained marked by requires_grad.
        renderer: Makes batches of episodes.
        feed: The episodes.
        course: How it goes.
        run: The folder.
        accelerator: From `start`.
    """

    hf: Any
    renderer: Renderer
    feed: Feed
    course: Course
    run: Run
    accelerator: Any
    family: Family
    close: tuple[int, ...]
    model: Any
    optimizer: Any

    def __init__(self, hf: Any, renderer: Renderer, feed: Feed, course: Course, run: Run, accelerator: Any) -> None:
        self.hf, self.renderer, self.feed, self.course, self.run, self.accelerator = hf, renderer, feed, course, run, accelerator
        self.step = 0
        self.family = family_of(hf.config)
        self.close = closing(renderer, feed.episode(0)) if course.close else ()
        if course.save_memory:
            hf.activation_checkpointing_enable({"use_reentrant": False})
        self.weights = dict(trainable(hf))
        found = run.take()
        if found is not None:
            self._put_back(found[0], int(found[1]["step"]))
        raw = torch.optim.AdamW(self.weights.values(), lr=course.lr, betas=course.betas, weight_decay=course.weight_decay)
        self.model, self.optimizer = accelerator.prepare(hf, raw)
        self.raw = raw
        if found is not None:
            self._remember(found[0])

    def _put_back(self, tensors: Mapping[str, Tensor], step: int) -> None:
        given = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
        if {n: v.shape for n, v in given.items()} != {n: p.shape for n, p in self.weights.items()}:
            raise CheckpointError(f"{STATE} must be a whole checkpoint of this run; {self.run.folder / STATE} is of other weights. {AGAIN}")
        with torch.no_grad():
            for name, value in given.items():
                self.weights[name].copy_(value)
        self.step = step

    def _remember(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the optimizer's moments back, each where AdamW wants it: the count of steps on the CPU, the others beside the weight."""
        for name, weight in self.weights.items():
            moments = {k.split(".")[1]: v for k, v in tensors.items() if k.startswith("optimizer.") and k.split(".", 2)[2] == name}
            if moments:
                self.raw.state[weight] = {key: value if key == "step" else value.to(weight.device) for key, value in moments.items()}

    def save(self) -> None:
        """Replace the checkpoint: the weights that move and the optimizer's moments. By the first process alone."""
        if self.accelerator.is_main_process:
            tensors = {f"model.{name}": weight for name, weight in self.weights.items()}
            for name, weight in self.weights.items():
                tensors |= {f"optimizer.{key}.{name}": value for key, value in self.raw.state.get(weight, {}).items()}
            self.run.put(tensors, {"step": self.step})
        self.accelerator.wait_for_everyone()

    def lessons(self) -> list[Lesson]:
        """This process's batches of the present step."""
        course, rank = self.course, self.accelerator.process_index
        mine = course.batch * course.accumulation
        episodes = self.feed.step(self.step, slice(rank * mine, (rank + 1) * mine))
        made = []
        for at in range(0, mine, course.batch):
            for few in renderable(episodes[at : at + course.batch], self.renderer.model_type, alone=bool(self.family.padding)):
                made.append(lesson(self.renderer.render(few), close=self.close))
        return made

    def take_step(self) -> dict[str, float]:
        """One update.

        Returns:
            "loss" (nats per answer token, mean over the step), "lr", "gradient" (its norm before clipping), "tokens".

        Raises:
            NotFiniteError: loss or gradient is not a number; the weights are as they were before the step.
        """
        self.awake()
        course, accelerator = self.course, self.accelerator
        lessons = self.lessons()
        total = float(accelerator.reduce(torch.tensor(float(sum(one.n_tokens for one in lessons)), device=accelerator.device), "sum"))
        rate = course.rate(self.step)
        for group in self.raw.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        nats = torch.zeros((), device=accelerator.device)
        device = [accelerator.device] if accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=device):
            torch.manual_seed(seed_of(course.seed, "dropout", self.step, accelerator.process_index))
            for k, one in enumerate(lessons):
                with nullcontext() if k == len(lessons) - 1 else accelerator.no_sync(self.model):
                    loss = self.loss(one)
                    # processes' gradients are averaged: their number makes a sum of it again
                    accelerator.backward(loss * (accelerator.num_processes / total))
                nats += loss.detach()
        mean = float(accelerator.reduce(nats, "sum")) / total
        norm = float(accelerator.clip_grad_norm_(self.weights.values(), course.clip))
        if not (math.isfinite(mean) and math.isfinite(norm)):
            raise NotFiniteError(
                f"loss must be finite; got {mean} with a gradient of norm {norm} at step {self.step + 1}. Lower lr, or leave bf16 out; the last checkpoint stays."
            )
        self.optimizer.step()
        self.step += 1
        return {"loss": mean, "lr": rate, "gradient": norm, "tokens": total}

    def loss(self, one: Lesson) -> Tensor:
        """Sum of the answers' nats in one batch."""
        device = self.accelerator.device
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in one.inputs.items()}
        inputs = {k: v.to(self.hf.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
        inputs = dict(placed(self.hf, self.family, inputs))  # a prompt is learnt as it will be read: whatever else is in the batch
        labels = one.labels.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.course.bf16):
            logits = self.model(**inputs, use_cache=False, logits_to_keep=kept_positions(one.labels)).logits
        return answer_loss(logits, labels)

    def awake(self) -> None:
        """Training mode for the decoder, whose dropout then works; the frozen tower stays as in evaluation."""
        self.hf.eval()
        self.hf.get_decoder().train()
