"""What the conditions of an experiment on examples do: shifts of the query's keys and values as Gram matrices, and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechicl.analysis.labels import LabelScore, answer, margins, predict
from mechicl.analysis.shift.read import KVRows, Part, read_kv, why_not
from mechicl.errors import OptionError
from mechicl.prompts.conditions import SPANS, Crossed, query_spans, query_tokens, unchanged
from mechicl.prompts.episode import Episode
from mechicl.results import Skipped

ZERO_SHOT = "zero-shot"
MOST_BYTES = 1 << 30
"""Keys and values held at once, of the query's tokens in all runs of an episode."""
FLOOR = 1e-5
"""A cell whose variation is smaller than this against its own length is not moved: rounding is not decomposed (in half precision the floor is its step)."""


def check_changes(model: Any, crossed: Crossed) -> None:
    """Refuse a level that leaves the first episode's prompt as it is: its factor would be nothing.

    Raises:
        OptionError: names the factor and the level.
    """
    plain = model.render([crossed.runs[0][0]])
    for j, one in enumerate(crossed.factors):
        for level, name in enumerate(one.levels[1:], 1):
            alone = torch.zeros(len(crossed.factors), dtype=torch.long)
            alone[j] = level
            run = int((crossed.design == alone).all(1).nonzero()[0])
            if unchanged(plain, model.render([crossed.runs[0][run]])):
                raise OptionError(
                    f"{one.name} {name!r} must change the prompt; this model's template writes it as before. Choose another change of {one.name}."
                )


@dataclass(frozen=True, eq=False)
class Answered:
    """Answers under every condition: right or wrong, and margins in nats, condition -> [batch]; for each episode why it cannot be scored."""

    correct: Mapping[str, np.ndarray]
    margins: Mapping[str, np.ndarray]
    reasons: list[str]
    chance: np.ndarray

    @staticmethod
    def of(model: Any, crossed: Crossed, score: LabelScore, seed: int, batch_size: int, progress: bool) -> Answered:
        """Ask the model."""
        n, runs = crossed.n, len(crossed.design)
        every = [run for few in crossed.runs for run in few]
        right, gaps, reasons = _marked(model, every, score, seed, batch_size, progress)
        bare = _marked(model, crossed.zero_shot, score, seed, batch_size, progress)
        right, gaps = right.reshape(n, runs), gaps.reshape(n, runs)
        correct, nats = {}, {}
        for c, name in enumerate(crossed.conditions):
            mine = (crossed.condition == c).numpy()
            correct[name], nats[name] = right[:, mine].mean(1), gaps[:, mine].mean(1)
        correct[ZERO_SHOT], nats[ZERO_SHOT] = bare[0], bare[1]
        first = [next((r for r in reasons[e * runs : (e + 1) * runs] if r), "") for e in range(n)]
        return Answered(correct, nats, first, np.array([1 / len(episode.candidates) for episode in crossed.zero_shot]))


