"""`trace_answer`: how the answer gets from the exemplars to the last token, and the edges that take it there; what the report shows after its proof by ablation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch

from mechicl.analysis.circuits.find import Method, circuit_curve, evaluate_circuit, find_circuit
from mechicl.analysis.gradients.edge_attribution import eap
from mechicl.analysis.patching.metrics import MetricName
from mechicl.analysis.patching.patch import patch
from mechicl.analysis.statistics import holm, mean_estimate
from mechicl.errors import EpisodeError, MechiclError, OptionError, UnsupportedModelError
from mechicl.models.edge_graph import EdgeGraph
from mechicl.prompts.corrupt import How, Pairs, minimal_pairs
from mechicl.prompts.episode import Episode
from mechicl.results import Circuit, CircuitCurve, EdgeScores, PatchEffects, Trace
from mechicl.results.circuits import Level

WAYS: tuple[How, ...] = ("swap_exemplars", "swap_labels", "swap_query")
"""Pairs that are tried, in this order: exchanged exemplars change what goes with which label and nothing else, so the whole way can be seen."""

MOST_PAIRS = 16
"""Pairs that are used for what is claimed. Sign flips of 12 pairs can reach p = 0.0005, which survives the correction over a hundred cells."""

MOST_TO_FIND = 12
"""Of the pairs that only choose edges, so many are enough: a rough ranking is pruned on them."""

FEWEST_PAIRS = 6
"""Below it a permutation test over episodes cannot reach any level."""

MOST_LAYERS = 24
"""Deeper models are patched at so many layers, evenly spread."""

MOST_EDGES = 4000
"""Larger graphs are searched node by node."""

MOST_BYTES = 2_000_000_000
"""What the outputs of all senders may take for one pair; where they take more, no circuit is looked for."""

TARGET = 0.85
"""Faithfulness that the search has to reach."""


def trace_answer(
    model: Any,
    find: Sequence[Episode],
    prove: Sequence[Episode],
    *,
    how: How | None = None,
    most: int = MOST_PAIRS,
    exact: int = 16,
    n_random: int = 20,
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> Trace:
    """Patch the stream by span and the heads' outputs on pairs from one half; find a circuit on pairs from the other and measure it there.

    What it costs is bounded by counts, never by a clock, so that the same call gives the same numbers everywhere.

    Args:
        model: A `HookedVLM` or a toy.
        find: Episodes on which edges are scored and the circuit is chosen.
        prove: Other episodes, for everything that is claimed.
        how: How pairs are made; by default the first of `WAYS` that gives enough pairs.
        most: At most so many pairs of the half that proves, and `MOST_TO_FIND` of the other.
        exact: Edges that are also run exactly, to be compared with their estimate by gradient.
        n_random: Random circuits of equal size.
        seed: Of pairs, intervals, permutations and random circuits.
        batch_size: Prompts at once.
        task: For the record.
        progress: Show bars.

    Returns:
        A Trace; what could not be done is None, and `notes` say why.

    Raises:
        OptionError: `how` does not exist.
    """
    if how is not None and how not in get_args(How):
        raise OptionError(f"how must be one of {', '.join(get_args(How))}; got {how!r}. Pick one of them.")
    notes: list[str] = []
    common: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "task": task, "progress": progress}
    pairs = _pairs(model, prove, (how,) if how else WAYS, most, seed, notes)
    if pairs is None:
        return Trace(None, None, None, None, "", 0, 0, tuple(notes))
    effects = _patched(model, pairs, common, notes)
    empty = Trace(effects, None, None, None, pairs.how, 0, pairs.n, tuple(notes))
    if effects is None or not differs(effects, seed):
        said = "The corrupt prompts do not change the answer here, so there is nothing to trace." if effects is not None else ""
        return replace(empty, notes=tuple(n for n in (*notes, said) if n))
    others = _pairs(model, find, (pairs.how,), min(most, MOST_TO_FIND), seed, notes)  # type: ignore[arg-type]
    if others is None:
        return replace(empty, notes=tuple(notes))
    scores, circuit, curve = _circuit(model, others, pairs, exact, n_random, common, notes)
    return Trace(effects, scores, circuit, curve, pairs.how, others.n, pairs.n, tuple(notes))


def differs(effects: PatchEffects, seed: int = 0) -> bool:
    """Whether the metric of the clean runs is above that of the corrupt ones: the 95 % interval of the difference lies above zero."""
    return mean_estimate(np.asarray(effects.clean) - np.asarray(effects.corrupt), unit=effects.unit, seed=seed).low > 0


def _pairs(model: Any, episodes: Sequence[Episode], ways: Sequence[How], most: int, seed: int, notes: list[str]) -> Pairs | None:
    """The first kind of pair that exists often enough, at most `most` of them; None, and why, where there is none."""
    why = ""
    for how in ways:
        try:
            found = minimal_pairs(model, episodes, how, seed=seed)
        except EpisodeError as error:
            why = why or str(error)
            continue
        if found.n < FEWEST_PAIRS:
            why = why or f"only {found.n} of {len(episodes)} prompts have a partner of equal length ({how.replace('_', ' ')})."
            continue
        keep = range(min(most, found.n))
        return replace(found, clean=found.clean.select(keep), corrupt=found.corrupt.select(keep))
    notes.append(f"No minimal pairs, so nothing was patched: {why}")
    return None


def _patched(model: Any, pairs: Pairs, common: dict[str, Any], notes: list[str]) -> PatchEffects | None:
    """The stream by layer and span, the heads' outputs by head; p corrected over the cells of both."""
    layers = sorted({round(x) for x in np.linspace(0, model.cfg.n_layers - 1, MOST_LAYERS)}) if model.cfg.n_layers > MOST_LAYERS else None
    if layers is not None:
        notes.append(f"{len(layers)} of {model.cfg.n_layers} layers were patched.")
    parts: list[PatchEffects] = []
    for site, by in (("resid_pre", "span"), ("z", "head")):
        try:
            parts.append(patch(model, pairs, sites=site, by=by, layers=layers, **common))  # type: ignore[arg-type]
        except MechiclError as error:
            notes.append(f"{site} was not patched: {error}")
    if not parts:
        return None
    sites = {name: site for part in parts for name, site in part.sites.items()}
    together = holm(np.concatenate([site.p.ravel() for site in sites.values()]))
    cuts = np.split(together, np.cumsum([site.p.size for site in sites.values()])[:-1])
    sites = {name: replace(site, p_corrected=p.reshape(site.p.shape)) for (name, site), p in zip(sites.items(), cuts, strict=True)}
    return replace(parts[0], sites=sites, notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)))


