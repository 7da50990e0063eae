"""The OV circuit of a head: does reading a token raise that token's own logit?

W_E W_V W_O W_U maps the token read to logits. Its eigenvalues (of a [vocab, vocab] matrix that never exists) are those of the [d_head, d_head] matrix W_O (W_U W_E) W_V:
AB and BA have the same non-zero eigenvalues. Positive eigenvalues mean that tokens raise themselves (or that a group of tokens raises its own mean).

What it cannot show: the circuit is read as if the head saw bare embeddings and wrote straight to the logits. A head in a late layer reads streams that earlier layers have
written to, so a head that copies what they wrote, or that copies pictures' tokens, may score at the null.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechicl.analysis.readout.norms import FrozenNorm
from mechicl.analysis.statistics import holm, permutation_p
from mechicl.errors import UnsupportedModelError
from mechicl.results import Copying, Head

CHUNK = 16_384
"""Tokens of the vocabulary at a time."""


def copying(
    model: Any,
    heads: Sequence[Head],
    *,
    tokens: Int[Tensor, " token"] | None = None,
    fold: bool = True,
    n_random: int = 200,
    n_others: int = 64,
    seed: int = 0,
) -> Copying:
    """The copying score of heads, with random matrices of their shape and other heads of the model beside it.

    Args:
        model: A hooked model with a token embedding.
        heads: Which.
        tokens: Only these tokens of the vocabulary; None: all.
        fold: Multiply the weights of the head's own norm and of the final norm into the matrices (their scales only stretch what passes, except that each token's own
            scale would weigh it; they are left out).
        n_random: Random matrices per layer: W_V and W_O with independent normal entries.
        n_others: At most so many other heads of the model.
        seed: Decides them.

    Raises:
        UnsupportedModelError: no token embedding, or no linear map to the logits.

    Source:
        Elhage et al. 2021 (summary statistic sum / sum of absolute values, here `ratio`); the share of positive mass: METHODS D.
    """
    circuit = _Circuit(model, tokens, fold)
    every = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads) if (layer, head) not in heads]
    generator = torch.Generator().manual_seed(seed)
    chosen = [every[int(i)] for i in torch.randperm(len(every), generator=generator)[:n_others]]
    values = [circuit.eigenvalues(*head) for head in heads]
    others = [positive_share(circuit.eigenvalues(*head)) for head in chosen if circuit.has(*head)]
    nulls = {layer: np.array(list(circuit.random(layer, n_random, generator))) for layer in sorted({layer for layer, _ in heads})}
    share = np.array([positive_share(v) for v in values])
    drawn = [nulls[layer] for layer, _ in heads]
    p = permutation_p(share, np.array([(one >= value).sum() for one, value in zip(drawn, share, strict=True)]), n_random)
    width = max(len(v) for v in values)
    return Copying(
        value=share, ratio=np.array([_ratio(v) for v in values]), null=np.array([one.mean() for one in drawn]),
        null_low=np.array([np.quantile(one, 0.025) for one in drawn]), null_high=np.array([np.quantile(one, 0.975) for one in drawn]), p=p,
        p_corrected=holm(p), others=np.array([value for value in others if not np.isnan(value)]), tokens=circuit.n_tokens,
        eigenvalues=np.stack([np.pad(v, (0, width - len(v))) for v in values]),
    )  # fmt: skip


def positive_share(eigenvalues: np.ndarray) -> float:
    """Share of the eigenvalues' absolute values whose real part is positive; NaN where all are zero."""
    size = np.abs(eigenvalues)
    return float(size[np.real(eigenvalues) > 0].sum() / size.sum()) if size.sum() else float("nan")


def _ratio(eigenvalues: np.ndarray) -> float:
    size = np.abs(eigenvalues).sum()
    return float(eigenvalues.sum().real / size) if size else float("nan")


class _Circuit:
    """W_E .. W_U of one model, reduced to what every head's small matrix needs."""

    def __init__(self, model: Any, tokens: Tensor | None, fold: bool) -> None:
        embed, unembed = getattr(model, "W_E", None), getattr(model, "W_U", None)
        if embed is None:
            raise UnsupportedModelError(
                "W_E must exist for a copying score; this model reads vectors, not tokens. Use the QK decomposition."
            )
        if unembed is None or getattr(model.cfg, "classifier", "linear") != "linear":
            raise UnsupportedModelError(
                "W_U must exist for a copying score; this model's logits are no linear function. Patch or ablate instead."
            )
        self.model, self.fold = model, fold
        n = min(embed.shape[0], unembed.shape[1])
        index = torch.arange(n) if tokens is None else tokens.unique()
        self.n_tokens, self.final = len(index), FrozenNorm(getattr(model, "ln_final", None), model.cfg.d_model, unembed, "the final norm")
        self.inner = torch.zeros(model.cfg.d_model, model.cfg.d_model, device=embed.device)
        with torch.no_grad():
            for part in index.to(embed.device).split(CHUNK):  # W_U W_E [d_model, d_model], a part of the vocabulary at a time
                self.inner += unembed.T[part].float().T @ embed[part].float()
            if fold:  # the final norm's weight and centring, on the side that the head writes to
                self.inner = self.final.centred(self.inner.T * (1.0 if self.final.weight is None else self.final.weight)).T
        self._layers: dict[int, Tensor] = {}

    def has(self, layer: int, head: int) -> bool:
        """Whether the head reads the sequence through one linear map."""
        return f"blocks.{layer}.attn.hook_z" in self.model.hook_dict and f"blocks.{layer}.attn.hook_v" in self.model.hook_dict

    def _between(self, layer: int) -> Float[Tensor, "d_model d_model"]:
        """The inner matrix with the layer's own norm folded in, on the side that the head reads."""
        if layer not in self._layers:
            block = self.model.blocks[layer]
            norm = FrozenNorm(getattr(block, "ln1", None), self.model.cfg.d_model, self.model.W_U, f"the norm of layer {layer}")
            inner = self.inner
            if self.fold and norm.weight is not None:
                inner = norm.centred(inner) * norm.weight
            self._layers = {layer: inner}  # one at a time: they are large
        return self._layers[layer]

    @torch.no_grad()
    def eigenvalues(self, layer: int, head: int) -> np.ndarray:
        """Of the head's circuit, largest first."""
        attn = self.model.blocks[layer].attn
        into, out = attn.W_V.detach().float(), attn.W_O.detach().float()
        group = out.shape[0] // into.shape[0]  # query heads share values in groups
        return _eigenvalues(out[head] @ self._between(layer) @ into[head // group])

    @torch.no_grad()
    def random(self, layer: int, n: int, generator: torch.Generator) -> Iterator[float]:
        """The positive share of random heads of this layer's shape."""
        attn, between = self.model.blocks[layer].attn, self._between(layer)
        for _ in range(n):
            out, into = torch.randn(attn.W_O.shape[1:], generator=generator), torch.randn(attn.W_V.shape[1:], generator=generator)
            yield positive_share(_eigenvalues(out.to(between.device) @ between @ into.to(between.device)))


def _eigenvalues(small: Tensor) -> np.ndarray:
    found = torch.linalg.eigvals(small.double().cpu()).numpy()
    found = found[np.argsort(-np.abs(found), kind="stable")]
    return np.where(
        np.abs(found) > 1e-9 * max(1e-30, float(np.abs(found).max(initial=0.0))), found, 0.0
    )  # rounding of exact zeros has no sign
