"""Toy transformers behind the interface of the big ones: same hook names, same batches.

`ToyTransformer` is a small decoder with TransformerLens' hook points in its forward pass. `mechicl.models.planted` sets its weights by hand;
`mechicl.models.toy_prompts` has its words and prompts.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechicl.errors import OptionError
from mechicl.models.hooked import Hooked, HookedConfig, HookPoint, RowReducer
from mechicl.models.toy_prompts import ToyRenderer
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode

Positions = Literal["none", "learned", "rope"]


@dataclass(frozen=True)
class ToyConfig(HookedConfig):
    """Sizes of a `ToyTransformer`, under TransformerLens' names.

    `positions`: nothing, an embedding added to the tokens (rows of W_pos), or RoPE on queries and keys. `output_projection`: without it the heads'
    outputs are laid side by side into the stream (n_heads * d_head must be d_model). `norm`: an RMS norm before each part and before the logits.
    """

    positions: Positions = "learned"
    output_projection: bool = True
    norm: bool = False
    rope_theta: float = 1e4


def toy_config(
    *,
    n_layers: int = 2,
    n_heads: int = 2,
    d_model: int = 64,
    d_head: int = 16,
    d_vocab: int = 66,
    n_ctx: int = 64,
    d_mlp: int | None = None,
    positions: Positions = "learned",
    output_projection: bool = True,
    norm: bool = False,
    name: str = "toy",
) -> ToyConfig:
    """A `ToyConfig`, checked. `d_mlp=None` is an attention-only transformer.

    Raises:
        OptionError: sizes that do not fit together.
    """
    if not output_projection and n_heads * d_head != d_model:
        raise OptionError(
            f"n_heads * d_head must equal d_model without an output projection; got {n_heads} * {d_head} and {d_model}. Change one."
        )
    if positions == "rope" and d_head % 2:
        raise OptionError(f"d_head must be even for RoPE; got {d_head}. Add one.")
    return ToyConfig(
        model_name=name, model_type="toy", n_layers=n_layers, n_heads=n_heads, n_key_value_heads=n_heads, d_model=d_model, d_head=d_head,
        d_vocab=d_vocab, n_ctx=n_ctx, d_mlp=d_mlp, normalization_type="RMS" if norm else None, final_rms=norm, attn_only=d_mlp is None,
        positions=positions, output_projection=output_projection, norm=norm,
    )  # fmt: skip


class ToyNorm(nn.Module):
    """RMS norm with TransformerLens' two hook points."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(d_model))
        self.hook_scale, self.hook_normalized = HookPoint(), HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.hook_scale((x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt())
        return self.hook_normalized(x / scale * self.w)


class ToyAttention(nn.Module):
    """Causal attention. Weights in TransformerLens' shapes: W_Q, W_K, W_V [head, d_model, d_head], W_O [head, d_head, d_model]."""

    W_O: Tensor

    def __init__(self, cfg: ToyConfig) -> None:
        super().__init__()
        self.cfg = cfg
        shape = (cfg.n_heads, cfg.d_model, cfg.d_head)
        self.W_Q, self.W_K, self.W_V = (nn.Parameter(torch.zeros(shape)) for _ in range(3))
        out = torch.zeros(cfg.n_heads, cfg.d_head, cfg.d_model)
        if cfg.output_projection:
            self.W_O = nn.Parameter(out)
        else:  # head h owns the coordinates [h * d_head, (h + 1) * d_head)
            self.register_buffer("W_O", torch.eye(cfg.d_model).reshape(cfg.n_heads, cfg.d_head, cfg.d_model))
        self.hook_q, self.hook_k, self.hook_v, self.hook_z = HookPoint(), HookPoint(), HookPoint(), HookPoint()
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()
        if cfg.positions == "rope":
            self.hook_rot_q, self.hook_rot_k = HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"], allowed: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Output [batch, pos, d_model] and the pattern [batch, head, dest, src]. `allowed` [batch, 1, dest, src], `place` [batch, pos]."""
        q = self.hook_q(torch.einsum("bpm,hmd->bphd", x, self.W_Q))
        k = self.hook_k(torch.einsum("bpm,hmd->bphd", x, self.W_K))
        v = self.hook_v(torch.einsum("bpm,hmd->bphd", x, self.W_V))
        if self.cfg.positions == "rope":
            q, k = self.hook_rot_q(rotate(q, place, self.cfg.rope_theta)), self.hook_rot_k(rotate(k, place, self.cfg.rope_theta))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(self.cfg.d_head)
        scores = self.hook_attn_scores(scores.masked_fill(~allowed, -math.inf))
        pattern = self.hook_pattern(scores.softmax(-1))
        z = self.hook_z(torch.einsum("bhqk,bkhd->bqhd", pattern, v))
        return torch.einsum("bqhd,hdm->bqm", z, self.W_O), pattern


def rotate(
    x: Float[Tensor, "batch pos head d_head"], place: Int[Tensor, "batch pos"], theta: float = 1e4
) -> Float[Tensor, "batch pos head d_head"]:
    """RoPE: each pair (i, i + d_head / 2) is turned by place * theta^(-2i / d_head), so that scores depend on the offset only."""
    half = x.shape[-1] // 2
    angle = place[:, :, None, None] * theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).to(x.dtype)


