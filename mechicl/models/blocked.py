"""Attention with cells closed: tokens that may not read certain other tokens, in chosen layers and heads, in any family.

A closed cell's score is minus infinity before the softmax, so the rest of the row takes over its share and rows still sum to one. In a Hugging Face model the fused
kernel computes everything as before, and only rows with a closed cell are computed anew from the model's own mask (sliding windows, padding and bidirectional
blocks included): no pattern of [head, dest, src] is made. Hook points and attention rows inside the block see the closed attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mechicl.errors import HookNotFiredError, OptionError, UnsupportedModelError
from mechicl.models.attention import AttentionCall, AttentionSession, attention_session
from mechicl.models.hooked import check_heads
from mechicl.models.toys.model import ToyTransformer
from mechicl.models.toys.parts import Setting
from mechicl.results import Head


@dataclass(frozen=True, eq=False)
class Block:
    """Which tokens may not read which.

    Attributes:
        dest: For each token the number of its group of readers, -1 for none.
        src: For each token the number of the readers that may not read it, -1 for none: a cell is closed where the two numbers agree.
        layers: Where; None for every layer.
        heads: (layer, head) pairs, to close the cells in these heads only; None for all heads of the layers.
        follow: Group of readers that the tokens appended behind the prompts belong to (the words of an answer, say); -1 for none.
    """

    dest: Int[Tensor, "_ _"]
    src: Int[Tensor, "_ _"]
    layers: tuple[int, ...] | None = None
    heads: tuple[Head, ...] | None = None
    follow: int = -1


@dataclass(eq=False)
class Tally:
    """What the forward passes inside `blocked` met: cells closed that could be read otherwise (in one layer, summed over prompts; each prompt counted once for every copy of it
    that ran), rows left with nothing, which keep reading their own token, and whether any pass met a closed layer."""

    cells: int = 0
    emptied: int = 0
    ran: bool = False
    first: int = -1

    def add(self, layer: int, cells: Tensor, emptied: Tensor) -> None:
        """Counts of the first closed layer stand for all."""
        self.first = layer if self.first < 0 else self.first
        if layer == self.first:
            self.cells += int(cells)
            self.emptied += int(emptied)


@contextmanager
def blocked(model: Any, blocks: Sequence[Block]) -> Iterator[Tally]:
    """Forward passes inside run with the cells of all blocks closed; nothing is left behind, also when one raises.

    The passes must be of the prompts that the blocks were made for: as they are, repeated as a whole (`Batch.repeat`), with tokens appended behind, or
    continued from their cache by `continue_prompts` (one copy of the prompts); not those of `generate` or of a run resumed half-way. A row left with nothing to read keeps its own token (families with attention sinks keep the sink only).

    Args:
        model: A `HookedVLM` or a `ToyTransformer`.
        blocks: What is closed; several add up.

    Yields:
        Tally, filled in as passes run.

    Raises:
        OptionError: no block, a layer outside the model, or prompts of another shape inside.
        HeadIndexError: a head that the model does not have.
        UnsupportedModelError: a layer asked for has no softmax attention over the sequence.
        HookNotFiredError: no forward pass went through a closed layer.
    """
    if not blocks:
        raise OptionError("blocks must be at least one Block; got none. Say which tokens may not read which.")
    by_layer: dict[int, list[Block]] = {}
    for block in blocks:
        for layer in _layers(model, block):
            by_layer.setdefault(layer, []).append(block)
    if not by_layer:
        raise OptionError("layers and heads must leave a layer to close cells in; they leave none. Name heads of the layers given.")
    if len({block.dest.shape for block in blocks}) > 1:
        raise OptionError(
            f"blocks must be of the same prompts; got shapes {[list(block.dest.shape) for block in blocks]}. Make all of one batch."
        )
    tally = Tally()
    closed = {layer: _Closed(layer, tuple(some), tally) for layer, some in by_layer.items()}
    with ExitStack() as stack:
        if isinstance(model, ToyTransformer):
            for layer, one in closed.items():
                stack.callback(model.blocks[layer].attn.register_forward_pre_hook(_toy(one)).remove)  # type: ignore[union-attr]
        else:
            parts = model.anatomy.layers
            session = AttentionSession({}, closed={id(parts[layer].attention): one for layer, one in closed.items()})
            stack.enter_context(attention_session(session, list(model.anatomy.configs)))
        yield tally
    if not tally.ran:
        raise HookNotFiredError(
            "a forward pass must run through the closed layers; none did. Call the model inside the block (a toy's classify has no such layers)."
        )


def windows(n_layers: int, size: int, step: int | None = None) -> tuple[tuple[int, ...], ...]:
    """Windows of `size` neighbouring layers, every `step` layers (default: side by side); the last one ends with the last layer.

    Raises:
        OptionError: a size or step that does not fit.
    """
    step = size if step is None else step
    if not 1 <= size <= n_layers or step < 1:
        raise OptionError(f"size must be 1..{n_layers} and step at least 1; got {size} and {step}. Choose smaller windows.")
    starts = [*range(0, n_layers - size, step), n_layers - size]
    return tuple(tuple(range(start, start + size)) for start in starts)


@dataclass(frozen=True, eq=False)
class _Closed:
    """The closed cells of one layer; `attention.Closed`."""

    layer: int
    blocks: tuple[Block, ...]
    tally: Tally
    cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def n_pos(self) -> int:
        """Tokens of the prompts."""
        return self.blocks[0].dest.shape[1]

    def dest(self, call: AttentionCall) -> Tensor:
        self.tally.ran = True
        batch, _, n_dest, _ = call.query.shape
        return self._rows(_Shape(self.n_pos, batch, n_dest, call.key.shape[2]), call.query.device)

    def _rows(self, shape: _Shape, device: torch.device) -> Tensor:
        key = (shape, device)
        if key not in self.cache:
            reads = torch.stack([self._wide(block.dest, block.follow, shape, device)[:, shape.skip :] >= 0 for block in self.blocks]).any(0)
            count = reads.sum(1)
            order = torch.sort(reads.long(), dim=1, descending=True, stable=True)[1][:, : int(count.max())]
            # a prompt with fewer rows repeats its first one; one with none repeats row 0, which comes out as it was
            filler = torch.where(count > 0, order[:, 0], 0) if order.shape[1] else count
            self.cache[key] = torch.where(torch.arange(order.shape[1], device=device) < count[:, None], order, filler[:, None])
        return self.cache[key]

    def __call__(self, call: AttentionCall, dest: Tensor, allowed: Tensor) -> Tensor:
        shape = _Shape(self.n_pos, call.query.shape[0], call.query.shape[2], call.key.shape[2])
        return self.close(shape, call.query.shape[1], dest, allowed, sinks=any(name in call.terms for name in ("s_aux", "sinks")))

    def close(self, shape: _Shape, n_heads: int, dest: Tensor, allowed: Tensor, *, sinks: bool) -> Tensor:
        """allowed [batch or 1, head or 1, n, src] of rows dest [n] or [batch, n], without the closed cells: [batch, head or 1, n, src]."""
        self.tally.ran, device = True, allowed.device
        where = dest.expand(shape.batch, -1) if dest.dim() == 1 else dest
        shut = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
        for block in self.blocks:
            readers = self._wide(block.dest, block.follow, shape, device)[:, shape.skip :].gather(1, where)
            source = self._wide(block.src, -1, shape, device)[:, shape.total - shape.n_src :]
            cells = ((readers[:, :, None] == source[:, None, :]) & (readers >= 0)[:, :, None])[:, None]
            if block.heads is not None:
                some = torch.zeros(n_heads, dtype=torch.bool, device=device)
                some[[head for layer, head in block.heads if layer == self.layer]] = True
                cells = cells & some[None, :, None, None]
            shut = shut | cells
        left = allowed & ~shut
        emptied = allowed.any(-1, keepdim=True) & ~left.any(-1, keepdim=True)
        self._count(shape, where, allowed, left, emptied)
        if sinks or not bool(emptied.any()):
            return left
        own = (where + shape.n_src - shape.n_dest)[:, None, :, None] == torch.arange(shape.n_src, device=device)
        return left | (emptied & allowed & (own | ~(own & allowed).any(-1, keepdim=True)))

    def _count(self, shape: _Shape, where: Tensor, allowed: Tensor, left: Tensor, emptied: Tensor) -> None:
        """Rows that stand twice (fillers of prompts with fewer) are counted once."""
        if where.shape[1] > 1:
            repeated = torch.zeros_like(where, dtype=torch.bool)
            repeated[:, 1:] = where[:, 1:] <= where[:, :1]
            left, emptied = left | (repeated[:, None, :, None] & allowed), emptied & ~repeated[:, None, :, None]
        self.tally.add(
            self.layer, (allowed & ~left)[:, 0].sum() if left.shape[1] == 1 else (allowed & ~left).any(1).sum(), emptied.any(1).sum()
        )

    def _wide(self, group: Tensor, follow: int, shape: _Shape, device: torch.device) -> Tensor:
        """Group numbers [batch, total] of the rows of one pass from those of the prompts [prompt, pos]; appended tokens get `follow`."""
        n, n_pos = group.shape
        if shape.batch % n or shape.total < n_pos:
            raise OptionError(
                f"batch must be the {n} prompts of {n_pos} tokens that the blocks were made for; got {shape.batch} rows of {shape.total}. Make blocks for this batch."
            )
        grown = torch.nn.functional.pad(group.to(device), (0, shape.total - n_pos), value=follow)
        # whole passes hold the block of prompts again and again; a pass that continues prompts from their cache holds each prompt's continuations together
        return grown.repeat(shape.batch // n, 1) if shape.skip == 0 else grown.repeat_interleave(shape.batch // n, 0)


@dataclass(frozen=True)
class _Shape:
    """Sizes of one attention call on prompts of `n_pos` tokens."""

    n_pos: int
    batch: int
    n_dest: int
    n_src: int

    @property
    def total(self) -> int:
        """Tokens up to the last that reads. A sliding layer's cache holds fewer keys than there were tokens."""
        return self.n_src if self.n_dest == self.n_src or self.n_src > self.n_pos else self.n_pos + self.n_dest

    @property
    def skip(self) -> int:
        """Tokens before the first that reads."""
        return self.total - self.n_dest


