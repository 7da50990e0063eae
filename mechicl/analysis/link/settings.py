"""The same questions in several settings: asked, kept, and marked. What every evaluation of link-context learning is made of."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mechicl.analysis.feed import progress_bar, provenance
from mechicl.analysis.guarded import each_part
from mechicl.analysis.labels import check_score, margins, predict
from mechicl.analysis.link.answers import Asked, How, Rule, ask, ask_together, can_write, outcome, overlapping, written_alone
from mechicl.analysis.link.baselines import LOOKED, baselines
from mechicl.analysis.link.store import AnswerStore, digest
from mechicl.analysis.patching.store import weights
from mechicl.analysis.statistics import holm, mcnemar_p, mean_estimate, paired_change, wilson
from mechicl.errors import EpisodeError, OptionError
from mechicl.prompts.episode import Episode, check_pictures
from mechicl.results import Estimate, LinkBaseline, LinkChange, LinkCost, LinkScore, LinkScores, Skipped
from mechicl.results.link import OUTCOMES

LONG = 400
"""Prompts from which on the cost is said before the work."""


@dataclass(frozen=True, eq=False)
class Setting:
    """Episodes in one setting; episode i of every setting asks the same query. `x`: the setting as a number."""

    name: str
    x: float
    episodes: Sequence[Episode]


@dataclass(frozen=True)
class Job:
    """How settings are asked and marked; see `mechicl.analysis.link.evaluate.evaluate_link`."""

    axis: str
    protocol: str
    how: How
    rule: Rule = "published"
    batch_size: int = 8
    seed: int = 0
    verify: int = 4
    follows: bool = False
    baselines: bool = True
    task: str = ""
    progress: bool = True

    def asked(self, model: Any, settings: Sequence[Setting]) -> dict[str, Any]:
        """Everything that decides the answers, as JSON values; what only decides how they are marked may change."""
        about = model.describe()
        episodes = {one.name: digest(one.episodes) for one in settings}
        return {"model": about.get("model"), "dtype": about.get("dtype"), "weights": weights(model), "protocol": self.protocol, "axis": self.axis,
                "how": asdict(self.how), "episodes": episodes}  # fmt: skip


def check_settings(model: Any, settings: Sequence[Setting], job: Job) -> None:
    """Refuse before any long work.

    Raises:
        OptionError: options out of range, or a model that cannot write.
        EpisodeError: no episodes.
        ImageError: a picture cannot be read.
    """
    check_score(job.how.score)
    outcome("a", "a", "b", job.rule)
    if job.batch_size < 1 or job.verify < 0:
        raise OptionError(f"batch_size must be at least 1 and verify at least 0; got {job.batch_size} and {job.verify}. Correct them.")
    if job.how.limit is not None and job.how.limit < 1:
        raise OptionError(f"max_new_tokens must be at least 1; got {job.how.limit}. None leaves room for the longest label.")
    if job.how.generate and not can_write(model):
        raise OptionError(
            f"model must be able to generate; {type(model).__name__} is not. Use generate=False: likelihood needs no writing."
        )
    if not settings or not settings[0].episodes:
        raise EpisodeError("episodes must be a non-empty list; got none. Draw some, e.g. from mechicl.data.link_context.generated_pool().")
    for one in settings:
        check_pictures(one.episodes)


def run_settings(
    model: Any, settings: Sequence[Setting], job: Job, *, out: str | os.PathLike[str] | None = None, embeddings: Any = None
) -> LinkScores:
    """Ask every episode in every setting, and mark the answers.

    Args:
        model: A `HookedVLM`, or with generate=False anything with the surface of `HookedModel`; hooks that are active stay active.
        settings: What is compared.
        job: How.
        out: A folder; a run that was killed goes on from its last finished batch.
        embeddings: See `mechicl.analysis.link.baselines.baselines`.

    Raises:
        OptionError, EpisodeError, ImageError: see `check_settings`; or no episode can be asked in all settings.
        CheckpointError, OutputPathError: `out` holds another evaluation, or cannot be written.
    """
    answers, store = collect(model, settings, job, out)
    result = mark(model, settings, job, answers, embeddings)
    if store is not None:
        store.finish(result)
    return result


def collect(
    model: Any, settings: Sequence[Setting], job: Job, out: str | os.PathLike[str] | None
) -> tuple[dict[tuple[str, int], Asked], AnswerStore | None]:
    """Answers by (setting, episode), those that `out` has already and the others asked now."""
    check_settings(model, settings, job)
    store = None if out is None else AnswerStore(out, job.asked(model, settings))
    answers = {} if store is None else store.load()
    todo = [[(one, i) for i in rows] for one in settings for rows in _parts(model, one, job, answers)]
    n_prompts = sum(len(part) for part in todo)
    if job.progress and n_prompts >= LONG:
        _say(str(cost(model, settings, job, n_prompts)))
    bar = progress_bar(None, total=n_prompts, what="asking", show=job.progress)

    def work(part: Sequence[tuple[Setting, int]]) -> list[tuple[Setting, int, Asked]]:
        found = ask_together(model, [one.episodes[i] for one, i in part], job.how)
        return [(one, i, answer) for (one, i), answer in zip(part, found, strict=True)]

    for found in each_part(todo, work, done=bar.update):
        name = found[0][0].name
        if store is not None:
            store.add(name, [i for _, i, _ in found], [answer for *_, answer in found])
        answers |= {(name, i): answer for _, i, answer in found}
    bar.close()
    return answers, store


def _parts(model: Any, one: Setting, job: Job, known: Mapping[tuple[str, int], Asked]) -> list[list[int]]:
    """Rows that are still to be asked, in batches; where the model runs a prompt once for each candidate, smaller ones."""
    shared = getattr(model, "continue_prompts", None) is not None
    copies = 1 if shared or job.how.score == "first_token" else max(len(e.candidates) for e in one.episodes)
    size, left = max(1, job.batch_size // copies), [i for i in range(len(one.episodes)) if (one.name, i) not in known]
    return [left[start : start + size] for start in range(0, len(left), size)]


def cost(model: Any, settings: Sequence[Setting], job: Job, n_prompts: int | None = None) -> LinkCost:
    """What the settings will take: one small batch of each is asked and timed, once as a rehearsal and once for the clock."""
    seconds, tokens, longest, total = 0.0, 0, 0, 0
    for k, one in enumerate(settings):
        few = list(one.episodes[: min(job.batch_size, len(one.episodes))])
        length = max(model.render([episode]).n_pos for episode in few[:2])
        if k == 0:
            ask(model, few[:1], job.how)
        start = time.perf_counter()
        ask(model, few, job.how)
        seconds += (time.perf_counter() - start) / len(few) * len(one.episodes)
        tokens, longest, total = tokens + length * len(one.episodes), max(longest, length), total + len(one.episodes)
    share = 1.0 if n_prompts is None else n_prompts / total
    return LinkCost(round(share * total), round(share * tokens), share * seconds, longest, len(settings[0].episodes))


def _say(text: str) -> None:
    from tqdm.auto import tqdm

    tqdm.write(f"link-context evaluation: {text}", file=sys.stderr)  # it is no result


def mark(model: Any, settings: Sequence[Setting], job: Job, answers: Mapping[tuple[str, int], Asked], embeddings: Any) -> LinkScores:
    """Answers to numbers, on the episodes that every setting could ask."""
    first = settings[0].episodes
    reasons = [next((f"{s.name}: {a.reason}" for s in settings if (a := answers[s.name, i]).reason), "") for i in range(len(first))]
    names = [episode.id or str(i) for i, episode in enumerate(first)]
    kept = [i for i, reason in enumerate(reasons) if not reason]
    if not kept:
        raise EpisodeError(f"an episode must be askable in every setting; none of {len(first)} is ({names[0]}: {reasons[0]}). Change them.")
    base = [first[i] for i in kept]
    positive = np.array([episode.answer == episode.candidates[0] for episode in base])
    rows = tuple(_row(s, [s.episodes[i] for i in kept], [answers[s.name, i] for i in kept], positive, job) for s in settings)
    beside: tuple[LinkBaseline, ...] = ()
    if job.baselines:
        beside = baselines(
            model, [[s.episodes[i] for i in kept] for s in settings], embeddings=embeddings, seed=job.seed, progress=job.progress
        )
    options = {"settings": [s.name for s in settings], "axis": job.axis, "protocol": job.protocol, "rule": job.rule, "batch_size": job.batch_size,
               "follows": job.follows, **asdict(job.how)}  # fmt: skip
    batched = _check_batching(model, settings[-1], kept, rows[-1], job)
    return LinkScores(
        rows=rows, axis=job.axis, protocol=job.protocol, baselines=beside, changes=_changes(rows, beside, job.seed),
        chance=float(np.mean([1 / len(episode.candidates) for episode in base])), positive=positive,
        candidates=tuple(episode.candidates for episode in base), answers=tuple(episode.answer for episode in base),
        episode_ids=tuple(names[i] for i in kept), n=len(kept),
        skipped=tuple(Skipped(names[i], reason) for i, reason in enumerate(reasons) if reason),
        provenance=provenance(model, task=job.task, seed=job.seed, options=options), notes=tuple(_notes(base, rows, positive, batched, job)),
        batched=batched,
    )  # fmt: skip


def _row(one: Setting, episodes: Sequence[Episode], answers: Sequence[Asked], positive: np.ndarray, job: Job) -> LinkScore:
    values = np.full((len(episodes), max(len(a.values) for a in answers)), -np.inf)
    for row, answer in zip(values, answers, strict=True):
        row[: len(answer.values)] = answer.values
    truth = np.array([episode.candidates.index(episode.answer) for episode in episodes])
    predicted, _ = predict(values, job.seed)
    gaps, likely = margins(values, truth), predicted == truth
    texts, written = tuple(answer.text for answer in answers), {}
    if job.how.generate:
        kinds = np.array([_outcome(e, text, job.rule) for e, text in zip(episodes, texts, strict=True)])
        right = kinds == "right"
        written = {"accuracy": wilson(right), "positive_recall": wilson(right[positive]), "negative_recall": wilson(right[~positive]),
                   "outcomes": {name: wilson(kinds == name) for name in OUTCOMES}, "right": right, "texts": texts}  # fmt: skip
    return LinkScore(
        setting=one.name, x=one.x, likelihood=wilson(likely), likelihood_positive_recall=wilson(likely[positive]),
        likelihood_negative_recall=wilson(likely[~positive]), margin=mean_estimate(gaps, unit="nats", seed=job.seed),
        shots=float(np.mean([len(e.shots) for e in episodes])), likely=likely, margins=gaps, predicted=predicted,
        follows=_follows(episodes, predicted) if job.follows else None, **written,
    )  # fmt: skip


def _outcome(episode: Episode, text: str, rule: Rule) -> str:
    return outcome(text, episode.answer, [name for name in episode.candidates if name != episode.answer], rule)


def shown_label(episode: Episode) -> str | None:
    """The label that most examples of the query's class carry; None without such examples, or where two labels tie."""
    counts = Counter(shot.label for shot in episode.shots if shot.item and shot.item == episode.query.item).most_common(2)
    if not counts or (len(counts) == 2 and counts[0][1] == counts[1][1]):
        return None
    return counts[0][0]


