"""What the study would take: one batch of episodes is timed in each kind of pass, and multiplied."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from mechicl.analysis.ablation.switches import Switches
from mechicl.analysis.heads.published import published_scores
from mechicl.analysis.heads.scoring import score_heads
from mechicl.analysis.labels import answer
from mechicl.prompts.episode import Episode
from mechicl.results import StudyCost
from mechicl.studies.huang2026_heads import OURS, rank_heads
from mechicl.studies.huang2026_sets import plan_sets

if TYPE_CHECKING:
    from mechicl.studies.huang2026 import Options

BACKWARD = 3.0
"""A training step against a forward pass of the same tokens; measured where gradients run would cost memory that a preview should not take."""


def cost(model: Any, episodes: Sequence[Episode], options: Options, batch_size: int) -> StudyCost:
    """Time a few episodes and say what all would take.

    Args:
        model: The loaded model.
        episodes: The study's.
        options: What it does.
        batch_size: Prompts per forward pass.
    """
    few = list(episodes[: min(len(episodes), batch_size, 4)])
    n = len(few)
    _reset()
    heads = rank_heads(model, few, n_null=1, batch_size=batch_size, progress=False)  # also warms up
    rows = _timed(lambda: published_scores(model, few, batch_size=batch_size)) / n
    ours = _timed(lambda: score_heads(model, few, scores=OURS, n_null=1, batch_size=batch_size, progress=False)) / n
    some = plan(model, heads, options)
    sets = some.sets
    first, further = _knock_outs(model, few, sets[:3])
    n_knock = options.episodes * (len(sets) + 2)
    found: list[tuple[str, int, float]] = [
        ("published head scores", options.rank, options.rank * rows),
        ("our head scores and attention by role", 2 * options.rank, 2 * options.rank * ours),
        (f"knock-outs: {len(sets) - 1} sets of heads, 2 controls", n_knock, options.episodes * (3 * first + (len(sets) - 1) * further)),
    ]
    notes = [
        "Nulls and intervals, a few seconds to a minute, come on top.",
        "Knock-outs may take less: layers below a set's first one are left out where the model can be run so.",
    ]
    if "lora" not in options.skip:
        lora = options.lora
        measured = len(lora.points) * lora.held_out
        found.append((f"fine-tuning, {lora.steps} steps", lora.steps * lora.batch, lora.steps * lora.batch * BACKWARD * first))
        found.append((f"heads along it, {len(lora.points)} times", measured, measured * (rows + ours + first)))
        notes.append(f"A training step is counted as {BACKWARD:.0f} forward passes; its memory is not in the peak.")
    return StudyCost(tuple(found), _peak(), str(model.describe().get("device", "cpu")), n, tuple(notes))


def _knock_outs(model: Any, few: Sequence[Episode], sets: Sequence[Any]) -> tuple[float, float]:
    """Seconds an episode of the first set of heads, which sees the pictures, and of each further one, which does not."""

    def seconds(some: Sequence[Any]) -> float:
        switches = Switches.build(model, few, some, "zero", seed=0, batch_size=len(few))
        return _timed(lambda: answer(model, few, switches=switches, batch_size=len(few))) / len(few)

    answer(model, few[:1], batch_size=1)  # how this model can be run is tried once
    first, all_of_them = seconds(sets[:1]), seconds(sets)
    further = (all_of_them - first) / max(1, len(sets) - 1)
    return first, further if further > 0 else first  # timings of a moment may be out of order


def plan(model: Any, heads: Any, options: Options) -> Any:
    """The sets that the study would switch off; which heads they hold does not matter here."""
    from mechicl.studies.huang2026 import rankings, top_of

    return plan_sets(
        model, rankings(heads, ours="ours" not in options.skip), top=top_of(model, options), n_random=options.n_random,
        dose=() if "dose" in options.skip else ("PH", "IH"), dose_draws=options.dose_draws, seed=options.seed,
    )  # fmt: skip


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _reset() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak() -> float:
    """GiB: on a GPU what torch took at most, all devices together; else this process's largest resident memory."""
    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
