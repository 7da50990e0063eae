"""What every analysis that runs a model does around itself: go on with fewer prompts where memory runs out, and look at the numbers it stands on.

`guarded` is the outer net: an analysis whose memory ran out is run again with half the prompts per forward pass, so its result is that of the smaller
batch and no episode is dropped. `each_batch` is the inner one, for loops whose finished batches are worth keeping: only the batch that did not fit is
done again, in halves, and later ones stay that small. Both leave a note in the result. An analysis made of guarded ones says their notes as its own;
`noted` collects them for work that keeps its parts in a folder and cannot begin again with another batch size.

Both do the same for prompts of several lengths in a family whose logits padding moves (`mechicl.models.places`): a batch that was refused is cut into
neighbours of one length, or the analysis runs again with one prompt at a time.

The first forward pass of every production model is watched (`mechicl.models.guards`): an infinity is an error that names the layer, values near the
largest number of the dtype are a note.
"""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass, replace
from functools import wraps
from inspect import BoundArguments, signature
from typing import Any, ParamSpec, TypeVar, cast

import torch

from mechicl.analysis.feed import Data, runs_of_one_length
from mechicl.errors import NotFiniteError, PaddingError
from mechicl.models.guards import Watch, watched
from mechicl.models.resuming.memory import out_of_memory
from mechicl.prompts.batch import Batch

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Rows = TypeVar("Rows", bound=Sequence[Any])

APART = "Padding moves this model's logits, so prompts of several lengths, or with pictures of several sizes, went through it apart; nothing was left out."
GAVE_UP = "One prompt at a time does not fit either: use fewer shots, smaller pictures, a smaller dtype, or device_map='auto'."

MARK = "guarded"
"""Attribute of every guarded analysis."""

_NOTES: ContextVar[list[str] | None] = ContextVar("notes of the running analysis", default=None)


def guarded(analysis: Callable[P, R]) -> Callable[P, R]:
    """An analysis with a `batch_size`, and mostly a `model`, that gets by with the memory there is, and notices numbers that overflow.

    Where memory runs out, `analysis` runs again with half its `batch_size`, down to one; then torch's error is raised, with advice. Notes are added to
    the result (see `with_notes`), and said to the analysis that asked for it. Models that are not called `model` (two that are compared, checkpoints that
    are loaded in their turn) are watched by the guarded analyses inside.

    Raises:
        NotFiniteError: an activation of the first forward pass is NaN or infinite; names the layer.
    """
    parameters = signature(analysis)

    @wraps(analysis)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = parameters.bind(*args, **kwargs)
        bound.apply_defaults()
        model = bound.arguments.get("model")
        size = asked = bound.arguments.get("batch_size")  # None: it is among the options of a guarded analysis inside
        apart = False
        while True:
            try:
                with _noting() as notes, watched(model) as watch:
                    result = _told(analysis, bound, watch)
            except PaddingError:
                if not isinstance(size, int) or size <= 1:
                    raise
                size = bound.arguments["batch_size"] = asked = 1
                apart = True
                continue
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or gave_up(error):
                    raise
                if not isinstance(size, int) or size <= 1:
                    error.add_note(GAVE_UP)
                    raise
            else:
                if isinstance(asked, int) and isinstance(size, int) and size != asked:
                    notes.insert(0, memory_note(asked, size))
                if apart:
                    notes.insert(0, APART)
                return _handed_on(result, [*notes, *watch.notes()])
            size = bound.arguments["batch_size"] = size // 2
            free()  # outside of the except block, whose error keeps the tensors of the failed pass alive

    setattr(run, MARK, True)
    return run


def _told(analysis: Callable[P, R], bound: BoundArguments, watch: Watch) -> R:
    """Run it; where a number is not finite, the error says in which layer that began."""
    try:
        result = analysis(*bound.args, **bound.kwargs)
    except NotFiniteError as error:
        if (place := watch.first()) and place not in str(error):
            error.args = (f"{error.args[0]} It begins in the output of {place}.",)
        raise
    watch.check()
    return result


