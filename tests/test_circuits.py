"""Circuits: planted edges recovered with distractors, controls on untrained models, searches on made-up values, overlap against counting, refusals."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mechicl.analysis.circuits.benchmark import benchmark_methods, noisy
from mechicl.analysis.circuits.find import circuit_curve, evaluate_circuit, find_circuit
from mechicl.analysis.circuits.overlap import compare_circuits
from mechicl.analysis.circuits.runs import CircuitRuns
from mechicl.analysis.circuits.scores import places_of
from mechicl.analysis.circuits.search import grown, prefixes, prune, random_edges, random_nodes, smallest_prefix
from mechicl.analysis.gradients.attribution import attribute
from mechicl.analysis.gradients.edge_attribution import eap
from mechicl.analysis.patching.patch import patch
from mechicl.analysis.patching.paths import path_patch
from mechicl.data import concepts
from mechicl.errors import OptionError, UnsupportedModelError
from mechicl.models.edge_graph import EdgeGraph
from mechicl.models.planted import untrained
from mechicl.models.programs import induction, programs, two_back
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.corrupt import minimal_pairs
from mechicl.results import Edge, Estimate, Receiver, Score, Sender

QUIET: dict[str, Any] = {"progress": False, "n_random": 0}


@pytest.mark.parametrize(("method", "seed"), [("threshold", 0), ("greedy", 1), ("prune", 2)])
def test_the_planted_edges_are_found_exactly_with_distractors(method: str, seed: int) -> None:
    for program in programs(n_distractors=3, seed=seed):
        # the two flags of the conditional programs are drawn: a high target lets none of their halves go
        found = find_circuit(program.model, program.pairs(24, seed), method=method, target=0.97, **QUIET)
        assert set(found.edges) == program.edges, program.name
        assert found.faithfulness.value == pytest.approx(1, abs=1e-3)
        assert found.completeness.value == pytest.approx(0, abs=1e-3)
        assert {node.name for node in found.nodes} == {node.name for node in program.nodes} | {"logits"}
        assert not {f"{layer}.{head}" for layer, head in program.idle} & {node.name for node in found.nodes}


def test_edges_and_not_only_nodes_are_told_apart() -> None:
    """A node circuit of the same program has every edge between its heads: the right heads, and edges that carry nothing."""
    program = induction(n_distractors=3)
    nodes = find_circuit(program.model, program.pairs(16, 0), level="node", method="greedy", **QUIET)
    assert {node.name for node in nodes.nodes} == {node.name for node in program.nodes} | {"logits"}
    assert set(nodes.edges) > program.edges
    assert not nodes.minimality
    lost = {node.name: node.loss for node in nodes.nodes}
    assert all(isinstance(loss, Estimate) and loss.value > 0.9 for name, loss in lost.items() if name not in ("embed", "logits"))


def test_measures_agree_with_their_definitions() -> None:
    program = two_back()
    pairs = program.pairs(20, 3)
    found = find_circuit(program.model, pairs, n_random=20, progress=False, seed=4)
    assert (found.n, found.n_found, found.held_out) == (10, 10, True)
    gap = found.clean.mean() - found.corrupt.mean()
    assert found.faithfulness.value == pytest.approx((found.kept.mean() - found.corrupt.mean()) / gap)
    assert found.completeness.value == pytest.approx((found.complement.mean() - found.corrupt.mean()) / gap)
    # every edge is needed: without it nothing of the answer is left, or less than nothing
    assert [one.edge for one in found.minimality] == list(found.edges)
    assert all(one.loss.value > 0.5 and one.loss.low > 0 for one in found.minimality)
    assert found.p_random == pytest.approx(1 / 21)
    assert found.random_high < 0.9
    # the circuit falls with a node as the model does: nothing else does its work
    assert all(abs(one.gap.value) < 1e-3 for one in found.gaps)
    frame = found.to_frame()
    assert len(frame) == found.n_edges
    assert set(frame["edge"]) == {edge.name for edge in program.edges}


def test_a_backup_head_is_seen_node_by_node_and_not_in_the_complement() -> None:
    """Two heads that do the same, one of them in the circuit: the complement lacks what feeds them both, so it shows nothing; Wang's form of completeness shows it."""
    program = induction(n_matching=2, n_distractors=1, seed=1)
    pairs = program.pairs(16, 0)
    one, other = sorted(edge.sender.name for edge in program.edges if edge.receiver.kind == "logits")
    half = {edge for edge in program.edges if other not in edge.name}
    found = evaluate_circuit(program.model, pairs, half, **QUIET)
    whole = evaluate_circuit(program.model, pairs, program.edges, **QUIET)
    assert whole.faithfulness.value == pytest.approx(1, abs=1e-3)
    assert found.faithfulness.value == pytest.approx(0.5, abs=0.1)  # each carries its share of the logit
    assert abs(found.completeness.value) < 0.15
    gap = next(one_gap for one_gap in found.gaps if one_gap.node == one)
    assert gap.circuit.value == pytest.approx(0, abs=1e-3)
    assert gap.model.value == pytest.approx(0.5, abs=0.1)
    assert gap.gap.high < -0.3


