"""Runs in which only some edges carry the clean prompt: identities, a reference written from scratch, production models with pictures, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mechicl.data import concepts
from mechicl.errors import OptionError, UnsupportedModelError
from mechicl.models.edge_graph import EdgeGraph
from mechicl.models.programs import induction, programs
from mechicl.models.subgraph import run_sets, run_subgraph
from mechicl.models.subgraph_pairs import mean_runs, paired_runs
from mechicl.models.toys.model import ToyTransformer, toy_config
from mechicl.models.toys.prompts import ToyRenderer, toy_episodes
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.corrupt import Pairs, minimal_pairs
from mechicl.results import Edge, Receiver, Sender

CLOSE = 1e-5  # float32 sums in another order


def toy(*, seed: int = 0, **options: Any) -> ToyTransformer:
    renderer = ToyRenderer()
    cfg = toy_config(**{"n_layers": 2, "n_heads": 2, "d_vocab": renderer.vocabulary.size, "d_model": 24, "d_head": 8, **options})
    return ToyTransformer(cfg, renderer, seed=seed, sharpness=4.0)


def toy_pairs(model: ToyTransformer, n: int = 4, seed: int = 0) -> Pairs:
    episodes = toy_episodes(n, classes=3, shots=1, generator=torch.Generator().manual_seed(seed))
    return minimal_pairs(model.renderer, episodes, "swap_labels")


def vlm_pairs(model: HookedVLM, n: int = 3, how: Any = "swap_query") -> Pairs:
    return minimal_pairs(model.renderer, concepts.draw(n, classes=2, shots=1, size=28, seed=1, syllables=(2, 2)), how)


def some_sets(graph: EdgeGraph, n: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return np.stack([graph.possible & (draw.random(graph.possible.shape) < share) for share in np.linspace(0.2, 0.95, n)])


def logits(model: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        return model(batch)


@torch.no_grad()
def by_hand(model: ToyTransformer, pairs: Pairs, mask: np.ndarray) -> Tensor:
    """One set of edges, receiver by receiver, from the weights alone: no shared computation, nothing left out, the stream summed anew for every receiver."""
    graph = EdgeGraph.of(model)
    _, clean = model.run_with_cache(pairs.clean)
    _, corrupt = model.run_with_cache(pairs.corrupt)
    at: dict[str, Any] = {}
    handle = model.blocks[0].attn.register_forward_pre_hook(lambda _, args: at.update(setting=args[1]))  # type: ignore[union-attr]
    model(pairs.corrupt)
    handle.remove()
    eye = torch.eye(model.cfg.n_heads)

    def outputs(cache: Any, layer: int) -> Tensor:
        return torch.einsum("bphd,hdm->hbpm", cache[f"blocks.{layer}.attn.hook_z"], model.blocks[layer].attn.W_O)  # type: ignore[union-attr]

    old: list[Tensor] = [corrupt["blocks.0.hook_resid_pre"]]
    for layer in range(graph.n_layers):
        old += list(outputs(corrupt, layer)) + ([corrupt[f"blocks.{layer}.hook_mlp_out"]] if graph.mlps else [])
    new: list[Tensor] = [clean["blocks.0.hook_resid_pre"]]

    def stream(receiver: Receiver) -> Tensor:
        row = mask[graph.receiver_index[receiver]]
        before = [i for i in range(len(new)) if graph.possible[graph.receiver_index[receiver], i]]
        return torch.stack([new[i] if row[i] else old[i] for i in before]).sum(0)

    for layer in range(graph.n_layers):
        block: Any = model.blocks[layer]
        heads = []
        for head in range(graph.n_heads):
            parts = []
            for kind in "qkv":
                x = stream(Receiver(kind, layer, head))  # type: ignore[arg-type]
                normed = x if block.ln1 is None else block.ln1(x)
                parts.append(block.attn.project(normed, kind.upper()))
            z = block.attn.attend(*parts, at["setting"])[0] * eye[head][None, None, :, None]
            heads.append(torch.einsum("bphd,hdm->bpm", z, block.attn.W_O))
        new += heads
        if graph.mlps:
            x = stream(Receiver("mlp", layer))
            new.append(block.mlp(x if block.ln2 is None else block.ln2(x)))
    last = stream(Receiver("logits", graph.n_layers))
    return model.logits_of(last[torch.arange(pairs.n), pairs.clean.query_pos][:, None])


TOYS: dict[str, dict[str, Any]] = {
    "attention only": {},
    "norm and mlp": {"norm": "RMS", "mlp": "gelu"},
    "layer norm, rope, biases": {"norm": "LN", "positions": "rope", "qkv_bias": True, "mlp": "swiglu"},
    "alibi, three layers, no projection": {"positions": "alibi", "n_layers": 3, "d_head": 12, "output_projection": False, "norm": "RMS"},
    "classifier": {"classifier": "mlp", "norm": "RMS", "mlp": "product"},
}


@pytest.mark.parametrize("options", TOYS.values(), ids=TOYS.keys())
def test_all_edges_are_the_clean_run_and_none_the_corrupt_one_in_every_toy(options: dict[str, Any]) -> None:
    model = toy(**options)
    pairs = toy_pairs(model)
    graph = EdgeGraph.of(model)
    full, none = run_subgraph(model, pairs.clean, pairs.corrupt, [graph.edges, []])
    clean, corrupt = logits(model, pairs.clean), logits(model, pairs.corrupt)
    assert float((clean - corrupt).abs().max()) > 1e-2
    torch.testing.assert_close(full, clean, atol=CLOSE, rtol=CLOSE)
    torch.testing.assert_close(none, corrupt, atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize("options", TOYS.values(), ids=TOYS.keys())
def test_any_set_of_edges_gives_what_a_reference_written_from_scratch_gives(options: dict[str, Any]) -> None:
    model = toy(seed=1, **options)
    pairs = toy_pairs(model, 3)
    sets = some_sets(EdgeGraph.of(model), 5)
    found = run_subgraph(model, pairs.clean, pairs.corrupt, sets)
    for mask, ours in zip(sets, found, strict=True):
        torch.testing.assert_close(ours, by_hand(model, pairs, mask), atol=CLOSE, rtol=CLOSE)


MODEL = toy(norm="RMS", mlp="gelu", seed=2)
PAIRS = toy_pairs(MODEL, 2)
GRAPH = EdgeGraph.of(MODEL)
RUNS = paired_runs(MODEL, PAIRS.clean, PAIRS.corrupt, PAIRS.clean.query_pos[:, None])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sets(st.sampled_from(GRAPH.edges)), min_size=1, max_size=4))
def test_random_sets_run_together_as_each_alone_from_scratch(sets: list[set[Edge]]) -> None:
    masks = GRAPH.masks(sets)
    found = run_sets(RUNS, masks)
    for mask, ours in zip(masks, found, strict=True):
        torch.testing.assert_close(ours, by_hand(MODEL, PAIRS, mask), atol=CLOSE, rtol=CLOSE)


@settings(max_examples=60, deadline=None)
@given(st.sets(st.sampled_from(GRAPH.edges)))
def test_live_edges_are_those_on_paths_from_the_embeddings_to_the_logits(edges: set[Edge]) -> None:
    """Against the definition: an edge is live if some walk of edges leads to its sender from embed and from its receiver's node to the logits."""
    makes = {s: {GRAPH.receivers[i] for i in GRAPH.inputs[j]} for j, s in enumerate(GRAPH.senders)}
    start, reached = Sender("embed"), {Sender("embed")}
    for _ in GRAPH.senders:
        reached |= {s for s in GRAPH.senders if any(e.sender in reached and e.receiver in makes[s] for e in edges)}
    needed = {Receiver("logits", GRAPH.n_layers)}
    for _ in GRAPH.senders:
        needed |= {r for e in edges if e.receiver in needed for r in makes[e.sender]}
    expected = {e for e in edges if e.sender in reached and e.receiver in needed}
    live = GRAPH.live(GRAPH.mask(edges))
    assert set(GRAPH.listed(live)) == expected
    assert start in reached
    np.testing.assert_array_equal(GRAPH.live(live), live)


