"""`build_or_sharpen`: did a fine-tuning build the heads that carry the link, or sharpen heads that had the function before?

Two kinds of evidence, because neither is enough. *What the heads did*: the adapted model's link heads, scored in the base on the same episodes (the heads are found on one half, scored
on the other). A head may have looked there before and handed on something useless; a head that did not look there had no use for it. *What their weights are worth*: the base's
weights put back at these heads of the adapted model (is their change needed?), the adapted model's weights put into the base (does it suffice?), beside random heads, and beside
whole parts. See `mechicl.analysis.link.head_weights` for what a graft can and cannot say.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from mechicl.analysis.ablation.verdict import ALPHA
from mechicl.analysis.agreement import chance_overlap, correlation, ranks
from mechicl.analysis.feed import progress_bar, provenance
from mechicl.analysis.guarded import guarded
from mechicl.analysis.link.head_weights import PARTS, check_pair, shared_heads
from mechicl.analysis.link.mechanism import ROLES, SCORES, check, halves
from mechicl.analysis.link.mechanism_carry import draws_beside, sizes
from mechicl.analysis.link.mechanism_evidence import Work, array, estimate
from mechicl.analysis.link.store import digest
from mechicl.analysis.patching.metrics import Metric
from mechicl.analysis.patching.store import weights
from mechicl.analysis.statistics import mcnemar_p, paired_change, permutation_p, wilson
from mechicl.analysis.study import THRESHOLD
from mechicl.errors import OptionError
from mechicl.prompts.episode import Episode
from mechicl.results import Adapted, BuildOrSharpen, Estimate, Graft, Head, LinkHead, LinkOverlap, Skipped
from mechicl.results.link_built import Recipient, Was

HALF = 0.5
"""Share of its present score that a head must have had in the base to have "had it"."""


LIFT = 1.5
"""How many times its null a head's score in the base must be, as in `score_heads`: attention spread evenly over a short prompt is more than a tenth anywhere."""

FEW_LAYERS = 16
"""Layers up to which the heads of each are exchanged, too."""


@guarded
def build_or_sharpen(
    base: Any,
    adapted: Mapping[str, Any],
    episodes: Sequence[Episode],
    *,
    threshold: float = THRESHOLD,
    n_random: int = 19,
    metric: Metric = "label_logprob",
    parts: bool = True,
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    task: str = "",
    progress: bool = True,
) -> BuildOrSharpen:
    """Fine-tuned models beside their base: which heads carry the link now, what were they before, and whose weights does it need?

    Args:
        base: A loaded model, or whatever `mechicl.load` takes.
        adapted: Models fine-tuned from it, by name: loaded, or folders (of whole models, of adapters, or of a finished `mechicl adapt` run). They are loaded one at a time.
        episodes: Link-context episodes with twins, see `link_circuit`; the same for all models. Every second one serves to find heads.
        threshold: Least share of the way to the twin of a link head, and least score of a head that "had" a function.
        n_random: Random sets of as many heads, for the ablation and for the grafts; 19 or more.
        metric: Of the twins; see `mechicl.patch`. "logit_diff" is quicker where no two labels begin alike.
        parts: Also exchange whole parts: attention, MLPs, embeddings, vision; and, in models of up to `FEW_LAYERS` layers, the heads of each layer.
        out: A folder that keeps what is finished; the same call goes on, and more models may be added.
        seed, batch_size, task, progress: See `link_circuit`.

    Returns:
        BuildOrSharpen; `rows[k].verdict` in words.

    Raises:
        EpisodeError, OptionError: see `link_circuit`; or models of different shapes.
        CheckpointError, OutputPathError: `out` holds another comparison, or cannot be written.

    Source:
        ours.
    """
    check(episodes, threshold, n_random)
    if not adapted or "base" in adapted:
        raise OptionError(
            f"adapted must be models by name, none called 'base'; got {', '.join(adapted) or 'none'}. E.g. {{'2-way': 'runs/link/model'}}."
        )
    for model in (base, *adapted.values()):
        check_given(model)
    first = load_given(base, progress=progress)
    find, prove = halves(episodes)
    asked = {
        "base": weights(first),
        "episodes": digest(episodes),
        "threshold": threshold,
        "n_random": n_random,
        "metric": getattr(metric, "__name__", metric),
        "seed": seed,
    }
    work = Work.begin(
        find, prove, out, asked, threshold=threshold, n_random=n_random, metric=metric, seed=seed, batch_size=batch_size, progress=progress
    )
    before = work.evidence("base", first)
    rows = []
    for name, given in progress_bar(adapted.items(), total=len(adapted), what="models", show=progress):
        model = load_given(given, progress=progress)
        check_pair(first, model)
        after = work.evidence(name, model)
        _grafts(work, name, first, model, before, after, parts)
        rows.append(_row(work, name, before, after, parts))
    right = np.array(before["correct"], bool)
    zero = None if before["zero_shot"] is None else Estimate(*map(float, before["zero_shot"][:3]), n=int(before["zero_shot"][3]))
    options = {"threshold": threshold, "n_random": n_random, "metric": asked["metric"], "models": list(adapted)}
    return BuildOrSharpen(
        rows=tuple(rows), base_name=str(first.describe().get("model", "")), base_accuracy=wilson(right), zero_shot=zero, chance=float(before["chance"]),
        n_find=len(find), n_prove=len(right), skipped=tuple(Skipped(str(who), str(why)) for who, why in before["skipped"]),
        provenance=provenance(first, task=task, seed=seed, options=options), notes=tuple(f"base: {note}" for note in before["notes"]),
    )  # fmt: skip


