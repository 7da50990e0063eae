"""The named head scores: which masses each is made of, what it is compared with, where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mechicl.analysis.heads.measures import (
    duplicate_weights,
    induction_paper_weights,
    induction_per_exemplar_weights,
    induction_weights,
    tila_weights,
)
from mechicl.analysis.heads.nulls import Null, logs, place_null, shuffled_null, shuffles
from mechicl.analysis.heads.own import ExemplarScore, Of, Weigh
from mechicl.analysis.heads.reading import Reading
from mechicl.analysis.layout import Layout, closing_group, image_group, text_group
from mechicl.analysis.statistics import difference_p

SCORES: dict[str, str] = {
    "previous_token": "attention of each text token to the token before it",
    "k_back": "attention of each text token to the token k before it",
    "induction": "attention from the query to the right labels and the tokens that close their turns, minus what as many wrong ones get",
    "induction_label": "attention from the query to the right labels' own tokens, minus what as many wrong labels get",
    "induction_per_exemplar": "mean attention from the query to a right label, minus the mean to a wrong label",
    "induction_paper": "mean attention from the query to every token of the right labels, minus the mean to all other positions",
    "tila": "mean attention from the query to a right exemplar's label",
    "tiia": "mean attention from the query to a right exemplar's item",
    "tla": "attention from the query to all exemplar labels together",
    "ila": "attention to an exemplar's own item, the most that a token of its label or of its turn's close gives",
    "duplicate": "attention from each item to its earlier showings",
    "sink": "attention of text tokens to the first token",
    "previous_token_all": "attention of each token, pictures' included, to the token before it",
}
"""Every score and what it measures."""

SOURCES = {
    "previous_token": "Olsson et al. 2022; Huang et al. 2026 (PH). Differs: text tokens only",
    "k_back": "Huang et al. 2026 (PH with k = 2). Differs: text tokens only",
    "induction": "Huang et al. 2026 (IH of the toy), times the number of right exemplars. Differs: with the tokens that close the label's turn",
    "induction_label": "Huang et al. 2026 (IH of the toy), times the number of right exemplars",
    "induction_per_exemplar": "Huang et al. 2026 (IH of the toy)",
    "induction_paper": "Huang et al. 2026 (IH on production models)",
    "tila": "Huang et al. 2026; Reddy 2024",
    "tiia": "Huang et al. 2026; Reddy 2024",
    "tla": "Huang et al. 2026. Differs: every label of the context",
    "ila": "Reddy 2024. Differs: without the first exemplar; the best row of label and close, where chat models gather",
    "duplicate": "Wang et al. 2022. Differs: items instead of tokens",
    "sink": "Xiao et al. 2023",
    "previous_token_all": "Huang et al. 2026 (PH on production models)",
}

WEIGHED: dict[str, tuple[Weigh, Of]] = {
    "induction": (induction_weights, "turn"),
    "induction_label": (induction_weights, "label"),
    "induction_per_exemplar": (induction_per_exemplar_weights, "label"),
    "tila": (lambda right, wrong: tila_weights(right), "label"),
    "tiia": (lambda right, wrong: tila_weights(right), "item"),
}
"""Scores that are weights times the attention to exemplars, and nothing else."""
CONTENT = {name: ExemplarScore(name, SCORES[name], weigh, of, SOURCES[name]) for name, (weigh, of) in WEIGHED.items()}

SHUFFLED = "labels shuffled over the exemplars"
OFFSETS = "the same tokens' attention to other offsets"


@dataclass(frozen=True, eq=False)
class Raw:
    """A score before it is summed up. per_episode [batch, layer, head]."""

    per_episode: np.ndarray
    null: Null
    description: str
    null_name: str
    source: str


@dataclass(frozen=True, eq=False)
class Subset:
    """Episodes and exemplars of one modality pair. `suffix` is "" for all of them."""

    suffix: str
    rows: np.ndarray
    shots: Tensor


class Scorer:
    """Turns a `Reading` into scores with their nulls."""

    reading: Reading
    where: Layout
    n_null: int
    seed: int
    k: int
    lift: float
    shape: tuple[int, ...]
    uniform: float

    def __init__(self, reading: Reading, *, n_null: int, seed: int, k_back: int, lift: float) -> None:
        self.reading, self.where, self.n_null, self.seed, self.k, self.lift = reading, reading.layout, n_null, seed, k_back, lift
        self.shape = reading.total.shape
        self.uniform = float(1 / reading.layout.n_real.double().mean())

    def score(self, name: str | ExemplarScore) -> Iterator[tuple[str, Raw]]:
        """(name, score) of one of `SCORES` or one of your own, and of its modality pairs where the data mix them."""
        if isinstance(name, ExemplarScore) or name in CONTENT or name == "induction_paper":
            subsets = [Subset("", np.arange(self.shape[0]), self.where.known), *self._pairs()]
            score = CONTENT.get(name) if isinstance(name, str) else name
            for subset in subsets:
                yield f"{score.name if score else name}{subset.suffix}", self._content(score, subset)
        elif name in ("previous_token", "k_back", "previous_token_all"):
            yield name, self._back(name)
        elif name == "sink":
            yield name, self._sink()
        elif name == "tla":
            yield name, self._tla()
        elif name == "duplicate":
            yield name, self._duplicate()
        elif name == "ila":
            yield from self._ila()

    def _raw(self, name: str, per_episode: np.ndarray, null: Null, null_name: str, what: str = "") -> Raw:
        description = SCORES[name].replace("token k before", f"token {self.k} before") + what
        return Raw(per_episode, null, description, null_name, SOURCES[name])

    # -- scores of place

    def _back(self, name: str) -> Raw:
        both = {"previous_token": self.reading.previous, "k_back": self.reading.k_back, "previous_token_all": self.reading.everything}[name]
        mean = _mean(both[..., 1])
        if name == "previous_token_all":
            blank = np.full(self.shape[1:], np.nan)
            return self._raw(name, both[..., 0], Null(mean, blank, blank), "attention to any other place (no test: see previous_token)")
        k = self.k if name == "k_back" else 1
        offsets = np.moveaxis(_mean(self.reading.offsets), -1, 0)
        null = place_null(offsets[k - 1][None], np.delete(offsets, k - 1, axis=0)[None], mean, uniform=self.uniform, lift=self.lift)
        return self._raw(name, both[..., 0], null, OFFSETS)

    def _sink(self) -> Raw:
        starts = np.moveaxis(_mean(self.reading.starts), -1, 0)
        null = place_null(starts[:1], starts[1:][None], _mean(self.reading.sink[..., 1]), uniform=self.uniform, lift=self.lift)
        return self._raw("sink", self.reading.sink[..., 0], null, "the same tokens' attention to the tokens after the first")

    def _tla(self) -> Raw:
        s, where = self.where.n_shots, self.where
        labels, items = self._mass("label"), self._mass("item")
        per_label = _density(labels, where.label_tokens)
        per_item = _density(items, (where.image_tokens + where.text_tokens)[:, :s])
        p, ratio = difference_p(logs(per_label, self.uniform) - np.log(self.lift), logs(per_item, self.uniform))
        mean = _mean(per_item) * float(where.label_tokens.sum(1).double().mean())
        null = Null(mean, np.minimum(mean * ratio, 1.0), p)
        return self._raw("tla", labels.sum(-1), null, "the exemplars' items, as many tokens of them")

    # -- scores of content

    def _content(self, score: ExemplarScore | None, subset: Subset) -> Raw:
        """A score that is linear in the exemplars' masses; None for `induction_paper`, whose weights count tokens."""
        name = "induction_paper" if score is None else score.name
        s = self.where.n_shots
        known, right = self.where.known & subset.shots, self.where.right & subset.shots
        both = (right.any(1) & (known & ~right).any(1)).numpy()
        rows = subset.rows[both[subset.rows]]
        mass = self._mass("label" if score is None else score.of)
        cells = np.concatenate([mass, self.reading.total[..., None]], -1) if score is None else mass
        per_episode = np.full(self.shape, np.nan)
        known, right = known[rows], right[rows]

        def weigh(drawn: Tensor) -> Tensor:
            if score is None:
                return induction_paper_weights(drawn, self.where.label_tokens[rows], self.where.n_real[rows])
            return score.weights(drawn, known & ~drawn)

        def draw(n: int, generator: torch.Generator) -> Tensor:
            return weigh(shuffles(right.long(), known, n, generator).bool())

        null = _no_null(self.shape[1:])
        shown = score is None or score.of != "item" or bool((self.where.image_tokens + self.where.text_tokens)[:, :s].any())
        if len(rows) and shown:
            per_episode[rows], null = self._linear(cells[rows], right, weigh(right), draw)
        what = f" ({subset.suffix.strip('[]')})" if subset.suffix else ""
        if score is None:
            return self._raw(name, per_episode, null, SHUFFLED, what)
        return Raw(per_episode, null, score.description + what, SHUFFLED, score.source)

    def _duplicate(self) -> Raw:
        identity = self.where.identity
        usable = (duplicate_weights(identity).nansum((-1, -2)) > 0).numpy()
        per_episode = np.full(self.shape, np.nan)
        name = "identities shuffled over the items"
        if not usable.any():
            return self._raw("duplicate", per_episode, _no_null(self.shape[1:]), name)
        chosen = identity[usable]

        def draw(n: int, generator: torch.Generator) -> Tensor:
            return duplicate_weights(shuffles(chosen, chosen >= 0, n, generator)).flatten(-2)

        items = self.reading.items[usable].reshape(int(usable.sum()), *self.shape[1:], -1)
        per_episode[usable], null = self._linear(
            items, duplicate_weights(chosen).flatten(-2) > 0, duplicate_weights(chosen).flatten(-2), draw
        )
        return self._raw("duplicate", per_episode, null, name)

    def _linear(
        self, cells: np.ndarray, right: Tensor, weights: Tensor, draw: Callable[[int, torch.Generator], Tensor]
    ) -> tuple[np.ndarray, Null]:
        """Per-episode scores and the shuffled null of a score that is weights times masses."""
        n, (layers, heads) = cells.shape[0], self.shape[1:]
        mass = torch.as_tensor(cells.reshape(n, layers * heads, -1), dtype=torch.float32)
        per_episode = torch.einsum("bhc,bc->bh", mass.double(), weights.double()).numpy().reshape(n, layers, heads)
        if right.shape[1] < mass.shape[2]:  # the last cell is the whole row: it counts for no label
            right = torch.nn.functional.pad(right, (0, 1))
        found = shuffled_null(mass, right, weights, draw, n_draws=self.n_null, seed=self.seed, lift=self.lift)
        return per_episode, Null(*(array.reshape(layers, heads) for array in found))

    # -- labels to items

    def _ila(self) -> Iterator[tuple[str, Raw]]:
        counted = self.where.known.numpy().copy()
        counted[:, 0] = False
        s = self.where.n_shots
        image, text = (tokens[:, :s].numpy() > 0 for tokens in (self.where.image_tokens, self.where.text_tokens))
        whole = self.reading.label_image + self.reading.label_text
        null = self._ila_null()
        name = "the items of the exemplars before it, token for token"
        yield "ila", self._raw("ila", _over_shots(whole, counted & (image | text)), null, name)
        if image.any() and text.any():
            for part, mass, has in (("image", self.reading.label_image, image), ("text", self.reading.label_text, text)):
                yield (
                    f"ila[{part}]",
                    self._raw("ila", _over_shots(mass, counted & has), _no_null(self.shape[1:]), "none", f" ({part} items)"),
                )

    def _ila_null(self) -> Null:
        density = np.moveaxis(self.reading.label_density, (2, 3), (0, 1))  # [label, item, layer, head]
        s = density.shape[0]
        if s < 3:
            return _no_null(self.shape[1:])
        own, others = density[np.arange(s), np.arange(s)], density.copy()
        others[np.triu_indices(s)] = np.nan
        tokens = (self.where.image_tokens + self.where.text_tokens)[:, :s]
        per_item = float(tokens.sum()) / max(1, int((tokens > 0).sum()))
        mean = _mean(others.reshape(s * s, *others.shape[2:])) * per_item
        return place_null(own[1:], others[1:], mean, uniform=self.uniform, lift=self.lift)

    # -- modalities

    def _mass(self, of: Of) -> np.ndarray:
        """The query's attention to each exemplar's label, label with what closes its turn, or item, [batch, layer, head, shot]."""
        s, query = self.where.n_shots, self.reading.query
        if of == "item":
            return query[..., image_group(0, s) : image_group(0, s) + s] + query[..., text_group(0, s) : text_group(0, s) + s]
        closing = query[..., closing_group(0, s) : closing_group(0, s) + s]
        return query[..., :s] + closing if of == "turn" else query[..., :s]

    def _pairs(self) -> list[Subset]:
        """Query modality -> exemplar modality, where the data have more than one pair."""
        s = self.where.n_shots
        kind = (self.where.image_tokens > 0).long() + 2 * (self.where.text_tokens > 0).long()
        query, shots = kind[:, s].numpy(), kind[:, :s]
        names = {0: "nothing", 1: "image", 2: "text", 3: "image+text"}
        seen = {(int(q), int(x)) for i, q in enumerate(query) for x in shots[i][self.where.known[i]].unique()}
        if len(seen) < 2:
            return []
        return [Subset(f"[{names[q]}->{names[x]}]", np.nonzero(query == q)[0], shots == x) for q, x in sorted(seen)]


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over episodes, those without a number left out; NaN where all are."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(known, values, 0.0).sum(0) / known.sum(0)


def _density(mass: np.ndarray, tokens: Tensor) -> np.ndarray:
    """[batch, layer, head, shot] masses -> attention per token, mean over episodes, [shot, layer, head]."""
    n = tokens.numpy()[:, None, None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.moveaxis(_mean(np.where(n > 0, mass / np.maximum(n, 1), np.nan)), -1, 0)


def _over_shots(mass: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Mean over the exemplars that count, [batch, layer, head]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(counted[:, None, None], mass, 0.0).sum(-1) / counted.sum(-1)[:, None, None]


def _no_null(shape: tuple[int, ...]) -> Null:
    return Null(np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, np.nan))
