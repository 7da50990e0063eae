"""`span_knockout`: one group of tokens is kept from reading another, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from mechicl.analysis.ablation.span_blocks import Cells, cells, check_name, random_cells
from mechicl.analysis.feed import Data, batches, check_data, ids_of, progress_bar, provenance, rehearse
from mechicl.analysis.guarded import each_batch, guarded
from mechicl.analysis.icl import mark, usable, zero_shot_control
from mechicl.analysis.labels import Answers, Key, LabelScore, can_share, check_score, indistinct, label_logprobs, n_blocks, widen
from mechicl.analysis.statistics import holm, mcnemar_p, mean_estimate, paired_change, permutation_p
from mechicl.errors import EmptySpanError, OptionError, UnsupportedModelError
from mechicl.models.blocked import Block, Tally, blocked
from mechicl.models.hooked import check_heads
from mechicl.prompts.batch import Batch
from mechicl.results import Head, ICLAccuracy, SpanKnockOut, SpanKnockOuts

Layers = Sequence[int] | Sequence[Sequence[int]] | None
TOLERANCE = 1e-6
"""Nats. Mean margins closer than this are equal."""


@guarded
def span_knockout(
    model: Any,
    data: Data,
    pairs: Sequence[tuple[str, str]],
    *,
    layers: Layers = None,
    heads: Sequence[Head] | None = None,
    n_random: int = 5,
    zero_shot: bool = True,
    score: LabelScore = "full",
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> SpanKnockOuts:
    """Close the attention from one group of tokens to another ("no label reads its picture", "the query does not read shot 2") and answer the episodes again.

    The scores of the closed cells are minus infinity before the softmax; what else a token may read takes over their share. A token that would be left with nothing
    reads itself (the notes say how many). Information can still take two steps round a closed edge in a later layer: closing all layers for one pair of groups says that
    the direct way is needed, not that all information of the source is gone.

    Args:
        model: A `HookedVLM` or a toy.
        data: A Batch, or episodes.
        pairs: (who reads, what is read), by name: a part (image, text, item, question, open, label, close) of all exemplars, or of those with the right or a wrong label, of the
            query or of one exemplar ("right label", "query image", "shot 1 text"); "shot 1"; "exemplars"; "query" (its last token too); "last token" (the answer's own tokens
            too); "instruction", "glue", "everything". A source may be "own image" etc.: of the same exemplar.
        layers: Where; None for all layers, numbers for one window, lists of numbers for several (`models.blocked.windows`): then every pair gives a curve.
        heads: Only in these (layer, head)s.
        n_random: Draws of the control, for each row: the same readers are kept from as many other tokens before them (a run of neighbours). 19 or more for p = 0.05.
        zero_shot: Run the zero-shot control.
        score: What decides between candidates; see `icl_accuracy`.
        seed: Decides draws, ties and resampling.
        batch_size: Prompts per forward pass.
        task: For the record.
        progress: Show a bar.

    Returns:
        SpanKnockOuts, one row for each pair and window, windows innermost.

    Raises:
        OptionError: a name, layer or number that does not exist.
        EmptySpanError: no prompt has a cell between the two groups.
        UnsupportedModelError: pictures are named in a family that has no picture tokens, or a layer has no attention over the sequence.
        EpisodeError: as in `icl_accuracy`.

    Source:
        Geva et al. 2023 (attention knock-out). Differs: by role, paired intervals, matched random control.
    """
    check_data(data, batch_size)
    check_score(score)
    _check_pairs(model, pairs, n_random)
    windows = _windows(model, layers)
    chosen = None if heads is None else tuple(check_heads(model, heads))
    rehearse(model, data)
    rows = [_Row(dest, src, window, chosen, n_random, seed) for dest, src in pairs for window in windows]
    intact_answers, key, reasons = _run(model, data, rows, score, batch_size, progress)
    names = ids_of(data)
    kept, skipped = usable(names, reasons)
    options = {"pairs": [list(pair) for pair in pairs], "layers": [list(w) for w in windows], "heads": heads, "n_random": n_random, "score": score, "batch_size": batch_size}  # fmt: skip
    made = provenance(model, task=task, seed=seed, options=options)

    def marked(answers: Sequence[Answers], control: Any = None) -> ICLAccuracy:
        return mark(Answers.join(answers), key, names, kept, skipped, score=score, seed=seed, zero_shot=control, notes=[], made=made)

    control = zero_shot_control(model, data, score, seed, batch_size, progress, kept) if zero_shot else None
    intact = marked(intact_answers, control)
    found = [row.result(intact, marked(row.answers[0]), [marked(one) for one in row.answers[1:]]) for row in rows]
    p = holm([row.mcnemar_p for row in found])
    notes = (
        []
        if control is not None or not zero_shot
        else ["No zero-shot control: a Batch without episodes cannot be rendered without its examples."]
    )
    return SpanKnockOuts(
        rows=tuple(replace(row, p_corrected=float(one)) for row, one in zip(found, p, strict=True)), intact=intact, zero_shot=control, n_draws=n_random,
        n=intact.n, skipped=skipped, provenance=made, notes=tuple(notes),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Closed:
    """What came of one batch: answers of the knock-out, then of each draw; closed cells of each prompt; of the draws, means over prompts; rows left empty."""

    answers: list[Answers]
    closed: list[int]
    random_closed: list[float]
    emptied: int


@dataclass(eq=False)
class _Row:
    """One knock-out as it runs. `answers`: of the knock-out, then of each random draw, batch by batch."""

    dest: str
    src: str
    layers: tuple[int, ...]
    heads: tuple[Head, ...] | None
    n_random: int
    seed: int
    answers: list[list[Answers]] = field(default_factory=list)
    closed: list[int] = field(default_factory=list)
    random_closed: list[float] = field(default_factory=list)
    emptied: int = 0

    @property
    def name(self) -> str:
        """Who does not read what."""
        return f"{self.dest} <- {self.src}"

    def check(self, batch: Batch) -> None:
        """Raises EmptySpanError where these prompts have no such cell."""
        if not bool(cells(batch, self.dest, self.src).n.any()):
            raise EmptySpanError(
                f"prompts must have tokens of {self.src!r} that {self.dest!r} can read; the first {batch.n} have none. Name groups that the prompts have, readers first."
            )

    def variants(self, batch: Batch, first: int) -> list[list[Cells]]:
        """The knock-out's cells, and those of every draw."""
        given = cells(batch, self.dest, self.src)
        return [[given], *(random_cells(batch, given, seed=self.seed, draw=k, first=first) for k in range(self.n_random))]

    def take(self, one: _Closed) -> None:
        """Keep a finished batch."""
        self.closed += one.closed
        self.random_closed += one.random_closed
        self.emptied += one.emptied
        self.answers = [[*before, found] for before, found in zip(self.answers or [[] for _ in one.answers], one.answers, strict=True)]

    def blocks(self, some: Sequence[Cells]) -> list[Block]:
        """Closed where the row says."""
        return [one.block(self.layers, self.heads) for one in some]

    def result(self, intact: ICLAccuracy, off: ICLAccuracy, random: Sequence[ICLAccuracy]) -> SpanKnockOut:
        """The row as evidence."""
        change = paired_change(intact.correct, off.correct, unit="probability", seed=self.seed)
        moved = paired_change(intact.margins, off.margins, unit="nats", seed=self.seed)
        means: dict[str, Any] = {}
        p_random, text = float("nan"), "none"
        matched, wanted = (float(np.mean(x)) if x else 0.0 for x in (self.random_closed, self.closed))
        if random and not matched:
            text = "none: the readers have nothing else to read"
        elif random:
            shifts = [float((one.margins - intact.margins).mean()) for one in random]
            accuracies = [one.accuracy.value for one in random]
            means = {
                "control_accuracy": mean_estimate(accuracies, unit="probability", seed=self.seed),
                "control_change": mean_estimate([a - intact.accuracy.value for a in accuracies], unit="probability", seed=self.seed),
                "control_margin_change": mean_estimate(shifts, unit="nats", seed=self.seed),
            }
            p_random = float(permutation_p(0.0, sum(shift <= moved.value + TOLERANCE for shift in shifts), len(shifts)))
            text = f"the same readers kept from as many other tokens before them, {matched:.0f} cells against {wanted:.0f}"
        notes = []
        if random and 0 < matched < 0.5 * wanted:
            notes.append(
                f"The control closes {matched:.0f} cells against {wanted:.0f}, because the readers have little else to read: it is a weak one."
            )
        if without := sum(not count for count in self.closed):
            notes.append(f"{without} of {len(self.closed)} prompts have no such cell: they are as they were.")
        if self.emptied:
            notes.append(f"{self.emptied} rows of attention would have been left with nothing: they keep reading their own token.")
        return SpanKnockOut(
            name=self.name, dest=self.dest, src=self.src, layers=self.layers, heads=self.heads, accuracy=off.accuracy, change=change, margin_change=moved,
            mcnemar_p=mcnemar_p(intact.correct, off.correct), n_cells=float(np.mean(self.closed)), correct=off.correct, margins=off.margins, control=text,
            p_random=p_random, notes=tuple(notes), **means,
        )  # fmt: skip


