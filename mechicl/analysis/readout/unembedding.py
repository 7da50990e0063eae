"""From the stream to logits, by the model's own final norm and unembedding, for the tokens that are asked for: [positions x vocabulary] never exists at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechicl.analysis.readout.norms import FrozenNorm
from mechicl.errors import UnsupportedModelError

AGREE = 1e-3
"""Largest difference between logits made here and the model's own, as a share of their spread, in float32. Half precision: 0.05."""

CHUNK_BYTES = 1 << 27
"""Memory for one chunk of logits over the whole vocabulary."""


class Unembedding:
    """The last steps of a model as functions of the stream, in float32.

    Args:
        model: A hooked model.

    Raises:
        UnsupportedModelError: the logits are not the final norm's output times a matrix (an MLP classifier, another norm).
    """

    model: Any
    cap: float | None
    norm: FrozenNorm

    def __init__(self, model: Any) -> None:
        cfg = model.cfg
        if getattr(cfg, "classifier", "linear") != "linear":
            raise UnsupportedModelError(
                f'logits must be a linear function of the normed stream; this model ends in an "{cfg.classifier}" classifier. Patch or ablate instead.'
            )
        self.model, self.cap = model, soft_cap(model)
        self.W_U: Tensor = model.W_U.detach()  # a view, in the model's dtype
        self.b_U: Tensor | None = getattr(model, "b_U", None)
        self._whole: Tensor | None = None
        self.norm = FrozenNorm(getattr(model, "ln_final", None), cfg.d_model, self.W_U, "the final norm")

    def columns(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch d_model"]:
        """Columns of the unembedding, without the norm's weight."""
        return self.W_U.T[tokens.to(self.W_U.device)].float()

    def bias(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """The unembedding's own bias of these tokens."""
        if self.b_U is None:
            return torch.zeros(tokens.shape, device=self.W_U.device)
        return self.b_U.detach().float()[tokens.to(self.W_U.device)]

    def directions(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch d_model"]:
        """Directions of the stream that raise these tokens' logits, the norm's weight and centring included; its scale is still to be divided by."""
        found = self.columns(tokens)
        return found if self.norm.weight is None else self.norm.centred(found * self.norm.weight)

    def constants(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """The part of the logits that no stream changes: the norm's and the unembedding's biases."""
        shifted = 0.0 if self.norm.shift is None else self.columns(tokens) @ self.norm.shift
        return self.bias(tokens) + shifted

    def logits(self, stream: Float[Tensor, "batch n d_model"], tokens: Int[Tensor, "batch label"]) -> Float[Tensor, "batch n label"]:
        """Logits of each prompt's own tokens, before any soft-capping."""
        return torch.einsum("bnm,blm->bnl", self.norm(stream), self.columns(tokens)) + self.bias(tokens)[:, None]

    def capped(self, logits: Tensor) -> Tensor:
        """As the model gives them."""
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def every(self, stream: Float[Tensor, "n d_model"]) -> Iterator[tuple[slice, Float[Tensor, "chunk vocab"]]]:
        """Logits over the whole vocabulary as the model gives them, a bounded number of positions at a time."""
        if self._whole is None:  # one float32 copy, where the model is in half precision
            self._whole = self.W_U.float()
        weight = self._whole
        size = max(1, CHUNK_BYTES // (4 * weight.shape[1]))
        for start in range(0, len(stream), size):
            part = slice(start, min(start + size, len(stream)))
            out = self.norm(stream[part]) @ weight
            yield part, self.capped(out if self.b_U is None else out + self.b_U.detach().float())

    def check(self, stream: Float[Tensor, "batch d_model"], logits: Float[Tensor, "batch vocab"]) -> float:
        """Hold the logits made here against the model's own, on 64 tokens.

        Returns:
            The largest difference.

        Raises:
            UnsupportedModelError: they differ: the model does more to its logits than norm, matrix and soft-cap.
        """
        tokens = torch.linspace(0, logits.shape[-1] - 1, min(64, logits.shape[-1])).long().expand(len(stream), -1)
        mine = self.capped(self.logits(stream[:, None], tokens)[:, 0])
        theirs = logits.float().gather(1, tokens.to(logits.device))
        gap = float((mine - theirs).abs().max())
        spread = float(theirs.std()) or 1.0
        if gap > spread * (AGREE if logits.dtype in (torch.float32, torch.float64) else 0.05) + 1e-5:
            raise UnsupportedModelError(
                f"logits must be norm, matrix and soft-cap of the stream; on this model they differ by {gap:.2g} (spread {spread:.2g}). "
                "It scales or shifts its logits otherwise: use ablation or patching."
            )
        return gap


def soft_cap(model: Any) -> float | None:
    """What the model's logits are soft-capped at; None where they are not."""
    hf = getattr(model, "hf", None)
    cap = getattr(hf.config.get_text_config(), "final_logit_softcapping", None) if hf is not None else None
    return float(cap) if cap else None


def first_tokens(ids: Sequence[Sequence[Sequence[int]]]) -> tuple[Int[Tensor, "batch label"], Tensor]:
    """First tokens of each prompt's candidates, and which entries are real."""
    width = max(len(row) for row in ids)
    tokens, known = torch.zeros(len(ids), width, dtype=torch.long), torch.zeros(len(ids), width, dtype=torch.bool)
    for i, row in enumerate(ids):
        tokens[i, : len(row)], known[i, : len(row)] = torch.tensor([one[0] for one in row]), True
    return tokens, known