def check_given(given: Any) -> None:
    """Refuse a model that is named and cannot be loaded, before anything is run.

    Raises:
        OptionError: there is no such folder.
        CheckpointError, UnsupportedModelError: see `mechicl.load`.
    """
    if not isinstance(given, str | Path):
        return
    if Path(given).is_absolute() and not Path(given).is_dir():
        raise OptionError(f"adapted must be models that exist; there is no folder {given}. Check the path.")
    from mechicl.models.load import check_model

    check_model(_place(given))


def load_given(given: Any, *, progress: bool = True) -> Any:
    """A model, loaded if it is not yet; a finished run's folder stands for its result."""
    if not isinstance(given, str | Path):
        return given
    from mechicl.models.load import load

    return load(_place(given), progress=progress)


def _place(given: str | Path) -> str | Path:
    """What `mechicl.load` takes: of a finished run's folder, the model or the adapters in it."""
    path = Path(given)
    inner = next((path / name for name in ("model", "adapter") if (path / name).is_dir()), None)
    return given if inner is None or ((path / "config.json").is_file() and (path / "model.safetensors").is_file()) else inner


def _roles(scores: Mapping[str, np.ndarray], threshold: float) -> np.ndarray:
    """[layer, head]: the index of the highest score of each head, -1 where none is at least the threshold."""
    means = np.stack([np.nan_to_num(np.nanmean(scores[name], 0)) for name in SCORES])
    return np.where(means.max(0) >= threshold, means.argmax(0), -1)


def _grafts(work: Work, name: str, base: Any, model: Any, before: Mapping[str, Any], after: Mapping[str, Any], parts: bool) -> None:
    """Every exchange of weights between a model and its base."""
    heads = tuple((int(a), int(b)) for a, b in after["link"])
    loose = shared_heads(model, heads)
    note = f"keys and values of {len(loose)} of {len(heads)} heads stayed: other heads read them too" if loose else ""
    if heads:
        drawn = draws_beside(model, heads, work.n_random, work.seed)
        note = "; ".join(text for text in (note, drawn.note) if text)
        work.graft(name, model, base, "adapted", "link heads", heads=heads, random=drawn.sets, note=note)
        work.graft(name, base, model, "base", "link heads", heads=heads, random=drawn.sets, note=note)
        for letters in ("qk", "vo"):
            work.graft(name, model, base, "adapted", "link heads", heads=heads, letters=letters)
        roles = _roles({n: array(v) for n, v in after["scores"].items()}, work.threshold)
        for k, score in enumerate(SCORES):
            some = tuple(h for h in heads if roles[h] == k)
            if some and len(some) < len(heads):
                work.graft(name, model, base, "adapted", f"{ROLES[score]} heads", heads=some)
        others = tuple((layer, h) for layer, size in sizes(model).items() for h in range(size) if (layer, h) not in heads)
        work.graft(name, model, base, "adapted", "all other heads", heads=others)
        work.graft(name, base, model, "base", "all other heads", heads=others)
    for part in PARTS if parts else ():
        work.graft(name, model, base, "adapted", part, parts=(part,))
        work.graft(name, base, model, "base", part, parts=(part,))
    layers = sizes(model)
    for layer in layers if parts and len(layers) <= FEW_LAYERS else ():
        work.graft(name, model, base, "adapted", f"heads of layer {layer}", heads=tuple((layer, h) for h in range(layers[layer])))


