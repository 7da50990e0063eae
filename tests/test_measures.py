"""Every measure on attention written by hand, where the answer can be read off."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mechicl.analysis.heads import measures
from mechicl.errors import EmptySpanError, OptionError

YES, NO = True, False


def bools(*values: bool) -> Tensor:
    return torch.tensor([values])


def test_a_head_that_reads_the_previous_token_scores_one_and_a_uniform_head_its_share() -> None:
    n = 6
    previous = torch.eye(n).roll(-1, 1).tril()
    previous[0, 0] = 1
    uniform = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    rows = torch.stack([previous, uniform])[None]
    dest, reads = torch.arange(n), (torch.arange(n) >= 1)[None]
    found = measures.back(rows, dest, reads, 1)
    assert found[0, 0] == 1
    assert found[0, 1] == pytest.approx((1 / torch.arange(2, n + 1)).mean().item())
    assert measures.back(rows, dest, torch.arange(n)[None] >= 2, 2)[0, 0] == 0


def test_the_token_k_back_is_counted_from_the_row_and_only_rows_that_count_count() -> None:
    rows = torch.zeros(1, 1, 3, 8)
    rows[0, 0, 0, 3], rows[0, 0, 1, 4], rows[0, 0, 2, 0] = 0.6, 0.2, 0.9  # rows are positions 5, 6, 7
    dest = torch.tensor([5, 6, 7])
    assert measures.back(rows, dest, bools(YES, YES, NO), 2)[0, 0] == pytest.approx(0.4)
    assert measures.back(rows, dest, bools(NO, NO, YES), 7)[0, 0] == pytest.approx(0.9)
    assert measures.back(rows, dest, bools(NO, NO, NO), 2).isnan().all()
    with pytest.raises(OptionError, match="k must be at least 1"):
        measures.back(rows, dest, bools(YES, YES, YES), 0)


def test_the_sink_is_each_prompts_own_first_token() -> None:
    rows = torch.zeros(2, 1, 1, 4)
    rows[0, 0, 0, 0], rows[1, 0, 0, 2] = 0.7, 0.4  # the second prompt begins at position 2
    assert measures.sink(rows, torch.tensor([0, 2]), torch.ones(2, 1, dtype=torch.bool))[:, 0].tolist() == pytest.approx([0.7, 0.4])


def test_a_uniform_row_gives_every_other_place_the_same() -> None:
    row = torch.full((1, 1, 1, 5), 0.2)
    assert measures.elsewhere(row, row[..., 0], torch.tensor([[4]]))[0, 0, 0] == pytest.approx(0.2)


def test_mass_is_summed_over_the_tokens_of_a_group_and_padding_belongs_to_none() -> None:
    rows = torch.tensor([[[0.1, 0.2, 0.3, 0.4]]])
    mass = measures.group_mass(rows, torch.tensor([[-1, 0, 0, 2]]), 3)
    assert mass[0, 0].tolist() == pytest.approx([0.5, 0.0, 0.4])
    stacked = measures.group_mass(rows[:, :, None].expand(-1, -1, 2, -1), torch.tensor([[-1, 0, 0, 2]]), 3)
    assert torch.equal(stacked[:, :, 1], mass)


RIGHT, WRONG = bools(YES, NO, YES, NO), bools(NO, YES, NO, YES)


@pytest.mark.parametrize(
    ("mass", "induction", "per_exemplar", "tila", "tla"),
    [
        ([0.5, 0.0, 0.5, 0.0], 1.0, 0.5, 0.5, 1.0),  # looks only at right labels
        ([1.0, 0.0, 0.0, 0.0], 1.0, 0.5, 0.5, 1.0),  # at one of them
        ([0.25, 0.25, 0.25, 0.25], 0.0, 0.0, 0.25, 1.0),  # at every label alike: no induction, whatever it looks at
        ([0.0, 0.5, 0.0, 0.5], -1.0, -0.5, 0.0, 1.0),  # at wrong ones
        ([0.2, 0.1, 0.0, 0.1], 0.0, 0.0, 0.1, 0.4),
    ],
)
def test_label_measures_of_heads_whose_attention_is_known(
    mass: list[float], induction: float, per_exemplar: float, tila: float, tla: float
) -> None:
    m = torch.tensor([[mass]])
    assert measures.induction(m, RIGHT, WRONG).item() == pytest.approx(induction)
    assert measures.induction_per_exemplar(m, RIGHT, WRONG).item() == pytest.approx(per_exemplar)
    assert measures.tila(m, RIGHT).item() == pytest.approx(tila)
    assert measures.tla(m, RIGHT | WRONG).item() == pytest.approx(tla)


def test_the_papers_induction_passes_a_head_that_looks_at_any_label_and_the_matched_contrast_does_not() -> None:
    mass, total = torch.tensor([[[0.25, 0.25, 0.25, 0.25]]]), torch.ones(1, 1)
    paper = measures.induction_paper(mass, total, RIGHT, torch.ones(1, 4, dtype=torch.long), torch.tensor([100]))
    assert paper.item() == pytest.approx(0.5 / 2 - 0.5 / 98)
    assert measures.induction(mass, RIGHT, WRONG).item() == pytest.approx(0.0)


def test_the_papers_induction_averages_over_label_tokens() -> None:
    """Right labels of two and three tokens hold 0.5 together: a mean of 0.1 over five tokens, against 0.5 over the other five."""
    mass, total = torch.tensor([[[0.2, 0.0, 0.3, 0.0]]]), torch.ones(1, 1)
    paper = measures.induction_paper(mass, total, RIGHT, torch.tensor([[2, 1, 3, 1]]), torch.tensor([10]))
    assert paper.item() == pytest.approx(0.5 / 5 - 0.5 / 5, abs=1e-6)  # float32


def test_what_a_sink_without_a_token_takes_belongs_to_no_position() -> None:
    mass = torch.tensor([[[0.4, 0.0, 0.0, 0.0]]])
    ones, n = torch.ones(1, 4, dtype=torch.long), torch.tensor([10])
    half = measures.induction_paper(mass, torch.full((1, 1), 0.4), RIGHT, ones, n)
    assert half.item() == pytest.approx(0.4 / 2)


@pytest.mark.parametrize("name", ["induction", "induction_per_exemplar"])
def test_a_prompt_without_right_or_wrong_exemplars_is_refused(name: str) -> None:
    mass = torch.ones(1, 1, 4) / 4
    with pytest.raises(EmptySpanError, match="right must mark"):
        getattr(measures, name)(mass, bools(NO, NO, NO, NO), WRONG)
    with pytest.raises(EmptySpanError, match="wrong must mark"):
        getattr(measures, name)(mass, RIGHT, bools(NO, NO, NO, NO))


def test_a_label_that_reads_its_own_item_scores_one_and_the_first_exemplar_is_left_out() -> None:
    own = torch.eye(3)[None, None].clone()
    known = bools(YES, YES, YES)
    assert measures.ila(own, known).item() == 1
    own[..., 0, 0] = 0.0  # the first label has no other item to look at
    assert measures.ila(own, known).item() == 1
    assert measures.ila(own, bools(YES, YES, NO)).item() == 1
    own[..., 1, 1] = 0.5
    assert measures.ila(own, known).item() == pytest.approx(0.75)
    assert measures.ila(own, bools(YES, NO, NO)).isnan().all()


def test_duplicates_are_earlier_showings_of_the_same_item_never_later_ones() -> None:
    identity = torch.tensor([[0, 1, 0, 1, 0]])  # the query, last, has two earlier showings
    weights = measures.duplicate_weights(identity)
    assert weights[0].nonzero().tolist() == [[2, 0], [3, 1], [4, 0], [4, 2]]
    mass = torch.zeros(1, 1, 5, 5)
    mass[..., 2, 0], mass[..., 3, 1], mass[..., 4, 0], mass[..., 4, 2] = 1.0, 1.0, 0.5, 0.5
    assert measures.duplicate(mass, identity).item() == pytest.approx(1.0)
    assert measures.duplicate(mass.transpose(2, 3), identity).item() == pytest.approx(0.0)
    assert measures.duplicate(mass, torch.tensor([[0, 1, 2, 3, 4]])).isnan().all()
    assert measures.duplicate(mass, torch.tensor([[0, -1, 0, -1, -1]])).item() == pytest.approx(
        1.0
    )  # no item is not a duplicate of no item


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.integers(1, 14))
@settings(deadline=None)
def test_contrasts_are_bounded_change_sign_with_the_roles_and_forget_what_all_labels_share(mass: list[float], pattern: int) -> None:
    right = torch.tensor([[bool(pattern >> k & 1) for k in range(4)]])
    m = torch.tensor([[mass]]) / max(1.0, sum(mass))
    n_right, n_wrong = int(right.sum()), int((~right).sum())
    score = measures.induction(m, right, ~right).item()
    assert -n_right - 1e-6 <= score <= 1 + 1e-6
    assert measures.induction(m + 0.1, right, ~right).item() == pytest.approx(score, abs=1e-6)
    per = measures.induction_per_exemplar(m, right, ~right).item()
    assert per * n_right == pytest.approx(score, abs=1e-6)  # the two differ by the number of right exemplars only
    assert measures.induction_per_exemplar(m, ~right, right).item() == pytest.approx(-per, abs=1e-6)
    assert measures.tila(m, right).item() * n_right + measures.tila(m, ~right).item() * n_wrong == pytest.approx(
        measures.tla(m, right | ~right).item(), abs=1e-6
    )
