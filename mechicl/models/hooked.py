"""The interface that every model of mechicl has, and TransformerLens' classes that carry it (their one home in mechicl).

Hook names are TransformerLens'. What an analysis may rely on is `HookedModel`; what a model may inherit is `Hooked`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from transformer_lens import ActivationCache as TransformerLensCache
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from mechicl.errors import HeadIndexError, HookNameError, HookNotFiredError, UnsupportedModelError
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode

__all__ = ["ActivationCache", "HookPoint", "Hooked", "HookedConfig", "HookedModel", "HookedRootModule", "RowReducer", "check_heads"]

RowReducer = Callable[[int, Tensor, Tensor], Any]
"""(layer, dest positions [n] or [batch, n], attention [batch, head, n, src]) -> whatever is to be kept."""


@dataclass(frozen=True)
class HookedConfig:
    """Sizes, under TransformerLens' names. `n_ctx` is the context in tokens."""

    model_name: str
    model_type: str
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_vocab: int
    n_ctx: int
    d_mlp: int | None = None
    normalization_type: str | None = "RMS"
    final_rms: bool = True
    attn_only: bool = False
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


@runtime_checkable
class HookedModel(Protocol):
    """What every analysis relies on, toy or production."""

    cfg: Any

    def __call__(self, batch: Batch, *, positions: Any = "last") -> Tensor: ...

    def hooks(self, fwd_hooks: Any = ..., bwd_hooks: Any = ...) -> Any: ...

    def run_with_hooks(self, *args: Any, fwd_hooks: Any = ..., **kwargs: Any) -> Any: ...

    def run_with_cache(self, *args: Any, names_filter: Any = ..., **kwargs: Any) -> Any: ...

    def attention_rows(self, batch: Batch, dest: Any = "last", *, layers: Any = None, reduce: RowReducer | None = None) -> list[Any]: ...

    def render(self, episodes: Sequence[Episode]) -> Batch: ...

    def describe(self) -> Mapping[str, Any]: ...


