"""Head scores: the planted truth is found, nothing is found where nothing is, and every number agrees with a computation from whole patterns."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mechicl.analysis.heads.scoring as heads_module
from mechicl.analysis.heads.named import SCORES
from mechicl.analysis.heads.nulls import shuffled_null, shuffles
from mechicl.analysis.heads.scoring import DEFAULT_SCORES, attention_by_role, score_heads
from mechicl.errors import EpisodeError, NotFiniteError, OptionError, UnsupportedModelError
from mechicl.models.planted import Planted, planted_induction, untrained
from mechicl.models.toys.model import ToyTransformer
from mechicl.models.toys.prompts import ToyRenderer, toy_batch, toy_episodes
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode, Shot
from mechicl.prompts.spans import NO_SHOT, QUERY, Span
from mechicl.results import HeadScores

ALL = tuple(SCORES)


@pytest.fixture(scope="module")
def planted() -> Planted:
    return planted_induction(n_heads=4, n_matching=2, seed=2)


@pytest.fixture(scope="module")
def found(planted: Planted) -> HeadScores:
    return score_heads(planted.model, toy_episodes(32, classes=4, shots=2), scores=ALL, batch_size=16, progress=False)


def test_planted_heads_are_found_with_scores_near_one(planted: Planted, found: HeadScores) -> None:
    for name, circuit in (("previous_token", planted.previous_token), ("ila", planted.previous_token), ("induction", planted.matching)):
        score = found[name]
        assert set(found.top(name, len(circuit))) == set(circuit)
        for head in circuit:
            assert score.value[head] > 0.99
            assert score.low[head] > 0.99
            assert score.p_corrected[head] < 0.05
            assert score.value[head] > score.null_high[head]


def test_idle_heads_of_the_planted_network_are_not_found(planted: Planted, found: HeadScores) -> None:
    for name in ("previous_token", "ila", "induction", "tila", "tiia", "duplicate"):
        for head in planted.idle:
            assert found[name].p_corrected[head] > 0.05, (name, head)
            assert found[name].value[head] < 0.3, (name, head)


def test_what_each_planted_head_does_not_do_scores_low(planted: Planted, found: HeadScores) -> None:
    # it looks at the last label, which is right as often as any other
    assert found["induction"].p_corrected[planted.previous_token[0]] > 0.05
    assert found["tiia"].value[planted.matching[0]] < 0.01  # it looks at labels, not at items
    assert found["tla"].value[planted.matching[0]] > 0.99
    assert found["tila"].value[planted.matching[0]] == pytest.approx(0.5, abs=0.01)  # two right exemplars share it
    assert found["induction_per_exemplar"].value[planted.matching[0]] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("positions", "sharpness"), [("learned", 0.3), ("learned", 2.0), ("rope", 0.7), ("none", 1.2)])
def test_an_untrained_network_scores_at_its_null(positions: Any, sharpness: float) -> None:
    """False positives over seeds, heads and scores: at most 5 %, family-wise. (These networks do tell x from not-x by some per cent: `lift` is for that.)"""
    networks, significant = 12, dict.fromkeys(DEFAULT_SCORES, 0)
    for seed in range(networks):
        model = untrained(n_heads=3, positions=positions, seed=seed)
        model._initialise(seed, sharpness)
        batch = toy_batch(32, 4, 2, torch.Generator().manual_seed(seed))
        result = score_heads(model, batch, n_null=299, seed=seed, batch_size=32, progress=False)
        for name in DEFAULT_SCORES:
            significant[name] += bool(np.nanmin(result[name].p_corrected) < 0.05)
    total = sum(significant.values())
    assert total <= 0.05 * networks * len(DEFAULT_SCORES), significant
    assert max(significant.values()) <= 2, significant  # of 12 at 5 %: three or more in 2 % of runs


def test_shuffled_labels_give_p_values_that_are_right() -> None:
    """Attention that knows nothing of the labels: p < 0.05 in 5 % of heads, and near the lift's boundary too."""
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(24, 2000, 6, generator=generator).pow(4)
    right = torch.rand(24, 6, generator=generator).argsort(-1) < 2
    known = torch.ones_like(right)

    def weigh(drawn: Tensor) -> Tensor:
        return drawn.float() / 2 - (~drawn).float() / 4

    def draw(n: int, g: torch.Generator) -> Tensor:
        return weigh(shuffles(right.long(), known, n, g).bool())

    _, _, p = shuffled_null(mass, right, weigh(right), draw, n_draws=199, seed=1)
    assert (p < 0.05).mean() == pytest.approx(0.05, abs=0.02)  # four standard errors of 2,000 heads
    boundary = torch.where(right[:, None], mass * 1.5, mass)
    _, _, p = shuffled_null(boundary, right, weigh(right), draw, n_draws=199, seed=1, lift=1.5)
    assert (p < 0.05).mean() == pytest.approx(0.05, abs=0.02)
    _, _, p = shuffled_null(boundary, right, weigh(right), draw, n_draws=199, seed=1)
    assert (p < 0.05).mean() > 0.3  # the plain test finds what is there


