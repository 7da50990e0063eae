"""`eap` on programs whose edges are known, against path patching where the model is straight, and against what must hold by construction."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture

import mechicl
from mechicl.analysis.gradients import edge_gradients
from mechicl.analysis.gradients.differentiable import parts, score
from mechicl.analysis.gradients.edge_attribution import eap
from mechicl.analysis.gradients.edge_exact import edges_exactly
from mechicl.analysis.gradients.edge_gradients import gradients_at, received, sent, two_runs
from mechicl.analysis.patching.paths import path_patch
from mechicl.data.concepts import draw
from mechicl.errors import EpisodeError, OptionError, UnsupportedModelError
from mechicl.models import programs, streams
from mechicl.models.edge_graph import EdgeGraph
from mechicl.models.planted import untrained
from mechicl.models.toys.prompts import ToyRenderer, toy_episodes
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.corrupt import Pairs, minimal_pairs
from mechicl.prompts.episode import Episode, Shot
from mechicl.results import Edge, Receiver, Sender
from mechicl.training.organisms import build

QUIET: dict[str, Any] = {"progress": False}
PROGRAMS = {
    "induction": lambda: programs.induction(),
    "sharper": lambda: programs.induction(sharpness=80.0, n_matching=2),
    "tokens only": lambda: programs.induction(corrupts="tokens"),
    "two-back": lambda: programs.two_back(),
    "conditional by MLP": lambda: programs.conditional(gate="mlp"),
    "conditional by queries": lambda: programs.conditional(gate="q"),
}


def toy_pairs(n: int = 5, seed: int = 0) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    return minimal_pairs(ToyRenderer(), toy_episodes(n, classes=3, generator=generator), "swap_labels")


def vlm_pairs(model: HookedVLM, n: int = 2) -> Pairs:
    episodes = [
        Episode(
            shots=tuple(Shot(label, (picture(56, 56, seed=10 * k + j),), item=label) for j, label in enumerate(("zuda", "kimo"))),
            query=Shot("zuda", (picture(56, 56, seed=10 * k + 5),), item="zuda"), candidates=("zuda", "kimo"), question="This is a",
        )
        for k in range(n)
    ]  # fmt: skip
    return minimal_pairs(model, episodes, "swap_exemplars")


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_edges_of_a_program_are_found(name: str, record_property: Any) -> None:
    """Precision and recall at as many edges as there are; the program's own edges carry, idle heads' do not (they write where nobody reads)."""
    program = PROGRAMS[name]()
    found = eap(program.model, program.pairs(16, 0), method="EAP-IG", steps=10, exact=0, **QUIET)
    k = len(program.edges)
    top = set(found.top(k))
    recall = len(top & program.edges) / k
    record_property("recall", recall)
    assert recall == 1.0
    scores = found.scores()
    weakest, strongest = min(abs(scores[e]) for e in program.edges), max(abs(v) for e, v in scores.items() if e not in program.edges)
    assert weakest > strongest
    idle = [edge for edge in found.edges if edge.sender.kind == "head" and (edge.sender.layer, edge.sender.head) in program.idle]
    assert idle
    assert max(abs(scores[edge]) for edge in idle if edge.receiver.kind == "logits") < 1e-6


def test_slopes_at_the_start_miss_what_is_saturated() -> None:
    """A limit, kept in view: where the softmax is sure, edges into queries and keys that decide everything have no slope. Steps bring some of it back."""
    program = programs.induction(sharpness=80.0)
    pairs = program.pairs(16, 0)
    plain = eap(program.model, pairs, exact=30, **QUIET)
    steps = eap(program.model, pairs, method="EAP-IG", steps=20, exact=0, **QUIET)
    (head,) = (sender for sender in program.nodes if (sender.kind, sender.layer) == ("head", 1))
    edge = Edge(Sender("embed"), Receiver("q", 1, head.head))
    assert edge in program.edges
    gap = float((plain.clean - plain.corrupt).mean())
    exact = -edges_exactly(program.model, score(program.model, pairs, None, "logit_diff"), [edge], "noise").mean() / gap
    assert exact > 0.8
    assert abs(plain[edge]) < 1e-6
    assert abs(steps[edge]) > 0.05
    assert plain.agreement is not None
    assert plain.agreement.pearson < 0.9


@pytest.mark.parametrize("direction", ["noise", "denoise"])
@pytest.mark.parametrize("by", ["EAP", "EAP-IG"])
def test_direct_edges_are_exact_where_the_logits_are_straight(direction: Any, by: Any) -> None:
    """Without norms the logits are linear in the final stream: every edge into them is exactly its path-patching effect."""
    model = untrained(n_layers=2, n_heads=2, d_mlp=16, seed=2, norm=None)
    found = eap(model, toy_pairs(), direction=direction, method=by, exact=0, **QUIET)
    exact = path_patch(model, toy_pairs(), None, None, ("logits",), direction=direction, **QUIET)
    column = found.receivers.index(Receiver("logits", 2))
    for sender in found.senders:
        at = exact.senders.index(sender)
        assert found.value[found.senders.index(sender), column] == pytest.approx(exact.change[at, 0], abs=1e-4)


def test_values_of_the_last_layer_are_exact_too() -> None:
    """Attention-only, no norm: the metric is linear in the values of the last layer, so edges into them are exact, one key/value head at a time."""
    model = untrained(n_layers=2, n_heads=2, seed=2, norm=None)
    found = eap(model, toy_pairs(), exact=0, **QUIET)
    exact = path_patch(model, toy_pairs(), None, None, [Receiver("v", 1, 0), Receiver("v", 1, 1)], **QUIET)
    for edge in exact.edges:
        assert found[edge] == pytest.approx(float(exact.change[exact.index(edge)]), abs=1e-4)


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_edges_run_exactly_are_those_of_path_patching(direction: Any) -> None:
    model = untrained(n_layers=2, n_heads=2, d_mlp=16, seed=2)
    pairs = toy_pairs()
    edges = [*EdgeGraph.of(model).edges[::3], Edge(Sender("head", 0, 1), Receiver("mlp", 0)), Edge(Sender("mlp", 1), Receiver("logits", 2))]
    mine = edges_exactly(model, score(model, pairs, None, "logit_diff"), edges, direction)
    theirs = path_patch(model, pairs, None, "all", "all", direction=direction, **QUIET)
    start = theirs.corrupt if direction == "denoise" else theirs.clean
    for k, edge in enumerate(edges):
        assert np.allclose(mine[:, k], theirs.raw[(slice(None), *theirs.index(edge))] - start, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_edges_run_exactly_with_pictures_are_those_of_path_patching(family: str) -> None:
    """Grouped queries, RMSNorm; in qwen3_vl the pictures come in again behind the first layers, which counts as the embeddings'."""
    model = HookedVLM(*build(family, preset="tiny", seed=0))
    pairs = vlm_pairs(model)
    last = model.cfg.n_layers
    edges = [
        Edge(Sender("embed"), r) for r in (Receiver("logits", last), Receiver("v", last - 1, 0), Receiver("mlp", 1), Receiver("k", 0, 1))
    ]
    edges += [Edge(Sender("head", 0, 2), Receiver("q", 1, 3)), Edge(Sender("mlp", 0), Receiver("k", 1, 1))]
    mine = edges_exactly(model, score(model, pairs, None, "logit_diff"), edges, "noise")
    for k, edge in enumerate(edges):
        theirs = path_patch(model, pairs, None, [edge.sender], [edge.receiver], n_permutations=10, **QUIET)
        assert np.allclose(mine[:, k], theirs.raw[:, 0, 0] - theirs.clean, atol=1e-4), edge.name


