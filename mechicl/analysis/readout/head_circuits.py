"""`head_circuits`: what chosen heads move (OV) and what they look for (QK), from weights and on prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from mechicl.analysis.feed import Data, batches, check_data, comparable, provenance, rehearse, take
from mechicl.analysis.guarded import guarded
from mechicl.analysis.prompts import prompt_view
from mechicl.analysis.readout.copying import copying
from mechicl.analysis.readout.head_reading import HeadReading, attention_scale
from mechicl.analysis.readout.qk_match import MOST, Keys, matches
from mechicl.analysis.readout.unembedding import first_tokens
from mechicl.analysis.readout.written import By, check_by
from mechicl.errors import OptionError, UnsupportedModelError
from mechicl.models.hooked import check_heads
from mechicl.prompts.batch import Batch
from mechicl.results import Copying, Head, HeadCircuits, PromptView, Skipped

AGREE = 1e-2
"""Gap between score differences taken apart here and those of the model's attention, as a share of the scores, above which it is said that they have other terms."""


@guarded
def head_circuits(
    model: Any,
    heads: Sequence[Head],
    data: Data | None = None,
    *,
    keys: Keys | str = "label",
    by: By | str = "component",
    sources: bool = False,
    fold: bool = True,
    n_random: int = 200,
    most: int = MOST,
    prompt: int | None = None,
    seed: int = 0,
    batch_size: int = 4,
    task: str = "",
    progress: bool = True,
) -> HeadCircuits:
    """The OV and QK circuits of heads.

    OV: the copying score over the vocabulary, and with data over the labels' first tokens alone, beside random matrices of the head's shape and other heads of the model.
    QK (with data): the difference of the last token's score on right minus wrong exemplars, by what wrote the query and what wrote the keys.

    Args:
        model: A `HookedVLM`, or anything with the surface of `HookedModel`.
        heads: (layer, head) pairs, counted from 0. Query heads of a group share keys and values.
        data: A Batch, or episodes whose exemplars show the right label and a wrong one; others are left out and named.
        keys: Where an exemplar's key is read: "label", "close" (the template's tokens after it), "image" or "text".
        by: Parts of the streams: "component" (embeddings, heads, MLPs) or "layer" (sublayers: for families whose heads are not added as they are).
        sources: Split every head's part further by what it read (`mechicl.analysis.readout.sources.GROUPS`): "0.1 own item" in a key is what head 0.1 carried from the exemplar's
            own picture (or text) to it, in the query what it carried from the query's.
        fold: OV only: multiply the norms' weights into the matrices.
        n_random: Random matrices for the null of OV.
        most: Rows and columns of a QK table; smaller parts are added up as "rest".
        prompt: Also keep the scores of one episode (its number in the data) with every token, to be drawn on its pictures.
        seed: Decides random matrices and bootstrap.
        batch_size: Prompts per forward pass.
        task: What the data are, for the record.
        progress: Show a bar.

    Returns:
        HeadCircuits. Each table adds up to the score difference up to its `residue`. Its null deals right and wrong out anew over each episode's exemplars: mean zero, central
        95 % from the exact variance of the permutations.

    Raises:
        HeadIndexError: a head that the model does not have.
        OptionError: an option that does not exist, no heads, or `prompt` without data.
        UnsupportedModelError: heads are not summands of the stream (use by="layer"), or queries and keys are not turned by RoPE.
        EmptySpanError: exemplars without such keys.
        EpisodeError: no data, no shots, one class only.

    Source:
        Elhage et al. 2021 (circuits, composition). Parts of scores on prompts under frozen norms: ours, in the way of direct logit attribution.
    """
    chosen = list(dict.fromkeys(check_heads(model, heads)))
    if not chosen or n_random < 1 or most < 2:
        raise OptionError(
            f"heads, n_random and most must be at least one, 1 and 2; got {len(chosen)}, {n_random} and {most}. Name some heads."
        )
    if keys not in get_args(Keys):
        raise OptionError(f"keys must be one of {', '.join(get_args(Keys))}; got {keys!r}. Pick one.")
    if prompt is not None and (data is None or not 0 <= prompt < len(data)):
        raise OptionError(f"prompt must be the number of an episode of the data; got {prompt}. Give data, and count from 0.")
    notes: list[str] = []
    skipped: tuple[Skipped, ...] = ()
    kept: list[int] = []
    tables, labels, view, scores = {}, None, None, None
    if data is not None:
        check_data(data, batch_size)
        check_by(model, by)
        if sources and by != "component":
            raise OptionError(f'by must be "component" to split heads by what they read; got {by!r}. Leave sources out.')
        rehearse(model, data)
        view, scores = _scores_of(model, data, prompt, chosen, task) if prompt is not None else (None, None)
        kept, skipped = comparable(data)
        data = take(data, kept)
        tables, gap, unread = matches(
            model, data, chosen, keys=keys, by=by, sources=sources, batch_size=batch_size, most=most, seed=seed, progress=progress
        )
        if gap > AGREE:
            notes.append(
                f"The model's scores have terms beside q . k (a soft-cap or a bias of place), up to {gap:.0%} of the largest: tables explain q . k only."
            )
        if unread:
            notes.append(
                f"Heads {', '.join(f'{a}.{b}' for a, b in unread)} may not read all keys (a sliding window): tables count the scores of hidden keys too."
            )
        labels = _labels(model, data, batch_size)
    whole, few = _both(model, chosen, labels, fold, n_random, seed, notes)
    options = {
        "heads": [list(head) for head in chosen],
        "keys": keys,
        "by": by,
        "fold": fold,
        "n_random": n_random,
        "most": most,
        "batch_size": batch_size,
    }
    return HeadCircuits(
        heads=tuple(chosen), copying=whole, label_copying=few, matches=tables, folded=fold, n=len(kept), skipped=skipped,
        provenance=provenance(model, task=task, seed=seed, options=options), notes=tuple(notes), view=view, scores=scores,
    )  # fmt: skip


