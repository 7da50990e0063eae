"""Batches: masks, continuations, repetition, taking apart, in every family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import unchecked
from PIL import Image

from mechicl.errors import OptionError
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode, Shot
from mechicl.prompts.render import Renderer
from mechicl.prompts.spans import NO_SHOT, QUERY, Span, runs

Organism = Callable[..., tuple[Any, Any]]


def picture(seed: int, width: int = 56, height: int = 56) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def episode(k: int, words: str = "?") -> Episode:
    shots = (Shot("dax", (picture(k),)), Shot("kimo", (picture(k + 1, 90, 60),)), Shot("dax", (picture(k + 2),)))
    return Episode(shots, Shot(("dax", "kimo")[k % 2], (picture(k + 3),)), ("dax", "kimo"), question=words, id=f"e{k}")


def rendered(organism: Organism, family: str) -> tuple[Any, Batch]:
    model, processor = organism(family)
    return model, Renderer(processor, model.config).render([episode(0), episode(1, "a longer question?")])


@torch.no_grad()
def logits(model: Any, batch: Batch) -> torch.Tensor:
    return model(**batch.inputs).logits


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-4 * float(b.std()) + 1e-6)  # float32, sums in another order


def test_an_appended_answer_changes_nothing_before_it(family: str, organism: Organism) -> None:
    model, batch = rendered(organism, family)
    longer = batch.append([ids[0] + ids[1] for ids in batch.candidate_ids])
    before, after = logits(model, batch), logits(model, longer)
    real = ~batch.mask("pad")
    assert close(after[:, : batch.n_pos][real], before[real])
    assert longer.query_pos.tolist() == batch.query_pos.tolist()
    if family.startswith("paligemma"):  # the control: tokens of type 0 are read by the whole prompt
        leaking = replace(batch, renderer=None).append([ids[0] + ids[1] for ids in batch.candidate_ids])
        assert not close(logits(model, leaking)[:, : batch.n_pos][real], before[real])
    for row, ids in enumerate(batch.candidate_ids):
        written = longer.inputs["input_ids"][row][longer.mask("answer")[row]].tolist()
        assert written == [*ids[0], *ids[1]]


def test_blocks_of_a_repeated_batch_are_the_batch(family: str, organism: Organism) -> None:
    model, batch = rendered(organism, family)
    blocks = logits(model, batch.repeat(3)).chunk(3)
    once = logits(model, batch)[~batch.mask("pad")]
    assert all(close(block[~batch.mask("pad")], once) for block in blocks)
    every = batch.repeat(2).append([ids[j] for j in range(2) for ids in batch.candidate_ids])
    assert every.n == 4
    assert every.answers == batch.answers * 2
    alone = logits(model, batch.append([ids[1] for ids in batch.candidate_ids]))
    assert close(logits(model, every)[2:, : batch.n_pos][~batch.mask("pad")], alone[:, : batch.n_pos][~batch.mask("pad")])


def test_chosen_rows_give_the_logits_they_gave_in_company(family: str, organism: Organism) -> None:
    model, batch = rendered(organism, family)
    one = batch.append([ids[0] for ids in batch.candidate_ids]).select([1])
    both = batch.append([ids[0] for ids in batch.candidate_ids])
    assert one.n == 1
    assert one.episodes == batch.episodes[1:]
    assert close(logits(model, one)[0, int(one.query_pos[0])], logits(model, both)[1, int(both.query_pos[1])])
    assert one.inputs["input_ids"][0][one.mask("answer")[0]].tolist() == list(batch.candidate_ids[1][0])


def test_pixels_change_their_type_and_ids_do_not(organism: Organism) -> None:
    _, batch = rendered(organism, "llava")
    half = batch.to("cpu", torch.bfloat16)
    assert half.inputs["pixel_values"].dtype == torch.bfloat16
    assert half.inputs["input_ids"].dtype == torch.int64
    assert half.select([0]).inputs["pixel_values"].dtype == torch.bfloat16


def hand_made(**more: Any) -> Batch:
    """pad, instruction, image of shot 0, its label, image of shot 1, its label of two tokens, image of the query, glue."""
    row = (
        Span("pad", 0, 1),
        Span("instruction", 1, 2),
        Span("image", 2, 4, 0, 0, "a"),
        Span("label", 4, 5, 0, None, "a"),
        Span("image", 5, 6, 1, 1, "b"),
        Span("label", 6, 8, 1, None, "b"),
        Span("image", 8, 9, QUERY, 2, "b"),
        Span("glue", 9, 10),
    )
    ids = torch.arange(20).view(2, 10)
    return Batch({"input_ids": ids, **more}, (row, row), (1, 0), (("a", "b"), ("b", "a")), (((1,), (2, 3)), ((2, 3), (1,))))


def where(mask: torch.Tensor) -> list[int]:
    return mask.nonzero()[:, 0].tolist()


def test_masks_combine_role_shot_picture_and_rightness() -> None:
    batch = hand_made()
    assert where(batch.mask("label")[0]) == [4, 6, 7]
    assert where(batch.mask("label", right=True)[0]) == [6, 7]
    assert where(batch.mask("label", right=False)[0]) == [4]
    assert where(batch.mask("image", right=True)[1]) == [5]
    assert where(batch.mask("image")[0]) == [2, 3, 5, 8]
    assert where(batch.mask("image", shot=QUERY)[0]) == [8]
    assert where(batch.mask(image=0)[0]) == [2, 3]
    assert where(batch.mask(shot=1)[0]) == [5, 6, 7]
    assert where(batch.mask(shot=NO_SHOT)[0]) == [0, 1, 9]
    assert where(batch.mask()[0]) == list(range(10))
    assert batch.query_pos.tolist() == [9, 9]
    assert batch.token_roles()[1][:3] == ["pad", "instruction", "image"]
    assert len(batch) == batch.n == 2


def test_a_hand_made_batch_is_indexed_by_row() -> None:
    batch = hand_made(attention_mask=torch.ones(2, 10, dtype=torch.long))
    assert [b.inputs["input_ids"][0, 0].item() for b in batch.rows()] == [0, 10]
    assert batch.select([1, 0]).answers == (0, 1)
    assert [b.n for b in batch.repeat(2).split(3)] == [3, 1]
    assert next(batch.split(5)) is batch


def test_continuations_are_padded_on_the_right_and_every_positional_input_grows() -> None:
    extra = {
        "attention_mask": torch.ones(2, 10, dtype=torch.long),
        "token_type_ids": torch.ones(2, 10, dtype=torch.long),
        "mm_token_type_ids": torch.ones(2, 10, dtype=torch.long),
        "cross_attention_mask": torch.arange(40).view(2, 10, 2, 1),
        "pixel_values": torch.zeros(6, 3),
    }
    longer = hand_made(**extra).append([[7], [8, 9]])
    assert longer.inputs["input_ids"][:, 10:].tolist()[1] == [8, 9]
    assert longer.inputs["attention_mask"][:, 10:].tolist() == [[1, 0], [1, 1]]
    assert longer.inputs["token_type_ids"][:, 10:].sum() == 0
    assert longer.inputs["mm_token_type_ids"][:, 10:].sum() == 0
    assert longer.inputs["cross_attention_mask"][:, 10:].flatten(2).tolist() == [[[18, 19]] * 2, [[38, 39]] * 2]
    assert longer.inputs["pixel_values"].shape == (6, 3)
    assert [s.role for s in longer.spans[0][-2:]] == ["answer", "pad"]
    assert longer.spans[1][-1] == Span("answer", 10, 12, QUERY, None, "b")
    assert [s.start for s in longer.spans[0]] == [0, *[s.stop for s in longer.spans[0][:-1]]]
    assert longer.query_pos.tolist() == [9, 9]
    assert hand_made().append([[], []]).n_pos == 10


def test_runs_merge_only_neighbours_that_say_the_same() -> None:
    a, b = Span("label", 0, 0, 0), Span("label", 0, 0, 1)
    assert runs([a, a, b, None, None, a]) == (
        Span("label", 0, 2, 0),
        Span("label", 2, 3, 1),
        Span("glue", 3, 5),
        Span("label", 5, 6, 0),
    )
    assert runs([]) == ()


def test_what_cannot_be_done_is_refused() -> None:
    batch = hand_made()
    with pytest.raises(OptionError, match="one continuation per prompt"):
        batch.append([[1]])
    with pytest.raises(OptionError, match="at least 1"):
        batch.repeat(0)
    with pytest.raises(OptionError, match="at least 1"):
        next(batch.split(0))
    with pytest.raises(OptionError, match="row numbers below 2"):
        batch.select([2])
    with pytest.raises(OptionError, match="one row per prompt"):
        hand_made(pixel_values=torch.zeros(5, 3)).select([0])
    with pytest.raises(OptionError, match="role must be one of"), unchecked():
        batch.mask("labels")  # pyright: ignore[reportArgumentType]


def test_what_fills_up_shorter_continuations_is_no_picture(organism: Any) -> None:
    """PaliGemma's prompt begins with pictures where there is no instruction: its first token would be one more of them."""
    model, processor = organism("paligemma")
    picture = Image.new("RGB", (56, 56))
    one = Episode((Shot("dax", (picture,)), Shot("kimo", (picture,))), Shot("dax", (picture,)), ("dax", "kimo"), "", "What?")
    batch = Renderer(processor, model.config).render([one]).repeat(2)
    assert batch.token_roles()[0][0] == "image"
    longer = batch.append([[5], [5, 6, 7]])
    image = Renderer(processor, model.config).image_token_id
    assert int((longer.inputs["input_ids"] == image).sum()) == int((batch.inputs["input_ids"] == image).sum())
