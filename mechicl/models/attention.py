"""The one attention function registered with transformers under the name `mechicl`.

transformers looks the attention of every family up by name and calls it with the queries and keys after RoPE, the values, the mask and the
scale. mechicl registers one function (and a mask of its own, else most families lose theirs in silence) and switches a decoder to it only while a
forward pass needs something that the fused kernels do not give: scores, patterns, rotated queries and keys, or single attention rows.

Modules that the running `AttentionSession` does not know (a connector that shares the decoder's configuration, say) pass through to the
ordinary scaled-dot-product attention. Nothing here knows any family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from mechicl.errors import UnsupportedModelError
from mechicl.models.selection import SELECTIONS, selected, with_selection

NAME = "mechicl"

SCORE_TERMS = ("softcap", "position_bias", "s_aux", "sinks")
"""Keyword arguments that change the scores, all honoured below."""

INERT = frozenset({
    "dropout", "scaling", "is_causal", "sliding_window", "position_ids", "use_cache", "output_attentions", "output_hidden_states", "cache_position",
    "return_dict", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "cu_seqlens", "max_seqlen", "num_items_in_batch",
    "logits_to_keep", "mm_token_type_ids", "token_type_ids", "layer_idx", "deterministic", "target_dtype", "attention_mask",
    "cache", "position_embeddings", "past_key_values", "is_training", "text_position_ids", "output_router_logits", "router_labels",
})  # fmt: skip
"""Keyword arguments that do not change what attention computes here: masks (sliding windows included) arrive ready-made."""


@runtime_checkable
class Closed(Protocol):
    """Cells that may not be read, whatever the model's mask says (see `mechicl.models.blocked`)."""

    def dest(self, call: AttentionCall) -> Tensor:
        """Rows with a closed cell, [batch, n] (repeated where a prompt has fewer), or [batch, 0]."""
        ...

    def __call__(self, call: AttentionCall, dest: Tensor, allowed: Tensor) -> Tensor:
        """`allowed` of the rows `dest`, [batch, 1 or head, n, src], without the closed cells."""
        ...


@dataclass(frozen=True)
class AttentionCall:
    """What one attention module handed to the function: everything needed to compute its pattern. `closed`: cells that an intervention has closed.

    query [batch, head, dest, d_head], key and value [batch, kv_head, src, d_head], after RoPE.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    causal: bool
    terms: Mapping[str, Any]
    kwargs: Mapping[str, Any]
    closed: Closed | None = None

    @property
    def groups(self) -> int:
        """Query heads per key/value head."""
        return self.query.shape[1] // self.key.shape[1]


Handler = Callable[[AttentionCall], Tensor]
"""Takes a call, gives the heads' output [batch, dest, head, d_head]."""


@dataclass
class AttentionSession:
    """Which attention modules are handled during one forward pass, and how.

    `closed`: cells that may not be read, by module; a session inside another keeps the outer one's. A known module with a keyword argument that no one has
    declared inert is refused.
    """

    handlers: dict[int, Handler]
    default: Handler | None = None
    calls: list[int] = field(default_factory=list)
    closed: Mapping[int, Closed] = field(default_factory=dict)


_SESSION: ContextVar[AttentionSession | None] = ContextVar("mechicl_attention_session", default=None)


@contextmanager
def attention_session(session: AttentionSession, configs: list[Any]) -> Iterator[AttentionSession]:
    """Dispatch the models that own `configs` to mechicl's function until the block ends, also when it raises."""
    before = [config._attn_implementation for config in configs]
    if (outer := _SESSION.get()) is not None and outer.closed:
        session.closed = {**outer.closed, **session.closed}
    token = _SESSION.set(session)
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield session
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
        _SESSION.reset(token)


