"""One forward and one backward pass, with the gradient of a metric at any hook points.

The graph begins at the first hook point asked for: nothing before it is remembered, and no weight gets a gradient. Prompts of a batch do not see one
another, so the gradient of the sum over prompts is each prompt's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mechicl.errors import NotFiniteError

Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Slopes:
    """`values` and `gradients` by hook name, in the shapes of the hook points and the model's dtype; `metric` [batch], float32."""

    values: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    metric: Tensor


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No weight asks for a gradient inside the block; those that did ask again afterwards, also when it raises."""
    asking = [p for p in model.parameters() if p.requires_grad]
    for p in asking:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asking:
            p.requires_grad_(True)


def slopes(
    model: Any,
    batch: Any,
    names: Sequence[str],
    measure: Callable[[Tensor], Tensor],
    *,
    positions: Any = "last",
    edits: Mapping[str, Edit] | None = None,
    also: Sequence[str] = (),
) -> Slopes:
    """Gradients of a metric at hook points.

    Args:
        model: A hooked model, toy or production.
        batch: Prompts.
        names: Hook points, any that the model has; those that the metric does not depend on get zeros.
        measure: Logits [batch, n, vocab] at `positions` -> the metric of each prompt [batch].
        positions: As the model takes them.
        edits: Hook name -> what to put in its place; gradients are taken at the edited value.
        also: Hook points whose values are wanted too, without gradients.

    Raises:
        HookNameError: a name does not exist.
        HookNotFiredError: a named hook was never reached.
        NotFiniteError: the metric or a gradient is NaN or infinite.
    """
    edits, kept, seen = dict(edits or {}), {}, {}

    def keep(x: Tensor, *, hook: Any) -> Tensor:
        name = str(hook.name)
        x = edits[name](x) if name in edits else x
        if name in watched:
            seen[name] = x.detach().clone()  # a model may write into its stream later
        if name not in wanted:
            return x
        if not x.requires_grad:  # the first hook point on its way: the graph begins here
            x = x.detach().requires_grad_(True)
        kept[name] = x
        return x.clone()  # what comes later may write into its input, and must not write into what is kept

    wanted, watched = set(names), set(also)
    with frozen(model), torch.enable_grad(), model.hooks(fwd_hooks=[(name, keep) for name in dict.fromkeys((*names, *edits, *also))]):
        metric = measure(model(batch, positions=positions).float())
        found: Sequence[Tensor | None] = [None] * len(names)
        if metric.requires_grad:
            found = torch.autograd.grad(metric.sum(), [kept[name] for name in names], allow_unused=True)
    gradients = {name: torch.zeros_like(kept[name]) if g is None else g for name, g in zip(names, found, strict=True)}
    bad = [name for name, g in gradients.items() if not bool(torch.isfinite(g).all())]
    if bad or not bool(torch.isfinite(metric).all()):
        raise NotFiniteError(
            f"the metric and its gradients must be finite; got NaN or infinity at {bad[0] if bad else 'the metric'}. Use float32 or bfloat16, and check the weights."
        )
    return Slopes({**seen, **{name: kept[name].detach() for name in names}}, gradients, metric.detach())


@torch.no_grad()
def values(
    model: Any, batch: Any, names: Sequence[str], measure: Callable[[Tensor], Tensor], *, positions: Any = "last"
) -> tuple[dict[str, Tensor], Tensor]:
    """What passes the hook points, and the metric [batch], without a graph."""
    kept: dict[str, Tensor] = {}

    def keep(x: Tensor, *, hook: Any) -> None:
        kept[str(hook.name)] = x.detach().clone()  # a model may write into its stream later

    with model.hooks(fwd_hooks=[(name, keep) for name in dict.fromkeys(names)]):
        metric = measure(model(batch, positions=positions).float())
    return kept, metric
