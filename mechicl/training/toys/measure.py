"""What a toy training is measured by: accuracies on fixed probe sets, and what every head attends to there.

`attention_measures` is a pure function of a pattern, for hand-made ones too; `measure` runs a model on its probes. Columns are named
"accuracy_ic", and "{measure}_{layer}.{head}" for heads, layers and heads counted from 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from mechicl.analysis.heads import measures
from mechicl.data.gaussian import Draw, Layout, draw
from mechicl.models.toys.positions import draw_places
from mechicl.training.toys.feed import generator
from mechicl.training.toys.recipe import ToyRecipe

SPLITS = ("train", "ic", "ic2", "iw")


@dataclass(frozen=True, eq=False)
class Probe:
    """Sequences that a run is measured on, the same ones every time. `position_ids` [n, pos] where the position code has a random start."""

    draw: Draw
    position_ids: Tensor | None


def probes(recipe: ToyRecipe, cfg: Any, device: torch.device | str | None = None) -> dict[str, Probe]:
    """The probe sets of a recipe by split: "train", and METHODS A1's "ic", "ic2", "iw". Recipe, model configuration and seed decide them."""
    out = {}
    for split in SPLITS:
        source = generator(device, "probe", split, recipe.seed)
        drawn = draw(recipe.task, recipe.probe_n, source, split=split, device=device)
        out[split] = Probe(drawn, draw_places(cfg, recipe.probe_n, drawn.layout.n_pos, source))
    return out


def inputs_of(probe: Probe, rows: slice = slice(None)) -> dict[str, Tensor]:
    """What a toy's forward pass takes."""
    drawn = probe.draw
    out = {"inputs_embeds": drawn.tokens[rows]}
    out["attention_mask"] = torch.ones(out["inputs_embeds"].shape[:2], dtype=torch.long, device=drawn.tokens.device)
    if drawn.second is not None:
        out["second_values"] = drawn.second[rows]
        where = [*drawn.layout.second, *(() if drawn.layout.query_second is None else (drawn.layout.query_second,))]
        out["second_pos"] = torch.tensor(where, device=drawn.tokens.device)[None].expand(len(out["inputs_embeds"]), -1)
    if probe.position_ids is not None:
        out["position_ids"] = probe.position_ids[rows]
    return out


@torch.no_grad()
def measure(model: Any, sets: Mapping[str, Probe], *, chunk: int = 512) -> dict[str, float]:
    """All measures of a model.

    Args:
        model: A `ToyTransformer`, on the probes' device.
        sets: From `probes`.
        chunk: Sequences per forward pass.

    Returns:
        "loss" (nats) and "accuracy" on the training distribution; "accuracy_ic", "accuracy_ic2", "accuracy_iw"; "cla", "cla_ic", the share of
        predictions that are some label of the context (copying any is right with probability about B/N, so read it beside the accuracy); and,
        on the novel-class probe, `attention_measures` of every head.

    Source:
        Huang et al. 2026 (accuracies, CLA).
    """
    training = model.training
    model.eval()
    out: dict[str, float] = {}
    for split, probe in sets.items():
        drawn = probe.draw
        logits = torch.cat([_logits(model, probe, slice(i, i + chunk)) for i in range(0, len(drawn.target), chunk)])
        predicted = logits.argmax(-1)
        end = "" if split == "train" else f"_{split}"
        if split == "train":
            out["loss"] = float(functional.cross_entropy(logits, drawn.target))
        out[f"accuracy{end}"] = float((predicted == drawn.target).double().mean())
        if split in ("train", "ic"):
            out[f"cla{end}"] = float((predicted[:, None] == drawn.label).any(1).double().mean())
    out |= head_measures(model, sets["ic"], chunk=chunk)
    model.train(training)
    return out


def _logits(model: Any, probe: Probe, rows: slice) -> Tensor:
    drawn = probe.draw
    second = None if drawn.second is None else drawn.second[rows]
    place = None if probe.position_ids is None else probe.position_ids[rows]
    return model.classify(drawn.tokens[rows], second, place)


