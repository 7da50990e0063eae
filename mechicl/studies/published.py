"""Published rankings and numbers, shipped as data with their source, and how a run compares with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from mechicl.analysis.agreement import chance_overlap, correlation, ranks
from mechicl.analysis.statistics import permutation_p
from mechicl.errors import OptionError
from mechicl.results import Estimate, Head, HeadScores, Overlap, PublishedNumber, RankingMatch

TOPS = (5, 10, 20)
DRAWS = 9999


@cache
def published(study: str) -> Mapping[str, Any]:
    """A study's published numbers, as JSON values.

    Raises:
        OptionError: there is no such study.
    """
    folder = files("mechicl") / "assets" / "published"
    path = folder / f"{study}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.name.removesuffix(".json") for p in folder.iterdir() if p.name.endswith(".json")))
        raise OptionError(f"study must be one of {known}; got {study!r}. Pick one.")
    return json.loads(path.read_text(encoding="utf-8"))


def same_model(ranking: Mapping[str, Any], name: str, shape: tuple[int, int]) -> str:
    """Why a ranking is of another model; "" where it is this one's."""
    wanted = str(ranking["model"]).rsplit("/", 1)[-1].lower()
    if wanted not in str(name).replace("\\", "/").rstrip("/").lower().split("/")[-1]:
        return f"published for {ranking['model']}; this model is {str(name).rstrip('/').rsplit('/', 1)[-1]}"
    if shape != (ranking["n_layers"], ranking["n_heads"]):
        return f"published for {ranking['n_layers']} x {ranking['n_heads']} heads; this model has {shape[0]} x {shape[1]}"
    return ""


def match_rankings(study: str, scores: HeadScores, name: str, keys: Mapping[str, str], *, seed: int = 0) -> tuple[RankingMatch, ...]:
    """Every published ranking of a model of this kind beside the run's.

    Args:
        study: Which.
        scores: The run's.
        name: The model's.
        keys: A ranking's kind -> the score that is compared with it, e.g. {"PH": "ph_published"}.
        seed: Of the permutations.
    """
    found = []
    rankings = published(study)["rankings"]
    first = rankings[0]["model"]
    for ranking in rankings:
        score = scores[keys[ranking["kind"]]]
        shape = (int(score.value.shape[0]), int(score.value.shape[1]))
        reason = same_model(ranking, name, shape)
        if reason and ranking["model"] != first:
            continue  # rankings of other models are shown only where they are compared
        heads = tuple((int(a), int(b)) for a, b, _ in ranking["heads"])
        there = np.array([s for _, _, s in ranking["heads"]])
        source = ", ".join([ranking["source"]["section"], ranking["source"].get("file", "")]).strip(", ")
        found.append(_match(ranking["kind"], score.name, ranking["model"], source, reason, heads, there, score.value, scores.n, seed))
    return tuple(found)


def match_scores(first: str, second: str, scores: HeadScores, *, top: int, seed: int = 0) -> RankingMatch:
    """Two rankings of one run: do they name the same heads? `published` are the first one's values, over its top 20 heads."""
    one, other = scores[first], scores[second]
    heads = tuple(one.top(max(TOPS[-1], top)))
    there = np.array([one.value[h] for h in heads])
    return _match(f"{one.name} against {other.name}", other.name, "", "", "", heads, there, other.value, scores.n, seed)


def _match(
    kind: str, score: str, model: str, source: str, reason: str, heads: tuple[Head, ...], there: np.ndarray, value: np.ndarray, n: int, seed: int
) -> RankingMatch:  # fmt: skip
    n_heads = int(np.isfinite(value).sum())
    if reason:
        blank = np.full(len(heads), np.nan)
        return RankingMatch(
            kind, score, model, source, False, reason, heads, there, blank, blank, n_heads, float("nan"), float("nan"), (), n
        )
    here = np.array([value[h] for h in heads])
    order = {h: k + 1 for k, h in enumerate(order_of(value))}
    rank = np.array([order.get(h, np.nan) for h in heads], dtype=float)
    r = correlation(ranks(there), ranks(here))
    overlaps = tuple(overlap(heads, list(order), k, n_heads) for k in TOPS if k <= len(heads) and 2 * k <= n_heads)
    return RankingMatch(
        kind, score, model, source, True, "", heads, there, here, rank, n_heads, r, _permutation(there, here, r, seed), overlaps, n
    )


def order_of(value: np.ndarray) -> list[Head]:
    """Heads of a score, best first; NaN left out."""
    flat = value.ravel()
    order = np.argsort(-np.nan_to_num(flat, nan=-np.inf), kind="stable")
    return [(int(i) // value.shape[1], int(i) % value.shape[1]) for i in order if np.isfinite(flat[i])]


def overlap(first: Sequence[Head], second: Sequence[Head], k: int, n: int) -> Overlap:
    """Shared heads of two tops of k among n, against chance."""
    shared = len(set(first[:k]) & set(second[:k]))
    expected, p = chance_overlap(n, k, k, shared)
    return Overlap(k, shared, expected, p)


def _permutation(x: np.ndarray, y: np.ndarray, r: float, seed: int) -> float:
    """One-sided p of a rank correlation: how often a shuffled list agrees as well."""
    if not np.isfinite(r):
        return float("nan")
    generator = np.random.default_rng(seed)
    a, b = ranks(x), ranks(y)
    a, b = a - a.mean(), b - b.mean()
    shuffled = np.stack([generator.permutation(b) for _ in range(DRAWS)])
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(permutation_p(0.0, int((shuffled @ a / size >= r - 1e-12).sum()), DRAWS))


def numbers_beside(study: str, here: Mapping[str, Estimate], name: str) -> tuple[PublishedNumber, ...]:
    """The published numbers, each with this run's where it has one; comparable only on the published model."""
    found = []
    for number in published(study)["numbers"]:
        wanted = number["model"].rsplit("/", 1)[-1].lower()
        same = wanted in str(name).rstrip("/").rsplit("/", 1)[-1].lower() and number["name"] in here
        found.append(
            PublishedNumber(
                number["name"], number["measure"], number["model"], float(number["value"]), number["n"], number["source"]["mark"],
                number["source"]["section"], here.get(number["name"]), same,
            )
        )  # fmt: skip
    return tuple(found)
