"""`examples_story`: what the examples change in the query's keys and values, whether by meaning or by form, and whether a contrastive margin tells right answers
from wrong ones; what the report and `mechicl kv` show. The definitions are ours; the paper's could not be read."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from mechicl.analysis.icl import icl_accuracy
from mechicl.analysis.margin.contrast import contrast_margin
from mechicl.analysis.shift.factors import factor_shares
from mechicl.analysis.shift.kv_shift import kv_shift
from mechicl.analysis.shift.similarity import similarity_test
from mechicl.errors import EpisodeError, MechiclError
from mechicl.prompts.disturb import disturb_images
from mechicl.prompts.episode import Episode, Shot
from mechicl.prompts.filler import Filler
from mechicl.results import ContrastMargin, FactorShares, KVShift, KVStory, SimilarityTest

MOST_SHIFT = 32
"""Episodes whose keys and values are compared with and without examples."""

MOST_SHARES = 16
"""Episodes that run under every condition: each of them takes about twenty prompts."""

MOST_MARGIN = 64
"""Episodes whose margins are set against their answers."""

MOST_LAYERS = 24
"""Deeper models are read at so many layers, evenly spread."""

PERMUTATIONS = 9999
"""Draws of the null of shares, enough for a p that survives the correction over a few hundred cells."""

ENOUGH = 10
"""Right and wrong answers that an AUROC needs."""

STRENGTHS = (0.3, 0.5, 0.7)
"""How far the query's picture is noised, one after another, until there are `ENOUGH` wrong answers."""


@dataclass(frozen=True)
class KVPlan:
    """What is asked. `control`: "filler", "zero-shot" or "both". `semantics`, `format`: names of `prompts.reform`. Parts that are False are left out."""

    control: Literal["filler", "zero-shot", "both"] = "both"
    filler: Filler = "turns"
    spans: tuple[str, ...] | None = None
    semantics: str = "other class"
    format: str = "label first"
    shares: bool = True
    margin: bool = True
    similarity: bool = False
    replicates: int = 2
    most_shift: int = MOST_SHIFT
    most_shares: int = MOST_SHARES
    most_margin: int = MOST_MARGIN


