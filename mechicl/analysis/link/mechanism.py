"""`link_circuit`: which heads carry the link of link-context episodes, found on one half of the episodes and proved on the other.

Three questions to every head, on the finding half: where does it look (attention scores), how much of the link goes through it (its output alone taken from a twin prompt), what
is lost without it (switched off alone). There are two twins: in one the two *labels* are exchanged over the examples, in the other the examples' *items* are. Both turn the answer
round, by two ways: heads that move a label's identity pass in the first only, heads that bring items to labels in the second only, heads that join the two pass in both. Then, on the
other half: what do the sets found cost when they go off together, and how much of the way to either twin do they carry together, each beside matched random heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mechicl.analysis.ablation.ablate import ablate
from mechicl.analysis.ablation.effects import head_effects
from mechicl.analysis.ablation.switches import How
from mechicl.analysis.ablation.verdict import ALPHA
from mechicl.analysis.feed import provenance
from mechicl.analysis.guarded import guarded
from mechicl.analysis.heads.scoring import score_heads
from mechicl.analysis.icl import icl_accuracy
from mechicl.analysis.link.mechanism_carry import carry, controls_spare, twin_gap
from mechicl.analysis.patching.metrics import Metric
from mechicl.analysis.patching.patch import patch
from mechicl.analysis.study import ENOUGH, MIN_EPISODES, THRESHOLD, discover
from mechicl.errors import EpisodeError, OptionError
from mechicl.prompts.corrupt import How as How_
from mechicl.prompts.corrupt import Pairs, minimal_pairs
from mechicl.prompts.episode import Episode, check_episodes
from mechicl.results import Head, HeadSet, LinkCircuit, Score, Skipped

SCORES = ("induction", "ila", "previous_token")
"""Attention scores of a link circuit's parts: the query to the right labels, labels to their pictures, tokens to the token before."""
TWINS: tuple[tuple[str, How_], ...] = (("labels", "swap_labels"), ("items", "swap_exemplars"))
"""What is exchanged over the examples of a prompt to make its twin, and how `minimal_pairs` calls it."""
KINDS = ("matching", "joining", "bringing items", "bringing labels")
"""Sets that are proved. matching: by the induction score. joining: through which the answer goes over to either twin. bringing items, bringing labels: to that twin only."""
ROLES = {"induction": "matching", "ila": "gathering", "previous_token": "previous-token"}
"""What a head is called whose highest score is this one."""


