"""Contrastive margins: planted where they are planted, at their null in an untrained network, equal to sums by hand, telling when they must and silent when they cannot."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import unchecked
from hypothesis import given, settings
from hypothesis import strategies as st
from readout_cases import episodes, hooked
from sklearn.metrics import roc_auc_score

import mechicl
from mechicl.analysis.margin.contrast import contrast_margin
from mechicl.analysis.margin.read import distances
from mechicl.analysis.margin.training import margin_series
from mechicl.analysis.predictive import area_change, areas, best_held_out, spearman, why_no_auroc
from mechicl.data import concepts
from mechicl.data.gaussian import MultimodalTask, UnimodalTask, draw
from mechicl.errors import EmptySpanError, EpisodeError, HeadIndexError, NotFiniteError, OptionError, UnsupportedModelError
from mechicl.models.planted import planted_induction, planted_vectors, untrained
from mechicl.models.toys.prompts import toy_batch
from mechicl.prompts.disturb import disturb_images
from mechicl.prompts.spans import QUERY
from mechicl.prompts.vectors import to_batch
from mechicl.training.organisms import FAMILIES
from mechicl.training.toys.recipe import recipe
from mechicl.training.toys.train import load_toy, train_toy

QUIET: dict[str, Any] = {"progress": False, "n_null": 200}


def test_the_planted_head_holds_the_margin_in_its_keys_and_an_idle_layer_does_not() -> None:
    """Keys of the matching head at labels are the items before them; its values there are the labels, of which a neutral label tells nothing."""
    planted = planted_induction(n_heads=4, seed=3)
    (matching,), (previous,) = planted.matching, planted.previous_token
    margin = contrast_margin(planted.model, toy_batch(48, 3, 2, renderer=planted.model.renderer), at="label", n_null=1999, progress=False)
    key, value, match, attention = (margin[part] for part in ("k", "v", "qk", "attention"))
    assert key.value[matching] == pytest.approx(1.0, abs=1e-6)  # wrong items' keys are orthogonal, the right one's the same
    assert key.p_corrected[matching] < 0.05
    assert abs(key.value[previous]) < 1e-6  # it knows places only
    assert key.value[1].argmax() == matching[1]
    assert abs(value.value[matching]) < 1e-6
    assert match.value[matching] == pytest.approx(40.0, abs=1e-3)  # the planted score of a match
    assert attention.value[matching] == pytest.approx(0.5, abs=1e-3)  # two right labels share all
    others = np.ones(match.value.shape, bool)
    others[matching] = False
    assert match.p_corrected[matching] < 0.05
    assert match.p_corrected[others].min() > 0.05


def test_tokens_before_the_labels_hold_the_items_in_values_of_the_planted_heads() -> None:
    planted = planted_induction(n_heads=4, seed=3)
    margin = contrast_margin(planted.model, toy_batch(32, 3, 2, renderer=planted.model.renderer), **QUIET)
    assert margin.at == "before"
    for head in (*planted.matching, *planted.previous_token):
        assert margin["v"].value[head] == pytest.approx(1.0, abs=1e-6)
    assert abs(margin["k"].value[planted.previous_token[0]]) < 1e-6


def test_an_untrained_network_is_at_its_null_and_tells_nothing() -> None:
    model = untrained(n_heads=4)
    batch = toy_batch(96, 3, 2, torch.Generator().manual_seed(1), renderer=model.renderer)
    margin = contrast_margin(model, batch, at="label", n_null=1999, progress=False)
    for part in margin.parts.values():
        assert part.p_corrected.min() > 0.05
        if part.part != "v":  # values at labels hold the word, and a network may like a word: it is right where that word is the answer
            assert part.auroc_p_corrected.min() > 0.05
            assert part.held_out.low < 0.5
        assert np.abs(part.value - part.null).max() < 4 * np.abs(part.null_high - part.null).max()


def noisy(eps: float = 1.3, n: int = 160) -> tuple[Any, Any]:
    """Items so noisy that the planted circuit errs."""
    task = UnimodalTask(K=64, L=8, N=8, D=32, B=2, eps=eps, no_repeats=True)
    return planted_vectors(task, n_heads=3), to_batch(draw(task, n, torch.Generator().manual_seed(0)), candidates="context")


def test_on_noised_vectors_the_planted_match_tells_right_answers_and_idle_heads_do_not() -> None:
    planted, batch = noisy()
    margin = contrast_margin(planted.model, batch, batch_size=64, **QUIET)
    (matching,) = planted.matching
    match = margin["qk"]
    assert 0.05 < 1 - margin.accuracy < 0.5
    assert match.auroc[matching] > 0.85
    assert match.auroc_low[matching] > 0.7
    assert match.auroc_p_corrected[matching] < 0.01
    assert match.held_out_heads == (matching, matching)
    assert match.held_out.low > 0.7
    assert margin["attention"].auroc[matching] > 0.95
    assert match.rho[matching] > 0.3
    idle = [head for head in planted.idle if head[0] == 1]
    assert all(match.auroc_p_corrected[head] > 0.05 for head in idle)
    assert margin.output_auroc.value == 1.0  # by construction
    assert 0.5 < margin.confidence_auroc.value < 1.0
    assert match.held_out_gain is not None
    assert match.held_out_gain.value == pytest.approx(match.held_out.value - margin["attention"].held_out.value, abs=0.02)
    assert margin["attention"].held_out_gain is None


def test_where_every_answer_is_right_auroc_is_nan_with_the_reason() -> None:
    planted = planted_induction()
    margin = contrast_margin(planted.model, toy_batch(12, 3, 1, renderer=planted.model.renderer), **QUIET)
    assert margin.accuracy == 1
    assert all(np.isnan(part.auroc).all() and np.isnan(part.held_out.value) for part in margin.parts.values())
    assert "all 12 answers are right" in margin.auroc_reason
    assert any("all 12 answers are right" in note for note in margin.notes)
    assert np.isnan(margin.output_auroc.value)
    assert not np.isnan(margin["k"].value).any()


def test_noised_pictures_make_the_bundled_model_err_and_the_margin_tells() -> None:
    model = mechicl.load("demo")
    clean = concepts.draw(48, classes=4, shots=1, size=28, seed=3)
    data = [disturb_images(episode, kind="noise", strength=0.8, seed=k) if k % 2 else episode for k, episode in enumerate(clean)]
    margin = contrast_margin(model, data, batch_size=16, n_null=1999, progress=False)
    assert 0.5 < margin.accuracy < 0.95
    assert margin["v"].held_out.low > 0.5
    assert margin["v"].p_corrected.min() < 0.05
    assert margin.to_frame().shape[0] == sum(part.value.size for part in margin.parts.values())


def by_hand(model: Any, batch: Any, layer: int) -> dict[str, np.ndarray]:
    """The margins of one layer from run_with_cache, prompt by prompt, span by span."""
    names = [f"blocks.{layer}.attn.hook_{name}" for name in ("q", "k", "v", "rot_q", "rot_k", "pattern")]
    names = [name for name in names if name in model.hook_dict]
    _, cache = model.run_with_cache(batch, names_filter=names)
    kept = {name.rsplit("_", 1)[1] if "rot" not in name else name.split("hook_")[1]: cache[name] for name in names}
    out: dict[str, list[Any]] = {}
    for i, row in enumerate(batch.spans):
        answer, last = batch.candidates[i][batch.answers[i]], int(batch.query_pos[i])
        labels = [span for span in row if span.role == "label" and span.shot >= 0]

        def gap(near: Any, labels: Any = labels, answer: str = answer) -> Any:
            sides = {side: torch.stack([near(s) for s in labels if (s.label == answer) == side]).mean(0) for side in (True, False)}
            return sides[True] - sides[False]

        for part in ("k", "v"):
            x = kept[part][i].float()
            out.setdefault(part, []).append(
                gap(lambda s, x=x, last=last: torch.nn.functional.cosine_similarity(x[last], x[s.start - 1], dim=-1))
            )
        for part, q, k in (("qk", "q", "k"), ("rot_qk", "rot_q", "rot_k")):
            if q in kept:
                query, key = kept[q][i, last].float(), kept[k][i].float()
                group = len(query) // key.shape[1]
                score = torch.stack([key[:, h // group] @ query[h] for h in range(len(query))], 1) * query.shape[-1] ** -0.5
                out.setdefault(part, []).append(gap(lambda s, score=score: score[s.start : s.stop].mean(0)))
        pattern = kept["pattern"][i, :, last].float()
        out.setdefault("attention", []).append(gap(lambda s, pattern=pattern: pattern[:, s.start : s.stop].sum(-1)))
    return {part: torch.stack(values).numpy() for part, values in out.items()}


@pytest.mark.parametrize("which", ["toy", "qwen2_5_vl", "llava", "paligemma", "qwen3_vl"])
def test_margins_are_those_of_the_cache_by_hand(which: str) -> None:
    """Left padding, grouped heads, norms of keys, pictures in the prompt."""
    if which == "toy":
        model: Any = untrained(n_heads=2, seed=4)
        data: Any = toy_batch(6, 2, 2, label_words=2, renderer=model.renderer)
    else:
        model, data = hooked(which), episodes(3)
    batch = data if which == "toy" else model.render(data)
    parts: Any = ("k", "v", "qk") if which == "toy" else ("k", "v", "qk", "rot_qk")
    margin = contrast_margin(model, data, parts=parts, **QUIET)
    layer = model.cfg.n_layers - 1
    for part, values in by_hand(model, batch, layer).items():
        size = np.abs(values).max() + 1e-3
        assert margin[part].per_episode[:, layer] == pytest.approx(values, abs=1e-4 * float(size))  # sums in another order


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_margins(family: str) -> None:
    model = hooked(family)
    data = [episodes(3)[k] for k in ((0, 2) if family == "mllama" else (0, 1, 2))]  # mllama: as many pictures in every prompt
    for at in ("before", "label"):
        margin = contrast_margin(model, data, parts=("k", "v", "qk", "rot_qk"), at=at, **QUIET)
        kv, heads = (model.cfg.n_layers, model.cfg.n_key_value_heads), (model.cfg.n_layers, model.cfg.n_heads)
        assert {part: x.value.shape for part, x in margin.parts.items()} == {
            "k": kv, "v": kv, "qk": heads, "rot_qk": heads, "attention": heads,
        }  # fmt: skip
        cross = [part.cross for part in model.anatomy.layers]
        for part in margin.parts.values():
            assert np.isnan(part.value).all(1).tolist() == cross
        assert any("Not readable" in note for note in margin.notes) == any(cross)


def test_batches_of_any_size_give_the_same_margins_and_the_same_seed_the_same_result() -> None:
    model, data = hooked("qwen2_5_vl"), episodes(4)
    for at in ("before", "label"):
        one, other = (contrast_margin(model, data, at=at, batch_size=size, **QUIET) for size in (1, 6))
        for part in one.parts:
            assert one[part].per_episode == pytest.approx(other[part].per_episode, abs=1e-5)  # sums in another order
    again = contrast_margin(model, data, at="label", batch_size=6, **QUIET)
    assert other.to_frame().equals(again.to_frame())


def test_labels_behind_the_query_favour_none_whatever_the_answer_is() -> None:
    """The query's vector does not change when the same prompt has another answer."""
    planted = planted_induction(seed=1)
    batch = toy_batch(8, 2, 1, renderer=planted.model.renderer)
    flipped = type(batch)(
        **{**{f: getattr(batch, f) for f in batch.__dataclass_fields__}, "answers": tuple(1 - a for a in batch.answers), "renderer": None}
    )
    one, other = (contrast_margin(planted.model, x, at="label", **QUIET) for x in (batch, flipped))
    for part in one.parts:
        assert one[part].per_episode == pytest.approx(-other[part].per_episode, abs=1e-6)