def _circuit(
    model: Any, find: Pairs, prove: Pairs, exact: int, n_random: int, common: dict[str, Any], notes: list[str]
) -> tuple[EdgeScores | None, Circuit | None, CircuitCurve | None]:  # fmt: skip
    """The circuit's parts, or None and a note where it cannot be had."""
    try:
        graph = EdgeGraph.of(model)
        size = len(graph.senders) * find.clean.n_pos * int(model.cfg.d_model) * 4
        if size > MOST_BYTES:
            raise UnsupportedModelError(
                f"one prompt's senders must fit into {MOST_BYTES / 1e9:.0f} GB; they take {size / 1e9:.1f} GB. Use shorter prompts, or `mechicl circuit`."
            )
        level: Level = "edge" if int(graph.possible.sum()) <= MOST_EDGES else "node"
        return search_circuit(
            model, find, prove, CircuitPlan(level=level, exact=exact, n_random=n_random, minimal=level == "edge"), **common
        )
    except MechiclError as error:
        notes.append(f"No circuit: {error}")
        return None, None, None


@dataclass(frozen=True)
class CircuitPlan:
    """How a circuit is looked for. `scored_by`: "EAP-IG", "EAP", or "exact" (every edge dropped alone, on the pairs that find); `exact`: edges also run exactly;
    the rest as in `analysis.circuits.find_circuit`."""

    scored_by: Literal["EAP-IG", "EAP", "exact"] = "EAP-IG"
    search: Method = "threshold"
    level: Level = "edge"
    target: float = TARGET
    exact: int = 16
    n_random: int = 20
    metric: MetricName = "logit_diff"
    minimal: bool = True


