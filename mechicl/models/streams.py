"""Pieces of a decoder called by themselves, differentiable: what a head adds to the stream, what a layer would read from another stream.

Attribution, circuits and resumed runs evaluate single parts of a model on streams that no forward pass has made. A piece of a production model is only
used after it has reproduced, on a prompt, what the model's own forward pass put through the same place; a family that puts something else there is
refused with the reason. No hook point fires here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechicl.errors import OptionError, UnsupportedModelError
from mechicl.models.anatomy import LayerAnatomy, Projection
from mechicl.models.check import check_inputs_for, tolerance
from mechicl.models.recording import Recording, decoder_layers, record_pass
from mechicl.models.toys import fast as toy_fast
from mechicl.models.toys.model import ToyTransformer
from mechicl.models.weights import linear_of

Kind = Literal["q", "k", "v"]
Piece = Literal["q", "k", "v", "heads", "mlp", "unembed"]

_REASONS: WeakKeyDictionary[nn.Module, Pieces] = WeakKeyDictionary()


class Pieces:
    """What has been found out about a production model: which pieces cannot be called, and what follows the unembedding."""

    def __init__(self) -> None:
        self.reasons: dict[tuple[int, Piece], str] = {}
        self.cap: float | None = None
        self.scale: float = 1.0


def head_outputs(model: Any, layer: int, z: Float[Tensor, "*batch pos head d_head"]) -> Float[Tensor, "*batch pos head d_model"]:
    """Each head's summand of the residual stream (the output projection's bias left out).

    Args:
        model: A toy or a hooked production model.
        layer: Its layer.
        z: What the heads hand to the output projection, as at `hook_z`.

    Raises:
        UnsupportedModelError: the family puts a norm, a gate or a scale between the heads and the stream.
    """
    _able(model, layer, "heads")
    return torch.einsum("...hd,hdm->...hm", z, model.blocks[layer].attn.W_O.to(z.dtype))


def read(model: Any, layer: int, kind: Kind | str, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos head d_head"]:
    """Queries, keys or values before RoPE: what `hook_q`, `hook_k`, `hook_v` would hold if the layer read this stream.

    The layer's own norm and norms of queries and keys are included; keys and values have one entry per key/value head.

    Raises:
        OptionError: another kind.
        UnsupportedModelError: the layer has no such projection of the stream (keys and values of cross-attention read pictures).
    """
    if kind not in ("q", "k", "v"):
        raise OptionError(f'kind must be "q", "k" or "v"; got {kind!r}. Choose what the layer is to compute.')
    _able(model, layer, kind)
    if isinstance(model, ToyTransformer):
        block = model.blocks[layer]
        return block.attn.project(_toy_norm(block.ln1, stream), kind.upper())  # type: ignore[union-attr, operator]
    part: LayerAnatomy = model.anatomy.layers[layer]
    normed = stream if part.ln1 is None else part.ln1(stream)
    return _project(part, kind, normed)


def mlp(model: Any, layer: int, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
    """What the MLP would add to the stream (`hook_mlp_out`) if it read this one (as `hook_resid_mid`); zeros where the layer has none.

    Raises:
        UnsupportedModelError: the family gates or scales the MLP's output.
    """
    if not has_mlp(model, layer):
        return torch.zeros_like(stream)
    _able(model, layer, "mlp")
    if isinstance(model, ToyTransformer):
        block = model.blocks[layer]
        return toy_fast.feed(block.mlp, block.ln2, stream)  # type: ignore[union-attr, arg-type]
    return run_mlp(model.anatomy.layers[layer], stream)


def unembed(model: Any, stream: Float[Tensor, "batch n d_model"]) -> Float[Tensor, "batch n vocab"]:
    """Logits of a final stream: final norm, unembedding, and soft-capping or scaling where the family has it.

    Raises:
        UnsupportedModelError: the family does something else between stream and logits.
    """
    if isinstance(model, ToyTransformer):
        stream = _toy_norm(model.ln_final, stream)
        if model.cfg.classifier == "linear":
            return stream @ model.W_U
        part = model.classifier
        for k in (1, 2, 3):
            stream = torch.relu(stream @ getattr(part, f"W_{k}") + getattr(part, f"b_{k}"))
        return stream @ part.W_U
    _able(model, model.cfg.n_layers, "unembed")
    return finish(model, run_head(model, stream))


def has_mlp(model: Any, layer: int) -> bool:
    """Whether the layer has an MLP (or mixture of experts) after attention."""
    _check_layer(model, layer, model.cfg.n_layers)
    if isinstance(model, ToyTransformer):
        return model.blocks[layer].mlp is not None
    part: LayerAnatomy = model.anatomy.layers[layer]
    return part.mlp_out is not None or "hook_mlp_out" in part.reasons


def finish(model: Any, logits: Tensor) -> Tensor:
    """What the family does to the unembedding's output: nothing, soft-capping, or a scale."""
    pieces = _pieces(model)
    if pieces.cap is not None:
        return torch.tanh(logits / pieces.cap) * pieces.cap
    return logits if pieces.scale == 1.0 else logits * pieces.scale


