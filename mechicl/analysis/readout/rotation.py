"""RoPE as a linear map per position, recovered from one run: queries and keys before it and after it.

Whatever the family does to count positions (text, pictures in rows and columns, sections of the head's width), RoPE multiplies pairs of coordinates by a complex number of
the position, the same for every head. So these numbers follow from any head's vectors, and what was recovered is checked on all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from mechicl.errors import UnsupportedModelError

AGREE = 1e-3
"""Largest gap between what the recovered map gives and what the model computed, as a share of its size, in float32. Half precision: 0.05."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """A complex factor for each pair of coordinates at each position; coordinates from `turned` on stay as they are. `halves`: pairs are (i, i + turned / 2), else neighbours."""

    factor: Complex[Tensor, "batch n pair"]
    turned: int
    halves: bool

    def __call__(self, x: Float[Tensor, "batch n part d_head"]) -> Float[Tensor, "batch n part d_head"]:
        """Vectors at the positions, turned."""
        return _unpaired(_paired(x[..., : self.turned], self.halves) * self.factor[:, :, None], self.halves, x[..., self.turned :])


def _paired(x: Tensor, halves: bool) -> Tensor:
    """[..., d] -> complex [..., d / 2]."""
    a, b = (x.chunk(2, -1)) if halves else (x[..., ::2], x[..., 1::2])
    return torch.complex(a.contiguous(), b.contiguous())


def _unpaired(z: Tensor, halves: bool, rest: Tensor) -> Tensor:
    pair = (z.real, z.imag)
    return torch.cat([torch.cat(pair, -1) if halves else torch.stack(pair, -1).flatten(-2), rest], -1)


def recover(before: Float[Tensor, "batch n head d_head"], after: Float[Tensor, "batch n head d_head"], exact: bool = True) -> Rotation:
    """The map from vectors before RoPE to the same after it. Heads of queries and keys may stand together.

    Args:
        before: Every head's vectors at some positions.
        after: The same, after RoPE.
        exact: The model computes in float32.

    Raises:
        UnsupportedModelError: no pairing of coordinates explains it.
    """
    d = before.shape[-1]
    size = float(after.abs().max()) or 1.0
    gaps = []
    for turned in sorted({d, d // 2 * 2, d // 2, d // 4}, reverse=True):
        if turned < 2 or turned % 2:
            continue
        for halves in (True, False):
            x, y = (_paired(v[..., :turned].double(), halves) for v in (before, after))
            weight = x.abs().pow(2).sum(2)
            factor = torch.where(weight > 0, (x.conj() * y).sum(2) / weight.clamp_min(1e-300), torch.ones_like(weight) + 0j)
            found = Rotation(factor.to(torch.complex64), turned, halves)
            gap = float((found(before) - after).abs().max()) / size
            if gap <= (AGREE if exact else 0.05):
                return found
            gaps.append(gap)
    raise UnsupportedModelError(
        f"queries and keys must be turned in pairs of coordinates by their position (RoPE); on this model no pairing explains what happens to them (off by {min(gaps):.2g}). "
        "Its scores cannot be taken apart by sender: patch paths instead."
    )
