"""Norms: their scale, their normalised input and their weight, read off by trying them, whatever the family calls them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mechicl.models.hooked import HookPoint
from mechicl.models.stored import place


class Norm(nn.Module):
    """Hook points of one norm: `hook_scale` [batch, pos, 1] and `hook_normalized` [batch, pos, d_model] (before the norm's weight), to read.

    Calling it applies the model's own norm, so that TransformerLens' `apply_ln` and logit lens work. `centered`: the norm takes the mean away first
    (LayerNorm); else it divides by the root mean square.
    """

    hook_scale: HookPoint
    hook_normalized: HookPoint
    centered: bool

    def __init__(self, norm: nn.Module, eps: float) -> None:
        super().__init__()
        self.hook_scale, self.hook_normalized = HookPoint(), HookPoint()
        self._norm = (norm,)  # in a tuple, so that it does not become a child: it already is one of the Hugging Face model
        self.eps = eps
        self.centered = isinstance(norm, nn.LayerNorm) or ("layernorm" in type(norm).__name__.lower() and _takes_mean(norm))

    def forward(self, x: Tensor) -> Tensor:
        """The model's own norm."""
        return self._norm[0](x)

    def center(self, x: Tensor) -> Tensor:
        """The stream without its mean where the norm takes it away."""
        x = x.float()
        return x - x.mean(-1, keepdim=True) if self.centered else x

    def scale(self, x: Tensor) -> Tensor:
        """Root mean square, or standard deviation, [..., 1]."""
        return (self.center(x).pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    @property
    def w(self) -> Tensor:
        """The weight that multiplies the normalised stream [d_model], whatever the family calls it (Gemma keeps it as 1 + w)."""
        up, down, unit = self._answers()
        return (up - down) / 2 / unit

    @property
    def b(self) -> Tensor:
        """The bias added after the weight [d_model]; zeros where there is none."""
        up, down, _ = self._answers()
        return (up + down) / 2

    @torch.no_grad()
    def _answers(self) -> tuple[Tensor, Tensor, Tensor]:
        """The norm of +1, -1, +1 ... and of its opposite, and what the bare normalisation makes of it: it has no mean, so both kinds answer alike."""
        weight = next(self._norm[0].parameters())
        signs = torch.ones(weight.shape, dtype=weight.dtype, device=place(self._norm[0]))  # the weight itself may be offloaded
        signs[1::2] = -1
        return self._norm[0](signs).float(), self._norm[0](-signs).float(), self.center(signs) / self.scale(signs)


@torch.no_grad()
def _takes_mean(norm: nn.Module) -> bool:
    """Whether a constant added to the stream leaves the norm's output as it was."""
    weight = next(norm.parameters(), None)
    if weight is None or weight.dim() != 1:
        return False
    x = torch.linspace(-1, 1, weight.numel(), device=place(norm), dtype=weight.dtype)
    return bool((norm(x) - norm(x + 3)).abs().max() <= 1e-2 * norm(x).abs().max())


def eps_of(norm: nn.Module) -> float:
    """What the norm adds to the mean square."""
    for name in ("eps", "variance_epsilon", "norm_eps"):
        if isinstance(value := getattr(norm, name, None), float):
            return value
    return 1e-6
