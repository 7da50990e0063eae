"""What a toy training step costs: python -m benchmarks.toy [--paper PATH_TO_CLONE] [--rounds 15] [--threads 1] [--compile]

The paper's own settings (K 8192, D 64, N 8, L 32, batch 128, SGD, two layers, RoPE), data included, in one process and interleaved rounds: the authors' own
modules from a clone of their repository where --paper gives one (their loader with its worker process, and their data drawn in this process),
`train_toy`'s step, and the bound: the matrix products of that step alone, at this machine's speed. Then models x iterations per second for
1, 8 and 64 models in one batched step.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks.measure import machine, ratio, rounds, table
from mechicl.training.toys.batched import Alone, Batched, Trainees
from mechicl.training.toys.build import build
from mechicl.training.toys.feed import BLOCK, Feed
from mechicl.training.toys.recipe import ToyRecipe, recipe, set_fields

MANY = (1, 8, 64)


def ours(recipes: list[ToyRecipe], *, compiled: bool = False, device: str = "cpu") -> Callable[[], object]:
    """A block of training steps of one or several models, data included."""
    models = [build(r).to(device) for r in recipes]
    team: Trainees = Alone(models[0], recipes[0], compile=compiled) if len(models) == 1 else Batched(models, recipes, compile=compiled)
    feed = Feed(recipes, models[0].cfg, device)
    state = {"step": 0}

    def run() -> None:
        for _ in range(BLOCK):
            team.step(feed([state["step"]] * len(recipes)))
            state["step"] += 1
        if device != "cpu":
            torch.cuda.synchronize()

    return run


def theirs(clone: Path, chosen: ToyRecipe, *, workers: int) -> Callable[[], object]:
    """A block of iterations of the authors' own model and data, from a clone of their repository."""
    sys.path.insert(0, str(clone))
    try:
        models, data = importlib.import_module("model"), importlib.import_module("dataset")
    finally:
        sys.path.remove(str(clone))
    task: Any = chosen.task
    wide: Any = {"dim": task.D, "n_layers": 2, "n_heads": 1, "n_labels": task.L, "max_position_embeddings": 2 * task.N + 1}
    wide |= {
        "rope_theta": 10_000,
        "mlp_bias": True,
        "rms_norm": True,
        "rope": True,
        "norm_eps": 1e-5,
        "use_alibi": False,
        "use_hybrid": False,
    }
    network = models.Transformer(models.ModelArgs(**wide))
    means = data.get_mus_label_class(task.K, task.L, task.D)
    source = data.ICLDataset(*means, N=task.N, S=chosen.batch, Nmax=32, eps=task.eps, B=task.B, p_B=1, p_C=0, datasize=10**6, rope=True)
    loader: Iterator[Any] = iter(torch.utils.data.DataLoader(source, batch_size=None, num_workers=workers))
    sgd = torch.optim.SGD(network.parameters(), lr=chosen.lr, weight_decay=chosen.weight_decay)

    def run() -> None:
        for _ in range(BLOCK):
            tokens, target = next(loader)
            sgd.zero_grad()
            functional.cross_entropy(network(tokens), target).backward()
            sgd.step()

    return run


def bound(chosen: ToyRecipe) -> Callable[[], object]:
    """The matrix products with weights of a block of steps, forward and backward, and nothing else."""
    task: Any = chosen.task
    rows, last, wide = chosen.batch * (2 * task.N + 1), chosen.batch, task.D
    # (rows, columns in, columns out, products: forward, by the weights, by the inputs)
    plan = [
        (rows, wide, 3 * wide, 2),
        (rows, wide, 2 * wide, 3),
        (rows, wide, wide, 3),
        (rows, wide, 2 * wide, 3),
    ]  # layer 1; K and V of layer 2
    plan += [
        (last, wide, wide, 3),
        (last, wide, 2 * wide, 3),
        (last, wide, wide, 3),
        (last, wide, task.L, 3),
    ]  # the rest of layer 2, classifier
    work = [(torch.randn(n, i), torch.randn(i, o), torch.randn(n, o), kinds) for n, i, o, kinds in plan]

    def run() -> None:
        for _ in range(BLOCK):
            for x, w, g, kinds in work:
                x @ w
                x.T @ g
                if kinds == 3:
                    g @ w.T

    return run


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--paper", type=Path, help="a clone of the authors' repository")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="also through torch.compile")
    parser.add_argument("--many", type=int, nargs="*", default=MANY, help="models in a batched step")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    chosen = recipe("huang2026")
    single: dict[str, Callable[[], object]] = {}
    if args.paper is not None:
        single["authors' modules, their loader (a worker process)"] = theirs(args.paper, chosen, workers=1)
        single["authors' modules, data in this process"] = theirs(args.paper, chosen, workers=0)
    single["train_toy"] = ours([chosen], device=args.device)
    if args.compile:
        single["train_toy, compile=True"] = ours([chosen], compiled=True, device=args.device)
    single["bound: its matrix products alone"] = bound(chosen)
    seconds = rounds(single, args.rounds)
    base = seconds["train_toy"]
    print(f"K {chosen.task.n_items}, D 64, N 8, L 32, batch 128, SGD, float32, {args.rounds} rounds of {BLOCK} steps; {machine()}\n")
    rows = [[name, f"{statistics.median(s) / BLOCK * 1e3:.2f} ms", f"{ratio(s, base):.2f}x"] for name, s in seconds.items()]
    print(table(["one step, data included", "median", "against train_toy"], rows) + "\n")
    for title, one in (("the paper's settings", chosen), ("preset cpu (Adam)", recipe("cpu"))):
        many = {
            f"{n}{kind}": ours([set_fields(one, {"seed": s}) for s in range(n)], compiled=bool(kind), device=args.device)
            for kind in ("", *((" compiled",) if args.compile else ()))
            for n in args.many
        }
        seconds = rounds(many, max(3, args.rounds // 3))
        rows = [
            [name, f"{statistics.median(s) / BLOCK * 1e3:.1f} ms", f"{int(name.split()[0]) * BLOCK / statistics.median(s):.0f}"]
            for name, s in seconds.items()
        ]
        print(table([f"models, {title}", "one batched step", "models x iterations / s"], rows) + "\n")


if __name__ == "__main__":
    main()
