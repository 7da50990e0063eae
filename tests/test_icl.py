"""Accuracy: against token-by-token scoring by hand, with ties, nested labels, copying and broken models treated honestly."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechicl.analysis.icl import icl_accuracy
from mechicl.analysis.labels import check_score, label_logprobs, margins, predict
from mechicl.errors import EpisodeError, NotFiniteError, OptionError, RenderError
from mechicl.models.planted import Planted, planted_induction, untrained
from mechicl.models.toys.model import ToyTransformer
from mechicl.models.toys.prompts import ToyRenderer, toy_batch, toy_episodes
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode, Shot


@pytest.fixture(scope="module")
def planted() -> Planted:
    return planted_induction(seed=2)


def uneven_episodes(n: int = 12) -> list[Episode]:
    """Labels of one, two and three tokens, none the beginning of another; prompts of two lengths; two or three candidates."""
    labels = ("l1", "l2 l3", "l4 l5 l6")
    episodes = []
    for k in range(n):
        some = labels[: 2 + k % 2]
        shots = tuple(Shot(label, text=f"i{j}", item=f"i{j}") for j, label in enumerate(some)) * (1 + k % 2)
        right = k % len(some)
        episodes.append(Episode(shots, Shot(some[right], text=f"i{right}", item=f"i{right}"), some, id=f"uneven {k}"))
    return episodes


def by_hand(model: ToyTransformer, episode: Episode) -> list[list[float]]:
    """Log-probability of each token of each candidate: one unpadded sequence at a time."""
    batch = model.render([episode])
    prompt: list[int] = batch.inputs["input_ids"][0].tolist()
    found = []
    for ids in batch.candidate_ids[0]:
        log_p = model(torch.tensor([prompt + list(ids)]), positions="all")[0].detach().double().log_softmax(-1)
        found.append([float(log_p[len(prompt) - 1 + t, token]) for t, token in enumerate(ids)])
    return found


def test_the_planted_network_is_right_and_knows_nothing_without_examples(planted: Planted) -> None:
    found = icl_accuracy(planted.model, toy_episodes(64, classes=4, label_words=2), batch_size=64, progress=False)
    assert found.accuracy.value == found.first_token_accuracy.value == found.open_accuracy.value == found.cla.value == 1.0
    assert found.accuracy.low > 0.9
    assert found.margin.value == pytest.approx(40, abs=0.1)  # the logit of a label fully attended to
    assert found.chance == 0.25
    assert found.zero_shot is not None
    assert found.zero_shot.low < 0.25 < found.zero_shot.high
    assert (found.n, found.skipped, found.notes) == (64, (), ())
    assert list(found.to_frame()["predicted"]) == list(found.to_frame()["answer"])


@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize("score", ["full", "mean_token", "first_token"])
def test_scores_are_those_of_one_sequence_at_a_time(batch_size: int, score: Any) -> None:
    model = untrained(seed=3, norm=True)
    episodes = uneven_episodes()
    found = icl_accuracy(model, episodes, score=score, batch_size=batch_size, zero_shot=False, progress=False)
    reduce = {"full": sum, "mean_token": lambda x: sum(x) / len(x), "first_token": lambda x: x[0]}[score]
    for k, episode in enumerate(episodes):
        values = [reduce(tokens) for tokens in by_hand(model, episode)]
        right = episode.candidates.index(episode.answer)
        assert found.margins[k] == pytest.approx(
            values[right] - max(v for j, v in enumerate(values) if j != right), abs=1e-4
        )  # float32 logits
        assert found.predicted[k] == int(np.argmax(values))


def test_a_batch_and_its_episodes_give_the_same(planted: Planted) -> None:
    episodes = uneven_episodes()
    model = untrained(seed=3)
    one = icl_accuracy(model, episodes, progress=False)
    two = icl_accuracy(model, model.render(episodes), batch_size=3, progress=False)
    assert one.margins == pytest.approx(two.margins, abs=1e-4)
    assert one.zero_shot is not None
    assert two.zero_shot is not None
    assert one.zero_shot.value == two.zero_shot.value
    assert one.episode_ids == two.episode_ids


def test_a_hand_made_batch_has_no_zero_shot_control_and_says_so(planted: Planted) -> None:
    whole = toy_batch(4, 2)
    bare = Batch(whole.inputs, whole.spans, whole.answers, whole.candidates, whole.candidate_ids)
    found = icl_accuracy(planted.model, bare, progress=False)
    assert found.zero_shot is None
    assert any("No zero-shot control" in note for note in found.notes)
    assert found.episode_ids == ("0", "1", "2", "3")


def silent(**_: Any) -> ToyTransformer:
    """A model that says nothing: every logit is 0."""
    model = untrained(seed=0)
    model.W_U.data.zero_()
    return model


def test_a_model_that_cannot_tell_labels_apart_is_at_chance_and_not_at_zero() -> None:
    found = icl_accuracy(silent(), toy_episodes(200, classes=4), batch_size=200, seed=1, zero_shot=False, progress=False)
    assert found.accuracy.low < 0.25 < found.accuracy.high
    assert (found.margins == 0).all()
    assert any("200 of 200 episodes tie" in note for note in found.notes)


def test_the_coin_of_a_tie_is_fair_and_seeded() -> None:
    """Whatever its place among the candidates: a coin that favours one place is at chance too, as long as the answers are balanced."""
    values = np.zeros((4000, 4))
    values[:, 2] = -1.0  # not among the best
    first, tied = predict(values, seed=0)
    assert tied.all()
    shares = np.bincount(first, minlength=4) / len(first)
    assert shares == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3], abs=0.03)  # four standard errors
    assert (predict(values, seed=0)[0] == first).all()
    assert (predict(values, seed=1)[0] == first).mean() == pytest.approx(1 / 3, abs=0.03)


def test_short_labels_are_favoured_by_whole_labels_and_not_per_token() -> None:
    model, episodes = silent(), uneven_episodes()
    whole = icl_accuracy(model, episodes, zero_shot=False, progress=False)
    assert (whole.predicted == 0).all()  # one token: probability 1/V, two: 1/V²
    per_token = icl_accuracy(model, episodes, score="mean_token", zero_shot=False, progress=False)
    assert per_token.margins == pytest.approx(np.zeros(len(episodes)), abs=1e-5)  # float32


def test_ties_do_not_depend_on_what_else_is_in_the_batch() -> None:
    values = np.zeros((5, 4))
    first, tied = predict(values, seed=0)
    assert tied.all()
    again, _ = predict(np.where(np.arange(5)[:, None] == 2, np.array([[0, 5, 0, 0]]), values), seed=0)
    assert list(np.delete(again, 2)) == list(np.delete(first, 2))
    assert again[2] == 1
    assert margins(np.array([[1.0, 3.0, -np.inf]]), np.array([0])) == pytest.approx([-2.0])


def test_a_label_that_begins_another_is_left_out_and_named() -> None:
    nested = Episode((Shot("l1", text="i1"), Shot("l1 l2", text="i2")), Shot("l1", text="i1"), ("l1", "l1 l2"), id="nested")
    found = icl_accuracy(untrained(), [*toy_episodes(3), nested], progress=False)
    assert found.n == 3
    assert [s.episode for s in found.skipped] == ["nested"]
    assert "'l1' is the beginning of 'l1 l2'" in found.skipped[0].reason
    assert found.zero_shot is not None
    assert found.zero_shot.n == 3  # the control is of the same episodes
    with pytest.raises(EpisodeError, match="told apart by their tokens"):
        icl_accuracy(untrained(), [nested], progress=False)
    assert icl_accuracy(untrained(), [nested], score="first_token", progress=False).n == 1


def test_labels_that_begin_alike_are_told_apart_by_whole_labels_only(planted: Planted) -> None:
    """l1 l2 and l1 l3: the first token is right and decides nothing."""
    shots = (Shot("l1 l2", text="i1"), Shot("l1 l3", text="i2"))
    episodes = [Episode(shots, Shot(s.label, text=s.text), ("l1 l2", "l1 l3"), id=s.text) for s in shots] * 20
    found = icl_accuracy(untrained(seed=1), episodes, zero_shot=False, progress=False)
    assert any("In 40 of 40 episodes candidates begin with the same token" in note for note in found.notes)
    assert found.first_token_accuracy.low < 0.5 < found.first_token_accuracy.high
    assert found.cla.n == 40


def test_copying_any_label_shows_in_cla_and_not_in_accuracy(planted: Planted) -> None:
    """The matching head is made to look at the first label, whatever the query: every answer is a context label, one in four is right."""
    layer, head = planted.matching[0]

    def first_label(pattern: Tensor, *, hook: Any) -> Tensor:
        pattern[:, head] = 0
        pattern[:, head, :, 1] = 1
        return pattern

    with planted.model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_pattern", first_label)]):
        found = icl_accuracy(planted.model, toy_episodes(64, classes=4), zero_shot=False, progress=False)
    assert found.cla.value == 1.0
    assert found.accuracy.low < 0.25 < found.accuracy.high
    assert icl_accuracy(planted.model, toy_episodes(8), zero_shot=False, progress=False).accuracy.value == 1.0  # no trace


def test_a_model_that_says_something_else_fails_the_open_question_only(planted: Planted) -> None:
    model = planted_induction(seed=2).model
    model.W_U.data[:, 1] = 100.0  # <bos> is always the most likely token
    model.W_E.data[:, -1] = 1.0
    found = icl_accuracy(model, toy_episodes(16, classes=4), zero_shot=False, progress=False)
    assert found.accuracy.value == 1.0
    assert found.open_accuracy.value == found.cla.value == 0.0


def test_nan_logits_are_an_error_that_names_the_episodes() -> None:
    model = untrained()
    model.W_E.data[2 + 5] = float("nan")  # the item i5
    episodes = toy_episodes(6, classes=2)
    bad = [e.id for e in episodes if "i5" in {s.text for s in (*e.shots, e.query)}]
    clean = [e for e in episodes if e.id not in bad]
    shown = Episode((Shot("l1", text="i5"), Shot("l2", text="i6")), Shot("l1", text="i5"), ("l1", "l2"), id="poisoned")
    with pytest.raises(NotFiniteError, match="episodes poisoned"):
        icl_accuracy(model, [*clean, shown], progress=False)


def test_bad_input_is_refused() -> None:
    model = untrained(n_ctx=12)
    with pytest.raises(OptionError, match="score must be one of"):
        check_score("best")
    with pytest.raises(EpisodeError, match="non-empty"):
        icl_accuracy(model, [])
    long = Episode((Shot("l1", text="i1 apple"), Shot("l2", text="i2")), Shot("l1", text="i1"), ("l1", "l2"))
    with pytest.raises(RenderError, match="apple"):
        icl_accuracy(model, [*toy_episodes(2, classes=2), long])


def test_copies_in_one_forward_pass_are_the_same_as_one_after_the_other() -> None:
    model = untrained(seed=4, renderer=ToyRenderer(bos=True))
    batch = model.render(uneven_episodes())
    alone = label_logprobs(model, batch)[0]
    for copy in label_logprobs(model, batch, copies=3):
        assert copy.total == pytest.approx(alone.total, abs=1e-4)  # float32, other matrix shapes
        assert (copy.greedy == alone.greedy).all()
