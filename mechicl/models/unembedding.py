"""From the last norm to the logits: which norm, which matrix, and what the family multiplies or caps on the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mechicl.errors import UnsupportedModelError

HEAD_NAMES = ("lm_head", "embed_out", "output_projection")


@dataclass(frozen=True)
class Unembedding:
    """logits = capped(scale * head(norm(stream))).

    Attributes:
        norm: The final norm; None where none feeds the head (then there is no logit lens).
        head: The matrix into the vocabulary.
        scale: Everything that is multiplied between the norm's output and the logits.
        cap: The logits are cap * tanh(logits / cap); None where they are not.
        known: Whether norm, scale and cap together give the model's logits.
    """

    norm: nn.Module | None
    head: nn.Module
    scale: float = 1.0
    cap: float | None = None
    known: bool = True


def head_of(hf: Any) -> nn.Module:
    """The module that writes logits.

    Raises:
        UnsupportedModelError: none found.
    """
    head = hf.get_output_embeddings()
    if head is None:  # a wrapper that does not say: the decoder's own
        head = next((m for name, m in reversed(list(hf.named_modules())) if name.split(".")[-1] in HEAD_NAMES), None)
    if head is None:
        raise UnsupportedModelError(
            f"model must have an output embedding; {type(hf).__name__} shows none. Pass a model with a language-modelling head."
        )
    return head


def proportion(a: Tensor | None, b: Tensor | None) -> float | None:
    """The number that turns a into b, None where there is none."""
    if a is None or b is None or a.shape != b.shape:
        return None
    a, b = a.double().flatten(), b.double().flatten()
    size = float(a @ a)
    factor = float(a @ b) / size if size > 0 else 0.0
    return factor if factor != 0 and float((factor * a - b).abs().max()) <= 1e-5 * float(b.abs().max().clamp_min(1e-6)) else None


def inspect_unembedding(
    head: nn.Module,
    order: Iterable[nn.Module],
    inputs: Mapping[int, Tensor],
    outputs: Mapping[int, Tensor],
    logits: Tensor | None,
    cap: float | None,
) -> Unembedding:
    """Which norm feeds the head and what is multiplied, from one recorded run.

    Args:
        head: The module that writes logits.
        order: Every recorded module, in order of the calls.
        inputs: What entered each module, by id.
        outputs: What left it.
        logits: What the model returned [batch, pos, vocab].
        cap: The configuration's soft cap, to be verified.
    """
    entered, written = inputs.get(id(head)), outputs.get(id(head))
    norm, before = None, 1.0
    for module in reversed(list(order)):
        if "norm" in type(module).__name__.lower() and (factor := proportion(outputs.get(id(module)), entered)) is not None:
            norm, before = module, factor
            break
    if logits is None or written is None:
        return Unembedding(norm, head, before, cap, known=False)
    n = min(written.shape[-1], logits.shape[-1])
    shown = logits[..., :n].float()
    real = shown > torch.finfo(shown.dtype).min / 2  # some families forbid tokens by writing the smallest number
    given, shown = written[..., :n].float()[real], shown[real]
    if (after := proportion(given, shown)) is not None:
        return Unembedding(norm, head, before * after)
    if (
        cap is not None
        and (after := proportion(given, torch.atanh((shown / cap).double().clamp(-1 + 1e-12, 1 - 1e-12)).float() * cap)) is not None
    ):
        return Unembedding(norm, head, before * after, cap)
    return Unembedding(norm, head, before, cap, known=False)
