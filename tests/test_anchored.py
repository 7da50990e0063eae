"""Anchored-by-Text and its comparison: pairs that know no answer, scores against the plain model, baselines by hand."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture, unchecked

import mechicl
from mechicl.analysis.examples.anchored import compare_strategies
from mechicl.analysis.examples.strategies import BASELINES
from mechicl.data.anchored import GREY, HIDDEN, anchored, exchanged, same_pictures
from mechicl.data.memes_made import draw_memes
from mechicl.errors import EpisodeError, NotFiniteError, OptionError
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode, Shot
from mechicl.prompts.form import Form
from mechicl.results import Strategies

Organism = Callable[..., tuple[Any, Any]]
LABELS = ("kimo", "zuda")
"""Negative and positive; as many tokens each, so that neither is favoured by its length."""
EVERY = (
    "zero-shot",
    "random",
    "retrieved",
    "least similar",
    "anchored",
    "anchored:negative",
    "anchored:borrowed",
    "anchored:asserted",
    *BASELINES,
)


def made(n: int = 8, *, size: int = 28, seed: int = 0) -> tuple[list[Shot], list[Shot]]:
    """Pool and queries."""
    drawn = draw_memes({"train": 2 * n, "dev": n}, size=size, words="made-up", n_things=4, seed=seed)
    return drawn.shots("train", LABELS), drawn.shots("dev", LABELS)


def hooked(organism: Organism, family: str) -> HookedVLM:
    return HookedVLM(*organism(family), check=False)


def pixels(shot: Shot) -> list[bytes]:
    return [image.tobytes() for image in shot.images]


# ---- anchored pairs ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negative", ["neutral", "noised", "swapped"])
def test_a_pair_shares_its_text_and_differs_in_the_picture_only(negative: str) -> None:
    pool, queries = made()
    query = queries[0]
    first, second = anchored(query, LABELS, negative=negative, others=pool, question="Is it?")
    by_label = {shot.label: shot for shot in first.shots}
    assert set(by_label) == set(LABELS)
    assert all(shot.text == query.text for shot in first.shots)
    assert pixels(by_label["zuda"]) == pixels(query)
    assert pixels(by_label["kimo"]) != pixels(query)
    assert by_label["kimo"].images[0].size == query.images[0].size
    assert [shot.label for shot in second.shots] == [shot.label for shot in first.shots][::-1]
    assert [pixels(shot) for shot in second.shots] == [pixels(shot) for shot in first.shots]
    assert first.query is second.query is query
    assert first.candidates == LABELS
    if negative == "neutral":
        assert by_label["kimo"].images[0].getcolors() == [(28 * 28, GREY)]
    if negative == "swapped":
        assert pixels(by_label["kimo"]) in [pixels(shot) for shot in pool]


def test_a_benign_counterpart_keeps_the_picture_and_takes_a_text_that_is_known_to_be_benign() -> None:
    pool, queries = made()
    (episode,) = anchored(queries[0], LABELS, negative="counterpart", others=pool, plan="negative")
    (shot,) = episode.shots
    assert pixels(shot) == pixels(queries[0])
    assert shot.text in {other.text for other in pool if other.label == "kimo"} - {queries[0].text}


@pytest.mark.parametrize("plan", ["both", "asserted", "negative", "borrowed"])
@pytest.mark.parametrize("negative", ["neutral", "swapped", "counterpart", ("neutral", "noised")])
def test_prompts_do_not_know_the_answer(plan: Any, negative: Any) -> None:
    pool, queries = made()
    positives = [shot for shot in pool if shot.label == "zuda"][:2]
    for query in queries[:4]:
        flipped = replace(query, label="kimo" if query.label == "zuda" else "zuda")
        one, two = (anchored(q, LABELS, negative=negative, plan=plan, others=pool, positives=positives, seed=3) for q in (query, flipped))
        for a, b in zip(one, two, strict=True):
            assert [(s.label, s.text, pixels(s)) for s in a.shots] == [(s.label, s.text, pixels(s)) for s in b.shots]
            assert a.answer != b.answer


def test_every_plan_tells_what_it_may() -> None:
    pool, queries = made()
    query, positives = queries[0], [shot for shot in pool if shot.label == "zuda"][:2]
    asserted = anchored(query, LABELS, plan="asserted")
    assert len(asserted) == 1
    assert {(s.label, pixels(s) == pixels(query)) for s in asserted[0].shots} == {("zuda", True), ("kimo", False)}
    (alone,) = anchored(query, LABELS, plan="negative")
    assert [s.label for s in alone.shots] == ["kimo"]
    (lent,) = anchored(query, LABELS, plan="borrowed", positives=positives, negative=["neutral", "noised"])
    assert {s.text for s in lent.shots if s.label == "zuda"} <= {s.text for s in positives}
    assert [s.text for s in lent.shots if s.label == "kimo"] == [query.text] * 2
    assert [s.text for s in lent.shots if s.label == "zuda"][-1] == positives[0].text  # the best one next to the query
    first, second = anchored(query, LABELS)
    assert [s.label for s in exchanged(second).shots] == [s.label for s in first.shots]


def test_the_negative_of_a_made_up_meme_is_negative_as_claimed() -> None:
    drawn = draw_memes({"train": 200}, size=16, seed=1)
    items = {item.id: item for item in drawn.items}
    truth, shots = {}, drawn.shots("train", LABELS)
    for item, image in zip(drawn.items, drawn.pictures, strict=True):
        truth[image.tobytes()] = item.shows
    wrong = 0
    for k, query in enumerate(shots):
        (episode,) = anchored(query, LABELS, negative="swapped", plan="negative", others=shots, seed=k)
        wrong += truth[pixels(episode.shots[0])[0]] == items[query.item].names
        (episode,) = anchored(query, LABELS, negative="neutral", plan="negative", seed=k)
        assert pixels(episode.shots[0])[0] not in truth  # grey shows nothing that could be named
    assert 0 < wrong < 0.12 * len(shots)  # one of 24 things at random: now and then it is the one that the text names


def test_the_order_of_a_pair_is_drawn_and_the_same_seed_gives_the_same_bytes() -> None:
    pool, queries = made()
    orders = [[s.label for s in anchored(queries[0], LABELS, seed=seed)[0].shots] for seed in range(20)]
    assert len({tuple(order) for order in orders}) == 2
    a, b, c = (anchored(queries[0], LABELS, negative="noised", plan="negative", seed=seed)[0] for seed in (1, 1, 2))
    assert pixels(a.shots[0]) == pixels(b.shots[0]) != pixels(c.shots[0])
    del pool


def test_a_users_own_maker_sees_no_label_and_is_checked() -> None:
    pool, queries = made()
    seen: list[str] = []

    def mirrored(query: Shot, others: Sequence[Shot], draw: np.random.Generator) -> Shot:
        seen.append(query.label)
        return replace(query, images=(query.images[0].transpose(0),), label="nonsense")

    (episode,) = anchored(queries[0], LABELS, negative=mirrored, plan="negative")
    assert (seen, episode.shots[0].label) == ([HIDDEN], "kimo")
    for maker, said in (
        (lambda q, o, d: q, "is the query itself"),
        (lambda q, o, d: o[0], "shares neither"),
        (lambda q, o, d: None, "none could be made"),
        (lambda q, o, d: "text", "must return a Shot"),
    ):
        with pytest.raises(EpisodeError, match=said):
            anchored(queries[0], LABELS, negative=maker, others=[s for s in pool if s.text != queries[0].text])


def test_refusals_of_pairs() -> None:
    pool, queries = made()
    with unchecked():
        for change in ({"plan": "guess"}, {"negative": "upside down"}, {"labels": ("a", "a")}, {"plan": "borrowed"}, {"negative": []}):
            with pytest.raises(OptionError):
                anchored(queries[0], **{"labels": LABELS, **change})  # type: ignore[arg-type]
    for bad in (Shot("zuda", text="words only"), Shot("zuda", (picture(),))):
        with pytest.raises(EpisodeError, match="must have a text"):
            anchored(bad, LABELS)
    for maker in ("swapped", "counterpart"):
        with pytest.raises(EpisodeError, match="none could be made"):
            anchored(queries[0], LABELS, negative=maker, others=[])
    del pool


def test_both_prompts_of_a_pair_are_token_for_token_as_long_in_every_family(organism: Organism, family: str) -> None:
    model = hooked(organism, family)
    pool, queries = made()
    batch = model.render([*anchored(queries[0], LABELS, question="Is it?"), *anchored(queries[1], LABELS, negative="swapped", others=pool)])
    one, two = batch.spans[0], batch.spans[1]
    assert [(s.role, s.start, s.stop, s.shot) for s in one] == [(s.role, s.start, s.stop, s.shot) for s in two]
    logits = model(batch)
    assert bool(torch.isfinite(logits).all())
    assert not torch.allclose(logits[0], logits[1], atol=1e-7)  # the exchanged labels are read


# ---- the comparison ----------------------------------------------------------------------------------------------------------------------------------


def by_hand(model: HookedVLM, episode: Episode) -> float:
    """Positive minus negative log-probability, one plain forward pass of the Hugging Face model per label."""
    batch, totals = model.render([episode]), []
    for ids in batch.candidate_ids[0]:
        inputs = model.inputs(batch.append([list(ids)]))
        with torch.no_grad():
            log_p = model.hf(**inputs, use_cache=False).logits[0].double().log_softmax(-1)
        at = int(batch.query_pos[0])
        totals.append(sum(float(log_p[at + t, token]) for t, token in enumerate(ids)))
    return totals[1] - totals[0]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "smolvlm"])
def test_scores_are_those_of_the_plain_model_one_prompt_at_a_time(organism: Organism, family: str) -> None:
    model = hooked(organism, family)
    pool, queries = made(4)
    found = compare_strategies(
        model, queries, pool, ("zero-shot", "anchored", "anchored:negative"), labels=LABELS, seed=2, question="Is it?", progress=False
    )
    assert found.n == 4
    for i, query in enumerate(queries):
        bare = Episode((), query, LABELS, question="Is it?")
        assert found["zero-shot"].scores[i] == pytest.approx(by_hand(model, bare), abs=1e-4)  # float32 logits
    seed = int(np.random.SeedSequence([2, 1]).generate_state(1)[0])
    both = anchored(queries[1], LABELS, question="Is it?", seed=seed)
    assert found["anchored"].scores[1] == pytest.approx(np.mean([by_hand(model, one) for one in both]), abs=1e-4)


def test_every_way_runs_on_a_tiny_checkpoint_and_says_what_it_did(organism: Organism) -> None:
    model = hooked(organism, "llava")
    pool, queries = made(8)
    found = compare_strategies(model, queries, pool, EVERY, labels=LABELS, k=2, seed=1, task="made", progress=False)
    again = compare_strategies(model, queries, pool, EVERY, labels=LABELS, k=2, seed=1, batch_size=3, progress=False)
    assert isinstance(found, Strategies)
    assert [row.strategy for row in found.rows] == list(EVERY)
    assert found.n == 8
    for a, b in zip(found.rows, again.rows, strict=True):
        assert a.scores == pytest.approx(b.scores, abs=1e-5)  # batches of another size
        assert (a.correct == (a.predicted == found.answers)).all()
        assert a.accuracy.value == a.correct.mean()
    assert {row.strategy: row.shots for row in found.rows} == {
        "zero-shot": 0, "random": 2, "retrieved": 2, "least similar": 2, "anchored": 2, "anchored:negative": 1, "anchored:borrowed": 2,
        "anchored:asserted": 2, "majority": 2, "copy": 1, "prior": 0,
    }  # fmt: skip
    zero = found["zero-shot"]
    assert zero.accuracy_change is None
    assert np.isnan(zero.holm_p)
    for row in found.rows[1:]:
        assert row.accuracy_change is not None
        assert row.accuracy_change.value == pytest.approx(row.accuracy.value - zero.accuracy.value)
        assert row.holm_p >= row.mcnemar_p
    frame = found.to_frame()
    assert list(frame["strategy"]) == list(EVERY)
    assert set(found.answers_frame()["answer"]) == set(LABELS)
    assert len(found.answers_frame()) == 8 * len(EVERY)
    assert found.provenance.task == "made"
    assert any("Likeness by" in note for note in found.notes)
    with pytest.raises(OptionError, match="zero-shot"):
        found["none"]


def test_examples_may_be_written_in_another_form(organism: Organism) -> None:
    model = hooked(organism, "llava")
    pool, queries = made(4)
    form, ways = Form(turns="one"), ("zero-shot", "retrieved", "anchored")
    plain = compare_strategies(model, queries, pool, ways, labels=LABELS, k=1, progress=False)
    other = compare_strategies(model, queries, pool, ways, labels=LABELS, k=1, form=form, progress=False)
    assert other["zero-shot"].scores == pytest.approx(plain["zero-shot"].scores, abs=1e-6)  # there is nothing to write otherwise
    for way in ("retrieved", "anchored"):
        assert np.abs(other[way].scores - plain[way].scores).max() > 1e-5
    (only,) = anchored(queries[0], LABELS, plan="negative", form=form, seed=int(np.random.SeedSequence([0, 0]).generate_state(1)[0]))
    assert only.form is form
    assert "turns='one'" in str(other.provenance.options["form"])


def test_baselines_vote_as_counted_by_hand(organism: Organism) -> None:
    model = hooked(organism, "qwen2_5_vl")
    _, queries = made(4)
    pool = [Shot(label, text=f"item {k}") for k, label in enumerate(["zuda", "zuda", "kimo", "kimo", "zuda"])]
    near = np.eye(5)[[0, 2, 1, 3]] + 0.1 * np.eye(5)[[1, 3, 4, 0]] + 0.05 * np.eye(5)[[4, 0, 2, 2]]
    found = compare_strategies(
        model, queries, pool, ("zero-shot", *BASELINES), labels=LABELS, k=3, embeddings=(near, np.eye(5)), progress=False
    )
    assert found["majority"].scores == pytest.approx([1, 1 / 3, 2 / 3, 1 / 3])
    assert found["copy"].scores.tolist() == [1, -1, 1, -1]
    assert found["prior"].scores == pytest.approx([0.6] * 4)
    assert found["copy"].predicted.tolist() == [True, False, True, False]
    assert found["prior"].predicted.all()
    assert found["prior"].auroc.value == 0.5


def test_a_query_that_one_way_cannot_ask_is_left_out_of_all_and_named(organism: Organism) -> None:
    model = hooked(organism, "qwen2_5_vl")
    pool, queries = made(8)
    control = model.renderer.special[0]
    bad = [replace(queries[0], text="", item="silent"), replace(queries[1], text=f"a {control}", item="control")]
    ways = ("zero-shot", "random", "anchored")
    found = compare_strategies(model, [queries[2], *bad, *queries[3:]], pool, ways, labels=LABELS, seed=1, progress=False)
    assert [(s.episode, s.reason.split(":")[0]) for s in found.skipped] == [("silent", "anchored"), ("control", "zero-shot")]
    assert found.n == 6
    assert found.query_ids == tuple(q.item for q in queries[2:])
    retrieved = compare_strategies(
        model, [*bad, *queries[2:]], [*pool, replace(pool[0], text=f"a {control}")], ("retrieved", "random"), labels=LABELS, progress=False
    )
    assert [s.episode for s in retrieved.skipped] == ["control"]
    assert any("1 of 17 pool items are never shown" in note for note in retrieved.notes)
    with pytest.raises(EpisodeError, match="askable by every way"):
        compare_strategies(model, bad, pool, ways, labels=LABELS, progress=False)


def test_ways_of_ones_own_see_neither_the_answer_nor_the_query_among_the_items(organism: Organism) -> None:
    model = hooked(organism, "qwen2_5_vl")
    pool, queries = made(4)
    seen: list[tuple[str, bool]] = []

    def last_two(query: Shot, items: Sequence[Shot]) -> Sequence[Shot]:
        seen.append((query.label, any(pixels(item) == pixels(query) and item.text == query.text for item in items)))
        return items[-2:]

    found = compare_strategies(
        model, queries, [*pool, *queries], ("zero-shot", "mine"), labels=LABELS, custom={"mine": last_two}, progress=False
    )
    assert seen == [(HIDDEN, False)] * 4
    assert found["mine"].shots == 2


def test_the_comparison_refuses_before_any_work(organism: Organism) -> None:
    model = hooked(organism, "qwen2_5_vl")
    pool, queries = made(4)

    def run(change: dict[str, Any], some: Sequence[Shot] = queries, items: Sequence[Shot] = pool) -> None:
        with unchecked():
            compare_strategies(model, some, items, **{"labels": LABELS, "progress": False, **change})  # type: ignore[arg-type]

    for change in (
        {"strategies": ("nonsense",)}, {"strategies": ()}, {"labels": ("a", "a")}, {"k": 0}, {"k": 99}, {"batch_size": 0}, {"score": "x"},
        {"custom": {"random": lambda q, p: ()}}, {"negative": "x", "strategies": ("anchored",)}, {"plan": "x", "strategies": ("anchored",)},
    ):  # fmt: skip
        with pytest.raises(OptionError):
            run(change)
    with pytest.raises(OptionError, match="pool must hold"):
        run({"strategies": ("random",)}, items=[])
    with pytest.raises(OptionError, match="pool must hold"):
        run({"strategies": ("anchored",), "plan": "borrowed"}, items=[])
    with pytest.raises(EpisodeError, match="non-empty"):
        run({}, some=[])
    with pytest.raises(EpisodeError, match="labels must be all"):
        run({}, items=[*pool, Shot("other", text="x")])


def test_queries_alone_can_be_compared_and_one_label_is_said(organism: Organism) -> None:
    model = hooked(organism, "qwen2_5_vl")
    _, queries = made(8)
    positive = [q for q in queries if q.label == "zuda"]
    found = compare_strategies(model, positive, [], ("anchored", "anchored:negative"), labels=LABELS, progress=False)
    assert np.isnan(found["anchored"].auroc.value)
    assert found["anchored"].accuracy_change is None
    assert any("one label" in note for note in found.notes)
    assert any("was not run" in note for note in found.notes)


def test_broken_weights_are_an_error_and_no_answer(organism: Organism) -> None:
    from mechicl.training.organisms import build

    hf, processor = build("llava", preset="tiny", seed=0)
    model = HookedVLM(hf, processor, check=False)
    hf.get_output_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(NotFiniteError):
        compare_strategies(model, made(4)[1], [], ("zero-shot",), labels=LABELS, progress=False)


class Copier:
    """A model that says the label of the exemplar that is the query itself, and knows nothing else."""

    def __init__(self, model: HookedVLM) -> None:
        self.model = model

    def render(self, episodes: Sequence[Episode]) -> Batch:
        return self.model.render(episodes)

    def hooks(self, **_: Any) -> Any:
        return contextlib.nullcontext()

    def describe(self) -> dict[str, Any]:
        return {"model": "copier"}

    def __call__(self, batch: Batch, *, positions: Any = "last") -> torch.Tensor:
        logits = torch.zeros(batch.n, positions.shape[1], self.model.cfg.d_vocab)
        for i, episode in enumerate(batch.episodes):
            for shot in episode.shots:
                if same_pictures(shot, episode.query) and shot.text == episode.query.text:
                    logits[i, :, batch.candidate_ids[i][episode.candidates.index(shot.label)][0]] = 10
        return logits


def test_copying_the_label_of_the_querys_own_twin_cancels_where_both_labels_are_told_and_nowhere_else(organism: Organism) -> None:
    _, queries = made(8)
    ways = ("anchored:both", "anchored:asserted", "anchored:negative")
    found = compare_strategies(Copier(hooked(organism, "qwen2_5_vl")), queries, [], ways, labels=LABELS, progress=False)
    assert found["anchored:both"].scores == pytest.approx(np.zeros(8), abs=1e-9)
    assert found["anchored:asserted"].scores == pytest.approx(np.full(8, 10))
    assert found["anchored:asserted"].positive_share == 1
    assert found["anchored:asserted"].auroc.value == 0.5  # told the same about every query, it cannot rank them
    assert found["anchored:negative"].scores == pytest.approx(np.zeros(8), abs=1e-9)  # the negative is not the query's twin


def test_the_bundled_model_uses_retrieved_examples_and_gains_nothing_from_pairs_made_of_the_query() -> None:
    """It knows no words and no things, only its prompt: examples of the same things tell it the answer, pairs made from the query cannot."""
    model = mechicl.load("demo", check=False)
    drawn = draw_memes({"train": 80, "dev": 40}, size=28, words="made-up", n_things=4)
    found = compare_strategies(
        model,
        drawn.shots("dev", LABELS),
        drawn.shots("train", LABELS),
        ("zero-shot", "retrieved", "anchored"),
        labels=LABELS,
        progress=False,
    )
    assert found["zero-shot"].auroc.low < 0.5 < found["zero-shot"].auroc.high
    assert found["anchored"].auroc.low < 0.5 < found["anchored"].auroc.high
    assert found["retrieved"].auroc.low > 0.7
    change = found["retrieved"].auroc_change
    assert change is not None
    assert change.low > 0.1


def test_the_python_of_the_page_runs() -> None:
    text = (Path(__file__).parent.parent / "docs" / "anchored.md").read_text()
    space: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            exec(compile(block, "anchored.md", "exec"), space)
    assert "zero-shot" in out.getvalue()
    assert "train: 40 lines, 20 positive" in out.getvalue()
    assert space["rows"].shape == (24, 2)  # type: ignore[attr-defined]
