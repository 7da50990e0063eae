"""How probable each candidate label is after a prompt, with any heads switched off: the forward passes behind accuracy and ablation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mechicl.analysis.ablation.switches import Switches
from mechicl.analysis.feed import Data, Spreads, batches, labels_of, progress_bar, take
from mechicl.analysis.guarded import each_batch
from mechicl.errors import NotFiniteError, OptionError
from mechicl.models.pictures import pictures_once
from mechicl.models.resuming.lower import lower_layers_once
from mechicl.prompts.batch import Batch

LabelScore = Literal["full", "mean_token", "first_token"]
"""What decides between candidates: the log-probability of the whole label (the probability that the model says it), the same per token (which does not
favour short labels), or the first token's alone (which cannot tell labels apart that begin alike, but needs one prompt instead of one per candidate)."""

TIE = 1e-5
"""Nats. Labels closer than this are tied: sums of float32 log-probabilities differ by as much from the order of addition."""

SPARED = 8.0
"""Forward passes that leaving out unchanged layers must spare, before it is tried whether a model can be run so (some short passes)."""


@dataclass(frozen=True, eq=False)
class Answers:
    """Log-probabilities in nats, [batch, label] (-inf where a prompt has fewer candidates), and the greedy first token over the whole vocabulary."""

    total: np.ndarray
    per_token: np.ndarray
    first: np.ndarray
    greedy: np.ndarray

    def deciding(self, score: LabelScore) -> np.ndarray:
        """The numbers that decide between candidates."""
        return {"full": self.total, "mean_token": self.per_token, "first_token": self.first}[score]

    @staticmethod
    def join(parts: Sequence[Answers]) -> Answers:
        """One after the other; candidates beyond a part's own are -inf."""
        width = max(part.total.shape[1] for part in parts)

        def wide(x: np.ndarray) -> np.ndarray:
            return np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=-np.inf)

        columns = {name: np.concatenate([wide(getattr(part, name)) for part in parts]) for name in ("total", "per_token", "first")}
        return Answers(**columns, greedy=np.concatenate([part.greedy for part in parts]))


def check_score(score: str) -> None:
    """Raises OptionError for a score that does not exist."""
    if score not in get_args(LabelScore):
        raise OptionError(f"score must be one of {', '.join(get_args(LabelScore))}; got {score!r}. full is the primary.")


def indistinct(batch: Batch) -> list[str]:
    """For each prompt why its candidates cannot be compared by whole labels; "" where they can.

    A label whose tokens begin another's is always the more probable of the two, whatever the model thinks, because nothing ends it.
    """
    reasons = []
    for names, ids in zip(batch.candidates, batch.candidate_ids, strict=True):
        pair = next(((a, b) for a, x in enumerate(ids) for b, y in enumerate(ids) if a != b and y[: len(x)] == x), None)
        reasons.append(
            ""
            if pair is None
            else f"candidate {names[pair[0]]!r} is the beginning of {names[pair[1]]!r}, so its probability includes the other's"
        )
    return reasons


def n_blocks(batch: Batch, score: LabelScore) -> int:
    """How many copies of each prompt one scoring needs: one per candidate, or one when first tokens are all there is."""
    if score == "first_token" or all(len(ids) == 1 for row in batch.candidate_ids for ids in row):
        return 1
    return max(len(row) for row in batch.candidate_ids)


def widen(batch: Batch, blocks: int) -> Batch:
    """Block j: every prompt followed by its candidate j, less the candidate's last token, which predicts nothing that is asked."""
    if blocks == 1:
        return batch
    return batch.repeat(blocks).append([_ids(batch, i, j)[:-1] for j in range(blocks) for i in range(batch.n)])


def _ids(batch: Batch, row: int, j: int) -> tuple[int, ...]:
    """Candidate j of a prompt; the first one again where there are fewer."""
    ids = batch.candidate_ids[row]
    return ids[j] if j < len(ids) else ids[0]


Hooks = Sequence[tuple[str, Callable[..., Any]]]


