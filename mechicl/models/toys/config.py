"""Settings of a toy transformer, checked: sizes, positions, norm, MLP, what goes in and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from mechicl.errors import OptionError
from mechicl.models.hooked import HookedConfig

Positions = Literal["none", "learned", "rope", "rope_interleaved_bug", "one_hot", "one_hot+rope", "alibi"]
Norm = Literal["RMS", "LN"]
Mlp = Literal["product", "swiglu", "gelu", "silu"]
Inputs = Literal["tokens", "vectors"]
Classifier = Literal["linear", "mlp"]
Init = Literal["fan_in", "huang2026", "reddy2024"]

ROTARY = ("rope", "rope_interleaved_bug", "one_hot+rope")
ONE_HOT = ("one_hot", "one_hot+rope")


@dataclass(frozen=True)
class ToyConfig(HookedConfig):
    """Sizes of a `ToyTransformer`, under TransformerLens' names. Build it with `toy_config`, which checks them.

    Attributes:
        positions: Nothing; an embedding added to the tokens (rows of W_pos); RoPE on queries and keys, or the released code's map in its place; the
            place as a one-hot vector beside the token; both; or ALiBi's penalty on the distance.
        output_projection: Without it the heads' outputs are laid side by side into the stream (n_heads * d_head is d_model).
        qkv_bias: Biases of queries, keys and values.
        norm: A norm before each part and before the logits, or none.
        mlp: The part after attention, or none (attention-only).
        inputs: Token ids through W_E, or vectors that are the stream's content themselves.
        d_input: Coordinates of a vector token. They lie behind the `n_places` coordinates of the place; the rest of the stream starts at zero.
        n_places: Coordinates of the one-hot place; 0 without one.
        classifier: From the last token to the logits: W_U, or an MLP with three hidden layers of `d_classifier` ReLU units.
        init: Initial weights; see `toy_weights.initialise`.
        random_start: In training a sequence starts at a random place, so that every coordinate of the place is learnt (`positions.draw_places`).
        rope_theta: Base of RoPE's frequencies.
        score_scale: What q . k is multiplied by.
    """

    positions: Positions = "learned"
    output_projection: bool = True
    qkv_bias: bool = False
    norm: Norm | None = None
    mlp: Mlp | None = None
    inputs: Inputs = "tokens"
    d_input: int = 0
    n_places: int = 0
    classifier: Classifier = "linear"
    d_classifier: int = 128
    init: Init = "fan_in"
    random_start: bool = False
    rope_theta: float = 1e4
    score_scale: float = 0.25

    @property
    def rotary(self) -> bool:
        """Whether queries and keys are turned by their place."""
        return self.positions in ROTARY

    @property
    def one_hot(self) -> bool:
        """Whether the stream holds the place as a one-hot vector."""
        return self.positions in ONE_HOT

    def settings(self) -> dict[str, Any]:
        """The keywords of `toy_config` that give this configuration again; numbers, words and None only (JSON)."""
        names = ("n_layers", "n_heads", "d_model", "d_head", "d_vocab", "n_ctx", "d_mlp", "positions", "output_projection", "qkv_bias", "norm",
                 "mlp", "inputs", "d_input", "n_places", "classifier", "d_classifier", "init", "random_start", "rope_theta", "score_scale")  # fmt: skip
        return {name: getattr(self, name) for name in names} | {"name": self.model_name}


def toy_config(
    *,
    n_layers: int = 2,
    n_heads: int = 2,
    d_model: int | None = None,
    d_head: int | None = None,
    d_vocab: int = 66,
    n_ctx: int = 64,
    d_mlp: int | None = None,
    positions: Positions | str = "learned",
    output_projection: bool = True,
    qkv_bias: bool = False,
    norm: Norm | bool | str | None = None,
    mlp: Mlp | str | None = None,
    inputs: Inputs | str = "tokens",
    d_input: int | None = None,
    n_places: int | None = None,
    classifier: Classifier | str = "linear",
    d_classifier: int = 128,
    init: Init | str = "fan_in",
    random_start: bool | None = None,
    rope_theta: float = 1e4,
    score_scale: float | None = None,
    name: str = "toy",
) -> ToyConfig:
    """A `ToyConfig`, checked.

    Args:
        d_model: Width of the stream; None: 64 for token ids, n_places + d_input for vectors.
        d_head: None: 16 for token ids with an output projection, else d_model / n_heads.
        d_vocab: Tokens, or labels (vectors): the number of logits.
        n_ctx: Places that the positions can tell apart, and so the longest prompt; with one-hot positions it is n_places.
        d_mlp: Hidden units of the MLP; None: none, or with `mlp` d_model ("product", whose matrices are square) or 4 * d_model.
        norm: "RMS", "LN", None; True is "RMS".
        mlp: "silu", "gelu": two matrices; "swiglu": gated by a SiLU; "product": SiLU of the product of two maps (Huang et al. 2026). None with `d_mlp` is "silu".
        d_input: Width of the vectors; None: 64 for vectors.
        n_places: Coordinates kept for the place; None: n_ctx with one-hot positions, else none. Setting it without one-hot positions leaves them zero: the
            same width for every way of coding positions.
        random_start: None: with one-hot positions only.
        score_scale: None: 1 / sqrt(d_head).

    Other arguments: see `ToyConfig`.

    Raises:
        OptionError: sizes that do not fit together, or a choice that does not exist.
    """
    choices: dict[str, Any] = {"positions": positions, "mlp": mlp, "inputs": inputs, "classifier": classifier, "init": init}
    for (key, value), allowed in zip(choices.items(), (Positions, Mlp, Inputs, Classifier, Init), strict=True):
        if value not in get_args(allowed) and not (key == "mlp" and value is None):
            raise OptionError(f"{key} must be one of {', '.join(get_args(allowed))}; got {value!r}. Choose one.")
    kind: Any = "RMS" if norm is True else (norm or None)
    if kind not in ("RMS", "LN", None):
        raise OptionError(f'norm must be "RMS", "LN" or None; got {norm!r}. Choose one.')
    vectors = inputs == "vectors"
    d_input = (64 if d_input is None else d_input) if vectors else 0
    n_places = (n_ctx if positions in ONE_HOT else 0) if n_places is None else n_places
    n_ctx = n_places if positions in ONE_HOT else n_ctx
    d_model = (d_input + n_places if vectors else 64) if d_model is None else d_model
    if d_head is None:
        d_head = 16 if output_projection and not vectors else d_model // n_heads
    if mlp is None and d_mlp is not None:
        mlp = choices["mlp"] = "silu"
    if mlp is not None and d_mlp is None:
        d_mlp = d_model if mlp == "product" else 4 * d_model
    cfg = ToyConfig(
        model_name=name, model_type="toy", n_layers=n_layers, n_heads=n_heads, n_key_value_heads=n_heads, d_model=d_model, d_head=d_head,
        d_vocab=d_vocab, n_ctx=n_ctx, d_mlp=d_mlp, normalization_type=kind, final_rms=kind == "RMS", attn_only=mlp is None,
        output_projection=output_projection, qkv_bias=qkv_bias, norm=kind, d_input=d_input, n_places=n_places, d_classifier=d_classifier,
        random_start=positions in ONE_HOT if random_start is None else random_start, rope_theta=rope_theta,
        score_scale=d_head**-0.5 if score_scale is None else score_scale, **choices,
    )  # fmt: skip
    _check(cfg)
    return cfg


def _check(cfg: ToyConfig) -> None:
    """Raises OptionError for sizes that do not fit together."""
    for key in ("n_layers", "n_heads", "d_model", "d_head", "d_vocab", "n_ctx", "d_classifier"):
        if int(getattr(cfg, key)) < 1:
            raise OptionError(f"{key} must be at least 1; got {getattr(cfg, key)}. Choose a size.")
    if not cfg.output_projection and cfg.n_heads * cfg.d_head != cfg.d_model:
        raise OptionError(
            f"n_heads * d_head must equal d_model without an output projection; got {cfg.n_heads} * {cfg.d_head} and {cfg.d_model}. Change one."
        )
    if cfg.rotary and cfg.d_head % 2:
        raise OptionError(f"d_head must be even for RoPE; got {cfg.d_head}. Add one (to n_places, where the width follows from it).")
    if cfg.d_mlp is not None and cfg.d_mlp < 1:
        raise OptionError(f"d_mlp must be at least 1; got {cfg.d_mlp}. Leave it out for the default.")
    if cfg.one_hot and cfg.inputs == "tokens":
        raise OptionError(f'inputs must be "vectors" for positions {cfg.positions!r}; got "tokens". Token ids have learned places or RoPE.')
    if cfg.inputs == "vectors" and cfg.d_model < cfg.d_input + cfg.n_places:
        raise OptionError(
            f"d_model must be at least d_input + n_places = {cfg.d_input} + {cfg.n_places}; got {cfg.d_model}. Leave it out to have it follow."
        )
    if cfg.random_start and not cfg.one_hot and cfg.positions != "learned":
        raise OptionError(
            f"random_start must be False for positions {cfg.positions!r}; got True. Only one-hot and learned places have a start."
        )
