"""Continuations scored from one run of the prompt equal those scored the long way, in every family that says it can, hooks included."""

from dataclasses import replace

import pytest
import torch

from mechicl.models.prefix import continue_prompts
from mechicl.models.vlm import HookedVLM
from mechicl.training.organisms import FAMILIES, build
from tests.conftest import worded_episodes

EPISODES = worded_episodes()


def long_way(model: HookedVLM, batch, tokens) -> torch.Tensor:
    wide = batch.repeat(3).append([tokens[i][j][:-1] for j in range(3) for i in range(2)])
    width = max(len(t) for row in tokens for t in row)
    with torch.no_grad():
        return model(wide, positions=(wide.query_pos[:, None] + torch.arange(width)).clamp_max(wide.n_pos - 1)).reshape(3, 2, width, -1)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_ways_agree_with_and_without_a_head_off(family: str) -> None:
    model = HookedVLM(*build(family, preset="tiny"), check=False)
    batch = model.render(EPISODES)
    tokens = batch.candidate_ids
    short = model.continue_prompts(batch, tokens, 2)
    if short is None:
        assert family in ("paligemma", "paligemma2", "mllama"), "a family that could be continued no longer can"
        return

    def off(z: torch.Tensor, hook: object) -> torch.Tensor:
        return torch.cat([torch.zeros_like(z[:, :, :2]), z[:, :, 2:]], 2)

    hook = [(f"blocks.{model.cfg.n_layers - 2}.attn.hook_z", off)]
    with model.hooks(fwd_hooks=hook):
        without = model.continue_prompts(batch, tokens, 2)
        want_without = long_way(model, batch, tokens)
    want = long_way(model, batch, tokens)
    assert (want - want_without).abs().max() > 1e-3
    for j in range(3):
        for i in range(2):
            n = len(tokens[i][j])
            for copy in range(2):
                # float32 attention with and without a cache: a few roundings
                assert (short[copy, j, i, :n] - want[j, i, :n]).abs().max() <= 1e-4 * want.abs().max()
                assert (without[copy, j, i, :n] - want_without[j, i, :n]).abs().max() <= 1e-4 * want.abs().max()


def test_a_model_that_cannot_take_up_its_cache_is_scored_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HookedVLM(*build("llava", preset="tiny"), check=False)
    batch = model.render(EPISODES)
    right = continue_prompts
    monkeypatch.setattr("mechicl.models.prefix.continue_prompts", lambda *args: right(*args).roll(1, -1))
    assert model.continue_prompts(batch, batch.candidate_ids) is None


def test_prompts_of_words_do_not_take_the_places_of_the_pictures_before_them() -> None:
    """Qwen's models remember how many places the last pictures took; a prompt without pictures does not make them forget."""
    words = [replace(e, shots=tuple(replace(s, images=(), text=f"t{i}") for i, s in enumerate(e.shots)), query=replace(e.query, images=(), text="t0")) for e in EPISODES]  # fmt: skip
    model = HookedVLM(*build("qwen2_5_vl", preset="tiny"), check=False)
    batch = model.render(words)
    fresh = model.continue_prompts(batch, batch.candidate_ids)
    pictures = model.render(EPISODES)
    assert model.continue_prompts(pictures, pictures.candidate_ids) is not None
    assert model.hf.model.rope_deltas is not None
    assert bool((model.hf.model.rope_deltas != 0).any())
    again = model.continue_prompts(batch, batch.candidate_ids)
    assert fresh is not None
    assert again is not None
    torch.testing.assert_close(again, fresh, rtol=0, atol=0)
