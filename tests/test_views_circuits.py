"""The drawn circuit is the result's circuit: nodes by layer and span, lines as wide as scores, and a slider whose every stop shows exactly its edges."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import views_samples_causal as samples
from hypothesis import given, settings
from hypothesis import strategies as st

from mechicl.results import Edge, Receiver, Sender
from mechicl.results.nodes import edges, receivers, senders
from mechicl.views import graph
from mechicl.views.circuits import KINDS
from mechicl.views.plots import figure_json, plot

CURVE = samples.curve()
MODEL = graph.Model(samples.LAYERS, samples.HEADS, samples.SHARED)
EVERY = list(edges(senders(3, 4), receivers(3, 4, 2)))


def lines(figure: Any) -> dict[str, Any]:
    """Edge name -> its trace."""
    return {t.name: t for t in figure.data if t.name and "->" in t.name}


def test_every_stop_of_the_slider_shows_exactly_the_first_k_edges() -> None:
    figure = plot(CURVE)
    names = [t.name for t in figure.data]
    order = [e.name for e in CURVE.edges_in_order]
    assert len(figure.layout.sliders[0].steps) == sum(0 < k <= 150 for k in CURVE.ks)
    for step in figure.layout.sliders[0].steps:
        k = int(step.label)
        shown = {n for n, on in zip(names, step.args[0]["visible"], strict=False) if on and "->" in n}
        assert shown == set(order[:k])
        live = {e.name for e in graph.live_edges(CURVE.edges_at(k), MODEL)}
        pale = {
            n for n, on, o in zip(names, step.args[0]["visible"], step.args[0]["opacity"], strict=False) if on and "->" in n and o < 0.5
        }
        assert pale == shown - live
        assert list(step.args[2]) == list(range(len(step.args[0]["visible"])))


def test_a_stop_shows_the_nodes_of_its_edges_and_no_others() -> None:
    figure = plot(CURVE)
    names = [t.name for t in figure.data]
    every = {s.name for s in senders(3, 4)} | {"logits", "kv 0.0", "kv 0.1", "kv 1.0", "kv 1.1", "kv 2.0", "kv 2.1"}
    for step in figure.layout.sliders[0].steps:
        shown = {n for n, on in zip(names, step.args[0]["visible"], strict=False) if on and n in every}
        assert shown == set(graph.nodes_of(CURVE.edges_at(int(step.label)), MODEL))


def test_a_stop_says_its_faithfulness_and_moves_the_line() -> None:
    figure = plot(CURVE)
    faithful = {int(k): e for k, e in zip(CURVE.ks, CURVE.faithfulness, strict=True)}
    for step in figure.layout.sliders[0].steps:
        said = step.args[1]["annotations[0].text"]
        assert f"faithfulness {faithful[int(step.label)].value:.2f}" in said
        assert "random circuits" in said
        assert step.args[1]["shapes[0].x0"] == step.args[1]["shapes[0].x1"] == int(step.label)
    active = figure.layout.sliders[0].steps[figure.layout.sliders[0].active]
    assert CURVE.circuit is not None
    assert int(active.label) == CURVE.circuit.n_edges  # where the circuit is known, the slider starts there
    assert figure.layout.annotations[0].text == active.args[1]["annotations[0].text"]
    drawn = {t.name for t in figure.data if t.name and "->" in t.name and t.visible}
    assert drawn == {e.name for e in CURVE.edges_at(int(active.label))}


def test_the_curve_beside_the_graph_is_the_results_curve() -> None:
    figure = plot(CURVE)
    curve = next(t for t in figure.data if t.name == "faithfulness, 95 % interval")
    np.testing.assert_array_equal(curve.x, CURVE.ks)
    np.testing.assert_array_equal(curve.y, [e.value for e in CURVE.faithfulness])
    band = next(t for t in figure.data if t.name == "95 % of random circuits")
    np.testing.assert_array_equal(band.y, CURVE.random_low)
    without = plot(replace(CURVE, n_draws=0))
    assert not any(t.name == "95 % of random circuits" for t in without.data)


def test_without_a_circuit_the_slider_starts_where_the_curve_is_faithful_enough() -> None:
    figure = plot(samples.curve(with_circuit=False))
    slider = figure.layout.sliders[0]
    first = next(int(k) for k, e in zip(CURVE.ks, CURVE.faithfulness, strict=True) if e.value >= 0.85)
    assert int(slider.steps[slider.active].label) == first
    never = plot(samples.curve(with_circuit=False, faithful=0.5), max_edges=50)
    assert never.layout.sliders[0].active == len(never.layout.sliders[0].steps) - 1


def test_a_line_is_as_wide_as_its_score_and_a_minus_marks_what_speaks_against() -> None:
    figure = plot(samples.circuit())
    drawn, scores = lines(figure), {e.name: s for e, s in samples.circuit().scores.items()}
    assert set(drawn) == {e.name for e in samples.circuit().edges}
    by_width = sorted(drawn, key=lambda n: -drawn[n].line.width)
    assert by_width == sorted(drawn, key=lambda n: -abs(scores[n]))
    for name, line in drawn.items():
        kind = samples.circuit().edges[[e.name for e in samples.circuit().edges].index(name)].receiver.kind
        assert (line.line.color, line.line.dash) == KINDS[kind][:2]
        assert any("\u2212" in t for t in line.text or ()) == (scores[name] < 0)
        assert name.replace("->", "\u2192") in line.hovertemplate


def test_heads_stand_at_their_layer_in_the_column_of_their_span() -> None:
    found = samples.circuit()
    drawing = graph.arrange(list(found.edges), MODEL, samples.PLACES)
    columns = {name: (left, right) for _, name, left, right in drawing.columns}
    rows = {name: y for y, name in drawing.rows if name}
    for name, place in samples.PLACES.items():
        if name in drawing.at:
            x, y = drawing.at[name]
            assert columns[place][0] <= x <= columns[place][1]
            assert y == rows[name.split(".")[0]]
    assert [name for _, name, _, _ in drawing.columns] == ["right label", "last token", "MLP"]  # as the prompt runs, MLPs at the end
    assert drawing.at["embed"][1] < min(y for n, (_, y) in drawing.at.items() if n != "embed")
    assert drawing.at["logits"][1] > max(y for n, (_, y) in drawing.at.items() if n != "logits")
    assert len(set(drawing.at.values())) == len(drawing.at)  # no two nodes in one place


def test_without_places_columns_are_heads() -> None:
    drawing = graph.arrange(list(samples.circuit().edges), MODEL, {})
    assert not drawing.by_place
    assert drawing.at["1.0"][0] < drawing.at["1.1"][0]
    nowhere = replace(CURVE, places={}, circuit=replace(samples.circuit(), places={}))
    assert "columns: heads" in plot(nowhere).layout.title.subtitle.text
    assert "columns: the span a head acts at" in plot(CURVE).layout.title.subtitle.text


def test_shared_keys_and_values_are_one_node_tied_to_the_heads_that_share_it() -> None:
    nodes = graph.nodes_of([Edge(Sender("embed"), Receiver("k", 1, 1)), Edge(Sender("head", 1, 2), Receiver("logits", 3)), Edge(Sender("head", 1, 3), Receiver("logits", 3)),
                            Edge(Sender("head", 1, 0), Receiver("logits", 3))], MODEL)  # fmt: skip
    assert graph.shares(nodes, MODEL) == [("kv 1.1", "1.2"), ("kv 1.1", "1.3")]
    own = graph.Model(3, 4, 4)
    assert own.target(Receiver("k", 1, 2)) == "1.2"
    assert graph.shares(nodes, own) == []


def test_sizes_are_read_off_the_edges_where_no_shape_is_known() -> None:
    assert graph.model_of(EVERY) == MODEL
    assert graph.model_of(EVERY[:3], {"n_layers": 3, "n_heads": 4, "n_key_value_heads": 2, "mlps": [0, 1]}) == MODEL
    assert not graph.model_of(edges(senders(2, 3), receivers(2, 3, 3))).grouped


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, len(EVERY) - 1), max_size=40))
def test_live_edges_are_those_of_the_models_own_graph(chosen: set[int]) -> None:
    from mechicl.models.edge_graph import EdgeGraph

    some = [EVERY[i] for i in sorted(chosen)]
    whole = EdgeGraph(3, 4, 2, True)
    want = set(whole.listed(whole.live(whole.mask(some))))
    assert graph.live_edges(some, MODEL) == want


def test_the_circuits_evidence_stands_beside_it() -> None:
    found = samples.circuit()
    figure = plot(found)
    rows = {t.name: t for t in figure.data if t.xaxis == "x2"}
    assert list(rows["faithfulness"].x) == [found.faithfulness.value]
    assert list(rows["the rest alone"].x) == [found.completeness.value]
    assert list(rows["random (20 draws)"].x) == [found.random_mean]
    losses = sorted((one.loss.value for one in found.minimality), reverse=True)
    np.testing.assert_array_equal(rows["lost without the edge"].x, losses[:14])
    assert "random (20 draws)" not in {t.name for t in plot(samples.circuit(draws=0)).data}
    assert "optimistic" in plot(samples.circuit(held_out=False)).layout.title.subtitle.text


def test_a_curve_of_thousands_of_edges_is_drawn_up_to_a_limit_and_says_so() -> None:
    figure = plot(CURVE, max_edges=20)
    assert len(lines(figure)) == 20
    assert "drawn up to 20 of 190 edges" in figure.layout.title.subtitle.text


def test_an_overlap_shows_shared_and_chance() -> None:
    result = samples.overlap()
    figure = plot(result)
    bars = {t.name: t for t in figure.data}
    np.testing.assert_array_equal(bars["shared"].x, [k.n_shared for k in result.by_kind])
    np.testing.assert_array_equal(bars["expected by chance"].x, [k.expected for k in result.by_kind])
    np.testing.assert_array_equal(bars["shared by the two top k"].y, result.top_shared)
    assert "p = 2e-05" in figure.layout.title.subtitle.text
    assert len(plot(replace(result, ks=np.array([]), top_shared=np.array([]), top_chance=np.array([]), top_high=np.array([]))).data) == 2


@pytest.mark.parametrize("make", [lambda bad: replace(samples.circuit(), places={"1.0": bad}, method=bad), lambda bad: replace(CURVE, places={"1.0": bad}, scored_by=bad, metric=bad, circuit=None),
                                  lambda bad: replace(samples.overlap(), names=(bad, "b"))])  # fmt: skip
def test_text_from_data_is_never_markup(make: Any) -> None:
    text = json.dumps(figure_json(plot(make("<img src=x onerror=alert(1)>"))))
    assert "<img" not in text
    assert "&lt;img" in text
