"""Toys over vectors: positions do what their names say, every configuration trains and reads alike, and TransformerLens works on them unchanged."""

import itertools
import os
import sys
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from transformer_lens import patching

from mechicl.analysis.heads.scoring import score_heads
from mechicl.analysis.icl import icl_accuracy
from mechicl.data.gaussian import MultimodalTask, UnimodalTask, draw
from mechicl.errors import HookNameError, MissingInputError, OptionError, UnsupportedModelError
from mechicl.models.hooked import HookedModel
from mechicl.models.planted import planted_vectors
from mechicl.models.toys.config import Mlp, Positions
from mechicl.models.toys.model import ToyTransformer, classify_with, second_positions, toy_config
from mechicl.models.toys.positions import (
    alibi_slopes,
    draw_places,
    offset_share,
    one_hot,
    rope_tables,
    rotate,
    rotate_interleaved_bug,
    turn,
    turn_interleaved_bug,
)
from mechicl.models.toys.presets import PRESETS, preset
from mechicl.prompts.vectors import to_batch

POSITIONS: tuple[Positions, ...] = get_args(Positions)
N_POS = 17


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shaken(cfg: Any, seed: int = 0, **parts: Any) -> ToyTransformer:
    """A toy whose norm weights and biases are not ones and zeros either, so that leaving one out shows."""
    model = ToyTransformer(cfg, seed=seed, **parts)
    generator = seeded(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1 or ".attn.b_" in name:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def vectors(n: int = 3, width: int = 64, n_pos: int = N_POS, seed: int = 0) -> Tensor:
    return torch.randn(n, n_pos, width, generator=seeded(seed))


def pair_scores(rotation: Any, *, d_head: int = 64, n: int = 20, pairs: int = 200) -> tuple[Tensor, Tensor]:
    """Scores [pair, dest, src] of fixed random q and k at every place, and how much their norms change [pair, place]."""
    q, k = torch.randn(2, pairs, 1, 1, d_head, dtype=torch.float64, generator=seeded()).expand(-1, -1, n, 1, -1)
    place = torch.arange(n).expand(pairs, n)
    turned_q, turned_k = rotation(q, place)[:, :, 0], rotation(k, place)[:, :, 0]
    return turned_q @ turned_k.transpose(1, 2), turned_q.norm(dim=-1) / q[:, :, 0].norm(dim=-1)


# --- positions -------------------------------------------------------------------------------------------------------------------------------


def test_rope_scores_depend_on_the_offset_only_and_norms_are_kept() -> None:
    scores, norms = pair_scores(rotate)
    assert offset_share(scores) < 1e-20  # float64
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-12)
    assert torch.allclose(scores[:, 1:, 1:], scores[:, :-1, :-1], atol=1e-9)


def test_the_released_map_fails_the_same_test() -> None:
    """Half of its scores' variance is not a function of the offset."""
    scores, norms = pair_scores(rotate_interleaved_bug)
    assert offset_share(scores) == pytest.approx(0.50, abs=0.02)
    assert (norms - 1).abs().max() > 0.05
    assert not torch.allclose(scores[:, 1:, 1:], scores[:, :-1, :-1], atol=0.1)


