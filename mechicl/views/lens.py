"""Figures of the logit lens, as plain plotly dictionaries: kinds of tokens after every layer, and one prompt token by token.

The arrays in a figure are the arrays of the result, untouched; interval, null and n ride along as `customdata`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mechicl.errors import OptionError
from mechicl.results import LogitLens, PromptLens
from mechicl.views.marks import INTERVAL, axis_of, corners, extra, points, symmetric
from mechicl.views.theme import CHANCE, CHOSEN, DIVERGING, SEQUENTIAL
from mechicl.views.words import ALPHA, Spec, words

_LENS = {
    "margin": "right label minus best wrong one, logits",
    "logprob": "log-probability of the right label, nats (paper: the null's mean)",
    "rank": "rank of the right label in the vocabulary (1 = first)",
}


def _after(layer: int) -> str:
    """A layer as it is named on an axis."""
    return "embed" if layer < 0 else str(layer)


def lens_figure(result: LogitLens) -> Spec:
    """What the stream says after each layer: a table over kinds of tokens, and the last token with its null."""
    rows = [_after(layer) for layer in result.layers]
    margin, rank = result.of == "margin", result.of == "rank"
    shift = 0.0 if margin else float(np.nanmean(result.null))
    half = symmetric(result.value - shift, 0.1)
    hover = (
        f"<b>after layer %{{y}}, %{{x}}</b><br>%{{z:.2f}} {result.unit}<br>{INTERVAL}<br>any candidate as right: %{{customdata[2]:.2f}} "
        f"(%{{customdata[3]:.2f}} to %{{customdata[4]:.2f}})<br>corrected p %{{customdata[5]:.2g}}, n = {result.n}<extra></extra>"
    )
    grid: Spec = {
        "type": "heatmap", "z": result.value, "coloraxis": "coloraxis", "xgap": 2, "ygap": 2, "hoverongaps": False,
        "customdata": extra(result.low, result.high, result.null, result.null_low, result.null_high, result.p_corrected), "hovertemplate": hover, "name": "lens",
    }  # fmt: skip
    if len(rows) <= 40 and len(result.spans) <= 16:
        grid |= {"texttemplate": "%{z:.0f}" if rank else "%{z:.1f}", "textfont": {"size": 10.5}}
    marked = np.argwhere(np.nan_to_num(result.p_corrected, nan=1.0) < ALPHA)
    dots = corners(marked, "better than any candidate")
    side = "last token" if "last token" in result.spans else list(result.spans)[-1]
    j = result.spans.index(side)
    line = points(
        f"{side}, 95 % interval", result.value[:, j], result.low[:, j], result.high[:, j], rows, CHOSEN,
        f"after layer %{{y}}: %{{x:.2f}}<br>{INTERVAL}<extra></extra>", xaxis="x2", yaxis="y2",
    )  # fmt: skip
    line |= {"mode": "lines+markers", "line": {"color": CHOSEN, "width": 1.6}}
    band: Spec = {
        "type": "scatter", "mode": "lines", "x": np.concatenate([result.null_low[:, j], result.null_high[::-1, j]]), "y": [*rows, *rows[::-1]], "fill": "toself",
        "fillcolor": "rgba(184,74,128,0.18)", "line": {"color": CHANCE, "width": 1, "dash": "dot"}, "hoverinfo": "skip", "name": "any candidate as right, 95 %", "xaxis": "x2", "yaxis": "y2",
    }  # fmt: skip
    height = max(360, 230 + max(22, min(34, 800 // len(rows))) * len(rows))
    scale: Spec = {"colorscale": DIVERGING, "cmin": shift - half, "cmax": shift + half, "cmid": shift}
    if rank:
        scale = {
            "colorscale": [[1 - at, colour] for at, colour in reversed(SEQUENTIAL)],
            "cmin": 1,
            "cmax": float(np.nanmax(result.value)),
        }  # less is better
    return {
        "data": [grid, dots, band, line],
        "layout": {
            "title": {
                "text": "<b>Logit lens</b>, the stream after each layer",
                "subtitle": {"text": f"{_LENS[result.of]}, mean of {result.n} episodes · dot: better than with any candidate as right, Holm p < {ALPHA} ({len(marked)} of {result.value.size})"},
            },
            "height": height,
            "xaxis": axis_of(result.spans, domain=[0, 0.66], side="top", tickangle=-35),
            "yaxis": axis_of(rows, down=True, title={"text": "after layer"}),
            "xaxis2": {"domain": [0.78, 1], "anchor": "y2", "title": {"text": f"{side}, {result.unit}"}, "nticks": 5, "zeroline": margin, "type": "log" if rank else "linear"},
            "yaxis2": {"anchor": "x2", "type": "category", "autorange": "reversed", "ticks": "", "categoryarray": rows, "categoryorder": "array"},
            "coloraxis": scale | {"colorbar": {"x": 0.67, "xanchor": "left"}},
            "legend": {"x": 1, "xanchor": "right", "y": -0.02, "yref": "container", "yanchor": "bottom"},
            "margin": {"t": 172, "b": 96},
            "meta": {} if rank else {"scale": "diverging"},
        },
    }  # fmt: skip


def lens_tokens(result: LogitLens, *, positions: Sequence[int] | None = None) -> Spec:
    """One prompt: the margin read at every token after every layer, with the most probable tokens on hover (the first written, where it fits).

    Args:
        result: A lens with its `prompt`.
        positions: Which tokens; None: the last 40 that are no picture's.

    Raises:
        OptionError: no prompt was kept, or it has no such token.
    """
    shown = prompt_of(result)
    view = shown.view
    text = [p for p, role in enumerate(view.roles) if role not in ("image", "pad")][-40:]
    chosen = text if positions is None else list(positions)
    if not chosen or not all(0 <= p < len(view.tokens) for p in chosen):
        raise OptionError(f"positions must be tokens of the prompt, 0..{len(view.tokens) - 1}; got {chosen}. Choose some.")
    z = shown.margin[:, chosen]
    half = symmetric(z, 0.1)
    best = [[shown.tokens[k][p] for p in chosen] for k in range(len(result.layers))]
    listed = [
        ["<br>".join(f"{words(token)!s} {prob:.2f}" for token, prob in zip(tokens, shown.probability[k, p], strict=True)) for p, tokens in zip(chosen, best[k], strict=True)]
        for k in range(len(result.layers))
    ]  # fmt: skip
    ticks = [words(_short(view.tokens[p])) for p in chosen]
    grid: Spec = {
        "type": "heatmap", "z": z, "x": list(range(len(chosen))), "y": [_after(layer) for layer in result.layers], "coloraxis": "coloraxis", "xgap": 1, "ygap": 1,
        "text": [[words(_short(tokens[0])[:4]) for tokens in row] for row in best], "customdata": listed, "name": "tokens",
        "hovertemplate": "<b>after layer %{y}</b>, token %{x}<br>right label's margin %{z:.2f} logits<br>most probable:<br>%{customdata}<extra></extra>",
    }  # fmt: skip
    if len(chosen) <= 42:
        grid |= {"texttemplate": "%{text}", "textfont": {"size": 9.5}}
    return {
        "data": [grid],
        "layout": {
            "title": {
                "text": "<b>Logit lens</b> on one prompt",
                "subtitle": {"text": f"written: the most probable token there; colour: margin of the right label {words(view.answer)!r}, logits · {words(view.episode)}"},
            },
            "height": 220 + 28 * len(result.layers),
            "xaxis": {"tickvals": list(range(len(chosen))), "ticktext": ticks, "tickangle": -60, "showgrid": False, "ticks": "", "title": {"text": "token (the prompt, pictures left out)" if positions is None else "token"}},
            "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False, "ticks": "", "title": {"text": "after layer"}},
            "coloraxis": {"colorscale": DIVERGING, "cmin": -half, "cmax": half, "cmid": 0, "colorbar": {"title": {"text": "logits", "side": "right"}}},
            "margin": {"b": 110},
            "meta": {"scale": "diverging"},
        },
    }  # fmt: skip


def _short(token: str) -> str:
    """A token as people read it: blanks and line breaks visible, a control token without its brackets."""
    text = token.replace("\n", "↵").strip(" ")
    return text.removeprefix("<|").removesuffix("|>") or "␣"


def prompt_of(result: LogitLens) -> PromptLens:
    """The prompt kept with a lens.

    Raises:
        OptionError: none was.
    """
    if result.prompt is None:
        raise OptionError("result must have been made with a prompt to show; got none. Ask for it: logit_lens(..., prompt=0).")
    return result.prompt
