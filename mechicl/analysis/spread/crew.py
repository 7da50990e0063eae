"""A crew of workers that stands in for a model: `score_heads(crew, episodes)` reads attention on all of them and makes its statistics here.

Shards are cut by number of episodes alone, never by number of workers, and put together in the order of the episodes: the result is the same, bit for
bit, for any number of workers and any order in which they finish (on machines of one kind, with as many threads each).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor

from mechicl.analysis.feed import Data, Spreads, ids_of, progress_bar
from mechicl.analysis.guarded import say
from mechicl.analysis.heads.published import Published
from mechicl.analysis.spread.folder import ShardFolder
from mechicl.analysis.spread.work import Part, answers, means, published_of, readings
from mechicl.errors import EpisodeError, OptionError
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode


@dataclass(frozen=True)
class Call:
    """A shard to be done: what (a name of `work.WORK`), with which episodes and options."""

    what: str
    episodes: Sequence[Episode]
    options: Mapping[str, Any]


class Hands(ABC):
    """Who does the work: this process, or Ray's."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What a worker says of its model; see `work.about`."""

    @abstractmethod
    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Part]]:
        """(index of the call, what came of it), as they finish."""

    def close(self) -> None:
        """Let the workers go."""
        return


class Crew(Spreads):
    """Stands in for a model in `score_heads`, `attention_by_role`, `icl_accuracy`, `ablate`, `dose_curve` and what is made of them.

    Args:
        hands: Who does the work.
        shard: Episodes of a shard. The result depends on it as on a batch size (rounding), and on nothing else.
        out: A folder that keeps finished shards; a crew with the same model goes on where another one stopped.

    Raises:
        CheckpointError, OutputPathError: see `mechicl.analysis.kept.KeptFolder`.
    """

    hands: Hands
    shard: int
    cfg: Any
    anatomy: SimpleNamespace
    folder: ShardFolder | None

    def __init__(self, hands: Hands, *, shard: int = 16, out: Any = None) -> None:
        if shard < 2:
            raise OptionError(f"shard must be at least 2; got {shard}. 16 episodes a shard suit most models.")
        self.hands, self.shard = hands, shard
        known = hands.about()
        self.cfg, self._described = known["cfg"], known["describe"]
        self.hook_dict: dict[str, None] = dict.fromkeys(known["hooks"])
        self.unavailable: Mapping[str, str] = known["unavailable"]
        self.anatomy = SimpleNamespace(layers=[SimpleNamespace(n_heads=n) for n in known["n_heads"]])
        about = {k: str(v) for k, v in self._described.items() if k in ("model", "revision", "dtype")}
        self.folder = ShardFolder(out, {"model": about, "shard": shard}) if out is not None else None

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: Any) -> None:
        self.hands.close()

    def describe(self) -> dict[str, Any]:
        """As the workers' model describes itself."""
        return dict(self._described)

    def render(self, episodes: Sequence[Episode]) -> None:
        """Have a worker render episodes: what rendering refuses is refused."""
        self._all("render", list(episodes), {}, shards=[range(len(episodes))])

    def read(self, data: Data, wanted: Any, *, batch_size: int, progress: bool, names: Sequence[str]) -> list[Any]:
        """As `read_parts` on one model."""
        episodes = _episodes(data)
        n_shots = max(len(episode.shots) for episode in episodes)
        n_parts = -(-len(episodes) // batch_size)
        first = episodes[: len(episodes) // n_parts]
        room = self._all("render", first, {"wanted": wanted, "n_shots": n_shots}, shards=[range(len(first))])[0].said["n_offsets"]
        options = {"wanted": wanted, "n_shots": n_shots, "n_offsets": room, "batch_size": batch_size}
        return readings(self._all("read", episodes, options, names=names, what="reading attention", progress=progress))

    def published(self, data: Data, *, batch_size: int, progress: bool) -> Published:
        """As `published_scores` on one model."""
        options = {"batch_size": batch_size}
        return published_of(
            self._all("published", _episodes(data), options, names=ids_of(data), what="published head scores", progress=progress)
        )

    def answer(self, data: Data, *, score: Any, switches: Any, batch_size: int, names: Sequence[str], what: str, progress: bool) -> Any:
        """As `answer` on one model."""
        options = {"score": score, "switches": switches, "batch_size": batch_size}
        return answers(self._all("answer", _episodes(data), options, names=names or [""] * len(data), what=what, progress=progress))

    def head_means(self, data: Data, layers: Sequence[int], *, batch_size: int) -> dict[int, Tensor]:
        """As `head_means` of one model."""
        return means(self._all("sum", _episodes(data), {"layers": list(layers), "batch_size": batch_size}))

    def _all(
        self, job: str, episodes: Sequence[Episode], options: Mapping[str, Any], *, names: Sequence[str] | None = None,
        shards: Sequence[range] | None = None, what: str = "", progress: bool = False,
    ) -> list[Part]:  # fmt: skip
        """Every shard's part, in order: those that are kept, and the others as they come."""
        n = len(episodes)
        count = max(1, -(-n // self.shard))
        shards = shards or [range(k * n // count, (k + 1) * n // count) for k in range(count)]
        key = digest(job, episodes, options) if self.folder is not None and job != "render" else ""
        found = dict(self.folder.load(key)) if self.folder is not None and key else {}
        missing = [k for k in range(len(shards)) if k not in found]
        calls = [
            Call(job, [episodes[i] for i in shards[k]], {**options, **({} if names is None else {"names": [names[i] for i in shards[k]]})})
            for k in missing
        ]
        bar = progress_bar(None, total=n, what=what, show=progress and bool(what))
        bar.update(n - sum(len(shards[k]) for k in missing))
        for index, part in self.hands.run(calls):
            found[missing[index]] = part
            if self.folder is not None and key:
                self.folder.add(key, missing[index], part)
            bar.update(len(shards[missing[index]]))
        bar.close()
        parts = [found[k] for k in range(len(shards))]
        for part in parts:
            for note in part.notes:
                say(note)
        return parts


def _episodes(data: Data) -> Sequence[Episode]:
    if isinstance(data, Batch):
        raise EpisodeError("data must be episodes where several workers share them; got a Batch. Hand over the episodes themselves.")
    return data


def digest(job: str, episodes: Sequence[Episode], options: Mapping[str, Any]) -> str:
    """What decides a job's numbers: its episodes with their pictures, and its options."""
    found = hashlib.sha256(job.encode())
    for value in (options, *episodes):
        for piece in _pieces(value):
            found.update(piece + b"\0")
    return found.hexdigest()


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        yield repr(value.shape).encode() + value.tobytes()
    elif hasattr(value, "tobytes") and hasattr(value, "size"):  # a picture
        yield repr(value.size).encode() + value.tobytes()
    elif isinstance(value, Mapping):
        for name in value:
            yield repr(name).encode()
            yield from _pieces(value[name])
    elif isinstance(value, list | tuple):
        yield str(len(value)).encode()
        for one in value:
            yield from _pieces(one)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _pieces({name: getattr(value, name) for name in value.__dataclass_fields__})
    else:
        yield repr(value).encode()
