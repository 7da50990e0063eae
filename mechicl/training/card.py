"""The model card of an organism: measured numbers with their intervals and controls, written into its folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from mechicl.data import concepts, digits
from mechicl.prompts.episode import Episode
from mechicl.prompts.render import Renderer
from mechicl.results import Estimate
from mechicl.training.evaluate import Outcome, answer, deal_labels, without_shots
from mechicl.training.runs import write_text

EVALUATION = "evaluation.json"
Source = Literal["concepts", "digits"]
DRAW: Mapping[Source, Callable[..., list[Episode]]] = {"concepts": concepts.draw, "digits": digits.draw}


@dataclass(frozen=True)
class Setting:
    """A kind of episodes; `seed` is used nowhere else."""

    source: Source
    classes: int
    shots: int
    size: int = 28
    instructed: bool = True
    alike: bool = False

    @property
    def name(self) -> str:
        """Such as "held-out concepts, 4 classes x 2 shots, 28 px"."""
        what = "held-out concepts" if self.source == "concepts" else "real digits"
        kind = " of one kind" if self.alike else ""
        bare = "" if self.instructed else ", no instruction"
        return f"{what}{kind}, {self.classes} classes x {self.shots} shot{'s' * (self.shots > 1)}, {self.size} px{bare}"

    def episodes(self, n: int, seed: int = 2026) -> list[Episode]:
        """n episodes that no training or probe has drawn."""
        options: dict[str, Any] = {} if self.instructed else {"instruction": "", "question": ""}
        if self.alike:
            options["alike"] = True
        return DRAW[self.source](n, classes=self.classes, shots=self.shots, size=self.size, seed=seed, **options)


SETTINGS = (
    Setting("concepts", 4, 2),
    Setting("concepts", 8, 1),
    Setting("concepts", 4, 2, size=56),
    Setting("concepts", 8, 1, size=56),
    Setting("concepts", 4, 2, alike=True),
    Setting("concepts", 4, 2, instructed=False),
    Setting("concepts", 2, 4),
    Setting("concepts", 2, 2, size=112),
    Setting("digits", 4, 2),
    Setting("digits", 4, 2, size=56),
    Setting("digits", 2, 4),
    Setting("digits", 8, 1),
)


def evaluate(
    folder: str | os.PathLike[str], *, n: int = 256, settings: tuple[Setting, ...] = SETTINGS, progress: bool = True
) -> dict[str, Any]:
    """Measure a folder through the Auto classes, every setting with both controls, and write `evaluation.json` beside the weights.

    Returns:
        For each setting its name and, for "examples", "zero-shot" and "labels dealt out at random", the outcome.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    renderer = Renderer(AutoProcessor.from_pretrained(folder), model.config)
    table: dict[str, Any] = {}
    for setting in tqdm(settings, disable=not progress, unit="setting"):
        episodes = setting.episodes(n)
        runs = {"examples": episodes, "zero-shot": without_shots(episodes), "labels dealt out at random": deal_labels(episodes)}
        table[setting.name] = {name: asdict(answer(model, renderer, few)) for name, few in runs.items()}
    write_text(Path(folder) / EVALUATION, json.dumps(table, indent=1) + "\n")
    return table


def outcome(row: Mapping[str, Any]) -> Outcome:
    """An outcome from its JSON."""
    return Outcome(**{name: Estimate(**value) for name, value in row.items()})


def to_markdown(table: Mapping[str, Mapping[str, Any]]) -> str:
    """The evaluation as a Markdown table: accuracy among the candidates with its Wilson interval, controls beside it."""
    lines = [
        "| episodes | n | right | 95 % interval | written by greedy decoding | first token copies a label | zero-shot | labels dealt out at random |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in table.items():
        main, zero, dealt = (outcome(row[key]) for key in ("examples", "zero-shot", "labels dealt out at random"))
        a = main.accuracy
        lines.append(
            f"| {name} | {a.n} | {a.value:.3f} | {a.low:.3f} to {a.high:.3f} | {main.greedy.value:.3f} | {main.cla.value:.3f} "
            f"| {zero.accuracy.value:.3f} | {dealt.accuracy.value:.3f} |"
        )
    return "\n".join(lines) + "\n"