def mechicl_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered function. Shapes as transformers passes them; see `AttentionCall`."""
    session = _SESSION.get()
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    attention_mask = with_selection(attention_mask, selected(module, query, key, kwargs), bool(causal))
    call = AttentionCall(
        module=module, query=query, key=key, value=value, mask=attention_mask,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=bool(causal) and attention_mask is None and query.shape[2] > 1,
        terms={name: kwargs[name] for name in SCORE_TERMS if kwargs.get(name) is not None},
        kwargs={**kwargs, "dropout": dropout, "is_causal": is_causal}, closed=None if session is None else session.closed.get(id(module)),
    )  # fmt: skip
    handler = None
    if session is not None:
        session.calls.append(id(module))
        handler = session.handlers.get(id(module), session.default)
    return (handler or fused)(call), None


def check_terms(call: AttentionCall) -> None:
    """Refuse a call whose keyword arguments may change the scores in a way that is not honoured here.

    Raises:
        UnsupportedModelError: naming the argument.
    """
    for name, value in call.kwargs.items():
        if value is not None and name not in INERT and name not in SCORE_TERMS and name not in SELECTIONS:
            raise UnsupportedModelError(
                f"attention of {type(call.module).__name__} must not use arguments unknown to mechicl; got {name!r}. "
                "Its patterns would be wrong: use model.trace (nnsight), or add the term to mechicl.models.attention."
            )


def fused(call: AttentionCall) -> Tensor:
    """The heads' output by torch's fused kernel; explicit where the kernel cannot add what the family adds to the scores, and in rows with closed cells."""
    if call.closed is not None:
        return _without_closed(call, fused(replace(call, closed=None)), call.closed)
    if any(name in call.terms for name in ("softcap", "s_aux", "sinks")):
        return explicit_chunks(call)
    out, _ = sdpa_attention_forward(
        call.module, call.query, call.key, call.value, call.mask, scaling=call.scaling,
        **{k: v for k, v in call.kwargs.items() if k in ("dropout", "is_causal", "position_bias")},
    )  # fmt: skip
    return out


def _without_closed(call: AttentionCall, out: Tensor, closed: Closed) -> Tensor:
    """The heads' output `out` [batch, dest, head, d_head] with the rows that have closed cells computed anew."""
    check_terms(call)
    where = closed.dest(call)
    if not where.shape[1]:
        return out
    parts = []
    for chunk in row_chunks(call, where):
        scores, allowed = rows(call, chunk)
        parts.append(combine(call, softmax(call, scores, allowed, chunk)))
    new = torch.cat(parts, 1)
    return out.scatter(1, where[..., None, None].expand_as(new), new.to(out.dtype))


