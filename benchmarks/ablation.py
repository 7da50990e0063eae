"""Knock-outs that run what does not change once, against whole passes: python -m benchmarks.ablation

A random Qwen2.5-VL whose tower has about the share of the 3B's (a quarter of the parameters of the decoder's layers, on four patches a token) and one
few-shot prompt of five pictures; sets of heads are switched off one after the other, as the study of Huang et al. does. Twice: with the pictures seen once,
against a tower in every pass; and, pictures seen once both times, with the layers below the first head of a set run once, against every layer in every
pass. Processor seconds of this process on one thread, the two ways in turn in every round, and whether the log-probabilities are the same bits.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from time import process_time
from typing import Any

import numpy as np
import torch

from benchmarks.measure import machine, peak_memory, ratio, table
from benchmarks.rows import few_shot
from mechicl.analysis import labels
from mechicl.analysis.ablation.matched import matched_draws
from mechicl.analysis.ablation.switches import Switches
from mechicl.models.pictures import pictures_once
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.batch import Batch
from mechicl.training.organisms import build
from mechicl.training.organisms.parts import enliven

SHOTS, GRID = 4, 20
"""Exemplars, and the side of a picture in patches: four patches are a token."""


def qwen(layers: int, width: int) -> HookedVLM:
    """A Qwen2.5-VL with grouped heads and a tower in the 3B's proportion."""
    from transformers import AutoModelForImageTextToText

    config = build("qwen2_5_vl", preset="tiny")[0].config
    heads = width // 64
    config.text_config.update(
        {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads, "num_key_value_heads": heads // 3 or 1,
         "max_position_embeddings": 32768, "layer_types": ["full_attention"] * layers, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}}
    )  # fmt: skip
    config.vision_config.update(
        {"depth": 32 * layers // 36, "hidden_size": 5 * width // 8, "intermediate_size": 5 * width // 3, "num_heads": heads // 2, "out_hidden_size": width,
         "window_size": 112, "fullatt_block_indexes": list(range(2, 32 * layers // 36, 3))}
    )  # fmt: skip
    model: Any = AutoModelForImageTextToText.from_config(config).eval()
    enliven(model, torch.Generator().manual_seed(0))
    return HookedVLM(model, check=False)


def prompt(model: HookedVLM, grid: int = GRID) -> Batch:
    """Pictures of noise, each followed by its label, and a query."""
    side = grid**2 // 4
    n = 8 + 12 * SHOTS + 6 + (SHOTS + 1) * side
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, 60, (1, n), generator=generator)
    batch = few_shot(ids, SHOTS)
    pictures = batch.mask("image")
    patch = 3 * 2 * model.hf.config.vision_config.patch_size**2
    shown = {
        "input_ids": ids.masked_fill(pictures, model.hf.config.image_token_id),
        "mm_token_type_ids": pictures.long(),
        "pixel_values": torch.randn((SHOTS + 1) * grid**2, patch, generator=generator),
        "image_grid_thw": torch.tensor([[1, grid, grid]] * (SHOTS + 1)),
    }
    return replace(batch, inputs={**batch.inputs, **shown})


def parameters(model: HookedVLM) -> tuple[int, int]:
    """Of the tower and of the decoder's layers."""
    tower = sum(p.numel() for p in model.hf.model.visual.parameters())
    return tower, sum(p.numel() for part in model.anatomy.layers for p in part.block.parameters())


def timed(model: HookedVLM, batch: Batch, sets: Sequence[Any], ways: dict[str, dict[str, Any]], rounds: int) -> list[str]:
    """Columns of the table: seconds of the two ways (names of `labels` and their values), their ratio, peak memory, whether the answers are the same bits."""
    switches = Switches(tuple(sets), "zero")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, float] = dict.fromkeys(ways, 0.0)
    found: dict[str, Any] = {}
    labels.answer(model, batch, switches=Switches(tuple(sets[:1]), "zero"), batch_size=1)  # warms up
    for _ in range(rounds):
        for name, settings in ways.items():
            for setting, value in settings.items():
                setattr(labels, setting, value)

            def run(name: str = name) -> None:
                start = process_time()
                found[name] = labels.answer(model, batch, switches=switches, batch_size=1)[0]
                seconds[name].append(process_time() - start)

            memory[name] = max(memory[name], peak_memory(run))
    old, new = seconds.values()
    same = all(np.array_equal(a.total, b.total) for a, b in zip(*found.values(), strict=True))
    peaks = " / ".join(f"{value:,.0f} MB" for value in memory.values())
    return [
        f"{statistics.median(old):.1f} s",
        f"{statistics.median(new):.1f} s",
        f"{ratio(old, new):.2f}x",
        peaks,
        "bit-equal" if same else "NOT EQUAL",
    ]


def described(model: HookedVLM, batch: Batch) -> str:
    tower, decoder = parameters(model)
    return (
        f"{model.cfg.n_layers} layers, d_model {model.cfg.d_model} ({decoder / 1e6:.0f} M), tower {tower / 1e6:.0f} M, {batch.n_pos} tokens"
    )


def pictures(layers: int, width: int, sets: int, rounds: int) -> Iterator[list[str]]:
    """A tower in every pass, and pictures seen once."""
    model = qwen(layers, width)
    batch = prompt(model)
    order = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    ways: dict[str, dict[str, Any]] = {
        "a tower in every pass": {"SPARED": float("inf"), "pictures_once": lambda _: nullcontext()},
        "pictures seen once": {"SPARED": float("inf"), "pictures_once": pictures_once},
    }
    yield [f"pictures seen once: {described(model, batch)}, {sets} sets", *timed(model, batch, [(order[k * 7 % len(order)],) for k in range(sets)], ways, rounds)]  # fmt: skip


def lower_layers(layers: int, width: int, rounds: int) -> Iterator[list[str]]:
    """Every layer in every pass, and those below a set's first head run once: the intact model, five heads, and 20 draws from the same layers."""
    model = qwen(layers, width)
    batch = prompt(model)
    sizes = dict.fromkeys(range(layers), model.cfg.n_heads)
    ways: dict[str, dict[str, Any]] = {"every layer": {"SPARED": float("inf")}, "lower layers once": {"SPARED": labels.SPARED}}
    for name, first in (("from the middle on", layers // 2), ("of the last quarter", 3 * layers // 4), ("from the first layer on", 0)):
        where = [first + (layers - 1 - first) * k // 4 for k in range(5)]
        heads = tuple((layer, k % model.cfg.n_heads) for k, layer in enumerate(where))
        sets = [(), heads, *matched_draws(heads, sizes, 20, seed=0).sets]
        title = f"lower layers once: {described(model, batch)}, 5 heads {name}, {len(sets)} sets"
        yield [title, *timed(model, batch, sets, ways, rounds)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, nargs=2, default=(768, 256), help="for pictures seen once, for lower layers once")
    parser.add_argument("--sets", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("pictures", "layers"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"\nknock-outs, processor seconds, {args.rounds} rounds; {machine()}\n")
    print(table(["what; model, prompt", "whole passes", "spared", "faster", "peak memory above start", "answers"], []))
    rows = {"pictures": lambda: pictures(args.layers, args.d_model[0], args.sets, args.rounds), "layers": lambda: lower_layers(args.layers, args.d_model[1], args.rounds)}  # fmt: skip
    for name, some in rows.items():
        for row in some() if args.only in (None, name) else ():
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
