"""Ways to answer a link-context question without the decoder: counting labels, copying one, and the nearest prototype."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mechicl.analysis.examples.retrieval import embed_usable
from mechicl.analysis.statistics import mean_estimate, wilson
from mechicl.errors import MechiclError
from mechicl.models.embeddings import OwnEmbedder
from mechicl.prompts.episode import Episode, Shot
from mechicl.results import Estimate, LinkBaseline

COUNTED: Mapping[str, str] = {
    "majority": "the label that most examples have; where several do, a coin",
    "copy any label": "the label of an example drawn at random",
    "copy last label": "the label of the last example",
}
LOOKED = ("nearest prototype", "nearest example")


def baselines(
    model: Any, settings: Sequence[Sequence[Episode]], *, embeddings: Any = None, seed: int = 0, progress: bool = False
) -> tuple[LinkBaseline, ...]:
    """Every baseline in every setting.

    Args:
        model: Whose vision tower tells likeness, where `embeddings` does not.
        settings: Episodes of each setting, in the same order.
        embeddings: An `Embedder`, e.g. `mechicl.models.embeddings.load_clip(folder)`.
        seed: Decides the resampling.
        progress: Show a bar while pictures are embedded.
    """
    found = [_baseline(name, [[_counted(name, e) for e in some] for some in settings], note, seed) for name, note in COUNTED.items()]
    vectors, source = _vectors(model, settings, embeddings, progress)
    for name in LOOKED:
        chances = [[_nearest(name, e, vectors) if vectors else np.nan for e in some] for some in settings]
        found.append(_baseline(name, chances, source, seed))
    return tuple(found)


def _baseline(name: str, chances: Sequence[Sequence[float]], note: str, seed: int) -> LinkBaseline:
    array = np.array(chances, dtype=np.float64)
    return LinkBaseline(name, tuple(_rate(row, seed) for row in array), array, note)


def _rate(chances: np.ndarray, seed: int) -> Estimate:
    known = chances[~np.isnan(chances)]
    sure = bool(np.isin(known, (0.0, 1.0)).all())
    return wilson(known) if sure else mean_estimate(known, unit="probability", seed=seed)


def _counted(name: str, episode: Episode) -> float:
    """Probability of the right answer by counting; NaN without examples."""
    labels = [shot.label for shot in episode.shots]
    if not labels:
        return np.nan
    if name == "copy last label":
        return float(labels[-1] == episode.answer)
    if name == "copy any label":
        return labels.count(episode.answer) / len(labels)
    counts = Counter(labels)
    best = [label for label, k in counts.items() if k == max(counts.values())]
    return float(episode.answer in best) / len(best)


def _vectors(model: Any, settings: Sequence[Sequence[Episode]], embeddings: Any, progress: bool) -> tuple[dict[Any, np.ndarray], str]:
    """A unit vector for every item, less the mean of all; empty with the reason where the model has no eyes to ask."""
    shots = {_key(shot): shot for some in settings for episode in some for shot in (*episode.shots, episode.query)}
    try:
        source = embeddings if embeddings is not None else OwnEmbedder(model, eyes="tower")
        found, reasons = embed_usable(source, list(shots.values()), what="embedding pictures", progress=progress)
    except MechiclError as error:
        return {}, f"not done: {error}"
    table = found.image if found.image.shape[1] else found.text
    table = table - table[[not reason for reason in reasons]].mean(0)
    size = np.linalg.norm(table, axis=1, keepdims=True)
    unit = np.divide(table, size, out=np.zeros_like(table), where=size > 1e-12)
    kept = {key: row for key, row, reason in zip(shots, unit, reasons, strict=True) if not reason}
    return kept, f"cosine in {found.source or 'given vectors'}, less the mean of all pictures"


def _key(shot: Shot) -> Any:
    return (shot.text, *(id(image) for image in shot.images))


def _nearest(name: str, episode: Episode, vectors: Mapping[Any, np.ndarray]) -> float:
    """Probability of the right answer by likeness: of the query to the mean of each label's examples, or to the single most similar one."""
    query = vectors.get(_key(episode.query))
    by_label: dict[str, list[np.ndarray]] = {}
    for shot in episode.shots:
        vector = vectors.get(_key(shot))
        if vector is not None:
            by_label.setdefault(shot.label, []).append(vector)
    if query is None or not by_label:
        return np.nan
    likeness: Callable[[np.ndarray], float] = _to_prototype(query) if name == "nearest prototype" else _to_example(query)
    scores = {label: likeness(np.stack(rows)) for label, rows in by_label.items()}
    top = max(scores.values())
    best = [label for label, score in scores.items() if score >= top - 1e-9]
    return float(episode.answer in best) / len(best)


def _to_prototype(query: np.ndarray) -> Callable[[np.ndarray], float]:
    def likeness(rows: np.ndarray) -> float:
        mean = rows.mean(0)
        return float(query @ mean / max(float(np.linalg.norm(mean)), 1e-12))

    return likeness


def _to_example(query: np.ndarray) -> Callable[[np.ndarray], float]:
    return lambda rows: float((rows @ query).max())