@torch.no_grad()
def label_logprobs(
    model: Any,
    batch: Batch,
    *,
    score: LabelScore = "full",
    copies: int = 1,
    hooks: Hooks = (),
    names: Sequence[str] = (),
    wide: Batch | None = None,
    share: bool = True,
) -> list[Answers]:
    """Score the candidates of every prompt, all in one forward pass.

    Args:
        model: Anything with the surface of `HookedModel`.
        batch: The prompts.
        score: Whether whole labels are needed, or first tokens will do.
        copies: How many times, one after the other along the batch; `hooks` may treat the copies differently (row // (rows / copies) is the copy).
        hooks: (hook name, function), active during the pass.
        names: What to call the prompts in errors.
        wide: `widen(batch, n_blocks(batch, score))`, where the caller has it already.
        share: Run each prompt once for all its candidates, where the model can; `hooks` then see prompts and candidates in two passes.

    Returns:
        One `Answers` per copy.

    Raises:
        NotFiniteError: logits are NaN or infinite at an asked position; names the prompts.
    """
    blocks = n_blocks(batch, score)
    wide = widen(batch, blocks) if wide is None else wide
    length = max(len(ids) for row in batch.candidate_ids for ids in row) if blocks > 1 else 1
    with model.hooks(fwd_hooks=list(hooks)):
        logits = _shared(model, batch, blocks, copies) if share and blocks > 1 else None
        if logits is None:
            positions = (wide.query_pos[:, None] + torch.arange(length)).clamp_max(wide.n_pos - 1)
            logits = model(wide if copies == 1 else wide.repeat(copies), positions=positions.repeat(copies, 1))
    found = []
    for copy in logits.split(batch.n * blocks):
        values = copy.float()
        normaliser = values.logsumexp(-1)
        bad = ~torch.isfinite(normaliser).reshape(blocks, batch.n, -1).all(-1).all(0)
        if bool(bad.any()):
            rows: list[int] = bad.nonzero()[:, 0].tolist()
            who = ", ".join(names[i] if i < len(names) else str(i) for i in rows[:5])
            raise NotFiniteError(
                f"logits must be finite; got NaN or infinity in episodes {who}. Use float32 or bfloat16, and check the weights."
            )
        found.append(answers_of(batch, values, normaliser, blocks))
    return found


def _shared(model: Any, batch: Batch, blocks: int, copies: int) -> Tensor | None:
    """Logits [copies * blocks * batch, length, vocab] with every prompt run once; None where the model cannot."""
    continue_prompts = getattr(model, "continue_prompts", None)
    if continue_prompts is None:
        return None
    found = continue_prompts(batch, [[_ids(batch, i, j) for j in range(blocks)] for i in range(batch.n)], copies)
    return None if found is None else found.flatten(0, 2)


def can_share(model: Any, data: Data) -> bool:
    """Whether the model can run a prompt once for all its candidates, tried on the first one."""
    if getattr(model, "continue_prompts", None) is None:
        return False
    batch = next(batches(model, take(data, [0]), 1))
    blocks = n_blocks(batch, "full")
    return blocks == 1 or _shared(model, batch, blocks, 1) is not None


def answers_of(batch: Batch, logits: Tensor, normaliser: Tensor, blocks: int) -> Answers:
    """logits [blocks * batch, length, vocab] -> log-probabilities of the candidates."""
    n, length, width = batch.n, logits.shape[1], max(len(row) for row in batch.candidate_ids)
    tokens, known = torch.zeros(width, n, length, dtype=torch.long), torch.zeros(width, n, length, dtype=torch.bool)
    for i, row in enumerate(batch.candidate_ids):
        for j, ids in enumerate(row):
            tokens[j, i, : len(ids)], known[j, i, : len(ids)] = torch.tensor(ids[:length]), True
    logprobs = logits.reshape(blocks, n, length, -1)
    picked = logprobs.expand(width, -1, -1, -1).gather(-1, tokens.to(logits.device)[..., None])[..., 0]
    steps = (picked - normaliser.reshape(blocks, n, length)).cpu().double().masked_fill(~known, 0.0)
    count = known.sum(-1)
    total = steps.sum(-1).masked_fill(count == 0, -torch.inf).T.numpy()
    first = steps[..., 0].masked_fill(count == 0, -torch.inf).T.numpy()
    return Answers(total, total / count.clamp_min(1).T.numpy(), first, logits[:n, 0].argmax(-1).cpu().numpy())


