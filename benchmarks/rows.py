"""Scoring all heads by attention rows against whole attentions, by prompt length: python -m benchmarks.rows

A few-shot prompt of eight exemplars and a query whose tokens are mostly pictures' (spans made by hand on random tokens: what attention costs does not
depend on what the tokens are). One random LLaVA-shaped decoder, float32, interleaved rounds, in one process: the plain sdpa forward; the last token's rows of all heads;
`score_heads` with every default score, nulls and intervals included; and eager attention with output_attentions=True, which has scored nothing yet. Eager is
left out where its patterns would not fit.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable

import torch

from benchmarks.measure import machine, peak_memory, ratio, rounds, table
from mechicl.analysis.heads.scoring import score_heads
from mechicl.models.probe import text_probe
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.batch import Batch
from mechicl.prompts.spans import QUERY, Span
from mechicl.training.organisms import build

N_LAYERS, N_HEADS = 4, 8
TEXT = {
    "num_hidden_layers": N_LAYERS,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": N_HEADS,
    "head_dim": 32,
}


def entries(length: int, room_gb: float) -> dict[str, Callable[[], object]]:
    """What is compared at one length."""
    hf, _ = build("llava", preset="tiny", text={**TEXT, "max_position_embeddings": 32768})
    model = HookedVLM(hf)
    inputs = text_probe(hf, n=length)
    batch = few_shot(inputs["input_ids"])
    found: dict[str, Callable[[], object]] = {
        "plain forward (sdpa)": lambda: hf(**inputs, use_cache=False, logits_to_keep=1),
        "mechicl: the last token's rows, all heads": lambda: model.attention_rows(batch),
        "mechicl: score_heads, all scores of all heads": lambda: score_heads(model, batch, progress=False),
    }
    patterns_gb = N_LAYERS * N_HEADS * length**2 * 4 / 1e9
    if 2 * patterns_gb < room_gb:
        eager, _ = build("llava", preset="tiny", text={**TEXT, "max_position_embeddings": 32768})
        eager.set_attn_implementation("eager")
        found["eager, output_attentions"] = lambda: eager(**inputs, use_cache=False, output_attentions=True, logits_to_keep=1)
    else:
        print(f"eager at {length} tokens is left out: its patterns alone take {patterns_gb:.0f} GB")
    return found


def few_shot(ids: torch.Tensor, shots: int = 8) -> Batch:
    """Eight exemplars of two classes and a query: picture, 6 glue tokens, a label of 2 tokens, 4 glue tokens each."""
    length = ids.shape[1]
    side = (length - 8 - 12 * shots - 6) // (shots + 1)
    spans, at = [Span("instruction", 0, 8)], 8
    for k in range(shots + 1):
        label = "dax" if k % 2 else "wug"
        shot = k if k < shots else QUERY
        width = side if k < shots else length - at - 6
        spans += [Span("image", at, at + width, shot, k, label, label), Span("glue", at + width, at + width + 6)]
        at += width + 6
        if k < shots:
            spans += [Span("label", at, at + 2, shot, None, label, label), Span("glue", at + 2, at + 6)]
            at += 6
    assert at == length
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, (tuple(spans),), (0,), (("wug", "dax"),), (((1,), (2,)),))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--room", type=float, default=14.0, help="memory that eager attention may take, GB")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for length in args.lengths:
        n = args.rounds if length < 10_000 else max(2, args.rounds // 3)
        with torch.no_grad():
            competitors = entries(length, args.room)
            seconds = rounds(competitors, n)
            memory = {name: peak_memory(run) for name, run in competitors.items()}
        base, base_memory = seconds["plain forward (sdpa)"], max(memory["plain forward (sdpa)"], 1.0)
        for name, s in seconds.items():
            rows.append(
                [
                    f"{length:,}",
                    name,
                    f"{statistics.median(s):.2f} s",
                    f"{ratio(s, base):.2f}x",
                    f"{memory[name]:.0f} MB",
                    f"{memory[name] / base_memory:.2f}x",
                ]
            )
    print(f"\n{N_LAYERS} layers x {N_HEADS} heads, d_model 256, float32; {machine()}\n")
    print(table(["tokens", "", "median", "time against plain", "peak memory above start", "memory against plain"], rows))


if __name__ == "__main__":
    main()