def _marked(
    model: Any, episodes: Sequence[Episode], score: LabelScore, seed: int, batch_size: int, progress: bool
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    answers, key, reasons = answer(model, list(episodes), score=score, batch_size=batch_size, what="answers", progress=progress)
    deciding = answers[0].deciding(score)
    predicted, _ = predict(deciding, seed)
    return (predicted == key.answers).astype(np.float64), margins(deciding, key.answers), reasons


@dataclass(eq=False)
class Read:
    """Gram matrices of the shifts, episode by episode: [part, layer, head, span, run, run] over the squared length of the zero-shot key or value."""

    grams: list[np.ndarray] = field(default_factory=list)
    common: list[np.ndarray] = field(default_factory=list)
    spans: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    heads: int = 0
    kept: list[int] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)

    def add(
        self,
        model: Any,
        crossed: Crossed,
        e: int,
        parts: Sequence[Part],
        layers: Sequence[int] | None,
        spans: Sequence[str] | None,
        batch_size: int,
    ) -> str:
        """Read one episode; returns why it cannot be used, "" where it was."""
        chunks = [model.render(list(crossed.runs[e][start : start + batch_size])) for start in range(0, len(crossed.runs[e]), batch_size)]
        tokens = [one for batch in chunks for one in query_tokens(batch)]
        if any(one != tokens[0] for one in tokens):
            return "the query's own tokens are not the same under all conditions"
        zero = model.render([crossed.zero_shot[e]])
        comparable = query_tokens(zero)[0] == tokens[0]
        if not comparable:
            self.notes[
                "Alone, the query's picture has other tokens than beside examples: what all conditions share (common) is not known there."
            ] = None
        wanted = tuple(SPANS if spans is None else (name for name in SPANS if name in spans))
        found: list[tuple[np.ndarray, np.ndarray]] = []
        chosen = self._layers(model, parts, layers)
        n_rows = len(tokens) * sum(len(ids) for ids in tokens[0].values())
        for group in _groups(model, chosen, n_rows * len(parts)):
            base = _rows(read_kv(model, zero, _asked(zero, spans), parts, group))
            runs = [_rows(read_kv(model, batch, _asked(batch, spans), parts, group)) for batch in chunks]
            mine = [_episode([one[name] for one in runs], base[name], comparable) if name in base else None for name in wanted]
            like = next(one for one in mine if one is not None)
            blank = (np.full_like(like[0], np.nan), np.full_like(like[1], np.nan))
            found.append((np.stack([(one or blank)[0] for one in mine], 3), np.stack([(one or blank)[1] for one in mine], 3)))
        self.parts, self.layers, self.spans = tuple(parts), tuple(chosen), wanted
        self.grams.append(np.concatenate([gram for gram, _ in found], 1))
        self.common.append(np.concatenate([common for _, common in found], 1))
        self.heads = self.grams[-1].shape[2]
        return ""

    def _layers(self, model: Any, parts: Sequence[Part], layers: Sequence[int] | None) -> list[int]:
        """Layers to read: those asked for, or all that have keys and values of the prompt's tokens."""
        if layers is not None:
            return [int(layer) for layer in layers]
        reasons = {layer: next((why for part in parts if (why := why_not(model, layer, part))), "") for layer in range(model.cfg.n_layers)}
        for layer, why in reasons.items():
            if why:
                self.notes[f"Layer {layer} is left out: {why}."] = None
        return [layer for layer, why in reasons.items() if not why] or list(reasons)  # without any, reading says why

    def stacked(self) -> np.ndarray:
        """All episodes, nought where a cell is not there; spans that no prompt has left out."""
        every, common = np.stack(self.grams), np.stack(self.common)
        there = [j for j in range(len(self.spans)) if not np.isnan(every[..., j, :, :]).all()]
        self.spans = tuple(self.spans[j] for j in there)
        self.common = [one[..., there] for one in common]
        return np.nan_to_num(every[..., there, :, :])

    def floor(self, model: Any) -> float:
        """Least variation that is more than rounding."""
        dtype = getattr(model.cfg, "dtype", torch.float32)
        return max(FLOOR, torch.finfo(dtype).eps) if isinstance(dtype, torch.dtype) and dtype.is_floating_point else FLOOR


def _groups(model: Any, layers: Sequence[int], n_rows: int) -> list[list[int]]:
    """The layers, as many at a time as their rows may fill; each group is a forward pass more."""
    heads = getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads
    size = max(1, int(MOST_BYTES // max(1, 4 * n_rows * heads * model.cfg.d_head)))
    return [list(layers[start : start + size]) for start in range(0, len(layers), size)]


def _asked(batch: Any, spans: Sequence[str] | None) -> dict[str, Tensor]:
    return {name: mask for name, mask in query_spans(batch).items() if spans is None or name in spans}


def _rows(rows: KVRows) -> dict[str, Tensor]:
    """For each span [batch, part, layer, head, row, d], every prompt with its own tokens only (all prompts have as many)."""
    out = {}
    for name, inside in rows.rows.spans.items():
        counts = inside.sum(1)
        if not bool((counts == counts[0]).all()):  # told apart by their tokens later
            out[name] = torch.zeros(len(inside), 0)
            continue
        index = inside.nonzero()[:, 1].reshape(len(inside), -1)
        every = torch.stack([rows[part] for part in rows], 1)
        out[name] = every.gather(4, index[:, None, None, None, :, None].expand(-1, *every.shape[1:4], -1, every.shape[-1]))
    return out


def _episode(runs: Sequence[Tensor], base: Tensor, comparable: bool) -> tuple[np.ndarray, np.ndarray]:
    """Gram matrix of an episode's shifts [part, layer, head, run, run] and the squared shift common to all [part, layer, head], relative."""
    x = torch.cat(list(runs)).double()
    zero = base.double()
    if comparable:
        x = x - zero
        scale = zero[0].square().sum((-1, -2))
    else:  # as many tokens as the runs have, of the mean length
        scale = zero[0].square().sum(-1).mean(-1) * x.shape[-2]
    flat = x.movedim(0, -3).flatten(-2)
    scale = scale.clamp_min(1e-30)
    grams = (flat @ flat.mT) / scale[..., None, None]
    common = flat.mean(-2).square().sum(-1) / scale
    return grams.numpy(), (common if comparable else torch.full_like(common, torch.nan)).numpy()