def rows(call: AttentionCall, dest: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the rows `dest` and where they may look.

    Args:
        call: One attention call.
        dest: [n] or [batch, n] positions that read.

    Returns:
        Scores [batch, head, n, src] in float32, before the mask, score terms added; allowed [batch or 1, head or 1, n, src], bool.
    """
    batch, heads, n_dest, _ = call.query.shape
    per_row = dest.dim() == 2
    if per_row:
        query = call.query.gather(2, dest[:, None, :, None].expand(-1, heads, -1, call.query.shape[-1]))
    else:
        query = call.query if dest.numel() == n_dest else call.query.index_select(2, dest)
    kv_heads, n_src = call.key.shape[1], call.key.shape[2]
    exact = query.dtype in (torch.float32, torch.float64)  # scaling the queries is cheaper; in half precision it would round them
    grouped = (query * call.scaling if exact else query).reshape(batch, kv_heads, call.groups * query.shape[2], query.shape[-1])
    scores = (grouped @ call.key.transpose(2, 3)).reshape(batch, heads, query.shape[2], n_src)
    scores = scores if exact else scores.float() * call.scaling
    if (cap := call.terms.get("softcap")) is not None:
        scores = torch.tanh(scores / cap) * cap
    bias, allowed = None, None
    if call.mask is not None:
        mask = _take_rows(call.mask, dest, batch)
        if mask.dtype == torch.bool:
            allowed = mask
        else:  # additive, with the dtype's minimum where nothing may be read
            allowed = mask > torch.finfo(mask.dtype).min / 2
            bias = mask.float().masked_fill(~allowed, 0.0)
    elif call.causal:
        positions = dest if per_row else dest[None]
        src = torch.arange(n_src, device=scores.device)
        allowed = src[None, None, None, :] <= positions[:, None, :, None]
    else:
        allowed = torch.ones(1, 1, 1, n_src, dtype=torch.bool, device=scores.device)
    if bias is not None:
        scores = scores + bias
    if (extra := call.terms.get("position_bias")) is not None:
        scores = scores + _take_rows(extra, dest, batch).float()
    allowed = allowed[..., :n_src]
    return scores, allowed if call.closed is None else call.closed(call, dest, allowed)


def _take_rows(mask: Tensor, dest: Tensor, batch: int) -> Tensor:
    """Rows `dest` of a [batch or 1, head or 1, dest, src] tensor."""
    if dest.dim() == 1:
        return mask if dest.numel() == mask.shape[2] else mask.index_select(2, dest)
    mask = mask.expand(batch, -1, -1, -1)
    return mask.gather(2, dest[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))


def softmax(call: AttentionCall, scores: Tensor, allowed: Tensor, dest: Tensor) -> Tensor:
    """Attention [batch, head, n, src] in float32: exactly zero on masked positions and on rows that may read nothing.

    With attention sinks the rows sum to less than one; the rest is the sink's.
    """
    alive = allowed.any(-1, keepdim=True)
    sink = call.terms.get("s_aux", call.terms.get("sinks"))
    masked = scores.masked_fill(~allowed, -math.inf)
    if sink is None:
        if bool(alive.all()):  # exp(-inf) is exactly zero: nothing else to do
            return masked.softmax(-1)
        return masked.masked_fill(~alive, 0.0).softmax(-1).masked_fill(~allowed, 0.0)
    column = sink.reshape(1, -1, 1, 1) if sink.dim() == 1 else _take_rows(sink, dest, scores.shape[0])
    column = column.float().expand(scores.shape[0], scores.shape[1], scores.shape[2], 1)
    return torch.cat([masked, column], -1).softmax(-1)[..., :-1]


def combine(call: AttentionCall, pattern: Tensor) -> Tensor:
    """pattern [batch, head, n, src] times the values: [batch, n, head, d_head], in the values' dtype."""
    batch, heads, n, n_src = pattern.shape
    kv_heads = call.value.shape[1]
    grouped = pattern.to(call.value.dtype).reshape(batch, kv_heads, (heads // kv_heads) * n, n_src)
    z = (grouped @ call.value).reshape(batch, heads, n, call.value.shape[-1])
    return z.transpose(1, 2).contiguous()


def explicit_chunks(call: AttentionCall, max_bytes: int = 1 << 28) -> Tensor:
    """The heads' output with the softmax written out, a bounded number of rows at a time."""
    parts = []
    for dest in row_chunks(call, torch.arange(call.query.shape[2], device=call.query.device), max_bytes):
        scores, allowed = rows(call, dest)
        parts.append(combine(call, softmax(call, scores, allowed, dest)))
    return torch.cat(parts, 1)


def row_chunks(call: AttentionCall, dest: Tensor, max_bytes: int | None = None) -> Iterator[Tensor]:
    """`dest` cut along its last axis so that one chunk's scores stay under `max_bytes`; default what stays in a CPU's cache, or 64 MB on a device."""
    max_bytes = max_bytes or (1 << 21 if dest.device.type == "cpu" else 1 << 26)
    batch, heads = call.query.shape[:2]
    size = max(1, max_bytes // (4 * batch * heads * call.key.shape[2]))
    return iter(dest.split(size, -1))


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, mechicl_attention)
AttentionMaskInterface.register(NAME, _mask)
