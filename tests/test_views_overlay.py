"""Attention on the prompt: the right patch lights up, every token is there once, and the page's data are the result's data."""

from __future__ import annotations

import base64
from dataclasses import replace

import numpy as np
import pytest
import views_samples as samples

from mechicl.errors import HeadIndexError, ImageError, NotFiniteError, OptionError
from mechicl.views.overlay import Picture, attention_row, overlay_picture, picture_grid
from mechicl.views.strip import Token, strip


def looking_at(position: int):
    view = samples.prompt()
    row = np.zeros(len(view.tokens))
    row[position] = 1
    return replace(view, rows={(1, 0): row}, patterns={})


def test_only_the_patch_that_is_looked_at_is_tinted() -> None:
    view = samples.prompt()
    position, box = list(view.image_boxes[1].items())[3]
    painted = np.asarray(overlay_picture(looking_at(position), (1, 0), 1, size=56)).astype(int)
    tinted = (painted.max(-1) - painted.min(-1)) > 20  # grey has equal channels
    left, upper, right, lower = (round(2 * v) for v in box)
    assert tinted[upper:lower, left:right].all()
    tinted[upper:lower, left:right] = False
    assert not tinted.any()


def test_a_picture_nobody_looks_at_stays_grey() -> None:
    view = looking_at(0)
    painted = np.asarray(overlay_picture(view, (1, 0), 0)).astype(int)
    assert (painted.max(-1) == painted.min(-1)).all()


def test_pictures_without_known_patches_are_refused() -> None:
    view = replace(samples.prompt(), image_boxes=({}, {}, {}, {}, {}))
    with pytest.raises(OptionError, match="known patches"):
        overlay_picture(view, (1, 0), 0)
    with pytest.raises(OptionError, match="known patches"):
        overlay_picture(samples.prompt(), (1, 0), 9)


def test_shares_in_the_grid_are_sums_over_the_pictures_patches() -> None:
    view = samples.prompt()
    (row,) = picture_grid(view, [(1, 0)])
    for picture, box in zip(row.pictures, view.image_boxes, strict=True):
        assert picture.share == pytest.approx(sum(view.rows[(1, 0)][p] for p in box))
        assert [p.share for p in picture.patches] == [view.rows[(1, 0)][p] for p in sorted(box)]
    assert row.top == max(p.share for q in row.pictures for p in q.patches)
    assert max(p.glow for q in row.pictures for p in q.patches) == row.top / max(row.top, 0.02)
    assert [q.kind for q in row.pictures] == ["right", "wrong", "right", "wrong", "query"]


def test_label_to_image_heads_are_read_from_each_examples_own_label() -> None:
    view = samples.prompt()
    (row,) = picture_grid(view, [(0, 1)], own_label={(0, 1)})
    second = row.pictures[1]
    readers = [p for p in range(len(view.tokens)) if view.shots[p] == 1 and view.roles[p] == "label"]
    readers += [readers[-1] + 1, readers[-1] + 2]  # the line break that closes the turn, and the next turn's head
    best = max(readers, key=lambda r: sum(view.patterns[(0, 1)][r][p.position] for p in second.patches))
    assert [p.share for p in second.patches] == [view.patterns[(0, 1)][best][p.position] for p in second.patches]
    assert [p.share for p in row.pictures[-1].patches] == [view.rows[(0, 1)][p.position] for p in row.pictures[-1].patches]


def test_pictures_that_get_next_to_nothing_do_not_light_up() -> None:
    view = samples.prompt()
    row = view.rows[(1, 0)].copy()
    row[[p for box in view.image_boxes for p in box]] = 1e-4
    (drawn,) = picture_grid(replace(view, rows={(1, 0): row}, patterns={}), [(1, 0)])
    assert max(p.glow for q in drawn.pictures for p in q.patches) == pytest.approx(1e-4 / 0.02)


