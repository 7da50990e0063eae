"""Passes that differ from some layer on: what the layers below gave in one pass is given again in the next.

A set of heads switched off changes nothing below its first layer. Sets in ascending order of that layer each begin where the one before began to differ, and
leave behind the stream at which the next may begin: nothing is run in advance, and one stream is kept, whatever the depth of the model. Layers that do run
get the same numbers as in a whole pass, so logits are bit-equal.

Where layers hand something to later ones beside the stream and the cache of keys and values (keys that several layers share), leaving some out would change
the logits. That is not guessed from the family: a short prompt is run both ways, once for every model and layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mechicl.models.check import check_inputs_for, tolerance
from mechicl.models.hooked import active
from mechicl.models.recording import first_tensor, stream_input
from mechicl.models.replaced import replaced
from mechicl.models.resuming.check import ERRORS

_TRIED: WeakKeyDictionary[nn.Module, dict[int, bool]] = WeakKeyDictionary()
"""By model and layer: whether leaving out the layers below gives the model's own logits."""


@contextmanager
def lower_layers_once(model: Any) -> Iterator[Below]:
    """Inside the block, forward passes over one batch may leave out the layers that `Below.same_below` has said are as in the passes before.

    Layers run as ever with gradients on, in training mode, while anything listens at a hook point below, and where the stream that enters the first layer is
    another one. Nothing is kept behind the block.

    Args:
        model: A `HookedVLM`; the layers of anything else run as ever.
    """
    below = Below(model)
    with replaced((block, "forward", below.forward(layer, block.forward)) for layer, block in enumerate(below.blocks)):
        yield below


@dataclass(frozen=True, eq=False)
class _Kept:
    """What went through the layers below `layer`: the stream that entered the first, the output of the last, and what each left in the cache."""

    layer: int
    entered: Tensor
    output: Any
    cache: dict[int, Any]


class Below:
    """The lower layers of a model, from pass to pass. `left_out`: how many calls of layers were spared."""

    def __init__(self, model: Any) -> None:
        self.model, self.left_out = model, 0
        parts = model.anatomy.layers if hasattr(model, "hf") and hasattr(model, "anatomy") else ()
        self.blocks: list[nn.Module] = [part.block for part in parts]
        self._same = 0
        self._tried: _Kept | None = None  # what may be used
        self._at = len(self.blocks)  # the layer called last: a pass begins where the next is not a later one
        self._kept: _Kept | None = None
        self._skips = False
        self._entered: Tensor | None = None  # None: the running pass leaves nothing behind
        self._cache: dict[int, Any] = {}

    def same_below(self, layer: int) -> None:
        """In the next pass, of the same batch, nothing is changed below the layer.

        Whether layers can be left out is tried where something is kept to begin with, so never before the first pass: an analysis that watches a model's
        first pass sees its own prompts.
        """
        kept, self._same = self._kept, 0  # the short prompt that tries a layer goes past what is kept
        if kept is None or _possible(self.model, kept.layer):
            self._same = min(layer, len(self.blocks) - 1)  # where no layer differs, the last one runs all the same
        self._tried = kept

    def forward(self, layer: int, run: Callable[..., Any]) -> Callable[..., Any]:
        """A layer's forward pass, left out where it may be."""

        def given_or_run(*args: Any, **kwargs: Any) -> Any:
            stream, cache = stream_input(args, kwargs), _cache(args, kwargs)
            if stream is None:
                return run(*args, **kwargs)
            if layer <= self._at:
                self._begin(stream, cache)
            self._at, kept = layer, self._kept
            if self._skips and kept is not None and layer < kept.layer:
                self.left_out += 1
                if layer in kept.cache:
                    _put(cache, layer, copy(kept.cache[layer]))
                return _with(kept.output, None if layer == kept.layer - 1 else stream)
            output = run(*args, **kwargs)
            if layer < self._same and self._entered is not None:
                self._leave(layer, output, cache)
            return output

        return given_or_run

    def _begin(self, stream: Tensor, cache: Any) -> None:
        """A pass enters its first layer: may it leave some out, and may the next begin where it differs?"""
        self._skips, self._entered, self._cache, kept = False, None, {}, self._kept
        continues = cache is not None and cache.get_seq_length() > 0  # a candidate's tokens behind prompts that have run
        if continues or not self._same or torch.is_grad_enabled() or self.model.hf.training or _listened(self.model, self._same):
            return
        if (
            kept is not None
            and kept is self._tried
            and kept.layer <= self._same
            and (cache is None or kept.cache)
            and torch.equal(stream, kept.entered)
        ):
            self._skips, self._entered, self._cache = True, kept.entered, dict(kept.cache)
        else:
            self._entered = stream.clone()

    def _leave(self, layer: int, output: Any, cache: Any) -> None:
        """What a layer gave, for the next pass."""
        if cache is not None:
            self._cache[layer] = copy(cache.layers[layer])
        if layer == self._same - 1 and self._entered is not None and first_tensor(output) is not None:
            self._kept = _Kept(self._same, self._entered, _with(output, None), self._cache)


def _with(output: Any, stream: Tensor | None) -> Any:
    """A layer's output with another stream in it; None: its own, copied, because families add to a stream in place."""
    own = first_tensor(output)
    assert own is not None
    stream = own.clone() if stream is None else stream
    return stream if isinstance(output, Tensor) else type(output)((stream, *output[1:]))


def _cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The cache of keys and values among a layer's arguments; None where there is none."""
    return next((x for x in (*kwargs.values(), *args) if hasattr(x, "get_seq_length") and hasattr(x, "layers")), None)


def _put(cache: Any, layer: int, part: Any) -> None:
    if layer < len(cache.layers):
        cache.layers[layer] = part
    else:
        cache.layers.append(part)


def _listened(model: Any, layer: int) -> bool:
    """Whether anything listens below a layer."""
    names = tuple(f"blocks.{k}." for k in range(layer))
    return any(active(point) for name, point in model.hook_dict.items() if name.startswith(names))


def _possible(model: Any, layer: int) -> bool:
    """Whether a short prompt gives the same logits when the layers below are left out, with a cache and without, and the same cache."""
    known = _TRIED.setdefault(model, {})
    if layer not in known:
        if _listened(model, layer):  # nothing may be left out now; whether it could be is another question
            return False
        known[layer] = all(_agrees(model, layer, cached) for cached in (False, True))
    return known[layer]


@torch.no_grad()
def _agrees(model: Any, layer: int, cached: bool) -> bool:
    if any(part.attention is None for part in model.anatomy.layers[:layer]):
        return False  # a layer without softmax attention writes into its state in place
    inputs = check_inputs_for(model)
    try:
        with lower_layers_once(model) as below:
            below._same = layer
            whole = model.hf(**inputs, use_cache=cached)
            below._tried = below._kept
            short = model.hf(**inputs, use_cache=cached)
        pairs = [(whole.logits, short.logits), *zip(_keys(whole), _keys(short), strict=True)]
        limit = tolerance(torch.float32)  # layers that run get the same numbers: half precision excuses nothing
        alike = all(float((a - b).abs().max()) <= limit * (float(a.float().std()) or 1.0) for a, b in pairs)
    except ERRORS:
        return False
    return alike and below.left_out > 0


def _keys(output: Any) -> list[Tensor]:
    """Keys of every layer in a forward pass's cache."""
    layers = getattr(getattr(output, "past_key_values", None), "layers", ())
    return [layer.keys for layer in layers if isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.numel()]
