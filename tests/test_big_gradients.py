"""Gradients of big models: less memory by running MLPs again, and bfloat16 that agrees with float32 as far as was measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForImageTextToText, AutoProcessor

import mechicl
from mechicl.analysis.gradients.backward import slopes
from mechicl.analysis.gradients.memory import checkpointed, counted
from mechicl.data import concepts
from mechicl.models.load import demo_folder, load
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.corrupt import minimal_pairs

QUIET: dict[str, Any] = {"progress": False, "seed": 0, "batch_size": 2}


@pytest.fixture(scope="module")
def model() -> Any:
    return load("demo", check=False)


@pytest.fixture(scope="module")
def episodes() -> list[Any]:
    return concepts.draw(4, classes=2, shots=2, size=56, seed=3, syllables=(2, 2))


def test_gradients_are_the_same_and_keep_less(model: Any, episodes: list[Any]) -> None:
    batch = model.render(episodes)
    names = [f"blocks.{layer}.{point}" for layer in range(4) for point in ("hook_resid_pre", "attn.hook_z", "hook_mlp_out")]

    def measure(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 0].logsumexp(-1)

    with counted() as plain:
        expected = slopes(model, batch, names, measure)
    with checkpointed(model) as again, counted() as less:
        found = slopes(model, batch, names, measure)
    assert len(again) == 4
    for name in names:
        torch.testing.assert_close(found.gradients[name], expected.gradients[name], atol=1e-6, rtol=1e-5)  # the same arithmetic, twice
    assert less["bytes"] < 0.8 * plain["bytes"]  # 0.60 measured on the bundled model; 0.44 without its weights
    assert all("forward" not in part.mlp_out.__dict__ for part in model.anatomy.layers)


@pytest.mark.slow
def test_edge_scores_are_the_same(model: Any, episodes: list[Any]) -> None:
    pairs = minimal_pairs(model.renderer, episodes, "swap_labels")
    expected = mechicl.eap(model, pairs, **QUIET)
    with checkpointed(model):
        found = mechicl.eap(model, pairs, **QUIET)
    names = ["value"] if "value" in found.to_frame() else list(found.to_frame().select_dtypes("float").columns[:1])
    np.testing.assert_allclose(np.sort(found.to_frame()[names[0]]), np.sort(expected.to_frame()[names[0]]), atol=1e-6)


def test_attribution_in_bfloat16_agrees_with_float32(model: Any, episodes: list[Any]) -> None:
    half = HookedVLM(
        AutoModelForImageTextToText.from_pretrained(demo_folder(), dtype=torch.bfloat16), AutoProcessor.from_pretrained(demo_folder())
    )
    pairs = minimal_pairs(model.renderer, episodes, "swap_labels")
    found, expected = (
        mechicl.attribute(m, pairs, sites=["z"], by="head", exact=0, n_permutations=99, **QUIET).to_frame() for m in (half, model)
    )
    column = found.select_dtypes("float").columns[0]
    a, b = found[column].to_numpy(), expected[column].to_numpy()
    assert spearmanr(a, b).statistic > 0.95  # 0.994 measured
    assert np.abs(a - b).max() < 0.05 * np.abs(b).max()  # 0.0075 measured
