"""What can be read out of the residual stream and out of a head's weights: logit attribution, logit lens, OV and QK circuits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mechicl.results.base import Estimate, Head, Provenance, Skipped
from mechicl.results.heads import PromptView


@dataclass(frozen=True, eq=False)
class LogitAttribution:
    """What each part of the model writes, directly, into the right label's logit minus the wrong label's, at the query's last token.

    Arrays are [component], or [component, span] with by="span" (a head's part split by the tokens it read; what is not a head stands in the column
    "last token", whose own stream it is). `per_episode` has the batch in front. Parts add up to `total`, the model's own logit difference, up to `residue` (the
    largest gap of any episode). The final norm's scale is each prompt's own, held fixed; soft-capping of logits comes after and is left out.

    Attributes:
        components: "embed", heads as "layer.head", "mlp l", "added l" (pictures entering between layers), "biases".
        low, high: 95 % bootstrap interval over episodes.
        null, null_low, null_high: The same on the same prompts with the exemplars' labels permuted; NaN where that could not be run.
        control: What the null is, in words.
        against: What the right label is compared with.
        total, null_total: The logit difference itself.
    """

    by: str
    against: str
    components: tuple[str, ...]
    spans: tuple[str, ...]
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    null: np.ndarray
    null_low: np.ndarray
    null_high: np.ndarray
    per_episode: np.ndarray
    total: Estimate
    null_total: Estimate
    residue: float
    control: str
    n: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()
    unit: str = "logit difference"

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the arrays' axes."""
        return ("component", "span") if self.spans else ("component",)

    def top(self, k: int = 10) -> list[str]:
        """The k components with the largest part in absolute value (summed over spans), largest first."""
        size = np.abs(self.value if not self.spans else self.value.sum(1))
        return [self.components[int(i)] for i in np.argsort(-size, kind="stable")[:k]]

    def to_frame(self) -> pd.DataFrame:
        """One row per component (and span)."""
        rows = []
        for cell in np.ndindex(*self.value.shape):
            rows.append(
                {"component": self.components[cell[0]], **({"span": self.spans[cell[1]]} if self.spans else {}), "value": self.value[cell],
                 "low": self.low[cell], "high": self.high[cell], "permuted_labels": self.null[cell], "permuted_low": self.null_low[cell],
                 "permuted_high": self.null_high[cell], "unit": self.unit, "n": self.n}
            )  # fmt: skip
        return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class PromptLens:
    """The logit lens over every token of one prompt.

    Attributes:
        view: The prompt: tokens, roles, pictures and their patches.
        margin: [layer, pos]: the right label's logit minus the best wrong one's, read at that token after that layer.
        tokens: [layer][pos]: the most probable tokens there, as text, the first the most probable.
        probability: [layer, pos, top], theirs.
    """

    view: PromptView
    margin: np.ndarray
    tokens: tuple[tuple[tuple[str, ...], ...], ...]
    probability: np.ndarray


@dataclass(frozen=True, eq=False)
class LogitLens:
    """The residual stream after each layer, read through the model's own final norm and unembedding.

    Arrays are [layer, span]; `per_episode` [batch, layer, span], the mean over the span's tokens, NaN where a prompt has no such span.

    Attributes:
        of: "margin" (right label minus best wrong one, logits), "logprob" (of the right label over the whole vocabulary, nats) or "rank" (of the right label in
            the whole vocabulary, 1 = first).
        layers: Layer after which the stream is read; -1 is the embeddings.
        low, high: 95 % bootstrap interval over episodes.
        null, null_low, null_high: Mean and central 95 % of the same number when any candidate, drawn per episode, counts as the right label.
        p, p_corrected: Share of such draws at least as good (one-sided, +1); Holm over all cells.
        residue: Largest difference between the lens after the last layer at the last token and the model's own logits of the candidates.
        prompt: One prompt in full, where it was asked for.
    """

    of: str
    unit: str
    layers: tuple[int, ...]
    spans: tuple[str, ...]
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    null: np.ndarray
    null_low: np.ndarray
    null_high: np.ndarray
    p: np.ndarray
    p_corrected: np.ndarray
    per_episode: np.ndarray
    residue: float
    n: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()
    prompt: PromptLens | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the arrays' axes."""
        return ("layer", "span")

    def to_frame(self) -> pd.DataFrame:
        """One row per (layer, span)."""
        rows = [
            {"layer": self.layers[i], "span": self.spans[j], "value": self.value[i, j], "low": self.low[i, j], "high": self.high[i, j],
             "null": self.null[i, j], "null_low": self.null_low[i, j], "null_high": self.null_high[i, j], "p": self.p[i, j],
             "p_corrected": self.p_corrected[i, j], "of": self.of, "unit": self.unit, "n": self.n}
            for i, j in np.ndindex(*self.value.shape)
        ]  # fmt: skip
        return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class Copying:
    """Whether heads' OV circuits raise the logit of the token they read. Arrays are [head], in the order of `HeadCircuits.heads`.

    Attributes:
        value: Share of the eigenvalues' mass (sum of absolute values) whose real part is positive, in [0, 1]; one half says nothing.
        ratio: Sum of the eigenvalues over the sum of their absolute values, in [-1, 1] (Elhage 2021).
        null, null_low, null_high: `value` of random matrices of the head's shape between the same embedding and unembedding: mean and central 95 %.
        p, p_corrected: Share of random matrices at least as high (+1 correction); Holm over the heads asked for.
        others: `value` of heads of the model that were not asked for, [other], for comparison.
        tokens: How many tokens the matrix is over.
        eigenvalues: [head, eigenvalue], complex, largest first.
    """

    value: np.ndarray
    ratio: np.ndarray
    null: np.ndarray
    null_low: np.ndarray
    null_high: np.ndarray
    p: np.ndarray
    p_corrected: np.ndarray
    others: np.ndarray
    tokens: int
    eigenvalues: np.ndarray


