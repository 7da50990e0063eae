"""`plot(result)`: one figure for each kind of result, in one house style. The one home of plotly.

    plot(scores)                      # every score, small grids
    plot(scores["induction"])         # one score, with the ranking
    plot(ablation), plot(curve), plot(accuracy), plot(roles), plot(series)
    plot(bands), plot(emergence), plot(correlations), plot(forest), plot(knock_outs)       # over many trainings
    plot(patched), plot(patched, site="z"), plot(attribution), plot(transplant)           # activations exchanged
    plot(paths), plot(edge_scores), plot(cuts), plot(circuit), plot(circuit_curve), plot(overlap)      # edges and circuits
    plot(shift), plot(similarity), plot(shares), plot(conditions), plot(mixed)             # keys and values: what an example changes
    plot(written)                                                                          # a benchmark's answers over shots
    plot(margin), plot(margin_effect), plot(contrast_map), plot(strategies)
    plot(comparison), plot(improvement), plot(checkpoints)                                # two models; one along its checkpoints
    plot(view), plot(view, head=(3, 0))                                                    # one head's attention on one prompt
    plot_sweep(table, x="K", y="accuracy_ic", color="positions")

A figure is returned, never shown or written. Its arrays are the result's arrays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, singledispatch
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from mechicl import results
from mechicl.errors import OptionError
from mechicl.results import Attribution, Estimate, FactorShares, Head, HeadCircuits, LogitLens, PatchEffects, PromptView
from mechicl.views import (
    circuit_panels,
    circuits,
    comparison,
    curves,
    edges,
    factors,
    grids,
    head_parts,
    heads_at_odds,
    lens,
    lens_pictures,
    link,
    link_circuit,
    logit_parts,
    margins,
    moves,
    patching,
    protocol,
    shift,
    strategies,
    sweeps,
    theme,
    trainings,
    written,
)
from mechicl.views.words import Spec

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["figure_json", "javascript", "plot", "plot_pattern", "plot_sweep"]


def _figure(spec: Spec, dark: bool = False) -> go.Figure:
    """The specification as a checked figure in the house template. Text from data is shown as text: plotly's own markup is switched off by escaping."""
    figure = go.Figure(curves.as_plain(spec))
    template = theme.template(dark)
    if dark:
        template["layout"]["paper_bgcolor"] = theme.DARK_PAPER  # alone, without one of our pages behind it, it must be readable too
    figure.update_layout(template=go.layout.Template(template))
    if dark:
        scales = {"diverging": theme.DIVERGING_DARK, "sequential": theme.SEQUENTIAL_DARK}
        scale = scales.get((spec["layout"].get("meta") or {}).get("scale", ""))
        if scale:
            figure.update_layout({axis: {"colorscale": scale} for axis in spec["layout"] if re.fullmatch(r"coloraxis\d*", axis)})
    return figure


@singledispatch
def plot(result: Any, **options: Any) -> go.Figure:
    """The figure of a result.

    Args:
        result: A result of `mechicl.results`.
        options: What the kind of result offers: `dark=True` everywhere; `n_key_value_heads`, `top` (Score); `heads`, `limit` (RoleAttention);
            `controls` (ICLAccuracy); `singles` (Ablation); `columns` (HeadScores); `changes`, `log` (Bands); `top` (Correlations, Forest);
            `site`, `sites`, `columns` (PatchEffects, Attribution); `max_edges` (CircuitCurve); `top` (LogitAttribution); `show`, `positions`, `layers`
            (LogitLens); `head`, `pictures` (HeadCircuits); `measure` (KVShift); `show`, `spans` (FactorShares);
            `head`, `positions` (PromptView, by default the first head that was kept).

    Returns:
        A plotly figure; its arrays are the result's arrays.

    Raises:
        OptionError: nothing is known about drawing such an object.
    """
    raise OptionError(f"result must be a result of mechicl.results; got {type(result).__name__}. Pass what an analysis returned.")


