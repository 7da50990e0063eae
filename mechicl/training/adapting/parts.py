"""Which weights a fine-tuning moves: the decoder, whole or through low-rank adapters, and the projector if asked; the vision tower never."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from torch import nn

from mechicl.errors import OptionError, UnsupportedModelError
from mechicl.models.adapters import add_adapters
from mechicl.models.recording import NOT_DECODER, decoder_layers

PROJECTORS = ("projector", "merger", "connector", "aligner", "embed_vision", "abstractor", "resampler")
"""What families call the module between vision tower and decoder, or a part of its name."""


def decoder_names(hf: Any) -> list[str]:
    """Parameters of the decoder, its embeddings and its output layer."""
    inside = {id(p) for name, p in hf.get_decoder().named_parameters() if not _visual(name)}
    inside |= {id(p) for p in hf.get_output_embeddings().parameters()}
    return [name for name, p in hf.named_parameters() if id(p) in inside]


def _visual(name: str) -> bool:
    return any(word in part for part in name.lower().split(".") for word in NOT_DECODER)


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
"""The attention's linear layers in most families, by the last part of their names: what many papers adapt."""


def linear_names(hf: Any, targets: Sequence[str] | None = None) -> list[str]:
    """The linear layers of the decoder's layers, each of which gets an adapter.

    Args:
        hf: The Hugging Face model.
        targets: The last parts of their names ("q_proj", ...); None: all of them.

    Raises:
        UnsupportedModelError: there are none (quantised weights, or layers written without nn.Linear).
        OptionError: a target that no layer is called by.
    """
    inside = {id(m) for m in decoder_layers(hf).modules()}
    found = [name for name, m in hf.named_modules() if type(m) is nn.Linear and id(m) in inside]
    if not found:
        raise UnsupportedModelError(
            f"model must have linear layers in its decoder; {type(hf).__name__} has none of torch's own. Use lora=False."
        )
    if targets is None:
        return found
    known = {name.rsplit(".", 1)[-1] for name in found}
    strange = [target for target in targets if target not in known]
    if strange or not targets:
        raise OptionError(f"targets must be among {', '.join(sorted(known))}; got {strange or 'none'}. Leave it out for all of them.")
    return [name for name in found if name.rsplit(".", 1)[-1] in set(targets)]


def projector_names(hf: Any) -> list[str]:
    """The modules between vision tower and decoder.

    Raises:
        UnsupportedModelError: none is known by name.
    """
    inside = {id(m) for m in decoder_layers(hf).modules()}
    found: list[str] = []
    for name, module in hf.named_modules():
        last = name.rsplit(".", 1)[-1].lower()
        if (
            any(word in last for word in PROJECTORS)
            and id(module) not in inside
            and not any(name.startswith(f"{other}.") for other in found)
        ):
            found.append(name)
    if not found:
        raise UnsupportedModelError(
            f"projector=True needs a module called {', '.join(PROJECTORS[:4])}, ...; {type(hf).__name__} has none. Leave the projector frozen."
        )
    return found


def choose(
    hf: Any,
    *,
    lora: bool,
    projector: bool,
    rank: int,
    alpha: float,
    dropout: float,
    base: str,
    seed: int,
    targets: Sequence[str] | None = None,
) -> Any:
    """Freeze everything but what is to be trained; `targets` as in `linear_names`.

    Returns:
        The model to train: `hf` itself, or peft's model around it with adapters in place.
    """
    whole = projector_names(hf) if projector else []
    if lora:
        return add_adapters(hf, linear_names(hf, targets), whole, rank=rank, alpha=alpha, dropout=dropout, base=base, seed=seed)
    wanted = set(decoder_names(hf))
    for name, parameter in hf.named_parameters():
        parameter.requires_grad_(name in wanted or any(name.startswith(f"{module}.") for module in whole))
    if not any(parameter.requires_grad for parameter in hf.parameters()):
        raise OptionError(f"model must have weights to train; {type(hf).__name__} has none in its decoder. Report the family.")
    return hf


def fingerprint(hf: nn.Module) -> str:
    """A short digest of a model's weights: names, shapes, and some numbers of each. Notices another base model, without reading all of it."""
    text = hashlib.sha256()
    for name, parameter in hf.named_parameters():
        flat = parameter.detach().flatten()
        few = flat[:: max(1, len(flat) // 16)][:32].float().cpu()
        text.update(f"{name}{tuple(parameter.shape)}".encode() + few.numpy().tobytes())
    return text.hexdigest()[:16]
