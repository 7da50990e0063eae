"""The hand-wired network answers as it must, the untrained one does not, and both have the surface of every other model."""

from typing import Any

import pytest
import torch

from mechicl.errors import EpisodeError, HookNameError, OptionError, RenderError
from mechicl.models.hooked import HookedModel
from mechicl.models.planted import planted_induction, untrained
from mechicl.models.toys.model import ToyTransformer, rotate, toy_config
from mechicl.models.toys.prompts import ToyRenderer, ToyVocabulary, toy_batch, toy_episodes
from mechicl.prompts.episode import Episode, Shot


def share_right(model: ToyTransformer, label_words: int = 1, shots: int = 2) -> float:
    """Share of episodes whose first answer token is the most likely of the whole vocabulary."""
    batch = toy_batch(64, 4, shots, torch.Generator().manual_seed(1), label_words=label_words, renderer=model.renderer)
    expected = torch.tensor([row[a][0] for row, a in zip(batch.candidate_ids, batch.answers, strict=True)])
    return float((model(batch)[:, 0].argmax(-1) == expected).float().mean())


@pytest.mark.parametrize("n_matching", [1, 3])
@pytest.mark.parametrize("label_words", [1, 3])
@pytest.mark.parametrize("bos", [False, True])
def test_the_planted_network_solves_every_episode_and_the_untrained_one_does_not(n_matching: int, label_words: int, bos: bool) -> None:
    renderer = ToyRenderer(bos=bos)
    assert share_right(planted_induction(n_matching=n_matching, renderer=renderer, seed=3).model, label_words) == 1.0
    assert share_right(untrained(renderer=renderer), label_words) < 0.2


def test_planted_heads_do_exactly_what_they_were_made_for() -> None:
    planted = planted_induction(n_heads=4, n_previous=2, n_matching=2, seed=5)
    batch = toy_batch(8, 3, 1)
    _, cache = planted.model.run_with_cache(batch)
    for layer, head in planted.previous_token:
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][:, head]
        assert pattern.diagonal(-1, 1, 2).min() > 0.999
    for layer, head in planted.matching:
        right = batch.mask("label", right=True)
        row = cache[f"blocks.{layer}.attn.hook_pattern"][:, head, -1]
        assert (row * right).sum(-1).min() > 0.999
    assert len(planted.circuit) == 4
    assert set(planted.idle) | set(planted.circuit) == {(layer, head) for layer in range(2) for head in range(4)}


@pytest.mark.parametrize("positions", ["none", "learned", "rope"])
@pytest.mark.parametrize("d_mlp", [None, 32])
def test_left_padding_changes_nothing(positions: Any, d_mlp: int | None) -> None:
    model = untrained(positions=positions, d_mlp=d_mlp, norm=True)
    short, long = toy_episodes(1, classes=2)[0], toy_episodes(1, classes=4, shots=2)[0]
    alone = model(model.render([short]))
    together = model(model.render([long, short]))[1:]
    assert torch.allclose(alone, together, atol=1e-5)  # float32: the sums have other zeros in them


def test_the_toy_has_the_surface_of_every_model_and_transformerlens_names() -> None:
    model = untrained(d_mlp=16, norm=True, positions="rope")
    assert isinstance(model, HookedModel)
    batch = toy_batch(2, 2)
    _, cache = model.run_with_cache(batch)
    for name in (
        "hook_embed",
        "blocks.1.attn.hook_rot_q",
        "blocks.0.hook_resid_mid",
        "blocks.1.mlp.hook_post",
        "ln_final.hook_normalized",
        "blocks.1.hook_resid_post",
    ):
        assert name in cache
    added = cache["blocks.0.hook_resid_pre"] + cache["blocks.0.hook_attn_out"] + cache["blocks.0.hook_mlp_out"]
    assert torch.allclose(added, cache["blocks.0.hook_resid_post"], atol=1e-6)
    with pytest.raises(HookNameError, match="hook_patern"):
        model.run_with_cache(batch, names_filter=["blocks.0.attn.hook_patern"])
    assert model.describe()["model"] == "untrained toy"