def test_on_random_weights_random_circuits_do_as_well() -> None:
    """The negative control, on the same prompts: matched random circuits are as faithful as what was found, or there is no difference to share."""
    program = induction(seed=1)
    pairs = program.pairs(24, 0)
    model = untrained(n_layers=2, n_heads=program.model.cfg.n_heads, seed=0)
    control = find_circuit(model, pairs, n_random=30, progress=False)
    truth = find_circuit(program.model, pairs, n_random=30, progress=False)
    assert truth.p_random == pytest.approx(1 / 31)
    assert not any("uncertain" in note for note in truth.notes)
    assert control.p_random > 0.05 or any("uncertain" in note for note in control.notes)
    # the search found something, as it always does; other prompts do not bear it out
    assert control.found is not None
    assert control.found.value > 0.8
    assert control.faithfulness.low < 0.3


def test_single_edges_dropped_are_what_path_patching_measures() -> None:
    """Two implementations: all edges but one here, one edge patched there."""
    program = programs()[2]
    model = noisy(program.model, 0.1, 0)
    pairs = program.pairs(6, 0)
    effects = path_patch(model, pairs, senders="all", receivers="all", direction="noise", n_permutations=20, progress=False)
    runs = CircuitRuns.of(model, pairs)
    graph = runs.graph
    masks = np.repeat(graph.possible[None], len(graph.edges), 0)
    for k, edge in enumerate(graph.edges):
        masks[k, graph.receiver_index[edge.receiver], graph.sender_index[edge.sender]] = False
    ours = runs.values(masks)
    theirs = np.stack([effects.raw[:, *effects.index(edge)] for edge in graph.edges])
    np.testing.assert_allclose(ours, theirs, atol=1e-3)  # logits of 40 in float32


def test_scores_of_every_kind_lead_to_the_circuit() -> None:
    program = two_back(seed=2)
    pairs = program.pairs(12, 0)
    exact = path_patch(program.model, pairs, senders="all", receivers="all", n_permutations=20, progress=False)
    for scores in (exact, exact.scores(), eap(program.model, pairs, exact=0, progress=False)):
        assert set(find_circuit(program.model, pairs, scores, **QUIET).edges) == program.edges
    nodes = {node.name for node in program.nodes} | {"logits"}
    effects = attribute(program.model, pairs, sites="z", by="head", direction="noise", exact=0, n_permutations=20, progress=False)
    patched = patch(program.model, pairs, sites="z", by="head", direction="noise", n_permutations=20, progress=False)
    heads = {(layer, head): float(effects["z"].value[layer, head]) for layer in range(2) for head in range(program.model.cfg.n_heads)}
    values = np.array(list(patched["z"].value.ravel())).reshape(2, -1)
    blank: Any = np.zeros_like(values)
    score = Score("z", "", "share", 1 - values, blank, blank, blank, blank, blank, blank, blank[None])
    for scores in (effects, patched, {head: 1 - value for head, value in heads.items()}, score, exact):
        found = find_circuit(program.model, pairs, scores, level="node", **QUIET)
        assert {node.name for node in found.nodes} == nodes


def test_a_curve_rises_to_one_where_the_circuit_is_whole_and_random_circuits_do_not() -> None:
    program = two_back()
    curve = circuit_curve(program.model, program.pairs(16, 0), n_random=10, progress=False)
    assert curve.ks[0] == 0
    assert curve.ks[-1] == len(curve.edges_in_order) == curve.n_edges_possible
    values = np.array([one.value for one in curve.faithfulness])
    whole = curve.ks >= len(program.edges)
    np.testing.assert_allclose(values[whole], 1, atol=1e-3)
    assert set(curve.edges_at(len(program.edges))) == program.edges
    assert curve.n_live[list(curve.ks).index(len(program.edges))] == len(program.edges)
    assert curve.random_mean[list(curve.ks).index(len(program.edges))] < 0.5
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert list(curve.to_frame()["k"]) == list(curve.ks)
    nodes = circuit_curve(program.model, program.pairs(16, 0), level="node", ks=[0, 2, 6], n_random=0, progress=False)
    assert np.isnan(nodes.random_mean).all()
    for k, some in zip(nodes.ks, nodes.n_live, strict=True):
        assert len(set(nodes.edges_at(k))) == k >= some


