"""Closed cells: equal to scores edited by hand, in toys and in every family, and nothing stays behind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import example_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mechicl.errors import HeadIndexError, HookNotFiredError, OptionError, UnsupportedModelError
from mechicl.models.blocked import Block, blocked, windows
from mechicl.models.planted import planted_induction, untrained
from mechicl.models.toys.model import ToyTransformer
from mechicl.models.toys.prompts import ToyRenderer, toy_batch, toy_episodes
from mechicl.models.vlm import HookedVLM

Organism = Callable[..., tuple[Any, Any]]


def by_hand(block: Block, layer: int, heads: list[int] | None = None) -> tuple[str, Callable[..., Tensor]]:
    """The same through the scores' hook point: minus infinity, and a row left with nothing reads its own token."""
    cells = (block.dest[:, :, None] == block.src[:, None, :]) & (block.dest >= 0)[:, :, None]

    def close(scores: Tensor, *, hook: object) -> Tensor:
        chosen = torch.ones(scores.shape[1], dtype=torch.bool) if heads is None else torch.zeros(scores.shape[1], dtype=torch.bool)
        chosen[heads or []] = True
        shut = cells[:, None] & chosen[:, None, None]
        left = scores.masked_fill(shut, -torch.inf)
        gone = torch.isneginf(left).all(-1, keepdim=True) & ~torch.isneginf(scores).all(-1, keepdim=True)
        own = torch.eye(scores.shape[-1], dtype=torch.bool)
        return torch.where(gone & own, scores, left)

    return f"blocks.{layer}.attn.hook_attn_scores", close


def random_block(n: int, n_pos: int, seed: int = 0, **options: Any) -> Block:
    """Three groups of readers and sources, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    dest, src = (torch.randint(-2, 3, (n, n_pos), generator=generator).clamp_min(-1) for _ in range(2))
    return Block(dest, src, **options)


def hooked(organism: Organism, family: str) -> tuple[HookedVLM, Any]:
    """A family's tiny model, and its processor."""
    model, processor = organism(family)
    return HookedVLM(model, processor, check=False), processor


def inputs_of(model: Any, processor: Any) -> dict[str, Any]:
    """Prompts with pictures of different sizes, left-padded where the family can take them."""
    return example_batch(processor, images=(2, 1))


@pytest.mark.parametrize("options", [{}, {"layers": (1,)}, {"heads": ((0, 1), (1, 0))}])
@pytest.mark.parametrize("positions", ["learned", "rope", "alibi"])
def test_toys_equal_scores_edited_by_hand(positions: str, options: dict[str, Any]) -> None:
    model, batch = untrained(n_heads=2, positions=positions), toy_batch(5)  # type: ignore[arg-type]
    block = random_block(batch.n, batch.n_pos, **options)
    with blocked(model, [block]) as tally:
        closed = model(batch, positions="all")
    heads = options.get("heads")
    hooks = [by_hand(block, layer, [h for at, h in heads if at == layer] if heads else None) for layer in options.get("layers", (0, 1))]
    assert torch.allclose(closed, model.run_with_hooks(batch, positions="all", fwd_hooks=hooks), atol=1e-6)
    assert not torch.allclose(closed, model(batch, positions="all"), atol=1e-3)
    assert tally.cells > 0
    assert tally.ran


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), layers=st.sampled_from([None, (0,), (1,)]), several=st.booleans(), classes=st.integers(2, 4))
@torch.no_grad()
def test_any_cells_of_a_toy_equal_scores_edited_by_hand(seed: int, layers: tuple[int, ...] | None, several: bool, classes: int) -> None:
    model = untrained(n_heads=2, seed=seed)
    batch = ToyRenderer().render([*toy_episodes(2, classes=classes), *toy_episodes(2, classes=4)])  # some padded
    blocks = [random_block(batch.n, batch.n_pos, seed=seed + k, layers=layers) for k in range(1 + several)]
    with blocked(model, blocks):
        closed = model(batch, positions="all")

    def close(scores: Tensor, *, hook: object) -> Tensor:
        left = scores
        for block in blocks:
            shut = (block.dest[:, :, None] == block.src[:, None, :]) & (block.dest >= 0)[:, :, None]
            left = left.masked_fill(shut[:, None], -torch.inf)
        gone = torch.isneginf(left).all(-1, keepdim=True)
        return torch.where(gone & torch.eye(scores.shape[-1], dtype=torch.bool), scores, left)

    hooks = [(f"blocks.{layer}.attn.hook_attn_scores", close) for layer in layers or (0, 1)]
    assert torch.allclose(closed, model.run_with_hooks(batch, positions="all", fwd_hooks=hooks), atol=1e-5)


