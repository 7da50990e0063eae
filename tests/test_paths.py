"""Path patching: the programs' edges, exactly; equal to edits written out by hand in toys and in plain torch on a model with grouped-query attention and pictures."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechicl.analysis.patching.metrics import contrast
from mechicl.analysis.patching.path_runs import Runs, _Sweep
from mechicl.analysis.patching.paths import path_patch
from mechicl.data.concepts import draw
from mechicl.errors import EpisodeError, OptionError, UnsupportedModelError
from mechicl.models.edge_graph import EdgeGraph
from mechicl.models.planted import planted_induction, untrained
from mechicl.models.programs import Program, programs
from mechicl.models.toys.model import ToyTransformer
from mechicl.models.toys.prompts import ToyRenderer, toy_episodes
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.batch import Batch
from mechicl.prompts.corrupt import Pairs, minimal_pairs
from mechicl.results.nodes import Edge, Receiver, Sender

Organism = Callable[..., tuple[Any, Any]]
QUIET: dict[str, Any] = {"progress": False, "n_permutations": 500}


def toy_pairs(n: int = 4, how: str = "swap_labels", **options: Any) -> Pairs:
    """Episodes of words with two labels exchanged, or another query."""
    return minimal_pairs(ToyRenderer(), toy_episodes(n, **options), how)  # type: ignore[arg-type]


def answer_tokens(side: Batch) -> list[int]:
    """First token of every answer."""
    return [ids[k][0] for ids, k in zip(side.candidate_ids, side.answers, strict=True)]


def difference(logits: Tensor, pairs: Pairs) -> Tensor:
    """Logit of the clean answer minus the corrupt answer's, at the last position [batch]."""
    rows = torch.arange(pairs.n)
    return logits[rows, -1, answer_tokens(pairs.clean)] - logits[rows, -1, answer_tokens(pairs.corrupt)]


def added(model: ToyTransformer, cache: Any, sender: Sender) -> Tensor:
    """What a sender adds to the stream."""
    if sender.kind == "embed":
        return cache["blocks.0.hook_resid_pre"]
    if sender.kind == "mlp":
        return cache[f"blocks.{sender.layer}.hook_mlp_out"]
    return cache[f"blocks.{sender.layer}.attn.hook_z"][:, :, sender.head] @ model.blocks[sender.layer].attn.W_O[sender.head]


