"""Hand-made results about keys and values to draw: examples move the last token's values most, meaning in layers 1 and 2, and a key margin that tells answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from views_samples import PROVENANCE, estimate

from mechicl.results import (
    ConditionRow,
    ConditionTable,
    ContrastMap,
    ContrastMargin,
    Estimate,
    FactorShares,
    FillerTest,
    KVShift,
    KVStory,
    MarginEffect,
    MarginPart,
    MixedEffects,
    SimilarityEffect,
    SimilarityTest,
    Strategies,
    StrategyScore,
    TaskEffects,
)

N = 40
PARTS = ("k", "v")
SPANS = ("query image", "query question", "last token")
BASE = {"n": N, "skipped": (), "provenance": PROVENANCE}


def about(value: float, half: float = 0.05, unit: str = "ratio", n: int = N) -> Estimate:
    return Estimate(float(value), float(value - half), float(value + half), n, unit)


def bounds(array: np.ndarray, half: float) -> tuple[np.ndarray, np.ndarray]:
    return array - half, array + half


def _shift(control: str, size: float, layers: int, heads: int, seed: int, test: FillerTest | None = None, others: Any = None) -> KVShift:
    rng = np.random.default_rng(seed)
    shape = (2, layers, heads, len(SPANS))
    value = size * np.abs(rng.normal(0.1, 0.02, shape)) * np.arange(layers)[None, :, None, None]
    value[1, :, :, 2] *= 3
    per = np.abs(value + rng.normal(0, 0.02, (N, *shape)))
    value = per.mean(0)
    measures = {"relative_l2": value, "cosine_distance": value**2 / 2, "cka": np.clip(1 - value, 0, 1)}
    low, high = ({key: bounds(v, 0.01)[k] for key, v in measures.items()} for k in (0, 1))
    pooled = {(part, span): about(per[:, p, ..., s].mean(), 0.02) for p, part in enumerate(PARTS) for s, span in enumerate(SPANS)}
    return KVShift(control, "turns" if control == "filler" else "", PARTS, tuple(range(layers)), tuple(range(heads)), SPANS, measures, low, high, per, per**2, value * 0.1, pooled,
                   np.ones((N, 3), dtype=int), np.full((N, 2), 90), tuple(map(str, range(N))), test=test, others=others or {}, **BASE)  # fmt: skip


def shift(layers: int = 4, heads: int = 2) -> KVShift:
    zero = _shift("zero-shot", 1.6, layers, heads, 1)
    example = zero.measures["relative_l2"]
    filler = example * np.array([0.9, 0.9, 0.3])
    p = np.where(example - filler > 0.05, 1e-4, 0.6)
    pooled = {
        (part, span): about((example - filler)[k, ..., s].mean(), 0.02) for k, part in enumerate(PARTS) for s, span in enumerate(SPANS)
    }
    test = FillerTest(example, filler, example - filler, *bounds(example - filler, 0.02), p, np.minimum(1, p * 20), pooled, {key: 1e-3 if e.value > 0.05 else 0.4 for key, e in pooled.items()})  # fmt: skip
    return _shift("filler", 1.0, layers, heads, 0, test, {"zero-shot": zero})


def shift_alone() -> KVShift:
    return _shift("zero-shot", 1.0, 3, 4, 2)


def similarity(control: str = "filler", *, both: bool = True) -> SimilarityTest:
    """From a filler similar examples shift more; from the zero-shot prompt, where there are both, less."""
    sign = 1 if control == "filler" else -1
    rng = np.random.default_rng(3)
    by, shape = ("most similar", "random", "least similar"), (2, 4, 2, len(SPANS))
    per = np.abs(rng.normal(0.3, 0.05, (N, 3, *shape))) + 0.06 * np.arange(2, -1, -1)[None, :, None, None, None, None]
    value = per.mean(0)
    effect = sign * rng.normal(0.6, 0.3, shape)
    p = np.where(np.abs(effect) > 0.5, 1e-3, 0.5)
    comparisons = tuple(SimilarityEffect(a, b, part, about(0.1, 0.04), about(sign * g, 0.3, "g"), p_, p_ * 2, share) for a, b, part, g, p_, share in (
        ("most similar", "least similar", "k", 0.8, 1e-4, 0.83), ("most similar", "least similar", "v", 0.5, 0.004, 0.7), ("most similar", "random", "k", 0.3, 0.2, 0.55),
        ("random", "least similar", "v", -0.1, 0.6, 0.48)))  # fmt: skip
    return SimilarityTest(by, PARTS, tuple(range(4)), (0, 1), SPANS, value, *bounds(value, 0.02), per, rng.random((N, 3)), rng.integers(0, 9, (N, 3)), comparisons, effect,
                          *bounds(effect, 0.3), p, np.minimum(1, 8 * p), np.full(N, 60), "the model's own vision tower", tuple(map(str, range(N))), control=control, others={"zero-shot": similarity("zero-shot", both=False)} if both else {}, **BASE)  # fmt: skip


CONDITIONS = ("kept+kept", "broken+kept", "kept+changed", "broken+changed", "zero-shot")


def shares(layers: int = 4, heads: int = 2, *, residual: bool = True) -> FactorShares:
    rng = np.random.default_rng(5)
    shape = (2, layers, heads, len(SPANS))
    meaning = np.clip(0.15 + 0.2 * np.arange(layers)[None, :, None, None] / max(1, layers - 1) * 3 + rng.normal(0, 0.05, shape), 0.02, 0.8)
    rest = rng.dirichlet((4, 1.5, 1.5), shape) * (1 - meaning)[..., None]
    found = {"semantics": meaning, "format": rest[..., 0], "interaction": rest[..., 1], "residual": rest[..., 2]}
    if not residual:
        found = {"semantics": meaning, "format": rest[..., 0], "interaction": rest[..., 1] + rest[..., 2]}
    tested = [s for s in found if s != "residual"]
    p = {s: np.where(found[s] > 0.3, 1e-4, 0.5) for s in tested}
    pooled = {part: {s: about(v[k].mean(), 0.04, "share") for s, v in found.items()} for k, part in enumerate(PARTS)}
    right = dict(zip(CONDITIONS, (0.95, 0.3, 0.9, 0.28, 0.25), strict=True))
    squares = {s: np.repeat(v[None], N, 0) for s, v in found.items()} | {"total": np.ones((N, *shape))}
    return FactorShares(
        PARTS, tuple(range(layers)), tuple(range(heads)), SPANS, ("semantics", "format"), {"semantics": ("kept", "broken"), "format": ("kept", "changed")}, tuple(found), found,
        {s: v - 0.04 for s, v in found.items()}, {s: v + 0.04 for s, v in found.items()}, {s: np.full(shape, 0.06) for s in tested}, p, {s: np.minimum(1, 9 * v) for s, v in p.items()},
        rng.random(shape), rng.random(shape), squares, pooled, CONDITIONS, {c: estimate(v, N) for c, v in right.items()}, {c: about(8 * v - 2, 0.4, "nats") for c, v in right.items()},
        {c: np.arange(N) < v * N for c, v in right.items()}, {c: rng.normal(8 * v - 2, 1, N) for c, v in right.items()}, 0.25, 2 if residual else 1, tuple(map(str, range(N))), **BASE,
    )  # fmt: skip


def table() -> ConditionTable:
    rows, tasks = [], []
    for name, hard in (("digits, 2 classes", 0.05), ("concepts, 4 classes", 0.3), ("concepts, 8 classes", 0.7)):
        plain = 1 - 0.75 * hard
        for condition, loss in zip(CONDITIONS, (0, 0.5, 0.1, 0.55, 0.7), strict=True):
            value = max(0.2, plain - loss)
            rows.append(ConditionRow(name, condition, estimate(value, N), about(7 * value - 2, 0.5, "nats")))
        both = {
            "k": {"semantics": about(0.3 + 0.4 * hard), "format": about(0.4 - 0.3 * hard)},
            "v": {"semantics": about(0.35 + 0.4 * hard), "format": about(0.3 - 0.2 * hard)},
        }
        tasks.append(TaskEffects(name, about(hard), estimate(0.25, N), {"semantics": about(0.5 - 0.4 * hard), "format": about(0.1)}, {"semantics": about(3), "format": about(1)}, both, 0.25, N))  # fmt: skip
    trend = {"share k": about(0.7, 0.3), "share v": about(0.5, 0.6), "accuracy": about(-0.4, 0.2)}
    finding = {"share k": "supported", "share v": "undecided", "accuracy": "contradicted"}
    return ConditionTable(
        tuple(rows), tuple(tasks), ("semantics", "format"), trend, finding, "Meaning has a larger share of keys on hard tasks.", **BASE
    )


def mixed(*, converged: bool = True) -> MixedEffects:
    fixed = {
        "Intercept": about(0.8, 0.1),
        "semantics[broken]": about(-0.5, 0.1),
        "format[changed]": about(-0.05, 0.08),
        "task[digits]": about(0.1, 0.05),
    }
    return MixedEffects("accuracy ~ semantics * format + task", "accuracy, probability", "query", fixed, {"Intercept": 1e-9, "semantics[broken]": 1e-8, "format[changed]": 0.3, "task[digits]": 0.002},
                        {"query": 0.012}, 0.034, converged, False, () if converged else ("no convergence",), 400, 40)  # fmt: skip


def part(
    name: str, correct: np.ndarray, output: np.ndarray, *, strong: float, heads: int = 4, known: bool = True, seed: int = 0
) -> MarginPart:
    rng = np.random.default_rng(seed)
    shape = (3, heads)
    per = rng.normal(0.02, 0.1, (len(correct), *shape))
    per[:, 1, 2] += strong * (output / 4)
    value = per.mean(0)
    area = np.full(shape, 0.5) + rng.normal(0, 0.05, shape)
    area[1, 2] = 0.5 + 0.45 * strong
    area = area if known else np.full(shape, np.nan)
    p = np.where(value > 0.05, 1e-4, 0.5)
    rho = np.clip(2 * (np.nan_to_num(area, nan=0.5 + 0.4 * strong) - 0.5), -1, 1)
    held = about(0.5 + 0.4 * strong, 0.1, "area") if known else Estimate(np.nan, np.nan, np.nan, N, "area")
    unit = {"k": "1 - cosine", "v": "1 - cosine", "attention": "probability"}.get(name, "attention score")
    return MarginPart(name, f"{name}: wrong minus right", unit, value, *bounds(value, 0.03), np.full(shape, 0.001), np.full(shape, 0.03), p, np.minimum(1, 12 * p), area, *bounds(area, 0.1),
                      p, np.minimum(1, 12 * p), rho, *bounds(rho, 0.15), per, held, ((1, 2), (1, 2)), about(0.1, 0.08) if name != "attention" and known else None)  # fmt: skip


def margin(*, known: bool = True) -> ContrastMargin:
    rng = np.random.default_rng(8)
    correct = np.ones(N, dtype=bool) if not known else rng.random(N) < 0.7
    output = np.where(correct, rng.gamma(4, 1, N), -rng.gamma(2, 1, N))
    made = {name: part(name, correct, output, strong=strong, heads=heads, known=known, seed=k) for k, (name, strong, heads) in enumerate((("k", 0.8, 2 + 2), ("v", 0.5, 4), ("qk", 0.9, 4), ("attention", 0.7, 4)))}  # fmt: skip
    nan = Estimate(np.nan, np.nan, np.nan, N, "area")
    return ContrastMargin(made, "before", "label", "cosine", correct, output, about(1.0, 0.0) if known else nan, about(0.66, 0.1) if known else nan,
                          "" if known else "all answers are right", notes=("Our definition.",), **BASE)  # fmt: skip


def pushed() -> MarginEffect:
    doses = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    change, control = 1.4 * doses, 0.1 * doses
    return MarginEffect("k", ((1, 2), (1, 3)), doses, change, *bounds(change, 0.3), control, *bounds(control, 0.5), change - control, *bounds(change - control, 0.4),
                        np.array([0.1, 0.4, 0.8, 0.9, 0.95]), np.array([0.7, 0.75, 0.8, 0.8, 0.78]), about(1.4, 0.2), about(0.1, 0.2), about(1.3, 0.2), 5e-4,
                        np.repeat(change[:, None], N, 1), np.repeat(control[:, None], N, 1), np.ones(N), "logit difference", "logits", n_controls=8, **BASE)  # fmt: skip


def learned() -> ContrastMap:
    curve = 0.5 * np.exp(-np.arange(30) / 8) + 0.2
    return ContrastMap("mixed", {"map": np.eye(4)}, about(0.82, 0.05), about(0.66, 0.06), about(0.16, 0.05), about(0.64, 0.06), about(-0.02, 0.04), about(0.18, 0.05), about(0.74, 0.09),
                       about(0.6, 0.1), curve, 24, ("concepts x demo",), tuple(range(12)), 60, 20, **BASE)  # fmt: skip


def strategies() -> Strategies:
    rng = np.random.default_rng(2)
    rows = []
    for name, kind, right, area in (("zero-shot", "model", 0.5, 0.5), ("random", "model", 0.55, 0.57), ("similar", "model", 0.52, 0.55), ("anchored", "model", 0.7, 0.78), ("majority vote", "baseline", 0.5, 0.5), ("copy", "baseline", 0.48, 0.47)):  # fmt: skip
        change = None if name == "zero-shot" else about(right - 0.5, 0.08)
        p = 1e-4 if right > 0.6 else 0.5
        hit = rng.random(N) < right
        rows.append(StrategyScore(name, kind, estimate(right, N), about(area, 0.1), about(right - 0.05, 0.1), change, change, change, np.nan if change is None else p,
                                  np.nan if change is None else min(1.0, 5 * p), 4.0 if name not in ("zero-shot",) else 0.0, 0.4, rng.normal(0, 1, N), hit, hit))  # fmt: skip
    return Strategies(tuple(rows), "zero-shot", ("no", "yes"), rng.random(N) < 0.5, tuple(map(str, range(N))), 0.52, **BASE)


EVERY: dict[str, Callable[[], Any]] = {
    "shift": shift, "shift alone": shift_alone, "similarity": similarity, "similarity from one control": lambda: similarity(both=False), "shares": shares, "shares without residual": lambda: shares(residual=False), "table": table, "mixed": mixed,
    "margin": margin, "margin of a model that is always right": lambda: margin(known=False), "pushed": pushed, "learned": learned, "strategies": strategies,
}  # fmt: skip


def story(**parts: Any) -> KVStory:
    """A whole story; parts can be exchanged."""
    whole: dict[str, Any] = {
        "shift": shift(),
        "shares": shares(),
        "margin": margin(),
        "similarity": None,
        "prompts": "with noised pictures",
        "notes": (),
    }
    return KVStory(**(whole | parts))
