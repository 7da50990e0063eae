"""A toy's weights: how they start, and under TransformerLens' names over all layers, with what its cache asks of a model."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechicl.errors import OptionError, UnsupportedModelError
from mechicl.models.toys.config import ToyConfig


def initialise(model: nn.Module, cfg: ToyConfig, seed: int, sharpness: float) -> None:
    """Initial weights of the decoder, as `cfg.init` says. Norms start as ones and zeros, biases of queries, keys and values as zeros.

    "fan_in": matrices normal with variance 1 / inputs (queries and keys `sharpness` times as large), biases zero; embeddings of token ids, and places
    beside them, standard normal; places beside vectors as long as the vectors, 1. "huang2026": standard deviation 0.02 for attention, embeddings and W_U, and
    torch's default (uniform within 1 / sqrt(inputs), biases too) for MLPs and the MLP classifier. "reddy2024": normal; variance 1 / d_input for attention,
    2 / inputs for MLPs and the classifier's hidden layers (biases 1 / inputs), 1 / inputs for W_U.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            last = name.split(".")[-1]
            if last in ("w", "b", "b_Q", "b_K", "b_V") or name.startswith(("encoder.", "projector.")):
                continue
            if cfg.init == "huang2026" and (".mlp." in name or name.startswith("classifier.")):
                bound = _fan_in(model, name) ** -0.5
                parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * bound)
            elif cfg.init == "huang2026":
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
            elif cfg.init == "reddy2024":
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * _reddy(model, name, cfg) ** 0.5)
            elif parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * _spread(name, parameter, cfg, sharpness))


def _spread(name: str, parameter: Tensor, cfg: ToyConfig, sharpness: float) -> float:
    if name == "W_E" or (name == "W_pos" and cfg.inputs == "tokens"):
        return 1.0
    if name == "W_pos":
        return cfg.d_model**-0.5
    return (sharpness if name.endswith(("W_Q", "W_K")) else 1.0) * parameter.shape[-2] ** -0.5


def _reddy(model: nn.Module, name: str, cfg: ToyConfig) -> float:
    """Variance of a parameter."""
    if ".attn." in name or name in ("W_E", "W_pos"):
        return 1 / (cfg.d_input or cfg.d_model)
    hidden = not name.endswith("W_U") and name.rpartition(".")[2].startswith("W_")
    return (2 if hidden else 1) / _fan_in(model, name)


def _fan_in(model: nn.Module, name: str) -> int:
    """Inputs of the matrix that a weight or bias belongs to (b_in is W_in's)."""
    parent, _, last = name.rpartition(".")
    return int(getattr(model.get_submodule(parent), f"W_{last[2:]}").shape[0])


class ToyWeights:
    """Mixin of `ToyTransformer`: weights of all layers, and the methods that TransformerLens' `ActivationCache` calls on a model."""

    cfg: Any
    blocks: Any
    ln_final: Any

    def _initialise(self, seed: int, sharpness: float) -> None:
        initialise(cast(nn.Module, self), self.cfg, seed, sharpness)

    def _stack(self, name: str) -> Tensor:
        return torch.stack([getattr(block.attn, name) for block in self.blocks])

    W_Q = property(lambda self: self._stack("W_Q"), doc="[layer, head, d_model, d_head], a copy")
    W_K = property(lambda self: self._stack("W_K"), doc="[layer, head, d_model, d_head], a copy")
    W_V = property(lambda self: self._stack("W_V"), doc="[layer, head, d_model, d_head], a copy")
    W_O = property(lambda self: self._stack("W_O"), doc="[layer, head, d_head, d_model], a copy")

    def to_tokens(self, text: str, prepend_bos: bool = False) -> Int[Tensor, "one pos"]:
        """Token ids of words separated by spaces (labels, for a toy over vectors). There is no first token to put before them.

        Raises:
            OptionError: a label that the model does not have.
        """
        if self.cfg.inputs == "vectors":
            return torch.tensor([[self.to_single_token(word) for word in text.split()]])
        return torch.tensor([self.renderer.vocabulary.encode(text)])  # type: ignore[attr-defined]

    def to_single_token(self, text: str) -> int:
        """The label "l3" of a toy over vectors, or the one word of `text`, as a number.

        Raises:
            OptionError: it is not one word, or the model has no renderer that knows words.
        """
        if self.cfg.inputs == "vectors":
            if not (text[:1] == "l" and text[1:].isdecimal() and int(text[1:]) < self.cfg.d_vocab):
                raise OptionError(f"text must be a label l0..l{self.cfg.d_vocab - 1}; got {text!r}. Name one of them.")
            return int(text[1:])
        ids = self.renderer.vocabulary.encode(text)  # type: ignore[attr-defined]
        if len(ids) != 1:
            raise OptionError(f"text must be a single token; {text!r} takes {len(ids)}. Choose one word.")
        return ids[0]

    def tokens_to_residual_directions(self, tokens: str | int | Int[Tensor, "*batch"]) -> Float[Tensor, "*batch d_model"]:
        """Directions of the stream, after division by the final norm's scale, that raise these tokens' (labels') logits.

        The final norm's weight is included, so that `cache.logit_attrs` adds up to the logits (LayerNorm: up to its bias).

        Raises:
            UnsupportedModelError: the logits are no linear function of the stream.
        """
        if self.cfg.classifier != "linear":
            raise UnsupportedModelError(
                f'classifier must be "linear" for logit directions; got {self.cfg.classifier!r}. Patch or ablate instead.'
            )
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        weight: Tensor = self.W_U  # type: ignore[attr-defined]
        directions = weight.T[torch.as_tensor(tokens, device=weight.device)]
        return directions if self.ln_final is None else directions * self.ln_final.w

    def accumulated_bias(self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True) -> Float[Tensor, " d_model"]:
        """Sum of the biases added to the stream before `layer`: attention has none, MLPs may."""
        total = self.blocks[0].attn.W_Q.new_zeros(self.cfg.d_model)
        for block in list(self.blocks)[:layer] if include_mlp_biases else ():
            total = total + getattr(block.mlp, "b_out", 0.0)
        return total
