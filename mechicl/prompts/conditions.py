"""Experiments on examples: every episode under every combination of factors' levels, several times over, with the zero-shot prompt beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechicl.errors import EpisodeError, OptionError
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode
from mechicl.prompts.form import Form
from mechicl.prompts.reform import KEEPS, Reform, reform
from mechicl.prompts.spans import QUERY
from mechicl.results import Skipped

KEPT = "kept"
Change = str | Form | Sequence[str] | Callable[..., Episode]
"""What `reform` takes."""
SPANS = ("query image", "query text", "query question", "query open", "last token")
"""The query's own tokens. open: what the template writes behind the query up to the last token."""


@dataclass(frozen=True, eq=False)
class Factor:
    """Something about the examples that is kept or changed.

    Attributes:
        name: What it is called.
        levels: Names, "kept" first.
        changes: For each level but the first the transform.
    """

    name: str
    levels: tuple[str, ...]
    changes: tuple[Reform, ...]


@dataclass(frozen=True, eq=False)
class Crossed:
    """Episodes under all conditions.

    Attributes:
        factors: The factors, in order.
        conditions: Names, e.g. "other class+kept", one for each combination of levels, all kept first.
        design: Level of every factor in every run [run, factor]; a run is a condition in a replicate.
        condition: Which condition a run is [run].
        replicate: Which replicate [run].
        runs: For each episode its runs.
        zero_shot: Each episode without examples.
        rows: Which of the given episodes these are.
        skipped: The others, and why.
    """

    factors: tuple[Factor, ...]
    conditions: tuple[str, ...]
    design: Int[Tensor, "run factor"]
    condition: Int[Tensor, " run"]
    replicate: Int[Tensor, " run"]
    runs: tuple[tuple[Episode, ...], ...]
    zero_shot: tuple[Episode, ...]
    rows: tuple[int, ...]
    skipped: tuple[Skipped, ...]

    @property
    def n(self) -> int:
        """Number of episodes."""
        return len(self.runs)


def factor(name: str, *changes: Change) -> Factor:
    """A factor with a level for each change, beside "kept".

    Raises:
        OptionError: no change, a change that does not exist, or the same one twice.
    """
    if not changes or not name:
        raise OptionError(
            f"a factor must have a name and a change; got {name!r} with {len(changes)}. E.g. factor('format', 'label first')."
        )
    levels = (KEPT, *(_name(change, k, len(changes)) for k, change in enumerate(changes)))
    if len(set(levels)) < len(levels):
        raise OptionError(f"changes of a factor must differ; got {list(levels[1:])}. Name each once.")
    return Factor(name, levels, tuple(reform(change) for change in changes))


def cross(
    episodes: Sequence[Episode],
    factors: Sequence[Factor],
    *,
    replicates: int = 2,
    vary: Sequence[str] = ("order", "names"),
    seed: int = 0,
) -> Crossed:
    """Every episode under the product of the factors' levels.

    Replicate 0 is built on the episode as it is; each further one on another prompt with the same meaning and form (`vary`), with new draws of whatever
    the changes draw. Within a replicate the same draws serve all conditions, so that conditions differ in the factors alone.

    Args:
        episodes: What is crossed; their items are also the donors of "other class".
        factors: At least one; see `factor`.
        replicates: How often; with one there is nothing to tell a factor's effect from the effect of any change.
        vary: Keys of `reform.KEEPS`: "order" of the exemplars, "names": candidates exchange their names (leave it out where names mean something).
        seed: Decides all draws.

    Raises:
        OptionError: an option out of range, factors of one name.
        EpisodeError: no episode allows all conditions.
    """
    if replicates < 1:
        raise OptionError(f"replicates must be at least 1; got {replicates}. Two or more tell effects from the effect of any change.")
    if strange := [one for one in vary if one not in KEEPS]:
        raise OptionError(f"vary must be among {', '.join(KEEPS)}; got {strange}. These keep the meaning.")
    if not factors or len({one.name for one in factors}) < len(factors):
        raise OptionError(f"factors must be at least one, each with its own name; got {[one.name for one in factors]}. Rename one.")
    combos = list(product(*(range(len(one.levels)) for one in factors)))
    runs, rows, skipped = [], [], []
    for k, episode in enumerate(episodes):
        try:
            mine = [
                _under(_replicate(episode, vary, r, seed + k), factors, combo, (seed + k) * replicates + r, episodes)
                for r in range(replicates)
                for combo in combos
            ]
        except EpisodeError as error:
            skipped.append(Skipped(episode.id or str(k), str(error)))
            continue
        runs.append(tuple(mine))
        rows.append(k)
    if not runs:
        reason = skipped[0].reason if skipped else "there is none"
        raise EpisodeError(f"episodes must allow every condition; none of {len(episodes)} does (first: {reason}). Choose other changes.")
    names = tuple("+".join(one.levels[i] for one, i in zip(factors, combo, strict=True)) for combo in combos)
    return Crossed(
        tuple(factors), names, torch.tensor(combos * replicates), torch.arange(len(combos)).repeat(replicates),
        torch.arange(replicates).repeat_interleave(len(combos)), tuple(runs), tuple(episodes[k].without_shots() for k in rows), tuple(rows),
        tuple(skipped),
    )  # fmt: skip


