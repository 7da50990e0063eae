"""Where the nodes and edges of a circuit stand in a drawing: layers upwards, heads in the column of the span they act at, edges as smooth lines.

Knows edges and places only; draws nothing. With grouped-query attention a key/value head is a node of its own ("kv 1.0") below the query heads that share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mechicl.results import Edge, Receiver

ORDER = ("instruction", "right image", "wrong image", "image", "right text", "wrong text", "text", "right question", "wrong question", "question", "right open",
         "wrong open", "right label", "wrong label", "label", "right close", "wrong close", "close", "glue", "query image", "query text", "query question",
         "query open", "last token")  # fmt: skip
"""Columns from left to right, about as the prompt runs; spans not named here come before "query image"."""

MLPS = "MLP"
"""The column of the MLPs, at the right end."""


@dataclass(frozen=True)
class Model:
    """The sizes that matter for a drawing."""

    n_layers: int
    n_heads: int
    n_key_value_heads: int

    @property
    def grouped(self) -> bool:
        """Whether query heads share keys and values."""
        return self.n_key_value_heads < self.n_heads

    def group(self, head: int) -> int:
        """The key/value head of a query head."""
        return head * self.n_key_value_heads // self.n_heads

    def target(self, receiver: Receiver) -> str:
        """The node at which an edge ends."""
        if receiver.kind in ("k", "v"):
            return f"kv {receiver.layer}.{receiver.head}" if self.grouped else f"{receiver.layer}.{receiver.head}"
        return f"{receiver.layer}.{receiver.head}" if receiver.kind == "q" else receiver.name


def model_of(edges: Iterable[Edge], shape: Mapping[str, object] | None = None) -> Model:
    """Sizes from a result's `shape`; what it does not say is read off the edges (all of them, not a circuit's few)."""
    found = list(edges)
    known = {key: int(value) for key, value in (shape or {}).items() if isinstance(value, (int, np.integer)) and key.startswith("n_")}
    heads = 1 + max((max(e.sender.head, e.receiver.head if e.receiver.kind == "q" else -1) for e in found), default=-1)
    shared = 1 + max((e.receiver.head for e in found if e.receiver.kind in ("k", "v")), default=-1)
    n_heads = known.get("n_heads", max(heads, shared, 1))
    n_kv = known.get("n_key_value_heads", shared or n_heads)
    layers = known.get(
        "n_layers", max((max(e.sender.layer, e.receiver.layer - (e.receiver.kind == "logits")) for e in found), default=0) + 1
    )
    return Model(layers, n_heads, n_kv if 0 < n_kv <= n_heads and n_heads % n_kv == 0 else n_heads)


def nodes_of(edges: Iterable[Edge], model: Model) -> dict[str, tuple[str, int, int]]:
    """Name -> (kind, layer, head) of everything the edges touch, key/value heads included, in the order of execution."""
    found: dict[str, tuple[str, int, int]] = {}
    for edge in edges:
        s, r = edge.sender, edge.receiver
        found[s.name] = (s.kind, s.layer, s.head)
        name = model.target(r)
        kind = "kv" if name.startswith("kv ") else "head" if r.kind in ("q", "k", "v") else r.kind
        found.setdefault(name, (kind, r.layer, r.head))
    rank = {"embed": 0, "kv": 1, "head": 2, "mlp": 3, "logits": 4}
    return dict(sorted(found.items(), key=lambda item: (item[1][1], rank[item[1][0]], item[1][2])))


def shares(nodes: Mapping[str, tuple[str, int, int]], model: Model) -> list[tuple[str, str]]:
    """(key/value head, query head) that belong together, both drawn; nothing without grouped-query attention."""
    heads = [(name, layer, head) for name, (kind, layer, head) in nodes.items() if kind == "head"]
    pairs = [(f"kv {layer}.{model.group(head)}", name) for name, layer, head in heads]
    return [pair for pair in pairs if model.grouped and pair[0] in nodes]


def live_edges(edges: Sequence[Edge], model: Model) -> set[Edge]:
    """Edges on a way from the embeddings to the logits; the others carry nothing."""
    nodes = nodes_of(edges, model)
    arcs = [(e.sender.name, model.target(e.receiver)) for e in edges]
    ways = arcs + shares(nodes, model)
    reached, needed = {"embed"}, {"logits"}
    for _ in range(len(nodes)):
        more = {b for a, b in ways if a in reached} - reached
        back = {a for a, b in ways if b in needed} - needed
        if not more and not back:
            break
        reached |= more
        needed |= back
    return {e for e, (a, b) in zip(edges, arcs, strict=True) if a in reached and b in needed}


@dataclass(frozen=True, eq=False)
class Drawing:
    """Positions of nodes, and the axes' ticks: columns (left to right) as (x, name, left, right), rows (bottom to top) as (y, name)."""

    at: Mapping[str, tuple[float, float]]
    columns: tuple[tuple[float, str, float, float], ...]
    rows: tuple[tuple[float, str], ...]
    by_place: bool

    @property
    def width(self) -> float:
        """Right end of the last column."""
        return max((right for _, _, _, right in self.columns), default=1.0)


