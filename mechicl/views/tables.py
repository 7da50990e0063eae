"""Tables: the data of every figure as CSV, and short versions to read."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from mechicl.results import Ablation, Estimate, Head, ICLAccuracy, PromptView
from mechicl.views.overlay import OverlayRow
from mechicl.views.words import name


@dataclass(frozen=True)
class Table:
    """A table to read; `note` says when rows were left out (the CSV has them all)."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def csv_text(frame: pd.DataFrame) -> str:
    """The frame as CSV: every number in full (it reads back to the same float), one line per row."""
    return frame.to_csv(index=False, lineterminator="\n")


def csv_uri(frame: pd.DataFrame) -> str:
    """The frame as a data: address, so that it downloads without a network and without a script."""
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(csv_text(frame).encode()).decode()


def table(frame: pd.DataFrame, limit: int = 40) -> Table:
    """The first rows of a frame, numbers to four digits."""
    rows = tuple(tuple(_cell(v) for v in row) for row in frame.head(limit).itertuples(index=False, name=None))
    note = f"The first {limit} of {len(frame)} rows; the CSV has all." if len(frame) > limit else ""
    return Table(tuple(str(c) for c in frame.columns), rows, note)


def accuracy_frame(accuracy: ICLAccuracy, controls: Mapping[str, Estimate]) -> pd.DataFrame:
    """The numbers of the accuracy figure: one row per way of counting and per control."""
    rows = {"accuracy": accuracy.accuracy, "first_token_accuracy": accuracy.first_token_accuracy, "open_accuracy": accuracy.open_accuracy,
            "cla": accuracy.cla, "margin": accuracy.margin}  # fmt: skip
    rows |= {"zero_shot": accuracy.zero_shot} if accuracy.zero_shot is not None else {}
    return _estimates({**rows, **controls}).assign(chance=accuracy.chance)


def ablation_frame(ablation: Ablation) -> pd.DataFrame:
    """The numbers of the ablation figure: every set of heads, then intact, the random draws' mean and zero-shot."""
    others = {"intact": ablation.intact.accuracy, "random_mean": ablation.random_mean}
    others |= {"zero_shot": ablation.zero_shot} if ablation.zero_shot is not None else {}
    extra = _estimates(others).rename(columns={"measure": "kind", "value": "accuracy"}).drop(columns=["unit", "method"])
    return pd.concat([ablation.to_frame(), extra], ignore_index=True)


def _estimates(rows: Mapping[str, Estimate]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"measure": k, "value": e.value, "low": e.low, "high": e.high, "n": e.n, "unit": e.unit, "method": e.method}
            for k, e in rows.items()
        ]
    )


def prompt_frame(view: PromptView) -> pd.DataFrame:
    """One row per token: what it is, and the last token's attention onto it, a column per head."""
    frame = pd.DataFrame(
        {"position": range(len(view.tokens)), "token": view.tokens, "role": view.roles, "shot": view.shots, "label": view.labels}
    )
    return frame.assign(**{f"head {name(head)}": row for head, row in view.rows.items()})


def pattern_frame(view: PromptView, heads: Sequence[Head], positions: Sequence[int]) -> pd.DataFrame:
    """One row per (head, dest, src) of the drawn tokens that gets a thousandth of a token's attention at least (the others would be most of a report's bytes)."""
    rows = [
        (name(h), d, s, view.tokens[d], view.tokens[s], round(float(view.patterns[h][d, s]), 4))
        for h in heads
        for d in positions
        for s in positions
        if s <= d
    ]
    return pd.DataFrame([row for row in rows if row[-1] >= 0.001], columns=["head", "dest", "src", "dest_token", "src_token", "attention"])  # fmt: skip


def overlay_frame(rows: Sequence[OverlayRow]) -> pd.DataFrame:
    """One row per (head, picture, patch): its box in the picture's pixels and the attention onto it."""
    return pd.DataFrame(
        [(row.head, row.reader, q.index + 1, q.label, p.position, p.left, p.top, p.left + p.width, p.top + p.height, p.share) for row in rows for q in row.pictures for p in q.patches],
        columns=["head", "reader", "picture", "label", "position", "left", "top", "right", "bottom", "attention"],
    )  # fmt: skip


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    return str(value)