def test_blocks_of_sets_and_of_prompts_change_nothing() -> None:
    sets = some_sets(GRAPH, 7)
    whole = run_subgraph(MODEL, PAIRS.clean, PAIRS.corrupt, sets)
    torch.testing.assert_close(run_subgraph(MODEL, PAIRS.clean, PAIRS.corrupt, sets, memory=1), whole, atol=CLOSE, rtol=CLOSE)
    torch.testing.assert_close(run_subgraph(MODEL, PAIRS.clean, PAIRS.corrupt, sets, batch_size=1), whole, atol=CLOSE, rtol=CLOSE)
    order = [3, 0, 3, 6]
    torch.testing.assert_close(run_subgraph(MODEL, PAIRS.clean, PAIRS.corrupt, sets[order]), whole[order], atol=CLOSE, rtol=CLOSE)


def test_logits_are_given_where_they_are_asked_for() -> None:
    every = torch.arange(PAIRS.clean.n_pos)
    found = run_subgraph(MODEL, PAIRS.clean, PAIRS.corrupt, [GRAPH.edges], positions=every)
    with torch.no_grad():
        torch.testing.assert_close(found[0], MODEL(PAIRS.clean, positions="all"), atol=CLOSE, rtol=CLOSE)
    each = torch.tensor([[-1, -3], [-2, -1]])
    two = run_subgraph(MODEL, PAIRS.clean, PAIRS.corrupt, [GRAPH.edges], positions=each, batch_size=1)
    torch.testing.assert_close(two[0, 1], found[0, 1, each[1]], atol=CLOSE, rtol=CLOSE)
    top = run_subgraph(MODEL, PAIRS.clean, PAIRS.corrupt, [GRAPH.edges, []], reduce=lambda x: x[:, :, 0].amax(-1))
    assert top.shape == (2, PAIRS.n)