def _follows(episodes: Sequence[Episode], predicted: np.ndarray) -> Estimate:
    shown = [shown_label(episode) for episode in episodes]
    known = [(e.candidates[i], label) for e, i, label in zip(episodes, predicted, shown, strict=True) if label is not None]
    return wilson([chosen == label for chosen, label in known])


def _changes(rows: Sequence[LinkScore], beside: Sequence[LinkBaseline], seed: int) -> tuple[LinkChange, ...]:
    """Each setting against the one before, against the first, and against the nearest prototype."""
    found: list[LinkChange] = []
    for measure, of in (("written", _right), ("likelihood", _likely)):
        tests: list[tuple[str, str, np.ndarray, np.ndarray]] = []
        for k, row in enumerate(rows):
            now = of(row)
            if now is None:
                continue
            for before in dict.fromkeys(rows[j] for j in (k - 1, 0) if 0 <= j < k):
                then = of(before)
                assert then is not None
                tests.append((before.setting, row.setting, then, now))
            for one in beside:
                if one.name == LOOKED[0] and not np.isnan(one.chances[k]).any():
                    tests.append((one.name, row.setting, one.chances[k], now))
        p = [mcnemar_p(a, b) if np.isin(a, (0.0, 1.0)).all() else np.nan for _, _, a, b in tests]
        found += [
            LinkChange(measure, a, b, paired_change(x, y, unit="probability", seed=seed), one, float(corrected))
            for (a, b, x, y), one, corrected in zip(tests, p, holm(p), strict=True)
        ]
    return tuple(found)


