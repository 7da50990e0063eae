"""Architectures by name: the papers' and a modern one."""

from __future__ import annotations

from typing import Any, Literal, get_args

from mechicl.errors import OptionError
from mechicl.models.toys.config import ONE_HOT, ToyConfig, toy_config

Preset = Literal["huang2026", "reddy2024", "modern"]

PRESETS: dict[str, dict[str, Any]] = {
    # METHODS A3: one head, no output projection, tokens are the vectors, RMSNorm, fc3(SiLU(fc1 * fc2)) d x d with bias
    "huang2026": {
        "n_layers": 2, "n_heads": 1, "d_vocab": 32, "d_input": 64, "positions": "rope", "norm": "RMS", "mlp": "product",
        "output_projection": False, "init": "huang2026",
    },
    # METHODS E: attention only, no norm, one-hot places with a random start, an MLP of ReLUs as classifier. As in code that derives from the author's,
    # q . k is not scaled and the classifier has three hidden layers (one bias for each of their units: there, one for each layer)
    "reddy2024": {
        "n_layers": 2, "n_heads": 1, "d_vocab": 32, "d_input": 63, "positions": "one_hot", "norm": None, "mlp": None,
        "output_projection": False, "classifier": "mlp", "d_classifier": 128, "init": "reddy2024", "score_scale": 1.0,
    },
    "modern": {
        "n_layers": 2, "n_heads": 4, "d_vocab": 32, "d_input": 64, "positions": "rope", "norm": "RMS", "mlp": "swiglu", "d_mlp": 192,
        "output_projection": True,
    },
}  # fmt: skip
PLACES = 65
"""Places of one-hot positions in both papers: sequences of up to 32 item-label pairs and a query."""


def preset(name: Preset | str, **overrides: Any) -> ToyConfig:
    """The configuration of that name, over vectors, with anything of `toy_config` changed.

    Widths follow: `preset("huang2026")` is 64 wide; with positions="one_hot" it is 65 + 64 = 129 as in the paper; with "one_hot+rope" 66 + 64 = 130 (RoPE
    needs an even width). `preset("huang2026", positions=..., n_places=66)` has the same width, 130, for every way of coding positions. Several heads get
    an output projection in "huang2026", as in the released code.

    Raises:
        OptionError: there is no such preset, or the changes do not fit together.
    """
    if name not in PRESETS:
        raise OptionError(f"preset must be one of {', '.join(get_args(Preset))}; got {name!r}. Choose one.")
    chosen = {"inputs": "vectors", "n_ctx": 128, "name": name} | PRESETS[name] | overrides
    if chosen["positions"] in ONE_HOT and chosen.get("n_places") is None:
        chosen["n_places"] = PLACES + (chosen["positions"] != "one_hot")
    if name == "huang2026" and "output_projection" not in overrides:
        chosen["output_projection"] = chosen["n_heads"] > 1
    if chosen.get("mlp") is None:
        chosen["d_mlp"] = None
    return toy_config(**chosen)
