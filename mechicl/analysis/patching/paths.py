"""`path_patch`: what a single edge carries, from one part of the model to one other, and to nobody else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from mechicl.analysis.feed import progress_bar, provenance
from mechicl.analysis.guarded import guarded
from mechicl.analysis.patching.job import sides_of
from mechicl.analysis.patching.metrics import Metric, contrast
from mechicl.analysis.patching.patch import Correction, gap_between
from mechicl.analysis.patching.path_runs import Freeze, Runs, behind_norm
from mechicl.analysis.statistics import benjamini_hochberg, holm, ratio_interval, sign_flip_p
from mechicl.errors import OptionError
from mechicl.models.edge_graph import EdgeGraph
from mechicl.prompts.align import align, span_groups
from mechicl.prompts.batch import Batch
from mechicl.prompts.corrupt import Pairs
from mechicl.prompts.episode import Episode
from mechicl.results.nodes import Receiver, Sender, feeds
from mechicl.results.patching import Direction
from mechicl.results.paths import PathEffects

NORMED = "A norm stands between the heads and the stream: a head is exchanged before it, the norm is computed anew, and the heads' parts do not add up."


@guarded
def path_patch(
    model: Any,
    clean: Batch | Pairs | Sequence[Episode],
    corrupt: Batch | Sequence[Episode] | None = None,
    senders: Sequence[Sender | str] | str | None = None,
    receivers: Sequence[Receiver | str] | str | None = None,
    *,
    metric: Metric = "logit_diff",
    direction: Direction | str = "noise",
    freeze: Freeze | str = "all",
    spans: Sequence[str] | str | None = None,
    correction: Correction | str = "holm",
    n_permutations: int = 10_000,
    seed: int = 0,
    batch_size: int = 16,
    task: str = "",
    progress: bool = True,
) -> PathEffects:
    """Exchange one sender's output in what one receiver reads, for every pair of them.

    The receiver reads the start run's stream plus (the sender's output in the other run minus in the start run); its norm is recomputed on that stream. Nobody
    else sees the change; everything after the receiver is computed anew. With grouped-query attention there is one receiver k and one v for each key/value head, so
    that its whole group of heads is affected. The embeddings are one sender, pictures included (DeepStack's later additions count as theirs from the layer that they
    enter). Positions stay together: a sender is exchanged at all of them.

    Read the size of an effect with two things in mind. It is the edge's alone: parts that work together (a conjunction) show little when only one of them is restored,
    so noising finds the edges that are needed and denoising those that suffice. And a change far from anything the model has seen may do more than it would
    within a prompt; compare freeze="heads".

    Args:
        model: A `HookedVLM`, or anything with the surface of `HookedModel`. In families with a norm between heads and stream (Gemma 2 and 3) a head is exchanged before
            that norm, which is then computed anew.
        clean: Pairs, or the clean prompts.
        corrupt: The corrupt prompts, row by row as long; None with Pairs.
        senders: Senders or their names ("embed", "1.3", "mlp 0"); None or "all" for all.
        receivers: Receivers or their names ("q 1.3", "k 1.0", "mlp 1", "logits"); None for the logits (the direct effect), "all" for all: as many runs as there are edges.
        metric: As in `patch`.
        direction: "noise": start clean, take senders from the corrupt run; "denoise": the other way round.
        freeze: "all": the edge itself, everything between sender and receiver keeps its output. "heads": MLPs between them are computed anew.
        spans: Names of groups of tokens (`prompts.align.span_groups`; also by shot) at which receivers see the change; None for all. Keys and values are seen where they
            stand, queries where they ask.
        correction: "holm" (family-wise) or "fdr_bh", over all edges.
        n_permutations: Sign flips drawn for p.
        seed: Of intervals and permutations.
        batch_size: Prompts that are recorded at once.
        task: For the record.
        progress: Show a bar.

    Returns:
        PathEffects.

    Raises:
        OptionError: an option, a sender, a receiver or a span that does not exist.
        EpisodeError: pairs that do not match token for token, or whose runs do not differ in the metric.
        UnsupportedModelError: the family gates its attention, or a part cannot be called by itself; says why.

    Source:
        Wang et al. 2023 (path patching), Goldowsky-Dill et al. 2023. Differs: intervals, permutation p; the strict edge is the default.
    """
    graph = graph_of(model)
    direction, frozen = _choice("direction", direction, Direction), _choice("freeze", freeze, Freeze)
    correction = _choice("correction", correction, Correction)
    if batch_size < 1 or n_permutations < 1:
        raise OptionError(
            f"batch_size and n_permutations must be at least 1; got {batch_size} and {n_permutations}. Choose larger numbers."
        )
    chosen = _named(senders, graph.senders, "sender")
    asked = _named(("logits",) if receivers is None else receivers, graph.receivers, "receiver")
    first, second, how, skipped = sides_of(model, clean, corrupt)
    measured, rows, unscored, notes = contrast(metric, first, second)
    if getattr(model, "not_additive", ""):
        notes.append(NORMED)
    if len(rows) < first.n:
        first, second = first.select(rows), second.select(rows)
    align(first, second, None, names=("clean", "corrupt"))
    where = _where(first, spans)
    size = max(1, batch_size // measured.blocks)
    parts = [list(range(k, min(k + size, first.n))) for k in range(0, first.n, size)]
    edges = sum(feeds(s, r) for s in chosen for r in asked)
    bar = progress_bar(None, total=edges * len(parts), what="patching paths", show=progress)
    raws, ends = [], []
    for part in parts:
        sides = [side if len(parts) == 1 else side.select(part) for side in (first, second)]
        runs, *both = Runs.of(model, measured.take(part), sides[0], sides[1], direction, where)
        raws.append(runs.effects(chosen, asked, frozen, bar.update))
        ends.append(both)
        notes += [note for note in runs.start.notes if note not in notes]
    bar.close()
    options = {"direction": direction, "metric": measured.name, "freeze": freeze, "spans": spans, "correction": correction, "n_permutations": n_permutations,
               "batch_size": batch_size, "pairs": how}  # fmt: skip
    raw, (is_clean, is_corrupt) = np.concatenate(raws), [np.concatenate([pair[k] for pair in ends]) for k in (0, 1)]
    notes += gap_between(is_clean, is_corrupt, measured.unit, seed)
    least = max(1 / (n_permutations + 1), 2.0 ** (1 - len(raw)))
    if correction == "holm" and least * edges > 0.05:
        notes.append(
            f"With {len(raw)} pairs and {n_permutations} permutations no p is below {least:.2g}, so none of {edges} edges can be significant after Holm."
        )
    value, low, high, p = _statistics(raw, is_clean, is_corrupt, direction, n_permutations, seed)
    return PathEffects(
        senders=chosen, receivers=asked, value=value, low=low, high=high, p=p, p_corrected=holm(p) if correction == "holm" else benjamini_hochberg(p),
        raw=raw, clean=is_clean, corrupt=is_corrupt, metric=measured.name, unit=measured.unit, direction=direction, freeze=frozen, pairs=how, n=len(raw),
        provenance=provenance(model, task=task, seed=seed, options=options), correction=correction, skipped=(*skipped, *unscored), notes=tuple(notes),
        places="all positions" if spans is None else spans if isinstance(spans, str) else ", ".join(spans),
    )  # fmt: skip


def _statistics(
    raw: np.ndarray, clean: np.ndarray, corrupt: np.ndarray, direction: str, n_permutations: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Share of the difference with its interval, and p, [sender, receiver]; NaN where there is no edge."""
    gap, start = clean - corrupt, corrupt if direction == "denoise" else clean
    above = raw - corrupt[:, None, None]
    low, high = ratio_interval(above, gap, seed=seed)
    rounding = max(1e-5 * float(np.abs(gap).mean()), 2e-6 * float(np.abs(start).max()))
    p = sign_flip_p(raw - start[:, None, None], n_draws=n_permutations, seed=seed, tie=rounding)
    return above.mean(0) / gap.mean(), low, high, p


