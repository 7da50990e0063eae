"""Neighbours of classes by what a model sees: a CLIP-type model, or a vision-language model's own eyes."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from mechicl.analysis.examples.retrieval import embed
from mechicl.data.link_pool import Pool
from mechicl.data.neighbours import N_INTERVALS, WEIGHTS, Neighbours, neighbours
from mechicl.errors import OptionError
from mechicl.models.embeddings import Eyes, OwnEmbedder
from mechicl.prompts.episode import Shot

OWN_WEIGHTS = (0.0, 0.0, 0.5)
"""Pictures alone: a vision-language model has no space in which a picture and a name can be compared by their angle, and a made-up name is like no other."""
PER_CLASS = 100
"""Pictures of a class that its mean is taken over, as in the released code."""


def class_neighbours(
    pool: Pool,
    source: Any,
    *,
    weights: tuple[float, float, float] | None = None,
    centre: bool | None = None,
    per_class: int = PER_CLASS,
    n_intervals: int = N_INTERVALS,
    eyes: Eyes = "features",
    seed: int = 0,
    progress: bool = False,
) -> Neighbours:
    """Classes of a pool, ranked by likeness for each of them.

    Args:
        pool: The classes.
        source: A CLIP-type model (`mechicl.models.embeddings.load_clip(folder)`), any other `Embedder`, or a vision-language model.
        weights: See `mechicl.data.neighbours.similarity`. None: the published ones, or for a model's own embeddings `OWN_WEIGHTS`.
        centre: Take the mean over classes off first. None: for a model's own embeddings only.
        per_class: At most so many pictures of a class, drawn at random.
        n_intervals: 100 in the paper, 36 in the authors' files.
        eyes: Of a vision-language model: what its decoder is given ("features"), or its tower's last layer ("tower").
        seed: Decides the pictures.
        progress: Show a bar.

    Raises:
        OptionError: fewer than one picture, or pictures and names in different spaces.
        EpisodeError: a picture or a name that cannot be embedded.
        ImageError: a file that cannot be read.
    """
    own = hasattr(source, "render") or isinstance(source, OwnEmbedder)
    embedder = OwnEmbedder(source, eyes) if hasattr(source, "render") else source
    wanted = weights if weights is not None else OWN_WEIGHTS if own else WEIGHTS
    image, text, made_by = class_vectors(
        pool, embedder, names=bool(wanted[0] or wanted[1]), per_class=per_class, seed=seed, progress=progress
    )
    return neighbours(
        pool.keys, image, text, weights=wanted, centre=own if centre is None else centre, n_intervals=n_intervals, source=made_by
    )


def class_vectors(
    pool: Pool, embedder: Any, *, names: bool = True, per_class: int = PER_CLASS, seed: int = 0, progress: bool = False
) -> tuple[Float[np.ndarray, "cls d_image"], Float[np.ndarray, "cls d_text"], str]:
    """The mean vector of each class's pictures, the vector of each class's name (no columns without `names`), and who made them.

    Raises:
        OptionError: `per_class` below 1.
        EpisodeError: a picture or a name that cannot be embedded.
    """
    if per_class < 1:
        raise OptionError(f"per_class must be at least 1; got {per_class}. The published mean is over 100 pictures.")
    means, source = [], ""
    for one in pool.classes:
        draw = np.random.default_rng([seed, 59, *one.key.encode()])
        rows = draw.permutation(len(one.images))[:per_class]
        shots = [Shot(one.name, (pool.picture(one.key, int(row)),), item=one.key) for row in rows]
        found = embed(embedder, shots, what=f"pictures of {one.key}", progress=progress)
        means.append(found.image.mean(0))
        source = found.source
    said = np.zeros((len(pool), 0))
    if names:
        said = embed(embedder, [Shot(one.name, text=one.name, item=one.key) for one in pool.classes], what="names", progress=progress).text
    return np.stack(means), said, source
