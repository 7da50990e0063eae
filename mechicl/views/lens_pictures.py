"""Numbers per image token over the pictures themselves, below zero and above: the logit lens on patches, a head's scores with patches.

The attention overlays of `overlay` are shares, never negative; here blue is below zero, orange above, clear is zero, and the strongest patches carry their sign.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np

from mechicl.errors import HeadIndexError, OptionError
from mechicl.results import Head, HeadCircuits, LogitLens, PromptView
from mechicl.views.lens import prompt_of
from mechicl.views.overlay import open_picture, pictures
from mechicl.views.theme import CHANCE, CHOSEN, INTACT
from mechicl.views.words import Spec, name, words

CLEAR = [
    [0.0, "rgba(8,48,107,0.8)"], [0.25, "rgba(33,102,172,0.62)"], [0.42, "rgba(103,163,207,0.38)"], [0.5, "rgba(246,245,242,0.04)"],
    [0.58, "rgba(241,154,86,0.38)"], [0.75, "rgba(201,84,15,0.62)"], [1.0, "rgba(122,45,4,0.8)"],
]  # fmt: skip
"""The house's diverging colours, clear at zero."""

SIDE = 128
"""Pixels of a picture in the figure."""

STRONG = 0.5
"""Patches beyond this share of the scale carry a plus or a minus."""

Box = tuple[float, float, float, float]


