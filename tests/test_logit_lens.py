"""The logit lens: the last layer is the model's own answer, a plain loop reads the same at every token, the planted answer appears where it is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from readout_cases import episodes, hooked

from mechicl.analysis.kinds import KINDS, kind_masks
from mechicl.analysis.readout.logit_lens import logit_lens, word
from mechicl.errors import EmptySpanError, EpisodeError, NotFiniteError, OptionError, UnsupportedModelError
from mechicl.models.planted import planted_induction, untrained
from mechicl.models.toys.model import ToyTransformer, toy_config
from mechicl.models.toys.prompts import ToyRenderer, toy_batch, toy_episodes
from mechicl.training.organisms import FAMILIES

QUIET: dict[str, Any] = {"progress": False}


def test_the_planted_answer_appears_in_the_last_layer_at_the_last_token_only() -> None:
    planted = planted_induction(n_heads=3, seed=2)
    batch = toy_batch(24, 3, 2, renderer=planted.model.renderer)
    result = logit_lens(planted.model, batch, **QUIET)
    assert result.layers == (-1, 0, 1)
    last = result.spans.index("last token")
    np.testing.assert_allclose(result.value[:, last], [0, 0, 40], atol=1e-3)
    assert result.p_corrected[2, last] < 0.05
    assert result.p_corrected[:2, last].min() == 1.0
    assert result.null_high[2, last] < result.low[2, last]
    model = untrained(renderer=planted.model.renderer, norm=True)
    nothing = logit_lens(model, toy_batch(48, 3, 2, renderer=model.renderer), **QUIET)
    assert nothing.p_corrected.min() > 0.05


@pytest.mark.parametrize("of", ["margin", "logprob", "rank"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_at_the_last_token_is_the_models_own_answer(family: str, of: str) -> None:
    model, data = hooked(family), episodes(2)
    result = logit_lens(model, data, of=of, spans=["last token"], n_null=50, batch_size=1, **QUIET)
    for i, episode in enumerate(data):
        batch = model.render([episode])
        logits = model(batch)[0, 0].detach().double()
        first = logits[torch.tensor([ids[0] for ids in batch.candidate_ids[0]])]
        right = first[batch.answers[0]]
        expected = {
            "margin": right - first[1 - batch.answers[0]],
            "logprob": right - logits.logsumexp(-1),
            "rank": 1 + (logits > right).sum() + ((logits == right).sum() - 1) / 2,
        }[of]
        assert result.per_episode[i, -1, 0] == pytest.approx(
            float(expected), abs=2e-3
        )  # float32; two or three tokens nearly tied may swap ranks
    assert result.residue < 1e-4


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "llava"])
def test_every_span_pictures_included_is_what_a_plain_loop_reads(family: str) -> None:
    """The independent path: Hugging Face's own hidden states through its own norm and head."""
    model, data = hooked(family), episodes(2)
    layers = list(range(-1, model.cfg.n_layers - 1))  # transformers' last hidden state has been through the norm already
    result = logit_lens(model, data, layers=layers, n_null=50, **QUIET)
    assert {"right image", "query image", "last token"} <= set(result.spans)
    batch = model.render(data)
    with torch.no_grad():
        states = model.hf(**model.inputs(batch), use_cache=False, output_hidden_states=True).hidden_states
        masks = kind_masks(batch, sink=False)
        for k, layer in enumerate(layers):
            logits = model.anatomy.unembed(model.anatomy.final_norm(states[layer + 1]))  # pyright: ignore[reportOptionalCall]
            for i in range(batch.n):
                first = torch.tensor([ids[0] for ids in batch.candidate_ids[i]])
                read = logits[i][:, first]
                margin = read[:, batch.answers[i]] - read[:, 1 - batch.answers[i]]
                for j, kind in enumerate(result.spans):
                    mask = masks[kind][i]
                    expected = float(margin[mask].mean()) if bool(mask.any()) else np.nan
                    assert result.per_episode[i, k, j] == pytest.approx(expected, abs=1e-4, nan_ok=True)


def test_padding_and_batches_change_nothing() -> None:
    model, data = hooked("llava"), episodes(3)
    together, apart = (logit_lens(model, data, batch_size=size, n_null=10, **QUIET) for size in (3, 1))
    np.testing.assert_allclose(together.per_episode, apart.per_episode, atol=2e-5)