def graph_of(model: Any) -> EdgeGraph:
    """The model's graph; also of a family with a norm (but no gate) between heads and stream, which other methods of edges refuse."""
    layers, cfg = range(model.cfg.n_layers), model.cfg
    if getattr(model, "not_additive", "") and all(
        behind_norm(model, k) and f"blocks.{k}.hook_resid_mid" in model.hook_dict for k in layers
    ):
        parts = model.anatomy.layers
        if all((part.n_heads, part.n_key_value_heads) == (cfg.n_heads, cfg.n_key_value_heads) for part in parts):
            return EdgeGraph(cfg.n_layers, cfg.n_heads, cfg.n_key_value_heads, any(part.mlp_out is not None for part in parts))
    return EdgeGraph.of(model)


def _choice(name: str, value: str, allowed: Any) -> Any:
    if value not in get_args(allowed):
        raise OptionError(f"{name} must be one of {', '.join(get_args(allowed))}; got {value!r}. Choose one.")
    return value


def _named(given: Any, existing: tuple[Any, ...], what: str) -> tuple[Any, ...]:
    """Nodes by themselves or by name, in the order of execution."""
    if given is None or given == "all":
        return existing
    given = [given] if isinstance(given, str | Sender | Receiver) else list(given)
    names = {node.name: node for node in existing}
    found = [names.get(one, one) if isinstance(one, str) else one for one in given]
    wrong = [one for one in found if one not in existing]
    if wrong or not found:
        got = repr(wrong[0] if isinstance(wrong[0], str) else wrong[0].name) if wrong else "none"
        raise OptionError(
            f"{what}s must be among the model's {len(existing)} ({existing[0].name} ... {existing[-1].name}); got {got}. See EdgeGraph.of(model)."
        )
    return tuple(node for node in existing if node in found)


def _where(batch: Batch, spans: Sequence[str] | str | None) -> Callable[[Batch], Tensor] | None:
    """From prompts to the tokens of the named groups [batch, pos]; None for all tokens.

    Raises:
        OptionError: `batch` has no such group.
    """
    if spans is None:
        return None
    names = [spans] if isinstance(spans, str) else list(spans)
    groups = {**span_groups(batch, "shot"), **span_groups(batch, "span")}
    wrong = [name for name in names if name not in groups]
    if wrong or not names:
        raise OptionError(
            f"spans must be among {', '.join(groups)}; got {repr(wrong[0]) if wrong else 'none'}. Choose groups that the prompts have."
        )

    def tokens(some: Batch) -> Tensor:
        found = {**span_groups(some, "shot"), **span_groups(some, "span")}
        masks = [found[name] for name in names if name in found]
        return torch.stack(masks).any(0) if masks else torch.zeros(some.n, some.n_pos, dtype=torch.bool)

    return tokens
