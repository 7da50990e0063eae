"""The same in nnsight: head scores and knock-outs computed inside a trace equal mechicl's, on several families; remote runs get what they need or are refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import mechicl
from mechicl.analysis.ablation.ablate import ablate
from mechicl.data import concepts
from mechicl.errors import OptionError, UnsupportedModelError
from mechicl.models import trace as tracing
from mechicl.models.trace import attention_path, check_key, o_proj_path, open_trace, path_of, remote_envoy
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.batch import Batch
from mechicl.training.organisms import build

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava", "internvl", "gemma3")
"""Grouped-query attention with 2-D positions, with norms on queries and keys, without grouping, another template, sliding windows with norms behind the heads."""
SAME = 2e-5
"""Float32: eager attention and the registered function add in another order."""


@cache
def hooked(family: str) -> HookedVLM:
    return HookedVLM(*build(family, preset="tiny"), name=family, check=False)


@cache
def prompts(family: str) -> Batch:
    return hooked(family).render(concepts.draw(4, classes=2, shots=1, size=28, seed=5, syllables=(2, 2)))


@contextmanager
def eager(model: HookedVLM) -> Iterator[None]:
    """transformers' own eager attention, whose modules hand out their patterns."""
    configs = model.anatomy.configs
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation_internal = "eager"
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


def traced_patterns(model: HookedVLM, batch: Batch) -> list[torch.Tensor]:
    """The pattern of every layer, [batch, head, dest, src], read in one trace."""
    with eager(model), torch.no_grad(), model.trace(batch):
        patterns: Any = [model.nnsight.get(attention_path(model, layer)).output[1] for layer in range(model.cfg.n_layers)].save()  # type: ignore[attr-defined]
    return patterns


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_are_the_same(family: str) -> None:
    model, batch = hooked(family), prompts(family)
    _, cache_ = model.run_with_cache(batch, names_filter=lambda name: name.endswith("hook_pattern"))
    for layer, pattern in enumerate(traced_patterns(model, batch)):
        ours = cache_[f"blocks.{layer}.attn.hook_pattern"]
        real = batch.inputs["attention_mask"].bool()[:, None, :, None]
        assert torch.allclose(torch.where(real, ours, 0.0), torch.where(real, pattern, 0.0), atol=SAME)


@pytest.mark.parametrize("family", FAMILIES)
def test_head_scores_from_a_trace_are_score_heads(family: str) -> None:
    model, batch = hooked(family), prompts(family)
    scores = mechicl.score_heads(model, batch, scores=("induction_label",), n_null=1, progress=False)["induction_label"]
    right, wrong = batch.mask("label", right=True), batch.mask("label", right=False)
    rows = torch.arange(batch.n)
    for layer, pattern in enumerate(traced_patterns(model, batch)):
        last = pattern[rows, :, batch.query_pos]  # [batch, head, src]
        score = (last * right[:, None]).sum(-1) - (last * wrong[:, None]).sum(-1)  # one exemplar of each class
        np.testing.assert_allclose(scores.value[layer], score.mean(0).numpy(), atol=SAME)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_knock_out_in_a_trace_is_ablate(family: str) -> None:
    model, batch = hooked(family), prompts(family)
    layer, head = model.cfg.n_layers - 1, model.cfg.n_heads - 1
    ours = ablate(model, batch, [(layer, head)], "zero", n_random=0, zero_shot=False, score="first_token", progress=False)
    width = model.anatomy.layers[layer].d_value
    unembed = path_of(model.hf, model.anatomy.unembed)
    with torch.no_grad(), model.trace(batch):
        heads = model.nnsight.get(o_proj_path(model, layer))
        z = heads.input.clone()
        z[..., head * width : (head + 1) * width] = 0.0
        heads.input = z
        logits = model.nnsight.get(unembed).output.save()
    last = logits[torch.arange(batch.n), batch.query_pos].float().log_softmax(-1)
    if (cap := getattr(model.hf.config.get_text_config(), "final_logit_softcapping", None)) is not None:
        raise AssertionError(f"the unembedding's output is not yet capped at {cap}: read the model's output instead")
    margins = []
    for row, ids, answer in zip(last, batch.candidate_ids, batch.answers, strict=True):
        first = np.array([float(row[one[0]]) for one in ids])
        margins.append(first[answer] - np.delete(first, answer).max())
    np.testing.assert_allclose(ours.chosen.margins, margins, atol=10 * SAME)
    assert np.abs(ours.chosen.margins - ours.intact.margins).max() > 10 * SAME, "a knock-out that changes nothing proves nothing"