def _grey(data: bytes) -> tuple[str, int, int]:
    """The picture in grey as a data: address, and its size."""
    picture = open_picture(data).convert("L")
    width, height = picture.size
    if max(picture.size) > 4 * SIDE:
        picture.thumbnail((4 * SIDE, 4 * SIDE))
    elif max(picture.size) < SIDE:  # browsers smooth what they enlarge
        factor = -(-2 * SIDE // max(picture.size))
        picture = picture.resize((width * factor, height * factor), 0)
    out = io.BytesIO()
    picture.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode(), width, height


def patch_table(boxes: Mapping[int, Box], row: np.ndarray) -> tuple[list[float], list[float], np.ndarray, np.ndarray] | None:
    """Patches as a table: edges across, edges down, values [down, across] and their tokens; None where the boxes are no grid (tiles of several sizes)."""
    lefts, tops = sorted({box[0] for box in boxes.values()}), sorted({box[1] for box in boxes.values()})
    if len(lefts) * len(tops) != len(boxes):
        return None
    across, down = [*lefts, max(box[2] for box in boxes.values())], [*tops, max(box[3] for box in boxes.values())]
    values, tokens = np.full((len(tops), len(lefts)), np.nan), np.full((len(tops), len(lefts)), -1)
    for position, box in boxes.items():
        cell = tops.index(box[1]), lefts.index(box[0])
        values[cell], tokens[cell] = row[position], position
    return across, down, values, tokens


def _panel(boxes: Mapping[int, Box], row: np.ndarray, what: str, unit: str, half: float) -> list[Spec]:
    """The patches of one picture, without axes."""
    hover = f"<b>{what}</b><br>token %{{customdata}}: %{{{{z}}}} {unit}<extra></extra>"
    table = patch_table(boxes, row)
    centres = {p: ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for p, box in boxes.items()}
    if table is not None:
        across, down, values, tokens = table
        cells: Spec = {
            "type": "heatmap",
            "x": across,
            "y": down,
            "z": values,
            "customdata": tokens,
            "coloraxis": "coloraxis",
            "hovertemplate": hover.replace("{{z}}", "{z:.2f}"),
        }
    else:
        order = sorted(boxes)
        cells = {
            "type": "scatter", "mode": "markers", "x": [centres[p][0] for p in order], "y": [centres[p][1] for p in order], "customdata": order,
            "marker": {"symbol": "square", "size": 7, "color": row[order], "coloraxis": "coloraxis"}, "hovertemplate": hover.replace("{{z}}", "{marker.color:.2f}"),
        }  # fmt: skip
    strong = [p for p in sorted(boxes) if np.isfinite(row[p]) and abs(row[p]) > STRONG * half]
    signs: Spec = {
        "type": "scatter", "mode": "text", "x": [centres[p][0] for p in strong], "y": [centres[p][1] for p in strong], "text": ["+" if row[p] > 0 else "−" for p in strong],
        "textfont": {"size": 13, "color": "#ffffff"}, "hoverinfo": "skip",
    }  # fmt: skip
    return [cells | {"showlegend": False}, signs | {"showlegend": False}]


def picture_rows(view: PromptView, rows: Sequence[tuple[str, np.ndarray]], *, unit: str, title: str, subtitle: str) -> Spec:
    """The prompt's pictures under each row of numbers.

    Args:
        view: The prompt.
        rows: (name, [pos]) each; NaN is left clear.
        unit: Of the numbers.
        title: Of the figure.
        subtitle: Under it.

    Raises:
        OptionError: no picture has known patches.
    """
    drawn = pictures(view)
    shown = [k for k in range(len(view.images)) if k < len(view.image_boxes) and view.image_boxes[k]]
    if not shown:
        raise OptionError(
            f"the prompt must have pictures with known patches; it has {len(view.images)} pictures. Families without image tokens have none."
        )
    values = np.concatenate([row[sorted(view.image_boxes[k])] for _, row in rows for k in shown])
    finite = values[np.isfinite(values)]
    half = float(np.abs(finite).max(initial=0.0)) or 1.0
    greys = {k: _grey(view.images[k]) for k in shown}
    data: list[Spec] = []
    layout: Spec = {"images": [], "annotations": []}
    wide, tall = 1 / len(shown), 1 / len(rows)
    for i, (label, row) in enumerate(rows):
        for j, k in enumerate(shown):
            number = i * len(shown) + j + 1
            x, y = (f"x{number}", f"y{number}") if number > 1 else ("x", "y")
            uri, width, height = greys[k]
            data += [
                trace | {"xaxis": x, "yaxis": y}
                for trace in _panel(view.image_boxes[k], np.asarray(row), f"{words(label)}, picture {k + 1}", unit, half)
            ]
            none = {"showgrid": False, "zeroline": False, "ticks": "", "showticklabels": False}
            layout["xaxis" + x[1:]] = none | {
                "domain": [j * wide, (j + 0.94) * wide],
                "range": [0, width],
                "anchor": y,
                "constrain": "domain",
            }
            layout["yaxis" + y[1:]] = none | {
                "domain": [1 - (i + 0.94) * tall, 1 - i * tall],
                "range": [height, 0],
                "anchor": x,
                "scaleanchor": x,
                "constrain": "domain",
            }
            layout["images"].append(
                {
                    "source": uri,
                    "xref": x,
                    "yref": y,
                    "x": 0,
                    "y": 0,
                    "sizex": width,
                    "sizey": height,
                    "sizing": "stretch",
                    "layer": "below",
                }
            )
            if i == 0:
                kind = drawn[k].kind
                layout["annotations"].append({
                    "xref": f"{x} domain", "yref": f"{y} domain", "x": 0.5, "y": 1.03, "yanchor": "bottom", "showarrow": False,
                    "text": f"<b>{kind}</b><br>{words(drawn[k].label)}", "font": {"size": 12, "color": {"right": INTACT, "wrong": CHOSEN, "query": CHANCE}[kind]},
                })  # fmt: skip
        layout["annotations"].append({
            "xref": "paper", "yref": "paper", "x": -0.01, "y": 1 - (i + 0.47) * tall, "xanchor": "right", "showarrow": False, "text": words(label), "font": {"size": 12},
        })  # fmt: skip
    return {
        "data": data,
        "layout": layout | {
            "title": {"text": title, "subtitle": {"text": subtitle}},
            "height": 150 + (min(SIDE, 760 // len(shown)) + 12) * len(rows),
            "margin": {"l": 116, "t": 116, "b": 18, "r": 24},
            "coloraxis": {"colorscale": CLEAR, "cmin": -half, "cmax": half, "cmid": 0, "colorbar": {"title": {"text": unit, "side": "right"}}},
            "showlegend": False,
        },
    }  # fmt: skip


def lens_pictures(result: LogitLens, *, layers: Sequence[int] | None = None) -> Spec:
    """The right label's margin read at every image token, on the pictures.

    Args:
        result: A lens with its `prompt`.
        layers: After which layers; None: at most five, spread over the model, the last among them.

    Raises:
        OptionError: no prompt was kept, a layer that was not read, or a prompt without pictures.
    """
    shown = prompt_of(result)
    every = list(result.layers)
    chosen = [every[int(i)] for i in np.unique(np.linspace(0, len(every) - 1, 5).round())] if layers is None else list(layers)
    if missing := [layer for layer in chosen if layer not in every]:
        raise OptionError(f"layers must have been read; got {missing}, there are {every}. Leave them out for a choice.")
    rows = [("embeddings" if layer < 0 else f"after layer {layer}", shown.margin[every.index(layer)]) for layer in chosen]
    return picture_rows(
        shown.view, rows, unit="logits", title="<b>Logit lens</b> on the pictures",
        subtitle=f"margin of the right label {words(shown.view.answer)!r} at each image token · {words(shown.view.episode)}",
    )  # fmt: skip


def score_pictures(result: HeadCircuits, *, heads: Sequence[Head] | None = None) -> Spec:
    """Scores of the last token, and of the query's picture, with every image token, on the pictures; each row from its own mean over image tokens.

    Raises:
        OptionError: the scores were not kept, or the prompt has no pictures.
        HeadIndexError: not for this head.
    """
    if result.view is None or result.scores is None:
        raise OptionError("result must have been made with a prompt to show; got none. Ask for it: head_circuits(..., data, prompt=0).")
    rows: list[tuple[str, np.ndarray]] = []
    tokens = sorted(p for boxes in result.view.image_boxes for p in boxes)
    for head in result.heads[:3] if heads is None else heads:
        if head not in result.scores:
            raise HeadIndexError(f"head must be one whose scores were kept; got {head}, there are {sorted(result.scores)}. Ask for it.")
        for reader, row in zip(("last token", "query image"), result.scores[head], strict=True):
            own = row[tokens] if tokens else row
            if np.isfinite(own).any():
                rows.append((f"{name(head)} {reader}", row - np.nanmean(own)))
    if not rows:
        raise OptionError("the prompt must have pictures to draw scores on; it has none. Draw result.matches[head].")
    return picture_rows(
        result.view, rows, unit="score", title="<b>Which patches heads look for</b>, before the softmax",
        subtitle=f"score with each image token, from its mean over image tokens · {words(result.view.episode)}",
    )  # fmt: skip
