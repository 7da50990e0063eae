"""Vector sequences as prompts: exact roles, and the analyses of the house say on them what can be computed by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import unchecked

from mechicl import ablate, icl_accuracy, score_heads
from mechicl.data.gaussian import Draw, MultimodalTask, Task, UnimodalTask, chance, draw, draw_many, second_shape, world
from mechicl.errors import EpisodeError, OptionError, RenderError
from mechicl.models.planted import Planted, planted_vectors
from mechicl.models.toys.encoders import build_encoder
from mechicl.models.toys.model import ToyTransformer, toy_config
from mechicl.prompts.corrupt import minimal_pairs
from mechicl.prompts.episode import Episode, Shot
from mechicl.prompts.vectors import VectorEpisode, VectorRenderer, VectorShot, episodes, to_batch

ONE = UnimodalTask(K=64, L=8, N=6, D=64, B=2, no_repeats=True)
TWO = MultimodalTask(K1=64, K2=16, L=8, N=6, D1=64, D2=12, B=2, no_repeats=True)


def drawn_of(task: Task, n: int = 12, split: Any = "ic", seed: int = 0) -> Draw:
    return draw(task, n, torch.Generator().manual_seed(seed), split=split)


@pytest.fixture(scope="module")
def planted() -> Planted:
    return planted_vectors(ONE, n_heads=3, seed=1)


# -- what a batch says ----------------------------------------------------------------------------------------------------------------------------

TASKS: list[Task] = [
    ONE,
    UnimodalTask(K=64, L=8, D=6, p_B=0.5, p_C=0.5),
    TWO,
    replace(TWO, m1_query="off"),
    replace(TWO, m1_query="mismatched", p_C=0.5),
    replace(TWO, N=8, labels="crossed", G1=2, G2=4, L=8),
    MultimodalTask(K1=64, K2=4, L=8, L2=2, D1=6, n_novel=8, second="digits", p_C=0.5),
]


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_holds_the_drawn_vectors_and_the_truth_about_them(task: Task) -> None:
    drawn = drawn_of(task, split="train")
    batch, at = to_batch(drawn), drawn.layout
    assert torch.equal(batch.inputs["inputs_embeds"], drawn.tokens)
    assert bool(batch.inputs["attention_mask"].all())
    assert torch.equal(batch.query_pos, torch.full((12,), at.last))
    assert torch.equal(batch.mask("label", right=True)[:, list(at.label)], drawn.right)
    assert torch.equal(batch.mask("label", right=False)[:, list(at.label)], ~drawn.right)
    assert torch.equal(torch.tensor(batch.answers), drawn.target)
    assert batch.candidates[0] == tuple(f"l{k}" for k in range(8))
    assert batch.candidate_ids[0] == tuple((k,) for k in range(8))
    assert batch.ids[:2] == ("train-0", "train-1")
    roles = np.array(batch.token_roles())
    blank = isinstance(task, MultimodalTask) and task.m1_query == "off"
    assert (roles[:, list(at.item)] == "text").all()
    assert (roles[:, list(at.label)] == "label").all()
    assert (roles[:, at.query] == ("question" if blank else "text")).all()
    for row in batch.spans:  # every position once, in order
        assert [pos for span in row for pos in range(span.start, span.stop)] == list(range(at.n_pos))
        assert [span.shot for span in row if span.role == "label"] == list(range(task.N))
    if drawn.second is None:
        assert "second_values" not in batch.inputs
        return
    where = [*at.second, at.last]
    assert (roles[:, where] == "image").all()
    assert torch.equal(batch.inputs["second_values"], drawn.second)
    assert torch.equal(batch.inputs["second_pos"], torch.tensor([where] * 12))
    assert torch.equal(batch.mask(image=2).nonzero()[:, 1], torch.full((12,), at.second[2]))


@pytest.mark.parametrize("task", TASKS)
def test_spans_name_items_so_that_equal_names_are_equal_classes(task: Task) -> None:
    drawn = drawn_of(task, split="train")
    batch, at = to_batch(drawn), drawn.layout
    for i, row in enumerate(batch.spans):
        owner = {span.start: span for span in row}
        query = owner[at.last]
        assert query.label == f"l{int(drawn.target[i])}"
        for k, pos in enumerate(at.item):
            assert (owner[pos].item == query.item) == bool(drawn.same[i, k])
            assert owner[pos].label == owner[at.label[k]].label == f"l{int(drawn.label[i, k])}"


def test_tokens_have_names_of_their_own() -> None:
    drawn = drawn_of(replace(TWO, m1_query="off", p_C=0.5), 40, "train")
    ids, at = to_batch(drawn).inputs["input_ids"], drawn.layout
    assert drawn.item2 is not None
    assert torch.equal(ids[:, list(at.label)], drawn.label)
    assert torch.equal(ids[:, list(at.item)], 8 + drawn.item)
    first = 8 + 64 + 128  # labels, classes, novel classes
    assert torch.equal(ids[:, list(at.second)], first + drawn.item2)
    renderer = VectorRenderer(drawn.task)
    assert set(ids[:, at.query].tolist()) == {renderer.n_tokens - 1}
    assert int(ids[:, :-2].max()) < renderer.n_tokens - 1


def test_parts_of_a_batch_are_the_batch_of_parts() -> None:
    drawn = drawn_of(TWO)
    batch = to_batch(drawn)
    for some in (batch.select([3, 1]), to_batch(drawn, rows=[3, 1])):
        for name, value in batch.inputs.items():
            assert torch.equal(some.inputs[name], value[[3, 1]]), name
        assert some.spans == (batch.spans[3], batch.spans[1])
        assert some.ids == ("ic-3", "ic-1")
    twice = batch.select([0, 1]).repeat(2)
    assert torch.equal(twice.inputs["second_values"][2:], drawn.second[:2])  # type: ignore[index]
    assert sum(part.n for part in batch.split(5)) == 12


def test_places_go_with_their_tokens() -> None:
    drawn = drawn_of(ONE)
    places = torch.arange(13)[None] + torch.arange(12)[:, None]
    batch = to_batch(drawn, position_ids=places)
    assert torch.equal(batch.inputs["position_ids"], places)
    assert torch.equal(batch.select([4]).inputs["position_ids"], places[4:5])
    bare = batch.renderer.render([e.without_shots() for e in batch.episodes])  # type: ignore[union-attr]
    assert torch.equal(bare.inputs["position_ids"], places[:, -1:])
    assert "position_ids" not in to_batch(drawn).inputs


def test_labels_of_the_context_may_be_the_only_candidates() -> None:
    drawn = drawn_of(ONE)
    batch = to_batch(drawn, candidates="context")
    for i, names in enumerate(batch.candidates):
        assert set(names) == {f"l{k}" for k in drawn.label[i].tolist()}
        assert names[batch.answers[i]] == f"l{int(drawn.target[i])}"
        assert batch.candidate_ids[i] == tuple((int(name[1:]),) for name in names)
    one_label = drawn_of(UnimodalTask(K=8, L=2, N=2, B=1, D=4), 20)
    with pytest.raises(EpisodeError, match="at least two labels"):
        to_batch(one_label, candidates="context")


# -- what the analyses say ------------------------------------------------------------------------------------------------------------------------


def test_accuracy_is_that_of_the_logits_and_without_examples_it_is_chance(planted: Planted) -> None:
    for split in ("ic", "iw"):
        drawn = drawn_of(ONE, 150, split)
        logits = planted.model(to_batch(drawn))[:, 0]
        found = icl_accuracy(planted.model, to_batch(drawn), batch_size=64, progress=False)
        assert found.accuracy.value == pytest.approx(float((logits.argmax(-1) == drawn.target).float().mean()))
        assert found.cla.value == pytest.approx(float((logits.argmax(-1)[:, None] == drawn.label).any(1).float().mean()))
        assert found.chance == pytest.approx(chance(ONE)["label"])
        assert found.zero_shot is not None
        assert found.zero_shot.value < 0.3  # 1/8, five standard deviations of 150 are 0.135
        assert found.accuracy.value == 1.0 if split == "ic" else found.accuracy.value < 0.4


@pytest.mark.parametrize(("task", "left"), [(ONE, 1), (TWO, 2)])
def test_the_zero_shot_control_is_the_querys_tokens_alone(task: Task, left: int) -> None:
    drawn = drawn_of(task)
    batch = to_batch(drawn)
    assert batch.renderer is not None
    bare = batch.renderer.render([episode.without_shots() for episode in batch.episodes])
    assert torch.equal(bare.inputs["inputs_embeds"], drawn.tokens[:, -left:])
    assert bare.answers == batch.answers
    if drawn.second is not None:
        assert torch.equal(bare.inputs["second_values"], drawn.second[:, -1:])
        assert torch.equal(bare.inputs["second_pos"], torch.ones(12, 1, dtype=torch.long))


def test_head_scores_are_the_masses_of_the_pattern(planted: Planted) -> None:
    """Another path: straight from the cached pattern and the drawn truth."""
    drawn = drawn_of(ONE, 24)
    batch, at = to_batch(drawn), drawn.layout
    scores = score_heads(planted.model, batch, progress=False)
    _, cache = planted.model.run_with_cache(batch)
    for layer in range(2):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        row = pattern[:, :, -1, list(at.label)]
        right, wrong = (row * drawn.right[:, None]).sum(-1), (row * ~drawn.right[:, None]).sum(-1)
        n_right, n_wrong = drawn.right.sum(1)[:, None], (~drawn.right).sum(1)[:, None]
        own = torch.stack([pattern[:, :, at.label[k], at.item[k]] for k in range(1, 6)]).mean(0)
        by_hand = {
            "induction": right - wrong * n_right / n_wrong,
            "induction_per_exemplar": right / n_right - wrong / n_wrong,
            "tila": right / n_right,
            "tla": right + wrong,
            "ila": own,
            "previous_token": pattern.diagonal(-1, 2, 3).mean(-1),
            "k_back": pattern.diagonal(-2, 2, 3).mean(-1),
        }
        for name, expected in by_hand.items():
            assert np.allclose(scores.scores[name].value[layer], expected.mean(0), atol=1e-5), name  # float32 sums
    assert scores.top("induction", 1) == [planted.matching[0]]
    assert scores.scores["induction"].p_corrected[planted.matching[0]] < 0.05
    for head in planted.idle:
        assert scores.scores["induction"].p_corrected[head] > 0.05


def test_scores_of_the_two_modalities_are_told_apart() -> None:
    two = planted_vectors(TWO, n_heads=3, seed=2)
    scores = score_heads(two.model, to_batch(drawn_of(TWO, 24)), progress=False)
    text, image = scores.scores["ila[text]"].value, scores.scores["ila[image]"].value
    fetchers = dict(zip(("one", "two"), two.previous_token, strict=True))
    # one before a label stands its second item, two before it its first
    assert image[fetchers["one"]] > 0.99
    assert text[fetchers["two"]] > 0.99
    assert text[fetchers["one"]] < 0.01
    assert image[fetchers["two"]] < 0.01


def test_a_toy_that_reads_pictures_answers_a_batch_as_it_answers_the_draw() -> None:
    task = TASKS[-1]
    assert isinstance(task, MultimodalTask)
    drawn = drawn_of(task, 30, "train")
    encoder = build_encoder("cnn", second_shape(task), 6, task.K2)
    projector = torch.nn.Linear(encoder.d_feat, 6)
    cfg = toy_config(n_layers=2, n_heads=1, d_head=6, d_vocab=8, inputs="vectors", d_input=6, positions="rope", norm="RMS")
    model = ToyTransformer(cfg, encoder=encoder, projector=projector)
    batch = to_batch(drawn)
    logits = model(batch)[:, 0]
    assert torch.allclose(logits, model.classify(drawn.tokens, drawn.second), atol=1e-4)
    found = icl_accuracy(model, batch, batch_size=30, progress=False)
    assert found.accuracy.value == pytest.approx(float((logits.argmax(-1) == drawn.target).float().mean()))
    assert found.zero_shot is not None


@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
def test_switching_the_planted_heads_off_brings_chance_and_idle_ones_nothing(planted: Planted, how: Any) -> None:
    batch = to_batch(drawn_of(ONE, 60))
    for head, harmed in ((planted.matching[0], True), (planted.previous_token[0], True), (planted.idle[0], False)):
        cut = ablate(planted.model, batch, [head], how, n_random=0, batch_size=60, zero_shot=False, progress=False)
        assert cut.intact.accuracy.value == 1.0
        assert (cut.chosen.accuracy.value < 0.5) == harmed, (head, how)


def test_minimal_pairs_exchange_label_vectors(planted: Planted) -> None:
    batch = to_batch(drawn_of(ONE, 30))
    assert batch.renderer is not None
    pairs = minimal_pairs(batch.renderer, batch.episodes, "swap_labels", seed=1)
    assert pairs.n == 30
    labels, right = world(ONE).labels, torch.tensor(pairs.corrupt.answers)
    ids = pairs.corrupt.inputs["input_ids"]
    assert torch.equal(pairs.corrupt.inputs["inputs_embeds"][:, 1::2], labels[ids[:, 1::2]])
    assert torch.equal(pairs.corrupt.inputs["inputs_embeds"][:, 0::2], pairs.clean.inputs["inputs_embeds"][:, 0::2])
    assert bool((right != torch.tensor(pairs.clean.answers)).all())
    assert torch.equal(planted.model(pairs.corrupt)[:, 0].argmax(-1), right)  # the answer follows
    moved = minimal_pairs(batch.renderer, batch.episodes, "swap_query", seed=1)
    assert torch.equal(planted.model(moved.corrupt)[:, 0].argmax(-1), torch.tensor(moved.corrupt.answers))


def test_left_padding_changes_nothing(planted: Planted) -> None:
    batch = to_batch(drawn_of(ONE, 2))
    whole, part = batch.episodes[0], replace(batch.episodes[1], shots=batch.episodes[1].shots[:4])
    together = planted.model.render([whole, part])
    assert together.spans[1][0].role == "pad"
    alone = planted.model(planted.model.render([part]))
    assert torch.allclose(planted.model(together)[1:], alone, atol=1e-4)  # logits up to 40


# -- refusals -------------------------------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_a_batch_is_refused() -> None:
    drawn, renderer = drawn_of(ONE), VectorRenderer(ONE)
    with pytest.raises(OptionError, match="one task; got 2"):
        to_batch(draw_many([ONE, replace(ONE, seed=1)], 3, [torch.Generator(), torch.Generator()]))
    with unchecked(), pytest.raises(OptionError, match='"all" or "context"'):
        to_batch(drawn, candidates="some")  # type: ignore[arg-type]
    with unchecked(), pytest.raises(OptionError, match="position_ids must be one for each token"):
        to_batch(drawn, position_ids=torch.zeros(12, 3, dtype=torch.long))
    with pytest.raises(EpisodeError, match="non-empty"):
        renderer.render([])
    with pytest.raises(RenderError, match="must carry vectors of width 64; got a Shot"):
        renderer.render([Episode((), Shot("l0", text="i0"), ("l0", "l1"))])
    with pytest.raises(RenderError, match="must carry vectors of width 6"):
        VectorRenderer(UnimodalTask(K=64, L=8, D=6)).render(episodes(drawn))
    with pytest.raises(RenderError, match=r"label must be l0\.\.l7; got 'zuda'"):
        renderer.render([VectorEpisode((), VectorShot("zuda", text="i0", vector=torch.zeros(64)), ("zuda", "l0"))])
    two = episodes(drawn_of(TWO))
    with pytest.raises(RenderError, match="as many items of the second modality"):
        VectorRenderer(TWO).render([two[0], two[1].without_shots()])