def test_grouped_heads_are_grouped() -> None:
    model = hooked("qwen2_5_vl")
    assert model.cfg.n_heads > model.cfg.n_key_value_heads


def test_paths_are_the_modules() -> None:
    model = hooked("llava")
    named = dict(model.hf.named_modules())
    assert named[o_proj_path(model, 0)] is model.anatomy.layers[0].o_proj
    assert named[attention_path(model, 1)] is model.anatomy.layers[1].attention
    with pytest.raises(UnsupportedModelError, match="must be part of the model"):
        path_of(model.hf, torch.nn.Linear(2, 2))


# -- remote: nothing here reaches a network -----------------------------------------------------------------------------------------------------


class Envoy:
    """Stands for nnsight's wrapper; remembers what it was asked."""

    def __init__(self, name: str) -> None:
        self.name, self.asked = name, {}

    def trace(self, **kwargs: Any) -> str:
        self.asked = kwargs
        return self.name


def keyless(monkeypatch: pytest.MonkeyPatch, key: str | None) -> None:
    import nnsight

    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", key)
    monkeypatch.delenv("NDIF_API_KEY", raising=False)


def test_a_remote_trace_passes_everything_through(monkeypatch: pytest.MonkeyPatch) -> None:
    keyless(monkeypatch, "a key")
    model, batch, there = hooked("qwen2_5_vl"), prompts("qwen2_5_vl"), Envoy("there")
    monkeypatch.setitem(model.__dict__, "remote", there)
    for where in (True, "https://host.example"):
        assert model.trace(batch, remote=where, blocking=False, job_id="7") == "there"
        assert there.asked["remote"] == where
        assert (there.asked["blocking"], there.asked["job_id"]) == (False, "7")
        for name, value in model.inputs(batch).items():
            assert torch.equal(there.asked[name], value) if isinstance(value, torch.Tensor) else there.asked[name] == value


def test_without_remote_nothing_remote_is_touched() -> None:
    here = Envoy("here")

    def never() -> Any:
        raise AssertionError("the remote envoy was made")

    assert open_trace(here, never, {"input_ids": torch.zeros(1, 2)}, verbose=True) == "here"
    assert set(here.asked) == {"input_ids", "verbose"}


def test_without_a_key_a_remote_trace_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    keyless(monkeypatch, None)
    there = Envoy("there")
    with pytest.raises(OptionError, match="nnsight has none"):
        open_trace(there, lambda: there, {}, where=True)
    assert not there.asked
    monkeypatch.setenv("NDIF_API_KEY", "a key")
    check_key()
    monkeypatch.delenv("NDIF_API_KEY")
    assert open_trace(there, lambda: there, {}, where="local") == "there"  # nnsight's rehearsal in this process


@pytest.mark.parametrize("name", ["demo", "/some/folder", "qwen2_5_vl", "."])
def test_a_model_that_is_not_on_the_hub_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match="must be on the hub to be traced remotely"):
        remote_envoy(name)


def test_the_bundled_model_says_so_before_a_key_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    keyless(monkeypatch, None)
    with pytest.raises(OptionError, match="which only this machine has"):
        hooked("llava").trace(prompts("llava"), remote=True)


def test_a_hub_model_is_addressed_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import nnsight.modeling.transformers as theirs

    made: dict[str, Any] = {}
    monkeypatch.setattr(theirs, "TransformersModel", lambda name, **kwargs: made.update(kwargs, name=name) or Envoy("hub"))
    assert remote_envoy("Qwen/Qwen2.5-VL-3B-Instruct", revision="main").name == "hub"
    assert made == {"name": "Qwen/Qwen2.5-VL-3B-Instruct", "task": tracing.TASKS[True], "revision": "main"}
    remote_envoy("Qwen/Qwen2.5-0.5B", pictures=False)
    assert made["task"] == "text-generation"
    assert made["revision"] is None
