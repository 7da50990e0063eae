"""What a head's attention is measured by: functions of tensors, knowing no model.

Attention is after the softmax; rows are `[batch head dest src]`, or `[batch head src]` for the query's last token, the one that predicts the answer.
A label or an item may be several tokens: its **mass** is the attention summed over them. A picture's item tokens are its image tokens.

Every measure that compares exemplars is linear in their masses: score = sum over exemplars of weight times mass. The weights are functions of
their own (`*_weights`), with any number of leading axes, because a null distribution is the same sum with the labels shuffled.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechicl.errors import EmptySpanError, OptionError

# -- where the previous token is ------------------------------------------------------------------------------------------------------------------


def back(
    rows: Float[Tensor, "batch head dest src"], dest: Int[Tensor, " dest"], reads: Bool[Tensor, "batch dest"], k: int = 1
) -> Float[Tensor, "batch head"]:
    """Attention of each token to the one k before it: the previous-token score for k = 1.

    Args:
        rows: Attention of the positions `dest`.
        dest: Which position each row is.
        reads: Rows that count, e.g. text tokens with k real tokens before them. With all tokens, pictures included, this is the paper's own
            score on production models; text rows only is ours, because image tokens dilute it.
        k: How far back.

    Returns:
        Mean over the rows that count, probability, in [0, 1]; NaN for a prompt with no such row.

    Raises:
        OptionError: k is below one.

    Source:
        Huang et al. 2026 (PH), after Olsson et al. 2022. Differs: text rows, each prompt weighing the same.
    """
    if k < 1:
        raise OptionError(f"k must be at least 1; got {k}. 1 is the previous token.")
    counted = reads & (dest >= k)
    src = (dest - k).clamp_min(0)
    diagonal = rows.gather(3, src[None, None, :, None].expand(*rows.shape[:3], 1))[..., 0]
    return torch.where(counted[:, None], diagonal, 0.0).sum(-1) / counted.sum(-1)[:, None]


def sink(
    rows: Float[Tensor, "batch head dest src"], first: Int[Tensor, " batch"], reads: Bool[Tensor, "batch dest"]
) -> Float[Tensor, "batch head"]:
    """Attention to the first token of the prompt.

    Args:
        rows: Attention of some positions.
        first: Position of each prompt's first real token.
        reads: Rows that count.

    Returns:
        Mean over the rows that count, probability, in [0, 1]; NaN for a prompt with no such row.

    Source:
        Xiao et al. 2023 (attention sinks).
    """
    taken = rows.gather(3, first[:, None, None, None].expand(*rows.shape[:3], 1))[..., 0]
    return torch.where(reads[:, None], taken, 0.0).sum(-1) / reads.sum(-1)[:, None]


def elsewhere(
    rows: Float[Tensor, "batch head dest src"], taken: Float[Tensor, "batch head dest"], place: Int[Tensor, "batch dest"]
) -> Float[Tensor, "batch head dest"]:
    """Attention per token to all places but the one in question: what `back` or `sink` would be if any other place were read instead.

    Args:
        rows: Attention of some positions.
        taken: Attention of each row to the place in question.
        place: Tokens before each row in its prompt: together with the row itself, less the place in question, the others that it can read.
    """
    return (rows.sum(-1) - taken) / place.clamp_min(1)[:, None]


# -- masses ---------------------------------------------------------------------------------------------------------------------------------------


def group_mass(
    rows: Float[Tensor, "batch head *dest src"], group: Int[Tensor, "batch src"], n_groups: int
) -> Float[Tensor, "batch head *dest group"]:
    """Attention summed over the tokens of each group.

    Args:
        rows: Attention.
        group: For each position the group it belongs to, -1 for none.
        n_groups: Groups are 0..n_groups - 1.

    Returns:
        Mass per group, probability. A group without tokens gets 0.
    """
    owner = torch.nn.functional.one_hot(group + 1, n_groups + 1)[..., 1:].to(rows.dtype)
    return torch.einsum("bh...s,bsg->bh...g", rows, owner)


def weighted(mass: Float[Tensor, "batch head cell"], weights: Float[Tensor, "batch cell"]) -> Float[Tensor, "batch head"]:
    """The sum over cells (exemplars, pairs of items) of weight times mass."""
    return torch.einsum("bhc,bc->bh", mass, weights)


def _check_both(right: Tensor, wrong: Tensor) -> None:
    for name, mask in (("right", right), ("wrong", wrong)):
        if not bool(mask.any(-1).all()):
            raise EmptySpanError(
                f"{name} must mark at least one exemplar of every prompt; a prompt has none. Show at least two labels, the answer among them."
            )


# -- from the query to the exemplars' labels ------------------------------------------------------------------------------------------------------


def induction_weights(
    right: Bool[Tensor, "*draw batch shot"], wrong: Bool[Tensor, "*draw batch shot"]
) -> Float[Tensor, "*draw batch shot"]:
    """+1 for right exemplars; wrong ones share minus as much."""
    right_, wrong_ = right.float(), wrong.float()
    return right_ - wrong_ * right_.sum(-1, keepdim=True) / wrong_.sum(-1, keepdim=True)


def induction(
    mass: Float[Tensor, "batch head shot"], right: Bool[Tensor, "batch shot"], wrong: Bool[Tensor, "batch shot"]
) -> Float[Tensor, "batch head"]:
    """Attention from the query to the right labels, minus what as many wrong labels get: the matched contrast.

    1: the head looks only at the right labels; 0: it does not tell them apart, however much it looks at labels.

    Args:
        mass: Attention of the query's last token to each exemplar's label, summed over the label's tokens.
        right: Exemplars whose label is the answer.
        wrong: The other exemplars.

    Returns:
        Probability, in [-n_right, 1].

    Raises:
        EmptySpanError: a prompt has no right or no wrong exemplar.

    Source:
        Huang et al. 2026 (IH of the toy), times the number of right exemplars, so that 1 is the most it can be whatever the number of shots.
        `induction_per_exemplar` is theirs.
    """
    _check_both(right, wrong)
    return weighted(mass, induction_weights(right, wrong))


def induction_per_exemplar_weights(
    right: Bool[Tensor, "*draw batch shot"], wrong: Bool[Tensor, "*draw batch shot"]
) -> Float[Tensor, "*draw batch shot"]:
    """1 / n_right for right exemplars, -1 / n_wrong for wrong ones."""
    right_, wrong_ = right.float(), wrong.float()
    return right_ / right_.sum(-1, keepdim=True) - wrong_ / wrong_.sum(-1, keepdim=True)


def induction_per_exemplar(
    mass: Float[Tensor, "batch head shot"], right: Bool[Tensor, "batch shot"], wrong: Bool[Tensor, "batch shot"]
) -> Float[Tensor, "batch head"]:
    """Mean attention to a right label minus mean attention to a wrong label.

    Args:
        mass: Attention of the query's last token to each exemplar's label, summed over the label's tokens.
        right: Exemplars whose label is the answer.
        wrong: The other exemplars.

    Returns:
        Probability, in [-1, 1]; at most 1 / n_right.

    Raises:
        EmptySpanError: a prompt has no right or no wrong exemplar.

    Source:
        Huang et al. 2026 (IH of the toy). Differs: a label's tokens are summed.
    """
    _check_both(right, wrong)
    return weighted(mass, induction_per_exemplar_weights(right, wrong))


def induction_paper_weights(
    right: Bool[Tensor, "*draw batch shot"], n_tokens: Int[Tensor, "batch shot"], n_real: Int[Tensor, " batch"]
) -> Float[Tensor, "*draw batch cell"]:
    """Weights of the exemplars' masses and, in the last cell, of the whole row's mass; see `induction_paper`."""
    inside = (right * n_tokens).sum(-1, keepdim=True).float()
    outside = n_real[:, None] - inside
    return torch.cat([right * (1 / inside + 1 / outside), -1 / outside], -1)


def induction_paper(
    mass: Float[Tensor, "batch head shot"],
    total: Float[Tensor, "batch head"],
    right: Bool[Tensor, "batch shot"],
    n_tokens: Int[Tensor, "batch shot"],
    n_real: Int[Tensor, " batch"],
) -> Float[Tensor, "batch head"]:
    """Mean attention to every token of the right answer's occurrences minus the mean to all other positions.

    A head that looks at any label passes, because its baseline is the whole prompt: read `induction` beside it.

    Args:
        mass: Attention of the query's last token to each exemplar's label, summed over the label's tokens.
        total: Sum of the row, 1 unless the model has an attention sink without a token.
        right: Exemplars whose label is the answer.
        n_tokens: Tokens of each exemplar's label.
        n_real: Tokens of each prompt, padding left out.

    Returns:
        Probability, in [-1, 1].

    Raises:
        EmptySpanError: a prompt has no right exemplar.

    Source:
        Huang et al. 2026 (IH on production models).
    """
    _check_both(right, right)
    return weighted(torch.cat([mass, total[..., None]], -1), induction_paper_weights(right, n_tokens, n_real))


def tila_weights(right: Bool[Tensor, "*draw batch shot"]) -> Float[Tensor, "*draw batch shot"]:
    """1 / n_right for right exemplars."""
    right_ = right.float()
    return right_ / right_.sum(-1, keepdim=True)


def tila(mass: Float[Tensor, "batch head shot"], right: Bool[Tensor, "batch shot"]) -> Float[Tensor, "batch head"]:
    """Mean attention from the query to a right exemplar's label (target in-context label attention).

    With the masses of the items in place of the labels this is TIIA, target in-context item attention.

    Args:
        mass: Attention of the query's last token to each exemplar's label (or item), summed over its tokens.
        right: Exemplars whose label is the answer.

    Returns:
        Probability, in [0, 1]; at most 1 / n_right.

    Raises:
        EmptySpanError: a prompt has no right exemplar.

    Source:
        Huang et al. 2026 (TILA, TIIA), after Reddy 2024.
    """
    _check_both(right, right)
    return weighted(mass, tila_weights(right))


def tla(mass: Float[Tensor, "batch head shot"], known: Bool[Tensor, "batch shot"]) -> Float[Tensor, "batch head"]:
    """Attention from the query to all the exemplars' labels together (total label attention).

    Args:
        mass: Attention of the query's last token to each exemplar's label, summed over the label's tokens.
        known: Exemplars that exist (prompts may have fewer than the batch's most).

    Returns:
        Probability, in [0, 1].

    Source:
        Huang et al. 2026 (TLA). Differs: every label of the context, where the released code sums five.
    """
    return weighted(mass, known.float())


# -- between exemplars ----------------------------------------------------------------------------------------------------------------------------


def ila(mass: Float[Tensor, "batch head dest_shot shot"], known: Bool[Tensor, "batch shot"]) -> Float[Tensor, "batch head"]:
    """Attention from a label to its own item: the first step of the circuit, where each label learns what it is the label of.

    The first exemplar is left out: its label has no other item to look at, so its attention tells nothing.

    Args:
        mass: Attention of each exemplar's label to each exemplar's item, summed over the item's tokens. (Of a label's several rows the caller
            chooses: `score_heads` takes the row that looks most, since one row is enough to fetch the item.)
        known: Exemplars that exist.

    Returns:
        Mean over exemplars, probability, in [0, 1]; NaN for a prompt with one exemplar.

    Source:
        Reddy 2024 (ILA). Differs: the first exemplar is left out; labels and items of several tokens.
    """
    counted = known.clone()
    counted[:, 0] = False
    own = mass.diagonal(dim1=-2, dim2=-1)
    return torch.where(counted[:, None], own, 0.0).sum(-1) / counted.sum(-1)[:, None]


def duplicate_weights(identity: Int[Tensor, "*draw batch item"]) -> Float[Tensor, "*draw batch dest_item item"]:
    """1 / (items seen before) where the row's item was seen earlier as the column's. Identities below zero are no item."""
    same = (identity[..., :, None] == identity[..., None, :]) & (identity[..., :, None] >= 0)
    n = identity.shape[-1]
    earlier = same & torch.ones(n, n, dtype=torch.bool, device=identity.device).tril(-1)
    return earlier.float() / earlier.any(-1).sum(-1)[..., None, None]


def duplicate(mass: Float[Tensor, "batch head dest_item item"], identity: Int[Tensor, "batch item"]) -> Float[Tensor, "batch head"]:
    """Attention from an item to its earlier showings.

    Pictures are matched by what they show, never by token, since all image tokens share one id.

    Args:
        mass: Attention of each item's last token (the first that has seen all of it) to each item, summed over the item's tokens. The query's
            item is the last one.
        identity: What each item is, equal numbers for equal items, below zero where there is no item.

    Returns:
        Mean over items that were shown before, probability, in [0, 1]; NaN for a prompt where nothing is shown twice.

    Source:
        Wang et al. 2022 (duplicate-token heads). Differs: items instead of tokens.
    """
    return torch.einsum("bhij,bij->bh", mass, duplicate_weights(identity))
