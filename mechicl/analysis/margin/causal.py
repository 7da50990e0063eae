"""`move_margin`: does the answer follow when a head's contrastive margin is moved? Keys, values or the query, pushed along the direction from wrong to right exemplars.

Our definition (METHODS: "whether moving the margin, by patching K or V, moves the answer"); the paper's could not be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from mechicl.analysis.feed import Data, check_data, comparable, ids_of, progress_bar, provenance, rehearse, take
from mechicl.analysis.guarded import each_batch, guarded
from mechicl.analysis.icl import usable
from mechicl.analysis.labels import indistinct
from mechicl.analysis.margin.push import Engine, Moved, Pushed
from mechicl.analysis.margin.read import Keys
from mechicl.analysis.shift.read import why_not
from mechicl.analysis.statistics import bootstrap_interval, mean_estimate, paired_change, sign_flip_p
from mechicl.errors import HeadIndexError, OptionError, UnsupportedModelError
from mechicl.prompts.batch import Batch
from mechicl.results import Estimate, Head, MarginEffect


@guarded
def move_margin(
    model: Any,
    data: Data,
    heads: Sequence[Head],
    *,
    part: Moved = "k",
    keys: Keys = "label",
    doses: Sequence[float] = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0),
    n_controls: int = 4,
    n_permutations: int = 10_000,
    seed: int = 0,
    batch_size: int = 8,
    engine: Engine = "resume",
    task: str = "",
    progress: bool = True,
) -> MarginEffect:
    """Push a head's keys, values or query along the direction from wrong to right exemplars, and watch the answer's margin, dose by dose.

    With d = mean over right exemplars minus mean over wrong ones (of this episode, this head, from the untouched run), a dose t adds t d / 2 at every right
    exemplar's tokens and takes t d / 2 away at every wrong one's. So the difference of the means becomes (1 + t) d: 0 leaves it, -1 removes it, -2
    reverses it, 1 doubles it, and q . d with it. The query is moved along d until its match with d is 1 + t times what it was. All heads are moved together.

    Args:
        model: A toy or a production model.
        data: A Batch, or episodes. Those without a right or a wrong exemplar are left out and named.
        heads: (layer, head): key/value heads for "k" and "v" (every query head that reads them is touched), query heads for "q".
        part: "k": keys before RoPE; "v": values; "q": the query of the prompt's last token, after RoPE where there is one, against keys after RoPE.
        keys: Which exemplar tokens are moved ("q": compared with), see `contrast_margin`.
        doses: In units of the margin.
        n_controls: Random directions of the same length for each episode and head, pushed in the same way.
        n_permutations: Sign flips drawn for p.
        seed: Of directions, intervals, permutations.
        batch_size: Prompts that are run at once; a prompt counts once per candidate where labels have several tokens.
        engine: "resume" runs only what differs; "naive" runs every prompt in full with hooks (same numbers).
        task: For the record.
        progress: Show a bar.

    Returns:
        MarginEffect: change of the right label's log-probability minus the best wrong one's, nats.

    Raises:
        EpisodeError: no data, or none with a right and a wrong exemplar.
        OptionError: an option that does not exist.
        HeadIndexError: a head that the model (or that layer) does not have.
        UnsupportedModelError: a layer without keys of the prompt's tokens.
        EmptySpanError: exemplars without the tokens asked for.
    """
    check_data(data, batch_size)
    _check_options(part, keys, doses, n_controls, engine)
    kept, skipped = comparable(data)
    data = take(data, kept)
    rehearse(model, data)
    chosen = _heads(model, heads, part)
    doses_ = np.array([float(dose) for dose in doses])
    before, after, reasons, more = [], [], list[str](), list[str]()  # before [batch]; after [1 + control, dose, batch]
    widest = max(len(row) for row in data.candidates) if isinstance(data, Batch) else max(len(episode.candidates) for episode in data)
    size = max(1, batch_size // widest)

    def move(batch: Batch, rows: range) -> tuple[list[str], np.ndarray, np.ndarray, list[str]] | list[str]:
        unclear = indistinct(batch)
        good = [i for i, reason in enumerate(unclear) if not reason]
        if not good:
            return unclear
        work = Pushed(model, batch if len(good) == batch.n else batch.select(good), chosen, part, keys, engine)
        return unclear, work.before, work.run(doses_, n_controls, seed, [rows[i] for i in good]), work.notes

    bar = progress_bar(None, total=len(data), what="moving margins", show=progress)
    for found in each_batch(model, data, size, move, done=bar.update):
        if isinstance(found, tuple):
            before.append(found[1])
            after.append(found[2])
            more += found[3]
        reasons += found[0] if isinstance(found, tuple) else found
    bar.close()
    _, unscored = usable(ids_of(data), reasons)
    options = {
        "heads": chosen,
        "part": part,
        "keys": keys,
        "doses": list(doses_),
        "n_controls": n_controls,
        "engine": engine,
        "n_permutations": n_permutations,
    }
    return _effect(
        np.concatenate(before), np.concatenate(after, -1), doses_, part, chosen, n_controls, n_permutations, seed,
        skipped=(*skipped, *unscored), provenance=provenance(model, task=task, seed=seed, options=options), notes=tuple(_notes(part, keys, more)),
    )  # fmt: skip


def _check_options(part: str, keys: str, doses: Sequence[float], n_controls: int, engine: str) -> None:
    for name, value, choices in (("part", part, Moved), ("keys", keys, Keys), ("engine", engine, Engine)):
        if value not in get_args(choices):
            raise OptionError(f"{name} must be one of {', '.join(get_args(choices))}; got {value!r}. Pick one of them.")
    if not len(doses) or not np.isfinite(np.asarray(doses, dtype=float)).all() or not np.any(np.asarray(doses, dtype=float)):
        raise OptionError(f"doses must be finite numbers, one of them not nought; got {list(doses)}. -1 removes the margin, 1 doubles it.")
    if n_controls < 1:
        raise OptionError(f"n_controls must be at least 1; got {n_controls}. Without random directions damage looks like an effect.")


def _heads(model: Any, heads: Sequence[Head], part: str) -> tuple[Head, ...]:
    n_heads = model.cfg.n_heads if part == "q" else model.cfg.n_key_value_heads
    if not heads:
        raise OptionError("heads must name at least one (layer, head); got none. Choose them with contrast_margin.")
    for layer, head in heads:
        inside = 0 <= layer < model.cfg.n_layers
        parts = getattr(getattr(model, "anatomy", None), "layers", None)
        own = n_heads if parts is None or not inside else parts[layer].n_heads if part == "q" else parts[layer].n_key_value_heads
        if not inside or not 0 <= head < own:
            kind = "query" if part == "q" else "key/value"
            raise HeadIndexError(
                f"head must be (layer, head) with layer in 0..{model.cfg.n_layers - 1} and a {kind} head in 0..{own - 1}; got ({layer}, {head}). Both count from 0."
            )
        if why := why_not(model, layer, "k" if part == "q" else part):
            raise UnsupportedModelError(f"layer {layer} must have keys and values of the prompt's tokens; {why}. Choose another layer.")
    return tuple(dict.fromkeys((int(layer), int(head)) for layer, head in heads))


def _effect(
    before: np.ndarray, after: np.ndarray, doses: np.ndarray, part: str, heads: tuple[Head, ...], n_controls: int, n_permutations: int, seed: int,
    **about: Any,
) -> MarginEffect:  # fmt: skip
    change, control = after[0] - before, (after[1:] - before).mean(0)  # [dose, batch]
    slopes = [np.einsum("d,db->b", doses, x) / (doses**2).sum() for x in (change, control)]
    unit = "nats per dose"

    def band(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        low, high = bootstrap_interval(x.T, seed=seed)
        return x.mean(1), low, high

    (mean, low, high), (other, other_low, other_high), (gap, gap_low, gap_high) = band(change), band(control), band(change - control)
    both: Estimate = paired_change(slopes[1], slopes[0], unit=unit, seed=seed)
    p = sign_flip_p(slopes[0] - slopes[1], n_draws=n_permutations, seed=seed, tie=2e-6 * float(np.abs(before).max()))
    return MarginEffect(
        part=part, heads=heads, doses=doses, change=mean, low=low, high=high, control=other, control_low=other_low, control_high=other_high,
        difference=gap, difference_low=gap_low, difference_high=gap_high, accuracy=(after[0] > 0).mean(1), control_accuracy=(after[1:] > 0).mean((0, 2)),
        slope=mean_estimate(slopes[0], unit=unit, seed=seed), control_slope=mean_estimate(slopes[1], unit=unit, seed=seed), slope_difference=both,
        p=float(p), per_episode=change, control_per_episode=control, before=before, metric="right label minus the best wrong one, log-probability",
        unit="nats", n=len(before), n_controls=n_controls, **about,
    )  # fmt: skip


def _notes(part: str, keys: str, more: Sequence[str]) -> list[str]:
    notes = ["Our definition; the paper's could not be read."]
    if keys == "label" and part == "v":
        notes.append(
            "Values at the labels' own tokens hold the label's word too: the push renames exemplars. keys=\"before\" moves what they show."
        )
    if part != "q":
        notes.append("A key/value head serves every query head of its group: all of them are touched.")
    return [*notes, *dict.fromkeys(more)]
