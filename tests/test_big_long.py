"""Prompts of 16k tokens: attention is read by rows; a pattern of [head, dest, src] never exists."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.long_prompts import HEADS, LAYERS, tiny

PATTERN = HEADS * 16384 * 16384 * 4 / 2**20
"""Megabytes of one layer's pattern at 16,384 tokens: 4,096."""


def test_rows_of_16k_tokens_take_a_small_part_of_one_pattern() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "benchmarks.long_prompts", "one", "16384", "rows"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert float(out.stdout.split()[1]) < PATTERN / 8  # 60 MB measured, for the rows of 2,048 tokens in both layers


def test_rows_are_those_of_the_pattern() -> None:
    model = tiny()
    ids = torch.randint(0, 490, (1, 1500), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    dest = torch.arange(0, 1500, 3)
    rows = model.attention_rows(batch, dest)  # type: ignore[attr-defined]
    _, cache = model.run_with_cache(batch, names_filter=[f"blocks.{k}.attn.hook_pattern" for k in range(LAYERS)])  # type: ignore[attr-defined]
    for layer in range(LAYERS):
        torch.testing.assert_close(rows[layer], cache[f"blocks.{layer}.attn.hook_pattern"][:, :, dest], atol=1e-6, rtol=1e-4)