def test_euclidean_distance_and_a_vector_of_no_length() -> None:
    x, y = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    assert distances(x, y, "euclidean").tolist() == [5.0, 0.0]
    assert distances(x, y, "cosine").tolist() == [1.0, 1.0]
    planted, batch = noisy(n=40)
    margin = contrast_margin(planted.model, batch, parts=("v",), distance="euclidean", batch_size=40, **QUIET)
    assert margin["v"].unit == "norm of the vectors"
    assert margin["v"].value[planted.matching[0]] > 0


def test_two_modalities_of_vectors_and_other_keys() -> None:
    task = MultimodalTask(K1=32, K2=16, L=8, N=8, B=2, D1=32, D2=16, no_repeats=True)
    planted = planted_vectors(task, n_heads=3)
    batch = to_batch(draw(task, 24, torch.Generator().manual_seed(1)), candidates="context")
    margin = contrast_margin(planted.model, batch, batch_size=24, **QUIET)
    assert margin["qk"].value.argmax() == np.ravel_multi_index(planted.matching[0], margin["qk"].value.shape)
    items = contrast_margin(planted.model, batch, keys="item", at="item", batch_size=24, **QUIET)
    assert items["qk"].value[planted.matching[0]] < margin["qk"].value[planted.matching[0]]


def test_margins_through_training_follow_the_same_heads() -> None:
    planted, blank = planted_induction(n_heads=2, seed=2), untrained(n_heads=2)
    batch = toy_batch(24, 3, 1, renderer=planted.model.renderer)
    values, tells = margin_series(
        [(100, planted.model), (0, blank)], batch, {"qk": list(planted.matching), "attention": [(0, 0)]}, n_null=50
    )
    name = f"qk {planted.matching[0][0]}.{planted.matching[0][1]}"
    assert values.steps.tolist() == [0, 100]
    assert values.values[name][1] == pytest.approx(40, abs=1e-3)
    assert abs(values.values[name][0]) < 2
    assert (values.low[name] <= values.values[name]).all()
    assert set(tells.values) == {name, "attention 0.0", "accuracy"}
    assert tells.values["accuracy"][1] == 1
    assert np.isnan(tells.values[name][1])
    assert len(values.to_frame()) == 4


