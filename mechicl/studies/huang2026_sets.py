"""Which sets of heads go off: the tops of every ranking, both rankings of a kind together, growing doses, and as many random heads beside each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from mechicl.analysis.ablation.matched import matched_draws
from mechicl.analysis.ablation.switches import switchable
from mechicl.results import Head

Set = tuple[Head, ...]
Whose = Literal["published", "ours"]


@dataclass(frozen=True)
class Chosen:
    """Heads to be switched off together: their name, the rule that found them, and as many random draws."""

    name: str
    kind: Whose
    rule: str
    heads: Set
    draws: tuple[Set, ...]
    note: str


@dataclass(frozen=True)
class Dose:
    """A ranking to be switched off head by head."""

    name: str
    ranking: Set
    ks: tuple[int, ...]
    draws: Mapping[int, tuple[Set, ...]]
    n_draws: int


@dataclass(frozen=True)
class Plan:
    """Everything that goes off. `sets`: each different set once, in one order; the empty one, the intact model, is the first."""

    chosen: tuple[Chosen, ...]
    doses: tuple[Dose, ...]

    @property
    def sets(self) -> tuple[Set, ...]:
        """What runs."""
        found: dict[Set, None] = {(): None}
        for one in self.chosen:
            found |= dict.fromkeys(key(some) for some in (one.heads, *one.draws))
        for dose in self.doses:
            for k in dose.ks:
                found |= dict.fromkeys(key(some) for some in (dose.ranking[:k], *dose.draws[k]))
        return tuple(found)


def key(heads: Sequence[Head]) -> Set:
    """A set as it runs: sorted, so that equal sets run once."""
    return tuple(sorted(heads))


def plan_sets(
    model: Any,
    rankings: Mapping[str, tuple[Whose, str, Sequence[Head]]],
    *,
    top: int,
    n_random: int,
    dose: Sequence[str],
    dose_draws: int,
    seed: int,
) -> Plan:
    """Sets of heads from rankings.

    Args:
        model: Its heads are drawn from.
        rankings: Short name -> (whose, the rule in words, heads, best first). "PH" and "IH" of each kind also go off together.
        top: How many of each go off.
        n_random: Draws of random heads for each set; they leave out every chosen head of every ranking.
        dose: Rankings that also go off one by one.
        dose_draws: Random draws at each dose.
        seed: Decides the draws.
    """
    sizes = _sizes(model)
    firsts = {name: tuple(heads[:top]) for name, (_, _, heads) in rankings.items()}
    every = sorted({h for some in firsts.values() for h in some})
    spare = every if len(every) <= sum(sizes.values()) // 2 else []  # a small model has too few others to draw from
    named: list[tuple[str, Whose, str, Set]] = [
        (f"top {len(heads)} {name}", rankings[name][0], rankings[name][1], heads) for name, heads in firsts.items()
    ]
    for kind in get_args(Whose):
        pair = [name for name, ranking in rankings.items() if ranking[0] == kind]
        if len(pair) == 2:
            both = tuple(dict.fromkeys(h for name in pair for h in firsts[name]))
            named.append((f"top {' and '.join(pair)}", kind, "both rankings", both))
    chosen = []
    for name, kind, rule, heads in named:
        draws, note = _draws(heads, sizes, n_random, seed, [h for h in spare if h not in heads])
        if n_random and not spare:
            note = "; ".join(filter(None, [note, "random heads may be chosen by another ranking: too few others are left"]))
        chosen.append(Chosen(name, kind, rule, heads, draws, note))
    doses = []
    for name in dose:
        ranking = tuple(rankings[name][2])
        ks = tuple(k for k in (1, 2, 3, 5, 8, 12, 20, 32, 48) if k <= min(len(ranking), max(1, sum(sizes.values()) // 2), 4 * top))
        draws = {k: _draws(ranking[:k], sizes, dose_draws, seed + k, [])[0] for k in ks}
        doses.append(Dose(name, ranking, ks, draws, dose_draws))
    return Plan(tuple(chosen), tuple(doses))


def _draws(heads: Sequence[Head], sizes: Mapping[int, int], n: int, seed: int, spare: Sequence[Head]) -> tuple[tuple[Set, ...], str]:
    """Random sets of the same layers; where a small model has too few such, sets of any layer beside them, and a note that says so."""
    drawn = matched_draws(heads, sizes, n, seed=seed, spare=spare)
    if len(drawn.sets) >= n:
        return drawn.sets, drawn.note
    left = [(layer, h) for layer, size in sizes.items() for h in range(size) if (layer, h) not in {*heads, *spare}]
    found = dict.fromkeys(drawn.sets)
    generator = np.random.default_rng([seed, 11])
    for _ in range(400 * n):  # of n equally likely sets each is then missed once in e^400
        if len(found) == n or len(left) < len(heads):
            break
        found[key([left[int(i)] for i in generator.choice(len(left), len(heads), replace=False)])] = None
    more = len(found) - len(drawn.sets)
    return tuple(
        found
    ), f"{more} of {len(found)} random sets are of any layer, because the same layers hold too few other heads" if more else drawn.note


def _sizes(model: Any) -> dict[int, int]:
    anatomy = getattr(model, "anatomy", None)  # layers of a few families differ in their number of heads
    return {layer: int(anatomy.layers[layer].n_heads if anatomy is not None else model.cfg.n_heads) for layer in switchable(model)}
