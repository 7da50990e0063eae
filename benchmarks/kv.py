"""Key-value shift of a long prompt against caching everything: python -m benchmarks.kv [--tokens 1024 4096] [--rounds 5]

One question behind a few-shot prompt of text and without it; keys and values of the question's tokens in both, and their relative L2, per layer and KV head. A
LLaVA-shaped decoder with random weights and grouped queries. Side by side in interleaved rounds, each on its own copy of the same weights: two plain forward
passes; mechicl (`read_prompts` and the measure); the whole of `kv_shift`, rendering and intervals included; TransformerLens' bridge with everything in its cache and
with keys and values only; nnsight saving the projections whole. All must give the same table. Seconds are those of the process on one thread, so that a machine in use
by others measures too; memory is the largest above what was resident before.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import machine, peak_memory, ratio, rounds, table
from mechicl.analysis.shift.kv_shift import kv_shift
from mechicl.analysis.shift.pairs import Prompts, Table, Wanted, read_prompts
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.align import span_groups
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode, Shot
from mechicl.training.organisms import build

N_LAYERS, N_HEADS, N_KV, D_HEAD = 4, 8, 4, 32
TEXT = {
    "num_hidden_layers": N_LAYERS, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": N_HEADS, "num_key_value_heads": N_KV,
    "head_dim": D_HEAD, "max_position_embeddings": 16384,
}  # fmt: skip
SPANS = ("query text", "query question", "last token")
SAME = 1e-4
"""Largest difference of two relative shifts that is rounding."""
Way = Callable[[], Tensor]


def episode(model: HookedVLM, n_tokens: int) -> Episode:
    """A question of about sixty tokens behind eight examples, so long that the prompt has about n_tokens."""
    words = ("the", "small", "red", "bird", "sat", "on", "a", "tree", "and", "sang")

    def text(n: int, shift: int) -> str:
        return " ".join(words[(k + shift) % len(words)] for k in range(n))

    def made(n: int) -> Episode:
        shots = tuple(Shot(label=("yes", "no")[k % 2], text=text(n, k)) for k in range(8))
        return Episode(shots, Shot("yes", text=text(40, 3)), ("yes", "no"), question="Is this so?")

    few, more = (int(model.render([made(n)]).n_pos) for n in (10, 20))
    return made(10 + round((n_tokens - few) / (more - few) * 10))


def shift(one: Tensor, two: Tensor) -> Tensor:
    """Mean relative L2 of the tokens [token, kv_head, d_head], per head."""
    return ((one - two).norm(dim=-1) / two.norm(dim=-1)).mean(0)


def rows(batch: Batch) -> list[Tensor]:
    """Positions of the query's spans."""
    groups = span_groups(batch)
    return [groups[name][0].nonzero()[:, 0] for name in SPANS]


def from_whole(caches: list[dict[tuple[str, int], Tensor]], pair: list[Batch]) -> Tensor:
    """[part, layer, kv_head, span] from two whole caches of keys and values [1, pos, kv_head, d_head]."""
    at = [rows(batch) for batch in pair]
    return torch.stack([
        torch.stack([
            torch.stack([shift(*(cache[part, layer][0, p[s]] for cache, p in zip(caches, at, strict=True))) for s in range(len(SPANS))], -1)
            for layer in range(N_LAYERS)
        ]) for part in ("k", "v")
    ])  # fmt: skip


def mechicl(model: HookedVLM, pair: list[Batch]) -> Way:
    """Only the asked rows are kept."""
    cells = tuple((part, layer) for layer in range(N_LAYERS) for part in ("k", "v"))
    wanted = Wanted(SPANS, ("k", "v"), tuple(range(N_LAYERS)), cells, means=False)

    def run() -> Tensor:
        one, two = (read_prompts(model, Prompts(batch, ("",)), wanted) for batch in pair)
        found = Table(wanted, N_KV)
        found.add([0], ["0"], one, two)
        return torch.from_numpy(found.relative[0][0])

    return run


