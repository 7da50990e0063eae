"""Head scores and ablations of vision-language models against plain transformers: eager attention, and output weights cut by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LABELS, picture
from PIL import Image
from torch import Tensor

from mechicl.analysis.ablation.ablate import ablate
from mechicl.analysis.heads.scoring import attention_by_role, score_heads
from mechicl.analysis.icl import icl_accuracy
from mechicl.analysis.layout import count_shots, layout, place_group
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.align import span_groups
from mechicl.prompts.episode import Episode, Shot
from mechicl.training.organisms import build

FAMILIES = ("qwen2_5_vl", "gemma3", "llava")
"""Grouped heads and picture-dependent positions; sliding windows and pictures read in both directions; the plainest one."""


def episodes(n: int = 4) -> list[Episode]:
    """Two classes of pictures, two shots each, the order and the answer varying; one prompt is longer than the others."""
    found = []
    for k in range(n):
        order = [(0, 1, 0, 1), (1, 0, 0, 1), (0, 0, 1, 1), (0, 1)][k % 4]
        shots = tuple(Shot(LABELS[x], images=(show(x, 10 * k + j),), item=f"class {x}") for j, x in enumerate(order))
        x = k % 2
        query = Shot(LABELS[x], images=(show(x, 10 * k + 9),), item=f"class {x}")
        found.append(Episode(shots, query, LABELS[:2], question="This is a", id=f"pictures {k}"))
    return found


def show(x: int, seed: int) -> Image.Image:
    return picture(56, 56, seed=1000 * x + seed)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[HookedVLM, Any]:
    """A hooked model, and its Hugging Face model again, apart and with eager attention."""
    hf, processor = build(request.param, preset="tiny", seed=3)
    plain, _ = build(request.param, preset="tiny", seed=3)
    plain.set_attn_implementation("eager")
    return HookedVLM(hf, processor), plain.eval()


def eager(plain: Any, inputs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return list(plain(**inputs, output_attentions=True, use_cache=False).attentions)


@pytest.fixture(scope="module")
def patterns(pair: tuple[HookedVLM, Any]) -> Callable[[Episode], tuple[Any, list[Tensor]]]:
    """One episode alone, unpadded: its batch and [head, dest, src] of every layer."""
    model, plain = pair

    def run(episode: Episode) -> tuple[Any, list[Tensor]]:
        batch = model.render([episode])
        return batch, [layer[0] for layer in eager(plain, dict(batch.inputs))]

    return run


def test_scores_agree_with_eager_attention_one_prompt_at_a_time(pair: tuple[HookedVLM, Any], patterns: Any) -> None:
    model, _ = pair
    data = episodes()
    names = ("induction_label", "tila", "tiia", "tla", "induction_paper", "previous_token", "previous_token_all", "sink")
    found = score_heads(model, data, scores=names, n_null=19, batch_size=3, progress=False)
    for i, episode in enumerate(data):
        batch, layers = patterns(episode)
        right, wrong = batch.mask("label", right=True)[0], batch.mask("label", right=False)[0]
        n_right = sum(shot.label == episode.answer for shot in episode.shots)
        n_wrong = len(episode.shots) - n_right
        image = batch.mask("image")[0]
        for layer, pattern in enumerate(layers):
            row = pattern[:, -1].double()
            diagonal = pattern.double().diagonal(-1, 1, 2)
            expected = {
                "induction_label": row[:, right].sum(-1) - n_right / n_wrong * row[:, wrong].sum(-1),
                "tila": row[:, right].sum(-1) / n_right,
                "tiia": row[:, batch.mask("image", right=True)[0]].sum(-1) / n_right,
                "tla": row[:, right | wrong].sum(-1),
                "induction_paper": row[:, right].mean(-1) - row[:, ~right].mean(-1),
                "previous_token": diagonal[:, ~image[1:]].mean(-1),
                "previous_token_all": diagonal.mean(-1),
                "sink": pattern.double()[:, 1:, 0][:, ~image[1:]].mean(-1),
            }
            for name, value in expected.items():
                assert found[name].per_episode[i, layer] == pytest.approx(value.numpy(), abs=1e-5), (name, i, layer)


def test_masses_by_role_agree_with_eager_attention_and_sum_to_one(pair: tuple[HookedVLM, Any], patterns: Any) -> None:
    model, _ = pair
    data = episodes()
    found = attention_by_role(model, data, batch_size=4, progress=False)
    assert found.value.sum(-1) == pytest.approx(np.ones(found.value.shape[:2]), abs=1e-5)
    expected = np.zeros(found.value.shape[:2])
    for episode in data:
        batch, layers = patterns(episode)
        mask = batch.mask("image", right=True)[0]
        expected += np.stack([layer[:, -1, mask].sum(-1).numpy() for layer in layers]) / len(data)
    assert found.value[..., found.spans.index("right image")] == pytest.approx(expected, abs=1e-5)


def test_roles_are_the_groups_of_patching_but_for_two_that_are_coarser(pair: tuple[HookedVLM, Any]) -> None:
    batch = pair[0].render(episodes())
    groups, sorted_in = span_groups(batch), layout(batch, count_shots(batch))
    for name, parts in {"question": ("right question", "wrong question"), "query question": ("query question",), "instruction": ("instruction",),
                        "glue": ("right open", "wrong open", "query open", "last token", "glue")}.items():  # fmt: skip
        expected = torch.stack([groups.get(part, torch.zeros_like(batch.mask("label"))) for part in parts]).any(0)
        assert torch.equal(sorted_in.group == place_group(name, sorted_in.n_shots), expected), name


def test_accuracy_is_that_of_the_plain_model_one_candidate_at_a_time(pair: tuple[HookedVLM, Any]) -> None:
    model, plain = pair
    data = episodes()
    found = icl_accuracy(model, data, batch_size=4, progress=False)
    for i, episode in enumerate(data):
        batch = model.render([episode])
        values = []
        for ids in batch.candidate_ids[0]:
            whole = batch.append([ids])
            with torch.no_grad():
                log_p = plain(**whole.inputs, use_cache=False).logits[0].double().log_softmax(-1)
            values.append(sum(float(log_p[batch.n_pos - 1 + t, token]) for t, token in enumerate(ids)))
        right = episode.candidates.index(episode.answer)
        assert found.margins[i] == pytest.approx(values[right] - values[1 - right], abs=1e-4)  # float32 logits, summed over tokens
    assert found.zero_shot is not None


def test_zeroing_heads_is_zeroing_their_columns_of_the_output_projection(
    pair: tuple[HookedVLM, Any], request: pytest.FixtureRequest
) -> None:
    model, _ = pair
    data, heads = episodes(), [(0, 1), (1, 0)]
    found = ablate(model, data, heads, n_random=2, batch_size=16, progress=False)
    cut, processor = build(request.node.callspec.params["pair"], preset="tiny", seed=3)
    size = model.cfg.d_head
    decoder: Any = cut.get_decoder()
    for layer, head in heads:
        decoder.layers[layer].self_attn.o_proj.weight.data[:, head * size : (head + 1) * size] = 0
    expected = icl_accuracy(HookedVLM(cut, processor), data, zero_shot=False, progress=False)
    assert found.chosen.margins == pytest.approx(expected.margins, abs=1e-4)
    assert not np.allclose(found.chosen.margins, found.intact.margins, atol=1e-4)
    again = icl_accuracy(model, data, zero_shot=False, progress=False)
    assert again.margins == pytest.approx(found.intact.margins, abs=1e-4)  # no trace
