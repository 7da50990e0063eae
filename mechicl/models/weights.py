"""Weights under TransformerLens' names. Per layer they are views of the Hugging Face parameters (copies where these are
offloaded or packed, see `stored`); over layers, stacks of them (copies).

Keys and values keep one entry per key/value head (grouped-query attention), as the hooks do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mechicl.errors import OptionError, UnsupportedModelError
from mechicl.models.anatomy import LayerAnatomy, Projection
from mechicl.models.stored import dense, place, vector


def linear_of(part: LayerAnatomy, letter: str) -> tuple[nn.Linear, int, int]:
    """The linear map of queries, keys or values, its number of heads and their width.

    Raises:
        UnsupportedModelError: there is none; says why.
    """
    projection: Projection | None = getattr(part, letter)
    if projection is None or part.attention is None:
        raise UnsupportedModelError(
            f"W_{letter.upper()} must exist; {part.reasons.get(f'attn.hook_{letter}', 'this layer has no softmax attention')}."
        )
    module = projection.module
    if not isinstance(module, nn.Linear):  # hook_q and hook_k sit behind a norm of the heads; the weight is the projection's
        named = [m for n, m in part.attention.named_modules() if isinstance(m, nn.Linear) and n.split(".")[-1] == f"{letter}_proj"]
        if not named:
            raise UnsupportedModelError(f"W_{letter.upper()} must be one linear map; {type(part.attention).__name__} has no {letter}_proj.")
        module = named[0]
    return module, projection.n_heads, projection.d_head


def _in(part: LayerAnatomy, letter: str) -> Tensor:
    linear, n_heads, d_head = linear_of(part, letter)
    return dense(linear).view(n_heads, d_head, -1).transpose(1, 2)


def _bias(part: LayerAnatomy, letter: str) -> Tensor:
    linear, n_heads, d_head = linear_of(part, letter)
    bias = vector(linear)
    return (_zeros(linear, n_heads * d_head) if bias is None else bias).view(n_heads, d_head)


def _zeros(linear: nn.Linear, n: int) -> Tensor:
    """A bias that is not there."""
    weight = linear.weight
    return torch.zeros(n, dtype=weight.dtype if weight.is_floating_point() else torch.float32, device=place(linear))


class AttentionWeights(nn.Module):
    """One layer's attention: hook points and weights. W_Q [head, d_model, d_head], W_K and W_V [kv_head, d_model, d_head], W_O [head, d_head, d_model]."""

    part: LayerAnatomy

    def __getattr__(self, name: str) -> Any:
        if name in ("W_Q", "W_K", "W_V"):
            return _in(self.__dict__["part"], name[-1].lower())
        if name in ("b_Q", "b_K", "b_V"):
            return _bias(self.__dict__["part"], name[-1].lower())
        if name in ("W_O", "b_O"):
            part: LayerAnatomy = self.__dict__["part"]
            if not isinstance(part.o_proj, nn.Linear):
                raise UnsupportedModelError(f"W_O must exist; {part.reasons.get('attn.hook_z', 'this layer has no softmax attention')}.")
            if name == "b_O":
                bias = vector(part.o_proj)
                return _zeros(part.o_proj, part.o_proj.out_features) if bias is None else bias
            weight = dense(part.o_proj)
            if weight.T.is_contiguous():
                return weight.T.view(part.n_heads, part.d_value, -1)
            return weight.unflatten(1, (part.n_heads, part.d_value)).permute(1, 2, 0)
        return super().__getattr__(name)


