"""What sweeps of activation patching cost: python -m benchmarks.patching [--tokens 128 1024] [--first 0.25 0.75] [--rounds 3] [--every 1] [--quick]

Every cell of layer x head (a head's output at all positions) and of layer x span (the stream before a layer, eight spans) is taken from a clean run into a
corrupt one, and the logit difference at the last token is read. Side by side in interleaved rounds: mechicl, TransformerLens' own `patching`, and a loop
over nnsight, on a toy (which is a HookedRootModule) and on a LLaVA-shaped model with random weights and a prompt of text (TransformerLens' patching takes
no pictures). The two prompts differ from a quarter of their length on, as few-shot prompts do whose labels are exchanged, or only in the last quarter, as
those do whose query is. The recorded runs are counted. All must give the same table. Seconds are those of the process on one thread, so that a machine in
use by others measures too.

The arithmetic minimum: multiplications that have to be done again because what they read has changed, at the speed at which this machine multiplies
matrices of these shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformer_lens import patching

from benchmarks.measure import machine, ratio, rounds, table
from mechicl.models.resuming.resume import Cell, Recorded, record, run_cells
from mechicl.models.toys.model import ToyTransformer, toy_config
from mechicl.models.vlm import HookedVLM
from mechicl.training.organisms import build

N_LAYERS, N_HEADS, D_MODEL, D_HEAD, D_MLP, VOCAB = 12, 8, 256, 32, 512, 4096
TEXT = {
    "num_hidden_layers": N_LAYERS, "hidden_size": D_MODEL, "intermediate_size": D_MLP, "num_attention_heads": N_HEADS,
    "num_key_value_heads": N_HEADS, "head_dim": D_HEAD, "max_position_embeddings": 8192, "vocab_size": VOCAB,
}  # fmt: skip
N_SPANS = 8
SAME = 1e-4
"""Largest difference between two ways of filling a table, in standard deviations of the logits."""


@dataclass(frozen=True)
class Prompts:
    """A pair of prompts and where they differ."""

    clean: Tensor
    corrupt: Tensor
    first: int

    @property
    def n_pos(self) -> int:
        return int(self.clean.shape[1])

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Eight spans from the first difference to the end."""
        edges = torch.linspace(self.first, self.n_pos, N_SPANS + 1).round().int().tolist()
        return list(itertools.pairwise(edges))


def prompts(n_pos: int, first: int) -> Prompts:
    """Random tokens; the second prompt has others from `first` on, one in four."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(200, VOCAB, (1, n_pos), generator=generator)
    corrupt = clean.clone()
    corrupt[:, first::4] = torch.randint(200, VOCAB, corrupt[:, first::4].shape, generator=generator)
    return Prompts(clean, corrupt, first)


def metric(logits: Tensor) -> Tensor:
    """Logit difference of two tokens after the last."""
    return logits[0, -1, 300] - logits[0, -1, 301]


Sweep = Callable[[], Tensor]


def ours(model: Any, pair: Prompts) -> dict[str, Sweep]:
    """mechicl's two sweeps."""
    sites = [f"blocks.{layer}.attn.hook_z" for layer in range(N_LAYERS)]

    def both(**options: Any) -> tuple[Recorded, Recorded]:
        ones = torch.ones_like(pair.clean)
        return tuple(record(model, {"input_ids": ids, "attention_mask": ones}, **options) for ids in (pair.clean, pair.corrupt))  # type: ignore[return-value]

    def heads() -> Tensor:
        clean, corrupt = both(sites=sites)

        def cell(layer: int, head: int) -> Cell:
            source = clean[sites[layer]][:, pair.first :, head]

            def edit(z: Tensor) -> None:
                z[:, :, head] = source

            return Cell(layer, "pre", pair.first, None, {sites[layer]: edit})  # type: ignore[dict-item]

        cells = [cell(layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)]
        return torch.stack(run_cells(corrupt, cells, lambda logits, _: metric(logits))).view(N_LAYERS, N_HEADS)

    def spans() -> Tensor:
        clean, corrupt = both()

        def cell(layer: int, start: int, stop: int) -> Cell:
            def stream() -> Tensor:
                return torch.cat([clean.pre(layer)[:, start:stop], corrupt.pre(layer)[:, stop:]], 1)

            return Cell(layer, "pre", start, stream)

        cells = [cell(layer, *span) for layer in range(N_LAYERS) for span in pair.spans]
        return torch.stack(run_cells(corrupt, cells, lambda logits, _: metric(logits))).view(N_LAYERS, N_SPANS)

    return {"layer x head": heads, "layer x span": spans}


