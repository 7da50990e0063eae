"""The trace on planted truth: the way through exemplar and last token is found, the planted heads are the circuit, and nothing is claimed where nothing is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import unchecked

from mechicl.analysis.circuits import tracing
from mechicl.analysis.circuits.tracing import differs, stops, trace_answer
from mechicl.errors import OptionError
from mechicl.models.planted import Planted, planted_induction, untrained
from mechicl.models.toys.prompts import ToyRenderer, ToyVocabulary, toy_episodes
from mechicl.prompts.episode import Episode
from mechicl.results import Trace
from mechicl.views import trace_story

RENDERER = ToyRenderer(ToyVocabulary(10, 20))
QUIET: dict[str, Any] = {"progress": False, "exact": 4, "n_random": 20}


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    return toy_episodes(28, classes=3, vocabulary=RENDERER.vocabulary, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def planted() -> Planted:
    return planted_induction(n_heads=3, renderer=RENDERER, n_ctx=16, sharpness=12.0, seed=1)


@pytest.fixture(scope="module")
def trace(planted: Planted, episodes: list[Episode]) -> Trace:
    return trace_answer(planted.model, episodes[::2], episodes[1::2], **QUIET)


def test_the_way_of_the_answer_is_found(trace: Trace) -> None:
    assert trace.patching is not None
    legs = trace_story.route(trace.patching)
    spans = [{span for span, _ in parts} for _, parts in legs]
    assert {"right text", "wrong text"} & spans[0]  # the exemplars' items were exchanged, and layer 0 still finds the answer there
    assert {"right label", "wrong label"} & spans[-1]  # the previous-token head has written them into the labels' stream
    assert "layer" in trace_story.route_sentence(trace.patching)


def test_the_planted_heads_are_the_heads_that_move_the_answer(trace: Trace, planted: Planted) -> None:
    assert trace.patching is not None
    z = trace.patching["z"]
    moved = {tuple(int(i) for i in cell) for cell in np.argwhere((z.p_corrected < 0.05) & (np.abs(z.value) > 0.05))}
    assert moved == set(planted.circuit)
    sentence = trace_story.heads_sentence(trace.patching)
    assert all(f"{layer}.{head} (" in sentence for layer, head in planted.circuit)


def test_the_circuit_is_made_of_the_planted_heads_and_does_the_work_on_other_pairs(trace: Trace, planted: Planted) -> None:
    assert trace.notes == ()
    assert trace.circuit is not None
    assert trace.circuit.held_out
    assert (trace.n_find, trace.n_prove) == (12, 14)
    heads = {(n.layer, n.head) for n in trace.circuit.nodes if n.kind == "head"}
    assert heads == set(planted.circuit)
    assert trace_story.carries(trace.circuit)
    assert trace.circuit.random_high < trace.circuit.faithfulness.low
    assert trace.curve is not None
    assert trace.curve.circuit is trace.circuit
    assert trace.circuit.n_edges in trace.curve.ks
    assert trace.edge_scores is not None
    assert trace.edge_scores.agreement is not None


def test_p_is_corrected_over_the_cells_of_both_sites(trace: Trace) -> None:
    assert trace.patching is not None
    cells = sum(int(np.isfinite(site.p).sum()) for site in trace.patching.sites.values())
    smallest = min(np.nanmin(site.p) for site in trace.patching.sites.values())
    assert min(np.nanmin(site.p_corrected) for site in trace.patching.sites.values()) == pytest.approx(min(1.0, smallest * cells))


def test_the_same_call_gives_the_same_numbers(trace: Trace, planted: Planted, episodes: list[Episode]) -> None:
    again = trace_answer(planted.model, episodes[::2], episodes[1::2], **QUIET)
    assert trace.circuit is not None
    assert again.circuit is not None
    assert again.circuit.edges == trace.circuit.edges
    assert again.circuit.faithfulness.value == trace.circuit.faithfulness.value


def test_a_network_that_learnt_nothing_has_no_circuit(episodes: list[Episode]) -> None:
    found = trace_answer(untrained(n_layers=2, n_heads=3, renderer=RENDERER), episodes[::2], episodes[1::2], **QUIET)
    assert found.circuit is None
    assert found.patching is None or not differs(found.patching)
    assert any("nothing to trace" in note or "not patched" in note for note in found.notes)


def test_without_pairs_the_trace_says_why(planted: Planted, episodes: list[Episode]) -> None:
    alone = [replace(e, shots=tuple(s for s in e.shots if s.label == e.answer)) for e in episodes]  # one label only: nothing to exchange
    found = trace_answer(planted.model, alone[::2], alone[1::2], **QUIET)
    assert found.patching is None
    assert found.pairs == ""
    assert "No minimal pairs" in found.notes[0]
    few = trace_answer(planted.model, episodes[:4], episodes[4:8], **QUIET)
    assert "only 4 of 4 prompts have a partner" in few.notes[0]


def test_a_model_without_summands_is_patched_but_has_no_circuit(
    planted: Planted, episodes: list[Episode], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planted.model, "not_additive", "a norm stands after attention", raising=False)
    found = trace_answer(planted.model, episodes[::2], episodes[1::2], **QUIET)
    assert found.patching is not None
    assert found.circuit is None
    assert any(note.startswith("No circuit: model must add its heads' outputs") for note in found.notes)


def test_what_does_not_fit_into_memory_is_not_tried(planted: Planted, episodes: list[Episode], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "MOST_BYTES", 10)
    found = trace_answer(planted.model, episodes[::2], episodes[1::2], **QUIET)
    assert found.circuit is None
    assert any("must fit into" in note for note in found.notes)


def test_large_graphs_are_searched_node_by_node(planted: Planted, episodes: list[Episode], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "MOST_EDGES", 3)
    found = trace_answer(planted.model, episodes[::2], episodes[1::2], **QUIET)
    assert found.circuit is not None
    assert found.circuit.level == "node"
    assert found.curve is not None


@pytest.mark.parametrize(("size", "most"), [(1, 9), (31, 479), (8, 8), (100, 120)])
def test_stops_hold_the_circuits_size_and_stay_within_the_graph(size: int, most: int) -> None:
    found = stops(size, most)
    assert found == sorted(set(found))
    assert size in found
    assert all(0 < k <= most for k in found)
    assert len(found) <= 9


def test_a_way_of_making_pairs_that_does_not_exist_is_refused() -> None:
    nothing: Any = None
    with unchecked(), pytest.raises(OptionError, match="how must be one of"):
        trace_answer(nothing, [], [], how="upside_down")  # type: ignore[arg-type]