def search_circuit(
    model: Any, find: Pairs, prove: Pairs, plan: CircuitPlan, *, seed: int = 0, batch_size: int = 8, task: str = "", progress: bool = True
) -> tuple[EdgeScores | None, Circuit, CircuitCurve | None]:  # fmt: skip
    """A circuit scored and chosen on some pairs and measured on others, with its curve; the curve is None where edges were scored exactly.

    Args:
        model: A toy, or a `HookedVLM` whose heads are summands of the stream.
        find: Pairs that choose.
        prove: Pairs that are measured.
        plan: How.
        seed: Of intervals and random circuits.
        batch_size: Pairs at once.
        task: For the record.
        progress: Show bars.

    Raises:
        UnsupportedModelError: the model has no graph of edges.
        OptionError, EpisodeError: what `eap` and `find_circuit` refuse.
    """
    common: dict[str, Any] = {"metric": plan.metric, "seed": seed, "batch_size": batch_size, "task": task, "progress": progress}
    scores = None if plan.scored_by == "exact" else eap(model, find, method=plan.scored_by, by_span=True, exact=plan.exact, **common)
    found = find_circuit(
        model,
        find,
        scores,
        target=plan.target,
        method=plan.search,
        level=plan.level,
        minimal=plan.minimal,
        held_out=0.0,
        n_random=0,
        places=scores,
        **common,
    )
    circuit = evaluate_circuit(model, prove, found, n_random=plan.n_random, places=scores, **common)
    if scores is None:
        return None, circuit, None
    graph = EdgeGraph.of(model)
    nodes = plan.level == "node"
    ks = stops(len(found.nodes) - 2 if nodes else found.n_edges, len(graph.senders) - 1 if nodes else int(graph.possible.sum()))
    curve = circuit_curve(
        model, prove, scores, ks, level=plan.level, n_random=min(plan.n_random, max(8, plan.n_random // 2)), places=scores, **common
    )
    return scores, circuit, replace(curve, circuit=circuit)


@dataclass(frozen=True)
class CircuitCost:
    """What the search will take, roughly: `passes` of one prompt through the model, of which one was timed."""

    edges: int
    n_find: int
    n_prove: int
    passes: int
    seconds: float

    def __str__(self) -> str:
        time = f"{self.seconds:.0f} s" if self.seconds < 120 else f"{self.seconds / 60:.0f} min"
        return f"{self.edges} edges, {self.n_find} pairs to find and {self.n_prove} to measure, about {self.passes} passes, {time} (the search may need more)"


def circuit_cost(model: Any, find: Pairs, prove: Pairs, plan: CircuitPlan, *, batch_size: int = 8) -> CircuitCost:
    """Count the passes of `search_circuit` and time a few of them: scores, a search of a hundred sets, the random circuits, the curve.

    Raises:
        UnsupportedModelError: the model has no graph of edges.
    """
    graph = EdgeGraph.of(model)
    edges = int(graph.possible.sum())
    rows = range(min(batch_size, find.n))
    begun = time.perf_counter()
    with torch.no_grad():
        model.forward(find.clean.select(rows))
    each = (time.perf_counter() - begun) / len(rows)
    steps = {"EAP-IG": 5, "EAP": 1, "exact": 0}[plan.scored_by]
    scoring = 3 * (steps + 1) + plan.exact if steps else edges  # a backward pass costs about two forward ones
    sets = 100 if plan.search != "prune" else edges
    passes = find.n * (scoring + sets) + prove.n * (2 + plan.n_random + 40 + (9 * (1 + max(8, plan.n_random // 2)) if steps else 0))
    return CircuitCost(edges, find.n, prove.n, passes, passes * each)


def stops(size: int, most: int, steps: int = 9) -> list[int]:
    """Numbers of edges for the curve: a few below the circuit's size, that size, and a few up to three times of it."""
    below = np.linspace(0, size, steps - 3).round().astype(int).tolist()
    return sorted({k for k in (*below, round(1.5 * size), 2 * size, 3 * size) if 0 < k <= most})
