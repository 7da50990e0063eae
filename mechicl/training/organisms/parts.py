"""What the families share: sizes, and weights that are alive."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast, ProcessorMixin

Preset = Literal["tiny", "demo"]


@dataclass(frozen=True)
class Size:
    """How large an organism is: counts and widths, and in pixels `patch` and `image`, the side of a picture where the family fixes it."""

    n_layers: int
    d_model: int
    n_heads: int
    n_key_value_heads: int
    d_mlp: int
    vision_layers: int
    vision_width: int
    vision_heads: int
    vision_mlp: int
    patch: int = 14
    image: int = 56
    context: int = 4096
    rope_theta: float = 10_000.0

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def rope(self) -> dict[str, Any]:
        """Plain rotary positions."""
        return {"rope_type": "default", "rope_theta": self.rope_theta}

    def text(self, tokenizer: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
        """The text configuration that the families share. The vocabulary is rounded up beyond the tokenizer's, as in real checkpoints."""
        return {
            "vocab_size": padded(len(tokenizer)),
            "hidden_size": self.d_model,
            "intermediate_size": self.d_mlp,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_key_value_heads,
            "max_position_embeddings": self.context,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": False,
            **more,
        }


SIZES: dict[Preset, Size] = {
    "tiny": Size(
        n_layers=3, d_model=64, n_heads=4, n_key_value_heads=2, d_mlp=96, vision_layers=2, vision_width=32, vision_heads=2, vision_mlp=48
    ),
    "demo": Size(
        n_layers=3, d_model=128, n_heads=4, n_key_value_heads=4, d_mlp=256, vision_layers=2, vision_width=64, vision_heads=4, vision_mlp=128
    ),
}
"""tiny: a fixture, random weights that do something. demo: about a million parameters, freshly initialised, to be trained."""


@dataclass(frozen=True, eq=False)
class Parts:
    """A family's configuration and processor, before there is a model."""

    config: PreTrainedConfig
    processor: ProcessorMixin


def padded(n: int, multiple: int = 8) -> int:
    """n rounded up to a multiple."""
    return -(-n // multiple) * multiple


@torch.no_grad()
def enliven(model: nn.Module, generator: torch.Generator, *, gain: float = 1.5) -> None:
    """Fill every parameter so that nothing is hidden by an initialisation of zeros or of nearly nothing.

    Matrices get entries of standard deviation 1/sqrt(fan in) (queries and keys `gain` times that, so attention scores have a standard
    deviation near gain**2 and attention is not flat), biases and norms a random part, gates that start at zero a half-open value.
    """
    owners = {
        f"{prefix}.{name}" if prefix else name: module
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    for name, parameter in model.named_parameters():
        parameter.copy_(alive(name, parameter, owners[name], generator, gain))


@torch.no_grad()
def open_gates(model: nn.Module, generator: torch.Generator) -> None:
    """Fill only what starts at zero and would hide the pictures: scalar gates (Mllama) and all-zero matrices (Gemma 3's projection)."""
    for name, parameter in model.named_parameters():
        if "gate" in name and parameter.numel() == 1:
            parameter.fill_(0.5)
        elif parameter.ndim >= 2 and not parameter.any():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.numel() / parameter.shape[0]))


def alive(name: str, parameter: Tensor, owner: nn.Module, generator: torch.Generator, gain: float) -> Tensor:
    """New values for one parameter: see `enliven`."""
    noise = torch.randn(parameter.shape, generator=generator)
    holder = name.split(".")[-2] if "." in name else ""
    if "gate" in name and parameter.numel() == 1:
        return torch.full_like(parameter, 0.8)
    if parameter.ndim < 2 or (
        holder in ("q_norm", "k_norm") and not parameter.std() > 0
    ):  # a norm with a weight for every head of its own is one too
        # normalised queries and keys give scores with a standard deviation of 1 before their norms' weights
        shift = gain - 1.0 if holder in ("q_norm", "k_norm") else 0.0
        return parameter + shift + 0.1 * noise
    if isinstance(owner, nn.Embedding):
        scale = float(getattr(owner, "embed_scale", 1.0))  # Gemma multiplies what it reads by sqrt(d_model)
        return noise / scale
    stacked = parameter.ndim == 3 and "expert" in name  # a matrix per expert
    fan_in = parameter[0].numel() / parameter.shape[1] if stacked else parameter.numel() / parameter.shape[0]
    factor = gain if holder in ("q_proj", "k_proj") else 1.0
    return factor * noise / math.sqrt(fan_in)
