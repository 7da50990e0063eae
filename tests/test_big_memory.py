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
from mechicl.analysis.guarded import GAVE_UP, each_batch, guarded, noted, say
from mechicl.analysis.heads.published import published_scores
from mechicl.analysis.margin.causal import move_margin
from mechicl.analysis.margin.contrast_pairs import contrast_pairs
from mechicl.data import concepts
from mechicl.errors import NotFiniteError
from mechicl.models.planted import planted_induction
from mechicl.models.toys.prompts import toy_episodes
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


# -- the inner net: only what did not fit is done again

LOOPS: dict[str, Callable[[Any, Any, int], Any]] = {
    "logit_lens": lambda m, e, b: mechicl.logit_lens(m, e, batch_size=b, **QUIET),
    "logit_lens, ranks": lambda m, e, b: mechicl.logit_lens(m, e, of="rank", spans=["last token"], batch_size=b, **QUIET),
    "direct_logits": lambda m, e, b: mechicl.direct_logits(m, e, batch_size=b, **QUIET),
    "direct_logits, spans": lambda m, e, b: mechicl.direct_logits(m, e, by="span", batch_size=b, **QUIET),
    "head_circuits": lambda m, e, b: mechicl.head_circuits(m, [(1, 0)], e, batch_size=b, **QUIET),
    "span_knockout": lambda m, e, b: mechicl.span_knockout(
        m, e, [("last token", "right label")], n_random=2, score="first_token", zero_shot=False, batch_size=b, **QUIET
    ),
    "contrast_margin": lambda m, e, b: mechicl.contrast_margin(m, e, score="first_token", batch_size=b, **QUIET),
    "contrast_pairs": lambda m, e, b: contrast_pairs(m, e, answers=False, batch_size=b, **QUIET),
    "move_margin": lambda m, e, b: move_margin(m, e, [(1, 0)], engine="naive", batch_size=len(e[0].candidates) * b, **QUIET),
    "function_vector_scores": lambda m, e, b: mechicl.function_vector_scores(m, e, batch_size=b, **QUIET),
    "published_scores": lambda m, e, b: published_scores(m, e, batch_size=b),
}
SIZE, FEW = 4, 2


@contextmanager
def scarce(monkeypatch: pytest.MonkeyPatch, model: Any, most: int, after: int = 0) -> Iterator[list[int]]:
    """After so many passes a toy raises torch's error above `most` different prompts. Yields how many prompts each pass had that did not raise."""
    run, seen = model.run_blocks, list[int]()

    def look(batch: Any, *args: Any, **options: Any) -> Any:
        if len(set(batch.ids)) > most and len(seen) >= after:
            raise torch.OutOfMemoryError("CUDA out of memory")
        seen.append(len(set(batch.ids)))
        return run(batch, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(model, "run_blocks", look)
        yield seen


def every_number(result: Any) -> list[np.ndarray]:
    """Every array of a result, and of the results in it."""
    if isinstance(result, np.ndarray):
        return [result.astype(float)] if result.dtype.kind in "fib" else []
    if isinstance(result, dict):
        return [x for value in result.values() for x in every_number(value)]
    if isinstance(result, tuple):
        return [x for value in result for x in every_number(value)]
    if isinstance(result, float):
        return [np.array([result])]
    inside = getattr(result, "__dataclass_fields__", {})
    return [x for name in inside if name not in ("provenance", "residue") for x in every_number(getattr(result, name))]


@pytest.fixture(scope="module")
def toy() -> Any:
    return planted_induction(n_heads=3).model


@pytest.mark.parametrize("name", LOOPS)
def test_a_batch_that_does_not_fit_is_halved_and_the_finished_ones_are_kept(name: str, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, data = LOOPS[name], toy_episodes(8)  # prompts of one length: batches differ in nothing but their size
    with scarce(monkeypatch, toy, most=8) as plenty:
        whole = run(toy, data, SIZE)
    assert max(plenty) == SIZE  # there was something to halve
    with scarce(monkeypatch, toy, FEW, after=len(plenty) // 2) as seen, noted() as notes:
        result = run(toy, data, SIZE)
    assert sum(seen) <= sum(plenty)  # half of the passes were done when memory ran out, and none of them again
    assert SIZE in seen
    assert seen[-1] <= FEW
    assert any(f"Memory ran out at {SIZE} prompts" in note and "left nothing out" in note for note in notes)
    told = getattr(result, "notes", notes)
    assert any("Memory ran out" in note for note in told)
    pairs = list(zip(every_number(result), every_number(whole), strict=True))
    assert sum(x.size for x, _ in pairs) > 8
    for x, y in pairs:
        np.testing.assert_allclose(x, y, atol=2e-6, rtol=2e-5)  # float32 sums over another number of rows


def test_what_an_analysis_inside_notes_the_one_around_it_says(toy: Any) -> None:
    @guarded
    def inner(model: Any, batch_size: int = 2) -> float:
        say("a note of the inner one")
        return 1.0

    @guarded
    def outer(model: Any, batch_size: int = 2) -> float:
        return inner(model)

    with noted() as notes:
        outer(toy)
    assert notes == ["a note of the inner one"]
    with noted() as notes:
        pass
    assert notes == []


def test_work_that_keeps_its_parts_is_watched_too(model: Any, episodes: list[Any]) -> None:
    weight = model.anatomy.layers[2].block.mlp.down_proj.weight
    kept = weight.data.clone()
    batch = model.render(episodes[:1])
    try:
        weight.data.fill_(torch.inf)
        with pytest.raises(NotFiniteError, match="first in the output of layer 2"), noted(model):
            model(batch)
    finally:
        weight.data.copy_(kept)
    with noted(model) as notes:
        model(batch)
    assert notes == []


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