def test_padded_prompts_run_as_they_do_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    episodes = [*toy_episodes(1, classes=2, shots=1, generator=generator), *toy_episodes(2, classes=4, shots=1, generator=generator)]
    pairs = minimal_pairs(MODEL.renderer, episodes, "swap_labels")
    assert pairs.clean.inputs["attention_mask"].sum(1).min() < pairs.clean.n_pos
    sets = some_sets(GRAPH, 3)
    together = run_subgraph(MODEL, pairs.clean, pairs.corrupt, sets)
    apart = run_subgraph(MODEL, pairs.clean, pairs.corrupt, sets, batch_size=1)
    torch.testing.assert_close(together, apart, atol=CLOSE, rtol=CLOSE)


def test_a_single_edge_is_a_path_patch() -> None:
    """Dropping one edge into the logits equals subtracting that head's change from the final stream: path patching by another route."""
    edge = Edge(Sender("head", 1, 0), Receiver("logits", 2))
    found = run_subgraph(MODEL, PAIRS.clean, PAIRS.corrupt, [set(GRAPH.edges) - {edge}])[0]
    _, clean = MODEL.run_with_cache(PAIRS.clean)
    _, corrupt = MODEL.run_with_cache(PAIRS.corrupt)
    name = "blocks.1.attn.hook_z"
    change = (clean[name] - corrupt[name])[:, :, 0] @ MODEL.blocks[1].attn.W_O[0]  # type: ignore[union-attr]
    last = clean["blocks.1.hook_resid_post"] - change
    with torch.no_grad():
        expected = MODEL.logits_of(last[torch.arange(PAIRS.n), PAIRS.clean.query_pos][:, None])
    torch.testing.assert_close(found, expected, atol=CLOSE, rtol=CLOSE)


def test_a_node_circuit_is_the_run_with_the_other_nodes_patched_by_hooks() -> None:
    kept = [Sender("head", 0, 1), Sender("mlp", 0), Sender("head", 1, 0)]
    found = run_sets(RUNS, GRAPH.node_mask(kept)[None])[0]
    _, corrupt = MODEL.run_with_cache(PAIRS.corrupt)

    def heads(z: Tensor, *, hook: Any) -> Tensor:
        layer = int(hook.name.split(".")[1])
        off = [head for head in range(2) if Sender("head", layer, head) not in kept]
        return z.index_copy(2, torch.tensor(off), corrupt[hook.name][:, :, off])

    def replaced(_: Tensor, *, hook: Any) -> Tensor:
        return corrupt[hook.name]

    hooks = [(f"blocks.{layer}.attn.hook_z", heads) for layer in range(2)] + [("blocks.1.hook_mlp_out", replaced)]
    with torch.no_grad():
        expected = MODEL.run_with_hooks(PAIRS.clean, fwd_hooks=hooks)
    torch.testing.assert_close(found, expected, atol=CLOSE, rtol=CLOSE)