def test_the_released_map_is_what_its_derivation_says() -> None:
    """Coordinate by coordinate, as the docstring states it; with two coordinates there is one pair and nothing to confuse: RoPE."""
    x, place, d = torch.randn(1, 1, 1, 8, dtype=torch.float64, generator=seeded()), 5, 8
    angle = [place * 1e4 ** (-2 * i / d) for i in range(d // 2)]
    c, s = torch.tensor(angle, dtype=torch.float64).cos(), torch.tensor(angle, dtype=torch.float64).sin()
    v = x.flatten()
    first = [v[i] * c[i] - v[2 * i + 1] * s[i] for i in range(4)]
    second = [v[4 + i] * c[i] + v[2 * i] * s[i] for i in range(4)]
    assert torch.allclose(rotate_interleaved_bug(x, torch.tensor([[place]])).flatten(), torch.stack(first + second), atol=1e-12)
    small = x[..., :2]
    assert torch.allclose(rotate_interleaved_bug(small, torch.tensor([[place]])), rotate(small, torch.tensor([[place]])))


@pytest.mark.parametrize(("by_place", "by_table"), [(rotate, turn), (rotate_interleaved_bug, turn_interleaved_bug)])
def test_tables_and_places_turn_alike(by_place: Any, by_table: Any) -> None:
    x, place = torch.randn(2, 5, 3, 16, generator=seeded()), torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    cos, sin = rope_tables(16, 16)[:, place].unsqueeze(-2)
    assert torch.allclose(by_place(x, place), by_table(x, cos, sin), atol=1e-6)


@pytest.mark.parametrize(("name", "blind"), [("rope", True), ("alibi", True), ("none", True), ("rope_interleaved_bug", False),
                                             ("one_hot", False), ("learned", False), ("one_hot+rope", False)])  # fmt: skip
def test_where_a_sequence_starts_matters_only_where_it_should(name: Any, blind: bool) -> None:
    model = shaken(preset("modern", positions=name))
    x, place = vectors(), torch.arange(N_POS).expand(3, -1)
    here, there = (model({"inputs_embeds": x, "position_ids": place + start}) for start in (0, 30))
    assert torch.allclose(here, there, atol=1e-4) == blind  # float32 angles of up to 47 radians
    assert torch.equal(here, model(x))


def test_alibi_slopes_are_the_published_ones() -> None:
    assert torch.allclose(alibi_slopes(8), torch.tensor([2.0**-k for k in range(1, 9)]))
    assert alibi_slopes(1).tolist() == [2.0**-8]
    assert torch.allclose(alibi_slopes(6), torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]))
    model = ToyTransformer(preset("modern", positions="alibi"))
    with torch.no_grad():
        model.blocks[0].attn.W_Q.zero_()  # type: ignore[union-attr]
    scores = model.run_with_cache(vectors())[1]["blocks.0.attn.hook_attn_scores"]
    assert torch.allclose(scores[:, :, -1, -4], -3 * alibi_slopes(4).expand(3, -1))


def test_one_hot_places_stand_before_the_vectors_and_zeros_fill_the_rest() -> None:
    place = torch.tensor([[2, 3]])
    assert torch.equal(one_hot(place, 4), functional.one_hot(place, 4).float())
    model = ToyTransformer(toy_config(inputs="vectors", positions="one_hot", d_input=3, n_places=4, d_model=10, n_heads=1, d_vocab=5))
    _, cache = model.run_with_cache({"inputs_embeds": torch.ones(1, 2, 3), "position_ids": place})
    expected = torch.cat([torch.eye(4)[2:], torch.ones(2, 3), torch.zeros(2, 3)], -1)
    assert torch.equal(cache["blocks.0.hook_resid_pre"][0], expected)
    assert torch.equal(cache["hook_embed"] + cache["hook_pos_embed"], cache["blocks.0.hook_resid_pre"])


def test_training_places_start_anywhere_and_count_on() -> None:
    cfg = preset("reddy2024")
    places = draw_places(cfg, 4000, N_POS, seeded())
    assert places is not None
    assert torch.equal(places.diff(dim=1), torch.ones(4000, N_POS - 1, dtype=torch.long))
    starts = torch.bincount(places[:, 0], minlength=cfg.n_places - N_POS + 1)
    assert len(starts) == cfg.n_places - N_POS + 1
    assert starts.min() > 40  # 82 expected each, deviation 9
    assert draw_places(preset("huang2026"), 4, N_POS, seeded()) is None
    with pytest.raises(OptionError, match="n_ctx must be at least"):
        draw_places(cfg, 4, 66)


# --- configurations --------------------------------------------------------------------------------------------------------------------------


def n_parameters(cfg: Any) -> int:
    return sum(p.numel() for p in ToyTransformer(cfg).parameters())


