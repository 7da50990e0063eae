"""`logit_lens`: the residual stream after every layer, read as if it were the last.

What it cannot show: the final norm and the unembedding were trained for the last layer's stream only. Early layers may hold the answer in directions that the
unembedding does not read (a lens that sees nothing there is no evidence of absence; a trained probe or a tuned lens may see it), and the lens of an early layer is often
near the input token for no deeper reason than that the stream still is. Tokens that are not the last predict their own next token: a label's margin at a picture's
token says how far that token's stream points to the label, not that the model reads it there. What is read may be unused: patch to know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechicl.analysis.feed import Data, check_data, ids_of, progress_bar, provenance, rehearse, take
from mechicl.analysis.guarded import each_batch, guarded
from mechicl.analysis.kinds import KINDS, chosen_kinds, kind_masks, present
from mechicl.analysis.prompts import prompt_view
from mechicl.analysis.readout.direct_logits import comparable_labels
from mechicl.analysis.readout.unembedding import Unembedding, first_tokens
from mechicl.analysis.statistics import bootstrap_interval, holm, permutation_p
from mechicl.errors import NotFiniteError, OptionError
from mechicl.prompts.batch import Batch
from mechicl.results import LogitLens, PromptLens

Of = Literal["margin", "logprob", "rank"]
UNITS = {"margin": "logits", "logprob": "nats", "rank": "rank"}


@guarded
def logit_lens(
    model: Any,
    data: Data,
    *,
    of: Of | str = "margin",
    spans: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    prompt: int | None = None,
    top: int = 5,
    n_null: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> LogitLens:
    """How far the stream of each kind of token points to the right label, after every layer.

    Args:
        model: A `HookedVLM`, or anything with the surface of `HookedModel`.
        data: A Batch, or episodes. Labels of several tokens count by their first: where it is a wrong label's too, the episode is left out.
        of: "margin": the right label's logit minus the best wrong candidate's; "logprob": its log-probability over the vocabulary; "rank": its rank in the vocabulary, 1 the
            first. The last two read the whole vocabulary at every token asked for: name few spans on large models.
        spans: Kinds of tokens (`mechicl.analysis.kinds.KINDS`), picture tokens included; None: all that the prompts have. A kind of several tokens is averaged.
        layers: After which layers, -1 being the embeddings; None: all.
        prompt: Also read every token of this episode (its number in the data): margins, and the most probable tokens.
        top: How many of them.
        n_null: Draws of the null: in each, any candidate of an episode counts as its right label. None: enough for a corrected p of 0.05 (at least 2,000).
        seed: Decides draws and bootstrap.
        batch_size: Prompts per forward pass.
        task: What the data are, for the record.
        progress: Show a bar.

    Returns:
        LogitLens. At the last token after the last layer it is the model's own answer, up to `residue`.

    Raises:
        OptionError: an unknown `of`, `spans` or `layers`, or `prompt` is no number of an episode.
        EmptySpanError: no prompt has such a span.
        UnsupportedModelError: the logits are no linear function of the normed stream.
        EpisodeError: no data, or none whose labels differ in their first token.
        NotFiniteError: a logit is NaN or infinite.

    Source:
        nostalgebraist 2020 (the logit lens); on image tokens: Neo et al. 2024.
    """
    check_data(data, batch_size)
    if of not in get_args(Of):
        raise OptionError(f"of must be one of {', '.join(get_args(Of))}; got {of!r}. Pick one.")
    chosen = _layers(model, layers)
    if prompt is not None and not 0 <= prompt < len(data):
        raise OptionError(f"prompt must be the number of an episode, 0..{len(data) - 1}; got {prompt}. Leave it out for none.")
    rehearse(model, data)
    kept, skipped = comparable_labels(model, data, "best wrong", batch_size)
    shown = _prompt_lens(model, data, prompt, chosen, top, task) if prompt is not None else None
    data, names = take(data, kept), [ids_of(data)[i] for i in kept]
    values, known, answers, there, residue = _run(model, data, of, spans, chosen, batch_size, names, progress)
    per_episode = values[np.arange(len(values)), answers]
    low, high = bootstrap_interval(per_episode, seed=seed)
    n_null = max(2000, 40 * per_episode[0].size) if n_null is None else n_null
    null, p = _null(values, known, per_episode, of, n_null, seed)
    notes = [] if shown is not None or prompt is None else ["No prompt is shown: the batch does not know its episodes."]
    options = {"of": of, "spans": list(there), "layers": list(chosen), "n_null": n_null, "batch_size": batch_size}
    return LogitLens(
        of=of, unit=UNITS[of], layers=tuple(chosen), spans=tuple(there), value=_mean(per_episode), low=low, high=high, null=null[0], null_low=null[1],
        null_high=null[2], p=p, p_corrected=holm(p), per_episode=per_episode, residue=residue, n=len(kept), skipped=skipped,
        provenance=provenance(model, task=task, seed=seed, options=options), notes=tuple(notes), prompt=shown,
    )  # fmt: skip


def _layers(model: Any, layers: Sequence[int] | None) -> list[int]:
    every = range(-1, model.cfg.n_layers)
    chosen = list(every) if layers is None else sorted({int(layer) for layer in layers})
    if not chosen or chosen[0] < -1 or chosen[-1] >= model.cfg.n_layers:
        raise OptionError(
            f"layers must be in -1..{model.cfg.n_layers - 1}; got {list(layers or ())}. -1 is the embeddings, 0 the first layer."
        )
    return chosen


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over episodes; NaN where none has the span."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(0) / known.sum(0)


def _null(
    values: np.ndarray, known: np.ndarray, observed: np.ndarray, of: str, n_draws: int, seed: int
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Mean and central 95 % of the mean when a random candidate counts as right, and the share of draws at least as good as the truth.

    Args:
        values: [batch, label, layer, span], as if that candidate were right.
        known: [batch, label], which candidates there are.
        observed: [batch, layer, span].
        of: What is read; ranks are better low.
        n_draws: How many.
        seed: Decides them.
    """
    n, width = known.shape
    generator, sign = np.random.default_rng(seed), -1.0 if of == "rank" else 1.0
    flat, mean = values.reshape(n * width, -1), _mean(observed).ravel()
    there, better, draws = ~np.isnan(flat), np.zeros(flat.shape[1]), np.zeros((0, flat.shape[1]))
    for start in range(0, n_draws, 2000):
        size = min(2000, n_draws - start)
        coin = np.where(known, generator.random((size, n, width)), -1.0).argmax(-1)
        picked = (np.arange(width) == coin[..., None]).reshape(size, -1).astype(np.float64)
        with np.errstate(invalid="ignore"):
            some = (picked @ np.where(there, flat, 0.0)) / (picked @ there)
            better += (sign * some >= sign * mean - 1e-9).sum(0)
        draws = some if not start else draws  # the first ones are enough for the mean and its interval
    summary = np.full((3, flat.shape[1]), np.nan)
    alive = ~np.isnan(draws).all(0)
    if alive.any():
        summary[:, alive] = np.nanmean(draws[:, alive], 0), *np.nanquantile(draws[:, alive], (0.025, 0.975), axis=0)
    shape = observed.shape[1:]
    return (summary[0].reshape(shape), summary[1].reshape(shape), summary[2].reshape(shape)), permutation_p(mean, better, n_draws).reshape(
        shape
    )


