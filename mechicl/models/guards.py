"""Numbers that a dtype cannot hold: found on the way, in the layer where they first appear, before conclusions are drawn from what follows.

Two things go wrong in half precision. A value grows beyond the largest number (65,504 in float16): an infinity, then NaN everywhere; or it is clamped
there in silence. And two attention implementations, equal on paper, round differently, and by more than rounding explains where one of them is wrong.
`watched` looks for the first on the way of an ordinary forward pass; `disagreement` measures the second against what rounding does to this very model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mechicl.errors import NotFiniteError
from mechicl.models.recording import first_tensor

NEAR = 0.5
"""Share of the dtype's largest number at which a value counts as saturated: one more doubling overflows."""
EXPLAINED = 4.0
"""How many times the measured effect of rounding two implementations may differ. Sound ones: 0 to 1.4 times (14 families, float16 and bfloat16)."""


@dataclass(eq=False)
class Watch:
    """What one forward pass showed. `largest`: place -> largest |value|, a tensor on the place's own device; NaN and infinity are inf."""

    dtype: torch.dtype = torch.float32
    largest: dict[str, Tensor] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)

    def add(self, place: str, x: Tensor) -> None:
        """Take in what passed a place."""
        if x.is_floating_point() and x.numel():
            low, high = torch.aminmax(x.detach())
            self.largest[place] = torch.maximum(-low, high).float()
            self.order.append(place)

    def values(self) -> dict[str, float]:
        """place -> largest |value|, in the order of the pass; inf where one is NaN or infinite."""
        read = {place: float(self.largest[place]) for place in self.order}
        return {place: value if value == value else float("inf") for place, value in read.items()}

    def first(self) -> str:
        """The first place with NaN or infinity; "" where all is finite."""
        return next((place for place, value in self.values().items() if value == float("inf")), "")

    def check(self) -> None:
        """Raises NotFiniteError naming the first place with NaN or infinity."""
        if place := self.first():
            raise NotFiniteError(
                f"activations must be finite; got NaN or infinity in {str(self.dtype).removeprefix('torch.')}, first in the output of {place}. "
                "Load in bfloat16 or float32, and check the weights."
            )

    def notes(self) -> list[str]:
        """What to say of values near the largest number."""
        if self.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return []
        most = torch.finfo(self.dtype).max
        for place, value in self.values().items():
            if value >= NEAR * most:
                name = str(self.dtype).removeprefix("torch.")
                return [
                    f"Activations come within {value / most:.0%} of the largest number of {name}, first in the output of {place}: they may be clamped. "
                    "Compare with bfloat16 or float32."
                ]
        return []