def arrange(edges: Sequence[Edge], model: Model, places: Mapping[str, str]) -> Drawing:
    """Positions for everything that the edges touch. Layers without a node take no room; heads without a place stand in a column of their own.

    Args:
        edges: All edges that will ever be drawn, so that nothing moves when some are hidden.
        model: Sizes.
        places: Node name -> span. Without any place of a head, columns are head numbers.
    """
    nodes = nodes_of(edges, model)
    used = sorted({layer for kind, layer, _ in nodes.values() if kind in ("head", "kv", "mlp")})
    row = {layer: k for k, layer in enumerate(used)}
    heads = {name: (layer, head) for name, (kind, layer, head) in nodes.items() if kind == "head"}
    spans = by_place(edges, model, places)
    column_of = {name: (places.get(name) or "elsewhere") if spans else str(head) for name, (_, head) in heads.items()}
    at: dict[str, tuple[float, float]] = {}
    columns: list[tuple[float, str, float, float]] = []
    left = 0.0
    for column in sorted(set(column_of.values()), key=_rank if spans else int):
        inside = {k: sorted(n for n in heads if column_of[n] == column and heads[n][0] == k) for k in used}
        widest = max(len(names) for names in inside.values())
        middle = left + widest / 2
        for layer, names in inside.items():
            for k, name in enumerate(sorted(names, key=lambda n: heads[n][1])):
                at[name] = (middle + k - (len(names) - 1) / 2, float(row[layer]))
        columns.append((middle, column, left, left + widest))
        left += widest + (0.35 if spans else 0.0)
    if any(kind == "mlp" for kind, _, _ in nodes.values()):
        columns.append((left + 0.5, MLPS, left, left + 1.0))
        at |= {name: (left + 0.5, row[layer] + 0.45) for name, (kind, layer, _) in nodes.items() if kind == "mlp"}
        left += 1.0
    centre = max(left, 1.0) / 2
    at |= {"embed": (centre, -1.0), "logits": (centre, float(max(len(used), 1)) + 0.15)}
    for name, (kind, layer, head) in nodes.items():
        if kind == "kv":
            mine = [at[h][0] for h, (l, q) in heads.items() if l == layer and model.group(q) == head]
            at[name] = (float(np.mean(mine)) if mine else centre, row[layer] - 0.36)
    rows = [(-1.0, ""), *((float(k), str(layer)) for layer, k in row.items())]
    return Drawing({name: at[name] for name in nodes}, tuple(columns), tuple(rows), spans)


def by_place(edges: Sequence[Edge], model: Model, places: Mapping[str, str]) -> bool:
    """Whether columns are spans: some head of these edges has a place. Else they are head numbers."""
    return any(places.get(name) for name, (kind, _, _) in nodes_of(edges, model).items() if kind == "head")


def _rank(place: str) -> tuple[int, str]:
    return (ORDER.index(place), "") if place in ORDER else (ORDER.index("query image") - 1, place)


ENTRY = {"q": -0.16, "k": 0.0, "v": 0.16}
"""Where an edge meets its node, sideways: queries left, keys in the middle, values right."""


def path(edge: Edge, drawing: Drawing, model: Model, points: int = 13) -> tuple[np.ndarray, np.ndarray]:
    """x and y along an edge: a cubic that leaves its sender upwards and meets its receiver from below."""
    x0, y0 = drawing.at[edge.sender.name]
    x1, y1 = drawing.at[model.target(edge.receiver)]
    x1 += ENTRY.get(edge.receiver.kind, 0.0) * (0.6 if model.grouped else 1.0)
    y0, y1 = y0 + 0.1, y1 - 0.1
    reach = 0.45 * max(y1 - y0, 0.3)
    bend = (
        0.4 * (1 if edge.sender.head % 2 else -1) if y1 - y0 > 1.3 and abs(x1 - x0) < 0.4 else 0.0
    )  # past the nodes that stand in between
    t = np.linspace(0, 1, points)
    weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
    xs, ys = (x0, x0 + bend, x1 + bend, x1), (y0, y0 + reach, y1 - reach, y1)
    x, y = (sum(w * p for w, p in zip(weights, ends, strict=True)) for ends in (xs, ys))
    return np.round(x, 3), np.round(y, 3)