@torch.no_grad()
def _run(
    model: Any,
    data: Data,
    of: str,
    spans: Sequence[str] | None,
    layers: Sequence[int],
    batch_size: int,
    names: Sequence[str],
    progress: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str], float]:
    """Values [batch, label, layer, span] as if each candidate were right; which candidates exist; the answers; the spans; the residue."""
    head = Unembedding(model)
    wanted: list[str] = list(KINDS) if spans is None else chosen_kinds(spans, KINDS)

    def work(batch: Batch, rows: range) -> _Read:
        masks = kind_masks(batch, sink="sink" in wanted and spans is not None)
        reader = _Reader(head, batch, torch.stack([masks[kind] for kind in wanted], 1), of)
        points = [(_point(layer), reader.at(layer)) for layer in layers]
        logits = model.run_with_hooks(batch, fwd_hooks=[*points, (_point(model.cfg.n_layers - 1), reader.end)])[:, 0]
        head.check(reader.last, logits)
        theirs = logits.float().gather(1, reader.tokens.to(logits.device))
        mine = head.capped(head.logits(reader.last[:, None], reader.tokens)[:, 0])
        bad = reader.bad | ~torch.isfinite(theirs).all(1).cpu()
        if bool(bad.any()):
            who = ", ".join(names[rows[int(i)]] for i in bad.nonzero()[:5, 0])
            raise NotFiniteError(f"logits must be finite; got NaN or infinity in episodes {who}. Use float32 or bfloat16.")
        values = torch.stack([reader.values[layer] for layer in layers], 2).double().numpy()
        return _Read(values, reader.known.numpy(), np.array(batch.answers), set(present([masks])), float((theirs - mine).abs().max()))

    bar = progress_bar(None, total=len(data), what="reading the stream", show=progress)
    found = list(each_batch(model, data, batch_size, work, done=bar.update))
    bar.close()
    there = {kind for one in found for kind in one.kinds}
    kinds = [kind for kind in wanted if kind in there] if spans is None else chosen_kinds(wanted, [k for k in KINDS if k in there])
    width, columns = max(one.values.shape[1] for one in found), [wanted.index(kind) for kind in kinds]
    pads = [(0, width - one.values.shape[1]) for one in found]
    values = np.concatenate(
        [np.pad(one.values, ((0, 0), pad, (0, 0), (0, 0)), constant_values=np.nan) for one, pad in zip(found, pads, strict=True)]
    )
    known = np.concatenate([np.pad(one.known, ((0, 0), pad)) for one, pad in zip(found, pads, strict=True)])
    return values[..., columns], known, np.concatenate([one.answers for one in found]), kinds, max(one.residue for one in found)


