"""`trace_answer`: how the answer gets from the exemplars to the last token, and the edges that take it there; what the report shows after its proof by ablation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np

from mechicl.analysis.circuits import circuit_curve, evaluate_circuit, find_circuit
from mechicl.analysis.edge_attribution import eap
from mechicl.analysis.patching import patch
from mechicl.analysis.statistics import holm, mean_estimate
from mechicl.errors import EpisodeError, MechiclError, OptionError, UnsupportedModelError
from mechicl.models.edge_graph import EdgeGraph
from mechicl.prompts.corrupt import How, Pairs, minimal_pairs
from mechicl.prompts.episode import Episode
from mechicl.results import Circuit, CircuitCurve, EdgeScores, PatchEffects, Trace

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
    """Edges scored and chosen on `find`, measured on `prove`; each None, with a note, where it cannot be done."""
    scores: EdgeScores | None = None
    circuit: Circuit | None = None
    try:
        graph = EdgeGraph.of(model)
        size = len(graph.senders) * find.clean.n_pos * int(model.cfg.d_model) * 4
        if size > MOST_BYTES:
            raise UnsupportedModelError(
                f"one prompt's senders must fit into {MOST_BYTES / 1e9:.0f} GB; they take {size / 1e9:.1f} GB. Look for a circuit with shorter prompts, or with `mechicl circuit`."
            )
        small = int(graph.possible.sum()) <= MOST_EDGES
        level = "edge" if small else "node"
        scores = eap(model, find, method="EAP-IG", by_span=True, exact=exact, **common)
        found = find_circuit(
            model, find, scores, target=TARGET, level=level, minimal=small, held_out=0.0, n_random=0, places=scores, **common
        )
        circuit = evaluate_circuit(model, prove, found, n_random=n_random, places=scores, **common)
        ks = stops(found.n_edges if small else len(found.nodes), int(graph.possible.sum()) if small else len(graph.senders))
        curve = circuit_curve(model, prove, scores, ks, level=level, n_random=max(8, n_random // 2), places=scores, **common)
        return scores, circuit, replace(curve, circuit=circuit)
    except MechiclError as error:
        notes.append(f"{'No circuit' if circuit is None else 'No curve of faithfulness'}: {error}")
        return scores, circuit, None


def stops(size: int, most: int, steps: int = 9) -> list[int]:
    """Numbers of edges for the curve: a few below the circuit's size, that size, and a few up to three times of it."""
    below = np.linspace(0, size, steps - 3).round().astype(int).tolist()
    return sorted({k for k in (*below, round(1.5 * size), 2 * size, 3 * size) if 0 < k <= most})