def test_with_means_no_edges_is_the_unembedded_mean_and_all_edges_the_clean_run() -> None:
    full, none = run_subgraph(MODEL, PAIRS.clean, PAIRS.corrupt, [GRAPH.edges, []], replacement="mean", batch_size=1)
    torch.testing.assert_close(full, logits(MODEL, PAIRS.clean), atol=CLOSE, rtol=CLOSE)
    _, corrupt = MODEL.run_with_cache(PAIRS.corrupt)
    mean = corrupt["blocks.1.hook_resid_post"].mean(0)[-1]
    with torch.no_grad():
        torch.testing.assert_close(none[0, 0], MODEL.logits_of(mean), atol=CLOSE, rtol=CLOSE)
        torch.testing.assert_close(none[0], none[1], atol=CLOSE, rtol=CLOSE)


def test_means_leave_padding_out_and_stand_at_the_end() -> None:
    episodes = toy_episodes(2, classes=3, shots=1, generator=torch.Generator().manual_seed(0))
    long = toy_episodes(1, classes=4, shots=1, generator=torch.Generator().manual_seed(1))
    batch = MODEL.render([*episodes, *long])
    mean = mean_runs(MODEL, [batch.select([0, 1]), batch.select([2])])
    _, cache = MODEL.run_with_cache(batch)
    z = cache["blocks.1.attn.hook_z"]
    torch.testing.assert_close(mean.z[1][0, -3:], z[:, -3:].mean(0), atol=CLOSE, rtol=CLOSE)
    torch.testing.assert_close(mean.z[1][0, 0], z[2, 0], atol=CLOSE, rtol=CLOSE)


ADDITIVE = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "llava",
    "llava_next",
    "llava_onevision",
    "internvl",
    "paligemma",
    "idefics3",
    "smolvlm",
    "mistral3",
)


@pytest.mark.parametrize(
    ("name", "how"), [*((name, "swap_query") for name in ADDITIVE), ("qwen3_vl", "swap_labels"), ("paligemma", "swap_labels")]
)
def test_identities_hold_in_every_family_that_adds_its_heads_with_pictures(organism: Callable[..., Any], name: str, how: str) -> None:
    """Qwen3-VL adds pictures again between layers (DeepStack); PaliGemma reads its prompt both ways; most have grouped queries."""
    model = HookedVLM(*organism(name))
    pairs = vlm_pairs(model, how=how)
    graph = EdgeGraph.of(model)
    one = some_sets(graph, 1)
    full, none, some = run_subgraph(model, pairs.clean, pairs.corrupt, np.stack([graph.possible, ~graph.possible & False, one[0]]))
    clean, corrupt = logits(model, pairs.clean), logits(model, pairs.corrupt)
    torch.testing.assert_close(full, clean, atol=CLOSE, rtol=CLOSE)
    torch.testing.assert_close(none, corrupt, atol=CLOSE, rtol=CLOSE)
    # clean put into clean changes nothing, whatever the edges
    same = run_subgraph(model, pairs.clean, pairs.clean, one)
    torch.testing.assert_close(same[0], clean, atol=CLOSE, rtol=CLOSE)
    assert float((clean - corrupt).abs().max()) > 1e-3
    assert bool(torch.isfinite(some).all())


@pytest.mark.parametrize("name", ["qwen3_vl", "llava"])
def test_one_edge_into_a_shared_key_is_what_hooks_on_the_model_say(organism: Callable[..., Any], name: str) -> None:
    """Grouped queries: the edge embed -> k of layer 1 dropped, computed by editing hook_k of a clean run to what its layer reads without it."""
    model = HookedVLM(*organism(name))
    pairs = vlm_pairs(model)
    graph = EdgeGraph.of(model)
    edge = Edge(Sender("embed"), Receiver("k", 1, 0))
    found = run_subgraph(model, pairs.clean, pairs.corrupt, [set(graph.edges) - {edge}])[0]
    _, clean = model.run_with_cache(pairs.clean)
    _, corrupt = model.run_with_cache(pairs.corrupt)

    def entered(cache: Any) -> Tensor:
        return cache["blocks.0.hook_resid_pre"] + cache["blocks.1.hook_resid_pre"] - cache["blocks.0.hook_resid_post"]

    stream = clean["blocks.1.hook_resid_pre"] - entered(clean) + entered(corrupt)
    kept: dict[str, Tensor] = {}
    with torch.no_grad():
        # the model's own layer reads the edited stream: nothing of mechicl.models.streams is used here
        hooks = [("blocks.1.hook_resid_pre", lambda _, hook: stream), ("blocks.1.attn.hook_k", lambda k, hook: kept.update(k=k.clone()))]
        model.run_with_hooks(pairs.clean, fwd_hooks=hooks)

        def one_key(k: Tensor, *, hook: Any) -> Tensor:
            return torch.cat([kept["k"][:, :, :1], k[:, :, 1:]], 2)

        expected = model.run_with_hooks(pairs.clean, fwd_hooks=[("blocks.1.attn.hook_k", one_key)])
    torch.testing.assert_close(found, expected, atol=CLOSE, rtol=CLOSE)
    assert float((found - logits(model, pairs.clean)).abs().max()) > 1e-5


