"""Hand-made programs: they answer exactly, and their edges are exactly those that carry something, by a path patching written out here."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mechicl.analysis.icl import icl_accuracy
from mechicl.errors import OptionError
from mechicl.models.planted import untrained
from mechicl.models.programs import Program, conditional, induction, programs, two_back
from mechicl.models.toys.model import ToyTransformer
from mechicl.prompts.batch import Batch
from mechicl.prompts.corrupt import Pairs, layout
from mechicl.results.nodes import Edge, Receiver, Sender, edges, receivers, senders

MAKE: dict[str, Callable[..., Program]] = {
    "induction": induction,
    "twofold induction": lambda **options: induction(n_previous=2, n_matching=2, **options),
    "two-back": two_back,
    "conditional by MLP": lambda **options: conditional(gate="mlp", **options),
    "conditional by queries": lambda **options: conditional(gate="q", **options),
}


def difference(logits: Tensor, pairs: Pairs) -> Tensor:
    """Logit of the clean answer minus that of the corrupt answer, [batch]."""
    right, wrong = ([ids[k][0] for ids, k in zip(side.candidate_ids, side.answers, strict=True)] for side in (pairs.clean, pairs.corrupt))
    rows = torch.arange(pairs.n)
    return logits[rows, -1, right] - logits[rows, -1, wrong]


def written(model: ToyTransformer, cache: dict[str, Tensor], sender: Sender) -> Tensor:
    """What a sender adds to the stream [batch, pos, d_model]."""
    if sender.kind == "embed":
        return cache["blocks.0.hook_resid_pre"]
    if sender.kind == "mlp":
        return cache[f"blocks.{sender.layer}.hook_mlp_out"]
    return cache[f"blocks.{sender.layer}.attn.hook_z"][:, :, sender.head] @ model.blocks[sender.layer].attn.W_O[sender.head]


@torch.no_grad()
def carried(model: ToyTransformer, pairs: Pairs, start: Batch, other: Batch) -> dict[Edge, Tensor]:
    """For each edge the change of the metric per episode when its receiver reads the sender's output of the other run, one run at a time."""
    n_layers, n_heads, mlps = model.cfg.n_layers, model.cfg.n_heads, not model.cfg.attn_only
    _, here = model.run_with_cache(start)
    _, there = model.run_with_cache(other)
    base, found = difference(model(start), pairs), {}
    for edge in edges(senders(n_layers, n_heads, mlps=mlps), receivers(n_layers, n_heads, n_heads, mlps=mlps)):
        change, receiver = written(model, there, edge.sender) - written(model, here, edge.sender), edge.receiver
        if receiver.kind == "logits":
            logits = (here[f"blocks.{n_layers - 1}.hook_resid_post"] + change) @ model.W_U
        else:
            at, block = f"blocks.{receiver.layer}.", model.blocks[receiver.layer]
            if receiver.kind == "mlp":
                name, new, part = at + "hook_mlp_out", block.mlp(here[at + "hook_resid_mid"] + change), slice(None)
            else:
                weight = getattr(block.attn, f"W_{receiver.kind.upper()}")[receiver.head]
                name, part = at + f"attn.hook_{receiver.kind}", receiver.head
                new = (here[at + "hook_resid_pre"] + change) @ weight

            def edit(value: Tensor, *, hook: object, new: Tensor = new, part: int | slice = part) -> Tensor:
                value = value.clone()
                value[:, :, part] = new
                return value

            logits = model.run_with_hooks(start, fwd_hooks=[(name, edit)])
        found[edge] = difference(logits, pairs) - base
    return found


@pytest.mark.parametrize("corrupts", ["tokens and places", "tokens"])
@pytest.mark.parametrize("name", list(MAKE))
def test_the_listed_edges_carry_something_and_no_other_edge_carries_anything(name: str, corrupts: str) -> None:
    program = MAKE[name](corrupts=corrupts, seed=3)
    pairs = program.pairs(16, 0)
    found = carried(program.model, pairs, pairs.clean, pairs.corrupt)
    assert {edge for edge, change in found.items() if float(change.abs().mean()) > 1.0} == program.edges  # logits are about 40
    assert max(float(change.abs().max()) for edge, change in found.items() if edge not in program.edges) == 0.0


@pytest.mark.parametrize("name", list(MAKE))
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_programs_answer_exactly_both_prompts_of_a_pair(name: str, seed: int) -> None:
    program = MAKE[name](corrupts="tokens", n_distractors=seed, seed=seed)
    pairs = program.pairs(32, seed)
    for side in (pairs.clean, pairs.corrupt):
        result = icl_accuracy(program.model, side, zero_shot=False, progress=False)
        assert result.accuracy.value == 1.0
        assert result.margin.value > 10.0


