"""What the figures of reading out share: symmetric colour scales, points with intervals, axes of words, dots in the corners of cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mechicl.views.theme import RANDOM
from mechicl.views.words import Spec

INTERVAL = "95 % interval %{customdata[0]:.2f} to %{customdata[1]:.2f}"


def symmetric(values: np.ndarray, least: float = 0.0) -> float:
    """Half-width of a colour scale centred on zero."""
    finite = np.abs(values[np.isfinite(values)])
    return max(float(finite.max(initial=0.0)), least) or 1.0


def extra(*arrays: np.ndarray) -> np.ndarray:
    return np.stack(arrays, -1)


def points(label: str, x: np.ndarray, low: np.ndarray, high: np.ndarray, y: Sequence[Any], colour: str, hover: str, **more: Any) -> Spec:
    """Points with intervals along x."""
    return {
        "type": "scatter", "mode": "markers", "name": label, "x": x, "y": list(y), "customdata": extra(low, high),
        "error_x": {"type": "data", "symmetric": False, "array": high - x, "arrayminus": x - low, "color": colour, "thickness": 1.6, "width": 4},
        "marker": {"color": colour, "size": 9, "symbol": more.pop("symbol", "circle"), "line": {"color": colour, "width": 1.5}}, "hovertemplate": hover, **more,
    }  # fmt: skip


def axis_of(labels: Sequence[str], **more: Any) -> Spec:
    """An axis of words at 0, 1, 2, ..., so that marks can stand in the corners of cells."""
    edge = [-0.5, len(labels) - 0.5]
    return {
        "tickvals": list(range(len(labels))), "ticktext": list(labels), "range": edge[::-1] if more.pop("down", False) else edge, "showgrid": False, "zeroline": False, "ticks": "", **more,
    }  # fmt: skip


def corners(cells: np.ndarray, label: str) -> Spec:
    """Dots in the corners of the cells [n, (row, column)]."""
    return {
        "type": "scatter", "mode": "markers", "x": [j + 0.38 for _, j in cells], "y": [i - 0.32 for i, _ in cells], "hoverinfo": "skip", "showlegend": False, "name": label,
        "marker": {"symbol": "circle", "size": 6, "color": "#111111", "line": {"color": "#ffffff", "width": 1.2}},
    }  # fmt: skip


def written(z: np.ndarray, half: float) -> list[list[str]]:
    """Numbers to be written into cells; those that would read as nothing are left out (they stay on hover)."""
    return [[f"{v:.2f}" if np.isfinite(v) and abs(v) > 0.01 * half else "" for v in row] for row in z]


def zero_line(axis: str = "x") -> Spec:
    return {"type": "line", "xref": axis, "yref": "paper", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "line": {"color": RANDOM, "width": 1}}