def transformer_lens(model: Any, pair: Prompts, every: int) -> dict[str, Sweep]:
    """TransformerLens' own patching, one forward pass per cell; every `every`-th cell of a layer."""

    def cached(name: str) -> Any:
        return model.run_with_cache(pair.clean, names_filter=lambda hook: hook.endswith(name))[1]

    def run(cache: Any, setter: Any, name: str, n: int) -> Tensor:
        index = pd.DataFrame([(layer, k) for layer in range(N_LAYERS) for k in range(0, n, every)], columns=["layer", "cell"])
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            return patching.generic_activation_patch(model, pair.corrupt, cache, metric, setter, name, index_df=index).view(N_LAYERS, -1)

    def heads() -> Tensor:
        return run(cached("hook_z"), patching.layer_head_vector_patch_setter, "z", N_HEADS)

    def set_span(corrupt: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
        start, stop = pair.spans[index[1]]
        corrupt[:, start:stop] = clean[:, start:stop]
        return corrupt

    def spans() -> Tensor:
        return run(cached("hook_resid_pre"), set_span, "resid_pre", N_SPANS)

    return {"layer x head": heads, "layer x span": spans}


def nnsight_loop(model: HookedVLM, pair: Prompts, every: int) -> dict[str, Sweep]:
    """One trace per cell; every `every`-th cell of a layer."""
    env, hf = model.nnsight, model.hf
    layers = env.model.language_model.layers
    clean, corrupt = ({"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False} for ids in (pair.clean, pair.corrupt))
    assert hf is not None

    def heads() -> Tensor:
        kept = []
        with env.trace(**clean):
            for layer in range(N_LAYERS):
                kept.append(layers[layer].self_attn.o_proj.input.save())
        return torch.stack([head(layer, k, kept[layer]) for layer in range(N_LAYERS) for k in range(0, N_HEADS, every)]).view(N_LAYERS, -1)

    def head(layer: int, k: int, source: Tensor) -> Tensor:
        part = slice(k * D_HEAD, (k + 1) * D_HEAD)
        with env.trace(**corrupt):
            layers[layer].self_attn.o_proj.input[:, :, part] = source[:, :, part]
            logits = env.output.logits[:, -1:].save()
        return metric(logits)

    def spans() -> Tensor:
        kept = []
        with env.trace(**clean):
            for layer in range(N_LAYERS):
                kept.append(layers[layer].input.save())
        return torch.stack([span(layer, k, kept[layer]) for layer in range(N_LAYERS) for k in range(0, N_SPANS, every)]).view(N_LAYERS, -1)

    def span(layer: int, k: int, source: Tensor) -> Tensor:
        start, stop = pair.spans[k]
        with env.trace(**corrupt):
            layers[layer].input[:, start:stop] = source[:, start:stop]
            logits = env.output.logits[:, -1:].save()
        return metric(logits)

    return {"layer x head": heads, "layer x span": spans}


def redone(pair: Prompts, sweep: str) -> float:
    """Floating-point operations of the sweep that no recorded run has done: what a changed position needs, and the last layer for the last token only.

    Two full runs are counted too.
    """
    project, feed = 2 * D_MODEL * D_MODEL, 6 * D_MODEL * D_MLP

    def attention(m: int) -> int:
        return 4 * D_MODEL * sum(range(pair.n_pos - m + 1, pair.n_pos + 1))

    def layer_of(m: int, last: bool) -> int:
        if last:
            return 2 * project * m + 2 * project + 4 * D_MODEL * pair.n_pos + feed
        return m * (4 * project + feed) + attention(m)

    def rest(layer: int, m: int) -> int:
        return sum(layer_of(m, k == N_LAYERS - 1) for k in range(layer, N_LAYERS)) + 2 * D_MODEL * VOCAB

    total = 2 * rest(0, pair.n_pos)
    for layer in range(N_LAYERS):
        if sweep == "layer x head":
            m = pair.n_pos - pair.first
            some = 1 if layer == N_LAYERS - 1 else m
            total += N_HEADS * (rest(layer + 1, m) + some * (feed + 2 * D_HEAD * D_MODEL))
        else:
            total += sum(rest(layer, pair.n_pos - start) for start, _ in pair.spans)
    return float(total)


def multiplication(n: int = 2048) -> Callable[[], object]:
    """The matrix products of one layer for n tokens."""
    generator = torch.Generator().manual_seed(0)
    x, wide = torch.randn(n, D_MODEL, generator=generator), torch.randn(n, D_MLP, generator=generator)
    square, up, down = (torch.randn(shape, generator=generator) for shape in ((D_MODEL, D_MODEL), (D_MLP, D_MODEL), (D_MODEL, D_MLP)))

    def run() -> None:
        for _ in range(4):
            torch.nn.functional.linear(x, square)
        for _ in range(2):
            torch.nn.functional.linear(x, up)
        torch.nn.functional.linear(wide, down)

    return run


def multiplication_flops(n: int = 2048) -> float:
    """Its floating-point operations."""
    return n * (8 * D_MODEL * D_MODEL + 6 * D_MODEL * D_MLP)


def competitors(kind: str, pair: Prompts, every: int) -> dict[str, dict[str, Sweep]]:
    """Every way of filling the tables, each on its own copy of the same weights."""
    if kind == "toy":
        cfg = toy_config(
            n_layers=N_LAYERS, n_heads=N_HEADS, d_model=D_MODEL, d_head=D_HEAD, d_mlp=D_MLP, mlp="swiglu", norm="RMS", positions="rope",
            n_ctx=pair.n_pos, d_vocab=VOCAB,
        )  # fmt: skip
        toy = ToyTransformer(cfg)
        return {"mechicl": ours(toy, pair), "TransformerLens": transformer_lens(toy, pair, every)}
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    (hf, processor), (other, _) = (build("llava", preset="tiny", text=TEXT) for _ in range(2))
    model = HookedVLM(hf, processor)
    bridge = build_bridge_from_module(other, "LlavaForConditionalGeneration", hf_config=other.config)
    return {
        "mechicl": ours(model, pair), "TransformerLens": transformer_lens(bridge, pair, every), "nnsight": nnsight_loop(model, pair, every),
    }  # fmt: skip


def agree(tables: dict[str, Tensor], every: int) -> None:
    """Stop where two ways disagree by more than rounding (the table is a difference from which most of the logits has cancelled)."""
    mine = tables["mechicl"]
    for name, other in tables.items():
        want = mine if other.shape == mine.shape else mine[:, ::every]
        gap = float((other - want).abs().max() / mine.std())
        if not gap < SAME * 100 and name != "mechicl":
            raise SystemExit(f"{name} and mechicl must give the same table; they differ by {gap:.2g} of its spread.")


def measured(kind: str, n_pos: int, share: float, every: int, n_rounds: int) -> list[list[str]]:
    """Rows of the table."""
    pair = prompts(n_pos, round(share * n_pos))
    ways = competitors(kind, pair, every)
    rows = []
    for sweep in ("layer x head", "layer x span"):
        tables: dict[str, Tensor] = {}

        def keep(name: str, run: Sweep, tables: dict[str, Tensor] = tables) -> Callable[[], object]:
            return lambda: tables.__setitem__(name, run())

        entries = {name: keep(name, sweeps[sweep]) for name, sweeps in ways.items()} | {"product": multiplication()}
        seconds = rounds(entries, n_rounds, clock=time.process_time, warm_up=0 if n_rounds == 1 else 1)
        agree(tables, every)
        product = seconds.pop("product")
        least = [redone(pair, sweep) / multiplication_flops() * s for s in product]
        full = {name: s if name == "mechicl" else [every * x for x in s] for name, s in seconds.items()}
        for name, s in full.items():
            note = f" (every {every}th cell, times {every})" if every > 1 and name != "mechicl" else ""
            against = "" if name == "mechicl" else f"{ratio(s, full['mechicl']):.1f}x"
            rows.append(
                [kind, str(n_pos), f"{share:.0%}", sweep, name + note, f"{statistics.median(s):.2f} s", against, f"{ratio(s, least):.2f}x"]
            )
        rows.append([kind, str(n_pos), f"{share:.0%}", sweep, "arithmetic minimum", f"{statistics.median(least):.2f} s", "", ""])
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1024])
    parser.add_argument(
        "--first", type=float, nargs="+", default=[0.25, 0.75], help="where the prompts begin to differ, as a share of their length"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--every", type=int, default=1, help="the others run every n-th cell of a layer, times n (long prompts: 8)")
    parser.add_argument("--quick", action="store_true", help="one round, an eighth of the others' cells")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    with torch.no_grad():
        for n_pos in args.tokens:
            every = N_HEADS if args.quick or n_pos > 512 else args.every
            for share, kind in itertools.product(args.first, ("toy", "LLaVA-shaped")):
                rows += measured(kind, n_pos, share, every, 1 if args.quick else args.rounds)
    print(f"{N_LAYERS} layers x {N_HEADS} heads, d_model {D_MODEL}, d_mlp {D_MLP}, vocabulary {VOCAB}, one prompt, float32; {machine()}\n")
    print(table(["model", "tokens", "differ from", "sweep", "by", "median", "against mechicl", "against the minimum"], rows))


if __name__ == "__main__":
    main()