def through(model: ToyTransformer, start: Batch, cache: Any, receiver: Receiver, change: Tensor) -> Tensor:
    """Logits of the start run when one receiver, and nobody else, reads a changed stream: a full run with one hook."""
    if receiver.kind == "logits":
        final = cache[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"] + change
        return (model.ln_final(final) if model.ln_final is not None else final) @ model.W_U
    at, block = f"blocks.{receiver.layer}.", model.blocks[receiver.layer]
    if receiver.kind == "mlp":
        stream = cache[at + "hook_resid_mid"] + change
        name, head, new = at + "hook_mlp_out", slice(None), block.mlp(stream if block.ln2 is None else block.ln2(stream))
    else:
        stream = cache[at + "hook_resid_pre"] + change
        weight = getattr(block.attn, f"W_{receiver.kind.upper()}")[receiver.head]
        name, head = at + f"attn.hook_{receiver.kind}", receiver.head
        new = (stream if block.ln1 is None else block.ln1(stream)) @ weight

    def edit(value: Tensor, *, hook: object) -> Tensor:
        value = value.clone()
        value[:, :, head] = new
        return value

    return model.run_with_hooks(start, fwd_hooks=[(name, edit)], positions="all")


@pytest.mark.parametrize("program", programs(n_distractors=2, seed=1), ids=lambda program: program.name)
def test_the_edges_of_every_program_are_recovered_exactly(program: Program) -> None:
    result = path_patch(program.model, program.pairs(40, 2), receivers="all", progress=False)
    scores = result.scores()
    assert {edge for edge, change in scores.items() if abs(change) > 1e-3} == program.edges
    assert {edge for edge in result.edges if result.p_corrected[result.index(edge)] < 0.05} == program.edges
    idle = [edge for edge in result.edges if edge not in program.edges]
    assert all(np.array_equal(result.raw[(slice(None), *result.index(edge))], result.clean) for edge in idle)
    assert set(result.top(len(program.edges))) == program.edges
    assert all(result[edge].low == pytest.approx(1.0) and result[edge].high == pytest.approx(1.0) for edge in idle)
    assert len(result.to_frame()) == len(result.edges)


def test_restoring_one_edge_of_a_conjunction_does_not_bring_the_answer_back() -> None:
    program = programs(corrupts="tokens")[0]
    pairs = program.pairs(8, 0)
    result = path_patch(program.model, pairs, receivers="all", direction="denoise", **QUIET)
    assert result.direction == "denoise"
    (matching,) = [edge for edge in program.edges if edge.receiver.kind == "logits"]
    assert result[matching].value == pytest.approx(1.0, abs=1e-4)  # what the matching head says is all that the logits read
    keys = [edge for edge in program.edges if edge.receiver.kind == "k"]
    assert max(abs(result[edge].value) for edge in keys) <= 0.5 + 1e-6  # the wrong label is no longer found, the right one not yet


@pytest.mark.parametrize("direction", ["noise", "denoise"])
@pytest.mark.parametrize("options", [{"norm": "RMS", "mlp": "swiglu", "positions": "rope"}, {"norm": "LN", "mlp": "gelu"}, {}])
@torch.no_grad()
def test_every_edge_equals_a_full_run_with_one_hook(direction: str, options: dict[str, Any]) -> None:
    model, pairs = untrained(n_heads=2, n_layers=2, **options), toy_pairs(3, "swap_query")
    start, other = (pairs.clean, pairs.corrupt) if direction == "noise" else (pairs.corrupt, pairs.clean)
    result = path_patch(model, pairs, receivers="all", direction=direction, **QUIET)
    _, here = model.run_with_cache(start)
    _, there = model.run_with_cache(other)
    assert len(result.edges) == EdgeGraph.of(model).possible.sum()
    for edge in result.edges:
        change = added(model, there, edge.sender) - added(model, here, edge.sender)
        expected = difference(through(model, start, here, edge.receiver, change), pairs)
        assert np.allclose(result.raw[(slice(None), *result.index(edge))], expected, atol=2e-5), edge.name
    share = (result.raw.mean(0) - result.corrupt.mean()) / (result.clean - result.corrupt).mean()
    assert np.allclose(result.value, share, equal_nan=True)


@torch.no_grad()
def test_with_heads_frozen_mlps_carry_the_change_on() -> None:
    """The independent path: a run in which every head but the sender keeps its output of the start run."""
    model, pairs = untrained(n_heads=2, n_layers=3, norm="RMS", mlp="swiglu"), toy_pairs(3, "swap_query")
    sender, receivers = Sender("head", 0, 1), (Receiver("k", 2, 0), Receiver("mlp", 1), Receiver("logits", 3))
    result = path_patch(model, pairs, senders=[sender], receivers=receivers, freeze="heads", **QUIET)
    strict = path_patch(model, pairs, senders=["0.1"], receivers=["k 2.0", "mlp 1", "logits"], **QUIET)
    _, here = model.run_with_cache(pairs.clean)
    _, there = model.run_with_cache(pairs.corrupt)

    def frozen(value: Tensor, *, hook: Any) -> Tensor:
        value = here[hook.name].clone()
        if hook.name.startswith("blocks.0."):
            value[:, :, 1] = there[hook.name][:, :, 1]
        return value

    with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", frozen) for layer in range(3)]):
        logits, moved = model.run_with_cache(pairs.clean)
    assert np.allclose(result.raw[:, 0, 2], difference(logits, pairs), atol=2e-5)
    change = moved["blocks.2.hook_resid_pre"] - here["blocks.2.hook_resid_pre"]
    expected = difference(through(model, pairs.clean, here, receivers[0], change), pairs)
    assert np.allclose(result.raw[(slice(None), *result.index(Edge(sender, receivers[0])))], expected, atol=2e-5)
    assert not np.allclose(result.raw[:, 0, 2], strict.raw[:, 0, 2], atol=1e-3)
    assert result.freeze == "heads"


def test_the_parts_of_a_linear_reader_add_up_to_the_whole() -> None:
    """Without a norm the logits are linear in the stream: what all senders move is the distance between the runs."""
    model, pairs = untrained(n_heads=3, n_layers=2, mlp="gelu"), toy_pairs(4)
    for direction, sign in (("noise", -1), ("denoise", 1)):
        result = path_patch(model, pairs, direction=direction, **QUIET)
        start = result.clean if direction == "noise" else result.corrupt
        moved = (result.raw[:, :, 0] - start[:, None]).sum(1)
        assert np.allclose(moved, sign * (result.clean - result.corrupt), atol=1e-5)
        assert result.change.sum() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl", "smolvlm"])
@torch.no_grad()
def test_the_senders_changes_add_up_to_the_stream_s(family: str, organism: Organism) -> None:
    """Pictures included, and what DeepStack adds of them between layers."""
    model = HookedVLM(*organism(family), check=False)
    pairs = minimal_pairs(model.renderer, draw(2, classes=2, shots=1, size=28, seed=3, syllables=(2, 2)), "swap_query")
    measured, rows, *_ = contrast("label_logprob", pairs.clean, pairs.corrupt)
    assert len(rows) == 2
    runs, *_ = Runs.of(model, measured, pairs.clean, pairs.corrupt, "noise", None)
    graph = EdgeGraph.of(model)
    base = runs.measure(runs.start.logits)
    asked = (graph.receivers[0], graph.receivers[-1])
    raw = np.full((len(base), len(graph.senders), 2), np.nan)
    sweep = _Sweep(runs, graph.senders, asked, "all", base, raw, lambda _: None)
    sweep.run()
    final = model.cfg.n_layers
    assert float((runs.other.pre(final) - runs.start.pre(final)).abs().max()) > 1e-4
    assert torch.allclose(sweep.change.sum(0), runs.other.pre(final) - runs.start.pre(final), atol=1e-5)
    assert (family == "qwen3_vl") == any(one is not None for one in runs.start.additions)


@torch.no_grad()
def test_a_model_with_grouped_keys_and_pictures_equals_plain_torch(organism: Organism) -> None:
    """Nothing of mechicl's in the expected numbers: forward hooks on the Hugging Face modules."""
    hf, processor = organism("qwen2_5_vl")
    model = HookedVLM(hf, processor, check=False)
    pairs = minimal_pairs(model.renderer, draw(3, classes=2, shots=1, size=28, seed=1, syllables=(2, 2)), "swap_query")
    layers = hf.get_decoder().layers
    heads, kv_heads, width = model.cfg.n_heads, model.cfg.n_key_value_heads, model.cfg.d_head
    assert kv_heads < heads

    def run(batch: Batch, edit: tuple[Any, slice, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        seen: dict[str, Tensor] = {}
        handles = [
            layers[k].register_forward_pre_hook(
                lambda _, a, kw, k=k: seen.update({f"in {k}": a[0] if a else kw["hidden_states"]}), with_kwargs=True
            )
            for k in (0, 1)
        ]
        handles.append(layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, a: seen.update({"z": a[0]})))
        if edit is not None:
            module, where, new = edit

            def put(_: Any, __: Any, out: Tensor) -> Tensor:
                out = out.clone()
                out[..., where] = new[..., where]
                return out

            handles.append(module.register_forward_hook(put))
        try:
            logits = hf(**model.inputs(batch), use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return logits, seen

    _, here = run(pairs.clean)
    _, there = run(pairs.corrupt)
    attention = layers[1].self_attn
    projections = {"q": (attention.q_proj, heads), "k": (attention.k_proj, kv_heads), "v": (attention.v_proj, kv_heads)}
    senders = [Sender("embed"), *(Sender("head", 0, h) for h in range(heads))]
    receivers = [Receiver(kind, 1, h) for kind, (_, n) in projections.items() for h in range(n)]  # type: ignore[arg-type]
    result = path_patch(model, pairs, senders=senders, receivers=receivers, metric=first_logits(pairs), **QUIET)
    for sender in senders:
        z = there["z"] - here["z"]
        part = slice(sender.head * width, (sender.head + 1) * width)
        change = there["in 0"] - here["in 0"] if sender.kind == "embed" else z[..., part] @ layers[0].self_attn.o_proj.weight[:, part].T
        for receiver in receivers:
            module, _ = projections[receiver.kind]
            new = module(layers[1].input_layernorm(here["in 1"] + change))
            logits, _ = run(pairs.clean, (module, slice(receiver.head * width, (receiver.head + 1) * width), new))
            expected = first_logits(pairs)(logits[:, -1])
            assert np.allclose(result.raw[(slice(None), *result.index(Edge(sender, receiver)))], expected, atol=2e-5), (sender, receiver)


@pytest.mark.parametrize("family", ["gemma3", "paligemma2"])
@torch.no_grad()
def test_heads_behind_a_norm_equal_heads_patched_in_place(family: str, organism: Organism) -> None:
    """With MLPs computed anew, the path from a head of the last layer to the logits is all that patching its z does; of the first layer, what its keys read is."""
    model = HookedVLM(*organism(family), check=False)
    pairs = minimal_pairs(model.renderer, draw(3, classes=2, shots=1, size=28, seed=1, syllables=(2, 2)), "swap_query")
    last, layers = model.cfg.n_layers - 1, model.hf.get_decoder().layers
    metric = first_logits(pairs)
    _, there = model.run_with_cache(pairs.corrupt)
    _, here = model.run_with_cache(pairs.clean)

    def put(layer: int, head: int) -> tuple[str, Callable[..., Tensor]]:
        def edit(z: Tensor, *, hook: Any) -> Tensor:
            z = z.clone()
            z[:, :, head] = there[f"blocks.{layer}.attn.hook_z"][:, :, head]
            return z

        return f"blocks.{layer}.attn.hook_z", edit

    heads = range(model.cfg.n_heads)
    found = path_patch(model, pairs, senders=[f"{last}.{h}" for h in heads], freeze="heads", metric=metric, **QUIET)
    for head in heads:
        expected = metric(model.run_with_hooks(pairs.clean, fwd_hooks=[put(last, head)])[:, -1])
        assert np.allclose(found.raw[:, head, 0], expected, atol=2e-5)
    assert not np.allclose(found.raw[:, 0, 0], found.clean, atol=1e-6)
    assert "do not add up" in found.notes[0]
    strict = path_patch(model, pairs, senders=["0.1"], receivers=["v 1.0", "mlp 0"], metric=metric, **QUIET)
    with model.hooks(fwd_hooks=[put(0, 1)]):
        _, moved = model.run_with_cache(pairs.clean)
    change = moved["blocks.0.hook_attn_out"] - here["blocks.0.hook_attn_out"]
    width = model.cfg.d_head
    new = layers[1].self_attn.v_proj(layers[1].input_layernorm(here["blocks.1.hook_resid_pre"] + change))[..., :width]

    def values(v: Tensor, *, hook: Any) -> Tensor:
        v = v.clone()
        v[:, :, 0] = new
        return v

    expected = metric(model.run_with_hooks(pairs.clean, fwd_hooks=[("blocks.1.attn.hook_v", values)])[:, -1])
    assert np.allclose(strict.raw[(slice(None), *strict.index(Edge(Sender("head", 0, 1), Receiver("v", 1, 0))))], expected, atol=2e-5)


def first_logits(pairs: Pairs) -> Callable[[Tensor], Tensor]:
    """Of two fixed tokens: any difference will do to compare runs."""
    return lambda logits: logits[:, 7] - logits[:, 11]


@pytest.mark.parametrize("freeze", ["all", "heads"])
@pytest.mark.parametrize("metric", ["logit_diff", "label_logprob", "logprob", "prob", "kl"])
def test_the_logits_alone_are_as_among_other_receivers(metric: str, freeze: str) -> None:
    """For them only the positions that are read are followed."""
    model, pairs = untrained(n_heads=2, n_layers=2, norm="RMS", mlp="swiglu"), toy_pairs(3, label_words=2)
    options = {"metric": metric, "freeze": freeze, "spans": ["last token", "right label"], **QUIET}
    alone, among = (path_patch(model, pairs, receivers=some, **options) for some in (None, ["mlp 1", "logits"]))
    assert alone.raw.shape == (3, len(alone.senders), 1)
    assert np.allclose(alone.raw[:, :, 0], among.raw[:, :, 1], atol=1e-6)
    assert not np.allclose(alone.raw[:, :, 0], alone.clean[:, None], rtol=1e-3, atol=0)


def test_spans_restrict_where_receivers_see_the_change() -> None:
    model, pairs = untrained(n_heads=2, n_layers=2), toy_pairs(3)
    asked = {"senders": ["embed", "0.0"], "receivers": ["q 1.0", "v 1.1", "logits"], **QUIET}
    everywhere, last, items = (
        path_patch(model, pairs, spans=spans, **asked) for spans in (None, "last token", ["right text", "wrong text"])
    )
    assert np.allclose(everywhere.raw[:, :, (0, 2)], last.raw[:, :, (0, 2)], atol=1e-6)  # only the last token asks in the last layer
    assert not np.allclose(everywhere.raw[:, 1, 1], last.raw[:, 1, 1], atol=1e-6)
    assert np.allclose(items.raw[:, :, 2], items.clean[:, None])
    assert last.places == "last token"
    assert everywhere.places == "all positions"


def test_padding_and_batches_change_nothing() -> None:
    model = untrained(n_heads=2, norm="RMS", mlp="swiglu", positions="rope")
    episodes = [*toy_episodes(2, classes=2), *toy_episodes(2, classes=4, generator=torch.Generator().manual_seed(1))]
    both = minimal_pairs(ToyRenderer(), episodes, "swap_labels")
    assert any(span.role == "pad" for span in both.clean.spans[0])
    whole = path_patch(model, both, receivers="all", spans="right label", **QUIET)
    parts = path_patch(model, both, receivers="all", spans="right label", batch_size=1, **QUIET)
    assert np.allclose(whole.raw, parts.raw, atol=1e-5, equal_nan=True)
    alone = path_patch(model, minimal_pairs(ToyRenderer(), episodes[:2], "swap_labels"), receivers="all", spans="right label", **QUIET)
    assert np.allclose(whole.raw[:2], alone.raw, atol=1e-5, equal_nan=True)


@torch.no_grad()
def test_whole_labels_are_scored_behind_copies_of_the_prompts() -> None:
    """The metric by hand: log-probabilities of labels of two words, a span's change follows into the answer's words."""
    model, pairs = untrained(n_heads=2, n_layers=2), toy_pairs(3, label_words=2)
    result = path_patch(model, pairs, senders=["0.1"], metric="label_logprob", spans="last token", **QUIET)
    ids = [[side.candidate_ids[i][side.answers[i]] for side in (pairs.clean, pairs.corrupt)] for i in range(3)]
    expected = []
    for i in range(3):
        total = []
        for label in ids[i]:
            wide = [side.select([i]).append([list(label[:-1])]) for side in (pairs.clean, pairs.corrupt)]
            (_, here), (_, there) = (model.run_with_cache(batch) for batch in wide)
            change = added(model, there, Sender("head", 0, 1)) - added(model, here, Sender("head", 0, 1))
            logits = through(model, wide[0], here, Receiver("logits", 2), change)[0, -2:].log_softmax(-1)
            total.append(float(logits[0, label[0]] + logits[1, label[1]]))
        expected.append(total[0] - total[1])
    assert result.metric == "label_logprob"
    assert result.raw[:, 0, 0] == pytest.approx(expected, abs=1e-4)


def test_exchanging_nothing_changes_nothing_and_leaves_nothing() -> None:
    model, pairs = untrained(n_heads=2), toy_pairs(2)
    before = model(pairs.clean)
    measured, *_ = contrast("logit_diff", pairs.clean, pairs.corrupt)
    runs, clean, _ = Runs.of(model, measured, pairs.clean, pairs.clean, "noise", None)
    graph = EdgeGraph.of(model)
    raw = runs.effects(graph.senders, graph.receivers, "heads")
    known = ~np.isnan(raw[0])
    assert np.array_equal(known, graph.possible.T)
    assert all(np.array_equal(one[known], np.full(known.sum(), base)) for one, base in zip(raw, clean, strict=True))
    path_patch(model, pairs, receivers="all", **QUIET)
    assert torch.equal(model(pairs.clean), before)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_an_untrained_model_has_no_single_path() -> None:
    """The negative control of the planted circuit: no edge moves most of the distance."""
    planted, pairs = planted_induction(n_heads=2), toy_pairs(12)
    (matching,) = planted.matching
    found = path_patch(planted.model, pairs, **QUIET)
    assert found[Edge(Sender("head", *matching), Receiver("logits", 2))].value == pytest.approx(0.0, abs=1e-6)
    assert found.p_corrected[found.index(Edge(Sender("head", *matching), Receiver("logits", 2)))] < 0.05


def test_refusals(organism: Organism) -> None:
    model, pairs = untrained(n_heads=2), toy_pairs(2)
    with pytest.raises(OptionError, match=r"senders must be among .* got '3\.0'"):
        path_patch(model, pairs, senders=["3.0"])
    with pytest.raises(OptionError, match="receivers must be among"):
        path_patch(model, pairs, receivers=["mlp 0"])
    with pytest.raises(OptionError, match=r"receivers must be among .* got none"):
        path_patch(model, pairs, receivers=[])
    with pytest.raises(OptionError, match="direction must be"):
        path_patch(model, pairs, direction="back")
    with pytest.raises(OptionError, match="freeze must be"):
        path_patch(model, pairs, freeze="mlps")
    with pytest.raises(OptionError, match="correction must be"):
        path_patch(model, pairs, correction="none")
    with pytest.raises(OptionError, match="at least 1"):
        path_patch(model, pairs, batch_size=0)
    with pytest.raises(OptionError, match="spans must be among"):
        path_patch(model, pairs, spans="middle")
    with pytest.raises(EpisodeError, match="must differ in the metric"):
        path_patch(model, Pairs(pairs.clean, pairs.clean, "none", ()))
    with pytest.raises(EpisodeError):
        path_patch(model, Pairs(pairs.clean, toy_pairs(2, classes=3).clean, "none", ()))
    with pytest.raises(OptionError, match="edge must be between"):
        path_patch(model, pairs, **QUIET)[Edge(Sender("embed"), Receiver("q", 0, 0))]
    with pytest.raises(UnsupportedModelError, match="gate"):
        path_patch(HookedVLM(*organism("mllama"), check=False), pairs)
