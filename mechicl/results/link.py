"""Link-context learning, marked: accuracy over shots, over wrong labels and places of the examples, and link against prior."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from mechicl.errors import OptionError
from mechicl.results.base import Estimate, Provenance, Skipped, columns

NAN = float("nan")
OUTCOMES = ("right", "other", "both", "neither")
"""What a written answer names: the right label only, another candidate only, both, none. As the both-names rule reads it, "right" is all that counts."""


@dataclass(frozen=True, eq=False)
class LinkCost:
    """What an evaluation will take, from a prompt of every setting that was run and timed; `prompts` are still to be asked, of `n` episodes."""

    prompts: int
    tokens: int
    seconds: float
    longest: int
    n: int

    def __str__(self) -> str:
        time = f"{self.seconds:.0f} s" if self.seconds < 120 else f"{self.seconds / 60:.0f} min"
        return f"{self.prompts} prompts on {self.n} episodes, {self.tokens} tokens (the longest prompt has {self.longest}), about {time}"


@dataclass(frozen=True, eq=False)
class LinkScore:
    """All episodes in one setting (a number of shots, a share of wrong labels, ...).

    Per-episode arrays are [batch]; everything under "written" is None or empty where nothing was generated.

    Attributes:
        setting: In words.
        x: The setting as a number, NaN where it is none.
        accuracy: Written: the both-names rule. `positive_recall`, `negative_recall`: the same on queries of the positive class (the one that was given a new
            name) and of the negative class (which kept its own).
        likelihood: The right candidate is the most probable one, and the same two recalls.
        margin: Log-probability of the right candidate minus the best other one, nats.
        outcomes: Written: share of each of `OUTCOMES`.
        follows: The most probable candidate is the label that most examples of the query's class carry; None where that is the right label anyway.
            Episodes without such a label do not count.
        shots: Examples in a prompt, on average.
        right, likely: Whether each episode was answered, written and by likelihood.
        margins: Nats.
        predicted: Index of the most probable candidate.
        texts: What was written.
    """

    setting: str
    x: float
    likelihood: Estimate
    likelihood_positive_recall: Estimate
    likelihood_negative_recall: Estimate
    margin: Estimate
    shots: float
    likely: np.ndarray
    margins: np.ndarray
    predicted: np.ndarray
    accuracy: Estimate | None = None
    positive_recall: Estimate | None = None
    negative_recall: Estimate | None = None
    outcomes: Mapping[str, Estimate] = field(default_factory=dict)
    follows: Estimate | None = None
    right: np.ndarray | None = None
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class LinkBaseline:
    """A way to answer without the decoder, in every setting: `accuracy[k]` belongs to `LinkScores.rows[k]`; NaN where it has nothing to go by.

    `chances` [setting, batch]: probability that it answers rightly (0 or 1 but for coins). `note`: how it was done, or why not.
    """

    name: str
    accuracy: tuple[Estimate, ...]
    chances: np.ndarray
    note: str = ""


@dataclass(frozen=True, eq=False)
class LinkChange:
    """Setting `b` minus setting (or baseline) `a` on the same episodes: paired bootstrap interval, exact McNemar test, corrected over all changes of a
    result that have the same `measure`.

    `measure`: "written" or "likelihood". `mcnemar_p` is NaN where `a` is a coin.
    """

    measure: str
    a: str
    b: str
    change: Estimate
    mcnemar_p: float
    holm_p: float


@dataclass(frozen=True, eq=False)
class LinkScores:
    """A model on link-context episodes, in settings that differ in one thing only, the same queries in all.

    Attributes:
        rows: One per setting, in order.
        axis: What differs: "shots per class", "share of wrong labels", "informative examples", ...
        protocol: How the episodes were drawn.
        baselines: Ways to answer without the decoder.
        changes: Paired tests.
        chance: Of likelihood: one over the number of candidates, mean.
        positive: [batch], whether the query is of the positive class.
        episode_ids: [batch].
        n: Episodes, the same ones in every setting.
        skipped: Episodes that some setting could not ask, left out of all.
        batched: (how many prompts were written again one by one, how many of them came out the same as in their batch).
    """

    rows: tuple[LinkScore, ...]
    axis: str
    protocol: str
    baselines: tuple[LinkBaseline, ...]
    changes: tuple[LinkChange, ...]
    chance: float
    positive: np.ndarray
    candidates: tuple[tuple[str, ...], ...]
    answers: tuple[str, ...]
    episode_ids: tuple[str, ...]
    n: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()
    batched: tuple[int, int] = (0, 0)

    def __getitem__(self, x: float | str) -> LinkScore:
        """The row of a setting, by its number or its words.

        Raises:
            OptionError: it was not run.
        """
        for row in self.rows:
            if x in (row.x, row.setting):
                return row
        raise OptionError(f"setting must be one of {', '.join(row.setting for row in self.rows)}; got {x!r}. Ask for one that was run.")

    def baseline(self, name: str) -> LinkBaseline:
        """A baseline.

        Raises:
            OptionError: it was not run.
        """
        for one in self.baselines:
            if one.name == name:
                return one
        raise OptionError(f"baseline must be one of {', '.join(b.name for b in self.baselines)}; got {name!r}. Ask for one that was run.")

    def to_frame(self) -> pd.DataFrame:
        """One row per setting and way to answer ("written", "likelihood", and the baselines)."""
        rows = []
        for k, row in enumerate(self.rows):
            common = {"setting": row.setting, "x": row.x, "shots": row.shots}
            if row.accuracy is not None:
                found = columns("accuracy", row.accuracy) | columns("positive_recall", row.positive_recall)
                found |= columns("negative_recall", row.negative_recall) | {name: e.value for name, e in row.outcomes.items()}
                rows.append({**common, "way": "written", **found, "n": self.n})
            found = columns("accuracy", row.likelihood) | columns("positive_recall", row.likelihood_positive_recall)
            found |= columns("negative_recall", row.likelihood_negative_recall) | columns("margin_nats", row.margin)
            if row.follows is not None:
                found |= columns("follows", row.follows)
            rows.append({**common, "way": "likelihood", **found, "n": self.n})
            rows += [{**common, "way": b.name, **columns("accuracy", b.accuracy[k]), "n": b.accuracy[k].n} for b in self.baselines]
        return pd.DataFrame(rows)

    def changes_frame(self) -> pd.DataFrame:
        """One row per paired test."""
        return pd.DataFrame(
            [{"measure": c.measure, "a": c.a, "b": c.b, **columns("change", c.change), "mcnemar_p": c.mcnemar_p, "holm_p": c.holm_p, "n": c.change.n}
             for c in self.changes],
            columns=["measure", "a", "b", "change", "change_low", "change_high", "mcnemar_p", "holm_p", "n"],
        )  # fmt: skip

    def answers_frame(self) -> pd.DataFrame:
        """One row per episode and setting: what was answered."""
        parts = []
        for row in self.rows:
            parts.append(
                pd.DataFrame(
                    {"episode": self.episode_ids, "setting": row.setting, "answer": self.answers, "positive": self.positive,
                     "predicted": [names[i] for names, i in zip(self.candidates, row.predicted, strict=True)],
                     "likely": row.likely, "margin_nats": row.margins, "text": row.texts or [""] * self.n,
                     "right": row.right if row.right is not None else [None] * self.n}
                )
            )  # fmt: skip
        return pd.concat(parts, ignore_index=True)


@dataclass(frozen=True, eq=False)
class LinkPriorRow:
    """Known things under one set of names, at one number of shots per class.

    Per-episode arrays are [batch]. Shares are of the most probable of all candidates; `written` has those of the written answers, `neither` included.

    Attributes:
        names: "renamed", or "true" for the same prompts with the names that the model knows.
        shots: Of each class.
        link: Share that answers with the name given in the prompt.
        prior: Share that answers with the name known before.
        other: Share that answers with another candidate.
        preference: Log-probability of the link's name minus the prior's, nats; above nought the link wins.
        gain: `preference` minus that of no example, the same queries: what the examples do. None at 0 shots.
        p: Two-sided sign-flip p that the preference is nought. `holm_p`: over the rows.
        gain_p: The same for the gain; NaN at 0 shots.
    """

    names: str
    shots: int
    link: Estimate
    prior: Estimate
    other: Estimate
    preference: Estimate
    gain: Estimate | None
    p: float
    holm_p: float
    gain_p: float
    preferences: np.ndarray
    chosen: tuple[str, ...]
    written: Mapping[str, Estimate] = field(default_factory=dict)
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class LinkPrior:
    """Does the answer follow the link or the prior? An "apple" that the prompt calls "orange", over shots, beside the same prompts with true names.

    Attributes:
        how: Where new names come from: "swap", "outside" or "novel".
        known: Share of queries that the model names rightly without any example, among the same candidates: without a prior there is nothing to win
            against. Its interval is over names, because episodes of one thing say the same.
        crossing: Shots at which the mean preference turns from the prior to the link, between two numbers of shots by straight line; NaN where it never does.
    """

    rows: tuple[LinkPriorRow, ...]
    how: str
    known: Estimate
    crossing: float
    episode_ids: tuple[str, ...]
    links: tuple[str, ...]
    priors: tuple[str, ...]
    n: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()

    def at(self, shots: int, names: str = "renamed") -> LinkPriorRow:
        """The row of a number of shots.

        Raises:
            OptionError: it was not run.
        """
        for row in self.rows:
            if (row.shots, row.names) == (shots, names):
                return row
        raise OptionError(
            f"shots and names must be among {[(row.shots, row.names) for row in self.rows]}; got {(shots, names)}. Ask for what was run."
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per set of names and number of shots."""
        rows = []
        for row in self.rows:
            found: dict[str, object] = {"names": row.names, "shots": row.shots}
            for name in ("link", "prior", "other"):
                found |= columns(name, getattr(row, name))
            found |= columns("preference_nats", row.preference) | columns("gain_nats", row.gain)
            found |= {"p": row.p, "holm_p": row.holm_p, "gain_p": row.gain_p} | {f"written_{k}": e.value for k, e in row.written.items()}
            rows.append({**found, "n": self.n})
        return pd.DataFrame(rows)
