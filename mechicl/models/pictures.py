"""Pictures seen once: what a vision tower made of some pixels is given again to later forward passes on the same pixels.

A sweep that runs the same prompts hundreds of times with other heads switched off changes nothing before the decoder, yet every pass would run the tower:
half of the work where pictures have four patches a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mechicl.models.hooked import active
from mechicl.models.recording import decoder_layers
from mechicl.models.replaced import replaced

FEATURES = ("get_image_features", "get_video_features")
"""Where transformers' models turn pixels into features: tower and projector together."""
UNREAD = ("hidden_states", "attentions")
"""What a tower gives beside its features, layer by layer, where it was asked to: large, and read by nobody behind it."""


@contextmanager
def pictures_once(model: Any) -> Iterator[None]:
    """Inside the block, a forward pass whose pictures are those of the pass before takes over the features that were made of them.

    The features are the very same tensors, so logits are bit-equal. Only those of the last pass with pictures are kept, until the block ends (also when it
    raises). The tower runs whenever anything listens at a `vision.*` hook point, with gradients on, in training mode, and where a single number differs
    in the pixels or in what goes with them. A torch hook of your own inside the tower sees it once.

    A batch repeated for several sets of heads is other pixels than the batch: features of one copy, repeated, would differ in the last bits.

    Args:
        model: A `HookedVLM`; anything without pictures is left as it is.
    """
    with replaced((module, name, _remembering(model, module, getattr(module, name))) for module, name in _makers(model)):
        yield


def _makers(model: Any) -> list[tuple[nn.Module, str]]:
    """Modules and the names of their functions that make features of pixels; where a family has none, its towers."""
    hf = getattr(model, "hf", None)
    if hf is None or not hasattr(model, "anatomy"):
        return []
    found = [(module, name) for module in hf.modules() for name in FEATURES if hasattr(type(module), name)]
    return found or [(tower, "forward") for tower in _towers(hf, model.anatomy.vision_layers)]


def _towers(hf: nn.Module, layers: tuple[nn.Module, ...]) -> list[nn.Module]:
    """The outermost modules that hold some of the vision layers and none of the decoder's."""
    vision, decoder = {id(layer) for layer in layers}, {id(layer) for layer in decoder_layers(hf)}
    found, queue = [], [hf]
    while queue:
        module = queue.pop()
        inside = {id(part) for part in module.modules()}
        if inside & vision and not inside & decoder:
            found.append(module)
        elif inside & vision:
            queue += module.children()
    return found


def _remembering(model: Any, module: nn.Module, make: Callable[..., Any]) -> Callable[..., Any]:
    """`make` with one call remembered."""
    kept: list[tuple[Any, Any, list[tuple[Tensor, int]]]] = []

    def made(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or module.training or _watched(model):
            return make(*args, **kwargs)
        for given, output, versions in kept:
            if all(x._version == version for x, version in versions) and _equal(given, (args, kwargs)):
                return _shell(output)
        kept.clear()  # before the tower runs: its features are the largest
        output = make(*args, **kwargs)
        mine = _shell(output)
        kept.append(((args, kwargs), mine, [(x, x._version) for x in _tensors(((args, kwargs), mine))]))
        return output

    return made


def _watched(model: Any) -> bool:
    """Whether anything listens in the tower."""
    return any(active(point) for name, point in model.hook_dict.items() if name.startswith("vision."))


def _shell(output: Any) -> Any:
    """The same tensors in containers of their own: families overwrite a field of what the tower gave them. Without the fields that nobody reads."""
    if isinstance(output, Mapping):
        fields = {name: _shell(value) for name, value in output.items() if name not in UNREAD}
        return type(output)(**fields)
    return [_shell(value) for value in output] if isinstance(output, list) else output


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _equal(a: Any, b: Any) -> bool:
    """Whether two calls' arguments hold the same numbers, bit by bit."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if a is b:
            return True
        same = isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and a.device == b.device
        return same and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return a is b or (type(a) is type(b) and bool(a == b))
