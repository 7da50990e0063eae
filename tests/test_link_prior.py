"""Wrong labels, places of the informative examples and renamed known things: a model that follows the link, one that follows what it knew, one that does neither."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mechicl
from mechicl.analysis.link.prior import GREY, corrupt_labels, informative_position, label_corruption
from mechicl.analysis.link.rename import link_or_prior, rename
from mechicl.analysis.statistics import holm
from mechicl.data import concepts
from mechicl.data.compose import INSTRUCTION, QUESTION
from mechicl.data.looks import class_ids
from mechicl.data.words import pseudo_words
from mechicl.errors import EpisodeError, OptionError
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.episode import Episode, Shot
from tests.conftest import unchecked
from tests.link_cases import RuleModel, always_first, follow


@pytest.fixture(scope="module")
def real(organism: Callable[..., tuple[Any, Any]]) -> HookedVLM:
    return HookedVLM(*organism("qwen2_5_vl"), check=False)


def draw(n: int = 8, shots: int = 4, **options: Any) -> list[Episode]:
    return concepts.draw(n, classes=2, shots=shots, size=28, **{"seed": 0, **options})


OFF: dict[str, Any] = {"progress": False, "baselines": False}


def knows(names: dict[str, str], after: int = 99) -> Callable[[Episode], str | None]:
    """Calls each item what it knew; from `after` examples of the query's class on, what they say."""

    def rule(episode: Episode) -> str | None:
        shown = [shot.label for shot in episode.shots if shot.item == episode.query.item]
        return follow(episode) if len(shown) >= after else names[episode.query.item]

    return rule


def test_a_model_that_follows_the_link_follows_wrong_labels_too(real: HookedVLM) -> None:
    scores = label_corruption(RuleModel(real, follow), draw(), **OFF)
    by = {row.x: row for row in scores.rows}
    assert list(by) == [0.0, 0.25, 0.5, 0.75, 1.0]
    for share, right in ((0.0, 1.0), (0.25, 1.0), (0.75, 0.0), (1.0, 0.0)):
        accuracy, follows = by[share].accuracy, by[share].follows
        assert accuracy is not None
        assert follows is not None
        assert accuracy.value == by[share].likelihood.value == right
        assert (follows.value, follows.n) == (1.0, 8)
    half = by[0.5].follows
    assert half is not None
    assert half.n == 0  # both labels as often: there is nothing to follow
    change = next(c for c in scores.changes if (c.measure, c.a, c.b) == ("written", "0 % wrong", "100 % wrong"))
    assert change.change.value == -1.0


def test_a_model_that_knew_the_names_does_not_move(real: HookedVLM) -> None:
    episodes = draw()
    scores = label_corruption(RuleModel(real, lambda e: next(o.answer for o in episodes if o.id == e.id)), episodes, **OFF)
    assert [row.likelihood.value for row in scores.rows] == [1.0] * 5
    last = scores.rows[-1].follows
    assert last is not None
    assert last.value == 0.0
    assert all(c.change.value == 0 and c.holm_p == 1 for c in scores.changes)


def test_wrong_labels_are_as_many_as_asked_and_among_the_more() -> None:
    for k, episode in enumerate(draw(6)):
        before: set[int] = set()
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            made = corrupt_labels(episode, share, seed=3, number=k)
            wrong = {i for i, (a, b) in enumerate(zip(episode.shots, made.shots, strict=True)) if a.label != b.label}
            per_class = Counter(episode.shots[i].label for i in wrong)
            assert all(per_class[label] == round(4 * share) for label in episode.candidates)
            assert before <= wrong
            before = wrong
            assert made.query is episode.query
            assert [s.images for s in made.shots] == [s.images for s in episode.shots]
        everything = corrupt_labels(episode, 1.0, "random", seed=3, number=k)
        assert {s.label for s in everything.shots} <= set(episode.candidates)
    labels = [s.label == t.label for e in draw(40) for s, t in zip(e.shots, corrupt_labels(e, 1.0, "random").shots, strict=True)]
    assert 0.42 < np.mean(labels) < 0.58  # 320 coins


