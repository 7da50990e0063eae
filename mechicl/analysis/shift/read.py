"""Keys and values of asked tokens only, layer by layer: what passes hook_k (before RoPE, after any norm of the keys) and hook_v, never the whole cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechicl.errors import EmptySpanError, NotFiniteError, OptionError, UnsupportedModelError

Part = Literal["k", "v"]

Where = Mapping[str, Tensor] | Tensor
"""Named masks [batch, pos]; one mask [batch, pos]; or positions, [row] (the same in every prompt) or [batch, row] with -1 for no row."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Which tokens are read.

    Attributes:
        positions: Places in the prompt, in order, padding counted; -1 behind a prompt's last row.
        spans: For each name which of the rows belong to it (spans may overlap). A mask or positions without a name are "rows".
    """

    positions: Int[Tensor, "batch row"]
    spans: Mapping[str, Bool[Tensor, "batch row"]]

    @property
    def known(self) -> Bool[Tensor, "batch row"]:
        """Rows that there are."""
        return self.positions >= 0


Reduce = Callable[[str, int, Tensor, Rows], Any]
"""(part, layer, values [batch, row, kv_head, d_head] on the model's device, NaN where there is no row; rows) -> what is kept of the layer."""


@dataclass(frozen=True, eq=False)
class KVRows(Mapping[str, Tensor]):
    """Keys and values: `rows["k"]`, `rows["v"]`, each [batch, layer, kv_head, row, d_head].

    NaN where a prompt has fewer rows, where a layer has fewer KV heads than another, and in layers that have no such keys (`reasons` says why).

    Attributes:
        layers: Layers of the second axis.
        rows: Which tokens.
        reasons: (part, layer) -> why there is nothing.
    """

    parts: Mapping[str, Float[Tensor, "batch layer kv_head row d_head"]]
    layers: tuple[int, ...]
    rows: Rows
    reasons: Mapping[tuple[str, int], str] = field(default_factory=dict)

    def __getitem__(self, part: str) -> Tensor:
        return self.parts[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def mean(self, part: str, span: str) -> Float[Tensor, "batch layer kv_head d_head"]:
        """Mean over the tokens of a span; NaN for a prompt without it."""
        inside = self.rows.spans[span].to(self.parts[part].device)[:, None, None, :, None]
        return torch.where(inside, self.parts[part], 0).sum(3) / inside.sum(3)


def rows_of(batch: Any, where: Where) -> Rows:
    """The rows that masks or positions ask for.

    Args:
        batch: A Batch, a mapping of inputs, or tokens: what says how many prompts and positions there are.
        where: See `Where`.

    Raises:
        OptionError: masks of another shape, positions outside the prompt, or no name at all.
        EmptySpanError: no prompt has a single token that was asked for.
    """
    n, n_pos = _size(batch)
    if isinstance(where, Mapping):
        masks = {name: mask.cpu() for name, mask in where.items()}
    elif where.dtype == torch.bool:
        masks = {"rows": where.cpu()}
    else:
        return _placed(where.cpu(), n, n_pos)
    for name, mask in masks.items():
        if mask.dtype != torch.bool or mask.shape != (n, n_pos):
            raise OptionError(
                f"mask {name!r} must be bool [batch, pos] = {[n, n_pos]}; got {mask.dtype} {list(mask.shape)}. Use batch.mask."
            )
    if not masks:
        raise OptionError("masks must name at least one span; got none. Use batch.mask or prompts.align.span_groups.")
    union = torch.stack(list(masks.values())).any(0)
    width = int(union.sum(1).max())
    if not width:
        raise EmptySpanError(f"spans must have a token in some prompt; {', '.join(masks)} have none. Ask for spans that the prompts have.")
    # asked-for places first, each prompt's in order
    order = torch.argsort((~union).long(), dim=1, stable=True)[:, :width]
    there = union.gather(1, order)
    return Rows(torch.where(there, order, -1), {name: mask.gather(1, order) & there for name, mask in masks.items()})


def read_kv(
    model: Any,
    batch: Any,
    where: Where,
    parts: Sequence[Part] = ("k", "v"),
    layers: Sequence[int] | None = None,
    reduce: Reduce | None = None,
) -> Any:
    """Keys and values of the asked tokens, from one forward pass that stops at the last layer asked for.

    Hooks that are active stay active, so that what an intervention does to keys and values can be read too.

    Args:
        model: A `HookedVLM`, a `ToyTransformer`, or anything with their hook points.
        batch: A Batch, or inputs.
        where: See `Where`.
        parts: "k": keys before RoPE, after any norm of the keys. "v": values.
        layers: Which; None: all. Layers without keys of the prompt's own tokens (linear attention; cross-attention to pictures that are not in the
            prompt) are left NaN with their reason, but are refused when asked for by number.
        reduce: Called with each layer's rows as they come; only what it returns is kept. Without it the rows are kept, float32, on the CPU.

    Returns:
        KVRows. With `reduce`: part -> list over `layers` of what it returned, None where a layer has nothing.

    Raises:
        OptionError: an option out of range.
        EmptySpanError: nothing to read.
        UnsupportedModelError: a layer asked for has no keys; layers have heads of different widths (use `reduce`).
        NotFiniteError: NaN or infinity among what was read.
    """
    rows = rows_of(batch, where)
    chosen = check_parts(parts)
    wanted, reasons = readable_layers(model, chosen, layers)
    found: dict[str, list[Any]] = {part: [None] * len(wanted) for part in chosen}
    place = {layer: i for i, layer in enumerate(wanted)}

    def keep(part: str, layer: int, values: Tensor) -> None:
        found[part][place[layer]] = values.float().cpu() if reduce is None else reduce(part, layer, values, rows)

    stream_kv(model, batch, rows, [(part, layer) for layer in wanted for part in chosen if (part, layer) not in reasons], keep)
    if reduce is not None:
        return found
    return KVRows({part: _stack(found[part], part) for part in chosen}, tuple(wanted), rows, reasons)


@torch.no_grad()
def stream_kv(model: Any, batch: Any, rows: Rows, wanted: Sequence[tuple[str, int]], keep: Callable[[str, int, Tensor], None]) -> None:
    """Hand over the asked rows of each (part, layer) as the forward pass reaches it, and stop the pass after the last.

    Args:
        model, batch, rows: As in `read_kv`.
        wanted: (part, layer), all of which the model has.
        keep: Called once with each, and its rows [batch, row, kv_head, d_head].

    Raises:
        NotFiniteError: NaN or infinity among what was read.
    """
    left = set(wanted)

    def listen(part: str, layer: int) -> Callable[..., None]:
        def hook(values: Tensor, hook: Any) -> None:
            if (part, layer) in left:
                got = gather(values, rows)
                _check_finite(part, layer, got, rows)
                keep(part, layer, got)
                left.discard((part, layer))
            if not left:
                raise _Enough

        return hook

    try:
        with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_{part}", listen(part, layer)) for part, layer in wanted]):
            model(batch)
    except _Enough:
        pass


def gather(values: Float[Tensor, "batch pos kv_head d_head"], rows: Rows) -> Float[Tensor, "batch row kv_head d_head"]:
    """The asked rows; NaN where a prompt has fewer."""
    at = rows.positions.to(values.device)
    index = at.clamp_min(0)[..., None, None].expand(-1, -1, *values.shape[2:])
    return values.detach().gather(1, index).masked_fill((at < 0)[..., None, None], torch.nan)


class _Enough(Exception):
    """Everything asked for has been read; the rest of the pass is not needed."""


def check_parts(parts: Sequence[str]) -> tuple[str, ...]:
    """The parts. Raises OptionError for one that does not exist."""
    if not parts or any(part not in get_args(Part) for part in parts) or len(set(parts)) < len(parts):
        raise OptionError(f'parts must be some of "k" and "v", each once; got {tuple(parts)}. "k" is keys before RoPE, "v" values.')
    return tuple(parts)


def readable_layers(model: Any, parts: Sequence[str], layers: Sequence[int] | None) -> tuple[list[int], dict[tuple[str, int], str]]:
    """Layers to read, and why some have nothing.

    Raises:
        OptionError: a layer that the model does not have.
        UnsupportedModelError: a layer asked for by number has no keys or values of the prompt's tokens, or none has.
    """
    n = model.cfg.n_layers
    wanted = list(range(n)) if layers is None else [int(layer) for layer in layers]
    if not wanted or not set(wanted) <= set(range(n)) or len(set(wanted)) < len(wanted):
        raise OptionError(f"layers must be some of 0..{n - 1}, each once; got {wanted}. Layers count from 0.")
    reasons = {(part, layer): why for layer in wanted for part in parts if (why := why_not(model, layer, part))}
    first = next(iter(reasons.items()), None)
    if first is not None and (layers is not None or len(reasons) == len(parts) * len(wanted)):
        (part, layer), why = first
        raise UnsupportedModelError(f"layer {layer} must have {part} of the prompt's tokens; {why}. Ask for other layers.")
    return wanted, reasons


def why_not(model: Any, layer: int, part: str) -> str:
    """Why a layer has no keys or values of the prompt's tokens; "" where it has them."""
    name = f"blocks.{layer}.attn.hook_{part}"
    if name not in model.hook_dict:
        return getattr(model, "unavailable", {}).get(name, f"the model has no hook point {name}")
    anatomy = getattr(model, "anatomy", None)
    if anatomy is not None and anatomy.layers[layer].cross:
        return "it attends to pictures that are no tokens of the prompt (cross-attention)"
    return ""


def _size(batch: Any) -> tuple[int, int]:
    inputs = getattr(batch, "inputs", batch)
    if isinstance(inputs, Tensor):
        return int(inputs.shape[0]), int(inputs.shape[1])
    given = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
    return int(given.shape[0]), int(given.shape[1])


def _placed(positions: Tensor, n: int, n_pos: int) -> Rows:
    if positions.dim() == 1:
        positions = torch.where(positions < 0, positions + n_pos, positions).expand(n, -1)
    if positions.dim() != 2 or len(positions) != n or not positions.numel() or not bool(((positions >= -1) & (positions < n_pos)).all()):
        raise OptionError(
            f"positions must be [row] or [batch, row] = [{n}, row], in 0..{n_pos - 1}; got {list(positions.shape)}. Count padding too; -1 in "
            "[batch, row] stands for no row."
        )
    if not bool((positions >= 0).any()):
        raise EmptySpanError("positions must name at least one token; all are -1. Ask for tokens that the prompts have.")
    positions = positions.long().contiguous()
    return Rows(positions, {"rows": positions >= 0})


def _check_finite(part: str, layer: int, values: Tensor, rows: Rows) -> None:
    known = rows.known.to(values.device)
    bad = (~values.isfinite()).flatten(2).any(2) & known
    if bool(bad.any()):
        row = int(bad.any(1).nonzero()[0])
        raise NotFiniteError(
            f"{part} of layer {layer} must be finite; prompt {row} has NaN or infinity. Use float32 or bfloat16, and check the weights."
        )


def _stack(layers: Sequence[Tensor | None], part: str) -> Tensor:
    """[batch, layer, kv_head, row, d_head], NaN for heads and layers that are not there."""
    there = [x for x in layers if x is not None]
    widths = {x.shape[-1] for x in there}
    if len(widths) > 1:
        raise UnsupportedModelError(
            f"heads must be as wide in all layers to be stacked; {part} has {sorted(widths)}. Pass layers= of one width, or reduce=."
        )
    n_heads = max(x.shape[2] for x in there)
    batch, n_rows, _, width = there[0].shape
    out = torch.full((batch, len(layers), n_heads, n_rows, width), torch.nan)
    for i, x in enumerate(layers):
        if x is not None:
            out[:, i, : x.shape[2]] = x.transpose(1, 2)
    return out