@settings(max_examples=8, deadline=None)
@given(
    name=st.sampled_from(list(MAKE)),
    n_distractors=st.integers(0, 4),
    sharpness=st.sampled_from([12.0, 25.0, 60.0]),
    seed=st.integers(0, 1000),
)
def test_wherever_the_heads_are_put_the_edges_are_the_same_kinds(name: str, n_distractors: int, sharpness: float, seed: int) -> None:
    program = MAKE[name](n_distractors=n_distractors, sharpness=sharpness, seed=seed)
    pairs = program.pairs(6, seed)
    assert bool((difference(program.model(pairs.clean), pairs) > 0.7 * sharpness).all())
    found = carried(program.model, pairs, pairs.clean, pairs.corrupt)
    assert {edge for edge, change in found.items() if float(change.abs().max()) > 0} <= program.edges
    kinds = sorted((edge.sender.kind, edge.sender.layer, edge.receiver.kind, edge.receiver.layer) for edge in program.edges)
    assert kinds == sorted((e.sender.kind, e.sender.layer, e.receiver.kind, e.receiver.layer) for e in MAKE[name]().edges)


def test_idle_heads_partly_look_like_the_circuit_s() -> None:
    program = induction(n_distractors=3)
    pairs = program.pairs(8, 0)
    _, cache = program.model.run_with_cache(pairs.clean)
    (matching,) = [edge.sender for edge in program.edges if edge.receiver.kind == "logits"]
    pattern = cache["blocks.1.attn.hook_pattern"]
    twins = [head for layer, head in program.idle if layer == 1 and torch.equal(pattern[:, head], pattern[:, matching.head])]
    assert len(twins) == 2
    assert len(program.idle) == 6


def test_pairs_differ_in_every_token_and_stand_in_the_same_places() -> None:
    for program in programs():
        pairs = program.pairs(6, 1)
        clean, corrupt = pairs.clean, pairs.corrupt
        same = clean.inputs["input_ids"] == corrupt.inputs["input_ids"]
        if program.name == "conditional (q)":  # the mark at the end means nothing
            same = same[:, :-1]
        assert not bool(same.any())
        assert [layout(clean, k) for k in range(6)] == [layout(corrupt, k) for k in range(6)]
        assert clean.candidates == corrupt.candidates
        assert all(a != b for a, b in zip(clean.answers, corrupt.answers, strict=True))
        moved = clean.inputs["position_ids"] != corrupt.inputs["position_ids"]
        assert not bool(moved[:, 0].any())
        assert bool(moved[:, 1:].all())
        again = program.pairs(6, 1)
        assert torch.equal(again.corrupt.inputs["input_ids"], corrupt.inputs["input_ids"])
        assert not torch.equal(program.pairs(6, 2).clean.inputs["input_ids"], clean.inputs["input_ids"])
        half = corrupt.select([3, 5])  # places go with their rows
        assert torch.equal(half.inputs["position_ids"], corrupt.inputs["position_ids"][[3, 5]])


def test_the_programs_have_edges_of_every_kind_between_them() -> None:
    found = {(edge.sender.kind, edge.receiver.kind) for program in programs() for edge in program.edges}
    assert {("head", "q"), ("head", "k"), ("head", "v"), ("head", "mlp"), ("mlp", "logits"), ("head", "logits"), ("embed", "mlp")} <= found
    program = two_back()
    assert [node.kind for node in program.nodes] == ["embed", "head", "head"]
    assert Receiver("logits", 2) in {edge.receiver for edge in program.edges}


def test_an_untrained_model_has_no_such_circuit() -> None:
    """The negative control: on the same pairs every edge into a part that reads anything carries a little."""
    model, pairs = untrained(n_heads=2), induction().pairs(8, 0)
    found = carried(model, pairs, pairs.clean, pairs.corrupt)
    assert sum(float(change.abs().mean()) > 0 for change in found.values()) > 0.9 * len(found)


def test_refusals() -> None:
    with pytest.raises(OptionError, match="n_distractors must be at least 0"):
        induction(n_distractors=-1)
    with pytest.raises(OptionError, match="corrupts must be"):
        two_back(corrupts="places")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="n_tokens must be"):
        two_back(n_tokens=3)
    with pytest.raises(OptionError, match="gate must be"):
        conditional(gate="k")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="n_shots must be"):
        conditional(n_shots=1)
