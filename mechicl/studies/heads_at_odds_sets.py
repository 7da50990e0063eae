"""Which heads go off: the top of two rankings at equal doses, each also without the other's heads, and matched random sets beside each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mechicl.analysis.ablation.matched import TRIES, matched_draws
from mechicl.analysis.ablation.switches import switchable
from mechicl.analysis.study import ENOUGH
from mechicl.errors import OptionError
from mechicl.results import Head, Score

INDUCTION, FUNCTION_VECTOR = "induction", "function vector"
KINDS = (INDUCTION, FUNCTION_VECTOR)


@dataclass(frozen=True)
class OddsSet:
    """One set of heads: where it comes from, its matched random sets, and whether these are all there are."""

    kind: str
    excluded: bool
    dose: float
    heads: tuple[Head, ...]
    random: tuple[tuple[Head, ...], ...]
    exhaustive: bool
    note: str


def check_doses(doses: Sequence[float]) -> tuple[float, ...]:
    """Per cents in ascending order.

    Raises:
        OptionError: none, or one outside (0, 50].
    """
    found = tuple(sorted({float(dose) for dose in doses}))
    if not found or not all(0 < dose <= 50 for dose in found):
        raise OptionError(f"doses must be per cents of all heads in (0, 50], at least one; got {list(doses)}. (1, 2, 4, 8) is usual.")
    return found


def heads_at(dose: float, n_heads: int) -> int:
    """How many heads a dose is: at least one."""
    return max(1, round(dose / 100 * n_heads))


def different(doses: Sequence[float], n_heads: int) -> tuple[float, ...]:
    """The doses that are different numbers of heads; of several that are the same the largest."""
    return tuple(sorted({heads_at(dose, n_heads): dose for dose in doses}.values()))


def main_dose(doses: Sequence[float], n_heads: int, wanted: int) -> float:
    """The dose whose number of heads is nearest to `wanted`, the larger of two equally near."""
    return min(doses, key=lambda dose: (abs(heads_at(dose, n_heads) - wanted), -dose))


def ranking(score: Score, known: np.ndarray) -> list[Head]:
    """All heads that both scores know, best first."""
    return [head for head in score.top(score.value.size) if known[head]]


def choose(
    model: Any,
    induction: Score,
    function_vector: Score,
    doses: Sequence[float],
    main: float,
    *,
    exclude: float | None,
    spare: Sequence[Head],
    n_random: int,
    n_band: int,
    seed: int,
) -> list[OddsSet]:
    """Every set of heads of a study.

    Args:
        model: Whose heads.
        induction, function_vector: What ranks them.
        doses: Per cents of all heads.
        main: The dose that has `n_random` random sets; the others have `n_band`.
        exclude: How many per cent of the other ranking's heads are taken out; None: as many as go off. Yin and Steinhardt take 2.
        spare: Heads that no random set holds where enough others are left: other parts of the circuit.
        n_random, n_band: Random sets of each set.
        seed: Decides them.
    """
    known = ~np.isnan(induction.value) & ~np.isnan(function_vector.value)
    n_heads = int(known.sum())
    ranked = {INDUCTION: ranking(induction, known), FUNCTION_VECTOR: ranking(function_vector, known)}
    found = []
    for dose in doses:
        k = heads_at(dose, n_heads)
        tops = {kind: set(ranked[kind][:k]) for kind in KINDS}
        for kind in KINDS:
            other = KINDS[1 - KINDS.index(kind)]
            out = set(ranked[other][: k if exclude is None else heads_at(exclude, n_heads)])
            for excluded in (False, True):
                heads = tuple([head for head in ranked[kind] if not (excluded and head in out)][:k])
                few = n_random if dose == main else n_band
                random, exhaustive, note = _matched(model, heads, tops[other] - set(heads), spare, few, seed + k)
                found.append(OddsSet(kind, excluded, dose, tuple(sorted(heads)), random, exhaustive, note))
    return found


def _matched(
    model: Any, heads: Sequence[Head], other: set[Head], spare: Sequence[Head], n: int, seed: int
) -> tuple[tuple[tuple[Head, ...], ...], bool, str]:
    """Random sets, without the other kind's heads and without the known rest of the circuit where enough are left.

    Where fewer than `n` sets match the chosen heads' layers, sets from any layer make up the number: a control of three sets says little.
    """
    sizes = _sizes(model)
    tries = [
        ({*other, *spare}, ""),
        (other, "the circuit's other heads are among the random heads, since too few are left"),
        (set(), "the other kind's heads are among the random heads, since too few are left"),
    ]
    found, said, drawn = (), "", None
    for out, why in tries:
        out = out - set(heads)
        drawn = matched_draws(sorted(heads), sizes, n, seed=seed, spare=sorted(out))
        said, found = why, _made_up(drawn.sets, heads, {layer: [h for h in range(size) if (layer, h) not in {*heads, *out}] for layer, size in sizes.items()}, n, seed)  # fmt: skip
        if len(found) == n or len(found) >= ENOUGH:
            break
    more = len(found) - len(drawn.sets) if drawn is not None else 0
    made_up = f"{more} of {len(found)} random sets are of any layer, since no more match the layers" if more else ""
    note = "; ".join(part for part in (said, made_up or (drawn.note if drawn is not None else "")) if part)
    return found, len(found) < n, note


def _made_up(
    sets: tuple[tuple[Head, ...], ...], heads: Sequence[Head], pool: dict[int, list[int]], n: int, seed: int
) -> tuple[tuple[Head, ...], ...]:
    """Sets from any layer added until there are n, or no more."""
    found = dict.fromkeys(sets)
    generator = np.random.default_rng([seed, 1])
    everywhere = [(layer, head) for layer, some in pool.items() for head in some]
    for _ in range(TRIES * n):
        if len(found) >= n or len(everywhere) < len(heads):
            break
        drawn = generator.choice(len(everywhere), len(heads), replace=False)
        found[tuple(sorted(everywhere[int(i)] for i in drawn))] = None
    return tuple(found)


def _sizes(model: Any) -> dict[int, int]:
    """Layer -> number of heads, of the layers that can be switched."""
    anatomy = getattr(model, "anatomy", None)
    return {layer: int(anatomy.layers[layer].n_heads if anatomy is not None else model.cfg.n_heads) for layer in switchable(model)}


def every_set(sets: Sequence[OddsSet]) -> list[tuple[Head, ...]]:
    """All sets to be run, chosen and random, each once."""
    return list(dict.fromkeys([one for some in sets for one in (some.heads, *some.random)]))
