"""`transplant`: move an activation from one prompt's span to another's, against the same move from prompts that have nothing to do with it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np

from mechicl.analysis.feed import provenance
from mechicl.analysis.guarded import guarded
from mechicl.analysis.patching.cells import INPUTS, STREAM, cross
from mechicl.analysis.patching.engine import Engine
from mechicl.analysis.patching.metrics import Contrast, Metric
from mechicl.analysis.patching.transplant_work import ROTATED, Place, Work, hook_of, title
from mechicl.analysis.statistics import benjamini_hochberg, holm, mean_estimate, paired_change, ratio_interval, sign_flip_p
from mechicl.errors import EpisodeError, OptionError
from mechicl.models.hooked import check_heads
from mechicl.prompts.align import Align
from mechicl.prompts.batch import Batch
from mechicl.results import Estimate, Head, Skipped
from mechicl.results.patching import Transplant, TransplantRow

SITES = (*STREAM, "z", "q", "k", "v", *ROTATED, "embed")


@guarded
def transplant(
    model: Any,
    target: Batch,
    source: Batch | None = None,
    moves: Sequence[tuple[Place, Place]] = (),
    site: str | Sequence[str] = "resid_pre",
    layers: Collection[int] | None = None,
    *,
    heads: Collection[Head] | None = None,
    metric: Metric = "logit_diff",
    toward: str | Sequence[str] = "source",
    align: Align | None = None,
    n_controls: int = 4,
    correction: Literal["holm", "fdr_bh"] = "holm",
    n_permutations: int = 10_000,
    seed: int = 0,
    batch_size: int = 16,
    engine: Engine = "resume",
    task: str = "",
    progress: bool = True,
) -> Transplant:
    """Is what one span holds usable in another place: a label's key in another exemplar, a picture's residual where a word stood?

    Each row is one move in one layer: the activations of the source prompt's span take the place of the target prompt's span, and the metric says how far the answer
    follows. Whatever is put there also does damage, so the same move is made with spans of other episodes (their content does not fit this prompt); `difference`
    is what is left, the effect of the content. The metric is the label that the move should bring minus the target's own answer.

    Args:
        model: A `HookedVLM` or a toy.
        target: Prompts that receive.
        source: Prompts that give, row by row; None: the target prompts themselves (a move within the prompt).
        moves: (source span, target span) pairs. A span is a name, e.g. "right label", "query image", "shot 0 label", or a function from a batch to a mask
            [batch, pos].
        site: One or more of resid_pre, resid_mid, resid_post, attn_out, mlp_out, z, q, k, v (before the rotation: places stay the target's), rot_q, rot_k (after
            it: the source's places come along), embed.
        layers: Only these layers; None: all.
        heads: Only these (layer, head), for sites of heads (key/value heads for k, v and rot_k); None: all heads of a layer together.
        metric: As in `patch`, without "kl".
        toward: The label that the move should bring: "source", the source prompt's answer; "other", any other candidate of the target (their mean); "shot 1", the
            label of that exemplar of the target; or a label for each episode.
        align: How spans of unequal length are fitted: "mean" gives every target token the source span's mean, "resize" interpolates along it; None refuses them.
        n_controls: Other episodes whose spans are moved for comparison, for each episode.
        correction: Of p over rows.
        n_permutations: Sign flips drawn for p.
        seed: Of the controls, intervals and permutations.
        batch_size: Prompts that are run at once.
        engine: As in `patch`.
        task: For the record.
        progress: Show a bar.

    Returns:
        Transplant; its rows' `difference` has the interval and p that count. Controls come from the same batch: with few episodes, or few labels, a control may by
        chance bring the same label, which makes `difference` too small.

    Raises:
        OptionError: an option that does not exist.
        EpisodeError: batches that are not paired, fewer than two episodes, or spans of unequal length (says which).
        EmptySpanError: an episode lacks a span.
    """
    site_names = (site,) if isinstance(site, str) else tuple(site)
    source = target if source is None else source
    _check(model, target, source, moves, site_names, metric, n_controls, correction, align)
    measured, rows, skipped = _contrast(metric, target, source, toward)
    if len(rows) < target.n:
        target, source = target.select(rows), source.select(rows)
    if target.n < 2:
        raise EpisodeError(
            f"target must hold at least two episodes that differ from the source; got {target.n}. Controls come from other episodes: add some."
        )
    chosen = None if heads is None else check_heads(model, list(heads))
    work = Work(model, target, source, list(moves), measured, toward == "other", align, n_controls, seed, batch_size, engine)
    cells = [(name, layer) for name in site_names for layer in _layers(model, name, layers, chosen)]
    work.read_source(cells)
    effects, controls = work.run(cells, chosen, progress)
    made = []
    for k, (name, layer) in enumerate(cells):
        for j, move in enumerate(moves):
            made.append(_row(name, layer, move, effects[k][j], controls[k][j], work, n_permutations, seed))
    p = np.array([row.p for row in made])
    corrected = holm(p) if correction == "holm" else benjamini_hochberg(p)
    options = {"moves": [tuple(map(title, move)) for move in moves], "sites": list(site_names), "metric": measured.name, "toward": str(toward)[:60], "align": align,
               "n_controls": n_controls, "correction": correction, "n_permutations": n_permutations}  # fmt: skip
    return Transplant(
        rows=tuple(TransplantRow(**{**vars(row), "p_corrected": float(q)}) for row, q in zip(made, corrected, strict=True)), metric=measured.name, unit=measured.unit,
        target=work.before, source=work.there, correction=correction, n=target.n, n_controls=n_controls, skipped=tuple(skipped),
        provenance=provenance(model, task=task, seed=seed, options=options), notes=tuple(dict.fromkeys(work.notes)),
    )  # fmt: skip


def _row(
    site: str, layer: int, move: tuple[Place, Place], after: np.ndarray, control: np.ndarray, work: Work, n_permutations: int, seed: int
) -> TransplantRow:
    unit, before = work.contrast.unit, work.before
    effect, other = after - before, control - before
    gap = work.there - before
    normalised = None
    if abs(gap.mean()) > 1e-5 * max(float(np.abs(before).mean()), float(np.abs(work.there).mean()), 1e-12):
        low, high = ratio_interval(effect, gap, seed=seed)
        normalised = Estimate(
            float(effect.mean() / gap.mean()), float(low), float(high), len(gap), "share of source - target", "bootstrap 95 %"
        )
    p = sign_flip_p(effect - other, n_draws=n_permutations, seed=seed, tie=2e-6 * float(np.abs(before).max()))
    return TransplantRow(
        site=site, layer=layer, source=title(move[0]), target=title(move[1]), effect=mean_estimate(effect, unit=unit, seed=seed),
        control=mean_estimate(other, unit=unit, seed=seed), difference=paired_change(other, effect, unit=unit, seed=seed), normalised=normalised,
        p=float(p), p_corrected=np.nan, per_episode=effect, control_per_episode=other,
    )  # fmt: skip


def _contrast(metric: Metric, target: Batch, source: Batch, toward: str | Sequence[str]) -> tuple[Contrast, list[int], list[Skipped]]:
    """The label that a move should bring (answers) against the target's own answer (foils); rows; what is left out. With toward="other" the sides are exchanged,
    because the other candidates are several, and the metric is read with the other sign."""
    answers, foils, rows = [], [], []
    skipped: list[Skipped] = []
    for i in range(target.n):
        ids = dict(zip(target.candidates[i], target.candidate_ids[i], strict=True))
        own = target.candidates[i][target.answers[i]]
        if toward == "other":
            bring, against = [own], [name for name in ids if name != own]
        else:
            label, known = _wanted(target, source, toward, i)
            ids = known | ids
            bring, against = [label], [own]
        first, others = tuple(ids[bring[0]]), [tuple(ids[name]) for name in against]
        kept = [x for x in others if x[0] != first[0]] if metric == "logit_diff" else others
        if bring == against or not kept:
            reason = (
                "the label to be brought is the target's answer"
                if bring == against
                else "the two labels begin with the same token; use label_logprob"
            )
            skipped.append(Skipped(target.ids[i] if target.ids else str(i), reason))
            continue
        answers.append(first)
        foils.append(tuple(kept))
        rows.append(i)
    if not rows:
        raise EpisodeError(
            f"toward must name a label other than the target's answer; none of {target.n} episodes has one ({skipped[0].reason}). Choose another."
        )
    return Contrast(metric, tuple(answers), tuple(foils)), rows, skipped


def _wanted(target: Batch, source: Batch, toward: str | Sequence[str], i: int) -> tuple[str, dict[str, tuple[int, ...]]]:
    """The label to be brought in episode i, and its tokens where the source knows them."""
    known = dict(zip(source.candidates[i], source.candidate_ids[i], strict=True))
    if toward == "source":
        return source.candidates[i][source.answers[i]], known
    if isinstance(toward, str):
        shot = toward.removeprefix("shot ")
        labels = {str(span.shot): span.label for span in target.spans[i] if span.role == "label" and span.shot >= 0}
        if not toward.startswith("shot ") or shot not in labels:
            raise OptionError(
                f"toward must be 'source', 'other', 'shot k' or a label for each episode; got {toward!r}. Exemplars are shot {', '.join(labels)}."
            )
        return labels[shot], known
    if len(toward) != target.n or toward[i] not in {**known, **dict.fromkeys(target.candidates[i])}:
        raise OptionError(
            f"toward must be a candidate for each of {target.n} episodes; got {len(toward)} labels, the one of episode {i} {toward[min(i, len(toward) - 1)]!r}."
        )
    return toward[i], known


def _layers(model: Any, site: str, layers: Collection[int] | None, heads: Collection[Head] | None) -> Iterator[int]:
    if site in INPUTS:
        yield -1
        return
    for layer in range(model.cfg.n_layers) if layers is None else sorted(layers):
        in_heads = heads is None or site in STREAM or any(at == layer for at, _ in heads)
        if not in_heads:
            continue
        if site in ("k", "v", "rot_k") and cross(model, layer):  # it reads pictures, not the prompt's tokens
            continue
        if layers is not None or hook_of(site, layer) in model.hook_dict:
            model.check_hook_name(hook_of(site, layer))
            yield layer


def _check(
    model: Any, target: Batch, source: Batch, moves: Sequence[Any], sites: Sequence[str], metric: Metric, n_controls: int, correction: str, align: str | None
) -> None:  # fmt: skip
    if unknown := [site for site in sites if site not in SITES]:
        raise OptionError(f"site must be one of {', '.join(SITES)}; got {unknown[0]!r}. Pick one of them.")
    if target.n != source.n:
        raise EpisodeError(
            f"target and source must be paired, prompt by prompt; got {target.n} and {source.n} prompts. Select the rows to pair."
        )
    if not moves or not all(isinstance(move, tuple) and len(move) == 2 for move in moves):
        raise OptionError(
            f"moves must be a non-empty list of (source span, target span); got {moves!r}. E.g. [('right label', 'wrong label')]."
        )
    if metric == "kl":
        raise OptionError("metric must tell two labels apart for a transplant; got 'kl'. Use logit_diff or label_logprob.")
    if n_controls < 1:
        raise OptionError(f"n_controls must be at least 1; got {n_controls}. Without controls damage looks like an effect.")
    if correction not in ("holm", "fdr_bh"):
        raise OptionError(f"correction must be one of holm, fdr_bh; got {correction!r}. holm is the stricter.")
    if align is not None and align not in get_args(Align):
        raise OptionError(f"align must be None, mean or resize; got {align!r}. None refuses spans of unequal length.")