@contextmanager
def watched(model: Any) -> Iterator[Watch]:
    """Look at the first output of every decoder layer, of the final norm and of the unembedding inside the block. Costs one reduction each, once.

    Args:
        model: A HookedVLM; any other model (a toy in float32, a stand-in) is not watched.
    """
    anatomy = getattr(model, "anatomy", None)
    hf = getattr(model, "hf", None)
    if anatomy is None or hf is None:
        yield Watch()
        return
    watch = Watch(dtype_of(hf))
    handles: dict[str, Any] = {}

    def look(place: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            handles.pop(place).remove() if place in handles else None
            found = first_tensor(output)
            if found is not None and place not in watch.largest:
                watch.add(place, found)

        return hook

    places = {f"layer {i}": part.block for i, part in enumerate(anatomy.layers)}
    places |= {"the final norm": anatomy.final_norm, "the unembedding": anatomy.unembed}
    for place, module in places.items():
        if isinstance(module, nn.Module):
            handles[place] = module.register_forward_hook(look(place))
    try:
        yield watch
    finally:
        for handle in handles.values():
            handle.remove()


def dtype_of(hf: Any) -> torch.dtype:
    """The dtype in which a model computes, also where its weights are packed into integers."""
    found = getattr(hf, "dtype", None)
    if isinstance(found, torch.dtype) and found.is_floating_point:
        return found
    floats = [p.dtype for p in hf.parameters() if p.is_floating_point()]
    return floats[0] if floats else torch.float32


@torch.no_grad()
def first_overflow(model: Any, inputs: Mapping[str, Any]) -> str:
    """The module whose output is the first NaN or infinity although what entered it was finite, with its path in the model; "" where all is finite."""
    found: list[str] = []
    handles = []

    def hook(name: str) -> Any:
        def look(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            out = first_tensor(output)
            if found or out is None or not out.is_floating_point() or bool(torch.isfinite(out).all()):
                return
            entered = [x for x in args if isinstance(x, Tensor) and x.is_floating_point()]
            if all(bool(torch.isfinite(x).all()) for x in entered):
                found.append(name)

        return look

    for name, module in model.hf.named_modules():
        if name and not list(module.children()):
            handles.append(module.register_forward_hook(hook(name)))
    try:
        model.hf(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


@dataclass(frozen=True)
class Disagreement:
    """Largest difference of the last token's logits, in standard deviations of these. `explained`: what rounding alone does; `limit`: what is accepted."""

    names: tuple[str, str]
    value: float
    explained: float
    reason: str = ""
    """Why it was not measured; "" where it was."""

    @property
    def limit(self) -> float:
        """The difference up to which rounding explains it."""
        return max(EXPLAINED * self.explained, 1e-5)

    @property
    def ok(self) -> bool:
        """Whether rounding explains the difference; NaN is not explained, what could not be measured is not held against the model."""
        return bool(self.reason) or self.value <= self.limit


@torch.no_grad()
def disagreement(model: Any, inputs: Mapping[str, Any], *, seed: int = 0) -> Disagreement:
    """The model's own attention implementation against eager (or sdpa, where its own is eager), and against what rounding does to it.

    Rounding is measured on the model itself: the stream after every layer is moved by up to half a unit in the last place, at random, and the logits
    with it. Three forward passes of one prompt.

    Args:
        model: A HookedVLM.
        inputs: The processor's mapping, on the model's device.
        seed: Decides the moves.
    """
    configs = list(model.anatomy.configs)
    before = [c._attn_implementation for c in configs]
    other = "eager" if before[0] != "eager" else "sdpa"
    plain = _last(model, inputs)
    spread = float(plain.std()) or 1.0
    explained = float((_rounded(model, inputs, seed) - plain).abs().max()) / spread
    try:
        for config in configs:
            config._attn_implementation_internal = other
        value = float((_last(model, inputs) - plain).abs().max()) / spread
    except (ValueError, KeyError, RuntimeError) as error:
        return Disagreement((before[0], other), float("nan"), explained, str(error).splitlines()[0])
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation
    return Disagreement((before[0], other), value, explained)


def _last(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    return model.hf(**inputs, use_cache=False).logits[:, -1].float()


def _rounded(model: Any, inputs: Mapping[str, Any], seed: int) -> Tensor:
    """Logits with every layer's output moved by up to half a unit in the last place."""
    generators: dict[torch.device, torch.Generator] = {}

    def move(_: nn.Module, __: Any, output: Any) -> Any:
        x = first_tensor(output)
        if x is None:
            return None
        generator = generators.setdefault(x.device, torch.Generator(x.device).manual_seed(seed))
        noise = torch.rand(x.shape, generator=generator, device=x.device) - 0.5
        moved = (x.float() * (1 + noise * 2 * torch.finfo(x.dtype).eps)).to(x.dtype)
        return moved if isinstance(output, Tensor) else type(output)((moved, *output[1:]))

    handles = [part.block.register_forward_hook(move) for part in model.anatomy.layers]
    try:
        return _last(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


class PrecisionWarning(UserWarning):
    """Numbers of a model are near what its dtype can hold, or two implementations differ by more than rounding explains."""


def check_numbers(model: Any, inputs: Mapping[str, Any]) -> None:
    """The load-time look at a model in half precision: one prompt for overflow, two more for the agreement of attention implementations.

    Raises:
        NotFiniteError: an activation is NaN or infinite; names the module in which that begins.
    """
    if dtype_of(model.hf) not in (torch.float16, torch.bfloat16):
        return
    with torch.no_grad(), watched(model) as watch:
        model.hf(**inputs, use_cache=False)
    if place := watch.first():
        begins = first_overflow(model, inputs)
        raise NotFiniteError(
            f"activations must be finite; in {str(watch.dtype).removeprefix('torch.')} the output of {place} is not"
            + (f", and it begins in {begins}" if begins else "")
            + ". Load in bfloat16 or float32."
        )
    found = disagreement(model, inputs)
    notes = watch.notes()
    if not found.ok:
        notes.append(
            f"{found.names[0]} and {found.names[1]} attention differ by {found.value:.2g} of the logits' spread, where rounding explains {found.explained:.2g}. "
            "Load in float32 and see which one moves (mechicl doctor)."
        )
    for note in notes:
        warnings.warn(note, PrecisionWarning, stacklevel=4)