@dataclass(frozen=True, eq=False)
class _Read:
    """One batch: `values` [batch, label, layer, span], `known` [batch, label], `answers` [batch]; which kinds of tokens its prompts have; its residue."""

    values: np.ndarray
    known: np.ndarray
    answers: np.ndarray
    kinds: set[str]
    residue: float


def _point(layer: int) -> str:
    """The hook point of the stream after a layer."""
    return "blocks.0.hook_resid_pre" if layer < 0 else f"blocks.{layer}.hook_resid_post"


class _Reader:
    """Reads the stream where hooks pass it by, and keeps one number per candidate and kind of token.

    `masks` [batch, span, pos]. `values[layer]` [batch, label, span]: what is read if that candidate is the right one.
    """

    def __init__(self, head: Unembedding, batch: Batch, masks: Bool[Tensor, "batch span pos"], of: str) -> None:
        self.head, self.of, self.batch = head, of, batch
        self.tokens, self.known = first_tokens(batch.candidate_ids)
        self.read = masks.any(1)
        self.weights = masks.float() / masks.sum(-1, keepdim=True)  # NaN where a prompt has no such token
        self.bad = torch.zeros(batch.n, dtype=torch.bool)
        self.values: dict[int, Float[Tensor, "batch label span"]] = {}
        self.last = torch.zeros(0)

    def at(self, layer: int) -> Callable[..., None]:
        """The hook of one layer."""

        def hook(x: Tensor, hook: Any) -> None:
            each = torch.zeros(self.batch.n, self.tokens.shape[1], x.shape[1])
            rows, cols = self.read.nonzero(as_tuple=True)
            each[rows, :, cols] = self._values(x, rows, cols)
            self.bad |= (~torch.isfinite(each) & self.known[..., None]).flatten(1).any(1)
            each = each.masked_fill(~self.known[..., None], 0.0)
            self.values[layer] = torch.einsum("blp,bsp->bls", each, self.weights).masked_fill(~self.known[..., None], torch.nan)

        return hook

    def end(self, x: Tensor, hook: Any) -> None:
        """The last token's stream after the last layer."""
        self.last = x[torch.arange(len(x)), self.batch.query_pos.to(x.device)].float()

    def _values(self, x: Tensor, rows: Tensor, cols: Tensor) -> Float[Tensor, "n label"]:
        """What is read at the tokens (rows, cols) of x [batch, pos, d_model], for each candidate."""
        own = self.head.capped(self.head.logits(x.float(), self.tokens)).cpu()[rows, cols]
        tokens, known = self.tokens[rows], self.known[rows]
        if self.of == "margin":
            rival = (tokens[:, :, None] != tokens[:, None, :]) & known[:, None, :]  # [n, label, rival]
            return own - own[:, None, :].expand_as(rival).masked_fill(~rival, -torch.inf).amax(-1)
        out = torch.zeros_like(own)
        stream = x[rows.to(x.device), cols.to(x.device)].float()
        for part, logits in self.head.every(stream):
            mine = logits.gather(1, tokens[part].to(logits.device))
            if self.of == "logprob":
                out[part] = (mine - logits.logsumexp(-1, keepdim=True)).cpu()
            else:
                above = torch.stack([(logits > mine[:, k, None]).sum(-1) for k in range(mine.shape[1])], 1)
                level = torch.stack([(logits == mine[:, k, None]).sum(-1) for k in range(mine.shape[1])], 1)
                out[part] = (above + (level + 1) / 2).float().cpu()  # tied tokens share their ranks' mean
        return out


