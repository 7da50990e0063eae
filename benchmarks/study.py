"""The huang2026 study without its fine-tuning against the same steps by eager attention: python -m benchmarks.study

A random LLaVA-shaped decoder and a few-shot prompt of pictures' length (`benchmarks.rows.few_shot`: what passes cost does not depend on what the tokens
are). Measured: scores of every head from whole prompts (published ones and ours; nulls are made once for all episodes, in seconds), and one set of heads switched off,
answers marked. The other side: eager attention with output_attentions=True for the scores, which computes the published two and no other; and one eager
forward for each set, with a hook on o_proj. Seconds are this process's own on one thread (the machine may be shared), the median of the rounds, multiplied to
100 episodes of the study's default sets.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.measure import machine, peak_memory, table
from benchmarks.rows import few_shot
from mechicl.analysis.ablation.switches import Switches
from mechicl.analysis.heads.published import published_scores
from mechicl.analysis.heads.scoring import attention_by_role, score_heads
from mechicl.analysis.labels import answer
from mechicl.models.probe import text_probe
from mechicl.models.vlm import HookedVLM
from mechicl.studies.huang2026_heads import OURS
from mechicl.studies.huang2026_sets import plan_sets
from mechicl.training.organisms import build


def models(layers: int, width: int, heads: int) -> tuple[HookedVLM, Any]:
    """The hooked model, and the same one again with eager attention."""
    text = {
        "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads, "num_key_value_heads": heads,
        "head_dim": width // heads, "max_position_embeddings": 32768,
    }  # fmt: skip
    hf, _ = build("llava", preset="tiny", text=text)
    eager, _ = build("llava", preset="tiny", text=text)
    eager.set_attn_implementation("eager")
    return HookedVLM(hf), eager.eval()


def eager_scores(model: Any, batch: Any) -> list[tuple[float, float]]:
    """The published two of every head, from whole patterns."""
    out = model(**batch.inputs, use_cache=False, output_attentions=True, logits_to_keep=1)
    right = batch.mask("label", right=True)[0]
    found = []
    for layer in out.attentions:
        ph = layer[0].diagonal(-1, 1, 2).mean(-1)
        row = layer[0, :, -1]
        found += list(zip(ph.tolist(), (row[:, right].mean(-1) - row[:, ~right].mean(-1)).tolist(), strict=True))
    return found


def eager_knock_out(model: Any, batch: Any, heads: Any, width: int) -> int:
    """The likeliest next token with some heads off."""
    handles = []
    for layer, head in heads:

        def cut(module: Any, args: Any, head: int = head) -> Any:
            x = args[0].clone()
            x[..., head * width : (head + 1) * width] = 0.0
            return (x, *args[1:])

        handles.append(model.get_decoder().layers[layer].self_attn.o_proj.register_forward_pre_hook(cut))
    said = int(model(**batch.inputs, use_cache=False, logits_to_keep=1).logits[0, -1].argmax())
    for handle in handles:
        handle.remove()
    return said


def sets_of(model: HookedVLM) -> tuple[Any, ...]:
    """What the study switches off by default; which heads does not matter for the cost."""
    order = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    rankings: Any = {"PH": ("published", "", order[::7]), "IH": ("published", "", order[3::7]), "previous-token": ("ours", "", order[1::7]), "induction": ("ours", "", order[4::7])}  # fmt: skip
    return plan_sets(model, rankings, top=5, n_random=20, dose=("PH", "IH"), dose_draws=10, seed=0).sets


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, eager = models(args.layers, args.d_model, args.heads)
    batch = few_shot(text_probe(eager, n=args.tokens)["input_ids"], shots=4)
    sets = sets_of(model)
    switches = Switches.build(model, batch, sets[40:41], "zero", seed=0, batch_size=1)
    options: Any = SimpleNamespace(batch_size=1, progress=False)
    entries: dict[str, Callable[[], object]] = {
        "ours: published scores": lambda: published_scores(model, batch, batch_size=1),
        "ours: our scores": lambda: score_heads(model, batch, scores=OURS, n_null=1, **vars(options)),
        "ours: attention by role": lambda: attention_by_role(model, batch, **vars(options)),
        "ours: a set off": lambda: answer(model, batch, switches=switches, batch_size=1),
        "eager: published scores": lambda: eager_scores(eager, batch),
        "eager: a set off": lambda: eager_knock_out(eager, batch, sets[40], args.d_model // args.heads),
    }
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    memory: dict[str, float] = {}
    with torch.no_grad():
        for _ in range(args.rounds):
            for name, run in entries.items():

                def timed(name: str = name, run: Callable[[], object] = run) -> None:
                    start = time.process_time()
                    run()
                    seconds[name].append(time.process_time() - start)

                memory[name] = max(memory.get(name, 0.0), peak_memory(timed))
    once = {name: statistics.median(values) for name, values in seconds.items()}
    show(args, once, memory, len(sets) + 2)


def show(args: argparse.Namespace, once: dict[str, float], memory: dict[str, float], n_sets: int) -> None:
    """100 episodes ranked and 100 others knocked out."""
    n = 100
    ours = {"published scores": n * once["ours: published scores"], "our scores, by role": n * (once["ours: our scores"] + once["ours: attention by role"]), f"knock-outs, {n_sets} conditions": n * n_sets * once["ours: a set off"]}  # fmt: skip
    other = {"published scores": n * once["eager: published scores"], "our scores, by role": float("nan"), f"knock-outs, {n_sets} conditions": n * n_sets * once["eager: a set off"]}  # fmt: skip
    peaks = {"published scores": ("ours: published scores", "eager: published scores"), "our scores, by role": ("ours: our scores", ""), f"knock-outs, {n_sets} conditions": ("ours: a set off", "eager: a set off")}  # fmt: skip
    rows = []
    for part in ours:
        a, b = peaks[part]
        none = other[part] != other[part]
        rows.append([part, f"{ours[part]:,.0f} s", "not computed" if none else f"{other[part]:,.0f} s", "" if none else f"{other[part] / ours[part]:.2f}x", f"{memory[a]:,.0f} MB", f"{memory[b]:,.0f} MB" if b else ""])  # fmt: skip
    total, theirs = sum(ours.values()), sum(v for v in other.values() if v == v)
    worst = [max(v for k, v in memory.items() if k.startswith(side)) for side in ("ours", "eager")]
    rows.append(
        ["whole study", f"{total:,.0f} s", f"{theirs:,.0f} s", f"{theirs / total:.2f}x", f"{worst[0]:,.0f} MB", f"{worst[1]:,.0f} MB"]
    )
    print(f"\n{args.layers} layers x {args.heads} heads, d_model {args.d_model}, {args.tokens:,} tokens, float32, one prompt timed {args.rounds} times; {machine()}\n")  # fmt: skip
    print(table(["per 100 episodes", "mechicl", "eager", "eager / mechicl", "peak memory above start, mechicl", "eager"], rows))
    print("\nonce, seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in once.items()))


if __name__ == "__main__":
    main()
