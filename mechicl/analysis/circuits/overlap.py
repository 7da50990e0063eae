"""Do two circuits overlap more than chance? Of two modalities, tasks, checkpoints, or models of one shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lgamma
from typing import Any, Literal

import numpy as np

from mechicl.analysis.agreement import correlation, ranks
from mechicl.analysis.circuits.scores import check_level, edge_scores, node_scores
from mechicl.analysis.statistics import wilson
from mechicl.errors import OptionError
from mechicl.models.edge_graph import EdgeGraph
from mechicl.results import Circuit, CircuitCurve, CircuitOverlap, Edge, Estimate, KindOverlap, Sender
from mechicl.results.circuits import Level

Strata = Literal["kind", "layer"]
"""Within what chance deals anew. kind: what sends and what reads (an MLP's edges into keys stay that). layer: also their layers, so that two circuits that merely
both sit late do not seem to share."""


def compare_circuits(
    first: Any,
    second: Any,
    *,
    level: Level | str = "edge",
    strata: Strata | str = "kind",
    ks: Sequence[int] | None = None,
    names: tuple[str, str] | None = None,
) -> CircuitOverlap:
    """Shared edges or nodes of two circuits, with what random circuits of the same make-up would share.

    Chance keeps each circuit's number of edges in every stratum and deals them out anew, independently: it does not know that circuits must hang together, which makes
    random sets that contain each other's neighbours a little rarer than they should be. Overlap says that the same parts are used, not that they do the same.

    Args:
        first: A Circuit; or a ranking: a CircuitCurve, `EdgeScores`, `PathEffects`, a mapping from Edge (level "node": anything that scores nodes). Rankings have no edge of
            their own: the sets compared are their top k, k as large as the other circuit, or the smallest of `ks`.
        second: The same kind.
        level: Compare edges, or the nodes that they join (embeddings and logits are in every circuit and not counted).
        strata: See `Strata`.
        ks: Sizes of the curve over two rankings; None: up to about 15 sizes.
        names: What to call the two.

    Returns:
        A CircuitOverlap.

    Raises:
        OptionError: models of different shapes, or something that is neither a circuit nor a ranking.
    """
    check_level(level)
    if strata not in ("kind", "layer"):
        raise OptionError(f'strata must be "kind" or "layer"; got {strata!r}. layer is the stricter comparison.')
    graph = _graph(first, second)
    sides = [_side(graph, one, level) for one in (first, second)]
    members, groups = _members(graph, level, strata)
    sets, notes = _sets(sides, ks)
    sizes, shared, top_chance, top_high = _curve(sides, groups, ks)
    kinds = _by_kind(sets, groups)
    a, b = sets
    both, union = int((a & b).sum()), int((a | b).sum())
    pmf = shared_pmf([(k.n_possible, k.n_first, k.n_second) for k in kinds])
    values = np.arange(len(pmf)) / np.maximum(a.sum() + b.sum() - np.arange(len(pmf)), 1)
    share = wilson((a & b)[a | b], unit="share of the union")
    return CircuitOverlap(
        names=names or (_called(first, "first"), _called(second, "second")), level=check_level(level), shared=_named(members, a & b), only_first=_named(members, a & ~b),
        only_second=_named(members, b & ~a), n_possible=len(members), jaccard=share if union else Estimate(np.nan, np.nan, np.nan, 0, "share of the union"),
        chance=float(pmf @ values), chance_high=float(values[pmf_quantile(pmf, 0.975)]), expected=float(pmf @ np.arange(len(pmf))), p=float(pmf[both:].sum()),
        by_kind=tuple(kinds), ks=sizes, top_shared=shared, top_chance=top_chance, top_high=top_high, rank_correlation=_correlation(sides), notes=tuple(notes),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Side:
    """A circuit or a ranking over the members: `chosen` [member] where there is a set, `score` [member] (magnitudes, NaN unscored) where there is a ranking."""

    chosen: np.ndarray | None
    score: np.ndarray | None


def _graph(first: Any, second: Any) -> EdgeGraph:
    shapes = [_shape(one) for one in (first, second)]
    known = [shape for shape in shapes if shape]
    if not known:
        raise OptionError("first or second must be a Circuit or CircuitCurve, which know their model's shape; got two mappings. Give one.")
    if len(known) == 2 and known[0] != known[1]:
        raise OptionError(
            f"circuits must come from models of one shape; got {known[0]} and {known[1]}. Between other models compare the spans where nodes act, or head scores."
        )
    return EdgeGraph(**known[0])


def _shape(one: Any) -> dict[str, Any]:
    if isinstance(one, Circuit | CircuitCurve):
        return dict(one.shape)
    readers, senders = getattr(one, "receivers", None), getattr(one, "senders", None)
    if not readers or not senders:
        return {}
    return {
        "n_layers": 1 + max(r.layer for r in readers if r.kind != "logits"),
        "n_heads": 1 + max(s.head for s in senders),
        "n_key_value_heads": 1 + max((r.head for r in readers if r.kind in ("k", "v")), default=max(s.head for s in senders)),
        "mlps": any(s.kind == "mlp" for s in senders),
    }


def _members(graph: EdgeGraph, level: str, strata: str) -> tuple[list[Edge] | list[Sender], np.ndarray]:
    """What can be shared, and the stratum of each."""
    if level == "edge":
        edges = list(graph.edges)
        keys = [
            f"{e.sender.kind} -> {e.receiver.kind}" + (f", {e.sender.layer} -> {e.receiver.layer}" if strata == "layer" else "")
            for e in edges
        ]
        return edges, np.array(keys)
    nodes = [s for s in graph.senders if s.kind != "embed"]
    return nodes, np.array([s.kind + (f" {s.layer}" if strata == "layer" else "") for s in nodes])


def _side(graph: EdgeGraph, one: Any, level: str) -> _Side:
    if isinstance(one, Circuit):
        mask = graph.mask(one.edges)
        if level == "edge":
            return _Side(_on_edges(graph, mask), None)
        used = set(graph.nodes(mask))
        return _Side(np.array([s in used for s in graph.senders if s.kind != "embed"]), None)
    scores = _ranked(one) if isinstance(one, CircuitCurve) else one
    if level == "edge":
        return _Side(None, np.abs(_on_edges(graph, edge_scores(graph, scores)[0])))
    found = node_scores(graph, scores)[0]
    return _Side(None, np.abs(found[[i for i, s in enumerate(graph.senders) if s.kind != "embed"]]))


def _ranked(curve: CircuitCurve) -> Mapping[Edge, float]:
    """A curve's own order as scores: its edges may have been grown, not sorted."""
    return {edge: float(len(curve.edges_in_order) - i) for i, edge in enumerate(curve.edges_in_order)}


def _on_edges(graph: EdgeGraph, grid: np.ndarray) -> np.ndarray:
    """[receiver, sender] as one number for each edge of `graph.edges`."""
    return grid[graph.possible]


def _sets(sides: Sequence[_Side], ks: Sequence[int] | None) -> tuple[list[np.ndarray], list[str]]:
    """The two sets; a ranking gives as many as the other circuit has."""
    notes: list[str] = []
    fixed = [side.chosen for side in sides]
    sizes = [int(one.sum()) for one in fixed if one is not None]
    n = len(next(x for side in sides for x in (side.chosen, side.score) if x is not None))
    k = sizes[0] if sizes else min(ks) if ks is not None and len(ks) else max(1, n // 10)
    found = []
    for side, one in zip(sides, fixed, strict=True):
        if one is None:
            assert side.score is not None
            one = _top(side.score, k)
            notes.append(f"a ranking stands for a circuit by its top {k}.")
        found.append(one)
    return found, list(dict.fromkeys(notes))


def _top(score: np.ndarray, k: int) -> np.ndarray:
    out = np.zeros(len(score), dtype=bool)
    out[np.argsort(-np.nan_to_num(score, nan=-1.0), kind="stable")[:k]] = True
    return out


def _by_kind(sets: Sequence[np.ndarray], groups: np.ndarray) -> list[KindOverlap]:
    a, b = sets
    found = []
    for kind in dict.fromkeys(groups.tolist()):
        where = groups == kind
        n, x, y = int(where.sum()), int(a[where].sum()), int(b[where].sum())
        found.append(KindOverlap(str(kind), n, x, y, int((a & b)[where].sum()), x * y / n))
    return found


def shared_pmf(strata: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Probability of 0, 1, 2, ... shared members: hypergeometric in every stratum (possible, first, second), summed over independent strata."""
    total = np.ones(1)
    for n, x, y in strata:
        if not x or not y:
            continue
        logs = [_log_comb(x, s) + _log_comb(n - x, y - s) - _log_comb(n, y) for s in range(min(x, y) + 1)]
        total = np.convolve(total, np.exp(logs))
    return total / total.sum()


def _log_comb(n: int, k: int) -> float:
    return -np.inf if k < 0 or k > n else lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


def pmf_quantile(pmf: np.ndarray, q: float) -> int:
    """The least number that is not exceeded with probability q."""
    return int(np.searchsorted(np.cumsum(pmf), q - 1e-12))


def _curve(sides: Sequence[_Side], groups: np.ndarray, ks: Sequence[int] | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sizes, shared members of the two top k, expected, and the 97.5 % quantile by chance; empty unless both are rankings."""
    first, second = sides[0].score, sides[1].score
    if first is None or second is None:
        return np.zeros(0, dtype=int), np.zeros(0), np.zeros(0), np.zeros(0)
    n = len(groups)
    sizes = np.unique(np.round(np.geomspace(1, n, 15)).astype(int)) if ks is None else np.unique(np.asarray(list(ks), dtype=int))
    if len(sizes) and not 1 <= sizes[0] <= sizes[-1] <= n:
        raise OptionError(f"ks must be sizes from 1 to {n}; got {sizes.tolist()}. Choose how many of the best to compare.")
    rows = []
    for k in sizes:
        kinds = _by_kind([_top(first, int(k)), _top(second, int(k))], groups)
        pmf = shared_pmf([(one.n_possible, one.n_first, one.n_second) for one in kinds])
        rows.append((sum(one.n_shared for one in kinds), float(pmf @ np.arange(len(pmf))), pmf_quantile(pmf, 0.975)))
    shared, chance, high = np.array(rows, dtype=float).T
    return sizes, shared, chance, high


def _correlation(sides: Sequence[_Side]) -> float:
    """Spearman over the members that both rankings score."""
    first, second = sides[0].score, sides[1].score
    if first is None or second is None:
        return float("nan")
    known = ~np.isnan(first) & ~np.isnan(second)
    return correlation(ranks(first[known]), ranks(second[known])) if known.sum() > 2 else float("nan")


def _named(members: Sequence[Edge] | Sequence[Sender], chosen: np.ndarray) -> tuple[str, ...]:
    return tuple(member.name for member, there in zip(members, chosen, strict=True) if there)


def _called(one: Any, default: str) -> str:
    return str(getattr(one, "name", "") or default)
