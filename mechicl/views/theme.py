"""The house look: colours that survive colour blindness and grey print, one plotly template for light and one for dark.

Plain dictionaries, so that whoever needs a colour does not import a plotting library.
"""

from __future__ import annotations

from typing import Any

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif'

# Blue (below zero) - paper - orange (above zero): told apart with every common colour deficiency, and by lightness from the middle.
DIVERGING: list[list[Any]] = [
    [0.0, "#08306b"], [0.125, "#2166ac"], [0.25, "#67a3cf"], [0.375, "#bcd7ea"], [0.5, "#f6f5f2"],
    [0.625, "#fbd9b8"], [0.75, "#f19a56"], [0.875, "#c9540f"], [1.0, "#7a2d04"],
]  # fmt: skip
DIVERGING_DARK: list[list[Any]] = [
    [0.0, "#a6d0f2"], [0.125, "#5fa8e0"], [0.25, "#2f73ad"], [0.375, "#24486a"], [0.5, "#20252c"],
    [0.625, "#5c3a1e"], [0.75, "#a85a1c"], [0.875, "#ee8c37"], [1.0, "#ffd3a1"],
]  # fmt: skip
# A share of attention, 0 to 1: one hue, lightness carries the number.
SEQUENTIAL: list[list[Any]] = [[0.0, "#f8f7f4"], [0.15, "#dfe7ef"], [0.4, "#8fb7d8"], [0.7, "#2f79b5"], [1.0, "#08306b"]]
SEQUENTIAL_DARK: list[list[Any]] = [[0.0, "#1d2229"], [0.15, "#24384c"], [0.4, "#2b679b"], [0.7, "#5fa8e0"], [1.0, "#d5e9fa"]]

INTACT = "#2f78bd"
CHOSEN = "#cf5a14"
SINGLE = "#b58900"
RANDOM = "#7d8793"
CONTROL = "#0f8f7e"
CHANCE = "#b84a80"
LINES = ("#2f78bd", "#cf5a14", "#0f8f7e", "#b84a80", "#b58900", "#5b5ea6", "#4d8c2b", "#7d8793")
"""Colours of the lines of a figure, in order; dashes tell them apart as well (`DASHES`)."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid", "dash")

ROLE_COLOURS: dict[str, str] = {
    "right label": "#2f78bd",
    "wrong label": "#cf5a14",
    "image": "#0f8f7e",
    "text": "#4d8c2b",
    "question": "#5b5ea6",
    "instruction": "#b84a80",
    "glue": "#8a929c",
    "pad": "#c5cad0",
}
"""What a token is for -> its colour in the prompt strip. `label` is split by whether it is the answer's."""


NO_TOOLS = ("sendChartToCloud", "lasso2d", "select2d")
"""Tools that plotly would put on a figure and that ours do without, wherever they are shown: one uploads it, two select points, which does nothing."""

DARK_PAPER = "#181c22"


def template(dark: bool = False) -> dict[str, Any]:
    """The plotly layout template: fonts, axes, margins, hover boxes; transparent, so that the page's own paper shows."""
    ink, soft, line, paper = ("#e4e8ee", "#aab3bf", "#3a424d", DARK_PAPER) if dark else ("#1d2530", "#56606d", "#d9dde2", "#ffffff")
    axis = {
        "gridcolor": line, "zerolinecolor": line, "linecolor": soft, "tickcolor": soft, "ticks": "outside", "ticklen": 4,
        "tickfont": {"size": 12, "color": soft}, "title": {"font": {"size": 13, "color": ink}, "standoff": 8}, "automargin": True,
    }  # fmt: skip
    return {
        "layout": {
            "font": {"family": FONT, "size": 13, "color": ink},
            "title": {"x": 0, "xref": "container", "xanchor": "left", "pad": {"l": 12, "t": 12}, "y": 1, "yref": "container", "yanchor": "top",
                      "font": {"size": 16, "color": ink}, "subtitle": {"font": {"size": 13, "color": soft}}},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "colorway": list(LINES),
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top", "font": {"size": 12.5, "color": ink}},
            "hoverlabel": {"bgcolor": paper, "bordercolor": soft, "font": {"family": FONT, "size": 13, "color": ink}, "align": "left"},
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": soft, "activecolor": ink, "remove": list(NO_TOOLS)},
            "sliderdefaults": {"bgcolor": line, "bordercolor": soft, "activebgcolor": soft, "tickcolor": soft, "font": {"size": 12, "color": soft},
                               "currentvalue": {"font": {"size": 14, "color": ink}}},
            "annotationdefaults": {"font": {"size": 12, "color": soft}},
            "coloraxis": {"colorbar": {"outlinewidth": 0, "thickness": 12, "tickfont": {"size": 11.5, "color": soft}, "ticklen": 3}},
            "margin": {"l": 64, "r": 24, "t": 76, "b": 56},
        }
    }  # fmt: skip
