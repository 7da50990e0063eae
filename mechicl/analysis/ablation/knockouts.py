"""`knock_out_table`: what a toy loses without its heads, and without one of its modalities, each beside a matched random control.

Heads are switched off as in `mechicl.analysis.ablation.ablate.ablate`, which the numbers agree with; here one forward pass serves all labels, since each is one
token, and the share of answers that are some label of the context is kept beside the accuracy. A modality goes by emptying its tokens, in the context and in the query: the vectors of the
first modality become zero, and so does what the projector hands over for the second. Places stay, so that only what the tokens say is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mechicl.analysis.ablation.matched import matched_draws
from mechicl.analysis.ablation.switches import How, Switches, switchable
from mechicl.analysis.feed import provenance
from mechicl.analysis.guarded import guarded
from mechicl.analysis.heads.scoring import score_heads
from mechicl.analysis.labels import predict
from mechicl.analysis.statistics import paired_change, wilson
from mechicl.analysis.trainings.bands import runs_estimate
from mechicl.data.gaussian import Split, Task, chance, draw
from mechicl.errors import OptionError
from mechicl.models.hooked import check_heads
from mechicl.models.toys.positions import draw_places
from mechicl.prompts.batch import Batch
from mechicl.prompts.vectors import to_batch
from mechicl.results import Head, KnockOut, KnockOutTable

FEATURES = "hook_image_features"
"""Hook point of what the projector hands over, [batch, shown, d]."""
PREVIOUS, INDUCTION = "previous-token head off", "induction head off"
FIRST, SECOND = "M1 emptied", "M2 emptied"


@guarded
def knock_out_table(
    model: Any,
    task: Task,
    *,
    heads: Mapping[str, Sequence[Head]] | None = None,
    n: int = 512,
    split: Split = "ic",
    how: How = "zero",
    n_random: int = 20,
    seed: int = 0,
    batch_size: int = 256,
) -> KnockOutTable:
    """Switch heads and modalities off, one after another, on the same sequences.

    Args:
        model: A `ToyTransformer`.
        task: What it was trained on; the sequences are new ones.
        heads: What to switch off, by name. Default: the best previous-token head (in multimodal tasks the one that looks most from labels to items of the second
            modality) and the best induction head, found on other sequences than those tested.
        n: Sequences.
        split: Which split; "ic" is novel classes.
        how: What takes the place of a head's output; "zero" is the paper's.
        n_random: Random sets of heads, and random draws of tokens.
        seed: Decides sequences and draws.
        batch_size: Sequences per forward pass.

    Returns:
        KnockOutTable: the intact model, each set of heads and the mean of its matched random sets, and in multimodal tasks each modality emptied and as many item
        tokens of either modality, drawn at random. A model of one head a layer has few or no other heads to draw: `note` says so.

    Raises:
        OptionError: n below 4, n_random below 1.

    Source:
        Huang et al. 2026 (knock-outs of the toy). Differs: heads found on other sequences, random heads, random tokens, intervals.
    """
    if n < 4 or n_random < 1:
        raise OptionError(f"n must be at least 4 and n_random at least 1; got {n} and {n_random}. Hundreds and 20 are usual.")
    batch = sequences(model, task, n, split, seed)
    chosen = find(model, task, seed=seed + 1) if heads is None else {k: check_heads(model, v) for k, v in heads.items()}
    trial = _Trial(model, batch, seed, batch_size)
    rows, notes = [trial.row("intact", "intact", trial.intact)], []
    known = [head for some in chosen.values() for head in some]
    for name, some in chosen.items():
        drawn = matched_draws(
            some,
            {layer: int(model.cfg.n_heads) for layer in switchable(model)},
            n_random,
            seed=seed,
            spare=[head for head in known if head not in some],
        )
        switches = Switches.build(model, batch, [tuple(some), *drawn.sets], how, seed=seed, batch_size=batch_size)
        first, *random = trial.without(switches)
        rows.append(trial.row(name, "heads", first, heads=tuple(some)))
        if random:
            label = f"random heads in place of the {name.removesuffix(' off')} ({len(random)} {'draw' if len(random) == 1 else 'draws'})"
            rows.append(trial.mean_row(label, "random heads", random, drawn.sets[0] if len(random) == 1 else ()))
        notes += [f"{name}: {drawn.note}"] if drawn.note else []
    if "second_pos" in batch.inputs:
        rows += _modalities(trial, n_random)
    levels = chance(task, split)
    return KnockOutTable(
        tuple(rows), levels["label"], levels["context"], n, 1, f"heads: {how}; tokens: zero", "; ".join(notes),
        provenance(model, task=f"{type(task).__name__}, split {split}", seed=seed, options={"how": how, "n_random": n_random}),
    )  # fmt: skip


def sequences(model: Any, task: Task, n: int, split: Split, seed: int) -> Batch:
    """New sequences of a task as a batch, at random places where the model was trained so."""
    generator = torch.Generator().manual_seed(seed)
    drawn = draw(task, n, generator, split=split)
    return to_batch(drawn, position_ids=draw_places(model.cfg, n, drawn.layout.n_pos, generator)).to(model.device)


def find(model: Any, task: Task, *, n: int = 256, seed: int = 1, batch_size: int = 64) -> dict[str, list[Head]]:
    """The head that most looks at right rather than wrong labels, of the layers that can read an earlier one, and below it the one that most looks at the token before.

    A model of one layer has an induction head at most.
    """
    batch = sequences(model, task, n, "ic", seed)
    scores = ("induction", "previous_token")
    found = score_heads(model, batch, scores=scores, n_null=1, seed=seed, batch_size=batch_size, progress=False)
    ranked = {name: found.top(name, model.cfg.n_layers * model.cfg.n_heads) for name in scores}
    best = next((head for head in ranked["induction"] if head[0] > 0), ranked["induction"][0])
    earlier = [head for head in ranked["previous_token"] if head[0] < best[0]]
    return {**({PREVIOUS: earlier[:1]} if earlier else {}), INDUCTION: [best]}


@dataclass(frozen=True, eq=False)
class _Answers:
    """Of every sequence, whether the answer is right and whether it is some label of the context."""

    correct: np.ndarray
    in_context: np.ndarray


class _Trial:
    """One model on one set of sequences, again and again with something taken away."""

    def __init__(self, model: Any, batch: Batch, seed: int, size: int) -> None:
        # without its renderer a batch is taken apart as it is, with the vectors that it has now
        self.model, self.batch, self.seed = model, replace(batch, renderer=None), seed
        self.parts = [range(k, min(k + size, batch.n)) for k in range(0, batch.n, size)]
        self.right = np.array([row[answer][0] for row, answer in zip(batch.candidate_ids, batch.answers, strict=True)])
        shown = [[int(s.label[1:]) for s in row if s.role == "label" and s.label] for row in batch.spans]
        self.context = np.array(shown)
        self.intact = self.answers(lambda part: [])

    @torch.no_grad()
    def answers(self, hooks: Callable[[range], list[Any]], switches: Switches | None = None, content: Tensor | None = None) -> _Answers:
        """The likeliest of all labels at the last token (ties by a seeded coin), with `hooks` of each part of the sequences, or with other vectors."""
        logits, batch = [], self.batch
        if content is not None:
            batch = replace(batch, inputs={**batch.inputs, "inputs_embeds": content})
        for rows in self.parts:
            part = batch.select(rows)
            if switches is not None:
                switches.see(self.model, part, 1)
            with self.model.hooks(fwd_hooks=hooks(rows)):
                logits.append(self.model(part)[:, -1].float().log_softmax(-1).cpu())
        predicted, _ = predict(torch.cat(logits).double().numpy(), self.seed)
        return _Answers(predicted == self.right, (predicted[:, None] == self.context).any(1))

    def without(self, switches: Switches) -> list[_Answers]:
        """The answers with each set of heads off."""
        return [self.answers(lambda rows, k=k: switches.hooks([k]), switches) for k in range(len(switches.sets))]

    def row(self, name: str, kind: str, found: _Answers, *, heads: tuple[Head, ...] = ()) -> KnockOut:
        """One knock-out, paired with the intact model."""
        change = paired_change(self.intact.correct, found.correct, unit="probability", seed=self.seed)
        return KnockOut(name, kind, wilson(found.correct), wilson(found.in_context), change, heads)

    def mean_row(self, name: str, kind: str, found: Sequence[_Answers], heads: tuple[Head, ...] = ()) -> KnockOut:
        """The mean over draws, its interval over draws."""
        accuracy, cla = (np.array([part.mean() for part in parts]) for parts in ([f.correct for f in found], [f.in_context for f in found]))
        change = runs_estimate(accuracy - self.intact.correct.mean(), unit="change")
        return KnockOut(name, kind, runs_estimate(accuracy, unit="probability"), runs_estimate(cla, unit="probability"), change, heads)


def _modalities(trial: _Trial, n_random: int) -> list[KnockOut]:
    """Each modality emptied, and as many of all item tokens drawn at random."""
    batch, device = trial.batch, trial.batch.inputs["inputs_embeds"].device
    first = torch.tensor([[span.start for span in row if span.role in ("text", "question")] for row in batch.spans], device=device)
    second = batch.inputs["second_pos"]
    n, n_first, n_second = batch.n, first.shape[1], second.shape[1]
    rows = []
    for name, off, off2 in ((FIRST, True, False), (SECOND, False, True)):
        masks = torch.full((n, n_first), off, device=device), torch.full((n, n_second), off2, device=device)
        rows.append(trial.row(name, "modality", _emptied(trial, first, *masks)))
    generator = torch.Generator().manual_seed(trial.seed)
    found = []
    for _ in range(n_random):
        order = torch.rand(n, n_first + n_second, generator=generator).argsort(1).argsort(1).to(device)
        off = order < n_second
        found.append(_emptied(trial, first, off[:, :n_first], off[:, n_first:]))
    return [*rows, trial.mean_row(f"as many random tokens emptied ({n_random} draws)", "random tokens", found)]


def _emptied(trial: _Trial, first: Tensor, off: Tensor, off2: Tensor) -> _Answers:
    """The answers with some item tokens empty: `off` [batch, item] of those at `first`, `off2` [batch, shown] of the second modality."""
    content = trial.batch.inputs["inputs_embeds"]
    gone = torch.zeros(content.shape[:2], dtype=torch.bool, device=content.device).scatter_(1, first, off)

    def hooks(rows: range) -> list[Any]:
        mask = off2[rows.start : rows.stop, :, None]
        return [(FEATURES, lambda features, *, hook: features.masked_fill(mask, 0.0))]

    return trial.answers(hooks, content=content.masked_fill(gone[..., None], 0.0))


def table_of(frame: pd.DataFrame) -> KnockOutTable:
    """The mean over models of a saved table: rows of `to_frame` of several models, with the columns chance, copy, how and note.

    Raises:
        OptionError: a column is missing.
    """
    lacking = [name for name in ("name", "kind", "accuracy", "cla", "change", "chance", "copy", "how", "n") if name not in frame.columns]
    if lacking:
        raise OptionError(f"frame must hold knock-outs of models; it lacks {lacking[0]!r}. Write it with KnockOutTable.to_frame().")
    rows = []
    for name, group in frame.groupby("name", sort=False):
        parts = (("accuracy", "probability"), ("cla", "probability"), ("change", "change"))
        accuracy, cla, change = (runs_estimate(group[part].to_numpy(dtype=float), unit=unit) for part, unit in parts)
        rows.append(KnockOut(str(name), str(group["kind"].iloc[0]), accuracy, cla, change))
    first = frame.iloc[0]
    note = "; ".join(dict.fromkeys(x for x in frame["note"] if x)) if "note" in frame.columns else ""
    n_models = max(row.accuracy.n for row in rows)
    return KnockOutTable(tuple(rows), float(first["chance"]), float(first["copy"]), int(first["n"]), n_models, str(first["how"]), note)


def over_models(tables: Sequence[KnockOutTable]) -> KnockOutTable:
    """The mean over models trained alike, with intervals over models.

    Raises:
        OptionError: no table, or tables with different knock-outs.
    """
    if not tables:
        raise OptionError("tables must be at least one; got none. Make one for each model with knock_out_table.")
    names = [row.name for row in tables[0].rows]
    if any([row.name for row in t.rows] != names for t in tables):
        raise OptionError("tables must have the same knock-outs; they differ. Name the heads alike in each, and give each model as many.")
    rows = []
    for group in zip(*(t.rows for t in tables), strict=True):
        accuracy, cla, change = (
            runs_estimate([getattr(r, part).value for r in group], unit=unit)
            for part, unit in (("accuracy", "probability"), ("cla", "probability"), ("change", "change"))
        )
        rows.append(KnockOut(group[0].name, group[0].kind, accuracy, cla, change, group[0].heads))
    first = tables[0]
    notes = dict.fromkeys(t.note for t in tables if t.note)
    return KnockOutTable(tuple(rows), first.chance, first.copy, first.n, len(tables), first.how, "; ".join(notes), first.provenance)