def _run(
    model: Any, data: Data, rows: Sequence[_Row], score: LabelScore, batch_size: int, progress: bool
) -> tuple[list[Answers], Key, list[str]]:
    """The intact answers; the key; why an episode cannot be scored. The rows keep theirs."""
    names, n = ids_of(data), len(data)
    widest = max(len(row) for row in (data.candidates if isinstance(data, Batch) else [e.candidates for e in data]))
    share = score != "first_token" and can_share(model, data)
    size = max(batch_size // (1 if share or score == "first_token" else widest), 1)
    first = next(batches(model, data, size))
    for row in rows:  # on as many prompts as were asked for at once: fewer may have none by chance
        row.check(first)
    passes = 1 + sum(1 + row.n_random for row in rows)
    bar = progress_bar(None, total=n * passes, what="closing attention", show=progress)

    def work(batch: Batch, at: range) -> tuple[Answers, list[_Closed], Key, list[str]]:
        common: dict[str, Any] = {
            "score": score,
            "names": names[at.start : at.stop],
            "wide": widen(batch, n_blocks(batch, score)),
            "share": share,
        }
        intact = label_logprobs(model, batch, **common)[0]
        closed = [_close(model, batch, row, at.start, common) for row in rows]
        return intact, closed, Key.of(batch), [""] * batch.n if score == "first_token" else indistinct(batch)

    intact: list[Answers] = []
    keys, reasons = [], list[str]()
    for answers, closed, key, why in each_batch(model, data, size, work, done=lambda count: bar.update(count * passes)):
        for row, one in zip(rows, closed, strict=True):
            row.take(one)
        intact.append(answers)
        keys.append(key)
        reasons += why
    bar.close()
    return intact, Key.join(keys), reasons


def _close(model: Any, batch: Batch, row: _Row, first: int, common: dict[str, Any]) -> _Closed:
    """A row's knock-out and its draws, on one batch."""
    answers, emptied = [], 0
    variants = row.variants(batch, first)
    for k, some in enumerate(variants):
        with blocked(model, row.blocks(some)) if some else nullcontext(Tally()) as tally:  # a draw may close nothing
            answers += label_logprobs(model, batch, **common)
        emptied += tally.emptied if k == 0 else 0
    random = [float(torch.stack([one.n for one in draw]).sum(0).float().mean()) for draw in variants[1:] if draw]
    return _Closed(answers, variants[0][0].n.tolist(), random, emptied)


def _windows(model: Any, layers: Layers) -> list[tuple[int, ...]]:
    """The windows asked for; None: one, of every layer with attention over the sequence."""
    if layers is None:
        parts = getattr(getattr(model, "anatomy", None), "layers", None)
        return [tuple(k for k in range(model.cfg.n_layers) if parts is None or (parts[k].attention is not None and not parts[k].cross))]
    given = list(layers)
    windows = [tuple(int(k) for k in one) for one in given] if given and isinstance(given[0], Sequence) else [tuple(int(k) for k in given)]  # type: ignore[union-attr, arg-type]
    n_layers = model.cfg.n_layers
    for window in windows:
        if not window or not all(0 <= layer < n_layers for layer in window):
            raise OptionError(f"layers must be in 0..{n_layers - 1}, at least one a window; got {list(window)}. Layers count from 0.")
    return windows


def _check_pairs(model: Any, pairs: Sequence[tuple[str, str]], n_random: int) -> None:
    if not pairs:
        raise OptionError("pairs must be at least one (who reads, what is read); got none. For example ('last token', 'right label').")
    if n_random < 0:
        raise OptionError(f"n_random must be at least 0; got {n_random}. 19 or more make p = 0.05 possible.")
    family = getattr(model, "family", None)
    for dest, src in pairs:
        check_name(dest, src=False)
        check_name(src, src=True)
        named = [name for name in (dest, src) if name.endswith(("image", "item"))]
        if family is not None and not family.image_tokens and named:
            raise UnsupportedModelError(
                f"{named[0]!r} must be tokens of the sequence; the pictures of {model.cfg.model_type} enter by cross-attention. Name its text, or ablate cross-attention heads."
            )
