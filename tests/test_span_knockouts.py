"""Attention closed between groups of tokens: the planted circuit needs the edges it was built of and no other, and numbers equal scores edited by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mechicl
from mechicl.analysis.ablation.span_blocks import Cells, cells, random_cells
from mechicl.analysis.ablation.span_knockouts import span_knockout
from mechicl.analysis.icl import icl_accuracy
from mechicl.data.concepts import draw
from mechicl.errors import EmptySpanError, OptionError, UnsupportedModelError
from mechicl.models.blocked import windows
from mechicl.models.planted import planted_induction, untrained
from mechicl.models.toys.prompts import ToyRenderer, toy_batch, toy_episodes
from mechicl.models.vlm import HookedVLM
from mechicl.results import SpanKnockOuts

Organism = Callable[..., tuple[Any, Any]]
QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture(scope="module")
def planted() -> SpanKnockOuts:
    """The circuit with its own edges closed, and others."""
    pairs = [("label", "own item"), ("last token", "right label"), ("last token", "wrong label"), ("wrong label", "own text"), ("right label", "own text"),
             ("text", "label"), ("label", "label"), ("last token", "text")]  # fmt: skip
    return span_knockout(planted_induction(n_heads=3).model, toy_episodes(24), pairs, n_random=9, **QUIET)


def test_the_planted_circuit_needs_its_own_edges(planted: SpanKnockOuts) -> None:
    assert planted.intact.accuracy.value == 1.0
    for name in ("label <- own item", "last token <- right label", "right label <- own text"):
        row = planted[name]
        assert row.accuracy.value < 0.3
        assert row.change.high < -0.5
        assert row.margin_change.high < -10
        assert row.mcnemar_p < 0.001
        assert row.p_corrected < 0.01
    assert planted.zero_shot is not None
    assert planted.zero_shot.value < 0.6


def test_other_edges_and_random_ones_cost_nothing(planted: SpanKnockOuts) -> None:
    for name in ("last token <- wrong label", "wrong label <- own text", "text <- label", "last token <- text"):
        assert planted[name].accuracy.value == 1.0
        assert planted[name].change.value == 0.0
        assert planted[name].mcnemar_p == 1.0
    row = planted["last token <- right label"]
    assert row.control_accuracy is not None
    assert row.control_accuracy.value > 0.95  # other tokens, as many: the matching head does not look there
    assert row.p_random == pytest.approx(0.1)  # the least that nine draws allow
    assert "1 cells against 1" in row.control
    assert planted["label <- own item"].n_cells == 4


def test_rows_of_the_table_say_what_was_done(planted: SpanKnockOuts) -> None:
    frame = planted.to_frame()
    assert list(frame["name"]) == [row.name for row in planted.rows]
    assert (frame["n_layers"] == 2).all()
    assert planted.n == 24
    assert planted.n_draws == 9
    with pytest.raises(OptionError, match="name must be one of"):
        planted["query <- label"]


def test_windows_of_layers_give_a_curve() -> None:
    """The matching head is in layer 1: closing its edge in layer 0 costs nothing. The previous-token head is in layer 0."""
    model = planted_induction(n_heads=2).model
    found = span_knockout(
        model, toy_batch(16), [("last token", "right label"), ("label", "own text")], layers=windows(2, 1), n_random=0, **QUIET
    )
    assert [row.layers for row in found.curve("label <- own text")] == [(0,), (1,)]
    assert [row.accuracy.value > 0.9 for row in found.curve("last token <- right label")] == [True, False]
    assert [row.accuracy.value > 0.9 for row in found.curve("label <- own text")] == [False, True]
    assert all(np.isnan(row.p_random) and row.control_accuracy is None for row in found.rows)
    one = span_knockout(model, toy_batch(16), [("last token", "right label")], layers=[1], n_random=0, **QUIET)
    assert one.rows[0].layers == (1,)


def test_heads_can_be_named() -> None:
    planted = planted_induction(n_heads=3)
    for heads, fine in ((planted.matching, False), (planted.idle, True), (planted.previous_token, True)):
        found = span_knockout(planted.model, toy_batch(12), [("last token", "right label")], heads=heads, n_random=0, **QUIET)
        assert (found.rows[0].accuracy.value > 0.9) == fine
        assert found.rows[0].heads == heads


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "paligemma", "smolvlm", "mistral3"])
def test_margins_equal_scores_edited_by_hand(family: str, organism: Organism) -> None:
    """Sliding windows, bidirectional picture blocks and whole labels of several tokens included."""
    model = HookedVLM(*organism(family), check=False)
    batch = model.render(draw(4, classes=2, shots=1, size=28, seed=2))
    found = span_knockout(model, batch, [("label", "own image"), ("last token", "exemplars")], n_random=1, zero_shot=False, **QUIET)
    for row in found.rows:
        given = cells(batch, row.dest, row.src)
        hooks = [(f"blocks.{layer}.attn.hook_attn_scores", _close(given)) for layer in row.layers]
        model._continues = False  # every candidate behind its own copy of the prompt
        with model.hooks(fwd_hooks=hooks):
            expected = icl_accuracy(model, batch, zero_shot=False, batch_size=64, progress=False)
        model._continues = None
        assert np.allclose(row.margins, expected.margins, atol=2e-4)
        assert row.n_cells == float(given.n.float().mean())
    assert np.allclose(found.intact.margins, icl_accuracy(model, batch, zero_shot=False, progress=False).margins, atol=1e-5)
    assert float(np.abs(found.rows[0].margins - found.intact.margins).max()) > 1e-6


def _close(given: Cells) -> Callable[..., Tensor]:
    def close(scores: Tensor, *, hook: object) -> Tensor:
        copies, extra = len(scores) // len(given.dest), scores.shape[-1] - given.dest.shape[1]
        dest = torch.nn.functional.pad(given.dest, (0, extra), value=given.follow).repeat(copies, 1)
        src = torch.nn.functional.pad(given.src, (0, extra), value=-1).repeat(copies, 1)
        left = scores.masked_fill(((dest[:, :, None] == src[:, None]) & (dest >= 0)[:, :, None])[:, None], -torch.inf)
        assert not bool((torch.isneginf(left).all(-1) & ~torch.isneginf(scores).all(-1)).any())
        return left

    return close


def test_batches_and_the_bundled_model_give_the_same_numbers() -> None:
    model = mechicl.load("demo")
    episodes = draw(5, classes=2, shots=1, size=28, seed=0)
    pairs = [("last token", "right label"), ("query", "shot 1")]
    whole, parts = (span_knockout(model, episodes, pairs, n_random=2, zero_shot=False, batch_size=size, **QUIET) for size in (16, 2))
    for one, other in zip(whole.rows, parts.rows, strict=True):
        assert np.allclose(one.margins, other.margins, atol=1e-4)
        assert one.control_margin_change is not None
        assert other.control_margin_change is not None
        assert one.control_margin_change.value == pytest.approx(other.control_margin_change.value, abs=1e-4)
    assert whole["last token <- right label"].change.value < -0.5
    assert all(config._attn_implementation != "mechicl" for config in model.anatomy.configs)


def test_groups_by_name() -> None:
    batch = toy_batch(3, classes=3)
    label, text = batch.mask("label"), batch.mask("text")
    last = torch.zeros_like(label)
    last[torch.arange(3), batch.query_pos] = True

    def both(dest: str, src: str) -> tuple[Tensor, Tensor]:
        given = cells(batch, dest, src)
        return given.dest >= 0, given.src >= 0

    assert torch.equal(both("label", "text")[0], label)
    assert torch.equal(both("label", "text")[1], text & ~last)
    assert torch.equal(both("last token", "exemplars")[1], (label | text) & ~last)
    assert torch.equal(both("query", "shot 1")[0], last)
    assert torch.equal(both("query", "shot 1")[1], batch.mask(shot=1))
    assert torch.equal(both("right label", "wrong item")[0], batch.mask("label", right=True))
    assert torch.equal(both("right label", "wrong item")[1], batch.mask("text", right=False))
    own = cells(batch, "label", "own item")
    assert own.dest[0].unique().tolist() == [-1, 0, 1, 2]
    assert own.n.tolist() == [3, 3, 3]
    assert own.follow == -1
    assert cells(batch, "last token", "label").follow == 0
    assert cells(batch, "everything", "shot 0").follow == 0


def test_random_cells_match_and_never_are_the_chosen_ones() -> None:
    batch = toy_batch(4, classes=4)
    for dest, src in (("last token", "right label"), ("last token", "shot 1"), ("label", "own item")):
        given = cells(batch, dest, src)
        for k in range(5):
            drawn = random_cells(batch, given, seed=0, draw=k, first=0)
            for one in drawn:
                g = int(one.dest.max())
                assert torch.equal(one.dest == g, given.dest == g)
                assert not bool(((one.src == g) & (given.src == g)).any())
                assert not bool((one.src[:, 0] >= 0).any())
                assert bool((one.n <= Cells(one.dest, torch.where(given.src == g, g, -1), -1).n).all())
            again = random_cells(batch.select([2, 3]), cells(batch.select([2, 3]), dest, src), seed=0, draw=k, first=2)
            assert all(torch.equal(one.src[2:], other.src) for one, other in zip(drawn, again, strict=True))
    assert all(bool((one.n == 1).all()) for one in random_cells(batch, cells(batch, "last token", "right label"), seed=0, draw=0, first=0))


def test_an_untrained_model_loses_nothing_in_particular() -> None:
    found = span_knockout(untrained(n_heads=2), toy_episodes(24), [("last token", "right label")], n_random=9, **QUIET)
    assert found.rows[0].p_random > 0.1 or found.rows[0].margin_change.low < 0 < found.rows[0].margin_change.high
    assert found.rows[0].change.low <= 0 <= found.rows[0].change.high


def test_a_reader_with_nothing_else_to_read_is_told() -> None:
    found = span_knockout(untrained(n_heads=2), toy_batch(4), [("everything", "everything")], n_random=2, **QUIET)
    (row,) = found.rows
    assert "keep reading their own token" in " ".join(row.notes)
    assert "nothing else to read" in row.control
    assert row.control_accuracy is None
    assert np.isnan(row.p_random)
    assert found.zero_shot is not None  # a batch with a renderer


def test_prompts_without_the_group_are_counted() -> None:
    episodes = [*toy_episodes(3, classes=3), *toy_episodes(3, classes=2)]
    found = span_knockout(untrained(n_heads=2), ToyRenderer().render(episodes), [("last token", "shot 2")], n_random=1, **QUIET)
    assert "3 of 6 prompts have no such cell" in found.rows[0].notes[0]
    assert np.allclose(found.rows[0].margins[3:], found.intact.margins[3:])


def test_nothing_is_left_behind_when_a_row_raises() -> None:
    model, batch = untrained(n_heads=2), toy_batch(3)
    before = model(batch)
    with pytest.raises(EmptySpanError, match="'right image'"):
        span_knockout(model, batch, [("last token", "label"), ("right label", "right image")], n_random=0, **QUIET)
    assert torch.equal(model(batch), before)
    assert not any(block.attn._forward_pre_hooks for block in model.blocks)


def test_refusals(organism: Organism) -> None:
    model, batch = untrained(n_heads=2), toy_batch(2)
    with pytest.raises(OptionError, match="pairs must be at least one"):
        span_knockout(model, batch, [], **QUIET)
    for pair in (("answer", "label"), ("own label", "text"), ("label", "left text"), ("right shot 1", "label")):
        with pytest.raises(OptionError, match="must be a part"):
            span_knockout(model, batch, [pair], **QUIET)
    with pytest.raises(OptionError, match="n_random must be"):
        span_knockout(model, batch, [("label", "text")], n_random=-1, **QUIET)
    with pytest.raises(OptionError, match=r"layers must be in 0\.\.1"):
        span_knockout(model, batch, [("label", "text")], layers=[[0], [2]], **QUIET)
    with pytest.raises(EmptySpanError, match="readers first"):
        span_knockout(model, batch, [("shot 0 text", "last token")], **QUIET)
    mllama = HookedVLM(*organism("mllama"), check=False)
    with pytest.raises(UnsupportedModelError, match="cross-attention"):
        span_knockout(mllama, draw(2, classes=2, shots=1, size=28), [("label", "own image")], **QUIET)
