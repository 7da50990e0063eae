"""Contrastive maps find what was planted (a hidden few directions, a gate between heads, a task's own directions) and nothing in shuffled labels or noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from readout_cases import episodes, hooked

from mechicl.analysis.margin.contrast import contrast_margin
from mechicl.analysis.margin.contrast_fit import Pool, mapped, triplet_loss
from mechicl.analysis.margin.contrast_maps import apply_map, contrast_map
from mechicl.analysis.margin.contrast_pairs import ContrastPairs, contrast_pairs
from mechicl.errors import EpisodeError, HeadIndexError, NotFiniteError, OptionError
from mechicl.models.planted import planted_induction
from mechicl.models.toys.prompts import toy_batch

D = 8


def pairs(
    n: int = 200,
    *,
    classes: int = 4,
    noise: float = 5.0,
    own: slice = slice(0, 3),
    turned: bool = True,
    gate: bool = False,
    seed: int = 0,
    name: str = "",
) -> ContrastPairs:
    """Queries and exemplars of `classes` classes, in two heads of D. What tells classes apart is in the coordinates `own`, small among large noise, then turned by
    a rotation; with `gate` in one head only, another for each vector, and a coordinate says which."""
    g = np.random.default_rng(seed)
    size = 2 * D
    turn = np.linalg.qr(np.random.default_rng(99).standard_normal((size, size)))[0] if turned else np.eye(size)
    width = len(range(size)[own])
    means, answer = g.standard_normal((n, classes, width)), g.integers(0, classes, n)

    def vectors(z: np.ndarray) -> np.ndarray:
        z = z + 0.2 * g.standard_normal(z.shape)
        x = noise * g.standard_normal((*z.shape[:-1], size))
        if not gate:
            x[..., own] = z
            return (x @ turn).reshape(*z.shape[:-1], 2, D)
        x, on = x.reshape(*z.shape[:-1], 2, D), g.integers(0, 2, z.shape[:-1])
        for head in (0, 1):
            here = (on == head)[..., None]
            x[..., head, :width] = np.where(here, z, x[..., head, :width])
            x[..., head, width:] = np.where(here, 4.0, -4.0)
        return x

    labels = np.tile(np.arange(classes), (n, 1))
    items = labels + classes * np.arange(n)[:, None]
    return ContrastPairs(
        vectors(means[np.arange(n), answer]), vectors(means), np.ones((n, classes), bool), labels == answer[:, None], items, items[np.arange(n), answer],
        name=name,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["linear", "attention"])
def test_a_map_finds_the_planted_directions_that_plain_cosine_does_not_see(kind: Any) -> None:
    found = contrast_map(pairs(), kind=kind, epochs=200)
    assert found.plain.value < 0.65
    assert found.score.value > 0.85
    assert found.gain.low > 0.1
    assert found.above_shuffled.low > 0.1
    assert found.shuffled_gain.low < 0 < found.shuffled_gain.high
    assert found.n == 40
    assert found.n + found.n_train + found.n_validation == 200
    assert len(found.held_out) == 40
    assert found.curve[found.epochs] == found.curve.min()
    assert set(found.weights) == {"centre", "map"} | ({"query"} if kind == "attention" else set())
    assert found.to_frame()["measure"].tolist() == ["score", "plain", "gain", "shuffled", "shuffled_gain", "above_shuffled"]


def test_shuffled_labels_and_noise_give_nothing() -> None:
    given = pairs(150)
    g = np.random.default_rng(5)
    for blank in (
        replace(given, right=np.stack([g.permutation(row) for row in given.right]), query_item=np.full(150, -1)),
        replace(given, query=g.standard_normal(given.query.shape), exemplars=g.standard_normal(given.exemplars.shape)),
    ):
        found = contrast_map(blank)
        assert found.score.low < 0.5 < found.score.high
        assert found.above_shuffled.low <= 0 <= found.above_shuffled.high + 0.02


def test_a_gate_between_heads_needs_the_attention_map() -> None:
    given = pairs(160, classes=3, gate=True, own=slice(0, 6), noise=6.0)
    linear, attention = (contrast_map(given, kind=kind) for kind in ("linear", "attention"))
    assert attention.score.value > linear.score.value + 0.2
    assert attention.above_shuffled.low > 0


def test_tasks_that_keep_what_counts_in_different_places_need_the_mixed_map() -> None:
    """The embedding of a task turns up the coordinates that count there."""
    sets = [pairs(150, own=slice(k, k + 3), turned=False, noise=2.0, seed=k, name=f"task {k}") for k in (0, 6)]
    linear, mixed = (contrast_map(sets, kind=kind) for kind in ("linear", "mixed"))
    assert mixed.groups == ("task 0", "task 6")
    assert mixed.weights["embedding"].shape == (2, 16)
    assert mixed.score.value > linear.score.value
    assert mixed.above_shuffled.low > 0
    with pytest.raises(OptionError, match="group"):
        apply_map(mixed, sets[0].query, group="another")
    assert apply_map(mixed, sets[0].query, group="task 6").shape == (150, 16)


def test_the_same_seed_gives_the_same_bytes_and_another_split_another_map() -> None:
    given = pairs(60)
    one, two, other = contrast_map(given, epochs=20), contrast_map(given, epochs=20), contrast_map(given, epochs=20, seed=1)
    assert all(np.array_equal(one.weights[name], two.weights[name]) for name in one.weights)
    assert str(one.score) == str(two.score)
    assert one.held_out == two.held_out != other.held_out


def test_a_fitted_map_is_never_worse_on_validation_than_where_it_began() -> None:
    found = contrast_map(pairs(60, noise=0.3), epochs=30)
    assert found.curve[found.epochs] <= found.curve[0]
    assert found.score.value > 0.9


def test_apply_map_gives_the_cosines_that_were_judged() -> None:
    given = pairs(80)
    found = contrast_map(given, epochs=40)
    rows = list(found.held_out)
    query, exemplars = apply_map(found, given.query[rows]), apply_map(found, given.exemplars[rows])
    near = np.einsum("be,bse->bs", query, exemplars) / np.linalg.norm(query, axis=-1)[:, None] / np.linalg.norm(exemplars, axis=-1)
    right = given.right[rows]
    order = [(near[i, right[i]][:, None] > near[i, ~right[i]]).mean() for i in range(len(rows))]
    assert np.mean(order) == pytest.approx(found.score.value, abs=1e-6)
    assert apply_map(found, given.query[0]) == pytest.approx(apply_map(found, given.query[:1])[0], abs=1e-6)
    flat = (given.query[0].reshape(-1) - found.weights["centre"].reshape(-1)) @ found.weights["map"].reshape(2 * D, -1)
    assert apply_map(found, given.query[0]) == pytest.approx(flat, rel=1e-4, abs=1e-4)


def test_the_loss_is_the_sum_over_triplets_by_hand() -> None:
    given = pairs(5, classes=3)
    pool = Pool.of([given])
    weights = {"centre": torch.zeros(2, D), "map": torch.randn(2, D, 4, generator=torch.Generator().manual_seed(0))}
    rows, group = torch.arange(5), torch.zeros(5, dtype=torch.long)
    f = torch.nn.functional.normalize(mapped(weights, pool.query, group), dim=-1)
    g = [torch.nn.functional.normalize(mapped(weights, pool.exemplars[i], group[:3]), dim=-1) for i in range(5)]
    own, across = [], []
    for i in range(5):
        (p,) = pool.right[i].nonzero()[:, 0].tolist()
        near = float(f[i] @ g[i][p])
        own += [max(0.0, 0.2 - near + float(f[i] @ g[i][s])) for s in range(3) if s != p]
        across += [max(0.0, 0.2 - near + float(f[i] @ g[j][s])) for j in range(5) if j != i for s in range(3)]
    assert float(triplet_loss(weights, pool, rows, 0.2)) == pytest.approx(0.5 * np.mean(own) + 0.5 * np.mean(across), abs=1e-6)


def test_exemplars_that_show_the_same_elsewhere_are_no_negatives() -> None:
    given = pairs(4, classes=2)
    alike = replace(given, items=np.zeros_like(given.items), query_item=np.zeros_like(given.query_item))
    weights = {"centre": torch.zeros(2, D), "map": torch.eye(2 * D).reshape(2, D, -1)}
    inside = replace(given, items=np.full_like(given.items, -1), query_item=np.full_like(given.query_item, -1))
    same, free = (float(triplet_loss(weights, Pool.of([x]), torch.arange(4), 0.2)) for x in (alike, inside))
    assert same < free  # only the episode's own wrong exemplars are left


def test_pairs_of_a_model_have_the_margins_of_contrast_margin() -> None:
    """The same vectors by another way: cosines of the pairs are the distances of the margin."""
    planted = planted_induction(n_heads=2)
    toy = toy_batch(12, 3, 1, renderer=planted.model.renderer)
    cases: list[tuple[Any, Any]] = [(planted.model, toy), (hooked("qwen2_5_vl"), episodes(4)), (hooked("gemma3"), episodes(3))]
    for model, data in cases:
        for part, at in (("k", "before"), ("v", "label")):
            margin = contrast_margin(model, data, parts=(part,), at=at, n_null=5, progress=False)  # pyright: ignore[reportArgumentType]
            head = (1, model.cfg.n_key_value_heads - 1)
            found = contrast_pairs(model, data, part=part, at=at, heads=[head], progress=False)  # pyright: ignore[reportArgumentType]
            q, x = found.query[:, 0], found.exemplars[:, :, 0]
            size = np.maximum(np.linalg.norm(q, axis=-1)[:, None] * np.linalg.norm(x, axis=-1), 1e-12)
            near = np.einsum("bd,bsd->bs", q, x) / size
            share = found.right / found.right.sum(1, keepdims=True)
            wrong = found.known & ~found.right
            values = (near * share).sum(1) - (near * wrong).sum(1) / wrong.sum(1)
            assert values == pytest.approx(margin[part].per_episode[(slice(None), *head)], abs=1e-5)
            assert found.correct is not None
            assert np.array_equal(found.correct, margin.correct)


def test_a_map_of_a_toys_keys_is_fitted_and_marked_against_its_answers() -> None:
    planted = planted_induction(n_heads=2)
    batch = toy_batch(40, 3, 1, renderer=planted.model.renderer)
    given = contrast_pairs(planted.model, batch, at="before", part="v", name="toy", progress=False)
    assert given.heads == ((1, 0), (1, 1))
    found = contrast_map(given, epochs=10)
    assert found.plain.value == 1
    assert found.score.value == 1
    assert found.auroc is not None
    assert np.isnan(found.auroc.value)  # every answer is right
    assert found.provenance.task == "toy"
    assert contrast_pairs(planted.model, batch, answers=False, progress=False).correct is None


def test_refusals(untyped: None) -> None:
    given = pairs(20)
    wrong: list[dict[str, Any]] = [
        {"kind": "deep"}, {"d_out": 0}, {"margin": 0.0}, {"lr": 0.0}, {"weight_decay": -1.0}, {"epochs": 0}, {"patience": 0}, {"batch_size": 0},
        {"shares": (0.5, 0.5, 0.0)}, {"kind": "mixed"},
    ]  # fmt: skip
    for options in wrong:
        with pytest.raises(OptionError):
            contrast_map(given, **options)
    one_head = replace(given, query=given.query[:, :1], exemplars=given.exemplars[:, :, :1])
    with pytest.raises(OptionError, match="attention"):
        contrast_map(one_head, kind="attention")
    with pytest.raises(OptionError, match="shape"):
        contrast_map([given, one_head])
    with pytest.raises(OptionError, match="none"):
        contrast_map([])
    with pytest.raises(EpisodeError, match="at least 10"):
        contrast_map(pairs(8))
    with pytest.raises(NotFiniteError):
        replace(given, query=np.full_like(given.query, np.nan))
    with pytest.raises(OptionError, match="right and a wrong"):
        replace(given, right=np.ones_like(given.right))
    with pytest.raises(OptionError, match="shape"):
        replace(given, items=given.items[:, :1])
    with pytest.raises(OptionError, match="vectors"):
        apply_map(contrast_map(given, epochs=2), given.query[..., :3])


def test_refusals_of_pairs(untyped: None) -> None:
    planted = planted_induction(n_heads=2)
    batch = toy_batch(12, 2, 1, renderer=planted.model.renderer)
    for options in ({"part": "q"}, {"at": "x"}, {"heads": []}):
        with pytest.raises(OptionError):
            contrast_pairs(planted.model, batch, progress=False, **options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(HeadIndexError):
        contrast_pairs(planted.model, batch, heads=[(0, 5)], progress=False)
