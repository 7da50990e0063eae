"""Hand-made results of patching, edges and circuits to draw: right labels carry the answer through layer 1, then the last token does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from views_samples import PROVENANCE, accuracy, estimate

from mechicl.results import (
    Agreement,
    Attribution,
    Circuit,
    CircuitCurve,
    CircuitNode,
    CircuitOverlap,
    Edge,
    EdgeLoss,
    EdgeScores,
    Estimate,
    FunctionVector,
    KindOverlap,
    PatchEffects,
    PathEffects,
    SiteEffects,
    SpanKnockOut,
    SpanKnockOuts,
    Trace,
    Transplant,
    TransplantRow,
    VectorEffect,
)
from mechicl.results.nodes import edges, feeds, receivers, senders

SPANS = ("instruction", "right image", "wrong image", "right label", "wrong label", "query image", "last token")
N = 24
LAYERS, HEADS, SHARED = 3, 4, 2
PLACES = {
    "0.1": "right label",
    "0.2": "right label",
    "1.0": "last token",
    "1.1": "last token",
    "1.2": "last token",
    "2.3": "last token",
    "0.3": "right image",
}


def share(value: float, half: float = 0.06, n: int = N) -> Estimate:
    return Estimate(value, value - half, value + half, n, "share", "bootstrap 95 %")


def site(
    name: str,
    axes: tuple[str, ...],
    coords: dict[str, tuple[Any, ...]],
    strong: dict[tuple[int, ...], float],
    start: float = 0.0,
    seed: int = 0,
) -> SiteEffects:
    rng = np.random.default_rng(seed)
    shape = tuple(len(coords[a]) for a in axes)
    value = start + rng.normal(0, 0.015, shape)
    p = rng.uniform(0.2, 1, shape)
    for cell, v in strong.items():
        value[cell], p[cell] = v, 1e-4
    raw = -4 + 8 * value[None] + rng.normal(0, 0.5, (N, *shape))
    return SiteEffects(name, axes, coords, value, value - 0.05, value + 0.05, p, np.minimum(1, p * 30), raw)


def by_span(name: str, *, start: float = 0.0, seed: int = 0) -> SiteEffects:
    end = 1.0 - start
    reach = lambda share: start + share * (end - start)  # noqa: E731
    strong = {(0, 3): reach(0.93), (0, 4): reach(0.3), (1, 3): reach(0.9), (1, 6): reach(0.12), (2, 6): reach(1.02), (2, 3): reach(0.11)}
    return site(name, ("layer", "span"), {"layer": (0, 1, 2), "span": SPANS}, strong, start, seed)


def by_head(name: str = "z", *, start: float = 0.0, seed: int = 1) -> SiteEffects:
    coords = {"layer": (0, 1, 2), "head": tuple(range(HEADS))}
    return site(
        name,
        ("layer", "head"),
        coords,
        {(1, 0): start + 0.4 * (1 - 2 * start), (1, 1): start + 0.3 * (1 - 2 * start), (2, 3): start - 0.1 * (1 - 2 * start)},
        start,
        seed,
    )


def _pairs(direction: str = "denoise") -> dict[str, Any]:
    rng = np.random.default_rng(5)
    return {"direction": direction, "metric": "logit difference", "unit": "logits", "clean": 4 + rng.normal(0, 1, N), "corrupt": -4 + rng.normal(0, 1, N),
            "pairs": "swap_labels", "n": N, "skipped": (), "provenance": PROVENANCE}  # fmt: skip


def patched(direction: str = "denoise") -> PatchEffects:
    start = 0.0 if direction == "denoise" else 1.0
    return PatchEffects({"resid_pre": by_span("resid_pre", start=start), "z": by_head(start=start)}, correction="holm", **_pairs(direction))


def patched_positions(n_pos: int = 90) -> PatchEffects:
    found = site("resid_pre", ("layer", "pos"), {"layer": (0, 1, 2), "pos": tuple(range(n_pos))}, {(0, 40): 0.8, (2, n_pos - 1): 1.0})
    both = site("z", ("layer", "head", "span"), {"layer": (0, 1, 2), "head": tuple(range(HEADS)), "span": SPANS}, {(1, 2, 6): 0.7})
    flat = site("image_features", ("span",), {"span": SPANS}, {(1,): 0.5})
    return PatchEffects({"resid_pre": found, "z": both, "image_features": flat}, correction="fdr_bh", **_pairs())


def agreement(n: int = 40, names: Sequence[str] | None = None) -> Agreement:
    rng = np.random.default_rng(2)
    exact = np.concatenate([rng.normal(0, 0.02, n - 6), rng.uniform(0.2, 0.6, 6)])
    approximate = 0.8 * exact + rng.normal(0, 0.02, n)
    return Agreement(
        tuple(names or (f"cell {k}" for k in range(n))),
        exact,
        approximate,
        np.arange(n) < n // 2,
        0.93,
        0.6,
        0.71,
        1.2,
        10,
        0.8,
        0.25,
        2e-4,
        320,
    )


def attribution() -> Attribution:
    return Attribution(
        {"resid_pre": by_span("resid_pre"), "z": by_head()},
        "AtP-IG",
        5,
        "activations",
        correction="holm",
        agreement=agreement(),
        **_pairs(),
    )


def transplant() -> Transplant:
    rng = np.random.default_rng(3)
    rows = []
    for layer, strength in ((0, 3.0), (1, 2.0), (2, 0.1)):
        effect, control = Estimate(strength, strength - 0.5, strength + 0.5, N, "logits"), Estimate(0.1, -0.2, 0.4, N, "logits")
        difference = Estimate(strength - 0.1, strength - 0.7, strength + 0.5, N, "logits")
        rows.append(TransplantRow("resid_pre", layer, "right image", "wrong image", effect, control, difference, share(strength / 8), 1e-3 if strength > 1 else 0.7,
                                  3e-3 if strength > 1 else 0.7, rng.normal(strength, 1, N), rng.normal(0.1, 1, N)))  # fmt: skip
    return Transplant(tuple(rows), "logit difference", "logits", np.zeros(N), np.ones(N), "holm", N, 4, (), PROVENANCE)


def _scores(seed: int = 7) -> dict[Edge, float]:
    """Every edge of a three-layer decoder whose heads share keys and values in pairs; a planted path has the large scores."""
    every = list(edges(senders(LAYERS, HEADS), receivers(LAYERS, HEADS, SHARED)))
    rng = np.random.default_rng(seed)
    found = {e: float(rng.normal(0, 0.004)) for e in every}
    planted = {"embed -> v 0.0": 0.5, "embed -> k 0.0": 0.31, "embed -> q 0.1": 0.2, "0.1 -> k 1.0": 0.42, "0.2 -> k 1.0": 0.22, "embed -> v 1.0": 0.35, "embed -> q 0.2": 0.1,
               "embed -> v 0.1": 0.16, "embed -> q 1.0": 0.24, "embed -> q 1.1": 0.19, "1.0 -> logits": 0.38, "1.1 -> logits": 0.3, "1.0 -> mlp 2": 0.09, "mlp 2 -> logits": -0.12}  # fmt: skip
    return {e: planted.get(e.name, score) for e, score in found.items()}


def _matrix(found: dict[Edge, float]) -> tuple[tuple[Any, ...], tuple[Any, ...], np.ndarray]:
    rows, columns = senders(LAYERS, HEADS), receivers(LAYERS, HEADS, SHARED)
    value = np.array([[found[Edge(s, r)] if feeds(s, r) else np.nan for r in columns] for s in rows])
    return rows, columns, value


def paths() -> PathEffects:
    rows, columns, value = _matrix(_scores())
    p = np.where(np.abs(value) > 0.05, 1e-4, np.where(np.isnan(value), np.nan, 0.6))
    raw = -4 + 8 * value[None] + np.random.default_rng(0).normal(0, 0.3, (N, *value.shape))
    common = _pairs()
    return PathEffects(rows, columns, value, value - 0.03, value + 0.03, p, np.minimum(1, p * 5), raw, common["clean"], common["corrupt"], "logit difference", "logits", "denoise",
                       "all", "swap_labels", N, PROVENANCE)  # fmt: skip


def edge_scores() -> EdgeScores:
    found = _scores()
    rows, columns, value = _matrix(found)
    names = [e.name for e in list(found)[:40]]
    common = _pairs()
    return EdgeScores("EAP-IG", rows, columns, value, value - 0.02, value + 0.02, np.repeat(value[None] * 8, N, 0), "logit difference", "logits", "denoise", common["clean"],
                      common["corrupt"], 5, agreement(names=names), "swap_labels", N, (), PROVENANCE)  # fmt: skip


def _in_order() -> tuple[tuple[Edge, ...], dict[Edge, float]]:
    found = _scores()
    return tuple(sorted(found, key=lambda e: -abs(found[e]))), found


def circuit(*, faithful: float = 0.91, held_out: bool = True, draws: int = 20) -> Circuit:
    order, found = _in_order()
    kept = order[:14]
    names = list(dict.fromkeys(n for e in kept for n in (e.sender.name,)))
    nodes = (*(CircuitNode(n, "embed" if n == "embed" else "mlp" if n.startswith("mlp") else "head", 0 if n == "embed" else int(n.replace("mlp ", "").split(".")[0]),
                              -1, PLACES.get(n, "")) for n in names), CircuitNode("logits", "logits", LAYERS))  # fmt: skip
    losses = tuple(EdgeLoss(e, share(abs(found[e]) * 0.7)) for e in kept)
    rng = np.random.default_rng(1)
    clean, corrupt = 4 + rng.normal(0, 1, N), -4 + rng.normal(0, 1, N)
    nan = float("nan")
    return Circuit(kept, nodes, "edge", "greedy", "EAP-IG", found, share(faithful), share(0.08), losses, -0.05 if draws else nan, 0.03 if draws else nan, 0.2 if draws else nan, draws,
                   1 / (draws + 1) if draws else nan, len(order), PLACES, "resample", "logit difference", "logits", 0.85, share(0.94), clean, corrupt, clean * faithful, corrupt, N, N, held_out,
                   (), PROVENANCE, shape={"n_layers": LAYERS, "n_heads": HEADS, "n_key_value_heads": SHARED})  # fmt: skip


def curve(*, with_circuit: bool = True, faithful: float = 0.95) -> CircuitCurve:
    order, found = _in_order()
    ks = np.array([k for k in (0, 2, 4, 6, 8, 10, 12, 14, 16, 20, 30, 50, 80, 120) if k < len(order)] + [len(order)])
    value = faithful / (1 + np.exp(-(ks - 9) / 2.0))
    value[ks == len(order)] = 1.0
    mean = np.linspace(0, 1, len(ks)) ** 3
    rng = np.random.default_rng(1)
    return CircuitCurve(ks, order, found, np.minimum(ks, np.maximum(0, ks - 3)), tuple(share(float(v)) for v in value), mean - 0.08, mean, np.minimum(1, mean + 0.15), 20,
                        rng.normal(0, 1, (N, len(ks))), np.ones(N), np.zeros(N), "resample", "logit difference", "logits", "EAP-IG", len(order), N, (), PROVENANCE,
                        circuit() if with_circuit else None, places=PLACES)  # fmt: skip


def overlap() -> CircuitOverlap:
    kinds = (KindOverlap("k", 60, 8, 7, 5, 0.9), KindOverlap("v", 60, 6, 6, 3, 0.6), KindOverlap("logits", 13, 4, 5, 3, 1.5))
    ks = np.array([5, 10, 20, 40])
    return CircuitOverlap(("pictures", "words"), "edge", ("0.1 -> k 1.0",), (), (), 133, Estimate(0.44, 0.28, 0.62, 25, "jaccard"), 0.07, 0.16, 3.0, 2e-5, kinds, ks, np.array([4, 7, 12, 22]),
                          np.array([0.4, 1.3, 4.8, 14.0]), np.array([2.0, 4.0, 8.0, 18.0]), 0.63)  # fmt: skip


def cuts() -> SpanKnockOuts:
    intact = accuracy()
    rows = []
    for name, layers, after, loss in (
        ("right label <- right image", (0, 1, 2), 0.3, -6.0),
        ("last token <- right label", (0,), 0.96, -0.1),
        ("last token <- right label", (1, 2), 0.1, -8.0),
    ):
        dest, src = name.split(" <- ")
        drop = after - intact.accuracy.value
        rows.append(SpanKnockOut(name, dest, src, layers, None, estimate(after), share(drop), Estimate(loss, loss - 0.4, loss + 0.4, 64, "nats"), 1e-6 if drop < -0.2 else 1.0, 32.0,
                                 np.arange(64) < 64 * after, np.zeros(64), "as many other pairs of tokens", estimate(0.95), share(-0.02), Estimate(-0.2, -0.4, 0.0, 64, "nats"), 0.05,
                                 3e-6 if drop < -0.2 else 1.0))  # fmt: skip
    return SpanKnockOuts(tuple(rows), intact, estimate(0.26), 10, 64, (), PROVENANCE)


def function_vector() -> FunctionVector:
    rng = np.random.default_rng(4)
    effects = []
    for prompts, height in (("zero-shot", 0.4), ("labels shuffled", 0.25)):
        for layer in range(LAYERS):
            value = height * (1.0, 0.6, 0.2)[layer]
            change = Estimate(value, value - 0.05, value + 0.05, N)
            effects.append(
                VectorEffect(
                    layer,
                    prompts,
                    estimate(0.25 + value, N),
                    estimate(0.25 + value, N),
                    change,
                    change,
                    rng.normal(0, 0.02, 12),
                    rng.normal(0.02, 0.02, 12),
                    1 / 25,
                )
            )
    return FunctionVector(
        ((1, 0), (1, 1)),
        rng.normal(0, 1, 16),
        rng.normal(0, 1, (2, 16)),
        N,
        (),
        PROVENANCE,
        tuple(effects),
        {"zero-shot": (estimate(0.25, N), estimate(0.26, N))},
    )


EVERY = {
    "patched": patched, "noise": lambda: patched("noise"), "positions": patched_positions, "attribution": attribution, "transplant": transplant, "paths": paths, "edge scores": edge_scores,
    "circuit": circuit, "curve": curve, "overlap": overlap, "cuts": cuts, "function vector": function_vector,
}  # fmt: skip


def trace(*, faithful: float = 0.91) -> Trace:
    """A whole trace: patching, edge scores, circuit and curve."""
    found = circuit(faithful=faithful)
    return Trace(patched(), edge_scores(), found, curve(), "swap_labels", 12, N)
