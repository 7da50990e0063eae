"""Toy transformers behind the interface of the big ones: same hook names, same batches.

`ToyTransformer` is a small decoder with TransformerLens' hook points in its forward pass, over token ids or over vectors (the data of
`mechicl.data.gaussian`, a second modality included). `mechicl.models.planted` sets its weights by hand; `mechicl.models.toys.presets` has the
architectures of the papers.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechicl.errors import OptionError
from mechicl.models.asked import asked_positions
from mechicl.models.hooked import Hooked, HookPoint, RowReducer
from mechicl.models.toys import fast as toy_fast
from mechicl.models.toys.config import Positions, ToyConfig, toy_config
from mechicl.models.toys.inputs import Given, ToyInputs, inputs_of
from mechicl.models.toys.parts import ToyAttention, ToyBlock, ToyClassifier, ToyMLP, ToyNorm
from mechicl.models.toys.positions import alibi_slopes, rope_tables, rotate
from mechicl.models.toys.weights import ToyWeights
from mechicl.prompts.batch import Batch, Renders
from mechicl.prompts.episode import Episode

__all__ = ["Positions", "ToyAttention", "ToyBlock", "ToyConfig", "ToyMLP", "ToyNorm", "ToyTransformer", "rotate", "toy_config"]


class ToyTransformer(ToyWeights, ToyInputs, Hooked):
    """A small causal transformer with the surface of `HookedVLM`: what takes one takes the other.

    Over vectors its inputs are `inputs_embeds` [batch, pos, d_input], and where there are: `attention_mask`; `position_ids` (else places count the mask);
    `second_values` [batch, n_second, *shape] with `second_pos` [batch, n_second], which pass encoder and projector, then `hook_image_features`
    [batch, n_second, d_input], and stand in those positions.

    Args:
        cfg: Sizes, from `toy_config`.
        renderer: Turns episodes into batches; needed for `render` only.
        encoder: Reads the second modality, [m, *shape] -> [m, d_feature] (`models.encoders`); None: its values go to the projector as they are.
        projector: From features to token vectors, [m, d_feature] -> [m, d_input]; None: the features are the tokens.
        seed: Decides the initial weights (`toy_weights.initialise`). Encoder and projector come initialised.
        sharpness: How peaked the attention is at first with init="fan_in": about 1 bit of contrast at the default; larger values give patterns like a
            trained model's.
    """

    cfg: ToyConfig
    seed: int
    hook_embed: HookPoint
    blocks: nn.ModuleList
    ln_final: ToyNorm | None
    encoder: nn.Module | None
    projector: nn.Module | None
    W_pos: nn.Parameter
    hook_pos_embed: HookPoint
    classifier: ToyClassifier
    hook_image_features: HookPoint

    def __init__(
        self,
        cfg: ToyConfig,
        renderer: Renders | None = None,
        *,
        encoder: nn.Module | None = None,
        projector: nn.Module | None = None,
        seed: int = 0,
        sharpness: float = 0.7,
    ) -> None:
        super().__init__()
        self.cfg, self.seed, self._renderer = cfg, seed, renderer
        if cfg.inputs == "tokens":
            self.W_E = nn.Parameter(torch.zeros(cfg.d_vocab, cfg.d_model))
        if cfg.classifier == "linear":
            self.W_U = nn.Parameter(torch.zeros(cfg.d_model, cfg.d_vocab))
        self.hook_embed = HookPoint()
        if cfg.positions == "learned":
            self.W_pos = nn.Parameter(torch.zeros(cfg.n_ctx, cfg.d_model))
        if cfg.positions == "learned" or cfg.one_hot:
            self.hook_pos_embed = HookPoint()
        if cfg.rotary:
            self.register_buffer("rope", rope_tables(cfg.n_ctx, cfg.d_head, cfg.rope_theta), persistent=False)
        if cfg.positions == "alibi":
            self.register_buffer("slopes", alibi_slopes(cfg.n_heads), persistent=False)
        self.blocks = nn.ModuleList(ToyBlock(cfg) for _ in range(cfg.n_layers))
        self.ln_final = ToyNorm(cfg.d_model, cfg.norm) if cfg.norm else None
        if cfg.classifier == "mlp":
            self.classifier = ToyClassifier(cfg)
        self._initialise(seed, sharpness)
        self.encoder, self.projector = encoder, projector
        if cfg.inputs == "vectors":
            self.hook_image_features = HookPoint()
        self.setup()
        self.eval()  # nothing here differs in training, and TransformerLens' patching refuses a model in training mode

    def forward(self, batch: Given, *, positions: Any = "last") -> Float[Tensor, "batch n vocab"]:
        """Logits at the asked positions: "last" (n = 1), "all", or a LongTensor [n] or [batch, n]."""
        stream, _ = self.run_blocks(batch)
        where = asked_positions(batch, self.mask(batch), positions)
        return self.logits_of(stream if where is None else _take(stream, where))

    def classify(
        self,
        tokens: Float[Tensor, "batch pos d_input"] | Int[Tensor, "batch pos"],
        second: Tensor | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        *,
        second_pos: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch vocab"]:
        """Logits of whole sequences at their last position: the way to train, about twice as fast as `forward`.

        The last layer is evaluated only where it is read. Nothing depends on the values of the data and nothing is changed in place, so it runs under
        `torch.func.vmap` and `torch.compile` (`classify_with` takes other weights). It has no hook points and checks no places: use `forward` for those.

        Args:
            tokens: Vectors without padding (token ids [batch, pos] with `inputs="tokens"`).
            second: Second modality, [batch, n_second, *shape], encoded and projected into its positions.
            position_ids: Places, below `cfg.n_ctx`; None: 0, 1, ... See `positions.draw_places`.
            second_pos: Positions of the second modality; None: `second_positions`.

        Raises:
            OptionError: called inside `hooks`, or the sequence is longer than the places.
        """
        if self.context_level:
            raise OptionError("classify must not be called inside hooks; its path has no hook points. Call the model itself.")
        n_pos = tokens.shape[1]
        if n_pos > self.cfg.n_ctx:
            raise OptionError(f"sequences must have at most n_ctx = {self.cfg.n_ctx} tokens; got {n_pos}. Build the model for longer ones.")
        place = torch.arange(n_pos, device=tokens.device)[None] if position_ids is None else position_ids
        content = self.W_E[tokens] if self.cfg.inputs == "tokens" else tokens
        if second is not None:
            n_second = second.shape[1]
            where = torch.tensor(second_positions(n_pos, n_second) if second_pos is None else list(second_pos), device=tokens.device)
            content = content.index_copy(1, where, self._features(second).to(content.dtype))
        stream = self._stream(content)
        code = self._place_code(place, stream.dtype)
        stream = stream if code is None else stream + code
        causal = torch.ones(n_pos, n_pos, dtype=torch.bool, device=tokens.device).tril()
        at = self._setting(place, causal[None, None])
        *earlier, last = cast(Sequence[ToyBlock], self.blocks)
        for part in earlier:
            stream = toy_fast.block(part, stream, at)
        return self.logits_of(toy_fast.last_block(last, stream, at))

    def logits_of(self, stream: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """The final norm and the classifier."""
        if self.ln_final is not None:
            stream = self.ln_final(stream)
        return stream @ self.W_U if self.cfg.classifier == "linear" else self.classifier(stream)

    def run_blocks(self, batch: Given, keep: Any = None) -> tuple[Tensor, list[Any]]:
        """The stream after the last block, and for each layer what `keep(layer, pattern)` returned."""
        inputs = inputs_of(batch)
        mask = self.mask(batch)
        n_pos = mask.shape[1]
        place = (mask.long().cumsum(1) - 1).clamp_min(0)
        if (given := inputs.get("position_ids")) is not None:
            place = given.to(mask.device)
        if int(place.max()) >= self.cfg.n_ctx or int(place.min()) < 0:
            raise OptionError(f"prompts must have at most n_ctx = {self.cfg.n_ctx} tokens; got {int(place.max()) + 1}. Use fewer shots.")
        causal = torch.ones(n_pos, n_pos, dtype=torch.bool, device=mask.device).tril()
        # a padded position reads itself, so that its row stays a number
        allowed = (causal & mask[:, None, :].bool() | torch.eye(n_pos, dtype=torch.bool, device=mask.device))[:, None]
        stream = self.hook_embed(self._content(inputs))
        code = self._place_code(place, stream.dtype)
        if code is not None:
            stream = stream + self.hook_pos_embed(code)
        at, kept = self._setting(place, allowed), []
        for layer, block in enumerate(self.blocks):
            stream, pattern = block(stream, at)
            kept.append(None if keep is None else keep(layer, pattern))
        return stream, kept

    @torch.no_grad()
    def attention_rows(
        self, batch: Given, dest: Any = "last", *, layers: Sequence[int] | None = None, reduce: RowReducer | None = None
    ) -> list[Any]:
        """Attention of the asked positions, [batch, head, n_dest, src] for each layer (None for layers not asked for).

        With `reduce(layer, positions, rows)`, each layer's entry is the list of what it returned. Same contract as `HookedVLM.attention_rows`.
        """
        mask = self.mask(batch)
        where = asked_positions(batch, mask, dest)
        if where is None:
            where = torch.arange(mask.shape[1], device=mask.device)
        wanted = set(range(self.cfg.n_layers) if layers is None else [int(layer) for layer in layers])
        if not wanted <= set(range(self.cfg.n_layers)):
            raise OptionError(f"layers must be in 0..{self.cfg.n_layers - 1}; got {sorted(wanted)}. Layers count from 0.")

        def keep(layer: int, pattern: Tensor) -> Any:
            if layer not in wanted:
                return None
            rows = _take(pattern.transpose(1, 2), where).transpose(1, 2)
            return rows if reduce is None else [reduce(layer, where, rows)]

        return self.run_blocks(batch, keep)[1]

    @property
    def renderer(self) -> Any:
        """Turns episodes into batches.

        Raises:
            OptionError: the model was built without one.
        """
        if self._renderer is None:
            raise OptionError("renderer must be given to render episodes; got None. Build ToyTransformer(cfg, ToyRenderer(vocabulary)).")
        return self._renderer

    def render(self, episodes: Sequence[Episode]) -> Batch:
        """Episodes as a left-padded batch with exact spans."""
        return self.renderer.render(episodes)

    def describe(self) -> dict[str, Any]:
        """What `results.Provenance` needs to name this model."""
        versions = {p: importlib.metadata.version(p) for p in ("torch", "transformer-lens")}
        weight = cast(ToyBlock, self.blocks[0]).attn.W_Q
        return {
            "model": self.cfg.model_name,
            "revision": f"seed {self.seed}",
            "dtype": str(weight.dtype).removeprefix("torch."),
            "attention": "toy",
            "device": str(weight.device),
            "versions": versions,
        }


class _Classify(nn.Module):
    """`classify` as a module's forward, for torch.func.functional_call."""

    def __init__(self, model: ToyTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.model.classify(*args, **kwargs)


def classify_with(model: ToyTransformer, weights: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Float[Tensor, "batch vocab"]:
    """`model.classify(...)` with other weights (names of `named_parameters`; what is not named keeps the model's): for `torch.func.vmap` over models."""
    return torch.func.functional_call(_Classify(model), {f"model.{name}": value for name, value in weights.items()}, args, kwargs)


def second_positions(n_pos: int, n_second: int) -> list[int]:
    """Where the second modality stands in [m1, m2, label, ..., m1, m2] (METHODS A2): 1, 4, 7, ... and the last position."""
    return [*range(1, 3 * (n_second - 1), 3), n_pos - 1]


def _take(x: Tensor, where: Tensor) -> Tensor:
    """Positions [n] or [batch, n] of x [batch, pos, ...]."""
    if where.dim() == 1:
        return x.index_select(1, where)
    index = where.reshape(*where.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)
