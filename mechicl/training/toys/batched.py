"""Training steps: of one toy, and of many toys of the same shapes at once.

`Alone` is an ordinary training step. `Batched` lays the weights of all models into one tensor [model, weight] and runs one vectorised step over
it (`torch.func.vmap` over the model axis); each model gives the numbers that it gives alone, up to the order of floating-point sums. Both keep the models' own parameters
up to date, so that a model can be measured between any two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mechicl.errors import OptionError
from mechicl.models.toys.model import ToyTransformer, classify_with
from mechicl.training.toys.feed import Work
from mechicl.training.toys.recipe import ToyRecipe, together_key


def optimizer(recipe: ToyRecipe, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The recipe's optimizer. Weight decay of "adam" and "sgd" is added to the gradient, that of "adamw" is taken off the weights."""
    kind: Any = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    return kind(groups, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)


def learnable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Alone:
    """One model."""

    models: list[ToyTransformer]

    def __init__(self, model: Any, recipe: ToyRecipe, *, compile: bool = False) -> None:  # noqa: A002
        self.models = [model]
        self._named = learnable(model)
        self._parameters = list(self._named.values())
        self._optimizer = optimizer(recipe, [{"params": self._parameters}])
        self._loss = torch.compile(self._forward) if compile else self._forward

    def _forward(self, tokens: Tensor, second: Tensor | None, place: Tensor | None, target: Tensor) -> Tensor:
        return functional.cross_entropy(self.models[0].classify(tokens, second, place), target)

    def step(self, work: Work) -> Float[Tensor, " model"]:
        """One update. Returns the loss before it, nats."""
        one = work.each(lambda x: x[0])
        loss = self._loss(one.tokens, one.second, one.position_ids, one.target)
        for p, grad in zip(self._parameters, torch.autograd.grad(loss, self._parameters), strict=True):
            p.grad = grad.contiguous()  # the fused optimizers read memory in order, whatever the gradient's strides say
        self._optimizer.step()
        return loss.detach()[None]

    def moments(self, i: int) -> dict[str, Tensor]:
        """The optimizer's memory as "{key}.{parameter}"."""
        return {f"{key}.{name}": value for name, p in self._named.items() for key, value in self._optimizer.state.get(p, {}).items()
                if isinstance(value, Tensor)}  # fmt: skip

    def restore(self, i: int, moments: Mapping[str, Tensor]) -> None:
        """The inverse of `moments`."""
        for name, p in self._named.items():
            keys = [k.split(".", 1)[0] for k in moments if k.split(".", 1)[1] == name]
            if keys:
                self._optimizer.state[p] = {key: _placed(key, moments[f"{key}.{name}"], p) for key in keys}

    def keep(self, which: Sequence[int]) -> None:
        """Stop training the other models (here: the one, or nothing)."""


