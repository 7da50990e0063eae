"""Heads' outputs at chosen tokens, split by what was read: pattern times values, summed over a kind's tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechicl.analysis.kinds import KINDS, kind_masks
from mechicl.prompts.batch import Batch
from mechicl.prompts.spans import QUERY, Span

GROUPS = ("own item", "own turn", "own label", "others", "elsewhere")
"""What a token of an exemplar (or of the query) may read: its exemplar's picture or text; what stands between that and the label (the question, the template's tokens);
the label and the template's tokens after it; all of these of other exemplars; anything else."""


class Sources:
    """Keeps z of the last token, split over `KINDS`, during one `attention_rows` run: give `hooks` to the model, `keep` as its reducer.

    Args:
        model: A hooked model.
        batch: The prompts that will run.
    """

    model: Any

    def __init__(self, model: Any, batch: Batch) -> None:
        self.model, self.masks = model, kind_masks(batch)
        self.values: dict[int, Tensor] = {}
        self.z: dict[int, Float[Tensor, "batch head span d_head"]] = {}

    @property
    def hooks(self) -> list[tuple[str, Callable[..., None]]]:
        """(hook name, function) for the forward pass: the values, until their layer's attention has been read."""
        names = [f"blocks.{layer}.attn.hook_v" for layer in range(self.model.cfg.n_layers)]
        return [(name, self._value) for name in names if name in self.model.hook_dict]

    def _value(self, v: Tensor, hook: Any) -> None:
        self.values[int(hook.name.split(".")[1])] = v.detach()

    def keep(self, layer: int, _: Tensor, rows: Float[Tensor, "batch head one src"]) -> None:
        """Sum one layer's rows over kinds. Query heads share values in groups."""
        values = self.values.pop(layer).float()
        kinds = torch.stack([self.masks[kind] for kind in KINDS], 1).to(rows.device)  # [batch, span, src]
        n_kv = values.shape[2]
        split = rows[:, :, 0, None].float() * kinds[:, None]  # [batch, head, span, src]
        grouped = split.unflatten(1, (n_kv, -1))
        self.z[layer] = torch.einsum("bgesk,bkgd->bgesd", grouped, values).flatten(1, 2)

    def toward(self, direction: Float[Tensor, "batch d_model"]) -> dict[str, Float[Tensor, "batch span"]]:
        """Each head's part along a direction of the stream, by kind: {"layer.head": [batch, span]}."""
        found = {}
        for layer, z in self.z.items():
            into = torch.einsum("hdm,bm->bhd", self.model.blocks[layer].attn.W_O.float(), direction)
            value = torch.einsum("bhsd,bhd->bhs", z, into).cpu()
            found |= {f"{layer}.{head}": value[:, head] for head in range(value.shape[1])}
        return found


def group_masks(batch: Batch, positions: Int[Tensor, "batch n"]) -> Bool[Tensor, "batch n group pos"]:
    """Which tokens are of which of `GROUPS`, for the token at each position."""
    masks = torch.zeros(*positions.shape, len(GROUPS), batch.n_pos, dtype=torch.bool)
    for i, row in enumerate(batch.spans):
        shot, kind = torch.full((batch.n_pos,), -9), torch.zeros(batch.n_pos, dtype=torch.long)
        turn, closing = None, None  # the exemplar whose turn is open; whose label has just been said
        for span in row:
            group, owner = _group(span, turn, closing)
            turn = span.shot if group in (1, 2) and span.shot >= QUERY else turn if group == 2 else None
            closing = owner if group == 3 else None
            shot[span.start : span.stop], kind[span.start : span.stop] = owner, group
        own = torch.where(positions[i] == int(batch.query_pos[i]), QUERY, shot[positions[i].cpu()])[:, None] == shot[None]
        parts = [own & (kind == group) for group in (1, 2, 3)]
        other = ~own & (kind >= 1) & (kind <= 3)
        masks[i] = torch.stack([*parts, other, (kind == 4).expand_as(own)], 1)
    return masks


def _group(span: Span, turn: int | None, closing: int | None) -> tuple[int, int]:
    """Number of a span's group (1 item, 2 turn, 3 label, 4 elsewhere, 0 nothing) and the exemplar it belongs to."""
    if span.role in ("pad", "answer"):
        return 0, -9
    if span.role in ("image", "text") and span.shot >= QUERY:
        return 1, span.shot
    if span.role == "question" and span.shot >= QUERY:
        return 2, span.shot
    if span.role == "label" and span.shot >= 0:
        return 3, span.shot
    if span.role == "glue" and closing is not None:
        return 3, closing
    if span.role == "glue" and turn is not None:
        return 2, turn
    return 4, -9


class Reads:
    """Keeps z of chosen tokens, split over `GROUPS`, during one `attention_rows` run: give `hooks` to the model, `keep` as its reducer.

    `split[layer]` [batch, n, head, group, d_head]; `rows[layer]` [batch, head, src], the first position's attention.
    """

    layers: list[int]

    def __init__(self, model: Any, batch: Batch, positions: Int[Tensor, "batch n"], layers: int) -> None:
        self.layers = [k for k in range(layers) if f"blocks.{k}.attn.hook_v" in model.hook_dict]
        self.masks = group_masks(batch, positions)
        self.values: dict[int, Tensor] = {}
        self.parts: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}
        self.rows: dict[int, Tensor] = {}

    @property
    def hooks(self) -> list[tuple[str, Callable[..., None]]]:
        """(hook name, function) for the forward pass."""
        return [(f"blocks.{layer}.attn.hook_v", self._value) for layer in self.layers]

    def _value(self, v: Tensor, hook: Any) -> None:
        self.values[int(hook.name.split(".")[1])] = v.detach()

    def keep(self, layer: int, _: Tensor, rows: Float[Tensor, "batch head n src"]) -> None:
        """One chunk of a layer's rows, in order."""
        values, parts = self.values[layer].float(), self.parts[layer]
        done = sum(part.shape[1] for part in parts)
        if not done:
            self.rows[layer] = rows[:, :, 0]
        masks = self.masks[:, done : done + rows.shape[2]].to(rows.device)
        grouped = (rows.float()[:, :, :, None] * masks[:, None]).unflatten(1, (values.shape[2], -1))
        parts.append(torch.einsum("bkenrs,bskd->bnkerd", grouped, values).flatten(2, 3))
        if done + rows.shape[2] == self.masks.shape[1]:
            del self.values[layer]

    def into(self, written: Any) -> None:
        """Hand the split to what was written."""
        written.split = {layer: (GROUPS, torch.cat(parts, 1)) for layer, parts in self.parts.items() if parts}
