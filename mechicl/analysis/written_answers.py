"""`written_answers`: a benchmark's questions over shots, answered in writing and marked by the benchmark's rule, with the zero-shot control."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mechicl.analysis.feed import provenance
from mechicl.analysis.guarded import guarded
from mechicl.analysis.labels import LabelScore, predict
from mechicl.analysis.link.answers import Asked, How
from mechicl.analysis.link.settings import Job, Setting, collect
from mechicl.analysis.statistics import holm, mcnemar_p, mean_estimate, paired_change, wilson
from mechicl.data.vl_icl import Description, VLICLTask
from mechicl.errors import EpisodeError, OptionError
from mechicl.prompts.episode import Episode
from mechicl.results import Skipped
from mechicl.results.written import WrittenAnswers, WrittenChange, WrittenRow

TABLES = ("scores.csv", "answers.parquet")


@guarded
def written_answers(
    model: Any,
    task: VLICLTask,
    *,
    shots: Sequence[int] = (0, 1, 2, 4),
    n: int | None = None,
    classes: int = 2,
    description: Description = "concise",
    max_new_tokens: int | None = None,
    score: LabelScore = "full",
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> WrittenAnswers:
    """Accuracy over shots, by what the model writes and by the likelihood of the candidates, on the same queries.

    Args:
        model: A `HookedVLM`; hooks that are active stay active.
        task: See `mechicl.data.vl_icl.load_vl_icl`.
        shots: As the benchmark counts them; 0 is always run, as the control.
        n: Queries, drawn at random; None for all.
        classes, description: See `VLICLTask.episodes`.
        max_new_tokens: Longest answer; None: the longest candidate and 16 more (the release has 15 for all models).
        score: What decides between candidates.
        out: A folder; a run that was killed goes on from its last finished batch.
        seed: Decides queries and examples.
        batch_size: Prompts at once; halved by itself where memory runs out.

    Raises:
        OptionError: more queries or shots than the task has, a model that cannot write, options out of range.
        EpisodeError: no query can be asked at every number of shots.
        ImageError: a picture cannot be read any more.
        CheckpointError, OutputPathError: `out` holds another evaluation, or cannot be written.
    """
    counts = sorted({0, *shots})
    if counts[0] < 0:
        raise OptionError(f"shots must not be negative; got {min(shots)}. 0 is the control.")
    drawn = {k: task.episodes(n, shots=k, classes=classes, description=description, seed=seed) for k in counts}
    settings = [Setting(f"{k} shots", float(k), episodes) for k, episodes in drawn.items()]
    job = Job("shots", f"VL-ICL Bench {task.name}", How(score, True, max_new_tokens), batch_size=batch_size, seed=seed, progress=progress)
    answers, store = collect(model, settings, job, out)
    result = _mark(model, task, settings, job, answers, {"classes": classes, "description": description})
    if store is not None:
        for name, table in zip(TABLES, (result.to_frame(), result.answers_frame()), strict=True):
            store.write_table(name, table)
    return result


def _mark(model: Any, task: VLICLTask, settings: Sequence[Setting], job: Job, answers: Mapping[tuple[str, int], Asked], options: Mapping[str, Any]) -> WrittenAnswers:  # fmt: skip
    first = settings[0].episodes
    # an answer without values was refused; one with values and a reason only cannot be compared by likelihood
    refused = [next((f"{s.name}: {a.reason}" for s in settings if not (a := answers[s.name, i]).values), "") for i in range(len(first))]
    kept = [i for i, reason in enumerate(refused) if not reason]
    if not kept:
        raise EpisodeError(
            f"a query must be askable at every number of shots; none of {len(first)} is ({refused[0]}). Change model or task."
        )
    rows = tuple(_row(task, s, [s.episodes[i] for i in kept], [answers[s.name, i] for i in kept], job) for s in settings)
    base = [first[i] for i in kept]
    commonest = Counter(episode.answer for episode in base).most_common(1)[0][0]
    return WrittenAnswers(
        task=task.name, rows=rows, always=wilson([task.right(commonest, episode) for episode in base]), commonest=commonest,
        changes=_changes(rows, job.seed), answers=tuple(episode.answer for episode in base), episode_ids=tuple(episode.id for episode in base), n=len(kept),
        skipped=tuple(Skipped(first[i].id, reason) for i, reason in enumerate(refused) if reason),
        provenance=provenance(model, task=f"VL-ICL Bench {task.name}", seed=job.seed,
                              options={**options, "shots": [row.shots for row in rows], "score": job.how.score, "max_new_tokens": job.how.limit, "batch_size": job.batch_size}),
        notes=tuple(_notes(task, rows, base)),
    )  # fmt: skip


def _row(task: VLICLTask, one: Setting, episodes: Sequence[Episode], answers: Sequence[Asked], job: Job) -> WrittenRow:
    right = np.array([task.right(a.text, e) for e, a in zip(episodes, answers, strict=True)])
    ours = np.array([task.right(a.text, e, "ours") for e, a in zip(episodes, answers, strict=True)])
    values = np.full((len(episodes), max(len(a.values) for a in answers)), -np.inf)
    for row, answer in zip(values, answers, strict=True):
        row[: len(answer.values)] = answer.values
    predicted, _ = predict(values, job.seed)
    truth = np.array([e.candidates.index(e.answer) for e in episodes])
    known = np.array([not a.reason for a in answers])
    likely = np.where(known, (predicted == truth).astype(float), np.nan)
    counted = [1 / len(e.candidates) for e, ok in zip(episodes, known, strict=True) if ok]
    copied = [float(np.mean([shot.label == e.answer for shot in e.shots])) if e.shots else 0.0 for e in episodes]
    return WrittenRow(
        shots=int(one.x), examples=float(np.mean([len(e.shots) for e in episodes])), written=wilson(right), ours=wilson(ours),
        likelihood=wilson(likely[known]), chance=float(np.mean(counted)) if counted else float("nan"),
        copied=mean_estimate(copied, unit="probability", seed=job.seed), right=right, ours_right=ours, likely=likely,
        texts=tuple(a.text for a in answers),
    )  # fmt: skip


def _changes(rows: Sequence[WrittenRow], seed: int) -> tuple[WrittenChange, ...]:
    """Every number of shots against none; Holm's correction within a measure."""
    found: list[WrittenChange] = []
    for measure in ("written", "ours", "likelihood"):
        pairs = [(row.shots, *_paired(rows[0], row, measure)) for row in rows[1:]]
        pairs = [pair for pair in pairs if len(pair[1])]
        p = [mcnemar_p(before, after) for _, before, after in pairs]
        found += [
            WrittenChange(measure, k, paired_change(before, after, unit="probability", seed=seed), one, float(corrected))
            for (k, before, after), one, corrected in zip(pairs, p, holm(p) if p else [], strict=True)
        ]
    return tuple(found)