class Batched:
    """Many models of the same shapes in one step.

    Args:
        models: `ToyTransformer`s; from here on their learning parameters are views of one tensor.
        recipes: Theirs. What may differ: see `together_key`.
        compile: Through torch.compile.

    Raises:
        OptionError: recipes that cannot be trained together.
    """

    models: list[ToyTransformer]
    recipes: list[ToyRecipe]

    def __init__(self, models: Sequence[Any], recipes: Sequence[ToyRecipe], *, compile: bool = False) -> None:  # noqa: A002
        if len({together_key(r) for r in recipes}) > 1:
            raise OptionError(
                "recipes must have the same shapes, optimizer and steps to be trained together; got several kinds. Group them by together_key."
            )
        self.models = list(models)
        self.recipes = list(recipes)
        first = learnable(models[0])
        self._shapes = {name: p.shape for name, p in first.items()}
        self._sizes = [p.numel() for p in first.values()]
        self._call: Callable[..., Tensor] = torch.compile(self._losses) if compile else self._losses
        self._gather([torch.cat([p.detach().reshape(-1) for p in learnable(m).values()]) for m in self.models])

    def _gather(self, rows: Sequence[Tensor]) -> None:
        """Weights into one tensor, with the models' parameters and the optimizer's rows as views of it."""
        self._flat = torch.stack(list(rows)).requires_grad_()
        held = self._flat.detach()
        self._rows = [nn.Parameter(row) for row in held]
        for model, row in zip(self.models, held, strict=True):
            for p, piece in zip(learnable(model).values(), row.split(self._sizes), strict=True):
                p.data = piece.view(p.shape)
        fixed = [{n: p.detach() for n, p in m.named_parameters() if not p.requires_grad} for m in self.models]
        self._fixed = {name: torch.stack([f[name] for f in fixed]) for name in fixed[0]}
        kinds: dict[tuple[float, float], list[nn.Parameter]] = {}
        for row, recipe in zip(self._rows, self.recipes, strict=True):
            kinds.setdefault((recipe.lr, recipe.weight_decay), []).append(row)
        groups = [{"params": few, "lr": lr, "weight_decay": decay} for (lr, decay), few in kinds.items()]
        self._optimizer = optimizer(self.recipes[0], groups)

    def _losses(self, flat: Tensor, fixed: Mapping[str, Tensor], work: Work) -> Float[Tensor, " model"]:
        """Loss of every model on its own batch."""
        pieces, template = flat.split(self._sizes, 1), self.models[0]
        weights = {name: piece.view(len(flat), *shape) for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)}

        def one(weights: dict[str, Tensor], tokens: Tensor, second: Tensor | None, place: Tensor | None, target: Tensor) -> Tensor:
            return functional.cross_entropy(classify_with(template, weights, tokens, second, place), target)

        second, place = work.second, work.position_ids
        dims = (0, 0, None if second is None else 0, None if place is None else 0, 0)
        return torch.func.vmap(one, in_dims=dims)({**weights, **fixed}, work.tokens, second, place, work.target)

    def step(self, work: Work) -> Float[Tensor, " model"]:
        """One update of every model, each on its own batch. Returns the losses before it, nats."""
        losses = self._call(self._flat, self._fixed, work)
        # a model's loss depends on its own weights only, so the gradient of the sum is everybody's own
        (grad,) = torch.autograd.grad(losses.sum(), [self._flat])
        for row, piece in zip(self._rows, grad, strict=True):
            row.grad = piece
        self._optimizer.step()
        return losses.detach()

    def moments(self, i: int) -> dict[str, Tensor]:
        """The optimizer's memory of model i as "{key}.{parameter}", as `Alone` gives it."""
        out = {}
        for key, value in self._optimizer.state.get(self._rows[i], {}).items():
            if isinstance(value, Tensor):
                pieces = [value] * len(self._sizes) if value.dim() == 0 else value.split(self._sizes)
                for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True):
                    out[f"{key}.{name}"] = piece if value.dim() == 0 else piece.view(shape)
        return out

    def restore(self, i: int, moments: Mapping[str, Tensor]) -> None:
        """The inverse of `moments`."""
        keys = dict.fromkeys(k.split(".", 1)[0] for k in moments)
        state = {}
        for key in keys:
            parts = [moments[f"{key}.{name}"] for name in self._shapes]
            whole = parts[0] if key == "step" else torch.cat([part.reshape(-1) for part in parts])
            state[key] = _placed(key, whole, self._rows[i])
        if state:
            self._optimizer.state[self._rows[i]] = state

    def keep(self, which: Sequence[int]) -> None:
        """Stop training the other models; they keep the weights that they have."""
        moments = [self.moments(i) for i in which]
        rows = [self._rows[i].detach().clone() for i in which]
        self.models, self.recipes = [self.models[i] for i in which], [self.recipes[i] for i in which]
        if rows:
            self._gather(rows)
            for i, few in enumerate(moments):
                self.restore(i, few)


Trainees = Alone | Batched
"""Models in training."""


def _placed(key: str, value: Tensor, like: Tensor) -> Tensor:
    """A piece of optimizer memory where the optimizer wants it; the step counter is a float on the weights' device when fused."""
    return value.detach().to(device=like.device, dtype=torch.float32 if key == "step" else like.dtype).clone()
