"""Likeness: items as vectors against what the models themselves give, and what is chosen by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LABELS, gen, picture, unchecked
from hypothesis import given
from hypothesis import strategies as st

from mechicl.analysis.examples.retrieval import choose, embed, retrieve, same_items, similarities
from mechicl.data import concepts
from mechicl.data.gaussian import draw as draw_vectors
from mechicl.data.toy_tasks import UnimodalTask
from mechicl.errors import CheckpointError, EpisodeError, NotFiniteError, OptionError
from mechicl.models.embeddings import ClipEmbedder, Embeddings, OwnEmbedder, load_clip
from mechicl.models.load import load
from mechicl.models.planted import untrained
from mechicl.models.toys.model import ToyTransformer, toy_config
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.episode import Episode, Shot
from mechicl.prompts.vectors import VectorRenderer, episodes

Organism = Callable[..., tuple[Any, Any]]


def items(n: int = 3) -> list[Shot]:
    return [Shot(LABELS[k % 4], (picture(56, 56, seed=k),), f"this is {LABELS[k % 4]}", item=str(k)) for k in range(n)]


def hooked(organism: Organism, family: str) -> HookedVLM:
    return HookedVLM(*organism(family), check=False)


# ---- the model's own ---------------------------------------------------------------------------------------------------------------------------------


def test_every_family_embeds_pictures_and_texts_and_never_reads_the_label(organism: Organism, family: str) -> None:
    model, shots = hooked(organism, family), items()
    found = embed(model, shots)
    other = embed(model, [replace(shot, label="something else") for shot in shots])
    assert len(found) == 3
    assert np.array_equal(found.image, other.image)
    assert np.array_equal(found.text, other.text)
    assert np.abs(found.image[0] - found.image[1]).max() > 1e-4
    assert np.abs(found.text[0] - found.text[1]).max() > 1e-4
    tower = OwnEmbedder(model, "tower")(shots[:2])
    assert np.abs(tower.image[0] - tower.image[1]).max() > 1e-6
    assert np.array_equal(tower.text, found.text[:2])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "llava"])
def test_rows_are_the_means_of_what_a_whole_pass_shows(organism: Organism, family: str) -> None:
    model, shot = hooked(organism, family), items(1)[0]
    batch = model.render([Episode((), shot, (shot.label, "other"))])
    _, cache = model.run_with_cache(batch, names_filter=["hook_image_features", "hook_embed"])
    found = OwnEmbedder(model)([shot])
    assert found.image[0] == pytest.approx(cache["hook_image_features"].mean(0).numpy(), abs=1e-5)  # float32
    span = next(s for s in batch.spans[0] if s.role == "text")
    ids = batch.inputs["input_ids"][0, span.start : span.stop]
    table = model.hf.get_input_embeddings()(ids).detach()
    assert found.text[0] == pytest.approx(table.mean(0).numpy(), abs=1e-5)  # gemma's scale is part of its table


def test_a_pass_that_stops_early_leaves_nothing_behind(organism: Organism) -> None:
    model = hooked(organism, "qwen2_5_vl")
    batch = model.render([Episode((), items(1)[0], ("zuda", "kimo"))])
    before = model(batch)
    OwnEmbedder(model)(items(2))
    assert torch.equal(model(batch), before)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.hf.modules())


def test_toys_of_words_and_of_vectors_embed_their_items() -> None:
    words = untrained(seed=0)
    shots = [Shot("l0", text=f"i{k}", item=f"i{k}") for k in (0, 1, 0)]
    found = OwnEmbedder(words, candidates=("l0", "l1"))(shots)
    assert found.image.shape == (3, 0)
    assert np.array_equal(found.text[0], found.text[2])
    assert not np.array_equal(found.text[0], found.text[1])
    task = UnimodalTask(K=64, L=8, N=4, D=16)
    toy = ToyTransformer(
        toy_config(n_layers=1, n_heads=1, d_model=16, d_vocab=8, n_ctx=16, d_input=16, inputs="vectors"), VectorRenderer(task)
    )
    drawn = episodes(draw_vectors(task, 3, gen()))
    rows = OwnEmbedder(toy, candidates=("l0", "l1"))([e.query for e in drawn])
    assert rows.text == pytest.approx(np.stack([e.query.vector.numpy() for e in drawn]), abs=1e-6)  # type: ignore[attr-defined]


def test_likeness_by_the_bundled_models_own_eyes_finds_pictures_of_the_same_concept() -> None:
    model, drawn = load("demo", check=False), concepts.draw(12, classes=4, shots=2, size=28, seed=1)
    pool, queries = [shot for e in drawn for shot in e.shots], [e.query for e in drawn]
    vectors = embed(model, queries), embed(model, pool)

    def share(by: Any) -> float:
        rows = retrieve(model, queries, pool, 2, by, embeddings=vectors, progress=False).rows
        return float(np.mean([pool[j].item == queries[i].item for i in range(12) for j in rows[i]]))

    assert share("most similar") > 0.35  # two of 96 pictures are of the query's concept
    assert share("random") < 0.15
    assert share("least similar") == 0


# ---- CLIP ----------------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from mechicl.training.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(eos="<eos>", pad="<pad>", bos="<bos>", max_length=32)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 32, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 28, "patch_size": 14}, projection_dim=8))
    folder = tmp_path_factory.mktemp("clip")
    clip.save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_a_local_clip_gives_its_own_projected_features(clip_folder: Path) -> None:
    clip, shots = load_clip(clip_folder), items(3)
    found = embed(clip, [*shots, Shot("a", text="words only"), Shot("a", (picture(seed=9),))])
    assert found.image.shape == found.text.shape == (5, 8)
    assert not found.image[3].any()
    assert not found.text[4].any()
    given = clip.processor(images=[shots[0].images[0]], text=[shots[0].text], return_tensors="pt")
    with torch.no_grad():
        out = clip.clip(**given)  # the whole model, which normalises its features
    for mine, theirs in ((found.image[0], out.image_embeds[0]), (found.text[0], out.text_embeds[0])):
        assert mine / np.linalg.norm(mine) == pytest.approx(theirs.numpy(), abs=1e-6)  # float32
    assert isinstance(clip, ClipEmbedder)


def test_folders_that_hold_no_clip_are_refused(tmp_path: Path, organism: Organism, clip_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_clip(tmp_path)
    model, processor = organism("llava")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"CLIP-type|load through"):
        load_clip(tmp_path)


# ---- likeness and choice -----------------------------------------------------------------------------------------------------------------------------


def rows(n: int, d: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


def test_likeness_is_the_cosine_of_unit_vectors_put_end_to_end() -> None:
    a, b = Embeddings(rows(3, 4, 0), rows(3, 6, 1)), Embeddings(rows(5, 4, 2), rows(5, 6, 3))

    def joined(e: Embeddings) -> np.ndarray:
        return np.hstack([e.image / np.linalg.norm(e.image, axis=1)[:, None], e.text / np.linalg.norm(e.text, axis=1)[:, None]]) / np.sqrt(
            2
        )

    assert similarities(a, b, centre=False) == pytest.approx(joined(a) @ joined(b).T)
    assert similarities(a, b, text=0.0, centre=False) == pytest.approx(
        similarities(Embeddings(a.image, np.zeros((3, 0))), Embeddings(b.image, np.zeros((5, 0))), centre=False)
    )
    shifted = Embeddings(a.image + 100, a.text), Embeddings(b.image + 100, b.text)
    assert similarities(*shifted) == pytest.approx(similarities(a, b))  # what all share says nothing
    assert np.abs(similarities(*shifted, centre=False, text=0.0) - 1).max() < 0.01


def test_where_a_picture_or_a_text_is_missing_the_other_alone_counts() -> None:
    a = Embeddings(np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([[1.0, 0.0], [1.0, 0.0]]))
    b = Embeddings(np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([[0.0, 0.0], [1.0, 0.0]]))
    assert similarities(a, b, centre=False).tolist() == [[1.0, 1.0], [0.0, 1.0]]


@given(
    st.integers(1, 6), st.integers(3, 9), st.integers(1, 3), st.sampled_from(["most similar", "random", "least similar"]), st.integers(0, 9)
)
def test_choices_keep_their_promises(n: int, m: int, k: int, by: Any, seed: int) -> None:
    likeness = np.round(rows(n, m, seed), 1)  # with ties
    shut = np.zeros((n, m), dtype=bool)
    shut[np.arange(n), np.arange(n) % m] = m > k
    found = choose(likeness, k, by, seed=seed, forbidden=shut)
    again = choose(likeness[:1], k, by, seed=seed, forbidden=shut[:1])
    assert np.array_equal(found.rows[0], again.rows[0])  # what else is asked changes nothing
    for i in range(n):
        assert len(set(found.rows[i])) == k
        assert not shut[i, found.rows[i]].any()
        open_ones = np.sort(likeness[i][~shut[i]])
        if by == "most similar":
            assert found.similarity[i].tolist() == open_ones[::-1][:k].tolist()
        if by == "least similar":
            assert found.similarity[i].tolist() == open_ones[:k].tolist()


def test_random_choices_are_even() -> None:
    found = choose(np.zeros((4000, 8)), 2, "random", seed=1).rows
    assert np.bincount(found.ravel(), minlength=8) / 8000 == pytest.approx(np.full(8, 1 / 8), abs=0.015)  # four standard errors


def test_an_item_is_never_its_own_example_even_as_a_copy() -> None:
    shots = items(4)
    copy = replace(shots[1], images=(shots[1].images[0].copy(),), item="another name", label="other")
    other_text, other_picture = replace(shots[1], text="else"), replace(shots[1], images=shots[2].images)
    same = same_items([shots[1]], [*shots, copy, other_text, other_picture])
    assert same.tolist() == [[False, True, False, False, True, False, False]]
    rows = np.eye(4)
    found = retrieve(None, shots, shots, 1, embeddings=(rows, rows), progress=False)
    assert (found.rows[:, 0] != np.arange(4)).all()


def test_refusals(organism: Organism) -> None:
    shots, likeness = items(3), np.zeros((3, 3))
    with pytest.raises(OptionError, match=r"1\.\.3"):
        choose(likeness, 4)
    with pytest.raises(EpisodeError, match="one row per item"):
        embed(rows(2, 4, 0), shots)
    with pytest.raises(OptionError, match="embedded alike"):
        similarities(Embeddings(rows(2, 4, 0), rows(2, 0, 0)), Embeddings(rows(2, 5, 0), rows(2, 0, 0)))
    with pytest.raises(OptionError, match="weight"):
        similarities(Embeddings(rows(2, 4, 0), rows(2, 0, 0)), Embeddings(rows(2, 4, 0), rows(2, 0, 0)), text=2.0)
    model = hooked(organism, "qwen2_5_vl")
    with pytest.raises(EpisodeError, match="non-empty"):
        embed(model, [])
    with unchecked():
        with pytest.raises(OptionError, match="by must be"):
            choose(likeness, 1, "nearest")  # type: ignore[arg-type]
        with pytest.raises(OptionError, match="eyes"):
            OwnEmbedder(model, "nose")  # type: ignore[arg-type]


def test_broken_weights_are_an_error(organism: Organism) -> None:
    from mechicl.training.organisms import build

    hf, processor = build("llava", preset="tiny", seed=0)
    model = HookedVLM(hf, processor, check=False)
    hf.get_input_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="finite"):
        embed(model, items(1))