def test_a_head_that_reads_all_labels_alike_is_no_better_than_any_shuffle() -> None:
    """Every shuffle ties with what was observed, up to rounding, and ties count against the head: p is 1, not its least value."""
    right = torch.rand(24, 6, generator=torch.Generator().manual_seed(0)).argsort(-1) < 2
    weights = right.float() / 2 - (~right).float() / 4
    mass = torch.tensor([0.1, 1 / 6, 0.0])[None, :, None].expand(24, 3, 6).contiguous()
    known = torch.ones_like(right)

    def draw(n: int, g: torch.Generator) -> Tensor:
        drawn = shuffles(right.long(), known, n, g).bool()
        return drawn.float() / 2 - (~drawn).float() / 4

    mean, _, p = shuffled_null(mass, right, weights, draw, n_draws=99, seed=0)
    np.testing.assert_array_equal(p, 1.0)
    np.testing.assert_allclose(mean, 0.0, atol=1e-6)


def test_shuffling_keeps_what_is_not_eligible_and_the_number_of_each_value() -> None:
    values = torch.tensor([[5, 7, 7, -1], [1, -1, 2, 3]])
    eligible = values >= 0
    drawn = shuffles(values, eligible, 200, torch.Generator().manual_seed(0))
    assert bool((drawn[:, ~eligible] == values[~eligible]).all())
    assert torch.equal(drawn.sort(-1).values, values.sort(-1).values.expand_as(drawn))
    assert len({tuple(row) for row in drawn[:, 1].tolist()}) == 6


# -- against whole patterns, with loops


def naive(pattern: Tensor, spans: tuple[Span, ...], answer: str) -> dict[str, Tensor]:
    """Scores of one prompt from [head, dest, src], as the definitions read."""
    tokens = {(s.role, s.shot): list(range(s.start, s.stop)) for s in spans}
    labels = {s.shot: s.label for s in spans if s.role == "label"}
    last = max(s.stop for s in spans) - 1
    real = [t for s in spans if s.role != "pad" for t in range(s.start, s.stop)]
    query = pattern[:, last]

    def onto(some: list[int]) -> Tensor:
        return query[:, some].sum(-1)

    right, wrong = [k for k in labels if labels[k] == answer], [k for k in labels if labels[k] != answer]
    label = {k: onto(tokens["label", k]) for k in labels}
    item = {k: onto(tokens["text", k]) for k in labels}
    right_tokens = [t for k in right for t in tokens["label", k]]
    out = {
        "induction_label": sum((label[k] for k in right), torch.zeros(())) - len(right) * sum(label[k] for k in wrong) / len(wrong),
        "induction_per_exemplar": sum(label[k] for k in right) / len(right) - sum(label[k] for k in wrong) / len(wrong),
        "induction_paper": query[:, right_tokens].mean(-1) - query[:, [t for t in real if t not in right_tokens]].mean(-1),
        "tila": sum(label[k] for k in right) / len(right),
        "tiia": sum(item[k] for k in right) / len(right),
        "tla": sum(label.values()),
        "previous_token": torch.stack([pattern[:, t, t - 1] for t in real[1:]]).mean(0),
        "k_back": torch.stack([pattern[:, t, t - 3] for t in real[3:]]).mean(0),
        "sink": torch.stack([pattern[:, t, real[0]] for t in real[1:]]).mean(0),
        "ila": torch.stack(
            [torch.stack([pattern[:, d][:, tokens["text", k]].sum(-1) for d in tokens["label", k]]).amax(0) for k in labels if k]
        ).mean(0),
    }
    identity = {s.shot: s.item for s in spans if s.role == "text"}
    order = [*sorted(labels), QUERY]
    pairs = []
    for place, k in enumerate(order):
        earlier = [t for j in order[:place] if identity[j] == identity[k] for t in tokens["text", j]]
        if earlier:
            pairs.append(pattern[:, tokens["text", k][-1]][:, earlier].sum(-1))
    out["duplicate"] = torch.stack(pairs).mean(0)
    return {name: torch.as_tensor(value) for name, value in out.items()}


