"""Weights of single heads, or of whole parts of a model, taken from another model of the same shape for a while.

A head's own weights are its rows of the query, key and value maps (with their biases) and its columns of the output map. Where several heads share keys and values
(grouped-query attention) these move only with all of the heads that read them. What heads of a layer share (norms of q and k, the output's bias) stays.

A graft is no natural model: the rest of the recipient was trained beside other heads, and what a head reads (the stream, the embeddings, the norms) is the recipient's. That a
graft fails therefore does not say that the function was absent; that it works does say that it was present. The controls are grafts of random heads, and of whole parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mechicl.errors import OptionError, UnsupportedModelError
from mechicl.models.hooked import check_heads
from mechicl.models.weights import linear_of
from mechicl.results import Head

Part = Literal["attention", "mlps", "embeddings", "vision"]
"""attention: the heads of all decoder layers, with what they share. mlps: the rest of the decoder's layers, their norms included. embeddings: tokens in and out, the last norm.
vision: everything else, the tower and the projector (in a toy: encoder and projector)."""
PARTS: tuple[Part, ...] = get_args(Part)
LETTERS = "qkvo"


@contextmanager
def grafted(recipient: Any, donor: Any, heads: Sequence[Head] = (), *, letters: str = LETTERS, parts: Sequence[str] = ()) -> Iterator[Any]:
    """The recipient with the donor's weights at some heads, or in whole parts; its own are back afterwards, also when something raises.

    Args:
        recipient: A `HookedVLM` or a toy, changed in place for the length of the block.
        donor: A model of the same shape. It is only read.
        heads: Whose weights are taken.
        letters: Which of their maps: any of q, k, v, o.
        parts: Whole parts that are taken, see `Part`; all of them make the donor.

    Raises:
        OptionError: models of different shapes, or letters and parts that do not exist.
        HeadIndexError: a head that the model does not have.
        UnsupportedModelError: the family's maps cannot be cut into heads; says why.
    """
    check_pair(recipient, donor)
    if wrong := [letter for letter in letters if letter not in LETTERS]:
        raise OptionError(f"letters must be some of q, k, v, o; got {wrong[0]!r}. qkvo is the whole head.")
    if unknown := [part for part in parts if part not in PARTS]:
        raise OptionError(f"parts must be among {', '.join(PARTS)}; got {unknown[0]!r}. Pick some of them.")
    chosen = check_heads(recipient, heads)
    mine, theirs = _tensors(recipient, chosen, letters, parts), _tensors(donor, chosen, letters, parts)
    kept = [one.clone() for one in mine]
    try:
        with torch.no_grad():
            for one, other in zip(mine, theirs, strict=True):
                one.copy_(other)
        yield recipient
    finally:
        with torch.no_grad():
            for one, old in zip(mine, kept, strict=True):
                one.copy_(old)


def shared_heads(model: Any, heads: Sequence[Head]) -> tuple[Head, ...]:
    """Heads whose keys and values stay behind in a graft, because heads outside of the set read them too."""
    wanted, found = set(heads), []
    for layer, head in heads:
        size = _shared_by(model, layer)
        if not all((layer, head // size * size + i) in wanted for i in range(size)):
            found.append((layer, head))
    return tuple(found)


def _shared_by(model: Any, layer: int) -> int:
    """How many heads of a layer read one key/value head."""
    anatomy = getattr(model, "anatomy", None)  # layers of a few families differ in their number of heads
    one = model.cfg if anatomy is None else anatomy.layers[layer]
    return max(1, one.n_heads // max(1, one.n_key_value_heads))


def check_pair(first: Any, second: Any) -> None:
    """Whether weights of one model fit the other.

    Raises:
        OptionError: they do not; says which.
    """
    a, b = (dict(_network(model).named_parameters()) for model in (first, second))
    differ = sorted(a.keys() ^ b.keys()) or [name for name in a if a[name].shape != b[name].shape]
    if differ:
        raise OptionError(
            f"models must be of one shape; their parameters differ in {differ[0]!r}. Compare a model with one that was fine-tuned from it "
            "(adapters merged, as mechicl.load does)."
        )


def _network(model: Any) -> nn.Module:
    """The module that holds the weights: the Hugging Face model, or the toy itself."""
    return getattr(model, "hf", model)


def _tensors(model: Any, heads: Sequence[Head], letters: str, parts: Sequence[str]) -> list[Tensor]:
    owners = _owners(model) if parts else {}
    found = [p.data for p in _network(model).parameters() if parts and owners.get(id(p), "vision") in parts]
    if "attention" in parts:
        return found
    loose = set(shared_heads(model, heads))
    for layer, head in heads:
        some = letters if (layer, head) not in loose else "".join(x for x in letters if x not in "kv")
        found += [view for letter in some for view in _views(model, layer, head, letter)]
    return found


def _owners(model: Any) -> dict[int, str]:
    """id of a parameter -> the part it belongs to; those of the decoder only. Later entries win, so that a layer's attention is not its MLP's."""
    anatomy = getattr(model, "anatomy", None)
    found: dict[int, str] = {}
    if anatomy is None:
        outside = [module for name, module in model.named_children() if name in ("encoder", "projector")]
        eyes = {id(p) for module in outside for p in module.parameters()}
        found |= {id(p): "embeddings" for p in model.parameters() if id(p) not in eyes}
        for block in model.blocks:
            found |= {id(p): "mlps" for p in block.parameters()} | {id(p): "attention" for p in block.attn.parameters()}
        return found
    decoder = model.hf.get_decoder()
    found |= {id(p): "embeddings" for module in (decoder, anatomy.embed, anatomy.unembed) for p in module.parameters()}
    for part in anatomy.layers:
        found |= {id(p): "mlps" for p in part.block.parameters()}
        found |= {} if part.attention is None else {id(p): "attention" for p in part.attention.parameters()}
    return found


def _views(model: Any, layer: int, head: int, letter: str) -> list[Tensor]:
    """Views of a head's weights in one of its maps, weight and bias."""
    kv = head // _shared_by(model, layer)
    anatomy = getattr(model, "anatomy", None)
    if anatomy is None:
        attn, name = model.blocks[layer].attn, letter.upper()
        weights = [getattr(attn, f"W_{name}")[head]] if isinstance(getattr(attn, f"W_{name}"), nn.Parameter) else []
        bias = getattr(attn, f"b_{name}", None) if letter != "o" else None
        return [w.data for w in weights] + ([] if bias is None else [bias.data[head]])
    part = anatomy.layers[layer]
    if letter == "o":
        if not isinstance(part.o_proj, nn.Linear):
            raise UnsupportedModelError(
                f"heads of layer {layer} must have an output map; {part.reasons.get('attn.hook_z', 'it has none')}. Leave the layer out."
            )
        return [part.o_proj.weight.data[:, head * part.d_value : (head + 1) * part.d_value]]
    linear, n_heads, width = linear_of(part, letter)
    if linear.weight.shape[0] != n_heads * width:
        raise UnsupportedModelError(
            f"{letter} of layer {layer} must be a map of its own; it has {linear.weight.shape[0]} rows for {n_heads} heads of {width}. Graft parts."
        )
    at = kv if letter in "kv" else head
    rows = slice(at * width, (at + 1) * width)
    return [linear.weight.data[rows]] + ([] if linear.bias is None else [linear.bias.data[rows]])