def test_scores_are_the_sum_of_what_receivers_read_by_hand() -> None:
    """One edge of each kind again, by plain autograd through the pieces of the model, grouped queries included."""
    model = HookedVLM(*build("qwen2_5_vl", preset="tiny", seed=0))
    assert model.cfg.n_key_value_heads < model.cfg.n_heads
    pairs = score(model, vlm_pairs(model), None, "logit_diff")
    (part,) = parts(model, pairs, "noise", 8)
    graph = EdgeGraph.of(model)
    run = two_runs(model, part, graph)
    slope = gradients_at(model, part, run, 0.0, graph)
    found = eap(model, vlm_pairs(model), exact=0, **QUIET)
    with torch.no_grad():
        differences = sent(model, run, graph, slice(None))
    for receiver in (Receiver("q", 1, 1), Receiver("k", 1, 0), Receiver("v", 1, 0)):
        stream = slope.values["blocks.1.hook_resid_pre"].clone().requires_grad_()
        read = streams.read(model, 1, receiver.kind, stream)[:, :, receiver.head]
        gradient = slope.gradients[f"blocks.1.attn.hook_{receiver.kind}"][:, :, receiver.head]
        (pulled,) = torch.autograd.grad((read * gradient).sum(), stream)
        for sender in (Sender("embed"), Sender("head", 0, 1), Sender("mlp", 0)):
            by_hand = -(differences[graph.sender_index[sender]] * pulled).sum((1, 2))
            assert np.allclose(found.raw[:, graph.sender_index[sender], graph.receiver_index[receiver]], by_hand.numpy(), atol=1e-5)