@torch.no_grad()
def _prompt_lens(model: Any, data: Data, prompt: int, layers: Sequence[int], top: int, task: str) -> PromptLens | None:
    """Every token of one episode; None where the data are a batch that does not know its episodes."""
    episodes = data.episodes if isinstance(data, Batch) else data
    if not episodes:
        return None
    episode = episodes[prompt]
    head, batch = Unembedding(model), model.render([episode])
    reader = _Reader(head, batch, torch.ones(1, 1, batch.n_pos, dtype=torch.bool), "margin")
    margins: dict[int, Tensor] = {}
    best: dict[int, tuple[Tensor, Tensor]] = {}

    def at(layer: int) -> Callable[..., None]:
        def hook(x: Tensor, hook: Any) -> None:
            rows = torch.zeros(x.shape[1], dtype=torch.long)
            margins[layer] = reader._values(x, rows, torch.arange(x.shape[1]))[:, batch.answers[0]]
            pieces = [logits.softmax(-1).topk(min(top, logits.shape[-1]), dim=-1) for _, logits in head.every(x[0].float())]
            best[layer] = torch.cat([piece.values for piece in pieces]).cpu(), torch.cat([piece.indices for piece in pieces]).cpu()

        return hook

    logits = model.run_with_hooks(batch, fwd_hooks=[(_point(layer), at(layer)) for layer in layers])[0, 0]
    first = torch.tensor([ids[0] for ids in batch.candidate_ids[0]])
    predicted = batch.candidates[0][int(logits.cpu()[first].argmax())]
    view = prompt_view(model, episode, (), predicted=predicted, task=task)
    words = {int(t): word(model, int(t)) for layer in layers for t in best[layer][1].unique()}
    return PromptLens(
        view=view, margin=torch.stack([margins[layer] for layer in layers]).double().numpy(),
        tokens=tuple(tuple(tuple(words[int(t)] for t in row) for row in best[layer][1]) for layer in layers),
        probability=torch.stack([best[layer][0] for layer in layers]).double().numpy(),
    )  # fmt: skip


def word(model: Any, token: int) -> str:
    """A token as text; for toys the vocabulary's word, or the label."""
    tokenizer = getattr(getattr(model, "processor", None), "tokenizer", None)
    if tokenizer is not None:
        return str(tokenizer.decode([token]))
    if getattr(model.cfg, "inputs", "") == "vectors":
        return f"l{token}"
    vocabulary = getattr(getattr(model, "_renderer", None), "vocabulary", None)
    if vocabulary is None or not hasattr(vocabulary, "n_items"):
        return str(token)
    if token < 2:
        return ("<pad>", "<bos>")[token]
    return f"i{token - 2}" if token < 2 + vocabulary.n_items else f"l{token - 2 - vocabulary.n_items}"