def examples_story(
    model: Any,
    episodes: Sequence[Episode],
    plan: KVPlan | None = None,
    *,
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> KVStory:
    """Shift against filler and zero-shot prompt, meaning against form, margins against answers. What it costs is bounded by counts, never by a clock.

    Args:
        model: A `HookedVLM` or a toy.
        episodes: The first `most_shift`, `most_shares` and `most_margin` of them serve.
        plan: What is asked; default all but the similarity test.
        seed: Of filler, draws, nulls and intervals.
        batch_size: Prompts at once.
        task: For the record.
        progress: Show bars.

    Returns:
        A KVStory; what could not be done is None, and `notes` say why. The margin's episodes have a noised query where the plain ones are answered too well (or too
        badly) for an AUROC; `prompts` says so.

    Raises:
        EpisodeError: no episodes.
    """
    if not episodes:
        raise EpisodeError("episodes must be at least one; got none. Draw some.")
    plan = plan or KVPlan()
    notes: list[str] = []
    common: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "task": task, "progress": progress}
    layers = _layers(model, notes)

    def tried(what: str, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except MechiclError as error:
            notes.append(f"{what}: {error}")
            return None

    few = list(episodes[: plan.most_shift])
    shift: KVShift | None = tried("No key-value shift", lambda: kv_shift(model, few, control=plan.control, filler=plan.filler, spans=plan.spans, layers=layers, **common))  # fmt: skip
    likeness: SimilarityTest | None = None
    if plan.similarity:
        likeness = tried("No test of similarity", lambda: similarity_test(model, few, pool_of(episodes), layers=layers, spans=plan.spans, **common))  # fmt: skip
    shares: FactorShares | None = None
    if plan.shares:
        shares = tried("No shares of meaning and form", lambda: _shares(model, episodes[: plan.most_shares], plan, layers, common))
    margin: ContrastMargin | None = None
    prompts = ""
    if plan.margin:
        found = tried("No contrastive margin", lambda: _margin(model, list(episodes[: plan.most_margin]), common))
        margin, prompts = found if found is not None else (None, "")
    return KVStory(shift, shares, margin, likeness, prompts, tuple(notes))


def pool_of(episodes: Sequence[Episode]) -> list[Shot]:
    """Every example of the episodes, each once."""
    return list({id(shot): shot for episode in episodes for shot in episode.shots}.values())


def _layers(model: Any, notes: list[str]) -> list[int] | None:
    if model.cfg.n_layers <= MOST_LAYERS:
        return None
    notes.append(f"Keys and values of {MOST_LAYERS} of {model.cfg.n_layers} layers were read.")
    return sorted({round(x) for x in np.linspace(0, model.cfg.n_layers - 1, MOST_LAYERS)})


def _shares(model: Any, few: Sequence[Episode], plan: KVPlan, layers: Sequence[int] | None, common: dict[str, Any]) -> FactorShares:
    """The two-by-two experiment; the instruction stands before the examples and cannot move."""
    spans = None if plan.spans is None else [span for span in plan.spans if span != "instruction"]
    return factor_shares(model, few, semantics=plan.semantics, format=plan.format, spans=spans, layers=layers, replicates=plan.replicates, n_permutations=PERMUTATIONS, **common)  # fmt: skip


def _margin(model: Any, episodes: list[Episode], common: dict[str, Any]) -> tuple[ContrastMargin, str]:
    """Margins on the episodes as they are, or with the query's picture noised until answers are mixed; and how the prompts were made."""
    plain = contrast_margin(model, episodes, **common)
    if mixed(plain.correct) or plain.correct.sum() < ENOUGH:
        return plain, ""
    for strength in STRENGTHS:
        try:
            harder = [
                disturb_images(episode, kind="noise", strength=strength, seed=common["seed"] + k) for k, episode in enumerate(episodes)
            ]
            if mixed(icl_accuracy(model, harder, zero_shot=False, **common).correct):
                said = f"with the query's picture mixed with noise ({100 * strength:.0f} %) so that some answers are wrong"
                return contrast_margin(model, harder, **common), said
        except MechiclError:
            break
    return plain, ""


def mixed(correct: np.ndarray) -> bool:
    """Enough right and enough wrong answers for an AUROC."""
    return min(int(correct.sum()), int((~correct).sum())) >= ENOUGH


@dataclass(frozen=True)
class KVCost:
    """What it will take, roughly: `passes` of one prompt through the model, of which a few were timed."""

    episodes: int
    passes: int
    seconds: float

    def __str__(self) -> str:
        time = f"{self.seconds:.0f} s" if self.seconds < 120 else f"{self.seconds / 60:.0f} min"
        return f"{self.episodes} episodes, about {self.passes} prompts through the model, {time} (nulls and intervals take some more)"


def kv_cost(model: Any, episodes: Sequence[Episode], plan: KVPlan, *, batch_size: int = 8) -> KVCost:
    """Count the prompts of `examples_story` and time one batch.

    Raises:
        EpisodeError, UnsupportedModelError: what rendering and running refuse.
    """
    few = list(episodes[:batch_size])
    batch = model.renderer.render(few) if hasattr(model, "renderer") else model.render(few)
    begun = time.perf_counter()
    with torch.no_grad():
        model.forward(batch)
    each = (time.perf_counter() - begun) / len(few)
    n = len(episodes)
    passes = min(n, plan.most_shift) * (3 if plan.control == "both" else 2)
    passes += min(n, plan.most_shift) * 4 if plan.similarity else 0
    passes += min(n, plan.most_shares) * (4 * plan.replicates + 1) * 2 if plan.shares else 0
    passes += min(n, plan.most_margin) * 4 if plan.margin else 0
    return KVCost(n, passes, passes * each)