def test_a_toy_run_is_followed_over_its_checkpoints(tmp_path: Path) -> None:
    settings_ = {"K": 32, "L": 4, "D": 8, "N": 4, "B": 2, "batch": 8, "steps": 20, "points": 3, "probe_n": 16, "n_novel": 16}
    train_toy(recipe("cpu", **settings_), tmp_path / "run", progress=False, threads=1)
    task = load_toy(tmp_path / "run").renderer.task
    batch = to_batch(draw(task, 24, torch.Generator().manual_seed(0)))
    steps = [0, 20]
    values, tells = margin_series(
        ((s, load_toy(tmp_path / "run", s)) for s in steps), batch, {"k": [(1, 0)], "qk": [(1, 0)]}, n_null=20, batch_size=24
    )
    assert values.steps.tolist() == tells.steps.tolist() == steps
    assert values.provenance.model
    assert set(values.values) == {"k 1.0", "qk 1.0"}


@pytest.mark.slow
def test_the_page_on_margins_runs() -> None:
    text = (Path(__file__).parent.parent / "docs" / "margin.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    space: dict[str, Any] = {}
    exec(compile(block, "docs/margin.md", "exec"), space)
    assert space["effect"].change[0] < -3
    assert space["margin"]["attention"].held_out.low > 0.8


# AUROC


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 40), st.booleans())
def test_areas_are_those_of_sklearn_and_of_every_pair(seed: int, n: int, coarse: bool) -> None:
    g = np.random.default_rng(seed)
    scores = g.integers(0, 4, (n, 3)).astype(float) if coarse else g.standard_normal((n, 3))
    truth = g.random(n) < 0.5
    truth[:2] = [True, False]
    found = areas(scores, truth)
    for cell in range(3):
        assert found.value[cell] == pytest.approx(roc_auc_score(truth, scores[:, cell]), abs=1e-9)
    pairs = scores[truth][:, None] - scores[~truth][None]
    assert found.value == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean((0, 1)), abs=1e-9)
    assert ((found.low <= found.value + 1e-9) & (found.value <= found.high + 1e-9)).all()
    assert areas(-scores, truth).value == pytest.approx(1 - found.value)


