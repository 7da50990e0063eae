"""The parts of a toy transformer, with TransformerLens' hook points and weight names: norm, attention, MLPs, block, classifier."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mechicl.models.hooked import HookPoint
from mechicl.models.toys.config import ToyConfig
from mechicl.models.toys.positions import turn, turn_interleaved_bug

EPSILON = 1e-5
"""What a norm adds to the mean square."""


@dataclass(frozen=True, eq=False)
class Setting:
    """What attention needs to know beside the stream, the same in every layer.

    Attributes:
        allowed: Which positions may be read, in all heads or in each.
        cos: RoPE's cosines of each position; None without RoPE.
        sin: Its sines.
        bias: ALiBi's penalties [batch or 1, head, dest, src]; None without ALiBi.
    """

    allowed: Bool[Tensor, "#batch #head dest src"]
    cos: Float[Tensor, "#batch pos one half"] | None = None
    sin: Float[Tensor, "#batch pos one half"] | None = None
    bias: Float[Tensor, "#batch head dest src"] | None = None


class ToyNorm(nn.Module):
    """RMS or layer norm with TransformerLens' two hook points."""

    centred: bool
    w: nn.Parameter
    hook_scale: HookPoint
    hook_normalized: HookPoint
    b: nn.Parameter

    def __init__(self, d_model: int, kind: str | None = "RMS") -> None:
        super().__init__()
        self.centred = kind == "LN"
        self.w = nn.Parameter(torch.ones(d_model))
        if self.centred:
            self.b = nn.Parameter(torch.zeros(d_model))
        self.hook_scale, self.hook_normalized = HookPoint(), HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        scale = self.hook_scale((x.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt())
        x = x / scale * self.w
        return self.hook_normalized(x + self.b if self.centred else x)


class ToyAttention(nn.Module):
    """Causal attention. Weights in TransformerLens' shapes: W_Q, W_K, W_V [head, d_model, d_head], W_O [head, d_head, d_model], b_Q ... [head, d_head]."""

    hook_q: HookPoint
    hook_k: HookPoint
    hook_v: HookPoint
    hook_z: HookPoint
    hook_attn_scores: HookPoint
    hook_pattern: HookPoint
    b_Q: nn.Parameter
    b_K: nn.Parameter
    b_V: nn.Parameter
    hook_rot_q: HookPoint
    hook_rot_k: HookPoint

    W_O: Tensor

    def __init__(self, cfg: ToyConfig) -> None:
        super().__init__()
        self.cfg = cfg
        shape = (cfg.n_heads, cfg.d_model, cfg.d_head)
        self.W_Q, self.W_K, self.W_V = (nn.Parameter(torch.zeros(shape)) for _ in range(3))
        if cfg.qkv_bias:
            self.b_Q, self.b_K, self.b_V = (nn.Parameter(torch.zeros(cfg.n_heads, cfg.d_head)) for _ in range(3))
        out = torch.zeros(cfg.n_heads, cfg.d_head, cfg.d_model)
        if cfg.output_projection:
            self.W_O = nn.Parameter(out)
        else:  # head h owns the coordinates [h * d_head, (h + 1) * d_head)
            self.register_buffer("W_O", torch.eye(cfg.d_model).reshape(cfg.n_heads, cfg.d_head, cfg.d_model))
        self.hook_q, self.hook_k, self.hook_v, self.hook_z = HookPoint(), HookPoint(), HookPoint(), HookPoint()
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()
        if cfg.rotary:
            self.hook_rot_q, self.hook_rot_k = HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"], at: Setting) -> tuple[Tensor, Tensor]:
        """Output [batch, pos, d_model] and the pattern [batch, head, dest, src]."""
        q, k, v = self.hook_q(self.project(x, "Q")), self.hook_k(self.project(x, "K")), self.hook_v(self.project(x, "V"))
        z, pattern = self.attend(q, k, v, at)
        return torch.einsum("bqhd,hdm->bqm", z, self.W_O), pattern

    def attend(
        self, q: Float[Tensor, "batch pos head d_head"], k: Float[Tensor, "batch pos head d_head"], v: Tensor, at: Setting
    ) -> tuple[Tensor, Tensor]:
        """The heads' outputs z [batch, pos, head, d_head] and the pattern, from queries and keys before RoPE."""
        if self.cfg.rotary:
            q, k = self.hook_rot_q(self.turn(q, at)), self.hook_rot_k(self.turn(k, at))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.cfg.score_scale
        if at.bias is not None:
            scores = scores + at.bias
        scores = self.hook_attn_scores(scores.masked_fill(~at.allowed, -math.inf))
        pattern = self.hook_pattern(scores.softmax(-1))
        return self.hook_z(torch.einsum("bhqk,bkhd->bqhd", pattern, v)), pattern

    def project(self, x: Tensor, letter: str) -> Float[Tensor, "batch n head d_head"]:
        """x through W_Q, W_K or W_V, with its bias where there is one."""
        weight: Tensor = getattr(self, f"W_{letter}")
        out = (x @ weight.transpose(0, 1).flatten(1)).unflatten(-1, weight.shape[::2])
        return out + getattr(self, f"b_{letter}") if self.cfg.qkv_bias else out

    def turn(self, x: Tensor, at: Setting) -> Tensor:
        """Queries or keys turned to their places."""
        assert at.cos is not None
        assert at.sin is not None
        how = turn_interleaved_bug if self.cfg.positions == "rope_interleaved_bug" else turn
        return how(x, at.cos, at.sin)


class ToyMLP(nn.Module):
    """Two matrices with a SiLU between them ("silu"); with biases and a GELU ("gelu"); or two ways in, one gating the other.

    "swiglu": W_out(SiLU(x W_gate) * (x W_in)), no biases. "product": W_out(SiLU((x W_gate + b_gate) * (x W_in + b_in))) + b_out, the part that Huang et al.
    2026 call SwiGLU and train.
    """

    W_in: nn.Parameter
    W_out: nn.Parameter
    hook_pre: HookPoint
    hook_post: HookPoint
    W_gate: nn.Parameter
    hook_pre_linear: HookPoint
    b_in: nn.Parameter
    b_out: nn.Parameter
    b_gate: nn.Parameter

    def __init__(self, cfg: ToyConfig) -> None:
        super().__init__()
        assert cfg.d_mlp is not None
        self.kind, wide = cfg.mlp, cfg.d_mlp
        self.W_in, self.W_out = nn.Parameter(torch.zeros(cfg.d_model, wide)), nn.Parameter(torch.zeros(wide, cfg.d_model))
        if self.kind in ("swiglu", "product"):
            self.W_gate, self.hook_pre_linear = nn.Parameter(torch.zeros(cfg.d_model, wide)), HookPoint()
        if self.kind in ("gelu", "product"):
            self.b_in, self.b_out = nn.Parameter(torch.zeros(wide)), nn.Parameter(torch.zeros(cfg.d_model))
        if self.kind == "product":
            self.b_gate = nn.Parameter(torch.zeros(wide))
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        act = nn.functional.silu
        if self.kind == "silu":
            return self.hook_post(act(self.hook_pre(x @ self.W_in))) @ self.W_out
        if self.kind == "gelu":
            return self.hook_post(nn.functional.gelu(self.hook_pre(x @ self.W_in + self.b_in))) @ self.W_out + self.b_out
        if self.kind == "swiglu":
            return self.hook_post(act(self.hook_pre(x @ self.W_gate)) * self.hook_pre_linear(x @ self.W_in)) @ self.W_out
        gate, value = self.hook_pre(x @ self.W_gate + self.b_gate), self.hook_pre_linear(x @ self.W_in + self.b_in)
        return self.hook_post(act(gate * value)) @ self.W_out + self.b_out


class ToyBlock(nn.Module):
    """Attention, then (where there is one) the MLP, each added to the stream."""

    attn: ToyAttention
    hook_resid_pre: HookPoint
    hook_attn_out: HookPoint
    hook_resid_post: HookPoint
    ln1: ToyNorm | None
    mlp: ToyMLP | None
    hook_resid_mid: HookPoint
    hook_mlp_out: HookPoint
    ln2: ToyNorm | None

    def __init__(self, cfg: ToyConfig) -> None:
        super().__init__()
        self.attn = ToyAttention(cfg)
        self.hook_resid_pre, self.hook_attn_out, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()
        self.ln1 = ToyNorm(cfg.d_model, cfg.norm) if cfg.norm else None
        self.mlp = ToyMLP(cfg) if cfg.mlp is not None else None
        if self.mlp is not None:
            self.hook_resid_mid, self.hook_mlp_out = HookPoint(), HookPoint()
            self.ln2 = ToyNorm(cfg.d_model, cfg.norm) if cfg.norm else None

    def forward(self, x: Tensor, at: Setting) -> tuple[Tensor, Tensor]:
        x = self.hook_resid_pre(x)
        out, pattern = self.attn(x if self.ln1 is None else self.ln1(x), at)
        x = x + self.hook_attn_out(out)
        if self.mlp is not None:
            x = self.hook_resid_mid(x)
            x = x + self.hook_mlp_out(self.mlp(x if self.ln2 is None else self.ln2(x)))
        return self.hook_resid_post(x), pattern


class ToyClassifier(nn.Module):
    """From the stream to the logits through three hidden layers of ReLUs and W_U (Reddy 2024)."""

    def __init__(self, cfg: ToyConfig) -> None:
        super().__init__()
        wide = cfg.d_classifier
        for k in (1, 2, 3):
            setattr(self, f"W_{k}", nn.Parameter(torch.zeros(cfg.d_model if k == 1 else wide, wide)))
            setattr(self, f"b_{k}", nn.Parameter(torch.zeros(wide)))
            setattr(self, f"hook_post_{k}", HookPoint())
        self.W_U = nn.Parameter(torch.zeros(wide, cfg.d_vocab))

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        for k in (1, 2, 3):
            x = getattr(self, f"hook_post_{k}")(torch.relu(x @ getattr(self, f"W_{k}") + getattr(self, f"b_{k}")))
        return x @ self.W_U