@torch.no_grad()
def test_every_family_equals_scores_edited_by_hand(family: str, organism: Organism) -> None:
    model, processor = hooked(organism, family)
    inputs = inputs_of(model, processor)
    n, n_pos = inputs["input_ids"].shape
    block = random_block(n, n_pos)
    layers = [layer for layer, part in enumerate(model.anatomy.layers) if part.attention is not None and not part.cross]
    plain = model(inputs, positions="all")
    with blocked(model, [block]) as tally:
        closed = model(inputs, positions="all")
        again = model.run_with_cache(inputs, names_filter=lambda name: name.endswith("hook_pattern"))[1]
        rows = model.attention_rows(inputs, torch.tensor([n_pos - 1]))
    real = inputs["attention_mask"].bool()
    edited = model.run_with_hooks(inputs, positions="all", fwd_hooks=[by_hand(block, layer) for layer in layers])
    assert torch.allclose(closed[real], edited[real], atol=2e-6)  # the kernel's sums against the explicit ones
    assert float((closed - plain)[real].abs().max()) > 1e-4
    assert torch.equal(model(inputs, positions="all"), plain)  # nothing is left behind
    cells = (block.dest[:, :, None] == block.src[:, None, :]) & (block.dest >= 0)[:, :, None]
    for layer in layers:  # hook points and rows see the closed attention
        pattern = again[f"blocks.{layer}.attn.hook_pattern"]
        shut = cells[:, None] & ~torch.eye(n_pos, dtype=torch.bool)
        assert float(pattern.masked_fill(~shut, 0.0).abs().max()) == 0.0
        assert torch.allclose(rows[layer][:, :, 0], pattern[:, :, -1].float(), atol=1e-6)
        alive = pattern.sum(-1)[real[:, None].expand(-1, pattern.shape[1], -1)]
        assert torch.allclose(alive, torch.ones_like(alive), atol=1e-5)
    assert tally.emptied >= 0


@torch.no_grad()
def test_half_precision_runs(organism: Organism) -> None:
    from mechicl.training.organisms import build

    model, processor = build("qwen2_5_vl", preset="tiny", seed=0)
    model = HookedVLM(model, processor, check=False)
    inputs = inputs_of(model, processor)
    block = random_block(*inputs["input_ids"].shape)
    with blocked(model, [block]):
        full = model(inputs)
    model.hf.to(torch.bfloat16)
    with blocked(model, [block]):
        half = model(inputs)
    assert torch.allclose(half.float(), full, atol=0.05 * float(full.abs().max()))


def test_copies_and_appended_tokens_are_closed_as_the_prompts_are() -> None:
    model, batch = untrained(n_heads=2), toy_batch(3)
    block = random_block(batch.n, batch.n_pos)
    wide = batch.repeat(2).append([[5, 6]] * 6)
    with blocked(model, [block]):
        one, many = model(batch, positions="all"), model(wide, positions="all")
    assert torch.allclose(many[:, : batch.n_pos], one.repeat(2, 1, 1), atol=1e-6)
    last = torch.full_like(block.dest, -1)
    last[:, -1] = 0
    first = torch.where(torch.arange(batch.n_pos) < 3, 0, -1).expand_as(last)
    for follow in (-1, 0):
        with blocked(model, [Block(last, first, follow=follow)]):
            _, cache = model.run_with_cache(wide)
        pattern = cache["blocks.0.attn.hook_pattern"]
        assert float(pattern[:, :, batch.n_pos - 1, :3].abs().max()) == 0.0
        assert (float(pattern[:, :, batch.n_pos :, :3].abs().max()) == 0.0) == (follow == 0)


def test_continuing_prompts_from_their_cache_equals_running_them_whole(organism: Organism) -> None:
    """With a sliding window too, where the cache holds fewer keys than there were tokens."""
    from mechicl.data.concepts import draw

    for family in ("qwen2_5_vl", "gemma3"):
        model, _ = hooked(organism, family)
        batch = model.render(draw(2, classes=2, shots=1, size=28, seed=0))
        ids = [list(row) for row in batch.candidate_ids]
        block = random_block(batch.n, batch.n_pos, follow=1)
        wide = batch.repeat(2).append([list(ids[i][j][:-1]) for j in range(2) for i in range(batch.n)])
        length = min(len(one) for row in ids for one in row)
        with torch.no_grad(), blocked(model, [block]):
            from mechicl.models.prefix import continue_prompts

            shared = continue_prompts(model, batch, ids)[0]
            whole = model(wide, positions=wide.query_pos[:, None] + torch.arange(length))
        whole = whole.reshape(2, batch.n, length, -1)
        assert torch.allclose(shared[:, :, :length], whole, atol=1e-5)