@pytest.mark.parametrize("name", ["gemma3", "paligemma2", "mllama"])
def test_families_whose_heads_are_no_summands_are_refused_with_the_reason(organism: Callable[..., Any], name: str) -> None:
    model = HookedVLM(*organism(name))
    with pytest.raises(UnsupportedModelError, match="a norm, a gate or a scale between the heads and the residual stream"):
        EdgeGraph.of(model)


def test_nothing_is_left_on_the_model() -> None:
    program = programs()[0]
    pairs = program.pairs(3, 0)
    before = logits(program.model, pairs.clean)
    run_subgraph(program.model, pairs.clean, pairs.corrupt, [program.edges])
    hooks = [h for m in program.model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not hooks
    torch.testing.assert_close(logits(program.model, pairs.clean), before, atol=0, rtol=0)


def test_the_planted_edges_carry_everything_and_all_others_nothing() -> None:
    for program in programs():
        pairs = program.pairs(6, 1)
        graph = EdgeGraph.of(program.model)
        planted, rest = run_subgraph(program.model, pairs.clean, pairs.corrupt, [program.edges, set(graph.edges) - program.edges])
        torch.testing.assert_close(planted, logits(program.model, pairs.clean), atol=1e-4, rtol=1e-4)  # logits of 40
        torch.testing.assert_close(rest, logits(program.model, pairs.corrupt), atol=1e-4, rtol=1e-4)


def test_refusals_say_what_to_do() -> None:
    program = induction()
    pairs, longer = program.pairs(2, 0), program.pairs(3, 0)
    run: Any = lambda *args, **kwargs: run_subgraph(program.model, *args, **kwargs)  # noqa: E731
    with pytest.raises(OptionError, match="edges must be among"):
        run(pairs.clean, pairs.corrupt, [[Edge(Sender("head", 1, 0), Receiver("q", 0, 0))]])
    with pytest.raises(OptionError, match="edges must be among"):
        run(pairs.clean, pairs.corrupt, [[Edge(Sender("head", 0, 9), Receiver("q", 1, 0))]])
    with pytest.raises(OptionError, match="laid out alike"):
        run(pairs.clean, longer.corrupt, [[]])
    with pytest.raises(OptionError, match="replacement must be one of"):
        run(pairs.clean, pairs.corrupt, [[]], replacement="zero")
    with pytest.raises(OptionError, match="masks must be"):
        run(pairs.clean, pairs.corrupt, np.zeros((1, 2, 3), dtype=bool))
    with pytest.raises(OptionError, match="positions must be"):
        run(pairs.clean, pairs.corrupt, [[]], positions="first")
    with pytest.raises(OptionError, match="batch_size"):
        run(pairs.clean, pairs.corrupt, [[]], batch_size=0)
    with pytest.raises(OptionError, match="nodes must be"):
        EdgeGraph.of(program.model).node_mask([Sender("head", 7, 7)])


def test_rotated_places_that_differ_are_refused() -> None:
    """Learned places are part of the embeddings; rotations are not, so no run lies between two of them."""
    model = toy(positions="rope")
    pairs = toy_pairs(model, 2)
    moved = Pairs(
        pairs.clean, type(pairs.corrupt)(**{**vars(pairs.corrupt), "inputs": {**pairs.corrupt.inputs, "position_ids": torch.arange(1, pairs.clean.n_pos + 1).expand(2, -1)}}), "moved", ()
    )  # fmt: skip
    with pytest.raises(OptionError, match="same places in rotary"):
        run_subgraph(model, moved.clean, moved.corrupt, [[]])
