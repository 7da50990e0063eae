"""`contrast_margin`: is the query nearer to the exemplars of its own label than to the others, head by head, and does that decide whether the answer is right?

Our definition of a contrastive margin; the paper's (Miyanishi and Nguyen 2024) could not be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from mechicl.analysis.feed import Data, check_data, comparable, ids_of, provenance, rehearse, take
from mechicl.analysis.guarded import guarded
from mechicl.analysis.heads.nulls import shuffled_null, shuffles
from mechicl.analysis.icl import usable
from mechicl.analysis.labels import LabelScore, answer, check_score, margins, predict
from mechicl.analysis.margin.read import READ, At, Distance, Keys, Nearness, Part, read_nearness
from mechicl.analysis.predictive import area_change, areas, best_held_out, spearman, why_no_auroc
from mechicl.analysis.statistics import bootstrap_interval, holm
from mechicl.errors import OptionError
from mechicl.results import ContrastMargin, Estimate, Head, MarginPart

BASELINE = "attention"
TOKENS = {
    "before": "the token before the label",
    "item": "the item's last token",
    "label": "the label",
    "close": "the tokens that close the turn",
}
QUERY_TOKENS = {"before": "the query's last token", "item": "the query's item's last token", "label": "any label put behind the query"}


@guarded
def contrast_margin(
    model: Any,
    data: Data,
    *,
    parts: Sequence[Part] = ("k", "v", "qk"),
    at: At = "before",
    keys: Keys = "label",
    distance: Distance = "cosine",
    score: LabelScore = "full",
    n_null: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> ContrastMargin:
    """Contrastive margin of every head: distance from the query's key (or value) to wrong-label exemplars minus to right-label ones, and the match q . k.

    A margin above nought says that the head holds the query nearer to exemplars of its own label. It need not have been learnt: where items of a class look
    alike, keys and values of an untrained network are alike too. What it is worth is told by `auroc`: does the margin of an episode tell whether the
    answer is right? Beside it stand the same for attention (right minus wrong), for the answer's own margin (the ceiling, 1 by construction) and for the
    model's confidence. AUROCs need right and wrong answers: make the task hard enough (more classes, one shot, `prompts.disturb` noise).

    Args:
        model: A toy or a production model with the surface of `HookedModel`.
        data: A Batch, or episodes, rendered a few at a time. Episodes without a right or a wrong exemplar are left out and named.
        parts: "k", "v": distances of keys (before RoPE, after any norm of keys) and values, per key/value head. "qk": q . k of the query's last token with
            the exemplars' `keys`, before RoPE and scaled as the model does, per query head; "rot_qk": the same after RoPE, the model's own score.
        at: Tokens that "k" and "v" compare. "before" (default): the last prompt token, which is to predict the answer, with the tokens that stood in the same
            place before each exemplar's label; they have seen their item and not their label, and every prompt has them. "item": the items' last tokens (in the
            bundled model a picture is gathered after it, at the template's tokens, so "before" says more). "label": the exemplars' labels with a label
            behind the query, the mean over all its candidates, which favours none; not for prompts of vectors.
        keys: Exemplar tokens that "qk" and attention read: "label" (default: what an induction head reads), "close" (the template's tokens after it), "before"
            or "item". Distances and matches are means over an exemplar's tokens, attention is their sum.
        distance: "cosine" (1 - cosine) or "euclidean".
        score: What decides whether an answer is right, see `icl_accuracy`.
        n_null: How often each episode's answer is drawn anew among its context's labels, for the null; None: enough for a corrected p of 0.05.
        seed: Of the null, intervals and ties.
        batch_size: Prompts per forward pass.
        task: What the data are, for the record.
        progress: Show a bar.

    Returns:
        ContrastMargin; `parts["attention"]` is the baseline. p is one-sided against answers drawn anew among the context's labels, corrected over the heads of a part (Holm).

    Raises:
        EpisodeError: no data, or no episode with a right and a wrong exemplar.
        OptionError: an option that does not exist.
        EmptySpanError: prompts without the tokens asked for.
        UnsupportedModelError: no layer has a part; vectors with at="label".
        NotFiniteError: NaN or infinity.

    Source:
        Our definition (see the module); what key-value distances have to do with helpful examples: Miyanishi and Nguyen 2024.
    """
    check_data(data, batch_size)
    _check_options(parts, at, keys, distance, n_null)
    check_score(score)
    kept, skipped = comparable(data)
    data = take(data, kept)
    rehearse(model, data)
    names = ids_of(data)
    found, key, reasons = answer(model, data, score=score, batch_size=batch_size, names=names, progress=progress)
    rows, unscored = usable(names, reasons)
    if len(rows) < len(data):
        data = take(data, [int(i) for i in rows])
    deciding, right = found[0].deciding(score)[rows], key.answers[rows]
    near = read_nearness(model, data, parts=parts, at=at, keys=keys, distance=distance, batch_size=batch_size, progress=progress)
    output, correct = margins(deciding, right), predict(deciding, seed)[0] == right
    shares = _shares(near)
    n_null = max(1999, 40 * model.cfg.n_layers * model.cfg.n_heads) if n_null is None else n_null
    margin = {name: _margins(near.parts[name], shares, name) for name in near.parts}
    attention = best_held_out(margin[BASELINE], correct)[2]
    made = {
        name: _part(name, near, margin[name], correct, output, attention, n_null, seed, _words(name, at, keys, distance))
        for name in near.parts
        if not np.isnan(margin[name]).all()
    }
    best = np.sort(deciding, 1)
    options = {
        "parts": list(parts),
        "at": at,
        "keys": keys,
        "distance": distance,
        "score": score,
        "n_null": n_null,
        "batch_size": batch_size,
    }
    return ContrastMargin(
        parts=made, at=at, keys=keys, distance=distance, correct=correct, output=output, output_auroc=_area(output, correct),
        confidence_auroc=_area(best[:, -1] - best[:, -2], correct), auroc_reason=why_no_auroc(correct), n=len(rows), skipped=(*skipped, *unscored),
        provenance=provenance(model, task=task, seed=seed, options=options), notes=tuple(_notes(near, correct, at)),
    )  # fmt: skip


def _check_options(parts: Sequence[str], at: str, keys: str, distance: str, n_null: int | None) -> None:
    if not parts or len(set(parts)) < len(parts) or any(part not in READ for part in parts):
        raise OptionError(f"parts must be some of {', '.join(READ)}, each once; got {tuple(parts)}. Attention is read anyway.")
    for name, value, choices in (("at", at, At), ("keys", keys, Keys), ("distance", distance, Distance)):
        if value not in get_args(choices):
            raise OptionError(f"{name} must be one of {', '.join(get_args(choices))}; got {value!r}. Pick one of them.")
    if n_null is not None and n_null < 1:
        raise OptionError(f"n_null must be at least 1; got {n_null}. Leave it out for enough shuffles.")


def _words(part: str, at: str, keys: str, distance: str) -> tuple[str, str]:
    """What is compared, and its unit."""
    if part in ("k", "v"):
        what = {"k": "key", "v": "value"}[part]
        unit = "1 - cosine" if distance == "cosine" else "norm of the vectors"
        return f"{what}: distance from {QUERY_TOKENS[at]} to {TOKENS[at]} of wrong exemplars minus to that of right ones", unit
    what = {"qk": "match q . k before RoPE", "rot_qk": "match q . k after RoPE", BASELINE: "attention"}[part]
    unit = "probability" if part == BASELINE else "attention score"
    return f"{what} of the query's last token with {TOKENS[keys]} of right exemplars minus with that of wrong ones", unit


def _shares(near: Nearness) -> np.ndarray:
    """[batch, shot]: each right exemplar's share of the right ones' mean, minus the same of the wrong ones."""
    right, wrong = near.right & near.known, near.known & ~near.right
    return right / right.sum(1, keepdims=True) - wrong / wrong.sum(1, keepdims=True)


def _signed(near: np.ndarray, part: str) -> np.ndarray:
    """Larger is nearer."""
    return -near if part in ("k", "v") else near


def _margins(near: np.ndarray, shares: np.ndarray, part: str) -> np.ndarray:
    """[batch, layer, head]; exemplars that a prompt does not have weigh nothing."""
    return np.einsum("blhs,bs->blh", _signed(near, part), shares)


def _part(
    name: str, near: Nearness, margin: np.ndarray, correct: np.ndarray, output: np.ndarray, attention: np.ndarray, n_null: int, seed: int,
    words: tuple[str, str],
) -> MarginPart:  # fmt: skip
    low, high = bootstrap_interval(margin, seed=seed)
    null, null_high, p = _null(_signed(near.parts[name], name), near, n_null, seed)
    area, (rho, rho_low, rho_high) = areas(margin, correct), spearman(margin, output)
    best, cells, chosen = best_held_out(margin, correct)
    gain = None
    if name != BASELINE and not (np.isnan(chosen).any() or np.isnan(attention).any()):
        gain = area_change(attention, chosen, correct)
    heads: list[Head] = [(int(cell[0]), int(cell[1])) for cell in cells]
    return MarginPart(
        part=name, description=words[0], unit=words[1], value=margin.mean(0), low=low, high=high, null=null, null_high=null_high, p=p, p_corrected=holm(p),
        auroc=area.value, auroc_low=area.low, auroc_high=area.high, auroc_p=area.p, auroc_p_corrected=holm(area.p), rho=rho, rho_low=rho_low,
        rho_high=rho_high, per_episode=margin, held_out=best, held_out_heads=tuple(heads), held_out_gain=gain,
    )  # fmt: skip


def _null(signed: np.ndarray, near: Nearness, n_null: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The margin when the answer is drawn anew among the labels of each episode's context: mean, 97.5 % quantile, one-sided p, [layer, head].

    Whole labels are shuffled and not single exemplars: those of one label are alike whatever is asked (they share the label's word), so that exemplars are
    not exchangeable and a shuffle of them finds margins in networks that have learnt nothing.
    """
    n, n_layers, n_heads, _ = signed.shape
    n_labels = int(near.labels.max()) + 1
    there = np.stack([(near.labels == k) & near.known for k in range(n_labels)], 1)  # [batch, label, shot]
    others = near.known[:, None] & ~there
    share = there / np.maximum(there.sum(-1, keepdims=True), 1) - others / np.maximum(others.sum(-1, keepdims=True), 1)
    each = np.einsum("blhs,bks->blhk", signed, share).reshape(n, n_layers * n_heads, n_labels)  # the margin if label k were right
    shown, right = torch.from_numpy(there.any(-1)), torch.from_numpy((there & near.right[:, None]).any(-1))
    mass = torch.where(shown[:, None], torch.from_numpy(each).float(), 0.0)

    def draw(k: int, generator: torch.Generator) -> Tensor:
        return shuffles(right.long(), shown, k, generator).float()

    mean, high, p = shuffled_null(mass, right, right.float(), draw, n_draws=n_null, seed=seed)
    return mean.reshape(n_layers, n_heads), high.reshape(n_layers, n_heads), p.reshape(n_layers, n_heads)


def _area(scores: np.ndarray, correct: np.ndarray) -> Estimate:
    found = areas(scores[:, None], correct)
    return Estimate(float(found.value[0]), float(found.low[0]), float(found.high[0]), len(correct), "area", "DeLong 95 %")


def _notes(near: Nearness, correct: np.ndarray, at: str) -> list[str]:
    notes = ["Our definition of a contrastive margin; the paper's could not be read."]
    if reason := why_no_auroc(correct):
        notes.append(f"No AUROC: {reason}.")
    elif (rarer := min(int(correct.sum()), int((~correct).sum()))) < 10:
        notes.append(f"Only {rarer} answers of the rarer kind: AUROCs are rough.")
    if len(near.right) > 1 and (near.right == near.right[0]).all():
        notes.append(
            "The right exemplars stand at the same places in every episode, so place and label cannot be told apart: shuffle the shots."
        )
    if at == "label":
        notes.append(
            "Values at labels hold the label's word: a model that likes a word is right where it is the answer, which such a margin tells too."
        )
    else:
        notes.append(
            "Margins of keys and values need no training where items of a class look alike: hold them against an untrained model's."
        )
    by_reason: dict[str, list[str]] = {}
    for (part, layer), why in near.reasons.items():
        by_reason.setdefault(why, []).append(f"{part} of layer {layer}")
    return notes + [f"Not readable: {', '.join(where)}: {why}." for why, where in by_reason.items()]
