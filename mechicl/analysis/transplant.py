"""`transplant`: move an activation from one prompt's span to another's, against the same move from prompts that have nothing to do with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mechicl.analysis.feed import progress_bar, provenance
from mechicl.analysis.metrics import Contrast, Metric
from mechicl.analysis.patch_cells import INPUTS, STATES, STREAM, Edit, cross, hook_name, keep
from mechicl.analysis.patch_engine import Engine, additions, make_base, stack_hooks
from mechicl.analysis.patch_run import added_layers
from mechicl.analysis.statistics import benjamini_hochberg, holm, mean_estimate, paired_change, ratio_interval, sign_flip_p
from mechicl.errors import EmptySpanError, EpisodeError, OptionError
from mechicl.models.hooked import check_heads
from mechicl.prompts.align import Align, fit, span_groups
from mechicl.prompts.batch import Batch
from mechicl.results import Estimate, Head, Skipped
from mechicl.results.patching import Transplant, TransplantRow

Place = str | Callable[[Batch], Tensor]
"""A span's name (as `span_groups` gives them by "span" or by "shot"), or a function from a batch to a mask [batch, pos]."""
ROTATED = {name: f"blocks.{{layer}}.attn.hook_{name}" for name in ("rot_q", "rot_k")}
SITES = (*STREAM, "z", "q", "k", "v", *ROTATED, "embed")


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
    work = _Work(model, target, source, list(moves), measured, toward == "other", align, n_controls, seed, batch_size, engine)
    cells = [(name, layer) for name in site_names for layer in _layers(model, name, layers, chosen)]
    work.read_source(cells)
    effects, controls = work.run(cells, chosen, progress)
    made = []
    for k, (name, layer) in enumerate(cells):
        for j, move in enumerate(moves):
            made.append(_row(name, layer, move, effects[k][j], controls[k][j], work, n_permutations, seed))
    p = np.array([row.p for row in made])
    corrected = holm(p) if correction == "holm" else benjamini_hochberg(p)
    options = {"moves": [tuple(map(_title, move)) for move in moves], "sites": list(site_names), "metric": measured.name, "toward": str(toward)[:60], "align": align,
               "n_controls": n_controls, "correction": correction, "n_permutations": n_permutations}  # fmt: skip
    return Transplant(
        rows=tuple(TransplantRow(**{**vars(row), "p_corrected": float(q)}) for row, q in zip(made, corrected, strict=True)), metric=measured.name, unit=measured.unit,
        target=work.before, source=work.there, correction=correction, n=target.n, n_controls=n_controls, skipped=tuple(skipped),
        provenance=provenance(model, task=task, seed=seed, options=options), notes=tuple(dict.fromkeys(work.notes)),
    )  # fmt: skip


def _row(
    site: str, layer: int, move: tuple[Place, Place], after: np.ndarray, control: np.ndarray, work: _Work, n_permutations: int, seed: int
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
        site=site, layer=layer, source=_title(move[0]), target=_title(move[1]), effect=mean_estimate(effect, unit=unit, seed=seed),
        control=mean_estimate(other, unit=unit, seed=seed), difference=paired_change(other, effect, unit=unit, seed=seed), normalised=normalised,
        p=float(p), p_corrected=np.nan, per_episode=effect, control_per_episode=other,
    )  # fmt: skip


