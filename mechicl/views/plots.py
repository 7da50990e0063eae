"""`plot(result)`: one figure for each kind of result, in one house style. The one home of plotly.

    plot(scores)                      # every score, small grids
    plot(scores["induction"])         # one score, with the ranking
    plot(ablation), plot(curve), plot(accuracy), plot(roles), plot(series)

A figure is returned, never shown or written. Its arrays are the result's arrays.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache, singledispatch
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from mechicl.errors import OptionError
from mechicl.results import Ablation, DoseCurve, Head, HeadScores, ICLAccuracy, PromptView, RoleAttention, Score, Series
from mechicl.views import curves, grids, theme

__all__ = ["figure_json", "javascript", "plot", "plot_pattern"]


def _figure(spec: grids.Spec, dark: bool = False) -> go.Figure:
    """The specification as a checked figure in the house template. Text from data is shown as text: plotly's own markup is switched off by escaping."""
    figure = go.Figure(curves.as_plain(spec))
    figure.update_layout(template=go.layout.Template(theme.template(dark)))
    if dark:
        scales = {"diverging": theme.DIVERGING_DARK, "sequential": theme.SEQUENTIAL_DARK}
        scale = scales.get((spec["layout"].get("meta") or {}).get("scale", ""))
        if scale:
            figure.update_layout(coloraxis_colorscale=scale)
    return figure


@singledispatch
def plot(result: Any, **options: Any) -> go.Figure:
    """The figure of a result.

    Args:
        result: A result of `mechicl.results`.
        options: What the kind of result offers: `dark=True` everywhere; `n_key_value_heads`, `top` (Score); `heads`, `limit` (RoleAttention);
            `controls` (ICLAccuracy); `singles` (Ablation); `columns` (HeadScores).

    Returns:
        A plotly figure; its arrays are the result's arrays.

    Raises:
        OptionError: nothing is known about drawing such an object.
    """
    raise OptionError(f"result must be a result of mechicl.results; got {type(result).__name__}. Pass what an analysis returned.")


@plot.register
def _(result: Score, *, n_key_value_heads: int | None = None, top: int | None = None, dark: bool = False) -> go.Figure:
    return _figure(grids.score_grid(result, n_key_value_heads=n_key_value_heads, top=top), dark)


@plot.register
def _(result: HeadScores, *, columns: int = 3, dark: bool = False) -> go.Figure:
    return _figure(grids.score_grids(result, columns=columns), dark)


@plot.register
def _(result: RoleAttention, *, heads: Sequence[Head] | None = None, limit: int = 40, dark: bool = False) -> go.Figure:
    return _figure(grids.role_grid(result, heads=heads, limit=limit), dark)


@plot.register
def _(result: ICLAccuracy, *, controls: Any = None, dark: bool = False) -> go.Figure:
    return _figure(curves.accuracy_rows(result, controls=controls), dark)


@plot.register
def _(result: Ablation, *, singles: int = 12, dark: bool = False) -> go.Figure:
    return _figure(curves.ablation_rows(result, singles=singles), dark)


@plot.register
def _(result: DoseCurve, *, dark: bool = False) -> go.Figure:
    return _figure(curves.dose_lines(result), dark)


@plot.register
def _(result: Series, *, dark: bool = False) -> go.Figure:
    return _figure(curves.growth_lines(result), dark)


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
