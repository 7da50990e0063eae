"""Planted truth: a transformer whose in-context-learning circuit was written down by hand, and one that has learnt nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from mechicl.data.gaussian import MultimodalTask, Task, layout, second_shape, world
from mechicl.errors import OptionError
from mechicl.models.toys.model import Positions, ToyBlock, ToyTransformer, toy_config
from mechicl.models.toys.prompts import ToyRenderer
from mechicl.prompts.vectors import VectorRenderer


@dataclass(frozen=True, eq=False)
class Planted:
    """A model whose circuit is known: which heads read the previous token, which match and copy, and which do nothing."""

    model: ToyTransformer
    previous_token: tuple[tuple[int, int], ...]
    matching: tuple[tuple[int, int], ...]
    idle: tuple[tuple[int, int], ...]

    @property
    def circuit(self) -> tuple[tuple[int, int], ...]:
        """Every head that takes part."""
        return self.previous_token + self.matching


def planted_induction(
    *,
    n_heads: int = 4,
    n_previous: int = 1,
    n_matching: int = 1,
    renderer: ToyRenderer | None = None,
    n_ctx: int = 64,
    sharpness: float = 40.0,
    seed: int = 0,
) -> Planted:
    """A two-layer attention-only transformer with the induction circuit set by hand: it answers every toy episode whose items differ, exactly.

    The stream is four slots: content (one-hot token), place (one-hot position), before (what the previous token was) and out (the answer), and some
    room where idle heads may write. Layer 0: a previous-token head finds place t - 1 from place t and copies content into `before`. Layer 1: a matching
    head looks from a token to the positions whose `before` is that token, and copies their content into `out`, which is all that the logits read.
    With several matching heads each does the same: any one suffices (`sharpness` makes the logits sure), so single ablations cost nothing.

    Args:
        n_heads: Heads per layer.
        n_previous: Previous-token heads, in layer 0.
        n_matching: Matching heads, in layer 1.
        renderer: Vocabulary and form of the prompts.
        n_ctx: Longest prompt.
        sharpness: Attention score of a match (a mismatch has 0), and logit of a label fully attended to.
        seed: Places of the planted heads and weights of the idle ones, which attend at random and write where nobody reads.

    Raises:
        OptionError: more planted heads than heads.
    """
    if not (1 <= n_previous <= n_heads and 1 <= n_matching <= n_heads):
        raise OptionError(f"n_previous and n_matching must be 1..n_heads = {n_heads}; got {n_previous} and {n_matching}. Add heads.")
    renderer = renderer or ToyRenderer()
    size, room = renderer.vocabulary.size, 8
    width = max(size, n_ctx) + 1
    content, place = slice(0, size), slice(size, size + n_ctx)
    before, out = slice(size + n_ctx, 2 * size + n_ctx), slice(2 * size + n_ctx, 3 * size + n_ctx)
    d_model = 3 * size + n_ctx + room
    cfg = toy_config(n_layers=2, n_heads=n_heads, d_model=d_model, d_head=width, d_vocab=size, n_ctx=n_ctx, name="planted induction")
    model = ToyTransformer(cfg, renderer, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randperm(n_heads, generator=generator).tolist() for _ in range(2))
    previous, matching = sorted(first[:n_previous]), sorted(second[:n_matching])
    eye, score = torch.eye(size), math.sqrt(sharpness * math.sqrt(width))
    with torch.no_grad():
        model.W_E.zero_()[:, content] = eye
        model.W_pos.zero_()[:, place] = torch.eye(n_ctx)
        model.W_U.zero_()[out] = eye * sharpness
        for layer, heads in enumerate((previous, matching)):
            attn = cast(ToyBlock, model.blocks[layer]).attn
            weights = (attn.W_Q.data, attn.W_K.data, attn.W_V.data, attn.W_O.data)
            w_q, w_k, w_v, w_o = weights
            w_o.zero_()[:, :, -room:] = torch.randn(n_heads, width, room, generator=generator) / math.sqrt(width)
            for head in heads:
                for weight in weights:
                    weight[head] = 0.0
                if layer == 0:
                    w_q[head, place, :n_ctx] = torch.eye(n_ctx).roll(-1, 1) * score  # place t asks for t - 1
                    w_q[head, place.start] = 0.0  # the first token has nothing before it
                    w_k[head, place, :n_ctx] = torch.eye(n_ctx) * score
                else:
                    w_q[head, content, :size] = eye * score
                    w_k[head, before, :size] = eye * score
                    # the first token has nothing before it but itself: keep it from matching
                    w_q[head, content, -1], w_k[head, place.start, -1] = score, -score
                w_v[head, content, :size] = eye
                w_o[head, :size, before if layer == 0 else out] = eye
    idle = [(layer, h) for layer, heads in enumerate((previous, matching)) for h in range(n_heads) if h not in heads]
    return Planted(model, tuple((0, h) for h in previous), tuple((1, h) for h in matching), tuple(idle))


def planted_vectors(task: Task, *, n_heads: int = 2, sharpness: float = 40.0, seed: int = 0) -> Planted:
    """The induction circuit over vectors: a two-layer attention-only transformer that labels items of classes it has never seen.

    One modality, [x, label, ...]: in layer 0 each token learns from its place what stood one before it (slot `two`); in layer 1 the query's x looks for
    positions whose `two` is like it, which are labels, and copies them into `out`. Two modalities, [x, m2, label, ...]: two heads of layer 0 fetch what stood one
    before (slot `one`) and two before (`two`), and the last token matches its `one`, the query's x, with `two`. The second modality is never used, so
    taking it away costs nothing and taking the first away costs everything. The logits are inner products of `out` with the label vectors.

    It knows no class: sequences whose context does not show the query's class are beyond it.

    Args:
        task: Its label vectors, widths and layout. A second modality enters through a random linear map.
        n_heads: Heads per layer, at least one (two modalities: two).
        sharpness: Attention score of a match (a mismatch has about 0 +- sharpness / sqrt(D)), and logit of a label fully attended to.
        seed: Places of the planted heads and weights of the idle ones, which attend at random and write where nobody reads.

    Raises:
        OptionError: too few heads.
    """
    where = layout(task)
    offsets = (1,) if where.query_second is None else (1, 2)
    if n_heads < len(offsets):
        raise OptionError(f"n_heads must be at least {len(offsets)} for this task; got {n_heads}. Add heads.")
    labels, places, room = world(task).labels, where.n_pos, 8
    width, size = labels.shape[1], max(labels.shape[1], where.n_pos) + 1
    content, one, two, out = (slice(places + k * width, places + (k + 1) * width) for k in range(4))
    cfg = toy_config(
        n_layers=2, n_heads=n_heads, d_model=places + 4 * width + room, d_head=size, d_vocab=labels.shape[0], inputs="vectors", d_input=width,
        positions="one_hot", n_places=places, random_start=False, name="planted induction on vectors",
    )  # fmt: skip
    projector = None
    if isinstance(task, MultimodalTask):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            projector = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(second_shape(task)), width))
    model = ToyTransformer(cfg, VectorRenderer(task), projector=projector, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randperm(n_heads, generator=generator).tolist() for _ in range(2))
    fetching, matching = first[: len(offsets)], second[:1]
    score = math.sqrt(sharpness * math.sqrt(size))
    with torch.no_grad():
        model.W_U.zero_()[out] = labels.T * sharpness
        for layer, heads in enumerate((fetching, matching)):
            attn = cast(ToyBlock, model.blocks[layer]).attn
            weights = (attn.W_Q.data, attn.W_K.data, attn.W_V.data, attn.W_O.data)
            w_q, w_k, w_v, w_o = weights
            w_o.zero_()[:, :, -room:] = torch.randn(n_heads, size, room, generator=generator) / math.sqrt(size)
            for head in heads:
                for weight in weights:
                    weight[head] = 0.0
                w_v[head, content, :width] = torch.eye(width)
            if layer == 0:
                for head, offset in zip(heads, offsets, strict=True):
                    w_q[head, :places, :places] = torch.eye(places).roll(-offset, 1) * score  # place t asks for t - offset
                    w_q[head, :offset] = 0.0  # the first tokens have nothing there
                    w_k[head, :places, :places] = torch.eye(places) * score
                    w_o[head, :width, two if offset == offsets[-1] else one] = torch.eye(width)
            else:
                w_q[heads[0], content if len(offsets) == 1 else one, :width] = torch.eye(width) * score
                w_k[heads[0], two, :width] = torch.eye(width) * score
                # what the first tokens fetched is not what stood before them: keep them from matching
                w_q[heads[0], :places, -1], w_k[heads[0], : offsets[-1], -1] = score, -score
                w_o[heads[0], :width, out] = torch.eye(width)
    used = {(layer, head) for layer, heads in enumerate((fetching, matching)) for head in heads}
    idle = tuple((layer, head) for layer in range(2) for head in range(n_heads) if (layer, head) not in used)
    return Planted(model, tuple((0, head) for head in fetching), tuple((1, head) for head in matching), idle)


def untrained(
    *,
    n_layers: int = 2,
    n_heads: int = 4,
    renderer: ToyRenderer | None = None,
    positions: Positions = "learned",
    seed: int = 0,
    n_ctx: int = 64,
    **options: Any,
) -> ToyTransformer:
    """A transformer with random weights over the same words: the negative control of `planted_induction`. `options` go to `toy_config`."""
    renderer = renderer or ToyRenderer()
    cfg = toy_config(
        n_layers=n_layers,
        n_heads=n_heads,
        d_vocab=renderer.vocabulary.size,
        n_ctx=n_ctx,
        positions=positions,
        name="untrained toy",
        **options,
    )
    return ToyTransformer(cfg, renderer, seed=seed)