@dataclass(frozen=True, eq=False)
class QKMatch:
    """Why one head's score is higher on right than on wrong exemplars: the difference of scores by what wrote the query and what wrote the key.

    Arrays are [dest, src]: rows what wrote into the last token's stream (the query), columns what wrote into the exemplars' streams (the keys).

    Attributes:
        head: (layer, head).
        keys: Where the keys are, such as "label".
        queries, senders: Names of rows and columns.
        value, low, high: Mean over episodes and 95 % bootstrap interval, in score units (before the softmax).
        null, null_low, null_high: Mean and central 95 % of the same with right and wrong dealt out anew over the exemplars of each episode.
        per_episode: [batch, dest, src].
        total: The score difference itself.
        residue: Largest gap of any episode between the sum of the parts and the score difference.
    """

    head: Head
    keys: str
    queries: tuple[str, ...]
    senders: tuple[str, ...]
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    null: np.ndarray
    null_low: np.ndarray
    null_high: np.ndarray
    per_episode: np.ndarray
    total: Estimate
    residue: float
    unit: str = "attention score"

    def top(self, k: int = 10) -> list[tuple[str, str]]:
        """The k largest (query's part, key's part) in absolute value."""
        order = np.argsort(-np.abs(self.value).ravel(), kind="stable")[:k]
        return [(self.queries[int(i) // len(self.senders)], self.senders[int(i) % len(self.senders)]) for i in order]


@dataclass(frozen=True, eq=False)
class HeadCircuits:
    """The OV and QK circuits of chosen heads.

    Attributes:
        copying: Over the whole vocabulary; None where the model has no token embedding.
        label_copying: Over the first tokens of the labels in the data only; None without data.
        matches: QK decomposition of each head; empty without data.
        folded: Whether the norms' weights were multiplied into the matrices.
        view: One prompt, where pictures were asked for, and
        scores: for each head [reader, pos], the score (before the softmax) of the last token and the mean score of the query's picture tokens with every
            earlier token (NaN where it may not read).
    """

    heads: tuple[Head, ...]
    copying: Copying | None
    label_copying: Copying | None
    matches: Mapping[Head, QKMatch]
    folded: bool
    n: int
    skipped: tuple[Skipped, ...]
    provenance: Provenance
    notes: tuple[str, ...] = ()
    view: PromptView | None = None
    scores: Mapping[Head, np.ndarray] | None = None

    def to_frame(self) -> pd.DataFrame:
        """One row per number: copying scores of each head, and its QK parts."""
        rows: list[dict[str, Any]] = []
        for what, copying in (("copying", self.copying), ("copying, labels only", self.label_copying)):
            for k, head in enumerate(self.heads if copying is not None else ()):
                assert copying is not None
                null = (copying.null[k], copying.null_low[k], copying.null_high[k])
                rows.append(_row(what, head, "", "", copying.value[k], np.nan, np.nan, *null, "share", 0))
        for head, match in self.matches.items():
            for i, j in np.ndindex(*match.value.shape):
                cell = (i, j)
                rows.append(
                    _row("match", head, match.queries[i], match.senders[j], match.value[cell], match.low[cell], match.high[cell], match.null[cell],
                         match.null_low[cell], match.null_high[cell], match.unit, self.n)
                )  # fmt: skip
        return pd.DataFrame(rows)


def _row(what: str, head: Head, query: str, key: str, *numbers: Any) -> dict[str, Any]:
    names = ("value", "low", "high", "null", "null_low", "null_high", "unit", "n")
    return {"what": what, "layer": head[0], "head": head[1], "query_part": query, "key_part": key, **dict(zip(names, numbers, strict=True))}