@torch.no_grad()
def head_measures(model: Any, probe: Probe, *, chunk: int = 512) -> dict[str, float]:
    """`attention_measures` of every head of a model, as "{measure}_{layer}.{head}"."""
    drawn = probe.draw
    everywhere = torch.arange(drawn.layout.n_pos, device=drawn.tokens.device)
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for i in range(0, len(drawn.target), chunk):
        rows = slice(i, i + chunk)
        for layer, pattern in enumerate(model.attention_rows(inputs_of(probe, rows), everywhere)):
            for name, value in per_sequence(pattern, drawn.layout, drawn.right[rows]).items():
                key = f"{name}_{layer}"
                totals[key] = totals.get(key, 0) + value.double().sum(0)
                counts[key] = counts.get(key, 0) + len(value)
    return {
        f"{key}.{head}": float(total[head]) / counts[key] if counts[key] else math.nan
        for key, total in totals.items()
        for head in range(len(total))
    }


def attention_measures(
    pattern: Float[Tensor, "batch head dest src"], layout: Layout, right: Bool[Tensor, "batch shot"]
) -> dict[str, Float[Tensor, " head"]]:
    """What the heads of one layer attend to, from their patterns.

    Args:
        pattern: Attention after the softmax, every position.
        layout: Where items, labels and the query stand.
        right: Slots whose label is the query's.

    Returns:
        "ph1": mean of A[t, t-1] over t >= 1 (with a second modality also "ph2", A[t, t-2] over t >= 2). "tila": mean of A[q, label] over right
        slots; "tiia" the same onto their items ("tiia1" and "tiia2" with a second modality). "tla": sum of A[q, label] over all slots. "ih": mean
        over right slots minus mean over wrong ones. "ila": attention of a label to its own item, first slot left out ("ila2": to its second
        item). Probabilities, mean over the sequences for which a measure exists: those without a right slot are left out of tila and tiia, those without a wrong
        one also of ih; NaN where none is left.

    Source:
        Huang et al. 2026 (PH, TILA, TIIA, TLA, IH), Reddy 2024 (ILA). Differs: TLA sums every label of the context; sequences without a wrong
        label are left out of IH instead of counting as zero; ILA leaves out the first slot.
    """
    return {name: value.mean(0) for name, value in per_sequence(pattern, layout, right).items()}


def per_sequence(
    pattern: Float[Tensor, "batch head dest src"], layout: Layout, right: Bool[Tensor, "batch shot"]
) -> dict[str, Float[Tensor, "kept head"]]:
    """`attention_measures` of each sequence; a measure that a sequence does not have leaves it out."""
    everywhere = torch.arange(layout.n_pos, device=pattern.device)
    reads = torch.ones(len(pattern), layout.n_pos, dtype=torch.bool, device=pattern.device)
    known = torch.ones_like(right)
    has_right, has_both = right.any(1), right.any(1) & (~right).any(1)
    label = _at(layout.label, pattern)
    last = pattern[:, :, layout.n_pos - 1]
    to_label = last[..., label]
    out = {"ph1": measures.back(pattern, everywhere, reads)}
    if layout.second:
        out["ph2"] = measures.back(pattern, everywhere, reads, k=2)
    out["tila"] = measures.tila(to_label[has_right], right[has_right])
    kinds = {"": layout.item} if not layout.second else {"1": layout.item, "2": layout.second}
    for end, where in kinds.items():
        items = _at(where, pattern)
        out[f"tiia{end}"] = measures.tila(last[..., items][has_right], right[has_right])
        own = pattern[:, :, label][..., items]
        out["ila2" if end == "2" else "ila"] = measures.ila(own, known)
    out["tla"] = measures.tla(to_label, known)
    out["ih"] = measures.induction_per_exemplar(to_label[has_both], right[has_both], ~right[has_both])
    return out


def _at(where: tuple[int, ...], like: Tensor) -> Int[Tensor, " shot"]:
    return torch.tensor(where, device=like.device)
