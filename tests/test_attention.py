"""The registered attention function by itself: score terms, sinks, masks and chunks against a few lines of plain torch."""

import math

import pytest
import torch
from torch import nn

from mechicl.errors import UnsupportedModelError
from mechicl.models.attention import AttentionCall, check_terms, combine, explicit_chunks, fused, row_chunks, rows, softmax


def call(*, mask: torch.Tensor | None = None, causal: bool = True, seed: int = 0, n: int = 9, **terms: object) -> AttentionCall:
    g = torch.Generator().manual_seed(seed)
    module = nn.Module()
    module.num_key_value_groups = 2
    module.is_causal = causal
    q, k, v = (torch.randn(2, h, n, 8, generator=g) for h in (4, 2, 2))
    given = {k: v for k, v in terms.items() if v is not None}
    return AttentionCall(module, q, k, v, mask, 0.7, causal and mask is None, given, {**given, "is_causal": None})


def reference(c: AttentionCall, allowed: torch.Tensor) -> torch.Tensor:
    """Plain torch, head by head, no grouping and no chunks."""
    out = torch.zeros(2, 4, c.query.shape[2], c.key.shape[2])
    for b in range(2):
        for h in range(4):
            s = c.query[b, h] @ c.key[b, h // 2].T * c.scaling
            if (cap := c.terms.get("softcap")) is not None:
                s = cap * torch.tanh(s / cap)
            s = s.masked_fill(~allowed.expand(2, 4, *s.shape)[b, h], -math.inf)
            if (sink := c.terms.get("s_aux")) is not None:
                s = torch.cat([s, sink[h].expand(s.shape[0], 1)], 1)
            out[b, h] = s.softmax(-1)[:, : c.key.shape[2]]
    return out


CAUSAL = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
WINDOW = CAUSAL & ~torch.ones(9, 9, dtype=torch.bool).tril(-3)[None, None]


@pytest.mark.parametrize("terms", [{}, {"softcap": 1.5}, {"s_aux": torch.tensor([0.0, 1.0, -1.0, 3.0])}], ids=["plain", "softcap", "sinks"])
@pytest.mark.parametrize("mask", [None, CAUSAL, WINDOW], ids=["causal", "bool", "sliding"])
def test_patterns_equal_plain_torch(terms: dict[str, object], mask: torch.Tensor | None) -> None:
    c = call(mask=mask, **terms)
    dest = torch.arange(9)
    scores, allowed = rows(c, dest)
    pattern = softmax(c, scores, allowed, dest)
    # float32 softmax both ways: a few units in the last place
    assert torch.allclose(pattern, reference(c, CAUSAL if mask is None else mask), atol=1e-6)
    assert pattern.masked_fill(allowed, 0).abs().max() == 0
    total = pattern.sum(-1)
    assert (total < 0.9999).all() if "s_aux" in terms else torch.allclose(total, torch.ones(()), atol=1e-6)
    assert torch.allclose(explicit_chunks(c, max_bytes=1), combine(c, pattern), atol=1e-6)


def test_fused_output_is_that_of_the_pattern_and_falls_back_where_the_kernel_cannot() -> None:
    for terms in ({}, {"softcap": 2.0}, {"s_aux": torch.ones(4)}):
        c = call(**terms)
        dest = torch.arange(9)
        assert torch.allclose(fused(c), combine(c, softmax(c, *rows(c, dest), dest)), atol=1e-5)


def test_a_float_mask_with_the_dtypes_minimum_is_a_mask_and_its_finite_part_a_bias() -> None:
    additive = torch.zeros(1, 1, 9, 9).masked_fill(~CAUSAL, torch.finfo(torch.float32).min)
    additive[..., 0] = 2.0
    c, dest = call(mask=additive), torch.arange(9)
    scores, allowed = rows(c, dest)
    plain_scores, _ = rows(call(mask=CAUSAL), dest)
    assert torch.equal(allowed, CAUSAL)
    assert torch.allclose((scores - plain_scores)[..., 0], torch.tensor(2.0))


def test_a_row_that_may_read_nothing_is_zero_and_not_nan() -> None:
    mask = CAUSAL.clone()
    mask[..., 4, :] = False
    c, dest = call(mask=mask), torch.arange(9)
    pattern = softmax(c, *rows(c, dest), dest)
    assert pattern[:, :, 4].abs().max() == 0
    assert pattern.isfinite().all()


def test_rows_chosen_per_prompt_are_the_rows_of_the_whole_pattern() -> None:
    c, dest = call(mask=WINDOW), torch.tensor([[8, 2], [3, 7]])
    whole = softmax(c, *rows(c, torch.arange(9)), torch.arange(9))
    some = softmax(c, *rows(c, dest), dest)
    assert torch.allclose(some[1, :, 0], whole[1, :, 3])
    assert torch.allclose(some[0, :, 0], whole[0, :, 8])
    assert torch.equal(torch.cat(list(row_chunks(c, torch.arange(9), max_bytes=4 * 2 * 4 * 9 * 2))), torch.arange(9))


def test_a_term_nobody_knows_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="sparsity"):
        check_terms(call(sparsity=torch.ones(2)))