def test_presets_have_the_papers_sizes() -> None:
    """Counted by hand: q, k, v; three d x d matrices with bias; two norms; a final norm; the classifier without bias."""

    def huang(d: int, labels: int = 32) -> int:
        return 2 * (3 * d * d + 3 * (d * d + d) + 2 * d) + d + d * labels

    assert n_parameters(preset("huang2026")) == huang(64)
    assert n_parameters(preset("huang2026", positions="one_hot")) == huang(129)
    assert n_parameters(preset("huang2026", positions="one_hot+rope")) == huang(130)
    assert n_parameters(preset("huang2026", n_heads=2)) == huang(64) + 2 * 64 * 64  # the output projection comes with the heads
    # Reddy: two layers of q, k, v of 63 + 65 dimensions, three hidden layers of 128 and the labels
    assert n_parameters(preset("reddy2024")) == 2 * 3 * 128**2 + 3 * (128 * 128 + 128) + 128 * 32
    assert n_parameters(preset("modern")) == 2 * (4 * 64 * 64 + 3 * 64 * 192 + 2 * 64) + 64 + 64 * 32
    reddy = preset("reddy2024")
    assert (reddy.norm, reddy.mlp, reddy.output_projection, reddy.random_start) == (None, None, False, True)
    with pytest.raises(OptionError, match="preset must be one of"):
        preset("vaswani2017")


def test_every_way_of_coding_positions_has_the_same_width_when_asked() -> None:
    configs = [preset("huang2026", positions=name, n_places=66) for name in POSITIONS]
    assert {(cfg.d_model, cfg.d_head) for cfg in configs} == {(130, 130)}
    assert len({n_parameters(cfg) for cfg in configs if cfg.positions != "learned"}) == 1


@pytest.mark.parametrize(("name", "positions"), list(itertools.product(PRESETS, POSITIONS)))
def test_settings_give_the_configuration_again(name: str, positions: Positions) -> None:
    cfg = preset(name, positions=positions, **({"d_input": 64} if "rope" in positions else {}))
    assert toy_config(**cfg.settings()) == cfg
    assert all(isinstance(value, int | float | str | bool | None) for value in cfg.settings().values())


