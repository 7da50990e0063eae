"""How a toy knows where a token is: RoPE (and the map that was once released in its place), ALiBi, one-hot places and their random start.

Every map is a function of tensors; `ToyAttention` calls them, the tests prove them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechicl.errors import OptionError

if TYPE_CHECKING:
    from mechicl.models.toys.config import ToyConfig


def rope_tables(
    n_places: int, d_head: int, theta: float = 1e4, *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "two n_places half"]:
    """Cosine and sine of place * theta^(-2i / d_head), i < d_head / 2, for places 0, 1, ...; computed in float64."""
    half = d_head // 2
    angle = torch.arange(n_places, dtype=torch.float64)[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    return torch.stack([angle.cos(), angle.sin()]).to(dtype)


def turn(x: Float[Tensor, "*any d_head"], cos: Tensor, sin: Tensor) -> Float[Tensor, "*any d_head"]:
    """RoPE: each pair (i, i + d_head / 2) turned by its angle. `cos`, `sin` broadcast against [..., d_head / 2]."""
    half = x.shape[-1] // 2
    return x * _twice(cos) + torch.cat([-x[..., half:], x[..., :half]], -1) * _twice(sin)


def turn_interleaved_bug(x: Float[Tensor, "*any d_head"], cos: Tensor, sin: Tensor) -> Float[Tensor, "*any d_head"]:
    """What the released code of Huang et al. 2026 does in place of RoPE; not a rotation, kept to compare with.

    RoPE is x cos + J x sin, where J turns each pair by 90 degrees and both coordinates of a pair have the same angle. There are two ways to lay out the
    pairs: neighbours (2i, 2i + 1), or halves (i, i + d_head / 2). Here cos and sin are laid out for halves, but J x is taken from neighbours, and its two
    parts are put into the halves: coordinate i < d_head / 2 becomes x_i cos_i - x_{2i+1} sin_i, and i + d_head / 2 becomes x_{i+d_head/2} cos_i + x_{2i} sin_i.
    Norms are not kept, and scores depend on both places, not on their offset alone (`offset_share`).
    """
    return x * _twice(cos) + torch.cat([-x[..., 1::2], x[..., 0::2]], -1) * _twice(sin)


def _twice(x: Tensor) -> Tensor:
    return torch.cat([x, x], -1)


def rotate(
    x: Float[Tensor, "batch pos head d_head"], place: Int[Tensor, "batch pos"], theta: float = 1e4
) -> Float[Tensor, "batch pos head d_head"]:
    """RoPE: each pair (i, i + d_head / 2) is turned by place * theta^(-2i / d_head), so that scores depend on the offset only."""
    return turn(x, *_at(place, x, theta))


def rotate_interleaved_bug(
    x: Float[Tensor, "batch pos head d_head"], place: Int[Tensor, "batch pos"], theta: float = 1e4
) -> Float[Tensor, "batch pos head d_head"]:
    """The released code's map at these places; see `turn_interleaved_bug`."""
    return turn_interleaved_bug(x, *_at(place, x, theta))


def _at(place: Tensor, x: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    half = x.shape[-1] // 2
    angle = place[:, :, None, None] * theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def alibi_slopes(n_heads: int) -> Float[Tensor, " head"]:
    """Penalty per position of distance for each head: 2^(-8 (h + 1) / n_heads) where n_heads is a power of two.

    Otherwise the slopes of the power of two below, and then every other one of the power of two above.

    Source:
        Press, Smith and Lewis 2022 (ALiBi).
    """
    below = 1 << (n_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (head + 1) / below) for head in range(below)]
    slopes += [2.0 ** (-8 * (2 * head + 1) / (2 * below)) for head in range(n_heads - below)]
    return torch.tensor(slopes)


def one_hot(place: Int[Tensor, "*batch pos"], n_places: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*batch pos n_places"]:
    """One in the coordinate of the place. (torch's one_hot looks at the values, which `vmap` cannot.)"""
    return (place[..., None] == torch.arange(n_places, device=place.device)).to(dtype)


def draw_places(cfg: ToyConfig, n: int, n_pos: int, generator: torch.Generator | None = None) -> Int[Tensor, "batch pos"] | None:
    """Places of n sequences in training: consecutive, from a start drawn uniformly; None where the model counts from zero (`cfg.random_start` is off).

    Give the result to `classify(..., position_ids=...)`. On the generator's device.

    Raises:
        OptionError: the sequence has more positions than there are places.
    """
    if not cfg.random_start:
        return None
    room = cfg.n_ctx - n_pos + 1
    if room < 1:
        raise OptionError(f"n_ctx must be at least the sequence's length {n_pos}; got {cfg.n_ctx}. Add places.")
    device = generator.device if generator is not None else None
    start = torch.randint(room, (n, 1), generator=generator, device=device)
    return start + torch.arange(n_pos, device=device)


def offset_share(scores: Float[Tensor, "pair dest src"]) -> float:
    """Share of the variance of scores q_dest . k_src that the offset dest - src does not explain, over the pairs that attention reads (src <= dest).

    Each entry is one fixed q and one fixed k put at every place. 0: the scores depend on the offset only (RoPE). The released code's map: 0.50 with random
    normal q and k, d_head 64, theta 1e4, from 17 to 64 places (0.46 with the pairs src > dest counted too).

    Source:
        METHODS A7.1 (0.49 there).
    """
    n = scores.shape[-1]
    dest, src = torch.tril_indices(n, n, device=scores.device)
    flat, offset = scores.double()[:, dest, src], dest - src
    means = torch.zeros(len(flat), n, dtype=flat.dtype, device=flat.device).index_add(1, offset, flat) / torch.bincount(offset)
    within, total = flat - means[:, offset], flat - flat.mean(1, keepdim=True)
    return float(within.pow(2).sum() / total.pow(2).sum())
