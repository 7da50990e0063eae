"""Toy sequences against their definitions: statistics with controls that fail, an independent sampler, identities for any settings, refusals."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import gen, unchecked
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mechicl.data import worlds
from mechicl.data.chances import frequencies
from mechicl.data.gaussian import (
    Draw,
    MultimodalTask,
    Task,
    UnimodalTask,
    chance,
    draw,
    draw_many,
    draw_second,
    layout,
    second_shape,
    world,
)
from mechicl.errors import OptionError

P = 1e-4
"""Seeds are fixed: a right sampler passes each test once and for all unless it is among the worst in ten thousand."""


def fits(counts: Any, expected: Any) -> float:
    """p of counts under expected shares."""
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    return float(stats.chisquare(counts, expected / expected.sum() * counts.sum()).pvalue)


def counted(x: torch.Tensor, n: int) -> np.ndarray:
    return torch.bincount(x.flatten(), minlength=n).numpy()


# -- vectors --------------------------------------------------------------------------------------------------------------------------------------


def test_class_means_and_label_vectors_are_normal_with_variance_one_over_the_width() -> None:
    home = world(UnimodalTask(K=2048, D=48, seed=3))
    for table in (home.labels, home.means):
        entries = (table * 48**0.5).flatten().numpy()
        assert stats.kstest(entries, "norm").pvalue > P
        assert stats.kstest(entries * 1.3, "norm").pvalue < P
    overlap = (home.labels @ home.means.T).flatten().numpy() * 48**0.5
    assert abs(overlap.mean()) < 5 / len(overlap) ** 0.5


def residuals(drawn: Draw, eps: float) -> torch.Tensor:
    """Noise of every item, [n, N + 1, D], in units in which it is standard normal."""
    task, at = drawn.task, drawn.layout
    items = drawn.tokens[:, [*at.item, at.query]]
    means = world(task).means[torch.cat([drawn.item, drawn.query[:, None]], 1)]
    return (items * (1 + eps**2) ** 0.5 - means) / eps * task.width**0.5


@pytest.mark.parametrize("eps", [0.1, 0.75])
def test_items_are_noisy_class_means_and_labels_have_no_noise(eps: float) -> None:
    task = UnimodalTask(K=64, L=8, D=32, eps=eps)
    drawn = draw(task, 400, gen())
    assert torch.equal(drawn.tokens[:, list(drawn.layout.label)], world(task).labels[drawn.label])
    noise = residuals(drawn, eps)
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > P
    assert noise.mean((0, 1)).abs().max() < 5 / (400 * 9) ** 0.5
    items = draw(UnimodalTask(K=4096, eps=eps), 400, gen()).tokens[:, 0:16:2]
    assert float(items.pow(2).sum(-1).mean()) == pytest.approx(1, abs=0.02)  # D / D, whatever eps; 3200 items of standard deviation 0.18


def test_noise_is_fresh_at_each_occurrence_of_a_class() -> None:
    drawn = draw(UnimodalTask(K=64, L=8, D=32, no_repeats=True), 2000, gen())
    noise = residuals(drawn, 0.1)
    slot = drawn.same.long().argmax(1)  # the first exemplar of the query's class
    rows = torch.arange(2000)
    pair = (noise[rows, slot] * noise[:, -1]).sum(-1).numpy()
    assert stats.ttest_1samp(pair, 0).pvalue > P
    assert stats.ttest_1samp((noise[rows, slot] * noise[rows, slot]).sum(-1).numpy(), 0).pvalue < P


@pytest.mark.parametrize("seed", range(3))
def test_the_generators_seed_may_be_the_worlds(seed: int) -> None:
    """A world drawn from the bare seed would repeat itself in the noise of a caller who seeds alike."""
    task = UnimodalTask(K=64, L=32, D=64, seed=seed)
    noise = torch.randn(64, 64, generator=gen(seed))
    for table in (world(task).labels, world(task).means):
        both = np.corrcoef(table.flatten().numpy(), noise.flatten()[: table.numel()].numpy())[0, 1]
        assert abs(both) < 5 / table.numel() ** 0.5


# -- classes and slots ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.5])
def test_classes_come_with_their_frequencies(alpha: float) -> None:
    task = UnimodalTask(K=32, L=8, N=2, B=1, alpha=alpha)  # B = 1: every slot is drawn by itself
    drawn = draw(task, 8000, gen(1))
    expected = np.arange(1, 33.0) ** -alpha
    assert fits(counted(drawn.item, 32), expected) > P
    assert fits(counted(drawn.query, 32), expected) > P
    assert fits(counted(drawn.item, 32), np.arange(1, 33.0) ** -(alpha + 0.2)) < P
    assert fits(counted(drawn.label, 8), expected.reshape(4, 8).sum(0)) > P
    loose = draw(replace(task, p_B=0.0), 8000, gen(2))
    assert fits(counted(loose.item, 32), expected) > P


def test_a_class_has_its_number_modulo_the_labels() -> None:
    drawn = draw(UnimodalTask(K=64, L=16), 200, gen())
    assert torch.equal(drawn.label, drawn.item % 16)
    assert torch.equal(drawn.target, drawn.query % 16)


@pytest.mark.parametrize(("n", "b"), [(8, 1), (8, 2), (8, 4), (12, 3)])
def test_a_bursty_sequence_shows_every_class_b_times_in_random_order(n: int, b: int) -> None:
    drawn = draw(UnimodalTask(K=8192, N=n, B=b, no_repeats=True), 3000, gen(n + b))
    for row in drawn.item[:300].tolist():
        assert set(Counter(row).values()) == {b}
    assert torch.equal(drawn.same.sum(1), torch.full((3000,), b))
    assert fits(drawn.same.sum(0).numpy(), np.ones(n)) > P  # the query's class stands anywhere
    if b > 1:
        together = [(drawn.item[:, i] == drawn.item[:, j]).sum() for i in range(n) for j in range(i)]
        share = (b - 1) / (n - 1)
        assert max(abs(float(c) / 3000 - share) for c in together) < 5 * (share * (1 - share) / 3000) ** 0.5


def test_without_no_repeats_two_classes_may_coincide_or_share_a_label_as_often_as_chance_has_it() -> None:
    task = UnimodalTask(K=16, L=4, N=4, B=2)  # two classes
    item = draw(task, 8000, gen(3)).item.sort(1).values
    coincide, share = int((item[:, 0] == item[:, 3]).sum()), int((item[:, 0] % 4 == item[:, 3] % 4).sum())
    assert stats.binomtest(coincide, 8000, 1 / 16).pvalue > P
    assert stats.binomtest(share, 8000, 1 / 4).pvalue > P
    label = draw(replace(task, no_repeats=True), 2000, gen(3)).label.sort(1).values
    assert bool((label[:, 0] != label[:, 3]).all())


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_labels_that_do_not_repeat_are_all_alike_and_their_classes_keep_their_frequencies(alpha: float) -> None:
    task = UnimodalTask(K=16, L=4, N=4, B=2, no_repeats=True, alpha=alpha)
    item = draw(task, 8000, gen(4)).item[:, 0]
    assert fits(counted(item % 4, 4), np.ones(4)) > P
    inside = frequencies(16, alpha).reshape(4, 4)
    for label in range(4):
        assert fits(counted(item[item % 4 == label] // 4, 4), inside[:, label]) > P


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_shares_of_bursty_and_novel_sequences(share: float) -> None:
    loose = draw(UnimodalTask(p_B=share), 4000, gen(5))  # of 8192 classes two loose slots agree once in 8192
    bursty = int((loose.item.sort(1).values.diff(dim=1) == 0).sum(1).ge(4).sum())
    assert stats.binomtest(bursty, 4000, share).pvalue > P
    drawn = draw(UnimodalTask(K=64, p_C=share, p_B=0.5), 4000, gen(6))
    novel = drawn.item >= 64
    assert torch.equal(novel.any(1), novel.all(1))
    assert torch.equal(novel[:, 0], drawn.query >= 64)
    assert stats.binomtest(int(novel[:, 0].sum()), 4000, share).pvalue > P
    if share:
        counts = [set(Counter(row).values()) for row in drawn.item[novel[:, 0]].tolist()]
        assert all(all(k % 2 == 0 for k in found) for found in counts)  # novel classes: always bursty


# -- splits ---------------------------------------------------------------------------------------------------------------------------------------


def test_novel_classes_are_new_in_every_draw_and_labelled_in_turn() -> None:
    task = UnimodalTask(K=64, L=8, D=32, eps=0.1)
    one, two = draw(task, 300, gen(1), split="ic"), draw(task, 300, gen(2), split="ic")
    assert int(one.item.min()) >= 64
    assert int(one.item.max()) < 64 + 128
    assert torch.equal(one.label, one.item % 8)
    assert fits(counted(one.item - 64, 128) // 2, np.ones(128)) > P  # they come in twos

    def mean(drawn: Draw, cls: int) -> torch.Tensor:
        return drawn.tokens[:, list(drawn.layout.item)][drawn.item == cls].mean(0)

    close = torch.stack([mean(one, c) @ mean(one, c) for c in range(64, 96)])
    apart = torch.stack([mean(one, c) @ mean(two, c) for c in range(64, 96)])
    known = torch.stack([mean(one, c) @ world(task).means[c - 64] for c in range(64, 96)])
    assert float(close.mean()) == pytest.approx(1, abs=0.15)  # |mean|^2 is 1 with a standard deviation of 0.25, over 32 classes
    for other in (apart, known):
        assert abs(float(other.mean())) < 5 * (1 / 32 / 32) ** 0.5


def test_novel_class_means_have_the_variance_of_the_others() -> None:
    items = draw(UnimodalTask(K=64, D=32, eps=0.0), 500, gen(), split="ic").tokens[:, 0:16:2].reshape(-1, 32)
    means = torch.unique(items, dim=0)
    assert len(means) == 128
    assert stats.kstest((means * 32**0.5).flatten().numpy(), "norm").pvalue > P
    second = draw(MultimodalTask(K1=64, K2=64, L=8, D2=32, eps2=0.0), 500, gen(), split="ic").second
    assert second is not None
    means = torch.unique(second.reshape(-1, 32), dim=0)
    assert len(means) == 128
    assert stats.kstest((means * 32**0.5).flatten().numpy(), "norm").pvalue > P
    wide = draw(MultimodalTask(K1=64, K2=64, L=8, eps1=0.75, eps2=0.75), 500, gen(), split="ic")
    assert wide.second is not None
    for items in (wide.tokens[:, 0:24:3], wide.second):  # an item's length is 1 on average, whatever eps
        assert float(items.pow(2).sum(-1).mean()) == pytest.approx(1, abs=0.06)  # 128 classes of standard deviation 0.11, and noise


@pytest.mark.parametrize("swap", [False, True])
def test_ic2_moves_every_label_by_one_more_than_training(swap: bool) -> None:
    task = UnimodalTask(K=64, L=8, swap=swap)
    for split, shift in (("train", swap), ("iw", swap), ("ic2", 1 + swap)):
        drawn = draw(task, 100, gen(), split=split)
        assert torch.equal(drawn.label, (drawn.item + shift) % 8)
        assert torch.equal(drawn.target, (drawn.query + shift) % 8)
        assert torch.equal(drawn.tokens[:, 1], world(task).labels[drawn.label[:, 0]])
    assert int(drawn.item.max()) < 64


def test_in_iw_the_query_is_independent_of_the_context_and_in_training_it_is_not() -> None:
    task = UnimodalTask(K=4, L=4, N=4, B=2)
    for split, independent in (("iw", True), ("train", False)):
        drawn = draw(task, 4000, gen(7), split=split)
        table = np.zeros((4, 4))
        np.add.at(table, (drawn.target.numpy(), drawn.label[:, 0].numpy()), 1)
        assert (stats.chi2_contingency(table).pvalue > P) == independent


MANY: list[Task] = [
    UnimodalTask(K=64, L=8),
    UnimodalTask(K=64, L=8, alpha=1.2, p_B=0.4, p_C=0.3),
    UnimodalTask(K=64, L=8, B=4, alpha=1.0, no_repeats=True, p_B=0.5),
    MultimodalTask(K1=64, K2=16, L=8, L2=4),
    MultimodalTask(K1=64, K2=16, L=8, B=2, alpha1=1.0, alpha2=0.7, p_B=0.5, p_C=0.2, labels="joint", G1=2, G2=4),
    MultimodalTask(K1=64, K2=16, L=8, B=2, no_repeats=True, labels="joint", G1=2, G2=4),
    MultimodalTask(K1=64, K2=16, L=16, B=2, p_B=0.6, alpha1=1.0, labels="crossed", G1=4, G2=4),
]


@pytest.mark.parametrize("split", ["train", "ic", "ic2", "iw"])
@pytest.mark.parametrize("task", MANY)
def test_chance_is_what_copying_and_guessing_get(task: Task, split: Any) -> None:
    n = 8000
    level, drawn = chance(task, split), draw(task, n, gen(8), split=split)
    copied = drawn.right.double().mean(1)
    assert abs(float(copied.mean()) - level["context"]) < 5 * float(copied.std()) / n**0.5 + 1e-9
    counts = counted(drawn.target, task.L)
    assert abs(counts.max() / n - level["frequent"]) < 6 * (level["frequent"] / n) ** 0.5  # the largest of several: a little more than five
    assert level["label"] == pytest.approx(1 / (counts > 0).sum())
    assert level["context"] >= level["label"] - 1e-9


# -- another path ---------------------------------------------------------------------------------------------------------------------------------


def by_hand(task: UnimodalTask, n: int, seed: int) -> list[tuple[int, ...]]:
    """Sequences by the definition, one by one: labels of the slots and of the query."""
    rng, found = np.random.default_rng(seed), []
    p = frequencies(task.K, task.alpha)
    for _ in range(n):
        if rng.random() < task.p_B:
            classes = rng.choice(task.K, task.N // task.B, p=p)
            slots = rng.permutation(np.tile(classes, task.B))
            query = slots[rng.integers(task.N)]
        else:
            slots, query = rng.choice(task.K, task.N, p=p), rng.choice(task.K, p=p)
        found.append((*(slots % task.L), query % task.L))
    return found


def test_sequences_are_those_of_a_plain_loop_over_the_definition() -> None:
    task = UnimodalTask(K=12, L=3, N=6, B=2, p_B=0.6, alpha=0.8)
    drawn = draw(task, 6000, gen(9))
    rows = torch.cat([drawn.label, drawn.target[:, None]], 1).tolist()

    def compare(other: list[tuple[int, ...]]) -> float:
        """p that both come from one distribution: label counts of the context and the query's label together."""
        kinds = [Counter((tuple(sorted(Counter(row[:-1]).items())), row[-1]) for row in map(tuple, some)) for some in (rows, other)]
        names = [name for name in set(kinds[0]) | set(kinds[1]) if kinds[0][name] + kinds[1][name] > 10]
        return float(stats.chi2_contingency([[k[name] for name in names] for k in kinds]).pvalue)

    assert compare(by_hand(task, 6000, 1)) > P
    assert compare(by_hand(replace(task, p_B=0.5), 6000, 1)) < P
    assert compare(by_hand(replace(task, alpha=0.5), 6000, 1)) < P