def query_spans(batch: Batch) -> dict[str, Bool[Tensor, "batch pos"]]:
    """The query's own tokens by kind, see `SPANS`; kinds that no prompt has are left out."""
    found: dict[str, Tensor] = {}
    for i, (row, last) in enumerate(zip(batch.spans, batch.query_pos.tolist(), strict=True)):
        own = [span for span in row if span.shot == QUERY and span.role != "answer"]
        end = max((span.stop for span in own), default=last)
        for name, start, stop in (
            *((f"query {s.role}", s.start, s.stop) for s in own),
            ("query open", end, last),
            ("last token", last, last + 1),
        ):
            stop = stop if name == "last token" else min(stop, last)
            if stop > start:
                found.setdefault(name, torch.zeros(batch.n, batch.n_pos, dtype=torch.bool))[i, start:stop] = True
    return {name: found[name] for name in SPANS if name in found}


def query_tokens(batch: Batch) -> list[dict[str, tuple[int, ...]]]:
    """For each prompt the ids of the query's own tokens by kind: what must be the same under all conditions."""
    ids = batch.inputs["input_ids"].cpu()
    spans = query_spans(batch)
    return [{name: tuple(ids[i][mask[i]].tolist()) for name, mask in spans.items() if mask[i].any()} for i in range(batch.n)]


def unchanged(first: Batch, second: Batch) -> bool:
    """Whether two batches hold the same prompts: then a change has changed nothing."""
    a, b = first.inputs, second.inputs
    if a.keys() != b.keys():
        return False
    return all(
        value.shape == b[name].shape and torch.equal(value, b[name]) if isinstance(value, Tensor) else value == b[name]
        for name, value in a.items()
    )


def crossing(factors: Mapping[str, Change | Sequence[Change]]) -> tuple[Factor, ...]:
    """Factors from a mapping of names to a change or a list of changes (each a level of its own)."""
    return tuple(factor(name, *changes) if isinstance(changes, list) else factor(name, changes) for name, changes in factors.items())  # type: ignore[arg-type]


def _replicate(episode: Episode, vary: Sequence[str], r: int, seed: int) -> Episode:
    for name in vary if r else ():
        episode = KEEPS[name](episode, seed=seed * 1009 + r)
    return episode


def _under(episode: Episode, factors: Sequence[Factor], combo: Sequence[int], seed: int, donors: Sequence[Episode]) -> Episode:
    for one, level in zip(factors, combo, strict=True):
        if level:
            episode = one.changes[level - 1](episode, seed=seed, donors=donors)
    return episode


def _name(change: Change, k: int, n: int) -> str:
    if isinstance(change, str):
        return change
    if not callable(change) and not isinstance(change, Form):
        return " or ".join(change)
    return "changed" if n == 1 else f"changed {k + 1}"