def test_what_a_layer_reads_adds_up_to_the_slope_of_its_stream() -> None:
    """The gradients of all receivers of all later layers, summed, are the gradient with respect to the stream itself."""
    model = untrained(n_layers=1, n_heads=2, d_mlp=16, seed=4)
    (part,) = parts(model, score(model, toy_pairs(), None, "logit_diff"), "noise", 8)
    graph = EdgeGraph.of(model)
    run = two_runs(model, part, graph)
    slope = gradients_at(model, part, run, 0.0, graph)
    from mechicl.analysis.gradients.backward import slopes

    whole = slopes(model, part.start, ["blocks.0.hook_resid_pre"], part.measure, positions=part.positions)
    total = slope.gradients["blocks.0.hook_resid_post"] + sum(g.sum(0) for _, g in received(model, slope, 0, slice(None)))
    assert torch.allclose(total, whole.gradients["blocks.0.hook_resid_pre"], atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"])
def test_production_models_with_pictures(family: str) -> None:
    model = HookedVLM(*build(family, preset="tiny", seed=0))
    found = eap(model, vlm_pairs(model), method="EAP-IG", steps=6, exact=30, **QUIET)
    assert found.agreement is not None
    assert found.agreement.pearson > 0.5  # random weights: far from straight, far from chance
    assert {r.head for r in found.receivers if r.kind == "k"} == set(range(model.cfg.n_key_value_heads))
    assert not np.isnan([found[edge] for edge in found.edges]).any()


def test_a_family_that_gates_its_heads_is_refused() -> None:
    model = HookedVLM(*build("mllama", preset="tiny", seed=0))
    with pytest.raises(UnsupportedModelError, match="heads"):
        eap(model, vlm_pairs(model), **QUIET)


def test_spans_split_the_score_and_place_the_edge() -> None:
    model = mechicl.load("demo")
    pairs = minimal_pairs(model, draw(6, classes=2, shots=1, size=28, seed=1), "swap_labels")
    found = eap(model, pairs, by_span=True, exact=0, **QUIET)
    assert found.by_span is not None
    assert np.allclose(found.by_span.sum(-1), found.value, atol=1e-6, equal_nan=True)
    assert found.place(Edge(Sender("head", 3, 0), Receiver("logits", 4))) == "last token"
    values = [edge for edge in found.top(12) if edge.sender.kind == "embed" and edge.receiver.kind == "v"]
    assert values  # the labels were exchanged: what is read of the embeddings is read there
    assert {found.place(edge) for edge in values} <= {"right label", "wrong label"}
    frame = found.to_frame()
    assert next(iter(frame["edge"])) == found.top(1)[0].name
    assert len(frame) == len(found.edges)


def test_positions_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HookedVLM(*build("qwen3_vl", preset="tiny", seed=0))
    whole = eap(model, vlm_pairs(model), by_span=True, exact=0, **QUIET)
    monkeypatch.setattr("mechicl.analysis.gradients.edge_attribution.CHUNK_BYTES", edge_gradients.CHUNK_BYTES >> 14)
    pieces = eap(model, vlm_pairs(model), by_span=True, exact=0, batch_size=1, **QUIET)
    assert np.allclose(whole.raw, pieces.raw, atol=1e-5, equal_nan=True)


def test_whole_labels_are_scored_over_their_copies() -> None:
    model = mechicl.load("demo")
    pairs = minimal_pairs(model, draw(4, classes=2, shots=1, size=28, seed=2), "swap_labels")
    found = eap(model, pairs, metric="label_logprob", method="EAP-IG", exact=20, **QUIET)
    assert found.agreement is not None
    assert found.agreement.pearson > 0.8
    assert found.unit == "nats"


def test_episodes_whose_prompts_are_the_same_carry_nothing() -> None:
    model = untrained(n_layers=2, n_heads=2, d_mlp=16, seed=2)
    pairs = toy_pairs()
    renderer = pairs.clean.renderer
    assert renderer is not None
    clean, corrupt = list(pairs.clean.episodes), list(pairs.corrupt.episodes)
    mixed = Pairs(renderer.render([*clean, *clean]), renderer.render([*corrupt, *clean]), "mixed", ())
    found = eap(model, mixed, exact=0, **QUIET)
    assert np.nanmax(np.abs(found.raw[5:])) == 0.0
    assert np.nanmax(np.abs(found.raw[:5])) > 0.0


def test_weights_and_hooks_are_left_alone() -> None:
    model = untrained(n_layers=2, n_heads=2, d_mlp=16, seed=2)
    flags = [p.requires_grad for p in model.parameters()]
    eap(model, toy_pairs(), exact=6, **QUIET)
    with pytest.raises(RuntimeError, match="on purpose"):
        eap(model, toy_pairs(), metric=_fails, **QUIET)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())