def why_not(model: Any, layer: int, piece: Piece) -> str:
    """Why a piece of a model cannot be called by itself; "" where it can."""
    return "" if isinstance(model, ToyTransformer) else _pieces(model).reasons.get((layer, piece), "")


def _able(model: Any, layer: int, piece: Any) -> None:
    _check_layer(model, layer, model.cfg.n_layers + (piece == "unembed"))
    if reason := why_not(model, layer, piece):
        what = {"heads": "heads' outputs", "mlp": "MLP", "unembed": "unembedding"}.get(piece, piece)
        raise UnsupportedModelError(f"{what} of layer {layer} of {model.cfg.model_type} must be callable by itself; {reason}.")


def _check_layer(model: Any, layer: int, n: int) -> None:
    if not 0 <= layer < n:
        raise OptionError(f"layer must be in 0..{n - 1}; got {layer}. Layers count from 0.")


def _toy_norm(norm: Any, x: Tensor) -> Tensor:
    """A toy's norm without its hook points."""
    if norm is None:
        return x
    x = toy_fast.normed(norm, x) * norm.w
    return x + norm.b if norm.centred else x


def _project(part: LayerAnatomy, kind: str, normed: Tensor) -> Tensor:
    linear, n_heads, d_head = linear_of(part, kind)
    projection: Projection = getattr(part, kind)
    out = linear(normed)
    if projection.module is linear:
        return projection.split(out)
    if projection.layout == "flat":  # a norm over all heads at once
        return projection.split(projection.module(out))
    return projection.module(out.unflatten(-1, (n_heads, d_head)))  # over each head's own coordinates, whatever the layout


def run_mlp(part: LayerAnatomy, stream: Tensor) -> Tensor:
    """What the layer's MLP adds to the stream, by the model's own modules, unchecked."""
    assert part.ln2 is not None
    assert part.mlp_out is not None
    inner = part.ln2(stream)
    if part.mlp is not None and part.mlp is not part.mlp_out:
        inner = _first(part.mlp(inner))
    return _first(part.mlp_out(inner))


