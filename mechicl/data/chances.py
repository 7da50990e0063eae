"""How often classes and labels come, and what can be had by chance."""

from __future__ import annotations

import numpy as np

from mechicl.data.toy_tasks import MultimodalTask, Split, Task, UnimodalTask, check_split


def frequencies(n: int, alpha: float) -> np.ndarray:
    """P(class k) in proportion to k^-alpha, k = 1..n, float64."""
    weights = np.arange(1, n + 1, dtype=np.float64) ** -float(alpha)
    return weights / weights.sum()


def label_frequencies(task: Task) -> np.ndarray:
    """P(label) of one item drawn from the task's own classes, before any shift, [n_labels]."""
    if isinstance(task, UnimodalTask):
        return frequencies(task.K, task.alpha).reshape(-1, task.L).sum(0)
    second = frequencies(task.K2, task.alpha2)
    if task.labels == "pair":
        return second.reshape(-1, task.n_labels).sum(0)
    assert task.G1 is not None
    assert task.G2 is not None
    first = frequencies(task.K1, task.alpha1).reshape(-1, task.G1).sum(0)
    return np.outer(first, second.reshape(-1, task.G2).sum(0)).ravel()


def chance(task: Task, split: Split = "train") -> dict[str, float]:
    """What can be had without in-context learning, as probabilities of being right.

    Returns:
        label: naming one of the labels that can be right, at random: 1 / n_labels.
        frequent: naming the most frequent one always.
        context: copying any exemplar's label, at random. In a bursty sequence about B / N, which is far above `label`: the plateau of training.

    Raises:
        OptionError: a split that does not exist.
    """
    check_split(split)
    known, flat = label_frequencies(task), 1 / task.n_labels
    distinct = task.no_repeats or (isinstance(task, MultimodalTask) and task.labels == "crossed")
    p_novel, p_bursty = {"train": (task.p_C, task.p_B), "ic": (1.0, 1.0), "ic2": (0.0, 1.0), "iw": (0.0, 0.0)}[split]

    def mixed(novel: float, bursty: float, loose: float) -> float:
        return float(p_novel * novel + (1 - p_novel) * (p_bursty * bursty + (1 - p_bursty) * loose))

    def copied(meet: float) -> float:
        """The slot is of the query's own block, or of another one whose label is the same by chance."""
        share = task.B / task.N
        return share if distinct else share + (1 - share) * meet

    meet, most = float((known**2).sum()), float(known.max())
    return {
        "label": flat,
        "frequent": mixed(flat, flat if distinct else most, most),
        "context": mixed(copied(flat), copied(meet), meet),
    }