DRAWN: dict[type, Callable[..., Spec]] = {
    results.Score: grids.score_grid,
    results.HeadsAtOdds: heads_at_odds.odds,
    results.HeadScores: grids.score_grids,
    results.RoleAttention: grids.role_grid,
    results.ICLAccuracy: curves.accuracy_rows,
    results.Ablation: curves.ablation_rows,
    results.DoseCurve: curves.dose_lines,
    results.Series: curves.growth_lines,
    results.Bands: trainings.growth_bands,
    results.Emergence: trainings.emergence_rows,
    results.Correlations: trainings.correlation_rows,
    results.Forest: trainings.forest_rows,
    results.KnockOutTable: trainings.knock_out_rows,
    results.Transplant: moves.transplant_rows,
    results.FunctionVector: moves.function_vector_lines,
    results.SpanKnockOuts: moves.knock_out_pairs,
    results.PathEffects: edges.edge_grid,
    results.EdgeScores: edges.edge_grid,
    results.Circuit: circuits.circuit_graph,
    results.CircuitCurve: circuits.circuit_slider,
    results.CircuitOverlap: circuit_panels.overlap_rows,
    results.LogitAttribution: logit_parts.attribution_figure,
    results.QKMatch: head_parts.match_figure,
    results.KVShift: shift.shift_maps,
    results.SimilarityTest: shift.similarity_rows,
    results.ConditionTable: factors.condition_rows,
    results.MixedEffects: factors.mixed_rows,
    results.ContrastMargin: margins.margin_maps,
    results.MarginEffect: margins.dose_curve,
    results.ContrastMap: margins.map_rows,
    results.LinkScores: link.link_lines,
    results.LinkPrior: link.prior_lines,
    results.LinkCircuit: link_circuit.circuit_rows,
    results.BuildOrSharpen: link_circuit.build_rows,
    results.LinkPriors: link_circuit.priors_lines,
    results.Strategies: strategies.strategy_rows,
    results.KnockOuts: protocol.knock_out_panels,
    results.RankingMatch: protocol.ranking_points,
    results.Tuning: protocol.tuning_rows,
    results.WrittenAnswers: written.written_lines,
    results.Comparison: comparison.comparison_panels,
    results.HeadsImprove: comparison.improvement_rows,
    results.CheckpointSeries: comparison.checkpoint_panels,
}
"""Kind of result -> the function that lays its figure out. Its keyword options are those of `plot`, beside `dark`."""


def _drawn_by(lay_out: Callable[..., Spec]) -> Callable[..., go.Figure]:
    def drawn(result: Any, *, dark: bool = False, **options: Any) -> go.Figure:
        return _figure(lay_out(result, **options), dark)

    return drawn


for _kind, _lay_out in DRAWN.items():
    plot.register(_kind, _drawn_by(_lay_out))


@plot.register(PatchEffects)
@plot.register(Attribution)
def _(
    result: PatchEffects | Attribution, *, site: str | None = None, sites: Sequence[str] | None = None, columns: int | None = None, dark: bool = False
) -> go.Figure:  # fmt: skip
    spec = patching.patch_site(result, site) if site is not None else patching.patch_grids(result, sites=sites, columns=columns)
    return _figure(spec, dark)


@plot.register
def _(
    result: LogitLens,
    *,
    show: str = "table",
    positions: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    dark: bool = False,
) -> go.Figure:
    if show not in ("table", "tokens", "pictures"):
        raise OptionError(f"show must be table, tokens or pictures; got {show!r}. Pick one.")
    if show == "table":
        return _figure(lens.lens_figure(result), dark)
    return _figure(
        lens.lens_tokens(result, positions=positions) if show == "tokens" else lens_pictures.lens_pictures(result, layers=layers), dark
    )


@plot.register
def _(result: HeadCircuits, *, head: Head | None = None, pictures: bool = False, dark: bool = False) -> go.Figure:
    if pictures:
        return _figure(lens_pictures.score_pictures(result, heads=None if head is None else [head]), dark)
    return _figure(head_parts.circuits_figure(result, head=head), dark)


