"""A margin being moved: what is added to keys, values or the query of one batch, and the runs with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mechicl.analysis.labels import answers_of, margins, n_blocks, widen
from mechicl.analysis.margin.read import Keys, exemplar_tokens
from mechicl.errors import EmptySpanError
from mechicl.models.resuming.cells import Recorded
from mechicl.models.resuming.resume import Cell, record, run_cells
from mechicl.prompts.batch import Batch
from mechicl.results import Head

Moved = Literal["k", "v", "q"]
Engine = Literal["resume", "naive"]


@dataclass(frozen=True, eq=False)
class Push:
    """What is added at one hook point: `delta` [row, head, d_head] for the head indices `heads` at `rows` (prompt, position), both [row]."""

    hook: str
    prompt: Tensor
    position: Tensor
    head: int
    delta: Tensor

    def __call__(self, x: Tensor, start: int = 0) -> Tensor:
        """The edited activation [batch, pos - start, head, d_head]."""
        out = x.clone()
        at = (self.prompt.to(x.device), self.position.to(x.device) - start, torch.full_like(self.prompt, self.head).to(x.device))
        out[at] = (x[at].float() + self.delta.to(x.device)).to(x.dtype)
        return out


class Pushed:
    """One batch, widened by its candidates: the untouched run, and every push."""

    model: Any
    batch: Batch
    heads: Sequence[Head]
    blocks: int
    wide: Batch
    positions: Tensor
    right: Tensor
    known: Tensor
    recorded: Recorded
    notes: list[str]

    def __init__(self, model: Any, batch: Batch, heads: Sequence[Head], part: Moved, keys: Keys, engine: Engine) -> None:
        self.model, self.batch, self.heads, self.part, self.engine = model, batch, heads, part, engine
        self.blocks = n_blocks(batch, "full")
        self.wide = widen(batch, self.blocks)
        length = max(len(ids) for row in batch.candidate_ids for ids in row) if self.blocks > 1 else 1
        self.positions = (self.wide.query_pos[:, None].cpu() + torch.arange(length)).clamp_max(self.wide.n_pos - 1)
        shots = max(span.shot + 1 for row in batch.spans for span in row)
        self.tokens = exemplar_tokens(batch, shots, keys)  # [batch, shot, pos]
        self.right = torch.tensor(
            [[self._label(i, k) == batch.candidates[i][batch.answers[i]] for k in range(shots)] for i in range(batch.n)]
        )
        self.known = torch.tensor([[self._label(i, k) is not None for k in range(shots)] for i in range(batch.n)])
        if bool((self.known & ~self.tokens.any(-1)).any()):
            raise EmptySpanError(f'exemplars must have {keys} tokens to be moved; some have none. Use keys="before" or "label".')
        self.recorded = record(model, self.wide, positions=self.positions.to(self.wide.inputs["input_ids"].device), sites=self._sites())
        self.notes = list(self.recorded.notes)
        self.before = self._read(self.recorded.logits)

    def _label(self, row: int, shot: int) -> str | None:
        return next((span.label for span in self.batch.spans[row] if span.role == "label" and span.shot == shot), None)

    def _hook(self, name: str, layer: int) -> str:
        """Queries are moved where scores are made: after RoPE, where the layer has one."""
        turned = f"blocks.{layer}.attn.hook_rot_{name}"
        return turned if self.part == "q" and turned in self.model.hook_dict else f"blocks.{layer}.attn.hook_{name}"

    def _sites(self) -> list[str]:
        names = ("q", "k") if self.part == "q" else (self.part,)
        return list(dict.fromkeys(self._hook(name, layer) for layer, _ in self.heads for name in names))

    def run(self, doses: np.ndarray, n_controls: int, seed: int, numbers: Sequence[int]) -> np.ndarray:
        """The answer's margin, [1 + control, dose, batch]; control 0 is the true direction. `numbers`: of the episodes, which decide their random ones."""
        units: list[list[Push]] = [[] for _ in range(1 + n_controls)]
        for layer, head in self.heads:
            for control in range(1 + n_controls):
                units[control] += self._push(layer, head, [[seed, i, layer, head, control] for i in numbers] if control else [])
        cells = [[_scaled(push, float(dose)) for push in some] for some in units for dose in doses]
        found = self._naive(cells) if self.engine == "naive" else self._resumed(cells)
        return np.stack(found).reshape(1 + n_controls, len(doses), self.batch.n)

    def _push(self, layer: int, head: int, seeds: Sequence[Sequence[int]]) -> list[Push]:
        """The push of dose one, along the true direction, or with seeds (one per prompt) along random ones of the same length."""
        n = self.batch.n
        source = "k" if self.part == "q" else self.part
        vectors = self.recorded[self._hook(source, layer)][:n].float().cpu().nan_to_num()  # padding weighs nothing
        n_heads = self.recorded[self._hook("q", layer)].shape[2] if self.part == "q" else 0
        own = head // (n_heads // vectors.shape[2]) if self.part == "q" else head
        means = self.tokens.float() / self.tokens.sum(-1, keepdim=True).clamp_min(1)
        exemplar = torch.einsum("bsp,bpd->bsd", torch.nn.functional.pad(means, (0, vectors.shape[1] - means.shape[2])), vectors[:, :, own])
        right, wrong = (self.right & self.known).float(), (self.known & ~self.right).float()
        share = right / right.sum(1, keepdim=True) - wrong / wrong.sum(1, keepdim=True)
        direction = torch.einsum("bs,bsd->bd", share, exemplar)
        if self.part == "q":
            q = self.recorded[self._hook("q", layer)][:n, :, head].float().cpu()[torch.arange(n), self.batch.query_pos.cpu()]
            direction = (q * direction).sum(-1, keepdim=True) / direction.pow(2).sum(-1, keepdim=True).clamp_min(1e-30) * direction
        if seeds:
            other = torch.from_numpy(
                np.stack([np.random.default_rng(list(one)).standard_normal(direction.shape[1]) for one in seeds])
            ).float()
            direction = other / other.norm(dim=-1, keepdim=True) * direction.norm(dim=-1, keepdim=True)
        if self.part == "q":
            prompt, position, delta = torch.arange(n), self.batch.query_pos.cpu(), direction
        else:
            sign = torch.einsum("bs,bsp->bp", (right - wrong) / 2, self.tokens.float())
            prompt, position = sign.nonzero(as_tuple=True)
            delta = sign[prompt, position][:, None] * direction[prompt]
        every = torch.cat([prompt + block * n for block in range(self.blocks)])
        return [Push(self._hook(self.part, layer), every, position.repeat(self.blocks), head, delta.repeat(self.blocks, 1))]

    def _resumed(self, cells: Sequence[Sequence[Push]]) -> list[np.ndarray]:
        made = []
        for pushes in cells:
            start = min(int(push.position.min()) for push in pushes)
            layer = min(int(push.hook.split(".")[1]) for push in pushes)
            made.append(Cell(layer, "pre", start, None, {hook: _all(some, start) for hook, some in _by_hook(pushes).items()}))
        return run_cells(self.recorded, made, lambda logits, _: self._read(logits))

    def _naive(self, cells: Sequence[Sequence[Push]]) -> list[np.ndarray]:
        found = []
        for pushes in cells:
            hooks = [(hook, lambda x, hook, some=some: _all(some, 0)(x)) for hook, some in _by_hook(pushes).items()]
            with torch.no_grad():
                found.append(
                    self._read(
                        self.model.run_with_hooks(
                            self.wide, positions=self.positions.to(self.wide.inputs["input_ids"].device), fwd_hooks=hooks
                        )
                    )
                )
        return found

    def _read(self, logits: Tensor) -> np.ndarray:
        """Right label minus the best wrong one, nats, [batch]."""
        values = logits.float()
        return margins(answers_of(self.batch, values, values.logsumexp(-1), self.blocks).total, np.array(self.batch.answers))


def _scaled(push: Push, dose: float) -> Push:
    return Push(push.hook, push.prompt, push.position, push.head, push.delta * dose)


def _by_hook(pushes: Sequence[Push]) -> dict[str, list[Push]]:
    found: dict[str, list[Push]] = {}
    for push in pushes:
        found.setdefault(push.hook, []).append(push)
    return found


def _all(pushes: Sequence[Push], start: int) -> Callable[[Tensor], Tensor]:
    def edit(x: Tensor) -> Tensor:
        for push in pushes:
            x = push(x, start)
        return x

    return edit