@dataclass(frozen=True, eq=False)
class Key:
    """What the answers are marked against: index of the right candidate, number of candidates, first tokens of each and of the context's labels."""

    answers: np.ndarray
    candidates: tuple[tuple[str, ...], ...]
    first_tokens: tuple[tuple[int, ...], ...]
    context_tokens: tuple[frozenset[int], ...]

    @staticmethod
    def of(batch: Batch) -> Key:
        """The key of a batch."""
        first = tuple(tuple(ids[0] for ids in row) for row in batch.candidate_ids)
        context = tuple(
            frozenset(first[i][names.index(label)] for label in labels if label in names)
            for i, (names, (labels, _)) in enumerate(zip(batch.candidates, labels_of(batch), strict=True))
        )
        return Key(np.array(batch.answers), batch.candidates, first, context)

    @staticmethod
    def join(parts: Sequence[Key]) -> Key:
        """One after the other."""
        return Key(
            np.concatenate([part.answers for part in parts]), sum((part.candidates for part in parts), ()),
            sum((part.first_tokens for part in parts), ()), sum((part.context_tokens for part in parts), ()),
        )  # fmt: skip


def predict(values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Index of the most probable candidate, ties broken by a seeded coin (the same for the same episode whatever is ablated), and which were ties.

    Args:
        values: [batch, label], -inf for no candidate.
        seed: Decides the coin.
    """
    best = values >= values.max(1, keepdims=True) - TIE
    coin = np.random.default_rng(seed).random(values.shape)
    return np.where(best, coin, -1.0).argmax(1), best.sum(1) > 1


def margins(values: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Right label minus the best wrong one, nats, [batch]."""
    rows = np.arange(len(answers))
    wrong = values.copy()
    wrong[rows, answers] = -np.inf
    return values[rows, answers] - wrong.max(1)


def answer(
    model: Any,
    data: Data,
    *,
    score: LabelScore = "full",
    switches: Switches | None = None,
    batch_size: int = 8,
    names: Sequence[str] = (),
    what: str = "scoring labels",
    progress: bool = False,
) -> tuple[list[Answers], Key, list[str]]:
    """Score the candidates of all data, once for each set of heads that `switches` turns off (once as the model is, without).

    Episodes are rendered once, the vision tower sees a batch's pictures once (`models.pictures`), and layers below a set's first one run once where the sets
    are many (`models.resuming.lower`). As many sets as fit into `batch_size` prompts share a forward pass.

    Returns:
        One `Answers` per set; the key; for each episode why it cannot be scored ("" where it can).
    """
    switches = switches or Switches.none()
    if isinstance(model, Spreads):
        return model.answer(data, score=score, switches=switches, batch_size=batch_size, names=names, what=what, progress=progress)
    n, widest = len(data), max(len(row) for row in (data.candidates if isinstance(data, Batch) else [e.candidates for e in data]))
    share = switches.shareable and score != "first_token" and can_share(model, data)
    size = max(switches.least, batch_size // (1 if share or score == "first_token" else widest), 1)
    least = n // max(1, min(-(-n // size), n // switches.least))
    bar = progress_bar(None, total=n * len(switches.sets), what=what, show=progress)
    n_layers: int = model.cfg.n_layers if any(switches.sets) else 1
    first = [switches.first(k, n_layers) for k in range(len(switches.sets))]
    order = sorted(range(len(first)), key=first.__getitem__)
    passes = sum(first[k] for k in order[:-1]) / n_layers  # each begins where the one before it differed
    spares = -(-n // size) * passes >= SPARED

    def work(batch: Batch, rows: range) -> tuple[list[Answers], Key, list[str]]:
        blocks = n_blocks(batch, score)
        wide = widen(batch, blocks)
        most = batch_size if batch.n >= least else batch_size * batch.n // least  # memory ran out: sets that share a pass are fewer too
        together = max(1, most // (batch.n if share else wide.n))
        mine = names[rows.start : rows.stop]
        found: dict[int, Answers] = {}
        with pictures_once(model), lower_layers_once(model) as below:
            switches.see(model, wide, blocks)
            for start in range(0, len(order), together):
                group = order[start : start + together]
                below.same_below(first[group[0]] if spares else 0)
                hooks = switches.hooks(group)
                some = label_logprobs(model, batch, score=score, copies=len(group), hooks=hooks, names=mine, wide=wide, share=share)
                found |= zip(group, some, strict=True)
        return [found[k] for k in range(len(order))], Key.of(batch), [""] * batch.n if score == "first_token" else indistinct(batch)

    def done(count: int) -> None:
        bar.update(count * len(switches.sets))

    parts = list(each_batch(model, data, size, work, least=switches.least, done=done))
    bar.close()
    found = [Answers.join([part[0][k] for part in parts]) for k in range(len(switches.sets))]
    return found, Key.join([part[1] for part in parts]), [reason for part in parts for reason in part[2]]
