"""The published head scores and knock-outs, against plain transformers: eager attention, numpy on whole patterns, hooks on o_proj; and against planted heads."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import LABELS, picture

from mechicl.analysis.heads.published import published_scores, spellings
from mechicl.errors import OptionError
from mechicl.models.planted import planted_induction, untrained
from mechicl.models.toys.prompts import toy_episodes
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.episode import Episode, Shot
from mechicl.results import HeadScores
from mechicl.studies.huang2026 import fitted
from mechicl.studies.huang2026_heads import IH, PH, rank_heads
from mechicl.studies.huang2026_knockouts import knock_out
from mechicl.studies.huang2026_sets import key, plan_sets
from mechicl.studies.published import match_rankings, numbers_beside, overlap, published
from mechicl.training.organisms import build

FAMILIES = ("qwen2_5_vl", "gemma3", "llava")
"""Grouped heads and picture-dependent positions; sliding windows and pictures read in both directions; the plainest one."""


def episodes(n: int = 4) -> list[Episode]:
    """open_mi in small: two classes, two shots each, the published words; the orders and lengths vary, and one names its answer in the instruction."""
    found = []
    for k in range(n):
        order = [(0, 1, 0, 1), (1, 0, 0, 1), (0, 0, 1, 1), (0, 1)][k % 4]
        shots = tuple(
            Shot(LABELS[x], images=(picture(56, 56, seed=1000 * x + 10 * k + j),), item=f"class {x}") for j, x in enumerate(order)
        )
        query = Shot(LABELS[k % 2], images=(picture(56, 84, seed=1000 * (k % 2) + 10 * k + 9),), item=f"class {k % 2}")
        said = f" A {LABELS[0]} is a word." if k == 2 else ""
        found.append(
            Episode(shots, query, LABELS[:2], f"Answer the question with a single word or phase.{said}", "This is a ", id=f"open {k}")
        )
    return found


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[HookedVLM, Any]:
    """A hooked model, and its Hugging Face model again, apart and with eager attention."""
    hf, processor = build(request.param, preset="tiny", seed=3)
    plain, _ = build(request.param, preset="tiny", seed=3)
    plain.set_attn_implementation("eager")
    return HookedVLM(hf, processor), plain.eval()


def by_hand(model: HookedVLM, plain: Any, episode: Episode) -> tuple[np.ndarray, np.ndarray]:
    """PH and IH [layer, head] of one prompt alone, from whole patterns, in the words of the paper."""
    batch = model.render([episode])
    with torch.no_grad():
        patterns = plain(**batch.inputs, output_attentions=True, use_cache=False).attentions
    ids = batch.inputs["input_ids"][0].tolist()
    assert model.renderer is not None
    tokenizer = model.renderer.tokenizer
    where: set[int] = set()
    for text in (episode.answer, " " + episode.answer):
        word = tokenizer(text, add_special_tokens=False)["input_ids"]
        for at in range(len(ids)):
            if ids[at : at + len(word)] == word:
                where |= set(range(at, at + len(word)))
    others = [p for p in range(len(ids)) if p not in where]
    ph, ih = [], []
    for layer in patterns:
        pattern = layer[0].double().numpy()
        ph.append([float(np.mean(np.diagonal(head, -1))) for head in pattern])
        ih.append([float(head[-1][sorted(where)].mean() - head[-1][others].mean()) for head in pattern])
    return np.array(ph), np.array(ih)


def test_published_scores_are_those_of_whole_eager_patterns(pair: tuple[HookedVLM, Any]) -> None:
    model, plain = pair
    drawn, note = fitted(model, episodes())
    assert bool(note) == (model.cfg.model_type == "gemma3")  # its template takes the published question's space away
    found = published_scores(model, drawn, batch_size=3)  # prompts of several lengths share a pass: padding must not count
    for k, episode in enumerate(drawn):
        ph, ih = by_hand(model, plain, episode)
        np.testing.assert_allclose(found.ph[k], ph, atol=2e-6)  # float32 softmax, sums in another order
        np.testing.assert_allclose(found.ih[k], ih, atol=2e-6)
    assert found.elsewhere == 1  # the episode whose instruction says the answer
    assert not found.not_found


def test_rows_by_reader_put_together_are_the_whole_score(pair: tuple[HookedVLM, Any]) -> None:
    model, _ = pair
    drawn, _ = fitted(model, episodes(2))
    found = published_scores(model, drawn)
    batch = model.render(drawn)
    roles = {
        "picture rows": "image",
        "label rows": "label",
        "question rows": "question",
        "instruction rows": "instruction",
        "template rows": "glue",
    }
    total = np.zeros_like(found.ph)
    counts = np.zeros(len(drawn))
    for reader, values in found.ph_by.items():
        for i, row in enumerate(batch.spans):
            real = [p for s in row if s.role == roles[reader] for p in range(s.start, s.stop)]
            first = min(p for s in row if s.role != "pad" for p in range(s.start, s.stop))
            n = sum(p > first for p in real)
            total[i] += np.nan_to_num(values[i]) * n
            counts[i] += n
    np.testing.assert_allclose(total / counts[:, None, None], found.ph, atol=1e-9)


def test_published_and_our_rankings_find_the_planted_heads_and_nothing_where_nothing_is() -> None:
    planted = planted_induction(n_heads=4, n_previous=2, n_matching=2, seed=5)
    drawn = toy_episodes(24, classes=3, shots=2)
    found = rank_heads(planted.model, drawn, progress=False)
    assert set(found.top(PH, 2)) == set(planted.previous_token) == set(found.top("previous_token", 2))
    assert set(found.top(IH, 2)) == set(planted.matching) == set(found.top("induction", 2))
    best = found.top(PH, 1)[0]
    assert found[PH].value[best] > 0.99
    assert found[IH].low[found.top(IH, 2)[1]] > 0.2
    nothing = rank_heads(untrained(n_heads=4), drawn, progress=False)
    assert nothing[IH].value.max() < 0.1
    assert not (nothing["induction"].p_corrected < 0.05).any()


def test_knock_outs_are_those_of_a_hook_on_o_proj() -> None:
    hf, processor = build("qwen2_5_vl", preset="tiny", seed=3)
    plain, _ = build("qwen2_5_vl", preset="tiny", seed=3)
    model, drawn = HookedVLM(hf, processor), episodes(4)
    scores = rank_heads(model, drawn, n_null=1, progress=False)
    size = scores[PH].value.size
    rankings: dict[str, Any] = {"PH": ("published", "", scores.top(PH, size)), "IH": ("published", "", scores.top(IH, size))}
    plan = plan_sets(model, rankings, top=2, n_random=2, dose=("IH",), dose_draws=1, seed=0)
    table, doses = knock_out(model, drawn, plan, batch_size=4, progress=False)
    width = model.cfg.d_head
    layers: Any = plain.get_decoder().layers
    for row in table.rows:
        if row.kind == "control":
            continue
        handles = []
        for layer, head in row.heads:

            def cut(module: Any, args: Any, head: int = head) -> Any:
                x = args[0].clone()
                x[..., head * width : (head + 1) * width] = 0.0
                return (x, *args[1:])

            handles.append(layers[layer].self_attn.o_proj.register_forward_pre_hook(cut))
        right, named = [], []
        for episode in drawn:
            batch = model.render([episode])
            with torch.no_grad():
                said = int(plain(**batch.inputs, use_cache=False).logits[0, -1].argmax())
            assert model.renderer is not None
            first = {label: {t[0] for t in spellings(model.renderer.tokenizer, label)} for label in {s.label for s in episode.shots}}
            right.append(said == batch.candidate_ids[0][batch.answers[0]][0])
            named.append(said in set().union(*first.values()))
        for handle in handles:
            handle.remove()
        assert row.open.value == pytest.approx(np.mean(right)), row.name
        assert row.cla.value == pytest.approx(np.mean(named)), row.name
    assert doses["IH, first token"].accuracy[0].value == table["intact"].open.value
    assert [c.ks.tolist() for c in doses.values()] == [[0, 1, 2, 3, 5, 8][: len(next(iter(doses.values())).ks)]] * 2


def test_sets_run_once_whatever_they_are_called_for() -> None:
    planted = planted_induction(n_heads=4, n_previous=2, n_matching=2, seed=5)
    heads = [(0, h) for h in range(4)] + [(1, h) for h in range(4)]
    rankings: dict[str, Any] = {"PH": ("published", "", heads), "IH": ("published", "", heads[::-1]), "mine": ("ours", "", heads)}
    plan = plan_sets(planted.model, rankings, top=2, n_random=3, dose=("PH",), dose_draws=0, seed=0)
    assert len(set(plan.sets)) == len(plan.sets)
    assert plan.sets[0] == ()
    names = [one.name for one in plan.chosen]
    assert names == ["top 2 PH", "top 2 IH", "top 2 mine", "top PH and IH"]
    for one in plan.chosen:
        assert all(not set(some) & set(one.heads) for some in one.draws)
        assert key(one.heads) in plan.sets


def test_switching_off_planted_heads_costs_the_answers_and_random_heads_do_not() -> None:
    planted = planted_induction(n_heads=8, n_previous=1, n_matching=1, seed=2)
    drawn = toy_episodes(32, classes=4, shots=1)
    scores = rank_heads(planted.model, drawn[:8], n_null=1, progress=False)
    size = scores[PH].value.size
    rankings: dict[str, Any] = {"PH": ("published", "", scores.top(PH, size)), "IH": ("published", "", scores.top(IH, size))}
    plan = plan_sets(planted.model, rankings, top=1, n_random=6, dose=(), dose_draws=0, seed=0)
    table, _ = knock_out(planted.model, drawn[8:], plan, progress=False)
    assert table["intact"].whole.value == 1.0
    for name in ("top 1 PH", "top 1 IH", "top PH and IH"):
        row = table[name]
        assert row.whole.value < 0.6
        assert row.whole_change is not None
        assert row.whole_change.high < 0
        assert row.random_whole is not None
        assert row.random_whole.value == 1.0
        assert row.p_whole == pytest.approx(1 / 7)  # none of six draws as low: the least that six draws can say
    assert table["zero-shot"].whole.value < 0.6


# -- the published numbers


def scores_like(value: np.ndarray) -> HeadScores:
    """Head scores whose PH and IH are `value`."""
    from dataclasses import replace

    planted = planted_induction(n_heads=4, seed=5)
    found = rank_heads(planted.model, toy_episodes(8, classes=3, shots=2), n_null=1, progress=False)
    same = {name: replace(found[name], value=value, low=value, high=value, per_episode=value[None]) for name in (PH, IH)}
    return replace(found, scores=same)


def test_the_published_data_are_whole_and_say_where_they_are_from() -> None:
    data = published("huang2026")
    assert {r["kind"] for r in data["rankings"]} == {"PH", "IH"}
    for ranking in data["rankings"]:
        values = [s for _, _, s in ranking["heads"]]
        assert len({(a, b) for a, b, _ in ranking["heads"]}) == 20
        assert values == sorted(values, reverse=True)
        assert all(0 <= a < ranking["n_layers"] and 0 <= b < ranking["n_heads"] for a, b, _ in ranking["heads"])
        assert ranking["source"]["section"]
    assert all(n["source"]["mark"] in data["marks"] for n in data["numbers"])
    top = [tuple(h[:2]) for h in data["rankings"][0]["heads"][:5]]
    assert top == [(19, 11), (19, 1), (31, 9), (1, 1), (2, 13)]  # as printed in the paper
    with pytest.raises(OptionError, match="study must be one of huang2026"):
        published("huang2025")


def test_the_published_model_matches_itself_and_noise_matches_as_chance_says() -> None:
    data = published("huang2026")["rankings"][0]
    value = np.random.default_rng(0).random((36, 16)) * 0.03
    for a, b, s in data["heads"]:
        value[a, b] = s
    name = "Qwen/Qwen2.5-VL-3B-Instruct"
    same = match_rankings("huang2026", scores_like(value), name, {"PH": PH, "IH": IH})
    assert [m.kind for m in same] == ["PH", "IH"]
    assert same[0].comparable
    assert same[0].correlation == pytest.approx(1.0)
    assert [(o.k, o.shared) for o in same[0].overlaps] == [(5, 5), (10, 10), (20, 20)]
    assert same[0].overlaps[0].p < 1e-10
    assert same[1].overlaps[2].shared <= 4  # the other ranking: 20 of 576 twice share 0.7 on average
    noise = match_rankings("huang2026", scores_like(np.random.default_rng(1).random((36, 16))), name, {"PH": PH, "IH": IH})
    assert abs(noise[0].correlation) < 0.6
    assert noise[0].overlaps[0].p > 0.01
    assert overlap([(0, 0), (0, 1)], [(0, 1), (0, 2)], 2, 10).p == pytest.approx(1 - 28 / 45)  # 1 - C(8,2)/C(10,2)


@pytest.mark.parametrize(("name", "shape", "reason"), [("demo", (36, 16), "published for Qwen/Qwen2.5-VL-3B-Instruct"), ("a/Qwen2.5-VL-3B-Instruct", (4, 4), "36 x 16 heads")])  # fmt: skip
def test_another_model_is_not_compared_and_is_told_why(name: str, shape: tuple[int, int], reason: str) -> None:
    found = match_rankings("huang2026", scores_like(np.random.default_rng(0).random(shape)), name, {"PH": PH, "IH": IH})
    assert len(found) == 2
    assert not found[0].comparable
    assert reason in found[0].reason
    assert np.isnan(found[0].here).all()
    assert not found[0].overlaps
    assert all(not n.comparable for n in numbers_beside("huang2026", {}, name))