# -- two modalities -------------------------------------------------------------------------------------------------------------------------------

SMALL = MultimodalTask(K1=64, K2=16, L=8, L2=4, D1=24, D2=20, B=2)


def test_positions_of_everything() -> None:
    one, two = layout(UnimodalTask(N=4)), layout(MultimodalTask(N=4, B=2))
    assert (one.item, one.label, one.second, one.query, one.query_second, one.n_pos) == ((0, 2, 4, 6), (1, 3, 5, 7), (), 8, None, 9)
    assert (two.item, two.second, two.label) == ((0, 3, 6, 9), (1, 4, 7, 10), (2, 5, 8, 11))
    assert (two.query, two.query_second, two.n_pos, two.last) == (12, 13, 14, 13)


def test_a_decoder_of_one_modality_meets_the_same_world_in_two() -> None:
    one, two = world(UnimodalTask(K=64, L=8, D=24, seed=5)), world(replace(SMALL, seed=5))
    assert torch.equal(one.labels, two.labels)
    assert torch.equal(one.means, two.means)
    assert not torch.equal(one.labels, world(replace(SMALL, seed=6)).labels)


def test_a_pair_shares_its_label_and_comes_back_whole() -> None:
    drawn = draw(SMALL, 3000, gen(10))
    assert drawn.item2 is not None
    assert drawn.query2 is not None
    assert torch.equal(drawn.label, drawn.item2 % 4)
    assert torch.equal(drawn.label, drawn.item % 8)
    assert int(drawn.label.max()) == 3  # modality 2 knows the first four labels only
    assert torch.equal(drawn.query % 8, drawn.target)
    for pairs in (drawn.item * 16 + drawn.item2)[:200].tolist():
        assert {k % 2 for k in Counter(pairs).values()} == {0}
    assert torch.equal(drawn.same, (drawn.item == drawn.query[:, None]) & (drawn.item2 == drawn.query2[:, None]))
    first = drawn.item[:, 0]
    for label in range(4):  # the partner is any class of the label
        assert fits(counted(first[first % 8 == label] // 8, 8), np.ones(8)) > P


def test_class_frequencies_of_both_modalities() -> None:
    drawn = draw(replace(SMALL, alpha1=1.0, alpha2=0.8), 8000, gen(11))
    assert drawn.item2 is not None
    first, second = drawn.item[:, 0], drawn.item2[:, 0]
    assert fits(counted(second, 16), frequencies(16, 0.8)) > P
    inside = frequencies(64, 1.0).reshape(8, 8)
    for label in range(4):
        assert fits(counted(first[first % 8 == label] // 8, 8), inside[:, label]) > P
    assert fits(counted(second, 16), frequencies(16, 1.0)) < P


def test_second_items_are_noisy_means_and_their_slots_are_empty() -> None:
    drawn = draw(SMALL, 400, gen(12))
    assert drawn.second is not None
    assert drawn.item2 is not None
    assert drawn.query2 is not None
    assert drawn.second.shape == (400, 9, 20)
    assert second_shape(SMALL) == (20,)
    assert not drawn.tokens[:, [*drawn.layout.second, drawn.layout.last]].any()
    means = world(SMALL).means2
    assert means is not None
    noise = (drawn.second * 1.01**0.5 - means[torch.cat([drawn.item2, drawn.query2[:, None]], 1)]) / 0.1 * 20**0.5
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > P
    assert stats.kstest(residuals(drawn, 0.1).flatten().numpy(), "norm").pvalue > P
    values, classes = draw_second(SMALL, 4000, gen(13))
    noise = (values * 1.01**0.5 - means[classes]) / 0.1 * 20**0.5
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > P
    assert fits(counted(classes, 16), np.ones(16)) > P


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (MultimodalTask(), (128, 32)),  # floor(128 * 256 / 8192) = 4 is less than L2
        (MultimodalTask(K1=1024, K2=1024), (128, 128)),
        (MultimodalTask(K1=1024, K2=528, L2=16), (128, 64)),  # 66, rounded down to a multiple of 16
        (MultimodalTask(K1=1024, K2=512, labels="joint", G1=4, G2=8), (128, 64)),
    ],
)
def test_numbers_of_novel_classes(task: MultimodalTask, expected: tuple[int, int]) -> None:
    assert (task.novel, task.novel2) == expected
    drawn = draw(task, 500, gen(14), split="ic")
    assert drawn.item2 is not None
    assert int(drawn.item.min()) >= task.K1
    assert int(drawn.item2.min()) >= task.K2
    assert int(drawn.item2.max()) < task.K2 + task.novel2
    if task.labels == "pair":
        assert torch.equal(drawn.label, drawn.item2 % task.n_labels)
        assert torch.equal(drawn.label, drawn.item % task.L)


def test_joint_labels_are_made_of_both_groups() -> None:
    task = MultimodalTask(K1=64, K2=16, L=8, labels="joint", G1=2, G2=4, B=2)
    for split in ("train", "ic", "iw"):
        drawn = draw(task, 4000, gen(15), split=split)
        assert drawn.item2 is not None
        assert drawn.query2 is not None
        assert torch.equal(drawn.label, drawn.item % 2 * 4 + drawn.item2 % 4)
        assert torch.equal(drawn.target, drawn.query % 2 * 4 + drawn.query2 % 4)
        table = np.zeros((2, 4))
        np.add.at(table, (drawn.item[:, 0].numpy() % 2, drawn.item2[:, 0].numpy() % 4), 1)
        assert stats.chi2_contingency(table).pvalue > P
    whole = draw(replace(task, no_repeats=True), 500, gen(16))
    assert all(len(set(row)) == 4 for row in whole.label.tolist())


def told_by_one(drawn: Draw) -> float:
    """How often the query's class of one modality tells the label, for a reader of the context that knows nothing else. Means over modalities."""
    shares = []
    for items, query in ((drawn.item, drawn.query), (drawn.item2, drawn.query2)):
        assert items is not None
        assert query is not None
        alike = items == query[:, None]
        shares.append(((alike & drawn.right).sum(1) / alike.sum(1)).mean())
    return float(sum(shares) / 2)


def test_one_modality_alone_tells_a_joint_label_but_not_a_crossed_one() -> None:
    joint = MultimodalTask(K1=64, K2=64, L=16, labels="joint", G1=4, G2=4, B=2)
    assert told_by_one(draw(joint, 1000, gen(17))) > 0.95
    for split in ("train", "ic", "ic2"):
        drawn = draw(replace(joint, labels="crossed"), 1000, gen(18), split=split)
        assert told_by_one(drawn) == pytest.approx(0.5, abs=1e-6)  # two classes of the other modality go with it
        assert torch.equal(drawn.right.sum(1), torch.full((1000,), 2))
        assert torch.equal(drawn.same, drawn.right)


def test_the_query_of_modality_one_on_off_and_mismatched() -> None:
    on, off, wrong = (draw(replace(SMALL, m1_query=kind, p_C=0.3), 600, gen(19)) for kind in ("on", "off", "mismatched"))
    at = on.layout.query
    assert torch.equal(on.target, on.query % 8)
    assert not off.tokens[:, at].any()
    assert torch.equal(off.tokens[:, :at], on.tokens[:, :at])  # nothing else changes
    assert off.second is not None
    assert on.second is not None
    assert torch.equal(off.second, on.second)
    assert bool((wrong.query % 8 != wrong.target).all())
    context = (wrong.item == wrong.query[:, None]).any(1)
    several = (wrong.label != wrong.target[:, None]).any(1)
    assert torch.equal(context, several)  # an exemplar's, unless all have the target's label
    assert 0 < int((~several).sum()) < 60
    assert wrong.item2 is not None
    assert wrong.query2 is not None
    assert torch.equal(wrong.same, wrong.item2 == wrong.query2[:, None])
    assert torch.equal(wrong.query >= 64, wrong.item[:, 0] >= 64)  # novel among novel
    known = wrong.query < 64
    noise = residuals(wrong.rows(known), 0.1)
    assert stats.kstest(noise[:, -1].flatten().numpy(), "norm").pvalue > P


def test_pairs_of_sequences_that_are_not_bursty_share_a_label_or_do_not() -> None:
    for kind, together in (("label", 1.0), ("independent", 1 / 8)):
        drawn = draw(replace(SMALL, iid_pairs=kind), 2000, gen(20), split="iw")
        assert drawn.item2 is not None
        agree = drawn.item % 8 == drawn.label
        assert torch.equal(drawn.label, drawn.item2 % 4)
        assert stats.binomtest(int(agree.sum()), agree.numel(), together).pvalue > P
        assert int((drawn.query % 8 == drawn.target).sum()) / 2000 == pytest.approx(together, abs=0.05)


# -- draws ----------------------------------------------------------------------------------------------------------------------------------------


def same_bytes(one: Draw, two: Draw) -> bool:
    names = [name for name in Draw.__dataclass_fields__ if isinstance(getattr(one, name), torch.Tensor)]
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in names)


@pytest.mark.parametrize("task", MANY)
def test_the_generator_decides_everything_and_nothing_global_does(task: Task) -> None:
    before = torch.random.get_rng_state()
    one = draw(task, 20, gen(1))
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert same_bytes(one, draw(task, 20, gen(1)))
    assert not torch.equal(one.item, draw(task, 20, gen(2)).item)
    torch.random.set_rng_state(before)
    source = gen(3)
    first, second = draw(task, 20, source), draw(task, 20, source)
    assert not torch.equal(first.tokens, second.tokens)


TOGETHER: list[list[Task]] = [
    [UnimodalTask(K=64, L=8, D=16, seed=k) for k in range(3)],
    [UnimodalTask(K=64, L=8, D=16, seed=k, alpha=k, eps=0.1 + k, p_B=1 - k / 4, p_C=k / 4, swap=k > 0) for k in range(3)],
    [replace(SMALL, seed=k, alpha1=k, alpha2=k / 2, eps1=0.1 + k, eps2=0.2 + k, p_B=1 - k / 4, p_C=k / 4) for k in range(3)],
    [replace(SMALL, seed=k, m1_query="mismatched") for k in range(2)],
    [MultimodalTask(K1=64, K2=4, L=16, L2=2, n_novel=16, second="digits", seed=k, D1=8, p_C=k / 2) for k in range(2)],
]


@pytest.mark.parametrize("split", ["train", "ic", "ic2", "iw"])
@pytest.mark.parametrize("tasks", TOGETHER)
def test_drawing_together_gives_what_drawing_one_by_one_gives(tasks: list[Task], split: Any) -> None:
    sources = [gen(k) for k in range(len(tasks))]
    many = draw_many(tasks, 30, sources, split)
    assert many.n == len(many) == 30
    for k, task in enumerate(tasks):
        source = gen(k)
        alone = draw(task, 30, source, split=split)
        member = many.member(k)
        assert torch.equal(source.get_state(), sources[k].get_state())
        assert (member.task, member.tasks) == (task, ())
        for name in ("item", "label", "query", "target", "right", "same"):
            assert torch.equal(getattr(member, name), getattr(alone, name)), name
        assert torch.allclose(member.tokens, alone.tokens, atol=1e-6)  # float32: noise is scaled before or while it is added
        if alone.second is not None:
            assert member.second is not None
            assert torch.allclose(member.second, alone.second, atol=1e-6)
            assert torch.equal(member.item2, alone.item2)


def test_tables_are_kept_up_to_a_limit_and_forgetting_them_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [UnimodalTask(K=64, L=8, D=16, seed=k) for k in range(3)]
    size = (64 + 8 + 1) * 16 * 4
    monkeypatch.setattr(worlds, "_kept", {})
    monkeypatch.setattr(worlds, "KEEP", 2 * size)
    before = [draw(task, 4, gen()) for task in few]
    assert [key[0] for key in worlds._kept] == [(few[1],), (few[2],)]
    draw(few[1], 4, gen())
    draw(few[0], 4, gen())
    assert [key[0] for key in worlds._kept] == [(few[1],), (few[0],)]  # the longest unused went
    assert all(same_bytes(draw(task, 4, gen()), one) for task, one in zip(few, before, strict=True))
    draw_many(few, 4, [gen() for _ in few])
    assert [len(key[0]) for key in worlds._kept] == [3]  # more than the limit by itself


def test_part_of_a_draw() -> None:
    drawn = draw(SMALL, 10, gen())
    few = drawn.rows(slice(2, 5))
    assert few.n == 3
    assert torch.equal(few.tokens, drawn.tokens[2:5])
    assert few.second is not None
    assert same_bytes(drawn, drawn.to("cpu"))
    with pytest.raises(OptionError, match="several tasks"):
        drawn.member(0)


@st.composite
def any_settings(pick: st.DrawFn) -> tuple[type, dict[str, Any]]:
    blocks, b = pick(st.integers(2, 4)), pick(st.integers(1, 3))
    common: dict[str, Any] = {
        "N": blocks * b, "B": b, "p_B": pick(st.sampled_from([0.0, 0.5, 1.0])), "p_C": pick(st.sampled_from([0.0, 0.5, 1.0])),
        "swap": pick(st.booleans()), "seed": pick(st.integers(0, 3)), "n_novel": pick(st.integers(1, 40)),
    }  # fmt: skip
    alphas, spread = st.sampled_from([0.0, 0.7, 2.0]), st.sampled_from([0.0, 0.1, 1.0])
    if pick(st.booleans()):
        labels = pick(st.integers(4, 9))
        return UnimodalTask, dict(
            K=labels * pick(st.integers(1, 5)), L=labels, D=pick(st.integers(1, 20)), eps=pick(spread), alpha=pick(alphas),
            no_repeats=pick(st.booleans()), **common,
        )  # fmt: skip
    kind = pick(st.sampled_from(["pair", "joint", "crossed"] if blocks == 4 else ["pair", "joint"]))
    g1, g2 = pick(st.integers(2, 4)), pick(st.integers(2, 4))
    labels = g1 * g2
    known = pick(st.integers(4, labels))
    common |= {"D1": pick(st.integers(1, 12)), "D2": pick(st.integers(1, 12)), "eps1": pick(spread), "eps2": pick(spread)}
    common |= {"alpha1": pick(alphas), "alpha2": pick(alphas), "no_repeats": pick(st.booleans()), "L": labels, "labels": kind}
    if kind == "pair":
        return MultimodalTask, dict(
            K1=labels * pick(st.integers(1, 4)), K2=known * pick(st.integers(1, 4)), L2=known, iid_pairs=pick(st.sampled_from(["label", "independent"])),
            m1_query=pick(st.sampled_from(["on", "off", "mismatched"])), **common,
        )  # fmt: skip
    return MultimodalTask, dict(
        K1=g1 * pick(st.integers(1, 4)),
        K2=g2 * pick(st.integers(1, 4)),
        G1=g1,
        G2=g2,
        m1_query=pick(st.sampled_from(["on", "off"])),
        **common,
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(any_settings(), st.sampled_from(["train", "ic", "ic2", "iw"]), st.integers(1, 6), st.integers(0, 9))
def test_any_draw_is_whole(about: tuple[type, dict[str, Any]], split: Any, n: int, seed: int) -> None:
    """For any settings: labels follow from classes, truth from labels, tokens are what they are said to be, bursty sequences have the answer."""
    task = about[0](**about[1])
    drawn, home, at = draw(task, n, gen(seed), split=split), world(task), layout(task)
    assert drawn.tokens.shape == (n, at.n_pos, task.width)
    assert torch.equal(drawn.tokens[:, list(at.label)], home.labels[drawn.label])
    assert torch.equal(drawn.right, drawn.label == drawn.target[:, None])
    assert bool((drawn.right | ~drawn.same).all())  # the same class has the same label
    assert int(drawn.label.max()) < task.n_labels
    assert 0 <= int(drawn.item.min()) <= int(drawn.item.max()) < task.n_items + task.novel
    novel = drawn.item[:, 0] >= task.n_items
    assert bool((novel[:, None] == (drawn.item >= task.n_items)).all())
    if split in ("ic", "ic2"):
        assert bool(drawn.same.any(1).all())
    if split == "iw" or (split == "train" and task.p_C == 0) or split == "ic2":
        assert not bool(novel.any())
    if isinstance(task, MultimodalTask):
        assert drawn.second is not None
        assert drawn.item2 is not None
        assert drawn.second.shape == (n, task.N + 1, task.D2)
        assert torch.equal(drawn.item2[:, 0] >= task.K2, novel)
        eps = task.eps1
    else:
        assert drawn.second is None
        eps = task.eps
    if eps == 0:
        known = ~novel
        assert torch.allclose(drawn.tokens[known][:, list(at.item)], home.means[drawn.item[known]], atol=1e-6)
    assert bool(torch.isfinite(drawn.tokens).all())
    levels = chance(task, split)
    assert all(0 <= level <= 1 + 1e-9 for level in levels.values())


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"K": 100}, "L must divide K.*got 32 and 100.*nearest K is 96"),
    ({"K": 16}, "L must divide K"),
    ({"B": 3}, "B must divide N"),
    ({"B": 8}, "B must divide N and be below it"),
    ({"N": 1, "B": 1}, "B must divide N and be below it"),
    ({"B": 0}, "B must be a whole number of at least 1"),
    ({"K": 64.0}, "K must be a whole number"),
    ({"K": True}, "K must be a whole number"),
    ({"L": 1}, "L must be at least 2"),
    ({"p_B": 1.1}, "p_B must be a share"),
    ({"p_C": float("nan")}, "p_C must be a share"),
    ({"eps": -0.1}, "eps must be a number of at least 0"),
    ({"alpha": float("inf")}, "alpha must be a number"),
    ({"L": 2, "B": 2, "no_repeats": True}, "N / B must be at most L.*got 4 and 2"),
]
REFUSED_MULTI: list[tuple[dict[str, Any], str]] = [
    ({"K1": 100}, "L must divide K1"),
    ({"K2": 100}, "L2 must divide K2"),
    ({"L2": 64, "K2": 64}, "L2 must be 2..L"),
    ({"L2": 1}, "L2 must be 2..L"),
    ({"labels": "both"}, "labels must be one of"),
    ({"labels": "joint"}, "G1 \\* G2 must be L"),
    ({"labels": "joint", "G1": 4, "G2": 4}, "G1 \\* G2 must be L = 32"),
    ({"labels": "joint", "G1": 4, "G2": 8, "L2": 8}, "L2 must be None"),
    ({"labels": "joint", "G1": 4, "G2": 8, "K2": 100}, "G2 must divide K2"),
    ({"labels": "joint", "G1": 4, "G2": 8, "m1_query": "mismatched"}, 'm1_query must be "on" or "off"'),
    ({"labels": "crossed", "G1": 4, "G2": 8}, "cells of a grid.*got 2 = 1 x 2"),
    ({"labels": "crossed", "G1": 4, "G2": 8, "N": 10, "B": 2}, "cells of a grid"),
    ({"labels": "crossed", "G1": 1, "G2": 32, "B": 2}, "cells of a grid"),
    ({"G1": 4, "G2": 8}, "G1 and G2 must be None"),
    ({"m1_query": "maybe"}, "m1_query must be one of"),
    ({"iid_pairs": "maybe"}, "iid_pairs must be one of"),
    ({"L2": 2, "B": 2, "no_repeats": True}, "N / B must be at most the 2 labels"),
]