def _both(
    model: Any, heads: list[Head], labels: Tensor | None, fold: bool, n_random: int, seed: int, notes: list[str]
) -> tuple[Copying | None, Copying | None]:
    """Copying over the vocabulary and over the labels; None, with a note, where the model has no such circuit."""
    try:
        whole = copying(model, heads, fold=fold, n_random=n_random, seed=seed)
        few = None if labels is None else copying(model, heads, tokens=labels, fold=fold, n_random=n_random, seed=seed)
    except UnsupportedModelError as error:
        notes.append(f"No copying score: {error}")
        return None, None
    if getattr(model, "not_additive", ""):
        notes.append(f"Copying scores leave out what stands between heads and stream: {model.not_additive}.")
    return whole, few


def _labels(model: Any, data: Data, batch_size: int) -> Tensor:
    """First tokens of all candidates."""
    found = [first_tokens(batch.candidate_ids) for batch in batches(model, data, batch_size)]
    return torch.cat([tokens[known] for tokens, known in found]).unique()


@torch.no_grad()
def _scores_of(
    model: Any, data: Data, prompt: int, heads: Sequence[Head], task: str
) -> tuple[PromptView | None, dict[Head, np.ndarray] | None]:
    """One episode, and for each head the scores of its last token, and the mean of its query's picture's, with every earlier token."""
    episodes = data.episodes if isinstance(data, Batch) else data
    if not episodes:
        return None, None
    batch = model.render([episodes[prompt]])
    kept: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        kept[hook.name] = x[0].float().cpu()

    layers = sorted({layer for layer, _ in heads})
    with model.hooks(fwd_hooks=[(name, keep) for layer in layers for name in HeadReading.points(model, layer)]):
        model(batch)
    picture = batch.mask("image", shot=-1)[0].cpu()
    last, scores = int(batch.query_pos[0]), {}
    for layer, head in heads:
        q, k = (kept.get(f"blocks.{layer}.attn.hook_rot_{kind}", kept[f"blocks.{layer}.attn.hook_{kind}"]) for kind in "qk")
        own = torch.einsum("qd,kd->qk", q[:, head], k[:, head // (q.shape[1] // k.shape[1])]) * attention_scale(model, layer)
        rows = torch.full((2, batch.n_pos), torch.nan)
        rows[0, : last + 1] = own[last, : last + 1]
        if bool(picture.any()):
            first = int(picture.long().argmax())
            rows[1, :first] = own[picture][:, :first].mean(0)
        scores[layer, head] = rows.double().numpy()
    return prompt_view(model, episodes[prompt], (), task=task), scores