class ToyMLP(nn.Module):
    """Two matrices with a SiLU between them."""

    def __init__(self, cfg: ToyConfig) -> None:
        super().__init__()
        assert cfg.d_mlp is not None
        self.W_in, self.W_out = nn.Parameter(torch.zeros(cfg.d_model, cfg.d_mlp)), nn.Parameter(torch.zeros(cfg.d_mlp, cfg.d_model))
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        return self.hook_post(nn.functional.silu(self.hook_pre(x @ self.W_in))) @ self.W_out


class ToyBlock(nn.Module):
    """Attention, then (where there is one) the MLP, each added to the stream."""

    def __init__(self, cfg: ToyConfig) -> None:
        super().__init__()
        self.attn = ToyAttention(cfg)
        self.hook_resid_pre, self.hook_attn_out, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()
        self.ln1 = ToyNorm(cfg.d_model) if cfg.norm else None
        self.mlp = ToyMLP(cfg) if cfg.d_mlp is not None else None
        if self.mlp is not None:
            self.hook_resid_mid, self.hook_mlp_out = HookPoint(), HookPoint()
            self.ln2 = ToyNorm(cfg.d_model) if cfg.norm else None

    def forward(self, x: Tensor, allowed: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        x = self.hook_resid_pre(x)
        out, pattern = self.attn(x if self.ln1 is None else self.ln1(x), allowed, place)
        x = x + self.hook_attn_out(out)
        if self.mlp is not None:
            x = self.hook_resid_mid(x)
            x = x + self.hook_mlp_out(self.mlp(x if self.ln2 is None else self.ln2(x)))
        return self.hook_resid_post(x), pattern


class ToyTransformer(Hooked):
    """A small causal transformer with the surface of `HookedVLM`: what takes one takes the other.

    Args:
        cfg: Sizes, from `toy_config`.
        renderer: Turns episodes into batches; needed for `render` only.
        seed: Decides the initial weights, normal with variance 1 / d_model (queries and keys `sharpness` times as large).
        sharpness: How peaked the attention is: about 1 bit of contrast at the default; larger values give patterns like a trained model's.
    """

    def __init__(self, cfg: ToyConfig, renderer: ToyRenderer | None = None, *, seed: int = 0, sharpness: float = 0.7) -> None:
        super().__init__()
        self.cfg, self.seed, self._renderer = cfg, seed, renderer
        self.W_E, self.W_U = nn.Parameter(torch.zeros(cfg.d_vocab, cfg.d_model)), nn.Parameter(torch.zeros(cfg.d_model, cfg.d_vocab))
        self.hook_embed = HookPoint()
        if cfg.positions == "learned":
            self.W_pos, self.hook_pos_embed = nn.Parameter(torch.zeros(cfg.n_ctx, cfg.d_model)), HookPoint()
        self.blocks = nn.ModuleList(ToyBlock(cfg) for _ in range(cfg.n_layers))
        self.ln_final = ToyNorm(cfg.d_model) if cfg.norm else None
        self._initialise(seed, sharpness)
        self.setup()

    def _initialise(self, seed: int, sharpness: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith(".w"):
                    continue
                gain = sharpness if name.endswith(("W_Q", "W_K")) else 1.0
                std = 1.0 if name in ("W_E", "W_pos") else gain / math.sqrt(parameter.shape[-2])
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def forward(self, batch: Batch | Mapping[str, Any] | Tensor, *, positions: Any = "last") -> Float[Tensor, "batch n vocab"]:
        """Logits at the asked positions: "last" (n = 1), "all", or a LongTensor [n] or [batch, n]."""
        stream, _ = self._run(batch)
        if isinstance(positions, str):
            if positions not in ("last", "all"):
                raise OptionError(
                    f'positions must be "last", "all" or a tensor of positions; got {positions!r}. Ask for the ones you read.'
                )
            where = self._last(batch) if positions == "last" else None
        else:
            where = self._checked(batch, positions)
        if where is not None:
            stream = _take(stream, where)
        if self.ln_final is not None:
            stream = self.ln_final(stream)
        return stream @ self.W_U

    def _run(self, batch: Batch | Mapping[str, Any] | Tensor, keep: Any = None) -> tuple[Tensor, list[Any]]:
        """The stream after the last block, and for each layer what `keep(layer, pattern)` returned."""
        ids, mask = self._tokens(batch)
        n_pos = ids.shape[1]
        place = (mask.long().cumsum(1) - 1).clamp_min(0)
        if int(place.max()) >= self.cfg.n_ctx:
            raise OptionError(f"prompts must have at most n_ctx = {self.cfg.n_ctx} tokens; got {int(place.max()) + 1}. Use fewer shots.")
        causal = torch.ones(n_pos, n_pos, dtype=torch.bool, device=ids.device).tril()
        # a padded position reads itself, so that its row stays a number
        allowed = (causal & mask[:, None, :].bool() | torch.eye(n_pos, dtype=torch.bool, device=ids.device))[:, None]
        stream = self.hook_embed(self.W_E[ids])
        if self.cfg.positions == "learned":
            stream = stream + self.hook_pos_embed(self.W_pos[place])
        kept = []
        for layer, block in enumerate(self.blocks):
            stream, pattern = block(stream, allowed, place)
            kept.append(None if keep is None else keep(layer, pattern))
        return stream, kept

    def _tokens(self, batch: Batch | Mapping[str, Any] | Tensor) -> tuple[Tensor, Tensor]:
        given: Any = batch if isinstance(batch, Tensor) else (batch.inputs if isinstance(batch, Batch) else batch)["input_ids"]
        mask = None if isinstance(batch, Tensor) else (batch.inputs if isinstance(batch, Batch) else batch).get("attention_mask")
        ids = given.to(self.W_E.device)
        return ids, torch.ones_like(ids) if mask is None else mask.to(ids.device)

    def _last(self, batch: Batch | Mapping[str, Any] | Tensor) -> Tensor:
        if isinstance(batch, Batch):
            return batch.query_pos.to(self.W_E.device)[:, None]
        _, mask = self._tokens(batch)
        return (mask.shape[1] - 1 - mask.flip(1).argmax(1))[:, None]

    def _checked(self, batch: Any, positions: Any) -> Tensor:
        n_pos = self._tokens(batch)[0].shape[1]
        where = torch.as_tensor(positions, device=self.W_E.device)
        if where.numel() == 0 or int(where.max()) >= n_pos or int(where.min()) < -n_pos:
            raise OptionError(f"positions must be in 0..{n_pos - 1} (or negative, from the end); got {positions}. Count padding too.")
        return where % n_pos

    @torch.no_grad()
    def attention_rows(
        self, batch: Batch | Mapping[str, Any], dest: Any = "last", *, layers: Sequence[int] | None = None, reduce: RowReducer | None = None
    ) -> list[Any]:
        """Attention of the asked positions, [batch, head, n_dest, src] for each layer (None for layers not asked for).

        With `reduce(layer, positions, rows)`, each layer's entry is the list of what it returned. Same contract as `HookedVLM.attention_rows`.
        """
        where = self._last(batch) if isinstance(dest, str) else self._checked(batch, dest)
        wanted = set(range(self.cfg.n_layers) if layers is None else [int(layer) for layer in layers])
        if not wanted <= set(range(self.cfg.n_layers)):
            raise OptionError(f"layers must be in 0..{self.cfg.n_layers - 1}; got {sorted(wanted)}. Layers count from 0.")

        def keep(layer: int, pattern: Tensor) -> Any:
            if layer not in wanted:
                return None
            rows = _take(pattern.transpose(1, 2), where).transpose(1, 2)
            return rows if reduce is None else [reduce(layer, where, rows)]

        return self._run(batch, keep)[1]

    @property
    def renderer(self) -> ToyRenderer:
        """Turns episodes into batches.

        Raises:
            OptionError: the model was built without one.
        """
        if self._renderer is None:
            raise OptionError("renderer must be given to render episodes; got None. Build ToyTransformer(cfg, ToyRenderer(vocabulary)).")
        return self._renderer

    def render(self, episodes: Sequence[Episode]) -> Batch:
        """Episodes as a left-padded batch with exact spans."""
        return self.renderer.render(episodes)

    def describe(self) -> dict[str, Any]:
        """What `results.Provenance` needs to name this model."""
        versions = {p: importlib.metadata.version(p) for p in ("torch", "transformer-lens")}
        dtype, device = str(self.W_E.dtype).removeprefix("torch."), str(self.W_E.device)
        return {
            "model": self.cfg.model_name,
            "revision": f"seed {self.seed}",
            "dtype": dtype,
            "attention": "toy",
            "device": device,
            "versions": versions,
        }


def _take(x: Tensor, where: Tensor) -> Tensor:
    """Positions [n] or [batch, n] of x [batch, pos, ...]."""
    if where.dim() == 1:
        return x.index_select(1, where)
    index = where.reshape(*where.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)
