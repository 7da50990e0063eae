"""`find_and_prove`: the whole story on one task, in the order a sceptic would ask for it.

Does the model learn from the examples (accuracy, zero-shot, labels permuted)? Which heads look as an in-context learner's should (scores against
their null), and which are worth most when switched off alone (both on one half of the episodes)? Do they look so elsewhere (the same scores on the
other half)? And is it they who do it (each set switched off on that other half, beside random heads, one by one and in growing doses)? Where it is asked for: how does the answer
travel (patching), and by which edges (a circuit)? What do the examples change in keys and values?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mechicl.analysis.ablation.ablate import ablate, dose_curve
from mechicl.analysis.ablation.effects import head_effects
from mechicl.analysis.ablation.matched import matched_draws
from mechicl.analysis.ablation.switches import How
from mechicl.analysis.ablation.verdict import ALPHA, LEAST_CENSUS
from mechicl.analysis.circuits.tracing import trace_answer
from mechicl.analysis.feed import provenance
from mechicl.analysis.guarded import guarded
from mechicl.analysis.heads.scoring import attention_by_role, score_heads
from mechicl.analysis.icl import icl_accuracy
from mechicl.analysis.prompts import prompt_view
from mechicl.analysis.shift.story import examples_story
from mechicl.errors import EpisodeError, OptionError
from mechicl.prompts.corrupt import permute_labels
from mechicl.prompts.episode import Episode, check_episodes
from mechicl.results import Head, HeadSet, ICLAccuracy, PromptView, Score, Series, Study

KINDS: tuple[tuple[str, str], ...] = (("induction", "induction"), ("label-to-image", "ila"), ("previous-token", "previous_token"))
"""What is looked for by attention: a name for people, and the score it is ranked by."""

THRESHOLD = 0.1
"""Least score of a head that is switched off: a tenth of its attention. Below it a head may pass its null and still hardly look there."""

MIN_EPISODES = 8
"""Below it neither half can say anything."""

ENOUGH = 19
"""Random draws without which a control cannot reach p = 0.05."""

MANY_HEADS = 64
"""Up to this many heads each is also switched off alone to find those worth most; beyond it that would take as long as everything else together."""


@guarded
def find_and_prove(
    model: Any,
    episodes: Sequence[Episode],
    *,
    how: How = "mean",
    threshold: float = THRESHOLD,
    n_random: int = 20,
    n_prompts: int = 2,
    effects: bool | None = None,
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    growth: Series | None = None,
    trace: bool = False,
    kv: bool = False,
    progress: bool = True,
) -> Study:
    """Find the heads on one half of the episodes, prove them on the other.

    Args:
        model: A `HookedVLM`, or anything with the surface of `HookedModel`.
        episodes: At least `MIN_EPISODES`; every second one serves to find the heads, the others to prove them.
        how: How heads are switched off: "zero", "mean" (over prompts), "resample" (another prompt's output).
        threshold: Least score of a head that joins a set, beside a corrected p below `ALPHA`.
        n_random: Draws of matched random heads; 19 or more, so that the control can reach p = 0.05.
        n_prompts: Prompts kept whole, to be drawn.
        effects: Also switch off every head alone to find those worth most; default for models of up to `MANY_HEADS` heads.
        seed: Decides nulls, intervals and random heads.
        batch_size: Prompts per forward pass.
        task: What the episodes are, for the record.
        growth: The model's training curve, when there is one.
        trace: Also follow the answer through the layers and look for the circuit (`analysis.tracing.trace_answer`).
        kv: Also say what the examples change in the query's keys and values (`analysis.kv_story.examples_story`).
        progress: Show bars.

    Returns:
        The story; where no head passes, or none matters, it says so.

    Raises:
        EpisodeError: too few episodes, no shots, one class only.
        OptionError: an option out of its range.
    """
    check_episodes(episodes, images=False)
    if len(episodes) < MIN_EPISODES:
        raise EpisodeError(
            f"episodes must be at least {MIN_EPISODES}, half to find heads and half to prove them; got {len(episodes)}. Draw more."
        )
    if n_random < ENOUGH:
        raise OptionError(f"n_random must be at least {ENOUGH}; got {n_random}. With fewer draws the random control cannot reach p = 0.05.")
    if not 0 <= threshold < 1:
        raise OptionError(
            f"threshold must be in [0, 1), a share of attention; got {threshold}. {THRESHOLD} is a tenth of a head's attention."
        )
    find, prove = list(episodes[::2]), list(episodes[1::2])
    common: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "task": task, "progress": progress}
    scores, replication = score_heads(model, find, **common), score_heads(model, prove, **common)
    accuracy = icl_accuracy(model, prove, **common)
    shuffled = [permute_labels(episode, seed=seed + k) for k, episode in enumerate(prove)]
    permuted = icl_accuracy(model, shuffled, zero_shot=False, **common)
    every = effects if effects is not None else model.cfg.n_layers * model.cfg.n_heads <= MANY_HEADS
    worth = head_effects(model, find, how=how, **common) if every else None
    pictures = any(episode.images for episode in episodes)
    kinds = [(kind if pictures else kind.replace("image", "item"), name) for kind, name in KINDS]
    found = [(kind, name, *discover(scores.scores.get(name), name, threshold=threshold)) for kind, name in kinds]
    if worth is not None:
        found.append(("most valuable", worth.name, *discover(worth, worth.name, threshold=worth_threshold(worth, threshold))))
    orders = {name: (worth if worth is not None and name == worth.name else scores.scores.get(name)) for _, name, _, _ in found}
    control = Control(find, accuracy, how, n_random, common)
    sets: list[HeadSet] = []
    for kind, name, heads, rule in found:
        known = next((s for s in sets if heads and set(s.heads) == set(heads)), None)  # the same heads by another name are not run again
        empty = HeadSet(kind, name, rule, heads, "none", "")
        spare = _others(model, found, kind, heads)
        curve = name in scores.scores or not any(s.dose for s in sets)  # heads found by their worth get a curve where no others did
        if known is not None:
            sets.append(replace(known, kind=kind, score=name, rule=rule))
        else:
            sets.append(_prove(model, prove, empty, orders[name], control, spare, curve=curve))
    roles = attention_by_role(model, prove, **common)
    looking = scores.top("ila", 3) if "ila" in scores.scores else []  # to be seen on the pictures, whether they pass or not
    drawn = list(dict.fromkeys([*(h for s in sets for h in s.heads[:4]), *looking])) or scores.top("induction", 4)
    options = {
        "how": how,
        "threshold": threshold,
        "random draws": n_random,
        "classes": len(episodes[0].candidates),
        "examples": len(episodes[0].shots),
    }
    traced = trace_answer(model, find, prove, **common) if trace else None
    changed = examples_story(model, [*prove, *find], **common) if kv else None
    return Study(
        scores=scores, replication=replication, accuracy=accuracy, controls={"labels permuted": permuted.accuracy}, sets=tuple(sets), roles=roles,
        prompts=_prompts(model, prove[:n_prompts], drawn, accuracy, task), growth=growth, n_find=scores.n, n_prove=accuracy.n,
        provenance=provenance(model, task=task, seed=seed, options=options), notes=tuple(dict.fromkeys((*scores.notes, *_notes(scores.n, replication)))), effects=worth, trace=traced, kv=changed,
    )  # fmt: skip


def discover(found: Score | None, name: str, *, threshold: float = THRESHOLD, limit: int | None = None) -> tuple[tuple[Head, ...], str]:
    """The heads of one kind, best first, and the rule in words: every head that passes, so that redundant heads go off together.

    Args:
        found: The score, from the episodes that serve to find heads; None where these prompts do not define it.
        name: The score's name.
        threshold: Least score, in its own unit.
        limit: Largest set; default a third of all heads, so that enough are left for a random control.

    Returns:
        Heads and rule; no heads where none passes.
    """
    words = name.replace("_", " ")
    if found is None:
        return (), f"{words} score, which these prompts do not define"
    unit = "" if found.unit.startswith("prob") else f" {found.unit}"
    rule = f"{words} score of at least {threshold:.2g}{unit} and above its null ({found.null_name}), corrected p < {ALPHA}"
    limit = max(1, found.value.size // 3) if limit is None else limit
    with np.errstate(invalid="ignore"):
        passed = (found.p_corrected < ALPHA) & (found.value >= threshold)
    heads = [h for h in found.top(found.value.size) if passed[h]]
    if len(heads) > limit:
        return tuple(heads[:limit]), f"{rule}; the best {limit} of {len(heads)} that pass, so that other heads are left to compare with"
    return tuple(heads), rule


def worth_threshold(worth: Score, threshold: float) -> float:
    """The same share of the margin that heads of one kind need of attention: `threshold` times the largest loss."""
    top = worth.top(1)
    return threshold * max(0.0, float(worth.value[top[0]])) if top else 0.0


@dataclass(frozen=True)
class Control:
    """What every ablation of a study shares: where means come from, the intact model's answers, how heads go off, how many random draws."""

    reference: list[Episode]
    intact: ICLAccuracy
    how: How
    n_random: int
    common: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of `ablate` and `dose_curve`."""
        return {"how": self.how, "n_random": self.n_random, "intact": self.intact, "reference": self.reference, **self.common}


def _prove(
    model: Any, prove: Sequence[Episode], found: HeadSet, order: Score | None, control: Control, spare: Sequence[Head], curve: bool
) -> HeadSet:
    """The set switched off on the other half; the dose curve runs over the set and two heads beyond it, in the score's order."""
    if not found.heads or order is None:
        return replace(found, verdict="no head passes its null, so there is nothing to switch off.")
    ablation = ablate(model, prove, found.heads, spare=spare, **control.options)
    dose = None
    if curve and ablation.finding in ("redundant", "necessary"):
        rest = [h for h in order.top(order.value.size) if h not in found.heads]
        ranking = [*found.heads, *rest][: max(1, order.value.size // 2)]
        name = found.score.replace("_", " ")
        few = {**control.options, "n_random": max(10, control.n_random // 2)}  # every point of the curve has a control of its own
        dose = dose_curve(model, prove, ranking, name, ks=doses(len(found.heads), len(ranking)), spare=spare, **few)
    return replace(found, finding=ablation.finding, verdict=ablation.verdict, ablation=ablation, dose=dose)


def _others(model: Any, found: Sequence[tuple[str, str, tuple[Head, ...], str]], kind: str, heads: Sequence[Head]) -> list[Head]:
    """Heads that another attention score found, which random draws leave out, so that a set is compared with heads of no known use.

    Heads found by their worth are not left out: a control without the heads that matter would prove anything. Where fewer than `LEAST_CENSUS` different
    draws would be left, none are left out.
    """
    by_attention = {score for _, score in KINDS}
    others = sorted({h for name, score, some, _ in found if name != kind and score in by_attention for h in some} - set(heads))
    sizes = {layer: int(model.cfg.n_heads) for layer in range(model.cfg.n_layers)}
    return others if heads and len(matched_draws(heads, sizes, LEAST_CENSUS, seed=0, spare=others).sets) >= LEAST_CENSUS else []


def doses(n_set: int, n_most: int, steps: int = 6) -> list[int]:
    """How many heads go off: none, then up to two beyond the set, every number while these are few."""
    last = min(n_set + 2, n_most)
    if last <= steps:
        return list(range(last + 1))
    return sorted({0, n_set, last, *(round(x) for x in np.linspace(0, last, steps))})


def _prompts(model: Any, episodes: Sequence[Episode], heads: Sequence[Head], accuracy: ICLAccuracy, task: str) -> tuple[PromptView, ...]:
    """Prompts kept whole, each with what the model answered."""
    said = {name: accuracy.candidates[i][int(accuracy.predicted[i])] for i, name in enumerate(accuracy.episode_ids)}
    return tuple(prompt_view(model, e, heads, predicted=said.get(e.id or str(k), ""), task=task) for k, e in enumerate(episodes))


def _notes(n_find: int, replication: Any) -> list[str]:
    return [] if replication.n == n_find else [f"The halves differ in size: {n_find} prompts to find heads, {replication.n} to prove them."]
