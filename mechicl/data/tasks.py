"""Tasks by name: what `--task` takes. A task is a function that returns episodes; `register` gives it a name.

An installed package adds its tasks to the command line through the entry points of the group "mechicl.tasks" (name = "module:function").
Nothing heavy is imported, and no task is run, before one is drawn from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import EntryPoint, entry_points
from inspect import signature
from typing import TYPE_CHECKING, Any

from mechicl.errors import OptionError

if TYPE_CHECKING:
    from mechicl.prompts.episode import Episode

Draw = Callable[..., "Sequence[Episode]"]
"""(n, *, ...) -> n episodes. Of classes, shots, size, seed, data, one_length and tell it is given what its signature names."""
GROUP = "mechicl.tasks"


@dataclass(frozen=True)
class Task:
    """A task that has a name.

    Attributes:
        name: What `--task` takes.
        about: What it shows, in a few words for the help.
        draw: The function that returns its episodes.
        reads: It draws from data that the user brings (`data`).
        classes: Classes of an episode where nobody says how many; None: the data decides.
        size: Side of its pictures where nobody says, pixels; None: as they are.
        by_label: Its answers occur among the labels of its examples, as head scores need that ask for the right label.
    """

    name: str
    about: str
    draw: Draw
    reads: bool = False
    classes: int | None = 4
    size: int | None = 56
    by_label: bool = True

    @cached_property
    def takes(self) -> frozenset[str]:
        """What can be chosen: the keywords that `draw` names."""
        return frozenset(signature(self.draw).parameters)

    def episodes(self, n: int, **chosen: Any) -> list[Episode]:
        """n episodes; of what is chosen the function gets what it takes."""
        return list(self.draw(n, **{name: value for name, value in chosen.items() if name in self.takes}))


def register(
    name: str, draw: Draw, about: str = "", *, reads: bool = False, classes: int | None = 4, size: int | None = 56, by_label: bool = True
) -> Task:
    """Give a task a name; the command line takes it from then on, in this process. Given again, the later one counts.

    Args:
        name, draw, about, reads, classes, size, by_label: See `Task`. `about` is by default the first line of the function's docstring.

    Raises:
        OptionError: the name is that of a task which mechicl brings along.
    """
    if name in _OURS:
        raise OptionError(f"name must be new; mechicl brings a task {name!r} along. Choose another name.")
    _KNOWN[name] = Task(name, about or _first_line(draw), draw, reads, classes, size, by_label)
    return _KNOWN[name]


def names() -> tuple[str, ...]:
    """Every task, mechicl's own first, then those of installed packages and of this process."""
    return tuple(dict.fromkeys((*_KNOWN, *_installed())))


def named(name: str) -> Task:
    """The task of this name.

    Raises:
        OptionError: there is none; says which there are.
    """
    if name not in _KNOWN and name in (installed := _installed()):
        return register(name, installed[name].load())
    if name not in _KNOWN:
        raise OptionError(f"task must be one of {', '.join(names())}; got {name!r}. Pick one of them.")
    return _KNOWN[name]


def described() -> str:
    """All tasks in one line: those of one kind together."""
    kinds: dict[str, list[str]] = {}
    for task in _KNOWN.values():
        kinds.setdefault(task.about, []).append(task.name)
    others = [name for name in _installed() if name not in _KNOWN]
    return "; ".join([f"{', '.join(some)}: {about}" if about else ", ".join(some) for about, some in kinds.items()] + others)


def _installed() -> Mapping[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _first_line(draw: Draw) -> str:
    return (draw.__doc__ or "").strip().partition("\n")[0].rstrip(".")


def _concepts(n: int, *, classes: int, shots: int, size: int, seed: int, one_length: bool = False) -> Sequence[Episode]:
    """`one_length`: names of two syllables only, so that any label can take another's place."""
    from mechicl.data import concepts

    return concepts.draw(n, classes=classes, shots=shots, size=size, seed=seed, syllables=(2, 2) if one_length else (1, 4))


def _digits(n: int, *, classes: int, shots: int, size: int, seed: int) -> Sequence[Episode]:
    from mechicl.data import digits

    return digits.draw(n, classes=classes, shots=shots, size=size, seed=seed)


def _own(n: int, *, data: str, classes: int, shots: int, size: int | None, seed: int, tell: Callable[[str], Any]) -> Sequence[Episode]:
    """What cannot be used is left out and told."""
    from mechicl.data.own import check_own, draw, pool_of

    report = check_own(data, size=size, least=shots + 1)
    if report.problems:
        tell(str(report))
    return draw(pool_of(report, size=size), n, classes=classes, shots=shots, seed=seed)


def _vl_icl(name: Any, n: int, *, data: str, shots: int, size: int | None, seed: int, tell: Callable[[str], Any]) -> Sequence[Episode]:
    """What cannot be used is left out and told."""
    from mechicl.data.vl_icl import load_vl_icl

    found = load_vl_icl(data, name, size=size, strict=False)
    if found.report.problems:
        tell(str(found.report))
    shown = found.name in ("clevr", "operator_induction", "operator_induction_interleaved")  # else few prompts show the right label
    return found.episodes(n, shots=shots, shown=shown, seed=seed)


def _open_mi(
    name: Any, n: int, *, data: str, classes: int, shots: int, size: int | None, seed: int, tell: Callable[[str], Any]
) -> Sequence[Episode]:
    """Of VL-ICL Bench the only task with as many classes as one likes."""
    from mechicl.data.vl_icl import load_vl_icl

    found = load_vl_icl(data, name, size=size, strict=False)
    if found.report.problems:
        tell(str(found.report))
    return found.episodes(n, shots=shots, classes=classes, seed=seed)


_BENCH = "VL-ICL Bench in --data"
_KNOWN: dict[str, Task] = {
    task.name: task
    for task in (
        Task("concepts", "pictures of concepts nobody has met", _concepts),
        Task("digits", "real handwritten digits", _digits),
        Task("own", "your pictures in --data", _own, reads=True, classes=2, size=None),
        *(Task(name, _BENCH, partial(_open_mi, name), reads=True, classes=2, size=None) for name in ("open_mi", "fast_open_mi")),
        *(
            Task(name, _BENCH, partial(_vl_icl, name), reads=True, classes=None, size=None, by_label=name != "textocr")
            for name in ("matching_mi", "clevr", "operator_induction", "operator_induction_interleaved", "textocr")
        ),
    )
}
_OURS = frozenset(_KNOWN)
