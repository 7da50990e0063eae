"""Metrics of patched runs against the label scores of the rest of mechicl, and the statistics over cells."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import mechicl
from mechicl.analysis.labels import label_logprobs
from mechicl.analysis.patching.metrics import Contrast, contrast
from mechicl.analysis.patching.patch import patch
from mechicl.analysis.statistics import ratio_interval, sign_flip_p
from mechicl.data import concepts
from mechicl.errors import EpisodeError, NotFiniteError, OptionError
from mechicl.models.planted import untrained
from mechicl.models.toys.prompts import ToyRenderer, toy_batch, toy_episodes
from mechicl.prompts.batch import Batch
from mechicl.prompts.corrupt import Pairs, minimal_pairs
from mechicl.prompts.episode import Episode, Shot


def read(model: Any, pairs: Pairs, metric: Any, batch: Batch) -> np.ndarray:
    found, rows, skipped, _ = contrast(metric, pairs.clean, pairs.corrupt)
    assert len(rows) == pairs.n
    assert not skipped
    wide = found.widen(batch)
    with torch.no_grad():
        logits = model(wide, positions=found.positions(wide))
    clean = model(pairs.clean).detach()
    return found.reader(pairs.clean, lambda: clean)(logits)


@pytest.mark.parametrize("words", [1, 2])
def test_whole_labels_score_as_everywhere_else(words: int) -> None:
    model = untrained(n_layers=2, n_heads=2, norm="RMS", seed=1)
    pairs = minimal_pairs(model.renderer, toy_episodes(5, classes=3, label_words=words), "swap_labels")
    scores = label_logprobs(model, pairs.corrupt, share=False)[0].total
    names = [dict(zip(c, row, strict=True)) for c, row in zip(pairs.corrupt.candidates, scores, strict=True)]
    right = np.array([n[c[a]] for n, c, a in zip(names, pairs.clean.candidates, pairs.clean.answers, strict=True)])
    wrong = np.array([n[c[a]] for n, c, a in zip(names, pairs.corrupt.candidates, pairs.corrupt.answers, strict=True)])
    np.testing.assert_allclose(read(model, pairs, "label_logprob", pairs.corrupt), right - wrong, atol=1e-5)
    np.testing.assert_allclose(read(model, pairs, "logprob", pairs.corrupt), right, atol=1e-5)
    np.testing.assert_allclose(read(model, pairs, "prob", pairs.corrupt), np.exp(right), atol=1e-6)


def test_whole_labels_score_as_everywhere_else_with_pictures() -> None:
    model = mechicl.load("demo")
    pairs = minimal_pairs(model.renderer, concepts.draw(3, classes=2, shots=1, size=28, seed=0, syllables=(2, 2)), "swap_query")
    scores = label_logprobs(model, pairs.clean)[0].total
    rows = np.arange(pairs.n)
    expected = scores[rows, list(pairs.clean.answers)] - scores[rows, list(pairs.corrupt.answers)]
    np.testing.assert_allclose(read(model, pairs, "label_logprob", pairs.clean), expected, atol=1e-4)


def test_the_distance_from_the_clean_distribution_is_nought_for_the_clean_run_and_positive_else() -> None:
    model = untrained(n_layers=2, n_heads=2, norm="RMS", seed=1)
    pairs = minimal_pairs(model.renderer, toy_episodes(5, classes=2), "swap_labels")
    np.testing.assert_allclose(read(model, pairs, "kl", pairs.clean), 0, atol=1e-6)
    p, q = (model(side)[:, 0].detach().softmax(-1) for side in (pairs.clean, pairs.corrupt))
    np.testing.assert_allclose(read(model, pairs, "kl", pairs.corrupt), (p * (p / q).log()).sum(-1).numpy(), atol=1e-5)


def test_any_function_of_logits_is_a_metric() -> None:
    model = untrained(n_layers=2, n_heads=2, norm="RMS", seed=1)
    pairs = minimal_pairs(model.renderer, toy_episodes(6, classes=2), "swap_labels")

    def first(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 3]

    def right(logits: torch.Tensor, clean: Batch) -> torch.Tensor:
        ids = [row[a][0] for row, a in zip(clean.candidate_ids, clean.answers, strict=True)]
        return logits[torch.arange(clean.n), ids]

    effects = patch(model, pairs, metric=first, progress=False, n_permutations=10)
    assert (effects.metric, effects.unit) == ("first", "metric")
    np.testing.assert_allclose(effects.clean, model(pairs.clean)[:, 0, 3].detach().numpy(), atol=1e-6)
    small = patch(model, pairs, metric=right, batch_size=2, progress=False, n_permutations=10)
    np.testing.assert_allclose(small.corrupt, right(model(pairs.corrupt)[:, 0], pairs.clean).detach().numpy(), atol=1e-5)
    with pytest.raises(OptionError, match=r"one number per prompt, \[6\]"):
        patch(model, pairs, metric=lambda logits: logits, progress=False)
    with pytest.raises(NotFiniteError, match="must be finite"):
        patch(model, pairs, metric=lambda logits: logits[:, 0] / 0, progress=False)


def test_answers_that_begin_alike_are_left_out_with_advice() -> None:
    labels = ("l1 l2", "l1 l3", "l4 l5")
    shots = tuple(Shot(label, text=f"i{k}", item=f"i{k}") for k, label in enumerate(labels))
    alike = Episode(shots[:2], Shot("l1 l2", text="i0", item="i0"), labels[:2], id="alike")
    fine = Episode(shots[::2], Shot("l1 l2", text="i0", item="i0"), labels[::2], id="fine")
    pairs = minimal_pairs(ToyRenderer(), [alike, fine], "swap_labels")
    _, rows, skipped, _ = contrast("logit_diff", pairs.clean, pairs.corrupt)
    assert rows == [1]
    assert (skipped[0].episode, "use metric='label_logprob'" in skipped[0].reason) == ("alike", True)
    assert contrast("label_logprob", pairs.clean, pairs.corrupt)[1] == [0, 1]
    with pytest.raises(EpisodeError, match="none of 1 is"):
        contrast("logit_diff", pairs.clean.select([0]), pairs.corrupt.select([0]))


def test_equal_answers_are_compared_with_all_other_candidates() -> None:
    model = untrained(n_layers=2, n_heads=2, norm="RMS", seed=1)
    pairs = minimal_pairs(model.renderer, toy_episodes(4, classes=3), "permute_labels")
    found, _, _, notes = contrast("logit_diff", pairs.clean, pairs.corrupt)
    assert [len(foils) for foils in found.foils] == [2] * 4
    assert "same answer on both sides" in notes[0]
    logits = model(pairs.clean)[:, 0].detach()
    expected = [
        row[ids[a][0]] - np.mean([row[x[0]] for k, x in enumerate(ids) if k != a])
        for row, ids, a in zip(logits.numpy(), pairs.clean.candidate_ids, pairs.clean.answers, strict=True)
    ]
    np.testing.assert_allclose(read(model, pairs, "logit_diff", pairs.clean), expected, atol=1e-5)


def test_pairs_with_fewer_other_candidates_are_compared_with_those_they_have() -> None:
    """Two, one and three candidates that count against: what fills up the shorter lists weighs nothing."""
    logits = torch.randn(3, 1, 9, generator=torch.Generator().manual_seed(0))
    foils = (((1,), (2,)), ((3,),), ((4,), (5,), (6,)))
    found = Contrast("logit_diff", ((0,), (7,), (8,)), foils)
    batch = toy_batch(3, classes=2)
    expected = [
        float(row[0, a[0]] - np.mean([row[0, f[0]] for f in some])) for row, a, some in zip(logits, found.answers, foils, strict=True)
    ]
    np.testing.assert_allclose(found.reader(batch)(logits), expected, atol=1e-6)


def test_sign_flips_are_exact_where_all_can_be_listed() -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(0.5, 1, (7, 3))
    signs = np.array(list(itertools.product([-1, 1], repeat=7)))
    expected = (np.abs(signs @ values) >= np.abs(values.sum(0)) - 1e-12).mean(0)
    np.testing.assert_allclose(sign_flip_p(values), expected)
    drawn = sign_flip_p(np.concatenate([values] * 3), n_draws=20_000, seed=1)
    assert (drawn < expected).all()  # more of the same evidence
    assert (drawn >= 1 / 20_001).all()
    np.testing.assert_array_equal(sign_flip_p(np.full((6, 2), [1e-9, 1.0]), tie=1e-6), [1.0, 2 / 64])
    assert np.isnan(sign_flip_p(np.full((4, 1), np.nan))[0])


def test_sign_flips_are_calibrated_without_an_effect() -> None:
    p = sign_flip_p(np.random.default_rng(1).normal(size=(12, 2000)))
    assert np.mean(p < 0.05) == pytest.approx(0.05, abs=0.015)  # three standard errors of 2000 draws


def test_the_interval_of_a_ratio_covers_it() -> None:
    draw, inside = np.random.default_rng(2), 0
    for k in range(200):
        below = draw.normal(2, 1, 40)
        above = 0.5 * below + draw.normal(0, 0.5, 40)
        low, high = ratio_interval(above[:, None], below, seed=k, n_draws=400)
        inside += bool(low[0] <= 0.5 <= high[0])
    assert 0.88 <= inside / 200 <= 0.99
    low, high = ratio_interval(above[:, None], below, n_draws=9999)
    theirs = stats.bootstrap(
        (above, below), lambda a, b: a.mean() / b.mean(), paired=True, method="percentile", vectorized=False, n_resamples=2000, rng=0
    ).confidence_interval
    assert (low[0], high[0]) == pytest.approx(
        tuple(theirs), abs=0.01
    )  # both parts with their episodes; with `below` held the interval would be .20 wide, not .12
    low, high = ratio_interval(np.ones((5, 2, 2)), np.ones(5))
    assert low.shape == (2, 2)
    assert (low == high).all()