@dataclass(frozen=True, eq=False)
class Found:
    """What the twins say of every head on the finding half, by what is exchanged."""

    carried: Mapping[str, Score]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]

    def sets(self, threshold: float) -> dict[str, tuple[tuple[Head, ...], str]]:
        """Heads by what they carry, and the rules in words; "link" is all that brings items to labels or joins them, best first."""
        n = self.carried["items"].value.size
        labels, items = (discover(self.carried[twin], "carried", threshold=threshold, limit=n)[0] for twin in ("labels", "items"))
        most = max(1, n // 2 - 1)  # more would leave too few heads to compare with
        rule = f"at least {threshold:.2g} of the way to the twin with exchanged {{}} through the head alone, corrected p < {ALPHA}"
        return {
            "link": (items[:most], rule.format("items") + ("" if len(items) <= most else f"; the best {most} of {len(items)}")),
            "joining": (tuple(h for h in items if h in labels)[:most], rule.format("labels, and with exchanged items")),
            "bringing items": (tuple(h for h in items if h not in labels)[:most], rule.format("items, not labels")),
            "bringing labels": (tuple(h for h in labels if h not in items)[:most], rule.format("labels, not items")),
        }


@guarded
def link_circuit(
    model: Any,
    episodes: Sequence[Episode],
    *,
    how: How = "mean",
    threshold: float = THRESHOLD,
    n_random: int = 20,
    spans: bool = False,
    metric: Metric = "label_logprob",
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> LinkCircuit:
    """Which heads carry the link between a thing and its new name.

    Args:
        model: A `HookedVLM`, or anything with the surface of `HookedModel`.
        episodes: Link-context episodes with examples, e.g. `link_episodes(pool, 64, shots=4)`. Labels of equal length, so that a twin exists (`generated_pool(names="made-up")` for
            the bundled model). Every second one serves to find heads, the others to prove them.
        how: How heads are switched off.
        threshold: Least score (share of attention, or of the way to the twin) of a head that joins a set, beside its corrected p.
        n_random: Random sets of as many heads; 19 or more, so that the control can reach p = 0.05.
        spans: Also say where the link is, layer by span (items exchanged).
        metric: Of the twins: how far the answer goes over; see `mechicl.patch`.
        seed: Of nulls, twins, intervals and random heads.
        batch_size: Prompts per forward pass.
        task: What the episodes are, for the record.
        progress: Show bars.

    Returns:
        LinkCircuit. Where the twins' answers do not differ there is no link to be carried: `carried` is NaN and a note says so.

    Raises:
        EpisodeError: too few episodes, no examples, or none with a twin.
        OptionError: an option out of its range.

    Source:
        ours; scores Huang et al. 2026, exchange of activations Wang et al. 2022 and Zhang and Nanda 2024.
    """
    check(episodes, threshold, n_random)
    find, prove = halves(episodes)
    common: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "task": task, "progress": progress}
    scores, held_out = (score_heads(model, some, scores=SCORES, **common) for some in (find, prove))
    found = search(model, find, metric=metric, seed=seed, batch_size=batch_size, progress=progress)
    worth = replace(head_effects(model, find, how=how, **common), name="worth")
    accuracy = icl_accuracy(model, prove, **common)
    rules = found.sets(threshold) | {"matching": discover(scores.scores.get("induction"), "induction", threshold=threshold)}
    looking = tuple({head for name in SCORES for head in discover(scores.scores.get(name), name, threshold=threshold)[0]})
    sets: list[HeadSet] = []
    for kind in KINDS:
        one = HeadSet(kind, "induction" if kind == "matching" else "carried", rules[kind][1], rules[kind][0], "none", "")
        sets.append(_prove(model, prove, find, one, sets, looking, accuracy, how, n_random, common))
    wanted = {one.kind: one.heads for one in sets if one.heads}
    moved, notes = {}, list(found.notes)
    for twin, way in TWINS:
        if wanted and not np.isnan(found.carried[twin].value).all():
            pairs = minimal_pairs(model.renderer, prove, way, seed=seed)
            done, more = carry(model, pairs, wanted, n_random=n_random, metric=metric, seed=seed, batch_size=batch_size, spare=looking)
            moved |= {(kind, twin): one for kind, one in done.items()}
            notes += more
    traced = None
    if spans:
        pairs = minimal_pairs(model.renderer, prove, "swap_exemplars", seed=seed)
        traced = patch(model, pairs, sites="resid_pre", by="span", metric=metric, **common)
    options = {
        "how": how,
        "threshold": threshold,
        "n_random": n_random,
        "metric": getattr(metric, "__name__", metric),
        "batch_size": batch_size,
    }
    return LinkCircuit(
        scores=scores, held_out=held_out, carried=found.carried, worth=worth, sets=tuple(sets), moved=moved, spans=traced, accuracy=accuracy,
        n_find=scores.n, n_prove=accuracy.n, skipped=(*found.skipped, *accuracy.skipped), provenance=provenance(model, task=task, seed=seed, options=options),
        notes=tuple(dict.fromkeys([*notes, *scores.notes])),
    )  # fmt: skip


def check(episodes: Sequence[Episode], threshold: float, n_random: int) -> None:
    """Refuse what needs no model.

    Raises:
        EpisodeError, OptionError: see `link_circuit`.
    """
    check_episodes(episodes, images=False)
    if len(episodes) < MIN_EPISODES:
        raise EpisodeError(
            f"episodes must be at least {MIN_EPISODES}, half to find heads and half to prove them; got {len(episodes)}. Draw more."
        )
    if n_random < ENOUGH:
        raise OptionError(f"n_random must be at least {ENOUGH}; got {n_random}. With fewer draws the random control cannot reach p = 0.05.")
    if not 0 < threshold < 1:
        raise OptionError(f"threshold must be in (0, 1), a share; got {threshold}. {THRESHOLD} is a tenth.")


def halves(episodes: Sequence[Episode]) -> tuple[list[Episode], list[Episode]]:
    """Episodes that find heads, and those that prove them."""
    return list(episodes[::2]), list(episodes[1::2])


def search(
    model: Any, find: Sequence[Episode], *, metric: Metric = "label_logprob", seed: int = 0, batch_size: int = 8, progress: bool = True
) -> Found:
    """How much of the way to either twin goes through every head alone, on the finding half."""
    carried, skipped, notes = {}, [], []
    for twin, way in TWINS:
        pairs = minimal_pairs(model.renderer, find, way, seed=seed)
        carried[twin], more = _carried(model, pairs, twin, metric, seed, batch_size, progress)
        skipped += pairs.skipped
        notes += more
    return Found(carried, tuple(skipped), tuple(notes))


def _carried(model: Any, pairs: Pairs, twin: str, metric: Metric, seed: int, batch_size: int, progress: bool) -> tuple[Score, list[str]]:
    """Each head's output alone taken from the twin: how far the answer goes over, as a Score over heads."""
    shape = (model.cfg.n_layers, model.cfg.n_heads)
    about: dict[str, Any] = {"name": f"carried, {twin}", "description": f"share of the way to the twin with exchanged {twin} when the head's output alone is the twin's", "unit": "share of the gap",
             "source": "ours; Wang et al. 2022", "null_name": "no change, sign flips over pairs"}  # fmt: skip
    gap = twin_gap(model, pairs, metric, batch_size, seed)
    if not gap.low > 0:
        nan = np.full(shape, np.nan)
        empty = Score(
            value=nan,
            low=nan,
            high=nan,
            null=nan,
            null_high=nan,
            p=nan,
            p_corrected=nan,
            per_episode=np.full((pairs.n, *shape), np.nan),
            **about,
        )
        return empty, [f"Exchanging the {twin} does not turn the answers round (gap {gap} {gap.unit}): there is no link to be carried."]
    result = patch(model, pairs, sites="z", by="head", metric=metric, seed=seed, batch_size=batch_size, progress=progress)
    site = result.sites["z"]
    rows = list(site.coords["layer"])

    def whole(some: np.ndarray) -> np.ndarray:
        out = np.full((*some.shape[:-2], *shape), np.nan)
        out[..., rows, : some.shape[-1]] = some
        return out

    per_pair = (site.raw - result.corrupt[:, None, None]) / np.mean(result.clean - result.corrupt)  # their mean is `value`
    value = whole(site.value)
    zero = np.where(np.isnan(value), np.nan, 0.0)
    return Score(value=value, low=whole(site.low), high=whole(site.high), null=zero, null_high=zero, p=whole(site.p), p_corrected=whole(site.p_corrected),
                 per_episode=whole(per_pair), **about), list(result.notes)  # fmt: skip


def _prove(
    model: Any, prove: Sequence[Episode], find: Sequence[Episode], one: HeadSet, known: Sequence[HeadSet], others: Sequence[Head], intact: Any, how: How, n_random: int, common: dict[str, Any]
) -> HeadSet:  # fmt: skip
    """The set switched off on the other half. The same heads under another name are not run again."""
    if not one.heads:
        return replace(one, verdict="no head passes, so there is nothing to switch off.")
    same = next((s for s in known if set(s.heads) == set(one.heads)), None)
    if same is not None:
        return replace(same, kind=one.kind, score=one.score, rule=one.rule, heads=one.heads)
    off = ablate(
        model,
        prove,
        one.heads,
        how,
        n_random=n_random,
        spare=controls_spare(model, one.heads, others),
        intact=intact,
        reference=find,
        **common,
    )
    return replace(one, finding=off.finding, verdict=off.verdict, ablation=off)
