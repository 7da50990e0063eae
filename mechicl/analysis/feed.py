"""From data to batches, and from a run to its provenance: what every analysis does first and last."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from tqdm.auto import tqdm

from mechicl.errors import EpisodeError, OptionError
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode, check_episodes, check_pictures
from mechicl.results import Provenance, Skipped

Data = Batch | Sequence[Episode]
"""Rendered prompts, or episodes that the model renders a few at a time (pictures of all episodes at once may not fit)."""


class Spreads(ABC):
    """What stands in for a model whose work is spread over several processes (`mechicl.analysis.spread`): what analyses ask of it."""

    cfg: Any

    @abstractmethod
    def read(self, data: Data, wanted: Any, *, batch_size: int, progress: bool, names: Sequence[str]) -> list[Any]:
        """As `mechicl.analysis.heads.reading.read_parts`."""

    @abstractmethod
    def published(self, data: Data, *, batch_size: int, progress: bool) -> Any:
        """As `mechicl.analysis.heads.published.published_scores`."""

    @abstractmethod
    def answer(self, data: Data, *, score: Any, switches: Any, batch_size: int, names: Sequence[str], what: str, progress: bool) -> Any:
        """As `mechicl.analysis.labels.answer`."""

    @abstractmethod
    def head_means(self, data: Data, layers: Sequence[int], *, batch_size: int) -> dict[int, Any]:
        """As `mechicl.analysis.ablation.switches.head_means`."""


PACKAGES = ("mechicl", "torch", "transformers", "transformer-lens", "numpy", "scipy", "statsmodels")


def check_data(data: Data, batch_size: int) -> int:
    """Number of episodes, after the refusals that need no model.

    Raises:
        EpisodeError: nothing to score, no shots, or one class only.
        OptionError: batch_size is below one.
    """
    if batch_size < 1:
        raise OptionError(f"batch_size must be at least 1; got {batch_size}. Choose how many prompts go through the model at once.")
    if isinstance(data, Batch):
        if not data.n:
            raise EpisodeError("data must hold at least one prompt; got an empty batch. Draw and render some episodes.")
        return data.n
    if not isinstance(data, Sequence) or not all(isinstance(episode, Episode) for episode in data):
        raise EpisodeError(
            f"data must be a Batch or a list of episodes; got {type(data).__name__}. Draw some, or render them with model.render."
        )
    check_episodes(data, images=False)
    return len(data)


def rehearse(model: Any, data: Data) -> None:
    """Read every picture and render the longest episode, so that a damaged file, a prompt beyond the context or a picture that the processor refuses
    is an error now, not after an hour.

    Raises:
        ContextLengthError, RenderError, ImageError: what rendering raises.
    """
    if isinstance(data, Batch):
        return
    check_pictures(data)

    def length(episode: Episode) -> tuple[int, int]:
        shots = (*episode.shots, episode.query)
        return sum(image.width * image.height for image in episode.images), sum(len(shot.text) + len(shot.label) for shot in shots)

    model.render([max(data, key=length)])


def ids_of(data: Data) -> list[str]:
    """A name for every episode: its id, else its number."""
    names = list(data.ids) if isinstance(data, Batch) else [episode.id for episode in data]
    return [name or str(i) for i, name in enumerate(names or [""] * len(data))]


def labels_of(data: Data) -> list[tuple[tuple[str, ...], str]]:
    """For each episode the exemplars' labels, in order, and the answer."""
    if not isinstance(data, Batch):
        return [(tuple(shot.label for shot in episode.shots), episode.answer) for episode in data]
    found = []
    for i, row in enumerate(data.spans):
        labels = {span.shot: span.label for span in row if span.role == "label" and span.shot >= 0}
        found.append((tuple(labels[k] for k in sorted(labels)), data.candidates[i][data.answers[i]]))
    return found


def comparable(data: Data) -> tuple[list[int], tuple[Skipped, ...]]:
    """Episodes whose context shows the right label and a wrong one; the others, each with its reason.

    Raises:
        EpisodeError: none is left.
    """
    kept, skipped = [], []
    for i, (name, (labels, answer)) in enumerate(zip(ids_of(data), labels_of(data), strict=True)):
        reason = ""
        if not labels:
            reason = "no exemplar label is in the prompt"
        elif answer not in labels:
            reason = f"no exemplar has the right label {answer!r}"
        elif set(labels) == {answer}:
            reason = f"every exemplar has the right label {answer!r}: one class only"
        if reason:
            skipped.append(Skipped(name, reason))
        else:
            kept.append(i)
    if not kept:
        raise EpisodeError(
            f"episodes must show the right label and a wrong one among the exemplars; none of {len(skipped)} does ({skipped[0].reason}). "
            "Draw episodes of at least two classes, the query's among them."
        )
    return kept, tuple(skipped)


def take(data: Data, rows: Sequence[int]) -> Data:
    """The episodes `rows` of the data."""
    if len(rows) == len(data):
        return data
    return data.select(rows) if isinstance(data, Batch) else [data[i] for i in rows]


def batches(model: Any, data: Data, size: int, *, least: int = 1) -> Iterator[Batch]:
    """Batches of at most `size` prompts (but at least `least`), in order, as even as can be; episodes are rendered when their turn comes."""
    n = len(data)
    n_parts = max(1, min(-(-n // size), n // least))
    for part in range(n_parts):
        rows = range(part * n // n_parts, (part + 1) * n // n_parts)
        if isinstance(data, Batch):
            yield data if n_parts == 1 else data.select(rows)
        else:
            yield model.render([data[i] for i in rows])


def runs_of_one_length(batch: Batch) -> list[tuple[int, int]]:
    """[start, stop) of neighbouring prompts of one length, in order."""
    mask = batch.inputs.get("attention_mask")
    lengths = [batch.n_pos] * batch.n if mask is None else mask.sum(-1).tolist()
    starts = [i for i in range(batch.n) if i == 0 or lengths[i] != lengths[i - 1]]
    return list(zip(starts, [*starts[1:], batch.n], strict=True))


def progress_bar(items: Iterable[Any] | None, *, total: int, what: str, show: bool) -> Any:
    """The items, with a progress bar on the terminal (or in the notebook) while `show`; a bar to be updated by hand without items."""
    return tqdm(items, total=total, desc=what, disable=not show, leave=False)


@cache
def _versions() -> Mapping[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # a source tree that was not installed
            found[package] = "unknown"
    return found


def provenance(model: Any, *, task: str, seed: int | None, options: Mapping[str, Any]) -> Provenance:
    """How a result was made."""
    about = dict(model.describe())
    return Provenance(
        model=str(about.get("model", "")), revision=str(about.get("revision", "")), dtype=str(about.get("dtype", "")),
        attention=str(about.get("attention", "")), device=str(about.get("device", "")), task=task, seed=seed,
        versions={**_versions(), **about.get("versions", {})}, options=dict(options),
    )  # fmt: skip