def test_heads_keep_the_name_of_their_group() -> None:
    drawn = strip(samples.prompt(), {"induction": [(1, 0), (1, 1)], "label-to-image": [(0, 1)], "none": []})
    assert drawn.heads == (("induction", ("1.0", "1.1")), ("label-to-image", ("0.1",)))
    assert list(drawn.data["heads"]) == ["1.0", "1.1", "0.1"]  # type: ignore[call-overload]


def test_every_position_is_on_the_strip_exactly_once() -> None:
    view = samples.prompt(per_image=9)
    drawn = strip(view, samples.INDUCTION)
    seen: list[int] = []
    for card in drawn.cards:
        for piece in card.pieces:
            seen += [p.position for p in piece.patches] if isinstance(piece, Picture) else [piece.position]
    assert sorted(seen) == list(range(len(view.tokens)))
    assert [c.title for c in drawn.cards] == ["instruction", "example 1", "example 2", "example 3", "example 4", "query"]
    assert [c.kind for c in drawn.cards] == ["other", "right", "wrong", "right", "wrong", "query"]


def test_a_prompt_without_shots_or_pictures_is_one_card() -> None:
    view = replace(samples.prompt(), shots=(-2,) * 57, image_boxes=({},) * 5)
    drawn = strip(view)
    assert sum(isinstance(p, Token) for c in drawn.cards for p in c.pieces) == 57


def test_the_strips_data_are_the_patterns() -> None:
    view = samples.prompt()
    data = strip(view, [(1, 0)]).data
    packed = data["heads"]["1.0"]  # type: ignore[index]
    numbers = np.frombuffer(base64.b64decode(packed["rows"]), dtype="<u2").reshape(packed["n"], -1) / 65535
    np.testing.assert_allclose(numbers, view.patterns[(1, 0)], atol=1 / 65535)  # sixteen bits
    assert data["tokens"] == list(view.tokens)


def test_heads_beyond_the_pages_budget_carry_their_last_row_only() -> None:
    view = samples.prompt(per_image=100)
    drawn = strip(view, samples.INDUCTION).data["heads"]
    assert [packed["n"] for packed in drawn.values()] == [537, 1, 1, 1]  # type: ignore[attr-defined]
    numbers = np.frombuffer(base64.b64decode(drawn["1.3"]["rows"]), dtype="<u2") / 65535  # type: ignore[index]
    np.testing.assert_allclose(numbers, view.rows[(1, 3)], atol=1 / 65535)  # sixteen bits
    assert sum(len(packed["rows"]) for packed in drawn.values()) < 1_500_000  # type: ignore[attr-defined]


def test_control_tokens_lose_their_brackets_and_nothing_else_does() -> None:
    view = replace(samples.prompt(), tokens=("<|im_start|>", "<b>x", *samples.prompt().tokens[2:]))
    shown = [p.text for c in strip(view).cards for p in c.pieces if isinstance(p, Token)]
    assert shown[:3] == ["im_start", "<b>x", "the"]


def test_bad_attention_and_bad_pictures_are_refused() -> None:
    view = samples.prompt()
    with pytest.raises(HeadIndexError, match="must be one that was kept"):
        attention_row(view, (2, 2))
    with pytest.raises(OptionError, match="one number per token"):
        attention_row(replace(view, rows={(1, 0): np.ones(3)}), (1, 0))
    with pytest.raises(NotFiniteError, match="must be finite"):
        attention_row(replace(view, rows={(1, 0): np.full(57, np.nan)}), (1, 0))
    with pytest.raises(OptionError, match="must be the last token"):
        attention_row(replace(view, patterns={}), (1, 0), 3)
    with pytest.raises(ImageError, match="PNG or JPEG"):
        strip(replace(view, images=(b"no picture",) * 5))


def test_large_pictures_shrink_and_their_boxes_do_not() -> None:
    view = replace(samples.prompt(), images=tuple(samples.picture(k, 800) for k in range(5)))
    drawn = picture_grid(view, [(1, 0)])[0].pictures[0]
    assert (drawn.width, drawn.height) == (800, 800)
    assert drawn.uri.startswith("data:image/jpeg;base64,")
    assert len(drawn.uri) < 80_000