def test_heads_results_add_up_to_what_is_added_to_the_stream() -> None:
    model = untrained()
    _, cache = model.run_with_cache(toy_batch(2, 2))
    results = torch.einsum("bphd,hdm->bphm", cache["blocks.0.attn.hook_z"], model.blocks[0].attn.W_O)  # type: ignore[union-attr]
    assert torch.allclose(results.sum(2), cache["blocks.0.hook_attn_out"], atol=1e-5)


def test_attention_rows_are_the_patterns_rows_reduced_or_not() -> None:
    model = untrained()
    batch = toy_batch(3, 2)
    _, cache = model.run_with_cache(batch)
    dest = torch.tensor([1, 3])
    rows = model.attention_rows(batch, dest)
    assert torch.equal(rows[1], cache["blocks.1.attn.hook_pattern"][:, :, dest])
    last = model.attention_rows(batch, "last", layers=[1])
    assert last[0] is None
    assert torch.equal(last[1][:, :, 0], cache["blocks.1.attn.hook_pattern"][:, :, -1])
    chunks = model.attention_rows(batch, dest, reduce=lambda layer, where, rows: (layer, rows.sum()))
    assert chunks[1][0][0] == 1
    with pytest.raises(OptionError, match="positions must be in"):
        model.attention_rows(batch, torch.tensor([99]))
    with pytest.raises(OptionError, match="layers must be in"):
        model.attention_rows(batch, layers=[7])


def test_rotation_depends_on_the_offset_only() -> None:
    """The released code of the paper does not pass this: half of its scores' variance is not a function of the offset."""
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score(i: int, j: int) -> float:
        return float((rotate(q, torch.tensor([[i]])) * rotate(k, torch.tensor([[j]]))).sum())

    assert score(3, 1) == pytest.approx(score(40, 38), abs=1e-9)
    assert score(3, 1) != pytest.approx(score(4, 1), abs=1e-3)


def test_without_an_output_projection_heads_lie_side_by_side() -> None:
    model = ToyTransformer(toy_config(n_heads=4, d_head=16, d_model=64, output_projection=False))
    batch = toy_batch(2, 2)
    _, cache = model.run_with_cache(batch)
    assert torch.equal(cache["blocks.0.attn.hook_z"].flatten(2), cache["blocks.0.hook_attn_out"])
    with pytest.raises(OptionError, match="must equal d_model"):
        toy_config(n_heads=3, d_head=16, d_model=64, output_projection=False)
    with pytest.raises(OptionError, match="even for RoPE"):
        toy_config(d_head=15, positions="rope")


def test_the_same_seed_gives_the_same_network_and_the_same_episodes() -> None:
    assert torch.equal(untrained(seed=4).W_E, untrained(seed=4).W_E)
    assert not torch.equal(untrained(seed=4).W_E, untrained(seed=5).W_E)
    one, two = (toy_batch(4, 3, 2, torch.Generator().manual_seed(9)) for _ in range(2))
    assert torch.equal(one.inputs["input_ids"], two.inputs["input_ids"])


def test_toy_episodes_are_fair() -> None:
    """Each class is shown equally often, the query's is any of them, and so is the place of the answer among the candidates."""
    episodes = toy_episodes(400, classes=4, shots=2)
    for episode in episodes:
        labels = [shot.label for shot in episode.shots]
        assert sorted(labels.count(label) for label in set(labels)) == [2, 2, 2, 2]
    places = [episode.candidates.index(episode.answer) for episode in episodes]
    for place in range(4):
        assert 60 <= places.count(place) <= 140  # 100 expected, four standard deviations are 35


def test_toy_prompts_refuse_what_they_cannot_show() -> None:
    with pytest.raises(RenderError, match="a toy word must be"):
        ToyVocabulary(4, 4).encode("i4")
    with pytest.raises(RenderError, match="a toy word must be"):
        ToyVocabulary().encode("apple")
    with pytest.raises(EpisodeError, match="non-empty"):
        ToyRenderer().render([])
    with pytest.raises(OptionError, match="classes must be"):
        toy_episodes(1, classes=33)
    with pytest.raises(OptionError, match="n_ctx"):
        untrained(n_ctx=8)(toy_batch(1, 4, 2))
    with pytest.raises(OptionError, match="renderer must be given"):
        ToyTransformer(toy_config()).render([Episode((), Shot("l0", text="i0"), ("l0", "l1"))])
    with pytest.raises(OptionError, match="n_previous and n_matching"):
        planted_induction(n_heads=2, n_matching=3)