@pytest.mark.parametrize("how", ["blank", "labels"])
def test_where_the_informative_examples_stand(real: HookedVLM, how: Any) -> None:
    """A model that looks at the last third of its examples only, by its place in the prompt."""

    def last_third(episode: Episode) -> str | None:
        return follow(replace(episode, shots=episode.shots[-len(episode.shots) // 3 :])) or episode.candidates[0]

    seen: list[Episode] = []

    def rule(episode: Episode) -> str | None:
        seen.append(episode)
        return last_third(episode)

    scores = informative_position(RuleModel(real, rule), draw(8, 6), how=how, **OFF)
    assert [row.setting for row in scores.rows] == [
        "none", "first third only", "middle third only", "last third only", "all but the last third", "all but the middle third",
        "all but the first third", "all",
    ]  # fmt: skip
    told = {row.setting: row.likelihood.value for row in scores.rows}
    for setting in ("last third only", "all but the middle third", "all but the first third", "all"):
        assert told[setting] == 1.0
    for setting in ("none", "first third only", "middle third only", "all but the last third"):
        assert told[setting] == np.mean(scores.positive)  # the first candidate, for want of anything
    for episode in seen:  # every third shows both classes, and no example is lost
        assert len(episode.shots) == 12
        assert all(len({s.label for s in episode.shots[k : k + 4]}) == 2 for k in (0, 4, 8))


def test_blank_examples_keep_tokens_and_labels_and_show_nothing(real: HookedVLM) -> None:
    seen: list[Episode] = []

    def rule(episode: Episode) -> str | None:
        seen.append(episode)
        return None

    episodes = draw(1, 3)
    informative_position(RuleModel(real, rule), episodes, generate=False, **OFF)
    none, everything = seen[0], seen[-1]
    assert [s.label for s in none.shots] == [s.label for s in everything.shots]
    assert {color for s in none.shots for _, color in s.images[0].getcolors() or []} == {GREY}
    assert sorted(id(s.images[0]) for s in everything.shots) == sorted(id(s.images[0]) for s in episodes[0].shots)
    assert real.render([none]).n_pos == real.render([everything]).n_pos


def known(n: int = 8, shots: int = 4) -> tuple[list[Episode], dict[str, str]]:
    """Episodes under the names of four things, and which item is which."""
    names: dict[str, str] = {}
    found = []
    for k, e in enumerate(draw(n, shots, labels=("bada", "kimo"))):
        for shot in (*e.shots, e.query):
            names[shot.item] = shot.label
        found.append(replace(e, id=str(k)))
    return found, names


@pytest.mark.parametrize("how", ["swap", "outside", "novel"])
def test_the_link_wins_where_the_model_follows_its_examples_and_the_prior_where_it_does_not(real: HookedVLM, how: Any) -> None:
    episodes, names = known()
    more = ("zulo", "tepa", "voru")
    stubborn = link_or_prior(RuleModel(real, knows(names)), episodes, how=how, names=more, shots=(1, 4), progress=False)
    assert stubborn.known.value == 1.0
    assert {row.prior.value for row in stubborn.rows} == {1.0}
    assert np.isnan(stubborn.crossing)
    assert stubborn.notes == ()
    turning = link_or_prior(RuleModel(real, knows(names, after=2)), episodes, how=how, names=more, shots=(1, 4), progress=False)
    assert turning.at(0).prior.value == turning.at(1).prior.value == turning.at(1, "true").prior.value == 1.0
    four = turning.at(4)
    assert four.link.value == four.written["link"].value == 1.0
    assert four.preference.low > 0
    assert four.gain is not None
    assert four.gain.value == pytest.approx(four.preference.value - turning.at(0).preference.value)
    assert turning.at(4, "true").prior.value == 1.0
    assert 1 < turning.crossing < 4
    assert four.p == pytest.approx(2 / 2**8)
    assert [row.holm_p for row in turning.rows] == pytest.approx(holm([row.p for row in turning.rows]))
    assert len(turning.to_frame()) == 5
    with pytest.raises(OptionError, match="shots and names must be among"):
        turning.at(3)


def test_a_model_without_a_prior_is_said_to_have_none(real: HookedVLM, tmp_path: Path) -> None:
    episodes, _ = known()
    found = link_or_prior(RuleModel(real, follow), episodes, shots=(2,), out=tmp_path / "run", generate=False, progress=False)
    assert found.known.low < 0.5
    assert any("no prior that shows" in note for note in found.notes)
    assert found.at(2).link.value == 1.0
    again = RuleModel(real, follow)
    assert link_or_prior(again, episodes, shots=(2,), out=tmp_path / "run", generate=False, progress=False).at(2).link.value == 1.0
    assert again.asked == 0


def test_new_names_are_what_they_are_said_to_be() -> None:
    episodes, _ = known()
    for one in rename(episodes, "swap"):
        assert one.new == {"bada": "kimo", "kimo": "bada"} or one.new == {"kimo": "bada", "bada": "kimo"}
        assert one.link != one.prior
    for one in rename(episodes, "outside", names=("bada", "tepa", "zulo")):
        assert set(one.new.values()) == {"tepa", "zulo"}
    assert len({tuple(one.new.values()) for one in rename(episodes, "novel")}) > 1
    one = rename(episodes, "novel", seed=2)[0]
    assert one.episode("true", 1).candidates == one.episode("renamed", 1).candidates
    assert [s.images for s in one.episode("true", 1).shots] == [s.images for s in one.episode("renamed", 1).shots]


def test_refusals(real: HookedVLM) -> None:
    model = RuleModel(real, always_first)
    with pytest.raises(OptionError, match="shares must be between 0 and 1"):
        label_corruption(model, draw(2), (0.5, 2.0), **OFF)
    with unchecked(), pytest.raises(OptionError, match="how must be one of swap, random"):
        label_corruption(model, draw(2), how="any", **OFF)  # type: ignore[arg-type]
    with pytest.raises(EpisodeError, match="shots must not be empty"):
        label_corruption(model, [e.without_shots() for e in draw(2)], **OFF)
    with unchecked(), pytest.raises(OptionError, match="how must be one of blank, labels"):
        informative_position(model, draw(2), how="any", **OFF)  # type: ignore[arg-type]
    with pytest.raises(EpisodeError, match="every class must have 3 examples"):
        informative_position(model, draw(2, 2), **OFF)
    words = [replace(e, shots=tuple(replace(s, images=(), text="lilo") for s in e.shots)) for e in draw(1, 3)]
    with pytest.raises(EpisodeError, match="every example must have a picture"):
        informative_position(model, words, **OFF)
    with unchecked(), pytest.raises(OptionError, match="how must be one of swap, outside, novel"):
        rename(draw(2), "any")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="names must hold 2"):
        rename(known()[0], "outside", names=("bada", "kimo", "tepa"))
    with pytest.raises(EpisodeError, match="episodes must be a non-empty list"):
        rename([])
    with pytest.raises(OptionError, match="shots must be 0 or more"):
        link_or_prior(model, known()[0], shots=(-1,), progress=False)


def named(ids: np.ndarray, names: dict[int, str], n: int, shots: int, draw: np.random.Generator) -> list[Episode]:
    """Episodes of two known concepts under their fixed names, each pair asked about both, so that a liking for a name is worth nothing."""
    found, few = [], ids[:2]
    for k in range(n):
        few = draw.choice(ids, 2, replace=False) if k % 2 == 0 else few
        every = np.concatenate([draw.permutation(np.repeat(few, shots)), few[k % 2 : k % 2 + 1]])
        pictures = concepts.draw_pictures(every, 28, draw)
        made = [Shot(names[int(i)], (Image.fromarray(x),), item=str(i)) for i, x in zip(every, pictures, strict=True)]
        candidates = tuple(names[int(i)] for i in few)
        found.append(Episode(tuple(made[:-1]), made[-1], candidates, INSTRUCTION, QUESTION, id=str(k)))
    return found


def teach(model: HookedVLM, ids: np.ndarray, names: dict[int, str], steps: int) -> None:
    """Fine-tune to name known concepts without examples, and other ones from examples."""

    def loss(episodes: list[Episode]) -> torch.Tensor:
        batch = model.render(episodes)
        right = [list(few[i]) for few, i in zip(batch.candidate_ids, batch.answers, strict=True)]
        logits = model(batch.append([ids[:-1] for ids in right]), positions=batch.query_pos[:, None] + torch.arange(2))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(right).flatten())

    draw = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.hf.parameters(), lr=5e-4)
    model.hf.requires_grad_(True).train()
    for step in range(steps):
        other = concepts.draw(4, classes=2, shots=2, size=28, seed=1000 + step, split="train", syllables=(2, 2))
        optimizer.zero_grad()
        (loss(named(ids, names, 12, 0, draw)) + loss(other)).backward()
        optimizer.step()
    model.hf.eval()


@pytest.mark.slow
def test_the_bundled_model_taught_eight_names_has_a_prior_and_untaught_it_has_none() -> None:
    model = mechicl.load("demo", check=False)
    ids = np.random.default_rng(0).choice(class_ids("train"), 8, replace=False)
    names = dict(zip(ids.tolist(), pseudo_words(8, 5, syllables=(2, 2)), strict=True))
    episodes = named(ids, names, 32, 4, np.random.default_rng(99))
    before = link_or_prior(model, episodes, shots=(1, 4), progress=False)
    assert before.known.low <= 0.5
    assert before.notes
    teach(model, ids, names, 80)
    after = link_or_prior(model, episodes, shots=(1, 4), progress=False)
    assert after.known.low > 0.8
    assert not after.notes
    assert after.at(0).preference.high < 0
    gain = after.at(4).gain
    assert gain is not None
    assert gain.low > 0  # examples move the answer towards the link
    assert after.at(4, "true").prior.value > 0.8