def test_impossible_settings_are_refused_with_the_rule() -> None:
    with unchecked():
        for kind, cases in ((UnimodalTask, REFUSED), (MultimodalTask, REFUSED_MULTI)):
            for given_settings, message in cases:
                with pytest.raises(OptionError, match=message):
                    kind(**given_settings)


def test_impossible_draws_are_refused() -> None:
    task = UnimodalTask(K=64)
    with unchecked():
        with pytest.raises(OptionError, match="split must be one of"):
            draw(task, 4, gen(), split="test")  # type: ignore[arg-type]
        with pytest.raises(OptionError, match="split must be one of"):
            chance(task, "test")  # type: ignore[arg-type]
        with pytest.raises(OptionError, match="multimodal"):
            draw_second(task, 4, gen())  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="n must be at least 1"):
        draw(task, 0, gen())
    with pytest.raises(OptionError, match="device must be the generator's own"):
        draw(task, 4, gen(), device="meta")
    with pytest.raises(OptionError, match="generators must be one for each of 2 tasks"):
        draw_many([task, task], 4, [gen()])
    with pytest.raises(OptionError, match="tasks must be at least one"):
        draw_many([], 4, [])
    with pytest.raises(OptionError, match="the same K; got 64 and 96"):
        draw_many([task, replace(task, K=96)], 4, [gen(), gen()])
    with pytest.raises(OptionError, match="of one kind"):
        draw_many([task, SMALL], 4, [gen(), gen()])
    with pytest.raises(OptionError, match="second must be one of"):
        draw(replace(SMALL, second="nothing"), 4, gen())


def test_a_training_batch_of_the_papers_size_is_drawn_in_a_fraction_of_a_step() -> None:
    """0.4 ms on the machine where the paper's training step takes 14.7 and its data 4.6; ten times that leaves room for a busy one."""
    task, source = UnimodalTask(), gen()
    with unchecked():
        draw(task, 128, source)
        took = []
        for _ in range(30):
            start = time.perf_counter()
            draw(task, 128, source)
            took.append(time.perf_counter() - start)
    assert min(took) < 0.004