def _row(work: Work, name: str, before: Mapping[str, Any], after: Mapping[str, Any], parts: bool) -> Adapted:
    """Everything that was kept of one model, with intervals."""
    right, old = np.array(after["correct"], bool), np.array(before["correct"], bool)
    link = _link(work, before, after)
    off = after.get("ablated")
    made = [
        line
        for key, line in work.known.items()
        if key[:2] == ("graft", name) and (parts or not key[3].startswith((*PARTS, "heads of layer")))
    ]
    grafts = tuple(_graft(line, before, after, work.seed) for line in made)
    row = Adapted(
        name=name, accuracy=wilson(right), change=paired_change(old, right, unit="probability", seed=work.seed),
        margin_change=paired_change(array(before["margins"]), array(after["margins"]), unit="nats", seed=work.seed), mcnemar_p=mcnemar_p(old, right), link=link,
        rule=after["rule"], ablated=None if off is None else wilson(off["correct"]),
        ablated_change=None if off is None else paired_change(right, np.array(off["correct"], bool), unit="probability", seed=work.seed),
        ablated_random=np.array([] if off is None else off["random"]), overlap=_overlap(before, after, max(1, len(link)) if link else 4), grafts=grafts, finding="", verdict="",
    )  # fmt: skip
    finding, verdict = judge(row, float(before["chance"]))
    return Adapted(**{**vars(row), "finding": finding, "verdict": verdict})


def _link(work: Work, before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[LinkHead, ...]:
    """The link heads, each in both models."""
    mine, theirs = ({n: array(v) for n, v in side["scores"].items()} for side in (after, before))
    roles, was_roles = _roles(mine, work.threshold), _roles(theirs, work.threshold)
    found = []
    for layer, head in after["link"]:
        cell, k = (int(layer), int(head)), int(roles[layer, head])
        score = SCORES[max(k, 0)]
        now, then = mine[score][(slice(None), *cell)], theirs[score][(slice(None), *cell)]
        both = ~np.isnan(now) & ~np.isnan(then)
        old, new = estimate(then[both], work.seed), estimate(now[both], work.seed)
        carried = [float(array(side["carried"]["items"]["value"])[cell]) for side in (before, after)]
        found.append(
            LinkHead(
                head=cell, role=_called(k), role_base=_called(int(was_roles[cell])), base=old, adapted=new,
                change=paired_change(then[both], now[both], unit="probability", seed=work.seed), carried_base=carried[0], carried_adapted=carried[1],
                was=_was(old, new, max(work.threshold, LIFT * float(array(before["null"][score])[cell]))) if k >= 0 else "unknown",
            )
        )  # fmt: skip
    return tuple(found)


def _called(k: int) -> str:
    return ROLES[SCORES[k]] if k >= 0 else "none"


def _was(old: Estimate, new: Estimate, threshold: float) -> Was:
    if not old.low >= threshold:
        return "new"
    return "had it" if old.value >= HALF * new.value else "in part"


def _overlap(before: Mapping[str, Any], after: Mapping[str, Any], k: int) -> tuple[LinkOverlap, ...]:
    """Top heads of each score in both models."""
    found = []
    for name in SCORES:
        a, b = (np.nanmean(array(side["scores"][name]), 0) for side in (before, after))
        tops = [
            {
                tuple(int(x) for x in divmod(int(i), a.shape[1]))
                for i in np.argsort(-np.nan_to_num(one, nan=-np.inf).ravel(), kind="stable")[:k]
            }
            for one in (a, b)
        ]
        shared = sorted(tops[0] & tops[1])
        expected, p = chance_overlap(a.size, k, k, len(shared))
        found.append(
            LinkOverlap(name, k, cast(tuple[Head, ...], tuple(shared)), expected, p, correlation(ranks(a.ravel()), ranks(b.ravel())))
        )
    return tuple(found)


def _graft(line: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any], seed: int) -> Graft:
    _, _, side, what, letters = line["key"]
    own = before if side == "base" else after
    right, mine = np.array(line["correct"], bool), np.array(own["correct"], bool)
    margins, before_margins = array(line["margins"]), array(own["margins"])
    random, theirs = np.array(line["random"], dtype=np.float64), array(line["random_margins"])
    return Graft(
        recipient=cast(Recipient, side), what=what, heads=tuple((int(a), int(b)) for a, b in line["heads"]), letters=letters, accuracy=wilson(right),
        change=paired_change(mine, right, unit="probability", seed=seed), margin_change=paired_change(before_margins, margins, unit="nats", seed=seed),
        mcnemar_p=mcnemar_p(mine, right), random=random, p_random=_p(random, right.mean(), side), random_margin_change=theirs - before_margins.mean(),
        p_margin=_p(theirs, margins.mean(), side), note=line["note"],
    )  # fmt: skip