def test_initial_weights_are_spread_as_the_preset_says() -> None:
    spread = {name: float(p.detach().std()) for name, p in ToyTransformer(preset("huang2026")).named_parameters()}
    for name in ("blocks.0.attn.W_Q", "blocks.1.attn.W_V", "W_U"):
        assert spread[name] == pytest.approx(0.02, rel=0.05)
    for name in ("blocks.0.mlp.W_in", "blocks.0.mlp.W_gate", "blocks.1.mlp.W_out"):
        assert spread[name] == pytest.approx((64 * 3) ** -0.5, rel=0.05)  # uniform within 1 / sqrt(64)
    spread = {name: float(p.detach().var()) for name, p in ToyTransformer(preset("reddy2024")).named_parameters()}
    for name, variance in (("blocks.0.attn.W_Q", 1 / 63), ("classifier.W_2", 2 / 128), ("classifier.W_U", 1 / 128)):
        assert spread[name] == pytest.approx(variance, rel=0.1)
    assert spread["classifier.b_3"] == pytest.approx(1 / 128, rel=0.5)
    one, same, other = (ToyTransformer(preset("huang2026"), seed=seed).W_U for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# --- the training pass -----------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    positions=st.sampled_from(POSITIONS), norm=st.sampled_from(["RMS", "LN", None]), mlp=st.sampled_from([*get_args(Mlp), None]),
    n_heads=st.sampled_from([1, 2]), n_layers=st.integers(1, 3), projection=st.booleans(), bias=st.booleans(),
    classifier=st.sampled_from(["linear", "mlp"]), scale=st.sampled_from([None, 1.0]), n_pos=st.integers(1, 12), start=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_classify_is_the_hooked_forward_at_the_last_position(
    positions: Any, norm: Any, mlp: Any, n_heads: int, n_layers: int, projection: bool, bias: bool, classifier: Any, scale: Any, n_pos: int, start: bool, seed: int
) -> None:  # fmt: skip
    cfg = toy_config(
        inputs="vectors", d_input=8, n_places=16, d_model=24, d_head=24 // n_heads, d_vocab=5, n_ctx=16, positions=positions, norm=norm, mlp=mlp,
        n_heads=n_heads, n_layers=n_layers, output_projection=projection, qkv_bias=bias, classifier=classifier, d_classifier=12,
        score_scale=scale,
    )  # fmt: skip
    model, x = shaken(cfg, seed), vectors(2, 8, n_pos, seed)
    place = torch.arange(n_pos).expand(2, -1) + torch.tensor([[0], [16 - n_pos]]) if start else None
    slow = model({"inputs_embeds": x} if place is None else {"inputs_embeds": x, "position_ids": place})[:, 0]
    assert torch.allclose(model.classify(x, position_ids=place), slow, atol=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_gradients_of_both_passes_are_the_same(name: str) -> None:
    model = shaken(preset(name, qkv_bias=True)).double()
    x, parameters = vectors(width=model.cfg.d_input).double(), dict(model.named_parameters())
    target = torch.tensor([3, 0, 7])
    fast = torch.autograd.grad(functional.cross_entropy(model.classify(x), target), list(parameters.values()))
    slow = torch.autograd.grad(functional.cross_entropy(model(x)[:, 0], target), list(parameters.values()))
    for one, two, label in zip(fast, slow, parameters, strict=True):
        assert torch.allclose(one, two, atol=1e-9), label
        assert label.endswith("b_K") or two.abs().max() > 0  # every weight learns; a bias of the keys changes nothing without RoPE


@pytest.mark.parametrize("name", ["rope", "rope_interleaved_bug", "one_hot", "alibi", "learned"])
def test_many_models_run_at_once_as_each_alone(name: Any) -> None:
    cfg = preset("modern", positions=name)
    models = [shaken(cfg, seed) for seed in range(3)]
    weights = {key: torch.stack([dict(m.named_parameters())[key] for m in models]).detach() for key, _ in models[0].named_parameters()}
    x = torch.stack([vectors(seed=seed) for seed in range(3)])
    places = torch.stack([torch.arange(N_POS).expand(3, -1) + seed for seed in range(3)])
    together = torch.vmap(lambda w, tokens, place: classify_with(models[0], w, tokens, None, place))(weights, x, places)
    for k, model in enumerate(models):
        assert torch.allclose(together[k], model.classify(x[k], position_ids=places[k]), atol=1e-5)
    assert torch.equal(models[0].W_U, shaken(cfg, 0).W_U)  # nothing was put into the model


def test_token_ids_are_classified_too() -> None:
    model = ToyTransformer(toy_config(norm=True, positions="rope", mlp="swiglu"))
    ids = torch.randint(66, (3, 9), generator=seeded())
    assert torch.allclose(model.classify(ids), model(ids)[:, 0], atol=1e-5)


def test_classify_refuses_what_it_would_ignore() -> None:
    model = ToyTransformer(preset("huang2026", n_ctx=17))
    with model.hooks([("hook_embed", lambda x, hook: x * 0)]), pytest.raises(OptionError, match="must not be called inside hooks"):
        model.classify(vectors())
    with pytest.raises(OptionError, match="at most n_ctx = 17"):
        model.classify(vectors(n_pos=18))


@pytest.mark.skipif("MECHICL_PAPER_CODE" not in os.environ, reason="needs a clone of the paper's code: MECHICL_PAPER_CODE=folder")
@pytest.mark.parametrize("n_heads", [1, 2])
@pytest.mark.parametrize(("name", "theirs"), [("rope_interleaved_bug", {"rope": True}), ("alibi", {"rope": False, "use_alibi": True}),
                                              ("none", {"rope": False})])  # fmt: skip
def test_the_preset_is_the_released_model(monkeypatch: pytest.MonkeyPatch, n_heads: int, name: Any, theirs: dict[str, bool]) -> None:
    """The same weights in the authors' own module give the same logits."""
    monkeypatch.syspath_prepend(str(Path(os.environ["MECHICL_PAPER_CODE"])))
    import model as paper  # pyright: ignore[reportMissingImports]

    monkeypatch.delitem(sys.modules, "model")
    other = paper.Transformer(paper.ModelArgs(dim=64, n_heads=n_heads, n_labels=32, **theirs))
    own: Any = shaken(preset("huang2026", positions=name, n_heads=n_heads))
    with torch.no_grad():
        for a, b in zip(own.blocks, other.layers, strict=True):
            for letter in "QKV":
                getattr(b.attn, f"w{letter.lower()}").weight.copy_(getattr(a.attn, f"W_{letter}").transpose(0, 1).flatten(1).T)
            if n_heads > 1:
                b.attn.wo.weight.copy_(a.attn.W_O.flatten(0, 1).T)
            for x, y in (("gate", b.mlp.fc1), ("in", b.mlp.fc2), ("out", b.mlp.fc3)):
                y.weight.copy_(getattr(a.mlp, f"W_{x}").T)
                y.bias.copy_(getattr(a.mlp, f"b_{x}"))
            b.attn_norm.weight.copy_(a.ln1.w)
            b.mlp_norm.weight.copy_(a.ln2.w)
        other.norm.weight.copy_(own.ln_final.w)
        other.out.weight.copy_(own.W_U.T)
        assert torch.allclose(own.classify(vectors()), other(vectors()), atol=1e-5)


# --- the surface of every model ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POSITIONS)
def test_left_padding_changes_nothing(name: Any) -> None:
    model, x = shaken(preset("modern", positions=name)), vectors()
    padded = torch.cat([torch.full((3, 4, 64), 9.0), x], 1)
    mask = torch.tensor([0] * 4 + [1] * N_POS).expand(3, -1)
    assert torch.allclose(model({"inputs_embeds": padded, "attention_mask": mask}), model(x), atol=1e-5)


def test_an_edit_leaves_no_trace_and_names_are_checked() -> None:
    model, x = shaken(preset("huang2026", n_heads=2)), vectors()
    assert isinstance(model, HookedModel)
    before = model(x)
    edited = model.run_with_hooks(x, fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: z * 0)])
    assert not torch.allclose(edited, before)
    assert torch.equal(model(x), before)
    with pytest.raises(HookNameError, match="hook_rot_q"):
        ToyTransformer(preset("huang2026", positions="alibi")).run_with_cache(x, names_filter=["blocks.0.attn.hook_rot_q"])