def mixed_episodes() -> list[Episode]:
    """Labels and items of one to three words, prompts of different length (so there is padding)."""
    words = {"a": "i1", "b": "i2 i3", "c": "i4 i5 i6"}
    labels = {"a": "l1 l2", "b": "l3", "c": "l4 l5 l6"}
    episodes = []
    for n, order in enumerate(("abcab", "cbaabc", "bca", "aabcc")):
        shots = tuple(Shot(label=labels[x], text=words[x], item=x) for x in order)
        x = order[n % len(order)]
        episodes.append(Episode(shots, Shot(label=labels[x], text=words[x], item=x), tuple(labels.values()), id=f"mixed {n}"))
    return episodes


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_every_score_agrees_with_loops_over_whole_patterns(batch_size: int) -> None:
    model = untrained(seed=1, renderer=ToyRenderer(bos=True))
    model._initialise(1, 1.5)
    episodes = mixed_episodes()
    result = score_heads(model, episodes, scores=ALL, k_back=3, n_null=19, batch_size=batch_size, progress=False)
    for i, episode in enumerate(episodes):
        batch = model.render([episode])
        _, cache = model.run_with_cache(batch)
        for layer in range(2):
            expected = naive(cache[f"blocks.{layer}.attn.hook_pattern"][0], batch.spans[0], episode.answer)
            for name, value in expected.items():
                assert result[name].per_episode[i, layer] == pytest.approx(value.detach().numpy(), abs=2e-6), (name, layer)  # float32 sums
    assert result["previous_token_all"].value == pytest.approx(result["previous_token"].value)  # no pictures: all tokens are text


def test_masses_by_role_agree_with_masks_and_sum_to_one() -> None:
    model = untrained(seed=1, renderer=ToyRenderer(bos=True))
    batch = model.render(mixed_episodes())
    found = attention_by_role(model, batch, batch_size=2, progress=False)
    _, cache = model.run_with_cache(batch)
    row = cache["blocks.1.attn.hook_pattern"][:, :, -1]
    for name, mask in {
        "right label": batch.mask("label", right=True), "wrong label": batch.mask("label", right=False), "right text": batch.mask("text", right=True),
        "query text": batch.mask("text", shot=QUERY), "sink": batch.mask("glue"),
    }.items():  # fmt: skip
        expected = (row * mask[:, None]).sum(-1).mean(0).detach().numpy()
        assert found.value[1, :, found.spans.index(name)] == pytest.approx(expected, abs=1e-6), name
    assert found.value.sum(-1) == pytest.approx(np.ones((2, 4)), abs=1e-5)
    assert (found.low <= found.value + 1e-9).all()


def test_without_a_first_glue_token_the_sink_is_taken_out_of_the_first_item() -> None:
    model = untrained(seed=1)
    found = attention_by_role(model, toy_batch(16, 2, 2), progress=False)
    assert found.value.sum(-1) == pytest.approx(np.ones((2, 4)), abs=1e-5)
    assert "glue" not in found.spans


# -- pictures and words: a model that is only its attention