def test_replacing_with_means_and_other_metrics_find_the_same_edges() -> None:
    program = two_back()
    pairs = program.pairs(24, 0)
    for metric in ("label_logprob", "kl"):
        found = find_circuit(program.model, pairs, metric=metric, **QUIET)
        assert set(found.edges) == program.edges
        assert found.metric == metric
    mean = find_circuit(program.model, pairs, replacement="mean", method="prune", **QUIET)
    assert mean.replacement == "mean"
    assert mean.faithfulness.value == pytest.approx(1, abs=0.15)


def test_a_model_with_pictures_has_a_circuit_that_runs_and_is_compared(organism: Callable[..., Any]) -> None:
    """Grouped queries, pictures, an untrained checkpoint: identities and bookkeeping, no claim about what it does."""
    model = HookedVLM(*organism("llava"))
    pairs = minimal_pairs(model.renderer, concepts.draw(6, classes=2, shots=1, size=28, seed=1, syllables=(2, 2)), "swap_labels")
    whole = evaluate_circuit(model, pairs, EdgeGraph.of(model).edges, **QUIET, batch_size=3)
    assert whole.faithfulness.value == pytest.approx(1, abs=1e-3)
    assert whole.n_edges == whole.n_edges_possible
    nodes = find_circuit(model, pairs, level="node", n_random=4, progress=False, target=0.5)
    again = evaluate_circuit(model, pairs, nodes, n_random=0, progress=False)
    assert set(again.edges) == set(nodes.edges)
    overlap = compare_circuits(whole, nodes)
    assert overlap.n_shared == nodes.n_edges
    assert compare_circuits(nodes, nodes, level="node").jaccard.value == 1


def test_whole_labels_of_several_tokens_are_scored_as_patching_scores_them(organism: Callable[..., Any]) -> None:
    """Candidates widen the prompts here and in `patch`: the two ends of the scale agree, whatever the number of prompts at once."""
    model = HookedVLM(*organism("qwen2_5_vl"))
    pairs = minimal_pairs(model.renderer, concepts.draw(5, classes=2, shots=1, size=28, seed=1, syllables=(2, 2)), "swap_labels")
    assert any(len(ids) > 1 for row in pairs.clean.candidate_ids for ids in row)
    for metric in ("label_logprob", "prob", "kl"):
        effects = patch(model, pairs, sites="resid_pre", by="head", layers=[0], metric=metric, n_permutations=10, progress=False)
        for size in (3, 8):
            runs = CircuitRuns.of(model, pairs, metric=metric, batch_size=size)
            np.testing.assert_allclose(runs.clean, effects.clean, atol=1e-5)
            np.testing.assert_allclose(runs.corrupt, effects.corrupt, atol=1e-5)


def test_places_come_from_patching_by_span_and_from_edge_scores() -> None:
    program = induction()
    pairs = program.pairs(12, 0)
    graph = EdgeGraph.of(program.model)
    found = find_circuit(program.model, pairs, places={"0.1": "right label"}, **QUIET)
    assert found.places == {"0.1": "right label"}
    split = eap(program.model, pairs, by_span=True, exact=0, progress=False)
    places = places_of(graph, split)
    last = next(edge.sender.name for edge in program.edges if edge.receiver.kind == "logits")
    assert places[last] in split.spans
    circuit = find_circuit(program.model, pairs, split, places=split, **QUIET)
    assert next(node.place for node in circuit.nodes if node.name == last) == places[last]
    with pytest.raises(OptionError, match="places must be"):
        places_of(graph, 3)


# searches, without a model


def additive(weights: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return lambda sets: sets @ weights


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=150), st.floats(0.05, 0.95))
def test_a_prefix_reaches_the_target_and_the_one_before_it_does_not(sizes: list[float], target: float) -> None:
    weights = np.array(sizes) / np.sum(sizes)
    order = np.argsort(-weights).tolist()
    k = smallest_prefix(order, len(weights), additive(weights), target)
    running = np.cumsum(weights[order])
    assert running[k - 1] >= target - 1e-9 or k == len(weights)
    assert k == 1 or running[k - 2] < target + 1e-9


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.001, 1), min_size=2, max_size=40), st.floats(0.3, 0.95))
def test_pruning_keeps_the_target_and_leaves_nothing_that_could_be_spared(sizes: list[float], target: float) -> None:
    weights = np.array(sizes) / np.sum(sizes)
    kept = prune(np.ones(len(weights), dtype=bool), additive(weights), target, lambda x: x, weights)
    assert weights[kept].sum() >= target - 1e-9
    assert not kept.any() or weights[kept].sum() - weights[kept].min() < target + 2e-6