def _paired(first: WrittenRow, row: WrittenRow, measure: str) -> tuple[np.ndarray, np.ndarray]:
    """The episodes that count in both."""
    a, b = ({"written": one.right, "ours": one.ours_right, "likelihood": one.likely}[measure].astype(float) for one in (first, row))
    both = ~np.isnan(a) & ~np.isnan(b)
    return a[both], b[both]


def _notes(task: VLICLTask, rows: Sequence[WrittenRow], base: Sequence[Episode]) -> list[str]:
    notes = []
    negative = sum(episode.answer.startswith("-") for episode in base)
    if negative and task.name.startswith("operator_induction"):
        notes.append(f"{negative} of {len(base)} answers are negative: the published rule reads no sign, so they are never right by it.")
    if task.name == "matching_mi":
        silent = [row.shots for row in rows if np.mean(["yes" not in text.lower() for text in row.texts]) > 0.95]
        if silent:
            notes.append(
                f"At {', '.join(map(str, silent))} shots hardly any answer has a yes in it; by the published rule that is right for every No."
            )
    for row in rows:
        if row.likelihood.n < len(base):
            notes.append(
                f"At {row.shots} shots likelihood counts {row.likelihood.n} of {len(base)} queries: in the others one candidate begins another, or "
                "whole labels cannot be told apart."
            )
    return notes