@plot.register
def _(result: FactorShares, *, show: str = "plane", spans: Sequence[str] | None = None, dark: bool = False) -> go.Figure:
    if show not in ("plane", "shares", "answers"):
        raise OptionError(f"show must be plane, shares or answers; got {show!r}. Pick one.")
    if show == "plane":
        return _figure(factors.plane(result, spans=spans), dark)
    return _figure(factors.share_maps(result) if show == "shares" else factors.answer_rows(result), dark)


def plot_sweep(
    table: pd.DataFrame,
    x: str,
    y: str | Sequence[str] = "accuracy_ic",
    *,
    color: str | None = None,
    facet: str | None = None,
    step: int | None = None,
    log_x: bool = True,
    title: str = "",
    levels: Mapping[str, float] | None = None,
    dark: bool = False,
) -> go.Figure:
    """A sweep's results over one setting: mean over runs with the band of its interval, and every run as a dot.

    Args:
        table: A sweep's table, or rows of it. Rows that differ in settings other than x, color and facet are averaged: choose them before.
        x: The setting along the axis; logarithmic where it is numbers above zero, unless `log_x` is False.
        y: The measure, or several: a line each.
        color: A setting: a line for each of its values.
        facet: A setting: a panel for each of its values.
        step: Each run as it was at its last measured step up to this one; None: at its end.
        title: In place of the one made of the names.
        levels: Horizontal lines, such as {"copying any label": 0.52}.
        dark: For a dark page.

    Raises:
        OptionError: a column that the table does not have, or no rows.
    """
    from mechicl.analysis.trainings.bands import at_step, runs_estimate

    names = [y] if isinstance(y, str) else list(y)
    sweeps.check_columns(table, [x, color, facet, *names, "step"])
    rows = at_step(table, step)
    percent = all(name.startswith(("accuracy", "cla")) for name in names)
    positive = log_x and bool((rows[x] > 0).all() if rows[x].dtype.kind in "iuf" else False)

    def stat(values: np.ndarray) -> Estimate:
        return runs_estimate(values, unit="probability" if percent else "measure")

    return _figure(
        sweeps.sweep_lines(rows, x, names, color, facet, stat, log_x=positive, percent=percent, title=title, levels=levels or {}), dark
    )


@plot.register
def _(result: PromptView, *, head: Head | None = None, positions: Sequence[int] | None = None, dark: bool = False) -> go.Figure:
    """The pattern of one of its heads, by default the first that was kept."""
    if not result.patterns:
        raise OptionError(
            f"result must hold the pattern of a head; this prompt view holds none ({len(result.tokens)} tokens). "
            "Make it with heads=[(layer, head)] and pattern_limit of at least its tokens."
        )
    return plot_pattern(result, next(iter(result.patterns)) if head is None else head, positions=positions, dark=dark)


def plot_pattern(view: PromptView, head: Head, *, positions: Sequence[int] | None = None, dark: bool = False) -> go.Figure:
    """One head's attention pattern on one prompt, for prompts too long for the token view.

    Raises:
        OptionError: the prompt view holds no pattern of that head.
    """
    if head not in view.patterns:
        raise OptionError(
            f"head must be one of the patterns that were kept; got {head}, kept {sorted(view.patterns)}. Ask for it when the prompt view is made."
        )
    hover = dict(enumerate(view.roles))
    return _figure(grids.pattern_grid(np.asarray(view.patterns[head]), view.tokens, head=head, positions=positions, hover=hover), dark)


def figure_json(figure: go.Figure) -> dict[str, Any]:
    """The figure's data and layout without its template (a page carries the template once, not per figure)."""
    whole = json.loads(figure.to_json() or "{}")
    whole["layout"].pop("template", None)
    return {"data": whole["data"], "layout": whole["layout"]}


@lru_cache(maxsize=1)
def javascript() -> str:
    """plotly.js, to be inlined once per page."""
    return get_plotlyjs()