def each_batch(
    model: Any, data: Data, size: int, work: Callable[[Batch, range], T], *, least: int = 1, done: Callable[[int], Any] | None = None
) -> Iterator[T]:
    """What `work` makes of batches of at most `size` prompts (but at least `least`), in order.

    A batch for which memory runs out is done again in halves, and no later one is larger; nothing that was finished is done twice.

    Args:
        model: Renders episodes.
        data: Prompts or episodes.
        size: Prompts per batch.
        work: Called with a batch and the rows of the data that it holds; may be called again with half of them, so it must keep nothing of its own.
        least: Fewest prompts of a batch; memory that runs out there is an error.
        done: Called with the number of prompts of every finished batch (a progress bar's `update`).
    """
    n = len(data)
    n_parts = max(1, min(-(-n // size), n // least))
    parts = [range(part * n // n_parts, (part + 1) * n // n_parts) for part in range(n_parts)]

    def alike(rows: range) -> list[range]:
        return [range(rows.start + a, rows.start + b) for a, b in runs_of_one_length(_batch(model, data, rows))]

    return each_part(parts, lambda rows: work(_batch(model, data, rows), rows), least=least, done=done, alike=alike)


def each_part(
    parts: Iterable[Rows],
    work: Callable[[Rows], T],
    *,
    least: int = 1,
    done: Callable[[int], Any] | None = None,
    alike: Callable[[Rows], list[Rows]] | None = None,
) -> Iterator[T]:
    """`each_batch` for work that makes its prompts itself: what `work` makes of each part, a slice of rows (or of what stands for them), halved where memory
    runs out. `alike` cuts a part into prompts of one length, where padding is refused; default in halves.
    """
    queue, most = list(parts), sys.maxsize
    while queue:
        rows = queue.pop(0)
        if len(rows) > most and len(rows) >= 2 * least:
            queue[:0] = _halves(rows)
            continue
        try:
            result = work(rows)
        except PaddingError:
            if len(rows) < 2 * least:
                raise
            say(APART)
            cut = alike(rows) if alike is not None else []
            queue[:0] = cut if len(cut) > 1 else _halves(rows)  # of one length in the prompts, but not in what the work made of them
            continue
        except (RuntimeError, MemoryError) as error:
            if len(rows) < 2 * least or not out_of_memory(error):
                raise
        else:
            yield result
            if done is not None:
                done(len(rows))
            continue
        free()
        most = (len(rows) + 1) // 2
        say(memory_note(len(rows), most))
        queue[:0] = _halves(rows)


def _halves(rows: Rows) -> list[Rows]:
    middle = (len(rows) + 1) // 2
    return [cast(Rows, rows[:middle]), cast(Rows, rows[middle:])]


def _batch(model: Any, data: Data, rows: Sequence[int]) -> Batch:
    if isinstance(data, Batch):
        return data if len(rows) == data.n else data.select(rows)
    return model.render([data[i] for i in rows])


def memory_note(before: int, after: int) -> str:
    """What a result says about a batch that did not fit."""
    return f"Memory ran out at {before} prompts per forward pass; the run went on with {after}, and left nothing out."


def say(note: str) -> None:
    """Add a note to the result of the analysis that is running, once."""
    notes = _NOTES.get()
    if notes is not None and note not in notes:
        notes.append(note)


def gave_up(error: BaseException) -> bool:
    """Whether an analysis inside already tried with one prompt."""
    return GAVE_UP in getattr(error, "__notes__", ())


def free() -> None:
    """Give back what the failed pass held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def noted(model: Any = None) -> Iterator[list[str]]:
    """The notes of what is done inside the block, whole once it ends: memory that ran out, numbers near the largest of the dtype.

    Raises:
        NotFiniteError: an activation of the first forward pass is NaN or infinite; names the layer.
    """
    with _noting() as notes, watched(model) as watch:
        yield notes
        watch.check()
    notes += [note for note in watch.notes() if note not in notes]


@contextmanager
def _noting() -> Iterator[list[str]]:
    notes: list[str] = []
    token = _NOTES.set(notes)
    try:
        yield notes
    finally:
        _NOTES.reset(token)


def _handed_on(result: R, notes: Sequence[str]) -> R:
    """The result with its notes, which the analysis that asked for it says too: a number that it makes of the result stands on them as well."""
    told = with_notes(result, notes)
    for note in notes:
        say(note)
    return told


def with_notes(result: R, notes: Sequence[str]) -> R:
    """The result with more notes: among its own, or in its provenance's options as "remarks"; a bare number or table tells the analysis that asked
    for it, or warns.
    """
    names = {field.name for field in fields(result)} if is_dataclass(result) and not isinstance(result, type) else set[str]()
    if not notes:
        return result
    if "notes" in names:
        old = result.notes  # pyright: ignore[reportAttributeAccessIssue]
        new = [note for note in notes if not any(one.endswith(note) for one in old)]  # "the base: ..." says it already, and of which model
        return replace(result, notes=(*old, *new))  # type: ignore[type-var]
    if "provenance" in names:
        made = result.provenance  # pyright: ignore[reportAttributeAccessIssue]
        return replace(result, provenance=replace(made, options={**made.options, "remarks": list(notes)}))  # type: ignore[type-var]
    for note in notes:
        if _NOTES.get() is None:
            warnings.warn(note, RuntimeWarning, stacklevel=4)
    return result