class Weights:
    """Mixin of HookedVLM: model-level weights and the few methods that TransformerLens' cache asks of a model."""

    anatomy: Any
    blocks: Any
    processor: Any

    def _stack(self, name: str) -> Tensor:
        found = [getattr(block.attn, name) for block in self.blocks]
        if len({x.shape for x in found}) > 1:
            raise UnsupportedModelError(
                f"{name} must have one shape in every layer; got {sorted({tuple(x.shape) for x in found})}. Take it layer by layer: model.blocks[l].attn.{name}."
            )
        return torch.stack(found)

    W_Q = property(lambda self: self._stack("W_Q"), doc="[layer, head, d_model, d_head], a copy")
    W_K = property(lambda self: self._stack("W_K"), doc="[layer, kv_head, d_model, d_head], a copy")
    W_V = property(lambda self: self._stack("W_V"), doc="[layer, kv_head, d_model, d_head], a copy")
    W_O = property(lambda self: self._stack("W_O"), doc="[layer, head, d_head, d_model], a copy")
    b_Q: property = property(lambda self: self._stack("b_Q"), doc="[layer, head, d_head]")
    b_K: property = property(lambda self: self._stack("b_K"), doc="[layer, kv_head, d_head]")
    b_V: property = property(lambda self: self._stack("b_V"), doc="[layer, kv_head, d_head]")
    b_O: property = property(lambda self: self._stack("b_O"), doc="[layer, d_model]")

    @property
    def W_E(self) -> Tensor:
        """Token embedding [vocab, d_model], a view."""
        found = vector(self.anatomy.embed, "weight")
        assert found is not None
        return found

    @property
    def W_U(self) -> Tensor:
        """Unembedding [d_model, vocab], a view, without the final norm's weight (`ln_final.w`)."""
        return dense(self.anatomy.unembed).T

    @property
    def b_U(self) -> Tensor:
        """Unembedding bias [vocab]; zeros where there is none."""
        bias = vector(self.anatomy.unembed)
        return _zeros(self.anatomy.unembed, self.anatomy.unembed.weight.shape[0]) if bias is None else bias

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Tensor:
        """Directions of the residual stream, after division by the final norm's scale, that raise these tokens' logits.

        The final norm's weight and whatever multiplies the logits are included, so that `cache.logit_attrs` adds up to the logits before any
        soft-capping and without the constant of `logit_bias`.

        Raises:
            UnsupportedModelError: no norm's output alone decides the logits; says so.
        """
        found = self.anatomy.unembedding
        if found.norm is None or not found.known:
            raise UnsupportedModelError(
                "logits must come from one norm and one matrix for a logit lens; this model does something else between its last layer and its logits. "
                "Patterns, residual streams and ablations are exact: use those."
            )
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        index = torch.as_tensor(tokens, device=self.W_U.device)
        return self.anatomy.unembedding.scale * self.W_U.T[index].float() * self.ln_final.w  # type: ignore[attr-defined]

    @property
    def logit_bias(self) -> Tensor:
        """What every token's logit gets whatever the stream is [vocab]: the final norm's bias through the unembedding, and the unembedding's own."""
        return self.anatomy.unembedding.scale * (self.W_U.T.float() @ self.ln_final.b + self.b_U)  # type: ignore[attr-defined]

    def to_tokens(self, text: str, prepend_bos: bool = False) -> Tensor:
        """Token ids [1, pos] of a text without pictures."""
        tokenizer = self._tokenizer()
        return torch.tensor([tokenizer(text, add_special_tokens=prepend_bos)["input_ids"]])

    def to_single_token(self, text: str) -> int:
        """The one token of `text`.

        Raises:
            OptionError: it takes several.
        """
        ids = self._tokenizer()(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise OptionError(
                f"text must be a single token; {text!r} takes {len(ids)}. Choose another word, or score the whole label with icl_accuracy."
            )
        return int(ids[0])

    def _tokenizer(self) -> Any:
        if self.processor is None:
            raise OptionError("processor must be given to tokenise text; got None. Wrap the model as HookedVLM(model, processor).")
        return getattr(self.processor, "tokenizer", self.processor)

    def accumulated_bias(self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True) -> Tensor:
        """Sum of the output projections' biases before `layer` [d_model] (the families served have no MLP output bias, or none is counted)."""
        total = self.W_U.new_zeros(self.W_U.shape[0])
        for block in list(self.blocks)[: layer + int(mlp_input)]:
            total = total + block.attn.b_O
        return total
