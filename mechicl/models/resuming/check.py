"""Whether a Hugging Face model can be resumed: its recorded run, resumed without any edit in each way that will be used, must give its logits again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from mechicl.models.check import tolerance
from mechicl.models.hooked import active
from mechicl.models.resuming.hf import VLMRunner, arguments
from mechicl.models.resuming.run import Pass

ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)
"""What a layer may raise when it is called in a way its authors did not foresee."""


@dataclass
class Verdict:
    """What a model can do, found on its first run of a kind."""

    resumes: bool = True
    prefix: bool = True
    trim: bool = True
    not_inside: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()


_VERDICTS: WeakKeyDictionary[nn.Module, dict[Any, Verdict]] = WeakKeyDictionary()


def judge(model: Any, runner: VLMRunner, starts: Sequence[int]) -> Verdict:
    """What the model can do; found once for every kind of run (not remembered while hooks of the caller change the run)."""
    verdicts, kind = _VERDICTS.setdefault(model, {}), _kind(runner)
    if kind in verdicts:
        return verdicts[kind]
    verdict = _check(model, runner, starts)
    if not any(active(point) for point in model.hook_dict.values()):
        verdicts[kind] = verdict
    return verdict


def _kind(runner: VLMRunner) -> Any:
    """What decides whether one run is like another: which layers ran, with which arguments, shared or not."""
    found = []
    for called in runner.calls:
        found.append(None if called is None else tuple((path, tuple(s == 1 for s in x.shape), x.dtype) for path, x in arguments(called)))
    return len(runner.positions) == 1, tuple(found)


def _check(model: Any, runner: VLMRunner, starts: Sequence[int]) -> Verdict:
    """Resume the recorded run without any edit, in each way it will be used, and compare with what was recorded."""
    limit = tolerance(model.hf.dtype)
    n_pos, last = len(starts), starts[-1]
    verdict = Verdict()

    def off(start: int) -> str:
        stream = runner.pre[0][:, start:].repeat_interleave(2, 0)
        try:
            with torch.no_grad(), model.hooks_off():
                logits = runner.run(Pass(0, "pre", start, stream, 2))
        except ERRORS as error:
            return f"{type(error).__name__} when its layers are called by themselves"
        want = runner.recorded_logits.repeat_interleave(2, 0)
        gap = float((logits.float() - want.float()).abs().max()) / (float(want.float().std()) or 1.0)
        return "" if gap <= limit else f"logits differ by {gap:.2g} of their spread"

    if reason := off(0):
        runner.trim = verdict.trim = False
        if reason := off(0):
            return Verdict(resumes=False, notes=(full_note(model, reason),))
    for start in {last, starts[n_pos // 2], starts[max(0, n_pos - 30)]} - {0}:
        if verdict.prefix and (reason := off(start)):
            verdict.prefix = False
            verdict.notes += (f"keys and values of earlier positions are not reused on {model.cfg.model_type}: {reason}.",)
    verdict.not_inside = frozenset(layer for layer in range(runner.n_layers) if not _inside(model, runner, layer, limit))
    return verdict


@torch.no_grad()
def _inside(model: Any, runner: VLMRunner, layer: int, limit: float) -> bool:
    """Whether a layer entered at its heads' outputs gives what it gave."""
    part = model.anatomy.layers[layer]
    if not runner.enters_inside(layer) or part.o_proj is None or f"blocks.{layer}.attn.hook_z" not in model.hook_dict:
        return False
    extra = runner.additions[layer + 1]
    want = runner.pre[layer + 1] if extra is None else runner.pre[layer + 1] - extra
    try:
        job = Pass(layer, "z", 0, runner.z(layer), 1)
        with runner.connected(job):
            given = runner.rest(layer, job.stream, job)
    except ERRORS:
        return False
    return float((given.float() - want.float()).abs().max()) <= limit * (float(want.float().std()) or 1.0)


def full_note(model: Any, reason: str) -> str:
    return f"{model.cfg.model_type} cannot be resumed ({reason}): every cell is a full run."
