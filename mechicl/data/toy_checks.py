"""What the settings of a toy task must be: counts, shares, whole parts, bursts. Every refusal of `toy_tasks` is written here."""

from __future__ import annotations

import numpy as np

from mechicl.errors import OptionError


def counts(task: object, *names: str) -> None:
    """Raises OptionError unless these settings are whole numbers above zero."""
    for name in names:
        value = getattr(task, name)
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise OptionError(f"{name} must be a whole number of at least 1; got {value!r}. Count with whole numbers.")


def shares(task: object, *names: str) -> None:
    """Raises OptionError unless these settings are in 0..1."""
    for name in names:
        if not 0 <= getattr(task, name) <= 1:
            raise OptionError(f"{name} must be a share in 0..1; got {getattr(task, name)!r}. 0 is none, 1 is all.")


def not_negative(task: object, *names: str) -> None:
    """Raises OptionError unless these settings are finite and at least zero."""
    for name in names:
        if not 0 <= getattr(task, name) < float("inf"):
            raise OptionError(f"{name} must be a number of at least 0; got {getattr(task, name)!r}. 0 is the least.")


def choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises OptionError for a value that is not among the choices."""
    if value not in choices:
        raise OptionError(f"{name} must be one of {', '.join(choices)}; got {value!r}. Pick one of them.")


def at_least_two(name: str, value: int) -> None:
    """Raises OptionError below two."""
    if value < 2:
        raise OptionError(f"{name} must be at least 2; got {value}. With one label nothing can be told apart.")


def divides(part_name: str, part: int, whole_name: str, whole: int) -> None:
    """Raises OptionError unless the part divides the whole; names the nearest whole that it does divide."""
    if whole % part:
        raise OptionError(
            f"{part_name} must divide {whole_name}, so that every label has as many classes; got {part} and {whole}. "
            f"The nearest {whole_name} is {max(round(whole / part), 1) * part}."
        )


def burst(n: int, b: int) -> None:
    """Raises OptionError unless B divides N and is below it."""
    if n % b or b >= n:
        raise OptionError(
            f"B must divide N and be below it; got B = {b} and N = {n}. B is how often each class of a bursty sequence is shown."
        )