def test_delong_and_the_bootstrap_over_episodes_agree() -> None:
    g = np.random.default_rng(0)
    truth = g.random(200) < 0.6
    scores = g.standard_normal(200) + 0.8 * truth
    other = 0.5 * scores + g.standard_normal(200)
    found, change = areas(scores[:, None], truth), area_change(other, scores, truth)
    draws, changes = [], []
    for _ in range(600):
        rows = g.integers(0, 200, 200)
        draws.append(roc_auc_score(truth[rows], scores[rows]))
        changes.append(draws[-1] - roc_auc_score(truth[rows], other[rows]))
    low, high = np.quantile(draws, (0.025, 0.975))
    assert (found.low[0], found.high[0]) == pytest.approx((low, high), abs=0.025)  # Monte Carlo error of 600 draws
    low, high = np.quantile(changes, (0.025, 0.975))
    assert (change.low, change.high) == pytest.approx((low, high), abs=0.025)
    assert change.value == pytest.approx(roc_auc_score(truth, scores) - roc_auc_score(truth, other))


def test_delongs_interval_covers_the_true_area() -> None:
    g, hits = np.random.default_rng(1), 0
    true = 0.7602  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    truth = np.arange(60) < 25
    found = areas(g.standard_normal((60, 2000)) + truth[:, None], truth)
    hits = ((found.low <= true) & (true <= found.high)).mean()
    assert 0.925 < hits < 0.975
    null = areas(g.standard_normal((60, 2000)), truth)
    assert (null.p < 0.05).mean() == pytest.approx(0.05, abs=0.015)


