"""What the residual stream is made of: at chosen positions, every vector that was added to it up to a layer.

One forward pass keeps the stream, the heads' outputs and the sublayers' outputs at these positions. The parts add up to the stream, up to the rounding of the model's
own dtype. Heads are parts by themselves only where a family adds their outputs to the stream as they are; sublayers are always.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechicl.errors import OptionError, UnsupportedModelError
from mechicl.prompts.batch import Batch

By = Literal["component", "layer"]
"""Parts: the embeddings, every head and every MLP ("component"), or the embeddings and every sublayer ("layer")."""

HookFn = Callable[..., Any]

KIND_ORDER = {"added": -0.5, "attn": 0.1, "layer": 0.2, "mlp": 0.3}
"""When a part of a layer is written, heads being at 0.1."""


def check_by(model: Any, by: str) -> None:
    """Refuse a decomposition that does not exist, or that the family does not allow.

    Raises:
        OptionError: an unknown name.
        UnsupportedModelError: heads are asked for and are not summands of the stream.
    """
    if by not in get_args(By):
        raise OptionError(f"by must be one of {', '.join(get_args(By))}; got {by!r}. Pick one.")
    reason = getattr(model, "not_additive", "")
    if by == "component" and reason:
        raise UnsupportedModelError(
            f'by must be "layer" for {getattr(model.cfg, "model_type", "this model")}: {reason}, so that a head has no part of its own. Use by="layer", patch or ablate.'
        )


def at(x: Tensor, positions: Int[Tensor, "batch n"]) -> Tensor:
    """x [batch, pos, ...] at the positions [batch, n], in float32."""
    index = positions.to(x.device).reshape(*positions.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index).float()


@dataclass(frozen=True, eq=False)
class Parts:
    """Summands of the stream: `value` [batch, n, part, d_model]; `names`; `stream` [batch, n, d_model], what they add up to."""

    names: tuple[str, ...]
    value: Float[Tensor, "batch n part d_model"]
    stream: Float[Tensor, "batch n d_model"]


class Written:
    """Keeps what is written at `positions` during one forward pass: give `hooks` to the model, run it, then ask for `parts`.

    Args:
        model: A hooked model.
        positions: [batch, n].
        by: See `By`.
        layers: How many layers to follow; default all.
    """

    model: Any
    positions: Int[Tensor, "batch n"]
    n_layers: int

    def __init__(self, model: Any, positions: Int[Tensor, "batch n"], *, by: By | str = "component", layers: int | None = None) -> None:
        check_by(model, by)
        self.model, self.positions, self.by = model, positions, by
        self.n_layers = model.cfg.n_layers if layers is None else layers
        self.kept: dict[str, Tensor] = {}
        self.split: dict[int, tuple[tuple[str, ...], Tensor]] = {}
        """For layers whose heads are split by what they read: names of the groups, and z [batch, n, head, group, d_head]."""

    @property
    def hooks(self) -> list[tuple[str, HookFn]]:
        """(hook name, function) for the forward pass."""
        names = []
        for layer in range(self.n_layers):
            names += [f"blocks.{layer}.{point}" for point in ("hook_resid_pre", "hook_resid_post")]
            names += [f"blocks.{layer}.{point}" for point in ("hook_resid_mid", "attn.hook_z") if self._wanted(layer, point)]
        if self.n_layers < self.model.cfg.n_layers:
            names.append(f"blocks.{self.n_layers}.hook_resid_pre")
        return [(name, self.keep) for name in names]

    def _wanted(self, layer: int, point: str) -> bool:
        there = f"blocks.{layer}.{point}" in self.model.hook_dict
        return there and (point != "attn.hook_z" or self.by == "component")

    def keep(self, x: Tensor, hook: Any) -> None:
        """Hook function: keep what passes, at the positions."""
        self.kept[hook.name] = at(x.detach(), self.positions)

    def stream(self, layer: int) -> Float[Tensor, "batch n d_model"]:
        """The stream that enters `layer` (n_layers: that leaves the last)."""
        if layer < self.n_layers or f"blocks.{layer}.hook_resid_pre" in self.kept:
            return self.kept[f"blocks.{layer}.hook_resid_pre"]
        return self.kept[f"blocks.{layer - 1}.hook_resid_post"]

    def pieces(self, layer: int | None = None) -> Iterator[tuple[list[str], Float[Tensor, "batch n part d_model"]]]:
        """Everything written before `layer` (default: by the last layer followed), a layer at a time: names and vectors.

        The biases of the heads' output projections are one part, "biases", the last.
        """
        end = self.n_layers if layer is None else layer
        embed = self.kept["blocks.0.hook_resid_pre"]
        yield ["embed"], embed[:, :, None]
        biases = torch.zeros_like(embed[0, 0])
        for k in range(end):
            before, after = self.kept[f"blocks.{k}.hook_resid_pre"], self.kept[f"blocks.{k}.hook_resid_post"]
            mid, z = self.kept.get(f"blocks.{k}.hook_resid_mid"), self.kept.get(f"blocks.{k}.attn.hook_z")
            found: dict[str, Tensor] = {}
            if z is not None:
                attn = self.model.blocks[k].attn
                out, heads = attn.W_O.detach().float(), range(z.shape[2])
                if k in self.split:
                    groups, apart = self.split[k]
                    yield (
                        [f"{k}.{h} {group}" for h in heads for group in groups],
                        torch.einsum("bnhgd,hdm->bnhgm", apart, out).flatten(2, 3),
                    )
                else:
                    yield [f"{k}.{h}" for h in heads], torch.einsum("bnhd,hdm->bnhm", z, out)
                biases = biases + _bias(attn, biases)
            if mid is not None:
                found |= ({f"attn {k}": mid - before} if z is None else {}) | {f"mlp {k}": after - mid}
            elif z is None:  # no point between attention and MLP, or no MLP
                found[f"attn {k}" if getattr(self.model.cfg, "attn_only", False) else f"layer {k}"] = after - before
            entered = self.kept.get(f"blocks.{k + 1}.hook_resid_pre")
            if entered is not None and not torch.equal(entered, after):
                found[f"added {k + 1}"] = entered - after
            if found:
                yield list(found), torch.stack(list(found.values()), 2)
        if bool((biases != 0).any()):
            yield ["biases"], biases.expand_as(embed)[:, :, None]

    def parts(self, layer: int | None = None) -> Parts:
        """The pieces together."""
        found = list(self.pieces(layer))
        names = tuple(name for some, _ in found for name in some)
        return Parts(names, torch.cat([value for _, value in found], 2), self.stream(self.n_layers if layer is None else layer))


def _bias(attn: Any, like: Tensor) -> Tensor:
    """The output projection's bias [d_model]; zero for toys, which have none."""
    bias: Tensor | None = getattr(attn, "b_O", None)
    return torch.zeros_like(like) if bias is None else bias.detach().float()


def order(names: Sequence[str]) -> list[str]:
    """Names of several batches in the order of execution, each once."""

    def when(name: str) -> tuple[float, int]:
        if name in ("embed", "biases"):
            return (-1.0 if name == "embed" else float("inf"), 0)
        first, _, rest = name.partition(" ")
        if first in KIND_ORDER:
            return float(rest) + KIND_ORDER[first], 0
        layer, _, head = first.partition(".")
        return float(layer) + 0.1, int(head)

    return sorted(dict.fromkeys(names), key=when)


def aligned(names: Sequence[str], wanted: Sequence[str], value: Tensor, dim: int) -> Tensor:
    """`value` with its parts `names` along `dim` put at the places of `wanted`; zeros where a batch has no such part."""
    index = torch.tensor([list(wanted).index(name) for name in names], device=value.device)
    shape = list(value.shape)
    shape[dim] = len(wanted)
    return value.new_zeros(shape).index_copy(dim, index, value)


def last_positions(batch: Batch) -> Int[Tensor, "batch 1"]:
    """The token that predicts the answer."""
    return batch.query_pos[:, None]
