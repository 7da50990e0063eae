"""The load-time check: that the hooked model is the plain model. It catches nearly every way in which a family could be silently wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechicl.errors import ParityError
from mechicl.models.attention import AttentionCall, check_terms, combine, rows, softmax
from mechicl.models.probe import picture_probe, text_probe

if TYPE_CHECKING:
    from mechicl.models.vlm import HookedVLM


def tolerance(dtype: torch.dtype) -> float:
    """Largest difference of logits that rounding explains, as a share of their standard deviation. A wrong mask moves them by a whole one."""
    return {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.5, torch.float16: 0.1}.get(dtype, 0.5)


EIGHT_BITS = 0.1
"""What `tolerance` is at least where weights are 8-bit integers. Their maps round each input to 127 steps of its row's largest, so that runs which differ by float32
rounding can differ by a whole step: on the bundled model in float32 mostly by nothing, and by 2.5e-3 of the logits' spread where a step turned; wide and
deep models have more steps to turn. 4-bit maps read their inputs in the model's own dtype, whose limit holds for them."""


def limit_of(hf: Any) -> float:
    """`tolerance` of a Hugging Face model: of its dtype, and of its packed weights."""
    eight = any(p.dtype == torch.int8 for p in hf.parameters())
    return max(tolerance(hf.dtype), EIGHT_BITS) if eight else tolerance(hf.dtype)


def check_inputs_for(model: HookedVLM) -> dict[str, Any]:
    """The check's prompt: the given probe, or a picture where there is a processor, and a text else."""
    if model.probe is not None:
        return model.on_device(model.probe)
    if model.processor is not None:
        return model.on_device(picture_probe(model.processor))
    return model.on_device(text_probe(model.hf))


@torch.no_grad()
def compare(model: HookedVLM, inputs: dict[str, Any]) -> dict[str, float]:
    """Plain against hooked on one prompt.

    Returns:
        `difference`: largest difference of the last token's logits with every pattern written out, in standard deviations of the logits;
        `masked`: largest attention on a position that may not be read; `rows`: largest departure of a live row's sum from one (sinks excepted);
        `calls`, `layers`: attention calls and layers with attention.
    """
    plain = model.hf(**inputs, use_cache=False).logits[:, -1].float()
    seen = {"masked": 0.0, "rows": 0.0, "calls": 0.0}

    def handler(call: AttentionCall) -> Tensor:
        check_terms(call)
        dest = torch.arange(call.query.shape[2], device=call.query.device)
        scores, allowed = rows(call, dest)
        pattern = softmax(call, scores, allowed, dest)
        seen["calls"] += 1
        seen["masked"] = max(seen["masked"], float(pattern.masked_fill(allowed, 0.0).abs().max()))
        if not {"s_aux", "sinks"} & set(call.terms):
            live = allowed.any(-1).expand(pattern.shape[:3])
            seen["rows"] = max(seen["rows"], float((pattern.sum(-1) - 1).abs()[live].max()))
        return combine(call, pattern.to(call.query.dtype))

    handlers = {layer: handler for layer, part in enumerate(model.anatomy.layers) if part.attention is not None}
    with model.wired(inputs, handlers):
        hooked = model.hf(**inputs, use_cache=False).logits[:, -1].float()
    spread = float(plain.std()) or 1.0
    return {"difference": float((plain - hooked).abs().max()) / spread, "layers": float(len(handlers)), **seen}


def check_parity(model: HookedVLM) -> None:
    """Compare hooked and plain logits, masks and calls on one prompt.

    Raises:
        ParityError: with the numbers, and how to go on.
    """
    found = compare(model, check_inputs_for(model))
    limit = limit_of(model.hf)
    name = model.cfg.model_type
    advice = "Pass check=False to use the model all the same, compare with model.trace (nnsight), and report the family."
    if not found["difference"] <= limit:  # NaN fails too
        raise ParityError(
            f"hooked logits of {name} must equal the plain ones within {limit} of their spread; differ by {found['difference']:.2g}. {advice}"
        )
    if found["masked"] > 0 or found["rows"] > 1e-3:
        raise ParityError(
            f"attention of {name} must lie on readable positions and sum to one; off by {found['masked']:.2g} and {found['rows']:.2g}. {advice}"
        )
    if found["calls"] != found["layers"]:
        raise ParityError(
            f"{name} must call attention once per layer; {found['calls']:.0f} calls for {found['layers']:.0f} layers. {advice}"
        )