class ActivationCache(TransformerLensCache):
    """TransformerLens' cache. Its attribution methods refuse a family whose heads are not added to the stream as they are."""

    def _check_additive(self) -> None:
        reason = getattr(self.model, "not_additive", "")
        if reason:
            raise UnsupportedModelError(
                f"per-head attribution must not be used on {getattr(self.model.cfg, 'model_type', 'this model')}; {reason}. Patterns, residual streams and ablations are exact: use those."
            )

    def decompose_resid(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens' stack of what every sublayer added, refused where some layer adds something else."""
        reasons: Mapping[str, str] = getattr(self.model, "unavailable", {})
        missing = [name for name in reasons if name.endswith(("hook_attn_out", "hook_mlp_out"))]
        if missing:
            raise UnsupportedModelError(
                f"the stream must be a sum of sublayers' outputs to be decomposed; {missing[0]}: {reasons[missing[0]]}. "
                "Residual streams, patterns and ablations are exact: use those."
            )
        return super().decompose_resid(*args, **kwargs)

    def compute_head_results(self) -> None:
        """Each head's contribution to the stream, `blocks.{l}.attn.hook_result` [batch, pos, head, d_model]."""
        self._check_additive()
        super().compute_head_results()

    def stack_head_results(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens' stack of head contributions [layer * head, batch, pos, d_model]."""
        self._check_additive()
        return super().stack_head_results(*args, **kwargs)


class Hooked(HookedRootModule):
    """HookedRootModule whose hook names are checked: one that does not exist, or never fires, is an error instead of silence."""

    unavailable: Mapping[str, str] = {}
    """Hook names that this model cannot give, with the reason."""

    cfg: Any

    _must_fire = True
    """Whether `hooks` insists that every named hook is reached; off while everything there is gets cached."""

    def check_hook_name(self, name: str) -> None:
        """Raises HookNameError for a name the model does not have, saying why or what is near."""
        if name in self.hook_dict:
            return
        if name in self.unavailable:
            raise HookNameError(f"hook {name!r} does not exist on {self.cfg.model_type}: {self.unavailable[name]}.")
        near = difflib.get_close_matches(name, list(self.hook_dict), n=3)
        hint = f"Did you mean {', '.join(near)}?" if near else "See list(model.hook_dict)."
        raise HookNameError(f"hook name must be one of the model's {len(self.hook_dict)}; got {name!r}. {hint}")

    @contextmanager
    def hooks(
        self, fwd_hooks: Any = (), bwd_hooks: Any = (), reset_hooks_end: bool = True, clear_contexts: bool = False
    ) -> Iterator[Hooked]:
        """TransformerLens' context manager, with names checked first and, at the end, that every hook named by a string fired.

        Raises:
            HookNameError: a name (or a name filter) matches no hook point.
            HookNotFiredError: forward passes ran inside the block and a named hook was never reached.
        """
        for name, _ in (*fwd_hooks, *bwd_hooks):
            if isinstance(name, str):
                self.check_hook_name(name)
            elif not any(name(existing) for existing in self.hook_dict):
                raise HookNameError("a hook-name filter must match at least one hook point; it matched none. See list(model.hook_dict).")
        wanted = [name for name, _ in fwd_hooks if isinstance(name, str)]
        fired: set[str] = set()
        handles = [self.hook_dict[name].register_forward_hook(_mark(fired, name)) for name in set(wanted)]
        runs = {"n": 0}
        counter = self.register_forward_pre_hook(_count(runs))
        try:
            with super().hooks(list(fwd_hooks), list(bwd_hooks), reset_hooks_end, clear_contexts):
                yield self
        finally:
            for handle in handles:
                handle.remove()
            counter.remove()
        silent = [name for name in wanted if name not in fired]
        if self._must_fire and runs["n"] and silent:
            raise HookNotFiredError(
                f"hook {silent[0]!r} must be reached by the forward pass; it never was. The prompt may have no pictures, or the layer was skipped."
            )

    def run_with_hooks(
        self,
        *args: Any,
        fwd_hooks: Any = (),
        bwd_hooks: Any = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kwargs: Any,
    ) -> Any:
        """One forward pass with temporary hooks; see `hooks`."""
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts) as model:
            return model(*args, **kwargs)

    def run_with_cache(
        self, *args: Any, names_filter: Any = None, remove_batch_dim: bool = False, return_cache_object: bool = True, **kwargs: Any
    ) -> Any:
        """One forward pass, and everything (or what `names_filter` says) that passed the hook points, as an ActivationCache.

        Raises:
            HookNameError: a name in `names_filter` does not exist.
            HookNotFiredError: a named hook was never reached.
        """
        wanted: Any = names_filter
        if wanted is not None and not callable(wanted):
            wanted = [wanted] if isinstance(wanted, str) else list(wanted)
            for name in wanted:
                self.check_hook_name(name)
        before, self._must_fire = self._must_fire, isinstance(wanted, list)
        try:
            out, cache = super().run_with_cache(*args, names_filter=cast(Any, wanted), remove_batch_dim=remove_batch_dim, **kwargs)
        finally:
            self._must_fire = before
        return out, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim) if return_cache_object else cache


def _mark(fired: set[str], name: str) -> Callable[..., None]:
    def mark(*_: Any) -> None:
        fired.add(name)

    return mark


def _count(runs: dict[str, int]) -> Callable[..., None]:
    def count(*_: Any) -> None:
        runs["n"] += 1

    return count


def check_heads(model: Any, heads: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(layer, head) pairs as ints, each inside the model.

    Raises:
        HeadIndexError: one is not.
    """
    checked = []
    parts = getattr(getattr(model, "anatomy", None), "layers", ())
    for layer, head in heads:
        if not (0 <= int(layer) < model.cfg.n_layers and 0 <= int(head) < model.cfg.n_heads):
            raise HeadIndexError(
                f"head must be (layer, head) with layer in 0..{model.cfg.n_layers - 1} and head in 0..{model.cfg.n_heads - 1}; got ({layer}, {head}). "
                "Both count from 0."
            )
        part = parts[int(layer)] if parts else None
        if part is not None and int(head) >= part.n_heads:
            has = f"has {part.n_heads} heads" if part.attention is not None else part.reasons["attn.hook_pattern"]
            raise HeadIndexError(f"head must exist in its layer; got ({layer}, {head}): layer {layer} {has}. Choose another.")
        checked.append((int(layer), int(head)))
    return checked


def active(point: nn.Module) -> bool:
    """Whether anything listens at a hook point."""
    return bool(getattr(point, "fwd_hooks", ()) or getattr(point, "bwd_hooks", ()))
