"""Link-context episodes: every published probability as a distribution, and nothing that tells the answer but the link."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from conftest import picture, unchecked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest, chisquare

import mechicl
from mechicl.data import concepts
from mechicl.data.isekai_made import generated_pool, partners
from mechicl.data.link_context import PUBLISHED, SENTENCES, SHORT, STRATEGIES, link_episodes, link_prompt, pseudo_label, syllable_label
from mechicl.data.link_pool import LinkClass, Pool
from mechicl.data.looks import class_ids, kind_of, look
from mechicl.data.neighbours import Neighbours, rank_chances
from mechicl.errors import EpisodeError, ImageError, OptionError
from mechicl.prompts.episode import Episode
from mechicl.prompts.render import Renderer
from mechicl.training.evaluate import answer

PAPER = ("2-way", "2-way-random", "2-way-weight")
RELEASED = ("policy_2way_weight", "policy_2way_random_shot")
ALPHA = 1e-3  # seeds are fixed: a test that passes once passes always, and a wrong distribution is off by far more


def plain_pool(n: int, per_class: int = 17, names: Sequence[str] | None = None) -> Pool:
    """Classes of one-colour pictures; picture k of class c has colour (c, k, 0)."""
    titles = names or [f"Class{c:03d}" for c in range(n)]
    return Pool(
        tuple(
            LinkClass(name, tuple(Image.new("RGB", (8, 8), (c, k, 0)) for k in range(per_class)), key=f"key{c:03d}")
            for c, name in enumerate(titles)
        )
    )


def ring(n: int, n_intervals: int = 100) -> Neighbours:
    """Class c + r (around the ring) is the r-th most similar of class c."""
    gap = (np.arange(n)[None] - np.arange(n)[:, None]) % n
    return Neighbours(tuple(f"key{c:03d}" for c in range(n)), -gap.astype(float), n_intervals)


def sides(episode: Episode) -> tuple[str, str]:
    """Keys of the positive and the negative class, from the examples alone."""
    items = {shot.label: shot.item for shot in (*episode.shots, episode.query)}
    return items[episode.candidates[0]], items[episode.candidates[1]]


def ranks(episodes: Sequence[Episode], n: int) -> list[int]:
    """How far around the ring the negative class stands from the positive one, 1 .. n - 1."""
    return [(int(b[3:]) - int(a[3:])) % n for a, b in map(sides, episodes)]


def fits(values: Sequence[int], expected: dict[int, float]) -> float:
    """p of a chi-square test, rare values taken together so that five are expected of each."""
    assert set(values) <= set(expected)
    counts, total = Counter(values), len(values)
    seen: list[float] = []
    wanted: list[float] = []
    more_seen = more = 0.0
    for value in sorted(expected, key=lambda v: expected[v]):
        more_seen, more = more_seen + counts[value], more + total * expected[value]
        if more >= 5:
            seen.append(more_seen)
            wanted.append(more)
            more_seen = more = 0.0
    seen[-1], wanted[-1] = seen[-1] + more_seen, wanted[-1] + more
    return float(chisquare(seen, wanted).pvalue)


def digest(episodes: Sequence[Episode]) -> str:
    found = hashlib.sha256()
    for episode in episodes:
        found.update(repr((episode.id, episode.candidates, episode.instruction, episode.question, episode.form)).encode())
        for shot in (*episode.shots, episode.query):
            found.update(repr((shot.label, shot.item, shot.text, [image.size for image in shot.images])).encode())
            found.update(b"".join(image.tobytes() for image in shot.images))
    return found.hexdigest()


# ---- probabilities ---------------------------------------------------------------------------------------------------------------------------------


def test_negatives_of_the_2_way_come_by_the_papers_ranks() -> None:
    assert np.allclose(rank_chances(100), [(101 - j) / 5050 for j in range(1, 101)], rtol=0, atol=1e-15)  # 5050 = 1 + 2 + ... + 100
    episodes = link_episodes(plain_pool(101, 3), 4000, shots=2, neighbours=ring(101), seed=1)
    found = ranks(episodes, 101)
    assert fits(found, {j: (101 - j) / 5050 for j in range(1, 101)}) > ALPHA
    assert fits(found, dict.fromkeys(range(1, 101), 0.01)) < 1e-20  # the test can fail


def test_random_negatives_are_the_control_and_are_even() -> None:
    found = ranks(link_episodes(plain_pool(101, 3), 4000, shots=2, seed=1), 101)
    assert fits(found, dict.fromkeys(range(1, 101), 0.01)) > ALPHA
    assert fits(found, {j: (101 - j) / 5050 for j in range(1, 101)}) < 1e-20


def test_in_wide_intervals_the_list_has_one_class_of_each_and_negatives_come_from_the_list() -> None:
    pool, near = plain_pool(37, 3), ring(37, 4)  # 36 other classes in 4 intervals of 9
    listed = near.listed(5)
    gap = (listed - np.arange(37)[:, None]) % 37
    assert ((gap - 1) // 9 == np.arange(4)).all()
    found = link_episodes(pool, 2000, shots=1, neighbours=near, seed=5)
    at = {tuple(map(int, (a[3:], b[3:]))) for a, b in map(sides, found)}
    assert at <= {(row, int(other)) for row in range(37) for other in listed[row]}
    assert fits([(rank - 1) // 9 + 1 for rank in ranks(found, 37)], dict(zip(range(1, 5), (0.4, 0.3, 0.2, 0.1), strict=True))) > ALPHA


def weights(least: int, most: int, power: float) -> dict[int, float]:
    raw = {s: float(np.exp(power * s)) for s in range(least, most + 1)}
    return {s: w / sum(raw.values()) for s, w in raw.items()}


@pytest.mark.parametrize(
    ("strategy", "expected", "not_this"),
    [
        ("2-way-random", weights(2, 16, 0), weights(2, 16, 1)),
        ("2-way-weight", weights(2, 16, 1), weights(2, 16, 0)),
        ("policy_2way_random_shot", weights(1, 16, 0.5), weights(1, 16, 1)),
    ],
)
def test_numbers_of_shots_come_as_published(strategy: str, expected: dict[int, float], not_this: dict[int, float]) -> None:
    episodes = link_episodes(plain_pool(4), 1500, strategy=strategy, seed=2)
    found = [len(episode.shots) // 2 for episode in episodes]
    assert fits(found, expected) > ALPHA
    assert set(found) - set(not_this) or fits(found, not_this) < 1e-10
    values, chances = STRATEGIES[strategy].chances(16)
    assert np.allclose([expected[int(v)] for v in values], chances, rtol=1e-12)


@pytest.mark.parametrize("strategy", ["2-way", "mix", "policy_2way_weight"])
def test_fixed_strategies_always_have_all_shots_also_the_one_called_weight(strategy: str) -> None:
    general = concepts.draw(3, classes=2, shots=1, size=16) if strategy == "mix" else []
    episodes = link_episodes(plain_pool(4), 60, strategy=strategy, general=general, seed=2)
    assert {len(episode.shots) for episode in episodes if strategy in episode.id} == {32}


def test_mix_is_even_in_every_two_and_goes_through_the_general_task_before_any_comes_again() -> None:
    general = concepts.draw(7, classes=2, shots=1, size=16)
    episodes = link_episodes(plain_pool(4, 3), 56, strategy="mix", shots=2, general=general, seed=4)
    ours = [any(episode is one for one in general) for episode in episodes]
    assert all(ours[k] != ours[k + 1] for k in range(0, 56, 2))
    assert 0 < sum(ours[::2]) < 28  # in either order
    taken = [episode.id for episode, other in zip(episodes, ours, strict=True) if other]
    turns = [taken[k : k + 7] for k in range(0, 28, 7)]
    assert all(sorted(turn) == sorted(one.id for one in general) for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1
    same = link_episodes(plain_pool(4, 3), 56, strategy="2-way", shots=2, seed=4)
    assert all(a.query.label == b.query.label for a, b, other in zip(episodes, same, ours, strict=True) if not other)


def test_the_query_is_of_either_class_by_a_fair_coin_and_stands_nowhere_in_particular() -> None:
    episodes = link_episodes(plain_pool(9, 5), 2000, shots=4, seed=3)
    positive = [episode.answer == episode.candidates[0] for episode in episodes]
    assert binomtest(sum(positive), 2000, 0.5).pvalue > ALPHA
    last = [episode.shots[-1].label == episode.answer for episode in episodes]
    first = [episode.shots[0].label == episode.candidates[0] for episode in episodes]
    assert min(binomtest(sum(last), 2000, 0.5).pvalue, binomtest(sum(first), 2000, 0.5).pvalue) > ALPHA
    where = [k for episode in episodes for k, shot in enumerate(episode.shots) if shot.label == episode.candidates[0]]
    assert fits(where, dict.fromkeys(range(8), 1 / 8)) > ALPHA
    keys = [int(sides(episode)[0][3:]) for episode in episodes]
    assert fits(keys, dict.fromkeys(range(9), 1 / 9)) > ALPHA


# ---- names -----------------------------------------------------------------------------------------------------------------------------------------


def test_pseudo_labels_are_lower_case_strings_of_even_length() -> None:
    draw = np.random.default_rng(0)
    labels = [pseudo_label(draw) for _ in range(5000)]
    assert all(label.isascii() and label.islower() and label.isalpha() for label in labels)
    assert fits([len(label) for label in labels], dict.fromkeys(range(1, 11), 0.1)) > ALPHA
    assert fits([ord(letter) for label in labels for letter in label], dict.fromkeys(range(97, 123), 1 / 26)) > ALPHA
    kept = [pseudo_label(draw, avoid="Banana") for _ in range(5000)]
    assert not any(label in "banana" or "banana" in label for label in kept)
    assert fits([len(label) for label in kept], dict.fromkeys(range(1, 11), 0.1)) > ALPHA  # letters are drawn again, not lengths


def test_the_positive_class_is_renamed_and_its_neighbour_is_not() -> None:
    pool = plain_pool(5, 4)
    for episode in link_episodes(pool, 50, shots=3):
        positive, negative = sides(episode)
        assert episode.candidates[1] == pool[negative].name
        assert episode.candidates[0] not in {one.name for one in pool.classes}
        assert positive in episode.id
        assert negative in episode.id
        assert all(shot.label == (episode.candidates[0] if shot.item == positive else episode.candidates[1]) for shot in episode.shots)
    kept = link_episodes(pool, 50, shots=3, pseudo_labels=False)
    assert all(episode.candidates == tuple(pool[key].name for key in sides(episode)) for episode in kept)


def test_one_name_within_the_other_happens_only_where_the_released_code_lets_it() -> None:
    pool = plain_pool(3, 2, ["banana", "a", "no"])

    def clash(episode: Episode) -> bool:
        a, b = (label.lower() for label in episode.candidates)
        return a in b or b in a

    assert not any(map(clash, link_episodes(pool, 400, shots=1)))
    assert any(map(clash, link_episodes(pool, 400, shots=1, strategy="policy_2way_weight")))


def test_classes_of_one_name_never_meet() -> None:
    pool = plain_pool(3, 3, ["crane", "crane", "tench"])
    for near in (None, ring(3)):
        met = {frozenset(sides(episode)) for episode in link_episodes(pool, 100, shots=2, neighbours=near, pseudo_labels=False)}
        assert met == {frozenset({"key000", "key002"}), frozenset({"key001", "key002"})}


# ---- the same, and what must not leak ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    classes=st.integers(2, 6),
    shots=st.integers(2, 5),
    n=st.integers(1, 6),
    strategy=st.sampled_from([*PAPER, *RELEASED]),
    near=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_episode_has_as_many_of_both_classes_and_is_the_same_again(
    classes: int, shots: int, n: int, strategy: str, near: bool, seed: int
) -> None:
    pool, made = plain_pool(classes, shots + 1), ring(classes) if near else None
    episodes = link_episodes(pool, n, strategy=strategy, shots=shots, neighbours=made, seed=seed)
    assert len(episodes) == n
    least = STRATEGIES[strategy].least
    for episode in episodes:
        counts = Counter(shot.label for shot in episode.shots)
        many = counts[episode.candidates[0]]
        assert counts == dict.fromkeys(episode.candidates, many)
        assert (shots if least is None else least) <= many <= shots
        assert all(shot.images[0].getpixel((0, 0))[0] == int(shot.item[3:]) for shot in (*episode.shots, episode.query))  # type: ignore[index]
        colours = [shot.images[0].getpixel((0, 0)) for shot in (*episode.shots, episode.query)]
        assert len(set(colours)) == len(colours) or strategy in RELEASED
    again = link_episodes(pool, n + 3, strategy=strategy, shots=shots, neighbours=made, seed=seed)
    assert digest(episodes) == digest(again[:n])


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    first, second = (generated_pool(3, 4, 6, 16) for _ in range(2))
    a, b, c = (
        digest(link_episodes(pool, 12, strategy="2-way-random", shots=5, seed=seed)) for pool, seed in ((first, 1), (second, 1), (first, 2))
    )
    assert a == b != c
    shared = [link_episodes(first, 12, strategy=strategy, shots=5, seed=1) for strategy in PAPER]
    assert len({tuple(map(sides, episodes)) for episodes in shared}) == 1  # strategies are compared on the same classes


def test_in_the_released_code_a_query_may_be_among_its_own_examples() -> None:
    episodes = link_episodes(plain_pool(4, 17), 200, strategy="policy_2way_weight", seed=0)
    inside = [any(shot.images[0].tobytes() == episode.query.images[0].tobytes() for shot in episode.shots) for episode in episodes]
    expected = 1 - (16 / 17) ** 16  # each of 16 examples is the query's picture by one in 17
    assert binomtest(sum(inside), 200, expected).pvalue > ALPHA


# ---- prompts ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [PUBLISHED, SENTENCES], ids=["labels", "sentences"])
def test_every_family_reads_the_published_prompt_with_exact_labels(
    family: str, organism: Callable[..., tuple[Any, Any]], prompt: Any
) -> None:
    model, processor = organism(family)
    pool = Pool(
        tuple(LinkClass(name, tuple(picture(56, 56, seed=10 * c + k) for k in range(3))) for c, name in enumerate(["kimo", "tepa"]))
    )
    episodes = link_episodes(pool, 2, shots=2, prompt=prompt, seed=6)
    batch = Renderer(processor, model.config).render(episodes)
    tokens = batch.inputs["input_ids"]
    for row, episode in enumerate(episodes):
        labels = [span for span in batch.spans[row] if span.role == "label"]
        assert [span.label for span in labels] == [shot.label for shot in episode.shots]
        for span in labels:
            assert processor.tokenizer.decode(tokens[row, span.start : span.stop]).strip() == span.label
        text = processor.tokenizer.decode(tokens[row])
        assert text.count("What is in the image?") == 4
        assert text.count("Based on the previous examples, what is in the image?") == 1
        assert text.count(PUBLISHED.instruction) == 1
        if prompt is SENTENCES:
            assert sum(text.count(f'there is "{label}" in the image.') for label in episode.candidates) == 4


def test_an_episode_can_be_put_in_other_words() -> None:
    episode = link_episodes(plain_pool(2, 3), 1, shots=2)[0]
    short = link_prompt(episode, SHORT)
    assert (short.instruction, short.question, short.form) == (SHORT.instruction, SHORT.question, SHORT.form)
    assert short.shots == episode.shots
    assert digest([link_prompt(short, PUBLISHED)]) == digest([episode])


# ---- pools -----------------------------------------------------------------------------------------------------------------------------------------


def test_a_generated_pool_has_unreal_chimeras_of_their_real_partners() -> None:
    pool = generated_pool(2, 20, 3, 16)
    assert (len(pool), len(pool.partners), len(set(pool.keys))) == (40, 20, 40)
    known = {name: (real, twins) for name, real, twins in partners("held_out")}
    assert all(pool[unreal].kind == "unreal" and pool[real].kind == "real" and real in known for unreal, real in pool.partners)
    held = set(class_ids("held_out").tolist())
    for real, twins in known.values():
        assert {real, *twins} <= held  # a bundled model has met neither
        assert all(kind_of(twin) == "pair" and look(twin).layers[0].ink == look(real).layers[0].ink for twin in twins)
    assert not {i for _, real, twins in partners("train") for i in (real, *twins)} & held


def test_pools_are_split_by_class_or_by_group() -> None:
    pool = generated_pool(0, 5, 2, 16)
    a, b = pool.split(pool.keys[:3])
    assert (a.keys, b.keys) == (pool.keys[:3], pool.keys[3:])
    a, b = pool.split_groups(0.4, seed=1)
    assert (len(a), len(b)) == (4, 6)
    assert len(a.partners) + len(b.partners) == 5
    assert set(a.keys) | set(b.keys) == set(pool.keys)


# ---- refusals --------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"strategy": "3-way"}, "strategy must be one of"),
        ({"n": 0}, "n must be"),
        ({"shots": 0}, "shots must be at least 1"),
        ({"strategy": "2-way-random", "shots": 1}, "shots must be at least 2"),
        ({"shots": 3}, "must have 4 pictures"),
        ({"strategy": "mix"}, "general must be"),
        ({"general": ["one"]}, "general must be"),
        ({"neighbours": ring(3)}, "classes that were compared"),
    ],
)
def test_what_cannot_be_drawn_is_refused(change: dict[str, Any], match: str) -> None:
    options: dict[str, Any] = {"n": 2, "shots": 2, **change}
    with unchecked(), pytest.raises(OptionError, match=match):
        link_episodes(plain_pool(5, 3), **options)


def test_pools_that_cannot_be_used_are_refused() -> None:
    one = LinkClass("a", (picture(),))
    for make, match in (
        (lambda: LinkClass(" a", (picture(),)), "name must be"),
        (lambda: LinkClass("a", ()), "at least one picture"),
        (lambda: Pool((one,)), "at least two"),
        (lambda: Pool((one, one)), "keys of classes must differ"),
        (lambda: plain_pool(3)["nobody"], "key must be of a class"),
        (lambda: plain_pool(3).split(["key000"]), "at least two"),
        (lambda: generated_pool(0, 2, 1, 16).split_groups(0.0), "groups on both sides"),
        (lambda: generated_pool(0, 0), "n_groups and per_class"),
        (lambda: generated_pool(0, 5000, 1, 16), "n_groups must be at most"),
        (lambda: link_episodes(plain_pool(2, 2, ["same", "same"]), 1, shots=1), "two different names"),
        (lambda: rank_chances(0), "n must be at least 1"),
    ):
        with pytest.raises(OptionError, match=match):
            make()


def test_a_file_that_breaks_after_it_was_checked_is_named(tmp_path: Any) -> None:
    files = [tmp_path / f"{k}.png" for k in range(4)]
    for k, file in enumerate(files):
        picture(20, 10, seed=k).save(file)
    pool = Pool((LinkClass("kimo", tuple(files[:2])), LinkClass("tepa", tuple(files[2:]))), size=10)
    assert {shot.images[0].size for shot in link_episodes(pool, 1, shots=1)[0].shots} == {(10, 5)}
    for file in files:
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ImageError, match=r"\d.png is not"):
        link_episodes(pool, 1, shots=1)
    with pytest.raises(EpisodeError):
        Episode((), link_episodes(plain_pool(2, 2), 1, shots=1)[0].query, ("a",))


# ---- the bundled model ---------------------------------------------------------------------------------------------------------------------------------


def test_syllable_labels_are_as_long_as_the_name_beside_them_and_begin_otherwise() -> None:
    draw = np.random.default_rng(0)
    for beside, n in (("zudaki", 3), ("mi", 1), ("red star", 2), ("kimo", 2)):
        labels = [syllable_label(draw, beside=beside) for _ in range(200)]
        assert all(len(label) == 2 * n and label[:2] != beside[:2] for label in labels)
        assert len(set(labels)) > 30
    pool = generated_pool(0, 20, 2, 16, names="made-up")
    assert {len(key) for key in pool.keys} == {4}
    assert len({key[:2] for key in pool.keys}) == 40  # no two begin alike
    assert all(
        len(a) == len(b) and a[:2] != b[:2] for a, b in (one.candidates for one in link_episodes(pool.split_groups()[0], 60, shots=1))
    )
    for make in (lambda: generated_pool(0, 2, 1, 16, names="rude"), lambda: link_episodes(pool, 1, shots=1, pseudo_labels="digits")):  # type: ignore[arg-type]
        with unchecked(), pytest.raises(OptionError, match="must be"):
            make()


def test_the_bundled_model_follows_the_link_where_labels_are_of_one_length_and_only_then() -> None:
    model = mechicl.load("demo")
    fair = generated_pool(0, 20, 4, 28, names="made-up")
    right = answer(model.hf, model.renderer, link_episodes(fair, 64, shots=3, prompt=SHORT))
    assert right.accuracy.low > 0.9
    unfair = link_episodes(generated_pool(0, 20, 4, 28), 64, shots=3, prompt=SHORT)
    shorter = [len(min(one.candidates, key=lambda label: len(model.renderer.tokenizer.encode(label)))) == len(one.answer) for one in unfair]
    found = answer(model.hf, model.renderer, unfair)
    assert abs(found.accuracy.value - np.mean(shorter)) < 0.15  # it says the shorter label, whatever is shown
    assert found.accuracy.high < 0.8