@dataclass(eq=False)
class _Work:
    """A transplant in progress. `given`: (hook, move) -> for each row the source span's activations [token, ...]."""

    model: Any
    target: Batch
    source: Batch
    moves: list[tuple[Place, Place]]
    contrast: Contrast
    away: bool
    align: Align | None
    n_controls: int
    seed: int
    batch_size: int
    engine: Engine
    given: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    before: np.ndarray = field(default_factory=lambda: np.zeros(0))
    there: np.ndarray = field(default_factory=lambda: np.zeros(0))
    notes: list[str] = field(default_factory=list)

    @property
    def n(self) -> int:
        return self.target.n

    def parts(self) -> list[list[int]]:
        size = max(1, self.batch_size // self.contrast.blocks)
        count = -(-self.n // size)
        return [list(range(k * self.n // count, (k + 1) * self.n // count)) for k in range(count)]

    def some(self, batch: Batch, rows: Sequence[int]) -> tuple[Contrast, Batch, Batch, Callable[[Tensor], np.ndarray]]:
        """For some rows: contrast, prompts, prompts as they are run, reader."""
        measured = self.contrast.take(rows)
        part = batch if len(rows) == batch.n else batch.select(rows)
        read = measured.reader(part)
        return measured, part, measured.widen(part), (lambda logits: -read(logits)) if self.away else read

    def read_source(self, cells: Sequence[tuple[str, int]]) -> None:
        """Run the source prompts; keep the spans' activations and the metric."""
        there = []
        hooks = [_hook_of(site, layer) for site, layer in cells]
        stacked = added_layers(self.model) if any(site in STATES for site, _ in cells) else []
        for rows in self.parts():
            measured, part, wide, read = self.some(self.source, rows)
            logits, kept = keep(self.model, wide, [*hooks, *stack_hooks(stacked)], measured.positions(wide))
            there.append(read(logits))
            kept |= {f"+{layer}": added for layer, added in additions(kept, stacked).items()}
            for j, (name, _) in enumerate(self.moves):
                mask = _mask(part, name, "source")
                for hook in (*dict.fromkeys(hooks), *(f"+{layer}" for layer in stacked)):
                    self.given.setdefault((hook, j), []).extend(
                        kept[hook][i, : part.n_pos][mask[i].to(kept[hook].device)] for i in range(part.n)
                    )
        self.there = np.concatenate(there)

    def run(self, cells: Sequence[tuple[str, int]], heads: Collection[Head] | None, progress: bool) -> tuple[np.ndarray, np.ndarray]:
        """The metric after each cell's moves, [cell, move, batch], and after the controls' (their mean)."""
        shape = (len(cells), len(self.moves), self.n)
        after, control, before = np.full(shape, np.nan), np.full(shape, np.nan), np.full(self.n, np.nan)
        donors = self._donors()
        bar = progress_bar(None, total=len(cells) * len(self.moves) * len(self.parts()), what="transplanting", show=progress)
        stacked = added_layers(self.model) if any(site in STATES for site, _ in cells) else []
        hooks = [_hook_of(site, layer) for site, layer in cells]
        for rows in self.parts():
            measured, part, wide, read = self.some(self.target, rows)
            base = make_base(self.model, wide, measured.positions(wide), hooks, stacked, self.engine, self.batch_size)
            before[rows], own = read(base.logits), additions(base.kept, stacked)
            for k, (site, layer) in enumerate(cells):
                for j in range(len(self.moves)):
                    batches = [self._edits(site, layer, j, rows, part, wide, [donor[j][i] for i in rows], own, heads) for donor in donors]
                    values = np.stack(base.run(batches, read))
                    after[k, j, rows] = values[0]
                    control[k, j, rows] = values[1:].mean(0)
                    bar.update(1)
        bar.close()
        self.before = before
        return after, control

    def _donors(self) -> list[list[list[int]]]:
        """[draw][move][row] -> the row that gives; draw 0 is the row itself, the others are controls.

        Without `align` only rows whose span is as long can give.
        """
        draw = np.random.default_rng(self.seed)
        first = next(iter({hook for hook, _ in self.given}))
        draws: list[list[list[int]]] = [[list(range(self.n)) for _ in self.moves]] + [
            [[] for _ in self.moves] for _ in range(self.n_controls)
        ]
        for j in range(len(self.moves)):
            lengths = np.array([len(x) for x in self.given[first, j]])
            for i in range(self.n):
                others = [r for r in range(self.n) if r != i and (self.align is not None or lengths[r] == lengths[i])]
                if not others:
                    raise EpisodeError(
                        f"episode {i}: another episode's span {_title(self.moves[j][0])!r} must be as long, for the control; none has {lengths[i]} tokens. "
                        "Pass align='mean' or align='resize', or draw labels of one length."
                    )
                picked = draw.permutation(others)
                for c in range(self.n_controls):
                    draws[1 + c][j].append(int(picked[c % len(picked)]))
                if len(others) < self.n_controls:
                    self.notes.append(f"Some controls repeat: only {len(others)} other episodes can give {_title(self.moves[j][0])!r}.")
        return draws

    def _edits(
        self, site: str, layer: int, j: int, rows: Sequence[int], part: Batch, wide: Batch, donors: Sequence[int], own: dict[int, Tensor],
        heads: Collection[Head] | None,
    ) -> list[Edit]:  # fmt: skip
        mask = _mask(part, self.moves[j][1], "target")
        blocks = wide.n // part.n
        full = torch.zeros(wide.n, wide.n_pos, dtype=torch.bool)
        full[:, : part.n_pos] = mask.repeat(blocks, 1)

        def dense(hook: str) -> Tensor:
            example = self.given[hook, j][donors[0]]
            value = torch.zeros(part.n, wide.n_pos, *example.shape[1:], dtype=example.dtype, device=example.device)
            for i, donor in enumerate(donors):
                given, where = self.given[hook, j][donor], mask[i].nonzero()[:, 0]
                if len(given) != len(where) and self.align is None:
                    name = part.ids[i] if part.ids else rows[i]
                    raise EpisodeError(
                        f"episode {name}: spans {_title(self.moves[j][0])!r} (source) and {_title(self.moves[j][1])!r} (target) must have as many tokens; "
                        f"got {len(given)} and {len(where)}. Pass align='mean' or align='resize'."
                    )
                value[i, where.to(value.device)] = given if len(given) == len(where) else fit(given, len(where), self.align or "mean")
            return value.repeat(blocks, *(1,) * (value.dim() - 1))

        hook = _hook_of(site, layer)
        value = dense(hook)
        which = [None] if heads is None or site in STREAM or site in INPUTS else [head for at, head in heads if at == layer]
        found = [Edit(hook, full, value, head) for head in which]
        if site in STATES:
            found += [Edit(hook_name("resid_pre", at), full, dense(f"+{at}") - added, add=True) for at, added in own.items() if at > layer]
        return found


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


def _mask(batch: Batch, place: Place, side: str) -> Tensor:
    """Positions of a span, each episode at least one.

    Raises:
        EmptySpanError: an episode has no such span.
        OptionError: no prompt has it.
    """
    if callable(place):
        mask = place(batch).cpu().bool()
    else:
        groups = span_groups(batch, "span") | span_groups(batch, "shot")
        if place not in groups:
            raise OptionError(f"{side} span must be one of {', '.join(groups)}; got {place!r}. These are the spans of the prompts.")
        mask = groups[place].cpu()
    empty = (~mask.any(1)).nonzero()[:, 0].tolist()
    if empty:
        raise EmptySpanError(
            f"every {side} prompt must have the span {_title(place)!r}; episode {batch.ids[empty[0]] if batch.ids else empty[0]} has none. Leave it out."
        )
    return mask


def _title(place: Place) -> str:
    return place if isinstance(place, str) else getattr(place, "__name__", "a span")


def _hook_of(site: str, layer: int) -> str:
    return ROTATED[site].format(layer=layer) if site in ROTATED else hook_name(site, layer)


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
        if layers is not None or _hook_of(site, layer) in model.hook_dict:
            model.check_hook_name(_hook_of(site, layer))
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
