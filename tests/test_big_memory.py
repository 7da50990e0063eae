"""Where memory runs out, analyses go on with fewer prompts per forward pass: nothing is dropped, the numbers are those of the smaller batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import mechicl
from mechicl.analysis.guarded import GAVE_UP, each_batch, guarded
from mechicl.data import concepts
from mechicl.prompts.corrupt import minimal_pairs

N = 4


@pytest.fixture(scope="module")
def model() -> Any:
    return mechicl.load("demo", check=False)


@pytest.fixture(scope="module")
def episodes() -> list[Any]:
    return concepts.draw(N, classes=2, shots=1, size=28, seed=3, syllables=(2, 2))


@contextmanager
def small_memory(model: Any, most: int, seen: list[int] | None = None) -> Iterator[None]:
    """The model raises torch's error above so many prompts."""

    def look(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids")
        if ids is None or ids.shape[1] < 20:  # candidates behind a prompt that has run
            return
        if len(ids) > most:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {len(ids)} prompts")
        if seen is not None:
            seen.append(len(ids))

    handle = model.hf.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


HEADS = ((1, 0), (1, 1))
QUIET: dict[str, Any] = {"progress": False, "seed": 0}
ANALYSES: dict[str, Callable[[Any, Any, int], Any]] = {
    "score_heads": lambda m, e, b: mechicl.score_heads(m, e, batch_size=b, **QUIET),
    "icl_accuracy": lambda m, e, b: mechicl.icl_accuracy(m, e, batch_size=b, **QUIET),
    "ablate mean": lambda m, e, b: mechicl.ablate(m, e, HEADS, "mean", n_random=2, batch_size=b, **QUIET),
    "logit_lens": lambda m, e, b: mechicl.logit_lens(m, e, batch_size=b, **QUIET),
    "direct_logits": lambda m, e, b: mechicl.direct_logits(m, e, batch_size=b, **QUIET),
    "contrast_margin": lambda m, e, b: mechicl.contrast_margin(m, e, batch_size=b, **QUIET),
    "patch": lambda m, e, b: mechicl.patch(
        m, minimal_pairs(m.renderer, e, "swap_labels"), sites=["resid_pre"], layers=[1], batch_size=b, **QUIET
    ),
    "attribute": lambda m, e, b: mechicl.attribute(
        m, minimal_pairs(m.renderer, e, "swap_labels"), sites=["z"], layers=[1], batch_size=b, **QUIET
    ),
    "eap": lambda m, e, b: mechicl.eap(m, minimal_pairs(m.renderer, e, "swap_labels"), batch_size=b, **QUIET),
}


def numbers(result: Any) -> np.ndarray:
    """Every number of the result's table, its rows ordered by their names (a ranking's near ties may change places)."""
    table = result.to_frame()
    named = [name for name in table if not pd.api.types.is_float_dtype(table[name])]
    return table.sort_values(named).select_dtypes("number").to_numpy(dtype=float)


SLOW = ("attribute", "direct_logits", "contrast_margin", "patch", "eap")
EACH = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in ANALYSES]


@pytest.mark.parametrize("name", EACH)
def test_the_result_is_that_of_the_smaller_batch_and_says_so(name: str, model: Any, episodes: list[Any]) -> None:
    run = ANALYSES[name]
    small = run(model, episodes, 2)
    with small_memory(model, 2):
        result = run(model, episodes, N)
    assert result.n == small.n
    assert len(getattr(result, "skipped", ())) == len(getattr(small, "skipped", ()))
    assert not any("Memory" in note for note in small.notes)
    assert any("Memory ran out at" in note and "left nothing out" in note for note in result.notes)
    np.testing.assert_allclose(numbers(result), numbers(small), atol=2e-5, rtol=1e-5)  # padding of other batches: float32 rounding


def test_a_plenty_of_memory_leaves_no_note(model: Any, episodes: list[Any]) -> None:
    with small_memory(model, N):
        assert not any("Memory" in note for note in mechicl.score_heads(model, episodes, batch_size=N, **QUIET).notes)


def test_finished_batches_are_not_done_again_and_later_ones_stay_small(model: Any, episodes: list[Any]) -> None:
    seen: list[int] = []
    with small_memory(model, 1, seen):
        list(each_batch(model, episodes, 4, lambda batch, rows: model(batch)))
    assert seen == [1] * N


@pytest.mark.parametrize(("n", "size", "least", "most"), [(6, 4, 1, 2), (7, 7, 2, 3), (9, 4, 1, 4), (5, 8, 1, 1)])
def test_every_row_comes_once_and_in_order(n: int, size: int, least: int, most: int, model: Any) -> None:
    data = concepts.draw(n, classes=2, shots=1, size=28, seed=1)

    def work(batch: Any, rows: range) -> list[int]:
        if batch.n > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(rows)

    found = list(each_batch(model, data, size, work, least=least))
    assert [row for rows in found for row in rows] == list(range(n))
    assert all(least <= len(rows) <= most for rows in found)


def test_one_prompt_that_does_not_fit_is_an_error_with_advice_after_one_descent(model: Any, episodes: list[Any]) -> None:
    tried: list[int] = []

    @guarded
    def inner(model: Any, batch_size: int = 4) -> None:
        tried.append(batch_size)
        raise torch.OutOfMemoryError("CUDA out of memory")

    @guarded
    def outer(model: Any, batch_size: int = 4) -> None:
        inner(model, batch_size)

    with pytest.raises(torch.OutOfMemoryError) as caught:
        outer(None)
    assert GAVE_UP in caught.value.__notes__
    assert tried == [4, 2, 1]


def test_another_error_is_not_tried_again(model: Any, episodes: list[Any]) -> None:
    tried: list[int] = []

    @guarded
    def broken(model: Any, batch_size: int = 4) -> None:
        tried.append(batch_size)
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        broken(None)
    assert tried == [4]


def test_a_bare_number_warns_and_inside_an_analysis_tells_it() -> None:
    @guarded
    def bare(model: Any, batch_size: int = 2) -> float:
        if batch_size > 1:
            raise MemoryError
        return 1.0

    with pytest.warns(RuntimeWarning, match="Memory ran out at 2"):
        assert bare(None) == 1.0
