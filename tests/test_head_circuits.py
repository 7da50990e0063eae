"""OV and QK circuits: planted heads show what they were made for, eigenvalues equal those of the whole matrix, tables add up to the model's own scores."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from readout_cases import ADDITIVE, NOT_ADDITIVE, episodes, hooked

from mechicl.analysis.readout.copying import copying, positive_share
from mechicl.analysis.readout.head_circuits import head_circuits
from mechicl.analysis.readout.qk_match import _deal_spread
from mechicl.analysis.readout.rotation import recover
from mechicl.data.gaussian import UnimodalTask, draw
from mechicl.errors import EmptySpanError, HeadIndexError, OptionError, UnsupportedModelError
from mechicl.models.planted import planted_induction, planted_vectors, untrained
from mechicl.models.toys.positions import turn, turn_interleaved_bug
from mechicl.models.toys.prompts import ToyRenderer, toy_batch
from mechicl.prompts.vectors import to_batch

QUIET: dict[str, Any] = {"progress": False, "n_random": 20}


def test_planted_induction_shows_the_previous_token_head_in_the_key_and_the_embedding_in_the_query() -> None:
    planted = planted_induction(n_heads=4, seed=3)
    batch = toy_batch(16, 3, 2, renderer=planted.model.renderer)
    (head,), (previous,) = planted.matching, planted.previous_token
    idle = next(h for h in planted.idle if h[0] == 1)
    result = head_circuits(planted.model, [head, idle], batch, n_random=200, progress=False)
    match = result.matches[head]
    cell = match.queries.index("embed"), match.senders.index(f"{previous[0]}.{previous[1]}")
    assert match.top(1) == [("embed", f"{previous[0]}.{previous[1]}")]
    assert match.value[cell] == pytest.approx(40.0, abs=1e-3)  # the planted score of a match
    assert match.low[cell] > match.null_high[cell]
    rest = match.value.copy()
    rest[cell] = 0
    assert np.abs(rest).max() < 1e-4
    assert result.copying is not None
    assert result.copying.value[0] == pytest.approx(1.0)
    assert result.copying.p_corrected[0] < 0.05
    assert result.copying.ratio[0] == pytest.approx(1.0)
    assert np.abs(result.matches[idle].value).max() < 20
    assert np.isnan(result.copying.value[1])  # idle: writes where nobody reads


def test_an_untrained_network_copies_and_matches_nothing() -> None:
    model = untrained(renderer=ToyRenderer(), norm=True, n_heads=4)
    heads = [(1, h) for h in range(4)]
    result = head_circuits(model, heads, toy_batch(64, 3, 2, renderer=model.renderer), n_random=200, progress=False)
    assert result.copying is not None
    assert result.copying.p_corrected.min() > 0.05
    assert result.copying.null == pytest.approx(0.5, abs=0.05)  # a random matrix has no preferred sign
    for match in result.matches.values():
        assert abs(match.total.value) < 1.0
        inside = (match.value > match.null_low) & (match.value < match.null_high)
        assert inside.mean() > 0.8


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("which", ["RMS", "LN", "qwen2_5_vl"])
def test_copying_scores_are_those_of_the_whole_matrix(which: str, fold: bool) -> None:
    """W_E W_V W_O W_U as a [vocab, vocab] matrix, made and decomposed in full: the independent path."""
    if which == "qwen2_5_vl":
        model: Any = hooked(which)
    else:
        model = untrained(renderer=ToyRenderer(), norm=which, n_heads=2)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for norm in (model.ln_final, *(block.ln1 for block in model.blocks)):
                norm.w.add_(0.5 * torch.randn(norm.w.shape, generator=generator))
    tokens = torch.arange(0, min(model.W_E.shape[0], model.W_U.shape[1]), 3)[:60]
    heads = [(0, 0), (1, model.cfg.n_heads - 1)]
    result = copying(model, heads, tokens=tokens, fold=fold, n_random=5)
    centre = torch.eye(model.cfg.d_model) - (1 / model.cfg.d_model if which == "LN" else 0.0)
    for k, (layer, head) in enumerate(heads):
        block = model.blocks[layer]
        group = model.cfg.n_heads // block.attn.W_V.shape[0]
        before = centre * block.ln1.w.float() if fold else torch.eye(model.cfg.d_model)
        after = centre * model.ln_final.w.float() if fold else torch.eye(model.cfg.d_model)
        whole = model.W_E[tokens] @ before @ block.attn.W_V[head // group] @ block.attn.W_O[head] @ after @ model.W_U[:, tokens]
        eigenvalues = torch.linalg.eigvals(whole.detach().double()).numpy()
        small = result.eigenvalues[k]
        assert result.value[k] == pytest.approx(positive_share(eigenvalues), abs=1e-3)
        assert np.abs(small).sum() == pytest.approx(np.abs(eigenvalues).sum(), rel=1e-3)
        assert result.ratio[k] == pytest.approx(float(eigenvalues.sum().real / np.abs(eigenvalues).sum()), abs=1e-3)


def own_scores(model: Any, batch: Any, layer: int, head: int) -> np.ndarray:
    """Right minus wrong score of the last token on labels (mean of exemplars' means), from the model's own score matrix."""
    _, cache = model.run_with_cache(batch, names_filter=[f"blocks.{layer}.attn.hook_attn_scores"])
    scores = cache[f"blocks.{layer}.attn.hook_attn_scores"][:, head]
    out = []
    for i, row in enumerate(batch.spans):
        answer = batch.candidates[i][batch.answers[i]]
        sides: dict[bool, list[float]] = {True: [], False: []}
        for span in row:
            if span.role == "label" and span.shot >= 0:
                sides[span.label == answer].append(float(scores[i, batch.query_pos[i], span.start : span.stop].mean()))
        out.append(np.mean(sides[True]) - np.mean(sides[False]))
    return np.array(out)


@pytest.mark.parametrize("family", [*ADDITIVE, *NOT_ADDITIVE])
def test_tables_add_up_to_the_models_own_scores_in_every_family(family: str) -> None:
    """RoPE of every kind, grouped heads, norms of queries and keys, left padding, pictures in the prompt."""
    model = hooked(family)
    data = [episodes(3)[k] for k in ((0, 2) if family == "mllama" else (0, 1, 2))]  # mllama: as many pictures in every prompt
    layer = max(k for k, part in enumerate(model.anatomy.layers) if not part.cross and not getattr(part.attention, "sliding_window", None))
    heads = [(layer, 0), (layer, model.cfg.n_heads - 1)]
    result = head_circuits(model, heads, data, by="component" if family in ADDITIVE else "layer", **QUIET)
    batch = model.render(data)
    for head in heads:
        match = result.matches[head]
        size = np.abs(match.per_episode).sum((1, 2)).max() + 1e-3
        assert match.residue < 2e-4 * size + 1e-5
        if family == "paligemma2":  # its scores are soft-capped: the table is of what goes into the cap
            continue
        np.testing.assert_allclose(match.per_episode.sum((1, 2)), own_scores(model, batch, *head), atol=2e-4 * size + 1e-5)
    assert any("soft-cap" in note for note in result.notes) == (family == "paligemma2")
    assert not any("sliding window" in note for note in result.notes)


def test_keys_outside_a_sliding_window_are_named() -> None:
    model = hooked("gemma3")
    local = next(k for k, part in enumerate(model.anatomy.layers) if getattr(part.attention, "sliding_window", None))
    result = head_circuits(model, [(local, 0)], episodes(1), by="layer", **QUIET)
    assert any("sliding window" in note for note in result.notes)


@pytest.mark.parametrize("positions", ["none", "learned", "rope"])
@pytest.mark.parametrize("norm", ["RMS", "LN", None])
def test_tables_add_up_on_toys_with_biases(positions: Any, norm: Any) -> None:
    model = untrained(renderer=ToyRenderer(), positions=positions, norm=norm, d_mlp=16, qkv_bias=True)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    batch = toy_batch(6, 3, 2, renderer=model.renderer)
    match = head_circuits(model, [(1, 2)], batch, **QUIET).matches[1, 2]
    true = own_scores(model, batch, 1, 2)
    size = np.abs(match.per_episode).sum((1, 2)).max()
    np.testing.assert_allclose(match.per_episode.sum((1, 2)), true, atol=1e-5 * size)
    assert "biases" in match.queries


def test_the_planted_key_came_from_the_exemplars_own_item() -> None:
    planted = planted_induction(n_heads=4, seed=3)
    batch = toy_batch(8, 3, 2, renderer=planted.model.renderer)
    (head,), ((layer, fetching),) = planted.matching, planted.previous_token
    match = head_circuits(planted.model, [head], batch, sources=True, **QUIET).matches[head]
    assert match.top(1) == [("embed", f"{layer}.{fetching} own item")]
    assert match.value.max() == pytest.approx(40.0, abs=1e-3)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_what_heads_read_adds_up_to_the_heads(family: str) -> None:
    model, data, head = hooked(family), episodes(3), (hooked(family).cfg.n_layers - 1, 1)
    whole, apart = (head_circuits(model, [head], data, sources=sources, most=1000, **QUIET).matches[head] for sources in (False, True))
    groups = {name: [k for k, one in enumerate(apart.senders) if one == name or one.startswith(f"{name} ")] for name in whole.senders}
    size = np.abs(whole.per_episode).sum((1, 2)).max() + 1e-3
    for i, query in enumerate(whole.queries):
        for j, key in enumerate(whole.senders):
            found = apart.per_episode[:, groups[query]][:, :, groups[key]].sum((1, 2))
            np.testing.assert_allclose(found, whole.per_episode[:, i, j], atol=1e-4 * size)
    assert any(name.endswith("own item") for name in apart.queries)


def test_small_parts_are_added_up_without_changing_the_sum() -> None:
    model, data = hooked("qwen2_5_vl"), episodes(3)
    head = (model.cfg.n_layers - 1, 0)
    whole, few = (head_circuits(model, [head], data, most=most, **QUIET).matches[head] for most in (100, 3))
    assert len(few.queries) == 3
    assert few.queries[-1] == few.senders[-1] == "rest"
    np.testing.assert_allclose(few.per_episode.sum((1, 2)), whole.per_episode.sum((1, 2)), rtol=1e-6, atol=1e-6)


def test_a_positional_bias_is_said_to_be_left_out() -> None:
    model = untrained(renderer=ToyRenderer(), positions="alibi")
    result = head_circuits(model, [(1, 0)], toy_batch(4, 2, 2, renderer=model.renderer), **QUIET)
    assert "bias of place" in result.notes[0]


def test_over_vectors_there_is_no_copying_score_but_the_match_is_found() -> None:
    task = UnimodalTask(K=64, L=16, N=4, D=64, B=2, n_novel=16)
    planted = planted_vectors(task)
    batch = to_batch(draw(task, 16, torch.Generator().manual_seed(0)))
    (head,), previous = planted.matching, {f"{a}.{b}" for a, b in planted.previous_token}
    result = head_circuits(planted.model, [head], batch, **QUIET)
    assert result.copying is None
    assert "reads vectors" in result.notes[0]
    query, key = result.matches[head].top(1)[0]
    assert query == "embed"
    assert key in previous


def test_the_nulls_spread_is_that_of_all_ways_to_deal_the_labels() -> None:
    generator = torch.Generator().manual_seed(4)
    shots = torch.randn(1, 4, 2, 3, generator=generator).double()
    right, known = torch.tensor([[True, True, False, False]]), torch.ones(1, 4, dtype=torch.bool)
    values = []
    for deal in permutations(range(4)):
        chosen = right[0][list(deal)]
        values.append((shots[0, chosen].mean(0) - shots[0, ~chosen].mean(0)).numpy())
    np.testing.assert_allclose(_deal_spread(shots, known, right), np.std(values, axis=0), rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(half=st.integers(1, 6), rest=st.sampled_from([0, 1, 3]), seed=st.integers(0, 1000), halves=st.booleans())
def test_any_rotation_of_pairs_is_recovered(half: int, rest: int, seed: int, halves: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    d = 2 * half * (1 + rest)  # the first part of the coordinates is turned
    before = torch.randn(2, 3, 3, d, generator=generator)
    angle = 6.0 * torch.rand(2, 3, 1, half, generator=generator)
    x = before[..., : 2 * half]
    if halves:
        turned = turn(x, angle.cos(), angle.sin())
    else:
        a, b = x[..., ::2], x[..., 1::2]
        turned = torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).flatten(-2)
    after = torch.cat([turned, before[..., 2 * half :]], -1)
    rotation = recover(before, after)
    torch.testing.assert_close(rotation(before), after, atol=1e-4, rtol=1e-4)
    parts = torch.randn(2, 3, 5, d, generator=generator)
    torch.testing.assert_close(rotation(parts).sum(2, keepdim=True), rotation(parts.sum(2, keepdim=True)), atol=1e-4, rtol=1e-4)


def test_a_map_that_is_no_rotation_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    before, angle = torch.randn(2, 3, 4, 8, generator=generator), torch.rand(2, 3, 1, 4, generator=generator)
    with pytest.raises(UnsupportedModelError, match="no pairing"):
        recover(before, turn_interleaved_bug(before, angle.cos(), angle.sin()))


def test_scores_kept_for_the_pictures_are_the_models_own() -> None:
    model, data = hooked("qwen2_5_vl"), episodes(2)
    head = (1, 0)
    result = head_circuits(model, [head], data, prompt=0, **QUIET)
    assert result.view is not None
    assert result.scores is not None
    batch = model.render([data[0]])
    _, cache = model.run_with_cache(batch, names_filter=["blocks.1.attn.hook_attn_scores"])
    scores = cache["blocks.1.attn.hook_attn_scores"][0, 0]
    np.testing.assert_allclose(result.scores[head][0], scores[-1], atol=1e-4)
    picture = batch.mask("image", shot=-1)[0]
    first = int(picture.long().argmax())
    np.testing.assert_allclose(result.scores[head][1, :first], scores[picture][:, :first].mean(0), atol=1e-4)
    assert np.isnan(result.scores[head][1, first:]).all()


def test_what_does_not_exist_is_refused() -> None:
    model = untrained(renderer=ToyRenderer())
    batch = toy_batch(2, 2, renderer=model.renderer)
    with pytest.raises(HeadIndexError):
        head_circuits(model, [(5, 0)], batch, **QUIET)
    with pytest.raises(OptionError, match="heads"):
        head_circuits(model, [], batch, **QUIET)
    with pytest.raises(OptionError, match="keys must be"):
        head_circuits(model, [(0, 0)], batch, keys="token", **QUIET)
    with pytest.raises(OptionError, match="by must be"):
        head_circuits(model, [(0, 0)], batch, by="neuron", **QUIET)
    with pytest.raises(OptionError, match="split heads"):
        head_circuits(model, [(0, 0)], batch, by="layer", sources=True, **QUIET)
    with pytest.raises(OptionError, match="prompt must be"):
        head_circuits(model, [(0, 0)], prompt=0, **QUIET)
    with pytest.raises(EmptySpanError, match="image"):
        head_circuits(model, [(0, 0)], batch, keys="image", **QUIET)
    with pytest.raises(UnsupportedModelError, match='by="layer"'):
        head_circuits(hooked("gemma3"), [(0, 0)], episodes(2), **QUIET)
    bug = untrained(renderer=ToyRenderer(), positions="rope_interleaved_bug")
    with pytest.raises(UnsupportedModelError, match="RoPE"):
        head_circuits(bug, [(1, 0)], batch, **QUIET)


def test_without_data_only_weights_are_read_and_the_table_has_them() -> None:
    model = untrained(renderer=ToyRenderer())
    result = head_circuits(model, [(0, 0), (1, 1)], **QUIET)
    assert result.matches == {}
    assert result.label_copying is None
    assert len(result.to_frame()) == 2
