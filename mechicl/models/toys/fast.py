"""A toy's forward pass for training: the numbers of the hooked pass at the last position, for about half the work.

What is saved, and why the result is the same up to rounding:

* Norm weights are folded into the matrices that read the normed stream, (x' w) W = x' (w W). Then x' of the first layer needs no gradient.
* Only the last position of the last layer is read. Its output sum_j p_j (W_V x_j) is W_V (sum_j p_j x_j), since the p_j do not depend on W_V and sum to
  one (so that a bias of the values is added once): values are projected once, not once for every position.
* Without RoPE its scores q . (W_K x_j) are (W_K^T q) . x_j: keys are never formed.
* RoPE is one complex product: with the columns of W_Q and W_K in the order 0, d/2, 1, d/2 + 1, ... the coordinates of a pair are neighbours, and a score
  is a sum over pairs, whatever their order.

There are no hook points here; `ToyTransformer.forward` has them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mechicl.models.toys.parts import EPSILON, Setting, ToyAttention, ToyBlock, ToyMLP, ToyNorm
from mechicl.models.toys.positions import turn_interleaved_bug


def block(part: ToyBlock, x: Float[Tensor, "batch pos d_model"], at: Setting) -> Float[Tensor, "batch pos d_model"]:
    """The stream after a block."""
    x = x + _attend(part.attn, part.ln1, x, at)
    return x if part.mlp is None else x + feed(part.mlp, part.ln2, x)


def last_block(part: ToyBlock, x: Float[Tensor, "batch pos d_model"], at: Setting) -> Float[Tensor, "batch d_model"]:
    """The stream after a block, at the last position."""
    end = x[:, -1] + _attend_from_the_last(part.attn, part.ln1, x, at)
    return end if part.mlp is None else end + feed(part.mlp, part.ln2, end)


def normed(norm: ToyNorm | None, x: Tensor) -> Tensor:
    """x after the norm, before its weights."""
    if norm is None:
        return x
    if norm.centred:
        return functional.layer_norm(x, x.shape[-1:], eps=EPSILON)
    return x * (x.pow(2).mean(-1, keepdim=True) + EPSILON).rsqrt()


def _folded(norm: ToyNorm | None, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """A matrix [d_model, n] (and bias) that reads the normed stream, with the norm's weights in it."""
    if norm is None:
        return weight, bias
    if norm.centred:
        shift = norm.b @ weight
        bias = shift if bias is None else bias + shift
    return norm.w[:, None] * weight, bias


def _linear(norm: ToyNorm | None, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    weight, bias = _folded(norm, weight, bias)
    return functional.linear(x, weight.t(), bias)


def _matrix(attn: ToyAttention, letter: str) -> tuple[Tensor, Tensor | None]:
    """W_Q, W_K or W_V of all heads as [d_model, head * d_head] with its bias; columns in pairs where RoPE wants them."""
    weight: Tensor = getattr(attn, f"W_{letter}")
    bias: Tensor | None = getattr(attn, f"b_{letter}") if attn.cfg.qkv_bias else None
    if letter != "V" and attn.cfg.rotary and attn.cfg.positions != "rope_interleaved_bug":
        weight, bias = _paired(weight), None if bias is None else _paired(bias)
    return weight.transpose(0, 1).flatten(1), None if bias is None else bias.flatten()


def _paired(x: Float[Tensor, "*any d_head"]) -> Float[Tensor, "*any d_head"]:
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def _heads(attn: ToyAttention, norm: ToyNorm | None, x: Tensor, letter: str, at: Setting) -> Float[Tensor, "batch n head d_head"]:
    """Queries, keys or values of the normed stream [batch, n, d_model] (the last n positions), turned."""
    out = _linear(norm, x, *_matrix(attn, letter)).unflatten(-1, (attn.cfg.n_heads, -1))
    if letter == "V" or at.cos is None or at.sin is None:
        return out
    cos, sin = at.cos[:, -x.shape[1] :], at.sin[:, -x.shape[1] :]
    if attn.cfg.positions == "rope_interleaved_bug":
        return turn_interleaved_bug(out, cos, sin)
    return torch.view_as_real(torch.view_as_complex(out.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)).flatten(-2)


def _attend(attn: ToyAttention, norm: ToyNorm | None, x: Tensor, at: Setting) -> Float[Tensor, "batch pos d_model"]:
    x = normed(norm, x)
    q, k, v = (_heads(attn, norm, x, letter, at).transpose(1, 2) for letter in "QKV")
    scores = q @ k.transpose(-1, -2) * attn.cfg.score_scale  # not torch's fused attention: it has no rule for vmap
    if at.bias is not None:
        scores = scores + at.bias
    z = scores.masked_fill(~at.allowed, -torch.inf).softmax(-1) @ v
    return _out(attn, z.transpose(1, 2).flatten(2))


def _attend_from_the_last(attn: ToyAttention, norm: ToyNorm | None, x: Tensor, at: Setting) -> Float[Tensor, "batch d_model"]:
    x = normed(norm, x)
    q = _heads(attn, norm, x[:, -1:], "Q", at)  # [batch, 1, head, d_head]
    if attn.cfg.rotary:
        scores = (q * _heads(attn, norm, x, "K", at)).sum(-1).transpose(1, 2)  # [batch, head, src]
    else:
        weight = attn.W_K if norm is None else norm.w[:, None] * attn.W_K
        asked = torch.einsum("bhd,hmd->bhm", q[:, 0], weight)
        scores = (asked[:, :, None] * x[:, None]).sum(-1)
        if attn.cfg.qkv_bias:  # the same for every position: softmax takes it away, but the bias keeps a gradient (of zero)
            scores = scores + (q[:, 0] * attn.b_K).sum(-1, keepdim=True)
    scores = scores * attn.cfg.score_scale
    if at.bias is not None:
        scores = scores + at.bias[:, :, -1]
    read = (scores.softmax(-1)[..., None] * x[:, None]).sum(2)  # [batch, head, d_model]
    weight, bias = attn.W_V, attn.b_V if attn.cfg.qkv_bias else None
    if norm is not None:
        if norm.centred:
            shift = norm.b @ weight
            bias = shift if bias is None else bias + shift
        weight = norm.w[:, None] * weight
    z = torch.einsum("bhm,hmd->bhd", read, weight)
    return _out(attn, (z if bias is None else z + bias).flatten(1))


def _out(attn: ToyAttention, z: Float[Tensor, "*batch heads"]) -> Float[Tensor, "*batch d_model"]:
    return z @ attn.W_O.flatten(0, 1) if attn.cfg.output_projection else z


def feed(mlp: ToyMLP, norm: ToyNorm | None, x: Tensor) -> Tensor:
    """What the MLP adds to x."""
    x = normed(norm, x)
    if mlp.kind == "silu":
        return functional.silu(_linear(norm, x, mlp.W_in)) @ mlp.W_out
    if mlp.kind == "gelu":
        return functional.linear(functional.gelu(_linear(norm, x, mlp.W_in, mlp.b_in)), mlp.W_out.t(), mlp.b_out)
    if mlp.kind == "swiglu":
        return (functional.silu(_linear(norm, x, mlp.W_gate)) * _linear(norm, x, mlp.W_in)) @ mlp.W_out
    product = _linear(norm, x, mlp.W_gate, mlp.b_gate) * _linear(norm, x, mlp.W_in, mlp.b_in)
    return functional.linear(functional.silu(product), mlp.W_out.t(), mlp.b_out)
