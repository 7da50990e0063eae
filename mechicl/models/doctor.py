"""`diagnose`: is this model, on this machine, in this dtype, safe to draw conclusions from?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mechicl.models.check import check_inputs_for, compare, limit_of
from mechicl.models.guards import disagreement, first_overflow, watched
from mechicl.models.probe import picture_probe, text_probe
from mechicl.models.text import HookedLM
from mechicl.models.vlm import HookedVLM


@dataclass(frozen=True)
class Check:
    """One finding. `value` is held against `limit`; `advice` says what to do when `ok` is False."""

    name: str
    ok: bool
    value: float
    limit: float
    unit: str
    advice: str


@torch.no_grad()
def diagnose(model: HookedVLM) -> list[Check]:
    """Every check that needs no data: parity, implementations, overflow, masks, padding, positions, the picture's effect (not of a language model).

    Returns:
        Checks in order; all are run, none raises because of its finding.
    """
    inputs = check_inputs_for(model)
    limit = limit_of(model.hf)
    found = compare(model, inputs)
    plain = _last(model, inputs)
    untouched = model(inputs, positions="all")[:, -1].float()
    checks = [
        Check("no hook: logits equal the plain model's bit by bit", bool(torch.equal(untouched, plain)), float((untouched - plain).abs().max()), 0.0, "logits", "Report it: with nothing attached nothing may change."),
        Check("every pattern written out: same logits", found["difference"] <= limit, found["difference"], limit, "logit spread",
              "Do not trust patterns of this model; compare with model.trace (nnsight)."),
        Check("no attention on masked positions", found["masked"] == 0, found["masked"], 0.0, "probability", "The mask is not the model's: do not trust patterns."),
        Check("attention rows sum to one", found["rows"] <= 1e-3, found["rows"], 1e-3, "probability", "Scores overflow or a term is missing: use float32."),
        Check("one attention call per layer", found["calls"] == found["layers"], found["calls"], found["layers"], "calls", "Some layer runs attention twice or not at all."),
        _implementations(model, inputs),
        _overflow(model, inputs),
    ]  # fmt: skip
    if isinstance(model, HookedLM):
        return [*checks, _padding(model, limit)]
    if model.processor is not None:
        checks += [_padding(model, limit), _picture(model)]
    return checks


def _last(model: HookedVLM, inputs: dict[str, Any]) -> Tensor:
    return model.hf(**inputs, use_cache=False).logits[:, -1].float()


def _implementations(model: HookedVLM, inputs: dict[str, Any]) -> Check:
    """The model's own implementation against the other one (eager, or sdpa), and against what rounding does to this model."""
    found = disagreement(model, inputs)
    name = f"{found.names[0]} and {found.names[1]} attention agree as rounding allows"
    if found.reason:
        return Check(name, True, float("nan"), found.limit, "logit spread", f"Not compared: {found.reason}")
    advice = "Load in float32, or with attn_implementation='eager', and see which one moves."
    return Check(name, found.ok, found.value, found.limit, "logit spread", advice)


def _overflow(model: HookedVLM, inputs: dict[str, Any]) -> Check:
    """Largest output of a decoder layer, as a share of the dtype's maximum; where one is not finite, the module in which that begins."""
    with watched(model) as watch:
        model.hf(**inputs, use_cache=False)
    dtype = watch.dtype
    share = max(watch.values().values()) / torch.finfo(dtype).max
    begins = first_overflow(model, inputs) if watch.first() else ""
    where = f" It begins in {begins}." if begins else ""
    return Check(f"no overflow in {str(dtype).removeprefix('torch.')}", share < 0.1, share, 0.1, "share of the dtype's maximum",
                 f"Load in bfloat16 or float32: activations come near the largest number of this dtype.{where}")  # fmt: skip


def _padding(model: HookedVLM, limit: float) -> Check:
    """A prompt alone against the same prompt left-padded in a batch: logits of the last token, and with them the positions."""
    texts = ("one two", "one two three four five six seven")
    if isinstance(model, HookedLM):
        both, alone = _padded_words(model)
    else:
        both = model.on_device(picture_probe(model.processor, texts))
        alone = model.on_device(picture_probe(model.processor, texts[:1]))
    one, two = _last(model, alone)[0], _last(model, both)[0]
    value = float((one - two).abs().max()) / (float(one.std()) or 1.0)
    return Check("left padding changes nothing (positions follow the mask)", value <= limit, value, limit, "logit spread",
                 "Use batch_size=1 for this model, and compare.")  # fmt: skip


def _padded_words(model: HookedVLM) -> tuple[dict[str, Any], dict[str, Any]]:
    """A prompt of words with three masked tokens before it, and alone."""
    alone = model.on_device(text_probe(model.hf))
    ids, mask = alone["input_ids"], alone["attention_mask"]
    return {"input_ids": torch.cat([ids[:, :3], ids], 1), "attention_mask": torch.cat([torch.zeros_like(mask[:, :3]), mask], 1)}, alone


def _picture(model: HookedVLM) -> Check:
    """Another picture must move the logits."""
    inputs = model.on_device(picture_probe(model.processor))
    other = {k: (1 - v if k == "pixel_values" else v) for k, v in inputs.items()}
    a, b = _last(model, inputs), _last(model, other)
    value = float((a - b).abs().max()) / (float(a.std()) or 1.0)
    return Check("another picture moves the logits", value > 1e-4, value, 1e-4, "logit spread",
                 "The model does not look at the picture: random weights with closed gates, or an input that is not passed on.")  # fmt: skip
