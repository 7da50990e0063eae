"""Every public analysis that runs a model gets by with the memory there is and looks at its numbers: the list, and the notes of analyses made of others."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import mechicl
from mechicl.analysis.guarded import MARK, guarded
from mechicl.analysis.spread.job import hire
from mechicl.models.planted import planted_induction
from mechicl.models.toys.prompts import toy_episodes
from mechicl.studies.huang2026_heads import rank_heads
from mechicl.studies.huang2026_knockouts import knock_out
from mechicl.studies.huang2026_sets import plan_sets

MODELS = {"model", "models", "model_a", "base", "source", "name"}
"""What a model, models or the names of some are called in signatures."""
OTHERWISE = {
    "adapt": "a training: how many episodes a step has decides what is learnt, so a step that does not fit is an error; every loss and gradient is checked",
    "load": "loads one; the load-time check looks at its numbers",
}
"""Public functions that take a model and are not guarded, each with the reason."""
QUIET: dict[str, Any] = {"progress": False, "seed": 0}


def public() -> dict[str, Callable[..., Any]]:
    """The functions of mechicl.__all__ that take a model."""
    found = {name: getattr(mechicl, name) for name in mechicl.__all__ if inspect.isfunction(getattr(mechicl, name))}
    return {name: one for name, one in found.items() if MODELS & set(inspect.signature(one).parameters)}


def is_guarded(function: Any) -> bool:
    """Whether it is the work of `guarded`."""
    return getattr(function, MARK, False)


def test_every_public_function_that_takes_a_model_is_guarded_or_says_why_not() -> None:
    found = public()
    assert len(found) > 30
    assert {name for name, one in found.items() if not is_guarded(one)} == set(OTHERWISE)


def test_the_list_would_notice_a_function_without_a_guard() -> None:
    def naked(model: Any, batch_size: int = 8) -> None: ...

    assert not is_guarded(naked)
    assert is_guarded(guarded(naked))
    assert not is_guarded(mechicl.plot)  # wrapped, by something else


@contextmanager
def small(monkeypatch: pytest.MonkeyPatch, model: Any, most: int) -> Iterator[None]:
    """The toy raises torch's error above so many different prompts."""
    run = model.run_blocks

    def look(batch: Any, *args: Any, **options: Any) -> Any:
        if len(set(batch.ids)) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(batch, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(model, "run_blocks", look)
        yield


COMPOSED: dict[str, Callable[[Any, Any, int], Any]] = {
    "compare": lambda m, e, b: mechicl.compare(m, m, e, scores=("induction", "ila"), n_null=99, batch_size=b, **QUIET),
    "heads_improve": lambda m, e, b: mechicl.heads_improve(m, m, e, top=1, n_null=99, batch_size=b, **QUIET),
    "link_circuit": lambda m, e, b: mechicl.link_circuit(m, e, n_random=19, batch_size=b, **QUIET),
    "build_or_sharpen": lambda m, e, b: mechicl.build_or_sharpen(m, {"same": m}, e, parts=False, batch_size=b, **QUIET),
    "evaluate_link": lambda m, e, b: mechicl.evaluate_link(m, e, protocol="episodes", shots=(0, 1), generate=False, baselines=False, batch_size=b, **QUIET),
    "label_corruption": lambda m, e, b: mechicl.label_corruption(m, e, (0.0, 1.0), generate=False, baselines=False, batch_size=b, **QUIET),
    "link_or_prior": lambda m, e, b: mechicl.link_or_prior(m, e, shots=(0, 1), generate=False, batch_size=b, **QUIET),
    "link_priors": lambda m, e, b: mechicl.link_priors({"one": m}, e, shots=(0, 1), batch_size=b, **QUIET),
}  # fmt: skip


SLOW = ("link_circuit", "build_or_sharpen")


@pytest.fixture(scope="module")
def toy() -> Any:
    return planted_induction(n_heads=3).model


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in COMPOSED])
def test_analyses_made_of_others_go_on_with_fewer_prompts_and_say_so(name: str, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, data = COMPOSED[name], toy_episodes(16, classes=2, shots=2)
    whole = run(toy, data, 16)
    with small(monkeypatch, toy, 4):
        result = run(toy, data, 16)
    assert any("Memory ran out at" in note for note in result.notes)
    assert not any("Memory" in note for note in whole.notes)
    assert getattr(result, "n", 0) == getattr(whole, "n", 0)
    assert getattr(result, "skipped", ()) == getattr(whole, "skipped", ())
    if hasattr(whole, "to_frame"):
        first, second = whole.to_frame().select_dtypes("number"), result.to_frame().select_dtypes("number")
        assert (
            first.fillna(-1) - second.fillna(-1)
        ).abs().to_numpy().max() < 1e-3  # prompts of one length: float32 sums of other numbers of rows


def test_a_study_of_a_crew_goes_on_with_fewer_prompts_and_its_tables_say_so(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = toy_episodes(16, classes=2, shots=2)

    def study() -> tuple[Any, Any]:
        with hire(toy, workers=0, shard=8) as crew:
            heads = rank_heads(crew, data[:8], n_null=9, batch_size=8, progress=False)
            rankings: dict[str, Any] = {"IH": ("published", "", heads.top("ih_published", 6))}
            plan = plan_sets(toy, rankings, top=1, n_random=1, dose=(), dose_draws=0, seed=0)
            return heads, knock_out(crew, data[8:], plan, batch_size=8, progress=False)[0]

    plenty = study()
    with small(monkeypatch, toy, 2):
        scarce = study()
    for found, whole in zip(scarce, plenty, strict=True):
        assert any("Memory ran out at" in note for note in found.notes)
        assert not any("Memory" in note for note in whole.notes)
    np.testing.assert_allclose(scarce[0]["ih_published"].per_episode, plenty[0]["ih_published"].per_episode, atol=2e-6)
    assert scarce[1].to_frame().equals(plenty[1].to_frame())
    assert plenty[1]["intact"].whole.value > plenty[1]["top 1 IH"].whole.value  # there was something to see