def bridge(inputs: list[dict[str, Any]], pair: list[Batch], only: bool) -> Way:
    """TransformerLens' bridge: everything in the cache, or keys and values only."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    hf, _ = build("llava", preset="tiny", text=TEXT)
    tl: Any = build_bridge_from_module(hf, "LlavaForConditionalGeneration", hf_config=hf.config)
    names = {f"blocks.{layer}.attn.{part}.hook_out": (part, layer) for layer in range(N_LAYERS) for part in "kv"}

    def run() -> Tensor:
        caches = []
        for one in inputs:
            _, cache = tl.run_with_cache(one["input_ids"], **({"names_filter": list(names)} if only else {}))
            caches.append({key: cache[name].reshape(1, -1, N_KV, D_HEAD) for name, key in names.items()})
        return from_whole(caches, pair)

    return run


def nnsight(model: HookedVLM, inputs: list[dict[str, Any]], pair: list[Batch]) -> Way:
    """One trace for each prompt, the projections' outputs saved whole."""
    env: Any = model.nnsight
    layers = env.model.language_model.layers

    def run() -> Tensor:
        caches = []
        for one in inputs:
            saved = []
            with env.trace(**one, use_cache=False, logits_to_keep=1):
                for layer in range(N_LAYERS):
                    saved.append(layers[layer].self_attn.k_proj.output.save())
                    saved.append(layers[layer].self_attn.v_proj.output.save())
            keys = [(part, layer) for layer in range(N_LAYERS) for part in ("k", "v")]
            caches.append({key: x.reshape(1, -1, N_KV, D_HEAD) for key, x in zip(keys, saved, strict=True)})
        return from_whole(caches, pair)

    return run


def ways(n_tokens: int) -> tuple[int, dict[str, Way]]:
    """Length of the prompt, and all that is compared."""
    model, other = (HookedVLM(*build("llava", preset="tiny", text=TEXT)) for _ in range(2))
    asked = episode(model, n_tokens)
    pair = [model.render([one]) for one in (asked, asked.without_shots())]
    inputs = [model.inputs(batch) for batch in pair]

    def plain() -> Tensor:
        for one in inputs:
            model.hf(**one, use_cache=False, logits_to_keep=1)
        return torch.empty(0)

    def whole() -> Tensor:
        found = kv_shift(model, [asked], control="zero-shot", spans=SPANS, cka=False, progress=False)
        return torch.from_numpy(found.per_episode[0])

    return pair[0].n_pos, {
        "two plain forward passes (sdpa)": plain, "mechicl: read_prompts and the measure": mechicl(model, pair), "mechicl: kv_shift, rendering and intervals": whole,
        "nnsight, projections saved whole": nnsight(other, inputs, pair), "TransformerLens' bridge, keys and values": bridge(inputs, pair, True),
        "TransformerLens' bridge, everything": bridge(inputs, pair, False),
    }  # fmt: skip


def agree(tables: dict[str, Tensor]) -> None:
    """Stop where two ways disagree by more than rounding."""
    mine = next(table_ for name, table_ in tables.items() if name.startswith("mechicl"))
    for name, other in tables.items():
        if other.numel() and not float((other - mine).abs().max()) < SAME:
            raise SystemExit(f"{name} and mechicl must give the same table; they differ by {float((other - mine).abs().max()):.2g}.")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines = []
    with torch.no_grad():
        for n_tokens in args.tokens:
            length, compared = ways(n_tokens)
            tables: dict[str, Tensor] = {}

            def keep(name: str, run: Way, tables: dict[str, Tensor] = tables) -> Callable[[], object]:
                return lambda: tables.__setitem__(name, run())

            entries = {name: keep(name, run) for name, run in compared.items()}
            seconds = rounds(entries, args.rounds, clock=time.process_time)
            agree(tables)
            memory = {name: peak_memory(run) for name, run in entries.items()}
            mine = "mechicl: read_prompts and the measure"
            for name, s in seconds.items():
                lines.append(
                    [f"{length:,}", name, f"{statistics.median(s):.2f} s", f"{ratio(s, seconds[mine]):.2f}x", f"{memory[name]:.0f} MB",
                     f"{memory[name] / max(memory[mine], 1):.1f}x"]
                )  # fmt: skip
    print(f"\n{N_LAYERS} layers x {N_HEADS} heads ({N_KV} key/value), d_model 256, float32; {machine()}\n")
    print(table(["tokens", "", "median", "time against mechicl", "peak memory above start", "memory against mechicl"], lines))


if __name__ == "__main__":
    main()
