"""Encoders of the toy's second modality and the projector that makes token vectors of their features.

Each encoder reads values [m, *in_shape] and gives features [m, d_feat]; `classify` is its head for training it alone. None has batch norm or dropout: the
result for one value does not depend on the others, and many encoders can run at once under `torch.func.vmap`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mechicl.errors import OptionError
from mechicl.models.hooked import HookPoint

EncoderKind = Literal["mlp", "cnn", "transformer", "vit"]
EncoderInit = Literal["huang2026", "torch"]

CHANNELS = (16, 32, 48, 96)


class Encoder(nn.Module):
    """A body that gives features, and a linear classifier on top of them.

    Attributes:
        in_shape: Shape of one value.
        d_feat: Width of the features.
        hook_features: The features [m, d_feat].
    """

    in_shape: tuple[int, ...]
    d_feat: int
    n_classes: int
    body: nn.Module
    head: nn.Linear
    hook_features: HookPoint

    def __init__(self, body: nn.Module, in_shape: Sequence[int], d_feat: int, n_classes: int) -> None:
        super().__init__()
        self.in_shape, self.d_feat, self.n_classes = tuple(in_shape), d_feat, n_classes
        self.body, self.head, self.hook_features = body, nn.Linear(d_feat, n_classes), HookPoint()

    def forward(self, values: Float[Tensor, "m ..."]) -> Float[Tensor, "m d_feat"]:
        """Features.

        Raises:
            OptionError: values of another shape.
        """
        if tuple(values.shape[1:]) != self.in_shape:
            raise OptionError(
                f"values must have the shape [m, {', '.join(map(str, self.in_shape))}]; got {list(values.shape)}. Build the encoder for them."
            )
        return self.hook_features(self.body(values))

    def classify(self, values: Float[Tensor, "m ..."]) -> Float[Tensor, "m n_classes"]:
        """Logits of the encoder's own classes."""
        return self.head(self(values))


def build_encoder(
    kind: EncoderKind | str,
    in_shape: Sequence[int],
    d_out: int,
    n_classes: int,
    *,
    d_feat: int | None = None,
    depth: int = 2,
    n_heads: int = 1,
    patch: int | None = None,
    init: EncoderInit | str | None = None,
    seed: int | None = None,
) -> Encoder:
    """An encoder of the second modality.

    "mlp": in -> d_out -> d_feat, a ReLU after each; pictures are laid flat. "cnn": up to five times convolution of width 3, group norm, ReLU, halving (16, 32,
    48, 96, d_feat channels), in 1-D over vectors and in 2-D over pictures, then the maximum over places. "transformer": a vector cut into segments;
    "vit": a picture cut into patches; each with a class token, learned places and `depth` pre-norm blocks; the class token's output.

    Args:
        kind: Which.
        in_shape: Shape of one value: (width,) or (channels, height, width).
        d_out: Width of the tokens that the projector makes of the features; it only sets the defaults here.
        n_classes: Classes of the encoder's own classifier (K2).
        d_feat: Width of the features; None: half of `d_out`, for the ViT all of it.
        depth: Blocks of the transformer and the ViT.
        n_heads: Their heads.
        patch: Width of a segment, side of a patch; None: the largest divisor of the input up to 128, or up to a seventh of the picture's side.
        init: "huang2026": weights normal with standard deviation 0.02, biases zero; "torch": torch's default. None: "torch" for the CNN, else "huang2026".
        seed: Decides the initial weights; None: torch's global generator does, as for any module of torch.

    Raises:
        OptionError: there is no such kind, or the shape does not fit it.

    Source:
        Huang et al. 2026 (D2 -> D1 -> D1/2 -> K2 with ReLUs; a 1-D CNN; a small transformer; a ViT). Differs: group for batch norm, no dropout, pre-norm blocks.
    """
    if kind not in get_args(EncoderKind):
        raise OptionError(f"kind must be one of {', '.join(get_args(EncoderKind))}; got {kind!r}. Choose one.")
    shape = tuple(int(size) for size in in_shape)
    if len(shape) not in (1, 3) or min(shape) < 1 or (kind == "vit" and len(shape) != 3):
        wanted = "(channels, height, width)" if kind == "vit" else "(width,) or (channels, height, width)"
        raise OptionError(f"in_shape must be {wanted} for {kind!r}; got {shape}. Choose an encoder that reads these values.")
    if init not in (*get_args(EncoderInit), None):
        raise OptionError(f"init must be one of {', '.join(get_args(EncoderInit))}; got {init!r}. Choose one.")
    width = d_feat or (d_out if kind == "vit" else max(1, d_out // 2))
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        if kind == "mlp":
            body: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), d_out), nn.ReLU(), nn.Linear(d_out, width), nn.ReLU())
        elif kind == "cnn":
            body = ConvBody(shape, width)
        else:
            body = PatchBody(shape if kind == "vit" else (math.prod(shape),), width, depth=depth, n_heads=n_heads, patch=patch)
        encoder = Encoder(body, shape, width, n_classes)
        if (init or ("torch" if kind == "cnn" else "huang2026")) == "huang2026":
            encoder.apply(_small)
    return encoder