def test_one_prompt_is_kept_with_its_most_probable_tokens_and_pictures() -> None:
    model, data = hooked("qwen2_5_vl"), episodes(2)
    result = logit_lens(model, data, prompt=1, top=3, n_null=10, **QUIET)
    shown = result.prompt
    assert shown is not None
    n = len(shown.view.tokens)
    assert shown.margin.shape == (len(result.layers), n)
    assert shown.probability.shape == (len(result.layers), n, 3)
    batch = model.render([data[1]])
    probabilities = model(batch, positions="all")[0].detach().softmax(-1)
    np.testing.assert_allclose(shown.probability[-1], probabilities.topk(3, -1).values, atol=1e-5)
    assert shown.tokens[-1][n - 1][0] == word(model, int(probabilities[-1].argmax()))
    assert len(shown.view.image_boxes) == len(data[1].images)
    assert shown.margin[-1, -1] == pytest.approx(result.per_episode[1, -1, result.spans.index("last token")], abs=1e-4)


def test_ranks_of_tied_tokens_are_shared() -> None:
    planted = planted_induction(n_heads=2, seed=2)
    batch = toy_batch(3, 2, 1, renderer=planted.model.renderer)
    result = logit_lens(planted.model, batch, of="rank", layers=[-1], spans=["last token"], **QUIET)
    assert result.value[0, 0] == (planted.model.cfg.d_vocab + 1) / 2  # nothing is written yet: all logits are zero


def test_the_null_is_what_any_candidate_would_get() -> None:
    model = untrained(renderer=ToyRenderer(), norm=True)
    batch = toy_batch(40, 2, 1, renderer=model.renderer)
    result = logit_lens(model, batch, layers=[1], spans=["last token"], n_null=4000, **QUIET)
    assert result.null[0, 0] == pytest.approx(0.0, abs=0.05)  # of two candidates one's margin is minus the other's
    assert result.null_low[0, 0] < result.null[0, 0] < result.null_high[0, 0]


def test_every_token_has_one_kind() -> None:
    batch = hooked("qwen2_5_vl").render(episodes(3))
    for sink in (True, False):
        total = torch.stack(list(kind_masks(batch, sink=sink).values())).sum(0)
        assert torch.equal(total > 0, ~batch.mask("pad"))
        assert int(total.max()) == 1
    masks = kind_masks(batch)
    assert masks["sink"].sum() == masks["last token"].sum() == batch.n
    assert torch.equal(masks["right label"], batch.mask("label", right=True))


def test_what_does_not_exist_is_refused() -> None:
    model = untrained(renderer=ToyRenderer())
    batch = toy_batch(2, 2, renderer=model.renderer)
    with pytest.raises(OptionError, match="of must be"):
        logit_lens(model, batch, of="entropy", **QUIET)
    with pytest.raises(OptionError, match=r"layers must be in -1\.\.1"):
        logit_lens(model, batch, layers=[2], **QUIET)
    with pytest.raises(OptionError, match="kinds of tokens"):
        logit_lens(model, batch, spans=["pictures"], **QUIET)
    with pytest.raises(EmptySpanError, match="query image"):
        logit_lens(model, batch, spans=["query image"], **QUIET)
    with pytest.raises(OptionError, match="prompt must be"):
        logit_lens(model, batch, prompt=2, **QUIET)
    with pytest.raises(UnsupportedModelError, match="linear function"):
        logit_lens(ToyTransformer(toy_config(classifier="mlp"), ToyRenderer()), batch, **QUIET)
    one = toy_episodes(1, classes=2)[0]
    answer, other = one.answer, next(c for c in one.candidates if c != one.answer)
    swap = {other: f"{answer} {other}"}
    alike = replace(one, shots=tuple(replace(s, label=swap.get(s.label, s.label)) for s in one.shots), candidates=(answer, swap[other]))
    with pytest.raises(EpisodeError, match="first token"):
        logit_lens(model, [alike], **QUIET)


def test_a_nan_is_an_error_that_names_the_episode() -> None:
    model = untrained(renderer=ToyRenderer())
    with torch.no_grad():
        model.W_U.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="toy-0"):
        logit_lens(model, toy_batch(2, 2, renderer=model.renderer), **QUIET)


def test_the_kinds_are_those_of_attention_by_role() -> None:
    from mechicl.analysis.heads.scoring import attention_by_role

    model, data = hooked("qwen2_5_vl"), episodes(3)
    assert set(attention_by_role(model, data, **QUIET).spans) <= {*KINDS, "question"}
