"""From a recipe to a toy model: sizes that the task decides, the earlier stage's weights, what is frozen, the encoder's own training."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from mechicl.data.gaussian import MultimodalTask, draw, layout
from mechicl.errors import CheckpointError, OptionError
from mechicl.models.toys.model import ToyConfig, ToyTransformer, toy_config
from mechicl.prompts.vectors import VectorRenderer
from mechicl.training.toys.feed import generator
from mechicl.training.toys.folder import read_recipe, read_weights
from mechicl.training.toys.recipe import PARTS, ToyRecipe

DECIDED = ("d_vocab", "inputs", "d_input", "name")
"""Settings of the model that the task decides."""


@cache
def model_settings() -> tuple[str, ...]:
    """The settings of a recipe's model: "preset", and the keywords of `toy_config` that the task leaves open."""
    return ("preset", *(name for name in inspect.signature(toy_config).parameters if name not in DECIDED))


def config(recipe: ToyRecipe) -> ToyConfig:
    """The sizes of a recipe's model.

    Raises:
        OptionError: sizes that do not fit together.
    """
    settings = dict(recipe.model)
    name = settings.pop("preset", None)
    task = recipe.task
    decided = {"d_vocab": task.L, "inputs": "vectors", "d_input": task.width}
    settings.setdefault("n_ctx", max(128, layout(task).n_pos))
    unknown = [key for key in settings if key not in model_settings()]
    if unknown:
        raise OptionError(
            f"a model's setting must be one of {', '.join(model_settings())}; got {unknown[0]!r}. Correct the recipe's model."
        )
    if name is None:
        return toy_config(**{**settings, **decided, "name": recipe.name})
    from mechicl.models.toys.presets import preset

    return replace(preset(name, **{**settings, **decided}), model_name=recipe.name)


def build(recipe: ToyRecipe, *, start: bool = True) -> ToyTransformer:
    """A fresh model for a recipe, on the CPU, with the earlier stage's weights in it.

    Args:
        start: Load `recipe.start`; without, only the shapes are right.

    Raises:
        OptionError: sizes that do not fit together.
        CheckpointError: `recipe.start` is no usable checkpoint, or another model's.
    """
    task = recipe.task
    cfg = config(recipe)
    if isinstance(task, MultimodalTask):
        encoder, projector = parts(recipe, cfg)
        model = ToyTransformer(cfg, VectorRenderer(task), encoder=encoder, projector=projector, seed=recipe.seed)
    else:
        model = ToyTransformer(cfg, VectorRenderer(task), seed=recipe.seed)
    if start and recipe.start is not None:
        start_from(model, recipe.start)
    freeze(model, recipe.freeze)
    return model


def parts(recipe: ToyRecipe, cfg: ToyConfig) -> tuple[Any, Any]:
    """Encoder (or None) and projector of the second modality."""
    from mechicl.models.toys.encoders import Projector, build_encoder

    task = recipe.task
    assert isinstance(task, MultimodalTask)
    shape = second_shape(recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        encoder, width = None, int(torch.tensor(shape).prod())
        if recipe.encoder is not None:
            settings = dict(recipe.encoder)
            encoder = build_encoder(settings.pop("kind", "mlp"), shape, task.D1, task.K2, **settings)
            width = encoder.d_feat
        return encoder, Projector(width, task.D1)


def second_shape(recipe: ToyRecipe) -> tuple[int, ...]:
    """Shape of one value of the second modality."""
    drawn = draw(recipe.task, 2, generator("cpu", "shape"))
    assert drawn.second is not None
    return tuple(drawn.second.shape[2:])


def start_from(model: ToyTransformer, start: str) -> None:
    """The earlier stage's weights into a model: whatever parts that stage had, whole.

    Raises:
        CheckpointError: a tensor is missing, or of another shape.
    """
    place = Path(start).expanduser()
    folder, step = (place.parent.parent, int(place.stem)) if place.suffix == ".safetensors" and place.stem.isdigit() else (place, None)
    read_recipe(folder)
    tensors, path = read_weights(folder, step)
    given = {n.removeprefix("model."): v for n, v in tensors.items() if n.startswith("model.")}
    own = model.state_dict()
    wrong = [n for n, v in given.items() if n not in own or own[n].shape != v.shape]
    wrong += [n for n in own if n not in given and part_of(n) == "decoder"]
    if wrong:
        raise CheckpointError(
            f"start must be a run of the same decoder; {path} differs in {wrong[0]}. Give both recipes the same model, D (D1) and L."
        )
    model.load_state_dict({**own, **given})


def part_of(name: str) -> str:
    """Which part a parameter belongs to: "encoder", "projector" or "decoder"."""
    first = name.split(".", 1)[0]
    return first if first in PARTS else "decoder"


def freeze(model: ToyTransformer, frozen: tuple[str, ...]) -> None:
    """Parts that do not learn. The encoder's own classifier learns in `train_encoder` only: the model does not read it.

    Raises:
        OptionError: nothing is left to learn.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in frozen and not name.startswith("encoder.head."))
    if not any(p.requires_grad for p in model.parameters()):
        raise OptionError(f"freeze must leave something to learn; got {', '.join(frozen)}. Leave out one part.")


def train_encoder(model: ToyTransformer, recipe: ToyRecipe) -> float:
    """Train the encoder alone to tell the second modality's classes apart, as the recipe says.

    Returns:
        Accuracy on the last batches, NaN where nothing was trained.

    Source:
        Huang et al. 2026 (stage 3): Adam, lr 1e-3.
    """
    if recipe.encoder_steps == 0:
        return float("nan")
    encoder: Any = model.encoder
    device = next(encoder.parameters()).device
    before = [p.requires_grad for p in encoder.parameters()]
    encoder.requires_grad_(True)
    learner = torch.optim.Adam(encoder.parameters(), lr=1e-3, weight_decay=1e-6)
    right = 0.0
    for step in range(recipe.encoder_steps):
        values, classes = encoder_batch(recipe, step, device)
        logits = encoder.classify(values)
        learner.zero_grad(set_to_none=True)
        functional.cross_entropy(logits, classes).backward()
        learner.step()
        right += 0.05 * (float((logits.detach().argmax(-1) == classes).float().mean()) - right)
    for p, learns in zip(encoder.parameters(), before, strict=True):
        p.requires_grad_(learns)
    return right


def encoder_batch(recipe: ToyRecipe, step: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """About `recipe.batch` values of the second modality [m, *shape] and their classes [m], each drawn by itself."""
    n = max(2, -(-recipe.batch // (recipe.task.N + 1)))
    drawn = draw(recipe.task, n, generator(device, "encoder", step, recipe.seed), split="iw", device=device)
    assert drawn.second is not None
    assert drawn.item2 is not None
    assert drawn.query2 is not None
    classes = torch.cat([drawn.item2, drawn.query2[:, None]], 1)
    return drawn.second.flatten(0, 1), classes.flatten()