def test_a_perfect_area_has_a_lower_bound_that_knows_how_few_episodes_there_were() -> None:
    few, many = (areas(np.arange(2.0 * n)[:, None], np.arange(2 * n) >= n) for n in (4, 60))
    assert few.value[0] == many.value[0] == 1
    assert few.low[0] == pytest.approx(0.025 ** (1 / 4))
    assert many.low[0] > 0.9
    worst = areas(-np.arange(8.0)[:, None], np.arange(8) >= 4)
    assert (worst.value[0], worst.low[0], worst.high[0]) == (0, 0, pytest.approx(1 - 0.025**0.25))


def test_the_best_of_many_noise_heads_is_near_chance_when_it_is_measured_elsewhere() -> None:
    g = np.random.default_rng(3)
    truth = g.random(100) < 0.5
    noise = g.standard_normal((100, 12, 16))
    honest, cells, chosen = best_held_out(noise, truth)
    assert areas(noise, truth).value.max() > 0.6  # what choosing alone makes of noise
    assert honest.low < 0.5 < honest.high
    assert len(cells) == 2
    assert chosen.shape == (100,)
    noise[:, 3, 5] += 3 * truth
    assert best_held_out(noise, truth)[1] == ((3, 5), (3, 5))
    assert best_held_out(noise, truth)[0].low > 0.8


def test_rank_correlation_is_scipys_and_constants_have_none() -> None:
    from scipy import stats

    g = np.random.default_rng(0)
    y = g.standard_normal(50)
    x = np.stack([y**3, -y, g.standard_normal(50), np.ones(50)], 1)
    rho, low, high = spearman(x, y)
    assert rho[:3] == pytest.approx([stats.spearmanr(x[:, k], y)[0] for k in range(3)])
    assert np.isnan(rho[3])
    assert ((low[:3] <= rho[:3]) & (rho[:3] <= high[:3])).all()
    assert low[2] < 0 < high[2]


