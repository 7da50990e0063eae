"""`spread`: an analysis whose episodes are shared by several workers, each with the model on a device of its own.

    spread("score_heads", episodes, model="Qwen/Qwen2.5-VL-7B-Instruct", device="cuda", workers=4, out="runs/heads")

Finished shards are kept in `out`: after a killed worker Ray starts it again with its shard; after a killed driver the same call goes on with what is missing.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mechicl.analysis.spread.crew import Call, Crew, Hands
from mechicl.analysis.spread.work import WORK, Part, about
from mechicl.errors import OptionError
from mechicl.prompts.episode import Episode

JOBS: Mapping[str, str] = {
    "score_heads": "mechicl.analysis.heads.scoring", "attention_by_role": "mechicl.analysis.heads.scoring", "icl_accuracy": "mechicl.analysis.icl",
    "ablate": "mechicl.analysis.ablation.ablate", "dose_curve": "mechicl.analysis.ablation.ablate",
}  # fmt: skip
"""Analyses that can be spread, and where they live."""


class Here(Hands):
    """The work done in this process, shard after shard, by a model that is already there."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def about(self) -> dict[str, Any]:
        return about(self.model)

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Part]]:
        for index, call in enumerate(calls):
            yield index, WORK[call.what](self.model, call.episodes, **call.options)


def hire(
    model: Any = "demo", *, workers: int = 1, address: str | None = None, threads: int = 1, shard: int = 16,
    out: str | os.PathLike[str] | None = None, **source: Any,
) -> Crew:  # fmt: skip
    """A crew that stands in for a model in any analysis that `JOBS` names: `with hire("demo", workers=2) as crew: score_heads(crew, episodes)`.

    Args:
        model: What `mechicl.load` takes: each worker loads it; with no workers also a model that is already loaded.
        workers: Processes; 0: this one, without Ray.
        address: A Ray cluster ("auto", host:port, "ray://host:port"); None starts Ray on this machine.
        threads: Cores and threads of each worker.
        shard: Episodes of a shard.
        out: A folder that keeps finished shards.
        source: More for `mechicl.load`: device ("cuda": one GPU a worker), dtype, revision, ...

    Raises:
        OptionError: an option out of its range, no Ray, or no cluster.
    """
    if workers:
        if not isinstance(model, str | os.PathLike):
            raise OptionError(f"model must be a name or a folder that every worker can load; got {type(model).__name__}. Or use workers=0.")
        hands: Hands = _ray_hands()({"name": str(model), **source}, workers=workers, address=address, threads=threads)
    elif isinstance(model, str | os.PathLike):
        from mechicl.models.load import load

        hands = Here(load(str(model), **source))
    else:
        hands = Here(model)
    try:
        return Crew(hands, shard=shard, out=out)
    except BaseException:
        hands.close()
        raise


def _ray_hands() -> Any:
    from mechicl.analysis.spread.ray_hands import RayHands

    return RayHands


def spread(
    job: str, episodes: Sequence[Episode], *, model: Any = "demo", workers: int = 1, address: str | None = None, threads: int = 1,
    shard: int = 16, out: str | os.PathLike[str] | None = None, source: Mapping[str, Any] | None = None, **options: Any,
) -> Any:  # fmt: skip
    """Run an analysis on several workers.

    The result is the same bit for bit for any number of workers and any order in which they finish, because shards are cut by `shard` alone and put
    together in the order of the episodes. Against the same analysis on one model it differs as another batch size does (float32: about 1e-6).

    Args:
        job: Name of an analysis, one of `JOBS`.
        episodes: All episodes.
        model: See `hire`.
        workers: See `hire`.
        address: See `hire`.
        threads: See `hire`.
        shard: See `hire`.
        out: See `hire`; the same call with the same folder goes on where it stopped.
        source: More for `mechicl.load`.
        options: The analysis' own: heads, how, seed, batch_size, ...

    Returns:
        What the analysis returns.

    Raises:
        OptionError: an unknown job; see `hire`. What the analysis raises.
    """
    if job not in JOBS:
        raise OptionError(f"job must be one of {', '.join(JOBS)}; got {job!r}. Other analyses run on one model.")
    analysis = getattr(importlib.import_module(JOBS[job]), job)
    with hire(model, workers=workers, address=address, threads=threads, shard=shard, out=out, **(source or {})) as crew:
        return analysis(crew, episodes, **options)