def _first(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else x[0]


def run_head(model: Any, stream: Tensor) -> Tensor:
    """The final norm and the unembedding, unchecked and without what `finish` adds."""
    norm = model.anatomy.final_norm
    return model.anatomy.unembed(stream if norm is None else norm(stream))


def _pieces(model: Any) -> Pieces:
    found = _REASONS.get(model)
    if found is None:
        found = _REASONS[model] = _examine(model)
    return found


@torch.no_grad()
def _examine(model: Any) -> Pieces:
    """Every piece against the model's own forward pass on one prompt."""
    inputs, seen = check_inputs_for(model), {}

    def run() -> None:
        seen["logits"] = model.hf(**inputs, use_cache=False).logits

    recording = record_pass(model.hf, decoder_layers(model.hf), run, list(model.anatomy.configs))
    pieces, limit = Pieces(), tolerance(model.hf.dtype)
    for layer, part in enumerate(model.anatomy.layers):
        for piece, check in (("q", _check_read), ("k", _check_read), ("v", _check_read), ("heads", _check_heads), ("mlp", _check_mlp)):
            if reason := check(model, layer, part, piece, recording, limit):
                pieces.reasons[layer, piece] = reason  # type: ignore[index]
    _check_end(model, recording, seen["logits"], pieces, limit)
    return pieces


def _differs(given: Callable[[], Tensor], expected: Tensor | None, limit: float, what: str) -> str:
    """Why what was computed is not what the model computed; "" if it is."""
    if expected is None:
        return f"{what} was not reached by the prompt that pieces are checked on"
    try:
        value = given()
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
        return f"{what} cannot be called by itself ({type(error).__name__})"
    if value.shape != expected.shape:
        return f"{what} has another shape when called by itself"
    off = float((value.float() - expected.float()).abs().max()) / (float(expected.float().std()) or 1.0)
    return "" if off <= limit else f"{what} called by itself differs from the model's own by {off:.2g} of its spread"


def _check_read(model: Any, layer: int, part: LayerAnatomy, piece: Any, recording: Recording, limit: float) -> str:
    projection: Projection | None = getattr(part, piece)
    if projection is None:
        return part.reasons.get(f"attn.hook_{piece}", "the layer has no softmax attention")
    if part.cross and piece != "q":
        return "its keys and values are read from pictures, not from the stream"
    entered, out = recording.inputs.get(id(part.block)), recording.outputs.get(id(projection.module))
    if entered is None or out is None:
        return "the layer was not reached by the prompt that pieces are checked on"

    def again() -> Tensor:
        return _project(part, piece, entered if part.ln1 is None else part.ln1(entered))

    return _differs(again, projection.split(out), limit, piece)


def _check_heads(model: Any, layer: int, part: LayerAnatomy, piece: Any, recording: Recording, limit: float) -> str:
    if part.attention is None or part.o_proj is None:
        return part.reasons.get("attn.hook_z", "the layer has no softmax attention")
    if not part.additive:
        return "a norm, a gate or a scale stands between its heads and the stream"
    entered, out = recording.inputs.get(id(part.o_proj)), recording.outputs.get(id(part.o_proj))
    attn = model.blocks[layer].attn

    def again() -> Tensor:
        assert entered is not None
        return torch.einsum("bphd,hdm->bpm", entered.unflatten(-1, (part.n_heads, part.d_value)), attn.W_O) + attn.b_O

    return _differs(again, out, limit, "the sum of the heads")


def _check_mlp(model: Any, layer: int, part: LayerAnatomy, piece: Any, recording: Recording, limit: float) -> str:
    if part.mlp_out is None or part.ln2 is None:
        return part.reasons.get("hook_mlp_out", "the layer has no MLP")
    entered = recording.inputs.get(id(part.ln2))
    if entered is None:
        return "the layer was not reached by the prompt that pieces are checked on"
    return _differs(lambda: run_mlp(part, entered), recording.outputs.get(id(part.mlp_out)), limit, "the MLP")


def _check_end(model: Any, recording: Recording, logits: Tensor, pieces: Pieces, limit: float) -> None:
    """Find what follows the unembedding, and hold norm and unembedding against the model's logits."""
    last = model.cfg.n_layers
    final = recording.outputs.get(id(model.anatomy.layers[-1].block))
    raw = recording.outputs.get(id(model.anatomy.unembed))
    if final is None or raw is None or raw.shape != logits.shape:
        pieces.reasons[last, "unembed"] = "its last layer's output does not go straight to the unembedding"
        return
    cap = getattr(model.hf.config.get_text_config(), "final_logit_softcapping", None)
    if _differs(lambda: raw, logits, limit, "it"):
        if isinstance(cap, float | int) and not _differs(lambda: torch.tanh(raw / cap) * cap, logits, limit, "it"):
            pieces.cap = float(cap)
        else:
            pieces.scale = float((raw.double() * logits.double()).sum() / raw.double().pow(2).sum())

    def again() -> Tensor:
        out = run_head(model, final)
        return torch.tanh(out / pieces.cap) * pieces.cap if pieces.cap is not None else out * pieces.scale

    if reason := _differs(again, logits, limit, "the unembedding"):
        pieces.reasons[last, "unembed"] = reason
