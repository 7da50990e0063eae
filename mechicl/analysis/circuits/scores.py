"""What a circuit is chosen by, from any analysis: scores of edges or nodes as arrays over the graph, and the spans where nodes act."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mechicl.errors import OptionError
from mechicl.models.edge_graph import EdgeGraph
from mechicl.results import Edge, Score, Sender
from mechicl.results.circuits import Level


def edge_scores(graph: EdgeGraph, scores: Any) -> tuple[np.ndarray, str]:
    """Scores of edges [receiver, sender] (NaN where nothing scored one), and what they are called.

    Args:
        graph: The model's graph.
        scores: Mapping from Edge to number, or anything with `scores()` that gives one (`EdgeScores`, `PathEffects`).

    Raises:
        OptionError: something else, or an edge that the model does not have.
    """
    given = scores.scores() if callable(getattr(scores, "scores", None)) else scores
    if not isinstance(given, Mapping) or not given or not all(isinstance(key, Edge) for key in given):
        raise OptionError(
            f"scores must give edges numbers (EdgeScores, PathEffects, or a mapping from Edge) for level='edge'; got {type(scores).__name__}. "
            "Node scores make a node circuit: level='node'."
        )
    graph.mask(list(given))  # refuses edges that do not exist
    out = np.full(graph.possible.shape, np.nan)
    for edge, value in given.items():
        out[graph.receiver_index[edge.receiver], graph.sender_index[edge.sender]] = value
    return out, _name(scores)


def node_scores(graph: EdgeGraph, scores: Any) -> tuple[np.ndarray, str]:
    """Scores of nodes [sender] (NaN where nothing scored one; the embeddings are never scored), and what they are called.

    Args:
        graph: The model's graph.
        scores: A head `Score`; patching or attribution effects with site "z" by (layer, head), and "mlp_out" by layer where wanted; a mapping from Sender or (layer,
            head) to number; or scores of edges, of which each node gets the sum of magnitudes over its outgoing edges.

    Raises:
        OptionError: something else.
    """
    out = np.full(len(graph.senders), np.nan)

    def put(kind: Any, layer: int, head: int, value: float) -> None:
        column = graph.sender_index.get(Sender(kind, layer, head))
        if column is None:
            raise OptionError(
                f"scores must be of the model's nodes; got {Sender(kind, layer, head).name}. See EdgeGraph.of(model).senders."
            )
        out[column] = value

    if isinstance(scores, Score):
        for layer, head in np.ndindex(*scores.value.shape):
            put("head", layer, head, float(scores.value[layer, head]))
        return out, scores.name
    if isinstance(getattr(scores, "sites", None), Mapping):
        _from_sites(scores, put)
        return out, _name(scores)
    if isinstance(scores, Mapping) and scores and all(isinstance(key, Sender | tuple) for key in scores):
        for key, value in scores.items():
            node = key if isinstance(key, Sender) else Sender("head", *key)
            if node.kind != "embed":
                put(node.kind, node.layer, node.head, value)
        return out, _name(scores)
    found, name = edge_scores(graph, scores)
    sums = np.nansum(np.abs(found), 0)
    known: Any = ~np.isnan(found).all(0)
    known[graph.sender_index[Sender("embed")]] = False
    return np.where(known, sums, np.nan), f"{name}, summed over outgoing edges"


def _from_sites(effects: Any, put: Any) -> None:
    """Patching effects: how far each node moves the run, whatever the direction."""
    read = False
    for site, kind in (("z", "head"), ("mlp_out", "mlp")):
        found = effects.sites.get(site)
        if found is None:
            continue
        if found.axes != (("layer", "head") if kind == "head" else ("layer",)):
            raise OptionError(
                f'{site} must be patched whole (by="head") to score nodes; its axes are {found.axes}. Patch again, or give places= from it.'
            )
        change = found.value if effects.direction == "denoise" else 1.0 - found.value
        for index in np.ndindex(*change.shape):
            labels = found.labels(index)
            put(kind, int(labels["layer"]), int(labels.get("head", -1)), float(change[index]))
        read = True
    if not read:
        raise OptionError(f'scores must have site "z" or "mlp_out"; got {", ".join(effects.sites)}. Patch heads\' outputs with sites="z".')


def _name(scores: Any) -> str:
    method = getattr(scores, "method", "")
    if method:
        return str(method)
    return {"PathEffects": "path patching", "PatchEffects": "activation patching"}.get(type(scores).__name__, "given scores")


def places_of(graph: EdgeGraph, source: Any) -> dict[str, str]:
    """Node name -> span where it acts most.

    Args:
        graph: The model's graph.
        source: None; a mapping as it is; effects of patching z by (layer, head, span), where the span that moves the run furthest counts; or `EdgeScores` split by span,
            where magnitudes are summed over a node's outgoing edges.

    Raises:
        OptionError: something else.
    """
    if source is None:
        return {}
    if isinstance(source, Mapping):
        return {getattr(node, "name", str(node)): str(place) for node, place in source.items()}
    if getattr(source, "by_span", None) is not None:
        split = np.nansum(np.abs(source.by_span), 1)
        return {
            s.name: source.spans[int(row.argmax())] for s, row in zip(source.senders, split, strict=True) if s.kind != "embed" and row.any()
        }
    z = source.sites.get("z") if isinstance(getattr(source, "sites", None), Mapping) else None
    if z is None or tuple(z.axes) != ("layer", "head", "span"):
        raise OptionError(
            f"places must be a mapping, z patched by (layer, head, span), or edge scores split by span; got {type(source).__name__}. "
            'Use patch(..., sites="z", by="span") or eap(..., by_span=True).'
        )
    change = np.abs(z.value if source.direction == "denoise" else 1.0 - z.value)
    found = {}
    for layer, head in np.ndindex(*change.shape[:2]):
        if not np.isnan(change[layer, head]).all():
            name = Sender("head", int(z.coords["layer"][layer]), int(z.coords["head"][head])).name
            found[name] = str(z.coords["span"][int(np.nanargmax(change[layer, head]))])
    return found


def check_level(level: str) -> Level:
    """Raises OptionError for a level that does not exist."""
    if level not in ("edge", "node"):
        raise OptionError(f'level must be "edge" or "node"; got {level!r}. Edges say what reads what; nodes are cheaper.')
    return level
