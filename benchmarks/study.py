"""The huang2026 study without its fine-tuning against the same steps by eager attention: python -m benchmarks.study

A random Qwen2.5-VL with a tower in the 3B's proportion and a few-shot prompt of five pictures (`benchmarks.ablation`). The heads to switch off lie as deep
as the published ones, so the default sets begin where they would: the induction heads' late, the previous-token heads' early. Measured: scores of every
head from whole prompts (published ones and ours; nulls are made once for all episodes, in seconds); and answers with one set of heads off, and with every
n-th of all sets off in one call, which gives the cost of the first set (it sees the pictures) and of a further one. The other side: eager attention with
output_attentions=True for the scores, which computes the published two and no other; and one eager forward for each set, with a hook on o_proj. Seconds
are this process's own on one thread (the machine may be shared), the median of the rounds, multiplied to 100 episodes of the study's default sets.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.ablation import described, prompt, qwen
from benchmarks.measure import machine, peak_memory, table
from mechicl.analysis import labels
from mechicl.analysis.ablation.switches import Switches
from mechicl.analysis.heads.published import published_scores
from mechicl.analysis.heads.scoring import attention_by_role, score_heads
from mechicl.models.vlm import HookedVLM
from mechicl.results import Head
from mechicl.studies.huang2026_heads import OURS
from mechicl.studies.huang2026_sets import plan_sets
from mechicl.studies.published import published


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


def sets_of(model: HookedVLM) -> tuple[tuple[Head, ...], ...]:
    """What the study switches off by default, in ascending order of the first layer; heads as deep as the published ones."""
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    rankings: Any = {}
    for kind, ours in (("PH", "previous-token"), ("IH", "induction")):
        row = next(one for one in published("huang2026")["rankings"] if one["kind"] == kind)
        heads = [(layer * n_layers // row["n_layers"], head * n_heads // row["n_heads"]) for layer, head, _ in row["heads"]]
        heads = list(dict.fromkeys(heads))
        rankings |= {kind: ("published", "", heads), ours: ("ours", "", [(layer, (head + 1) % n_heads) for layer, head in heads])}
    sets = plan_sets(model, rankings, top=5, n_random=20, dose=("PH", "IH"), dose_draws=10, seed=0).sets
    return tuple(sorted(sets, key=lambda heads: min((layer for layer, _ in heads), default=n_layers)))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--grid", type=int, default=40, help="side of a picture in patches; four are a token, five pictures a prompt")
    parser.add_argument("--every", type=int, default=10, help="every n-th set is run")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    labels.SPARED = 0.0  # a whole study is far above it; a sample for one prompt may not be
    model, eager = qwen(args.layers, args.d_model), qwen(args.layers, args.d_model).hf
    eager.set_attn_implementation("eager")
    batch, sets = prompt(model, args.grid), sets_of(model)
    some, width = sets[:: args.every], args.d_model // model.cfg.n_heads

    def off(some: Sequence[Any]) -> Any:
        return labels.answer(model, batch, switches=Switches(tuple(some), "zero"), batch_size=1)

    off(sets[-2:])  # whether layers can be left out has been tried
    seconds, memory = measured(
        {
            "ours: published scores": lambda: published_scores(model, batch, batch_size=1),
            "ours: our scores": lambda: score_heads(model, batch, scores=OURS, n_null=1, batch_size=1, progress=False),
            "ours: attention by role": lambda: attention_by_role(model, batch, batch_size=1, progress=False),
            "ours: a set off": lambda: off(some[:1]),
            "ours: sets off": lambda: off(some),
            "eager: published scores": lambda: eager_scores(eager, batch),
            "eager: a set off": lambda: eager_knock_out(eager, batch, some[len(some) // 2], width),
        },
        args.rounds,
    )
    print(f"\nrandom Qwen2.5-VL, {described(model, batch)}, float32, one prompt timed {args.rounds} times, {len(some)} of {len(sets)} sets; {machine()}\n")  # fmt: skip
    show(seconds, memory, len(sets), len(some))


def measured(entries: dict[str, Callable[[], object]], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Of every entry the median of its seconds, and its largest memory, MB; entry after entry in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    memory: dict[str, float] = {}
    with torch.no_grad():
        for _ in range(rounds):
            for name, run in entries.items():

                def timed(name: str = name, run: Callable[[], object] = run) -> None:
                    start = time.process_time()
                    run()
                    seconds[name].append(time.process_time() - start)

                memory[name] = max(memory.get(name, 0.0), peak_memory(timed))
    return {name: statistics.median(values) for name, values in seconds.items()}, memory


def show(once: dict[str, float], memory: dict[str, float], n_sets: int, n_some: int) -> None:
    """100 episodes ranked and 100 others knocked out; two more conditions are controls, passes of their own."""
    n, first = 100, once["ours: a set off"]
    further = (once["ours: sets off"] - first) / (n_some - 1)
    parts = [
        ("published scores", n * once["ours: published scores"], n * once["eager: published scores"], ("ours: published scores", "eager: published scores")),
        ("our scores, with attention by role", n * (once["ours: our scores"] + once["ours: attention by role"]), None, ("ours: our scores", "")),
        (f"knock-outs, {n_sets + 2} conditions", n * (3 * first + (n_sets - 1) * further), n * (n_sets + 2) * once["eager: a set off"], ("ours: sets off", "eager: a set off")),
    ]  # fmt: skip
    total, theirs = sum(ours for _, ours, _, _ in parts), sum(other or 0.0 for _, _, other, _ in parts)
    worst = [max(v for k, v in memory.items() if k.startswith(side)) for side in ("ours", "eager")]
    rows = [
        [name, f"{ours:,.0f} s", f"{other:,.0f} s" if other else "not computed", f"{other / ours:.2f}x" if other else "", f"{memory[a]:,.0f} MB", f"{memory[b]:,.0f} MB" if b else ""]
        for name, ours, other, (a, b) in parts
    ]  # fmt: skip
    rows += [["whole study", f"{total:,.0f} s", f"{theirs:,.0f} s", f"{theirs / total:.2f}x", f"{worst[0]:,.0f} MB", f"{worst[1]:,.0f} MB"]]
    print(table(["per 100 episodes", "mechicl", "eager", "eager / mechicl", "peak memory above start, mechicl", "eager"], rows))
    print("\nonce, seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in once.items()) + f"; a further set {further:.2f}")


if __name__ == "__main__":
    main()