def test_pruning_keeps_one_of_two_that_do_the_same() -> None:
    """Each can be dropped alone, not both: a joint test is needed, and made."""

    def value(sets: np.ndarray) -> np.ndarray:
        return ((sets[:, 0] | sets[:, 1]) & sets[:, 2]).astype(float)

    kept = prune(np.ones(5, dtype=bool), value, 0.9, lambda x: x, np.arange(5.0))
    assert kept.sum() == 2
    assert kept[2]


def test_prefixes_are_the_first_of_an_order() -> None:
    np.testing.assert_array_equal(prefixes([2, 0], [0, 1, 2], 4), [[0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 1, 0]])


GRAPH = EdgeGraph(3, 3, 1, True)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40))
def test_random_circuits_have_as_many_edges_and_no_dead_ends(seed: int, k: int) -> None:
    draw = np.random.default_rng(seed)
    mask = GRAPH.live(GRAPH.possible & (draw.random(GRAPH.possible.shape) < k / 40))
    assume(mask.any())
    found, matched = random_edges(GRAPH, mask, 3, draw)
    assert 0 < matched <= 1
    for one in found:
        assert one.sum() == mask.sum()
        np.testing.assert_array_equal(GRAPH.live(one), one)


def test_random_circuits_differ_and_random_nodes_keep_their_layers() -> None:
    edges = [("embed", "v 0.0"), ("0.1", "k 2.0"), ("2.1", "logits"), ("mlp 0", "q 2.1"), ("0.1", "mlp 0")]
    names = {edge.name: edge for edge in GRAPH.edges}
    mask = GRAPH.live(GRAPH.mask([names[f"{a} -> {b}"] for a, b in edges]))
    found, matched = random_edges(GRAPH, mask, 30, np.random.default_rng(0))
    assert len({one.tobytes() for one in found}) > 10
    assert matched > 0.8
    columns = np.array([s in (Sender("head", 0, 1), Sender("head", 2, 0), Sender("mlp", 1)) for s in GRAPH.senders])
    for one in random_nodes(GRAPH, columns, 10, np.random.default_rng(1)):
        drawn = [s for s, there in zip(GRAPH.senders, one, strict=True) if there]
        assert sorted((s.kind, s.layer if s.kind == "head" else 0) for s in drawn) == [("head", 0), ("head", 2), ("mlp", 0)]


def test_growth_takes_the_strongest_edge_into_what_is_there() -> None:
    scores = np.full(GRAPH.possible.shape, 0.1)
    index = {edge.name: (GRAPH.receiver_index[edge.receiver], GRAPH.sender_index[edge.sender]) for edge in GRAPH.edges}
    scores[index["0.0 -> q 1.1"]] = 9.0  # strongest of all, but 1.1 is not there until it sends something
    scores[index["1.1 -> logits"]] = 2.0
    scores[index["mlp 0 -> logits"]] = 3.0
    order = grown(GRAPH, scores)
    assert order[:3] == [index["mlp 0 -> logits"], index["1.1 -> logits"], index["0.0 -> q 1.1"]]
    assert len(order) == len(set(order)) == len(GRAPH.edges)


# overlap


def test_overlap_of_a_circuit_with_itself_and_with_an_other_program() -> None:
    first, second = two_back(seed=0), two_back(seed=1)
    a, b = (find_circuit(p.model, p.pairs(12, 0), name=f"seed {i}", **QUIET) for i, p in enumerate((first, second)))
    same = compare_circuits(a, a)
    assert same.jaccard.value == 1
    assert same.p < 1e-3
    assert same.shared == tuple(sorted(same.shared, key=list(same.shared).index))
    other = compare_circuits(a, b)
    assert other.names == ("seed 0", "seed 1")
    assert set(other.shared) == {edge.name for edge in first.edges & second.edges}
    assert set(other.only_second) == {edge.name for edge in second.edges - first.edges}
    assert other.jaccard.value == pytest.approx(len(first.edges & second.edges) / len(first.edges | second.edges))
    assert int(other.to_frame()["shared"].to_numpy().sum()) == other.n_shared