@pytest.mark.parametrize(
    ("name", "options"), [("huang2026", {}), ("modern", {}), ("modern", {"positions": "one_hot"}), ("huang2026", {"n_heads": 4})]
)
def test_transformerlens_cache_takes_the_stream_apart(name: str, options: dict[str, Any]) -> None:
    """Parts add up to the stream, heads to attention's output, and logit shares to the logits."""
    model, x = shaken(preset(name, **options)), vectors()
    logits, cache = model.run_with_cache(x, positions="all")
    end = cache["blocks.1.hook_resid_post"]
    assert torch.allclose(cache.decompose_resid(layer=-1).sum(0), end, atol=1e-5)
    assert torch.equal(cache.accumulated_resid(layer=-1)[-1], end)
    assert torch.allclose(cache.stack_head_results(layer=1).sum(0), cache["blocks.0.hook_attn_out"], atol=1e-5)
    shares = cache.logit_attrs(cache.decompose_resid(layer=-1), tokens=5)
    assert torch.allclose(shares.sum(0), logits[..., 5], atol=1e-4)
    assert torch.equal(model.tokens_to_residual_directions("l5"), model.tokens_to_residual_directions(5))
    full = cache.get_full_resid_decomposition(layer=-1, expand_neurons=False)
    assert torch.allclose(full.sum(0), end, atol=1e-5)
    with pytest.raises(UnsupportedModelError, match="logit directions"):
        ToyTransformer(preset("reddy2024")).tokens_to_residual_directions(0)


