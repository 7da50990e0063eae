"""Transplants on a planted circuit: what moves with a key, a value and a residual, and what its control says."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import mechicl
from mechicl.analysis.patching.transplant import transplant
from mechicl.data import concepts
from mechicl.errors import EmptySpanError, EpisodeError, OptionError
from mechicl.models.planted import planted_induction, untrained
from mechicl.models.toys.prompts import toy_episodes
from mechicl.prompts.corrupt import Pairs, minimal_pairs

QUIET: dict[str, Any] = {"progress": False, "n_permutations": 2000}


@cache
def planted(n: int = 12) -> tuple[Any, Pairs]:
    found = planted_induction(n_heads=4, seed=3)
    return found, minimal_pairs(found.model.renderer, toy_episodes(n, classes=2), "swap_labels")


def test_the_value_of_a_label_brings_its_answer_and_that_of_another_prompt_only_damage() -> None:
    found, pairs = planted()
    result = transplant(found.model, pairs.corrupt, pairs.clean, [("right label", "right label")], ("v", "k"), [1], **QUIET)
    value, key = result.rows
    assert value.normalised is not None
    assert value.normalised.value == pytest.approx(1, abs=1e-3)  # the source's answer, whole
    assert value.control.value < 0.7 * value.effect.value  # a stranger's label takes the old answer away and brings nothing
    assert value.difference.low > 0
    assert value.p_corrected < 0.01
    assert key.effect.value == pytest.approx(0, abs=1e-3)  # keys tell the item, which is the same on both sides
    frame = result.to_frame()
    assert frame.site.tolist() == ["v", "k"]
    assert frame.n.eq(12).all()


def test_a_key_put_into_another_exemplar_moves_the_answer_there() -> None:
    found, pairs = planted()
    moves = [("right label", "wrong label"), ("wrong label", "right label")]
    result = transplant(found.model, pairs.clean, None, moves, ("k", "v"), [1], toward="other", heads=[(1, found.matching[0][1])], **QUIET)
    rows = {(row.site, row.source): row for row in result.rows}
    half = rows["k", "right label"]
    assert half.effect.value == pytest.approx(40, abs=1e-3)  # both exemplars now match: the two answers are even
    assert half.difference.low > 0
    assert half.normalised is None  # within one prompt there is no other run to measure by
    assert rows["v", "wrong label"].effect.value == pytest.approx(80, abs=1e-3)  # the other answer stands where it is looked up
    assert rows["v", "right label"].effect.value == pytest.approx(0, abs=1e-3)  # nobody looks there
    idle = transplant(found.model, pairs.clean, None, moves, "k", [1], toward="other", heads=[h for h in found.idle if h[0] == 1], **QUIET)
    assert max(abs(row.effect.value) for row in idle.rows) < 1e-3


def test_moving_a_span_onto_itself_changes_nothing() -> None:
    found, pairs = planted()
    same = transplant(
        found.model,
        pairs.clean,
        None,
        [("right label", "right label"), ("last token", "last token")],
        ("resid_pre", "z", "rot_q")[:2],
        toward="other",
        **QUIET,
    )
    for row in same.rows:
        assert np.abs(row.per_episode).max() < 1e-4
    model = untrained(norm="RMS")
    nothing = transplant(model, pairs.clean, None, [("right label", "wrong label")], "k", toward="other", **QUIET)
    assert all(row.p_corrected > 0.05 for row in nothing.rows)


def test_engines_and_batches_agree() -> None:
    model = mechicl.load("demo")
    pairs = minimal_pairs(model.renderer, concepts.draw(5, classes=2, shots=1, size=28, seed=0, syllables=(2, 2)), "swap_query")
    moves = [("query image", "query image"), ("shot 0 label", "shot 1 label")]
    options: dict[str, Any] = {**QUIET, "metric": "label_logprob", "n_controls": 2}
    fast = transplant(model, pairs.clean, pairs.corrupt, moves, ("resid_pre", "rot_k", "embed"), [0, 2], **options)
    slow = transplant(
        model, pairs.clean, pairs.corrupt, moves, ("resid_pre", "rot_k", "embed"), [0, 2], engine="naive", batch_size=4, **options
    )
    for a, b in zip(fast.rows, slow.rows, strict=True):
        np.testing.assert_allclose(a.per_episode, b.per_episode, atol=1e-4)
        np.testing.assert_allclose(a.control_per_episode, b.control_per_episode, atol=1e-4)
    first = fast.rows[0]
    assert (first.site, first.layer, first.source) == ("resid_pre", 0, "query image")
    assert first.normalised is not None
    assert first.normalised.value == pytest.approx(1, abs=1e-4)  # only the query's picture differs
    assert fast.rows[-1].layer == -1


def test_a_picture_can_stand_where_text_stood() -> None:
    model = mechicl.load("demo")
    episodes = concepts.draw(4, classes=2, shots=1, size=28, seed=0, syllables=(2, 2))
    pairs = minimal_pairs(model.renderer, episodes, "swap_query")
    moves: list[Any] = [("query image", "query question")]
    with pytest.raises(
        EpisodeError, match=r"spans 'query image' \(source\) and 'query question' \(target\) must have as many tokens; got 1 and 4"
    ):
        transplant(model, pairs.clean, pairs.corrupt, moves, "resid_pre", [1], **QUIET)
    fitted = transplant(model, pairs.clean, pairs.corrupt, moves, "resid_pre", [1], align="mean", **QUIET)
    assert np.isfinite(fitted.rows[0].per_episode).all()

    def last_of_question(batch: Any) -> torch.Tensor:
        mask = batch.mask("question", shot=-1)
        return mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))

    one = transplant(model, pairs.clean, pairs.corrupt, [("query image", last_of_question)], "resid_pre", [1], **QUIET)
    assert one.rows[0].target == "last_of_question"


def test_what_does_not_fit_is_refused() -> None:
    found, pairs = planted()
    model, clean = found.model, pairs.clean
    move = [("right label", "right label")]
    with pytest.raises(OptionError, match="site must be one of"):
        transplant(model, clean, pairs.corrupt, move, "pattern")
    with pytest.raises(OptionError, match="moves must be a non-empty list"):
        transplant(model, clean, pairs.corrupt, [])
    with pytest.raises(OptionError, match="span must be one of"):
        transplant(model, clean, pairs.corrupt, [("query image", "right label")], **QUIET)
    with pytest.raises(OptionError, match="n_controls must be at least 1"):
        transplant(model, clean, pairs.corrupt, move, n_controls=0)
    with pytest.raises(OptionError, match="toward must be 'source', 'other', 'shot k'"):
        transplant(model, clean, pairs.corrupt, move, toward="shot 7")
    with pytest.raises(EpisodeError, match="none of 12 episodes has one"):
        transplant(model, clean, None, move)
    with pytest.raises(EpisodeError, match="must be paired"):
        transplant(model, clean, pairs.corrupt.select([0, 1]), move)
    with pytest.raises(EpisodeError, match="at least two episodes"):
        transplant(model, clean.select([0]), pairs.corrupt.select([0]), move)

    def nowhere(batch: Any) -> torch.Tensor:
        return torch.zeros(batch.n, batch.n_pos, dtype=torch.bool)

    with pytest.raises(EmptySpanError, match="must have the span 'nowhere'"):
        transplant(model, clean, pairs.corrupt, [(nowhere, "right label")], **QUIET)
    toward = transplant(model, clean, None, [("wrong label", "right label")], "v", [1], toward="shot 0", **QUIET)
    assert len(toward.skipped) == 12 - toward.n  # episodes whose first exemplar is the right one
