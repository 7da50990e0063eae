"""Which classes are hard to tell apart: the published similarity, its ranking, and who makes the vectors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture, unchecked
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cosine
from scipy.stats import wilcoxon

import mechicl
from mechicl.analysis.link.neighbours import class_neighbours, class_vectors
from mechicl.data.isekai_made import generated_pool
from mechicl.data.link_context import link_episodes
from mechicl.data.link_pool import LinkClass, Pool
from mechicl.data.neighbours import WEIGHTS, Neighbours, neighbours, similarity
from mechicl.errors import MechiclError, NotFiniteError, OptionError
from mechicl.models.embeddings import Embeddings, load_clip
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.episode import Shot

Organism = Callable[..., tuple[Any, Any]]


def vectors(n: int, d: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from mechicl.training.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(eos="<eos>", pad="<pad>", bos="<bos>", max_length=32)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 32, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(1)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 28, "patch_size": 14}, projection_dim=8))
    folder = tmp_path_factory.mktemp("clip")
    clip.save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


# ---- the measure -------------------------------------------------------------------------------------------------------------------------------------


def test_similarity_is_the_published_sum_of_cosines() -> None:
    image, text = 3 * vectors(5, seed=1), vectors(5, seed=2)
    found = similarity(image, text)
    for a in range(5):
        for b in range(5):
            tt, ii = 1 - cosine(text[a], text[b]), 1 - cosine(image[a], image[b])
            it, ti = 1 - cosine(image[a], text[b]), 1 - cosine(text[a], image[b])
            assert found[a, b] == pytest.approx(0.5 * tt + 0.8 * (it + ti) + 0.5 * ii, abs=1e-12)  # float64
    assert np.allclose(found, found.T, atol=1e-12)
    assert WEIGHTS == (0.5, 0.8, 0.5)


def test_a_weight_of_zero_leaves_its_vectors_unread() -> None:
    image, text = vectors(4, 6), vectors(4, 3, seed=1)
    assert np.allclose(similarity(image, text, weights=(0.5, 0.0, 0.0)), similarity(np.full((4, 2), np.nan), text, weights=(0.5, 0.0, 0.0)))
    assert similarity(image, np.zeros((4, 0)), weights=(0.0, 0.0, 1.0)).diagonal() == pytest.approx(1)
    with pytest.raises(OptionError, match="one space"):
        similarity(image, text)


def test_centring_takes_off_what_all_classes_share() -> None:
    image, common = vectors(6), 50 * np.ones(6)
    shifted = similarity(image + common, image + common, centre=True)
    assert np.allclose(shifted, similarity(image, image, centre=True), atol=1e-10)
    assert similarity(image + common, image + common).min() > 2.5  # of at most 2.6: nothing is told apart


@settings(max_examples=50, deadline=None)
@given(n=st.integers(2, 30), n_intervals=st.integers(1, 40), seed=st.integers(0, 1000))
def test_intervals_part_each_ranking_evenly_and_the_list_has_one_class_of_each(n: int, n_intervals: int, seed: int) -> None:
    image = vectors(n, 4, seed)
    found = neighbours([f"c{i}" for i in range(n)], image, image, n_intervals=n_intervals)
    assert found.n == min(n_intervals, n - 1)
    listed = found.listed(seed)
    assert listed.shape == (n, found.n)
    for row in range(n):
        values = found.similarity[row, found.ranking[row]]
        assert (np.diff(values) <= 0).all()
        assert sorted([*found.ranking[row], row]) == list(range(n))
        parts = [found.interval(row, j) for j in range(1, found.n + 1)]
        assert np.array_equal(np.concatenate(parts), found.ranking[row])
        assert {len(part) for part in parts} <= {(n - 1) // found.n, -(-(n - 1) // found.n)}
        assert all(listed[row, j] in part for j, part in enumerate(parts))
    assert np.array_equal(listed, found.listed(seed))


def test_every_class_of_an_interval_is_listed_some_time() -> None:
    found = neighbours([f"c{i}" for i in range(13)], vectors(13), vectors(13), n_intervals=3)
    seen = {int(found.listed(seed)[0, 1]) for seed in range(60)}
    assert seen == set(found.interval(0, 2).tolist())


def test_planted_look_alikes_are_found_and_shuffled_ones_are_not() -> None:
    centres = vectors(10, 16, seed=3)
    image = np.repeat(centres, 2, 0) + 0.1 * vectors(20, 16, seed=4)  # classes 2i and 2i + 1 look alike
    text = np.repeat(centres, 2, 0) + 0.1 * vectors(20, 16, seed=5)
    found = neighbours([str(i) for i in range(20)], image, text)
    assert (found.ranking[:, 0] == np.arange(20) ^ 1).mean() > 0.9
    order = np.random.default_rng(6).permutation(20)
    shuffled = neighbours([str(i) for i in range(20)], image[order], text[order])
    assert (shuffled.ranking[:, 0] == np.arange(20) ^ 1).mean() < 0.3


def test_some_of_the_classes_are_ranked_among_themselves() -> None:
    found = neighbours([f"c{i}" for i in range(8)], vectors(8), vectors(8, seed=1), n_intervals=4)
    some = found.take(["c5", "c2", "c7"])
    assert (some.keys, some.n) == (("c5", "c2", "c7"), 2)
    assert [some.keys[i] for i in some.ranking[0]] == [key for key in (found.keys[i] for i in found.ranking[5]) if key in some.keys]


def test_vectors_and_tables_that_make_no_sense_are_refused() -> None:
    good = vectors(3)
    for make, error, match in (
        (lambda: similarity(good, vectors(4)), OptionError, "row for each class"),
        (lambda: similarity(good * np.nan, good), NotFiniteError, "image must be finite"),
        (lambda: similarity(good, good * 0), OptionError, "length zero"),
        (lambda: neighbours(["a", "a", "b"], good, good), OptionError, "keys must be different"),
        (lambda: neighbours(["a", "b"], good, good), OptionError, "one for each row"),
        (lambda: neighbours(["a", "b", "c"], good, good, n_intervals=0), OptionError, "n_intervals must be"),
        (lambda: Neighbours(("a", "b"), np.full((2, 2), np.inf)), NotFiniteError, "similarity must be finite"),
        (lambda: neighbours(["a", "b", "c"], good, good).interval(0, 3), OptionError, r"j must be in 1\.\.2"),
        (lambda: neighbours(["a", "b", "c"], good, good).take(["a", "d"]), OptionError, "'d' was not"),
    ):
        with unchecked(), pytest.raises(error, match=match):
            make()


# ---- models ------------------------------------------------------------------------------------------------------------------------------------------


def test_a_local_clip_compares_names_and_pictures(clip_folder: Path) -> None:
    clip, pool = load_clip(clip_folder), generated_pool(0, 3, 4, 28)
    found = class_neighbours(pool, clip, per_class=3)
    assert (found.keys, found.source) == (pool.keys, clip_folder.name)
    image, text, _ = class_vectors(pool, clip, per_class=3)
    assert image.shape == text.shape == (6, 8)
    assert np.allclose(found.similarity, similarity(image, text), atol=1e-12)
    name = clip([Shot("a", text=pool.classes[2].name)]).text[0]
    assert np.allclose(text[2], name, atol=1e-6)  # float32, one at a time
    whole = class_vectors(pool, clip, per_class=99)[0][1]
    one_by_one = [clip([Shot("a", (image,))]).image[0] for image in pool.classes[1].images]  # type: ignore[arg-type]
    assert np.allclose(whole, np.mean(one_by_one, 0), atol=1e-6)
    assert np.array_equal(found.similarity, class_neighbours(pool, clip, per_class=3).similarity)


def test_the_models_own_eyes_find_real_partners_closer_than_chance() -> None:
    model = mechicl.load("demo")
    pool = generated_pool(0, 20, 3, 28)
    for eyes in ("features", "tower"):
        found = class_neighbours(pool, model, per_class=3, eyes=eyes)
        places = [found.ranking[pool.keys.index(a)].tolist().index(pool.keys.index(b)) for a, b in pool.partners]
        assert wilcoxon(np.array(places) - 19.0, alternative="less").pvalue < 0.01  # 39 places: 19 is the middle one
        shuffled = [found.ranking[pool.keys.index(a)].tolist().index(pool.keys.index(b)) for (a, _), (_, b) in zip(
            pool.partners, pool.partners[1:] + pool.partners[:1], strict=True)]  # fmt: skip
        assert wilcoxon(np.array(shuffled) - 19.0, alternative="less").pvalue > 0.05


def test_hard_negatives_are_more_alike_than_random_ones() -> None:
    pool = generated_pool(1, 20, 3, 28)
    found = class_neighbours(pool, mechicl.load("demo"), per_class=3)

    def mean(near: Neighbours | None) -> float:
        pairs = [{shot.item for shot in episode.shots} for episode in link_episodes(pool, 300, shots=1, neighbours=near)]
        rows = [[pool.keys.index(key) for key in pair] for pair in pairs]
        return float(np.mean([found.similarity[a, b] for a, b in rows]))

    spread = found.similarity[np.triu_indices(40, 1)].std()
    assert mean(found) > mean(None) + 0.25 * spread  # by the ranks' weights about half a standard deviation


def test_every_family_ranks_classes_by_its_own_features(family: str, organism: Organism) -> None:
    model, processor = organism(family)
    pool = Pool(
        tuple(LinkClass(name, tuple(picture(56, 56, seed=10 * c + k) for k in range(2))) for c, name in enumerate(("kimo", "tepa", "voru")))
    )
    found = class_neighbours(pool, HookedVLM(model, processor), per_class=2)
    assert found.ranking.shape == (3, 2)
    assert "own features" in found.source
    off = ~np.eye(3, dtype=bool)
    assert found.similarity[off].std() > 0


def test_a_given_embedder_is_asked_for_names_only_where_they_count() -> None:
    asked: list[str] = []

    def embedder(shots: Any) -> Embeddings:
        asked.extend(shot.text for shot in shots)
        return Embeddings(
            np.array([[len(shot.images), 1.0] for shot in shots]), np.array([[len(shot.text), 1.0] for shot in shots]), "counts"
        )

    pool = generated_pool(0, 2, 2, 16)
    found = class_neighbours(pool, embedder, weights=(0.0, 0.0, 1.0), per_class=1)
    assert set(asked) == {""}
    assert found.source == "counts"
    class_neighbours(pool, embedder, per_class=1)
    assert set(asked) == {"", *(one.name for one in pool.classes)}
    for options in ({"per_class": 0}, {"n_intervals": 0}):
        with unchecked(), pytest.raises(MechiclError):
            class_neighbours(pool, embedder, **options)


def test_the_page_about_the_data_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "link_context.md").read_text()
    block = page.split("```python\n")[1].split("```")[0]
    exec(compile(block, "docs/link_context.md", "exec"), {})
    first, second = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("2-way/1/0: ")
    assert float(second.split()[0]) > 0.9