def inputs_of(drawn: Any) -> dict[str, Tensor]:
    return dict(to_batch(drawn).inputs)


def test_transformerlens_patching_finds_the_head_and_the_token_that_carry_the_answer() -> None:
    """Labels rotate among the slots. One head's clean output restores the answer: the matching head's; one token's clean stream: the right label's."""
    task = UnimodalTask(N=4, B=1, no_repeats=True)
    planted, drawn = planted_vectors(task, n_heads=3, seed=1), draw(task, 8, seeded(), split="ic")
    clean, labels = drawn.tokens, list(drawn.layout.label)
    corrupt = clean.clone()
    corrupt[:, labels] = clean[:, labels].roll(1, 1)
    _, cache = planted.model.run_with_cache(clean)

    def right(logits: Tensor) -> Tensor:
        return (logits[:, 0].argmax(-1) == drawn.target).float()

    def set_head(corrupted: Tensor, index: Any, kept: Any) -> Tensor:
        corrupted[:, :, index[1]] = kept[:, :, index[1]]
        return corrupted

    def set_pos(corrupted: Tensor, index: Any, kept: Any) -> Tensor:
        corrupted[:, index[1]] = kept[:, index[1]]
        return corrupted

    with torch.no_grad():
        heads = patching.generic_activation_patch(planted.model, corrupt, cache, right, set_head, "z", ["layer", "head"], reduce="mean")
        grid = pd.DataFrame(itertools.product(range(2), range(drawn.layout.n_pos)), columns=["layer", "pos"])
        tokens = patching.generic_activation_patch(planted.model, corrupt, cache, right, set_pos, "resid_pre", index_df=grid, reduce="none")
    expected = torch.zeros(2, 3)
    expected[planted.matching[0]] = 1.0
    assert torch.equal(heads, expected)
    carrier = torch.tensor(labels)[drawn.same.long().argmax(1)]
    assert torch.equal(tokens.values, (torch.tensor(grid["pos"])[:, None] == carrier).float())  # type: ignore[union-attr]


def test_the_planted_circuit_labels_what_it_has_never_seen_and_knows_nothing_else() -> None:
    """Novel classes and shifted labels are all right; classes that the context does not show are guessed; an untrained network guesses always."""
    task = UnimodalTask(B=1, no_repeats=True)
    planted = planted_vectors(task, n_heads=2, seed=2)

    def accuracy(model: ToyTransformer, split: Any) -> float:
        drawn = draw(task, 300, seeded(5), split=split)
        return float((model.classify(drawn.tokens).argmax(-1) == drawn.target).float().mean())

    assert accuracy(planted.model, "ic") == 1.0
    assert accuracy(planted.model, "ic2") == 1.0
    assert accuracy(planted.model, "iw") < 0.15
    assert accuracy(ToyTransformer(planted.model.cfg), "ic") < 0.15


@pytest.mark.parametrize("task", [UnimodalTask(), MultimodalTask(K1=512)])
def test_head_scores_find_the_planted_circuit_on_vectors(task: Any) -> None:
    planted = planted_vectors(task, n_heads=3, seed=3)
    batch = to_batch(draw(task, 24, seeded(), split="ic"))
    scores = score_heads(planted.model, batch, seed=0)
    assert [scores.top("induction", 1)[0][:2] for _ in range(1)] == [planted.matching[0]] or scores.top("induction", 1)[
        0
    ] == planted.matching[0]
    assert icl_accuracy(planted.model, batch).accuracy.value == 1.0