class Written:
    """The surface that head scores need, with attention given by hand: [layer][batch, head, dest, src], None for a layer without softmax attention."""

    def __init__(self, patterns: list[Tensor | None]) -> None:
        self.patterns = patterns
        heads = next(p.shape[1] for p in patterns if p is not None) if any(p is not None for p in patterns) else 1
        self.cfg = type("Config", (), {"n_layers": len(patterns), "n_heads": heads, "n_key_value_heads": 1, "model_type": "written"})()

    def attention_rows(self, batch: Batch, dest: Any = "last", *, layers: Any = None, reduce: Any = None) -> list[Any]:
        parts = dest.split(2)  # in chunks, as long prompts come
        return [None if p is None else [reduce(i, where, p[:, :, where]) for where in parts] for i, p in enumerate(self.patterns)]

    def describe(self) -> dict[str, Any]:
        return {"model": "written"}


def picture_batch() -> Batch:
    """Two prompts: pictures of two tokens (one exemplar is a word), labels of one token, glue that closes each turn; the first is padded by one."""

    def spans(gap: int, kinds: str, query: str, labels: str, answer: str) -> tuple[Span, ...]:
        out, at, image = ([Span("pad", 0, gap)] if gap else []) + [Span("instruction", gap, gap + 1)], gap + 1, 0
        for k, kind in [*enumerate(kinds), (QUERY, query)]:
            label = answer if k == QUERY else labels[k]
            width = 2 if kind == "image"[0] else 1
            out.append(Span("image" if width == 2 else "text", at, at + width, k, image if width == 2 else None, label, label.upper()))
            at, image = at + width, image + (width == 2)
            out.append(Span("question", at, at + 1, k))
            at += 1
            if k != QUERY:
                out += [Span("label", at, at + 1, k, None, label, label.upper()), Span("glue", at + 1, at + 2, NO_SHOT)]
                at += 2
        return tuple(out)

    rows = (spans(1, "iti", "i", "xyx", "x"), spans(0, "iii", "i", "yxy", "y"))
    n_pos = max(row[-1].stop for row in rows)
    assert {row[-1].stop for row in rows} == {n_pos}
    ids = torch.zeros(2, n_pos, dtype=torch.long)
    return Batch(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, rows, (0, 1), (("x", "y"),) * 2, (((1,), (2,)),) * 2, ids=("one", "two")
    )


def looking_at(batch: Batch, **wanted: Any) -> Tensor:
    """A head that spreads its attention over a mask wherever that is visible, else over itself. [batch, dest, src]"""
    mask = batch.mask(**wanted)[:, None] & torch.ones(batch.n_pos, batch.n_pos, dtype=torch.bool).tril()
    mask = torch.where(mask.any(-1, keepdim=True), mask, torch.eye(batch.n_pos, dtype=torch.bool))
    return mask.float() / mask.sum(-1, keepdim=True)


def test_scores_of_prompts_with_pictures_and_words_are_split_by_modality() -> None:
    batch = picture_batch()
    right = looking_at(batch, role="label", right=True)
    own_image = torch.stack([looking_at(batch, role="image", shot=k) for k in range(3)]).mean(0)
    result = score_heads(Written([torch.stack([right, own_image], 1), None]), batch, scores=ALL, n_null=99, progress=False)
    assert result["induction"].value[0, 0] == pytest.approx(1.0)
    assert np.isnan(result["induction"].value[1]).all()
    assert result["induction[image->image]"].per_episode[:, 0, 0] == pytest.approx([np.nan, 1.0], nan_ok=True)
    assert "Layers without softmax attention, whose heads are NaN: 1." in result.notes
    # the first prompt's second exemplar is a word: its label reads no picture of its own
    assert result["ila[image]"].per_episode[0, 0, 1] == pytest.approx(result["ila[image]"].per_episode[1, 0, 1], abs=0.4)
    assert np.isnan(result["ila[text]"].per_episode[1, 0, 1])
    assert result["ila[text]"].per_episode[0, 0, 1] == 0.0
    assert result.top("induction", 9) == [(0, 0), (0, 1)]