def _right(row: LinkScore) -> np.ndarray | None:
    return row.right


def _likely(row: LinkScore) -> np.ndarray | None:
    return row.likely


def _check_batching(model: Any, last: Setting, kept: Sequence[int], row: LinkScore, job: Job) -> tuple[int, int]:
    """The first prompts of the last setting, written again alone."""
    if not job.how.generate or not job.verify:
        return 0, 0
    few = list(kept)[: job.verify]
    return written_alone(model, [last.episodes[i] for i in few], row.texts[: len(few)], job.how)


def _notes(episodes: Sequence[Episode], rows: Sequence[LinkScore], positive: np.ndarray, batched: tuple[int, int], job: Job) -> list[str]:
    notes = []
    contained = sum(map(overlapping, episodes))
    if contained and job.how.generate and job.rule == "published":
        notes.append(
            f"In {contained} of {len(episodes)} episodes one name contains the other: the both-names rule takes the longer one for the shorter. "
            "rule='longest' does not."
        )
    if batched[1] < batched[0]:
        notes.append(
            f"{batched[0] - batched[1]} of {batched[0]} prompts were written differently alone than in their batch: near-ties of the model."
        )
    if positive.all() or not positive.any():
        notes.append("All queries are of one class: only one recall is defined, and a model that always says one name would score 1 or 0.")
    lopsided = [row.setting for row in rows if _lopsided(row)]
    if lopsided:
        notes.append(
            f"Positive and negative recall (likelihood) differ by more than their intervals at {', '.join(lopsided)}: one name is preferred whatever is shown. "
            "With score='full' the shorter name can be; score='mean_token' tells."
        )
    pairs = len({tuple(e.candidates) for e in episodes})
    if pairs < len(episodes):
        notes.append(
            f"{len(episodes)} episodes of {pairs} pairs of names: intervals and tests are over episodes of these pairs, not over new pairs."
        )
    return notes


def _lopsided(row: LinkScore) -> bool:
    a, b = row.likelihood_positive_recall, row.likelihood_negative_recall
    return bool(a.high < b.low or b.high < a.low)
