"""The folder of a fine-tuning: opened, finished, read.

out/config.json            what was asked for; a run with another configuration is refused
out/metrics.jsonl          loss, learning rate and norm of the gradient of every step; measures at chosen steps
out/state.safetensors      the weights that move and the optimizer's moments, to be continued from
out/growth.json            the measures as a Series
out/adapter/               LoRA adapters in peft's format: `mechicl.load(out / "adapter")` merges them into the base model
out/model/                 the whole model as a Hugging Face folder (without LoRA, or with `merged`)
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mechicl.analysis.trainings.growth import load_series, save_series
from mechicl.errors import OptionError
from mechicl.models.adapters import CONFIG, WEIGHTS, adapter_json, adapter_tensors, merged_copy
from mechicl.models.vlm import HookedVLM
from mechicl.results import Series
from mechicl.training.adapting import measure as adapt_measure
from mechicl.training.adapting.loop import Loop
from mechicl.training.adapting.measure import Probe
from mechicl.training.organisms import save as save_folder
from mechicl.training.runs import CONFIG as RUN_CONFIG
from mechicl.training.runs import Run, read_json, write_tensors, write_text

KIND = "fine-tuning"


ADAPTER, MODEL, GROWTH = "adapter", "model", "growth.json"


@dataclass(frozen=True, eq=False)
class AdaptRun:
    """A finished fine-tuning.

    Attributes:
        folder: The run's folder.
        table: One row per step: step, loss (nats per answer token), lr, gradient (norm before clipping), tokens (of answers).
        growth: Measures along the steps; None without a probe.
        adapter: Folder of LoRA adapters, or None.
        model: Folder of the whole model, or None.
    """

    folder: Path
    table: pd.DataFrame
    growth: Series | None = None
    adapter: Path | None = None
    model: Path | None = None

    @property
    def result(self) -> Path:
        """What `mechicl.load` takes: the whole model where there is one, else the adapters."""
        found = self.model or self.adapter
        assert found is not None
        return found

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> AdaptRun:
        """Read a fine-tuning from its folder.

        Raises:
            CheckpointError: it is not one's.
            OptionError: the run has not ended: resume it.
        """
        path = Path(folder)
        if read_json(path / RUN_CONFIG).get("kind") != KIND:
            raise OptionError(f"folder must be a fine-tuning's; {path} holds another kind of run. Pass what `adapt` wrote.")
        adapter, model = (path / name if (path / name).is_dir() else None for name in (ADAPTER, MODEL))
        if adapter is None and model is None:
            raise OptionError(f"folder must hold a finished fine-tuning; {path} does not. Continue it with resume=True.")
        curve = load_series(path / GROWTH) if (path / GROWTH).exists() else None
        rows = [line for line in Run(path).lines() if "loss" in line]
        return cls(path, pd.DataFrame(rows), curve, adapter, model)


def begin(out: str | os.PathLike[str], config: Mapping[str, Any], accelerator: Any, *, resume: bool) -> Run:
    """Open the run's folder: the first process decides, the others follow."""
    if accelerator.is_main_process:
        run = Run.open(out, config, resume=resume)
        found = run.take()
        run.trim(-1 if found is None else int(found[1]["step"]))
    accelerator.wait_for_everyone()
    return Run(Path(out))


def finish(loop: Loop, adapted: Any, model: HookedVLM, probe: Probe | None, *, whole: bool, lora: bool) -> None:
    """Write the growth curve, the adapters, the model."""
    folder = loop.run.folder
    if probe is not None:
        made = adapt_measure.made_by(model, probe, "held-out probe episodes")
        curve = adapt_measure.growth(loop.run.lines(), made, len(probe.episodes))
        if curve is not None:
            save_series(curve, folder / GROWTH)
    model.hf.eval()
    if lora:
        with replaced(folder / ADAPTER) as path:
            write_tensors(path / WEIGHTS, adapter_tensors(adapted), {"format": "pt"})
            write_text(path / CONFIG, adapter_json(adapted))
    if whole:
        with replaced(folder / MODEL) as path:
            save_folder(merged_copy(adapted) if lora else model.hf, model.processor, path)


class replaced:
    """A folder that is written under a temporary name and takes its place when it is whole."""

    path: Path
    part: Path

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, path.with_name(path.name + ".part")

    def __enter__(self) -> Path:
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir(parents=True)
        return self.part

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            shutil.rmtree(self.path, ignore_errors=True)
            self.part.replace(self.path)