def test_the_second_modality_stands_in_its_places_and_can_be_edited() -> None:
    task = MultimodalTask(K1=512, D2=24)
    drawn = draw(task, 6, seeded())
    assert drawn.second is not None
    where = [*drawn.layout.second, drawn.layout.query_second]
    assert second_positions(drawn.layout.n_pos, task.N + 1) == where
    projector = nn.Linear(24, 64)
    model = shaken(preset("huang2026"), projector=projector)
    given_ = inputs_of(drawn)
    logits, cache = model.run_with_cache(given_)
    assert torch.allclose(logits[:, 0], model.classify(drawn.tokens, drawn.second), atol=1e-5)
    assert torch.allclose(cache["hook_image_features"], projector(drawn.second), atol=1e-6)
    assert torch.equal(cache["hook_embed"][:, where], cache["hook_image_features"])
    others = [p for p in range(drawn.layout.n_pos) if p not in where]
    assert torch.equal(cache["hook_embed"][:, others], drawn.tokens[:, others])
    gone = model.run_with_hooks(given_, fwd_hooks=[("hook_image_features", lambda x, hook: x * 0)])
    assert torch.allclose(gone[:, 0], model.classify(drawn.tokens), atol=1e-5)


def test_the_planted_circuit_of_two_modalities_uses_the_first_only() -> None:
    task = MultimodalTask(K1=512, B=1, no_repeats=True)
    model, drawn = planted_vectors(task, n_heads=2).model, draw(task, 200, seeded(), split="ic")
    assert drawn.second is not None

    def accuracy(tokens: Tensor, second: Tensor) -> float:
        return float((model.classify(tokens, second).argmax(-1) == drawn.target).float().mean())

    blind = drawn.tokens.clone()
    blind[:, [*drawn.layout.item, drawn.layout.query]] = 0
    assert accuracy(drawn.tokens, drawn.second) == 1.0
    assert accuracy(drawn.tokens, drawn.second * 0) == 1.0
    assert accuracy(blind, drawn.second) < 0.3  # one of eight labels


# --- refusals ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "rule"), [
    ({"positions": "sinusoidal"}, "positions must be one of"),
    ({"mlp": "relu"}, "mlp must be one of"),
    ({"norm": "batch"}, "norm must be"),
    ({"inputs": "pixels"}, "inputs must be one of"),
    ({"positions": "one_hot"}, 'inputs must be "vectors"'),
    ({"inputs": "vectors", "d_input": 8, "n_places": 4, "d_model": 11}, "d_model must be at least"),
    ({"inputs": "vectors", "d_input": 9, "n_heads": 1, "positions": "rope"}, "d_head must be even"),
    ({"random_start": True, "positions": "rope"}, "random_start must be False"),
    ({"n_layers": 0}, "n_layers must be at least 1"),
    ({"mlp": "gelu", "d_mlp": 0}, "d_mlp must be at least 1"),
])  # fmt: skip
def test_impossible_configurations_are_refused_with_the_rule(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(OptionError, match=rule):
        toy_config(**options)


def test_inputs_that_do_not_fit_are_refused() -> None:
    model = ToyTransformer(preset("huang2026"))
    with pytest.raises(MissingInputError, match="inputs_embeds must be given"):
        model(torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(OptionError, match="d_input = 64 wide"):
        model(vectors(width=63))
    with pytest.raises(OptionError, match="attention_mask must be"):
        model({"inputs_embeds": vectors(), "attention_mask": torch.ones(3, N_POS + 1)})
    with pytest.raises(MissingInputError, match="second_pos must come with"):
        model({"inputs_embeds": vectors(), "second_values": vectors(n_pos=2)})
    with pytest.raises(OptionError, match="features must be d_input"):
        model.classify(vectors(), vectors(n_pos=2, width=24))
    with pytest.raises(OptionError, match="at most n_ctx"):
        model({"inputs_embeds": vectors(), "position_ids": torch.arange(N_POS).expand(3, -1) + 120})
    with pytest.raises(OptionError, match="n_heads must be at least 2"):
        planted_vectors(MultimodalTask(K1=512), n_heads=1)
    with pytest.raises(OptionError, match=r"label l0\.\.l31"):
        model.to_single_token("apple")