def test_chance_is_what_counting_every_set_gives() -> None:
    """Nodes of a graph of one stratum, all pairs of sets written out."""
    from mechicl.analysis.circuits.overlap import shared_pmf

    n, x, y = 7, 3, 4
    fixed = set(range(x))
    counts = np.bincount([len(fixed & set(some)) for some in combinations(range(n), y)], minlength=x + 1)
    np.testing.assert_allclose(shared_pmf([(n, x, y)]), counts / counts.sum(), atol=1e-12)
    # two strata are independent
    two = shared_pmf([(n, x, y), (4, 2, 2)])
    one, other = shared_pmf([(n, x, y)]), shared_pmf([(4, 2, 2)])
    np.testing.assert_allclose(two, np.convolve(one, other), atol=1e-12)
    np.testing.assert_allclose(shared_pmf([(5, 0, 3)]), [1.0])


def test_rankings_overlap_along_their_top() -> None:
    program = two_back()
    pairs = program.pairs(12, 0)
    first = eap(program.model, pairs, exact=0, progress=False)
    second = path_patch(program.model, pairs, senders="all", receivers="all", n_permutations=20, progress=False)
    overlap = compare_circuits(first, second, ks=[1, 7, 20])
    assert list(overlap.ks) == [1, 7, 20]
    assert overlap.top_shared[1] == 7  # the same seven edges lead both
    assert (overlap.top_chance <= overlap.top_high).all()
    assert overlap.top_shared[1] > overlap.top_high[1]
    curve = circuit_curve(program.model, pairs, n_random=0, ks=[7], progress=False)
    circuit = find_circuit(program.model, pairs, **QUIET)
    against = compare_circuits(curve, circuit, strata="layer")
    assert against.jaccard.value == 1
    assert "top 7" in " ".join(against.notes)


def test_models_of_other_shapes_are_not_compared() -> None:
    small, large = two_back(n_distractors=1), two_back(n_distractors=3)
    a, b = (find_circuit(p.model, p.pairs(8, 0), **QUIET) for p in (small, large))
    with pytest.raises(OptionError, match="one shape"):
        compare_circuits(a, b)
    with pytest.raises(OptionError, match="strata"):
        compare_circuits(a, a, strata="head")
    with pytest.raises(OptionError, match="level"):
        compare_circuits(a, a, level="layer")
    edge = Edge(Sender("embed"), Receiver("logits", 2))
    with pytest.raises(OptionError, match="know their model's shape"):
        compare_circuits({edge: 1.0}, {edge: 1.0})


def test_the_benchmark_tells_ways_apart() -> None:
    result = benchmark_methods(["path patching", "EAP", "pruning", "random order"], build=lambda seed: [two_back(seed=seed)], noise=0.1, n_seeds=2, n_pairs=12, progress=False)  # fmt: skip
    rows = {row.method: row for row in result.rows}
    for way in ("path patching", "pruning"):
        assert rows[way].precision.value == rows[way].recall.value == rows[way].exact == 1
    assert rows["random order"].precision.value < 0.3
    assert rows["EAP"].precision.value < 0.5  # saturated attention has no slope
    assert len(result.to_frame()) == 4
    with pytest.raises(OptionError, match="ways must be"):
        benchmark_methods(["guess"])


def test_refusals_say_what_to_do(organism: Callable[..., Any]) -> None:
    program = two_back()
    pairs = program.pairs(4, 0)
    find: Any = lambda *args, **kwargs: find_circuit(program.model, *args, **{**QUIET, **kwargs})  # noqa: E731
    for wrong, words in (
        ({"target": 1.5}, "target must lie"),
        ({"method": "magic"}, "method must be"),
        ({"level": "layer"}, "level must be"),
        ({"replacement": "zero"}, "replacement must be"),
        ({"held_out": 1.0}, "held_out must be"),
        ({"n_random": -1}, "n_random must be"),
        ({"scores": {(0, 0): 1.0}}, "scores must give edges"),
        ({"scores": {Edge(Sender("head", 0, 9), Receiver("logits", 2)): 1.0}}, "edges must be among"),
    ):
        with pytest.raises(OptionError, match=words):
            find(pairs, **wrong)
    with pytest.raises(OptionError, match="nothing to explain"):
        find(type(pairs)(pairs.clean, pairs.clean, "none", ()))
    with pytest.raises(OptionError, match="ks must be"):
        circuit_curve(program.model, pairs, ks=[999], progress=False)
    model = HookedVLM(*organism("gemma3"))
    with pytest.raises(UnsupportedModelError, match="add its heads"):
        find_circuit(model, pairs, **QUIET)
    flattered = find(pairs, held_out=0.0)
    assert "optimistic" in " ".join(flattered.notes)
    assert not flattered.held_out