def _small(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Projector(nn.Module):
    """W_2 GELU(W_1 x), without biases: from an encoder's features to token vectors.

    Args:
        d_feat: Width of the features.
        d_out: Width of the tokens.
        init: "huang2026": normal with standard deviation 0.02; "torch": torch's default.
        seed: Decides the initial weights; None: torch's global generator does.

    Source:
        Huang et al. 2026.
    """

    fc1: nn.Linear
    fc2: nn.Linear

    def __init__(self, d_feat: int, d_out: int, *, init: EncoderInit = "huang2026", seed: int | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.fc1, self.fc2 = nn.Linear(d_feat, d_out, bias=False), nn.Linear(d_out, d_out, bias=False)
            if init == "huang2026":
                self.apply(_small)

    def forward(self, features: Float[Tensor, "m d_feat"]) -> Float[Tensor, "m d_out"]:
        return self.fc2(functional.gelu(self.fc1(features)))


class ConvBody(nn.Module):
    """Convolutions of width 3 that halve the place axes while they can, and the maximum over what places are left."""

    flat: bool
    convs: nn.ModuleList
    norms: nn.ModuleList

    def __init__(self, shape: tuple[int, ...], d_feat: int) -> None:
        super().__init__()
        self.flat = len(shape) == 1
        conv: type[nn.Module] = nn.Conv1d if self.flat else nn.Conv2d
        n_stages = min(len(CHANNELS), max(0, int(math.log2(min(shape[-2:]))) - 1))
        channels = (1 if self.flat else shape[0], *CHANNELS[:n_stages], d_feat)
        self.convs = nn.ModuleList(conv(a, b, 3, padding=1) for a, b in itertools.pairwise(channels))
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(8, b), b) for b in channels[1:])

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None] if self.flat else x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = torch.relu(norm(conv(x)))
            if i < len(self.convs) - 1:
                x = functional.max_pool1d(x, 2) if self.flat else functional.max_pool2d(x, 2)
        return x.flatten(2).amax(-1)


class PatchBody(nn.Module):
    """Segments of a vector or patches of a picture through a small transformer; the class token's output."""

    patch: int
    embed: nn.Linear
    token: nn.Parameter
    places: nn.Parameter
    blocks: nn.ModuleList
    norm: nn.LayerNorm

    def __init__(self, shape: tuple[int, ...], width: int, *, depth: int, n_heads: int, patch: int | None) -> None:
        super().__init__()
        if width % n_heads:
            raise OptionError(f"n_heads must divide the features' width {width}; got {n_heads}. Change d_feat or n_heads.")
        side = math.gcd(*shape[-2:]) if len(shape) == 3 else shape[0]
        most = max(1, min(shape[-2:]) // 7) if len(shape) == 3 else 128
        self.patch = patch or max(size for size in range(1, most + 1) if side % size == 0)
        if any(size % self.patch for size in shape[-2:]):
            raise OptionError(f"patch must divide the input's sides {shape[-2:]}; got {self.patch}. Choose a divisor.")
        n_patches = math.prod(size // self.patch for size in shape[-2:])
        self.embed = nn.Linear(self.patch if len(shape) == 1 else shape[0] * self.patch**2, width)
        self.token, self.places = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.randn(1, n_patches + 1, width))
        self.blocks = nn.ModuleList(PatchBlock(width, n_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(self._cut(x))
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])

    def _cut(self, x: Tensor) -> Float[Tensor, "m n_patches d_patch"]:
        p = self.patch
        if x.dim() == 4:
            m, c, height, wide = x.shape
            return x.reshape(m, c, height // p, p, wide // p, p).permute(0, 2, 4, 1, 3, 5).reshape(m, -1, c * p * p)
        return x.flatten(1).unflatten(1, (-1, p))


class PatchBlock(nn.Module):
    """Pre-norm attention over all patches and an MLP of four times the width."""

    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    qkv: nn.Linear
    out: nn.Linear
    up: nn.Linear
    down: nn.Linear
    hook_pattern: HookPoint

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.hook_pattern = HookPoint()

    def forward(self, x: Float[Tensor, "m n width"]) -> Float[Tensor, "m n width"]:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        pattern = self.hook_pattern((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1))
        x = x + self.out((pattern @ v).transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))
