"""`kv_shift`: what the examples change in the keys and values of the query's own tokens.

Our definition; the paper's (Miyanishi and Nguyen, arXiv 2408.12959) could not be read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np

from mechicl.analysis.feed import Data, ids_of, progress_bar, provenance, rehearse
from mechicl.analysis.guarded import guarded
from mechicl.analysis.shift.measures import cka_interval
from mechicl.analysis.shift.pairs import OUTSIDE, SPANS, Prompts, Table, Wanted, read_prompts
from mechicl.analysis.shift.read import Part, check_parts, readable_layers
from mechicl.analysis.statistics import bootstrap_interval, holm, mean_estimate, sign_flip_p
from mechicl.errors import EpisodeError, OptionError
from mechicl.prompts.batch import Batch, Renders
from mechicl.prompts.episode import Episode
from mechicl.prompts.filler import Filler
from mechicl.prompts.filler import filler as filler_prompts
from mechicl.results import FillerTest, KVShift, Provenance

Control = Literal["filler", "zero-shot", "both"]

FILLER_ITSELF = "filler against zero-shot"
TIE = 1e-6
"""Differences of two relative shifts that are rounding."""


@guarded
def kv_shift(
    model: Any,
    data: Data,
    *,
    control: Control | Sequence[Episode] = "both",
    filler: Filler = "turns",
    spans: Sequence[str] | None = None,
    parts: Sequence[Part] = ("k", "v"),
    layers: Sequence[int] | None = None,
    cka: bool = True,
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> KVShift:
    """Keys (before RoPE, after any norm of the keys) and values of the query's own tokens: with the examples against without.

    Keys before RoPE, because RoPE turns every key of a longer prompt. A layer 0 without places in its stream cannot shift: nothing has been read yet. Only
    the asked tokens of each prompt are kept, layer by layer, never a whole cache.

    Args:
        model: A `HookedVLM`, a toy, or anything with their hook points and a renderer. Hooks that are active stay active.
        data: Episodes, or a Batch that knows its episodes.
        control: "filler": as many neutral tokens in place of the examples, so that length is no difference. "zero-shot": the question alone. "both": against
            the filler, with the zero-shot result in `others` and, in `test`, whether the examples move keys and values further from the zero-shot prompt
            than the filler does. Or episodes of your own, one for each, with the same query.
        filler: See `mechicl.prompts.filler`: "turns" keeps the template's turns and empties them, "words" is words only.
        spans: Groups of tokens (`prompts.align.span_groups`): "query image", "query text", "query question", "query open" (the template's tokens behind it),
            "last token"; "instruction", which stands before the examples, is a negative control. Default: all of the query's that occur.
        parts: "k", "v".
        layers: Which; default all.
        cka: Compute linear CKA with its null (the slowest of the measures).
        seed: Decides filler, resampling and permutations.
        batch_size: Prompts per forward pass.
        task: What the data are, for the record.
        progress: Show a bar.

    Returns:
        KVShift. An episode whose query has other tokens in the control (some families tile a picture differently beside others), or whose filler cannot be
        made as long, is left out of that control with the reason.

    Raises:
        EpisodeError: no data, no shots, a Batch without episodes, or no episode that can be compared.
        OptionError: an option that does not exist.
        UnsupportedModelError, NotFiniteError: see `read_kv`.

    Source:
        The claim: Miyanishi and Nguyen 2024. The definition is ours.
    """
    names, episodes, renderer = ids_of(data), episodes_of(data, batch_size), renderer_of(model, data)
    asked, given = _controls(control, len(episodes))
    chosen, why = readable_layers(model, check_parts(parts), layers)
    cells = tuple((part, layer) for layer in chosen for part in parts if (part, layer) not in why)
    wanted = Wanted(check_spans(spans), tuple(parts), tuple(chosen), cells, cka)
    rehearse(model, data)
    tables = {name: Table(wanted, model.cfg.n_key_value_heads) for name in (*asked, *((FILLER_ITSELF,) if control == "both" else ()))}
    bar = progress_bar(None, total=len(episodes), what="key-value shift", show=progress)
    for start in range(0, len(episodes), batch_size):
        rows = range(start, min(start + batch_size, len(episodes)))
        few, own = [episodes[i] for i in rows], None if given is None else [given[i] for i in rows]
        found = {name: read_prompts(model, one, wanted) for name, one in _prompts(renderer, few, own, asked, filler, seed, rows).items()}
        for name, table in tables.items():
            first, second = ("filler", "zero-shot") if name == FILLER_ITSELF else ("examples", name)
            table.add(rows, names, found[first], found[second])
        bar.update(len(few))
    bar.close()
    options = {"control": control if given is None else "given", "filler": filler, "batch_size": batch_size, "cka": cka}
    made = provenance(model, task=task, seed=seed, options=options)
    return _conclude(tables, asked, partial(_result, filler=filler, names=names, made=made, seed=seed, why=why), seed)


def _conclude(tables: Mapping[str, Table], asked: Sequence[str], result: Callable[..., KVShift], seed: int) -> KVShift:
    """The result against the first control, with the others; a control that fits no episode is left out while another one does."""
    done = [name for name in asked if tables[name].rows] or list(asked[:1])
    lost = [
        f"No result against {name}: {tables[name].skipped[0].reason} (the first of its episodes)." for name in asked if name not in done
    ]
    results = {name: result(name, tables[name], notes=lost) for name in done}
    first = results.pop(done[0])
    if not results or not tables[FILLER_ITSELF].rows:
        return first
    return replace(first, others=results, test=_test(tables["zero-shot"], tables[FILLER_ITSELF], first.spans, seed))


def check_spans(spans: Sequence[str] | None) -> tuple[str, ...]:
    """The spans asked for; all of the query's by default.

    Raises:
        OptionError: one that is not the query's and not the instruction.
    """
    wanted = SPANS if spans is None else tuple(spans)
    if not wanted or not set(wanted) <= {*SPANS, *OUTSIDE} or len(set(wanted)) < len(wanted):
        raise OptionError(
            f"spans must be some of {', '.join((*SPANS, *OUTSIDE))}, each once; got {wanted}. Only tokens that both prompts have can be compared."
        )
    return wanted


def episodes_of(data: Data, batch_size: int = 1) -> list[Episode]:
    """The episodes of the data, checked. One example is enough here, and so are examples of one label.

    Raises:
        EpisodeError: no data, a Batch without episodes, or an episode without examples.
        OptionError: batch_size is below one.
    """
    if batch_size < 1:
        raise OptionError(f"batch_size must be at least 1; got {batch_size}. Choose how many prompts go through the model at once.")
    episodes = list(data.episodes) if isinstance(data, Batch) else list(data)
    if not episodes:
        raise EpisodeError("data must be episodes, or a Batch that knows them, to be rendered without examples; got none. Pass episodes.")
    for k, episode in enumerate(episodes):
        if not episode.shots:
            raise EpisodeError(
                f"episode {episode.id or k}: shots must not be empty; got none. Without an example there is nothing to shift."
            )
    return episodes


def renderer_of(model: Any, data: Data) -> Renders:
    """Who renders: who rendered the data, else the model."""
    own = data.renderer if isinstance(data, Batch) else None
    return own if own is not None else getattr(model, "renderer", model)


def _controls(control: Any, n: int) -> tuple[list[str], list[Episode] | None]:
    """Names of the controls to run, and the episodes of one that was given."""
    if isinstance(control, str):
        if control not in ("filler", "zero-shot", "both"):
            raise OptionError(f'control must be "filler", "zero-shot", "both" or a list of episodes; got {control!r}. Pick one of them.')
        return (["filler", "zero-shot"] if control == "both" else [control]), None
    given = list(control)
    if len(given) != n or not all(isinstance(episode, Episode) for episode in given):
        raise OptionError(
            f"control must have one episode for each of the {n}; got {len(given)}. Give the same queries with other examples."
        )
    return ["given"], given


def _prompts(
    renderer: Renders,
    few: Sequence[Episode],
    given: Sequence[Episode] | None,
    asked: Sequence[str],
    filler: Filler,
    seed: int,
    numbers: range,
) -> dict[str, Prompts]:
    """The prompts with examples and those of every control."""
    none = ("",) * len(few)
    found = {"examples": Prompts(renderer.render(few), none)}
    if given is not None:
        found["given"] = Prompts(renderer.render(given), none)
    if "filler" in asked:
        found["filler"] = Prompts(*filler_prompts(renderer, few, found["examples"].batch, filler, seed=seed, numbers=numbers))
    if "zero-shot" in asked:
        found["zero-shot"] = Prompts(renderer.render([episode.without_shots() for episode in few]), none)
    return found


def _result(
    control: str,
    table: Table,
    *,
    filler: Filler,
    names: Sequence[str],
    made: Provenance,
    seed: int,
    why: Mapping[tuple[str, int], str],
    notes: list[str],
) -> KVShift:
    """Means and intervals of what was collected; spans that no episode has are left out.

    Raises:
        EpisodeError: no episode could be compared.
    """
    if not table.rows:
        raise EpisodeError(
            f"an episode must have the same query in the control ({control}); none of {len(table.skipped)} has ({table.skipped[0].reason}). "
            "Choose another control or other spans."
        )
    relative, cosine, tokens = np.concatenate(table.relative), np.concatenate(table.cosine), np.concatenate(table.tokens)
    there = _there(table)
    relative, cosine, tokens = relative[..., there], cosine[..., there], tokens[:, there]
    spans = tuple(table.wanted.spans[s] for s in there)
    values, low, high = {}, {}, {}
    for name, array in (("relative_l2", relative), ("cosine_distance", cosine)):
        values[name] = mean_of(array)
        low[name], high[name] = bootstrap_interval(array, seed=seed)
    values["cka"], low["cka"], high["cka"], null = _cka(table, there, relative.shape[1:], seed)
    parts = table.wanted.parts
    pooled = {
        (part, span): mean_estimate(mean_of(relative[:, p, ..., s].reshape(len(relative), -1), 1), unit="ratio", seed=seed)
        for p, part in enumerate(parts) for s, span in enumerate(spans)
    }  # fmt: skip
    return KVShift(
        control=control, filler=filler if control == "filler" else "", parts=parts, layers=table.wanted.layers, heads=tuple(range(table.n_heads)),
        spans=spans, measures=values, low=low, high=high, per_episode=relative, cosine_per_episode=cosine, cka_null=null, pooled=pooled,
        tokens=tokens, lengths=np.array(table.lengths), episode_ids=tuple(names[i] for i in table.rows), n=len(table.rows),
        skipped=tuple(table.skipped), provenance=made, notes=(*_notes(table, control), *notes), reasons=dict(why),
    )  # fmt: skip


def _there(table: Table) -> list[int]:
    """Spans that some episode has."""
    return np.flatnonzero(np.concatenate(table.tokens).any(0)).tolist()


def _notes(table: Table, control: str) -> list[str]:
    notes = ["Our definition; the paper's could not be read."]
    if table.undefined:
        notes.append(
            f"{table.undefined} vectors are zero in the control ({control}) and not with examples: they have no ratio and no angle, and are left out."
        )
    layer = table.wanted.layers.index(0) if 0 in table.wanted.layers else None
    inside = [s for s, name in enumerate(table.wanted.spans) if name not in OUTSIDE]
    if layer is not None and any(np.nanmax(x[:, :, layer][..., inside], initial=0) > 1e-3 for x in table.relative):
        notes.append(
            f"Layer 0 shifts against {control}, before anything was read: places or pictures enter the stream otherwise than without examples."
        )
    return notes


def _cka(table: Table, there: Sequence[int], shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, ...]:
    """Value, interval and null of CKA in every cell [part, layer, kv_head, span]."""
    out = tuple(np.full(shape, np.nan) for _ in range(4))
    for (part, layer), blocks in table.means.items():
        both = [np.concatenate([block[side] for block in blocks]) for side in (0, 1)]
        for head in range(both[0].shape[1]):
            for s, span in enumerate(there):
                x, y = (side[:, head, span] for side in both)
                known = ~(np.isnan(x).any(1) | np.isnan(y).any(1))
                cell = (table.wanted.parts.index(part), table.wanted.layers.index(layer), head, s)
                for array, value in zip(out, cka_interval(x[known], y[known], seed=seed), strict=True):
                    array[cell] = value
    return out


def _test(example: Table, filler: Table, spans: Sequence[str], seed: int) -> FillerTest:
    """Shift of the examples against shift of the filler, both from the zero-shot prompt, on the episodes that have both."""
    both = sorted({*example.rows} & {*filler.rows})
    there = [example.wanted.spans.index(span) for span in spans]
    one, two = (np.concatenate(t.relative)[[t.rows.index(i) for i in both]][..., there] for t in (example, filler))
    change = one - two
    low, high = bootstrap_interval(change, seed=seed)
    p = sign_flip_p(change, seed=seed, tie=TIE)
    keys = [(part, span) for part in example.wanted.parts for span in spans]
    means = {
        (part, span): mean_of(change[:, example.wanted.parts.index(part), ..., k].reshape(len(both), -1), 1)
        for part in example.wanted.parts for k, span in enumerate(spans)
    }  # fmt: skip
    pooled_p = holm([float(sign_flip_p(means[key], seed=seed, tie=TIE)) for key in keys])
    return FillerTest(
        example=mean_of(one), filler=mean_of(two), difference=mean_of(change), low=low, high=high, p=p, p_corrected=holm(p),
        pooled={key: mean_estimate(means[key], unit="ratio", seed=seed) for key in keys},
        pooled_p=dict(zip(keys, map(float, pooled_p), strict=True)),
    )  # fmt: skip


def mean_of(array: np.ndarray, axis: int = 0) -> np.ndarray:
    """Mean without NaN; NaN, and no warning, where there is nothing."""
    known = ~np.isnan(array)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(known, array, 0).sum(axis) / known.sum(axis)
