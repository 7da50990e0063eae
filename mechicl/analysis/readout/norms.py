"""Norms as linear maps: with its scale held at the value of one stream, a norm acts on each summand of the stream alone."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechicl.errors import UnsupportedModelError
from mechicl.models.toys.parts import EPSILON, ToyNorm


class FrozenNorm:
    """A norm of the stream in float32: x -> (x, centred for LayerNorm) / scale * weight + shift.

    Args:
        norm: A toy's norm, the hook points of a production model's, or None where there is none.
        d_model: The stream's width.
        like: A tensor on the norm's device and in its dtype.
        name: What to call it in errors.

    Raises:
        UnsupportedModelError: it is neither a root-mean-square norm nor a toy's LayerNorm.
    """

    centre: bool

    def __init__(self, norm: Any, d_model: int, like: Tensor, name: str) -> None:
        self.weight: Tensor | None = None if norm is None else norm.w.detach().float()
        self.centre = isinstance(norm, ToyNorm) and norm.centred
        self.shift: Tensor | None = norm.b.detach().float() if isinstance(norm, ToyNorm) and norm.centred else None
        self.eps: float = getattr(norm, "eps", EPSILON)
        if norm is None:
            return
        probe = torch.linspace(-1, 2, d_model, device=like.device)[None, None]
        with torch.no_grad():
            theirs = norm(probe.to(like.dtype)).float()
        if not torch.allclose(
            self(probe), theirs, atol=1e-4 if like.dtype == torch.float32 else 0.05, rtol=1e-4 if like.dtype == torch.float32 else 0.02
        ):
            kind = type(getattr(norm, "_norm", (norm,))[0]).__name__
            raise UnsupportedModelError(f"{name} must be a root-mean-square norm; {kind} is another. Use model.trace (nnsight).")

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The norm itself."""
        if self.weight is None:
            return x
        out = self.linear(x) / self.scale(x)
        return out if self.shift is None else out + self.shift

    def centred(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Without its mean, where the norm takes it away. The map is a symmetric projection: it may stand on either side of a product."""
        return x - x.mean(-1, keepdim=True) if self.centre else x

    def scale(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch one"]:
        """What the norm divides by; ones where there is none."""
        if self.weight is None:
            return torch.ones_like(x[..., :1])
        return (self.centred(x).pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def linear(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """All but the division and the shift."""
        return x if self.weight is None else self.centred(x) * self.weight