def test_a_row_left_with_nothing_keeps_its_own_token() -> None:
    model, batch = untrained(n_heads=2), toy_batch(2)
    every = torch.zeros(batch.n, batch.n_pos, dtype=torch.long)
    with blocked(model, [Block(every, every)]) as tally:
        _, cache = model.run_with_cache(batch)
    assert tally.emptied == batch.n * batch.n_pos
    for layer in (0, 1):
        assert torch.equal(cache[f"blocks.{layer}.attn.hook_pattern"], torch.eye(batch.n_pos).expand(batch.n, 2, -1, -1))


def test_no_group_closes_nothing_and_changes_no_bit(organism: Organism) -> None:
    model, processor = hooked(organism, "qwen2_vl")
    inputs = inputs_of(model, processor)
    none = torch.full(inputs["input_ids"].shape, -1)
    with torch.no_grad():
        with blocked(model, [Block(none, none)]) as tally:
            closed = model(inputs)
        with blocked(model, [Block(torch.zeros_like(none), none)]):
            unread = model(inputs)
        assert torch.equal(closed, model(inputs))
        assert torch.allclose(unread, closed, atol=1e-5)  # every row computed anew: the kernel sums in another order
    assert tally.cells == 0


def test_nothing_is_left_behind_after_an_exception(organism: Organism) -> None:
    model, processor = hooked(organism, "qwen2_vl")
    toy, batch = untrained(n_heads=2), toy_batch(2)
    inputs = inputs_of(model, processor)
    for one, data in ((model, inputs), (toy, batch)):
        before = one(data)
        ids = inputs["input_ids"] if data is inputs else batch.inputs["input_ids"]
        block = random_block(*ids.shape)

        def stop(*_: Any, hook: object) -> None:
            raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"), blocked(one, [block]):
            one.run_with_hooks(data, fwd_hooks=[("blocks.1.hook_resid_post", stop)])
        assert torch.equal(one(data), before)
    assert all(config._attn_implementation != "mechicl" for config in model.anatomy.configs)
    assert not any(block.attn._forward_pre_hooks for block in toy.blocks)


def test_the_matching_head_of_the_planted_circuit_is_all_that_needs_the_label() -> None:
    planted = planted_induction(n_heads=3)
    batch = toy_batch(6)
    right = torch.where(batch.mask("label", right=True), 0, -1)
    last = torch.full_like(right, -1)
    last[torch.arange(batch.n), batch.query_pos] = 0
    truth = torch.tensor([ids[k][0] for ids, k in zip(batch.candidate_ids, batch.answers, strict=True)])
    for heads, share in ((planted.matching, 0.0), (planted.idle, 1.0), (planted.previous_token, 1.0)):
        with blocked(planted.model, [Block(last, right, heads=heads)]):
            found = planted.model(batch)[:, 0].argmax(-1)
        assert float((found == truth).float().mean()) == share


def test_windows_cover_all_layers() -> None:
    assert windows(7, 3) == ((0, 1, 2), (3, 4, 5), (4, 5, 6))
    assert windows(4, 2, 1) == ((0, 1), (1, 2), (2, 3))
    assert windows(3, 3) == ((0, 1, 2),)
    with pytest.raises(OptionError, match="size must be"):
        windows(3, 4)


def test_refusals(organism: Organism) -> None:
    model, batch = untrained(n_heads=2), toy_batch(2)
    block = random_block(batch.n, batch.n_pos)
    with pytest.raises(OptionError, match="at least one Block"), blocked(model, []):
        pass
    with pytest.raises(OptionError, match=r"layers must be in 0\.\.1"), blocked(model, [random_block(2, batch.n_pos, layers=(2,))]):
        pass
    with pytest.raises(HeadIndexError), blocked(model, [random_block(2, batch.n_pos, heads=((0, 2),))]):
        pass
    with pytest.raises(OptionError, match="leave a layer"), blocked(model, [random_block(2, batch.n_pos, layers=(0,), heads=((1, 0),))]):
        pass
    with pytest.raises(OptionError, match="both be"), blocked(model, [Block(block.dest, block.src[:1])]):
        pass
    with pytest.raises(OptionError, match="the same prompts"), blocked(model, [block, random_block(1, batch.n_pos)]):
        pass
    with pytest.raises(OptionError, match="made for"), blocked(model, [random_block(4, batch.n_pos)]):
        model(batch)
    with pytest.raises(HookNotFiredError, match="none did"), blocked(model, [block]):
        model.classify(batch.inputs["input_ids"])
    mllama, processor = hooked(organism, "mllama")
    cross = [layer for layer, part in enumerate(mllama.anatomy.layers) if part.cross]
    inputs = inputs_of(mllama, processor)
    with pytest.raises(UnsupportedModelError, match="pictures that are not in the sequence"):
        with blocked(mllama, [random_block(*inputs["input_ids"].shape, layers=tuple(cross[:1]))]):
            pass
    assert isinstance(model, ToyTransformer)