def test_the_tokens_that_close_a_turn_count_for_its_label() -> None:
    batch = picture_batch()
    closing = torch.zeros(2, batch.n_pos, dtype=torch.bool)
    for i, row in enumerate(batch.spans):
        for span, after in pairwise(row):
            if span.role == "label" and span.label == batch.candidates[i][batch.answers[i]]:
                closing[i, after.start : after.stop] = True
    pattern = torch.eye(batch.n_pos).repeat(2, 1, 1)
    pattern[:, -1] = closing / closing.sum(-1, keepdim=True)
    result = score_heads(Written([pattern[:, None]]), batch, scores=("induction", "induction_label"), n_null=19, progress=False)
    assert result["induction"].value[0, 0] == pytest.approx(1.0)
    assert result["induction_label"].value[0, 0] == pytest.approx(0.0)


# -- refusals and records


def test_bad_input_is_refused_before_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(heads_module, "read", never)
    model, good = untrained(), toy_episodes(2)
    one_class = [Episode((Shot("l1", text="i1"),), Shot("l1", text="i1"), ("l1", "l2"))]
    absent = [Episode((Shot("l1", text="i1"), Shot("l2", text="i2")), Shot("l3", text="i3"), ("l1", "l2", "l3"))]
    for data, message in (
        ([], "non-empty"),
        (one_class, "at least two labels"),
        (absent, "no exemplar has the right label 'l3'"),
    ):
        with pytest.raises(EpisodeError, match=message):
            score_heads(model, data)
    zero_shot = model.render([good[0].without_shots()])
    with pytest.raises(EpisodeError, match="no exemplar label"):
        score_heads(model, zero_shot)
    for options, message in (
        ({"scores": ("inductoin",)}, "scores must be among"), ({"correction": "bonferroni"}, "correction must be"), ({"k_back": 1}, "k_back must be"),
        ({"n_null": 0}, "n_null must be"), ({"lift": 0.5}, "lift must be"), ({"batch_size": 0}, "batch_size must be"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=message):
            score_heads(model, good, **options)  # type: ignore[arg-type]


def test_an_episode_that_cannot_be_scored_is_left_out_and_named() -> None:
    absent = Episode((Shot("l1", text="i1"), Shot("l2", text="i2")), Shot("l3", text="i3"), ("l1", "l2", "l3"), id="no answer")
    result = score_heads(untrained(), [*toy_episodes(3), absent], n_null=19, progress=False)
    assert result.n == 3
    assert [(s.episode, s.reason) for s in result.skipped] == [("no answer", "no exemplar has the right label 'l3'")]


def test_a_nan_is_an_error_that_names_layer_head_and_episode() -> None:
    model: ToyTransformer = untrained()
    model.blocks[1].attn.W_K.data[2] = float("nan")  # type: ignore[union-attr]
    with pytest.raises(NotFiniteError, match=r"layer 1, head 2, first in episode toy-0"):
        score_heads(model, toy_episodes(4), progress=False)


def test_a_model_without_any_attention_pattern_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="softmax attention"):
        score_heads(Written([None]), picture_batch(), progress=False)


def test_right_exemplars_that_never_move_are_pointed_out() -> None:
    shots = tuple(Shot(f"l{k}", text=f"i{k}") for k in range(3))
    episodes = [Episode(shots, Shot("l0", text="i0"), ("l0", "l1", "l2"), id=str(n)) for n in range(3)]
    notes = score_heads(untrained(), episodes, n_null=19, progress=False).notes
    assert any("same places" in note for note in notes)
    assert any("raise n_null" in note for note in notes)


def test_scores_say_how_they_were_made_and_come_out_the_same_again() -> None:
    model, data = untrained(), toy_episodes(6)
    one, two = (score_heads(model, data, scores=("induction", "tla"), n_null=50, seed=3, task="toy", progress=False) for _ in range(2))
    assert one.to_frame().equals(two.to_frame())
    assert (one.provenance.model, one.provenance.task, one.provenance.seed) == ("untrained toy", "toy", 3)
    assert one.provenance.options["n_null"] == 50
    assert "statsmodels" in one.provenance.versions
    assert len(one.to_frame()) == 2 * 2 * 4
    assert one["induction"].lift == 1.5
    other = score_heads(model, data, scores=("tla",), correction="bh", n_null=50, progress=False)
    assert (other["tla"].p_corrected <= one["tla"].p_corrected + 1e-12).all()
