"""`direct_logits`: which parts of the model write the answer, counted in logits.

The logits are a linear function of the last token's stream once the final norm's scale is held at its value on this prompt, and the stream is a sum of what the
embeddings, the heads and the MLPs wrote. So each part's product with the direction "right label minus wrong label" is its direct part of the logit difference.

What this leaves out: a part that acts through later parts (all of an induction circuit's first half) shows nothing here; a large positive part may be undone by a
negative one (self-repair), so a part is no estimate of what its removal would cost: ablate for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechicl.analysis.feed import Data, batches, check_data, ids_of, progress_bar, provenance, rehearse, take
from mechicl.analysis.guarded import each_batch, guarded
from mechicl.analysis.kinds import KINDS, present
from mechicl.analysis.readout.sources import Sources
from mechicl.analysis.readout.unembedding import Unembedding, first_tokens, soft_cap
from mechicl.analysis.readout.written import Written, aligned, check_by, last_positions, order
from mechicl.analysis.statistics import bootstrap_interval, mean_estimate
from mechicl.errors import EpisodeError, NotFiniteError, OptionError
from mechicl.prompts.batch import Batch
from mechicl.prompts.corrupt import permute_labels
from mechicl.prompts.episode import Episode
from mechicl.results import Estimate, LogitAttribution, Skipped

Split = Literal["component", "layer", "span"]
CONTROL = "the exemplars' labels permuted"


@guarded
def direct_logits(
    model: Any,
    data: Data,
    *,
    by: Split | str = "component",
    against: str = "best wrong",
    control: bool = True,
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> LogitAttribution:
    """Each part's direct share of the right label's logit minus the wrong label's, at the query's last token.

    Args:
        model: A `HookedVLM`, or anything with the surface of `HookedModel`.
        data: A Batch, or episodes. Labels of several tokens count by their first: where it is the wrong label's too, the episode is left out.
        by: "component": embeddings, every head, every MLP; "layer": embeddings and every sublayer, for families too whose heads are not added as they are; "span": heads
            split by the kind of token they read (pattern times values times W_O, summed over a kind's tokens).
        against: "best wrong" (of each prompt, by the model's logits), "mean wrong" (of all wrong candidates), or a label.
        control: Run the same with the exemplars' labels permuted. The answer stays what it was, so a part that follows the examples loses its share (where only two
            exemplars can change places, it turns its sign); a part that keeps it likes the label for another reason.
        seed: Decides the permutation and the bootstrap.
        batch_size: Prompts per forward pass.
        task: What the data are, for the record.
        progress: Show a bar.

    Returns:
        LogitAttribution. The parts add up to `total` up to `residue`. In half precision the model rounds its own stream, and the residue is that rounding.

    Raises:
        UnsupportedModelError: heads are not summands of the stream (post-norms, gates), or the logits are no linear function of the normed stream.
        OptionError: an unknown `by` or `against`.
        EpisodeError: no data, or none whose labels differ in their first token.
        NotFiniteError: a logit is NaN or infinite.

    Source:
        Elhage et al. 2021, Wang et al. 2023 (direct logit attribution). The split by source token: ours, after Elhage's path expansion.
    """
    check_data(data, batch_size)
    if by not in ("component", "layer", "span"):
        raise OptionError(f"by must be component, layer or span; got {by!r}. Pick one.")
    check_by(model, "layer" if by == "layer" else "component")
    rehearse(model, data)
    kept, skipped = comparable_labels(model, data, against, batch_size)
    data, names = take(data, kept), [ids_of(data)[i] for i in kept]
    run = _run(model, data, by, against, batch_size, names, progress, "attributing logits")
    null = _permuted(model, data, by, against, batch_size, seed, progress) if control else "it was not asked for"
    notes = ["Logits are taken before the soft-capping that the model ends with."] if soft_cap(model) is not None else []
    blank = np.full(run.value.shape[1:], np.nan)
    null_mean, null_low, null_high, null_total = blank, blank, blank, Estimate(np.nan, np.nan, np.nan, 0, "logits", "bootstrap 95 %")
    if isinstance(null, str):
        notes.append(f"No control: {null}.")
    else:
        both = null.reorder(run.names, run.spans)
        null_mean, (null_low, null_high) = both.mean(0), bootstrap_interval(both, seed=seed)
        null_total = mean_estimate(null.total, unit="logits", seed=seed)
    low, high = bootstrap_interval(run.value, seed=seed)
    return LogitAttribution(
        by=by, against=against, components=run.names, spans=run.spans, value=run.value.mean(0), low=low, high=high, null=null_mean, null_low=null_low,
        null_high=null_high, per_episode=run.value, total=mean_estimate(run.total, unit="logits", seed=seed), null_total=null_total,
        residue=float(np.abs(run.value.reshape(len(kept), -1).sum(1) - run.total).max()), control=CONTROL, n=len(kept), skipped=skipped,
        provenance=provenance(model, task=task, seed=seed, options={"by": by, "against": against, "batch_size": batch_size}), notes=tuple(notes),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Found:
    """Parts of every episode, [batch, component(, span)], and the logit difference itself [batch]."""

    names: tuple[str, ...]
    spans: tuple[str, ...]
    value: np.ndarray
    total: np.ndarray

    def reorder(self, names: Sequence[str], spans: Sequence[str]) -> np.ndarray:
        """The values under these names; zero where there is no such part."""
        out = np.zeros((len(self.value), len(names), *((len(spans),) if spans else ())))
        for i, name in enumerate(names):
            if name not in self.names:
                continue
            row = self.value[:, self.names.index(name)]
            for j, span in enumerate(spans):
                out[:, i, j] = row[:, self.spans.index(span)] if span in self.spans else 0.0
            if not spans:
                out[:, i] = row
        return out


def _first(ids: Sequence[Sequence[int]]) -> list[int]:
    return [one[0] for one in ids]


def comparable_labels(model: Any, data: Data, against: str, batch_size: int) -> tuple[list[int], tuple[Skipped, ...]]:
    """Episodes whose right label begins with another token than the wrong one it is compared with; the others, each with its reason.

    Raises:
        EpisodeError, OptionError: none is left.
    """
    kept: list[int] = []
    skipped: list[Skipped] = []
    names, at = ids_of(data), 0
    for batch in batches(model, data, batch_size):
        for labels, ids, answer in zip(batch.candidates, batch.candidate_ids, batch.answers, strict=True):
            first = _first(ids)
            rivals = {t for k, t in enumerate(first) if k != answer and (against in ("best wrong", "mean wrong") or labels[k] == against)}
            if not rivals:
                reason = f"{against!r} is the answer" if labels[answer] == against else f"{against!r} is no candidate"
                skipped.append(Skipped(names[at], reason))
            elif first[answer] in rivals:
                skipped.append(Skipped(names[at], f"the right label {labels[answer]!r} begins with the same token as a wrong one"))
            else:
                kept.append(at)
            at += 1
    if not kept:
        hint = "Draw labels that begin differently."
        if against not in ("best wrong", "mean wrong"):
            raise OptionError(f'against must be "best wrong", "mean wrong" or a label of the data; got {against!r} ({skipped[0].reason}). Name one that is a wrong candidate.')  # fmt: skip
        raise EpisodeError(f"labels must differ in their first token; none of {len(skipped)} episodes does ({skipped[0].reason}). {hint}")
    return kept, tuple(skipped)


def _permuted(model: Any, data: Data, by: str, against: str, batch_size: int, seed: int, progress: bool) -> _Found | str:
    """The same parts with the exemplars' labels dealt out anew; a reason where that cannot be done."""
    episodes: Sequence[Episode] = data.episodes if isinstance(data, Batch) else data
    if not episodes:
        return "the batch does not know its episodes"
    shuffled = []
    for k, episode in enumerate(episodes):
        try:
            shuffled.append(permute_labels(episode, seed=seed + k))
        except EpisodeError:  # one label only: nothing to permute
            continue
    if not shuffled:
        return "no episode has two labels to permute"
    renderer = data.renderer if isinstance(data, Batch) else None
    again: Data = shuffled if renderer is None else renderer.render(shuffled)
    return _run(model, again, by, against, batch_size, ids_of(again), progress, "the same, labels permuted")


@torch.no_grad()
def _run(model: Any, data: Data, by: str, against: str, batch_size: int, names: Sequence[str], progress: bool, what: str) -> _Found:
    head = Unembedding(model)

    def work(batch: Batch, rows: range) -> tuple[tuple[str, ...], Tensor, np.ndarray, dict[str, Tensor], list[str]]:
        written = Written(model, last_positions(batch), by="layer" if by == "layer" else "component")
        sources = Sources(model, batch) if by == "span" else None
        if sources is None:
            logits: Tensor | None = model.run_with_hooks(batch, fwd_hooks=written.hooks)[:, 0]
        else:
            with model.hooks(fwd_hooks=[*written.hooks, *sources.hooks]):
                model.attention_rows(batch, reduce=sources.keep)
            logits = None if rows.start else model(batch)[:, 0]
        found = written.parts()
        stream = found.stream[:, 0]
        if logits is not None:
            head.check(stream, logits)
        tokens, _ = first_tokens(batch.candidate_ids)
        weights = _weights(batch, head.logits(stream[:, None], tokens)[:, 0], against)
        toward = torch.einsum("bl,blm->bm", weights, head.directions(tokens)) / head.norm.scale(stream)
        constant = (weights * head.constants(tokens)).sum(1)
        value = torch.einsum("bpm,bm->bp", found.value[:, 0], toward)
        part_names, value = _with_constant(found.names, value, constant)
        total = torch.einsum("bm,bm->b", stream, toward) + constant
        if not bool(torch.isfinite(total).all()):
            bad = [names[rows[int(i)]] for i in (~torch.isfinite(total)).nonzero()[:5, 0]]
            raise NotFiniteError(f"logits must be finite; got NaN or infinity in episodes {', '.join(bad)}. Use float32 or bfloat16.")
        split = sources.toward(toward) if sources is not None else {}
        return part_names, value.cpu(), total.cpu().double().numpy(), split, present([sources.masks]) if sources is not None else []

    bar = progress_bar(None, total=len(data), what=what, show=progress)
    done = list(each_batch(model, data, batch_size, work, done=bar.update))
    bar.close()
    every = order([name for some, *_ in done for name in some])
    values = torch.cat([aligned(some, every, value, 1) for some, value, *_ in done]).double().numpy()
    kinds = {kind for *_, some in done for kind in some}
    spans = tuple(kind for kind in KINDS if kind in kinds)
    if by == "span":
        values = _by_span(values, every, spans, [split for *_, split, _ in done])
    return _Found(tuple(every), spans, values, np.concatenate([total for _, _, total, *_ in done]))


def _with_constant(names: tuple[str, ...], value: Tensor, constant: Tensor) -> tuple[tuple[str, ...], Tensor]:
    """The part that no stream changes, counted with the biases."""
    if not bool((constant != 0).any()):
        return names, value
    if "biases" not in names:
        return (*names, "biases"), torch.cat([value, constant[:, None]], 1)
    value = value.clone()
    value[:, names.index("biases")] += constant
    return names, value


def _by_span(values: np.ndarray, names: Sequence[str], spans: Sequence[str], splits: Sequence[dict[str, Tensor]]) -> np.ndarray:
    """[batch, component, span]: heads split, everything else in the last token's column."""
    out = np.zeros((*values.shape, len(spans)))
    for i, name in enumerate(names):
        if name in splits[0]:
            out[:, i] = torch.cat([one[name] for one in splits])[:, [KINDS.index(span) for span in spans]].double().numpy()
        else:
            out[:, i, list(spans).index("last token")] = values[:, i]
    return out


def _weights(batch: Batch, logits: Float[Tensor, "batch label"], against: str) -> Float[Tensor, "batch label"]:
    """How much each candidate counts: 1 for the right one, minus one altogether for the wrong ones."""
    weights = torch.zeros_like(logits)
    for i, (labels, ids, answer) in enumerate(zip(batch.candidates, batch.candidate_ids, batch.answers, strict=True)):
        first = _first(ids)
        wrong = [k for k, token in enumerate(first) if k != answer and token not in first[:k]]
        if against == "best wrong":
            wrong = [max(wrong, key=lambda k, i=i: float(logits[i, k]))]
        elif against != "mean wrong":
            wrong = [labels.index(against)]
        weights[i, wrong] = -1.0 / len(wrong)
        weights[i, answer] = 1.0
    return weights