def _fails(logits: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("on purpose")


def test_refusals() -> None:
    model = untrained(n_layers=1, n_heads=2, seed=2)
    pairs = toy_pairs(3)
    for wrong, message in (
        ({"steps": 0}, "steps"),
        ({"method": "EAP-XY"}, "method must be"),
        ({"direction": "up"}, "direction must be"),
        ({"exact": -1}, "exact"),
    ):
        with pytest.raises(OptionError, match=message):
            eap(model, pairs, **(QUIET | wrong))
    with pytest.raises(OptionError, match="corrupt must be given"):
        eap(model, pairs.clean, **QUIET)
    with pytest.raises(EpisodeError, match=r"same sequence|as many tokens|paired"):
        eap(model, pairs.clean, toy_pairs(3, seed=1).clean.select([0, 1]), **QUIET)
    with pytest.raises(EpisodeError, match="must differ"):
        eap(model, pairs.clean, pairs.clean, **QUIET)
    with pytest.raises(OptionError, match="later receiver"):
        edges_exactly(model, score(model, pairs, None, "logit_diff"), [Edge(Sender("head", 0, 0), Receiver("q", 0, 0))], "noise")


def test_attention_only_models_have_no_mlp_nodes() -> None:
    with_mlps, without = untrained(n_layers=2, n_heads=2, d_mlp=16, seed=2), untrained(n_layers=2, n_heads=2, seed=2)
    assert any(s.kind == "mlp" for s in eap(with_mlps, toy_pairs(), exact=0, **QUIET).senders)
    assert not any(s.kind == "mlp" for s in eap(with_mlps, toy_pairs(), mlps=False, exact=4, **QUIET).senders)
    assert not any(s.kind == "mlp" for s in eap(without, toy_pairs(), exact=0, **QUIET).senders)


@pytest.mark.parametrize("name", ["two-back", "conditional by MLP", "conditional by queries"])
def test_through_the_softmax_the_hidden_edges_are_found(name: str) -> None:
    """The same programs from the clean run alone: with slopes edges into sure queries and keys are nothing, through the softmax they are what they are."""
    program = PROGRAMS[name]()
    pairs = program.pairs(16, 0)
    plain = eap(program.model, pairs, exact=40, **QUIET)
    through = eap(program.model, pairs, softmax="exact", exact=40, **QUIET)
    assert plain.agreement is not None
    assert through.agreement is not None
    assert through.agreement.pearson > plain.agreement.pearson + 0.1
    last = [
        edge for edge in program.edges if edge.receiver.kind in ("q", "k") and edge.receiver.layer == 1 and name != "conditional by MLP"
    ]
    gap = float((plain.clean - plain.corrupt).mean())
    exact = -edges_exactly(program.model, score(program.model, pairs, None, "logit_diff"), last, "noise").mean(0) / gap if last else []
    for edge, value in zip(last, exact, strict=True):  # behind the last layer's heads everything is straight: the estimate is the truth
        assert through[edge] == pytest.approx(float(value), abs=1e-3)
        assert abs(plain[edge]) < 1e-6


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_through_the_softmax_with_grouped_queries_and_pictures(family: str) -> None:
    """Attention-only tail: q and k of the last layer, everything behind which is frozen by a small change, are near the exact edges."""
    model = HookedVLM(*build(family, preset="tiny", seed=0))
    pairs = vlm_pairs(model)
    slope, through = (eap(model, pairs, softmax=how, exact=0, **QUIET) for how in ("slope", "exact"))
    into = [e for e in slope.edges if e.receiver.kind in ("q", "k")]
    others = [e for e in slope.edges if e.receiver.kind not in ("q", "k")]
    assert all(slope[e] == pytest.approx(through[e], abs=1e-6) for e in others)
    exact = -edges_exactly(model, score(model, pairs, None, "logit_diff"), into, "noise").mean(0) / float(
        (slope.clean - slope.corrupt).mean()
    )
    error = [np.abs(np.array([found[e] for e in into]) - exact).mean() for found in (slope, through)]
    assert error[1] < error[0]


def test_a_sure_softmax_is_not_split_by_span() -> None:
    with pytest.raises(OptionError, match="by_span must be False"):
        eap(untrained(seed=0), toy_pairs(), softmax="exact", by_span=True, **QUIET)
    with pytest.raises(OptionError, match="softmax must be"):
        eap(untrained(seed=0), toy_pairs(), softmax="hard", **QUIET)


def test_the_page_about_attribution_runs() -> None:
    text = (Path(__file__).parent.parent / "docs" / "attribution.md").read_text()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            exec(compile(block, "attribution.md", "exec"), {})
    assert "cells run exactly: Pearson 0.9" in out.getvalue()
    assert "edges run exactly" in out.getvalue()