def _toy(closed: _Closed) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """For a toy's attention, which is handed where it may look."""

    def close(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, at = args
        assert isinstance(at, Setting)
        n_pos = x.shape[1]
        n_heads = module.W_Q.shape[0]  # type: ignore[index, union-attr]
        every = torch.arange(n_pos, device=x.device)
        allowed = closed.close(_Shape(closed.n_pos, len(x), n_pos, n_pos), int(n_heads), every, at.allowed, sinks=False)
        return x, replace(at, allowed=allowed)

    return close


def _layers(model: Any, block: Block) -> Sequence[int]:
    """The layers of a block, checked."""
    if block.dest.shape != block.src.shape or block.dest.dim() != 2:
        raise OptionError(
            f"dest and src must both be [batch, pos]; got {list(block.dest.shape)} and {list(block.src.shape)}. Number every token in both."
        )
    n_layers, named = model.cfg.n_layers, block.layers
    if named is not None and not all(0 <= layer < n_layers for layer in named):
        raise OptionError(f"layers must be in 0..{n_layers - 1}; got {list(named)}. Layers count from 0.")
    if block.heads is not None:
        check_heads(model, block.heads)
    chosen = list(range(n_layers)) if named is None else sorted(set(named))
    if block.heads is not None:
        chosen = [layer for layer in chosen if any(at == layer for at, _ in block.heads)]
    parts = getattr(getattr(model, "anatomy", None), "layers", None)
    if parts is None:
        return chosen
    for layer in chosen:
        if named is not None and (parts[layer].attention is None or parts[layer].cross):
            reason = "it reads pictures that are not in the sequence" if parts[layer].cross else _reason(parts[layer].reasons)
            raise UnsupportedModelError(f"layer {layer} must have softmax attention over the sequence; {reason}. Leave it out.")
    return [layer for layer in chosen if parts[layer].attention is not None and not parts[layer].cross]


def _reason(reasons: Mapping[str, str]) -> str:
    return reasons.get("attn.hook_pattern", "it has none")
