"""Ways of finding circuits against hand-made programs whose circuit is known edge by edge."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch

from mechicl.analysis.circuits.find import find_circuit
from mechicl.analysis.circuits.runs import CircuitRuns
from mechicl.analysis.feed import progress_bar, provenance
from mechicl.analysis.gradients.attribution import attribute
from mechicl.analysis.gradients.edge_attribution import eap
from mechicl.analysis.patching.paths import path_patch
from mechicl.analysis.statistics import mean_estimate
from mechicl.errors import OptionError
from mechicl.models.edge_graph import EdgeGraph
from mechicl.models.programs import Program, programs
from mechicl.prompts.corrupt import Pairs
from mechicl.results import Circuit, CircuitBenchmark, Estimate, MethodRecovery

Way = Literal["path patching", "EAP", "EAP-IG", "EAP-IG, grown", "EAP-IG, pruned", "node AtP", "pruning", "random order"]
"""path patching, EAP, EAP-IG: edges by the size of their score, the fewest that reach the target. grown: in the order of a search from the logits. pruned: then
what the target does not need is dropped by exact effects. node AtP: nodes by gradient, and all edges between them. pruning: from the whole graph, by exact effects.
random order: the control."""

Build = Callable[[int], Sequence[Program]]


@dataclass(frozen=True, eq=False)
class _Trial:
    """One circuit found: how much of the truth is in it."""

    precision: float
    recall: float
    faithfulness: float
    exact: bool
    n_edges: int
    n_true: int
    seconds: float


def benchmark_methods(
    ways: Sequence[Way | str] | None = None,
    *,
    build: Build | None = None,
    noise: float = 0.0,
    n_seeds: int = 5,
    n_pairs: int = 24,
    target: float = 0.85,
    steps: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> CircuitBenchmark:
    """Precision, recall and held-out faithfulness of circuits found in several ways on programs whose edges are known.

    On exact programs idle parts carry nothing at all, so any score that is not zero on the right edges ranks them first; `noise` on every weight gives all parts some
    effect, as in a trained model, while the planted edges remain the ones that do the work.

    Args:
        ways: Which; None: all.
        build: seed -> programs; None: `models.programs.programs`.
        noise: Standard deviation added to every weight, as a share of the largest weight of its matrix over the root of its width.
        n_seeds: Programs of each kind (places of the heads, idle weights, noise).
        n_pairs: Pairs of prompts; half find the circuit (scores are made on these), half measure it.
        target: Faithfulness to reach.
        steps: Of EAP-IG.
        seed: First seed.
        progress: Show a bar.

    Returns:
        A CircuitBenchmark with one row per way and program, intervals over seeds.

    Raises:
        OptionError: a way that does not exist, or fewer than four pairs.
    """
    chosen = tuple(get_args(Way)) if ways is None else tuple(ways)
    if not chosen or not set(chosen) <= set(get_args(Way)):
        raise OptionError(f"ways must be among {', '.join(get_args(Way))}; got {chosen}. Pick from these.")
    if n_pairs < 4 or n_seeds < 1 or noise < 0:
        raise OptionError(f"n_pairs must be at least 4, n_seeds 1, noise 0; got {n_pairs}, {n_seeds} and {noise}. Ask for more.")
    found: dict[tuple[str, str], list[_Trial]] = {}
    model: Any = None
    for one in progress_bar(range(seed, seed + n_seeds), total=n_seeds, what="programs", show=progress):
        for program in programs(seed=one) if build is None else build(one):
            model = noisy(program.model, noise, one)
            for way in chosen:
                trial = _trial(model, program, way, n_pairs=n_pairs, target=target, steps=steps, seed=one)
                found.setdefault((way, program.name), []).append(trial)
    options = {"noise": noise, "n_pairs": n_pairs, "target": target, "steps": steps, "ways": list(chosen)}
    return CircuitBenchmark(
        rows=tuple(_row(way, program, trials) for (way, program), trials in sorted(found.items(), key=lambda item: chosen.index(item[0][0]))),
        n_seeds=n_seeds, provenance=provenance(model, task="hand-made programs", seed=seed, options=options),
    )  # fmt: skip


def noisy(model: Any, noise: float, seed: int) -> Any:
    """A copy of a model with noise on every weight."""
    if not noise:
        return model
    out, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in out.parameters():
            scale = noise * weight.abs().max() / weight.shape[-1] ** 0.5
            weight += torch.randn(weight.shape, generator=generator) * scale
    return out


def _trial(model: Any, program: Program, way: str, *, n_pairs: int, target: float, steps: int, seed: int) -> _Trial:
    pairs, fresh = program.pairs(n_pairs // 2, 2 * seed), program.pairs(n_pairs - n_pairs // 2, 2 * seed + 1)
    begin = time.perf_counter()
    options: dict[str, Any] = {"target": target, "held_out": 0.0, "n_random": 0, "progress": False, "seed": seed}
    circuit = _find(model, pairs, way, steps, seed, options)
    seconds = time.perf_counter() - begin
    edges = set(circuit.edges)
    right = len(edges & program.edges)
    return _Trial(
        precision=right / len(edges) if edges else 0.0, recall=right / len(program.edges), faithfulness=_held_out(model, fresh, circuit), exact=edges == program.edges,
        n_edges=len(edges), n_true=len(program.edges), seconds=seconds,
    )  # fmt: skip


def _find(model: Any, pairs: Pairs, way: str, steps: int, seed: int, options: Mapping[str, Any]) -> Circuit:
    if way == "pruning":
        return find_circuit(model, pairs, method="prune", **options)
    if way == "node AtP":
        effects = attribute(model, pairs, sites=_sites(model), by="head", direction="noise", exact=0, n_permutations=100, progress=False)
        return find_circuit(model, pairs, effects, level="node", minimal=False, **options)
    scores: Any
    if way == "random order":
        edges = EdgeGraph.of(model).edges
        scores = dict(zip(edges, np.random.default_rng(seed).random(len(edges)).tolist(), strict=True))
    elif way == "path patching":
        scores = path_patch(model, pairs, senders="all", receivers="all", n_permutations=100, progress=False)
    else:
        scores = eap(model, pairs, method="EAP" if way == "EAP" else "EAP-IG", steps=steps, exact=0, progress=False)
    method = "greedy" if way.endswith("grown") else "threshold"
    return find_circuit(model, pairs, scores, method=method, minimal=way.endswith("pruned"), **options)


def _sites(model: Any) -> tuple[str, ...]:
    return ("z", "mlp_out") if EdgeGraph.of(model).mlps else ("z",)


def _held_out(model: Any, pairs: Pairs, circuit: Circuit) -> float:
    runs = CircuitRuns.of(model, pairs)
    return float(runs.faithfulness(runs.graph.mask(circuit.edges)[None])[0])


def _row(way: str, program: str, trials: Sequence[_Trial]) -> MethodRecovery:
    def over(values: Sequence[float], unit: str) -> Estimate:
        return mean_estimate(values, unit=unit)

    return MethodRecovery(
        method=way, program=program, precision=over([t.precision for t in trials], "share of the edges found"),
        recall=over([t.recall for t in trials], "share of the planted edges"), faithfulness=over([t.faithfulness for t in trials], "share of the clean-corrupt difference"),
        exact=float(np.mean([t.exact for t in trials])), n_edges=float(np.mean([t.n_edges for t in trials])), n_true=float(np.mean([t.n_true for t in trials])),
        seconds=float(np.mean([t.seconds for t in trials])), n=len(trials),
    )  # fmt: skip
