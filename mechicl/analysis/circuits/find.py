"""Circuits: find a small set of edges (or nodes) that does the work, and measure on other prompts how faithful, complete and minimal it is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, get_args

import numpy as np

from mechicl.analysis.circuits.items import MASK_BYTES, Items
from mechicl.analysis.circuits.measure import Measured, measure, random_faithfulness
from mechicl.analysis.circuits.runs import CircuitRuns
from mechicl.analysis.circuits.scores import check_level, places_of
from mechicl.analysis.circuits.search import forward, grown, prefixes, prune, smallest_prefix
from mechicl.analysis.feed import provenance
from mechicl.analysis.guarded import guarded
from mechicl.analysis.patching.metrics import Metric
from mechicl.errors import OptionError
from mechicl.models.edge_graph import EdgeGraph
from mechicl.models.subgraph import MEMORY
from mechicl.prompts.corrupt import Pairs
from mechicl.results import Circuit, CircuitCurve, Edge, Estimate, Sender
from mechicl.results.circuits import Level, Replacement

Method = Literal["threshold", "greedy", "prune"]
"""threshold: the strongest edges first. greedy: the strongest edge into what is already in, from the logits back (Hanna et al. 2024); without scores and for nodes, the
node that helps most, one by one. prune: from the whole graph, the least harmful edges dropped by exact effects (close to ACDC)."""


@guarded
def find_circuit(
    model: Any,
    pairs: Pairs,
    scores: Any = None,
    *,
    target: float = 0.85,
    method: Method | str = "threshold",
    level: Level | str = "edge",
    minimal: bool = True,
    metric: Metric = "logit_diff",
    replacement: Replacement | str = "resample",
    held_out: float = 0.5,
    n_random: int = 50,
    places: Any = None,
    name: str = "",
    seed: int = 0,
    batch_size: int = 8,
    memory: int = MEMORY,
    task: str = "",
    progress: bool = True,
) -> Circuit:
    """A small circuit that reaches a target faithfulness, and the evidence for it on pairs that did not choose it.

    Edges outside the circuit carry the corrupt run (or means); see `models.subgraph.run_subgraph`. The search looks for sets whose faithfulness is within 1 - target of
    1, above or below: a set without what speaks against the answer can overshoot, and that is not the model's behaviour either.

    Args:
        model: A toy, or a `HookedVLM` whose heads are added to the stream as they are.
        pairs: Clean and corrupt prompts (`prompts.corrupt.minimal_pairs`).
        scores: What to rank by: `EdgeScores`, `PathEffects` or a mapping from Edge (level "edge"); head scores, patching effects, a mapping from Sender, or scores of
            edges (level "node"). None: the exact loss of dropping each edge or node alone from the whole graph, on the pairs that are searched.
        target: Faithfulness to reach, in (0, 1).
        method: See `Method`.
        level: "edge", or "node": heads and MLPs are kept whole, with all edges between them.
        minimal: Afterwards drop what the target does not need, until no single edge (node) can be dropped.
        metric: See `analysis.metrics.Metric`.
        replacement: "resample" or "mean".
        held_out: Share of the pairs kept for measuring. 0: search and measure on the same pairs, which flatters the circuit (a note says so).
        n_random: Random circuits of equal size for the band; 0 for none.
        places: Where nodes act (see `circuit_scores.places_of`).
        name: What to call it.
        seed: Of the split, the random circuits and the intervals.
        batch_size: Pairs at once.
        memory: Bytes for one block of sets of edges.
        task: For the record.
        progress: Show how many sets have been run.

    Returns:
        A Circuit.

    Raises:
        OptionError: an option outside its range, scores of another kind, or runs that do not differ in the metric.
        UnsupportedModelError: the model has no graph of edges; says why.
    """
    _check(method, target, held_out, n_random)
    whole = CircuitRuns.of(model, pairs, metric=metric, replacement=replacement, batch_size=batch_size, memory=memory, progress=progress)
    search, test = _split(whole, held_out, seed)
    items = Items.of(whole.graph, check_level(level))
    value, scored_by = _ranked(items, search, scores, method)
    chosen = _search(items, search, value, method, target, minimal)
    options = {"target": target, "method": method, "level": level, "minimal": minimal, "metric": whole.reads.name, "replacement": replacement,
               "held_out": held_out, "n_random": n_random, "batch_size": batch_size, "pairs": pairs.how}  # fmt: skip
    notes = list(whole.notes)
    if search is test:
        notes.append("found and measured on the same pairs: faithfulness is optimistic.")
    found = search.estimate(search.values(items.masks(chosen[None]))[0], seed=seed)
    measured = measure(test, items, chosen, n_random=n_random, seed=seed)
    whole.bar.close()
    return _circuit(
        model, measured, items, test, value, places=places_of(whole.graph, places), method=method, scored_by=scored_by, target=target, found=found,
        n_found=search.n, held_out=search is not test, notes=notes, name=name, record=provenance(model, task=task, seed=seed, options=options),
    )  # fmt: skip


@guarded
def evaluate_circuit(
    model: Any,
    pairs: Pairs,
    circuit: Circuit | Collection[Edge] | Collection[Sender],
    *,
    metric: Metric = "logit_diff",
    replacement: Replacement | str = "resample",
    n_random: int = 50,
    places: Any = None,
    name: str = "",
    seed: int = 0,
    batch_size: int = 8,
    memory: int = MEMORY,
    task: str = "",
    progress: bool = True,
) -> Circuit:
    """Faithfulness, completeness and minimality of a given circuit on these pairs: another task, another modality, another checkpoint, or edges named by hand.

    Args:
        model: As in `find_circuit`.
        pairs: Clean and corrupt prompts.
        circuit: A Circuit, its edges, or nodes (Senders) to be kept whole.

    Other arguments, errors: as in `find_circuit`.
    """
    runs = CircuitRuns.of(model, pairs, metric=metric, replacement=replacement, batch_size=batch_size, memory=memory, progress=progress)
    given = circuit if isinstance(circuit, Circuit) else None
    members = list(circuit.edges if isinstance(circuit, Circuit) else circuit)
    level = given.level if given else "node" if members and isinstance(members[0], Sender) else "edge"
    items = Items.of(runs.graph, check_level(level))
    if given and level == "node":
        members = [s for s in runs.graph.senders if s.name in {node.name for node in given.nodes} and s.kind != "embed"]
    chosen = items.chosen(members)
    measured = measure(runs, items, chosen, n_random=n_random, seed=seed)
    runs.bar.close()
    value = items.values_of(given.scores) if given else np.full(len(items), np.nan)
    options = {"metric": runs.reads.name, "replacement": replacement, "n_random": n_random, "batch_size": batch_size, "pairs": pairs.how}
    return _circuit(
        model, measured, items, runs, value, places=places_of(runs.graph, places) or dict(given.places if given else {}),
        method=given.method if given else "given", scored_by=given.scored_by if given else "given", target=given.target if given else float("nan"),
        found=given.found if given else None, n_found=given.n_found if given else 0, held_out=True, notes=list(runs.notes), name=name or (given.name if given else ""),
        record=provenance(model, task=task, seed=seed, options=options),
    )  # fmt: skip


@guarded
def circuit_curve(
    model: Any,
    pairs: Pairs,
    scores: Any = None,
    ks: Sequence[int] | None = None,
    *,
    method: Literal["threshold", "greedy"] | str = "threshold",
    level: Level | str = "edge",
    metric: Metric = "logit_diff",
    replacement: Replacement | str = "resample",
    held_out: float = 0.5,
    n_random: int = 20,
    circuit: Circuit | None = None,
    places: Any = None,
    seed: int = 0,
    batch_size: int = 8,
    memory: int = MEMORY,
    task: str = "",
    progress: bool = True,
) -> CircuitCurve:
    """Faithfulness of the first k edges (or nodes) of a ranking, for growing k, beside random circuits of as many edges.

    Args:
        model, pairs, scores: As in `find_circuit`. Scores that were made on these very pairs choose edges by their noise too: make them on others, or leave them to None,
            which scores on one part and measures on the other.
        ks: How many edges (level "node": nodes) to keep; None: 0 to 12 and about 14 more up to all.
        method: Order of the edges: by strength, or grown from the logits.
        held_out: Share of the pairs that is measured on, where `scores` is None. Given scores are taken as made elsewhere, and all pairs are measured.
        n_random: Random circuits for each k.
        circuit: The circuit that was chosen, for the record (figures start there).

    Other arguments, errors: as in `find_circuit`.
    """
    _check(method, 0.5, held_out, n_random)
    whole = CircuitRuns.of(model, pairs, metric=metric, replacement=replacement, batch_size=batch_size, memory=memory, progress=progress)
    search, test = _split(whole, held_out if scores is None else 0.0, seed)
    items = Items.of(whole.graph, check_level(level))
    value, scored_by = _ranked(items, search, scores, method)
    order = _order(items, value, method)
    sizes = _sizes(ks, len(order))
    sets = prefixes(order, sizes, len(items))
    masks = items.masks(sets)
    raw = test.values(masks)
    live = whole.graph.live(masks)
    bands = [random_faithfulness(test, items, one, alive, n_random, np.random.default_rng([seed, k]))[0] for k, (one, alive) in enumerate(zip(sets, live, strict=True))]  # fmt: skip
    whole.bar.close()
    low, mean, high = (np.array([f(band) if len(band) else np.nan for band in bands]) for f in (_low, np.mean, _high))
    edges, each = items.ordered_edges(order, value)
    options = {"method": method, "level": level, "metric": whole.reads.name, "replacement": replacement, "n_random": n_random, "batch_size": batch_size, "pairs": pairs.how}  # fmt: skip
    return CircuitCurve(
        ks=items.edges_kept(sets), edges_in_order=edges, scores=each, n_live=live.sum((1, 2)), faithfulness=tuple(test.estimate(row, seed=seed) for row in raw),
        random_low=low, random_mean=mean, random_high=high, n_draws=n_random, raw=raw.T, clean=test.clean, corrupt=test.corrupt, replacement=replacement,
        metric=whole.reads.name, unit=whole.reads.unit, scored_by=scored_by, n_edges_possible=int(whole.graph.possible.sum()), n=test.n, skipped=whole.skipped,
        provenance=provenance(model, task=task, seed=seed, options=options), level=items.level, places=places_of(whole.graph, places), notes=whole.notes, shape=shape_of(whole.graph), circuit=circuit,
    )  # fmt: skip


def shape_of(graph: EdgeGraph) -> dict[str, Any]:
    """What two models must share for their circuits to be compared."""
    return {"n_layers": graph.n_layers, "n_heads": graph.n_heads, "n_key_value_heads": graph.n_key_value_heads, "mlps": graph.mlps}


def _low(band: np.ndarray) -> float:
    return float(np.quantile(band, 0.025))


def _high(band: np.ndarray) -> float:
    return float(np.quantile(band, 0.975))


def _check(method: str, target: float, held_out: float, n_random: int) -> None:
    if method not in get_args(Method):
        raise OptionError(f"method must be one of {', '.join(get_args(Method))}; got {method!r}. Pick one of them.")
    if not 0 < target < 1:
        raise OptionError(f"target must lie between 0 and 1; got {target}. 0.85 keeps what carries 85 % of the difference.")
    if not 0 <= held_out < 1:
        raise OptionError(f"held_out must be in [0, 1); got {held_out}. 0.5 finds the circuit on one half and measures it on the other.")
    if n_random < 0:
        raise OptionError(f"n_random must be at least 0; got {n_random}. 50 give a band.")


def _split(runs: CircuitRuns, held_out: float, seed: int) -> tuple[CircuitRuns, CircuitRuns]:
    """Pairs to search on and pairs to measure on, drawn at random; the same where nothing is held out or there is one pair only."""
    n_test = round(runs.n * held_out)
    if not 0 < n_test < runs.n:
        return runs, runs
    order = np.random.default_rng([seed, 1]).permutation(runs.n)
    test, search = sorted(order[:n_test].tolist()), sorted(order[n_test:].tolist())
    return runs.take(search), runs.take(test)


def _ranked(items: Items, search: CircuitRuns, scores: Any, method: str) -> tuple[np.ndarray, str]:
    """Every item's score [item] and what it is; exact single losses where none are given (pruning measures its own as it goes)."""
    if scores is not None:
        return items.scored(scores)
    if method == "prune" or (method == "greedy" and items.level == "node"):
        return np.full(len(items), np.nan), "exact effects, step by step"
    found, step = [], max(1, MASK_BYTES // items.graph.possible.size)
    for start in range(0, len(items), step):
        dropped = np.arange(start, min(start + step, len(items)))
        found.append(search.faithfulness(items.masks(np.arange(len(items))[None, :] != dropped[:, None])))
    return 1.0 - np.concatenate(found), "exact loss of each alone"


def _order(items: Items, value: np.ndarray, method: str) -> list[int]:
    """Items, the strongest (of either sign) first; unscored ones last."""
    strength = np.nan_to_num(np.abs(value), nan=-1.0)
    if method == "greedy" and items.level == "edge":
        return [items.index[pair] for pair in grown(items.graph, items.grid(np.where(np.isnan(value), np.nan, strength)))]
    return [int(i) for i in np.argsort(-strength, kind="stable")]


def _search(items: Items, search: CircuitRuns, value: np.ndarray, method: str, target: float, minimal: bool) -> np.ndarray:
    """The chosen items, as truth values."""

    def close(sets: np.ndarray) -> np.ndarray:
        found = np.concatenate([search.faithfulness(masks) for masks in items.blocks(sets)])
        return 1.0 - np.abs(1.0 - found)

    chosen = np.ones(len(items), dtype=bool)
    if method == "greedy" and items.level == "node" and np.isnan(value).all():
        chosen = items.chosen_at(forward(len(items), close, target, len(items)))
    elif method != "prune":
        order = _order(items, value, method)
        chosen = prefixes(order, [smallest_prefix(order, len(items), close, target)], len(items))[0]
    if minimal or method == "prune":
        chosen = prune(chosen, close, target, items.trim, np.nan_to_num(np.abs(value)))
    return items.trim(chosen)


def _sizes(ks: Sequence[int] | None, n: int) -> np.ndarray:
    if ks is None:
        return np.arange(n + 1) if n <= 24 else np.unique(np.round(np.concatenate([np.arange(13), np.geomspace(14, n, 14)])).astype(int))
    sizes = np.unique(np.asarray(list(ks), dtype=int))
    if not len(sizes) or sizes[0] < 0 or sizes[-1] > n:
        raise OptionError(f"ks must be numbers from 0 to {n}; got {list(ks)}. Choose how much to keep.")
    return sizes


def _circuit(
    model: Any, measured: Measured, items: Items, runs: CircuitRuns, value: np.ndarray, *, places: dict[str, str], method: str, scored_by: str, target: float,
    found: Estimate | None, n_found: int, held_out: bool, notes: list[str], name: str, record: Any,
) -> Circuit:  # fmt: skip
    graph = items.graph
    return Circuit(
        edges=measured.edges(items, value), nodes=measured.nodes(graph, places), level=items.level, method=method, scored_by=scored_by,
        scores=items.edge_scores(measured.mask, value), faithfulness=measured.faithfulness, completeness=measured.completeness,
        minimality=measured.minimality(items, value), random_low=measured.random[0], random_mean=measured.random[1], random_high=measured.random[2],
        n_draws=measured.n_draws, p_random=measured.p_random, n_edges_possible=int(graph.possible.sum()), places=places, replacement=runs.replacement,
        metric=runs.reads.name, unit=runs.reads.unit, target=target, found=found, clean=runs.clean, corrupt=runs.corrupt, kept=measured.kept,
        complement=measured.complement, n=runs.n, n_found=n_found, held_out=held_out, skipped=runs.skipped, provenance=record, name=name,
        notes=(*notes, *measured.notes), gaps=measured.gaps,
        shape=shape_of(graph),
    )  # fmt: skip