def _p(random: np.ndarray, own: float, side: str) -> float:
    """One-sided, that random heads do as much: gain it in the base, lose it in the adapted model."""
    if not len(random):
        return float("nan")
    as_much = random >= own - 1e-9 if side == "base" else random <= own + 1e-9
    return float(permutation_p(0.0, int(as_much.sum()), len(random)))


def judge(row: Adapted, chance: float) -> tuple[str, str]:
    """A word, and what may be said: by what the link heads were before, then by their weights."""
    if row.accuracy.low <= chance or row.change.low <= 0:
        return "no link", f"No link was learnt that shows: accuracy {row.accuracy}, change from the base {_signed(row.change)}."
    if not row.link:
        return (
            "no link",
            f"Accuracy rises to {row.accuracy}, yet no single head carries a tenth of it: the link is spread out, or by another way.",
        )
    parts = []
    for role in dict.fromkeys(h.role for h in row.link):
        some = [h for h in row.link if h.role == role]
        names = ", ".join(f"{h.head[0]}.{h.head[1]} ({h.base.value:.2f} to {h.adapted.value:.2f}, {_before(h)})" for h in some)
        parts.append(f"{role if role != 'none' else 'no known role'}: {names}")
    known = [h for h in row.link if h.was != "unknown"]
    old = [h for h in known if h.was != "new"]
    finding = "built" if not old else "sharpened" if len(old) == len(known) else "both"
    if not known:
        finding = "both"
    said = {"built": "Built: none of its link heads had the function in the base", "sharpened": "Sharpened: every link head had the function in the base, at least in part",
            "both": f"Both: {len(old)} of {len(known)} link heads had the function in the base, at least in part"}[finding]  # fmt: skip
    return finding, f"{said} ({'; '.join(parts)}). {_weights(row)}".strip()


def _before(one: LinkHead) -> str:
    """What a head was, and what else it did."""
    return one.was if one.role_base in (one.role, "none") else f"{one.was}; {one.role_base} before"


def _weights(row: Adapted) -> str:
    """What the grafts of the link heads say."""
    said = []
    for side, words in (("adapted", "the base's weights at these heads"), ("base", "their weights in the base")):
        one = next((g for g in row.grafts if (g.recipient, g.what, g.letters) == (side, "link heads", "qkvo")), None)
        if one is None:
            continue
        said.append(f"{words}: accuracy {one.accuracy.value:.2f}, margin {_signed(one.margin_change)} nats")
        said[-1] += f", random heads {one.random_margin_change.mean():+.2f}, p = {one.p_margin:.2f}" if len(one.random) else ""
        if side == "adapted" and not needed(one):
            said[-1] += " (the change of their own weights is not shown to be needed: what they read may be what changed)"
    return f"Grafts: {'; '.join(said)}." if said else ""


def needed(graft: Graft) -> bool:
    """Whether the adapted model's margin falls by getting the base's weights back, and by more than with random heads."""
    return bool(graft.margin_change.high < 0 and graft.p_margin <= ALPHA)


def _signed(e: Estimate) -> str:
    return f"{e.value:+.2f} [{e.low:+.2f}, {e.high:+.2f}] (n={e.n})"
