"""One head's queries and keys as linear functions of the stream, with the norms' scales and RoPE held as they were in one run."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechicl.analysis.readout.norms import FrozenNorm
from mechicl.analysis.readout.rotation import Rotation, recover
from mechicl.analysis.readout.written import Written
from mechicl.errors import UnsupportedModelError
from mechicl.models.stored import place
from mechicl.models.weights import AttentionWeights
from mechicl.results import Head


def attention_scale(model: Any, layer: int) -> float:
    """What q . k is multiplied by."""
    if hasattr(model.cfg, "score_scale"):
        return float(model.cfg.score_scale)
    part = model.anatomy.layers[layer]
    return float(getattr(part.attention, "scaling", part.d_head**-0.5))


class HeadReading:
    """One head's queries and keys as linear functions of the stream at given positions, norms and RoPE held as they were in one run.

    Args:
        model: A hooked model.
        head: (layer, head).
        written: What was kept at the positions, with `points` of this layer among it.
    """

    layer: int
    head: int
    model: Any
    written: Written
    group: int
    q: Tensor | None
    k: Tensor | None
    norm: FrozenNorm

    def __init__(self, model: Any, head: Head, written: Written) -> None:
        self.layer, self.head = head
        self.model, self.written = model, written
        attn = model.blocks[self.layer].attn
        self.group = attn.W_Q.shape[0] // attn.W_K.shape[0]
        kept = {name: written.kept.get(f"blocks.{self.layer}.attn.hook_{name}") for name in ("q", "k", "rot_q", "rot_k")}
        self.q, self.k = kept["q"], kept["k"]
        if self.q is None or self.k is None:
            raise UnsupportedModelError(f"layer {self.layer} must have queries and keys of the sequence; it has none that can be read.")
        self.rotation: Rotation | None = None
        if kept["rot_q"] is not None and kept["rot_k"] is not None:
            exact = model.cfg.dtype in (torch.float32, torch.float64)
            self.rotation = recover(torch.cat([self.q, self.k], 2), torch.cat([kept["rot_q"], kept["rot_k"]], 2), exact)
        self.norm = FrozenNorm(
            getattr(model.blocks[self.layer], "ln1", None), model.cfg.d_model, model.W_U, f"the norm of layer {self.layer}"
        )

    @staticmethod
    def points(model: Any, layer: int) -> list[str]:
        """Hook points that a reading of this layer needs."""
        return [
            f"blocks.{layer}.attn.hook_{name}"
            for name in ("q", "k", "rot_q", "rot_k")
            if f"blocks.{layer}.attn.hook_{name}" in model.hook_dict
        ]

    def turned(self, x: Float[Tensor, "batch n part d_head"]) -> Float[Tensor, "batch n part d_head"]:
        """After RoPE."""
        return x if self.rotation is None else self.rotation(x)

    def parts(self, kind: Literal["q", "k"]) -> tuple[list[str], Float[Tensor, "batch n part d_head"]]:
        """What each part of the stream gives to the query (or key) at every position, after RoPE; "biases" has what no stream gives."""
        attn = self.model.blocks[self.layer].attn
        index = self.head if kind == "q" else self.head // self.group
        weight = getattr(attn, f"W_{kind.upper()}").detach().float()
        factor, shift = self._after(kind, index)
        scale = self.norm.scale(self.written.stream(self.layer))[:, :, None]
        names, found = [], []
        for some, value in self.written.pieces(self.layer):
            names += some
            found.append(self.norm.linear(value) / scale @ weight[index] * factor[:, :, None])
        constant = shift + (0.0 if self.norm.shift is None else self.norm.shift @ weight[index])
        whole = torch.cat(found, 2)
        if bool((constant != 0).any()):
            given = (constant * factor).expand_as(whole[:, :, 0])
            if "biases" in names:
                whole[:, :, names.index("biases")] += given
            else:
                names, whole = [*names, "biases"], torch.cat([whole, given[:, :, None]], 2)
        return names, self.turned(whole)

    def whole(self, kind: Literal["q", "k"]) -> Float[Tensor, "batch n d_head"]:
        """The model's own query (or key), after RoPE."""
        own = self.q if kind == "q" else self.k
        assert own is not None
        index = self.head if kind == "q" else self.head // self.group
        return self.turned(own[:, :, index, None])[:, :, 0]

    def _after(self, kind: str, index: int) -> tuple[Tensor, Tensor]:
        """What a norm of queries or keys multiplies each coordinate by [batch, n, d_head] (ones without one), and the projection's bias [d_head]."""
        attn = self.model.blocks[self.layer].attn
        own = self.q if kind == "q" else self.k
        assert own is not None
        weight = getattr(attn, f"W_{kind.upper()}").detach().float()
        if not isinstance(attn, AttentionWeights):
            bias = getattr(attn, f"b_{kind.upper()}", None)
            return torch.ones_like(own[:, :, 0]), torch.zeros_like(weight[0, 0]) if bias is None else bias.detach().float()[index]
        bias = getattr(attn, f"b_{kind.upper()}").detach().float()
        projection = getattr(attn.part, kind)
        if isinstance(projection.module, torch.nn.Linear):
            return torch.ones_like(own[:, :, 0]), bias[index]
        plain = torch.einsum("bnm,hmd->bnhd", self.norm(self.written.stream(self.layer)), weight) + bias
        own_norm = FrozenHeadNorm(projection.module, plain, self.model.W_U.dtype)
        return own_norm.factor(plain)[:, :, index], bias[index]


class FrozenHeadNorm:
    """The norm of queries or keys as a factor for each coordinate; over each head's coordinates, or over all heads' together, as its weight says."""

    together: bool
    eps: float
    weight: Tensor

    def __init__(self, norm: Any, plain: Tensor, dtype: torch.dtype) -> None:
        weight = next(norm.parameters())
        self.together = weight.numel() == plain.shape[2] * plain.shape[3] != plain.shape[3]
        self.eps = next((v for name in ("eps", "variance_epsilon", "norm_eps") if isinstance(v := getattr(norm, name, None), float)), 1e-6)
        with torch.no_grad():
            self.weight = norm(torch.ones(weight.shape, dtype=weight.dtype, device=place(norm))).float() * (1 + self.eps) ** 0.5

    def factor(self, plain: Float[Tensor, "batch n head d_head"]) -> Float[Tensor, "batch n head d_head"]:
        """Weight over scale."""
        flat = plain.flatten(2) if self.together else plain
        out = self.weight / (flat.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        return out.unflatten(2, plain.shape[2:]) if self.together else out