def test_what_cannot_be_told_says_why() -> None:
    assert "all 3 answers are wrong" in why_no_auroc([False] * 3)
    assert why_no_auroc([True, False]) == ""
    assert "no episode" in why_no_auroc([])
    assert np.isnan(areas(np.ones((3, 2)), [True] * 3).value).all()
    assert np.isnan(area_change([1, 2], [2, 1], [True, True]).value)
    half_blank = areas(np.array([[1.0, np.nan], [0.0, 1.0]]), [True, False])
    assert half_blank.value[0] == 1
    assert np.isnan(half_blank.value[1])


# refusals


def test_options_that_do_not_exist_are_refused(untyped: None) -> None:
    model = untrained(n_heads=2)
    batch = toy_batch(4, 2, 1, renderer=model.renderer)
    for wrong in (
        {"parts": ("z",)},
        {"parts": ()},
        {"parts": ("k", "k")},
        {"at": "nowhere"},
        {"keys": "x"},
        {"distance": "far"},
        {"n_null": 0},
        {"score": "x"},
    ):
        with pytest.raises(OptionError):
            contrast_margin(model, batch, progress=False, **wrong)  # pyright: ignore[reportArgumentType]
    margin = contrast_margin(model, batch, **QUIET)
    with pytest.raises(OptionError, match="part must be one of"):
        margin["rot_qk"]
    with pytest.raises(OptionError, match="by must be one of"):
        margin["k"].top(by="luck")
    assert margin["k"].top(2)[0] == tuple(np.unravel_index(margin["k"].value.argmax(), (2, 2)))


def test_what_a_model_or_a_prompt_cannot_give_is_refused() -> None:
    planted, batch = noisy(n=6)
    with pytest.raises(UnsupportedModelError, match="vectors"):
        contrast_margin(planted.model, batch, at="label", **QUIET)
    with pytest.raises(UnsupportedModelError, match="rot_qk"):
        contrast_margin(planted.model, batch, parts=("rot_qk",), **QUIET)
    with pytest.raises(EmptySpanError, match="close"):
        contrast_margin(planted.model, batch, keys="close", **QUIET)
    with pytest.raises(EpisodeError):
        contrast_margin(planted.model, [], **QUIET)
    with pytest.raises(OptionError, match="truth"):
        areas(np.ones((3, 2)), [True, False])
    model = untrained(n_heads=2)
    batch = toy_batch(4, 2, 1, renderer=model.renderer)
    with pytest.raises(OptionError, match="heads must name"):
        margin_series([(0, model)], batch, {})
    with pytest.raises(OptionError, match="models must give"):
        margin_series([], batch, {"k": [(0, 0)]})
    with pytest.raises(HeadIndexError):
        margin_series([(0, model)], batch, {"k": [(0, 9)]}, n_null=5)


def test_nan_in_the_weights_is_an_error_and_leaves_no_hook_behind() -> None:
    model = untrained(n_heads=2)
    batch = toy_batch(4, 2, 1, renderer=model.renderer)
    model.blocks[1].attn.W_K.data[0, 0, 0] = torch.nan
    with pytest.raises(NotFiniteError), unchecked():
        contrast_margin(model, batch, **QUIET)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_episodes_without_a_wrong_exemplar_are_left_out_by_name() -> None:
    model = untrained(n_heads=2)
    batch = toy_batch(5, 2, 1, renderer=model.renderer)
    from dataclasses import replace

    one = batch.episodes[0]
    lonely = replace(one, shots=tuple(replace(s, label=one.answer) for s in one.shots), candidates=one.candidates, id="lonely")
    with unchecked():
        data = model.render([lonely, *batch.episodes[1:]])
    margin = contrast_margin(model, data, **QUIET)
    assert margin.n == 4
    assert [s.episode for s in margin.skipped] == ["lonely"]
    assert all(span.shot >= QUERY or span.shot < 0 for span in data.spans[0])
